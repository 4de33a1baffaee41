"""Rounding does not add up in many steps: the runs of ``examples/drift.py``, shorter."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import drift

OURS = [run for run in drift.runs() if run.ours]


@pytest.mark.parametrize("lr", [drift.SMALL_RATE, 100.0])
@pytest.mark.parametrize("run", OURS, ids=lambda run: run.label)
def test_violation_stays_at_rounding(run: drift.Run, lr: float) -> None:
    violations, loss = drift.descend(run, lr, 1000)
    bound = 1e-6 if run.dtype == torch.float32 else 2 * torch.finfo(run.dtype).eps
    assert max(violation for _, violation in violations) <= bound
    if run.dtype == torch.float32 or lr > 1:  # smaller steps are lost in the rounding of bfloat16 weights
        assert loss < 0


def test_the_script_writes_its_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(drift, "runs", lambda: OURS[:1])
    monkeypatch.setattr(sys, "argv", ["drift.py", "--steps", "8", "--figure", str(tmp_path / "drift.png")])
    threads = torch.get_num_threads()
    drift.main()
    torch.set_num_threads(threads)
    assert (tmp_path / "drift.png").stat().st_size > 1000
    assert capsys.readouterr().out.count("ScaledSphere, float32") == 2
