"""The compiled extension: its place, and the number of threads for its functions.

The installation of the package builds it if there is a C++ compiler. It depends neither on Python nor on torch. Without
it, the paths that call it take no weight, and the other paths step all of them.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch

__all__ = ["NOT_BUILT", "PER_THREAD", "instruction_set", "library", "threads_for"]

NOT_BUILT = "no compiled library of this version; install fgo_geo again where there is a C++ compiler for faster steps"

PER_THREAD = 2**16
"""Entries below which another thread costs more than it saves."""

_ABI = 12  # of the C++ sources; a file built from another version is left alone
_FUNCTIONS = (
    *("fgo_limit", "fgo_norms", "fgo_bounds", "fgo_update", "fgo_large", "fgo_step"),
    *("fgo_line_norms", "fgo_line_update", "fgo_take", "fgo_put", "fgo_direct"),
    *("fgo_stiefel_norms", "fgo_stiefel_bounds", "fgo_stiefel_move", "fgo_matrix_step"),
)
_INSTRUCTION_SETS = ("portable", "AVX2", "AVX-512")


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


def instruction_set(limit: int = -1) -> str:
    """The instruction set in use: the best that the processor has, up to a limit if one is given.

    Args:
        limit: 0, 1 or 2, from now on; a negative number leaves the limit as it is.

    Returns:
        Its name.
    """
    loaded = library()
    if loaded is None:
        raise RuntimeError(NOT_BUILT)
    return _INSTRUCTION_SETS[loaded.fgo_limit(ctypes.c_int(limit))]


def threads_for(work: int) -> int:
    """Number of threads for so many entries."""
    return max(1, min(torch.get_num_threads(), work // PER_THREAD))
