"""The fused paths against the batched torch code: the same map, and the same promises."""

from __future__ import annotations

import copy
import gc
import logging
import pickle
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import geoopt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from versions import TRACES_PARAMETERS

from fgo_geo import ProductOfGroups, RiemannianFGSGD, ScaledSphere, Stiefel, constrain, kernels
from fgo_geo.grouping import collection
from fgo_geo.paths.native import kernels as cpu
from fgo_geo.paths.task import KINDS
from fgo_geo.weights.components import WeightLayout

built = pytest.mark.skipif(cpu.library() is None, reason="the extension was not built: there is no C++ compiler")

INSTRUCTION_SETS = range(1 if cpu.library() is None else cpu._instruction_set() + 1)
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-13}
FORMATS = {2: [torch.contiguous_format], 3: [torch.contiguous_format]}
FORMATS |= {4: [torch.contiguous_format, torch.channels_last], 5: [torch.contiguous_format, torch.channels_last_3d]}


@contextmanager
def limited_to(instruction_set: int) -> Iterator[None]:
    before = cpu._instruction_set()
    assert cpu._instruction_set(instruction_set) == instruction_set
    try:
        yield
    finally:
        cpu._instruction_set(before)


def weight_on(manifold: ProductOfGroups, dtype: torch.dtype, memory_format: Any, seed: int) -> Any:
    shape = manifold.layout.shape
    point = manifold.random(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))
    return as_parameter(point.as_subclass(Tensor).to(memory_format=memory_format), manifold)


def as_parameter(point: Tensor, manifold: ProductOfGroups) -> Any:
    build: Any = geoopt.ManifoldParameter  # its constructor has no usable annotation
    return build(point, manifold=manifold)


def trained(path: Any, weights: Sequence[nn.Parameter], steps: int, scale: float, **options: Any) -> dict[str, Any]:
    """Weights, momentum and step scales after some steps along a path."""
    weights = [copy.deepcopy(w) for w in weights]
    optimizer = RiemannianFGSGD(weights, **{"lr": 0.1, **options})
    generator = torch.Generator().manual_seed(1)
    with kernels.use_path(path):
        for _ in range(steps):
            for weight in weights:
                grad = torch.randn(weight.shape, dtype=torch.float64, generator=generator)
                weight.grad = torch.empty_like(weight).copy_(scale * grad)
            optimizer.step()
    scales = optimizer.step_scales()
    return {
        "weights": [w.detach() for w in weights],
        "momentum": [optimizer.state[w]["momentum_buffer"] for w in weights if options.get("momentum")],
        "scales": [scales[w] for w in weights],
    }


def assert_close(actual: dict[str, list[Tensor]], expected: dict[str, list[Tensor]], tolerance: float) -> None:
    assert actual.keys() == expected.keys()
    for name in actual:
        for a, e in zip(actual[name], expected[name], strict=True):
            size = max(1.0, float(e.abs().max()))
            error = float((a / size - e.to(a.dtype) / size).abs().max())
            assert error <= tolerance, f"{name} differ by {error}"


kernel_sizes = st.one_of(
    st.sampled_from([(3, 3), (5, 5), (7, 7), (3, 1), (1, 3), (2, 4), (3,), (5,), (2, 2, 2), (3, 3, 3), (3, 2, 1)]),
    st.tuples(st.integers(2, 7), st.integers(2, 7)),
)
option_sets = st.sampled_from(
    [
        {},
        {"momentum": 0.9},
        {"momentum": 0.9, "nesterov": True},
        {"momentum": 0.5, "dampening": 0.3, "maximize": True},
        {"momentum": 0.9, "weight_decay": 0.1},
        {"weight_decay": 0.1, "maximize": True},
        {"momentum": 0.9, "radius_invariant": True},
        {"momentum": 0.9, "curvature": "manifold"},
        {"curvature": "manifold", "radius_invariant": True, "rho": 0.01},
        {"momentum": 0.9, "step_size": "constant", "lr": 0.01},
        {"rho": 0.1, "curvature": 3.0},
    ]
)


@built
@given(data=st.data(), kernel=kernel_sizes, options=option_sets)
def test_fused_is_the_batched_step(data: st.DataObject, kernel: tuple[int, ...], options: dict[str, Any]):
    draw = data.draw
    out_channels, in_channels = draw(st.integers(1, 21)), draw(st.integers(1, 21))
    kinds = draw(st.lists(st.sampled_from(KINDS), min_size=1, max_size=4, unique=True))
    strategy = draw(st.sampled_from(["pi", "po", "pio", "layer"]))
    selection = draw(st.sampled_from(["random", "deterministic"]))
    transposed = draw(st.booleans())
    shape = (in_channels, out_channels, *kernel) if transposed else (out_channels, in_channels, *kernel)
    kinds = kinds[:1] if strategy == "layer" else kinds
    groups = collection(out_channels, in_channels, strategy, kinds, selection, 0)
    radius = draw(st.sampled_from(["number", "kind", "kernel"]))
    radii = {
        "number": 0.7,
        "kind": dict(zip(KINDS, (1.0, 0.5, 1.5, 2.0), strict=True)),
        "kernel": 0.5 + torch.rand(out_channels, in_channels, generator=torch.Generator().manual_seed(3)),
    }[radius]
    manifold = ProductOfGroups(groups, WeightLayout(shape, "transposed" if transposed else "conv"), radii)
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    memory_format = draw(st.sampled_from(FORMATS[len(shape)]))
    weight = weight_on(manifold, dtype, memory_format, draw(st.integers(0, 99)))
    scale = draw(st.sampled_from([0.0, 1e-3, 0.1, 1.0, 1e3]))
    options = options | {"check_finite": draw(st.sampled_from([None, False]))}  # False: PO goes by rows
    with limited_to(draw(st.sampled_from(INSTRUCTION_SETS))):
        fused = trained("fused", [weight], 3, scale, **options)
    assert_close(fused, trained("reference", [weight], 3, scale, **options), TOLERANCE[dtype])
    assert fused["weights"][0].stride() == weight.stride()
    assert float(manifold.violation(fused["weights"][0]).max()) <= TOLERANCE[dtype]


@built
@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
@pytest.mark.parametrize("kernel", [(3, 3), (5, 5), (7, 7), (1, 3)])
@pytest.mark.parametrize("memory_format", FORMATS[4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_of_every_length(instruction_set: int, kernel: tuple[int, int], memory_format: Any, dtype: torch.dtype):
    """Vectors hold up to sixteen kernels: what is left of a row, of none to three vectors, is dealt with alike."""
    channels = range(1, 50) if kernel == (3, 3) else (3, 9, 16, 21, 24, 31)
    for columns in channels:
        strategy, wide_steps = ("po", "pi", "layer")[columns % 3], columns % 4 == 0
        kinds = KINDS[columns % 4 :][:1] if strategy == "layer" else KINDS
        groups = collection(3, columns, strategy, kinds, "random", columns)
        manifold = ProductOfGroups(groups, (3, columns, *kernel), dict(zip(KINDS, (1.0, 0.5, 1.5, 2.0), strict=True)))
        weight = weight_on(manifold, dtype, memory_format, columns)
        options: dict[str, Any] = {"momentum": 0.9, "check_finite": (None, False)[columns % 2]}
        options |= {"step_size": "constant", "lr": 2.0} if wide_steps else {"weight_decay": 0.1}
        with limited_to(instruction_set):
            fused = trained("fused", [weight], 2, 0.3, **options)
        expected = trained("reference", [weight], 2, 0.3, **options)
        assert_close(fused, expected, TOLERANCE[dtype] * (10 if wide_steps else 1))
        assert float(manifold.violation(fused["weights"][0]).max()) <= TOLERANCE[dtype]


@built
@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
@pytest.mark.parametrize("strategy", ["po", "pi"])
@pytest.mark.parametrize("memory_format", FORMATS[4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_other_memory_is_written(instruction_set: int, strategy: str, memory_format: Any, dtype: torch.dtype):
    for columns in range(2, 35):
        manifold = product(strategy, (3, columns, 3, 3))
        point = weight_on(manifold, dtype, memory_format, 0).detach()
        around = torch.full((3, point.numel() + 64), torch.pi, dtype=dtype)  # weight, gradient and momentum
        inside = [row[32:-32].as_strided(point.shape, point.stride()) for row in around]
        for own, value in zip(inside, (point, torch.ones_like(point), torch.zeros_like(point)), strict=True):
            own.copy_(value)
        weight = as_parameter(inside[0], manifold)
        weight.grad = inside[1]
        optimizer = RiemannianFGSGD([weight], lr=0.1, momentum=0.9, check_finite=False)
        optimizer.state[weight]["momentum_buffer"] = inside[2]
        with limited_to(instruction_set), kernels.use_path("fused"):
            optimizer.step()
        assert weight.data_ptr() == inside[0].data_ptr()
        assert float((inside[2] - torch.zeros_like(point)).abs().max()) > 0
        assert bool((around[:, :32] == torch.pi).all())
        assert bool((around[:, -32:] == torch.pi).all())


def product(strategy: str = "pio", shape: tuple[int, ...] = (40, 24, 3, 3), **kwargs: Any) -> ProductOfGroups:
    return ProductOfGroups(collection(shape[0], shape[1], strategy, KINDS, "random", 0), shape, **kwargs)


@built
@pytest.mark.parametrize("strategy", ["pi", "po", "pio"])
@pytest.mark.parametrize("threads", [1, 2, 3, 7])
@pytest.mark.parametrize("check_finite", [None, False])
def test_every_number_of_threads_gives_the_same_step(strategy: str, threads: int, check_finite: Any, monkeypatch):
    monkeypatch.setattr(cpu, "_PER_THREAD", 64)
    shapes = [(13, 7, 3, 3), (40, 24, 3, 3), (2, 3, 5, 5), (65, 9, 3, 3)]
    formats = FORMATS[4] * 2
    before = torch.get_num_threads()
    for dtype in (torch.float32, torch.float64):
        weights = [weight_on(product(strategy, s), dtype, f, 0) for s, f in zip(shapes, formats, strict=True)]
        expected = trained("reference", weights, 2, 0.3, momentum=0.9)
        torch.set_num_threads(threads)
        try:
            actual = trained("fused", weights, 2, 0.3, momentum=0.9, check_finite=check_finite)
        finally:
            torch.set_num_threads(before)
        assert_close(actual, expected, TOLERANCE[dtype])


@built
@pytest.mark.parametrize("kind", ["sphere", "oblique", "stiefel"])
@pytest.mark.parametrize("stretch", [0.1, 0.9, 1.1, 1.4])
def test_a_point_off_its_manifold_is_brought_back(kind: str, stretch: float):
    manifold = ProductOfGroups(collection(8, 8, "po", (kind, "sphere")), (8, 8, 3, 3))
    weight = weight_on(manifold, torch.float64, torch.contiguous_format, 0)
    optimizer = RiemannianFGSGD([weight], lr=0.1)
    weight.data.mul_(stretch)  # what no optimiser does
    with kernels.use_path("fused"):
        for _ in range(3 if kind == "stiefel" else 1):
            weight.grad = 0.01 * torch.ones_like(weight)
            optimizer.step()
    violation = manifold.violation(weight.detach())
    assert float(violation.max()) <= (1e-3 if kind == "stiefel" and stretch < 0.5 else 1e-12)


@built
def test_a_huge_euclidean_kernel_does_not_harm_its_neighbours():
    groups = collection(8, 16, "pi", ("euclidean", "stiefel"))
    manifold = ProductOfGroups(groups, (8, 16, 3, 3))
    weight = weight_on(manifold, torch.float32, torch.channels_last, 0)
    weight.data = manifold._map(lambda m, p: p * 1e20 if isinstance(m, geoopt.Euclidean) else p, weight.data)
    weight.grad = torch.ones_like(weight)
    optimizer = RiemannianFGSGD([weight], lr=0.01, momentum=0.9)
    with kernels.use_path("fused"):
        optimizer.step()
    assert bool(torch.isfinite(weight).all())
    assert float(manifold.violation(weight.detach()).max()) <= 1e-6


@built
@pytest.mark.parametrize("length", [1e-4, 0.02, 0.5, 5.0, 50.0, 1e3, 1e5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
def test_steps_of_every_length_end_on_the_manifold(length: float, dtype: torch.dtype, instruction_set: int):
    manifold = product()
    weight = weight_on(manifold, dtype, torch.contiguous_format, 0)
    options = {"step_size": "constant", "lr": length}
    with limited_to(instruction_set):
        fused = trained("fused", [weight], 1, 1.0, **options)
    assert float(manifold.violation(fused["weights"][0]).max()) <= 8 * torch.finfo(dtype).eps
    expected = trained("reference", [as_parameter(weight.detach().double(), manifold)], 1, 1.0, **options)
    tolerance = TOLERANCE[dtype] * max(1.0, min(length, 10.0)) ** 2  # of a long step's polar factor, by its condition
    assert_close(fused, expected, tolerance)


@built
def test_a_kind_can_occur_twice_with_different_radii():
    groups = collection(8, 6, "po", ("oblique", "stiefel", "oblique"))
    counts = ProductOfGroups(groups, (8, 6, 3, 3)).partition.counts
    radii = [torch.full((count,), 0.5 + part, dtype=torch.float64) for part, count in enumerate(counts)]
    weight = weight_on(ProductOfGroups(groups, (8, 6, 3, 3), radii), torch.float64, torch.contiguous_format, 0)
    expected = trained("reference", [weight], 2, 0.3, momentum=0.9)
    assert_close(trained("fused", [weight], 2, 0.3, momentum=0.9), expected, 1e-13)


@built
def test_ten_thousand_steps_do_not_drift():
    manifold = product(shape=(16, 16, 3, 3))
    weight = weight_on(manifold, torch.float32, torch.channels_last, 0)
    after = trained("fused", [weight], 10_000, 0.1, momentum=0.9)["weights"][0]
    assert float(manifold.violation(after).max()) <= 1e-6


@built
def test_every_dimension_of_points_is_dealt_with_alike():
    """One channel, one row, one kernel: strides of dimensions of size one mean nothing."""
    for shape in [(1, 17, 3, 3), (17, 1, 3, 3), (1, 1, 3, 3), (33, 1, 1, 3), (1, 9, 3, 1)]:
        for memory_format in FORMATS[4]:
            groups = collection(shape[0], shape[1], "layer", ("oblique",))
            weight = weight_on(ProductOfGroups(groups, shape), torch.float64, memory_format, 0)
            expected = trained("reference", [weight], 2, 0.3, momentum=0.9)
            assert_close(trained("fused", [weight], 2, 0.3, momentum=0.9), expected, 1e-13)


@built
def test_gradient_and_momentum_in_another_memory_format():
    manifold = product()
    weight = weight_on(manifold, torch.float64, torch.channels_last, 0)
    grads = [torch.randn(weight.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(k)) for k in (1, 2)]
    results = []
    for path in ("fused", "reference"):
        own = copy.deepcopy(weight)
        optimizer = RiemannianFGSGD([own], lr=0.1, momentum=0.9)
        with kernels.use_path(path):
            own.grad = grads[0].contiguous()
            optimizer.step()
            state = optimizer.state[own]
            state["momentum_buffer"] = state["momentum_buffer"].contiguous()
            own.grad = grads[1]
            optimizer.step()
        results.append(own.detach())
    torch.testing.assert_close(*results, rtol=0, atol=1e-13)


@built
def test_paths_can_change_between_steps_and_with_a_checkpoint():
    weight = weight_on(product(), torch.float64, torch.contiguous_format, 0)
    expected = trained("reference", [weight], 4, 0.3, momentum=0.9)["weights"][0]
    own = copy.deepcopy(weight)
    optimizer = RiemannianFGSGD([own], lr=0.1, momentum=0.9)
    generator = torch.Generator().manual_seed(1)
    for path in ("fused", "reference", "fused", "auto"):
        own.grad = 0.3 * torch.randn(own.shape, dtype=torch.float64, generator=generator)
        fresh = RiemannianFGSGD([own], lr=0.1, momentum=0.9)
        fresh.load_state_dict(optimizer.state_dict())
        optimizer = fresh
        with kernels.use_path(path):
            optimizer.step()
    torch.testing.assert_close(own.detach(), expected, rtol=0, atol=1e-13)


@built
def test_nothing_changes_before_a_gradient_is_refused():
    weights = [weight_on(product(seed), torch.float32, torch.contiguous_format, 0) for seed in ("po", "pi")]
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    weights[1].grad[3, 2, 1, 0] = float("nan")
    optimizer = RiemannianFGSGD([("first", weights[0]), ("second", weights[1])], lr=0.1, momentum=0.9)
    before = [w.detach().clone() for w in weights]
    with kernels.use_path("fused"), pytest.raises(FloatingPointError, match=r"the gradient of 'second'.*no parameter"):
        optimizer.step()
    for weight, old in zip(weights, before, strict=True):
        torch.testing.assert_close(weight.detach(), old, rtol=0, atol=0)
    assert not optimizer.state


@built
@pytest.mark.parametrize("strategy", ["po", "pi"])
@pytest.mark.parametrize("memory_format", FORMATS[4])
@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
def test_a_group_without_a_finite_gradient_is_left_out_and_counted(
    strategy: str, memory_format: Any, instruction_set: int
):
    manifold = product(strategy)
    results = []
    for path in ("fused", "reference"):
        weight = weight_on(manifold, torch.float64, memory_format, 0)
        optimizer = RiemannianFGSGD([weight], lr=0.1, momentum=0.9, check_finite=False)
        with kernels.use_path(path), limited_to(instruction_set):
            for step in range(3):
                weight.grad = torch.empty_like(weight).fill_(0.1 * (step + 1))
                weight.grad[2, 5, 0, 0] = float("inf") if step == 1 else 0.0
                optimizer.step()
        assert optimizer.skipped_groups() == 1
        results.append(weight.detach())
    torch.testing.assert_close(*results, rtol=0, atol=1e-13)


@built
@pytest.mark.parametrize(
    ("strategy", "check_finite", "scale", "calls"),
    [
        ("po", False, 0.1, ["fgo_step"]),
        ("po", None, 0.1, ["fgo_large", "fgo_step"]),
        ("po", None, 1e18, ["fgo_large", "fgo_norms", "fgo_update"]),
        ("pi", False, 0.1, ["fgo_norms", "fgo_update"]),
        ("pi", None, 0.1, ["fgo_norms", "fgo_update"]),
    ],
)
def test_rows_are_measured_and_moved_at_once_where_nothing_is_to_be_refused(
    strategy: str, check_finite: Any, scale: float, calls: list[str], monkeypatch
):
    """Nothing is, where the squares of all gradients add up to a number. Where they don't, those of groups may."""
    called: list[str] = []
    run = cpu._Table.run
    monkeypatch.setattr(cpu._Table, "run", lambda table, name: (called.append(name), run(table, name))[1])
    weight = weight_on(product(strategy), torch.float32, torch.channels_last, 0)
    fused = trained("fused", [weight], 1, scale, momentum=0.9, check_finite=check_finite)
    assert called == calls
    assert_close(fused, trained("reference", [weight], 1, scale, momentum=0.9), TOLERANCE[torch.float32])


@built
@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), "largest"])
def test_one_bad_entry_anywhere_is_found_and_refused(
    instruction_set: int, dtype: torch.dtype, bad: Any, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(cpu, "_PER_THREAD", 64)
    value = torch.finfo(dtype).max ** 0.55 if bad == "largest" else bad
    shapes = [(3, 5, 3, 3), (4, 7, 3, 3), (2, 35, 3, 3)]
    weights = [
        weight_on(product("po", shape, radius=0.5), dtype, torch.channels_last, seed)
        for seed, shape in enumerate(shapes)
    ]
    before = [weight.detach().clone() for weight in weights]
    optimizer = RiemannianFGSGD(weights, lr=0.1, momentum=0.9)
    generator = torch.Generator().manual_seed(0)
    with limited_to(instruction_set), kernels.use_path("fused"):
        for number, weight in enumerate(weights):
            for place in torch.randperm(weight.numel(), generator=generator)[:40].tolist():
                for own in weights:
                    own.grad = torch.zeros_like(own)
                weight.grad.as_strided((weight.numel(),), (1,))[place] = value
                with pytest.raises(FloatingPointError, match=rf"params'\]\[{number}\].*no parameter was changed"):
                    optimizer.step()
    for weight, old in zip(weights, before, strict=True):
        assert torch.equal(weight.detach(), old)
    assert not optimizer.state


@built
def test_a_gradient_is_measured_at_radius_one_if_it_is_asked_to_be():
    """Where the norm of the whole is finite, but not that of a group at radius one."""
    weight = weight_on(product("po", (4, 6, 3, 3), radius=1e3), torch.float32, torch.channels_last, 0)
    weight.grad = torch.full_like(weight, 1e17)
    optimizer = RiemannianFGSGD([weight], lr=0.1, radius_invariant=True)
    with pytest.raises(FloatingPointError, match="no parameter was changed"):
        optimizer.step()
    RiemannianFGSGD([weight], lr=0.1).step()


@built
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(value: float):
    """Its gradient does not tell. The others have taken their step by then."""
    weights = [weight_on(product("po", (4, 6, 3, 3)), torch.float32, torch.channels_last, seed) for seed in (0, 1)]
    before = [weight.detach().clone() for weight in weights]
    optimizer = RiemannianFGSGD([("first", weights[0]), ("second", weights[1])], lr=0.1)
    with torch.no_grad():
        weights[1][2, 3, 0, 0] = value
    for _ in range(2):
        for weight in weights:
            weight.grad = torch.ones_like(weight)
        with pytest.raises(FloatingPointError, match=r"'second', .* is not finite.*all others have.*a checkpoint"):
            optimizer.step()
    assert not torch.equal(weights[0].detach(), before[0])
    assert bool(torch.isfinite(weights[0]).all())


@built
def test_one_row_and_one_column_have_no_rows_to_go_by():
    for shape in ((1, 9, 3, 3), (9, 1, 3, 3)):
        weight = weight_on(product("po", shape), torch.float32, torch.contiguous_format, 0)
        fused = trained("fused", [weight], 2, 0.1, momentum=0.9, check_finite=False)
        assert_close(fused, trained("reference", [weight], 2, 0.1, momentum=0.9), TOLERANCE[torch.float32])


@built
def test_autograd_notices_that_the_weight_has_changed():
    weight = weight_on(product(), torch.float32, torch.contiguous_format, 0)
    loss = weight.square().sum()
    weight.grad = torch.ones_like(weight)
    with kernels.use_path("fused"):
        RiemannianFGSGD([weight], lr=0.1).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@built
def test_new_radii_are_seen():
    manifold = product("po", radius=1.0)
    weight = weight_on(manifold, torch.float64, torch.contiguous_format, 0)
    weight.grad = torch.ones_like(weight)
    optimizer = RiemannianFGSGD([weight], lr=0.1)
    with kernels.use_path("fused"):
        optimizer.step()
        manifold = weight.manifold
        manifold.set_radius(2.0)
        weight.data = manifold.projx(weight.data)
        optimizer.step()
    assert float(manifold.violation(weight.detach()).max()) <= 1e-14


def test_a_copied_model_takes_the_same_step():
    model = constrain_a_model()
    again = copy.deepcopy(model)
    for m in (model, again):
        for p in m.parameters():
            p.grad = torch.ones_like(p)
        RiemannianFGSGD(m.parameters(), lr=0.1, momentum=0.9).step()
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def constrain_a_model() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 5, groups=2), nn.ConvTranspose2d(8, 4, (1, 3)))
    constrain(model, strategy="pio", manifolds=KINDS)
    return model


@built
@pytest.mark.parametrize("reason", ["fused steps take float32 and float64, got torch.bfloat16", "strides"])
def test_what_cannot_be_fused_says_why(reason: str):
    dtype = torch.float32 if reason == "strides" else torch.bfloat16
    weight = weight_on(product(shape=(4, 4, 3, 3, 3)), dtype, torch.contiguous_format, 0)
    if reason == "strides":
        weight.data = weight.data.transpose(2, 3).contiguous().transpose(2, 3)
    weight.grad = torch.zeros_like(weight)
    optimizer = RiemannianFGSGD([weight], lr=0.1)
    with kernels.use_path("fused"), pytest.raises(RuntimeError, match=reason):
        optimizer.step()
    optimizer.step()


def unfused(caplog: Any) -> list[str]:
    """Reasons for which something was left to the batched code."""
    messages = [r.getMessage() for r in caplog.records if r.name == "fgo_geo" and r.levelno == logging.WARNING]
    assert all(m.startswith("path 'fused': ") and " takes the batched torch code: " in m for m in messages)
    return [m.partition(" takes the batched torch code: ")[2].partition("; lines are")[0] for m in messages]


ONE_MANIFOLD = "kernels on one manifold need weights (D, C, A, B) and components of two dimensions"
UNFUSED: list[tuple[Any, tuple[int, ...], str]] = [
    (
        ProductOfGroups(collection(24, 8, "layer", "stiefel", components="block"), (24, 8)),
        (24, 8),
        "its components are blocks",
    ),
    (Stiefel(), (5, 3), ONE_MANIFOLD),
    (ScaledSphere(ndim=1), (4, 3), ONE_MANIFOLD),
    (Stiefel(retraction="qr"), (4, 3, 3, 3), "fused steps know no other retraction than polar, the manifold has qr"),
    (
        Stiefel(),
        (2, 3, 64, 8),
        "kernels A x B on one manifold need A >= B, more than one entry, and are at most 49 x 7",
    ),
    (geoopt.Sphere(), (4, 3), "fused steps know no Sphere, and no classes derived from those that they know"),
]


@built
@pytest.mark.parametrize("compiled", [False, True][: 1 + TRACES_PARAMETERS])  # or the step runs between graphs
def test_forcing_the_fused_path_says_once_what_has_none(compiled: bool, monkeypatch, caplog):
    torch._dynamo.reset()
    monkeypatch.setattr(kernels, "_said", set())
    taken: list[int] = []
    update = cpu.update
    monkeypatch.setattr(cpu, "update", lambda batch, *rest: (taken.append(len(batch.tasks)), update(batch, *rest)))
    weights = [weight_on(product(), torch.float32, torch.contiguous_format, 0)]
    weights += [as_parameter(m.random(*shape).detach().as_subclass(Tensor), m) for m, shape, _ in 2 * UNFUSED]
    weights += [nn.Parameter(torch.ones(3))]
    optimizer = RiemannianFGSGD(weights, lr=torch.tensor(0.1), momentum=0.9)
    step = torch.compile(optimizer.step, backend="eager", fullgraph=True) if compiled else optimizer.step
    with caplog.at_level(logging.WARNING, "fgo_geo"):
        for path in ("auto", "fused"):
            with kernels.use_path(path):
                for _ in range(2):
                    for weight in weights:
                        weight.grad = torch.ones_like(weight).detach()
                    step()
            reasons = dict.fromkeys(reason for manifold, _, reason in UNFUSED if path == "fused")
            if compiled:  # where a manifold of Geoopt is not looked at
                reasons.pop(UNFUSED[-1][2], None)
            assert unfused(caplog) == list(reasons)
    assert taken == [1] * 4


@built
def test_forcing_the_fused_path_says_what_no_weight_is_the_reason_for(monkeypatch, caplog):
    monkeypatch.setattr(kernels, "_said", set())
    weight = weight_on(product(), torch.float32, torch.contiguous_format, 0)
    with caplog.at_level(logging.WARNING, "fgo_geo"):
        trained("fused", [weight], 2, 0.3, update="exponential")
        assert unfused(caplog) == ["fused steps know no exponential map"]
        optimizer = RiemannianFGSGD([weight], lr=0.1)
        weight.grad = torch.ones_like(weight).detach()
        with kernels.use_path("fused"), FlopCounterMode(display=False):
            optimizer.step()
    assert unfused(caplog)[1:] == ["operations are recorded, by a mode or a transform of torch"]


def test_without_the_extension_everything_works_and_it_is_said_once(monkeypatch, caplog):
    monkeypatch.setattr(cpu, "library", lambda: None)
    monkeypatch.setattr(kernels, "_said", set())
    weight = weight_on(product(), torch.float32, torch.contiguous_format, 0)
    expected = trained("reference", [weight], 2, 0.3, momentum=0.9)
    with caplog.at_level(logging.WARNING, "fgo_geo"):
        actual = trained("auto", [weight], 2, 0.3, momentum=0.9)
    assert_close(actual, expected, 0.0)
    assert [r.getMessage() for r in caplog.records] == [f"step by the batched torch code: {cpu.NOT_BUILT}"]


@built
def test_the_active_path_is_said_once(monkeypatch, caplog):
    monkeypatch.setattr(kernels, "_said", set())
    with caplog.at_level(logging.INFO, "fgo_geo"):
        trained("auto", [weight_on(product(), torch.float32, torch.contiguous_format, 0)], 3, 0.3)
    name = cpu._INSTRUCTION_SETS[cpu._instruction_set()]
    assert [r.getMessage() for r in caplog.records] == [f"fused step: compiled sweeps on the CPU ({name})"]


@built
@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
def test_the_active_path_names_the_instruction_set(instruction_set: int):
    with limited_to(instruction_set):
        assert cpu.description().endswith((" (portable)", " (AVX2)", " (AVX-512)")[instruction_set])


@pytest.mark.parametrize("path", ["fast", "", None])
def test_an_unknown_path_is_refused(path: Any):
    with (
        pytest.raises(ValueError, match=r"the path must be one of \('auto', 'fused', 'reference'\), got"),
        kernels.use_path(path),
    ):
        pass


@built
@pytest.mark.parametrize(
    ("kind", "shape"), [("oblique", (2, 3, 3, 3)), ("stiefel", (2, 9, 3, 3)), ("sphere", (2, 3, 3))]
)
def test_a_column_that_was_set_to_zero_does_not_hang(kind: str, shape: tuple[int, ...]):
    """There ``I + E`` has no inverse root; the fused step gives what the batched code gives.

    But for a Stiefel kernel: the batched code sees that it is off its manifold, and takes one of its nearest points.
    """
    manifold = ProductOfGroups(collection(*shape[:2], "po", (kind,)), shape)
    results = []
    for path in ("fused", "reference"):
        weight = weight_on(manifold, torch.float32, torch.contiguous_format, 0)
        optimizer = RiemannianFGSGD([weight], lr=0.1)
        weight.data[0, 0].reshape(shape[2], -1)[:, 0] = 0
        weight.grad = torch.zeros_like(weight)
        with kernels.use_path(path):
            optimizer.step()
        results.append(weight.detach())
    if kind == "stiefel":
        assert bool(results[0].isfinite().all())
        assert float(manifold.violation(results[1]).max()) < 1e-5
        results = [result.flatten(0, 1)[1:] for result in results]
    torch.testing.assert_close(*results, rtol=0, atol=1e-5, equal_nan=True)


@built
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("radii", [3.0, 1e2, 1e4, 1e7, 1e12, 1e18])
@pytest.mark.parametrize("size", [(3, 3), (5, 5), (6, 2)])
def test_a_step_of_any_length_ends_on_the_manifold(size: tuple[int, int], radii: float, dtype: torch.dtype):
    """The squares of a long step's singular values differ by more than the digits that a product keeps."""
    manifold = ProductOfGroups(collection(4, 5, "pio", KINDS, "random", 0), (4, 5, *size), 0.5)
    direction = torch.randn(4, 5, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for instruction_set in INSTRUCTION_SETS:
        weight = weight_on(manifold, dtype, torch.contiguous_format, 0)
        start = weight.detach().clone().as_subclass(Tensor)
        optimizer = RiemannianFGSGD([weight], lr=0.5 * radii, step_size="constant")
        weight.grad = (direction / direction.norm(dim=(-2, -1), keepdim=True)).to(dtype)
        with limited_to(instruction_set), kernels.use_path("fused"):
            optimizer.step()
        assert float(manifold.violation(weight.detach()).max()) <= 20 * torch.finfo(dtype).eps
        if radii > 1e4 or dtype != torch.float64:
            continue
        tangent = manifold.egrad2rgrad(start, weight.grad)
        u, _, v = torch.linalg.svd(start - optimizer.param_groups[0]["lr"] * tangent, full_matrices=False)
        nearest = 0.5 * u @ v
        codes = torch.tensor(kernels_of_kind(manifold, "stiefel"))
        error = (weight.detach() - nearest).flatten(0, 1)[codes].abs().max()
        assert float(error) <= 1e-15 * radii


def kernels_of_kind(manifold: ProductOfGroups, kind: str) -> list[int]:
    """Numbers of a manifold's kernels of one kind, row by row."""
    task = kernels.task_of(weight_on(manifold, torch.float64, torch.contiguous_format, 0), manifold, None)
    return [i for i, code in enumerate(task.table.codes.flatten().tolist()) if code % 4 == KINDS.index(kind)]


# -- what is kept from step to step ------------------------------------------------------------------------------


def stored_otherwise(weight: Any, optimizer: RiemannianFGSGD) -> RiemannianFGSGD:
    weight.data = weight.data.contiguous(memory_format=torch.channels_last)
    return optimizer


def elsewhere_in_memory(weight: Any, optimizer: RiemannianFGSGD) -> RiemannianFGSGD:
    weight.data = weight.data.clone()
    return optimizer


def in_double_precision(weight: Any, optimizer: RiemannianFGSGD) -> RiemannianFGSGD:
    weight.data = weight.data.double()
    state = optimizer.state[weight]
    state["momentum_buffer"] = state["momentum_buffer"].double()
    return optimizer


def other_radii(weight: Any, optimizer: RiemannianFGSGD) -> RiemannianFGSGD:
    weight.manifold.set_radius(2.0)
    weight.data = weight.manifold.projx(weight.data)
    return optimizer


def another_manifold(weight: Any, optimizer: RiemannianFGSGD) -> RiemannianFGSGD:
    weight.manifold = product("pi", tuple(weight.shape))
    weight.data = weight.manifold.projx(weight.data)
    return optimizer


def another_buffer(weight: Any, optimizer: RiemannianFGSGD) -> RiemannianFGSGD:
    optimizer.state[weight]["momentum_buffer"] = 0.5 * optimizer.state[weight]["momentum_buffer"]
    return optimizer


def buffer_stored_otherwise(weight: Any, optimizer: RiemannianFGSGD) -> RiemannianFGSGD:
    state = optimizer.state[weight]
    state["momentum_buffer"] = state["momentum_buffer"].contiguous(memory_format=torch.channels_last)
    return optimizer


def no_buffer(weight: Any, optimizer: RiemannianFGSGD) -> RiemannianFGSGD:
    optimizer.state.clear()
    return optimizer


def without_momentum(weight: Any, optimizer: RiemannianFGSGD) -> RiemannianFGSGD:
    optimizer.param_groups[0]["momentum"] = 0.0
    return optimizer


def other_options(weight: Any, optimizer: RiemannianFGSGD) -> RiemannianFGSGD:
    optimizer.param_groups[0].update(lr=0.3, nesterov=True, weight_decay=0.1, curvature="manifold")
    return optimizer


def loaded_state(weight: Any, optimizer: RiemannianFGSGD) -> RiemannianFGSGD:
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return optimizer


def step_without_gradient(weight: Any, optimizer: RiemannianFGSGD) -> RiemannianFGSGD:
    weight.grad = None
    optimizer.step()
    return optimizer


def frozen_neighbour(weight: Any, optimizer: RiemannianFGSGD) -> RiemannianFGSGD:
    optimizer.param_groups[0]["params"][1].grad = None
    return optimizer


def another_order(weight: Any, optimizer: RiemannianFGSGD) -> RiemannianFGSGD:
    optimizer.param_groups[0]["params"].reverse()
    return optimizer


def gone_neighbour(weight: Any, optimizer: RiemannianFGSGD) -> RiemannianFGSGD:
    del optimizer.param_groups[0]["params"][1]
    return optimizer


def reference_step(weight: Any, optimizer: RiemannianFGSGD) -> RiemannianFGSGD:
    with kernels.use_path("reference"):
        optimizer.step()
    return optimizer


CHANGES = [
    *(stored_otherwise, elsewhere_in_memory, in_double_precision, other_radii, another_manifold, another_buffer),
    *(buffer_stored_otherwise, no_buffer, without_momentum, other_options, loaded_state, step_without_gradient),
    *(frozen_neighbour, another_order, gone_neighbour, reference_step),
]


@built
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("in_place", [True, False])
def test_a_change_between_steps_is_noticed(change: Any, in_place: bool):
    """A fused path keeps what it knows of a parameter; ``in_place`` keeps the gradient's memory too."""
    results: list[list[Tensor]] = []
    for path in ("auto", "reference"):
        weights = [weight_on(product("po"), torch.float32, torch.contiguous_format, k) for k in range(2)]
        optimizer = RiemannianFGSGD(weights, lr=0.1, momentum=0.9)
        generator = torch.Generator().manual_seed(1)
        with kernels.use_path(path):
            for step in range(4):
                for weight in weights:
                    grad = 0.3 * torch.randn(weight.shape, generator=generator).to(weight.dtype)
                    if in_place and weight.grad is not None and weight.grad.dtype == weight.dtype:
                        weight.grad.copy_(grad)
                    else:
                        weight.grad = torch.empty_like(weight).copy_(grad)
                if step == 2:
                    optimizer = change(weights[0], optimizer)
                if weights[0].grad is not None and weights[0].grad.dtype != weights[0].dtype:
                    weights[0].grad = weights[0].grad.to(weights[0].dtype)
                optimizer.step()
        results.append([w.detach() for w in weights])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


@built
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_a_duplicate_keeps_nothing_of_the_original(duplicate: Any):
    weight = weight_on(product("po"), torch.float64, torch.contiguous_format, 0)
    optimizer = RiemannianFGSGD([weight], lr=0.1, momentum=0.9)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    before = weight.detach().clone()
    own, own_optimizer = duplicate((weight, optimizer))
    own.grad = torch.ones_like(own)
    own_optimizer.step()
    torch.testing.assert_close(weight.detach(), before, rtol=0, atol=0)
    optimizer.step()
    torch.testing.assert_close(own.detach(), weight.detach(), rtol=0, atol=0)


@built
def test_nothing_is_held_between_steps():
    weight = weight_on(product("po"), torch.float32, torch.contiguous_format, 0)
    optimizer = RiemannianFGSGD([weight], lr=0.1, momentum=0.9)
    for _ in range(2):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    gradient, momentum = weakref.ref(weight.grad), weakref.ref(optimizer.state[weight]["momentum_buffer"])
    optimizer.zero_grad()
    optimizer.state.clear()
    assert gradient() is None
    assert momentum() is None
    of_weight, of_manifold = weakref.ref(weight), weakref.ref(weight.manifold)
    del weight, optimizer
    gc.collect()
    assert of_weight() is None
    assert of_manifold() is None


@built
def test_a_refused_gradient_is_not_held():
    weight = weight_on(product("po"), torch.float32, torch.contiguous_format, 0)
    optimizer = RiemannianFGSGD([weight], lr=0.1, momentum=0.9)
    weight.grad = torch.full_like(weight, torch.nan)
    gradient = weakref.ref(weight.grad)
    with pytest.raises(FloatingPointError, match="no parameter was changed"):
        optimizer.step()
    optimizer.zero_grad()
    assert gradient() is None


@built
def test_parameters_on_one_manifold_are_told_apart():
    manifold, results = product("po"), []
    for path in ("auto", "reference"):
        weights = [weight_on(manifold, torch.float64, torch.contiguous_format, k) for k in range(2)]
        for k, weight in enumerate(weights):
            weight.grad = torch.full_like(weight, 0.1 * (k + 1))
        optimizer = RiemannianFGSGD(weights, lr=0.1, momentum=0.9)
        with kernels.use_path(path):
            optimizer.step()
            optimizer.param_groups[0]["params"] = weights[1:]
            optimizer.step()
        results.append([w.detach() for w in weights])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-13)


@built
@pytest.mark.parametrize("by", ["group", "whole group", "path"])
def test_a_parameter_that_left_is_not_held(by: str):
    weights = [weight_on(product("po"), torch.float32, torch.contiguous_format, k) for k in range(2)]
    optimizer = RiemannianFGSGD([{"params": [w]} for w in weights] if by == "whole group" else weights, lr=0.1)
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    if by == "whole group":
        del optimizer.param_groups[1]
    else:
        optimizer.param_groups[0]["params"] = weights[:1]
    with kernels.use_path("reference" if by == "path" else "auto"):
        optimizer.step()
    left = weakref.ref(weights[1])
    del weight, weights
    gc.collect()
    assert left() is None


@built
def test_another_path_is_asked_again(monkeypatch):
    weight = weight_on(product("po"), torch.float64, torch.contiguous_format, 0)
    weight.grad = torch.ones_like(weight)
    optimizer = RiemannianFGSGD([weight], lr=0.1)
    with kernels.use_path("fused"):
        optimizer.step()
        monkeypatch.setitem(kernels._PATHS, "cpu", SimpleNamespace(reason=lambda task: "it does not want to"))
        with pytest.raises(RuntimeError, match="it does not want to"):
            optimizer.step()


@built
def test_the_work_is_prepared_once(monkeypatch):
    asked: list[Any] = []
    monkeypatch.setattr(cpu, "reason", lambda task, ask=cpu.reason: asked.append(task) or ask(task))
    trained("auto", [weight_on(product(), torch.float32, torch.contiguous_format, k) for k in range(3)], 5, 0.3)
    assert len(asked) == 3
