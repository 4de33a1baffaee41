"""Channel-directed gradients: the definition and the numbers, tensor by tensor."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from channel_directions import ENDS, METRICS, drawn, slow_gradient, slow_inner
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fgo_geo.optim.channel_metrics import channel_directed_gradient, channel_inner


def green_gradient(g: Tensor, metric: str, lam: float, ends: str, channels: np.ndarray) -> np.ndarray:
    """Sobolev gradients at some channels, by their Green's functions, in extended precision where there is any."""
    d = len(g)
    period = d if ends == "periodic" else 2 * d
    n, x, lam_ = np.longdouble(period), np.arange(period).astype(np.longdouble), np.longdouble(lam)
    if metric == "h1":
        log_decay = -2 * np.arcsinh(1 / (2 * np.sqrt(lam_)))
        image_sum = (np.exp(log_decay * x) + np.exp(log_decay * (n - x))) / -np.expm1(log_decay * n)
        kernel = image_sum / np.sqrt(1 + 4 * lam_)
    else:
        kernel = 1 / n + ((n * n - 1) / (12 * n) - x * (n - x) / (2 * n)) / lam_
    i, j = channels[:, None], np.arange(d)
    response = kernel[(i - j) % period]
    if ends == "free":
        response = response + kernel[(i + j + 1) % period]
    return response @ g.double().numpy().astype(np.longdouble)


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, dict[str, Any]]:
    """A float64 tensor and arguments that fit it."""
    shape = draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    axis = draw(st.integers(-len(shape), len(shape) - 1))
    groups = draw(st.integers(1, 3))
    shape[axis] *= groups
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    options = {
        "metric": draw(st.sampled_from(METRICS)),
        "lam": draw(st.floats(1e-2, 1e3)),
        "axis": axis,
        "ends": draw(st.sampled_from(ENDS)),
        "groups": groups,
    }
    return torch.randn(shape, generator=generator, dtype=torch.float64), options


# -- the definition ----------------------------------------------------------------------------------------------------


@given(problems())
def test_the_gradient_is_a_dense_solve(problem: tuple[Tensor, dict[str, Any]]) -> None:
    g, options = problem
    torch.testing.assert_close(
        channel_directed_gradient(g, **options), slow_gradient(g, **options), rtol=1e-9, atol=1e-9
    )


@given(problems(), st.integers(0, 2**31))
def test_the_inner_product_is_its_definition(problem: tuple[Tensor, dict[str, Any]], seed: int) -> None:
    h, options = problem
    k = drawn(h.shape, seed)
    axis, groups = options.pop("axis"), options.pop("groups")
    expected = 0.0
    for run_h, run_k in zip(h.chunk(groups, axis), k.chunk(groups, axis), strict=True):
        columns_h = run_h.movedim(axis, -1).flatten(0, -2) if h.ndim > 1 else run_h[None]
        columns_k = run_k.movedim(axis, -1).flatten(0, -2) if h.ndim > 1 else run_k[None]
        for a, b in zip(columns_h.tolist(), columns_k.tolist(), strict=True):
            expected += slow_inner(a, b, **options)
    result = channel_inner(h, k, **options, axis=axis, groups=groups)
    torch.testing.assert_close(result, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-8)


@given(problems(), st.integers(0, 2**31))
def test_the_gradient_represents_the_differential(problem: tuple[Tensor, dict[str, Any]], seed: int) -> None:
    g, options = problem
    h = drawn(g.shape, seed)
    directed = channel_directed_gradient(g, **options)
    torch.testing.assert_close(channel_inner(directed, h, **options), (g * h).sum(), rtol=1e-9, atol=1e-8)


@given(problems(), st.integers(0, 2**31))
def test_the_map_is_symmetric_positive_and_keeps_the_mean(problem: tuple[Tensor, dict[str, Any]], seed: int) -> None:
    g, options = problem
    h = drawn(g.shape, seed)
    directed = channel_directed_gradient(g, **options)
    torch.testing.assert_close(
        (directed * h).sum(), (g * channel_directed_gradient(h, **options)).sum(), rtol=1e-9, atol=1e-8
    )
    assert (directed * g).sum() > 0
    for before, after in zip(
        g.chunk(options["groups"], options["axis"]), directed.chunk(options["groups"], options["axis"]), strict=True
    ):
        torch.testing.assert_close(after.mean(options["axis"]), before.mean(options["axis"]), rtol=1e-9, atol=1e-9)


@given(problems(), st.data())
def test_the_axis_moves_with_a_permutation(problem: tuple[Tensor, dict[str, Any]], data: st.DataObject) -> None:
    g, options = problem
    order = data.draw(st.permutations(range(g.ndim)))
    moved = options | {"axis": order.index(options["axis"] % g.ndim)}
    expected = channel_directed_gradient(g, **options).permute(order)
    torch.testing.assert_close(channel_directed_gradient(g.permute(order), **moved), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("metric", "lam", "ends", "expected"),
    [
        ("h0", 2.0, "periodic", [5 / 8, 1 / 8, 1 / 8, 1 / 8]),
        ("h1", 1.0, "periodic", [7 / 15, 3 / 15, 2 / 15, 3 / 15]),
        ("h1", 1.0, "free", [13 / 21, 5 / 21, 2 / 21, 1 / 21]),
        ("h1t", 1.0, "periodic", [9 / 16, 3 / 16, 1 / 16, 3 / 16]),
        ("h1t", 1.0, "free", [9 / 8, 3 / 8, -1 / 8, -3 / 8]),
    ],
)
def test_four_channels_by_hand(metric: Any, lam: float, ends: Any, expected: list[float]) -> None:
    g = torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    result = channel_directed_gradient(g, metric, lam, ends=ends)
    torch.testing.assert_close(result, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-15)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("ends", ENDS)
def test_limits(metric: Any, ends: Any) -> None:
    g = drawn((12, 5))
    mean = g.mean(0).expand_as(g)
    torch.testing.assert_close(channel_directed_gradient(g, metric, 1e14, ends=ends), mean, rtol=0, atol=1e-11)
    if metric == "h0":
        assert torch.equal(channel_directed_gradient(g, "h0", 1.0), g)
    if metric == "h1":
        torch.testing.assert_close(channel_directed_gradient(g, "h1", 0.0, ends=ends), g, rtol=0, atol=1e-14)
    one = drawn((1, 5))
    torch.testing.assert_close(channel_directed_gradient(one, metric, 3.0, ends=ends), one, rtol=0, atol=0)


@pytest.mark.parametrize("length", [1, 2, 3, 257, 4096])
@pytest.mark.parametrize("ends", ENDS)
@pytest.mark.parametrize("metric", ["h1", "h1t"])
def test_exact_to_round_off(metric: Any, ends: Any, length: int) -> None:
    g = drawn((length, 2), length, torch.float32)
    channels = np.unique(np.linspace(0, length - 1, 100, dtype=int))
    for lam in (1e-2, 1.0, 1e3, 1e6):
        exact = green_gradient(g, metric, lam, ends, channels)
        for dtype, bound in ((torch.float32, 2e-6), (torch.float64, 1e-14)):
            result = channel_directed_gradient(g.to(dtype), metric, lam, ends=ends).double().numpy()
            assert np.linalg.norm(result[channels] - exact) <= bound * np.linalg.norm(exact)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("metric", METRICS)
def test_half_precision_is_rounded_once(metric: Any, dtype: torch.dtype) -> None:
    g = drawn((64, 7)).to(dtype)
    result = channel_directed_gradient(g, metric, 10.0)
    assert result.dtype == dtype
    assert torch.equal(result, channel_directed_gradient(g.float(), metric, 10.0).to(dtype))


def test_input_is_left_alone_and_the_result_is_contiguous() -> None:
    g = drawn((8, 4, 3, 3)).to(memory_format=torch.channels_last)
    before = g.clone()
    for metric in METRICS:
        result = channel_directed_gradient(g, metric, 2.0, axis=1, groups=2)
        assert result.is_contiguous()
        assert torch.equal(g, before)
        torch.testing.assert_close(result, slow_gradient(g, metric, 2.0, 1, "periodic", 2))


@pytest.mark.parametrize("metric", METRICS)
def test_differentiable(metric: Any) -> None:
    g, h = drawn((6, 2)).requires_grad_(), drawn((6, 2), 1)
    (channel_directed_gradient(g, metric, 2.0, ends="free") * h).sum().backward()
    torch.testing.assert_close(g.grad, channel_directed_gradient(h, metric, 2.0, ends="free"))


def test_compiles_as_one_graph() -> None:
    torch.compiler.reset()
    compiled = torch.compile(channel_directed_gradient, fullgraph=True, backend="eager")
    for dtype, rounding in ((torch.float64, 1e-14), (torch.bfloat16, 2.0**-7)):  # the uncompiled call takes other sums
        for metric in METRICS:
            arguments = (drawn((6, 4), dtype=dtype), metric, 2.0, 0, "free", 2)
            expected = channel_directed_gradient(*arguments)
            torch.testing.assert_close(compiled(*arguments), expected, rtol=rounding, atol=rounding / 64)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metric": "h2"}, "metric is 'h2', expected one of h0, h1, h1t"),
        ({"ends": "open"}, "ends is 'open', expected one of periodic, free"),
        ({"metric": "h0", "lam": 0.0}, "lam is 0.0, but .* h0 .* above 0"),
        ({"metric": "h1", "lam": -1.0}, "lam is -1.0, but .* h1 .* at least 0"),
        ({"metric": "h1t", "lam": math.inf}, "lam is inf, but .* h1t .* finite"),
        ({"axis": 2}, r"axis is 2, but .* shape \(6, 4\): expected an axis in \[-2, 2\)"),
        ({"groups": 4}, r"groups is 4, but axis 0 .* has 6 channels: expected a positive divisor"),
        ({"groups": 0}, "groups is 0"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        channel_directed_gradient(drawn((6, 4)), **options)
    with pytest.raises(ValueError, match=message):
        channel_inner(drawn((6, 4)), drawn((6, 4)), **options)


def test_bad_tensors_are_refused() -> None:
    with pytest.raises(TypeError, match=r"type torch\.int64, expected a real floating-point type"):
        channel_directed_gradient(torch.ones(4, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"type torch\.complex64"):
        channel_directed_gradient(torch.ones(4, dtype=torch.complex64))
    with pytest.raises(ValueError, match=r"shape \(0, 4\): axis 0 holds no channel"):
        channel_directed_gradient(torch.ones(0, 4))
    with pytest.raises(ValueError, match=r"axis is 0, but .* shape \(\)"):
        channel_directed_gradient(torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"one shape, but got \(2,\) and \(3,\)"):
        channel_inner(torch.ones(2), torch.ones(3))
