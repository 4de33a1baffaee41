"""Retractions, geodesics and transport of the component manifolds, over every entry of ``strategies.ENTRIES``."""

from __future__ import annotations

import itertools
import math
import warnings
from typing import Any

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import ENTRIES, SPHERICAL, Case, Entry, cases, every_entry, every_geometry, fixed
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import fgo_geo
from fgo_geo import ProductOfGroups, ScaledSphere, Stiefel
from fgo_geo.grouping import collection
from fgo_geo.linalg import newton_schulz_schedule
from fgo_geo.manifolds.stiefel import _rung

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
    steps = 2.0 ** -torch.arange(5, 10, dtype=torch.float64)
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
        pairs = zip(entry.lines(a), entry.lines(b), strict=True)
        expected = radius * math.hypot(*(oracles.angle(p, q) for p, q in pairs))
        assert float(distance) == pytest.approx(expected, rel=16 * case.eps, abs=4 * case.eps * radius)


@pytest.mark.parametrize("entry", SPHERICAL, ids=str)
@given(data=st.data())
def test_antipodes(entry: Entry, data: st.DataObject) -> None:
    case = data.draw(cases(entry))
    manifold, x = case.manifold, case.point()
    spheres = len(entry.lines(np.empty(case.component)))
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


@pytest.mark.parametrize("radius", [0.05, 1.0, 20.0])
def test_the_length_of_a_step_is_relative_to_the_radius(monkeypatch: pytest.MonkeyPatch, radius: float) -> None:
    """Else steps on small spheres would seem too short to explain where they end, and be left to a factorisation."""
    case = Case(ENTRIES[3], (3,), (6, 4), radius, torch.float64, seed=0)
    x = case.point()
    u = case.tangent(x, 50.0)
    expected = case.manifold.retr(x, u)
    monkeypatch.delattr(fgo_geo.manifolds.stiefel, "polar_factor")
    case.close(case.manifold.retract_bounded(x, u, 60.0), expected, factor=16)


@every_entry
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("exponent", [0.55, 0.75, 0.95])  # of the largest number; squares overflow from a half on
def test_vectors_too_long_to_be_squared_lead_to_points(entry: Entry, dtype: torch.dtype, exponent: float) -> None:
    case = fixed(entry, 3, 6, 4, radius=2.0, dtype=dtype)
    x = case.point()
    length = torch.finfo(dtype).max ** exponent
    u = case.tangent(x) * length
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ends = [case.manifold.retr(x, u), case.manifold.expmap(x, u), case.manifold.retract_bounded(x, u, None)]
    for end in ends:
        assert float(case.manifold.violation(end).max()) <= 64 * case.eps
    direction = case.manifold.retr(torch.zeros_like(x), u / length)
    case.close(ends[0], direction)
    case.close(ends[2], direction)


def test_a_long_and_a_short_vector_in_one_batch() -> None:
    sphere, x = ScaledSphere(2.0), 2 * torch.eye(3)
    u = torch.tensor([[0.0, 1e30, 0.0], [0.0, 0.0, 2.0], [0.0, 0.0, 0.0]])
    expected = torch.tensor([[0.0, 2.0, 0.0], [0.0, 2**0.5, 2**0.5], [0.0, 0.0, 2.0]])
    torch.testing.assert_close(sphere.retr(x, u), expected)
    variable = u.clone().requires_grad_()
    sphere.retr(x, variable)[1, 1].backward()
    assert variable.grad is not None
    torch.testing.assert_close(variable.grad[1], torch.tensor([0.0, 1, -1]) / 2**1.5)
    assert not variable.grad[::2].any()


def test_a_geodesic_whose_end_rounding_hides_is_cut_with_a_warning() -> None:
    x = Stiefel(0.5).origin(5, 3, dtype=torch.float64).as_subclass(Tensor)
    u = Stiefel(0.5).proju(x, torch.ones(5, 3, dtype=torch.float64))
    u = u / u.norm()
    Stiefel(0.5).expmap(x, 4.9e5 * u)  # 9.8e5 radii
    with pytest.warns(UserWarning, match=r"vector is 1.1e\+06 radii long, and was shortened to 1e\+06"):
        cut = Stiefel(0.5).expmap(x, 5.5e5 * u)
    torch.testing.assert_close(cut, Stiefel(0.5).expmap(x, 5e5 * (1 - 1e-12) * u), rtol=0, atol=1e-3)


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
    """Where reading is free the schedule follows from how far the batch is off; its result is as exact."""
    case = Case(ENTRIES[3], (5,), (6, 4), 2.0, torch.float64, seed=0)
    x = case.point()
    lengths = torch.tensor([0.0, 0.01, 0.3, 0.2, 0.1], dtype=torch.float64)[:, None, None]
    u = case.tangent(x) * lengths
    expected = case.manifold.retr(x, u)
    asked: list[float] = []

    def schedule(excess: float, precision: float) -> tuple[float, ...]:
        asked.append(excess)
        return newton_schulz_schedule(excess, precision)

    monkeypatch.setattr(fgo_geo.linalg.newton_schulz, "newton_schulz_schedule", schedule)
    for bound in (0.31, 3.0, 1000.0, math.inf, None):
        case.close(case.manifold.retract_bounded(x, u, bound), expected)
    v = u[2] / case.manifold.radius_range[0]
    assert asked == pytest.approx([float((v.mT @ v).norm())] * 5)


@pytest.mark.parametrize("factor", [0.0, 0.3, 0.9, 1.1, 1.5, 2.0, 30.0])
@pytest.mark.parametrize("length", [1e-3, 0.3, 3.0])
def test_a_point_off_its_manifold_comes_back_in_one_step(factor: float, length: float) -> None:
    """Weights that were scaled, or a radius that was changed: products by the bound on the step would diverge."""
    case = Case(ENTRIES[3], (3,), (9, 4), 2.0, torch.float64, seed=0)
    x = case.point()
    u = case.tangent(x, length)
    x = x * torch.tensor([1.0, factor, 1.0], dtype=torch.float64)[:, None, None]
    y = case.manifold.retract_bounded(x, u, length)
    assert float(case.manifold.violation(y).max()) < 1e-10
    torch.testing.assert_close(y[[0, 2]], case.manifold.retr(x, u)[[0, 2]], rtol=0, atol=1e-11)


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
        if math.isnan(bad):
            assert bool(y[2].isnan().all())
        else:
            assert float(torch.linalg.matrix_norm(y[2], 2)) <= 1 + 32 * case.eps


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


def test_the_transport_of_a_product_is_that_of_its_components() -> None:
    shape = (6, 4, 3, 3)
    manifold = ProductOfGroups(collection(6, 4, "pio", ("sphere", "oblique", "stiefel", "euclidean"), seed=2), shape)
    generator = torch.Generator().manual_seed(0)
    x = manifold.random(*shape, dtype=torch.float64, generator=generator)
    u, v = (manifold.proju(x, torch.randn(shape, dtype=torch.float64, generator=generator)) for _ in range(2))
    y, carried = manifold.expmap_transp(x, u, v)
    split = manifold.partition.split
    for (own, _), *parts in zip(manifold.parts, *map(split, (x, u, v, y, carried)), strict=True):
        at, velocity, vector, end, transported = parts
        torch.testing.assert_close(end, own.expmap(at, velocity), rtol=0, atol=1e-13)
        torch.testing.assert_close(transported, own.transp_follow_expmap(at, velocity, vector), rtol=0, atol=1e-13)


def test_the_bounds_of_compiled_steps_are_a_few_and_not_much_larger() -> None:
    squared = torch.logspace(-12, 4, 400).tolist()
    rungs = [_rung(value) for value in squared]
    assert len(set(rungs)) <= 20
    assert all(value <= rung for value, rung in zip(squared, rungs, strict=True))
    assert all(rung <= 4.0001 * value for value, rung in zip(squared, rungs, strict=True) if value > 1e-7)
    assert _rung(1.1e4) == math.inf
