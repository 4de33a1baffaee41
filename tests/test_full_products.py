"""Where torch may round the factors of products to TF32 or bfloat16, points still have orthonormal columns."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import geoopt
import numpy as np
import pytest
import reference_optimizer as reference
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fgo_geo import ProductOfGroups, RiemannianFGSGD, Stiefel, collection, linalg
from fgo_geo.linalg import precision
from fgo_geo.models import start


def normal(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def plain(tensor: Tensor) -> Tensor:
    return tensor.detach().as_subclass(Tensor)


def rounded(x: Tensor) -> Tensor:
    """To the eight bits of bfloat16."""
    return x.bfloat16().to(x.dtype)


@pytest.fixture
def medium() -> Iterator[None]:
    before = precision._precisions()
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision("highest")
    precision._set_precisions(before)


class RoundsFactors(TorchFunctionMode):
    """A processor that rounds the factors of products as soon as it may."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        first = {"mm": 0, "bmm": 0, "matmul": 0, "__matmul__": 0, "addmm": 1, "baddbmm": 1}.get(function.__name__)
        if first is not None and linalg.lowers_products():
            args = (*args[:first], *map(rounded, args[first : first + 2]), *args[first + 2 :])
        return function(*args, **(kwargs or {}))


@pytest.fixture
def rounding(medium: None) -> Iterator[None]:
    with RoundsFactors():
        yield


@pytest.mark.parametrize("bound", [None, 0.01, 0.3, 3.0])
def test_a_retraction_ends_on_the_manifold(bound: float | None, rounding: None) -> None:
    manifold = Stiefel(0.5)
    x = manifold.projx(normal((80, 70), 0))
    u = manifold.proju(x, normal((80, 70), 1))
    u = u * ((bound or 1.0) * 0.5 / u.norm())
    error = float(linalg.sym(x.double().mT @ u.double()).abs().max() / u.norm())
    assert 1e-6 < error < 1e-2  # the projection has been rounded
    y = manifold.retract_bounded(x, u, bound)
    assert float(manifold.violation(y.double())) <= 1e-6


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_steps_stay_on_the_manifold(momentum: float, rounding: None) -> None:
    """The direction is off by some thousandths, the point by rounding."""
    manifold = Stiefel(0.5)
    param = geoopt.ManifoldParameter(manifold.projx(normal((64, 32), 0)), manifold=manifold)
    start = plain(param).double().numpy()
    oracle = reference.batch_of_components(start, 2, reference.Stiefel, 0.5)
    optimizer = RiemannianFGSGD([param], lr=0.02, momentum=momentum)
    for step in range(30):
        param.grad = normal((64, 32), 1 + step)
        optimizer.step()
        reference.step(oracle, param.grad.double().numpy(), lr=0.02, momentum=momentum)
        assert float(manifold.violation(plain(param).double())) <= 1e-6
    way, error = np.linalg.norm(oracle.x - start), np.linalg.norm(oracle.x - plain(param).double().numpy())
    assert 1e-5 * way < error < 1e-2 * way


def test_weights_start_on_the_manifold(rounding: None) -> None:
    manifold = ProductOfGroups(collection(8, 8, "layer", "stiefel"), (8, 8, 60, 40))
    point, notes = start.initial_point(normal((8, 8, 60, 40), 0), manifold, "project", 0, "weight")
    assert not notes
    assert point is not None
    assert float(manifold.violation(point).max()) < 1e-5
    assert linalg.lowers_products()


def test_a_setting_that_is_lowered_between_steps(rounding: None) -> None:
    manifold = Stiefel()
    param = geoopt.ManifoldParameter(manifold.projx(normal((64, 32), 0)), manifold=manifold)
    optimizer = RiemannianFGSGD([param], lr=0.3, momentum=0.9)
    for step, setting in enumerate(("highest", "highest", "medium", "medium", "highest")):
        torch.set_float32_matmul_precision(setting)
        param.grad = normal((64, 32), 1 + step)
        optimizer.step()
        assert float(manifold.violation(plain(param).double())) <= 1e-6


@pytest.mark.parametrize(
    "method", ["projx", "retr", "retract_bounded", "expmap", "logmap", "uniform", "violation", "proju"]
)
def test_the_setting_inside_and_after(method: str, medium: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """What makes or judges points takes full products, and puts the setting back, also when it raises."""
    manifold: Any = Stiefel()
    x = linalg.qr_factor(normal((80, 70), 0))
    u = 0.01 * manifold.proju(x, normal((80, 70), 1))
    arguments = {"projx": (x,), "uniform": (x,), "violation": (x,), "logmap": (x, x), "retract_bounded": (x, u, 0.1)}
    seen: list[bool] = []
    raising = False

    def radius_for(own: Tensor) -> float:  # which all of them ask for
        seen.append(linalg.lowers_products())
        if raising:
            raise KeyError
        return 1.0

    monkeypatch.setattr(manifold, "radius_for", radius_for)
    getattr(manifold, method)(*arguments.get(method, (x, u)))
    assert linalg.lowers_products()
    raising = True
    with pytest.raises(KeyError):
        getattr(manifold, method)(*arguments.get(method, (x, u)))
    assert set(seen) == {method == "proju"}
    assert linalg.lowers_products()
    assert torch.get_float32_matmul_precision() == "medium"


@pytest.mark.skipif(not precision._BY_BACKEND, reason="this torch has one setting for all devices")
def test_a_setting_for_all_backends_stays_one() -> None:
    """What was inherited is inherited afterwards."""
    before: Any = torch.backends.fp32_precision
    assert precision._precisions() == ("none", "none")
    try:
        torch.backends.fp32_precision = "tf32"
        assert linalg.lowers_products()
        assert not linalg.takes_full_products(linalg.lowers_products)()
        assert linalg.lowers_products()
        torch.backends.fp32_precision = "ieee"
        assert not linalg.lowers_products()
    finally:
        torch.backends.fp32_precision = before


def test_the_last_thread_puts_the_setting_back(medium: None) -> None:
    """A call that begins while another runs takes full products to its end."""
    seen: list[bool] = []
    inside, over = threading.Event(), threading.Event()

    @linalg.takes_full_products
    def long() -> None:
        inside.set()
        assert over.wait(10)
        seen.append(linalg.lowers_products())

    @linalg.takes_full_products
    def short() -> None:
        thread.start()
        assert inside.wait(10)

    thread = threading.Thread(target=long)
    short()
    assert not linalg.lowers_products()
    over.set()
    thread.join()
    assert seen == [False]
    assert linalg.lowers_products()
