r"""The step size of FG-SGD as a function of the gradient's norm.

A group with Riemannian gradient norm ``R`` moves by ``lr / τ`` times its gradient ([Ozay2019]_, algorithm 1)::

    τ = max{1, Γ₁}^{1/2},    Γ₁ = R² Γ₂,    Γ₂ = max{ (2ρ + R)², 1 + c (ρ + R) }

where ``ρ`` bounds the geodesic distance to the minimum and ``c`` the sectional curvature. ``Γ₂`` grows with both, so
``ρ = c = 1`` covers everything below; there the first term always wins and ``τ = ( max{1, R² (2 + R)²} )^{1/2}``
(eq. 7). The step length ``lr R / τ`` is at most :func:`theorem_step_bound` times ``lr``, for every gradient: the
theorem's step size is a trust region.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fgo_geo.linalg import computes_in_float32

__all__ = ["momentum_gain", "theorem_step_bound", "theorem_step_scale"]


@computes_in_float32
def theorem_step_scale(
    R: Tensor | float,
    rho: float = 1.0,
    curvature: float | Tensor = 1.0,
) -> Tensor:
    r"""The divisor ``τ`` of the learning rate, one per group ([Ozay2019]_, algorithm 1 and eq. 7).

    Args:
        R: Norms of the groups' Riemannian gradients, any shape, non-negative.
        rho: Bound ``ρ >= 0`` on the geodesic distance to the minimum.
        curvature: Upper bound ``c >= 0`` on the sectional curvature; a tensor broadcasts against ``R``.

    Returns:
        ``τ >= 1``, of the shape of ``R``.

    Raises:
        ValueError: If ``rho`` or a number ``curvature`` is negative or not finite.

    Example:
        ``τ`` is one up to ``R = √2 - 1`` and ``R (2 + R)`` beyond.

        >>> theorem_step_scale(torch.tensor([0.0, 2**0.5 - 1, 1.0, 3.0]))
        tensor([ 1.,  1.,  3., 15.])
    """
    _check_non_negative("rho", rho)
    if not isinstance(curvature, Tensor):
        _check_non_negative("curvature", curvature)
    norm = torch.as_tensor(R)
    second = 1 + curvature * (rho + norm)
    root = torch.maximum(2 * rho + norm, second.sqrt())
    return (norm * root).clamp_min(1)


def theorem_step_bound(rho: float = 1.0) -> float:
    r"""The longest step per unit of learning rate, ``max_R R / τ(R) = √(1 + ρ²) - ρ``.

    Computed as ``1 / (√(1 + ρ²) + ρ)``, which does not cancel. Attained (for ``c <= 1 <= ρ``) where
    ``R (2ρ + R) = 1``; a larger ``c`` only shortens steps.

    Args:
        rho: Bound ``ρ >= 0`` on the geodesic distance to the minimum.

    Returns:
        The bound; ``√2 - 1`` for ``ρ = 1``.

    Example:
        >>> round(theorem_step_bound(), 5)
        0.41421
    """
    _check_non_negative("rho", rho)
    return 1 / (math.hypot(1, rho) + rho)


def momentum_gain(momentum: float, dampening: float, nesterov: bool) -> float:
    r"""How many times longer than the longest scaled gradient a step with momentum can be.

    The buffer ``b <- μ b + (1 - d) g`` starts at ``g``, so it never exceeds ``max{1, |1 - d| / (1 - μ)}`` times the
    longest ``g``; Nesterov's ``g + μ b`` (``d = 0``) never exceeds ``1 / (1 - μ)`` times.

    Args:
        momentum: Momentum factor ``μ >= 0``.
        dampening: Dampening ``d``.
        nesterov: Whether the step is Nesterov's.

    Returns:
        The factor; infinite for ``μ >= 1``.

    Example:
        >>> round(momentum_gain(0.9, dampening=0, nesterov=False), 6)
        10.0
    """
    if momentum >= 1:
        return math.inf
    buffer = max(1.0, abs(1 - dampening) / (1 - momentum)) if momentum > 0 else 1.0
    return 1 + momentum * buffer if nesterov else buffer


def _check_non_negative(name: str, value: float) -> None:
    if not 0 <= value < math.inf:  # which torch.compile can ask of a symbol too
        raise ValueError(f"{name} must be a non-negative finite number, got {value!r}")
