r"""Fold batch normalisation into adjacent layers, so that norms are those of the maps that the network computes.

At inference a batch normalisation is the affine map ``y = s x + t`` of every channel, with running mean ``μ`` and
variance ``σ²``::

    s = γ / √(σ² + ε),    t = β - s μ

It can be folded exactly into a layer ``W x + b`` that directly

* *precedes* it, on the output channels: ``W' = diag(s) W``, ``b' = s b + t``;
* *follows* it, on the input channels: ``W' = W diag(s)``, ``b' = b + W t``. With zero padding this holds only for
  ``t = 0``, because the padded zeros are not shifted.

Between two activations (pre-activation blocks: normalise, rectify, convolve) it belongs to no layer. It then remains a
layer with the matrix ``diag(s)``, of spectral norm ``max |s|``, and contributes a separate factor to a product of
norms.

:func:`fold_batchnorm` finds the adjacent layers with :mod:`torch.fx`, changes a copy of the model, and records the
outcome for every normalisation. The copy keeps the model's own code; folded normalisations become
:class:`torch.nn.Identity`.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from dataclasses import dataclass
from typing import Literal, cast

from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from fgo_geo.models.constrain import unconstrain
from fgo_geo.models.renormalize import Renormalization, remove_renormalization
from fgo_geo.weights.layout import CONVOLUTIONS, WeightLayout, layout_of

__all__ = ["BatchNormRecord", "fold_batchnorm"]

BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm
Side = Literal["output", "input"]

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_LAYERS = (nn.Linear, *CONVOLUTIONS)
# Tracing runs the model's own code on proxies of tensors, and any of its operations may fail on them.
_TRACING_FAILS_WITH = (AssertionError, AttributeError, LookupError, NameError, RuntimeError, TypeError, ValueError)


@dataclass(frozen=True, eq=False)
class BatchNormRecord:
    """The outcome for one batch normalisation.

    Attributes:
        name: Its name in the model.
        layer: The layer that it was folded into; None if it was kept.
        side: Whether it was folded on the output or the input channels of the layer; None if it was kept.
        reason: Why it was kept; None if it was folded.
        scale: ``s = γ / √(σ² + ε)``, float64, one number per channel: the diagonal of the matrix that it multiplies by.
            None if it is not a fixed map or never called.
    """

    name: str
    layer: str | None
    side: Side | None
    reason: str | None
    scale: Tensor | None

    @property
    def norm(self) -> float | None:
        """Its spectral norm ``max |s|``; None if it is not a fixed map."""
        return None if self.scale is None else float(self.scale.abs().max())


def fold_batchnorm(model: nn.Module) -> tuple[nn.Module, tuple[BatchNormRecord, ...]]:
    """A copy of a model with batch normalisations folded into convolutions and linear layers, for measuring.

    The copy is in eval mode, computes what the model computes in eval mode, up to rounding, and is plain: weights on
    manifolds and renormalised weights become parameters with the values that they have. The model does not change.

    The copy keeps some normalisations, and the records hold the reason: normalisations without running statistics;
    normalisations with no layer directly before or after them; normalisations that are called more than once, have
    hooks or share their parameters, or whose neighbour is such a layer; and all of them if :mod:`torch.fx` cannot trace
    the model. The function assumes that linear layers act on ``(N, features)``.

    Args:
        model: Any module.

    Returns:
        The copy, and one record per batch normalisation in the order of the model.

    Raises:
        TypeError: If the model is not a module.

    Source:
        The formulas are those of :mod:`torch.nn.utils.fusion`, for both sides and all layouts.

    Example:
        >>> block = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU())
        >>> folded, (record,) = fold_batchnorm(block)
        >>> record.layer, record.side
        ('0', 'output')
        >>> folded[1]
        Identity()
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"fold_batchnorm: model is {type(model).__name__}; expected a torch.nn.Module. A state_dict has no layers: "
            "load it into its model first"
        )
    folded = _plain_copy(model).eval()
    norms = [(name, module) for name, module in folded.named_modules() if isinstance(module, _BATCH_NORMS)]
    try:
        graph = fx.Tracer().trace(folded)
    except _TRACING_FAILS_WITH as error:
        reason = f"torch.fx cannot trace the model: {type(error).__name__}: {error}"
        return folded, tuple(BatchNormRecord(name, None, None, reason, _scale_or_none(norm)) for name, norm in norms)
    folder = _Folder(folded, graph)
    return folded, tuple(folder.fold(name, norm) for name, norm in norms)


def _plain_copy(model: nn.Module) -> nn.Module:
    plain = unconstrain(copy.deepcopy(model))
    for module in list(plain.modules()):
        if parametrize.is_parametrized(module):
            for name, chain in list(cast("nn.ModuleDict", module.parametrizations).items()):
                steps = list(chain.children())
                if len(steps) == 1 and isinstance(steps[0], Renormalization):
                    remove_renormalization(module, name)
    return plain


class _Folder:
    """Folds the normalisations of a traced model one by one.

    Args:
        model: The model to change.
        graph: Its trace.
    """

    def __init__(self, model: nn.Module, graph: fx.Graph) -> None:
        self._model = model
        self._nodes: dict[str, fx.Node] = {}
        self._calls: Counter[str] = Counter()
        self._read: set[str] = set()
        for node in graph.nodes:
            if node.op == "call_module":
                self._nodes[str(node.target)] = node
                self._calls[str(node.target)] += 1
            elif node.op == "get_attr":
                self._read.add(str(node.target).rpartition(".")[0])
        parameters = model.named_parameters(remove_duplicate=False)
        self._owners = Counter(param for _, param in parameters)

    def fold(self, name: str, norm: BatchNorm) -> BatchNormRecord:
        """Fold one normalisation, or record why it is kept."""
        scale_shift = _affine(norm)
        if scale_shift is None:
            reason = "has no running statistics: it normalises by those of the batch, which is not a fixed linear map"
            return BatchNormRecord(name, None, None, reason, None)
        node = self._nodes.get(name)
        if node is None or not node.users:
            return BatchNormRecord(name, None, None, "is never used", None)
        scale, shift = scale_shift
        obstacle = self._obstacle(name, norm)
        if obstacle is not None:
            return BatchNormRecord(name, None, None, obstacle, scale)
        reasons: list[str] = []
        sides: tuple[Side, Side] = ("output", "input")
        for side in sides:
            layer, reason = self._neighbour(node, side, shift)
            if reason is None:
                _fold_into(self._model.get_submodule(layer), side, scale, shift)
                self._replace(norm)
                return BatchNormRecord(name, layer, side, None, scale)
            reasons.append(f"{'before' if side == 'output' else 'after'} it, {reason}")
        return BatchNormRecord(name, None, None, "; ".join(reasons), scale)

    def _obstacle(self, name: str, module: nn.Module) -> str | None:
        """Why a module must stay as it is."""
        if self._calls[name] > 1:
            return f"{name} is called {self._calls[name]} times"
        if name in self._read or any(self._owners[p] > 1 for p in module.parameters(recurse=False)):
            return f"the parameters of {name} are used elsewhere too"
        if module._forward_hooks or module._forward_pre_hooks:  # pyright: ignore[reportPrivateUsage]
            return f"{name} has forward hooks"
        return None

    def _neighbour(self, node: fx.Node, side: Side, shift: Tensor) -> tuple[str, str | None]:
        """The layer on one side of a normalisation, and why the normalisation cannot be folded into it."""
        if side == "output":
            source = node.args[0] if node.args else next(iter(node.kwargs.values()))
            neighbour = cast("fx.Node", source)
            shared = neighbour if len(neighbour.users) > 1 else None
        else:
            shared = node if len(node.users) > 1 else None
            neighbour = next(iter(node.users))
        name = str(neighbour.target)
        if shared is not None:
            return name, f"the output of {shared.name} is used {len(shared.users)} times"
        module = self._model.get_submodule(name) if neighbour.op == "call_module" else None
        if type(module) not in _LAYERS:
            return name, f"{neighbour.name} is not a convolution or linear layer"
        layer = cast("nn.Module", module)
        layout = cast(WeightLayout, layout_of(layer, "weight"))
        channels = layout.out_channels if side == "output" else layout.in_channels * layout.conv_groups
        if channels != len(shift):
            return name, f"{name} has {channels} channels and the normalisation {len(shift)}"
        if side == "input" and bool((shift != 0).any()) and _sees_zeros(layer):
            return name, f"{name} pads with zeros, which are not shifted"
        return name, self._obstacle(name, layer)

    def _replace(self, norm: BatchNorm) -> None:
        for parent in list(self._model.modules()):
            for local, child in parent.named_children():
                if child is norm:
                    setattr(parent, local, nn.Identity())


def _affine(norm: BatchNorm) -> tuple[Tensor, Tensor] | None:
    """``s = γ / √(σ² + ε)`` and ``t = β - s μ`` in float64; None without running statistics."""
    if norm.running_mean is None or norm.running_var is None:
        return None
    mean, variance = norm.running_mean.detach().double(), norm.running_var.detach().double()
    gamma, beta = cast("tuple[Tensor | None, Tensor | None]", (norm.weight, norm.bias))
    scale = (variance + norm.eps).rsqrt()
    if gamma is not None:
        scale = scale * gamma.detach().double()
    shift = -scale * mean
    return scale, shift if beta is None else shift + beta.detach().double()


def _scale_or_none(norm: BatchNorm) -> Tensor | None:
    scale_shift = _affine(norm)
    return None if scale_shift is None else scale_shift[0]


def _sees_zeros(layer: nn.Module) -> bool:
    """Whether some outputs see fewer inputs than others: zero padding, or the borders of a transposed convolution."""
    if isinstance(layer, nn.Linear):
        return False
    conv = cast(nn.Conv2d, layer)
    if conv.transposed:
        return True
    if conv.padding_mode != "zeros" or conv.padding == "valid":
        return False
    return math.prod(conv.kernel_size) > 1 if conv.padding == "same" else any(conv.padding)


def _fold_into(layer: nn.Module, side: Side, scale: Tensor, shift: Tensor) -> None:
    """Replace a layer's weight and bias by those of the layer and the normalisation together."""
    weight, bias = cast("tuple[Tensor, Tensor | None]", (layer.weight, layer.bias))
    layout = cast(WeightLayout, layout_of(layer, "weight"))
    channels = layout.channels(weight.detach().double())
    offset = scale.new_zeros(layout.out_channels) if bias is None else bias.detach().double()
    if side == "output":
        per_kernel = scale[:, None]
        offset = scale * offset + shift
    else:
        rows = layout.out_channels // layout.conv_groups  # output channels that see the same input channels
        per_kernel, shifts = (v.reshape(layout.conv_groups, -1).repeat_interleave(rows, 0) for v in (scale, shift))
        offset = offset + (channels.reshape(*channels.shape[:2], -1).sum(2) * shifts).sum(1)
    channels = channels * per_kernel.reshape(*per_kernel.shape, *(1,) * len(layout.kernel))
    layer.weight = nn.Parameter(layout.weight(channels).to(weight.dtype), weight.requires_grad)
    if bias is not None or bool((offset != 0).any()):
        requires_grad = weight.requires_grad if bias is None else bias.requires_grad
        layer.bias = nn.Parameter(offset.to(weight.dtype), requires_grad)
