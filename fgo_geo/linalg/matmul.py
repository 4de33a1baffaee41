"""Products of two large matrices on the CPU: by torch's BLAS, or by oneDNN, which torch brings as well.

The BLAS of torch is MKL, mostly. Of AMD's processors it uses no AVX-512 instructions; where they have them, oneDNN
multiplies float32 matrices twice as fast, and bfloat16 matrices four times: there, factors are rounded if torch may do
so. torch itself calls it for layers that ``torch.compile`` has frozen. For everything else, and everywhere else,
:func:`matmul_2d` is :func:`torch.mm`.
"""

from __future__ import annotations

import functools
import platform
from collections.abc import Callable
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from fgo_geo.linalg.precision import rounds_to_bfloat16
from fgo_geo.linalg.values import reads_for_free

__all__ = ["add_matmul_2d", "matmul_2d", "mkl_avoids_avx512", "parts_for_gram"]

_LARGE = 128  # rows, columns and terms; smaller products are no faster
_TERMS = 256  # of a sum of squares that oneDNN adds up at once
_LARGE_TRANSPOSED = 256  # if the first factor has to be copied


def matmul_2d(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """``a @ b`` of two matrices.

    Args:
        a: Matrix, shape ``(A, K)``.
        b: Matrix, shape ``(K, B)``.
        out: Where to put the result; it shares no memory with a factor.

    Returns:
        Matrix of shape ``(A, B)``.

    Example:
        >>> matmul_2d(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0], [4.0]]))
        tensor([[11.]])
    """
    if not _goes_to_onednn(a, b):
        return torch.mm(a, b, out=out)
    product = _onednn_product(a, b)
    return product if out is None else out.copy_(product)


def add_matmul_2d(
    c: Tensor, a: Tensor, b: Tensor, *, beta: float = 1.0, alpha: float = 1.0, out: Tensor | None = None
) -> Tensor:
    """``beta c + alpha a @ b`` of matrices.

    Args:
        c: Matrix, shape ``(A, B)``.
        a: Matrix, shape ``(A, K)``.
        b: Matrix, shape ``(K, B)``.
        beta: Factor of ``c``.
        alpha: Factor of the product.
        out: Where to put the result; it may be ``c``, and shares no memory with ``a`` or ``b``.

    Returns:
        Matrix of shape ``(A, B)``.

    Example:
        >>> add_matmul_2d(torch.ones(1, 1), torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0], [4.0]]), alpha=2.0)
        tensor([[23.]])
    """
    if not _goes_to_onednn(a, b):
        return torch.addmm(c, a, b, beta=beta, alpha=alpha, out=out)
    if beta == alpha == 1 and not rounds_to_bfloat16():
        total = _onednn_product(a, b, c)
        return total if out is None else out.copy_(total)
    product = _onednn_product(a, b)
    return torch.add(c if beta == 1 else torch.mul(c, beta, out=out), product, alpha=alpha, out=out)


def parts_for_gram(x: Tensor, precise: bool) -> list[Tensor]:
    """Matrices whose rows are those of one, to add up the products of runs of its columns with each other.

    If oneDNN is to multiply them, the runs are stored without gaps. It adds from the first term to the last: the
    squares of 2,048 rows are off by up to 1.7e-6 of their sum, but in parts of 256 rows by 7e-7.

    Args:
        x: Matrix, shape ``(A, B)``.
        precise: Whether that matters.

    Returns:
        Matrices of shape ``(..., B)``, one below the other; ``x`` alone if torch's BLAS is to multiply.

    Example:
        >>> [part.shape for part in parts_for_gram(torch.ones(600, 2), True)]
        [torch.Size([600, 2])]
    """
    if not _goes_to_onednn(x.mT, x):
        return [x]
    return [part.mT.contiguous().mT for part in x.split(_TERMS if precise else len(x))]


@functools.cache
def mkl_avoids_avx512() -> bool:
    """Whether torch's BLAS is MKL, and the processor one of AMD's that has AVX-512 instructions."""
    has_both = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    return has_both and torch.backends.cpu.get_cpu_capability() == "AVX512" and "AuthenticAMD" in _processor()


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.read_text() if cpuinfo.exists() else platform.processor()


def _goes_to_onednn(a: Tensor, b: Tensor) -> bool:
    """Whether oneDNN takes a product: of large float32 matrices, without derivatives."""
    least = min(*a.shape, b.shape[-1])
    return (
        least >= (_LARGE if a.is_contiguous() else _LARGE_TRANSPOSED)
        and a.dtype == b.dtype == torch.float32
        and mkl_avoids_avx512()
        and torch.backends.mkldnn.enabled  # pyright: ignore
        and reads_for_free(a)
        and not _are_differentiated(a, b)
    )


def _are_differentiated(*factors: Tensor) -> bool:
    backward = torch.is_grad_enabled() and any(x.requires_grad for x in factors)
    return backward or any(torch.autograd.forward_ad.unpack_dual(x).tangent is not None for x in factors)


def _onednn_product(a: Tensor, b: Tensor, added: Tensor | None = None) -> Tensor:
    """``a @ b``; in full precision by what ``torch.compile`` calls for a linear layer, which can add another matrix.

    That copies ``a`` unless it is stored row by row, and would go one number at a time if there were gaps in ``b``.
    """
    if rounds_to_bfloat16():
        return torch.mm(a.bfloat16(), b.bfloat16()).float()
    linear = cast(Callable[..., Tensor], torch.ops.mkldnn._linear_pointwise)  # pyright: ignore
    has_gaps = not (b.is_contiguous() or b.mT.is_contiguous())
    weight = (b.contiguous() if has_gaps else b).mT
    return linear(a, weight, None, "none", [], "") if added is None else linear(a, added, weight, None, "add")
