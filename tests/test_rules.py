"""A rule of one's own makes another optimiser: one function, and a subclass with one line."""

from __future__ import annotations

import contextlib
from typing import Any

import geoopt
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fgo_geo
from fgo_geo.grouping import collection
from fgo_geo.paths.rules import StepOptions

LENGTH = 30.0  # far beyond the theorem's bound, which holds for momentum SGD alone
DECAY = 0.6  # of the buffer, whatever the optimiser's own momentum is


def normalised_momentum(
    manifold: geoopt.Manifold, x: Tensor, grad: Tensor, buffer: Tensor | None, options: StepOptions
) -> tuple[Tensor, Tensor | None]:
    """The direction of the momentum alone, at a fixed length per component."""
    buffer = grad if buffer is None else manifold.proju(x, DECAY * buffer) + grad
    return LENGTH * buffer / buffer.flatten(1).norm(dim=1)[:, None, None], buffer


class Normalised(fgo_geo.RiemannianFGSGD):
    """The optimiser of :func:`normalised_momentum`."""

    rule = staticmethod(normalised_momentum)


def step_of_a_kernel(kind: str, x: Tensor, g: Tensor, b: Tensor | None, tau: Tensor, lr: float) -> Any:
    """The same step of one kernel of radius one, by dense formulas."""

    def tangent(v: Tensor) -> Tensor:
        if kind == "sphere":
            return v - x * (x * v).sum()
        return v - x @ (x.mT @ v + v.mT @ x) / 2

    b = tangent(g) / tau + (0 if b is None else tangent(DECAY * b))
    y = x - lr * LENGTH * b / b.norm()
    if kind == "sphere":
        return y / y.norm(), b
    u, _, vh = torch.linalg.svd(y, full_matrices=False)
    return u @ vh, b


class Watched(TorchDispatchMode):
    """Runs everything; under it values are not read, so that bounds on steps are relied on."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", [contextlib.nullcontext, Watched])
@pytest.mark.parametrize("momentum", [0.0, 0.3])
@pytest.mark.parametrize("kind", ["sphere", "stiefel"])
def test_a_rule_of_ones_own_steps_all_kernels(kind: str, momentum: float, mode: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    shape, lr = (4, 3, 3, 3), 0.1
    manifold = fgo_geo.ProductOfGroups(collection(4, 3, "po", (kind,)), shape)
    weight = geoopt.ManifoldParameter(manifold.projx(torch.randn(shape, generator=generator).double()), manifold)
    optimizer = Normalised([weight], lr=lr, momentum=momentum)
    buffers: list[Tensor | None] = [None] * 12
    for _ in range(3):
        weight.grad = torch.randn(shape, generator=generator).double()
        points, grads = weight.detach().clone().flatten(0, 1), weight.grad.flatten(0, 1)
        with mode():
            optimizer.step()
        taus = optimizer.step_scales()[weight].repeat_interleave(3)
        for number, (x, g) in enumerate(zip(points, grads, strict=True)):
            point, buffers[number] = step_of_a_kernel(kind, x, g, buffers[number], taus[number], lr)
            torch.testing.assert_close(weight.detach().flatten(0, 1)[number], point, rtol=1e-9, atol=1e-12)
        assert manifold.violation(weight.detach()).max() < 1e-14


@pytest.mark.parametrize(("manifold", "shape"), [
    (fgo_geo.Oblique(), (5, 4)),
    (geoopt.Sphere(), (6,)),
    (fgo_geo.ProductOfGroups(collection(96, 96, "pio", ("sphere", "stiefel"), seed=1), (96, 96, 3, 3)), (96, 96, 3, 3)),
])  # fmt: skip
def test_the_buffer_of_a_rule_does_not_depend_on_momentum(manifold: geoopt.Manifold, shape: tuple[int, ...]) -> None:
    def sum_of_gradients(
        manifold: geoopt.Manifold, x: Tensor, grad: Tensor, buffer: Tensor | None, options: StepOptions
    ) -> tuple[Tensor, Tensor]:
        return grad, grad if buffer is None else buffer + grad

    class Summing(fgo_geo.RiemannianFGSGD):
        rule = staticmethod(sum_of_gradients)

    start, grads = manifold.projx(torch.randn(shape)), torch.randn(3, *shape)
    states: list[tuple[Tensor, Tensor]] = []
    for momentum in (0.0, 0.9):
        weight = geoopt.ManifoldParameter(start.clone(), manifold)
        optimizer = Summing([weight], lr=0.01, momentum=momentum, step_size="constant")
        total = torch.zeros(shape)
        for grad in grads:
            weight.grad, before = grad, weight.detach().clone()
            total += manifold.egrad2rgrad(before, grad.clone())
            optimizer.step()
            if isinstance(manifold, geoopt.Sphere):  # Geoopt's manifolds transport at the end of a step
                total = manifold.transp(before, weight.detach(), total)
        torch.testing.assert_close(optimizer.state[weight]["momentum_buffer"], total, rtol=1e-5, atol=1e-5)
        states.append((weight.detach(), optimizer.state[weight]["momentum_buffer"]))
    for without, beside in zip(*states, strict=True):
        torch.testing.assert_close(without, beside, rtol=0, atol=0)
