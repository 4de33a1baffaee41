"""Problems whose answers are known in closed form, solved with RiemannianFGSGD (Mathematics, section 8)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import geoopt
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fgo_geo import Oblique, RiemannianFGSGD, ScaledSphere, Stiefel
from fgo_geo.optim.schedules import RobbinsMonroLR


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def start(manifold: geoopt.Manifold, *shape: int, seed: int) -> geoopt.ManifoldParameter:
    generator = torch.Generator().manual_seed(seed)
    return geoopt.ManifoldParameter(manifold.random(*shape, dtype=torch.float64, generator=generator))


def minimise(
    params: Sequence[Tensor], loss_of: Callable[[], Tensor], steps: int, **options: float | str | bool
) -> float:
    """The loss before the last step."""
    optimizer = RiemannianFGSGD(params, **options)
    loss = torch.empty(())
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of()
        loss.backward()
        optimizer.step()
    return loss.item()


def symmetric(eigenvalues: Sequence[float], seed: int) -> tuple[Tensor, NDArray[np.float64]]:
    """A matrix with given eigenvalues, and its eigenvectors as columns in their order."""
    vectors, _ = np.linalg.qr(normal(len(eigenvalues), len(eigenvalues), seed=seed).numpy())
    return torch.from_numpy(vectors @ np.diag(eigenvalues) @ vectors.T), vectors


VARIANTS = [
    {},
    {"momentum": 0.7},
    {"momentum": 0.7, "nesterov": True},
    {"update": "exponential"},
    {"radius_invariant": True},
    {"rho": 2.0, "curvature": "manifold"},
]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("radius", [0.5, 1.0, 3.0])
def test_the_rayleigh_quotient_leads_to_the_leading_eigenvector(variant, radius):
    eigenvalues = [5.0, 3.0, 2.5, 1.0, 0.0, -1.0]
    a, vectors = symmetric(eigenvalues, seed=1)
    x = start(ScaledSphere(radius), 6, seed=2)
    rate = 0.1 if variant.get("radius_invariant") else 0.1 * radius**2
    quotient = minimise([x], lambda: x @ a @ x / radius**2, 400, lr=rate, maximize=True, **variant)
    assert quotient == pytest.approx(5.0, abs=1e-12)
    alignment = np.abs(vectors[:, 0] @ x.detach().numpy()) / radius
    assert alignment == pytest.approx(1.0, abs=1e-12)
    assert np.linalg.norm(x.detach().numpy()) == pytest.approx(radius, rel=1e-14)


def test_rayleigh_quotients_of_a_batch_are_found_together():
    """One parameter, one τ, as many eigenproblems as there are components."""
    problems = [symmetric([4.0, 2.0, 1.0, 0.0], seed=seed) for seed in range(5)]
    a = torch.stack([matrix for matrix, _ in problems])
    x = start(ScaledSphere(), 5, 4, seed=3)
    minimise([x], lambda: -torch.einsum("ni,nij,nj->", x, a, x), 600, lr=0.1)
    for point, (_, vectors) in zip(x.detach().numpy(), problems, strict=True):
        assert np.abs(vectors[:, 0] @ point) == pytest.approx(1.0, abs=1e-10)


def test_robbins_monro_rates_average_out_gradient_noise():
    """With noisy gradients a decaying rate ends nearer to the eigenvector than the constant one."""
    a, vectors = symmetric([3.0, 1.0, 0.5, 0.0], seed=4)
    errors = {}
    for decay in (False, True):
        x = start(ScaledSphere(), 4, seed=5)
        optimizer = RiemannianFGSGD([x], lr=0.5, maximize=True)
        scheduler = RobbinsMonroLR(optimizer, time_constant=20.0)
        for step in range(1500):
            x.grad = 2 * a @ x.detach() + normal(4, seed=100 + step)
            optimizer.step()
            if decay:
                scheduler.step()
        errors[decay] = 1 - np.abs(vectors[:, 0] @ x.detach().numpy())
    assert errors[True] < 2e-3
    assert errors[True] < errors[False] / 5


@pytest.mark.parametrize("variant", [{}, {"momentum": 0.7}, {"momentum": 0.7, "update": "exponential"}])
def test_the_brockett_cost_sorts_the_leading_eigenvectors(variant):
    """The maximum of tr(xᵀ A x N) over Stiefel is Σ λ_i μ_i, at the eigenvectors in the order of N."""
    eigenvalues, weights = [4.0, 3.0, 2.0, 1.0, 0.0], [3.0, 2.0, 1.0]
    a, vectors = symmetric(eigenvalues, seed=6)
    n = torch.diag(torch.tensor(weights, dtype=torch.float64))
    x = start(Stiefel(), 5, 3, seed=7)
    cost = minimise([x], lambda: (x.mT @ a @ x @ n).trace(), 800, lr=0.05, maximize=True, **variant)
    assert cost == pytest.approx(4 * 3 + 3 * 2 + 2 * 1, abs=1e-11)
    np.testing.assert_allclose(np.abs(vectors[:, :3].T @ x.detach().numpy()), np.eye(3), atol=1e-7)


@pytest.mark.parametrize("radius", [1.0, 2.0])
@pytest.mark.parametrize("momentum", [0.0, 0.7])
def test_orthogonal_procrustes_gives_the_polar_factor(radius, momentum):
    """The minimum of ‖A x - B‖ over x = r Q is r U Vᵀ for Aᵀ B = U S Vᵀ, in the start's component of O(n)."""
    a = normal(12, 4, seed=8)
    x = start(Stiefel(radius), 4, 4, seed=9)
    b = a @ x.detach() @ torch.matrix_exp(0.5 * (normal(4, 4, seed=10) - normal(4, 4, seed=10).mT)) + 0.1
    left, singular, right = np.linalg.svd(a.numpy().T @ b.numpy())
    solution = radius * left @ right
    assert np.linalg.det(solution) * np.linalg.det(x.detach().numpy()) > 0
    loss = minimise([x], lambda: (a @ x - b).square().sum() / 24, 800, lr=0.3, momentum=momentum)
    expected = (radius**2 * (a**2).sum() + (b**2).sum()).item() - 2 * radius * singular.sum()
    assert loss == pytest.approx(expected / 24, rel=1e-12)
    np.testing.assert_allclose(x.detach().numpy(), solution, atol=1e-8)


@pytest.mark.parametrize("seed", [0, 2])
def test_joint_diagonalisation_on_the_oblique_manifold_finds_the_mixing_matrix(seed):
    """C_k = M D_k Mᵀ are all diagonal in the columns of M^{-T}, up to their order, signs and lengths."""
    orthogonal, _ = torch.linalg.qr(normal(4, 4, seed=seed))
    mixing = orthogonal + 0.2 * normal(4, 4, seed=seed + 5)
    c = torch.einsum("ij,kj,lj->kil", mixing, normal(6, 4, seed=seed + 1), mixing)
    x = start(Oblique(), 4, 4, seed=seed + 2)
    off_diagonal = 1 - torch.eye(4, dtype=torch.float64)
    cost = minimise([x], lambda: ((x.mT @ c @ x) * off_diagonal).square().mean(), 1000, lr=0.3, momentum=0.9)
    assert cost < 1e-24
    unmixed = np.abs(x.detach().numpy().T @ mixing.numpy())
    assert sorted(unmixed.argmax(1)) == [0, 1, 2, 3]
    unmixed /= unmixed.max(1, keepdims=True)
    assert np.sort(unmixed, 1)[:, :-1].max() < 1e-11
    np.testing.assert_allclose(np.linalg.norm(x.detach().numpy(), axis=0), 1, rtol=1e-14)


# -- networks on realisable Gaussian data reach zero loss ([Ozay2019]_, corollary 1) -----------------------------------


def train_on_teacher(
    params: Sequence[Tensor],
    student: Callable[[Tensor], Tensor],
    teacher: Callable[[Tensor], Tensor],
    steps: int,
    lr: float,
    inputs: int,
) -> tuple[float, float]:
    """Mean squared errors on fresh data, before and after training on a new Gaussian batch in every step."""

    def error(seed: int, batch: int) -> Tensor:
        x = normal(batch, inputs, seed=seed)
        return (student(x) - teacher(x)).square().mean()

    optimizer = RiemannianFGSGD(params, lr=lr, momentum=0.9)
    before = error(1, 2000).item()
    for step in range(steps):
        optimizer.zero_grad()
        error(1000 + step, 128).backward()
        optimizer.step()
    return before, error(1, 2000).item()


DEEP_LINEAR: dict[str, Callable[[int, int], geoopt.Manifold]] = {
    "sphere": lambda rows, columns: ScaledSphere(columns**0.5, ndim=2),
    "oblique": lambda rows, columns: Oblique(),
    "stiefel": lambda rows, columns: Stiefel(),
}


@pytest.mark.parametrize("kind", DEEP_LINEAR)
def test_a_deep_linear_network_reaches_zero_loss(kind):
    shapes = [(16, 8), (16, 16), (16, 4)]

    def weights(seed: int) -> list[geoopt.ManifoldParameter]:
        return [start(DEEP_LINEAR[kind](*s), *s, seed=seed + number) for number, s in enumerate(shapes)]

    def network(first: Tensor, second: Tensor, third: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda x: x @ first.mT @ second.mT @ third

    truth, learned = [w.detach() for w in weights(10)], weights(20)
    before, after = train_on_teacher(learned, network(*learned), network(*truth), 600, lr=0.1, inputs=8)
    assert before > 0.1
    assert after < 1e-16
    for weight in learned:
        assert weight.manifold.violation(weight.detach()).max() < 1e-14


@pytest.mark.parametrize("seed", [10, 70])
def test_a_leaky_relu_network_with_one_hidden_layer_reaches_zero_loss(seed):
    """From these starts; the student has twice as many hidden units, whose weights are points on unit spheres."""

    def network(hidden: Tensor, output: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda x: nn.functional.leaky_relu(x @ hidden.mT, 0.1) @ output

    teacher = network(start(ScaledSphere(), 2, 4, seed=seed + 1).detach(), normal(2, seed=seed + 2))
    hidden, output = start(ScaledSphere(), 4, 4, seed=seed + 3), nn.Parameter(0.3 * normal(4, seed=seed + 4))
    student = network(hidden, output)
    before, after = train_on_teacher([hidden, output], student, teacher, 1000, lr=0.3, inputs=4)
    assert before > 0.1
    assert after < 1e-16
