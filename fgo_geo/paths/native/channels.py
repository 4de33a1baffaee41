"""Channel-directed gradients on the CPU: ``channels.cpp``, called on memory addresses.

The inner products and the torch code that stands in elsewhere are in :mod:`fgo_geo.optim.channel_metrics`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from fgo_geo.linalg import traces
from fgo_geo.paths.native.library import library, threads_for

__all__ = ["direct", "fits", "runs", "takes"]

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
    """Whether :func:`direct` takes a gradient here and now."""
    return runs() and fits(g)


def runs() -> bool:
    """Whether the library is there, and operations are run, not recorded."""
    return not torch.compiler.is_compiling() and not traces() and library() is not None


def fits(g: Tensor) -> bool:
    """Whether a gradient is on the CPU, in single precision, and without gaps in memory."""
    is_known = g.dtype is torch.float32 and g.layout is torch.strided and g.device.type == "cpu"
    return is_known and _has_no_gaps(g.shape, g.stride())


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
    entries = (_Channel * len(pairs))(*((g.data_ptr(), *_columns(g.shape, g.stride(), d)) for g, d in pairs))
    threads = threads_for(sum(g.numel() for g, _ in pairs))
    with torch.profiler.record_function("fgo_direct"):
        loaded.fgo_direct(entries, ctypes.c_int64(len(pairs)), ctypes.c_int(threads))
    torch.autograd.graph.increment_version([g for g, _ in pairs])


@lru_cache(4096)
def _columns(
    shape: torch.Size, strides: tuple[int, ...], direction: tuple[str, float, int, str, int]
) -> tuple[int | float, ...]:
    """Number, length and stride of the columns of a gradient, and how they are directed."""
    metric, lam, axis, ends, groups = direction
    length = shape[axis] // groups
    stride = strides[axis] if shape[axis] > 1 else 1
    return shape.numel() // length, length, stride, lam, _METRICS.index(metric), ends == "periodic"
