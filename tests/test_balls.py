"""Balls and the sphere of the spectral norm, by what defines a nearest point, and with slow decompositions in numpy."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import geoopt
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import fgo_geo
from fgo_geo import Ball, Plan, ProductOfGroups, RiemannianFGSGD, SpectralBall, SpectralSphere, collection, kernels
from fgo_geo.manifolds import ComponentManifold
from fgo_geo.weights import kinds
from fgo_geo.weights.norms import manifold_norm_bounds, matrix_norms


def frobenius(x: np.ndarray) -> float:
    return float(np.sqrt((x**2).sum()))


def spectral(x: np.ndarray) -> float:
    """Root of the largest eigenvalue of the Gram matrix of the shorter side."""
    gram = x.T @ x if x.shape[0] >= x.shape[1] else x @ x.T
    return float(np.sqrt(max(np.linalg.eigvalsh(gram)[-1], 0)))


@dataclass(frozen=True)
class Entry:
    """A set, and the norm that bounds it."""

    name: str
    make: Callable[[float | Tensor], ComponentManifold]
    norm: Callable[[np.ndarray], float]

    def __str__(self) -> str:
        return self.name


def _ball(radius: float | Tensor = 1.0) -> Ball:
    return Ball(radius, ndim=2)


BALLS = [Entry("ball", _ball, frobenius), Entry("spectral ball", SpectralBall, spectral)]
ENTRIES = [*BALLS, Entry("spectral sphere", SpectralSphere, spectral)]
every_ball = pytest.mark.parametrize("entry", BALLS, ids=str)
every_entry = pytest.mark.parametrize("entry", ENTRIES, ids=str)


@dataclass(frozen=True)
class Case:
    shape: tuple[int, int]
    radius: float
    seed: int

    def gaussians(self, count: int, scale: float = 1.0) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        return self.radius * scale * torch.randn(count, *self.shape, dtype=torch.float64, generator=generator)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    shape = (draw(st.integers(1, 6)), draw(st.integers(1, 6)))
    if shape == (1, 1):
        shape = (2, 1)
    return Case(shape, draw(st.sampled_from([1.0, 0.05, 30.0])), draw(st.integers(0, 2**31)))


def close(actual: Tensor, expected: Tensor, radius: float, factor: float = 64) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=factor * torch.finfo(actual.dtype).eps * radius)


# -- projections -------------------------------------------------------------------------------------------------


@every_entry
@given(case=cases(), scale=st.sampled_from([0.1, 1.0, 10.0]))
def test_projections_reach_the_set_and_stay(entry: Entry, case: Case, scale: float) -> None:
    manifold, z = entry.make(case.radius), case.gaussians(5, scale)
    p = manifold.projx(z)
    for before, after in zip(z.numpy(), p.numpy(), strict=True):
        norm = entry.norm(after) / case.radius
        assert norm <= 1 + 1e-12
        if entry.norm(before) >= case.radius or entry.name == "spectral sphere":
            assert norm >= 1 - 1e-12
    close(manifold.projx(p), p, case.radius)
    assert float(manifold.violation(p).max()) <= 1e-14
    assert manifold.violation(p).shape == (5,)


@every_ball
@given(case=cases(), scale=st.sampled_from([0.3, 1.0, 5.0]))
def test_the_projection_onto_a_ball_is_that_of_a_convex_set(entry: Entry, case: Case, scale: float) -> None:
    """Nearest is the p with <z - p, q - p> <= 0 for all q of the set. Projections bring no points farther apart."""
    manifold, z = entry.make(case.radius), case.gaussians(20, scale)
    p = manifold.projx(z)
    inside = torch.tensor([entry.norm(x) <= case.radius * (1 - 1e-12) for x in z.numpy()])
    assert torch.equal(p[inside], z[inside])
    for q in (manifold.random(20, *case.shape, dtype=torch.float64), -p, p.flip(0)):
        products = ((z - p) * (q - p)).sum((-2, -1))
        assert float(products.max()) <= 1e-11 * case.radius**2 * max(1, scale)
    apart, before = (t[1:] - t[:-1] for t in (p, z))
    assert bool((apart.flatten(1).norm(dim=1) <= before.flatten(1).norm(dim=1) * (1 + 1e-12)).all())


@given(case=cases(), scale=st.sampled_from([0.01, 0.3, 1.0, 5.0]))
def test_the_projection_onto_the_spectral_sphere_is_nearest(case: Case, scale: float) -> None:
    """No nearer than the gap of the norms is possible (von Neumann), and clipping is nearest in the ball."""
    manifold, z = SpectralSphere(case.radius), case.gaussians(10, scale)
    p = manifold.projx(z)
    distance = (z - p).flatten(1).norm(dim=1)
    clipped = (z - SpectralBall(case.radius).projx(z)).flatten(1).norm(dim=1)
    norms = torch.tensor([spectral(x) for x in z.numpy()], dtype=torch.float64)
    expected = torch.where(norms >= case.radius, clipped, case.radius - norms)
    close(distance, expected, case.radius * max(1, scale), factor=1e4)
    others = manifold.random(10, *case.shape, dtype=torch.float64)
    assert bool((distance <= (z - others).flatten(1).norm(dim=1) + 1e-12 * case.radius).all())


@pytest.mark.parametrize("entry", ENTRIES[1:], ids=str)
@given(case=cases(), scale=st.sampled_from([0.3, 1.0, 5.0]))
def test_spectral_projections_turn_with_their_argument(entry: Entry, case: Case, scale: float) -> None:
    manifold, z = entry.make(case.radius), case.gaussians(5, scale)
    left, right = (torch.linalg.qr(torch.randn(n, n, dtype=torch.float64)).Q for n in case.shape)
    close(manifold.projx(left @ z @ right), left @ manifold.projx(z) @ right, case.radius, factor=1e5)


@every_entry
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [0.0, 1e-40, 1e-20, 1e20, 1e30])
def test_projections_of_zero_tiny_and_huge_matrices(entry: Entry, dtype: torch.dtype, size: float) -> None:
    manifold = entry.make(0.5)
    z = (size * torch.randn(4, 5, 3, generator=torch.Generator().manual_seed(0)).double()).to(dtype).nan_to_num()
    p = manifold.projx(z)
    assert p.dtype == dtype
    assert bool(p.isfinite().all())
    assert float(manifold.violation(p).max()) <= 16 * torch.finfo(dtype).eps


def test_known_projections() -> None:
    x = torch.diag(torch.tensor([4.0, 3.0, 0.5]))
    torch.testing.assert_close(_ball(1.0).projx(torch.tensor([[3.0], [4.0]])), torch.tensor([[0.6], [0.8]]))
    torch.testing.assert_close(SpectralBall(2.0).projx(x), torch.diag(torch.tensor([2.0, 2.0, 0.5])))
    torch.testing.assert_close(SpectralSphere(2.0).projx(x), torch.diag(torch.tensor([2.0, 2.0, 0.5])))
    torch.testing.assert_close(SpectralSphere(5.0).projx(x), torch.diag(torch.tensor([5.0, 3.0, 0.5])))
    zero = SpectralSphere(2.0).projx(torch.zeros(3, 2))
    assert torch.linalg.svdvals(zero).tolist() == [2.0, 0.0]


@every_entry
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_projections_refuse_what_is_not_finite(entry: Entry, bad: float) -> None:
    z = torch.ones(2, 3, 3)
    z[1, 0, 0] = bad
    with pytest.raises(ValueError, match=rf"the argument of {entry.make(1.0).name}.projx has 1 non-finite entry of 18"):
        entry.make(1.0).projx(z)


@every_entry
def test_every_component_has_its_radius(entry: Entry) -> None:
    radii = torch.tensor([0.5, 2.0, 8.0], dtype=torch.float64)
    z = 10 * torch.randn(3, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    p, y = entry.make(radii).projx(z), entry.make(radii).retr(z, z)
    for radius, before, one, other in zip(radii.tolist(), z, p, y, strict=True):
        torch.testing.assert_close(one, entry.make(radius).projx(before))
        torch.testing.assert_close(other, entry.make(radius).retr(before, before))
    assert float(entry.make(radii).violation(p).max()) <= 1e-14


@every_entry
def test_violation_is_the_relative_excess(entry: Entry) -> None:
    manifold = entry.make(2.0)
    border = manifold.projx(100 * torch.randn(4, 3, 3, dtype=torch.float64))
    torch.testing.assert_close(manifold.violation(1.5 * border), torch.full((4,), 0.5, dtype=torch.float64))
    expected = 0.5 if entry.name == "spectral sphere" else 0.0
    torch.testing.assert_close(manifold.violation(0.5 * border), torch.full((4,), expected, dtype=torch.float64))


# -- steps -------------------------------------------------------------------------------------------------------


@every_ball
@given(case=cases())
def test_inside_a_ball_space_is_euclidean(entry: Entry, case: Case) -> None:
    manifold, euclidean = entry.make(case.radius), geoopt.Euclidean(ndim=2)
    x, u, v = (0.5 * manifold.random(4, *case.shape, dtype=torch.float64).as_subclass(Tensor) for _ in range(3))
    for method, arguments in {
        "proju": (x, u),
        "egrad2rgrad": (x, u),
        "inner": (x, u, v),
        "retr": (x, u),
        "expmap": (x, u),
        "logmap": (x, v),
        "dist": (x, v),
        "transp": (x, v, u),
    }.items():
        close(getattr(manifold, method)(*arguments), getattr(euclidean, method)(*arguments), max(1, case.radius) ** 2)


@every_ball
@given(case=cases())
def test_beyond_the_border_a_step_is_projected(entry: Entry, case: Case) -> None:
    manifold = entry.make(case.radius)
    x = manifold.random(4, *case.shape, dtype=torch.float64).as_subclass(Tensor)
    u = case.gaussians(4, 3.0)
    for end in (manifold.retr(x, u), manifold.expmap(x, u), manifold.retr_transp(x, u, u)[0]):
        close(end, manifold.projx(x + u), case.radius)
    assert torch.equal(manifold.retr_transp(x, u, u)[1], u)


@given(case=cases())
def test_directions_on_the_spectral_sphere_keep_the_norm_to_first_order(case: Case) -> None:
    """Where the largest singular value is simple; the gradient of the norm comes from automatic differentiation."""
    manifold = SpectralSphere(case.radius)
    x = manifold.random(4, *case.shape, dtype=torch.float64).as_subclass(Tensor)
    values = torch.linalg.svdvals(x)
    if values.shape[-1] > 1:  # pull the others in: random points are clipped, and have several at the border
        u, s, vh = torch.linalg.svd(x, full_matrices=False)
        s = torch.cat([s[:, :1], 0.8 * s[:, 1:]], 1)
        x = (u * s[:, None, :]) @ vh
    point = x.clone().requires_grad_()
    torch.linalg.matrix_norm(point, 2).sum().backward()
    gradient = torch.as_tensor(point.grad)
    u = case.gaussians(4)
    tangent = manifold.proju(x, u)
    close((tangent * gradient).sum((-2, -1)), torch.zeros(4, dtype=torch.float64), case.radius, factor=1e4)
    along = u - tangent
    close(along, gradient * (u * gradient).sum((-2, -1), keepdim=True), case.radius, factor=1e4)
    # a retraction of second order: half the step leaves an eighth of what the norm of x + u exceeds it by
    errors = []
    for step in (1e-2, 5e-3):
        end = manifold.retr(x, step * tangent)
        errors.append(float((end - (x + step * tangent)).norm()) / case.radius)
    assert errors[1] <= 0.3 * errors[0] + 1e-12


def test_random_points_of_the_ball_are_uniform() -> None:
    """The share of points within radius t is t^n (Kolmogorov-Smirnov), and their mean is zero."""
    x = Ball(3.0).random(20_000, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).as_subclass(Tensor)
    shares = ((x.norm(dim=1) / 3) ** 4).sort().values
    expected = torch.arange(1, len(x) + 1, dtype=torch.float64) / len(x)
    assert float((shares - expected).abs().max()) <= 1.63 / math.sqrt(len(x))  # one false alarm in a hundred
    assert float(x.mean(0).abs().max()) <= 0.05


def test_errors_name_the_object() -> None:
    with pytest.raises(ValueError, match="Ball: ndim must be a positive integer, got 0"):
        Ball(ndim=0)
    with pytest.raises(ValueError, match="Ball: radius must be positive"):
        Ball(-1.0)
    with pytest.raises(ValueError, match="the sphere of a 1 x 1 matrix is two isolated points"):
        SpectralSphere().random(3, 1, 1)
    assert repr(Ball(2.0, ndim=2)) == "Ball(radius=2, ndim=2) manifold"


def test_the_bound_on_the_curvature_is_zero() -> None:
    assert Ball(0.1).curvature_bound == 0
    assert torch.equal(torch.as_tensor(SpectralBall(torch.ones(2)).curvature_bound), torch.zeros(2))


# -- as kinds ----------------------------------------------------------------------------------------------------

KINDS = ("ball", "spectral_ball", "spectral_sphere")
every_kind = pytest.mark.parametrize("kind", KINDS)


@every_kind
@pytest.mark.parametrize("shape", [(3, 3), (5, 2)])
def test_norms_at_radius_one(kind: str, shape: tuple[int, int]) -> None:
    bounds = manifold_norm_bounds(kind, *shape)
    unit = kinds.kind(kind).build(1.0)
    points = unit.projx(5 * torch.randn(500, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    found = matrix_norms(points)
    for values, bound in zip(found, bounds, strict=True):
        assert bool((values <= bound * (1 + 1e-12)).all())
        assert float(values.max()) >= 0.75 * float(bound)


def test_the_former_name_of_the_spectral_ball() -> None:
    assert collection(4, 4, "layer", "spectral").kinds == ("spectral_ball",)
    assert manifold_norm_bounds("spectral", 3, 3) == manifold_norm_bounds("spectral_ball", 3, 3)


def weight_on(kind: str, components: str, radius: float) -> Any:
    manifold = ProductOfGroups(collection(8, 6, "pio", (kind, "sphere"), components=components), (8, 6, 3, 3), radius)
    start = manifold.random(8, 6, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return geoopt.ManifoldParameter(start.detach().as_subclass(Tensor), manifold=manifold)


@every_kind
@pytest.mark.parametrize("components", ["kernel", "block", "filter"])
@pytest.mark.parametrize("path", ["auto", "reference"])
def test_steps_stay_in_the_set(kind: str, components: str, path: Any) -> None:
    weight = weight_on(kind, components, 0.7)
    optimizer = RiemannianFGSGD([weight], lr=0.5, momentum=0.9, weight_decay=0.1)
    with kernels.use_path(path):
        for seed in range(4):
            weight.grad = torch.randn(weight.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
            optimizer.step()
            assert float(weight.manifold.violation(weight.detach()).max()) <= 1e-12


@pytest.mark.parametrize("kind", KINDS[:2])
@pytest.mark.parametrize("update", ["retraction", "exponential"])
def test_in_a_large_ball_the_optimiser_is_sgd(kind: str, update: Any) -> None:
    """With constant steps, and without weight decay, which has no effect in a ball."""
    manifold = ProductOfGroups(collection(6, 5, "layer", kind), (6, 5, 3, 3), 100.0)
    start = torch.randn(6, 5, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    own = geoopt.ManifoldParameter(start.clone(), manifold=manifold)
    plain = nn.Parameter(start.clone())
    optimizers = [
        RiemannianFGSGD([own], lr=0.1, momentum=0.9, step_size="constant", update=update, weight_decay=0.1),
        torch.optim.SGD([plain], lr=0.1, momentum=0.9),
    ]
    for seed in range(3):
        for param, optimizer in zip((own, plain), optimizers, strict=True):
            generator = torch.Generator().manual_seed(seed)
            param.grad = torch.randn(start.shape, dtype=torch.float64, generator=generator)
            optimizer.step()
    torch.testing.assert_close(own.detach().as_subclass(Tensor), plain.detach(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("optimizer", [geoopt.optim.RiemannianSGD, geoopt.optim.RiemannianAdam])
@every_kind
def test_geoopts_optimisers_stay_in_the_set(kind: str, optimizer: Any) -> None:
    weight = weight_on(kind, "kernel", 0.7)
    steps = optimizer([weight], lr=0.3)
    for seed in range(3):
        weight.grad = torch.randn(weight.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        steps.step()
        assert float(weight.manifold.violation(weight.detach()).max()) <= 1e-12


@every_kind
@pytest.mark.parametrize("components", ["auto", "filter"])
@pytest.mark.parametrize("radius", ["kaiming", "bound", 0.5])
def test_a_model_is_constrained_and_reported(kind: str, components: Any, radius: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3), nn.Flatten(), nn.Linear(96, 8), nn.Linear(8, 4))
    bound = 2.0 if radius == "bound" else None
    plan = fgo_geo.constrain(model, "pio", (kind, "sphere"), components=components, radius=radius, bound=bound)
    assert Plan.from_json(plan.to_json()).entries == plan.entries
    optimizer = RiemannianFGSGD(model.named_parameters(), lr=1e-2, momentum=0.9)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(4, 3, 8, 8)).square().mean().backward()
        optimizer.step()
    report = fgo_geo.report(model)
    for layer in report.layers[1:3]:
        assert kind in layer.manifolds
        assert layer.feasible
        if radius == "bound":
            assert all(float(norm.max()) <= 2 * (1 + 1e-5) for norm in layer.groups)


def test_a_network_of_spectral_balls_has_a_lipschitz_constant() -> None:
    """The product of the radii bounds how far outputs are apart, however the weights are trained."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 9), nn.ReLU(), nn.Linear(9, 4))
    fgo_geo.constrain(model, "layer", "spectral_ball", radius=0.9, classifier=True)
    optimizer = RiemannianFGSGD(model.named_parameters(), lr=0.5, momentum=0.9, step_size="constant")
    x, y = torch.randn(2, 64, 6)
    for _ in range(20):  # ascend on the distance of the outputs
        optimizer.zero_grad()
        (-(model(x) - model(y)).norm(dim=1).mean()).backward()
        optimizer.step()
    ratio = (model(x) - model(y)).norm(dim=1) / (x - y).norm(dim=1)
    assert float(ratio.detach().max()) <= 0.9**3 * (1 + 1e-5)
    assert float(torch.linalg.matrix_norm(model[2].weight.detach(), 2)) >= 0.9 * (1 - 1e-5)


@every_kind
def test_renormalisation_bounds_the_norms(kind: str) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 6, 3)
    fgo_geo.renormalize(layer, manifold=kind, groups="layer", bound=2.0)
    nn.init.normal_(layer.parametrizations.weight.original, std=10.0)
    (components,) = fgo_geo.models.renormalize.renormalization_of(layer).partition.split(layer.weight.detach())
    group = torch.cat(tuple(components), 1)
    assert all(float(norm) <= 2 * (1 + 1e-5) for norm in matrix_norms(group))
    layer.weight.square().sum().backward()
    assert bool(layer.parametrizations.weight.original.grad.isfinite().all())
    with torch.no_grad():
        layer.parametrizations.weight.original.zero_()
    zero = torch.linalg.matrix_norm(layer.weight.detach(), 2)
    assert bool((zero > 0).all()) if kind == "spectral_sphere" else bool((zero == 0).all())
