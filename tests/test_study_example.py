"""The study example: every arm is a valid run, all are tuned alike, and the figures are what they say."""

from __future__ import annotations

import importlib
import json
import statistics
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
flags, study = map(importlib.import_module, ("flags", "study"))


@pytest.mark.parametrize("arms", study.STUDIES.values(), ids=study.STUDIES)
def test_every_choice_of_every_arm_is_a_valid_run_and_all_arms_are_tuned_alike(arms):
    arms = list(arms())
    assert len({arm.name for arm in arms}) == len(arms)
    assert len({len(arm.choices) for arm in arms}) == 1
    for arm in arms:
        for choice in arm.choices:
            flags.parse([*arm.fixed, *choice, "--validation"])


def test_a_study_tunes_on_validation_images_and_measures_on_test_images(tmp_path, monkeypatch, capsys):
    seen = []

    def fake_run(arguments):
        seen.append(arguments)
        lr, seed = (float(arguments[arguments.index(flag) + 1]) for flag in ("--lr", "--seed"))
        return {"test_accuracy": lr + seed / 1e6, "test_loss": 1.0, "share_tau_above_1": None}

    class Here:
        def __init__(self, *_, **__): ...
        def __enter__(self):
            return self

        def __exit__(self, *_): ...

        map = staticmethod(map)

    monkeypatch.setattr(study, "one_run", fake_run)
    monkeypatch.setattr(study, "ProcessPoolExecutor", Here)
    output = tmp_path / "deep" / "study.json"
    arguments = ["study.py", "strategies", "--only", "PI", "--seeds", "3", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", arguments)
    study.main()
    tuning, final = [a for a in seen if "--validation" in a], [a for a in seen if "--validation" not in a]
    assert (len(tuning), len(final)) == (2 * 4 * 2, 2 * 3)
    tuning_seeds = {a[a.index("--seed") + 1] for a in tuning}
    assert tuning_seeds.isdisjoint(a[a.index("--seed") + 1] for a in final)
    records = json.loads(output.read_text())["arms"]
    assert [r["arm"] for r in records] == ["PI", "PIO"]
    for r in records:
        assert r["chosen"] == "--lr 1.0"
        assert r["accuracies"] == [1.0, 1.000001, 1.000002]
        assert r["standard_deviation"] == pytest.approx(statistics.stdev(r["accuracies"]))
    assert "100.00 ± 0.00" in capsys.readouterr().out


def test_an_unknown_arm_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["study.py", "strategies", "--only", "torus"])
    with pytest.raises(SystemExit):
        study.main()
    assert "--only 'torus' matches no arm" in capsys.readouterr().err


def test_one_run_reports_the_last_epoch(capsys):
    figures = study.one_run(["--epochs", "1", "--strategy", "po", "--device", "cpu"])
    assert 0.2 < figures["test_accuracy"] <= 1
    assert 0 <= figures["share_tau_above_1"] <= 1
    assert capsys.readouterr().out == ""
