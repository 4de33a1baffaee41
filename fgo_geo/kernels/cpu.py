"""The fused path on the CPU: a compiled extension, called on memory addresses.

``fused.cpp`` is built when the package is installed, where there is a C++ compiler, and knows neither Python nor torch.
Without it everything works, by the batched torch code.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Sequence
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch
from torch import Tensor

from fgo_geo.kernels.task import StepOptions, Task, gradient_of, place_of, problem_of

__all__ = ["DESCRIPTION", "NOT_BUILT", "reason", "squared_norms", "update"]

DESCRIPTION = "compiled sweeps on the CPU"
NOT_BUILT = "fgo_geo was installed without a C++ compiler; install it again where there is one for faster steps"

_ABI = 2  # of fused.cpp; a file built from another version is left alone
_LARGEST = (49, 7)  # component size that fused.cpp has room for
_PER_THREAD = 2**16  # entries below which another thread costs more than it saves


class _Task(ctypes.Structure):
    """``fgo_task`` of fused.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("weight", "grad", "buffer", "codes", "row_groups", "radii")),
        *((name, ctypes.c_void_p) for name in ("squared_norms", "scales")),
        ("radius", ctypes.c_double * 4),
        *((name, ctypes.c_int64) for name in ("rows", "columns", "row_stride", "column_stride")),
        *((name, ctypes.c_int32) for name in ("a", "b", "i_stride", "j_stride", "first", "skips")),
        ("groups", ctypes.c_int64),
    )


class _Options(ctypes.Structure):
    """``fgo_options`` of fused.cpp."""

    _fields_ = (
        *((name, ctypes.c_double) for name in ("lr", "momentum", "dampening", "weight_decay")),
        *((name, ctypes.c_int32) for name in ("nesterov", "maximize", "radius_invariant")),
    )


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled extension, or None if it was not built."""
    folder = Path(__file__).parent
    for suffix in EXTENSION_SUFFIXES:
        path = folder / f"_fused{suffix}"
        if path.exists():
            try:
                loaded = ctypes.CDLL(str(path))
            except OSError:  # built for another machine
                continue
            abi = getattr(loaded, "fgo_abi", None)
            if abi is not None and abi() == _ABI:
                return loaded
    return None


def reason(task: Task) -> str | None:
    """Why the path cannot take a parameter, None if it can.

    Args:
        task: The parameter with its gradient.

    Returns:
        A reason, or None.
    """
    weight = task.weight
    if weight.device.type != "cpu":
        return f"the compiled sweeps run on the CPU, the weight is on {weight.device}"
    if task.table.size[0] > _LARGEST[0] or task.table.size[1] > _LARGEST[1]:
        return f"components of {task.table.size} are larger than {_LARGEST}"
    return problem_of(task) or (NOT_BUILT if library() is None else None)


def squared_norms(tasks: Sequence[Task], options: StepOptions) -> Tensor:
    """Squared norms of the Riemannian gradients of all groups, one behind the other, in float64."""
    norms = torch.zeros(sum(task.table.groups for task in tasks), dtype=torch.float64)
    _sweep("fgo_norms", tasks, options, norms=norms)
    return norms


def update(tasks: Sequence[Task], scales: Tensor, options: StepOptions) -> None:
    """Take the step of all tasks, given ``1 / τ`` of all groups; zero leaves a group's gradient out."""
    _sweep("fgo_update", tasks, options, scales=scales)


def _sweep(
    name: str,
    tasks: Sequence[Task],
    options: StepOptions,
    norms: Tensor | None = None,
    scales: Tensor | None = None,
) -> None:
    alive: list[Tensor] = []  # what has an address in the tables below
    tables: dict[torch.dtype, list[_Task]] = {}
    first_group = 0
    for task in tasks:
        entry = _entry(task, alive)
        if norms is not None:
            entry.squared_norms = norms[first_group:].data_ptr()
        if scales is not None:
            own = scales[first_group : first_group + task.table.groups].to(task.weight.dtype)
            alive.append(own)
            entry.scales = own.data_ptr()
            entry.skips = not bool(own.all())
        first_group += task.table.groups
        tables.setdefault(task.weight.dtype, []).append(entry)
    chosen = _Options(
        float(options.lr),
        options.momentum,
        options.dampening,
        options.weight_decay,
        options.nesterov,
        options.maximize,
        options.radius_invariant,
    )
    sweep = getattr(library(), name)
    for dtype, entries in tables.items():
        work = sum(entry.rows * entry.columns * entry.a * entry.b for entry in entries)
        threads = max(1, min(torch.get_num_threads(), work // _PER_THREAD))
        table = (_Task * len(entries))(*entries)
        is_double = int(dtype == torch.float64)
        sweep(table, ctypes.c_int64(len(entries)), ctypes.byref(chosen), is_double, ctypes.c_int(threads))


def _entry(task: Task, alive: list[Tensor]) -> _Task:
    weight, table = task.weight, task.table
    grad = gradient_of(task)
    place = place_of(task, by_rows=table.row_groups is not None)
    row_groups = table.row_groups if place.rows > 1 else None
    radii = None if table.radii is None else table.radii.to(weight.dtype)
    alive += [grad] if radii is None else [grad, radii]
    return _Task(
        weight=weight.data_ptr(),
        grad=grad.data_ptr(),
        buffer=None if task.buffer is None else task.buffer.data_ptr(),
        first=task.first,
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
