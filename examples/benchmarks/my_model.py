"""Is it fast for me? What this package adds to the training of your model.

    python examples/benchmarks/my_model.py torchvision.models.resnet50
    python examples/benchmarks/my_model.py package.module.MyNet --batch 8 --input 1x28x28
    python examples/benchmarks/my_model.py my_code.build --input 512 --tokens 32000 --device cuda

A model is what you would call in Python to get one: a class or a function, by its full name, called without arguments.
Python finds it as in an import, also in the current folder. It gets random images or vectors of the shape after
``--input``, or with ``--tokens`` random token numbers, and the loss is the mean square of its first output, so that no
labels are needed. The model is constrained as ``fgo_geo.constrain(model)`` does it, without arguments.

*Step* is the optimiser's step alone, and *ratio* relates it to that of torch's SGD (foreach, momentum). *Adds* is the
step relative to forward and backward: what you pay, and it falls with the size of the batch.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timing
import torch
from contestants import LR, MOMENTUM, REFERENCE, Builder, Contestant, torch_adamw, torch_sgd
from timing import Columns, quantiles, spread
from torch import Tensor, nn

import fgo_geo

COLUMNS: Columns = {
    "optimiser": lambda row: row["name"],
    "forward + backward, ms": lambda row: f"{row['passes']['0.5']:.3g}",
    "step, ms (10 - 90 %)": lambda row: spread(row["step"]),
    "ratio (10 - 90 %)": lambda row: spread(row["ratio"]),
    "adds, %": lambda row: f"{100 * row['adds']['0.5']:.2g}",
    "rounds": lambda row: str(row["rounds"]),
}


def fg_sgd(model: nn.Module, names: Sequence[str]) -> Contestant:
    """FG-SGD on the model as ``constrain`` leaves it."""
    fgo_geo.constrain(model)
    params = [model.get_parameter(name) for name in names]
    return Contestant(fgo_geo.RiemannianFGSGD(params, lr=LR, momentum=MOMENTUM, foreach=True).step, params)


def adamw_on_manifolds(model: nn.Module, names: Sequence[str]) -> Contestant:
    """AdamW on the same manifolds."""
    fgo_geo.constrain(model)
    params = [model.get_parameter(name) for name in names]
    optimizer = torch.optim.AdamW(params, lr=LR, foreach=True)
    fgo_geo.on_manifolds(optimizer)
    return Contestant(optimizer.step, params)


ROWS: dict[str, Builder] = {
    REFERENCE: partial(torch_sgd, foreach=True),
    "torch AdamW, foreach": torch_adamw,
    "fgo_geo RiemannianFGSGD": fg_sgd,
    "fgo_geo on_manifolds(AdamW)": adamw_on_manifolds,
}


def small_net() -> nn.Module:
    """Three convolutions and a linear layer, for images of 28 x 28."""
    relu, pool = nn.ReLU(), nn.MaxPool2d(2)
    first = nn.Conv2d(1, 16, 3, padding=1), relu, pool, nn.Conv2d(16, 32, 3, padding=1), relu, pool
    return nn.Sequential(*first, nn.Conv2d(32, 64, 3, padding=1), relu, nn.Flatten(), nn.Linear(64 * 49, 10))


def vit_s_16() -> nn.Module:
    """The small vision transformer, for images of 224 x 224."""
    from torchvision.models import VisionTransformer

    return VisionTransformer(224, 16, num_layers=12, num_heads=6, hidden_dim=384, mlp_dim=1536)


OWN = {"small_net": small_net, "vit_s_16": vit_s_16}


def built(target: str) -> nn.Module:
    """The model that a name gives.

    Raises:
        SystemExit: If there is no such thing, or it gives no module.
    """
    where, _, what = target.rpartition(".")
    sys.path.insert(0, str(Path.cwd()))
    try:
        model = (getattr(importlib.import_module(where), what) if where else OWN[what])()
    except (ImportError, AttributeError, KeyError, TypeError) as error:
        raise SystemExit(
            f"{target!r} gives no model ({type(error).__name__}: {error}); name a class or function that is "
            f"called without arguments, such as torchvision.models.resnet50, or one of {', '.join(OWN)}"
        ) from error
    finally:
        sys.path.pop(0)
    if not isinstance(model, nn.Module):
        raise SystemExit(f"{target!r} gives a {type(model).__name__}; expected a torch.nn.Module")
    return model


def output_of(result: Any) -> Tensor:
    """The first tensor of a model's output."""
    while not isinstance(result, Tensor):
        result = next(iter(result.values() if isinstance(result, Mapping) else result))
    return result


class Training:
    """A model with its optimiser, built when it is first needed."""

    def __init__(self, model: nn.Module, builder: Builder, inputs: Tensor) -> None:
        self._model, self._builder, self._inputs = model, builder, inputs
        self._contestant: Contestant | None = None

    def seconds(self) -> tuple[float, float]:
        """The times of forward and backward, and of the step."""
        if self._contestant is None:
            self._model = copy.deepcopy(self._model)
            self._contestant = self._builder(self._model, [name for name, _ in self._model.named_parameters()])

        def passes() -> None:
            output_of(self._model(self._inputs)).float().square().mean().backward()

        self._model.zero_grad()
        device = self._inputs.device
        return timing.seconds(passes, device), timing.seconds(self._contestant.step, device)


def measure(target: str, options: argparse.Namespace) -> tuple[str, list[dict[str, Any]], dict[str, str]]:
    """Title, rows, and what was left out."""
    model = built(target).to(options.device)
    image = "1x28x28" if target == "small_net" else "3x224x224"
    shape = (options.batch, *map(int, (options.input or image).split("x")))
    inputs = torch.randn(shape) if options.tokens is None else torch.randint(options.tokens, shape)
    variants: dict[str, Callable[[], Any]] = {
        name: Training(model, ROWS[name], inputs.to(options.device)).seconds
        for name in timing.chosen(list(ROWS), options, REFERENCE)
    }
    times, left_out = timing.interleaved(variants, options.rounds, options.budget)
    if REFERENCE not in times:
        raise SystemExit(f"{target} does not train on inputs of shape {shape}: {left_out[REFERENCE]}; see --input")
    records = [
        {
            "name": name,
            "passes": quantiles(1e3 * parts[:, 0]),
            "step": quantiles(1e3 * parts[:, 1]),
            "ratio": quantiles(parts[:, 1] / times[REFERENCE][:, 1]),
            "adds": quantiles(parts[:, 1] / parts[:, 0]),
            "rounds": int(np.count_nonzero(~np.isnan(parts[:, 1]))),
        }
        for name, parts in times.items()
    ]
    entries = sum(p.numel() for p in model.parameters())
    return f"{target}: {entries:,} weights, batch {' x '.join(map(str, shape))}", records, left_out


def main(arguments: Sequence[str] | None = None) -> None:
    parser = timing.argument_parser(__doc__ or "", rounds=9)
    parser.add_argument("models", nargs="*", help="full names, such as torchvision.models.resnet50")
    parser.add_argument("--input", help="shape of one input (3x224x224; small_net: 1x28x28)")
    parser.add_argument("--tokens", type=int, metavar="N", help="inputs are numbers below N")
    parser.add_argument("--batch", type=int, help="inputs in a batch (32)")
    options = timing.parse(parser, arguments)
    options.batch = options.batch or (2 if options.quick else 32)
    results = timing.Results("my_model", COLUMNS, options, batch=options.batch)
    for target in options.models or ["small_net" if options.quick else "torchvision.models.resnet18"]:
        results.add(*measure(target, options))


if __name__ == "__main__":
    main()
