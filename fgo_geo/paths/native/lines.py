"""The compiled path of lines: weights on spheres and oblique manifolds, of any size, on the CPU.

A *line* is a vector of a given norm: a whole component of a sphere, a column of an oblique component. All that a step
does to a line is linear in its point ``x``, its gradient ``h`` and its momentum ``m``, but for the factor that brings
it back to its norm, and that follows from their six inner products ("Mathematics", section 2.3). So ``lines.cpp`` takes
the products in one sweep over memory and moves all lines in a second: eight passes in all, where the reference path
takes some forty.

Taken are contiguous float32 weights, whatever number of blocks they were dealt to (linear layers, 1x1 and other
convolutions as matrices), but for blocks that are no lines, such as Stiefel blocks; and weights that were declared on
one manifold, if their lines are at equal distances in memory. Blocks that another path has stepped are written together
with the lines, in one call.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from fgo_geo.manifolds import ProductOfGroups
from fgo_geo.paths.kernel_tables import gradient_of, step_problem
from fgo_geo.paths.native.blocks import Block, block_of, matrix_of
from fgo_geo.paths.native.library import NOT_BUILT, library, threads_for
from fgo_geo.paths.native.line_tables import LineTable, table_of
from fgo_geo.paths.protocol import Batch, Claim, Path, Reason, Refusal, StepOptions, Weight
from fgo_geo.weights.components import BlockPartition

__all__ = ["NativeLines"]

_PRODUCTS, _MOVES = 6, 7  # numbers per line


class NativeLines(Path):
    """The path of float32 weights on spheres and oblique manifolds on the CPU."""

    name = "compiled sweeps over lines"

    def accepts(self, weight: Weight, parts: tuple[int, ...], options: StepOptions) -> tuple[int, ...] | Refusal:
        """The parts that consist of lines."""
        param, manifold = weight.param, weight.manifold
        if param.device.type != "cpu":
            return Refusal(Reason.DEVICE, f"the compiled sweeps run on the CPU, the weight is on {param.device}")
        problem = step_problem(options)
        if problem is not None:
            return problem
        is_single = param.dtype == torch.float32 and weight.grad is not None and weight.grad.dtype == torch.float32
        table = table_of(manifold, param) if is_single and manifold is not None else None
        if table is None:
            what = "float32 weights on the CPU, on spheres or an oblique manifold, of four numbers or more"
            return Refusal(Reason.COMPONENTS, f"lines are those of {what}")
        taken = tuple(part for part in parts if part not in table.left)
        return taken if library() is not None else Refusal(Reason.MISSING, NOT_BUILT)

    def batch(self, claims: Sequence[Claim]) -> Batch:
        """One call per sweep for all weights."""
        return _LineBatch(claims)


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


class _LineBatch(Batch):
    """The weights as the extension wants them. From step to step only addresses differ."""

    def __init__(self, claims: Sequence[Claim]) -> None:
        super().__init__(claims)
        tables = [cast(LineTable, table_of(cast(ProductOfGroups, w.manifold), w.param)) for w in self.weights]
        self._tables = tables  # the extension reads their memory
        lines = sum(table.lines for table in tables)
        self._norms = torch.empty(sum(self.counts), dtype=torch.float64)
        self._scales = torch.empty(sum(self.counts), dtype=torch.float32)
        self._products = torch.empty(_PRODUCTS * lines, dtype=torch.float64)
        self._moves = torch.empty(_MOVES * lines, dtype=torch.float32)
        self._entries = (_Task * len(tables))()
        self._work = sum(weight.param.numel() for weight in self.weights)
        first_groups = itertools.accumulate(self.counts, initial=0)
        first_lines = itertools.accumulate((table.lines for table in tables), initial=0)
        for entry, table, group, line in zip(self._entries, tables, first_groups, first_lines, strict=False):
            entry.groups = None if table.group_of is None else table.group_of.data_ptr()
            entry.radii = None if table.radii is None else table.radii.data_ptr()
            entry.radius = table.radius
            entry.products = self._products.data_ptr() + _PRODUCTS * line * self._products.itemsize
            entry.moves = self._moves.data_ptr() + _MOVES * line * self._moves.itemsize
            entry.squared_norms = self._norms.data_ptr() + group * self._norms.itemsize
            entry.scales = self._scales.data_ptr() + group * self._scales.itemsize
            entry.lines, entry.length, entry.width = table.lines, table.length, table.width
            if table.deal is not None:
                for name in ("patterns", "places", "segments", "first_segments", "orders"):
                    setattr(entry, name, getattr(table.deal, name).data_ptr())
                entry.shared = table.deal.shared

    def measure(self, options: StepOptions) -> Tensor:
        """``R²`` of all groups; the memory of the result is used again in the next step."""
        for weight, entry in zip(self.weights, self._entries, strict=True):
            entry.weight = weight.param.data_ptr()
            entry.grad = gradient_of(weight).data_ptr()
            entry.buffer = None if weight.buffer is None else weight.buffer.data_ptr()
            entry.first = weight.first
        self._norms.zero_()
        self._run("fgo_line_norms", options)
        return self._norms

    def move(self, options: StepOptions, scale: Tensor | None, leaves_out: bool) -> None:
        """The step of all weights in place, and the blocks that other paths have staged."""
        self._scales.fill_(1) if scale is None else self._scales.copy_(scale)
        for weight, entry in zip(self.weights, self._entries, strict=True):
            entry.buffer = None if weight.buffer is None else weight.buffer.data_ptr()  # a new one in the first step
        blocks, memory = self._staged_blocks()
        torch.autograd.graph.increment_version([weight.param for weight in self.weights])
        entries = (Block * len(blocks))(*blocks)
        self._run("fgo_line_commit", options, entries, ctypes.c_int64(len(blocks)))
        del memory
        for weight in self.weights:
            weight.staged.clear()

    def _staged_blocks(self) -> tuple[list[Block], list[Tensor]]:
        """What other paths have made of parts of the weights, and the memory that it is in."""
        blocks: list[Block] = []
        memory: list[Tensor] = []
        for claim in self.claims:
            weight = claim.weight
            for part, values in weight.staged.items():
                cut = cast(BlockPartition, cast(ProductOfGroups, weight.manifold).partition)
                rows, columns = cut.rectangles(part)
                for target, value in zip((weight.param.detach(), weight.buffer), values, strict=True):
                    if target is None or value is None:
                        continue
                    matrix = cast(Tensor, matrix_of(target, cut))
                    memory.append((value.mT if rows.shape[1] < columns.shape[1] else value).contiguous())
                    blocks.append(block_of(matrix, cut, part, memory[-1]))
        return blocks, memory

    def _run(self, name: str, options: StepOptions, *arguments: object) -> None:
        o = options
        numbers = _Options(
            float(o.lr), o.momentum, o.dampening, o.weight_decay, o.nesterov, o.maximize, o.radius_invariant
        )  # fmt: skip
        with torch.profiler.record_function(name):
            threads = ctypes.c_int(threads_for(self._work))
            entries, count = self._entries, ctypes.c_int64(len(self.weights))
            getattr(library(), name)(entries, count, ctypes.byref(numbers), threads, *arguments)
