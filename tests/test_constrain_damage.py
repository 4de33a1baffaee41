"""Plans and state dicts that are corrupted or truncated: a ValueError, and nothing half-loaded."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from networks import assert_unchanged, net, snapshot, train
from torch import nn

from fgo_geo import Plan, constrain, plan_of


def model_and_state(seed: int) -> tuple[nn.Module, Any]:
    model = net(seed)
    constrain(model, seed=seed, statistics="max1")
    train(model)
    return model, model.state_dict()


def require_refusal(model: nn.Module, state: Any, message: str = "") -> None:
    before, entries = snapshot(model), plan_of(model).entries
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    with pytest.raises(ValueError, match=message):
        model.load_state_dict(state)
    assert_unchanged(model, before)
    assert plan_of(model).entries is entries
    assert all(torch.equal(value, buffers[name]) for name, value in model.named_buffers())


def test_a_plan_that_was_cut_off_anywhere() -> None:
    model, state = model_and_state(0)
    _, stored = model_and_state(1)
    text = stored._metadata[""]["fgo_geo_plan"]
    for end in range(0, len(text), 997):
        with pytest.raises(ValueError, match="expected the JSON text of a plan"):
            Plan.from_json(text[:end])
    stored._metadata[""]["fgo_geo_plan"] = text[:-1]
    require_refusal(
        model, stored, r"the plan in the metadata of the state_dict cannot be read: expected the JSON text of a plan"
    )
    model.load_state_dict(state)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*path, key))


def with_value(text: str, path: tuple[Any, ...], value: Any) -> str:
    data = target = json.loads(text)
    for key in path[:-1]:
        target = target[key]
    if value is Ellipsis:
        del target[path[-1]]
    else:
        target[path[-1]] = value
    return json.dumps(data)


def test_a_plan_with_any_value_replaced_is_refused_or_still_a_plan() -> None:
    """Every kind of place, once with every kind of value: no error but ValueError, and a model as it was."""
    model = net()
    text = constrain(net(), statistics="max1").to_json()
    kinds = {tuple(key if isinstance(key, str) else 0 for key in path): path for path in places(json.loads(text))}
    before, refused = snapshot(model), 0
    for path, value in itertools.product(kinds.values(), (None, -1, 1.5, True, "x", [], {}, [None], float("nan"), ...)):
        if not path:
            continue
        try:
            plan = Plan.from_json(with_value(text, path, value))
            str(plan)
            plan.attach(net(), project=True)
        except ValueError:
            refused += 1
        else:
            continue
        assert_unchanged(model, before)
    assert refused > 100


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "up.weight",
            torch.zeros(3),
            r"'up\.weight' in the state_dict: expected .* shape \(6, 4, 2, 2\), got torch.float",
        ),
        ("up.weight", "text", r"'up\.weight' .*got str; load a checkpoint of this architecture"),
        ("up.weight", torch.ones(6, 4, 2, 2, dtype=torch.long), r"'up\.weight' .*got torch\.int64"),
        ("up.weight", torch.full((6, 4, 2, 2), torch.nan), r"'up\.weight' in the state_dict has 96 non-finite entries"),
        ("up.weight", torch.full((6, 4, 2, 2), 1e30), r"'up\.weight' in the state_dict does not lie"),
        ("up.weight", None, r"'up\.weight'.*got NoneType"),
        (
            "attention.out_proj.weight",
            torch.ones(8, 8),
            r"'attention\.out_proj\.weight' in the state_dict does not lie",
        ),
    ],
)
@pytest.mark.parametrize("seed", [0, 1], ids=["same plan", "another plan"])
def test_a_weight_that_is_corrupted(name: str, value: Any, message: str, seed: int) -> None:
    model, _ = model_and_state(0)
    _, state = model_and_state(seed)
    state[name] = value
    require_refusal(model, state, message)


def test_a_state_dict_that_lacks_weights() -> None:
    model, _ = model_and_state(0)
    _, state = model_and_state(1)
    del state["up.weight"]
    require_refusal(model, state, r"has another plan than the model and lacks up\.weight")
