"""What RiemannianFGSGD refuses, before anything has changed, and which gradients it leaves out."""

from __future__ import annotations

import copy
import math
import re

import geoopt
import numpy as np
import pytest
import torch
from parameters import assert_same, network, on, plain, run, set_gradients, values
from torch import Tensor, nn

from fgo_geo import Oblique, RiemannianFGSGD, ScaledSphere, Stiefel, constrain, unconstrain
from fgo_geo.grouping import collection
from fgo_geo.manifolds import ProductOfGroups


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -0.1}, "lr must be at least 0, got -0.1"),
        ({"lr": math.nan}, "lr must be at least 0, got nan"),
        ({"lr": torch.tensor(-0.1)}, "lr must be at least 0, got tensor(-0.1000)"),
        ({"lr": torch.ones(2)}, "lr must be a number or hold one element, got shape (2,)"),
        ({"momentum": -0.9}, "momentum must be at least 0, got -0.9"),
        ({"weight_decay": -1.0}, "weight_decay must be at least 0, got -1.0"),
        ({"rho": -1.0}, "rho must be at least 0, got -1.0"),
        ({"rho": math.inf}, "rho must be finite, got inf"),
        ({"lr": math.inf}, "lr must be finite, got inf"),
        ({"nesterov": True}, "nesterov needs momentum > 0 and dampening = 0, got momentum=0.0, dampening=0.0"),
        (
            {"nesterov": True, "momentum": 0.9, "dampening": 0.1},
            "nesterov needs momentum > 0 and dampening = 0, got momentum=0.9, dampening=0.1",
        ),
        ({"step_size": "eq7"}, "step_size must be one of ('theorem', 'constant', 'angle'), got 'eq7'"),
        ({"update": "cayley"}, "update must be one of ('retraction', 'exponential'), got 'cayley'"),
        ({"curvature": "own"}, "curvature must be None, \"manifold\" or a finite number of at least 0, got 'own'"),
        ({"curvature": -2.0}, 'curvature must be None, "manifold" or a finite number of at least 0, got -2.0'),
        ({"curvature": math.inf}, 'curvature must be None, "manifold" or a finite number of at least 0, got inf'),
        ({"stabilize": 0}, "stabilize must be None or a positive integer, got 0"),
        ({"stabilize": 2.5}, "stabilize must be None or a positive integer, got 2.5"),
        ({"fused": True, "foreach": True}, "fused and foreach exclude each other, got True for both"),
    ],
)
def test_bad_options_are_refused_by_the_constructor_and_for_new_groups(options, message):
    with pytest.raises(ValueError, match="RiemannianFGSGD: " + re.escape(message)):
        RiemannianFGSGD([plain(3)], **({"lr": 0.1} | options))
    optimizer = RiemannianFGSGD([plain(3)], lr=0.1)
    with pytest.raises(ValueError, match=re.escape(message)):
        optimizer.add_param_group({"params": [plain(3)], **options})
    assert len(optimizer.param_groups) == 1


def off(manifold: geoopt.Manifold, *shape: int, by: float = 0.1, dtype: torch.dtype = torch.float64) -> Tensor:
    """A parameter that misses its manifold by a factor."""
    return geoopt.ManifoldParameter((1 + by) * on(manifold, *shape, dtype=dtype).detach(), manifold=manifold)


@pytest.mark.parametrize(
    ("manifold", "shape", "violation"),
    [
        (ScaledSphere(0.5, ndim=2), (4, 3, 3), "0.1"),
        (Oblique(), (5, 3), "0.1"),
        (Stiefel(2.0), (5, 3), "0.21"),
        (ProductOfGroups(collection(4, 2, "pi", ("sphere", "stiefel")), (4, 2, 3, 3)), (4, 2, 3, 3), "0.21"),
    ],
)
def test_a_parameter_off_its_manifold_is_refused_and_the_remedy_works(manifold, shape, violation):
    param = off(manifold, *shape)
    message = f"violation {violation}, expected at most 0.001; move it there by `with torch.no_grad(): param.proj_()`"
    with pytest.raises(ValueError, match=re.escape(message)):
        RiemannianFGSGD([param], lr=0.1)
    with torch.no_grad():
        param.proj_()
    run(RiemannianFGSGD([param], lr=0.1), 1)


def test_the_refusal_names_the_parameter_and_leaves_the_optimizer_as_it_was():
    optimizer = RiemannianFGSGD([("bias", plain(3))], lr=0.1)
    group = {"params": [("good", on(Oblique(), 5, 3)), ("bad", off(Oblique(), 4, 2))]}
    message = "'bad', param_groups[1]['params'][1] of shape (4, 2) does not lie on its Oblique(radius=1) manifold"
    with pytest.raises(ValueError, match=re.escape(message)):
        optimizer.add_param_group(group)
    assert len(optimizer.param_groups) == 1
    run(optimizer, 1)


def test_points_are_checked_as_closely_as_their_type_allows():
    for dtype in (torch.float16, torch.bfloat16):
        RiemannianFGSGD([off(Stiefel(), 5, 3, by=torch.finfo(dtype).eps, dtype=dtype)], lr=0.1)
    with pytest.raises(ValueError, match="does not lie on its"):
        RiemannianFGSGD([off(Stiefel(), 5, 3, by=0.2, dtype=torch.bfloat16)], lr=0.1)
    with pytest.raises(ValueError, match="15 non-finite entries of 15"):
        RiemannianFGSGD([off(Stiefel(), 5, 3, by=math.nan)], lr=0.1)


def test_a_sparse_gradient_is_refused_before_anything_changes():
    embedding = nn.Embedding(5, 3, sparse=True)
    embedding.weight = on(ScaledSphere(), 5, 3, dtype=torch.float32)
    first = plain(3)
    optimizer = RiemannianFGSGD([("first", first), ("table", embedding.weight)], lr=0.1)
    before = values([first, embedding.weight])
    embedding(torch.tensor([1, 3])).sum().backward()
    first.grad = torch.ones(3, dtype=torch.float64)
    message = (
        "the gradient of 'table', param_groups[0]['params'][1] of shape (5, 3) is sparse, expected a dense one; "
        "build the layer with sparse=False"
    )
    with pytest.raises(RuntimeError, match=re.escape(message)):
        optimizer.step()
    assert_same([first, embedding.weight], before)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("position", range(6))
def test_a_gradient_that_is_not_finite_is_refused_before_anything_changes(value, position):
    params = network()
    names = [f"layer{number}" for number in range(len(params))]
    optimizer = RiemannianFGSGD(
        [
            {"params": list(zip(names[:3], params[:3], strict=True))},
            {"params": list(zip(names[3:], params[3:], strict=True))},
        ],
        lr=0.1,
        momentum=0.9,
    )
    run(optimizer, 1)
    before, state, scales = values(params), copy.deepcopy(optimizer.state_dict()), optimizer.step_scales()
    set_gradients(params, 2)
    params[position].grad.view(-1)[-1] = value
    where = f"'layer{position}', param_groups[{position // 3}]['params'][{position % 3}]"
    with pytest.raises(FloatingPointError, match=re.escape(where) + ".*not finite.*no parameter was changed"):
        optimizer.step()
    assert_same(params, before)
    assert_same(optimizer.step_scales().values(), scales.values())
    after = optimizer.state_dict()
    assert after["param_groups"] == state["param_groups"]
    assert_same(
        [entry["momentum_buffer"] for entry in after["state"].values()],
        [entry["momentum_buffer"] for entry in state["state"].values()],
    )


@pytest.mark.parametrize("magnitude", [1e-44, 1e-40, 1e-25, 1e18, 1e25, 1e30, 3e38])
@pytest.mark.parametrize("step_size", ["theorem", "constant", "angle"])
@pytest.mark.parametrize(
    ("manifold", "shape"),
    [
        (Stiefel(), (5, 3)),
        (Stiefel(), (160, 128)),
        (Oblique(0.5), (2, 3, 3, 3)),
        (ScaledSphere(2.0), (20,)),
        (ProductOfGroups(collection(4, 3, "pio", ("sphere", "stiefel")), (4, 3, 3, 3)), (4, 3, 3, 3)),
        (ProductOfGroups(collection(16, 16, "pio", ("sphere", "stiefel"), components="block"), (16, 16)), (16, 16)),
    ],
)
def test_a_finite_gradient_of_any_magnitude_takes_the_step_of_double_precision(manifold, shape, step_size, magnitude):
    if step_size == "constant" and magnitude > 1e37:
        magnitude = 1e37  # two of these fit into a momentum buffer
    start = on(manifold, *shape)
    entries = torch.rand(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64) - 0.5
    grad = (entries * magnitude).float()
    moved: list[Tensor] = []
    for dtype in (torch.float64, torch.float32):
        param = geoopt.ManifoldParameter(start.detach().to(dtype, copy=True), manifold=copy.deepcopy(manifold))
        lr = min(0.3, 1 / magnitude) if step_size == "constant" else 0.3
        optimizer = RiemannianFGSGD([param], lr=lr, momentum=0.9, step_size=step_size)
        for _ in range(2):
            param.grad = grad.to(dtype)
            optimizer.step()
        moved.append(param.detach().double())
        assert optimizer.skipped_groups() == 0
    torch.testing.assert_close(moved[1], moved[0], rtol=0, atol=2e-5)


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("magnitude", [1e18, 1e22, 1e30])
def test_weight_decay_is_not_multiplied_with_the_unit_of_a_gradient_that_is_divided(magnitude, maximize):
    moved: list[Tensor] = []
    entries = torch.randn(2, 4, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float64, torch.float32):
        manifold = ProductOfGroups(collection(4, 3, "pi", ("sphere", "euclidean")), (4, 3, 3, 3))
        param = geoopt.ManifoldParameter(manifold.projx(entries[0]).to(dtype), manifold=manifold)
        lr = 0.5 / magnitude
        optimizer = RiemannianFGSGD([param], lr=lr, weight_decay=0.4, step_size="constant", maximize=maximize)
        param.grad = (magnitude * entries[1]).to(dtype)
        optimizer.step()
        moved.append(param.detach().double())
    torch.testing.assert_close(moved[1], moved[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("step_size", ["theorem", "constant", "angle"])
def test_without_the_check_a_bad_group_is_left_out_and_counted(value, step_size):
    params = [on(m, 5, 3, dtype=torch.float32) for m in (Stiefel(), Oblique(), Stiefel())]
    optimizer = RiemannianFGSGD(params, lr=0.1, check_finite=False, step_size=step_size)
    assert optimizer.skipped_groups() == 0
    set_gradients(params, 1)
    params[0].grad[1] = value
    before = values(params)
    optimizer.step()
    assert optimizer.skipped_groups() == 1
    torch.testing.assert_close(params[0].detach(), before[0], rtol=0, atol=1e-6)
    assert [(p - b).abs().max() > 1e-3 for p, b in zip(params[1:], before[1:], strict=True)] == [True, True]
    assert optimizer.step_scales()[params[0]].item() == 1
    optimizer.step()
    assert optimizer.skipped_groups() == 2


def test_without_the_check_only_the_bad_group_of_a_product_is_left_out():
    groups = collection(4, 3, "pio", ("sphere", "stiefel"))
    param = on(ProductOfGroups(groups, (4, 3, 3, 3)), 4, 3, 3, 3)
    optimizer = RiemannianFGSGD([param], lr=0.1, check_finite=False)
    before = param.detach().clone()
    set_gradients([param], 1)
    param.grad[2, 1, 0, 0] = math.nan
    optimizer.step()
    stayed = ((param.detach() - before).abs().amax((2, 3)) < 1e-12).numpy()
    np.testing.assert_array_equal(stayed, groups.group_of == groups.group_of[2, 1])
    assert optimizer.skipped_groups() == 1


def test_a_left_out_group_keeps_its_momentum():
    param = on(Stiefel(), 5, 3)
    optimizer = RiemannianFGSGD([param], lr=0.1, momentum=0.9, check_finite=False)
    run(optimizer, 1)
    carried = param.manifold.proju(param.detach(), optimizer.state[param]["momentum_buffer"])
    param.grad = torch.full((5, 3), math.nan, dtype=torch.float64)
    optimizer.step()
    torch.testing.assert_close(optimizer.state[param]["momentum_buffer"], 0.9 * carried)
    assert bool(param.isfinite().all())


def test_gradients_of_plain_parameters_are_as_free_as_in_torch():
    param, twin = plain(3), plain(3)
    for p in (param, twin):
        p.grad = torch.tensor([1.0, math.nan, math.inf], dtype=torch.float64)
    RiemannianFGSGD([param], lr=0.1).step()
    torch.optim.SGD([twin], lr=0.1).step()
    torch.testing.assert_close(param, twin, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("option", "value", "error"),
    [
        ("lr", math.inf, ValueError),
        ("lr", math.nan, ValueError),
        ("lr", -0.1, ValueError),
        ("lr", "0.1", TypeError),
        ("lr", None, TypeError),
        ("momentum", math.nan, ValueError),
        ("momentum", -0.5, ValueError),
        ("momentum", 2.0, ValueError),
        ("dampening", math.nan, ValueError),
        ("weight_decay", math.inf, ValueError),
        ("nesterov", True, ValueError),
        ("step_size", "fixed", ValueError),
        ("norm", "mean", ValueError),
        ("angle", -1.0, ValueError),
        ("rho", math.nan, ValueError),
        ("stabilize", 0, ValueError),
    ],
)
def test_an_option_that_was_changed_is_checked_before_anything_changes(option, value, error):
    weights = [geoopt.ManifoldParameter(torch.eye(20)[:, :16], manifold=Stiefel()), torch.nn.Parameter(torch.ones(3))]
    optimizer = RiemannianFGSGD(weights, lr=0.1)
    before = [weight.detach().clone() for weight in weights]
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer.param_groups[0][option] = value
    with pytest.raises(error, match=rf"{option} .*; no parameter was changed. Check which code has set it"):
        optimizer.step()
    assert all(torch.equal(weight.detach(), old) for weight, old in zip(weights, before, strict=True))


def test_a_weight_that_is_not_finite_is_blamed_and_not_the_gradients_that_follow():
    weights = [geoopt.ManifoldParameter(torch.eye(20)[:, :16], manifold=Stiefel()) for _ in range(2)]
    optimizer = RiemannianFGSGD([("first", weights[0]), ("second", weights[1])], lr=0.1)
    with torch.no_grad():
        weights[1][0, 0] = float("nan")
    for weight in weights:
        weight.grad = torch.full_like(weight, float("nan"))
    with pytest.raises(
        FloatingPointError, match=r"'second', .*is not finite itself.*no parameter was changed.*checkpoint"
    ):
        optimizer.step()


@pytest.mark.parametrize("change", [constrain, unconstrain], ids=lambda change: change.__name__)
def test_an_optimiser_whose_parameters_were_replaced_says_so(change):
    """It would train nothing of them, without a word."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))
    if change is unconstrain:
        constrain(model)
    stale = RiemannianFGSGD(model.named_parameters(), lr=0.1)
    change(model)
    before = [p.detach().clone() for p in model.parameters()]
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    message = (
        r"'1.weight', .* is no longer a parameter of its model.*no parameter was changed.*Build the optimiser after"
    )
    with pytest.raises(RuntimeError, match=message):
        stale.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
    RiemannianFGSGD(model.parameters(), lr=0.1).step()
    assert not any(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))


def test_loading_weights_replaces_no_parameter():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3))
    constrain(model)
    optimizer = RiemannianFGSGD(model.parameters(), lr=0.1)
    model.load_state_dict(copy.deepcopy(model.state_dict()))
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()


@pytest.mark.parametrize("first", ["plain", "constrained"])
@pytest.mark.parametrize("value", [math.nan, 1e30])
def test_plain_parameters_in_the_same_optimiser_change_nothing_about_it(first, value):
    weight, bias = on(Stiefel(), 5, 3, dtype=torch.float32), plain(3)
    optimizer = RiemannianFGSGD([bias, weight] if first == "plain" else [weight, bias], lr=0.1, momentum=0.9)
    before = values([weight, bias])
    weight.grad, bias.grad = torch.full_like(weight, value), torch.ones_like(bias)
    if math.isnan(value):
        with pytest.raises(FloatingPointError, match=r"is not finite; no parameter was changed"):
            optimizer.step()
        assert_same([weight, bias], before)
    else:
        optimizer.step()
        assert float(weight.manifold.violation(weight.detach()).max()) < 1e-6
