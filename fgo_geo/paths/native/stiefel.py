"""The compiled path of Stiefel matrices and blocks: float32 weights on the CPU, under the polar retraction.

The step of a block is five products of matrices, and a polynomial in a small one (``stiefel.cpp``). The compiled code
cuts every block out of its weight, keeps it in the cache from the first product to the last, and computes new points
and momentum in memory of the batch; the weight is written afterwards, in one call. Blocks that began off the manifold
are projected by a factorisation in between.
"""

from __future__ import annotations

import ctypes
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fgo_geo.linalg import polar_factor
from fgo_geo.manifolds import ProductOfGroups, Stiefel
from fgo_geo.paths.kept import kept
from fgo_geo.paths.kernel_tables import gradient_of, step_problem
from fgo_geo.paths.native.blocks import Block, MatrixOptions, matrix_of, put
from fgo_geo.paths.native.kernels import BoundedBatch
from fgo_geo.paths.native.library import NOT_BUILT, library, threads_for
from fgo_geo.paths.protocol import Batch, Claim, Path, Reason, Refusal, StepOptions, Weight
from fgo_geo.weights.components import RectanglePartition

__all__ = ["NativeStiefel", "StiefelBatch"]

_FEWEST_COLUMNS = 4  # of a matrix; the batched torch code is as fast on narrower ones

# Beyond, oneDNN gains more by shared products than it loses by passes over memory. Time of a step over that of the
# other paths, on one core of a Zen 5 processor:
#
#     64 x 16   128 x 64   512 x 128   1152 x 128   256 x 256   512 x 256   1024 x 512   2304 x 256   4608 x 512
#      0.49       0.49        0.43        0.68         0.41        0.71        0.94         1.09         1.16
_MOST_ENTRIES = 2**18
_WORK = 8  # products of numbers that take as long as one entry of an elementwise step


class NativeStiefel(Path):
    """The path of float32 Stiefel matrices on the CPU."""

    name = "compiled products"

    def accepts(self, weight: Weight, parts: tuple[int, ...], options: StepOptions) -> tuple[int, ...] | Refusal:
        """The parts that are Stiefel matrices."""
        param, grad = weight.param, weight.grad
        if param.device.type != "cpu":
            return Refusal(Reason.DEVICE, f"the compiled products run on the CPU, the weight is on {param.device}")
        problem = step_problem(options)
        if problem is not None:
            return problem
        is_single = param.dtype == torch.float32 and grad is not None and grad.dtype == torch.float32
        tables = tables_of(weight) if is_single else {}
        taken = tuple(part for part in parts if part in tables)
        if not taken:
            matrices = (
                f"float32 Stiefel matrices of {_FEWEST_COLUMNS} columns or more, and {_MOST_ENTRIES:,} numbers or fewer"
            )
            return Refusal(Reason.COMPONENTS, f"compiled products take {matrices}")
        return taken if library() is not None else Refusal(Reason.MISSING, NOT_BUILT)

    def batch(self, claims: Sequence[Claim]) -> Batch:
        """One call per sweep for all weights."""
        return StiefelBatch(claims)


@dataclass(frozen=True, eq=False)
class StiefelTable:
    """Equal blocks of a weight: ``n`` of ``a`` rows and ``b`` columns of its matrix.

    Attributes:
        rows: Rows of every block, int32, shape ``(n, a)``.
        columns: Columns of every block, int32, shape ``(n, b)``.
        groups: Group of every block, int32.
        radii: Radius of every block, float64.
        width: Number of columns of the matrix.
    """

    rows: Tensor
    columns: Tensor
    groups: Tensor
    radii: Tensor
    width: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(n, a, b)``."""
        return (*self.rows.shape, self.columns.shape[1])  # pyright: ignore[reportReturnType]


def tables_of(weight: Weight) -> dict[int, StiefelTable]:
    """The tables of the parts that the path takes, kept until a radius changes."""
    manifold, param = weight.manifold, weight.param
    if not isinstance(manifold, (ProductOfGroups, Stiefel)):
        return {}
    return kept(manifold, ("Stiefel", param.shape, param.stride()), lambda: _build(manifold, param.detach()))


def _build(manifold: ProductOfGroups | Stiefel, weight: Tensor) -> dict[int, StiefelTable]:
    if isinstance(manifold, Stiefel):
        stored = weight if weight.is_contiguous() else weight.mT
        a, b = stored.shape[-2:]
        if not _is_taken(manifold, (a, b)) or not stored.is_contiguous():
            return {}
        n = math.prod(weight.shape[:-2])
        rows = torch.arange(n * a, dtype=torch.int32).reshape(n, a)
        columns = torch.arange(b, dtype=torch.int32).expand(n, b).contiguous()
        radii = _radii(manifold, weight.shape[:-2])
        return {0: StiefelTable(rows, columns, torch.zeros(n, dtype=torch.int32), radii, b)}
    cut = manifold.partition
    matrix = matrix_of(weight, cut) if isinstance(cut, RectanglePartition) else None
    if matrix is None or not isinstance(cut, RectanglePartition):
        return {}
    tables: dict[int, StiefelTable] = {}
    for part, (own, segments) in enumerate(manifold.parts):
        if isinstance(own, Stiefel) and _is_taken(own, cut.sizes[part]):
            groups = segments.spread(torch.from_numpy(cut.groups[part].astype(np.int32)))
            radii = _radii(own, groups.shape)
            tables[part] = StiefelTable(*cut.rectangles(part), groups.contiguous(), radii, matrix.shape[1])
    return tables


def _is_taken(manifold: Stiefel, size: tuple[int, int]) -> bool:
    return (
        type(manifold) is Stiefel
        and manifold.retraction == "polar"
        and min(size) >= _FEWEST_COLUMNS
        and math.prod(size) <= _MOST_ENTRIES
    )


def _radii(manifold: Stiefel, batch: Sequence[int]) -> Tensor:
    radius = torch.as_tensor(manifold.radius, dtype=torch.float64).detach().cpu()
    return radius.expand(torch.Size(batch)).flatten().contiguous()


class _Stiefel(ctypes.Structure):
    """``fgo_stiefel`` of stiefel.cpp: equal blocks of one weight."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("weight", "grad", "buffer", "rows", "columns", "groups", "radii")),
        *((name, ctypes.c_void_p) for name in ("squares", "squared_norms", "scales", "points", "momenta", "failed")),
        *((name, ctypes.c_int64) for name in ("n", "a", "b", "width")),
    )


@dataclass(frozen=True, eq=False)
class _EqualBlocks:
    """Equal blocks of one weight, the memory of their results, and how the extension takes them."""

    claim: Claim
    part: int
    table: StiefelTable
    points: Tensor
    momenta: Tensor
    failed: Tensor
    entry: _Stiefel

    def results(self) -> tuple[Tensor, Tensor]:
        """Points and momentum as tall matrices."""
        _, a, b = self.table.shape
        return (self.points.mT, self.momenta.mT) if a < b else (self.points, self.momenta)


class StiefelBatch(BoundedBatch):
    """The weights as the extension takes them. Between steps only addresses change.

    Args:
        claims: What the path does of each weight.
        norms: Memory for ``R²`` of all groups, float64.
        scales: Memory for ``1/τ`` of all groups, float32.

    Attributes:
        entries: The blocks for the extension, weight by weight.
        work: The size of all blocks, for the number of threads.
    """

    def __init__(self, claims: Sequence[Claim], norms: Tensor | None = None, scales: Tensor | None = None) -> None:
        super().__init__(claims)
        self.stages = not all(claim.is_whole for claim in claims)
        self.norms = self.norms if norms is None else norms
        self._scales = torch.empty(sum(self.counts), dtype=torch.float32) if scales is None else scales
        tables = [tables_of(claim.weight) for claim in claims]
        count = sum(len(claim.parts) for claim in claims)
        self.entries = (_Stiefel * count)()
        self._blocks: list[_EqualBlocks] = []
        self.work = 0
        first_groups = itertools.accumulate(self.counts, initial=0)
        for claim, own, group in zip(claims, tables, first_groups, strict=False):
            for part in claim.parts:
                self._add(claim, part, own[part], group)
        blocks = sum(len(own.failed) for own in self._blocks)
        self._squares = torch.empty(blocks, dtype=torch.float64)
        first = 0
        for own in self._blocks:
            own.entry.squares = self._squares.data_ptr() + first * self._squares.itemsize
            first += len(own.failed)

    def _add(self, claim: Claim, part: int, table: StiefelTable, group: int) -> None:
        n, a, b = table.shape
        entry = self.entries[len(self._blocks)]
        points, momenta, failed = torch.empty(n, a, b), torch.empty(n, a, b), torch.empty(n, dtype=torch.int32)
        self._blocks.append(_EqualBlocks(claim, part, table, points, momenta, failed, entry))
        for name in ("rows", "columns", "groups", "radii"):
            setattr(entry, name, getattr(table, name).data_ptr())
        entry.points, entry.momenta, entry.failed = (own.data_ptr() for own in (points, momenta, failed))
        entry.squared_norms = self.norms.data_ptr() + group * self.norms.itemsize
        entry.scales = self._scales.data_ptr() + group * self._scales.itemsize
        entry.n, entry.a, entry.b, entry.width = n, a, b, table.width
        self.work += n * a * b * min(a, b) // _WORK

    def measure(self, options: StepOptions) -> Tensor:
        """``R²`` of all groups; the next step reuses the memory of the result."""
        self._measure("fgo_stiefel_norms", options)
        return self.norms

    def bound(self, options: StepOptions) -> int:
        """How many groups may have a ``τ`` above one."""
        return self._measure("fgo_stiefel_bounds", options)

    def _measure(self, name: str, options: StepOptions) -> int:
        self.set_addresses()
        self.norms.zero_()
        return self._run(name, options)

    def move(self, options: StepOptions, scale: Tensor | None, leaves_out: bool) -> None:
        """Compute new points and momentum, and write the weights that this batch has whole."""
        self._scales.fill_(1) if scale is None else self._scales.copy_(scale)
        self.set_addresses()
        failed = self._run("fgo_stiefel_move", options)
        self.leaves_finite = failed == 0 and not leaves_out
        if failed:
            self.factorise()
        blocks: list[Block] = []
        for own in self._blocks:
            weight = own.claim.weight
            if own.claim.is_whole:
                blocks += _blocks_of(own)
            else:
                points, momenta = own.results()
                weight.stage(own.part, points, None if weight.buffer is None else momenta)
        put([claim.weight for claim in self.claims if claim.is_whole], blocks)

    def stage(self) -> None:
        """Show where new points and momentum will be, before there are any."""
        for own in self._blocks:
            own.claim.weight.stage(own.part, *own.results())

    def factorise(self, weight: Weight | None = None) -> None:
        """Retract the blocks of all weights, or of one, that began off the manifold."""
        for own in self._blocks:
            if weight is None or own.claim.weight is weight:
                _factorise(own)

    def set_addresses(self) -> None:
        """Tell the extension where the numbers of this step are."""
        for own in self._blocks:
            weight, entry = own.claim.weight, own.entry
            entry.weight, entry.grad = weight.param.data_ptr(), gradient_of(weight).data_ptr()
            buffer = weight.buffer
            entry.buffer = None if buffer is None or weight.first else buffer.data_ptr()

    def _run(self, name: str, options: StepOptions) -> int:
        with torch.profiler.record_function(name):
            numbers, threads = MatrixOptions.of(options), ctypes.c_int(threads_for(self.work))
            count = ctypes.c_int64(len(self._blocks))
            return getattr(library(), name)(self.entries, count, ctypes.byref(numbers), threads)


def _factorise(own: _EqualBlocks) -> None:
    """Retract the blocks that began off the manifold; ``points`` holds ``x + u`` of these. NaN stays NaN."""
    points, _ = own.results()
    failed = (own.failed.bool() & points.isfinite().all((-2, -1))).nonzero().squeeze(1)
    if len(failed):
        radii = own.table.radii[failed].float()[:, None, None]
        points[failed] = radii * polar_factor(points[failed])


def _blocks_of(own: _EqualBlocks) -> list[Block]:
    """Where the results go."""
    weight, table = own.claim.weight, own.table
    pairs = [(weight.param, own.points)]
    if weight.buffer is not None:
        pairs.append((weight.buffer, own.momenta))
    return [
        Block(
            target.data_ptr(),
            table.width,
            table.rows.data_ptr(),
            table.columns.data_ptr(),
            *table.shape,
            values.data_ptr(),
        )
        for target, values in pairs
    ]
