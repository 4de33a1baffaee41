"""What renormalised weights add to a forward or a training pass, on the layers of ResNet-50.

    python examples/benchmarks/renormalize.py                       # a few minutes on one CPU core
    python examples/benchmarks/renormalize.py --training --device cuda --batch 128 --rounds 50 --json renormalize.json

The raw weights change a little before every pass, outside the clock, as they do in training; with ``--unchanged`` they
don't, as in evaluation. Rows with *raw* start where training may lead: singular values of the raw weight differ. The
cost does not depend on the batch. Single layers get inputs of the size that they have in the network. On a linear
layer, torch's own parametrizations run too. Ratios are to the plain pass of the same round.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import timing
import torch
from contestants import model_of
from timing import Columns
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from fgo_geo.models.renormalize import renormalize

VARIANTS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "sphere": {"manifold": "sphere"},
    "oblique": {"manifold": "oblique"},
    "stiefel": {"manifold": "stiefel"},
    "stiefel, raw 1.3 : 1": {"manifold": "stiefel", "condition": 1.3},
    "stiefel, raw 5 : 1": {"manifold": "stiefel", "condition": 5.0},
    "spectral ball": {"manifold": "spectral"},
    "sphere + stiefel, PIO": {"manifold": ("sphere", "stiefel"), "groups": "pio", "selection": "random"},
}
PEERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "torch orthogonal, householder": partial(parametrizations.orthogonal, orthogonal_map="householder"),
    "torch orthogonal, cayley": partial(parametrizations.orthogonal, orthogonal_map="cayley"),
    "torch orthogonal, matrix_exp": partial(parametrizations.orthogonal, orthogonal_map="matrix_exp"),
    "torch spectral_norm": parametrizations.spectral_norm,
}
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "3x3, 64 -> 64, 56 x 56": (lambda: nn.Conv2d(64, 64, 3, padding=1, bias=False), (64, 56, 56)),
    "3x3, 512 -> 512, 7 x 7": (lambda: nn.Conv2d(512, 512, 3, padding=1, bias=False), (512, 7, 7)),
    "1x1, 64 -> 256, 56 x 56": (lambda: nn.Conv2d(64, 256, 1, bias=False), (64, 56, 56)),
    "1x1, 512 -> 2048, 7 x 7": (lambda: nn.Conv2d(512, 2048, 1, bias=False), (512, 7, 7)),
    "linear, 2048 -> 1000": (lambda: nn.Linear(2048, 1000), (2048,)),
    "ResNet-50, 224 x 224": (lambda: model_of("resnet50"), (3, 224, 224)),
}
QUICK = {
    "3x3, 8 -> 8, 6 x 6": (lambda: nn.Conv2d(8, 8, 3, bias=False), (8, 6, 6)),
    "linear, 8 -> 4": (lambda: nn.Linear(8, 4), (8,)),
}
COLUMNS: Columns = {"weights": lambda row: row["variant"], **timing.TIMES}


def renormalized(model: nn.Module, variant: str) -> nn.Module:
    """A model with all weights renormalised, whatever layer they belong to."""
    if variant in PEERS:
        return PEERS[variant](model)
    if VARIANTS[variant] is not None:
        arguments = dict(VARIANTS[variant] or {})
        condition = arguments.pop("condition", None)
        for layer in [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]:
            renormalize(layer, **arguments)
            if condition is not None:
                spread_singular_values(layer.parametrizations["weight"].original, condition)
    return model


@torch.no_grad()
def spread_singular_values(raw: Tensor, condition: float) -> None:
    """Give a raw weight singular values from one to the condition, as after a long training."""
    u, values, vh = torch.linalg.svd(raw.flatten(1), full_matrices=False)
    values = values.mean() * torch.linspace(1, condition, len(values), device=raw.device)
    raw.copy_((u * values @ vh).view_as(raw))


@torch.no_grad()
def change(model: nn.Module) -> None:
    """Change all parameters a little, in random directions."""
    for param in model.parameters():
        param.addcmul_(torch.randn_like(param), param.square().mean().sqrt(), value=2**-10)


def run(model: nn.Module, x: Tensor, training: bool) -> None:
    """One pass."""
    y = model(x)
    if training:
        y.backward(torch.ones_like(y))


def measure(name: str, options: argparse.Namespace) -> tuple[str, list[dict[str, Any]], dict[str, str]]:
    """Title, one row per variant of a layer or of the whole model, and what was left out."""
    make, shape = (QUICK | LAYERS)[name]
    variants = [*VARIANTS, *(PEERS if isinstance(make(), nn.Linear) else ())]
    chosen = timing.chosen(variants, options, "plain")
    models = {variant: renormalized(make(), variant).to(options.device) for variant in chosen}
    x = torch.randn(options.batch, *shape, device=options.device)

    def seconds(variant: str) -> float:
        models[variant].zero_grad()
        if not options.unchanged:
            change(models[variant])
        return timing.seconds(lambda: run(models[variant], x, options.training), options.device)

    rows = {variant: partial(seconds, variant) for variant in chosen}
    times, left_out = timing.interleaved(rows, options.rounds, options.budget)
    records = [{"layer": name, "variant": v, **row} for v, row in timing.figures(times, "plain").items()]
    what = "forward and backward" if options.training else "forward"
    what += ", weights unchanged" if options.unchanged else ""
    return f"{name}: {what}, batch {options.batch}", records, left_out


def main(arguments: Sequence[str] | None = None) -> None:
    parser = timing.argument_parser(__doc__ or "", rounds=5)
    parser.add_argument("--training", action="store_true", help="time forward and backward, not forward alone")
    parser.add_argument("--unchanged", action="store_true", help="the same weights in every pass")
    parser.add_argument("--batch", type=int, help="inputs in a batch (16)")
    parser.add_argument("--layers", nargs="+", choices=list(LAYERS), metavar="LAYER", help=f"of {'; '.join(LAYERS)}")
    options = timing.parse(parser, arguments)
    options.batch = options.batch or (2 if options.quick else 16)
    results = timing.Results(
        "renormalize", COLUMNS, options, training=options.training, batch=options.batch, unchanged=options.unchanged
    )
    for name in options.layers or (QUICK if options.quick else LAYERS):
        results.add(*measure(name, options))


if __name__ == "__main__":
    main()
