"""How the cost of a step grows: with the number of weights, of groups, of manifolds, the kernels' size and the width.

    python examples/benchmarks/growth.py                                      # two minutes on one CPU core
    python examples/benchmarks/growth.py --largest 1e9 --device cuda --json growth.json
    python examples/benchmarks/growth.py --figure growth.png

Every point is a stack of equal convolutions, whose kernels are constrained to four kinds of manifolds by PIO where
nothing else is said. Gradients are random and the same in every step. torch's SGD (foreach, momentum) steps over the
same number of weights in the same round.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import timing
import torch
from contestants import REFERENCE, names_of, ours, torch_sgd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from timing import Columns
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2] / "docs"))
from figures import figure_style


class Point(NamedTuple):
    """A stack of convolutions, and how its kernels are constrained."""

    series: str
    value: float
    layers: int = 1
    width: int = 256
    kernel: int = 3
    kind: str = "mixed"
    strategy: str = "pio"

    @property
    def entries(self) -> int:
        """Number of weights."""
        return self.layers * self.width**2 * self.kernel**2


OURS = "fgo_geo"
LABELS = {
    "weights": "weights",
    "groups": "groups, of a layer 256 -> 256",
    "kernel size": "side of the kernels",
    "width": "channels of a layer",
}
COLUMNS: Columns = {
    "grows": lambda row: row["series"],
    "value": lambda row: f"{row['value']:g}" + (f" ({row['strategy']})" if row["series"] == "groups" else ""),
    "weights": lambda row: f"{row['weights']:.3g}",
    "SGD, ms": lambda row: f"{row['sgd']['milliseconds']['0.5']:.3g}",
    "step, ms (10 - 90 %)": lambda row: timing.spread(row["step"]["milliseconds"]),
    "ns per weight": lambda row: f"{1e6 * row['step']['milliseconds']['0.5'] / row['weights']:.3g}",
    "ratio (10 - 90 %)": lambda row: timing.spread(row["step"]["ratio"]),
}


def points(largest: float, quick: bool) -> Iterator[Point]:
    """All points, those of a series in order."""
    widths = {1e4: 32, 1e5: 64, 1e6: 128, 1e7: 256, 1e8: 512, 1e9: 1024}
    for entries, width in widths.items():
        if entries <= largest:
            width = 8 if quick else width
            yield Point("weights", entries, max(1, round(entries / (9 * width**2))), width)
    width = 8 if quick else 256
    for strategy in ("layer", "po", "pi", "pio"):
        yield Point("groups", 0, width=width, strategy=strategy, kind="stiefel" if strategy == "layer" else "mixed")
    for kernel in (1, 2, 3, 5, 7, 11):
        yield Point("kernel size", kernel, width=max(8, round(width * 3 / kernel)), kernel=kernel)
    for width in (8, 16) if quick else (32, 64, 128, 256, 512, 1024):
        yield Point("width", width, width=width)


def network(point: Point, device: torch.device) -> nn.Module:
    """The stack, which is never called."""
    shape = (point.width, point.width, point.kernel)
    return nn.Sequential(*(nn.Conv2d(*shape, bias=False) for _ in range(point.layers))).to(device)


def measure(point: Point, options: argparse.Namespace) -> dict[str, Any]:
    """The figures of a point."""
    builders = {REFERENCE: torch_sgd, OURS: partial(ours, kind=point.kind, strategy=point.strategy)}
    groups = 0
    steps: dict[str, Callable[[], float]] = {}
    for name, builder in builders.items():
        model = network(point, options.device)
        contestant = builder(model, names_of(model, None))
        for param in contestant.params:
            param.grad = torch.randn_like(param.detach().as_subclass(torch.Tensor)).mul_(param.numel() ** -0.5)
        if name == OURS:
            groups = sum(param.manifold.n_groups for param in contestant.params)  # pyright: ignore
        steps[name] = partial(timing.seconds, contestant.step, options.device)
    times, _ = timing.interleaved(steps, options.rounds, options.budget)
    of = timing.figures(times, REFERENCE)
    value = groups if point.series == "groups" else point.value
    return {**point._asdict(), "value": value, "weights": point.entries, "sgd": of[REFERENCE], "step": of[OURS]}


@rc_context()
def draw(records: Sequence[dict[str, Any]], path: Path) -> None:
    """One panel per series: nanoseconds per weight, on logarithmic axes, and torch's SGD."""
    figure_style({}, "")
    figure = Figure(figsize=(10, 2.9), layout="constrained")
    panels: Sequence[Axes] = figure.subplots(1, len(LABELS), sharey=True)
    for axes, (series, label) in zip(panels, LABELS.items(), strict=True):
        rows = sorted((row for row in records if row["series"] == series), key=lambda row: row["value"])
        for name, text, colour in (("step", "FG-SGD", "#0072b2"), ("sgd", "torch SGD", "#8a8f98")):
            nanoseconds = [1e6 * row[name]["milliseconds"]["0.5"] / row["weights"] for row in rows]
            axes.plot([row["value"] for row in rows], nanoseconds, "o-", color=colour, markersize=4, label=text)
        axes.set(xscale="log", yscale="log", xlabel=label)
        axes.grid(alpha=0.25)
    panels[0].set_ylabel("ns per weight and step")
    panels[0].legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=110)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = timing.argument_parser(__doc__ or "", rounds=9)
    parser.add_argument("--largest", type=float, help="most weights: 1e8 takes 3 GB (1e8)")
    parser.add_argument("--figure", type=Path, metavar="FILE", help="draw the figure, too")
    parser.set_defaults(budget=2.0)
    options = timing.parse(parser, arguments)
    options.largest = options.largest or (1e4 if options.quick else 1e8)
    results = timing.Results("growth", COLUMNS, options)
    records = [measure(point, options) for point in points(options.largest, options.quick)]
    results.add("A step over stacks of convolutions", records, {})
    if options.figure:
        draw(records, options.figure)


if __name__ == "__main__":
    main()
