"""Occasional checks of constrained weights, which notice an optimiser that ignores manifolds.

``torch.optim.AdamW(model.parameters())`` moves constrained weights off their manifolds without an error, because torch
treats them as plain parameters. Therefore some forward passes of training check a few components of one weight, each
time a different one, and warn once, with the remedy. A check is small for weights of every size: it takes some
components, or some columns of large Stiefel and oblique matrices, which are points of the same kind.

A check is a few small operations every 32 passes: 26 µs per pass of a ResNet-18 on average (one thread), which is
0.03 % of a forward pass of eight images of 64 x 64, and 0.003 % at 224 x 224. On CUDA the result is copied to the host
asynchronously, and a later pass reads it once it has arrived, so nothing waits. In a sharded model, all processes check
in the same passes, and each gathers the weight to check, as FSDP2 gathers all weights in every pass.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field

import geoopt
import torch
from torch import Tensor, nn

from fgo_geo.linalg import traces, whole
from fgo_geo.manifolds import ComponentManifold, Oblique, ProductOfGroups, SpectralBall, Stiefel
from fgo_geo.manifolds.embedded import point_tolerance
from fgo_geo.manifolds.product import violation_of
from fgo_geo.models.entry import PlanEntry
from fgo_geo.models.surgery import parameter_of
from fgo_geo.weights.kinds import kind_of

__all__ = ["Watch", "looks_at"]

_EVERY = 32
_EARLY = (2, 4, 8, 16)  # further passes with a check
_COMPONENTS = 8  # of every part
_COLUMNS = 4  # of larger matrices
_SMALL = 4096  # entries of a component
_LARGE = 2**18  # entries; larger components are not checked, unless some of their columns suffice
_BY_COLUMNS = (Stiefel, Oblique, SpectralBall)  # some columns of a point are a point with fewer columns


@dataclass
class _Sample:
    """The entries of a weight that are checked.

    Attributes:
        of: The manifolds of its parts; every change of radii makes another list.
        device: The device of the weight.
        places: For every part, the manifold of the components, and their entries among the weight's channels.
    """

    of: nn.Module
    device: torch.device
    places: list[tuple[geoopt.Manifold, tuple[Tensor, ...]]]


@dataclass
class _Answer:
    """The largest violation in a check, on its way to the host."""

    name: str
    tolerance: float
    worst: Tensor
    arrived: torch.cuda.Event | None


@dataclass
class Watch:
    """The state of a model's checks. Copies and pickles start with an empty state.

    Attributes:
        passes: Forward passes of training so far.
        has_warned: Whether a weight was found off its manifold.
    """

    passes: int = 0
    has_warned: bool = False
    _turn: int = 0
    _samples: dict[str, _Sample] = field(default_factory=dict[str, _Sample])
    _answer: _Answer | None = None

    def __reduce__(self) -> tuple[type[Watch], tuple[()]]:
        return Watch, ()

    def before_pass(self, model: nn.Module, entries: Sequence[PlanEntry]) -> None:
        """Check one weight if its turn has come, and warn if an earlier check has found a violation.

        Args:
            model: The constrained model.
            entries: The entries of its plan.
        """
        if self.has_warned or not (model.training and torch.is_grad_enabled()):
            return
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():  # where no event may be asked
            return
        self.passes += 1
        if self._answer is not None:
            self._read(self._answer)
        if (self.passes % _EVERY and self.passes not in _EARLY) or traces():
            return
        names = [entry.name for entry in entries if entry.constrained]
        for _ in names:
            self._turn = (self._turn + 1) % len(names)
            param = parameter_of(model, names[self._turn])
            if param is not None and self._look(names[self._turn], param):
                return

    def _look(self, name: str, param: Tensor) -> bool:
        """Start a check of a weight; False if it has nothing to check."""
        manifold = getattr(param, "manifold", None)
        if not isinstance(manifold, ProductOfGroups) or not param.requires_grad:
            return False
        if param.is_meta:
            return False
        sample = self._samples.get(name)
        if sample is None or sample.of is not manifold.manifolds or sample.device != param.device:
            places = looks_at(manifold, param.device)
            sample = self._samples[name] = _Sample(manifold.manifolds, param.device, places)
        if not sample.places:
            return False
        with torch.no_grad(), torch.autocast(param.device.type, enabled=False):
            channels = manifold.layout.channels(whole(param.detach()).as_subclass(Tensor))
            worst = torch.stack([violation_of(own, channels[places]).max() for own, places in sample.places]).max()
        arrived = None
        if worst.is_cuda:
            worst, arrived = worst.to("cpu", non_blocking=True), torch.cuda.Event()
            arrived.record(torch.cuda.current_stream(param.device))
        self._answer = _Answer(name, point_tolerance(param.dtype), worst, arrived)
        if arrived is None:
            self._read(self._answer)
        return True

    def _read(self, answer: _Answer) -> None:
        """Warn about a weight that is off its manifold, if the answer has arrived."""
        if answer.arrived is not None and not answer.arrived.query():
            return
        self._answer, worst = None, float(answer.worst)
        if not worst > answer.tolerance:
            return
        self.has_warned = True
        warnings.warn(
            f"{answer.name!r} has left its manifold in training: relative constraint violation {worst:.3g}, expected "
            f"at most {answer.tolerance:.3g}. An optimiser that knows no manifold moves constrained weights off: use "
            "fgo_geo.RiemannianFGSGD, or keep the optimiser and call fgo_geo.on_manifolds(optimizer). "
            "plan_of(model).project() moves all weights back to their manifolds; call it first, and after any other "
            "code has written to them. This warning appears once; constrain(..., watch=False) turns the check off",
            UserWarning,
            stacklevel=2,
        )


def looks_at(
    manifold: ProductOfGroups, device: torch.device | None = None
) -> list[tuple[geoopt.Manifold, tuple[Tensor, ...]]]:
    """A few components of every part of a weight.

    Args:
        manifold: The weight's manifold.
        device: Of the weight.

    Returns:
        Manifolds, each with an index of ``layout.channels(weight)`` that gives points of it, shape ``(n, A, B)``.

    Example:
        >>> from fgo_geo.weights.grouping import collection
        >>> manifold = ProductOfGroups(collection(6, 4, "po", ("sphere", "euclidean")), (6, 4, 3, 3))
        >>> [(sphere, index)] = looks_at(manifold)
        >>> weight = manifold.random(6, 4, 3, 3)
        >>> weight[index].shape, bool(sphere.violation(weight[index]).max() < 1e-6)
        (torch.Size([8, 3, 3]), True)
    """
    generator = torch.Generator().manual_seed(0)
    cut, layout = manifold.partition, manifold.layout
    shape = (layout.out_channels, layout.in_channels, *layout.kernel)
    found: list[tuple[geoopt.Manifold, tuple[Tensor, ...]]] = []
    for number, (own, _) in enumerate(manifold.parts):
        kind, (rows, columns) = kind_of(own), cut.sizes[number]
        is_large = rows * columns > _SMALL
        by_columns = is_large and type(own) in _BY_COLUMNS
        whole = _LARGE if isinstance(own, ComponentManifold) else _SMALL  # others may take a factorisation
        if isinstance(own, geoopt.Euclidean) or kind is None or not (by_columns or rows * columns <= whole):
            continue
        chosen = torch.randint(cut.counts[number], (1 if is_large else _COMPONENTS,), generator=generator)
        entries = cut.entries(number, chosen)
        if by_columns:
            entries = entries[..., torch.randperm(columns, generator=generator)[:_COLUMNS]]
        radius = own.radius if isinstance(own, ComponentManifold) else 1.0
        if isinstance(radius, Tensor):
            radius = radius.expand(cut.counts[number])[chosen.to(radius.device)].to(device)
        places = tuple(index.to(device) for index in torch.unravel_index(entries, shape))
        found.append((kind.build(radius), places))
    return found
