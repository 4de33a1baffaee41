"""The step size of FG-SGD: eq. 7, its general form, and the trust region that follows."""

from __future__ import annotations

import itertools
import math

import geoopt
import mpmath
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from parameters import on
from torch import Tensor

from fgo_geo import Oblique, ProductOfGroups, RiemannianFGSGD, ScaledSphere, kernels
from fgo_geo.grouping import collection
from fgo_geo.optim import RobbinsMonroLR, theorem_step_bound, theorem_step_scale
from fgo_geo.optim.step_size import SPIKE, momentum_gain, step_scale
from fgo_geo.paths.rules import StepOptions

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


# -- which norm τ is computed from -----------------------------------------------------------------------------------


def noisy_circle(norm: str, seed: int, steps: int = 2_500) -> float:
    """The angle, in degrees, at which steps on the unit circle end. The minimum of the expected loss is at angle 0.

    The loss is ``E_z[-<(0.2, z), x>]`` with ``z = 3`` with probability 0.1, else ``-1/3``, which has mean zero.
    """
    generator = torch.Generator().manual_seed(seed)
    x = geoopt.ManifoldParameter(torch.tensor([0.5, 0.5], dtype=torch.float64).sqrt(), manifold=ScaledSphere())
    options = {"step_size": "constant"} if norm == "constant" else {"norm": norm}
    optimizer = RiemannianFGSGD([x], lr=0.3, **options)
    scheduler = RobbinsMonroLR(optimizer)
    for draw in torch.rand(steps, generator=generator).tolist():
        x.grad = torch.tensor([-0.2, -3.0 if draw < 0.1 else 1 / 3], dtype=torch.float64)
        optimizer.step()
        scheduler.step()
    return math.degrees(math.atan2(*x.detach().flip(0).tolist()))


def test_the_norm_of_the_batch_biases_a_noisy_step_and_that_of_earlier_batches_does_not():
    """The counterexample of the mathematics: τ(batch) shortens the rare large gradients more than the small ones."""
    ends = {norm: [noisy_circle(norm, seed) for seed in range(4)] for norm in ("batch", "constant", "running")}
    assert max(ends["batch"]) < -40
    for norm in ("constant", "running"):
        assert min(ends[norm]) > -20
        assert abs(sum(ends[norm])) < 4 * 15


def test_a_spike_is_shortened_to_the_bound_and_counted():
    x = geoopt.ManifoldParameter(torch.tensor([1.0, 0.0], dtype=torch.float64), manifold=ScaledSphere())
    optimizer = RiemannianFGSGD([x], lr=0.01, norm="running")
    for _ in range(20):
        x.grad = 0.1 * x.detach().flip(0) * torch.tensor([-1.0, 1.0], dtype=torch.float64)
        optimizer.step()
    assert optimizer.shortened_gradients() == 0
    mean = optimizer.state[x]["norm_squared"].clone()
    torch.testing.assert_close(mean.sqrt(), torch.tensor([0.1], dtype=torch.float64))
    before = x.detach().clone()
    x.grad = 1e4 * x.detach().flip(0) * torch.tensor([-1.0, 1.0], dtype=torch.float64)
    optimizer.step()
    turned = 2 * math.asin(float((x.detach() - before).norm()) / 2)
    assert math.tan(turned) == pytest.approx(SPIKE * theorem_step_bound() * 0.01, rel=1e-9)
    assert optimizer.shortened_gradients() == 1
    assert float(optimizer.state[x]["norm_squared"]) < 2.0  # what was shortened, not 1e8, enters the mean


def test_the_running_norm_is_kept_per_group_and_in_checkpoints():
    weights = [on_product(seed) for seed in (1, 1)]
    optimizers = [RiemannianFGSGD([w], lr=0.1, momentum=0.9, norm="running") for w in weights]
    generator = torch.Generator().manual_seed(0)
    for step in range(6):
        grad = torch.randn(weights[0].shape, generator=generator, dtype=torch.float64)
        if step == 3:
            again = RiemannianFGSGD([weights[1]], lr=0.1, momentum=0.9, norm="running")
            again.load_state_dict(optimizers[1].state_dict())
            optimizers[1] = again
        for weight, optimizer in zip(weights, optimizers, strict=True):
            weight.grad = grad.clone()
            optimizer.step()
    torch.testing.assert_close(*weights, rtol=0, atol=0)
    mean = optimizers[0].state[weights[0]]["norm_squared"]
    assert mean.shape == (weights[0].manifold.n_groups,)
    assert bool((mean > 0).all())


def test_the_running_norm_of_blocks_that_several_paths_step_is_that_of_one_path():
    """The sweeps take some groups of the matrix, the reference the others; each writes the norms of its own."""
    means: list[Tensor] = []
    for path in ("auto", "reference"):
        blocks = collection(32, 48, "pio", ("sphere", "stiefel"), components="block")
        manifold = ProductOfGroups(blocks, (32, 48))
        start = manifold.random(32, 48, generator=torch.Generator().manual_seed(0))
        weight = geoopt.ManifoldParameter(start, manifold=manifold)
        optimizer = RiemannianFGSGD([weight], lr=0.1, norm="running")
        generator = torch.Generator().manual_seed(1)
        with kernels.use_path(path):
            for step in range(3):
                weight.grad = (1 + step) * torch.randn(32, 48, generator=generator)
                optimizer.step()
        means.append(optimizer.state[weight]["norm_squared"])
    assert bool((means[0] > 0).all())
    torch.testing.assert_close(*means, rtol=1e-4, atol=0)


@pytest.mark.parametrize("form", ["by hand", "product"])
def test_the_largest_curvature_of_a_group_enters_its_step(form):
    """A group of spheres of several radii has the curvature of the smallest one."""
    radii = torch.tensor([[0.05, 0.5, 2.0], [1.0, 0.1, 3.0]], dtype=torch.float64)
    if form == "by hand":
        manifold, smallest = Oblique(radii), double(0.05)
    else:
        manifold = ProductOfGroups(collection(2, 3, "po", ("oblique",)), (2, 3, 3, 3), radii)
        smallest = double(0.05, 0.1)
    weight = geoopt.ManifoldParameter(manifold.random(2, 3, 3, 3, dtype=torch.float64), manifold=manifold)
    optimizer = RiemannianFGSGD([weight], lr=1e-3, rho=0.1, curvature="manifold")
    grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weight.grad = manifold.proju(weight.detach(), grad)
    norms = weight.grad.norm() if form == "by hand" else weight.grad.flatten(1).norm(dim=1)
    weight.grad /= norms.reshape(-1, *(1,) * 3) * 4
    optimizer.step()
    exact = [float(exact_scale(0.25, 0.1, r**-2)) for r in smallest.tolist()]
    assert exact[0] > 2
    torch.testing.assert_close(optimizer.step_scales()[weight], double(*exact), rtol=1e-9, atol=0)


@pytest.mark.parametrize("angle", [0.01, 0.2])
@pytest.mark.parametrize("magnitude", [1e-3, 1.0, 1e3])
def test_an_angle_turns_every_group_by_it(angle, magnitude):
    weight = on_product(3)
    manifold = weight.manifold
    before = weight.detach().clone()
    optimizer = RiemannianFGSGD([weight], lr=0.5, step_size="angle", angle=angle)
    grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    weight.grad = magnitude * grad
    optimizer.step()
    # The length of the tangent step is angle * lr * ‖w_G‖; retractions agree with it to second order.
    tangent = manifold.proju(before, weight.detach() - before)
    turned = manifold.group_norm(before, tangent) / manifold.group_norm(before, before)
    torch.testing.assert_close(turned, torch.full_like(turned, 0.5 * angle), rtol=2 * angle**2 + 1e-6, atol=0)


def on_product(seed: int) -> geoopt.ManifoldParameter:
    manifold = ProductOfGroups(collection(4, 3, "pio", ("sphere", "oblique", "stiefel")), (4, 3, 3, 3), 0.7)
    generator = torch.Generator().manual_seed(seed)
    return geoopt.ManifoldParameter(manifold.random(4, 3, 3, 3, dtype=torch.float64, generator=generator))


def test_a_changed_option_changes_the_curvature_of_the_groups():
    """A sphere of radius 0.01 has the curvature 10,000; on the manifold of radius one it is one."""
    w = on(ScaledSphere(0.01), 8, seed=0)
    optimizer = RiemannianFGSGD([w], lr=1e-6, curvature="manifold")
    scales = []
    for invariant in (False, True):
        optimizer.param_groups[0]["radius_invariant"] = invariant
        fresh = RiemannianFGSGD(
            [on(ScaledSphere(0.01), 8, seed=0)], lr=1e-6, curvature="manifold", radius_invariant=invariant
        )
        for own in (optimizer, fresh):
            (param,) = own.param_groups[0]["params"]
            param.grad = torch.ones_like(param)
            own.step()
            scales.append(float(own.step_scales()[param].max()))
    assert scales[0] == pytest.approx(scales[1])
    assert scales[2] == pytest.approx(scales[3])
    assert scales[0] > 10 * scales[2]


def test_a_running_norm_learns_nothing_from_gradients_that_are_skipped():
    w = on(ScaledSphere(), 8, seed=0)
    optimizer = RiemannianFGSGD([w], lr=0.01, norm="running", check_finite=False)
    for value in (math.nan, 1.0, math.inf, 1.0):
        before = w.detach().clone()
        w.grad = torch.full_like(w, value)
        optimizer.step()
        moved = 2 * math.asin(min(1.0, float((w.detach() - before).norm()) / 2))
        assert moved <= 0.01 * theorem_step_bound() * (1 + 1e-4)
    assert optimizer.shortened_gradients() == 0
    assert optimizer.skipped_groups() == 2


def test_an_angle_needs_the_norms():
    with pytest.raises(ValueError, match="step_size='angle' needs the norms of the groups"):
        step_scale(double(1.0), StepOptions(lr=0.1, step_size="angle"), None, None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": "running", "step_size": "constant"}, 'norm="running" is for step_size="theorem", got .*constant'),
        (
            {"radius_invariant": True, "step_size": "angle"},
            "radius_invariant is for .* as an angle is the same at every",
        ),
    ],
)
def test_options_that_exclude_each_other(options, message):
    x = on(ScaledSphere(), 3)
    with pytest.raises(ValueError, match=message):
        RiemannianFGSGD([x], lr=0.1, **options)
