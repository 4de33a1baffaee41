"""One process or many: what torchrun has set up, and the few collectives that training needs.

Without torchrun every function does what it does for a world of one process.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fgo_geo.models.feature_stats import FeatureStatistics


def count() -> int:
    """Number of processes."""
    return int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    """Number of this process, from 0."""
    return int(os.environ.get("RANK", 0))


def is_first() -> bool:
    """Whether this process writes files and prints."""
    return rank() == 0


def device() -> str:
    """The device of this process."""
    if not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{os.environ['LOCAL_RANK']}" if "LOCAL_RANK" in os.environ else "cuda"


@contextmanager
def group(device: str) -> Iterator[None]:
    """Connect the processes during a run."""
    if count() == 1:
        yield
        return
    # torchrun may keep its store when it restarts the processes, and the addresses of those that have died with it.
    store, number, world = next(dist.rendezvous("env://"))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    found: dict[str, Any] = {"rank": number, "world_size": world}
    found["store"] = dist.PrefixStore(f"attempt {attempt} of {world} processes", store)
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=torch.device(device), **found)
    else:
        dist.init_process_group("gloo", **found)
    try:
        yield
    finally:
        dist.destroy_process_group()


def total(values: Tensor) -> Tensor:
    """Add up a tensor over all processes, in place."""
    if count() > 1:
        dist.all_reduce(values)
    return values


def largest(values: Tensor) -> Tensor:
    """Take the elementwise maximum over all processes, in place."""
    if count() > 1:
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return values


def gathered(value: Any) -> list[Any]:
    """One value of every process, in the order of their ranks, on all of them."""
    if count() == 1:
        return [value]
    values: list[Any] = [None] * count()
    dist.all_gather_object(values, value)
    return values


def from_first(value: Any) -> Any:
    """What the first process has, on all of them."""
    if count() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def share_buffers(model: nn.Module) -> None:
    """Give all processes the buffers of the first, such as the statistics of batch normalisation.

    Feature statistics stay what each process has seen: all of them are taken together when radii follow from them.
    """
    if count() == 1:
        return
    for module in model.modules():
        if not isinstance(module, FeatureStatistics):
            for buffer in module.buffers(recurse=False):
                dist.broadcast(buffer, 0)
