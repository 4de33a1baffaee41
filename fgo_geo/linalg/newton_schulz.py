"""The polar factor by matrix products alone, for matrices whose singular values are known to lie in an interval.

:func:`newton_schulz_schedule` turns the interval into a fixed number of iterations, known before any data is seen, and
:func:`polar_newton_schulz` runs them. Very close to one the first terms of a series do, :func:`polar_series`;
:func:`polish` is the one iteration that nearly orthonormal matrices need. Nothing here factorises a matrix, reads the
values of one or branches on them: what works for every matrix is in :mod:`~fgo_geo.linalg.factors`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fgo_geo.linalg.products import gram_excess, gram_matrix, small_product, subtract_product

__all__ = [
    "inverse_root_gap",
    "newton_schulz_schedule",
    "polar_newton_schulz",
    "polar_series",
    "polish",
    "series_limit",
]

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


def polar_newton_schulz(
    y: Tensor, excess: Tensor | float, schedule: tuple[float, ...], radius: float | Tensor = 1.0
) -> Tensor:
    r"""The polar factor of nearly orthonormal matrices by matrix products alone.

    Runs the scaled Newton-Schulz iteration on the ``B x B`` Gram matrix ``M = yᵀy / s²``::

        T = ρ (3 I - ρ² M) / 2,    Z <- Z T,    M <- M T T,    result y Z / s

    so the long side enters two products only. The scale ``s² = 1.05 (1 + excess)`` leaves head room for points that
    have drifted off the manifold; the Gram matrix is formed from ``y`` itself, so that the drift is corrected too.
    All ``B x B`` matrices are polynomials in ``M``: they commute.

    Args:
        y: Matrices with singular values in ``[1, sqrt(1 + excess)]`` times the radius, shape ``(..., A, B)``,
            ``A >= B``.
        excess: Bound per matrix, shape ``(...)``, or for all of them.
        schedule: Factors from :func:`newton_schulz_schedule`, for a bound at least as large as every ``excess``.
        radius: Factor of ``y`` and of the result; a tensor broadcasts against ``y``.

    Returns:
        Matrices with orthonormal columns times the radius, shape ``(..., A, B)``.

    Example:
        >>> y = torch.tensor([[1.0, 0.0], [0.0, 1.1]])
        >>> polar_newton_schulz(y, torch.tensor(0.21), newton_schulz_schedule(0.21, 1e-7)).round(decimals=6)
        tensor([[1., 0.],
                [0., 1.]])
    """
    bound = excess[..., None, None] if isinstance(excess, Tensor) else excess
    return small_product(y, _inverse_root_newton_schulz(gram_matrix(y) / radius**2, bound, schedule))


def _inverse_root_newton_schulz(gram: Tensor, excess: Tensor | float, schedule: tuple[float, ...]) -> Tensor:
    """``G^{-1/2}`` for eigenvalues in ``[1, 1 + excess]``, and some head room on either side."""
    top = _SAFETY * (1 + excess)
    gram = gram / top
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    inverse_root = identity
    for step, rho in enumerate(schedule):
        factor = torch.sub(identity * (1.5 * rho), gram, alpha=0.5 * rho**3)
        inverse_root = factor if step == 0 else small_product(inverse_root, factor)
        if step + 1 < len(schedule):
            gram = small_product(small_product(gram, factor), factor)
    return inverse_root * top**-0.5


def series_limit(precision: float, terms: int = 2) -> float:
    """The largest ``‖E‖`` for which the first terms of :func:`polar_series` reach a precision.

    The error is that of the first term left out, ``3 ‖E‖² / 8`` or ``5 ‖E‖³ / 16``.

    Args:
        precision: Accepted distance of the singular values from 1.
        terms: Powers of ``E``, one or two.

    Returns:
        A bound on ``‖E‖``.

    Example:
        >>> round(series_limit(2.0**-23), 4), round(series_limit(2.0**-23, terms=1), 5)
        (0.0073, 0.00056)
    """
    return (precision * 8 / 3) ** (1 / 2) if terms == 1 else (precision * 16 / 5) ** (1 / 3)


def polar_series(y: Tensor, radius: float | Tensor = 1.0) -> Tensor:
    """The polar factor of almost orthonormal matrices, ``y (I - E/2 + 3E²/8)`` with ``E = yᵀy / r² - I``.

    One product of size ``B`` beside the two with the long side.

    Args:
        y: Matrices whose ``E`` is at most :func:`series_limit`, shape ``(..., A, B)``, ``A >= B``.
        radius: Radius ``r`` by which ``y`` is scaled, broadcastable.

    Returns:
        Matrices with orthonormal columns times the radius, shape ``(..., A, B)``.

    Example:
        >>> polar_series(torch.tensor([[1.001], [0.0]], dtype=torch.float64)).round(decimals=8)
        tensor([[1.],
                [0.]], dtype=torch.float64)
    """
    return subtract_product(y, y, _series_gap(gram_excess(y, radius), 2))


def _series_gap(excess: Tensor, terms: int) -> Tensor:
    """``I - (I + E)^{-1/2}`` for small ``E``: ``E/2`` and, with two terms, ``- 3E²/8``."""
    half = 0.5 * excess
    return half if terms == 1 else subtract_product(half, half, 0.75 * excess)


def inverse_root_gap(excess: Tensor, norm: float) -> Tensor:
    r"""``I - (I + E)^{-1/2}`` for symmetric ``E`` by products alone.

    Eigenvalues are to lie in ``[0, ‖E‖]``; slightly negative ones, of points that have drifted off a manifold, come
    back as well. The norm says how many terms of the series, or how many Newton-Schulz iterations, reach the precision
    of the type.

    Args:
        excess: Symmetric matrices, shape ``(..., B, B)``.
        norm: Bound on their spectral norms.

    Returns:
        Symmetric matrices of the same shape.

    Example:
        >>> inverse_root_gap(torch.diag(torch.tensor([0.0, 3.0])), 3.0).round(decimals=5)
        tensor([[0.0000, 0.0000],
                [0.0000, 0.5000]])
    """
    precision = torch.finfo(excess.dtype).eps
    for terms in (1, 2):
        if norm <= series_limit(precision, terms):
            return _series_gap(excess, terms)
    identity = torch.eye(excess.shape[-1], dtype=excess.dtype, device=excess.device)
    return identity - _inverse_root_newton_schulz(excess + identity, norm, newton_schulz_schedule(norm, precision))


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
    return subtract_product(1.5 * y, y, 0.5 * gram_matrix(y))
