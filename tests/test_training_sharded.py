"""Runs whose weights are dealt to processes by FSDP2: the same results, and the same promises about checkpoints."""

from __future__ import annotations

import json
import resource
import shutil
from pathlib import Path

import kill_training
import pytest
import torch
import trainer
from kill_training import RUN, finish, kill_and_resume, start
from trainer import bits, load, run

import fgo_geo

checkpoints, command_line, engine = (trainer.modules[name] for name in ("checkpoints", "command_line", "engine"))
WORLD, FLAGS = kill_training.WAYS["fsdp2"]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A folder with a run that nobody killed, "straight", after others were killed and resumed."""
    folder = tmp_path_factory.mktemp("sharded")
    outcomes = kill_and_resume(folder, 2, WORLD, FLAGS)
    assert all(outcome == "identical" for *_, outcome in outcomes), outcomes
    return folder / "straight"


def results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def test_torchrun_restarts_a_run_whose_worker_dies_and_the_result_is_identical(tmp_path, straight):
    arguments = [*RUN, *FLAGS, "--resume", "--output", str(tmp_path / "run")]
    agent = kill_training.CONTEXT.Process(target=kill_training.elastic, args=(arguments, tmp_path / "log", 13))
    agent.start()
    assert finish([agent]) == [0]
    printed = [(tmp_path / f"log.0.{restart}.log").read_text() for restart in (0, 1)]
    assert "Nothing to resume" in printed[0]
    assert "Resumed after 12 steps, in epoch 2" in printed[1]
    assert bits(load(tmp_path / "run")) == bits(load(straight))


def test_the_network_is_that_of_ddp_and_loads_into_a_whole_one(tmp_path, straight):
    flags = [*RUN, *FLAGS, "--parallel", "ddp", "--output", str(tmp_path / "run")]
    assert finish(start(flags, tmp_path / "log", WORLD)) == [0] * WORLD
    for mine, other in zip(results(straight)["epochs"], results(tmp_path / "run")["epochs"], strict=True):
        assert mine.keys() == other.keys()
        for name in mine.keys() - {"seconds"}:
            assert mine[name] == pytest.approx(other[name], rel=1e-3, abs=1e-6), name
    made = command_line.make({"norm": "batch", "seed": 3, "fraction": 0.1})  # other groups than the run's
    model = engine.build(made).model
    found, expected = (torch.load(folder / "model.pt") for folder in (straight, tmp_path / "run"))
    model.load_state_dict(found)
    plan = fgo_geo.Plan.from_json(json.dumps(results(straight)["plan"]))
    assert fgo_geo.plan_of(model).entries == plan.entries
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4, msg=name)


def flip(name: str):
    def change(folder: Path) -> None:
        path = sorted(folder.glob(name))[-1]
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)

    return change


def cut(folder: Path) -> None:
    path = folder / "__0_0.distcp"
    path.write_bytes(path.read_bytes()[:-1])


DAMAGE = {
    "shard flipped": (flip("*.distcp"), "__1_0.distcp does not agree with its checksum"),
    "shard cut": (cut, "__0_0.distcp does not agree with its checksum"),
    "shard missing": (lambda folder: (folder / "__1_0.distcp").unlink(), "is cut: __1_0.distcp is missing"),
    "metadata flipped": (flip(".metadata"), ".metadata does not agree with its checksum"),
    "rest flipped": (flip("run.pt"), "run.pt does not agree with its checksum"),
    "rest empty": (lambda folder: (folder / "run.pt").write_bytes(b""), "run.pt does not agree with its checksum"),
    "sums flipped": (flip("checksums.json"), "its list of files does not agree with the checksum in its name"),
    "sums missing": (lambda folder: (folder / "checksums.json").unlink(), "its list of files does not agree"),
    "empty": (lambda folder: (shutil.rmtree(folder), folder.mkdir()), "its list of files does not agree"),
    "a file": (lambda folder: (shutil.rmtree(folder), folder.write_text("")), "is empty"),
}


@pytest.mark.parametrize(("damage", "reason"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_takes_its_place(tmp_path, straight, damage, reason):
    folder = tmp_path / "checkpoints"
    shutil.copytree(straight / "checkpoints", folder)
    before, newest = sorted(folder.iterdir())
    damage(newest)
    found = checkpoints.load(folder)
    assert found.path == before
    assert found.state["progress"]["step"] == 16
    assert len(found.damage) == 1
    assert found.damage[0].startswith(f"damaged checkpoint: {newest} is ")
    assert reason in found.damage[0]


class FullDisk:
    """From the first checkpoint after step 5 on, files of this process can have 20,000 bytes."""

    def __call__(self) -> None:
        from training import sharded

        save = sharded.save

        def full(folder, step, rest, parts):
            if step > 5:
                resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
            return save(folder, step, rest, parts)

        sharded.save = full


def test_a_full_disk_ends_all_processes_and_more_of_them_go_on_later(tmp_path):
    """The result is that of one process, which takes a batch whole and in parts."""
    log, output = tmp_path / "log", tmp_path / "full"
    common = [*RUN, "--batch-size", "24", "--method", "pio", "--lr", "0.05", "--clip", "0.5"]
    arguments = [*common, "--accumulate", "2", "--parallel", "fsdp2", "--output", str(output)]
    assert finish(start(arguments, log, 2, {1: FullDisk()})) in ([2, 2], [2, -9], [-9, 2])
    printed = log.with_suffix(".0.log").read_text().splitlines()
    assert printed[-1].startswith(f"error: cannot write {output}/checkpoints/step-00000006.tmp (")
    assert printed[-1].endswith("): the checkpoint before it is kept; make room, then --resume")
    assert not [line for line in printed if "Traceback" in line]
    names = sorted(path.name[:14] for path in (output / "checkpoints").iterdir())
    assert names == ["step-00000000-", "step-00000004-"]
    assert finish(start([*arguments, "--resume"], log, 3)) == [0] * 3
    one, three = run(tmp_path / "one", *common), results(output)
    for mine, other in zip(one["epochs"], three["epochs"], strict=True):
        for name in ("train_loss", "test_loss", "train_accuracy", "largest_tau"):
            assert other[name] == pytest.approx(mine[name], rel=1e-3, abs=1e-6), name
