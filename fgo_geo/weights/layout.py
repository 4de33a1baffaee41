r"""How layers store their weights. No other module depends on these details.

A :class:`WeightLayout` records which dimensions of a weight hold the output channels, the input channels and the
kernel. :func:`layout_of` returns the layout of a module's parameter, or the reason why there is none. This module
registers the layouts of torch's layers with :func:`register_layout`, and users register those of their own layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

__all__ = ["CONVOLUTIONS", "Storage", "WeightLayout", "has_own_forward", "layout_of", "register_layout"]

Storage = Literal["conv", "transposed"]


@dataclass(frozen=True)
class WeightLayout:
    """How a weight stores output channels, input channels and the kernel.

    Attributes:
        shape: The weight's shape.
        storage: ``"conv"`` for ``(D, C, *kernel)`` (linear layers have no kernel), ``"transposed"`` for the
            ``(groups C, D / groups, *kernel)`` of transposed convolutions, and for matrices ``(C, D)``.
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

LayoutRule = Callable[[Any], WeightLayout]
_rules: dict[tuple[str, str], LayoutRule] = {}


def register_layout(layer: type[nn.Module] | str, parameter: str, layout: LayoutRule) -> None:
    """Register how a type of layer stores a weight, so that :func:`~fgo_geo.constrain` and other functions can read it.

    The layout also applies to derived classes; the layout of the nearest base class counts. A second call replaces the
    first.

    Args:
        layer: The type, or its full name, ``"package.module.Class"``, which does not import the package.
        parameter: Name of the weight in the layer, e.g. ``"weight"``.
        layout: From a layer to the layout of its weight.

    Raises:
        TypeError: If ``layer`` is neither a module type nor a name, or ``layout`` is not callable.

    Example:
        A linear layer that stores its matrix as ``(C, D)``, as the ``Conv1D`` of GPT-2 does:

        >>> class Transposed(nn.Linear):
        ...     def __init__(self, in_features, out_features):
        ...         super().__init__(out_features, in_features)
        >>> register_layout(
        ...     Transposed, "weight", lambda layer: WeightLayout(tuple(layer.weight.shape), "transposed")
        ... )
        >>> layout_of(Transposed(3, 5), "weight").out_channels
        5
    """
    is_type = isinstance(layer, type) and issubclass(layer, nn.Module)
    if not (is_type or (isinstance(layer, str) and "." in layer)):
        raise TypeError(
            "register_layout: expected a type of torch.nn.Module or its full name, 'package.module.Class', got "
            f"{layer!r}"
        )
    if not (isinstance(parameter, str) and callable(layout)):
        raise TypeError(
            "register_layout: expected the name of a parameter and a function from a layer to its WeightLayout, got "
            f"{parameter!r} and {layout!r}"
        )
    _rules[_full_name(layer) if isinstance(layer, type) else layer, parameter] = layout


def _full_name(layer: type) -> str:
    return f"{layer.__module__}.{layer.__qualname__}"


def _of_convolution(layer: nn.Conv2d) -> WeightLayout:
    shape = tuple(layer.weight.shape)
    storage = "transposed" if isinstance(layer, _TRANSPOSED) else "conv"
    return WeightLayout(shape, storage, layer.groups, layer.groups if math.prod(shape[2:]) == 1 else 1)


def _of_matrix(name: str, storage: Storage = "conv", sections: int = 1) -> LayoutRule:
    return lambda layer: WeightLayout(tuple(getattr(layer, name).shape), storage, sections=sections)


for _convolution in CONVOLUTIONS:
    register_layout(_convolution, "weight", _of_convolution)
register_layout(nn.Linear, "weight", _of_matrix("weight"))
register_layout(nn.MultiheadAttention, "in_proj_weight", _of_matrix("in_proj_weight", sections=3))
for _name in ("q_proj_weight", "k_proj_weight", "v_proj_weight"):
    register_layout(nn.MultiheadAttention, _name, _of_matrix(_name))
register_layout("transformers.pytorch_utils.Conv1D", "weight", _of_matrix("weight", "transposed"))


def layout_of(module: nn.Module, name: str) -> WeightLayout | str:
    """The layout of a module's parameter, or the reason why it has none.

    Args:
        module: The module that owns the parameter.
        name: The parameter's name in the module, e.g. ``"weight"``.

    Returns:
        A layout, or the reason in words.

    Raises:
        ValueError: If the layout that was registered is for another shape.

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
    for base in type(module).__mro__:
        rule = _rules.get((_full_name(base), name))
        if rule is not None:
            return _checked(rule(module), module, name)
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
    return (
        f"is {name!r} of {type(module).__name__}, of unknown layout, and stays free, as tokens and position "
        "embeddings usually do: to constrain it, say how it is stored (fgo_geo.register_layout), or declare it by hand "
        "as a geoopt.ManifoldParameter"
    )


def _checked(layout: WeightLayout, module: nn.Module, name: str) -> WeightLayout:
    shape = tuple(module.get_parameter(name).shape)
    if layout.shape != shape:
        raise ValueError(
            f"the layout registered for {name!r} of {type(module).__name__} is for shape {layout.shape}, the parameter "
            f"has {shape}"
        )
    return layout


def has_own_forward(module: nn.Module) -> bool:
    """Whether a convolution or linear layer has a class with a forward pass other than torch's own.

    Such a layer may not compute with its weight itself: weight standardisation, for example, centres and rescales it.

    Example:
        >>> class Standardised(nn.Conv2d):
        ...     def forward(self, x):
        ...         return self._conv_forward(x, self.weight / self.weight.norm(), self.bias)
        >>> has_own_forward(Standardised(2, 2, 3)), has_own_forward(nn.Conv2d(2, 2, 3))
        (True, False)
    """
    base = next((base for base in type(module).__mro__ if base in (nn.Linear, *CONVOLUTIONS)), None)
    names = ("forward", "_conv_forward")
    return base is not None and any(getattr(type(module), n, None) is not getattr(base, n, None) for n in names)
