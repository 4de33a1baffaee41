r"""What a model's weights obey: norms of every group, feasibility, and the generalisation measures that follow.

:func:`report` reads a model and returns a :class:`Report`, a frozen record of numbers. Reading has three steps: find
the weights, whether plain, on a manifold or renormalised, with their groups (a plain weight, or one on a single
manifold, is one group); measure them, :mod:`fgo_geo.norms`; and sum the measures up over the layers,
:mod:`fgo_geo.bounds`. Printing, plotting and export are methods on top of the record.

The measures take the model for a chain of its weights: skip connections, pooling and activations count as maps of
norm at most one. Batch normalisation is left out unless ``fold=True``, see :mod:`fgo_geo.folding`.
"""

from __future__ import annotations

import json
import math
import textwrap
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, cast

import geoopt
import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fgo_geo.bounds import (
    BoundTerms,
    DepthFactor,
    bartlett2017_terms,
    neyshabur2015_terms,
    neyshabur2018_terms,
)
from fgo_geo.bounds import margin as margin_quantile_of
from fgo_geo.choose import Site, few, sites_of
from fgo_geo.components import CONVOLUTIONS, Partition, WeightLayout, layout_of
from fgo_geo.folding import BatchNorm, BatchNormRecord, fold_batchnorm
from fgo_geo.linalg import require_finite
from fgo_geo.manifolds import ProductOfGroups
from fgo_geo.manifolds.embedded import EmbeddedManifold
from fgo_geo.norms import (
    MatrixNorms,
    conv_operator_norm_bound,
    conv_operator_norm_circular,
    group_norms,
    matrix_norms,
)
from fgo_geo.renormalize import Renormalization, renormalization_of

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

__all__ = ["LayerReport", "Measure", "Report", "TauStatistics", "report"]

Kind = Literal["plain", "product", "manifold", "renormalised", "diagonal"]
Scaling = Literal["groups", "layers"]

_SYMBOLS = {"frobenius": "‖·‖F", "spectral": "‖·‖2", "two_to_one": "‖·‖2→1"}
_NORMS = tuple(_SYMBOLS)
_TITLES = {"frobenius": r"$\|w_G\|_F$", "spectral": r"$\|w_G\|_2$", "two_to_one": r"$\|w_G\|_{2\to1}$"}
_SCALINGS: tuple[Scaling, Scaling] = ("groups", "layers")
_FEASIBLE = 2e-5  # relative; what Geoopt's check_point_on_manifold allows


# -- the record --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TauStatistics:
    """The divisors ``τ`` of a layer's step sizes in the optimiser's latest step.

    Attributes:
        share_above_one: Share of the groups with ``τ > 1``, whose step the theorem shortened.
        median: Median over the groups.
        maximum: Largest of the groups.
    """

    share_above_one: float
    median: float
    maximum: float


@dataclass(frozen=True, eq=False)
class LayerReport:
    """What one weight obeys.

    Attributes:
        names: Its names in the model; more than one if the weight is tied.
        module: Type of the layer that uses it.
        shape: Its shape.
        kind: ``"plain"``, on a ``"product"`` of groups, on a single ``"manifold"``, ``"renormalised"``, or the
            ``"diagonal"`` matrix of a batch normalisation that could not be folded.
        manifolds: The groups' manifold kinds, in words; empty for plain weights.
        groups: Norms of every group, float64, shape ``(G,)``.
        layer: Norms of the matrix ``(D, C·kh·kw)`` of the whole weight, float64 scalars.
        operator_norm: Upper bound of the norm of the convolution as a linear operator at its input size (exact for
            circular padding); None if the sizes are not known, and for other layers.
        violation: Largest relative violation of a constraint; None without constraints.
        feasible: Whether the violation is no more than rounding explains; None without constraints.
        uses: Number of layers that use the weight.
        tau: Statistics of the step sizes; None without.
    """

    names: tuple[str, ...]
    module: str
    shape: tuple[int, ...]
    kind: Kind
    manifolds: str
    groups: MatrixNorms
    layer: MatrixNorms
    operator_norm: float | None = None
    violation: float | None = None
    feasible: bool | None = None
    uses: int = 1
    tau: TauStatistics | None = None

    @property
    def name(self) -> str:
        """The first of its names."""
        return self.names[0]

    @property
    def n_groups(self) -> int:
        """Number of groups."""
        return len(self.groups.frobenius)

    def worst(self, norm: str) -> float:
        """The largest norm of a group; ``norm`` is ``"frobenius"``, ``"spectral"`` or ``"two_to_one"``."""
        return float(getattr(self.groups, norm).max())

    def median(self, norm: str) -> float:
        """The median over the groups of a norm."""
        return float(getattr(self.groups, norm).quantile(0.5))

    def to_dict(self) -> dict[str, Any]:
        """Plain data; norms of groups as largest, median and smallest."""
        summary = {
            f"{norm}_{word}": value
            for norm in _NORMS
            for word, value in (
                ("worst", self.worst(norm)),
                ("median", self.median(norm)),
                ("smallest", float(getattr(self.groups, norm).min())),
                ("layer", float(getattr(self.layer, norm))),
            )
        }
        tau = self.tau
        return {
            "name": self.name,
            "also": list(self.names[1:]),
            "module": self.module,
            "shape": list(self.shape),
            "kind": self.kind,
            "manifolds": self.manifolds,
            "n_groups": self.n_groups,
            **summary,
            "operator_norm_bound": self.operator_norm,
            "violation": self.violation,
            "feasible": self.feasible,
            "uses": self.uses,
            "tau_share_above_one": None if tau is None else tau.share_above_one,
            "tau_median": None if tau is None else tau.median,
            "tau_maximum": None if tau is None else tau.maximum,
        }


@dataclass(frozen=True)
class Measure:
    """One generalisation measure of the model, all natural logarithms; see :mod:`fgo_geo.bounds`.

    Attributes:
        name: ``"neyshabur2015"``, ``"bartlett2017"`` or ``"neyshabur2018"``.
        scaling: ``"groups"`` multiplies over all groups (Table 1 of [Ozay2019]_), ``"layers"`` takes one group per
            layer: the classical form.
        value: The measure with margin 1.
        margin_value: The measure divided by the margin; None without a positive margin.
        factors: Every layer's factor of the product, in the order of :attr:`Report.chain`.
        scale: What does not depend on the weights.
    """

    name: str
    scaling: Scaling
    value: float
    margin_value: float | None
    factors: tuple[float, ...]
    scale: float


@dataclass(frozen=True, eq=False)
class Report:
    """The norms, feasibility and measures of a model. ``print(report)`` shows them as a table.

    Attributes:
        layers: All measured weights, in the order of the model.
        left_out: The parameters that are not measured, with the reason.
        measures: Three measures in two scalings; none without ``n_samples``.
        n_samples: Number N of training samples.
        margin: The quantile of the margins on the data; None without labelled data.
        batch_norms: What became of the batch normalisations; empty unless they were folded.
        unfolded: Number of batch normalisations that the measures leave out.
    """

    layers: tuple[LayerReport, ...]
    left_out: Mapping[str, str]
    measures: tuple[Measure, ...] = ()
    n_samples: int | None = None
    margin: float | None = None
    batch_norms: tuple[BatchNormRecord, ...] = ()
    unfolded: int = 0

    @property
    def chain(self) -> tuple[LayerReport, ...]:
        """The layers that the measures multiply: those of a tied weight as often as it is used."""
        return tuple(layer for layer in self.layers for _ in range(layer.uses))

    @property
    def feasible(self) -> bool:
        """Whether every constrained weight obeys its constraints; True if there is none."""
        return all(layer.feasible is not False for layer in self.layers)

    def layer(self, name: str) -> LayerReport:
        """The layer with a parameter of this name.

        Raises:
            KeyError: If there is none, with the reason if it was left out.
        """
        for layer in self.layers:
            if name in layer.names:
                return layer
        raise KeyError(f"{name!r} is not measured: it {self.left_out.get(name, 'is no parameter of the model')}")

    def measure(self, name: str, scaling: Scaling = "groups") -> Measure:
        """The measure of a name and scaling.

        Raises:
            KeyError: If there is none.
        """
        for measure in self.measures:
            if (measure.name, measure.scaling) == (name, scaling):
                return measure
        known = ", ".join(dict.fromkeys(m.name for m in self.measures)) or "none: pass n_samples"
        raise KeyError(f"there is no measure {name!r} scaled by {scaling!r}; the names are {known}")

    # -- export ------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Plain data: numbers, strings, lists and dictionaries."""
        return {
            "n_samples": self.n_samples,
            "margin": self.margin,
            "feasible": self.feasible,
            "layers": [layer.to_dict() for layer in self.layers],
            "measures": [{**vars(m), "factors": list(m.factors)} for m in self.measures],
            "left_out": dict(self.left_out),
            "batch_norms": [
                {"name": r.name, "layer": r.layer, "side": r.side, "reason": r.reason, "norm": r.norm}
                for r in self.batch_norms
            ],
            "unfolded": self.unfolded,
        }

    def to_json(self, indent: int | None = 2) -> str:
        """The same as JSON; the logarithm of zero, which JSON does not have, is the string ``"-inf"``."""
        return json.dumps(_json_numbers(self.to_dict()), indent=indent, allow_nan=False)

    def to_dataframe(self) -> pandas.DataFrame:
        """The layers as a table, one row each, indexed by name.

        Raises:
            ImportError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise ImportError("Report.to_dataframe needs pandas, which is missing: pip install pandas") from error
        return pandas.DataFrame([layer.to_dict() for layer in self.layers]).set_index("name")

    # -- printing ----------------------------------------------------------------------------------------------

    def __str__(self) -> str:
        """Tables of the layers and of the measures, and what is left out."""
        parts = [_render(self._layer_table())]
        if self.measures:
            parts.append(_render(self._measure_table()))
        reasons: dict[str, list[str]] = {}
        for name, reason in self.left_out.items():
            reasons.setdefault(reason, []).append(name)
        if reasons:
            lines = [
                textwrap.fill(f"{few(names)}: {reason}", 160, initial_indent="  ", subsequent_indent="    ")
                for reason, names in reasons.items()
            ]
            parts.append("\n".join(["Not measured:", *lines]))
        return "\n\n".join([*parts, self._summary()])

    def _layer_table(self) -> Table:
        show_operator = any(layer.operator_norm is not None for layer in self.layers)
        show_tau = any(layer.tau is not None for layer in self.layers)
        headers = ["layer", "shape", "on", "groups", *(f"{s} worst / median" for s in _SYMBOLS.values()), "‖W‖2"]
        headers += ["conv norm <="] * show_operator + ["off by", "feasible"] + ["τ > 1"] * show_tau
        table = Table(*headers, box=box.SIMPLE)
        for column in table.columns[3:]:
            column.justify = "right"
        for layer in self.layers:
            cells = [
                layer.name if len(layer.names) == 1 else f"{layer.name} (also {', '.join(layer.names[1:])})",
                "x".join(map(str, layer.shape)),
                layer.manifolds or layer.kind,
                str(layer.n_groups),
                *(_worst_median(layer, norm) for norm in _NORMS),
                _number(float(layer.layer.spectral)),
            ]
            cells += [_number(layer.operator_norm)] * show_operator
            cells += ["" if layer.violation is None else f"{layer.violation:.1e}", _yes_no(layer.feasible)]
            cells += ["" if layer.tau is None else f"{layer.tau.share_above_one:.0%}"] * show_tau
            table.add_row(*cells)
        return table

    def _measure_table(self) -> Table:
        columns = ["all groups", "one group per layer"]
        if self.margin is not None and self.margin > 0:
            columns += [f"{column}, margin {self.margin:.3g}" for column in columns]
        table = Table(f"log measure, N = {self.n_samples:,}", *columns, box=box.SIMPLE)
        for column in table.columns[1:]:
            column.justify = "right"
        for name in dict.fromkeys(m.name for m in self.measures):
            pair = [self.measure(name, scaling) for scaling in _SCALINGS]
            values = [m.value for m in pair] + [m.margin_value for m in pair if m.margin_value is not None]
            table.add_row(name, *(f"{value:.2f}" for value in values))
        return table

    def _summary(self) -> str:
        constrained = [layer for layer in self.layers if layer.feasible is not None]
        n_groups = sum(layer.n_groups for layer in self.layers)
        lines = [f"{len(constrained)} of {len(self.layers)} layers under constraints; {n_groups:,} groups."]
        off = [layer for layer in constrained if not layer.feasible]
        if off:
            worst = max(off, key=lambda layer: cast(float, layer.violation))
            lines.append(f"NOT FEASIBLE: {len(off)} of them, the worst is {worst.name}, off by {worst.violation:.2g}.")
        elif constrained:
            worst_violation = max(cast(float, layer.violation) for layer in constrained)
            lines.append(f"All of them are feasible, off by {worst_violation:.1e} at most (relative).")
        if self.unfolded:
            remedy = "they are no fixed maps, or not used" if self.batch_norms else "fold=True takes them in"
            lines.append(f"{self.unfolded} batch normalisations are in no norm and no measure: {remedy}.")
        if self.measures and self.margin is not None and self.margin <= 0:
            lines.append(f"The margin is {self.margin:.3g}: there is no measure that is normalised by it.")
        return "\n".join(lines)

    def compare(self, other: Report, labels: tuple[str, str] = ("before", "after")) -> str:
        """This report and another side by side: worst norms of the layers, and the measures.

        Args:
            other: The report of the same architecture after training, constraining or renormalising it.
            labels: What to call the two.

        Returns:
            Two tables as text; a layer that only one of them has leaves the other's cells empty.
        """
        sides = ({layer.name: layer for layer in self.layers}, {layer.name: layer for layer in other.layers})
        table = Table("layer", box=box.SIMPLE)
        for header in ("groups", *(f"worst {symbol}" for symbol in _SYMBOLS.values()), "off by"):
            for label in labels:
                table.add_column(f"{header}\n{label}", justify="right")
        for name in dict.fromkeys([*sides[0], *sides[1]]):
            pair = [side.get(name) for side in sides]
            cells = ["" if layer is None else str(layer.n_groups) for layer in pair]
            cells += ["" if layer is None else _number(layer.worst(norm)) for norm in _NORMS for layer in pair]
            cells += ["" if layer is None or layer.violation is None else f"{layer.violation:.1e}" for layer in pair]
            table.add_row(name, *cells)
        if not (self.measures and other.measures):
            return _render(table)
        sums = Table("log measure", "scaling", *labels, box=box.SIMPLE)
        for mine in self.measures:
            theirs = other.measure(mine.name, mine.scaling)
            sums.add_row(mine.name, mine.scaling, f"{mine.value:.2f}", f"{theirs.value:.2f}")
        return f"{_render(table)}\n\n{_render(sums)}"

    # -- plotting ----------------------------------------------------------------------------------------------

    def plot(self, title: str | None = None) -> Figure:
        """Draw the norms of every layer's groups, and, with measures, every layer's factor of them.

        A line is the range over a layer's groups, its thick part holds the middle half, the dot is the median.

        Args:
            title: Title of the figure.

        Returns:
            A new figure.

        Raises:
            ImportError: matplotlib is not installed.
        """
        try:
            from matplotlib import pyplot, ticker
        except ImportError as error:
            raise ImportError("Report.plot draws with matplotlib, which is missing: pip install matplotlib") from error
        shown = [*_NORMS, *(["factors"] if self.measures else [])]
        heights = [0.17 * len(self.layers) + 1.2, *([2.0] if self.measures else [])]
        figure: Any = pyplot.figure(figsize=(3.0 * len(shown) + 1.5, sum(heights)), layout="constrained")
        grid = figure.add_gridspec(len(heights), len(shown), height_ratios=heights)
        first: Any = None
        for column, what in enumerate(shown):
            ax = figure.add_subplot(grid[0, column], sharey=first)
            first = first or ax
            draw = self._draw_factors if what == "factors" else self._draw_norm
            draw(ax, what)
            ax.tick_params(labelleft=column == 0, axis="y", length=0)
            ax.grid(alpha=0.3)
            ax.set_axisbelow(True)
            if ax.get_xscale() == "log":
                ax.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 3), numticks=8))
                ax.xaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
                ax.xaxis.set_minor_locator(ticker.NullLocator())
        names = [layer.name.removesuffix(".weight") for layer in self.layers]
        first.set_yticks(range(len(names)), names, fontsize=7)
        first.set_ylim(len(names) - 0.4, -0.6)
        if self.measures:
            self._draw_measures(figure.add_subplot(grid[1, :]))
        figure.legend(*first.get_legend_handles_labels(), loc="outside upper left", ncols=5, fontsize=8, frameon=False)
        figure.suptitle(title)
        return figure

    def _draw_norm(self, ax: Any, norm: str) -> None:
        """The distribution over every layer's groups of a norm."""
        levels = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0], dtype=torch.float64)
        quantiles = torch.stack([getattr(layer.groups, norm).quantile(levels) for layer in self.layers]).numpy()
        low, lower, middle, upper, high = quantiles.T
        for kind, colour in _COLOURS.items():
            rows = np.array([row for row, layer in enumerate(self.layers) if layer.kind == kind], int)
            if len(rows):
                ax.hlines(rows, low[rows], high[rows], color=colour, lw=1)
                ax.hlines(rows, lower[rows], upper[rows], color=colour, lw=4, alpha=0.5)
                ax.plot(middle[rows], rows, "o", color=colour, ms=3.5, label=kind)
        if low.min() > 0 and high.max() > 5 * low.min():
            ax.set_xscale("log")
        ax.set_title(f"{_TITLES[norm]} of the groups", fontsize=9)

    def _draw_factors(self, ax: Any, _: str) -> None:
        """Every layer's factor of the products over all groups; tied weights once."""
        first_use = [self.chain.index(layer) for layer in self.layers]
        for offset, (name, norm) in enumerate((("neyshabur2015", "frobenius"), ("bartlett2017", "spectral"))):
            factors = np.array(self.measure(name).factors)[first_use]
            ax.barh(
                np.arange(len(factors)) + 0.4 * offset - 0.2, factors, 0.4, color=f"C{offset + 1}", label=_TITLES[norm]
            )
        ax.axvline(0, color="black", lw=0.8)
        ax.set_title("log of the product over the groups", fontsize=9)
        ax.legend(fontsize=8)

    def _draw_measures(self, ax: Any) -> None:
        """The logarithms of the measures."""
        names = list(dict.fromkeys(m.name for m in self.measures))
        for offset, scaling in enumerate(_SCALINGS):
            values = [self.measure(name, scaling).value for name in names]
            label = "all groups" if scaling == "groups" else "one group per layer"
            bars = ax.barh(np.arange(len(names)) + 0.4 * offset - 0.2, values, 0.36, label=label, color=f"C{offset}")
            ax.bar_label(bars, fmt="%.0f", fontsize=8, padding=3)
        ax.axvline(0, color="black", lw=0.8)
        ax.margins(x=0.12)
        ax.set_yticks(range(len(names)), names, fontsize=8)
        ax.invert_yaxis()
        ax.set_title(f"natural logarithm of the measures, N = {self.n_samples:,}", fontsize=9)
        ax.legend(fontsize=8, frameon=False)


_COLOURS: dict[Kind, str] = {
    "plain": "tab:gray",
    "product": "tab:blue",
    "manifold": "tab:green",
    "renormalised": "tab:orange",
    "diagonal": "tab:purple",
}


def _render(table: Table) -> str:
    console = Console(width=10_000, color_system=None, force_terminal=False)
    with console.capture() as capture:
        console.print(table)
    return "\n".join(line.rstrip() for line in capture.get().splitlines() if line.strip())


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _worst_median(layer: LayerReport, norm: str) -> str:
    worst = _number(layer.worst(norm))
    return worst if layer.n_groups == 1 else f"{worst} / {_number(layer.median(norm))}"


def _yes_no(answer: bool | None) -> str:
    return "" if answer is None else "yes" if answer else "NO"


def _json_numbers(value: Any) -> Any:
    """Plain data with non-finite numbers as strings."""
    if isinstance(value, dict):
        return {key: _json_numbers(item) for key, item in cast("dict[str, Any]", value).items()}
    if isinstance(value, list):
        return [_json_numbers(item) for item in cast("list[Any]", value)]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


# -- reading a model ---------------------------------------------------------------------------------------------


@torch.no_grad()
def report(
    model: nn.Module,
    data: Any = None,
    n_samples: int | None = None,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    fold: bool = False,
    operator_norms: bool = True,
    margin_quantile: float = 0.1,
    depth_factor: DepthFactor = "exponential",
) -> Report:
    r"""Measure a model: norms of all groups, feasibility, and the generalisation measures of Table 1.

    Works on plain, constrained and renormalised models alike. The model does not change; with data it is run in eval
    mode and then put back.

    Args:
        model: Any module.
        data: Tells the layers' input sizes, and the margin if there are labels: a batch of inputs, a pair (inputs,
            labels), an iterable of either, or the size of one input, e.g. ``(3, 224, 224)``. Without it there are no
            operator norms of convolutions and no margin.
        n_samples: Number N of training samples; without it there are no measures.
        optimizer: A :class:`~fgo_geo.RiemannianFGSGD`, for statistics of its latest step sizes.
        fold: Fold batch normalisations into their layers first, see :func:`~fgo_geo.folding.fold_batchnorm`; those
            that cannot be are layers of their own. Feasibility is that of the weights themselves.
        operator_norms: Bound the operator norms of convolutions, given data. Takes a minute or more for large
            networks on a processor; everything else takes seconds.
        margin_quantile: The share of samples that may have a smaller margin.
        depth_factor: As in :func:`~fgo_geo.bounds.neyshabur2015`.

    Returns:
        The report. The width of the measure by [Neyshabur2018]_ is the largest number of channels of a layer.

    Raises:
        TypeError: If the optimiser has no step sizes to report.
        ValueError: If a weight holds NaN or infinity (by name), nothing can be measured, or the data do not fit.

    Example:
        >>> layer = nn.Linear(2, 2, bias=False)
        >>> layer.weight.data = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
        >>> measured = report(layer, n_samples=100)
        >>> measured.layers[0].worst("frobenius"), measured.layers[0].worst("spectral")
        (5.0, 4.0)
        >>> round(math.exp(measured.measure("neyshabur2015").value), 6)  # 2 · 5 / √100
        1.0
    """
    scales = _step_scales(optimizer)
    found, left_out = _find_weights(model)
    records: tuple[BatchNormRecord, ...] = ()
    norms = {name: m for name, m in model.named_modules() if isinstance(m, BatchNorm)}
    if fold:
        folded, records = fold_batchnorm(model)
        found = [replace(w, value=cast(Tensor, _attribute(folded, w.names[0])).detach()) for w in found]
        left_out |= _fate_of_parameters(norms, records)
    sizes, margin = _observe(model, data, margin_quantile)
    layers = [_measure_weight(w, sizes if operator_norms else {}, scales) for w in found]
    layers += [
        _diagonal(record, norms[record.name]) for record in records if record.reason and record.scale is not None
    ]
    if not layers:
        raise ValueError(f"report: {type(model).__name__} has no weight to measure: {left_out or 'no parameters'}")
    position = {name: number for number, (name, _) in enumerate(model.named_modules())}
    layers.sort(key=lambda layer: position[layer.name if layer.kind == "diagonal" else layer.name.rpartition(".")[0]])
    unfolded = [r for r in records if r.reason and r.scale is None] if fold else norms
    result = Report(tuple(layers), left_out, (), n_samples, margin, records, len(unfolded))
    if n_samples is None:
        return result
    width = max(max(_channels(w.layout)) for w in found) if found else 1
    return replace(result, measures=_measures(result.chain, n_samples, margin, depth_factor, width))


def _step_scales(optimizer: torch.optim.Optimizer | None) -> Mapping[Tensor, Tensor]:
    if optimizer is None:
        return {}
    read: Callable[[], Mapping[Tensor, Tensor]] | None = getattr(optimizer, "step_scales", None)
    if read is None:
        raise TypeError(f"report: optimizer is {type(optimizer).__name__}, which has no step_scales(); expected FG-SGD")
    return read()


@dataclass(frozen=True, eq=False)
class _Weight:
    """A weight as it is found: what :class:`LayerReport` says of it, its values and its groups."""

    names: tuple[str, ...]
    owners: tuple[nn.Module, ...]
    param: Tensor
    value: Tensor
    layout: WeightLayout
    kind: Kind = "plain"
    manifolds: str = ""
    partition: Partition | None = None
    violation: float | None = None


def _find_weights(model: nn.Module) -> tuple[list[_Weight], dict[str, str]]:
    """The weights that can be measured, and why the other parameters cannot."""
    weights: list[_Weight] = []
    left_out: dict[str, str] = {}
    for site in sites_of(model):
        weight = _renormalised(model, site) if _is_parametrised(site) else _declared(site)
        if isinstance(weight, str):
            left_out |= dict.fromkeys(site.names, weight)
        else:
            weights.append(weight)
    return weights, left_out


def _is_parametrised(site: Site) -> bool:
    return isinstance(site.owners[0], parametrize.ParametrizationList)


def _declared(site: Site) -> _Weight | str:
    """A parameter that is the weight itself: plain or on a manifold."""
    layouts = [layout_of(m, name.rpartition(".")[2]) for m, name in zip(site.owners, site.names, strict=True)]
    layout = next((found for found in layouts if isinstance(found, str)), layouts[0])
    if isinstance(layout, str):
        return layout
    if len(set(layouts)) > 1:
        return "is shared by layers that store it in different layouts"
    param = site.param
    value = _checked_value(param, site.names[0])
    if isinstance(value, str):
        return value
    weight = _Weight(site.names, site.owners, param, value, layout)
    manifold = cast(Any, param).manifold if isinstance(param, geoopt.ManifoldParameter) else None
    if manifold is None or isinstance(manifold, geoopt.Euclidean):
        return weight
    if isinstance(manifold, ProductOfGroups):
        groups = _kinds_in_words(manifold.partition, manifold.collections[0].strategy)
        weight = replace(weight, kind="product", manifolds=groups, partition=manifold.partition)
    else:
        weight = replace(weight, kind="manifold", manifolds=type(manifold).__name__)
    return replace(weight, violation=_violation(manifold, value))


def _renormalised(model: nn.Module, site: Site) -> _Weight | str:
    """A raw weight, and the weight that is computed from it."""
    path, _, rest = f".{site.names[0]}".rpartition(".parametrizations.")
    module, local = model.get_submodule(path[1:]), rest.partition(".")[0]
    steps = cast("nn.ModuleDict", module.parametrizations)[local].children()
    if not any(isinstance(step, Renormalization) for step in steps):
        return "is re-parametrised, but not renormalised: its layout is not known"
    renormalization = renormalization_of(module, local)
    name = f"{path[1:]}.{local}".lstrip(".")
    raw = _checked_value(site.param, name)
    if isinstance(raw, str):
        return raw
    value = cast(Tensor, getattr(module, local)).detach()
    require_finite(value, repr(name))
    cut = renormalization.partition
    words = f"renormalised, {_kinds_in_words(cut, renormalization.collections[0].strategy)}"
    bound = renormalization.guarantee().double()
    measured = dict(zip(("frobenius", "spectral", "2->1"), _norms_of_groups(cut, value), strict=True))
    excess = max(float((measured[norm].to(bound.device) / bound).max()) - 1 for norm in renormalization.norms)
    return _Weight((name,), (module,), site.param, value, cut.layout, "renormalised", words, cut, max(excess, 0.0))


def _checked_value(param: Tensor, name: str) -> Tensor | str:
    """The values of a parameter, or why there are none."""
    if param.is_meta:
        return "is on the meta device: it has no values"
    if not param.is_floating_point():
        return f"has type {param.dtype}, expected a real floating-point type"
    value = param.detach().as_subclass(Tensor)
    require_finite(value, repr(name))
    return value


def _violation(manifold: geoopt.Manifold, value: Tensor) -> float:
    """Largest relative distance from the constraint; of other packages' manifolds, from the nearest point."""
    if isinstance(manifold, EmbeddedManifold):
        return float(manifold.violation(value).max())
    return float((manifold.projx(value) - value).norm() / value.norm())


def _kinds_in_words(cut: Partition, strategy: str) -> str:
    counts: Counter[str] = Counter()
    for kind, groups in zip(cut.kinds, cut.groups, strict=True):
        counts[kind] += len(groups)
    return f"{strategy}: " + " + ".join(f"{count} {kind}" for kind, count in counts.items())


# -- measuring ---------------------------------------------------------------------------------------------------


def _norms_of_groups(cut: Partition, weight: Tensor) -> MatrixNorms:
    """Norms of all groups in float64, in the order of the collections; one call per part of the partition."""
    per_part: list[MatrixNorms] = []
    for segments, components in zip(cut.segments, cut.split(weight.double()), strict=True):
        if segments.count == segments.total:
            per_part.append(matrix_norms(components))
        else:
            labels = segments.spread(torch.arange(segments.count, device=components.device))
            per_part.append(group_norms(components, labels, segments.count))
    order = torch.from_numpy(np.concatenate(cut.groups)).to(weight.device)
    fields = (torch.cat(field) for field in zip(*per_part, strict=True))
    return MatrixNorms(*(torch.empty_like(field).index_copy(0, order, field) for field in fields))


def _on_cpu(norms: MatrixNorms) -> MatrixNorms:
    return MatrixNorms(*(norm.cpu() for norm in norms))


def _measure_weight(
    weight: _Weight, sizes: Mapping[nn.Module, set[tuple[int, ...]]], scales: Mapping[Tensor, Tensor]
) -> LayerReport:
    value = weight.value
    layer = matrix_norms(weight.layout.channels(value.double()).flatten(1))
    one_group = MatrixNorms(*(norm[None] for norm in layer))
    groups = one_group if weight.partition is None else _norms_of_groups(weight.partition, value)
    operators = [_operator_norm(m, value, size) for m in dict.fromkeys(weight.owners) for size in sizes.get(m, ())]
    known = [norm for norm in operators if norm is not None]
    tolerance = max(_FEASIBLE, 2 * torch.finfo(value.dtype).eps)
    return LayerReport(
        names=weight.names,
        module=type(weight.owners[0]).__name__.removeprefix("Parametrized"),
        shape=tuple(value.shape),
        kind=weight.kind,
        manifolds=weight.manifolds,
        groups=_on_cpu(groups),
        layer=_on_cpu(layer),
        operator_norm=max(known) if known and len(known) == len(operators) else None,
        violation=weight.violation,
        feasible=None if weight.violation is None else weight.violation <= tolerance,
        uses=len(set(weight.owners)),
        tau=_tau(scales.get(weight.param)),
    )


def _tau(scales: Tensor | None) -> TauStatistics | None:
    if scales is None:
        return None
    tau = scales.double().flatten()
    return TauStatistics(float((tau > 1).double().mean()), float(tau.quantile(0.5)), float(tau.max()))


def _diagonal(record: BatchNormRecord, norm: nn.Module) -> LayerReport:
    """A batch normalisation as the matrix ``diag(s)``, whose rows have the norms ``|s|``."""
    size = cast(Tensor, record.scale).abs().cpu()
    norms = MatrixNorms(size.norm(), size.max(), size.sum())
    groups = MatrixNorms(*(n[None] for n in norms))
    return LayerReport((record.name,), type(norm).__name__, (len(size),), "diagonal", "", groups, norms)


def _operator_norm(module: nn.Module, weight: Tensor, size: tuple[int, ...]) -> float | None:
    """Bound of the norm of a convolution as an operator; None where none is known."""
    conv = cast(nn.Conv2d, module)
    geometry: Any = {"stride": conv.stride, "dilation": conv.dilation, "groups": conv.groups}
    if conv.padding_mode == "zeros":
        return float(conv_operator_norm_bound(weight, size, padding=conv.padding, **geometry))
    whole = all(n % s == 0 for n, s in zip(size, conv.stride, strict=True))
    padding = conv.padding if isinstance(conv.padding, tuple) else (0,) * len(size)
    reach = zip(conv.kernel_size, conv.dilation, padding, strict=True)
    same = conv.padding == "same" or all(2 * p == d * (k - 1) for k, d, p in reach)
    if conv.padding_mode == "circular" and whole and same:
        return float(conv_operator_norm_circular(weight, size, **geometry))
    return None


def _channels(layout: WeightLayout) -> tuple[int, int]:
    return layout.out_channels, layout.in_channels * layout.conv_groups


def _measures(
    chain: Sequence[LayerReport], n_samples: int, margin: float | None, depth_factor: DepthFactor, width: int
) -> tuple[Measure, ...]:
    """The three measures, over all groups and with one group per layer."""
    measures: list[Measure] = []
    for scaling in _SCALINGS:
        norms = [layer.groups if scaling == "groups" else layer.layer for layer in chain]

        def terms(gamma: float, norms: list[MatrixNorms] = norms) -> dict[str, BoundTerms]:
            return {
                "neyshabur2015": neyshabur2015_terms(norms, n_samples, margin=gamma, depth_factor=depth_factor),
                "bartlett2017": bartlett2017_terms(norms, n_samples, margin=gamma),
                "neyshabur2018": neyshabur2018_terms(norms, n_samples, margin=gamma, width=width),
            }

        with_margin = terms(margin) if margin is not None and margin > 0 else {}
        for name, found in terms(1.0).items():
            normalised = float(with_margin[name].value) if name in with_margin else None
            factors = tuple(found.factors.tolist())
            measures.append(Measure(name, scaling, float(found.value), normalised, factors, float(found.scale)))
    return tuple(measures)


# -- data --------------------------------------------------------------------------------------------------------


def _observe(
    model: nn.Module, data: Any, quantile: float
) -> tuple[dict[nn.Module, set[tuple[int, ...]]], float | None]:
    """Sizes that convolutions are applied to (of transposed ones, their outputs), and the quantile of the margins."""
    sizes: dict[nn.Module, set[tuple[int, ...]]] = {}
    if data is None:
        return sizes, None

    def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen = output if cast(nn.Conv2d, module).transposed else inputs[0]
        sizes.setdefault(module, set()).add(tuple(seen.shape[-len(cast(nn.Conv2d, module).kernel_size) :]))

    convolutions = [m for m in model.modules() if isinstance(m, CONVOLUTIONS)]
    handles = [m.register_forward_hook(note) for m in convolutions]
    logits: list[Tensor] = []
    targets: list[Tensor] = []
    try:
        with _eval_mode(model):
            for inputs, labels in _batches(model, data):
                output = model(inputs)
                if labels is None:
                    break
                logits.append(_require_tensor(output).cpu())
                targets.append(labels.cpu())
    finally:
        for handle in handles:
            handle.remove()
    return sizes, margin_quantile_of(torch.cat(logits), torch.cat(targets), quantile) if targets else None


def _batches(model: nn.Module, data: Any) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Inputs on the model's device, and labels where there are some."""
    like = next(p for p in model.parameters() if p.is_floating_point())
    if isinstance(data, Sequence) and all(isinstance(n, int) for n in cast("Sequence[Any]", data)):
        data = torch.zeros(1, *cast("Sequence[int]", data), dtype=like.dtype)
    single = isinstance(data, Tensor) or _is_pair(data)
    if not single and not isinstance(data, Iterable):
        raise ValueError(
            f"report: data is {type(data).__name__}; expected a batch, (inputs, labels), a loader or a size"
        )
    for batch in [data] if single else cast("Iterable[Any]", data):
        inputs, labels = batch if _is_pair(batch) else (batch, None)
        yield _require_tensor(inputs).to(like.device), labels


def _is_pair(batch: Any) -> bool:
    return isinstance(batch, (tuple, list)) and len(cast("Sequence[Any]", batch)) == 2 and isinstance(batch[0], Tensor)


def _require_tensor(value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise ValueError(
            f"report: the model's inputs and, given labels, its outputs must be tensors, got {type(value).__name__}; "
            "leave data out, or wrap the model"
        )
    return value


@contextmanager
def _eval_mode(model: nn.Module) -> Generator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


# -- batch normalisation -----------------------------------------------------------------------------------------


def _attribute(model: nn.Module, name: str) -> Any:
    path, _, local = name.rpartition(".")
    return getattr(model.get_submodule(path), local)


def _fate_of_parameters(norms: Mapping[str, nn.Module], records: Sequence[BatchNormRecord]) -> dict[str, str]:
    """What to say of the parameters of batch normalisations that were folded or kept."""
    fates: dict[str, str] = {}
    for record in records:
        fate = "is folded into a layer next to it"
        if record.reason:
            fate = record.reason if record.scale is None else "is a layer of its own, listed as a diagonal matrix"
        fates |= {f"{record.name}.{local}": fate for local, _ in norms[record.name].named_parameters()}
    return fates
