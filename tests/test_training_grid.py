"""Grids of runs: all rows are tuned alike, nothing is done twice, and the figures are what they say."""

from __future__ import annotations

import csv
import importlib
import itertools
import json
import math
import statistics

import numpy as np
import pytest
import scipy.stats
import trainer
import yaml
from hypothesis import given
from hypothesis import strategies as st
from trainer import command_line, grid

comparison = importlib.import_module("training.comparison")
program = importlib.import_module("grid")
angles = importlib.import_module("angles")

SPEC = {
    "common": {"fraction": 0.1, "epochs": 1, "batch_size": 16},
    "rows": {"SGD": {"method": "euc"}, "PIO": {"method": "pio"}},
    "tune": {"lr": [0.1, 0.3], "weight_decay": [0, 0.001]},
    "tuning_seeds": [100, 101],
    "seeds": 3,
    "extend": 1,
}


def figures(cell, best_lr=0.3):
    """What a run would give whose accuracy is best at one learning rate."""
    choice = dict(cell.choice)
    accuracy = 0.9 - abs(math.log(choice["lr"] / best_lr)) / 100 - choice["weight_decay"] - cell.seed / 1e5
    return {"test_accuracy": accuracy, "test_loss": 1.0, "calibrated_loss": 0.9, "status": "finished"}


def completed(spec, best_lr):
    """Records of a whole grid, and the cells in the order in which they were asked for."""
    records, asked = {}, []
    while cells := grid.missing(spec, records):
        for cell in cells:
            assert cell.key not in records
            records[cell.key] = grid.record(cell, figures(cell, best_lr))
            asked.append(cell)
    return records, asked


def test_rows_are_tuned_alike_on_validation_images_and_measured_with_fresh_seeds():
    spec = grid.from_dict(SPEC)
    records, asked = completed(spec, best_lr=0.1)
    tuning, final = [c for c in asked if c.phase == "tune"], [c for c in asked if c.phase == "final"]
    # 2 x 2 choices with 2 seeds, and one more learning rate below 0.1 with every decay
    assert (len(tuning), len(final)) == (2 * (2 * 2 * 2 + 2 * 2), 2 * 3)
    assert all(c.settings.data.validation for c in tuning)
    assert not any(c.settings.data.validation for c in final)
    assert {c.seed for c in tuning} == {100, 101}
    assert {c.seed for c in final} == {0, 1, 2}
    assert {dict(c.choice)["lr"] for c in tuning} == {0.0333, 0.1, 0.3}
    assert {c.choice for c in final} == {(("lr", 0.1), ("weight_decay", 0.0))}
    assert asked.index(final[0]) > max(asked.index(c) for c in tuning)
    summaries = comparison.summarise(spec, records)
    assert [(s.row.name, s.tuning_runs, s.choice["lr"]) for s in summaries] == [("SGD", 12, 0.1), ("PIO", 12, 0.1)]


def test_a_list_is_extended_as_often_as_asked_and_never_below_zero():
    spec = grid.from_dict({**SPEC, "extend": 2})
    _, asked = completed(spec, best_lr=100.0)
    assert {dict(c.choice)["lr"] for c in asked} == {0.1, 0.3, 0.9, 2.7}
    assert {dict(c.choice)["weight_decay"] for c in asked} == {0.0, 0.001}
    _, asked = completed(grid.from_dict({**SPEC, "tune": {"lr": [0.1, 0.2, 0.4], "weight_decay": [0.0]}}), best_lr=0.2)
    assert {dict(c.choice)["lr"] for c in asked} == {0.1, 0.2, 0.4}


def test_variants_are_compared_within_themselves():
    spec = grid.from_dict({**SPEC, "vary": {"label_noise": [0, 0.4], "norm": ["batch", "none"]}})
    assert len(spec.rows) == 8
    assert spec.rows[-1].variant == "label_noise 0.4, norm none"
    assert grid.Cell(spec.rows[-1], "final", (), 0).settings.data.label_noise == 0.4
    records, _ = completed(spec, best_lr=0.1)
    assert [s.difference is None for s in comparison.summarise(spec, records)] == [True, False] * 4


@given(pairs=st.lists(st.tuples(st.integers(80, 99), st.integers(80, 99)), min_size=2, max_size=9))
def test_differences_are_paired_by_seed(pairs):
    values, others = zip(*pairs, strict=True)
    mean, low, high, p = comparison.paired(values, others)
    differences = np.subtract(values, others)
    assert mean == pytest.approx(differences.mean())
    if differences.std() > 0:
        interval = scipy.stats.ttest_rel(values, others).confidence_interval(0.95)
        assert (low, high) == pytest.approx((interval.low, interval.high))
    # as extreme as observed, over all signs, counted on both sides
    flips = [np.mean(differences * signs) for signs in itertools.product((1, -1), repeat=len(pairs))]
    at_least, at_most = (np.mean([f >= mean - 1e-9 for f in flips]), np.mean([f <= mean + 1e-9 for f in flips]))
    assert p == pytest.approx(min(1, 2 * min(at_least, at_most)))


def test_records_survive_a_line_that_was_being_written(tmp_path):
    spec = grid.from_dict(SPEC)
    first, second = grid.missing(spec, {})[:2]
    records = grid.Records(tmp_path / "runs.csv")
    for cell in (first, second):
        records.add(grid.record(cell, figures(cell)))
    path = tmp_path / "runs.csv"
    path.write_text(path.read_text()[:-30])
    again = grid.Records(path)
    assert list(again.by_key) == [first.key]
    again.add(grid.record(second, figures(second)))
    assert list(grid.Records(path).by_key) == [first.key, second.key]
    assert json.loads(again.by_key[first.key]["flags"])["fraction"] == 0.1


def test_keys_tell_settings_apart_that_change_the_figures_and_no_others():
    row = grid.from_dict(SPEC).rows[1]
    cell = grid.Cell(row, "final", (("lr", 0.1),), 0)
    same = grid.Cell(grid.Row("other name", {**row.flags, "workers": 2, "lr": 0.1}), "final", (), 0)
    assert cell.key == same.key
    others = [grid.Cell(grid.Row("PIO", {**row.flags, "epochs": 2}), "final", (("lr", 0.1),), 0)]
    others += [grid.Cell(row, "final", (("lr", 0.1),), 1), grid.Cell(row, "tune", (("lr", 0.1),), 0)]
    assert len({c.key for c in (cell, *others)}) == 4


def test_a_run_in_a_grid_is_the_run_of_its_command(tmp_path):
    cell = grid.Cell(grid.from_dict(SPEC).rows[1], "final", (("lr", 0.1),), 4)
    figures = grid.train(cell.flags)
    flags = command_line.words_of({k: v for k, v in cell.settings.differing().items() if k != "evaluate_every"})
    results = trainer.run(tmp_path, *flags)
    for name in ("train_loss", "test_loss", "test_accuracy", "calibrated_loss"):
        assert figures[name] == results["final"][name], name


def test_a_run_that_diverges_is_worth_a_guess():
    figures = grid.train({"optimizer": "sgd", "lr": 1e6, "epochs": 5, "fraction": 0.3, "max_bad_steps": 2})
    assert figures["status"] == "diverged"
    assert figures["test_accuracy"] == 0.1
    assert figures["test_loss"] == pytest.approx(math.log(10))


BAD = [
    ({"rows": {}}, "has no rows"),
    ({"rows": {"a": {"lerning": 1}}}, "row 'a': unknown setting 'lerning'"),
    ({"rows": {"a": {}}, "sedes": 3}, "unknown entries ['sedes']"),
    ({"rows": {"a": {}}, "baseline": "b"}, "baseline 'b' is none of the rows ['a']"),
    ({"rows": {"a": {}}, "seeds": [1, 7], "tuning_seeds": [7]}, "seeds [7] are both for tuning and for the result"),
    ({"rows": {"a": {}, "b": {"tune": {"lr": [1, 2]}}}}, "different numbers of choices"),
    ({"rows": {"a": {"optimizer": "sgd", "manifolds": "sphere"}}}, "row 'a': --optimizer sgd would leave"),
]


@pytest.mark.parametrize(("content", "message"), BAD, ids=[message for _, message in BAD])
def test_a_bad_grid_is_refused_with_a_reason(tmp_path, capsys, content, message):
    path = tmp_path / "grid.yaml"
    path.write_text(yaml.safe_dump(content))
    assert program.main([str(path), "--output", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("path", sorted((trainer.EXAMPLES / "grids").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_grid_in_the_repository_can_be_read(path):
    spec = grid.read(path)
    assert len({(row.name, row.variant) for row in spec.rows}) == len(spec.rows) > 1
    assert grid.missing(spec, {})


class Here:
    """An executor that works here, at once."""

    def __init__(self, *_, **__): ...
    def __enter__(self):
        return self

    def __exit__(self, *_): ...
    def shutdown(self, **_): ...

    def submit(self, function, *args):
        future = program.Future()
        future.set_result(function(*args))
        return future


def test_a_grid_is_done_once_and_leaves_tables_and_a_figure(tmp_path, monkeypatch, capsys):
    trained = []

    def train(flags):
        trained.append(flags)
        return {"test_accuracy": 0.5 + flags["seed"] / 1e4 + flags["lr"] / 10, "test_loss": 1.0, "status": "finished"}

    monkeypatch.setattr(program, "ProcessPoolExecutor", Here)
    monkeypatch.setattr(grid, "train", train)
    path, output = tmp_path / "grid.yaml", tmp_path / "out"
    path.write_text(yaml.safe_dump({**SPEC, "extend": 0}))
    assert program.main([str(path), "--output", str(output)]) == 0
    assert len(trained) == 2 * (8 + 3)
    rows = list(csv.DictReader((output / "summary.csv").read_text().splitlines()))
    accuracies = [100 * (0.5 + seed / 1e4 + 0.03) for seed in range(3)]
    assert float(rows[1]["mean_accuracy"]) == pytest.approx(statistics.fmean(accuracies))
    assert float(rows[1]["standard_deviation"]) == pytest.approx(statistics.stdev(accuracies), rel=1e-5)
    assert float(rows[1]["difference"]) == 0
    assert "53.01 ± 0.01" in (output / "summary.md").read_text()
    assert (output / "summary.png").read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()
    assert program.main([str(path), "--output", str(output), "--only", "PIO"]) == 0
    assert len(trained) == 2 * (8 + 3)  # nothing again
    assert program.main([str(path), "--output", str(output), "--only", "torus"]) == 2
    assert "--only 'torus' matches no row" in capsys.readouterr().err


def test_two_processes_do_not_share_the_records(tmp_path, capsys):
    path = tmp_path / "grid.yaml"
    spec = {"common": SPEC["common"], "rows": SPEC["rows"], "tune": {"lr": [0.1]}, "seeds": 1}
    path.write_text(yaml.safe_dump(spec))
    for main in (program.main, angles.main):
        with program.FileLock(tmp_path / ".lock"):
            assert main([str(path), "--output", str(tmp_path)]) == 2
        assert "another process is at work in" in capsys.readouterr().err


def test_angles_are_measured_once_and_a_diverged_run_has_none(tmp_path, monkeypatch, capsys):
    trained = []

    def train(flags):
        trained.append(flags["lr"])
        if flags["lr"] > 0.2:
            return {"status": "diverged", "test_accuracy": 0.1}
        return {"status": "finished", "test_accuracy": 0.7, "angle": 0.123456, "first_angle": 1.0, "last_angle": 0.01}

    monkeypatch.setattr(program, "ProcessPoolExecutor", Here)
    monkeypatch.setattr(angles, "train", train)
    path, file = tmp_path / "grid.yaml", tmp_path / "angles.csv"
    path.write_text(yaml.safe_dump({k: SPEC[k] for k in ("common", "rows")} | {"tune": {"lr": [0.1, 0.3]}, "seeds": 2}))
    for _ in range(2):
        assert angles.main([str(path), "--output", str(tmp_path)]) == 0
        assert sorted(trained) == [0.1] * 4 + [0.3] * 4
    lines = list(csv.DictReader(file.read_text().splitlines()))
    assert all(line["angle"] == ("0.12346" if line["lr"] == "0.1" else "") for line in lines)
    assert (tmp_path / "angles.png").read_bytes().startswith(b"\x89PNG")
    file.write_text(file.read_text()[:-5])  # the last line was being written when the program was killed
    assert angles.main([str(path), "--output", str(tmp_path)]) == 0
    assert len(trained) == 9
    assert [*csv.DictReader(file.read_text().splitlines())] == lines
