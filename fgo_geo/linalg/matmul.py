"""Products of two large matrices on the CPU: by torch's BLAS, or by oneDNN, which torch brings as well.

The BLAS of torch is usually MKL, which does not use the AVX-512 instructions of AMD processors; on those with AVX-512,
oneDNN multiplies float32 matrices twice as fast. If torch may round to bfloat16, oneDNN rounds factors and products and
takes half of that time. torch itself calls oneDNN for layers that ``torch.compile`` has frozen. In all other cases
:func:`matmul_2d` is ``torch.mm``.
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
from fgo_geo.linalg.values import is_differentiated, reads_for_free

__all__ = ["add_matmul_2d", "goes_to_onednn", "is_plain", "matmul_2d", "mkl_avoids_avx512", "without_gaps"]

_LARGE = 128  # rows, columns and terms, at least
_LARGE_TRANSPOSED = 256  # if the first factor has to be copied
_LARGE_PRODUCT = 2**22  # multiplications; smaller products are no faster
_CPU_INFO = Path("/proc/cpuinfo")


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
    if not goes_to_onednn(a, b):
        return torch.mm(a, b, out=out)
    product = _onednn_product(a, b)
    return product if out is None else out.copy_(product)


def add_matmul_2d(
    c: Tensor, a: Tensor, b: Tensor, *, beta: float = 1.0, alpha: float = 1.0, out: Tensor | None = None
) -> Tensor:
    """``beta c + alpha a @ b`` of matrices.

    Args:
        c: Matrix, shape ``(A, B)``; if ``beta`` is zero, its values don't matter.
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
    if beta == 0 or not goes_to_onednn(a, b, c):
        return torch.addmm(c, a, b, beta=beta, alpha=alpha, out=out)
    product = _onednn_product(a, b)
    out = product if out is None else out
    if beta == 1:
        return torch.add(c, product, alpha=alpha, out=out)
    return torch.add(product if alpha == 1 else product.mul_(alpha), c, alpha=beta, out=out)


def goes_to_onednn(a: Tensor, b: Tensor, *added: Tensor) -> bool:
    """Whether oneDNN takes ``a @ b``, and adds it to others: large float32 matrices of torch's own without derivatives.

    Example:
        >>> goes_to_onednn(torch.ones(3, 2), torch.ones(2, 3))
        False
    """
    if not (reads_for_free(a) and a.dtype == b.dtype == torch.float32 and mkl_avoids_avx512()):
        return False
    (rows, terms), columns = a.shape, b.shape[-1]
    return (
        min(rows, terms, columns) >= (_LARGE if a.is_contiguous() else _LARGE_TRANSPOSED)
        and rows * terms * columns >= _LARGE_PRODUCT
        and torch.backends.mkldnn.enabled  # pyright: ignore
        and not torch.is_autocast_enabled("cpu")
        and all(is_plain(x) and not is_differentiated(x) for x in (a, b, *added))
    )


@functools.cache
def mkl_avoids_avx512(processor: str | None = None) -> bool:
    """Whether torch's BLAS is MKL, and the processor one of AMD's that has AVX-512 instructions.

    Args:
        processor: What the system says of the processor; None to ask it.
    """
    if processor is None:
        try:
            processor = _CPU_INFO.read_text()
        except OSError:  # another system, or one that hides it
            processor = platform.processor()
    has_both = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    return has_both and torch.backends.cpu.get_cpu_capability() == "AVX512" and "AuthenticAMD" in processor


def is_plain(x: Tensor) -> bool:
    """Whether a tensor, of a subclass perhaps, leaves to torch what happens to it."""
    return getattr(type(x), "__torch_dispatch__", None) is getattr(Tensor, "__torch_dispatch__", None)


def _onednn_product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` by what ``torch.compile`` calls for a linear layer, rounded to bfloat16 if torch may.

    It copies ``a`` unless that is stored row by row. It could add a matrix, too, but adding it afterwards is faster.
    """
    if rounds_to_bfloat16():
        return torch.mm(a.bfloat16(), b.bfloat16()).float()  # off by 0.3 %, to which the product adds a fifth
    linear = cast(Callable[..., Tensor], torch.ops.mkldnn._linear_pointwise)  # pyright: ignore
    return linear(a, without_gaps(b).mT, None, "none", [], "")


def without_gaps(x: Tensor) -> Tensor:
    """A matrix stored row by row or column by column; oneDNN would process others one number at a time."""
    return x if x.is_contiguous() or x.mT.is_contiguous() else x.contiguous()
