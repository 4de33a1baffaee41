"""Rounding does not add up in many steps: the runs of ``examples/drift.py``, shorter."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import drift

OURS = [run for run in drift.runs() if run.ours]


@pytest.mark.parametrize("lr", [drift.SMALL_RATE, 1.0, 100.0])
@pytest.mark.parametrize("run", OURS, ids=lambda run: f"{run.panel}-{run.label}")
def test_violation_stays_at_rounding(run: drift.Run, lr: float) -> None:
    """Of half-precision weights, that of the copy that is stepped."""
    curve, loss = drift.descend(run, lr, 150)
    assert [step for step, _ in curve] == [1, 2, 4, 8, 16, 32, 64, 128, 150]
    assert max(violation for _, violation in curve) <= 2e-6
    if lr == 1:
        assert loss < 0.5


def test_a_weight_that_leaves_its_manifold_is_seen() -> None:
    """Geoopt's momentum starts with a gradient that is not tangent, along which its exponential map leads away."""
    run = next(run for run in drift.runs() if run.label == "SphereExact")
    curve, _ = drift.descend(run, 1.0, 10)
    assert max(violation for _, violation in curve) > 1e-2


def test_the_largest_rate_still_brings_the_loss_down(monkeypatch: pytest.MonkeyPatch) -> None:
    gains = {100.0: float("nan"), 30.0: 0.3, 10.0: 0.6, 3.0: 0.9, 1.0: 1.0, 0.3: 0.9, 0.1: 0.2}
    monkeypatch.setattr(drift, "descend", lambda run, lr, steps: ([], 1 - gains[lr]))
    assert drift.largest_rate(OURS[0]) == 10.0


def test_the_script_goes_on_where_it_was_and_writes_its_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data, figure = tmp_path / "drift.csv", tmp_path / "drift.png"
    made: list[tuple[str, float]] = []
    original = drift.descend

    def record(run: drift.Run, lr: float, steps: int, seed: int = 0) -> tuple[drift.Curve, float]:
        made.append((run.label, lr))
        return original(run, lr, steps, seed)

    monkeypatch.setattr(drift, "descend", record)
    monkeypatch.setattr(drift, "largest_rate", lambda run: 3.0)
    monkeypatch.setattr(sys, "argv", ["drift.py", "--steps", "8", "--data", str(data), "--figure", str(figure)])
    threads = torch.get_num_threads()
    for runs in (OURS[:1], OURS[:2]):
        monkeypatch.setattr(drift, "runs", lambda runs=runs: runs)
        drift.main()
    torch.set_num_threads(threads)
    assert made == [("sphere", 3.0), ("sphere", 0.01), ("oblique", 3.0), ("oblique", 0.01)]
    assert len(drift.read(data)) == 4 * 4
    assert figure.stat().st_size > 1000
    assert capsys.readouterr().out.count("sphere") == 4
