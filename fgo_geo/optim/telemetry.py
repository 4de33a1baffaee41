r"""What the steps of any optimiser do to the weights, measured: angles, shortened groups, radial gradients.

A normalised network depends only on the directions of its weights, so the angle between a weight before and after a
step is its effective learning rate. Unlike learning rates, angles are comparable between constrained and free weights,
and between optimisers:

* a weight of fixed norm turns by about ``lr ‖v‖ / ‖w‖``;
* a free one turns less and less as its norm grows, at the same learning rate.

:func:`telemetry` measures one step in every so many, on the device, and reads nothing back before you call
:meth:`Telemetry.scalars`. All other steps only increase a counter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fgo_geo.linalg import root_of_sum
from fgo_geo.manifolds import EmbeddedManifold, known_name
from fgo_geo.optim.base import between_graphs, manifold_of
from fgo_geo.optim.fgsgd import RiemannianFGSGD
from fgo_geo.optim.inner_steps import is_inner_step
from fgo_geo.optim.on_manifolds import handle_of
from fgo_geo.weights.words import whole_number

__all__ = ["KEYS", "Telemetry", "angle_between", "radial_share", "telemetry"]

KEYS = ("angle", "shortened", "radial")


def telemetry(optimizer: Optimizer, module: nn.Module | None = None, *, every: int = 1) -> Telemetry:
    """Measure what the steps of an optimiser do to its weights.

    Weights are parameters with at least two dimensions, on manifolds or not, and all other parameters on manifolds.

    Under :func:`fgo_geo.distributed.fully_shard` a measured step calls ``step_scales()``, which is collective: attach
    the telemetry on every process, with the same ``every``, and log on one of them.

    Args:
        optimizer: Any torch optimiser: :class:`~fgo_geo.RiemannianFGSGD`, one under :func:`~fgo_geo.on_manifolds`
            (attached before or after), or a bare one.
        module: The model, for the names of its parameters. Without it they have the names that the optimiser was given,
            or :func:`~fgo_geo.constrain` knows, else ``param_groups[i]['params'][j]``.
        every: Measure one step in ``every`` steps, starting with the first. A measured step copies the weights and
            reads them three more times; the copies are kept.

    Returns:
        A handle. Call its ``scalars()`` whenever you log, and ``remove()`` to stop.

    Raises:
        TypeError: If ``optimizer`` is not an optimiser.
        ValueError: If ``every`` is not a positive whole number.

    Example:
        A free weight of length 4 takes a step of length 3 at a right angle: it turns by ``atan(3/4)``.

        >>> w = torch.nn.Parameter(torch.tensor([[4.0, 0.0]]))
        >>> optimizer = torch.optim.SGD([("w", w)], lr=1.0)
        >>> watched = telemetry(optimizer)
        >>> w.grad = torch.tensor([[0.0, -3.0]])
        >>> optimizer.step()
        >>> {name: round(value, 4) for name, value in watched.scalars().items()}
        {'angle/w': 0.6435, 'radial/w': 0.0}
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"telemetry: expected a torch optimiser, got {type(optimizer).__name__}; pass the optimiser itself, also "
            "where it is under on_manifolds or channel_directed"
        )
    count = whole_number(every)
    if count is None or count < 1:
        raise ValueError(f"telemetry: every must be a whole number of at least 1, got {every!r}")
    return Telemetry(optimizer, module, count)


@dataclass
class _Sums:
    """Sums over measured steps, of shape ``(len(KEYS), number of weights)``, and how many numbers went into each."""

    weights: list[Tensor]
    sums: Tensor
    counts: Tensor


class Telemetry:
    """The handle that :func:`telemetry` returns: it is attached to one optimiser until :meth:`remove`.

    Args:
        optimizer: The optimiser.
        module: The model, for names.
        every: Measure one step in ``every`` steps.

    Attributes:
        optimizer: The optimiser.
    """

    def __init__(self, optimizer: Optimizer, module: nn.Module | None, every: int) -> None:
        self.optimizer = optimizer
        self._module = module
        self._names: dict[Tensor, str] = {} if module is None else {p: name for name, p in module.named_parameters()}
        self._every = every
        self._steps = 0
        self._copies: dict[Tensor, Tensor] = {}
        self._copied: list[Tensor] = []  # at the start of the step that is under way
        self._moved: list[Tensor] = []  # in the latest step, if that is measured
        self._radial: list[Tensor] = []
        self._sums: dict[tuple[int, ...], _Sums] = {}
        self._hooks = (
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        )

    def scalars(self) -> dict[str, float]:
        """Means over the steps that were measured since the last call, ready for TensorBoard (synchronises).

        Returns:
            By kind and name of the weight, e.g. ``"angle/layer1.0.conv1.weight"``:

            * ``angle``: radians by which a step turned the weight. For the groups of a constrained weight it is the
              root mean square of their angles, weighted by their squared norms, as long as angles are small;
            * ``shortened``: share of its groups with ``τ > 1``, of weights that are stepped with
              ``step_size="theorem"``;
            * ``radial``: share of the gradient that cannot turn the weight, between 0 and 1. On a manifold it is the
              length of the normal part, which the tangent projection removes, by that of the gradient; of a free weight
              ``|cos|`` of the angle between weight and gradient. It is left out on manifolds of other packages.

            Weights that took no step are left out, and so are steps whose numbers were not finite.
        """
        totals: dict[tuple[str, Tensor], list[float]] = {}  # sum and count; a weight may be in several sets
        for own in self._sums.values():
            sums, counts = torch.stack((own.sums, own.counts)).cpu().tolist()
            for key, key_sums, key_counts in zip(KEYS, sums, counts, strict=True):
                for weight, more, count in zip(own.weights, key_sums, key_counts, strict=True):
                    total = totals.setdefault((key, weight), [0.0, 0.0])
                    total[0] += more
                    total[1] += count
        self._sums.clear()
        return {
            f"{key}/{self._name_of(weight)}": total / count for (key, weight), (total, count) in totals.items() if count
        }

    def remove(self) -> None:
        """Detach from the optimiser; a second call does nothing."""
        for hook in self._hooks:
            hook.remove()
        self._copies.clear()
        self._copied, self._moved = [], []

    def __reduce__(self) -> tuple[Any, ...]:
        return Telemetry, (self.optimizer, self._module, self._every)  # a copy watches the copy of the optimiser, anew

    def __repr__(self) -> str:
        return f"Telemetry({type(self.optimizer).__name__}, every={self._every})"

    # -- around a step ---------------------------------------------------------------------------------------

    @between_graphs
    @torch.no_grad()
    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Copy the weights, if this step is to be measured."""
        if is_inner_step(optimizer):
            return
        self._copied, self._moved, self._radial = [], [], []
        self._steps += 1
        if (self._steps - 1) % self._every:
            return
        for group in optimizer.param_groups:
            self._copied += [p for p in group["params"] if p.requires_grad and _is_weight(p)]
        for param in self._copied:
            copy = self._copies.get(param)
            dtype = torch.promote_types(param.dtype, torch.float32)
            if copy is None or (copy.shape, copy.device, copy.dtype) != (param.shape, param.device, dtype):
                self._copies[param] = torch.empty_like(param.detach().as_subclass(Tensor), dtype=dtype)
            self._copies[param].copy_(param.detach())

    @between_graphs
    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Read the gradients while they exist; under ``on_manifolds`` the weights are still off their manifolds."""
        if is_inner_step(optimizer):
            return
        self._moved = [p for p in self._copied if p.grad is not None]
        self._radial = [radial_share(p, self._copies[p], p.grad) for p in self._moved if p.grad is not None]
        self._copied = []
        handle = handle_of(optimizer)
        if handle is None:
            self._finish()
        else:
            handle.after_step(self._finish)

    @torch.no_grad()
    def _finish(self) -> None:
        """Measure the latest step, now that it is complete."""
        moved, radial = self._moved, self._radial
        self._moved, self._radial = [], []
        shares = self._shares(moved) if moved else {}
        for device in dict.fromkeys(p.device for p in moved):
            own = [(p, share) for p, share in zip(moved, radial, strict=True) if p.device == device]
            angles = [angle_between(self._copies[p], p.detach().as_subclass(Tensor)) for p, _ in own]
            unknown = angles[0].new_full((), torch.nan)
            rows = (angles, [shares.get(p, unknown) for p, _ in own], [share for _, share in own])
            self._add([p for p, _ in own], torch.stack([torch.stack(row) for row in rows]))

    def _add(self, weights: list[Tensor], values: Tensor) -> None:
        key = tuple(map(id, weights))
        if key not in self._sums:
            self._sums[key] = _Sums(weights, torch.zeros_like(values), torch.zeros_like(values))
        is_known = values.isfinite()
        self._sums[key].sums += torch.where(is_known, values, 0)
        self._sums[key].counts += is_known

    def _shares(self, moved: Sequence[Tensor]) -> dict[Tensor, Tensor]:
        """Share of groups with ``τ > 1`` in the latest step, of the weights that the theorem steps."""
        handle = handle_of(self.optimizer)
        if handle is not None:
            scales = handle.step_scales() if handle.step_size == "theorem" else {}
        elif isinstance(self.optimizer, RiemannianFGSGD):
            groups = [group for group in self.optimizer.param_groups if group["step_size"] == "theorem"]
            stepped = {p for group in groups for p in group["params"]}
            scales = {p: tau for p, tau in self.optimizer.step_scales().items() if p in stepped}
        else:
            scales = {}
        return {p: (scales[p] > 1).to(torch.float64).mean() for p in moved if p in scales}

    def _name_of(self, param: Tensor) -> str:
        if param in self._names:
            return self._names[param]
        for number, group in enumerate(self.optimizer.param_groups):
            for position, candidate in enumerate(group["params"]):
                if candidate is param:
                    names = group.get("param_names")
                    place = f"param_groups[{number}]['params'][{position}]"
                    return names[position] if names else known_name(param) or place
        return f"a parameter of shape {tuple(param.shape)}"


def _is_weight(param: Tensor) -> bool:
    return param.numel() > 0 and param.is_floating_point() and (param.ndim > 1 or manifold_of(param) is not None)


# -- what is measured ------------------------------------------------------------------------------------------


def angle_between(before: Tensor, after: Tensor) -> Tensor:
    """The angle between two tensors of the same shape, ``2 atan2(‖v - u‖, ‖v + u‖)`` with their directions ``u, v``.

    It is exact for small angles too, unlike the arc cosine.

    Args:
        before: A tensor of any shape.
        after: One of the same shape.

    Returns:
        Radians between 0 and π, float64; not a number if one of them is zero.

    Example:
        >>> angle_between(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0])).round(decimals=6)
        tensor(1.5708, dtype=torch.float64)
    """
    u, v = (t / _norm(t).to(t.dtype) for t in (before, after.to(before.dtype)))
    return 2 * torch.atan2(_norm(v - u), _norm(v + u))


def radial_share(param: Tensor, point: Tensor, grad: Tensor) -> Tensor:
    """Which share of a gradient cannot turn a weight.

    Args:
        param: The parameter, for its manifold.
        point: Where it was.
        grad: The gradient there.

    Returns:
        ``‖g - P(g)‖ / ‖g‖`` with the tangent projection of its manifold, ``|<g, w>| / (‖g‖ ‖w‖)`` of a free weight;
        float64 without dimensions. Not a number for a gradient of zero, and on manifolds of other packages, whose
        ``proju`` need not be a projection.

    Example:
        >>> w = torch.tensor([3.0, 4.0])
        >>> radial_share(w, w, torch.tensor([0.0, 2.0])).round(decimals=6)
        tensor(0.8000, dtype=torch.float64)
    """
    if grad.is_sparse:
        grad = grad.to_dense()
    grad = grad.detach().as_subclass(Tensor).to(point.dtype)
    manifold = manifold_of(param)
    if isinstance(manifold, EmbeddedManifold):
        return _norm(grad - manifold.proju(point, grad)) / _norm(grad)
    if manifold is not None:
        return torch.full((), torch.nan, dtype=torch.float64, device=grad.device)
    return (grad * point).sum(dtype=torch.float64).abs() / (_norm(grad) * _norm(point))


def _norm(tensor: Tensor) -> Tensor:
    return root_of_sum(tensor, tuple(range(tensor.ndim))).reshape(()).double()
