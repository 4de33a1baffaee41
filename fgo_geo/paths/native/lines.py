"""The compiled path of lines: weights on spheres and oblique manifolds, of any size, on the CPU.

A *line* is a vector of fixed norm: a component on a sphere, or a column of a component on an oblique manifold. A step
is linear in the line's point ``x``, gradient ``h`` and momentum ``m``, except for the factor that restores the norm,
and that factor follows from their six inner products ("Mathematics", section A.3). Therefore ``lines.cpp`` computes the
products in one sweep over memory and moves all lines in a second one. The two sweeps make eight passes, where the
reference path makes about forty.

The path supports contiguous float32 matrices (linear layers, 1x1 and other convolutions as matrices), whose blocks may
belong to any number of manifolds. It leaves blocks that do not consist of lines, such as Stiefel blocks, to other
paths. It also supports weights that were declared on one manifold, if their lines are strided. One call writes the
lines together with the blocks that other paths have stepped.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
from torch import Tensor

from fgo_geo.manifolds import ProductOfGroups
from fgo_geo.paths.kernel_tables import gradient_of, step_problem
from fgo_geo.paths.native.blocks import MatrixOptions
from fgo_geo.paths.native.library import NOT_BUILT, library, threads_for
from fgo_geo.paths.native.line_tables import LineTable, table_of
from fgo_geo.paths.protocol import Batch, Claim, Path, Reason, Refusal, StepOptions, Weight
from fgo_geo.weights.components import BlockPartition

__all__ = ["LineBatch", "NativeLines"]

_PRODUCTS, _COEFFICIENTS = 6, 7  # numbers per line
_BLOCK_TENSORS = (
    "pattern_of_row",
    "row_in_block",
    "segments",
    "first_segments",
    "column_orders",
)  # tensors of a BlockTable


class NativeLines(Path):
    """The path of float32 weights on spheres and oblique manifolds on the CPU."""

    name = "compiled sweeps over vectors"

    def accepts(self, weight: Weight, parts: tuple[int, ...], options: StepOptions) -> tuple[int, ...] | Refusal:
        """The parts that consist of lines."""
        param, manifold = weight.param, weight.manifold
        if param.device.type != "cpu":
            return Refusal(Reason.DEVICE, f"the compiled sweeps run on the CPU, the weight is on {param.device}")
        problem = step_problem(options)
        if problem is not None:
            return problem
        is_single = param.dtype == torch.float32 and weight.grad is not None and weight.grad.dtype == torch.float32
        table = table_of(manifold, param) if is_single else None
        if table is None:
            taken = "spheres and oblique manifolds in float32, with at least four numbers per vector"
            return Refusal(Reason.COMPONENTS, f"fused steps for vectors take {taken}")
        taken = tuple(part for part in parts if part not in table.other_parts)
        return taken if library() is not None else Refusal(Reason.MISSING, NOT_BUILT)

    def batch(self, claims: Sequence[Claim]) -> Batch:
        """One call per sweep for all weights."""
        return LineBatch(claims)


class _Lines(ctypes.Structure):
    """``fgo_lines`` of lines.cpp: the lines of one weight."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("weight", "grad", "buffer", "groups", "radii")),
        *((name, ctypes.c_void_p) for name in ("products", "coefficients", "squared_norms", "scales")),
        *((name, ctypes.c_void_p) for name in (*_BLOCK_TENSORS, "points", "momenta")),
        ("radius", ctypes.c_double),
        *((name, ctypes.c_int64) for name in ("lines", "length", "width", "shared")),
        ("first", ctypes.c_int32),
    )


class LineBatch(Batch):
    """The weights as the extension takes them. Between steps only addresses change.

    Args:
        claims: What the path does of each weight.
        norms: Memory for ``R²`` of all groups, float64.
        scales: Memory for ``1/τ`` of all groups, float32.

    Attributes:
        entries: The weights for the extension, in their order.
        work: The size of all weights, for the number of threads.
    """

    def __init__(self, claims: Sequence[Claim], norms: Tensor | None = None, scales: Tensor | None = None) -> None:
        super().__init__(claims)
        tables = [cast(LineTable, table_of(cast(ProductOfGroups, w.manifold), w.param)) for w in self.weights]
        self._tables = tables  # the extension reads their memory
        lines = sum(table.lines for table in tables)
        self._norms = torch.empty(sum(self.counts), dtype=torch.float64) if norms is None else norms
        self._scales = torch.empty(sum(self.counts), dtype=torch.float32) if scales is None else scales
        self._products = torch.empty(_PRODUCTS * lines, dtype=torch.float64)
        self._coefficients = torch.empty(_COEFFICIENTS * lines, dtype=torch.float32)
        self.entries = (_Lines * len(tables))()
        self.work = sum(weight.param.numel() for weight in self.weights)
        self._passed: list[dict[str, tuple[list[int], np.ndarray]]] = []  # per weight: addresses of the latest step
        first_groups = itertools.accumulate(self.counts, initial=0)
        first_lines = itertools.accumulate((table.lines for table in tables), initial=0)
        for entry, table, group, line in zip(self.entries, tables, first_groups, first_lines, strict=False):
            entry.groups = None if table.group_of is None else table.group_of.data_ptr()
            entry.radii = None if table.radii is None else table.radii.data_ptr()
            entry.radius = table.radius
            entry.products = self._products.data_ptr() + _PRODUCTS * line * self._products.itemsize
            entry.coefficients = self._coefficients.data_ptr() + _COEFFICIENTS * line * self._coefficients.itemsize
            entry.squared_norms = self._norms.data_ptr() + group * self._norms.itemsize
            entry.scales = self._scales.data_ptr() + group * self._scales.itemsize
            entry.lines, entry.length, entry.width = table.lines, table.length, table.width
            self._passed.append({})
            if table.blocks is not None:
                for name in _BLOCK_TENSORS:
                    setattr(entry, name, getattr(table.blocks, name).data_ptr())
                entry.shared = table.blocks.shared

    def measure(self, options: StepOptions) -> Tensor:
        """``R²`` of all groups; the next step reuses the memory of the result."""
        self.set_addresses()
        self._norms.zero_()
        self.run("fgo_line_norms", options)
        return self._norms

    def set_addresses(self) -> None:
        """Tell the extension where the numbers of this step are."""
        for weight, entry in zip(self.weights, self.entries, strict=True):
            entry.weight = weight.param.data_ptr()
            entry.grad = gradient_of(weight).data_ptr()
            entry.buffer = None if weight.buffer is None else weight.buffer.data_ptr()
            entry.first = weight.first

    def move(self, options: StepOptions, scale: Tensor | None, leaves_out: bool) -> None:
        """The step of all weights in place, and the blocks that other paths have staged."""
        self._scales.fill_(1) if scale is None else self._scales.copy_(scale)
        for weight, entry in zip(self.weights, self.entries, strict=True):
            entry.buffer = None if weight.buffer is None else weight.buffer.data_ptr()  # a new one in the first step
        memory = self.take_staged()
        torch.autograd.graph.increment_version([weight.param for weight in self.weights])
        self.run("fgo_line_update", options)
        del memory

    def take_staged(self) -> list[list[Tensor]]:
        """Tell the extension where the blocks are that other paths have staged; the result holds their memory."""
        every = zip(self.weights, self._tables, self.entries, self._passed, strict=True)
        memory = [self._pass_other_blocks(*own) for own in every if own[1].other_parts]
        for weight in self.weights:
            weight.staged.clear()
        return memory

    def _pass_other_blocks(
        self, weight: Weight, table: LineTable, entry: _Lines, passed: dict[str, tuple[list[int], np.ndarray]]
    ) -> list[Tensor]:
        """Tell the extension where the staged blocks of a weight are; the result holds their memory."""
        held: list[Tensor] = []
        cut = cast(BlockPartition, cast(ProductOfGroups, weight.manifold).partition)
        for name, which in (("points", 0), ("momenta", 1)):
            values: list[Tensor] = []
            for part in table.other_parts:
                value = weight.staged[part][which]
                if value is not None:
                    rows, columns = cut.rectangles(part)
                    values.append((value.mT if rows.shape[1] < columns.shape[1] else value).contiguous())
            places = [value.data_ptr() for value in values]
            if values and (name not in passed or passed[name][0] != places):
                addresses = [
                    place + np.arange(len(own)) * (own[0].numel() * own.itemsize)
                    for place, own in zip(places, values, strict=True)
                ]
                passed[name] = places, np.concatenate(addresses)
                setattr(entry, name, passed[name][1].ctypes.data)
            held += values
        return held

    def run(self, name: str, options: StepOptions, which: slice = slice(None)) -> None:
        """Call a function of the extension for all weights, or for some."""
        numbers = MatrixOptions.of(options)
        with torch.profiler.record_function(name):
            threads = ctypes.c_int(threads_for(self.work))
            first, stop, _ = which.indices(len(self.weights))
            place = ctypes.byref(self.entries, first * ctypes.sizeof(_Lines))
            getattr(library(), name)(place, ctypes.c_int64(stop - first), ctypes.byref(numbers), threads)
