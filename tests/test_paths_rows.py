"""One sweep over rows of kernels: when it is taken, that it is the same map, and what it does with bad numbers."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from path_helpers import (
    INSTRUCTION_SETS,
    KINDS,
    TOLERANCE,
    after_two_steps,
    as_parameter,
    assert_close,
    assert_refused,
    built,
    give_gradients,
    limited_to,
    option_sets,
    product,
    sweeps_of,
    trained,
    weight_on,
)

from fgo_geo import ProductOfGroups, RiemannianFGSGD, kernels
from fgo_geo.grouping import collection

pytestmark = built
ROWS = {"fgo_large": 1, "fgo_step": 1}
TWO_SWEEPS = {"fgo_norms": 1, "fgo_update": 1}


def weights_of(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Any]:
    return [weight_on(product("po", shape), dtype, torch.channels_last, seed) for seed, shape in enumerate(shapes)]


@given(
    data=st.data(),
    kernel=st.sampled_from([(3, 3), (5, 5), (7, 7), (3, 1), (2, 3)]),
    options=option_sets,
    shape=st.tuples(st.integers(2, 9), st.integers(2, 40)),
    scale=st.sampled_from([0.0, 1e-3, 0.1, 1.0, 1e3]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    instruction_set=st.sampled_from(INSTRUCTION_SETS),
)
def test_one_sweep_is_the_batched_step(
    data: st.DataObject,
    kernel: tuple[int, int],
    options: dict[str, Any],
    shape: tuple[int, int],
    scale: float,
    dtype: torch.dtype,
    instruction_set: int,
):
    kinds = data.draw(st.lists(st.sampled_from(KINDS), min_size=1, max_size=4, unique=True))
    radius = data.draw(st.sampled_from([0.7, dict(zip(KINDS, (1.0, 0.5, 1.5, 2.0), strict=True)), "kernel"]))
    if radius == "kernel":
        radius = 0.5 + torch.rand(*shape, generator=torch.Generator().manual_seed(3))
    groups = collection(*shape, "po", kinds, "random", data.draw(st.integers(0, 9)))
    manifold = ProductOfGroups(groups, (*shape, *kernel), radius)
    weight = weight_on(manifold, dtype, torch.channels_last, data.draw(st.integers(0, 99)))
    with limited_to(instruction_set):
        swept = trained("fused", [weight], 4, scale, **options)
    assert_close(swept, trained("reference", [weight], 4, scale, **options), TOLERANCE[dtype])
    assert float(manifold.violation(swept["weights"][0]).max()) <= TOLERANCE[dtype]


@pytest.mark.parametrize("curvature", [None, 0.0, 2.0])
@pytest.mark.parametrize("rho", [0.5, 1.0, 3.0])
def test_the_step_size_is_the_theorems(curvature: float | None, rho: float):
    """Gradients so long that every group is divided; one radius of 0.3, whose curvature is far above one."""
    manifold = product("po", (6, 20, 3, 3), radius=dict(zip(KINDS, (1.0, 0.3, 1.5, 2.0), strict=True)))
    weight = weight_on(manifold, torch.float64, torch.channels_last, 0)
    options = {"rho": rho, "curvature": curvature, "momentum": 0.9}
    swept = trained("fused", [weight], 3, 10.0, **options)
    assert float(swept["scales"][0].min()) > 1
    assert_close(swept, trained("reference", [weight], 3, 10.0, **options), 1e-13)


@pytest.mark.parametrize(("momentum", "first"), [(0.0, 1), (0.9, 2)])
def test_the_sweep_is_taken_once_the_weights_are_known(momentum: float, first: int):
    """The work of a first step with momentum is not kept."""
    weights = weights_of((4, 6, 3, 3), (5, 7, 7, 7))
    optimizer = RiemannianFGSGD(weights, lr=0.1, momentum=momentum)
    give_gradients(weights)
    assert [sweeps_of(optimizer.step) for _ in range(first + 3)] == [TWO_SWEEPS] * first + [ROWS] * 3


@pytest.mark.parametrize("strategy", ["pi", "pio", "layer"])
def test_groups_with_kernels_of_several_rows_take_two_sweeps(strategy: str):
    manifold = product(strategy) if strategy != "layer" else ProductOfGroups(
        collection(40, 24, "layer", ("sphere",)), (40, 24, 3, 3)
    )  # fmt: skip
    weights = [weight_on(manifold, torch.float32, torch.channels_last, 0)]
    optimizer = after_two_steps(weights)
    give_gradients(weights, 10.0)  # too long for the bounds, which are looked at once
    assert sweeps_of(optimizer.step) == {"fgo_bounds": 1, **TWO_SWEEPS}
    assert sweeps_of(optimizer.step) == TWO_SWEEPS


@pytest.mark.parametrize("options", [{"norm": "running"}, {"step_size": "angle"}])
def test_step_sizes_that_need_more_than_a_groups_norm_take_two_sweeps(options: dict[str, Any]):
    weights = weights_of((4, 6, 3, 3))
    assert sweeps_of(after_two_steps(weights, **options).step) == TWO_SWEEPS


def test_a_weight_that_was_changed_from_outside_takes_two_sweeps_once():
    weights = weights_of((4, 6, 3, 3), (5, 7, 3, 3))
    optimizer = after_two_steps(weights)
    with torch.no_grad():
        weights[1].mul_(1.0)
    assert sweeps_of(optimizer.step) == TWO_SWEEPS
    assert sweeps_of(optimizer.step) == ROWS
    weights[0].data = weights[0].data.clone()
    assert sweeps_of(optimizer.step) == TWO_SWEEPS


@pytest.mark.parametrize("check_finite", [None, True])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_is_refused_before_any_row_has_moved(value: float, check_finite: bool | None):
    weights = weights_of((4, 6, 3, 3), (5, 7, 3, 3))
    optimizer = after_two_steps(weights, check_finite=check_finite)
    weights[1].grad[4, 6, 2, 2] = value
    before = copy.deepcopy([w.detach() for w in weights]), copy.deepcopy(optimizer.state_dict())
    with pytest.raises(FloatingPointError, match=r"params'\]\[1\].*no parameter was changed"):
        optimizer.step()
    assert all(torch.equal(w.detach(), old) for w, old in zip(weights, before[0], strict=True))
    for k, state in before[1]["state"].items():
        assert torch.equal(optimizer.state_dict()["state"][k]["momentum_buffer"], state["momentum_buffer"])


def test_a_weight_that_is_no_number_is_refused_before_any_row_has_moved():
    weights = weights_of((4, 6, 3, 3), (5, 7, 3, 3))
    optimizer = after_two_steps(weights)
    with torch.no_grad():
        weights[1][4, 6, 2, 2] = math.nan
    assert_refused(optimizer, weights)


def test_a_weight_that_became_no_number_behind_autograds_back_is_refused_a_step_later():
    """``param.data`` tells no one. Its row stays as it is, and is counted; the next step changes nothing."""
    weights = weights_of((4, 6, 3, 3), (5, 7, 3, 3))
    optimizer = after_two_steps(weights)
    weights[1].data[4, 6, 2, 2] = math.nan
    before = [w.detach().clone() for w in weights]
    assert sweeps_of(optimizer.step) == ROWS
    assert optimizer.skipped_groups() == 1
    torch.testing.assert_close(weights[1].detach()[4], before[1][4], rtol=0, atol=0, equal_nan=True)
    assert bool((weights[1].detach()[:4] != before[1][:4]).any())
    assert_refused(optimizer, weights)


def test_without_the_check_nothing_is_looked_at():
    weights = weights_of((4, 6, 3, 3), (5, 7, 7, 7))
    optimizer = RiemannianFGSGD(weights, lr=0.1, momentum=0.9, check_finite=False)
    give_gradients(weights)
    assert [sweeps_of(optimizer.step) for _ in range(3)] == [{"fgo_step": 1}] * 3


@pytest.mark.parametrize("value", [math.nan, -math.inf, 1e30])
def test_without_the_check_a_bad_group_is_left_out_and_the_rest_of_its_row_moves(value: float):
    """As on every path; the square of the last gradient overflows in single precision."""
    results, counts = [], []
    for path in ("fused", "reference"):
        weights = weights_of((4, 6, 3, 3), (5, 7, 3, 3))
        optimizer = RiemannianFGSGD(weights, lr=0.1, momentum=0.9, check_finite=False)
        for step in range(3):
            give_gradients(weights)
            if step == 1:
                weights[1].grad[4, 6, 2, 2] = value
            with kernels.use_path(path):
                optimizer.step()
        results.append([w.detach() for w in weights])
        counts.append(optimizer.skipped_groups())
    assert counts == [1, 1]
    for swept, expected in zip(*results, strict=True):
        torch.testing.assert_close(swept, expected, rtol=0, atol=TOLERANCE[torch.float32])


@pytest.mark.parametrize("invariant", [False, True])
def test_a_gradient_whose_square_overflows_takes_the_bounded_step(invariant: bool):
    weight = weights_of((4, 6, 3, 3))[0]
    single, double = copy.deepcopy(weight), as_parameter(weight.detach().double(), copy.deepcopy(weight.manifold))
    for own in (single, double):
        optimizer = after_two_steps([own], momentum=0.0, radius_invariant=invariant)
        give_gradients([own], 1e25)
        optimizer.step()
    torch.testing.assert_close(single.detach().double(), double.detach(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_every_number_of_threads_gives_the_same_bits(threads: int):
    weights = weights_of((65, 9, 3, 3), (232, 222, 3, 3))
    expected = trained("fused", weights, 3, 0.3, momentum=0.9)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        actual = trained("fused", weights, 3, 0.3, momentum=0.9)
    finally:
        torch.set_num_threads(before)
    assert_close(actual, expected, 0.0)


def test_weights_of_several_types_and_the_reference_agree():
    shape = (4, 6, 3, 3)
    weights = weights_of(shape) + weights_of(shape, dtype=torch.float64) + weights_of((5, 7, 3, 3))
    options = {"momentum": 0.9, "curvature": None}
    swept = trained("fused", weights, 3, 3.0, **options)
    with kernels.use_path("reference"):
        assert_close(swept, trained("reference", weights, 3, 3.0, **options), TOLERANCE[torch.float32])
