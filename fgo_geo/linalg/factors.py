"""Matrix functions that take a factorisation: polar and QR factors, and the exponential.

They call ``torch.linalg`` and correct its signs, derivatives at repeated singular values, and coefficients. For nearly
orthonormal matrices :mod:`~fgo_geo.linalg.newton_schulz` computes the polar factor by products alone, and for three
columns :mod:`~fgo_geo.linalg.closed_forms` has closed forms.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fgo_geo.linalg.chebyshev import inverse_root_polynomial, polynomial, spectral_interval
from fgo_geo.linalg.closed_forms import has_closed_form, polar_factor_3
from fgo_geo.linalg.memory import Memory
from fgo_geo.linalg.newton_schulz import polish
from fgo_geo.linalg.polar_derivative import polar_differential
from fgo_geo.linalg.products import frobenius_norm, gram_excess, gram_matrix, small_product, subtract_product
from fgo_geo.linalg.smooth import apply, save
from fgo_geo.linalg.values import reads_for_free

__all__ = ["matrix_exponential", "polar_factor", "polar_factor_and_range", "qr_factor"]

# Eigenvectors of xᵀx take half the time of a singular value decomposition, and lose the square of the condition: from
# this size on, and up to this condition, they leave less than 1e-4, which one Newton-Schulz step takes to rounding.
_GRAM_FROM = 32
_GRAM_CONDITION = 16.0

# From this size on products take less than eigenvectors, derivatives included, up to a bound on the distance of the
# eigenvalues of xᵀx from their middle, relative to that: where singular values differ by less than a factor of 1.5.
_PRODUCTS_FROM = 160
_SPREAD = 0.4

# Entries of qᵀq - I that are not rounding errors. In double precision there are some where Lanczos' iteration misses an
# eigenvalue that its start is nearly orthogonal to; in single precision rounding errors lead it there.
_NOT_ORTHONORMAL = 2.0**-44


def qr_factor(x: Tensor) -> Tensor:
    """The orthonormal factor of the QR decomposition with a non-negative diagonal of R.

    The sign convention makes the factor unique and smooth for full column rank; for a Gaussian ``x`` it is
    Haar distributed (Mezzadri 2007).

    Args:
        x: Matrices with ``A >= B``, shape ``(..., A, B)``.

    Returns:
        Matrices with orthonormal columns, shape ``(..., A, B)``.

    Example:
        >>> qr_factor(torch.tensor([[3.0], [-4.0]]))
        tensor([[ 0.6000],
                [-0.8000]])
    """
    q, r = torch.linalg.qr(x)
    diagonal = r.diagonal(dim1=-2, dim2=-1)
    return q * torch.where(diagonal < 0, -1.0, 1.0).to(q.dtype).unsqueeze(-2)


def polar_factor(x: Tensor, memory: Memory | None = None) -> Tensor:
    r"""The orthonormal polar factor, the nearest matrix with orthonormal columns.

    With the singular value decomposition ``x = U S Vᵀ`` it is ``U Vᵀ``. It is defined for every finite matrix (for
    rank-deficient ones it is one of the nearest points). The derivative is that of the polar decomposition itself,
    so it is finite at repeated singular values, where differentiating the decomposition is not. It can be
    differentiated any number of times, backward and forward.

    In single precision, 3 x 3 matrices take a closed form, elementwise in double precision: it is ten times
    faster than the decomposition and does not wait for the device. NaN stays NaN there; the decomposition may raise.

    Args:
        x: Matrices with ``A >= B``, shape ``(..., A, B)``.
        memory: Where the factorisation is kept: for the same matrix it is not computed again, and the derivatives
            take it from there. The result then shares memory with what is kept, so it must not be changed.

    Returns:
        Matrices with orthonormal columns, shape ``(..., A, B)``.

    Example:
        >>> polar_factor(torch.tensor([[3.0, 0.0], [0.0, 0.5], [0.0, 0.0]]))
        tensor([[1., 0.],
                [0., 1.],
                [0., 0.]])
    """
    if has_closed_form(x) and x.shape[-2] == 3:
        return polar_factor_3(x)
    known = None if memory is None else memory.recall([x])
    if known is not None:
        return apply(_KnownPolarFactor, x, *known)[0]
    factors = apply(_PolarFactor, x)
    if memory is not None:
        memory.keep([x], factors)
    return factors[0]


def polar_factor_and_range(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The polar factor, and an interval that holds the singular values, up to rounding of the largest.

    Args:
        x: Matrices with ``A >= B``, shape ``(..., A, B)``.

    Returns:
        The polar factors, and the lower and upper ends, shape ``(...)``.

    Example:
        >>> _, low, high = polar_factor_and_range(torch.tensor([[3.0, 0.0], [0.0, 0.5], [0.0, 0.0]]))
        >>> low, high
        (tensor(0.5000), tensor(3.))
    """
    factor, v, h = apply(_PolarFactor, x)
    if h.ndim < v.ndim:
        return factor, h.amin(-1), h.amax(-1)
    scale, spread = h.squeeze(-2).unbind(-1)
    return factor, (1 - spread).sqrt() / scale, (1 + spread).sqrt() / scale


class _PolarFactor(torch.autograd.Function):
    """``x = Q H``; returns ``(Q, v, h)`` as :func:`polar_differential` takes them, differentiable in Q alone."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # pyright: ignore
        result = _by_gram_matrix(x)
        if result is None:
            u, h, vh = torch.linalg.svd(x, full_matrices=False)
            return polish(u @ vh), vh.mT.contiguous(), h
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        q, v, h = output
        ctx.mark_non_differentiable(v, h)
        save(ctx, inputs[0], q, v, h)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> Tensor:  # pyright: ignore
        x, q, v, h = ctx.saved_tensors
        return polar_differential(x, q, v, h, grad)

    @staticmethod
    def push(ctx: Any, tangent: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore
        x, q, v, h = ctx.saved_tensors
        along = polar_differential(x, q, v, h, tangent)
        along = along.contiguous() if q.is_contiguous() else along.mT.contiguous().mT  # torch wants the layout of q
        return along, None, None


class _KnownPolarFactor(_PolarFactor):
    """The same where the factors are known."""

    @staticmethod
    def forward(x: Tensor, q: Tensor, v: Tensor, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # pyright: ignore
        return q.detach(), v.detach(), h.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> Any:  # pyright: ignore
        return _PolarFactor.backward(ctx, grad), None, None, None

    @staticmethod
    def push(ctx: Any, tangent: Tensor, *_: Any) -> tuple[Tensor, None, None]:  # pyright: ignore
        return _PolarFactor.push(ctx, tangent)


def _by_gram_matrix(x: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """The polar factor from ``xᵀx``; None if it is small, cannot be read, or loses too many digits."""
    if x.shape[-1] < _GRAM_FROM or x.numel() == 0 or not reads_for_free(x):
        return None
    gram = gram_matrix(x, precise=True)
    squared, range_ = gram.diagonal(dim1=-2, dim2=-1).mean(-1), torch.finfo(x.dtype)
    if not bool(((squared > range_.tiny / range_.eps) & (squared < range_.max * range_.eps)).all()):
        return None  # squares have vanished or overflowed
    known = _by_products(x, gram) if x.shape[-1] >= _PRODUCTS_FROM else None
    if known is not None:
        return known
    squares, v = torch.linalg.eigh(gram)
    if not bool((squares[..., 0] * _GRAM_CONDITION**2 > squares[..., -1]).all()):
        return None
    h = squares.sqrt()
    return polish(small_product(x, small_product(v / h.unsqueeze(-2), v.mT))), v, h


def _by_products(x: Tensor, gram: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """The polar factor as ``x p(xᵀx)`` with a polynomial ``p``; None if singular values are too different."""
    squared = gram.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    excess = gram / squared
    diagonal = excess.diagonal(dim1=-2, dim2=-1)
    diagonal.sub_(1)
    if float(frobenius_norm(excess).amax()) > _SPREAD / (1 - _SPREAD) * math.sqrt(gram.shape[-1]):
        return None  # in an interval that is narrow enough, eigenvalues of mean zero have a smaller mean square
    low, high = spectral_interval(excess)
    middle = 1 + (low + high) / 2
    spread = (high - low) / (2 * middle)
    if not (low > -1 and spread <= _SPREAD):
        return None
    diagonal.sub_(middle - 1)
    coefficients = inverse_root_polynomial(spread, torch.finfo(x.dtype).eps / 2)
    scale = (squared * middle).rsqrt()
    variable = polynomial(excess.div_(middle), coefficients)
    q = subtract_product(x, x, variable.mT, beta=coefficients[0], alpha=-1.0).mul_(scale)  # .mT: see polar_derivative
    if x.dtype == torch.float64 and bool((gram_excess(q).abs_() > _NOT_ORTHONORMAL).any()):
        return None
    variable.diagonal(dim1=-2, dim2=-1).add_(coefficients[0])
    return q, variable.mul_(scale), torch.cat([scale, torch.full_like(scale, spread)], -1)


# Up to torch 2.14 the exponential of a matrix that comes alone can be off by 2e-5 in single and 1e-10 in double
# precision (a wrong coefficient, pytorch#196592); those of two or more are right.
_EXPONENTIAL_NEEDS_COMPANY = torch.__version__ < "2.15"


def matrix_exponential(a: Tensor) -> Tensor:
    """Exponential of square matrices.

    Args:
        a: Matrices, shape ``(..., B, B)``.

    Returns:
        Matrices of the same shape.

    Example:
        >>> matrix_exponential(torch.tensor([[0.0, -torch.pi / 2], [torch.pi / 2, 0.0]])).round(decimals=5)
        tensor([[ 0., -1.],
                [ 1.,  0.]])
    """
    if _EXPONENTIAL_NEEDS_COMPANY and math.prod(a.shape[:-2]) == 1:
        return torch.linalg.matrix_exp(a.expand(2, *a.shape))[0]
    return torch.linalg.matrix_exp(a)
