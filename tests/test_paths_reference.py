"""FG-SGD on products: one step size per group, whatever the layer, and batches that change nothing."""

from __future__ import annotations

import math
from typing import Any

import geoopt
import numpy as np
import pytest
import reference_optimizer as reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from layers import Grouped, grouped_weights
from torch import Tensor

from fgo_geo import Oblique, ProductOfGroups, RiemannianFGSGD, ScaledSphere, Stiefel
from fgo_geo.grouping import collection
from fgo_geo.optim import theorem_step_bound
from fgo_geo.paths.pieces import Job, cut, jobs_of
from fgo_geo.paths.protocol import Claim, Weight
from fgo_geo.weights.components import WeightLayout

GEOMETRIES: dict[str, Any] = {
    "sphere": reference.Sphere,
    "oblique": reference.Oblique,
    "stiefel": reference.Stiefel,
    "euclidean": lambda radius: reference.Flat(),
}


def normal(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def parameter(
    grouped: Grouped, radius: Any = 1.0, seed: int = 0, dtype: torch.dtype = torch.float64
) -> geoopt.ManifoldParameter:
    manifold = ProductOfGroups(grouped.collections, grouped.layout, radius)
    generator = torch.Generator().manual_seed(seed)
    return geoopt.ManifoldParameter(manifold.random(*grouped.shape, dtype=dtype, generator=generator))


def oracle_of(grouped: Grouped, param: Tensor, radii: Tensor) -> reference.Parameter:
    """The weight as a flat array; nested tuples index it, and can be keys."""
    components = [
        ((tuple(map(tuple, positions.tolist())),), GEOMETRIES[kind](float(radii[group])), group)
        for group, (kind, members) in enumerate(grouped.groups())
        for positions in members
    ]
    return reference.Parameter(param.detach().numpy().ravel().copy(), components)


@st.composite
def options(draw: st.DrawFn) -> dict[str, Any]:
    momentum = draw(
        st.sampled_from(
            [
                {},
                {"momentum": 0.9},
                {"momentum": 0.8, "dampening": 0.3},
                {"momentum": 0.9, "nesterov": True},
            ]
        )
    )
    step_size = draw(
        st.sampled_from([{}, {"rho": 0.3, "curvature": 5.0}, {"curvature": "manifold"}, {"step_size": "constant"}])
    )
    chosen = {
        "lr": draw(st.sampled_from([0.01, 0.1, 0.5])),
        "weight_decay": draw(st.sampled_from([0.0, 0.1])),
        "radius_invariant": draw(st.booleans()),
        "update": draw(st.sampled_from(["retraction", "exponential"])),
        "maximize": draw(st.booleans()),
    }
    return chosen | momentum | step_size


@given(
    grouped=st.lists(grouped_weights(movable=True), min_size=1, max_size=2),
    options=options(),
    scale=st.sampled_from([0.1, 1.0, 10.0]),
    seed=st.integers(0, 99),
)
def test_a_step_is_a_loop_over_groups_and_components(
    grouped: list[Grouped], options: dict[str, Any], scale: float, seed: int
) -> None:
    radii = [0.4 + normal((len(g.groups()),), seed).abs() for g in grouped]
    params = [parameter(g, r, seed) for g, r in zip(grouped, radii, strict=True)]
    oracles = [oracle_of(*case) for case in zip(grouped, params, radii, strict=True)]
    optimizer = RiemannianFGSGD(params, **options)
    if options.get("step_size") == "constant":
        scale = min(scale, 0.3)  # rounding grows with the angle of a step
    for step in range(3):
        for number, param in enumerate(params):
            param.grad = scale * normal(param.shape, 10 * step + number)
        optimizer.step()
        for param, oracle in zip(params, oracles, strict=True):
            reference.step(oracle, param.grad.numpy().ravel(), **options)
            np.testing.assert_allclose(param.detach().numpy().ravel(), oracle.x, rtol=0, atol=1e-12)
            np.testing.assert_allclose(optimizer.step_scales()[param].numpy(), oracle.scales, rtol=1e-12)


@given(
    grouped=grouped_weights(movable=True),
    exponent=st.integers(-6, 6),
    lr=st.sampled_from([1e-3, 0.1, 1.0]),
    seed=st.integers(0, 99),
)
def test_no_group_moves_farther_than_the_bound(grouped: Grouped, exponent: int, lr: float, seed: int) -> None:
    """Geodesic distance per group, of the update along geodesics; a retraction's chord is shorter still."""
    for update in ("exponential", "retraction"):
        param = parameter(grouped, 3.0, seed)
        before = param.detach().numpy().ravel().copy()
        param.grad = 10.0**exponent * normal(grouped.shape, seed)
        RiemannianFGSGD([param], lr, update=update).step()
        after = param.detach().numpy().ravel()
        for kind, members in grouped.groups():
            squared = 0.0
            for at in members:
                chord = np.linalg.norm(after[at] - before[at])
                angle = 2 * math.asin(min(1.0, chord / 6.0))
                squared += (3.0 * angle if update == "exponential" and kind == "sphere" else chord) ** 2
            assert math.sqrt(squared) <= theorem_step_bound() * lr * (1 + 1e-6)


def test_the_bound_is_reached_by_every_group() -> None:
    """Each group gets a gradient of norm √2 - 1, where the step is longest; a common step size would shorten it."""
    grouped = Grouped(
        WeightLayout((4, 6, 3, 3)), (collection(4, 6, "pio", ("sphere", "stiefel", "euclidean"), "random"),)
    )
    param = parameter(grouped)
    manifold = param.manifold
    grad = manifold.proju(param.detach(), normal(grouped.shape, 1)).as_subclass(Tensor)
    norms = manifold.group_norm(param.detach(), grad)
    knee = theorem_step_bound()
    per_component = manifold.partition.per_component((knee / norms).numpy())
    parts = manifold.partition.split(grad)
    param.grad = manifold.partition.merge(
        [p * torch.from_numpy(s)[:, None, None] for p, s in zip(parts, per_component, strict=True)]
    )
    before = param.detach().clone()
    RiemannianFGSGD([param], lr=1e-3).step()
    moved = manifold.group_norm(before, param.detach() - before)
    torch.testing.assert_close(moved, torch.full_like(moved, knee * 1e-3), rtol=1e-6, atol=0)


def test_step_scales_are_in_the_order_of_the_collection() -> None:
    grouped = Grouped(WeightLayout((4, 6, 3, 3)), (collection(4, 6, "pio", ("stiefel", "sphere"), "random", 5),))
    param = parameter(grouped)
    wanted = 1 + torch.arange(len(grouped.groups()), dtype=torch.float64)
    param.grad = torch.zeros(grouped.shape, dtype=torch.float64)
    for number, (_, members) in enumerate(grouped.groups()):
        at = torch.from_numpy(np.concatenate([m.ravel() for m in members]))
        param.grad.view(-1)[at] = normal((len(at),), number)
    tangent = param.manifold.proju(param.detach(), param.grad)
    norms = param.manifold.group_norm(param.detach(), tangent)
    for number, (_, members) in enumerate(grouped.groups()):
        at = torch.from_numpy(np.concatenate([m.ravel() for m in members]))
        param.grad.view(-1)[at] *= wanted[number] / norms[number]
    optimizer = RiemannianFGSGD([param], lr=1e-3)
    optimizer.step()
    torch.testing.assert_close(optimizer.step_scales()[param], wanted * (2 + wanted))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_product_of_one_group_trains_like_a_single_manifold(momentum: float) -> None:
    shape = (4, 3, 3, 3)
    for kind, single in {"sphere": ScaledSphere(0.5, ndim=2), "oblique": Oblique(0.5), "stiefel": Stiefel(0.5)}.items():
        product = parameter(Grouped(WeightLayout(shape), (collection(4, 3, "layer", kind),)), 0.5)
        other = geoopt.ManifoldParameter(product.detach().as_subclass(Tensor).clone(), manifold=single)
        optimizers = [RiemannianFGSGD([p], lr=0.1, momentum=momentum) for p in (product, other)]
        for step in range(3):
            product.grad = other.grad = normal(shape, step)
            for optimizer in optimizers:
                optimizer.step()
            torch.testing.assert_close(product.detach(), other.detach().as_subclass(Tensor), rtol=0, atol=1e-15)
        scales = [optimizer.step_scales()[p] for optimizer, p in zip(optimizers, (product, other), strict=True)]
        assert float(scales[0]) == pytest.approx(float(scales[1]), rel=1e-13)


@given(grouped=grouped_weights(movable=True), options=options(), seed=st.integers(0, 99))
def test_every_step_in_single_precision_stays_on_the_manifold(
    grouped: Grouped, options: dict[str, Any], seed: int
) -> None:
    param = parameter(grouped, 0.3, seed, torch.float32)
    optimizer = RiemannianFGSGD([param], **options)
    for step in range(5):
        param.grad = normal(grouped.shape, step, torch.float32)
        optimizer.step()
        assert float(param.manifold.violation(param.detach()).max()) < 1e-5


@pytest.mark.parametrize(("update", "steps"), [("retraction", 10_000), ("exponential", 300)])
def test_ten_thousand_steps_in_single_precision_do_not_drift(update: str, steps: int) -> None:
    kinds = ("sphere", "stiefel")  # an oblique component is a row of spheres
    param = parameter(Grouped(WeightLayout((2, 2, 3, 2)), (collection(2, 2, "po", kinds),)), 0.2, dtype=torch.float32)
    optimizer = RiemannianFGSGD([param], lr=0.1, momentum=0.9, update=update, check_finite=False)
    grads = normal((100, *param.shape), 0, torch.float32)
    for step in range(steps):
        param.grad = grads[step % 100]
        optimizer.step()
    assert float(param.manifold.violation(param.detach()).max()) < 1e-5


# -- pieces and jobs ---------------------------------------------------------------------------------------------


def claim_of(param: Any) -> Claim:
    """All of a weight, with a gradient and momentum."""
    grad, buffer = normal(param.shape, 1, param.dtype), normal(param.shape, 2, param.dtype)
    weight = Weight(param, param, param.manifold, grad, buffer)
    return Claim(weight, tuple(range(weight.n_parts)))


def loaded(claims: list[Claim]) -> list[Job]:
    """Jobs with points, gradients and momentum."""
    jobs = jobs_of(claims)
    parts = {c.weight: [cut(c, t) for t in (c.weight.param, c.weight.grad, c.weight.buffer)] for c in claims}
    for job in jobs:
        joined = [job.join([parts[piece.weight][k][piece.part] for piece in job.pieces]) for k in range(3)]
        job.x, job.grad, job.buffer = joined
    return jobs


@given(grouped=st.lists(grouped_weights(movable=True), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_joining_loses_and_changes_nothing(grouped: list[Grouped], seed: int) -> None:
    claims = [claim_of(parameter(g, 0.5, seed)) for g in grouped]
    points: dict[Weight, dict[int, Tensor]] = {}
    squares = torch.zeros(sum(claim.weight.n_groups for claim in claims), dtype=torch.float64)
    for job in loaded(claims):
        norms = job.sum(job.grad.flatten(1).square().sum(1))
        assert job.spread(norms).shape == (*job.x.shape[:1], 1, 1) or job.groups.count == 1
        squares[job.index] += norms
        for piece, x in zip(job.pieces, job.split(job.x), strict=True):
            points.setdefault(piece.weight, {})[piece.part] = x
    expected: list[Tensor] = []
    for claim in claims:
        weight = claim.weight
        before = weight.param.detach().clone()
        expected.append(weight.manifold.group_inner(before, weight.grad))
        copies = {part: x.clone() for part, x in points[weight].items()}
        weight.param.detach().fill_(torch.nan)
        for part, x in copies.items():
            assert bool(weight.param.isnan().all())
            with torch.no_grad():
                weight.stage(part, x, None)
        assert torch.equal(weight.param.detach(), before)
    torch.testing.assert_close(squares, torch.cat(expected))


def test_equal_manifolds_of_many_layers_share_a_job() -> None:
    grouped = Grouped(WeightLayout((4, 3, 3, 3)), (collection(4, 3, "pio", ("sphere", "stiefel"), "random"),))
    params = [parameter(grouped, 0.5, seed) for seed in range(3)] + [parameter(grouped, 0.7)]
    jobs = jobs_of([claim_of(param) for param in params])
    assert sorted(len(job.pieces) for job in jobs) == [1, 1, 3, 3]


class Own(Stiefel):
    """With an option of which nobody knows."""


@pytest.mark.parametrize(
    ("manifolds", "sizes"),
    [
        ([Stiefel(), Stiefel(), Stiefel(retraction="qr"), Stiefel(2.0), Oblique()], [2, 1, 1, 1]),
        ([ScaledSphere(ndim=2), ScaledSphere(), ScaledSphere(ndim=2), ScaledSphere(2.0, ndim=2)], [2, 1, 1]),
        ([geoopt.Euclidean(ndim=2), geoopt.Euclidean(ndim=2), geoopt.Euclidean(ndim=1)], [2, 1]),
        ([Own(), Own(), Stiefel()], [1, 1, 1]),
        ([own := Own(), own], [2]),
    ],
    ids=str,
)
def test_only_equal_manifolds_share_a_job(manifolds: list[geoopt.Manifold], sizes: list[int]) -> None:
    params = [geoopt.ManifoldParameter(m.origin(5, 3, dtype=torch.float64), manifold=m) for m in manifolds]
    found = jobs_of([claim_of(param) for param in params])
    assert [len(job.pieces) for job in found] == sizes
    assert {id(piece.weight.param) for job in found for piece in job.pieces} == {id(p) for p in params}


def test_layers_that_have_been_smaller_have_a_job_of_their_own() -> None:
    """Their momentum may be longer, relative to the radius, than that of layers that have always been as large."""
    grouped = Grouped(WeightLayout((4, 3, 3, 3)), (collection(4, 3, "layer", "stiefel"),))
    params = [parameter(grouped, radius) for radius in (0.5, 0.5, 0.1)]
    params[1].manifold.set_radius(0.1)
    params[1].manifold.set_radius(0.5)
    assert params[1].manifold.smallest_radii == [0.1]
    jobs = jobs_of([claim_of(param) for param in params])
    assert [job.smallest_radius for job in jobs] == [0.5, 0.1, 0.1]


def test_layers_that_share_a_manifold_with_many_radii_are_kept_apart() -> None:
    manifold = ProductOfGroups(collection(4, 3, "layer", "sphere"), (4, 3, 3, 3), 0.5 + normal((4, 3), 0).abs())
    params = [geoopt.ManifoldParameter(manifold.random(4, 3, 3, 3, dtype=torch.float64)) for _ in range(2)]
    optimizer = RiemannianFGSGD(params, lr=0.1)
    for step in range(2):
        for number, param in enumerate(params):
            param.grad = normal(param.shape, 10 * step + number)
        optimizer.step()
    for param in params:
        assert float(manifold.violation(param.detach()).max()) < 1e-12


def claims_of_layers(shape: tuple[int, ...], n: int, components: str, strategy: str = "layer") -> list[Claim]:
    """Equal layers."""
    groups = collection(*shape[:2], strategy, "oblique", "random", components=components)
    return [claim_of(parameter(Grouped(WeightLayout(shape), (groups,)), seed=seed)) for seed in range(n)]


@pytest.mark.parametrize(
    ("shape", "layers", "components", "storage"),
    [
        ((8, 8, 3, 3), 2, "kernel", "planes"),  # 128 matrices
        ((9, 7, 3, 3), 2, "kernel", "rows"),  # 126 matrices
        ((8, 8, 8, 8), 2, "kernel", "planes"),  # of 64 entries
        ((8, 8, 13, 5), 2, "kernel", "rows"),  # of 65 entries
        ((3, 4), 128, "block", "planes"),
        ((3, 4), 127, "block", "columns"),  # a wide block is turned
        ((4, 3), 127, "block", "rows"),
        ((16, 64), 2, "block", "columns"),
        ((64, 16), 2, "block", "rows"),
        ((64, 16), 200, "block", "rows"),
    ],
)
def test_many_small_matrices_are_stored_as_planes(
    shape: tuple[int, ...], layers: int, components: str, storage: str
) -> None:
    """Entry by entry over all matrices if there are many small ones; matrix by matrix, as they lay, otherwise."""
    (job,) = loaded(claims_of_layers(shape, layers, components))
    assert len(job.pieces) == layers
    order = {"planes": (1, 2, 0), "rows": (0, 1, 2), "columns": (0, 2, 1)}[storage]
    assert job.buffer is not None
    for batch in (job.x, job.grad, job.buffer):
        assert batch.permute(order).is_contiguous()


@pytest.mark.parametrize("kind", ["sphere", "oblique", "stiefel"])
@pytest.mark.parametrize("shape", [(8, 8, 3, 3), (8, 8, 2, 3)])
def test_how_matrices_are_stored_changes_nothing_but_rounding(shape: tuple[int, ...], kind: str) -> None:
    """The 128 kernels of two weights are stored as planes in one batch; those of one weight alone as rows."""
    grouped = Grouped(WeightLayout(shape), (collection(*shape[:2], "layer", kind),))
    results: list[list[Tensor]] = []
    for together in (True, False):
        params = [parameter(grouped, 0.5, seed) for seed in range(2)]
        # No fused path takes the exponential map.
        optimizers = [
            RiemannianFGSGD(own, lr=0.1, momentum=0.9, update="exponential")
            for own in ([params] if together else [[param] for param in params])
        ]
        for step in range(3):
            for number, param in enumerate(params):
                param.grad = normal(shape, 10 * step + number)
            for optimizer in optimizers:
                optimizer.step()
        results.append([p.detach().as_subclass(Tensor) for p in params])
        results[-1] += [state["momentum_buffer"] for o in optimizers for state in o.state.values()]
    for planes, rows in zip(*results, strict=True):
        torch.testing.assert_close(planes, rows, rtol=0, atol=1e-13)


@pytest.mark.parametrize("radius_invariant", [False, True])
def test_growing_radii_keep_long_momentum_on_the_stiefel_manifold(radius_invariant: bool) -> None:
    """The bound on steps follows from the smallest radius so far, since dilated momentum keeps its relative length."""
    grouped = Grouped(WeightLayout((4, 3, 3, 3)), (collection(4, 3, "layer", "stiefel"),))
    param = parameter(grouped, 0.01)
    optimizer = RiemannianFGSGD([param], lr=0.05, momentum=0.9, radius_invariant=radius_invariant)
    for step in range(4):
        param.grad = normal(grouped.shape, 0) * (0 if step > 1 else 0.06)
        optimizer.step()
        assert float(param.manifold.violation(param.detach()).max()) < 1e-12
        if step == 1:
            with torch.no_grad():
                param.manifold.set_radius(1.0)
                param.mul_(100.0)
                optimizer.state[param]["momentum_buffer"].mul_(100.0)


@pytest.mark.parametrize("normal_part", [0.0, 2e3, 2e4, 2e5])
def test_a_gradient_that_is_almost_normal_is_measured_as_well(normal_part: float) -> None:
    """R = 3 beside a normal part that leaves nothing of it in a difference of squares."""
    manifold = Stiefel()
    start = manifold.projx(normal((64, 16), 1, torch.float32))
    param = geoopt.ManifoldParameter(start, manifold=manifold)
    optimizer = RiemannianFGSGD([param], lr=0.1, momentum=1e-6)
    for step in range(2):
        x = param.detach().double()
        tangent = manifold.proju(x, normal((64, 16), 2 + step))
        square = normal((16, 16), 5)
        across = x @ (square + square.mT)
        param.grad = (3 * tangent / tangent.norm() + normal_part * across / across.norm()).float()
        optimizer.step()
        exact = float(manifold.proju(x, param.grad.double()).norm())
        assert float(optimizer.step_scales()[param]) == pytest.approx(exact * (2 + exact), rel=1e-3)
        assert float(manifold.violation(param.detach())) <= 1e-6
