"""Where weights start: what the projection leaves open is drawn; half precision is computed in single precision."""

from __future__ import annotations

import copy
import time

import pytest
import torch
from networks import assert_on_manifolds
from torch import Tensor, nn

from fgo_geo import Plan, Stiefel, constrain, register_kind
from fgo_geo.weights.kinds import unregister_kind

KINDS = ["sphere", "oblique", "stiefel"]


def constrained(weight: Tensor, kind: str, seed: int = 0, **arguments: object) -> tuple[Plan, Tensor]:
    layer = nn.Conv2d(weight.shape[1], weight.shape[0], tuple(weight.shape[2:]))
    layer.weight = nn.Parameter(weight.clone())
    plan = constrain(layer, "layer", kind, radius=1.0, first_layer=True, classifier=True, seed=seed, **arguments)
    assert_on_manifolds(plan, 1e-5 if weight.dtype == torch.float32 else 16 * torch.finfo(weight.dtype).eps)
    return plan, layer.weight.detach().as_subclass(Tensor)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [0.0, 1e-30])
def test_zero_kernels_are_drawn_uniformly_from_the_seed(kind: str, value: float) -> None:
    """Random signs and means near zero: uniform draws, not one point for all."""
    weight = torch.zeros(40, 50, 3, 3)
    weight[0, 0] = value and 1.0
    if value:
        weight[1:] = value * torch.randn(39, 50, 3, 3, generator=torch.Generator().manual_seed(0))
    plan, point = constrained(weight, kind)
    kernels = point.flatten(0, 1)
    assert len(torch.unique(kernels, dim=0)) == 2000
    assert float(kernels[1:].mean(0).abs().max()) < 5 * float(kernels.std()) / 2000**0.5
    second = kernels.flatten(1).T @ kernels.flatten(1) / 2000
    torch.testing.assert_close(second, second.diagonal().mean() * torch.eye(9), rtol=0, atol=0.05)
    number = 1999 if value and kind != "stiefel" else 2000  # a kernel of ones has rank one
    assert f"{number} of 2000 components have no unique nearest point and were drawn at random (seed 0)" in str(plan)
    assert torch.equal(point, constrained(weight, kind)[1])
    assert not torch.equal(point, constrained(weight, kind, seed=1)[1])


def test_layers_of_one_seed_are_drawn_differently() -> None:
    model = nn.Sequential(nn.Conv2d(2, 2, 3), nn.Conv2d(2, 2, 3))
    for layer in model:
        nn.init.zeros_(layer.weight)
    before = torch.get_rng_state()
    constrain(model, "layer", "sphere", first_layer=True)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(model[0].weight, model[1].weight)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("components", ["kernel", "block"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_weights_with_unique_nearest_points_are_projected(kind: str, components: str, dtype: torch.dtype) -> None:
    weight = torch.randn(6, 5, 3, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    plan, point = constrained(weight, kind, components=components)
    assert "Notes" not in str(plan)
    manifold = plan.constrained[0].manifold()
    expected = manifold.projx(weight.double()).to(dtype)
    torch.testing.assert_close(point, expected, rtol=0, atol=4 * torch.finfo(dtype).eps)


def test_a_zero_column_is_drawn_and_the_others_stay() -> None:
    weight = torch.randn(4, 4, 3, 3)
    weight[1, 2, :, 1] = 0
    plan, point = constrained(weight, "oblique")
    assert "1 of 16 components have no unique nearest point" in str(plan)
    expected = weight / weight.norm(dim=2, keepdim=True)
    is_other = ~expected.isnan()
    torch.testing.assert_close(point[is_other], expected[is_other])


@pytest.mark.parametrize("rank", [0, 1, 2])
@pytest.mark.parametrize("shape", [(5, 3), (3, 3), (4, 2), (8, 6)])
def test_what_a_low_rank_leaves_open_on_stiefel_is_drawn(rank: int, shape: tuple[int, int]) -> None:
    """The nearest points are ``U V' + N`` with any ``N`` across: all of them are as near, and ours is one of them."""
    if rank >= min(shape):
        pytest.skip("full rank")
    generator = torch.Generator().manual_seed(rank)
    left, right = (torch.randn(size, rank, generator=generator) for size in shape)
    points = []
    for seed in range(8):
        plan, point = constrained((left @ right.T)[None, None], "stiefel", seed=seed)
        assert "1 of 1 components have no unique nearest point" in str(plan)
        points.append(point[0, 0])
    u, _, v = torch.linalg.svd(left @ right.T, full_matrices=False)
    determined = u[:, :rank] @ v[:rank]
    for point in points:
        torch.testing.assert_close(u[:, :rank].T @ point @ v[:rank].T, torch.eye(rank), rtol=0, atol=1e-4)
        distance = torch.linalg.matrix_norm(point - determined)
        assert float(distance) == pytest.approx((min(shape) - rank) ** 0.5, abs=1e-4)
    assert not all(torch.allclose(points[0], point, atol=1e-2) for point in points)


@pytest.mark.parametrize("kind", ["ball", "spectral_ball"])
def test_zero_is_a_point_of_a_ball_and_stays(kind: str) -> None:
    plan, point = constrained(torch.zeros(4, 5, 3, 3), kind)
    assert not point.any()
    assert "Notes" not in str(plan)


@pytest.mark.parametrize("kind", ["sphere", "oblique", "spectral_sphere"])
def test_tiny_entries_that_fill_no_component_are_projected(kind: str) -> None:
    """More of them than a component has, but never all of a kernel or of a column."""
    weight = torch.randn(6, 5, 3, 3, generator=torch.Generator().manual_seed(0))
    weight[:, :, 0] = 0
    plan, point = constrained(weight, kind)
    assert "Notes" not in str(plan)
    torch.testing.assert_close(point, plan.constrained[0].manifold().projx(weight))
    weight[2, 3] = 0
    plan, _ = constrained(weight, kind)
    assert "1 of 30 components have no unique nearest point" in str(plan)


def test_constant_initialisation_is_drawn_on_stiefel() -> None:
    layer = nn.Linear(20, 30)
    nn.init.constant_(layer.weight, 0.1)
    plan = constrain(layer, "layer", "stiefel", classifier=True)
    assert "1 of 1 components" in str(plan)
    assert_on_manifolds(plan)


def test_half_precision_is_computed_in_single_precision() -> None:
    """bfloat16 products are a hundred times as slow on many processors."""
    torch.manual_seed(0)
    single = nn.Linear(512, 512)
    half = nn.Linear(512, 512, dtype=torch.bfloat16)
    with torch.no_grad():
        half.weight.copy_(single.weight)
        single.weight.copy_(half.weight)
    seconds = []
    for layer in (single, half):
        start = time.perf_counter()
        plan = constrain(layer, "layer", "stiefel", classifier=True)
        plan.project()
        seconds.append(time.perf_counter() - start)
    assert half.weight.dtype == torch.bfloat16
    torch.testing.assert_close(half.weight.float(), single.weight.detach(), rtol=1e-2, atol=1e-3)
    assert seconds[1] < 5 * seconds[0] + 0.5


@pytest.mark.parametrize("shape", [(8, 8), (60, 40), (5, 200)])
def test_autocast_does_not_touch_the_start(shape: tuple[int, int]) -> None:
    layer = nn.Linear(*shape, bias=False)
    expected = copy.deepcopy(layer)
    constrain(expected, "layer", "stiefel", first_layer=True, classifier=True)
    with torch.autocast("cpu", torch.bfloat16):
        constrain(layer, "layer", "stiefel", first_layer=True, classifier=True)
    assert torch.equal(layer.weight, expected.weight)


def test_a_kind_that_projects_in_a_way_of_its_own() -> None:
    """Rotations: the polar factor is a point of the Stiefel manifold, but not always one of theirs."""

    class Rotation(Stiefel):
        name = "Rotation"

        def projx(self, x: Tensor) -> Tensor:
            q = super().projx(x)
            sign = torch.linalg.det(q).sign()
            return torch.cat([q[..., :-1], q[..., -1:] * sign[..., None, None]], -1)

    torch.manual_seed(0)
    weight = torch.randn(8, 8, 5, 5)
    register_kind("rotation", Rotation)
    try:
        _, point = constrained(weight, "rotation")
    finally:
        unregister_kind("rotation")
    torch.testing.assert_close(torch.linalg.det(point), torch.ones(8, 8))


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e18])
@pytest.mark.parametrize("shape", [(60, 40), (200, 170)])
def test_a_start_of_any_scale(shape: tuple[int, int], scale: float) -> None:
    layer = nn.Linear(shape[1], shape[0], bias=False)
    values = torch.linspace(0.8, 1.2, shape[1], dtype=torch.float64)
    exact = torch.linalg.qr(torch.randn(shape, dtype=torch.float64))[0]
    layer.weight = nn.Parameter((exact * values * scale).float())
    constrain(layer, "layer", "stiefel", radius=1.0, first_layer=True, classifier=True)
    torch.testing.assert_close(layer.weight.detach().double().as_subclass(Tensor), exact, rtol=0, atol=1e-5)
