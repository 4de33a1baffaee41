"""What of a constrained model survives saving, loading, copying, and what torch does to its parameters."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import geoopt
import pytest
import torch
from networks import (
    CONSTRAINED,
    SCALE,
    Net,
    assert_on_manifolds,
    assert_unchanged,
    features,
    images,
    names,
    net,
    saved,
    snapshot,
    through_file,
    train,
    two,
)
from torch import Tensor, nn

from fgo_geo import RiemannianFGSGD, constrain, plan_of, report, unconstrain

# -- saving and loading ------------------------------------------------------------------------------------------


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
    with pytest.raises(ValueError, match=r"'conv.weight' in the state_dict does not lie.*load them before"):
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
    with pytest.raises(ValueError, match="expected the JSON text of a plan"):
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


@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
def test_weights_that_are_not_finite_are_named_first(value: float) -> None:
    """Whoever looks at the weights says so, before shapes, manifolds and norms, and changes nothing."""
    model = net()
    plan = constrain(model)
    plan.check()
    with torch.no_grad():
        model.conv.weight[:, 0] = value
        model.head.weight[0] = value
    before = snapshot(model)
    remedy = r".*load a checkpoint"
    with pytest.raises(
        ValueError, match=r"2 parameter\(s\) have non-finite values: conv\.weight, head\.weight" + remedy
    ):
        plan.check()
    for call in (plan.project, lambda: plan.attach(model, project=True)):
        with pytest.raises(ValueError, match=r"1 parameter\(s\) have non-finite values: conv\.weight" + remedy):
            call()
    with pytest.raises(ValueError, match=r"non-finite values: conv\.weight in the state_dict" + remedy):
        plan.projected(model.state_dict())
    for call in (
        lambda: report(model),
        lambda: RiemannianFGSGD(model.named_parameters(), lr=0.1),
        lambda: model.load_state_dict(model.state_dict()),
    ):
        with pytest.raises(ValueError, match=r"'conv\.weight'.* 36 non-finite entries of 144" + remedy):
            call()
    assert_unchanged(model, before)
    unconstrain(model)
    with pytest.raises(ValueError, match=r"constrain: 'conv\.weight' has 36 non-finite entries" + remedy):
        constrain(model)


def test_a_euclidean_kernel_that_is_not_finite_is_refused_too() -> None:
    model = net()
    plan = constrain(model, manifolds="euclidean")
    with torch.no_grad():
        model.conv.weight[0] = torch.nan
    with pytest.raises(ValueError, match=r"conv\.weight"):
        plan.check()
    with pytest.raises(ValueError, match=r"'conv\.weight', .* non-finite"):
        RiemannianFGSGD(model.named_parameters(), lr=0.1)


def test_check_passes_over_parameters_without_values() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.LazyLinear(3), nn.Linear(3, 2, device="meta"))
    constrain(model, classifier=True).check()
