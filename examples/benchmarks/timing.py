"""What the benchmarks share: fair rounds, their figures, the flags, and how the tables are printed and kept.

*Fair* means: all variants run in one process, once per round, in a new order in every round, and ratios are taken
within a round. What else the machine does then hits all of them alike; medians and quantiles over the rounds show
how much that was.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import math
import os
import platform
import random
import re
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

QUANTILES = ("0.1", "0.5", "0.9")
Times = float | Sequence[float] | np.ndarray
Columns = Mapping[str, Callable[[dict[str, Any]], str]]


# -- measuring ----------------------------------------------------------------------------------------------------


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """The time of a call, to the end of what it started on the device."""
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleaved(
    variants: Mapping[str, Callable[[], Times]], rounds: int, budget: float = float("inf")
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Call all variants once per round, in a new order each time, after one or two calls that warm up.

    Args:
        variants: By name, what measures itself and returns its time, or the times of its parts.
        rounds: Number of rounds.
        budget: Seconds after which a variant sits out the rounds that are left; every one is in the first.

    Returns:
        The times by variant, one row per round, NaN where it sat out; and the reason by variant of those that cannot
        run here.
    """
    left_out: dict[str, str] = {}
    times: dict[str, list[Times]] = {}
    for name, variant in variants.items():  # what is compiled or allocated at the first call
        started = time.perf_counter()
        try:
            variant()
            if time.perf_counter() - started < 1:
                variant()
        except (ImportError, NotImplementedError, RuntimeError) as error:
            left_out[name] = str(error).strip().splitlines()[0]
        else:
            times[name] = []
    spent = dict.fromkeys(times, 0.0)
    for _ in range(rounds):
        for name in random.sample(list(times), len(times)):
            if times[name] and spent[name] > budget:
                times[name].append(np.full_like(times[name][0], np.nan))
                continue
            started = time.perf_counter()
            times[name].append(variants[name]())
            spent[name] += time.perf_counter() - started
    return {name: np.array(done) for name, done in times.items()}, left_out


def quantiles(values: np.ndarray) -> dict[str, float]:
    """Median and two quantiles of the rounds in which a variant took part."""
    return dict(zip(QUANTILES, np.nanquantile(values, [float(q) for q in QUANTILES]).tolist(), strict=True))


def figures(times: Mapping[str, np.ndarray], reference: str) -> dict[str, dict[str, Any]]:
    """By variant: milliseconds, and ratio to the reference of the same round."""
    return {
        name: {
            "milliseconds": quantiles(1e3 * measured),
            "ratio": quantiles(measured / times[reference]),
            "rounds": int(np.count_nonzero(~np.isnan(measured))),
        }
        for name, measured in times.items()
    }


def machine(device: torch.device) -> str:
    """Processor, threads and versions, in one line."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    processor = names[0] if names else platform.processor() or platform.machine()
    accelerator = f", {torch.cuda.get_device_name(device)}" if device.type == "cuda" else ""
    return (
        f"{processor}, {os.cpu_count()} cores{accelerator}; threads: {torch.get_num_threads()}; {platform.system()}, "
        f"Python {platform.python_version()}, torch {torch.__version__}, geoopt {version('geoopt')}"
    )


# -- flags --------------------------------------------------------------------------------------------------------


def argument_parser(description: str, rounds: int) -> argparse.ArgumentParser:
    """A parser with the flags that all benchmarks have.

    Args:
        description: The script's docstring; its first line is shown.
        rounds: Default number of rounds.
    """
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    add = parser.add_argument_group("all benchmarks").add_argument
    add("--rounds", type=_positive, help=f"rounds, every variant once in each ({rounds}; quick: 2)")
    add("--budget", type=float, default=20.0, help="seconds after which a slow variant sits out (%(default)s)")
    add("--rows", nargs="+", metavar="GLOB", help="only the rows with these names, and the reference")
    add("--without", nargs="+", metavar="GLOB", default=[], help="not the rows with these names")
    add("--threads", type=_positive, default=torch.get_num_threads(), help="of the CPU (%(default)s)")
    add("--device", type=torch.device, default=torch.device("cpu"), help="where to run (%(default)s)")
    add("--seed", type=int, default=0, help="of weights, gradients and the order in a round (%(default)s)")
    add("--quick", action="store_true", help="tiny sizes and two rounds, to see that it runs")
    add("--json", type=Path, metavar="FILE", help="write the figures here, too")
    add("--markdown", action="store_true", help="print Markdown tables")
    parser.set_defaults(default_rounds=rounds)
    return parser


def parse(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the flags, and set threads and seeds."""
    options = parser.parse_args(arguments)
    given = shlex.join(sys.argv[1:] if arguments is None else arguments)
    options.command = re.sub(r"\s*--json[= ]\S+", "", given)  # where the record lies is no part of the measurement
    options.rounds = options.rounds or (2 if options.quick else options.default_rounds)
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    random.seed(options.seed)
    return options


def chosen(names: Sequence[str], options: argparse.Namespace, reference: str) -> list[str]:
    """The names that ``--rows`` and ``--without`` leave, and the reference.

    Raises:
        SystemExit: If a pattern matches nothing.
    """
    wanted = options.rows or ["*"]
    for pattern in (*wanted, *options.without):
        if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            raise SystemExit(f"{pattern!r} matches no row; there are: {'; '.join(names)}")

    def matches(name: str, patterns: Sequence[str]) -> bool:
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)

    return [n for n in names if n == reference or (matches(n, wanted) and not matches(n, options.without))]


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1, got {text}")
    return value


# -- tables -------------------------------------------------------------------------------------------------------


def spread(of: Mapping[str, float]) -> str:
    """Median, and the quantiles in brackets, in three digits or the digits before the point."""
    digits = max(0, min(3, 2 - math.floor(math.log10(of["0.5"])))) if of["0.5"] > 0 else 3
    low, middle, high = (f"{of[q]:.{digits}f}" for q in QUANTILES)
    return f"{middle} ({low} - {high})"


TIMES: Columns = {
    "ms (10 - 90 %)": lambda row: spread(row["milliseconds"]),
    "ratio (10 - 90 %)": lambda row: spread(row["ratio"]),
    "rounds": lambda row: str(row["rounds"]),
}


class Results:
    """The tables of a run: printed, and written to the file after ``--json``, as they come.

    Args:
        benchmark: Name of the script.
        columns: Heading and text of every cell, from a row's figures.
        options: The flags.
        facts: Settings to keep with the figures.
    """

    def __init__(self, benchmark: str, columns: Columns, options: argparse.Namespace, **facts: Any) -> None:
        self._columns = columns
        self._options = options
        self._started = time.perf_counter()
        self._document: dict[str, Any] = {
            "benchmark": benchmark,
            "command": f"python examples/benchmarks/{benchmark}.py {options.command}".rstrip(),
            "machine": machine(options.device),
            "rounds": options.rounds,
            "seed": options.seed,
            **facts,
            "tables": [],
        }
        # A file or a pipe has no width: rich would cut the rows to 80 characters.
        console = Console(highlight=False)
        self._console = console if console.is_terminal else Console(highlight=False, width=160)
        self._say(self._document["machine"])

    def add(self, title: str, rows: list[dict[str, Any]], left_out: Mapping[str, str]) -> None:
        """Print a table and what was left out, and write all tables so far, if asked to."""
        table = {"title": title, "rows": rows, "left_out": dict(left_out)}
        self._document["tables"].append(table)
        if self._options.markdown:
            self._say(f"\n{title}\n\n{markdown(self._columns, rows)}")
        else:
            printed = Table(title=title, title_justify="left", box=SIMPLE)
            for number, heading in enumerate(self._columns):
                printed.add_column(heading, justify="right" if number else "left", no_wrap=True)
            for row in rows:
                printed.add_row(*(cell(row) for cell in self._columns.values()))
            self._console.print(printed)
        for name, reason in left_out.items():
            self._say(f"left out: {name}: {reason}")
        self._document["seconds"] = round(time.perf_counter() - self._started)
        if self._options.json:
            self._options.json.write_text(json.dumps(self._document, indent=1) + "\n", encoding="utf-8")

    def _say(self, text: str) -> None:
        self._console.print(text, markup=False, soft_wrap=True)


def markdown(columns: Columns, rows: Sequence[dict[str, Any]]) -> str:
    """A table in Markdown."""
    lines = [list(columns), ["---"] * len(columns), *([cell(row) for cell in columns.values()] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
