"""The paper's Table 3: rows x models x seeds on ImageNet, beside the paper's figures.

    python examples/table3.py --data-dir imagenet --devices 0 1 2 3          # a process on each of four GPUs
    python examples/table3.py --data-dir imagenet --nproc 8 --rows euc pio   # torchrun, one run after the other
    python examples/table3.py --data cifar10 --models rcd110 --epochs 164 --devices 0 0    # two at once on one GPU
    python examples/table3.py --list              # the command of every run
    python examples/table3.py --dry-run           # every row and model, one step, tiny images

Every run is one of ``train.py`` in a folder of its own, with checkpoints; the same command continues after any
interruption. The table has mean and standard deviation over the seeds, and paired differences to the baseline with
95 % intervals; the figures of the paper, and of torchvision's own weights, stand beside it.
"""

from __future__ import annotations

import argparse
import os
import queue
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import numpy as np
import yaml
from filelock import FileLock, Timeout
from PIL import Image
from rich.console import Console
from rich.table import Table
from training import comparison
from training import grid as grids
from training.command_line import words_of
from training.flag_types import one_of
from training.folder import RunFolder
from training.methods import METHODS
from training.settings import MODELS, SettingsError

# Errors in % on ImageNet, mean and standard deviation, as the paper prints them.
PAPER = {
    "resnet50": {
        "euc": (24.73, 0.32),
        "st": (23.77, 0.27),
        "poms-st": (23.61, 0.22),
        "pio": (23.04, 0.10),
        "pio-euc": (22.89, 0.08),
    },
    "seresnet50": {
        "euc": (23.31, 0.55),
        "st": (23.09, 0.41),
        "poms-st": (22.97, 0.29),
        "pio": (22.67, 0.15),
        "pio-euc": (22.53, 0.11),
    },
    "resnet101": {"euc": (23.15, 0.09), "pio": (22.83, 0.06), "pio-euc": (22.75, 0.02)},
    "seresnet101": {"euc": (22.38, 0.30), "pio": (21.93, 0.12), "pio-euc": (21.76, 0.09)},
}
# torchvision's IMAGENET1K_V1 weights: plain SGD, by others, at no cost of tuning to us.
TORCHVISION = {"resnet50": 23.87, "resnet101": 22.63}
# torchvision's recipe for its V1 weights.
RECIPE = {
    "epochs": 90,
    "batch_size": 256,
    "lr": 0.1,
    "weight_decay": 1e-4,
    "schedule": "step",
    "channels_last": True,
    "amp": "bf16",
}


def make_grid(settings: argparse.Namespace) -> grids.Grid:
    """The grid of runs that the command line asks for."""
    flags = {**RECIPE, "data": settings.data, "workers": settings.workers, "evaluate_every": 1}
    for name in ("data_dir", "epochs", "batch_size", "lr", "image_size"):
        if (value := getattr(settings, name)) is not None:
            flags[name] = value
    for words in settings.set or []:
        name, _, value = words.partition("=")
        flags |= {name: yaml.safe_load(value)}
    rows = tuple(
        grids.Row(METHODS[row].title, {**flags, "model": model, "method": row}, model)
        for model in settings.models
        for row in settings.rows or [*PAPER.get(model, METHODS)]
    )
    return grids.Grid(rows, (), tuple(range(settings.seeds)), 0, METHODS["euc"].title)


def folder_of(output: Path, cell: grids.Cell) -> Path:
    """Where a run is."""
    return output / f"{cell.row.flags['model']}-{cell.row.flags['method']}-seed{cell.seed}"


def command_of(output: Path, cell: grids.Cell, nproc: int) -> list[str]:
    """The command of a run, which continues it if it has begun."""
    flags = {k: v for k, v in cell.row.flags.items() if k not in ("method", "model")}
    first = {"model": cell.row.flags["model"], "method": cell.row.flags["method"], "seed": cell.seed}
    launcher = [sys.executable]
    if nproc > 1:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(nproc)]
    words = [str(Path(__file__).with_name("train.py")), *words_of({**first, **flags})]
    return [*launcher, *words, "--resume", "--output", str(folder_of(output, cell))]


def results(
    output: Path, cells: Sequence[grids.Cell], devices: Sequence[str], nproc: int
) -> Iterator[tuple[grids.Cell, grids.Record]]:
    """Do the runs, one at a time on each device; yield figures as they come."""
    free: queue.SimpleQueue[str] = queue.SimpleQueue()
    for device in devices:
        free.put(device)

    def train(cell: grids.Cell) -> grids.Record:
        folder = folder_of(output, cell)
        folder.mkdir(parents=True, exist_ok=True)
        device = free.get()
        visible = {} if device == "all" else {"CUDA_VISIBLE_DEVICES": device}
        try:
            with (folder / "log.txt").open("a") as log:
                code = subprocess.call(
                    command_of(output, cell, nproc), stdout=log, stderr=log, env=os.environ | visible
                )
        finally:
            free.put(device)
        finished = RunFolder(folder).finished()
        if finished is None and code != 3:  # 3: it diverged, which is a result
            raise SettingsError(f"the run in {folder} ended with status {code}: log.txt there says why")
        return grids.figures_of(finished, cell.settings)

    with ThreadPoolExecutor(len(devices)) as pool:
        running = {pool.submit(train, cell): cell for cell in cells}
        try:
            for future in as_completed(running):
                yield running[future], future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def write_tiny_images(root: Path) -> None:
    """ImageNet's layout in small: two classes of two images, 64 x 64 pixels."""
    generator = np.random.default_rng(0)
    for part in ("train", "val"):
        for label in ("n01440764", "n01443537"):
            for number in range(2):
                path = root / part / label / f"{label}_{number}.JPEG"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(generator.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path, "JPEG")


def dry_run(settings: argparse.Namespace, console: Console) -> int:
    """Take one step with every row and model; return the exit status."""
    with tempfile.TemporaryDirectory() as folder:
        write_tiny_images(Path(folder))
        small = {"data": "imagefolder", "data_dir": Path(folder), "image_size": 64, "epochs": 1, "batch_size": 4}
        grid = make_grid(argparse.Namespace(**{**vars(settings), **small, "workers": 0, "seeds": 1}))
        bad = 0
        for row in grid.rows:
            flags = {**row.flags, "seed": 0, "amp": "off", "channels_last": False, "device": "cpu"}
            figures = grids.train(flags)
            bad += figures["status"] != "finished"
            console.print(f"{row.variant:12} {row.name:36} {figures['status']}", highlight=False)
        console.print(f"{len(grid.rows)} rows and models, {bad} failed")
    return 1 if bad else 0


def table(summaries: Sequence[comparison.Summary]) -> Table:
    """Errors in %, beside those of the paper."""
    shown = Table("model", "row", "error, %", "difference [95 %]", "paper", title="Top-1 errors on held-out images")
    for model in dict.fromkeys(s.row.variant for s in summaries):
        for s in (s for s in summaries if s.row.variant == model):
            difference = "-"
            if s.difference:
                mean, low, high, _ = s.difference
                difference = f"{-mean:+.2f} [{-high:+.2f}, {-low:+.2f}]"
            paper = PAPER.get(model, {}).get(s.row.flags["method"])
            quoted = f"{paper[0]:.2f} ± {paper[1]:.2f}" if paper else "-"
            shown.add_row(model, s.row.name, f"{100 - s.mean:.2f} ± {s.deviation:.2f}", difference, quoted)
        if model in TORCHVISION:
            shown.add_row(model, "torchvision's V1 weights", f"{TORCHVISION[model]:.2f}", "", "", end_section=True)
    return shown


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="The paper's Table 3. Defaults are in parentheses.",
        epilog="The recipe is torchvision's for its V1 weights; --set changes any flag of train.py.",
    )

    def names(known: Sequence[str]):
        def parse(text: str) -> str:
            try:
                return one_of(known)(text)
            except ValueError as error:
                raise argparse.ArgumentTypeError(str(error)) from None

        return parse

    add = parser.add_argument
    add("--rows", nargs="+", type=names(list(METHODS)), metavar="ROW", help=f"of {' '.join(METHODS)} (the paper's)")
    add("--models", nargs="+", type=names(MODELS), default=list(PAPER), metavar="MODEL", help="(%(default)s)")
    add("--seeds", type=int, default=5, help="runs of each row and model (%(default)s)")
    add("--data", default="imagefolder", help="data of train.py (%(default)s)")
    add("--data-dir", help="where they are")
    add("--image-size", type=int, help="of train.py")
    add("--epochs", type=int, help="of train.py (90)")
    add("--batch-size", type=int, help="of train.py (256)")
    add("--lr", type=float, help="of train.py (0.1)")
    add("--set", nargs="+", metavar="FLAG=VALUE", help="other flags of train.py, e.g. label_smoothing=0.1 amp=off")
    add("--workers", type=int, default=8, help="processes that load images, for each run (%(default)s)")
    add("--devices", nargs="+", default=["all"], help="GPUs, one run at a time on each; 0 0: two on one (%(default)s)")
    add("--nproc", type=int, default=1, help="processes of each run, by torchrun (%(default)s)")
    add("--output", type=Path, default=Path("runs/table3"), help="folder (%(default)s)")
    add("--list", action="store_true", help="print the command of every run that is missing")
    add("--dry-run", action="store_true", help="one step with every row and model, on tiny images")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Do the runs that the command line asks for, and print the table; return the exit status."""
    settings = parse(arguments)
    console = Console(soft_wrap=True)
    if settings.dry_run:
        return dry_run(settings, console)
    output = settings.output
    try:
        grid = make_grid(settings)
        records = grids.Records(output / "runs.csv")
        cells = grids.missing(grid, records.by_key)
        if settings.list:
            for cell in cells:
                print(shlex.join(command_of(output, cell, settings.nproc)))
            return 0
        output.mkdir(parents=True, exist_ok=True)
        with FileLock(output / ".lock", blocking=False):
            for cell, figures in results(output, cells, settings.devices, settings.nproc):
                records.add(grids.record(cell, figures))
                error = 100 - 100 * figures["test_accuracy"]
                console.print(f"{cell.row.variant}, {cell.row.name}, seed {cell.seed}: error {error:.2f} %")
            summaries = comparison.write(output, grid, records, console.print)
    except Timeout:
        print(f"error: another process is at work in {output}: choose another --output", file=sys.stderr)
        return 2
    except SettingsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    Console().print(table(summaries))
    return 0


if __name__ == "__main__":
    sys.exit(main())
