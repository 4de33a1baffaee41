"""The fused step as operators of torch, which ``torch.compile`` calls and does not look into.

A graph holds tensors and numbers, no manifolds. The operators are given the numbers of manifolds, under which they are
found when the graph runs: radii that were changed after compilation count.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import geoopt
import torch
from torch import Tensor

import fgo_geo.paths.router as kernels  # which imports this module: its names are there when functions are called
from fgo_geo.linalg import reads_for_free
from fgo_geo.manifolds import EmbeddedManifold
from fgo_geo.paths.task import Batch, StepOptions, Task

__all__ = ["TracedBatch", "TracedBatches", "register"]

_manifolds: weakref.WeakValueDictionary[int, EmbeddedManifold] = weakref.WeakValueDictionary()


def register(manifold: EmbeddedManifold) -> None:
    """Let operators find a manifold by its ``id``, which ``torch.compile`` knows and guards."""
    _manifolds[id(manifold)] = manifold
    torch.compiler.assume_constant_result(_groups_of)  # here, since it imports the compiler, as every optimiser does


def _groups_of(
    number: int, shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> tuple[str, int]:
    """The fused path that takes a weight, and its number of groups, 0 if none does. Runs once, as a step is traced."""
    manifold = _manifolds.get(number)
    if manifold is None:
        return "", 0
    weight = torch.empty_strided(shape, strides, dtype=dtype, device=device)
    task = kernels.task_of(weight, manifold, None, grad=weight)
    if task is None:
        kernels.say_unfused_weight(weight, manifold)
        return "", 0
    if task.table.left:
        kernels.say_unfused(f"a weight of shape {shape}", "torch.compile takes no weight that is fused in part")
        return "", 0
    path = kernels.fused_path(task)
    return ("", 0) if path is None else (path.__name__, task.table.groups)


def _constants(sizes: Sequence[int]) -> tuple[int, ...]:
    """Sizes as constants of the graph, which has symbols for those that it has seen change: a ``len`` is a number."""
    return tuple(len(range(size)) for size in sizes)


class TracedBatches:
    """What fused paths do of a parameter group, while ``torch.compile`` traces."""

    def __init__(self, options: StepOptions) -> None:
        self._options = options
        self._batches: dict[str, TracedBatch] = {}  # by path

    def add(self, param: Tensor, manifold: geoopt.Manifold, buffer: Tensor | None) -> bool:
        """Do the step of a parameter, if there is a fused path for it; returns whether there is."""
        grad = param.grad
        if grad is None or grad.dtype != param.dtype or (buffer is not None and buffer.dtype != param.dtype):
            return False
        shape, strides = _constants(param.shape), _constants(param.stride())
        path, groups = _groups_of(id(manifold), shape, strides, param.dtype, param.device)
        if groups == 0:
            return False
        if path not in self._batches:
            self._batches[path] = TracedBatch(self._options)
        self._batches[path].add(param, grad, buffer, id(manifold), groups)
        return True

    def all(self) -> list[TracedBatch]:
        """One batch for every path."""
        return list(self._batches.values())


class TracedBatch:
    """What a :class:`~fgo_geo.paths.router.Batch` is, while ``torch.compile`` traces.

    Attributes:
        options: Options of the parameter group.
        weights: The parameters.
        counts: Number of groups of every parameter.
        dtype: Type with the precision of all weights.
    """

    def __init__(self, options: StepOptions) -> None:
        self.options = options
        self.weights: list[Tensor] = []
        self.counts: list[int] = []
        self.dtype = torch.float32
        self._grads: list[Tensor] = []
        self._buffers: list[Tensor] = []
        self._first: list[bool] = []
        self._numbers: list[int] = []

    def add(self, param: Tensor, grad: Tensor, buffer: Tensor | None, number: int, groups: int) -> None:
        """Do the step of a parameter, given the number of its manifold and how many groups it has."""
        self.weights.append(param)
        self.counts.append(groups)
        self._grads.append(grad)
        self._numbers.append(number)
        if self.options.momentum != 0:
            self._first.append(buffer is None)
            self._buffers.append(torch.empty_like(param) if buffer is None else buffer)
        if param.dtype == torch.float64:
            self.dtype = torch.float64

    def fresh_buffers(self) -> list[tuple[Tensor, Tensor]]:
        """Parameters without momentum yet, and where it will be."""
        if not self._buffers:
            return []
        buffers = zip(self.weights, self._buffers, self._first, strict=True)
        return [(weight, buffer) for weight, buffer, first in buffers if first]

    def squared_norms(self) -> Tensor:
        """As :func:`fgo_geo.paths.router.squared_norms`."""
        return _squared_norms(self.weights, sum(self.counts), self._grads, self._numbers, self._settings())

    def update(self, scales: Tensor) -> None:
        """As :func:`fgo_geo.paths.router.update`."""
        rate = self.options.lr
        if not isinstance(rate, Tensor):
            # The compiler takes a number for a constant until it changes, a product with it from then on for an input
            # of the graph. (Not in torch's own step of plain parameters: a group that has some, in the same graph, is
            # compiled again for every number. A learning rate that is a tensor is an input everywhere.)
            rate = torch.ones((), dtype=torch.float64) * rate
        _update(self.weights, self._grads, self._buffers, self._first, scales, rate, self._numbers, self._settings())

    def curvature(self, like: Tensor, radius_invariant: bool) -> Tensor:
        """As :func:`fgo_geo.paths.router.curvature`."""
        return _curvature(like, self.weights, self._numbers, radius_invariant)

    def _settings(self) -> list[float]:
        o = self.options
        return [
            o.momentum,
            o.dampening,
            float(o.nesterov),
            o.weight_decay,
            float(o.maximize),
            float(o.radius_invariant),
        ]


def _task(number: int, weight: Tensor, grad: Tensor, buffer: Tensor | None = None) -> Task[Any]:
    manifold = _manifolds.get(number)
    task = None if manifold is None else kernels.task_of(weight, manifold, buffer, grad=grad)
    if task is None:
        raise RuntimeError(
            "a compiled step of RiemannianFGSGD needs the manifold of a parameter, which is no more; compile the step "
            "again, and within one process"
        )
    return task


def _batch(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    buffers: Sequence[Tensor],
    first: Sequence[bool],
    rate: float | Tensor,
    numbers: Sequence[int],
    settings: Sequence[float],
) -> Batch:
    momentum, dampening, nesterov, weight_decay, maximize, radius_invariant = settings
    options = StepOptions(
        rate, momentum, dampening, bool(nesterov), weight_decay, bool(maximize), bool(radius_invariant)
    )
    tasks: list[Task[Any]] = []
    for k, (weight, grad, number) in enumerate(zip(weights, grads, numbers, strict=True)):
        tasks.append(_task(number, weight, grad, buffers[k] if buffers else None))
        tasks[-1].first = bool(first and first[k])
    path = kernels.path_of(tasks[0])
    problem = next(filter(None, map(path.reason, tasks)), None)
    if problem is not None:
        raise RuntimeError(f"a compiled step of RiemannianFGSGD cannot go on: {problem}; compile it again")
    return Batch(path, tasks, options)


@torch.library.custom_op("fgo_geo::squared_norms", mutates_args=())
def _squared_norms(
    weights: Sequence[Tensor], groups: int, grads: Sequence[Tensor], numbers: Sequence[int], settings: Sequence[float]
) -> Tensor:
    del groups  # the size of the result, which the compiler has to know
    return kernels.squared_norms(_batch(weights, grads, [], [], 0.0, numbers, settings))


@_squared_norms.register_fake
def _(weights: Sequence[Tensor], groups: int, *_rest: object) -> Tensor:
    return weights[0].new_empty(groups, dtype=torch.float64)


@torch.library.custom_op("fgo_geo::update", mutates_args=("weights", "buffers"))
def _update(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    buffers: Sequence[Tensor],
    first: Sequence[bool],
    scales: Tensor,
    rate: Tensor,
    numbers: Sequence[int],
    settings: Sequence[float],
) -> None:
    laid = [
        b if b.stride() == w.stride() else torch.empty_like(w).copy_(b) for w, b in zip(weights, buffers, strict=False)
    ]
    batch = _batch(weights, grads, laid, first, rate, numbers, settings)
    kernels.update(batch, scales, skips=not reads_for_free(scales) or not float(scales.amin()) > 0)
    for buffer, written in zip(buffers, laid, strict=True):
        if written is not buffer:
            buffer.copy_(written)


@_update.register_fake
def _(*_arguments: object) -> None:
    return None


@torch.library.custom_op("fgo_geo::curvature", mutates_args=())
def _curvature(like: Tensor, weights: Sequence[Tensor], numbers: Sequence[int], radius_invariant: bool) -> Tensor:
    tasks = [_task(number, weight, weight) for number, weight in zip(numbers, weights, strict=True)]
    return torch.cat([task.table.curvature_bound(radius_invariant) for task in tasks]).to(like.dtype)


@_curvature.register_fake
def _(like: Tensor, *_rest: object) -> Tensor:
    return torch.empty_like(like)
