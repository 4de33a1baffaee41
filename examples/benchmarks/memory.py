"""Peak memory of constrain, step and report, as multiples of the weights.

    python examples/benchmarks/memory.py                                      # ResNet-50, half a minute
    python examples/benchmarks/memory.py --model vit_b_16 --device cuda --json memory.json

What a call takes at its peak beyond what was there before it; on the CPU by the resident memory of the process (Linux
alone). Each call follows on the one above it: *first step* makes the momentum and what is kept from step to step. The
last row is the same step of torch's SGD.
"""

from __future__ import annotations

import copy
import ctypes
import gc
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timing
import torch
from contestants import MIXED, model_of
from timing import Columns
from torch import nn

import fgo_geo

COLUMNS: Columns = {
    "call": lambda row: row["name"],
    "peak, MB": lambda row: f"{row['peak'] / 1e6:.0f}",
    "times the weights": lambda row: f"{row['multiple']:.2f}",
    "stays, times the weights": lambda row: f"{row['stays']:.2f}",
}

_M_MMAP_THRESHOLD = -3  # of malloc.h


def resident(which: str) -> int:
    """Bytes of resident memory of this process: ``"VmRSS"`` now, ``"VmHWM"`` at the peak."""
    found = re.search(rf"{which}:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
    assert found is not None
    return 1024 * int(found[1])


def peak_of(work: Callable[[], object], device: torch.device) -> tuple[int, int]:
    """What a call takes at its peak, and what it leaves, in bytes."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        kept = work()
        peak, after = torch.cuda.max_memory_allocated(device), torch.cuda.memory_allocated(device)
    else:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts anew
        before = resident("VmRSS")
        kept = work()
        peak = resident("VmHWM")
        ctypes.CDLL(None).malloc_trim(0)  # what is free doesn't stay
        after = resident("VmRSS")
    del kept
    return peak - before, after - before


def measure(target: str, device: torch.device) -> list[dict[str, Any]]:
    """One row per call."""
    if device.type != "cuda":
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 2**16)  # what is freed goes back to the system
    model, plain = (m.to(device) for m in (model_of(target), model_of(target)))
    weights = sum(p.numel() * p.element_size() for p in plain.parameters())
    warm = model_of("tiny").to(device)  # what the first use of the package loads is no cost of a model
    fgo_geo.constrain(warm, manifolds=MIXED)
    stepper(warm, fgo_geo.RiemannianFGSGD)()
    fgo_geo.report(warm, n_samples=1000)
    del warm
    rows: list[dict[str, Any]] = []

    def add(name: str, work: Callable[[], object]) -> None:
        peak, stays = peak_of(work, device)
        rows.append({"name": name, "peak": peak, "multiple": peak / weights, "stays": stays / weights})

    add("constrain", lambda: fgo_geo.constrain(model, manifolds=MIXED))
    step = stepper(model, fgo_geo.RiemannianFGSGD)
    add("first step", step)
    add("step", step)
    add("report", lambda: fgo_geo.report(model, n_samples=50_000))
    add("deepcopy", lambda: copy.deepcopy(model))
    sgd = stepper(plain, torch.optim.SGD)
    add("torch SGD, first step", sgd)
    add("torch SGD, step", sgd)
    return rows


def stepper(model: nn.Module, optimizer: Any) -> Callable[[], object]:
    """A step with gradients."""
    for param in model.parameters():
        param.grad = torch.randn_like(param.detach().as_subclass(torch.Tensor)).mul_(param.numel() ** -0.5)
    return optimizer(model.parameters(), lr=1e-3, momentum=0.9).step


def main(arguments: Sequence[str] | None = None) -> None:
    parser = timing.argument_parser(__doc__ or "", rounds=1)
    parser.add_argument("--model", nargs="+", help="names of torchvision (resnet50)")
    options = timing.parse(parser, arguments)
    if options.device.type != "cuda" and not Path("/proc/self/clear_refs").exists():
        raise SystemExit("the peak of resident memory is read from /proc, which Linux has: use --device cuda elsewhere")
    results = timing.Results("memory", COLUMNS, options)
    for target in options.model or (["tiny"] if options.quick else ["resnet50"]):
        results.add(target, measure(target, options.device), {})


if __name__ == "__main__":
    main()
