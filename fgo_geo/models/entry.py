r"""The record of one parameter in a plan, and how several records are printed.

:class:`PlanEntry` is plain data: groups, radius rule and channel scales, or the reason why the parameter was left
alone. :func:`table_of` prints several of them. :mod:`fgo_geo.models.choose` decides what they hold.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from fgo_geo.linalg import whole
from fgo_geo.manifolds import ComponentManifold, ProductOfGroups
from fgo_geo.models.feature_stats import LambdaRule, component_lambda
from fgo_geo.weights.components import Partition
from fgo_geo.weights.grouping import Collection
from fgo_geo.weights.layout import Storage, WeightLayout
from fgo_geo.weights.radius import (
    BoundOf,
    RadiusRule,
    bound_in_words,
    check_bound,
    check_bound_of,
    check_rule,
    group_radii,
)
from fgo_geo.weights.words import counted_globs, globs, line_width, stated

__all__ = ["PlanEntry", "names_by_reason", "table_of"]


@dataclass(frozen=True)
class PlanEntry:
    """How one parameter is constrained, or why it is not.

    Attributes:
        names: Its names in the model; more than one if the weight is tied.
        module: Type of the module that owns it.
        shape: Its shape.
        reason: Why it was left alone; None if it is constrained.
        layout: How the weight is stored, if it is constrained.
        collections: Its groups; one collection per section of the layout.
        radius: The rule for the geometric radius ``γ``.
        bound: The bound of the rule ``"bound"``.
        bound_of: Whether it bounds the norms of every group or those of the whole weight.
        statistics: The rule for the statistical factor ``λ``; None for ``λ = 1``.
        channel_scales: ``λ`` of every input channel, as of the latest :meth:`~fgo_geo.Plan.update_scales`;
            empty before.
        notes: Remarks for readers.
    """

    names: tuple[str, ...]
    module: str
    shape: tuple[int, ...]
    reason: str | None = None
    layout: WeightLayout | None = None
    collections: tuple[Collection, ...] = ()
    radius: RadiusRule = "kaiming"
    bound: float = 1.0
    statistics: LambdaRule | None = None
    channel_scales: tuple[float, ...] = ()
    notes: tuple[str, ...] = field(default=(), compare=False)
    bound_of: BoundOf = "group"

    @property
    def name(self) -> str:
        """The first of its names."""
        return self.names[0]

    @property
    def constrained(self) -> bool:
        """Whether it is on a manifold."""
        return self.reason is None

    def kinds_used(self) -> list[str]:
        """The kinds that have groups, sorted."""
        return sorted({c.kinds[number] for c in self.collections for number in set(c.group_kinds.tolist())})

    def bound_in_words(self) -> str:
        """What the radii bound, in words; empty if nothing."""
        return bound_in_words(self.bound_of, self.bound, self.kinds_used()) if self.radius == "bound" else ""

    def manifold(self) -> ProductOfGroups:
        """A new manifold as this entry describes it.

        Raises:
            ValueError: If the parameter was left alone, or its components cannot lie on the manifolds of their groups.
        """
        if self.layout is None:
            raise ValueError(f"{self.name!r} is not constrained: it {self.reason}")
        return ProductOfGroups(self.collections, self.layout, self.radii)

    def radii(self, cut: Partition) -> list[Tensor]:
        """The radius ``γ / λ`` of every component, part by part ("Mathematics", section 5).

        Args:
            cut: The partition of the weight.

        Returns:
            For every part a tensor ``(n,)`` in double precision.
        """
        geometric = cut.per_component(group_radii(cut, self.radius, self.bound, bound_of=self.bound_of).numpy())
        radii = [torch.from_numpy(np.ascontiguousarray(gamma)) for gamma in geometric]
        if not self.channel_scales:
            return radii
        scales = component_lambda(torch.tensor(self.channel_scales, dtype=torch.float64), cut)
        return [gamma / lam for gamma, lam in zip(radii, scales, strict=True)]

    def checked_value(self, value: object, key: str) -> Tensor:
        """The value for this parameter in a state dict. For a sharded value, all processes must call this.

        Args:
            value: The value in the state dict.
            key: Its key there.

        Raises:
            ValueError: If it is not a tensor of real numbers, or has another shape.
        """
        if isinstance(value, Tensor) and value.shape == self.shape and value.is_floating_point():
            return whole(value.detach())
        found = f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(
            f"{key!r} in the state_dict: expected floating-point numbers of shape {self.shape}, got {found}; load a "
            "checkpoint of this architecture"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        data = {f.name: getattr(self, f.name) for f in fields(self)}
        data["layout"] = None if self.layout is None else asdict(self.layout)
        data["collections"] = [c.to_json() for c in self.collections]
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> PlanEntry:
        """Inverse of :meth:`to_dict`.

        Raises:
            ValueError: If a value is not what :meth:`to_dict` writes.
        """
        stored = dict(data)
        for name in ("names", "shape", "channel_scales", "notes"):
            stored[name] = tuple(stored.get(name, ()))
        layout = stored["layout"]
        if layout is not None:
            stored["layout"] = replace(WeightLayout(**layout), shape=stored["shape"])
        entry = cls(**stored)
        entry._require_plain_values()
        return replace(entry, collections=tuple(map(Collection.from_json, entry.collections)))  # pyright: ignore

    def _require_plain_values(self) -> None:
        """Raise ValueError if a field is invalid; collections check themselves."""
        layout = self.layout or WeightLayout((1, 1))
        valid = {
            "names": bool(self.names) and all(isinstance(name, str) for name in self.names),
            "module": isinstance(self.module, str),
            "notes": all(isinstance(note, str) for note in self.notes),
            "shape": all(type(size) is int and size >= 0 for size in self.shape),
            "reason": (self.reason is None) == (self.layout is not None) and isinstance(self.reason, (str, type(None))),
            "layout": layout.storage in get_args(Storage)
            and len(layout.shape) > 1
            and all(type(count) is int and count >= 1 for count in (layout.conv_groups, layout.sections)),
            "collections": isinstance(self.collections, (list, tuple)),
            "statistics": self.statistics in (None, *get_args(LambdaRule)),
            "channel_scales": all(isinstance(scale, float) and 0 < scale < math.inf for scale in self.channel_scales),
        }
        if not all(valid.values()):
            wrong = [f"{name}={getattr(self, name)!r}" for name, is_valid in valid.items() if not is_valid]
            raise ValueError(f"{self.names!r} has {', '.join(wrong)}")
        check_rule(self.radius)
        check_bound(self.bound)
        check_bound_of(self.bound_of)


# -- printing -------------------------------------------------------------------------------------------------

_HEADER = ("parameter", "shape", "layer", "components", "groups", "manifolds", "radius")


def table_of(entries: Sequence[PlanEntry], manifold_of: Callable[[PlanEntry], ProductOfGroups]) -> str:
    """A table of the constrained parameters, the reasons for the others, and a summary.

    Names in equal rows that differ in numbers alone are shown as a glob and their number.

    Args:
        entries: One per parameter.
        manifold_of: Returns the manifold of a constrained entry.
    """
    rows: list[tuple[str, ...]] = []
    notes: dict[str, list[str]] = {}
    for entry in entries:
        for note in entry.notes:
            notes.setdefault(note, []).extend(entry.names)
        if entry.reason is None:
            rows.append(_row(entry, manifold_of(entry)))
    width, known = line_width(), [name for entry in entries for name in entry.names]
    remarks = _remarks("Notes:", [f"{globs(names, known)}: {note}" for note, names in notes.items()], width)
    reasons = [stated(names, reason, globs(names, known)) for reason, names in names_by_reason(entries).items()]
    remarks += _remarks("Left alone:", reasons, width)
    rows = _collapsed(rows, known)
    table = _table(rows)
    if max(map(len, table)) > width:
        table = [line for row in rows for line in _paragraph(row, int(width))]
    return "\n".join([*table, "", *remarks, textwrap.fill(_summary(entries), int(min(width, 160)))])


def _collapsed(rows: Sequence[tuple[str, ...]], known: Sequence[str]) -> list[tuple[str, ...]]:
    """The rows, where one with a glob stands for all that differ in the numbers of their names alone."""
    alike: dict[tuple[str, ...], list[str]] = {}
    for name, *cells in rows:
        alike.setdefault(tuple(cells), []).append(name)
    labels = {cells: counted_globs(names, known, partly=True) for cells, names in alike.items()}
    return list(dict.fromkeys((labels[tuple(cells)][name], *cells) for name, *cells in rows))


def names_by_reason(entries: Sequence[PlanEntry]) -> dict[str, list[str]]:
    """The names of the parameters that were left alone, by reason."""
    reasons: dict[str, list[str]] = {}
    for entry in entries:
        if entry.reason is not None:
            reasons.setdefault(entry.reason, []).extend(entry.names)
    return reasons


def _remarks(title: str, remarks: list[str], width: float) -> list[str]:
    """A title and indented remarks; nothing without remarks."""
    columns = int(min(width, 160))
    lines = [textwrap.fill(remark, columns, initial_indent="  ", subsequent_indent="    ") for remark in remarks]
    return [title, *lines, ""] if lines else []


def _summary(entries: Sequence[PlanEntry]) -> str:
    constrained = [entry for entry in entries if entry.constrained]
    count, total = (sum(math.prod(e.shape) for e in some) for some in (constrained, entries))
    share = 100 * count / max(total, 1)
    return f"{len(constrained)} of {len(entries)} parameters constrained: {share:.1f} % of {total:,} numbers"


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Lines of a table with aligned columns."""
    widths = [max(map(len, column)) for column in zip(_HEADER, *rows, strict=True)]
    rule = tuple("-" * width for width in widths)
    cells = ([cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in (_HEADER, rule, *rows))
    return ["  ".join(row).rstrip() for row in cells]


def _paragraph(row: tuple[str, ...], width: int) -> list[str]:
    """A row of the table for a terminal that is too narrow for it."""
    name, shape, layer, components, groups, kinds, radius = row
    return [
        *textwrap.wrap(f"{name}: {layer} {shape}", width, subsequent_indent="    "),
        *textwrap.wrap(
            f"{components} in {groups} groups: {kinds}; radius {radius}",
            width,
            initial_indent="    ",
            subsequent_indent="    ",
        ),
    ]


def _row(entry: PlanEntry, manifold: ProductOfGroups) -> tuple[str, ...]:
    """The cells of a constrained entry in the printed table."""
    first = entry.collections[0]
    counts = np.sum([np.bincount(c.group_kinds, minlength=len(c.kinds)) for c in entry.collections], axis=0)
    kernels = f"{'x'.join(map(str, manifold.layout.kernel))} kernels"
    noun = {"block": "blocks", "filter": "filters"}.get(first.components, kernels)
    total = sum(manifold.partition.counts)
    bound = entry.bound_in_words()
    ranges = [m.radius_range for m, _ in manifold.parts if isinstance(m, ComponentManifold)]
    low, high = min((low for low, _ in ranges), default=None), max((high for _, high in ranges), default=None)
    return (
        entry.name if len(entry.names) == 1 else f"{entry.name} (also {', '.join(entry.names[1:])})",
        "x".join(map(str, entry.shape)),
        entry.module,
        f"{total} {noun if total > 1 else noun[:-1]}",
        f"{manifold.n_groups} ({first.strategy})",
        " + ".join(f"{count} {kind}" for kind, count in zip(first.kinds, counts, strict=True) if count),
        ("none" if low is None else f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}")
        + (f" ({bound})" if bound else "")
        + (f" / {entry.statistics}" * bool(entry.statistics)),
    )
