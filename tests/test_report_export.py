"""What becomes of a report: tables, comparisons, files, pictures, and the examples that make one."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from test_report import NORMS, dense_norm, small_network
from torch import nn

import fgo_geo
from fgo_geo.measures.report import Report, report

matplotlib.use("Agg")


# -- export ----------------------------------------------------------------------------------------


def reports() -> tuple[Report, Report]:
    model = small_network()
    before = report(model, n_samples=50)
    fgo_geo.constrain(model, include="3.weight")
    return before, report(model, n_samples=50)


def test_many_parameters_that_are_not_measured_are_globs():
    model = torch.nn.Sequential(*[torch.nn.Linear(3, 3) for _ in range(30)])
    text = " ".join(str(report(model)).split())
    assert "Not measured: *.bias (30): each has one dimension" in text
    assert "more" not in text


def test_printing_and_comparing():
    before, after = reports()
    text = str(after)
    assert "3.weight" in text
    assert "log measure, N = 50" in text
    assert "(smaller is better)" in text
    assert "0.bias, 3.bias, 7.bias: each has one dimension" in text
    assert "1 of 3 layers under constraints" in text
    layer = after.layer("3.weight")
    (line,) = (line for line in text.splitlines() if line.startswith("  3.weight"))
    for norm in NORMS:
        values = getattr(layer.groups, norm).numpy()
        assert f" {values.max():.3g} / {np.median(values):.3g} " in line
    assert line.split()[-2:] == [f"{layer.violation:.1e}", "yes"]
    assert layer.n_groups > 1
    with torch.no_grad():
        moved = small_network()
        fgo_geo.constrain(moved, include="3.weight")
        moved[3].weight.mul_(1.5)
    off = report(moved).layer("3.weight").violation
    (line,) = (line for line in str(report(moved)).splitlines() if line.startswith("  3.weight"))
    assert line.split()[-2:] == [f"{off:.1e}", "NO"]
    assert off >= 0.5
    side_by_side = before.compare(after, ("plain", "PIO"))
    assert "(smaller is better)" in side_by_side
    (row,) = (line.split() for line in side_by_side.splitlines() if "3.weight" in line)
    assert row[1:3] == ["1", str(after.layer("3.weight").n_groups)]
    assert row[3:5] == [f"{each.layer('3.weight').worst('frobenius'):.3g}" for each in (before, after)]
    assert f"{after.measure('bartlett2017').value:.2f}" in side_by_side
    assert "neyshabur" not in before.compare(report(small_network()))
    with pytest.raises(TypeError, match="compare takes another report, got Sequential: measure it"):
        before.compare(small_network())


def test_comparing_shows_what_is_divided_by_the_margin():
    inputs = torch.tensor([[3.0, 0.0], [0.0, 5.0]])
    model = nn.Sequential(nn.Linear(2, 2, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(2))
    before = report(model, (inputs, torch.tensor([0, 1])), n_samples=10, margin_quantile=0.0)
    with torch.no_grad():
        model[0].weight.mul_(2)
    after = report(model, (inputs, torch.tensor([0, 1])), n_samples=10, margin_quantile=0.0)
    lines = before.compare(after).splitlines()
    rows = [line.split() for line in lines if "by the margin" in line]
    assert len(rows) == len(before.measures) == 6
    for row, mine, theirs in zip(rows, before.measures, after.measures, strict=True):
        assert row[:2] == [mine.name, mine.heading.split()[0]]
        assert row[-2:] == [f"{mine.value - math.log(3):.2f}", f"{theirs.value - math.log(6):.2f}"]
    assert lines[-1] == "Margins: before 3, after 6."
    wrong = report(model, (inputs, torch.tensor([1, 0])), n_samples=10, margin_quantile=0.0)
    unlabelled = report(model, n_samples=10)
    assert "by the margin" not in before.compare(wrong) + before.compare(unlabelled) + unlabelled.compare(before)
    assert before.compare(wrong).endswith("Margins: before 3, after -10.")
    assert "Margins" not in before.compare(unlabelled) + unlabelled.compare(before)


def test_two_reports_are_compared_under_two_names():
    before, after = reports()
    with pytest.raises(
        TypeError, match=r"labels is <Report of .{,40}; expected two .*\. A report is compared with one"
    ):
        before.compare(after, after)
    for labels in ("ab", ("before",), ("a", 1), None, ("a", "b", "c"), {"a": 1, "b": 2}):
        with pytest.raises(TypeError, match=rf"compare: labels is {re.escape(repr(labels))}; expected two words"):
            before.compare(after, labels)
    assert before.compare(after, ["a", "b"]) == before.compare(after, ("a", "b"))
    with pytest.raises(ValueError, match="compare: both labels are 'run'; expected different words"):
        before.compare(after, ("run", "run"))


def test_a_layer_is_found_by_the_name_of_its_module():
    attention = nn.MultiheadAttention(4, 1, kdim=3, vdim=2)
    model = nn.ModuleDict({"features": small_network(), "attention": attention, "head": nn.Linear(4, 2)})
    found = report(model)
    assert found.layer("head") is found.layer("head.weight")
    assert found.layer("features.3") is found.layer("features.3.weight")
    with pytest.raises(KeyError, match=r"'attention' has several weights: ask for one of attention.q_proj_weight"):
        found.layer("attention")
    with pytest.raises(KeyError, match=r"neither a parameter of the model.*the names are features.0.weight"):
        found.layer("features")
    with pytest.raises(KeyError, match=r"'features.3.weigth' is not measured.*the names are features.3.weight"):
        found.layer("features.3.weigth")
    with pytest.raises(KeyError, match=r"'head.bias' is not measured: it has one dimension"):
        found.layer("head.bias")
    with pytest.raises(KeyError, match=r"'features.1' is not measured: its 'features.1.weight' scales or shifts"):
        found.layer("features.1")
    alone = report(nn.Linear(2, 2))
    assert alone.layer("") is alone.layer("weight")
    model["head"].weight = nn.Parameter(torch.ones(4, 4))
    model["tied"] = nn.Linear(4, 4)
    model["tied"].weight = model["head"].weight
    tied = report(model)
    assert tied.layer("tied") is tied.layer("head") is tied.layer("head.weight")


@pytest.mark.parametrize("statistic", ["worst", "median"])
def test_norms_have_three_names(statistic):
    layer = report(nn.Linear(2, 2)).layers[0]
    assert getattr(layer, statistic)("2->1") == getattr(layer, statistic)("two_to_one")
    with pytest.raises(ValueError, match="norm is 'nuclear'; expected one of 'frobenius', 'spectral', 'two_to_one'"):
        getattr(layer, statistic)("nuclear")


def test_export_as_plain_data():
    _, after = reports()
    data = json.loads(after.to_json())
    assert data == after.to_dict()
    row = data["layers"][1]
    assert (row["name"], row["n_groups"]) == ("3.weight", after.layer("3.weight").n_groups)
    assert row["spectral_worst"] == after.layer("3.weight").groups.spectral.max().item()
    assert row["spectral_median"] == np.median(after.layer("3.weight").groups.spectral.numpy())
    assert after.to_json(indent=None) == json.dumps(data)
    with pytest.raises(
        TypeError, match=r"to_json: path is 4; expected a path, or None. Indentation has a name: indent=4"
    ):
        after.to_json(4)
    frame = after.to_dataframe()
    assert list(frame.index) == ["0.weight", "3.weight", "7.weight"]
    assert frame.loc["3.weight", "feasible"]


def test_a_layer_of_zeros_has_measure_zero_and_is_still_json():
    model = nn.Linear(2, 2)
    nn.init.zeros_(model.weight)
    found = report(model, n_samples=5)
    assert found.measure("neyshabur2015").value == -math.inf
    assert json.loads(found.to_json())["measures"][0]["value"] == "-inf"
    figure = found.plot()
    figure.canvas.draw()
    assert [text.get_text() for text in figure.axes[4].texts] == ["-inf"] * 6
    matplotlib.pyplot.close(figure)


def test_plots_show_every_layer():
    for found, panels in ((reports()[1], 5), (report(small_network()), 3)):
        figure = found.plot("title")
        assert len(figure.axes) == panels
        assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["0", "3", "7"]
        figure.canvas.draw()
        matplotlib.pyplot.close(figure)


def test_exports_go_to_files(tmp_path):
    _, found = reports()
    for path in (tmp_path / "a.json", str(tmp_path / "b.json")):
        text = found.to_json(path)
        assert text == found.to_json()
        assert Path(path).read_text(encoding="utf-8") == text + "\n"
    with pytest.raises(IsADirectoryError, match=r"to_json: path is '', which is a folder; .* e.g. 'report.json'"):
        found.to_json("")
    with pytest.raises(IsADirectoryError, match=r"to_json: path is '.*', which is a folder; .*report.json'"):
        found.to_json(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"to_json: path is '.*c.json', and there is no folder .*; create"):
        found.to_json(tmp_path / "none" / "c.json")
    figure = found.plot("title", tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    matplotlib.pyplot.close(figure)
    before = matplotlib.pyplot.get_fignums()
    for title in ("q.png", "q.jpg", "runs/q.PDF", Path("q.svg"), Path("q")):
        with pytest.raises(ValueError, match=r"plot: title is '.*q.*', the name of a file; save the picture with plot"):
            found.plot(title)
    assert matplotlib.pyplot.get_fignums() == before
    figure = found.plot("ResNet-18, v1.0")
    assert figure.get_suptitle() == "ResNet-18, v1.0"
    assert figure.axes[-1].get_title().endswith("(smaller is better)")
    matplotlib.pyplot.close(figure)


@pytest.mark.parametrize(("method", "package"), [("plot", "matplotlib"), ("to_dataframe", "pandas")])
def test_missing_packages_are_named(method, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=f"pip install {package}"):
        getattr(reports()[0], method)()


# -- examples --------------------------------------------------------------------------------------

EXAMPLES = Path(__file__).parents[1] / "examples"


def example(name: str):
    """A program of the examples, under another name: one is called like the function under test."""
    if str(EXAMPLES) not in sys.path:
        sys.path.insert(0, str(EXAMPLES))
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_example_reports_a_network_and_a_checkpoint(tmp_path, capsys):
    program = example("report")
    settings = ["--model", "squeezenet1_1", "--strategy", "layer", "--manifolds", "sphere,", "--fold"]
    assert program.main([*settings, "--output", str(tmp_path / "reports")]) == 0
    assert "plain and renormalised" in capsys.readouterr().out
    for name in ("plain", "constrained", "renormalised"):
        found = json.loads((tmp_path / "reports" / f"{name}.json").read_text())
        assert found["feasible"]
        assert (tmp_path / "reports" / f"{name}.png").stat().st_size > 0
    assert program.main(["--run", str(tmp_path / "missing")]) == 2
    assert "no run with a checkpoint in" in capsys.readouterr().err
    example("train").main(["--epochs", "1", "--norm", "batch", "--output", str(tmp_path / "run")])
    capsys.readouterr()
    assert program.main(["--run", str(tmp_path / "run"), "--fold"]) == 0
    text = capsys.readouterr().out
    assert "before and after" in text
    assert "margin" in text


def test_the_example_compares_the_certified_bound_with_the_exact_norm(capsys):
    program = example("operator_norms")
    layer = nn.Conv2d(2, 2, 3, padding=1, bias=False).double()
    assert program.exact_norm(layer.weight.detach(), 4) == pytest.approx(dense_norm(layer, (2, 4, 4)))
    *bounds, torus = program.ratios(2, 4, seed=0)
    assert bounds == sorted(bounds, reverse=True)
    assert 1 < torus <= bounds[-1] < bounds[0]
    program.main(["--cases", "2x3", "1x4", "--seeds", "2"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.count("±") for line in lines if "x" in line and "±" in line][-2:] == [8, 8]
    for wrong in (["--cases", "3"], ["--cases", "0x3"], ["--seeds", "1"]):
        with pytest.raises(SystemExit):
            program.main(wrong)


def test_table_2_marks_the_entries_that_points_exceed(capsys):
    program = example("table2")
    program.main(["--points", "50", "--sizes", "3x3", "4x2"])
    lines = capsys.readouterr().out.splitlines()
    rows = [line for line in lines if line.strip().startswith("‖w‖")]
    assert len(rows) == 18
    assert all(("exceeded" in row) == ("2→1" in row) for row in rows)
    printed = {tuple(row.split()[:2]): " ".join(row.split()[5:]) for row in rows[:9]}
    assert printed == {
        ("‖w‖F", "sphere"): "1 equal",
        ("‖w‖F", "oblique"): "√B = 1.732 equal",
        ("‖w‖F", "stiefel"): "√B = 1.732 equal",
        ("‖w‖2", "sphere"): "σ its definition",
        ("‖w‖2", "oblique"): "σ its definition",
        ("‖w‖2", "stiefel"): "1 equal",
        ("‖w‖2→1", "sphere"): "1 exceeded",
        ("‖w‖2→1", "oblique"): "B^¼ = 1.316 exceeded",
        ("‖w‖2→1", "stiefel"): "B^¼ = 1.316 exceeded",
    }
    assert any("2→1 = 3; the paper has B^¼ = 1.316" in line for line in lines)
    with pytest.raises(SystemExit):
        program.main(["--sizes", "2x3"])
