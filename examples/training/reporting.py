"""What a run shows and leaves behind: a line per epoch, tables, curves.

On a terminal a progress bar runs under the lines; anywhere else only the lines are printed, without
control codes.
"""

from __future__ import annotations

import csv
import io
import json
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import geoopt
import numpy
import sklearn
import torch
import torchvision
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch.utils.data import DataLoader

import fgo_geo
from training import checkpoints, processes
from training.settings import Settings

Epoch = dict[str, Any]

# Of the table of epochs: title, format, width. Together they fit 80 columns.
COLUMNS = {
    "epoch": ("epoch", "{:d}", 5),
    "lr": ("lr", "{:.4f}", 7),
    "train_loss": ("loss", "{:.4f}", 7),
    "train_accuracy": ("train", "{:.2%}", 7),
    "test_accuracy": ("test", "{:.2%}", 7),
    "largest_violation": ("off by", "{:.0e}", 6),
    "largest_tau": ("max τ", "{:.2f}", 6),
    "share_tau_above_1": ("τ > 1", "{:.1%}", 6),
    "seconds": ("secs", "{:.1f}", 6),
}


class Display:
    """The terminal output of a run; only the first of many processes prints."""

    def __init__(self) -> None:
        self._console = Console(highlight=False, quiet=not processes.is_first())
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
        self._line([title for title, *_ in COLUMNS.values()])

    def epoch(self, epoch: Epoch) -> None:
        """Print the figures of one epoch, a dash for those that do not apply."""
        self._line(["-" if epoch[key] is None else form.format(epoch[key]) for key, (_, form, _) in COLUMNS.items()])

    def _line(self, cells: Sequence[str]) -> None:
        widths = (width for *_, width in COLUMNS.values())
        self.say(" ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True)))

    def progress_bar(self) -> AbstractContextManager[object]:
        """Return a context that shows the bar of ``track`` and removes it when left, as by Ctrl-C."""
        return self._progress if self._console.is_interactive and processes.is_first() else nullcontext()

    def track(self, batches: DataLoader[Any], description: str) -> Iterator[Any]:
        """Yield the batches and count them on the progress bar."""
        task = self._progress.add_task(description, total=len(batches))
        try:
            for batch in batches:
                yield batch
                self._progress.advance(task)
        finally:
            self._progress.remove_task(task)

    def table(self, table: Table) -> None:
        """Print a table."""
        self._console.print(table)


def describe(settings: Settings, plan: fgo_geo.Plan | None, model: torch.nn.Module, images: str) -> str:
    """Say in a few lines what is about to be trained, and how."""
    optim = settings.optim
    numbers = sum(weight.numel() for weight in model.parameters())
    lines = [
        f"Data       {settings.data.data}: {images}",
        f"Network    {settings.model.model}, {numbers:,} numbers",
        *_manifolds(settings, plan, numbers),
        f"Optimiser  {optim.optimizer}, lr {optim.lr:g} ({optim.schedule}), momentum {optim.momentum:g}, "
        f"decay {optim.weight_decay:g}",
    ]
    if optim.channel_directed != "none":
        unit = " (D / 2π)²" if optim.lam_relative else ""
        lines.append(
            f"Gradients  {optim.channel_directed} along {optim.channel_axis} channels (λ = {optim.lam:g}{unit})"
        )
    device, world = settings.run.device, processes.count()
    where = f"{world} processes" if world > 1 else f"{device}, {settings.run.threads} thread(s)"
    return "\n".join([*lines, f"Steps      {optim.epochs} epochs of batches of {optim.batch_size} on {where}"])


def _manifolds(settings: Settings, plan: fgo_geo.Plan | None, numbers: int) -> list[str]:
    geometry = settings.geometry
    kinds = ", ".join(geometry.manifolds or ())
    if geometry.renormalize:
        return [f"Norms      of {geometry.strategy} groups at most {geometry.bound:g}: {kinds}"]
    if plan is None:
        return ["Manifolds  none"]
    params = plan.parameters()
    share = sum(weight.numel() for weight in params.values()) / numbers
    groups = sum(len(c.groups) for entry in plan.constrained for c in entry.collections)
    return [
        f"Manifolds  {kinds}",
        f"           {len(params)} weights ({share:.0%} of the numbers) in {groups:,} {geometry.strategy} groups",
    ]


def versions() -> dict[str, str]:
    """Of what decides about the numbers."""
    packages = (fgo_geo, geoopt, numpy, sklearn, torch, torchvision)
    return {"python": platform.python_version()} | {package.__name__: package.__version__ for package in packages}


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Write a document, all at once."""
    checkpoints.write(path, (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode())


def write_csv(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Write records as a table, all at once; what some of them lack is left empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for record in records for key in record)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    checkpoints.write(path, text.getvalue().encode())


def write_tensorboard(folder: Path, history: Sequence[Epoch]) -> None:
    """Add the figures of epochs as events; those of an earlier, interrupted try at them are hidden."""
    from torch.utils.tensorboard import SummaryWriter  # pyright: ignore - heavy, and only where it is asked for

    with SummaryWriter(str(folder), purge_step=history[0]["epoch"]) as writer:
        for epoch in history:
            for name, value in epoch.items():
                if value is not None and name != "epoch":
                    writer.add_scalar(name, value, epoch["epoch"])


def draw_curves(path: Path, history: Sequence[Epoch]) -> None:
    """Draw the figures of all epochs; panels with nothing to show (no constraint, no τ) are left out."""
    from matplotlib.figure import Figure  # half a second, which runs without pictures save
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    epochs = [e["epoch"] for e in history]
    panels = ["loss", "error"]
    panels += ["violation"] if history[0]["largest_violation"] is not None else []
    panels += ["tau"] if any((e["share_tau_above_1"] or 0) > 0 for e in history) else []
    rows = (len(panels) + 1) // 2
    figure = Figure(figsize=(9, 3.6 * rows), layout="constrained")
    places = figure.subplots(rows, 2, squeeze=False).flatten()
    for unused in places[len(panels) :]:
        unused.remove()
    for axes, panel in zip(places, panels, strict=False):
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)

        def draw(key: str, label: str, factor: float = 1.0, offset: float = 0.0, axes: Any = axes) -> None:
            points = [(e["epoch"], offset + factor * e[key]) for e in history if e[key] is not None]
            axes.plot(*zip(*points, strict=True), ".-", label=label)

        if panel == "loss":
            draw("train_loss", "training")
            draw("test_loss", "held out")
            axes.set(title="Cross-entropy", yscale="log")
            axes.legend()
        elif panel == "error":
            draw("train_accuracy", "training", -1, 1)
            draw("test_accuracy", "held out", -1, 1)
            axes.set(title="Errors")
            axes.set_ylim(bottom=0)
            axes.yaxis.set_major_formatter(PercentFormatter(1))
            axes.legend()
        elif panel == "violation":
            draw("largest_violation", "largest of all weights")
            axes.axhline(torch.finfo(torch.float32).eps, color="grey", ls="--", label="rounding (float32)")
            axes.set(title="Distance from the manifolds (relative)", yscale="log", ylim=(1e-8, 1))
            axes.legend()
        else:
            draw("share_tau_above_1", "groups with τ > 1")
            axes.set(title="Steps that the theorem shortens, by τ")
            axes.set_ylim(bottom=0)
            axes.yaxis.set_major_formatter(PercentFormatter(1))
            other = axes.twinx()
            other.plot(epochs, [e["largest_tau"] for e in history], ".-", color="tab:orange", label="largest τ")
            other.set_ylabel("largest τ")
            other.set_ylim(bottom=1)
            axes.legend(handles=[*axes.lines, *other.lines], loc="upper right")
    figure.savefig(path, dpi=120)
