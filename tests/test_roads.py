"""Ordinary things that people do to torch models: what becomes of the geometry, row by row of docs/guides/roads.md."""

from __future__ import annotations

import ast
import copy
import re
from collections.abc import Iterator
from pathlib import Path

import geoopt
import pytest
import torch
from networks import CONSTRAINED, Net, assert_on_manifolds, images, net, train
from torch import Tensor, nn
from torch.nn.utils import prune

from fgo_geo import RiemannianFGSGD, Stiefel, constrain, on_manifolds, plan_of, unconstrain

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "guides" / "roads.md"


@pytest.fixture
def swaps() -> Iterator[None]:
    """Conversions swap tensors, as a flag of torch has it."""
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


def test_every_row_has_a_test_that_exists() -> None:
    named = re.findall(r"`(test_\w+)::(test_\w+)`", PAGE.read_text(encoding="utf-8"))
    rows = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")][2:]
    assert rows
    assert all("::test_" in row for row in rows)
    for module, function in named:
        source = (ROOT / "tests" / f"{module}.py").read_text(encoding="utf-8")
        assert function in {node.name for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_cast_keeps_points(dtype: torch.dtype) -> None:
    model = net()
    plan = constrain(model)
    before = list(model.parameters())
    model.to(dtype)
    assert all(a is b for a, b in zip(model.parameters(), before, strict=True))
    assert_on_manifolds(plan, max(1e-5, 16 * torch.finfo(dtype).eps))
    model.float()
    plan.project()
    train(model)
    assert_on_manifolds(plan)


def test_a_swap_on_conversion_of_a_constrained_model_is_noticed(swaps: None) -> None:
    model = net()
    plan = constrain(model)
    model.double()
    with pytest.raises(RuntimeError, match=r"have become plain parameters.*plan_of\(model\)\.attach\(model\)"):
        model(images().double())
    plan_of(model).attach(model)
    assert plan.parameters().keys() == set(CONSTRAINED)
    model(images().double()).sum().backward()
    RiemannianFGSGD(model.parameters(), lr=0.1).step()
    assert_on_manifolds(plan)


@pytest.mark.parametrize("again", ["the same optimiser", "a copy", "a state dict"])
@pytest.mark.parametrize("kind", ["ours", "attached"])
def test_a_swap_on_conversion_of_a_weight_declared_by_hand_is_noticed(swaps: None, kind: str, again: str) -> None:
    manifold, layer = Stiefel(), nn.Linear(3, 5)
    layer.weight = geoopt.ManifoldParameter(manifold.random(5, 3), manifold=manifold)
    build = RiemannianFGSGD if kind == "ours" else torch.optim.AdamW
    optimizer = build(layer.parameters(), lr=0.1)
    if kind == "attached":
        on_manifolds(optimizer)
    layer(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    if again == "a copy" and kind == "ours":
        layer, optimizer = copy.deepcopy((layer, optimizer))
    layer.double()
    assert type(layer.weight) is nn.Parameter
    if again == "a state dict":
        optimizer.load_state_dict(optimizer.state_dict())
    before = layer.weight.detach().clone()
    layer(torch.ones(2, 3, dtype=torch.float64)).sum().backward()
    for _ in range(2):
        with pytest.raises(
            RuntimeError, match=r"of shape \(5, 3\) was on Stiefel.*set_swap_module_params_on_conversion"
        ):
            optimizer.step()
        assert torch.equal(layer.weight.detach(), before)


def test_a_swap_on_conversion_of_a_weight_declared_by_hand_needs_a_new_declaration(swaps: None) -> None:
    """Without an optimiser that was built before, nothing of ours is asked; the guide says so."""
    manifold, layer = Stiefel(), nn.Linear(3, 5)
    layer.weight = geoopt.ManifoldParameter(manifold.random(5, 3), manifold=manifold)
    layer.double()
    assert type(layer.weight) is nn.Parameter
    layer.weight = geoopt.ManifoldParameter(manifold.projx(layer.weight.detach()), manifold=manifold)
    optimizer = RiemannianFGSGD(layer.parameters(), lr=0.1)
    layer(torch.ones(2, 3, dtype=torch.float64)).sum().backward()
    optimizer.step()
    assert float(manifold.violation(layer.weight.detach())) < 1e-12


@pytest.mark.parametrize("partner", ["slow weights", "another replica"])
def test_interpolated_weights_are_projected_by_hand(partner: str) -> None:
    """Lookahead and schedule-free interpolate with an earlier point, PostLocalSGD with another process's."""
    model = net()
    plan = constrain(model)
    other = copy.deepcopy(model)
    optimizer = RiemannianFGSGD(model.parameters(), lr=0.5)
    for seed, each in enumerate((model, other)[: 1 + (partner == "another replica")]):
        own = RiemannianFGSGD(each.parameters(), lr=0.5)
        for number, param in enumerate(each.parameters()):
            param.grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(100 * seed + number))
        own.step()
    with torch.no_grad():
        for fast, slow in zip(model.parameters(), other.parameters(), strict=True):
            fast.lerp_(slow.as_subclass(Tensor), 0.5)
    assert max(float(p.manifold.violation(p.detach()).max()) for p in plan.parameters().values()) > 1e-3
    plan.project()
    train(model, 2, optimizer)
    assert_on_manifolds(plan)


def test_pruning_is_noticed() -> None:
    model = net()
    constrain(model)
    prune.l1_unstructured(model.conv, "weight", amount=0.5)
    with pytest.raises(RuntimeError, match=r"or are gone: conv\.weight"):
        model(images())
    model = unconstrain_and_prune(net())
    assert model(images()).isfinite().all()


def unconstrain_and_prune(model: Net) -> Net:
    constrain(model)
    unconstrain(model)
    prune.l1_unstructured(model.conv, "weight", amount=0.5)
    return model


def test_export_after_unconstrain() -> None:
    model = net().eval()
    constrain(model)
    outputs = model(images())
    exported = torch.export.export(unconstrain(model), (images(),))
    torch.testing.assert_close(exported.module()(images()), outputs)


def test_a_compiled_model_keeps_its_plan() -> None:
    model = net()
    plan = constrain(model)
    compiled = torch.compile(model, backend="eager")
    assert plan_of(compiled) is plan
    train(compiled)
    assert_on_manifolds(plan)
