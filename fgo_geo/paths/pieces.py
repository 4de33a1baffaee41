"""How the batched torch code cuts weights into pieces and joins pieces into jobs.

A *piece* is one part of one weight: a batch of components on one manifold. Small pieces on equal manifolds are joined
into one :class:`Job`, across layers, so that a network of many small weights takes a few batched calls; a large piece
is a separate job, because joining would only copy it.

Pieces are joined once, when a batch is built. Every step loads the jobs with points, gradients and momentum. This
module cuts and joins tensors; it contains no formula.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import geoopt
import torch
from torch import Tensor

from fgo_geo.linalg import Use, Workspace, reads_for_free
from fgo_geo.manifolds import ComponentManifold, ProductOfGroups
from fgo_geo.paths.native import blocks
from fgo_geo.paths.native.library import library
from fgo_geo.paths.protocol import Claim, Weight
from fgo_geo.weights.components import KernelPartition, RectanglePartition, Segments
from fgo_geo.weights.kinds import kind_of
from fgo_geo.weights.words import few

__all__ = ["Job", "LargeKernels", "Piece", "cut", "jobs_of"]

_JOIN_LIMIT = 2**16  # entries; larger pieces occupy all cores by themselves

# Where products as sums of long vectors over the batch beat a call per matrix. Measured for steps on the oblique and
# the Stiefel manifold: from 100 to 200 matrices on for 3 x 3 entries, from 100 to 1,000 on for 5 x 5, 7 x 7 and 16 x 4,
# from 1,000 on for 8 x 8. For 16 x 16 they never do, and with two blocks of 64 x 16 they take seven times as long.
_PLANES_ENTRIES = 64  # at most, of a matrix
_PLANES_MATRICES = 128  # at least


@dataclass(frozen=True, eq=False)
class Piece:
    """A batch of components of one weight on one manifold.

    Attributes:
        weight: The weight.
        part: Number of the part.
        manifold: The manifold of the components.
        smallest_radius: The smallest radius that the manifold has had while momentum accumulated; one without radius.
        groups: Which components share a step size.
        index: Position of the piece's groups among those of the batch, int64.
    """

    weight: Weight
    part: int
    manifold: geoopt.Manifold
    smallest_radius: float
    groups: Segments
    index: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the components."""
        manifold = self.weight.manifold
        if not isinstance(manifold, ProductOfGroups):
            return tuple(self.weight.param.shape)
        return (manifold.partition.counts[self.part], *manifold.partition.sizes[self.part])

    @property
    def key(self) -> object:
        """Pieces with equal keys can be joined."""
        m, param = self.manifold, self.weight.param
        kind = kind_of(m)
        radius = m.radius if isinstance(m, ComponentManifold) else None
        is_batch = isinstance(m, ComponentManifold) or (isinstance(m, geoopt.Euclidean) and m.ndim > 0)
        if math.prod(self.shape) > _JOIN_LIMIT or isinstance(radius, Tensor) or not is_batch:
            return id(self)
        options = id(m) if kind is None else tuple(getattr(m, name) for name in kind.options)
        component = self.shape[len(self.shape) - m.ndim :]
        return (type(m), options, radius, self.smallest_radius, component, param.dtype, self.weight.first)


def jobs_of(claims: Sequence[Claim]) -> list[Job]:
    """Cut the claimed parts of weights, all on one device, into pieces, and join them into jobs."""
    first_group = 0
    buckets: dict[object, list[Piece]] = {}
    for claim in claims:
        for piece in _pieces_of(claim, first_group):
            buckets.setdefault(piece.key, []).append(piece)
        first_group += claim.weight.n_groups
    return [Job(pieces) for pieces in buckets.values()]


def _pieces_of(claim: Claim, first_group: int) -> list[Piece]:
    weight = claim.weight
    manifold, device = weight.manifold, weight.param.device
    if isinstance(manifold, ProductOfGroups):
        pieces: list[Piece] = []
        for part in claim.parts:
            own, groups = manifold.parts[part]
            index = torch.from_numpy(manifold.partition.groups[part]).long().to(device) + first_group
            pieces.append(Piece(weight, part, own, manifold.smallest_radii[part], groups, index))
        return pieces
    n = math.prod(weight.param.shape[: weight.param.ndim - manifold.ndim])
    radius = manifold.radius_range[0] if isinstance(manifold, ComponentManifold) else 1.0
    return [Piece(weight, 0, manifold, radius, Segments(1, n), torch.tensor([first_group], device=device))]


class Job:
    """Pieces that are stepped as one batch of components.

    Args:
        pieces: Pieces with equal keys.

    Attributes:
        pieces: The pieces.
        manifold: The manifold of all components.
        smallest_radius: The smallest radius of the pieces, which is the same for all.
        groups: The groups of all pieces, one piece after the other.
        index: Position of the groups among those of the batch.
        x: Components, during a step.
        grad: Gradients at the components.
        buffer: Momentum of the components; None without momentum, or before the first step.
    """

    x: Tensor
    grad: Tensor
    buffer: Tensor | None

    def __init__(self, pieces: Sequence[Piece]) -> None:
        first = pieces[0]
        self.pieces = list(pieces)
        self.manifold = first.manifold
        self.smallest_radius = first.smallest_radius
        self.groups = first.groups
        self.index = first.index
        if len(pieces) > 1:
            self.groups = Segments.joined([piece.groups for piece in pieces], first.index.device)
            self.index = torch.cat([piece.index for piece in pieces])
        self._component = first.shape[len(first.shape) - first.manifold.ndim :]
        self._counts = [math.prod(piece.shape[: len(piece.shape) - first.manifold.ndim]) for piece in pieces]
        is_matrix = len(self._component) == 2
        entries = math.prod(self._component)
        self._planes = is_matrix and entries <= _PLANES_ENTRIES and self.groups.total >= _PLANES_MATRICES
        self.buffer = None
        record = kind_of(first.manifold)
        self._is_foreign = record is None or record.is_of_user

    @property
    def is_whole(self) -> bool:
        """Whether the pieces are all of their weights."""
        return all(piece.weight.n_parts == 1 for piece in self.pieces)

    @property
    def is_view(self) -> bool:
        """Whether the components are the parameter itself, in its memory."""
        param = self.pieces[0].weight.param
        return self.is_whole and len(self.pieces) == 1 and self.x.data_ptr() == param.data_ptr()

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        """One batch of the components of all pieces."""
        if len(tensors) == 1:
            return tensors[0]
        batches = [t.reshape(-1, *self._component) for t in tensors]
        if self._planes:  # stored with their number running fastest, see components.KernelPartition
            return torch.cat([t.permute(1, 2, 0) for t in batches], 2).permute(2, 0, 1)
        if len(self._component) == 2 and tensors[0].stride(-2) < tensors[0].stride(-1):
            return torch.cat([t.mT for t in batches]).mT  # copied in the order of memory, which is several times faster
        return torch.cat(batches)

    def split(self, components: Tensor) -> list[Tensor]:
        """One tensor per piece, of the piece's shape."""
        if len(self.pieces) == 1:
            return [components]
        parts = zip(components.split(self._counts), self.pieces, strict=True)
        return [part.reshape(piece.shape) for part, piece in parts]

    def sum(self, values: Tensor) -> Tensor:
        """Sums over the groups of one number per component."""
        return self.groups.sum(values.flatten())

    def spread(self, values: Tensor) -> Tensor:
        """One number per group, to be multiplied with components."""
        if self.groups.count == 1:
            return values.reshape(())
        batch = self.x.shape[: self.x.ndim - self.manifold.ndim]
        return self.groups.spread(values).reshape(*batch, *(1,) * self.manifold.ndim)

    @contextmanager
    def naming_errors(self) -> Generator[None]:
        """Let an error in a manifold that is not the package's say which class and which weights it concerns."""
        try:
            yield
        except Exception as error:
            if not self._is_foreign or isinstance(error, torch.OutOfMemoryError):
                raise
            names = list(dict.fromkeys(piece.weight.name_of(piece.weight.owner) for piece in self.pieces))
            record = kind_of(self.manifold)
            kind = "" if record is None else f" (kind {record.name!r})"
            raise RuntimeError(
                f"the step of {few(names)} on {type(self.manifold).__name__} manifolds{kind} failed: "
                f"{type(error).__name__}: {error}"
            ) from error

    def require_components(self, method: str, found: Tensor, is_finite: bool) -> None:
        """Raise ValueError if a method of a manifold that is not the package's has returned something else.

        Args:
            method: Its name.
            found: What it has returned.
            is_finite: Whether it must be finite, where it can be read without waiting.
        """
        if self._is_foreign and found.shape != self.x.shape:
            raise ValueError(f"{method} returned the shape {tuple(found.shape)}, expected {tuple(self.x.shape)}")
        if self._is_foreign and is_finite and reads_for_free(found) and not bool(found.isfinite().all()):
            raise ValueError(f"{method} returned numbers that are not finite")

    def release(self) -> None:
        """Hold on to no tensor of a step."""
        self.buffer = None
        for name in ("x", "grad"):
            self.__dict__.pop(name, None)


class LargeKernels:
    """A weight of large kernels, whose components are put in memory that is kept from step to step.

    The system has to find and clear fresh memory of this size in every step, which takes a quarter of the time. Points
    and gradients have memory of their own, since all weights are measured before one moves; the rest is shared.

    Args:
        weight: A weight of which :meth:`takes` is true.
        shared: Memory that all weights use in turn.
    """

    def __init__(self, weight: Weight, shared: Workspace) -> None:
        self._weight = weight
        self._shared = shared
        self._own = Workspace()
        self._partition = _kernels_of(weight)
        self._planes: dict[Use, Tensor] = {}

    @staticmethod
    def takes(claim: Claim) -> bool:
        """Whether all parts of a weight are large kernels in the precision of the step, on the host."""
        manifold, param, grad = claim.weight.manifold, claim.weight.param, claim.weight.grad
        if not isinstance(manifold, ProductOfGroups) or not isinstance(manifold.partition, KernelPartition):
            return False
        partition = manifold.partition
        smallest = min(partition.counts) * math.prod(partition.layout.kernel)
        is_plain = param.dtype in (torch.float32, torch.float64) and reads_for_free(param)
        return is_plain and smallest > _JOIN_LIMIT and grad is not None and partition.takes_planes(param, grad.dtype)

    def cut(self, tensor: Tensor, use: Use) -> dict[int, Tensor]:
        """The parts of the weight, or of its gradient or momentum; in own memory but for momentum."""
        partition = self._partition
        planes = self._memory(use)
        partition.take_planes(tensor.detach(), self._memory(Use.SORTING), planes)
        self._planes[use] = planes
        return dict(enumerate(partition.parts_of(planes)))

    def keep(self, use: Use, part: int, components: Tensor) -> Tensor:
        """A part that replaces what was cut for a use, in the same memory."""
        planes = self._planes.setdefault(use, self._memory(use))
        return self._partition.parts_of(planes)[part].copy_(components)

    def write(self) -> None:
        """Write momentum, if any is kept, and points, each in one operation."""
        for use, target in ((Use.MOMENTUM, self._weight.buffer), (Use.POINTS, self._weight.param)):
            planes = self._planes.pop(use, None)
            if planes is not None and target is not None:
                self._partition.put_planes_(planes, target.detach(), self._memory(Use.SORTING))

    def _memory(self, use: Use) -> Tensor:
        workspace = self._own if use in (Use.POINTS, Use.GRADIENTS) else self._shared
        shape = (math.prod(self._partition.layout.kernel), sum(self._partition.counts))
        return workspace.empty(shape, self._weight.param.detach(), use)


def _kernels_of(weight: Weight) -> KernelPartition:
    assert isinstance(weight.manifold, ProductOfGroups)
    assert isinstance(weight.manifold.partition, KernelPartition)
    return weight.manifold.partition


def cut(claim: Claim, tensor: Tensor) -> dict[int, Tensor]:
    """The claimed parts of a weight, or of its gradient or momentum, half precision in float32."""
    manifold = claim.weight.manifold
    tensor = tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor.detach()
    if not isinstance(manifold, ProductOfGroups):
        return {0: tensor}
    partition = manifold.partition
    if claim.is_whole:
        return dict(enumerate(partition.split(tensor)))
    assert isinstance(partition, RectanglePartition)  # kernels are never shared between paths
    if tensor.dtype != torch.float32 or tensor.device.type != "cpu" or library() is None:
        parts = partition.split(tensor)
        return {part: parts[part] for part in claim.parts}
    return {part: blocks.take(tensor, partition, part) for part in claim.parts}
