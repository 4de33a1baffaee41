"""The state of a run on disk: everything that decides what the next epoch will compute.

The file is replaced in one step, so at every moment it holds the end of a completed epoch, whatever
interrupts the run. A run that continues from it ends with the same bits as one that was never
interrupted, as long as the machine and the versions are the same.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch


def seed_everything(seed: int) -> None:
    """Seed all global random number generators and choose repeatable GPU kernels."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - transforms of data sets may draw from the global generator
    torch.manual_seed(seed)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False


def epoch_generator(seed: int, epoch: int) -> torch.Generator:
    """Return the generator of an epoch's data order, a function of the seed and the epoch alone."""
    (state,) = np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state))


def save(path: Path, state: dict[str, Any]) -> None:
    """Write ``state`` and the state of the random number generators to ``path``."""
    unfinished = path.with_suffix(".tmp")
    torch.save({**state, "random": _random_state()}, unfinished)
    unfinished.replace(path)


def load(path: Path) -> dict[str, Any]:
    """Read what ``save`` wrote, on the CPU and without executing code from the file."""
    return torch.load(path, map_location="cpu", weights_only=True)


def _random_state() -> dict[str, Any]:
    kind, keys, *position = np.random.get_state()  # noqa: NPY002 - the generator that seed_everything seeds
    return {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(keys.astype(np.int64)), *position),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Put the global random number generators back to where ``save`` found them."""
    random.setstate(state["python"])
    kind, keys, *position = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *position))  # noqa: NPY002 - see above
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_initialized() and torch.cuda.device_count() == len(state["cuda"]):
        torch.cuda.set_rng_state_all(state["cuda"])
