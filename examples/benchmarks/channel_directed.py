"""What channel-directed gradients add to an optimiser's step, on the parameter shapes of ResNet-50.

    python examples/benchmarks/channel_directed.py                  # SGD and AdamW, a minute on one CPU core
    python examples/benchmarks/channel_directed.py --device cuda --rounds 100 --json channel_directed.json

Every round times each variant once, in a new order, in the same process: bare, and attached with each metric. The
figures are over the rounds: the median time of a step, and the median and two quantiles of its ratio to the bare
step of the same round. Gradients are set anew, outside the clock, before every step.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from torch import Tensor, nn

from fgo_geo.optim.channel_directed import channel_directed

OPTIMISERS = {
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
QUANTILES = (0.1, 0.5, 0.9)


def weights(device: torch.device) -> list[nn.Parameter]:
    """Random parameters with the shapes of ResNet-50's, without its memory for activations."""
    with torch.device("meta"):
        model = torchvision.models.resnet50()
    return [nn.Parameter(0.01 * torch.randn(p.shape, device=device)) for p in model.parameters()]


def seconds(optimizer: torch.optim.Optimizer, gradients: list[Tensor], device: torch.device) -> float:
    """The time of one step with fresh gradients."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for parameter, gradient in zip(params, gradients, strict=True):
        parameter.grad.copy_(gradient)
    synchronize(device)
    start = time.perf_counter()
    optimizer.step()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(name: str, rounds: int, device: torch.device) -> list[dict[str, Any]]:
    """One row per variant of an optimiser."""
    params = weights(device)
    gradients = [torch.randn_like(p) for p in params]
    for parameter in params:
        parameter.grad = torch.empty_like(parameter)
    optimizer = OPTIMISERS[name](params)
    # Activations come and go in training: an allocator that has freed a large tensor keeps memory at hand.
    torch.empty(2**22, device=device)
    times: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    for round_number in range(rounds + 2):
        for variant in random.sample(list(VARIANTS), len(VARIANTS)):
            options = VARIANTS[variant]
            handle = channel_directed(optimizer, **options) if options else None
            elapsed = seconds(optimizer, gradients, device)
            if handle:
                handle.remove()
            if round_number >= 2:  # the first two warm up
                times[variant].append(elapsed)
    bare = np.array(times["bare"])
    return [
        {
            "optimizer": name,
            "variant": variant,
            "milliseconds": 1e3 * float(np.median(times[variant])),
            "ratio": dict(
                zip(map(str, QUANTILES), np.quantile(times[variant] / bare, QUANTILES).tolist(), strict=True)
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
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    random.seed(options.seed)

    where = machine(options.device)
    print(f"{where}\nResNet-50's 161 parameters, {options.rounds} rounds\n")
    print(f"{'optimiser':<18} {'gradients':<13} {'ms / step':>10} {'ratio':>7} {'10 %':>7} {'90 %':>7}")
    rows: list[dict[str, Any]] = []
    for name in OPTIMISERS:
        for row in measure(name, options.rounds, options.device):
            low, middle, high = row["ratio"].values()
            figures = f"{row['milliseconds']:>10.1f} {middle:>7.2f} {low:>7.2f} {high:>7.2f}"
            print(f"{name:<18} {row['variant']:<13} {figures}", flush=True)
            rows.append(row)
    if options.json:
        record = {"machine": where, "rounds": options.rounds, "seed": options.seed, "rows": rows}
        options.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
