"""Which path takes which weight, and the batches that are kept from step to step.

A :class:`Router` asks the paths in the order of ``_FUSED`` and ``_UNFUSED``: each takes the parts of a weight that it
supports, and the reference path takes the rest. The router keeps batches until one of these changes, which is the only
rule of staleness: the kind of the step, the chosen path, the current CUDA device, the weights, their radii, shapes,
strides, types and devices, or that a buffer holds something. For small weights, choosing a path costs more than the
step.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Literal, cast, get_args

import torch
from torch.utils._python_dispatch import (
    _get_current_dispatch_mode,  # pyright: ignore[reportPrivateUsage, reportUnknownVariableType]
)

from fgo_geo.manifolds import ProductOfGroups
from fgo_geo.paths.native.kernels import NativeKernels
from fgo_geo.paths.native.library import instruction_set, library
from fgo_geo.paths.native.lines import NativeLines
from fgo_geo.paths.native.matrices import NativeMatrices
from fgo_geo.paths.native.rows import NativeRows
from fgo_geo.paths.native.stiefel import NativeStiefel
from fgo_geo.paths.protocol import Batch, Claim, Path, Reason, Refusal, StepOptions, Weight, configuration_of
from fgo_geo.paths.reference import Reference
from fgo_geo.paths.shared_products import SharedProducts
from fgo_geo.paths.triton.launches import TritonKernels

__all__ = ["PathName", "Router", "explain", "use_path"]

PathName = Literal["auto", "fused", "reference"]

_FUSED: tuple[Path, ...] = (
    TritonKernels(),
    NativeRows(),
    NativeKernels(),
    NativeMatrices(),
    NativeLines(),
    NativeStiefel(),
)
_UNFUSED: tuple[Path, ...] = (SharedProducts(), Reference())

_logger = logging.getLogger("fgo_geo")
_said: set[str] = set()
_path: PathName = "auto"


@contextmanager
def use_path(path: PathName) -> Generator[None]:
    """Force a path, for measuring or for finding out whether a difference comes from it.

    The environment variable ``FGO_GEO_PATH`` does the same for a whole program.

    Args:
        path: ``"auto"`` selects the fastest path that applies, and ``"reference"`` the batched torch code. ``"fused"``
            works like ``"auto"``, but raises for kernels whose type, size or strides no fused path supports. Weights
            without any fused path (large Stiefel matrices, other manifolds, the exponential map) still take the batched
            torch code; the logger ``fgo_geo`` warns about them, once per reason and block.

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
    _said.clear()
    try:
        yield
    finally:
        _path = before


def _checked(path: str, what: str) -> PathName:
    if path not in get_args(PathName):
        raise ValueError(f"{what}: the path must be one of {get_args(PathName)}, got {path!r}")
    return cast(PathName, path)


_path = _checked(os.environ.get("FGO_GEO_PATH", "auto"), "FGO_GEO_PATH")


class Router:
    """The batches of one parameter group, kept from step to step.

    Attributes:
        is_recorded: Whether the operations of the latest step are recorded, by a mode or a transform, and not run.
    """

    def __init__(self) -> None:
        self.is_recorded = False
        self._circumstances: tuple[object, ...] = ()
        self._weights: list[Weight] = []
        self._stamps: list[tuple[object, ...]] = []
        self._batches: list[Batch] = []

    def route(self, weights: Sequence[Weight], options: StepOptions) -> list[Batch]:
        """The batches that step these weights.

        Args:
            weights: The parameters of a group that are on manifolds and have gradients, in this step.
            options: Hyper-parameters of the step.

        Returns:
            Batches that hold every part of every weight once; those that stage parts for others come first.

        Raises:
            RuntimeError: If the path ``"fused"`` is forced and a weight of kernels has none, with the reason.
        """
        circumstances = _circumstances(options)
        self.is_recorded = bool(circumstances[0])
        stamps = [_stamp(weight) for weight in weights]
        if not (circumstances == self._circumstances and self._renew(weights, stamps)):
            self._batches = _batches(weights, options, self.is_recorded)
            self._circumstances, self._weights, self._stamps = circumstances, list(weights), stamps
        return self._batches

    def _renew(self, weights: Sequence[Weight], stamps: Sequence[tuple[object, ...]]) -> bool:
        """Take over gradients and buffers of this step, if nothing else has changed."""
        if len(weights) != len(self._weights):
            return False
        for old, new, before, now in zip(self._weights, weights, self._stamps, stamps, strict=True):
            if old.param is not new.param or old.manifold is not new.manifold:
                return False
            if before[0] is not now[0] or before[1:] != now[1:]:
                return False
        for old, new in zip(self._weights, weights, strict=True):
            old.grad, old.buffer = new.grad, new.buffer
        return True


def _circumstances(options: StepOptions) -> tuple[object, ...]:
    """What the choice of paths depends on besides the weights; first whether operations are recorded, not run."""
    transform = torch._C._functorch.peek_interpreter_stack()  # pyright: ignore
    is_tracing = torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
    return (
        transform is not None or _get_current_dispatch_mode() is not None or is_tracing,
        _path,
        options.update,
        options.rule,
        options.momentum != 0,
        options.nesterov,
        isinstance(options.lr, torch.Tensor),
        torch.cuda.current_device() if torch.cuda.is_initialized() else None,
    )


def _stamp(weight: Weight) -> tuple[object, ...]:
    """What a kept batch depends on besides the weight itself; the first entry is compared by identity."""
    is_product = isinstance(weight.manifold, ProductOfGroups)
    radii, version = (weight.manifold.manifolds, 0) if is_product else configuration_of(weight.manifold)
    param, grad = weight.param, cast(torch.Tensor, weight.grad)
    return radii, version, param.shape, param.stride(), param.dtype, param.device, grad.dtype, weight.first


def _batches(weights: Sequence[Weight], options: StepOptions, is_recorded: bool) -> list[Batch]:
    """Assign weights to paths, and make one batch per path and device."""
    claims: dict[tuple[Path, torch.device], list[Claim]] = {}
    for weight in weights:
        for path, parts in _claims_of(weight, options, is_recorded):
            claims.setdefault((path, weight.param.device), []).append(Claim(weight, parts))
    batches = [path.batch(own) for (path, _), own in claims.items()]
    return sorted(batches, key=lambda batch: not batch.stages)


def _claims_of(weight: Weight, options: StepOptions, is_recorded: bool) -> list[tuple[Path, tuple[int, ...]]]:
    """The paths that take parts of a weight, each with the numbers of its parts."""
    taken: list[tuple[Path, tuple[int, ...]]] = []
    remaining = tuple(range(weight.n_parts))
    refusals: list[Refusal] = []
    if is_recorded:
        _say_unfused("a step", "operations are recorded, by a mode or a transform of torch")
    elif _path != "reference":
        for path in _FUSED:
            answer = path.accepts(weight, remaining, options) if remaining else ()
            if isinstance(answer, Refusal):
                refusals.append(answer)
            elif answer:
                _say_once(f"fused step: {path.name}{_details(path)}", logging.INFO)
                taken.append((path, answer))
                remaining = tuple(part for part in remaining if part not in answer)
        if remaining:
            _say_remaining(weight, bool(taken), refusals)
    for path in _UNFUSED:
        answer = path.accepts(weight, remaining, options) if remaining else ()
        if not isinstance(answer, Refusal) and answer:
            taken.append((path, answer))
            remaining = tuple(part for part in remaining if part not in answer)
    return taken


def explain(weight: Weight, options: StepOptions) -> tuple[list[str], list[str]]:
    """The names of the paths that step the parts of a weight with its gradient, and why fused paths refuse others."""
    taken = _claims_of(weight, options, is_recorded=False)
    fused = {part for path, parts in taken if path in _FUSED for part in parts}
    remaining = tuple(part for part in range(weight.n_parts) if part not in fused)
    answers = [path.accepts(weight, remaining, options) for path in _FUSED] if remaining else []
    refusals = [answer for answer in answers if isinstance(answer, Refusal)]
    reasons = [f"the path {_path!r} was chosen"] if _path == "reference" else _reasons(refusals)
    return [path.name + _details(path) for path, _ in taken], reasons if remaining else []


# -- log messages ------------------------------------------------------------------------------------------------------

_FAILURES = (Reason.SIZE, Reason.DTYPE, Reason.LAYOUT, Reason.MISSING)  # of weights that are meant for fused paths


def _say_remaining(weight: Weight, is_partly: bool, refusals: Sequence[Refusal]) -> None:
    """Report that the batched torch code takes a weight or its remaining parts, as the chosen path requires."""
    shape = tuple(weight.param.shape)
    failure = next((refusal for refusal in refusals if refusal.reason in _FAILURES), None)
    if is_partly:
        _say_unfused(f"some blocks of a weight of shape {shape}", refusals[-1].detail)
    elif failure is None:
        _say_unfused(f"a weight of shape {shape} on {weight.manifold}", "; ".join(_reasons(refusals)))
    elif _path == "fused":
        raise RuntimeError(
            f"no fused path for a weight of shape {shape}: {failure.detail}; use_path('auto') takes the batched torch "
            "code instead"
        )
    elif failure.reason is Reason.MISSING:  # an installation lacks it, not a weight
        _say_once(f"step by the batched torch code: {failure.detail}", logging.WARNING)


def _reasons(refusals: Sequence[Refusal]) -> list[str]:
    """The reasons of refusals, once each; that of the device only if there is no other."""
    others = [refusal.detail for refusal in refusals if refusal.reason is not Reason.DEVICE]
    return list(dict.fromkeys(others or [refusal.detail for refusal in refusals]))


def _details(path: Path) -> str:
    native = isinstance(path, (NativeKernels, NativeMatrices, NativeLines, NativeStiefel)) and library() is not None
    return f" ({instruction_set()})" if native else ""


def _say_unfused(what: str, reason: str) -> None:
    """Say, if the path ``"fused"`` is forced, that the batched torch code does something; once per reason."""
    if _path == "fused":
        _say_once(f"path 'fused': {what} takes the batched torch code: {reason}", logging.WARNING, reason)


def _say_once(message: str, level: int, key: str | None = None) -> None:
    if (key or message) not in _said:
        _said.add(key or message)
        _logger.log(level, message)
