"""The fused path for lines: weights on spheres and oblique manifolds, of any size, on the CPU.

A *line* is a vector of a given norm: a whole component of a sphere, a column of an oblique component. All that a step
does to a line is linear in its point ``x``, its gradient ``h`` and its momentum ``m``, but for the factor that brings
it back to its norm, and that follows from their six inner products ("Mathematics", section 2.3). So ``lines.cpp`` takes
the products in one sweep over memory and moves all lines in a second: eight passes in all, where the batched torch code
takes some forty.

Taken are contiguous float32 weights, whatever number of blocks they were dealt to (linear layers, 1x1 and other
convolutions as matrices), but for their Stiefel blocks, which are left to the batched code; and weights that were
declared on one manifold, if their lines lie at equal distances in memory.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import math
import weakref
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import cast

import geoopt
import numpy as np
import torch
from torch import Tensor

from fgo_geo.components import BlockPartition, Segments
from fgo_geo.kernels.cpu import NOT_BUILT, library, threads_for
from fgo_geo.kernels.task import Batch, Configuration, Table, Task, configuration_of, gradient_of, same, types_differ
from fgo_geo.manifolds import ComponentManifold, Oblique, ProductOfGroups, ScaledSphere

__all__ = [
    "DESCRIPTION",
    "Deal",
    "LineTable",
    "goes_by_rows",
    "put_",
    "reason",
    "squared_norms",
    "take",
    "task_of",
    "update",
]

DESCRIPTION = "compiled sweeps of spheres and oblique manifolds on the CPU"

_SHORTEST = 4  # numbers of a line; shorter ones are less than what is kept of each
_PRODUCTS, _MOVES = 6, 7  # numbers per line
_MODES = {"nobody": 0, "one line": 1, "a line of every row": 2, "a line of every column": 3}


@dataclass(frozen=True, eq=False)
class Deal:
    """How the blocks of a matrix were dealt to lines.

    Attributes:
        patterns: For every row the pattern that its columns are dealt by, int32.
        places: For every row its number among those of its blocks, int32.
        segments: Runs of columns that belong to one block, int32: where they start, how many they are, whose they are
            (:data:`_MODES`), the block's first line; pattern by pattern.
        first_segments: The first segment of every pattern, and where the last pattern ends, int32.
        orders: For every pattern its columns in order, int32, shape ``(patterns, columns)``; from -1 on: as they are.
        shared: Number of lines of which several rows have a part; they come first.
    """

    patterns: Tensor
    places: Tensor
    segments: Tensor
    first_segments: Tensor
    orders: Tensor
    shared: int


@dataclass(frozen=True, eq=False, kw_only=True)
class LineTable(Table):
    """Where the lines of a weight lie, and what they are.

    Attributes:
        lines: Number of lines.
        length: Numbers of a line; of a matrix that was dealt, its rows.
        width: One if a line is a run in memory; else lines are the columns of matrices with so many columns.
        group_of: Group of every line, int32; None if there is one group.
        radius: Radius of all lines; nan if they differ.
        radii: Radius of every line in float64 where they differ, infinite where there is no constraint; else None.
        deal: How a matrix was dealt to lines, None if they lie at equal distances.
    """

    lines: int
    length: int
    width: int
    group_of: Tensor | None
    radius: float
    radii: Tensor | None
    deal: Deal | None = None


class _Task(ctypes.Structure):
    """``fgo_lines`` of lines.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("weight", "grad", "buffer", "groups", "radii")),
        *((name, ctypes.c_void_p) for name in ("products", "moves", "squared_norms", "scales")),
        *((name, ctypes.c_void_p) for name in ("patterns", "places", "segments", "first_segments", "orders")),
        ("radius", ctypes.c_double),
        *((name, ctypes.c_int64) for name in ("lines", "length", "width", "shared")),
        ("first", ctypes.c_int32),
    )


class _Options(ctypes.Structure):
    """``fgo_line_options`` of lines.cpp."""

    _fields_ = (
        *((name, ctypes.c_double) for name in ("lr", "momentum", "dampening", "weight_decay")),
        *((name, ctypes.c_int32) for name in ("nesterov", "maximize", "radius_invariant")),
    )


# -- which weights are lines -----------------------------------------------------------------------------------------

_tables: weakref.WeakKeyDictionary[geoopt.Manifold, dict[Hashable, tuple[Configuration, LineTable | None]]]
_tables = weakref.WeakKeyDictionary()


def task_of(
    param: Tensor, manifold: geoopt.Manifold, buffer: Tensor | None, grad: Tensor | None = None
) -> Task[LineTable] | None:
    """The task of a parameter, or None if it does not consist of lines.

    Args:
        param: A parameter with a gradient.
        manifold: Its manifold.
        buffer: Its momentum, if there is any yet.
        grad: Its gradient, if that is not ``param.grad``.

    Returns:
        A task.
    """
    if param.device.type != "cpu" or param.dtype != torch.float32:
        return None
    table = _table_of(manifold, param.detach())
    if table is None:
        return None
    return Task(param, param.grad if grad is None else grad, buffer, False, manifold, table)


def _table_of(manifold: geoopt.Manifold, weight: Tensor) -> LineTable | None:
    """The table of a weight on a manifold, kept until a radius changes."""
    if not isinstance(manifold, (ProductOfGroups, ComponentManifold)):
        return None
    of_manifold = _tables.get(manifold)
    if of_manifold is None:
        of_manifold = _tables[manifold] = {}
    key = weight.shape, weight.stride()
    kept = of_manifold.get(key)
    if kept is None or not same(kept[0], configuration_of(manifold)):
        kept = of_manifold[key] = (configuration_of(manifold), _build(manifold, weight))
    return kept[1]


def _build(manifold: geoopt.Manifold, weight: Tensor) -> LineTable | None:
    """The table of a weight whose lines lie at equal distances, or that of a matrix whose blocks were dealt."""
    alike = _build_alike(manifold, weight)
    if alike is not None or not isinstance(manifold, ProductOfGroups):
        return alike
    return _build_dealt(manifold, weight)


def _build_alike(manifold: geoopt.Manifold, weight: Tensor) -> LineTable | None:
    if isinstance(manifold, ProductOfGroups):
        cut = manifold.partition
        if not isinstance(cut, BlockPartition) or len(cut.kinds) > 1:
            return None
        ((part, segments),) = manifold.parts
        (components,), (numbers,) = cut.split(weight), cut.groups
        if components.data_ptr() != weight.data_ptr() or components.numel() != weight.numel():
            return None  # sorted: the components are copies
    else:
        n = math.prod(weight.shape[: weight.ndim - manifold.ndim])
        part, segments, components, numbers = manifold, Segments(1, n), weight, np.zeros(1, int)
    if type(part) not in (ScaledSphere, Oblique):
        return None
    part = cast(ComponentManifold, part)
    found = _lie_of(type(part) is Oblique, components, part.ndim)
    if found is None or found[0] < _SHORTEST:
        return None
    length, width, per_component = found
    groups = None
    if segments.count > 1:
        groups = segments.spread(torch.from_numpy(numbers).int()).repeat_interleave(per_component)
    batch = components.shape[: components.ndim - part.ndim]
    radius = part.radius
    radii = radius.detach().double().cpu().expand(batch).flatten() if isinstance(radius, Tensor) else None
    curvature = torch.empty(segments.count, dtype=torch.float64)
    own = torch.full((segments.total,), math.nan if isinstance(radius, Tensor) else radius, dtype=torch.float64)
    curvature[torch.from_numpy(numbers)] = segments.max((own if radii is None else radii) ** -2)
    return LineTable(
        groups=segments.count,
        curvature=curvature,
        constrained=torch.ones(segments.count, dtype=torch.bool),
        lines=segments.total * per_component,
        length=length,
        width=width,
        group_of=groups,
        radius=math.nan if isinstance(radius, Tensor) else radius,
        radii=None if radii is None else radii.repeat_interleave(per_component),
    )


@dataclass
class _Block:
    """One block of a matrix: its group, whose its entries are, and how many lines that makes."""

    group: int
    mode: int
    lines: int
    first_line: int = 0


def _build_dealt(manifold: ProductOfGroups, weight: Tensor) -> LineTable | None:
    cut, layout = manifold.partition, manifold.layout
    matrix = layout.channels(weight).flatten(1)
    if not isinstance(cut, BlockPartition) or set(cut.kinds) == {"stiefel"}:
        return None
    if matrix.data_ptr() != weight.data_ptr() or not matrix.is_contiguous():
        return None
    radius_of = np.full(manifold.n_groups, math.inf)
    blocks: list[_Block] = []
    rows_of: dict[int, np.ndarray] = {}  # by the first row: its pattern's rows
    pattern_of: dict[int, list[tuple[_Block, np.ndarray]]] = {}  # by the first row: blocks and their columns
    for part, (kind, groups, own) in enumerate(zip(cut.kinds, cut.groups, manifold.manifolds, strict=True)):
        if isinstance(own, ComponentManifold):
            radius_of[groups] = own.radius.cpu().numpy() if isinstance(own.radius, Tensor) else own.radius
        for group, rows, columns in zip(groups, *(lines.numpy() for lines in cut.rectangles(part)), strict=True):
            block = _block(int(group), kind, len(rows), len(columns))
            blocks.append(block)
            rows_of[int(rows[0])] = rows
            pattern_of.setdefault(int(rows[0]), []).append((block, columns))
    shared = _number_lines(blocks)
    patterns, places = torch.empty(len(matrix), dtype=torch.int32), torch.empty(len(matrix), dtype=torch.int32)
    segments: list[tuple[int, int, int, int]] = []
    first_segments = [0]
    orders: list[np.ndarray] = []
    for number, (first, pattern) in enumerate(pattern_of.items()):
        rows = torch.from_numpy(rows_of[first]).long()
        patterns[rows] = number
        places[rows] = torch.arange(len(rows), dtype=torch.int32)
        pattern.sort(key=lambda dealt: int(dealt[1][0]))  # blocks that are runs of columns come in their order
        start = 0
        for block, columns in pattern:
            segments.append((start, len(columns), block.mode, block.first_line))
            start += len(columns)
        first_segments.append(len(segments))
        order = np.concatenate([columns for _, columns in pattern])
        orders.append(np.full_like(order, -1) if (order == np.arange(len(order))).all() else order)
    lines_of = [block.lines for block in sorted(blocks, key=lambda block: block.first_line) if block.lines]
    group_of = [block.group for block in sorted(blocks, key=lambda block: block.first_line) if block.lines]
    groups = np.repeat(np.array(group_of, np.int32), lines_of)
    return LineTable(
        groups=manifold.n_groups,
        curvature=torch.from_numpy(radius_of**-2),
        constrained=torch.from_numpy(np.isfinite(radius_of)),
        left=tuple(part for part, kind in enumerate(cut.kinds) if kind == "stiefel"),
        lines=len(groups),
        length=matrix.shape[0],
        width=matrix.shape[1],
        group_of=torch.from_numpy(groups),
        radius=math.nan,
        radii=torch.from_numpy(radius_of[groups]),
        deal=Deal(
            patterns,
            places,
            torch.tensor(segments, dtype=torch.int32),
            torch.tensor(first_segments, dtype=torch.int32),
            torch.from_numpy(np.stack(orders)),
            shared,
        ),
    )


def _block(group: int, kind: str, rows: int, columns: int) -> _Block:
    """A block; the lines of an oblique one are its columns, or its rows where these are longer."""
    if kind == "stiefel":
        return _Block(group, _MODES["nobody"], 0)
    if kind != "oblique":
        return _Block(group, _MODES["one line"], 1)
    if rows < columns:
        return _Block(group, _MODES["a line of every row"], rows)
    return _Block(group, _MODES["a line of every column"], columns)


def _number_lines(blocks: Sequence[_Block]) -> int:
    """Number the lines, those first of which several rows have a part; returns how many these are."""
    shared = count = 0
    for of_rows in (False, True):
        for block in blocks:
            if (block.mode == _MODES["a line of every row"]) == of_rows:
                block.first_line = count
                count += block.lines
        shared = shared if of_rows else count
    return shared


def _lie_of(columns: bool, x: Tensor, ndim: int) -> tuple[int, int, int] | None:
    """Length of the lines of components, their width (see :class:`LineTable`), and how many a component has.

    Args:
        columns: Whether lines are the columns of components, or components as they are.
        x: Components.
        ndim: How many dimensions a component has.

    Returns:
        Three numbers, or None if the lines do not lie at equal distances.
    """
    sizes = list(zip(x.shape, x.stride(), strict=True))
    batch, component = sizes[: x.ndim - ndim], sizes[x.ndim - ndim :]
    if not columns:
        length = math.prod(x.shape[x.ndim - ndim :])
        inside = sorted(component, key=lambda dimension: -dimension[1])
        return (length, 1, 1) if _follow([*batch, (1, 1), *inside]) and _follow(inside) else None
    rows, width = x.shape[-2:]
    if _follow([*batch, component[1], component[0]]):
        return rows, 1, width
    return (rows, width, width) if _follow([*batch, *component]) else None


def _follow(dimensions: Sequence[tuple[int, int]]) -> bool:
    """Whether sizes and strides are those of a contiguous tensor."""
    step = 1
    for size, stride in reversed(dimensions):
        if size > 1 and stride != step:
            return False
        step *= size
    return True


# -- the path --------------------------------------------------------------------------------------------------------


def reason(task: Task[LineTable]) -> str | None:
    """Why the path cannot take a parameter, None if it can."""
    return types_differ(task) or (NOT_BUILT if library() is None else None)


def goes_by_rows(task: Task[LineTable]) -> bool:
    """No weight does: lines are longer than what a cache holds of three tensors."""
    return False


def squared_norms(batch: Batch) -> Tensor:
    """Squared norms of the Riemannian gradients of all groups, one behind the other, in float64.

    The memory of the result is used again in the next step of the batch.
    """
    call = _begun(batch)
    call.norms.zero_()
    call.run("fgo_line_norms")
    return call.norms


def update(batch: Batch, scales: Tensor, skips: bool) -> None:
    """Take the step of all tasks, given ``1 / τ`` of all groups; a zero leaves the gradient out.

    It goes on from the inner products that :func:`squared_norms` took, if it was called for this batch.
    """
    if batch.prepared is None:
        squared_norms(batch)
    call = cast(_Call, batch.prepared)
    call.scales.copy_(scales)
    if call.run("fgo_line_update"):  # a step so long that its own rounding shows: rare, and not worth a loop in C++
        for task in batch.tasks:
            manifold, weight = cast(ComponentManifold, task.manifold), task.weight
            weight.copy_(manifold.retr(weight, torch.zeros_like(weight)))


class _Call:
    """The tasks of a batch as the extension wants them. In the next step only addresses and options are different."""

    def __init__(self, batch: Batch) -> None:
        tables = [cast(LineTable, task.table) for task in batch.tasks]
        lines = sum(table.lines for table in tables)
        self.norms = torch.empty(sum(batch.counts), dtype=torch.float64)
        self.scales = torch.empty(sum(batch.counts), dtype=torch.float32)
        self._products = torch.empty(_PRODUCTS * lines, dtype=torch.float64)
        self._moves = torch.empty(_MOVES * lines, dtype=torch.float32)
        self._options = _Options()
        self._tasks = (_Task * len(tables))()
        self._threads = functools.partial(threads_for, sum(task.weight.numel() for task in batch.tasks))
        first_groups = itertools.accumulate(batch.counts, initial=0)
        first_lines = itertools.accumulate((table.lines for table in tables), initial=0)
        for entry, table, group, line in zip(self._tasks, tables, first_groups, first_lines, strict=False):
            entry.groups = None if table.group_of is None else table.group_of.data_ptr()
            entry.radii = None if table.radii is None else table.radii.data_ptr()
            entry.radius = table.radius
            entry.products = self._products.data_ptr() + _PRODUCTS * line * self._products.itemsize
            entry.moves = self._moves.data_ptr() + _MOVES * line * self._moves.itemsize
            entry.squared_norms = self.norms.data_ptr() + group * self.norms.itemsize
            entry.scales = self.scales.data_ptr() + group * self.scales.itemsize
            entry.lines, entry.length, entry.width = table.lines, table.length, table.width
            if table.deal is not None:
                for name in ("patterns", "places", "segments", "first_segments", "orders"):
                    setattr(entry, name, getattr(table.deal, name).data_ptr())
                entry.shared = table.deal.shared

    def begin(self, batch: Batch) -> None:
        """Write the addresses and options of a step."""
        o = batch.options
        self._options = _Options(
            float(o.lr), o.momentum, o.dampening, o.weight_decay, o.nesterov, o.maximize, o.radius_invariant
        )
        for entry, task in zip(self._tasks, batch.tasks, strict=True):
            entry.weight = task.weight.data_ptr()
            entry.grad = gradient_of(task).data_ptr()
            entry.buffer = None if task.buffer is None else task.buffer.data_ptr()
            entry.first = task.first

    def run(self, name: str) -> int:
        """Call a function of the extension; returns what it returns."""
        with torch.profiler.record_function(name):
            sweep, options = getattr(library(), name), ctypes.byref(self._options)
            return sweep(self._tasks, ctypes.c_int64(len(self._tasks)), options, ctypes.c_int(self._threads()))


def _begun(batch: Batch) -> _Call:
    """The call of a batch, at the beginning of a step."""
    if batch.prepared is None:
        batch.prepared = _Call(batch)
    call = cast(_Call, batch.prepared)
    call.begin(batch)
    return call


# -- blocks that are left to the batched code ------------------------------------------------------------------------


def take(weight: Tensor, cut: BlockPartition, part: int) -> Tensor:
    """The blocks of one part of a weight that was dealt: ``cut.split(weight)[part]``, without looking at the others.

    Args:
        weight: A weight in float32, or its gradient or momentum.
        cut: How the weight is cut.
        part: Number of the part.

    Returns:
        Blocks ``(n, A, B)``.
    """
    rows, columns = cut.rectangles(part)
    blocks = weight.new_empty(*rows.shape, columns.shape[1])
    _copy_blocks("fgo_take", cut.layout.channels(weight).flatten(1).contiguous(), cut, part, blocks)
    return blocks.mT if rows.shape[1] < columns.shape[1] else blocks


def put_(weight: Tensor, cut: BlockPartition, part: int, blocks: Tensor) -> None:
    """Write the blocks of one part into a weight that was dealt, or into its momentum; the inverse of :func:`take`.

    The matrix of the weight's channels has to be contiguous.
    """
    rows, columns = cut.rectangles(part)
    stored = (blocks.mT if rows.shape[1] < columns.shape[1] else blocks).contiguous()
    torch.autograd.graph.increment_version(weight)
    _copy_blocks("fgo_put", cut.layout.channels(weight).flatten(1), cut, part, stored)


def _copy_blocks(name: str, channels: Tensor, cut: BlockPartition, part: int, blocks: Tensor) -> None:
    rows, columns = cut.rectangles(part)
    width, *shape = (ctypes.c_int64(size) for size in (channels.shape[1], *rows.shape, columns.shape[1]))
    addresses = (ctypes.c_void_p(t.data_ptr()) for t in (channels, rows, columns, blocks))
    matrix, own_rows, own_columns, own_blocks = addresses
    threads = ctypes.c_int(threads_for(blocks.numel()))
    getattr(library(), name)(matrix, width, own_rows, own_columns, *shape, own_blocks, threads)
