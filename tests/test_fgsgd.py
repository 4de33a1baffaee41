"""RiemannianFGSGD against a slow oracle, against torch.optim.SGD, and in a training loop."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import geoopt
import numpy as np
import pytest
import reference_optimizer as reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from parameters import (
    KNEE,
    MOMENTA,
    STEP_SIZES,
    assert_same,
    geoopt_manifolds,
    network,
    normal,
    on,
    on_geoopt,
    plain,
    run,
    set_gradients,
    train_apart,
    values,
)
from torch import Tensor, nn

from fgo_geo import Oblique, RiemannianFGSGD, ScaledSphere, Stiefel
from fgo_geo.grouping import collection
from fgo_geo.manifolds import ProductOfGroups
from fgo_geo.optim import theorem_step_bound

# -- the oracle ----------------------------------------------------------------------------------------------------

GEOMETRIES = {
    "sphere": reference.Sphere,
    "oblique": reference.Oblique,
    "stiefel": reference.Stiefel,
    "euclidean": lambda radius: reference.Flat(),
}


def oracle_of(param: Tensor) -> reference.Parameter:
    x = param.detach().numpy().astype(np.float64)
    manifold = getattr(param, "manifold", None)
    if manifold is None:
        return reference.Parameter(x, [((), reference.Flat(), 0)])
    if isinstance(manifold, ProductOfGroups):
        (groups,) = manifold.collections
        radius = manifold.radius_map(param.detach()).numpy()
        return reference.Parameter(
            x,
            [
                (cell, GEOMETRIES[groups.kinds[groups.kind_of[cell]]](radius[cell].flat[0]), int(groups.group_of[cell]))
                for cell in np.ndindex(*groups.kind_of.shape)
            ],
        )
    radius = manifold.radius.numpy() if isinstance(manifold.radius, Tensor) else manifold.radius
    return reference.batch_of_components(x, manifold.ndim, getattr(reference, ORACLE_NAMES[type(manifold)]), radius)


ORACLE_NAMES = {ScaledSphere: "Sphere", Oblique: "Oblique", Stiefel: "Stiefel"}


def assert_follows_oracle(
    params: list[Tensor], options: dict[str, Any], scales: Sequence[float], absent: Sequence[int] = ()
) -> None:
    """Same points and same τ at every step; parameter ``absent[t]`` has no gradient in step ``t``."""
    optimizer = RiemannianFGSGD(params, **options)
    oracles = [oracle_of(p) for p in params]
    oracle_options = {k: v for k, v in options.items() if k not in ("adapt_euclidean", "check_finite")}
    for t, scale in enumerate(scales):
        set_gradients(params, 10 + t, scale)
        if t < len(absent) and absent[t] < len(params):
            params[absent[t]].grad = None
        optimizer.step()
        taus = optimizer.step_scales()
        for param, oracle in zip(params, oracles, strict=True):
            if param.grad is not None:
                reference.step(oracle, param.grad.numpy(), **oracle_options)
                np.testing.assert_allclose(taus[param].numpy(), oracle.scales, rtol=1e-10)
            np.testing.assert_allclose(param.detach().numpy(), oracle.x, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("update", ["retraction", "exponential"])
@pytest.mark.parametrize("momentum", MOMENTA)
@pytest.mark.parametrize("step_size", STEP_SIZES)
def test_every_combination_of_options_follows_the_oracle(update, momentum, step_size):
    for maximize, weight_decay, radius_invariant in itertools.product((False, True), (0.0, 0.1), (False, True)):
        options = {"lr": 0.4, "maximize": maximize, "weight_decay": weight_decay, "radius_invariant": radius_invariant}
        options |= {"update": update, "adapt_euclidean": True} | momentum | step_size
        assert_follows_oracle(network(), options, scales=(0.05, 1.0, 20.0, 0.3))


@st.composite
def component_manifolds(draw: st.DrawFn) -> tuple[geoopt.Manifold, tuple[int, ...]]:
    """A manifold with a radius, and the shape of a batch of its points."""
    batch = tuple(draw(st.lists(st.integers(1, 3), max_size=2)))
    columns = draw(st.integers(1, 3))
    rows = columns + draw(st.integers(1, 3))
    kind = draw(st.sampled_from(["vector", "matrix", "oblique", "stiefel"]))
    radius: float | Tensor = draw(st.floats(0.1, 5.0))
    if batch and draw(st.booleans()):
        radius_shape = draw(st.sampled_from([batch, (1, *batch[1:]), batch[1:] or (1,)]))
        radius = radius * (1 + torch.arange(math.prod(radius_shape), dtype=torch.float64).reshape(radius_shape))
    if kind == "vector":
        return ScaledSphere(radius), (*batch, rows)
    manifold = {"matrix": ScaledSphere(radius, ndim=2), "oblique": Oblique(radius), "stiefel": Stiefel(radius)}[kind]
    return manifold, (*batch, rows, columns)


@st.composite
def option_sets(draw: st.DrawFn) -> dict[str, Any]:
    options = {
        "lr": draw(st.floats(1e-3, 2.0)),
        "weight_decay": draw(st.sampled_from([0.0, 0.2])),
        "maximize": draw(st.booleans()),
        "radius_invariant": draw(st.booleans()),
        "update": draw(st.sampled_from(["retraction", "exponential"])),
    }
    options |= draw(st.sampled_from(MOMENTA)) | draw(st.sampled_from(STEP_SIZES))
    if "step_size" in options:  # without a bound, steps of many turns would amplify rounding
        options |= {"lr": options["lr"] / 50, "radius_invariant": False}
    return options


@given(
    drawn=component_manifolds(),
    count=st.integers(1, 3),
    options=option_sets(),
    absent=st.lists(st.integers(0, 5), max_size=3),
    scale=st.floats(1e-3, 30.0),
)
def test_drawn_shapes_radii_and_absent_gradients_follow_the_oracle(drawn, count, options, absent, scale):
    manifold, shape = drawn
    scale = min(scale, 1.0) if "step_size" in options else scale
    params = [on(manifold, *shape, seed=seed) for seed in range(count)]
    assert_follows_oracle(params, options, scales=(scale, 1.0, scale / 3, 0.2), absent=absent)


@given(drawn=component_manifolds(), options=option_sets(), radius=st.floats(0.05, 20.0))
def test_radius_invariant_training_is_training_on_the_unit_manifold(drawn, options, radius):
    """The weight of radius r follows r times the unit weight that the forward pass multiplies by r."""
    manifold, shape = drawn
    kind = type(manifold) if not isinstance(manifold, ScaledSphere) else lambda r: ScaledSphere(r, ndim=manifold.ndim)
    target, theirs = normal(shape, seed=7), on(kind(1.0), *shape, seed=8)
    ours = geoopt.ManifoldParameter(radius * theirs.detach(), manifold=kind(radius))
    options = options | {"radius_invariant": True, "step_size": "theorem"}
    optimizers = RiemannianFGSGD([ours], **options), RiemannianFGSGD([theirs], **options)
    for _ in range(4):
        for optimizer, param, factor in zip(optimizers, (ours, theirs), (1.0, radius), strict=True):
            optimizer.zero_grad()
            ((factor * param - target) ** 2 + (factor * param) ** 4 / 7).sum().backward()
            optimizer.step()
        torch.testing.assert_close(ours / radius, theirs, rtol=1e-9, atol=1e-9)


# -- the trust region ----------------------------------------------------------------------------------------------


@given(drawn=component_manifolds(), exponent=st.floats(-12, 30), lr=st.floats(1e-3, 3.0), seed=st.integers(0, 99))
def test_no_gradient_moves_a_group_farther_than_the_bound(drawn, exponent, lr, seed):
    manifold, shape = drawn
    param = on(manifold, *shape, seed=seed)
    before = param.detach().clone()
    optimizer = RiemannianFGSGD([param], lr=lr, momentum=0.5, update="exponential")
    set_gradients([param], seed + 1, 10.0**exponent)
    optimizer.step()
    length = optimizer.state[param]["momentum_buffer"].norm().item()
    assert length <= KNEE * (1 + 1e-12)
    assert (param.detach() - before).norm().item() <= KNEE * lr * (1 + 1e-9) + 1e-12 * before.norm().item()
    norm = manifold.proju(before, param.grad).norm().item()
    assert length == pytest.approx(min(norm, 1 / (2 + norm)), rel=1e-9, abs=1e-15)


def test_the_longest_step_belongs_to_a_gradient_at_the_knee():
    sphere = ScaledSphere()
    lengths = {}
    for norm in (0.9 * KNEE, KNEE, 1.1 * KNEE):
        x = geoopt.ManifoldParameter(torch.tensor([1.0, 0.0], dtype=torch.float64), manifold=sphere)
        start = x.detach().clone()
        x.grad = torch.tensor([0.0, norm], dtype=torch.float64)
        RiemannianFGSGD([x], lr=0.5, update="exponential").step()
        lengths[norm] = sphere.dist(start, x.detach()).item()
    assert lengths[KNEE] == pytest.approx(0.5 * KNEE, rel=1e-12)
    assert max(lengths.values()) == lengths[KNEE]


@pytest.mark.parametrize(
    ("options", "bound"),
    [
        ({"momentum": 0.9}, KNEE / (1 - 0.9)),
        ({"momentum": 0.9, "nesterov": True}, KNEE / (1 - 0.9)),
        ({"momentum": 0.9, "dampening": 0.5}, KNEE * 0.5 / (1 - 0.9)),
        ({"momentum": 0.9, "dampening": 0.95}, KNEE),
        ({"momentum": 0.5, "rho": 3.0}, theorem_step_bound(3.0) / (1 - 0.5)),
    ],
)
@pytest.mark.parametrize("aligned", [True, False])
def test_the_momentum_buffer_obeys_its_bound(options, bound, aligned):
    """Aligned gradients of the worst length come close to the bound, and no gradients pass it."""
    param = on(ScaledSphere(100.0), 50)
    optimizer = RiemannianFGSGD([param], lr=1e-3, **options)
    worst = theorem_step_bound(options.get("rho", 1.0))
    longest = 0.0
    direction = normal((50,), seed=1)
    for step in range(120):
        if not aligned:
            direction = normal((50,), seed=step) * 10.0 ** (step % 7 - 3)
        param.grad = direction
        if aligned:
            tangent = param.manifold.proju(param.detach(), direction)
            param.grad = tangent * (worst / tangent.norm())
        optimizer.step()
        longest = max(longest, optimizer.state[param]["momentum_buffer"].norm().item())
    assert longest <= bound * (1 + 1e-12)
    if aligned:
        assert longest >= 0.99 * bound


@pytest.mark.parametrize("value", [0.0, 1e-300, 1e-30, 1e25])
def test_extreme_gradients_are_safe_in_double_precision(value):
    params = network()
    before = values(params)
    optimizer = RiemannianFGSGD(params, lr=0.1, momentum=0.9, adapt_euclidean=True)
    for param in params:
        param.grad = torch.full_like(param.detach(), value)
    for _ in range(3):
        optimizer.step()
    for param, start in zip(params, before, strict=True):
        assert bool(param.isfinite().all())
        torch.testing.assert_close(param.detach(), start, rtol=1e-12, atol=1e-12)


# -- momentum is transported lazily --------------------------------------------------------------------------------


@pytest.mark.parametrize("momentum", MOMENTA[1:])
@pytest.mark.parametrize("update", ["retraction", "exponential"])
def test_a_stored_buffer_is_tangent_where_its_step_began(momentum, update):
    params = network()[:6]
    optimizer = RiemannianFGSGD(params, lr=0.5, update=update, **momentum)
    for step in range(4):
        before = values(params)
        set_gradients(params, step)
        optimizer.step()
        for param, start in zip(params, before, strict=True):
            buffer = optimizer.state[param]["momentum_buffer"]
            torch.testing.assert_close(param.manifold.proju(start, buffer), buffer, rtol=0, atol=1e-12)


# -- torch.optim.SGD on plain parameters ----------------------------------------------------------------------------


def plain_network() -> list[Tensor]:
    return [
        plain(5, seed=1),
        plain(2, 3, seed=2, dtype=torch.float32),
        plain(seed=3),
        geoopt.ManifoldParameter(normal((3, 2), 4), manifold=geoopt.Euclidean()),
        plain(3, 2, seed=5, dtype=torch.float32),
    ]


BACKENDS = [{}, {"foreach": True}, {"foreach": False}, {"fused": True}]
RATES = [0.1, torch.tensor(0.1), torch.tensor([0.1], dtype=torch.float64)]


@pytest.mark.parametrize("momentum", MOMENTA)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lr", RATES, ids=["float", "tensor", "tensor of shape (1,)"])
def test_plain_parameters_equal_torch_sgd_bit_for_bit(momentum, backend, lr):
    for weight_decay, maximize in itertools.product((0.0, 0.1), (False, True)):
        options = {"lr": lr, "weight_decay": weight_decay, "maximize": maximize} | momentum | backend
        ours, theirs = plain_network(), [nn.Parameter(p.detach().clone()) for p in plain_network()]
        scalar = lr.squeeze() if isinstance(lr, Tensor) else lr  # torch 2.6 takes nothing else
        optimizer, sgd = RiemannianFGSGD(ours, **options), torch.optim.SGD(theirs, **options | {"lr": scalar})
        for step in range(4):
            set_gradients(ours, step)
            set_gradients(theirs, step)
            kept = [p.grad.clone() for p in ours]
            optimizer.step()
            sgd.step()
            assert_same(ours, theirs)
            assert_same([p.grad for p in ours], kept)
        assert optimizer.step_scales() == {}
        mine, torchs = optimizer.state_dict()["state"], sgd.state_dict()["state"]
        assert mine.keys() == torchs.keys()
        for number, entry in mine.items():
            assert entry.keys() == torchs[number].keys()
            assert_same(entry.values(), torchs[number].values())


def test_complex_plain_parameters_equal_torch_sgd():
    start = torch.complex(normal((3, 2), 1), normal((3, 2), 2))
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}
    optimizers = RiemannianFGSGD([ours], **options), torch.optim.SGD([theirs], **options)
    for _ in range(3):
        for optimizer, param in zip(optimizers, (ours, theirs), strict=True):
            optimizer.zero_grad()
            (param.abs() ** 4).sum().backward()
            optimizer.step()
    assert_same([ours], [theirs])


@pytest.mark.parametrize("momentum", MOMENTA)
def test_checkpoints_travel_between_torch_sgd_and_here(momentum):
    """Three steps with one, two with the other, in both directions, equal five steps with one."""
    options = {"lr": 0.1, "weight_decay": 0.01} | momentum
    trained = [nn.Parameter(p.detach().clone()) for p in plain_network()]
    run(torch.optim.SGD(trained, **options), 5)
    for first, second in ((torch.optim.SGD, RiemannianFGSGD), (RiemannianFGSGD, torch.optim.SGD)):
        params = [nn.Parameter(p.detach().clone()) for p in plain_network()]
        begun = first(params, **options)
        run(begun, 3)
        continued = second(params, lr=3.0)
        continued.load_state_dict(begun.state_dict())
        run(continued, 2, first_seed=4)
        assert_same(params, trained)


# -- weight decay --------------------------------------------------------------------------------------------------


def test_weight_decay_has_no_effect_on_spheres_oblique_and_stiefel_manifolds():
    with_decay, without = network()[:5], network()[:5]
    run(RiemannianFGSGD(with_decay, lr=0.3, momentum=0.9, weight_decay=10.0), 4)
    run(RiemannianFGSGD(without, lr=0.3, momentum=0.9), 4)
    assert_same(with_decay, without)


def test_weight_decay_acts_on_the_euclidean_components_of_a_product():
    groups = collection(4, 2, "pi", ("sphere", "euclidean"))
    params = [on(ProductOfGroups(groups, (4, 2, 3, 3)), 4, 2, 3, 3) for _ in range(2)]
    for param, weight_decay in zip(params, (0.0, 0.1), strict=True):
        run(RiemannianFGSGD([param], lr=0.1, weight_decay=weight_decay), 1)
    changed = (params[0] != params[1]).flatten(2).any(-1).numpy()
    np.testing.assert_array_equal(changed, np.array(groups.kinds)[groups.kind_of] == "euclidean")


def test_weight_decay_acts_on_geoopts_manifolds_as_there():
    """Geoopt adds the decay to the Euclidean gradient; without momentum its step is right and can be compared."""
    manifold, shape = geoopt_manifolds()["PoincareBall"]
    ours, theirs = on_geoopt(manifold, *shape), on_geoopt(manifold, *shape)
    run(RiemannianFGSGD([ours], lr=0.1, weight_decay=0.5, step_size="constant"), 3)
    run(geoopt.optim.RiemannianSGD([theirs], lr=0.1, weight_decay=0.5), 3)
    assert_same([ours], [theirs])


# -- batching ------------------------------------------------------------------------------------------------------


@given(
    drawn=component_manifolds(),
    count=st.integers(2, 4),
    options=option_sets(),
    schedule=st.lists(st.sets(st.integers(0, 3)), min_size=3, max_size=4),
)
def test_parameters_of_one_shape_train_together_as_one_by_one(drawn, count, options, schedule):
    """Also when gradients come and go, so that some have momentum and others do not yet."""
    manifold, shape = drawn
    together, apart = ([on(manifold, *shape, seed=seed) for seed in range(count)] for _ in range(2))
    train_apart(together, [RiemannianFGSGD(together, **options)], schedule)
    train_apart(apart, [RiemannianFGSGD([p], **options) for p in apart], schedule)
    for a, b in zip(together, apart, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_parameters_of_all_kinds_train_together_as_one_by_one():
    schedule = [range(8), (0, 2, 4, 6), (1, 2, 3, 5, 7), range(8)]
    together, apart = network(), network()
    train_apart(together, [RiemannianFGSGD(together, lr=0.3, momentum=0.9)], schedule)
    train_apart(apart, [RiemannianFGSGD([p], lr=0.3, momentum=0.9) for p in apart], schedule)
    for a, b in zip(together, apart, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_equal_shapes_with_different_radii_or_retractions_are_kept_apart():
    manifolds = [
        ScaledSphere(0.5, ndim=2),
        ScaledSphere(2.0, ndim=2),
        ScaledSphere(0.5, ndim=1),
        Oblique(0.5),
        Stiefel(0.5),
        Stiefel(0.5, retraction="qr"),
        Stiefel(torch.tensor([0.5, 2.0], dtype=torch.float64)),
        ScaledSphere(torch.tensor([0.5, 2.0], dtype=torch.float64), ndim=2),
    ]
    together, apart = ([on(m, 2, 4, 2) for m in manifolds] for _ in range(2))
    run(RiemannianFGSGD(together, lr=0.3, momentum=0.9), 3)
    for number, param in enumerate(apart):
        optimizer = RiemannianFGSGD([param], lr=0.3, momentum=0.9)
        for step in range(1, 4):
            set_gradients(apart, step)
            optimizer.step()
        torch.testing.assert_close(param, together[number], rtol=1e-12, atol=1e-12)
        param.manifold.assert_check_point_on_manifold(param)


def test_every_parameter_is_one_group_and_the_groups_of_a_product_are_many():
    params = network()
    optimizer = RiemannianFGSGD(params, lr=0.1, adapt_euclidean=True)
    run(optimizer, 1)
    groups = len(params[5].manifold.collections[0].group_sizes)
    assert [len(optimizer.step_scales()[p]) for p in params] == [1, 1, 1, 1, 1, groups, 1, 1]


def test_step_scales_are_those_of_the_latest_step():
    params = network()[:3]
    optimizer = RiemannianFGSGD(params, lr=0.1)
    run(optimizer, 1)
    assert list(optimizer.step_scales()) == params
    params[1].grad = None
    params[2].grad = torch.zeros_like(params[2])
    optimizer.step()
    assert list(optimizer.step_scales()) == [params[0], params[2]]
    assert optimizer.step_scales()[params[2]].item() == 1


def test_memory_formats_and_views_of_gradients_make_no_difference():
    params = [on(ScaledSphere(ndim=2), 4, 3, 3, 3) for _ in range(2)]
    channels_last = params[1].detach().contiguous(memory_format=torch.channels_last)
    params[1] = geoopt.ManifoldParameter(channels_last, manifold=params[1].manifold)
    grad = normal((4, 3, 3, 3), 1)
    for param in params:
        optimizer = RiemannianFGSGD([param], lr=0.3, momentum=0.9)
        param.grad = grad if param is params[0] else grad.contiguous(memory_format=torch.channels_last)
        optimizer.step()
    torch.testing.assert_close(params[0], params[1], rtol=1e-12, atol=1e-12, check_stride=False)
    assert params[1].is_contiguous(memory_format=torch.channels_last)


# -- around the step -----------------------------------------------------------------------------------------------


def test_stabilize_projects_points_and_momentum_every_so_many_steps():
    params = network()
    optimizer = RiemannianFGSGD(params, lr=1e-3, momentum=0.9, stabilize=3)
    for step in range(1, 7):
        # Bend the points and buffers a little off, and see who is put back.
        with torch.no_grad():
            for param in params[:5]:
                param.mul_(1 + 1e-7)
        set_gradients(params, step)
        before = values(params)
        optimizer.step()
        for param, start in zip(params[:5], before[:5], strict=True):
            buffer = optimizer.state[param]["momentum_buffer"]
            at = param.detach() if step % 3 == 0 else start
            assert (param.manifold.proju(at, buffer) - buffer).norm() <= (1e-13 if step % 3 == 0 else 1e-5)
            if step % 3 == 0:
                assert param.manifold.violation(param.detach()).max() <= 1e-14


def test_stabilize_repairs_points_that_left_their_manifolds():
    params = network()[:6]
    optimizer = RiemannianFGSGD(params, lr=0.1, momentum=0.9)
    run(optimizer, 2)
    with torch.no_grad():
        for param in params:
            param.add_(0.01 * normal(param.shape, 3))
    optimizer.stabilize()
    for param in params:
        assert param.manifold.violation(param.detach()).max() <= 1e-13
        assert param.manifold.check_vector_on_tangent(param.detach(), optimizer.state[param]["momentum_buffer"])


def test_a_closure_runs_with_gradients_and_its_loss_is_returned():
    param, twin = on(Stiefel(), 5, 3), on(Stiefel(), 5, 3)
    optimizer, other = (RiemannianFGSGD([p], lr=0.1, momentum=0.9) for p in (param, twin))
    losses = []

    def loss_of(x: Tensor) -> Tensor:
        return (x - 1).square().sum()

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(param)
        loss.backward()
        return loss

    for _ in range(3):
        losses.append(optimizer.step(closure))
        other.zero_grad()
        loss_of(twin).backward()
        assert other.step() is None
    assert losses[0] > losses[1] > losses[2]
    assert_same([param], [twin])
    assert not param.is_leaf or param.requires_grad


def test_maximize_ascends():
    down, up = network(), network()
    run(RiemannianFGSGD(down, lr=0.3, momentum=0.9, adapt_euclidean=True), 3, scale=-1.0)
    run(RiemannianFGSGD(up, lr=0.3, momentum=0.9, adapt_euclidean=True, maximize=True), 3)
    assert_same(down, up)


@pytest.mark.parametrize("lr", [torch.tensor(0.3), torch.tensor([0.3]), torch.tensor([[0.3]], dtype=torch.float64)])
def test_a_tensor_learning_rate_equals_the_number(lr):
    with_tensor, with_number = network(), network()
    run(RiemannianFGSGD(with_tensor, lr=lr, momentum=0.9, adapt_euclidean=True), 3)
    run(RiemannianFGSGD(with_number, lr=lr.item(), momentum=0.9, adapt_euclidean=True), 3)
    for a, b in zip(with_tensor, with_number, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-7)
        assert a.dtype == b.dtype


def test_a_tensor_learning_rate_does_not_raise_the_precision_of_float32():
    params = [on(Stiefel(), 5, 3, dtype=torch.float32) for _ in range(2)]
    for param, lr in zip(params, (0.25, torch.tensor([0.25], dtype=torch.float64)), strict=True):
        run(RiemannianFGSGD([param], lr=lr, momentum=0.9), 3)
    assert_same(params[:1], params[1:])


SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler]] = {
    "StepLR": lambda o: torch.optim.lr_scheduler.StepLR(o, step_size=2, gamma=0.5),
    "CosineAnnealingLR": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=8),
    "OneCycleLR": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.5, total_steps=9),
    "CyclicLR": lambda o: torch.optim.lr_scheduler.CyclicLR(o, 0.1, 0.5, step_size_up=3, max_momentum=0.95),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_of_torch_change_lr_and_momentum_of_every_step(name):
    """The oracle is given, step by step, what the scheduler wrote into the group."""
    params = network()[:5]
    oracles = [oracle_of(p) for p in params]
    optimizer = RiemannianFGSGD(params, lr=0.5, momentum=0.9)
    scheduler = SCHEDULERS[name](optimizer)
    rates, momenta = set(), set()
    for step in range(8):
        set_gradients(params, step, 0.5)
        group = optimizer.param_groups[0]
        rates.add(group["lr"])
        momenta.add(group["momentum"])
        for param, oracle in zip(params, oracles, strict=True):
            reference.step(oracle, param.grad.numpy(), lr=group["lr"], momentum=group["momentum"])
        optimizer.step()
        scheduler.step()
        for param, oracle in zip(params, oracles, strict=True):
            np.testing.assert_allclose(param.detach().numpy(), oracle.x, rtol=1e-10, atol=1e-10)
    assert len(rates) > 1
    assert (len(momenta) > 1) == (name in ("OneCycleLR", "CyclicLR"))


def test_a_drop_in_momentum_keeps_long_steps_on_the_stiefel_manifold():
    """The buffer is longer than the new momentum would allow; the retraction must not rely on that."""
    param = on(Stiefel(), 8, 8, dtype=torch.float32)
    optimizer = RiemannianFGSGD([param], lr=0.2, momentum=0.95)
    skew = normal((8, 8), 1, torch.float32)
    skew = skew - skew.T
    for step in range(60):
        optimizer.param_groups[0]["momentum"] = 0.95 if step < 50 else 0.3
        param.grad = param.detach() @ (skew * (KNEE / skew.norm()))
        optimizer.step()
        assert param.manifold.violation(param.detach()).max() <= 2e-6


def test_buffers_of_constant_steps_keep_later_steps_on_the_stiefel_manifold():
    param = on(Stiefel(), 5, 3)
    optimizer = RiemannianFGSGD([param], lr=0.1, momentum=0.9, step_size="constant")
    run(optimizer, 2, scale=100.0)
    optimizer.param_groups[0]["step_size"] = "theorem"
    run(optimizer, 2)
    assert param.manifold.violation(param.detach()).item() <= 1e-13


def test_hooks_before_and_after_the_step_run():
    param = on(Oblique(), 5, 3)
    optimizer = RiemannianFGSGD([param], lr=0.1)
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    run(optimizer, 1)
    assert calls == ["before", "after"]


def test_parameters_without_a_gradient_or_without_entries_do_not_move():
    params = network()
    empty = [geoopt.ManifoldParameter(torch.empty(0, 5, 3), manifold=Stiefel()), nn.Parameter(torch.empty(0, 2))]
    before = values(params)
    optimizer = RiemannianFGSGD([*params, *empty], lr=0.1, momentum=0.9)
    optimizer.step()
    assert_same(params, before)
    assert optimizer.step_scales() == {}
    assert optimizer.state_dict()["state"] == {}
    set_gradients([*params, *empty], 1)
    optimizer.step()
    assert not any(torch.equal(a, b) for a, b in zip(params, before, strict=True))


def test_a_group_may_be_empty_but_not_the_optimizer():
    param = on(Oblique(), 5, 3)
    run(RiemannianFGSGD([{"params": []}, {"params": [param]}], lr=0.1), 1)
    with pytest.raises(ValueError, match="empty parameter list"):
        RiemannianFGSGD([], lr=0.1)


def test_a_retraction_of_ones_own_is_the_one_that_is_taken():
    class Lazy(ScaledSphere):
        def retr(self, x, u):
            return super().retr(x, 0.5 * u)

    ends = []
    for manifold, lr in ((Lazy(), 0.2), (ScaledSphere(), 0.1)):
        x = geoopt.ManifoldParameter(torch.tensor([1.0, 0.0, 0.0]), manifold=manifold)
        x.grad = torch.tensor([0.0, 0.3, 0.2])
        RiemannianFGSGD([x], lr=lr).step()
        ends.append(x.detach().as_subclass(Tensor))
    torch.testing.assert_close(*ends, rtol=0, atol=1e-7)
