"""Do the measures of Table 1 tell how well a network generalises? Rank correlations over a grid of networks.

    python examples/generalisation.py examples/grids/generalisation.yaml --jobs 2
    python examples/generalisation.py examples/grids/generalisation.yaml --quick      # a look at the machinery

Networks on manifolds and free ones are trained over all combinations of some settings (a grid file without ``tune``;
its rows and what it varies are the *axes*). For each, the report's measures are set against the gap between test and
training error, averaged over seeds, of the networks that fit their training images. For every measure the table has

* Kendall's τ over all pairs of networks;
* granulated τ (Jiang et al., 2020): over networks that differ in one axis alone, averaged within each axis, then over
  the axes. A measure that follows one axis only, such as the depth, is not rewarded for it;
* the worst axis (Dziugaite et al., 2020): the largest share of pairs that differ in one axis and that the measure puts
  in the wrong order. A half is guessing. No pair is left out for being within noise.

All three are computed for all networks, for the free ones, and for those on manifolds: a norm that is fixed by
construction is no evidence, so what a measure says about networks on one manifold rests on their free weights.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import math
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import scipy.stats
from grid import results
from rich.console import Console
from rich.table import Table
from training import data, engine
from training import grid as grids
from training.command_line import make
from training.settings import SettingsError

from fgo_geo.measures.report import report

BASIC = ("key", "configuration", "seed", "status", "train_accuracy", "test_accuracy", "gap", "loss_gap")


@dataclass(frozen=True)
class Point:
    """A configuration: its value on every axis, and means over the seeds."""

    axes: Mapping[str, str]
    gap: float
    measures: Mapping[str, float]


# -- runs -----------------------------------------------------------------------------------------------------


def train(flags: dict[str, Any]) -> dict[str, Any]:
    """Train once and measure the network; a run that diverges has no measures."""
    settings = make(flags)
    run = engine.build(settings)
    try:
        engine.fit(run)
    except engine.Diverged:
        return {"status": "diverged"}
    figures = engine.final_figures(run)
    if not math.isfinite(figures["test_loss"]):
        return {"status": "diverged"}
    images = run.splits.train
    fitted = list(data.loader(images, data.Order(len(images), 256, None), 0, settings.run.device or "cpu"))
    training = dict(zip(("loss", "accuracy"), figures_on(run, fitted), strict=True))
    measured = report(run.trained, fitted, len(images), fold=settings.model.norm == "batch", operator_norms=False)
    shown = {
        "status": "finished",
        "train_accuracy": training["accuracy"],
        "test_accuracy": figures["test_accuracy"],
        "gap": training["accuracy"] - figures["test_accuracy"],
        "loss_gap": figures["test_loss"] - training["loss"],
        "1/margin": -math.log(measured.margin) if measured.margin and measured.margin > 0 else math.nan,
    }
    for measure in measured.measures:
        shown[f"{measure.name}, {measure.scaling}"] = measure.value
        divided = math.nan if measure.margin_value is None else measure.margin_value
        shown[f"{measure.name}, {measure.scaling}, margin"] = divided
    return shown


def figures_on(run: engine.Run, batches: Iterable[Any]) -> tuple[float, float]:
    """Mean loss and accuracy of the trained network on batches."""
    run.held_out = batches  # pyright: ignore
    figures = engine.evaluate(run)
    return figures["test_loss"], figures["test_accuracy"]


def axes_of(cell: grids.Cell) -> dict[str, str]:
    """The values of a run on the axes, the row among them."""
    parts = [part.rpartition(" ") for part in cell.row.variant.split(", ") if part]
    return {"row": cell.row.name, **{name: value for name, _, value in parts}}


def work(cells: Sequence[grids.Cell], path: Path, jobs: int, console: Console) -> dict[str, dict[str, str]]:
    """Do the runs that have no line in the file; return all lines by key."""
    done: dict[str, dict[str, str]] = {}
    if path.exists():
        with path.open(encoding="utf-8", newline="") as file:
            done = {line["key"]: line for line in csv.DictReader(file)}
    missing = [cell for cell in cells if cell.key not in done]
    for number, (cell, figures) in enumerate(results(missing, jobs, train), 1):
        line = {"key": cell.key, "configuration": cell.row.name, "seed": cell.seed, **figures}
        line["configuration"] += f"; {cell.row.variant}" if cell.row.variant else ""
        done[cell.key] = {name: f"{v:.7g}" if isinstance(v, float) else str(v) for name, v in line.items()}
        names = dict.fromkeys([*BASIC, *(name for one in done.values() for name in one)])
        temporary = path.with_suffix(".part")
        with temporary.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(names), lineterminator="\n", restval="")
            writer.writeheader()
            writer.writerows(done.values())
        temporary.replace(path)
        console.print(f"{number}/{len(missing)} {line['configuration']}: {figures['status']}", highlight=False)
    return done


def points(cells: Sequence[grids.Cell], lines: Mapping[str, Mapping[str, str]], fitted: float) -> list[Point]:
    """Means over the seeds of every configuration all of whose runs fit the training images."""
    found: dict[tuple[tuple[str, str], ...], list[Mapping[str, str]]] = {}
    for cell in cells:
        found.setdefault(tuple(axes_of(cell).items()), []).append(lines[cell.key])
    result = []
    for axes, runs in found.items():
        if any(run["status"] != "finished" or float(run["train_accuracy"]) < fitted for run in runs):
            continue
        names = [name for name in runs[0] if name not in BASIC]
        means = {name: statistics.fmean(float(run[name] or math.nan) for run in runs) for name in names}
        result.append(Point(dict(axes), statistics.fmean(float(run["gap"]) for run in runs), means))
    return result


# -- what follows ---------------------------------------------------------------------------------------------


def kendall(values: Sequence[float], gaps: Sequence[float]) -> float:
    """Kendall's τ-b, not a number where one side is constant."""
    return float(scipy.stats.kendalltau(values, gaps).statistic) if len(values) > 1 else math.nan


def families(networks: Sequence[Point], axis: str) -> list[list[Point]]:
    """Sets of networks that differ in one axis alone."""
    found: dict[tuple[tuple[str, str], ...], list[Point]] = {}
    for point in networks:
        others = tuple((name, value) for name, value in point.axes.items() if name != axis)
        found.setdefault(others, []).append(point)
    return [family for family in found.values() if len(family) > 1]


def granulated(networks: Sequence[Point], measure: str) -> dict[str, float]:
    """τ within the families of every axis, averaged; axes without a family are left out."""
    result = {}
    for axis in networks[0].axes if networks else ():
        taus = [kendall([p.measures[measure] for p in f], [p.gap for p in f]) for f in families(networks, axis)]
        taus = [tau for tau in taus if math.isfinite(tau)]
        if taus:
            result[axis] = statistics.fmean(taus)
    return result


def sign_errors(networks: Sequence[Point], measure: str) -> dict[str, float]:
    """Share of the pairs that differ in one axis and that a measure puts in the wrong order; ties count a half."""
    result = {}
    for axis in networks[0].axes if networks else ():
        wrong = []
        for family in families(networks, axis):
            for a, b in itertools.combinations(family, 2):
                agreement = _sign(a.measures[measure] - b.measures[measure]) * _sign(a.gap - b.gap)
                if not math.isnan(agreement):
                    wrong.append((1 - agreement) / 2)
        if wrong:
            result[axis] = statistics.fmean(wrong)
    return result


def _sign(value: float) -> float:
    return math.nan if math.isnan(value) else float((value > 0) - (value < 0))


def table_of(populations: Mapping[str, Sequence[Point]]) -> list[dict[str, Any]]:
    """A line for every measure in every population."""
    lines = []
    for title, networks in populations.items():
        for measure in networks[0].measures if networks else ():
            kept = [p for p in networks if math.isfinite(p.measures[measure])]
            errors, taus = sign_errors(kept, measure), granulated(kept, measure)
            worst = max(errors, key=lambda axis: errors[axis], default="")
            lines.append(
                {
                    "networks": f"{title} ({len(kept)})",
                    "measure": measure,
                    "kendall": kendall([p.measures[measure] for p in kept], [p.gap for p in kept]),
                    "granulated": statistics.fmean(taus.values()) if taus else math.nan,
                    "worst_axis": worst,
                    "worst_sign_error": errors.get(worst, math.nan),
                }
                | {f"tau_{axis}": tau for axis, tau in taus.items()}
            )
    return lines


def free_rows(grid: grids.Grid) -> set[str]:
    """Names of the rows without manifolds."""
    cells = [(row.name, grids.Cell(row, "final", (), grid.seeds[0]).settings) for row in grid.rows]
    return {name for name, settings in cells if settings.geometry.manifolds == ("euclidean",)}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measures against gaps. Defaults are in parentheses.")
    parser.add_argument("grid", type=Path, help="YAML file of the grid, without tune")
    parser.add_argument("--output", type=Path, help="folder (runs/NAME OF THE FILE)")
    parser.add_argument("--jobs", type=int, default=2, help="processes (%(default)s)")
    parser.add_argument("--fitted", type=float, default=0.95, help="least training accuracy (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="one epoch, one seed: no result")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Do the runs that are missing, print the table, leave CSV files; return the exit status."""
    settings = parse(arguments)
    output = settings.output or Path("runs") / settings.grid.stem
    console = Console(soft_wrap=True)
    try:
        grid = grids.read(settings.grid)
        if any(row.tune for row in grid.rows):
            raise SettingsError(f"{settings.grid} tunes its rows: every combination is a network here, so drop tune")
    except SettingsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if settings.quick:
        grid = replace(
            grid,
            rows=tuple(replace(row, flags={**row.flags, "epochs": 1}) for row in grid.rows),
            seeds=grid.seeds[:1],
        )
    output.mkdir(parents=True, exist_ok=True)
    cells = grids.missing(grid, {})
    lines = work(cells, output / "networks.csv", settings.jobs, console)
    networks = points(cells, lines, 0.0 if settings.quick else settings.fitted)
    free = free_rows(grid)
    populations = {
        "all": networks,
        "free": [p for p in networks if p.axes["row"] in free],
        "on manifolds": [p for p in networks if p.axes["row"] not in free],
    }
    rows = table_of(populations)
    print(f"{len(networks)} of {len({c.row for c in cells})} configurations fit their training images")
    if not rows:
        return 0
    names = list(dict.fromkeys(name for row in rows for name in row))
    with (output / "measures.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n", restval="")
        writer.writeheader()
        writer.writerows({k: f"{v:.3f}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    table = Table("networks", "measure", "τ", "granulated τ", "worst axis", "wrong there")
    for row in rows:
        figures = [f"{row[name]:+.2f}" for name in ("kendall", "granulated")]
        table.add_row(row["networks"], row["measure"], *figures, row["worst_axis"], f"{row['worst_sign_error']:.0%}")
    console.print(table)
    print(f"Files in {output}: networks.csv, measures.csv")
    return 0


if __name__ == "__main__":
    sys.exit(main())
