"""Batched tensor algebra: the few matrix functions that the manifolds are built from.

Nothing here knows what a manifold is. There are three kinds of function:

* *guards*: :func:`computes_in_float32` and :func:`require_finite` decide, in one place, what happens to half precision
  and to NaN;
* *exact factors*: :func:`polar_factor` and :func:`qr_factor` work for every matrix and cost a factorisation;
* *the cheap factor*: :func:`polar_newton_schulz` reaches the same polar factor by matrix products alone, for matrices
  whose singular values are known to lie in a given interval. :func:`newton_schulz_schedule` turns that interval
  into a fixed number of iterations, and :func:`polish` is the one iteration that nearly orthonormal matrices need.

All functions act on the last two dimensions and batch over the rest.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

__all__ = [
    "computes_in_float32",
    "newton_schulz_schedule",
    "polar_factor",
    "polar_newton_schulz",
    "polish",
    "qr_factor",
    "require_finite",
    "sym",
]

_P = ParamSpec("_P")
_R = TypeVar("_R")

_HALF = (torch.float16, torch.bfloat16)


def computes_in_float32(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Compute half-precision arguments in float32 and round the result once.

    If any tensor argument is ``float16`` or ``bfloat16``, all such arguments are upcast, the function runs in
    float32 and its tensor results (one tensor or a tuple) are rounded to the type that the arguments promote to.
    Autocast is switched off inside, so that products of float32 matrices stay float32. Arguments of
    other types pass unchanged and cost nothing.

    Example:
        >>> @computes_in_float32
        ... def square(x):
        ...     assert x.dtype == torch.float32
        ...     return x * x
        >>> square(torch.tensor([3.0], dtype=torch.bfloat16))
        tensor([9.], dtype=torch.bfloat16)
    """

    @functools.wraps(function)
    def wrapper(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
        if not tensors:
            return function(*args, **kwargs)
        device = tensors[0].device.type
        if device != "meta" and torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                return wrapper(*args, **kwargs)
        floating = [t.dtype for t in tensors if t.is_floating_point()]
        if not any(dtype in _HALF for dtype in floating):
            return function(*args, **kwargs)
        target = functools.reduce(torch.promote_types, floating)
        call: Callable[..., Any] = function
        result = call(*map(_upcast, args), **{k: _upcast(v) for k, v in kwargs.items()})
        if isinstance(result, tuple):
            return tuple(_round(r, target) for r in result)  # type: ignore[return-value]
        return _round(result, target)

    # torch.compile counts recompilations per code object: every function needs its own.
    own: Any = wrapper
    own.__code__ = own.__code__.replace(co_name=function.__name__)
    return wrapper


def _upcast(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in _HALF else value


def _round(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor) and value.dtype == torch.float32:
        return value.to(dtype)
    return value


def require_finite(x: Tensor, what: str) -> None:
    """Raise if a tensor holds NaN or infinity.

    Reads the tensor on the host, so it has no place in an optimiser's step. Inside ``torch.compile`` it becomes
    a device-side assertion.

    Args:
        x: Any tensor.
        what: Name of the tensor, for the message.

    Raises:
        ValueError: With the number of non-finite entries.

    Example:
        >>> require_finite(torch.tensor([1.0, float("nan")]), "the weight")
        Traceback (most recent call last):
            ...
        ValueError: the weight has 1 non-finite entry of 2 (shape (2,)); replace NaN and infinity first, e.g. with...
    """
    finite = torch.isfinite(x)
    if torch.compiler.is_compiling():
        message = f"{what} has non-finite entries"
        torch._assert_async(finite.all(), message)  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
        return
    if not bool(finite.all()):
        bad = int((~finite).sum())
        entries = "entry" if bad == 1 else "entries"
        raise ValueError(
            f"{what} has {bad} non-finite {entries} of {x.numel()} (shape {tuple(x.shape)}); "
            "replace NaN and infinity first, e.g. with torch.nan_to_num"
        )


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


def polar_factor(x: Tensor) -> Tensor:
    r"""The orthonormal polar factor, the nearest matrix with orthonormal columns.

    With the singular value decomposition ``x = U S Vᵀ`` it is ``U Vᵀ``. It is defined for every finite matrix (for
    rank-deficient ones it is one of the nearest points). The derivative is that of the polar decomposition itself,
    so it is finite at repeated singular values, where differentiating the decomposition is not.

    Args:
        x: Matrices with ``A >= B``, shape ``(..., A, B)``.

    Returns:
        Matrices with orthonormal columns, shape ``(..., A, B)``.

    Example:
        >>> polar_factor(torch.tensor([[3.0, 0.0], [0.0, 0.5], [0.0, 0.0]]))
        tensor([[1., 0.],
                [0., 1.],
                [0., 0.]])
    """
    factor, _, _ = _PolarFactor.apply(x)  # pyright: ignore
    return factor


class _PolarFactor(torch.autograd.Function):
    """``x = Q H`` with ``H = V diag(h) Vᵀ``; returns ``(Q, V, h)``, differentiable in Q alone."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # pyright: ignore
        u, h, vh = torch.linalg.svd(x, full_matrices=False)
        return u @ vh, vh.mT.contiguous(), h

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        q, v, h = output
        ctx.mark_non_differentiable(v, h)
        ctx.save_for_backward(q, v, h)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> Tensor:  # pyright: ignore
        return _PolarPullback.apply(*ctx.saved_tensors, grad)  # pyright: ignore


class _PolarPullback(torch.autograd.Function):
    """The derivative of :class:`_PolarFactor`; a function of its own in order to refuse the second derivative."""

    generate_vmap_rule = True

    @staticmethod
    def forward(q: Tensor, v: Tensor, h: Tensor, grad: Tensor) -> Tensor:  # pyright: ignore
        # dQ = Q L + (I - Q Qᵀ) dX H⁻¹ with H L + L H = Qᵀ dX - dXᵀ Q; below is the adjoint of this map,
        # in the eigenbasis of H. Pairs of zero singular values have no derivative and contribute nothing.
        along = q.mT @ grad
        sums = h.unsqueeze(-1) + h.unsqueeze(-2)
        skew = v.mT @ (along - along.mT) @ v
        rotation = v @ _divide_or_zero(skew, sums) @ v.mT
        across = (grad - q @ along) @ v
        return q @ rotation + _divide_or_zero(across, h.unsqueeze(-2)) @ v.mT

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:  # pyright: ignore
        raise RuntimeError(
            "polar_factor has a first derivative only; for second derivatives compute the Gram matrix's inverse root "
            "with torch.linalg.eigh"
        )


def _divide_or_zero(a: Tensor, b: Tensor) -> Tensor:
    return torch.where(b > 0, a / torch.where(b > 0, b, 1), 0)


_SAFETY = 1.05  # head room for points that have drifted off the manifold


def newton_schulz_schedule(excess: float, precision: float) -> tuple[float, ...]:
    r"""Scale factors of the Newton-Schulz iteration for Gram matrices with eigenvalues in ``[1, 1 + excess]``.

    One step maps a singular value ``s`` to ``ρ s (3 - ρ² s²) / 2``. On ``[l, 1]`` the choice ``ρ² = 3 / (1 + l + l²)``
    (Chen and Chow 2014) makes the images of both ends equal and their common value the new ``l``. The schedule stops
    when ``1 - l`` is below the precision: its length is the number of iterations, known before any data is seen.

    Args:
        excess: Bound on the squared spectral norm of the tangent step on the unit manifold.
        precision: Accepted distance of the singular values from 1, e.g. ``torch.finfo(dtype).eps``.

    Returns:
        One factor ``ρ`` per iteration.

    Example:
        A step of spectral norm 0.414 needs three iterations in single precision.

        >>> len(newton_schulz_schedule(0.4142**2, 2.0**-23))
        3
    """
    factors: list[float] = []
    low = 1 / math.sqrt(_SAFETY * (1 + excess))
    while 1 - low > max(precision, 2.0**-50):
        rho = math.sqrt(3 / (1 + low + low * low))
        low = rho * low * (3 - (rho * low) ** 2) / 2
        factors.append(rho)
    return tuple(factors)


def polar_newton_schulz(y: Tensor, excess: Tensor, schedule: tuple[float, ...]) -> Tensor:
    r"""The polar factor of nearly orthonormal matrices by matrix products alone.

    Runs the scaled Newton-Schulz iteration on the ``B x B`` Gram matrix ``M = yᵀy / s²``::

        T = ρ (3 I - ρ² M) / 2,    Z <- Z T,    M <- T M T,    result y Z / s

    so the long side enters two products only. The scale ``s² = 1.05 (1 + excess)`` leaves head room for points that
    have drifted off the manifold; the Gram matrix is formed from ``y`` itself, so that the drift is corrected too.

    Args:
        y: Matrices with singular values in ``[1, sqrt(1 + excess)]``, shape ``(..., A, B)``, ``A >= B``.
        excess: Bound per matrix, shape ``(...)``.
        schedule: Factors from :func:`newton_schulz_schedule`, for a bound at least as large as every ``excess``.

    Returns:
        Matrices with orthonormal columns, shape ``(..., A, B)``.

    Example:
        >>> y = torch.tensor([[1.0, 0.0], [0.0, 1.1]])
        >>> polar_newton_schulz(y, torch.tensor(0.21), newton_schulz_schedule(0.21, 1e-7)).round(decimals=6)
        tensor([[1., 0.],
                [0., 1.]])
    """
    top = _SAFETY * (1 + excess)[..., None, None]
    gram = y.mT @ y / top
    identity = torch.eye(y.shape[-1], dtype=y.dtype, device=y.device)
    inverse_root = identity
    for step, rho in enumerate(schedule):
        factor = identity * (1.5 * rho) - gram * (0.5 * rho**3)
        inverse_root = factor if step == 0 else inverse_root @ factor
        if step + 1 < len(schedule):
            gram = factor @ gram @ factor
    return y @ (inverse_root * top.rsqrt())


def polish(y: Tensor) -> Tensor:
    """One Newton-Schulz step, ``y (3 I - yᵀy) / 2``: an error ``ε`` of the singular values becomes ``3 ε² / 2``.

    Args:
        y: Nearly orthonormal matrices, shape ``(..., A, B)``, ``A >= B``.

    Returns:
        Matrices of the same shape with columns closer to orthonormal.

    Example:
        >>> polish(torch.tensor([[1.001], [0.0]], dtype=torch.float64))
        tensor([[1.0000],
                [0.0000]], dtype=torch.float64)
    """
    return 1.5 * y - y @ (0.5 * (y.mT @ y))
