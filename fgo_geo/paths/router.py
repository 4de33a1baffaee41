"""Fused steps: the map of the batched torch code, in two sweeps over memory.

A network has millions of 3 x 3 kernels, and arithmetic on so small matrices costs little beside reading them. The
batched torch code of :mod:`fgo_geo.optim.fgsgd` reads and writes them some hundred times in a step. A fused path takes
two sweeps, *norms* and *update*, which every path implements as a module with the same functions:

* ``description()`` says what the path is, ``reason(task)`` why it cannot take a parameter, or None;
* ``squared_norms(batch)`` returns the squared gradient norm of every group, and changes nothing;
* ``update(batch, scales, skips)`` then takes the step, given ``1 / τ`` of every group.

Where no group has kernels of two rows (PO), a row can be measured and moved while it is in the cache, if nothing has to
be known of the other rows first. A path says with ``goes_by_rows(task)`` whether it does that; it then has
``step_by_rows(batch)``, the whole step, and ``gradients_are_moderate(batch)``, which tells by the gradients alone that
no norm is to be refused.

There are three paths. Kernels, of any mix of manifolds, take :mod:`~fgo_geo.paths.native.kernels`, a compiled
extension, or :mod:`~fgo_geo.paths.triton.launches`, Triton. Spheres and oblique manifolds of any size take
:mod:`~fgo_geo.paths.native.lines`, of the same extension; of a matrix whose blocks were dealt to several manifolds it
takes all but the Stiefel blocks, which are handed to the batched code by ``take_blocks`` and come back by
``put_blocks_``. Inside ``torch.compile`` both sweeps are operators, which the graph calls. Where no path applies
(Stiefel matrices, other manifolds, half precision) the batched torch code does the work: it is the reference, and the
only place where the formulas are meant to be read. This module is where a path is chosen; nothing else knows that there
are several.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Generator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, Literal, cast, get_args

import geoopt
import torch
from torch import Tensor

from fgo_geo.linalg import traces
from fgo_geo.paths._operators import TracedBatch, TracedBatches, register
from fgo_geo.paths.native import kernels as cpu
from fgo_geo.paths.native import lines
from fgo_geo.paths.native.line_tables import LineTable
from fgo_geo.paths.native.lines import put_ as put_blocks_
from fgo_geo.paths.native.lines import take as take_blocks
from fgo_geo.paths.task import Batch, StepOptions, Task, no_kernels
from fgo_geo.paths.task import task_of as kernel_task_of
from fgo_geo.paths.triton import launches as gpu

__all__ = [
    "Batch",
    "Path",
    "StepOptions",
    "Task",
    "TracedBatch",
    "TracedBatches",
    "circumstances",
    "curvature",
    "fused_path",
    "gradients_are_moderate",
    "path_of",
    "put_blocks_",
    "register",
    "say_unfused",
    "say_unfused_weight",
    "squared_norms",
    "step_by_rows",
    "take_blocks",
    "task_of",
    "update",
    "use_path",
]

Path = Literal["auto", "fused", "reference"]

_logger = logging.getLogger("fgo_geo")
_said: set[str] = set()
_path: Path = "auto"
_LINES = "lines are those of float32 weights on the CPU, on spheres or an oblique manifold, of four numbers or more"
_PATHS: dict[str, ModuleType] = {"cpu": cpu, "cuda": gpu}  # by device


@contextmanager
def use_path(path: Path) -> Generator[None]:
    """Force a path, for measuring or for finding out whether a difference comes from it.

    The environment variable ``FGO_GEO_PATH`` does the same for a whole program.

    Args:
        path: ``"auto"`` takes the fastest that applies; ``"reference"`` the batched torch code; ``"fused"`` is
            ``"auto"`` that raises for kernels whose type, size or strides no fused path can take. What has no fused
            path at all (Stiefel matrices and blocks, other manifolds, the exponential map) takes the batched torch code
            there too; the logger ``fgo_geo`` warns of it, once per reason.

    Raises:
        ValueError: If there is no such path.

    Example:
        >>> import geoopt
        >>> from fgo_geo import ProductOfGroups, RiemannianFGSGD
        >>> from fgo_geo.weights.grouping import collection
        >>> manifold = ProductOfGroups(collection(4, 2, "po", ("sphere",)), (4, 2, 3, 3))
        >>> weight = geoopt.ManifoldParameter(manifold.random(4, 2, 3, 3).detach(), manifold=manifold)
        >>> weight.grad = torch.ones_like(weight)
        >>> with use_path("reference"):
        ...     RiemannianFGSGD([weight], lr=0.1).step()
    """
    global _path
    before, _path = _path, _checked(path, "use_path")
    try:
        yield
    finally:
        _path = before


def _checked(path: str, what: str) -> Path:
    if path not in get_args(Path):
        raise ValueError(f"{what}: the path must be one of {get_args(Path)}, got {path!r}")
    return cast(Path, path)


_path = _checked(os.environ.get("FGO_GEO_PATH", "auto"), "FGO_GEO_PATH")


def circumstances() -> object:
    """What the choice of a path depends on beside the parameter; the same choice holds while it compares equal.

    Returns:
        An object, or None if no fused path is to be asked at all.
    """
    if _path == "reference":
        return None
    if torch.compiler.is_compiling():
        return _path
    if traces():
        return None
    return _path, *_PATHS.values(), lines, torch.cuda.current_device() if torch.cuda.is_initialized() else None


def path_of(task: Task[Any]) -> ModuleType:
    """The fused path for components like those of a task, on its device; it may not take every weight."""
    return lines if isinstance(task.table, LineTable) else _PATHS.get(task.weight.device.type, cpu)


def task_of(
    param: Tensor, manifold: geoopt.Manifold, buffer: Tensor | None, grad: Tensor | None = None
) -> Task[Any] | None:
    """The task of a parameter for a fused path, or None if its components are neither kernels nor lines.

    Args:
        param: A parameter with a gradient.
        manifold: Its manifold.
        buffer: Its momentum, if there is any yet.
        grad: Its gradient, if that is not ``param.grad``.

    Returns:
        A task.
    """
    return kernel_task_of(param, manifold, buffer, grad) or lines.task_of(param, manifold, buffer, grad)


def fused_path(task: Task[Any]) -> ModuleType | None:
    """The fused path for a parameter, or None if the batched torch code has to do it.

    Args:
        task: What :func:`task_of` has made of a parameter with its gradient.

    Returns:
        A module with ``squared_norms`` and ``update``.

    Raises:
        RuntimeError: If the path ``"fused"`` is forced and there is none, with the reason.
    """
    module = path_of(task)
    reason = module.reason(task)
    if reason is None:
        _say_once(f"fused step: {module.description()}", logging.INFO)
        return module
    if _path == "fused":
        raise RuntimeError(
            f"no fused path for a weight of shape {tuple(task.weight.shape)}: {reason}; use_path('auto') takes the "
            "batched torch code instead"
        )
    if reason is cpu.NOT_BUILT or reason.startswith("Triton "):  # an installation lacks it, not a weight
        _say_once(f"step by the batched torch code: {reason}", logging.WARNING)
    return None


def say_unfused_weight(weight: Tensor, manifold: object) -> None:
    """Say, if the path ``"fused"`` is forced, why there is none for a weight.

    Args:
        weight: A parameter whose components are neither kernels nor lines.
        manifold: Its manifold.
    """
    if _path == "fused":
        reason = f"{no_kernels(manifold, weight.shape)}; {_LINES}"
        say_unfused(f"a weight of shape {tuple(weight.shape)} on {manifold}", reason)


def say_unfused(what: str, reason: str) -> None:
    """Say, if the path ``"fused"`` is forced, that the batched torch code does something; once per reason.

    Args:
        what: What has no fused path.
        reason: Why.
    """
    if _path == "fused":
        _say_once(f"path 'fused': {what} takes the batched torch code: {reason}", logging.WARNING, reason)


def _say_once(message: str, level: int, key: str | None = None) -> None:
    if (key or message) not in _said:
        _said.add(key or message)
        _logger.log(level, message)


def squared_norms(batch: Batch | TracedBatch) -> Tensor:
    """Squared norms of the Riemannian gradients of all groups of all tasks, one behind the other, in float64."""
    return batch.squared_norms() if isinstance(batch, TracedBatch) else batch.path.squared_norms(batch)


def update(batch: Batch | TracedBatch, scales: Tensor, skips: bool) -> None:
    """Take the step of all tasks: momentum, move, retraction, in place.

    Args:
        batch: Parameters with gradients and momentum.
        scales: ``1 / τ`` of all groups, in the order of :func:`squared_norms`; zero leaves a group's gradient out.
        skips: Whether gradients that are not finite are to be left out.
    """
    if isinstance(batch, TracedBatch):
        batch.update(scales)
    else:
        torch.autograd.graph.increment_version(batch.weights)
        batch.path.update(batch, scales, skips)


def gradients_are_moderate(batch: Batch) -> bool:
    """Whether the gradients of a batch that goes by rows show that the norms of all groups are finite."""
    return batch.path.gradients_are_moderate(batch)


def step_by_rows(batch: Batch) -> tuple[Tensor, int]:
    """Take the whole step of a batch that goes by rows, with the step sizes of its options.

    Args:
        batch: Parameters with gradients and momentum.

    Returns:
        ``τ`` of all groups, in the order of :func:`squared_norms`, in float64, and how many groups were left out
        because their norm is not finite.
    """
    torch.autograd.graph.increment_version(batch.weights)
    return batch.path.step_by_rows(batch)


def curvature(batch: Batch | TracedBatch, like: Tensor, radius_invariant: bool) -> Tensor:
    """Bounds on the sectional curvature of all groups, in the order of :func:`squared_norms`.

    Args:
        batch: Parameters.
        like: A tensor of the result's shape, type and device.
        radius_invariant: Whether they are measured on the manifolds of radius one.

    Returns:
        One number per group.
    """
    if isinstance(batch, TracedBatch):
        return batch.curvature(like, radius_invariant)
    return torch.cat([task.table.curvature_bound(radius_invariant) for task in batch.tasks]).to(like.dtype)
