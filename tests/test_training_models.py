"""The networks of the training scripts."""

from __future__ import annotations

import pytest
import torch
from trainer import models, settings

import fgo_geo


def test_a_large_image_keeps_the_stem_of_resnet():
    assert models.residual_network("resnet18", 3, 10, 224).conv1.stride == (2, 2)
    assert models.residual_network("resnet18", 1, 10, 224).conv1.weight.shape == (64, 1, 7, 7)


# Parameters of ResNet-50, ResNet-101 and ViT-S/16 as in torchvision and timm; SE-ResNets as Hu et al. give them.
SIZES = {"resnet50": 25_557_032, "seresnet50": 28_088_024, "seresnet101": 49_326_872, "vits16": 22_050_664}


@pytest.mark.parametrize("name", SIZES)
def test_the_networks_have_the_parameters_of_their_papers(name):
    with torch.device("meta"):
        model = models.build(settings.Model(model=name), 3, 1000, 224)
    assert sum(weight.numel() for weight in model.parameters()) == SIZES[name]


@pytest.mark.parametrize(("name", "count"), [("rcd20", 269_722), ("rcd110", 1_727_962)])
def test_resnets_of_constant_depth_have_the_layers_and_numbers_of_he(name, count):
    """0.27M and 1.7M parameters (He et al., table 6), whose shortcuts have no parameters."""
    model = models.build(settings.Model(model=name), 3, 10, 32)
    convolutions = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d) and m.kernel_size == (3, 3)]
    assert len(convolutions) + 1 == int(name[3:])
    of_shortcuts = [p.numel() for key, p in model.named_parameters() if "downsample" in key]
    assert sum(p.numel() for p in model.parameters()) - sum(of_shortcuts) == count


@pytest.mark.parametrize(
    "flags",
    [
        {"model": "plain", "depth": 5},
        {"model": "plain", "depth": 8, "skips": True},
        {"model": "rcd20"},
        {"model": "narrow18", "width": 4},
        {"model": "vits16"},
    ],
)
def test_small_networks_run_on_small_grey_images(flags):
    model = models.build(settings.Model(**flags), 1, 7, 16)
    assert model(torch.randn(2, 1, 16, 16)).shape == (2, 7)


def test_layers_are_chosen_by_kind_and_weights_are_projected_not_redrawn():
    model = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3), torch.nn.Linear(4, 5))
    before = model[0].weight.detach().clone()
    common = {"strategy": "pi", "radius": "unit"}
    geometry = settings.Geometry(manifolds=("sphere",), **common)
    plan = models.constrain(model, geometry, 0)
    assert [entry.name for entry in plan.constrained] == ["0.weight"]
    torch.testing.assert_close(model[0].weight.data, before / before.norm(dim=(-2, -1), keepdim=True))
    fgo_geo.unconstrain(model)
    plan = models.constrain(model, settings.Geometry(manifolds=("euclidean",), linear_manifold="stiefel", **common), 0)
    assert [entry.name for entry in plan.constrained] == ["1.weight"]
    torch.testing.assert_close(model[1].weight.data.T @ model[1].weight.data, torch.eye(4))
    assert models.constrain(model, settings.Geometry(manifolds=("euclidean",), **common), 0) is None
