"""Factorisations that are kept while their matrix stays the same, and those that go through a Gram matrix."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fgo_geo.linalg import Memory, polar_factor
from fgo_geo.models.renormalize import renormalization_of, renormalize, update_scales


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def factorisations(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the factorisations that are called."""
    called: list[str] = []
    for name in ("svd", "eigh"):
        real = getattr(torch.linalg, name)

        def counted(*args: Any, real: Any = real, name: str = name, **kwargs: Any) -> Any:
            called.append(name)
            return real(*args, **kwargs)

        monkeypatch.setattr(torch.linalg, name, counted)
    return called


def renormalised(kind: str = "stiefel", **options: Any) -> Any:
    torch.manual_seed(0)
    return renormalize(nn.Linear(40, 12), manifold=kind, **options)


# -- the polar factor by its Gram matrix -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("condition", [1.0, 4.0, 15.9, 16.1, 1e3, 1e6])
@pytest.mark.parametrize("size", [(32, 32), (90, 33), (200, 64)])
def test_polar_factor_of_large_matrices(
    size: tuple[int, int], condition: float, dtype: torch.dtype, factorisations: list[str]
) -> None:
    a, b = size
    u, v = (torch.linalg.qr(normal(seed, n, b, dtype=torch.float64))[0] for seed, n in ((0, a), (1, b)))
    values = torch.logspace(0, -np.log10(condition), b, dtype=torch.float64)
    x = (3 * (u * values) @ v.mT).to(dtype)
    q = polar_factor(torch.stack([x, x.flip(0)]))
    assert factorisations == (["eigh"] if condition < 16 else ["eigh", "svd"])
    eps = torch.finfo(dtype).eps
    assert float((q.double().mT @ q.double() - torch.eye(b)).abs().max()) <= 20 * eps
    error = float((q[0] - (u @ v.mT)).abs().max())
    assert error <= 4 * eps * (condition**2 if condition < 16 else 10 * condition)
    torch.testing.assert_close(q[1], q[0].flip(0), atol=max(1e-9, 10 * error), rtol=0)


def test_derivatives_through_the_gram_matrix() -> None:
    x, weight = normal(0, 40, 33, dtype=torch.float64), normal(1, 40, 33, dtype=torch.float64)
    x = x / 6 + torch.eye(40, 33)
    direction = normal(2, 40, 33, dtype=torch.float64)
    x.requires_grad_()
    (polar_factor(x) * weight).sum().backward()
    step = 1e-5
    with torch.no_grad():
        plus, minus = ((polar_factor(x + s * direction) * weight).sum() for s in (step, -step))
    assert float((x.grad * direction).sum()) == pytest.approx(float(plus - minus) / (2 * step), rel=1e-6)


# -- a memory ----------------------------------------------------------------------------------------------------------


def test_a_memory_knows_its_last_inputs_alone() -> None:
    memory, x = Memory(), normal(0, 3, 2)
    assert memory.recall([x]) is None
    memory.keep([x], [2 * x])
    assert torch.equal(memory.recall([x.clone()])[0], 2 * x)
    assert memory.recall([x, x]) is None
    assert memory.recall([x.double()]) is None
    assert memory.recall([x.mT.contiguous().mT]) is None
    x.data[0, 0] += 1
    assert memory.recall([x]) is None
    for copied in (copy.deepcopy(memory), pickle.loads(pickle.dumps(memory))):
        assert copied._inputs == copied._results == []


def test_a_result_that_was_changed_is_forgotten() -> None:
    memory, x = Memory(), normal(0, 3)
    memory.keep([x], [2 * x])
    memory.recall([x])[0].mul_(5)
    assert memory.recall([x]) is None


def test_nan_is_never_the_same() -> None:
    memory, x = Memory(), torch.tensor([float("nan")])
    memory.keep([x], [x])
    assert memory.recall([x]) is None


# -- renormalised weights ----------------------------------------------------------------------------------------------


def test_unchanged_weights_are_factorised_once(factorisations: list[str]) -> None:
    layer = renormalised()
    with torch.no_grad():
        layer.parametrizations.weight.original[0, 0] += 1
    factorisations.clear()
    weights = [layer.weight for _ in range(3)]
    with torch.no_grad():
        weights += [layer.weight for _ in range(3)]
    assert len(factorisations) == 1
    for weight in weights[1:]:
        assert torch.equal(weight, weights[0])


@pytest.mark.parametrize("written_to", ["the parameter", "its data"])
def test_a_change_is_seen_however_it_was_made(written_to: str, factorisations: list[str]) -> None:
    layer = renormalised()
    raw = layer.parametrizations.weight.original
    with torch.no_grad():
        before = layer.weight.clone()
        raw.requires_grad_(False)
        (raw if written_to == "the parameter" else raw.data)[0, 0] += 1
        after = layer.weight
        assert float((after - before).abs().max()) > 1e-3
        expected = copy.deepcopy(layer).weight
    assert torch.equal(after, expected)


def test_writing_into_a_weight_changes_no_later_one() -> None:
    layer = renormalised()
    with torch.no_grad():
        before = layer.weight.clone()
        layer.weight.mul_(7)
        assert torch.equal(layer.weight, before)


def test_new_scales_are_seen() -> None:
    layer = renormalised(statistics="std")
    with torch.no_grad():
        before = layer.weight.clone()
        layer(5 * normal(3, 200, 40))
        update_scales(layer)
        after = layer.weight
    lam = float(renormalization_of(layer).lam[0])
    assert lam > 1.1
    torch.testing.assert_close(after * lam, before)


@pytest.mark.parametrize("kind", ["stiefel", "spectral_ball"])
def test_two_backward_passes_through_one_factorisation(kind: str, factorisations: list[str]) -> None:
    """Accumulated gradients: each pass has a graph of its own."""
    layer, fresh = renormalised(kind), renormalised(kind)
    x = [normal(seed, 8, 40) for seed in (1, 2)]
    for each in x:
        layer(each).square().sum().backward()
    (fresh(x[0]).square().sum() + fresh(x[1]).square().sum()).backward()
    raw, expected = (model.parametrizations.weight.original.grad for model in (layer, fresh))
    torch.testing.assert_close(raw, expected)
    assert float(expected.abs().max()) > 1e-3


def test_the_bound_holds_while_training() -> None:
    layer = renormalised()
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0, momentum=0.9)
    for seed in range(5):
        for half in normal(seed, 2, 8, 40):
            (layer(half).square().sum() / 10).backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            weight = layer.weight
        assert float(renormalization_of(layer).violation(weight).max()) <= 4 * torch.finfo(torch.float32).eps
        assert torch.equal(weight, layer.weight)


def test_a_used_layer_can_be_copied_pickled_and_cast() -> None:
    layer = renormalised()
    layer(normal(0, 2, 40)).sum().backward()
    with torch.no_grad():
        weight = layer.weight
        assert torch.equal(copy.deepcopy(layer).weight, weight)
        torch.testing.assert_close(copy.deepcopy(layer).double().weight, weight.double())
    assert pickle.loads(pickle.dumps(renormalization_of(layer))).partition.kinds == ("stiefel",)
