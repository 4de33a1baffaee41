r"""The radius of a component's manifold.

The re-scaling parameter of a component is ``R = γ / λ`` ("Mathematics", section 5; [Ozay2019]_). This module holds
the geometric factor ``γ``, a constant known from shapes:

* :func:`kaiming_radius` keeps the signal: a uniformly random point has entry variance ``2 / fan_in``;
* :func:`bounding_radius` bounds the norms of the whole group by ``β``, :func:`layer_bounding_radius` those of the whole
  weight.

Both take the norms of a component at radius one from :func:`~fgo_geo.weights.norms.manifold_norm_bounds`.

:func:`group_radii` evaluates a rule for every group of a partition. The statistical factor ``λ`` is measured while
training, see :mod:`fgo_geo.models.feature_stats`.
"""

from __future__ import annotations

import math
import numbers
import reprlib
from collections.abc import Iterable, Sequence
from typing import Literal, cast, get_args

import numpy as np
import torch
from torch import Tensor

from fgo_geo.weights import kinds
from fgo_geo.weights.components import KernelPartition, Partition
from fgo_geo.weights.norms import NORMS, Norm, manifold_norm_bounds, norm_names
from fgo_geo.weights.words import did_you_mean, small

__all__ = [
    "BoundOf",
    "RadiusRule",
    "bound_in_words",
    "bounding_radius",
    "check_bound",
    "check_bound_of",
    "check_rule",
    "group_radii",
    "kaiming_radius",
    "layer_bounding_radius",
]

BoundOf = Literal["group", "layer"]

RadiusRule = Literal["kaiming", "unit", "bound"] | float


def kaiming_radius(kind: str, rows: int, columns: int, fan_in: int) -> float:
    """The radius at which a uniformly random component has entry variance ``2 / fan_in`` ([He2015]_).

    A component ``A x B`` of norm ``r F`` (``F`` the norm at radius one) has entry variance ``r² F² / (A B)``, hence
    ``r = sqrt(2 A B / (fan_in F²))``: ``sqrt(2 / C)`` for sphere kernels, ``sqrt(2 / (C B))`` for oblique and Stiefel
    kernels over ``C`` input channels.

    Args:
        kind: Manifold kind.
        rows: ``A``.
        columns: ``B``.
        fan_in: Number of inputs that one output value sums over.

    Returns:
        The radius.

    Raises:
        ValueError: If components of this kind have no norm that their radius bounds.

    Example:
        >>> kaiming_radius("sphere", 3, 3, fan_in=8 * 9)
        0.5
    """
    record = kinds.find(kind)
    if record is not None and record.norms is None and record.has_radius:
        norm = record.typical_norm(rows, columns)
    else:
        norm = float(manifold_norm_bounds(kind, rows, columns).frobenius)
    return math.sqrt(2 * rows * columns / fan_in) / norm


def bounding_radius(
    kind: str, rows: int, columns: int, count: int, bound: float, norms: Sequence[Norm] = NORMS
) -> float:
    """The largest radius at which the chosen norms of a group are at most ``bound``, for all points of its components.

    If a norm is at most ``b`` on the manifold of radius one, then that of ``n`` components of radius ``γ`` side by side
    is at most ``γ b √n``, for each of the three norms; so ``γ = β / (√n max b)``. With all three norms the largest is
    the 2→1 norm, ``b = √A F`` for components of Frobenius norm ``F``: ``γ = β / sqrt(A Σ F²)``.

    Args:
        kind: ``"sphere"``, ``"oblique"``, ``"stiefel"``, ``"spectral_ball"``, or another kind with norms.
        rows: Rows ``A`` of a component.
        columns: Columns ``B`` of a component.
        count: Number ``n`` of components of the group.
        bound: The bound ``β > 0``.
        norms: The norms to bound.

    Returns:
        The radius ``γ``.

    Raises:
        ValueError: If components of this kind have no norm that their radius bounds.

    Example:
        All three norms of four 3 x 3 kernels, and the spectral norm alone.

        >>> round(1 / bounding_radius("stiefel", 3, 3, count=4, bound=1.0), 6)
        6.0
        >>> bounding_radius("stiefel", 3, 3, count=4, bound=1.0, norms=["spectral"])
        0.5
    """
    of_component = manifold_norm_bounds(kind, rows, columns)
    return bound / (math.sqrt(count) * max(float(getattr(of_component, norm)) for norm in norm_names(norms)))


def layer_bounding_radius(cut: Partition, bound: float, norms: Sequence[Norm] = NORMS) -> float:
    """The radius of all components at which the wanted norms of the weight ``(D, C K)`` are at most ``bound``.

    The weight has the Frobenius norm ``γ sqrt(Σ F²)``, summed over the components of all groups. Its spectral norm is
    at most that, and by Cauchy and Schwarz its 2→1 norm is at most ``√D`` times that, over its ``D`` rows. Hence
    ``γ = β / sqrt(D Σ F²)`` for all three norms. Blocks are parts of the matrix, so their spectral norms bound its own.

    Args:
        cut: The partition of the weight.
        bound: The bound ``β > 0``.
        norms: The norms to bound.

    Returns:
        The radius ``γ``.

    Raises:
        ValueError: If some components have no norm that their radius bounds.

    Example:
        >>> from fgo_geo.weights.components import partition
        >>> from fgo_geo.weights.grouping import collection
        >>> from fgo_geo.weights.layout import WeightLayout
        >>> cut = partition([collection(4, 9, "pi", ("sphere", "stiefel"))], WeightLayout((4, 9, 3, 3)))
        >>> round(1 / layer_bounding_radius(cut, 1.0) ** 2)  # 4 rows; 18 kernels of norm 1, 18 of norm √3
        288
    """
    frobenius = spectral = 0.0
    for kind, count, (rows, columns) in zip(cut.kinds, cut.counts, cut.sizes, strict=True):
        of_component = manifold_norm_bounds(kind, rows, columns)
        frobenius += count * float(of_component.frobenius) ** 2
        spectral += count * float(of_component.spectral) ** 2
    if isinstance(cut, KernelPartition):  # a kernel is a piece of one row
        spectral = frobenius
    squares = {"frobenius": frobenius, "spectral": spectral, "two_to_one": cut.layout.out_channels * frobenius}
    return bound / math.sqrt(max(squares[norm] for norm in norm_names(norms)))


def check_bound_of(bound_of: object) -> BoundOf:
    """The argument ``bound_of`` in small letters; ValueError if it is unknown."""
    if small(bound_of) not in get_args(BoundOf):
        raise ValueError(
            f"bound_of must be one of {get_args(BoundOf)}, got {bound_of!r}: the norms of every group, or of the weight"
        )
    return cast(BoundOf, small(bound_of))


def bound_in_words(bound_of: BoundOf, bound: float, kinds_used: Iterable[str]) -> str:
    """What a bound bounds, for a weight with groups of these kinds; empty if they are all unconstrained.

    Example:
        >>> bound_in_words("group", 0.5, ["sphere"]), bound_in_words("group", 0.5, ["sphere", "euclidean"])
        ('norms of each group <= 0.5', 'norms of each sphere group <= 0.5')
        >>> bound_in_words("group", 1.0, ["ball", "sphere", "euclidean", "oblique"])
        'norms of each ball, sphere or oblique group <= 1'
    """
    known = list(dict.fromkeys(kinds_used))
    bounded = [name for name in known if not kinds.kind(name).is_free]
    names = ", ".join(bounded[:-1]) + " or " * (len(bounded) > 1) + "".join(bounded[-1:])
    groups = "group" if bounded == known else f"{names} group"
    whose = f"each {groups}" if bound_of == "group" else "the layer"
    return f"norms of {whose} <= {bound:g}" if bounded else ""


def check_bound(bound: float) -> None:
    """Raise ValueError if a bound is not a positive number."""
    if _positive(bound) is None:
        raise ValueError(f"bound must be a positive finite float, got {reprlib.repr(bound)}")


def _positive(number: object) -> float | None:
    """A positive number as a float; None for booleans, numbers that no finite float holds, and anything else."""
    try:
        value = float(number) if isinstance(number, numbers.Real) and not isinstance(number, bool) else 0.0
    except OverflowError:
        return None
    return value if 0 < value < math.inf else None


def check_rule(rule: object) -> RadiusRule:
    """A radius rule, checked.

    Args:
        rule: ``"kaiming"``, ``"unit"``, ``"bound"`` or a positive number.

    Returns:
        The rule.

    Raises:
        ValueError: If it is anything else.
    """
    number = _positive(rule)
    if number is not None:
        return number
    word = small(rule)
    if isinstance(word, str) and word in ("kaiming", "unit", "bound"):
        return word
    hint = did_you_mean(rule, ("kaiming", "unit", "bound"))
    raise ValueError(
        f'radius must be "kaiming", "unit", "bound" or a positive finite float, got {reprlib.repr(rule)}{hint}'
    )


def group_radii(
    cut: Partition,
    rule: RadiusRule,
    bound: float = 1.0,
    norms: Sequence[Norm] = NORMS,
    bound_of: BoundOf = "group",
) -> Tensor:
    """The radius of every group by a rule; one where there is no constraint.

    Args:
        cut: The partition of a weight.
        rule: ``"kaiming"``, ``"unit"`` (1), ``"bound"`` or a number.
        bound: The bound of the rule ``"bound"``.
        norms: The norms that the rule ``"bound"`` bounds.
        bound_of: Whose norms: those of every ``"group"``, or those of the ``"layer"``, which is the whole weight.

    Returns:
        One radius per group in double precision, shape ``(G,)``, in the order of the collection.

    Raises:
        ValueError: If the rule is unknown, the bound is not positive, or the rule needs the radius of a kind without
            one.

    Example:
        >>> from fgo_geo.weights.components import WeightLayout, partition
        >>> from fgo_geo.weights.grouping import collection
        >>> pi = collection(4, 1, "pi", ("sphere", "euclidean"))
        >>> group_radii(partition([pi], WeightLayout((4, 1, 3, 3))), "bound")
        tensor([0.4082, 1.0000], dtype=torch.float64)
    """
    rule = check_rule(rule)
    check_bound(bound)
    bound_of = check_bound_of(bound_of)
    if rule == "bound" and bound_of == "layer":
        rule = layer_bounding_radius(cut, bound, norms)
    radii = np.ones(sum(len(g) for g in cut.groups))
    for kind, groups, counts, (rows, columns) in zip(cut.kinds, cut.groups, cut.group_sizes, cut.sizes, strict=True):
        if rule == "unit" or kinds.kind(kind).is_free:
            continue
        if not kinds.kind(kind).has_radius:
            _require_no_radius(kind, rule)
            continue
        if rule == "kaiming":
            radii[groups] = kaiming_radius(kind, rows, columns, cut.layout.fan_in)
        elif rule == "bound":
            radii[groups] = bounding_radius(kind, rows, columns, 1, bound, norms) / np.sqrt(counts)
        else:
            radii[groups] = rule
    return torch.from_numpy(radii)


def _require_no_radius(kind: str, rule: RadiusRule) -> None:
    """Raise ValueError if a rule needs a radius."""
    if rule not in ("kaiming", "unit", 1.0):
        raise ValueError(
            f"manifolds of kind {kind!r} have no radius, so radius={rule!r} cannot be met; leave this radius out, or "
            "use a kind with a radius"
        )
