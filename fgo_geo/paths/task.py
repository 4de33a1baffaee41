"""What a fused path works on: a weight, its gradient and momentum, and what its components are.

The kernels of a weight are described in the order in which it stores them, by one 32-bit *code* each: group number and
manifold kind. That replaces the sorting by kind that the batched torch code needs, so a fused path reads and writes the
weight where it is.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, Generic, TypeAlias, TypeVar, cast

import geoopt
import torch
from torch import Tensor

from fgo_geo.manifolds import ComponentManifold, Oblique, ProductOfGroups, ScaledSphere, Stiefel
from fgo_geo.weights.components import KernelPartition
from fgo_geo.weights.grouping import collection
from fgo_geo.weights.kinds import kind

__all__ = [
    "KINDS",
    "Batch",
    "Configuration",
    "KernelTable",
    "Place",
    "StepOptions",
    "Table",
    "Task",
    "configuration_of",
    "gradient_of",
    "no_kernels",
    "place_of",
    "problem_of",
    "product_of",
    "same",
    "table_of",
    "task_of",
    "types_differ",
]

_Kept = TypeVar("_Kept")

KINDS = ("euclidean", "sphere", "oblique", "stiefel")
"""Manifold kinds by their numbers in a code."""

LARGEST = (49, 7)
"""Largest components that are kernels."""


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
        constant: Divide by no ``τ``.
        rho: Bound on the distance to the minimum.
        curvature: Bound on the sectional curvature; None for the manifolds' own.
    """

    lr: float | Tensor
    momentum: float
    dampening: float
    nesterov: bool
    weight_decay: float
    maximize: bool
    radius_invariant: bool
    constant: bool = False
    rho: float = 1.0
    curvature: float | None = 1.0


@dataclass(frozen=True, eq=False, kw_only=True)
class Table:
    """What a path knows of the components of a weight.

    Attributes:
        groups: Number of groups.
        curvature: Bound on the sectional curvature of every group, float64; zero on Euclidean ones.
        constrained: Which groups have a constraint.
        left: Numbers of the parts of the weight that the path leaves to the batched code; empty if it takes all.
        known: What has been worked out from the table, for :meth:`keep`.
    """

    groups: int
    curvature: Tensor
    constrained: Tensor
    left: tuple[int, ...] = ()
    known: dict[Hashable, Any] = field(default_factory=dict[Hashable, Any], repr=False, init=False)

    def curvature_bound(self, radius_invariant: bool) -> Tensor:
        """Bound on the sectional curvature of every group, measured on the manifolds of radius one or as they are."""
        return self.constrained.to(self.curvature.dtype) if radius_invariant else self.curvature

    def keep(self, key: Hashable, build: Callable[..., _Kept], *arguments: Any) -> _Kept:
        """What ``build(*arguments)`` returned for a key, which has to name everything that it depends on.

        A step visits every parameter, and the time for that counts: what follows from the table and from the way that a
        weight is stored is worked out once. It is thrown away with the table, when the radii change or the manifold is
        no more.
        """
        if key not in self.known:
            self.known[key] = build(*arguments)
        return self.known[key]


_AnyTable = TypeVar("_AnyTable", bound=Table, covariant=True)


@dataclass(frozen=True, eq=False, kw_only=True)
class KernelTable(Table):
    """What the kernels of a weight are.

    Attributes:
        codes: ``4 * group + kind`` of every kernel, shape of the weight's first two dimensions, int32.
        row_groups: Group of every row's kernels of a kind, shape ``(rows, 4)``, -1 where the kind does not occur; None
            if row and kind do not determine the group.
        radius: Radius of every kind; one for kinds that do not occur.
        radii: Radius of every kernel in float64 where it differs within a kind, else None.
        size: ``(A, B)`` of a component.
        wide: Whether a component is the transpose of its kernel.
        rows_apart: Whether no group has kernels of two rows.
    """

    codes: Tensor
    row_groups: Tensor | None
    radius: tuple[float, float, float, float]
    radii: Tensor | None
    size: tuple[int, int]
    wide: bool
    rows_apart: bool


_tables: weakref.WeakKeyDictionary[ProductOfGroups, dict[torch.device, tuple[object, KernelTable]]]
_tables = weakref.WeakKeyDictionary()


def table_of(manifold: ProductOfGroups, device: torch.device) -> KernelTable:
    """The table of a product of groups of kernels, kept until its radii change.

    Args:
        manifold: A product whose partition is a :class:`~fgo_geo.weights.components.KernelPartition`.
        device: Where the table is needed.

    Returns:
        The table.
    """
    of_device = _tables.get(manifold)
    if of_device is None:
        of_device = _tables[manifold] = {}
    kept = of_device.get(device)
    if kept is None or kept[0] is not manifold.manifolds:  # every change of the radii makes new ones
        kept = of_device[device] = (manifold.manifolds, _build(manifold, device))
    return kept[1]


_KIND_OF: dict[type, str] = {ScaledSphere: "sphere", Oblique: "oblique", Stiefel: "stiefel"}
_products: weakref.WeakKeyDictionary[ComponentManifold, dict[tuple[int, ...], tuple[Configuration, ProductOfGroups]]]
_products = weakref.WeakKeyDictionary()


def no_kernels(manifold: object, shape: Sequence[int]) -> str | None:
    """Why the components of a weight are no kernels for a fused path, None if they are.

    Args:
        manifold: The manifold of the weight.
        shape: Shape of the weight.

    Returns:
        A reason, or None.

    Example:
        >>> no_kernels(Stiefel(retraction="qr"), (16, 8, 3, 3))
        'fused steps know no other retraction than polar, the manifold has qr'
    """
    if isinstance(manifold, ProductOfGroups):
        unknown = [name for name in manifold.partition.kinds if kind(name).code is None]
        if unknown:
            return f"fused steps know no components of kind {unknown[0]!r}"
        return None if isinstance(manifold.partition, KernelPartition) else "its components are blocks"
    if not isinstance(manifold, ComponentManifold) or type(manifold) not in _KIND_OF:
        return f"fused steps know no {type(manifold).__name__}, and no classes derived from those that they know"
    if manifold.ndim != 2 or len(shape) != 4:
        return "kernels on one manifold need weights (D, C, A, B) and components of two dimensions"
    rows, columns = shape[2:]
    small = rows <= LARGEST[0] and columns <= LARGEST[1]
    if not (rows * columns > 1 and columns <= rows and small) or 0 in shape:  # a product transposes wide kernels
        most = f"{LARGEST[0]} x {LARGEST[1]}"
        return f"kernels A x B on one manifold need A >= B, more than one entry, and are at most {most}"
    if isinstance(manifold, Stiefel) and manifold.retraction != "polar":
        return f"fused steps know no other retraction than polar, the manifold has {manifold.retraction}"
    return None


def product_of(manifold: object, shape: Sequence[int]) -> ProductOfGroups | None:
    """The product of groups of kernels that a weight lives on.

    A weight ``(D, C, A, B)`` that was declared on a single manifold, over its last two dimensions, lives on a product
    too: all its kernels are one group.

    Args:
        manifold: The manifold of the weight.
        shape: Shape of the weight.

    Returns:
        A product, the same one until a radius changes; None if the components are no kernels, or the manifold is not
        one of this package's.

    Example:
        >>> product = product_of(Oblique(2.0), (16, 8, 3, 3))
        >>> product.n_groups, product.manifolds[0].radius
        (1, 2.0)
    """
    if no_kernels(manifold, shape) is not None:
        return None
    if isinstance(manifold, ProductOfGroups):
        return manifold
    manifold = cast(ComponentManifold, manifold)
    of_shape = _products.get(manifold)
    if of_shape is None:
        of_shape = _products[manifold] = {}
    kept = of_shape.get(tuple(shape))
    if kept is None or not same(kept[0], configuration_of(manifold)):
        radius = manifold.radius
        radius = radius.expand(*shape[:2]) if isinstance(radius, Tensor) else radius
        product = ProductOfGroups(collection(shape[0], shape[1], "layer", _KIND_OF[type(manifold)]), shape, radius)
        kept = of_shape[tuple(shape)] = (configuration_of(manifold), product)
    return kept[1]


Configuration: TypeAlias = tuple[object, int]


def configuration_of(manifold: geoopt.Manifold) -> Configuration:
    """What is different after a change of the radii, for :func:`same`: an object, and how often it was written to."""
    if isinstance(manifold, ProductOfGroups):
        return manifold.manifolds, 0
    radius = getattr(manifold, "radius", None)
    if not isinstance(radius, Tensor) or radius.is_inference():
        return radius, 0
    return radius, radius._version  # pyright: ignore[reportPrivateUsage]


def same(one: Configuration, other: Configuration) -> bool:
    """Whether the radii have not changed in between."""
    return one[0] is other[0] and one[1] == other[1]


def _build(manifold: ProductOfGroups, device: torch.device) -> KernelTable:
    cut = manifold.partition
    a, b = cut.sizes[0]
    curvature = torch.zeros(manifold.n_groups, dtype=torch.float64)
    constrained = torch.zeros(manifold.n_groups, dtype=torch.bool)
    radius = [1.0] * len(KINDS)
    radii_of_kind: dict[int, set[float]] = {}
    codes: list[Tensor] = []
    radii: list[Tensor] = []
    for name, groups, (part, segments) in zip(cut.kinds, cut.groups, manifold.parts, strict=True):
        number = KINDS.index(name)
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
    row_groups = _groups_of_rows(all_codes)
    return KernelTable(
        codes=all_codes,
        row_groups=row_groups,
        radius=(radius[0], radius[1], radius[2], radius[3]),
        radii=in_memory_order(radii) if any(map(math.isnan, radius)) else None,
        curvature=curvature.to(device),
        constrained=constrained.to(device),
        size=(a, b),
        wide=wide,
        groups=manifold.n_groups,
        rows_apart=row_groups is not None and _all_differ(row_groups[row_groups >= 0]),
    )


def _all_differ(values: Tensor) -> bool:
    return len(values.unique()) == len(values)


def _groups_of_rows(codes: Tensor) -> Tensor | None:
    """Group of every row and kind, if these two determine the group."""
    groups, kinds = codes // 4, codes % 4
    found = torch.full((len(codes), len(KINDS)), -1, dtype=torch.int32, device=codes.device)
    for number in range(len(KINDS)):
        there = kinds == number
        largest = torch.where(there, groups, -1).amax(1)
        if bool((there & (groups != largest[:, None])).any()):
            return None
        found[:, number] = largest
    return found


@dataclass(eq=False, slots=True)
class Task(Generic[_AnyTable]):
    """One parameter's share of a step.

    Attributes:
        weight: The parameter; written in place.
        grad: Its Euclidean gradient; None between steps.
        buffer: Its momentum, written in place; None without momentum and between steps.
        first: Whether the buffer holds nothing yet.
        fresh: Whether the buffer is not the one that the optimiser has.
        manifold: Where the parameter lives.
        table: What the components are.
    """

    weight: Tensor
    grad: Tensor | None
    buffer: Tensor | None
    first: bool
    manifold: geoopt.Manifold
    table: _AnyTable
    fresh: bool = False
    configuration: Configuration = field(init=False)
    stored: tuple[object, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.configuration = configuration_of(self.manifold)
        self.stored = _stored(self.weight)

    def renew(self, param: Tensor, buffer: Tensor | None) -> bool:
        """Take over gradient and momentum of another step, if that is all that has changed.

        What a fused path found out about a task (its table, where its kernels lie, that it takes it) is true of the
        renewed one. Small parameters cost more to be looked at than to be moved.

        Args:
            param: The parameter in this place now.
            buffer: Its momentum, if there is any yet.

        Returns:
            Whether the task is that of this step; if not it is of no use any more.
        """
        grad, manifold = param.grad, self.manifold
        if param is not self.weight or grad is None or getattr(param, "manifold", None) is not manifold:
            return False
        stored = _stored(param)
        if (
            stored != self.stored
            or not same(configuration_of(manifold), self.configuration)
            or grad.dtype != param.dtype
        ):
            return False
        if buffer is not None and _stored(buffer) != stored:
            return False
        self.grad, self.buffer, self.first, self.fresh = grad, buffer, False, False
        return True

    def release(self) -> None:
        """Hold on to no memory until the next step."""
        self.grad = self.buffer = None


def _stored(tensor: Tensor) -> tuple[object, ...]:
    """How a tensor is stored, but for where."""
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def task_of(
    param: Tensor, manifold: geoopt.Manifold, buffer: Tensor | None, grad: Tensor | None = None
) -> Task[KernelTable] | None:
    """As :func:`fgo_geo.paths.router.task_of`, for kernels alone."""
    product = product_of(manifold, param.shape)
    if product is None:
        return None
    grad = param.grad if grad is None else grad
    return Task(param, grad, buffer, False, manifold, table_of(product, param.device))


class Batch:
    """Tasks that one path does together.

    Attributes:
        path: The path, of :mod:`fgo_geo.paths.router`.
        tasks: What it has to do.
        options: Options of the parameter group, of this step.
        by_rows: Whether the path takes the whole step row by row.
        counts: Number of groups of every task.
        dtype: Type with the precision of all weights.
        prepared: What the path has made of the tasks, of use for their renewals too.
    """

    def __init__(
        self, path: ModuleType, tasks: Sequence[Task[Any]], options: StepOptions, by_rows: bool = False
    ) -> None:
        self.path = path
        self.by_rows = by_rows
        self.tasks = list(tasks)
        self.options = options
        self.counts = [task.table.groups for task in tasks]
        self.dtype = max((task.weight.dtype for task in tasks), key=lambda dtype: dtype.itemsize)
        self.prepared: Any = None

    @property
    def weights(self) -> list[Tensor]:
        """The parameters."""
        return [task.weight for task in self.tasks]

    def fresh_buffers(self) -> list[tuple[Tensor, Tensor]]:
        """Parameters whose momentum will not be where the optimiser has it, and where it will be."""
        return [(task.weight, task.buffer) for task in self.tasks if task.fresh and task.buffer is not None]


# -- where the kernels lie -------------------------------------------------------------------------------------------


def problem_of(task: Task[KernelTable]) -> str | None:
    """Why no fused path can take a parameter, whatever the device; None if one can."""
    weight = task.weight
    if weight.dtype not in (torch.float32, torch.float64):
        return f"fused steps take float32 and float64, got {weight.dtype}"
    differ = types_differ(task)
    if differ is None and place_of(task) is None:
        return f"the strides {weight.stride()} of the weight are those of no memory format"
    return differ


def types_differ(task: Task[Table]) -> str | None:
    """That a fused path cannot take a parameter, if its tensors are not of one type."""
    tensors = [task.grad, task.weight if task.buffer is None else task.buffer]
    if all(tensor is not None and tensor.dtype == task.weight.dtype for tensor in tensors):
        return None
    return "weight, gradient and momentum have different types"


def gradient_of(task: Task[Table]) -> Tensor:
    """The gradient, stored as the weight is; a copy only if it is not, which the task then holds."""
    assert task.grad is not None
    if task.grad.is_neg():  # a view that stands for its negative
        task.grad = task.grad.resolve_neg()
    if task.grad.stride() != task.weight.stride():
        task.grad = torch.empty_like(task.weight).copy_(task.grad)
    return task.grad


@dataclass(frozen=True)
class Place:
    """Where kernels lie: kernel ``(row, column)``, and entry ``(i, j)`` of its component behind its start."""

    rows: int
    columns: int
    row_stride: int
    column_stride: int
    i_stride: int
    j_stride: int


def place_of(task: Task[KernelTable], by_rows: bool = False) -> Place | None:
    """Where the kernels of a weight lie; as a single row where they lie at equal distances.

    Args:
        task: A parameter.
        by_rows: Keep rows of several kernels apart.

    Returns:
        The place, or None if there is none for such strides.
    """
    table, shape, strides = task.table, task.weight.shape, task.weight.stride()
    return table.keep(("place", shape, strides, by_rows), _place, table.wide, shape, strides, by_rows)


def _place(wide: bool, shape: torch.Size, strides: tuple[int, ...], by_rows: bool) -> Place | None:
    of_component = _component_strides(wide, shape, strides)
    if of_component is None:
        return None
    rows, columns = shape[:2]
    row_stride, column_stride = strides[:2]
    if columns == 1:
        rows, columns, row_stride, column_stride = 1, rows, 0, row_stride
    elif row_stride == columns * column_stride and not by_rows:  # all kernels one behind the other
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
