"""Radius rules: the variance that "kaiming" promises, and the norms that "bound" promises, by dense decompositions."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from layers import Grouped, grouped_weights
from torch import nn

from fgo_geo import ProductOfGroups
from fgo_geo.grouping import collection
from fgo_geo.weights.components import WeightLayout, partition
from fgo_geo.weights.radius import bounding_radius, check_bound, check_rule, group_radii, kaiming_radius

CONSTRAINED = ["sphere", "oblique", "stiefel"]
KINDS = [*CONSTRAINED, "spectral"]
NORMS = ("frobenius", "spectral", "two_to_one")


def drawn(grouped: Grouped, rule: Any, bound: float, seed: int) -> np.ndarray:
    """A random point at the radii of a rule, flat."""
    manifold = ProductOfGroups(grouped.collections, grouped.layout)
    manifold.set_radius(group_radii(manifold.partition, rule, bound))
    generator = torch.Generator().manual_seed(seed)
    return manifold.random(*grouped.shape, dtype=torch.float64, generator=generator).numpy().ravel()


def norms(matrix: np.ndarray) -> tuple[float, float, float]:
    """Frobenius, spectral and 2->1 norm."""
    values = np.linalg.svd(matrix, compute_uv=False)
    return math.sqrt((values**2).sum()), values[0], sum(math.sqrt((row**2).sum()) for row in matrix)


@given(grouped=grouped_weights(movable=True), bound=st.sampled_from([1.0, 0.2, 30.0]), seed=st.integers(0, 99))
def test_bound_holds_for_every_group(grouped: Grouped, bound: float, seed: int) -> None:
    entries = drawn(grouped, "bound", bound, seed)
    for kind, members in grouped.groups():
        if kind == "euclidean":
            continue
        group = np.concatenate([entries[positions] for positions in members], axis=1)
        frobenius, spectral, two_to_one = norms(group)
        assert spectral <= frobenius * (1 + 1e-9)
        assert frobenius <= two_to_one * (1 + 1e-9)
        assert two_to_one <= bound * (1 + 1e-9)
        assert frobenius == pytest.approx(bound / math.sqrt(len(group)), rel=1e-9)


def test_bound_is_tight_for_one_square_stiefel_component() -> None:
    grouped = Grouped(WeightLayout((5, 5)), (collection(5, 5, "layer", "stiefel", components="block"),))
    matrix = drawn(grouped, "bound", 2.0, 0).reshape(5, 5)
    assert norms(matrix)[2] == pytest.approx(2.0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wanted", [NORMS, NORMS[:2], NORMS[:1], NORMS[1:2], NORMS[2:]])
@given(a=st.integers(1, 6), b=st.integers(1, 6), n=st.integers(1, 9), bound=st.floats(0.01, 50))
def test_bound_is_the_largest_radius_that_bounds(kind: str, wanted: Any, a: int, b: int, n: int, bound: float) -> None:
    a, b = max(a, b), min(a, b)
    # All norms are largest where equal components have rows of equal norm; there is such a Stiefel point if a = b.
    constant = np.full((a, b), 1 / math.sqrt(a))
    points = {"sphere": constant / math.sqrt(b), "oblique": constant}
    point = points.get(kind, np.eye(a, b))
    group = np.concatenate([bounding_radius(kind, a, b, n, bound, wanted) * point] * n, axis=1)
    largest = max(value for norm, value in zip(NORMS, norms(group), strict=True) if norm in wanted)
    if kind in points or a == b or "two_to_one" not in wanted:
        assert largest == pytest.approx(bound)
    else:
        assert largest <= bound


@pytest.mark.parametrize("kind", CONSTRAINED)
@given(a=st.integers(1, 6), b=st.integers(1, 6), n=st.integers(1, 9))
def test_bound_has_the_closed_form_of_the_paper(kind: str, a: int, b: int, n: int) -> None:
    """β / sqrt(A Σ F²), without the 2->1 norm β / sqrt(Σ F²), for components of Frobenius norm F at radius one."""
    a, b = max(a, b), min(a, b)
    squares = n if kind == "sphere" else n * b
    assert bounding_radius(kind, a, b, n, 2.0) == pytest.approx(2 / math.sqrt(a * squares))
    assert bounding_radius(kind, a, b, n, 2.0, NORMS[:2]) == pytest.approx(2 / math.sqrt(squares))


@pytest.mark.parametrize("rule", [kaiming_radius, bounding_radius])
@pytest.mark.parametrize("kind", ["euclidean", "Sphere", ""])
def test_kinds_without_a_norm_that_a_radius_bounds(rule: Any, kind: str) -> None:
    with pytest.raises(ValueError, match=f"kind is '{kind}'; expected one of 'sphere'.*other kinds bound no norm"):
        rule(kind, 3, 3, *((1, 1.0) if rule is bounding_radius else (9,)))


@pytest.mark.parametrize("kind", CONSTRAINED)
@pytest.mark.parametrize(
    "module",
    [
        nn.Conv2d(8, 60, 3),
        nn.Conv2d(8, 60, (1, 4)),
        nn.Conv3d(4, 40, 2),
        nn.Conv2d(6, 90, 3, groups=3),
        nn.ConvTranspose2d(60, 8, 3),
    ],
    ids=str,
)
def test_kaiming_keeps_the_entry_variance_of_kernels(kind: str, module: nn.Conv2d) -> None:
    """Variance 2 / fan_in, that of He initialisation, which nn.init computes from the shape alone."""
    layout = WeightLayout(tuple(module.weight.shape), "transposed" if module.transposed else "conv", module.groups)
    groups = collection(layout.out_channels, layout.in_channels, "layer", kind)
    entries = drawn(Grouped(layout, (groups,)), "kaiming", 1.0, 0)
    fan_in = module.in_channels // module.groups * math.prod(module.kernel_size)
    assert entries.var() == pytest.approx(2 / fan_in, rel=0.05)
    assert abs(entries.mean()) < 0.2 * entries.std()


@pytest.mark.parametrize("kind", CONSTRAINED)
@pytest.mark.parametrize("shape", [(30, 12), (12, 30), (20, 20), (10, 6, 1, 1)])
def test_kaiming_keeps_the_entry_variance_of_blocks(kind: str, shape: tuple[int, ...]) -> None:
    groups = collection(*shape[:2], "pi", (kind, kind), components="block")
    entries = drawn(Grouped(WeightLayout(shape), (groups,)), "kaiming", 1.0, 0)
    assert np.square(entries).mean() == pytest.approx(2 / math.prod(shape[1:]), rel=1e-9)


def test_kaiming_has_the_closed_forms_of_the_paper_for_kernels() -> None:
    """sqrt(2 / C) for the sphere; sqrt(2 / (C B)) for the others, with B kernel columns."""
    assert kaiming_radius("sphere", 3, 3, 32 * 9) == pytest.approx(math.sqrt(2 / 32))
    for kind in ("oblique", "stiefel"):
        assert kaiming_radius(kind, 5, 3, 32 * 15) == pytest.approx(math.sqrt(2 / (32 * 3)))


@given(grouped=grouped_weights(movable=True))
def test_unit_and_numbers_are_radii(grouped: Grouped) -> None:
    cut = partition(grouped.collections, grouped.layout)
    kinds = [kind for kind, _ in grouped.groups()]
    assert group_radii(cut, "unit").tolist() == [1.0] * len(kinds)
    assert group_radii(cut, 3).tolist() == [1.0 if kind == "euclidean" else 3.0 for kind in kinds]
    assert group_radii(cut, "kaiming").dtype == torch.float64


@pytest.mark.parametrize(
    "rule",
    ["kaimin", "", 0, -1.0, math.inf, math.nan, pytest.param(10**400, id="10**400"), True, None, torch.tensor(1.0)],
)
def test_rules_that_are_none(rule: object) -> None:
    with pytest.raises(ValueError, match='radius must be "kaiming", "unit", "bound" or a positive finite float, got'):
        check_rule(rule)


@pytest.mark.parametrize("bound", [0, -1.0, math.inf, math.nan, pytest.param(10**400, id="10**400"), "1", True])
def test_bounds_that_are_none(bound: Any) -> None:
    with pytest.raises(ValueError, match="bound must be a positive finite float, got"):
        check_bound(bound)
    with pytest.raises(ValueError, match="bound must be a positive finite float, got"):
        group_radii(partition([collection(2, 2, "layer", "sphere")], WeightLayout((2, 2, 3, 3))), "bound", bound)
