"""Robbins-Monro learning rates: the closed form, the theorem's conditions, and torch's scheduler contract."""

from __future__ import annotations

import math

import mpmath
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim.lr_scheduler import ConstantLR, SequentialLR

from fgo_geo.optim.schedules import RobbinsMonroLR

exponents = st.floats(min_value=0.5, max_value=1.0, exclude_min=True)
time_constants = st.floats(min_value=1e-3, max_value=1e6)
rates = st.floats(min_value=1e-6, max_value=1e2)


def sgd(*lrs: float | torch.Tensor) -> torch.optim.SGD:
    """One optimiser with a parameter group for each learning rate."""
    return torch.optim.SGD([{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr} for lr in lrs])


def advance(scheduler: RobbinsMonroLR, steps: int) -> None:
    for _ in range(steps):
        scheduler.optimizer.step()
        scheduler.step()


def exact_rate(initial: float, t: int, time_constant: float, exponent: float) -> mpmath.mpf:
    with mpmath.workdps(40):
        return mpmath.mpf(initial) / (1 + mpmath.mpf(t) / mpmath.mpf(time_constant)) ** mpmath.mpf(exponent)


@given(initial=rates, time_constant=time_constants, exponent=exponents, steps=st.integers(0, 60))
def test_rates_agree_with_mpmath_to_round_off(initial, time_constant, exponent, steps):
    optimizer = sgd(initial, 3 * initial)
    scheduler = RobbinsMonroLR(optimizer, time_constant, exponent)
    advance(scheduler, steps)
    for lr, start in zip(scheduler.get_last_lr(), (initial, 3 * initial), strict=True):
        exact = exact_rate(start, steps, time_constant, exponent)
        assert abs(lr - exact) <= 4 * torch.finfo(torch.float64).eps * exact
    assert [group["lr"] for group in optimizer.param_groups] == scheduler.get_last_lr()


def test_the_documented_defaults_are_the_harmonic_rate_with_half_life_ten():
    scheduler = RobbinsMonroLR(sgd(0.8))
    assert scheduler.get_last_lr() == [0.8]
    advance(scheduler, 10)
    assert scheduler.get_last_lr() == [0.4]
    advance(scheduler, 20)
    assert scheduler.get_last_lr() == [0.2]


@given(time_constant=time_constants, exponent=exponents, steps=st.integers(1, 200))
def test_partial_sums_obey_the_integral_bounds_of_both_conditions(time_constant, exponent, steps):
    """Sums of a decreasing function lie on the right sides of its integrals, whose limits are known.

    The integral of lr from 0 to n grows without bound when a <= 1, and that of lr^2 has the limit T / (2a - 1).
    """
    scheduler = RobbinsMonroLR(sgd(1.0), time_constant, exponent)
    total, squares = 0.0, 0.0
    for _ in range(steps):
        (lr,) = scheduler.get_last_lr()
        total, squares = total + lr, squares + lr**2
        advance(scheduler, 1)
    with mpmath.workdps(40):
        end, a = 1 + mpmath.mpf(steps) / time_constant, mpmath.mpf(exponent)
        integral = time_constant * (mpmath.log(end) if a == 1 else (end ** (1 - a) - 1) / (1 - a))
        limit_of_squares = 1 + time_constant / (2 * a - 1)
    assert total >= integral * (1 - 1e-12)
    assert squares <= limit_of_squares * (1 + 1e-12)


@pytest.mark.parametrize("time_constant", [0.0, -1.0, math.inf, math.nan])
def test_a_time_constant_that_is_no_time_scale_is_refused(time_constant):
    with pytest.raises(ValueError, match=f"time_constant must be positive and finite, got {time_constant}"):
        RobbinsMonroLR(sgd(0.1), time_constant=time_constant)


@pytest.mark.parametrize(
    ("exponent", "condition"),
    [
        (0.5, r"must exceed 1/2, got 0\.5: .*sum lr_t\^2 < inf"),
        (-1.0, r"must exceed 1/2, got -1\.0: .*sum lr_t\^2 < inf"),
        (math.nextafter(1.0, 2.0), r"at most 1, got 1\.0000000000000002: .*sum lr_t = inf"),
        (math.nan, "at most 1, got nan"),
    ],
)
def test_an_exponent_outside_the_theorem_names_the_broken_condition(exponent, condition):
    optimizer = sgd(0.1)
    with pytest.raises(ValueError, match=condition):
        RobbinsMonroLR(optimizer, exponent=exponent)
    assert "initial_lr" not in optimizer.param_groups[0]


@given(before=st.integers(0, 30), after=st.integers(0, 30))
def test_a_state_dict_round_trip_continues_bit_for_bit(before, after):
    straight = RobbinsMonroLR(sgd(0.1, 0.7), time_constant=3.0, exponent=0.6)
    advance(straight, before)
    resumed = RobbinsMonroLR(sgd(0.1, 0.7))
    resumed.load_state_dict(straight.state_dict())
    resumed.optimizer.load_state_dict(straight.optimizer.state_dict())
    advance(straight, after)
    advance(resumed, after)
    assert resumed.get_last_lr() == straight.get_last_lr()
    assert [g["lr"] for g in resumed.optimizer.param_groups] == straight.get_last_lr()


def test_last_epoch_continues_from_the_initial_rates_of_the_groups():
    optimizer = sgd(0.1)
    advance(RobbinsMonroLR(optimizer, time_constant=2.0), 5)
    scheduler = RobbinsMonroLR(optimizer, time_constant=2.0, last_epoch=5)
    assert scheduler.get_last_lr() == [0.1 / (1 + 6 / 2.0)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_tensor_learning_rate_is_filled_in_place(dtype):
    rate = torch.tensor(0.3, dtype=dtype)
    scheduler = RobbinsMonroLR(sgd(rate), time_constant=4.0, exponent=0.75)
    advance(scheduler, 7)
    assert scheduler.optimizer.param_groups[0]["lr"] is rate
    exact = exact_rate(torch.tensor(0.3, dtype=dtype).item(), 7, 4.0, 0.75)
    assert abs(rate.item() - exact) <= 2 * torch.finfo(dtype).eps * exact


@pytest.mark.filterwarnings("ignore:The epoch parameter in")  # torch 2.6 passes it itself
def test_it_follows_a_warm_up_in_sequential_lr():
    optimizer = sgd(0.4)
    warm_up = ConstantLR(optimizer, factor=0.1, total_iters=2)
    scheduler = SequentialLR(optimizer, [warm_up, RobbinsMonroLR(optimizer)], milestones=[2])
    rates = []
    for _ in range(5):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([0.04, 0.04, 0.4, 0.4 / 1.1, 0.4 / 1.2], rel=1e-15)
