"""Channel-directed gradients attached to optimisers: their steps, closures, checkpoints and manifolds."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable
from typing import Any

import geoopt
import pytest
import torch
from channel_directions import METRICS, drawn, slow_gradient
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import fgo_geo
from fgo_geo.optim.channel_directed import channel_directed
from fgo_geo.optim.channel_metrics import channel_directed_gradient

# -- optimiser by optimiser --------------------------------------------------------------------------------------------

Make = Callable[[list[Tensor]], torch.optim.Optimizer]

OPTIMISERS: dict[str, Make] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    "SGD fused": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.1),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.1),
    "RiemannianSGD": lambda p: geoopt.optim.RiemannianSGD(p, lr=0.1, momentum=0.9),
    "RiemannianAdam": lambda p: geoopt.optim.RiemannianAdam(p, lr=0.1),
    "RiemannianFGSGD": lambda p: fgo_geo.RiemannianFGSGD(p, lr=0.1, momentum=0.9),
} | ({"Muon": lambda p: torch.optim.Muon(p, lr=0.1)} if hasattr(torch.optim, "Muon") else {})


def twin_weights(shape: tuple[int, ...] = (6, 4)) -> tuple[nn.Parameter, nn.Parameter]:
    weight = drawn(shape)
    return nn.Parameter(weight.clone()), nn.Parameter(weight.clone())


@pytest.mark.parametrize("restore_grad", [False, True])
@pytest.mark.parametrize("name", OPTIMISERS)
def test_every_optimiser_steps_with_the_directed_gradient(name: str, restore_grad: bool) -> None:
    attached, plain = twin_weights()
    first, second = OPTIMISERS[name]([attached]), OPTIMISERS[name]([plain])
    handle = channel_directed(first, "h1", lam=2.0, ends="free", restore_grad=restore_grad)
    for step in range(3):
        g = drawn((6, 4), step)
        directed = channel_directed_gradient(g, "h1", lam=2.0, ends="free")
        attached.grad, plain.grad = g.clone(), directed
        held = attached.grad
        first.step()
        second.step()
        assert torch.equal(attached, plain)
        assert attached.grad is held
        if restore_grad:
            assert torch.equal(held, g)
    handle.remove()
    attached.grad, plain.grad = drawn((6, 4), 3), drawn((6, 4), 3)
    first.step()
    second.step()
    assert torch.equal(attached, plain)


class CallsBase(torch.optim.SGD):
    """Its step is in that of its base class, for which torch calls the hooks, too."""

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        return super().step(closure)


@pytest.mark.parametrize("with_closure", [False, True])
@pytest.mark.parametrize("restore_grad", [False, True])
def test_a_step_that_calls_that_of_the_base_class_is_directed_once(restore_grad: bool, with_closure: bool) -> None:
    torch.optim.SGD([nn.Parameter(drawn((1, 1)))])  # only then torch calls the hooks of both
    weight, g = nn.Parameter(drawn((6, 4))), drawn((6, 4), 1)
    start, directed = weight.detach().clone(), slow_gradient(g, "h0", 4.0, 0, "periodic")
    optimizer = CallsBase([weight], lr=1.0)
    channel_directed(optimizer, "h0", lam=4.0, restore_grad=restore_grad)

    def closure() -> None:
        weight.grad = g.clone()

    if with_closure:
        optimizer.step(closure)
    else:
        closure()
        optimizer.step()
    torch.testing.assert_close(start - weight, directed)
    torch.testing.assert_close(weight.grad, g if restore_grad else directed)


def test_accumulated_gradients_are_directed_once() -> None:
    weight = nn.Parameter(drawn((6, 4)))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    channel_directed(optimizer, "h0", lam=4.0)
    first, second = drawn((6, 4), 1), drawn((6, 4), 2)
    (weight * first).sum().backward()
    (weight * second).sum().backward()
    optimizer.step()
    torch.testing.assert_close(weight.grad, slow_gradient(first + second, "h0", 4.0, 0, "periodic"))


@pytest.mark.parametrize("name", ["SGD", "SGD fused"])
def test_grad_scaler_and_clipping_come_first(name: str) -> None:
    attached, plain = (nn.Parameter(w.detach().float()) for w in twin_weights())
    first, second = OPTIMISERS[name]([attached]), OPTIMISERS[name]([plain])
    channel_directed(first, "h1", lam=2.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    g = drawn((6, 4), 1).float()
    for clip in (False, True):
        attached.grad = None
        scaler.scale((attached * g).sum()).backward()
        plain.grad = g.clone()
        if clip:
            scaler.unscale_(first)
            nn.utils.clip_grad_norm_([attached], 0.5)
            nn.utils.clip_grad_norm_([plain], 0.5)
        scaler.step(first)
        scaler.update()
        plain.grad = channel_directed_gradient(plain.grad, "h1", lam=2.0)
        second.step()
        torch.testing.assert_close(attached, plain)


def test_grad_scaler_skips_the_step_of_infinite_gradients() -> None:
    weight = nn.Parameter(drawn((6, 4)).float())
    before = weight.detach().clone()
    optimizer = torch.optim.SGD([weight], lr=0.1)
    channel_directed(optimizer, "h1")
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale((weight * math.inf).sum()).backward()
    scaler.step(optimizer)
    assert torch.equal(weight, before)


# -- closures ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("restore_grad", [False, True])
@pytest.mark.parametrize("by_name", [False, True])
def test_closures_get_their_own_gradients_directed(by_name: bool, restore_grad: bool) -> None:
    weight, g = nn.Parameter(drawn((6, 4))), drawn((6, 4), 1)
    before = weight.detach().clone()
    optimizer = torch.optim.SGD([weight], lr=0.1)
    channel_directed(optimizer, "h1", restore_grad=restore_grad)
    weight.grad = drawn((6, 4), 2)  # stale: the closure replaces it

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (weight * g).sum()
        loss.backward()
        return loss

    loss = optimizer.step(closure=closure) if by_name else optimizer.step(closure)
    directed = slow_gradient(g, "h1", 1.0, 0, "periodic")
    torch.testing.assert_close(loss.detach(), (before * g).sum())
    torch.testing.assert_close(weight.detach(), before - 0.1 * directed)
    torch.testing.assert_close(weight.grad, g if restore_grad else directed)


def test_restored_gradients_are_forgotten() -> None:
    weight = nn.Parameter(drawn((6, 4)))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    channel_directed(optimizer, "h1", restore_grad=True)
    weight.grad = drawn((6, 4), 1)
    optimizer.step()
    optimizer.zero_grad()
    optimizer.step()
    assert weight.grad is None


class EvaluatesTwice(torch.optim.Optimizer):
    """Calls its closure twice; the gradients of the second evaluation add to those of the first."""

    def __init__(self, params: list[Tensor]) -> None:
        super().__init__(params, {})

    def step(self, closure: Callable[[], Tensor]) -> None:  # type: ignore[override]
        closure()
        closure()


def test_evaluations_of_a_closure_accumulate_plain_gradients() -> None:
    weight, g = nn.Parameter(drawn((6, 4))), drawn((6, 4), 1)
    seen: list[Tensor] = []
    optimizer = EvaluatesTwice([weight])
    channel_directed(optimizer, "h0", lam=4.0, restore_grad=True)

    def closure() -> None:
        with torch.enable_grad():
            (weight * g).sum().backward()
        seen.append(weight.grad.clone())

    optimizer.step(closure)
    torch.testing.assert_close(seen, [g, 2 * g])
    torch.testing.assert_close(weight.grad, 2 * g)


# -- attaching ---------------------------------------------------------------------------------------------------------


def test_optimisers_that_cannot_be_attached_to() -> None:
    weight = nn.Parameter(torch.ones(2, 2))
    with pytest.raises(TypeError, match=r"optimizer is an object of type list, expected a torch\.optim\.Optimizer"):
        channel_directed([weight])  # type: ignore[arg-type]
    for line_search in (None, "strong_wolfe"):
        with pytest.raises(TypeError, match=r"optimizer is LBFGS, .* Use a first-order optimiser"):
            channel_directed(torch.optim.LBFGS([weight], line_search_fn=line_search))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    handle = channel_directed(optimizer)
    with pytest.raises(ValueError, match=r"this SGD already has channel-directed gradients: call remove\(\)"):
        channel_directed(optimizer)
    handle.remove()
    again = channel_directed(optimizer)
    handle.remove()  # a second time: the new handle stays
    with pytest.raises(ValueError, match="already has"):
        channel_directed(optimizer)
    again.remove()
    assert not optimizer._optimizer_step_pre_hooks


@pytest.mark.parametrize("options", [{"metric": "h3"}, {"lam": -1.0}, {"axis": "out"}, {"axis": 2}, {"ends": "open"}])
def test_bad_options_leave_the_optimiser_bare(options: dict[str, Any]) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(2, 2))], lr=0.1)
    with pytest.raises(ValueError, match=r"expected|inner product"):
        channel_directed(optimizer, **options)
    assert not optimizer._optimizer_step_pre_hooks
    channel_directed(optimizer)


@pytest.mark.parametrize("other", [nn.Linear(2, 2), nn.Embedding(3, 2)], ids=["another model", "nothing to direct"])
def test_a_module_that_directs_nothing_leaves_the_optimiser_bare(other: nn.Module) -> None:
    model = nn.Linear(2, 2) if isinstance(other, nn.Linear) else other
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"no parameter .* is directed \(.* is .*\); pass as module= the model"):
        channel_directed(optimizer, module=other)
    assert not optimizer._optimizer_step_pre_hooks
    channel_directed(optimizer, module=other, select=lambda name, parameter: False)


def test_sparse_and_complex_gradients_are_refused_before_any_change() -> None:
    first, second = nn.Parameter(drawn((3, 2))), nn.Parameter(drawn((3, 2)))
    g = drawn((3, 2), 1)
    for bad, message in (
        (g.to_sparse(), r"the gradient of param_groups\[0\]\['params'\]\[1\] is sparse, .* sparse=False"),
        (None, "the gradient of .* has type torch.complex128, expected a real"),
    ):
        if bad is None:
            second = nn.Parameter(drawn((3, 2)).to(torch.complex128))
            bad = g.to(torch.complex128)
        optimizer = torch.optim.SGD([first, second], lr=0.1)
        channel_directed(optimizer, "h1")
        first.grad, second.grad = g.clone(), bad
        before = first.detach().clone()
        with pytest.raises(TypeError, match=message):
            optimizer.step()
        assert torch.equal(first.grad, g)
        assert torch.equal(first, before)


# -- checkpoints and copies --------------------------------------------------------------------------------------------


def step_is_directed(optimizer: torch.optim.Optimizer) -> bool:
    weight = optimizer.param_groups[0]["params"][0]
    g = drawn(tuple(weight.shape), 7)
    weight.grad = g.clone()
    optimizer.step()
    if torch.equal(weight.grad, g):
        return False
    torch.testing.assert_close(weight.grad, slow_gradient(g, "h1", 1.0, 0, "periodic"))
    return True


def test_state_dicts_are_those_of_the_bare_optimiser() -> None:
    weight, other = twin_weights()
    optimizer, bare = torch.optim.AdamW([weight]), torch.optim.AdamW([other])
    channel_directed(optimizer, "h1")
    assert step_is_directed(optimizer)
    assert not step_is_directed(bare)
    assert optimizer.state_dict().keys() == bare.state_dict().keys()
    assert optimizer.state_dict()["param_groups"] == bare.state_dict()["param_groups"]
    optimizer.load_state_dict(bare.state_dict())
    assert step_is_directed(optimizer)


def test_a_checkpoint_does_not_undo_an_exclusion() -> None:
    weight = nn.Parameter(drawn((4, 2)))
    optimizer = torch.optim.SGD([{"params": [weight], "channel_directed": False}], lr=0.1)
    handle = channel_directed(optimizer, "h1")
    optimizer.load_state_dict(torch.optim.SGD([nn.Parameter(drawn((4, 2)))], lr=0.2).state_dict())
    assert not step_is_directed(optimizer)
    assert not step_is_directed(copy.deepcopy(handle).optimizer)


class Refuses(torch.optim.SGD):
    """Its steps raise as long as ``refuses``."""

    refuses = True

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        if self.refuses:
            raise FloatingPointError("refused")
        return super().step(closure)


@pytest.mark.parametrize("copies_fail", [False, True])
def test_gradients_of_a_step_that_raised_do_not_come_back(monkeypatch, copies_fail: bool) -> None:
    weights = [nn.Parameter(drawn((4, 2), k)) for k in range(2)]
    optimizer = Refuses(weights, lr=0.1)
    channel_directed(optimizer, "h1", restore_grad=True)
    for weight in weights:
        weight.grad = drawn((4, 2), 7)
    if copies_fail:
        monkeypatch.setattr(Tensor, "clone", None)
    with pytest.raises(TypeError if copies_fail else FloatingPointError):
        optimizer.step()
    monkeypatch.undo()
    optimizer.refuses = False
    optimizer.zero_grad()
    new = drawn((4, 2), 8)
    weights[0].grad = new
    optimizer.step()
    assert weights[0].grad is new
    assert weights[1].grad is None


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies(copied: Callable[[Any], Any]) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(drawn((4, 2)))], lr=0.1)
    handle = channel_directed(optimizer, "h1")
    bare = copied(optimizer)
    assert not step_is_directed(bare)
    channel_directed(bare, "h1")
    assert step_is_directed(bare)

    twin = copied(handle)
    assert twin.optimizer is not optimizer
    assert step_is_directed(twin.optimizer)
    twin.remove()
    assert not step_is_directed(twin.optimizer)
    assert not step_is_directed(copied(twin).optimizer)
    assert step_is_directed(optimizer)


def test_a_checkpoint_of_everything_stays_connected() -> None:
    model = nn.Linear(3, 4).double()
    handle = channel_directed(torch.optim.SGD(model.parameters(), lr=0.1), "h1", module=model)
    buffer = io.BytesIO()
    torch.save((model, handle), buffer)
    buffer.seek(0)
    model, handle = torch.load(buffer, weights_only=False)
    assert handle.parameters == [model.weight]
    assert step_is_directed(handle.optimizer)


# -- manifolds ---------------------------------------------------------------------------------------------------------

MANIFOLDS = {
    "geoopt.Sphere": geoopt.Sphere(),
    "geoopt.EuclideanStiefel": geoopt.EuclideanStiefel(),
    "geoopt.Euclidean": geoopt.Euclidean(),
    "geoopt product": geoopt.ProductManifold((geoopt.Sphere(), 2), (geoopt.Euclidean(), 1)),
    "ScaledSphere": fgo_geo.ScaledSphere(radius=0.5),
    "Oblique": fgo_geo.Oblique(radius=2.0),
    "Stiefel": fgo_geo.Stiefel(radius=3.0),
}


@pytest.mark.parametrize("name", MANIFOLDS)
@given(metric=st.sampled_from(METRICS), lam=st.floats(0.1, 100.0), seed=st.integers(0, 2**31))
def test_on_a_manifold_the_direction_is_tangent_and_descends(name: str, metric: Any, lam: float, seed: int) -> None:
    manifold = MANIFOLDS[name]
    x = manifold.projx(drawn((6, 3), seed))
    weight = geoopt.ManifoldParameter(x, manifold=manifold)
    optimizer = geoopt.optim.RiemannianSGD([weight], lr=0.0)
    channel_directed(optimizer, metric, lam)
    g = drawn((6, 3), seed + 1)
    tangent = manifold.proju(x, g)
    weight.grad = g.clone()
    optimizer.step()
    expected = manifold.proju(x, slow_gradient(tangent, metric, lam, 0, "periodic"))
    torch.testing.assert_close(weight.grad, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(manifold.proju(x, weight.grad), weight.grad, rtol=1e-9, atol=1e-9)
    assert (weight.grad * g).sum() > 0


@pytest.mark.parametrize("optimizer_type", [geoopt.optim.RiemannianSGD, fgo_geo.RiemannianFGSGD])
def test_training_on_the_sphere_finds_the_leading_eigenvector(optimizer_type: Any) -> None:
    matrix = torch.diag(torch.tensor([1.0, 2.0, 3.0, 6.0], dtype=torch.float64)).roll((1, 1), (0, 1))
    sphere = fgo_geo.ScaledSphere(ndim=2)
    weight = geoopt.ManifoldParameter(sphere.projx(drawn((4, 1))), manifold=sphere)
    optimizer = optimizer_type([weight], lr=0.2)
    channel_directed(optimizer, "h1", lam=1.0)
    for _ in range(200):
        optimizer.zero_grad()
        (-(weight.T @ matrix @ weight) / 2).sum().backward()
        optimizer.step()
    torch.testing.assert_close(weight.detach().abs(), torch.eye(4, dtype=torch.float64)[:, :1], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("manifold", "point"),
    [
        (geoopt.CanonicalStiefel(), torch.eye(4, 2)),
        (geoopt.PoincareBall(), torch.zeros(4, 2)),
        (geoopt.SymmetricPositiveDefinite(), torch.eye(3)),  # where its metric happens to be Euclidean
    ],
)
def test_manifolds_with_another_metric_are_refused(manifold: geoopt.Manifold, point: Tensor) -> None:
    weight = geoopt.ManifoldParameter(point.double(), manifold=manifold)
    optimizer = geoopt.optim.RiemannianSGD([weight], lr=0.1)
    with pytest.raises(ValueError, match=r"lies on .*, whose metric is not that of the surrounding space .* leave the"):
        channel_directed(optimizer)
    assert not optimizer._optimizer_step_pre_hooks
    optimizer.param_groups[0]["channel_directed"] = False
    assert channel_directed(optimizer).parameters == []
