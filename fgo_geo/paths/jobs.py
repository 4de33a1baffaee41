"""How the work of an optimiser's step is batched.

A parameter is cut into *pieces*, batches of components on one manifold. A parameter on a
:class:`~fgo_geo.ProductOfGroups` has one piece per manifold kind (or block shape), every other parameter is one
piece, as it is. Small pieces on equal manifolds are joined into one :class:`Job`, across layers, so that a network
of many small weights costs a few batched calls; a large piece is a job of its own. On the CPU, weights of large kernels
are cut one after the other, when it is their turn to step (:class:`LargeKernels`): cut at once they would push each
other out of the cache, and memory that is made and dropped in every step costs more than the arithmetic.

Nothing here knows a formula: tensors are cut, joined and put back, and :class:`~fgo_geo.weights.components.Segments`
say which components share a step size.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, TypeAlias, cast

import geoopt
import torch
from torch import Tensor

from fgo_geo.linalg import Workspace, reads_for_free
from fgo_geo.manifolds import ComponentManifold, Oblique, ProductOfGroups, ScaledSphere, Stiefel
from fgo_geo.paths.router import (
    Batch,
    StepOptions,
    Task,
    TracedBatch,
    TracedBatches,
    fused_path,
    put_blocks_,
    say_unfused,
    say_unfused_weight,
    take_blocks,
    task_of,
)
from fgo_geo.weights.components import BlockPartition, KernelPartition, Segments

__all__ = ["FusedTasks", "Job", "LargeKernels", "Piece", "TracedTasks", "join", "manifold_of", "pieces_of", "put_back"]

_JOIN_LIMIT = 2**16  # entries; larger pieces keep the cores busy on their own, joining them would only copy

# Where products as sums of long vectors over the batch beat a call per matrix. Measured for steps on the oblique and
# the Stiefel manifold: from 100 to 200 matrices on for 3 x 3 entries, from 100 to 1,000 on for 5 x 5, 7 x 7 and 16 x 4,
# from 1,000 on for 8 x 8. For 16 x 16 they never do, and with two blocks of 64 x 16 they take seven times as long.
_PLANES_ENTRIES = 64  # at most, of a matrix
_PLANES_MATRICES = 128  # at least

# By class, what tells its manifolds apart beside the radius and the shape of a component.
_OPTIONS: dict[type, tuple[str, ...]] = {ScaledSphere: (), Oblique: (), Stiefel: ("retraction",), geoopt.Euclidean: ()}


def manifold_of(param: Tensor) -> geoopt.Manifold | None:
    """The manifold of a constrained parameter, None for a plain one (Geoopt's Euclidean manifold included).

    The attribute decides, not the class: ``torch.compile`` shows an optimiser's parameters as plain ones.
    """
    manifold = getattr(param, "manifold", None)
    constrained = isinstance(manifold, geoopt.Manifold) and not isinstance(manifold, geoopt.Euclidean)
    return manifold if constrained else None


@dataclass(frozen=True, eq=False)
class Piece:
    """A batch of components of one parameter on one manifold.

    Attributes:
        param: The parameter.
        part: Number of the piece within the parameter.
        manifold: Where the components live.
        smallest_radius: Of the manifold, now or since momentum has been gathered; one if it has none.
        groups: Which components share a step size.
        x: The components.
        grad: The Euclidean gradient at the components.
        buffer: Their momentum, None before the first step.
    """

    param: Tensor
    part: int
    manifold: geoopt.Manifold
    smallest_radius: float
    groups: Segments
    x: Tensor
    grad: Tensor
    buffer: Tensor | None

    @property
    def is_whole(self) -> bool:
        """Whether there is nothing else of the parameter."""
        return self.x.numel() == self.param.numel()

    @property
    def is_view(self) -> bool:
        """Whether the components lie where the parameter does."""
        return self.x.untyped_storage().data_ptr() == self.param.untyped_storage().data_ptr()

    @property
    def key(self) -> object:
        """Pieces with equal keys and equal radii can be joined."""
        m, x = self.manifold, self.x
        if x.numel() > _JOIN_LIMIT or isinstance(self.radii[0], Tensor) or not _is_batch_of_components(m):
            return id(self)
        return _class_and_options(m), x.shape[-m.ndim :], x.dtype, x.device, self.buffer is None

    @property
    def radii(self) -> tuple[float | Tensor | None, float]:
        """Radius (None without one) and smallest radius, to be compared only.

        A number that changes is a symbol inside ``torch.compile``: to hash it would compile the step anew for every
        value, to compare it does not.
        """
        m = self.manifold
        return m.radius if isinstance(m, ComponentManifold) else None, self.smallest_radius


def pieces_of(param: Tensor, manifold: geoopt.Manifold, buffer: Tensor | None, only: Sequence[int] = ()) -> list[Piece]:
    """Cut a parameter, its gradient and its momentum into pieces, half precision in float32.

    Args:
        param: A parameter with a gradient.
        manifold: Its manifold.
        buffer: Its momentum buffer, if there is one.
        only: Numbers of the parts that are wanted, of a product of groups of blocks; all if left out.

    Returns:
        The pieces, in the order that :func:`put_back` expects.
    """
    x, grad = _working(param), _working(torch.as_tensor(param.grad))
    momentum = None if buffer is None else _working(buffer)
    if not isinstance(manifold, ProductOfGroups):
        n = math.prod(x.shape[: x.ndim - manifold.ndim])
        radius = manifold.radius_range[0] if isinstance(manifold, ComponentManifold) else 1.0
        return [Piece(param, 0, manifold, radius, Segments(1, n), x, grad, momentum)]
    if only:
        cut = cast(BlockPartition, manifold.partition)
        tensors = [
            (part, *(None if t is None else take_blocks(t, cut, part) for t in (x, grad, momentum))) for part in only
        ]
        return [
            Piece(param, part, *_part(manifold, part), cast(Tensor, xs), cast(Tensor, gs), bs)
            for part, xs, gs, bs in tensors
        ]
    split = manifold.partition.split
    buffers: Sequence[Tensor | None] = [None] * len(manifold.parts) if momentum is None else split(momentum)
    parts = zip(manifold.parts, manifold.smallest_radii, split(x), split(grad), buffers, strict=True)
    return [Piece(param, part, m, r, groups, xs, gs, bs) for part, ((m, groups), r, xs, gs, bs) in enumerate(parts)]


def _part(manifold: ProductOfGroups, part: int) -> tuple[geoopt.Manifold, float, Segments]:
    own, groups = manifold.parts[part]
    return own, manifold.smallest_radii[part], groups


def put_back(tensor: Tensor, manifold: geoopt.Manifold, components: dict[int, Tensor]) -> None:
    """Write pieces into a tensor of the parameter's shape.

    Args:
        tensor: The parameter, or its momentum.
        manifold: The parameter's manifold.
        components: The pieces by their numbers, all, some or none.
    """
    if not components:
        return
    if not isinstance(manifold, ProductOfGroups):
        tensor.copy_(components[0])
    elif len(components) == len(manifold.partition.kinds):
        manifold.partition.put_([components[part] for part in sorted(components)], tensor)
    else:
        for part, blocks in components.items():
            put_blocks_(tensor, cast(BlockPartition, manifold.partition), part, blocks)


class LargeKernels:
    """A large weight of kernels, stepped part by part in memory that is kept for the next weight.

    Components of weight, gradient and momentum are gathered, and what becomes of them is put in their place. The weight
    itself and its momentum are written at the very end.

    Args:
        param: A parameter with a gradient, of which :meth:`takes` is true.
        manifold: Its manifold.
        buffer: Its momentum buffer, if there is one.
        workspace: Memory for the components.
    """

    def __init__(self, param: Tensor, manifold: ProductOfGroups, buffer: Tensor | None, workspace: Workspace) -> None:
        self._param, self._manifold = param, manifold
        self._cut = cast(KernelPartition, manifold.partition)
        tensors = [param.detach(), torch.as_tensor(param.grad), *([] if buffer is None else [buffer])]
        shape = (math.prod(self._cut.layout.kernel), sum(self._cut.counts))
        self._memory, *self._planes = workspace.empty((4, *shape), param.detach(), "kernels")
        self._places = self._cut.places(param.device)
        for tensor, planes in zip(tensors, self._planes, strict=False):
            self._cut.take(tensor, self._places, self._memory, planes)
        self._has_momentum = buffer is not None
        self._parts = [self._cut.parts_of(planes) for planes in self._planes]

    @staticmethod
    def takes(param: Tensor, manifold: geoopt.Manifold | None, buffer: Tensor | None) -> bool:
        """Whether all parts of a parameter are large kernels, in the precision to compute with and on the host."""
        if not isinstance(manifold, ProductOfGroups) or not isinstance(manifold.partition, KernelPartition):
            return False
        cut = manifold.partition
        smallest = min(cut.counts) * math.prod(cut.layout.kernel)
        is_plain = reads_for_free(param) and param.dtype in (torch.float32, torch.float64)
        is_plain = is_plain and torch.as_tensor(param.grad).dtype == param.dtype
        can_write = all(cut.puts_planes(tensor) for tensor in (param, buffer) if tensor is not None)
        return is_plain and smallest > _JOIN_LIMIT and can_write

    def pieces(self) -> list[Piece]:
        """The parts."""
        parts = zip(self._manifold.parts, self._manifold.smallest_radii, *self._parts, strict=True)
        return [
            Piece(self._param, part, own, radius, groups, x, grad, buffer if self._has_momentum else None)
            for part, ((own, groups), radius, x, grad, buffer) in enumerate(parts)
        ]

    def put(self, part: int, x: Tensor, buffer: Tensor | None) -> None:
        """Keep what becomes of a part: its points, and its momentum if there is any."""
        self._parts[0][part].copy_(x)
        if buffer is not None:
            self._parts[2][part].copy_(buffer)

    def write(self, momentum: Tensor | None) -> None:
        """Write the weight, and its momentum if there is any."""
        self._cut.put_planes_(self._planes[0], self._places, self._memory, self._param)
        if momentum is not None:
            self._cut.put_planes_(self._planes[2], self._places, self._memory, momentum)


@dataclass
class Job:
    """Pieces joined into one batch.

    Attributes:
        pieces: What was joined.
        manifold: Where all components live.
        groups: Groups of all pieces, one behind the other.
        x: Components.
        grad: Gradients at the components.
        buffer: Momentum of the components, None before the first step.
        along: ``xᵀ grad``, if projection, norm and step are to share it; the gradients are not projected then.
    """

    pieces: list[Piece]
    manifold: geoopt.Manifold
    groups: Segments
    x: Tensor
    grad: Tensor
    buffer: Tensor | None
    along: Tensor | None = None

    @property
    def is_whole(self) -> bool:
        """Whether all parameters are in no other job, nor anywhere else."""
        return all(piece.is_whole for piece in self.pieces)

    @property
    def smallest_radius(self) -> float:
        """That of the pieces, which is the same for all."""
        return self.pieces[0].smallest_radius

    def sum(self, values: Tensor) -> Tensor:
        """Sums over the groups of one number per component, shape ``(G,)``."""
        return self.groups.sum(values.flatten())

    def spread(self, values: Tensor) -> Tensor:
        """One number per group, broadcast over the entries of its components."""
        if self.groups.count == 1:
            return values.reshape(())
        batch = self.x.shape[: self.x.ndim - self.manifold.ndim]
        return self.groups.spread(values).reshape(*batch, *(1,) * self.manifold.ndim)

    def split(self, components: Tensor) -> list[Tensor]:
        """One tensor per piece, of the piece's shape."""
        if len(self.pieces) == 1:
            return [components]
        lengths = [math.prod(p.x.shape[: -self.manifold.ndim]) for p in self.pieces]
        parts = zip(components.split(lengths), self.pieces, strict=True)
        return [part.reshape(piece.x.shape) for part, piece in parts]

    def split_groups(self, values: Tensor) -> list[Tensor]:
        """One tensor per piece of a tensor with one number per group."""
        if len(self.pieces) == 1:
            return [values]
        return list(values.split([piece.groups.count for piece in self.pieces]))


_Way: TypeAlias = tuple[ModuleType, bool]  # a fused path, and whether it goes by rows


class FusedTasks:
    """What fused paths do for a parameter group, kept from step to step: most of it is the same every time."""

    def __init__(self) -> None:
        self._circumstances: object = None
        self._momentum = False
        self._kept: dict[int, tuple[_Way, Task[Any]]] = {}  # by position in the parameter group
        self._now: dict[_Way, list[Task[Any]]] = {}
        self._batches: list[Batch] = []

    def begin(self, circumstances: object, momentum: bool) -> None:
        """Begin a step.

        Args:
            circumstances: Those of :func:`fgo_geo.paths.router.circumstances`.
            momentum: Whether there is any in this parameter group.
        """
        self._momentum = momentum
        if circumstances != self._circumstances:
            self._kept.clear()
        self._circumstances = circumstances
        self._now = {}

    def renew(self, position: int, param: Tensor, buffer: Tensor | None) -> bool:
        """Do for a parameter what was done in the step before, if nothing but its values has changed.

        Args:
            position: Of the parameter in its group.
            param: The parameter.
            buffer: Its momentum, if there is any yet.

        Returns:
            Whether it will be done.
        """
        way, task = self._kept.get(position, (None, None))
        if way is None or task is None or (buffer is None) == self._momentum or not task.renew(param, buffer):
            return False
        self._now.setdefault(way, []).append(task)
        return True

    def add(self, position: int, param: Tensor, manifold: geoopt.Manifold | None, buffer: Tensor | None) -> bool:
        """Do the step of a parameter, if there is a fused path for it.

        Args:
            position: Of the parameter in its group.
            param: The parameter, with a gradient.
            manifold: Its manifold.
            buffer: Its momentum, if there is any yet.

        Returns:
            Whether it will be done.
        """
        self._kept.pop(position, None)
        if manifold is None:
            return False
        task = task_of(param, manifold, buffer)
        if task is None:
            say_unfused_weight(param, manifold)
            return False
        path = fused_path(task)
        if path is None:
            return False
        if self._momentum and (buffer is None or buffer.stride() != param.stride()):
            # What is left is written later: nobody is to find what was in the memory before.
            new = torch.zeros_like if task.table.left else torch.empty_like
            task.buffer, task.first, task.fresh = new(param.detach()), buffer is None, True
            if buffer is not None:  # from when the weight was stored otherwise
                task.buffer.copy_(buffer)
        if task.table.left:
            say_unfused(f"the Stiefel blocks of a weight of shape {tuple(param.shape)}", "Stiefel blocks are no lines")
        way = path, path.goes_by_rows(task)
        self._kept[position] = way, task
        self._now.setdefault(way, []).append(task)
        return True

    def left(self, position: int) -> tuple[int, ...]:
        """Numbers of the parts of a parameter that will not be done, of one that :meth:`renew` or :meth:`add` took."""
        return self._kept[position][1].table.left

    def batches(self, options: StepOptions) -> list[Batch]:
        """All that is to be done in this step, with the options of the parameter group."""
        if [batch.tasks for batch in self._batches] != list(self._now.values()):
            now = {task for tasks in self._now.values() for task in tasks}
            self._kept = {position: kept for position, kept in self._kept.items() if kept[1] in now}
            self._batches = [Batch(path, tasks, options, by_rows) for (path, by_rows), tasks in self._now.items()]
        for batch in self._batches:
            batch.options = options
        return self._batches

    def release(self) -> None:
        """End a step, holding on to no gradient."""
        for _, task in self._kept.values():
            task.release()


class TracedTasks:
    """What :class:`FusedTasks` is, while ``torch.compile`` traces: nothing is kept."""

    def __init__(self, options: StepOptions) -> None:
        self._batches = TracedBatches(options)

    def renew(self, position: int, param: Tensor, buffer: Tensor | None) -> bool:
        """Nothing is."""
        return False

    def add(self, position: int, param: Tensor, manifold: geoopt.Manifold | None, buffer: Tensor | None) -> bool:
        """As :meth:`FusedTasks.add`."""
        return manifold is not None and self._batches.add(param, manifold, buffer)

    def left(self, position: int) -> tuple[int, ...]:
        """None are."""
        return ()

    def batches(self, options: StepOptions) -> list[TracedBatch]:
        """All that is to be done in this step."""
        return self._batches.all()


def join(pieces: Sequence[Piece]) -> list[Job]:
    """Join pieces on equal manifolds into jobs.

    Args:
        pieces: Any pieces, of one or more parameters.

    Returns:
        Jobs that hold every piece once.
    """
    buckets: dict[object, list[tuple[object, list[Piece]]]] = {}  # by key, with the radii
    for piece in pieces:
        alike, radii = buckets.setdefault(piece.key, []), piece.radii
        for others, bucket in alike:
            if others == radii:
                bucket.append(piece)
                break
        else:
            alike.append((radii, [piece]))
    return [_job(bucket) for alike in buckets.values() for _, bucket in alike]


def _job(pieces: list[Piece]) -> Job:
    first = pieces[0]
    if len(pieces) == 1:
        return Job(pieces, first.manifold, first.groups, first.x, first.grad, first.buffer)

    component = first.x.shape[-first.manifold.ndim :]
    groups = Segments.joined([p.groups for p in pieces], first.x.device)
    planes = len(component) == 2 and component.numel() <= _PLANES_ENTRIES and groups.total >= _PLANES_MATRICES
    turned = len(component) == 2 and first.x.stride(-2) < first.x.stride(-1)

    def joined(tensors: Iterable[Tensor]) -> Tensor:
        batches = [t.reshape(-1, *component) for t in tensors]
        if planes:  # stored with their number running fastest, see components.KernelPartition
            return torch.cat([t.permute(1, 2, 0) for t in batches], 2).permute(2, 0, 1)
        if turned:  # copied as they lie, which is several times faster
            return torch.cat([t.mT for t in batches]).mT
        return torch.cat(batches)

    buffer = None if first.buffer is None else joined(p.buffer for p in pieces if p.buffer is not None)
    return Job(pieces, first.manifold, groups, joined(p.x for p in pieces), joined(p.grad for p in pieces), buffer)


def _working(tensor: Tensor) -> Tensor:
    """The tensor to compute with: plain, and float32 for half precision."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor.detach()


def _class_and_options(manifold: geoopt.Manifold) -> object:
    """What is equal for manifolds that differ in their radius at most; of an unknown class nothing but itself is."""
    options = _OPTIONS.get(type(manifold))
    return id(manifold) if options is None else (type(manifold), *(getattr(manifold, name) for name in options))


def _is_batch_of_components(manifold: geoopt.Manifold) -> bool:
    return isinstance(manifold, ComponentManifold) or (isinstance(manifold, geoopt.Euclidean) and manifold.ndim > 0)
