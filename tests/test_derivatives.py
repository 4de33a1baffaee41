"""Derivatives of the manifolds' operations, of first and second order, backward and forward, and under ``vmap``.

The table in ``docs/reference/manifolds.md`` says which operation has which; every cell of it is a test here.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mpmath
import pytest
import torch
from strategies import METHODS, SPHERICAL, Case, Entry, arguments, every_entry, fixed, results
from torch import Tensor
from torch.func import hessian, jacfwd, jacrev, jvp, vmap

from fgo_geo import Oblique, ProductOfGroups, ScaledSphere, Stiefel
from fgo_geo.grouping import collection
from fgo_geo.linalg import arctangent, cosine, polar_factor, sinc
from fgo_geo.linalg.smooth import apply

# -- the table -----------------------------------------------------------------------------------------------------

PAGE = Path(__file__).parent.parent / "docs" / "reference" / "manifolds.md"
COLUMNS = ("first derivative", "second derivative", "forward mode", "vmap")


def rows_of_the_table() -> dict[str, tuple[str, ...]]:
    """The cells of every operation, in the order of the columns."""
    page = PAGE.read_text(encoding="utf-8")
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line.startswith("|")
    ]
    assert tuple(lines[0][1:]) == COLUMNS
    return {name: tuple(line[1:]) for line in lines[2:] for name in re.findall(r"`(\w+)`", line[0])}


def function_of(case: Case, method: str) -> tuple[Callable[..., tuple[Tensor, ...]], tuple[Tensor, ...]]:
    """A method on points and tangent vectors, as a function of any tensors: these are projected first."""
    letters, args = METHODS[method][0], arguments(case, method)
    tensors = [letter for letter, arg in zip(letters, args, strict=True) if isinstance(arg, Tensor)]

    def call(*values: Tensor) -> tuple[Tensor, ...]:
        at: dict[str, Any] = dict(zip(letters, args, strict=True)) | dict(zip(tensors, values, strict=True))
        for letter in {"x", "y"} & set(letters):
            at[letter] = case.manifold.projx(at[letter])
        for letter in {"u", "v"} & set(letters):
            at[letter] = case.manifold.proju(at["x"], at[letter])
        return results(case.manifold, method, tuple(at[letter] for letter in letters))

    return call, tuple(arg for arg in args if isinstance(arg, Tensor))


def first_derivative(call: Callable[..., Any], args: tuple[Tensor, ...]) -> bool:
    return torch.autograd.gradcheck(call, args, fast_mode=True)


def second_derivative(call: Callable[..., Any], args: tuple[Tensor, ...]) -> bool:
    return torch.autograd.gradgradcheck(call, args, fast_mode=True)


def forward_mode(call: Callable[..., Any], args: tuple[Tensor, ...]) -> bool:
    """First derivatives, and second ones as a forward derivative of a gradient: that is torch.func.hessian."""
    assert torch.autograd.gradcheck(call, args, check_forward_ad=True, check_backward_ad=False, fast_mode=True)

    def value(*values: Tensor) -> Tensor:
        return torch.stack([torch.sin(result).sum() for result in call(*values)]).sum()

    plain = tuple(arg.detach() for arg in args)
    indices = tuple(range(len(plain)))
    forward, backward = (outer(jacrev(value, indices), indices)(*plain) for outer in (jacfwd, jacrev))
    for blocks in zip(forward, backward, strict=True):
        for one, other in zip(*blocks, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-8)
    return True


def under_vmap(call: Callable[..., Any], args: tuple[Tensor, ...]) -> bool:
    plain = tuple(arg.detach() for arg in args)
    others = tuple(arg.roll(1, -2 if arg.ndim > 1 else -1) for arg in plain)
    stacked = vmap(call)(*(torch.stack(pair) for pair in zip(plain, others, strict=True)))
    for both, *alone in zip(stacked, call(*plain), call(*others), strict=True):
        torch.testing.assert_close(both, torch.stack(alone), rtol=0, atol=1e-12)
    return True


CHECKS = dict(zip(COLUMNS, (first_derivative, second_derivative, forward_mode, under_vmap), strict=True))


def test_the_table_has_every_operation() -> None:
    assert rows_of_the_table().keys() == METHODS.keys()
    assert {cell for row in rows_of_the_table().values() for cell in row} == {"yes"}


@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("method", METHODS)
@every_entry
def test_every_cell_of_the_table(entry: Entry, method: str, column: str) -> None:
    case = fixed(entry, *((3,) if entry.name == "sphere" else (3, 2)), radius=0.7)
    call, args = function_of(case, method)
    assert CHECKS[column](call, tuple(arg.requires_grad_() for arg in args))


@every_entry
def test_random_points_under_vmap(entry: Entry) -> None:
    case = fixed(entry, *((4,) if entry.name == "sphere" else (4, 2)), radius=0.7)
    gaussian = torch.stack([case.gaussian() for _ in range(5)])
    torch.testing.assert_close(vmap(case.manifold.uniform)(gaussian), case.manifold.uniform(gaussian))
    for draw in (case.manifold.random, case.manifold.random_uniform):
        points = vmap(lambda _: draw(*case.shape), randomness="different")(torch.zeros(5))  # noqa: B023
        assert bool(case.manifold.check_point_on_manifold(points))
        assert not torch.equal(points[0], points[1])


def test_products_under_vmap_are_a_loop() -> None:
    product = ProductOfGroups(collection(6, 4, "pio", ("sphere", "oblique", "stiefel")), (6, 4, 3, 3))
    generator = torch.Generator().manual_seed(0)
    z, w = torch.randn(2, 3, 6, 4, 3, 3, dtype=torch.float64, generator=generator)
    x = torch.stack([product.projx(one) for one in z])
    torch.testing.assert_close(vmap(product.projx)(z), x)
    for method in (product.proju, product.retr, product.component_inner, product.expmap):
        expected = torch.stack([method(a, b) for a, b in zip(x, 0.1 * w, strict=True)])
        torch.testing.assert_close(vmap(method)(x, 0.1 * w), expected)


# -- where torch's own formulas divide by zero ---------------------------------------------------------------------


@every_entry
def test_second_derivative_along_geodesics_at_rest(entry: Entry) -> None:
    """That of ``<c, exp_x(t u)>`` at ``t = 0`` is ``<c, II(u, u)>``; and the Hessian in ``u`` is finite at zero."""
    case = fixed(entry, *((4,) if entry.name == "sphere" else (4, 2)), radius=0.5)
    manifold, x, c = case.manifold, case.point(), case.gaussian()
    u = case.tangent(x, 0.3)
    for move in (manifold.expmap, manifold.retr):
        found = hessian(lambda t: (c * move(x, t * u)).sum())(torch.zeros((), dtype=torch.float64))  # noqa: B023
        _, bend = jvp(lambda at: manifold.proju(at, u), (x,), (u,))
        if not (move == manifold.retr and entry.error_order == 2):  # the QR retraction leaves the geodesic at once
            torch.testing.assert_close(found, (c * bend).sum(), rtol=1e-9, atol=1e-12)
        at_rest = hessian(lambda u: (c * move(x, manifold.proju(x, u))).sum())(torch.zeros_like(x))  # noqa: B023
        assert bool(at_rest.isfinite().all())


@every_entry
def test_hessian_of_the_squared_distance_where_it_vanishes(entry: Entry) -> None:
    """Twice the identity on tangent vectors, in either point."""
    case = fixed(entry, *((4,) if entry.name == "sphere" else (4, 2)), radius=0.5)
    manifold, x = case.manifold, case.point()
    u, v = case.tangent(x), case.tangent(x, 2.0)
    for of_pair in (lambda y: manifold.dist2(x, manifold.projx(y)), lambda y: manifold.dist2(manifold.projx(y), x)):
        found = hessian(of_pair)(x).reshape(x.numel(), -1)
        assert bool(found.isfinite().all())
        torch.testing.assert_close(u.flatten() @ found @ v.flatten(), 2 * (u * v).sum(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("entry", SPHERICAL, ids=str)
def test_second_derivatives_of_length_are_finite_where_it_vanishes(entry: Entry) -> None:
    case = fixed(entry, *((4,) if entry.name == "sphere" else (4, 2)))
    manifold, x, zero = case.manifold, case.point(), torch.zeros(case.shape, dtype=torch.float64)
    assert bool(hessian(lambda u: manifold.norm(x, u).sum())(zero).isfinite().all())
    assert bool(hessian(lambda y: manifold.dist(x, y).sum())(x).isfinite().all())
    assert bool(hessian(lambda y: manifold.dist(x, y).sum())(-x).isfinite().all())


SMOOTH = [(cosine, mpmath.cos), (sinc, lambda t: mpmath.sin(t) / t), (arctangent, lambda t: mpmath.atan(t) / t)]


@pytest.mark.parametrize(("function", "expected"), SMOOTH, ids=["cosine", "sinc", "arctangent"])
@pytest.mark.parametrize("squared", [1e-9, 0.03, 0.0499, 0.0501, 0.7, 4.0, 90.0])
def test_functions_of_a_square_to_the_third_derivative(
    function: Callable[[Tensor], Tensor], expected: Callable[[Any], Any], squared: float
) -> None:
    at = torch.tensor(squared, dtype=torch.float64, requires_grad=True)
    value = function(at)
    with mpmath.workdps(40):
        terms = mpmath.taylor(lambda s: expected(mpmath.sqrt(s)), mpmath.mpf(squared), 3)
    for order in range(4):
        exact = float(terms[order]) * [1, 1, 2, 6][order]
        assert float(value.detach()) == pytest.approx(exact, rel=1e-9, abs=1e-9)
        if order < 3:
            (value,) = torch.autograd.grad(value, at, create_graph=True)
    torch.testing.assert_close(function(at.detach()), function(at).detach(), rtol=0, atol=1e-15)


# -- the polar factor ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "columns"), [(4, 1), (4, 2), (3, 3)])
def test_third_derivatives_of_the_polar_factor(rows: int, columns: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(2, rows, columns, dtype=torch.float64, generator=generator)

    def value(x: Tensor) -> Tensor:
        return torch.sin(weight * polar_factor(x)).sum()

    expected = jacrev(jacrev(jacrev(value)))(x)
    torch.testing.assert_close(jacfwd(jacrev(jacrev(value)))(x), expected, rtol=1e-10, atol=1e-10)
    step = 1e-5
    direction = torch.randn(rows, columns, dtype=torch.float64, generator=generator)
    change = (jacrev(jacrev(value))(x + step * direction) - jacrev(jacrev(value))(x - step * direction)) / (2 * step)
    torch.testing.assert_close((expected * direction).sum((-2, -1)), change, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_closed_form_of_the_polar_factor_has_the_derivatives_of_the_factorisation(sign: float) -> None:
    x = torch.randn(3, 3, generator=torch.Generator().manual_seed(0))
    x = x * (sign * torch.linalg.det(x).sign())
    weight = torch.arange(9.0).reshape(3, 3)

    def value(x: Tensor) -> Tensor:
        return (weight.to(x.dtype) * polar_factor(x)).sin().sum()

    for of_second_order in (lambda f: jacfwd(jacrev(f)), lambda f: jacrev(jacrev(f)), lambda f: jacrev(jacfwd(f))):
        found, expected = of_second_order(value)(x), of_second_order(value)(x.double())
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_forward_mode_within_forward_mode_names_what_to_do() -> None:
    x = Stiefel().random(3, 2, dtype=torch.float64).as_subclass(Tensor)
    with pytest.raises(
        NotImplementedError, match=r"PolarFactor has no forward .* take one of them backward: torch.func"
    ):
        jacfwd(jacfwd(lambda x: Stiefel().projx(x).sum()))(x)
    for manifold in (ScaledSphere(ndim=2), Oblique()):  # made of torch's own operations
        of_forward = jacfwd(jacfwd(lambda x: manifold.projx(x).sin().sum()))(x)  # noqa: B023
        torch.testing.assert_close(of_forward, hessian(lambda x: manifold.projx(x).sin().sum())(x))  # noqa: B023


def test_functions_without_derivatives_are_called_directly() -> None:
    """``torch.autograd.Function.apply`` takes 50 µs; where there is nothing to differentiate, nothing is recorded."""

    class Recorded(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(x: Tensor) -> Tensor:  # pyright: ignore
            return 2 * x

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
            recorded.append(inputs[0].shape)

        @staticmethod
        def push(ctx: Any, tangent: Tensor) -> Tensor:
            return 2 * tangent

    recorded: list[tuple[int, ...]] = []
    x = torch.ones(2)
    with torch.no_grad():
        assert apply(Recorded, x.clone().requires_grad_()).tolist() == [2, 2]
    assert apply(Recorded, x).tolist() == [2, 2]
    assert not recorded
    assert apply(Recorded, x.clone().requires_grad_()).requires_grad
    assert jvp(lambda x: apply(Recorded, x), (x,), (x,))[1].tolist() == [2, 2]
    assert vmap(lambda x: apply(Recorded, x))(x).tolist() == [2, 2]
    assert len(recorded) >= 3
