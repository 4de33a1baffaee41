"""The step size of FG-SGD: eq. 7, its general form, and the trust region that follows."""

from __future__ import annotations

import itertools
import math

import mpmath
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from fgo_geo.optim import theorem_step_bound, theorem_step_scale
from fgo_geo.optim.step_size import momentum_gain

KNEE = math.sqrt(2) - 1
EPS = torch.finfo(torch.float64).eps

norms = st.floats(min_value=0, max_value=1e75)
rhos = st.floats(min_value=0, max_value=1e3)
curvatures = st.floats(min_value=0, max_value=1e6)
momenta = st.floats(min_value=0, max_value=0.99)


def double(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def exact_scale(norm: float, rho: float = 1.0, curvature: float = 1.0) -> mpmath.mpf:
    """τ as algorithm 1 of [Ozay2019] writes it, in 50 digits."""
    with mpmath.workdps(50):
        r, p, c = mpmath.mpf(norm), mpmath.mpf(rho), mpmath.mpf(curvature)
        gamma_2 = max((2 * p + r) ** 2, 1 + c * (p + r))
        gamma_1 = r**2 * gamma_2
        return mpmath.sqrt(max(mpmath.mpf(1), gamma_1))


@given(norm=norms, rho=rhos, curvature=curvatures)
@example(norm=0.0, rho=0.0, curvature=0.0)
@example(norm=1.0, rho=0.0, curvature=1.0)
@example(norm=0.05, rho=0.1, curvature=1e4)
def test_scale_agrees_with_the_algorithm_in_50_digits(norm, rho, curvature):
    scale = theorem_step_scale(double(norm), rho, curvature).item()
    exact = exact_scale(norm, rho, curvature)
    assert abs(scale - exact) <= 8 * EPS * exact


@given(norm=norms)
@example(norm=KNEE)
def test_defaults_are_equation_7(norm):
    scale = theorem_step_scale(double(norm)).item()
    assert scale == pytest.approx(math.sqrt(max(1.0, norm**2 * (2 + norm) ** 2)), rel=8 * EPS)


@given(norm=norms)
@example(norm=0.0)
@example(norm=KNEE * (1 - 1e-14))
@example(norm=KNEE * (1 + 1e-14))
def test_scale_is_one_up_to_the_knee_and_nowhere_else(norm):
    scale = theorem_step_scale(double(norm)).item()
    if norm < KNEE * (1 - 4 * EPS):
        assert scale == 1
    elif norm > KNEE * (1 + 4 * EPS):
        assert scale > 1
        assert scale == pytest.approx(norm * (2 + norm), rel=4 * EPS)


@given(norm=norms, rho=st.floats(0, 1), curvature=st.floats(0, 1))
def test_equation_7_covers_every_smaller_rho_and_curvature(norm, rho, curvature):
    """Γ₂ grows with ρ and c, so that eq. 7 is the largest divisor of all ρ <= 1 and c <= 1."""
    largest = theorem_step_scale(double(norm)).item()
    assert theorem_step_scale(double(norm), rho, curvature).item() <= largest * (1 + 4 * EPS)


def test_the_curvature_term_wins_near_the_minimum():
    """With ρ = 0 and c = 1, (2ρ + R)² is below 1 + c (ρ + R) up to the golden ratio."""
    below, above = 1.6, 1.7
    scale = theorem_step_scale(double(below, above), rho=0.0)
    torch.testing.assert_close(scale, double(below * math.sqrt(1 + below), above**2))


def test_curvature_may_differ_between_groups():
    norm, curvature = double(0.3, 0.3, 2.0), double(0.0, 40.0, 3.0)
    scale = theorem_step_scale(norm, 0.2, curvature)
    exact = [float(exact_scale(r, 0.2, c)) for r, c in zip(norm.tolist(), curvature.tolist(), strict=True)]
    torch.testing.assert_close(scale, double(*exact))


@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 3), (0,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scale_keeps_shape_and_type(shape, dtype):
    scale = theorem_step_scale(torch.ones(shape, dtype=dtype))
    assert scale.shape == shape
    assert scale.dtype == dtype
    assert bool((scale == 3).all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_the_float32_result_rounded_once(dtype):
    norm = torch.linspace(0, 200, 4001).to(dtype)
    expected = theorem_step_scale(norm.float()).to(dtype)
    torch.testing.assert_close(theorem_step_scale(norm), expected, rtol=0, atol=0)


def test_a_number_gives_a_tensor():
    assert theorem_step_scale(3.0).item() == 15
    assert theorem_step_scale(3, rho=1, curvature=1).item() == 15


def test_scale_is_differentiable_away_from_the_knee():
    norm = double(0.2, 0.9, 5.0).requires_grad_()
    torch.autograd.gradcheck(theorem_step_scale, (norm,))


@given(norm=norms, rho=rhos, curvature=curvatures)
@example(norm=1e75, rho=1.0, curvature=1.0)
@example(norm=1e-300, rho=0.0, curvature=0.0)
def test_no_gradient_makes_a_step_longer_than_the_bound(norm, rho, curvature):
    step = norm / theorem_step_scale(double(norm), rho, curvature).item()
    assert step <= theorem_step_bound(rho) * (1 + 8 * EPS)


@pytest.mark.parametrize("norm", [1e20, 1e30, float("inf")])
def test_a_gradient_whose_scale_overflows_makes_no_step(norm):
    scale = theorem_step_scale(torch.tensor(norm))
    assert scale.item() == math.inf
    assert 1e30 / scale.item() == 0


def test_the_bound_of_equation_7_is_attained_at_the_knee_only():
    assert theorem_step_bound() == pytest.approx(KNEE, rel=4 * EPS)
    grid = torch.linspace(0, 10, 100_001, dtype=torch.float64)
    steps = grid / theorem_step_scale(grid)
    assert grid[steps.argmax()].item() == pytest.approx(KNEE, abs=1e-4)
    assert steps.max().item() == pytest.approx(KNEE, abs=1e-4)
    closed_form = torch.minimum(grid, 1 / (2 + grid))
    torch.testing.assert_close(steps, closed_form)


@given(rho=st.floats(min_value=1, max_value=1e3), curvature=st.floats(0, 1))
def test_the_bound_is_attained_for_every_rho_of_at_least_one(rho, curvature):
    bound = theorem_step_bound(rho)
    step = bound / theorem_step_scale(double(bound), rho, curvature).item()
    with mpmath.workdps(40):
        exact = mpmath.sqrt(1 + mpmath.mpf(rho) ** 2) - mpmath.mpf(rho)
    assert step == pytest.approx(float(exact), rel=1e-9)


@given(rho=rhos)
@example(rho=1e3)
def test_the_bound_agrees_with_its_formula_in_40_digits(rho):
    with mpmath.workdps(40):
        exact = mpmath.sqrt(1 + mpmath.mpf(rho) ** 2) - mpmath.mpf(rho)
        assert abs(theorem_step_bound(rho) - exact) <= 8 * EPS * exact


def longest_direction(momentum: float, dampening: float, nesterov: bool, steps: int = 2000) -> float:
    """The longest step of torch's recursion when every gradient has length one and the same direction."""
    buffer, longest = None, 0.0
    for _ in range(steps):
        if momentum == 0:
            direction = 1.0
        else:
            buffer = 1.0 if buffer is None else momentum * buffer + (1 - dampening)
            direction = 1 + momentum * buffer if nesterov else buffer
        longest = max(longest, abs(direction))
    return longest


@given(momentum=momenta, dampening=st.floats(0, 1), nesterov=st.booleans())
@example(momentum=0.9, dampening=0.0, nesterov=False)
@example(momentum=0.9, dampening=0.95, nesterov=False)
@example(momentum=0.0, dampening=0.5, nesterov=False)
def test_momentum_gain_is_the_limit_of_aligned_gradients(momentum, dampening, nesterov):
    if nesterov:
        dampening = 0.0
    gain = momentum_gain(momentum, dampening, nesterov)
    assert gain == pytest.approx(longest_direction(momentum, dampening, nesterov), rel=1e-7)


@pytest.mark.parametrize(
    ("momentum", "dampening", "nesterov"),
    [c for c in itertools.product((0.3, 0.9), (0.0, 0.4, 1.7, -0.5), (False, True)) if not (c[2] and c[1])],
)
def test_no_sequence_of_gradients_exceeds_momentum_gain(momentum, dampening, nesterov):
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (200, 60), generator=generator, dtype=torch.float64) * 2 - 1
    buffer = signs[:, 0]
    longest = buffer.abs().max().item()
    for g in signs[:, 1:].unbind(1):
        buffer = momentum * buffer + (1 - dampening) * g
        direction = g + momentum * buffer if nesterov else buffer
        longest = max(longest, direction.abs().max().item())
    assert longest <= momentum_gain(momentum, dampening, nesterov) * (1 + 1e-12)


def test_momentum_of_one_has_no_bound():
    assert momentum_gain(1.0, dampening=0.0, nesterov=False) == math.inf


@pytest.mark.parametrize("value", [-1e-9, -1.0, math.inf, math.nan])
def test_bad_rho_and_curvature_are_refused(value):
    with pytest.raises(ValueError, match=r"rho must be a non-negative finite number, got"):
        theorem_step_scale(torch.ones(1), rho=value)
    with pytest.raises(ValueError, match=r"curvature must be a non-negative finite number, got"):
        theorem_step_scale(torch.ones(1), curvature=value)
    with pytest.raises(ValueError, match=r"rho must be a non-negative finite number, got"):
        theorem_step_bound(value)
