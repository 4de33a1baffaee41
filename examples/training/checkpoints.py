"""Checkpoints that survive whatever ends a run: written whole or not at all, and known to be whole when read.

A checkpoint is a file of :func:`torch.save` whose name holds its step and the beginning of its SHA-256, as those of
torch's model hub do. It is written under another name, flushed to the disk and renamed, so that a file with a
checkpoint's name is always complete; a flipped bit, a cut, a foreign file do not agree with the name. The last two
are kept: should the newest be damaged, the one before takes its place.
"""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

KEPT = 2
_NAME = re.compile(r"step-(\d+)-([0-9a-f]{16})\.pt")
_UNREADABLE = (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, KeyError, AttributeError, TypeError)


class WriteError(RuntimeError):
    """A file that could not be written; what was there before is as it was."""


class DamageError(RuntimeError):
    """Checkpoints of which none is whole."""


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


def save(folder: Path, step: int, state: dict[str, Any]) -> Path:
    """Write the state at a step, and delete all but the newest checkpoints.

    Raises:
        WriteError: If the file could not be written; the checkpoints before are as they were.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    content = buffer.getvalue()
    path = folder / f"step-{step:08d}-{hashlib.sha256(content).hexdigest()[:16]}.pt"
    write(path, content)
    for old in list(_newest_first(folder))[KEPT:]:
        old.unlink(missing_ok=True)
    return path


def load(folder: Path) -> Found:
    """Read the newest checkpoint that is whole, on the CPU and without executing code from the file."""
    damage = []
    for path in _newest_first(folder):
        reason = None
        content = path.read_bytes()
        digest = hashlib.sha256(content).hexdigest()[:16]
        if not content:
            reason = "is empty"
        elif path.name.split("-")[-1] != f"{digest}.pt":
            reason = "is cut or changed: its content does not agree with the checksum in its name"
        else:
            try:
                state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
                if not (isinstance(state, dict) and {"model", "optimizer", "progress"} <= state.keys()):
                    raise ValueError("it holds no run")
                return Found(state, path, damage)
            except _UNREADABLE as error:
                reason = f"is no checkpoint of a run ({str(error).splitlines()[0][:60]})"
        damage.append(f"damaged checkpoint: {path} {reason}")
    return Found(None, None, damage)


def remove_unfinished(folder: Path) -> None:
    """Delete what a killed process was writing."""
    for path in folder.glob("*.tmp"):
        path.unlink(missing_ok=True)


def _newest_first(folder: Path) -> Iterator[Path]:
    named = [(int(match[1]), path) for path in folder.glob("step-*.pt") if (match := _NAME.fullmatch(path.name))]
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
