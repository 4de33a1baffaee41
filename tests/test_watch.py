"""Weights that an optimiser has moved off their manifolds are noticed, once; nothing else is taken for that."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import geoopt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import images, net
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, update_bn
from versions import FAKES_PARAMETERS, TRACES_PARAMETERS

from fgo_geo import ProductOfGroups, RiemannianFGSGD, constrain, on_manifolds, plan_of, unconstrain
from fgo_geo.grouping import collection
from fgo_geo.manifolds import ComponentManifold
from fgo_geo.models import watch as watching
from fgo_geo.models.watch import looks_at
from fgo_geo.weights.components import partition
from fgo_geo.weights.layout import WeightLayout

LEFT = r"has left its manifold in training.*on_manifolds\(optimizer\).*project\(\).*watch=False"
KINDS = ("sphere", "oblique", "stiefel", "euclidean")


def train(
    model: nn.Module, optimizer: Optimizer, steps: int, forward: Callable[[Tensor], Tensor] | None = None
) -> None:
    for step in range(steps):
        optimizer.zero_grad()
        (forward or model)(images(seed=step)).square().mean().backward()
        optimizer.step()


def silent(work: Callable[[], Any]) -> list[str]:
    """The warnings of weights that have left their manifolds."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        work()
    return [str(w.message) for w in caught if "has left its manifold" in str(w.message)]


# -- what is noticed ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("components", ["kernel", "block", "filter"])
@pytest.mark.parametrize("kind", ["sphere", "oblique", "stiefel", "spectral_sphere", "geoopt.EuclideanStiefel"])
def test_an_optimiser_that_knows_no_manifold_is_noticed_in_the_second_pass_and_once(kind, components):
    model = net()
    include = "conv.weight" if components == "kernel" else "block.0.weight"
    constrain(model, "po", kind, components=components, include=include, radius="unit")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    train(model, optimizer, 1)
    with pytest.warns(UserWarning, match=LEFT):
        train(model, optimizer, 1)
    assert not silent(lambda: train(model, optimizer, 4))
    plan_of(model).__dict__["watch"].passes = 31  # before one to look in
    assert not silent(lambda: train(model, optimizer, 2))


def test_small_steps_are_noticed_when_they_add_up():
    model = net()
    plan = constrain(model, "po", "sphere")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    assert not silent(lambda: train(model, optimizer, 3))
    assert len(silent(lambda: train(model, optimizer, 100))) == 1
    assert any(float(p.manifold.violation(p.detach()).max()) > 1e-3 for p in plan.parameters().values())


def test_the_remedies_of_the_message_are_remedies():
    for remedy in (
        lambda optimizer, model: on_manifolds(optimizer).optimizer,
        lambda optimizer, model: RiemannianFGSGD(model.parameters(), lr=0.02),
    ):
        model = net()
        plan = constrain(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
        assert len(silent(lambda m=model, o=optimizer: train(m, o, 3))) == 1
        plan_of(model).project()
        plan.__dict__.pop("watch")  # as if nothing had been said
        own = remedy(optimizer, model)
        assert not silent(lambda m=model, o=own: train(m, o, 17))


def test_balls_are_noticed_outside_only():
    for kind in ("ball", "spectral_ball"):
        model = net()
        constrain(model, "po", kind, radius=100.0)
        assert not silent(lambda m=model: train(m, torch.optim.AdamW(m.parameters(), lr=0.01), 17))
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1e4)
        assert len(silent(lambda m=model: [m(images()) for _ in range(16)])) == 1


# -- what is not -------------------------------------------------------------------------------------------------------

OPTIMISERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "on_manifolds": lambda m: on_manifolds(torch.optim.AdamW(m.parameters(), lr=0.05), "constant").optimizer,
    "FG-SGD": lambda m: RiemannianFGSGD(m.parameters(), lr=0.02, momentum=0.9),
    "FG-SGD, stabilize": lambda m: RiemannianFGSGD(m.parameters(), lr=0.02, stabilize=5),
    "Geoopt": lambda m: geoopt.optim.RiemannianAdam(m.parameters(), lr=0.05),
    "free, projected": lambda m: torch.optim.AdamW(m.parameters(), lr=0.02),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", OPTIMISERS)
def test_weights_within_rounding_are_points(name, dtype):
    model = net()
    plan = constrain(model, "pio", KINDS)
    model.to(dtype)
    optimizer = OPTIMISERS[name](model)

    def work() -> None:
        for step in range(18):
            optimizer.zero_grad()
            model(images(seed=step).to(dtype)).square().mean().backward()
            optimizer.step()
            if name == "free, projected":
                plan.project()

    assert not silent(work)
    assert plan.__dict__["watch"].passes == 18


def test_passes_that_do_not_train_are_not_looked_at():
    model = net()
    constrain(model)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2)
    model.eval()
    assert not silent(lambda: [model(images()) for _ in range(5)])
    model.train()
    with torch.no_grad():
        assert not silent(lambda: [model(images()) for _ in range(5)])
    assert len(silent(lambda: [model(images()) for _ in range(5)])) == 1


def test_frozen_weights_are_not_looked_at():
    model = net()
    constrain(model)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2)
    model.requires_grad_(False)
    model.head.requires_grad_(True)
    assert not silent(lambda: [model(images()) for _ in range(40)])


def test_averages_are_not_looked_at():
    model = net()
    constrain(model)
    average = AveragedModel(model, avg_fn=lambda a, b, n: a + 0.5 * (b - a))
    optimizer = on_manifolds(torch.optim.AdamW(model.parameters(), lr=0.05), "constant").optimizer

    def work() -> None:
        for _ in range(4):
            train(model, optimizer, 4)
            average.update_parameters(model)
        update_bn([images(4, seed) for seed in range(5)], average)
        for _ in range(5):
            with torch.no_grad():
                average(images())  # as a teacher is asked
        average.eval()
        average(images()).sum().backward()

    assert not silent(work)


def test_averages_of_models_without_a_plan_are_not_looked_at():
    model = unconstrain_copy(net())
    assert not silent(lambda: train(model, torch.optim.AdamW(model.parameters(), lr=0.1), 17))


def unconstrain_copy(model: nn.Module) -> nn.Module:
    constrain(model)
    return unconstrain(copy.deepcopy(model))


def test_off_by_the_argument_or_later():
    for turn_off in (True, False):
        model = net()
        plan = constrain(model, watch=not turn_off)
        plan.watches = False
        assert not silent(lambda m=model: train(m, torch.optim.AdamW(m.parameters(), lr=0.5), 5))
        assert "watch" not in plan.__dict__
    plan.watches = True
    assert len(silent(lambda: train(model, torch.optim.AdamW(model.parameters(), lr=0.5), 5))) == 1


def test_radii_that_are_refreshed_are_the_new_ones():
    model = net()
    plan = constrain(model, "po", ("sphere", "stiefel"), statistics="std")
    optimizer = on_manifolds(torch.optim.AdamW(model.parameters(), lr=0.01), "constant").optimizer

    def work() -> None:
        for _ in range(5):
            train(model, optimizer, 4)
            plan.update_scales(optimizer)

    assert not silent(work)


# -- with the rest of torch --------------------------------------------------------------------------------------------


def test_copies_and_pickles_look_for_themselves():
    model = net()
    constrain(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    assert len(silent(lambda: train(model, optimizer, 5))) == 1
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded):
        assert len(silent(lambda t=twin: train(t, torch.optim.AdamW(t.parameters(), lr=0.1), 5))) == 1
    assert not silent(lambda: train(model, optimizer, 5))


def test_under_transforms_tracers_and_compilation_nothing_is_looked_at():
    torch._dynamo.reset()
    model = net()
    plan = constrain(model)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2)
    watch = plan.__dict__.setdefault("watch", watching.Watch())
    params = dict(model.named_parameters())

    def loss(values: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, values, (x,)).square().mean()

    model.bn = nn.Identity()  # transforms refuse its statistics
    watch.passes = 1  # the next pass is one to look in
    assert not silent(lambda: torch.func.grad(loss)(params, images()))
    watch.passes = 1
    assert not silent(lambda: torch.func.vmap(lambda x: model(x[None]))(images(3)))
    watch.passes = 1
    assert not silent(lambda: torch.fx.symbolic_trace(nn.Sequential(nn.Identity(), model.block)))
    watch.passes = 1
    if FAKES_PARAMETERS:
        with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
            assert not silent(lambda: model(images()))
    if TRACES_PARAMETERS:
        watch.passes = 1
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        assert not silent(lambda: compiled(images()))
        watch.passes = 1
        assert not silent(lambda: torch.export.export(model, (images(),)))
    watch.passes = 1
    assert len(silent(lambda: model(images()))) == 1


def test_autocast_does_not_round_what_is_looked_at():
    model = net()
    constrain(model, "layer", "stiefel")
    optimizer = on_manifolds(torch.optim.SGD(model.parameters(), lr=0.1), "constant").optimizer

    def work() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            train(model, optimizer, 17)

    assert not silent(work)


class Late:
    """An event of CUDA that has happened when it is asked for the second time."""

    def __init__(self) -> None:
        self.asked = 0

    def query(self) -> bool:
        self.asked += 1
        return self.asked > 1


def test_an_answer_that_has_not_arrived_is_read_in_a_later_pass():
    model = net()
    plan = constrain(model)
    event: Any = Late()
    watch = plan.__dict__.setdefault("watch", watching.Watch())
    watch._answer = watching._Answer("conv.weight", 1e-3, torch.tensor(0.5), event)
    assert not silent(lambda: model(images()))
    assert len(silent(lambda: model(images()))) == 1
    assert event.asked == 2


# -- where is looked ---------------------------------------------------------------------------------------------------

LAYOUTS = [
    WeightLayout((6, 4, 3, 3)),
    WeightLayout((6, 4, 2, 3)),
    WeightLayout((6, 4, 5)),
    WeightLayout((12, 8)),
    WeightLayout((8, 3, 2, 2), "transposed", conv_groups=2),
    WeightLayout((8, 12), "transposed"),
    WeightLayout((12, 8), sections=3),
]


@settings(max_examples=30)
@given(
    layout=st.sampled_from(LAYOUTS),
    strategy=st.sampled_from(["pi", "po", "pio"]),
    components=st.sampled_from(["kernel", "block", "filter"]),
    seed=st.integers(0, 100),
)
def test_entries_are_those_of_the_components(layout, strategy, components, seed):
    if components == "kernel" and (not layout.kernel or layout.sections > 1):
        components = "block"
    rows = layout.out_channels // layout.sections
    collections = [
        collection(rows, layout.in_channels, strategy, KINDS[:2], "random", seed + n, components=components)
        for n in range(layout.sections)
    ]
    cut = partition(collections, layout)
    weight = torch.randn(layout.shape, generator=torch.Generator().manual_seed(seed))
    channels = layout.channels(weight).flatten()
    for part, expected in enumerate(cut.split(weight)):
        chosen = torch.randperm(len(expected), generator=torch.Generator().manual_seed(seed))[:3]
        torch.testing.assert_close(channels[cut.entries(part, chosen)], expected[chosen], rtol=0, atol=0)


@pytest.mark.parametrize("components", ["kernel", "block", "filter"])
@pytest.mark.parametrize("shape", [(32, 16, 3, 3), (300, 200, 1, 1)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_what_is_looked_at_are_points_with_radii_of_their_own(components, shape, memory_format):
    if shape[2] == 1 and components == "kernel":
        pytest.skip("one entry cannot move")
    made = collection(shape[0], shape[1], "pio", KINDS, "random", 0, components=components)
    groups = sum(len(c.groups) for c in [made])
    manifold = ProductOfGroups(made, shape, torch.linspace(0.5, 2, groups))
    weight = manifold.random(*shape).as_subclass(Tensor).contiguous(memory_format=memory_format)
    looks = looks_at(manifold)
    assert {type(own).__name__ for own, _ in looks} == {"ScaledSphere", "Oblique", "Stiefel"}
    for own, index in looks:
        assert isinstance(own, ComponentManifold)
        points = weight[index]
        assert points.numel() <= max(8 * 4096, 4 * max(shape[0], shape[1] * 9), 2**18)
        assert float(own.violation(points).max()) < 2e-6
        assert float(own.violation(1.01 * points).min()) > 5e-3


def test_components_that_are_too_large_to_be_seen_are_left_out():
    shape = (1024, 512)
    manifold = ProductOfGroups(collection(*shape, "layer", "sphere", components="block"), shape)
    assert looks_at(manifold) == []
    manifold = ProductOfGroups(collection(*shape, "layer", "stiefel", components="block"), shape)
    assert [weight.shape for weight in (torch.zeros(shape)[index] for _, index in looks_at(manifold))] == [(1, 1024, 4)]


def test_nothing_is_asked_while_a_graph_is_captured(monkeypatch):
    """There an event must not be asked whether it is done; the same passes warn where nothing is captured."""
    model = net()
    constrain(model)
    with torch.no_grad():
        for param in plan_of(model).parameters().values():
            param.mul_(2)
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_initialized", lambda: True)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        for seed in range(4):
            model(images(seed=seed))
    model(images(seed=0))
    with pytest.warns(UserWarning, match="has left its manifold"):
        model(images(seed=1))
