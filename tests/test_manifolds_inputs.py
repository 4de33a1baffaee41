"""What the component manifolds accept: radii, shapes and types, and what they say of the rest."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import geoopt
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import Entry, arguments, cases, every_entry, every_geometry, every_method, fixed
from torch import Tensor, nn

from fgo_geo import Oblique, ProductOfGroups, RiemannianFGSGD, ScaledSphere, Stiefel
from fgo_geo.grouping import collection
from fgo_geo.manifolds import ComponentManifold

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
        (1e-20, ValueError, r"got values in \[1e-20, 1e-20\]; supported are 1e-12 to 1e\+12, .* scale the weight"),
        (torch.tensor([1.0, 1e20]), ValueError, r"supported are 1e-12 to 1e\+12"),
        (torch.tensor([1.0, 2.0], requires_grad=True), ValueError, r"radius requires a gradient, .* radius.detach\(\)"),
        (nn.Parameter(torch.tensor(2.0)), ValueError, "requires a gradient, .* multiply the weight by a parameter"),
        (nn.Parameter(torch.ones(2), requires_grad=False), ValueError, "the radius is a Parameter"),
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
    values = torch.tensor([0.5, 4.0])
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
            manifold.radius.fill_(1.0)  # it is a copy
    assert values.tolist() == [0.5, 4.0]


def test_radius_forms() -> None:
    assert Stiefel(torch.tensor(2)).radius == 2.0
    assert Stiefel(np.float32(0.5)).radius == 0.5
    assert Stiefel(torch.tensor(0.5)).radius == 0.5
    values = torch.tensor([0.5, 2.0])
    manifold = Stiefel(values)
    values.mul_(10)
    assert manifold.radius_range == (0.5, 2.0)
    assert manifold.radius.tolist() == [0.5, 2.0]  # pyright: ignore[reportAttributeAccessIssue]
    x = torch.ones(2, 3, 2, dtype=torch.float64)
    radius = manifold.radius_for(x)
    assert isinstance(radius, Tensor)
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
    manifold = Stiefel(retraction="qr")
    with pytest.raises(ValueError, match="got 'cayley'"):
        manifold.retraction = "cayley"
    assert manifold.retraction == "qr"


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


# -- types ---------------------------------------------------------------------------------------------------------

OTHER_TYPES = [torch.complex64, torch.int64, torch.bool]
other_types = pytest.mark.parametrize("dtype", OTHER_TYPES, ids=str)
expected = "expected a real floating-point type; (use its real and imaginary|convert it, with .float)"


@other_types
@every_method
@every_entry
def test_methods_refuse_complex_numbers_and_integers(entry: Entry, method: str, dtype: torch.dtype) -> None:
    case = fixed(entry, 2, 4, 3)
    args = arguments(case, method)
    for position, given_tensor in enumerate(args):
        if isinstance(given_tensor, Tensor) and (method, position) != ("transp", 0):  # it needs no start
            wrong = (*args[:position], given_tensor.to(dtype), *args[position + 1 :])
            with pytest.raises(
                TypeError, match=rf"an argument of {case.manifold.name}\.\w+ has dtype {dtype}, {expected}"
            ):
                getattr(case.manifold, method)(*wrong)


@other_types
@every_entry
def test_points_of_other_types_are_refused(entry: Entry, dtype: torch.dtype) -> None:
    case = fixed(entry, 2, 4, 3)
    manifold, x = case.manifold, case.point().to(dtype)
    for attempt in (
        lambda: manifold.random(case.shape, dtype=dtype),
        lambda: manifold.random_uniform(case.shape, dtype=dtype),
        lambda: manifold.origin(case.shape, dtype=dtype),
        lambda: manifold.check_point(x),
        lambda: manifold.check_vector(x),
        lambda: manifold.check_point_on_manifold(x),
        lambda: manifold.check_vector_on_tangent(case.point(), x),
        lambda: manifold.assert_check_point(x),
        lambda: manifold.assert_check_vector(x),
        lambda: manifold.require_point(x, "the weight", "project it"),
        lambda: geoopt.ManifoldTensor(x, manifold=manifold),
    ):
        with pytest.raises(TypeError, match=f"has dtype {dtype}, {expected}"):
            attempt()


def test_complex_parameters_are_refused_by_parameter_and_optimiser() -> None:
    po = collection(4, 3, "po", ("sphere", "stiefel"))
    for manifold, shape in ((Stiefel(), (4, 3)), (ProductOfGroups(po, (4, 3, 3, 3)), (4, 3, 3, 3))):
        with pytest.raises(TypeError, match=rf"a point of {manifold.name} has dtype torch.complex64"):
            geoopt.ManifoldParameter(torch.zeros(shape, dtype=torch.complex64), manifold=manifold)
        weight = geoopt.ManifoldParameter(manifold.random(*shape), manifold=manifold)
        weight.data = weight.data.to(torch.complex64)  # as model.to(torch.complex64) does
        with pytest.raises(TypeError, match=r"RiemannianFGSGD: 'w'.* has dtype torch.complex64, expected a real"):
            RiemannianFGSGD([("w", weight)], lr=0.1)
