"""Closed forms for matrices with three columns, of which a network has millions.

The polar factor of 3 x 3 matrices and the spectral norm, elementwise over the batch in double precision, with their
derivatives. A formula belongs here if it takes neither a factorisation nor an iteration whose length depends on the
data; :func:`has_closed_form` says for which matrices there is one. :func:`~fgo_geo.linalg.polar_factor`, for matrices
of every shape, is in :mod:`~fgo_geo.linalg.factors`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fgo_geo.linalg.polar_derivative import polar_differential_square, polar_differential_square_along
from fgo_geo.linalg.products import divide_or_zero
from fgo_geo.linalg.smooth import apply, save
from fgo_geo.linalg.values import reads_for_free

__all__ = ["has_closed_form", "polar_factor_3", "spectral_norm_3"]


def has_closed_form(x: Tensor) -> bool:
    """Whether matrices have three columns, in a type for which double precision is precision to spare."""
    return x.shape[-1] == 3 and x.dtype == torch.float32 and x.device.type != "mps"  # which has no float64


def polar_factor_3(x: Tensor) -> Tensor:
    """The orthonormal polar factor of 3 x 3 matrices in single precision, in closed form.

    :func:`~fgo_geo.linalg.polar_factor` asks :func:`has_closed_form` and comes here: call that one.

    Args:
        x: Matrices in single precision, shape ``(..., 3, 3)``.

    Returns:
        Orthogonal matrices of the same shape.

    Example:
        >>> polar_factor_3(torch.diag(torch.tensor([2.0, -3.0, 0.5])))
        tensor([[ 1.,  0.,  0.],
                [ 0., -1.,  0.],
                [ 0.,  0.,  1.]])
    """
    return apply(_PolarFactor3, x)[0]


def _cofactors(y: Tensor) -> Tensor:
    """Cofactor matrices of 3 x 3 matrices whose entries come first, shape ``(3, 3, ...)``."""
    rows = [row.unbind() for row in y.unbind()]
    turned = ((1, 2), (2, 0), (0, 1))
    minors = [
        torch.addcmul(rows[j][k] * rows[m][n], rows[j][n], rows[m][k], value=-1) for j, m in turned for k, n in turned
    ]  # from some 4,000 matrices on two to three times as fast as torch.linalg.cross, for few of them slower
    return torch.stack(minors).view_as(y)


_FLAT = 2.0**-27  # a matrix is flat when all 2 x 2 minors are below this, relative to its squared norm
_LIFT = 2.0**-24  # flat matrices move by this multiple of the identity: by less than the rounding of their entries
_NEWTON_STEPS = 4  # from a start within a factor √3, quadratic with a constant below 1/9: 1e-16


def _polar_3(y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    r"""Polar factors of 3 x 3 matrices of unit norm, with ``i₂`` and ``Δ``; entries come first, shape ``(3, 3, ...)``.

    Let ``i₁, i₂, i₃`` be the elementary symmetric functions of the singular values and ``s = sign(det y)``. In the
    basis of singular vectors one checks::

        Q = ( i₂ y + s i₁ cof y + M ) / Δ,    Δ = i₁ i₂ - i₃ = (σ₁ + σ₂)(σ₁ + σ₃)(σ₂ + σ₃)

    with ``M = cof(y + cof y) - cof y - cof cof y``, whose singular values are ``σ₁(σ₂² + σ₃²)`` and so on. All terms of
    a singular value are positive, so only ``σ₂ + σ₃ > 0`` is needed: rank two. The invariants are ``i₃ = |det y|``,
    ``i₂² = ‖cof y‖² + 2 i₃ i₁`` and ``i₁² = ‖y‖² + 2 i₂``; the last two are one equation for ``i₁`` with a concave
    right-hand side, which Newton's method solves from above. (Higham and Noferini 2016 solve the same problem with
    quaternions.)
    """
    cofactors = _cofactors(y)
    flat = cofactors.square().sum((0, 1)) <= _FLAT**2
    if not reads_for_free(y) or bool(flat.any()):
        y = y + _identity_3(torch.where(flat, _LIFT, 0.0).to(y.dtype))
        cofactors = _cofactors(y)
    twice = _cofactors(cofactors)  # det(y) y, without the cancellation of the determinant itself
    squares, minors = y.square().sum((0, 1)), cofactors.square().sum((0, 1))
    determinant = (y * twice).sum((0, 1)) / squares
    i3 = determinant.abs()
    i1 = (3 * squares).sqrt()
    for _ in range(_NEWTON_STEPS):
        i2 = (minors + 2 * i3 * i1).sqrt()
        image = (squares + 2 * i2).sqrt()
        i1 = i1 - (i1 - image) / (1 - i3 / (image * i2))
    i2 = (minors + 2 * i3 * i1).sqrt()
    delta = i1 * i2 - i3
    sign = torch.where(determinant < 0, -1.0, 1.0)
    numerator = (i2 * y).add_((sign * i1 - 1) * cofactors).add_(_cofactors(y + cofactors)).sub_(twice)
    return numerator.div_(delta), i2, delta


class _PolarFactor3(torch.autograd.Function):
    """Returns ``(Q, i₂, Δ)`` of ``x / ‖x‖``, differentiable in Q alone."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # pyright: ignore
        y = x.double().movedim((-2, -1), (0, 1)).contiguous()
        q, i2, delta = _polar_3(y / _norm_or_one(y, (0, 1)))
        return q.movedim((0, 1), (-2, -1)).to(x.dtype, memory_format=torch.contiguous_format), i2, delta

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        q, i2, delta = output
        ctx.mark_non_differentiable(i2, delta)
        save(ctx, inputs[0], q, i2, delta)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> Tensor:  # pyright: ignore
        return apply(_PolarDerivative3, *ctx.saved_tensors, grad)

    @staticmethod
    def push(ctx: Any, tangent: Tensor) -> tuple[Tensor, None, None]:
        return apply(_PolarDerivative3, *ctx.saved_tensors, tangent), None, None


class _PolarDerivative3(torch.autograd.Function):
    """The derivative of :class:`_PolarFactor3`, backward and forward; its own derivatives are those of all matrices."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, q: Tensor, i2: Tensor, delta: Tensor, w: Tensor) -> Tensor:  # pyright: ignore
        # dQ = Q [l]ₓ with (tr(H) I - H) l = the axial vector of Qᵀ dX - dXᵀ Q, where x = Q H. The inverse
        # of tr(H) I - H, which has the eigenvalues σⱼ + σₖ, is (H² + i₂ I) / Δ, and H² = xᵀx.
        x, q = x.double(), q.double()
        size = _norm_or_one(x, (-2, -1))
        y = x / size
        axis = torch.linalg.cross(w.double(), q, dim=-1).sum(-2).unsqueeze(-1)
        axis = (y.mT @ (y @ axis) + i2[..., None, None] * axis) / (delta[..., None, None] * size)
        return torch.linalg.cross(q, axis.mT.expand_as(q), dim=-1).to(w.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, q, _, _, w = inputs
        save(ctx, x, q, w)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # pyright: ignore
        pull: Any = torch.func.vjp(_derivative_in_double, *ctx.saved_tensors)[1]
        of_x, of_q, of_w = pull(grad)
        return of_x, of_q, None, None, of_w

    @staticmethod
    def push(ctx: Any, x_t: Tensor | None, q_t: Tensor | None, _: Any, __: Any, w_t: Tensor | None) -> Tensor:
        at = ctx.saved_tensors
        tangents = [torch.zeros_like(a) if t is None else t for a, t in zip(at, (x_t, q_t, w_t), strict=True)]
        along = polar_differential_square_along(*(value.double() for value in (*at, *tangents)))
        return along.to(at[2].dtype)


def _derivative_in_double(x: Tensor, q: Tensor, w: Tensor) -> Tensor:
    return polar_differential_square(x.double(), q.double(), w.double()).to(w.dtype)


def _norm_or_one(x: Tensor, dim: tuple[int, int]) -> Tensor:
    norm = x.square().sum(dim, keepdim=True).sqrt()
    return torch.where(norm > 0, norm, 1)


def spectral_norm_3(x: Tensor) -> Tensor:
    r"""Largest singular value of float32 matrices with three columns, in closed form.

    The largest root of the characteristic polynomial of the Gram matrix ``G = xᵀx``, by the trigonometric solution of
    the cubic (Smith 1961), elementwise in double precision. Where the largest singular value is repeated, the
    derivative is an average of those of its singular vectors.

    Args:
        x: Matrices in single precision, shape ``(..., A, 3)``.

    Returns:
        Norms of shape ``(...)``.

    Raises:
        ValueError: If there are not three columns in single precision.

    Example:
        >>> spectral_norm_3(torch.diag(torch.tensor([1.0, -3.0, 2.0])))
        tensor(3.)
    """
    if not has_closed_form(x):
        raise ValueError(
            f"spectral_norm_3 takes float32 matrices with three columns, got {x.dtype} of shape {tuple(x.shape)} on "
            f"{x.device}; use torch.linalg.matrix_norm(x, 2)"
        )
    return _SpectralNorm3.apply(x)[0]  # pyright: ignore


def _gram_3(x: Tensor) -> Tensor:
    """Gram matrices in double precision, entries first: shape ``(3, 3, ...)``."""
    x = x.double()
    return (x.mT @ x).movedim((-2, -1), (0, 1)).contiguous()


def _identity_3(values: Tensor) -> Tensor:
    """Multiples of the identity, entries first: ``(...)`` to ``(3, 3, ...)``."""
    identity = torch.eye(3, dtype=values.dtype, device=values.device)
    return identity.reshape(3, 3, *(1,) * values.ndim) * values


class _SpectralNorm3(torch.autograd.Function):
    """Returns ``(σ, σ²)``, differentiable in ``σ`` alone, ``σ²`` in double precision."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore
        gram = _gram_3(x)
        mean = (gram[0, 0] + gram[1, 1] + gram[2, 2]) / 3
        deviation = gram - _identity_3(mean)
        spread = (deviation.square().sum((0, 1)) / 6).sqrt()
        deviation = deviation / torch.where(spread > 0, spread, 1)
        cosine = (deviation[0] * torch.linalg.cross(deviation[1], deviation[2], dim=0)).sum(0) / 2
        largest = mean + 2 * spread * torch.cos(torch.acos(cosine.clamp(-1, 1)) / 3)
        return largest.sqrt().to(x.dtype), largest

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(inputs[0], output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> Tensor:  # pyright: ignore
        return _SpectralPullback3.apply(*ctx.saved_tensors, grad)  # pyright: ignore


class _SpectralPullback3(torch.autograd.Function):
    """The derivative of :class:`_SpectralNorm3`, ``x v vᵀ / σ``."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, largest: Tensor, grad: Tensor) -> Tensor:  # pyright: ignore
        # v vᵀ is (μ I - xᵀx)⁻¹ / trace for μ just above the largest eigenvalue; equal eigenvalues are averaged.
        resolvent = _cofactors(_identity_3(largest * (1 + 2.0**-25)) - _gram_3(x))
        trace = resolvent[0, 0] + resolvent[1, 1] + resolvent[2, 2]
        weight = divide_or_zero(resolvent, trace * largest.sqrt()).movedim((0, 1), (-2, -1))
        return (grad[..., None, None] * (x.double() @ weight)).to(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:  # pyright: ignore
        raise RuntimeError("spectral_norm_3 has a first derivative only; use torch.linalg.matrix_norm(x, 2)")
