"""The compiled sweeps over lines: spheres and oblique manifolds of any size, against the batched torch code."""

from __future__ import annotations

import copy
from typing import Any

import geoopt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from path_helpers import (
    CLOSE,
    as_parameter,
    assert_close,
    assert_is_the_step_in_double,
    built,
    declared,
    in_double,
    many_weights,
    option_sets,
    scales,
    sweeps_of,
    takes,
    trained,
)
from torch import Tensor, nn

from fgo_geo import Oblique, ProductOfGroups, RiemannianFGSGD, ScaledSphere, Stiefel, constrain, kernels
from fgo_geo.grouping import collection
from fgo_geo.paths.native import library
from fgo_geo.paths.native.lines import NativeLines
from fgo_geo.paths.native.stiefel import NativeStiefel
from fgo_geo.weights.components import WeightLayout


def taken(*weights: Any) -> list[bool]:
    return takes(NativeLines(), *weights)


def radius_of(draw: Any, *batch: int) -> Any:
    per_component = 0.5 + torch.rand(batch, generator=torch.Generator().manual_seed(3))
    return draw(st.sampled_from([1.0, 0.7, *([per_component] if batch else [])]))


@built
@given(data=st.data(), scale=scales, options=option_sets)
def test_a_sphere_is_the_batched_step(data: st.DataObject, scale: float, options: dict[str, Any]):
    draw = data.draw
    ndim, n_batch = draw(st.integers(1, 4)), draw(st.integers(0, 2))
    batch = tuple(draw(st.lists(st.integers(1, 6), min_size=n_batch, max_size=n_batch)))
    sizes = [draw(st.integers(1, 5)) for _ in range(ndim - 1)]
    shape = (*batch, *draw(st.permutations([*sizes, draw(st.integers(4, 90))])))
    inside = draw(st.permutations(range(n_batch, n_batch + ndim)))
    weight = declared(ScaledSphere(radius_of(draw, *batch), ndim), *shape, dims=(*range(n_batch), *inside))
    if weight.ndim != 4 or ndim != 2:  # or they are kernels
        assert taken(weight) == [True]
    assert_is_the_step_in_double([weight], scale, **options)


@built
@given(data=st.data(), scale=scales, options=option_sets)
def test_an_oblique_manifold_is_the_batched_step(data: st.DataObject, scale: float, options: dict[str, Any]):
    draw = data.draw
    batch = tuple(draw(st.lists(st.integers(1, 4), max_size=1)))
    shape = (*batch, draw(st.integers(4, 70)), draw(st.integers(1, 70)))
    *first, row, column = range(len(shape))
    dims = draw(st.sampled_from([(*first, row, column), (*first, column, row)]))
    weight = declared(Oblique(radius_of(draw, *batch)), *shape, dims=dims)
    assert taken(weight) == [True]
    assert_is_the_step_in_double([weight], scale, **options)


@built
@given(data=st.data(), scale=scales, options=option_sets)
def test_a_matrix_of_a_layer_is_the_batched_step(data: st.DataObject, scale: float, options: dict[str, Any]):
    draw = data.draw
    kind = draw(st.sampled_from(["sphere", "oblique"]))
    strategy = draw(st.sampled_from(["layer", "po"]))
    sections = draw(st.sampled_from([1, 3]))
    n_groups = 1 if strategy == "layer" else draw(st.integers(1, 3))
    rows, columns = n_groups * draw(st.integers(6, 24)), draw(st.integers(16, 50))
    kernel = draw(st.sampled_from([(), (1, 1), (3, 3)]))
    shape = (sections * rows, columns, *kernel)
    groups = [collection(rows, columns, strategy, (kind,) * n_groups, components="block")] * sections
    radius = draw(st.sampled_from([0.7, 0.5 + torch.rand(sections * n_groups)]))
    weight = declared(ProductOfGroups(groups, WeightLayout(shape, sections=sections), radius), *shape)
    assert taken(weight) == [True]
    assert_is_the_step_in_double([weight], scale, **options)


@built
def test_every_number_of_threads_gives_the_same_step():
    """The first weight alone has work for seven threads."""
    weights = [declared(ScaledSphere(2.0), 7 * 2**16), *many_weights()]
    assert all(taken(*weights))
    expected = trained("reference", [in_double(w) for w in weights], 3, 0.3, momentum=0.9)
    before = torch.get_num_threads()
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        try:
            actual = [trained("auto", weights, 3, 0.3, momentum=0.9) for _ in range(2)]
        finally:
            torch.set_num_threads(before)
        assert_close(actual[0], expected, CLOSE)
        for name, tensors in actual[0].items():  # the order of the sums does not depend on timing
            for one, other in zip(tensors, actual[1][name], strict=True):
                torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_a_closed_form():
    """A unit gradient at a right angle to the point, on the unit sphere, is divided by τ = 3."""
    point = torch.zeros(16)
    point[0] = 1
    weight = as_parameter(point, ScaledSphere())
    weight.grad = torch.zeros(16)
    weight.grad[0], weight.grad[1] = 5.0, -1.0
    optimizer = RiemannianFGSGD([weight], lr=1.0)
    optimizer.step()
    assert optimizer.step_scales()[weight].tolist() == [3.0]
    expected = torch.tensor([3.0, 1.0]) / 10**0.5
    torch.testing.assert_close(weight.detach().as_subclass(Tensor)[:2], expected, rtol=1e-6, atol=0)


@built
def test_two_sweeps_take_all_weights_of_a_network():
    model = nn.Sequential(nn.Linear(40, 30), nn.MultiheadAttention(32, 4), nn.Conv2d(64, 32, 1), nn.Conv2d(32, 64, 1))
    constrain(model, strategy="layer", manifolds="oblique", components="block", first_layer=True)
    weights = [p for p in model.parameters() if isinstance(p, geoopt.ManifoldParameter)]
    assert taken(*weights) == [True] * len(weights)
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer = RiemannianFGSGD(weights, lr=0.1, momentum=0.9)
    assert sweeps_of(optimizer.step) == {"fgo_line_norms": 1, "fgo_line_update": 1}


class OwnSphere(ScaledSphere):
    """Whoever overrides a method wants it to be called."""


STIEFEL = ProductOfGroups(collection(40, 30, "po", ("stiefel",) * 2, components="block"), (40, 30))
BLOCKS = ProductOfGroups(collection(40, 30, "po", ("sphere", "stiefel"), components="block"), (40, 30))
TRANSPOSED = ProductOfGroups(
    collection(30, 40, "po", ("sphere", "stiefel"), components="block"), WeightLayout((40, 30, 1, 1), "transposed")
)


@pytest.mark.parametrize(
    "weight",
    [
        declared(ScaledSphere(), 40, 3),
        declared(Oblique(), 3, 40),
        declared(OwnSphere(), 40, 30),
        declared(Stiefel(), 40, 30),
        declared(STIEFEL, 40, 30),
        declared(BLOCKS, 40, 30, dims=(1, 0)),
        declared(BLOCKS, 40, 30, dtype=torch.float64),
        declared(TRANSPOSED, 40, 30, 1, 1, dims=(0, 1, 2, 3)),
        declared(ScaledSphere(), 40, 30, dtype=torch.float64),
        declared(ScaledSphere(), 20, 30, dims=(1, 0)),
        declared(ScaledSphere(ndim=2), 4, 20, 30, dims=(1, 0, 2)),
        declared(Oblique(), 4, 20, 30, dims=(1, 0, 2)),
    ],
    ids=lambda weight: f"{weight.manifold}, {tuple(weight.shape)}, {weight.dtype}, {weight.stride()}",
)
def test_what_consists_of_no_lines_takes_the_batched_step(weight: Any):
    assert taken(weight) == [False]
    expected = trained("reference", [weight], 2, 0.3, momentum=0.9)
    is_native = takes(NativeStiefel(), weight) == [True]
    assert_close(trained("auto", [weight], 2, 0.3, momentum=0.9), expected, CLOSE if is_native else 0.0)


def test_numbers_with_room_between_them_are_no_lines():
    weight = declared(ScaledSphere(), 20, 32)
    weight.data = torch.stack([weight.data, weight.data], -1)[..., 0]
    assert taken(weight) == [False]


@built
@pytest.mark.parametrize("check_finite", [None, False])
@pytest.mark.parametrize("make", many_weights(), ids=lambda weight: str(tuple(weight.shape)))
def test_a_gradient_that_is_not_finite(make: Any, check_finite: bool | None):
    """It is refused before anything has changed, or left out, while the momentum goes on."""
    results: list[Tensor] = []
    for path in ("auto", "reference"):
        weight = copy.deepcopy(make)
        optimizer = RiemannianFGSGD([("own", weight)], lr=0.1, momentum=0.9, check_finite=check_finite)
        with kernels.use_path(path):
            for step in range(3):
                weight.grad = torch.full_like(weight.detach(), 0.1 * (step + 1))
                if step == 1:
                    weight.grad[(-1,) * weight.ndim] = float("nan")
                    if check_finite is None:
                        before = weight.detach().clone(), optimizer.state[weight]["momentum_buffer"].clone()
                        with pytest.raises(FloatingPointError, match=r"the gradient of 'own'.*no parameter"):
                            optimizer.step()
                        after = weight.detach(), optimizer.state[weight]["momentum_buffer"]
                        assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
                        continue
                optimizer.step()
        assert optimizer.skipped_groups() == (0 if check_finite is None else 1)
        results.append(weight.detach())
    torch.testing.assert_close(*results, rtol=0, atol=CLOSE)


@built
def test_a_gradient_that_stands_for_its_negative():
    weight = declared(ScaledSphere(), 3, 40)
    results: list[Tensor] = []
    for path in ("auto", "reference"):
        own = copy.deepcopy(weight)
        own.grad = torch._neg_view(torch.linspace(-1, 1, 120).reshape(3, 40))
        with kernels.use_path(path):
            RiemannianFGSGD([own], lr=0.1).step()
        results.append(own.detach())
    torch.testing.assert_close(*results, rtol=0, atol=CLOSE)


@built
def test_radii_from_inference_mode():
    with torch.inference_mode():
        radius = torch.tensor([1.0, 2.0])
        sphere = ScaledSphere(radius)
    weight = declared(ScaledSphere(torch.tensor([1.0, 2.0])), 2, 40)
    weight.manifold = sphere
    weight.grad = torch.ones_like(weight)
    RiemannianFGSGD([weight], lr=0.1).step()
    torch.testing.assert_close(weight.detach().norm(dim=1), torch.tensor([1.0, 2.0]))


@pytest.mark.parametrize("lacks", ["fgo_abi", "fgo_take", "the version"])
def test_an_extension_of_another_version_is_left_alone(lacks: str, monkeypatch: pytest.MonkeyPatch):
    class Loaded:
        def __init__(self, path: str) -> None:
            names = {"fgo_abi", *library._FUNCTIONS} - {lacks}
            self.__dict__ |= dict.fromkeys(names, lambda: library._ABI - (lacks == "the version"))

    monkeypatch.setattr(library.Path, "glob", lambda path, pattern: [path / "libfgo_geo.so"])
    monkeypatch.setattr(library.ctypes, "CDLL", Loaded)
    assert library.library.__wrapped__() is None


@built
def test_gradient_and_momentum_in_another_memory_format():
    weight = declared(Oblique(), 40, 30)
    results: list[Tensor] = []
    for path in ("auto", "reference"):
        own = copy.deepcopy(weight)
        optimizer = RiemannianFGSGD([own], lr=0.1, momentum=0.9)
        generator = torch.Generator().manual_seed(1)
        with kernels.use_path(path):
            for _ in range(3):
                own.grad = torch.randn(30, 40, generator=generator).mT
                optimizer.step()
                state = optimizer.state[own]
                state["momentum_buffer"] = state["momentum_buffer"].mT.contiguous().mT
        results.append(own.detach())
    torch.testing.assert_close(*results, rtol=0, atol=CLOSE)


@built
def test_paths_can_change_between_steps_and_with_a_checkpoint():
    weight = declared(Oblique(1.5), 40, 30)
    expected = trained("reference", [weight], 4, 0.3, momentum=0.9)["weights"][0]
    own = copy.deepcopy(weight)
    optimizer = RiemannianFGSGD([own], lr=0.1, momentum=0.9)
    generator = torch.Generator().manual_seed(1)
    for path in ("fused", "reference", "auto", "auto"):
        own.grad = (0.3 * torch.randn(own.shape, dtype=torch.float64, generator=generator)).float()
        fresh = RiemannianFGSGD([own], lr=0.1, momentum=0.9)
        fresh.load_state_dict(optimizer.state_dict())
        optimizer = fresh
        with kernels.use_path(path):
            optimizer.step()
    torch.testing.assert_close(own.detach(), expected, rtol=0, atol=CLOSE)


@built
@pytest.mark.parametrize("radius", [2.0, torch.tensor([2.0, 3.0])])
def test_new_radii_are_seen(radius: Any):
    sphere = ScaledSphere(1.0 if isinstance(radius, float) else torch.ones(2))
    product = ProductOfGroups(collection(2, 40, "po", ("sphere",) * 2, components="block"), (2, 40))
    weights = [declared(sphere, 2, 40), declared(product, 2, 40)]
    optimizer = RiemannianFGSGD(weights, lr=0.1, momentum=0.9)
    for number in range(2):
        for weight in weights:
            weight.grad = torch.ones_like(weight)
        optimizer.step()
        if number == 0:
            if isinstance(radius, float):
                sphere.radius = radius
            else:
                sphere.radius.copy_(radius)  # in place
            product.set_radius(radius)
    for weight in weights:
        torch.testing.assert_close(weight.detach().norm(dim=1), torch.ones(2) * radius)


@built
def test_autograd_notices_that_the_weight_has_changed():
    weight = declared(ScaledSphere(), 3, 40)
    loss = weight.square().sum()
    weight.grad = torch.ones_like(weight)
    RiemannianFGSGD([weight], lr=0.1).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
