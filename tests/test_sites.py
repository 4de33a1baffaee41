"""Which layers look like outputs of a model, how layers of other libraries are read, and what the plan says of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchvision.models.detection as detection
from networks import assert_on_manifolds, names, net
from torch import Tensor, nn
from torch.nn import functional

import fgo_geo
from fgo_geo import Plan, RiemannianFGSGD, WeightLayout, constrain, register_layout
from fgo_geo.models.sites import output_heads, sites_of
from fgo_geo.weights.layout import layout_of


class LanguageModel(nn.Module):
    """As Llama and T5: gated blocks, fewer keys than queries, a head that may be tied to the embedding."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.emb = nn.Embedding(517, 64)
        self.q, self.k, self.v = nn.Linear(64, 64), nn.Linear(64, 32), nn.Linear(64, 32)
        self.gate, self.up, self.down = nn.Linear(64, 256), nn.Linear(64, 256), nn.Linear(256, 64)
        self.norm = nn.LayerNorm(64)
        self.head = nn.Linear(64, 517, bias=False)
        if tied:
            self.head.weight = self.emb.weight


class Distilled(nn.Module):
    """As LeViT and DeiT: two heads behind the same features, and fused attention."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 48, 4, stride=4)
        self.qkv, self.proj = nn.Linear(48, 144), nn.Linear(48, 48)
        self.fc1, self.fc2 = nn.Linear(48, 192), nn.Linear(192, 48)
        self.head = nn.Sequential(nn.BatchNorm1d(48), nn.Linear(48, 10))
        self.head_dist = nn.Sequential(nn.BatchNorm1d(48), nn.Linear(48, 10))


class HeadFirst(nn.Module):
    """The head is declared before what it follows."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(64, 10)
        self.conv = nn.Conv2d(3, 32, 3)
        self.hidden = nn.Linear(32, 64)


def meta_detector() -> nn.Module:
    with torch.device("meta"):
        return detection.fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None)


def meta_pyramid() -> nn.Module:
    with torch.device("meta"):
        return detection.retinanet_resnet50_fpn(weights=None, weights_backbone=None)


MODELS: dict[str, tuple[Any, set[str]]] = {
    "tied": (lambda: LanguageModel(True), {"head.weight"}),
    "not tied": (lambda: LanguageModel(False), {"head.weight"}),
    "two heads": (Distilled, {"head.1.weight", "head_dist.1.weight"}),
    "declared first": (HeadFirst, {"fc.weight"}),
    "detector": (
        meta_detector,
        {"rpn.head.cls_logits.weight", "rpn.head.bbox_pred.weight"}
        | {f"roi_heads.box_predictor.{name}.weight" for name in ("cls_score", "bbox_pred")},
    ),
    "a pyramid whose last 1x1 convolution is inside": (meta_pyramid, set()),
    "square": (lambda: nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)), {"2.weight"}),
    "of two tasks": (
        lambda: nn.ModuleDict({"body": nn.Linear(9, 64), "a": nn.Linear(64, 2), "b": nn.Linear(64, 5)}),
        {"a.weight", "b.weight"},
    ),
    "before a convolution": (
        lambda: nn.Sequential(nn.Linear(9, 48), nn.Unflatten(1, (12, 4)), nn.Conv1d(12, 3, 3), nn.Conv1d(3, 3, 3)),
        set(),
    ),
    "before a recurrent layer": (lambda: nn.Sequential(nn.Linear(9, 7), nn.LSTM(7, 5)), set()),
}


@pytest.mark.parametrize(("make", "expected"), MODELS.values(), ids=MODELS)
def test_heads_are_found_by_what_others_take(make: Any, expected: set[str]) -> None:
    assert {site.names[-1] for site in output_heads(sites_of(make()))} == expected


def test_a_tied_head_leaves_the_layer_before_it_to_its_manifold() -> None:
    plan = constrain(LanguageModel(True))
    assert names(plan) == ["q.weight", "k.weight", "v.weight", "gate.weight", "up.weight", "down.weight"]
    assert plan.entries[0].names == ("emb.weight", "head.weight")
    assert "is tied, and as 'emb.weight' it is a lookup table" in str(plan)


def test_both_heads_are_spared_and_say_so() -> None:
    plan = constrain(Distilled())
    reasons = {entry.name: entry.reason for entry in plan.entries}
    assert "has 10 outputs that no other layer takes as inputs" in str(reasons["head.1.weight"])
    assert "is the classifier (the last linear layer" in str(reasons["head_dist.1.weight"])
    assert len(constrain(Distilled(), classifier=True).constrained) == len(plan.constrained) + 2


def test_no_reason_speaks_of_include_to_somebody_who_gave_none() -> None:
    for arguments in ({}, {"classifier": True}, {"exclude": "conv"}, {"first_layer": True}):
        assert "include" not in str(constrain(net(), **arguments))


# -- layouts of other libraries ----------------------------------------------------------------------------------


class Conv1D(nn.Module):
    """The linear layer of GPT-2, as in Hugging Face's transformers."""

    __module__ = "transformers.pytorch_utils"

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(0.3 * torch.randn(nx, nf))
        self.bias = nn.Parameter(torch.zeros(nf))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight)


def test_conv1d_of_transformers_is_a_linear_layer() -> None:
    """Its groups are those of the linear layer with the transposed weight, and so are its points after a step."""
    torch.manual_seed(0)
    layer, linear = Conv1D(6, 4), nn.Linear(4, 6)
    with torch.no_grad():
        linear.weight.copy_(layer.weight.T)
        layer.bias.copy_(linear.bias)
    plans = [constrain(nn.ModuleDict({"layer": each}), "pi", classifier=True, seed=3) for each in (layer, linear)]
    assert plans[0].constrained[0].collections == plans[1].constrained[0].collections
    torch.testing.assert_close(layer.weight.detach().T, linear.weight.detach(), rtol=0, atol=1e-6)
    x = torch.randn(5, 4)
    for each in (layer, linear):
        optimizer = RiemannianFGSGD(each.parameters(), lr=0.3, momentum=0.9)
        for _ in range(3):
            optimizer.zero_grad()
            (each(x) - 1).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(layer.weight.detach().T, linear.weight.detach(), rtol=0, atol=1e-5)
    assert_on_manifolds(plans[0])


class Transposed(nn.Module):
    def __init__(self, shape: tuple[int, ...] = (3, 5)) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(shape))


def test_a_layout_of_ones_own() -> None:
    class Derived(Transposed): ...

    before = layout_of(Transposed(), "kernel")
    assert "say how it is stored (fgo_geo.register_layout)" in str(before)
    register_layout(Transposed, "kernel", lambda layer: WeightLayout(tuple(layer.kernel.shape), "transposed"))
    for made in (Transposed(), Derived()):
        layout = layout_of(made, "kernel")
        assert (layout.out_channels, layout.in_channels) == (5, 3)
        plan = constrain(made, "layer", "oblique", classifier=True)
        assert_on_manifolds(plan)
        assert made.kernel.manifold.partition.sizes == ((5, 3),)
    register_layout(Derived, "kernel", lambda layer: WeightLayout(tuple(layer.kernel.shape)))
    assert layout_of(Derived(), "kernel").out_channels == 3
    assert layout_of(Transposed(), "kernel").out_channels == 5
    register_layout(Transposed, "kernel", lambda layer: WeightLayout((1, 1)))
    with pytest.raises(ValueError, match=r"'kernel' of Transposed is for shape \(1, 1\), the parameter has"):
        constrain(Transposed())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((nn.Linear(2, 2), "weight", print), r"expected a type of torch\.nn\.Module or its full name.*got Linear\("),
        (("Conv1D", "weight", print), "or its full name, 'package.module.Class', got 'Conv1D'"),
        ((int, "weight", print), "got <class 'int'>"),
        (
            (nn.Linear, "weight", WeightLayout((1, 1))),
            "from a layer to its WeightLayout, got 'weight' and W",
        ),
        ((nn.Linear, None, print), "expected the name of a parameter"),
    ],
)
def test_what_cannot_be_registered(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        register_layout(*arguments)
    assert layout_of(nn.Linear(2, 3), "weight") == WeightLayout((3, 2))


# -- fused projections -------------------------------------------------------------------------------------------


def test_fused_projections_are_split_as_those_of_attention() -> None:
    """The groups of torch's own packed projection, section by section."""
    torch.manual_seed(0)
    fused, attention = nn.Linear(8, 24), nn.MultiheadAttention(8, 2)
    with torch.no_grad():
        fused.weight.copy_(attention.in_proj_weight)
    model = nn.ModuleDict({"qkv": fused, "last": nn.Linear(8, 3)})
    plan = constrain(model, "pi", seed=1, overrides={"*qkv": {"split": 3}})
    constrain(attention, "pi", seed=1)
    (entry,) = plan.constrained
    assert entry.layout.sections == 3
    assert [c.name for c in entry.collections] == [f"qkv.weight[{number}]" for number in range(3)]
    for section in range(3):
        single = nn.ModuleDict({"part": nn.Linear(8, 8)})
        with torch.no_grad():
            single["part"].weight.copy_(attention.in_proj_weight.detach()[8 * section : 8 * section + 8])
        assert entry.collections[section].out_channels == 8
    assert fused.weight.manifold.n_groups == attention.in_proj_weight.manifold.n_groups == 3 * 4
    assert Plan.from_json(plan.to_json()).entries == plan.entries
    x = torch.randn(5, 8)
    optimizer = RiemannianFGSGD(fused.parameters(), lr=0.3)
    fused(x).square().sum().backward()
    optimizer.step()
    assert_on_manifolds(plan)


def test_a_stiefel_layer_per_section() -> None:
    model = nn.Sequential(nn.Linear(4, 12, bias=False))
    constrain(model, "layer", "stiefel", radius=1.0, classifier=True, overrides={"0": {"split": 3}})
    for section in model[0].weight.detach().chunk(3):
        torch.testing.assert_close(section @ section.T, torch.eye(4), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"conv": {"split": 2}}, r"'conv\.weight' is not the matrix of one layer, so it cannot be split into 2 parts"),
        (
            {"block.0": {"split": 5}},
            r"'block\.0\.weight' has 12 output channels, which do not split into 5",
        ),
        ({"attention": {"split": 3}}, r"'attention\.in_proj_weight' is not the matrix of one layer"),
        ({"block.0": {"split": 0}}, "split must be a positive number of equal parts, got 0"),
        ({"block.0": {"split": 1.5}}, "split must be a positive number of equal parts, got 1.5"),
    ],
)
def test_what_cannot_be_split(overrides: dict[str, Any], message: str) -> None:
    model = net()
    with pytest.raises(ValueError, match=message):
        constrain(model, overrides=overrides)
    assert {type(p) for p in model.parameters()} == {nn.Parameter}


# -- layers that compute with another weight ---------------------------------------------------------------------


class StdConv2d(nn.Conv2d):
    """As timm's: weight standardisation."""

    def forward(self, x: Tensor) -> Tensor:
        centred = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        weight = centred / centred.std((1, 2, 3), keepdim=True)
        return functional.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class SameConv2d(nn.Conv2d):
    """As timm's: another padding."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(functional.pad(x, (1, 1, 1, 1)), self.weight, self.bias)


def test_the_plan_says_what_weight_standardisation_makes_of_a_constraint() -> None:
    model = nn.Sequential(StdConv2d(3, 4, 3), StdConv2d(4, 4, 3), SameConv2d(4, 4, 3), nn.Conv2d(4, 4, 3))
    plan = constrain(model)
    assert names(plan) == ["1.weight", "2.weight", "3.weight"]
    text = str(plan)
    assert (
        "Notes:\n  1.weight: the raw weight is constrained, and StdConv2d centres and rescales it in the forward"
        in text
    )
    assert "2.weight: the raw weight is constrained; SameConv2d has a forward pass of its own" in text
    assert "3.weight: " not in text
    again = Plan.from_json(plan.to_json())
    assert str(again) == text
    assert again.entries == plan.entries
    assert "Notes" not in str(constrain(net()))


def test_register_layout_is_public() -> None:
    assert {"register_layout", "WeightLayout"} <= set(fgo_geo.__all__)
