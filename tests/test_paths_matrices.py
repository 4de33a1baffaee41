"""Matrices of lines and Stiefel blocks, weight by weight: when, that it is the same map, and what bad numbers do."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from path_helpers import (
    CLOSE,
    INSTRUCTION_SETS,
    KINDS,
    after_two_steps,
    answer,
    assert_close,
    assert_refused,
    built,
    give_gradients,
    in_double,
    limited_to,
    option_sets,
    scales,
    sweeps_of,
    trained,
    weight_on,
)

from fgo_geo import ProductOfGroups, RiemannianFGSGD
from fgo_geo.grouping import collection
from fgo_geo.paths.native.matrices import NativeMatrices
from fgo_geo.paths.protocol import Refusal

pytestmark = built
WEIGHT_BY_WEIGHT = {"fgo_large": 1, "fgo_matrix_step": 1}
TWO_SWEEPS = {"fgo_stiefel_norms": 1, "fgo_line_norms": 1, "fgo_stiefel_move": 1, "fgo_line_update": 1}


def matrix(
    shape: tuple[int, int], strategy: str = "pio", kinds: tuple[str, ...] = KINDS, radius: Any = 1.0, seed: int = 0
) -> Any:
    groups = collection(*shape, strategy, kinds, "random", seed, components="block")
    return weight_on(ProductOfGroups(groups, shape, radius), torch.float32, torch.contiguous_format, seed)


def matrices() -> list[Any]:
    return [matrix((48, 40)), matrix((24, 64), "po", seed=1), matrix((64, 20), "pi", ("oblique", "stiefel"), 0.7, 2)]


@given(
    data=st.data(),
    shape=st.tuples(st.integers(16, 70), st.integers(16, 70)),
    strategy=st.sampled_from(["pi", "po", "pio"]),
    others=st.lists(st.sampled_from(["sphere", "oblique", "euclidean"]), min_size=1, max_size=3, unique=True),
    radius=st.sampled_from([0.7, dict(zip(KINDS, (1.0, 0.5, 1.5, 2.0), strict=True))]),
    options=option_sets,
    scale=scales,
    instruction_set=st.sampled_from(INSTRUCTION_SETS),
)
def test_the_step_is_that_in_double_precision(
    data: st.DataObject,
    shape: tuple[int, int],
    strategy: str,
    others: list[str],
    radius: Any,
    options: dict[str, Any],
    scale: float,
    instruction_set: int,
) -> None:
    kinds = tuple(data.draw(st.permutations([*others, "stiefel"])))
    if isinstance(radius, dict):
        radius = {kind: radius[kind] for kind in kinds}
    weight = matrix(shape, strategy, kinds, radius, data.draw(st.integers(0, 99)))
    with limited_to(instruction_set):
        swept = trained("fused", [weight], 4, scale, **options)
    assert_close(swept, trained("reference", [in_double(weight)], 4, scale, **options), CLOSE)


@pytest.mark.parametrize(("momentum", "first"), [(0.0, 1), (0.9, 2)])
def test_the_sweep_is_taken_once_the_weights_are_known(momentum: float, first: int) -> None:
    weights = matrices()
    optimizer = RiemannianFGSGD(weights, lr=0.1, momentum=momentum)
    give_gradients(weights)
    assert [sweeps_of(optimizer.step) for _ in range(first + 3)] == [TWO_SWEEPS] * first + [WEIGHT_BY_WEIGHT] * 3


@pytest.mark.parametrize("options", [{"norm": "running"}, {"step_size": "angle"}])
def test_step_sizes_that_need_more_than_a_groups_norm_take_two_sweeps(options: dict[str, Any]) -> None:
    assert sweeps_of(after_two_steps(matrices(), **options).step) == TWO_SWEEPS


def test_a_weight_that_was_changed_from_outside_takes_two_sweeps_once() -> None:
    weights = matrices()
    optimizer = after_two_steps(weights)
    with torch.no_grad():
        weights[1].mul_(1.0)
    assert sweeps_of(optimizer.step) == TWO_SWEEPS
    assert sweeps_of(optimizer.step) == WEIGHT_BY_WEIGHT


def test_other_matrices_are_left_to_other_paths() -> None:
    """Without lines, without Stiefel blocks, and in double precision."""
    path = NativeMatrices()
    assert answer(path, matrix((48, 40))) == tuple(range(8))
    assert isinstance(answer(path, matrix((48, 40), "po", ("stiefel",))), Refusal)
    assert answer(path, matrix((48, 40), "po", ("sphere", "oblique"))) == ()
    assert isinstance(answer(path, in_double(matrix((48, 40)))), Refusal)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_is_refused_before_any_weight_has_moved(value: float) -> None:
    weights = matrices()
    optimizer = after_two_steps(weights)
    weights[2].grad[63, 19] = value
    before = copy.deepcopy([w.detach() for w in weights]), copy.deepcopy(optimizer.state_dict()["state"])
    with pytest.raises(FloatingPointError, match=r"params'\]\[2\].*no parameter was changed"):
        optimizer.step()
    assert all(torch.equal(w.detach(), old) for w, old in zip(weights, before[0], strict=True))
    for k, state in before[1].items():
        assert torch.equal(optimizer.state_dict()["state"][k]["momentum_buffer"], state["momentum_buffer"])


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_without_the_check_a_bad_group_is_left_out(value: float) -> None:
    """As on the reference path, and without a look at the gradients."""
    results, counts = [], []
    for is_single in (True, False):
        weights = matrices() if is_single else [in_double(w) for w in matrices()]
        optimizer = RiemannianFGSGD(weights, lr=0.1, momentum=0.9, check_finite=False)
        for step in range(4):
            give_gradients(weights)
            if step == 2:
                weights[1].grad[5, 7] = value
            calls = sweeps_of(optimizer.step)
            assert not is_single or step < 2 or calls == {"fgo_matrix_step": 1}
        results.append([w.detach().double() for w in weights])
        counts.append(optimizer.skipped_groups())
    assert counts == [1, 1]
    for swept, expected in zip(*results, strict=True):
        torch.testing.assert_close(swept, expected, rtol=0, atol=CLOSE)


def test_a_weight_that_became_no_number_behind_autograds_back_stays_and_is_refused_a_step_later() -> None:
    weights = matrices()
    optimizer = after_two_steps(weights)
    weights[0].data[3, 5] = math.nan
    before = [w.detach().clone() for w in weights]
    assert sweeps_of(optimizer.step) == WEIGHT_BY_WEIGHT
    assert optimizer.skipped_groups() == 1
    torch.testing.assert_close(weights[0].detach(), before[0], rtol=0, atol=0, equal_nan=True)
    assert bool((weights[1].detach() != before[1]).any())
    with pytest.raises(FloatingPointError, match="is not finite itself"):
        optimizer.step()


@pytest.mark.parametrize("tensor", ["weight", "momentum"])
def test_a_block_that_became_no_number_is_refused_though_its_gradients_are_short(tensor: str) -> None:
    weights = matrices()
    optimizer = after_two_steps(weights)
    partition = weights[0].manifold.partition
    parts = partition.split(weights[0].detach().as_subclass(torch.Tensor))
    chosen = [torch.full_like(part, kind == "stiefel") for part, kind in zip(parts, partition.kinds, strict=True)]
    target = weights[0].data if tensor == "weight" else optimizer.state[weights[0]]["momentum_buffer"]
    target[partition.merge(chosen) > 0] = math.nan
    for weight in weights:
        weight.grad = torch.full_like(weight, 1e-3)
    optimizer.step()
    assert_refused(optimizer, weights)


def test_blocks_that_products_do_not_retract_are_factorised() -> None:
    """Steps of a hundred radii; the lines of such a weight are moved afterwards."""
    options = {"momentum": 0.9, "step_size": "constant", "lr": 1e4}
    weights = matrices()
    optimizer = after_two_steps(weights, **{**options, "lr": 0.1})
    optimizer.param_groups[0]["lr"] = 1e4
    assert sweeps_of(optimizer.step) == {**WEIGHT_BY_WEIGHT, "fgo_line_update": 3}
    actual = trained("auto", matrices(), 3, 0.1, **options)
    assert_close(actual, trained("reference", [in_double(w) for w in matrices()], 3, 0.1, **options), 1e-3)
    for weight in weights:
        assert float(weight.manifold.violation(weight.detach()).max()) < CLOSE


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_agree(threads: int) -> None:
    weights = [matrix((512, 300)), matrix((256, 520), "pi", seed=1), *matrices()]
    expected = trained("fused", weights, 4, 0.3, momentum=0.9)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        actual = trained("fused", weights, 4, 0.3, momentum=0.9)
    finally:
        torch.set_num_threads(before)
    assert_close(actual, expected, 1e-6)
