"""Tables for the fused paths on kernels: group and kind of every kernel, and where kernels are in memory.

A table has one 32-bit *code* per kernel, in the order of memory: its group and its manifold kind. The reference path
sorts kernels by kind instead; with codes, a fused path reads and writes the weight in place.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from fgo_geo.manifolds import ComponentManifold, ProductOfGroups, Stiefel
from fgo_geo.paths.kept import kept
from fgo_geo.paths.protocol import Reason, Refusal, StepOptions, Weight
from fgo_geo.paths.rules import momentum_sgd
from fgo_geo.weights.components import KernelPartition
from fgo_geo.weights.grouping import collection
from fgo_geo.weights.kinds import kind, kind_of

__all__ = ["LARGEST", "KernelTable", "Place", "gradient_of", "place_of", "problem_of", "step_problem", "table_of"]

LARGEST = (49, 7)
"""Largest components that are kernels."""

_CODES = 4  # numbers of kinds


@dataclass(frozen=True, eq=False, kw_only=True)
class KernelTable:
    """Groups, kinds and radii of the kernels of a weight.

    Attributes:
        groups: Number of groups.
        codes: ``4 * group + kind`` of every kernel, shape of the weight's first two dimensions, int32.
        row_groups: Group of every row's kernels of a kind, shape ``(rows, 4)``, -1 where the kind does not occur; None
            if row and kind do not determine the group.
        radius: Radius of every kind; one for kinds that do not occur, not a number where radii differ.
        radii: Radius of every kernel in float64 where it differs within a kind, else None.
        size: ``(A, B)`` of a component.
        wide: Whether a component is the transpose of its kernel.
    """

    groups: int
    codes: Tensor
    row_groups: Tensor | None
    radius: tuple[float, float, float, float]
    radii: Tensor | None
    size: tuple[int, int]
    wide: bool


@dataclass(frozen=True)
class Place:
    """Where kernels are: kernel ``(row, column)``, and entry ``(i, j)`` of its component after its start."""

    rows: int
    columns: int
    row_stride: int
    column_stride: int
    i_stride: int
    j_stride: int


# -- refusals -------------------------------------------------------------------------------------


def step_problem(options: StepOptions) -> Refusal | None:
    """Why no fused path takes a step of this kind, None if one does."""
    if options.update != "retraction":
        return Refusal(Reason.STEP, "there is no fused step with the exponential map")
    if options.rule is not momentum_sgd:
        return Refusal(Reason.STEP, "there is a fused step for momentum SGD only")
    return None


def problem_of(weight: Weight, options: StepOptions) -> Refusal | None:
    """Why no fused path on kernels takes a weight on any device; None if one does.

    Example:
        >>> w = torch.zeros(16, 8, 3, 3)
        >>> problem_of(Weight(w, w, Stiefel(retraction="qr"), w), StepOptions(lr=0.1)).detail
        'fused steps use the polar retraction, but this manifold has qr'
    """
    param, grad = weight.param, weight.grad
    problem = step_problem(options) or _no_kernels(weight.manifold, param.shape)
    if problem is not None:
        return problem
    if param.dtype not in (torch.float32, torch.float64):
        return Refusal(Reason.DTYPE, f"fused steps take float32 and float64, got {param.dtype}")
    if grad is None or grad.dtype != param.dtype:
        return Refusal(Reason.DTYPE, "weight and gradient have different types")
    if place_of(weight, table_of(weight)) is None:
        return Refusal(Reason.LAYOUT, f"the strides {param.stride()} of the weight do not match any memory format")
    return None


def _no_kernels(manifold: object, shape: Sequence[int]) -> Refusal | None:
    """Why the components of a weight are no kernels for a fused path, None if they are."""
    if isinstance(manifold, ProductOfGroups):
        if not isinstance(manifold.partition, KernelPartition):
            return Refusal(Reason.COMPONENTS, "fused steps for kernels do not take the blocks of a matrix")
        unknown = [name for name in manifold.partition.kinds if kind(name).code is None]
        if unknown:
            return Refusal(Reason.KIND, f"there is no fused step for the kind {unknown[0]!r}")
        return None
    own = kind_of(type(manifold))
    if not isinstance(manifold, ComponentManifold) or own is None or own.code is None:
        return Refusal(
            Reason.KIND,
            f"there is no fused step for the class {type(manifold).__name__}",
        )
    if manifold.ndim != 2 or len(shape) != 4:
        detail = "kernels on one manifold need weights (D, C, A, B) and components of two dimensions"
        return Refusal(Reason.COMPONENTS, detail)
    rows, columns = shape[2:]
    small = rows <= LARGEST[0] and columns <= LARGEST[1]
    if not (rows * columns > 1 and columns <= rows and small) or 0 in shape:  # a product transposes wide kernels
        most = f"{LARGEST[0]} x {LARGEST[1]}"
        detail = f"kernels A x B on one manifold need A >= B, more than one entry, and are at most {most}"
        return Refusal(Reason.COMPONENTS, detail)
    if isinstance(manifold, Stiefel) and manifold.retraction != "polar":
        detail = f"fused steps use the polar retraction, but this manifold has {manifold.retraction}"
        return Refusal(Reason.KIND, detail)
    return None


# -- tables ------------------------------------------------------------------------------


def table_of(weight: Weight) -> KernelTable:
    """The table of a weight whose components are kernels, on its device, kept until the radii change."""
    manifold, shape, device = weight.manifold, weight.param.shape, weight.param.device
    if isinstance(manifold, ProductOfGroups):
        return kept(manifold, ("kernels", device), lambda: _build(manifold, device))
    manifold = cast(ComponentManifold, manifold)
    return kept(manifold, ("kernels", tuple(shape), device), lambda: _build(_product_of(manifold, shape), device))


def _product_of(manifold: ComponentManifold, shape: Sequence[int]) -> ProductOfGroups:
    """The product that kernels ``(D, C, A, B)`` on one manifold live on: all of them are one group."""
    radius = manifold.radius
    radius = radius.expand(*shape[:2]) if isinstance(radius, Tensor) else radius
    own = kind_of(manifold)
    assert own is not None
    return ProductOfGroups(collection(shape[0], shape[1], "layer", own.name), shape, radius)


def _build(manifold: ProductOfGroups, device: torch.device) -> KernelTable:
    cut = manifold.partition
    a, b = cut.sizes[0]
    radius = [1.0] * _CODES
    radii_of_kind: dict[int, set[float]] = {}
    codes: list[Tensor] = []
    radii: list[Tensor] = []
    for name, groups, (part, segments) in zip(cut.kinds, cut.groups, manifold.parts, strict=True):
        number = kind(name).code
        assert number is not None
        codes.append(segments.spread(_CODES * torch.from_numpy(groups).int() + number))
        radii.append(torch.ones(segments.total, dtype=torch.float64))
        if isinstance(part, ComponentManifold):
            own = part.radius
            numbers = radii_of_kind.setdefault(number, set())  # a kind can occur twice
            numbers.add(math.nan if isinstance(own, Tensor) else own)
            radius[number] = own if not isinstance(own, Tensor) and numbers == {own} else math.nan
            radii[-1] = radii[-1] * (own.detach().double().cpu() if isinstance(own, Tensor) else own)

    def in_memory_order(values: list[Tensor]) -> Tensor:
        weight = cut.merge([v[:, None, None].expand(-1, a, b) for v in values])
        return weight.flatten(2)[:, :, 0].contiguous().to(device)

    kernel = manifold.layout.kernel
    all_codes = in_memory_order(codes)
    return KernelTable(
        groups=manifold.n_groups,
        codes=all_codes,
        row_groups=_groups_of_rows(all_codes),
        radius=(radius[0], radius[1], radius[2], radius[3]),
        radii=in_memory_order(radii) if any(map(math.isnan, radius)) else None,
        size=(a, b),
        wide=len(kernel) > 1 and math.prod(kernel[:-1]) < kernel[-1],
    )


def _groups_of_rows(codes: Tensor) -> Tensor | None:
    """Group of every row and kind, if these two determine the group."""
    groups, kinds = codes // _CODES, codes % _CODES
    found = torch.full((len(codes), _CODES), -1, dtype=torch.int32, device=codes.device)
    for number in range(_CODES):
        there = kinds == number
        largest = torch.where(there, groups, -1).amax(1)
        if bool((there & (groups != largest[:, None])).any()):
            return None
        found[:, number] = largest
    return found


# -- memory ------------------------------------------------------------------------------


def gradient_of(weight: Weight) -> Tensor:
    """The gradient, stored as the weight is; a copy only if it is not, which the weight then holds until its step."""
    grad = cast(Tensor, weight.grad)
    if grad.is_neg():  # a view that stands for its negative
        grad = weight.grad = grad.resolve_neg()
    if grad.stride() != weight.param.stride():
        grad = weight.grad = torch.empty_like(weight.param).copy_(grad)
    return grad


def place_of(weight: Weight, table: KernelTable, by_rows: bool = False) -> Place | None:
    """Where the kernels of a weight are; as a single row where they are at equal distances.

    Args:
        weight: A weight.
        table: Its table.
        by_rows: Whether rows of several kernels stay separate rows.

    Returns:
        The place, or None if there is none for such strides.
    """
    shape, strides = weight.param.shape, weight.param.stride()
    of_component = _component_strides(table.wide, shape, strides)
    if of_component is None:
        return None
    rows, columns = shape[:2]
    row_stride, column_stride = strides[:2]
    if columns == 1:
        rows, columns, row_stride, column_stride = 1, rows, 0, row_stride
    elif row_stride == columns * column_stride and not by_rows:  # all kernels follow each other
        rows, columns, row_stride = 1, rows * columns, 0
    return Place(rows, columns, row_stride, column_stride, *of_component)


def _component_strides(wide: bool, shape: torch.Size, strides: tuple[int, ...]) -> tuple[int, int] | None:
    """Strides of a component's rows and columns, None if there are none or entries share their memory."""
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
    return (j, i) if wide else (i, j)
