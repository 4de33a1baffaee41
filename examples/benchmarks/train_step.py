"""The optimiser's share of a whole training step: forward, backward, step.

    python examples/benchmarks/train_step.py                                  # ResNet-18, 32 images of 64 x 64
    python examples/benchmarks/train_step.py --model resnet50 vit_b_16 --batch 64 --image 224 --device cuda
    python examples/benchmarks/train_step.py --channels-last --threads 2 --without "*Muon*" --json train_step.json

Every row trains a model of its own on the same random images, with random labels. All rows run in one process, once per
round, in a new order. *Share* is the step's part of the whole, *adds* relates it to forward and backward. The ratio
compares whole training steps with those of torch's SGD (foreach, momentum) in the same round.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import timing
import torch
from contestants import PEERS, REFERENCE, Builder, Contestant, model_of, names_of, ours
from timing import Columns, quantiles, spread
from torch import Tensor, nn

PARTS = ("forward", "backward", "step")
ROWS: dict[str, Builder] = {
    **{name: builder for name, builder in PEERS.items() if "no manifold" not in name and "per kernel" not in name},
    "fgo_geo, mixed kernels, pio": partial(ours, kind="mixed", strategy="pio", only="kernels"),
    "fgo_geo, Stiefel matrices, layer": partial(ours, kind="stiefel", strategy="layer", only="matrices"),
    "fgo_geo, all weights mixed, pio": partial(ours, kind="mixed", strategy="pio"),
}
COLUMNS: Columns = {
    "optimiser": lambda row: row["name"],
    "forward, ms": lambda row: f"{row['forward']['0.5']:.0f}",
    "backward, ms": lambda row: f"{row['backward']['0.5']:.0f}",
    "step, ms (10 - 90 %)": lambda row: spread(row["step"]),
    "share, %": lambda row: f"{100 * row['share']['0.5']:.1f}",
    "adds, % (10 - 90 %)": lambda row: spread({q: 100 * value for q, value in row["adds"].items()}),
    "ratio (10 - 90 %)": lambda row: spread(row["ratio"]),
    "rounds": lambda row: str(row["rounds"]),
}


class Training:
    """A model with its optimiser, built when it is first needed."""

    def __init__(self, model: nn.Module, builder: Builder, images: Tensor, labels: Tensor) -> None:
        self._model, self._builder, self._images, self._labels = model, builder, images, labels
        self._contestant: Contestant | None = None

    def seconds(self) -> tuple[float, float, float]:
        """The times of forward, backward and step."""
        if self._contestant is None:
            self._model = copy.deepcopy(self._model)
            self._contestant = self._builder(self._model, names_of(self._model, None))
        contestant, device = self._contestant, self._images.device
        loss: list[Tensor] = []

        def forward() -> None:
            loss.append(nn.functional.cross_entropy(self._model(self._images), self._labels))

        def backward() -> None:
            loss[0].backward()

        def step() -> None:
            contestant.hand_over_gradients()
            contestant.step()

        self._model.zero_grad()
        return timing.seconds(forward, device), timing.seconds(backward, device), timing.seconds(step, device)


def measure(target: str, options: argparse.Namespace) -> tuple[str, list[dict[str, Any]], dict[str, str]]:
    """Title, rows, and what was left out."""
    memory_format = torch.channels_last if options.channels_last else torch.contiguous_format
    model = model_of(target, options.image).to(options.device)
    model.to(memory_format=memory_format)
    images = torch.randn(options.batch, 3, options.image, options.image, device=options.device)
    images = images.to(memory_format=memory_format)
    labels = torch.randint(10, (options.batch,), device=options.device)
    names = timing.chosen(list(ROWS), options, REFERENCE)
    rows = {name: Training(model, ROWS[name], images, labels).seconds for name in names}
    times, left_out = timing.interleaved(rows, options.rounds, options.budget)
    whole = timing.figures({name: parts.sum(1) for name, parts in times.items()}, REFERENCE)
    records = [
        {
            "name": name,
            **{part: quantiles(1e3 * column) for part, column in zip(PARTS, parts.T, strict=True)},
            "share": quantiles(parts[:, 2] / parts.sum(1)),
            "adds": quantiles(parts[:, 2] / parts[:, :2].sum(1)),
            "ratio": whole[name]["ratio"],
            "rounds": int(np.count_nonzero(~np.isnan(parts[:, 2]))),
        }
        for name, parts in times.items()
    ]
    layout = ", channels_last" if options.channels_last else ""
    return f"{target}, {options.batch} images of {options.image} x {options.image}{layout}", records, left_out


def main(arguments: Sequence[str] | None = None) -> None:
    parser = timing.argument_parser(__doc__ or "", rounds=7)
    parser.add_argument("--model", nargs="+", help="names of torchvision (resnet18)")
    parser.add_argument("--batch", type=int, help="images in a batch (32)")
    parser.add_argument("--image", type=int, help="side of the images (64)")
    parser.add_argument("--channels-last", action="store_true", help="models and images in this memory format")
    options = timing.parse(parser, arguments)
    options.batch = options.batch or (2 if options.quick else 32)
    options.image = options.image or (16 if options.quick else 64)
    results = timing.Results("train_step", COLUMNS, options, batch=options.batch, image=options.image)
    for target in options.model or (["tiny"] if options.quick else ["resnet18"]):
        results.add(*measure(target, options))


if __name__ == "__main__":
    main()
