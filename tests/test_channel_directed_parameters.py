"""Channel-directed gradients of a model: which parameters have one, along which axis, and in which batches."""

from __future__ import annotations

import math
import sys
from typing import Any

import pytest
import torch
from channel_directions import ENDS, METRICS, drawn, slow_gradient
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from fgo_geo.optim.channel_directed import channel_directed
from fgo_geo.paths.native import channels

MODULE = sys.modules["fgo_geo.optim.channel_metrics"]


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


@pytest.mark.parametrize("ends", ENDS)
@pytest.mark.parametrize("metric", ["h1", "h1t"])
def test_lam_relative_grows_with_the_square_of_the_channels_smoothed_together(metric: Any, ends: Any) -> None:
    model = Zoo()
    handle = channel_directed(
        torch.optim.SGD(model.parameters(), lr=0.0), metric, 0.5, ends=ends, module=model, lam_relative=True
    )
    gradients = {name: drawn(tuple(p.shape), i) for i, (name, p) in enumerate(model.named_parameters())}
    for name, parameter in model.named_parameters():
        parameter.grad = gradients[name].float()
    handle.optimizer.step()
    for name, (axis, groups) in OUTPUT.items():
        parameter = model.get_parameter(name)
        lam = 0.5 * (parameter.shape[axis] / groups / (2 * math.pi)) ** 2
        expected = slow_gradient(gradients[name], metric, lam, axis, ends, groups).float()
        torch.testing.assert_close(parameter.grad, expected, msg=lambda text, name=name: f"{name}: {text}")
    assert "lam_relative=True): 8 of" in repr(handle)


def test_lam_relative_leaves_the_slowest_wave_of_a_wide_layer_as_it_is() -> None:
    weight = nn.Parameter(torch.zeros(256, 1, dtype=torch.float64))
    wave = torch.cos(torch.arange(256, dtype=torch.float64) * (2 * math.pi / 256))[:, None]
    for metric, kept in (("h1t", 1.0), ("h1", 0.5)):
        handle = channel_directed(torch.optim.SGD([weight], lr=0.0), metric, lam_relative=True)
        weight.grad = wave.clone()
        handle.optimizer.step()
        torch.testing.assert_close(weight.grad, kept * wave, rtol=0, atol=1e-4)


def test_lam_relative_can_be_set_per_group_and_not_for_h0() -> None:
    weight = nn.Parameter(torch.zeros(8, 2))
    group = {"params": [weight], "channel_directed": {"metric": "h1t", "lam_relative": True}}
    handle = channel_directed(torch.optim.SGD([group], lr=0.1))
    assert f"metric=h1t, lam={(4 / math.pi) ** 2}" in handle.summary()
    with pytest.raises(ValueError, match="lam_relative is True, but the metric h0 damps all differences alike"):
        channel_directed(torch.optim.SGD([weight], lr=0.1), lam_relative=True)


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


def test_parameters_that_came_after_a_step_are_directed() -> None:
    """One that a group gets in place of another, and one of a new group; the one that is gone is left alone."""
    gone, stays, new, last = (nn.Parameter(drawn((6, 4), i)) for i in range(4))
    optimizer = torch.optim.SGD([gone, stays], lr=0.0)
    channel_directed(optimizer, "h0", lam=2.0)
    g = drawn((6, 4), 9)
    wanted = slow_gradient(g, "h0", 2.0, 0, "periodic")
    for change, directed in (
        (lambda: None, (gone, stays)),
        (lambda: optimizer.param_groups[0]["params"].__setitem__(0, new), (new, stays)),
        (lambda: optimizer.add_param_group({"params": [last]}), (new, stays, last)),
    ):
        change()
        for weight in (gone, stays, new, last):
            weight.grad = g.clone()
        optimizer.step()
        for weight in (gone, stays, new, last):
            expected = wanted if any(weight is own for own in directed) else g.double()
            torch.testing.assert_close(weight.grad.double(), expected.double())


@pytest.mark.parametrize("entry", ["h1", {"metrik": "h1"}, None])
def test_bad_group_entries_are_refused(entry: Any) -> None:
    optimizer = torch.optim.SGD([{"params": [nn.Parameter(torch.ones(2, 2))], "channel_directed": entry}], lr=0.1)
    with pytest.raises(
        ValueError, match=r"has channel_directed=.*, expected True, False or a dict with keys among metric"
    ):
        channel_directed(optimizer)


# -- batches -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [4, 30_000], ids=["one piece", "several pieces"])
@pytest.mark.parametrize("metric", METRICS)
def test_cut_and_joined_gradients_give_the_same(monkeypatch: pytest.MonkeyPatch, metric: Any, width: int) -> None:
    """By the torch code: with the larger width, more columns of six channels than one piece takes."""
    monkeypatch.setattr(channels, "takes", lambda g: False)
    layers = (
        nn.Conv2d(3, 6, 3),
        nn.Linear(width, 6),
        nn.ConvTranspose2d(4, 6, 2),
        nn.Conv2d(width // 2, 12, 3, groups=2),
    )
    model = nn.Sequential(*layers, nn.Linear(2, 5))
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
