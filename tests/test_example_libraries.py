"""The scripts for Accelerate, Lightning, Hugging Face's Trainer and timm: they train, stay on the manifolds and resume.

Each runs where its library is installed.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from pathlib import Path
from types import ModuleType

import pytest
import torch

import fgo_geo

FOLDER = Path(__file__).parents[1] / "examples" / "libraries"
LIBRARIES = {"accelerate": "accelerate", "lightning": "lightning", "huggingface": "transformers", "timm": "timm"}


@pytest.fixture
def script(request, monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(FOLDER)
    for name in [name for name in sys.modules if name == "quadrants" or name.startswith("train_")]:
        monkeypatch.delitem(sys.modules, name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # these are the library's own
        pytest.importorskip(LIBRARIES[request.param], exc_type=ImportError)
        return importlib.import_module(f"train_{request.param}")


def test_every_script_is_tested():
    assert {path.stem for path in FOLDER.glob("train_*.py")} == {f"train_{name}" for name in LIBRARIES}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("script", LIBRARIES, indirect=True)
def test_a_resumed_run_is_the_run_that_was_not_stopped(script, tmp_path):
    whole, loss = script.train(tmp_path / "whole", epochs=3)
    _, first = script.train(tmp_path / "parts", epochs=1)
    torch.manual_seed(1)
    resumed, again = script.train(tmp_path / "parts", epochs=3)
    assert loss < 0.8 * first, "it does not learn"
    assert again == loss
    for (name, a), b in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a.cpu(), b.cpu()), name
    weights = fgo_geo.plan_of(resumed).parameters()
    assert weights
    assert max(float(w.manifold.violation(w.detach()).max()) for w in weights.values()) < 2e-6
