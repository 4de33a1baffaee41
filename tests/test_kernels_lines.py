"""The fused step on lines: spheres and oblique manifolds of any size, against the batched torch code."""

from __future__ import annotations

import copy
import itertools
import logging
from typing import Any

import geoopt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_kernels import TOLERANCE, as_parameter, assert_close, built, option_sets, trained
from torch import Tensor, nn
from versions import TRACES_PARAMETERS

from fgo_geo import Oblique, ProductOfGroups, RiemannianFGSGD, ScaledSphere, Stiefel, constrain, kernels
from fgo_geo.grouping import collection
from fgo_geo.paths.native import kernels as cpu
from fgo_geo.paths.native import lines
from fgo_geo.weights.components import WeightLayout

CLOSE = TOLERANCE[torch.float32]


def declared(manifold: Any, *shape: int, dims: tuple[int, ...] | None = None, dtype: Any = torch.float32) -> Any:
    """A random point, stored with its dimensions in the given order, the first the slowest."""
    point = manifold.random(*shape, dtype=dtype, generator=torch.Generator().manual_seed(0)).as_subclass(Tensor)
    if dims is not None:
        point = point.permute(dims).contiguous().permute([dims.index(d) for d in range(len(dims))])
    return as_parameter(point, manifold)


def taken(*weights: Tensor) -> list[bool]:
    return [lines.task_of(w, w.manifold, None) is not None for w in weights]  # pyright: ignore


def in_double(weight: Any) -> Any:
    """The same weight in double precision, which the batched code takes, under manifolds of its own."""
    return as_parameter(weight.detach().as_subclass(Tensor).double(), copy.deepcopy(weight.manifold))


def assert_is_the_batched_step(weights: list[Any], scale: float, **options: Any) -> None:
    fused = trained("auto", weights, 3, scale, **options)
    assert_close(fused, trained("reference", [in_double(w) for w in weights], 3, scale, **options), CLOSE)
    for weight, after in zip(weights, fused["weights"], strict=True):
        assert after.stride() == weight.stride()
        assert float(weight.manifold.violation(after).max()) <= 5e-7


def radius_of(draw: Any, *batch: int) -> Any:
    per_component = 0.5 + torch.rand(batch, generator=torch.Generator().manual_seed(3))
    return draw(st.sampled_from([1.0, 0.7, *([per_component] if batch else [])]))


scales = st.sampled_from([0.0, 1e-3, 0.1, 1.0, 1e3])


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
    assert_is_the_batched_step([weight], scale, **options)


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
    assert_is_the_batched_step([weight], scale, **options)


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
    assert_is_the_batched_step([weight], scale, **options)


KINDS = ("sphere", "oblique", "stiefel", "euclidean")


def many_weights() -> list[Any]:
    """Runs and columns, long and short, with one radius and several."""
    return [
        declared(ScaledSphere(2.0), 100_003),
        declared(ScaledSphere(torch.linspace(0.5, 2, 57)), 57, 33),
        declared(Oblique(), 300, 521),
        declared(Oblique(0.5), 300, 37, dims=(1, 0)),
        declared(Oblique(torch.tensor([0.5, 1.5, 1.0])), 3, 64, 70),
        declared(ScaledSphere(ndim=3), 19, 4, 9, 5, dims=(0, 2, 3, 1)),
        declared(dealt((90, 70), "pio", ("sphere", "oblique", "euclidean")), 90, 70),
    ]


def dealt(shape: tuple[int, ...], strategy: str, kinds: tuple[str, ...], selection: str = "random") -> ProductOfGroups:
    return ProductOfGroups(collection(*shape[:2], strategy, kinds, selection, 0, components="block"), shape)


@built
@pytest.mark.parametrize("threads", [1, 2, 3, 7, 64])
def test_every_number_of_threads_gives_the_same_step(threads: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cpu, "_PER_THREAD", 64)
    weights = many_weights()
    assert all(taken(*weights))
    expected = trained("reference", [in_double(w) for w in weights], 3, 0.3, momentum=0.9)
    before = torch.get_num_threads()
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
def test_two_sweeps_take_all_weights_of_a_network(monkeypatch: pytest.MonkeyPatch):
    called: list[tuple[str, int]] = []
    run = lines._Call.run
    monkeypatch.setattr(
        lines._Call, "run", lambda call, name: (called.append((name, len(call._tasks))), run(call, name))[1]
    )
    model = nn.Sequential(nn.Linear(40, 30), nn.MultiheadAttention(32, 4), nn.Conv2d(64, 32, 1), nn.Conv2d(32, 64, 1))
    constrain(model, strategy="layer", manifolds="oblique", components="block", first_layer=True)
    weights = [p for p in model.parameters() if isinstance(p, geoopt.ManifoldParameter)]
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    RiemannianFGSGD(weights, lr=0.1, momentum=0.9).step()
    assert called == [("fgo_line_norms", 4), ("fgo_line_update", 4)]


class OwnSphere(ScaledSphere):
    """Whoever overrides a method wants it to be called."""


STIEFEL = ProductOfGroups(collection(40, 30, "po", ("stiefel",) * 2, components="block"), (40, 30))
DEALT = ProductOfGroups(collection(40, 30, "po", ("sphere", "stiefel"), components="block"), (40, 30))
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
        declared(DEALT, 40, 30, dims=(1, 0)),
        declared(DEALT, 40, 30, dtype=torch.float64),
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
    assert_close(trained("auto", [weight], 2, 0.3, momentum=0.9), expected, 0.0)


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
@pytest.mark.parametrize("stretch", [1e-3, 0.9, 1.1, 30.0])
def test_a_point_off_its_manifold_is_brought_back(stretch: float):
    for weight in many_weights():
        optimizer = RiemannianFGSGD([weight], lr=0.1, momentum=0.9)
        weight.data.mul_(stretch)  # what no optimiser does
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
        declared(dealt((2 * length, 3 * length), "pio", ("oblique", "sphere")), 2 * length, 3 * length),
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
    task = lines.task_of(weight, manifold, None)
    assert task is not None
    squared = lines.squared_norms(
        kernels.Batch(lines, [task], kernels.StepOptions(0.1, 0.0, 0.0, False, 0.0, False, False))
    )
    assert squared.shape == (300,)
    assert float(squared.min()) >= 0
    assert float(squared.max()) <= 1e-13


@built
def test_weight_decay_that_is_short_beside_rounding_is_not_lost():
    manifold = dealt((64, 64), "po", ("sphere", "euclidean"))
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
def test_a_gradient_whose_square_overflows_is_refused():
    for weight in many_weights():
        weight.grad = torch.full_like(weight.detach(), 1e25)
        with pytest.raises(FloatingPointError, match="its squared norm overflows"):
            RiemannianFGSGD([weight], lr=0.1).step()


@built
def test_a_gradient_that_stands_for_its_negative():
    weight = declared(ScaledSphere(), 3, 40)
    results: list[Tensor] = []
    for path in ("auto", "reference"):
        own = copy.deepcopy(weight)
        own.grad = torch._neg_view(torch.linspace(-1, 1, 120).reshape(3, 40))
        with kernels.use_path(path):  # pyright: ignore
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
            names = {"fgo_abi", *cpu._FUNCTIONS} - {lacks}
            self.__dict__ |= dict.fromkeys(names, lambda: cpu._ABI - (lacks == "the version"))

    monkeypatch.setattr(cpu.Path, "glob", lambda path, pattern: [path / "libfgo_geo.so"])
    monkeypatch.setattr(cpu.ctypes, "CDLL", Loaded)
    assert cpu.library.__wrapped__() is None


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
    task = lines.task_of(weight, manifold, None)
    assert task is not None
    options = kernels.StepOptions(0.1, 0.0, 0.0, False, 0.0, False, False)
    squared = lines.squared_norms(kernels.Batch(lines, [task], options))
    torch.testing.assert_close(squared[0], (grad - along * point).square().sum(), rtol=1e-5, atol=4e-14 * normal**2)


@built
def test_ten_thousand_steps_do_not_drift():
    weights = [declared(Oblique(), 32, 20), declared(ScaledSphere(3.0), 8, 32)]
    after = trained("auto", weights, 10_000, 0.1, momentum=0.9)
    for weight, point in zip(weights, after["weights"], strict=True):
        assert float(weight.manifold.violation(point).max()) <= 5e-7
    for weight, point, momentum in zip(weights, after["weights"], after["momentum"], strict=True):
        normal = momentum - weight.manifold.proju(point, momentum)
        assert float(normal.norm()) <= 0.5 * float(momentum.norm())  # tangent at the point before


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


def test_without_the_extension_everything_works_and_it_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(lines, "library", lambda: None)
    monkeypatch.setattr(kernels, "_said", set())
    weight = declared(ScaledSphere(), 3, 40)
    expected = trained("reference", [weight], 2, 0.3, momentum=0.9)
    with caplog.at_level(logging.WARNING, "fgo_geo"):
        actual = trained("auto", [weight], 2, 0.3, momentum=0.9)
    assert_close(actual, expected, 0.0)
    assert [r.getMessage() for r in caplog.records] == [f"step by the batched torch code: {cpu.NOT_BUILT}"]


@built
def test_the_active_path_is_said_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    monkeypatch.setattr(kernels, "_said", set())
    with caplog.at_level(logging.INFO, "fgo_geo"):
        trained("auto", [declared(ScaledSphere(), 3, 40)], 3, 0.3)
    assert [r.getMessage() for r in caplog.records] == [f"fused step: {lines.description()}"]


@built
def test_torch_compile_takes_the_same_step():
    weights = [declared(ScaledSphere(2.0), 6, 40), declared(Oblique(), 40, 24)]
    own = [copy.deepcopy(w) for w in weights]
    optimizers = [RiemannianFGSGD(ws, lr=0.1, momentum=0.9) for ws in (weights, own)]
    torch.compiler.reset()
    steps = [optimizers[0].step, torch.compile(optimizers[1].step, fullgraph=TRACES_PARAMETERS)]
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        for one, other in zip(weights, own, strict=True):
            one.grad = torch.randn(one.shape, generator=generator)
            other.grad = one.grad.clone()
        for step in steps:
            step()
    for one, other in itertools.zip_longest(weights, own):
        torch.testing.assert_close(one.detach(), other.detach(), rtol=0, atol=CLOSE)
