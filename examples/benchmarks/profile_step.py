"""Where the time of a step goes: the parts of a step on the weights of a network, as torch's profiler sees them.

    python examples/benchmarks/profile_step.py                                # ResNet-18's kernels, and its matrices
    python examples/benchmarks/profile_step.py --model resnet50 --top 15 --json profile.json

*fused* is the compiled step of spatial convolutions, whose two sweeps have a name of their own; *reference* is the
batched torch code on the same weights; *matrices* are the linear layers and 1x1 convolutions on Stiefel manifolds.
Every part counts without what it calls. The rest is Python, and what is smaller than the parts shown. The profiler's
own cost is in the figures: shares say more than milliseconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import timing
import torch
from contestants import model_of, names_of, ours
from timing import Columns
from torch.profiler import ProfilerActivity, profile

COLUMNS: Columns = {
    "part": lambda row: row["name"],
    "ms": lambda row: f"{row['milliseconds']:.2f}",
    "share, %": lambda row: f"{row['share']:.1f}",
    "calls": lambda row: f"{row['calls']:g}",
}
CASES = {
    "fused": {"only": "kernels", "kind": "mixed", "strategy": "pio", "path": "fused"},
    "reference": {"only": "kernels", "kind": "mixed", "strategy": "pio", "path": "reference"},
    "matrices": {"only": "matrices", "kind": "stiefel", "strategy": "layer", "path": "auto"},
}
STEP = "Optimizer.step"  # what torch calls the whole; its own time is Python's
WHOLE = "whole step"
REST = "Python and smaller parts"


def parts_of(target: str, case: dict[str, str], rounds: int, top: int) -> list[dict[str, Any]]:
    """The parts of a step, largest first.

    Args:
        target: Name of a model.
        case: What to constrain, and the path.
        rounds: Number of steps to average over.
        top: How many parts to show.
    """
    model = model_of(target)
    contestant = ours(model, names_of(model, case["only"]), **case)
    for param in contestant.params:
        gradient = torch.randn_like(param.detach().as_subclass(torch.Tensor))
        param.grad = gradient / gradient.norm()
    for _ in range(3):
        contestant.step()
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        for _ in range(rounds):
            contestant.step()
    events = sorted(profiled.key_averages(), key=lambda event: event.self_cpu_time_total, reverse=True)
    whole = sum(event.cpu_time_total for event in events if event.key.startswith(STEP))
    parts = [event for event in events if not event.key.startswith(STEP)][:top]

    def row(name: str, microseconds: float, calls: float) -> dict[str, Any]:
        share = 100 * (microseconds / whole)
        return {"name": name, "milliseconds": microseconds / rounds / 1e3, "share": share, "calls": calls / rounds}

    rest = whole - sum(event.self_cpu_time_total for event in parts)
    shown = [row(event.key, event.self_cpu_time_total, event.count) for event in parts]
    return [row(WHOLE, whole, rounds), *shown, row(REST, rest, 0)]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = timing.argument_parser(__doc__ or "", rounds=10)
    parser.add_argument("--model", help="a name of torchvision, or the shape of a layer (resnet18)")
    parser.add_argument("--top", type=int, default=8, help="number of parts to show (%(default)s)")
    options = timing.parse(parser, arguments)
    results = timing.Results("profile_step", COLUMNS, options)
    target = options.model or ("tiny" if options.quick else "resnet18")
    for name in timing.chosen(list(CASES), options, ""):
        rows = parts_of(target, CASES[name], options.rounds, options.top)
        results.add(f"{target}, {name}", rows, {})


if __name__ == "__main__":
    main()
