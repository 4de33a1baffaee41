"""RiemannianFGSGD against a slow oracle, against torch.optim.SGD, and against what a user can do to it."""

from __future__ import annotations

import copy
import io
import itertools
import math
import pickle
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import geoopt
import numpy as np
import pytest
import reference_optimizer as reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fgo_geo import Oblique, RiemannianFGSGD, ScaledSphere, Stiefel, kernels
from fgo_geo.grouping import collection
from fgo_geo.manifolds import ProductOfGroups
from fgo_geo.optim import theorem_step_bound, theorem_step_scale
from fgo_geo.optim.fgsgd import fgsgd_update
from fgo_geo.optim.step_size import momentum_gain

KNEE = math.sqrt(2) - 1


# -- drawing points and gradients ----------------------------------------------------------------------------------


def on(
    manifold: geoopt.Manifold, *shape: int, seed: int = 0, dtype: torch.dtype = torch.float64
) -> geoopt.ManifoldParameter:
    """A random parameter on one of our manifolds."""
    generator = torch.Generator().manual_seed(seed)
    return geoopt.ManifoldParameter(manifold.random(*shape, dtype=dtype, generator=generator))


def plain(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Parameter:
    return nn.Parameter(normal(shape, seed, dtype))


def normal(shape: Sequence[int], seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def set_gradients(params: Iterable[Tensor], seed: int, scale: float = 1.0) -> None:
    for number, param in enumerate(params):
        param.grad = scale * normal(param.shape, 1000 * seed + number, param.dtype)


def run(optimizer: torch.optim.Optimizer, steps: int, first_seed: int = 1, scale: float = 1.0) -> None:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for step in range(steps):
        set_gradients(params, first_seed + step, scale)
        optimizer.step()


def values(params: Iterable[Tensor]) -> list[Tensor]:
    return [p.detach().clone() for p in params]


def assert_same(actual: Iterable[Tensor], expected: Iterable[Tensor]) -> None:
    """Bit for bit."""
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.detach(), e.detach(), rtol=0, atol=0)


def network() -> list[Tensor]:
    """One parameter of every kind that the optimiser treats in its own way, many of them stacked."""
    return [
        on(ScaledSphere(0.5, ndim=2), 3, 2, 3, 3, seed=1),
        on(ScaledSphere(0.5, ndim=2), 4, 3, 3, seed=2),
        on(Oblique(), 5, 3, seed=3),
        on(Stiefel(2.0), 2, 5, 3, seed=4),
        on(Stiefel(2.0), 5, 3, seed=5),
        on(ProductOfGroups(collection(4, 3, "pio", ("sphere", "stiefel", "euclidean")), (4, 3, 3, 3)), 4, 3, 3, 3),
        plain(6, seed=6),
        plain(2, 3, seed=7),
    ]


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


MOMENTA = [
    {"momentum": 0.0},
    {"momentum": 0.9},
    {"momentum": 0.8, "dampening": 0.3},
    {"momentum": 0.9, "nesterov": True},
]
STEP_SIZES = [
    {},
    {"rho": 0.3, "curvature": 5.0},
    {"rho": 0.05, "curvature": "manifold"},
    {"step_size": "constant"},
]


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


def test_buffers_on_manifolds_of_geoopt_are_transported_at_the_end_of_the_step():
    param = on_geoopt(geoopt.Sphere(), 4, 5)
    optimizer = RiemannianFGSGD([param], lr=0.5, momentum=0.9)
    run(optimizer, 3)
    buffer = optimizer.state[param]["momentum_buffer"]
    torch.testing.assert_close(param.manifold.proju(param.detach(), buffer), buffer, rtol=0, atol=1e-12)


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
        optimizer, sgd = RiemannianFGSGD(ours, **options), torch.optim.SGD(theirs, **options)
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


# -- the manifolds of Geoopt ---------------------------------------------------------------------------------------


def geoopt_manifolds() -> dict[str, tuple[geoopt.Manifold, tuple[int, ...]]]:
    """Every manifold of Geoopt with a shape, in double precision (its constructors write into their arguments)."""

    def one() -> Tensor:
        return torch.tensor(1.0, dtype=torch.float64)

    return {
        "BirkhoffPolytope": (geoopt.BirkhoffPolytope(), (2, 4, 4)),
        "BoundedDomain": (geoopt.BoundedDomain(), (2, 3, 3)),
        "Lorentz": (geoopt.Lorentz(one()), (5, 4)),
        "PoincareBall": (geoopt.PoincareBall(one()), (5, 3)),
        "PoincareBallExact": (geoopt.PoincareBallExact(one()), (5, 3)),
        "ProductManifold": (
            geoopt.ProductManifold((geoopt.Sphere(), 3), (geoopt.Lorentz(one()), 4), (geoopt.Stiefel(), (4, 2))),
            (2, 15),
        ),
        "ProductManifold of ours": (geoopt.ProductManifold((ScaledSphere(2.0), 3), (Stiefel(0.5), (4, 2))), (2, 11)),
        "Scaled": (geoopt.Scaled(geoopt.Sphere(), 2.0), (5, 4)),
        "Scaled of ours": (geoopt.Scaled(Oblique(), 2.0), (2, 5, 3)),
        "Sphere": (geoopt.Sphere(), (5, 4)),
        "SphereExact": (geoopt.SphereExact(), (5, 4)),
        "SphereProjection": (geoopt.SphereProjection(one()), (5, 3)),
        "Stereographic": (geoopt.Stereographic(-one()), (5, 3)),
        "StereographicProductManifold": (
            geoopt.StereographicProductManifold((geoopt.PoincareBall(one()), 3), (geoopt.SphereProjection(one()), 2)),
            (2, 5),
        ),
        "Stiefel canonical": (geoopt.CanonicalStiefel(), (2, 5, 3)),
        "Stiefel euclidean": (geoopt.EuclideanStiefel(), (2, 5, 3)),
        "Stiefel exact": (geoopt.EuclideanStiefelExact(), (2, 5, 3)),
        "SymmetricPositiveDefinite": (geoopt.SymmetricPositiveDefinite(), (2, 3, 3)),
        "UpperHalf": (geoopt.UpperHalf(), (2, 3, 3)),
    }


def draw_geoopt(manifold: geoopt.Manifold, *shape: int) -> Tensor:
    """A random point; some manifolds of Geoopt have no ``random``."""
    if isinstance(manifold, geoopt.ProductManifold):
        factors = zip(manifold.manifolds, manifold.shapes, strict=True)
        return manifold.pack_point(*(draw_geoopt(factor, *shape[:-1], *size) for factor, size in factors))
    draw = manifold.random_normal if isinstance(manifold, geoopt.Lorentz) else manifold.random
    return draw(*shape, dtype=None if isinstance(manifold, SIEGEL) else torch.float64).detach()


SIEGEL = (geoopt.UpperHalf, geoopt.BoundedDomain)


def on_geoopt(manifold: geoopt.Manifold, *shape: int, seed: int = 0) -> geoopt.ManifoldParameter:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return geoopt.ManifoldParameter(torch.as_tensor(draw_geoopt(manifold, *shape)), manifold=manifold)


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


# -- batching ------------------------------------------------------------------------------------------------------


def train_apart(params: list[Tensor], optimizers: list[RiemannianFGSGD], schedule: Sequence[Sequence[int]]) -> None:
    """In step ``t`` only the parameters ``schedule[t]`` have a gradient."""
    for t, present in enumerate(schedule):
        set_gradients(params, t + 1)
        for number, param in enumerate(params):
            if number not in present:
                param.grad = None
        for optimizer in optimizers:
            optimizer.step()


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


# -- state ---------------------------------------------------------------------------------------------------------


def through_state_dict(params: list[Tensor], optimizer: RiemannianFGSGD) -> tuple[list[Tensor], RiemannianFGSGD]:
    clones = copy.deepcopy(params)
    clone = RiemannianFGSGD(clones, lr=7.0)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    clone.load_state_dict(torch.load(file, weights_only=True))
    return clones, clone


def through_deepcopy(params: list[Tensor], optimizer: RiemannianFGSGD) -> tuple[list[Tensor], RiemannianFGSGD]:
    return copy.deepcopy((params, optimizer))


def through_pickle(params: list[Tensor], optimizer: RiemannianFGSGD) -> tuple[list[Tensor], RiemannianFGSGD]:
    return pickle.loads(pickle.dumps((params, optimizer)))


@pytest.mark.parametrize("passage", [through_state_dict, through_deepcopy, through_pickle])
@pytest.mark.parametrize("options", [*MOMENTA, {"momentum": 0.9, "stabilize": 3, "rho": 0.5, "radius_invariant": True}])
def test_a_saved_run_continues_bit_for_bit(passage, options):
    params = network()
    optimizer = RiemannianFGSGD(params, lr=0.3, **options)
    run(optimizer, 4)
    clones, clone = passage(params, optimizer)
    assert all(a is not b for a, b in zip(params, clones, strict=True))
    run(optimizer, 4, first_seed=5)
    run(clone, 4, first_seed=5)
    assert_same(clones, params)


@pytest.mark.parametrize("passage", [through_deepcopy, through_pickle])
def test_copies_keep_the_default_options_for_new_groups(passage):
    params = [on(Oblique(), 5, 3)]
    _, clone = passage(params, RiemannianFGSGD(params, lr=0.3, stabilize=7, rho=2.0))
    clone.add_param_group({"params": [on(Oblique(), 5, 3)]})
    assert clone.param_groups[1]["stabilize"] == 7
    assert clone.param_groups[1]["rho"] == 2.0


def test_loading_keeps_the_default_options_for_new_groups():
    params = [on(Oblique(), 5, 3)]
    optimizer = RiemannianFGSGD(params, lr=0.3, stabilize=7)
    optimizer.load_state_dict(RiemannianFGSGD(params, lr=0.1).state_dict())
    optimizer.add_param_group({"params": [on(Oblique(), 5, 3)]})
    assert [group["stabilize"] for group in optimizer.param_groups] == [None, 7]


def test_a_checkpoint_of_geoopts_riemannian_sgd_loads():
    """Its buffers are longer than any of ours: the retraction must not count on our bound."""
    params = [on(Stiefel(), 5, 3), plain(4)]
    geoopts = geoopt.optim.RiemannianSGD(params, lr=0.1, momentum=0.9, stabilize=5)
    run(geoopts, 2, scale=100.0)
    optimizer = RiemannianFGSGD(params, lr=1.0)
    optimizer.load_state_dict(geoopts.state_dict())
    run(optimizer, 2)
    assert optimizer.param_groups[0]["stabilize"] == 5
    assert params[0].manifold.violation(params[0].detach()).item() <= 1e-13


def test_groups_have_their_own_options():
    fast, slow, constant = (on(Stiefel(), 5, 3, seed=seed) for seed in range(3))
    optimizer = RiemannianFGSGD([{"params": [fast], "lr": 0.5}, {"params": [slow]}], lr=0.1, momentum=0.9)
    optimizer.add_param_group({"params": [constant], "step_size": "constant", "momentum": 0.0, "lr": 0.01})
    run(optimizer, 3)
    alone = [on(Stiefel(), 5, 3, seed=seed) for seed in range(3)]
    own = [{"lr": 0.5, "momentum": 0.9}, {"lr": 0.1, "momentum": 0.9}, {"lr": 0.01, "step_size": "constant"}]
    optimizers = [RiemannianFGSGD([p], **options) for p, options in zip(alone, own, strict=True)]
    train_apart(alone, optimizers, [range(3)] * 3)
    for a, b in zip((fast, slow, constant), alone, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_momentum_survives_being_switched_off_and_on():
    """As in torch.optim.SGD, a buffer rests while momentum is zero; it is projected when it is used again."""
    params = [on(Stiefel(), 5, 3), plain(4)]
    twin = nn.Parameter(params[1].detach().clone())
    optimizer, sgd = RiemannianFGSGD(params, lr=0.3, momentum=0.9), torch.optim.SGD([twin], lr=0.3, momentum=0.9)
    for step, momentum in enumerate((0.9, 0.0, 0.0, 0.9)):
        optimizer.param_groups[0]["momentum"] = sgd.param_groups[0]["momentum"] = momentum
        set_gradients(params, step)
        twin.grad = params[1].grad.clone()
        optimizer.step()
        sgd.step()
        params[0].manifold.assert_check_point_on_manifold(params[0])
    assert_same([params[1]], [twin])


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


# -- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -0.1}, "lr must be at least 0, got -0.1"),
        ({"lr": math.nan}, "lr must be at least 0, got nan"),
        ({"lr": torch.tensor(-0.1)}, "lr must be at least 0, got tensor(-0.1000)"),
        ({"lr": torch.ones(2)}, "lr must be a number or hold one element, got shape (2,)"),
        ({"momentum": -0.9}, "momentum must be at least 0, got -0.9"),
        ({"weight_decay": -1.0}, "weight_decay must be at least 0, got -1.0"),
        ({"rho": -1.0}, "rho must be at least 0, got -1.0"),
        ({"rho": math.inf}, "rho must be finite, got inf"),
        ({"nesterov": True}, "nesterov needs momentum > 0 and dampening = 0, got momentum=0.0, dampening=0.0"),
        (
            {"nesterov": True, "momentum": 0.9, "dampening": 0.1},
            "nesterov needs momentum > 0 and dampening = 0, got momentum=0.9, dampening=0.1",
        ),
        ({"step_size": "eq7"}, "step_size must be one of ('theorem', 'constant'), got 'eq7'"),
        ({"update": "cayley"}, "update must be one of ('retraction', 'exponential'), got 'cayley'"),
        ({"curvature": "own"}, "curvature must be None, \"manifold\" or a finite number of at least 0, got 'own'"),
        ({"curvature": -2.0}, 'curvature must be None, "manifold" or a finite number of at least 0, got -2.0'),
        ({"curvature": math.inf}, 'curvature must be None, "manifold" or a finite number of at least 0, got inf'),
        ({"stabilize": 0}, "stabilize must be None or a positive integer, got 0"),
        ({"stabilize": 2.5}, "stabilize must be None or a positive integer, got 2.5"),
        ({"fused": True, "foreach": True}, "fused and foreach exclude each other, got True for both"),
    ],
)
def test_bad_options_are_refused_by_the_constructor_and_for_new_groups(options, message):
    with pytest.raises(ValueError, match="RiemannianFGSGD: " + re.escape(message)):
        RiemannianFGSGD([plain(3)], **({"lr": 0.1} | options))
    optimizer = RiemannianFGSGD([plain(3)], lr=0.1)
    with pytest.raises(ValueError, match=re.escape(message)):
        optimizer.add_param_group({"params": [plain(3)], **options})
    assert len(optimizer.param_groups) == 1


def off(manifold: geoopt.Manifold, *shape: int, by: float = 0.1, dtype: torch.dtype = torch.float64) -> Tensor:
    """A parameter that misses its manifold by a factor."""
    return geoopt.ManifoldParameter((1 + by) * on(manifold, *shape, dtype=dtype).detach(), manifold=manifold)


@pytest.mark.parametrize(
    ("manifold", "shape", "violation"),
    [
        (ScaledSphere(0.5, ndim=2), (4, 3, 3), "0.1"),
        (Oblique(), (5, 3), "0.1"),
        (Stiefel(2.0), (5, 3), "0.21"),
        (ProductOfGroups(collection(4, 2, "pi", ("sphere", "stiefel")), (4, 2, 3, 3)), (4, 2, 3, 3), "0.21"),
    ],
)
def test_a_parameter_off_its_manifold_is_refused_and_the_remedy_works(manifold, shape, violation):
    param = off(manifold, *shape)
    message = f"violation {violation}, expected at most 0.001; move it there by `with torch.no_grad(): param.proj_()`"
    with pytest.raises(ValueError, match=re.escape(message)):
        RiemannianFGSGD([param], lr=0.1)
    with torch.no_grad():
        param.proj_()
    run(RiemannianFGSGD([param], lr=0.1), 1)


def test_the_refusal_names_the_parameter_and_leaves_the_optimizer_as_it_was():
    optimizer = RiemannianFGSGD([("bias", plain(3))], lr=0.1)
    group = {"params": [("good", on(Oblique(), 5, 3)), ("bad", off(Oblique(), 4, 2))]}
    message = "'bad', param_groups[1]['params'][1] of shape (4, 2) does not lie on its Oblique(radius=1) manifold"
    with pytest.raises(ValueError, match=re.escape(message)):
        optimizer.add_param_group(group)
    assert len(optimizer.param_groups) == 1
    run(optimizer, 1)


def test_points_are_checked_as_closely_as_their_type_allows():
    for dtype in (torch.float16, torch.bfloat16):
        RiemannianFGSGD([off(Stiefel(), 5, 3, by=torch.finfo(dtype).eps, dtype=dtype)], lr=0.1)
    with pytest.raises(ValueError, match="does not lie on its"):
        RiemannianFGSGD([off(Stiefel(), 5, 3, by=0.2, dtype=torch.bfloat16)], lr=0.1)
    with pytest.raises(ValueError, match="violation nan"):
        RiemannianFGSGD([off(Stiefel(), 5, 3, by=math.nan)], lr=0.1)


def test_a_sparse_gradient_is_refused_before_anything_changes():
    embedding = nn.Embedding(5, 3, sparse=True)
    embedding.weight = on(ScaledSphere(), 5, 3, dtype=torch.float32)
    first = plain(3)
    optimizer = RiemannianFGSGD([("first", first), ("table", embedding.weight)], lr=0.1)
    before = values([first, embedding.weight])
    embedding(torch.tensor([1, 3])).sum().backward()
    first.grad = torch.ones(3, dtype=torch.float64)
    message = (
        "the gradient of 'table', param_groups[0]['params'][1] of shape (5, 3) is sparse, expected a dense one; "
        "build the layer with sparse=False"
    )
    with pytest.raises(RuntimeError, match=re.escape(message)):
        optimizer.step()
    assert_same([first, embedding.weight], before)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("position", range(6))
def test_a_gradient_that_is_not_finite_is_refused_before_anything_changes(value, position):
    params = network()
    names = [f"layer{number}" for number in range(len(params))]
    optimizer = RiemannianFGSGD(
        [
            {"params": list(zip(names[:3], params[:3], strict=True))},
            {"params": list(zip(names[3:], params[3:], strict=True))},
        ],
        lr=0.1,
        momentum=0.9,
    )
    run(optimizer, 1)
    before, state, scales = values(params), copy.deepcopy(optimizer.state_dict()), optimizer.step_scales()
    set_gradients(params, 2)
    params[position].grad.view(-1)[-1] = value
    where = f"'layer{position}', param_groups[{position // 3}]['params'][{position % 3}]"
    with pytest.raises(FloatingPointError, match=re.escape(where) + ".*not finite.*no parameter was changed"):
        optimizer.step()
    assert_same(params, before)
    assert_same(optimizer.step_scales().values(), scales.values())
    after = optimizer.state_dict()
    assert after["param_groups"] == state["param_groups"]
    assert_same(
        [entry["momentum_buffer"] for entry in after["state"].values()],
        [entry["momentum_buffer"] for entry in state["state"].values()],
    )


def test_a_squared_norm_that_overflows_is_refused_too():
    param = on(Stiefel(), 5, 3, dtype=torch.float32)
    param.grad = torch.full((5, 3), 1e25)
    with pytest.raises(FloatingPointError, match="or its squared norm overflows"):
        RiemannianFGSGD([param], lr=0.1).step()


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e25])
@pytest.mark.parametrize("step_size", ["theorem", "constant"])
def test_without_the_check_a_bad_group_is_left_out_and_counted(value, step_size):
    params = [on(m, 5, 3, dtype=torch.float32) for m in (Stiefel(), Oblique(), Stiefel())]
    optimizer = RiemannianFGSGD(params, lr=0.1, check_finite=False, step_size=step_size)
    assert optimizer.skipped_groups() == 0
    set_gradients(params, 1)
    params[0].grad[1] = value
    before = values(params)
    optimizer.step()
    assert optimizer.skipped_groups() == 1
    torch.testing.assert_close(params[0].detach(), before[0], rtol=0, atol=1e-6)
    assert [(p - b).abs().max() > 1e-3 for p, b in zip(params[1:], before[1:], strict=True)] == [True, True]
    assert optimizer.step_scales()[params[0]].item() == 1
    optimizer.step()
    assert optimizer.skipped_groups() == 2


def test_without_the_check_only_the_bad_group_of_a_product_is_left_out():
    groups = collection(4, 3, "pio", ("sphere", "stiefel"))
    param = on(ProductOfGroups(groups, (4, 3, 3, 3)), 4, 3, 3, 3)
    optimizer = RiemannianFGSGD([param], lr=0.1, check_finite=False)
    before = param.detach().clone()
    set_gradients([param], 1)
    param.grad[2, 1, 0, 0] = math.nan
    optimizer.step()
    stayed = ((param.detach() - before).abs().amax((2, 3)) < 1e-12).numpy()
    np.testing.assert_array_equal(stayed, groups.group_of == groups.group_of[2, 1])
    assert optimizer.skipped_groups() == 1


def test_a_left_out_group_keeps_its_momentum():
    param = on(Stiefel(), 5, 3)
    optimizer = RiemannianFGSGD([param], lr=0.1, momentum=0.9, check_finite=False)
    run(optimizer, 1)
    carried = param.manifold.proju(param.detach(), optimizer.state[param]["momentum_buffer"])
    param.grad = torch.full((5, 3), math.nan, dtype=torch.float64)
    optimizer.step()
    torch.testing.assert_close(optimizer.state[param]["momentum_buffer"], 0.9 * carried)
    assert bool(param.isfinite().all())


def test_gradients_of_plain_parameters_are_as_free_as_in_torch():
    param, twin = plain(3), plain(3)
    for p in (param, twin):
        p.grad = torch.tensor([1.0, math.nan, math.inf], dtype=torch.float64)
    RiemannianFGSGD([param], lr=0.1).step()
    torch.optim.SGD([twin], lr=0.1).step()
    torch.testing.assert_close(param, twin, rtol=0, atol=0, equal_nan=True)


# -- half precision and mixed precision ------------------------------------------------------------------------------


def small_network(dtype: torch.dtype) -> list[Tensor]:
    return [
        on(ScaledSphere(0.5, ndim=2), 3, 2, 3, 3, seed=1, dtype=dtype),
        on(Oblique(), 5, 3, seed=2, dtype=dtype),
        on(Stiefel(2.0), 2, 5, 3, seed=3, dtype=dtype),
        on(
            ProductOfGroups(collection(4, 2, "pio", ("sphere", "stiefel")), (4, 2, 3, 3)),
            4,
            2,
            3,
            3,
            seed=4,
            dtype=dtype,
        ),
    ]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("update", ["retraction", "exponential"])
def test_a_step_in_half_precision_is_the_float32_step_rounded_once(dtype, update):
    half, single = small_network(dtype), small_network(torch.float32)
    options = {"lr": 0.3, "momentum": 0.9, "nesterov": True, "update": update}
    optimizer, twin = RiemannianFGSGD(half, **options), RiemannianFGSGD(single, **options)
    for step in range(3):
        set_gradients(half, step)
        for a, b in zip(half, single, strict=True):
            b.data.copy_(a)
            b.grad = a.grad.float()
            if a in optimizer.state:
                twin.state[b]["momentum_buffer"].copy_(optimizer.state[a]["momentum_buffer"])
        with kernels.use_path("reference"):  # half precision has no other, and another one rounds in other places
            optimizer.step()
            twin.step()
        for a, b in zip(half, single, strict=True):
            assert a.dtype == optimizer.state[a]["momentum_buffer"].dtype == dtype
            assert_same(
                [a, optimizer.state[a]["momentum_buffer"]], [b.to(dtype), twin.state[b]["momentum_buffer"].to(dtype)]
            )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_does_not_drift(dtype):
    params = small_network(dtype)
    optimizer = RiemannianFGSGD(params, lr=0.1, momentum=0.9)
    for step in range(200):
        set_gradients(params, step)
        optimizer.step()
    for param in params:
        assert param.manifold.violation(param.detach()).max().item() <= 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_plain_parameters_in_half_precision_equal_torch_sgd(dtype):
    ours, theirs = plain(5, dtype=dtype), plain(5, dtype=dtype)
    run(RiemannianFGSGD([ours], lr=0.1, momentum=0.9, weight_decay=0.1), 4)
    run(torch.optim.SGD([theirs], lr=0.1, momentum=0.9, weight_decay=0.1), 4)
    assert_same([ours], [theirs])


def test_a_step_under_autocast_is_the_same_step():
    inside, outside = small_network(torch.float32), small_network(torch.float32)
    optimizers = [RiemannianFGSGD(params, lr=0.3, momentum=0.9) for params in (inside, outside)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        run(optimizers[0], 3)
    run(optimizers[1], 3)
    assert_same(inside, outside)


@pytest.mark.parametrize("unscale", [True, False])
def test_a_grad_scaler_and_clipping_work(unscale):
    """A power of two as the scale changes no bit; a step with an infinite gradient is skipped by the scaler."""
    scaled, straight = ([*small_network(torch.float32), plain(3, dtype=torch.float32)] for _ in range(2))
    optimizers = [RiemannianFGSGD(params, lr=0.1, momentum=0.9) for params in (scaled, straight)]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)

    def loss_of(params: list[Tensor], step: int) -> Tensor:
        return sum((p * normal(p.shape, step, torch.float32)).sum() for p in params)

    for step in range(4):
        for optimizer in optimizers:
            optimizer.zero_grad()
        overflow = step == 2
        scaler.scale(loss_of(scaled, step) * (math.inf if overflow else 1)).backward()
        loss_of(straight, step).backward()
        if unscale:
            scaler.unscale_(optimizers[0])
            nn.utils.clip_grad_norm_(scaled, 0.5)
            nn.utils.clip_grad_norm_(straight, 0.5)
        before = values(scaled)
        scaler.step(optimizers[0])
        scaler.update()
        if overflow:
            assert_same(scaled, before)
        else:
            optimizers[1].step()
        assert_same(scaled, straight)
    assert scaler.get_scale() == 2.0**9


# -- compilation and synchronisation -------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_step_is_the_same_step(backend):
    """The whole step is one graph, and parameters on manifolds do not decay to plain ones in it."""
    torch._dynamo.reset()
    compiled, eager = network(), network()
    optimizers = [RiemannianFGSGD(params, lr=0.3, momentum=0.9, weight_decay=0.01) for params in (compiled, eager)]
    step = torch.compile(lambda: optimizers[0].step(), backend=backend, fullgraph=True)
    for seed in range(3):
        for params in (compiled, eager):
            set_gradients(params, seed)
        step()
        optimizers[1].step()
    for a, b in zip(compiled, eager, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    for a, b in zip(optimizers[0].step_scales().values(), optimizers[1].step_scales().values(), strict=True):
        torch.testing.assert_close(a, b)
    assert optimizers[0].skipped_groups() == 0


def test_a_compiled_step_follows_the_learning_rate():
    torch._dynamo.reset()
    params, twins = [on(Stiefel(), 5, 3)], [on(Stiefel(), 5, 3)]
    optimizers = [RiemannianFGSGD(p, lr=torch.tensor(0.4), momentum=0.9) for p in (params, twins)]
    step = torch.compile(lambda: optimizers[0].step(), backend="eager", fullgraph=True)
    for seed in range(3):
        for optimizer, p in zip(optimizers, (params, twins), strict=True):
            set_gradients(p, seed)
            optimizer.param_groups[0]["lr"].fill_(0.4 / (1 + seed))
        step()
        optimizers[1].step()
        torch.testing.assert_close(params[0], twins[0], rtol=1e-12, atol=1e-12)


class NoSynchronisation(TorchDispatchMode):
    """Raises when a tensor's values reach the host, or decide a shape."""

    FORBIDDEN = ("_local_scalar_dense", "is_nonzero", "item", "nonzero", "masked_select", "unique", "equal")

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        name = func.overloadpacket.__name__
        by_mask = name.startswith("index") and any(
            isinstance(i, Tensor) and i.dtype == torch.bool for a in args if isinstance(a, (list, tuple)) for i in a
        )
        if name in self.FORBIDDEN or by_mask:
            raise AssertionError(f"{name} synchronises with the host")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "forbidden",
    [lambda x: x.sum().item(), lambda x: bool(x[0] > 0), lambda x: x[x > 0]],
    ids=["item", "bool", "mask"],
)
def test_the_watch_for_synchronisation_notices_it(forbidden):
    with NoSynchronisation(), pytest.raises(AssertionError, match="synchronises"):
        forbidden(torch.ones(3))


@pytest.mark.parametrize("update", ["retraction", "exponential"])
@pytest.mark.parametrize("momentum", MOMENTA)
@pytest.mark.parametrize("step_size", STEP_SIZES)
def test_a_step_without_the_check_reads_nothing_on_the_host(update, momentum, step_size):
    params = network()
    options = {"lr": 0.1, "check_finite": False, "weight_decay": 0.1, "radius_invariant": True, "update": update}
    optimizer = RiemannianFGSGD(params, **options, **momentum, **step_size)
    for seed in range(2):
        set_gradients(params, seed)
        with NoSynchronisation() as watch:
            optimizer.step()
        assert watch.calls > 0


def test_a_step_runs_on_tensors_without_values():
    shapes = [(ScaledSphere(0.5, ndim=2), (3, 3, 3)), (Oblique(), (5, 3)), (Stiefel(), (5, 3))]
    params = [geoopt.ManifoldParameter(torch.empty(shape, device="meta"), manifold=m) for m, shape in shapes]
    optimizer = RiemannianFGSGD(params, lr=0.1, momentum=0.9)
    for _ in range(2):
        for param in params:
            param.grad = torch.empty_like(param, device="meta")
        optimizer.step()
    assert all(optimizer.state[p]["momentum_buffer"].is_meta for p in params)


# -- long runs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("manifold", "shape"),
    [
        (ScaledSphere(ndim=2), (4, 3, 3)),
        (Oblique(), (4, 3, 3)),
        (Stiefel(), (4, 3, 3)),
        (Stiefel(), (64, 32)),
    ],
)
def test_ten_thousand_float32_steps_do_not_drift(manifold, shape):
    """The pure step without the optimiser around it; the gradients are scaled ones of nearly the worst length."""
    x, buffer = on(manifold, *shape, dtype=torch.float32).detach(), None
    gradients = [normal(shape, seed, torch.float32) for seed in range(16)]
    gradients = [g * (KNEE / g.norm()) for g in gradients]
    gain = momentum_gain(0.9, dampening=0.0, nesterov=False)
    for step in range(10_000):
        grad = manifold.egrad2rgrad(x, gradients[step * 7 % 16])
        x, buffer = fgsgd_update(manifold, x, grad, buffer, lr=0.1, momentum=0.9, bound=0.1 * KNEE * gain)
    assert manifold.violation(x).max().item() < 1e-5
