"""The networks, and which of their weights live on which manifold."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torchvision
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet
from torchvision.ops import SqueezeExcitation

import fgo_geo
from training import measures, settings

KINDS_OF_LAYERS = (nn.Conv2d, nn.Linear)


def build(wanted: settings.Model, channels: int, classes: int, size: int) -> nn.Module:
    """Return a network for images of ``size`` x ``size`` pixels."""
    name = wanted.model
    if name == "small":
        model = small_network(channels, classes, wanted.width or 32, wanted.norm == "batch")
    elif name == "plain":
        model = PlainNetwork(channels, classes, wanted.width or 32, wanted.depth, wanted.norm == "batch", wanted.skips)
    elif name == "narrow18":
        model = SmallResNet(channels, classes, wanted.width or 32, [2, 2, 2, 2])
    elif name in ("rcd20", "rcd110"):
        model = SmallResNet(channels, classes, wanted.width or 16, [(int(name[3:]) - 2) // 6] * 3)
    elif name == "vits16":
        model = vit_small(channels, classes, size)
    else:
        model = residual_network(name, channels, classes, size)
    if wanted.start == "orthogonal":
        start_orthogonal(model)
    if wanted.recompute:
        recompute_blocks(model)
    return model


# -- networks -------------------------------------------------------------------------------------------------


def layer(inputs: int, outputs: int, norm: bool) -> list[nn.Module]:
    """A 3 x 3 convolution, batch normalisation if wanted, and a ReLU."""
    convolution = nn.Conv2d(inputs, outputs, 3, padding=1, bias=not norm)
    if norm:
        return [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]
    nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")
    return [convolution, nn.ReLU()]


def small_network(channels: int, classes: int, width: int = 32, norm: bool = True) -> nn.Sequential:
    """Return three 3 x 3 convolutions, an average pool and a classifier."""
    return nn.Sequential(
        *layer(channels, width, norm),
        *layer(width, 2 * width, norm),
        nn.MaxPool2d(2),
        *layer(2 * width, 2 * width, norm),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2 * width, classes),
    )


class PlainNetwork(nn.Module):
    """Convolutions of one width, with or without skips over every two; one max pool after a third of them."""

    def __init__(self, channels: int, classes: int, width: int, depth: int, norm: bool, skips: bool) -> None:
        super().__init__()
        self.stem = nn.Sequential(*layer(channels, width, norm))
        pairs = [2] * ((depth - 1) // 2) + [1] * ((depth - 1) % 2)
        self.blocks = nn.ModuleList(
            nn.Sequential(*(part for _ in range(count) for part in layer(width, width, norm))) for count in pairs
        )
        self.skips = skips
        self.pool_after = max(1, len(pairs) // 3)
        self.fc = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images)
        for number, block in enumerate(self.blocks):
            if number == self.pool_after:
                x = nn.functional.max_pool2d(x, 2)
            x = x + block(x) if self.skips else block(x)
        return self.fc(x.mean((-2, -1)))


class SmallResNet(nn.Module):
    """A ResNet of basic blocks for small images: the first stage at full resolution, every other one at half of it.

    With three stages of 3 and 18 blocks and 16 channels it is the ResNet of constant depth, of 20 and 110 layers, for
    32 x 32 images (RCD; Huang et al., *Deep networks with stochastic depth*, 2016); with four of 2, a ResNet-18.
    """

    def __init__(self, channels: int, classes: int, width: int, stages: Sequence[int]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        blocks: list[nn.Module] = []
        inputs = width
        for stage, count in enumerate(stages):
            outputs = width * 2**stage
            for number in range(count):
                stride = 2 if stage and not number else 1
                shortcut = None
                if stride != 1:
                    shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
                # torchvision's block insists on 64 channels per group only where it has groups
                blocks.append(BasicBlock(inputs, outputs, stride, shortcut))
                inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(inputs, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        x = self.blocks(nn.functional.relu(self.bn1(self.conv1(images))))
        return self.fc(x.mean((-2, -1)))


class SEBottleneck(Bottleneck):
    """torchvision's bottleneck with its squeeze and excitation before the sum (Hu et al., 2018)."""

    def __init__(self, inplanes: int, planes: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(inplanes, planes, *args, **kwargs)
        self.se = SqueezeExcitation(planes * self.expansion, planes * self.expansion // 16)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.se(self.bn3(self.conv3(out)))
        return self.relu(out + (x if self.downsample is None else self.downsample(x)))


def residual_network(name: str, channels: int, classes: int, size: int) -> ResNet:
    """Return a ResNet or SE-ResNet of torchvision, with a stem that does not shrink images of less than 64 pixels."""
    if name.startswith("se"):
        model = ResNet(SEBottleneck, [3, 4, {"50": 6, "101": 23}[name.removeprefix("seresnet")], 3], classes)
    else:
        model = torchvision.models.get_model(name, num_classes=classes)
    if size < 64:
        model.conv1 = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
        model.maxpool = nn.Identity()
    elif channels != 3:
        model.conv1 = nn.Conv2d(channels, 64, 7, stride=2, padding=3, bias=False)
    return model


def vit_small(channels: int, classes: int, size: int) -> nn.Module:
    """Return ViT-S: torchvision's transformer of 12 layers, 6 heads, 384 features; 16 patches a side at most."""
    patch = 16 if size >= 64 else max(1, size // 8)
    if size % patch:
        raise ValueError(f"vits16 cuts patches of {patch} pixels: --image-size {size} is no multiple of it")
    model = torchvision.models.VisionTransformer(size, patch, 12, 6, 384, 1536, num_classes=classes)
    if channels != 3:
        model.conv_proj = nn.Conv2d(channels, 384, patch, patch)
    return model


def start_orthogonal(model: nn.Module) -> None:
    """Give convolutions orthogonal matrices on the scale of He: what Stiefel layers start from, for plain ones."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            matrix = module.weight.detach().flatten(1)
            nn.init.orthogonal_(matrix, (2 * max(matrix.shape) / matrix.shape[1]) ** 0.5)


def blocks(model: nn.Module) -> list[nn.Module]:
    """The residual blocks, or the layers of a transformer."""
    kinds = (BasicBlock, Bottleneck, torchvision.models.vision_transformer.EncoderBlock)
    return [module for module in model.modules() if isinstance(module, kinds)]


def recompute_blocks(model: nn.Module) -> None:
    """Let residual blocks and layers of transformers compute their activations again in the backward pass."""
    for block in blocks(model):
        contexts = partial(_recomputing, block)
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, context_fn=contexts)


def _recomputing(block: nn.Module) -> tuple[Any, Any]:
    return nullcontext(), _statistics_kept(block)


@contextmanager
def _statistics_kept(block: nn.Module) -> Any:
    """Running statistics see every batch once, not again when activations are recomputed."""
    momenta = {m: m.momentum for m in block.modules() if hasattr(m, "running_mean")}
    for module in momenta:
        module.momentum = 0.0
    try:
        yield
    finally:
        for module, momentum in momenta.items():
            module.momentum = momentum


# -- manifolds ------------------------------------------------------------------------------------------------


def constrain(model: nn.Module, wanted: settings.Geometry, seed: int) -> fgo_geo.Plan | None:
    """Put the weights of convolutions and linear layers on products of manifolds, in place.

    Args:
        model: The network to change.
        wanted: The manifolds.
        seed: Seed of random groups.

    Returns:
        What was done, parameter by parameter; None if no weight is to be constrained.
    """
    kinds = {nn.Conv2d: set(wanted.manifolds or ()), nn.Linear: {wanted.linear_manifold}}
    include = [layer for layer, of_layer in kinds.items() if of_layer != {"euclidean"}]
    if wanted.renormalize:
        renormalize(model, wanted, seed)
        return None
    if not include:
        return None
    return fgo_geo.constrain(
        model,
        wanted.strategy or "pio",
        wanted.manifolds or settings.MANIFOLDS,
        wanted.selection,
        wanted.radius,  # pyright: ignore
        seed,
        bound=wanted.bound if wanted.radius == "bound" else None,
        components=wanted.components,  # pyright: ignore
        include=include,
        overrides={nn.Linear: {"strategy": "layer", "manifolds": wanted.linear_manifold, "components": "auto"}},
        statistics=None if wanted.scales == "none" else wanted.scales,  # pyright: ignore
    )


def weights_by_kind(model: nn.Module) -> dict[str, list[str]]:
    """Names of the weights of convolutions and linear layers, by what they are to a network on manifolds."""
    layers = [name for name, module in model.named_modules() if isinstance(module, KINDS_OF_LAYERS)]
    weights = dict(model.named_parameters())
    return {
        "constrained": list(measures.constrained(model)),
        "biases": [f"{name}.bias" for name in layers if f"{name}.bias" in weights],
        "first": [f"{layers[0]}.weight"],
        "classifier": [f"{layers[-1]}.weight"],
    }


def freeze(model: nn.Module, kinds: Sequence[str]) -> None:
    """Let weights of some kinds stay as they are."""
    named = weights_by_kind(model)
    for name in (name for kind in kinds for name in named[kind]):
        model.get_parameter(name).requires_grad_(False)


def renormalize(model: nn.Module, wanted: settings.Geometry, seed: int) -> None:
    """Reparametrise every convolution whose components have room to move, so that the norms of groups are bounded."""
    kinds = ["spectral" if kind == "euclidean" else kind for kind in wanted.manifolds or settings.MANIFOLDS]
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > module.out_channels:
            fgo_geo.renormalize(
                module,
                "weight",
                kinds,
                bound=wanted.bound,
                groups=wanted.strategy or "pio",
                statistics=None if wanted.scales == "none" else wanted.scales,  # pyright: ignore
                selection=wanted.selection,
                seed=seed,
                components=wanted.components,  # pyright: ignore
            )
