"""Products and sums of batches of matrices, in the memory layouts in which they are fast.

A batch of matrices is a *structure of arrays* if the batch has the smallest stride: every entry is one contiguous
vector over the batch, and elementwise operations on a row or a column of all matrices run at the speed of memory. For
such batches of small matrices, :func:`small_product`, :func:`subtract_product` and :func:`inner_sum` are loops over
these vectors, since a matrix product or reduction per matrix costs many times the arithmetic of 3 x 3 matrices.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from fgo_geo.linalg.matmul import add_matmul_2d, goes_to_onednn, is_plain, matmul_2d
from fgo_geo.linalg.precision import multiplies_bfloat16
from fgo_geo.linalg.values import is_differentiated, reads_for_free, traces
from fgo_geo.linalg.workspace import Use, Workspace

__all__ = [
    "commuting_product",
    "divide_or_zero",
    "frobenius_norm",
    "gram_blocks",
    "gram_excess",
    "gram_matrix",
    "inner_sum",
    "root_of_sum",
    "root_or_zero",
    "skew",
    "small_product",
    "subtract_part",
    "subtract_product",
    "sym",
]

_UNROLLED = 64  # the most terms of a sum that a Python loop adds up
_MANY = 2**16  # entries; with fewer, an intermediate product is cheaper than more calls


def _is_struct_of_arrays(x: Tensor) -> bool:
    """Whether the batch of matrices has the smallest stride."""
    return any(size > 1 and stride == 1 for size, stride in zip(x.shape[:-2], x.stride()[:-2], strict=True))


def _unrolled(terms: int, *operands: Tensor) -> bool:
    """Whether a loop should add up this many products of operands: they are long vectors, and few."""
    if terms > _UNROLLED or not any(_is_struct_of_arrays(x) for x in operands):
        return False
    return torch.compiler.is_compiling() or not traces()  # vmap has no rule for adding in place


def _terms(a: Tensor, b: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Columns of ``a`` and rows of ``b``, whose outer products add up to ``a @ b``."""
    return list(zip(a.unsqueeze(-1).unbind(-2), _rows(b), strict=True))


def _rows(x: Tensor) -> tuple[Tensor, ...]:
    """The rows of matrices, each a matrix; unbinding takes fewer calls than splitting."""
    return x.unsqueeze(-3).unbind(-2)


def small_product(a: Tensor, b: Tensor, *, out: Tensor | None = None) -> Tensor:
    """The matrix product ``a @ b``; as a sum of outer products for a structure of arrays.

    Args:
        a: Matrices, shape ``(..., A, K)``.
        b: Matrices, shape ``(..., K, B)``.
        out: A tensor for the result, which must share no memory with a factor.

    Returns:
        Matrices of shape ``(..., A, B)``, in the memory layout of the factors unless there is an ``out``.

    Example:
        >>> a = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).expand(5, 2, 2)
        >>> planes = a.permute(1, 2, 0).contiguous().permute(2, 0, 1)  # the same numbers, the batch fastest
        >>> small_product(planes, planes)[0]
        tensor([[ 7., 10.],
                [15., 22.]])
    """
    if not _unrolled(a.shape[-1], a, b):
        if _goes_by_columns(a if out is None else out):
            return _product(b.mT, a.mT, None if out is None else out.mT).mT
        return _product(a, b, out)
    (column, row), *others = _terms(a, b)
    total = torch.mul(column, row, out=out)
    for column, row in others:
        total.addcmul_(column, row)
    return total


def subtract_product(
    c: Tensor, a: Tensor, b: Tensor, *, beta: float = 1.0, alpha: float = 1.0, out: Tensor | None = None
) -> Tensor:
    """``beta c - alpha a @ b``, computed as :func:`small_product` is.

    Args:
        c: Matrices, shape ``(..., A, B)``.
        a: Matrices, shape ``(..., A, K)``.
        b: Matrices, shape ``(..., K, B)``.
        beta: Factor of ``c``.
        alpha: Factor of the product.
        out: A tensor for the result. It may be ``c``, and must share no memory with ``a`` or ``b``.

    Returns:
        Matrices of shape ``(..., A, B)``.

    Example:
        >>> subtract_product(torch.ones(1, 1), torch.tensor([[2.0, 1.0]]), torch.tensor([[3.0], [4.0]]), beta=2.0)
        tensor([[-8.]])
    """
    if not _unrolled(a.shape[-1], a, b, c):
        if _goes_by_columns(c):
            return _minus(c.mT, b.mT, a.mT, beta, alpha, None if out is None else out.mT).mT
        return _minus(c, a, b, beta, alpha, out)
    (column, row), *others = _terms(a, b)
    scaled = c if beta == 1 else torch.mul(c, beta, out=out)
    total = torch.addcmul(scaled, column, row, value=-alpha, out=out)
    for column, row in others:
        total.addcmul_(column, row, value=-alpha)
    return total


_SMALL = 2.0**-15  # the largest Frobenius norm of a part whose rounding to 8 bits does not show in c - c @ part
_WIDE_PART = 256  # columns; for fewer, rounding and adding cost as much as the product saves


def subtract_part(c: Tensor, part: Tensor, workspace: Workspace, *, from_left: bool = False, out: Tensor) -> Tensor:
    """``c - c @ part``, with a rounded product if the part is small enough and rounding is faster.

    Up to a Frobenius norm of the part of 2^-15, the eight bits of bfloat16 leave an error whose norm is at most 2^-22
    times that of ``c``, even if all roundings have the same sign. Where the processor has a unit for such products
    (:func:`~fgo_geo.linalg.precision.multiplies_bfloat16`), they take at most half the time, besides the rounding. The
    function reads values of tensors: call it only where that is free.

    Args:
        c: Matrices, shape ``(..., A, B)``.
        part: Square matrices, shape ``(..., B, B)``, or ``(..., A, A)`` from the left.
        workspace: Memory for the rounded matrices.
        from_left: Take ``c - part @ c`` instead.
        out: A tensor for the result, which must share no memory with the other arguments.

    Returns:
        ``out``.

    Example:
        >>> y = torch.ones(2, 2)
        >>> subtract_part(y, 0.25 * torch.eye(2), Workspace(), out=torch.empty(2, 2))
        tensor([[0.7500, 0.7500],
                [0.7500, 0.7500]])
    """
    if not _rounds(c, part):
        return subtract_product(c, *((part, c) if from_left else (c, part)), out=out)
    whole = workspace.like(c, Use.ROUNDED_MATRIX, torch.bfloat16).copy_(c)
    small = workspace.like(part, Use.ROUNDED_PART, torch.bfloat16).copy_(part)
    product = workspace.like(c, Use.ROUNDED_PRODUCT, torch.bfloat16)
    small_product(*((small, whole) if from_left else (whole, small)), out=product)
    return torch.sub(c, out.copy_(product), out=out)


def _rounds(c: Tensor, part: Tensor) -> bool:
    """Whether to round the product of a matrix and a part: where that is exact enough, and faster."""
    wide = c.dtype == torch.float32 and min(c.shape[-2:]) >= _WIDE_PART
    has_unit = torch.backends.mkldnn.enabled and multiplies_bfloat16()  # pyright: ignore
    return wide and has_unit and float(frobenius_norm(part).amax()) <= _SMALL


def _product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """``a @ b`` by torch."""
    if _are_single(a, b):
        product = matmul_2d(_flat(a), _flat(b), None if out is None else _flat(out))
        return product.reshape(*a.shape[:-1], b.shape[-1]) if out is None else out
    return torch.matmul(a, b, out=out)


def _minus(c: Tensor, a: Tensor, b: Tensor, beta: float, alpha: float, out: Tensor | None) -> Tensor:
    """``beta c - alpha a @ b`` by torch."""
    if _are_single(c, a, b):
        result = add_matmul_2d(
            _flat(c), _flat(a), _flat(b), beta=beta, alpha=-alpha, out=None if out is None else _flat(out)
        )
        return result.reshape(c.shape) if out is None else out
    if c.ndim == a.ndim == b.ndim == 3 and len(c) == len(a) == len(b):
        return torch.baddbmm(c, a, b, beta=beta, alpha=-alpha, out=out)
    return torch.sub(c if beta == 1 else beta * c, a @ b, alpha=alpha, out=out)


def _are_single(*operands: Tensor) -> bool:
    """Whether each is a single matrix, which torch multiplies by other routines than a batch, some of them faster."""
    return all(math.prod(x.shape[:-2]) == 1 and x.ndim == operands[0].ndim for x in operands)


def _flat(x: Tensor) -> Tensor:
    """The one matrix of a batch of one."""
    return x[(0,) * (x.ndim - 2)] if x.ndim > 2 else x


def _goes_by_columns(x: Tensor) -> bool:
    """Whether tall matrices are stored column by column; their products are then computed transposed, and stay so."""
    return x.shape[-2] >= x.shape[-1] > 1 and x.stride(-2) == 1 != x.stride(-1)


_WIDE_GRAM = 128  # columns; the blocks of narrower matrices make products too small to be fast
_MOST_BLOCKS = 4  # of a wide matrix's columns


def gram_blocks(columns: int) -> int:
    """The number of column blocks in :func:`gram_matrix`; ``k`` blocks save ``(k - 1) / 2k`` of the operations.

    Example:
        >>> gram_blocks(64), gram_blocks(256), gram_blocks(2048)
        (1, 2, 4)
    """
    return max(1, min(_MOST_BLOCKS, columns // _WIDE_GRAM))


def gram_matrix(x: Tensor, *, out: Tensor | None = None, precise: bool = False) -> Tensor:
    """``xᵀx``; for wide matrices, blocks that follow by symmetry are copied.

    Args:
        x: Matrices, shape ``(..., A, B)``.
        out: A tensor for the result, stored row by row.
        precise: Compute the diagonal from norms where oneDNN multiplies. It adds a thousand squares and more in
            sequence: for a Stiefel matrix of 2,048 rows the error was 1.7e-6.

    Returns:
        Symmetric matrices, shape ``(..., B, B)``; blocks on the diagonal are symmetric to rounding.

    Example:
        >>> gram_matrix(torch.tensor([[1.0, 2.0]]))
        tensor([[1., 2.],
                [2., 4.]])
    """
    by_onednn = _are_single(x) and goes_to_onednn(_flat(x).mT, _flat(x))
    if by_onednn:
        x = _flat(x).mT.contiguous().mT.reshape(x.shape)  # without gaps between the columns
    gram = _symmetric_product(x.mT, x, out)
    if precise and by_onednn:
        squares = x.square().sum(-2) if x.shape[-2] > _LONG_LINE else torch.linalg.vector_norm(x, dim=-2).square()
        gram.diagonal(dim1=-2, dim2=-1).copy_(squares)
    return gram


def commuting_product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` of symmetric matrices that commute, whose product is symmetric; of wide ones, blocks are copied.

    Args:
        a: Symmetric matrices, shape ``(..., B, B)``.
        b: Symmetric matrices of the same shape.

    Returns:
        Symmetric matrices of the same shape; blocks on the diagonal are symmetric to rounding.

    Example:
        >>> a = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
        >>> commuting_product(a, a)
        tensor([[5., 4.],
                [4., 5.]])
    """
    return _symmetric_product(a, b.mT if gram_blocks(b.shape[-1]) > 1 else b, None)


def _symmetric_product(a: Tensor, b: Tensor, out: Tensor | None) -> Tensor:
    """``a @ b`` where that is symmetric, from its blocks on and above the diagonal."""
    columns = b.shape[-1]
    blocks = gram_blocks(columns)
    if blocks == 1:
        return small_product(a, b, out=out)
    edges = [columns * k // blocks for k in range(blocks + 1)]
    if out is None and all(reads_for_free(x) and is_plain(x) and not is_differentiated(x) for x in (a, b)):
        out = torch.empty((*b.shape[:-2], columns, columns), dtype=b.dtype, device=b.device)
    rows = [
        _product(a[..., start:stop, :], b[..., start:], None if out is None else out[..., start:stop, start:])
        for start, stop in itertools.pairwise(edges)
    ]  # from the diagonal on
    if out is None:
        below = [
            [row[..., edges[k] - edges[j] : edges[k + 1] - edges[j]].mT for j, row in enumerate(rows[:k])]
            for k in range(blocks)
        ]
        return torch.cat([torch.cat([*left, row], -1) for left, row in zip(below, rows, strict=True)], -2)
    for start, stop in itertools.pairwise(edges):
        out[..., stop:, start:stop] = out[..., start:stop, stop:].mT
    return out


def gram_excess(y: Tensor, radius: float | Tensor = 1.0, *, out: Tensor | None = None) -> Tensor:
    """``yᵀy / r² - I``: zero if the columns of ``y / r`` are orthonormal.

    Args:
        y: Matrices, shape ``(..., A, B)``.
        radius: Radius ``r``, a number or a tensor that broadcasts against ``y``.
        out: A tensor for the result, stored row by row.

    Returns:
        Symmetric matrices, shape ``(..., B, B)``.

    Example:
        >>> gram_excess(torch.tensor([[2.0, 0.0], [0.0, 3.0]]), 2.0)
        tensor([[0.0000, 0.0000],
                [0.0000, 1.2500]])
    """
    excess = torch.div(gram_matrix(y, out=out, precise=True), radius**2, out=out)
    excess.diagonal(dim1=-2, dim2=-1).sub_(1)
    return excess


def inner_sum(a: Tensor, b: Tensor, dim: tuple[int, ...]) -> Tensor:
    """Sum of ``a * b`` over dimensions, counted from the end, which are kept with size one.

    Example:
        >>> inner_sum(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.0]), (-1,))
        tensor([25.])
    """
    of_columns = dim == (-2,) or (dim == (-2, -1) and not torch.compiler.is_compiling() and a.numel() > _MANY)
    if not of_columns or a.shape != b.shape or not _unrolled(a.shape[-2], a, b):
        return (a * b).sum(dim, keepdim=True)
    (left, right), *others = zip(_rows(a), _rows(b), strict=True)
    total = left * right
    for left, right in others:
        total.addcmul_(left, right)
    return total if dim == (-2,) else total.sum(-1, keepdim=True)


def root_of_sum(a: Tensor, dim: tuple[int, ...]) -> Tensor:
    """Euclidean norm over dimensions, which are kept with size one; its derivative at zero is zero.

    It adds pairwise. ``torch.linalg.vector_norm`` does not, and its error over two million entries in single precision
    is 3e-5.

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
    return squared.sqrt() if not is_differentiated(squared) and reads_for_free(squared) else root_or_zero(squared)


def root_or_zero(x: Tensor) -> Tensor:
    """Square root where ``x`` is positive. Elsewhere value and derivative are zero.

    Example:
        >>> root_or_zero(torch.tensor([4.0, 0.0, -1e-9]))
        tensor([2., 0., 0.])
    """
    zero = x <= 0
    return torch.where(zero, 0, torch.where(zero, 1, x).sqrt())


_LONG_LINE = 2**13  # numbers; for more, the error of torch's vector_norm exceeds 1e-6


def frobenius_norm(x: Tensor) -> Tensor:
    """Frobenius norms of matrices, in most cases without a temporary of their size.

    The function sums contiguous rows or columns first, and then their sums, pairwise, because the error of
    ``torch.linalg.vector_norm`` over two million entries in single precision is 3e-5. For long rows and structures of
    arrays it calls :func:`root_of_sum`.

    Args:
        x: Matrices, shape ``(..., A, B)``.

    Returns:
        Norms, shape ``(...)``.

    Example:
        >>> frobenius_norm(torch.tensor([[3.0, 4.0], [0.0, 12.0]]))
        tensor(13.)
    """
    together = -2 if _goes_by_columns(x) else -1
    if _is_struct_of_arrays(x) or x.shape[together] > _LONG_LINE:
        return root_of_sum(x, (-2, -1)).squeeze((-2, -1))
    return torch.linalg.vector_norm(x, dim=together).square().sum(-1).sqrt()


def divide_or_zero(a: Tensor, b: Tensor) -> Tensor:
    """``a / b`` where ``b``, which broadcasts, is positive. Elsewhere value and derivative are zero.

    Example:
        >>> divide_or_zero(torch.tensor([3.0, 3.0]), torch.tensor([2.0, 0.0]))
        tensor([1.5000, 0.0000])
    """
    return torch.where(b > 0, a / torch.where(b > 0, b, 1), 0)


def sym(m: Tensor) -> Tensor:
    """Symmetric part of square matrices ``(..., B, B)``, ``(m + mᵀ) / 2``.

    Example:
        >>> sym(torch.tensor([[0.0, 2.0], [0.0, 0.0]]))
        tensor([[0., 1.],
                [1., 0.]])
    """
    return (m + m.mT) / 2


def skew(m: Tensor) -> Tensor:
    """Skew-symmetric part of square matrices ``(..., B, B)``, ``(m - mᵀ) / 2``.

    Example:
        >>> skew(torch.tensor([[5.0, 2.0], [0.0, 0.0]]))
        tensor([[ 0.,  1.],
                [-1.,  0.]])
    """
    return (m - m.mT) / 2
