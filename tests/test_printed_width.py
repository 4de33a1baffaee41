"""Plans and reports print as wide as the terminal; their representations are one line."""

from __future__ import annotations

import math
import re
import runpy
import sys
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

import fgo_geo
from fgo_geo.weights import words


@pytest.fixture(scope="module")
def printed():
    model = torchvision.models.resnet18(num_classes=10)
    plan = fgo_geo.constrain(model, seed=0)
    return plan, fgo_geo.report(model, n_samples=5000)


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize("is_terminal", [True, False])
@pytest.mark.parametrize("which", [0, 1], ids=["plan", "report"])
def test_no_line_is_wider_than_the_terminal_or_the_environment_allow(printed, monkeypatch, which, is_terminal, width):
    wide = str(printed[which])
    assert max(map(len, wide.splitlines())) > 120
    monkeypatch.setattr(sys.stdout, "isatty", lambda: is_terminal)
    monkeypatch.setenv("COLUMNS", str(width))
    text = str(printed[which])
    assert max(map(len, text.splitlines())) <= width
    assert "layer1.0.conv1" in text
    assert len(text.splitlines()) < 4 * len(wide.splitlines())
    monkeypatch.setenv("COLUMNS", "400")
    assert [line.rstrip() for line in str(printed[which]).splitlines()] == wide.splitlines()


def test_a_narrow_report_leaves_names_of_layers_whole(monkeypatch):
    names = ("enc / conv", "enc / conv2")
    model = nn.Sequential(OrderedDict((name, nn.Conv2d(8, 8, 3)) for name in names))
    fgo_geo.constrain(model, "po", "sphere", first_layer=True)
    report = fgo_geo.report(model, n_samples=100)
    for columns in (60, 100, 300):
        monkeypatch.setenv("COLUMNS", str(columns))
        assert all(f"{name}.weight" in str(report) for name in names)


@pytest.mark.parametrize(
    ("width", "shown", "hidden"),
    [
        (60, "layer ‖·‖2 worst off by", "on, shape, medians, ‖W‖2, feasible, groups, ‖·‖F worst, ‖·‖2→1 worst"),
        (100, "layer groups ‖·‖F worst ‖·‖2 worst ‖·‖2→1 worst off by", "on, shape, medians, ‖W‖2, feasible"),
        (170, None, "on"),
    ],
)
def test_a_narrow_report_names_the_columns_that_it_hides_and_cuts_no_cell(printed, monkeypatch, width, shown, hidden):
    _, report = printed
    monkeypatch.setenv("COLUMNS", str(width))
    text = str(report)
    said = " ".join(text.split())
    assert shown is None or said.startswith(shown + " ")
    assert f"Hidden at {width} characters: {hidden}. Set the environment variable COLUMNS=" in said
    assert "layer4.1.conv2.weight" in text
    assert "…" not in text
    needed = said.partition("COLUMNS=")[2].partition(" ")[0]
    for columns, is_hidden in ((needed, False), (str(int(needed) - 1), True)):
        monkeypatch.setenv("COLUMNS", columns)
        assert ("Hidden" in str(report)) is is_hidden


@pytest.mark.parametrize("width", [60, 80, 200])
def test_two_reports_side_by_side_cut_no_cell_either(printed, monkeypatch, width):
    _, report = printed
    monkeypatch.setenv("COLUMNS", str(width))
    text = report.compare(report)
    assert max(map(len, text.splitlines())) <= width
    assert "layer4.1.conv2.weight" in text
    assert "…" not in text
    assert ("Hidden at" in text) is (width < 200)


def test_the_summary_of_channel_directed_gradients_is_as_wide(monkeypatch):
    model = torchvision.models.vgg11(num_classes=10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = fgo_geo.channel_directed(optimizer, "h1", 2.0, module=model)
    wide = handle.summary()
    monkeypatch.setenv("COLUMNS", "80")
    assert max(map(len, wide.splitlines())) > 80 >= max(map(len, handle.summary().splitlines()))
    assert handle.summary().split() == wide.split()


def test_a_line_represents_them(printed):
    plan, report = printed
    assert repr(plan) == "<Plan of ResNet: 19 of 62 parameters constrained>"
    assert repr(fgo_geo.Plan.from_json(plan.to_json())) == "<Plan of no model: 19 of 62 parameters constrained>"
    assert repr(report) == "<Report of 21 layers, feasible; 6 measures>"


def test_without_a_terminal_lines_are_as_wide_as_it_takes(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    for columns in ("", "0", "-80", "wide"):
        monkeypatch.setenv("COLUMNS", columns)
        assert words.line_width() == math.inf


EXAMPLES = Path(__file__).parents[1] / "examples"
PROGRAMS = [
    path
    for path in EXAMPLES.rglob("*.py")
    if "__main__" in (text := path.read_text("utf-8"))
    and re.search(r"argument_?parser\(|command_line\.parse", text, re.I)
]


@pytest.mark.parametrize("program", sorted(PROGRAMS), ids=lambda path: path.stem)
def test_the_help_of_programs_fits_80_columns(program, monkeypatch, capsys):
    if program.parent.name == "libraries":
        pytest.importorskip(program.stem.removeprefix("train_").replace("huggingface", "transformers"))
    monkeypatch.syspath_prepend(str(program.parent))
    monkeypatch.setattr(sys, "argv", [program.name, "--help"])
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        runpy.run_path(str(program), run_name="__main__")
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80
