"""Runs in processes of their own: killed, on a full disk, and several at once."""

from __future__ import annotations

import resource

import kill_training
import pytest
import torch
import trainer
from kill_training import finish, kill_and_resume, start
from trainer import bits, load

RunFolder = trainer.folder.RunFolder
QUICK = ("--fraction", "0.1", "--batch-size", "16", "--epochs", "2")


@pytest.mark.parametrize(("world", "moments"), [(1, 3), (2, 2)])
def test_a_killed_run_resumes_to_the_identical_bits(tmp_path, world, moments):
    """A few moments; ``python tests/kill_training.py`` takes twenty."""
    outcomes = kill_and_resume(tmp_path, moments, world)
    assert all(outcome == "identical" for *_, outcome in outcomes), outcomes


class FullDisk:
    """From the first checkpoint after step 5 on, files can have 20,000 bytes."""

    def __call__(self) -> None:
        checkpoints = trainer.checkpoints
        save = checkpoints.save

        def full(folder, step, state):
            if step > 5:
                resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
            return save(folder, step, state)

        checkpoints.save = full


def test_a_full_disk_ends_the_run_in_one_line_and_keeps_the_checkpoint_before(tmp_path):
    log, output = tmp_path / "log", tmp_path / "full"
    arguments = [*QUICK, "--checkpoint-steps", "4", "--output", str(output)]
    assert finish(start(arguments, log, prepare={0: FullDisk()})) == [2]
    printed = log.with_suffix(".0.log").read_text().splitlines()
    assert printed[-1].startswith(f"error: cannot write {output}/checkpoints/step-00000008-")
    assert printed[-1].endswith("(File too large): the checkpoint before it is kept; make room, then --resume")
    assert not [line for line in printed if "Traceback" in line]
    assert not list(output.rglob("*.tmp"))
    assert load(output)["progress"]["step"] == 4
    assert finish(start([*arguments, "--resume"], log)) == [0]
    assert finish(start([*arguments[:-1], str(tmp_path / "straight")], log)) == [0]
    assert bits(load(output)) == bits(load(tmp_path / "straight"))


def test_a_full_disk_of_the_first_process_ends_all(tmp_path):
    log, output = tmp_path / "log", tmp_path / "full"
    arguments = [*QUICK, "--checkpoint-steps", "4", "--output", str(output)]
    running = start(arguments, log, 2, prepare={0: FullDisk()})
    for process in running:
        process.join(60)
        process.kill()
    assert [process.exitcode for process in running] == [2, 2]
    printed = [log.with_suffix(f".{rank}.log").read_text() for rank in range(2)]
    assert printed[0].count("error: cannot write") == 1
    assert not [text for text in printed if "Traceback" in text or ("error" in text and text is not printed[0])]
    assert load(output)["progress"]["step"] == 4


@pytest.mark.parametrize(
    ("method", "worlds"),
    [(("--method", "st"), (1, 3)), (("--method", "pio", "--accumulate", "2", "--clip", "0.5"), (1, 2))],
)
def test_many_processes_train_as_one_does(tmp_path, method, worlds):
    """Without normalisation layers a step depends on the batch as a whole, not on how it is shared."""
    common = (*QUICK, *method, "--lr", "0.05")
    for world in worlds:
        assert finish(start([*common, "--output", str(tmp_path / str(world))], tmp_path / "log", world)) == [0] * world
    one, *others = (load(tmp_path / str(world)) for world in worlds)
    for other in others:
        for name, value in one["model"].items():
            torch.testing.assert_close(other["model"][name], value, rtol=1e-3, atol=1e-4, msg=name)
        for mine, theirs in zip(one["progress"]["history"], other["progress"]["history"], strict=True):
            for name in ("train_loss", "test_loss", "train_accuracy"):
                assert theirs[name] == pytest.approx(mine[name], rel=1e-3, abs=1e-6), name
            assert (360 * theirs["test_accuracy"]) % 1 == pytest.approx(0, abs=1e-9)


def test_radii_follow_the_features_of_all_processes_and_survive_a_kill(tmp_path):
    common = ("--method", "pio-scales", "--norm", "batch")
    outcomes = kill_and_resume(tmp_path, 1, 2, common)
    assert [outcome for *_, outcome in outcomes] == ["identical"]
    arguments = [*kill_training.RUN, *common, "--output", str(tmp_path / "one")]
    assert finish(start(arguments, tmp_path / "log")) == [0]
    one, two = (RunFolder(tmp_path / name).finished() for name in ("one", "straight"))
    for mine, other in zip(one["plan"]["entries"], two["plan"]["entries"], strict=True):
        assert other["channel_scales"] == pytest.approx(mine["channel_scales"], rel=0.05)
    assert any(entry["channel_scales"] for entry in one["plan"]["entries"])


def test_errors_are_said_once_and_end_all_processes(tmp_path):
    log = tmp_path / "log"
    arguments = ["--data", "imagefolder", "--data-dir", str(tmp_path / "nowhere"), "--output", str(tmp_path / "run")]
    assert finish(start(arguments, log, 2)) in ([2, 2], [2, -9], [-9, 2])
    printed = "".join(path.read_text() for path in tmp_path.glob("*.log"))
    assert printed.count("error: no folder") == 1
