"""How layers store their weights: which entries belong to which output channel, input channel and kernel.

:class:`WeightLayout` brings the weight of a convolution, a transposed or grouped convolution, a linear layer or a
packed attention projection into the form ``(D, C, *kernel)``, output channels first. :func:`layout_of` reads the layout
off a module, or gives the reason why its parameter has none.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

__all__ = ["CONVOLUTIONS", "Storage", "WeightLayout", "layout_of"]

Storage = Literal["conv", "transposed"]


@dataclass(frozen=True)
class WeightLayout:
    """How a weight stores output channels, input channels and the kernel.

    Attributes:
        shape: The weight's shape.
        storage: ``"conv"`` for ``(D, C, *kernel)`` (linear layers have no kernel), ``"transposed"`` for the
            ``(groups C, D / groups, *kernel)`` of transposed convolutions.
        conv_groups: Groups of a grouped convolution; ``C`` counts the input channels of one of them.
        sections: Equal runs of output channels that are separate layers: 3 for packed attention projections, the
            number of convolution groups for a 1x1 convolution.
    """

    shape: tuple[int, ...]
    storage: Storage = "conv"
    conv_groups: int = 1
    sections: int = 1

    @property
    def kernel(self) -> tuple[int, ...]:
        """Spatial size of the kernel; empty for linear layers."""
        return self.shape[2:]

    @property
    def out_channels(self) -> int:
        """Number of output channels ``D``."""
        return self.shape[0] if self.storage == "conv" else self.shape[1] * self.conv_groups

    @property
    def in_channels(self) -> int:
        """Number of input channels ``C`` that one output channel sees."""
        return self.shape[1] if self.storage == "conv" else self.shape[0] // self.conv_groups

    @property
    def fan_in(self) -> int:
        """Number of inputs that one output value sums over."""
        return self.in_channels * math.prod(self.kernel)

    def channels(self, weight: Tensor) -> Tensor:
        """The weight as ``(D, C, *kernel)``: a view, except for grouped transposed convolutions."""
        if self.storage == "conv":
            return weight
        grouped = weight.unflatten(0, (self.conv_groups, -1)).transpose(1, 2)
        return grouped.flatten(0, 1)

    def weight(self, channels: Tensor) -> Tensor:
        """Inverse of :meth:`channels`."""
        if self.storage == "conv":
            return channels
        grouped = channels.unflatten(0, (self.conv_groups, -1)).transpose(1, 2)
        return grouped.flatten(0, 1)


_NORMALISATIONS = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.SyncBatchNorm,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED)


def layout_of(module: nn.Module, name: str) -> WeightLayout | str:
    """The layout of a module's parameter, or the reason why it has none.

    Args:
        module: The module that owns the parameter.
        name: The parameter's name in the module, e.g. ``"weight"``.

    Returns:
        A layout, or what to say of the parameter.

    Example:
        >>> layout_of(nn.Conv2d(4, 6, 3), "weight").kernel
        (3, 3)
        >>> layout_of(nn.Conv2d(4, 6, 3), "bias")
        'has one dimension: no kernels or blocks to form components of'
    """
    parameter = module.get_parameter(name)
    if isinstance(parameter, nn.UninitializedParameter):
        return "is not initialised yet: run a forward pass through the lazy module first"
    if isinstance(module, nn.utils.parametrize.ParametrizationList):
        return "is re-parametrised already: remove the parametrization first"
    if isinstance(module, _NORMALISATIONS):
        return "scales or shifts normalised features"
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return "is a lookup table: its rows are used one at a time, not as an operator"
    if isinstance(module, nn.Bilinear) and name == "weight":
        return "is a stack of bilinear forms, which have no input and output channels"
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        return "holds the gates of a recurrent layer in one tensor"
    if parameter.ndim < 2:
        return "has one dimension: no kernels or blocks to form components of"
    shape = tuple(parameter.shape)
    if isinstance(module, CONVOLUTIONS) and name == "weight":
        sections = module.groups if math.prod(shape[2:]) == 1 else 1
        return WeightLayout(shape, "transposed" if isinstance(module, _TRANSPOSED) else "conv", module.groups, sections)
    if isinstance(module, nn.Linear) and name == "weight":
        return WeightLayout(shape)
    if isinstance(module, nn.MultiheadAttention) and name == "in_proj_weight":
        return WeightLayout(shape, sections=3)
    if isinstance(module, nn.MultiheadAttention) and name in ("q_proj_weight", "k_proj_weight", "v_proj_weight"):
        return WeightLayout(shape)
    return (
        f"is {name!r} of {type(module).__name__}, of unknown layout: declare it by hand as a geoopt.ManifoldParameter "
        "if it is to be constrained"
    )
