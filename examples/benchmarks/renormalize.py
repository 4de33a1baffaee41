"""What renormalised weights add to a forward or a training pass, on the layers of ResNet-50.

    python examples/benchmarks/renormalize.py                       # a few minutes on one CPU core
    python examples/benchmarks/renormalize.py --training --device cuda --batch 128 --rounds 50 --json renormalize.json

The weights of a renormalised layer are computed anew in every pass; their cost does not depend on the batch. Single
layers get inputs of the size that they have in the network. Every round times each variant once, in a new order, in the
same process: plain, and renormalised in several ways. The figures are over the rounds: the median time of the
pass, and the median and two quantiles of its ratio to the plain pass of the same round.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from torch import Tensor, nn

from fgo_geo.renormalize import renormalize

VARIANTS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "sphere": {"manifold": "sphere"},
    "oblique": {"manifold": "oblique"},
    "stiefel": {"manifold": "stiefel"},
    "spectral ball": {"manifold": "spectral"},
    "sphere + stiefel, PIO": {"manifold": ("sphere", "stiefel"), "groups": "pio", "selection": "random"},
}
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "3x3, 64 -> 64, 56 x 56": (lambda: nn.Conv2d(64, 64, 3, padding=1, bias=False), (64, 56, 56)),
    "3x3, 512 -> 512, 7 x 7": (lambda: nn.Conv2d(512, 512, 3, padding=1, bias=False), (512, 7, 7)),
    "1x1, 64 -> 256, 56 x 56": (lambda: nn.Conv2d(64, 256, 1, bias=False), (64, 56, 56)),
    "1x1, 512 -> 2048, 7 x 7": (lambda: nn.Conv2d(512, 2048, 1, bias=False), (512, 7, 7)),
    "linear, 2048 -> 1000": (lambda: nn.Linear(2048, 1000), (2048,)),
    "ResNet-50, 224 x 224": (lambda: torchvision.models.resnet50(), (3, 224, 224)),
}
QUANTILES = (0.1, 0.5, 0.9)


def renormalized(model: nn.Module, arguments: dict[str, Any] | None) -> nn.Module:
    """A model with all weights renormalised, whatever layer they belong to."""
    if arguments is not None:
        for layer in [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]:
            renormalize(layer, **arguments)
    return model


def seconds(model: nn.Module, x: Tensor, training: bool) -> float:
    """The time of one pass."""
    model.zero_grad()
    synchronize(x.device)
    start = time.perf_counter()
    y = model(x)
    if training:
        y.backward(torch.ones_like(y))
    synchronize(x.device)
    return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(name: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per variant of a layer, or of the whole model."""
    make, shape = LAYERS[name]
    models = {variant: renormalized(make(), arguments).to(options.device) for variant, arguments in VARIANTS.items()}
    x = torch.randn(options.batch, *shape, device=options.device)
    times: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    for round_number in range(options.rounds + 1):
        for variant in random.sample(list(VARIANTS), len(VARIANTS)):
            elapsed = seconds(models[variant], x, options.training)
            if round_number >= 1:  # the first warms up
                times[variant].append(elapsed)
    plain = np.array(times["plain"])
    return [
        {
            "layer": name,
            "variant": variant,
            "milliseconds": 1e3 * float(np.median(times[variant])),
            "ratio": dict(
                zip(map(str, QUANTILES), np.quantile(times[variant] / plain, QUANTILES).tolist(), strict=True)
            ),
        }
        for variant in VARIANTS
    ]


def machine(device: torch.device) -> str:
    """Processor, threads and versions, in one line."""
    cpuinfo = Path("/proc/cpuinfo")
    names = [
        line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
    ]
    processor = names[0] if names else platform.processor() or platform.machine()
    accelerator = f", {torch.cuda.get_device_name(device)}" if device.type == "cuda" else ""
    return (
        f"{processor}{accelerator}; {torch.get_num_threads()} threads; {platform.system()}, "
        f"Python {platform.python_version()}, torch {torch.__version__}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--training", action="store_true", help="time forward and backward, not forward alone")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", nargs="*", choices=list(LAYERS), default=list(LAYERS), metavar="LAYER")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    random.seed(options.seed)

    where = machine(options.device)
    what = "forward and backward" if options.training else "forward"
    print(f"{where}\n{what}, batch {options.batch}, {options.rounds} rounds\n")
    print(f"{'layer':<25} {'weights':<22} {'ms':>9} {'ratio':>7} {'10 %':>7} {'90 %':>7}")
    rows: list[dict[str, Any]] = []
    for name in options.layers:
        for row in measure(name, options):
            rows.append(row)
            low, middle, high = row["ratio"].values()
            print(
                f"{row['layer']:<25} {row['variant']:<22} {row['milliseconds']:>9.1f} "
                f"{middle:>7.2f} {low:>7.2f} {high:>7.2f}"
            )
    if options.json:
        record = {"machine": where, "pass": what, "batch": options.batch, "rounds": options.rounds, "rows": rows}
        options.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
