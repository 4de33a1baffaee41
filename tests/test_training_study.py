"""What the study is computed with: curves over rates, adjusted p-values, rank correlations, convergence."""

from __future__ import annotations

import csv
import importlib
import itertools
import json
import math
import statistics

import pytest
import torch
import trainer
from hypothesis import given
from hypothesis import strategies as st

grid = trainer.grid
comparison = importlib.import_module("training.comparison")
curves = importlib.import_module("training.curves")
convergence = importlib.import_module("convergence")
generalisation = importlib.import_module("generalisation")
angles = importlib.import_module("angles")
GRIDS = sorted((trainer.EXAMPLES / "grids").glob("*.yaml"))


@pytest.mark.parametrize("path", GRIDS, ids=lambda path: path.stem)
def test_every_grid_file_can_be_run(path):
    spec = grid.read(path)
    assert grid.missing(spec, {})


# -- tables ---------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_rejects_what_stepping_down_rejects(values):
    adjusted = comparison.holm(values)
    for alpha in (0.01, 0.05, 0.3, 0.9):
        rejected, order = set(), sorted(range(len(values)), key=lambda n: values[n])
        for rank, n in enumerate(order):  # Holm (1979), as he states it
            if values[n] * (len(values) - rank) > alpha:
                break
            rejected.add(n)
        assert {n for n, p in enumerate(adjusted) if p <= alpha} == rejected


def line(row, variant, lr, loss, status="finished"):
    return {
        "row": row,
        "variant": variant,
        "flags": json.dumps({"lr": lr}),
        "train_loss": str(loss),
        "status": status,
    }


def test_curves_have_a_panel_per_variant_and_a_line_per_row(tmp_path):
    records = [
        line("SGD", "norm none, lr 0.1", 0.1, 1.5),
        line("SGD", "norm none, lr 0.1", 0.1, 0.5),
        line("SGD", "norm none, lr 1.0", 1.0, "", "diverged"),
        line("SGD", "norm batch, lr 0.1", 0.1, 0.25),
        line("St", "norm none, lr 0.1", 0.1, 0.75),
    ]
    assert curves.points("lr", records) == {
        "norm none": {"SGD": {0.1: [1.5, 0.5], 1.0: [math.inf]}, "St": {0.1: [0.75]}},
        "norm batch": {"SGD": {0.1: [0.25]}},
    }
    curves.draw(tmp_path / "curves.png", "lr", records)
    assert (tmp_path / "curves.png").stat().st_size > 1000


def test_a_curve_is_over_something_that_varies():
    with pytest.raises(trainer.settings.SettingsError, match="curve 'lr' is none"):
        grid.from_dict({"rows": {"SGD": {"method": "euc"}}, "vary": {"depth": [2, 4]}, "curve": "lr"})


# -- generalisation -------------------------------------------------------------------------------------------


def networks(measure):
    """Eight networks on three axes whose gap grows with the width, falls with the rate, and ignores the depth."""
    made = []
    for width, rate, depth in itertools.product((0, 1), repeat=3):
        axes = {"width": str(width), "rate": str(rate), "depth": str(depth)}
        gap = 3.0 * width - rate + 0.01 * depth
        made.append(generalisation.Point(axes, gap, {"m": measure(width, rate, depth)}))
    return made


def test_a_measure_that_orders_like_the_gap_is_perfect():
    made = networks(lambda width, rate, depth: math.exp(3 * width - rate + 0.01 * depth))
    assert generalisation.kendall([p.measures["m"] for p in made], [p.gap for p in made]) == pytest.approx(1)
    assert generalisation.granulated(made, "m") == pytest.approx({"width": 1, "rate": 1, "depth": 1})
    assert generalisation.sign_errors(made, "m") == {"width": 0, "rate": 0, "depth": 0}


def test_a_measure_that_follows_one_axis_is_found_out():
    made = networks(lambda width, rate, depth: width + 0.1 * rate)  # right on the width, wrong on the rate
    assert generalisation.kendall([p.measures["m"] for p in made], [p.gap for p in made]) > 0.3
    assert generalisation.granulated(made, "m") == pytest.approx({"width": 1, "rate": -1})  # constant over the depth
    assert generalisation.sign_errors(made, "m") == {"width": 0, "rate": 1, "depth": 0.5}
    rows = generalisation.table_of({"all": made, "free": []})
    assert [(r["worst_axis"], r["worst_sign_error"], r["granulated"]) for r in rows] == [("rate", 1, 0)]


def test_networks_are_trained_measured_and_kept(tmp_path, monkeypatch):
    common = {"epochs": 2, "fraction": 0.1, "width": 4, "model": "plain", "depth": 3, "batch_size": 16}
    rows = {"free": {"method": "euc"}, "Stiefel": {"method": "st"}}
    spec = grid.from_dict({"common": common, "rows": rows, "vary": {"norm": ["none", "batch"]}, "seeds": 1})
    cells, asked = grid.missing(spec, {}), []

    def here(missing, jobs, train):
        for cell in missing:
            asked.append(cell)
            yield cell, train(cell.flags)

    monkeypatch.setattr(generalisation, "results", here)
    quiet = generalisation.Console(quiet=True)
    first = generalisation.work(cells[:2], tmp_path / "networks.csv", 1, quiet)
    lines = generalisation.work(cells, tmp_path / "networks.csv", 1, quiet)
    assert len(asked) == len(cells) == len(lines) == 4
    assert all(lines[key] == first[key] | dict.fromkeys(lines[key].keys() - first[key].keys(), "") for key in first)
    found = generalisation.points(cells, lines, 0.0)
    assert [p.axes for p in found] == [
        {"row": row, "norm": norm} for norm in ("none", "batch") for row in ("free", "Stiefel")
    ]
    assert generalisation.free_rows(spec) == {"free"}
    for point, cell in zip(found, cells, strict=True):
        own = lines[cell.key]
        assert point.gap == pytest.approx(float(own["train_accuracy"]) - float(own["test_accuracy"]), abs=1e-6)
        assert math.isfinite(point.measures["neyshabur2015, layers"])
    assert generalisation.points(cells, lines, 1.01) == []
    diverged = {cell.key: {**lines[cell.key], "status": "diverged"} for cell in cells}
    assert generalisation.points(cells, diverged, 0.0) == []


# -- angles ---------------------------------------------------------------------------------------------------


def test_angles_of_runs_are_those_that_the_optimiser_turns_by_and_every_run_is_done_once(tmp_path, monkeypatch):
    common = {"epochs": 2, "fraction": 0.1, "width": 4, "model": "plain", "depth": 3, "norm": "batch"}
    sphere = {"strategy": "layer", "manifolds": ["sphere"], "components": "block"}
    by_angle = {"method": "euc", "on_manifolds": "angle", "momentum": 0, "schedule": "constant", **sphere}
    spec = grid.from_dict(
        {
            "common": common,
            "rows": {"sphere": by_angle, "free": {"method": "euc"}},
            "tune": {"lr": [0.01, 0.02]},
            "seeds": 1,
        }
    )
    asked = []

    def here(missing, jobs, train):
        for cell in missing:
            asked.append(cell.key)
            yield cell, train(cell.flags)

    monkeypatch.setattr(angles, "results", here)
    cells = angles.cells_of(spec)
    assert angles.work([], tmp_path / "angles.csv", 1) == []  # stopped before its first run
    angles.work(cells[:3], tmp_path / "angles.csv", 1)
    lines = angles.work(cells, tmp_path / "angles.csv", 1)
    assert angles.work(cells[1:2], tmp_path / "angles.csv", 1) == lines[1:2]  # of another grid
    assert asked == [cell.key for cell in cells] == [line["key"] for line in lines]
    for line in lines[:2]:  # a learning rate of one is a radian
        turned = [float(line[name]) for name in ("angle", "first_angle", "last_angle")]
        assert turned == pytest.approx([math.degrees(float(line["lr"]))] * 3, rel=1e-3)
    assert 0 < float(lines[2]["angle"]) < float(lines[3]["angle"])
    angles.draw(tmp_path / "angles.png", lines)
    assert (tmp_path / "angles.png").stat().st_size > 10_000


def test_a_curve_leaves_out_rates_at_which_a_run_was_lost():
    def line(lr, accuracy, angle):
        return {"lr": lr, "test_accuracy": accuracy, "angle": angle}

    runs = [line("0.1", "0.5", "1"), line("0.1", "0.7", "2"), line("1", "0.6", "9"), line("1", "0.1", "")]
    assert angles.curve([line("0.3", "0.4", "8"), *runs]) == ([1.5, 8], [60, 40])


# -- convergence ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n, p in convergence.PROBLEMS.items() if p.determinant != "drawn"])
def test_determinants_are_as_the_problem_says(name):
    problem = convergence.PROBLEMS[name]
    for seed in range(4):
        teacher, student = convergence.teacher_and_student(problem, seed)
        agree = convergence.sign(teacher) * convergence.sign(student)
        assert (agree == (1 if problem.determinant == "same" else -1)).all()
        for weight in (*teacher.parameters(), *student.parameters()):
            assert weight.manifold.violation(weight.detach()).max() < 1e-5


def test_a_slope_is_the_power():
    measured = [{"step": s, "loss": 5 * s**-1.5} for s in range(1, 60)]
    assert convergence.slope(measured, "loss") == pytest.approx(-1.5)
    assert math.isnan(convergence.slope([{"step": 1, "loss": 0.0}], "loss"))


def test_the_norm_is_that_of_the_derivative_along_geodesics():
    problem = convergence.PROBLEMS["cnn-sphere"]
    teacher, student = convergence.teacher_and_student(problem, 0)
    inputs = torch.randn(64, *problem.shape, generator=torch.Generator().manual_seed(0))
    convergence.loss_of(student, teacher, inputs).backward()
    (weight,) = student.parameters()
    direction = weight.manifold.proju(weight.detach(), weight.grad)
    norm = convergence.gradient_norm(student)
    start, losses = weight.detach().clone(), []
    for time in (-1e-2, 1e-2):
        with torch.no_grad():
            weight.copy_(weight.manifold.expmap(start, time * direction / norm))
            losses.append(convergence.loss_of(student, teacher, inputs).item())
    assert (losses[1] - losses[0]) / 2e-2 == pytest.approx(norm, rel=0.05)


def test_students_learn_unless_the_determinant_is_wrong(tmp_path):
    arguments = ["--steps", "400", "--seeds", "1", "--output", str(tmp_path)]
    assert convergence.main([*arguments, "--problems", "deep-linear-oblique", "wrong-determinant"]) == 0
    with (tmp_path / "convergence.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["method"] for row in rows} == set(convergence.METHODS)
    losses = {
        name: statistics.median(float(row["loss"]) for row in rows if row["problem"] == name)
        for name in ("deep-linear-oblique", "wrong-determinant")
    }
    assert losses["deep-linear-oblique"] < 1e-3
    assert losses["wrong-determinant"] > 1.0
    assert (tmp_path / "convergence.png").stat().st_size > 1000


# -- watching -------------------------------------------------------------------------------------------------


def test_watching_shows_the_steps_and_leaves_the_run_as_it_is(tmp_path, capsys):
    flags = {"model": "plain", "depth": 4, "width": 4, "fraction": 0.2, "epochs": 2, "batch_size": 16, "method": "st"}
    words = trainer.command_line.words_of(flags | {"lr": 0.1, "device": "cpu"})
    watch = importlib.import_module("watch")
    assert watch.main([*words, "--until", "25", "--csv", str(tmp_path / "steps.csv")]) == 0
    shown = capsys.readouterr().out
    with (tmp_path / "steps.csv").open(newline="") as file:
        steps = list(csv.DictReader(file))
    assert [int(line["step"]) for line in steps] == list(range(1, 26))
    assert all(float(line["angle"]) > 0 and 0 <= float(line["dead in stem.0"]) <= 1 for line in steps)
    # the same training, without anybody watching
    engine, make = trainer.engine, trainer.command_line.make
    run = engine.build(make(flags | {"lr": 0.1, "device": "cpu"}))
    losses = []
    for epoch in (1, 2):
        run.order.epoch = epoch
        for number, (images, labels) in enumerate(run.batches):
            run.progress.batch = number
            sums, _ = engine.take_step(run, images, labels)
            losses.append(float(sums[0] / sums[2]))
    assert [float(line["loss"]) for line in steps] == pytest.approx(losses[:25], rel=1e-4)
    assert "median angle per step" in shown
    assert max(map(len, shown.splitlines())) <= 80
    assert watch.main([*words, "--until", "5", "--csv", str(tmp_path / "frozen.csv"), "--freeze", "biases"]) == 0
    with (tmp_path / "frozen.csv").open(newline="") as file:
        assert {float(line["biases"]) for line in csv.DictReader(file)} == {0.0}
