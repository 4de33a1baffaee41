"""Averages of constrained weights (EMA, SWA), and checkpoints that lost their plan: what loads where."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from networks import assert_on_manifolds, assert_unchanged, images, net, snapshot, through_file, train
from torch import Tensor, nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

from fgo_geo import Plan, RiemannianFGSGD, constrain, plan_of


class ModelEma(nn.Module):
    """As timm's ModelEmaV2 and ModelEmaV3: a deep copy in evaluation mode, updated by a loop over its state dict."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.module = copy.deepcopy(model).eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x)

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        for average, value in zip(self.module.state_dict().values(), model.state_dict().values(), strict=True):
            average.copy_(0.5 * average + 0.5 * value)


AVERAGES: dict[str, Callable[[nn.Module], Any]] = {
    "SWA": AveragedModel,
    "EMA": lambda model: AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5)),
    "EMA with buffers": lambda model: AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True),
    "ModelEma": ModelEma,
}
every_average = pytest.mark.parametrize("average", AVERAGES.values(), ids=AVERAGES)


def averaged(average: Callable[[nn.Module], Any], seed: int = 0) -> tuple[nn.Module, nn.Module]:
    """A model after some steps, and the average of its weights, which is off its manifolds."""
    model = net(seed)
    constrain(model, seed=seed)
    mean = average(model)
    optimizer = RiemannianFGSGD(model.parameters(), lr=0.5)
    for step in range(3):
        for number, param in enumerate(model.parameters()):
            generator = torch.Generator().manual_seed(100 * step + number)
            param.grad = 0.3 * torch.randn(param.shape, generator=generator)
        optimizer.step()
        mean.update_parameters(model)
    violations = [p.manifold.violation(p.detach()).max() for p in plan_of(mean).parameters().values()]
    assert max(violations) > 5e-3
    return model, mean


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same_bits(model: nn.Module, expected: dict[str, Tensor]) -> None:
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


@every_average
@pytest.mark.parametrize("keeps_metadata", [True, False])
@pytest.mark.parametrize("assign", [True, False])
def test_a_saved_average_loads_into_its_object_and_into_a_new_one(
    average: Callable[[nn.Module], Any], keeps_metadata: bool, assign: bool
) -> None:
    model, mean = averaged(average)
    state = through_file(mean.state_dict())
    state = state if keeps_metadata else dict(state)
    expected = bits(mean)
    mean.update_parameters(model)
    mean.load_state_dict(copy.deepcopy(state), assign=assign)
    assert_same_bits(mean, expected)
    resumed = net(seed=5)
    constrain(resumed, seed=9 if keeps_metadata else 0)
    again = average(resumed)
    again.load_state_dict(state, assign=assign)
    assert_same_bits(again, expected)
    assert torch.equal(again.eval()(images()), mean.eval()(images()))
    with torch.no_grad():
        again.train()(images())
    update_bn([images(4)], again)
    copied = pickle.loads(pickle.dumps(again.module))
    copied.load_state_dict(through_file(again.module.state_dict()))
    assert_same_bits(copied, bits(again.module))
    assert_on_manifolds(plan_of(resumed))


@every_average
def test_training_on_a_loaded_average_is_an_error_until_it_is_projected(average: Callable[[nn.Module], Any]) -> None:
    _, mean = averaged(average)
    mean.load_state_dict(through_file(mean.state_dict()))
    mean.train()
    message = (
        r"were loaded off their manifolds and cannot be trained: conv\.weight.*plan_of\(model\)\.project\(\) first"
    )
    for attempt in (mean, copy.deepcopy(mean)):
        with pytest.raises(RuntimeError, match=message):
            attempt(images())
    mean.requires_grad_(False)(images())
    mean.requires_grad_()
    plan_of(mean).project()
    assert_on_manifolds(plan_of(mean))
    train(mean.module)
    assert_on_manifolds(plan_of(mean))


def test_writing_points_into_a_loaded_average_ends_the_error() -> None:
    _, mean = averaged(ModelEma)
    mean.load_state_dict(through_file(mean.state_dict()))
    with torch.no_grad():
        for param in plan_of(mean).parameters().values():
            param.proj_()
    mean.train()(images()).sum().backward()


@every_average
@pytest.mark.parametrize("keeps_metadata", [True, False])
def test_an_average_loads_into_the_trained_model_only_projected(
    average: Callable[[nn.Module], Any], keeps_metadata: bool
) -> None:
    model, mean = averaged(average)
    state = mean.module.state_dict() if keeps_metadata else dict(mean.module.state_dict())
    before = snapshot(model)
    message = "may be an average of weights: load it into the object" if keeps_metadata else "carries no plan"
    with pytest.raises(ValueError, match=message):
        model.load_state_dict(state)
    assert_unchanged(model, before)
    plan = plan_of(model)
    expected = {n: p.manifold.projx(mean.module.get_parameter(n).detach()) for n, p in plan.parameters().items()}
    model.load_state_dict(plan.projected(state))
    for name, param in plan.parameters().items():
        torch.testing.assert_close(param.detach(), expected[name], rtol=0, atol=0)
    train(model)
    assert_on_manifolds(plan)


def test_projected_takes_a_prefix_and_leaves_its_argument_as_it_is() -> None:
    model, mean = averaged(AveragedModel)
    state, plan = mean.state_dict(), plan_of(model)
    before = {name: value.clone() for name, value in state.items()}
    projected = plan.projected(state, "module.")
    assert list(projected) == list(state)
    assert all(torch.equal(value, before[name]) for name, value in state.items())
    assert "fgo_geo_plan" in state._metadata["module"]
    assert "fgo_geo_plan" not in projected._metadata["module"]
    mean.load_state_dict(projected)
    assert_on_manifolds(plan_of(mean))
    with pytest.raises(ValueError, match=r"none of this plan's weights under the prefix '': it has .*expected conv\.w"):
        plan.projected(state)
    state["module.conv.weight"] = state["module.conv.weight"][:1]
    with pytest.raises(ValueError, match=r"'module\.conv\.weight' in the state_dict: expected .* \(6, 4, 2, 3\), got"):
        plan.projected(state, "module.")


def test_an_average_that_was_built_otherwise() -> None:
    _, mean = averaged(AveragedModel)
    other = net()
    plan = constrain(other)
    plan.is_average = True
    other.load_state_dict(through_file(mean.module.state_dict()))
    assert_same_bits(other, bits(mean.module))


def test_an_average_with_numbers_that_are_not_finite_is_refused() -> None:
    _, mean = averaged(AveragedModel)
    state, expected = mean.state_dict(), bits(mean)
    state = type(state)((name, value.clone()) for name, value in state.items())
    state["module.up.weight"][0, 0, 0, 0] = torch.nan
    with pytest.raises(
        ValueError, match=r"'module\.up\.weight' in the state_dict has 1 non-finite entry.*load a checkpoint"
    ):
        mean.load_state_dict(state)
    assert_same_bits(mean.module, {n.removeprefix("module."): v for n, v in expected.items() if n != "n_averaged"})


# -- checkpoints without metadata --------------------------------------------------------------------------------


def trained(seed: int) -> nn.Module:
    model = net(seed)
    constrain(model, seed=seed)
    train(model)
    return model


def test_each_remedy_for_a_lost_plan_restores_the_trained_weights() -> None:
    model = trained(0)
    bare, text, expected = dict(model.state_dict()), plan_of(model).to_json(), bits(model)
    other = trained(1)
    before = snapshot(other)
    message = r"carries no plan, as safetensors.*same settings and seed, or call Plan\.from_json\(text\)\.attach"
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(bare)
    assert_unchanged(other, before)
    Plan.from_json(text).attach(other, project=True)
    other.load_state_dict(bare)
    same = trained(0)
    same.load_state_dict(bare)
    for restored in (other, same):
        assert_same_bits(restored, expected)
        assert_on_manifolds(plan_of(restored))


def test_a_prefix_is_stripped_with_the_plan() -> None:
    """A dict comprehension loses the plan; torch's own function keeps it."""
    model = trained(0)
    wrapped = nn.Sequential()
    wrapped.module = model
    state = wrapped.state_dict()
    with pytest.raises(ValueError, match=r'consume_prefix_in_state_dict_if_present strips "module\." and keeps'):
        trained(1).load_state_dict({name.removeprefix("module."): value for name, value in state.items()})
    consume_prefix_in_state_dict_if_present(state, "module.")
    other = trained(1)
    other.load_state_dict(state)
    assert_same_bits(other, bits(model))
    assert plan_of(other).entries == plan_of(model).entries


def test_plain_weights_are_projected_on_request() -> None:
    plain, model = net(3), trained(0)
    model.load_state_dict(plan_of(model).projected(plain.state_dict()))
    for name, param in plan_of(model).parameters().items():
        expected = param.manifold.projx(plain.get_parameter(name).detach())
        torch.testing.assert_close(param.detach(), expected, rtol=0, atol=0)
    assert torch.equal(model.head.weight, plain.head.weight)
