"""The fused path on the CPU: a compiled extension, called on memory addresses.

``fused.cpp`` is built when the package is installed, where there is a C++ compiler, and knows neither Python nor torch.
Without it everything works, by the batched torch code.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import math
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from fgo_geo.paths.task import LARGEST, Batch, KernelTable, StepOptions, Task, gradient_of, place_of, problem_of

__all__ = [
    "NOT_BUILT",
    "description",
    "goes_by_rows",
    "gradients_are_moderate",
    "reason",
    "squared_norms",
    "step_by_rows",
    "threads_for",
    "update",
]

NOT_BUILT = "fgo_geo was installed without a C++ compiler; install it again where there is one for faster steps"

_ABI = 7  # of fused.cpp and lines.cpp; a file built from another version is left alone
_FUNCTIONS = ("fgo_limit", "fgo_norms", "fgo_update", "fgo_large", "fgo_step")
_FUNCTIONS += ("fgo_line_norms", "fgo_line_update", "fgo_take", "fgo_put", "fgo_direct")
_INSTRUCTION_SETS = ("portable", "AVX2", "AVX-512")
_PER_THREAD = 2**16  # entries below which another thread costs more than it saves


class _Task(ctypes.Structure):
    """``fgo_task`` of fused.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("weight", "grad", "buffer", "codes", "row_groups", "radii")),
        *((name, ctypes.c_void_p) for name in ("squared_norms", "scales", "curvature", "taus")),
        ("radius", ctypes.c_double * 4),
        *((name, ctypes.c_int64) for name in ("rows", "columns", "row_stride", "column_stride")),
        *((name, ctypes.c_int32) for name in ("a", "b", "i_stride", "j_stride", "first", "skips")),
        ("groups", ctypes.c_int64),
    )


class _Options(ctypes.Structure):
    """``fgo_options`` of fused.cpp."""

    _fields_ = (
        *((name, ctypes.c_double) for name in ("lr", "momentum", "dampening", "weight_decay", "rho", "curvature")),
        *((name, ctypes.c_int32) for name in ("nesterov", "maximize", "radius_invariant", "constant")),
    )


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled extension, or None if it was not built."""
    folder = Path(__file__).parent
    for path in folder.glob("libfgo_geo.*"):
        try:
            loaded = ctypes.CDLL(str(path))
        except OSError:  # built for another machine
            continue
        if all(hasattr(loaded, name) for name in ("fgo_abi", *_FUNCTIONS)) and loaded.fgo_abi() == _ABI:
            for name in _FUNCTIONS:
                getattr(loaded, name).restype = ctypes.c_int64
            return loaded
    return None


def _instruction_set(limit: int = -1) -> int:
    """Number of the instruction set in use: the best that the processor has, up to a limit if one is given."""
    loaded = library()
    assert loaded is not None
    return loaded.fgo_limit(ctypes.c_int(limit))


def description() -> str:
    """What the path is, where it is there."""
    return f"compiled sweeps on the CPU ({_INSTRUCTION_SETS[_instruction_set()]})"


def threads_for(work: int) -> int:
    """Number of threads for so many entries."""
    return max(1, min(torch.get_num_threads(), work // _PER_THREAD))


def reason(task: Task[KernelTable]) -> str | None:
    """Why the path cannot take a parameter, None if it can.

    Args:
        task: The parameter with its gradient.

    Returns:
        A reason, or None.
    """
    weight = task.weight
    if weight.device.type != "cpu":
        return f"the compiled sweeps run on the CPU, the weight is on {weight.device}"
    if task.table.size[0] > LARGEST[0] or task.table.size[1] > LARGEST[1]:  # which is what fused.cpp has room for
        return f"components of {task.table.size} are larger than {LARGEST}"
    return problem_of(task) or (NOT_BUILT if library() is None else None)


def squared_norms(batch: Batch) -> Tensor:
    """Squared norms of the Riemannian gradients of all groups, one behind the other, in float64.

    The memory of the result is used again in the next step of the batch.
    """
    table = _begun(batch)
    table.norms.zero_()
    table.run("fgo_norms")
    return table.norms


def update(batch: Batch, scales: Tensor, skips: bool) -> None:
    """Take the step of all tasks, given ``1 / τ`` of all groups; ``skips`` says that some are zero.

    Addresses and options are those that :func:`squared_norms` was given, if it was called for this batch.
    """
    table = _begun(batch) if batch.prepared is None else cast(_Table, batch.prepared)
    for own in table.scales.values():
        own.copy_(scales)
    table.set_skips(skips)
    table.run("fgo_update")


def goes_by_rows(task: Task[KernelTable]) -> bool:
    """Whether :func:`step_by_rows` takes a parameter: no group has kernels of two rows, and it gains by it.

    Where kernels are stored one behind the other (contiguous weights) two sweeps are as fast: to read what is in the
    cache costs them less than to turn it over twice.
    """
    side_by_side = task.weight.stride(1) == 1
    return side_by_side and task.table.rows_apart and min(task.weight.shape[:2]) > 1  # others are stored as one row


def gradients_are_moderate(batch: Batch) -> bool:
    """Whether gradients show by themselves that the norms of all groups are finite, for a batch that goes by rows.

    They are read once, and nothing is changed. Where they are too large for that, :func:`squared_norms` knows.
    """
    return _begun(batch).run("fgo_large") == 0


def step_by_rows(batch: Batch) -> tuple[Tensor, int]:
    """Take the step of all tasks in one sweep: norms, step sizes and update of a row while it is in the cache.

    Args:
        batch: Tasks for which :func:`goes_by_rows`.

    Returns:
        ``τ`` of all groups in float64, and how many groups were left out because their norm is not finite.
    """
    table = _begun(batch)
    return table.set_taus(batch), table.run("fgo_step")


class _Table:
    """The tasks of a batch as the extension wants them, by type. In the next step only addresses are different."""

    def __init__(self, batch: Batch) -> None:
        groups = sum(batch.counts)
        first_groups = list(itertools.accumulate(batch.counts, initial=0))[:-1]
        types = {task.weight.dtype for task in batch.tasks}
        self.norms = torch.empty(groups, dtype=torch.float64)
        self.scales = {dtype: torch.empty(groups, dtype=dtype) for dtype in types}
        self.rows: list[tuple[Task[KernelTable], _Task, int]] = []  # with the number of the first group
        self.calls: list[tuple[ctypes.Array[_Task], int, int]] = []  # entries, their number of weights, whether double
        self.options = _Options()
        self.skips = False
        for dtype in types:
            members = [
                (task, first)
                for task, first in zip(batch.tasks, first_groups, strict=True)
                if task.weight.dtype == dtype
            ]
            entries = (_Task * len(members))(*(_entry(task) for task, _ in members))
            for entry, (task, first) in zip(entries, members, strict=True):
                entry.squared_norms = self.norms.data_ptr() + first * self.norms.itemsize
                entry.scales = self.scales[dtype].data_ptr() + first * dtype.itemsize
                self.rows.append((task, entry, first))
            work = sum(task.weight.numel() for task, _ in members)
            self.calls.append((entries, work, int(dtype == torch.float64)))

    def begin(self, options: StepOptions) -> None:
        """Write the addresses and options of a step."""
        self.options = _Options(
            float(options.lr),
            options.momentum,
            options.dampening,
            options.weight_decay,
            options.rho,
            0.0 if options.curvature is None else options.curvature,
            options.nesterov,
            options.maximize,
            options.radius_invariant,
            options.constant,
        )
        for task, entry, _ in self.rows:
            entry.weight = task.weight.data_ptr()
            entry.grad = gradient_of(task).data_ptr()
            entry.buffer = None if task.buffer is None else task.buffer.data_ptr()
            entry.first = task.first

    def set_skips(self, skips: bool) -> None:
        """Write whether some scales are zero, if it is not what was written."""
        if skips != self.skips:
            self.skips = skips
            for _, entry, _ in self.rows:
                entry.skips = skips

    def set_taus(self, batch: Batch) -> Tensor:
        """Write where ``τ`` goes, and where the curvature of the groups is; returns the tensor that will hold ``τ``."""
        taus = torch.empty_like(self.norms)
        invariant, own = batch.options.radius_invariant, batch.options.curvature is None
        for task, entry, first in self.rows:
            entry.taus = taus.data_ptr() + first * taus.itemsize
            bound = task.table.keep(("curvature", invariant), task.table.curvature_bound, invariant) if own else None
            entry.curvature = None if bound is None else bound.data_ptr()
        return taus

    def run(self, name: str) -> int:
        """Call a function of the extension, once for every type; returns the sum of what it returns."""
        sweep, options = getattr(library(), name), ctypes.byref(self.options)
        total = 0
        with torch.profiler.record_function(name):
            for entries, work, is_double in self.calls:
                threads = threads_for(work)
                total += sweep(entries, ctypes.c_int64(len(entries)), options, is_double, ctypes.c_int(threads))
        return total


def _begun(batch: Batch) -> _Table:
    """The table of a batch, at the beginning of a step."""
    if batch.prepared is None:
        batch.prepared = _Table(batch)
    table = cast(_Table, batch.prepared)
    table.begin(batch.options)
    return table


def _entry(task: Task[KernelTable]) -> _Task:
    """The task but for its addresses."""
    table, dtype = task.table, task.weight.dtype
    place = place_of(task, by_rows=table.row_groups is not None)
    assert place is not None
    row_groups = table.row_groups if place.rows > 1 else None
    radii = None if table.radii is None else table.keep(("radii", dtype), table.radii.to, dtype)
    return _Task(
        codes=table.codes.data_ptr(),
        row_groups=None if row_groups is None else row_groups.data_ptr(),
        radii=None if radii is None else radii.data_ptr(),
        radius=(ctypes.c_double * 4)(*(1.0 if math.isnan(r) else r for r in table.radius)),
        rows=place.rows,
        columns=place.columns,
        row_stride=place.row_stride,
        column_stride=place.column_stride,
        a=table.size[0],
        b=table.size[1],
        i_stride=place.i_stride,
        j_stride=place.j_stride,
        groups=table.groups,
    )
