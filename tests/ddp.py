"""One process of a distributed training run; a module of its own, because every process imports it."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fgo_geo import RiemannianFGSGD, constrain, on_manifolds, plan_of


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.ReLU(),
        nn.Conv2d(4, 6, (1, 3)),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(18, 8),
        nn.Linear(8, 2),
    ).double()


def batch(step: int) -> Tensor:
    return torch.randn(4, 3, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(step))


def train(net: nn.Module, share: slice, how: str = "fgsgd") -> dict[str, Any]:
    """Three epochs of two steps on a share of every batch, with statistics, if any, in between."""
    if how == "fgsgd":
        optimizer = RiemannianFGSGD(net.parameters(), lr=0.3, momentum=0.9, weight_decay=1e-3)
    else:
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.05)
        on_manifolds(optimizer, "constant")
    for step in range(6):
        optimizer.zero_grad()
        net(batch(step)[share]).square().mean().backward()
        optimizer.step()
        if step % 2:
            plan_of(net).update_scales(optimizer)
    plan = plan_of(net)
    plan.check()
    return {
        "weights": [p.detach().as_subclass(Tensor) for p in net.parameters()],
        "scales": [e.channel_scales for e in plan.constrained],
    }


def worker(rank: int, world_size: int, folder: str, statistics: Any, how: str = "fgsgd") -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    net = model()
    constrain(net, first_layer=True, statistics=statistics, radius=0.5)
    size = 4 // world_size
    result = train(DistributedDataParallel(net), slice(rank * size, (rank + 1) * size), how)
    torch.save(result, f"{folder}/{rank}.pt")
    dist.destroy_process_group()
