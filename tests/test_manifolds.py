"""The laws of the component manifolds, over every entry of ``strategies.ENTRIES``."""

from __future__ import annotations

import copy
import io
import itertools
import math
import pickle
from collections.abc import Callable
from typing import Any

import geoopt
import numpy as np
import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import ENTRIES, Case, Entry, any_case, cases
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import fgo_geo
from fgo_geo import Oblique, ScaledSphere, Stiefel
from fgo_geo.linalg import newton_schulz_schedule
from fgo_geo.manifolds import ComponentManifold

every_entry = pytest.mark.parametrize("entry", ENTRIES, ids=str)
# The last entry differs in its retraction alone.
every_geometry = pytest.mark.parametrize("entry", ENTRIES[:-1], ids=str)
HALF = [torch.float16, torch.bfloat16]
SPHERICAL = ENTRIES[:3]

# Every public method: its arguments (a: any tensor, x: point, y: point nearby, u: step, v: tangent vector, b: bound
# on the step) and, for every result, the power of the radius that it scales with.
METHODS: dict[str, tuple[str, str]] = {
    "violation": ("x", "0"),
    "projx": ("a", "1"),
    "proju": ("xa", "1"),
    "egrad2rgrad": ("xa", "1"),
    "inner": ("xuv", "2"),
    "component_inner": ("xuv", "2"),
    "norm": ("xu", "1"),
    "retr": ("xu", "1"),
    "retract_bounded": ("xub", "1"),
    "expmap": ("xu", "1"),
    "logmap": ("xy", "1"),
    "dist": ("xy", "1"),
    "dist2": ("xy", "2"),
    "transp": ("xyv", "1"),
    "transp_follow_retr": ("xuv", "1"),
    "transp_follow_expmap": ("xuv", "1"),
    "retr_transp": ("xuv", "11"),
    "expmap_transp": ("xuv", "11"),
}
every_method = pytest.mark.parametrize("method", METHODS)


def arguments(case: Case, method: str) -> tuple[Any, ...]:
    x = case.point()
    values = {"x": x, "y": case.manifold.expmap(x, case.tangent(x, 0.9)), "b": 1.5}
    values |= {"a": case.ambient(), "u": case.tangent(x, 1.2), "v": case.tangent(x)}
    return tuple(values[letter] for letter in METHODS[method][0])


def results(manifold: geoopt.Manifold, method: str, args: tuple[Any, ...]) -> tuple[Tensor, ...]:
    result = getattr(manifold, method)(*args)
    return result if isinstance(result, tuple) else (result,)


def fixed(entry: Entry, *shape: int, radius: float | Tensor = 1.0, dtype: torch.dtype = torch.float64) -> Case:
    """A case without Hypothesis; the sphere's component is the last dimension, all others' the last two."""
    ndim = entry.make(1.0).ndim
    return Case(entry, shape[:-ndim], shape[-ndim:], radius, dtype, seed=0)


# -- points ------------------------------------------------------------------------------------------------------


@every_geometry
@given(data=st.data())
def test_projx_reaches_the_manifold_and_stays(entry: Entry, data: st.DataObject) -> None:
    case = data.draw(cases(entry))
    p = case.manifold.projx(case.ambient())
    for radius, (component,) in case.components(p):
        assert entry.oracle.violation(component, radius) <= 32 * case.eps
    assert case.manifold.violation(p).shape == case.batch
    assert float(case.manifold.violation(p).max()) <= 32 * case.eps
    case.close(case.manifold.projx(p), p)


@every_geometry
@given(data=st.data(), step=st.sampled_from([1e-3, 0.1, 1.0, 3.0]))
def test_projx_is_the_nearest_point(entry: Entry, data: st.DataObject, step: float) -> None:
    case = data.draw(cases(entry, torch.float64))
    z = case.ambient()
    p = case.manifold.projx(z)
    for radius, (a, b) in case.components(z, p):
        if np.linalg.cond(np.atleast_2d(a)) < 1e3:
            np.testing.assert_allclose(b, entry.oracle.nearest(a, radius), rtol=0, atol=1e-9 * radius)
    distance = torch.linalg.vector_norm((z - p).flatten(len(case.batch)), dim=-1)
    for other in (case.point(), case.manifold.expmap(p, case.tangent(p, step))):
        further = torch.linalg.vector_norm((z - other).flatten(len(case.batch)), dim=-1)
        assert bool((distance <= further * (1 + 1e-12)).all())


@every_geometry
@given(data=st.data())
def test_violation_is_the_largest_residual_of_the_constraint(entry: Entry, data: st.DataObject) -> None:
    case = data.draw(cases(entry, torch.float64))
    off = case.point() * (1 + 1e-3 * case.gaussian())
    for (radius, (component,)), found in zip(case.components(off), case.manifold.violation(off).flatten(), strict=True):
        residual = entry.oracle.violation(component, radius)
        # Spheres report the deviation of the norm, half of that of its square.
        expected = residual if entry.oracle is oracles.STIEFEL else 1 - math.sqrt(1 - residual)
        assert float(found) == pytest.approx(expected, rel=2e-2 if entry.oracle is not oracles.STIEFEL else 1e-9)


def test_violation_sees_columns_that_are_not_orthogonal() -> None:
    x = torch.tensor([[2.0, 1.2], [0.0, 1.6]])
    assert float(Oblique(2.0).violation(x)) == pytest.approx(0, abs=1e-6)
    assert float(Stiefel(2.0).violation(x)) == pytest.approx(0.6)


@every_geometry
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALF])
@pytest.mark.parametrize("size", [0.0, 1e-40, 1e-30, 1e30])
@pytest.mark.parametrize("rows", [3, 4])
def test_projx_of_zero_tiny_and_huge_components(entry: Entry, dtype: torch.dtype, size: float, rows: int) -> None:
    case = fixed(entry, 2, rows, 3, radius=0.5, dtype=dtype)
    z = (size * case.gaussian().double()).to(dtype).nan_to_num()  # float16 ends at 65504
    p = case.manifold.projx(z)
    assert bool(p.isfinite().all())
    assert float(case.manifold.violation(p).max()) <= 16 * case.eps


@every_entry
def test_projx_where_some_components_are_zero(entry: Entry) -> None:
    case = fixed(entry, 3, 4, 3)
    z = case.ambient()
    expected = case.manifold.projx(z)
    z[1] = 0
    p = case.manifold.projx(z)
    assert torch.equal(p[::2], expected[::2])
    assert float(case.manifold.violation(p).max()) <= 16 * case.eps


def test_zero_goes_to_the_first_basis_vector() -> None:
    assert ScaledSphere(2.0).projx(torch.zeros(3)).tolist() == [2.0, 0.0, 0.0]
    assert ScaledSphere(2.0, ndim=2).projx(torch.zeros(2, 2)).tolist() == [[2.0, 0.0], [0.0, 0.0]]
    columns = torch.tensor([[0.0, 3.0], [0.0, 4.0]])
    torch.testing.assert_close(Oblique(2.0).projx(columns), torch.tensor([[2.0, 1.2], [0.0, 1.6]]))


@every_entry
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_projx_refuses_what_is_not_finite(entry: Entry, bad: float) -> None:
    case = fixed(entry, 2, 4, 3)
    z = case.ambient()
    z[0, 1, 2] = bad
    name = case.manifold.name
    with pytest.raises(ValueError, match=rf"the argument of {name}.projx has 1 non-finite entry of 24"):
        case.manifold.projx(z)


@every_geometry
@given(data=st.data())
def test_origin_is_one_fixed_point(entry: Entry, data: st.DataObject) -> None:
    case = data.draw(cases(entry))
    origin = case.manifold.origin(*case.shape, dtype=case.dtype)
    assert isinstance(origin, geoopt.ManifoldTensor)
    assert origin.manifold is case.manifold
    assert origin.dtype == case.dtype
    assert origin.shape == case.shape
    assert float(case.manifold.violation(origin).max()) <= 4 * case.eps
    assert torch.equal(origin, case.manifold.origin(case.shape, dtype=case.dtype, seed=None))
    unit = (origin / case.r).reshape(-1, *case.component)
    torch.testing.assert_close(unit, unit[:1].expand_as(unit), rtol=0, atol=4 * case.eps)


def test_origins() -> None:
    assert ScaledSphere(2.0).origin(3).tolist() == [2.0, 0.0, 0.0]
    assert Oblique(2.0).origin(2, 3).tolist() == [[2.0, 0.0, 2.0], [0.0, 2.0, 0.0]]
    assert Stiefel(2.0).origin(3, 2).tolist() == [[2.0, 0.0], [0.0, 2.0], [0.0, 0.0]]


# -- random points -----------------------------------------------------------------------------------------------


@every_geometry
@given(data=st.data())
def test_random_points_are_points_and_reproducible(entry: Entry, data: st.DataObject) -> None:
    case = data.draw(cases(entry))

    def draw(random: Callable[..., geoopt.ManifoldTensor], *size: Any) -> geoopt.ManifoldTensor:
        return random(*size, dtype=case.dtype, device="cpu", generator=torch.Generator().manual_seed(case.seed))

    x = draw(case.manifold.random, *case.shape)
    assert isinstance(x, geoopt.ManifoldTensor)
    assert x.manifold is case.manifold
    assert x.dtype == case.dtype
    assert x.shape == case.shape
    assert float(case.manifold.violation(x).max()) <= 32 * case.eps
    assert torch.equal(x, draw(case.manifold.random, case.shape))
    assert torch.equal(x, draw(case.manifold.random_uniform, torch.Size(case.shape)))
    assert not torch.equal(x, case.manifold.random(case.shape, dtype=case.dtype, generator=case.generator) * 0 + 1)


@every_entry
def test_random_uses_the_global_generator_and_the_default_type(entry: Entry) -> None:
    manifold = entry.make(1.0)
    torch.manual_seed(7)
    first = manifold.random(4, 3)
    torch.manual_seed(7)
    assert torch.equal(first, manifold.random(4, 3))
    assert not torch.equal(first, manifold.random(4, 3))
    assert first.dtype == torch.get_default_dtype()


def kolmogorov_smirnov(values: Tensor) -> float:
    """Distance from the uniform distribution on [-1, 1], times the root of the number of values."""
    values = values.flatten().sort().values
    steps = torch.arange(values.numel() + 1, dtype=values.dtype) / values.numel()
    cdf = (values + 1) / 2
    return float(torch.maximum((cdf - steps[:-1]).max(), (steps[1:] - cdf).max())) * math.sqrt(values.numel())


@pytest.mark.parametrize(
    ("manifold", "component"),
    [
        (ScaledSphere(2.0), (3,)),
        (ScaledSphere(2.0, ndim=2), (1, 3)),
        (Oblique(2.0), (3, 2)),
        (Stiefel(2.0), (3, 1)),
        (Stiefel(2.0), (3, 2)),
        (Stiefel(2.0), (3, 3)),
    ],
    ids=str,
)
def test_columns_in_three_dimensions_are_uniform(manifold: ComponentManifold, component: tuple[int, ...]) -> None:
    # In three dimensions a coordinate of a uniform unit vector is uniform on [-1, 1] (Archimedes), in every basis.
    generator = torch.Generator().manual_seed(1)
    x = manifold.random(4000, *component, dtype=torch.float64, generator=generator).as_subclass(Tensor) / 2
    vectors = x.mT if component[0] == 3 and len(component) == 2 else x.reshape(4000, 1, 3)
    rotation = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64, generator=generator)).Q
    for vector in vectors.unbind(1):
        for coordinate in (*vector.unbind(1), *(vector @ rotation).unbind(1)):
            assert kolmogorov_smirnov(coordinate) < 1.95  # exceeded by one draw in a thousand


@pytest.mark.parametrize(
    ("manifold", "component", "dimension"),
    [
        (ScaledSphere(2.0), (6,), 6),
        (ScaledSphere(2.0, ndim=2), (4, 3), 12),
        (Oblique(2.0), (4, 3), 4),
        (Stiefel(2.0), (4, 3), 4),
        (Stiefel(2.0), (3, 3), 3),
    ],
    ids=str,
)
def test_moments_of_the_uniform_measure(
    manifold: ComponentManifold, component: tuple[int, ...], dimension: int
) -> None:
    n = 4000
    generator = torch.Generator().manual_seed(2)
    x = manifold.random(n, *component, dtype=torch.float64, generator=generator).as_subclass(Tensor).flatten(1)
    bound = 4 * 2 / math.sqrt(dimension * n)
    assert float(x.mean(0).abs().max()) < bound
    second = x.mT @ x / n
    assert float((second - 4 / dimension * torch.eye(x.shape[1])).abs().max()) < 4 * bound


def test_square_stiefel_points_have_either_determinant() -> None:
    x = Stiefel().random(1000, 3, 3, generator=torch.Generator().manual_seed(3))
    assert abs(float(torch.linalg.det(x).mean())) < 0.1


# -- tangent vectors ---------------------------------------------------------------------------------------------


@every_geometry
@given(data=st.data())
def test_proju_is_the_orthogonal_projection(entry: Entry, data: st.DataObject) -> None:
    case = data.draw(cases(entry))
    manifold, x, a, b = case.manifold, case.point(), case.ambient(), case.ambient()
    u, v = manifold.proju(x, a), manifold.proju(x, b)
    for radius, (at, ambient, tangent) in case.components(x, a, u):
        expected = entry.oracle.tangent(at, ambient)
        np.testing.assert_allclose(tangent, expected, rtol=0, atol=256 * case.eps * radius)
    case.close(manifold.proju(x, u), u)
    case.close(manifold.inner(x, u, b), manifold.inner(x, a, v), degree=2)
    case.close(manifold.inner(x, a - u, v), torch.zeros(case.batch), degree=2, factor=128)
    case.assert_tangent(x, u)


@every_entry
@given(data=st.data())
def test_riemannian_gradient_represents_the_differential(entry: Entry, data: st.DataObject) -> None:
    case = data.draw(cases(entry, torch.float64))
    manifold, x = case.manifold, case.point()
    u, weight = case.tangent(x), case.gaussian()

    def value(at: Tensor) -> Tensor:
        return (weight * torch.sin(at / case.r)).sum()

    at = x.clone().requires_grad_()
    (egrad,) = torch.autograd.grad(value(at), at)
    gradient = manifold.egrad2rgrad(x, egrad)
    case.assert_tangent(x, gradient * case.r**2)
    h = 1e-4
    for move in (manifold.retr, manifold.expmap):
        slope = (value(move(x, h * u)) - value(move(x, -h * u))) / (2 * h)
        torch.testing.assert_close(manifold.inner(x, gradient, u).sum(), slope, rtol=1e-6, atol=1e-6)


@every_geometry
@given(data=st.data())
def test_metric_is_the_euclidean_one_per_component(entry: Entry, data: st.DataObject) -> None:
    case = data.draw(cases(entry))
    manifold, x = case.manifold, case.point()
    u, v = case.tangent(x), case.tangent(x, 2.0)
    expected = torch.tensor([np.vdot(a, b) for _, (a, b) in case.components(u, v)]).reshape(case.batch)
    case.close(manifold.inner(x, u, v), expected, degree=2)
    case.close(manifold.inner(x, u), manifold.norm(x, u) ** 2, degree=2)
    case.close(manifold.norm(x, v), 2 * case.r.reshape(case.batch))
    assert torch.equal(manifold.component_inner(x, u, v), manifold.inner(x, u, v, keepdim=True))


@every_entry
@pytest.mark.parametrize("method", ["inner", "norm", "dist", "dist2"])
def test_keepdim(entry: Entry, method: str) -> None:
    case = fixed(entry, 2, 3, 4, 3)
    x = case.point()
    second = case.manifold.expmap(x, case.tangent(x)) if method.startswith("dist") else case.tangent(x)
    value = getattr(case.manifold, method)(x, second)
    kept = getattr(case.manifold, method)(x, second, keepdim=True)
    assert value.shape == case.batch
    assert kept.shape == case.batch + (1,) * len(case.component)
    assert torch.equal(kept.reshape(case.batch), value)


# -- retraction, exponential map, logarithm, distance ------------------------------------------------------------


@every_entry
@given(data=st.data(), length=st.floats(0, 50))
def test_steps_end_on_the_manifold(entry: Entry, data: st.DataObject, length: float) -> None:
    case = data.draw(cases(entry))
    x = case.point()
    u = case.tangent(x, length)
    for move in (case.manifold.retr, case.manifold.expmap):
        assert float(case.manifold.violation(move(x, u)).max()) <= 64 * case.eps
        case.close(move(x, 0 * u), x)


@every_entry
@given(data=st.data())
def test_retraction_against_the_oracle(entry: Entry, data: st.DataObject) -> None:
    case = data.draw(cases(entry, torch.float64))
    x = case.point()
    u = case.tangent(x, 2.0)
    for radius, (at, step, end) in case.components(x, u, case.manifold.retr(x, u)):
        np.testing.assert_allclose(end, entry.retract(at + step, radius), rtol=0, atol=1e-12 * radius)


@every_entry
@given(data=st.data())
def test_retraction_leaves_the_geodesic_at_its_order(entry: Entry, data: st.DataObject) -> None:
    case = data.draw(cases(entry, torch.float64))
    x = case.point()
    u = case.tangent(x)
    steps = 2.0 ** -torch.arange(3, 8, dtype=torch.float64)
    errors = []
    for t in steps:
        gap = case.manifold.dist(case.manifold.retr(x, t * u), case.manifold.expmap(x, t * u))
        errors.append(float((gap / case.r.reshape(case.batch)).max()))
    assert errors[0] <= steps[0] ** (entry.error_order - 0.5)
    if errors[-1] > 1e-12:
        slope = np.polyfit(steps.log().numpy(), np.log(errors), 1)[0]
        assert slope > entry.error_order - 0.1


def test_order_of_the_retractions_is_not_higher() -> None:
    for manifold, order in ((Stiefel(), 3), (Stiefel(retraction="qr"), 2), (ScaledSphere(ndim=2), 3)):
        x = manifold.origin(4, 3, dtype=torch.float64)
        u = manifold.proju(x, torch.linspace(-1, 1, 12, dtype=torch.float64).cos().reshape(4, 3))
        errors = [float((manifold.retr(x, t * u) - manifold.expmap(x, t * u)).norm()) for t in (0.02, 0.01)]
        assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.05)


@every_geometry
@settings(max_examples=10)
@given(data=st.data(), length=st.floats(0.01, 2.5))
def test_exponential_map_against_the_geodesic_equation(entry: Entry, data: st.DataObject, length: float) -> None:
    case = data.draw(cases(entry, torch.float64))
    x = case.point()
    u, v = case.tangent(x, length), case.tangent(x)
    y, carried = case.manifold.expmap_transp(x, u, v)
    radius, (at, velocity, vector, end, transported) = case.components(x, u, v, y, carried)[-1]
    expected, in_parallel = entry.oracle.geodesic(at, velocity, vector)
    np.testing.assert_allclose(end, expected, rtol=0, atol=1e-7 * radius)
    if entry.parallel:
        np.testing.assert_allclose(transported, in_parallel, rtol=0, atol=1e-7 * radius)
    else:
        np.testing.assert_allclose(transported, entry.oracle.tangent(end, vector), rtol=0, atol=1e-12 * radius)


@every_geometry
@given(data=st.data(), length=st.floats(0, 2.5))
def test_exp_log_and_dist_agree(entry: Entry, data: st.DataObject, length: float) -> None:
    case = data.draw(cases(entry))
    manifold, x = case.manifold, case.point()
    u = case.tangent(x, length)
    y = manifold.expmap(x, u)
    log = manifold.logmap(x, y)
    # Errors of the end point reach the logarithm enlarged by t / sin(t) at most.
    enlarged = 64 * length / math.sin(length) if length > 0 else 64
    case.close(log, u, factor=enlarged)
    case.close(manifold.expmap(x, log), y)
    case.assert_tangent(x, log)
    distance = manifold.dist(x, y)
    case.close(distance, length * case.r.reshape(case.batch), factor=enlarged)
    case.close(distance, manifold.norm(x, log), factor=enlarged)
    case.close(manifold.dist(y, x), distance, factor=enlarged)
    case.close(manifold.dist2(x, y), distance**2, degree=2, factor=enlarged)


@every_geometry
@given(data=st.data())
def test_geodesics_have_constant_speed(entry: Entry, data: st.DataObject) -> None:
    case = data.draw(cases(entry, torch.float64))
    manifold, x = case.manifold, case.point()
    u = case.tangent(x, 2.0)
    points = [manifold.expmap(x, t * u) for t in torch.linspace(0, 1, 5, dtype=torch.float64)]
    for first, second in itertools.pairwise(points):
        case.close(manifold.dist(first, second), 0.5 * case.r.reshape(case.batch), factor=256)


@every_geometry
@given(data=st.data())
def test_distance_is_a_metric(entry: Entry, data: st.DataObject) -> None:
    case = data.draw(cases(entry))
    manifold, x = case.manifold, case.point()
    y = manifold.expmap(x, case.tangent(x, 1.0))
    z = manifold.expmap(y, case.tangent(y, 1.2))
    assert torch.equal(manifold.dist(x, x), torch.zeros(case.batch, dtype=case.dtype))
    slack = 64 * case.eps * case.r.reshape(case.batch)
    assert bool((manifold.dist(x, z) <= manifold.dist(x, y) + manifold.dist(y, z) + slack).all())
    case.close(manifold.dist(x, z), manifold.dist(z, x), factor=256)


@pytest.mark.parametrize("entry", SPHERICAL, ids=str)
@given(data=st.data(), gap=st.sampled_from([10.0, 1e-2, 1e-6]), side=st.sampled_from([1, -1]))
def test_spherical_distance_is_the_angle_to_fifty_digits(
    entry: Entry, data: st.DataObject, gap: float, side: int
) -> None:
    case = data.draw(cases(entry))
    x = case.point()
    y = case.manifold.projx(side * x + gap * case.ambient())  # anywhere, close by, or close to the antipode
    distances = case.manifold.dist(x, y).flatten()
    for (radius, (a, b)), distance in zip(case.components(x, y), distances, strict=True):
        pairs = zip(a.T, b.T, strict=True) if entry.name == "oblique" else [(a, b)]
        expected = radius * math.hypot(*(oracles.angle(p, q) for p, q in pairs))
        assert float(distance) == pytest.approx(expected, rel=16 * case.eps, abs=4 * case.eps * radius)


@pytest.mark.parametrize("entry", SPHERICAL, ids=str)
@given(data=st.data())
def test_antipodes(entry: Entry, data: st.DataObject) -> None:
    case = data.draw(cases(entry))
    manifold, x = case.manifold, case.point()
    spheres = case.component[-1] if entry.name == "oblique" else 1
    half_turn = math.pi * math.sqrt(spheres) * case.r.reshape(case.batch)
    log = manifold.logmap(x, -x)
    case.close(manifold.dist(x, -x), half_turn, factor=4)
    case.close(manifold.norm(x, log), half_turn, factor=4)
    case.close(manifold.inner(x, x, log), torch.zeros(case.batch), degree=2, factor=64)
    case.close(manifold.expmap(x, log), -x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [2, 3, 1000])
@pytest.mark.parametrize("gap", [0.0, 1e-6, 1e-3])
def test_logarithm_near_the_antipode_is_tangent(dtype: torch.dtype, n: int, gap: float) -> None:
    sphere, generator = ScaledSphere(2.0), torch.Generator().manual_seed(0)
    x = sphere.random(50, n, dtype=dtype, generator=generator)
    y = sphere.projx(-x + gap * torch.randn(50, n, dtype=dtype, generator=generator))
    log = sphere.logmap(x, y)
    eps = torch.finfo(dtype).eps
    assert float(sphere.inner(x, x / 2, log).abs().max()) <= 16 * eps * 2 * math.pi
    torch.testing.assert_close(sphere.expmap(x, log), y.as_subclass(Tensor), rtol=0, atol=64 * eps)


@given(seed=st.integers(0, 2**31), size=st.integers(2, 5), radius=st.sampled_from([1.0, 0.3]))
def test_distance_of_orthogonal_matrices_is_the_norm_of_the_angles(seed: int, size: int, radius: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    stiefel = Stiefel(radius)
    x = stiefel.random(size, size, dtype=torch.float64, generator=generator)
    u = stiefel.proju(x, torch.randn(size, size, dtype=torch.float64, generator=generator))
    y = stiefel.expmap(x, u * (2.9 * radius / u.norm()))
    expected = radius * oracles.rotation_distance(x.numpy() / radius, y.numpy() / radius)
    assert float(stiefel.dist(x, y)) == pytest.approx(expected, rel=1e-12)


def test_stiefel_logarithm_of_large_matrices() -> None:
    case = Case(ENTRIES[3], (2,), (64, 32), 1.0, torch.float64, seed=0)
    x = case.point()
    for length in (1e-3, 1.0, 2.5):
        u = case.tangent(x, length)
        torch.testing.assert_close(case.manifold.logmap(x, case.manifold.expmap(x, u)), u, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("x", "y"),
    [
        (torch.eye(3), torch.diag(torch.tensor([1.0, 1.0, -1.0]))),  # determinants of opposite sign
        (torch.eye(3, 1), -torch.eye(3, 1)),  # antipodes: every direction is as good
    ],
)
def test_stiefel_logarithm_where_there_is_none(x: Tensor, y: Tensor) -> None:
    stiefel = Stiefel(0.5)
    with pytest.raises(RuntimeError, match=r"no geodesic found after \d+ rounds \(largest error.*intermediate point"):
        stiefel.logmap(0.5 * x, 0.5 * y)
    with pytest.raises(RuntimeError, match="injectivity radius or in different components"):
        stiefel.dist(0.5 * x, 0.5 * y)


# -- transport ---------------------------------------------------------------------------------------------------


@every_geometry
@given(data=st.data())
def test_transport_is_the_tangent_projection_at_the_target(entry: Entry, data: st.DataObject) -> None:
    case = data.draw(cases(entry))
    manifold, x, y = case.manifold, case.point(), case.point()
    v = case.tangent(x)
    carried = manifold.transp(x, y, v)
    case.assert_tangent(y, carried)
    assert bool((manifold.norm(y, carried) <= manifold.norm(x, v) * (1 + 16 * case.eps)).all())
    case.close(manifold.transp(x, x, v), v)
    case.close(manifold.inner(y, carried, manifold.proju(y, v)), manifold.inner(y, v, carried), degree=2)


@every_entry
@given(data=st.data())
def test_variants_that_follow_a_step_agree(entry: Entry, data: st.DataObject) -> None:
    case = data.draw(cases(entry))
    manifold, x = case.manifold, case.point()
    u, v = case.tangent(x, 1.3), case.tangent(x)
    y, carried = manifold.retr_transp(x, u, v)
    assert torch.equal(y, manifold.retr(x, u))
    assert torch.equal(carried, manifold.transp(x, y, v))
    assert torch.equal(carried, manifold.transp_follow_retr(x, u, v))
    y, carried = manifold.expmap_transp(x, u, v)
    assert torch.equal(y, manifold.expmap(x, u))
    assert torch.equal(carried, manifold.transp_follow_expmap(x, u, v))
    case.assert_tangent(y, carried)


@pytest.mark.parametrize("entry", SPHERICAL, ids=str)
@given(data=st.data(), length=st.floats(0, 20))
def test_parallel_transport_is_an_isometry(entry: Entry, data: st.DataObject, length: float) -> None:
    case = data.draw(cases(entry))
    manifold, x = case.manifold, case.point()
    u, v, w = case.tangent(x, length), case.tangent(x), case.tangent(x, 2.0)

    def carry(vector: Tensor) -> Tensor:
        return manifold.transp_follow_expmap(x, u, vector)

    factor = 64 * (1 + length)
    case.close(manifold.inner(x, carry(v), carry(w)), manifold.inner(x, v, w), degree=2, factor=factor)
    # A geodesic carries its own velocity along.
    y = manifold.expmap(x, u)
    case.close(manifold.expmap(y, -carry(u)), x, factor=factor)


# -- radius, batch, types ----------------------------------------------------------------------------------------


@every_method
@settings(max_examples=25)
@given(case=any_case())
def test_radius_covariance(method: str, case: Case) -> None:
    unit = Case(case.entry, case.batch, case.component, 1.0, case.dtype, case.seed)
    args = arguments(unit, method)
    scaled = tuple(arg * case.r if isinstance(arg, Tensor) else arg for arg in args)
    for result, expected, degree in zip(
        results(case.manifold, method, scaled), results(unit.manifold, method, args), METHODS[method][1], strict=True
    ):
        power = case.r ** int(degree)
        expected = expected * (power.reshape(case.batch) if expected.ndim == len(case.batch) else power)
        case.close(result, expected, degree=int(degree), factor=256)


@every_method
@settings(max_examples=25)
@given(case=any_case())
def test_batch_and_tensor_radius_are_a_loop_over_components(method: str, case: Case) -> None:
    args = arguments(case, method)
    for position, result in enumerate(results(case.manifold, method, args)):
        alone = torch.empty_like(result)
        for index in itertools.product(*map(range, case.batch)):
            manifold = case.entry.make(float(case.r[index].max()))
            own = tuple(arg[index] if isinstance(arg, Tensor) else arg for arg in args)
            alone[index] = results(manifold, method, own)[position]
        case.close(result, alone, degree=int(METHODS[method][1][position]), factor=128)


@every_method
@every_entry
def test_every_argument_broadcasts_over_the_batch(entry: Entry, method: str) -> None:
    case = fixed(entry, 5, 4, 3)
    one = case.point()[(0,) * len(case.batch)].expand(case.shape)
    x = case.manifold.expmap(one, case.tangent(one, 0.3))
    values = {"x": x, "y": case.manifold.expmap(x, case.tangent(x, 0.3)), "b": 1.5}
    values |= {"a": case.ambient(), "u": case.tangent(x), "v": case.tangent(x)}
    for single in set(METHODS[method][0]) - {"b"}:
        component = values[single][(1,) * len(case.batch)]
        outcomes = []
        for alone in (component, component.expand(case.shape)):
            args = tuple({**values, single: alone}[letter] for letter in METHODS[method][0])
            outcomes.append(results(case.manifold, method, args))
        for result, expected in zip(*outcomes, strict=True):
            if len(METHODS[method][0]) > 1:
                assert result.shape == expected.shape
            torch.testing.assert_close(result.expand_as(expected), expected, rtol=0, atol=1e-13)


@every_method
@every_entry
def test_strided_tensors(entry: Entry, method: str) -> None:
    case = fixed(entry, 3, 5, 4)
    args = arguments(case, method)
    strided = tuple(arg.mT.contiguous().mT if isinstance(arg, Tensor) else arg for arg in args)
    for result, expected in zip(
        results(case.manifold, method, strided), results(case.manifold, method, args), strict=True
    ):
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-13)


@every_method
@every_entry
def test_empty_batches(entry: Entry, method: str) -> None:
    case = fixed(entry, 0, 4, 3)
    empty = torch.empty(case.shape, dtype=torch.float64)
    args = tuple(1.0 if letter == "b" else empty for letter in METHODS[method][0])
    for result in results(case.manifold, method, args):
        assert result.shape[0] == 0
    assert case.manifold.check_point_on_manifold(empty)


@every_method
@settings(max_examples=25)
@given(case=any_case(torch.float32), dtype=st.sampled_from(HALF))
def test_half_precision_is_the_float32_result_rounded(method: str, case: Case, dtype: torch.dtype) -> None:
    args = tuple(arg.to(dtype) if isinstance(arg, Tensor) else arg for arg in arguments(case, method))
    wide = tuple(arg.float() if isinstance(arg, Tensor) else arg for arg in args)
    for result, expected in zip(
        results(case.manifold, method, args), results(case.manifold, method, wide), strict=True
    ):
        assert result.dtype == dtype
        assert torch.equal(result, expected.to(dtype))


@every_entry
@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_points_pass_their_own_checks(entry: Entry, dtype: torch.dtype) -> None:
    case = fixed(entry, 20, 16, 8, dtype=dtype)
    x = case.manifold.projx(case.gaussian())
    u = case.manifold.proju(x, case.gaussian())
    case.manifold.assert_check_point_on_manifold(x)
    case.manifold.assert_check_vector_on_tangent(x, u)
    case.manifold.assert_check_point_on_manifold(case.manifold.retr(x, u))
    assert not case.manifold.check_point_on_manifold(1.1 * x)
    assert not case.manifold.check_vector_on_tangent(x, u + 0.1 * case.manifold.norm(x, u, keepdim=True) * x)


@every_method
@every_entry
def test_autocast_changes_nothing(entry: Entry, method: str) -> None:
    case = fixed(entry, 3, 5, 4, dtype=torch.float32)
    args = arguments(case, method)
    expected = results(case.manifold, method, args)
    with torch.autocast("cpu", torch.bfloat16):
        inside = results(case.manifold, method, args)
    assert all(torch.equal(a, b) for a, b in zip(inside, expected, strict=True))


@every_entry
def test_tensor_radius_follows_type_and_device_of_the_points(entry: Entry) -> None:
    shape = (2, 3) if entry.name == "sphere" else (2, 4, 3)
    manifold = entry.make(torch.tensor([0.5, 2.0], dtype=torch.float64))
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        assert manifold.proju(manifold.random(shape, dtype=dtype), torch.ones(shape, dtype=dtype)).dtype == dtype
    on_meta = torch.empty(shape, device="meta")
    assert manifold.proju(on_meta, on_meta).is_meta


# -- radius, shapes, checks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [ScaledSphere, Oblique, Stiefel])
@pytest.mark.parametrize(
    ("radius", "error", "message"),
    [
        (0.0, ValueError, r"radius must be positive and finite, got values in \[0.0, 0.0\]"),
        (-1, ValueError, r"positive and finite, got values in \[-1.0, -1.0\]"),
        (math.nan, ValueError, "positive and finite"),
        (math.inf, ValueError, "positive and finite"),
        (torch.tensor([1.0, -2.0]), ValueError, r"got values in \[-2.0, 1.0\]"),
        (torch.tensor([1.0, math.nan]), ValueError, "positive and finite"),
        (torch.tensor([]), ValueError, "positive and finite"),
        (torch.tensor(0.0), ValueError, "positive and finite"),
        (torch.tensor([1, 2]), TypeError, "radius must be floating point, got dtype torch.int64"),
        ("2", TypeError, "radius must be a real number or a tensor, got '2'"),
        (None, TypeError, "radius must be a real number or a tensor, got None"),
        (1j, TypeError, "radius must be a real number or a tensor, got 1j"),
    ],
    ids=str,
)
def test_radius_errors(make: Callable[[Any], Any], radius: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{make.name}: .*{message}"):
        make(radius)


def test_radius_forms() -> None:
    assert Stiefel(torch.tensor(2)).radius == 2.0
    assert Stiefel(np.float32(0.5)).radius == 0.5
    assert Stiefel(torch.tensor(0.5, requires_grad=True)).radius == 0.5
    values = torch.tensor([0.5, 2.0], requires_grad=True)
    manifold = Stiefel(values)
    with torch.no_grad():
        values.mul_(10)
    assert manifold.radius_range == (0.5, 2.0)
    assert manifold.radius.tolist() == [0.5, 2.0]  # pyright: ignore[reportAttributeAccessIssue]
    x = torch.ones(2, 3, 2, dtype=torch.float64)
    radius = manifold.radius_for(x)
    assert isinstance(radius, Tensor)
    assert not radius.requires_grad
    assert radius.dtype == torch.float64
    assert radius.shape == (2, 1, 1)
    assert Stiefel(3.0).radius_for(x) == 3.0
    assert Stiefel(3.0).radius_range == (3.0, 3.0)


def test_a_radius_is_configuration_and_no_state() -> None:
    assert Stiefel(torch.ones(3)).state_dict() == {}


def test_curvature_bound_is_per_component() -> None:
    assert ScaledSphere(0.5).curvature_bound == 4.0
    bound = Oblique(torch.tensor([0.5, 2.0])).curvature_bound
    assert isinstance(bound, Tensor)
    assert bound.tolist() == [4.0, 0.25]


@pytest.mark.parametrize("ndim", [0, -1, 1.5, True])
def test_ndim_errors(ndim: Any) -> None:
    with pytest.raises(ValueError, match=f"ScaledSphere: ndim must be a positive integer, got {ndim!r}"):
        ScaledSphere(ndim=ndim)


def test_retraction_errors() -> None:
    with pytest.raises(ValueError, match='Stiefel: retraction must be "polar" or "qr", got \'cayley\''):
        Stiefel(retraction="cayley")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("manifold", "shape", "message"),
    [
        (ScaledSphere(ndim=2), (3,), "ScaledSphere needs at least 2 dimensions"),
        (Oblique(), (), "Oblique needs at least 2 dimensions"),
        (ScaledSphere(), (5, 1), "two isolated points, so nothing could move; use geoopt.Euclidean"),
        (ScaledSphere(ndim=2), (5, 1, 1), "two isolated points"),
        (Oblique(), (5, 1, 4), "two isolated points"),
        (Stiefel(), (7, 1, 1), "a 1 x 1 Stiefel matrix is an isolated point"),
        (Stiefel(), (7, 2, 3), "at least as many rows as columns, got 2 x 3; transpose it"),
        (ScaledSphere(), (3, 0), r"components of size \(0,\) have no entries"),
        (Oblique(), (3, 0), r"components of size \(3, 0\) have no entries"),
        (Stiefel(), (3, 0), r"components of size \(3, 0\) have no entries"),
        (Oblique(torch.ones(3)), (2, 4, 4), r"radius of shape \(3,\) does not broadcast .* dimensions \(2,\)"),
        (Oblique(torch.ones(3)), (4, 4), r"radius of shape \(3,\) does not broadcast .* dimensions \(\)"),
        (Oblique(torch.ones(2, 3)), (3, 4, 4), r"radius of shape \(2, 3\) does not broadcast"),
    ],
    ids=str,
)
def test_shape_errors(manifold: ComponentManifold, shape: tuple[int, ...], message: str) -> None:
    x = torch.empty(shape)
    assert not manifold.check_point(x)
    assert not manifold.check_vector(x)
    ok, reason = manifold.check_point(x, explain=True)  # pyright: ignore
    assert not ok
    assert reason.startswith(f"`x` of shape {shape}: ")
    for attempt in (
        lambda: manifold.random(shape),
        lambda: manifold.origin(shape),
        lambda: manifold.assert_check_point(x),
        lambda: manifold.assert_check_vector(x),
        lambda: geoopt.ManifoldParameter(x, manifold=manifold),
    ):
        with pytest.raises(ValueError, match=message):
            attempt()


@every_geometry
@given(data=st.data())
def test_checks_of_points_and_vectors(entry: Entry, data: st.DataObject) -> None:
    case = data.draw(cases(entry))
    manifold, x = case.manifold, case.point()
    u = case.tangent(x)
    assert manifold.check_point(x)
    assert manifold.check_vector(u)
    assert manifold.check_point_on_manifold(x, explain=True) == (True, None)
    assert manifold.check_vector_on_tangent(x, u, explain=True) == (True, None)
    manifold.assert_check_point_on_manifold(x)
    manifold.assert_check_vector_on_tangent(x, u)
    off = x * 1.01
    assert not manifold.check_point_on_manifold(off)
    assert manifold.check_point_on_manifold(off, atol=0.1)
    with pytest.raises(ValueError, match=r"largest relative constraint violation 0.0[12]\S* exceeds 2e-05; project"):
        manifold.assert_check_point_on_manifold(off)
    assert not manifold.check_vector_on_tangent(off, u)
    assert not manifold.check_vector_on_tangent(x, u + x)
    assert not manifold.check_vector_on_tangent(x, u + 0.01 * x, ok_point=True)
    with pytest.raises(ValueError, match=r"normal part has norm .*, with atol=1e-05, rtol=1e-05; project with proju"):
        manifold.assert_check_vector_on_tangent(x, u + x)


@every_entry
def test_checks_are_not_fooled_by_nan_or_by_one_good_component(entry: Entry) -> None:
    case = fixed(entry, 3, 5, 4)
    x = case.point()
    u = case.tangent(x)
    for bad in (math.nan, 0.0):
        wrong = x.clone()
        wrong[-1] = bad
        assert not case.manifold.check_point_on_manifold(wrong)
    assert not case.manifold.check_vector_on_tangent(x, torch.cat((u[:2], u[2:] + x[2:])))
    assert not case.manifold.check_vector_on_tangent(x, u * math.nan)


@pytest.mark.parametrize(
    ("manifold", "text"),
    [
        (ScaledSphere(), "ScaledSphere(radius=1, ndim=1) manifold"),
        (ScaledSphere(0.1, ndim=2), "ScaledSphere(radius=0.1, ndim=2) manifold"),
        (Oblique(2.0), "Oblique(radius=2) manifold"),
        (Oblique(torch.tensor([[0.5], [2.0]])), "Oblique(radius=0.5..2 of shape (2, 1)) manifold"),
        (Stiefel(), "Stiefel(radius=1, retraction=polar) manifold"),
        (Stiefel(0.25, "qr"), "Stiefel(radius=0.25, retraction=qr) manifold"),
    ],
    ids=str,
)
def test_repr(manifold: ComponentManifold, text: str) -> None:
    assert repr(manifold) == text


# -- copies and Geoopt's classes ---------------------------------------------------------------------------------


def saved_and_loaded(value: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), saved_and_loaded])
@pytest.mark.parametrize("radius", [0.5, torch.tensor([0.5, 1.0, 2.0])], ids=["number", "tensor"])
@every_entry
def test_copies(entry: Entry, radius: float | Tensor, duplicate: Callable[[Any], Any]) -> None:
    case = fixed(entry, *((3, 4) if entry.name == "sphere" else (3, 5, 4)), radius=radius)
    parameter = geoopt.ManifoldParameter(case.point(), manifold=case.manifold)
    other = duplicate(parameter)
    assert isinstance(other, geoopt.ManifoldParameter)
    assert torch.equal(other, parameter)
    for manifold in (duplicate(case.manifold), other.manifold):
        assert manifold is not case.manifold
        assert repr(manifold) == repr(case.manifold)
        assert manifold.radius_range == case.manifold.radius_range
        args = arguments(case, "retr_transp")
        for result, expected in zip(
            results(manifold, "retr_transp", args), results(case.manifold, "retr_transp", args), strict=True
        ):
            assert torch.equal(result, expected)


@every_entry
def test_parameters_in_a_module(entry: Entry) -> None:
    case = fixed(entry, 3, 5, 4)
    module = torch.nn.Module()
    module.weight = geoopt.ManifoldParameter(case.ambient(), manifold=case.manifold)
    with torch.no_grad():
        module.weight.proj_()
    case.manifold.assert_check_point_on_manifold(module.weight)
    other = torch.nn.Module()
    other.weight = geoopt.ManifoldParameter(torch.zeros(case.shape, dtype=torch.float64), manifold=case.manifold)
    other.load_state_dict(module.state_dict())
    assert torch.equal(other.weight, module.weight)
    assert other.weight.manifold is case.manifold
    u = case.tangent(module.weight.detach().as_subclass(Tensor))
    assert torch.equal(module.weight.retr(u), case.manifold.retr(module.weight, u))


OPTIMIZERS: list[Callable[..., torch.optim.Optimizer]] = [
    lambda p: geoopt.optim.RiemannianSGD(p, lr=0.1, momentum=0.5),
    lambda p: geoopt.optim.RiemannianSGD(p, lr=0.1, momentum=0.5, nesterov=True, weight_decay=0.01, stabilize=5),
    lambda p: geoopt.optim.RiemannianAdam(p, lr=0.1, stabilize=7),
    lambda p: geoopt.optim.RiemannianAdam(p, lr=0.1, amsgrad=True, weight_decay=0.01),
]


@pytest.mark.parametrize("make", OPTIMIZERS, ids=["sgd", "nesterov", "adam", "amsgrad"])
@pytest.mark.parametrize("radius", [0.5, torch.tensor([0.5, 1.0, 2.0])], ids=["number", "tensor"])
@every_entry
def test_optimisers_of_geoopt(entry: Entry, radius: float | Tensor, make: Callable[..., torch.optim.Optimizer]) -> None:
    case = fixed(entry, *((3, 4) if entry.name == "sphere" else (3, 5, 4)), radius=radius, dtype=torch.float32)
    parameter = geoopt.ManifoldParameter(case.point(), manifold=case.manifold)
    target = case.point()
    optimizer = make([parameter])
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = (parameter - target).square().sum()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
        assert float(case.manifold.violation(parameter.detach()).max()) <= 64 * case.eps
    assert losses[-1] < 0.7 * losses[0]


@every_entry
def test_scaled_by_geoopt(entry: Entry) -> None:
    case = fixed(entry, 2, 5, 4)
    scaled, x = geoopt.Scaled(case.manifold, 2.0), case.point()
    u = case.tangent(x, 1.0)
    y = scaled.expmap(x, u)
    torch.testing.assert_close(y, case.manifold.expmap(x, u / 2))
    torch.testing.assert_close(scaled.retr(x, u), case.manifold.retr(x, u / 2))
    torch.testing.assert_close(scaled.dist(x, y), 2 * case.manifold.dist(x, y))
    torch.testing.assert_close(scaled.dist2(x, y), 4 * case.manifold.dist2(x, y))
    torch.testing.assert_close(scaled.logmap(x, y), u)
    torch.testing.assert_close(scaled.dist(x, y), scaled.norm(x, u))
    torch.testing.assert_close(scaled.transp_follow_expmap(x, u, u), case.manifold.transp_follow_expmap(x, u / 2, u))
    torch.testing.assert_close(scaled.retr_transp(x, u, u), case.manifold.retr_transp(x, u / 2, u))
    assert scaled.check_point_on_manifold(y)
    with pytest.raises(NotImplementedError):
        scaled.retract_bounded(x, u, 1.0)


# -- derivatives -------------------------------------------------------------------------------------------------


@every_entry
@settings(max_examples=15)
@given(data=st.data())
def test_derivatives_at_the_zero_vector_are_the_projection(entry: Entry, data: st.DataObject) -> None:
    case = data.draw(cases(entry, torch.float64))
    manifold, x, weight = case.manifold, case.point(), case.gaussian()
    v = case.tangent(x)
    for move in (
        manifold.retr,
        manifold.expmap,
        lambda x, u: manifold.retract_bounded(x, u, 1.0),
        lambda x, u: manifold.logmap(x, x + u),
    ):
        u = torch.zeros(case.shape, dtype=torch.float64, requires_grad=True)
        (gradient,) = torch.autograd.grad((weight * move(x, u)).sum(), u)
        torch.testing.assert_close(manifold.proju(x, gradient), manifold.proju(x, weight), rtol=0, atol=1e-12)
    for call in (manifold.retr_transp, manifold.expmap_transp):
        u = torch.zeros(case.shape, dtype=torch.float64, requires_grad=True)
        (gradient,) = torch.autograd.grad(sum((weight * part).sum() for part in call(x, u, v)), u)
        assert bool(gradient.isfinite().all())


@every_geometry
@given(data=st.data())
def test_norm_and_distance_have_gradient_zero_where_they_vanish(entry: Entry, data: st.DataObject) -> None:
    case = data.draw(cases(entry, torch.float64))
    x = case.point()
    u = torch.zeros_like(x).requires_grad_()
    case.manifold.norm(x, u).sum().backward()
    y = x.clone().requires_grad_()
    (case.manifold.dist(x, y) + case.manifold.dist2(x, y)).sum().backward()
    for gradient in (u.grad, y.grad):
        assert gradient is not None
        assert not bool(gradient.any())


@every_geometry
@given(data=st.data(), length=st.floats(0.1, 2.0))
def test_gradient_of_the_squared_distance_is_the_logarithm(entry: Entry, data: st.DataObject, length: float) -> None:
    case = data.draw(cases(entry, torch.float64))
    manifold, x = case.manifold, case.point()
    y = manifold.expmap(x, case.tangent(x, length))
    at = x.clone().requires_grad_()
    (egrad,) = torch.autograd.grad(manifold.dist2(at, y).sum(), at)
    expected = -2 * manifold.logmap(x, y)
    torch.testing.assert_close(manifold.egrad2rgrad(x, egrad) / case.r, expected / case.r, rtol=0, atol=1e-9)


@pytest.mark.parametrize("entry", SPHERICAL, ids=str)
def test_gradients_at_antipodes_and_zero_are_finite(entry: Entry) -> None:
    case = fixed(entry, 2, 5, 4)
    x = case.point().requires_grad_()
    y = (-x.detach()).requires_grad_()
    zero = torch.zeros(case.shape, dtype=torch.float64, requires_grad=True)
    total = case.manifold.dist(x, y).sum() + case.manifold.logmap(x, y).sum() + case.manifold.projx(zero).sum()
    for gradient in torch.autograd.grad(total, (x, y, zero)):
        assert bool(gradient.isfinite().all())


@every_entry
@pytest.mark.parametrize(
    "method", [m for m in METHODS if m not in ("violation", "egrad2rgrad", "component_inner", "dist2", "transp")]
)
def test_derivatives_against_finite_differences(entry: Entry, method: str) -> None:
    case = fixed(entry, *((3,) if entry.name == "sphere" else (3, 2)), radius=0.7)
    letters = METHODS[method][0]
    args = tuple(a.requires_grad_() if isinstance(a, Tensor) else a for a in arguments(case, method))

    def on_tangents(*values: Any) -> tuple[Tensor, ...]:
        # Off the manifold the maps are an arbitrary extension: points and steps are moved within it.
        at = dict(zip(letters, values, strict=True))
        for letter in {"x", "y"} & set(letters):
            at[letter] = case.manifold.projx(at[letter])
        for letter in {"u", "v"} & set(letters):
            at[letter] = case.manifold.proju(at["x"], at[letter])
        return results(case.manifold, method, tuple(at.values()))

    assert torch.autograd.gradcheck(on_tangents, args)


@pytest.mark.parametrize("repeated", [1.0, 3.0])
def test_projection_of_repeated_singular_values_is_differentiable(repeated: float) -> None:
    stiefel = Stiefel(0.5)
    x = (repeated * stiefel.random(2, 4, 3, dtype=torch.float64).as_subclass(Tensor)).requires_grad_()
    assert torch.autograd.gradcheck(stiefel.projx, (x,))


# -- torch.compile -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "backend"),
    [("proju", "eager"), ("retr", "eager"), ("retract_bounded", "aot_eager"), ("expmap", "eager"), ("projx", "eager")],
)
@every_geometry
def test_methods_compile_without_graph_breaks(entry: Entry, method: str, backend: str) -> None:
    case = fixed(entry, 3, 5, 4, dtype=torch.float32)
    args = arguments(case, method)
    compiled = torch.compile(getattr(case.manifold, method), fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(*args), results(case.manifold, method, args)[0], rtol=0, atol=16 * case.eps)


def test_compiled_projx_asserts_finiteness() -> None:
    projx = torch.compile(Oblique().projx, fullgraph=True, backend="eager")
    with pytest.raises(RuntimeError, match=r"Oblique.projx has non-finite entries"):
        projx(torch.full((3, 3), math.nan))


# -- the matmul-only retraction ----------------------------------------------------------------------------------


@every_entry
@given(data=st.data(), bound=st.floats(0.01, 100), share=st.sampled_from([0.0, 0.01, 0.5, 1.0]))
def test_bounded_retraction_is_the_retraction(entry: Entry, data: st.DataObject, bound: float, share: float) -> None:
    case = data.draw(cases(entry))
    x = case.point()
    u = case.tangent(x, share * bound)
    y = case.manifold.retract_bounded(x, u, bound)
    assert float(case.manifold.violation(y).max()) <= 32 * case.eps
    for result in (y, case.manifold.retract_bounded(x, u, None)):
        case.close(result, case.manifold.retr(x, u), factor=32 * (1 + (share * bound) ** 2 / 8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bound", [0.1, 0.41, 2.0, 4.0, 4.1, 40.0, 100.0])
@pytest.mark.parametrize("rank", [1, 32])
def test_bounded_retraction_of_large_matrices(dtype: torch.dtype, bound: float, rank: int) -> None:
    case = Case(ENTRIES[3], (2,), (64, 32), 0.5, dtype, seed=0)
    x = case.point()
    u = case.manifold.proju(x, torch.cat((case.gaussian()[..., :rank], 0 * x[..., rank:]), -1))
    u = u * (bound * 0.5 / case.manifold.norm(x, u, keepdim=True))
    y = case.manifold.retract_bounded(x, u, bound)
    assert float(case.manifold.violation(y.double()).max()) <= 48 * case.eps
    case.close(y, case.manifold.retr(x.double(), u.double()), factor=8 * (1 + bound**2 / 50))


@pytest.mark.parametrize("bound", [0.0, 0.3, 3.0, 30.0])
def test_bounded_retraction_corrects_drift(bound: float) -> None:
    case = Case(ENTRIES[3], (10,), (6, 4), 2.0, torch.float64, seed=0)
    drifted = case.point() * (1 + 1e-4 * case.gaussian())
    assert float(case.manifold.violation(drifted).max()) > 1e-4
    u = case.manifold.proju(drifted, case.tangent(drifted, bound)) if bound else torch.zeros_like(drifted)
    y = case.manifold.retract_bounded(drifted, u, bound)
    assert float(case.manifold.violation(y).max()) <= 32 * case.eps
    if bound <= 3:
        torch.testing.assert_close(y, case.manifold.projx(drifted + u), rtol=0, atol=1e-13)


@pytest.mark.parametrize("bound", [100.1, math.inf, math.nan, None])
def test_beyond_the_largest_bound_the_factorisation_is_used(bound: float | None) -> None:
    case = Case(ENTRIES[3], (3,), (6, 4), 2.0, torch.float32, seed=0)
    x = case.point()
    u = case.tangent(x, 100.05)
    assert torch.equal(case.manifold.retract_bounded(x, u, bound), case.manifold.retr(x, u))


def test_what_cannot_be_read_is_bounded_by_the_caller_alone() -> None:
    """On the meta device, as on an accelerator, no factorisation is called only if the bound is known."""
    x = torch.zeros(3, 6, 4, device="meta")
    assert Stiefel().retract_bounded(x, x, 0.5).shape == x.shape
    compiled = torch.compile(Stiefel().retract_bounded, fullgraph=True, backend="aot_eager")
    case = Case(ENTRIES[3], (3,), (6, 4), 1.0, torch.float64, seed=0)
    x = case.point()
    u = case.tangent(x, 0.1)
    expected = case.manifold.retr(x, u)
    case.close(compiled(x, u, 0.2), expected)
    case.close(torch.func.vmap(lambda x, u: Stiefel().retract_bounded(x, u, 0.2))(x, u), expected)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert Stiefel().retract_bounded(x, u, 0.2).shape == x.shape


def test_reading_the_longest_step_saves_iterations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where reading is free the schedule follows from the longest step of the batch; its result is as exact."""
    case = Case(ENTRIES[3], (5,), (6, 4), 2.0, torch.float64, seed=0)
    x = case.point()
    lengths = torch.tensor([0.0, 0.01, 0.3, 0.2, 0.1], dtype=torch.float64)[:, None, None]
    u = case.tangent(x) * lengths
    expected = case.manifold.retr(x, u)
    asked: list[float] = []

    def schedule(excess: float, precision: float) -> tuple[float, ...]:
        asked.append(excess)
        return newton_schulz_schedule(excess, precision)

    monkeypatch.setattr(fgo_geo.manifolds.stiefel, "newton_schulz_schedule", schedule)
    for bound in (0.31, 3.0, 1000.0, math.inf, None):
        case.close(case.manifold.retract_bounded(x, u, bound), expected)
    assert asked == pytest.approx([0.09] * 5)


def test_a_step_longer_than_its_bound_or_not_finite_falls_back_on_the_bound() -> None:
    """What the caller says holds for the schedule, every matrix keeps its own scale, and none spoils the others."""
    case = Case(ENTRIES[3], (3,), (6, 4), 1.0, torch.float64, seed=0)
    x = case.point()
    u = case.tangent(x, 0.4)
    expected = case.manifold.retr(x, u)
    for bad in (torch.nan, 10.0):
        steps = torch.cat((u[:2], u[2:] * bad))
        y = case.manifold.retract_bounded(x, steps, 0.4)
        torch.testing.assert_close(y[:2], expected[:2], rtol=0, atol=32 * case.eps)
        assert bool(y[2].isnan().all()) if math.isnan(bad) else bool((torch.linalg.matrix_norm(y[2], 2) <= 1).all())


@every_entry
@pytest.mark.parametrize("method", ["proju", "retr", "retract_bounded", "expmap", "inner", "norm", "dist", "violation"])
def test_results_do_not_depend_on_the_order_in_memory(entry: Entry, method: str) -> None:
    """Up to rounding: the batch may run fastest, or the entries of a component."""
    case = Case(entry, (8,), (4, 3), 0.5, torch.float64, seed=0)
    x = case.point()
    arguments = {"violation": (x,), "dist": (x, case.point()), "retract_bounded": (x, case.tangent(x, 0.3), 0.3)}
    tensors = arguments.get(method, (x, case.tangent(x, 0.3)))
    planes = [t.movedim(0, -1).contiguous().movedim(-1, 0) if isinstance(t, Tensor) else t for t in tensors]
    results = [getattr(case.manifold, method)(*args) for args in (tensors, planes)]
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=64 * case.eps)


def test_bounded_retraction_uses_matrix_products_only(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(ENTRIES[3], (3,), (6, 4), 2.0, torch.float32, seed=0)
    x = case.point()
    u = case.tangent(x, 0.4)
    expected = case.manifold.retr(x, u)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a factorisation was called")

    for name in ("svd", "qr", "eigh", "cholesky", "inv", "solve"):
        monkeypatch.setattr(torch.linalg, name, refuse)
    case.close(case.manifold.retract_bounded(x, u, 0.41), expected)


@every_entry
def test_rounding_does_not_add_up(entry: Entry) -> None:
    case = fixed(entry, 10, 5, 3, dtype=torch.float32)
    for move in (case.manifold.expmap, lambda x, u: case.manifold.retract_bounded(x, u, 0.1)):
        x = case.point()
        for _ in range(300):
            x = move(x, case.tangent(x, 0.1))
        assert float(case.manifold.violation(x).max()) <= 8 * case.eps


# -- curvature ---------------------------------------------------------------------------------------------------


@every_geometry
@settings(max_examples=25)
@given(data=st.data())
def test_curvature_lies_within_its_bounds(entry: Entry, data: st.DataObject) -> None:
    case = data.draw(cases(entry, torch.float64))
    x = case.point()
    u, v = case.tangent(x), case.tangent(x)
    for radius, (at, first, second) in case.components(x, u, v):
        if abs(np.vdot(first, second)) > 0.999 * radius**2:
            continue  # one-dimensional, or nearly the same direction
        curvature = entry.oracle.curvature(at, first, second) * radius**2
        lowest = {"oblique": 0.0, "stiefel": -0.5, "stiefel qr": -0.5}.get(entry.name, 1.0)
        assert lowest - 1e-9 <= curvature <= 1 + 1e-9


@pytest.mark.parametrize("radius", [1.0, 0.5, 3.0])
def test_stiefel_curvature_reaches_both_ends(radius: float) -> None:
    x = radius * np.eye(4, 2)

    def step(row: int, column: int) -> np.ndarray:
        u = np.zeros((4, 2))
        u[row, column] = 1
        return u

    assert oracles.STIEFEL.curvature(x, step(2, 0), step(2, 1)) == pytest.approx(-1 / (2 * radius**2))
    assert oracles.STIEFEL.curvature(x, step(2, 0), step(3, 0)) == pytest.approx(1 / radius**2)
    assert Stiefel(radius).curvature_bound == pytest.approx(1 / radius**2)


@every_geometry
@settings(max_examples=10)
@given(data=st.data())
def test_projections_bend_as_the_second_fundamental_form(entry: Entry, data: st.DataObject) -> None:
    case = data.draw(cases(entry, torch.float64))
    x = case.point()
    u, v = case.tangent(x), case.tangent(x)
    _, bend = torch.func.jvp(lambda at: case.manifold.proju(at, v), (x,), (u,))
    for radius, (at, first, second, found) in case.components(x, u, v, bend):
        np.testing.assert_allclose(found, entry.oracle.bend(at, first, second)[0], rtol=0, atol=1e-11 * radius)


# -- traps in Geoopt that these manifolds avoid ------------------------------------------------------------------


def test_geoopt_sphere_of_zero_is_nan_and_ours_is_not() -> None:
    zero = torch.zeros(3)
    assert bool(geoopt.Sphere().projx(zero).isnan().all())
    assert bool(ScaledSphere().projx(zero).isfinite().all())


def test_geoopt_sphere_has_no_gradient_at_the_zero_step_and_ours_has() -> None:
    x = torch.tensor([1.0, 0.0])
    for manifold, finite in ((geoopt.SphereExact(), False), (ScaledSphere(), True)):
        u = torch.zeros(2, requires_grad=True)
        for move in (manifold.retr, manifold.expmap):
            (gradient,) = torch.autograd.grad(move(x, u).sum(), u)
            assert bool(gradient.isfinite().all()) == finite


def test_geoopt_stiefel_projection_is_not_idempotent_and_ours_is() -> None:
    x = Stiefel().random(5, 3, dtype=torch.float64).as_subclass(Tensor)
    u = torch.ones(5, 3, dtype=torch.float64)
    for manifold, idempotent in ((geoopt.Stiefel(), False), (Stiefel(), True)):
        once = manifold.proju(x, u)
        assert torch.allclose(manifold.proju(x, once), once) == idempotent


def test_geoopt_scaled_sphere_has_unit_points_and_ours_has_not() -> None:
    z = torch.tensor([3.0, 4.0])
    assert float(geoopt.Scaled(geoopt.Sphere(), 2.0).projx(z).norm()) == pytest.approx(1.0)
    assert float(ScaledSphere(2.0).projx(z).norm()) == pytest.approx(2.0)


def test_geoopt_sphere_constrains_rows_of_a_kernel_and_ours_the_kernel() -> None:
    weight = torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    assert geoopt.Sphere().projx(weight).norm(dim=-1).std() < 1e-6
    kernels = ScaledSphere(ndim=2).projx(weight)
    torch.testing.assert_close(kernels.norm(dim=(-2, -1)), torch.ones(4, 3))
    assert kernels.norm(dim=-1).std() > 0.01


@every_entry
def test_parameters_are_not_checked_by_geoopt_but_can_be(entry: Entry) -> None:
    case = fixed(entry, 2, 5, 4)
    parameter = geoopt.ManifoldParameter(3 * case.point(), manifold=case.manifold)
    assert not case.manifold.check_point_on_manifold(parameter)
    with torch.no_grad():
        parameter.proj_()
    assert case.manifold.check_point_on_manifold(parameter)


@pytest.mark.parametrize("base", [ScaledSphere, Oblique, Stiefel])
def test_overriding_a_projection_reaches_its_aliases(base: type[ComponentManifold]) -> None:
    class Doubled(base):
        def proju(self, x: Tensor, u: Tensor) -> Tensor:
            return 2 * super().proju(x, u)

        def uniform(self, gaussian: Tensor) -> Tensor:
            return 2 * super().uniform(gaussian)

    plain, doubled = base(), Doubled()
    x, u = plain.random(4, 3).as_subclass(Tensor), torch.ones(4, 3)
    assert torch.equal(doubled.egrad2rgrad(x, u), 2 * plain.egrad2rgrad(x, u))
    assert torch.equal(doubled.transp(x, x, u), 2 * plain.transp(x, x, u))
    torch.manual_seed(0)
    point = doubled.random_uniform(4, 3)
    torch.manual_seed(0)
    assert torch.equal(point, 2 * plain.random_uniform(4, 3))
