"""Steps in which bounds on the gradients take the place of norms: the same bits, and fewer sweeps."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from path_helpers import KINDS, assert_refused, built, sweeps_of, weight_on

from fgo_geo import ProductOfGroups, RiemannianFGSGD
from fgo_geo.grouping import collection

pytestmark = built


def on_groups(shape: tuple[int, ...], strategy: str, memory_format: torch.memory_format, seed: int) -> Any:
    kinds = KINDS if strategy != "layer" else ("stiefel",)
    components = "block" if len(shape) == 2 else "kernel"
    groups = collection(*shape[:2], strategy, kinds, "random", seed, components=components)
    manifold = ProductOfGroups(groups, shape, 0.7)
    return weight_on(manifold, torch.float32, memory_format, seed)


def give_gradients(weights: list[Any], step: int, size: float) -> None:
    for seed, weight in enumerate(weights):
        generator = torch.Generator().manual_seed(100 * step + seed)
        grad = torch.randn(weight.shape, generator=generator)
        weight.grad = torch.empty_like(weight).copy_(size * grad / grad.norm())


@given(
    strategy=st.sampled_from(["pi", "po", "pio"]),
    size=st.sampled_from([0.05, 0.3, 1.0, 20.0]),
    matrix=st.booleans(),
    channels_last=st.booleans(),
    options=st.fixed_dictionaries(
        {
            "momentum": st.sampled_from([0.0, 0.9]),
            "weight_decay": st.sampled_from([0.0, 0.1]),
            "maximize": st.booleans(),
            "radius_invariant": st.booleans(),
            "step_size": st.sampled_from(["theorem", "constant"]),
        }
    ),
)
def test_bits_are_those_of_steps_that_measure(
    strategy: str, size: float, matrix: bool, channels_last: bool, options: dict[str, Any]
) -> None:
    """An optimiser that is asked for its state forgets what it knows of the weights, and measures in every step."""
    memory_format = torch.channels_last if channels_last and not matrix else torch.contiguous_format
    shapes = [(48, 40), (24, 64)] if matrix else [(8, 12, 3, 3), (6, 20, 5, 5)]
    results: list[Any] = []
    for forgets in (False, True):
        weights = [on_groups(shape, strategy, memory_format, seed) for seed, shape in enumerate(shapes)]
        optimizer = RiemannianFGSGD(weights, lr=0.1, **options)
        scales: list[torch.Tensor] = []
        for step in range(5):
            give_gradients(weights, step, size * (3 if step == 3 else 1))
            if forgets:
                optimizer.state_dict()
            optimizer.step()
            scales += optimizer.step_scales().values()
        results.append(([w.detach().clone() for w in weights], scales))
    for one, other in zip(results[0][0] + results[0][1], results[1][0] + results[1][1], strict=True):
        assert torch.equal(one, other)


def after(steps: int, size: float, **options: Any) -> tuple[list[Any], RiemannianFGSGD]:
    weights = [on_groups((8, 12, 3, 3), "pio", torch.contiguous_format, seed) for seed in (0, 1)]
    optimizer = RiemannianFGSGD(weights, lr=0.1, momentum=0.9, **options)
    for step in range(steps):
        give_gradients(weights, step, size)
        optimizer.step()
    return weights, optimizer


def test_short_gradients_take_bounds_in_place_of_norms() -> None:
    _, optimizer = after(2, 0.1)
    assert sweeps_of(optimizer.step) == {"fgo_bounds": 1, "fgo_update": 1}


def test_long_gradients_are_looked_at_now_and_then() -> None:
    _, optimizer = after(2, 100.0)
    looks = [sweeps_of(optimizer.step) for _ in range(17)]
    assert looks[0] == looks[16] == {"fgo_bounds": 1, "fgo_norms": 1, "fgo_update": 1}
    assert looks[1:16] == [{"fgo_norms": 1, "fgo_update": 1}] * 15


@pytest.mark.parametrize("options", [{"step_size": "angle"}, {"norm": "running"}, {"curvature": "manifold"}])
def test_what_needs_norms_measures_them(options: dict[str, Any]) -> None:
    _, optimizer = after(2, 0.1, **options)
    assert sweeps_of(optimizer.step) == {"fgo_norms": 1, "fgo_update": 1}


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_is_refused(value: float) -> None:
    weights, optimizer = after(3, 0.1)
    weights[1].grad[2, 3, 1, 1] = value
    before = [w.detach().clone() for w in weights]
    with pytest.raises(FloatingPointError, match="gradient"):
        optimizer.step()
    assert all(torch.equal(w.detach(), old) for w, old in zip(weights, before, strict=True))


def test_a_point_that_became_no_number_is_refused_a_step_later() -> None:
    """``param.data`` tells no one, but the step notices what it computes."""
    weights, optimizer = after(3, 0.1)
    table = weights[1].manifold.partition
    first = next(part for part, kind in enumerate(table.kinds) if kind != "euclidean")
    marked = [torch.zeros_like(part) for part in table.split(weights[1].detach().as_subclass(torch.Tensor))]
    marked[first][0, 0, 0] = 1
    weights[1].data[table.merge(marked) > 0] = math.nan
    optimizer.step()
    assert_refused(optimizer, weights)
