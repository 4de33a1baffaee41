"""Training a sharded model, and the same model on one process beside it; run by ``test_sharded.py``."""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import Shard

from fgo_geo import RiemannianFGSGD, channel_directed, constrain, on_manifolds, plan_of, unconstrain
from fgo_geo.distributed import fully_shard

PER_PROCESS = 4


class Block(nn.Module):
    """A residual block of two convolutions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
        self.norm = nn.GroupNorm(2, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(self.norm(self.first(x)).relu())


def residual_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3),
        Block(6),
        nn.Conv2d(6, 9, 1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(9, 7),
        nn.ReLU(),
        nn.Linear(7, 3),
    )


def transformer() -> nn.Sequential:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
    return nn.Sequential(nn.Linear(5, 8), layer, copy.deepcopy(layer), nn.Flatten(), nn.Linear(8 * 3, 2))


NETS: dict[str, tuple[Callable[[], nn.Sequential], tuple[int, ...]]] = {
    "residual": (residual_net, (3, 6, 6)),
    "transformer": (transformer, (3, 5)),
}


def data(net: str, step: int, count: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(count, *NETS[net][1], generator=generator, dtype=torch.float64).to(dtype)


def pair(net: str, dtype: torch.dtype = torch.float64, **settings: Any) -> tuple[nn.Sequential, nn.Sequential]:
    """The same constrained model sharded, in two groups of parameters, and whole."""
    models = []
    for _ in range(2):
        model = NETS[net][0]().to(dtype)
        constrain(model, **settings)
        models.append(model)
    sharded, single = models
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(sharded[1], mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    return sharded, single


def loss(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


def own_share(x: Tensor, rank: int) -> Tensor:
    return x[rank * PER_PROCESS : (rank + 1) * PER_PROCESS]


def whole(tensor: Any) -> Tensor:
    return tensor.detach().full_tensor() if hasattr(tensor, "full_tensor") else tensor.detach().as_subclass(Tensor)


def assert_equal(sharded: nn.Module, single: nn.Module, tolerance: float) -> None:
    for (name, a), b in zip(sharded.named_parameters(), single.parameters(), strict=True):
        difference = float((whole(a) - whole(b)).abs().max())
        assert difference <= tolerance, f"{name}: {difference}"


def train_both(
    rank: int,
    net: str,
    build: Callable[[nn.Module], torch.optim.Optimizer],
    between: Callable[[nn.Module, torch.optim.Optimizer], None] = lambda model, optimizer: None,
    steps: int = 6,
    **settings: Any,
) -> tuple[nn.Sequential, nn.Sequential, torch.optim.Optimizer, torch.optim.Optimizer]:
    """Train on a share of every batch, and on all of it."""
    models = pair(net, **settings)
    optimizers = [build(model) for model in models]
    for step in range(steps):
        x = data(net, step, PER_PROCESS * dist.get_world_size())
        for model, optimizer, own in zip(models, optimizers, (own_share(x, rank), x), strict=True):
            optimizer.zero_grad()
            loss(model, own).backward()
            between(model, optimizer)
            optimizer.step()
    return *models, *optimizers


def fg_sgd(**options: Any) -> Callable[[nn.Module], torch.optim.Optimizer]:
    return lambda model: RiemannianFGSGD(model.named_parameters(), lr=0.05, **options)


# -- as on one process ------------------------------------------------------------------------------------------

CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "pi": ("residual", {"strategy": "pi"}, {"momentum": 0.9, "weight_decay": 1e-3}),
    "po": ("residual", {"strategy": "po", "radius": "bound"}, {"momentum": 0.9, "nesterov": True}),
    "pio": ("transformer", {"strategy": "pio", "classifier": True}, {"momentum": 0.9, "dampening": 0.1}),
    "layer": ("transformer", {"strategy": "layer", "manifolds": "stiefel"}, {"norm": "running", "momentum": 0.8}),
    "angle": ("residual", {"manifolds": ("sphere", "oblique")}, {"step_size": "angle", "angle": 0.1}),
    "stabilised": ("residual", {}, {"momentum": 0.9, "stabilize": 2, "update": "exponential"}),
    "adapted": ("transformer", {}, {"adapt_euclidean": True, "momentum": 0.5}),
    "constant": ("transformer", {}, {"step_size": "constant"}),
}


def check_steps_are_those_of_one_process(rank: int, folder: Path) -> None:
    for name, (net, settings, options) in CASES.items():
        sharded, single, own, other = train_both(rank, net, fg_sgd(**options), **settings)
        try:
            assert_equal(sharded, single, 1e-9)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error
        scales, expected = own.step_scales(), other.step_scales()  # pyright: ignore
        assert len(scales) == len(expected) > 0
        for a, b in zip(scales.values(), expected.values(), strict=True):
            torch.testing.assert_close(a, b)


LONG: dict[str, tuple[str, dict[str, Any]]] = {
    "pi": ("residual", {"strategy": "pi", "radius": "bound"}),
    "po": ("residual", {"strategy": "po"}),
    "pio": ("residual", {"strategy": "pio", "statistics": "std"}),
    "layer": ("residual", {"strategy": "layer", "manifolds": "oblique"}),
    "transformer, pi": ("transformer", {"strategy": "pi"}),
    "transformer, po": ("transformer", {"strategy": "po"}),
    "transformer, pio": ("transformer", {"strategy": "pio", "manifolds": ("sphere", "stiefel"), "statistics": "max1"}),
    "transformer, layer": ("transformer", {"strategy": "layer", "manifolds": "stiefel"}),
    "pi, λ": ("residual", {"strategy": "pi", "statistics": "std"}),
    "po, λ": ("residual", {"strategy": "po", "statistics": "max1"}),
    "layer, λ": ("residual", {"strategy": "layer", "manifolds": "sphere", "statistics": "std"}),
    "transformer, po, λ": ("transformer", {"strategy": "po", "statistics": "std"}),
}


def fifty_steps(rank: int) -> None:
    """Fifty steps with momentum of a global batch are those of one process, which the first one takes beside.

    Statistics of features are unbiased estimates over what each process sees: where they count, all see everything.
    """
    alone = dist.new_group([0])
    for name, (net, settings) in LONG.items():
        sharded, single = pair(net, **settings)
        optimizers = [fg_sgd(momentum=0.9, weight_decay=1e-3)(model) for model in (sharded, single)]
        has_statistics = "statistics" in settings
        for step in range(50):
            x = data(net, step % 7, PER_PROCESS * dist.get_world_size())
            share = x if has_statistics else own_share(x, rank)
            for model, optimizer, own in zip((sharded, single), optimizers, (share, x), strict=True):
                if model is sharded or rank == 0:
                    optimizer.zero_grad()
                    loss(model, own).backward()
                    optimizer.step()
                    if has_statistics and step % 10 == 9:
                        plan_of(model).update_scales(optimizer, None if model is sharded else alone)
        differences = torch.zeros(2, dtype=torch.float64)
        for a, b in zip(sharded.parameters(), single.parameters(), strict=True):
            found = whole(a), whole(optimizers[0].state[a]["momentum_buffer"])
            expected = (b, optimizers[1].state[b]["momentum_buffer"]) if rank == 0 else found
            more = [(u - whole(v)).abs().max() for u, v in zip(found, expected, strict=True)]
            differences = torch.maximum(differences, torch.stack(more))
        dist.broadcast(differences, 0)
        assert float(differences.max()) <= 1e-6, f"{name}: {differences.tolist()} of weights and momentum"


def check_fifty_steps(rank: int, folder: Path) -> None:
    fifty_steps(rank)


def check_another_optimiser_on_manifolds(rank: int, folder: Path) -> None:
    def build(model: nn.Module) -> torch.optim.Optimizer:
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
        on_manifolds(optimizer, step_size="constant")
        return optimizer

    sharded, single, *_ = train_both(rank, "transformer", build)
    assert_equal(sharded, single, 1e-6)


def check_a_rule_of_ones_own_keeps_its_buffer(rank: int, folder: Path) -> None:
    """At momentum zero too, where the rule of FG-SGD keeps none."""

    class Summing(RiemannianFGSGD):
        @staticmethod
        def rule(manifold: Any, x: Tensor, grad: Tensor, buffer: Tensor | None, options: Any) -> tuple[Tensor, Tensor]:
            total = grad if buffer is None else buffer + grad
            return total, total

    sharded, single, own, other = train_both(rank, "residual", lambda model: Summing(model.named_parameters(), lr=0.05))
    assert_equal(sharded, single, 1e-9)
    for name, param in plan_of(single).parameters().items():
        buffer = own.state[sharded.get_parameter(name)]["momentum_buffer"]
        torch.testing.assert_close(whole(buffer), other.state[param]["momentum_buffer"])


def check_directed_gradients_of_replicas(rank: int, folder: Path) -> None:
    """Under DistributedDataParallel gradients are averaged before they are smoothed along the channels."""
    models: list[nn.Module] = []
    for is_replica in (True, False):
        model = residual_net().double()
        constrain(model)
        models.append(nn.parallel.DistributedDataParallel(model) if is_replica else model)
    optimizers = [fg_sgd(momentum=0.9)(model) for model in models]
    for model, optimizer in zip(models, optimizers, strict=True):
        assert channel_directed(optimizer, "h1", 2.0, module=model).parameters
    for step in range(4):
        x = data("residual", step, PER_PROCESS * dist.get_world_size())
        for model, optimizer, own in zip(models, optimizers, (own_share(x, rank), x), strict=True):
            optimizer.zero_grad()
            loss(model, own).backward()
            optimizer.step()
    assert_equal(*models, 1e-9)


def check_another_optimiser_of_replicas(rank: int, folder: Path) -> None:
    """Under DistributedDataParallel, to the bit one process that sums the gradients of the same parts of a batch."""
    kinds: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
        "theorem": lambda params: torch.optim.AdamW(params, lr=0.05, weight_decay=0.1),
        "constant": lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9, nesterov=True),
        "angle": lambda params: torch.optim.Adam(params, lr=0.05, amsgrad=True),
    }
    for (step_size, build), net in itertools.product(kinds.items(), NETS):
        models: list[nn.Module] = []
        for is_replica in (True, False):
            model = NETS[net][0]()
            constrain(model, "pio", ("sphere", "oblique", "stiefel"))
            models.append(nn.parallel.DistributedDataParallel(model) if is_replica else model)
        optimizers = [build(model.parameters()) for model in models]
        handles = [on_manifolds(optimizer, step_size) for optimizer in optimizers]  # pyright: ignore
        for step in range(4):
            shares = data(net, step, PER_PROCESS * dist.get_world_size(), torch.float32).chunk(dist.get_world_size())
            for model, optimizer, own in zip(models, optimizers, (shares[rank : rank + 1], shares), strict=True):
                optimizer.zero_grad()
                for part in own:
                    (loss(model, part) / len(own)).backward()
                optimizer.step()
        assert_equal(*models, 0.0)
        scales = [handle.step_scales().values() for handle in handles]
        assert all(torch.equal(a, b) for a, b in zip(*scales, strict=True))
        for param in plan_of(models[1]).parameters().values():
            assert float(param.manifold.violation(param.detach()).max()) < 1e-5


def check_clipped_gradients(rank: int, folder: Path) -> None:
    norms: list[float] = []

    def clip(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        norm: Any = nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        norms.append(float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm))

    sharded, single, *_ = train_both(rank, "residual", fg_sgd(momentum=0.9), clip)
    assert_equal(sharded, single, 1e-9)
    assert all(abs(a - b) < 1e-9 and a > 0.05 for a, b in zip(norms[::2], norms[1::2], strict=True))


def check_radii_that_follow_the_features(rank: int, folder: Path) -> None:
    """Statistics are of what a process has seen: both see everything here."""
    sharded, single = pair("residual", statistics="std", radius=0.5)
    optimizers = [fg_sgd(momentum=0.9)(model) for model in (sharded, single)]
    for step in range(4):
        x = data("residual", step, PER_PROCESS)
        for model, optimizer in zip((sharded, single), optimizers, strict=True):
            optimizer.zero_grad()
            loss(model, x).backward()
            optimizer.step()
            plan_of(model).update_scales(optimizer)
    assert_equal(sharded, single, 1e-9)
    scales = [entry.channel_scales for entry in plan_of(sharded).constrained]
    assert scales == [entry.channel_scales for entry in plan_of(single).constrained]
    assert any(abs(scale - 1) > 1e-2 for own in scales for scale in own)


# -- to the bit ------------------------------------------------------------------------------------------------


def check_identical_gradients_give_identical_bits(rank: int, folder: Path) -> None:
    """The owner steps the whole weight by the path that one process takes."""
    from torch.distributed.tensor import distribute_tensor

    for net in NETS:
        # Stiefel matrices of one shape are multiplied in one batch, and not where they have different owners.
        kinds = ("sphere", "oblique", "stiefel") if net == "residual" else ("sphere", "oblique", "euclidean")
        for strategy in ("po", "pio", "layer"):
            settings = {"strategy": strategy, "manifolds": kinds[1] if strategy == "layer" else kinds}
            sharded, single = pair(net, torch.float32, **settings)
            optimizers = [fg_sgd(momentum=0.9, weight_decay=1e-3)(model) for model in (sharded, single)]
            for step in range(4):
                optimizers[1].zero_grad()
                loss(single, data(net, step, 8, torch.float32)).backward()
                for a, b in zip(sharded.parameters(), single.parameters(), strict=True):
                    assert b.grad is not None
                    a.grad = distribute_tensor(b.grad.as_subclass(Tensor), a.device_mesh, a.placements)  # pyright: ignore
                for optimizer in optimizers:
                    optimizer.step()
            assert_equal(sharded, single, 0.0)
            for a, b in zip(sharded.parameters(), single.parameters(), strict=True):
                buffers = [own.state[p]["momentum_buffer"] for own, p in zip(optimizers, (a, b), strict=True)]
                assert torch.equal(*map(whole, buffers))


@contextlib.contextmanager
def counted() -> Generator[dict[str, int]]:
    """Bytes that this process gives to collectives."""
    bytes_of: dict[str, int] = {"all_to_all_single": 0, "all_reduce": 0}

    def counting(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            sent = arguments[1] if name == "all_to_all_single" else arguments[0]
            bytes_of[name] += sent.numel() * sent.element_size()
            return original(*arguments, **options)

        return call

    with contextlib.ExitStack() as stack:
        for name in bytes_of:
            stack.enter_context(patch.object(dist, name, counting(name, getattr(dist, name))))
        yield bytes_of


AGREEMENTS = 2 * 3 * 8  # three words, twice


def check_the_bytes_of_matrices(rank: int, folder: Path) -> None:
    """Weight, gradient and momentum in, weight and momentum out, and ``τ`` to everybody; and two words of agreement."""
    sharded, _ = pair("transformer")
    optimizer = fg_sgd(momentum=0.9)(sharded)
    for step in range(2):
        loss(sharded, data("transformer", step, PER_PROCESS)).backward()
        with counted() as bytes_of:
            optimizer.step()
        total = torch.tensor(bytes_of["all_to_all_single"])
        dist.all_reduce(total)
        params: Any = plan_of(sharded).parameters().values()
        numbers = sum(p.numel() for p in params)
        groups = sum(p.manifold.n_groups for p in params)
        copies = 5 if step else 4  # no momentum comes in in the first step
        assert int(total) == 8 * (copies * numbers + dist.get_world_size() * groups)
        assert bytes_of["all_reduce"] == AGREEMENTS


def convolutions() -> nn.Sequential:
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 10, 3), nn.ReLU(), nn.Conv2d(10, 9, 3), nn.ReLU(), nn.ConvTranspose2d(9, 8, (2, 3)))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))


def check_the_bytes_of_kernels(rank: int, folder: Path) -> None:
    """Kernels are stepped where they are: PO exchanges nothing, others the sums of the groups that are spread."""
    for strategy in ("po", "pi", "pio", "layer"):
        model = convolutions().double()
        plan = constrain(model, strategy, "oblique", first_layer=True)
        spread = 0
        for param in plan.parameters().values():
            into = param.shape[1]
            if param.shape[2] == 2:  # a transposed convolution, which is cut along its input channels
                spread += {"po": into, "pi": 0, "pio": into, "layer": 1}[strategy]
            else:
                spread += {"po": 0, "pi": into, "pio": into // 2, "layer": 1}[strategy]
        n_spread = sum(strategy != ("pi" if p.shape[2] == 2 else "po") for p in plan.parameters().values())
        groups = sum(p.manifold.n_groups for p in plan.parameters().values())
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
        optimizer = fg_sgd(momentum=0.9)(model)
        for step in range(2):
            loss(model, data("residual", step, PER_PROCESS)).backward()
            with counted() as bytes_of:
                optimizer.step()
            assert bytes_of["all_to_all_single"] == 0
            sums = 8 * (1 + n_spread + spread)  # a word for errors, and for gradients that cannot be squared
            assert bytes_of["all_reduce"] == AGREEMENTS + (sums if spread else 0), strategy
        with counted() as bytes_of:
            scales: Any = optimizer.step_scales()  # pyright: ignore
            optimizer.step_scales()  # pyright: ignore
        assert bytes_of == {"all_to_all_single": 0, "all_reduce": 8 * groups}
        assert {len(tau) for tau in scales.values()} == {p.manifold.n_groups for p in plan.parameters().values()}
        assert all(bool((tau >= 1).all()) for tau in scales.values())
        for param in plan.parameters().values():
            buffer = optimizer.state[param]["momentum_buffer"].to_local()
            assert buffer.numel() == param.to_local().numel()  # pyright: ignore
            assert buffer.shape[0] in (len(param) // 2, -(-len(param) // 2))


def check_gradients_that_cannot_be_squared(rank: int, folder: Path) -> None:
    """They are divided by the same power of two everywhere, though one process alone has the large ones."""
    from torch.distributed.tensor import distribute_tensor

    huge = {"step_size": "theorem", "norm": "running"}, {"step_size": "theorem"}, {"step_size": "constant"}
    for options, factor in (*((own, 1e25) for own in huge), ({"step_size": "angle", "angle": 0.1}, 1e-30)):
        for strategy in ("pi", "pio", "layer"):
            models = [convolutions() for _ in range(2)]
            for model in models:
                constrain(model, strategy, "sphere")
            fully_shard(models[0], mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
            optimizers = [fg_sgd(momentum=0.9, weight_decay=1e-3, **options)(model) for model in models]
            for step in range(2):
                optimizers[1].zero_grad()
                loss(models[1], data("residual", step, 4, torch.float32)).backward()
                models[1][2].weight.grad[-1:] *= factor  # pyright: ignore  of the last process
                for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
                    assert b.grad is not None
                    a.grad = distribute_tensor(b.grad.as_subclass(Tensor), a.device_mesh, a.placements)  # pyright: ignore
                for optimizer in optimizers:
                    optimizer.step()
            assert_equal(*models, 2e-6)  # pyright: ignore
            moved = whole(models[0][2].weight) - convolutions()[2].weight.detach()  # pyright: ignore
            assert float(moved.abs().max()) > 1e-3


# -- what FSDP2 offers -----------------------------------------------------------------------------------------


def check_accumulated_gradients(rank: int, folder: Path) -> None:
    sharded, single = pair("residual")
    optimizers = [fg_sgd(momentum=0.9)(model) for model in (sharded, single)]
    for step in range(3):
        x = data("residual", step, PER_PROCESS * dist.get_world_size())
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss(single, x).backward()
        for number, part in enumerate(own_share(x, rank).chunk(2)):
            sharded.set_requires_gradient_sync(number == 1)  # pyright: ignore
            (loss(sharded, part) / 2).backward()
        for optimizer in optimizers:
            optimizer.step()
    assert_equal(sharded, single, 1e-9)


def trained_in_bfloat16(net: str, strategy: str, rank: int, is_sharded: bool, parts: int) -> tuple[nn.Module, Any]:
    """A model and its optimiser after fifty steps, with the gradients of a batch summed over so many parts of it."""
    count = dist.get_world_size()
    meshes = init_device_mesh("cpu", (count, 1), mesh_dim_names=("all", "alone"))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model: Any = NETS[net][0]()
    constrain(model, strategy)
    for module in (model[1], model):
        fully_shard(module, mesh=meshes["all" if is_sharded else "alone"], mp_policy=policy)
    optimizer = fg_sgd(momentum=0.9, weight_decay=1e-3)(model)
    for step in range(50):
        x = data(net, step % 7, PER_PROCESS * count, torch.float32)
        optimizer.zero_grad()
        for part in (own_share(x, rank) if is_sharded else x).chunk(parts):
            value = loss(model, part)
            assert value.dtype == torch.bfloat16
            (value / parts).backward()
        optimizer.step()
    return model, optimizer


def check_fifty_steps_in_bfloat16(rank: int, folder: Path) -> None:
    """Computed in bfloat16, with float32 weights, as by one process that sums the gradients of the same parts.

    To the bit where no matrices are batched. A forward pass over the whole batch would round otherwise: after fifty
    steps it is 1e-3 (residual) and 1e-1 (transformer) away.
    """
    for net, strategy, tolerance in (("residual", "po", 0.0), ("transformer", "po", 2e-6), ("transformer", "pi", 2e-6)):
        sharded, optimizer = trained_in_bfloat16(net, strategy, rank, is_sharded=True, parts=1)
        single, other = trained_in_bfloat16(net, strategy, rank, is_sharded=False, parts=dist.get_world_size())
        assert_equal(sharded, single, tolerance)
        for a, b in zip(sharded.parameters(), single.parameters(), strict=True):
            assert a.dtype == torch.float32
            buffer = whole(optimizer.state[a]["momentum_buffer"])
            torch.testing.assert_close(buffer, whole(other.state[b]["momentum_buffer"]), rtol=0, atol=tolerance)
        for param in plan_of(sharded).parameters().values():
            assert float(param.manifold.violation(whole(param)).max()) < 1e-5  # pyright: ignore


def check_ignored_parameters(rank: int, folder: Path) -> None:
    """Torch neither shards nor averages them: averaged by hand, they are stepped by everybody for himself."""
    models = []
    for _ in range(2):
        model = residual_net().double()
        constrain(model)
        models.append(model)
    sharded, single = models
    ignored: Any = sharded[1].second.weight, sharded[6].weight
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(sharded[1], mesh=mesh, ignored_params=set(ignored))
    fully_shard(sharded, mesh=mesh, ignored_params=set(ignored))
    assert sharded[1].second.weight is ignored[0]
    optimizers = [fg_sgd(momentum=0.9)(model) for model in models]
    for step in range(4):
        x = data("residual", step, PER_PROCESS * dist.get_world_size())
        for model, optimizer, own in zip(models, optimizers, (own_share(x, rank), x), strict=True):
            optimizer.zero_grad()
            loss(model, own).backward()
            for param in ignored if model is sharded else ():
                dist.all_reduce(param.grad.as_subclass(Tensor))
                param.grad /= dist.get_world_size()
            optimizer.step()
    assert_equal(sharded, single, 1e-9)


def check_offloading_on_the_cpu(rank: int, folder: Path) -> None:
    """Where the device is the CPU it changes nothing; elsewhere constrained weights are refused."""
    from torch.distributed.fsdp import CPUOffloadPolicy

    models = []
    for _ in range(2):
        model = residual_net().double()
        constrain(model)
        models.append(model)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(models[0], mesh=mesh, offload_policy=CPUOffloadPolicy(pin_memory=False))
    optimizers = [fg_sgd(momentum=0.9)(model) for model in models]
    for step in range(3):
        x = data("residual", step, PER_PROCESS * dist.get_world_size())
        for model, optimizer, own in zip(models, optimizers, (own_share(x, rank), x), strict=True):
            optimizer.zero_grad()
            loss(model, own).backward()
            optimizer.step()
    assert_equal(*models, 1e-9)
    model = residual_net()
    constrain(model)
    with pytest.raises(ValueError, match=r"would be kept on the CPU.*leave offload_policy out"):
        fully_shard(model, offload_policy=CPUOffloadPolicy())


def check_another_dimension_is_sharded(rank: int, folder: Path) -> None:
    models = [nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4)).double() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    for model in models:
        dist.broadcast_object_list(states := [model.state_dict()])
        model.load_state_dict(states[0])
        constrain(model, classifier=True)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(models[0], mesh=mesh, shard_placement_fn=lambda p: Shard(1) if p.ndim == 2 else None)
    x = torch.randn(4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for model in models:
        optimizer = fg_sgd(momentum=0.9)(model)
        for _ in range(3):
            optimizer.zero_grad()
            loss(model, x).backward()
            optimizer.step()
    assert_equal(*models, 1e-9)


def check_tensor_parallel(rank: int, folder: Path) -> None:
    """The plan says by name where a weight lives; whoever dealt it."""
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    models = []
    for _ in range(2):
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 2)).double()
        constrain(model, classifier=True)
        models.append(model)
    parallel, single = models
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    parallelize_module(parallel, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    plan_of(parallel).attach(parallel)
    from fgo_geo.distributed import declare_plain

    declare_plain(parallel)
    optimizers = [fg_sgd(momentum=0.9, weight_decay=1e-2)(model) for model in models]
    for step in range(4):
        x = torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            loss(model, x).backward()
            optimizer.step()
    assert_equal(parallel, single, 1e-9)


def check_tensor_parallel_filters(rank: int, folder: Path) -> None:
    """Rows that are components stay where ColwiseParallel puts them; RowwiseParallel cuts through them."""
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    from fgo_geo.distributed import declare_plain

    models = []
    for _ in range(2):
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 2)).double()
        constrain(model, "pi", ("sphere", "oblique"), components="filter", classifier=True, first_layer=True)
        models.append(model)
    parallel, single = models
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    parallelize_module(parallel, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    plan_of(parallel).attach(parallel)
    declare_plain(parallel)
    numbers = {name: parallel.get_parameter(name).numel() for name in ("2.weight",)}
    optimizers = [fg_sgd(momentum=0.9)(model) for model in models]
    for step in range(4):
        x = torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            loss(model, x).backward()
            with counted() as bytes_of:
                optimizer.step()
            if model is parallel:
                total = torch.tensor(bytes_of["all_to_all_single"])
                dist.all_reduce(total)
                groups = dist.get_world_size() * 2
                assert int(total) == 8 * ((5 if step else 4) * numbers["2.weight"] + groups)
    assert_equal(parallel, single, 1e-9)


# -- the plan of a sharded model -------------------------------------------------------------------------------


def check_projection_and_the_way_back(rank: int, folder: Path) -> None:
    sharded, single = pair("residual")
    x = data("residual", 0, 4)
    for model in (sharded, single):
        with torch.no_grad():
            loss(model, x)  # leaves the parameters of the root whole
            params = plan_of(model).parameters()
            for param in params.values():
                param.mul_(1.5)
            plan_of(model).project()
            for name in params:
                assert model.get_parameter(name) is params[name]
    assert_equal(sharded, single, 1e-12)
    unconstrain(sharded)
    optimizer = RiemannianFGSGD(sharded.parameters(), lr=0.1)
    loss(sharded, x).backward()
    optimizer.step()
    assert not optimizer.step_scales()


def check_a_state_dict_of_another_plan(rank: int, folder: Path) -> None:
    """Loading takes over the plan, as without shards, and refuses values that are off."""
    sharded, _ = pair("residual", seed=1)
    other, single = pair("residual", seed=2)
    state = other.state_dict()
    assert sharded.load_state_dict(state).missing_keys == []
    assert plan_of(sharded).to_json() == plan_of(single).to_json()
    optimizer = fg_sgd()(sharded)
    loss(sharded, data("residual", 0, 4)).backward()
    optimizer.step()
    key = plan_of(sharded).constrained[0].name
    state[key] = state[key] * 1.5
    with pytest.raises(ValueError, match="does not lie on its"):
        sharded.load_state_dict(state)


def check_saving_and_loading_the_optimiser(rank: int, folder: Path) -> None:
    sharded, _ = pair("residual")
    optimizer = fg_sgd(momentum=0.9, norm="running")(sharded)

    def go_on(model: nn.Module, own: torch.optim.Optimizer, steps: range) -> list[Tensor]:
        for step in steps:
            own.zero_grad()
            loss(model, own_share(data("residual", step, PER_PROCESS * dist.get_world_size()), rank)).backward()
            own.step()
        return [whole(param) for param in model.parameters()]

    go_on(sharded, optimizer, range(3))
    saved = copy.deepcopy((sharded.state_dict(), optimizer.state_dict()))
    expected = go_on(sharded, optimizer, range(3, 6))
    twin, _ = pair("residual", seed=5)
    again = fg_sgd(momentum=0.9, norm="running")(twin)
    twin.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    assert all(torch.equal(a, b) for a, b in zip(expected, go_on(twin, again, range(3, 6)), strict=True))
