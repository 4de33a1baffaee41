"""Nothing is lost: interruptions, folders, locks, damaged checkpoints."""

from __future__ import annotations

import io
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import trainer
from trainer import (  # noqa: F401  (fixtures of every test)
    EXAMPLES,
    QUICK,
    bits,
    checkpoints,
    command_line,
    ctrl_c_interrupts,
    data,
    engine,
    folder,
    light_runs,
    load,
    reporting,
    run,
    signal_at,
    train,
)

# --- interruption and resumption --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags",
    [
        ("--method", "pio", "--norm", "batch"),
        ("--method", "st"),
        ("--optimizer", "radam"),
        ("--method", "adamw", "--mixup", "0.2", "--ema", "0.9"),
        ("--method", "pio-scales", "--warmup", "1", "--schedule", "cosine"),
        ("--method", "pio-channel", "--amp", "bf16"),
        ("--method", "pio", "--amp", "fp16", "--width", "4", "--lr", "0.05"),
    ],
    ids=" ".join,
)
def test_a_run_stopped_in_the_middle_of_an_epoch_resumes_to_the_identical_bits(tmp_path, monkeypatch, capsys, flags):
    flags = (*flags, "--epochs", "3", *QUICK)
    run(tmp_path / "straight", *flags)
    with monkeypatch.context() as patch:
        signal_at(patch, 14 + 6, signal.SIGTERM)
        assert train.main([*flags, "--output", str(tmp_path / "my run")]) == 128 + signal.SIGTERM
    printed = capsys.readouterr().out
    assert "the checkpoint holds 6 of 14 steps of epoch 2. Continue with" in printed
    assert f"--resume --output '{tmp_path / 'my run'}'" in printed
    torch.manual_seed(1)
    results = run(tmp_path / "my run", "--resume")
    assert bits(load(tmp_path / "my run")) == bits(load(tmp_path / "straight"))
    assert [e["epoch"] for e in results["epochs"]] == [1, 2, 3]


def test_random_crops_resume_to_the_identical_bits_with_any_number_of_workers(tmp_path, monkeypatch):
    images = trainer.write_image_folder(tmp_path / "images", train=24)
    flags = ("--data", "imagefolder", "--data-dir", str(images), "--image-size", "8", "--epochs", "2")
    flags = (*flags, "--batch-size", "6", "--threads", "1")
    run(tmp_path / "straight", *flags)
    with monkeypatch.context() as patch:
        signal_at(patch, 6)
        assert train.main([*flags, "--workers", "1", "--output", str(tmp_path / "broken")]) == 130
    run(tmp_path / "broken", "--resume", "--workers", "2")
    ours, straight = load(tmp_path / "broken"), load(tmp_path / "straight")
    for state in (ours, straight):
        del state["settings"]["workers"]
    assert bits(ours) == bits(straight)


def test_a_finished_run_is_shown_and_can_be_made_longer_or_replaced(tmp_path, capsys):
    common = ("--optimizer", "rsgd", "--schedule", "constant", *QUICK)
    longer = run(tmp_path / "longer", *common, "--epochs", "2")
    first = run(tmp_path / "short", *common, "--epochs", "1")
    capsys.readouterr()
    assert run(tmp_path / "short", *common, "--epochs", "1") == first
    printed = capsys.readouterr().out
    assert printed.startswith("This run is finished:\nFinal accuracy")
    assert "Train it again with --overwrite" in printed
    resumed = run(tmp_path / "short", "--resume", "--epochs", "2")
    ours, straight = load(tmp_path / "short"), load(tmp_path / "longer")
    for state in (ours, straight):
        del state["settings"]
    assert bits(ours) == bits(straight)
    assert resumed["final"]["test_accuracy"] == longer["final"]["test_accuracy"]
    again = run(tmp_path / "short", *common, "--epochs", "1", "--overwrite")
    assert again["final"]["test_accuracy"] == first["final"]["test_accuracy"]


def test_another_run_in_the_folder_is_refused_and_foreign_files_survive_overwriting(tmp_path, capsys):
    run(tmp_path, "--epochs", "1", *QUICK)
    (tmp_path / "notes.txt").write_text("mine")
    before = (tmp_path / "results.json").read_bytes()
    assert train.main(["--epochs", "1", *QUICK, "--lr", "0.1", "--output", str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert (
        f"{tmp_path} holds another run, with --lr 0.2, not 0.1: choose another --output, or add --overwrite" in message
    )
    assert (tmp_path / "results.json").read_bytes() == before
    assert train.main(["--resume", "--output", str(tmp_path), "--lr", "0.1"]) == 2
    assert f"--resume: the run in {tmp_path} has --lr 0.2, not 0.1" in capsys.readouterr().err
    assert train.main([*QUICK, "--output", str(tmp_path), "--epochs", "6", "--resume", "--time-constant", "auto"]) == 2
    message = f"the run in {tmp_path} has --time-constant 1, not 2: it is a third of --epochs unless given, so add "
    assert f"{message}--time-constant 1\n" in capsys.readouterr().err
    assert train.main([*QUICK, "--output", str(tmp_path), "--epochs", "2", "--resume"]) == 0
    run(tmp_path, "--epochs", "1", *QUICK, "--lr", "0.1", "--overwrite")
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_an_interrupted_run_is_neither_overwritten_nor_forgotten(tmp_path, monkeypatch, capsys):
    flags = ["--optimizer", "sgd", "--epochs", "2", *QUICK, "--output", str(tmp_path)]
    with monkeypatch.context() as patch:
        signal_at(patch, 5)
        assert train.main(flags) == 130
    before = [path.read_bytes() for path in sorted((tmp_path / "checkpoints").iterdir())]
    assert train.main(flags) == 2
    assert "holds an interrupted run: add --resume to continue it, --overwrite to delete it" in capsys.readouterr().err
    assert [path.read_bytes() for path in sorted((tmp_path / "checkpoints").iterdir())] == before
    assert train.main([*flags, "--resume"]) == 0


def test_two_processes_never_share_a_folder(tmp_path, capsys):
    made = command_line.make({"epochs": 1}).with_(output=tmp_path)
    with folder.opened(made):
        assert train.main(["--epochs", "1", "--output", str(tmp_path)]) == 2
    assert f"another process is at work in {tmp_path}: wait for it, or choose another" in capsys.readouterr().err


def test_resume_starts_a_run_that_is_not_there_or_had_no_time_for_a_checkpoint(tmp_path, capsys):
    run(tmp_path, "--resume", "--epochs", "1", *QUICK)
    assert f"Nothing to resume in {tmp_path}: starting" in capsys.readouterr().out
    first = bits(load(tmp_path))
    for name in ("results.json", "checkpoints"):
        path = tmp_path / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    run(tmp_path, "--resume")
    assert bits(load(tmp_path)) == first


def test_a_folder_that_cannot_be_written_to_is_refused_before_the_work(tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(engine, "build", lambda *_: pytest.fail("the work has begun"))
    assert train.main(["--output", str(tmp_path / "file")]) == 2
    assert f"error: cannot write to {tmp_path / 'file'} (File exists)" in capsys.readouterr().err


def test_a_disk_without_room_is_refused_before_the_work(tmp_path, capsys, monkeypatch):
    usage = type("Usage", (), {"free": 5 * 2**20})
    monkeypatch.setattr(folder.shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(engine, "fit", lambda *_: pytest.fail("the work has begun"))
    assert train.main(["--output", str(tmp_path)]) == 2
    assert "is on a disk with 5 MiB free; checkpoints need 19 MiB: make room" in capsys.readouterr().err


# --- damaged checkpoints ----------------------------------------------------------------------------------------


def flip(position: float):
    def change(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[int(position * (len(content) - 1))] ^= 1
        path.write_bytes(content)

    return change


def flip_weight(path: Path) -> None:
    """Flip the lowest bit of a weight's first number, which no structure of the file notices."""
    state = torch.load(path, weights_only=True)
    weight = next(iter(state["model"].values())).numpy().tobytes()
    content = bytearray(path.read_bytes())
    content[content.index(weight)] ^= 1
    path.write_bytes(content)


def foreign(path: Path) -> None:
    torch.save({"weights": torch.zeros(3)}, path)


def foreign_with_its_checksum(path: Path) -> None:
    path.unlink()
    buffer = io.BytesIO()
    torch.save({"weights": torch.zeros(3)}, buffer)
    digest = checkpoints.hashlib.sha256(buffer.getvalue()).hexdigest()[:16]
    path.with_name(f"{path.name[:13]}-{digest}.pt").write_bytes(buffer.getvalue())


DAMAGE = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-1000]),
    "empty": lambda path: path.write_bytes(b""),
    "first bit": flip(0),
    "middle bit": flip(0.5),
    "last bit": flip(1),
    "bit of a weight": flip_weight,
    "foreign file": foreign,
    "foreign file with a checksum": foreign_with_its_checksum,
    "text": lambda path: path.write_text("not a checkpoint"),
}


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """A run that was stopped in its second epoch, and its result without that."""
    root = tmp_path_factory.mktemp("damage")
    flags = ("--optimizer", "sgd", "--epochs", "2", *QUICK)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reporting, "draw_curves", lambda path, history: None)
        run(root / "straight", *flags)
        signal_at(patch, 20, signal.SIGTERM)
        assert train.main([*flags, "--output", str(root / "broken")]) == 143
    return root


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_takes_its_place(tmp_path, capsys, interrupted, damage):
    output = tmp_path / "run"
    shutil.copytree(interrupted / "broken", output)
    newest = next(checkpoints._newest_first(output / "checkpoints"))
    damage(newest)
    run(output, "--resume")
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if line.startswith("damaged checkpoint: ")]) == 1
    assert "Resumed after 14 steps, in epoch 2" in lines
    assert bits(load(output)) == bits(load(interrupted / "straight"))


def test_damage_never_blocks_a_fresh_start(tmp_path, capsys, interrupted):
    output = tmp_path / "run"
    shutil.copytree(interrupted / "broken", output)
    for path in (output / "checkpoints").iterdir():
        path.write_bytes(b"")
    assert train.main(["--resume", "--output", str(output)]) == 2
    printed = capsys.readouterr().out
    assert printed.count("damaged checkpoint: ") == 2
    assert f"No checkpoint in {output / 'checkpoints'} can be read: start again with --overwrite" in printed
    run(output, "--optimizer", "sgd", "--epochs", "2", *QUICK)
    assert bits(load(output)) == bits(load(interrupted / "straight"))


def test_the_random_generators_are_saved_and_restored():
    import random

    def draw():
        return random.random(), np.random.rand(), torch.rand(()).item()  # noqa: NPY002 - the global one

    checkpoints.seed_everything(5)
    draw()
    state = checkpoints.random_state()
    expected = draw()
    checkpoints.restore_random_state(state)
    assert draw() == expected


# --- Ctrl-C for real --------------------------------------------------------------------------------------------


def test_ctrl_c_in_a_process_of_its_own(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", str(EXAMPLES / "train.py"), "--optimizer", "sgd", "--output", "my run"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )
    for line in process.stdout:
        if line.lstrip().startswith("1 "):
            process.send_signal(signal.SIGINT)
            break
    printed, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert printed.endswith(f"  python {EXAMPLES / 'train.py'} --resume --output 'my run'\n")
    assert "\x1b" not in printed
    assert load(tmp_path / "my run")["progress"]["step"] >= 23
