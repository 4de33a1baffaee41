"""Checks that run in a group of processes: all of a file in one group, as starting processes takes most of the time."""

from __future__ import annotations

import datetime
import importlib
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

Outcomes = dict[str, list[str]]
Check = Callable[[int, Path], None]


def _process(rank: int, world: int, folder: str, module: str, names: Sequence[str]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous-{world}-{module}",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=180),
    )
    checks = importlib.import_module(module)
    outcomes: dict[str, str] = {}
    for name in names:
        try:
            getattr(checks, name)(rank, Path(folder))
            outcomes[name] = ""
        except BaseException:
            outcomes[name] = traceback.format_exc()
        torch.save(outcomes, f"{folder}/outcomes-{world}-{module}-{rank}.pt")
        try:
            dist.barrier()
        except RuntimeError:  # another process hangs in this check, or has died
            return
    dist.destroy_process_group()


def run(module: str, names: Sequence[str], folder: Path, world: int = 2) -> Outcomes:
    """Run functions of a module, called with the process's number and a folder, in a group of processes.

    Returns:
        For each of them what went wrong on every process, empty if nothing did.
    """
    mp.spawn(_process, args=(world, str(folder), module, list(names)), nprocs=world)
    files = [folder / f"outcomes-{world}-{module}-{rank}.pt" for rank in range(world)]
    told = [torch.load(file, weights_only=True) for file in files]
    return {
        name: [outcomes.get(name, f"process {n} did not get there") for n, outcomes in enumerate(told)]
        for name in names
    }


def checks_of(module: object) -> list[str]:
    """The names of the functions of a module that are checks."""
    return [name for name in vars(module) if name.startswith("check_")]
