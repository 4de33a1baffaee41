"""Renew the tables and figures of the pages about speed, from the records in ``docs/benchmarks/``.

    python examples/benchmarks/publish.py --measure                 # every record anew, by its own command; then
    python examples/benchmarks/publish.py --measure "step-*.json"   # some of them
    python examples/benchmarks/publish.py                           # the pages alone

Measure on a machine that does nothing else. A table stands between ``<!-- NAME.json -->`` and ``<!-- end -->``, after
its command and before its machine.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import growth
import timing
from matplotlib import rc_context, rcParams
from matplotlib.figure import Figure

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
sys.path.insert(0, str(DOCS))
from figures import figure_style  # noqa: E402

PAGES = ("benchmarks.md", "fast.md")
PLACE = re.compile(r"(<!-- ([\w-]+\.json) -->\n).*?(<!-- end -->)", re.DOTALL)
COLOURS = {"torch": "tab:blue", "Geoopt": "tab:orange", "fgo_geo": "tab:green", "memory": "tab:gray"}


def tables(record: dict[str, Any]) -> str:
    """Command, tables and machine of a record, in Markdown."""
    columns = importlib.import_module(record["benchmark"]).COLUMNS
    parts: list[str] = []
    for table in record["tables"]:
        parts += [f"**{table['title']}**", timing.markdown(columns, table["rows"])]
        parts += [f"Left out: {name}: {reason}" for name, reason in table["left_out"].items()]
    where = f"*{record['machine']}; seed {record['seed']}.*"
    return "\n\n".join([f"```text\n{record['command']}\n```", *parts, where])


def renew(page: str, records: dict[str, dict[str, Any]]) -> str:
    """The page with the tables of these records; places without a record stay as they are."""

    def table(match: re.Match[str]) -> str:
        opening, name, closing = match.groups()
        return f"{opening}\n{tables(records[name])}\n\n{closing}" if name in records else match.group()

    return PLACE.sub(table, page)


@rc_context()
def draw(path: Path, records: dict[str, dict[str, Any]]) -> None:
    """One panel per table of a step's cost: its ratio to torch's SGD, with quantiles, on a logarithmic axis."""
    figure_style({}, "")
    ink = rcParams["axes.edgecolor"]
    panels = [table for record in records.values() if record["benchmark"] == "step" for table in record["tables"]]
    heights = [len(table["rows"]) + 3 for table in panels]
    figure = Figure(figsize=(9, 0.24 * sum(heights)), layout="constrained")
    all_axes = figure.subplots(len(panels), 1, squeeze=False, sharex=True, height_ratios=heights)[:, 0]
    for axes, table in zip(all_axes, panels, strict=True):
        for position, row in enumerate(table["rows"]):
            low, middle, high = (row["ratio"][q] for q in timing.QUANTILES)
            colour = COLOURS[re.split(r"[ ,]", row["name"])[0]]
            axes.barh(position, middle, xerr=[[middle - low], [high - middle]], color=colour, ecolor=ink)
        axes.set_yticks(range(len(table["rows"])), [row["name"] for row in table["rows"]], fontsize=8)
        axes.set_title(table["title"], fontsize=9, loc="left")
        axes.set_xscale("log")
        axes.axvline(1, color=ink, linewidth=0.8)
        axes.grid(axis="x", alpha=0.3)
        axes.invert_yaxis()
    all_axes[-1].set_xlabel("time of a step, relative to torch SGD (foreach)")
    figure.savefig(path, dpi=110)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder of the pages (docs)")
    parser.add_argument("--measure", nargs="*", metavar="GLOB", help="measure these records first (all)")
    options = parser.parse_args(arguments)
    docs: Path = options.docs
    paths = sorted((docs / "benchmarks").glob("*.json"))
    if options.measure is not None:
        measure([path for path in paths if any(map(path.match, options.measure or ["*"]))])
    records = {path.name: json.loads(path.read_text(encoding="utf-8")) for path in paths}
    for page in (docs / name for name in PAGES if (docs / name).exists()):
        page.write_text(renew(page.read_text(encoding="utf-8"), records), encoding="utf-8")
    if any(record["benchmark"] == "step" for record in records.values()):
        draw(docs / "_static" / "benchmarks.png", records)
    if "growth.json" in records:
        growth.draw(records["growth.json"]["tables"][0]["rows"], docs / "_static" / "growth.png")


def measure(paths: Sequence[Path]) -> None:
    """Run the commands of records again, one after the other; a record stays as it is if its command fails."""
    for path in paths:
        record = json.loads(path.read_text(encoding="utf-8"))
        took = f", which took {record['seconds']} s" if "seconds" in record else ""
        print(f"{path.name}: {record['command']}{took}", flush=True)
        fresh = path.with_suffix(".new")
        program, *words = shlex.split(record["command"])[1:]
        subprocess.run([sys.executable, ROOT / program, *words, "--json", fresh], check=True)
        fresh.replace(path)


if __name__ == "__main__":
    main()
