"""Products and sums, of which the factors are made, and the layouts of memory in which they run fast.

Of many tiny matrices :func:`small_product`, :func:`subtract_product` and :func:`inner_sum` make long loops over the
batch, if that runs fastest in memory. What takes a factorisation is in :mod:`~fgo_geo.linalg.factors`, what iterates
products in :mod:`~fgo_geo.linalg.newton_schulz`.

A batch of matrices is a *structure of arrays* if the batch runs fastest in memory: every entry is one long vector
then, and elementwise operations on a row or a column of all matrices are loops over such vectors, at the speed of
memory. A call of a matrix product or a reduction per matrix costs many times the arithmetic of 3 x 3 matrices.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "divide_or_zero",
    "gram_excess",
    "gram_matrix",
    "inner_sum",
    "root_of_sum",
    "skew",
    "small_product",
    "subtract_product",
    "sym",
]

_UNROLLED = 64  # terms of a sum; longer ones keep a reduction busy
_MANY = 2**16  # entries; of fewer, a product in memory costs less than calls


def _is_struct_of_arrays(x: Tensor) -> bool:
    """Whether the batch of matrices runs fastest in memory."""
    return any(size > 1 and stride == 1 for size, stride in zip(x.shape[:-2], x.stride()[:-2], strict=True))


def _unrolled(terms: int, *operands: Tensor) -> bool:
    """Whether a sum of so many products of operands is one of long vectors."""
    return terms <= _UNROLLED and any(_is_struct_of_arrays(x) for x in operands)


def _terms(a: Tensor, b: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Columns of ``a`` and rows of ``b``, whose outer products add up to ``a @ b``."""
    return list(zip(a.split(1, -1), b.split(1, -2), strict=True))


def small_product(a: Tensor, b: Tensor) -> Tensor:
    """The matrix product ``a @ b``; as a sum of outer products if the batch runs fastest in memory.

    Args:
        a: Matrices, shape ``(..., A, K)``.
        b: Matrices, shape ``(..., K, B)``.

    Returns:
        Matrices of shape ``(..., A, B)``, in the memory layout of the factors.

    Example:
        >>> a = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).expand(5, 2, 2)
        >>> planes = a.permute(1, 2, 0).contiguous().permute(2, 0, 1)  # the same numbers, the batch fastest
        >>> small_product(planes, planes)[0]
        tensor([[ 7., 10.],
                [15., 22.]])
    """
    if not _unrolled(a.shape[-1], a, b):
        return _product(b.mT, a.mT).mT if _goes_by_columns(a) else _product(a, b)
    (column, row), *others = _terms(a, b)
    total = column * row
    for column, row in others:
        total.addcmul_(column, row)
    return total


def subtract_product(c: Tensor, a: Tensor, b: Tensor, *, in_place: bool = False) -> Tensor:
    """``c - a @ b``, computed as :func:`small_product` is.

    Args:
        c: Matrices, shape ``(..., A, B)``.
        a: Matrices, shape ``(..., A, K)``.
        b: Matrices, shape ``(..., K, B)``.
        in_place: Write the result to ``c``.

    Returns:
        Matrices of shape ``(..., A, B)``.

    Example:
        >>> subtract_product(torch.ones(1, 1), torch.tensor([[2.0, 1.0]]), torch.tensor([[3.0], [4.0]]))
        tensor([[-9.]])
    """
    if not _unrolled(a.shape[-1], a, b, c):
        if _goes_by_columns(c):
            return _minus(c.mT, b.mT, a.mT, in_place).mT
        return _minus(c, a, b, in_place)
    (column, row), *others = _terms(a, b)
    total = c.addcmul_(column, row, value=-1) if in_place else torch.addcmul(c, column, row, value=-1)
    for column, row in others:
        total.addcmul_(column, row, value=-1)
    return total


def _product(a: Tensor, b: Tensor) -> Tensor:
    return a @ b


def _minus(c: Tensor, a: Tensor, b: Tensor, in_place: bool) -> Tensor:
    out = c if in_place else None
    if c.ndim == a.ndim == b.ndim == 2:
        return torch.addmm(c, a, b, alpha=-1, out=out)
    if c.ndim == a.ndim == b.ndim == 3 and len(c) == len(a) == len(b):
        return torch.baddbmm(c, a, b, alpha=-1, out=out)
    return torch.sub(c, a @ b, out=out)


def _goes_by_columns(x: Tensor) -> bool:
    """Whether tall matrices are stored column by column: their products are taken transposed, and stay so."""
    return x.shape[-2] >= x.shape[-1] > 1 and x.stride(-2) == 1 != x.stride(-1)


_WIDE_GRAM = 128  # columns; the halves of narrower matrices make products too small to be fast


def gram_matrix(x: Tensor) -> Tensor:
    """``xᵀx``; of wide matrices the block that follows by symmetry, a quarter, is copied.

    Args:
        x: Matrices, shape ``(..., A, B)``.

    Returns:
        Symmetric matrices, shape ``(..., B, B)``.

    Example:
        >>> gram_matrix(torch.tensor([[1.0, 2.0]]))
        tensor([[1., 2.],
                [2., 4.]])
    """
    columns = x.shape[-1]
    if columns < _WIDE_GRAM:
        return small_product(x.mT, x)
    left, right = x.split((columns + 1) // 2, -1)
    above, below = _product(left.mT, x), _product(right.mT, right)
    return torch.cat((above, torch.cat((above[..., left.shape[-1] :].mT, below), -1)), -2)


def gram_excess(y: Tensor, radius: float | Tensor = 1.0) -> Tensor:
    """``yᵀy / r² - I``: zero if the columns of ``y / r`` are orthonormal.

    Args:
        y: Matrices, shape ``(..., A, B)``.
        radius: Radius ``r``, a number or a tensor that broadcasts against ``y``.

    Returns:
        Symmetric matrices, shape ``(..., B, B)``.

    Example:
        >>> gram_excess(torch.tensor([[2.0, 0.0], [0.0, 3.0]]), 2.0)
        tensor([[0.0000, 0.0000],
                [0.0000, 1.2500]])
    """
    excess = gram_matrix(y) / radius**2
    excess.diagonal(dim1=-2, dim2=-1).sub_(1)
    return excess


def inner_sum(a: Tensor, b: Tensor, dim: tuple[int, ...]) -> Tensor:
    """Sum of ``a * b`` over dimensions, which are kept with size one.

    Args:
        a: Any tensor.
        b: Tensor of the same shape.
        dim: Dimensions, counted from the end.

    Returns:
        Inner products.

    Example:
        >>> inner_sum(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.0]), (-1,))
        tensor([25.])
    """
    of_columns = dim == (-2,) or (dim == (-2, -1) and not torch.compiler.is_compiling() and a.numel() > _MANY)
    if not of_columns or a.shape != b.shape or not _unrolled(a.shape[-2], a, b):
        return (a * b).sum(dim, keepdim=True)
    (left, right), *others = zip(a.split(1, -2), b.split(1, -2), strict=True)
    total = left * right
    for left, right in others:
        total.addcmul_(left, right)
    return total if dim == (-2,) else total.sum(-1, keepdim=True)


def root_of_sum(a: Tensor, dim: tuple[int, ...]) -> Tensor:
    """Euclidean norm over dimensions, which are kept with size one; its derivative at zero is zero.

    Unlike ``torch.linalg.vector_norm`` it adds pairwise: over two million entries in single precision that one is off
    by 3e-5.

    Args:
        a: Any tensor.
        dim: Dimensions, counted from the end.

    Returns:
        Norms.

    Example:
        >>> root_of_sum(torch.tensor([3.0, 4.0]), (-1,))
        tensor([5.])
    """
    squared = inner_sum(a, a, dim)
    zero = squared == 0
    return torch.where(zero, 0, torch.where(zero, 1, squared).sqrt())


def divide_or_zero(a: Tensor, b: Tensor) -> Tensor:
    """``a / b`` where ``b`` is positive, and zero elsewhere; so is its derivative.

    Args:
        a: Any tensor.
        b: Tensor that broadcasts against it.

    Returns:
        Quotients.

    Example:
        >>> divide_or_zero(torch.tensor([3.0, 3.0]), torch.tensor([2.0, 0.0]))
        tensor([1.5000, 0.0000])
    """
    return torch.where(b > 0, a / torch.where(b > 0, b, 1), 0)


def sym(m: Tensor) -> Tensor:
    """Symmetric part, ``(m + mᵀ) / 2``.

    Args:
        m: Square matrices, shape ``(..., B, B)``.

    Returns:
        Symmetric matrices of the same shape.

    Example:
        >>> sym(torch.tensor([[0.0, 2.0], [0.0, 0.0]]))
        tensor([[0., 1.],
                [1., 0.]])
    """
    return (m + m.mT) / 2


def skew(m: Tensor) -> Tensor:
    """Skew-symmetric part, ``(m - mᵀ) / 2``.

    Args:
        m: Square matrices, shape ``(..., B, B)``.

    Returns:
        Skew-symmetric matrices of the same shape.

    Example:
        >>> skew(torch.tensor([[5.0, 2.0], [0.0, 0.0]]))
        tensor([[ 0.,  1.],
                [-1.,  0.]])
    """
    return (m - m.mT) / 2
