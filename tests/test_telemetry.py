"""Angles of steps, shortened groups and radial gradients: closed forms, an oracle in float64, and what they cost."""

from __future__ import annotations

import copy
import math
from typing import Any

import geoopt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import images, net
from path_helpers import as_parameter
from torch import Tensor, nn

from fgo_geo import (
    RiemannianFGSGD,
    ScaledSphere,
    Stiefel,
    channel_directed,
    constrain,
    on_manifolds,
    telemetry,
)
from fgo_geo.optim.telemetry import angle_between, radial_share

# -- angles ------------------------------------------------------------------------------------------------------------


@given(
    angle=st.floats(1e-5, math.pi),
    lengths=st.tuples(st.floats(1e-3, 1e3), st.floats(1e-3, 1e3)),
    shape=st.sampled_from([(2,), (3, 4), (2, 3, 3, 3)]),
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_the_angle_between_tensors_in_a_plane_is_that_of_the_plane(angle, lengths, shape, seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    plane = torch.linalg.qr(torch.randn(math.prod(shape), 2, generator=generator, dtype=torch.float64)).Q
    x = (lengths[0] * plane[:, 0]).reshape(shape).to(dtype)
    turned = torch.tensor([math.cos(angle), math.sin(angle)], dtype=torch.float64)
    y = (lengths[1] * plane @ turned).reshape(shape).to(dtype)
    assert abs(float(angle_between(x, y)) - angle) <= 8 * torch.finfo(dtype).eps


def test_small_angles_are_not_lost_in_single_precision():
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    u = torch.randn(64, 64, generator=torch.Generator().manual_seed(1))
    u -= (u * x).sum() / x.square().sum() * x
    for angle in (1e-3, 1e-4):
        y = x + math.tan(angle) * u * (x.norm() / u.norm())
        assert float(angle_between(x, y)) == pytest.approx(angle, rel=1e-3)


def test_there_is_no_angle_to_nothing():
    assert math.isnan(angle_between(torch.zeros(3), torch.ones(3)))


@pytest.mark.parametrize("lr", [0.003, 0.1])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_weight_whose_groups_all_turn_by_an_angle_turns_by_it(lr, seed):
    """To second order: within a group, components turn by different angles."""
    model = net(seed)
    constrain(model, "po", "sphere", seed=seed)
    optimizer = RiemannianFGSGD(model.named_parameters(), lr=lr, step_size="angle", angle=0.5)
    watched = telemetry(optimizer)
    for step in range(3):
        optimizer.zero_grad()
        model(images(seed=step)).square().mean().backward()
        optimizer.step()
    angles = {name: value for name, value in watched.scalars().items() if name.startswith("angle/")}
    constrained = {f"angle/{name}" for name, p in model.named_parameters() if isinstance(p, geoopt.ManifoldParameter)}
    assert constrained <= set(angles)
    for name in constrained:
        assert angles[name] == pytest.approx(0.5 * lr, rel=1e-4 + (2 * lr) ** 2)


def test_the_angle_of_a_weight_is_the_root_mean_square_of_its_groups():
    model = net().double()
    plan = constrain(model, "pio", ("sphere", "stiefel"))
    optimizer = RiemannianFGSGD(model.named_parameters(), lr=1e-3)
    watched = telemetry(optimizer)
    before = {name: p.detach().clone() for name, p in plan.parameters().items()}
    model(images().double()).square().sum().backward()
    optimizer.step()
    scalars = watched.scalars()
    for name, p in plan.parameters().items():
        manifold: Any = p.manifold
        squares = manifold.group_inner(before[name], before[name])
        steps = manifold.group_inner(before[name], p.detach() - before[name]) / squares  # small angles, squared
        mean = (steps * squares).sum() / squares.sum()
        assert scalars[f"angle/{name}"] == pytest.approx(float(mean.sqrt()), rel=1e-4)


def test_free_and_constrained_weights_compare_by_their_angles():
    """A layer before batch normalisation turns by lr ‖g‖ / ‖w‖, whatever the optimiser thinks of manifolds."""
    for norm in (1.0, 10.0):
        free = nn.Parameter(torch.tensor([[norm, 0.0]]))
        optimizer = torch.optim.SGD([("free", free)], lr=0.2)
        watched = telemetry(optimizer)
        free.grad = torch.tensor([[0.0, 1.0]])
        optimizer.step()
        assert watched.scalars()["angle/free"] == pytest.approx(math.atan(0.2 / norm), rel=1e-6)


# -- gradients and groups ----------------------------------------------------------------------------------------------


def test_the_radial_share_of_a_constrained_weight_is_what_the_projection_removes():
    manifold = Stiefel()
    point = manifold.random(7, 3, dtype=torch.float64)
    param = geoopt.ManifoldParameter(point, manifold=manifold)
    symmetric = torch.tensor([[2.0, 1, 0], [1, 0, 1], [0, 1, 1]]).double()
    normal = point.as_subclass(Tensor) @ symmetric
    tangent = manifold.proju(point, torch.randn(7, 3, dtype=torch.float64)).as_subclass(Tensor)
    share = radial_share(param, point.as_subclass(Tensor), 3 * tangent / tangent.norm() + 4 * normal / normal.norm())
    assert float(share) == pytest.approx(0.8, rel=1e-9)


def test_the_gradient_of_a_scale_invariant_layer_has_no_radial_part():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watched = telemetry(optimizer, model)
    model(torch.randn(16, 3, 6, 6)).square().mean().backward()
    optimizer.step()
    scalars = watched.scalars()
    assert scalars["radial/0.weight"] < 1e-4
    assert scalars["radial/4.weight"] > 1e-2
    assert not [name for name in scalars if "1.weight" in name or "bias" in name]  # they have no direction


@pytest.mark.parametrize("how", ["fgsgd", "on_manifolds"])
def test_the_share_of_shortened_groups_is_that_of_the_step_scales(how):
    model = net()
    constrain(model, "po", ("sphere", "stiefel"))
    if how == "fgsgd":
        owner: Any = RiemannianFGSGD(model.named_parameters(), lr=0.1)
        optimizer = owner
    else:
        optimizer = torch.optim.SGD(model.named_parameters(), lr=0.1)
        owner = on_manifolds(optimizer)
    watched = telemetry(optimizer)
    for p in model.parameters():
        lengths = torch.logspace(-3, 1, len(p)).reshape(-1, *(1,) * (p.ndim - 1))
        p.grad = lengths * torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    scalars, scales = watched.scalars(), owner.step_scales()
    names = {p: name for name, p in model.named_parameters()}
    assert {f"shortened/{names[p]}" for p in scales} == {name for name in scalars if name.startswith("shortened/")}
    shares = [float((tau > 1).double().mean()) for tau in scales.values()]
    assert any(0 < share < 1 for share in shares)
    for p, share in zip(scales, shares, strict=True):
        assert scalars[f"shortened/{names[p]}"] == pytest.approx(share)


@pytest.mark.parametrize("how", ["constant", "angle"])
def test_only_the_theorem_shortens(how):
    model = net()
    constrain(model)
    for optimizer in (
        RiemannianFGSGD(model.parameters(), lr=0.1, step_size=how),
        on_manifolds(torch.optim.SGD(model.parameters(), lr=0.1), how).optimizer,
        torch.optim.SGD(model.parameters(), lr=0.0),
    ):
        watched = telemetry(optimizer, model)
        model(images()).square().mean().backward()
        optimizer.step()
        assert not [name for name in watched.scalars() if name.startswith("shortened/")]


# -- around a step -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["telemetry", "on_manifolds"])
def test_under_on_manifolds_the_whole_step_is_measured_in_either_order(first):
    weight = geoopt.ManifoldParameter(ScaledSphere().random(5))
    optimizer = torch.optim.AdamW([("w", weight)], lr=0.1)
    watched = telemetry(optimizer) if first == "telemetry" else None
    on_manifolds(optimizer, "angle", angle=2.0)
    watched = watched or telemetry(optimizer)
    weight.grad = torch.ones(5)
    optimizer.step()
    assert watched.scalars()["angle/w"] == pytest.approx(math.atan(0.2), rel=1e-5)


def test_one_step_of_so_many_is_measured_and_scalars_begins_anew():
    w = nn.Parameter(torch.tensor([[1.0, 0.0]]))
    optimizer = torch.optim.SGD([("w", w)], lr=1.0)
    watched = telemetry(optimizer, every=3)
    angles = []
    for step in range(7):
        before = w.detach().clone()
        w.grad = torch.tensor([[0.1 * step, -1.0]])
        optimizer.step()
        angles.append(float(angle_between(before, w.detach())))
    assert watched.scalars()["angle/w"] == pytest.approx(sum(angles[::3]) / 3)
    assert watched.scalars() == {}


def test_what_took_no_step_and_what_is_not_finite_is_left_out():
    params = {name: nn.Parameter(torch.ones(2, 2)) for name in ("moved", "frozen", "unused", "broken", "nothing")}
    params["frozen"].requires_grad_(False)
    with torch.no_grad():
        params["nothing"].zero_()
    optimizer = torch.optim.SGD(params.items(), lr=0.1)
    watched = telemetry(optimizer)
    for name in ("moved", "broken", "nothing"):
        params[name].grad = torch.full((2, 2), math.nan if name == "broken" else 1.0)
    optimizer.step()
    assert set(watched.scalars()) == {"angle/moved", "radial/moved"}


def test_names_are_those_of_the_module_then_of_the_optimiser_then_places():
    layer = nn.Linear(2, 2, bias=False)
    for params, module, name in (
        (layer.parameters(), layer, "weight"),
        ([("own", layer.weight)], None, "own"),
        (layer.parameters(), None, "param_groups[0]['params'][0]"),
    ):
        optimizer = torch.optim.SGD(params, lr=0.1)
        watched = telemetry(optimizer, module)
        layer.weight.grad = torch.ones(2, 2)
        optimizer.step()
        assert set(watched.scalars()) == {f"angle/{name}", f"radial/{name}"}


def test_it_changes_no_step_and_works_with_all_that_is_attached():
    def trained(is_watched: bool) -> tuple[list[Tensor], dict[str, float]]:
        model = net()
        constrain(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
        watched = telemetry(optimizer, model, every=2) if is_watched else None
        channel_directed(optimizer, "h1", module=model)
        on_manifolds(optimizer)
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2, 2))]})
        for step in range(4):
            optimizer.zero_grad()
            model(images(seed=step)).square().mean().backward()
            optimizer.step()
        return list(model.parameters()), watched.scalars() if watched else {}

    (bare, _), (measured, scalars) = trained(False), trained(True)
    for a, b in zip(bare, measured, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert all(0 <= value <= math.pi for value in scalars.values())
    assert scalars


def test_half_precision_complex_and_sparse_parameters():
    half = nn.Parameter(torch.eye(4, dtype=torch.bfloat16))
    table = nn.Embedding(5, 3, sparse=True)
    waves = nn.Parameter(torch.ones(2, 2, dtype=torch.complex64))
    optimizer = torch.optim.SGD([("half", half), ("table", table.weight), ("waves", waves)], lr=0.5)
    watched = telemetry(optimizer)
    half.grad = torch.ones(4, 4, dtype=torch.bfloat16)
    table(torch.tensor([1])).sum().backward()
    waves.grad = torch.ones_like(waves)
    optimizer.step()
    scalars = watched.scalars()
    assert set(scalars) == {"angle/half", "radial/half", "angle/table", "radial/table"}
    assert scalars["radial/half"] == pytest.approx(0.5, rel=1e-6)  # <I, 1> / (2 · 4)


def test_remove_stops_it():
    w = nn.Parameter(torch.ones(2, 2))
    optimizer = torch.optim.SGD([w], lr=0.1)
    watched = telemetry(optimizer)
    watched.remove()
    watched.remove()
    w.grad = torch.eye(2)
    optimizer.step()
    assert watched.scalars() == {}
    assert "SGD" in repr(watched)


def turned(size: float) -> Tensor:
    """A gradient that turns the weight (1, 0) by atan(size), at learning rate one."""
    return torch.tensor([[0.0, -size]])


def test_a_mean_is_over_all_steps_whatever_else_was_stepped():
    a, b = (nn.Parameter(torch.tensor([[1.0, 0.0]])) for _ in range(2))
    optimizer = torch.optim.SGD([("a", a), ("b", b)], lr=1.0)
    watched = telemetry(optimizer)
    a.grad, b.grad = turned(1.0), turned(1.0)
    optimizer.step()
    a.grad, b.grad = torch.zeros(1, 2), None
    optimizer.step()
    assert watched.scalars()["angle/a"] == pytest.approx(math.pi / 8)


def test_what_is_done_to_a_weight_between_steps_is_no_step():
    w = nn.Parameter(torch.tensor([[1.0, 0.0]]))
    optimizer = torch.optim.SGD([("w", w)], lr=1.0)
    watched = telemetry(optimizer)
    w.grad = turned(1e-3)
    optimizer.step()
    with torch.no_grad():
        w.copy_(torch.tensor([[0.0, 1.0]]))
    assert watched.scalars()["angle/w"] == pytest.approx(1e-3, rel=1e-3)


def test_a_step_that_is_refused_is_left_out():
    w = as_parameter(torch.tensor([[1.0, 0.0]]), ScaledSphere())
    optimizer = torch.optim.SGD([("w", w)], lr=1.0)
    on_manifolds(optimizer, step_size="constant")
    watched = telemetry(optimizer)
    w.grad = torch.full((1, 2), math.nan)
    with pytest.raises(FloatingPointError):
        optimizer.step()
    assert watched.scalars() == {}
    w.grad = turned(0.1)
    optimizer.step()
    assert watched.scalars()["angle/w"] == pytest.approx(math.atan(0.1), rel=1e-5)


def test_manifolds_of_other_packages_have_no_radial_share():
    """``proju`` of the canonical Stiefel manifold is no projection."""
    x = torch.linalg.qr(torch.randn(6, 3, generator=torch.Generator().manual_seed(0))).Q
    w = as_parameter(x, geoopt.CanonicalStiefel())
    assert radial_share(w, x, x @ torch.tensor([[0.0, 1.0, 0.0], [-1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])).isnan()


def test_a_copy_watches_the_copy_of_the_optimiser():
    w = nn.Parameter(torch.tensor([[1.0, 0.0]]))
    watched = copy.deepcopy(telemetry(torch.optim.SGD([("w", w)], lr=1.0)))
    own = watched.optimizer.param_groups[0]["params"][0]
    assert own is not w
    own.grad = turned(1.0)
    watched.optimizer.step()
    assert watched.scalars()["angle/w"] == pytest.approx(math.pi / 4)


def test_a_weight_that_is_converted_is_copied_in_its_new_type():
    w = nn.Parameter(torch.tensor([[1.0, 0.0]]))
    optimizer = torch.optim.SGD([("w", w)], lr=1.0)
    watched = telemetry(optimizer)
    for dtype, size in ((torch.float32, 1.0), (torch.float64, 1e-12)):
        w.data = torch.tensor([[1.0, 0.0]], dtype=dtype)
        w.grad = turned(size).to(dtype)
        optimizer.step()
        assert watched.scalars()["angle/w"] == pytest.approx(math.atan(size), rel=1e-3)


def test_nothing_is_read_in_a_step(monkeypatch):
    model = net()
    constrain(model)
    handle = on_manifolds(torch.optim.SGD(model.parameters(), lr=0.1), check_finite=False)
    optimizer = handle.optimizer
    watched = telemetry(optimizer, model)
    reads: list[str] = []
    for name in ("item", "tolist", "cpu", "__float__", "__bool__"):
        method = getattr(Tensor, name)
        monkeypatch.setattr(Tensor, name, lambda t, *a, _m=method, _n=name, **k: (reads.append(_n), _m(t, *a, **k))[1])
    for _ in range(2):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        point = {p: p.detach().clone() for p in model.parameters()}
        reads.clear()
        watched._before_step(optimizer, (), {})
        watched._after_step(optimizer, (), {})
        while handle._waiting:
            handle._waiting.pop()()
        assert not reads
        assert point
    watched.scalars()
    assert reads


@pytest.mark.parametrize("every", [0, -1, 1.5, True, "2"])
def test_every_is_a_positive_whole_number(every):
    with pytest.raises(ValueError, match="every must be a whole number of at least 1"):
        telemetry(torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1), every=every)


def test_what_is_no_optimiser_is_refused():
    with pytest.raises(TypeError, match="expected a torch optimiser, got Linear"):
        telemetry(nn.Linear(2, 2))  # pyright: ignore[reportArgumentType]


def test_a_step_that_calls_that_of_the_base_class_counts_once():
    class CallsBase(torch.optim.SGD):
        def step(self, closure=None):
            return super().step(closure)

    readings = []
    for optimizer_class in (torch.optim.SGD, CallsBase):  # in this order torch calls the hooks of both
        model = net()
        optimizer = optimizer_class(model.parameters(), lr=0.1)
        handle = telemetry(optimizer, model, every=2)
        for k in range(3):
            optimizer.zero_grad()
            model(images(seed=k)).square().sum().backward()
            optimizer.step()
        readings.append(handle.scalars())
    assert readings[0] == readings[1] != {}
