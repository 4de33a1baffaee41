"""Geodesics of the Stiefel manifold: the exponential map of long vectors, and its inverse."""

from __future__ import annotations

import contextlib
import math

import geoopt
import numpy as np
import oracles
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fgo_geo import RiemannianFGSGD, ScaledSphere, Stiefel

SHAPES = [(10, 5), (10, 2), (8, 6), (4, 3), (30, 4), (3, 2), (5, 5), (3, 3), (2, 2)]


def pairs(
    shape: tuple[int, int], length: float, count: int, seed: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """Points of the unit manifold, and tangent vectors of a length."""
    generator = torch.Generator().manual_seed(seed)
    stiefel = Stiefel()
    x = stiefel.random(count, *shape, dtype=dtype, generator=generator).as_subclass(Tensor)
    u = stiefel.proju(x, torch.randn(x.shape, dtype=dtype, generator=generator))
    return x, u * (length / torch.linalg.matrix_norm(u, keepdim=True))


# -- the exponential map -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [10.0, 1e2, 1e3, 1e4, 1e5, 1e9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rank", [1, None])
@pytest.mark.parametrize("shape", [*SHAPES, (7, 1), (64, 32)], ids=str)
def test_long_geodesics_end_on_the_manifold(
    shape: tuple[int, int], rank: int | None, dtype: torch.dtype, length: float
) -> None:
    stiefel = Stiefel(0.01)
    x, u = pairs(shape, 1.0, 5, dtype=dtype)
    u[..., :, rank:] = 0 if rank else u[..., :, rank:]
    u = stiefel.proju(0.01 * x, u)
    u = u * (0.01 * length / torch.linalg.matrix_norm(u, keepdim=True).clamp_min(1e-30))
    with contextlib.nullcontext() if length <= 1e6 else pytest.warns(UserWarning, match="was shortened to 1e"):
        y = stiefel.expmap(0.01 * x, u)
    assert float(stiefel.violation(y.double()).max()) <= 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("length", [1.0, 30.0, 1e3, 1e5])
@pytest.mark.parametrize("shape", [(5, 5), (7, 4), (9, 2)], ids=str)
def test_end_of_long_geodesics_by_a_full_exponential(shape: tuple[int, int], length: float) -> None:
    """``expm(v qᵀ - q vᵀ - q qᵀv qᵀ) ...`` of the surrounding rotations: ``expm(Ω) q expm(-qᵀv)``."""
    x, u = pairs(shape, length, 3)
    for q, v, end in zip(x.numpy(), u.numpy(), Stiefel().expmap(x, u).numpy(), strict=True):
        a = q.T @ v
        across = v - q @ a
        turn = across @ q.T - q @ across.T + 2 * q @ a @ q.T
        expected = scipy.linalg.expm(turn) @ q @ scipy.linalg.expm(-a)
        np.testing.assert_allclose(end, expected, rtol=0, atol=1e-11 * max(1, length * length / 1e4))


def test_constant_steps_of_many_radii_stay_on_the_manifold() -> None:
    """The issue's case: radius 0.01 and learning rate 5, along geodesics."""
    stiefel, generator = Stiefel(radius=0.01), torch.Generator().manual_seed(0)
    weight = geoopt.ManifoldParameter(stiefel.random(20, 6, 4, generator=generator), manifold=stiefel)
    optimizer = RiemannianFGSGD([weight], lr=5.0, momentum=0.9, update="exponential")
    for _ in range(20):
        weight.grad = torch.randn(weight.shape, generator=generator)
        optimizer.step()
        assert float(stiefel.violation(weight.detach()).max()) <= 1e-5


# -- the logarithm -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [3.0, 4.8, 5.5, 7.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_logarithm_ends_at_the_target_beyond_the_injectivity_radius(shape: tuple[int, int], length: float) -> None:
    stiefel = Stiefel()
    x, u = pairs(shape, length, 6, seed=2)
    y = stiefel.expmap(x, u)
    log = stiefel.logmap(x, y)
    torch.testing.assert_close(stiefel.expmap(x, log), y, rtol=0, atol=1e-13)
    assert bool(stiefel.check_vector_on_tangent(x, log, atol=1e-12, rtol=1e-12))


def test_pairs_that_shooting_alone_took_for_unconnected() -> None:
    """The issue's pairs, 4.8 to 5.5 apart: shooting converges linearly there, and too slowly."""
    torch.manual_seed(42)
    stiefel = Stiefel()
    x = stiefel.projx(torch.randn(10, 5, dtype=torch.float64)).expand(12, 10, 5)
    u = stiefel.proju(x, torch.randn(12, 10, 5, dtype=torch.float64))
    y = stiefel.expmap(x, u)
    torch.testing.assert_close(stiefel.expmap(x, stiefel.logmap(x, y)), y, rtol=0, atol=1e-13)


@settings(max_examples=15)
@given(seed=st.integers(0, 2**31), shape=st.sampled_from(SHAPES), length=st.floats(0.01, 3.1))
def test_logarithm_is_the_shortest_up_to_the_injectivity_radius(
    seed: int, shape: tuple[int, int], length: float
) -> None:
    x, u = pairs(shape, length, 3, seed)
    torch.testing.assert_close(Stiefel().logmap(x, Stiefel().expmap(x, u)), u, rtol=0, atol=1e-9)


@given(seed=st.integers(0, 2**31), size=st.integers(2, 6))
def test_logarithm_of_square_matrices_is_that_of_rotations(seed: int, size: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, y = Stiefel().random(2, 4, size, size, dtype=torch.float64, generator=generator).as_subclass(Tensor)
    y[..., 0] *= torch.linalg.det(x.mT @ y).sign().unsqueeze(-1)
    distances = Stiefel().dist(x, y)
    expected = [oracles.rotation_distance(a, b) for a, b in zip(x.numpy(), y.numpy(), strict=True)]
    np.testing.assert_allclose(distances.numpy(), expected, rtol=1e-9)


@pytest.mark.parametrize("turned", [1, 2])
def test_half_turns_have_a_logarithm(turned: int) -> None:
    signs = torch.tensor([-1.0] * (2 * turned) + [1.0] * (5 - 2 * turned), dtype=torch.float64)
    stiefel, x = Stiefel(2.0), 2 * torch.eye(5, dtype=torch.float64)
    log = stiefel.logmap(x, x * signs)
    torch.testing.assert_close(stiefel.expmap(x, log), x * signs, rtol=0, atol=1e-12)
    torch.testing.assert_close(log.norm(), torch.tensor(2 * math.pi * math.sqrt(2 * turned), dtype=torch.float64))


def test_antipodes_of_tall_matrices_have_a_logarithm() -> None:
    x, _ = pairs((6, 2), 1.0, 3)
    log = Stiefel().logmap(x, -x)
    torch.testing.assert_close(Stiefel().expmap(x, log), -x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_column_is_a_sphere(dtype: torch.dtype) -> None:
    sphere, stiefel = ScaledSphere(0.5, ndim=2), Stiefel(0.5)
    generator = torch.Generator().manual_seed(0)
    x, y = stiefel.random(2, 5, 4, 1, dtype=dtype, generator=generator).as_subclass(Tensor)
    for target in (y, x, -x):
        torch.testing.assert_close(stiefel.logmap(x, target), sphere.logmap(x, target), rtol=0, atol=0)
        torch.testing.assert_close(stiefel.dist(x, target), sphere.dist(x, target))


def test_matrices_in_different_parts_of_the_orthogonal_group_are_named() -> None:
    stiefel = Stiefel(0.5)
    x = 0.5 * torch.eye(3).expand(2, 4, 3, 3)
    y = x.clone()
    y[1, 2, 0] *= -1
    with pytest.raises(RuntimeError, match=r"no geodesic joins the points at index \(1, 2\): the determinants .* flip"):
        stiefel.logmap(x, y)
    with pytest.raises(RuntimeError, match="no geodesic joins the two points: the determinants"):
        stiefel.dist(x[0, 0], y[1, 2])
    assert float(stiefel.dist(x[0], y[0]).max()) == 0


def test_pairs_whose_search_does_not_converge_are_named() -> None:
    """The columns of the identity in reverse: this far away the search finds no geodesic."""
    x = torch.eye(4, 3, dtype=torch.float64).repeat(4, 1, 1)
    y = x.clone()
    y[[1, 3]] = y[[1, 3]].flip(-1)
    with pytest.raises(RuntimeError, match=r"did not converge for the points at index 1, 3 \(largest error .* radii\)"):
        Stiefel().logmap(x, y)


def test_every_pair_of_a_batch_is_found_as_if_it_were_alone() -> None:
    x, u = pairs((8, 3), 1.0, 6)
    u = u * torch.tensor([0.0, 0.01, 1.0, 3.0, 4.5, 5.0]).reshape(-1, 1, 1)
    y = Stiefel().expmap(x, u)
    together = Stiefel().logmap(x, y)
    for k in range(5):
        torch.testing.assert_close(Stiefel().logmap(x[k], y[k]), together[k], rtol=0, atol=1e-11)


# -- its derivative ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(4, 2), (3, 3), (7, 2), (5, 4)], ids=str)
@pytest.mark.parametrize("length", [0.0, 1e-9, 0.5, 2.5])
def test_jacobian_of_the_logarithm_is_the_inverse_of_the_exponential(shape: tuple[int, int], length: float) -> None:
    """At distance zero it is the tangent projection, where unrolled rounds of shooting were off by 0.24."""
    stiefel = Stiefel(0.5)
    x, u = pairs(shape, length, 1)
    x, u = 0.5 * x[0], 0.5 * u[0]
    y = stiefel.expmap(x, u)
    size = x.numel()
    of_exp = torch.func.jacrev(lambda u: stiefel.expmap(x, stiefel.proju(x, u)))(u).reshape(size, size)
    of_log = torch.func.jacrev(lambda y: stiefel.logmap(x, stiefel.projx(y)))(y).reshape(size, size)
    projection = torch.func.jacrev(lambda v: stiefel.proju(x, v))(u).reshape(size, size)
    torch.testing.assert_close(of_log @ of_exp, projection, rtol=0, atol=1e-9)


def test_derivative_of_the_logarithm_of_larger_matrices() -> None:
    """Along a curve, against a difference quotient; the systems are solved without their matrix."""
    stiefel = Stiefel()
    (x, y), _ = pairs((40, 12), 1.0, 2)
    y = stiefel.expmap(x, 2.0 * stiefel.logmap(x, stiefel.projx(x + 0.2 * y)))
    x_t, y_t = stiefel.proju(x, torch.cos(1 + y)), stiefel.proju(y, torch.sin(3 * x))

    def log(t: float | Tensor) -> Tensor:
        return stiefel.logmap(stiefel.projx(x + t * x_t), stiefel.projx(y + t * y_t))

    zero, one = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
    _, forward = torch.func.jvp(log, (zero,), (one,))
    quotient = (log(1e-5) - log(-1e-5)) / 2e-5
    torch.testing.assert_close(forward, quotient, rtol=0, atol=1e-7)
    _, pull = torch.func.vjp(log, zero)
    torch.testing.assert_close(pull(x_t)[0], (x_t * quotient).sum(), rtol=1e-7, atol=1e-7)


def test_solutions_do_not_keep_a_gradient_they_were_not_asked_for() -> None:
    x, u = pairs((5, 2), 1.0, 2)
    y = Stiefel().expmap(x, u).requires_grad_()
    log = Stiefel().logmap(x, y)
    log.square().sum().backward()
    assert x.grad is None
    assert y.grad is not None
    torch.testing.assert_close(Stiefel().proju(y.detach(), y.grad), y.grad, rtol=0, atol=1e-12)
