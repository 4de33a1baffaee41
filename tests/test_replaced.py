"""Optimisers that hold parameters which their model no longer has: an error, whoever made the optimiser."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import geoopt
import pytest
import torch
from networks import images, net
from torch import nn

from fgo_geo import RiemannianFGSGD, channel_directed, constrain, plan_of, unconstrain

OPTIMISERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": lambda params: torch.optim.SGD(params, lr=0.1),
    "AdamW": lambda params: torch.optim.AdamW(params, lr=1e-3),
    "Geoopt's SGD": lambda params: geoopt.optim.RiemannianSGD(params, lr=0.1),
    "Geoopt's Adam": lambda params: geoopt.optim.RiemannianAdam(params, lr=1e-3),
    "FG-SGD": lambda params: RiemannianFGSGD(params, lr=0.1),
}
every_optimiser = pytest.mark.parametrize("make", OPTIMISERS.values(), ids=OPTIMISERS)
MESSAGE = r"conv\.weight.* is no longer a parameter of its model.*Build the optimiser after that"


def backward(model: nn.Module) -> None:
    model.zero_grad()
    model(images()).square().mean().backward()


def reload(model: nn.Module) -> None:
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)


CHANGES: dict[str, tuple[bool, Callable[[nn.Module], Any]]] = {
    "constrain": (False, constrain),
    "unconstrain": (True, unconstrain),
    "assign": (True, reload),
}


@every_optimiser
@pytest.mark.parametrize(("starts_constrained", "change"), CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("has_stepped", [False, True])
def test_an_optimiser_that_was_built_before(
    make: Any, starts_constrained: bool, change: Callable[[nn.Module], Any], has_stepped: bool
) -> None:
    model = net()
    if starts_constrained:
        constrain(model)
    optimizer = make([(n, p) for n, p in model.named_parameters() if n.startswith("conv")])
    if has_stepped:
        backward(model)
        optimizer.step()
        if starts_constrained:
            plan_of(model).project()  # not every optimiser keeps points on their manifolds
    optimizer.zero_grad()
    change(model)
    backward(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(RuntimeError, match=MESSAGE):
        optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    again = make(model.parameters())
    again.step()
    assert not torch.equal(model.conv.weight, before["conv.weight"])


def test_assigned_parameters_are_all_named_as_replaced() -> None:
    """Of 23 parameters the old optimiser would move none."""
    model = net()
    constrain(model)
    optimizer = torch.optim.SGD(model.bn.parameters(), lr=0.1)
    reload(model)
    assert plan_of(model).lost() == []
    with pytest.raises(
        RuntimeError, match=r"SGD: param_groups\[0\]\['params'\]\[0\], of shape \(4,\), is no longer a parameter"
    ):
        optimizer.step()
    constrain(net())
    torch.optim.SGD(model.bn.parameters(), lr=0.1).step()


def test_a_load_that_assigns_nothing_replaces_nothing() -> None:
    model = net()
    constrain(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    model.load_state_dict(copy.deepcopy(model.state_dict()))
    pickle.loads(pickle.dumps(model))
    backward(model)
    optimizer.step()


def test_channel_directed_before_constrain() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    channel_directed(optimizer, module=model)
    constrain(model)
    backward(model)
    with pytest.raises(RuntimeError, match="is no longer a parameter of its model"):
        optimizer.step()


def test_a_parameter_that_another_model_still_trains_is_not_refused() -> None:
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    optimizer = torch.optim.SGD(second.parameters(), lr=0.1)
    constrain(first, classifier=True)
    second(torch.ones(2, 4)).sum().backward()
    optimizer.step()


def test_a_step_is_checked_once_after_each_replacement(monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
    constrain(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    optimizer.step()
    calls: list[Any] = []
    monkeypatch.setattr("fgo_geo.manifolds.replaced.was_replaced", lambda param: bool(calls.append(param)))
    optimizer.step()
    assert not calls
    constrain(net())
    optimizer.step()
    assert calls
