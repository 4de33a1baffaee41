"""The fused paths inside torch.compile: operators that a graph calls."""

from __future__ import annotations

import copy
from typing import Any

import geoopt
import pytest
import torch
from test_kernels import FORMATS, built, product, weight_on
from torch import nn
from versions import TRACES_PARAMETERS

from fgo_geo import RiemannianFGSGD, Stiefel, kernels
from fgo_geo.paths.native import kernels as cpu


def mixed_weights() -> list[Any]:
    torch.manual_seed(0)
    weights = [weight_on(product(s, (9, 7, 3, 3)), torch.float32, FORMATS[4][k], k) for k, s in enumerate(("po", "pi"))]
    weights += [weight_on(product("pio", (5, 4, 5)), torch.float64, torch.contiguous_format, 2)]
    matrix: Any = geoopt.ManifoldParameter
    weights += [matrix(Stiefel().random(6, 3).detach(), manifold=Stiefel()), nn.Parameter(torch.randn(5))]
    return weights


@built
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize(
    "options",
    [{"momentum": 0.9}, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}, {"curvature": "manifold"}],
    ids=str,
)
def test_a_compiled_step_is_fused(backend: str, options: dict[str, Any], monkeypatch):
    """One graph, the same step, radii of when it runs; two compilations at most: without momentum and with."""
    torch._dynamo.reset()
    graphs, fused = [], []
    monkeypatch.setattr(cpu, "update", lambda batch, *rest, do=cpu.update: (fused.append(batch), do(batch, *rest)))
    compiled, eager = mixed_weights(), mixed_weights()
    optimizers = [RiemannianFGSGD(w, lr=torch.tensor(0.1), **options) for w in (compiled, eager)]
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    step = torch.compile(lambda: optimizers[0].step(), backend=backend, fullgraph=TRACES_PARAMETERS)
    for number in range(4):
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"].fill_(0.1 / (1 + number))
        for a, b in zip(compiled, eager, strict=True):
            a.grad, b.grad = (torch.empty_like(a).copy_(0.3 * torch.randn(a.shape)).detach() for _ in range(2))
            b.grad.copy_(a.grad)
        if number == 2:
            for weight in (compiled[0], eager[0]):
                weight.manifold.set_radius(2.0)
                weight.data.copy_(weight.manifold.projx(weight.data))
        fused.clear()
        step()
        assert len(fused) == 1
        optimizers[1].step()
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"] - before)
    assert graphs[-1] <= 2
    for a, b in zip(compiled, eager, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
        assert a.stride() == b.stride()
    for a, b in zip(compiled, eager, strict=True):
        for name, value in optimizers[1].state[b].items():
            torch.testing.assert_close(optimizers[0].state[a][name], value, rtol=0, atol=1e-6)
    scales = [optimizer.step_scales() for optimizer in optimizers]
    for a, b in zip(compiled[:4], eager[:4], strict=True):
        torch.testing.assert_close(scales[0][a], scales[1][b])


@built
def test_optimisers_of_other_sizes_and_layouts_are_compiled_and_fused_after_one_another(monkeypatch):
    """torch.compile takes sizes and strides that it has seen change for symbols."""
    torch._dynamo.reset()
    fused = []
    monkeypatch.setattr(cpu, "update", lambda batch, *rest, do=cpu.update: (fused.append(batch), do(batch, *rest)))
    for count, (size, memory_format) in enumerate([(6, FORMATS[4][0]), (6, FORMATS[4][1]), (8, FORMATS[4][0])], 1):
        weight = weight_on(product("pio", (size, 5, 3, 3)), torch.float64, memory_format, 0)
        twin = copy.deepcopy(weight)
        optimizers = [RiemannianFGSGD([w], lr=0.1, momentum=0.9) for w in (weight, twin)]
        for w in (weight, twin):
            w.grad = torch.full_like(w, 0.1).detach()
        torch.compile(optimizers[0].step, backend="aot_eager", fullgraph=TRACES_PARAMETERS)()
        assert len(fused) == count
        optimizers[1].step()
        fused.pop()
        torch.testing.assert_close(weight, twin, rtol=0, atol=1e-13)


@built
def test_a_compiled_step_leaves_out_what_is_not_finite_and_counts_it():
    torch._dynamo.reset()
    weight = weight_on(product("po"), torch.float64, torch.contiguous_format, 0)
    twin = copy.deepcopy(weight)
    optimizers = [RiemannianFGSGD([w], lr=0.1, momentum=0.9, check_finite=False) for w in (weight, twin)]
    step = torch.compile(lambda: optimizers[0].step(), backend="aot_eager", fullgraph=TRACES_PARAMETERS)
    for w in (weight, twin):
        w.grad = torch.full_like(w, 0.1).detach()
        w.grad[2, 5, 0, 0] = torch.inf
    step()
    optimizers[1].step()
    assert [optimizer.skipped_groups() for optimizer in optimizers] == [1, 1]
    torch.testing.assert_close(weight, twin, rtol=0, atol=1e-13)


@built
def test_a_manifold_of_which_the_optimiser_never_heard_takes_the_batched_step():
    torch._dynamo.reset()
    weight = weight_on(product("po", (6, 5, 3, 3)), torch.float64, torch.contiguous_format, 0)
    optimizer = RiemannianFGSGD([weight], lr=0.1)
    weight.manifold = copy.deepcopy(weight.manifold)
    twin = copy.deepcopy(weight)
    for w in (weight, twin):
        w.grad = torch.ones_like(w).detach()
    torch.compile(lambda: optimizer.step(), backend="eager", fullgraph=TRACES_PARAMETERS)()
    RiemannianFGSGD([twin], lr=0.1).step()
    torch.testing.assert_close(weight, twin, rtol=0, atol=1e-13)


@built
def test_a_graph_that_outlives_its_manifold_says_so():
    weight = weight_on(product("po"), torch.float64, torch.contiguous_format, 0)
    nobody = [0]
    with pytest.raises(
        RuntimeError, match="needs the manifold of a parameter, which is no more; compile the step again"
    ):
        torch.ops.fgo_geo.squared_norms([weight], 1, [weight], nobody, [0.0] * 6)
    kernels.register(weight.manifold)
    with pytest.raises(RuntimeError, match=r"cannot go on.*different types.*compile it again"):
        torch.ops.fgo_geo.squared_norms([weight], 1, [weight.float()], [id(weight.manifold)], [0.0] * 6)
