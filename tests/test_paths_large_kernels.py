"""The reference path on weights of large kernels: the same step in memory that is kept."""

from __future__ import annotations

from typing import Any

import geoopt
import pytest
import torch
from torch import Tensor

from fgo_geo import ProductOfGroups, RiemannianFGSGD
from fgo_geo.grouping import collection
from fgo_geo.paths.native.library import library
from fgo_geo.paths.pieces import LargeKernels
from fgo_geo.paths.protocol import Claim, Weight
from fgo_geo.paths.reference import JobBatch
from fgo_geo.paths.router import PathName, use_path

KINDS = ("sphere", "oblique", "stiefel", "euclidean")
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def parameter(
    kernel: tuple[int, ...], strategy: str = "pio", memory_format: torch.memory_format = torch.contiguous_format
) -> Any:
    kinds = KINDS if kernel == (3, 3) else KINDS[2:]
    side = 180 if kernel == (3, 3) else 160  # every kind has more than 2**16 entries
    shape = (side, side, *kernel)
    manifold = ProductOfGroups(collection(*shape[:2], strategy, kinds), shape)
    point = manifold.random(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return geoopt.ManifoldParameter(point.detach().contiguous(memory_format=memory_format), manifold=manifold)


def gradient(param: Tensor, seed: int, memory_format: torch.memory_format = torch.contiguous_format) -> Tensor:
    grad = torch.randn(param.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return grad.to(param.dtype).contiguous(memory_format=memory_format)


def step(
    optimizer: RiemannianFGSGD,
    steps: range,
    memory_format: torch.memory_format = torch.contiguous_format,
    path: PathName = "reference",
) -> None:
    for number in steps:
        for param in optimizer.param_groups[0]["params"]:
            param.grad = gradient(param, number, memory_format)
        with use_path(path):
            optimizer.step()


def kept_by(optimizer: RiemannianFGSGD) -> list[LargeKernels]:
    (router,) = optimizer._stepper._routers.values()
    batches = [batch for batch in router._batches if isinstance(batch, JobBatch)]
    return [large for batch in batches for large in batch._large.values()]  # pyright: ignore


@pytest.mark.skipif(library() is None, reason="the compiled library is not built")
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("of_gradient", FORMATS)
@pytest.mark.parametrize("strategy", ["po", "pi", "pio"])
@pytest.mark.parametrize("kernel", [(3, 3), (2, 3)], ids=str)
def test_the_step_is_that_of_the_compiled_sweeps(
    kernel: tuple[int, ...], strategy: str, of_gradient: str, memory_format: str
) -> None:
    params = [parameter(kernel, strategy, FORMATS[memory_format]) for _ in range(2)]
    optimizers = [
        RiemannianFGSGD([param], lr=0.1, momentum=0.9, weight_decay=0.01, rho=10.0, check_finite=False)
        for param in params
    ]
    for optimizer, path in zip(optimizers, ("reference", "auto"), strict=True):
        step(optimizer, range(3), FORMATS[of_gradient], path)
    assert [len(kept_by(optimizer)) for optimizer in optimizers] == [1, 0]
    scales = [optimizer.step_scales()[param] for optimizer, param in zip(optimizers, params, strict=True)]
    momentum = [optimizer.state[param]["momentum_buffer"] for optimizer, param in zip(optimizers, params, strict=True)]
    for actual, expected in (params, momentum, scales):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


def test_nothing_is_allocated_anew_and_nothing_of_the_step_is_held() -> None:
    """Two weights share what need not be kept between measuring and moving."""
    params = [parameter((3, 3)), parameter((3, 3), "po")]
    optimizer = RiemannianFGSGD(params, lr=0.1, momentum=0.9)
    places: list[list[int]] = []
    for number in range(4):
        step(optimizer, range(number, number + 1))
        memory = [tensor for large in kept_by(optimizer) for tensor in large._own._memory.values()]
        memory += list(kept_by(optimizer)[0]._shared._memory.values())
        places.append([tensor.data_ptr() for tensor in memory])
    assert kept_by(optimizer)[0]._shared is kept_by(optimizer)[1]._shared
    assert len(places[1]) == 6
    assert places[1] == places[3]


@pytest.mark.parametrize(
    ("shape", "changes", "taken"),
    [
        ((128, 128, 3, 3), {}, False),
        ((192, 192, 3, 3), {}, True),
        ((192, 192, 3, 3), {"dtype": torch.float16}, False),
        ((192, 192, 3, 3), {"grad": torch.float64}, False),
    ],
    ids=["small parts", "large parts", "half precision", "gradient of another type"],
)
def test_what_is_large(shape: tuple[int, ...], changes: dict[str, Any], taken: bool) -> None:
    manifold = ProductOfGroups(collection(*shape[:2], "po", KINDS), shape)
    param = torch.empty(shape, dtype=changes.get("dtype", torch.float32))
    weight = Weight(param, param, manifold, torch.empty(shape, dtype=changes.get("grad", param.dtype)))
    assert LargeKernels.takes(Claim(weight, tuple(range(weight.n_parts)))) == taken
