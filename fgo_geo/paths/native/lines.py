"""The fused path for lines: weights on spheres and oblique manifolds, of any size, on the CPU.

A *line* is a vector of a given norm: a whole component of a sphere, a column of an oblique component. All that a step
does to a line is linear in its point ``x``, its gradient ``h`` and its momentum ``m``, but for the factor that brings
it back to its norm, and that follows from their six inner products ("Mathematics", section A.3). So ``lines.cpp`` takes
the products in one sweep over memory and moves all lines in a second: eight passes in all, where the batched torch code
takes some forty.

Taken are contiguous float32 weights, whatever number of blocks they were dealt to (linear layers, 1x1 and other
convolutions as matrices), but for their Stiefel blocks, which are left to the batched code; and weights that were
declared on one manifold, if their lines lie at equal distances in memory.
"""

from __future__ import annotations

import ctypes
import itertools
from typing import cast

import geoopt
import torch
from torch import Tensor

from fgo_geo.paths.native.kernels import NOT_BUILT, library, threads_for
from fgo_geo.paths.native.line_tables import LineTable, table_of
from fgo_geo.paths.task import Batch, Task, gradient_of, types_differ
from fgo_geo.weights.components import BlockPartition

__all__ = [
    "description",
    "goes_by_rows",
    "put_",
    "reason",
    "squared_norms",
    "take",
    "task_of",
    "update",
]

_PRODUCTS, _MOVES = 6, 7  # numbers per line


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


# -- the path --------------------------------------------------------------------------------------------------------


def task_of(
    param: Tensor, manifold: geoopt.Manifold, buffer: Tensor | None, grad: Tensor | None = None
) -> Task[LineTable] | None:
    """As :func:`fgo_geo.paths.router.task_of`, for lines alone."""
    if param.device.type != "cpu" or param.dtype != torch.float32:
        return None
    table = table_of(manifold, param.detach())
    if table is None:
        return None
    return Task(param, param.grad if grad is None else grad, buffer, False, manifold, table)


def description() -> str:
    """What the path is, where it is there."""
    return "compiled sweeps of spheres and oblique manifolds on the CPU"


def reason(task: Task[LineTable]) -> str | None:
    """Why the path cannot take a parameter, None if it can."""
    return types_differ(task) or (NOT_BUILT if library() is None else None)


def goes_by_rows(task: Task[LineTable]) -> bool:
    """No weight does."""
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
    call.run("fgo_line_update")


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
        self._work = sum(task.weight.numel() for task in batch.tasks)
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

    def run(self, name: str) -> None:
        """Call a function of the extension."""
        with torch.profiler.record_function(name):
            sweep, options = getattr(library(), name), ctypes.byref(self._options)
            sweep(self._tasks, ctypes.c_int64(len(self._tasks)), options, ctypes.c_int(threads_for(self._work)))


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
    """Write the blocks of one part into a weight that was dealt, or into its momentum.

    It is the inverse of :func:`~fgo_geo.paths.native.lines.take`.

    Raises:
        ValueError: If the channels of the weight are no contiguous matrix.
    """
    matrix = cut.layout.channels(weight).flatten(1)
    if matrix.data_ptr() != weight.data_ptr() or not matrix.is_contiguous():
        raise ValueError(
            f"put_: the channels of a weight of shape {tuple(weight.shape)} and strides {weight.stride()} are no "
            "contiguous matrix; write into weight.contiguous()"
        )
    rows, columns = cut.rectangles(part)
    stored = (blocks.mT if rows.shape[1] < columns.shape[1] else blocks).contiguous()
    torch.autograd.graph.increment_version(weight)
    _copy_blocks("fgo_put", matrix, cut, part, stored)


def _copy_blocks(name: str, channels: Tensor, cut: BlockPartition, part: int, blocks: Tensor) -> None:
    rows, columns = cut.rectangles(part)
    width, *shape = (ctypes.c_int64(size) for size in (channels.shape[1], *rows.shape, columns.shape[1]))
    addresses = (ctypes.c_void_p(t.data_ptr()) for t in (channels, rows, columns, blocks))
    matrix, own_rows, own_columns, own_blocks = addresses
    threads = ctypes.c_int(threads_for(blocks.numel()))
    getattr(library(), name)(matrix, width, own_rows, own_columns, *shape, own_blocks, threads)
