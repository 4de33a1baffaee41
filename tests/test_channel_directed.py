"""Channel-directed gradients: the definition, the numbers, and every way of attaching them to an optimiser."""

from __future__ import annotations

import copy
import io
import math
import pickle
import sys
from collections.abc import Callable
from typing import Any

import geoopt
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import fgo_geo
from fgo_geo.optim.channel_directed import channel_directed, channel_directed_gradient, channel_inner

MODULE = sys.modules[channel_directed.__module__]  # the function has the same name as its module
METRICS = ("h0", "h1", "h1t")
ENDS = ("periodic", "free")


# -- oracles -----------------------------------------------------------------------------------------------------------


def slow_inner(h: list[float], k: list[float], metric: str, lam: float, ends: str) -> float:
    """The inner product of two vectors, term by term from its definition."""
    d = len(h)
    mean_h, mean_k = sum(h) / d, sum(k) / d
    total = sum(h[i] * k[i] for i in range(d)) if metric == "h1" else d * mean_h * mean_k
    if metric == "h0":
        return total + lam * sum((h[i] - mean_h) * (k[i] - mean_k) for i in range(d))
    for i in range(d if ends == "periodic" else d - 1):
        total += lam * (h[(i + 1) % d] - h[i]) * (k[(i + 1) % d] - k[i])
    return total


def dense_metric(d: int, metric: str, lam: float, ends: str) -> np.ndarray:
    unit = np.eye(d).tolist()
    return np.array([[slow_inner(unit[i], unit[j], metric, lam, ends) for j in range(d)] for i in range(d)])


def slow_gradient(g: Tensor, metric: str, lam: float, axis: int, ends: str, groups: int = 1) -> Tensor:
    """A dense solve in float64 for every run of the axis."""
    runs = np.split(np.moveaxis(g.double().numpy(), axis, 0), groups)
    matrix = dense_metric(len(runs[0]), metric, lam, ends)
    solved = [np.linalg.solve(matrix, run.reshape(len(run), -1)).reshape(run.shape) for run in runs]
    return torch.from_numpy(np.moveaxis(np.concatenate(solved), 0, axis).copy())


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


def drawn(shape: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


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
    g = drawn((6, 4), dtype=torch.bfloat16)
    for metric in METRICS:
        arguments = (g, metric, 2.0, 0, "free", 2)
        assert torch.equal(compiled(*arguments), channel_directed_gradient(*arguments))


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


# -- optimiser by optimiser --------------------------------------------------------------------------------------------

Make = Callable[[list[Tensor]], torch.optim.Optimizer]

OPTIMISERS: dict[str, Make] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    "SGD fused": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.1),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.1),
    "RiemannianSGD": lambda p: geoopt.optim.RiemannianSGD(p, lr=0.1, momentum=0.9),
    "RiemannianAdam": lambda p: geoopt.optim.RiemannianAdam(p, lr=0.1),
    "RiemannianFGSGD": lambda p: fgo_geo.RiemannianFGSGD(p, lr=0.1, momentum=0.9),
} | ({"Muon": lambda p: torch.optim.Muon(p, lr=0.1)} if hasattr(torch.optim, "Muon") else {})


def twin_weights(shape: tuple[int, ...] = (6, 4)) -> tuple[nn.Parameter, nn.Parameter]:
    weight = drawn(shape)
    return nn.Parameter(weight.clone()), nn.Parameter(weight.clone())


@pytest.mark.parametrize("restore_grad", [False, True])
@pytest.mark.parametrize("name", OPTIMISERS)
def test_every_optimiser_steps_with_the_directed_gradient(name: str, restore_grad: bool) -> None:
    attached, plain = twin_weights()
    first, second = OPTIMISERS[name]([attached]), OPTIMISERS[name]([plain])
    handle = channel_directed(first, "h1", lam=2.0, ends="free", restore_grad=restore_grad)
    for step in range(3):
        g = drawn((6, 4), step)
        directed = channel_directed_gradient(g, "h1", lam=2.0, ends="free")
        attached.grad, plain.grad = g.clone(), directed
        held = attached.grad
        first.step()
        second.step()
        assert torch.equal(attached, plain)
        assert attached.grad is held
        if restore_grad:
            assert torch.equal(held, g)
    handle.remove()
    attached.grad, plain.grad = drawn((6, 4), 3), drawn((6, 4), 3)
    first.step()
    second.step()
    assert torch.equal(attached, plain)


def test_accumulated_gradients_are_directed_once() -> None:
    weight = nn.Parameter(drawn((6, 4)))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    channel_directed(optimizer, "h0", lam=4.0)
    first, second = drawn((6, 4), 1), drawn((6, 4), 2)
    (weight * first).sum().backward()
    (weight * second).sum().backward()
    optimizer.step()
    torch.testing.assert_close(weight.grad, slow_gradient(first + second, "h0", 4.0, 0, "periodic"))


@pytest.mark.parametrize("name", ["SGD", "SGD fused"])
def test_grad_scaler_and_clipping_come_first(name: str) -> None:
    attached, plain = (nn.Parameter(w.detach().float()) for w in twin_weights())
    first, second = OPTIMISERS[name]([attached]), OPTIMISERS[name]([plain])
    channel_directed(first, "h1", lam=2.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    g = drawn((6, 4), 1).float()
    for clip in (False, True):
        attached.grad = None
        scaler.scale((attached * g).sum()).backward()
        plain.grad = g.clone()
        if clip:
            scaler.unscale_(first)
            nn.utils.clip_grad_norm_([attached], 0.5)
            nn.utils.clip_grad_norm_([plain], 0.5)
        scaler.step(first)
        scaler.update()
        plain.grad = channel_directed_gradient(plain.grad, "h1", lam=2.0)
        second.step()
        torch.testing.assert_close(attached, plain)


def test_grad_scaler_skips_the_step_of_infinite_gradients() -> None:
    weight = nn.Parameter(drawn((6, 4)).float())
    before = weight.detach().clone()
    optimizer = torch.optim.SGD([weight], lr=0.1)
    channel_directed(optimizer, "h1")
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale((weight * math.inf).sum()).backward()
    scaler.step(optimizer)
    assert torch.equal(weight, before)


# -- closures ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("restore_grad", [False, True])
@pytest.mark.parametrize("by_name", [False, True])
def test_closures_get_their_own_gradients_directed(by_name: bool, restore_grad: bool) -> None:
    weight, g = nn.Parameter(drawn((6, 4))), drawn((6, 4), 1)
    before = weight.detach().clone()
    optimizer = torch.optim.SGD([weight], lr=0.1)
    channel_directed(optimizer, "h1", restore_grad=restore_grad)
    weight.grad = drawn((6, 4), 2)  # stale: the closure replaces it

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (weight * g).sum()
        loss.backward()
        return loss

    loss = optimizer.step(closure=closure) if by_name else optimizer.step(closure)
    directed = slow_gradient(g, "h1", 1.0, 0, "periodic")
    torch.testing.assert_close(loss.detach(), (before * g).sum())
    torch.testing.assert_close(weight.detach(), before - 0.1 * directed)
    torch.testing.assert_close(weight.grad, g if restore_grad else directed)


def test_restored_gradients_are_forgotten() -> None:
    weight = nn.Parameter(drawn((6, 4)))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    channel_directed(optimizer, "h1", restore_grad=True)
    weight.grad = drawn((6, 4), 1)
    optimizer.step()
    optimizer.zero_grad()
    optimizer.step()
    assert weight.grad is None


class EvaluatesTwice(torch.optim.Optimizer):
    """Calls its closure twice; the gradients of the second evaluation add to those of the first."""

    def __init__(self, params: list[Tensor]) -> None:
        super().__init__(params, {})

    def step(self, closure: Callable[[], Tensor]) -> None:  # type: ignore[override]
        closure()
        closure()


def test_evaluations_of_a_closure_accumulate_plain_gradients() -> None:
    weight, g = nn.Parameter(drawn((6, 4))), drawn((6, 4), 1)
    seen: list[Tensor] = []
    optimizer = EvaluatesTwice([weight])
    channel_directed(optimizer, "h0", lam=4.0, restore_grad=True)

    def closure() -> None:
        with torch.enable_grad():
            (weight * g).sum().backward()
        seen.append(weight.grad.clone())

    optimizer.step(closure)
    torch.testing.assert_close(seen, [g, 2 * g])
    torch.testing.assert_close(weight.grad, 2 * g)


# -- which parameters --------------------------------------------------------------------------------------------------


class Zoo(nn.Module):
    """One layer of every kind that the rule knows, and some that it doesn't."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(4, 6, 3, groups=2)
        self.conv2 = nn.Conv2d(4, 6, (3, 1))
        self.conv3 = nn.Conv3d(2, 4, 2)
        self.depthwise = nn.Conv2d(4, 8, 3, groups=4)
        self.up = nn.ConvTranspose2d(4, 6, 3, groups=2)
        self.fc = nn.Linear(5, 3)
        self.attention = nn.MultiheadAttention(4, 2, add_bias_kv=True)
        self.normed = parametrizations.weight_norm(nn.Linear(3, 4))
        self.embedding = nn.Embedding(7, 4)
        self.tied = nn.Linear(4, 7, bias=False)
        self.tied.weight = self.embedding.weight
        self.bilinear = nn.Bilinear(2, 3, 4)
        self.norm = nn.LayerNorm([3, 4])
        self.batch_norm = nn.BatchNorm2d(4)
        self.position = nn.Parameter(torch.zeros(5, 4))


OUTPUT = {
    "conv1.weight": (0, 2),
    "conv2.weight": (0, 1),
    "conv3.weight": (0, 1),
    "depthwise.weight": (0, 4),
    "up.weight": (1, 1),
    "fc.weight": (0, 1),
    "attention.in_proj_weight": (0, 3),
    "attention.out_proj.weight": (0, 1),
}
INPUT = dict.fromkeys(OUTPUT, (1, 1)) | {"up.weight": (0, 2)}


@pytest.mark.parametrize(("axis", "expected"), [("output", OUTPUT), ("input", INPUT)])
def test_layers_tell_the_axis_and_the_groups(axis: Any, expected: dict[str, tuple[int, int]]) -> None:
    model = Zoo()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    handle = channel_directed(optimizer, "h1", lam=3.0, axis=axis, module=model)
    gradients = {name: drawn(tuple(p.shape), i).float() for i, (name, p) in enumerate(model.named_parameters())}
    for name, parameter in model.named_parameters():
        parameter.grad = gradients[name].clone()
    optimizer.step()
    for name, parameter in model.named_parameters():
        g = gradients[name]
        if name in expected:
            along, groups = expected[name]
            g = slow_gradient(g, "h1", 3.0, along, "periodic", groups).float()
        torch.testing.assert_close(parameter.grad, g, msg=lambda text, name=name: f"{name}: {text}")
    names = {parameter: name for name, parameter in model.named_parameters()}
    assert {names[p] for p in handle.parameters} == set(expected)


def test_the_summary_says_what_and_why() -> None:
    model = Zoo()
    handle = channel_directed(torch.optim.AdamW(model.parameters()), "h0", lam=2.0, module=model)
    total = len(list(model.parameters()))
    assert repr(handle) == (
        f"ChannelDirected(AdamW, metric='h0', lam=2.0, axis='output', ends='periodic'): 8 of {total} parameters"
    )
    lines = handle.summary().splitlines()
    assert lines[0] == repr(handle)
    assert any(line.startswith("position (5, 4): left alone: is 'position' of Zoo") for line in lines)
    assert any(line.startswith("attention.bias_k (1, 1, 4): left alone: is 'bias_k' of Mult") for line in lines)
    assert len(lines) == 1 + total
    for line in (
        "conv1.weight (6, 2, 3): metric=h0, lam=2.0, axis=0, ends=periodic, groups=2",
        "fc.bias (3,): left alone: has fewer than two dimensions",
        "embedding.weight (7, 4): left alone: is a lookup table: its rows are used one at a time, not as an operator",
        "norm.weight (3, 4): left alone: scales or shifts normalised features",
        "normed.parametrizations.weight.original1 (4, 3): left alone: is re-parametrised already: remove the "
        "parametrization first",
    ):
        assert line in lines


def test_without_the_module_shapes_decide() -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4))
    handle = channel_directed(torch.optim.SGD(model.parameters(), lr=0.1), "h0")
    assert handle.parameters == [model[0].weight]
    assert "param_groups[0]['params'][1] (4,): left alone: has fewer than two dimensions" in handle.summary()
    named = channel_directed(torch.optim.SGD(model.named_parameters(), lr=0.1), "h0")
    assert "0.bias (4,): left alone" in named.summary()


def test_select_decides_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Embedding(5, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    handle = channel_directed(optimizer, "h0", 2.0, module=model, select=lambda name, p: name in ("0.bias", "1.weight"))
    assert handle.parameters == [model[0].bias, model[1].weight]
    assert "0.weight (6, 4): left alone: is not selected" in handle.summary()
    bias, embedding = drawn((6,)).float(), drawn((5, 4)).float()
    model[0].bias.grad, model[1].weight.grad = bias.clone(), embedding.clone()
    optimizer.step()
    torch.testing.assert_close(model[0].bias.grad, slow_gradient(bias, "h0", 2.0, 0, "periodic").float())
    torch.testing.assert_close(model[1].weight.grad, slow_gradient(embedding, "h0", 2.0, 0, "periodic").float())


def test_parameter_groups_have_their_own_settings_and_may_come_later() -> None:
    first, second, third = (nn.Parameter(drawn((6, 4), i)) for i in range(3))
    optimizer = torch.optim.SGD(
        [{"params": [first], "channel_directed": {"metric": "h1", "lam": 5.0, "axis": "input", "groups": 2}}], lr=0.0
    )
    handle = channel_directed(optimizer, "h0", lam=2.0)
    optimizer.add_param_group({"params": [second], "channel_directed": False})
    optimizer.add_param_group({"params": [third], "channel_directed": True})
    g = drawn((6, 4), 9)
    for weight in (first, second, third):
        weight.grad = g.clone()
    optimizer.step()
    torch.testing.assert_close(first.grad, slow_gradient(g, "h1", 5.0, 1, "periodic", 2))
    assert torch.equal(second.grad, g)
    torch.testing.assert_close(third.grad, slow_gradient(g, "h0", 2.0, 0, "periodic"))
    assert handle.parameters == [first, third]
    assert "left alone: has channel_directed=False in its parameter group" in handle.summary()


@pytest.mark.parametrize("entry", ["h1", {"metrik": "h1"}, None])
def test_bad_group_entries_are_refused(entry: Any) -> None:
    optimizer = torch.optim.SGD([{"params": [nn.Parameter(torch.ones(2, 2))], "channel_directed": entry}], lr=0.1)
    with pytest.raises(
        ValueError, match=r"has channel_directed=.*, expected True, False or a dict with keys among metric"
    ):
        channel_directed(optimizer)


# -- batches -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [1, 40, 300, 10**6])
@pytest.mark.parametrize("metric", METRICS)
def test_cut_and_joined_gradients_give_the_same(monkeypatch: pytest.MonkeyPatch, metric: Any, limit: int) -> None:
    pieces: list[tuple[int, int]] = []
    directed = MODULE._directed

    def recorded(g: Tensor, *options: Any) -> Tensor:
        pieces.append((g.shape[0], g.shape[1]))
        return directed(g, *options)

    monkeypatch.setattr(MODULE, "_PIECE_CPU", limit)
    monkeypatch.setattr(MODULE, "_directed", recorded)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.Linear(4, 6), nn.ConvTranspose2d(4, 6, 2), nn.Conv2d(4, 12, 3, groups=2), nn.Linear(2, 5)
    )
    model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    channel_directed(optimizer, metric, 2.0, module=model)
    gradients: dict[nn.Module, Tensor] = {}
    for i, layer in enumerate(model):
        gradients[layer] = drawn(tuple(layer.weight.shape), i).float()
        layer.weight.grad = torch.empty_like(layer.weight).copy_(gradients[layer])
    model[1].weight.grad = None  # a layer that took no part in the loss
    optimizer.step()
    for index, axis, groups in [(0, 0, 1), (2, 1, 1), (3, 0, 2), (4, 0, 1)]:
        expected = slow_gradient(gradients[model[index]], metric, 2.0, axis, "periodic", groups).float()
        torch.testing.assert_close(model[index].weight.grad, expected)
    assert model[1].weight.grad is None
    # 27 + 16 + 36 columns of 6 channels and 2 columns of 5, in as few pieces as the limit allows without a second cut
    for length, columns in ((6, [27, 16, 36]), (5, [2])):
        width = max(1, limit // length)
        widths = [n for d, n in pieces if d == length]
        assert sum(widths) == sum(columns)
        assert max(widths) <= width
        assert len(widths) <= sum(math.ceil(n / width) for n in columns)
        if limit == 10**6:
            assert len(widths) == 1


# -- attaching ---------------------------------------------------------------------------------------------------------


def test_optimisers_that_cannot_be_attached_to() -> None:
    weight = nn.Parameter(torch.ones(2, 2))
    with pytest.raises(TypeError, match=r"optimizer is a list, expected a torch\.optim\.Optimizer"):
        channel_directed([weight])  # type: ignore[arg-type]
    for line_search in (None, "strong_wolfe"):
        with pytest.raises(TypeError, match=r"optimizer is LBFGS, .* Use a first-order optimiser"):
            channel_directed(torch.optim.LBFGS([weight], line_search_fn=line_search))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    handle = channel_directed(optimizer)
    with pytest.raises(ValueError, match=r"this SGD already has channel-directed gradients: call remove\(\)"):
        channel_directed(optimizer)
    handle.remove()
    again = channel_directed(optimizer)
    handle.remove()  # a second time: the new handle stays
    with pytest.raises(ValueError, match="already has"):
        channel_directed(optimizer)
    again.remove()
    assert not optimizer._optimizer_step_pre_hooks


@pytest.mark.parametrize("options", [{"metric": "h3"}, {"lam": -1.0}, {"axis": "out"}, {"axis": 2}, {"ends": "open"}])
def test_bad_options_leave_the_optimiser_bare(options: dict[str, Any]) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(2, 2))], lr=0.1)
    with pytest.raises(ValueError, match=r"expected|inner product"):
        channel_directed(optimizer, **options)
    assert not optimizer._optimizer_step_pre_hooks
    channel_directed(optimizer)


def test_sparse_and_complex_gradients_are_refused_before_any_change() -> None:
    first, second = nn.Parameter(drawn((3, 2))), nn.Parameter(drawn((3, 2)))
    g = drawn((3, 2), 1)
    for bad, message in (
        (g.to_sparse(), r"the gradient of param_groups\[0\]\['params'\]\[1\] is sparse, .* sparse=False"),
        (None, "the gradient of .* has type torch.complex128, expected a real"),
    ):
        if bad is None:
            second = nn.Parameter(drawn((3, 2)).to(torch.complex128))
            bad = g.to(torch.complex128)
        optimizer = torch.optim.SGD([first, second], lr=0.1)
        channel_directed(optimizer, "h1")
        first.grad, second.grad = g.clone(), bad
        before = first.detach().clone()
        with pytest.raises(TypeError, match=message):
            optimizer.step()
        assert torch.equal(first.grad, g)
        assert torch.equal(first, before)


def step_is_directed(optimizer: torch.optim.Optimizer) -> bool:
    weight = optimizer.param_groups[0]["params"][0]
    g = drawn(tuple(weight.shape), 7)
    weight.grad = g.clone()
    optimizer.step()
    if torch.equal(weight.grad, g):
        return False
    torch.testing.assert_close(weight.grad, slow_gradient(g, "h1", 1.0, 0, "periodic"))
    return True


def test_state_dicts_are_those_of_the_bare_optimiser() -> None:
    weight, other = twin_weights()
    optimizer, bare = torch.optim.AdamW([weight]), torch.optim.AdamW([other])
    channel_directed(optimizer, "h1")
    assert step_is_directed(optimizer)
    assert not step_is_directed(bare)
    assert optimizer.state_dict().keys() == bare.state_dict().keys()
    assert optimizer.state_dict()["param_groups"] == bare.state_dict()["param_groups"]
    optimizer.load_state_dict(bare.state_dict())
    assert step_is_directed(optimizer)


def test_a_checkpoint_does_not_undo_an_exclusion() -> None:
    weight = nn.Parameter(drawn((4, 2)))
    optimizer = torch.optim.SGD([{"params": [weight], "channel_directed": False}], lr=0.1)
    channel_directed(optimizer, "h1")
    optimizer.load_state_dict(torch.optim.SGD([nn.Parameter(drawn((4, 2)))], lr=0.2).state_dict())
    assert not step_is_directed(optimizer)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies(copied: Callable[[Any], Any]) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(drawn((4, 2)))], lr=0.1)
    handle = channel_directed(optimizer, "h1")
    bare = copied(optimizer)
    assert not step_is_directed(bare)
    channel_directed(bare, "h1")
    assert step_is_directed(bare)

    twin = copied(handle)
    assert twin.optimizer is not optimizer
    assert step_is_directed(twin.optimizer)
    twin.remove()
    assert not step_is_directed(twin.optimizer)
    assert not step_is_directed(copied(twin).optimizer)
    assert step_is_directed(optimizer)


def test_a_checkpoint_of_everything_stays_connected() -> None:
    model = nn.Linear(3, 4).double()
    handle = channel_directed(torch.optim.SGD(model.parameters(), lr=0.1), "h1", module=model)
    buffer = io.BytesIO()
    torch.save((model, handle), buffer)
    buffer.seek(0)
    model, handle = torch.load(buffer, weights_only=False)
    assert handle.parameters == [model.weight]
    assert step_is_directed(handle.optimizer)


# -- manifolds ---------------------------------------------------------------------------------------------------------

MANIFOLDS = {
    "geoopt.Sphere": geoopt.Sphere(),
    "geoopt.EuclideanStiefel": geoopt.EuclideanStiefel(),
    "geoopt.Euclidean": geoopt.Euclidean(),
    "geoopt product": geoopt.ProductManifold((geoopt.Sphere(), 2), (geoopt.Euclidean(), 1)),
    "ScaledSphere": fgo_geo.ScaledSphere(radius=0.5),
    "Oblique": fgo_geo.Oblique(radius=2.0),
    "Stiefel": fgo_geo.Stiefel(radius=3.0),
}


@pytest.mark.parametrize("name", MANIFOLDS)
@given(metric=st.sampled_from(METRICS), lam=st.floats(0.1, 100.0), seed=st.integers(0, 2**31))
def test_on_a_manifold_the_direction_is_tangent_and_descends(name: str, metric: Any, lam: float, seed: int) -> None:
    manifold = MANIFOLDS[name]
    x = manifold.projx(drawn((6, 3), seed))
    weight = geoopt.ManifoldParameter(x, manifold=manifold)
    optimizer = geoopt.optim.RiemannianSGD([weight], lr=0.0)
    channel_directed(optimizer, metric, lam)
    g = drawn((6, 3), seed + 1)
    tangent = manifold.proju(x, g)
    weight.grad = g.clone()
    optimizer.step()
    expected = manifold.proju(x, slow_gradient(tangent, metric, lam, 0, "periodic"))
    torch.testing.assert_close(weight.grad, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(manifold.proju(x, weight.grad), weight.grad, rtol=1e-9, atol=1e-9)
    assert (weight.grad * g).sum() > 0


@pytest.mark.parametrize("optimizer_type", [geoopt.optim.RiemannianSGD, fgo_geo.RiemannianFGSGD])
def test_training_on_the_sphere_finds_the_leading_eigenvector(optimizer_type: Any) -> None:
    matrix = torch.diag(torch.tensor([1.0, 2.0, 3.0, 6.0], dtype=torch.float64)).roll((1, 1), (0, 1))
    sphere = fgo_geo.ScaledSphere(ndim=2)
    weight = geoopt.ManifoldParameter(sphere.projx(drawn((4, 1))), manifold=sphere)
    optimizer = optimizer_type([weight], lr=0.2)
    channel_directed(optimizer, "h1", lam=1.0)
    for _ in range(200):
        optimizer.zero_grad()
        (-(weight.T @ matrix @ weight) / 2).sum().backward()
        optimizer.step()
    torch.testing.assert_close(weight.detach().abs(), torch.eye(4, dtype=torch.float64)[:, :1], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("manifold", "point"),
    [
        (geoopt.CanonicalStiefel(), torch.eye(4, 2)),
        (geoopt.PoincareBall(), torch.zeros(4, 2)),
        (geoopt.SymmetricPositiveDefinite(), torch.eye(3)),  # where its metric happens to be Euclidean
    ],
)
def test_manifolds_with_another_metric_are_refused(manifold: geoopt.Manifold, point: Tensor) -> None:
    weight = geoopt.ManifoldParameter(point.double(), manifold=manifold)
    optimizer = geoopt.optim.RiemannianSGD([weight], lr=0.1)
    with pytest.raises(ValueError, match=r"lies on .*, whose metric is not that of the surrounding space .* leave the"):
        channel_directed(optimizer)
    assert not optimizer._optimizer_step_pre_hooks
    optimizer.param_groups[0]["channel_directed"] = False
    assert channel_directed(optimizer).parameters == []
