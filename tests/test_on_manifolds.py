"""Any torch optimiser on the manifolds of its parameters: points, step sizes, and everything around a step."""

from __future__ import annotations

import copy
import math
import pickle
import sys
from collections.abc import Callable
from typing import Any

import geoopt
import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import fgo_geo
from fgo_geo import Oblique, ProductOfGroups, RiemannianFGSGD, ScaledSphere, Stiefel, constrain, on_manifolds
from fgo_geo.grouping import collection
from fgo_geo.kernels import use_path
from fgo_geo.manifolds import EmbeddedManifold
from fgo_geo.optim import theorem_step_bound
from fgo_geo.optim.on_manifolds import handle_of
from fgo_geo.paths.native.kernels import NativeKernels
from fgo_geo.paths.native.library import library
from fgo_geo.paths.native.lines import NativeLines
from fgo_geo.paths.native.stiefel import NativeStiefel
from fgo_geo.paths.reference import Reference
from fgo_geo.paths.shared_products import SharedProducts

KINDS = ("sphere", "oblique", "stiefel", "euclidean")
OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-2),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.05),
    "AdamW, foreach": lambda p: torch.optim.AdamW(p, lr=0.05, foreach=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.05, amsgrad=True),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.05),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=0.05),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.05, momentum=0.5),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.5),
    "Adadelta": lambda p: torch.optim.Adadelta(p, lr=1.0),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=0.05),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
    "ASGD": lambda p: torch.optim.ASGD(p, lr=0.1),
}


def network(seed: int = 0, kinds: tuple[str, ...] = KINDS) -> nn.Sequential:
    torch.manual_seed(seed)
    convolutions = (nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, (3, 2)), nn.ReLU(), nn.Flatten())
    model = nn.Sequential(*convolutions, nn.Linear(6 * 2 * 3, 20), nn.ReLU(), nn.Linear(20, 20), nn.Linear(20, 4))
    constrain(model, strategy="pio", manifolds=kinds, seed=seed)
    return model


def train(model: nn.Module, optimizer: Optimizer, steps: int, first_seed: int = 0) -> list[float]:
    losses: list[float] = []
    for step in range(steps):
        x = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(first_seed + step % 3))
        optimizer.zero_grad()
        loss = (model(x) - 1).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def violation(model: nn.Module) -> float:
    own = [p for p in model.parameters() if isinstance(getattr(p, "manifold", None), EmbeddedManifold)]
    assert own
    return max(float(p.manifold.violation(p.detach()).max()) for p in own)


@pytest.mark.parametrize("step_size", ["theorem", "constant", "angle"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weights_stay_on_their_manifolds_and_the_loss_falls(name, step_size):
    model = network()
    optimizer = OPTIMIZERS[name](model.parameters())
    on_manifolds(optimizer, step_size, angle=1.0 if step_size == "angle" else None)
    losses = train(model, optimizer, 30)
    assert violation(model) < 2e-6
    assert min(losses[-3:]) < losses[0]


def test_without_it_the_same_optimiser_leaves_them():
    model = network()
    with pytest.warns(UserWarning, match=r"'\d\.weight' has left its manifold"):
        train(model, torch.optim.AdamW(model.parameters(), lr=0.05), 3)
    assert violation(model) > 0.1


@pytest.mark.parametrize("path", ["auto", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("radius_invariant", [False, True])
def test_sgd_without_momentum_is_fgsgd(path, dtype, radius_invariant):
    """The displacement of plain SGD per unit of learning rate is the gradient."""
    for step_size in ("constant", "theorem"):
        models = [network().to(dtype) for _ in range(2)]
        wrapped = torch.optim.SGD(models[0].parameters(), lr=0.3)
        on_manifolds(wrapped, step_size, radius_invariant=radius_invariant)
        ours = RiemannianFGSGD(models[1].parameters(), lr=0.3, step_size=step_size, radius_invariant=radius_invariant)
        with use_path(path):
            for model, optimizer in zip(models, (wrapped, ours), strict=True):
                for step in range(4):
                    x = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(step), dtype=dtype)
                    optimizer.zero_grad()
                    (model(x) - 1).square().mean().backward()
                    optimizer.step()
        tolerance = 1e-4 if dtype == torch.float32 else 1e-12
        for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


def steps_of(model: nn.Module, before: list[Tensor]) -> list[tuple[Any, Tensor, Tensor]]:
    """Manifold, point before, and tangent part of the way, of every constrained weight."""
    own = [p for p in model.parameters() if isinstance(getattr(p, "manifold", None), ProductOfGroups)]
    return [(p.manifold, x, p.manifold.proju(x, p.detach() - x)) for p, x in zip(own, before, strict=True)]


def points_of(model: nn.Module) -> list[Tensor]:
    own = [p for p in model.parameters() if isinstance(getattr(p, "manifold", None), ProductOfGroups)]
    return [p.detach().clone() for p in own]


@pytest.mark.parametrize("name", ["SGD", "AdamW", "Rprop"])
@pytest.mark.parametrize("magnitude", [1e-6, 1.0, 1e6])
def test_no_group_moves_farther_than_the_theorem_allows(name, magnitude):
    model = network().double()
    optimizer = OPTIMIZERS[name](model.parameters())
    lr = optimizer.param_groups[0]["lr"]
    on_manifolds(optimizer, "theorem")
    for step in range(5):
        for param in model.parameters():
            param.grad = magnitude * torch.randn(param.shape, generator=torch.Generator().manual_seed(step)).double()
        before = points_of(model)
        optimizer.step()
        for manifold, x, way in steps_of(model, before):
            assert float(manifold.group_norm(x, way).max()) <= theorem_step_bound() * lr * (1 + 1e-6)


@pytest.mark.parametrize("angle", [0.02, 0.3])
def test_every_group_turns_by_the_angle(angle):
    model = network(kinds=("sphere", "oblique", "stiefel")).double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    on_manifolds(optimizer, "angle", angle=angle)
    before = points_of(model)
    train(model.float().double(), optimizer, 0)
    for param in model.parameters():
        param.grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    optimizer.step()
    for manifold, x, way in steps_of(model, before):
        turned = manifold.group_norm(x, way) / manifold.group_norm(x, x)
        torch.testing.assert_close(turned, torch.full_like(turned, 0.1 * angle), rtol=angle**2 + 1e-4, atol=0)


def test_weight_decay_has_no_effect_on_manifolds():
    """It is radial, and the tangent projection removes it; AdamW's is decoupled, so nothing else changes."""
    models = [network(kinds=("sphere", "oblique", "stiefel")).double() for _ in range(2)]
    for model, decay in zip(models, (0.0, 0.5), strict=True):
        own = [p for p in model.parameters() if isinstance(p, geoopt.ManifoldParameter)]
        with torch.no_grad():
            for p in own:
                p.proj_()  # they were points in single precision
        optimizer = torch.optim.AdamW(own, lr=0.05, weight_decay=decay)
        on_manifolds(optimizer, "constant")
        for step in range(4):
            for p in own:
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
            optimizer.step()
    for a, b in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_plain_parameters_take_the_optimisers_own_step():
    model, twin = network(), network()
    optimizer, bare = (torch.optim.AdamW(m.parameters(), lr=0.05) for m in (model, twin))
    on_manifolds(optimizer)
    for some, own in ((model, optimizer), (twin, bare)):
        for param in some.parameters():
            param.grad = torch.ones_like(param)
        own.step()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        if not isinstance(a, geoopt.ManifoldParameter):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


# -- around a step -----------------------------------------------------------------------------------------------------


def test_remove_gives_the_optimiser_back():
    weight = geoopt.ManifoldParameter(Stiefel().random(5, 3))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    handle = on_manifolds(optimizer)
    assert "SGD" in repr(handle)
    handle.remove()
    before = weight.detach().clone()
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    torch.testing.assert_close(weight.detach(), before - 0.1)
    with torch.no_grad():
        weight.proj_()
    on_manifolds(optimizer)  # again


@pytest.mark.parametrize("first", ["scheduler", "handle"])
def test_schedulers_work_in_either_order(first):
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    if first == "handle":
        on_manifolds(optimizer)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    if first == "scheduler":
        on_manifolds(optimizer)
    for _ in range(10):
        train(model, optimizer, 1)
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0, abs=1e-12)
    before = points_of(model)
    train(model, optimizer, 1)
    for p, x in zip(points_of(model), before, strict=True):
        torch.testing.assert_close(p, x, rtol=0, atol=1e-6)


def test_state_dicts_are_those_of_the_bare_optimiser():
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    on_manifolds(optimizer)
    train(model, optimizer, 3)
    twin = network()
    twin.load_state_dict(copy.deepcopy(model.state_dict()))
    resumed = torch.optim.AdamW(twin.parameters(), lr=0.05)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    on_manifolds(resumed)
    for some, own in ((model, optimizer), (twin, resumed)):
        train(some, own, 3, first_seed=7)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert set(next(iter(optimizer.state.values()))) == {"step", "exp_avg", "exp_avg_sq"}


@pytest.mark.parametrize("what", ["optimizer", "handle", "both with the model", "pickled handle"])
def test_a_copy_is_on_the_manifolds_too_and_its_own(what):
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    handle = on_manifolds(optimizer, "angle", angle=0.7)
    train(model, optimizer, 2)
    twin: Any = None
    if what == "both with the model":
        twin, twin_handle, copied = copy.deepcopy((model, handle, optimizer))
    elif what == "optimizer":
        copied = copy.deepcopy(optimizer)
        twin_handle = handle_of(copied)
    else:
        twin_handle = copy.deepcopy(handle) if what == "handle" else pickle.loads(pickle.dumps(handle))
        copied = twin_handle.optimizer
    assert copied is not optimizer
    assert copied.state_dict().keys() == optimizer.state_dict().keys()
    assert handle_of(copied) is twin_handle is not handle
    assert repr(twin_handle._options) == repr(handle._options)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    copies = [p for group in copied.param_groups for p in group["params"]]
    if twin is not None:
        assert all(a is b for a, b in zip(twin.parameters(), copies, strict=True))
    for own, some in ((optimizer, params), (copied, copies)):
        for p in some:
            p.grad = torch.ones_like(p)
        own.step()
    for a, b in zip(params, copies, strict=True):
        assert a is not b
        torch.testing.assert_close(a.detach(), b.detach(), rtol=0, atol=0)
    handle.remove()  # which leaves the copy where it is
    copied.step()
    assert all(p.manifold.violation(p.detach()).max() < 2e-6 for p in copies if isinstance(p, geoopt.ManifoldParameter))
    assert handle_of(optimizer) is None
    assert handle_of(copy.deepcopy(optimizer)) is handle_of(copy.deepcopy(handle).optimizer) is None


def test_closures_are_evaluated_with_gradients_and_before_anything_moves():
    model, twin = network(), network()
    x = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    optimizer, other = (torch.optim.AdamW(m.parameters(), lr=0.05) for m in (model, twin))
    for own in (optimizer, other):
        on_manifolds(own)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (model(x) - 1).square().mean()
        loss.backward()
        return loss

    loss = optimizer.step(closure)
    train(twin, other, 1)
    assert float(loss.detach()) > 0
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


class TwoEvaluations(torch.optim.SGD):
    """Takes a step between two evaluations, as sharpness-aware and line-search optimisers do."""

    def step(self, closure: Any = None) -> Any:
        closure()
        super().step()
        return closure()


def test_an_optimiser_that_evaluates_inside_its_step_is_refused_and_nothing_has_moved():
    model = network()
    optimizer = TwoEvaluations(model.parameters(), lr=0.1)
    on_manifolds(optimizer)
    before = points_of(model)
    x = torch.randn(8, 3, 6, 6)

    def closure() -> Tensor:
        loss = model(x).square().mean()
        loss.backward()
        return loss

    with pytest.raises(RuntimeError, match="TwoEvaluations evaluates the model inside its step"):
        optimizer.step(closure)
    for a, b in zip(points_of(model), before, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("by_closure", [False, True])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_is_refused_by_name_before_anything_has_changed(value, by_closure):
    """Neither plain parameters nor the moments: the next step is as if there had been none."""
    model, twin = network(), network()
    optimizers = [torch.optim.AdamW(m.named_parameters(), lr=0.1) for m in (model, twin)]
    for optimizer in optimizers:
        on_manifolds(optimizer)

    def closure() -> float:
        for param in model.parameters():
            param.grad = torch.ones_like(param)
        model[7].weight.grad[3, 2] = value
        return 0.0

    closure()
    message = r"on_manifolds: the gradient of '7.weight'.* no parameter was changed"
    with pytest.raises(FloatingPointError, match=message):
        optimizers[0].step(closure) if by_closure else optimizers[0].step()
    assert not optimizers[0].state
    for own, optimizer in zip((model, twin), optimizers, strict=True):
        for param in own.parameters():
            param.grad = torch.ones_like(param)
        optimizer.step()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.detach(), b.detach(), rtol=0, atol=0)


def test_a_displacement_that_is_not_finite_is_refused_and_nothing_on_manifolds_has_moved():
    """Its gradient is finite: the optimiser itself overflows, and what it has changed is said."""
    model = network()
    optimizer = torch.optim.SGD(model.named_parameters(), lr=0.1, momentum=0.9)
    on_manifolds(optimizer)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    optimizer.state[model[7].weight]["momentum_buffer"].fill_(math.inf)
    before = points_of(model)
    with pytest.raises(FloatingPointError, match=r"'7.weight'.* no weight on a manifold was changed, other parameters"):
        optimizer.step()
    for a, b in zip(points_of(model), before, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_a_model_that_is_converted_is_stepped_in_its_new_type():
    """In double precision, the kept points must not round to single."""
    w: Any = geoopt.ManifoldParameter(Oblique().random(5, 3).detach(), manifold=Oblique())
    optimizer = torch.optim.SGD([w], lr=0.1)
    on_manifolds(optimizer, step_size="constant")
    for _ in range(2):
        w.grad = torch.ones_like(w)
        optimizer.step()
        w.data = w.manifold.projx(w.data.double())
    w.grad = torch.full_like(w, math.pi)
    optimizer.step()
    assert float((w.detach() - w.detach().float()).abs().max()) > 1e-10
    assert float(w.manifold.violation(w.detach()).max()) < 1e-14


def test_an_interrupt_in_the_optimiser_leaves_points(monkeypatch):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def interrupted(*_: Any) -> None:
        for param in model.parameters():
            param.data.add_(1)
        raise KeyboardInterrupt

    optimizer.step = interrupted
    on_manifolds(optimizer)
    before = points_of(model)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    for a, b in zip(points_of(model), before, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("first", ["channel_directed", "on_manifolds"])
def test_it_composes_with_channel_directed_gradients_in_either_order(first):
    def attach(model: nn.Module, order: str) -> Optimizer:
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
        attachments = [lambda: fgo_geo.channel_directed(optimizer, metric="h1", module=model)]
        attachments.append(lambda: on_manifolds(optimizer))
        for attachment in attachments if order == "channel_directed" else reversed(attachments):
            attachment()
        return optimizer

    model, twin, plain = network(), network(), network()
    train(model, attach(model, first), 3)
    train(twin, attach(twin, "channel_directed"), 3)
    bare = torch.optim.AdamW(plain.parameters(), lr=0.05)
    on_manifolds(bare)
    train(plain, bare, 3)
    assert violation(model) < 2e-6
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))


def test_a_compiled_model_and_a_compiled_step_are_the_same_step():
    torch._dynamo.reset()
    model, twin = network(), network()
    optimizer, other = (torch.optim.SGD(m.parameters(), lr=0.05) for m in (model, twin))
    for own in (optimizer, other):
        on_manifolds(own)
    compiled = torch.compile(model, backend="eager")
    step = torch.compile(lambda: optimizer.step(), backend="eager")
    x = torch.randn(8, 3, 6, 6)
    for some, move in ((compiled, step), (twin, other.step)):
        for _ in range(2):
            some.zero_grad()
            (some(x) - 1).square().mean().backward()
            move()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "build", [lambda p: torch.optim.LBFGS(p), lambda p: RiemannianFGSGD(p, lr=0.1)], ids=["LBFGS", "ours"]
)
def test_optimisers_that_it_is_not_for_are_refused(build):
    weight = geoopt.ManifoldParameter(Stiefel().random(5, 3))
    with pytest.raises(TypeError, match=r"on_manifolds: (LBFGS evaluates|RiemannianFGSGD knows)"):
        on_manifolds(build([weight]))


def test_bad_arguments_are_refused():
    weight = geoopt.ManifoldParameter(Oblique().random(5, 3))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    for arguments, message in (
        ({"step_size": "eq7"}, "step_size must be"),
        ({"angle": 0.1}, "angle is a finite number"),
        ({"step_size": "angle", "angle": -0.1}, "angle is a finite number"),
    ):
        with pytest.raises(ValueError, match=message):
            on_manifolds(optimizer, **arguments)
    with pytest.raises(ValueError, match="no parameter of the optimiser has a manifold; call"):
        on_manifolds(torch.optim.SGD([nn.Parameter(torch.ones(3))], lr=0.1))
    on_manifolds(optimizer)
    with pytest.raises(ValueError, match="attached already"):
        on_manifolds(optimizer)
    with torch.no_grad():
        off = geoopt.ManifoldParameter(1.1 * ScaledSphere().random(5), manifold=ScaledSphere())
    with pytest.raises(ValueError, match="does not lie on its"):
        on_manifolds(torch.optim.SGD([off], lr=0.1))


def test_a_group_that_is_added_later_is_on_its_manifold_too():
    first, second = (geoopt.ManifoldParameter(Stiefel().random(5, 3)) for _ in range(2))
    optimizer = torch.optim.AdamW([first], lr=0.1)
    on_manifolds(optimizer)
    optimizer.add_param_group({"params": [second]})
    for weight in (first, second):
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert float(second.manifold.violation(second.detach()).max()) < 1e-6


def test_geoopts_own_manifolds_are_kept_too():
    weights = [
        geoopt.ManifoldParameter(m.random(6, 3), manifold=m) for m in (geoopt.EuclideanStiefel(), geoopt.Sphere())
    ]
    optimizer = torch.optim.AdamW(weights, lr=0.1)
    on_manifolds(optimizer)
    for step in range(5):
        for weight in weights:
            weight.grad = torch.randn(6, 3, generator=torch.Generator().manual_seed(step))
        optimizer.step()
    for weight in weights:
        weight.manifold.assert_check_point_on_manifold(weight.detach(), atol=1e-5)


def test_blocks_of_one_matrix_are_stepped_by_their_groups():
    groups = collection(16, 16, "pio", KINDS, components="block")
    manifold = ProductOfGroups(groups, (16, 16))
    weight = geoopt.ManifoldParameter(manifold.random(16, 16))
    optimizer = torch.optim.AdamW([weight], lr=0.1)
    handle = on_manifolds(optimizer)
    weight.grad = torch.randn(16, 16)
    optimizer.step()
    assert handle.step_scales()[weight].shape == (manifold.n_groups,)
    assert handle.skipped_groups() == 0
    assert float(manifold.violation(weight.detach()).max()) < 1e-6


# -- cost --------------------------------------------------------------------------------------------------------------


def weight_of(manifold: ProductOfGroups, *shape: int) -> geoopt.ManifoldParameter:
    weight = geoopt.ManifoldParameter(manifold.random(*shape))
    weight.grad = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return weight


@pytest.mark.skipif(library() is None, reason="the compiled library is not built")
@pytest.mark.parametrize(
    ("components", "kinds", "shape", "path"),
    [
        ("kernel", KINDS, (8, 6, 3, 3), "NativeKernels"),
        ("filter", ("sphere",), (16, 6, 3, 3), "NativeLines"),
        ("block", ("sphere", "oblique"), (32, 32), "NativeLines"),
        ("block", ("stiefel",), (32, 32), "NativeStiefel"),
    ],
)
def test_the_fused_paths_take_it(components, kinds, shape, path, monkeypatch):
    """Every path makes batches of what it takes; the displacement of another optimiser is a gradient for them."""
    taken: list[str] = []
    for own in (NativeKernels, NativeLines, NativeStiefel, SharedProducts, Reference):

        def batch(self, claims, _make=own.batch, _name=own.__name__):
            taken.append(_name)
            return _make(self, claims)

        monkeypatch.setattr(own, "batch", batch)
    groups = collection(*shape[:2], "po", kinds, components=components)
    weight = weight_of(ProductOfGroups(groups, shape), *shape)
    optimizer = torch.optim.AdamW([weight], lr=0.1)
    on_manifolds(optimizer)
    optimizer.step()
    assert taken == [path]


@pytest.mark.parametrize("path", ["auto", "reference"])
def test_a_step_makes_as_many_calls_for_many_groups_as_for_few(path):
    counts = []
    for channels in (8, 64):
        groups = collection(channels, channels, "pio", ("sphere", "stiefel"))
        weight = weight_of(ProductOfGroups(groups, (channels, channels, 3, 3)), channels, channels, 3, 3)
        optimizer = torch.optim.AdamW([weight], lr=0.1)
        on_manifolds(optimizer)
        calls = 0

        def count(frame: Any, event: str, argument: Any) -> None:
            nonlocal calls
            calls += event in ("call", "c_call")

        with use_path(path):
            for _ in range(3):
                optimizer.step()  # what is kept is there
            sys.setprofile(count)
            optimizer.step()
            sys.setprofile(None)
        counts.append(calls)
    assert counts[1] <= counts[0] + 40, counts


def test_the_memory_is_one_copy_of_the_constrained_weights():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = on_manifolds(optimizer)
    train(model, optimizer, 3)
    constrained = [p for p in model.parameters() if isinstance(p, geoopt.ManifoldParameter)]
    assert set(handle._points) == set(constrained)
    assert sum(x.numel() for x in handle._points.values()) == sum(p.numel() for p in constrained)
    handle.remove()
    assert not handle._points
