"""constrain and unconstrain: what a model's parameters get, and what is refused."""

from __future__ import annotations

import fnmatch
import json
from pathlib import Path
from typing import Any

import geoopt
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import layers
from networks import CONSTRAINED, assert_on_manifolds, assert_unchanged, images, names, net, snapshot, train
from torch import Tensor, nn

import fgo_geo
from fgo_geo import Plan, ProductOfGroups, RiemannianFGSGD, constrain, unconstrain
from fgo_geo.grouping import MANIFOLD_KINDS, STRATEGIES
from fgo_geo.models.entry import PlanEntry
from fgo_geo.weights.radius import group_radii

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
    arguments = {"strategy": "layer", "manifolds": "sphere", "first_layer": True, "classifier": True, "exclude": "3"}
    plan = constrain(model, **arguments)
    assert names(plan) == ["0.weight", "2.weight"]
    assert "isolated points" in str(plan.entries[2].reason)
    plan = constrain(unconstrain(model), **arguments, overrides={"0": {"components": "kernel"}})
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
            "components": st.sampled_from(["auto", "block", "filter"]),
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
        (
            {"include": [nn.Linear(2, 2)]},
            ValueError,
            r"include has an object of type Linear, expected a name, a glob or a module type",
        ),
        ({"radius": {"nothing": 1.0}}, ValueError, "radius has 'nothing', which matches no parameter"),
        ({"overrides": {"nothing": {}}}, ValueError, "overrides has 'nothing', which matches no parameter"),
        ({"overrides": {"conv": {"kind": "sphere"}}}, ValueError, r"overrides\['conv'\] may change .*got \['kind'\]"),
        ({"overrides": {"conv": {"strategy": "no"}}}, ValueError, r"overrides\['conv'\].*strategy must be one of"),
        ({"include": "bn"}, ValueError, "include='bn' asks for what cannot be constrained: bn.weight scales or shifts"),
        ({"include": "table"}, ValueError, "asks for what cannot be constrained: table.weight is a lookup table"),
        ({"include": "stem", "exclude": "stem"}, ValueError, "stem.weight is excluded"),
        (
            {"exclude": "*"},
            ValueError,
            "nothing is left to constrain .*stem.weight, .* and [0-9]+ more: each is excluded.*include=",
        ),
        ({"strategy": "pip"}, ValueError, "strategy must be one of"),
        ({"strategy": "layer"}, ValueError, "puts the whole layer on one manifold, got 4"),
        ({"manifolds": ("sphere", "torus")}, ValueError, "manifold kind must be one of"),
        ({"manifolds": ()}, ValueError, "manifolds must name at least one"),
        ({"selection": "best"}, ValueError, "selection must be one of"),
        ({"radius": "large"}, ValueError, "radius must be"),
        ({"radius": -1.0}, ValueError, "radius must be"),
        ({"radius": {"conv": "large"}}, ValueError, "radius must be"),
        ({"bound": 0.0}, ValueError, "^bound must be a positive finite float"),
        ({"bound": 1.0}, ValueError, 'bound=1.0 has no effect without radius="bound"; pass that, or leave bound out'),
        ({"bound": 2.0, "radius": {"*": 0.5}}, ValueError, "bound=2.0 has no effect"),
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
