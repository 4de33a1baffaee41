"""Radii of a constrained model that follow the statistics of its features."""

from __future__ import annotations

import copy
import json

import geoopt
import pytest
import torch
from networks import (
    SCALE,
    Two,
    assert_on_manifolds,
    assert_unchanged,
    features,
    net,
    snapshot,
    through_file,
    train,
    two,
)
from torch import nn

import fgo_geo
from fgo_geo import RiemannianFGSGD, constrain, plan_of, unconstrain


def saturate(model: Two, scale: list[float]) -> None:
    """Feed the running statistics until they are those of the features."""
    for _ in range(200):
        model(features(scale))


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
        plan.watches = False  # torch.optim.SGD leaves the manifolds
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
    handle = fgo_geo.models.feature_stats.track(model.conv)
    constrain(model, first_layer=True, classifier=True, statistics="max1")
    assert handle.statistics is model.conv.fgo_geo_statistics
    unconstrain(model)
    assert fgo_geo.models.feature_stats.is_tracked(model.conv)
    assert not fgo_geo.models.feature_stats.is_tracked(model.fc)


def test_half_precision_follows_the_features() -> None:
    model, plan = two("max1", manifolds=("sphere", "stiefel"))
    model.to(torch.bfloat16)
    for _ in range(50):
        model(features(SCALE).to(torch.bfloat16))
    plan.update_scales()
    assert model.conv.weight.dtype == torch.bfloat16
    assert_on_manifolds(plan, 2e-2)
    assert plan.entries[0].channel_scales[3] == pytest.approx(8.0, rel=0.05)
