from __future__ import annotations

import math
from typing import Any

import mpmath
import numpy as np
import oracles
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from fgo_geo.linalg import (
    computes_in_float32,
    gram_excess,
    inner_sum,
    inverse_root_gap,
    matrix_exponential,
    newton_schulz_schedule,
    polar_factor,
    polar_factor_and_range,
    polish,
    qr_factor,
    require_finite,
    root_of_sum,
    small_product,
    subtract_product,
    sym,
)
from fgo_geo.linalg.newton_schulz import series_limit, unrefined_precision

HALF = [torch.float16, torch.bfloat16]
EPS = torch.finfo(torch.float64).eps

seeds = st.integers(0, 2**31)
sizes = st.tuples(st.integers(1, 7), st.integers(1, 7)).map(lambda size: (max(size), min(size)))


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def with_singular_values(seed: int, a: int, b: int, values: Tensor) -> Tensor:
    left = torch.linalg.qr(normal(seed, *values.shape[:-1], a, b)).Q
    right = torch.linalg.qr(normal(seed + 1, *values.shape[:-1], b, b)).Q
    return left @ torch.diag_embed(values) @ right.mT


def orthonormality(q: Tensor) -> float:
    q = q.double()
    return float((q.mT @ q - torch.eye(q.shape[-1])).abs().max())


# -- guards ------------------------------------------------------------------------------------------------------


@computes_in_float32
def third_of_product(x: Tensor, y: Tensor, *, offset: float = 0.0, extra: Tensor | None = None) -> Tensor:
    return (x * y + offset + (0 if extra is None else extra * extra)) / 3


@computes_in_float32
def types_inside(*args: Tensor) -> tuple[list[torch.dtype], Tensor]:
    return [a.dtype for a in args], args[0] / 3


@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_is_computed_in_float32_and_rounded_once(dtype: torch.dtype) -> None:
    x, y, extra = normal(0, 3, 50, dtype=torch.float32).to(dtype)
    for kwargs in ({}, {"offset": 1.0}, {"extra": extra}):
        wide = {k: v.float() if isinstance(v, Tensor) else v for k, v in kwargs.items()}
        result = third_of_product(x, y, **kwargs)
        assert result.dtype == dtype
        assert torch.equal(result, third_of_product(x.float(), y.float(), **wide).to(dtype))
    assert not torch.equal((x * y) / 3, third_of_product(x, y))


@pytest.mark.parametrize(
    ("first", "second", "inside", "result"),
    [
        (torch.bfloat16, torch.bfloat16, torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float16, torch.float32, torch.float32),
        (torch.bfloat16, torch.float32, torch.float32, torch.float32),
        (torch.float32, torch.float32, torch.float32, torch.float32),
        (torch.float64, torch.float64, torch.float64, torch.float64),
    ],
)
def test_types_inside_and_outside(
    first: torch.dtype, second: torch.dtype, inside: torch.dtype, result: torch.dtype
) -> None:
    types, value = types_inside(torch.ones(2, dtype=first), torch.ones(2, dtype=second))
    assert types == [inside, inside]
    assert value.dtype == result


def test_half_next_to_float64_and_to_integers() -> None:
    types, value = types_inside(
        torch.ones(2, dtype=torch.bfloat16), torch.ones(2, dtype=torch.float64), torch.ones(2, dtype=torch.int64)
    )
    assert types == [torch.float32, torch.float64, torch.int64]
    assert value.dtype == torch.float64


def test_functions_of_no_tensor_pass_unchanged() -> None:
    assert computes_in_float32(max)(3, 5) == 5


def test_float32_products_stay_float32_under_autocast() -> None:
    x = normal(0, 8, 8, dtype=torch.float32)
    product = computes_in_float32(torch.Tensor.matmul)
    with torch.autocast("cpu", torch.bfloat16):
        assert (x @ x).dtype == torch.bfloat16
        inside = product(x, x)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, x @ x)


def test_gradients_pass_the_rounding() -> None:
    x = torch.tensor([2.0], dtype=torch.bfloat16, requires_grad=True)
    third_of_product(x, x).backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.bfloat16
    assert x.grad.item() == torch.tensor(4 / 3, dtype=torch.bfloat16).item()


def test_decorated_functions_keep_their_name_and_have_code_of_their_own() -> None:
    assert third_of_product.__name__ == "third_of_product"
    assert third_of_product.__code__ is not types_inside.__code__


def test_meta_tensors_pass() -> None:
    assert third_of_product(torch.ones(2, device="meta"), torch.ones(2, device="meta")).is_meta


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1.0, math.nan], r"the gain has 1 non-finite entry of 2 \(shape \(2,\)\); replace .* torch.nan_to_num"),
        ([math.inf, -math.inf, math.nan], r"the gain has 3 non-finite entries of 3 \(shape \(3,\)\)"),
    ],
)
def test_non_finite_entries_are_counted_and_named(values: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        require_finite(torch.tensor(values), "the gain")


def test_finite_entries_pass() -> None:
    for other in (0.0, torch.finfo(torch.float32).max):  # the sum of the second overflows
        require_finite(torch.tensor([torch.finfo(torch.float32).max, other]), "the gain")
    require_finite(torch.tensor([1, 2]), "the gain")


def test_compiled_code_asserts_finiteness_on_the_device() -> None:
    @torch.compile(fullgraph=True, backend="eager")
    def guarded(x: Tensor) -> Tensor:
        require_finite(x, "the gain")
        return x * 2

    assert guarded(torch.ones(3)).tolist() == [2.0, 2.0, 2.0]
    with pytest.raises(RuntimeError, match="the gain has non-finite entries"):
        guarded(torch.tensor([1.0, math.nan, 1.0]))


# -- exact factors -----------------------------------------------------------------------------------------------


@given(seed=seeds, size=st.integers(1, 6))
def test_sym_is_the_symmetric_part(seed: int, size: int) -> None:
    m = normal(seed, 2, size, size)
    expected = np.array([[[(m[k, i, j] + m[k, j, i]) / 2 for j in range(size)] for i in range(size)] for k in range(2)])
    assert np.array_equal(sym(m).numpy(), expected)


@given(seed=seeds, size=sizes)
def test_qr_factor_is_gram_schmidt(seed: int, size: tuple[int, int]) -> None:
    x = normal(seed, 3, *size)
    q = qr_factor(x)
    for factor, matrix in zip(q.numpy(), x.numpy(), strict=True):
        condition = np.linalg.cond(matrix)
        np.testing.assert_allclose(factor, oracles.gram_schmidt(matrix), atol=64 * EPS * condition, rtol=0)
    r = q.mT @ x
    assert bool((r.diagonal(dim1=-2, dim2=-1) >= 0).all())
    assert float(r.tril(-1).abs().max()) <= 32 * EPS * float(x.abs().max())


@given(seed=seeds, size=sizes)
def test_polar_factor_against_the_inverse_root_of_the_gram_matrix(seed: int, size: tuple[int, int]) -> None:
    x = normal(seed, 3, *size)
    q = polar_factor(x)
    assert orthonormality(q) <= 32 * EPS
    for factor, matrix in zip(q.numpy(), x.numpy(), strict=True):
        np.testing.assert_allclose(factor, oracles.polar(matrix), atol=32 * EPS * np.linalg.cond(matrix) ** 2, rtol=0)


def test_polar_factor_to_fifty_digits() -> None:
    x = torch.tensor([[1.0, 2.0], [3.0, 5.0], [-1.0, 0.5]], dtype=torch.float64)
    with mpmath.workdps(50):
        exact = mpmath.matrix(x.tolist())
        factor = exact * (mpmath.sqrtm(exact.T * exact) ** -1)
        expected = torch.tensor([[float(factor[i, j]) for j in range(2)] for i in range(3)], dtype=torch.float64)
    torch.testing.assert_close(polar_factor(x), expected, rtol=0, atol=4 * EPS)


def test_polar_factor_of_deficient_matrices_is_a_nearest_point() -> None:
    values = torch.tensor([[2.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    x = with_singular_values(3, 5, 3, values)
    x[2] = 0
    q = polar_factor(x)
    assert orthonormality(q) <= 16 * EPS
    # ‖x - q‖² = ‖x‖² - 2 <x, q> + B is least where <x, q> is the sum of the singular values.
    torch.testing.assert_close((x * q).sum((-2, -1)), values.sum(-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("a", "b", "condition"), [(7, 4, 1e3), (60, 40, 2.0), (90, 50, 1e3), (200, 170, 1.2), (300, 170, 5.0)]
)
def test_the_range_of_singular_values(a: int, b: int, condition: float, dtype: torch.dtype) -> None:
    values = 3 * torch.stack([torch.linspace(1, condition, b, dtype=torch.float64), torch.ones(b, dtype=torch.float64)])
    x = with_singular_values(a, a, b, values).to(dtype)
    q, low, high = polar_factor_and_range(x)
    assert torch.equal(q, polar_factor(x))
    rounding = 1e3 * torch.finfo(dtype).eps * values.amax(-1)
    least, largest = (end(values, -1) for end in (torch.amin, torch.amax))
    assert bool((low <= least + rounding).all())
    assert bool((high >= largest - rounding).all())
    assert bool((low >= 0.6 * least - rounding).all())  # by products the interval is that of all matrices
    assert bool((high <= 1.6 * largest + rounding).all())


@given(seed=seeds, size=sizes)
def test_derivative_of_the_polar_factor(seed: int, size: tuple[int, int]) -> None:
    a, b = size
    x = with_singular_values(seed, a, b, 0.5 + torch.arange(b, dtype=torch.float64) / 2).requires_grad_()
    weight = normal(seed + 2, a, b)
    (gradient,) = torch.autograd.grad((weight * polar_factor(x)).sum(), x)
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    (by_svd,) = torch.autograd.grad((weight * (u @ vh)).sum(), x)
    torch.testing.assert_close(gradient, by_svd, rtol=0, atol=1e-12)
    direction = normal(seed + 3, a, b)
    step = 1e-5
    difference = polar_factor(x + step * direction) - polar_factor(x - step * direction)
    slope = (weight * difference.detach()).sum() / (2 * step)
    torch.testing.assert_close((gradient * direction).sum(), slope, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("values", [[1.0, 1.0, 1.0], [2.0, 2.0, 1.0], [1.0, 1.0 + 1e-13, 1.0 - 1e-13]])
def test_derivative_at_repeated_singular_values(values: list[float]) -> None:
    x = with_singular_values(0, 5, 3, torch.tensor(values, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(polar_factor, (x,), atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_gradient_at_deficient_matrices_is_finite(rank: int) -> None:
    x = torch.eye(4, 3, dtype=torch.float64) * (torch.arange(3) < rank)
    x.requires_grad_()
    (normal(0, 4, 3) * polar_factor(x)).sum().backward()
    assert x.grad is not None
    assert bool(x.grad.isfinite().all())
    assert bool(x.grad.any()) == (rank > 0)


def test_polar_factor_under_vmap_and_jacrev() -> None:
    x, weight = normal(0, 4, 5, 3), normal(1, 5, 3)
    torch.testing.assert_close(torch.func.vmap(polar_factor)(x), polar_factor(x))

    def loss(z: Tensor) -> Tensor:
        return (weight * polar_factor(z)).sum()

    y = x.clone().requires_grad_()
    loss(y).backward()
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss))(x), y.grad)
    jacobian = torch.func.jacrev(polar_factor)(x[0])
    torch.testing.assert_close((weight[..., None, None] * jacobian).sum((0, 1)), y.grad[0])  # pyright: ignore


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("batch", [(), (1,), (1, 1), (2,), (2, 3), (0,)], ids=str)
@given(angle=st.floats(-1.0, 1.0))
@example(angle=0.5)
@example(angle=0.04)
def test_exponentials_of_turns_are_rotations(dtype: torch.dtype, batch: tuple[int, ...], angle: float) -> None:
    turn = torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=torch.float64)
    angle = float(torch.tensor(angle, dtype=dtype))
    expected = math.cos(angle) * torch.eye(2, dtype=torch.float64) + math.sin(angle) * turn
    result = matrix_exponential((angle * turn).to(dtype).expand(*batch, 2, 2))
    assert result.dtype == dtype
    atol = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(result.double(), expected.expand(*batch, 2, 2), rtol=0, atol=atol)


def test_derivative_of_the_exponential() -> None:
    for batch in ((), (2,)):
        a = 0.1 * normal(0, *batch, 3, 3)
        assert torch.autograd.gradcheck(matrix_exponential, a.requires_grad_())
    matrices = 0.1 * normal(1, 4, 3, 3)
    expected = matrix_exponential(matrices)
    torch.testing.assert_close(torch.func.vmap(matrix_exponential)(matrices), expected, rtol=0, atol=4 * EPS)


# -- the cheap factor --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("excess", "precision", "length"),
    [
        (0.4142**2, 2.0**-23, 3),
        (0.01**2, 2.0**-23, 2),
        (1.0, 2.0**-23, 4),
        (100.0**2, 2.0**-23, 9),
        (0.4142**2, 2.0**-52, 4),
        (100.0**2, 2.0**-52, 10),
    ],
)
def test_schedule_lengths(excess: float, precision: float, length: int) -> None:
    assert len(newton_schulz_schedule(excess, precision)) == length


@given(bound=st.floats(0, 100), precision=st.sampled_from([2.0**-10, 2.0**-23, 2.0**-52]))
def test_schedule_takes_the_whole_interval_to_one(bound: float, precision: float) -> None:
    schedule = newton_schulz_schedule(bound**2, precision)
    ends = [1 / math.sqrt(1.05 * (1 + bound**2)), 1.0]
    for end in [*ends, *np.linspace(*ends, 23)]:
        with mpmath.workdps(40):
            value = mpmath.mpf(float(end))
            for rho in schedule:
                value = rho * value * (3 - (rho * value) ** 2) / 2
            assert abs(1 - value) <= max(precision, 2.0**-49)  # ρ itself is rounded


def test_schedule_is_no_longer_than_needed() -> None:
    for bound in (0.01, 0.4, 3.0, 80.0):
        schedule = newton_schulz_schedule(bound**2, 2.0**-23)
        value = 1 / math.sqrt(1.05 * (1 + bound**2))
        for rho in schedule[:-1]:
            value = rho * value * (3 - (rho * value) ** 2) / 2
        assert 1 - value > 2.0**-23


@pytest.mark.parametrize("precision", [2.0**-23, 2.0**-52])
@pytest.mark.parametrize("side", [-1, 1])
def test_the_last_step_takes_what_the_schedule_leaves_to_the_precision(precision: float, side: int) -> None:
    with mpmath.workdps(40):
        value = 1 + side * mpmath.mpf(unrefined_precision(precision))
        assert float(1 - value * (3 - value**2) / 2) == pytest.approx(precision, rel=1e-3)


def polar_by_products(y: Tensor, squared: float, radius: Any = 1.0) -> Tensor:
    """``r y (yᵀy)^{-1/2}`` for squares of singular values up to ``1 + squared`` times those of the radius."""
    return subtract_product(y, y, inverse_root_gap(gram_excess(y, radius), squared))


@given(seed=seeds, size=sizes, bound=st.floats(0.01, 4), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_newton_schulz_reaches_the_polar_factor(
    seed: int, size: tuple[int, int], bound: float, dtype: torch.dtype
) -> None:
    a, b = size
    share = torch.rand(3, b, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    values = 1 + share * (math.sqrt(1 + bound**2) - 1)
    y = with_singular_values(seed, a, b, values).to(dtype)
    q = polar_by_products(y, bound**2)
    unit = torch.finfo(dtype).eps * (1 + bound**2)
    assert orthonormality(q) <= 16 * unit
    torch.testing.assert_close(q.double(), polar_factor(y.double()), rtol=0, atol=16 * unit)


def test_newton_schulz_corrects_drift_in_both_directions() -> None:
    y = with_singular_values(0, 6, 4, torch.tensor([1 - 1e-4, 1.0, 1 + 1e-4, 1.1], dtype=torch.float64))
    q = polar_by_products(y, 0.21)
    torch.testing.assert_close(q, polar_factor(y), rtol=0, atol=32 * EPS)


@given(seed=seeds, size=sizes)
def test_polish_squares_the_error(seed: int, size: tuple[int, int]) -> None:
    a, b = size
    error = 1e-4 * normal(seed, b)
    y = with_singular_values(seed, a, b, 1 + error)
    polished = torch.linalg.svdvals(polish(y)).sort().values
    torch.testing.assert_close(polished, (1 - 1.5 * error**2 - error**3 / 2).sort().values, rtol=0, atol=16 * EPS)
    torch.testing.assert_close(polar_factor(polish(y)), polar_factor(y), rtol=0, atol=64 * EPS)


# -- tiny matrices, large batches ----------------------------------------------------------------------------------


def planes(x: Tensor) -> Tensor:
    """The same matrices, the batch fastest in memory."""
    return x.movedim((-2, -1), (0, 1)).contiguous().movedim((0, 1), (-2, -1))


def as_it_is(x: Tensor) -> Tensor:
    return x


def columns(x: Tensor) -> Tensor:
    """The same matrices, stored column by column."""
    return x.mT.contiguous().mT


LAYOUTS = [as_it_is, planes, columns]


@given(
    seed=seeds,
    batch=st.sampled_from([(), (1,), (5,), (2, 3)]),
    size=st.tuples(*[st.integers(1, 9)] * 3),
    layouts=st.tuples(*[st.sampled_from(LAYOUTS)] * 3),
)
def test_products_are_sums_over_entries(seed: int, batch: tuple[int, ...], size: tuple[int, ...], layouts: Any) -> None:
    a, k, b = size
    left, right, start = normal(seed, *batch, a, k), normal(seed + 1, *batch, k, b), normal(seed + 2, *batch, a, b)
    expected = np.einsum("...ik,...kj->...ij", left.numpy(), right.numpy())
    first, second, third = (layout(x) for layout, x in zip(layouts, (left, right, start), strict=True))
    np.testing.assert_allclose(small_product(first, second).numpy(), expected, atol=32 * EPS)
    np.testing.assert_allclose(subtract_product(third, first, second).numpy(), start.numpy() - expected, atol=32 * EPS)
    assert torch.equal(third, start)


@pytest.mark.parametrize("dim", [(-1,), (-2,), (-2, -1)])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("batch", [4, 5000])  # few, and many enough to be summed up column by column
def test_sums_over_rows_and_columns(dim: tuple[int, ...], layout: Any, batch: int) -> None:
    a, b = normal(0, batch, 5, 3), normal(1, batch, 5, 3)
    dot = (a.numpy() * b.numpy()).sum(dim, keepdims=True)
    np.testing.assert_allclose(inner_sum(layout(a), layout(b), dim).numpy(), dot, rtol=0, atol=64 * EPS)
    norm = np.sqrt((a.numpy() ** 2).sum(dim, keepdims=True))
    np.testing.assert_allclose(root_of_sum(layout(a), dim).numpy(), norm, atol=32 * EPS)


def test_products_with_the_batch_fastest_stay_so() -> None:
    """Nothing falls back to a product per matrix, nor to its layout."""
    a = planes(normal(0, 50, 4, 3))
    gram = small_product(a.mT, a)
    for result in (gram, small_product(a, gram), subtract_product(a, a, gram), polish(a)):
        assert result.stride(0) == 1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_products_and_sums_are_differentiable(layout: Any) -> None:
    a, b, c = (normal(seed, 3, 2, 2).requires_grad_() for seed in range(3))
    assert torch.autograd.gradcheck(lambda a, b: small_product(layout(a), layout(b)), (a, b))
    assert torch.autograd.gradcheck(lambda a, b, c: subtract_product(layout(c), layout(a), layout(b)), (a, b, c))
    assert torch.autograd.gradcheck(lambda a, b: inner_sum(layout(a), layout(b), (-2,)), (a, b))
    assert torch.autograd.gradgradcheck(lambda a: root_of_sum(layout(a), (-2, -1)), (a,))
    zero = torch.zeros(3, 2, 2, dtype=torch.float64, requires_grad=True)
    root_of_sum(layout(zero), (-2, -1)).sum().backward()
    assert torch.equal(torch.as_tensor(zero.grad), torch.zeros(3, 2, 2))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_norms_show_what_is_not_finite(layout: Any) -> None:
    a = torch.ones(3, 2, 2)
    a[0, 1, 0], a[1, 0, 1] = torch.nan, torch.inf
    norms = root_of_sum(layout(a), (-2, -1)).flatten().tolist()
    assert math.isnan(norms[0])
    assert norms[1:] == [math.inf, 2.0]


@given(seed=seeds, size=sizes, radius=st.sampled_from([0.02, 1.0, 40.0]), layout=st.sampled_from(LAYOUTS))
def test_newton_schulz_at_a_radius(seed: int, size: tuple[int, int], radius: float, layout: Any) -> None:
    """One radius for all matrices, or one per matrix: the polar factor times the radius."""
    values = 1 + 0.4 * torch.rand(6, size[1], dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    y = with_singular_values(seed, *size, values)
    left, _, right = np.linalg.svd(y.numpy(), full_matrices=False)
    for r in (radius, torch.full((6, 1, 1), radius, dtype=torch.float64)):
        result = polar_by_products(layout(radius * y), 0.96, r)
        np.testing.assert_allclose(result.numpy() / radius, left @ right, atol=64 * EPS)


@given(seed=st.integers(0, 99), relative=st.floats(0, 1), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_the_series_reaches_the_precision_that_its_limit_promises(seed: int, relative: float, dtype: torch.dtype):
    """Singular values up to the limit, rounding aside; twice the limit is eight times the error."""
    precision = torch.finfo(dtype).eps
    generator = torch.Generator().manual_seed(seed)
    u, _, vh = torch.linalg.svd(torch.randn(9, 4, dtype=torch.float64, generator=generator), full_matrices=False)
    excess = torch.tensor([0.0, 0.3, 0.7, 1.0], dtype=torch.float64) * relative * series_limit(precision)
    y = (u * (1 + excess).sqrt() @ vh).to(dtype)
    factor = polar_by_products(1.7 * y, series_limit(precision), 1.7).double() / 1.7
    assert float((factor - u @ vh).abs().max()) <= 8 * precision


@pytest.mark.parametrize("terms", [1, 2, 4])
def test_the_limit_of_the_series_is_sharp(terms: int) -> None:
    with mpmath.workdps(40):
        e = mpmath.mpf(series_limit(1e-12, terms))
        series = mpmath.taylor(lambda e: 1 / mpmath.sqrt(1 + e), 0, terms)
        assert float(abs(mpmath.polyval(series[::-1], e) - 1 / mpmath.sqrt(1 + e))) == pytest.approx(1e-12, rel=0.01)


def test_a_norm_over_millions_of_entries_is_exact_to_rounding():
    x = torch.randn(2048, 1024, generator=torch.Generator().manual_seed(0))
    expected = float(x.double().square().sum().sqrt())
    assert float(root_of_sum(x, (-2, -1))) == pytest.approx(expected, rel=1e-7)
