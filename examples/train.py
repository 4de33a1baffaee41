"""Train an image classifier whose weights live on manifolds, and see what came of it.

    python examples/train.py                      # digits, PIO groups, less than two minutes on two CPU cores
    python examples/train.py --optimizer sgd      # the same network without manifolds
    python examples/train.py --strategy layer --manifolds stiefel --linear-manifold sphere
    python examples/train.py --channel-directed h1 --lam 2
    python examples/train.py --data cifar10 --download --model resnet18 --epochs 60
    python examples/train.py --resume             # go on after Ctrl-C, to the identical result

A run goes parse -> build -> fit -> write. ``build`` shows how to use ``fgo_geo``: say which weights
live on which manifold, then train with ``RiemannianFGSGD`` as with any torch optimiser. The run
prints a line per epoch and leaves ``results.json``, ``curves.png`` and ``checkpoint.pt`` in its
output folder.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
import time
from dataclasses import dataclass, field
from typing import Any

import checkpoint
import data
import flags
import geoopt
import measures
import models
import reporting
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ConstantLR, LRScheduler
from torch.utils.data import DataLoader

import fgo_geo

STATEFUL = ("model", "optimizer", "scheduler")


@dataclass
class Run:
    """Everything that takes part in training, and what has been measured so far."""

    settings: argparse.Namespace
    splits: data.Splits
    model: nn.Module
    plan: fgo_geo.Plan | None
    optimizer: torch.optim.Optimizer
    scheduler: LRScheduler
    history: list[reporting.Epoch] = field(default_factory=list)

    def save(self, history: list[reporting.Epoch]) -> None:
        """Write a checkpoint, and count the epochs of ``history`` as completed once it is on disk."""
        state = {name: getattr(self, name).state_dict() for name in STATEFUL}
        state |= {"settings": flags.as_plain(self.settings), "history": history}
        checkpoint.save(self.settings.output / "checkpoint.pt", state)
        self.history = history

    def restore(self, state: dict[str, Any]) -> None:
        """Go back to the end of the epoch at which a checkpoint was written."""
        for name in STATEFUL:
            getattr(self, name).load_state_dict(state[name])
        if isinstance(self.optimizer, geoopt.optim.RiemannianAdam):
            # It counts steps in whole numbers, of which loading makes float32 tensors: other bits would follow.
            for moments in self.optimizer.state.values():
                moments["step"] = int(moments["step"])
        self.history = state["history"]
        checkpoint.restore_random_state(state["random"])


def main(arguments: list[str] | None = None) -> int:
    """Train as the command line says; return the exit status."""
    settings, state = flags.parse(arguments)
    display = reporting.Display()
    try:
        run = build(settings)
    except (FileNotFoundError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if state:
        run.restore(state)
    display.say(describe(run))
    try:
        with display.progress_bar():
            fit(run, display)
    except KeyboardInterrupt:
        resume = ["python", sys.argv[0], "--resume", "--output", str(settings.output)]
        display.say(
            f"Interrupted; the checkpoint holds the end of epoch {len(run.history)}. Go on with\n  {shlex.join(resume)}"
        )
        return 130
    display.say(write(run))
    return 0


def build(settings: argparse.Namespace) -> Run:
    """Load the data, put the model's weights on manifolds, choose optimiser and learning rates."""
    torch.set_num_threads(settings.threads)
    checkpoint.seed_everything(settings.seed)
    splits = data.load(
        settings.data,
        settings.data_dir,
        validation=settings.validation,
        download=settings.download,
        image_size=settings.image_size,
    )
    model = models.build(settings.model, splits.channels, splits.classes, splits.size)
    model.to(settings.device)
    plan = models.constrain(
        model,
        strategy=settings.strategy,
        convolutions=settings.manifolds,
        linears=settings.linear_manifold,
        selection=settings.selection,
        radius=settings.radius,
        seed=settings.seed,
    )
    optimizer = build_optimizer(settings, model)
    if settings.channel_directed:
        fgo_geo.channel_directed(
            optimizer,
            settings.channel_directed,
            settings.lam,
            settings.channel_axis,
            module=model,
            lam_relative=settings.lam_relative,
        )
    if settings.schedule == "robbins-monro":
        scheduler = fgo_geo.optim.RobbinsMonroLR(optimizer)
    else:
        scheduler = ConstantLR(optimizer, factor=1.0)
    return Run(settings, splits, model, plan, optimizer, scheduler)


def build_optimizer(settings: argparse.Namespace, model: nn.Module) -> torch.optim.Optimizer:
    """Return the chosen optimiser over all parameters; each treats constrained and plain ones."""
    weights, momentum = model.parameters(), settings.momentum
    common = {"lr": settings.lr, "weight_decay": settings.weight_decay}
    if settings.optimizer == "fgsgd":
        return fgo_geo.RiemannianFGSGD(weights, momentum=momentum, step_size=settings.step_size, **common)
    if settings.optimizer == "rsgd":
        return geoopt.optim.RiemannianSGD(weights, momentum=momentum, **common)
    if settings.optimizer == "radam":
        return geoopt.optim.RiemannianAdam(weights, betas=(momentum, 0.999), **common)
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(weights, betas=(momentum, 0.999), **common)
    return torch.optim.SGD(weights, momentum=momentum, **common)


def describe(run: Run) -> str:
    """Say what is about to be trained, and how."""
    settings = run.settings
    smoothing = ""
    if settings.channel_directed:
        smoothing = (
            f", {settings.channel_directed} gradients along {settings.channel_axis} channels "
            f"(λ = {settings.lam}{' (D / 2π)²' if settings.lam_relative else ''})"
        )
    return (
        f"{settings.data}: {len(run.splits.train)} training images, "
        f"{len(run.splits.test)} {run.splits.held_out}\n"
        f"{settings.model}: {run.plan or 'no weight is on a manifold'}\n"
        f"{settings.optimizer}: lr {settings.lr} ({settings.schedule}), momentum {settings.momentum}, "
        f"weight decay {settings.weight_decay}{smoothing}, on {settings.device}"
    )


def fit(run: Run, display: reporting.Display) -> None:
    """Train to the last epoch; the checkpoint is always that of the last completed one."""
    run.settings.output.mkdir(parents=True, exist_ok=True)
    if not run.history:
        run.save([])
    display.header()
    for epoch in range(len(run.history) + 1, run.settings.epochs + 1):
        start = time.perf_counter()
        figures = {"epoch": epoch, "lr": float(run.scheduler.get_last_lr()[0])}
        figures |= train_epoch(run, epoch, display)
        figures |= evaluate(run)
        figures["largest_violation"] = measures.largest_violation(run.model)
        figures["seconds"] = time.perf_counter() - start
        run.scheduler.step()
        run.save([*run.history, figures])
        display.epoch(figures)


def train_epoch(run: Run, epoch: int, display: reporting.Display) -> reporting.Epoch:
    """Take one step per batch; return mean loss and accuracy on the way, and figures of tau."""
    settings, images_per_epoch = run.settings, len(run.splits.train)
    batches = DataLoader(
        run.splits.train,
        settings.batch_size,
        shuffle=True,
        generator=checkpoint.epoch_generator(settings.seed, epoch),
        # A last batch of one image would be too small for batch normalisation.
        drop_last=images_per_epoch % settings.batch_size == 1,
        num_workers=settings.workers,
    )
    run.model.train()
    sums, taus = torch.zeros(3, device=settings.device), []
    for images, labels in display.track(batches, f"{epoch}/{settings.epochs}"):
        of_batch = measure(run, images, labels)
        run.optimizer.zero_grad()
        (of_batch[0] / len(labels)).backward()
        run.optimizer.step()
        sums += of_batch.detach()
        taus += measures.tau_of_step(run.optimizer)
    loss, correct, count = sums.tolist()
    if not math.isfinite(loss):
        raise SystemExit(f"The loss became {loss} in epoch {epoch}: start again with a smaller --lr")
    return {"train_loss": loss / count, "train_accuracy": correct / count, **measures.tau_of_epoch(taus)}


@torch.no_grad()
def evaluate(run: Run) -> reporting.Epoch:
    """Return mean loss and accuracy on the held-out images."""
    settings = run.settings
    batches = DataLoader(run.splits.test, settings.batch_size, num_workers=settings.workers)
    run.model.eval()
    sums = torch.zeros(3, device=settings.device)
    for images, labels in batches:
        sums += measure(run, images, labels)
    loss, correct, count = sums.tolist()
    return {"test_loss": loss / count, "test_accuracy": correct / count}


def measure(run: Run, images: Tensor, labels: Tensor) -> Tensor:
    """Return [summed loss, number of right answers, number of images] of a batch."""
    device = run.settings.device
    return measures.loss_correct_count(run.model(images.to(device)), labels.to(device))


def write(run: Run) -> str:
    """Write results and curves; return the verdict."""
    output, history = run.settings.output, run.history
    violations = [e["largest_violation"] for e in history if e["largest_violation"] is not None]
    final = {
        "train_accuracy": history[-1]["train_accuracy"],
        "test_accuracy": history[-1]["test_accuracy"],
        "largest_violation": max(violations, default=None),
        "seconds": sum(e["seconds"] for e in history),
    }
    reporting.write_results(
        output / "results.json",
        settings=flags.as_plain(run.settings),
        plan=json.loads(run.plan.to_json()) if run.plan else None,
        final=final,
        epochs=history,
    )
    reporting.draw_curves(output / "curves.png", history)
    held_out = f"{len(run.splits.test)} {run.splits.held_out}"
    worst = f"{max(violations):.1e} (relative)" if violations else "none, no weight is constrained"
    return (
        f"Final accuracy: {final['test_accuracy']:.2%} of {held_out} ({final['seconds']:.0f} s)\n"
        f"Largest constraint violation: {worst}\n"
        f"Files: {output}/results.json, curves.png, checkpoint.pt"
    )


if __name__ == "__main__":
    sys.exit(main())
