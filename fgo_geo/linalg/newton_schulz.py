"""The polar factor by matrix products alone, for matrices whose singular values are in a known interval.

The polar factor of ``y`` is ``y - y H`` with ``H = I - (yᵀy)^{-1/2}``, which :func:`inverse_root_gap` computes: where
singular values are close to one by the first terms of a series, else by Newton-Schulz iterations, whose number and
factors :func:`newton_schulz_schedule` computes from the interval before any data is seen. :func:`polish` is the single
iteration that nearly orthonormal matrices need. Nothing here factorises a matrix, reads values or branches on them;
functions for every matrix are in :mod:`~fgo_geo.linalg.factors`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fgo_geo.linalg.products import gram_excess, small_product, subtract_product

__all__ = [
    "inverse_root_gap",
    "newton_schulz_schedule",
    "polish",
    "refine_gap",
    "series_limit",
    "unrefined_precision",
]

_REFINED = 1.01  # norm of E up to which refine_gap improves the accuracy: a step of one radius, and some drift
_SAFETY = 1.05  # margin for points that have drifted off the manifold


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
        A step of spectral norm 0.414 needs three iterations in single precision, or two and :func:`refine_gap`.

        >>> len(newton_schulz_schedule(0.4142**2, 2.0**-23))
        3
        >>> len(newton_schulz_schedule(0.4142**2, unrefined_precision(2.0**-23)))
        2
    """
    factors: list[float] = []
    low = 1 / math.sqrt(_SAFETY * (1 + excess))
    while 1 - low > max(precision, 2.0**-50):
        rho = math.sqrt(3 / (1 + low + low * low))
        low = rho * low * (3 - (rho * low) ** 2) / 2
        factors.append(rho)
    return tuple(factors)


def _newton_schulz_gap(excess: Tensor, bound: float, out: Tensor | None = None) -> Tensor:
    r"""``I - (I + E)^{-1/2}`` for eigenvalues of ``E`` in ``[0, bound]``, with a margin on either side.

    Runs the scaled iteration on ``M = (I + E) / s²`` with ``s² = 1.05 (1 + bound)``::

        T = ρ (3 I - ρ² M) / 2,    Z <- Z T,    M <- M T T,    result I - Z / s

    All matrices are polynomials in ``E``: they commute.
    """
    precision = torch.finfo(excess.dtype).eps
    refine = bound <= _REFINED
    schedule = newton_schulz_schedule(bound, unrefined_precision(precision) if refine else precision)
    top = _SAFETY * (1 + bound)
    identity = torch.eye(excess.shape[-1], dtype=excess.dtype, device=excess.device)
    gram = (excess + identity) / top
    inverse_root = identity
    for step, rho in enumerate(schedule):
        factor = torch.sub(identity * (1.5 * rho), gram, alpha=0.5 * rho**3)
        inverse_root = factor if step == 0 else small_product(inverse_root, factor)
        if step + 1 < len(schedule):
            gram = small_product(small_product(gram, factor), factor)
    if not refine:
        return torch.sub(identity, inverse_root * top**-0.5, out=out)
    return refine_gap(excess, identity - inverse_root * top**-0.5, out=out)


def refine_gap(excess: Tensor, gap: Tensor, *, out: Tensor | None = None) -> Tensor:
    r"""Newton's step for ``Z = (I + E)^{-1/2}``, ``Z <- Z (I + R/2)`` with ``R = I - Z (I + E) Z``, for ``H = I - Z``.

    In terms of ``H`` and ``E``, ``R = K - E + K E`` for ``K = 2 H - H²``, all terms are small, whereas rounding errors
    of products with ``Z``, whose diagonal is near one, are relative to one. That helps up to ``‖E‖``
    of about one. An error ``ε`` of the singular values of ``y Z`` becomes ``3 ε² / 2``.

    Args:
        excess: Symmetric matrices ``E``, shape ``(..., B, B)``.
        gap: Approximations of ``H`` that commute with them.
        out: Where to put the result; it shares no memory with the others.

    Returns:
        Symmetric matrices of the same shape.

    Example:
        >>> refine_gap(torch.tensor([[3.0]]), torch.tensor([[0.49]]))
        tensor([[0.5003]])
    """
    k = subtract_product(gap, gap, gap, beta=2.0)
    rest = subtract_product(k - excess, k, excess, alpha=-1.0)
    return subtract_product(torch.sub(gap, rest, alpha=0.5), gap, rest, alpha=-0.5, out=out)


def unrefined_precision(precision: float) -> float:
    """The precision ``ε`` of a schedule after which :func:`refine_gap` reaches a precision, ``3 ε² / 2``.

    Example:
        >>> round(unrefined_precision(2.0**-23), 5)
        0.00028
    """
    return math.sqrt(2 * precision / 3)


_SERIES = (1 / 2, -3 / 8, 5 / 16, -35 / 128, 63 / 256)  # of 1 - (1 + e)^(-1/2), from the first power on


def series_limit(precision: float, terms: int = 2) -> float:
    """The largest ``‖E‖`` for which the first terms of the series of ``(I + E)^{-1/2}`` reach a precision.

    The error is about the first omitted term: ``3 ‖E‖² / 8``, ``5 ‖E‖³ / 16``, ..., ``63 ‖E‖⁵ / 256``.

    Args:
        precision: Accepted distance of the singular values from 1.
        terms: Powers of ``E``, up to four.

    Returns:
        A bound on ``‖E‖``.

    Example:
        >>> [round(series_limit(2.0**-23, terms), 5) for terms in (1, 2, 4)]
        [0.00056, 0.00725, 0.05458]
    """
    return (precision / abs(_SERIES[terms])) ** (1 / (terms + 1))


def _series_gap(excess: Tensor, terms: int, out: Tensor | None = None) -> Tensor:
    """``I - (I + E)^{-1/2}`` for small ``E``, by one, two or four terms of its series: none, one or two products."""
    first, second, third, fourth = _SERIES[:4]
    if terms == 1:
        return torch.mul(excess, first, out=out)
    if terms == 2:
        return subtract_product(excess, excess, excess, beta=first, alpha=-second, out=out)
    square = small_product(excess, excess)
    tail = torch.add(third * excess, square, alpha=fourth)
    return subtract_product(torch.add(first * excess, square, alpha=second), square, tail, alpha=-1.0, out=out)


def inverse_root_gap(excess: Tensor, norm: float, *, out: Tensor | None = None) -> Tensor:
    r"""``I - (I + E)^{-1/2}`` for symmetric ``E`` by products alone.

    Eigenvalues are in ``[0, ‖E‖]``; slightly negative ones, of points that have drifted off a manifold, are corrected
    as well. The norm selects what reaches the precision of the type with the fewest products: one, two or four terms of
    the series (none, one or two products; in single precision up to ``‖E‖`` of 0.0006, 0.007 and 0.05), four terms and
    :func:`refine_gap` (five; 0.26), or Newton-Schulz iterations.

    Args:
        excess: Symmetric matrices, shape ``(..., B, B)``.
        norm: Bound on their spectral norms.
        out: Where to put the result; it shares no memory with ``excess``.

    Returns:
        Symmetric matrices of the same shape.

    Example:
        >>> inverse_root_gap(torch.diag(torch.tensor([0.0, 3.0])), 3.0).round(decimals=5)
        tensor([[0.0000, 0.0000],
                [0.0000, 0.5000]])
    """
    precision = torch.finfo(excess.dtype).eps
    for terms in (1, 2, 4):
        if norm <= series_limit(precision, terms):
            return _series_gap(excess, terms, out)
    if norm <= series_limit(unrefined_precision(precision), 4):
        return refine_gap(excess, _series_gap(excess, 4), out=out)
    return _newton_schulz_gap(excess, norm, out)


def polish(y: Tensor) -> Tensor:
    """One Newton-Schulz step, ``y - y (yᵀy - I) / 2``: an error ``ε`` of the singular values becomes ``3 ε² / 2``.

    Args:
        y: Nearly orthonormal matrices, shape ``(..., A, B)``, ``A >= B``.

    Returns:
        Matrices of the same shape with columns closer to orthonormal.

    Example:
        >>> polish(torch.tensor([[1.001], [0.0]], dtype=torch.float64))
        tensor([[1.0000],
                [0.0000]], dtype=torch.float64)
    """
    return subtract_product(y, y, gram_excess(y), alpha=0.5)
