r"""The parameters of a model with the places where they are used, and which of them look like outputs of the model.

A :class:`Site` is one parameter, tied or not. :func:`sites_of` finds all of them; :func:`output_heads` finds the layers
whose outputs no other layer takes.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor, nn

from fgo_geo.weights.layout import CONVOLUTIONS, WeightLayout, layout_of

__all__ = ["Pattern", "Site", "output_heads", "sites_of"]

Pattern = str | type[nn.Module]


@dataclass(frozen=True, eq=False)
class Site:
    """A parameter with all places where it is used.

    Attributes:
        param: The parameter.
        names: Its names in the model.
        owners: The module of each name.
        places: The position of each name among all of the model.
    """

    param: Tensor
    names: tuple[str, ...]
    owners: tuple[nn.Module, ...]
    places: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """The parameter's shape; empty if the parameter is not initialised yet."""
        return () if isinstance(self.param, nn.UninitializedParameter) else tuple(self.param.shape)

    def matches(self, pattern: Pattern) -> bool:
        """Whether a parameter name, module name, glob or module type matches this parameter."""
        if isinstance(pattern, type):
            return any(isinstance(owner, pattern) for owner in self.owners)
        return any(
            fnmatch.fnmatchcase(name, pattern)
            or fnmatch.fnmatchcase(name.rpartition(".")[0], pattern)
            or name.startswith(pattern + ".")
            for name in self.names
        )

    def layout(self) -> WeightLayout | str:
        """The layout that all owners agree on, or the reason why the parameter cannot be constrained."""
        layouts = self._layouts
        for name, layout in zip(self.names, layouts, strict=True):
            if isinstance(layout, str):
                return layout if len(layouts) == 1 else f"is tied, and as {name!r} it {layout}"
        if len(set(layouts)) > 1:
            return "is shared by layers that store it in different layouts"
        if not self.param.is_floating_point():
            return f"has type {self.param.dtype}, expected a real floating-point type"
        if self.param.is_inference():
            return "was made under torch.inference_mode() and cannot be trained: build the model outside of it"
        if not self.param.requires_grad:
            return "is frozen (requires_grad=False): unfreeze it first, or constrain it when it is to be trained"
        return layouts[0]

    @cached_property
    def _layouts(self) -> list[WeightLayout | str]:
        return [layout_of(m, n.rpartition(".")[2]) for m, n in zip(self.owners, self.names, strict=True)]

    def is_convolution(self) -> bool:
        """Whether this is the weight of a convolution, frozen or not."""
        return isinstance(self.owners[0], CONVOLUTIONS) and isinstance(self._layouts[0], WeightLayout)

    def is_linear(self) -> bool:
        """Whether this is the weight of a linear layer or a 1x1 convolution without groups, frozen or not."""
        return any(
            isinstance(layout, WeightLayout)
            and not isinstance(owner, nn.MultiheadAttention)
            and math.prod(layout.kernel) == layout.conv_groups == 1
            for owner, layout in zip(self.owners, self._layouts, strict=True)
        )

    def outputs(self) -> int:
        """Number of output channels of a weight with a layout; zero for others."""
        return max((layout.out_channels for layout in self._layouts if isinstance(layout, WeightLayout)), default=0)

    def inputs(self) -> list[tuple[int, int]]:
        """Place and number of the input channels of each use of this parameter; none for biases and embeddings."""
        found: list[tuple[int, int]] = []
        for place, owner, layout in zip(self.places, self.owners, self._layouts, strict=True):
            if isinstance(layout, WeightLayout):
                found.append((place, layout.in_channels * layout.conv_groups))
            elif "weight" in self.names[0] and self.shape and not isinstance(owner, nn.Embedding):
                found.append((place, self.shape[-1]))  # of normalisation, recurrent and unknown layers
        return found


def sites_of(model: nn.Module) -> list[Site]:
    """All parameters of a model, tied ones once, in the order of the model."""
    found: dict[Tensor, list[tuple[str, nn.Module, int]]] = {}
    place = 0
    for path, module in model.named_modules(remove_duplicate=False):
        for local, param in module.named_parameters(recurse=False, remove_duplicate=False):
            found.setdefault(param, []).append((f"{path}.{local}" if path else local, module, place))
            place += 1
    return [Site(param, *zip(*uses, strict=True)) for param, uses in found.items()]  # pyright: ignore


def output_heads(sites: Sequence[Site]) -> dict[Site, str]:
    """The linear layers and 1x1 convolutions that look like outputs of the model, with the reason.

    Without a graph, widths decide: a layer is an output head if no other layer has an input that fits its outputs. The
    last linear layer is the classifier, unless a later layer or a head takes its outputs. The place of a tied weight is
    that of its last name.

    Args:
        sites: All parameters of a model.

    Returns:
        The reason for each of them.
    """
    # A layer that takes images takes no outputs of other layers.
    images = [place for site in sites if site.is_convolution() for place, width in site.inputs() if width <= 4][:1]
    inputs = [(place, width) for site in sites for place, width in site.inputs() if place not in images]
    heads: dict[Site, str] = {}
    linear = sorted((site for site in sites if site.is_linear()), key=lambda site: site.places[-1])
    for site in linear:
        outputs, others = site.outputs(), [width for place, width in inputs if place not in site.places]
        if not any(_takes(w, outputs) or _takes_several(w, outputs, site.is_convolution()) for w in others):
            heads[site] = f"has {outputs} outputs that no other layer takes as inputs, like an output head"
    if linear:
        last, outputs = linear[-1], linear[-1].outputs()
        takers = [width for place, width in inputs if place > last.places[-1]]
        takers += [width for head in heads for _, width in head.inputs()]
        if last in heads or not any(_takes(width, outputs) for width in takers):
            heads[last] = "is the classifier (the last linear layer or 1x1 convolution)"
    return heads


def _takes(width: int, outputs: int) -> bool:
    """Whether a layer of this input width may take the outputs, all at once or in parts: projections, gates."""
    return outputs % width == 0 and outputs // width < 10


_FEW_OUTPUTS = 16  # of a linear layer; with more, an input may be several of them concatenated, or one repeated


def _takes_several(width: int, outputs: int, is_convolution: bool) -> bool:
    """Whether a layer of this input width may take them repeatedly, or with others: flattened maps, heads, branches."""
    return width % outputs == 0 and (is_convolution or outputs >= _FEW_OUTPUTS)
