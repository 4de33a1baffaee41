"""FSDP2: networks whose weights are dealt to the processes, and checkpoints of which every process writes its part.

A checkpoint is a folder of ``torch.distributed.checkpoint`` with two files besides: what is not a weight, and the
SHA-256 of every file. The folder gets its name, in which the beginning of that list's SHA-256 is, when all of it is on
the disk.
"""

from __future__ import annotations

import io
import json
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import init_device_mesh

from fgo_geo.distributed import TrainingState, fully_shard
from training import checkpoints, models, processes


def shard(model: nn.Module, device: str) -> None:
    """Deal the weights of a network to the processes, block by block."""
    mesh = init_device_mesh(device.partition(":")[0], (processes.count(),))
    for part in [*models.blocks(model), model]:
        fully_shard(part, mesh=mesh)


# -- checkpoints ----------------------------------------------------------------------------------------------


def save(folder: Path, step: int, rest: dict[str, Any], parts: dict[str, TrainingState]) -> None:
    """Write a checkpoint with all processes, and delete all but the newest.

    Raises:
        WriteError: On all processes, if one of them could not write; the checkpoints before are as they were. An error
            of another kind is raised as it is on its own process.
    """
    unfinished = folder / f"step-{step:08d}.tmp"
    sums: dict[str, str] = {}
    states: dict[str, Any] = {}
    with _agreed(unfinished):
        if processes.is_first():
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
    with _agreed(unfinished), _quiet():
        states = {name: part.state_dict() for name, part in parts.items()}  # torch does not agree on errors here
    with _agreed(unfinished), _quiet():
        dcp.save(states, storage_writer=dcp.FileSystemWriter(unfinished))
        mine = sorted(unfinished.iterdir())[processes.rank() :: processes.count()]
        sums = {path.name: checkpoints.digest_of_file(path) for path in mine}
    sums = {name: digest for own in processes.gathered(sums) for name, digest in own.items()}
    with _agreed(unfinished):
        if processes.is_first():
            buffer = io.BytesIO()
            torch.save(rest, buffer)
            checkpoints.write(unfinished / checkpoints.REST, buffer.getvalue())
            listed = json.dumps(
                sums | {checkpoints.REST: checkpoints.digest_of_file(unfinished / checkpoints.REST)}
            ).encode()
            checkpoints.write(unfinished / checkpoints.SUMS, listed)
            checkpoints.put_in_place(unfinished, folder / f"step-{step:08d}-{checkpoints.digest(listed)}")
            checkpoints.delete_old(folder)


def load(path: Path, parts: dict[str, TrainingState]) -> None:
    """Read the weights of a checkpoint that is known to be whole, each process its part."""
    with _quiet():
        dcp.load(parts, storage_reader=dcp.FileSystemReader(path))


@contextmanager
def _agreed(unfinished: Path) -> Iterator[None]:
    """Raise on all processes, and leave nothing behind, if one of them cannot write."""
    try:
        with checkpoints.agreed(unfinished):
            try:
                yield
            except CheckpointException as error:
                reason, _ = next(iter(error.failures.values()))
                reason = getattr(reason, "strerror", None) or reason
                raise checkpoints.WriteError(f"cannot write {unfinished} ({reason})") from error
            except OSError as error:
                raise checkpoints.WriteError(f"cannot write {unfinished} ({error.strerror})") from error
    except Exception:
        if processes.is_first():
            shutil.rmtree(unfinished, ignore_errors=True)
        raise


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the remarks of torch's modules on one another."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module=r"torch\.")
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.")
        yield
