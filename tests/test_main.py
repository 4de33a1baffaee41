"""``python -m fgo_geo``: what it prints, and that its checks can fail."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from fgo_geo import ScaledSphere, __main__, __version__
from fgo_geo.optim import fgsgd
from fgo_geo.paths.native.library import instruction_set, library
from fgo_geo.paths.reference import JobBatch
from fgo_geo.paths.router import use_path
from fgo_geo.weights import kinds


def test_the_program_says_how_every_kind_is_stepped_and_passes_its_checks():
    silent = "error,ignore:Implicitly cleaning up:ResourceWarning"  # of a folder that torch 2.6 leaves to Python
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": silent}
    environment.pop("FGO_GEO_PATH", None)
    command = [sys.executable, "-m", "fgo_geo"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    assert done.stdout.startswith(f"fgo_geo {__version__}, torch {torch.__version__}")
    for name in kinds.names():
        assert done.stdout.count(f"    {name} ") == len(__main__.SHAPES)
    assert "No failures in" in done.stdout
    reasons = re.findall(r"(?m)^    \[(\d+)\] (.+)$", done.stdout)
    assert len(reasons) == len(dict(reasons)) == len({reason for _, reason in reasons}) >= 3  # each is said once
    marks = re.findall(r"(?m)^    [\w ]+? batched torch code.* \[([\d, ]+)\]$", done.stdout)
    assert {mark for line in marks for mark in line.split(", ")} == set(dict(reasons))
    assert "FAILED" not in done.stdout


def test_it_says_why_a_path_is_not_taken():
    with use_path("reference"):
        numbers: dict[str, int] = {}
        lines = list(__main__.paths("3x3 kernels", "cpu", numbers))
    assert lines[0] == f"{'sphere':16}batched torch code [1]"
    assert numbers == {"the path 'reference' was chosen": 1}
    stiefel = [line for line in __main__.paths("matrices", "cpu", {}) if line.startswith("stiefel")]
    compiled = library() is not None
    taken = f"compiled products ({instruction_set()})" if compiled else "batched torch code that shares matrix products"
    assert stiefel == [f"{'stiefel':16}{taken}"]


def test_no_line_is_wider_than_the_environment_allows(monkeypatch, capsys):
    monkeypatch.setattr(__main__, "checks", lambda: iter([("a check", ""), ("another one", 30 * "failed ")]))
    printed = {}
    for columns in ("", "80"):
        monkeypatch.setenv("COLUMNS", columns)
        assert __main__.main() == 1
        printed[columns] = capsys.readouterr().out
    assert max(map(len, printed[""].splitlines())) > 120
    assert max(map(len, printed["80"].splitlines())) <= 80
    assert printed["80"].split()[:-4] == printed[""].split()[:-4]  # the time at the end differs


def failing() -> list[str]:
    return [name for name, found in __main__.checks() if found]


def test_a_step_that_leaves_its_manifold_is_noticed(monkeypatch):
    monkeypatch.setattr(ScaledSphere, "projx", lambda self, x: 1.1 * x)
    assert failing()


def test_an_optimiser_that_does_not_move_is_noticed_and_fails_the_program(monkeypatch, capsys):
    monkeypatch.setattr(fgsgd.RiemannianFGSGD, "step", lambda self: None)
    assert __main__.main() == 1
    assert "FAILED  a constrained network learns, saves and resumes: the loss is" in capsys.readouterr().out


def test_an_error_is_a_failure_with_its_text(monkeypatch):
    def broken(self: object) -> None:
        raise RuntimeError("out of order")

    monkeypatch.setattr(fgsgd.RiemannianFGSGD, "step", broken)
    assert dict(__main__.checks())["a constrained network learns, saves and resumes"] == "RuntimeError: out of order"


@pytest.mark.skipif(library() is None, reason="without the compiled library all paths are the reference")
@pytest.mark.parametrize("noun", __main__.SHAPES)
def test_a_path_that_computes_another_step_is_noticed(noun, monkeypatch):
    move = JobBatch.move
    assert __main__._steps("sphere", noun) == ""
    monkeypatch.setattr(JobBatch, "move", lambda self, options, *a, **k: move(self, replace(options, lr=0.2), *a, **k))
    assert re.fullmatch(r"[\d.e-]+ from the reference", __main__._steps("sphere", noun))


def test_the_self_check_shows_no_log_messages(monkeypatch, caplog):
    logger = logging.getLogger("fgo_geo")

    def checks():
        logger.warning("step by the batched torch code")
        yield "a check", ""

    monkeypatch.setattr(__main__, "checks", checks)
    assert __main__.main() == 0
    assert not caplog.records
    logger.warning("after the check")
    assert len(caplog.records) == 1
