"""What a newcomer writes by mistake: each slip raises before anything has changed, and its message names the remedy."""

from __future__ import annotations

import copy
import pickle
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import geoopt
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fgo_geo
from fgo_geo import (
    Oblique,
    RiemannianFGSGD,
    ScaledSphere,
    Stiefel,
    channel_directed,
    channel_directed_gradient,
    constrain,
    on_manifolds,
    renormalize,
)
from fgo_geo.weights import kinds
from fgo_geo.weights.words import did_you_mean, small


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.Flatten(), nn.Linear(24, 4))


def trained(**options: object) -> tuple[nn.Sequential, RiemannianFGSGD]:
    model = network()
    constrain(model)
    return model, RiemannianFGSGD(model.parameters(), lr=0.1, **options)


def backward(model: nn.Module) -> None:
    model(torch.ones(2, 3, 6, 6)).square().sum().backward()


def used_up() -> object:
    parameters = network().parameters()
    nn.utils.clip_grad_norm_(parameters, 1.0)
    return parameters


def on_meta(act: Callable[[nn.Module], object]) -> Callable[[nn.Module], object]:
    def under(net: nn.Module) -> object:
        with torch.device("meta"):
            return act(net)

    return under


def made_in_inference_mode() -> nn.Module:
    with torch.inference_mode():
        return network()


NAMED = "pass model.named_parameters() of your model"
SLIPS = {
    "a number in quotes": (
        lambda net: RiemannianFGSGD(net.parameters(), lr="0.1"),
        TypeError,
        "RiemannianFGSGD: lr must be a number, got '0.1'; write it without quotes",
    ),
    "the model for its parameters": (
        lambda net: RiemannianFGSGD(net, lr=0.1),
        TypeError,
        f"RiemannianFGSGD: params is an object of type Sequential, expected parameters; {NAMED}",
    ),
    "the model in a list": (
        lambda net: RiemannianFGSGD([net], lr=0.1),
        TypeError,
        f"RiemannianFGSGD: params holds an object of type Sequential, expected parameters; {NAMED}",
    ),
    "the plan for the parameters": (
        lambda net: RiemannianFGSGD(constrain(net), lr=0.1),
        TypeError,
        f"RiemannianFGSGD: params is an object of type Plan, expected parameters; {NAMED}",
    ),
    "the plan's table of parameters": (
        lambda net: RiemannianFGSGD(constrain(net).parameters(), lr=0.1),
        TypeError,
        f"params is an object of type dict with names as keys, expected parameters; {NAMED}",
    ),
    "one parameter without a list": (
        lambda net: RiemannianFGSGD(net[0].weight, lr=0.1),
        TypeError,
        "params is an object of type Parameter, expected a list of parameters; put it in brackets, [w]",
    ),
    "a generator twice": (
        lambda net: RiemannianFGSGD(used_up(), lr=0.1),
        ValueError,
        "RiemannianFGSGD: got an empty parameter list. A generator like model.parameters() is empty after its first "
        "use: call model.named_parameters() again for every use",
    ),
    "an optimiser for the model": (
        lambda net: constrain(torch.optim.SGD(net.parameters(), lr=0.1)),
        TypeError,
        "constrain: expected a model, got SGD; call constrain(model) first, and build the optimiser from "
        "model.named_parameters() after that",
    ),
    "the class of the model": (
        lambda net: constrain(nn.Linear),
        TypeError,
        "constrain: expected a model, got the class Linear; pass an object, Linear(...)",
    ),
    "a plan unconstrained": (
        lambda net: fgo_geo.unconstrain(constrain(net)),
        TypeError,
        "unconstrain: expected a model, got Plan; constrain changes the model in place and returns the plan.",
    ),
    "a model attached": (
        lambda net: on_manifolds(net),
        TypeError,
        "on_manifolds: expected a torch optimiser, got Sequential; build one, e.g. "
        "torch.optim.AdamW(model.parameters()), after constrain(model)",
    ),
    "a model directed": (
        lambda net: channel_directed(net),
        TypeError,
        "optimizer is an object of type Sequential, expected a torch.optim.Optimizer; build one from "
        "model.named_parameters()",
    ),
    "a kind for the strategy": (
        lambda net: constrain(net, "stiefel"),
        ValueError,
        "got 'stiefel', which is a manifold kind: pass it as manifolds, e.g. strategy='layer', manifolds='stiefel'",
    ),
    "a strategy misspelt": (
        lambda net: constrain(net, "poi"),
        ValueError,
        "strategy must be one of ('layer', 'pi', 'po', 'pio'), got 'poi'; did you mean 'po'",
    ),
    "several kinds in one text": (
        lambda net: constrain(net, manifolds="sphere,stiefel"),
        ValueError,
        "got 'sphere,stiefel'; pass several kinds as a tuple, ('sphere', 'stiefel')",
    ),
    "a kind misspelt": (lambda net: constrain(net, manifolds=["steifel"]), ValueError, "; did you mean 'stiefel'?"),
    "the class of a manifold": (
        lambda net: constrain(net, manifolds=Stiefel),
        ValueError,
        "got <class 'fgo_geo.manifolds.stiefel.Stiefel'>; pass an object, Stiefel()",
    ),
    "a manifold of another radius": (
        lambda net: constrain(net, manifolds=Stiefel(radius=2.0)),
        ValueError,
        "the argument radius sets radii",
    ),
    "the name of a layer's type": (
        lambda net: constrain(net, include=["Conv2d"]),
        ValueError,
        "constrain: include has 'Conv2d', which matches no parameter; to name all layers of a type pass the type, "
        "Conv2d without quotes, e.g. torch.nn.Conv2d",
    ),
    "the default device without values": (
        on_meta(lambda net: constrain(net)),
        ValueError,
        "constrain: torch's default device is meta, which computes no radii; call constrain outside of",
    ),
    "a model made in inference mode": (
        lambda net: constrain(made_in_inference_mode()),
        ValueError,
        "4.weight: each was made under torch.inference_mode() and cannot be trained: build the model outside of it",
    ),
    "a group without a dict": (
        lambda net: RiemannianFGSGD(net[:1].parameters(), lr=0.1).add_param_group(list(net[2].parameters())),
        TypeError,
        "RiemannianFGSGD: add_param_group takes a dict, e.g. {'params': layer.named_parameters()}, got an object of "
        "type list",
    ),
    "a layer in a group": (
        lambda net: RiemannianFGSGD([{"params": net[0]}, {"params": net[2]}], lr=0.1),
        TypeError,
        f"RiemannianFGSGD: params is an object of type Conv2d, expected parameters; {NAMED}",
    ),
    "the optimiser of another model": (
        lambda net: fgo_geo.report(net, optimizer=trained()[1]),
        ValueError,
        "report: optimizer (RiemannianFGSGD) has no parameter of the model; pass the optimiser that trains this model",
    ),
    "an array for a tensor": (
        lambda net: fgo_geo.norms.matrix_norms(np.ones((3, 3))),
        TypeError,
        "w must be a torch.Tensor, got ndarray",
    ),
    "a layer for its name": (
        lambda net: constrain(net, include=net[2]),
        ValueError,
        "constrain: include has an object of type Conv2d of the parameters 2.weight, 2.bias, expected a name, a glob "
        "or a module type",
    ),
    "a parameter for its name": (
        lambda net: constrain(net, exclude=[net[2].weight]),
        ValueError,
        "constrain: exclude has an object of type Parameter of the parameters 2.weight, expected a name, a glob or a "
        "module type",
    ),
    "a number for a name": (
        lambda net: constrain(net, exclude=2),
        ValueError,
        "constrain: exclude has 2, expected a name, a glob or a module type",
    ),
    "overrides without settings": (
        lambda net: constrain(net, overrides=["2.weight"]),
        ValueError,
        "constrain: overrides is ['2.weight']; expected a mapping from names, globs or module types",
    ),
    "overrides by names and numbers": (
        lambda net: constrain(net, overrides={"2.*": {"strateg": "pi", 3: 4}}),
        ValueError,
        "got ['strateg', 3]; did you mean 'strategy'?",
    ),
    "a layer misspelt": (
        lambda net: constrain(nn.Sequential(network()), exclude="0.2.wieght"),
        ValueError,
        "did you mean '0.2.weight'",
    ),
    "a rule for radii misspelt": (
        lambda net: constrain(net, radius="kaimin"),
        ValueError,
        "got 'kaimin'; did you mean 'kaiming'?",
    ),
    "the model without its keyword": (
        lambda net: channel_directed(torch.optim.SGD(net.parameters(), lr=0.1), "h1", 1.0, net),
        ValueError,
        "axis is a model (Sequential), which channel_directed takes as module=; expected 'output', 'input' or an "
        "integer",
    ),
    "the model for the metric": (
        lambda net: channel_directed(torch.optim.SGD(net.parameters(), lr=0.1), net),
        ValueError,
        "metric is a model (Sequential), which channel_directed takes as module=; expected one of h0, h1, h1t",
    ),
    "the model for the weight": (
        lambda net: channel_directed(torch.optim.SGD(net.parameters(), lr=0.1), "h1", net),
        TypeError,
        "lam is a model (Sequential), which channel_directed takes as module=; expected a number",
    ),
    "the optimiser and the model in the wrong order": (
        lambda net: channel_directed(net, torch.optim.SGD(net.parameters(), lr=0.1)),
        TypeError,
        "optimizer is an object of type Sequential, expected a torch.optim.Optimizer",
    ),
    "several numbers for lam": (
        lambda net: channel_directed(torch.optim.SGD(net.parameters(), lr=0.1), "h1", np.array([1.0, 2.0])),
        TypeError,
        "lam is array([1., 2.]), expected a number",
    ),
    "a float for the number of groups": (
        lambda net: channel_directed_gradient(net[0].weight.detach(), "h1", 1.0, groups=2.0),  # pyright: ignore
        TypeError,
        "groups is 2.0, expected an integer",
    ),
    "several numbers for lam, in a tensor": (
        lambda net: channel_directed_gradient(net[0].weight.detach(), "h1", torch.ones(2)),
        TypeError,
        "lam is an object of type Tensor, expected a number",
    ),
    "an array for a gradient": (
        lambda net: channel_directed_gradient(np.ones((2, 2))),
        TypeError,
        "the gradient is an object of type ndarray, expected a torch.Tensor",
    ),
    "a truth value for an axis": (
        lambda net: channel_directed(torch.optim.SGD(net.parameters(), lr=0.1), axis=True),
        ValueError,
        "axis is True, expected 'output', 'input' or an integer",
    ),
    "a truth value for the number of parts": (
        lambda net: constrain(net, overrides={"2": {"split": True}}),
        ValueError,
        "split must be a positive number of equal parts, got True",
    ),
    "no parameters": (
        lambda net: RiemannianFGSGD(None, lr=0.1),
        TypeError,
        f"RiemannianFGSGD: params is None, expected parameters; {NAMED}",
    ),
    "a gradient that is not there": (
        lambda net: channel_directed_gradient(net[0].weight.grad),
        TypeError,
        "the gradient is None, expected a torch.Tensor",
    ),
    "the side for the axis of a tensor": (
        lambda net: channel_directed_gradient(net[0].weight.detach(), axis="output"),
        TypeError,
        "axis is 'output', expected an integer",
    ),
    "an axis misspelt": (
        lambda net: channel_directed(torch.optim.SGD(net.parameters(), lr=0.1), axis="inputs"),
        ValueError,
        "axis is 'inputs', expected 'output', 'input' or an integer; did you mean 'input'?",
    ),
    "an override misspelt": (
        lambda net: constrain(net, overrides={"2": {"manifold": "stiefel", "stratgey": "pi"}}),
        ValueError,
        "got ['manifold', 'stratgey']; did you mean 'manifolds'?; did you mean 'strategy'?",
    ),
    "a file for the data of a report": (
        lambda net: fgo_geo.report(net, "data.pt"),
        ValueError,
        "report: data is 'data.pt', and report loads no files; expected a batch, (inputs, labels), a loader, or the "
        "size of one input, e.g. (3, 224, 224)",
    ),
    "the model twice": (
        lambda net: fgo_geo.report(net, net),
        ValueError,
        "report: data is Sequential; expected a batch",
    ),
    "a file for the text of a plan": (
        lambda net: fgo_geo.Plan.from_json("plan.json"),
        ValueError,
        "expected the JSON text of a plan (Plan.to_json), got 'plan.json' (Expecting value: line 1 ",
    ),
    "a plan for the model in a report": (
        lambda net: fgo_geo.report(constrain(net)),
        TypeError,
        "report: expected a model, got Plan; constrain changes the model in place and returns the plan.",
    ),
    "a plan's table of parameters for torch": (  # torch's own words, which the page on troubleshooting explains
        lambda net: torch.optim.AdamW(constrain(net).parameters()),
        TypeError,
        "optimizer can only optimize Tensors, but one of the params is",
    ),
    "a model for a layer": (
        lambda net: renormalize(net),
        ValueError,
        "renormalize: Sequential.weight is not a parameter; its layers have 0.weight, 2.weight, 4.weight: call "
        "renormalize for one layer at a time, e.g. renormalize(model.get_submodule('0'), 'weight')",
    ),
}


@pytest.mark.parametrize("slip", SLIPS)
def test_a_slip_is_refused_with_a_remedy_and_changes_nothing(slip):
    act, error, message = SLIPS[slip]
    net = network()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(error, match=re.escape(message)):
        act(net)
    if not slip.startswith(("the plan", "a plan")):  # these constrain the model before they slip
        assert not any(isinstance(p, geoopt.ManifoldParameter) for p in net.parameters())
        assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_a_plan_that_is_taken_for_the_model_says_what_it_is():
    net = network()
    plan = constrain(net)
    remedy = "Keep the model under its own name: write `plan = constrain(model)` and continue with `model`"
    with pytest.raises(TypeError, match=f"a Plan is not a model and cannot be called: .*{re.escape(remedy)}"):
        plan(torch.ones(2, 3, 6, 6))
    for name in ("train", "eval", "to", "state_dict", "named_parameters", "zero_grad"):
        with pytest.raises(AttributeError, match=f"a Plan is not a model and has no '{name}': .*{re.escape(remedy)}"):
            getattr(plan, name)
    with pytest.raises(TypeError, match=f"a Plan is not a model and has no layers: .*{re.escape(remedy)}"):
        plan[0]
    of_a_dict = constrain(nn.ModuleDict({"stem": network()}))
    with pytest.raises(AttributeError, match=f"a Plan is not a model and has no 'stem': .*{re.escape(remedy)}"):
        _ = of_a_dict.stem
    with pytest.raises(AttributeError, match=r"^'Plan' object has no attribute 'nothing'$"):
        _ = plan.nothing
    assert copy.copy(plan).entries == plan.entries == copy.deepcopy(net).fgo_geo_plan.entries
    assert fgo_geo.plan_of(pickle.loads(pickle.dumps(net))).entries == plan.entries


def test_a_handle_in_place_of_its_optimiser_and_what_a_kind_is_called():
    model = network()
    constrain(model)
    handle = on_manifolds(torch.optim.SGD(model.parameters(), lr=0.1))
    message = (
        "optimizer is an object of type OnManifolds, expected a torch.optim.Optimizer; pass its attribute optimizer"
    )
    with pytest.raises(TypeError, match=f"{re.escape(message)}$"):
        channel_directed(handle)
    assert repr(kinds.kind("sphere")) == "<Kind 'sphere': ScaledSphere>"


def test_a_scripted_model_is_refused():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that torch.jit.script is deprecated
        net = torch.jit.script(network())
    for model in (net, nn.Sequential(nn.Linear(2, 2), net)):
        with pytest.raises(ValueError, match=r"is or has a ScriptModule, .* after fgo_geo.unconstrain\(model\)$"):
            constrain(model)


def test_a_constrained_model_is_scripted_once_it_is_plain():
    net = network()
    constrain(net)
    x = torch.ones(2, 3, 6, 6)
    before = net(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that torch.jit.script is deprecated
        with pytest.raises(RuntimeError, match=r"Pre-hook '_guard' on module 'Sequential' expected the input argument"):
            torch.jit.script(net)
        scripted = torch.jit.script(fgo_geo.unconstrain(net))
    assert torch.equal(scripted(x), before)


def test_an_optimiser_without_names_that_was_built_too_early_names_the_weight():
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    constrain(net)
    backward(net)
    with pytest.raises(RuntimeError, match=r"^SGD: '2.weight', of shape .* is no longer a parameter of its model"):
        optimizer.step()


@pytest.mark.parametrize("number", [np.float32(0.5), np.int64(2)])
def test_numbers_of_numpy_are_radii_and_bounds(number):
    for options in ({"radius": number}, {"radius": "bound", "bound": number}):
        plan = constrain(network(), "layer", "sphere", **options)
        assert fgo_geo.Plan.from_json(plan.to_json()).entries == plan.entries
        assert float(number) in (plan.constrained[0].radius, plan.constrained[0].bound)


def test_whole_numbers_of_numpy_are_axes_counts_and_parts():
    model = nn.Linear(4, 6)
    handles = [
        channel_directed(torch.optim.SGD(model.parameters(), lr=0.1), "h1", 2.0, axis=axis) for axis in (1, np.int64(1))
    ]
    assert handles[0].summary() == handles[1].summary()
    g = torch.randn(6, 4)
    expected = channel_directed_gradient(g, "h1", 2.0, axis=-2, groups=3)
    assert torch.equal(channel_directed_gradient(g, "h1", 2.0, axis=np.int32(-2), groups=np.int8(3)), expected)
    plans = [
        constrain(network(), "layer", "sphere", classifier=True, overrides={"4": {"split": split}})
        for split in (2, np.uint8(2))
    ]
    assert plans[0].entries == plans[1].entries
    assert plans[0].to_json() == plans[1].to_json()
    fgo_geo.telemetry(torch.optim.SGD(model.parameters(), lr=0.1), every=np.int64(2)).remove()


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("Sphere", "ScaledSphere"),
        ("Sphre", "ScaledSphere"),
        ("FGSGD", "RiemannianFGSGD"),
        ("FSGD", "RiemannianFGSGD"),
        ("stiefel", "Stiefel"),
        ("Steifel", "Stiefel"),
        ("on_manifold", "on_manifolds"),
    ],
)
def test_a_public_name_that_does_not_exist_is_asked_back(name, known):
    with pytest.raises(AttributeError, match=f"module 'fgo_geo' has no attribute '{name}'; did you mean .*'{known}'"):
        getattr(fgo_geo, name)


def test_names_that_resemble_none_and_names_that_exist_take_no_search(monkeypatch):
    assert not hasattr(fgo_geo, "xyzzy")
    with pytest.raises(AttributeError, match=r"module 'fgo_geo' has no attribute 'xyzzy'$"):
        _ = fgo_geo.xyzzy
    monkeypatch.setattr(fgo_geo, "did_you_mean", lambda *_: pytest.fail("searched"))
    assert all(hasattr(fgo_geo, name) for name in fgo_geo.__all__)
    assert not hasattr(fgo_geo, "__wrapped__")


def test_one_manifold_object_is_one_kind():
    net = network()
    plan = constrain(net, manifolds=Stiefel())
    assert {kind for entry in plan.constrained for c in entry.collections for kind in c.kinds} == {"stiefel"}


def test_words_are_read_in_any_case_of_letters():
    def constrained(**options: object) -> list[Tensor]:
        net = network()
        constrain(net, **options)
        return [p.detach() for p in net.parameters()]

    lower = {"strategy": "pio", "manifolds": ("sphere", "oblique"), "selection": "random", "radius": "bound"}
    lower |= {"bound_of": "layer", "components": "filter", "initial": "project", "statistics": "max1"}
    upper = {name: word.upper() if isinstance(word, str) else [w.upper() for w in word] for name, word in lower.items()}
    assert all(map(torch.equal, constrained(**lower), constrained(**upper)))

    g = torch.randn(6, 4)
    small_gradient = fgo_geo.channel_directed_gradient(g, "h1", 2.0, ends="free")
    torch.testing.assert_close(fgo_geo.channel_directed_gradient(g, "H1", 2.0, ends="Free"), small_gradient)
    layer = nn.Linear(4, 6)
    handle = channel_directed(torch.optim.SGD(layer.parameters(), lr=0.1), "H1", 2.0, axis="Output", ends="FREE")
    assert "metric='h1', lam=2.0, axis='output', ends='free'" in repr(handle)

    weights = []
    for options in (
        {"step_size": "angle", "update": "exponential"},
        {"step_size": "ANGLE", "update": "Exponential"},
    ):
        model, optimizer = trained(**options)
        backward(model)
        optimizer.step()
        weights.append(model[2].weight.detach())
        handle = on_manifolds(torch.optim.SGD(network_on_spheres().parameters(), lr=0.1), **options)
        assert "step_size='angle'" in repr(handle)
    assert torch.equal(*weights)

    optimizer.param_groups[0]["step_size"] = "Theorem"
    optimizer.step()
    assert optimizer.param_groups[0]["step_size"] == "theorem"

    written = (("stiefel", "spectral", "max1", "layer"), ("Stiefel", "Spectral", "MAX1", "Layer"))
    a, b = (renormalize(nn.Linear(8, 4), "weight", m, (n,), statistics=s, bound_of=b) for m, n, s, b in written)
    assert str(a.parametrizations.weight[0]) == str(b.parametrizations.weight[0])


def network_on_spheres() -> nn.Module:
    layer = nn.Linear(4, 6)
    sphere = ScaledSphere()
    layer.weight = geoopt.ManifoldParameter(sphere.projx(layer.weight.detach()), manifold=sphere)
    return layer


def test_step_scales_say_why_a_parameter_has_none():
    model, optimizer = trained()
    weight = model[2].weight
    assert optimizer.step_scales() == {}
    with pytest.raises(KeyError, match=r"'2.weight', param_groups.* no step scale: call optimizer.step\(\) first"):
        optimizer.step_scales()[weight]
    backward(model)
    optimizer.step()
    scales = optimizer.step_scales()
    assert (scales[weight] >= 1).all()
    with pytest.raises(KeyError, match="no step scale: it is not on a manifold"):
        scales[model[2].bias]
    with pytest.raises(KeyError, match=r"read by parameter or by its name, e.g. 'fc.weight', not by 2"):
        scales[2]
    optimizer.zero_grad()
    with pytest.raises(KeyError, match="it had no gradient in the latest step"):
        RiemannianFGSGD.step_scales(_stepped(optimizer, model))[weight]
    assert type(copy.deepcopy(scales)) is dict


@pytest.mark.parametrize("with_names", [True, False])
def test_step_scales_are_printed_and_read_by_name(monkeypatch, with_names):
    model = network()
    plan = constrain(model, first_layer=True)
    optimizer = RiemannianFGSGD(model.named_parameters() if with_names else model.parameters(), lr=0.1)
    backward(model)
    optimizer.step()
    scales = optimizer.step_scales()
    assert list(scales) == [model[0].weight, model[2].weight] == list(plan.parameters().values())
    assert scales["2.weight"] is scales[model[2].weight] is scales.get("2.weight") is scales.get(model[2].weight)
    assert "2.weight" in scales
    assert model[2].weight in scales
    monkeypatch.setattr("fgo_geo.optim.points.did_you_mean", lambda *_: pytest.fail("searched"))
    for missing in ("2.bias", "2.wieght", model[2].bias, 2):
        assert missing not in scales
        assert scales.get(missing) is None
        assert scales.get(missing, 1.0) == 1.0
    monkeypatch.undo()
    assert repr(scales) == f"{{'0.weight': {scales[model[0].weight]!r}, '2.weight': {scales[model[2].weight]!r}}}"
    with pytest.raises(KeyError, match=r"no parameter of the name '2.wieght'; the names are 0.weight.*mean '2.weight'"):
        scales["2.wieght"]
    if with_names:
        with pytest.raises(KeyError, match=r"'2.bias', .* has no step scale: it is not on a manifold"):
            scales["2.bias"]


def test_step_scales_after_the_list_of_parameters_was_changed():
    model = network()
    constrain(model, first_layer=True)
    optimizer = RiemannianFGSGD(model.named_parameters(), lr=0.1)
    optimizer.param_groups[0]["params"].append(torch.nn.Parameter(torch.zeros(2)))
    backward(model)
    optimizer.step()
    scales = optimizer.step_scales()
    assert repr(scales).startswith("{'0.weight': tensor(")
    assert scales["2.weight"] is scales[model[2].weight]


def test_step_scales_without_names_or_with_names_that_two_models_share():
    sphere = network_on_spheres()
    optimizer = RiemannianFGSGD(sphere.parameters(), lr=0.1)
    sphere(torch.ones(2, 4)).square().sum().backward()
    optimizer.step()
    assert repr(optimizer.step_scales()).startswith("{param_groups[0]['params'][0]: tensor(")
    with pytest.raises(KeyError, match=r"no parameter of the name 'weight'; build the optimiser from model.named_par"):
        optimizer.step_scales()["weight"]
    models = [network(), network()]
    for model in models:
        constrain(model)
        backward(model)
    optimizer = RiemannianFGSGD([p for model in models for p in model.parameters()], lr=0.1)
    optimizer.step()
    assert optimizer.step_scales()[models[1][2].weight].shape
    with pytest.raises(KeyError, match=r"has 2 parameters of the name '2.weight': read the scale by parameter"):
        optimizer.step_scales()["2.weight"]


def _stepped(optimizer: RiemannianFGSGD, model: nn.Module) -> RiemannianFGSGD:
    """After a step in which another weight had a gradient, and this one had none."""
    other = geoopt.ManifoldParameter(Oblique().random(5, 3))
    optimizer.add_param_group({"params": [other]})
    other.grad = torch.ones(5, 3)
    optimizer.step()
    return optimizer


def test_errors_name_parameters_as_the_model_does():
    model, optimizer = trained()  # built from parameters(), without names
    backward(model)
    model[2].weight.grad[0, 0] = torch.nan
    with pytest.raises(FloatingPointError, match=r"'2\.weight'"):
        optimizer.step()
    model[2].weight.grad.zero_()
    fgo_geo.unconstrain(model)
    with pytest.raises(RuntimeError, match=r"'2\.weight'"):
        optimizer.step()
    handle = channel_directed(torch.optim.SGD(constrained_attention().parameters(), lr=0.1))
    assert "\nin_proj_weight (12, 4)" in handle.summary()


def constrained_attention() -> nn.Module:
    attention = nn.MultiheadAttention(4, 2, bias=False)
    constrain(attention, classifier=True)
    return attention


@pytest.mark.parametrize("word", ["", "zzz", None, 3, "s"])
def test_nothing_is_suggested_where_nothing_is_alike(word):
    assert did_you_mean(word, ["sphere", "stiefel"]) == ""
    assert small(word) == word


def test_importing_the_package_warns_of_nothing_and_leaves_filters_alone():
    code = (
        "import warnings; before = list(warnings.filters)\n"
        "import fgo_geo, geoopt\n"
        "print(before == warnings.filters)\n"
        "warnings.warn('another warning', FutureWarning)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"
    assert "jit" not in done.stderr
    assert "another warning" in done.stderr


def test_other_warnings_of_the_import_come_through():
    file = Path(fgo_geo.__file__).with_name("_geoopt.py")
    source = file.read_text(encoding="utf-8").replace("    import geoopt", "    " + "warnings.warn('x', FutureWarning)")
    with pytest.warns(FutureWarning, match="^x$"):
        exec(compile(source, file, "exec"), {})
