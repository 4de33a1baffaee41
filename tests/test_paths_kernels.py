"""The compiled sweeps over kernels against the batched torch code: the same map, on the same terms."""

from __future__ import annotations

import copy
from typing import Any

import geoopt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from path_helpers import (
    FORMATS,
    INSTRUCTION_SETS,
    KINDS,
    TOLERANCE,
    as_parameter,
    assert_close,
    built,
    in_double,
    kernel_sizes,
    limited_to,
    option_sets,
    product,
    sweeps_of,
    trained,
    weight_on,
)
from torch import Tensor

from fgo_geo import ProductOfGroups, RiemannianFGSGD, kernels
from fgo_geo.grouping import collection
from fgo_geo.paths.kernel_tables import table_of
from fgo_geo.paths.protocol import Weight
from fgo_geo.weights.components import WeightLayout
from fgo_geo.weights.kinds import kind


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
    options = options | {"check_finite": draw(st.sampled_from([None, False]))}
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
    """Vectors hold up to sixteen kernels: the rest of a row, of none to three vectors, gives the same result."""
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


@built
@pytest.mark.parametrize("strategy", ["pi", "po", "pio"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_number_of_threads_gives_the_same_step(strategy: str, dtype: torch.dtype):
    """The last weight alone has work for seven threads."""
    shapes = [(13, 7, 3, 3), (2, 3, 5, 5), (65, 9, 3, 3), (232, 222, 3, 3)]
    formats = FORMATS[4] * 2
    weights = [weight_on(product(strategy, s), dtype, f, 0) for s, f in zip(shapes, formats, strict=True)]
    expected = trained("reference", weights, 2, 0.3, momentum=0.9)
    before = torch.get_num_threads()
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        try:
            actual = trained("fused", weights, 2, 0.3, momentum=0.9)
        finally:
            torch.set_num_threads(before)
        assert_close(actual, expected, TOLERANCE[dtype])


@built
@pytest.mark.parametrize("kind", ["sphere", "oblique", "stiefel"])
@pytest.mark.parametrize("factor", [0.1, 0.9, 1.1, 1.4])
def test_a_point_off_its_manifold_is_brought_back(kind: str, factor: float):
    manifold = ProductOfGroups(collection(8, 8, "po", (kind, "sphere")), (8, 8, 3, 3))
    weight = weight_on(manifold, torch.float64, torch.contiguous_format, 0)
    optimizer = RiemannianFGSGD([weight], lr=0.1)
    weight.data.mul_(factor)  # what no optimiser does
    with kernels.use_path("fused"):
        for _ in range(3 if kind == "stiefel" else 1):
            weight.grad = 0.01 * torch.ones_like(weight)
            optimizer.step()
    violation = manifold.violation(weight.detach())
    assert float(violation.max()) <= (1e-3 if kind == "stiefel" and factor < 0.5 else 1e-12)


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
def test_two_sweeps_take_all_weights_of_one_type():
    weights = [weight_on(product(s, (4, 6, k, k)), torch.float32, FORMATS[4][0], k) for s, k in (("po", 3), ("pi", 5))]
    optimizer = RiemannianFGSGD(weights, lr=0.1, momentum=0.9)
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert sweeps_of(optimizer.step) == {"fgo_norms": 1, "fgo_update": 1}


@built
@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_one_bad_entry_anywhere_is_found_and_refused(instruction_set: int, dtype: torch.dtype, value: float):
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
@pytest.mark.parametrize("path", ["fused", "reference"])
@pytest.mark.parametrize("invariant", [False, True])
@pytest.mark.parametrize("size", [1e15, 1e20, 1e30])
def test_a_finite_gradient_whose_square_overflows_takes_the_bounded_step(size: float, invariant: bool, path: Any):
    """That of double precision; the longer the gradient, the shorter is the step of the theorem."""
    manifold = product("po", (4, 6, 3, 3), radius=3.0)
    weight = weight_on(manifold, torch.float32, torch.channels_last, 0)
    options: dict[str, Any] = {"radius_invariant": invariant, "rho": 0.1}
    actual = trained(path, [weight], 1, size, **options)
    expected = trained("reference", [in_double(weight)], 1, size, **options)
    for tau, exact in zip(actual["scales"], expected["scales"], strict=True):
        inside = exact < torch.finfo(torch.float32).max
        torch.testing.assert_close(tau.double()[inside], exact[inside], rtol=1e-4, atol=0)
    assert_close(actual | {"scales": []}, expected | {"scales": []}, TOLERANCE[torch.float32])
    assert float(manifold.violation(actual["weights"][0]).max()) <= TOLERANCE[torch.float32]


@built
def test_one_group_of_a_large_gradient_does_not_drown_the_others():
    """Its entries are divided by one power of two, so groups that are shorter by 1e15 lose no digit that counts."""
    manifold = product("po", (8, 6, 3, 3))
    weight = weight_on(manifold, torch.float32, torch.contiguous_format, 0)
    grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    grad[0] *= 1e25
    results = []
    for own in (copy.deepcopy(weight), in_double(weight)):
        own.grad = grad.to(own.dtype)
        RiemannianFGSGD([own], lr=0.1).step()
        results.append(own.detach().double())
    torch.testing.assert_close(*results, rtol=0, atol=1e-5)


@built
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named_before_anything_has_moved(value: float):
    """Its gradient does not tell."""
    weights = [weight_on(product("po", (4, 6, 3, 3)), torch.float32, torch.channels_last, seed) for seed in (0, 1)]
    optimizer = RiemannianFGSGD([("first", weights[0]), ("second", weights[1])], lr=0.1)
    with torch.no_grad():
        weights[1][2, 3, 0, 0] = value
    before = [weight.detach().clone() for weight in weights]
    for _ in range(2):
        for weight in weights:
            weight.grad = torch.ones_like(weight)
        with pytest.raises(FloatingPointError, match=r"'second', .* is not finite itself.*no parameter.*checkpoint"):
            optimizer.step()
    for weight, old in zip(weights, before, strict=True):
        torch.testing.assert_close(weight.detach(), old, rtol=0, atol=0, equal_nan=True)


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


def kernels_of_kind(manifold: ProductOfGroups, name: str) -> list[int]:
    """Numbers of a manifold's kernels of one kind, row by row."""
    weight = weight_on(manifold, torch.float64, torch.contiguous_format, 0)
    codes = table_of(Weight(weight, weight, manifold, None)).codes
    return [number for number, code in enumerate(codes.flatten().tolist()) if code % 4 == kind(name).code]
