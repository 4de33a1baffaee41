"""RiemannianFGSGD on the manifolds of Geoopt, and against Geoopt's own optimiser."""

from __future__ import annotations

import math

import geoopt
import numpy as np
import pytest
import reference_optimizer as reference
import torch
from parameters import MOMENTA, assert_same, geoopt_manifolds, network, normal, on_geoopt, plain, set_gradients

from fgo_geo import RiemannianFGSGD
from fgo_geo.optim import theorem_step_scale

# -- the manifolds of Geoopt ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"nesterov": True, "weight_decay": 1e-3}, {"step_size": "constant"}])
@pytest.mark.parametrize("name", geoopt_manifolds())
def test_fifty_steps_stay_on_every_manifold_of_geoopt(name, options):
    """Every step pulls towards another random point, so that noncompact manifolds are not left through infinity."""
    manifold, shape = geoopt_manifolds()[name]
    param = on_geoopt(manifold, *shape)
    start = param.detach().clone()
    optimizer = RiemannianFGSGD([param], lr=0.02, momentum=0.9, **options)
    for step in range(50):
        param.grad = (param - on_geoopt(manifold, *shape, seed=step)).detach()
        kept, before = param.grad.clone(), param.detach().clone()
        optimizer.step()
        assert_same([param.grad], [kept])
        tau = optimizer.step_scales()[param].item()
        riemannian = manifold.egrad2rgrad(before, kept + optimizer.defaults["weight_decay"] * before)
        squared = manifold.inner(before, riemannian).sum().real.item()
        expected = theorem_step_scale(math.sqrt(squared)).item() if "step_size" not in options else 1.0
        assert tau == pytest.approx(expected, rel=1e-6)
    manifold.assert_check_point_on_manifold(param)
    assert not torch.equal(param, start)


def test_the_scale_on_the_poincare_ball_uses_the_hyperbolic_norm():
    """The metric is λ² times the Euclidean one with λ = 2 / (1 - ‖x‖²), so R = ‖g‖ / λ."""
    x, g = torch.tensor([0.6, 0.0], dtype=torch.float64), torch.tensor([3.0, 4.0], dtype=torch.float64)
    manifold, _ = geoopt_manifolds()["PoincareBall"]
    param = geoopt.ManifoldParameter(x, manifold=manifold)
    param.grad = g
    optimizer = RiemannianFGSGD([param], lr=0.1)
    optimizer.step()
    norm = 5.0 / (2 / (1 - 0.36))
    assert optimizer.step_scales()[param].item() == pytest.approx(norm * (2 + norm), rel=1e-12)


def test_the_scale_on_positive_definite_matrices_uses_the_affine_invariant_norm():
    """At x with symmetric gradient g the Riemannian gradient is x g x, of squared norm tr((g x)²)."""
    x = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=torch.float64)
    g = torch.tensor([[1.0, -1.0], [-1.0, 3.0]], dtype=torch.float64)
    assert np.trace(g.numpy() @ x.numpy() @ g.numpy() @ x.numpy()) == 9
    param = geoopt.ManifoldParameter(x, manifold=geoopt.SymmetricPositiveDefinite())
    param.grad = g
    optimizer = RiemannianFGSGD([param], lr=0.1)
    optimizer.step()
    assert optimizer.step_scales()[param].item() == pytest.approx(15, rel=1e-12)


def test_a_lorentz_norm_that_rounds_below_zero_is_zero():
    """The Minkowski form of a tangent vector is positive, but cancels for points far out."""
    lorentz = geoopt.Lorentz()
    generator = torch.Generator().manual_seed(0)
    points = lorentz.expmap0(torch.cat([torch.zeros(400, 1), 3 * torch.randn(400, 3, generator=generator)], 1))
    params = [geoopt.ManifoldParameter(x.clone(), manifold=lorentz) for x in points]
    for param in params:
        param.grad = 1e-5 * torch.randn(4, generator=generator)
    rounded = [lorentz.inner(p.detach(), lorentz.egrad2rgrad(p.detach(), p.grad.clone())) < 0 for p in params]
    assert any(rounded)
    optimizer = RiemannianFGSGD(params, lr=0.1)
    optimizer.step()
    for param, negative in zip(params, rounded, strict=True):
        assert optimizer.step_scales()[param].item() >= 1
        assert not negative or bool(param.isfinite().all())


# -- Geoopt's own optimiser: what it gets wrong ----------------------------------------------------------------------


@pytest.mark.parametrize("momentum", MOMENTA)
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("name", ["Sphere", "Stiefel euclidean"])
def test_a_constant_step_is_correct_riemannian_sgd(momentum, weight_decay, name):
    manifold, shape = geoopt_manifolds()[name]
    param = on_geoopt(manifold, *shape)
    kind = reference.Sphere if name == "Sphere" else lambda radius: reference.Stiefel(radius, retraction="qr")
    oracle = reference.batch_of_components(param.detach().numpy(), manifold.ndim, kind)
    options = {"lr": 0.2, "weight_decay": weight_decay, "step_size": "constant"} | momentum
    optimizer = RiemannianFGSGD([param], **options)
    for step in range(5):
        set_gradients([param], step)
        optimizer.step()
        reference.step(oracle, param.grad.numpy(), **options)
        np.testing.assert_allclose(param.detach().numpy(), oracle.x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("radial", [0.0, 1.0])
def test_geoopts_first_step_with_momentum_is_wrong_and_ours_is_not(radial):
    """Its buffer starts with the raw gradient and adds the Riemannian one: (1 + μ) g, and its normal part stays."""
    angles = {}
    for optimizer_class, options in (
        (geoopt.optim.RiemannianSGD, {}),
        (RiemannianFGSGD, {"step_size": "constant"}),
    ):
        x = geoopt.ManifoldParameter(torch.tensor([1.0, 0.0], dtype=torch.float64), manifold=geoopt.Sphere())
        x.grad = torch.tensor([radial, 0.1], dtype=torch.float64)
        optimizer_class([x], lr=1.0, momentum=0.9, **options).step()
        angles[optimizer_class] = -torch.atan2(x[1], x[0]).item()
    assert angles[geoopt.optim.RiemannianSGD] == pytest.approx(math.atan2(0.19, 1 - 0.9 * radial), rel=1e-9)
    assert angles[RiemannianFGSGD] == pytest.approx(math.atan2(0.1, 1), rel=1e-9)


def test_geoopts_manifolds_write_into_gradients_and_we_do_not():
    lorentz, shape = geoopt_manifolds()["Lorentz"]
    for optimizer_class, writes in ((geoopt.optim.RiemannianSGD, True), (RiemannianFGSGD, False)):
        x = on_geoopt(lorentz, *shape)
        x.grad = normal(shape, 1)
        optimizer_class([x], lr=0.1).step()
        assert torch.equal(x.grad, normal(shape, 1)) != writes


@pytest.mark.parametrize("options", [{"weight_decay": 0.1}, {"momentum": 0.9, "nesterov": True}])
def test_geoopt_writes_into_gradients_and_we_do_not(options):
    for optimizer_class, writes in ((geoopt.optim.RiemannianSGD, True), (RiemannianFGSGD, False)):
        x, y = on_geoopt(geoopt.Sphere(), 4), plain(4)
        set_gradients([x, y], 1)
        kept = [p.grad.clone() for p in (x, y)]
        optimizer_class([x, y], lr=0.1, **options).step()
        written = [not torch.equal(p.grad, k) for p, k in zip((x, y), kept, strict=True)]
        assert any(written) == writes


@pytest.mark.parametrize("options", [*MOMENTA, {"weight_decay": 0.1}, {"maximize": True}, {"step_size": "constant"}])
def test_no_option_writes_into_a_gradient(options):
    params = network()
    optimizer = RiemannianFGSGD(params, lr=0.1, **options)
    for step in range(2):
        set_gradients(params, step)
        kept, versions = [p.grad.clone() for p in params], [p.grad._version for p in params]
        optimizer.step()
        assert_same([p.grad for p in params], kept)
        assert [p.grad._version for p in params] == versions


@pytest.mark.parametrize("update", ["retraction", "exponential"])
def test_momentum_goes_with_the_point(update):
    """Geoopt's manifolds transport at the end of a step: on its sphere, onto the tangent space of the new point."""
    x = on_geoopt(geoopt.Sphere(), 5)
    optimizer = RiemannianFGSGD([x], lr=0.3, momentum=0.9, step_size="constant", update=update)
    before, x.grad = x.detach().clone(), normal((5,), seed=3)
    tangent = x.grad - before * (before @ x.grad)
    optimizer.step()
    turned = torch.nn.functional.normalize(before - 0.3 * tangent, dim=0)
    if update == "exponential":
        angle = 0.3 * tangent.norm()
        turned = before * angle.cos() - tangent / tangent.norm() * angle.sin()
    torch.testing.assert_close(x.detach(), turned, rtol=0, atol=1e-12)
    momentum = optimizer.state[x]["momentum_buffer"]
    torch.testing.assert_close(momentum, tangent - turned * (turned @ tangent), rtol=0, atol=1e-12)
