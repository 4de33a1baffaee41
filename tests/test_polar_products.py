"""The polar factor of large matrices by products alone, and its derivatives, against singular value decompositions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fgo_geo.linalg import chebyshev, polar_factor
from fgo_geo.linalg.chebyshev import inverse_root_polynomial, polynomial, solve_skew, spectral_interval


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def with_spectrum(seed: int, rows: int, values: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix with these singular values, and its polar factor."""
    columns = len(values)
    u, v = (torch.linalg.qr(normal(seed + k, n, columns))[0] for k, n in enumerate((rows, columns)))
    return u * values @ v.mT, u @ v.mT


@pytest.fixture
def eigenvectors(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the matrices whose eigenvectors are computed."""
    sizes: list[int] = []
    real = torch.linalg.eigh

    def counted(a: Tensor) -> tuple[Tensor, Tensor]:
        sizes.append(a.shape[-1])
        return real(a)

    monkeypatch.setattr(torch.linalg, "eigh", counted)
    return sizes


COLUMNS = 160  # of the narrowest matrices whose polar factors are computed by products


# -- the interval, the polynomial and the equation ---------------------------------------------------------------------


@given(st.integers(0, 99), st.integers(1, 60), st.floats(1e-12, 2.0), st.sampled_from(["even", "an outlier", "equal"]))
def test_the_interval_holds_the_eigenvalues(seed: int, size: int, width: float, shape: str) -> None:
    values = torch.zeros(size, dtype=torch.float64)
    if shape == "even":
        values = torch.linspace(-width, width, size, dtype=torch.float64)
    elif shape == "an outlier":
        values[-1] = width
    q, _ = torch.linalg.qr(normal(seed, size, size))
    low, high = spectral_interval((q * values) @ q.mT)
    slack = 1e-12 + 0.02 * width  # of the 5 % that are added, most may be needed
    assert low - slack / 50 <= float(values.min()) + 1e-12
    assert high + slack / 50 >= float(values.max()) - 1e-12
    assert high - low <= 1.1 * float(values.max() - values.min()) + slack


def test_the_interval_of_a_batch_and_of_nan() -> None:
    low, high = spectral_interval(torch.stack([torch.eye(5), -2 * torch.eye(5)]))
    assert -2.2 <= low <= -2
    assert 1 <= high <= 1.2
    assert all(math.isnan(end) for end in spectral_interval(torch.full((4, 4), torch.nan)))


@given(st.floats(0.0, 0.7), st.floats(1e-14, 1e-3))
def test_the_polynomial_reaches_its_precision(spread: float, precision: float) -> None:
    coefficients = inverse_root_polynomial(spread, precision)
    t = np.linspace(-spread, spread, 501)
    error = np.abs(np.polynomial.polynomial.polyval(t, coefficients) * np.sqrt(1 + t) - 1).max()
    assert error <= precision + 1e-13  # rounding of the powers


@given(st.integers(0, 99), st.sampled_from([1, 2, 4, 6, 9, 12, 16, 20]))
def test_a_polynomial_in_blocks_is_the_sum_of_its_powers(seed: int, degree: int) -> None:
    t, coefficients = normal(seed, 2, 3, 3) / 3, normal(seed + 1, degree + 1).tolist()
    expected = sum(c * torch.linalg.matrix_power(t, k) for k, c in enumerate(coefficients) if k)
    torch.testing.assert_close(polynomial(t, coefficients), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("spread", [0.0, 1e-4, 0.1, 0.5, 0.7])
def test_the_skew_equation(spread: float, dtype: torch.dtype) -> None:
    values = torch.linspace(1 - spread, 1 + spread, 20, dtype=torch.float64).sqrt()
    q, _ = torch.linalg.qr(normal(0, 20, 20))
    h, z = ((q * v) @ q.mT for v in (values, 1 / values))
    k = normal(1, 20, 20)
    k = (k - k.mT).to(dtype)
    solution = solve_skew(z.to(dtype), k, spread).double()
    torch.testing.assert_close(h @ solution + solution @ h, k.double(), rtol=0, atol=100 * torch.finfo(dtype).eps)
    torch.testing.assert_close(solution, -solution.mT, rtol=0, atol=0)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("spread", "products"), [(0.0, 1), (1e-4, 1), (0.007, 2), (0.1, 5), (0.4, 8)])
def test_the_skew_equation_is_exact_after_few_products(
    spread: float, products: int, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = []
    monkeypatch.setattr(chebyshev, "small_product", lambda a, b: count.append(1) or a @ b)
    ends = torch.tensor([1 - spread, 1 + spread], dtype=torch.float64).sqrt()
    values = ends[torch.randint(2, (60,), generator=torch.Generator().manual_seed(seed))]  # as far apart as can be
    q, _ = torch.linalg.qr(normal(seed, 60, 60))
    k = normal(seed + 1, 60, 60)
    k = (k - k.mT).float()
    expected = q @ ((q.mT @ k.double() @ q) / (values[:, None] + values)) @ q.mT
    solution = solve_skew(((q / values) @ q.mT).float(), k, spread).double()
    assert float((solution - expected).norm() / expected.norm()) <= 2.0 * torch.finfo(torch.float32).eps
    assert len(count) == products


# -- the polar factor --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("condition", [1.0, 1.0001, 1.05, 1.3, 1.45])
@pytest.mark.parametrize("rows", [COLUMNS, 300])
def test_products_give_the_polar_factor(
    rows: int, condition: float, dtype: torch.dtype, eigenvectors: list[int]
) -> None:
    for seed, values in enumerate(
        [torch.linspace(1, condition, COLUMNS), torch.cat([torch.ones(COLUMNS - 1), torch.full((1,), condition)])]
    ):
        x, expected = with_spectrum(seed, rows, 0.03 * values.double())
        q = polar_factor(x.to(dtype)).double()
        eps = torch.finfo(dtype).eps
        assert float((q - expected).abs().max()) <= 8 * eps
        assert float((q.mT @ q - torch.eye(COLUMNS)).abs().max()) <= (16 if dtype == torch.float32 else 45) * eps
    assert eigenvectors == []


def test_what_is_too_wide_for_products_takes_eigenvectors(eigenvectors: list[int]) -> None:
    x, expected = with_spectrum(0, 180, torch.linspace(1, 1.7, 170).double())
    torch.testing.assert_close(polar_factor(x), expected, rtol=0, atol=1e-13)
    assert eigenvectors == [170]


def test_an_eigenvalue_that_is_missed_takes_eigenvectors(eigenvectors: list[int]) -> None:
    """Lanczos' iteration never sees an eigenvector that is orthogonal to its start."""
    start = torch.randn(COLUMNS, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    unseen = normal(1, COLUMNS, 1)
    unseen -= start * ((start.mT @ unseen) / (start.mT @ start))
    v, _ = torch.linalg.qr(torch.cat([unseen, normal(2, COLUMNS, COLUMNS - 1)], -1))
    u, _ = torch.linalg.qr(normal(3, 180, COLUMNS))
    values = torch.cat([torch.tensor([1.3]), torch.linspace(0.95, 1.05, COLUMNS - 1)]).double()
    torch.testing.assert_close(polar_factor(u * values @ v.mT), u @ v.mT, rtol=0, atol=2e-14)
    assert eigenvectors == [COLUMNS]


def test_scales_of_a_batch_may_differ(eigenvectors: list[int]) -> None:
    pairs = [
        with_spectrum(seed, 190, scale * torch.linspace(1, 1.2, 165).double()) for seed, scale in ((0, 1e-3), (1, 50.0))
    ]
    q = polar_factor(torch.stack([x for x, _ in pairs]))
    torch.testing.assert_close(q, torch.stack([expected for _, expected in pairs]), rtol=0, atol=1e-14)
    assert eigenvectors == []


@pytest.mark.parametrize("bad", [0.0, torch.nan, torch.inf])
def test_no_number_comes_out_of_what_is_none(bad: float) -> None:
    x = torch.full((190, 180), bad)
    if bad == 0:
        q = polar_factor(x)
        torch.testing.assert_close(q.mT @ q, torch.eye(180), rtol=0, atol=1e-5)
    else:
        with pytest.raises(RuntimeError):
            polar_factor(x)


# -- derivatives -------------------------------------------------------------------------------------------------------


@settings(max_examples=3)
@given(st.integers(0, 99), st.sampled_from([(170, 160), (160, 160), (200, 165)]), st.floats(1.0, 1.45))
def test_gradients_of_every_order(seed: int, size: tuple[int, int], condition: float) -> None:
    """Along random directions, as there are too many entries."""
    rows, columns = size
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(torch.linalg, "eigh")
        x, _ = with_spectrum(seed, rows, torch.linspace(1, condition, columns).double())
        x = torch.stack([x, 3 * x]).requires_grad_()
        assert torch.autograd.gradcheck(polar_factor, (x,), check_forward_ad=True, fast_mode=True)
        assert torch.autograd.gradgradcheck(polar_factor, (x,), fast_mode=True)


def gradient(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """The gradient of ``<weight, Q>`` at ``x = U S Vᵀ`` for ``Q = U Vᵀ``.

    Q moves by the skew part of ``Uᵀ dx V`` over sums of singular values, and by what of ``dx`` the columns of U do not
    span.
    """
    u, s, vh = np.linalg.svd(x, full_matrices=False)
    inside = u.T @ weight @ vh.T
    outside = weight @ vh.T - u @ inside
    return (u @ ((inside - inside.T) / (s[:, None] + s)) + outside / s) @ vh


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("condition", [1.0, 1.2, 1.45])
@pytest.mark.parametrize("rows", [COLUMNS, 400])
def test_gradients_are_those_by_singular_values(
    rows: int, condition: float, dtype: torch.dtype, eigenvectors: list[int]
) -> None:
    x, _ = with_spectrum(0, rows, torch.linspace(1, condition, COLUMNS).double())
    weight = normal(7, rows, COLUMNS)
    by_products = x.to(dtype, copy=True).requires_grad_()
    (polar_factor(by_products) * weight.to(dtype)).sum().backward()
    assert eigenvectors == []
    exact = gradient(x.numpy(), weight.numpy())
    bound = 40 * torch.finfo(dtype).eps * np.abs(exact).max()
    np.testing.assert_allclose(by_products.grad.double().numpy(), exact, rtol=0, atol=bound)
