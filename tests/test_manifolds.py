"""Points and tangent vectors of the component manifolds, over every entry of ``strategies.ENTRIES``."""

from __future__ import annotations

import copy
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
from strategies import HALF, Entry, cases, every_entry, every_geometry, fixed
from torch import Tensor

from fgo_geo import Oblique, ScaledSphere, Stiefel
from fgo_geo.manifolds import ComponentManifold

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


# -- radius, shapes, checks --------------------------------------------------------------------------------------


bad_radii = pytest.mark.parametrize(
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
        (True, TypeError, "radius must be a real number or a tensor, got True"),
    ],
    ids=str,
)


@pytest.mark.parametrize("make", [ScaledSphere, Oblique, Stiefel])
@bad_radii
def test_radius_errors(make: Callable[[Any], Any], radius: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{make.name}: .*{message}"):
        make(radius)


@pytest.mark.parametrize("make", [ScaledSphere, Oblique, Stiefel])
@pytest.mark.parametrize("before", [2.0, torch.tensor([0.5, 2.0])], ids=["number", "tensor"])
@bad_radii
def test_a_bad_radius_is_refused_later_too_and_changes_nothing(
    make: Callable[[Any], Any], before: Any, radius: Any, error: type[Exception], message: str
) -> None:
    manifold = make(before)
    limits = manifold.radius_range
    with pytest.raises(error, match=f"^{make.name}: .*{message}"):
        manifold.radius = radius
    torch.testing.assert_close(manifold.radius, before, rtol=0, atol=0)
    assert manifold.radius_range == limits
    assert len(list(manifold.buffers())) == isinstance(before, Tensor)


def test_a_radius_can_be_assigned_in_every_form() -> None:
    """A number after a tensor and a tensor after a number, which torch.nn.Module keeps in different places."""
    manifold: Any = Stiefel(2.0)
    values = torch.tensor([0.5, 4.0], requires_grad=True)
    for radius, limits in (
        (3, (3.0, 3.0)),
        (values, (0.5, 4.0)),
        (2 * values, (1.0, 8.0)),
        (np.float32(7), (7.0, 7.0)),
    ):
        manifold.radius = radius
        kept = manifold.radius
        for clone in (manifold, copy.deepcopy(manifold), pickle.loads(pickle.dumps(manifold)), manifold.double()):
            assert clone.radius_range == limits
            torch.testing.assert_close(clone.radius, kept, check_dtype=False)
            assert [name for name, _ in clone.named_buffers()] == ["radius"] * isinstance(radius, Tensor)
            assert clone.state_dict() == {}
        if isinstance(radius, Tensor):
            assert manifold.radius.dtype == torch.float64
            assert not manifold.radius.requires_grad
            manifold.radius.fill_(1.0)  # it is a copy
    assert values.tolist() == [0.5, 4.0]


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
    with pytest.raises(ValueError, match=rf"{manifold.name}.projx: `x` of shape .*{message}"):
        manifold.projx(x)
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
