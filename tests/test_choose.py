"""What each parameter gets: messages for arguments of the wrong kind, raised before the model is changed."""

from __future__ import annotations

import re

import geoopt
import pytest
import torch
from torch import nn

import fgo_geo
from fgo_geo.models.choose import collections_of
from fgo_geo.weights.components import WeightLayout


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("layer4.*", r"overrides is 'layer4\.\*'; expected a mapping from names, globs or module types"),
        ({"0": "stiefel"}, r"overrides\['0'\] is 'stiefel'; expected a mapping from arguments to values, e\.g\. \{"),
        ({"0": ["stiefel"]}, r"overrides\['0'\] is \['stiefel'\]; expected a mapping"),
        ({"0": {"manifold": "stiefel"}}, r"overrides\['0'\] may change .*'manifolds'.*, got \['manifold'\]"),
        ({"5": {}}, "overrides has '5', which matches no parameter"),
    ],
)
def test_overrides_are_a_mapping_of_mappings(overrides, message):
    model = nn.Sequential(nn.Linear(3, 3))
    weight = model[0].weight
    before = weight.detach().clone()
    with pytest.raises(ValueError, match=f"constrain: {message}"):
        fgo_geo.constrain(model, include="0", overrides=overrides)
    assert model[0].weight is weight
    assert torch.equal(weight, before)


@pytest.mark.parametrize(
    ("radius", "overrides", "reason"),
    [
        ({"2": 0.5, "4.*": 1}, {}, "4.weight: is the classifier (the last linear layer or 1x1 convolution): pass"),
        ({"2": 0.5, "2.weight": 1}, {}, "2.weight: matches '2', which comes first; put '2.weight' before it"),
        ({"2": 1, "2.*": 1, "3": 2}, {}, "2.weight: matches '2', which comes first; put '2.*' before it"),
        ({"2": 0.5}, {"2": {"radius": 1}}, "2.weight: gets its radius from overrides['2']"),
        ({"2": 0.5}, {"2": {"manifolds": "euclidean"}}, "2.weight: has only groups of euclidean, which have no radius"),
        (
            {"2": "unit"},
            {"2": {"manifolds": geoopt.EuclideanStiefel()}},
            "2.weight: has only groups of geoopt.EuclideanStiefel, which have no radius",
        ),
    ],
)
def test_a_pattern_that_sets_no_radius_is_an_error(radius, overrides, reason):
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(4, 2))
    before = model[2].weight
    pattern = list(radius)[:2][-1]
    message = f"constrain: radius has {pattern!r}, which sets the radius of no weight: {reason}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}") as refused:
        fgo_geo.constrain(model, "layer", "sphere", radius=radius, overrides=overrides)
    assert model[2].weight is before
    assert ("bias" in str(refused.value)) == ("4.*" in radius)
    fgo_geo.constrain(model, "layer", "sphere", radius={"2": 0.5, "*": 2.0}, overrides={"3": {"radius": 3}})
    norms = [float(model[i].weight.detach().norm()) for i in (2, 3)]
    assert norms == pytest.approx([0.5 * 4, 3 * 4])  # sixteen kernels


@pytest.mark.parametrize(
    "radius",
    [
        {"0": 1.0, "2": 1.0, "**": 2.0},
        {nn.Conv2d: 1.0, nn.Linear: 2.0},  # the only linear layer is the classifier
        {nn.Conv2d: 1.0, "*.weight": 2.0},
        {nn.Conv2d: 1.0, nn.Module: 2.0},
    ],
)
def test_a_fallback_may_set_no_radius(radius):
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Linear(4, 2))
    fgo_geo.constrain(model, "layer", "sphere", radius=radius, first_layer=True)
    assert float(model[2].weight.detach().norm()) == pytest.approx(4)  # sixteen kernels


@pytest.mark.parametrize(
    ("layout", "components", "expected"),
    [
        (WeightLayout((4, 3, 3, 3)), "auto", "kernel"),
        (WeightLayout((4, 3, 3, 3)), "block", "block"),
        (WeightLayout((4, 3, 1, 1)), "auto", "block"),
        (WeightLayout((4, 3)), "auto", "block"),
    ],
)
def test_kernels_of_spatial_convolutions_are_components_of_their_own(layout, components, expected):
    (made,) = collections_of(layout, "layer", "sphere", "deterministic", 0, components, "name")
    assert (made.components, made.name, made.out_channels, made.in_channels) == (expected, "name", 4, 3)


def test_sections_get_groups_of_their_own():
    layout = WeightLayout((12, 4), sections=3)
    made = collections_of(layout, "pi", ("sphere", "oblique"), "random", 0, "auto", "attention")
    assert [(each.name, each.out_channels, each.in_channels) for each in made] == [
        ("attention[0]", 4, 4),
        ("attention[1]", 4, 4),
        ("attention[2]", 4, 4),
    ]
    columns = {tuple(map(tuple, (group.columns.tolist() for group in each.groups))) for each in made}
    assert len(columns) > 1, "sections draw alike"
