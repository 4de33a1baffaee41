"""A training run for torchrun, one process of which dies once; run by ``test_sharded_checkpoints.py``.

    torchrun --standalone --nproc-per-node 2 --max-restarts 3 tests/elastic_training.py FOLDER

The processes train without interruption first, and then with checkpoints, until one is killed. Torchrun starts all of
them anew, and they go on from the newest checkpoint.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from sharded_checkpoints import build, go_on
from sharded_steps import whole

from fgo_geo.distributed import TrainingState

STEPS, EVERY, DIES_AT = 7, 2, 5


def main(folder: Path) -> None:
    """Train, die, and go on."""
    torch.set_num_threads(1)
    rank, world, attempt = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "TORCHELASTIC_RESTART_COUNT"))
    # A place of its own for every attempt: torchrun's, in torch 2.14, may hold the addresses of the attempt before.
    place = f"file://{folder.absolute()}/rendezvous-{attempt}"
    dist.init_process_group("gloo", place, rank=rank, world_size=world)
    (folder / f"attempt-{attempt}-{rank}").touch()
    if attempt == 0:
        straight = go_on(build(), rank, range(STEPS))
        if rank == 0:
            torch.save(straight, folder / "straight.pt")
    built = build(seed=attempt)  # the plan comes with the checkpoint
    done = max((int(path.parent.name) for path in folder.glob("*/.metadata")), default=0)
    if done:
        dcp.load({"app": TrainingState(*built)}, checkpoint_id=folder / str(done))
    for step in range(done, STEPS):
        go_on(built, rank, range(step, step + 1))
        if attempt == 0 and step == DIES_AT and rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if (step + 1) % EVERY == 0:
            dcp.save({"app": TrainingState(*built)}, checkpoint_id=folder / str(step + 1))
    weights = [whole(param) for param in built[0].parameters()]
    if rank == 0:
        torch.save({"weights": weights, "went on from": done}, folder / "resumed.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
