"""What is measured while training: loss and accuracy, constraint violations, step scales tau.

Functions that run once per batch return tensors on the device, so that training never waits for them; those that run
once per epoch return plain numbers.
"""

from __future__ import annotations

import geoopt
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import fgo_geo

TAU = ("smallest_tau", "median_tau", "share_tau_above_1")


def loss_correct_count(outputs: Tensor, labels: Tensor) -> Tensor:
    """Return [summed cross-entropy, number of right answers, number of images] of a batch."""
    loss = cross_entropy(outputs, labels, reduction="sum")
    return torch.stack([loss, (outputs.argmax(1) == labels).sum(), loss.new_tensor(len(labels))])


def tau_of_step(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Return [[smallest tau, median tau, share of groups with tau > 1]] of the latest step, [] if it has no tau."""
    if not isinstance(optimizer, fgo_geo.RiemannianFGSGD):
        return []
    scales = [scale.flatten() for scale in optimizer.step_scales().values()]
    if not scales:
        return []
    tau = torch.cat(scales)
    return [torch.stack([tau.min(), tau.median(), (tau > 1).to(tau.dtype).mean()])]


def tau_of_epoch(steps: list[Tensor]) -> dict[str, float | None]:
    """Sum up the steps of an epoch: smallest of all, median of the medians, mean share above 1."""
    if not steps:
        return dict.fromkeys(TAU)
    smallest, median, share = torch.stack(steps).unbind(1)
    return dict(zip(TAU, (smallest.min().item(), median.median().item(), share.mean().item()), strict=True))


@torch.no_grad()
def largest_violation(model: nn.Module) -> float | None:
    """Return the largest relative constraint violation of all weights, None without constraints."""
    violations = (w.manifold.violation(w).max().item() for w in constrained(model).values())
    return max(violations, default=None)


def constrained(model: nn.Module) -> dict[str, geoopt.ManifoldParameter]:
    """Return the weights that live on manifolds, by name."""
    return {name: weight for name, weight in model.named_parameters() if isinstance(weight, geoopt.ManifoldParameter)}
