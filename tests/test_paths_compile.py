"""The fused paths and torch.compile: the step runs between graphs, with the same numbers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from path_helpers import FORMATS, as_parameter, built, declared, is_fused, product, sweeps_of, weight_on
from torch import Tensor, nn

from fgo_geo import Oblique, RiemannianFGSGD, ScaledSphere, Stiefel


def mixed_weights() -> list[Any]:
    """Kernels of two types, lines, a small matrix and a plain parameter."""
    torch.manual_seed(0)
    weights = [weight_on(product(s, (9, 7, 3, 3)), torch.float32, FORMATS[4][k], k) for k, s in enumerate(("po", "pi"))]
    weights += [weight_on(product("pio", (5, 4, 5)), torch.float64, torch.contiguous_format, 2)]
    weights += [declared(ScaledSphere(2.0), 6, 40), declared(Oblique(), 40, 24), declared(Stiefel(), 6, 3)]
    return [*weights, nn.Parameter(torch.randn(5))]


@built
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize(
    "options",
    [{"momentum": 0.9}, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}, {"curvature": "manifold"}],
    ids=str,
)
def test_a_compiled_step_is_fused(backend: str, options: dict[str, Any]):
    """It follows the learning rate and the radii, and says what it did."""
    torch._dynamo.reset()
    compiled, eager = mixed_weights(), mixed_weights()
    optimizers = [RiemannianFGSGD(w, lr=torch.tensor(0.1), **options) for w in (compiled, eager)]
    step = torch.compile(lambda: optimizers[0].step(), backend=backend)
    for number in range(4):
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"].fill_(0.1 / (1 + number))
        for a, b in zip(compiled, eager, strict=True):
            a.grad = torch.empty_like(a).copy_(0.3 * torch.randn(a.shape)).detach()
            b.grad = a.grad.clone()
        if number == 2:
            for weight in (compiled[0], eager[0]):
                weight.manifold.set_radius(2.0)
                weight.data.copy_(weight.manifold.projx(weight.data))
        calls = sweeps_of(step)
        assert calls.pop("fgo_line_norms") == calls.pop("fgo_line_update") == 1
        assert is_fused(calls)
        optimizers[1].step()
    for a, b in zip(compiled, eager, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
        assert a.stride() == b.stride()
        for name, value in optimizers[1].state[b].items():
            torch.testing.assert_close(optimizers[0].state[a][name], value, rtol=0, atol=0)
    scales = [optimizer.step_scales() for optimizer in optimizers]
    for a, b in zip(compiled[:-1], eager[:-1], strict=True):
        torch.testing.assert_close(scales[0][a], scales[1][b], rtol=0, atol=0)


@built
def test_optimisers_of_other_sizes_and_layouts_are_compiled_and_fused_after_one_another():
    """torch.compile takes sizes and strides that it has seen change for symbols."""
    torch._dynamo.reset()
    for size, memory_format in [(6, FORMATS[4][0]), (6, FORMATS[4][1]), (8, FORMATS[4][0])]:
        weight = weight_on(product("pio", (size, 5, 3, 3)), torch.float64, memory_format, 0)
        twin = copy.deepcopy(weight)
        optimizers = [RiemannianFGSGD([w], lr=0.1, momentum=0.9) for w in (weight, twin)]
        for w in (weight, twin):
            w.grad = torch.full_like(w, 0.1).detach()
        step = torch.compile(optimizers[0].step, backend="aot_eager")
        assert sweeps_of(step) == {"fgo_norms": 1, "fgo_update": 1}
        optimizers[1].step()
        torch.testing.assert_close(weight, twin, rtol=0, atol=0)


@built
def test_a_compiled_step_leaves_out_what_is_not_finite_and_counts_it():
    torch._dynamo.reset()
    weight = weight_on(product("po"), torch.float64, torch.contiguous_format, 0)
    twin = copy.deepcopy(weight)
    optimizers = [RiemannianFGSGD([w], lr=0.1, momentum=0.9, check_finite=False) for w in (weight, twin)]
    step = torch.compile(lambda: optimizers[0].step(), backend="aot_eager")
    for w in (weight, twin):
        w.grad = torch.full_like(w, 0.1).detach()
        w.grad[2, 5, 0, 0] = torch.inf
    step()
    optimizers[1].step()
    assert [optimizer.skipped_groups() for optimizer in optimizers] == [1, 1]
    torch.testing.assert_close(weight, twin, rtol=0, atol=0)


@built
def test_a_manifold_that_has_taken_the_place_of_another_is_seen():
    torch._dynamo.reset()
    weight = weight_on(product("po", (6, 5, 3, 3)), torch.float64, torch.contiguous_format, 0)
    optimizer = RiemannianFGSGD([weight], lr=0.1)
    step = torch.compile(lambda: optimizer.step(), backend="eager")
    for strategy in ("po", "pi", "pio"):
        weight.manifold = product(strategy, (6, 5, 3, 3))
        weight.data.copy_(weight.manifold.projx(weight.data))
        twin = copy.deepcopy(weight)
        for w in (weight, twin):
            w.grad = torch.ones_like(w).detach()
        step()
        RiemannianFGSGD([twin], lr=0.1).step()
        torch.testing.assert_close(weight, twin, rtol=0, atol=0)


def another_number(manifold: Any) -> None:
    manifold.radius = 1.0


def another_tensor(manifold: Any) -> None:
    manifold.radius = torch.ones(4, 6, dtype=torch.float64)


def written_in_place(manifold: Any) -> None:
    manifold.radius.fill_(1.0)


@built
@pytest.mark.parametrize(
    ("radius", "change"),
    [
        (2.0, another_number),
        (torch.full((4, 6), 2.0), another_tensor),
        (torch.full((4, 6), 2.0), written_in_place),
        (torch.full((6,), 2.0), written_in_place),
    ],
)
def test_a_radius_that_changes_after_compilation(radius: Any, change: Any):
    torch._dynamo.reset()
    manifold = Oblique(radius)
    point = manifold.random(4, 6, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weight = as_parameter(point.as_subclass(Tensor), manifold)
    optimizer = RiemannianFGSGD([weight], lr=torch.tensor(0.1), curvature="manifold")
    step = torch.compile(lambda: optimizer.step(), backend="aot_eager")
    for number in range(3):
        if number == 2:
            change(weight.manifold)
            weight.data.copy_(weight.data / 2)
        weight.grad = torch.cos(torch.arange(weight.numel(), dtype=weight.dtype)).view_as(weight)
        step()
        expected = 2.0 if number < 2 else 1.0
        length = torch.linalg.vector_norm(weight.detach().as_subclass(Tensor), dim=-2)
        torch.testing.assert_close(length, torch.full_like(length, expected))
