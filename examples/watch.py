"""Watch a training step by step: where does a run at a large learning rate go wrong?

    python examples/watch.py --data fashion --model plain --method st --lr 0.3 --epochs 3 --until 60
    python examples/watch.py --method pio --lr 1 --every 5 --csv steps.csv
    python examples/watch.py --method st --lr 0.3 --freeze biases        # is it the biases?

Takes the flags of train.py, and prints a line per step: the loss; the lengths of the steps of constrained weights,
biases, first layer and classifier, relative to the weights (for biases: to the standard deviation of the layer's
output); the largest τ; and the standard deviations of the outputs of the first, a middle and the last convolution, with
the share of dead channels (zero after ReLU for the whole batch) in the worst layer, and the norm of the gradient. The
last lines sum up, with the median angle by which a convolution's weight turned per step: its effective learning rate.
With --csv, all layers.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from training import command_line, engine, models

from fgo_geo.optim.telemetry import angle_between

COLUMNS = {"step": 4, "loss": 6, "constr.": 7, "biases": 7, "first": 7, "class.": 7, "τ": 6}
COLUMNS |= {"outputs": 16, "dead": 4, "|g|": 7}  # widths; 80 characters with the spaces between


class Watch:
    """What is seen of the layers in a step."""

    def __init__(self, model: nn.Module) -> None:
        self.layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
        self.spread: dict[str, float] = {}
        self.dead: dict[str, float] = {}
        self.before: dict[str, Tensor] = {}
        self.weights = dict(model.named_parameters())
        for name, layer in self.layers.items():
            layer.register_forward_hook(self._hook(name))

    def _hook(self, name: str) -> Any:
        def note(module: nn.Module, inputs: Any, output: Tensor) -> None:
            self.spread[name] = float(output.detach().std())
            if output.ndim == 4:
                self.dead[name] = float((output.detach().amax((0, 2, 3)) <= 0).float().mean())

        return note

    def begin(self) -> None:
        """Remember the weights before a step."""
        self.before = {name: weight.detach().clone() for name, weight in self.weights.items()}

    def lengths(self) -> dict[str, float]:
        """Lengths of the steps, relative to the weights; of biases, to the spread of the layer's outputs."""
        result = {}
        for name, weight in self.weights.items():
            length, layer = float((weight.detach() - self.before[name]).norm()), name.rpartition(".")[0]
            scale = self.spread.get(layer, 1.0) * weight.numel() ** 0.5 if weight.ndim == 1 else weight.detach().norm()
            result[name] = length / max(float(scale), 1e-30)
        return result


def show(cells: Iterable[str]) -> None:
    """Print cells under their titles."""
    print(" ".join(cell.rjust(width) for cell, width in zip(cells, COLUMNS.values(), strict=True)))


def largest(values: list[float]) -> float:
    return max(values, default=float("nan"))


def main(arguments: list[str] | None = None) -> int:
    """Train, and print a line per step; return the exit status."""
    parser = argparse.ArgumentParser(description="Watch a training step by step; other flags are those of train.py.")
    parser.add_argument("--until", type=int, default=100, help="last step (%(default)s)")
    parser.add_argument("--every", type=int, default=1, help="print every so many steps (%(default)s)")
    parser.add_argument("--csv", type=Path, help="file for the figures of all layers and steps")
    own, words = parser.parse_known_args(arguments)
    run = engine.build(command_line.parse(words, "watch.py"))
    watch = Watch(run.model)
    convolutions = [n for n, layer in watch.layers.items() if isinstance(layer, nn.Conv2d)]
    shown = [convolutions[0], convolutions[len(convolutions) // 2], convolutions[-1]]
    lines: list[dict[str, float]] = []
    show(COLUMNS)
    run.net.train()
    while run.progress.step < own.until and run.progress.epoch <= run.settings.optim.epochs:
        run.order.epoch = run.progress.epoch
        for images, labels in run.batches:
            watch.begin()
            try:
                sums, _ = engine.take_step(run, images, labels)
            except engine.Diverged as error:
                print(error)
                run.progress.step = own.until
                break
            run.progress.step += 1
            run.progress.batch += 1
            lengths = watch.lengths()
            scales = getattr(run.optimizer, "step_scales", dict)()
            taus = [float(t.max()) for t in scales.values()]
            gradient = torch.stack([w.grad.norm() for w in watch.weights.values() if w.grad is not None]).norm()
            turned = [
                float(
                    angle_between(
                        watch.before[f"{name}.weight"].flatten(), watch.weights[f"{name}.weight"].detach().flatten()
                    )
                )
                for name in convolutions
            ]
            figures = {"step": run.progress.step, "loss": float(sums[0]) / max(float(sums[2]), 1)}
            for kind, names in models.weights_by_kind(run.model).items():
                figures[kind] = largest([lengths[name] for name in names])
            figures["τ"] = largest(taus)
            if run.progress.step % own.every == 0:
                spreads = " ".join(f"{watch.spread[name]:.2g}" for name in shown)
                step, loss, *lengths_shown, tau = figures.values()
                numbers = [f"{step:.0f}", f"{loss:.4g}", *(f"{length:.2g}" for length in lengths_shown), f"{tau:.3g}"]
                show([*numbers, spreads, f"{largest(list(watch.dead.values())):.0%}", f"{gradient:.3g}"])
            lines.append(
                figures
                | {"angle": statistics.median(turned)}
                | {f"step of {name}": value for name, value in lengths.items()}
                | {f"outputs of {name}": value for name, value in watch.spread.items()}
                | {f"dead in {name}": value for name, value in watch.dead.items()}
            )
            if run.progress.step >= own.until:
                break
        run.progress.epoch, run.progress.batch = run.progress.epoch + 1, 0
    if lines:
        half = lines[len(lines) // 2 :]
        print(f"median loss of the second half: {statistics.median(line['loss'] for line in half):.3f}")
        print(f"median angle per step: {statistics.median(line['angle'] for line in lines):.5f}")
        held_out = engine.evaluate(run)
        print(f"held-out accuracy: {held_out['test_accuracy']:.2%}, loss {held_out['test_loss']:.3f}")
    if own.csv and lines:
        with own.csv.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(lines[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows({k: f"{v:.5g}" for k, v in line.items()} for line in lines)
    return 0


if __name__ == "__main__":
    sys.exit(main())
