"""Channel-directed gradients on the CPU: ``channels.cpp``, called on memory addresses.

The inner products and the torch code that stands in elsewhere are in :mod:`fgo_geo.optim.channel_metrics`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from fgo_geo.linalg import reads_for_free
from fgo_geo.paths.native.library import library, threads_for

__all__ = ["direct", "takes"]

_METRICS = ("h0", "h1", "h1t")


class _Channel(ctypes.Structure):
    """``fgo_channel`` of channels.cpp."""

    _fields_ = (
        ("gradient", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("columns", "length", "inner")),
        ("lam", ctypes.c_double),
        *((name, ctypes.c_int32) for name in ("metric", "periodic")),
    )


def takes(g: Tensor) -> bool:
    """Whether :func:`direct` takes a gradient: on the CPU, in single precision, and without gaps in memory."""
    known = g.dtype == torch.float32 and g.layout == torch.strided
    return known and reads_for_free(g) and _has_no_gaps(g.shape, g.stride()) and library() is not None


@lru_cache(4096)
def _has_no_gaps(shape: torch.Size, strides: tuple[int, ...]) -> bool:
    """Whether the numbers of a tensor fill a range of memory, in any order of the dimensions."""
    expected = 1
    for stride, size in sorted(zip(strides, shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def direct(gradients: Sequence[Tensor], directions: Sequence[tuple[str, float, int, str, int]]) -> None:
    """Overwrite gradients that :func:`takes` accepts; directions hold metric, ``λ``, axis >= 0, ends and groups."""
    pairs = [(g, d) for g, d in zip(gradients, directions, strict=True) if g.numel() > 0]
    loaded = library()
    if not pairs or loaded is None:
        return
    entries = (_Channel * len(pairs))(*(_entry(*pair) for pair in pairs))
    threads = threads_for(sum(g.numel() for g, _ in pairs))
    with torch.profiler.record_function("fgo_direct"):
        loaded.fgo_direct(entries, ctypes.c_int64(len(pairs)), ctypes.c_int(threads))
    torch.autograd.graph.increment_version([g for g, _ in pairs])


def _entry(g: Tensor, direction: tuple[str, float, int, str, int]) -> tuple[int | float, ...]:
    metric, lam, axis, ends, groups = direction
    columns = _columns(g.shape, g.stride(), axis, groups)
    return g.data_ptr(), *columns, lam, _METRICS.index(metric), ends == "periodic"


@lru_cache(4096)
def _columns(shape: torch.Size, strides: tuple[int, ...], axis: int, groups: int) -> tuple[int, int, int]:
    """Number, length and stride of the columns of a gradient."""
    length = shape[axis] // groups
    return shape.numel() // length, length, strides[axis] if shape[axis] > 1 else 1
