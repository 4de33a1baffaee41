"""What version 0.1.0 pickled and saved still loads, and goes on as it would have gone on there.

``written-by-0.1.0.pt`` was written by that version: a constrained network after two steps, its optimiser's state, what
two more steps made of it, and pickles of every object that people keep.
"""

from __future__ import annotations

import copy
import io
from pathlib import Path

import pytest
import torch
from torch import nn

import fgo_geo
from fgo_geo import Oblique, Plan, ProductOfGroups, RiemannianFGSGD, ScaledSphere, Stiefel, constrain, plan_of
from fgo_geo.measures.report import Report

FILE = Path(__file__).parent / "data" / "written-by-0.1.0.pt"
WRITTEN = torch.load(FILE, weights_only=False)
KINDS = ("sphere", "oblique", "stiefel", "euclidean")


def unpickled(name: str) -> object:
    return torch.load(io.BytesIO(WRITTEN["pickles"][name]), weights_only=False)


def network() -> nn.Sequential:
    convolutions = (nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(*convolutions, nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 8), nn.Linear(8, 4))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model(WRITTEN["input"]).square().sum().backward()
        optimizer.step()


def optimizer_of(model: nn.Module) -> RiemannianFGSGD:
    return RiemannianFGSGD(model.named_parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)


def require_same_end(model: nn.Module) -> None:
    state = model.state_dict()
    for name, value in WRITTEN["after"].items():
        torch.testing.assert_close(state[name], value, rtol=1e-4, atol=1e-6)


def test_a_state_dict_loads_and_training_goes_on():
    model = network()
    constrain(model, strategy="pio", manifolds=KINDS, seed=3)
    model.load_state_dict(WRITTEN["model"])
    torch.testing.assert_close(model(WRITTEN["input"]), WRITTEN["outputs"])
    optimizer = optimizer_of(model)
    optimizer.load_state_dict(copy.deepcopy(WRITTEN["optimizer"]))  # it would share its tensors
    train(model, optimizer, 2)
    require_same_end(model)


def test_a_plan_in_json_loads_and_gives_the_same_groups():
    model = network()
    Plan.from_json(WRITTEN["plan_json"]).attach(model, project=True)
    before = plan_of(unpickled("whole_model")).constrained
    assert [(e.names, e.collections, e.radius) for e in plan_of(model).constrained] == [
        (e.names, e.collections, e.radius) for e in before
    ]


def test_a_pickled_model_goes_on():
    model = unpickled("whole_model")
    optimizer = optimizer_of(model)
    optimizer.load_state_dict(copy.deepcopy(WRITTEN["optimizer"]))  # it would share its tensors
    train(model, optimizer, 2)
    require_same_end(model)


def test_statistics_survive():
    model = unpickled("statistics_whole")
    plan_of(model).update_scales()
    model.load_state_dict(WRITTEN["statistics_model"])


def test_renormalized_state_loads():
    layer = network()
    fgo_geo.renormalize(layer[0], "weight", manifold="stiefel", bound=1.0)
    layer.load_state_dict(unpickled("renormalized_state"))


@pytest.mark.parametrize(
    ("name", "kind"),
    [("sphere", ScaledSphere), ("oblique", Oblique), ("stiefel", Stiefel), ("product", ProductOfGroups)],
)
def test_manifolds_unpickle(name, kind):
    manifold = unpickled(name)
    assert type(manifold) is kind
    repr(manifold)


def test_a_plan_a_collection_a_report_and_a_parameter_unpickle():
    assert type(unpickled("plan")) is Plan
    assert unpickled("collection") == fgo_geo.collection(4, 6, "pio", ("sphere", "stiefel"), seed=1)
    report = unpickled("report")
    assert type(report) is Report
    assert report.layers[0].name in str(report)
    parameter = unpickled("parameter")
    assert parameter.manifold.violation(parameter.detach()).max() < 1e-6


def test_a_pickled_optimiser_goes_on():
    weight, optimizer = unpickled("pickled_optimizer")
    (kept,) = optimizer.param_groups[0]["params"]
    assert kept is weight
    optimizer.step()
    assert weight.manifold.violation(weight.detach()).max() < 1e-5
