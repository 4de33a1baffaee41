"""The fused path on the GPU: Triton sweeps, each one launch over all parameters with components of one size.

A launch reads a table on the device with one row per parameter: addresses, strides, and the number of its first block
of kernels. The table of a step is copied from pinned memory asynchronously and kept: while addresses and options stay
the same, a step copies nothing. Nothing waits for the device, and a learning rate that is stored there is read there. A
step can be captured in a CUDA graph after one uncaptured step, which compiles the sweeps and builds the tables of
kernels; in a graph, addresses are arguments of the launches, so replays use the same ones. A graph keeps the radii of
its capture.

Memory traffic of a 3 x 3 kernel in single precision: *norms* reads weight, gradient, code and position (80 bytes) and
writes the squared norm, which is then read and summed (16 bytes); *update* reads weight, gradient, momentum and code
and writes weight and momentum (184 bytes).
An ``A x B`` component takes ``4 A B²`` operations for a projection, ``A B (B + 1)`` for the Gram matrix,
``2 B² (B + 1)`` for the series and ``2 A B²`` for the product. With momentum these are about 500 operations for 3 x 3,
less than two per byte, so memory bandwidth limits the step. Components whose step was too long for the series are
retracted by another launch, in double precision, which otherwise reads one flag per block.

Triton compiles the sweeps on their first run, which takes long for large components, and caches them on disk.

Sums over groups do not depend on timing: squared norms are stored in the order of the groups, and every group is summed
in that order in double precision, first within pieces of equal size and then over the pieces. The same step gives
identical bits.
"""

from __future__ import annotations

import functools
import math
import os
import struct
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fgo_geo.paths.kernel_tables import KernelTable, gradient_of, place_of, problem_of, table_of
from fgo_geo.paths.protocol import Batch, Claim, Path, Reason, Refusal, StepOptions, Weight

__all__ = ["TritonKernels", "problem_with_triton"]

_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton's interpreter runs on the CPU
_OLDEST = (3, 3)  # earlier versions of Triton have no tuples
_LARGEST = 49  # entries of a component: more do not fit the registers of a thread
_BLOCK = 128  # kernels per program, one per thread
_SERIES_LIMIT = {torch.float32: 1.7e-3, torch.float64: 9.4e-7}  # of ‖E‖²: precision^(2/5), as for four terms
_PIECE = 1024  # of the sum over a group
_WIDTH = 16  # numbers per row of a table
_MOST_COPIES = 8  # tables on the device that a batch keeps


@functools.cache
def _sweeps() -> ModuleType:
    """The sweeps, imported on first use because importing Triton is slow."""
    from fgo_geo.paths.triton import _sweeps as module

    return module


@functools.cache
def _missing(device: torch.device) -> str | None:
    """Why Triton cannot be used on a device; None if it can. Compiles and runs a small function once."""
    return problem_with_triton(_sweeps().triton, lambda: _written([range(_WIDTH)], device))


def problem_with_triton(triton: Any, try_out: Callable[[], object]) -> str | None:
    """Why Triton cannot be used; None if it can.

    Args:
        triton: The module; None if it is not installed.
        try_out: Compiles and runs a function.
    """
    if triton is None:
        return "Triton is not installed; it comes with torch for CUDA on Linux"
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < _OLDEST:
        return f"Triton {triton.__version__} is installed, at least {'.'.join(map(str, _OLDEST))} is needed"
    try:
        try_out()
    except (RuntimeError, OSError, subprocess.CalledProcessError, triton.TritonError) as error:
        return f"Triton does not work here: {error}"  # without a C compiler, on an old device
    return None


class TritonKernels(Path):
    """The path of kernels in single and double precision on the current CUDA device.

    Args:
        interpreted: Whether Triton's interpreter runs the sweeps, which it does on the CPU.
    """

    name = "Triton sweeps over kernels"

    def __init__(self, interpreted: bool = _INTERPRETED) -> None:
        self._interpreted = interpreted

    def accepts(self, weight: Weight, parts: tuple[int, ...], options: StepOptions) -> tuple[int, ...] | Refusal:
        """All parts of a weight of kernels, or none."""
        device = weight.param.device
        if device.type != ("cpu" if self._interpreted else "cuda"):
            runs_on = "the CPU in Triton's interpreter" if self._interpreted else "CUDA devices"
            return Refusal(Reason.DEVICE, f"the Triton sweeps run on {runs_on}, the weight is on {device}")
        if weight.param.is_cuda and device.index != torch.cuda.current_device():
            current = torch.cuda.current_device()
            return Refusal(Reason.DEVICE, f"the weight is on {device}, the current device is cuda:{current}")
        problem = problem_of(weight, options)
        if problem is not None:
            return problem
        a, b = table_of(weight).size
        if a * b > _LARGEST:
            return Refusal(Reason.SIZE, f"components of {a} x {b} are larger than {_LARGEST} entries")
        missing = _missing(device)
        return parts if missing is None else Refusal(Reason.MISSING, missing)

    def batch(self, claims: Sequence[Claim]) -> Batch:
        """One launch per sweep and component size for all weights."""
        return _LaunchBatch(claims)


class _LaunchBatch(Batch):
    def __init__(self, claims: Sequence[Claim]) -> None:
        super().__init__(claims)
        self._tables = [table_of(weight) for weight in self.weights]
        self._segments = _segments(self._tables)
        self._squares = [_inverse_squares(table) for table in self._tables]
        self._copies: dict[object, Tensor] = {}  # tables on the device, by their contents and stream

    def measure(self, options: StepOptions) -> Tensor:
        """``R²`` of all groups."""
        squares = torch.empty(self._segments.kernels, dtype=torch.float64, device=self.device)
        for launch in self._launches(options):
            launch("norms", squares, MAXIMIZE=options.maximize, INVARIANT=options.radius_invariant)
        for bounds in self._segments.bounds:
            squares = _sums(squares, bounds)
        return squares

    def move(self, options: StepOptions, scale: Tensor | None, leaves_out: bool) -> None:
        """The step of all weights, in place; the sweeps always compare scales with zero, which costs nothing."""
        groups = sum(self.counts)
        scale = torch.ones(groups, dtype=torch.float64, device=self.device) if scale is None else scale
        rate = _rate_on(self.device, options)
        torch.autograd.graph.increment_version([weight.param for weight in self.weights])
        for launch in self._launches(options):
            long_steps = torch.empty(launch.grid, dtype=torch.int32, device=self.device)
            launch(
                "update",
                scale,
                scale if rate is None else rate,
                long_steps,
                MAXIMIZE=options.maximize,
                INVARIANT=options.radius_invariant,
                MOMENTUM=launch.momentum,
                NESTEROV=launch.momentum and options.nesterov,
                RATE=rate is not None,
                LIMIT=_SERIES_LIMIT[launch.dtype],
            )
            launch("retract_long_steps", long_steps)

    def _launches(self, options: StepOptions) -> Iterator[_Launch]:
        """One launch per component size, type and order in memory."""
        classes: dict[tuple[Any, ...], list[tuple[int, ...]]] = {}
        for number, (weight, table) in enumerate(zip(self.weights, self._tables, strict=True)):
            row, planar = self._row(number)
            key = (weight.param.dtype, *table.size, planar, weight.buffer is not None)
            rows = classes.setdefault(key, [])
            tiles = rows[-1][-1] if rows else 0
            rows.append((*row, tiles + math.ceil(row[8] / _BLOCK)))
        tl = _sweeps().tl
        lr = float(options.lr) if _rate_on(self.device, options) is None else 0.0
        numbers = (lr, options.momentum, options.dampening, options.weight_decay)
        header = tuple(map(_bits, numbers)) + (0,) * (_WIDTH - 4)
        for (dtype, a, b, planar, momentum), ends in classes.items():
            grid = ends[-1][-1]
            count = 1 << (len(ends) - 1).bit_length()
            rows = [(*row[:-1], first) for row, first in zip(ends, [0] + [row[-1] for row in ends], strict=False)]
            rows += [(0,) * (_WIDTH - 1) + (grid,)] * (count - len(ends))
            yield _Launch(
                table=self._table((header, *rows)),
                grid=grid,
                constants={
                    "DTYPE": tl.float32 if dtype == torch.float32 else tl.float64,
                    "A": a,
                    "B": b,
                    "N": _BLOCK,
                    "LEVELS": (a * b - 1).bit_length(),
                    "PLANAR": planar,
                    "TASKS": count,
                },
                dtype=dtype,
                momentum=momentum,
            )

    def _row(self, number: int) -> tuple[tuple[int, ...], bool]:
        """The weight's row without its last entry, and whether the kernel number runs fastest in memory."""
        weight, table, segments = self.weights[number], self._tables[number], self._segments
        place = place_of(weight, table)
        assert place is not None
        row = (
            weight.param.data_ptr(),
            gradient_of(weight).data_ptr(),
            0 if weight.buffer is None else weight.buffer.data_ptr(),
            table.codes.data_ptr(),
            self._squares[number].data_ptr(),
            segments.positions[number].data_ptr(),
            segments.first_group[number],
            segments.first_kernel[number],
            place.rows * place.columns,
            place.columns,
            place.row_stride,
            place.column_stride,
            place.i_stride,
            place.j_stride,
            int(weight.first) + 2 * int(table.radii is not None),
        )
        return row, place.column_stride == 1

    def _table(self, rows: tuple[Sequence[int], ...]) -> Tensor:
        """A table on the device; it is copied asynchronously, and kept for later steps on the same stream."""
        stream: int | None = None
        if self.device.type != "cpu":
            if torch.cuda.is_current_stream_capturing():
                return _written(rows, self.device)
            stream = torch.cuda.current_stream(self.device).cuda_stream
        key = rows, stream
        if key not in self._copies:
            if len(self._copies) == _MOST_COPIES:
                self._copies.pop(next(iter(self._copies)))
            table = torch.tensor(rows, dtype=torch.int64)
            self._copies[key] = table if stream is None else table.pin_memory().to(self.device, non_blocking=True)
        return self._copies[key]


# -- constant from step to step --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Segments:
    """How the kernels of some parameters are sorted and summed by group.

    Attributes:
        kernels: Number of kernels of all parameters.
        first_kernel: Kernels before every parameter.
        first_group: Groups before every parameter.
        positions: Places of the kernels of every parameter when they are sorted by group.
        bounds: The sums to take in turn: entry k of a result is the sum from bound k to bound k + 1.
    """

    kernels: int
    first_kernel: list[int]
    first_group: list[int]
    positions: list[Tensor]
    bounds: list[Tensor]


def _segments(tables: Sequence[KernelTable]) -> _Segments:
    groups = [(table.codes >> 2).flatten().cpu() for table in tables]
    positions: list[Tensor] = []
    for table, numbers in zip(tables, groups, strict=True):
        position = torch.empty_like(numbers)
        position[numbers.sort(stable=True).indices] = torch.arange(len(numbers), dtype=position.dtype)
        positions.append(position.to(table.codes.device))
    counts = [n.bincount(minlength=table.groups) for table, n in zip(tables, groups, strict=True)]
    kernels_of_group = torch.cat(counts)
    starts = _running(kernels_of_group)
    pieces = (kernels_of_group + _PIECE - 1) // _PIECE
    piece_starts = _running(pieces)
    bounds = [starts]
    if int(pieces.max()) > 1:
        group = torch.repeat_interleave(torch.arange(len(pieces)), pieces)
        number = torch.arange(len(group)) - piece_starts[group]
        bounds = [torch.cat([starts[group] + _PIECE * number, starts[-1:]]), piece_starts]
    device = tables[0].codes.device
    return _Segments(
        kernels=int(starts[-1]),
        first_kernel=_running(torch.tensor([len(n) for n in groups])).tolist(),
        first_group=_running(torch.tensor([table.groups for table in tables])).tolist(),
        positions=positions,
        bounds=[b.to(device) for b in bounds],
    )


def _running(counts: Tensor) -> Tensor:
    """For every entry the sum of the entries before it, and then the total."""
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def _inverse_squares(table: KernelTable) -> Tensor:
    """``1 / r²`` per kind, or per kernel where the radius differs within a kind, float64."""
    if table.radii is not None:
        return table.radii.double() ** -2
    return torch.tensor(table.radius, dtype=torch.float64, device=table.codes.device) ** -2


def _rate_on(device: torch.device, options: StepOptions) -> Tensor | None:
    """The learning rate, if it is stored on the device."""
    return options.lr if isinstance(options.lr, Tensor) and options.lr.device == device else None


# -- launches ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Launch:
    """Sweeps over parameters that run the same instructions.

    Attributes:
        table: Options and tasks, see ``_sweeps.py``.
        grid: Number of programs.
        constants: The constants for which the sweeps are compiled.
        dtype: Type of the parameters.
        momentum: Whether there is momentum.
    """

    table: Tensor
    grid: int
    constants: dict[str, Any]
    dtype: torch.dtype
    momentum: bool

    def __call__(self, name: str, *arguments: Any, **constants: Any) -> None:
        getattr(_sweeps(), name)[(self.grid,)](
            self.table, *arguments, **self.constants, **constants, num_warps=_BLOCK // 32, enable_fp_fusion=True
        )


def _bits(number: float) -> int:
    return struct.unpack("<q", struct.pack("<d", number))[0]


def _written(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """A table that launches write, because a graph that is being captured may outlive all copies."""
    table = torch.empty(len(rows), _WIDTH, dtype=torch.int64, device=device)
    flat = [number for row in rows for number in row]
    for place in range(0, len(flat), 8):
        _sweeps().write[(1,)](table, place, *flat[place : place + 8], num_warps=1, enable_fp_fusion=True)
    return table


def _sums(values: Tensor, bounds: Tensor) -> Tensor:
    """Sum of the values between every bound and the next."""
    segments = len(bounds) - 1
    sums = values.new_empty(segments)
    rows, columns = 4, 128
    grid = (math.ceil(segments / rows),)
    _sweeps().segment_sums[grid](
        values, bounds, sums, segments, ROWS=rows, COLUMNS=columns, num_warps=_BLOCK // 32, enable_fp_fusion=True
    )
    return sums
