"""Checkpoints that survive whatever ends a run: written whole or not at all, and known to be whole when read.

A checkpoint is a file of :func:`torch.save` whose name holds its step and the beginning of its SHA-256, as those of
torch's model hub do. It is written under another name, flushed to the disk and renamed, so that a file with a
checkpoint's name is always complete; a flipped bit, a cut, a foreign file do not agree with the name. The last two
are kept: should the newest be damaged, the one before takes its place.

Of a network that is dealt to many processes, a checkpoint is a folder, with the same promises: see
:mod:`training.sharded`.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import random
import re
import shutil
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from training import processes

KEPT = 2
REST, SUMS = "run.pt", "checksums.json"  # of a folder: what is not a weight, and the SHA-256 of every file
_ASIDE = ".old"  # ends the name of a folder that one of the same name is about to replace
_NAME = re.compile(rf"step-(\d+)-([0-9a-f]{{16}})(\.pt|{re.escape(_ASIDE)})?")
_UNREADABLE = (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, KeyError, AttributeError, TypeError)


class WriteError(RuntimeError):
    """A file that could not be written; what was there before is as it was."""


class DamageError(RuntimeError):
    """A checkpoint that is not whole: the message says what is wrong with it."""


class Found(NamedTuple):
    """The newest checkpoint that is whole (None if there is none), and a line for each damaged one."""

    state: dict[str, Any] | None
    path: Path | None
    damage: list[str]


def write(path: Path, content: bytes) -> None:
    """Replace a file in one step: at every moment the old or the new content is there, on the disk, whole.

    Raises:
        WriteError: If that is impossible, e.g. because the disk is full; nothing is left behind.
    """
    unfinished = path.with_name(path.name + ".tmp")
    try:
        with unfinished.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise WriteError(f"cannot write {path} ({error.strerror})") from error


@contextmanager
def agreed(path: Path) -> Iterator[None]:
    """Raise on all processes if one of them cannot write to a path, so that none waits for it.

    Raises:
        WriteError: On all processes, if one of them could not write. An error of another kind is raised as it is on its
            own process.
    """
    problem, error = None, None
    try:
        yield
    except WriteError as raised:
        problem, error = str(raised), raised
    except Exception as raised:
        problem, error = f"cannot write {path} ({type(raised).__name__}: {raised})", raised
    problems = [each for each in processes.gathered(problem) if each is not None]
    if problems:
        raise error or WriteError(problems[0])


def save(folder: Path, step: int, state: dict[str, Any]) -> Path:
    """Write the state at a step, and delete all but the newest checkpoints.

    Raises:
        WriteError: If the file could not be written; the checkpoints before are as they were.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    content = buffer.getvalue()
    path = folder / f"step-{step:08d}-{digest(content)}.pt"
    write(path, content)
    delete_old(folder)
    return path


def digest(content: bytes) -> str:
    """The beginning of the SHA-256, as it is in names."""
    return hashlib.sha256(content).hexdigest()[:16]


def digest_of_file(path: Path) -> str:
    """The SHA-256 of a file that need not fit in memory."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(2**20):
            found.update(part)
    return found.hexdigest()


def put_in_place(unfinished: Path, path: Path) -> None:
    """Give a folder its name; at every moment it, or what had that name before, can be loaded."""
    _sync_folder(unfinished)
    aside = path.with_name(path.name + _ASIDE)
    if path.exists():  # the same content, or a damaged one
        path.replace(aside)
    unfinished.replace(path)
    _sync_folder(path.parent)
    _discard([aside])


def delete(path: Path) -> None:
    """Delete a file or folder; a folder in one step, as it would be damaged for some time."""
    if path.is_dir():
        shutil.rmtree(path.replace(path.with_name(path.name + ".tmp")))
    else:
        path.unlink(missing_ok=True)


def delete_old(folder: Path) -> None:
    """Delete all but the newest checkpoints."""
    _discard(list(_newest_first(folder))[KEPT:])


def _discard(paths: Iterable[Path]) -> None:
    """Delete what nothing needs any more; that it cannot be deleted is no reason to end a run."""
    for path in paths:
        try:
            delete(path)
        except OSError as error:
            warnings.warn(f"cannot delete {path} ({error.strerror}), which is not needed any more", stacklevel=2)


def load(folder: Path) -> Found:
    """Read the newest checkpoint that is whole, on the CPU and without executing code from the file."""
    damage = []
    for path in _newest_first(folder):
        try:
            return Found(_read_folder(path) if path.is_dir() else _read_file(path), path, damage)
        except DamageError as error:
            damage.append(f"damaged checkpoint: {path} {error}")
    return Found(None, None, damage)


def _read_file(path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    if not content:
        raise DamageError("is empty")
    if path.name.split("-")[-1] != f"{digest(content)}.pt":
        raise DamageError("is cut or changed: its content does not agree with the checksum in its name")
    try:
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        if not (isinstance(state, dict) and {"model", "optimizer", "progress"} <= state.keys()):
            raise ValueError("it holds no run")
    except _UNREADABLE as error:
        raise DamageError(f"is no checkpoint of a run ({str(error).splitlines()[0][:60]})") from error
    return state


def _read_folder(path: Path) -> dict[str, Any]:
    """What is not a weight, if all files are whole."""
    listed = path / SUMS
    content = listed.read_bytes() if listed.is_file() else b""
    if path.stem.split("-")[-1] != digest(content):
        raise DamageError("is cut or changed: its list of files does not agree with the checksum in its name")
    for name, expected in json.loads(content).items():
        if not (path / name).is_file():
            raise DamageError(f"is cut: {name} is missing")
        if digest_of_file(path / name) != expected:
            raise DamageError(f"is cut or changed: {name} does not agree with its checksum")
    return torch.load(path / REST, map_location="cpu", weights_only=True)


def remove_unfinished(folder: Path) -> None:
    """Delete what a killed process was writing, or about to delete."""
    _discard([path for path in folder.glob(f"step-*{_ASIDE}") if path.with_suffix("").exists()])
    for path in folder.glob("*.tmp"):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _newest_first(folder: Path) -> Iterator[Path]:
    named = [(int(match[1]), path) for path in folder.glob("step-*") if (match := _NAME.fullmatch(path.name))]
    # Of one step there can be two, from a run that was continued from before it: the one written last counts.
    yield from (path for *_, path in sorted(((s, p.stat().st_mtime_ns, p) for s, p in named), reverse=True))


def _sync_folder(folder: Path) -> None:
    """Make a renaming last, where the system lets a folder be opened."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


# -- random numbers -------------------------------------------------------------------------------------------


def seed_everything(seed: int) -> None:
    """Seed all global random number generators and choose repeatable GPU kernels."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - transforms of data sets may draw from the global generator
    torch.manual_seed(seed)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False


def random_state() -> dict[str, Any]:
    """The state of all global random number generators."""
    kind, keys, *position = np.random.get_state()  # noqa: NPY002 - the generator that seed_everything seeds
    return {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(keys.astype(np.int64)), *position),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Put the global random number generators back to a state."""
    random.setstate(state["python"])
    kind, keys, *position = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *position))  # noqa: NPY002 - see above
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_initialized() and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"])
