"""Count the bytes of a sharded step, and how evenly its work is dealt, without the machines.

    python examples/benchmarks/sharded.py

Every process of a group is played in turn, with tensors that have shapes and no values, and collectives that count what
they are given. What is counted is what the step issues; the traffic of FSDP2 itself beside it is by its definition: two
gathers and a reduction of all parameters, of which a process has one part in N.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from torchvision.models import resnet50

import fgo_geo
from fgo_geo.distributed import fully_shard, step_cost
from fgo_geo.distributed.exchange import WeightExchange
from fgo_geo.optim.base import StepRequest, manifold_of
from fgo_geo.paths.protocol import StepOptions, Weight


def transformer() -> nn.Module:
    """24 layers of width 2,048: 1.2 billion numbers."""
    layer = nn.TransformerEncoderLayer(2048, 16, 8192, batch_first=True)
    return nn.TransformerEncoder(layer, 24, enable_nested_tensor=False)


MODELS: dict[str, Callable[[], nn.Module]] = {"ResNet-50": resnet50, "transformer, 1.2 billion": transformer}


def sharded(build: Callable[[], nn.Module], count: int, rank: int, manifolds: tuple[str, ...]) -> nn.Module:
    """A model as one process of a group has it, without values."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=count)
    with torch.device("meta"):
        model = build()
    fgo_geo.constrain(model, "pio", manifolds)
    return fully_shard(model, mesh=init_device_mesh("cpu", (count,)))


def step_of_one_process(model: nn.Module) -> dict[str, float]:
    """What a process sends to others in a step with momentum and has whole during it, in bytes; and its step cost."""
    sent = 0

    def count(received: Tensor, outgoing: Tensor, lengths: list[int], sent_lengths: list[int], group: Any) -> None:
        nonlocal sent
        sent += (sum(sent_lengths) - sent_lengths[dist.get_rank(group)]) * outgoing.element_size()

    params = [param for param in model.parameters() if manifold_of(param) is not None]
    options = StepOptions(lr=0.1, momentum=0.9, step_size="theorem")
    weights = [Weight(p, p, manifold_of(p), p.detach(), p.detach()) for p in params]
    exchange = WeightExchange({}, lambda param: "")
    with patch("torch.distributed.all_to_all_single", count), patch.object(WeightExchange, "agree"):
        own = exchange.collect([StepRequest(options, weights)])[0].weights
        exchange.put_back({w.owner: torch.empty(w.n_groups, device="meta") for w in own})
    numbers = sum(weight.param.numel() for weight in own)
    return {
        "sent": sent,
        "whole": 3 * 4 * numbers,
        "cost": sum(step_cost(weight.manifold, weight.param.shape) for weight in own),
        "all": 4 * sum(param.numel() for param in model.parameters()),
    }


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--manifolds", nargs="+", default=["sphere", "oblique", "stiefel", "euclidean"])
    options = parser.parse_args()
    columns = ("model", "processes", "sent by a step, MB", "FSDP2, MB", "share", "whole in a step, MB", "busiest owner")
    print("|", " | ".join(columns), "|")
    print("|", " | ".join("---" for _ in columns), "|")
    for name, build in MODELS.items():
        for count in options.processes:
            rows = []
            for rank in range(count):
                rows.append(step_of_one_process(sharded(build, count, rank, tuple(options.manifolds))))
                dist.destroy_process_group()
            sent, whole = (max(row[key] for row in rows) for key in ("sent", "whole"))
            fsdp = 3 * rows[0]["all"] * (count - 1) / count
            busiest = max(row["cost"] for row in rows) * count / sum(row["cost"] for row in rows)
            print(
                f"| {name} | {count} | {sent / 1e6:.1f} | {fsdp / 1e6:.1f} | {sent / fsdp:.1%} | {whole / 1e6:.1f} "
                f"| {busiest:.2f} |"
            )


if __name__ == "__main__":
    main()
