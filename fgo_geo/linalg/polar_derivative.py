r"""The derivative of the polar factor, and its derivatives of every order.

For ``x = Q H`` with orthonormal ``Q`` and symmetric ``H`` the derivative of ``Q`` along ``w`` is::

    Q L + (I - Q Qᵀ) w H⁻¹    with    H L + L H = Qᵀw - wᵀQ

a self-adjoint map of ``w``: the same formula serves backward and forward. It is an ordinary function of ``x``, ``Q``
and ``w``, except for two operations on ``H``: the equation for ``L`` and the inverse. The derivative of each is made of
that operation itself, so that all orders exist. The eigenvectors of ``H`` come from the factorisation that gave ``Q``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fgo_geo.linalg.chebyshev import solve_skew
from fgo_geo.linalg.products import divide_or_zero, skew, small_product, sym
from fgo_geo.linalg.smooth import apply, save
from fgo_geo.linalg.values import is_differentiated, reads_for_free

__all__ = ["polar_differential", "polar_differential_square", "polar_differential_square_along"]


def polar_differential(x: Tensor, q: Tensor, v: Tensor, h: Tensor, w: Tensor) -> Tensor:
    """Derivative of the polar factor at ``x`` along ``w``, or of the gradient ``w`` back to ``x``.

    Args:
        x: Matrices, shape ``(..., A, B)``.
        q: Their polar factors.
        v: Eigenvectors of ``H``, or ``H⁻¹``, shape ``(..., B, B)``: constants.
        h: Eigenvalues of ``H``, shape ``(..., B)``: constants. Pairs of zeros have no derivative and contribute
            nothing. With ``H⁻¹``, shape ``(..., 1, 2)``: a factor by which it is divided, and the bound ``e`` that
            :func:`~fgo_geo.linalg.chebyshev.solve_skew` takes for the quotient.
        w: Directions, shape ``(..., A, B)``.

    Returns:
        Matrices of the shape of ``x``.

    Example:
        >>> x = torch.diag(torch.tensor([2.0, 1.0]))
        >>> polar_differential(x, torch.eye(2), torch.eye(2), x.diagonal(), torch.tensor([[5.0, -3.0], [0.0, 7.0]]))
        tensor([[ 0., -1.],
                [ 1.,  0.]])
    """
    v, h = v.detach(), h.detach()
    along = _product(q.mT, w)
    is_function = is_differentiated(x) or is_differentiated(q) or not reads_for_free(x)  # so that H is one, too
    hermitian = sym(_product(q.mT, x)) if is_function else v
    generator = apply(_SkewEquation, hermitian, along - along.mT, v, h)
    if q.shape[-2] == q.shape[-1]:
        return _product(q, generator)  # the rest is zero; its rounding errors, divided by a small h, would not be
    inverse = apply(_Inverse, hermitian, v, h)
    inside = generator - _product(along, inverse)
    # Where w is stored by columns, oneDNN would copy the symmetric inverse if that were not transposed as well.
    return _product(w, inverse.mT) + _product(q, inside)


def polar_differential_square(x: Tensor, q: Tensor, w: Tensor) -> Tensor:
    """:func:`polar_differential` of square matrices where no factorisation is at hand.

    Example:
        >>> x = torch.diag(torch.tensor([2.0, 1.0]))
        >>> polar_differential_square(x, torch.eye(2), torch.tensor([[5.0, -3.0], [0.0, 7.0]])).round(decimals=5)
        tensor([[ 0., -1.],
                [ 1.,  0.]])
    """
    return q @ _rotation(x, q, w).generator


def polar_differential_square_along(x: Tensor, q: Tensor, w: Tensor, x_t: Tensor, q_t: Tensor, w_t: Tensor) -> Tensor:
    """Derivative of :func:`polar_differential_square` along ``(x_t, q_t, w_t)``.

    Written out, since torch's own forward mode is not there inside of a forward derivative.

    Example:
        >>> x, zero = torch.diag(torch.tensor([2.0, 1.0])), torch.zeros(2, 2)
        >>> w = torch.tensor([[5.0, -3.0], [0.0, 7.0]])
        >>> polar_differential_square_along(x, torch.eye(2), w, x, zero, zero).round(decimals=5)
        tensor([[ 0.,  1.],
                [-1.,  0.]])
    """
    generator, hermitian, v, h = _rotation(x, q, w)
    hermitian_t = sym(q_t.mT @ x + q.mT @ x_t)
    right = 2 * skew(q_t.mT @ w + q.mT @ w_t) - hermitian_t @ generator - generator @ hermitian_t
    return q_t @ generator + q @ apply(_SkewEquation, hermitian, right, v, h)


class _Rotation(NamedTuple):
    """The skew ``L`` with which the polar factor moves by ``Q L``, and ``H`` with its eigenvectors and eigenvalues."""

    generator: Tensor
    hermitian: Tensor
    v: Tensor
    h: Tensor


def _rotation(x: Tensor, q: Tensor, w: Tensor) -> _Rotation:
    hermitian = sym(q.mT @ x)
    h, v = torch.linalg.eigh(hermitian.detach())
    h = h.clamp_min(0)
    return _Rotation(apply(_SkewEquation, hermitian, 2 * skew(q.mT @ w), v, h), hermitian, v, h)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b``; if it is computed at once, by the library that is faster."""
    return small_product(a, b) if reads_for_free(a) else a @ b


class _SkewEquation(torch.autograd.Function):
    """The skew solution of ``H L + L H = K`` for skew ``K``; the solution operator is self-adjoint."""

    generate_vmap_rule = True

    @staticmethod
    def forward(hermitian: Tensor, k: Tensor, v: Tensor, h: Tensor) -> Tensor:  # pyright: ignore
        if h.ndim == v.ndim:
            scale, spread = h.unbind(-1)
            return solve_skew(v / scale.unsqueeze(-1), k * scale.unsqueeze(-1), float(spread.amax()))
        turned = skew(_product(v.mT, _product(k, v)))  # a diagonal of zeros, before it is divided by h
        return _product(v, _product(divide_or_zero(turned, h.unsqueeze(-1) + h.unsqueeze(-2)), v.mT))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        hermitian, _, v, h = inputs
        save(ctx, hermitian, v, h, output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # pyright: ignore
        hermitian, v, h, solution = ctx.saved_tensors
        k = apply(_SkewEquation, hermitian, skew(grad), v, h)
        return k @ solution + solution @ k, k, None, None

    @staticmethod
    def push(ctx: Any, hermitian_t: Tensor | None, k_t: Tensor | None, *_: Any) -> Tensor:  # pyright: ignore
        hermitian, v, h, solution = ctx.saved_tensors
        right = torch.zeros_like(solution) if k_t is None else k_t
        if hermitian_t is not None:
            right = right - hermitian_t @ solution - solution @ hermitian_t
        return apply(_SkewEquation, hermitian, right, v, h)


class _Inverse(torch.autograd.Function):
    """``H⁻¹``, zero where ``H`` is."""

    generate_vmap_rule = True

    @staticmethod
    def forward(hermitian: Tensor, v: Tensor, h: Tensor) -> Tensor:  # pyright: ignore
        return v.clone() if h.ndim == v.ndim else _product(divide_or_zero(v, h.unsqueeze(-2)), v.mT)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        save(ctx, output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # pyright: ignore
        (inverse,) = ctx.saved_tensors
        return -inverse @ grad @ inverse, None, None

    @staticmethod
    def push(ctx: Any, hermitian_t: Tensor, *_: Any) -> Tensor:  # pyright: ignore
        (inverse,) = ctx.saved_tensors
        return -inverse @ hermitian_t @ inverse
