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

__all__ = [
    "KINDS",
    "KernelTable",
    "Place",
    "StepOptions",
    "Task",
    "gradient_of",
    "place_of",
    "problem_of",
    "table_of",
    "task_of",
]

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


# -- where the kernels lie -------------------------------------------------------------------------------------------


def problem_of(task: Task) -> str | None:
    """Why no fused path can take a parameter, whatever the device; None if one can."""
    weight = task.weight
    if weight.dtype not in (torch.float32, torch.float64):
        return f"fused steps take float32 and float64, got {weight.dtype}"
    if task.grad.dtype != weight.dtype or (task.buffer is not None and task.buffer.dtype != weight.dtype):
        return "weight, gradient and momentum have different types"
    if _component_strides(task) is None:
        return f"the strides {weight.stride()} of the weight are those of no memory format"
    return None


def gradient_of(task: Task) -> Tensor:
    """The gradient, stored as the weight is; a copy only if it is not."""
    return task.grad if task.grad.stride() == task.weight.stride() else torch.empty_like(task.weight).copy_(task.grad)


@dataclass(frozen=True)
class Place:
    """Where kernels lie: kernel ``(row, column)``, and entry ``(i, j)`` of its component behind its start."""

    rows: int
    columns: int
    row_stride: int
    column_stride: int
    i_stride: int
    j_stride: int


def place_of(task: Task, by_rows: bool = False) -> Place:
    """Where the kernels of a weight lie; as a single row where they lie at equal distances.

    Args:
        task: A parameter for which :func:`problem_of` is None.
        by_rows: Keep rows of several kernels apart.

    Returns:
        The place.
    """
    strides = _component_strides(task)
    assert strides is not None
    rows, columns = task.weight.shape[:2]
    row_stride, column_stride = task.weight.stride()[:2]
    if columns == 1:
        rows, columns, row_stride, column_stride = 1, rows, 0, row_stride
    elif row_stride == columns * column_stride and not by_rows:  # all kernels one behind the other
        rows, columns, row_stride = 1, rows * columns, 0
    return Place(rows, columns, row_stride, column_stride, *strides)


def _component_strides(task: Task) -> tuple[int, int] | None:
    """Strides of a component's rows and columns, None if there are none or entries share their memory."""
    shape, strides = task.weight.shape, task.weight.stride()
    size = 1
    for stride, length in sorted(zip(strides, shape, strict=True)):
        if length > 1 and stride != size:
            return None
        size *= length
    if len(shape) == 3:
        i, j = strides[2], 0
    else:
        i, j = strides[-2:]
        folded = range(2, len(shape) - 2)  # leading dimensions of the kernel, which form its rows with the last but one
        if any(shape[d] > 1 and strides[d] != shape[d + 1] * strides[d + 1] for d in folded):
            return None
    return (j, i) if task.table.wide else (i, j)
