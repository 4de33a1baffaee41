r"""Running standard deviations of a layer's input channels: the statistical factor ``λ`` of the radius ``R = γ / λ``.

The re-scaling parameter of a component divides by the standard deviation of the features that the component is applied
to ([Ozay2019]_; "Mathematics", section 5). It is computed in three steps:

1. :class:`FeatureStatistics` keeps a running mean and variance per channel by the conventions of batch normalisation;
   :func:`track` lets a layer feed one with its inputs;
2. :func:`rescaling_lambda` turns them into one ``λ`` per input channel;
3. :func:`kernel_lambda` and :func:`component_lambda` carry it to the components of a weight.

Statistics change in every forward pass of training. ``λ`` changes only when the caller updates it, usually once per
epoch, and only then do processes communicate.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fgo_geo.weights.components import Partition
from fgo_geo.weights.layout import CONVOLUTIONS, WeightLayout

__all__ = [
    "FeatureStatistics",
    "FullPrecisionBuffers",
    "LambdaRule",
    "TrackingHandle",
    "component_lambda",
    "is_tracked",
    "kernel_lambda",
    "require_trackable",
    "rescaling_lambda",
    "track",
    "untrack",
]

LambdaRule = Literal["max1", "std"]

_ATTRIBUTE = "fgo_geo_statistics"  # where a layer keeps its statistics
_HALF = (torch.float16, torch.bfloat16)
_SMALLEST_STD = math.sqrt(1e-5)  # the ε of batch normalisation


class FullPrecisionBuffers(nn.Module):
    """A module whose buffers stay in single precision, bit for bit, when the model is cast to half precision."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        def keep_precision(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            return tensor.to(result.device) if result.dtype in _HALF else result

        return super()._apply(keep_precision, recurse)


class FeatureStatistics(FullPrecisionBuffers):
    r"""Running mean and variance of features, per channel.

    The conventions are those of :class:`torch.nn.BatchNorm2d`: a batch's mean and unbiased variance enter with weight
    ``momentum``; nothing changes in evaluation mode; the variance starts at one. Inputs in half precision are summed in
    single precision. A batch with fewer than two values per channel has no variance and is skipped. Each process keeps
    the statistics of its own batches; :meth:`variance` combines them.

    Args:
        channels: Number of channels.
        momentum: Weight of a new batch; None for the plain average over all batches.
        device: Device of the buffers.
        dtype: Type of the buffers, single precision if left out.

    Attributes:
        running_mean: Shape ``(channels,)``.
        running_var: Shape ``(channels,)``.
        num_batches_tracked: Number of batches that were not skipped.

    Raises:
        ValueError: If there are no channels or the momentum is not in ``[0, 1]``.

    Example:
        >>> statistics = FeatureStatistics(2, momentum=None)
        >>> statistics(torch.tensor([[0.0, 5.0], [2.0, 5.0]]), channel_dim=1)
        >>> statistics.running_mean, statistics.running_var.round(decimals=4)
        (tensor([1., 5.]), tensor([2., 0.]))
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    hook: RemovableHandle | None = None  # of the layer that feeds it; copying and pickling the layer copies it too

    def __init__(
        self,
        channels: int,
        momentum: float | None = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if channels < 1:
            raise ValueError(f"FeatureStatistics: channels must be at least 1, got {channels!r}")
        if momentum is not None and not 0 <= momentum <= 1:
            raise ValueError(f"FeatureStatistics: momentum must be in [0, 1], or None to average, got {momentum!r}")
        self.momentum = momentum
        self.register_buffer("running_mean", torch.zeros(channels, device=device, dtype=dtype))
        self.register_buffer("running_var", torch.ones(channels, device=device, dtype=dtype))
        self.register_buffer("num_batches_tracked", torch.zeros((), device=device, dtype=torch.long))

    @torch.no_grad()
    def forward(self, input: Tensor, channel_dim: int) -> None:
        """Update the statistics by a batch of features; in evaluation mode they do not change.

        Args:
            input: Features, of any shape with the channels along one dimension.
            channel_dim: The dimension of the channels.

        Raises:
            ValueError: If the dimension has another size than there are channels.
        """
        if not self.training:
            return
        channels = self.running_mean.shape[0]
        if not -input.ndim <= channel_dim < input.ndim or input.shape[channel_dim] != channels:
            raise ValueError(
                f"FeatureStatistics: expected {channels} channels along dimension {channel_dim}, "
                f"got an input of shape {tuple(input.shape)}"
            )
        count, mean, var = _moments(input, channel_dim % input.ndim)
        usable = count > 1
        self.num_batches_tracked.add_(usable)
        weight = 1 / self.num_batches_tracked.clamp(min=1) if self.momentum is None else self.momentum
        unbiased = var * (count / (count - 1).clamp(min=1))
        for running, batch in ((self.running_mean, mean), (self.running_var, unbiased)):
            update = running + weight * (batch.to(running.dtype) - running)
            running.copy_(torch.where(usable, update, running))

    def std(self) -> Tensor:
        """Running standard deviation per channel, shape ``(channels,)``; one before the first batch."""
        return self.running_var.sqrt()

    def variance(self, group: dist.ProcessGroup | None = None) -> Tensor:
        """Running variance per channel over all processes: the mean of theirs, and the variance of their means.

        Where ``torch.distributed`` is initialised, all processes of the group must call this. Processes are weighted by
        the number of their batches.

        Args:
            group: The processes that see different data; None for all.

        Returns:
            The same on every process, shape ``(channels,)``; one before the first batch.
        """
        if not (dist.is_available() and dist.is_initialized()):
            return self.running_var
        count, mean, var = self.num_batches_tracked.double(), self.running_mean.double(), self.running_var.double()
        sums = torch.cat((count.unsqueeze(0), count * mean, count * (var + mean.square())))
        dist.all_reduce(sums, group=group)
        mean, square = (sums[1:] / sums[0].clamp(min=1)).chunk(2)
        return torch.where(sums[0] > 0, (square - mean.square()).clamp(min=0), 1).to(self.running_var.dtype)

    def extra_repr(self) -> str:
        """Number of channels and momentum."""
        return f"{self.running_mean.shape[0]}, momentum={self.momentum}"


def _moments(input: Tensor, channel_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Number of values per channel, their mean and their mean squared deviation."""
    x = (input.float() if input.dtype in _HALF else input).unsqueeze(0)
    others = [d for d in range(x.ndim) if d != channel_dim + 1]
    channels = x.shape[channel_dim + 1]
    count = x.new_full((), x.numel() // channels)
    if x.numel() == 0:
        nothing = x.new_zeros(channels)
        return count, nothing, nothing
    mean = x.mean(others, keepdim=True)
    deviation = torch.linalg.vector_norm(x - mean, dim=others)  # on CPU several times faster than torch.var_mean
    return count, mean.flatten(), deviation.square() / count


# -- layers ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrackingHandle:
    """The handle that :func:`track` returns.

    Attributes:
        module: The tracked layer.
    """

    module: nn.Module

    @property
    def statistics(self) -> FeatureStatistics:
        """The statistics of the layer's inputs."""
        return getattr(self.module, _ATTRIBUTE)

    def remove(self) -> None:
        """Stop tracking and forget the statistics."""
        untrack(self.module)


def track(module: nn.Module, momentum: float | None = 0.1) -> TrackingHandle:
    """Record statistics of a layer's input channels in every forward pass of training.

    The layer holds them as its submodule ``fgo_geo_statistics``, so they are part of its ``state_dict`` and its copies
    and follow it to other devices. A layer whose ``forward`` is never called (the output projection inside
    :class:`torch.nn.MultiheadAttention`) keeps a standard deviation of one.

    Args:
        module: A convolution, a transposed convolution or a linear layer. In a grouped convolution all input channels
            are tracked.
        momentum: Weight of a new batch; None for the plain average over all batches.

    Returns:
        A handle with the ``statistics``; its ``remove()`` undoes this function.

    Raises:
        TypeError: If the module is of another kind.
        ValueError: If it is tracked already, or lazy and not initialised yet.

    Example:
        >>> layer = nn.Linear(3, 1)
        >>> handle = track(layer)
        >>> _ = layer(torch.randn(8, 3))
        >>> handle.statistics.num_batches_tracked
        tensor(1)
    """
    require_trackable(module)
    layer = cast("nn.Linear | nn.Conv2d", module)
    channels = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
    dtype = torch.promote_types(layer.weight.dtype, torch.float32)
    statistics = FeatureStatistics(channels, momentum, layer.weight.device, dtype).train(module.training)
    statistics.hook = module.register_forward_pre_hook(_record, with_kwargs=True)
    setattr(module, _ATTRIBUTE, statistics)
    return TrackingHandle(module)


def require_trackable(module: nn.Module) -> None:
    """Raise if :func:`track` would.

    Raises:
        TypeError: If the module is neither a convolution nor a linear layer.
        ValueError: If it is tracked already, or lazy and not initialised yet.
    """
    kind = type(module).__name__
    if not isinstance(module, (nn.Linear, *CONVOLUTIONS)):
        raise TypeError(f"track takes a convolution or a linear layer, got a {kind}: its input has no known channels")
    if is_tracked(module):
        raise ValueError(f"this {kind} is tracked already; untrack it first")
    if isinstance(module.weight, nn.parameter.UninitializedParameter):
        raise ValueError(f"this {kind} has no weight yet; run a forward pass through it first")


def is_tracked(module: nn.Module) -> bool:
    """Whether a layer's input channels are tracked."""
    return isinstance(getattr(module, _ATTRIBUTE, None), FeatureStatistics)


def untrack(module: nn.Module) -> None:
    """Undo :func:`track`, also on a copy of the tracked layer.

    Args:
        module: A tracked layer.

    Raises:
        ValueError: If it is not tracked.
    """
    hook = TrackingHandle(module).statistics.hook if is_tracked(module) else None
    if hook is None:
        raise ValueError(f"this {type(module).__name__} is not tracked; there is nothing to undo")
    hook.remove()
    delattr(module, _ATTRIBUTE)


def _record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook: a function of the module, so that models can be copied and pickled.

    Activation checkpointing repeats a forward pass inside the backward pass; the repetition is not counted.
    """
    if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:  # pyright: ignore
        return
    features = args[0] if args else kwargs["input"]
    channel_dim = -1 if isinstance(module, nn.Linear) else -1 - len(module.kernel_size)  # pyright: ignore
    getattr(module, _ATTRIBUTE)(features, channel_dim)


# -- λ -----------------------------------------------------------------------------------------------------------


def rescaling_lambda(statistics: FeatureStatistics, rule: LambdaRule, group: dist.ProcessGroup | None = None) -> Tensor:
    """``λ`` per channel: ``max(1, std)`` for ``"max1"``, ``std`` for ``"std"`` ("Mathematics", section 5).

    Dividing by ``max(1, std)`` can only shrink norms, so a norm bound ``β`` survives; with the plain ``std`` of the
    paper the guarantee is ``β / λ``. There, a channel without variance gets ``λ = √ε`` with the ``ε = 1e-5`` of batch
    normalisation. Before the first batch ``λ`` is one.

    Args:
        statistics: Of the input channels.
        rule: ``"max1"`` or ``"std"``.
        group: The processes that see different data, see :meth:`FeatureStatistics.variance`.

    Returns:
        Positive numbers, shape ``(channels,)``.

    Raises:
        ValueError: If the rule is unknown.

    Example:
        >>> statistics = FeatureStatistics(2)
        >>> statistics.running_var.copy_(torch.tensor([4.0, 0.25]))
        tensor([4.0000, 0.2500])
        >>> rescaling_lambda(statistics, "max1"), rescaling_lambda(statistics, "std")
        (tensor([2., 1.]), tensor([2.0000, 0.5000]))
    """
    if rule not in get_args(LambdaRule):
        raise ValueError(f"the rule for λ must be one of {get_args(LambdaRule)}, got {rule!r}")
    return statistics.variance(group).sqrt().clamp(min=1.0 if rule == "max1" else _SMALLEST_STD)


def kernel_lambda(lam: Tensor, layout: WeightLayout) -> Tensor:
    """``λ`` of every kernel of a weight: that of the input channel that the kernel is applied to.

    Kernel ``(d, c)`` of a grouped convolution, with ``C`` input channels per group, belongs to input channel
    ``group(d) C + c``.

    Args:
        lam: ``λ`` per input channel, shape ``(groups C,)``.
        layout: The weight's layout.

    Returns:
        ``λ`` per kernel, shape ``(D, C)``, in the order of :meth:`WeightLayout.channels`.

    Raises:
        ValueError: If the number of channels does not fit the layout.

    Example:
        >>> grouped = WeightLayout((4, 1, 3, 3), conv_groups=2)
        >>> kernel_lambda(torch.tensor([1.0, 2.0]), grouped).flatten()
        tensor([1., 1., 2., 2.])
    """
    groups = layout.conv_groups
    if tuple(lam.shape) != (groups * layout.in_channels,):
        raise ValueError(
            f"a weight of shape {layout.shape} in {groups} group(s) has {groups * layout.in_channels} input channels, "
            f"got λ of shape {tuple(lam.shape)}"
        )
    return lam.reshape(groups, -1).repeat_interleave(layout.out_channels // groups, dim=0)


def component_lambda(lam: Tensor, cut: Partition) -> list[Tensor]:
    """``λ`` of every component: that of its input channel, or the root mean square over the channels of a block.

    Args:
        lam: ``λ`` per input channel.
        cut: The partition of the weight.

    Returns:
        For every part ``λ`` per component, shape ``(n,)``.

    Example:
        >>> from fgo_geo.weights.components import partition
        >>> from fgo_geo.weights.grouping import collection
        >>> layer = collection(2, 2, "layer", "sphere", components="block")
        >>> component_lambda(torch.tensor([1.0, 7.0]), partition([layer], WeightLayout((2, 2))))
        [tensor([5.])]
    """
    layout = cut.layout
    per_kernel = kernel_lambda(lam, layout)
    squares = per_kernel.square().reshape(*per_kernel.shape, *(1,) * len(layout.kernel)).expand(-1, -1, *layout.kernel)
    return [part.mean((-2, -1)).sqrt() for part in cut.split(layout.weight(squares))]
