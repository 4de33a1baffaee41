"""Many runs: which ones, what they showed, and what follows from it.

A grid is a YAML file of rows, each a way of training. Every row is tuned on validation images with seeds of its own,
all rows alike, and where the best value lies at an end of its list, the list is extended; then each row's best choice
is trained with fresh seeds, and measured once, on the test images. Which runs are missing is a pure function of the
grid and of the records (:func:`missing`), so a grid that was killed continues where it was.

.. code-block:: yaml

    common: {data: fashion, image_size: 14, fraction: 0.05, epochs: 15}
    rows:                    # flags of train.py; `method` names a row of Table 3
      SGD: {method: euc}
      PIO: {method: pio}
    vary: {label_noise: [0, 0.4]}                       # every row with each; compared within each
    tune: {lr: [0.03, 0.1, 0.3], weight_decay: [0.0005, 0.005]}
    tuning_seeds: [1000, 1001]
    seeds: 10                # or a list
    extend: 2                # how often a list may be extended at an end
    baseline: SGD            # auto: the first row
    curve: lr                # one of `vary`: also draw the final training loss against it
"""

from __future__ import annotations

import csv
import hashlib
import itertools
import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import yaml

from training import engine
from training.command_line import make
from training.settings import MAY_CHANGE_ON_RESUME, Settings, SettingsError

Flags: TypeAlias = dict[str, Any]
Record: TypeAlias = dict[str, Any]

FIGURES = (
    "test_accuracy",
    "test_loss",
    "calibrated_loss",
    "train_accuracy",
    "train_loss",
    "share_tau_above_1",
    "largest_violation",
    "skipped_steps",
    "seconds",
)
COLUMNS = ("key", "row", "variant", "phase", "choice", "seed", "status", *FIGURES, "flags")
DEFAULT_TUNING_SEEDS = (1000, 1001)
_WITHOUT_EFFECT = MAY_CHANGE_ON_RESUME - {"epochs"} | {"evaluate_every", "checkpoint_steps"}


@dataclass(frozen=True)
class Row:
    """One way of training, in one variant."""

    name: str
    flags: Flags = field(hash=False)
    variant: str = ""
    tune: Mapping[str, tuple[float, ...]] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class Grid:
    """What is to be compared."""

    rows: tuple[Row, ...]
    tuning_seeds: tuple[int, ...]
    seeds: tuple[int, ...]
    extend: int
    baseline: str
    curve: str = ""


@dataclass(frozen=True)
class Cell:
    """One run of a grid."""

    row: Row
    phase: str  # "tune" or "final"
    choice: tuple[tuple[str, float], ...]
    seed: int

    @property
    def flags(self) -> Flags:
        """Its settings by name."""
        own = {"seed": self.seed, "validation": self.phase == "tune"}
        return {"evaluate_every": 0, **self.row.flags, **dict(self.choice), **own}

    @property
    def settings(self) -> Settings:
        """Its settings."""
        return make(self.flags)

    @cached_property
    def key(self) -> str:
        """What the record is found by: a checksum of the settings that decide about its figures.

        Settings at their defaults are left out, so that records outlive new settings.
        """
        plain = {k: v for k, v in self.settings.differing().items() if k not in _WITHOUT_EFFECT}
        text = json.dumps(plain, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def read(path: Path) -> Grid:
    """Read a grid from a YAML file.

    Raises:
        SettingsError: If it is none, or one of its rows cannot be run.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise SettingsError(f"cannot read {path}: {error}") from error
    if not isinstance(content, dict) or not content.get("rows"):
        raise SettingsError(f"{path} has no rows: expected at least rows: {{NAME: {{flag: value}}}}")
    known = {"common", "rows", "vary", "tune", "tuning_seeds", "seeds", "extend", "baseline", "curve"}
    if unknown := sorted(content.keys() - known):
        raise SettingsError(f"{path}: unknown entries {unknown}, expected some of {sorted(known)}")
    return from_dict(content)


def from_dict(content: Mapping[str, Any]) -> Grid:
    """A grid from plain data; see the module's page for its entries.

    Raises:
        SettingsError: If a row cannot be run, or the rows are not tuned alike.
    """
    common, tune = content.get("common") or {}, content.get("tune") or {}
    rows = []
    for variant in _products(content.get("vary") or {}):
        name = ", ".join(f"{key} {value}" for key, value in variant)
        for title, flags in content["rows"].items():
            own = {key: value for key, value in (flags or {}).items() if key != "tune"}
            lists = {**tune, **((flags or {}).get("tune") or {})}
            rows.append(
                Row(
                    str(title),
                    {**common, **own, **dict(variant)},
                    name,
                    {key: tuple(sorted(map(float, values))) for key, values in lists.items()},
                )
            )
    if len({math.prod(map(len, row.tune.values())) for row in rows}) > 1:
        raise SettingsError("the rows have different numbers of choices to tune: give all of them equally many")
    seeds = content.get("seeds", 10)
    grid = Grid(
        tuple(rows),
        tuple(content.get("tuning_seeds") or DEFAULT_TUNING_SEEDS),
        tuple(range(seeds) if isinstance(seeds, int) else seeds),
        int(content.get("extend", 0)),
        str(content.get("baseline") or rows[0].name),
        str(content.get("curve") or ""),
    )
    if grid.curve and grid.curve not in (content.get("vary") or {}):
        raise SettingsError(f"curve {grid.curve!r} is none of what is varied: {sorted(content.get('vary') or {})}")
    if grid.baseline not in {row.name for row in rows}:
        raise SettingsError(f"baseline {grid.baseline!r} is none of the rows {[row.name for row in rows]}")
    if shared := set(grid.seeds) & set(grid.tuning_seeds):
        raise SettingsError(f"seeds {sorted(shared)} are both for tuning and for the result: take others")
    for row in rows:
        try:
            make({**row.flags, **{name: values[0] for name, values in row.tune.items()}})
        except SettingsError as error:
            raise SettingsError(f"row {row.name!r}: {error}") from error
    return grid


def _products(lists: Mapping[str, Sequence[Any]]) -> Iterator[tuple[tuple[str, Any], ...]]:
    """All choices of one value for each name."""
    for values in itertools.product(*lists.values()):
        yield tuple(zip(lists, values, strict=True))


# -- which runs are missing -----------------------------------------------------------------------------------


def missing(grid: Grid, records: Mapping[str, Record]) -> list[Cell]:
    """The runs that can be done now and have no record: a row's last runs come when its tuning is complete."""
    return [cell for row in grid.rows for cell in cells_of(grid, row, records) if cell.key not in records]


def cells_of(grid: Grid, row: Row, records: Mapping[str, Record]) -> list[Cell]:
    """All runs of a row that are known to be wanted."""
    tuning = tuning_of(grid, row, records)
    if any(cell.key not in records for cell in tuning):
        return tuning
    choice = chosen(tuning, records)
    return tuning + [Cell(row, "final", choice, seed) for seed in grid.seeds]


def tuning_of(grid: Grid, row: Row, records: Mapping[str, Record]) -> list[Cell]:
    """The tuning runs of a row: those of its lists, and of these extended where the best value lies at an end."""
    if not row.tune:
        return []
    lists = dict(row.tune)
    for _ in range(grid.extend + 1):
        cells = [Cell(row, "tune", choice, s) for choice in _products(lists) for s in grid.tuning_seeds]
        if any(cell.key not in records for cell in cells):
            break
        best = dict(chosen(cells, records))
        longer = {name: _extended(values, best[name]) for name, values in lists.items()}
        if longer == lists or _ == grid.extend:
            break
        lists = longer
    return cells


def _extended(values: tuple[float, ...], best: float) -> tuple[float, ...]:
    """A list with one more value beyond its end, in the same ratio, if the best lies there."""
    if len(values) < 2:
        return values
    if best == values[-1] and values[-2] > 0:
        return (*values, _rounded(best * best / values[-2]))
    if best == values[0] and best > 0:
        return (_rounded(best * best / values[1]), *values)
    return values


def _rounded(value: float) -> float:
    return float(f"{value:.3g}")


def chosen(tuning: Sequence[Cell], records: Mapping[str, Record]) -> tuple[tuple[str, float], ...]:
    """The choice with the best mean accuracy on the validation images, () without tuning."""
    scores: dict[tuple[tuple[str, float], ...], list[float]] = {}
    for cell in tuning:
        scores.setdefault(cell.choice, []).append(float(records[cell.key]["test_accuracy"]))
    return max(scores, key=lambda choice: statistics.fmean(scores[choice]), default=())


# -- runs and records -----------------------------------------------------------------------------------------


def train(flags: Flags) -> Record:
    """Train once, in silence, without files; return its figures. A run that diverges is worth what guessing is."""
    settings = make(flags)
    run = engine.build(settings)
    try:
        engine.fit(run)
        figures = engine.final_figures(run)
        if not settings.data.validation:
            figures["calibrated_loss"] = engine.calibrated(run)
        if math.isfinite(figures["test_loss"]):
            return figures | {"status": "finished"}
    except engine.Diverged:
        pass
    return engine.chance(run.splits.classes) | {"skipped_steps": run.progress.skipped, "status": "diverged"}


def figures_of(results: Mapping[str, Any] | None, settings: Settings) -> Record:
    """The figures in the results of a run in a folder; None for one that has diverged."""
    if results is None:
        return engine.chance(classes_of(settings)) | {"status": "diverged"}
    return results["final"] | {"status": "finished"}


def classes_of(settings: Settings) -> int:
    """Number of classes, as far as it is known without the data."""
    return {"imagefolder": 1000, "cifar100": 100}.get(settings.data.data, 10)


def is_lost(run: Record, classes: int) -> bool:
    """Whether a run has diverged, or ended hardly better than guessing."""
    return run["status"] == "diverged" or float(run["test_accuracy"]) < 1.5 / classes


def record(cell: Cell, figures: Mapping[str, Any]) -> Record:
    """The line of the table for a run."""
    row = {
        "key": cell.key,
        "row": cell.row.name,
        "variant": cell.row.variant,
        "phase": cell.phase,
        "choice": json.dumps(dict(cell.choice)),
        "seed": cell.seed,
        "status": figures["status"],
        "flags": json.dumps(cell.settings.differing(), ensure_ascii=False),
    }
    values = {name: shown(figures.get(name)) for name in FIGURES}
    return {name: {**row, **values}[name] for name in COLUMNS}


def shown(value: Any) -> Any:
    return "" if value is None else float(f"{value:.7g}") if isinstance(value, float) else value


class Records:
    """The table of finished runs, in a file that grows by a line for each."""

    def __init__(self, path: Path, columns: Sequence[str] = COLUMNS) -> None:
        self.path = path
        self.columns = columns
        self.by_key: dict[str, Record] = {}
        if path.exists():
            text = path.read_text(encoding="utf-8")
            whole = text[: text.rfind("\n") + 1]  # a line that was being written when the grid was killed is no record
            self.by_key = {r["key"]: r for r in csv.DictReader(whole.splitlines())}
            if whole != text:
                path.write_text(whole, encoding="utf-8")

    def add(self, new: Record) -> None:
        """Append a record."""
        begin = not self.path.exists()
        with self.path.open("a", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, self.columns, lineterminator="\n")
            if begin:
                writer.writeheader()
            writer.writerow(new)
        self.by_key[new["key"]] = new
