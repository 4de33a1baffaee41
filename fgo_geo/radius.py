r"""Which radius a component's manifold gets.

The re-scaling parameter of a component is ``R = γ / λ`` ("Mathematics", section 5; [Ozay2019]_). This module holds
the geometric factor ``γ``, a constant known from shapes:

* :func:`kaiming_radius` keeps the signal: a uniformly random point has entry variance ``2 / fan_in``;
* :func:`bounding_radius` bounds the norms of the whole group by ``β``.

:func:`group_radii` evaluates a rule for every group of a partition. The statistical factor ``λ`` is measured while
training, see :mod:`fgo_geo.feature_stats`.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fgo_geo.components import Partition

__all__ = [
    "RadiusRule",
    "bounding_radius",
    "check_bound",
    "check_rule",
    "group_radii",
    "kaiming_radius",
    "unit_frobenius_norm",
]

RadiusRule = Literal["kaiming", "unit", "bound"] | float


def unit_frobenius_norm(kind: str, columns: int) -> float:
    """Frobenius norm of a component at radius one: 1 for the sphere, ``√B`` for oblique and Stiefel.

    Example:
        >>> unit_frobenius_norm("stiefel", 4)
        2.0
    """
    return 1.0 if kind == "sphere" else math.sqrt(columns)


def kaiming_radius(kind: str, rows: int, columns: int, fan_in: int) -> float:
    """The radius at which a uniformly random component has entry variance ``2 / fan_in``.

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

    Example:
        >>> kaiming_radius("sphere", 3, 3, fan_in=8 * 9)
        0.5
    """
    return math.sqrt(2 * rows * columns / fan_in) / unit_frobenius_norm(kind, columns)


def bounding_radius(kind: str, rows: int, columns: int, count: int, bound: float, two_to_one: bool = True) -> float:
    """The radius at which all norms of a group of ``count`` components are at most ``bound``.

    The group's matrix, the components side by side, has Frobenius norm ``r F √n`` (``F`` the norm of a component at
    radius one). That bounds the spectral norm, and ``√A`` times it the 2->1 norm. So ``r = β / (F √(A n))``, and
    ``r = β / (F √n)`` for Frobenius and spectral norm only.

    Args:
        kind: Manifold kind.
        rows: ``A``.
        columns: ``B``.
        count: Number of components ``n`` of the group.
        bound: The bound ``β > 0``.
        two_to_one: Whether the 2->1 norm is bounded too.

    Returns:
        The radius.

    Example:
        Tight for one square Stiefel component: its rows have norm ``r`` too.

        >>> round(bounding_radius("stiefel", 2, 2, count=1, bound=1.0), 6)
        0.5
    """
    factor = rows if two_to_one else 1
    return bound / (math.sqrt(factor * count) * unit_frobenius_norm(kind, columns))


def check_bound(bound: float) -> None:
    """Raise ValueError if a bound is not a positive number."""
    if not (isinstance(bound, (int, float)) and 0 < bound < math.inf):
        raise ValueError(f"bound must be a positive number, got {bound!r}")


def check_rule(rule: object) -> RadiusRule:
    """A radius rule, checked.

    Args:
        rule: ``"kaiming"``, ``"unit"``, ``"bound"`` or a positive number.

    Returns:
        The rule.

    Raises:
        ValueError: If it is none of these.
    """
    if isinstance(rule, (int, float)) and not isinstance(rule, bool) and rule > 0 and math.isfinite(rule):
        return float(rule)
    if isinstance(rule, str) and rule in ("kaiming", "unit", "bound"):
        return rule
    raise ValueError(f'radius must be "kaiming", "unit", "bound" or a positive number, got {rule!r}')


def group_radii(cut: Partition, rule: RadiusRule, bound: float = 1.0) -> Tensor:
    """The radius of every group by a rule; one where there is no constraint.

    Args:
        cut: The partition of a weight.
        rule: ``"kaiming"``, ``"unit"`` (1), ``"bound"`` or a number.
        bound: The bound of the rule ``"bound"``.

    Returns:
        One radius per group in double precision, shape ``(G,)``, in the order of the collection.

    Raises:
        ValueError: If the rule is unknown or the bound not positive.

    Example:
        >>> from fgo_geo.components import WeightLayout, partition
        >>> from fgo_geo.grouping import collection
        >>> pi = collection(4, 1, "pi", ("sphere", "euclidean"))
        >>> group_radii(partition([pi], WeightLayout((4, 1, 3, 3))), "bound")
        tensor([0.4082, 1.0000], dtype=torch.float64)
    """
    rule = check_rule(rule)
    check_bound(bound)
    radii = np.ones(sum(len(g) for g in cut.groups))
    for kind, groups, counts, (rows, columns) in zip(cut.kinds, cut.groups, cut.group_sizes, cut.sizes, strict=True):
        if kind == "euclidean" or rule == "unit":
            continue
        if rule == "kaiming":
            radii[groups] = kaiming_radius(kind, rows, columns, cut.layout.fan_in)
        elif rule == "bound":
            radii[groups] = bounding_radius(kind, rows, columns, 1, bound) / np.sqrt(counts)
        else:
            radii[groups] = rule
    return torch.from_numpy(radii)
