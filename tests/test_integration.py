"""Constrained models under what people do to models: distributed, accumulated, clipped, mixed, compiled, averaged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ddp
import geoopt
import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from versions import TRACES_PARAMETERS

from fgo_geo import RiemannianFGSGD, constrain, plan_of, unconstrain


class Net(nn.Module):
    """Kernels, depthwise kernels, blocks and packed projections behind one another."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.point = nn.Conv2d(8, 16, 1)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        x = self.point(self.depthwise(self.conv(x)).relu()).flatten(2).mT
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head(x.mean(1))


def net(**arguments: Any) -> Net:
    torch.manual_seed(0)
    model = Net()
    constrain(model, **arguments)
    return model


def batch(step: int, n: int = 8, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(n, 3, 6, 6, generator=generator, dtype=dtype), torch.randint(4, (n,), generator=generator)


def loss_of(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(images).float(), labels)


def train(model: nn.Module, steps: int = 3, **options: Any) -> RiemannianFGSGD:
    optimizer = RiemannianFGSGD(model.parameters(), **({"lr": 0.05, "momentum": 0.9} | options))
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(model, *batch(step)).backward()
        optimizer.step()
    return optimizer


def assert_on_manifolds(model: nn.Module, tolerance: float = 1e-5) -> None:
    for param in plan_of(model).parameters().values():
        assert float(param.manifold.violation(param.detach()).max()) < tolerance


def assert_same(model: nn.Module, other: nn.Module, **tolerance: float) -> None:
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a.detach(), b.detach(), **tolerance, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("statistics", [None, "std"])
def test_two_processes_train_as_one_with_the_joint_batch(tmp_path: Path, statistics: Any) -> None:
    """The same trajectory on both ranks and in one process: groups, step sizes and momentum.

    Statistics are those of each process's own batches until the radii are updated. Then both take the same radii, near
    those of the joint batch.
    """
    mp.spawn(ddp.worker, args=(2, str(tmp_path), statistics), nprocs=2)
    one = ddp.model()
    constrain(one, first_layer=True, statistics=statistics, radius=0.5)
    expected = ddp.train(one, slice(None))
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert first["scales"] == second["scales"]
    for a, b, joint in zip(first["weights"], second["weights"], expected["weights"], strict=True):
        assert torch.equal(a, b)
        if statistics is None:
            torch.testing.assert_close(a, joint, rtol=0, atol=1e-9)
    for a, joint in zip(first["scales"], expected["scales"], strict=True):
        assert a == pytest.approx(joint, rel=0.5)
    if statistics is not None:
        assert any(s != pytest.approx(1.0, abs=1e-2) for scales in expected["scales"] for s in scales)


def test_accumulated_gradients_are_those_of_the_joint_batch() -> None:
    whole, parts = net().double().eval(), net().double().eval()
    optimizers = [RiemannianFGSGD(m.parameters(), lr=0.1, momentum=0.9) for m in (whole, parts)]
    for step in range(3):
        images, labels = batch(step, dtype=torch.float64)
        for optimizer in optimizers:
            optimizer.zero_grad()
        nn.functional.cross_entropy(whole(images), labels).backward()
        for half in (slice(0, 4), slice(4, 8)):
            (nn.functional.cross_entropy(parts(images[half]), labels[half]) / 2).backward()
        for optimizer in optimizers:
            optimizer.step()
    assert_same(whole, parts, rtol=0, atol=1e-12)


def test_clipped_gradients() -> None:
    model, reference = net(), net()
    for m in (model, reference):
        loss_of(m, *batch(0)).backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1e-2)
    assert float(norm) > 1e-2
    for param in reference.parameters():
        param.grad = None if param.grad is None else param.grad * (1e-2 / (norm + 1e-6))
    for m in (model, reference):
        RiemannianFGSGD(m.parameters(), lr=1.0).step()
    assert_same(model, reference)
    assert_on_manifolds(model)


def test_autocast_and_a_grad_scaler() -> None:
    model = net()
    optimizer = RiemannianFGSGD(model.parameters(), lr=0.05, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of(model, *batch(0))
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        scaler.step(optimizer)
        scaler.update()
        losses.append(float(loss.detach()))
        assert_on_manifolds(model)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert losses[-1] < losses[0]
    before = [p.detach().clone() for p in model.parameters()]
    model.conv.weight.grad[0, 0, 0, 0] = torch.inf
    scale = scaler.get_scale()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() < scale
    for param, old in zip(model.parameters(), before, strict=True):
        assert torch.equal(param.detach(), old), "the scaler leaves out steps with infinite gradients"


def test_channels_last_trains_the_same() -> None:
    model, other = net().double(), net().double().to(memory_format=torch.channels_last)
    optimizers = [RiemannianFGSGD(m.parameters(), lr=0.1, momentum=0.9) for m in (model, other)]
    for step in range(3):
        images, labels = batch(step, dtype=torch.float64)
        for m, optimizer, x in zip(
            (model, other), optimizers, (images, images.to(memory_format=torch.channels_last)), strict=True
        ):
            optimizer.zero_grad()
            nn.functional.cross_entropy(m(x), labels).backward()
            optimizer.step()
    assert_same(model, other, rtol=0, atol=1e-12)
    assert other.conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert optimizers[1].state[other.conv.weight]["momentum_buffer"].stride() == other.conv.weight.stride()


@pytest.mark.parametrize("statistics", [None, "max1"])
def test_a_compiled_model_trains_the_same(statistics: Any) -> None:
    model, reference = net(statistics=statistics), net(statistics=statistics)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=TRACES_PARAMETERS)
    train(compiled)
    train(reference)
    for m in (compiled, reference):
        plan_of(m).update_scales()
    train(compiled)
    train(reference)
    assert_same(model, reference, rtol=1e-4, atol=1e-6)
    assert_on_manifolds(compiled)
    assert plan_of(compiled) is plan_of(model)


@pytest.mark.parametrize(
    "average",
    [{}, {"multi_avg_fn": get_ema_multi_avg_fn(0.8)}, {"avg_fn": lambda a, b, n: 0.8 * a + 0.2 * b}],
    ids=["default", "ema", "avg_fn"],
)
def test_averaged_weights_are_projected_back(average: dict[str, Any]) -> None:
    model = net()
    averaged = AveragedModel(model, **average)
    plan = plan_of(averaged)
    assert plan is not plan_of(model)
    optimizer = RiemannianFGSGD(model.parameters(), lr=0.3)
    for step in range(4):
        optimizer.zero_grad()
        loss_of(model, *batch(step)).backward()
        optimizer.step()
        averaged.update_parameters(model)
    conv = averaged.module.conv.weight
    assert float(conv.manifold.violation(conv.detach()).max()) > 1e-3
    means = {n: p.detach().clone() for n, p in averaged.module.named_parameters()}
    plan.project()
    assert_on_manifolds(averaged)
    for name, param in averaged.module.named_parameters():
        constrained = isinstance(param, geoopt.ManifoldParameter)
        expected = param.manifold.projx(means[name]) if constrained else means[name]
        torch.testing.assert_close(param.detach(), expected)
    assert_on_manifolds(model)
    assert bool(averaged(batch(0)[0]).isfinite().all())


def test_averages_follow_the_features_of_the_model() -> None:
    """AveragedModel copies buffers, the running statistics among them, so both models find the same radii."""
    model = net(statistics="max1")
    averaged = AveragedModel(model)
    train(model)
    averaged.update_parameters(model)
    for m in (model, averaged):
        plan_of(m).update_scales()
    assert [e.channel_scales for e in plan_of(averaged).entries] == [e.channel_scales for e in plan_of(model).entries]
    plan_of(averaged).project()
    assert_on_manifolds(averaged)


def test_tied_weights_train_as_one() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))
    model[2].weight = model[0].weight
    constrain(model)
    weight = model[0].weight
    x = torch.randn(4, 8)
    model(x).square().sum().backward()
    first = model[4](model[3](model[2](model[1](model[0](x)).detach()))).square().sum()
    total = weight.grad.clone()
    weight.grad = None
    first.backward()
    assert not torch.allclose(weight.grad, total), "the gradient is the sum over both places"
    weight.grad = total
    RiemannianFGSGD(model.parameters(), lr=0.1).step()
    assert model[2].weight is model[0].weight is weight
    assert_on_manifolds(model)


def test_param_groups_have_their_own_learning_rates() -> None:
    model = net()
    constrained = list(plan_of(model).parameters().values())
    plain = [p for p in model.parameters() if not isinstance(p, geoopt.ManifoldParameter)]
    before = [p.detach().clone() for p in constrained]
    slow = {"params": constrained[:2], "lr": 0.0}
    optimizer = RiemannianFGSGD([slow, {"params": constrained[2:]}, {"params": plain, "lr": 1.0}], lr=0.1)
    loss_of(model, *batch(0)).backward()
    tangent = [p.manifold.egrad2rgrad(p.detach(), p.grad) for p in constrained]
    optimizer.step()
    for number, (param, old, grad) in enumerate(zip(constrained, before, tangent, strict=True)):
        taus = optimizer.step_scales()[param]
        assert bool((taus >= 1).all())
        moved = param.manifold.group_norm(old, param.detach() - old)
        wanted = (0.0 if number < 2 else 0.1) * param.manifold.group_norm(old, grad) / taus
        torch.testing.assert_close(moved, wanted, rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: RiemannianFGSGD(p, lr=0.05, momentum=0.9),
        lambda p: geoopt.optim.RiemannianSGD(p, lr=0.05, momentum=0.9),
        lambda p: geoopt.optim.RiemannianAdam(p, lr=0.01),
    ],
    ids=["RiemannianFGSGD", "RiemannianSGD", "RiemannianAdam"],
)
def test_models_learn_under_every_optimiser(make: Callable[[Any], torch.optim.Optimizer]) -> None:
    model = net()
    optimizer = make(model.parameters())
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = loss_of(model, *batch(0))
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]
    assert_on_manifolds(model)


def test_unconstrained_models_export() -> None:
    model = unconstrain(net()).eval()
    images, _ = batch(0)
    program = torch.export.export(model, (images,))
    torch.testing.assert_close(program.module()(images), model(images))
