"""A figure of what becomes of runs over one of their settings: final training loss against the learning rate."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def points(name: str, records: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, dict[float, list[float]]]]:
    """Final training losses by panel, row and value of a setting; infinite where a run has diverged.

    Args:
        name: The setting.
        records: Lines of ``runs.csv``. Variants that differ in this setting alone are one panel.
    """
    found: dict[str, dict[str, dict[float, list[float]]]] = {}
    for record in records:
        parts = [part for part in record["variant"].split(", ") if part.split(" ")[0] != name]
        value = float(json.loads(record["flags"])[name])
        loss = float(record["train_loss"]) if record["status"] == "finished" else math.inf
        row = found.setdefault(", ".join(parts), {}).setdefault(record["row"], {})
        row.setdefault(value, []).append(loss)
    return found


def draw(path: Path, name: str, records: Iterable[Mapping[str, Any]]) -> None:
    """Draw the median final training loss against a setting, a line per row and a panel per variant."""
    from matplotlib.figure import Figure  # pyright: ignore

    panels = points(name, records)
    highest = 1.15 * math.log(10)
    figure = Figure(figsize=(4.2 * len(panels) + 1.8, 3.6), layout="constrained")
    for axes, (title, rows) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for number, (row, losses) in enumerate(rows.items()):
            values = sorted(losses)
            medians = [min(statistics.median(losses[value]), highest) for value in values]
            axes.plot(values, medians, marker="osv^D*PX"[number % 8], markersize=4, label=row)
        axes.axhline(math.log(10), color="0.6", linewidth=0.8, linestyle=":")
        axes.set(xscale="log", title=title, xlabel=name, ylim=(-0.05, highest + 0.1))
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("final training loss (top: diverged)")
    figure.axes[-1].legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, dpi=120)
