"""Memory for the temporaries of a step, kept for the next one.

To allocate a large tensor in every step costs more than the arithmetic on it: the allocator returns its memory to the
system, which has to map and clear every page again. A :class:`Workspace` holds one buffer per use, of the size of the
largest tensor that was requested for it.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["Use", "Workspace"]

_ALIASED_STRIDE = 256  # rows whose stride is a multiple of this compete for the same lines of a cache
_PADDING = 16


class Use(enum.Enum):
    """Uses of the temporaries of a step."""

    POINTS = enum.auto()
    GRADIENTS = enum.auto()
    MOMENTUM = enum.auto()
    SORTING = enum.auto()
    ALONG = enum.auto()  # products of gradients and points
    PRODUCTS = enum.auto()
    EXCESS = enum.auto()  # Gram matrices less their limit
    GAP = enum.auto()  # inverse roots less their limit
    ROUNDED_MATRIX = enum.auto()
    ROUNDED_PART = enum.auto()
    ROUNDED_PRODUCT = enum.auto()


class Workspace:
    """Memory by use: a tensor is valid until the next request for the same use.

    Example:
        >>> workspace = Workspace()
        >>> first = workspace.like(torch.zeros(3, 2), Use.GAP)
        >>> first.data_ptr() == workspace.like(torch.zeros(2, 2), Use.GAP).data_ptr()
        True
    """

    def __init__(self) -> None:
        self._memory: dict[tuple[Use, torch.dtype, torch.device], Tensor] = {}

    def like(self, x: Tensor, use: Use, dtype: torch.dtype | None = None) -> Tensor:
        """An uninitialised tensor of the shape of ``x``, stored by columns if ``x`` is, else contiguous."""
        dtype = x.dtype if dtype is None else dtype
        by_columns = not x.is_contiguous() and x.stride(-2) == 1
        return self._take(use, x, x.mT.shape, dtype).mT if by_columns else self._take(use, x, x.shape, dtype)

    def square(self, x: Tensor, use: Use) -> Tensor:
        """An uninitialised square matrix ``(..., B, B)`` for every matrix ``(..., A, B)``, stored row by row.

        Rows are padded where their stride would make them compete for the same lines of a cache.
        """
        size = x.shape[-1]
        stride = size + _PADDING if size % _ALIASED_STRIDE == 0 else size
        return self._take(use, x, (*x.shape[:-2], size, stride), x.dtype)[..., :size]

    def empty(self, shape: Sequence[int], like: Tensor, use: Use) -> Tensor:
        """An uninitialised contiguous tensor of any shape, of the type and on the device of another one."""
        return self._take(use, like, shape, like.dtype)

    def _take(self, use: Use, x: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        size, key = math.prod(shape), (use, dtype, x.device)
        memory = self._memory.get(key)
        if memory is None or memory.numel() < size:
            with torch.inference_mode(False):  # a later step may run outside of inference mode
                memory = self._memory[key] = torch.empty(size, dtype=dtype, device=x.device)
        return memory[:size].view(*shape)
