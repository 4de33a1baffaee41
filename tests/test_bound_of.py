"""What a bound bounds: the norms of every group, or those of the whole weight, against an adversary."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import Grouped, grouped_weights
from networks import names, net
from torch import Tensor, nn

import fgo_geo
from fgo_geo import Plan, ProductOfGroups, constrain, renormalize
from fgo_geo.grouping import STRATEGIES, collection
from fgo_geo.models.renormalize import renormalization_of
from fgo_geo.weights.layout import WeightLayout
from fgo_geo.weights.radius import group_radii, layer_bounding_radius

NORMS: dict[str, Any] = {
    "frobenius": lambda m: torch.linalg.matrix_norm(m),
    "spectral": lambda m: torch.linalg.matrix_norm(m, 2),
    "2->1": lambda m: torch.linalg.vector_norm(m, dim=1).sum(),
}
KINDS = ["sphere", "oblique", "stiefel"]


def layer_matrix(layout: WeightLayout, weight: Tensor) -> Tensor:
    """The weight ``(D, C K)``, from its storage and nothing else."""
    if layout.storage == "conv":
        return weight.reshape(weight.shape[0], -1)
    groups = layout.conv_groups
    parts = [w.transpose(0, 1).reshape(w.shape[1], -1) for w in weight.chunk(groups)]
    return torch.cat(parts)


def ascend(manifold: ProductOfGroups, norm: Any, seed: int, rounds: int = 60) -> float:
    """The largest norm of the layer that Riemannian gradient ascent finds."""
    generator = torch.Generator().manual_seed(seed)
    point = manifold.random(*manifold.layout.shape, dtype=torch.float64, generator=generator).detach()
    radius, largest = float(manifold.radius_map(point).mean()), 0.0
    for _ in range(rounds):
        point = point.as_subclass(Tensor).detach().requires_grad_()
        value = norm(layer_matrix(manifold.layout, point))
        largest = max(largest, value.item())
        (gradient,) = torch.autograd.grad(value, point)
        direction = manifold.proju(point.detach(), gradient)
        length = float(direction.abs().max())
        point = manifold.retr(point.detach(), direction * (0.5 * radius / length if length > 1e-12 else 0.0))
    return largest


@settings(max_examples=30)
@given(
    grouped=grouped_weights(movable=True).filter(lambda g: all("euclidean" not in c.kinds for c in g.collections)),
    bound=st.sampled_from([1.0, 0.2, 30.0]),
    norm=st.sampled_from([*NORMS]),
    seed=st.integers(0, 99),
)
def test_no_ascent_exceeds_the_bound_of_a_layer(grouped: Grouped, bound: float, norm: str, seed: int) -> None:
    manifold = ProductOfGroups(grouped.collections, grouped.layout)
    for wanted in (list(NORMS), [norm]):
        manifold.set_radius(group_radii(manifold.partition, "bound", bound, wanted, "layer"))
        assert ascend(manifold, NORMS[norm], seed, 15) <= bound * (1 + 1e-9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("components", ["kernel", "block"])
def test_no_ascent_exceeds_the_bound_of_a_convolution(kind: str, strategy: str, components: str) -> None:
    made = collection(6, 4, strategy, kind, components=components)
    manifold = ProductOfGroups([made], WeightLayout((6, 4, 3, 3)))
    manifold.set_radius(group_radii(manifold.partition, "bound", 2.0, bound_of="layer"))
    found = {name: ascend(manifold, norm, seed=1) for name, norm in NORMS.items()}
    assert max(found.values()) <= 2.0 * (1 + 1e-9)
    assert found["frobenius"] == pytest.approx(2.0 / math.sqrt(6))
    if kind == "sphere" and components == "kernel":
        assert found["2->1"] == pytest.approx(2.0)  # all rows are as long as each other


def test_a_bound_of_groups_is_none_of_the_layer() -> None:
    """The counterexample: groups of norm 1, a layer of 2->1 norm 37."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(64, 64, 3) for _ in range(2)]
    for layer, bound_of in zip(layers, ("group", "layer"), strict=True):
        constrain(layer, "pi", "stiefel", radius="bound", bound_of=bound_of, first_layer=True)
    of_groups, of_layer = (float(NORMS["2->1"](layer.weight.detach().flatten(1))) for layer in layers)
    assert of_groups == pytest.approx(36.95, rel=1e-3)
    assert of_layer == pytest.approx(1.0, abs=1e-5)


def test_spectral_norms_of_blocks_are_bounded_by_those_of_the_blocks() -> None:
    cut = ProductOfGroups([collection(6, 4, "po", ["stiefel"] * 2, components="block")], WeightLayout((6, 4))).partition
    assert layer_bounding_radius(cut, 1.0, ["spectral"]) == pytest.approx(1 / math.sqrt(2))
    assert layer_bounding_radius(cut, 1.0, ["frobenius"]) == pytest.approx(1 / math.sqrt(6))


# -- constrain ---------------------------------------------------------------------------------------------------


def test_the_plan_and_the_report_say_which_was_bounded() -> None:
    arguments: dict[str, Any] = {"manifolds": ("sphere", "stiefel"), "radius": "bound", "bound": 2.0}
    plan = constrain(net(), bound_of="layer", **arguments)
    assert str(plan).count("(norms of the layer <= 2)") == len(plan.constrained)
    assert Plan.from_json(plan.to_json()).entries == plan.entries
    assert {entry.bound_of for entry in plan.constrained} == {"layer"}
    for entry, param in zip(plan.constrained, plan.parameters().values(), strict=True):
        matrix = layer_matrix(entry.layout, param.detach())
        assert max(float(norm(matrix)) for norm in NORMS.values()) <= 2.0 * (1 + 1e-5)
    model = net()
    plan = constrain(model, **arguments, overrides={"conv": {"bound_of": "layer"}})
    text = str(plan)
    assert (text.count("(norms of the layer <= 2)"), text.count("(norms of each group <= 2)")) == (
        1,
        len(names(plan)) - 1,
    )
    words = {layer.name: layer.manifolds for layer in fgo_geo.report(nn.ModuleDict({"inner": model})).layers}
    assert words["inner.conv.weight"].endswith(", norms of the layer <= 2")
    assert words["inner.up.weight"].endswith(", norms of each group <= 2")
    assert "<=" not in str(constrain(net()))


@pytest.mark.parametrize(
    ("manifolds", "words"),
    [
        ("euclidean", ""),
        (("euclidean", "sphere"), "norms of each sphere group <= 1"),
        (("stiefel", "euclidean", "sphere"), "norms of each sphere or stiefel group <= 1"),
        (("stiefel", "sphere"), "norms of each group <= 1"),
    ],
)
def test_groups_without_a_constraint_are_not_said_to_be_bounded(manifolds: Any, words: str) -> None:
    model = net()
    plan = constrain(model, "po", manifolds, radius="bound")
    assert str(plan).count(f"({words})" if words else "<=") == (len(plan.constrained) if words else 0)
    for layer in fgo_geo.report(model).layers:
        if layer.name in plan.parameters():
            assert (layer.manifolds or "").endswith(f", {words}" if words else "euclidean")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bound_of": "model"}, r"bound_of must be one of \('group', 'layer'\), got 'model'"),
        ({"bound_of": "layer", "manifolds": ("sphere", "euclidean")}, "euclidean"),
    ],
)
def test_what_cannot_be_bounded(arguments: dict[str, Any], message: str) -> None:
    model = net()
    with pytest.raises(ValueError, match=message):
        constrain(model, radius="bound", **arguments)
    assert {type(p) for p in model.parameters()} == {nn.Parameter}


# -- renormalize -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*KINDS, "spectral"])
@pytest.mark.parametrize("strategy", ["layer", "pio"])
@pytest.mark.parametrize("norm", NORMS)
def test_no_training_exceeds_the_bound_of_a_renormalised_layer(kind: str, strategy: str, norm: str) -> None:
    torch.manual_seed(0)
    layer = renormalize(nn.Conv2d(4, 6, 3), manifold=kind, groups=strategy, bound=2.0, bound_of="layer").double()
    optimizer, largest = torch.optim.Adam(layer.parameters(), lr=0.05), 0.0
    for _ in range(60):
        optimizer.zero_grad()
        value = NORMS[norm](layer.weight.flatten(1))
        largest = max(largest, value.item())
        (-value).backward()
        optimizer.step()
    assert 0.3 < largest <= 2.0 * (1 + 1e-6)


def test_a_renormalised_layer_says_what_it_bounds() -> None:
    layer = renormalize(nn.Conv2d(4, 6, 3), bound=2.0, bound_of="layer", groups="pi", manifold=("sphere", "stiefel"))
    renormalization = renormalization_of(layer)
    assert "of the layer <= 2" in repr(renormalization)
    assert renormalization.guarantee().tolist() == [2.0]
    assert renormalization.violation(layer.weight.detach()).tolist() == [0.0]
    assert float(renormalization.violation(3 * math.sqrt(6) * layer.weight.detach())) > 1.0
    (row,) = fgo_geo.report(layer).layers
    assert row.manifolds.endswith(", norms of the layer <= 2")
    with pytest.raises(ValueError, match="bound_of must be one of"):
        renormalize(nn.Conv2d(4, 6, 3), bound_of="weight")
    assert "of the group <= 1" in repr(renormalization_of(renormalize(nn.Linear(3, 3))))
