"""The path of large Stiefel matrices: the step of the paper with four long products, what it carries and notices."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
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

from fgo_geo import RiemannianFGSGD, ScaledSphere, Stiefel, kernels
from fgo_geo.linalg import matmul, products
from fgo_geo.manifolds import stiefel
from fgo_geo.paths.protocol import Reason, Refusal, StepOptions, Weight
from fgo_geo.paths.shared_products import Carried, SharedProducts, is_product, shared_products_step, tangent_square


@pytest.fixture(autouse=True, scope="module")
def compiled_products_take_none() -> Iterator[None]:
    """Matrices of any size and type take the path of this file."""
    with kernels.use_path("reference"):
        yield


def normal(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def parameter(shape: tuple[int, ...], radius: Any = 1.0, dtype: torch.dtype = torch.float64) -> Any:
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
@pytest.mark.parametrize("shape", [(128, 128), (150, 130), (2, 140, 131)], ids=str)
@pytest.mark.parametrize("radius", [1.0, 0.3])
def test_it_is_the_step_of_the_paper(shape: tuple[int, ...], radius: float, options: dict[str, Any]) -> None:
    """So many steps that what is carried grows old once."""
    options = {"lr": 0.1, "momentum": 0.9, **options}
    param = parameter(shape, radius)
    oracle = reference.batch_of_components(plain(param).numpy(), 2, reference.Stiefel, radius)
    optimizer = RiemannianFGSGD([param], **options)
    for step in range(6):
        param.grad = normal(shape, 1 + step)
        optimizer.step()
        reference.step(oracle, param.grad.numpy(), **{**options, "lr": float(options["lr"])})
        np.testing.assert_allclose(plain(param).numpy(), oracle.x, rtol=0, atol=1e-11 * radius)
    assert oracle.buffer is not None
    buffer = param.manifold.proju(plain(param), optimizer.state[param]["momentum_buffer"])
    np.testing.assert_allclose(buffer.numpy(), oracle.buffer, rtol=0, atol=1e-11 * np.abs(oracle.buffer).max())
    np.testing.assert_allclose(optimizer.step_scales()[param].numpy(), oracle.scales, rtol=1e-12)


@pytest.mark.parametrize("invariant", [False, True])
@pytest.mark.parametrize("radius", [[0.5, 1.0, 3.0], 0.5, [2.0]], ids=str)
def test_radii_of_components(radius: Any, invariant: bool) -> None:
    radii = torch.tensor(radius, dtype=torch.float64)
    manifold = Stiefel(radii)
    start = manifold.projx(normal((3, 140, 128), 0))
    param = geoopt.ManifoldParameter(start.clone(), manifold=manifold)
    oracle = reference.batch_of_components(start.numpy(), 2, reference.Stiefel, radii.expand(3).numpy())
    options = {"lr": 0.1, "momentum": 0.9, "radius_invariant": invariant}
    optimizer = RiemannianFGSGD([param], **options)
    for step in range(3):
        param.grad = normal((3, 140, 128), 1 + step)
        optimizer.step()
        reference.step(oracle, param.grad.numpy(), **options)
    np.testing.assert_allclose(plain(param).numpy(), oracle.x, rtol=0, atol=1e-11)


@pytest.mark.parametrize(
    ("param", "options", "reason"),
    [
        (parameter((128, 127)), {"momentum": 0.9}, Reason.KIND),
        (geoopt.ManifoldParameter(ScaledSphere(ndim=2).random(130, 128)), {"momentum": 0.9}, Reason.KIND),
        (geoopt.ManifoldParameter(Stiefel(retraction="qr").random(130, 128)), {"momentum": 0.9}, Reason.KIND),
        (parameter((130, 128)), {}, Reason.STEP),
        (parameter((130, 128)), {"momentum": 0.9, "nesterov": True}, Reason.STEP),
        (parameter((130, 128)), {"momentum": 0.9, "update": "exponential"}, Reason.STEP),
        (parameter((130, 128)), {"momentum": 0.9, "lr": torch.tensor(0.1)}, Reason.DEVICE),
        (parameter((130, 128)), {"momentum": 0.9}, None),
    ],
    ids=["narrow", "sphere", "qr", "no momentum", "nesterov", "exponential", "unread rate", "taken"],
)
def test_what_the_path_takes(param: Any, options: dict[str, Any], reason: Reason | None) -> None:
    weight = Weight(param, param, param.manifold, torch.zeros_like(param))
    answer = SharedProducts().accepts(weight, (0,), StepOptions(**{"lr": 0.1, **options}))
    assert answer == (0,) if reason is None else isinstance(answer, Refusal) and answer.reason is reason


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounding_does_not_add_up_where_steps_push_outward(dtype: torch.dtype) -> None:
    """Minimising tr(xᵀAx) from near its maximum; a step multiplies what x is off by up to 1 + 2η‖S‖."""
    turn = torch.linalg.qr(normal((150, 150), 0))[0]
    values = torch.cat([torch.full((10,), 6.0), torch.linspace(0, 1, 140)]).double()
    a = (turn @ torch.diag(values) @ turn.mT).to(dtype)
    manifold = Stiefel()
    start = manifold.projx((turn[:, :128] + 0.02 * normal((150, 128), 1)).to(dtype))
    param = geoopt.ManifoldParameter(start, manifold=manifold)
    optimizer = RiemannianFGSGD([param], lr=0.5, momentum=0.9)
    for _ in range(60):
        optimizer.zero_grad()
        (0.5 * (param.mT @ a @ param).diagonal().sum()).backward()
        optimizer.step()
        assert float(manifold.violation(plain(param).double())) <= 20 * torch.finfo(dtype).eps


@pytest.mark.parametrize("factor", [0.5, 0.99, 1 - 1e-4, 1.5])
def test_a_weight_that_is_scaled_between_steps_comes_back_in_one(factor: float) -> None:
    param = parameter((150, 128), dtype=torch.float32)
    optimizer = RiemannianFGSGD([param], lr=0.05, momentum=0.9)
    for step in range(6):
        run(optimizer, param, range(step, step + 1), size=0.1)
        assert float(param.manifold.violation(plain(param).double())) <= 2e-6, step
        param.data.mul_(factor)


def test_to_go_on_and_to_resume_are_the_same_bit_for_bit() -> None:
    param = parameter((150, 130), dtype=torch.float32)
    optimizer = RiemannianFGSGD([param], lr=0.05, momentum=0.9)
    run(optimizer, param, range(3))
    other = geoopt.ManifoldParameter(plain(param).clone(), manifold=Stiefel())
    resumed = RiemannianFGSGD([other], lr=0.05, momentum=0.9)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for one, its in ((optimizer, param), (resumed, other)):
        run(one, its, range(3, 8))
    assert torch.equal(plain(param), plain(other))


def test_a_gradient_that_is_not_finite_leaves_the_momentum_to_move() -> None:
    params = [parameter((150, 130)), parameter((150, 130))]
    optimizers = [RiemannianFGSGD([p], lr=0.05, momentum=0.9, check_finite=False) for p in params]
    for param, optimizer, last in zip(params, optimizers, (float("nan"), 0.0), strict=True):
        run(optimizer, param, range(3))
        param.grad = torch.full((150, 130), last, dtype=torch.float64)
        optimizer.step()
    assert [optimizer.skipped_groups() for optimizer in optimizers] == [1, 0]
    torch.testing.assert_close(plain(params[0]), plain(params[1]), rtol=0, atol=1e-14)


@pytest.mark.parametrize("invariant", [False, True])
def test_the_norm_of_a_gradient_that_is_nearly_normal(invariant: bool) -> None:
    """The difference of two large numbers would be rounding."""
    param = parameter((160, 130), 2.0, torch.float32)
    x = plain(param).double()
    tangent = param.manifold.proju(x, normal((160, 130), 3))
    tangent = 1e-3 * tangent / tangent.norm()
    param.grad = (x @ torch.diag(torch.linspace(1, 2, 130).double()) + tangent).float()
    expected = param.manifold.proju(x, param.grad.double()).norm() * (2.0 if invariant else 1.0)
    options: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "rho": 1e3, "radius_invariant": invariant}
    oracle = reference.batch_of_components(x.numpy(), 2, reference.Stiefel, 2.0)
    reference.step(oracle, param.grad.double().numpy(), **options)
    optimizer = RiemannianFGSGD([param], **options)
    optimizer.step()  # τ = R (2ρ + R)
    np.testing.assert_allclose(plain(param).numpy(), oracle.x, rtol=0, atol=1e-6)
    tau = float(optimizer.step_scales()[param])
    assert tau == pytest.approx(float(expected * (2e3 + expected)), rel=2e-3)


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


@pytest.mark.parametrize(("n", "p", "long"), [(512, 128, 8), (640, 256, 7.5), (768, 512, 7.25)])
def test_the_operations_are_those_of_the_docstring(
    n: int, p: int, long: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of four long products, one of them symmetric, of which blocks save up to three eighths; one short product.

    One step in eight measures, and the next takes the product that it has not left. Two checks take four products with
    vectors of the long side, and one or two of the short side.
    """
    monkeypatch.setattr(matmul, "mkl_avoids_avx512", lambda: False)  # the profiler counts what torch.mm does
    param = parameter((n, p), dtype=torch.float32)
    optimizer = RiemannianFGSGD([param], lr=1e-4, momentum=0.9)
    run(optimizer, param, range(3), size=1e-3)
    with profile(activities=[ProfilerActivity.CPU], with_flops=True) as profiled:
        run(optimizer, param, range(3, 11), size=1e-3)
    counted = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")
    flops = sum(event.flops for event in profiled.key_averages() if event.key in counted) / 8
    assert flops == pytest.approx((long + 2 / 8) * n * p**2 + 7 / 8 * 2 * p**3 + 8 * n * p, rel=0.02)


def carried_of(optimizer: RiemannianFGSGD) -> list[Carried]:
    """What the path keeps between steps."""
    (router,) = optimizer._stepper._routers.values()
    return [carried for batch in router._batches for carried in batch._carried.values()]  # pyright: ignore


@pytest.mark.parametrize("lr", [1e-8, 1e-3, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_carried_is_the_product(dtype: torch.dtype, lr: float) -> None:
    """However small the rate: nothing is divided by it."""
    param = parameter((160, 130), 2.0, dtype)
    optimizer = RiemannianFGSGD([param], lr=lr, momentum=0.9)
    run(optimizer, param, range(14))
    (carried,) = carried_of(optimizer)
    buffer = optimizer.state[param]["momentum_buffer"]
    product = plain(param).double().mT @ buffer.double()
    assert carried.along is not None
    bound = 50 * torch.finfo(dtype).eps * float(buffer.norm())
    torch.testing.assert_close(carried.along.double(), product, rtol=0, atol=bound)


def test_the_bounds_grow_with_rounding_and_fade_with_the_momentum() -> None:
    manifold = Stiefel(2.0)
    x = manifold.projx(normal((40, 20), 0))
    grad, buffer = (manifold.proju(x, normal((40, 20), seed)) for seed in (1, 2))
    before = Carried(x.mT @ buffer, drift=3.0, slip=5.0)
    _, m, after = shared_products_step(manifold, x, grad, x.mT @ grad, buffer, before, scale=1.0, lr=1e-3, momentum=0.5)
    assert after is not None
    assert after.along is not None
    assert after.slip == pytest.approx(0.5 * 5.0 + float(m.norm()) / 2.0)
    assert after.drift == pytest.approx(3.0 + 2e-3 * 0.5 * 5.0 + 1)


def test_a_long_step_is_measured_and_is_the_same_map() -> None:
    """Just below and just above the limit."""
    manifold = Stiefel()
    x = manifold.projx(normal((30, 16), 0))
    direction = manifold.proju(x, normal((30, 16), 1))
    unit = float((direction.mT @ direction).norm()) ** 0.5
    before = Carried(torch.zeros(16, 16, dtype=torch.float64), drift=1.0, slip=0.0)
    for length, is_long in ((0.999, False), (1.001, True)):
        grad, rest = direction * (length / unit), torch.zeros_like(x)
        y, _, after = shared_products_step(
            manifold, x, grad, x.mT @ grad, rest, before, scale=1.0, lr=1.0, momentum=0.9
        )
        assert after is not None
        assert (after.along is None) == is_long
        torch.testing.assert_close(y, manifold.retr(x, -grad), rtol=0, atol=1e-13)


def _swap(m: Tensor) -> None:
    m[:, [3, 4]] = m[:, [4, 3]]


CHANGES: dict[str, Any] = {
    "another point": lambda x, m: x.copy_(Stiefel().projx(normal((150, 130), 99))),
    "another momentum": lambda x, m: m.copy_(normal((150, 130), 98)),
    "two columns of the momentum in another order": lambda x, m: _swap(m),
    "momentum the other way": lambda x, m: m.mul_(-1),
    "no momentum": lambda x, m: m.zero_(),
    "one entry of the momentum": lambda x, m: m[7, 11].add_(1e-9),
    "a point behind the counter's back": lambda x, m: x.data.copy_(Stiefel().projx(normal((150, 130), 99))),
    "momentum behind the counter's back": lambda x, m: m.data.copy_(m.flip(1)),
    "the point a little smaller behind the counter's back": lambda x, m: x.data.mul_(1 - 1e-9),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_belongs_to_another_point_is_not_used(change: str) -> None:
    """As an exponential moving average writes, when it takes the weights' place."""
    param = parameter((150, 130))
    optimizer = RiemannianFGSGD([param], lr=0.05, momentum=0.9)
    run(optimizer, param, range(3))
    assert carried_of(optimizer)[0].along is not None
    with torch.no_grad():
        CHANGES[change](param, optimizer.state[param]["momentum_buffer"])
    oracle = reference.batch_of_components(plain(param).numpy(), 2, reference.Stiefel, 1.0)
    oracle.buffer = reference.Stiefel(1.0).project(oracle.x, optimizer.state[param]["momentum_buffer"].numpy())
    run(optimizer, param, range(3, 4))
    reference.step(oracle, param.grad.numpy(), lr=0.05, momentum=0.9)
    np.testing.assert_allclose(plain(param).numpy(), oracle.x, rtol=0, atol=1e-12)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2), st.sampled_from([torch.float32, torch.float64]))
def test_a_product_is_known_again_and_a_changed_entry_shows(a: int, b: int, batch: int, dtype: torch.dtype) -> None:
    n, p = max(a, b, 2), min(a, b)
    x, m = normal((batch, n, p)[batch == 0 :], 0, dtype), normal((batch, n, p)[batch == 0 :], 1, dtype)
    radius = 2.0 if batch == 0 else torch.arange(1.0, 1.0 + batch, dtype=dtype)[:, None, None]
    x = Stiefel(radius if batch == 0 else radius[:, 0, 0]).projx(x)
    product = (x.double().mT @ m.double()).to(dtype)
    assert is_product(product, x, m, radius)
    assert is_product(None, x, x, radius)
    for row in range(0, n, 7):
        for column in range(p):
            changed = m.clone()
            changed[..., row, column] += 1e3 * torch.finfo(dtype).eps * m.norm() * p**0.5 / x[..., row, :].norm(dim=-1)
            assert not is_product(product, x, changed, radius), (row, column)
    assert not is_product(None, (1 + 1e3 * torch.finfo(dtype).eps) * x, x, radius)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["copy", "pickle"])
def test_to_go_on_and_to_go_on_with_a_copy_are_the_same_bit_for_bit(copied: Any) -> None:
    param = parameter((150, 130), dtype=torch.float32)
    optimizer = RiemannianFGSGD([param], lr=0.05, momentum=0.9)
    run(optimizer, param, range(4))
    other = copied(optimizer)
    (its,) = other.param_groups[0]["params"]
    for one, of_one in ((optimizer, param), (other, its)):
        run(one, of_one, range(4, 8))
    assert torch.equal(plain(param), plain(its))


def test_nothing_is_kept_of_parameters_that_take_no_step() -> None:
    params = [parameter((150, 130)), parameter((140, 128))]
    optimizer = RiemannianFGSGD(params, lr=0.05, momentum=0.9)
    for param in params:
        param.grad = normal(tuple(param.shape), 1)
    optimizer.step()
    assert len(carried_of(optimizer)) == 2
    params[0].grad = None
    optimizer.step()
    assert len(carried_of(optimizer)) == 1


def test_a_step_that_was_refused_has_not_happened() -> None:
    """Nor has it written where the one before has left its product."""
    params = [parameter((150, 130)), parameter((150, 130))]
    optimizers = [RiemannianFGSGD([param], lr=0.05, momentum=0.9) for param in params]
    for param, optimizer in zip(params, optimizers, strict=True):
        run(optimizer, param, range(4))
        if param is params[0]:
            param.grad = torch.full((150, 130), float("nan"), dtype=torch.float64)
            with pytest.raises(FloatingPointError, match="no parameter was changed"):
                optimizer.step()
        run(optimizer, param, range(4, 6))
    assert torch.equal(plain(params[0]), plain(params[1]))


@pytest.mark.parametrize("options", [{"norm": "running"}, {}], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_it_is_the_step_of_the_reference_path(dtype: torch.dtype, options: dict[str, Any]) -> None:
    """With master weights, too; other rates, factors and gradients in every step."""

    class Derived(Stiefel):
        """A class that no path knows, so that the reference path takes it."""

    params = [parameter((150, 130), dtype=dtype) for _ in range(2)]
    params[1] = geoopt.ManifoldParameter(plain(params[1]), manifold=Derived())
    optimizers = [RiemannianFGSGD([p], lr=0.05, momentum=0.9, **options) for p in params]
    for step in range(8):
        for param, optimizer in zip(params, optimizers, strict=True):
            optimizer.param_groups[0].update(lr=0.05 / (1 + step), momentum=0.9 if step % 3 else 0.5)
            run(optimizer, param, range(step, step + 1), size=3.0 if step == 5 else 0.1)
    points = [optimizer.state[p].get("master", plain(p)) for p, optimizer in zip(params, optimizers, strict=True)]
    torch.testing.assert_close(points[0], points[1], rtol=0, atol=2e-6)


def test_memory_is_that_of_the_first_steps() -> None:
    params = [parameter((150, 130)), parameter((140, 128))]
    optimizer = RiemannianFGSGD(params, lr=0.05, momentum=0.9)
    places: list[list[int]] = []
    for step in range(8):
        for param in params:
            param.grad = normal(tuple(param.shape), step)
        optimizer.step()
        buffers = [optimizer.state[param]["momentum_buffer"] for param in params]
        places.append([tensor.data_ptr() for tensor in [*params, *buffers]])
    assert places[-1] == places[0]


@pytest.mark.parametrize("radius", [0.5, 2.0])
def test_short_steps_need_no_factorisation(radius: float, monkeypatch: pytest.MonkeyPatch) -> None:
    param = parameter((150, 130), radius)
    optimizer = RiemannianFGSGD([param], lr=0.9 * radius, momentum=0.9)
    monkeypatch.setattr(stiefel, "polar_factor", None)
    for step in range(6):
        run(optimizer, param, range(step, step + 1), size=0.0015)
        assert float(param.manifold.violation(plain(param))) < 1e-13


def test_rounding_small_parts_is_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a processor that multiplies bfloat16, and without one."""
    params = [parameter((300, 256), 0.5, torch.float32) for _ in range(2)]
    for param, has_unit in zip(params, (True, False), strict=True):
        monkeypatch.setattr(products, "multiplies_bfloat16", lambda has_unit=has_unit: has_unit)
        optimizer = RiemannianFGSGD([param], lr=0.01, momentum=0.9)
        for step in range(20):
            run(optimizer, param, range(step, step + 1), size=0.1)
            assert float(param.manifold.violation(plain(param).double())) <= 1e-6
    assert torch.equal(plain(params[0]), plain(params[1])) is not torch.backends.mkldnn.is_available()
    torch.testing.assert_close(plain(params[0]), plain(params[1]), rtol=0, atol=2e-6 * 0.5)
