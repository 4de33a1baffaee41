"""Plans and reports print as wide as the terminal; their representations are one line."""

from __future__ import annotations

import math
import sys

import pytest
import torchvision

import fgo_geo
from fgo_geo.weights import words


@pytest.fixture(scope="module")
def printed():
    model = torchvision.models.resnet18(num_classes=10)
    plan = fgo_geo.constrain(model, seed=0)
    return plan, fgo_geo.report(model, n_samples=5000)


@pytest.mark.parametrize("width", [80, 120])
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
