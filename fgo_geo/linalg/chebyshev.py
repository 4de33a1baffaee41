r"""Chebyshev approximation of matrix functions, for symmetric matrices with eigenvalues in a narrow interval.

For eigenvalues ``1 + t``, ``|t| <= e < 1``, both ``(I + T)^{-1/2}`` and the solution of ``Z L + L Z = K`` with
``Z = (I + T)^{-1/2}`` are limits of polynomials in ``T``, whose errors shrink by a known factor with every degree. The
degree follows from ``e`` alone, so the functions use matrix products only, without any test of convergence.
:func:`spectral_interval` finds the interval by a few products with a vector.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fgo_geo.linalg.products import commuting_product, skew, small_product, sym

__all__ = ["inverse_root_polynomial", "polynomial", "solve_skew", "spectral_interval"]

_STEPS = 14  # of Lanczos' iteration
_MARGIN = 0.05  # of the length that is found, added at either end


def spectral_interval(a: Tensor) -> tuple[float, float]:
    """An interval that holds the eigenvalues of symmetric matrices, by Lanczos' iteration.

    From a random vector it finds the ends to about 2 % of the length, wherever the eigenvalues are (Kuczynski and
    Wozniakowski 1992); the result is 5 % longer at either end. An eigenvalue whose eigenvector is nearly orthogonal to
    the start, by less than 1e-5, can be missed. Reads values on the host.

    Args:
        a: Symmetric matrices, shape ``(..., B, B)``.

    Returns:
        The ends, of the interval for all matrices; NaN if entries are not finite.

    Example:
        >>> low, high = spectral_interval(torch.diag(torch.tensor([-1.0, 0.5, 2.0])))
        >>> round(low, 5), round(high, 5)
        (-1.15, 2.15)
    """
    size = a.shape[-1]
    start = torch.randn(size, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    v = (start / start.norm()).to(a).expand(*a.shape[:-1], 1)
    basis = v.new_zeros(*a.shape[:-1], min(_STEPS, size))
    lanczos = v.new_zeros(*a.shape[:-2], basis.shape[-1], basis.shape[-1])
    for step in range(basis.shape[-1]):
        basis[..., step : step + 1] = v
        known = basis[..., : step + 1]
        w = a @ v
        along = known.mT @ w
        lanczos[..., : step + 1, step : step + 1] = along
        w = w - known @ along
        w = w - known @ (known.mT @ w)  # orthogonal to rounding, also where little is left
        v = w / torch.linalg.vector_norm(w, dim=-2, keepdim=True).clamp_min(torch.finfo(a.dtype).tiny)
    if not bool(lanczos.isfinite().all()):
        return math.nan, math.nan
    values = torch.linalg.eigvalsh(lanczos.cpu().double(), UPLO="U")
    low, high = float(values[..., 0].amin()), float(values[..., -1].amax())
    margin = _MARGIN * (high - low)
    return low - margin, high + margin


def _rate(spread: float) -> float:
    """The factor by which each degree reduces the error of a polynomial for ``(1 + t)^{-1/2}``, ``|t| <= e``."""
    return spread / (1 + math.sqrt(1 - spread**2))


def inverse_root_polynomial(spread: float, precision: float) -> tuple[float, ...]:
    """Coefficients, from the constant on, of a polynomial for ``(1 + t)^{-1/2}`` on ``|t| <= e``.

    Args:
        spread: The bound ``e``, below one.
        precision: Accepted error, relative to the value.

    Returns:
        The coefficients, of the highest degree that takes no more products than needed.

    Example:
        >>> [len(inverse_root_polynomial(spread, 1e-7)) - 1 for spread in (1e-5, 0.01, 0.1, 0.3, 0.6)]
        [1, 4, 6, 9, 16]
    """
    spread = max(spread, precision)
    needed = math.log(precision) / math.log(_rate(spread)) - 1
    degree = next(block * count for block, count in map(_blocks, itertools.count()) if block * count >= needed)
    return _interpolated(spread, degree)


def _blocks(products: int) -> tuple[int, int]:
    """The highest power that so many products form, and the number of its powers in the polynomial."""
    return (products + 2) // 2, (products + 3) // 2


def _interpolated(spread: float, degree: int) -> tuple[float, ...]:
    def root(t: Any) -> Any:
        return (1 + spread * t) ** -0.5

    at_nodes = np.polynomial.chebyshev.chebinterpolate(root, degree)
    coefficients = np.zeros(degree + 1)
    known = np.polynomial.chebyshev.cheb2poly(at_nodes)  # without zeros at the end
    coefficients[: len(known)] = known
    return tuple(float(c) / spread**k for k, c in enumerate(coefficients))


def polynomial(t: Tensor, coefficients: Sequence[float]) -> Tensor:
    """A polynomial of matrices without its constant, in about ``2 √degree`` products (Paterson and Stockmeyer 1973).

    Args:
        t: Symmetric matrices, shape ``(..., B, B)``.
        coefficients: As :func:`inverse_root_polynomial` returns them, from the constant on.

    Returns:
        Matrices of the same shape.

    Example:
        >>> polynomial(torch.tensor([[2.0]]), (9.0, 1.0, 0.0, 0.0, 1.0))
        tensor([[18.]])
    """
    degree = len(coefficients) - 1
    block, count = next(sizes for sizes in map(_blocks, range(degree)) if math.prod(sizes) == degree)
    powers = [t]
    for _ in range(block - 1):
        powers.append(commuting_product(powers[-1], t))
    total = powers[-1] * coefficients[-1]
    for start in range((count - 1) * block, -1, -block):
        if start < (count - 1) * block:
            total = commuting_product(powers[-1], total)
        for power, coefficient in zip(powers, coefficients[start + 1 : start + block], strict=False):
            total.add_(power, alpha=coefficient)
        if start > 0:
            total.diagonal(dim1=-2, dim2=-1).add_(coefficients[start])
    return total


def solve_skew(z: Tensor, k: Tensor, spread: float) -> Tensor:
    """The skew solution of ``H L + L H = K`` for ``H = Z^{-1}``, by Chebyshev's semi-iteration (Saad 2003, 12.3).

    With a symmetric ``S``, ``L = Z (K / 2 + S)`` is the solution if it is skew, that is if
    ``Z S + S Z = (K Z - Z K) / 2``. The iteration for ``S`` starts from a small right-hand side, has eigenvalues in
    twice the interval of those of ``Z``, and computes ``Z S`` on its way. So the number of its steps, with one product
    each, follows from the interval and the precision of the type.

    Args:
        z: Symmetric matrices ``Z`` with eigenvalues ``(1 + t)^{-1/2}``, ``|t| <= e``, shape ``(..., B, B)``.
        k: Skew matrices, shape ``(..., B, B)``.
        spread: The bound ``e``, below one.

    Returns:
        Skew matrices, shape ``(..., B, B)``.

    Example:
        >>> h, k = torch.tensor([1.25, 0.75]), torch.tensor([[0.0, 2.0], [-2.0, 0.0]])
        >>> solve_skew(torch.diag(1 / h), k, 0.6).round(decimals=5)
        tensor([[ 0.,  1.],
                [-1.,  0.]])
    """
    precision = torch.finfo(z.dtype).eps
    spread = max(spread, precision)
    low, high = (1 + spread) ** -0.5, (1 - spread) ** -0.5
    centre, half = low + high, high - low
    rate = (math.sqrt(high) - math.sqrt(low)) / (math.sqrt(high) + math.sqrt(low))
    image = small_product(z, k)
    solution, rest = image / 2, -sym(image)
    step = rest / centre
    gain = half / centre
    for _ in range(math.ceil(math.log(precision / spread**2) / math.log(rate))):
        image = small_product(z, step)
        solution.add_(image)
        rest = rest.sub_(image).sub_(image.mT)
        former, gain = gain, 1 / (2 * centre / half - gain)
        step = step.mul_(former * gain).add_(rest, alpha=2 * gain / half)
    return skew(solution)  # The product of the last step, which is left out, is symmetric up to less than rounding.
