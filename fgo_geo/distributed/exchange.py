"""The collectives of a step of sharded weights: shards in, a step by the owner, shards out.

Projection, retraction and ``R²`` of a weight need all of it. So every weight has an *owner*, the process that steps it
for all (:mod:`fgo_geo.distributed.owners`), with every execution path as if it were not sharded. A step is

1. *agree*: one small all-reduce, in which a process that has an error, or other manifolds than the rest, is heard;
2. *collect*: one all-to-all brings weight, gradient and momentum to the owner;
3. the owners measure, and all *agree* again: if one refuses, all do, and nothing has changed anywhere;
4. the owners move, and one all-to-all *puts back* weight and momentum, with ``τ`` of every group for everybody.

Between steps nothing is kept at the owner: weights and state are the shards, as every other tool of torch expects them.
A process sends and receives one part in ``N`` of five copies of the constrained weights per step, with ``N`` processes.
On a mesh that replicates shards, every replica does the same.
"""

from __future__ import annotations

import builtins
import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import geoopt
import torch
import torch.distributed as dist
from torch import Tensor

from fgo_geo.distributed.owners import owners_of, step_cost
from fgo_geo.linalg import Cut, cut_of, is_sharded, local_part, processes_of
from fgo_geo.manifolds import ProductOfGroups
from fgo_geo.optim.base import StepRequest
from fgo_geo.paths.protocol import Weight, configuration_of

__all__ = ["Parcel", "WeightExchange", "collect_parcels", "fingerprint", "return_parcels"]


@dataclass(frozen=True)
class Parcel:
    """A tensor that is whole at its owner and in shards elsewhere.

    Attributes:
        cut: How it is dealt.
        owner: The process that has it whole, by its number in the group.
        dtype: Its type.
    """

    cut: Cut
    owner: int
    dtype: torch.dtype


def collect_parcels(
    parcels: Sequence[Parcel], shards: Sequence[Tensor], targets: Sequence[Tensor | None], group: Any
) -> None:
    """Bring shards to owners, by one all-to-all for every type.

    Args:
        parcels: What is sent, the same on all processes.
        shards: What this process has of each.
        targets: Where to put what this process owns, whole tensors; None for what others own.
        group: The processes.
    """
    rank = dist.get_rank(group)

    def sent_to(other: int, numbers: Sequence[int]) -> list[Tensor]:
        return [shards[n].reshape(-1) for n in numbers if parcels[n].owner == other]

    def received_from(other: int, numbers: Sequence[int]) -> list[tuple[int, tuple[int, ...]]]:
        return [(n, parcels[n].cut.shape_of(other)) for n in numbers if parcels[n].owner == rank]

    def put(number: int, other: int, value: Tensor) -> None:
        target = targets[number]
        if target is not None:
            parcels[number].cut.piece(target, other).copy_(value)

    _all_to_all(parcels, shards, sent_to, received_from, put, group)


def return_parcels(
    parcels: Sequence[Parcel], wholes: Sequence[Tensor | None], targets: Sequence[Tensor], group: Any
) -> None:
    """Send to every process its shards of what the owners have; the inverse of :func:`collect_parcels`.

    Args:
        parcels: What is sent, the same on all processes.
        wholes: The tensors that this process owns; None for others.
        targets: The shards of this process, written in place.
        group: The processes.
    """
    rank = dist.get_rank(group)

    def sent_to(other: int, numbers: Sequence[int]) -> list[Tensor]:
        owned = [(n, wholes[n]) for n in numbers]
        return [parcels[n].cut.piece(value, other).reshape(-1) for n, value in owned if value is not None]

    def received_from(other: int, numbers: Sequence[int]) -> list[tuple[int, tuple[int, ...]]]:
        return [(n, parcels[n].cut.shape_of(rank)) for n in numbers if parcels[n].owner == other]

    def put(number: int, other: int, value: Tensor) -> None:
        targets[number].copy_(value)

    _all_to_all(parcels, targets, sent_to, received_from, put, group)


def _all_to_all(
    parcels: Sequence[Parcel],
    like: Sequence[Tensor],
    sent_to: Callable[[int, Sequence[int]], list[Tensor]],
    received_from: Callable[[int, Sequence[int]], list[tuple[int, tuple[int, ...]]]],
    put: Callable[[int, int, Tensor], None],
    group: Any,
) -> None:
    others = range(dist.get_world_size(group))
    for dtype in dict.fromkeys(parcel.dtype for parcel in parcels):
        numbers = [n for n, parcel in enumerate(parcels) if parcel.dtype == dtype]
        outgoing = [sent_to(other, numbers) for other in others]
        incoming = [received_from(other, numbers) for other in others]
        sent = torch.cat([t for own in outgoing for t in own] or [like[numbers[0]].new_empty(0)])
        counts = [sum(math.prod(shape) for _, shape in own) for own in incoming]
        received = sent.new_empty(sum(counts))
        dist.all_to_all_single(received, sent, counts, [sum(t.numel() for t in own) for own in outgoing], group)
        offset = 0
        for other, own in zip(others, incoming, strict=True):
            for number, shape in own:
                length = math.prod(shape)
                put(number, other, received[offset : offset + length].view(shape))
                offset += length


def fingerprint(manifold: geoopt.Manifold | None) -> bytes:
    """A digest of a manifold: groups, kinds and radii.

    Args:
        manifold: Any manifold; None for a plain parameter.

    Example:
        >>> from fgo_geo import Oblique
        >>> fingerprint(Oblique(0.5)) == fingerprint(Oblique(0.5)), fingerprint(Oblique(0.5)) == fingerprint(Oblique())
        (True, False)
    """
    digest = hashlib.sha256(type(manifold).__name__.encode())
    parts = [manifold]
    if isinstance(manifold, ProductOfGroups):
        for collection in manifold.collections:
            digest.update(collection.to_json().encode())
        parts = [part for part, _ in manifold.parts]
    for part in parts:
        radius = getattr(part, "radius", None)
        is_tensor = isinstance(radius, Tensor)
        digest.update(radius.detach().double().cpu().numpy().tobytes() if is_tensor else repr(radius).encode())
        digest.update(repr((type(part).__name__, getattr(part, "ndim", None))).encode())
    return digest.digest()


@dataclass(eq=False)
class _Placed:
    """A weight on a device mesh: how it is dealt, and who steps it; a copy, not dealt, by everybody for himself."""

    param: Tensor
    cut: Cut
    owner: int
    whole: Tensor | None
    lent: Weight | None = None  # the same from step to step, as those who step it know it

    def lend(self, weight: Weight, point: Tensor, grad: Tensor | None, buffer: Tensor | None) -> Weight:
        """The weight as its owner steps it."""
        if self.lent is None or self.lent.owner is not weight.owner or self.lent.param is not point:
            self.lent = Weight(point, weight.owner, weight.manifold, grad)
        self.lent.grad, self.lent.buffer, self.lent.first = grad, buffer, weight.first
        return self.lent

    @property
    def is_copy(self) -> bool:
        return self.cut.dim is None


class WeightExchange:
    """What :class:`~fgo_geo.optim.base.Stepper` asks for when weights are sharded.

    Args:
        state: The optimiser's state by parameter; its momentum is sharded as the parameter is.
        name_of: Says which parameter one is, for messages.
    """

    def __init__(self, state: dict[Tensor, Any], name_of: Callable[[Tensor], str]) -> None:
        self._state = state
        self._name_of = name_of
        self._placed: list[_Placed] = []
        self._configurations: list[Any] = []
        self._digests: list[bytes] = []
        self._number = 0
        self._group: Any = None
        self._groups: list[Any] = []
        self._device = torch.device("cpu")
        self._lent: list[
            tuple[StepRequest, Weight, Weight | None]
        ] = []  # sharded, and whole where this process owns it

    # -- in ----------------------------------------------------------------------------------------------------

    def collect(self, requests: Sequence[StepRequest]) -> list[StepRequest]:
        """The same requests with whole weights on manifolds: those that this process steps for all."""
        shared = [(own, weight) for own in requests for weight in own.weights if _is_shared(weight)]
        error = None
        try:
            self._place([weight for _, weight in shared])
        except Exception as problem:
            if not self._groups:  # without a device mesh there is nobody to tell
                raise
            error = problem
        self.agree(error)
        parcels: list[Parcel] = []
        shards: list[Tensor] = []
        targets: list[Tensor | None] = []
        self._lent = []
        for (own, weight), placed in zip(shared, self._placed, strict=True):
            grad: Any = weight.grad
            if grad.placements != weight.param.placements:  # pyright: ignore  of tensor parallelism: sums not taken yet
                grad = grad.redistribute(placements=weight.param.placements)  # pyright: ignore
            mine = [local_part(t) for t in (weight.param, grad, weight.buffer) if t is not None]
            if placed.is_copy:
                buffer = mine[2] if len(mine) > 2 else None
                lent = placed.lend(weight, mine[0], mine[1], buffer)
                self._lent.append((own, weight, lent))
                continue
            wholes: list[Tensor | None] = [None] * len(mine)
            if placed.whole is not None:
                _allocate(placed.whole)
                wholes = [placed.whole, *(t.new_empty(placed.cut.shape) for t in mine[1:])]
            parcels += [Parcel(placed.cut, placed.owner, t.dtype) for t in mine]
            shards += mine
            targets += wholes
            lent = None
            if placed.whole is not None:
                buffer = wholes[2] if len(wholes) > 2 else None
                lent = placed.lend(weight, placed.whole, wholes[1], buffer)
            self._lent.append((own, weight, lent))
        if parcels:
            collect_parcels(parcels, shards, targets, self._group)
        whole = {id(weight): lent for _, weight, lent in self._lent}
        weights = [[whole.get(id(weight), weight) for weight in own.weights] for own in requests]
        return [
            replace(own, weights=[w for w in ws if w is not None]) for own, ws in zip(requests, weights, strict=True)
        ]

    def _place(self, weights: Sequence[Weight]) -> None:
        """Find out how weights are dealt and choose owners, if anything has changed since the last step."""
        self._digests, self._number = (self._digests, self._number) if weights else ([], 0)
        configurations = [(configuration_of(w.manifold), w.manifold, w.param.dtype) for w in weights]
        same = len(weights) == len(self._placed) and all(
            w.param is placed.param and now[0][0] is before[0][0] and now[1] is before[1] and now[2] == before[2]
            for w, placed, now, before in zip(weights, self._placed, configurations, self._configurations, strict=True)
        )
        if same:
            return
        self._placed, self._configurations = [], []
        if not weights:
            return
        self._groups = processes_of(weights[0].param)
        self._device = local_part(weights[0].param).device
        cuts: list[Cut] = []
        groups: list[Any] = []
        for weight in weights:
            try:
                cut, group = cut_of(weight.param)
            except ValueError as error:
                raise ValueError(f"{self._name_of(weight.owner)} has {error}") from error
            cuts.append(cut)
            groups.append(group)
        first = next((group for group in groups if group is not None), None)
        if any(group is not None and group is not first for group in groups):
            raise ValueError(
                "the sharded weights of one optimiser are dealt to different groups of processes; build an optimiser "
                "for each device mesh"
            )
        self._group = first
        count, rank = (1, 0) if first is None else (dist.get_world_size(first), dist.get_rank(first))
        costs = [step_cost(weight.manifold, cut.shape) for weight, cut in zip(weights, cuts, strict=True)]
        costs = [cost if cut.dim is not None else 0.0 for cost, cut in zip(costs, cuts, strict=True)]
        owners = owners_of(costs, count)
        for weight, cut, owner in zip(weights, cuts, owners, strict=True):
            is_owned = owner == rank and cut.dim is not None
            whole = local_part(weight.param).new_empty(cut.shape) if is_owned else None
            self._placed.append(_Placed(weight.param, cut, owner, whole))
        self._configurations = configurations
        self._digests = [
            hashlib.sha256(repr((cut.shape, cut.dim, cut.count)).encode() + fingerprint(weight.manifold)).digest()
            for weight, cut in zip(weights, cuts, strict=True)
        ]
        self._number = int.from_bytes(hashlib.sha256(b"".join(self._digests)).digest()[:7], "big")

    # -- agreement -----------------------------------------------------------------------------------------------

    def agree(self, error: Exception | None) -> None:
        """Raise on all processes if one of them has an error, or their manifolds differ.

        Args:
            error: What this process would raise; None if nothing.

        Raises:
            Exception: The error, or one of the same type with the words of the process that has it.
            ValueError: If the manifolds differ.
        """
        flags = torch.tensor([int(error is not None), self._number, -self._number], device=self._device)
        for group in self._groups:
            dist.all_reduce(flags, dist.ReduceOp.MAX, group)
        failed, largest, smallest = flags.tolist()
        if failed:
            told = self._told(None if error is None else (type(error).__name__, str(error), dist.get_rank()))
            if error is not None:
                raise error
            name, text, rank = next(words for words in told if words is not None)
            own = getattr(builtins, name, RuntimeError)
            raise (own if issubclass(own, Exception) else RuntimeError)(f"{text} (on process {rank})")
        if largest != -smallest:
            digests = self._told(self._digests)
            number = next(
                (n for n, own in enumerate(self._digests) if any(other[n : n + 1] != [own] for other in digests)), 0
            )
            name = self._name_of(self._placed[number].param) if self._placed else "weights"
            self._placed = []
            raise ValueError(
                f"the processes have different manifolds, first of {name}: groups, kinds or radii differ, or which "
                "weights have gradients; no parameter was changed. Call fgo_geo.constrain with the same arguments and "
                "seed on all processes"
            )

    def _told(self, words: Any) -> list[Any]:
        """What every process has to say, on all of them."""
        told: list[Any] = [words]
        for group in self._groups:
            gathered: list[Any] = [None] * dist.get_world_size(group)
            dist.all_gather_object(gathered, told, group)
            told = [word for words in gathered for word in words]
        return told

    # -- out -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def put_back(self, scales: dict[Tensor, Tensor]) -> dict[Tensor, Tensor]:
        """Return whole weights to their shards; give all processes the ``τ`` of all weights, and return them."""
        parcels: list[Parcel] = []
        wholes: list[Tensor | None] = []
        targets: list[Tensor] = []
        received: dict[Tensor, Tensor] = {}

        def send(cut: Cut, owner: int, value: Tensor | None, target: Tensor) -> None:
            parcels.append(Parcel(cut, owner, target.dtype))
            wholes.append(value)
            targets.append(target)

        for (own, weight, lent), placed in zip(self._lent, self._placed, strict=True):
            owner, cut = weight.owner, placed.cut
            if own.options.momentum != 0 and weight.buffer is None:
                weight.buffer = self._state[owner]["momentum_buffer"] = torch.zeros_like(weight.param.detach())
                if placed.is_copy and lent is not None and lent.buffer is not None:
                    local_part(weight.buffer).copy_(lent.buffer)
            if placed.is_copy:
                continue
            send(cut, placed.owner, placed.whole, local_part(weight.param))
            if own.options.momentum != 0 and weight.buffer is not None:
                send(cut, placed.owner, None if lent is None else lent.buffer, local_part(weight.buffer))
            everyone = Cut((weight.n_groups,), None, cut.count, cut.rank)
            number_type = torch.promote_types(owner.dtype, torch.float32)
            if own.options.step_size != "constant":
                tau = scales.get(owner)
                target = torch.ones(everyone.shape, dtype=number_type, device=self._device)
                received[owner] = target
                send(everyone, placed.owner, None if lent is None else tau, target)
            if own.running:
                mean = self._state[owner].get("norm_squared")
                if mean is None or lent is not None:
                    mean = torch.zeros(everyone.shape, dtype=number_type, device=self._device)
                value = None if lent is None else self._state[owner].get("norm_squared")
                self._state[owner]["norm_squared"] = mean
                send(everyone, placed.owner, value, mean)
        if parcels:
            return_parcels(parcels, wholes, targets, self._group)
        for placed in self._placed:
            if placed.whole is not None:
                _free(placed.whole)
        self._lent = []
        return received


def _is_shared(weight: Weight) -> bool:
    return weight.manifold is not None and is_sharded(weight.param)


def _allocate(tensor: Tensor) -> None:
    """Give a tensor its memory back; paths know it as the same object from step to step."""
    tensor.untyped_storage().resize_(tensor.numel() * tensor.itemsize)


def _free(tensor: Tensor) -> None:
    """Take a tensor's memory away until the next step."""
    tensor.untyped_storage().resize_(0)
