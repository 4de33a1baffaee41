"""What torch does with the component manifolds' methods: batches, types, derivatives, compilation."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import (
    ENTRIES,
    HALF,
    METHODS,
    SPHERICAL,
    Case,
    Entry,
    any_case,
    arguments,
    cases,
    every_entry,
    every_geometry,
    every_method,
    fixed,
    results,
)
from torch import Tensor

from fgo_geo import Oblique, Stiefel

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


def test_bounds_that_change_are_compiled_rung_by_rung() -> None:
    """The schedule of a bound that is a symbol, as one that changes is inside torch.compile, is that of a constant."""
    case = fixed(ENTRIES[3], 3, 5, 4, dtype=torch.float32)
    x = case.point()
    compiled = torch.compile(case.manifold.retract_bounded, fullgraph=True, backend="aot_eager")
    for bound in (0.3, 0.31, 0.4, 1e-7, 0.9, 30.0, 101.0):
        u = case.tangent(x, min(bound, 0.3))
        torch.testing.assert_close(compiled(x, u, bound), case.manifold.retr(x, u), rtol=0, atol=32 * case.eps)
