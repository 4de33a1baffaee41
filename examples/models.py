"""The two networks of the training example, and which of their weights live on which manifold."""

from __future__ import annotations

from collections.abc import Sequence

import torchvision
from torch import nn

import fgo_geo

NAMES = ("small", "resnet18")
MANIFOLDS = ("sphere", "oblique", "stiefel", "euclidean")


def build(name: str, channels: int, classes: int, size: int) -> nn.Module:
    """Return the network called ``name`` for images of ``size`` x ``size`` pixels."""
    if name == "small":
        return small_network(channels, classes)
    return resnet18(channels, classes, size)


def small_network(channels: int, classes: int, width: int = 32) -> nn.Sequential:
    """Return three 3 x 3 convolutions with batch normalisation, an average pool and a classifier."""

    def block(inputs: int, outputs: int) -> list[nn.Module]:
        convolution = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        return [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]

    return nn.Sequential(
        *block(channels, width),
        *block(width, 2 * width),
        nn.MaxPool2d(2),
        *block(2 * width, 2 * width),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2 * width, classes),
    )


def resnet18(channels: int, classes: int, size: int) -> nn.Module:
    """Return torchvision's ResNet-18, with a stem that does not shrink images of up to 64 pixels."""
    model = torchvision.models.resnet18(num_classes=classes)
    if size <= 64:
        model.conv1 = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
        model.maxpool = nn.Identity()
    elif channels != 3:
        model.conv1 = nn.Conv2d(channels, 64, 7, stride=2, padding=3, bias=False)
    return model


def constrain(
    model: nn.Module,
    *,
    strategy: str,
    convolutions: Sequence[str],
    linears: str,
    selection: str,
    radius: str | float,
    seed: int,
) -> fgo_geo.Plan | None:
    """Put the weights of a model on products of manifolds, in place.

    Args:
        model: The network to change.
        strategy: How the kernels of a convolution are grouped: ``"pi"``, ``"po"``, ``"pio"`` or ``"layer"``.
        convolutions: The manifold kinds that are dealt to the groups of convolutions.
        linears: The manifold kind of linear layers, one point per weight matrix.
        selection: ``"random"`` or ``"deterministic"`` groups.
        radius: ``"kaiming"`` keeps the variance of signals, ``"unit"`` is 1, ``"bound"`` bounds all norms by 1, or
            a number.
        seed: Seed of random groups.

    Returns:
        What was done, parameter by parameter; None if no weight is to be constrained.
    """
    kinds = {nn.Conv2d: set(convolutions), nn.Linear: {linears}}
    wanted = [layer for layer, of_layer in kinds.items() if of_layer != {"euclidean"}]
    if not wanted:
        return None
    return fgo_geo.constrain(
        model,
        strategy,
        convolutions,
        selection,
        radius,
        seed,
        include=wanted,
        overrides={nn.Linear: {"strategy": "layer", "manifolds": linears}},
    )
