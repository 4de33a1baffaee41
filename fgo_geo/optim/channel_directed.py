r"""Channel-directed gradients: the gradient in an inner product along a channel axis, under any optimiser.

The gradient of a loss depends on the inner product of the space of weights. With another inner product
``<h, k>_M = Σ h (M k)`` than the plain one, the direction of steepest descent is ``G = M⁻¹ g``, the one tensor with
``<G, h>_M = Σ g h`` for all ``h``. [Lao2020]_ choose an ``M`` that couples the channels of a layer: it acts along one
axis of the weight, of length ``D``, and on every other index (a *passenger*) alike ("Mathematics", section 7). With
the mean ``m(h)`` along the axis and the forward difference ``Δ``:

=======  ===============================================  =============================
metric   inner product ``<h, k>``                         gradient ``G``
=======  ===============================================  =============================
``h0``   ``D m(h) m(k) + λ Σ (h - m(h)) (k - m(k))``      ``m(g) + (g - m(g)) / λ``
``h1``   ``Σ h k + λ Σ (Δh) (Δk)``                        ``(I + λ ΔᵀΔ)⁻¹ g``
``h1t``  ``D m(h) m(k) + λ Σ (Δh) (Δk)``                  ``m(g) + (ΔᵀΔ)⁺ (g - m(g)) / λ``
=======  ===============================================  =============================

The module has three layers, each usable without the next:

1. :func:`channel_inner` is the middle column and :func:`channel_directed_gradient` the last one, as pure functions.
   With periodic ends the Sobolev metrics are diagonal in the Fourier basis, and free ends differ from that by a
   matrix of rank one: a real Fourier transform solves for all, in ``D log D`` operations per passenger;
2. a *rule* says which parameters have a channel axis, and which one;
3. :func:`channel_directed` attaches the first two to an optimiser by its step hooks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, NamedTuple, cast, get_args
from weakref import WeakSet

import geoopt
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fgo_geo.linalg import computes_in_float32
from fgo_geo.weights.layout import WeightLayout, layout_of

__all__ = [
    "ChannelDirected",
    "channel_directed",
    "channel_directed_gradient",
    "channel_inner",
]

Metric = Literal["h0", "h1", "h1t"]
Ends = Literal["periodic", "free"]
_METRICS, _ENDS = get_args(Metric), get_args(Ends)


# -- inner products and gradients --------------------------------------------------------------------------------------


def channel_inner(
    h: Tensor,
    k: Tensor,
    metric: Metric = "h0",
    lam: float = 1.0,
    axis: int = 0,
    ends: Ends = "periodic",
    groups: int = 1,
) -> Tensor:
    r"""Inner product of two tensors that weighs how they vary along a channel axis ([Lao2020]_).

    Summed over all passengers, with ``m`` the mean along the axis and ``D`` its length (within a group)::

        h0:   D m(h) m(k) + λ Σ (h - m(h)) (k - m(k))
        h1:   Σ h k       + λ Σ (Δh) (Δk)
        h1t:  D m(h) m(k) + λ Σ (Δh) (Δk)

    ``Δh[i] = h[i + 1] - h[i]``; with periodic ends ``i + 1`` is taken modulo ``D``, with free ends the last
    difference is left out.

    Args:
        h: Real tensor.
        k: Real tensor of the same shape.
        metric: ``"h0"`` (re-weighted L2), ``"h1"`` (Sobolev) or ``"h1t"`` (Sobolev, mean-preserving).
        lam: Weight ``λ``: positive, for ``h1`` also zero.
        axis: The channel axis.
        ends: ``"periodic"`` or ``"free"``; without meaning for ``h0``.
        groups: Number of equal runs of the axis, each with its own differences and mean.

    Returns:
        A tensor without dimensions.

    Raises:
        ValueError: If an option is not one of the above.
        TypeError: If a tensor is complex or holds integers.

    Example:
        >>> h = torch.tensor([1.0, 3.0])
        >>> channel_inner(h, h, "h1", lam=0.5, ends="free")  # 1 + 9 + 0.5 * 2²
        tensor(12.)
    """
    _check_metric(metric, lam, ends)
    if h.shape != k.shape:
        raise ValueError(
            f"the inner product takes two tensors of one shape, but got {tuple(h.shape)} and {tuple(k.shape)}"
        )
    _check_tensor(h, "h")
    _check_tensor(k, "k")
    axis = _check_axis(h.shape, axis, groups)
    return _inner(_columns(h, axis, groups), _columns(k, axis, groups), metric, lam, ends)


def channel_directed_gradient(
    g: Tensor,
    metric: Metric = "h0",
    lam: float = 1.0,
    axis: int = 0,
    ends: Ends = "periodic",
    groups: int = 1,
) -> Tensor:
    r"""The gradient with respect to :func:`channel_inner`, from the ordinary one ([Lao2020]_).

    The one tensor ``G`` with ``channel_inner(G, h) = Σ g h`` for all ``h``::

        h0:   m(g) + (g - m(g)) / λ
        h1:   (I + λ ΔᵀΔ)⁻¹ g
        h1t:  m(g) + (ΔᵀΔ)⁺ (g - m(g)) / λ

    The mean along the axis stays; what varies along it is damped, by ``h0`` alike at every frequency, by ``h1`` the
    more the faster it varies. ``h1t`` damps like ``h1`` for large ``λ``, and *amplifies* slow variation up to
    ``D² / (4 π² λ)`` times (free ends: ``D² / (π² λ)``) where that is above one.

    The map is linear, symmetric and positive, differentiable and free of host synchronisation. Half precision is
    computed in float32 and rounded once.

    Args:
        g: Real gradient of any shape, for instance ``(D, C, kh, kw)``.
        metric: ``"h0"`` (re-weighted L2), ``"h1"`` (Sobolev) or ``"h1t"`` (Sobolev, mean-preserving).
        lam: Weight ``λ``: positive, for ``h1`` also zero. ``h0`` with 1 and ``h1`` with 0 give ``g``.
        axis: The channel axis. Output channels are axis 0 of a convolution or a linear layer, axis 1 of a transposed
            convolution.
        ends: ``"periodic"``: the last channel is a neighbour of the first; ``"free"``: it is not. Without meaning
            for ``h0``.
        groups: Number of equal runs of the axis that are smoothed one by one: the groups of a grouped convolution.

    Returns:
        A new tensor with the shape and type of ``g``.

    Raises:
        ValueError: If an option is not one of the above, or the axis doesn't exist or doesn't split in ``groups``.
        TypeError: If ``g`` is complex or holds integers.

    Example:
        Mean 4; with ``λ = 2`` the deviations -3, -1, 1, 3 halve.

        >>> channel_directed_gradient(torch.tensor([1.0, 3.0, 5.0, 7.0]), "h0", lam=2.0)
        tensor([2.5000, 3.5000, 4.5000, 5.5000])
    """
    _check_metric(metric, lam, ends)
    _check_tensor(g, "the gradient")
    axis = _check_axis(g.shape, axis, groups)
    directed = _directed(_columns(g, axis, groups), metric, lam, ends)
    return _from_columns(directed.contiguous(), g.shape, axis, groups).contiguous()


def _columns(x: Tensor, axis: int, groups: int) -> Tensor:
    """A matrix with one column per passenger and group, in which the channel axis runs downwards."""
    matrix = x.movedim(axis, 0).reshape(x.shape[axis], -1)
    return matrix if groups == 1 else matrix.unflatten(0, (groups, -1)).movedim(0, 1).flatten(1)


def _from_columns(columns: Tensor, shape: torch.Size, axis: int, groups: int) -> Tensor:
    """Inverse of :func:`_columns`."""
    passengers = [*shape[:axis], *shape[axis + 1 :]]
    runs = columns.reshape(columns.shape[0], groups, *passengers).movedim(1, 0)
    return runs.reshape(shape[axis], *passengers).movedim(0, axis)


@computes_in_float32
def _inner(h: Tensor, k: Tensor, metric: Metric, lam: float, ends: Ends) -> Tensor:
    mean_h, mean_k = h.mean(0), k.mean(0)
    if metric == "h0":
        return h.shape[0] * (mean_h * mean_k).sum() + lam * ((h - mean_h) * (k - mean_k)).sum()
    rough = (_difference(h, ends) * _difference(k, ends)).sum()
    level = (h * k).sum() if metric == "h1" else h.shape[0] * (mean_h * mean_k).sum()
    return level + lam * rough


def _difference(x: Tensor, ends: Ends) -> Tensor:
    return x.roll(-1, 0) - x if ends == "periodic" else x.diff(dim=0)


@computes_in_float32
def _directed(g: Tensor, metric: Metric, lam: float, ends: Ends) -> Tensor:
    """``M⁻¹ g`` for the columns of ``g``."""
    if metric == "h0":
        return torch.lerp(g.mean(0, keepdim=True), g, 1 / lam)
    # On a ring ΔᵀΔ is circulant, with eigenvalues 4 sin²(θ) at θ = π k / n.
    rows, n = g.contiguous().t().contiguous(), g.shape[0]
    k = torch.arange(n // 2 + 1, device=g.device)
    sine, cosine = torch.sin(k.to(g.dtype) * (math.pi / n)), torch.cos(k.to(g.dtype) * (math.pi / n))
    level = 1.0 if metric == "h1" else 0.0
    gain = torch.where(k == 0, 1.0, 1 / (level + lam * 4 * sine**2))
    directed = torch.fft.irfft(torch.fft.rfft(rows).mul_(gain), n=n)
    if ends == "free":
        # Cutting the bond between the last channel and the first takes λ w wᵀ off M, with w = e_0 - e_(n-1): Sherman
        # and Morrison add λ z zᵀ / (1 - λ wᵀz) to the inverse, with z = M⁻¹ w. Both factors come from their spectra,
        # where nothing cancels: that of w is 1 - exp(2iθ), and 1 - λ wᵀz is entry (0, 0) of M⁻¹ (h1), or 1 / n (h1t).
        z = torch.fft.irfft(torch.complex(2 * sine**2 * gain, -2 * sine * cosine * gain), n=n)
        left = torch.fft.irfft(torch.where(k == 0, 1.0, level * gain), n=n)[0]
        directed.addr_(rows @ z, z * (lam / left))
    return directed.t()


def _check_metric(metric: str, lam: float, ends: str) -> None:
    if metric not in _METRICS:
        raise ValueError(f"metric is {metric!r}, expected one of {', '.join(_METRICS)}")
    if ends not in _ENDS:
        raise ValueError(f"ends is {ends!r}, expected one of {', '.join(_ENDS)}")
    if not math.isfinite(lam) or lam < 0 or (lam == 0 and metric != "h1"):
        least = "at least 0" if metric == "h1" else "above 0"
        raise ValueError(f"lam is {lam}, but the metric {metric} is an inner product only for finite lam {least}")


def _check_tensor(x: Tensor, what: str) -> None:
    if x.layout != torch.strided:
        raise TypeError(
            f"{what} is sparse, but smoothing along channels fills every row: use dense gradients "
            "(for an Embedding sparse=False), or leave the parameter out with select or with "
            "channel_directed=False in its parameter group"
        )
    if not x.is_floating_point():
        raise TypeError(f"{what} has type {x.dtype}, expected a real floating-point type")


def _check_axis(shape: torch.Size, axis: int, groups: int, what: str = "the tensor") -> int:
    """The axis counted from the front."""
    if not -len(shape) <= axis < len(shape):
        raise ValueError(
            f"axis is {axis}, but {what} has shape {tuple(shape)}: expected an axis in [{-len(shape)}, {len(shape)})"
        )
    axis %= len(shape)
    if shape[axis] == 0:
        raise ValueError(f"{what} has shape {tuple(shape)}: axis {axis} holds no channel")
    if groups < 1 or shape[axis] % groups:
        raise ValueError(
            f"groups is {groups}, but axis {axis} of {what} (shape {tuple(shape)}) has "
            f"{shape[axis]} channels: expected a positive divisor of that"
        )
    return axis


# -- which parameters, and along which axis ----------------------------------------------------------------------------


Side = Literal["output", "input"]


def _axes(layout: WeightLayout) -> dict[Side, tuple[int, int]]:
    """The axis of the output and of the input channels, and how many runs each consists of."""
    if layout.storage == "transposed":
        return {"output": (1, 1), "input": (0, layout.conv_groups)}
    return {"output": (0, max(layout.conv_groups, layout.sections)), "input": (1, 1)}


def _layouts(module: nn.Module) -> dict[Tensor, WeightLayout | str]:
    """The layout of every parameter of a model or why it has none, which for a shared one any of its layers can say."""
    found: dict[Tensor, WeightLayout | str] = {}
    for layer in module.modules():
        for name, parameter in layer.named_parameters(recurse=False):
            if not isinstance(found.get(parameter), str):
                found[parameter] = layout_of(layer, name)
    return found


class _Direction(NamedTuple):
    """The arguments of :func:`channel_directed_gradient` for one parameter."""

    metric: Metric
    lam: float
    axis: int
    ends: Ends
    groups: int


@dataclass(frozen=True)
class _Settings:
    """What :func:`channel_directed` and the ``channel_directed`` entry of a parameter group can set."""

    metric: Metric = "h0"
    lam: float = 1.0
    axis: int | Side = "output"
    ends: Ends = "periodic"
    groups: int | None = None
    lam_relative: bool = False

    def __post_init__(self) -> None:
        _check_metric(self.metric, self.lam, self.ends)
        if self.lam_relative and self.metric == "h0":
            raise ValueError(
                "lam_relative is True, but the metric h0 damps all differences alike, whatever the number of channels: "
                "expected metric 'h1' or 'h1t', or lam_relative=False"
            )
        if not isinstance(self.axis, int) and self.axis not in get_args(Side):
            raise ValueError(f"axis is {self.axis!r}, expected 'output', 'input' or an integer")

    def updated(self, entry: Any) -> _Settings:
        """These settings with those of a parameter group's entry."""
        if entry is True:
            return self
        keys = [field.name for field in fields(self)]
        if not isinstance(entry, dict) or not set(entry) <= set(keys):
            raise ValueError(
                f"a parameter group has channel_directed={entry!r}, expected True, False or a dict with keys among "
                f"{', '.join(keys)}"
            )
        return replace(self, **entry)

    def direction(self, layout: WeightLayout, name: str) -> _Direction:
        """These settings for one parameter."""
        axes, shape = _axes(layout), torch.Size(layout.shape)
        axis = self.axis if isinstance(self.axis, int) else axes[self.axis][0]
        axis = _check_axis(shape, axis, 1, name)
        groups = dict(axes.values()).get(axis, 1) if self.groups is None else self.groups
        _check_axis(shape, axis, groups, name)
        unit = (shape[axis] / groups / (2 * math.pi)) ** 2 if self.lam_relative else 1.0
        return _Direction(self.metric, self.lam * unit, axis, self.ends, groups)


# -- under an optimiser ------------------------------------------------------------------------------------------------

# Gradients are cut and joined into pieces of about this number of entries: on a processor what fits its cache, on an
# accelerator what hides the launches and is still small beside the model.
_PIECE_CPU = 2**18
_PIECE = 2**24

_attached: WeakSet[Optimizer] = WeakSet()


def channel_directed(
    optimizer: Optimizer,
    metric: Metric = "h0",
    lam: float = 1.0,
    axis: int | Side = "output",
    ends: Ends = "periodic",
    select: Callable[[str, Tensor], bool] | None = None,
    restore_grad: bool = False,
    *,
    module: nn.Module | None = None,
    lam_relative: bool = False,
) -> ChannelDirected:
    """Let an optimiser see channel-directed gradients from now on ([Lao2020]_).

    At every ``optimizer.step()``, before anything else, each ``p.grad`` is replaced by its
    :func:`channel_directed_gradient`: once per step, after all accumulation, unscaling and clipping. With
    ``optimizer.step(closure)`` it is done after every evaluation of the closure.

    *Which parameters.* Without ``module``, every one with two or more dimensions, with its output channels on axis 0: a
    tensor doesn't tell more. With ``module`` the layers decide: convolutions (each group a run of its own),
    transposed convolutions (output channels on axis 1), linear layers and multi-head attention (the packed projection
    is three runs) are directed; embeddings, bilinear and recurrent layers, norms, biases, parametrized weights and
    those of unknown layers are not. ``print(handle.summary())`` lists the choice with the reasons.

    *Per parameter group.* A group may hold ``channel_directed=False``, or a dict with some of ``metric``, ``lam``,
    ``axis``, ``ends``, ``groups`` and ``lam_relative``, which take the place of the arguments here. Groups added later
    are directed too. What holds for a parameter is settled when it is first seen, and no state dict changes it.

    *On a manifold* (:class:`geoopt.ManifoldParameter`) the gradient becomes ``P M⁻¹ P g`` with the tangent projection
    ``P``: tangent, and a direction of descent. The manifold's metric must be that of the surrounding space, that is,
    its ``egrad2rgrad`` an orthogonal projection.

    Args:
        optimizer: Any :class:`torch.optim.Optimizer` except LBFGS.
        metric: As for :func:`channel_directed_gradient`.
        lam: As for :func:`channel_directed_gradient`.
        axis: ``"output"``, ``"input"`` or a number.
        ends: As for :func:`channel_directed_gradient`.
        select: A function of a parameter's name and the parameter, which then decides alone. Names are those of
            ``module``, else those that the optimiser was given, else ``param_groups[i]['params'][j]``.
        restore_grad: Put the tensors in ``p.grad`` back after the step, untouched. By default they are overwritten.
        module: The model, read once for layer types and names.
        lam_relative: Measure ``lam`` in units of ``(D / 2π)²``, with ``D`` the number of channels that are smoothed
            together: every layer gets a ``λ`` of its own. With 1 and periodic ends, ``h1t`` leaves the slowest wave as
            it is (up to 5 % from 8 channels on; 2 channels: 2.5 times) and ``h1`` halves it. Not for ``h0``.

    Returns:
        A handle with ``remove()``, ``parameters`` and ``summary()``. Torch doesn't pickle an optimiser's hooks: a
        copied or unpickled optimiser is bare. Copy or pickle the handle, which takes its optimiser along, or attach
        again.

    Raises:
        ValueError: If an option is not one of the above, the optimiser already has a handle, or the metric of a
            parameter's manifold is another one.
        TypeError: If the optimiser is none, or LBFGS, whose line search and secant pairs need the plain gradient. At
            a step, before any gradient is changed, if one is sparse or complex.

    Example:
        >>> layer = torch.nn.Linear(1, 2, bias=False)
        >>> handle = channel_directed(torch.optim.SGD(layer.parameters(), lr=1.0), "h0", lam=2.0)
        >>> layer.weight.grad = torch.tensor([[1.0], [3.0]])
        >>> handle.optimizer.step()
        >>> layer.weight.grad
        tensor([[1.5000],
                [2.5000]])
        >>> print(handle)
        ChannelDirected(SGD, metric='h0', lam=2.0, axis='output', ends='periodic'): 1 of 1 parameters
    """
    return ChannelDirected(
        optimizer, _Settings(metric, lam, axis, ends, lam_relative=lam_relative), select, restore_grad, module
    )


class _Choice(NamedTuple):
    """How a parameter's gradient is directed, or why it is left alone."""

    name: str
    direction: _Direction | None
    reason: str = ""


class ChannelDirected:
    """What :func:`channel_directed` returns: the attachment to one optimiser, until :meth:`remove`.

    Attributes:
        optimizer: The optimiser.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        settings: _Settings,
        select: Callable[[str, Tensor], bool] | None,
        restore_grad: bool,
        module: nn.Module | None,
    ) -> None:
        _check_optimizer(optimizer)
        self.optimizer = optimizer
        self._settings = settings
        self._select = select
        self._restore_grad = restore_grad
        self._layouts = None if module is None else _layouts(module)
        self._names: dict[Tensor, str] = {} if module is None else {p: name for name, p in module.named_parameters()}
        self._choices: dict[Tensor, _Choice] = {}
        self._replaced: list[tuple[Tensor, Tensor]] = []
        list(self._all_choices())  # whatever is wrong raises here, before the optimiser is touched
        self._attach()

    @property
    def parameters(self) -> list[Tensor]:
        """The parameters whose gradients are directed, in the optimiser's order."""
        return [parameter for parameter, choice in self._all_choices() if choice.direction]

    def summary(self) -> str:
        """One line per parameter: name, shape, and how it is directed or why it is left alone."""
        lines = [repr(self)]
        for parameter, (name, direction, reason) in self._all_choices():
            how = (
                ", ".join(f"{k}={v}" for k, v in direction._asdict().items()) if direction else f"left alone: {reason}"
            )
            lines.append(f"{name} {tuple(parameter.shape)}: {how}")
        return "\n".join(lines)

    def __repr__(self) -> str:
        s = self._settings
        relative = ", lam_relative=True" if s.lam_relative else ""
        return (
            f"ChannelDirected({type(self.optimizer).__name__}, metric={s.metric!r}, lam={s.lam}, axis={s.axis!r}, "
            f"ends={s.ends!r}{relative}): {len(self.parameters)} of {len(list(self._all_choices()))} parameters"
        )

    def remove(self) -> None:
        """Detach from the optimiser, which is then as before; a second call does nothing."""
        for hook in self._hooks:
            hook.remove()
        if self._hooks:
            _attached.discard(self.optimizer)
        self._hooks = ()

    def _attach(self) -> None:
        self._hooks = (self.optimizer.register_step_pre_hook(self._before_step),)
        if self._restore_grad:
            self._hooks += (self.optimizer.register_step_post_hook(self._after_step),)
        _attached.add(self.optimizer)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_hooks": bool(self._hooks)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state | {"_hooks": ()})
        if state["_hooks"]:
            self._attach()

    # -- the choice of parameters ------------------------------------------------------------------------------------

    def _all_choices(self) -> Iterator[tuple[Tensor, _Choice]]:
        for i, group in enumerate(self.optimizer.param_groups):
            for j, parameter in enumerate(group["params"]):
                if parameter not in self._choices:
                    name = group["param_names"][j] if "param_names" in group else f"param_groups[{i}]['params'][{j}]"
                    self._choices[parameter] = self._choose(parameter, self._names.get(parameter, name), group)
                yield parameter, self._choices[parameter]

    def _choose(self, parameter: Tensor, name: str, group: dict[str, Any]) -> _Choice:
        entry = group.get("channel_directed", True)
        if entry is False:
            return _Choice(name, None, "has channel_directed=False in its parameter group")
        settings = self._settings.updated(entry)
        plain = WeightLayout(tuple(parameter.shape))
        layout = plain if self._layouts is None else self._layouts.get(parameter, "is not a parameter of the module")
        if self._select is None:
            if parameter.ndim < 2:
                return _Choice(name, None, "has fewer than two dimensions")
            if isinstance(layout, str):
                return _Choice(name, None, layout)
        elif not self._select(name, parameter):
            return _Choice(name, None, "is not selected")
        _check_manifold(parameter, name)
        return _Choice(name, settings.direction(plain if isinstance(layout, str) else layout, name))

    # -- the step ----------------------------------------------------------------------------------------------------

    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            self._direct()
            return None

        def directed_closure() -> Any:
            self._restore()
            loss = closure()
            self._direct()
            return loss

        if len(args) > 1:
            return (args[0], directed_closure, *args[2:]), kwargs
        return args, kwargs | {"closure": directed_closure}

    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._restore()

    def _restore(self) -> None:
        for parameter, gradient in self._replaced:
            parameter.grad = gradient
        self._replaced.clear()

    @torch.no_grad()
    def _direct(self) -> None:
        tasks: list[_Task] = []
        for parameter, (name, direction, _) in self._all_choices():
            if direction is not None and parameter.grad is not None:
                _check_tensor(parameter.grad, f"the gradient of {name}")
                tasks.append(_Task(parameter, parameter.grad, direction))
        if self._restore_grad:
            tasks = [task._replace(gradient=task.gradient.clone()) for task in tasks]
            for parameter, gradient, _ in tasks:
                self._replaced.append((parameter, cast(Tensor, parameter.grad)))
                parameter.grad = gradient
        for alike in _alike(tasks):
            _direct_alike(alike)


class _Task(NamedTuple):
    """A gradient to overwrite with the directed one."""

    parameter: Tensor
    gradient: Tensor
    direction: _Direction


def _alike(tasks: Iterable[_Task]) -> Iterable[list[_Task]]:
    """The tasks in lists of one metric, length of the axis, type and device."""
    lists: dict[Any, list[_Task]] = {}
    for task in tasks:
        _, g, (metric, lam, axis, ends, groups) = task
        lists.setdefault((metric, lam, ends, g.shape[axis] // groups, g.dtype, g.device), []).append(task)
    return lists.values()


def _direct_alike(tasks: list[_Task]) -> None:
    columns = [_columns(_tangent(p, g), d.axis, d.groups) for p, g, d in tasks]
    _direct_columns(columns, tasks[0].direction)
    for (p, g, d), directed in zip(tasks, columns, strict=True):
        if directed.data_ptr() != g.data_ptr():  # the columns are a copy, not a view of the gradient
            g.copy_(_tangent(p, _from_columns(directed, g.shape, d.axis, d.groups)))


def _direct_columns(columns: list[Tensor], direction: _Direction) -> None:
    """Overwrite columns with the directed ones, piece by piece."""
    metric, lam, _, ends, _ = direction
    entries = _PIECE_CPU if columns[0].device.type == "cpu" else _PIECE
    width = max(1, entries // columns[0].shape[0])
    for pieces in _filled([piece for matrix in columns for piece in matrix.split(width, 1)], width):
        joint = torch.cat(pieces, 1) if len(pieces) > 1 else pieces[0]
        directed = _directed(joint, metric, lam, ends).contiguous()
        for piece, part in zip(pieces, directed.split([piece.shape[1] for piece in pieces], 1), strict=True):
            piece.copy_(part)


def _filled(pieces: Iterable[Tensor], width: int) -> Iterator[list[Tensor]]:
    """The pieces in lists of at most ``width`` columns, each filled before the next is begun."""
    batch: list[Tensor] = []
    free = width
    for piece in pieces:
        if batch and piece.shape[1] > free:
            yield batch
            batch, free = [], width
        batch.append(piece)
        free -= piece.shape[1]
    if batch:
        yield batch


# -- manifolds and checks ----------------------------------------------------------------------------------------------


def _manifold(parameter: Tensor) -> geoopt.Manifold | None:
    return getattr(parameter, "manifold", None)


def _tangent(parameter: Tensor, vector: Tensor) -> Tensor:
    """Tangent projection at a parameter on a manifold; the vector itself elsewhere."""
    manifold = _manifold(parameter)
    return vector if manifold is None else manifold.egrad2rgrad(parameter, vector)


def _check_optimizer(optimizer: Optimizer) -> None:
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer is a {type(optimizer).__name__}, expected a torch.optim.Optimizer")
    if isinstance(optimizer, torch.optim.LBFGS):
        raise TypeError(
            "optimizer is LBFGS, whose secant pairs and line search take p.grad for the plain gradient of the loss: a "
            "directed one would mislead them. Use a first-order optimiser"
        )
    if optimizer in _attached:
        raise ValueError(
            f"this {type(optimizer).__name__} already has channel-directed gradients: call remove() on its handle first"
        )


def _check_manifold(parameter: Tensor, name: str) -> None:
    """Raise if a parameter's manifold has another metric than that of the surrounding space.

    ``egrad2rgrad`` is symmetric whatever the metric; it is an orthogonal projection, idempotent, if the metric is that
    of the surrounding space. This is tried on drawn vectors, at a point near the parameter, since another metric can
    look Euclidean at special points (that of the positive definite matrices does at the identity).
    """
    manifold = _manifold(parameter)
    if manifold is None:
        return
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        u, v = (torch.randn(parameter.shape, generator=generator).to(parameter) for _ in range(2))
        step = manifold.egrad2rgrad(parameter, u)
        x = manifold.retr(parameter, step * (0.1 * parameter.norm() / step.norm().clamp_min(1e-30)))
        once = manifold.egrad2rgrad(x, v)
        twice = manifold.egrad2rgrad(x, once)
    if torch.dist(once, twice) > 1e-3 * v.norm():
        raise ValueError(
            f"{name} (shape {tuple(parameter.shape)}) lies on {manifold}, whose metric is not that of the surrounding "
            "space (egrad2rgrad is not an orthogonal projection), so P M⁻¹ P g is not defined. Use a manifold with the "
            "Euclidean metric (fgo_geo.Stiefel or geoopt.EuclideanStiefel in place of geoopt.CanonicalStiefel), or "
            "leave the parameter out with select or with channel_directed=False in its parameter group"
        )
