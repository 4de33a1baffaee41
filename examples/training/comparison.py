"""What follows from a grid's records: means, paired differences, p-values, tables and figures."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import scipy.stats

from training import curves, reporting
from training.grid import Cell, Grid, Record, Records, Row, cells_of, classes_of, is_lost, shown


@dataclass(frozen=True)
class Summary:
    """A row of the result: accuracies in %, and their difference to the baseline's, seed by seed."""

    row: Row
    choice: dict[str, float]
    tuning_runs: int
    accuracies: tuple[float, ...]
    losses: tuple[float, ...]
    calibrated: tuple[float, ...]
    lost: int
    difference: tuple[float, float, float, float] | None  # mean, low and high end of the interval, p
    validation: float = math.nan  # mean accuracy of the choice on the validation images, in %
    adjusted: float | None = None  # p, adjusted for all comparisons of the variant

    @property
    def mean(self) -> float:
        """Mean accuracy."""
        return statistics.fmean(self.accuracies)

    @property
    def median(self) -> float:
        """Median accuracy, which a lost run hardly changes."""
        return statistics.median(self.accuracies)

    @property
    def deviation(self) -> float:
        """Standard deviation of the accuracies."""
        return statistics.stdev(self.accuracies) if len(self.accuracies) > 1 else math.nan


def summarise(grid: Grid, records: Mapping[str, Record]) -> list[Summary]:
    """Compare the rows that are complete, each with the baseline of its variant."""
    finals: dict[tuple[str, str], tuple[list[Cell], list[Record]]] = {}
    for row in grid.rows:
        cells = cells_of(grid, row, records)
        last = [cell for cell in cells if cell.phase == "final"]
        if last and all(cell.key in records for cell in last):
            finals[row.name, row.variant] = cells, [records[cell.key] for cell in last]
    result = []
    for (name, variant), (cells, runs) in finals.items():
        accuracies = _figures(runs, "test_accuracy", 100)
        base = finals.get((grid.baseline, variant))
        difference = None
        if base is not None and name != grid.baseline:
            difference = paired(accuracies, _figures(base[1], "test_accuracy", 100))
        tuning = [cell for cell in cells if cell.phase == "tune"]
        chosen_runs = [records[cell.key] for cell in tuning if cell.choice == cells[-1].choice]
        result.append(
            Summary(
                cells[-1].row,
                dict(cells[-1].choice),
                len(tuning),
                accuracies,
                _figures(runs, "test_loss"),
                _figures(runs, "calibrated_loss"),
                sum(is_lost(run, classes_of(cells[-1].settings)) for run in runs),
                difference,
                statistics.fmean(_figures(chosen_runs, "test_accuracy", 100)) if chosen_runs else math.nan,
            )
        )
    return _adjusted(result)


def _adjusted(summaries: Sequence[Summary]) -> list[Summary]:
    """The summaries with the p-values of each variant adjusted for one another."""
    result = list(summaries)
    for variant in {s.row.variant for s in summaries}:
        compared = [n for n, s in enumerate(summaries) if s.row.variant == variant and s.difference]
        values = holm([(summaries[n].difference or (math.nan,))[-1] for n in compared])
        for n, value in zip(compared, values, strict=True):
            result[n] = replace(summaries[n], adjusted=value)
    return result


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values: their chance to be below α by luck, in any of the comparisons, is at most α."""
    order = sorted(range(len(p_values)), key=lambda n: p_values[n])
    adjusted, largest = [math.nan] * len(p_values), 0.0
    for rank, n in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p_values[n]))
        adjusted[n] = largest
    return adjusted


def _figures(runs: Sequence[Record], name: str, factor: float = 1.0) -> tuple[float, ...]:
    return tuple(factor * float(run[name]) for run in runs if run[name] not in ("", None))


def paired(values: Sequence[float], others: Sequence[float]) -> tuple[float, float, float, float]:
    """Mean difference of paired values, its 95 % interval (Student), and p of the sign-flip permutation test."""
    differences = [a - b for a, b in zip(values, others, strict=True)]
    mean = statistics.fmean(differences)
    if len(differences) < 2:
        return mean, math.nan, math.nan, math.nan
    half = scipy.stats.t.ppf(0.975, len(differences) - 1) * statistics.stdev(differences) / len(differences) ** 0.5
    test = scipy.stats.permutation_test(
        (differences,),
        statistics.fmean,
        permutation_type="samples",
        vectorized=False,
        n_resamples=5000,
        random_state=0,
    )
    return mean, mean - half, mean + half, float(test.pvalue)


def as_plain(summary: Summary) -> Record:
    """A summary as the line of a table."""
    mean, low, high, p = summary.difference or (None, None, None, None)
    values: dict[str, Any] = {
        "row": summary.row.name,
        "variant": summary.row.variant,
        "chosen": json.dumps(summary.choice),
        "tuning_runs": summary.tuning_runs,
        "validation_accuracy": None if math.isnan(summary.validation) else summary.validation,
        "seeds": len(summary.accuracies),
        "mean_accuracy": summary.mean,
        "standard_deviation": summary.deviation,
        "median_accuracy": summary.median,
        "difference": mean,
        "interval_low": low,
        "interval_high": high,
        "p": p,
        "p_holm": summary.adjusted,
        "mean_test_loss": statistics.fmean(summary.losses),
        "mean_calibrated_loss": statistics.fmean(summary.calibrated) if summary.calibrated else None,
        "lost": summary.lost,
    }
    return {name: shown(value) for name, value in values.items()}


HEADERS = (
    "variant",
    "row",
    "chosen",
    "validation, %",
    "accuracy, %",
    "median",
    "difference, 95 % interval",
    "p (Holm)",
    "loss",
    "calibrated",
    "lost",
)


def cells_for_people(summary: Summary) -> list[str]:
    """A summary as strings, in the order of ``HEADERS``."""
    difference, p = "-", "-"
    if summary.difference:
        mean, low, high, value = summary.difference
        difference, p = f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]", f"{value:.3f} ({summary.adjusted:.3f})"
    calibrated = f"{statistics.fmean(summary.calibrated):.4f}" if summary.calibrated else "-"
    return [
        summary.row.variant,
        summary.row.name,
        ", ".join(f"{name} {value:g}" for name, value in summary.choice.items()) or "-",
        "-" if math.isnan(summary.validation) else f"{summary.validation:.2f}",
        f"{summary.mean:.2f} ± {summary.deviation:.2f}",
        f"{summary.median:.2f}",
        difference,
        p,
        f"{statistics.fmean(summary.losses):.4f}",
        calibrated,
        f"{summary.lost}/{len(summary.accuracies)}",
    ]


def markdown(summaries: Sequence[Summary]) -> str:
    """The summaries as a table in Markdown."""
    rows = [HEADERS, tuple("---" for _ in HEADERS), *map(cells_for_people, summaries)]
    return "".join("| " + " | ".join(row) + " |\n" for row in rows)


def draw(path: Path, summaries: Sequence[Summary]) -> None:
    """Draw every row's accuracies: a dot per seed, and mean with standard deviation."""
    from matplotlib.figure import Figure  # pyright: ignore

    variants = list(dict.fromkeys(s.row.variant for s in summaries))
    largest = max(sum(s.row.variant == variant for s in summaries) for variant in variants)
    figure = Figure(figsize=(5.5, (0.9 + 0.32 * largest) * len(variants)), layout="constrained")
    for axes, variant in zip(figure.subplots(len(variants), 1, squeeze=False)[:, 0], variants, strict=True):
        rows = [s for s in summaries if s.row.variant == variant][::-1]
        for height, s in enumerate(rows):
            axes.plot(s.accuracies, [height] * len(s.accuracies), ".", color="tab:blue", alpha=0.35)
            axes.errorbar(s.mean, height, xerr=s.deviation, fmt="o", color="tab:blue", capsize=3)
        axes.set_yticks(range(len(rows)), [s.row.name for s in rows])
        axes.set(title=variant, xlabel="test accuracy, %")
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def write(folder: Path, grid: Grid, records: Records, progress: Callable[[str], None]) -> list[Summary]:
    """Leave the summaries beside the records: as CSV, in Markdown, and as a figure."""
    summaries = summarise(grid, records.by_key)
    if summaries:
        reporting.write_csv(folder / "summary.csv", [as_plain(s) for s in summaries])
        (folder / "summary.md").write_text(markdown(summaries), encoding="utf-8")
        if grid.curve:
            curves.draw(folder / "curves.png", grid.curve, records.by_key.values())
        else:
            draw(folder / "summary.png", summaries)
        figure = "curves.png" if grid.curve else "summary.png"
        progress(f"Files in {folder}: runs.csv, summary.csv, summary.md, {figure}")
    return summaries
