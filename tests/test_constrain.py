"""constrain, unconstrain and the plan: what a model's parameters get, and what survives everything done to a model."""

from __future__ import annotations

import copy
import fnmatch
import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import geoopt
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import layers
from torch import Tensor, nn

import fgo_geo
from fgo_geo import Plan, ProductOfGroups, RiemannianFGSGD, constrain, plan_of, unconstrain
from fgo_geo.choose import PlanEntry
from fgo_geo.grouping import MANIFOLD_KINDS, STRATEGIES
from fgo_geo.radius import group_radii


class Net(nn.Module):
    """One layer of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.conv = nn.Conv2d(4, 6, (2, 3), padding=1)
        self.depthwise = nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False)
        self.up = nn.ConvTranspose2d(6, 8, 2, groups=2)
        self.point = nn.Conv2d(8, 8, 1, groups=2)
        self.block = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8))
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.table = nn.Embedding(5, 8)
        self.tokens = nn.Parameter(torch.zeros(1, 1, 8))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(self.conv(self.bn(self.stem(x))).relu())
        x = self.point(self.up(x)).relu().flatten(2).mT
        x = x + self.tokens + self.table.weight.mean(0)
        x = self.block(x)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head(x.mean(1))


CONSTRAINED = [
    "conv.weight",
    "depthwise.weight",
    "up.weight",
    "point.weight",
    "block.0.weight",
    "block.2.weight",
    "attention.in_proj_weight",
    "attention.out_proj.weight",
]


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net()


def images(n: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(n, 3, 5, 5, generator=torch.Generator().manual_seed(seed))


def names(plan: Plan) -> list[str]:
    return [entry.name for entry in plan.constrained]


def snapshot(model: nn.Module) -> dict[str, tuple[type, int, Tensor]]:
    """Class, identity and value of every parameter: nothing of it may change when a call fails."""
    params = model.named_parameters(remove_duplicate=False)
    return {name: (type(p), id(p), p.detach().as_subclass(Tensor).clone()) for name, p in params}


def assert_unchanged(model: nn.Module, before: dict[str, tuple[type, int, Tensor]]) -> None:
    after = snapshot(model)
    assert {n: v[:2] for n, v in after.items()} == {n: v[:2] for n, v in before.items()}
    for name, (*_, value) in after.items():
        torch.testing.assert_close(value, before[name][2], rtol=0, atol=0, equal_nan=True)


def assert_on_manifolds(plan: Plan, tolerance: float = 1e-5) -> None:
    for param in plan.parameters().values():
        assert float(param.manifold.violation(param.detach()).max()) < tolerance


def train(model: nn.Module, steps: int = 2, optimizer: torch.optim.Optimizer | None = None) -> torch.optim.Optimizer:
    optimizer = optimizer or RiemannianFGSGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in range(steps):
        optimizer.zero_grad()
        model(images(seed=step)).square().mean().backward()
        optimizer.step()
    return optimizer


# -- what gets constrained ---------------------------------------------------------------------------------------


def test_defaults() -> None:
    model = net()
    plan = constrain(model)
    assert names(plan) == CONSTRAINED
    assert_on_manifolds(plan)
    for name, param in model.named_parameters():
        constrained = name in CONSTRAINED
        assert isinstance(param, geoopt.ManifoldParameter) is constrained
        if constrained:
            assert isinstance(param.manifold, ProductOfGroups)
            assert param.manifold.layout.shape == tuple(param.shape)


def test_every_parameter_has_an_entry_and_a_reason() -> None:
    plan = constrain(net())
    assert [e.name for e in plan.entries] == [name for name, _ in net().named_parameters()]
    reason = {e.name: e.reason for e in plan.entries}
    assert "first convolution" in reason["stem.weight"]
    assert "classifier" in reason["head.weight"]
    assert "one dimension" in reason["conv.bias"]
    assert "normalised features" in reason["bn.weight"]
    assert "lookup table" in reason["table.weight"]
    assert "unknown layout" in reason["tokens"]
    assert all(reason[name] is None for name in CONSTRAINED)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"first_layer": True}, ["stem.weight", *CONSTRAINED]),
        ({"classifier": True}, [*CONSTRAINED, "head.weight"]),
        ({"include": "conv"}, ["conv.weight"]),
        ({"include": "conv.weight"}, ["conv.weight"]),
        ({"include": "block"}, ["block.0.weight", "block.2.weight"]),
        ({"include": "block.*"}, ["block.0.weight", "block.2.weight"]),
        ({"include": ["*.in_proj_weight", "head"]}, ["attention.in_proj_weight", "head.weight"]),
        ({"include": nn.Linear}, ["block.0.weight", "block.2.weight", "attention.out_proj.weight", "head.weight"]),
        ({"include": [nn.ConvTranspose2d, "stem"]}, ["stem.weight", "up.weight"]),
        ({"include": nn.Conv2d, "exclude": "depth*"}, ["stem.weight", "conv.weight", "point.weight"]),
        ({"exclude": ["block", nn.MultiheadAttention, "attention"]}, CONSTRAINED[:4]),
        ({"exclude": "*.[0-9].weight"}, [n for n in CONSTRAINED if not n.startswith("block")]),
    ],
    ids=str,
)
def test_choosing(arguments: dict[str, Any], expected: list[str]) -> None:
    assert names(constrain(net(), **arguments)) == expected


def test_the_last_linear_layer_or_1x1_convolution_is_the_classifier() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(4, 4), nn.Conv2d(4, 2, 1), nn.ReLU())
    assert names(constrain(model)) == ["1.weight", "2.weight"]


def test_frozen_layers_are_left_alone_and_stay_first_and_last() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(4, 4), nn.Linear(4, 2))
    for layer in (model[0], model[2], model[4]):
        layer.requires_grad_(False)
    plan = constrain(model)
    assert names(plan) == ["1.weight", "3.weight"]
    assert "frozen" in str(plan.entries[0].reason)


def test_components_that_could_not_move_are_left_alone() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(1, 1), nn.Conv1d(4, 4, 1), nn.Linear(2, 2))
    plan = constrain(model, "layer", "sphere", first_layer=True)
    assert names(plan) == ["0.weight", "2.weight"]
    assert "isolated points" in str(plan.entries[2].reason)
    plan = constrain(unconstrain(model), "layer", "sphere", first_layer=True, overrides={"0": {"components": "kernel"}})
    assert "single numbers" in str(plan.entries[0].reason)


def test_tied_weights_stay_tied() -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "head": nn.Linear(4, 2)})
    model["b"].weight = model["a"].weight
    plan = constrain(model)
    assert plan.constrained[0].names == ("a.weight", "b.weight")
    assert model["a"].weight is model["b"].weight is plan.parameters()["a.weight"]
    assert "a.weight (also b.weight)" in str(plan)
    unconstrain(model)
    assert model["a"].weight is model["b"].weight


def test_one_weight_under_two_names_of_a_module_stays_tied() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].alias = model[0].weight
    entry = constrain(model, classifier=True).entries[0]
    assert entry.names == ("0.weight", "0.alias")
    assert "'alias' of Linear, of unknown layout" in str(entry.reason)


def test_weights_tied_to_a_table_or_to_another_layout_are_left_alone() -> None:
    model = nn.ModuleDict({"table": nn.Embedding(4, 4), "decoder": nn.Linear(4, 4), "head": nn.Linear(4, 4)})
    model["decoder"].weight = model["table"].weight
    assert "lookup table" in str(constrain(model, classifier=True).entries[0].reason)
    model = nn.ModuleDict({"a": nn.Conv2d(4, 4, 3), "b": nn.ConvTranspose2d(4, 4, 3), "c": nn.Linear(4, 4)})
    model["b"].weight = model["a"].weight
    assert "different layouts" in str(constrain(model, classifier=True, first_layer=True).entries[0].reason)


def test_weights_in_other_hands_are_left_alone() -> None:
    model = nn.Sequential(
        nn.LazyLinear(4),
        nn.utils.parametrizations.orthogonal(nn.Linear(4, 4)),
        nn.Linear(4, 4),
        nn.Linear(4, 4),
    )
    model[2].weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.complex64))
    plan = constrain(model, classifier=True)
    reasons = [str(e.reason) for e in plan.entries if "weight" in e.name]
    for reason, word in zip(reasons, ("not initialised", "re-parametrised", "complex64", "None"), strict=True):
        assert word in reason
    assert "0.weight" in str(plan)


def test_overrides_and_radius_rules_by_pattern() -> None:
    plan = constrain(
        net(),
        radius={"block": 0.5, nn.Linear: "unit", "up.weight": "bound"},
        overrides={
            "conv": {"strategy": "layer", "manifolds": "stiefel", "components": "block"},
            "depthwise.*": {"selection": "deterministic", "seed": 7, "radius": 2},
            nn.ConvTranspose2d: {"bound": 3.0, "strategy": "po"},
        },
    )
    entry = {e.name: e for e in plan.entries}
    rules = {"conv": "kaiming", "depthwise": 2, "up": "bound", "block.0": 0.5, "attention.out_proj": "unit"}
    assert {name: entry[f"{name}.weight"].radius for name in rules} == rules
    (conv,) = entry["conv.weight"].collections
    assert (conv.strategy, conv.kinds, conv.components) == ("layer", ("stiefel",), "block")
    (depthwise,) = entry["depthwise.weight"].collections
    assert (depthwise.selection, depthwise.seed, depthwise.strategy) == ("deterministic", 7, "pio")
    assert (entry["up.weight"].bound, entry["up.weight"].collections[0].strategy) == (3.0, "po")
    assert entry["point.weight"].bound == 1.0
    assert plan.parameters()["conv.weight"].manifold.partition.sizes == ((24, 6),)


def test_groups_are_a_function_of_seed_and_name() -> None:
    def groups(seed: int) -> list[Any]:
        return [c for e in constrain(net(), seed=seed).constrained for c in e.collections]

    assert groups(1) == groups(1)
    assert groups(1) != groups(2)
    attention = constrain(net()).constrained[6]
    assert [c.name for c in attention.collections] == [f"attention.in_proj_weight[{i}]" for i in range(3)]
    assert len({c.to_json() for c in attention.collections}) == 3


# -- values ------------------------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(
    layer=layers(),
    strategy=st.sampled_from(STRATEGIES),
    kinds=st.lists(st.sampled_from(MANIFOLD_KINDS), min_size=1, max_size=4),
    arguments=st.fixed_dictionaries(
        {
            "selection": st.sampled_from(["random", "deterministic"]),
            "radius": st.sampled_from(["kaiming", "unit", "bound", 0.3]),
            "seed": st.integers(0, 99),
            "components": st.sampled_from(["auto", "block"]),
            "initial": st.sampled_from(["project", "uniform"]),
        }
    ),
)
def test_any_layer_with_any_settings(
    layer: tuple[nn.Module, str], strategy: str, kinds: list[str], arguments: dict[str, Any]
) -> None:
    """Constrained, it trains on its manifold; otherwise the reason is given. Unconstrained, it is a plain layer."""
    module = nn.ModuleList([layer[0], nn.Linear(4, 4)])
    name = f"0.{layer[1]}"
    kinds = kinds[:1] if strategy == "layer" else kinds
    plain = snapshot(module)
    plan = constrain(module, strategy, kinds, first_layer=True, classifier=True, **arguments)
    entry = next(e for e in plan.entries if e.name == name)
    weight = module.get_parameter(name)
    if entry.constrained:
        expected = group_radii(weight.manifold.partition, arguments["radius"]).to(torch.float32)
        radius = weight.manifold.radius_map(weight.detach())
        by_group = weight.manifold.in_collection_order(
            [
                s.max(p.flatten(1).amax(1))
                for s, p in zip(
                    weight.manifold.partition.segments, weight.manifold.partition.split(radius), strict=True
                )
            ]
        )
        torch.testing.assert_close(by_group, expected)
        assert Plan.from_json(plan.to_json()).entries == plan.entries
        optimizer = RiemannianFGSGD(module.parameters(), lr=0.1, momentum=0.9)
        for seed in range(2):
            weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))
            optimizer.step()
            assert_on_manifolds(plan)
    else:
        assert "isolated point" in str(entry.reason) or "no room" in str(entry.reason)
        assert type(weight) is nn.Parameter
        assert torch.equal(weight, plain[name][2])
    unconstrain(module)
    assert {type(p) for p in module.parameters()} == {nn.Parameter}


def test_initial_weights_are_the_nearest_points() -> None:
    model, plain = net(), net()
    plan = constrain(model, radius=0.7)
    for name, param in plan.parameters().items():
        expected = param.manifold.projx(plain.get_parameter(name).detach())
        torch.testing.assert_close(param.detach(), expected, rtol=0, atol=0)
    for entry in plan.entries:
        if not entry.constrained:
            assert torch.equal(model.get_parameter(entry.name), plain.get_parameter(entry.name))


def test_initial_weights_drawn_uniformly_leave_what_is_not_constrained() -> None:
    model, plain = net(), net()
    torch.manual_seed(5)
    plan = constrain(model, initial="uniform")
    again = net()
    torch.manual_seed(5)
    constrain(again, initial="uniform")
    assert_on_manifolds(plan)
    for name, param in plan.parameters().items():
        before, after = plain.get_parameter(name).detach(), param.detach()
        same = before == after
        mask = param.manifold.where_constrained(torch.zeros_like(before), torch.ones_like(before)).bool()
        assert torch.equal(same, mask)
        assert torch.equal(after, again.get_parameter(name).detach())


def test_names_shapes_types_and_layouts_of_parameters_do_not_change() -> None:
    model, plain = net().to(memory_format=torch.channels_last), net()
    strides = {name: p.stride() for name, p in model.named_parameters()}
    constrain(model, first_layer=True, classifier=True)
    assert {name: p.stride() for name, p in model.named_parameters()} == strides
    assert [(n, v.shape, v.dtype) for n, v in model.state_dict().items()] == [
        (n, v.shape, v.dtype) for n, v in plain.state_dict().items()
    ]
    assert {type(v) for v in model.state_dict().values()} == {Tensor}
    train(model)
    assert {name: p.stride() for name, p in model.named_parameters()} == strides


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types(dtype: torch.dtype) -> None:
    model = net().to(dtype)
    plan = constrain(model, radius="bound")
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert_on_manifolds(plan, 16 * torch.finfo(dtype).eps)
    for entry, param in zip(plan.constrained, plan.parameters().values(), strict=True):
        exact = entry.manifold().radius_map(param.detach().double())
        radius = param.manifold.radius_map(param.detach().double())
        torch.testing.assert_close(radius, exact, rtol=1e-15 if dtype == torch.float64 else 1e-7, atol=0)


# -- and back ----------------------------------------------------------------------------------------------------


def test_unconstrain_keeps_outputs_and_leaves_no_trace() -> None:
    model, plain = net(), net()
    plan = constrain(model, statistics="max1")
    train(model)
    model.eval()
    before, outputs = snapshot(model), model(images())
    assert unconstrain(model) is model
    assert torch.equal(model(images()), outputs)
    assert {type(p) for p in model.parameters()} == {nn.Parameter}
    for name, (*_, value) in snapshot(model).items():
        assert torch.equal(value, before[name][2])
    assert plan.model is None
    for key, value in plain.__dict__.items():
        if isinstance(value, dict):
            assert len(model.__dict__[key]) == len(value), key
    assert model.__dict__.keys() == plain.__dict__.keys()
    assert [n for n, _ in model.named_modules()] == [n for n, _ in plain.named_modules()]
    assert not model.state_dict()._metadata[""].keys() - {"version"}
    constrain(model)


def test_unconstrain_takes_manifold_parameters_declared_by_hand_along() -> None:
    model = nn.Linear(3, 3)
    model.weight = geoopt.ManifoldParameter(model.weight.data, manifold=geoopt.Sphere())
    assert type(unconstrain(model).weight) is nn.Parameter


def test_frozen_after_constraining_stays_frozen() -> None:
    model = net()
    constrain(model)
    model.conv.requires_grad_(False)
    before = model.conv.weight.detach().clone()
    train(model)
    assert torch.equal(model.conv.weight, before)
    assert not unconstrain(model).conv.weight.requires_grad


# -- the plan ----------------------------------------------------------------------------------------------------


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
    assert all(len(line) < 170 for line in text.splitlines())
    assert "Left alone" not in str(constrain(nn.Linear(8, 8, bias=False), classifier=True))


def test_the_plan_is_the_models() -> None:
    model = net()
    plan = constrain(model)
    wrapped = nn.Sequential(nn.Sequential(model))
    assert plan_of(model) is plan_of(wrapped) is plan is model.fgo_geo_plan
    assert plan.model is model
    with pytest.raises(ValueError, match="this model is not constrained"):
        plan_of(net())


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
        ("", "no plan in JSON"),
        ("[]", "no plan in JSON"),
        ("{}", "no plan in JSON"),
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
    tracked = {n for n, m in model.named_modules() if fgo_geo.feature_stats.is_tracked(m)}
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


# -- saving and loading ------------------------------------------------------------------------------------------


def through_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("assign", [False, True])
def test_a_checkpoint_restores_groups_and_radii(assign: bool) -> None:
    model, other = net(), net(seed=1)
    constrain(model, seed=3, radius=0.4)
    train(model)
    plan = constrain(other, seed=4, include=["conv", "head"])
    conv, up = other.conv.weight, other.up.weight
    other.load_state_dict(through_file(model.state_dict()), assign=assign)
    assert plan_of(other) is plan
    assert plan.entries == plan_of(model).entries
    assert_on_manifolds(plan)
    if not assign:
        assert other.conv.weight is conv
        assert other.up.weight is not up
    assert type(other.head.weight) is nn.Parameter
    model.eval(), other.eval()
    assert torch.equal(other(images()), model(images()))
    optimizers = [RiemannianFGSGD(m.parameters(), lr=0.1, momentum=0.9) for m in (model, other)]
    for m, optimizer in zip((model, other), optimizers, strict=True):
        train(m, 2, optimizer)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_run_continues_exactly() -> None:
    model = net()
    constrain(model)
    optimizer = train(model, 3)
    saved = through_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    resumed = net(seed=2)
    constrain(resumed)
    resumed.load_state_dict(saved["model"])
    again = RiemannianFGSGD(resumed.parameters(), lr=0.1, momentum=0.9)
    again.load_state_dict(saved["optimizer"])
    train(model, 2, optimizer)
    train(resumed, 2, again)
    for a, b in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("assign", [False, True])
def test_a_plain_checkpoint_is_refused(assign: bool) -> None:
    model, plain = net(), net(seed=1)
    plan = constrain(model)
    before, entries = snapshot(model), plan.entries
    with pytest.raises(ValueError, match=r"'conv.weight' in the state_dict does not lie.*load plain weights before"):
        model.load_state_dict(plain.state_dict(), assign=assign)
    assert_unchanged(model, before)
    assert plan.entries is entries


def test_a_checkpoint_of_another_architecture_is_refused() -> None:
    model, other = net(), net()
    other.conv = nn.Conv2d(4, 6, 3)
    for m in (model, other):
        constrain(m)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"'conv.weight' of shape \(6, 4, 3, 3\)"):
        model.load_state_dict(other.state_dict())
    assert_unchanged(model, before)


def test_a_damaged_plan_is_refused() -> None:
    model = net()
    constrain(model)
    state, before = model.state_dict(), snapshot(model)
    state._metadata[""]["fgo_geo_plan"] = "{}"
    with pytest.raises(ValueError, match="no plan in JSON"):
        model.load_state_dict(state)
    assert_unchanged(model, before)


def test_a_state_dict_without_metadata_needs_the_same_plan() -> None:
    model, same, other = net(), net(1), net(1)
    for m, seed in ((model, 0), (same, 0), (other, 1)):
        constrain(m, seed=seed)
    bare = dict(model.state_dict())
    same.load_state_dict(bare)
    assert_on_manifolds(plan_of(same))
    with pytest.raises(ValueError, match="in the state_dict does not lie"):
        other.load_state_dict(bare)


def test_a_constrained_checkpoint_loads_into_a_plain_model() -> None:
    model, plain = net(), net(1)
    constrain(model)
    plain.load_state_dict(through_file(model.state_dict()))
    assert torch.equal(plain.eval()(images()), model.eval()(images()))


def test_models_within_models_keep_their_plans() -> None:
    first, second = (nn.ModuleDict({"encoder": net(seed), "decoder": nn.Linear(3, 3)}) for seed in (0, 1))
    constrain(first["encoder"], seed=1)
    constrain(second["encoder"], seed=2)
    second.load_state_dict(through_file(first.state_dict()))
    assert plan_of(second).entries == plan_of(first["encoder"]).entries
    partial = {k: v for k, v in first.state_dict().items() if not k.startswith("encoder.conv")}
    assert second.load_state_dict(partial, strict=False).missing_keys


# -- copies, and what torch loses --------------------------------------------------------------------------------

COPIES: list[Callable[[nn.Module], nn.Module]] = [
    copy.deepcopy,
    lambda m: pickle.loads(pickle.dumps(m)),
    lambda m: torch.load(io.BytesIO(saved(m)), weights_only=False),
]


def saved(model: nn.Module) -> bytes:
    file = io.BytesIO()
    torch.save(model, file)
    return file.getvalue()


@pytest.mark.parametrize("duplicate", COPIES, ids=["deepcopy", "pickle", "torch.save"])
def test_copies_have_their_own_plan(duplicate: Callable[[nn.Module], nn.Module]) -> None:
    model = net()
    plan = constrain(model, statistics="max1")
    train(model)
    twin = duplicate(model)
    own = plan_of(twin)
    assert own is not plan
    assert own.model is twin
    assert own.entries == plan.entries
    assert own.parameters()["conv.weight"] is twin.conv.weight is not model.conv.weight
    assert twin.conv.weight.manifold is not model.conv.weight.manifold
    train(model)
    train(twin)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)
    twin.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    assert_on_manifolds(own)
    own.update_scales()
    unconstrain(twin)
    assert {type(p) for p in twin.parameters()} == {nn.Parameter}
    assert not twin._forward_pre_hooks
    twin.load_state_dict(net().state_dict())
    assert plan_of(model) is plan
    assert_on_manifolds(plan)
    assert len(model._forward_pre_hooks) == 1
    with pytest.raises(ValueError, match="does not lie"):
        model.load_state_dict(net().state_dict(), strict=False)


def test_parameters_that_became_plain_are_noticed_and_put_back() -> None:
    model = net()
    plan = constrain(model, seed=1)
    train(model)
    state, outputs = through_file(model.state_dict()), model.eval()(images())
    model.to("meta").to_empty(device="cpu")
    message = (
        rf"{len(CONSTRAINED)} constrained parameter\(s\) have become plain.*conv.weight.*and 2 more.*attach\(model\)"
    )
    for call in (plan.check, plan.parameters, plan.project, plan.update_scales, lambda: model(images())):
        with pytest.raises(RuntimeError, match=message):
            call()
    model.load_state_dict(state)
    assert plan_of(model) is plan
    assert_on_manifolds(plan)
    assert torch.equal(model(images()), outputs)


def test_attach_after_materialisation() -> None:
    model = net()
    plan = constrain(model)
    values = {k: v.clone() for k, v in model.state_dict().items()}
    model.to("meta").to_empty(device="cpu")
    with torch.no_grad():
        for name, value in (*model.named_parameters(), *model.named_buffers()):
            value.copy_(values[name])
    plan.attach(model)
    assert_on_manifolds(plan)
    assert {n for n, p in model.named_parameters() if isinstance(p, geoopt.ManifoldParameter)} == set(CONSTRAINED)


def test_ties_survive_materialisation() -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "head": nn.Linear(4, 2)})
    model["b"].weight = model["a"].weight
    plan = constrain(model)
    state = through_file(model.state_dict())
    model.to("meta").to_empty(device="cpu").load_state_dict(state)
    assert model["b"].weight is model["a"].weight is plan.parameters()["a.weight"]


def test_a_model_without_values_can_be_constrained() -> None:
    with torch.device("meta"):
        model = Net()
    plan = constrain(model, statistics="max1")
    assert names(plan) == CONSTRAINED
    assert "conv.weight" in str(plan)
    reference = net()
    constrain(reference, statistics="max1")
    model.load_state_dict(reference.state_dict(), assign=True)
    assert_on_manifolds(plan)
    assert torch.equal(model.eval()(images()), reference.eval()(images()))
    train(model)


def test_a_replaced_layer_is_noticed() -> None:
    model = net()
    constrain(model, statistics="max1")
    model.block = nn.Identity()
    with pytest.raises(RuntimeError, match=r"or are gone: block.0.weight, block.2.weight.*unconstrain\(model\)"):
        model(images())
    constrain(unconstrain(model), statistics="max1")


def test_functional_call_is_no_loss() -> None:
    model = net()
    constrain(model)
    model.eval()
    values = {n: p.detach().as_subclass(Tensor).clone() for n, p in model.named_parameters()}
    outputs = torch.func.functional_call(model, values, (images(),))
    torch.testing.assert_close(outputs, model(images()))
    torch.testing.assert_close(torch.func.functional_call(model, dict(model.named_parameters()), (images(),)), outputs)
    gradients = torch.func.grad(lambda p: torch.func.functional_call(model, p, (images(),)).sum())(values)
    assert gradients.keys() == values.keys()

    small, _ = two(None)
    values = {n: p.detach().as_subclass(Tensor) for n, p in small.named_parameters()}
    x = features(SCALE)[:3]
    outputs = torch.func.vmap(lambda x: torch.func.functional_call(small, values, (x.unsqueeze(0),)))(x)
    torch.testing.assert_close(outputs.squeeze(1), small(x))


# -- statistics --------------------------------------------------------------------------------------------------


class Two(nn.Module):
    """Two layers whose inputs are known: the features of ``conv`` are the model's inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3)
        self.fc = nn.Linear(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(x).mean((2, 3)))


def two(statistics: Any, **arguments: Any) -> tuple[Two, Plan]:
    torch.manual_seed(0)
    model = Two()
    arguments = {"strategy": "pi", "manifolds": ("sphere", "stiefel", "euclidean"), "radius": 0.5} | arguments
    return model, constrain(model, first_layer=True, classifier=True, statistics=statistics, **arguments)


def features(scale: list[float]) -> Tensor:
    """Inputs with given standard deviations per channel."""
    x = torch.randn(64, 4, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = (x - x.mean((0, 2, 3), keepdim=True)) / x.std((0, 2, 3), keepdim=True)
    return (x * torch.tensor(scale, dtype=torch.float64)[:, None, None]).float()


def saturate(model: Two, scale: list[float]) -> None:
    """Feed the running statistics until they are those of the features."""
    for _ in range(200):
        model(features(scale))


SCALE = [0.25, 1.0, 2.0, 8.0]


@pytest.mark.parametrize(("statistics", "expected"), [("std", SCALE), ("max1", [1.0, 1.0, 2.0, 8.0])])
def test_radii_follow_the_features(statistics: str, expected: list[float]) -> None:
    model, plan = two(statistics)
    before, optimizer = model.conv.weight.detach().clone(), RiemannianFGSGD(model.parameters(), lr=0.1, momentum=0.9)
    model(features(SCALE)).square().mean().backward()
    optimizer.step()
    before, buffer = model.conv.weight.detach().clone(), optimizer.state[model.conv.weight]["momentum_buffer"].clone()
    saturate(model, SCALE)
    plan.update_scales(optimizer)
    ratio = 1 / torch.tensor(expected)[None, :, None, None]
    weight, momentum = model.conv.weight.detach(), optimizer.state[model.conv.weight]["momentum_buffer"]
    manifold = model.conv.weight.manifold
    ratio = manifold.where_constrained(ratio.expand_as(before), torch.ones_like(before))
    torch.testing.assert_close(weight, before * ratio, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(momentum, buffer * ratio, rtol=1e-4, atol=1e-6)
    manifold.assert_check_point_on_manifold(weight)
    torch.testing.assert_close(
        manifold.radius_map(weight), manifold.where_constrained(0.5 * ratio, ratio), rtol=1e-4, atol=0
    )
    assert_on_manifolds(plan)
    train_two(model, optimizer)
    assert_on_manifolds(plan)


def train_two(model: Two, optimizer: torch.optim.Optimizer) -> None:
    for _ in range(3):
        optimizer.zero_grad()
        model(features(SCALE)).square().mean().backward()
        optimizer.step()


def test_momentum_stays_tangent_and_other_optimisers_are_served() -> None:
    for make in (torch.optim.SGD, geoopt.optim.RiemannianSGD, RiemannianFGSGD, geoopt.optim.RiemannianAdam):
        model, plan = two("max1", manifolds=("sphere", "stiefel"))
        arguments = {} if make is geoopt.optim.RiemannianAdam else {"momentum": 0.9}
        optimizer = make(model.parameters(), lr=1e-3, **arguments)
        train_two(model, optimizer)
        plan.project()
        param = model.conv.weight
        key = "exp_avg" if make is geoopt.optim.RiemannianAdam else "momentum_buffer"
        with torch.no_grad():
            optimizer.state[param][key].copy_(param.manifold.proju(param, optimizer.state[param][key]))
        plan.update_scales(optimizer)
        assert param.manifold.check_vector_on_tangent(param.detach(), optimizer.state[param][key])
        assert param.manifold.check_point_on_manifold(param.detach())


def test_a_block_takes_the_root_mean_square_over_its_channels() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8))
    plan = constrain(model, "pi", ("sphere", "stiefel"), "deterministic", radius=1.0, classifier=True, statistics="std")
    x = features(SCALE).mean((2, 3))
    x = x / x.std(0) * torch.tensor(SCALE)
    for _ in range(200):
        model(x)
    plan.update_scales()
    radius = model[0].weight.manifold.radius_map(model[0].weight.detach())
    pooled = torch.tensor([(0.25**2 + 1) / 2, (4 + 64) / 2]).sqrt()
    torch.testing.assert_close(radius, (1 / pooled).repeat_interleave(2).expand(8, 4), rtol=1e-4, atol=0)


def test_grouped_convolutions_take_the_channels_of_their_group() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2))
    plan = constrain(model, "layer", "sphere", radius=1.0, first_layer=True, statistics="std")
    for _ in range(200):
        model(features(SCALE))
    plan.update_scales()
    lengths = model[0].weight.detach().flatten(2).norm(dim=2)
    expected = 1 / torch.tensor([SCALE[:2]] * 3 + [SCALE[2:]] * 3)
    torch.testing.assert_close(lengths, expected, rtol=1e-4, atol=0)


def test_tied_weights_take_the_root_mean_square_over_their_layers() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    model["b"].weight = model["a"].weight
    plan = constrain(model, "layer", "sphere", radius=1.0, classifier=True, statistics="std")
    x = features([1.0] * 4).mean((2, 3))
    x = x / x.std(0)
    for _ in range(200):
        model["a"](3 * x)
        model["b"](4 * x)
    plan.update_scales()
    assert float(model["a"].weight.detach().norm()) == pytest.approx(1 / (25 / 2) ** 0.5, rel=1e-4)
    assert list(plan.constrained[0].channel_scales) == pytest.approx([(25 / 2) ** 0.5] * 4, rel=1e-4)


def test_updates_do_not_pile_up() -> None:
    """The radius is γ / λ for the present λ, whatever it has been."""
    model, plan = two("std")
    saturate(model, SCALE)
    plan.update_scales()
    saturate(model, [1.0] * 4)
    plan.update_scales()
    radius = model.conv.weight.manifold.radius_map(model.conv.weight.detach())
    assert sorted(set(radius.flatten().round(decimals=3).tolist())) == [0.5, 1.0]
    assert_on_manifolds(plan)
    before = snapshot(model)
    plan.update_scales()
    assert_unchanged(model, before)


def test_without_features_nothing_changes() -> None:
    model, plan = two("std")
    before = snapshot(model)
    plan.update_scales()
    assert_unchanged(model, before)
    model.eval()
    saturate(model, SCALE)
    plan.update_scales()
    assert_unchanged(model, before)
    model, plan = two(None)
    before = snapshot(model)
    plan.update_scales()
    assert_unchanged(model, before)
    assert not [n for n in model.state_dict() if "statistics" in n]


def test_attention_keeps_its_radii() -> None:
    """Its packed and its output projection are never called as layers."""
    model = net()
    plan = constrain(model, statistics="std")
    radii = {n: p.manifold.radius_map(p.detach()) for n, p in plan.parameters().items()}
    train(model, 20)
    plan.update_scales()
    kept = {n for n, p in plan.parameters().items() if torch.equal(p.manifold.radius_map(p.detach()), radii[n])}
    assert kept == {"attention.in_proj_weight", "attention.out_proj.weight"}


def test_features_that_are_not_finite_change_nothing() -> None:
    model, plan = two("std")
    saturate(model, SCALE)
    model(torch.full((2, 4, 5, 5), torch.nan))
    before, entries = snapshot(model), plan.entries
    with pytest.raises(ValueError, match=r"the standard deviation of the input of 'conv.weight' has 4 non-finite"):
        plan.update_scales()
    assert_unchanged(model, before)
    assert plan.entries is entries


def test_scales_survive_checkpoints_exactly() -> None:
    model, plan = two("std")
    optimizer = RiemannianFGSGD(model.parameters(), lr=0.1, momentum=0.9)
    train_two(model, optimizer)
    plan.update_scales(optimizer)
    train_two(model, optimizer)
    state = through_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    for statistics in ("std", None):
        other, _ = two(statistics)
        other.load_state_dict(state["model"])
        assert plan_of(other).entries == plan.entries
        again = RiemannianFGSGD(other.parameters(), lr=0.1, momentum=0.9)
        again.load_state_dict(copy.deepcopy(state["optimizer"]))
        twin = copy.deepcopy((model, optimizer))
        for m, o in (twin, (other, again)):
            train_two(m, o)
            plan_of(m).update_scales(o)
            train_two(m, o)
        for a, b in zip(twin[0].parameters(), other.parameters(), strict=True):
            assert torch.equal(a, b)
    assert json.loads(plan.to_json())["entries"][0]["channel_scales"] == list(plan.entries[0].channel_scales)


def test_a_checkpoint_without_statistics_turns_them_off() -> None:
    plain, _ = two(None)
    model, plan = two("std")
    model.load_state_dict(plain.state_dict())
    assert [e.statistics for e in plan.entries] == [None] * 4
    assert model.state_dict().keys() == plain.state_dict().keys()


def test_layers_tracked_by_someone_else_stay_tracked() -> None:
    torch.manual_seed(0)
    model = Two()
    handle = fgo_geo.feature_stats.track(model.conv)
    constrain(model, first_layer=True, classifier=True, statistics="max1")
    assert handle.statistics is model.conv.fgo_geo_statistics
    unconstrain(model)
    assert fgo_geo.feature_stats.is_tracked(model.conv)
    assert not fgo_geo.feature_stats.is_tracked(model.fc)


def test_half_precision_follows_the_features() -> None:
    model, plan = two("max1", manifolds=("sphere", "stiefel"))
    model.to(torch.bfloat16)
    for _ in range(50):
        model(features(SCALE).to(torch.bfloat16))
    plan.update_scales()
    assert model.conv.weight.dtype == torch.bfloat16
    assert_on_manifolds(plan, 2e-2)
    assert plan.entries[0].channel_scales[3] == pytest.approx(8.0, rel=0.05)


# -- errors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"include": "convv"},
            ValueError,
            r"include has 'convv', which matches no parameter.*stem.weight, .*and \d+ more",
        ),
        ({"exclude": ["conv", "no.*"]}, ValueError, r"exclude has 'no.\*', which matches no parameter"),
        ({"include": nn.LSTM}, ValueError, "include has <class 'torch.nn.modules.rnn.LSTM'>, which matches no"),
        ({"include": [nn.Linear(2, 2)]}, ValueError, r"include has Linear\(.*expected a name, a glob or a module type"),
        ({"radius": {"nothing": 1.0}}, ValueError, "radius has 'nothing', which matches no parameter"),
        ({"overrides": {"nothing": {}}}, ValueError, "overrides has 'nothing', which matches no parameter"),
        ({"overrides": {"conv": {"kind": "sphere"}}}, ValueError, r"overrides\['conv'\] may change .*got \['kind'\]"),
        ({"overrides": {"conv": {"strategy": "no"}}}, ValueError, r"overrides\['conv'\].*strategy must be one of"),
        ({"include": "bn"}, ValueError, "include='bn' asks for what cannot be constrained: bn.weight scales or shifts"),
        ({"include": "table"}, ValueError, "asks for what cannot be constrained: table.weight is a lookup table"),
        ({"include": "stem", "exclude": "stem"}, ValueError, "stem.weight is excluded"),
        ({"exclude": "*"}, ValueError, "nothing is left to constrain .*stem.weight is excluded; .*include="),
        ({"strategy": "pip"}, ValueError, "strategy must be one of"),
        ({"strategy": "layer"}, ValueError, "puts the whole layer on one manifold, got 4"),
        ({"manifolds": ("sphere", "torus")}, ValueError, "manifold kind must be one of"),
        ({"manifolds": ()}, ValueError, "manifolds must name at least one"),
        ({"selection": "best"}, ValueError, "selection must be one of"),
        ({"radius": "large"}, ValueError, "radius must be"),
        ({"radius": -1.0}, ValueError, "radius must be"),
        ({"radius": {"conv": "large"}}, ValueError, "radius must be"),
        ({"bound": 0.0}, ValueError, "^bound must be a positive number"),
        ({"components": "rows"}, ValueError, "components must be one of"),
        ({"initial": "zero"}, ValueError, "initial must be one of"),
        ({"statistics": "var"}, ValueError, "statistics must be one of"),
        ({"seed": 1.5}, TypeError, "seed must be an integer"),
    ],
    ids=str,
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    model = net()
    before = snapshot(model)
    with pytest.raises(error, match=message):
        constrain(model, **arguments)
    assert_unchanged(model, before)
    assert not model._forward_pre_hooks
    assert "fgo_geo_plan" not in model.__dict__


def test_a_weight_that_is_not_finite_changes_nothing() -> None:
    model = net()
    with torch.no_grad():
        model.attention.out_proj.weight[0, 0] = torch.nan
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"constrain: 'attention\.out_proj\.weight' has 1 non-finite entry"):
        constrain(model, "layer", "stiefel")
    assert_unchanged(model, before)


def test_a_model_without_parameters() -> None:
    with pytest.raises(ValueError, match=r"nothing is left to constrain \(it has no parameters\)"):
        constrain(nn.ReLU())


@pytest.mark.parametrize("part", ["", "block", "attention"])
def test_constraining_twice(part: str) -> None:
    model = net()
    constrain(model.get_submodule(part), classifier=True)
    before = snapshot(model)
    for target in (model, model.get_submodule(part)):
        with pytest.raises(ValueError, match=r"manifold parameters already; call fgo_geo.unconstrain\(model\) first"):
            constrain(target)
    assert_unchanged(model, before)


def test_constraining_what_has_lost_its_manifolds() -> None:
    model = net()
    constrain(model)
    with pytest.raises(ValueError, match="already"):
        constrain(model.to("meta").to_empty(device="cpu"))


def test_constraining_what_is_distributed(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        model = net()
        with pytest.raises(ValueError, match="constrain the model before wrapping it"):
            constrain(nn.parallel.DistributedDataParallel(model))
        assert {type(p) for p in model.parameters()} == {nn.Parameter}
    finally:
        dist.destroy_process_group()


def test_constraining_with_parameters_declared_by_hand() -> None:
    model = net()
    model.block[0].weight = geoopt.ManifoldParameter(model.block[0].weight.data, manifold=geoopt.Euclidean())
    with pytest.raises(ValueError, match="or constrain before declaring others by hand"):
        constrain(model)


def test_patterns_are_globs() -> None:
    """The documented meaning of a pattern: a parameter, a module, a part of the model, or a glob of either."""
    model = net()
    for pattern in ("*.weight", "block.*", "b*", "block.[02]", "block"):
        meant = {
            n
            for n, _ in model.named_parameters()
            if fnmatch.fnmatchcase(n, pattern)
            or fnmatch.fnmatchcase(n.rpartition(".")[0], pattern)
            or n.startswith(pattern + ".")
        }
        plan = constrain(model, include=pattern)
        assert {e.name for e in plan.entries if e.reason != "is not among the layers to include"} >= meant
        assert set(names(plan)) <= meant
        unconstrain(model)


def test_entries_are_records() -> None:
    entry = PlanEntry(("a.weight", "b.weight"), "Linear", (2, 2), reason="is excluded")
    assert (entry.name, entry.constrained) == ("a.weight", False)
    assert PlanEntry.from_dict(json.loads(json.dumps(entry.to_dict()))) == entry


def test_a_plan_of_one_model_is_not_attached_to_another():
    first, second = (nn.Sequential(nn.Conv2d(2, 4, 3), nn.Conv2d(4, 6, 3)) for _ in range(2))
    plan = fgo_geo.constrain(first, "po", "sphere")
    with pytest.raises(ValueError, match="belongs to another model already; attach a copy"):
        plan.attach(second, project=True)
    assert fgo_geo.plan_of(first) is plan
    fgo_geo.Plan.from_json(plan.to_json()).attach(second, project=True)
    assert fgo_geo.plan_of(second).model is second


def test_a_checkpoint_of_another_plan_without_all_weights_is_refused_before_anything_changes():
    model, other = (nn.Sequential(nn.Conv2d(2, 4, 3), nn.Conv2d(4, 6, 3), nn.Conv2d(6, 6, 3)) for _ in range(2))
    fgo_geo.constrain(model, "pi", ("sphere", "stiefel"), seed=0)
    fgo_geo.constrain(other, "pi", ("sphere", "stiefel"), seed=1)
    state = other.state_dict()
    del state["1.weight"]
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=r"has another plan than the model and lacks 1\.weight"):
        model.load_state_dict(state, strict=False)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    for param in fgo_geo.plan_of(model).parameters().values():
        assert param.manifold.violation(param.detach()).max() < 1e-5
