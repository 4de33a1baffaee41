"""Channel-directed gradients by the compiled sweeps, and by the torch code that stands in for them."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from channel_directions import ENDS, METRICS, drawn, slow_gradient
from hypothesis import given
from hypothesis import strategies as st
from path_helpers import INSTRUCTION_SETS, built, limited_to
from torch import Tensor

from fgo_geo.optim.channel_metrics import Direction, channel_directed_gradient, direct_gradients
from fgo_geo.paths.native import channels


def permuted(shape: list[int], order: list[int], seed: int) -> Tensor:
    """A tensor without gaps, whose dimensions lie in memory in a given order."""
    stored = drawn(tuple(shape[k] for k in order), seed, torch.float32)
    return stored.permute(*(order.index(k) for k in range(len(shape))))


@built
@given(st.data())
def test_many_gradients_of_any_layout_at_once(data: st.DataObject) -> None:
    draw = data.draw
    gradients: list[Tensor] = []
    directions: list[Direction] = []
    for seed in range(draw(st.integers(1, 3))):
        shape = draw(st.lists(st.sampled_from([1, 2, 3, 5, 16, 33]), min_size=1, max_size=3))
        axis, groups = draw(st.integers(0, len(shape) - 1)), draw(st.integers(1, 2))
        shape[axis] *= groups
        gradients.append(permuted(shape, draw(st.permutations(range(len(shape)))), seed))
        metric, ends = draw(st.sampled_from(METRICS)), draw(st.sampled_from(ENDS))
        directions.append(Direction(metric, draw(st.floats(1e-2, 1e3)), axis, ends, groups))
    assert all(channels.takes(g) for g in gradients)
    expected = [slow_gradient(g, *direction) for g, direction in zip(gradients, directions, strict=True)]
    versions = [g._version for g in gradients]
    with limited_to(draw(st.sampled_from(INSTRUCTION_SETS))):
        direct_gradients(gradients, directions)
    for g, wanted, version in zip(gradients, expected, versions, strict=True):
        size = max(1.0, float(wanted.abs().max()))
        torch.testing.assert_close(g.double() / size, wanted / size, rtol=0, atol=1.2e-7)  # rounded once
        assert g._version > version


@built
@given(
    st.tuples(st.integers(1, 3), st.sampled_from([1, 2, 17, 70, 130]), st.integers(510, 1700)),
    st.integers(1, 2),
    st.sampled_from(INSTRUCTION_SETS),
    st.integers(1, 2),
)
def test_many_columns_at_once(shape: tuple[int, int, int], groups: int, instructions: str, threads: int) -> None:
    """Rows so long that the metric h0 takes more than a cache line of them at once."""
    outer, length, inner = shape
    g = drawn((outer, groups * length, inner), dtype=torch.float32)
    split = g.double().unflatten(1, (groups, length))
    mean = split.mean(2, keepdim=True)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with limited_to(instructions):
            direct_gradients([g], [Direction("h0", 3.0, 1, "periodic", groups)])
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(g.double(), (mean + (split - mean) / 3).flatten(1, 2), rtol=0, atol=2.4e-7)


@built
def test_a_layout_that_is_kept_is_never_taken_for_another() -> None:
    """Gradients that differ from the ones before in shape, strides, axis or groups alone, twice in a row."""
    layouts = [
        *(
            ((6, 4, 3), order, axis, groups)
            for order in ([0, 1, 2], [2, 0, 1])
            for axis, groups in ((0, 1), (0, 2), (1, 1))
        ),
        *(((2, 4, 3), [0, 1, 2], 0, groups) for groups in (1, 2)),
        ((4, 3, 6), [2, 0, 1], 2, 1),
    ]
    for (shape, order, axis, groups), again in itertools.product(layouts, range(2)):
        g = permuted([*shape], order, again)
        assert channels.takes(g)
        direction = Direction("h1", 3.0, axis, "periodic", groups)
        wanted = slow_gradient(g, *direction)
        direct_gradients([g], [direction])
        torch.testing.assert_close(g.double(), wanted, rtol=0, atol=1e-6)
        rows = permuted([shape[0], 2 * shape[1], shape[2]], [0, 1, 2], 0)[:, ::2]
        assert not channels.takes(rows)
        assert not channels.takes(rows[:, :1].expand(shape))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("ends", ENDS)
@pytest.mark.parametrize("length", [1, 2, 3, 8, 33])
def test_the_torch_code_stands_in(monkeypatch: pytest.MonkeyPatch, metric: Any, ends: Any, length: int) -> None:
    monkeypatch.setattr(channels, "runs", lambda: False)
    g = drawn((length, 3, 2))
    wanted = slow_gradient(g, metric, 2.0, 0, ends)
    torch.testing.assert_close(channel_directed_gradient(g, metric, 2.0, ends=ends), wanted, rtol=1e-9, atol=1e-9)
    direct_gradients([g], [Direction(metric, 2.0, 0, ends, 1)])
    torch.testing.assert_close(g, wanted, rtol=1e-9, atol=1e-9)


@built
def test_awkward_lengths_take_no_longer() -> None:
    """A Fourier transform of this prime number plus two takes as long as several."""
    g = drawn((65537, 4), dtype=torch.float32)
    with torch.profiler.profile() as profiled:
        result = channel_directed_gradient(g, "h1", 5.0)
    names = {event.key for event in profiled.key_averages()}
    assert "fgo_direct" in names
    assert not any("fft" in name for name in names)
    torch.testing.assert_close(result.double().mean(0), g.double().mean(0), atol=1e-7, rtol=0)


@pytest.mark.parametrize(
    "g",
    [torch.zeros(4, 3, dtype=torch.float64), torch.zeros(4, 6)[:, ::2], torch.zeros(3).expand(4, 3)],
    ids=["double precision", "gaps", "repeated"],
)
def test_what_the_sweeps_cannot_take_goes_the_other_way(g: Tensor) -> None:
    assert not channels.takes(g)
    assert channel_directed_gradient(g, "h1").shape == g.shape
