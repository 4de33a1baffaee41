"""Runs whose weights are dealt to processes by FSDP2: the same results, and the same promises about checkpoints."""

from __future__ import annotations

import json
import resource
import shutil
from pathlib import Path

import kill_training
import pytest
import torch
from kill_training import RUN, finish, kill_and_resume, start
from trainer import bits, checkpoints, command_line, engine, load, run

import fgo_geo

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


def test_an_optimiser_without_momentum_goes_on_with_its_learning_rates(tmp_path):
    """It has no state then, but for its learning rates, which change in every step of this run."""
    arguments = [*RUN, *FLAGS, "--momentum", "0", "--output"]
    assert finish(start([*arguments, str(tmp_path / "straight")], tmp_path / "log", WORLD)) == [0] * WORLD
    shutil.copytree(tmp_path / "straight", tmp_path / "resumed")
    (tmp_path / "resumed" / "results.json").unlink()
    newest = max((tmp_path / "resumed" / "checkpoints").iterdir())
    shutil.rmtree(newest)
    assert finish(start([*arguments, str(tmp_path / "resumed"), "--resume"], tmp_path / "log", WORLD)) == [0] * WORLD
    state, expected = load(tmp_path / "resumed"), load(tmp_path / "straight")
    assert state["groups"] == expected["groups"]
    assert bits(state) == bits(expected)


class Bug:
    """From the first checkpoint after step 5 on, something in this process raises what nobody expects."""

    def __init__(self, owner: str, name: str) -> None:
        self.owner, self.name = owner, name

    def __call__(self) -> None:
        from training import sharded

        save = sharded.save

        def broken(*args):
            raise LookupError("of this process alone")

        def late(folder, step, rest, parts):
            if step > 5:
                setattr(getattr(sharded, self.owner), self.name, broken)
            return save(folder, step, rest, parts)

        sharded.save = late


@pytest.mark.parametrize(("owner", "name"), [("TrainingState", "state_dict"), ("checkpoints", "digest_of_file")])
def test_an_unexpected_error_of_one_process_is_known_to_all(tmp_path, owner, name):
    log, output = tmp_path / "log", tmp_path / "run"
    running = start([*RUN, *FLAGS, "--output", str(output)], log, WORLD, {1: Bug(owner, name)})
    for process in running:
        process.join(60)
        process.kill()
    assert [process.exitcode for process in running] == [2, 1]
    printed, of_bug = (log.with_suffix(f".{rank}.log").read_text() for rank in range(WORLD))
    unfinished = output / "checkpoints" / "step-00000008.tmp"
    assert f"error: cannot write {unfinished} (LookupError: of this process alone)" in printed
    assert "Traceback" not in printed
    assert "LookupError: of this process alone" in of_bug
    assert sorted(path.name[:14] for path in unfinished.parent.iterdir()) == ["step-00000000-", "step-00000004-"]


# -- folders, in this process ---------------------------------------------------------------------------------


def unfinished_folder(folder: Path, step: int) -> tuple[Path, Path]:
    """A whole checkpoint that has not its name yet, and that name."""
    path = folder / f"step-{step:08d}.tmp"
    path.mkdir(parents=True)
    torch.save({"step": step}, path / "run.pt")
    listed = json.dumps({"run.pt": checkpoints.digest_of_file(path / "run.pt")}).encode()
    (path / "checksums.json").write_bytes(listed)
    return path, folder / f"step-{step:08d}-{checkpoints.digest(listed)}"


class Killed(BaseException):
    """What nothing catches."""


@pytest.mark.parametrize("moment", range(8))
def test_a_folder_that_replaces_another_of_its_name_is_there_at_every_moment(tmp_path, monkeypatch, moment):
    names = unfinished_folder(tmp_path, 3)
    checkpoints.put_in_place(*names)
    assert unfinished_folder(tmp_path, 3) == names
    left = iter(range(moment))

    def tick():
        if next(left, None) is None:
            raise Killed

    def watched(function):
        def call(*args, **options):
            tick()
            result = function(*args, **options)
            tick()
            return result

        return call

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", watched(Path.replace))
        patched.setattr(shutil, "rmtree", watched(shutil.rmtree))
        patched.setattr(Path, "unlink", watched(Path.unlink))
        with pytest.raises(Killed):
            checkpoints.put_in_place(*names)
    for _ in range(2):  # as others see it, and after the next start
        found = checkpoints.load(tmp_path)
        assert found.state == {"step": 3}
        assert not found.damage
        checkpoints.remove_unfinished(tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    checkpoints.put_in_place(*unfinished_folder(tmp_path, 3))
    assert list(tmp_path.iterdir()) == [names[1]]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_an_old_checkpoint_that_cannot_be_deleted_is_a_warning(tmp_path, monkeypatch, kind):
    def refuse(*args, **options):
        raise PermissionError(13, "Permission denied")

    for step in range(3):
        if kind == "file":
            checkpoints.write(tmp_path / f"step-{step:08d}-{step:016d}.pt", b"old")
        else:
            checkpoints.put_in_place(*unfinished_folder(tmp_path, step))
    monkeypatch.setattr(Path, "unlink", refuse)
    monkeypatch.setattr(shutil, "rmtree", refuse)
    with pytest.warns(
        UserWarning, match=r"cannot delete .*step-00000000-.* \(Permission denied\), which is not needed"
    ):
        checkpoints.delete_old(tmp_path)
