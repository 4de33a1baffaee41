"""The bound on a step that retractions are told: every step keeps it, the worst one reaches it, and it is enough.

On the CPU manifolds measure their steps instead; elsewhere the number of iterations of a retraction follows from it.
"""

from __future__ import annotations

from typing import Any

import geoopt
import pytest
import torch
from torch import Tensor

import fgo_geo.manifolds.stiefel
from fgo_geo import RiemannianFGSGD, Stiefel, on_manifolds
from fgo_geo.optim import theorem_step_bound

SIDE, STEPS = 4, 120
Told = list[tuple[float | None, float]]  # bounds, and lengths of steps


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Told:
    calls: Told = []
    original = Stiefel.retract_bounded

    def record(self: Stiefel, x: Tensor, u: Tensor, bound: float | None, scale: float = 1.0) -> Tensor:
        length = float(torch.linalg.matrix_norm(u).max()) * abs(scale)
        calls.append((bound, length / float(self.radius)))
        return original(self, x, u, bound, scale)

    monkeypatch.setattr(Stiefel, "retract_bounded", record)
    return calls


def turning(radius: float, seed: int = 0) -> tuple[geoopt.ManifoldParameter, Tensor]:
    """A square matrix, and a direction in which it can turn forever, as long as one."""
    generator = torch.Generator().manual_seed(seed)
    manifold = Stiefel(radius)
    start = manifold.random(SIDE, SIDE, dtype=torch.float64, generator=generator)
    skew = torch.randn(SIDE, SIDE, dtype=torch.float64, generator=generator)
    skew = skew - skew.mT
    return geoopt.ManifoldParameter(start, manifold=manifold), skew / (skew.norm() * radius)


@pytest.mark.parametrize(
    ("options", "gain", "spike"),
    [
        ({}, 1.0, 1.0),
        ({"momentum": 0.8}, 5.0, 1.0),
        ({"momentum": 0.8, "nesterov": True}, 5.0, 1.0),
        ({"momentum": 0.8, "dampening": 0.4}, 3.0, 1.0),
        ({"rho": 3.0}, 1.0, 1.0),
        ({"norm": "running"}, 1.0, 10.0),
        ({"radius_invariant": True, "momentum": 0.5}, 2.0, 1.0),
    ],
)
@pytest.mark.parametrize("radius", [0.4, 1.0, 3.0])
def test_the_worst_gradients_reach_the_bound_and_none_exceeds_it(
    told: Told, options: dict[str, Any], gain: float, spike: float, radius: float
) -> None:
    param, direction = turning(radius)
    lr = 0.01 * radius  # short, so that momentum hardly loses length on the way
    optimizer = RiemannianFGSGD([param], lr=lr, **options)
    knee = theorem_step_bound(options.get("rho", 1.0))
    unit = radius if options.get("radius_invariant") else 1.0  # in which R is measured
    for _ in range(STEPS):
        param.grad = param.detach() @ direction * (knee / unit)
        optimizer.step()
    bound = lr * knee * gain * spike * unit / radius
    assert {round(own, 12) for own, _ in told if own is not None} == {round(bound, 12)}
    longest = max(length for _, length in told)
    assert 0.99 * bound <= longest * spike <= bound * (1 + 1e-9)


def test_without_the_theorems_step_there_is_no_bound(told: Told) -> None:
    param, direction = turning(1.0)
    param.grad = param.detach() @ direction
    RiemannianFGSGD([param], lr=0.3, step_size="constant").step()
    assert told[0][0] is None


@pytest.mark.parametrize("radius", [0.4, 3.0])
def test_displacements_of_other_optimisers_have_the_bound_without_momentum(told: Told, radius: float) -> None:
    param, direction = turning(radius)
    optimizer = torch.optim.SGD([param], lr=0.3)
    handle = on_manifolds(optimizer)
    param.grad = param.detach() @ direction * theorem_step_bound()
    optimizer.step()
    ((bound, length),) = told
    assert bound == pytest.approx(0.3 * theorem_step_bound() / radius)
    assert length == pytest.approx(bound)
    handle.remove()


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize(("radius", "lr"), [(1.0, 0.5), (0.1, 1.0), (10.0, 30.0)])
def test_where_reading_costs_the_bound_alone_keeps_points(
    monkeypatch: pytest.MonkeyPatch, radius: float, lr: float, momentum: float
) -> None:
    monkeypatch.setattr(fgo_geo.manifolds.stiefel, "reads_for_free", lambda *_: False)
    param, direction = turning(radius)
    optimizer = RiemannianFGSGD([param], lr=lr, momentum=momentum)
    for _ in range(STEPS):
        param.grad = param.detach() @ direction * theorem_step_bound()
        optimizer.step()
        assert float(param.manifold.violation(param.detach()).max()) < 1e-12
