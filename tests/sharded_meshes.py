"""Four processes, as one row and as two replicas of two shards; run by ``test_sharded.py``."""

from __future__ import annotations

from pathlib import Path

import pytest
import sharded_steps
import torch
from sharded_steps import PER_PROCESS, assert_equal, data, fg_sgd, loss, own_share
from torch.distributed.device_mesh import init_device_mesh

from fgo_geo import constrain
from fgo_geo.distributed import fully_shard


def check_four_processes(rank: int, folder: Path) -> None:
    for net in sharded_steps.NETS:
        sharded, single, *_ = sharded_steps.train_both(rank, net, fg_sgd(momentum=0.9), steps=5)
        assert_equal(sharded, single, 1e-9)


def check_fifty_steps(rank: int, folder: Path) -> None:
    sharded_steps.fifty_steps(rank)


def check_replicas_of_shards(rank: int, folder: Path) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    models = []
    for _ in range(2):
        model = sharded_steps.residual_net().double()
        constrain(model)
        models.append(model)
    fully_shard(models[0][1], mesh=mesh)
    fully_shard(models[0], mesh=mesh)
    optimizers = [fg_sgd(momentum=0.9)(model) for model in models]
    for step in range(4):
        x = data("residual", step, 4 * PER_PROCESS)
        for model, optimizer, own in zip(models, optimizers, (own_share(x, rank), x), strict=True):
            optimizer.zero_grad()
            loss(model, own).backward()
            optimizer.step()
    assert_equal(*models, 1e-9)
    if rank == 3:  # the error of one replica is that of all
        models[0][1].first.weight.grad.to_local().fill_(torch.inf)  # pyright: ignore
    with pytest.raises(FloatingPointError, match="is not finite"):
        optimizers[0].step()
