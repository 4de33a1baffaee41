"""The registry of kinds, and a kind that is added the way that a user adds one, in every place that knows kinds.

The manifold laws run on the added kind as on the others: it is an entry of ``strategies.ENTRIES``.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from typing import Any

import geoopt
import matplotlib as mpl
import numpy as np
import pytest
import reference_optimizer as reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib import colors, pyplot
from own_kind import Rows, registered_rows
from parameters import normal
from torch import Tensor, nn

import fgo_geo
from fgo_geo import Collection, Plan, ProductOfGroups, RiemannianFGSGD, collection, kernels
from fgo_geo.distributed import step_cost
from fgo_geo.manifolds import ComponentManifold
from fgo_geo.weights import kind_checks, kinds
from fgo_geo.weights.components import WeightLayout, partition
from fgo_geo.weights.norms import manifold_norm_bounds, matrix_norms
from fgo_geo.weights.radius import bounding_radius, kaiming_radius

BUILT_IN = ("sphere", "oblique", "stiefel", "euclidean")
BALLS = ("ball", "spectral_ball", "spectral_sphere")


@pytest.fixture
def rows() -> Iterator[kinds.Kind]:
    with registered_rows() as record:
        yield record


# -- the registry ------------------------------------------------------------------------------------------------


def test_the_kinds_of_the_package() -> None:
    assert set(BUILT_IN) < set(kinds.names())
    assert [kinds.kind(name).code for name in BUILT_IN] == [1, 2, 3, 0]
    assert [kinds.kind(name).has_radius for name in BUILT_IN] == [True, True, True, False]
    assert [kinds.kind(name[:2].upper()).name for name in BUILT_IN] == list(BUILT_IN)
    assert [kinds.kind(name).code for name in BALLS] == [None] * 3
    for record in map(kinds.kind, BUILT_IN + BALLS):
        assert kinds.kind_of(record.manifold) is record
        assert kinds.kind_of(record.build(2.0)) is record
        assert record.build(2.0).ndim == 2
    assert fgo_geo.grouping.MANIFOLD_KINDS == BUILT_IN


def test_a_derived_class_is_not_of_the_kind() -> None:
    class Own(fgo_geo.Stiefel):
        pass

    assert kinds.kind_of(Own()) is None
    assert kinds.kind_of(torch.nn.Module) is None


def test_every_option_of_a_kind_is_an_attribute() -> None:
    for record in kinds.kinds():
        assert all(hasattr(record.build(1.0), option) for option in record.options)
    assert kinds.kind("stiefel").options == ("retraction",)


def test_a_kind_that_is_added_and_taken_out() -> None:
    before = kinds.names()
    with registered_rows() as record:
        assert kinds.names() == (*before, "rows")
        assert kinds.kind("Rows") is kinds.kind_of(Rows) is kinds.kind_of(Rows(2.0)) is record
        assert record.code is None
        assert record.has_radius
        assert record.colour not in {kinds.kind(name).colour for name in before}
    assert kinds.names() == before
    assert kinds.kind_of(Rows) is None
    with pytest.raises(ValueError, match=r"must be one of .*'euclidean'.*got 'rows'; .*fgo_geo\.register_kind"):
        kinds.kind("rows")


class OwnRows(Rows):
    """A class of a user's own, whose methods the tests below replace one by one."""


class _OnMeta(Rows):
    def __init__(self, radius: float | Tensor = 1.0) -> None:
        super().__init__(radius)
        self.register_buffer("scale", torch.ones(1, device="meta"))


FAULTS = {
    "projx, complex": (
        {"projx": lambda self, x: x + 0j},
        r"projx .* real numbers of shape \(3, 4, 3\), got numbers of type torch.complex128$",
    ),
    "projx, complex and transposed": (
        {"projx": lambda self, x: x.mT + 0j},
        r"projx .* got the shape \(3, 3, 4\) and numbers of type torch.complex128$",
    ),
    "projx, zeros": ({"projx": lambda self, x: torch.zeros_like(x)}, r"projx .* points .* largest entry 0$"),
    "projx, shape": ({"projx": lambda self, x: x.mT}, r"projx .* shape \(3, 4, 3\), got the shape \(3, 3, 4\)"),
    "projx, NaN": ({"projx": lambda self, x: x * torch.nan}, r"projx .* finite .* got 36 that are not finite"),
    "projx, off": ({"projx": lambda self, x: x}, r"projx .* points of the manifold.* violation is [\d.]+, and"),
    "proju, shape": ({"proju": lambda self, x, u: u[0]}, r"proju .* shape \(3, 4, 3\), got the shape \(4, 3\)"),
    "retr, off": ({"retr": lambda self, x, u: 2 * x}, r"retr .* points of the manifold.* violation is 1, and"),
    "retr, still": ({"retr": lambda self, x, u: x}, r"retr .* x \+ u to first order .* leaves x where it is; either"),
    "retr, back": ({"retr": lambda self, x, u: Rows.retr(self, x, -u)}, "retr .* moves x at 180 degrees to u; either"),
    "proju, normal": ({"proju": lambda self, x, u: u}, r"retr .* moves x at [67]\d degrees .* proju does not project"),
    "violation, shape": (
        {"violation": lambda self, x: Rows.violation(self, x).amax()},
        r"violation .* one number per component: the shape \(3,\) for \(3, 4, 3\), got \(\)",
    ),
}


@pytest.mark.parametrize("norms", [None, lambda rows, columns: (math.sqrt(rows), math.sqrt(rows))])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_class_whose_methods_return_something_else_is_refused_on_first_use(fault: str, norms: Any) -> None:
    methods, message = FAULTS[fault]
    fgo_geo.register_kind("own", type("Faulty", (OwnRows,), methods), norms=norms)
    model = nn.Sequential(nn.Linear(3, 4))
    before = model[0].weight.clone()
    uses = [
        lambda: fgo_geo.constrain(model, "layer", "own", radius="unit", classifier=True),
        lambda: fgo_geo.constrain(model, "layer", "own", classifier=True),
    ]
    if norms is not None:
        uses.append(lambda: fgo_geo.renormalize(model[0], manifold="own"))
    try:
        for use in uses:
            with pytest.raises(TypeError, match=message):
                use()
    finally:
        kinds.unregister_kind("own")
    assert type(model[0].weight) is nn.Parameter
    assert torch.equal(model[0].weight, before)


@pytest.mark.parametrize("bounds", [(1.9, 2.0), (2.0, 1.0)])
def test_norms_that_points_exceed_are_refused(bounds: tuple[float, float]) -> None:
    fgo_geo.register_kind("own", OwnRows, norms=lambda rows, columns: bounds)
    try:
        with pytest.raises(
            TypeError, match=r"norms .* 'own' returns .* 4 x 3, but .* Frobenius norm 2 and the spectral"
        ):
            ProductOfGroups(collection(4, 3, "layer", "own", components="block"), (4, 3))
    finally:
        kinds.unregister_kind("own")


def test_methods_are_checked_once_for_each_size(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, ...]] = []
    projx = Rows.projx
    monkeypatch.setattr(OwnRows, "projx", lambda self, x: seen.append(tuple(x.shape)) or projx(self, x), raising=False)
    record = fgo_geo.register_kind("own", OwnRows)
    try:
        for rows, columns in ((4, 3), (4, 3), (6, 3), (300, 100), (400, 200), (700, 600)):
            ProductOfGroups(collection(rows, columns, "layer", "own", components="block"), (rows, columns))
    finally:
        kinds.unregister_kind("own")
    assert seen == [(3, 4, 3), (3, 6, 3), (3, 300, 100), (3, 400, 200), (1, 700, 600)]
    assert record.checked == {shape[1:] for shape in seen}


class _IdentityProjection:
    def proju(self, x: Tensor, u: Tensor) -> Tensor:
        return u


class Within(_IdentityProjection, fgo_geo.Ball):
    """A ball whose tangent projection is the identity on the border, too."""


class WithinSpectral(_IdentityProjection, fgo_geo.SpectralBall):
    """The same for the spectral norm."""


class FewEntries(_IdentityProjection, geoopt.Euclidean):
    """Matrices whose entries below the mean absolute value are zero."""

    def projx(self, x: Tensor) -> Tensor:
        return x * (x.abs() >= x.abs().mean((-2, -1), keepdim=True))

    def retr(self, x: Tensor, u: Tensor) -> Tensor:
        return self.projx(x + u)


@pytest.mark.parametrize("size", [(1, 1), (2, 1), (2, 2), (9, 1), (9, 4), (24, 24)])
def test_valid_methods_are_not_refused_at_any_point(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    own = [
        Within(ndim=2),
        WithinSpectral(),
        FewEntries(ndim=2),
        geoopt.CanonicalStiefel(),
    ]
    units = [*(kind.build(1.0) for kind in kinds.kinds()), *own]
    for seed, dtype in itertools.product(range(3), (torch.float64, torch.float32)):
        points = normal((6, *size), seed, dtype)
        monkeypatch.setattr(kind_checks, "drawn", lambda *_, points=points: iter([points]))
        for unit in units:
            if unit._check_shape((3, *size), "x")[0]:
                kind_checks.check_methods(unit.name, unit, None, *size)


class InFloat32(fgo_geo.ScaledSphere):
    """A class that computes with a buffer of its own, in single precision only."""

    def __init__(self, radius: Any = 1.0, ndim: int = 2) -> None:
        super().__init__(radius, ndim)
        self.register_buffer("w", torch.eye(3))

    def projx(self, x: Tensor) -> Tensor:
        return super().projx(torch.einsum("ij,...jk->...ik", self.w, x))


class OfOneSize(fgo_geo.ScaledSphere):
    """A class for components of 64 rows, whose retraction has not been written."""

    def projx(self, x: Tensor) -> Tensor:
        return super().projx(x * torch.ones(64, 1))

    def retr(self, x: Tensor, u: Tensor) -> Tensor:
        raise NotImplementedError


@pytest.mark.parametrize(
    ("own", "layer"), [(InFloat32, nn.Conv2d(4, 4, 3)), (OfOneSize, nn.Linear(8, 64))], ids=["type", "size"]
)
def test_methods_are_checked_at_the_size_and_in_the_type_that_they_take(own: Any, layer: nn.Module) -> None:
    fgo_geo.register_kind("own", own)
    try:
        fgo_geo.constrain(nn.Sequential(layer), "layer", "own", classifier=True, first_layer=True)
        violation = layer.weight.manifold.violation(layer.weight)
        if own is InFloat32:  # the check goes on: the buffer does not hide a fault
            kinds.kind("own").checked.clear()
            own.retr = lambda self, x, u: 2 * x
            with pytest.raises(TypeError, match="retr of the manifold kind 'own' must return points"):
                kinds.kind("own").check_methods(3, 3)
    finally:
        kinds.unregister_kind("own")
    assert violation.max() < 1e-5


@pytest.mark.parametrize("size", [(3, 2), (100, 50), (101, 53), (271, 259)])
def test_a_measured_norm_is_that_of_256_points_of_one_draw(size: tuple[int, int]) -> None:
    class LargestEntry(OwnRows):
        def projx(self, x: Tensor) -> Tensor:
            assert x.numel() <= 2**20 or len(x) <= 16
            return x / x.abs().amax((-2, -1), keepdim=True)

        def violation(self, x: Tensor) -> Tensor:
            return x.abs().amax((-2, -1)) - 1

        def proju(self, x: Tensor, u: Tensor) -> Tensor:
            return u * (x.abs() < x.abs().amax((-2, -1), keepdim=True))

        def retr(self, x: Tensor, u: Tensor) -> Tensor:
            return self.projx(x + u)

    record = fgo_geo.register_kind("own", LargestEntry)
    try:
        measured = record.typical_norm(*size)
    finally:
        kinds.unregister_kind("own")
    x = torch.randn(256, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = (x.square().sum((-2, -1)) / x.abs().amax((-2, -1)) ** 2).mean().sqrt()
    assert measured == pytest.approx(float(expected), rel=1e-14)


def test_the_constructor_gets_ndim_if_it_takes_it() -> None:
    class Ball(fgo_geo.ScaledSphere):
        name = "Ball"

    record = fgo_geo.register_kind("own_sphere", Ball, colour="red", options=("reversible",))
    try:
        assert (record.build(3.0).radius, record.build(3.0).ndim) == (3.0, 2)
        assert (record.colour, record.options) == ("red", ("reversible",))
    finally:
        kinds.unregister_kind("own_sphere")


class _Unfinished(ComponentManifold):
    name = "Unfinished"
    ndim = 2

    def projx(self, x: Tensor) -> Tensor:
        return x


class _Nameless(Rows):
    name = None


class _Vector(Rows):
    ndim = 1


@pytest.mark.parametrize(
    ("name", "manifold", "arguments", "error", "message"),
    [
        ("sphere", Rows, {}, ValueError, r"'sphere' names the kind of ScaledSphere already; choose another"),
        ("st", Rows, {}, ValueError, r"'st' names the kind of Stiefel already"),
        ("other", fgo_geo.Oblique, {}, ValueError, r"Oblique is the class of the kind 'oblique' already; .*derived"),
        ("Rows", Rows, {}, ValueError, r"small letters, digits and underscores, got 'Rows'"),
        ("", Rows, {}, ValueError, r"small letters, digits and underscores, got ''"),
        (3, Rows, {}, ValueError, r"small letters, digits and underscores, got 3"),
        ("own", Rows(), {}, TypeError, r"'own' needs a class derived from geoopt.Manifold, got Rows"),
        ("own", nn.Linear, {}, TypeError, r"'own' needs a class derived from geoopt.Manifold, got .*Linear"),
        ("own", _Unfinished, {}, TypeError, r"_Unfinished .* lacks expmap, proju, retr, violation"),
        ("own", _Nameless, {}, TypeError, r"_Nameless .* lacks a name"),
        ("own", geoopt.Sphere, {}, TypeError, r"needs a Sphere with ndim = 2, got Sphere with ndim = 1"),
        ("own", _Vector, {}, TypeError, r"'own' needs a _Vector with ndim = 2, got _Vector with ndim = 1"),
        (
            "own",
            _OnMeta,
            {},
            TypeError,
            r"_OnMeta cannot be a kind: it holds a tensor on the meta device, which has no",
        ),
        ("own", Rows, {"build": fgo_geo.Oblique}, TypeError, r"needs a Rows with ndim = 2, got Oblique"),
        ("own", Rows, {"norms": lambda a, b: 1.0}, ValueError, r"two positive numbers.*got 1.0 for a 3 x 2"),
        ("own", Rows, {"norms": lambda a, b: (1.0, 0.0)}, ValueError, r"two positive numbers.*got \(1.0, 0.0\)"),
    ],
)
def test_what_cannot_be_a_kind(
    name: Any, manifold: Any, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    before = kinds.names()
    with pytest.raises(error, match=message):
        fgo_geo.register_kind(name, manifold, **arguments)
    assert kinds.names() == before
    assert kinds.kind_of(Rows) is None


def test_the_kinds_of_the_package_stay() -> None:
    with pytest.raises(ValueError, match="'sphere' is a kind of the package, which needs it"):
        kinds.unregister_kind("sphere")
    with pytest.raises(ValueError, match=r"must be one of .*, got 'cube'"):
        kinds.unregister_kind("cube")


# -- norms and radii ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 3), (5, 2), (4, 3)])
def test_norms_at_radius_one_are_attained_bounds(rows: kinds.Kind, shape: tuple[int, int]) -> None:
    bounds = manifold_norm_bounds("rows", *shape)
    generator = torch.Generator().manual_seed(0)
    found = matrix_norms(Rows().random(1000, *shape, dtype=torch.float64, generator=generator).as_subclass(Tensor))
    torch.testing.assert_close(found.frobenius, bounds.frobenius.expand(1000))
    equal_rows = torch.zeros(shape, dtype=torch.float64)
    equal_rows[:, 0] = 1  # attains the spectral norm
    assert all(bool((values <= bound + 1e-12).all()) for values, bound in zip(found, bounds, strict=True))
    for attained, bound in zip(matrix_norms(equal_rows), bounds, strict=True):
        torch.testing.assert_close(attained, bound)


def test_radius_rules(rows: kinds.Kind) -> None:
    assert kaiming_radius("rows", 4, 2, fan_in=32) == pytest.approx(math.sqrt(2 * 8 / (32 * 4)))
    assert bounding_radius("rows", 4, 2, count=9, bound=3.0) == pytest.approx(3 / (3 * 4))
    assert bounding_radius("rows", 4, 2, 9, 3.0, ["spectral"]) == pytest.approx(3 / (3 * 2))


def test_without_norms_kaiming_measures_and_bounds_are_refused() -> None:
    fgo_geo.register_kind("rows", Rows)
    try:
        assert kaiming_radius("rows", 4, 2, fan_in=32) == pytest.approx(math.sqrt(2 * 8 / (32 * 4)))
        with pytest.raises(
            ValueError, match=r"kind is 'rows'; expected .*bound no norm; pass norms= to register_kind\('rows'"
        ):
            manifold_norm_bounds("rows", 4, 2)
        with pytest.raises(ValueError, match=r"groups of kind 'rows' have no bounded norm; use one of \('sphere'"):
            fgo_geo.renormalize(nn.Linear(4, 4), manifold="rows")
    finally:
        kinds.unregister_kind("rows")


# -- products, plans, reports ------------------------------------------------------------------------------------

NUMBER_OF_KINDS = {"layer": 1, "pi": 2, "po": 2, "pio": 3}
LAYOUTS = {
    "kernels": ((8, 6, 3, 3), "kernel"),
    "wide kernels": ((8, 6, 2, 3), "kernel"),
    "blocks": ((16, 12), "block"),
    "blocks of kernels": ((16, 12, 3, 3), "block"),
    "filters": ((16, 12), "filter"),
    "filters of kernels": ((16, 2, 2, 2), "filter"),
}
# With "po" and half of "pio" a filter is a group of its own, whose rows have one entry.
COMBINATIONS = [(s, la) for s in NUMBER_OF_KINDS for la in LAYOUTS if "filters" not in la or s in ("layer", "pi")]
every_combination = pytest.mark.parametrize(("strategy", "layout"), COMBINATIONS)
every_strategy = pytest.mark.parametrize("strategy", NUMBER_OF_KINDS)


def product(strategy: str, layout: str, radius: Any = 0.5, selection: str = "random") -> ProductOfGroups:
    shape, components = LAYOUTS[layout]
    own = ("rows", "sphere", "oblique")[: NUMBER_OF_KINDS[strategy]]
    return ProductOfGroups(collection(*shape[:2], strategy, own, selection, 3, components=components), shape, radius)


def tangent(manifold: ProductOfGroups, x: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return manifold.proju(x, 0.2 * torch.randn(x.shape, dtype=x.dtype, generator=generator))


@every_combination
def test_a_product_is_its_components(rows: kinds.Kind, strategy: str, layout: str) -> None:
    manifold = product(strategy, layout)
    cut = manifold.partition
    generator = torch.Generator().manual_seed(0)
    x = manifold.random(cut.layout.shape, dtype=torch.float64, generator=generator).as_subclass(Tensor)
    y = manifold.expmap(x, tangent(manifold, x, 1))
    u = tangent(manifold, x, 2)
    for method, args in {"projx": (2 * x + u,), "retr": (x, u), "expmap": (x, u), "logmap": (x, y)}.items():
        split = cut.split(getattr(manifold, method)(*args))
        for part, found, *own in zip(cut.kinds, split, *map(cut.split, args), strict=True):
            single = kinds.kind(part).build(0.5)
            torch.testing.assert_close(found, getattr(single, method)(*own), rtol=0, atol=1e-12)
    part = cut.kinds.index("rows")
    lengths = cut.split(x)[part].norm(dim=-1)
    torch.testing.assert_close(lengths, torch.full_like(lengths, 0.5))
    assert manifold.violation(x).max() <= 1e-14


def test_a_component_without_room_is_refused(rows: kinds.Kind) -> None:
    with pytest.raises(ValueError, match=r"ProductOfGroups: rows cannot hold components of size \(5, 1\)"):
        ProductOfGroups(collection(8, 6, "pi", ("rows", "sphere")), (8, 6, 5))


@every_strategy
@pytest.mark.parametrize("components", ["kernel", "block", "filter"])
def test_json_round_trip(rows: kinds.Kind, strategy: str, components: str) -> None:
    own = ("sphere", "ROWS", "stiefel")[3 - NUMBER_OF_KINDS[strategy] :]
    made = collection(6, 4, strategy, own[:1] if strategy == "layer" else own, "random", 1, components=components)
    assert Collection.from_json(made.to_json()) == made


def test_json_that_names_a_kind_which_is_not_registered() -> None:
    with registered_rows():
        made = collection(6, 4, "pio", ("sphere", "rows"))
        text = made.to_json()
        plan_text = fgo_geo.constrain(nn.Sequential(nn.Conv2d(4, 8, 3)), "po", ("rows",), first_layer=True).to_json()
    message = r"names the manifold kind 'rows', which is not registered here: call fgo_geo.register_kind\('rows', ...\)"
    with pytest.raises(ValueError, match=message):
        Collection.from_json(text)
    with pytest.raises(ValueError, match=message):
        Plan.from_json(plan_text)
    with registered_rows():
        assert Collection.from_json(text) == made
        assert Plan.from_json(plan_text).constrained[0].collections[0].kinds == ("rows",)


def test_a_picture_shows_the_kind(rows: kinds.Kind) -> None:
    with mpl.rc_context({"backend": "Agg"}):
        figure, axes = pyplot.subplots()
        collection(6, 4, "pi", ("sphere", "rows")).plot(axes)
        legend = axes.get_legend()
        shown = {t.get_text(): p for t, p in zip(legend.get_texts(), legend.get_patches(), strict=True)}
        assert shown["rows"].get_facecolor() == colors.to_rgba(rows.colour)
        pyplot.close(figure)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 12, 3), nn.ReLU(), nn.Conv2d(12, 12, 3), nn.Flatten(), nn.Linear(192, 16), nn.Linear(16, 4)
    )


@every_strategy
@pytest.mark.parametrize("radius", ["kaiming", "unit", "bound", 0.3])
def test_a_model_is_constrained_trained_reported_and_freed(rows: kinds.Kind, strategy: str, radius: Any) -> None:
    model = network()
    own = ("rows", "stiefel", "euclidean")[: NUMBER_OF_KINDS[strategy]]
    plan = fgo_geo.constrain(model, strategy, own, radius=radius)
    assert [entry.name for entry in plan.constrained] == ["2.weight", "4.weight"]
    assert "rows" in str(plan)
    assert Plan.from_json(plan.to_json()).entries == plan.entries
    optimizer = RiemannianFGSGD(model.named_parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-3)
    for seed in range(3):
        optimizer.zero_grad()
        model(torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(seed))).square().mean().backward()
        optimizer.step()
    for param in plan.parameters().values():
        assert float(param.manifold.violation(param.detach()).max()) <= 1e-5
    report = fgo_geo.report(model)
    layer = next(layer for layer in report.layers if layer.name == "2.weight")
    assert f"{strategy}: " in layer.manifolds
    assert "rows" in layer.manifolds
    assert layer.violation == pytest.approx(0, abs=1e-5)
    saved = {name: value.clone() for name, value in model.state_dict().items()}
    copy = network()
    fgo_geo.constrain(copy, strategy, own, radius=radius)
    copy.load_state_dict(saved)
    before = model(torch.ones(1, 3, 8, 8))
    fgo_geo.unconstrain(model)
    torch.testing.assert_close(model(torch.ones(1, 3, 8, 8)), before)
    torch.testing.assert_close(copy(torch.ones(1, 3, 8, 8)), before)


@pytest.mark.parametrize("groups", ["layer", "po"])
def test_renormalisation(rows: kinds.Kind, groups: str) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(6, 8)
    fgo_geo.renormalize(layer, manifold="rows", groups=groups, bound=2.0)
    torch.nn.init.normal_(layer.parametrizations.weight.original, std=10.0)
    for block, record in zip(*_blocks(layer), strict=True):
        norms = matrix_norms(block)
        assert all(float(norm.max()) <= 2 * (1 + 1e-5) for norm in norms)
        assert float(norms.two_to_one.max()) == pytest.approx(2)
        lengths = block.norm(dim=-1)
        torch.testing.assert_close(lengths, lengths[:, :1].expand_as(lengths))
        assert record == "rows"
    raw = layer.parametrizations.weight.original
    layer.weight.sum().backward()
    assert bool(raw.grad.isfinite().all())
    assert float(raw.grad.norm()) > 0


def test_a_weight_of_unknown_cost_is_kept_until_its_raw_weight_changes(rows: kinds.Kind) -> None:
    layers = {word: nn.Linear(6, 8) for word in ("rows", "sphere")}
    for word, layer in layers.items():
        fgo_geo.renormalize(layer, manifold=word)
    with torch.no_grad():
        kept = {word: layer.weight.data_ptr() == layer.weight.data_ptr() for word, layer in layers.items()}
        assert kept == {"rows": True, "sphere": False}
        before = layers["rows"].weight.clone()
        layers["rows"].parametrizations.weight.original.neg_()
        torch.testing.assert_close(layers["rows"].weight, -before)


def test_owners_take_an_added_kind_for_a_dear_one(rows: kinds.Kind) -> None:
    size, sums = (64, 32), {"sphere", "oblique", "euclidean", "ball"}
    for record in map(kinds.kind, (*BUILT_IN, *BALLS, "rows")):
        assert step_cost(record.build(1.0), size) == 64 * 32 * (1 if record.name in sums else 2)


def _blocks(layer: nn.Module) -> tuple[list[Tensor], tuple[str, ...]]:
    cut = fgo_geo.models.renormalize.renormalization_of(layer).partition
    return cut.split(layer.weight.detach()), cut.kinds


# -- steps -------------------------------------------------------------------------------------------------------


def trained(
    path: Any, manifold: ProductOfGroups, dtype: torch.dtype = torch.float32, options: dict[str, Any] | None = None
) -> Tensor:
    """A weight after three steps."""
    shape = manifold.partition.layout.shape
    generator = torch.Generator().manual_seed(7)
    start = manifold.random(shape, dtype=torch.float64, generator=generator).to(dtype)
    weight = geoopt.ManifoldParameter(start.detach().as_subclass(Tensor), manifold=manifold)
    with kernels.use_path(path):
        optimizer = RiemannianFGSGD([weight], lr=0.5, **(options or {"momentum": 0.9}))
        for _ in range(3):
            weight.grad = torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype)
            optimizer.step()
    return weight.detach().as_subclass(Tensor)


@pytest.mark.parametrize(("shape", "components"), [((16, 16), "block"), ((8, 8, 3, 3), "kernel")])
def test_no_path_takes_the_kind_for_another(rows: kinds.Kind, shape: tuple[int, ...], components: str) -> None:
    """A matrix ended 0.77 off its manifold, taken for a sphere; kernels ended in an error about a tuple."""
    manifold = ProductOfGroups(collection(*shape[:2], "pio", ("rows", "sphere"), components=components), shape)
    weight = trained("auto", manifold)
    assert float(manifold.violation(weight).max()) <= 1e-6
    torch.testing.assert_close(weight, trained("reference", manifold), rtol=0, atol=1e-6)


@every_combination
@pytest.mark.parametrize("update", ["retraction", "exponential"])
def test_a_step_is_that_of_the_oracle(rows: kinds.Kind, strategy: str, layout: str, update: str) -> None:
    """One component at a time, in numpy, by the oracle of all optimisers, whose rows are its columns, transposed."""
    manifold = product(strategy, layout)
    cut = manifold.partition
    options = {"lr": 0.5, "momentum": 0.9, "update": update}
    generator = torch.Generator().manual_seed(7)
    start = manifold.random(cut.layout.shape, dtype=torch.float64, generator=generator)
    weight = geoopt.ManifoldParameter(start.detach().as_subclass(Tensor), manifold=manifold)
    optimizer = RiemannianFGSGD([weight], **options)
    expected = _oracle(manifold, weight)
    for seed in range(3):
        weight.grad = torch.randn(weight.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        optimizer.step()
        reference.step(expected, _flat(manifold, weight.grad), **options)
        np.testing.assert_allclose(_flat(manifold, weight.detach()), expected.x, rtol=1e-9, atol=1e-9)


def _flat(manifold: ProductOfGroups, x: Tensor) -> np.ndarray:
    """All components, transposed where they are of the own kind, one behind the other as rows of equal length."""
    parts = zip(manifold.partition.kinds, manifold.partition.split(x), strict=True)
    flat = [(c.mT if kind == "rows" else c).flatten(1) for kind, c in parts]
    width = max(f.shape[1] for f in flat)
    return torch.cat([nn.functional.pad(f, (0, width - f.shape[1])) for f in flat]).numpy()


class _Shaped:
    """A geometry of components ``A x B`` that are stored as rows with zeros behind them."""

    def __init__(self, single: reference.Geometry, shape: tuple[int, int]) -> None:
        self.single, self.shape = single, shape
        self.radius, self.curvature = single.radius, single.curvature

    def _call(self, name: str, x: np.ndarray, u: np.ndarray) -> np.ndarray:
        size = math.prod(self.shape)
        result = np.zeros_like(x)
        own = (t[:size].reshape(self.shape) for t in (x, u))
        result[:size] = getattr(self.single, name)(*own).ravel()
        return result

    project = functools.partialmethod(_call, "project")
    retract = functools.partialmethod(_call, "retract")
    exponential = functools.partialmethod(_call, "exponential")


def _oracle(manifold: ProductOfGroups, weight: Tensor) -> reference.Parameter:
    geometries = {"rows": reference.Oblique, "sphere": reference.Sphere, "oblique": reference.Oblique}
    cut = manifold.partition
    numbers = itertools.count()
    components = []
    for kind, groups, segments, (a, b) in zip(cut.kinds, cut.groups, cut.segments, cut.sizes, strict=True):
        shape = (b, a) if kind == "rows" else (a, b)
        for group in segments.spread(torch.from_numpy(groups)).tolist():
            components.append(((next(numbers),), _Shaped(geometries[kind](0.5), shape), group))
    return reference.Parameter(_flat(manifold, weight.detach()), components)


@settings(max_examples=25)
@given(
    combination=st.sampled_from(COMBINATIONS),
    selection=st.sampled_from(["random", "deterministic"]),
    radius=st.sampled_from([1.0, 0.05, {"rows": 2.0, "sphere": 0.3, "oblique": 1.0}]),
    momentum=st.sampled_from([0.0, 0.9]),
)
def test_every_path_takes_the_step_of_the_reference(
    combination: tuple[str, str], selection: str, radius: Any, momentum: float
) -> None:
    with registered_rows():
        manifold = product(*combination, radius, selection)
        weight = trained("auto", manifold, options={"momentum": momentum})
        assert float(manifold.violation(weight).max()) <= 1e-5
        exact = trained("reference", manifold, torch.float64, {"momentum": momentum})
        scale = manifold.radius_map(weight)
        assert float(((weight.double() - exact) / scale).abs().max()) <= 1e-4


def test_derived_classes_take_no_path_of_their_base() -> None:
    """A subclass of Stiefel with another retraction, in matrices that are large enough for the shared products."""

    class Own(fgo_geo.Stiefel):
        calls = 0

        def retract_bounded(self, x: Tensor, u: Tensor, bound: float | None, scale: float = 1.0) -> Tensor:
            Own.calls += 1
            return super().retract_bounded(x, u, bound, scale)

    weight = geoopt.ManifoldParameter(Own().random(256, 128).detach().as_subclass(Tensor), manifold=Own())
    weight.grad = torch.randn(256, 128)
    RiemannianFGSGD([weight], lr=0.1, momentum=0.9).step()
    assert Own.calls == 1


def test_parts_know_the_partition(rows: kinds.Kind) -> None:
    cut = partition([collection(8, 6, "pi", ("rows", "sphere"))], WeightLayout((8, 6, 3, 3)))
    assert set(cut.kinds) == {"rows", "sphere"}


# -- errors in methods of a class, during a step -----------------------------------------------------------------------


def _boom(*_: Any) -> Any:
    raise KeyError("boom")


@pytest.mark.parametrize(
    ("method", "fault", "message"),
    [
        ("retr", _boom, "KeyError: 'boom'"),
        ("egrad2rgrad", _boom, "KeyError: 'boom'"),
        ("retr", lambda self, x, u: x * torch.nan, "ValueError: retr returned numbers that are not finite"),
        (
            "retr",
            lambda self, x, u: torch.full_like(x, torch.inf),
            "ValueError: retr returned numbers that are not fin",
        ),
        ("retr", lambda self, x, u: x[0], r"ValueError: retr returned the shape \(4, 3\), expected \(1, 4, 3\)"),
        ("egrad2rgrad", lambda self, x, u: u[0], r"ValueError: egrad2rgrad returned the shape \(4, 3\), expected"),
    ],
)
def test_an_error_in_a_step_names_the_class_and_the_weight(method: str, fault: Any, message: str) -> None:
    own = type("Faulty", (OwnRows,), {})
    fgo_geo.register_kind("own", own)
    try:
        model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3))
        fgo_geo.constrain(model, "layer", "own", radius="unit", include="0.weight")
        before = [param.detach().clone() for param in model.parameters()]
        optimizer = fgo_geo.RiemannianFGSGD(model.parameters(), lr=0.1)
        model(torch.ones(2, 3)).square().sum().backward()
        setattr(own, method, fault)
        with pytest.raises(
            RuntimeError, match=rf"step of '0.weight', param_groups.* on Faulty manifolds \(kind 'own'\) .*{message}"
        ):
            optimizer.step()
    finally:
        kinds.unregister_kind("own")
    assert all(map(torch.equal, before, model.parameters()))


def test_constrain_names_the_kind_and_the_weight_that_it_cannot_project() -> None:
    fgo_geo.register_kind("own", type("Faulty", (OwnRows,), {"projx": _boom}))
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3))
    try:
        with pytest.raises(RuntimeError, match=r"constrain: '0.weight' cannot be moved .* kind own: KeyError: 'boom'$"):
            fgo_geo.constrain(model, "layer", "own", radius="unit", classifier=True)
    finally:
        kinds.unregister_kind("own")
    assert not any(isinstance(param, geoopt.ManifoldParameter) for param in model.parameters())


def test_an_error_of_the_package_is_not_blamed_on_the_kind_of_a_user_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    fgo_geo.register_kind("own", OwnRows)
    monkeypatch.setattr(fgo_geo.Stiefel, "projx_and_range", _boom)
    try:
        with pytest.raises(
            RuntimeError, match=r"cannot be moved to manifolds of kind (stiefel, own|own, stiefel): Key"
        ):
            fgo_geo.constrain(nn.Sequential(nn.Conv2d(4, 4, 5), nn.Conv2d(4, 4, 5)), "po", ("stiefel", "own"))
    finally:
        kinds.unregister_kind("own")


def _full(*_: Any) -> Any:
    raise torch.OutOfMemoryError("full")


def test_lack_of_memory_keeps_its_type() -> None:
    weight = geoopt.ManifoldParameter(OwnRows().projx(normal((4, 3), 0)), manifold=OwnRows())
    weight.grad = torch.ones_like(weight)
    weight.manifold.retr = _full
    with pytest.raises(torch.OutOfMemoryError, match=r"^full$"):
        fgo_geo.RiemannianFGSGD([weight], lr=0.1).step()
    fgo_geo.register_kind("own", type("Faulty", (OwnRows,), {"projx": _full}))
    try:
        with pytest.raises(torch.OutOfMemoryError, match=r"^full$"):
            fgo_geo.constrain(nn.Sequential(nn.Linear(3, 4)), "layer", "own", radius="unit", classifier=True)
    finally:
        kinds.unregister_kind("own")


@pytest.mark.parametrize("update", ["retraction", "exponential"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_an_error_in_a_step_names_the_weight_as_the_optimiser_does_and_the_method(update: Any, momentum: float) -> None:
    method = ("retr" if update == "retraction" else "expmap") + "_transp" * (momentum > 0)
    sphere = geoopt.Sphere()
    weight = geoopt.ManifoldParameter(sphere.projx(normal((6, 4), 0)), manifold=sphere)
    original = getattr(sphere, method)

    def faulty(*args: Any) -> Any:
        found = original(*args)
        return found * torch.nan if isinstance(found, Tensor) else (found[0] * torch.nan, *found[1:])

    setattr(sphere, method, faulty)
    optimizer = fgo_geo.RiemannianFGSGD([("w", weight)], lr=0.1, momentum=momentum, update=update)
    weight.grad = normal((6, 4), 1)
    with pytest.raises(RuntimeError, match=rf"^the step of 'w', param_groups.* ValueError: {method} returned numbers"):
        optimizer.step()


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_without_the_check_a_weight_that_is_not_finite_is_left_out_on_manifolds_of_geoopt(momentum: float) -> None:
    sphere = geoopt.Sphere()
    weights = [geoopt.ManifoldParameter(sphere.projx(normal((6, 4), k)), manifold=sphere) for k in range(2)]
    with torch.no_grad():
        weights[0][0] = torch.nan
    before = [weight.detach().clone() for weight in weights]
    optimizer = fgo_geo.RiemannianFGSGD(weights, lr=0.1, check_finite=False, momentum=momentum)
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert optimizer.skipped_groups() == 1
    torch.testing.assert_close(weights[0].detach()[1:], before[0][1:])
    assert not torch.equal(weights[1], before[1])


def test_errors_of_weights_without_a_name_and_of_classes_without_a_kind() -> None:
    weights = [geoopt.ManifoldParameter(OwnRows().projx(normal((4, 3), seed)), manifold=OwnRows()) for seed in (0, 1)]
    optimizer = fgo_geo.RiemannianFGSGD(weights, lr=0.1)
    for weight in weights:
        weight.grad = torch.ones_like(weight)
        weight.manifold.inner = _boom
    with pytest.raises(
        RuntimeError,
        match=r"step of param_groups\[0\]\['params'\]\[0\] of shape \(4, 3\) on OwnRows manifolds failed: KeyError",
    ):
        optimizer.step()


def test_a_gradient_that_is_not_finite_is_not_blamed_on_the_class() -> None:
    weight = geoopt.ManifoldParameter(OwnRows().projx(normal((4, 3), 0)), manifold=OwnRows())
    weight.grad = torch.full_like(weight, torch.nan)
    with pytest.raises(FloatingPointError, match=r"the gradient of .* is not finite"):
        fgo_geo.RiemannianFGSGD([weight], lr=0.1).step()
