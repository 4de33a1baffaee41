"""RiemannianFGSGD in half precision and mixed precision, and its rounding over long runs."""

from __future__ import annotations

import copy
import math

import geoopt
import pytest
import torch
from parameters import KNEE, assert_same, normal, on, plain, run, set_gradients, values
from torch import Tensor, nn

from fgo_geo import Oblique, RiemannianFGSGD, ScaledSphere, Stiefel, kernels
from fgo_geo.grouping import collection
from fgo_geo.manifolds import ProductOfGroups
from fgo_geo.optim.step_size import momentum_gain
from fgo_geo.paths.protocol import StepOptions
from fgo_geo.paths.reference import fgsgd_update

# -- half precision and mixed precision ------------------------------------------------------------------------------


def small_network(dtype: torch.dtype) -> list[Tensor]:
    return [
        on(ScaledSphere(0.5, ndim=2), 3, 2, 3, 3, seed=1, dtype=dtype),
        on(Oblique(), 5, 3, seed=2, dtype=dtype),
        on(Stiefel(2.0), 2, 5, 3, seed=3, dtype=dtype),
        on(
            ProductOfGroups(collection(4, 2, "pio", ("sphere", "stiefel")), (4, 2, 3, 3)),
            4,
            2,
            3,
            3,
            seed=4,
            dtype=dtype,
        ),
    ]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("update", ["retraction", "exponential"])
def test_a_step_in_half_precision_is_the_float32_step_rounded_once(dtype, update):
    half, single = small_network(dtype), small_network(torch.float32)
    options = {"lr": 0.3, "momentum": 0.9, "nesterov": True, "update": update}
    optimizer = RiemannianFGSGD(half, **options, master_weights=False)
    twin = RiemannianFGSGD(single, **options)
    for step in range(3):
        set_gradients(half, step)
        for a, b in zip(half, single, strict=True):
            b.data.copy_(a)
            b.grad = a.grad.float()
            if a in optimizer.state:
                twin.state[b]["momentum_buffer"].copy_(optimizer.state[a]["momentum_buffer"])
        with kernels.use_path("reference"):  # half precision has no other, and another one rounds in other places
            optimizer.step()
            twin.step()
        for a, b in zip(half, single, strict=True):
            assert a.dtype == optimizer.state[a]["momentum_buffer"].dtype == dtype
            assert_same(
                [a, optimizer.state[a]["momentum_buffer"]], [b.to(dtype), twin.state[b]["momentum_buffer"].to(dtype)]
            )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_master_weights_take_the_steps_of_single_precision(dtype):
    """Steps of less than a rounding unit add up: without a master copy hardly an entry would ever change."""
    half, single = small_network(dtype), small_network(dtype)
    single = [geoopt.ManifoldParameter(p.manifold.projx(p.detach().float()), manifold=p.manifold) for p in single]
    optimizers = [RiemannianFGSGD(params, lr=1e-4, momentum=0.5) for params in (half, single)]
    for step in range(40):
        set_gradients(half, step % 2)
        for a, b in zip(half, single, strict=True):
            b.grad = a.grad.float()
        for optimizer in optimizers:
            optimizer.step()
    for a, b in zip(half, single, strict=True):
        torch.testing.assert_close(optimizers[0].state[a]["master"], b.detach(), rtol=0, atol=1e-6)
        torch.testing.assert_close(a.detach(), b.detach().to(dtype), rtol=0, atol=0)
        assert a.manifold.violation(optimizers[0].state[a]["master"]).max() < 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_weight_that_somebody_wrote_to_is_where_the_next_step_begins(dtype):
    params, twins = small_network(dtype), small_network(dtype)
    optimizer = RiemannianFGSGD(params, lr=0.1)
    run(optimizer, 2)
    with torch.no_grad():
        for param, twin in zip(params, twins, strict=True):
            param.copy_(twin)
    fresh = RiemannianFGSGD(twins, lr=0.1)
    for some in (optimizer, fresh):
        run(some, 1, first_seed=5)
    assert_same(params, twins)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_master_weights_survive_a_checkpoint_bit_for_bit(dtype):
    params = small_network(dtype)
    optimizer = RiemannianFGSGD(params, lr=0.01, momentum=0.9)
    run(optimizer, 3)
    twins = copy.deepcopy(params)
    resumed = RiemannianFGSGD(twins, lr=0.01, momentum=0.9)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for some in (optimizer, resumed):
        run(some, 3, first_seed=7)
    assert_same(params, twins)
    for param, twin in zip(params, twins, strict=True):
        assert_same([optimizer.state[param]["master"]], [resumed.state[twin]["master"]])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("master_weights", [True, False])
def test_half_precision_does_not_drift(dtype, master_weights):
    params = small_network(dtype)
    optimizer = RiemannianFGSGD(params, lr=0.1, momentum=0.9, master_weights=master_weights)
    for step in range(200):
        set_gradients(params, step)
        optimizer.step()
    for param in params:
        assert param.manifold.violation(param.detach()).max().item() <= 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_plain_parameters_in_half_precision_equal_torch_sgd(dtype):
    ours, theirs = plain(5, dtype=dtype), plain(5, dtype=dtype)
    run(RiemannianFGSGD([ours], lr=0.1, momentum=0.9, weight_decay=0.1), 4)
    run(torch.optim.SGD([theirs], lr=0.1, momentum=0.9, weight_decay=0.1), 4)
    assert_same([ours], [theirs])


def test_a_step_under_autocast_is_the_same_step():
    inside, outside = small_network(torch.float32), small_network(torch.float32)
    optimizers = [RiemannianFGSGD(params, lr=0.3, momentum=0.9) for params in (inside, outside)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        run(optimizers[0], 3)
    run(optimizers[1], 3)
    assert_same(inside, outside)


@pytest.mark.parametrize("unscale", [True, False])
def test_a_grad_scaler_and_clipping_work(unscale):
    """A power of two as the scale changes no bit; a step with an infinite gradient is skipped by the scaler."""
    scaled, straight = ([*small_network(torch.float32), plain(3, dtype=torch.float32)] for _ in range(2))
    optimizers = [RiemannianFGSGD(params, lr=0.1, momentum=0.9) for params in (scaled, straight)]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)

    def loss_of(params: list[Tensor], step: int) -> Tensor:
        return sum((p * normal(p.shape, step, torch.float32)).sum() for p in params)

    for step in range(4):
        for optimizer in optimizers:
            optimizer.zero_grad()
        overflow = step == 2
        scaler.scale(loss_of(scaled, step) * (math.inf if overflow else 1)).backward()
        loss_of(straight, step).backward()
        if unscale:
            scaler.unscale_(optimizers[0])
            nn.utils.clip_grad_norm_(scaled, 0.5)
            nn.utils.clip_grad_norm_(straight, 0.5)
        before = values(scaled)
        scaler.step(optimizers[0])
        scaler.update()
        if overflow:
            assert_same(scaled, before)
        else:
            optimizers[1].step()
        assert_same(scaled, straight)
    assert scaler.get_scale() == 2.0**9


# -- long runs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("manifold", "shape"),
    [
        (ScaledSphere(ndim=2), (4, 3, 3)),
        (Oblique(), (4, 3, 3)),
        (Stiefel(), (4, 3, 3)),
        (Stiefel(), (64, 32)),
    ],
)
def test_ten_thousand_float32_steps_do_not_drift(manifold, shape):
    """The pure step without the optimiser around it; the gradients are scaled ones of nearly the worst length."""
    x, buffer = on(manifold, *shape, dtype=torch.float32).detach(), None
    gradients = [normal(shape, seed, torch.float32) for seed in range(16)]
    gradients = [g * (KNEE / g.norm()) for g in gradients]
    gain = momentum_gain(0.9, dampening=0.0, nesterov=False)
    options = StepOptions(lr=0.1, momentum=0.9)
    for step in range(10_000):
        grad = manifold.egrad2rgrad(x, gradients[step * 7 % 16])
        x, buffer = fgsgd_update(manifold, x, grad, buffer, options, bound=0.1 * KNEE * gain)
    assert manifold.violation(x).max().item() < 1e-5


# -- copies in single precision --------------------------------------------------------------------------------------


def test_a_half_precision_weight_that_was_written_to_between_steps_is_kept():
    """Also where the steps in between give it no gradient."""
    w = on(ScaledSphere(), 4, 8, seed=0, dtype=torch.bfloat16)
    other = on(ScaledSphere(), 4, 8, seed=1, dtype=torch.bfloat16)
    optimizer = RiemannianFGSGD([w], lr=0.1)
    w.grad = torch.ones_like(w)
    optimizer.step()
    with torch.no_grad():
        w.copy_(other)
    w.grad = None
    optimizer.step()
    w.grad = torch.zeros_like(w)
    optimizer.step()
    assert float((w.detach().float() - other.detach().float()).abs().max()) < 0.01


@pytest.mark.parametrize("how", ["converted", "without copies"])
def test_stabilize_projects_what_is_stepped(how):
    w = on(ScaledSphere(), 4, 8, seed=0, dtype=torch.bfloat16)
    optimizer = RiemannianFGSGD([w], lr=1.0)
    w.grad = torch.ones_like(w)
    optimizer.step()
    if how == "converted":
        w.data = w.manifold.projx(w.data.float())
    else:
        optimizer.param_groups[0]["master_weights"] = False
    w.grad = 0.5 * torch.ones_like(w)
    optimizer.step()
    before = w.detach().float().clone()
    optimizer.stabilize()
    assert float((w.detach().float() - before).abs().max()) < 0.01
