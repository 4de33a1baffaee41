"""Fused steps: the map of the batched torch code, in two sweeps over memory.

A network has millions of 3 x 3 kernels, and arithmetic on so small matrices costs little beside reading them. The
batched torch code of :mod:`fgo_geo.optim.fgsgd` reads and writes them some hundred times in a step. A fused path takes
two sweeps, *norms* and *update*, which every path implements as a module with the same three functions:

* ``reason(task)`` says why the path cannot take a parameter, or None;
* ``squared_norms(tasks, options)`` returns the squared gradient norm of every group, and changes nothing;
* ``update(tasks, scales, options)`` takes the step, given ``1 / τ`` of every group.

The paths are :mod:`~fgo_geo.kernels.cpu`, a compiled extension, and :mod:`~fgo_geo.kernels.gpu`, Triton. Where none
applies (blocks, other manifolds, half precision, inside ``torch.compile``) the batched torch code does the work: it is
the reference, and the only place where the formulas are meant to be read. This module is where a path is chosen;
nothing else knows that there are several.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Literal, cast, get_args

import torch
from torch import Tensor

from fgo_geo.kernels import cpu, gpu
from fgo_geo.kernels.task import StepOptions, Task, task_of
from fgo_geo.linalg import traces

__all__ = ["Path", "StepOptions", "Task", "active", "fused_path", "squared_norms", "task_of", "update", "use_path"]

Path = Literal["auto", "fused", "reference"]

_logger = logging.getLogger("fgo_geo")
_said: set[str] = set()
_path: Path = "auto"
_PATHS: dict[str, ModuleType] = {"cpu": cpu, "cuda": gpu}  # by device


@contextmanager
def use_path(path: Path) -> Generator[None]:
    """Force a path, for measuring or for finding out whether a difference comes from it.

    The environment variable ``FGO_GEO_PATH`` does the same for a whole program.

    Args:
        path: ``"auto"`` takes the fastest that applies; ``"reference"`` the batched torch code; ``"fused"`` is
            ``"auto"`` that raises for kernels whose type, size or strides no fused path can take.

    Raises:
        ValueError: If there is no such path.

    Example:
        >>> import geoopt
        >>> from fgo_geo import ProductOfGroups, RiemannianFGSGD
        >>> from fgo_geo.grouping import collection
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


def active() -> bool:
    """Whether fused paths are asked at all: not inside ``torch.compile`` or where operations are only traced."""
    return _path != "reference" and not torch.compiler.is_compiling() and not traces()


def fused_path(task: Task) -> ModuleType | None:
    """The fused path for a parameter, or None if the batched torch code has to do it.

    Args:
        task: A parameter on a product of groups, with its gradient.

    Returns:
        A module with ``squared_norms`` and ``update``.

    Raises:
        RuntimeError: If the path ``"fused"`` is forced and there is none, with the reason.
    """
    module = _PATHS.get(task.weight.device.type, cpu)
    reason = module.reason(task)
    if reason is None:
        _say_once(f"fused step: {module.DESCRIPTION}", logging.INFO)
        return module
    if _path == "fused":
        raise RuntimeError(
            f"no fused path for a weight of shape {tuple(task.weight.shape)}: {reason}; use_path('auto') takes the "
            "batched torch code instead"
        )
    if reason is cpu.NOT_BUILT or reason.startswith("Triton "):  # an installation lacks it, not a weight
        _say_once(f"step by the batched torch code: {reason}", logging.WARNING)
    return None


def _say_once(message: str, level: int) -> None:
    if message not in _said:
        _said.add(message)
        _logger.log(level, message)


def squared_norms(path: ModuleType, tasks: Sequence[Task], options: StepOptions) -> Tensor:
    """Squared norms of the Riemannian gradients of all groups of all tasks, one behind the other, in float64."""
    return path.squared_norms(tasks, options)


def update(path: ModuleType, tasks: Sequence[Task], scales: Tensor, options: StepOptions) -> None:
    """Take the step of all tasks: momentum, move, retraction, in place.

    Args:
        path: From :func:`fused_path`, which must have accepted all tasks.
        tasks: Parameters with gradients and momentum.
        scales: ``1 / τ`` of all groups, in the order of :func:`squared_norms`; zero leaves a group's gradient out.
        options: The parameter group's options.
    """
    path.update(tasks, scales, options)
    torch.autograd.graph.increment_version([task.weight for task in tasks])
