"""The momentum step on large Stiefel matrices: what it shares, carries, and notices."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import geoopt
import numpy as np
import pytest
import reference_optimizer as reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from fgo_geo import RiemannianFGSGD, Stiefel
from fgo_geo.linalg import matmul, products, subtract_part
from fgo_geo.manifolds import stiefel
from fgo_geo.optim import fgsgd
from fgo_geo.paths import shared_products
from fgo_geo.paths.shared_products import Carried, shared_products_step, tangent_square


def normal(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def parameter(shape: tuple[int, ...], radius: float = 1.0, dtype: torch.dtype = torch.float64) -> Any:
    manifold = Stiefel(radius)
    return geoopt.ManifoldParameter(manifold.projx(normal(shape, 0)).to(dtype), manifold=manifold)


def run(optimizer: RiemannianFGSGD, param: Tensor, steps: range, size: float = 1.0) -> None:
    for step in steps:
        param.grad = size * normal(tuple(param.shape), 1 + step).to(param.dtype)
        optimizer.step()


def plain(tensor: Tensor) -> Tensor:
    return tensor.detach().as_subclass(Tensor)


OPTIONS: list[dict[str, Any]] = [
    {},
    {"radius_invariant": True},
    {"dampening": 0.3},
    {"maximize": True},
    {"step_size": "constant", "lr": 0.01},
    {"lr": torch.tensor(0.1)},
    {"lr": 0.0},
    {"lr": 30.0},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shape", [(16, 16), (40, 20), (2, 300, 131)], ids=str)
@pytest.mark.parametrize("radius", [1.0, 0.3])
def test_it_is_the_step_of_the_paper(shape: tuple[int, ...], radius: float, options: dict[str, Any]) -> None:
    """Ten steps, so that what is carried has grown old once."""
    options = {"lr": 0.1, "momentum": 0.9, **options}
    param = parameter(shape, radius)
    oracle = reference.batch_of_components(plain(param).numpy(), 2, reference.Stiefel, radius)
    optimizer = RiemannianFGSGD([param], **options)
    for step in range(10):
        param.grad = normal(shape, 1 + step)
        optimizer.step()
        reference.step(oracle, param.grad.numpy(), **{**options, "lr": float(options["lr"])})
        np.testing.assert_allclose(plain(param).numpy(), oracle.x, rtol=0, atol=1e-11 * radius)
    assert oracle.buffer is not None
    buffer = param.manifold.proju(plain(param), optimizer.state[param]["momentum_buffer"])
    np.testing.assert_allclose(buffer.numpy(), oracle.buffer, rtol=0, atol=1e-11 * np.abs(oracle.buffer).max())
    np.testing.assert_allclose(optimizer.step_scales()[param].numpy(), oracle.scales, rtol=1e-12)


@pytest.mark.parametrize("lr", [1e-8, 1e-3, 0.1, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_carried_is_the_product(dtype: torch.dtype, lr: float) -> None:
    """However small the rate: nothing is divided by it."""
    param = parameter((60, 24), 2.0, dtype)
    optimizer = RiemannianFGSGD([param], lr=lr, momentum=0.9)
    run(optimizer, param, range(30))
    ((carried, _),) = optimizer._carried.values()
    buffer = optimizer.state[param]["momentum_buffer"]
    product = plain(param).double().mT @ buffer.double()
    torch.testing.assert_close(
        carried.along.double(), product, rtol=0, atol=50 * torch.finfo(dtype).eps * float(buffer.norm())
    )


def test_what_is_carried_is_as_exact_as_it_says() -> None:
    """The rounding of xᵀm grows with m, and fades with the momentum."""
    manifold = Stiefel(2.0)
    x = manifold.projx(normal((40, 20), 0))
    grad, buffer = (manifold.proju(x, normal((40, 20), seed)) for seed in (1, 2))
    before = Carried.of(x, buffer, 2.0, x.mT @ buffer, drift=3.0, slip=5.0)
    _, m, after = shared_products_step(manifold, x, grad, x.mT @ grad, buffer, before, scale=1.0, lr=1e-3, momentum=0.5)
    assert after is not None
    assert after.slip == pytest.approx(0.5 * 5.0 + float(m.norm()) / 2.0)
    assert after.drift == pytest.approx(3.0 + 2e-3 * 0.5 * 5.0 + 1)


def test_rounding_does_not_add_up() -> None:
    """Under gradients without a direction."""
    param = parameter((64, 32), 0.7, torch.float32)
    optimizer = RiemannianFGSGD([param], lr=0.01, momentum=0.9)
    worst = 0.0
    for step in range(3000):
        param.grad = normal((64, 32), step, torch.float32)
        optimizer.step()
        if step % 7 == 0:
            worst = max(worst, float(param.manifold.violation(plain(param).double())))
    assert worst <= 1e-6


def test_a_point_off_its_manifold_comes_back() -> None:
    """In the first step, and whenever the probe sees it."""
    off = normal((40, 20), 7)
    param = parameter((40, 20))
    with torch.no_grad():
        param.add_(1e-4 * off)
    optimizer = RiemannianFGSGD([param], lr=0.01, momentum=0.9)
    for step in range(12):
        if step == 5:
            param.data.add_(1e-6 * off)
        run(optimizer, param, range(step, step + 1))
        assert float(param.manifold.violation(plain(param))) < 1e-11


@pytest.mark.parametrize(("lr", "momentum"), [(0.1, 0.9), (0.5, 0.9), (1.0, 0.5)])
def test_nor_does_it_where_steps_push_outward(lr: float, momentum: float) -> None:
    """Minimising tr(xᵀAx) from near its maximum; a step multiplies what x is off by up to 1 + 2η‖S‖."""
    turn = torch.linalg.qr(normal((64, 64), 0))[0]
    values = torch.cat([torch.tensor([6.0]), torch.linspace(0, 1, 63)]).double()
    a = (turn @ torch.diag(values) @ turn.mT).float()
    manifold = Stiefel()
    start = manifold.projx(turn[:, :16].float() + 0.02 * normal((64, 16), 1, torch.float32))
    param = geoopt.ManifoldParameter(start, manifold=manifold)
    optimizer = RiemannianFGSGD([param], lr=lr, momentum=momentum)
    for _ in range(150):
        optimizer.zero_grad()
        (0.5 * (param.mT @ a @ param).diagonal().sum()).backward()
        optimizer.step()
        assert float(manifold.violation(plain(param).double())) <= 4e-6


@pytest.mark.parametrize("size", [2.0, 4.0, 20.0])
def test_nor_under_a_gradient_that_is_normal_for_the_most_part(size: float) -> None:
    """In double precision, where nothing else would notice."""
    param = parameter((48, 16))
    optimizer = RiemannianFGSGD([param], lr=2.0, momentum=0.1)
    for step in range(40):
        x = plain(param)
        outward = x @ torch.diag(torch.cat([torch.tensor([-size]), torch.zeros(15)]).double())
        tangent = param.manifold.proju(x, normal((48, 16), step))
        param.grad = outward + 0.05 * tangent / tangent.norm()
        optimizer.step()
        assert float(param.manifold.violation(plain(param))) <= 5e-15


CHANGES: dict[str, Any] = {
    "another point": lambda x, m: x.copy_(Stiefel().projx(normal((40, 20), 99))),
    "another momentum": lambda x, m: m.copy_(normal((40, 20), 98)),
    "columns of the momentum in another order": lambda x, m: m.copy_(m.flip(1)),
    "momentum the other way": lambda x, m: m.mul_(-1),
    "a point behind the counter's back": lambda x, m: x.data.copy_(Stiefel().projx(normal((40, 20), 99))),
    "momentum behind the counter's back": lambda x, m: m.data.copy_(m.flip(1)),
    "the point a little smaller behind the counter's back": lambda x, m: x.data.mul_(1 - 1e-9),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_belongs_to_another_point_is_not_used(change: str) -> None:
    param = parameter((40, 20))
    optimizer = RiemannianFGSGD([param], lr=0.05, momentum=0.9)
    run(optimizer, param, range(3))
    with torch.no_grad():  # as an exponential moving average does when it takes the weights' place
        CHANGES[change](param, optimizer.state[param]["momentum_buffer"])
    oracle = reference.batch_of_components(plain(param).numpy(), 2, reference.Stiefel, 1.0)
    oracle.buffer = reference.Stiefel(1.0).project(oracle.x, optimizer.state[param]["momentum_buffer"].numpy())
    run(optimizer, param, range(3, 4))
    reference.step(oracle, param.grad.numpy(), lr=0.05, momentum=0.9)
    np.testing.assert_allclose(plain(param).numpy(), oracle.x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("by_columns", [False, True])
@pytest.mark.parametrize("batch", [(), (2,)])
@pytest.mark.parametrize("shape", [(3, 1), (40, 20), (200, 100)], ids=str)
def test_what_was_left_is_known_again(shape: tuple[int, int], batch: tuple[int, ...], by_columns: bool) -> None:
    """Every row and every column counts; the numbers in one of them may have changed to the eighth digit."""
    x, m = normal((*batch, *shape), 0), normal((*batch, *shape), 1)
    if by_columns:
        x, m = (t.mT.contiguous().mT for t in (x, m))
    radius = torch.full((*batch, 1, 1), 2.0)
    with_along, without = (Carried.of(x, m, radius, along, drift=1.0, slip=1.0) for along in (x.mT @ m, None))
    assert all(carried.belongs_to(x.clone(), m.clone(), radius.clone()) for carried in (with_along, without))
    for row in range(shape[0]):
        changed = x.clone()
        changed[..., row, :] *= 1 + 1e-8
        assert not without.belongs_to(changed, m, radius), row
        assert not with_along.belongs_to(x, changed, radius), row
    for column in range(shape[1]):
        changed = m.clone()
        changed[..., :, column] *= 1 + 1e-8
        assert not with_along.belongs_to(x, changed, radius), column
        assert without.belongs_to(x, changed, radius), column
    number = Carried.of(x, m, 2.0, None, drift=1.0, slip=1.0)
    assert number.belongs_to(x, m, 2.0)
    assert not number.belongs_to(x, m, 2.5)
    assert not number.belongs_to(x, m, radius)
    assert not without.belongs_to(x, m, 2.0)
    assert not number.belongs_to(x.float(), m, 2.0)
    radius.mul_(1.5)
    assert not without.belongs_to(x, m, radius)


@pytest.mark.parametrize("by_columns", [False, True])
@pytest.mark.parametrize("shape", [(1024, 512), (512, 512), (700, 60), (100, 33), (40, 16)], ids=str)
def test_blocks_that_were_written_to_are_seen(shape: tuple[int, int], by_columns: bool) -> None:
    """Wherever they are, but for narrow ones."""
    x = torch.randn(shape)
    if by_columns:
        x = x.mT.contiguous().mT
    carried = Carried.of(x, x, 1.0, None, drift=1.0, slip=1.0)
    long, across = (x.mT if by_columns else x).shape
    rows, columns = (
        min(long, 2 * max(1, min(long, across // 16))),
        min(across, across // max(1, min(long, across // 16)) + 16),
    )
    for seed in range(100):
        generator = torch.Generator().manual_seed(seed)
        row = int(torch.randint(0, max(1, (long - rows) // 2), (), generator=generator))
        column = int(torch.randint(0, across - columns + 1, (), generator=generator))
        changed = x.clone()
        (changed.mT if by_columns else changed)[row : row + rows, column : column + columns] = 0
        assert not carried.belongs_to(changed, x), (row, column)


def test_what_is_not_seen_is_mended() -> None:
    """Within the eight steps until one measures; of the row of this number the 20th to the 35th are looked at."""
    param = parameter((64, 40), dtype=torch.float64)
    optimizer = RiemannianFGSGD([param], lr=0.01, momentum=0.9)
    run(optimizer, param, range(4))
    ((carried, _),) = optimizer._carried.values()
    buffer = optimizer.state[param]["momentum_buffer"]
    for tensor in (param.data, buffer.data):
        before = tensor[5, 39].clone()
        tensor[5, 39] += 0.3
        assert carried.belongs_to(plain(param), buffer)
        if tensor is buffer.data:
            tensor[5, 39] = before
    violations: list[float] = []
    for step in range(4, 14):
        run(optimizer, param, range(step, step + 1))
        violations.append(float(param.manifold.violation(plain(param))))
    assert violations[0] > 1e-3
    assert max(violations[8:]) < 1e-13


@pytest.mark.parametrize("radii", [(1.0, torch.tensor([1.0, 1.0])), (torch.tensor([1.0, 1.0]), 1.0)], ids=str)
def test_a_radius_that_becomes_one_of_components(radii: tuple[Any, Any]) -> None:
    param = geoopt.ManifoldParameter(Stiefel(radii[0]).random(2, 40, 20).detach(), manifold=Stiefel(radii[0]))
    optimizer = RiemannianFGSGD([param], lr=0.01, momentum=0.9)
    for step in range(6):
        if step == 3:
            param.manifold.radius = radii[1]
        param.grad = normal((2, 40, 20), step, param.dtype)
        optimizer.step()
        assert float(param.manifold.violation(plain(param)).max()) < 1e-6


@pytest.mark.parametrize("factor", [0.5, 0.9, 0.99, 1.01, 1 - 1e-4, 1.5])
@pytest.mark.parametrize("written", ["data", "no_grad"])
def test_weights_that_are_scaled_between_steps(factor: float, written: str) -> None:
    """As a weight decay of one's own does."""
    param = parameter((64, 32), dtype=torch.float32)
    optimizer = RiemannianFGSGD([param], lr=0.05, momentum=0.9)
    for step in range(20):
        run(optimizer, param, range(step, step + 1), size=0.1)
        assert float(param.manifold.violation(plain(param).double())) <= 2e-6, step
        if written == "data":
            param.data.mul_(factor)
        else:
            with torch.no_grad():
                param.mul_(factor)


def test_another_point_is_measured() -> None:
    """Whoever puts it there may have put it off the manifold."""
    param = parameter((40, 20))
    optimizer = RiemannianFGSGD([param], lr=0.01, momentum=0.9)
    run(optimizer, param, range(3))
    param.data.copy_(param.manifold.projx(normal((40, 20), 99)) + 1e-4 * normal((40, 20), 98))
    run(optimizer, param, range(3, 4))
    assert float(param.manifold.violation(plain(param))) < 1e-11


def test_to_go_on_and_to_resume_is_the_same_bit_for_bit() -> None:
    param = parameter((64, 33), dtype=torch.float32)
    optimizer = RiemannianFGSGD([param], lr=0.05, momentum=0.9)
    run(optimizer, param, range(5))
    saved = copy.deepcopy(optimizer.state_dict())
    other = geoopt.ManifoldParameter(plain(param).clone(), manifold=Stiefel())
    resumed = RiemannianFGSGD([other], lr=0.05, momentum=0.9)
    resumed.load_state_dict(saved)
    for one, its in ((optimizer, param), (resumed, other)):
        run(one, its, range(5, 15))
    assert torch.equal(plain(param), plain(other))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["copy", "pickle"])
def test_so_it_is_for_copies(copied: Any) -> None:
    param = parameter((64, 33), dtype=torch.float32)
    optimizer = RiemannianFGSGD([param], lr=0.05, momentum=0.9)
    run(optimizer, param, range(5))
    other = copied(optimizer)
    (its,) = other.param_groups[0]["params"]
    for one, of_one in ((optimizer, param), (other, its)):
        run(one, of_one, range(5, 15))
    assert torch.equal(plain(param), plain(its))


def test_nothing_is_held_of_parameters_that_take_no_step() -> None:
    param = parameter((40, 20))
    optimizer = RiemannianFGSGD([param], lr=0.05, momentum=0.9)
    run(optimizer, param, range(2))
    assert len(optimizer._carried) == 1
    param.grad = None
    optimizer.step()
    assert len(optimizer._carried) == 0
    run(optimizer, param, range(2, 4))
    optimizer.stabilize_group(optimizer.param_groups[0])
    assert len(optimizer._carried) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_carries_nothing(dtype: torch.dtype) -> None:
    """The point is rounded after the step, and with it all that follows from it."""
    param = parameter((64, 32), dtype=dtype)
    optimizer = RiemannianFGSGD([param], lr=0.05, momentum=0.9)
    run(optimizer, param, range(20))
    assert len(optimizer._carried) == 0
    assert float(param.manifold.violation(plain(param).double())) <= 4 * torch.finfo(dtype).eps


def test_a_gradient_that_is_not_finite_leaves_the_momentum_to_move() -> None:
    """Where it is not refused."""
    params = [parameter((40, 20)), parameter((40, 20))]
    optimizers = [RiemannianFGSGD([p], lr=0.05, momentum=0.9, check_finite=False) for p in params]
    for param, optimizer, last in zip(params, optimizers, (float("nan"), 0.0), strict=True):
        run(optimizer, param, range(3))
        param.grad = torch.full((40, 20), last, dtype=torch.float64)
        optimizer.step()
    assert [optimizer.skipped_groups() for optimizer in optimizers] == [1, 0]
    assert torch.equal(plain(params[0]), plain(params[1]))


@pytest.mark.parametrize("invariant", [False, True])
def test_the_norm_of_a_gradient_that_is_nearly_normal(invariant: bool) -> None:
    """The difference of two large numbers would be rounding."""
    param = parameter((60, 30), 2.0, torch.float32)
    x = plain(param).double()
    tangent = param.manifold.proju(x, normal((60, 30), 3))
    tangent = 1e-3 * tangent / tangent.norm()
    param.grad = (x @ torch.diag(torch.linspace(1, 2, 30).double()) + tangent).float()
    expected = param.manifold.proju(x, param.grad.double()).norm() * (2.0 if invariant else 1.0)
    options: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "rho": 1e3, "radius_invariant": invariant}
    oracle = reference.batch_of_components(x.numpy(), 2, reference.Stiefel, 2.0)
    reference.step(oracle, param.grad.double().numpy(), **options)
    optimizer = RiemannianFGSGD([param], **options)
    optimizer.step()  # τ = R (2ρ + R)
    np.testing.assert_allclose(plain(param).numpy(), oracle.x, rtol=0, atol=1e-6)
    tau = float(optimizer.step_scales()[param])
    assert tau == pytest.approx(float(expected * (2e3 + expected)), rel=1e-3)


@given(a=st.integers(1, 24), b=st.integers(1, 24), radius=st.floats(0.1, 10), seed=st.integers(0, 99))
def test_the_square_of_a_projection_needs_no_projection(a: int, b: int, radius: float, seed: int) -> None:
    shape = (3, max(a, b, 2), min(a, b))
    manifold = Stiefel(torch.tensor([radius, 2 * radius, 1.0], dtype=torch.float64))
    x, u = manifold.projx(normal(shape, seed)), normal(shape, seed + 100)
    whole, expected = u.square().sum((-2, -1)), manifold.proju(x, u).square().sum((-2, -1))
    actual = tangent_square(u, x.mT @ u, manifold.radius_for(x))
    if actual is None:
        assert bool((expected < 0.011 * whole).any())
    else:
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10 * float(whole.max()))


@pytest.mark.parametrize("invariant", [False, True])
@pytest.mark.parametrize("radius", [[0.5, 1.0, 3.0], 0.5, [2.0]], ids=str)
def test_radii_of_components(radius: Any, invariant: bool) -> None:
    radii = torch.tensor(radius, dtype=torch.float64)
    manifold = Stiefel(radii)
    start = manifold.projx(normal((3, 40, 20), 0))
    param = geoopt.ManifoldParameter(start.clone(), manifold=manifold)
    oracle = reference.batch_of_components(start.numpy(), 2, reference.Stiefel, radii.expand(3).numpy())
    options = {"lr": 0.1, "momentum": 0.9, "radius_invariant": invariant}
    optimizer = RiemannianFGSGD([param], **options)
    for step in range(9):
        param.grad = normal((3, 40, 20), 1 + step)
        optimizer.step()
        reference.step(oracle, param.grad.numpy(), **options)
    np.testing.assert_allclose(plain(param).numpy(), oracle.x, rtol=0, atol=1e-11)


@pytest.mark.parametrize(("n", "p", "long"), [(512, 128, 8), (640, 256, 7.5), (768, 512, 7.25)])
def test_the_operations_are_those_of_the_docstring(
    n: int, p: int, long: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of four long products, one of them symmetric, and one of the short side.

    One step in eight carries nothing, and the next takes the product.
    """
    monkeypatch.setattr(matmul, "mkl_avoids_avx512", lambda: False)  # the profiler counts what torch.mm does
    param = parameter((n, p), dtype=torch.float32)
    optimizer = RiemannianFGSGD([param], lr=1e-4, momentum=0.9)
    run(optimizer, param, range(3), size=1e-3)
    with profile(activities=[ProfilerActivity.CPU], with_flops=True) as profiled:
        run(optimizer, param, range(3, 11), size=1e-3)
    products = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")
    flops = sum(event.flops for event in profiled.key_averages() if event.key in products) / 8
    assert flops == pytest.approx((long + 2 / 8) * n * p**2 + 7 / 8 * 2 * p**3, rel=0.01)


def test_a_step_that_was_refused_has_not_happened() -> None:
    """Nor has it written where the one before has left its product."""
    params = [parameter((40, 20)), parameter((40, 20))]
    optimizers = [RiemannianFGSGD([param], lr=0.05, momentum=0.9) for param in params]
    for param, optimizer in zip(params, optimizers, strict=True):
        run(optimizer, param, range(4))
        if param is params[0]:
            for _ in range(3):
                param.grad = torch.full((40, 20), float("nan"), dtype=torch.float64)
                with pytest.raises(FloatingPointError, match="no parameter was changed"):
                    optimizer.step()
        run(optimizer, param, range(4, 7))
    assert torch.equal(plain(params[0]), plain(params[1]))


def test_memory_is_that_of_the_first_steps() -> None:
    params = [parameter((40, 20)), parameter((30, 16))]
    optimizer = RiemannianFGSGD(params, lr=0.05, momentum=0.9)
    places: list[dict[Any, int]] = []
    for step in range(20):
        for param in params:
            param.grad = normal(tuple(param.shape), step)
        optimizer.step()
        buffers = [optimizer.state[param]["momentum_buffer"] for param in params]
        kept = optimizer._workspace._memory | dict(enumerate([*map(plain, params), *buffers]))
        places.append({key: tensor.data_ptr() for key, tensor in kept.items()})
    assert places[-1] == places[9]


def test_an_interrupted_step_leaves_every_matrix_before_or_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    params = [parameter((40, 20)), parameter((30, 16))]
    optimizer = RiemannianFGSGD(params, lr=0.05, momentum=0.9)

    def state() -> list[Tensor]:
        return [t.clone() for p in params for t in (plain(p), optimizer.state[p]["momentum_buffer"])]

    def step(own: RiemannianFGSGD) -> None:
        for param in own.param_groups[0]["params"]:
            param.grad = normal(tuple(param.shape), 1)
        own.step()

    step(optimizer)
    before = state()
    twin = copy.deepcopy(optimizer)
    step(twin)
    after = [t for p in twin.param_groups[0]["params"] for t in (plain(p), twin.state[p]["momentum_buffer"])]

    def interrupted(c: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if c.shape == params[1].shape:
            raise KeyboardInterrupt
        return subtract_part(c, *args, **kwargs)

    with monkeypatch.context() as patch:
        for module in (shared_products, stiefel):
            patch.setattr(module, "subtract_part", interrupted)
        with pytest.raises(KeyboardInterrupt):
            step(optimizer)
    for actual, expected in zip(state(), [*after[:2], *before[2:]], strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-14)
    assert len(optimizer._carried) == 0
    step(optimizer)
    assert max(float(p.manifold.violation(plain(p))) for p in params) < 1e-14


@pytest.mark.parametrize("radius", [0.5, 2.0])
def test_steps_that_measure_need_no_factorisation(radius: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their length explains how far they lead from the manifold."""
    param = parameter((40, 20), radius)
    optimizer = RiemannianFGSGD([param], lr=0.9 * radius, momentum=0.9)
    monkeypatch.setattr(stiefel, "polar_factor", None)
    for step in range(12):
        run(optimizer, param, range(step, step + 1), size=0.015)
        assert float(param.manifold.violation(plain(param))) < 1e-14


def test_rounding_small_parts_is_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a processor that multiplies bfloat16, and without one."""
    params = [parameter((300, 256), 0.5, torch.float32) for _ in range(2)]
    used: list[bool] = []
    rounds = products._rounds
    monkeypatch.setattr(products, "_rounds", lambda c, part: used.append(rounds(c, part)) or used[-1])
    for param, has_unit in zip(params, (True, False), strict=True):
        monkeypatch.setattr(products, "multiplies_bfloat16", lambda has_unit=has_unit: has_unit)
        optimizer = RiemannianFGSGD([param], lr=0.01, momentum=0.9)
        for step in range(30):
            run(optimizer, param, range(step, step + 1), size=0.1)
            assert float(param.manifold.violation(plain(param).double())) <= 1e-6
    assert used[: len(used) // 2].count(True) > 20
    assert not any(used[len(used) // 2 :])
    torch.testing.assert_close(plain(params[0]), plain(params[1]), rtol=0, atol=2e-6 * 0.5)


def test_the_path_is_for_large_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, ...]] = []

    def recorded(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Carried | None]:
        calls.append(tuple(args[1].shape))
        return shared_products_step(*args, **kwargs)

    monkeypatch.setattr(fgsgd, "shared_products_step", recorded)
    for shape, options in (
        ((20, 15), {}),
        ((20, 16), {}),
        ((21, 16), {"nesterov": True}),
        ((22, 16), {"momentum": 0.0}),
        ((23, 16), {"update": "exponential"}),
    ):
        param = parameter(shape)
        run(RiemannianFGSGD([param], **{"lr": 0.1, "momentum": 0.9, **options}), param, range(1))
    assert calls == [(20, 16)]


def test_the_limit_of_a_long_step_is_that_of_the_series_of_retractions() -> None:
    """Just below and just above it the step is the same map."""
    manifold = Stiefel()
    x = manifold.projx(normal((30, 16), 0))
    direction = manifold.proju(x, normal((30, 16), 1))
    limit = shared_products._LONGEST
    unit = float((direction.mT @ direction).norm()) ** 0.5
    for length, is_long in ((0.999 * limit**0.5, False), (1.001 * limit**0.5, True)):
        grad = direction * (length / unit)
        rest, along = torch.zeros_like(x), torch.zeros(16, 16, dtype=torch.float64)
        before = Carried.of(x, rest, 1.0, along, drift=1.0, slip=0.0)
        y, _, carried = shared_products_step(
            manifold, x, grad, x.mT @ grad, rest, before, scale=1.0, lr=1.0, momentum=0.9
        )
        assert carried is not None
        assert (carried.along is None) == is_long
        torch.testing.assert_close(y, manifold.retr(x, -grad), rtol=0, atol=1e-13)
