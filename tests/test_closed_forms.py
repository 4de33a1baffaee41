"""The closed forms for matrices with three columns, against singular value decompositions in double precision."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fgo_geo.linalg import polar_factor, spectral_norm_3

EPS = torch.finfo(torch.float32).eps

seeds = st.integers(0, 2**31)
exponents = st.integers(-9, 0)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def with_singular_values(seed: int, rows: int, values: Tensor) -> Tensor:
    """Matrices in single precision whose singular values are these up to rounding; both signs of determinant occur."""
    left = torch.linalg.qr(normal(seed, len(values), rows, 3)).Q
    right = torch.linalg.qr(normal(seed + 1, len(values), 3, 3)).Q
    return (left @ torch.diag_embed(values) @ right.mT).float()


def polar_oracle(x: Tensor) -> np.ndarray:
    u, _, vh = np.linalg.svd(x.double().numpy(), full_matrices=False)
    return u @ vh


# Structured matrices, which rounding noise does not help: rank one and two, zero, huge, tiny, far off the diagonal.
DEGENERATE = {
    "zero": torch.zeros(3, 3),
    "constant": torch.full((3, 3), -0.1),
    "single entry": torch.tensor([[0.0, 2.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]),
    "diagonal of rank two": torch.diag(torch.tensor([1.0, -2.0, 0.0])),
    "permuted, of rank two": torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0]]),
    "equal rows": torch.tensor([[1.0, 2.0, 3.0]]).expand(3, 3),
    "reflection": torch.diag(torch.tensor([1.0, 1.0, -1.0])),
    "huge": torch.full((3, 3), torch.finfo(torch.float32).max),
    "tiny": torch.full((3, 3), torch.finfo(torch.float32).smallest_normal),
    "subnormal": torch.diag(torch.tensor([1e-45, 1e-44, 1e-45])),
    "nearly of rank one": torch.ones(3, 3) + torch.diag(torch.tensor([EPS, 0.0, 0.0])),
}


@given(seeds, exponents, exponents)
def test_polar_factors_are_orthonormal_to_single_precision_whatever_the_condition(seed: int, second: int, third: int):
    values = torch.tensor([1.0, 10.0**second, 10.0 ** (second + third)], dtype=torch.float64).expand(16, 3)
    q = polar_factor(with_singular_values(seed, 3, values)).double()
    assert (q.mT @ q - torch.eye(3, dtype=torch.float64)).abs().max() <= 2 * EPS


@given(seeds, exponents)
def test_polar_factors_are_as_exact_as_the_input_determines_them(seed: int, second: int):
    values = torch.tensor([1.0, 10.0**second, 10.0**second / 3], dtype=torch.float64).expand(16, 3)
    x = with_singular_values(seed, 3, values)
    sensitivity = 1 + EPS * 10.0**-second  # how far an error of 1e-16 in x moves the factor, in units of EPS
    if second > -7:
        np.testing.assert_allclose(polar_factor(x).double().numpy(), polar_oracle(x), atol=sensitivity * EPS, rtol=0)


@pytest.mark.parametrize("x", DEGENERATE.values(), ids=DEGENERATE)
def test_degenerate_matrices_go_to_one_of_the_nearest_points(x: Tensor):
    q = polar_factor(x).double()
    assert (q.mT @ q - torch.eye(3, dtype=torch.float64)).abs().max() <= 2 * EPS
    nuclear = float(np.linalg.svd(x.double().numpy())[1].sum())  # the largest inner product with an orthogonal matrix
    assert float((q * x.double()).sum()) >= nuclear * (1 - 2 * EPS)


def test_the_closed_form_is_chosen_for_single_precision_only(monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("no decomposition expected")

    x = normal(0, 4, 3, 3)
    monkeypatch.setattr(torch.linalg, "svd", refuse)
    polar_factor(x.float())
    for other in (x, x.float()[..., :2], normal(0, 4, 5, 3).float()):
        with pytest.raises(AssertionError, match="no decomposition expected"):
            polar_factor(other)


@given(seeds, exponents)
def test_the_derivative_is_that_of_the_decomposition(seed: int, third: int):
    values = torch.tensor([1.0, 0.8, 10.0**third], dtype=torch.float64).expand(8, 3)
    x = with_singular_values(seed, 3, values)
    grad = normal(seed + 2, 8, 3, 3).float()
    fast, exact = x.clone().requires_grad_(), x.double().requires_grad_()
    polar_factor(fast).backward(grad)
    polar_factor(exact).backward(grad.double())
    torch.testing.assert_close(fast.grad.double(), exact.grad, atol=16 * EPS, rtol=0)


@pytest.mark.parametrize("name", ["zero", "constant", "single entry", "huge", "subnormal"])
def test_derivatives_at_degenerate_matrices_are_not_nan(name: str):
    for function in (polar_factor, spectral_norm_3):
        x = DEGENERATE[name].clone().requires_grad_()
        (grad,) = torch.autograd.grad(function(x).sum(), x)
        assert not grad.isnan().any()


@given(seeds, st.integers(3, 7), exponents, exponents)
def test_spectral_norms_are_exact_to_rounding(seed: int, rows: int, second: int, third: int):
    values = torch.tensor([1.0, 1 - 10.0**second, 10.0**third], dtype=torch.float64).expand(16, 3)
    x = with_singular_values(seed, rows, values) * 10.0**second
    expected = np.linalg.svd(x.double().numpy(), compute_uv=False)[:, 0]
    np.testing.assert_allclose(spectral_norm_3(x).double().numpy(), expected, rtol=EPS, atol=0)


@pytest.mark.parametrize("x", DEGENERATE.values(), ids=DEGENERATE)
def test_spectral_norms_of_degenerate_matrices(x: Tensor):
    if x.abs().max() < torch.finfo(torch.float32).max:
        expected = float(np.linalg.svd(x.double().numpy(), compute_uv=False)[0])
        assert float(spectral_norm_3(x)) == pytest.approx(expected, rel=EPS, abs=1e-45)


@given(seeds, st.integers(3, 7))
def test_the_derivative_of_a_simple_spectral_norm(seed: int, rows: int):
    x = with_singular_values(seed, rows, torch.tensor([2.0, 1.0, 0.5], dtype=torch.float64).expand(8, 3))
    u, _, vh = np.linalg.svd(x.double().numpy(), full_matrices=False)
    x.requires_grad_()
    (grad,) = torch.autograd.grad(spectral_norm_3(x).sum(), x)
    np.testing.assert_allclose(grad.numpy(), u[:, :, :1] * vh[:, :1, :], atol=8 * EPS, rtol=0)


@given(seeds, st.integers(1, 3))
def test_the_derivative_of_a_repeated_spectral_norm_is_a_subgradient(seed: int, multiplicity: int):
    values = torch.tensor([1.0 if i < multiplicity else 0.25 for i in range(3)], dtype=torch.float64).expand(8, 3)
    x = with_singular_values(seed, 3, values).requires_grad_()
    norm = spectral_norm_3(x)
    (grad,) = torch.autograd.grad(norm.sum(), x)
    # The subdifferential of a norm: <G, x> = ‖x‖, and the dual norm of G is at most one.
    torch.testing.assert_close((grad * x).sum((-2, -1)), norm, atol=8 * EPS, rtol=0)
    assert np.linalg.svd(grad.numpy(), compute_uv=False).sum(-1).max() <= 1 + 8 * EPS


def test_spectral_norm_3_names_what_it_cannot_take():
    for x in (torch.ones(3, 2), torch.ones(3, 3, dtype=torch.float64)):
        with pytest.raises(ValueError, match=r"float32 matrices with three columns, got torch.float\d+ of shape"):
            spectral_norm_3(x)


@pytest.mark.parametrize("function", [polar_factor, spectral_norm_3])
def test_nan_stays_nan_and_in_its_matrix(function):
    x = normal(0, 3, 3, 3).float()
    y = x.clone()
    y[1, 0, 2] = torch.nan
    assert function(y)[1].isnan().all()
    assert torch.equal(function(y)[[0, 2]], function(x)[[0, 2]])


def test_second_derivatives_of_the_spectral_norm_are_refused():
    x = normal(0, 3, 3).float().requires_grad_()
    norm = spectral_norm_3(x)
    (grad,) = torch.autograd.grad(norm.square().sum() + (x * norm).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="a first derivative only"):
        grad.sum().backward()


@pytest.mark.parametrize("function", [polar_factor, spectral_norm_3])
def test_batches_vmap_and_compilation(function):
    x = normal(0, 2, 5, 3, 3).float().requires_grad_()
    expected = function(x)
    torch.testing.assert_close(torch.vmap(function)(x), expected)
    torch.testing.assert_close(function(x[1, 2]), expected[1, 2])
    assert function(x[:0]).shape == expected[:0].shape
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    weights = torch.randn_like(expected)
    grads = [torch.autograd.grad((f(x) * weights).sum(), x)[0] for f in (function, compiled)]
    torch.testing.assert_close(grads[1], grads[0])
