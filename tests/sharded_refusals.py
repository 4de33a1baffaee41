"""What every process of a group does to see a wrong use refused; run by ``test_sharded_refusals.py``."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import geoopt
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard as torch_fully_shard
from torch.nn.parallel import DistributedDataParallel

from fgo_geo import RiemannianFGSGD, ScaledSphere, Stiefel, channel_directed, constrain, on_manifolds, plan_of, report
from fgo_geo.distributed import declare_plain, exchange, fully_shard
from fgo_geo.manifolds import REPLACED
from fgo_geo.measures.report import reading


def mesh() -> DeviceMesh:
    return init_device_mesh("cpu", (dist.get_world_size(),))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.Flatten(), nn.Linear(20, 8), nn.ReLU(), nn.Linear(8, 3)
    ).double()


def constrained(**settings: Any) -> nn.Sequential:
    model = net()
    constrain(model, **settings)
    return model


def images(seed: int = 0) -> Tensor:
    return torch.randn(4, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def backward(model: nn.Module, seed: int = 0) -> None:
    model(images(seed)).square().mean().backward()


def sharded(shard: Callable[..., Any] = fully_shard, **settings: Any) -> nn.Sequential:
    model = constrained(**settings)
    shard(model[2], mesh=mesh())
    shard(model, mesh=mesh())
    return model


def whole(model: nn.Module) -> list[Tensor]:
    return [p.detach().full_tensor() for p in model.parameters()]  # pyright: ignore


def violation(model: nn.Module) -> float:
    params = plan_of(model).parameters().values()
    return max(float(p.manifold.violation(p.detach().full_tensor()).max()) for p in params)  # pyright: ignore


# -- replicas -------------------------------------------------------------------------------------------------


def check_constrain_after_wrapping(rank: int, folder: Path) -> None:
    wrapper = DistributedDataParallel(net(), find_unused_parameters=True)
    constrain(wrapper.module)
    with pytest.raises(RuntimeError, match=r"does not know 2 constrained.*'?2\.weight'?.*before wrapping"):
        wrapper(images(rank))
    with torch.no_grad():
        wrapper(images(rank))


def check_a_load_that_replaces_after_wrapping(rank: int, folder: Path) -> None:
    wrapper = DistributedDataParallel(constrained(), find_unused_parameters=True)
    backward(wrapper, rank)
    wrapper.module.load_state_dict(copy.deepcopy(wrapper.module.state_dict()), assign=True)
    with pytest.raises(RuntimeError, match="load with assign=True, before wrapping it"):
        wrapper(images(rank))


def check_a_part_that_is_constrained_after_wrapping(rank: int, folder: Path) -> None:
    model = net()
    wrapper = DistributedDataParallel(nn.Sequential(model, nn.Linear(3, 2).double()), find_unused_parameters=True)
    constrain(model)
    with pytest.raises(RuntimeError, match="does not know"):
        wrapper(images(rank))


def check_seeds_that_differ(rank: int, folder: Path) -> None:
    wrapper = DistributedDataParallel(constrained(seed=rank))
    with pytest.raises(
        ValueError, match=r"plans differ between processes, first for '2\.weight'.*same arguments and seed"
    ):
        wrapper(images(rank))


def check_radii_that_differ(rank: int, folder: Path) -> None:
    wrapper = DistributedDataParallel(constrained(radius={"4": 1.0 + rank}))
    with pytest.raises(ValueError, match=r"plans differ between processes, first for '4\.weight'"):
        wrapper(images(rank))


def check_equal_plans_are_compared_once(rank: int, folder: Path) -> None:
    wrapper = DistributedDataParallel(constrained())
    backward(wrapper)
    if rank == 0:  # what replaces parameters of another model asks nobody else
        constrained()
        backward(wrapper.module)
    backward(wrapper)


# -- sharded by torch ------------------------------------------------------------------------------------------

REFUSED = r"'2\.weight'.*is a sharded tensor \(DTensor\).*fgo_geo\.distributed\.fully_shard.*attach\(model\)"


def check_an_optimiser_of_what_torch_has_sharded(rank: int, folder: Path) -> None:
    model = sharded(torch_fully_shard)
    with pytest.raises(ValueError, match=r"RiemannianFGSGD: '0\.weight'.*is a sharded tensor"):
        RiemannianFGSGD(model.named_parameters(), lr=0.1)
    params = [(n, p) for n, p in model.named_parameters() if n == "2.weight"]
    with pytest.raises(ValueError, match=REFUSED):
        RiemannianFGSGD(params, lr=0.1)
    with pytest.raises(ValueError, match=r"on_manifolds: .*is a sharded tensor"):
        on_manifolds(torch.optim.AdamW(model.parameters()))


def check_an_optimiser_after_a_forward_pass_that_was_refused(rank: int, folder: Path) -> None:
    """Torch has gathered the weights then, so that they look plain."""
    model = constrained()
    torch_fully_shard(model, mesh=mesh())
    with pytest.raises(RuntimeError, match="become plain parameters"):
        backward(model)
    with pytest.raises(
        ValueError, match=r"on_manifolds: no parameter.*Torch's sharding drops manifolds.*attach\(model\)"
    ):
        on_manifolds(torch.optim.AdamW(model.parameters()))


def check_a_report(rank: int, folder: Path) -> None:
    """Whether this package has sharded the model or torch has, and before anything is computed."""
    for shard in (fully_shard, torch_fully_shard):
        model = sharded(shard)
        with (
            patch.object(reading, "find_weights", side_effect=AssertionError),
            pytest.raises(ValueError, match=r"report: '0\.weight' is a sharded tensor.*before it is sharded"),
        ):
            report(model, images(), 100)
    single = constrained()
    assert {layer.kind for layer in report(single).layers} == {"plain", "product"}


def check_the_guard_says_what_works(rank: int, folder: Path) -> None:
    model = sharded(torch_fully_shard)
    with pytest.raises(RuntimeError, match=r"fgo_geo\.distributed\.fully_shard keeps it.*attach\(model\)"):
        backward(model)
    plan_of(model).attach(model)
    declare_plain(model)
    optimizer = RiemannianFGSGD(model.named_parameters(), lr=0.5, momentum=0.9)
    for seed in range(3):
        backward(model, seed)
        optimizer.step()
        optimizer.zero_grad()
    assert violation(model) < 1e-12


def check_compiled_and_sharded_by_torch(rank: int, folder: Path) -> None:
    """Inside a graph nothing guards; the optimiser does."""
    model = sharded(torch_fully_shard)
    model.compile(backend="eager")
    with pytest.raises(ValueError, match="is a sharded tensor"):
        RiemannianFGSGD(model.parameters(), lr=0.1)
    ours, eager = sharded(), sharded()
    ours.compile(backend="eager")
    for own in (ours, eager):
        optimizer = RiemannianFGSGD(own.parameters(), lr=0.1)
        backward(own)
        optimizer.step()
    for a, b in zip(whole(ours), whole(eager), strict=True):
        torch.testing.assert_close(a, b)
    assert violation(ours) < 1e-12


def check_a_forward_pass_through_a_part(rank: int, folder: Path) -> None:
    model = nn.Sequential(net())
    constrain(model)
    torch_fully_shard(model[0], mesh=mesh())
    backward(model[0])  # past the guard
    with pytest.raises(ValueError, match="is a sharded tensor"):
        RiemannianFGSGD(model[0].parameters(), lr=0.1)
    model = nn.Sequential(net())
    constrain(model)
    fully_shard(model[0], mesh=mesh())
    optimizer = RiemannianFGSGD(model[0].parameters(), lr=0.5)
    backward(model[0])
    optimizer.step()
    assert violation(model) < 1e-12


def check_weights_declared_by_hand(rank: int, folder: Path) -> None:
    def layer() -> nn.Linear:
        own = nn.Linear(6, 4, dtype=torch.float64)
        own.weight = geoopt.ManifoldParameter(ScaledSphere(ndim=1).projx(own.weight.detach()), ScaledSphere(ndim=1))
        return own

    torch.manual_seed(0)
    model = layer()
    other = copy.deepcopy(model)
    single = copy.deepcopy(model)
    torch_fully_shard(other, mesh=mesh())
    with pytest.raises(ValueError, match="is a sharded tensor"):
        RiemannianFGSGD(other.parameters(), lr=0.1)
    fully_shard(model, mesh=mesh())
    x = torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for own in (model, single):
        optimizer = RiemannianFGSGD(own.parameters(), lr=0.5)
        own(x).square().mean().backward()
        optimizer.step()
    assert torch.equal(whole(model)[0], single.weight.detach().as_subclass(Tensor))


def check_tensor_parallel_without_a_declaration(rank: int, folder: Path) -> None:
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    model = constrained()
    parallelize_module(model[4], mesh(), ColwiseParallel())
    with pytest.raises(ValueError, match="is a sharded tensor"):
        RiemannianFGSGD(model[4].parameters(), lr=0.1)


def check_flat_shards(rank: int, folder: Path) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    for original in (True, False):
        model = nn.Linear(6, 4)
        model.weight = geoopt.ManifoldParameter(geoopt.Sphere().projx(model.weight.detach()), geoopt.Sphere())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = FullyShardedDataParallel(model, use_orig_params=original, device_id=torch.device("cpu"))
        for build in (
            lambda params: RiemannianFGSGD(params, lr=0.1),
            lambda params: on_manifolds(torch.optim.SGD(params, lr=0.1)),
        ):
            with pytest.raises(ValueError, match=r"flat shard of FullyShardedDataParallel.*FSDP2"):
                build(model.parameters())


def check_constraining_what_is_sharded(rank: int, folder: Path) -> None:
    model = net()
    torch_fully_shard(model, mesh=mesh())
    with pytest.raises(ValueError, match="sharded; constrain it before"):
        constrain(model)


# -- sharded, and not supported --------------------------------------------------------------------------------


def check_optimisers_that_do_not_know_shards(rank: int, folder: Path) -> None:
    model = sharded()
    backward(model)
    before = whole(model)
    for kind in (geoopt.optim.RiemannianSGD, geoopt.optim.RiemannianAdam):
        with pytest.raises(RuntimeError, match=f"{kind.__name__} does not know sharded weights"):
            kind(model.parameters(), lr=0.1).step()
    assert all(torch.equal(a, b) for a, b in zip(before, whole(model), strict=True))


def left_in_training(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> list[str]:
    """The warnings of nine passes that weights have left their manifolds."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for seed in range(9):
            model.zero_grad()
            backward(model, seed)
            if optimizer is not None:
                optimizer.step()
    messages = [str(each.message) for each in said]
    return [message for message in messages if "has left its manifold in training" in message]


def check_an_optimiser_of_torch_alone_is_noticed(rank: int, folder: Path) -> None:
    """As on one process: with one warning, on all processes, which the right optimisers do not get."""
    for number in range(3):
        model = sharded()
        if number == 0:
            optimizer: torch.optim.Optimizer = RiemannianFGSGD(model.parameters(), lr=0.5)
        else:
            optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
            if number == 1:
                on_manifolds(optimizer)
        is_wrong = number == 2
        assert len(left_in_training(model, optimizer)) == is_wrong
        assert (violation(model) > 1e-2) == is_wrong


def check_values_of_another_plan_are_noticed(rank: int, folder: Path) -> None:
    """Written into the shards, as ``dcp.load`` does; even without ``load_state_dict``, which refuses them."""
    model, other = sharded(), sharded(seed=1)
    assert not left_in_training(model)
    with torch.no_grad():
        for a, b in zip(model.parameters(), other.parameters(), strict=True):
            a.copy_(b)
    assert len(left_in_training(model)) == 1


def check_channel_directed_gradients(rank: int, folder: Path) -> None:
    with pytest.raises(ValueError, match="its channels are on several processes"):
        channel_directed(torch.optim.SGD(sharded().parameters(), lr=0.1))


def check_weights_that_are_cut_twice(rank: int, folder: Path) -> None:
    from torch.distributed.tensor import Shard, distribute_tensor

    layer = nn.Linear(6, 4, dtype=torch.float64)
    constrain(layer, classifier=True)
    manifold = plan_of(layer).parameters()["weight"].manifold
    both = init_device_mesh("cpu", (dist.get_world_size(), 1))
    layer.weight = nn.Parameter(
        distribute_tensor(layer.weight.detach().as_subclass(Tensor), both, [Shard(0), Shard(1)])
    )
    plan_of(layer).attach(layer)
    assert layer.weight.manifold is not manifold  # pyright: ignore
    with pytest.raises(ValueError, match=r"'weight'.* is on a manifold and has placements .*, expected one Shard"):
        RiemannianFGSGD([("weight", layer.weight)], lr=0.1)


def check_half_precision(rank: int, folder: Path) -> None:
    model = net().bfloat16()
    constrain(model)
    fully_shard(model, mesh=mesh())
    with pytest.raises(ValueError, match=r"copies in single precision.*MixedPrecisionPolicy"):
        RiemannianFGSGD(model.parameters(), lr=0.1)
    RiemannianFGSGD(model.parameters(), lr=0.1, master_weights=False)


def check_an_optimiser_that_was_built_before(rank: int, folder: Path) -> None:
    model = constrained()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fully_shard(model, mesh=mesh())
    backward(model)
    with pytest.raises(RuntimeError, match="is no longer a parameter of its model"):
        optimizer.step()


# -- one process has an error, and all raise -------------------------------------------------------------------


def check_a_gradient_that_is_not_finite_on_one_process(rank: int, folder: Path) -> None:
    model = sharded()
    optimizer = RiemannianFGSGD(model.named_parameters(), lr=0.1, momentum=0.9)
    backward(model)
    if rank == 1:
        model[2].weight.grad.to_local()[-1] = torch.nan  # pyright: ignore
    before = whole(model)
    with pytest.raises(FloatingPointError, match=r"the gradient of '2\.weight'.*is not finite"):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, whole(model), strict=True))
    assert not optimizer.state
    optimizer.zero_grad()
    backward(model)
    optimizer.step()
    assert violation(model) < 1e-12


def check_manifolds_that_differ(rank: int, folder: Path) -> None:
    model = sharded(manifolds=("sphere", "oblique"))
    optimizer = RiemannianFGSGD(model.named_parameters(), lr=0.1)
    backward(model)
    manifold: Any = plan_of(model).parameters()["4.weight"].manifold
    parts = zip(manifold.manifolds, manifold.partition.counts, strict=True)
    radii = [torch.as_tensor(part.radius, dtype=torch.float64).expand(count) for part, count in parts]
    if rank == 1:
        manifold.set_radius([radius * (1 + 1e-6) for radius in radii])
    with pytest.raises(
        ValueError,
        match=r"manifolds differ between processes, first for '4\.weight'.*no weight on a manifold was changed",
    ):
        optimizer.step()
    if rank == 1:
        manifold.set_radius(radii)
    optimizer.step()


def check_a_gradient_that_is_missing_on_one_process(rank: int, folder: Path) -> None:
    model = sharded()
    optimizer = RiemannianFGSGD(model.named_parameters(), lr=0.1)
    backward(model)
    if rank == 0:
        model[2].weight.grad = None
    with pytest.raises(ValueError, match=r"manifolds differ.*different weights have gradients"):
        optimizer.step()


def check_a_weight_that_is_not_finite_on_one_process(rank: int, folder: Path) -> None:
    model = sharded()
    plan = plan_of(model)
    shard: Any = plan.parameters()["4.weight"].detach().to_local()  # pyright: ignore
    good = shard.clone()
    before = whole(model)
    if rank == 1:
        shard.fill_(torch.inf)
    with pytest.raises(ValueError, match=r"1 parameter\(s\) have non-finite values: '?4\.weight"):
        plan.project()
    shard.copy_(good)
    assert all(torch.equal(a, b) for a, b in zip(before, whole(model), strict=True))
    plan.project()


def check_an_option_that_is_wrong_on_one_process(rank: int, folder: Path) -> None:
    model = sharded()
    optimizer = RiemannianFGSGD(model.named_parameters(), lr=0.1)
    backward(model)
    optimizer.step()
    if rank == 1:
        optimizer.param_groups[0]["rho"] = -1.0
    with pytest.raises(ValueError, match="rho must be at least 0"):
        optimizer.step()


def check_a_first_step_that_fails_on_one_process(rank: int, folder: Path) -> None:
    """Whatever is wrong, and with whichever optimiser: all raise, none waits, and no weight on a manifold has moved."""

    def fg_sgd(model: nn.Module) -> torch.optim.Optimizer:
        return RiemannianFGSGD(model.named_parameters(), lr=0.1)

    def adamw(model: nn.Module) -> torch.optim.Optimizer:
        optimizer = torch.optim.AdamW(model.parameters())
        on_manifolds(optimizer, "constant")
        return optimizer

    def no_gradients(model: Any, group: dict[str, Any]) -> None:
        for param in model.parameters():
            param.grad = None

    def not_finite(model: Any, group: dict[str, Any]) -> None:
        model[2].weight.grad.to_local()[-1] = torch.nan

    cases: list[tuple[Any, Any, type[Exception], str]] = [
        (fg_sgd, lambda model, group: group.update(rho=-1.0), ValueError, "rho must be at least 0"),
        (fg_sgd, no_gradients, ValueError, "different weights have gradients"),
        (adamw, no_gradients, ValueError, "different weights have gradients; no weight on a manifold was changed"),
        (adamw, lambda model, group: group.update(betas=None), TypeError, "NoneType"),
        (adamw, not_finite, FloatingPointError, r"'2\.weight'.*is not finite; no parameter was changed"),
    ]
    for number, (build, damage, error, message) in enumerate(cases):
        model = sharded()
        optimizer = build(model)
        backward(model)
        if rank == number % 2:
            damage(model, optimizer.param_groups[0])
        before = whole(model)
        with pytest.raises(error, match=message):
            optimizer.step()
        changed = {
            name
            for (name, _), a, b in zip(model.named_parameters(), before, whole(model), strict=True)
            if not torch.equal(a, b)
        }
        assert not changed & set(plan_of(model).parameters())
        if damage is not_finite:
            assert not changed
            assert not optimizer.state
        optimizer = build(model)
        optimizer.zero_grad()
        backward(model)
        optimizer.step()
        assert violation(model) < 1e-12


def check_a_closure_that_fails_on_one_process(rank: int, folder: Path) -> None:
    """All processes raise its error, and agree on it once: none waits for another, then or in the next step."""
    model = sharded()
    optimizer = torch.optim.AdamW(model.parameters())
    on_manifolds(optimizer, "constant")
    before = whole(model)
    for failing in (0, 1, None):

        def closure(fails: bool = rank == failing) -> Tensor:
            optimizer.zero_grad()
            loss = model(images()).square().mean()
            loss.backward()
            if fails:
                raise ValueError("a bad batch")
            return loss

        if failing is None:
            optimizer.step(closure)
            break
        with pytest.raises(ValueError, match="a bad batch"):
            optimizer.step(closure)
        assert all(torch.equal(a, b) for a, b in zip(before, whole(model), strict=True))
        assert not optimizer.state
    assert not any(torch.equal(a, b) for a, b in zip(before, whole(model), strict=True))
    assert violation(model) < 1e-12


def check_a_parameter_that_one_process_has_lost(rank: int, folder: Path) -> None:
    """With and without a closure, in the first step and later."""
    model = sharded()
    optimizer = torch.optim.AdamW(model.parameters())
    on_manifolds(optimizer, "constant")
    weight: Any = model[2].weight
    manifold = weight.manifold

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(images()).square().mean()
        loss.backward()
        return loss

    def replace_it() -> Callable[[], None]:
        setattr(weight, REPLACED, True)
        return lambda: delattr(weight, REPLACED)

    def lose_its_manifold() -> Callable[[], None]:
        weight.manifold = None
        return lambda: setattr(weight, "manifold", manifold)

    for number, (damage, error, message) in enumerate(
        [
            (replace_it, RuntimeError, r"'2\.weight'.*is no longer a parameter of its model"),
            (lose_its_manifold, RuntimeError, "is a plain parameter now"),
        ]
        * 2
    ):
        backward(model)
        before = whole(model)
        mend = damage() if rank == number % 2 else lambda: None
        for arguments in ((), (closure,)) if damage is replace_it else ((),):
            with pytest.raises(error, match=message):
                optimizer.step(*arguments)
        mend()
        assert all(torch.equal(a, b) for a, b in zip(before, whole(model), strict=True))
        optimizer.step(closure)
        assert violation(model) < 1e-12


def check_an_error_between_two_sums(rank: int, folder: Path) -> None:
    """Wherever one process fails while norms of groups are summed, no other waits for it, and nothing has changed."""
    model, single = sharded(strategy="pi"), constrained(strategy="pi")
    optimizers = [RiemannianFGSGD(own.named_parameters(), lr=0.1, momentum=0.9) for own in (model, single)]
    before = whole(model)
    places = (("odd_weights", 1.0), ("largest_of", 1e200), ("unit_of", 1e200), ("divide", 1e200))
    for number, (failing, factor) in enumerate(places):
        backward(model)
        model[2].weight.grad.to_local().mul_(factor)  # pyright: ignore
        error = MemoryError(f"no room in {failing}")
        fails = patch.object(exchange, failing, side_effect=error)
        with fails if rank == number % 2 else contextlib.nullcontext(), pytest.raises(MemoryError, match=str(error)):
            optimizers[0].step()
        optimizers[0].zero_grad()
        assert all(torch.equal(a, b) for a, b in zip(before, whole(model), strict=True))
        assert not optimizers[0].state
    for own, optimizer in zip((model, single), optimizers, strict=True):
        backward(own)
        optimizer.step()
    for a, b in zip(whole(model), single.parameters(), strict=True):
        torch.testing.assert_close(a, b.detach().as_subclass(Tensor))


# -- what every process knows -----------------------------------------------------------------------------------


def check_groups_are_counted_on_one_process(rank: int, folder: Path) -> None:
    for strategy in ("pi", "po", "layer"):
        models = sharded(strategy=strategy, manifolds="sphere"), constrained(strategy=strategy, manifolds="sphere")
        optimizers = [
            RiemannianFGSGD(own.named_parameters(), lr=0.1, norm="running", check_finite=False) for own in models
        ]
        for factor in (1.0, 1e6, torch.nan):
            for own, optimizer in zip(models, optimizers, strict=True):
                optimizer.zero_grad()
                backward(own)
                for param in own.parameters():
                    param.grad.mul_(factor)  # pyright: ignore
                optimizer.step()
        counts = [torch.tensor([own.skipped_groups(), own.shortened_gradients()]) for own in optimizers]
        dist.all_reduce(counts[0])
        assert counts[0].tolist() == counts[1].tolist(), strategy
        assert min(counts[1].tolist()) > 0


def check_running_norms_of_another_type(rank: int, folder: Path) -> None:
    """As from the checkpoint of a model in another type: they are exchanged in the type of this one."""
    models = sharded(strategy="pi"), constrained(strategy="pi")
    optimizers = [RiemannianFGSGD(own.named_parameters(), lr=0.1, norm="running") for own in models]
    for _ in range(2):
        for own, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            backward(own)
            optimizer.step()
            for state in optimizer.state.values():
                if "norm_squared" in state:
                    state["norm_squared"] = state["norm_squared"].float()
    for a, b in zip(whole(models[0]), models[1].parameters(), strict=True):
        torch.testing.assert_close(a, b.detach().as_subclass(Tensor), rtol=1e-6, atol=1e-6)


def check_a_retraction_that_is_assigned_later(rank: int, folder: Path) -> None:
    for radius in (1.5, torch.tensor([[0.5], [1.0], [1.5], [2.0]], dtype=torch.float64)):
        torch.manual_seed(0)
        models = nn.Conv2d(2, 4, 3, bias=False).double(), nn.Conv2d(2, 4, 3, bias=False).double()
        point = Stiefel(radius).projx(models[0].weight.detach())
        for own in models:
            own.weight = geoopt.ManifoldParameter(point.clone(), Stiefel(radius))
        fully_shard(models[0], mesh=mesh())
        options: Any = {"lr": 0.01, "step_size": "constant"}
        optimizers = [RiemannianFGSGD(own.named_parameters(), **options) for own in models]
        for retraction in ("polar", "qr"):
            for own, optimizer in zip(models, optimizers, strict=True):
                manifold: Any = own.weight.manifold
                manifold.retraction = retraction
                optimizer.zero_grad()
                own(images()[:, :2]).pow(4).sum().backward()
                optimizer.step()
        torch.testing.assert_close(whole(models[0])[0], models[1].weight.detach().as_subclass(Tensor))
