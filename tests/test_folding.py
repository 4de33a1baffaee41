"""Folding of batch normalisation: the copy computes what the model computes, and the record says what became of each.

The oracle is the model itself in eval mode, in float64; on the output side also torch.nn.utils.fusion.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import fusion

import fgo_geo
from fgo_geo.models.folding import fold_batchnorm
from fgo_geo.models.renormalize import renormalize

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def trained(model: nn.Module, seed: int = 0, shift: bool = True) -> nn.Module:
    """The model in float64 and eval mode, its batch normalisations no longer the identity."""
    generator = torch.Generator().manual_seed(seed)
    for norm in model.modules():
        if isinstance(norm, tuple(NORMS.values())):
            if norm.running_mean is not None:
                norm.running_mean.normal_(std=0.3 * shift, generator=generator)
                norm.running_var.uniform_(0.3, 3, generator=generator)
            if norm.affine:
                nn.init.normal_(norm.weight, generator=generator)
                nn.init.normal_(norm.bias, std=0.3 * shift, generator=generator)
    return model.double().eval()


def assert_same_outputs(model: nn.Module, folded: nn.Module, x: torch.Tensor):
    with torch.no_grad():
        torch.testing.assert_close(folded(x), model(x), rtol=1e-10, atol=1e-10)


def count(model: nn.Module) -> int:
    return sum(isinstance(m, tuple(NORMS.values())) for m in model.modules())


@given(st.data())
def test_behind_any_layer_the_norm_is_folded_into_its_output(data):
    dims = data.draw(st.integers(1, 3))
    groups = data.draw(st.integers(1, 3))
    inputs, outputs = (groups * data.draw(st.integers(1, 3)) for _ in range(2))
    kind = data.draw(st.sampled_from([CONVOLUTIONS, TRANSPOSED]))[dims]
    layer = kind(inputs, outputs, data.draw(st.integers(1, 3)), groups=groups, bias=data.draw(st.booleans()), padding=0)
    norm = NORMS[dims](outputs, affine=data.draw(st.booleans()))
    model = trained(nn.Sequential(layer, norm), data.draw(st.integers(0, 99)))
    before = copy.deepcopy(model.state_dict())
    folded, (record,) = fold_batchnorm(model)
    assert (record.name, record.layer, record.side, record.reason) == ("1", "0", "output", None)
    assert count(folded) == 0
    assert_same_outputs(model, folded, torch.randn(2, inputs, *[4] * dims, dtype=torch.float64))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    if not (kind is TRANSPOSED[dims] and groups > 1):  # which torch's fusion does not fold
        expected = fusion.fuse_conv_bn_eval(model[0], model[1], transpose=kind is TRANSPOSED[dims])
        torch.testing.assert_close(folded[0].weight, expected.weight)
        torch.testing.assert_close(folded[0].bias, expected.bias)


@given(st.data())
def test_before_any_layer_the_norm_is_folded_into_its_input_where_that_is_exact(data):
    dims = data.draw(st.integers(1, 3))
    groups = data.draw(st.integers(1, 3))
    inputs, outputs = (groups * data.draw(st.integers(1, 3)) for _ in range(2))
    transposed, shift = data.draw(st.booleans()), data.draw(st.booleans())
    kernel, mode, padding = 3, "zeros", data.draw(st.sampled_from([0, 1, "valid", "same"]))
    if transposed:
        padding = data.draw(st.integers(0, 1))
    else:
        kernel, mode = data.draw(st.sampled_from([1, 3])), data.draw(st.sampled_from(["zeros", "circular", "reflect"]))
    kind = (TRANSPOSED if transposed else CONVOLUTIONS)[dims]
    bias = data.draw(st.booleans())
    layer = kind(inputs, outputs, kernel, groups=groups, bias=bias, padding=padding, padding_mode=mode)
    model = trained(nn.Sequential(NORMS[dims](inputs), layer), data.draw(st.integers(0, 99)), shift)
    folded, (record,) = fold_batchnorm(model)
    pads = mode == "zeros" and (padding == 1 or (padding == "same" and kernel > 1))
    exact = not shift or not (transposed or pads)
    assert (record.layer, record.side) == (("1", "input") if exact else (None, None))
    assert exact or "pads with zeros" in record.reason
    assert count(folded) == (not exact)
    assert_same_outputs(model, folded, torch.randn(2, inputs, *[4] * dims, dtype=torch.float64))


@pytest.mark.parametrize("bias", [True, False])
def test_linear_layers_on_both_sides(bias):
    model = trained(
        nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 3, bias=bias), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 2))
    )
    folded, records = fold_batchnorm(model)
    assert [(r.layer, r.side) for r in records] == [("1", "input"), ("1", "output")]
    assert_same_outputs(model, folded, torch.randn(7, 5, dtype=torch.float64))


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_all_norms_of_networks_that_normalise_behind_convolutions_are_folded(name):
    model = trained(getattr(torchvision.models, name)(num_classes=3))
    folded, records = fold_batchnorm(model)
    assert all(record.side == "output" for record in records)
    assert len(records) == count(model)
    assert count(folded) == 0
    assert_same_outputs(model, folded, torch.randn(1, 3, 32, 32, dtype=torch.float64))


class PreActivation(nn.Module):
    """Normalise, rectify, convolve; twice, around a shortcut that takes the first rectified features."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.norm3, self.shortcut = nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1, bias=False)

    def forward(self, x):
        inner = self.conv1(self.norm1(x).relu())
        return self.conv2(self.norm2(inner).relu()) + self.shortcut(self.norm3(x))


def test_a_pre_activation_block_keeps_what_is_between_activations():
    model = trained(PreActivation())
    folded, records = fold_batchnorm(model)
    assert [(r.name, r.layer, r.side) for r in records] == [
        ("norm1", None, None),
        ("norm2", "conv1", "output"),
        ("norm3", "shortcut", "input"),
    ]
    assert "relu is not a convolution" in records[0].reason
    norm = model.norm1
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    torch.testing.assert_close(records[0].scale, scale.detach())
    assert records[0].norm == pytest.approx(scale.abs().max().item())
    assert_same_outputs(model, folded, torch.randn(2, 3, 5, 5, dtype=torch.float64))


class Wired(nn.Module):
    """Two convolutions and a normalisation, wired as the test says."""

    def __init__(self, forward) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.norm = nn.BatchNorm2d(3)
        self.wiring = forward

    def forward(self, x):
        return self.wiring(self, x)


REFUSALS = {
    "layer used twice": (lambda m, x: m.norm(m.a(m.a(x))).relu(), "a is called 2 times"),
    "norm used twice": (lambda m, x: m.norm(m.a(m.norm(x))), "norm is called 2 times"),
    "output used twice": (lambda m, x: (lambda y: m.norm(y).relu() + y)(m.a(x)), "the output of a is used 2 times"),
    "normalised used twice": (lambda m, x: (lambda y: m.a(y) + y)(m.norm(x)), "the output of norm is used 2 times"),
    "weight read": (
        lambda m, x: m.norm(m.a(x)).relu() + m.a.weight.sum(),
        "the parameters of a are used elsewhere too",
    ),
    "scale read": (lambda m, x: m.norm(m.a(x)) + m.norm.bias.sum(), "the parameters of norm are used elsewhere too"),
    "function": (lambda m, x: m.norm(nn.functional.conv2d(x, m.a.weight)).relu(), "conv2d is not a convolution"),
    "unused": (lambda m, x: m.b(m.a(x)), "is never used"),
    "control flow": (lambda m, x: m.norm(m.a(x)) if x.sum() > 0 else x, "torch.fx cannot trace the model: TraceError"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_cannot_be_folded_is_kept_with_the_reason(case):
    wiring, reason = REFUSALS[case]
    model = trained(Wired(wiring))
    folded, (record,) = fold_batchnorm(model)
    assert record.layer is None
    assert reason in record.reason
    assert (record.scale is None) == (case == "unused")
    assert count(folded) == 1
    assert_same_outputs(model, folded, torch.randn(2, 3, 4, 4, dtype=torch.float64))


def test_synchronised_norms_are_folded_too():
    model = nn.SyncBatchNorm.convert_sync_batchnorm(trained(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))))
    assert isinstance(model[1], nn.SyncBatchNorm)
    folded, (record,) = fold_batchnorm(model)
    assert (record.layer, record.side) == ("0", "output")
    assert isinstance(folded[1], nn.Identity)
    assert_same_outputs(model, folded, torch.randn(2, 3, 4, 4, dtype=torch.float64))


def test_a_norm_by_the_batch_is_no_fixed_map():
    model = trained(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)))
    folded, (record,) = fold_batchnorm(model)
    assert "no running statistics" in record.reason
    assert record.scale is record.norm is None
    assert_same_outputs(model, folded, torch.randn(2, 3, 4, 4, dtype=torch.float64))


def test_a_norm_over_another_axis_than_the_features_is_kept():
    model = trained(nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(6)))
    folded, (record,) = fold_batchnorm(model)
    assert "0 has 4 channels and the normalisation 6" in record.reason
    assert_same_outputs(model, folded, torch.randn(2, 6, 5, dtype=torch.float64))


def test_hooks_and_tied_weights_are_respected():
    model = trained(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 3, 1)))
    tied = copy.deepcopy(model)
    tied[3].weight = tied[0].weight
    model[0].register_forward_hook(lambda module, inputs, output: output + 1)
    for each, reason in ((model, "0 has forward hooks"), (tied, "the parameters of 0 are used elsewhere too")):
        folded, (record,) = fold_batchnorm(each)
        assert reason in record.reason
        assert_same_outputs(each, folded, torch.randn(2, 3, 4, 4, dtype=torch.float64))


def constrained(model):
    fgo_geo.constrain(model, include=nn.Conv2d)


def renormalised(model):
    for layer in (model[0], model[3]):
        renormalize(layer, manifold="spectral")


@pytest.mark.parametrize("prepare", [constrained, renormalised])
def test_the_copy_of_a_constrained_or_renormalised_model_is_plain(prepare):
    layers = [nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)]
    model = trained(nn.Sequential(*layers))
    prepare(model)
    keys = list(model.state_dict())
    folded, records = fold_batchnorm(model)
    assert [record.layer for record in records] == ["0", "3"]
    assert all(type(p) is nn.Parameter for p in folded.parameters())
    assert set(folded.state_dict()) == {"0.weight", "0.bias", "3.weight", "3.bias"}
    assert list(model.state_dict()) == keys
    assert_same_outputs(model, folded, torch.randn(2, 3, 8, 8, dtype=torch.float64))


@pytest.mark.parametrize("model", [nn.Linear(2, 2).state_dict(), [nn.Linear(2, 2)], torch.eye(2)], ids=type)
def test_what_is_no_module_is_refused(model):
    message = (
        rf"fold_batchnorm: model is {type(model).__name__}; expected a torch.nn.Module. A state_dict has no layers"
    )
    with pytest.raises(TypeError, match=message):
        fold_batchnorm(model)


def test_the_norm_of_a_kept_normalisation_is_its_largest_factor_whatever_the_sign():
    model = nn.Sequential(nn.ReLU(), nn.BatchNorm1d(2, eps=0.0), nn.ReLU())
    nn.init.constant_(model[1].weight, -3.0)
    _, (record,) = fold_batchnorm(model)
    assert record.norm == pytest.approx(3.0)
