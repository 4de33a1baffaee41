"""Optimisers and learning rates by name."""

from __future__ import annotations

import math
import warnings
from typing import Any

import geoopt
import torch
from torch import nn
from torch.optim.lr_scheduler import (
    ConstantLR,
    CosineAnnealingLR,
    LinearLR,
    LRScheduler,
    MultiStepLR,
    SequentialLR,
)

import fgo_geo
from training import measures, settings


def build(wanted: settings.Optimisation, model: nn.Module) -> torch.optim.Optimizer:
    """Return the chosen optimiser over all parameters; each treats constrained and plain ones."""
    weights, momentum = parameter_groups(wanted, model), wanted.momentum
    common = {"lr": wanted.lr, "weight_decay": wanted.weight_decay}
    if wanted.optimizer == "fgsgd":
        optimizer = fgo_geo.RiemannianFGSGD(
            weights,
            momentum=momentum,
            step_size=wanted.step_size,  # pyright: ignore
            norm=wanted.step_norm,  # pyright: ignore
            adapt_euclidean=wanted.adapt_euclidean,
            **common,
        )
    elif wanted.optimizer == "rsgd":
        optimizer = geoopt.optim.RiemannianSGD(without_names(weights), momentum=momentum, **common)
    elif wanted.optimizer == "radam":
        optimizer = geoopt.optim.RiemannianAdam(without_names(weights), betas=(momentum, 0.999), **common)
    elif wanted.optimizer == "rdog":
        curvature = min((least_curvature(w.manifold) for w in measures.constrained(model).values()), default=0.0)
        optimizer = RDoG(weights, epsilon=0.01, curvature=curvature, **common)
    elif wanted.optimizer == "adamw":
        optimizer = torch.optim.AdamW(weights, betas=(momentum, 0.999), **common)
    else:
        optimizer = torch.optim.SGD(weights, momentum=momentum, **common)
    if wanted.on_manifolds != "none":
        fgo_geo.on_manifolds(optimizer, step_size=wanted.on_manifolds)
    if wanted.tangent_steps:
        keep_tangent(optimizer, model)
    if wanted.channel_directed != "none":
        fgo_geo.channel_directed(
            optimizer,
            wanted.channel_directed,  # pyright: ignore
            wanted.lam or 2.0,
            wanted.channel_axis or "output",  # pyright: ignore
            module=model,
            lam_relative=wanted.lam_relative,
        )
    return optimizer


def parameter_groups(wanted: settings.Optimisation, model: nn.Module) -> list[dict[str, Any]]:
    """All parameters with their names, the biases in a group of their own if they have a learning rate of their own."""
    named = list(model.named_parameters())
    if wanted.bias_lr == 1:
        return [{"params": named}]
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear) and m.bias is not None]
    biases = {id(layer.bias) for layer in layers}
    slow = [(name, weight) for name, weight in named if id(weight) in biases]
    others = [(name, weight) for name, weight in named if id(weight) not in biases]
    groups = [{"params": others}, {"params": slow, "lr": wanted.bias_lr * (wanted.lr or 0.0)}]
    return [group for group in groups if group["params"]]


def without_names(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same groups for optimisers that take no names."""
    return [{**group, "params": [weight for _, weight in group["params"]]} for group in groups]


class RDoG(torch.optim.Optimizer):
    """Gradient descent without a learning rate, by distance over gradients.

    With ``r`` the largest distance from the start so far, at least ``epsilon``, and ``G`` the sum of the squared norms
    of all gradients so far, the step is ``exp_x(-r / sqrt(zeta(r) G) grad)``. Here ``zeta(r)`` is ``s r / tanh(s r)``
    with ``s = sqrt(-kappa)``, of the lower bound ``kappa <= 0`` of sectional curvatures (RDoG; Dodd, Sharrock and
    Nemeth, *Learning-rate-free stochastic optimization over Riemannian manifolds*, ICML 2024). All weights together are
    one point of a product.

    Args:
        params: Weights, on Geoopt's manifolds or on none.
        lr: Factor of every step, which the method does not ask for: 1.
        weight_decay: Of weights that are on no manifold.
        epsilon: Least distance: what the first step is long.
        curvature: ``kappa``.
    """

    def __init__(
        self, params: Any, lr: float = 1.0, weight_decay: float = 0.0, epsilon: float = 1e-6, curvature: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "farthest": epsilon, "squares": 0.0})
        self.curvature = curvature

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Take a step with all weights that have gradients."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        moves, squares, distances = [], [], []
        for group in self.param_groups:
            for weight in (w for w in group["params"] if w.grad is not None):
                manifold = getattr(weight, "manifold", None) or geoopt.Euclidean(weight.ndim)
                point = weight.detach().as_subclass(torch.Tensor)
                grad = weight.grad if hasattr(weight, "manifold") else weight.grad + group["weight_decay"] * point
                start = self.state[weight].setdefault("start", point.clone())
                grad = manifold.egrad2rgrad(point, grad)
                moves.append((group["lr"], manifold, point, grad))
                squares.append(manifold.inner(point, grad).double().sum())
                distances.append(manifold.dist(start, point).double().square().sum())
        if not moves:
            return loss
        of_all = self.param_groups[0]  # where state dicts keep numbers
        square, distance = torch.stack([torch.stack(squares).sum(), torch.stack(distances).sum()]).tolist()
        of_all["squares"] += square
        of_all["farthest"] = max(of_all["farthest"], math.sqrt(distance))
        if of_all["squares"] == 0:
            return loss
        length = of_all["farthest"] / math.sqrt(zeta(of_all["farthest"], self.curvature) * of_all["squares"])
        for lr, manifold, point, grad in moves:
            point.copy_(manifold.expmap(point, -lr * length * grad))
        return loss


def zeta(distance: float, curvature: float) -> float:
    """How much faster geodesics part at this distance than in flat space, at most."""
    scaled = math.sqrt(max(0.0, -curvature)) * distance
    return scaled / math.tanh(scaled) if scaled > 0 else 1.0


def least_curvature(manifold: Any) -> float:
    """Lower bound of sectional curvatures: -1/2 of Stiefel manifolds of radius one, else zero.

    Of the Euclidean metric (Zimmermann and Stoye, *High curvature means low rank*, 2024).
    """
    parts = [part for part, _ in manifold.parts] if isinstance(manifold, fgo_geo.ProductOfGroups) else [manifold]
    radii = [float(torch.as_tensor(part.radius).min()) for part in parts if isinstance(part, fgo_geo.Stiefel)]
    return min((-0.5 / radius**2 for radius in radii), default=0.0)


def keep_tangent(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Remove from every step of a convolution its part along the weights, output channel by output channel.

    That is the projection of SGDP and AdamP (Heo et al., *AdamP: slowing down the slowdown for momentum optimizers on
    scale-invariant weights*, ICLR 2021), for all convolutions instead of those that a test takes for scale-invariant.
    """
    weights = [module.weight for module in model.modules() if isinstance(module, nn.Conv2d)]
    before: list[torch.Tensor] = []

    def remember(*_: object) -> None:
        before[:] = [weight.detach().clone() for weight in weights]

    @torch.no_grad()
    def project(*_: object) -> None:
        for weight, old in zip(weights, before, strict=True):
            direction = torch.nn.functional.normalize(old.flatten(1), dim=1).view_as(old)
            radial = ((weight - old) * direction).sum((1, 2, 3), keepdim=True)
            weight.sub_(radial * direction)

    optimizer.register_step_pre_hook(remember)
    optimizer.register_step_post_hook(project)


def schedule(wanted: settings.Optimisation, optimizer: torch.optim.Optimizer, steps_per_epoch: int) -> LRScheduler:
    """Return the learning rates, one per step of the optimiser."""
    warm = round(wanted.warmup * steps_per_epoch)
    steps = wanted.epochs * steps_per_epoch - warm
    # Every scheduler sets the learning rate when it is made: the one that is used first has to be made last.
    main = _main(wanted, optimizer, steps, steps_per_epoch)
    if not warm:
        return main
    warnings.filterwarnings("ignore", "The epoch parameter in `scheduler.step")  # torch 2.6's SequentialLR passes it
    return SequentialLR(optimizer, [LinearLR(optimizer, 0.01, 1.0, warm), main], [warm])


def _main(
    wanted: settings.Optimisation, optimizer: torch.optim.Optimizer, steps: int, steps_per_epoch: int
) -> LRScheduler:
    if wanted.schedule == "robbins-monro":
        return fgo_geo.optim.RobbinsMonroLR(optimizer, (wanted.time_constant or 10.0) * steps_per_epoch)
    if wanted.schedule == "cosine":
        return CosineAnnealingLR(optimizer, steps)
    if wanted.schedule == "step":
        return MultiStepLR(optimizer, [steps // 2, steps * 3 // 4])
    return ConstantLR(optimizer, 1.0, 0)
