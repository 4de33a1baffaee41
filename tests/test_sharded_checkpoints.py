"""Distributed checkpoints carry the plan, to another number of processes and to models of another seed, or of none."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import groups
import pytest
import sharded_checkpoints
import torch
import torch.distributed.checkpoint as dcp
from sharded_steps import data, loss, residual_net

from fgo_geo import RiemannianFGSGD, constrain, plan_of
from fgo_geo.distributed import TrainingState

ON_FOUR = ["four_go_on_as_two", "four_take_the_values_alone"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def outcomes(folder: Path) -> groups.Outcomes:
    return groups.run("sharded_checkpoints", groups.checks_of(sharded_checkpoints), folder)


@pytest.mark.parametrize("name", groups.checks_of(sharded_checkpoints))
def test_on_two_processes(outcomes: groups.Outcomes, name: str) -> None:
    assert outcomes[name] == ["", ""], "\n".join(outcomes[name])


@pytest.fixture(scope="module")
def of_four(outcomes: groups.Outcomes, folder: Path) -> groups.Outcomes:
    assert outcomes["check_saved_for_four_processes"] == ["", ""]
    return groups.run("sharded_checkpoints", ON_FOUR, folder, world=4)


@pytest.mark.parametrize("name", ON_FOUR)
def test_four_processes_load_what_two_have_saved(of_four: groups.Outcomes, name: str) -> None:
    assert of_four[name] == [""] * 4, "\n".join(of_four[name])


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("is_constrained", [True, False])
def test_one_process_loads_what_two_have_saved(outcomes: groups.Outcomes, folder: Path, is_constrained: bool) -> None:
    assert outcomes["check_saved_for_one_process"] == ["", ""]
    model = residual_net().double()
    optimizer = None
    if is_constrained:
        constrain(model, seed=11)
        optimizer = RiemannianFGSGD(model.named_parameters(), lr=0.05, momentum=0.9, norm="running")
    dcp.load({"app": TrainingState(model, optimizer)}, checkpoint_id=folder / "one", no_dist=True)
    expected = torch.load(folder / "weights.pt", weights_only=True)
    for name, param in model.named_parameters():
        assert torch.equal(param.detach(), expected[name]), name
    if optimizer is not None:
        loss(model, data("residual", 0, 4)).backward()
        optimizer.step()
        for param in plan_of(model).parameters().values():
            assert float(param.manifold.violation(param.detach()).max()) < 1e-12


def test_a_killed_process_and_a_restart_change_nothing(tmp_path: Path) -> None:
    """When one dies, torchrun restarts all of them; they continue from the newest checkpoint, to the identical bits.

    Besides the death that is meant, torch may abort a process by chance while it starts or ends (seen once, "terminate
    called without an active exception", with torch 2.14): that is one more death, after which the same must hold.
    """
    script = Path(__file__).with_name("elastic_training.py")
    options = ("--standalone", "--nproc-per-node", "2", "--max-restarts", "3", "--monitor-interval", "0.1")
    ended = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *options, str(script), str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.returncode == 0, ended.stderr[-4000:]
    assert {f"attempt-{attempt}-{rank}" for attempt in range(2) for rank in range(2)} <= {
        p.name for p in tmp_path.iterdir()
    }
    resumed = torch.load(tmp_path / "resumed.pt", weights_only=True)
    assert resumed["went on from"] in ((4, 6) if (tmp_path / "attempt-2-0").exists() else (4,))
    straight = torch.load(tmp_path / "straight.pt", weights_only=True)
    assert all(torch.equal(a, b) for a, b in zip(resumed["weights"], straight, strict=True))
