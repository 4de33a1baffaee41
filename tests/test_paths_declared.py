"""The compiled sweeps on kernels that were declared on one manifold, ``(D, C, A, B)`` over the last two dimensions."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import geoopt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from path_helpers import (
    FORMATS,
    TOLERANCE,
    as_parameter,
    assert_close,
    built,
    option_sets,
    scales,
    sweeps_of,
    takes,
    trained,
)
from torch import Tensor

from fgo_geo import Oblique, RiemannianFGSGD, ScaledSphere, Stiefel, kernels
from fgo_geo.paths.kernel_tables import LARGEST, table_of
from fgo_geo.paths.native.kernels import NativeKernels
from fgo_geo.paths.protocol import Refusal, StepOptions, Weight

MANIFOLDS: dict[str, Any] = {
    "sphere": lambda radius: ScaledSphere(radius, ndim=2),
    "oblique": Oblique,
    "stiefel": Stiefel,
}


def declared(manifold: Any, shape: tuple[int, ...], dtype: torch.dtype = torch.float64, seed: int = 0) -> Any:
    point = manifold.random(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))
    return as_parameter(point.as_subclass(Tensor), manifold)


@built
@given(data=st.data(), options=option_sets)
def test_it_is_the_batched_step(data: st.DataObject, options: dict[str, Any]) -> None:
    draw = data.draw
    kind = draw(st.sampled_from(sorted(MANIFOLDS)))
    columns = draw(st.integers(1, 7))
    rows = draw(st.integers(max(columns, 2), 9))
    out_channels, in_channels = draw(st.integers(1, 21)), draw(st.integers(1, 21))
    per_kernel = 0.5 + torch.rand(out_channels, in_channels, generator=torch.Generator().manual_seed(3))
    radius = draw(st.sampled_from([0.7, per_kernel, per_kernel[:1], per_kernel[:, :1]]))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    manifold = MANIFOLDS[kind](radius)
    weight = declared(manifold, (out_channels, in_channels, rows, columns), dtype)
    weight.data = weight.data.to(memory_format=draw(st.sampled_from(FORMATS[4])))
    scale = draw(scales)
    fused = trained("fused", [weight], 3, scale, **options)
    assert_close(fused, trained("reference", [weight], 3, scale, **options), TOLERANCE[dtype])
    assert fused["weights"][0].stride() == weight.stride()


@built
@pytest.mark.parametrize("kind", MANIFOLDS)
def test_the_compiled_sweeps_take_it(kind: str) -> None:
    weights = [declared(MANIFOLDS[kind](1.5), shape) for shape in ((4, 6, 3, 3), (5, 6, 3, 3), (4, 6, 5, 2))]
    assert takes(NativeKernels(), *weights) == [True] * 3
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    assert sweeps_of(RiemannianFGSGD(weights, lr=0.1, momentum=0.9).step) == {"fgo_norms": 1, "fgo_update": 1}


class OwnOblique(Oblique):
    """Whoever overrides a method wants it to be called."""


@pytest.mark.parametrize(
    ("manifold", "shape"),
    [
        (Stiefel(retraction="qr"), (4, 6, 3, 3)),
        (OwnOblique(), (4, 6, 3, 3)),
        (geoopt.EuclideanStiefel(), (4, 6, 3, 3)),
        (ScaledSphere(), (4, 6, 3, 3)),
        (ScaledSphere(ndim=3), (4, 6, 3, 3)),
        (Oblique(), (4, 6, 2, 3)),
        (Oblique(), (4, 6, 1, 1)),
        (Stiefel(), (6, 3, 3)),
        (Stiefel(), (2, 4, 6, 3, 3)),
        (Stiefel(), (4, 6, LARGEST[0] + 1, 3)),
        (Stiefel(), (4, 6, 9, LARGEST[1] + 1)),
        (Stiefel(), (0, 6, 3, 3)),
    ],
    ids=str,
)
def test_other_components_are_no_kernels(manifold: Any, shape: tuple[int, ...]) -> None:
    point = torch.zeros(shape)  # on the manifold or not
    reply = NativeKernels().accepts(Weight(point, point, manifold, point), (0,), StepOptions(lr=0.1))
    assert isinstance(reply, Refusal)
    assert reply.detail


def test_the_table_is_kept_until_the_radius_changes() -> None:
    manifold = Oblique(2.0)
    weights = [declared(manifold, shape) for shape in ((4, 6, 3, 3), (6, 4, 3, 3))]
    first, other = (Weight(w, w, manifold, None) for w in weights)
    table = table_of(first)
    assert table.radius[2] == 2.0
    assert table_of(other) is not table
    assert table_of(first) is table
    manifold.radius = 3.0
    assert table_of(first).radius[2] == 3.0
    gone = weakref.ref(table_of(first))
    del manifold, weights, first, other
    gc.collect()
    assert gone() is None


def another_number(manifold: Any) -> None:
    manifold.radius = 1.0


def another_tensor(manifold: Any) -> None:
    manifold.radius = torch.ones(4, 6, dtype=torch.float64)


def written_in_place(manifold: Any) -> None:
    manifold.radius.fill_(1.0)


radius_changes = pytest.mark.parametrize(
    ("radius", "change"),
    [
        (2.0, another_number),
        (torch.full((4, 6), 2.0), another_tensor),
        (torch.full((4, 6), 2.0), written_in_place),
        (torch.full((6,), 2.0), written_in_place),
    ],
)


@built
@radius_changes
def test_a_radius_that_changes_between_steps(radius: Any, change: Any) -> None:
    results: list[Tensor] = []
    for path in ("fused", "reference"):
        weight = declared(Oblique(radius), (4, 6, 3, 3))
        optimizer = RiemannianFGSGD([weight], lr=0.1, momentum=0.9)
        with kernels.use_path(path):
            for step in range(4):
                if step == 2:
                    change(weight.manifold)
                    weight.data = weight.data / 2
                weight.grad = torch.cos(torch.arange(weight.numel(), dtype=weight.dtype)).view_as(weight)
                optimizer.step()
        results.append(weight.detach().as_subclass(Tensor))
    torch.testing.assert_close(*results, rtol=0, atol=1e-13)
    torch.testing.assert_close(results[0].norm(dim=-2), torch.ones(4, 6, 3, dtype=torch.float64))


@built
def test_step_scales_keep_the_order_of_the_parameters() -> None:
    weights = [declared(Stiefel(), (20, 17)), declared(Stiefel(), (4, 6, 3, 3)), declared(Oblique(), (5, 4))]
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer = RiemannianFGSGD(weights, lr=0.1, momentum=0.9)
    optimizer.step()
    assert [id(p) for p in optimizer.step_scales()] == [id(p) for p in weights]
    assert {tuple(tau.shape) for tau in optimizer.step_scales().values()} == {(1,)}
