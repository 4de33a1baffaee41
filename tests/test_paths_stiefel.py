"""The compiled step of Stiefel matrices and blocks: the same map as the reference path, on any processor."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import oracles
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from path_helpers import (
    CLOSE,
    INSTRUCTION_SETS,
    assert_close,
    built,
    declared,
    in_double,
    limited_to,
    product_of_blocks,
    sweeps_of,
    trained,
)

from fgo_geo import ProductOfGroups, RiemannianFGSGD, Stiefel
from fgo_geo.grouping import collection
from fgo_geo.kernels import use_path
from fgo_geo.paths.native import stiefel

pytestmark = built

NAMES = {"fgo_stiefel_norms", "fgo_stiefel_move"}
OPTIONS: list[dict[str, Any]] = [
    {},
    {"momentum": 0.9},
    {"momentum": 0.9, "nesterov": True},
    {"momentum": 0.9, "dampening": 0.3, "maximize": True},
    {"momentum": 0.9, "radius_invariant": True},
    {"momentum": 0.9, "step_size": "constant", "lr": 0.01},
    {"momentum": 0.5, "norm": "running"},
]


def filters(shape: tuple[int, ...]) -> ProductOfGroups:
    own = collection(*shape[:2], "po", ("stiefel", "sphere"), "random", 0, components="filter")
    return ProductOfGroups(own, shape)


def weights_of_many_forms() -> list[Any]:
    """Tall and wide, in the order of the matrix and not, alone and among lines, stored by rows and by columns."""
    return [
        declared(Stiefel(), 70, 33),
        declared(Stiefel(0.3), 40, 40, dims=(1, 0)),
        declared(Stiefel(torch.tensor([0.5, 2.0, 1.0])), 3, 31, 5),
        declared(Stiefel(2.0), 2, 50, 17, dims=(0, 2, 1)),
        declared(product_of_blocks((90, 70), "pio", ("sphere", "stiefel", "oblique", "euclidean")), 90, 70),
        declared(product_of_blocks((45, 300), "pi", ("stiefel",)), 45, 300),
        declared(product_of_blocks((64, 80), "layer", ("stiefel",)), 64, 80),
        declared(filters((24, 40)), 24, 40),
    ]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
def test_it_is_the_step_of_the_reference_path_in_double_precision(options: dict[str, Any], scale: float):
    weights = weights_of_many_forms()
    assert set(sweeps_of(lambda: trained("auto", weights, 1, scale, **options))) >= NAMES
    actual = trained("auto", weights, 3, scale, **options)
    assert_close(actual, trained("reference", [in_double(w) for w in weights], 3, scale, **options), CLOSE)
    for weight, after in zip(weights, actual["weights"], strict=True):
        assert float(weight.manifold.violation(after).max()) <= 1e-6


@given(
    rows=st.integers(1, 130) | st.integers(150, 200),  # large ones are worth several threads
    columns=st.integers(1, 130) | st.integers(150, 200),
    strategy=st.sampled_from(["po", "pi", "pio", "layer"]),
    scale=st.sampled_from([1e-2, 1.0, 10.0]),
    number=st.sampled_from(INSTRUCTION_SETS),
    threads=st.integers(1, 3),
)
def test_any_shape_with_any_instructions_and_threads(
    rows: int, columns: int, strategy: str, scale: float, number: int, threads: int
):
    kinds = ("stiefel",) if strategy == "layer" else ("stiefel", "oblique")
    cuts_rows, cuts_columns = strategy in ("po", "pio"), strategy in ("pi", "pio")
    assume(rows >= (4 if cuts_rows else 1) and columns >= (4 if cuts_columns else 1) and rows * columns > 1)
    weight = declared(product_of_blocks((rows, columns), strategy, kinds), rows, columns)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with limited_to(number):
            actual = trained("auto", [weight], 2, scale, momentum=0.9)
    finally:
        torch.set_num_threads(before)
    expected = trained("reference", [in_double(weight)], 2, scale, momentum=0.9)
    assert_close(actual, expected, CLOSE)
    assert float(weight.manifold.violation(actual["weights"][0]).max()) <= 1e-6


@pytest.mark.parametrize("length", [1e-4, 0.02, 0.15, 0.4, 0.9, 1.6, 3.0, 30.0, 99.0, 150.0])
@pytest.mark.parametrize("shape", [(60, 20), (24, 24)])
def test_the_retraction_of_a_step_of_any_length_is_the_polar_factor(length: float, shape: tuple[int, int]):
    """Lengths for which the series has each of its numbers of terms, and beyond."""
    weight = declared(Stiefel(), *shape)
    x = weight.detach().double().numpy()
    gradient = np.random.default_rng(0).standard_normal(shape)
    along = x.T @ gradient
    tangent = gradient - x @ (along + along.T) / 2
    tangent *= length / np.linalg.norm(tangent)
    weight.grad = torch.from_numpy(tangent).float()
    RiemannianFGSGD([weight], lr=1.0, step_size="constant").step()
    assert np.abs(weight.detach().numpy() - oracles.polar(x - tangent)).max() <= 3e-6
    assert float(weight.manifold.violation(weight.detach()).max()) <= 1e-6


@pytest.mark.parametrize("factor", [0.5, 0.99, 1.5, 30.0])
def test_blocks_off_the_manifold_come_back_in_one_step(factor: float):
    manifold = product_of_blocks((60, 50), "pio", ("stiefel", "sphere"))
    weights = [declared(manifold, 60, 50) for _ in range(2)]
    for path, weight in zip(("auto", "reference"), weights, strict=True):
        optimizer = RiemannianFGSGD([weight], lr=0.1, momentum=0.9)
        with torch.no_grad():
            weight.mul_(factor)
        weight.grad = torch.linspace(-1, 1, weight.numel()).reshape(weight.shape)
        with use_path(path):
            optimizer.step()
        assert float(manifold.violation(weight.detach()).max()) <= 1e-6
    assert float((weights[0].detach() - weights[1].detach()).abs().max()) <= 1e-3  # R is that of points


def test_a_gradient_that_is_not_finite_is_refused_and_its_group_can_be_skipped():
    weights = weights_of_many_forms()
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    for number, weight in enumerate(weights):
        weight.grad[(-1,) * weight.ndim] = float("nan")
        optimizer = RiemannianFGSGD(weights, lr=0.1, momentum=0.9)
        before = [w.detach().clone() for w in weights]
        with pytest.raises(FloatingPointError, match=rf"param_groups\[0\]\['params'\]\[{number}\]"):
            optimizer.step()
        assert all(torch.equal(a, b.detach()) for a, b in zip(before, weights, strict=True))
        weight.grad = torch.ones_like(weight)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_skipped_group_moves_by_its_momentum_alone(momentum: float):
    manifold = product_of_blocks((40, 30), "pio", ("stiefel", "sphere"))
    weight = declared(manifold, 40, 30)
    optimizer = RiemannianFGSGD([weight], lr=0.1, momentum=momentum, check_finite=False)
    other = copy.deepcopy(weight)
    other_optimizer = RiemannianFGSGD([other], lr=0.1, momentum=momentum)
    weight.grad = other.grad = torch.ones_like(weight)
    for each in (optimizer, other_optimizer):
        each.step()
    weight.grad = torch.full_like(weight, float("nan"))
    other.grad = torch.zeros_like(weight)
    for each in (optimizer, other_optimizer):
        each.step()
    assert int(optimizer.skipped_groups()) == manifold.n_groups
    assert float((weight.detach() - other.detach()).abs().max()) <= 1e-6


def test_steps_do_not_depend_on_the_weights_that_share_a_batch():
    weights = weights_of_many_forms()
    together = trained("auto", weights, 3, 1.0, momentum=0.9)
    generator = torch.Generator().manual_seed(1)
    gradients = [[torch.randn(w.shape, dtype=torch.float64, generator=generator) for w in weights] for _ in range(3)]
    for number, weight in enumerate(weights):
        alone = copy.deepcopy(weight)
        optimizer = RiemannianFGSGD([alone], lr=0.1, momentum=0.9)
        for own in gradients:
            alone.grad = torch.empty_like(alone).copy_(own[number])
            optimizer.step()
        assert torch.equal(alone.detach(), together["weights"][number])


def test_an_interrupt_before_the_weight_is_written_changes_nothing(monkeypatch: pytest.MonkeyPatch):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    weights = weights_of_many_forms()
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    before = [w.detach().clone() for w in weights]
    monkeypatch.setattr(stiefel, "put", interrupt)
    with pytest.raises(KeyboardInterrupt):
        RiemannianFGSGD(weights, lr=0.1, momentum=0.9).step()
    assert all(torch.equal(a, b.detach()) for a, b in zip(before, weights, strict=True))


@pytest.mark.parametrize("where", ["momentum", "weight"])
def test_nan_that_nobody_looks_for_stays_in_its_weight(where: str) -> None:
    weight, other = declared(Stiefel(), 64, 16), declared(Stiefel(), 48, 16)
    optimizer = RiemannianFGSGD([weight, other], lr=0.1, momentum=0.9, check_finite=False)
    for _ in range(2):
        for w in (weight, other):
            w.grad = torch.randn(w.shape)
        optimizer.step()
        with torch.no_grad():
            (weight if where == "weight" else optimizer.state[weight]["momentum_buffer"])[0, 0] = torch.nan
    assert not weight.isfinite().all()
    assert float((other.mT @ other - torch.eye(16)).detach().abs().max()) < 1e-5
