"""Statements of ``docs/mathematics.md`` about the method as a whole, each checked on the package."""

from __future__ import annotations

import math

import geoopt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fgo_geo
from fgo_geo import Oblique, RiemannianFGSGD, ScaledSphere, Stiefel
from fgo_geo.norms import matrix_norms
from fgo_geo.optim import theorem_step_scale

KINDS = ("sphere", "oblique", "stiefel", "euclidean")


# -- section 2: the two parts of the orthogonal group ------------------------------------------------------------------


@given(st.integers(2, 4), st.integers(0, 2**31), st.floats(-2, 4), st.sampled_from(["retr", "expmap"]))
def test_no_step_crosses_between_the_parts_of_a_square_stiefel_manifold(n, seed, magnitude, move):
    generator = torch.Generator().manual_seed(seed)
    manifold = Stiefel()
    x = manifold.projx(torch.randn(n, n, generator=generator, dtype=torch.float64))
    u = manifold.proju(x, 10**magnitude * torch.randn(n, n, generator=generator, dtype=torch.float64))
    y = getattr(manifold, move)(x, u)
    assert torch.linalg.det(x) * torch.linalg.det(y) == pytest.approx(1)


# -- section 3: how many groups ----------------------------------------------------------------------------------------


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 4), st.sampled_from(["random", "deterministic"]))
def test_number_of_groups_of_small_layers_and_odd_numbers_of_channels(d, c, k, selection):
    expected = {"pi": c * min(k, d), "po": d * min(k, c), "pio": d + c // 2 * min(k, d)}
    made = {strategy: fgo_geo.collection(d, c, strategy, KINDS[:k], selection) for strategy in expected}
    assert {strategy: len(each.groups) for strategy, each in made.items()} == expected
    assert made["pio"].by_output.sum() == math.ceil(c / 2)


# -- section 4: curvature, radius, weight decay ------------------------------------------------------------------------


@given(st.floats(0.05, 20))
def test_up_to_which_curvature_equation_7_is_the_general_formula(rho):
    norms = torch.logspace(-6, 6, 4001, dtype=torch.float64)
    knee = math.hypot(1, rho) - rho
    norms = torch.cat([norms, knee * (1 + torch.logspace(-9, -3, 50, dtype=torch.float64))])
    largest = 2 * rho * (1 + rho / math.hypot(1, rho))
    flat = theorem_step_scale(norms, rho, 0.0)
    torch.testing.assert_close(theorem_step_scale(norms, rho, largest * (1 - 1e-9)), flat, rtol=1e-12, atol=0)
    assert (theorem_step_scale(norms, rho, largest * 1.01) > flat * (1 + 1e-9)).any()


@given(st.floats(0.01, 10), st.floats(1, 5))
def test_with_its_own_curvature_a_step_stays_within_one_radius(radius, rho):
    norms = torch.logspace(-4, 6, 5001, dtype=torch.float64)
    lengths = norms / theorem_step_scale(norms, rho, radius**-2)
    assert lengths.max() < radius


def test_radius_invariant_norms_of_components_of_different_radii():
    radii = torch.tensor([0.5, 2.0], dtype=torch.float64)
    x = geoopt.ManifoldParameter(torch.eye(2, dtype=torch.float64) * radii[:, None], manifold=ScaledSphere(radii))
    x.grad = torch.tensor([[9.0, 3.0], [4.0, 9.0]], dtype=torch.float64)  # tangent parts 3 and 4
    before = x.detach().clone()
    optimizer = RiemannianFGSGD([x], lr=1e-3, radius_invariant=True)
    optimizer.step()
    norm = math.hypot(0.5 * 3, 2 * 4)
    tau = norm * (2 + norm)
    assert optimizer.step_scales()[x].item() == pytest.approx(tau)
    moved = (x.detach() - before).norm(dim=1)
    torch.testing.assert_close(moved, 1e-3 * radii**2 * torch.tensor([3.0, 4.0]) / tau, rtol=1e-5, atol=0)


def test_weight_decay_is_part_of_the_norm_of_a_euclidean_group():
    x = geoopt.ManifoldParameter(torch.tensor([[3.0]]), manifold=geoopt.Euclidean(ndim=2))
    x.grad = torch.tensor([[1.0]])
    optimizer = RiemannianFGSGD([x], lr=0.1, weight_decay=0.5, adapt_euclidean=True)
    optimizer.step()
    assert optimizer.step_scales()[x].item() == pytest.approx(2.5 * 4.5)
    assert x.item() == pytest.approx(3 - 0.1 * 2.5 / (2.5 * 4.5))


# -- section 5: the largest sum of row norms, and products over groups -------------------------------------------------


def test_the_largest_two_to_one_norms_are_attained_where_all_rows_have_the_same_norm():
    hadamard = torch.tensor([[1.0, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]], dtype=torch.float64)
    point = hadamard[:, :3] / 2  # on the oblique and the Stiefel manifold of 4 x 3 matrices
    assert max(Oblique().violation(point).max(), Stiefel().violation(point).max()) < 1e-15
    assert matrix_norms(point).two_to_one.item() == pytest.approx(math.sqrt(4 * 3))
    assert matrix_norms(point / math.sqrt(3)).two_to_one.item() == pytest.approx(math.sqrt(4))  # on the sphere


def test_a_product_over_groups_is_no_bound_of_the_layer():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(64, 64, 3, bias=False))
    fgo_geo.constrain(model, "pi", KINDS, first_layer=True)
    (layer,) = fgo_geo.report(model).layers
    assert layer.n_groups == 256
    assert layer.groups.spectral.log().sum() < -200
    assert layer.layer.spectral > 1


def test_a_bound_on_the_groups_does_not_bound_the_layer():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(64, 64, 3, bias=False))
    fgo_geo.constrain(model, "pi", ("stiefel",), first_layer=True, radius="bound")
    (layer,) = fgo_geo.report(model).layers
    assert layer.worst("two_to_one") == pytest.approx(1)
    assert layer.layer.two_to_one.item() == pytest.approx(36.95, abs=0.01)


# -- section 7: rings of one and two channels --------------------------------------------------------------------------


@pytest.mark.parametrize(("ends", "eigenvalue"), [("periodic", 4), ("free", 2)])
def test_a_ring_of_two_channels_has_two_bonds(ends, eigenvalue):
    g = torch.tensor([1.0, -1.0], dtype=torch.float64)
    for metric, level in (("h1", 1), ("h1t", 0)):
        result = fgo_geo.channel_directed_gradient(g, metric, lam=3.0, ends=ends)
        torch.testing.assert_close(result, g / (level + 3 * eigenvalue))
        one = torch.tensor([5.0], dtype=torch.float64)
        torch.testing.assert_close(fgo_geo.channel_directed_gradient(one, metric, lam=3.0, ends=ends), one)
