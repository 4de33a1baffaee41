"""What channel-directed gradients add to an optimiser's step, on the parameter shapes of a network.

    python examples/benchmarks/channel_directed.py                  # ResNet-50, SGD and AdamW, a minute on one CPU core
    python examples/benchmarks/channel_directed.py --device cuda --rounds 100 --json channel_directed.json

The variants are the bare optimiser, and the same one with each metric attached. Gradients are set anew, outside the
clock, before every step; ratios are to the bare step of the same round.
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
from torch import nn

from fgo_geo.optim.channel_directed import channel_directed

OPTIMISERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "SGD, momentum 0.9": lambda params: torch.optim.SGD(params, lr=1e-6, momentum=0.9),
    "AdamW": lambda params: torch.optim.AdamW(params, lr=1e-6),
}
VARIANTS: dict[str, dict[str, Any] | None] = {
    "bare": None,
    "h0": {"metric": "h0", "lam": 2.0},
    "h1 periodic": {"metric": "h1", "lam": 1.0},
    "h1 free": {"metric": "h1", "lam": 1.0, "ends": "free"},
    "h1t periodic": {"metric": "h1t", "lam": 1e3},
}
COLUMNS: Columns = {
    "optimiser": lambda row: row["optimizer"],
    "gradients": lambda row: row["variant"],
    **timing.TIMES,
}


def weights(model: str, device: torch.device) -> list[nn.Parameter]:
    """Random parameters with the shapes of a model's, without its memory for activations."""
    with torch.device("meta"):
        shapes = [param.shape for param in model_of(model).parameters()]
    return [nn.Parameter(0.01 * torch.randn(shape, device=device)) for shape in shapes]


def measure(name: str, options: argparse.Namespace) -> tuple[str, list[dict[str, Any]], dict[str, str]]:
    """Title, one row per variant of an optimiser, and what was left out."""
    device = options.device
    params = weights(options.model, device)
    gradients = [torch.randn_like(p) for p in params]
    for parameter in params:
        parameter.grad = torch.empty_like(parameter)
    optimizer = OPTIMISERS[name](params)
    # Activations come and go in training: an allocator that has freed a large tensor keeps memory at hand.
    torch.empty(2**22, device=device)

    def seconds(variant: str) -> float:
        arguments = VARIANTS[variant]
        handle = channel_directed(optimizer, **arguments) if arguments else None
        for parameter, gradient in zip(params, gradients, strict=True):
            assert parameter.grad is not None
            parameter.grad.copy_(gradient)
        elapsed = timing.seconds(optimizer.step, device)
        if handle:
            handle.remove()
        return elapsed

    rows = {variant: partial(seconds, variant) for variant in timing.chosen(list(VARIANTS), options, "bare")}
    times, left_out = timing.interleaved(rows, options.rounds, options.budget)
    records = [{"optimizer": name, "variant": v, **row} for v, row in timing.figures(times, "bare").items()]
    return f"{options.model}'s {len(params)} parameters, {name}", records, left_out


def main(arguments: Sequence[str] | None = None) -> None:
    parser = timing.argument_parser(__doc__ or "", rounds=30)
    parser.add_argument("--model", help="name of torchvision (resnet50)")
    options = timing.parse(parser, arguments)
    options.model = options.model or ("tiny" if options.quick else "resnet50")
    results = timing.Results("channel_directed", COLUMNS, options, model=options.model)
    for name in OPTIMISERS:
        results.add(*measure(name, options))


if __name__ == "__main__":
    main()
