"""Rounding in the compiled sweeps over lines: points stay on their manifolds, whatever gradients do."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from path_helpers import (
    CLOSE,
    as_parameter,
    assert_close,
    built,
    declared,
    in_double,
    many_weights,
    product_of_blocks,
    trained,
)
from torch import Tensor

from fgo_geo import Oblique, ProductOfGroups, RiemannianFGSGD, ScaledSphere
from fgo_geo.grouping import collection
from fgo_geo.paths.native.lines import NativeLines
from fgo_geo.paths.protocol import Claim, StepOptions, Weight


def squared_norms(weight: Any) -> Tensor:
    """``R²`` of all groups, as the sweeps measure it."""
    own = Weight(weight, weight, weight.manifold, weight.grad)
    return NativeLines().batch([Claim(own, (0,))]).measure(StepOptions(lr=0.1))


@built
@pytest.mark.parametrize("factor", [1e-3, 0.9, 1.1, 30.0])
def test_a_point_off_its_manifold_is_brought_back(factor: float):
    for weight in many_weights():
        optimizer = RiemannianFGSGD([weight], lr=0.1, momentum=0.9)
        weight.data.mul_(factor)  # what no optimiser does
        weight.grad = 0.01 * torch.ones_like(weight)
        optimizer.step()
        assert float(weight.manifold.violation(weight.detach()).max()) <= 5e-7


@built
@pytest.mark.parametrize("normal", [0.0, 1e2, 1e4, 1e6])
@pytest.mark.parametrize("length", [1e-4, 0.5, 50.0, 1e4])
def test_steps_of_every_length_end_on_the_manifold(length: float, normal: float):
    """The normal part of a gradient makes no step, but its rounding shows in the new point where it is large."""
    for weight in many_weights():
        tangent = weight.manifold.proju(weight.detach(), torch.ones_like(weight))
        weight.grad = (tangent + normal * weight.detach()).as_subclass(Tensor)
        RiemannianFGSGD([weight], lr=length, step_size="constant").step()
        assert float(weight.manifold.violation(weight.detach()).max()) <= 5e-7


@built
@pytest.mark.parametrize("length", [4, 5, 16, 64])
@pytest.mark.parametrize("exponent", range(0, 61, 4))
def test_a_gradient_along_the_normal_does_no_harm(length: int, exponent: int):
    """All its terms cancel: what is left of them in rounding is no length to divide by, and no squared norm."""
    for weight in (
        declared(ScaledSphere(1e-3), 50, length),
        declared(Oblique(), length, 50),
        declared(product_of_blocks((2 * length, 3 * length), "pio", ("oblique", "sphere")), 2 * length, 3 * length),
    ):
        optimizer = RiemannianFGSGD([weight], lr=1.0, momentum=0.9)
        for _ in range(3):
            weight.grad = 2.0**exponent * weight.detach().as_subclass(Tensor)
            optimizer.step()
        assert float(weight.manifold.violation(weight.detach()).max()) <= 5e-7


@built
@pytest.mark.parametrize("nesterov", [False, True])
def test_a_step_whose_terms_cancel_goes_in_the_right_direction(nesterov: bool):
    options = {"lr": 1.0, "step_size": "constant", "momentum": 0.9, "nesterov": nesterov}
    for weight in (
        declared(ScaledSphere(), 30, 7),
        declared(Oblique(2.0), 9, 40),
        declared(Oblique(), 9, 4, dims=(1, 0)),
    ):
        results: list[Tensor] = []
        for own in (copy.deepcopy(weight), in_double(weight)):
            optimizer = RiemannianFGSGD([own], **options)
            for seed in range(3):
                tangent = torch.randn(own.shape, generator=torch.Generator().manual_seed(seed))
                own.grad = (tangent + 100 * weight.detach().as_subclass(Tensor)).to(own.dtype)
                optimizer.step()
            results.append(own.detach().double())
        torch.testing.assert_close(*results, rtol=0, atol=2e-4)  # the weights differ by rounding, times a hundred


@built
@pytest.mark.parametrize("invariant", [False, True])
@pytest.mark.parametrize("decay", [0.0, 5.0])
@pytest.mark.parametrize("shape", [(40, 30), (39, 31)])
def test_step_sizes_with_the_manifolds_own_curvature(invariant: bool, decay: float, shape: tuple[int, int]):
    """On radius 0.1, ``τ`` follows from the norm in closed form; Euclidean groups are flat, and of no radius."""
    kinds = ("sphere", "oblique", "euclidean")
    radii = {"sphere": 0.1, "oblique": 0.2, "euclidean": 1.0}
    manifold = ProductOfGroups(collection(*shape, "po", kinds, "random", 0, components="block"), shape, radii)
    weight = declared(manifold, *shape)
    weight.grad = 3 * torch.randn(shape, generator=torch.Generator().manual_seed(1))
    options = {"curvature": "manifold", "radius_invariant": invariant, "rho": 0.01, "weight_decay": decay}
    optimizer = RiemannianFGSGD([weight], lr=0.1, **options)
    point = weight.detach().as_subclass(Tensor).double()
    grad = manifold.where_constrained(weight.grad.double(), weight.grad + decay * point)
    optimizer.step()
    norms = manifold.group_norm(point, manifold.proju(point, grad))
    for (group, kind), norm, tau in zip(
        enumerate(c.manifold for c in manifold.collections[0].groups),
        norms,
        optimizer.step_scales()[weight],
        strict=True,
    ):
        radius = radii[kind]
        norm = float(norm) * (radius if invariant and kind != "euclidean" else 1.0)
        curvature = 0.0 if kind == "euclidean" else 1.0 if invariant else radius**-2
        expected = max(1.0, norm * max(2 * 0.01 + norm, (1 + curvature * (0.01 + norm)) ** 0.5))
        assert float(tau) == pytest.approx(expected, rel=1e-5), (group, kind)


@built
@pytest.mark.parametrize("invariant", [False, True])
@pytest.mark.parametrize("manifold", [ScaledSphere(0.5), Oblique(0.5), ScaledSphere(torch.tensor([0.5] * 32))], ids=str)
def test_step_size_of_one_manifold_with_its_own_curvature(manifold: Any, invariant: bool):
    """Where the curvature decides: a norm of one, at radius one or at that of the weight."""
    weight = declared(manifold, 32, 20)
    tangent = manifold.proju(weight.detach(), torch.randn(32, 20, generator=torch.Generator().manual_seed(1)))
    weight.grad = (tangent / tangent.norm()).as_subclass(Tensor) / (0.5 if invariant else 1.0)
    optimizer = RiemannianFGSGD([weight], lr=0.1, curvature="manifold", radius_invariant=invariant, rho=0.1)
    optimizer.step()
    assert float(optimizer.step_scales()[weight]) == pytest.approx(
        (1 + (1.0 if invariant else 4.0) * 1.1) ** 0.5, rel=1e-5
    )


@built
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("size", [1e6, 1e7, 1e8, 1e9])
def test_no_step_is_longer_than_the_theorem_allows(size: float, sign: int):
    """What rounding leaves of a gradient along the normal is a gradient: it has a norm, which bounds the step."""
    for seed in range(4):
        for manifold in (ScaledSphere(2.0, ndim=2), ScaledSphere(2.0, ndim=1), Oblique()):
            point = manifold.random(48, 64, generator=torch.Generator().manual_seed(seed)).as_subclass(Tensor)
            weight = as_parameter(point.clone(), manifold)
            weight.grad = sign * size * point
            optimizer = RiemannianFGSGD([weight], lr=0.1)
            optimizer.step()
            assert float((weight.detach() - point).norm()) <= (2**0.5 - 1) * 0.1 * 1.01
            task = in_double(as_parameter(point, manifold))
            tangent = manifold.proju(task.detach(), weight.grad.double())
            norm = float(tangent.norm())
            assert float(optimizer.step_scales()[weight]) == pytest.approx(max(1.0, norm * (2 + norm)), rel=1e-3)


@built
def test_no_squared_norm_is_below_zero():
    weight = declared(ScaledSphere(), 300, 64)
    manifold = ProductOfGroups(collection(300, 64, "po", ("sphere",) * 300, components="block"), (300, 64))
    weight = as_parameter(weight.detach().as_subclass(Tensor), manifold)
    weight.grad = weight.detach().as_subclass(Tensor).clone()  # nothing but rounding is tangent
    squared = squared_norms(weight)
    assert squared.shape == (300,)
    assert float(squared.min()) >= 0
    assert float(squared.max()) <= 1e-13


@built
def test_weight_decay_that_is_short_beside_rounding_is_not_lost():
    manifold = product_of_blocks((64, 64), "po", ("sphere", "euclidean"))
    rows = manifold.collections[0].groups[1].rows
    weight = declared(manifold, 64, 64)
    with torch.no_grad():
        weight[rows.tolist()] = 1.0
    optimizer = RiemannianFGSGD([weight], lr=2e-4, weight_decay=1e-4, step_size="constant")
    generator = torch.Generator().manual_seed(0)
    for _ in range(2000):
        noise = torch.randn(64, 64, generator=generator)
        for sign in (1, -1):  # which cancels but for what is rounded
            weight.grad = sign * noise
            optimizer.step()
    lost = 1 - float(weight.detach()[rows.tolist()].double().mean())
    assert lost == pytest.approx(4000 * 2e-8, rel=0.2)


@built
@pytest.mark.parametrize("size", [1e18, 1e22, 1e30])
def test_a_gradient_whose_square_overflows_takes_the_bounded_step(size: float):
    for weight in many_weights():
        actual = trained("auto", [weight], 1, size, rho=0.1)
        expected = trained("reference", [in_double(weight)], 1, size, rho=0.1)
        assert_close(actual | {"scales": []}, expected | {"scales": []}, CLOSE)
        assert float(weight.manifold.violation(actual["weights"][0]).max()) <= 5e-7


@built
@pytest.mark.parametrize("normal", [1.0, 1e3, 1e5])
def test_the_norm_of_an_almost_normal_gradient_is_right(normal: float):
    """In single precision nothing would be left of it."""
    manifold = ScaledSphere(2.0)
    weight = declared(manifold, 1, 4096)
    point = weight.detach().as_subclass(Tensor).double()
    tangent = torch.randn(1, 4096, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    grad = (tangent / tangent.norm() + normal * point).float()
    along = (point * grad).sum() / 4
    weight.grad = grad
    torch.testing.assert_close(
        squared_norms(weight)[0], (grad - along * point).square().sum(), rtol=1e-5, atol=4e-14 * normal**2
    )


@built
def test_ten_thousand_steps_do_not_drift():
    weights = [declared(Oblique(), 32, 20), declared(ScaledSphere(3.0), 8, 32)]
    after = trained("auto", weights, 10_000, 0.1, momentum=0.9)
    for weight, point in zip(weights, after["weights"], strict=True):
        assert float(weight.manifold.violation(point).max()) <= 5e-7
    for weight, point, momentum in zip(weights, after["weights"], after["momentum"], strict=True):
        normal = momentum - weight.manifold.proju(point, momentum)
        assert float(normal.norm()) <= 0.5 * float(momentum.norm())  # tangent at the point before
