"""on_manifolds with the optimisers and training loops of other packages: the same laws, and nothing to say to them."""

from __future__ import annotations

import importlib
import itertools
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import ddp
import geoopt
import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.optim import Optimizer

from fgo_geo import RiemannianFGSGD, ScaledSphere, Stiefel, constrain, on_manifolds, plan_of
from fgo_geo.optim import theorem_step_bound


def package(name: str) -> ModuleType:
    """A package, imported without the warnings that are its own; the test is skipped where it is not installed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return importlib.import_module(name)
        except ImportError as error:
            pytest.skip(f"{name} is not installed: {error}")


def muon(params: Any, **options: Any) -> Optimizer:
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    return torch.optim.Muon(params, **options)


def in_training(optimizer: Any) -> Any:
    """Schedule-free optimisers have to be told."""
    optimizer.train()
    return optimizer


OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "Muon": lambda p: muon(p, lr=0.05),
    "Muon, plain": lambda p: muon(p, lr=0.05, nesterov=False, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
    "timm's Lion": lambda p: package("timm.optim").Lion(p, lr=0.02),
    "timm's Adan": lambda p: package("timm.optim").Adan(p, lr=0.02),
    "timm's NAdamW": lambda p: package("timm.optim").NAdamW(p, lr=0.02),
    "schedule-free AdamW": lambda p: in_training(package("schedulefree").AdamWScheduleFree(p, lr=0.05)),
    "schedule-free SGD": lambda p: in_training(package("schedulefree").SGDScheduleFree(p, lr=0.2)),
}


def polar(y: Tensor) -> Tensor:
    u, _, vh = torch.linalg.svd(y, full_matrices=False)
    return u @ vh


# What a step does, in the formulas of a textbook: from a point and a displacement.
MANIFOLDS: dict[str, tuple[Callable[[], geoopt.Manifold], Callable[[Tensor, Tensor], Tensor]]] = {
    "stiefel": (Stiefel, lambda x, d: polar(x + d - x @ (x.mT @ d + d.mT @ x) / 2)),
    "sphere": (
        lambda: ScaledSphere(ndim=2),
        lambda x, d: (x + d - (x * d).sum() * x) / (x + d - (x * d).sum() * x).norm(),
    ),
}


@pytest.mark.parametrize("manifold", MANIFOLDS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_is_the_optimisers_own_made_tangent_and_retracted(name, manifold):
    """The bare optimiser, put on the same points, says what its displacements are."""
    make, moved = MANIFOLDS[manifold]
    generator = torch.Generator().manual_seed(0)
    own = make()
    start = own.random(7, 4, dtype=torch.float64, generator=generator)
    weight = geoopt.ManifoldParameter(start)
    bare = nn.Parameter(weight.detach().as_subclass(Tensor).clone())
    optimizer, other = OPTIMIZERS[name]([weight]), OPTIMIZERS[name]([bare])
    on_manifolds(optimizer, "constant")
    for _ in range(4):
        gradient = torch.randn(7, 4, dtype=torch.float64, generator=generator)
        point = weight.detach().as_subclass(Tensor).clone()
        with torch.no_grad():
            bare.copy_(point)
        weight.grad, bare.grad = gradient.clone(), gradient.clone()
        optimizer.step()
        other.step()
        expected = moved(point, bare.detach() - point)
        torch.testing.assert_close(weight.detach().as_subclass(Tensor), expected, rtol=0, atol=1e-9)
        assert float((weight.detach() - point).norm()) > 1e-4


def matrices(seed: int = 0) -> nn.Sequential:
    """A network whose weights are matrices, and no other parameters."""
    torch.manual_seed(seed)
    sizes = itertools.pairwise((12, 20, 20, 3))
    layers = [layer for a, b in sizes for layer in (nn.Linear(a, b, bias=False), nn.ReLU())]
    model = nn.Sequential(*layers[:-1])
    constrain(model, "layer", "stiefel", classifier=True)
    return model


def loss_of(model: nn.Module, step: int = 0) -> Tensor:
    x = torch.randn(16, 12, generator=torch.Generator().manual_seed(step % 3))
    return (model(x) - x[:, :3].sign()).square().mean()


def violation(model: nn.Module) -> float:
    return max(float(p.manifold.violation(p.detach()).max()) for p in plan_of(model).parameters().values())


def train(model: nn.Module, optimizer: Any, steps: int) -> list[float]:
    losses: list[float] = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model, step)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("step_size", ["theorem", "constant", "angle"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weights_stay_on_stiefel_and_the_loss_falls(name, step_size):
    model = matrices()
    optimizer = OPTIMIZERS[name](model.parameters())
    on_manifolds(optimizer, step_size)
    losses = train(model, optimizer, 25)
    assert violation(model) < 2e-6
    assert min(losses[-3:]) < losses[0]


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("magnitude", [1e-4, 1e4])
def test_no_step_is_longer_than_the_theorem_allows(name, magnitude):
    weight = geoopt.ManifoldParameter(Stiefel().random(7, 4, dtype=torch.float64))
    optimizer = OPTIMIZERS[name]([weight])
    on_manifolds(optimizer, "theorem")
    for step in range(4):
        weight.grad = magnitude * torch.randn(7, 4, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        before = weight.detach().clone()
        optimizer.step()
        way = weight.manifold.proju(before, weight.detach() - before)
        assert float(way.norm()) <= theorem_step_bound() * optimizer.param_groups[0]["lr"] * (1 + 1e-9)


def test_muon_has_orthogonal_steps_before_they_are_made_tangent():
    """Of a square matrix on Stiefel: the displacement has equal singular values, up to Muon's own error."""
    weight = geoopt.ManifoldParameter(Stiefel().random(6, 6))
    optimizer = muon([weight], lr=1e-3, weight_decay=0.0, nesterov=False)
    on_manifolds(optimizer, "constant")
    before = weight.detach().clone()
    weight.grad = torch.randn(6, 6, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    tangent = (before.mT @ (weight.detach() - before)).as_subclass(Tensor)  # skew, up to second order
    torch.testing.assert_close(tangent, -tangent.mT, rtol=0, atol=1e-4)


def test_the_average_of_a_schedule_free_optimiser_is_projected_by_hand():
    """In training weights are points; what ``eval()`` extrapolates to is none until ``plan.project()``."""
    schedulefree = package("schedulefree")
    model = matrices()
    optimizer = schedulefree.AdamWScheduleFree(model.parameters(), lr=0.05)
    optimizer.train()
    on_manifolds(optimizer, "constant")
    first = float(loss_of(model).detach())
    train(model, optimizer, 40)
    assert violation(model) < 2e-6
    optimizer.eval()
    assert violation(model) > 1e-4
    plan_of(model).project()
    assert violation(model) < 2e-6
    assert float(loss_of(model).detach()) < first
    optimizer.train()
    losses = train(model, optimizer, 10)
    assert violation(model) < 2e-6
    assert losses[-1] < first


# -- training loops ----------------------------------------------------------------------------------------------------


def assert_same(model: nn.Module, other: nn.Module, tolerance: float = 0.0) -> None:
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a.detach(), b.detach(), rtol=0, atol=tolerance)


@pytest.mark.parametrize("first", ["scaler", "handle"])
def test_a_gradient_scaler_skips_steps_and_changes_none(first):
    """Scales are powers of two, so that nothing is rounded; an overflow leaves everything where it is."""
    model, twin = matrices(), matrices()
    optimizer, other = (torch.optim.AdamW(m.parameters(), lr=0.05) for m in (model, twin))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10) if first == "scaler" else None
    for own in (optimizer, other):
        on_manifolds(own, "constant")
    scaler = scaler or torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(4):
        optimizer.zero_grad()
        scaler.scale(loss_of(model, step)).backward()
        scaler.step(optimizer)
        scaler.update()
    train(twin, other, 4)
    assert_same(model, twin)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.zero_grad()
    scaler.scale(loss_of(model) * float("inf")).backward()
    scaler.step(optimizer)
    scaler.update()
    for p, x in zip(model.parameters(), before, strict=True):
        assert torch.equal(p.detach(), x)
    assert scaler.get_scale() == 2.0**9


@pytest.mark.parametrize("when", ["before", "after"])
def test_accelerate_prepares_the_optimiser_before_or_after(when):
    accelerate = package("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, twin = matrices(), matrices()
    optimizer, other = (torch.optim.AdamW(m.parameters(), lr=0.05) for m in (model, twin))
    if when == "before":
        on_manifolds(optimizer, "constant")
    prepared, wrapped = accelerator.prepare(model, optimizer)
    if when == "after":
        on_manifolds(wrapped, "constant")
    on_manifolds(other, "constant")
    for step in range(6):
        with accelerator.accumulate(prepared):
            accelerator.backward(loss_of(prepared, step))
            wrapped.step()
            wrapped.zero_grad()
    for step in range(0, 6, 2):
        other.zero_grad()
        for half in range(2):
            (loss_of(twin, step + half) / 2).backward()
        other.step()
    assert violation(model) < 2e-6
    assert_same(model, twin, 1e-6)


@pytest.mark.parametrize("automatic", [True, False])
def test_lightning_trains_with_automatic_and_manual_optimisation(automatic, tmp_path):
    lightning = package("lightning.pytorch")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = matrices()
            self.automatic_optimization = automatic

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.05)
            on_manifolds(optimizer, "constant")
            return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 100)}

        def training_step(self, batch: Tensor, number: int) -> Any:
            loss = loss_of(self.model, number)
            if automatic:
                return loss
            optimizer: Any = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            return None

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        trainer = lightning.Trainer(
            max_steps=5, accelerator="cpu", devices=1, enable_model_summary=False, default_root_dir=tmp_path, **quiet
        )
        module = Module()
        trainer.fit(module, torch.utils.data.DataLoader(torch.zeros(5, 1), batch_size=1))
    twin = matrices()
    other = torch.optim.AdamW(twin.parameters(), lr=0.05)
    on_manifolds(other, "constant")
    train(twin, other, 5)
    assert violation(module.model) < 2e-6
    assert_same(module.model, twin, 1e-6)


@pytest.mark.parametrize("averages", [False, True])
def test_lightning_resumes_to_the_bit(averages, tmp_path):
    """With averages, a checkpoint has them in the place of the weights, and both are loaded into the trained model."""
    lightning, callbacks = package("lightning.pytorch"), package("lightning.pytorch.callbacks")
    data = torch.utils.data.DataLoader(torch.arange(3.0)[:, None], batch_size=1)

    class Module(lightning.LightningModule):
        is_average = averages

        def __init__(self) -> None:
            super().__init__()
            self.model = matrices()

        def configure_optimizers(self) -> Optimizer:
            return RiemannianFGSGD(self.named_parameters(), lr=1.0, momentum=0.5)

        def training_step(self, batch: Tensor, number: int) -> Tensor:
            return loss_of(self.model, int(batch))

        def validation_step(self, batch: Tensor, number: int) -> None:
            loss_of(self.model, int(batch))

        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            plan_of(self.model).is_average = self.is_average

    class Save(lightning.Callback):
        def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
            trainer.save_checkpoint(tmp_path / f"{trainer.current_epoch}.ckpt")

    def fit(module: Any, start: Path | None = None) -> dict[str, Any]:
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        own = [Save(), *([callbacks.EMAWeightAveraging(decay=0.5, update_every_n_steps=1)] if averages else [])]
        options = {"max_epochs": 2, "accelerator": "cpu", "devices": 1, "enable_model_summary": False, **quiet}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer = lightning.Trainer(default_root_dir=tmp_path, callbacks=own, **options)
            trainer.fit(module, data, data, ckpt_path=start, weights_only=False)
        return torch.load(tmp_path / "1.ckpt", weights_only=False)

    module = Module()
    expected = fit(module)
    assert (violation(module.model) > 2e-3) == averages  # the callback ends with the average in the model's place
    resumed = fit(Module(), tmp_path / "0.ckpt")
    for name in ("state_dict", "current_model_state"):
        assert (name in expected) == (name == "state_dict" or averages)
        for key, value in expected.get(name, {}).items():
            assert torch.equal(resumed[name][key], value)
    if averages:
        Module.is_average = False
        with pytest.raises(ValueError, match=r"plan_of\(model\)\.is_average = True"):
            fit(Module(), tmp_path / "0.ckpt")


def test_two_processes_train_as_one_with_the_joint_batch(tmp_path: Path) -> None:
    """The same trajectory on both ranks and in one process, with AdamW's moments."""
    mp.spawn(ddp.worker, args=(2, str(tmp_path), None, "adamw"), nprocs=2)
    one = ddp.model()
    constrain(one, first_layer=True, radius=0.5)
    expected = ddp.train(one, slice(None), "adamw")
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    for a, b, joint in zip(first["weights"], second["weights"], expected["weights"], strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, joint, rtol=0, atol=1e-9)
