"""Count the bytes of a sharded step, and how evenly its work is dealt, without the machines.

    python examples/benchmarks/sharded.py

Every process of a group is played in turn, with tensors that have shapes and no values, and collectives that count what
they are given. What is counted is what the step issues; the traffic of FSDP2 itself beside it is by its definition: two
gathers and a reduction of all parameters, of which a process has one part in N.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias
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
from fgo_geo.optim.base import manifold_of
from fgo_geo.optim.requests import StepRequest
from fgo_geo.paths.protocol import StepOptions, Weight

KINDS = ("sphere", "oblique", "stiefel", "euclidean")
Row: TypeAlias = dict[str, float]


def transformer() -> nn.Module:
    """24 layers of width 2,048: 1.2 billion numbers."""
    layer = nn.TransformerEncoderLayer(2048, 16, 8192, batch_first=True)
    return nn.TransformerEncoder(layer, 24, enable_nested_tensor=False)


MODELS: dict[str, Callable[[], nn.Module]] = {"ResNet-50": resnet50, "transformer, 1.2 billion": transformer}


def sharded(
    build: Callable[[], nn.Module], count: int, rank: int, manifolds: tuple[str, ...], strategy: str = "pio"
) -> nn.Module:
    """A model as one process of a group has it, without values."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=count)
    with torch.device("meta"):
        model = build()
    fgo_geo.constrain(model, strategy, manifolds)
    return fully_shard(model, mesh=init_device_mesh("cpu", (count,)))


def step_of_one_process(model: nn.Module) -> Row:
    """What a process sends to others in a step with momentum and has whole during it, in bytes; and costs of steps.

    Of an all-reduce it sends the values that it sums, which is within a factor of two of what an algorithm sends.
    """
    sent, summed = 0, 0

    def count_sums(values: Tensor, op: Any, group: Any) -> None:
        nonlocal summed
        summed += values.numel() * values.element_size()

    def count_parcels(
        received: Tensor, outgoing: Tensor, lengths: list[int], sent_lengths: list[int], group: Any
    ) -> None:
        nonlocal sent
        sent += (sum(sent_lengths) - sent_lengths[dist.get_rank(group)]) * outgoing.element_size()

    params = [param for param in model.parameters() if manifold_of(param) is not None]
    options = StepOptions(lr=0.1, momentum=0.9, step_size="theorem")
    weights = [Weight(p, p, manifold_of(p), p.detach(), p.detach()) for p in params]
    exchange = WeightExchange({}, lambda param: "", params[0])
    with (
        patch("torch.distributed.all_to_all_single", count_parcels),
        patch("torch.distributed.all_reduce", count_sums),
        patch.object(WeightExchange, "agree"),
    ):
        own = exchange.collect([StepRequest(options, weights)])[0].weights
        with patch.object(exchange, "_device", torch.device("cpu")):
            exchange.add_up([], None)
        exchange.put_back({w.owner: torch.empty(w.n_groups, device="meta") for w in own})
    costs = [step_cost(weight.manifold, weight.param.shape) for weight in own]
    owned = [cost for weight, cost in zip(own, costs, strict=True) if weight.share is None]
    return {
        "sent": sent,
        "summed": summed,
        "whole": 3 * 4 * sum(weight.param.numel() for weight in own if weight.share is None),
        "cost": sum(costs),
        "parts": sum(costs) - sum(owned),
        "dearest": max(owned, default=0.0),
        "total": sum(step_cost(weight.manifold, weight.param.shape) for weight in weights),
        "all": 4 * sum(param.numel() for param in model.parameters()),
    }


def count(name: str, strategy: str, processes: int, manifolds: tuple[str, ...], ranks: Iterable[int]) -> list[Row]:
    """What some of the processes count."""
    rows: list[Row] = []
    for rank in ranks:
        try:
            rows.append(step_of_one_process(sharded(MODELS[name], processes, rank, manifolds, strategy)))
        finally:
            dist.destroy_process_group()
    return rows


COLUMNS = (
    *("model", "strategy", "processes", "sent by a step, MB", "summed, KB", "FSDP2, MB", "share"),
    *("whole in a step, MB", "busiest process", "least possible"),
)


def line(name: str, strategy: str, processes: int, rows: Sequence[Row]) -> str:
    """A line of the table, from the counts of its processes or of those that have the largest.

    With whole weights the busiest process has at least the dearest of them and its part of what is dealt to all.
    """
    sent, whole, summed, dearest, cost = (
        max(row[key] for row in rows) for key in ("sent", "whole", "summed", "dearest", "cost")
    )
    fsdp = 3 * rows[0]["all"] * (processes - 1) / processes
    mean = rows[0]["total"] / processes
    least = max(mean, dearest + min(row["parts"] for row in rows))
    return (
        f"| {name} | {strategy} | {processes} | {sent / 1e6:.1f} | {summed / 1e3:.1f} | {fsdp / 1e6:.1f} "
        f"| {(sent + summed) / fsdp:.1%} | {whole / 1e6:.1f} | {cost / mean:.2f} | {least / mean:.2f} |"
    )


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--processes", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--strategies", nargs="+", default=["pio"])
    parser.add_argument("--manifolds", nargs="+", default=KINDS)
    options = parser.parse_args()
    print("|", " | ".join(COLUMNS), "|")
    print("|", " | ".join("---" for _ in COLUMNS), "|")
    for name, strategy, processes in itertools.product(MODELS, options.strategies, options.processes):
        rows = count(name, strategy, processes, tuple(options.manifolds), range(processes))
        print(line(name, strategy, processes, rows), flush=True)


if __name__ == "__main__":
    main()
