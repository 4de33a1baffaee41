"""A product of groups does to every component what the component's own manifold does, in any layout."""

from __future__ import annotations

import copy
import functools
import io
import math
import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import geoopt
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from layers import Grouped, grouped_weights
from torch import Tensor, nn

from fgo_geo import Ball, Oblique, ProductOfGroups, ScaledSphere, SpectralBall, Stiefel
from fgo_geo.grouping import MANIFOLD_KINDS, collection
from fgo_geo.manifolds import ComponentManifold
from fgo_geo.weights import kinds
from fgo_geo.weights.components import WeightLayout

SINGLE: dict[str, Callable[[float], geoopt.Manifold]] = {
    "sphere": functools.partial(ScaledSphere, ndim=2),
    "oblique": Oblique,
    "stiefel": Stiefel,
    "euclidean": lambda radius: geoopt.Euclidean(ndim=2),
    "ball": functools.partial(Ball, ndim=2),
    "spectral_ball": SpectralBall,
}


@dataclass(frozen=True)
class Case:
    """A product, where its components lie, and the radius of each of them."""

    grouped: Grouped
    manifold: ProductOfGroups
    radii: list[list[float]]
    seed: int

    @functools.cached_property
    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)

    def gaussian(self) -> Tensor:
        return torch.randn(self.grouped.shape, dtype=torch.float64, generator=self.generator)

    def point(self) -> Tensor:
        point = self.manifold.random(self.grouped.shape, dtype=torch.float64, generator=self.generator)
        return point.as_subclass(Tensor)

    def tangent(self, x: Tensor, length: float = 1.0) -> Tensor:
        """A tangent vector, in every component about ``length`` radii long."""
        return self.manifold.proju(x, self.gaussian()) * self.manifold.radius_map(x) * (length / x.numel() ** 0.5)

    def components(self) -> Iterator[tuple[int, geoopt.Manifold, Tensor]]:
        """Group, single manifold, and positions of the entries of every component."""
        for group, (kind, members) in enumerate(self.grouped.groups()):
            for radius, positions in zip(self.radii[group], members, strict=True):
                yield group, SINGLE[kind](radius), torch.from_numpy(np.ascontiguousarray(positions))

    def one_by_one(self, call: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        """``call(manifold, *components)`` for one component at a time, put in the place of the component."""
        result = torch.full(self.grouped.shape, torch.nan, dtype=torch.float64)
        for _, manifold, positions in self.components():
            result.view(-1)[positions] = call(manifold, *(t.reshape(-1)[positions] for t in tensors))
        return result

    def numbers(self, call: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        """Sums over the groups of one number per component."""
        sums = torch.zeros(self.manifold.n_groups, dtype=torch.float64)
        for group, manifold, positions in self.components():
            sums[group] += call(manifold, *(t.reshape(-1)[positions] for t in tensors))
        return sums


@st.composite
def cases(draw: st.DrawFn, of_kinds: Sequence[str] = tuple(SINGLE)) -> Case:
    grouped = draw(grouped_weights(movable=True, of_kinds=of_kinds))
    groups = grouped.groups()
    numbers = st.sampled_from([1.0, 0.3, 2.0])
    form = draw(st.sampled_from(["number", "kind", "group", "part"]))
    if form == "number":
        radius: Any = draw(numbers)
        radii = [[radius] * len(members) for _, members in groups]
    elif form == "kind":
        radius = {kind: draw(numbers) for kind in SINGLE}
        radii = [[radius[kind]] * len(members) for kind, members in groups]
    else:
        per_group = [draw(numbers) for _ in groups]
        radii = [[r] * len(members) for r, (_, members) in zip(per_group, groups, strict=True)]
        radius = torch.tensor(per_group, dtype=torch.float64)
        if form == "part":
            cut = ProductOfGroups(grouped.collections, grouped.layout).partition
            radius = [torch.from_numpy(values) for values in cut.per_component(radius.numpy())]
    return Case(grouped, ProductOfGroups(grouped.collections, grouped.layout, radius), radii, draw(st.integers(0, 99)))


def close(actual: Tensor, expected: Tensor, atol: float = 1e-12) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


# -- one component at a time -------------------------------------------------------------------------------------

METHODS: dict[str, str] = {  # a: anything, x: point, y: point nearby, u and v: tangent vectors
    "projx": "a",
    "proju": "xa",
    "egrad2rgrad": "xa",
    "retr": "xu",
    "expmap": "xu",
    "logmap": "xy",
    "transp": "xyv",
    "transp_follow_retr": "xuv",
    "transp_follow_expmap": "xuv",
}


def arguments(case: Case, letters: str) -> list[Tensor]:
    x = case.point()
    values = {"x": x, "y": case.manifold.expmap(x, case.tangent(x, 0.5)), "a": case.gaussian()}
    values |= {"u": case.tangent(x), "v": case.tangent(x)}
    return [values[letter] for letter in letters]


@pytest.mark.parametrize("method", METHODS)
@given(case=cases())
def test_methods_are_those_of_the_components(method: str, case: Case) -> None:
    tensors = arguments(case, METHODS[method])
    expected = case.one_by_one(lambda manifold, *parts: getattr(manifold, method)(*parts), *tensors)
    close(getattr(case.manifold, method)(*tensors), expected)


@given(case=cases())
def test_the_metric_is_the_sum_over_components(case: Case) -> None:
    x, y, u, v = arguments(case, "xyuv")
    manifold = case.manifold
    inner = case.numbers(lambda m, *parts: m.inner(*parts), x, u, v)
    close(manifold.group_inner(x, u, v), inner)
    close(manifold.inner(x, u, v), inner.sum())
    squared = case.numbers(lambda m, *parts: m.inner(*parts), x, u)
    close(manifold.group_norm(x, u), squared.sqrt())
    close(manifold.norm(x, u), squared.sum().sqrt())
    distance = case.numbers(lambda m, *parts: m.dist(*parts).square(), x, y).sum().sqrt()
    close(manifold.dist(x, y), distance)
    close(manifold.dist2(x, y), distance.square())
    for value in (manifold.inner(x, u, keepdim=True), manifold.norm(x, u, keepdim=True)):
        assert value.shape == (1,) * x.ndim
    assert manifold.dist(x, y, keepdim=True).shape == (1,) * x.ndim
    component = case.one_by_one(lambda m, *parts: m.component_inner(*parts).expand(parts[0].shape), x, u, v)
    close(manifold.component_inner(x, u, v), component)
    close(manifold.component_inner(x, u), manifold.component_inner(x, u, u))


@given(case=cases(MANIFOLD_KINDS))  # of a ball, every vector is tangent
def test_points_and_tangent_vectors_pass_the_checks(case: Case) -> None:
    manifold, x = case.manifold, case.point()
    u = case.tangent(x, 3.0)
    for point in (x, manifold.retr(x, u), manifold.expmap(x, u), manifold.projx(case.gaussian())):
        manifold.assert_check_point_on_manifold(point)
        assert float(manifold.violation(point).max()) < 1e-12
    manifold.assert_check_vector_on_tangent(x, u)
    y, carried = manifold.retr_transp(x, u, u)
    close(y, manifold.retr(x, u))
    manifold.assert_check_vector_on_tangent(y, carried)
    constrained = any(isinstance(m, ComponentManifold) for _, m, _ in case.components())
    off = x * (1.1 if constrained else 1.0)
    assert manifold.check_point_on_manifold(off) is not constrained
    assert manifold.check_vector_on_tangent(x, x) is not constrained


@given(case=cases())
def test_random_points_and_the_origin(case: Case) -> None:
    manifold, shape = case.manifold, case.grouped.shape
    gaussian = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(case.seed))
    uniform = case.one_by_one(lambda m, part: m.uniform(part) if isinstance(m, ComponentManifold) else part, gaussian)
    drawn = manifold.random(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(case.seed))
    close(drawn.as_subclass(Tensor), uniform)
    assert drawn.manifold is manifold
    origin = case.one_by_one(lambda m, part: m.origin(*part.shape, dtype=part.dtype).as_subclass(Tensor), gaussian)
    close(manifold.origin(*shape, dtype=torch.float64).as_subclass(Tensor), origin)


@given(case=cases())
def test_maps_of_radii_and_constraints(case: Case) -> None:
    x, other = case.point(), case.gaussian()
    radius = {id(m): m for _, m, _ in case.components()}
    assert radius

    def own_radius(m: geoopt.Manifold, part: Tensor) -> Tensor:
        return torch.full_like(part, m.radius if isinstance(m, ComponentManifold) else 1.0)

    close(case.manifold.radius_map(x), case.one_by_one(own_radius, x))
    chosen = case.one_by_one(lambda m, a, b: a if isinstance(m, ComponentManifold) else b, x, other)
    close(case.manifold.where_constrained(x, other), chosen)


@given(case=cases(), factor=st.sampled_from([0.5, 3.0]))
def test_a_change_of_radius_dilates_the_manifold(case: Case, factor: float) -> None:
    manifold, x = case.manifold, case.point()
    u = case.tangent(x)
    before = manifold.radius_map(x)
    moved = copy.deepcopy(manifold)
    moved.set_radius(torch.tensor([radii[0] * factor for radii in case.radii], dtype=torch.float64))
    ratio = moved.radius_map(x) / before
    close(ratio, manifold.where_constrained(torch.full_like(x, factor), torch.ones_like(x)))
    moved.assert_check_point_on_manifold(x * ratio)
    moved.assert_check_vector_on_tangent(x * ratio, u * ratio)
    close(moved.retr(x * ratio, u * ratio), manifold.retr(x, u) * ratio)


@given(seed=st.integers(0, 99), components=st.sampled_from(["sphere", "stiefel", "oblique"]))
def test_one_radius_per_kernel(seed: int, components: str) -> None:
    groups = collection(3, 4, "pio", (components, "euclidean"), "random", seed)
    radius = 0.5 + torch.rand(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    manifold = ProductOfGroups(groups, (3, 4, 3, 2), radius)
    x = manifold.random(3, 4, 3, 2, dtype=torch.float64).as_subclass(Tensor)
    kinds = np.array(groups.kinds)[groups.kind_of]
    for d, c in np.ndindex(3, 4):
        SINGLE[kinds[d, c]](float(radius[d, c])).assert_check_point_on_manifold(x[d, c])


# -- one group, and Geoopt ---------------------------------------------------------------------------------------

SHAPE = (4, 3, 3, 2)


def product_of(kind: str, radius: float = 1.0, exact: bool = False) -> ProductOfGroups:
    return ProductOfGroups(collection(4, 3, "layer", kind), SHAPE, radius, exact=exact)


@pytest.mark.parametrize("kind", SINGLE)
@pytest.mark.parametrize("radius", [1.0, 0.4])
def test_one_group_is_one_manifold(kind: str, radius: float) -> None:
    """Bit for bit: a layer with one group computes what a parameter on the component manifold computes.

    That is, a parameter whose kernels lie in memory as those of the product: the order of sums depends on it.
    """
    product, single = product_of(kind, radius), SINGLE[kind](radius)
    case = Case(Grouped(product.layout, product.collections), product, [[radius] * 12], seed=0)
    for method, letters in METHODS.items():
        tensors = arguments(case, letters)
        planes = [t.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1) for t in tensors]
        assert torch.equal(getattr(product, method)(*tensors), getattr(single, method)(*planes)), method


@pytest.mark.parametrize("method", METHODS)
def test_results_lie_in_memory_as_the_point_does(method: str) -> None:
    """The numbers do not depend on where they lie, bit for bit; a channels-last weight keeps its fast dimension."""
    mixed = collection(6, 4, "pio", tuple(SINGLE), "random")
    product = ProductOfGroups(mixed, (6, 4, 3, 3), 0.7)
    case = Case(Grouped(product.layout, product.collections), product, [[0.7] * 24], seed=0)
    tensors = arguments(case, METHODS[method])
    result = getattr(product, method)(*tensors)
    last = getattr(product, method)(*(t.contiguous(memory_format=torch.channels_last) for t in tensors))
    assert torch.equal(result, last)
    if result.shape == product.layout.shape:
        assert result.is_contiguous()
        assert last.stride(1) == 1


@pytest.mark.parametrize("shape", [(4, 3, 1, 5), (4, 3, 5, 1), (4, 3, 5)])
def test_all_kinds_of_kernels_with_one_row_or_column_are_spheres(shape: tuple[int, ...]) -> None:
    sphere, *others = (ProductOfGroups(collection(4, 3, "layer", kind), shape, 0.4) for kind in list(SINGLE)[:3])
    case = Case(Grouped(sphere.layout, sphere.collections), sphere, [[0.4] * 12], seed=0)
    for method, letters in METHODS.items():
        if method in ("transp_follow_expmap", "logmap"):
            continue  # Stiefel transports by projection; its logarithm is iterative
        tensors = arguments(case, letters)
        for other in others:
            close(getattr(other, method)(*tensors), getattr(sphere, method)(*tensors))


def flat_kernels(x: Tensor) -> Tensor:
    return x.reshape(12, 6)


def columns(x: Tensor) -> Tensor:
    return x.mT


@pytest.mark.parametrize(
    ("kind", "view", "geoopt_manifold"),
    [
        ("sphere", flat_kernels, geoopt.SphereExact()),
        ("oblique", columns, geoopt.SphereExact()),
        ("stiefel", lambda x: x, geoopt.EuclideanStiefelExact()),
        ("euclidean", lambda x: x, geoopt.Euclidean()),
    ],
)
def test_components_agree_with_geoopt(kind: str, view: Callable[[Tensor], Tensor], geoopt_manifold: Any) -> None:
    """Geoopt has no radius and no oblique manifold, which is a sphere per column."""
    product = product_of(kind)
    case = Case(Grouped(product.layout, product.collections), product, [[1.0] * 12], seed=0)
    a, x, u, v = case.gaussian(), *arguments(case, "xuv")
    u, v = product.proju(x, u), product.proju(x, v)
    close(view(product.projx(a)), geoopt_manifold.projx(view(a)))
    close(view(product.proju(x, a)), geoopt_manifold.proju(view(x), view(a)))
    close(view(product.egrad2rgrad(x, a)), geoopt_manifold.egrad2rgrad(view(x), view(a)))
    close(view(product.expmap(x, u)), geoopt_manifold.expmap(view(x), view(u)))
    close(product.inner(x, u, v), geoopt_manifold.inner(view(x), view(u), view(v)).sum())


def test_retractions_agree_with_geoopt() -> None:
    """Geoopt's Stiefel manifold takes the QR factor, ours the polar one: they agree to first order."""
    for kind, view, theirs, order in (
        ("sphere", flat_kernels, geoopt.Sphere(), None),
        ("oblique", columns, geoopt.Sphere(), None),
        ("stiefel", lambda x: x, geoopt.EuclideanStiefel(), 2),
    ):
        product = product_of(kind)
        case = Case(Grouped(product.layout, product.collections), product, [[1.0] * 12], seed=0)
        x, u = arguments(case, "xu")

        def gap(
            step: float, x: Tensor = x, u: Tensor = u, p: Any = product, t: Any = theirs, view: Any = view
        ) -> float:
            return float((view(p.retr(x, step * u)) - t.retr(view(x), view(step * u))).norm())

        if order is None:
            assert gap(1.0) < 1e-13
        else:
            assert math.log2(gap(1e-3) / gap(5e-4)) == pytest.approx(order, abs=0.01)


# -- Geoopt's optimisers and samplers ----------------------------------------------------------------------------

PIO = collection(4, 3, "pio", ("sphere", "stiefel", "oblique", "euclidean"), "random", 1)


def parameter(seed: int = 0, exact: bool = False) -> geoopt.ManifoldParameter:
    manifold = ProductOfGroups(PIO, SHAPE, {"sphere": 1.0, "stiefel": 0.5, "oblique": 2.0}, exact=exact)
    point = manifold.random(*SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return geoopt.ManifoldParameter(point)


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda params: geoopt.optim.RiemannianSGD(params, lr=0.5),
    "momentum": lambda params: geoopt.optim.RiemannianSGD(params, lr=0.1, momentum=0.8, dampening=0.5, stabilize=5),
    "adam": lambda params: geoopt.optim.RiemannianAdam(params, lr=0.03, stabilize=5),
    "line search": lambda params: geoopt.optim.RiemannianLineSearch(params),
    "conjugate": lambda params: geoopt.optim.RiemannianLineSearch(params, cg_method="fr"),
}


@pytest.mark.parametrize(("name", "exact"), [*((name, False) for name in OPTIMIZERS), ("momentum", True)])
def test_geoopts_optimisers_find_the_nearest_point(name: str, exact: bool) -> None:
    """The nearest point of a product is the projection; the start is near enough for every component to reach it."""
    param = parameter(exact=exact)
    manifold = param.manifold
    generator = torch.Generator().manual_seed(1)
    target = param.detach() + 0.2 * torch.randn(SHAPE, dtype=torch.float64, generator=generator)
    optimizer = OPTIMIZERS[name]([param])

    def closure() -> float:
        optimizer.zero_grad()
        loss = 0.5 * (param - target).square().sum()
        loss.backward()
        return loss.item()

    for _ in range(200):
        optimizer.step(closure)
        assert float(manifold.violation(param.detach()).max()) < 1e-10
        if float(manifold.norm(param.detach(), manifold.egrad2rgrad(param.detach(), param.detach() - target))) < 1e-5:
            break
    torch.testing.assert_close(param.detach(), manifold.projx(target), rtol=0, atol=1e-4)


def test_geoopts_sgd_is_a_loop_over_components() -> None:
    param = parameter()
    manifold, generator = param.manifold, torch.Generator().manual_seed(1)
    radii = {"sphere": 1.0, "stiefel": 0.5, "oblique": 2.0, "euclidean": 1.0}
    grouped = Grouped(manifold.layout, manifold.collections)
    loop = [
        (torch.from_numpy(np.ascontiguousarray(m)), SINGLE[kind](radii[kind]))
        for kind, members in grouped.groups()
        for m in members
    ]
    singles = [geoopt.ManifoldParameter(param.detach().reshape(-1)[at], manifold=m) for at, m in loop]
    optimizers = [geoopt.optim.RiemannianSGD(p, lr=0.3, momentum=0.9, dampening=0.1) for p in ([param], singles)]
    for _ in range(5):
        param.grad = torch.randn(SHAPE, dtype=torch.float64, generator=generator)
        for single, (at, _) in zip(singles, loop, strict=True):
            single.grad = param.grad.reshape(-1)[at].clone()
        for optimizer in optimizers:
            optimizer.step()
        for single, (at, _) in zip(singles, loop, strict=True):
            close(param.detach().reshape(-1)[at], single.detach())


@pytest.mark.parametrize(
    "make",
    [
        lambda params: geoopt.samplers.RSGLD(params, epsilon=1e-2),
        lambda params: geoopt.samplers.RHMC(params, epsilon=1e-2, n_steps=5),
        lambda params: geoopt.samplers.SGRHMC(params, epsilon=1e-2, n_steps=5, alpha=0.1),
    ],
    ids=["RSGLD", "RHMC", "SGRHMC"],
)
def test_geoopts_samplers_stay_on_the_manifold_and_move(make: Callable[[Any], Any]) -> None:
    torch.manual_seed(0)
    param = parameter(exact=True)
    start, target = param.detach().clone(), parameter(seed=1).detach()
    sampler = make([param])
    sampler.burnin = False
    for _ in range(10):
        sampler.step(lambda: -(param - target).square().sum())
        assert float(param.manifold.violation(param.detach()).max()) < 1e-10
    assert float((param.detach() - start).abs().max()) > 1e-2
    if isinstance(sampler, geoopt.samplers.RHMC):
        assert np.mean(sampler.acceptance_probs) > 0.9


def test_samplers_demand_geodesics() -> None:
    assert parameter(exact=True).manifold.reversible
    with pytest.raises(ValueError, match="reversible"):
        geoopt.samplers.RHMC([parameter()])


@given(case=cases(MANIFOLD_KINDS), length=st.sampled_from([0.0, 0.3, 2.0]))  # the border of a ball stops steps
def test_geodesic_steps_can_be_undone(case: Case, length: float) -> None:
    manifold = ProductOfGroups(case.grouped.collections, case.grouped.layout, exact=True)
    x = case.manifold.projx(case.gaussian()) / case.manifold.radius_map(case.gaussian())
    u = manifold.proju(x, case.gaussian()) * length
    y, v = manifold.retr_transp(x, u, 0.5 * u)
    close(y, manifold.expmap(x, u))
    manifold.assert_check_vector_on_tangent(y, v)
    back, w = manifold.retr_transp(y, -2 * v, v)
    close(back, x, atol=1e-10)
    close(w, 0.5 * u, atol=1e-10)
    close(manifold.group_norm(y, v), manifold.group_norm(x, 0.5 * u), atol=1e-10)


@given(case=cases())
def test_the_geodesic_transport_is_linear_and_tangent(case: Case) -> None:
    manifold = copy.deepcopy(case.manifold)
    manifold.exact = True
    x = case.point()
    u, v, w = (case.tangent(x, 2.0) for _ in range(3))
    y, both = manifold.retr_transp(x, u, v + 2 * w)
    manifold.assert_check_vector_on_tangent(y, both)
    close(both, manifold.retr_transp(x, u, v)[1] + 2 * manifold.retr_transp(x, u, w)[1])


# -- types, copies, checks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_single_precision(dtype: torch.dtype) -> None:
    shape = (8, 8, 3, 3)
    manifold = ProductOfGroups(collection(8, 8, "pi", ("sphere", "stiefel")), shape, 0.5)
    x = manifold.random(*shape).as_subclass(Tensor).to(dtype)
    u = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    for method, args in {
        "projx": (u,),
        "proju": (x, u),
        "retr": (x, u),
        "group_inner": (x, u),
        "group_norm": (x, u),
    }.items():
        result = getattr(manifold, method)(*args)
        assert result.dtype == dtype
        expected = getattr(manifold, method)(*(a.float() for a in args)).to(dtype)
        assert torch.equal(result, expected), method


def test_scaled_by_geoopt() -> None:
    param = parameter()
    manifold, x = param.manifold, param.detach().as_subclass(Tensor)
    scaled = geoopt.Scaled(manifold, 2.0)
    u = 0.3 * manifold.proju(x, torch.ones(SHAPE, dtype=torch.float64))
    close(scaled.retr(x, u), manifold.retr(x, u / 2))
    close(scaled.expmap(x, u), manifold.expmap(x, u / 2))
    close(scaled.retr_transp(x, u, u)[1], manifold.retr_transp(x, u / 2, u)[1])
    y = scaled.expmap(x, u)
    close(scaled.dist(x, y), 2 * manifold.dist(x, y))
    close(scaled.logmap(x, y), u, atol=1e-9)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))])
def test_copies_and_pickles_compute_the_same(duplicate: Callable[[Any], Any]) -> None:
    param = geoopt.ManifoldParameter(
        ProductOfGroups(PIO, SHAPE, torch.linspace(0.5, 1.0, len(PIO.group_sizes))).random(*SHAPE)
    )
    twin = duplicate(param)
    assert type(twin) is geoopt.ManifoldParameter
    assert twin.manifold is not param.manifold
    assert torch.equal(twin, param)
    u = torch.randn(SHAPE)
    assert torch.equal(twin.manifold.retr(twin, u), param.manifold.retr(param, u))
    assert twin.manifold.collections == param.manifold.collections


def test_the_manifold_has_no_state() -> None:
    """Groups and radii are configuration: a module that holds the manifold keeps its state_dict."""
    assert not ProductOfGroups(PIO, SHAPE, torch.rand(4, 3) + 0.5).state_dict()


def test_torch_save_with_weights_only_needs_no_manifold() -> None:
    file = io.BytesIO()
    torch.save({"w": parameter().detach().as_subclass(Tensor)}, file)
    file.seek(0)
    assert type(torch.load(file, weights_only=True)["w"]) is Tensor


def test_gradients_flow_through_the_operations() -> None:
    manifold = ProductOfGroups(PIO, SHAPE, 0.5)
    x = manifold.random(*SHAPE, dtype=torch.float64).as_subclass(Tensor)
    u = 0.1 * manifold.proju(x, torch.randn(SHAPE, dtype=torch.float64)).requires_grad_()
    for call in (manifold.retr, manifold.expmap, manifold.proju):
        assert torch.autograd.gradcheck(lambda u, call=call: call(x, u), (u.detach().requires_grad_(),), fast_mode=True)


def test_compiles_without_a_break() -> None:
    param = parameter()
    manifold, x = param.manifold, param.detach().as_subclass(Tensor)
    u = 0.1 * torch.ones(SHAPE, dtype=torch.float64)

    def step(x: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        v = manifold.proju(x, u)
        return x + v, manifold.group_inner(x, v)

    compiled = torch.compile(step, fullgraph=True, backend="eager")
    for actual, expected in zip(compiled(x, u), step(x, u), strict=True):
        close(actual, expected)


def test_says_what_it_is() -> None:
    assert str(ProductOfGroups(collection(6, 4, "pio", ("sphere", "stiefel")), (6, 4, 3, 3))) == (
        "ProductOfGroups(PIO over 4 -> 6 channels: 10 groups, 5 sphere + 5 stiefel, sizes 2-3) manifold"
    )


@pytest.mark.parametrize(
    ("radius", "error", "message"),
    [
        (0.0, ValueError, "radius must be positive"),
        ("kaiming", TypeError, "radius must be a real number or a tensor, got 'kaiming'"),
        ({"sphere": 1.0}, ValueError, r"entry for each of \['oblique', 'sphere', 'stiefel'\]"),
        ({"sphere": 1.0, "oblique": 1.0, "stiefel": 1.0, "spere": 2.0}, ValueError, "may have others of"),
        (torch.ones(5), ValueError, r"shape \(8,\), one per group, or \(4, 3\), one per kernel; got \(5,\)"),
        (-torch.ones(4, 3), ValueError, "radius must be positive"),
        ([torch.full((1,), 1.5)] * 3, TypeError, "radius must be a real number"),
        (torch.ones(4, 3, requires_grad=True), ValueError, r"^ProductOfGroups: the radius requires a gradient.*detach"),
        (nn.Parameter(torch.ones(8), requires_grad=False), ValueError, "^ProductOfGroups: the radius is a Parameter"),
        (torch.ones((), requires_grad=True), ValueError, "the radius requires a gradient"),
        ([torch.ones(6, requires_grad=True), 1.0, 1.0], ValueError, "the radius requires a gradient"),
        (dict.fromkeys(("sphere", "oblique", "stiefel"), torch.ones((), requires_grad=True)), ValueError, "a gradient"),
        pytest.param(
            lambda cut: torch.ones(8, requires_grad=True), ValueError, "the radius requires a gradient", id="callable"
        ),
    ],
    ids=repr,
)
def test_bad_radii(radius: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ProductOfGroups(PIO, SHAPE, radius)
    manifold = ProductOfGroups(PIO, SHAPE, 0.5)
    x = manifold.random(*SHAPE)
    with pytest.raises(error, match=message):
        manifold.set_radius(radius)
    assert manifold.check_point_on_manifold(x), "nothing has changed"


@pytest.mark.parametrize(
    ("layout", "kind", "message"),
    [
        (WeightLayout((4, 3, 3, 3)), "sphere", None),
        (WeightLayout((4, 3, 1, 1)), "sphere", "single numbers"),
        (WeightLayout((4, 3, 1, 2)), "stiefel", None),
    ],
)
def test_components_that_could_not_move(layout: WeightLayout, kind: str, message: str | None) -> None:
    groups = collection(4, 3, "layer", kind)
    if message is None:
        ProductOfGroups(groups, layout)
    else:
        with pytest.raises(ValueError, match=message):
            ProductOfGroups(groups, layout)


def test_blocks_that_could_not_move() -> None:
    blocks = collection(2, 2, "pi", ("sphere", "oblique"), components="block")
    ProductOfGroups(blocks, (2, 2))
    with pytest.raises(ValueError, match=r"oblique cannot hold components of size \(1, 1\).*isolated points"):
        ProductOfGroups(collection(1, 2, "pi", ("euclidean", "oblique"), components="block"), (1, 2))


def test_other_shapes_are_refused() -> None:
    manifold = ProductOfGroups(PIO, SHAPE)
    for call in (manifold.random, manifold.origin):
        with pytest.raises(ValueError, match=r"holds exactly one weight of shape \(4, 3, 3, 2\)"):
            call(4, 3, 2, 3)
    with pytest.raises(ValueError, match="exactly one weight"):
        geoopt.ManifoldParameter(torch.zeros(2, 4, 3, 3, 2), manifold=manifold)


def test_a_retraction_is_not_assigned_to_a_part() -> None:
    """Steps of a part retract as its kind was registered."""
    manifold = ProductOfGroups(collection(4, 2, "po", ("sphere", "stiefel")), (4, 2, 3, 3))
    part = next(own for own in manifold.manifolds if isinstance(own, Stiefel))
    with pytest.raises(AttributeError, match=r"^Stiefel: .*part of a ProductOfGroups.*got 'qr'; register a class of"):
        part.retraction = "qr"
    assert part.retraction == "polar"

    class ByQR(Stiefel):
        """The remedy: parts of other radii have the retraction of their kind, too."""

    kinds.register_kind("by_qr", ByQR, build=lambda radius: ByQR(radius, retraction="qr"))
    try:
        other = ProductOfGroups(collection(4, 2, "po", ("sphere", "by_qr")), (4, 2, 3, 3))
        other.set_radius(3.0)
        assert [own.retraction for own in other.manifolds if isinstance(own, Stiefel)] == ["qr"]
    finally:
        kinds.unregister_kind("by_qr")


def test_a_radius_is_not_assigned_past_set_radius() -> None:
    """Nothing would come of it, or the fused steps would go on with the old one."""
    manifold = ProductOfGroups(PIO, SHAPE, 2.0)
    message = r"^ProductOfGroups: every component has its own radius.*got 3.0; call set_radius, and scale points"
    with pytest.raises(AttributeError, match=message):
        manifold.radius = 3.0
    for copied in (manifold, copy.deepcopy(manifold)):
        for part in copied.manifolds:
            if isinstance(part, ComponentManifold):
                with pytest.raises(AttributeError, match=r"part of a ProductOfGroups.*got 3.0; call set_radius of the"):
                    part.radius = 3.0
                assert part.radius == 2.0
    manifold.set_radius(3.0)
    assert {part.radius for part in manifold.manifolds if isinstance(part, ComponentManifold)} == {3.0}


@pytest.mark.parametrize(("shape", "components"), [((5, 4, 3, 3), "kernel"), ((6, 8), "block"), ((6, 8), "filter")])
@pytest.mark.parametrize("amsgrad", [False, True])
def test_geoopts_adam_takes_a_second_moment_per_component(
    shape: tuple[int, ...], components: str, amsgrad: bool
) -> None:
    """On a product it steps as on each component alone; of a matrix per column it is one on the oblique manifold."""
    groups = collection(*shape[:2], "pio", ("sphere", "oblique", "stiefel", "euclidean"), components=components)
    grouped = Grouped(WeightLayout(shape), (groups,))
    case = Case(grouped, ProductOfGroups(groups, shape), [[1.0] * len(m) for _, m in grouped.groups()], seed=0)
    start = case.point()
    together = geoopt.ManifoldParameter(start.clone(), manifold=case.manifold)
    alone = [
        (geoopt.ManifoldParameter(start.reshape(-1)[positions], manifold=manifold), positions)
        for _, manifold, positions in case.components()
    ]
    singles = [param for param, _ in alone]
    optimizers = [geoopt.optim.RiemannianAdam(p, lr=0.05, amsgrad=amsgrad) for p in ([together], singles)]
    for _ in range(3):
        grad = case.gaussian()
        together.grad = grad.clone()
        for param, positions in alone:
            param.grad = grad.reshape(-1)[positions].clone()
        for optimizer in optimizers:
            optimizer.step()
    for param, positions in alone:
        close(together.detach().reshape(-1)[positions], param.detach())
    second = optimizers[0].state[together]["exp_avg_sq"]
    for kind, part in zip(case.manifold.partition.kinds, case.manifold.partition.split(second), strict=True):
        if kind != "euclidean":
            assert torch.equal(part, part[:, :1].expand_as(part))
        if kind in ("sphere", "stiefel"):
            assert torch.equal(part, part[:, :, :1].expand_as(part))
