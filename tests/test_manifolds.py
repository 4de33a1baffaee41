"""Points and tangent vectors of the component manifolds, over every entry of ``strategies.ENTRIES``."""

from __future__ import annotations

import math
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
    assert origin.is_contiguous()
    assert float(case.manifold.violation(origin).max()) <= 4 * case.eps
    assert torch.equal(origin, case.manifold.origin(case.shape, dtype=case.dtype, seed=None))
    unit = (origin / case.r).reshape(-1, *case.component)
    torch.testing.assert_close(unit, unit[:1].expand_as(unit), rtol=0, atol=4 * case.eps)


def test_origins() -> None:
    assert ScaledSphere(2.0).origin(3).tolist() == [2.0, 0.0, 0.0]
    assert Oblique(2.0).origin(2, 3).tolist() == [[2.0, 0.0, 2.0], [0.0, 2.0, 0.0]]
    assert Stiefel(2.0).origin(3, 2).tolist() == [[2.0, 0.0], [0.0, 2.0], [0.0, 0.0]]


def test_points_are_contiguous_however_a_class_projects() -> None:
    class ByColumns(Oblique):
        def projx(self, x: Tensor) -> Tensor:
            return super().projx(x).mT.contiguous().mT

    manifold = ByColumns()
    assert not manifold.projx(torch.ones(4, 3)).is_contiguous()
    assert manifold.origin(4, 3).is_contiguous()
    assert manifold.random(4, 3).is_contiguous()


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
    assert x.is_contiguous()  # a weight's layout decides which implementation steps it
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
    of_factors = manifold.component_inner(x, u, v)  # a column is a factor of an oblique manifold
    along = {"oblique": -2, "rows": -1}.get(entry.name)  # a line is a factor, and has a number of its own
    expected = manifold.inner(x, u, v, keepdim=True) if along is None else (u * v).sum(along, keepdim=True)
    case.close(of_factors, expected, degree=2)


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
        lowest = {"oblique": 0.0, "rows": 0.0, "stiefel": -0.5}.get(entry.name, 1.0)
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
