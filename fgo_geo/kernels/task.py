"""What a fused path works on: a weight, its gradient and momentum, and what its kernels are.

The kernels of a weight are described in the order in which it stores them, by one 32-bit *code* each: group number and
manifold kind. That replaces the sorting by kind that the batched torch code needs, so a fused path reads and writes the
weight where it is.
"""

from __future__ import annotations

import math
import weakref
from dataclasses import dataclass

import torch
from torch import Tensor

from fgo_geo.components import KernelPartition
from fgo_geo.manifolds import ComponentManifold, ProductOfGroups

__all__ = ["KINDS", "KernelTable", "StepOptions", "Task", "table_of", "task_of"]

KINDS = ("euclidean", "sphere", "oblique", "stiefel")
"""Manifold kinds by their numbers in a code."""


@dataclass(frozen=True)
class StepOptions:
    """Options of a parameter group, as numbers.

    Attributes:
        lr: Learning rate; a tensor where reading it would wait for the device.
        momentum: Momentum factor.
        dampening: Dampening of the momentum.
        nesterov: Nesterov momentum.
        weight_decay: Weight decay of Euclidean components.
        maximize: Ascend instead of descend.
        radius_invariant: Measure on the manifolds of radius one.
    """

    lr: float | Tensor
    momentum: float
    dampening: float
    nesterov: bool
    weight_decay: float
    maximize: bool
    radius_invariant: bool


@dataclass(frozen=True)
class KernelTable:
    """What the kernels of a weight are.

    Attributes:
        codes: ``4 * group + kind`` of every kernel, shape of the weight's first two dimensions, int32.
        row_groups: Group of every row's kernels of a kind, shape ``(rows, 4)``, -1 where the kind does not occur; None
            if row and kind do not determine the group.
        radius: Radius of every kind; one for kinds that do not occur.
        radii: Radius of every kernel in float64 where it differs within a kind, else None.
        curvature: Bound on the sectional curvature of every group, float64; zero on Euclidean ones.
        constrained: Which groups have a constraint.
        size: ``(A, B)`` of a component.
        wide: Whether a component is the transpose of its kernel.
    """

    codes: Tensor
    row_groups: Tensor | None
    radius: tuple[float, float, float, float]
    radii: Tensor | None
    curvature: Tensor
    constrained: Tensor
    size: tuple[int, int]
    wide: bool

    @property
    def groups(self) -> int:
        """Number of groups."""
        return len(self.curvature)


_tables: weakref.WeakKeyDictionary[ProductOfGroups, dict[torch.device, tuple[object, KernelTable]]]
_tables = weakref.WeakKeyDictionary()


def table_of(manifold: ProductOfGroups, device: torch.device) -> KernelTable:
    """The table of a product of groups of kernels, kept until its radii change.

    Args:
        manifold: A product whose partition is a :class:`~fgo_geo.components.KernelPartition`.
        device: Where the table is needed.

    Returns:
        The table.
    """
    of_device = _tables.setdefault(manifold, {})
    kept = of_device.get(device)
    if kept is None or kept[0] is not manifold.manifolds:  # every change of the radii makes new ones
        kept = of_device[device] = (manifold.manifolds, _build(manifold, device))
    return kept[1]


def _build(manifold: ProductOfGroups, device: torch.device) -> KernelTable:
    cut = manifold.partition
    a, b = cut.sizes[0]
    curvature = torch.zeros(manifold.n_groups, dtype=torch.float64)
    constrained = torch.zeros(manifold.n_groups, dtype=torch.bool)
    radius = [1.0] * len(KINDS)
    radii_of_kind: dict[int, set[float]] = {}
    codes: list[Tensor] = []
    radii: list[Tensor] = []
    for kind, groups, (part, segments) in zip(cut.kinds, cut.groups, manifold.parts, strict=True):
        number = KINDS.index(kind)
        codes.append(segments.spread(4 * torch.from_numpy(groups).int() + number))
        radii.append(torch.ones(segments.total, dtype=torch.float64))
        if isinstance(part, ComponentManifold):
            own = part.radius
            numbers = radii_of_kind.setdefault(number, set())  # a kind can occur twice
            numbers.add(math.nan if isinstance(own, Tensor) else own)
            radius[number] = own if not isinstance(own, Tensor) and numbers == {own} else math.nan
            radii[-1] = radii[-1] * (own.detach().double().cpu() if isinstance(own, Tensor) else own)
            curvature[groups] = segments.max(radii[-1] ** -2)
            constrained[groups] = True

    def in_memory_order(values: list[Tensor]) -> Tensor:
        weight = cut.merge([v[:, None, None].expand(-1, a, b) for v in values])
        return weight.flatten(2)[:, :, 0].contiguous().to(device)

    kernel = manifold.layout.kernel
    all_codes = in_memory_order(codes)
    wide = len(kernel) > 1 and math.prod(kernel[:-1]) < kernel[-1]
    return KernelTable(
        codes=all_codes,
        row_groups=_groups_of_rows(all_codes),
        radius=(radius[0], radius[1], radius[2], radius[3]),
        radii=in_memory_order(radii) if any(map(math.isnan, radius)) else None,
        curvature=curvature.to(device),
        constrained=constrained.to(device),
        size=(a, b),
        wide=wide,
    )


def _groups_of_rows(codes: Tensor) -> Tensor | None:
    """Group of every row and kind, if these two determine the group."""
    groups, kinds = codes // 4, codes % 4
    found = torch.full((len(codes), len(KINDS)), -1, dtype=torch.int32, device=codes.device)
    for kind in range(len(KINDS)):
        there = kinds == kind
        largest = torch.where(there, groups, -1).amax(1)
        if bool((there & (groups != largest[:, None])).any()):
            return None
        found[:, kind] = largest
    return found


@dataclass(frozen=True, eq=False)
class Task:
    """One parameter's share of a step.

    Attributes:
        weight: The parameter's values; written in place.
        grad: Its Euclidean gradient.
        buffer: Its momentum, written in place; None without momentum.
        first: Whether the buffer holds nothing yet.
        table: What the kernels are.
    """

    weight: Tensor
    grad: Tensor
    buffer: Tensor | None
    first: bool
    table: KernelTable


def task_of(param: Tensor, manifold: ProductOfGroups, buffer: Tensor | None) -> Task | None:
    """The task of a parameter, or None if its components are no kernels.

    Args:
        param: A parameter with a gradient.
        manifold: Its manifold.
        buffer: Its momentum, if there is any yet.

    Returns:
        A task.
    """
    if not isinstance(manifold.partition, KernelPartition):
        return None
    grad = torch.as_tensor(param.grad)
    return Task(param.detach(), grad.detach(), buffer, False, table_of(manifold, param.device))
