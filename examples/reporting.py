"""What a run shows and leaves behind: a line per epoch, a results file and the curves.

On a terminal a progress bar runs under the lines; anywhere else only the lines are printed, without
control codes.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import geoopt
import numpy
import sklearn
import torch
import torchvision
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch.utils.data import DataLoader

import fgo_geo

Epoch = dict[str, Any]

COLUMNS = {
    "epoch": ("epoch", "{:d}"),
    "lr": ("lr", "{:.4f}"),
    "train_loss": ("loss", "{:.4f}"),
    "train_accuracy": ("train", "{:.2%}"),
    "test_accuracy": ("test", "{:.2%}"),
    "largest_violation": ("off by", "{:.1e}"),
    "smallest_tau": ("min tau", "{:.3f}"),
    "median_tau": ("med tau", "{:.3f}"),
    "share_tau_above_1": ("tau > 1", "{:.1%}"),
    "seconds": ("secs", "{:.1f}"),
}


class Display:
    """The terminal output of a run."""

    def __init__(self) -> None:
        self._console = Console(highlight=False)
        self._progress = Progress(
            TextColumn("epoch {task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
        )

    def say(self, text: str) -> None:
        """Print a message as it is."""
        self._console.print(text, markup=False, soft_wrap=True)

    def header(self) -> None:
        """Print the titles of the epochs' columns."""
        self._line([title for title, _ in COLUMNS.values()])

    def epoch(self, epoch: Epoch) -> None:
        """Print the figures of one epoch, a dash for those that do not apply."""
        self._line(["-" if epoch[key] is None else form.format(epoch[key]) for key, (_, form) in COLUMNS.items()])

    def _line(self, cells: Sequence[str]) -> None:
        table = Table.grid(padding=(0, 1))
        for _ in cells:
            table.add_column(justify="right", width=7)
        table.add_row(*cells)
        self._console.print(table)

    def progress_bar(self) -> AbstractContextManager[object]:
        """Return a context that shows the bar of ``track`` and removes it when left, as by Ctrl-C."""
        return self._progress if self._console.is_interactive else nullcontext()

    def track(self, batches: DataLoader[Any], description: str) -> Iterator[Any]:
        """Yield the batches and count them on the progress bar."""
        task = self._progress.add_task(description, total=len(batches))
        for batch in batches:
            yield batch
            self._progress.advance(task)
        self._progress.remove_task(task)


def write_results(path: Path, **sections: Any) -> None:
    """Write the given sections and the versions behind them as JSON."""
    packages = (fgo_geo, geoopt, numpy, sklearn, torch, torchvision)
    versions = {"python": platform.python_version()}
    versions |= {package.__name__: package.__version__ for package in packages}
    document = {"versions": versions, **sections}
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def draw_curves(path: Path, history: Sequence[Epoch]) -> None:
    """Draw the figures of all epochs; panels with nothing to show (no constraint) are left out."""
    panels = {
        "cross-entropy": ("train_loss", "test_loss"),
        "accuracy": ("train_accuracy", "test_accuracy"),
        "largest relative constraint violation": ("largest_violation",),
        "step scale tau": ("smallest_tau", "median_tau"),
        "share of steps with tau > 1": ("share_tau_above_1",),
    }
    panels = {title: keys for title, keys in panels.items() if history[0][keys[0]] is not None}
    figure = Figure(figsize=(4 * len(panels), 3.2), layout="constrained")
    for axes, (title, keys) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for key in keys:
            label = key.removesuffix("_tau").split("_")[0]
            axes.plot([e["epoch"] for e in history], [e[key] for e in history], ".-", label=label)
        if len(keys) > 1:
            axes.legend()
        if title != "accuracy" and min(e[key] for e in history for key in keys) > 0:
            axes.set_yscale("log")
        axes.set(title=title, xlabel="epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
