"""Which path takes which weight, what is said of it, and the work that is kept from step to step."""

from __future__ import annotations

import copy
import gc
import logging
import pickle
import weakref
from typing import Any

import geoopt
import pytest
import torch
from path_helpers import (
    INSTRUCTION_SETS,
    KINDS,
    NAMES_OF_SETS,
    as_parameter,
    assert_close,
    built,
    declared,
    is_fused,
    limited_to,
    product,
    sweeps_of,
    trained,
    weight_on,
)
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fgo_geo import ProductOfGroups, RiemannianFGSGD, ScaledSphere, Stiefel, constrain, kernels
from fgo_geo.grouping import collection
from fgo_geo.paths import router
from fgo_geo.paths.native import kernels as native_kernels
from fgo_geo.paths.native import lines as native_lines
from fgo_geo.paths.native.library import NOT_BUILT, instruction_set
from fgo_geo.paths.protocol import StepOptions, Weight
from fgo_geo.paths.reference import JobBatch


def test_a_copied_model_takes_the_same_step():
    model = constrain_a_model()
    again = copy.deepcopy(model)
    for m in (model, again):
        for p in m.parameters():
            p.grad = torch.ones_like(p)
        RiemannianFGSGD(m.parameters(), lr=0.1, momentum=0.9).step()
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def constrain_a_model() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 5, groups=2), nn.ConvTranspose2d(8, 4, (1, 3)))
    constrain(model, strategy="pio", manifolds=KINDS)
    return model


@built
@pytest.mark.parametrize("reason", ["fused steps take float32 and float64, got torch.bfloat16", "strides"])
def test_what_cannot_be_fused_says_why(reason: str):
    dtype = torch.float32 if reason == "strides" else torch.bfloat16
    weight = weight_on(product(shape=(4, 4, 3, 3, 3)), dtype, torch.contiguous_format, 0)
    if reason == "strides":
        weight.data = weight.data.transpose(2, 3).contiguous().transpose(2, 3)
    weight.grad = torch.zeros_like(weight)
    optimizer = RiemannianFGSGD([weight], lr=0.1, master_weights=False)
    with kernels.use_path("fused"), pytest.raises(RuntimeError, match=reason):
        optimizer.step()
    optimizer.step()


@built
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_takes_the_fused_step_of_its_master_weights(dtype: torch.dtype):
    weight = weight_on(product(), dtype, torch.contiguous_format, 0)
    single = as_parameter(weight.manifold.projx(weight.detach().float()).as_subclass(Tensor), weight.manifold)
    optimizers = [RiemannianFGSGD([w], lr=0.1, momentum=0.9) for w in (weight, single)]
    for seed in range(3):
        weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
        single.grad = weight.grad.float()
        with kernels.use_path("fused"):
            assert is_fused(sweeps_of(optimizers[0].step))
            optimizers[1].step()
        assert torch.equal(optimizers[0].state[weight]["master"], single.detach())
        assert torch.equal(weight.detach(), single.detach().to(dtype))


def unfused(caplog: Any) -> list[str]:
    """Reasons for which something was left to the batched code."""
    messages = [r.getMessage() for r in caplog.records if r.name == "fgo_geo" and r.levelno == logging.WARNING]
    assert all(m.startswith("path 'fused': ") and " takes the batched torch code: " in m for m in messages)
    return [
        m.partition(" takes the batched torch code: ")[2].partition("; fused steps for vectors")[0] for m in messages
    ]


ONE_MANIFOLD = "kernels on one manifold need weights (D, C, A, B) and components of two dimensions"
UNFUSED: list[tuple[Any, tuple[int, ...], str]] = [
    (
        ProductOfGroups(collection(24, 3, "layer", "stiefel", components="block"), (24, 3)),
        (24, 3),
        "fused steps for kernels do not take the blocks of a matrix",
    ),
    (Stiefel(), (5, 3), ONE_MANIFOLD),
    (ScaledSphere(ndim=1), (4, 3), ONE_MANIFOLD),
    (Stiefel(retraction="qr"), (4, 3, 3, 3), "fused steps use the polar retraction, but this manifold has qr"),
    (
        Stiefel(),
        (2, 3, 64, 3),
        "kernels A x B on one manifold need A >= B, more than one entry, and are at most 49 x 7",
    ),
    (geoopt.Sphere(), (4, 3), "there is no fused step for the class Sphere"),
]


@built
@pytest.mark.parametrize("compiled", [False, True])
def test_forcing_the_fused_path_says_once_what_has_none(compiled: bool, caplog: pytest.LogCaptureFixture):
    torch._dynamo.reset()
    weights = [weight_on(product(), torch.float32, torch.contiguous_format, 0)]
    weights += [as_parameter(m.random(*shape).detach().as_subclass(Tensor), m) for m, shape, _ in 2 * UNFUSED]
    weights += [nn.Parameter(torch.ones(3))]
    optimizer = RiemannianFGSGD(weights, lr=torch.tensor(0.1), momentum=0.9)
    step = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
    with caplog.at_level(logging.WARNING, "fgo_geo"):
        for path in ("auto", "fused"):
            with kernels.use_path(path):
                for _ in range(2):
                    for weight in weights:
                        weight.grad = torch.ones_like(weight).detach()
                    assert is_fused(sweeps_of(step))
            reasons = dict.fromkeys(reason for _, _, reason in UNFUSED if path == "fused")
            assert unfused(caplog) == list(reasons)


@built
def test_forcing_the_fused_path_says_what_no_weight_is_the_reason_for(caplog: pytest.LogCaptureFixture):
    weight = weight_on(product(), torch.float32, torch.contiguous_format, 0)
    with caplog.at_level(logging.WARNING, "fgo_geo"):
        trained("fused", [weight], 2, 0.3, update="exponential")
        assert unfused(caplog) == ["there is no fused step with the exponential map"]
        optimizer = RiemannianFGSGD([weight], lr=0.1)
        weight.grad = torch.ones_like(weight).detach()
        with kernels.use_path("fused"), FlopCounterMode(display=False):
            optimizer.step()
    assert unfused(caplog)[1:] == ["operations are recorded, by a mode or a transform of torch"]


@pytest.mark.parametrize("kind", ["kernels", "lines"])
def test_without_the_extension_everything_works_and_it_is_said_once(
    kind: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    for module in (native_kernels, native_lines, router):
        monkeypatch.setattr(module, "library", lambda: None)
    weight = weight_on(product(), torch.float32, torch.contiguous_format, 0)
    weight = weight if kind == "kernels" else declared(ScaledSphere(), 3, 40)
    expected = trained("reference", [weight], 2, 0.3, momentum=0.9)
    with caplog.at_level(logging.WARNING, "fgo_geo"):
        actual = trained("auto", [weight], 2, 0.3, momentum=0.9)
    assert_close(actual, expected, 0.0)
    assert [r.getMessage() for r in caplog.records] == [f"step by the batched torch code: {NOT_BUILT}"]


@built
@pytest.mark.parametrize("number", INSTRUCTION_SETS)
def test_the_active_path_and_its_instruction_set_are_said_once(number: int, caplog: pytest.LogCaptureFixture):
    weights = [weight_on(product(), torch.float32, torch.contiguous_format, 0), declared(ScaledSphere(), 3, 40)]
    with caplog.at_level(logging.INFO, "fgo_geo"), limited_to(number):
        trained("auto", weights, 3, 0.3)
        assert instruction_set() == NAMES_OF_SETS[number]
    assert [r.getMessage() for r in caplog.records] == [
        f"fused step: compiled sweeps over {what} ({NAMES_OF_SETS[number]})" for what in ("kernels", "vectors")
    ]


@pytest.mark.parametrize("path", ["fast", "", None])
def test_an_unknown_path_is_refused(path: Any):
    with (
        pytest.raises(ValueError, match=r"the path must be one of \('auto', 'fused', 'reference'\), got"),
        kernels.use_path(path),
    ):
        pass


# -- what is kept from step to step ------------------------------------------------------------------------------


def stored_otherwise(weight: Any, optimizer: RiemannianFGSGD) -> RiemannianFGSGD:
    weight.data = weight.data.contiguous(memory_format=torch.channels_last)
    return optimizer


def elsewhere_in_memory(weight: Any, optimizer: RiemannianFGSGD) -> RiemannianFGSGD:
    weight.data = weight.data.clone()
    return optimizer


def in_double_precision(weight: Any, optimizer: RiemannianFGSGD) -> RiemannianFGSGD:
    weight.data = weight.data.double()
    state = optimizer.state[weight]
    state["momentum_buffer"] = state["momentum_buffer"].double()
    return optimizer


def other_radii(weight: Any, optimizer: RiemannianFGSGD) -> RiemannianFGSGD:
    weight.manifold.set_radius(2.0)
    weight.data = weight.manifold.projx(weight.data)
    return optimizer


def another_manifold(weight: Any, optimizer: RiemannianFGSGD) -> RiemannianFGSGD:
    weight.manifold = product("pi", tuple(weight.shape))
    weight.data = weight.manifold.projx(weight.data)
    return optimizer


def another_buffer(weight: Any, optimizer: RiemannianFGSGD) -> RiemannianFGSGD:
    optimizer.state[weight]["momentum_buffer"] = 0.5 * optimizer.state[weight]["momentum_buffer"]
    return optimizer


def buffer_stored_otherwise(weight: Any, optimizer: RiemannianFGSGD) -> RiemannianFGSGD:
    state = optimizer.state[weight]
    state["momentum_buffer"] = state["momentum_buffer"].contiguous(memory_format=torch.channels_last)
    return optimizer


def no_buffer(weight: Any, optimizer: RiemannianFGSGD) -> RiemannianFGSGD:
    optimizer.state.clear()
    return optimizer


def without_momentum(weight: Any, optimizer: RiemannianFGSGD) -> RiemannianFGSGD:
    optimizer.param_groups[0]["momentum"] = 0.0
    return optimizer


def other_options(weight: Any, optimizer: RiemannianFGSGD) -> RiemannianFGSGD:
    optimizer.param_groups[0].update(lr=0.3, nesterov=True, weight_decay=0.1, curvature="manifold")
    return optimizer


def loaded_state(weight: Any, optimizer: RiemannianFGSGD) -> RiemannianFGSGD:
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return optimizer


def step_without_gradient(weight: Any, optimizer: RiemannianFGSGD) -> RiemannianFGSGD:
    weight.grad = None
    optimizer.step()
    return optimizer


def frozen_neighbour(weight: Any, optimizer: RiemannianFGSGD) -> RiemannianFGSGD:
    optimizer.param_groups[0]["params"][1].grad = None
    return optimizer


def another_order(weight: Any, optimizer: RiemannianFGSGD) -> RiemannianFGSGD:
    optimizer.param_groups[0]["params"].reverse()
    return optimizer


def gone_neighbour(weight: Any, optimizer: RiemannianFGSGD) -> RiemannianFGSGD:
    del optimizer.param_groups[0]["params"][1]
    return optimizer


def reference_step(weight: Any, optimizer: RiemannianFGSGD) -> RiemannianFGSGD:
    with kernels.use_path("reference"):
        optimizer.step()
    return optimizer


CHANGES = [
    *(stored_otherwise, elsewhere_in_memory, in_double_precision, other_radii, another_manifold, another_buffer),
    *(buffer_stored_otherwise, no_buffer, without_momentum, other_options, loaded_state, step_without_gradient),
    *(frozen_neighbour, another_order, gone_neighbour, reference_step),
]


@built
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("in_place", [True, False])
def test_a_change_between_steps_is_noticed(change: Any, in_place: bool):
    """A fused path keeps what it knows of a parameter; ``in_place`` keeps the gradient's memory too."""
    results: list[list[Tensor]] = []
    for path in ("auto", "reference"):
        weights = [weight_on(product("po"), torch.float32, torch.contiguous_format, k) for k in range(2)]
        optimizer = RiemannianFGSGD(weights, lr=0.1, momentum=0.9)
        generator = torch.Generator().manual_seed(1)
        with kernels.use_path(path):
            for step in range(4):
                for weight in weights:
                    grad = 0.3 * torch.randn(weight.shape, generator=generator).to(weight.dtype)
                    if in_place and weight.grad is not None and weight.grad.dtype == weight.dtype:
                        weight.grad.copy_(grad)
                    else:
                        weight.grad = torch.empty_like(weight).copy_(grad)
                if step == 2:
                    optimizer = change(weights[0], optimizer)
                if weights[0].grad is not None and weights[0].grad.dtype != weights[0].dtype:
                    weights[0].grad = weights[0].grad.to(weights[0].dtype)
                optimizer.step()
        results.append([w.detach() for w in weights])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


@built
@pytest.mark.parametrize("radius", [0.5, torch.tensor([[0.5], [2.0]])])
def test_a_retraction_that_is_assigned_between_steps_is_noticed(radius: Any):
    manifold = Stiefel(radius)
    x = manifold.projx(torch.randn(2, 3, 3, 3, generator=torch.Generator().manual_seed(0)))
    weight = geoopt.ManifoldParameter(x, manifold)
    weight.grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    optimizer = RiemannianFGSGD([weight], lr=0.1, step_size="constant")
    optimizer.step()
    before = weight.detach().clone()
    manifold.retraction = "qr"
    optimizer.step()
    expected = manifold.retr(before, -0.1 * manifold.proju(before, weight.grad))
    torch.testing.assert_close(weight.detach().as_subclass(Tensor), expected.as_subclass(Tensor), rtol=0, atol=1e-5)


@built
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_a_duplicate_keeps_nothing_of_the_original(duplicate: Any):
    weight = weight_on(product("po"), torch.float64, torch.contiguous_format, 0)
    optimizer = RiemannianFGSGD([weight], lr=0.1, momentum=0.9)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    before = weight.detach().clone()
    own, own_optimizer = duplicate((weight, optimizer))
    own.grad = torch.ones_like(own)
    own_optimizer.step()
    torch.testing.assert_close(weight.detach(), before, rtol=0, atol=0)
    optimizer.step()
    torch.testing.assert_close(own.detach(), weight.detach(), rtol=0, atol=0)


@built
def test_nothing_is_held_between_steps():
    weight = weight_on(product("po"), torch.float32, torch.contiguous_format, 0)
    optimizer = RiemannianFGSGD([weight], lr=0.1, momentum=0.9)
    for _ in range(2):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    gradient, momentum = weakref.ref(weight.grad), weakref.ref(optimizer.state[weight]["momentum_buffer"])
    optimizer.zero_grad()
    optimizer.state.clear()
    assert gradient() is None
    assert momentum() is None
    of_weight, of_manifold = weakref.ref(weight), weakref.ref(weight.manifold)
    del weight, optimizer
    gc.collect()
    assert of_weight() is None
    assert of_manifold() is None


@built
def test_a_refused_gradient_is_not_held():
    weight = weight_on(product("po"), torch.float32, torch.contiguous_format, 0)
    optimizer = RiemannianFGSGD([weight], lr=0.1, momentum=0.9)
    weight.grad = torch.full_like(weight, torch.nan)
    gradient = weakref.ref(weight.grad)
    with pytest.raises(FloatingPointError, match="no parameter was changed"):
        optimizer.step()
    optimizer.zero_grad()
    assert gradient() is None


@built
def test_parameters_on_one_manifold_are_told_apart():
    manifold, results = product("po"), []
    for path in ("auto", "reference"):
        weights = [weight_on(manifold, torch.float64, torch.contiguous_format, k) for k in range(2)]
        for k, weight in enumerate(weights):
            weight.grad = torch.full_like(weight, 0.1 * (k + 1))
        optimizer = RiemannianFGSGD(weights, lr=0.1, momentum=0.9)
        with kernels.use_path(path):
            optimizer.step()
            optimizer.param_groups[0]["params"] = weights[1:]
            optimizer.step()
        results.append([w.detach() for w in weights])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-13)


@built
@pytest.mark.parametrize("by", ["group", "whole group", "path"])
def test_a_parameter_that_left_is_not_held(by: str):
    weights = [weight_on(product("po"), torch.float32, torch.contiguous_format, k) for k in range(2)]
    optimizer = RiemannianFGSGD([{"params": [w]} for w in weights] if by == "whole group" else weights, lr=0.1)
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    if by == "whole group":
        del optimizer.param_groups[1]
    else:
        optimizer.param_groups[0]["params"] = weights[:1]
    with kernels.use_path("reference" if by == "path" else "auto"):
        optimizer.step()
    left = weakref.ref(weights[1])
    del weight, weights
    gc.collect()
    assert left() is None


@built
def test_another_path_is_asked_again():
    """A weight that only the batched code takes is refused as soon as a fused path is forced."""
    weight = weight_on(product(shape=(4, 4, 3, 3, 3)), torch.float64, torch.contiguous_format, 0)
    weight.data = weight.data.transpose(2, 3).contiguous().transpose(2, 3)
    weight.grad = torch.ones_like(weight)
    optimizer = RiemannianFGSGD([weight], lr=0.1)
    optimizer.step()
    before = weight.detach().clone()
    with kernels.use_path("fused"), pytest.raises(RuntimeError, match="do not match any memory format; use_path"):
        optimizer.step()
    assert torch.equal(weight.detach(), before)
    optimizer.step()
    assert not torch.equal(weight.detach(), before)


@built
def test_the_work_is_prepared_once(monkeypatch: pytest.MonkeyPatch):
    asked: list[Any] = []
    path = native_kernels.NativeKernels
    ask = path.accepts
    monkeypatch.setattr(
        path, "accepts", lambda self, weight, *rest: (asked.append(weight), ask(self, weight, *rest))[1]
    )
    trained("auto", [weight_on(product(), torch.float32, torch.contiguous_format, k) for k in range(3)], 5, 0.3)
    assert len(asked) == 3


class OwnRule:
    """Momentum of the other sign, whatever the options say: no fused path knows it."""

    def __call__(self, manifold: Any, x: Tensor, grad: Tensor, buffer: Tensor | None, options: Any) -> Any:
        return -grad, buffer


@built
def test_a_rule_of_ones_own_takes_the_reference_path():
    weight = weight_on(product(), torch.float32, torch.contiguous_format, 0)
    weight.grad = torch.ones_like(weight).detach().as_subclass(Tensor)
    own = Weight(weight, weight, weight.manifold, weight.grad)
    batches = router.Router().route([own], StepOptions(lr=0.1, rule=OwnRule()))
    assert [type(batch) for batch in batches] == [JobBatch]
