"""Compare ways of training: tune each alike, train it with many seeds, and say what differs.

    python examples/grid.py examples/grids/strategies.yaml --jobs 2
    python examples/grid.py my-grid.yaml --output runs/my-grid --only PIO
    python examples/grid.py my-grid.yaml --quick    # a look at the machinery, not a result

``training/grid.py`` says what a grid file holds. Finished runs are lines of ``runs.csv`` in the output folder; a grid
that was stopped continues where it was. The figures do not depend on the number of processes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

from filelock import FileLock, Timeout
from rich.console import Console
from rich.table import Table
from training import comparison
from training import grid as grids
from training.settings import SettingsError


def results(
    cells: Sequence[grids.Cell], jobs: int, train: Callable[[grids.Flags], grids.Record] | None = None
) -> Iterator[tuple[grids.Cell, grids.Record]]:
    """Train the cells, several at once in processes with one thread each; yield figures as they come."""
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        running = {
            pool.submit(train or grids.train, {"device": "cpu", **cell.flags, "threads": 1}): cell for cell in cells
        }
        try:
            pending: set[Future[grids.Record]] = set(running)
            while pending:
                done, pending = wait(pending, return_when="FIRST_COMPLETED")
                for future in done:
                    yield running[future], future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def work(grid: grids.Grid, records: grids.Records, jobs: int, console: Console) -> None:
    """Do all runs of a grid that have no record."""
    while cells := grids.missing(grid, records.by_key):
        console.print(f"{len(cells)} runs to do", highlight=False)
        for number, (cell, figures) in enumerate(results(cells, jobs), 1):
            records.add(grids.record(cell, figures))
            choice = ", ".join(f"{name} {value:g}" for name, value in cell.choice)
            console.print(
                f"{number:5}/{len(cells)} {cell.phase:5} {cell.row.name}; {cell.row.variant or '-'}; {choice or '-'}; "
                f"seed {cell.seed}: {100 * figures['test_accuracy']:.2f} % ({figures.get('seconds') or 0:.0f} s) "
                f"{'diverged' if figures['status'] == 'diverged' else ''}",
                highlight=False,
                markup=False,
                soft_wrap=True,
            )


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Compare ways of training, as a YAML file says. Defaults are in parentheses.",
        epilog="training/grid.py, beside this program, says what the file holds.",
    )
    parser.add_argument("grid", type=Path, help="YAML file of the grid")
    parser.add_argument("--output", type=Path, help="folder of the records (runs/NAME OF THE FILE)")
    parser.add_argument("--jobs", type=int, default=2, help="processes (%(default)s)")
    parser.add_argument("--only", help="only the rows whose name contains this, and the baseline")
    parser.add_argument("--baseline", help="row to compare with, in place of the file's")
    parser.add_argument("--quick", action="store_true", help="one epoch, two seeds, two choices: no result")
    parser.add_argument("--list", action="store_true", help="print the runs that are missing, and do none")
    return parser.parse_args(arguments)


def quick(grid: grids.Grid) -> grids.Grid:
    """A grid that is done in a minute."""
    rows = tuple(
        replace(row, flags={**row.flags, "epochs": 1}, tune={name: v[:2] for name, v in row.tune.items()})
        for row in grid.rows
    )
    return replace(grid, rows=rows, seeds=grid.seeds[:2], tuning_seeds=grid.tuning_seeds[:1], extend=0)


def main(arguments: list[str] | None = None) -> int:
    """Do the runs of a grid and print what came of them; return the exit status."""
    settings = parse(arguments)
    output = settings.output or Path("runs") / settings.grid.stem
    try:
        grid = grids.read(settings.grid)
        if settings.baseline:
            if settings.baseline not in {row.name for row in grid.rows}:
                raise SettingsError(f"--baseline {settings.baseline!r} is none of {[r.name for r in grid.rows]}")
            grid = replace(grid, baseline=settings.baseline)
        if settings.only:
            rows = tuple(r for r in grid.rows if settings.only in r.name or r.name == grid.baseline)
            if not any(settings.only in row.name for row in rows):
                raise SettingsError(f"--only {settings.only!r} matches no row of {[r.name for r in grid.rows]}")
            grid = replace(grid, rows=rows)
        if settings.quick:
            grid = quick(grid)
        return alone(output, lambda: compare(grid, output, settings.jobs, settings.list))
    except (SettingsError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
    return 2


def alone(output: Path, work: Callable[[], int]) -> int:
    """Work in a folder in which no other process works; return the exit status."""
    output.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(output / ".lock", blocking=False):
            return work()
    except Timeout:
        print(f"error: another process is at work in {output}: choose another --output", file=sys.stderr)
    except BrokenProcessPool:
        print("error: a run's process was killed (out of memory?): the same command continues", file=sys.stderr)
    return 2


def compare(grid: grids.Grid, output: Path, jobs: int, only_list: bool) -> int:
    """Do what is missing, then print and write the comparison."""
    console = Console(soft_wrap=True)
    records = grids.Records(output / "runs.csv")
    if only_list:
        for cell in grids.missing(grid, records.by_key):
            print(cell.phase, cell.row.name, cell.settings.differing())
        return 0
    try:
        work(grid, records, jobs, console)
    except KeyboardInterrupt:
        print(f"Interrupted; {len(records.by_key)} runs are kept: the same command continues", file=sys.stderr)
        return 130
    summaries = comparison.write(output, grid, records, console.print)
    table = Table(*comparison.HEADERS)
    for summary in summaries:
        table.add_row(*comparison.cells_for_people(summary))
    console.print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
