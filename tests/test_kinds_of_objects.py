"""Manifold objects in place of names of kinds: Geoopt's, and those of classes of a user's own."""

from __future__ import annotations

import math
from typing import Any

import geoopt
import pytest
import torch
from torch import Tensor, nn

import fgo_geo
from fgo_geo import Collection, Plan, ProductOfGroups, RiemannianFGSGD, collection, kernels
from fgo_geo.weights import kinds


class SpecialOrthogonal(fgo_geo.Stiefel):
    """The Stiefel manifold; of the two parts that it has for square matrices, the one of positive determinant."""

    name = "SpecialOrthogonal"

    def projx(self, x: Tensor) -> Tensor:
        q = super().projx(x)
        if x.shape[-2] > x.shape[-1]:
            return q
        return torch.cat([q[..., :-1], q[..., -1:] * torch.linalg.det(q).sign()[..., None, None]], -1)

    def uniform(self, gaussian: Tensor) -> Tensor:
        return self.projx(gaussian)


class Sloped(fgo_geo.Oblique):
    """A manifold with a setting."""

    name = "Sloped"

    def __init__(self, radius: float | Tensor = 1.0, slope: float = 0.0) -> None:
        super().__init__(radius)
        self.slope = slope


class Kernel(fgo_geo.Oblique):
    """A class whose name gives that of the kind "sphere"."""


Kernel.__name__ = "Sphere"


class Weighted(fgo_geo.Oblique):
    """A manifold that holds a tensor."""

    name = "Weighted"

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weights", torch.ones(3))


STIEFELS = [geoopt.CanonicalStiefel, geoopt.EuclideanStiefel, geoopt.EuclideanStiefelExact]


# -- which kind an object is of ----------------------------------------------------------------------------------


@pytest.mark.parametrize("own", STIEFELS)
def test_geoopts_classes_are_kinds(own: type[geoopt.Manifold]) -> None:
    record = kinds.kind(own())
    assert record.name == f"geoopt.{own.__name__}"
    assert record is kinds.kind(own()) is kinds.kind(record.name.upper()) is kinds.kind_of(own)
    assert (record.code, record.has_radius, record.joins_filters) == (None, False, True)
    assert record.norms is not None
    assert record.norms(5, 3) == (math.sqrt(3), 1.0)
    assert type(record.build(2.0)) is own
    assert record.build(2.0) is not record.build(2.0)


def test_names_of_geoopts_classes_need_no_registration() -> None:
    assert "geoopt.EuclideanStiefel" not in kinds.names()
    assert collection(4, 4, "layer", "geoopt.euclideanstiefel").kinds == ("geoopt.EuclideanStiefel",)
    assert collection(4, 4, "layer", "geoopt.Stiefel").kinds == ("geoopt.CanonicalStiefel",)  # what geoopt makes of it


@pytest.mark.parametrize("word", ["geoopt.Sphere", "geoopt.Cube", "geoopt.optim", "geoopt.", "torch.Tensor"])
def test_other_names_are_unknown(word: str) -> None:
    with pytest.raises(ValueError, match=rf"must be one of .*, got '{word}'"):
        collection(4, 4, "layer", word)


def test_objects_of_known_kinds_are_their_names() -> None:
    made = collection(4, 4, "pi", (fgo_geo.ScaledSphere(), "oblique", fgo_geo.Stiefel(), geoopt.Euclidean()))
    assert made.kinds == ("sphere", "oblique", "stiefel", "euclidean")


def test_objects_of_other_classes_get_a_name() -> None:
    given = SpecialOrthogonal()
    made = collection(4, 4, "pi", (given, SpecialOrthogonal()))
    assert made.kinds == ("special_orthogonal", "special_orthogonal")
    record = kinds.kind("special_orthogonal")
    assert (record.manifold, record.code, record.joins_filters) == (SpecialOrthogonal, None, True)
    built: Any = record.build(3.0)
    assert (built.radius, given.radius) == (3.0, 1.0)
    assert type(built) is SpecialOrthogonal


def test_settings_of_an_object_are_those_of_its_kind() -> None:
    assert collection(4, 4, "layer", Sloped(slope=0.5)).kinds == ("sloped",)
    record = kinds.kind("sloped")
    built: Any = record.build(2.0)
    assert (built.radius, built.slope) == (2.0, 0.5)
    assert record.options == ("slope",)
    assert kinds.kind(Sloped(slope=0.5)) is record
    with pytest.raises(ValueError, match=r"Sloped.* has slope=0.25, but the kind 'sloped' of that class has slope=0.5"):
        collection(4, 4, "layer", Sloped(slope=0.25))


@pytest.mark.parametrize(
    ("manifold", "error", "message"),
    [
        (fgo_geo.Stiefel(2.0), ValueError, r"Stiefel, given .* has radius 2.0; .* pass a manifold of radius 1"),
        (fgo_geo.Oblique(torch.ones(3)), ValueError, r"Oblique, given .* has radius tensor.*of radius 1"),
        (
            fgo_geo.Stiefel(retraction="qr"),
            ValueError,
            r"has retraction='qr', but the kind 'stiefel' of that class has retraction='polar'; derive a class",
        ),
        (geoopt.Sphere(), TypeError, r"'geoopt.Sphere' needs a Sphere with ndim = 2, got Sphere with ndim = 1"),
        (geoopt.Scaled(geoopt.EuclideanStiefel()), TypeError, r"stands for other manifolds"),
        (geoopt.ProductManifold((geoopt.Sphere(), 3)), TypeError, r"ProductManifold, .* stands for other manifolds"),
        (
            Kernel(),
            ValueError,
            r"would be called 'sphere', which is the name of another kind; register its class under",
        ),
        (Weighted(), TypeError, r"Weighted, given .* holds 'weights'; register its class"),
    ],
)
def test_objects_that_are_refused(manifold: geoopt.Manifold, error: type[Exception], message: str) -> None:
    before = kinds.names()
    with pytest.raises(error, match=message):
        collection(4, 4, "layer", manifold)
    assert kinds.names() == before


# -- JSON --------------------------------------------------------------------------------------------------------


def test_a_plan_with_a_manifold_of_geoopt_loads_anywhere() -> None:
    made = collection(6, 4, "pio", (geoopt.CanonicalStiefel(), "sphere"), "random", 2)
    text = made.to_json()
    kinds.unregister_kind("geoopt.CanonicalStiefel")  # as in a new process
    assert Collection.from_json(text) == made


def test_a_plan_with_a_class_of_ones_own_asks_for_it() -> None:
    made = collection(6, 4, "pio", (SpecialOrthogonal(), "sphere"))
    text = made.to_json()
    kinds.unregister_kind("special_orthogonal")
    with pytest.raises(ValueError, match=r"call fgo_geo.register_kind\('special_orthogonal', ...\) with its class"):
        Collection.from_json(text)
    fgo_geo.register_kind("special_orthogonal", SpecialOrthogonal)
    assert Collection.from_json(text) == made


# -- radii -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["bound", 0.5])
def test_a_kind_without_radius_refuses_rules_that_need_one(rule: Any) -> None:
    message = f"2.weight.*: cannot .* 'geoopt.EuclideanStiefel' have no radius, so radius={rule!r} cannot be met"
    with pytest.raises(ValueError, match=message):
        fgo_geo.constrain(network(), "layer", geoopt.EuclideanStiefel(), radius=rule)


def test_a_plan_says_that_a_kind_without_radius_is_not_scaled() -> None:
    own = geoopt.EuclideanStiefel()
    note = 'groups of geoopt.EuclideanStiefel have no radius, so radius="kaiming" leaves their scale as it is'
    for rule, kinds_of_groups, notes, radius in (
        ("kaiming", (own, "sphere"), (note,), "0.577"),
        ("kaiming", (own, "euclidean"), (note,), "none"),
        ("unit", own, (), "none"),
        ("kaiming", "sphere", (), "0.577"),
        ("kaiming", "euclidean", (), "none"),
    ):
        strategy = "po" if isinstance(kinds_of_groups, tuple) else "layer"
        plan = fgo_geo.constrain(network(), strategy, kinds_of_groups, radius=rule, include="2")
        assert plan.constrained[0].notes == notes
        row = next(line for line in str(plan).splitlines() if line.startswith("2.weight"))
        assert row.endswith(f"  {radius}")


@pytest.mark.parametrize("own", [geoopt.UpperHalf, geoopt.BoundedDomain])
def test_complex_manifolds_of_geoopt_are_refused_before_anything_changes(own: type[geoopt.Manifold]) -> None:
    model, before = network(), kinds.names()
    weight = model[2].weight
    message = r"cannot be a kind: its points are complex, and components of weights are real; use a manifold of real"
    for use in (
        lambda: fgo_geo.constrain(model, "layer", own()),
        lambda: fgo_geo.constrain(model, "layer", f"geoopt.{own.__name__}"),
        lambda: fgo_geo.register_kind("own", own),
        lambda: fgo_geo.register_kind("own", type("Own", (own,), {})),
    ):
        with pytest.raises(TypeError, match=message):
            use()
    assert model[2].weight is weight
    assert kinds.names() == before


# -- products and steps ------------------------------------------------------------------------------------------


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.Flatten(), nn.Linear(96, 8), nn.Linear(8, 4)
    )


def blocks(own: geoopt.Manifold) -> ProductOfGroups:
    """Three matrices: two of the manifold, one on an oblique manifold."""
    return ProductOfGroups(collection(6, 9, "po", (own, "oblique", own), components="block"), (6, 9))


@pytest.mark.parametrize("own", STIEFELS)
def test_operations_are_those_of_the_components(own: Any) -> None:
    manifold = blocks(own())
    cut = manifold.partition
    generator = torch.Generator().manual_seed(0)
    x = manifold.random(6, 9, dtype=torch.float64, generator=generator).as_subclass(Tensor)
    a, b = (torch.randn(6, 9, dtype=torch.float64, generator=generator) for _ in range(2))
    singles = [own() if kind.startswith("geoopt") else fgo_geo.Oblique() for kind in cut.kinds]

    def expected(method: str, *tensors: Tensor) -> list[Any]:
        split = zip(singles, *map(cut.split, tensors), strict=True)
        return [getattr(single, method)(*components) for single, *components in split]

    u, v = manifold.egrad2rgrad(x, a), manifold.proju(x, b)
    for method, arguments in {
        "projx": (a,),
        "proju": (x, a),
        "egrad2rgrad": (x, a),
        "retr": (x, u),
        "expmap": (x, u),
    }.items():
        for found, part in zip(
            cut.split(getattr(manifold, method)(*arguments)), expected(method, *arguments), strict=True
        ):
            torch.testing.assert_close(found, part, rtol=0, atol=1e-12)
    ends, carried = manifold.retr_transp(x, u, v)
    moved = expected("retr_transp", x, u, v)
    for one, other, parts in zip(cut.split(ends), cut.split(carried), moved, strict=True):
        torch.testing.assert_close(one, parts[0], rtol=0, atol=1e-12)
        torch.testing.assert_close(other, parts[1], rtol=0, atol=1e-12)
    inner = torch.cat(expected("inner", x, u, v))
    torch.testing.assert_close(manifold.group_inner(x, u, v).sort().values, inner.sort().values)
    torch.testing.assert_close(manifold.inner(x, u, v), inner.sum())
    torch.testing.assert_close(manifold.inner(x, u, v, keepdim=True), inner.sum().reshape(1, 1))
    torch.testing.assert_close(manifold.norm(x, u), manifold.inner(x, u).sqrt())


def test_violation_is_the_distance_from_the_nearest_point() -> None:
    manifold = blocks(geoopt.CanonicalStiefel())
    x = manifold.random(6, 9, dtype=torch.float64).as_subclass(Tensor)
    assert float(manifold.violation(x).max()) <= 1e-14
    torch.testing.assert_close(manifold.violation(1.25 * x).max(), torch.tensor(0.25, dtype=torch.float64))  # oblique
    part = manifold.partition.kinds.index("geoopt.CanonicalStiefel")
    own = manifold.violation(1.25 * x).split(list(manifold.partition.counts))[part]
    torch.testing.assert_close(own, torch.full_like(own, 0.2))


OPTIMIZERS = {
    "fgsgd": lambda params: RiemannianFGSGD(params, lr=0.3, momentum=0.9),
    "fgsgd exponential": lambda params: RiemannianFGSGD(params, lr=0.3, momentum=0.9, update="exponential"),
    "geoopt sgd": lambda params: geoopt.optim.RiemannianSGD(params, lr=0.05, momentum=0.9),
    "geoopt adam": lambda params: geoopt.optim.RiemannianAdam(params, lr=0.05),
}


@pytest.mark.parametrize("own", STIEFELS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_is_that_of_every_component_alone(own: Any, name: str) -> None:
    """Every block is a group, so that all optimisers treat it as a parameter of its own."""
    manifold = blocks(own())
    cut = manifold.partition
    generator = torch.Generator().manual_seed(3)
    start = manifold.random(6, 9, dtype=torch.float64, generator=generator).detach().as_subclass(Tensor)
    together = geoopt.ManifoldParameter(start.clone(), manifold=manifold)
    singles = [own() if kind.startswith("geoopt") else fgo_geo.Oblique() for kind in cut.kinds]
    alone = [
        geoopt.ManifoldParameter(component.clone(), manifold=single)
        for single, part in zip(singles, cut.split(start), strict=True)
        for component in part
    ]
    optimizers = [OPTIMIZERS[name]([together]), OPTIMIZERS[name](alone)]
    for _ in range(3):
        together.grad = torch.randn(6, 9, dtype=torch.float64, generator=generator)
        for param, grad in zip(alone, [g for part in cut.split(together.grad) for g in part], strict=True):
            param.grad = grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    found = [component for part in cut.split(together.detach()) for component in part]
    for component, param in zip(found, alone, strict=True):
        torch.testing.assert_close(component, param.detach(), rtol=0, atol=1e-10)


@pytest.mark.parametrize("components", ["auto", "filter"])
@pytest.mark.parametrize("path", ["auto", "reference"])
def test_a_model_on_special_orthogonal_kernels(components: Any, path: Any) -> None:
    model = network()
    plan = fgo_geo.constrain(model, "pio", (SpecialOrthogonal(), "sphere"), components=components)
    assert Plan.from_json(plan.to_json()).entries == plan.entries
    optimizer = RiemannianFGSGD(model.named_parameters(), lr=1e-2, momentum=0.9)
    with kernels.use_path(path):
        for seed in range(3):
            optimizer.zero_grad()
            model(torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(seed))).square().mean().backward()
            optimizer.step()
    for param in plan.parameters().values():
        cut = param.manifold.partition
        for kind, part in zip(cut.kinds, cut.split(param.detach()), strict=True):
            if kind == "special_orthogonal" and part.shape[1] == part.shape[2]:
                assert bool((torch.linalg.det(part) > 0).all())
        assert float(param.manifold.violation(param.detach()).max()) <= 1e-5
    assert "special_orthogonal" in fgo_geo.report(model).layers[1].manifolds
