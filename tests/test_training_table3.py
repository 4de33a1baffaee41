"""The paper's Table 3: its commands, its dry run, and the table that comes of it."""

from __future__ import annotations

import importlib
import shlex

import pytest
import torch
import trainer
from trainer import command_line, grid

program = importlib.import_module("table3")
SMALL = ["--data", "digits", "--models", "small", "--rows", "euc", "pio", "--seeds", "2", "--epochs", "1"]
SMALL += ["--workers", "0", "--set", "amp=off", "channels_last=False", "fraction=0.2", "norm=batch"]


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_the_dry_run_steps_on_tiny_images_in_imagenets_format(capsys):
    """``.ci/run`` takes all models of the paper; a row of each kind is enough here."""
    assert program.main(["--dry-run", "--models", "resnet18", "vits16", "--rows", "euc", "pio", "pio-renorm"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if line.endswith("finished")]) == 6
    assert lines[-1] == "6 rows and models, 0 failed"


def test_the_dry_run_fails_if_a_row_does(monkeypatch, capsys):
    monkeypatch.setattr(grid, "train", lambda flags: {"status": "diverged"})
    assert program.main(["--dry-run", "--models", "resnet50"]) == 1
    assert "5 rows and models, 5 failed" in capsys.readouterr().out


def test_every_row_of_the_paper_is_one_command(capsys):
    assert program.main(["--list", "--seeds", "1", "--data-dir", "imagenet", "--nproc", "8"]) == 0
    commands = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    assert len(commands) == sum(map(len, program.PAPER.values())) == 16
    for command in commands:
        assert command[1:6] == ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "8"]
        settings = command_line.parse(command[7:])
        assert (settings.optim.epochs, settings.optim.batch_size, settings.optim.weight_decay) == (90, 256, 1e-4)
        assert settings.run.resume
    assert len({command[-1] for command in commands}) == 16


def test_the_grid_trains_and_stands_beside_the_figures_of_the_paper(tmp_path, monkeypatch, capsys):
    calls = []

    def call(command, stdout, stderr, env):
        calls.append(env.get("CUDA_VISIBLE_DEVICES"))
        return trainer.train.main(command[2:])

    monkeypatch.setattr(program.subprocess, "call", call)
    monkeypatch.setitem(program.PAPER, "small", {"euc": (1.5, 0.25)})
    arguments = [*SMALL, "--devices", "3", "--output", str(tmp_path)]
    assert program.main(arguments) == 0
    printed = capsys.readouterr().out
    assert calls == ["3"] * 4
    assert "1.50 ± 0.25" in printed
    assert (tmp_path / "small-pio-seed1" / "results.json").exists()
    assert len((tmp_path / "runs.csv").read_text().splitlines()) == 5
    assert program.main(arguments) == 0
    assert len(calls) == 4  # nothing is done twice


def test_a_run_that_fails_ends_the_grid_with_its_log(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(program.subprocess, "call", lambda *_, **__: 2)
    assert program.main([*SMALL, "--output", str(tmp_path)]) == 2
    assert "ended with status 2: log.txt there says why" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "small-euc-seed0").iterdir()] == ["log.txt"]


def test_a_typo_is_answered_with_the_nearest_name(capsys):
    with pytest.raises(SystemExit):
        program.main(["--rows", "pio-ecu"])
    assert "did you mean pio-euc?" in capsys.readouterr().err
