"""The plan of a constrained model: what it says, and what it can do."""

from __future__ import annotations

import copy
import json
from collections import OrderedDict
from collections.abc import Callable

import geoopt
import pytest
import torch
from networks import assert_on_manifolds, assert_unchanged, names, net, snapshot, train
from torch import nn

import fgo_geo
from fgo_geo import Plan, Stiefel, constrain, plan_of


def test_the_plan_prints_every_parameter_once() -> None:
    model = net()
    plan = constrain(model, "pi", ("sphere", "stiefel"), "deterministic", radius=0.5, statistics="std")
    text = str(plan)
    rows = {line.split()[0]: line.split() for line in text.splitlines() if line.strip()}
    for name, _ in model.named_parameters():
        assert sum(name in line.replace(":", ",").replace(",", " ").split() for line in text.splitlines()) == 1, name
    cells = "conv.weight 6x4x2x3 Conv2d 24 2x3 kernels 8 (pi) 4 sphere + 4 stiefel 0.5 / std"
    assert " ".join(rows["conv.weight"]) == cells
    cells = "block.0.weight 12x8 Linear 2 blocks 2 (pi) 1 sphere + 1 stiefel 0.5 / std"
    assert " ".join(rows["block.0.weight"]) == cells
    assert rows["attention.in_proj_weight"][3:8] == ["6", "blocks", "6", "(pi)", "3"]
    assert text.endswith("8 of 23 parameters constrained: 74.2 % of 1,043 numbers")


def test_of_many_parameters_with_one_remark_the_plan_prints_globs_or_twenty() -> None:
    layers = [(chr(ord("A") + i), nn.Linear(3, 3)) for i in range(30)]
    text = str(constrain(nn.Sequential(OrderedDict(layers)), "layer", "sphere"))
    assert "S.bias, T.bias and 10 more: each has one dimension" in " ".join(text.split())
    layers = [(f"{chr(ord('A') + i)}.{k}".replace(".", "_"), nn.Linear(3, 3)) for i in range(22) for k in range(3)]
    text = str(constrain(nn.Sequential(OrderedDict(layers)), "layer", "sphere"))
    assert "S_*.bias (3), T_*.bias (3) and 6 more: each has one dimension" in " ".join(text.split())
    text = str(constrain(nn.Sequential(*[nn.Linear(3, 3) for _ in range(30)]), "layer", "sphere"))
    assert "  *.bias (30): each has one dimension" in text
    assert "{0-28}.weight (29)  3x3 " in text  # the last is the classifier
    assert all(len(line) < 170 for line in text.splitlines())
    assert "Left alone" not in str(constrain(nn.Linear(8, 8, bias=False), classifier=True))


def blocks(depth: int) -> nn.Sequential:
    """Blocks of a transformer, as timm names their layers, and one block of another width."""

    def block(width: int) -> nn.Module:
        attention = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)})
        mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        return nn.ModuleDict({"attn": attention, "mlp": mlp})

    return nn.Sequential(*(block(8) for _ in range(depth)), block(6), nn.Linear(6, 2))


def printed_rows(plan: Plan) -> list[str]:
    return [line.partition("  ")[0] for line in str(plan).partition("\n\n")[0].splitlines()[2:]]


def test_equal_rows_are_printed_once_in_the_order_of_the_model() -> None:
    model = nn.ModuleDict({"blocks": blocks(5), "final": nn.Linear(6, 6), "head": nn.Linear(6, 2)})
    plan = constrain(model, "layer", "stiefel", overrides={"blocks.1.attn.proj": {"radius": 0.5}})
    parts = ("attn.qkv", "attn.proj", "mlp.0", "mlp.2")
    assert printed_rows(plan) == [
        "blocks.{0-4}.attn.qkv.weight (5)",
        "blocks.{0,2-4}.attn.proj.weight (4)",
        "blocks.{0-4}.mlp.0.weight (5)",
        "blocks.{0-4}.mlp.2.weight (5)",
        "blocks.1.attn.proj.weight",
        *(f"blocks.5.{part}.weight" for part in parts),
        "final.weight",
    ]
    assert len(plan.entries) == len(json.loads(plan.to_json())["entries"]) == len(list(model.parameters()))
    plan = constrain(nn.ModuleDict({"blocks": blocks(5)[:5], "final": nn.Linear(8, 8)}), "layer", "stiefel")
    assert printed_rows(plan) == [f"blocks.*.{part}.weight (5)" for part in parts]


def test_a_row_stands_for_names_that_differ_in_numbers_alone_and_says_in_which() -> None:
    lines = [nn.Linear(8, 8) for _ in range(9)]
    plan = constrain(nn.Sequential(*lines), "layer", "stiefel", radius={f"{n}.weight": 0.5 for n in (0, 2, 4)})
    assert printed_rows(plan) == ["{0,2,4}.weight (3)", "{1,3,5-7}.weight (5)"]
    nested = nn.Sequential(*(nn.Linear(8, 8) for _ in range(3)), nn.Sequential(nn.Linear(8, 8)), nn.Linear(8, 8))
    assert printed_rows(constrain(nested, "layer", "stiefel")) == ["{0-2}.weight (3)", "3.0.weight"]
    normed = nn.Sequential(*(nn.Linear(8, 8) for _ in range(3)), nn.Sequential(nn.LayerNorm(8)), nn.Linear(8, 2))
    assert printed_rows(constrain(normed, "layer", "stiefel")) == ["{0-2}.weight (3)"]
    many = nn.Sequential(*(nn.Linear(8, 8) for _ in range(40)))
    radius = {f"{n}.weight": 0.5 for n in range(0, 39, 2)}
    rows = printed_rows(constrain(many, "layer", "stiefel", radius=radius))
    assert rows == [f"{n}.weight" for n in range(39)]


def test_a_plan_has_a_note_on_queries_keys_and_values_in_one_layer() -> None:
    note = 'overrides={"*.qkv": {"split": 3}} constrains each by itself'
    text = " ".join(str(constrain(blocks(4), "layer", "stiefel")).split())
    assert text.count(note) == 1
    assert "4.attn.qkv.weight: queries, keys and values are one matrix here" in text
    plan = constrain(blocks(4), "layer", "stiefel", overrides={"*.qkv": {"split": 3}})
    assert note not in " ".join(str(plan).split())
    assert len(plan.constrained[0].collections) == 3
    top: dict[str, nn.Module] = {"qkv": nn.Linear(4, 12), "out": nn.Linear(12, 2)}
    text = " ".join(str(constrain(nn.ModuleDict(top), "layer", "stiefel")).split())
    assert 'overrides={"qkv": {"split": 3}} constrains each by itself' in text
    top = {"qkv": nn.Linear(4, 12), "out": nn.Linear(12, 2)}
    plan = constrain(nn.ModuleDict(top), "layer", "stiefel", overrides={"qkv": {"split": 3}})
    assert len(plan.constrained[0].collections) == 3
    for layers in (
        {"qkv": nn.Linear(4, 8), "out": nn.Linear(8, 2)},  # not three parts of equal width
        {"attention": nn.MultiheadAttention(4, 2), "out": nn.Linear(4, 2)},  # which constrain splits
        {"plain": nn.Linear(4, 12), "out": nn.Linear(12, 2)},
    ):
        assert "queries" not in str(constrain(nn.ModuleDict(layers), "layer", "stiefel"))


def test_the_plan_is_the_models() -> None:
    model = net()
    plan = constrain(model)
    wrapped = nn.Sequential(nn.Sequential(model))
    assert plan_of(model) is plan_of(wrapped) is plan is model.fgo_geo_plan
    assert plan.model is model
    with pytest.raises(ValueError, match="this model is not constrained"):
        plan_of(net())


def test_weights_that_were_declared_by_hand_have_no_plan_and_the_remedy_works() -> None:
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))
    model[0].weight = geoopt.ManifoldParameter(Stiefel().random(5, 3).detach(), manifold=Stiefel())
    averaged = torch.optim.swa_utils.AveragedModel(model)
    averaged.update_parameters(model)
    with torch.no_grad():
        model[0].weight.copy_(Stiefel().random(5, 3))
    averaged.update_parameters(model)
    message = (
        r"no plan: 1 parameter\(s\) were put on manifolds without fgo_geo.constrain: module.0.weight. To project "
        r"them under `with torch.no_grad\(\):`, call `p.proj_\(\)` for every geoopt.ManifoldParameter"
    )
    with pytest.raises(ValueError, match=message):
        plan_of(averaged).project()
    weight = averaged.module[0].weight
    assert weight.manifold.violation(weight.detach()).max() > 1e-3
    with torch.no_grad():
        for p in averaged.parameters():
            if isinstance(p, geoopt.ManifoldParameter):
                p.proj_()
    assert weight.manifold.violation(weight.detach()).max() <= 1e-6


def test_json_keeps_everything() -> None:
    plan = constrain(net(), radius={"conv": "bound", "*": 0.3}, bound=2.0, statistics="max1")
    text = plan.to_json()
    again = Plan.from_json(text)
    assert again.entries == plan.entries
    assert again.to_json() == text
    assert str(again) == str(plan)
    with pytest.raises(ValueError, match=r"not attached to a model: call plan.attach\(model\)"):
        again.parameters()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected the JSON text of a plan"),
        ("[]", "expected the JSON text of a plan"),
        ("{}", "expected the JSON text of a plan"),
        ('{"version": 1,\n "entries": [}', r"got '.* \(Expecting value: line 2 column 14 \(char 28\)\)$"),
        ('{"version": 99, "entries": []}', "version 99, expected 1"),
        ('{"version": 1}', "damaged"),
        ('{"version": 1, "entries": [{}]}', "damaged"),
        ('{"version": 1, "entries": [{"names": 3}]}', "damaged"),
        ('{"version": 1, "entries": 3}', "damaged"),
    ],
)
def test_json_that_is_no_plan(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Plan.from_json(text)


def test_entries_that_are_not_constrained_have_no_manifold() -> None:
    with pytest.raises(ValueError, match=r"'stem.weight' is not constrained: it is the first convolution"):
        constrain(net()).entries[1].manifold()


def test_attach_moves_a_plan_to_another_model_with_the_same_values() -> None:
    model, twin = net(), net()
    plan = constrain(model)
    with torch.no_grad():
        for old, new in zip(model.parameters(), twin.parameters(), strict=True):
            new.copy_(old)
    other = Plan.from_json(plan.to_json())
    assert other.attach(twin) is plan_of(twin) is other
    assert snapshot(twin).keys() == snapshot(model).keys()
    train(model)
    train(twin)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)


def test_attach_can_project() -> None:
    plan, twin = constrain(net()), net(seed=1)
    before = snapshot(twin)
    other = Plan.from_json(plan.to_json())
    with pytest.raises(ValueError, match=r"'conv.weight' does not lie on its ProductOfGroups.*pass project=True"):
        other.attach(twin)
    assert_unchanged(twin, before)
    assert other.model is None
    other.attach(twin, project=True)
    for name, param in other.parameters().items():
        torch.testing.assert_close(param.detach(), param.manifold.projx(before[name][2]))


def test_attach_replaces_another_plan_and_keeps_the_parameters_objects() -> None:
    model = net()
    old = constrain(model, statistics="max1")
    new = constrain(net(), "layer", "sphere", include=["conv", "head"], statistics="std")
    new = Plan.from_json(new.to_json())
    conv = model.conv.weight
    hooks = len(model._forward_pre_hooks)
    new.attach(model, project=True)
    assert plan_of(model) is new
    assert old.model is None
    assert len(model._forward_pre_hooks) == hooks
    assert model.conv.weight is conv
    assert names(new) == ["conv.weight", "head.weight"]
    manifold_parameters = {n for n, p in model.named_parameters() if isinstance(p, geoopt.ManifoldParameter)}
    assert manifold_parameters == {"conv.weight", "head.weight"}
    tracked = {n for n, m in model.named_modules() if fgo_geo.models.feature_stats.is_tracked(m)}
    assert tracked == {"conv", "head"}
    assert_on_manifolds(new)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: setattr(m, "conv", nn.Conv2d(4, 6, 3)), r"'conv.weight' of shape \(6, 4, 2, 3\).*\(6, 4, 3, 3\)"),
        (lambda m: delattr(m, "up"), r"parameter 'up.weight' of shape .*the model has none of that name"),
    ],
)
def test_attach_refuses_another_architecture(change: Callable[[nn.Module], None], message: str) -> None:
    plan = Plan.from_json(constrain(net()).to_json())
    other = net()
    change(other)
    before = snapshot(other)
    with pytest.raises(ValueError, match=message):
        plan.attach(other, project=True)
    assert_unchanged(other, before)


def test_attach_refuses_to_tie_different_values() -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "head": nn.Linear(4, 2)})
    other = copy.deepcopy(model)
    model["b"].weight = model["a"].weight
    plan = Plan.from_json(constrain(model).to_json())
    with pytest.raises(ValueError, match=r"'a.weight' and 'b.weight' to be one tied weight"):
        plan.attach(other, project=True)
    with torch.no_grad():
        other["b"].weight.copy_(other["a"].weight)
    plan.attach(other, project=True)
    assert other["b"].weight is other["a"].weight


def test_project_brings_back_what_was_moved() -> None:
    model = net()
    plan = constrain(model)
    with torch.no_grad():
        for param in model.parameters():
            param.add_(0.1 * torch.randn(param.shape))
    expected = {n: p.manifold.projx(p.detach()) for n, p in plan.parameters().items()}
    plan.project()
    assert_on_manifolds(plan)
    for name, param in plan.parameters().items():
        torch.testing.assert_close(param.detach(), expected[name])
