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
from fgo_geo.paths.protocol import StepOptions

__all__ = ["SPIKE", "longest_step", "momentum_gain", "step_scale", "theorem_step_bound", "theorem_step_scale"]

SPIKE = 10.0
"""With ``norm="running"``, longer steps than this many times the bound are shortened to that."""


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
    return _tau(torch.as_tensor(R), rho, curvature)


def _tau(norm: Tensor, rho: float, curvature: float | Tensor) -> Tensor:
    second = 1 + curvature * (rho + norm)
    root = torch.maximum(2 * rho + norm, second.sqrt())
    return (norm * root).clamp_min(1)


def step_scale(norm: Tensor, options: StepOptions, curvatures: Tensor | None, norms: Tensor | None) -> Tensor | None:
    """The divisors ``τ`` of the learning rate for the chosen step size.

    Args:
        norm: Norms ``R`` of the groups' Riemannian gradients, float64.
        options: Hyper-parameters.
        curvatures: Bound on the curvature of every group, if ``options.curvature`` is None.
        norms: Norm of every group's point, for ``step_size="angle"``; not a number where it is not fixed.

    Returns:
        ``τ`` of every group, float64; None if all are one. For ``"angle"`` it is ``R / (angle ‖w‖)``, so that a group
        moves by ``angle`` radians per unit of learning rate, to second order.

    Example:
        >>> step_scale(torch.tensor([1.0, 4.0]), StepOptions(lr=0.1, step_size="angle", angle=0.5), None, torch.ones(2))
        tensor([2., 8.])
    """
    if options.step_size == "constant":
        return None
    if options.step_size == "theorem":
        bound = options.curvature if curvatures is None else curvatures
        return _tau(norm, options.rho, 1.0 if bound is None else bound)
    if norms is None:
        raise ValueError("step_scale: step_size='angle' needs the norms of the groups, got None")
    tau = norm / (options.angle * norms)
    return torch.where((tau > 0) & torch.isfinite(tau), tau, 1.0)


def longest_step(options: StepOptions, spike: float = 1.0) -> float:
    """Bound on the length of a step per unit of learning rate, infinite if there is none.

    Args:
        options: Hyper-parameters.
        spike: How many times longer than the theorem's a step may be, of ``norm="running"``.

    Example:
        >>> round(longest_step(StepOptions(lr=0.1, momentum=0.9, step_size="theorem")), 4)
        4.1421
    """
    if options.step_size != "theorem":
        return math.inf
    gain = momentum_gain(options.momentum, options.dampening, options.nesterov)
    return spike * theorem_step_bound(options.rho) * gain


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
