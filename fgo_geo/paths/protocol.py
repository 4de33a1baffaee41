r"""What an execution path is: a way to compute the step of some weights.

Every way to compute the step of weights on manifolds (the batched reference, shared products, compiled sweeps, Triton)
implements the same three verbs, and no other code depends on anything else of a path:

* :meth:`Path.accepts` looks at a weight and returns the numbers of the parts that the path takes, or a
  :class:`Refusal`. Remaining parts go to the next path.
* :meth:`Batch.measure` returns ``R²``, the squared norm of the Riemannian gradient of every group, in float64. It
  changes nothing.
* :meth:`Batch.move` takes the step, given the factor ``1/τ`` of every group's gradient.

A path that gains by measuring and moving at once has ``Batch.sweeps``: if :meth:`Batch.can_sweep` allows it,
:meth:`Batch.sweep` replaces the two.

The rest of the step (:mod:`fgo_geo.optim.base`) is the same for all paths: measure everything, refuse or skip what is
not finite, compute ``τ``, move everything. The formulas are in :mod:`~fgo_geo.paths.reference`, and every other path is
tested against it.

A *part* of a weight is a batch of components on one manifold kind, see :class:`~fgo_geo.weights.components.Partition`;
a weight without a partition is one part, number 0. ``R²`` and factors are in the order of the weight's groups, even for
a path that takes only some parts; ``R²`` of the other groups is zero then.
"""

from __future__ import annotations

import abc
import enum
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import geoopt
import torch
from torch import Tensor

from fgo_geo.manifolds import ComponentManifold, ProductOfGroups
from fgo_geo.paths.rules import StepOptions, StepSize, Update

__all__ = [
    "Batch",
    "Claim",
    "Configuration",
    "Path",
    "Reason",
    "Refusal",
    "Share",
    "StepOptions",
    "StepSize",
    "Update",
    "Weight",
    "configuration_of",
]

Configuration: TypeAlias = tuple[object, object]


@dataclass(frozen=True, eq=False)
class Share:
    """The part that one process steps of a weight that is sharded in whole components.

    Attributes:
        manifold: The manifold of the whole weight; that of the process's own components is ``Weight.manifold``.
        shape: The shape of the whole weight.
        groups: Numbers of the process's groups among those of the whole weight, increasing, int64.
        spread: Positions in ``groups`` of those that other processes have components of, too, int64.
        is_counted: Which of ``groups`` this process reports to the others, and counts; one process does for each group.
    """

    manifold: geoopt.Manifold
    shape: tuple[int, ...]
    groups: Tensor
    spread: Tensor
    is_counted: Tensor

    @property
    def n_groups(self) -> int:
        """How many groups the whole weight has."""
        return _number_of_groups(self.manifold)


@dataclass(eq=False, slots=True)
class Weight:
    """A parameter on a manifold, in one step.

    Attributes:
        param: The tensor that the step moves, in place.
        owner: The parameter of the model; ``param`` is a copy of it in single precision where it is half.
        manifold: Its manifold.
        grad: Its Euclidean gradient, read only; None between steps.
        buffer: Its momentum, stored as the parameter is, written in place; None without momentum and between steps.
        first: Whether the buffer holds nothing yet.
        staged: What paths have computed of some parts, points and momentum by part, until all are there: both are
            written at once, so that an interrupt finds the weight as it was before its step or after it.
        share: What of the owner this is, if other processes step the rest of it.
        name_of: How messages name the owner.
    """

    param: Tensor
    owner: Tensor
    manifold: geoopt.Manifold
    grad: Tensor | None
    buffer: Tensor | None = None
    first: bool = False
    staged: dict[int, tuple[Tensor, Tensor | None]] = field(default_factory=dict[int, tuple[Tensor, "Tensor | None"]])
    share: Share | None = None
    name_of: Callable[[Tensor], str] = lambda owner: f"a weight of shape {tuple(owner.shape)}"

    @property
    def n_groups(self) -> int:
        """Number of groups, each with its own step size."""
        return _number_of_groups(self.manifold)

    @property
    def whole_manifold(self) -> geoopt.Manifold:
        """The manifold of the owner."""
        return self.manifold if self.share is None else self.share.manifold

    @property
    def is_spread(self) -> bool:
        """Whether other processes have components of its groups."""
        return self.share is not None and len(self.share.spread) > 0

    @property
    def n_parts(self) -> int:
        """How many parts it has."""
        return len(self.manifold.partition.kinds) if isinstance(self.manifold, ProductOfGroups) else 1

    def stage(self, part: int, point: Tensor, momentum: Tensor | None) -> None:
        """Take over new points and momentum of a part; with the last part, write momentum and then points."""
        self.staged[part] = point, momentum
        if len(self.staged) < self.n_parts:
            return
        points, buffers = zip(*(self.staged[number] for number in range(self.n_parts)), strict=True)
        for target, values in ((self.buffer, [b for b in buffers if b is not None]), (self.param, points)):
            if target is None or not values:
                continue
            if isinstance(self.manifold, ProductOfGroups):
                self.manifold.partition.put_(values, target)
            elif values[0].data_ptr() != target.data_ptr():
                target.copy_(values[0])
        self.staged.clear()


@dataclass(frozen=True, eq=False)
class Claim:
    """The parts of a weight that one path takes.

    Attributes:
        weight: The weight.
        parts: Numbers of its parts; all of them unless another path takes some.
    """

    weight: Weight
    parts: tuple[int, ...]

    @functools.cached_property
    def is_whole(self) -> bool:
        """Whether the path takes all parts."""
        return len(self.parts) == self.weight.n_parts


class Reason(enum.Enum):
    """Why a path refuses a weight."""

    KIND = "its manifold"
    STEP = "the kind of step"
    COMPONENTS = "what its components are"
    SIZE = "the size of its components"
    LAYOUT = "how it is stored"
    DTYPE = "its type"
    DEVICE = "its device"
    MISSING = "what is not installed"


@dataclass(frozen=True)
class Refusal:
    """A path's answer to a weight, or parts of it, that it does not take.

    Attributes:
        reason: Why.
        detail: The same for people, as a clause.
    """

    reason: Reason
    detail: str


class Batch(abc.ABC):
    """Weights that one path steps together; kept from step to step while nothing but values changes.

    Args:
        claims: What the path does of each weight.
    """

    stages = False  # whether the batch writes to `Weight.staged`, and so has to move before others
    sweeps = False  # whether the batch has a sweep that measures and moves at once

    def __init__(self, claims: Sequence[Claim]) -> None:
        self.claims = tuple(claims)
        self.weights = [claim.weight for claim in claims]
        self.counts = [claim.weight.n_groups for claim in claims]
        self.device = claims[0].weight.param.device

    @functools.cached_property
    def owned(self) -> Tensor | None:
        """Which groups of all weights are moved here; None if all are."""
        if all(claim.is_whole for claim in self.claims):
            return None
        owned = [torch.zeros(count, dtype=torch.bool) for count in self.counts]
        for claim, mask in zip(self.claims, owned, strict=True):
            if claim.is_whole:
                mask.fill_(True)
            elif isinstance(claim.weight.manifold, ProductOfGroups):
                for part in claim.parts:
                    mask[torch.from_numpy(claim.weight.manifold.partition.groups[part])] = True
        return torch.cat(owned).to(self.device)

    @functools.cached_property
    def counted(self) -> Tensor | None:
        """Which groups of all weights this process counts, so that all processes count each once; None if all."""
        if not any(weight.is_spread for weight in self.weights):
            return None
        ones = (torch.ones(count, dtype=torch.bool) for count in self.counts)
        shares = (weight.share for weight in self.weights)
        counted = [own if share is None else share.is_counted.cpu() for share, own in zip(shares, ones, strict=True)]
        return torch.cat(counted).to(self.device)

    def can_sweep(self, options: StepOptions, checks: bool) -> bool:
        """Whether the whole step may be one :meth:`sweep`. Changes no weight.

        Args:
            options: Hyper-parameters.
            checks: Whether all ``R²`` have to be known to be finite.
        """
        raise NotImplementedError

    def sweep(self, options: StepOptions, curvatures: Tensor | None, leaves_out: bool) -> Tensor:
        """Take the whole step at once; ``"theorem"`` and ``"constant"`` steps only.

        Args:
            options: Those that :meth:`can_sweep` was given.
            curvatures: Bound on the curvature of every group, float64, if ``options.curvature`` is None.
            leaves_out: Whether a group without a finite ``R²`` gets no gradient. Otherwise :meth:`can_sweep` has
                allowed the sweep, and such a group, and what is moved with it, stays as it was.

        Returns:
            ``R²`` as :meth:`measure` returns it.
        """
        raise NotImplementedError

    def finish(self) -> None:  # noqa: B027  (most batches have nothing to do)
        """React to the end of a step, when all batches have moved."""

    @abc.abstractmethod
    def measure(self, options: StepOptions) -> Tensor:
        """``R²`` of all groups of all weights, one weight after the other, in float64. Changes no weight."""

    @abc.abstractmethod
    def move(self, options: StepOptions, scale: Tensor | None, leaves_out: bool) -> None:
        """Take the step that was measured.

        Args:
            options: Those that :meth:`measure` was given.
            scale: ``1/τ`` of all groups in the order of :meth:`measure`, float64; None if all are one. With zero, the
                gradient of a group is not used.
            leaves_out: Whether some gradients are skipped because they are not finite.
        """


class Path(abc.ABC):
    """A way to compute a step."""

    name: str
    """What the path is called in messages."""

    @abc.abstractmethod
    def accepts(self, weight: Weight, parts: tuple[int, ...], options: StepOptions) -> tuple[int, ...] | Refusal:
        """Which parts of a weight the path takes.

        Args:
            weight: A weight with its gradient.
            parts: Numbers of the parts that no path has taken yet.
            options: Hyper-parameters, for the kind of the step.

        Returns:
            Numbers among ``parts``, none if another path is faster, or a refusal. The answer holds while the kind of
            the step, the manifold's radii and the shapes, strides, types and devices of the weight and its gradient
            stay the same.
        """

    @abc.abstractmethod
    def batch(self, claims: Sequence[Claim]) -> Batch:
        """The batch of claims that were accepted, all on one device."""


def _number_of_groups(manifold: geoopt.Manifold) -> int:
    return manifold.n_groups if isinstance(manifold, ProductOfGroups) else 1


def configuration_of(manifold: geoopt.Manifold) -> Configuration:
    """What differs after a change of a manifold: its radii, compared by identity, and their version and the retraction.

    Example:
        >>> from fgo_geo import Oblique
        >>> manifold = Oblique(torch.ones(3))
        >>> before = configuration_of(manifold)
        >>> manifold.radius.mul_(2)
        tensor([2., 2., 2.])
        >>> before[0] is configuration_of(manifold)[0], before == configuration_of(manifold)
        (True, False)
    """
    if isinstance(manifold, ProductOfGroups):
        return manifold.manifolds, 0  # every change of the radii makes a new list
    if not isinstance(manifold, ComponentManifold):
        return None, 0
    radius, retraction = manifold.radius, getattr(manifold, "retraction", None)
    if not isinstance(radius, Tensor):
        return radius, retraction
    version = -1 if radius.is_inference() else radius._version  # pyright: ignore[reportPrivateUsage]
    return radius, (version, retraction)
