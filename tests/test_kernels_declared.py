"""Fused steps on weights that were declared on one manifold by hand, ``(D, C, A, B)`` over the last two dimensions."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import geoopt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_kernels import FORMATS, TOLERANCE, as_parameter, assert_close, built, option_sets, trained
from torch import Tensor
from versions import TRACES_PARAMETERS

from fgo_geo import Oblique, ProductOfGroups, RiemannianFGSGD, ScaledSphere, Stiefel, kernels
from fgo_geo.paths.native import kernels as cpu
from fgo_geo.paths.task import LARGEST, product_of

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
    scale = draw(st.sampled_from([0.0, 1e-3, 0.1, 1.0, 1e3]))
    fused = trained("fused", [weight], 3, scale, **options)
    assert_close(fused, trained("reference", [weight], 3, scale, **options), TOLERANCE[dtype])
    assert fused["weights"][0].stride() == weight.stride()


@built
@pytest.mark.parametrize("kind", MANIFOLDS)
def test_the_compiled_sweeps_take_it(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    update = cpu.update
    monkeypatch.setattr(cpu, "update", lambda batch, *rest: (taken.append(len(batch.tasks)), update(batch, *rest)))
    weights = [declared(MANIFOLDS[kind](1.5), shape) for shape in ((4, 6, 3, 3), (5, 6, 3, 3), (4, 6, 5, 2))]
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    RiemannianFGSGD(weights, lr=0.1, momentum=0.9).step()
    assert taken == [3]


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
    assert product_of(manifold, shape) is None


def test_the_product_is_kept_until_the_radius_changes() -> None:
    manifold = Oblique(2.0)
    first, other = product_of(manifold, (4, 6, 3, 3)), product_of(manifold, (6, 4, 3, 3))
    assert isinstance(first, ProductOfGroups)
    assert other is not first
    assert product_of(manifold, torch.Size((4, 6, 3, 3))) is first
    manifold.radius = 3.0
    changed = product_of(manifold, (4, 6, 3, 3))
    assert changed is not None
    assert changed is not first
    assert [part.radius for part in changed.manifolds] == [3.0]
    gone = weakref.ref(changed)
    del manifold, changed
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
def test_inside_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    fused: list[int] = []
    update = cpu.update
    monkeypatch.setattr(cpu, "update", lambda batch, *rest: (fused.append(len(batch.tasks)), update(batch, *rest)))
    manifold = Stiefel(0.5)
    weights = [[declared(manifold, (5, 4, 3, 3)), declared(Oblique(), (5, 4, 3, 3))] for _ in range(2)]
    optimizers = [RiemannianFGSGD(w, lr=torch.tensor(0.1), momentum=0.9, curvature="manifold") for w in weights]
    step = torch.compile(lambda: optimizers[0].step(), backend="aot_eager", fullgraph=TRACES_PARAMETERS)
    for number in range(3):
        for a, b in zip(*weights, strict=True):
            a.grad = torch.randn(a.shape, dtype=a.dtype, generator=torch.Generator().manual_seed(number))
            b.grad = a.grad.clone()
        fused.clear()
        step()
        assert fused == [2]
        optimizers[1].step()
    for a, b in zip(*weights, strict=True):
        torch.testing.assert_close(a.detach(), b.detach(), rtol=0, atol=1e-12)


@built
@radius_changes
def test_a_radius_that_changes_after_compilation(radius: Any, change: Any) -> None:
    torch._dynamo.reset()
    weight = declared(Oblique(radius), (4, 6, 3, 3))
    optimizer = RiemannianFGSGD([weight], lr=torch.tensor(0.1), curvature="manifold")
    step = torch.compile(lambda: optimizer.step(), backend="aot_eager", fullgraph=TRACES_PARAMETERS)
    for number in range(3):
        if number == 2:
            change(weight.manifold)
            weight.data.copy_(weight.data / 2)
        weight.grad = torch.cos(torch.arange(weight.numel(), dtype=weight.dtype)).view_as(weight)
        step()
        expected = 2.0 if number < 2 else 1.0
        length = torch.linalg.vector_norm(weight.detach().as_subclass(Tensor), dim=-2)
        torch.testing.assert_close(length, torch.full_like(length, expected))


@built
def test_step_scales_keep_the_order_of_the_parameters() -> None:
    weights = [declared(Stiefel(), (20, 17)), declared(Stiefel(), (4, 6, 3, 3)), declared(Oblique(), (5, 4))]
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer = RiemannianFGSGD(weights, lr=0.1, momentum=0.9)
    optimizer.step()
    assert [id(p) for p in optimizer.step_scales()] == [id(p) for p in weights]
    assert {tuple(tau.shape) for tau in optimizer.step_scales().values()} == {(1,)}
