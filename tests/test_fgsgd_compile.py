"""RiemannianFGSGD inside torch.compile, without synchronisation, and on tensors without values."""

from __future__ import annotations

from typing import Any

import geoopt
import pytest
import torch
from parameters import MOMENTA, STEP_SIZES, network, on, set_gradients
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fgo_geo import Oblique, RiemannianFGSGD, ScaledSphere, Stiefel


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_step_is_the_same_step(backend):
    """The step runs between graphs, and parameters on manifolds do not decay to plain ones."""
    torch._dynamo.reset()
    compiled, eager = network(), network()
    optimizers = [RiemannianFGSGD(params, lr=0.3, momentum=0.9, weight_decay=0.01) for params in (compiled, eager)]
    step = torch.compile(lambda: optimizers[0].step(), backend=backend)
    for seed in range(3):
        for params in (compiled, eager):
            set_gradients(params, seed)
        step()
        optimizers[1].step()
    for a, b in zip(compiled, eager, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    for a, b in zip(optimizers[0].step_scales().values(), optimizers[1].step_scales().values(), strict=True):
        torch.testing.assert_close(a, b)
    assert optimizers[0].skipped_groups() == 0


def test_a_compiled_step_follows_the_learning_rate():
    torch._dynamo.reset()
    params, twins = [on(Stiefel(), 5, 3)], [on(Stiefel(), 5, 3)]
    optimizers = [RiemannianFGSGD(p, lr=torch.tensor(0.4), momentum=0.9) for p in (params, twins)]
    step = torch.compile(lambda: optimizers[0].step(), backend="eager")
    for seed in range(3):
        for optimizer, p in zip(optimizers, (params, twins), strict=True):
            set_gradients(p, seed)
            optimizer.param_groups[0]["lr"].fill_(0.4 / (1 + seed))
        step()
        optimizers[1].step()
        torch.testing.assert_close(params[0], twins[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("manifold", [ScaledSphere, Oblique, Stiefel])
@pytest.mark.parametrize("options", [{}, {"curvature": "manifold"}], ids=str)
def test_a_compiled_step_on_matrices_follows_their_radii(manifold, options):
    """Numbers that change are compiled once, not for every value."""
    torch._dynamo.reset()
    networks = [[on(manifold(r), 8, 4, seed=k) for k, r in enumerate((2.0, 2.0, 3.0))] for _ in range(2)]
    optimizers = [RiemannianFGSGD(params, lr=torch.tensor(0.1), momentum=0.9, **options) for params in networks]
    step = torch.compile(optimizers[0].step, backend="eager")
    for number in range(6):
        for params in networks:
            set_gradients(params, number)
            for param in params if number >= 2 else ():
                param.manifold.radius *= 1.0 + 0.1 * number
                param.data.copy_(param.manifold.projx(param.data))
        step()
        optimizers[1].step()
        for a, b in zip(*networks, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
            assert a.manifold.violation(a.detach()).max() <= 1e-12


def test_one_graph_of_the_whole_step_is_refused_by_torch_before_anything_changes():
    torch._dynamo.reset()
    param = on(Stiefel(), 5, 3)
    before = param.detach().clone()
    optimizer = RiemannianFGSGD([param], lr=0.1, momentum=0.9)
    set_gradients([param], 1)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(lambda: optimizer.step(), backend="eager", fullgraph=True)()
    torch.testing.assert_close(param.detach(), before, rtol=0, atol=0)
    assert not optimizer.state


def test_graphs_that_may_end_raise_on_what_is_not_finite():
    torch._dynamo.reset()
    params = [on(Stiefel(), 5, 3), on(Oblique(), 4, 3, 3, 3)]
    twins = [geoopt.ManifoldParameter(p.detach().clone(), manifold=p.manifold) for p in params]
    optimizers = [RiemannianFGSGD(p, lr=0.1, momentum=0.9, check_finite=True) for p in (params, twins)]
    step = torch.compile(optimizers[0].step, backend="eager")
    for number in range(2):
        for some in (params, twins):
            set_gradients(some, number)
        step()
        optimizers[1].step()
    for param, twin in zip(params, twins, strict=True):
        torch.testing.assert_close(param, twin, rtol=1e-12, atol=1e-12)
    for bad in params:
        set_gradients(params, 3)
        bad.grad[0] = torch.nan
        with pytest.raises(FloatingPointError, match="no parameter was changed"):
            step()
    for param, twin in zip(params, twins, strict=True):
        torch.testing.assert_close(param, twin, rtol=1e-12, atol=1e-12)


class NoSynchronisation(TorchDispatchMode):
    """Raises when a tensor's values reach the host, or decide a shape."""

    FORBIDDEN = ("_local_scalar_dense", "is_nonzero", "item", "nonzero", "masked_select", "unique", "equal")

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        name = func.overloadpacket.__name__
        by_mask = name.startswith("index") and any(
            isinstance(i, Tensor) and i.dtype == torch.bool for a in args if isinstance(a, (list, tuple)) for i in a
        )
        if name in self.FORBIDDEN or by_mask:
            raise AssertionError(f"{name} synchronises with the host")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "forbidden",
    [lambda x: x.sum().item(), lambda x: bool(x[0] > 0), lambda x: x[x > 0]],
    ids=["item", "bool", "mask"],
)
def test_the_watch_for_synchronisation_notices_it(forbidden):
    with NoSynchronisation(), pytest.raises(AssertionError, match="synchronises"):
        forbidden(torch.ones(3))


@pytest.mark.parametrize("update", ["retraction", "exponential"])
@pytest.mark.parametrize("momentum", MOMENTA)
@pytest.mark.parametrize("step_size", STEP_SIZES)
def test_a_step_without_the_check_reads_nothing_on_the_host(update, momentum, step_size):
    params = network()
    options = {"lr": 0.1, "check_finite": False, "weight_decay": 0.1, "radius_invariant": True, "update": update}
    optimizer = RiemannianFGSGD(params, **options, **momentum, **step_size)
    for seed in range(2):
        set_gradients(params, seed)
        with NoSynchronisation() as watch:
            optimizer.step()
        assert watch.calls > 0


def test_a_step_runs_on_tensors_without_values():
    shapes = [(ScaledSphere(0.5, ndim=2), (3, 3, 3)), (Oblique(), (5, 3)), (Stiefel(), (5, 3))]
    params = [geoopt.ManifoldParameter(torch.empty(shape, device="meta"), manifold=m) for m, shape in shapes]
    optimizer = RiemannianFGSGD(params, lr=0.1, momentum=0.9)
    for _ in range(2):
        for param in params:
            param.grad = torch.empty_like(param, device="meta")
        optimizer.step()
    assert all(optimizer.state[p]["momentum_buffer"].is_meta for p in params)
