"""What is measured while training: constraint violations, step scales τ, calibration.

Functions that run once per step return tensors on the device, so that training never waits for them; those that run
once per epoch return plain numbers.
"""

from __future__ import annotations

from typing import Any

import geoopt
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import fgo_geo
from fgo_geo.linalg import whole

TAU = ("median_tau", "largest_tau", "share_tau_above_1")


def tau_of_step(optimizer: torch.optim.Optimizer) -> Tensor | None:
    """Return [median τ, largest τ, share of groups with τ > 1] of the latest step, None if it has no τ."""
    if not isinstance(optimizer, fgo_geo.RiemannianFGSGD):
        return None
    scales = [scale.flatten() for scale in optimizer.step_scales().values()]
    if not scales:
        return None
    tau = torch.cat(scales).float()
    return torch.stack([tau.median(), tau.max(), (tau > 1).float().mean()])


def tau_of_epoch(steps: list[Tensor]) -> dict[str, float | None]:
    """Sum up the steps of an epoch: median of the medians, largest of all, mean share above 1."""
    if not steps:
        return dict.fromkeys(TAU)
    median, largest, share = torch.stack(steps).unbind(1)
    return dict(zip(TAU, (median.median().item(), largest.max().item(), share.mean().item()), strict=True))


@torch.no_grad()
def largest_violation(model: nn.Module) -> float | None:
    """Return the largest relative constraint violation of all weights, None without constraints."""
    violations = (w.manifold.violation(whole(w)).max().item() for w in constrained(model).values())
    return max(violations, default=None)


def constrained(model: nn.Module) -> dict[str, geoopt.ManifoldParameter]:
    """Return the weights that live on manifolds, by name."""
    named: list[tuple[str, Any]] = list(model.named_parameters())
    return {name: weight for name, weight in named if getattr(weight, "manifold", None) is not None}


def calibrated_loss(logits: Tensor, labels: Tensor) -> float:
    """Return the cross-entropy after temperature scaling (Guo et al., 2017), cross-fitted.

    The temperature of each half of the images is the one that suits the other half best, so that no image chooses its
    own.
    """
    logits, labels = logits.double(), labels
    halves = [(logits[part::2], labels[part::2]) for part in (0, 1)]
    losses = [
        cross_entropy(there[0] * _inverse_temperature(*here), there[1], reduction="sum")
        for here, there in (halves, halves[::-1])
    ]
    return float(sum(losses) / len(labels))


def _inverse_temperature(logits: Tensor, labels: Tensor) -> float:
    """The factor of the logits with the lowest cross-entropy, which is convex in it, by golden-section search."""
    low, high = -7.0, 7.0  # of its logarithm
    golden = (5**0.5 - 1) / 2
    for _ in range(40):
        first, second = high - golden * (high - low), low + golden * (high - low)
        losses = [cross_entropy(logits * 2.718281828459045**at, labels) for at in (first, second)]
        low, high = (low, second) if losses[0] < losses[1] else (first, high)
    return 2.718281828459045 ** ((low + high) / 2)
