"""Distributed checkpoints of a group of processes, the second of which loads what the first has saved."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from sharded_steps import NETS, data, loss, whole
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard as torch_fully_shard
from torch.distributed.tensor import distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from fgo_geo import RiemannianFGSGD, constrain, plan_of
from fgo_geo.distributed import TrainingState, fully_shard

Built = tuple[nn.Module, RiemannianFGSGD]


def build(
    seed: int = 0, kind: str = "fsdp", net: str = "residual", dtype: torch.dtype = torch.float64, **settings: Any
) -> Built:
    model = NETS[net][0]().to(dtype)
    constrain(model, seed=seed, **settings)
    if kind == "fsdp":
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        fully_shard(model[1], mesh=mesh)
        fully_shard(model, mesh=mesh)
    net: nn.Module = DistributedDataParallel(model) if kind == "ddp" else model
    return net, RiemannianFGSGD(net.named_parameters(), lr=0.05, momentum=0.9, norm="running")


def go_on(built: Built, rank: int, steps: range, scales: bool = False, net: str = "residual") -> list[Tensor]:
    """Steps on a process's part of a batch of eight, however many processes share it."""
    model, optimizer = built
    for step in steps:
        optimizer.zero_grad()
        x = data(net, step, 8, next(model.parameters()).dtype)
        loss(model, x.chunk(dist.get_world_size())[rank]).backward()
        optimizer.step()
        if scales:
            plan_of(model).update_scales(optimizer)
    return [whole(param).clone() for param in model.parameters()]


def equal(some: list[Tensor], others: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


def check_going_on_is_identical(rank: int, folder: Path) -> None:
    for kind in ("fsdp", "ddp"):
        first = build(kind=kind)
        go_on(first, rank, range(3))
        dcp.save({"app": TrainingState(*first)}, checkpoint_id=folder / kind)
        expected = go_on(first, rank, range(3, 6))
        second = build(seed=7, kind=kind)
        dcp.load({"app": TrainingState(*second)}, checkpoint_id=folder / kind)
        assert plan_of(second[0]).to_json() == plan_of(first[0]).to_json()
        assert equal(expected, go_on(second, rank, range(3, 6)))
        scales = [own[1].step_scales() for own in (first, second)]
        assert all(torch.equal(a, b) for a, b in zip(*(own.values() for own in scales), strict=True))


def check_from_shards_to_replicas_and_back(rank: int, folder: Path) -> None:
    for kind, other in (("fsdp", "ddp"), ("ddp", "fsdp")):
        first = build(kind=kind)
        go_on(first, rank, range(2))
        path = folder / f"{kind}-to-{other}"
        dcp.save({"app": TrainingState(*first)}, checkpoint_id=path)
        second = build(seed=3, kind=other)
        dcp.load({"app": TrainingState(*second)}, checkpoint_id=path)
        for a, b in zip(go_on(first, rank, range(2, 4)), go_on(second, rank, range(2, 4)), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


def check_before_the_first_step(rank: int, folder: Path) -> None:
    """The keys are the same on all processes, and before and after a step."""
    built = build()
    keys = set(TrainingState(*built).state_dict()["optimizer"]["state"])
    told: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(told, keys)
    assert all(other == keys for other in told)
    go_on(built, rank, range(1))
    assert set(TrainingState(*built).state_dict()["optimizer"]["state"]) == keys


def check_radii_of_features(rank: int, folder: Path) -> None:
    first = build(statistics="std", radius=0.5)
    go_on(first, rank, range(3), scales=True)
    dcp.save({"app": TrainingState(*first)}, checkpoint_id=folder / "scales")
    second = build(statistics="std", radius=0.5)
    dcp.load({"app": TrainingState(*second)}, checkpoint_id=folder / "scales")
    expected, found = (plan_of(own[0]).constrained for own in (first, second))
    assert [entry.channel_scales for entry in expected] == [entry.channel_scales for entry in found]
    assert any(abs(scale - 1) > 1e-2 for entry in found for scale in entry.channel_scales)
    go_on(second, rank, range(3, 4))


def check_saving_while_training_goes_on(rank: int, folder: Path) -> None:
    first = build()
    at_save = go_on(first, rank, range(2))
    others = dist.new_group(backend="gloo")  # the thread that saves has collectives of its own
    future: Any = dcp.async_save({"app": TrainingState(*first)}, checkpoint_id=folder / "async", process_group=others)
    go_on(first, rank, range(2, 4))
    future.result()
    second = build(seed=1)
    dcp.load({"app": TrainingState(*second)}, checkpoint_id=folder / "async")
    assert equal(at_save, [whole(param) for param in second[0].parameters()])


def check_another_plan_is_noticed(rank: int, folder: Path) -> None:
    """In place and without the plan: by the state dict, and by that of the optimiser."""
    model, optimizer = build()
    dcp.save({"model": model.state_dict()}, checkpoint_id=folder / "values")
    saved = optimizer.state_dict()
    other, own = build(seed=5)
    state = {"model": other.state_dict()}
    dcp.load(state, checkpoint_id=folder / "values")
    with pytest.raises(ValueError, match="does not lie on its"):
        other.load_state_dict(state["model"])
    with pytest.raises(ValueError, match="does not lie on its"):
        own.load_state_dict(saved)
    with pytest.raises(ValueError, match="does not lie on its"):
        RiemannianFGSGD(other.parameters(), lr=0.1)


def check_saved_for_one_process(rank: int, folder: Path) -> None:
    """What ``test_sharded_checkpoints.py`` loads when this group has ended."""
    built = build()
    weights = go_on(built, rank, range(2))
    dcp.save({"app": TrainingState(*built)}, checkpoint_id=folder / "one")
    if rank == 0:
        names = [name for name, _ in built[0].named_parameters()]
        torch.save(dict(zip(names, weights, strict=True)), folder / "weights.pt")


# -- from two processes to four ----------------------------------------------------------------------------------

FOR_FOUR: dict[str, tuple[str, dict[str, Any]]] = {
    "residual": ("residual", {"statistics": "std", "radius": 0.5}),
    "transformer": ("transformer", {"strategy": "pi"}),
    # To the bit: matrices that owners step whole, but for Stiefel matrices of one shape, which are multiplied in one
    # batch where they have the same owner.
    "bits": ("transformer", {"manifolds": ("sphere", "oblique", "euclidean")}),
}


def type_of(name: str) -> torch.dtype:
    return torch.float32 if name == "bits" else torch.float64


def go_on_for_four(name: str, built: Built, rank: int, steps: range) -> list[Tensor]:
    """Three more steps, by the gradients of a batch or, for comparing bits, by gradients that are given."""
    if name != "bits":
        return go_on(built, rank, steps, net=FOR_FOUR[name][0])
    model, optimizer = built
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for param in model.parameters():
            grad = torch.randn(param.shape, generator=generator, dtype=param.dtype)
            param.grad = distribute_tensor(grad, param.device_mesh, param.placements)  # pyright: ignore
        optimizer.step()
    return [whole(param).clone() for param in model.parameters()]


def state_of(built: Built) -> list[Tensor]:
    """Weights, momentum and running norms, whole."""
    model, optimizer = built
    params = list(model.parameters())
    states = [optimizer.state[param] for param in params]
    keys = ("momentum_buffer", "norm_squared")
    return [whole(t).clone() for t in [*params, *(own[key] for key in keys for own in states if key in own)]]


def check_saved_for_four_processes(rank: int, folder: Path) -> None:
    for name, (net, settings) in FOR_FOUR.items():
        built = build(net=net, dtype=type_of(name), **settings)
        go_on(built, rank, range(3), net=net)
        if "statistics" in settings:
            plan_of(built[0]).update_scales(built[1])
        dcp.save({"app": TrainingState(*built)}, checkpoint_id=folder / name)
        kept = {"plan": plan_of(built[0]).to_json(), "state": state_of(built)}
        kept["end"] = go_on_for_four(name, built, rank, range(3, 6))
        if rank == 0:
            torch.save(kept, folder / f"{name}.pt")


def four_go_on_as_two(rank: int, folder: Path) -> None:
    """Run by four processes after the two have ended: another seed, other owners, the same weights."""
    for name, (net, settings) in FOR_FOUR.items():
        expected = torch.load(folder / f"{name}.pt", weights_only=True)
        built = build(seed=7, net=net, dtype=type_of(name), **settings)
        assert plan_of(built[0]).to_json() != expected["plan"]
        dcp.load({"app": TrainingState(*built)}, checkpoint_id=folder / name)
        assert plan_of(built[0]).to_json() == expected["plan"]
        found = state_of(built)
        assert len(found) > 2 * len(list(built[0].parameters()))  # with running norms
        assert equal(expected["state"], found)
        for a, b in zip(expected["end"], go_on_for_four(name, built, rank, range(3, 6)), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0 if name == "bits" else 1e-9)


def four_take_the_values_alone(rank: int, folder: Path) -> None:
    for name, (net, _) in FOR_FOUR.items():
        model = NETS[net][0]().to(type_of(name))
        torch_fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
        dcp.load({"app": TrainingState(model)}, checkpoint_id=folder / name)
        weights = torch.load(folder / f"{name}.pt", weights_only=True)["state"]
        params = list(model.parameters())
        assert equal(weights[: len(params)], [whole(param) for param in params])


def check_the_guide_runs(rank: int, folder: Path) -> None:
    page = (Path(__file__).parents[1] / "docs" / "guides" / "many-gpus.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    assert len(blocks) > 5
    before = Path.cwd()
    os.chdir(folder)
    try:
        namespace: dict[str, Any] = {}
        for number, block in enumerate(blocks):
            exec(compile(block, f"many-gpus.md, block {number}", "exec"), namespace)
    finally:
        os.chdir(before)
    model, resumed = namespace["model"], namespace["resumed"]
    assert plan_of(model).to_json() == plan_of(resumed).to_json()
    for param in plan_of(resumed).parameters().values():
        assert float(param.manifold.violation(whole(param)).max()) < 1e-5  # pyright: ignore
