"""At equal angles per step, is training on manifolds better? Test accuracy against the effective learning rate.

    python examples/angles.py examples/grids/study-angles.yaml --jobs 2

Learning rates of different optimisers cannot be compared, and neither can those of free weights and of weights of fixed
norm: what a step does to a kernel is the angle by which it turns it. Every row of a grid is trained at all its learning
rates (nothing is chosen) while :func:`fgo_geo.telemetry` measures that angle; each run is a point of the figure.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from pathlib import Path
from typing import Any

from grid import alone, results
from torch import nn
from training import engine
from training import grid as grids
from training.command_line import make
from training.settings import SettingsError

COLUMNS = ("key", "row", "variant", "lr", "seed", "status", "test_accuracy", "angle", "first_angle", "last_angle")
GUESSING, LOST = 0.1, 0.15


def train(flags: dict[str, Any]) -> dict[str, Any]:
    """Train once; return accuracy and angles (degrees per step, median over the inner convolutions).

    ``angle`` is the mean over the epochs, ``first_angle`` and ``last_angle`` are those of the first and last epoch.
    """
    run = engine.build(make({**flags, "telemetry": 5}))
    convolutions = [f"angle/{name}.weight" for name, m in run.model.named_modules() if isinstance(m, nn.Conv2d)]
    inner = convolutions[1:]
    angles: list[float] = []
    try:
        engine.fit(run, show=lambda epoch: angles.append(statistics.median(epoch[name] for name in inner)))
    except engine.Diverged:
        return {"status": "diverged", "test_accuracy": GUESSING}
    degrees = [math.degrees(angle) for angle in angles]
    return {
        "status": "finished",
        "test_accuracy": engine.final_figures(run)["test_accuracy"],
        "angle": statistics.fmean(degrees),
        "first_angle": degrees[0],
        "last_angle": degrees[-1],
    }


def cells_of(grid: grids.Grid) -> list[grids.Cell]:
    """Every row with every learning rate and seed, on all training images."""
    return [
        grids.Cell(row, "final", (("lr", lr),), seed)
        for row in grid.rows
        for lr in row.tune["lr"]
        for seed in grid.seeds
    ]


def work(cells: list[grids.Cell], path: Path, jobs: int) -> list[dict[str, str]]:
    """Do the runs that have no line in the file; return their lines."""
    records = grids.Records(path, COLUMNS)
    missing = [cell for cell in cells if cell.key not in records.by_key]
    for number, (cell, figures) in enumerate(results(missing, jobs, train), 1):
        line = {"key": cell.key, "row": cell.row.name, "variant": cell.row.variant, "seed": cell.seed}
        line |= {"lr": dict(cell.choice)["lr"], **figures}
        shown = {name: f"{value:.5g}" if isinstance(value, float) else str(value) for name, value in line.items()}
        records.add(shown)
        print(f"{number}/{len(missing)} {', '.join(shown.values())}")
    return [records.by_key[cell.key] for cell in cells]


def curve(lines: list[dict[str, str]]) -> tuple[list[float], list[float]]:
    """Mean angles (degrees) and accuracies (%) at the learning rates of a row at which no run was lost."""
    angles, accuracies = [], []
    for lr in sorted({line["lr"] for line in lines}, key=float):
        runs = [line for line in lines if line["lr"] == lr]
        if all(float(run["test_accuracy"]) > LOST for run in runs):
            angles.append(statistics.fmean(float(run["angle"]) for run in runs))
            accuracies.append(100 * statistics.fmean(float(run["test_accuracy"]) for run in runs))
    return angles, accuracies


def draw(path: Path, lines: list[dict[str, str]]) -> None:
    """Draw accuracies against angles, a line per row and a panel per variant."""
    from matplotlib.figure import Figure  # pyright: ignore

    variants, rows = (list(dict.fromkeys(line[name] for line in lines)) for name in ("variant", "row"))
    figure = Figure(figsize=(4.6 * len(variants) + 2.6, 4), layout="constrained")
    for axes, variant in zip(figure.subplots(1, len(variants), squeeze=False)[0], variants, strict=True):
        for number, row in enumerate(rows):
            x, y = curve([line for line in lines if (line["row"], line["variant"]) == (row, variant)])
            axes.plot(x, y, marker="osv^D*PX<"[number % 9], markersize=4, label=row)
        axes.set(xscale="log", title=variant, xlabel="angle per step, degrees")
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("test accuracy, %")
    figure.axes[-1].legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, dpi=120)


def main(arguments: list[str] | None = None) -> int:
    """Do the runs that are missing, and draw the figure; return the exit status."""
    parser = argparse.ArgumentParser(description="Accuracy against the angle per step. Defaults are in parentheses.")
    parser.add_argument("grid", type=Path, help="YAML file of the grid; every row tunes lr alone")
    parser.add_argument("--output", type=Path, help="folder (runs/NAME OF THE FILE)")
    parser.add_argument("--jobs", type=int, default=2, help="processes (%(default)s)")
    settings = parser.parse_args(arguments)
    output = settings.output or Path("runs") / settings.grid.stem
    try:
        grid = grids.read(settings.grid)
        if odd := [row.name for row in grid.rows if list(row.tune) != ["lr"]]:
            raise SettingsError(f"{settings.grid}: every row must tune lr alone, and {odd[0]!r} does not")
    except SettingsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2

    def train_and_draw() -> int:
        draw(output / "angles.png", work(cells_of(grid), output / "angles.csv", settings.jobs))
        print(f"Files in {output}: angles.csv, angles.png")
        return 0

    return alone(output, train_and_draw)


if __name__ == "__main__":
    sys.exit(main())
