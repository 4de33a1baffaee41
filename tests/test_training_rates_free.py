"""A step without a learning rate, against closed forms."""

from __future__ import annotations

import importlib
import math

import geoopt
import numpy as np
import pytest
import torch
import trainer

import fgo_geo

command_line, engine = trainer.command_line, trainer.engine
optimisers = importlib.import_module("training.optimisers")
RDoG = optimisers.RDoG


def rayleigh(seed: int, size: int = 6) -> tuple[np.ndarray, np.ndarray]:
    """A symmetric matrix with eigenvalues 1 to ``size``, and a unit vector."""
    generator = np.random.default_rng(seed)
    basis, _ = np.linalg.qr(generator.normal(size=(size, size)))
    start = generator.normal(size=size)
    return basis @ np.diag(np.arange(1.0, size + 1)) @ basis.T, start / np.linalg.norm(start)


def by_rdog(matrix: np.ndarray, start: np.ndarray, epsilon: float, steps: int) -> list[np.ndarray]:
    """The method on the sphere, where zeta is 1: great circles and arcs, in numpy."""
    x, farthest, squares, points = start, epsilon, 0.0, []
    for _ in range(steps):
        gradient = -2 * (matrix @ x - (x @ matrix @ x) * x)
        farthest = max(farthest, 2 * math.asin(float(np.linalg.norm(x - start)) / 2))
        squares += float(gradient @ gradient)
        arc = farthest / math.sqrt(squares) * np.linalg.norm(gradient)
        x = math.cos(arc) * x - math.sin(arc) * gradient / np.linalg.norm(gradient)
        points.append(x)
    return points


@pytest.mark.parametrize(("epsilon", "steps"), [(1e-6, 40), (1e-3, 40), (0.1, 15)])
def test_steps_on_the_sphere_are_those_of_the_paper(epsilon, steps):
    """As many as rounding errors, which grow near saddles, allow."""
    for seed in range(3):
        matrix, start = rayleigh(seed)
        x = geoopt.ManifoldParameter(torch.from_numpy(start.copy()), manifold=fgo_geo.ScaledSphere())
        optimizer, a = RDoG([x], epsilon=epsilon), torch.from_numpy(matrix)
        for expected in by_rdog(matrix, start, epsilon, steps):
            optimizer.zero_grad()
            (-(x @ a @ x)).backward()
            optimizer.step()
            np.testing.assert_allclose(x.detach().numpy(), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_the_largest_eigenvalue_is_found_on_any_scale_of_the_loss(scale):
    matrix, start = rayleigh(5)
    x = geoopt.ManifoldParameter(torch.from_numpy(start.copy()), manifold=fgo_geo.ScaledSphere())
    optimizer, a = RDoG([x]), torch.from_numpy(matrix)
    for _ in range(400):
        optimizer.zero_grad()
        (-scale * (x @ a @ x)).backward()
        optimizer.step()
    assert float((x @ a @ x).detach()) == pytest.approx(6.0, abs=1e-3)


def test_the_first_step_is_shorter_by_the_curvature():
    """In the hyperbolic plane it has length ``epsilon / sqrt(epsilon / tanh(epsilon))``."""
    ball = geoopt.PoincareBall()
    start = torch.tensor([0.3, -0.2], dtype=torch.float64)
    x = geoopt.ManifoldParameter(start.clone(), manifold=ball)
    x.grad = torch.tensor([1.0, 2.0], dtype=torch.float64)
    RDoG([x], epsilon=0.5, curvature=-1.0).step()
    assert float(ball.dist(start, x.detach())) == pytest.approx(0.5 / math.sqrt(0.5 / math.tanh(0.5)), rel=1e-9)
    assert optimisers.zeta(1e-9, -4.0) == pytest.approx(1.0)
    assert optimisers.zeta(2.0, 1.0) == 1.0
    assert optimisers.least_curvature(fgo_geo.Stiefel(0.5)) == -2.0
    assert optimisers.least_curvature(fgo_geo.Oblique(0.5)) == 0.0


def test_free_weights_take_the_step_of_dog_and_its_state_travels():
    w = torch.nn.Parameter(torch.tensor([3.0, 4.0], dtype=torch.float64))
    optimizer = RDoG([w], epsilon=0.1)
    w.grad = torch.tensor([0.0, 2.0], dtype=torch.float64)
    optimizer.step()  # 0.1 / sqrt(4)
    torch.testing.assert_close(w.detach(), torch.tensor([3.0, 3.9], dtype=torch.float64))
    other = RDoG([torch.nn.Parameter(w.detach().clone())])
    other.load_state_dict(optimizer.state_dict())
    for own in (optimizer, other):
        (weight,) = own.param_groups[0]["params"]
        weight.grad = torch.tensor([0.0, 4.0], dtype=torch.float64)
        own.step()  # 0.1 / sqrt(4 + 16)
        torch.testing.assert_close(weight.detach()[1], torch.tensor(3.9 - 0.4 / math.sqrt(20), dtype=torch.float64))


def test_a_network_trains_without_a_learning_rate():
    flags = {"method": "st", "optimizer": "rdog", "schedule": "constant", "width": 4, "fraction": 0.3, "epochs": 5}
    run = engine.build(command_line.make({**flags, "batch_size": 32, "evaluate_every": 0, "norm": "batch"}))
    engine.fit(run)
    losses = [epoch["train_loss"] for epoch in run.progress.history]
    assert losses[-1] < losses[0] - 0.1
    assert run.progress.history[-1]["largest_violation"] < 1e-5
