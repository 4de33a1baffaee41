"""Channel-directed gradients: the gradient in an inner product along a channel axis, under any optimiser.

:mod:`fgo_geo.optim.channel_metrics` defines the inner products and computes the gradients that belong to them. Here a
*rule* says which parameters have a channel axis, and which one, and :func:`channel_directed` attaches the gradients to
an optimiser by its step hooks.
"""

from __future__ import annotations

import math
import operator
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, NamedTuple, get_args
from weakref import WeakSet

import geoopt
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fgo_geo.linalg import is_sharded
from fgo_geo.manifolds import known_name
from fgo_geo.optim.channel_metrics import (
    Direction,
    Ends,
    Metric,
    check_axis,
    check_dense,
    check_metric,
    direct_gradients,
    mistaken,
)
from fgo_geo.optim.inner_steps import is_inner_step
from fgo_geo.weights.layout import WeightLayout, layout_of
from fgo_geo.weights.words import described, did_you_mean, line_width, small, whole_number

__all__ = ["ChannelDirected", "channel_directed"]

# -- which parameters, and along which axis ----------------------------------------------------------------------------


Side = Literal["output", "input"]


def _axes(layout: WeightLayout) -> dict[Side, tuple[int, int]]:
    """The axis of the output and of the input channels, and how many runs each consists of."""
    if layout.storage == "transposed":
        return {"output": (1, 1), "input": (0, layout.conv_groups)}
    return {"output": (0, max(layout.conv_groups, layout.sections)), "input": (1, 1)}


def _layouts(module: nn.Module) -> dict[Tensor, WeightLayout | str]:
    """The layout of every parameter of a model, or why it has none; any layer of a shared parameter can provide it."""
    found: dict[Tensor, WeightLayout | str] = {}
    for layer in module.modules():
        for name, parameter in layer.named_parameters(recurse=False):
            if not isinstance(found.get(parameter), str):
                found[parameter] = layout_of(layer, name)
    return found


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
        metric, ends = check_metric(self.metric, self.lam, self.ends)
        index = whole_number(self.axis)
        axis = small(self.axis) if index is None else index
        for name, word in (("metric", metric), ("ends", ends), ("axis", axis)):
            object.__setattr__(self, name, word)
        if self.lam_relative and metric == "h0":
            raise ValueError(
                "lam_relative is True, but the metric h0 damps all differences alike, whatever the number of channels: "
                "expected metric 'h1' or 'h1t', or lam_relative=False"
            )
        if index is None and self.axis not in get_args(Side):
            hint = did_you_mean(self.axis, get_args(Side))
            raise ValueError(mistaken("axis", self.axis, f"'output', 'input' or an integer{hint}"))

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

    def direction(self, layout: WeightLayout, name: str) -> Direction:
        """These settings for one parameter."""
        axes, shape = _axes(layout), torch.Size(layout.shape)
        axis = self.axis if isinstance(self.axis, int) else axes[self.axis][0]
        axis = check_axis(shape, axis, 1, name)
        groups = dict(axes.values()).get(axis, 1) if self.groups is None else self.groups
        check_axis(shape, axis, groups, name)
        unit = (shape[axis] / groups / (2 * math.pi)) ** 2 if self.lam_relative else 1.0
        return Direction(self.metric, self.lam * unit, axis, self.ends, groups)


# -- under an optimiser ------------------------------------------------------------------------------------------------

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
    """Give an optimiser channel-directed gradients at every step ([Lao2020]_).

    Every ``optimizer.step()`` first replaces each ``p.grad`` by its
    :func:`~fgo_geo.optim.channel_metrics.channel_directed_gradient`: once per step, after all accumulation, unscaling
    and clipping. ``optimizer.step(closure)`` does this after every evaluation of the closure. Call this function and
    :func:`~fgo_geo.on_manifolds` in either order, after :func:`~fgo_geo.constrain`: the steps are the same.

    *Which parameters.* Without ``module``, every parameter with at least two dimensions is directed along axis 0,
    because a tensor alone does not reveal its layer. With ``module`` the layers decide: convolutions (each group
    separately), transposed convolutions (output channels on axis 1), linear layers and multi-head attention (the three
    parts of the packed projection separately) are directed; embeddings, bilinear and recurrent layers, norms, biases,
    parametrized weights and those of unknown layers are not. ``print(handle.summary())`` lists the choice with the
    reasons.

    *Per parameter group.* A group may hold ``channel_directed=False``, or a dict with some of ``metric``, ``lam``,
    ``axis``, ``ends``, ``groups`` and ``lam_relative``, which take the place of the arguments here. Groups that you add
    later are directed, too. The handle fixes the settings of a parameter when it first sees the parameter, and loading
    a state dict does not change them.

    *On a manifold* (:class:`geoopt.ManifoldParameter`) the gradient becomes ``P M⁻¹ P g`` with the tangent projection
    ``P``. It is tangent, and its negative is a descent direction. The manifold must have the metric of the surrounding
    space, so that its ``egrad2rgrad`` is an orthogonal projection.

    Args:
        optimizer: Any :class:`torch.optim.Optimizer` except LBFGS.
        metric: As for :func:`~fgo_geo.optim.channel_metrics.channel_directed_gradient`.
        lam: As for :func:`~fgo_geo.optim.channel_metrics.channel_directed_gradient`.
        axis: ``"output"``, ``"input"`` or a number.
        ends: As for :func:`~fgo_geo.optim.channel_metrics.channel_directed_gradient`.
        select: A function of a parameter's name and the parameter, which then decides alone. Names are those of
            ``module``, else those that the optimiser was given, else ``param_groups[i]['params'][j]``.
        restore_grad: Put the tensors in ``p.grad`` back after the step, untouched. By default they are overwritten.
        module: The model, read once for layer types and names.
        lam_relative: Measure ``lam`` in units of ``(D / 2π)²``, with ``D`` the number of channels that are smoothed
            together: every layer gets its own ``λ``. With 1 and periodic ends, ``h1t`` leaves the slowest wave
            unchanged (up to 5 % from 8 channels on; with 2 channels it multiplies it by 2.5) and ``h1`` halves it. Not
            for ``h0``.

    Returns:
        A handle with ``remove()``, ``parameters`` and ``summary()``. Torch does not pickle an optimiser's hooks, so a
        copied or unpickled optimiser loses them. Copy or pickle the handle, which includes its optimiser, or attach
        again.

    Raises:
        ValueError: If an option is not one of the above, the optimiser already has a handle, ``module`` directs no
            parameter of it, or a parameter's manifold has another metric than the surrounding space.
        TypeError: If ``lam`` is not a number; ``optimizer`` is not an optimiser, or is LBFGS, whose line search and
            secant pairs need the plain gradient; or at a step, before any gradient has changed, one is sparse or
            complex.

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
    _check_optimizer(optimizer)
    return ChannelDirected(
        optimizer, _Settings(metric, lam, axis, ends, lam_relative=lam_relative), select, restore_grad, module
    )


class _Choice(NamedTuple):
    """How a parameter's gradient is directed, or why it is left alone."""

    name: str
    direction: Direction | None
    reason: str = ""


class ChannelDirected:
    """The handle that :func:`channel_directed` returns: it is attached to one optimiser until :meth:`remove`.

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
        self.optimizer = optimizer
        self._settings = settings
        self._select = select
        self._restore_grad = restore_grad
        self._layouts = None if module is None else _layouts(module)
        self._names: dict[Tensor, str] = {} if module is None else {p: name for name, p in module.named_parameters()}
        self._choices: dict[Tensor, _Choice] = {}
        self._forget()
        choices = [choice for _, choice in self._all_choices()]  # whatever is wrong raises before the optimiser changes
        if module is not None and select is None and not any(choice.direction for choice in choices):
            raise ValueError(
                f"channel_directed: no parameter of the optimiser is directed ({choices[0].name} {choices[0].reason}); "
                "pass as module= the model whose parameters the optimiser has, or choose parameters with select="
            )
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
        width = int(min(line_width(), 10_000))
        return "\n".join(textwrap.fill(line, width, subsequent_indent="    ") for line in lines)

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

    def _forget(self) -> None:
        """Empty what every step finds again; pickles do not contain it."""
        self._known: list[Tensor] = []
        self._targets: list[tuple[Tensor, str, Direction]] = []
        self._replaced: list[tuple[Tensor, Tensor]] = []

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__ | {"_hooks": bool(self._hooks)}
        return {name: state[name] for name in state.keys() - {"_known", "_targets", "_replaced"}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state | {"_hooks": ()})
        self._forget()
        if state["_hooks"]:
            self._attach()

    # -- the choice of parameters ------------------------------------------------------------------------------------

    def _all_choices(self) -> Iterator[tuple[Tensor, _Choice]]:
        for i, group in enumerate(self.optimizer.param_groups):
            for j, parameter in enumerate(group["params"]):
                choice = self._choices.get(parameter)
                if choice is None:
                    place = known_name(parameter) or f"param_groups[{i}]['params'][{j}]"
                    name = group["param_names"][j] if "param_names" in group else place
                    choice = self._choose(parameter, self._names.get(parameter, name), group)
                    self._choices[parameter] = choice
                yield parameter, choice

    def _directed(self) -> list[tuple[Tensor, str, Direction]]:
        """The parameters whose gradients are directed, and how; found again if the optimiser has other parameters."""
        params: list[Tensor] = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        if len(params) != len(self._known) or not all(map(operator.is_, params, self._known)):
            self._targets = [(p, name, direction) for p, (name, direction, _) in self._all_choices() if direction]
            self._known = params
        return self._targets

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
        if is_sharded(parameter):
            raise ValueError(
                f"{name} (shape {tuple(parameter.shape)}) is sharded, and its channels are on several processes: "
                "directing its gradient is not supported; train with DistributedDataParallel, or leave it out with "
                "select="
            )
        _check_manifold(parameter, name)
        return _Choice(name, settings.direction(plain if isinstance(layout, str) else layout, name))

    # -- the step ----------------------------------------------------------------------------------------------------

    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if is_inner_step(optimizer):
            return None
        self._replaced.clear()  # of a step that raised: its gradients are not those of this step
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
        if not is_inner_step(optimizer):
            self._restore()

    def _restore(self) -> None:
        for parameter, gradient in self._replaced:
            parameter.grad = gradient
        self._replaced.clear()

    @torch.no_grad()
    def _direct(self) -> None:
        parameters: list[Tensor] = []
        gradients: list[Tensor] = []
        directions: list[Direction] = []
        for parameter, name, direction in self._directed():
            gradient = parameter.grad
            if gradient is None:
                continue
            if gradient.dtype is not torch.float32 or gradient.layout is not torch.strided:
                check_dense(gradient, f"the gradient of {name}")
            parameters.append(parameter)
            gradients.append(gradient)
            directions.append(direction)
        if self._restore_grad:
            copies = [gradient.clone() for gradient in gradients]
            self._replaced += zip(parameters, gradients, strict=True)
            gradients = copies
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
        tangents = list(gradients)
        curved = [(k, m) for k, m in enumerate(map(_manifold, parameters)) if m is not None]
        for k, manifold in curved:
            tangents[k] = manifold.egrad2rgrad(parameters[k], gradients[k])
        direct_gradients(tangents, directions)
        for k, manifold in curved:
            gradients[k].copy_(manifold.egrad2rgrad(parameters[k], tangents[k]))


# -- manifolds and checks ----------------------------------------------------------------------------------------------


def _manifold(parameter: Tensor) -> geoopt.Manifold | None:
    return getattr(parameter, "manifold", None)


def _check_optimizer(optimizer: Optimizer) -> None:
    if not isinstance(optimizer, Optimizer):
        has_one = isinstance(getattr(optimizer, "optimizer", None), Optimizer)  # such as the handle of on_manifolds
        remedy = "build one from model.named_parameters(), and pass the model as module="
        raise TypeError(
            f"optimizer is {described(optimizer)}, expected a torch.optim.Optimizer; "
            + ("pass its attribute optimizer" if has_one else remedy)
        )
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

    ``egrad2rgrad`` is symmetric for every metric. If the metric is that of the surrounding space, it is an orthogonal
    projection and therefore idempotent. The check applies it to random vectors at a point near the parameter, because
    another metric can look Euclidean at special points (that of the positive definite matrices does at the identity).
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
