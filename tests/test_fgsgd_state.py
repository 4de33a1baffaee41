"""RiemannianFGSGD is saved, copied and loaded: what it goes on with."""

from __future__ import annotations

import copy
import io
import pickle

import geoopt
import pytest
import torch
from parameters import MOMENTA, assert_same, network, on, on_geoopt, plain, run, set_gradients, train_apart, values
from torch import Tensor, nn

from fgo_geo import Oblique, ProductOfGroups, RiemannianFGSGD, Stiefel
from fgo_geo.grouping import collection
from fgo_geo.manifolds import EmbeddedManifold


def through_state_dict(params: list[Tensor], optimizer: RiemannianFGSGD) -> tuple[list[Tensor], RiemannianFGSGD]:
    clones = copy.deepcopy(params)
    clone = RiemannianFGSGD(clones, lr=7.0)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    clone.load_state_dict(torch.load(file, weights_only=True))
    return clones, clone


def through_deepcopy(params: list[Tensor], optimizer: RiemannianFGSGD) -> tuple[list[Tensor], RiemannianFGSGD]:
    return copy.deepcopy((params, optimizer))


def through_pickle(params: list[Tensor], optimizer: RiemannianFGSGD) -> tuple[list[Tensor], RiemannianFGSGD]:
    return pickle.loads(pickle.dumps((params, optimizer)))


@pytest.mark.parametrize("passage", [through_state_dict, through_deepcopy, through_pickle])
@pytest.mark.parametrize("options", [*MOMENTA, {"momentum": 0.9, "stabilize": 3, "rho": 0.5, "radius_invariant": True}])
def test_a_saved_run_continues_bit_for_bit(passage, options):
    params = network()
    optimizer = RiemannianFGSGD(params, lr=0.3, **options)
    run(optimizer, 4)
    clones, clone = passage(params, optimizer)
    assert all(a is not b for a, b in zip(params, clones, strict=True))
    run(optimizer, 4, first_seed=5)
    run(clone, 4, first_seed=5)
    assert_same(clones, params)


@pytest.mark.parametrize("passage", [through_deepcopy, through_pickle])
def test_copies_keep_the_default_options_for_new_groups(passage):
    params = [on(Oblique(), 5, 3)]
    _, clone = passage(params, RiemannianFGSGD(params, lr=0.3, stabilize=7, rho=2.0))
    clone.add_param_group({"params": [on(Oblique(), 5, 3)]})
    assert clone.param_groups[1]["stabilize"] == 7
    assert clone.param_groups[1]["rho"] == 2.0


def test_loading_keeps_the_default_options_for_new_groups():
    params = [on(Oblique(), 5, 3)]
    optimizer = RiemannianFGSGD(params, lr=0.3, stabilize=7)
    optimizer.load_state_dict(RiemannianFGSGD(params, lr=0.1).state_dict())
    optimizer.add_param_group({"params": [on(Oblique(), 5, 3)]})
    assert [group["stabilize"] for group in optimizer.param_groups] == [None, 7]


def test_a_checkpoint_of_geoopts_riemannian_sgd_loads():
    """Its buffers are longer than any of ours: the retraction must not count on our bound."""
    params = [on(Stiefel(), 5, 3), plain(4)]
    geoopts = geoopt.optim.RiemannianSGD(params, lr=0.1, momentum=0.9, stabilize=5)
    run(geoopts, 2, scale=100.0)
    optimizer = RiemannianFGSGD(params, lr=1.0)
    optimizer.load_state_dict(geoopts.state_dict())
    run(optimizer, 2)
    assert optimizer.param_groups[0]["stabilize"] == 5
    assert params[0].manifold.violation(params[0].detach()).item() <= 1e-13


def test_groups_have_their_own_options():
    fast, slow, constant = (on(Stiefel(), 5, 3, seed=seed) for seed in range(3))
    optimizer = RiemannianFGSGD([{"params": [fast], "lr": 0.5}, {"params": [slow]}], lr=0.1, momentum=0.9)
    optimizer.add_param_group({"params": [constant], "step_size": "constant", "momentum": 0.0, "lr": 0.01})
    run(optimizer, 3)
    alone = [on(Stiefel(), 5, 3, seed=seed) for seed in range(3)]
    own = [{"lr": 0.5, "momentum": 0.9}, {"lr": 0.1, "momentum": 0.9}, {"lr": 0.01, "step_size": "constant"}]
    optimizers = [RiemannianFGSGD([p], **options) for p, options in zip(alone, own, strict=True)]
    train_apart(alone, optimizers, [range(3)] * 3)
    for a, b in zip((fast, slow, constant), alone, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_momentum_survives_being_switched_off_and_on():
    """As in torch.optim.SGD, a buffer rests while momentum is zero; it is projected when it is used again."""
    params = [on(Stiefel(), 5, 3), plain(4)]
    twin = nn.Parameter(params[1].detach().clone())
    optimizer, sgd = RiemannianFGSGD(params, lr=0.3, momentum=0.9), torch.optim.SGD([twin], lr=0.3, momentum=0.9)
    for step, momentum in enumerate((0.9, 0.0, 0.0, 0.9)):
        optimizer.param_groups[0]["momentum"] = sgd.param_groups[0]["momentum"] = momentum
        set_gradients(params, step)
        twin.grad = params[1].grad.clone()
        optimizer.step()
        sgd.step()
        params[0].manifold.assert_check_point_on_manifold(params[0])
    assert_same([params[1]], [twin])


CONVERTED = [
    (torch.float32, torch.float64),
    (torch.float64, torch.float32),
    (torch.float32, torch.float16),
    (torch.bfloat16, torch.float64),
]


@pytest.mark.parametrize(("before", "after"), CONVERTED, ids=str)
@pytest.mark.parametrize("momentum", [{"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}])
def test_momentum_follows_weights_that_are_converted(before, after, momentum):
    """To go on after ``model.double()`` is to save before it, and to load into an optimiser that was built after it."""
    groups = ProductOfGroups(collection(4, 3, "pio", ("sphere", "stiefel")), (4, 3, 3, 3))
    points = [on(Oblique(), 5, 3), on(Stiefel(2.0), 5, 3), on(Stiefel(), 40, 20), on(Stiefel(), 4, 3, 3, 3)]
    points += [on(groups, 4, 3, 3, 3), on_geoopt(geoopt.Sphere(), 5, 3)]
    models = [nn.ParameterList(copy.deepcopy(points)).to(before) for _ in range(2)]
    optimizers = [RiemannianFGSGD(model.parameters(), lr=0.3, **momentum) for model in models]
    for model, optimizer in zip(models, optimizers, strict=True):
        run(optimizer, 3)
        model.to(after)
        if before == torch.bfloat16:  # too coarse for a new optimiser to accept its points
            for param in model:
                param.data = param.manifold.projx(param.data)
    fresh = RiemannianFGSGD(models[1].parameters(), lr=7.0)
    fresh.load_state_dict(optimizers[1].state_dict())
    run(optimizers[0], 3, first_seed=5)
    run(fresh, 3, first_seed=5)
    assert_same(*models)
    for param in models[0]:
        has_master = after == torch.float16
        assert optimizers[0].state[param]["momentum_buffer"].dtype == (torch.float32 if has_master else after)
        if isinstance(param.manifold, EmbeddedManifold):
            assert param.manifold.violation(param.detach()).max() <= 64 * torch.finfo(after).eps


def test_momentum_that_rests_follows_a_conversion_when_it_is_stabilised():
    model = nn.ParameterList([on(Stiefel(), 5, 3), on(Oblique(), 5, 3)])
    optimizer = RiemannianFGSGD(model.parameters(), lr=0.3, momentum=0.9, stabilize=1)
    run(optimizer, 1)
    model.float()
    optimizer.zero_grad()
    optimizer.step()
    for param in model:
        buffer = optimizer.state[param]["momentum_buffer"]
        assert buffer.dtype == torch.float32
        torch.testing.assert_close(buffer, param.manifold.proju(param.detach(), buffer))


def test_a_refused_step_after_a_conversion_leaves_the_weights_as_they_were():
    model = nn.ParameterList([on(Stiefel(), 5, 3), on(Oblique(), 4, 3, 3, 3)])
    optimizer = RiemannianFGSGD(model.parameters(), lr=0.3, momentum=0.9)
    run(optimizer, 1)
    model.float()
    before, momentum = values(model), [optimizer.state[p]["momentum_buffer"].float() for p in model]
    set_gradients(model, 2)
    model[1].grad[0] = torch.nan
    with pytest.raises(FloatingPointError, match="no parameter was changed"):
        optimizer.step()
    assert_same(model, before)
    assert_same([optimizer.state[p]["momentum_buffer"] for p in model], momentum)
