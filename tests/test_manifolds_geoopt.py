"""The component manifolds as Geoopt's: copies, its classes, and its traps."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import geoopt
import pytest
import torch
from strategies import Entry, arguments, every_entry, fixed, results
from torch import Tensor

from fgo_geo import Oblique, ScaledSphere, Stiefel
from fgo_geo.manifolds import ComponentManifold

# -- copies and Geoopt's classes ---------------------------------------------------------------------------------


def saved_and_loaded(value: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), saved_and_loaded])
@pytest.mark.parametrize("radius", [0.5, torch.tensor([0.5, 1.0, 2.0])], ids=["number", "tensor"])
@every_entry
def test_copies(entry: Entry, radius: float | Tensor, duplicate: Callable[[Any], Any]) -> None:
    case = fixed(entry, *((3, 4) if entry.name == "sphere" else (3, 5, 4)), radius=radius)
    parameter = geoopt.ManifoldParameter(case.point(), manifold=case.manifold)
    other = duplicate(parameter)
    assert isinstance(other, geoopt.ManifoldParameter)
    assert torch.equal(other, parameter)
    for manifold in (duplicate(case.manifold), other.manifold):
        assert manifold is not case.manifold
        assert repr(manifold) == repr(case.manifold)
        assert manifold.radius_range == case.manifold.radius_range
        args = arguments(case, "retr_transp")
        for result, expected in zip(
            results(manifold, "retr_transp", args), results(case.manifold, "retr_transp", args), strict=True
        ):
            assert torch.equal(result, expected)


@every_entry
def test_parameters_in_a_module(entry: Entry) -> None:
    case = fixed(entry, 3, 5, 4)
    module = torch.nn.Module()
    module.weight = geoopt.ManifoldParameter(case.ambient(), manifold=case.manifold)
    with torch.no_grad():
        module.weight.proj_()
    case.manifold.assert_check_point_on_manifold(module.weight)
    other = torch.nn.Module()
    other.weight = geoopt.ManifoldParameter(torch.zeros(case.shape, dtype=torch.float64), manifold=case.manifold)
    other.load_state_dict(module.state_dict())
    assert torch.equal(other.weight, module.weight)
    assert other.weight.manifold is case.manifold
    u = case.tangent(module.weight.detach().as_subclass(Tensor))
    assert torch.equal(module.weight.retr(u), case.manifold.retr(module.weight, u))


OPTIMIZERS: list[Callable[..., torch.optim.Optimizer]] = [
    lambda p: geoopt.optim.RiemannianSGD(p, lr=0.1, momentum=0.5),
    lambda p: geoopt.optim.RiemannianSGD(p, lr=0.1, momentum=0.5, nesterov=True, weight_decay=0.01, stabilize=5),
    lambda p: geoopt.optim.RiemannianAdam(p, lr=0.1, stabilize=7),
    lambda p: geoopt.optim.RiemannianAdam(p, lr=0.1, amsgrad=True, weight_decay=0.01),
]


@pytest.mark.parametrize("make", OPTIMIZERS, ids=["sgd", "nesterov", "adam", "amsgrad"])
@pytest.mark.parametrize("radius", [0.5, torch.tensor([0.5, 1.0, 2.0])], ids=["number", "tensor"])
@every_entry
def test_optimisers_of_geoopt(entry: Entry, radius: float | Tensor, make: Callable[..., torch.optim.Optimizer]) -> None:
    case = fixed(entry, *((3, 4) if entry.name == "sphere" else (3, 5, 4)), radius=radius, dtype=torch.float32)
    parameter = geoopt.ManifoldParameter(case.point(), manifold=case.manifold)
    target = case.point()
    optimizer = make([parameter])
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = (parameter - target).square().sum()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
        assert float(case.manifold.violation(parameter.detach()).max()) <= 64 * case.eps
    assert losses[-1] < 0.7 * losses[0]


def test_adam_takes_one_second_moment_per_column() -> None:
    """Max-cut on the Petersen graph (relaxation: 12.5): columns take the steps that rows of a sphere take."""
    edges = [(i, (i + 1) % 5) for i in range(5)] + [(i, i + 5) for i in range(5)]
    tail, head = torch.tensor(edges + [(5 + i, 5 + (i + 2) % 5) for i in range(5)]).T
    start = ScaledSphere().random(10, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    cuts = []
    for manifold, turn in ((ScaledSphere(), lambda w: w), (Oblique(), lambda w: w.mT)):
        weight = geoopt.ManifoldParameter(turn(start.as_subclass(Tensor)).clone(), manifold=manifold)
        optimizer = geoopt.optim.RiemannianAdam([weight], lr=0.05)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 300)
        for _ in range(300):
            rows = turn(weight)
            cut = ((1 - (rows[tail] * rows[head]).sum(-1)) / 2).sum()
            optimizer.zero_grad()
            (-cut).backward()
            optimizer.step()
            schedule.step()
        cuts.append(float(cut.detach()))
    assert cuts[1] == pytest.approx(cuts[0], rel=1e-9)
    assert 12.4 < cuts[1] <= 12.5


@every_entry
def test_scaled_by_geoopt(entry: Entry) -> None:
    case = fixed(entry, 2, 5, 4)
    scaled, x = geoopt.Scaled(case.manifold, 2.0), case.point()
    u = case.tangent(x, 1.0)
    y = scaled.expmap(x, u)
    torch.testing.assert_close(y, case.manifold.expmap(x, u / 2))
    torch.testing.assert_close(scaled.retr(x, u), case.manifold.retr(x, u / 2))
    torch.testing.assert_close(scaled.dist(x, y), 2 * case.manifold.dist(x, y))
    torch.testing.assert_close(scaled.dist2(x, y), 4 * case.manifold.dist2(x, y))
    torch.testing.assert_close(scaled.logmap(x, y), u)
    torch.testing.assert_close(scaled.dist(x, y), scaled.norm(x, u))
    torch.testing.assert_close(scaled.transp_follow_expmap(x, u, u), case.manifold.transp_follow_expmap(x, u / 2, u))
    torch.testing.assert_close(scaled.retr_transp(x, u, u), case.manifold.retr_transp(x, u / 2, u))
    assert scaled.check_point_on_manifold(y)
    with pytest.raises(NotImplementedError):
        scaled.retract_bounded(x, u, 1.0)


# -- traps in Geoopt that these manifolds avoid ------------------------------------------------------------------


def test_geoopt_sphere_of_zero_is_nan_and_ours_is_not() -> None:
    zero = torch.zeros(3)
    assert bool(geoopt.Sphere().projx(zero).isnan().all())
    assert bool(ScaledSphere().projx(zero).isfinite().all())


def test_geoopt_sphere_has_no_gradient_at_the_zero_step_and_ours_has() -> None:
    x = torch.tensor([1.0, 0.0])
    for manifold, finite in ((geoopt.SphereExact(), False), (ScaledSphere(), True)):
        u = torch.zeros(2, requires_grad=True)
        for move in (manifold.retr, manifold.expmap):
            (gradient,) = torch.autograd.grad(move(x, u).sum(), u)
            assert bool(gradient.isfinite().all()) == finite


def test_geoopt_stiefel_projection_is_not_idempotent_and_ours_is() -> None:
    x = Stiefel().random(5, 3, dtype=torch.float64).as_subclass(Tensor)
    u = torch.ones(5, 3, dtype=torch.float64)
    for manifold, idempotent in ((geoopt.Stiefel(), False), (Stiefel(), True)):
        once = manifold.proju(x, u)
        assert torch.allclose(manifold.proju(x, once), once) == idempotent


def test_geoopt_scaled_sphere_has_unit_points_and_ours_has_not() -> None:
    z = torch.tensor([3.0, 4.0])
    assert float(geoopt.Scaled(geoopt.Sphere(), 2.0).projx(z).norm()) == pytest.approx(1.0)
    assert float(ScaledSphere(2.0).projx(z).norm()) == pytest.approx(2.0)


def test_geoopt_sphere_constrains_rows_of_a_kernel_and_ours_the_kernel() -> None:
    weight = torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    assert geoopt.Sphere().projx(weight).norm(dim=-1).std() < 1e-6
    kernels = ScaledSphere(ndim=2).projx(weight)
    torch.testing.assert_close(kernels.norm(dim=(-2, -1)), torch.ones(4, 3))
    assert kernels.norm(dim=-1).std() > 0.01


@every_entry
def test_parameters_are_not_checked_by_geoopt_but_can_be(entry: Entry) -> None:
    case = fixed(entry, 2, 5, 4)
    parameter = geoopt.ManifoldParameter(3 * case.point(), manifold=case.manifold)
    assert not case.manifold.check_point_on_manifold(parameter)
    with torch.no_grad():
        parameter.proj_()
    assert case.manifold.check_point_on_manifold(parameter)


@pytest.mark.parametrize("base", [ScaledSphere, Oblique, Stiefel])
def test_overriding_a_projection_reaches_its_aliases(base: type[ComponentManifold]) -> None:
    class Doubled(base):
        def proju(self, x: Tensor, u: Tensor) -> Tensor:
            return 2 * super().proju(x, u)

        def uniform(self, gaussian: Tensor) -> Tensor:
            return 2 * super().uniform(gaussian)

    plain, doubled = base(), Doubled()
    x, u = plain.random(4, 3).as_subclass(Tensor), torch.ones(4, 3)
    assert torch.equal(doubled.egrad2rgrad(x, u), 2 * plain.egrad2rgrad(x, u))
    assert torch.equal(doubled.transp(x, x, u), 2 * plain.transp(x, x, u))
    torch.manual_seed(0)
    point = doubled.random_uniform(4, 3)
    torch.manual_seed(0)
    assert torch.equal(point, 2 * plain.random_uniform(4, 3))
