"""The collectives of a step of sharded weights.

If sharding keeps the components of a weight whole, as for convolutions, every process steps its own components
in place (:mod:`fgo_geo.distributed.local`). Otherwise projection, retraction and ``R²`` need the whole weight. It then
has an *owner*, the process that steps it for all (:mod:`fgo_geo.distributed.owners`). In both cases the step equals
that on one process, by the same execution paths:

1. *agree*: one small all-reduce tells all processes whether one of them has an error or different manifolds;
2. *collect*: one all-to-all brings weight, gradient and momentum to the owners;
3. all measure, and one all-reduce *adds up* ``R²`` of the groups whose components are on several processes;
4. all *agree* again: if one process refuses, all do, and nothing has changed on any of them;
5. all move, and one all-to-all *puts back* the weights and momentum of the owners, with ``τ`` of every group for all.

Between steps the owner stores nothing: weights and state are sharded, as all other torch tools expect. With ``N``
processes, each sends and receives ``1/N`` of five copies of the weights that have owners. On a mesh that replicates
shards, every replica does the same.
"""

from __future__ import annotations

import builtins
import contextlib
import hashlib
import weakref
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import geoopt
import torch
import torch.distributed as dist
from torch import Tensor

from fgo_geo.distributed.local import LocalPart, local_part_of
from fgo_geo.distributed.owners import owners_of, step_cost
from fgo_geo.distributed.parcels import Parcel, collect_parcels, return_parcels
from fgo_geo.linalg import Cut, cut_of, is_sharded, local_part, processes_of
from fgo_geo.manifolds import ProductOfGroups
from fgo_geo.optim.finite import Measured, divide, largest_of, odd_weights, unit_of
from fgo_geo.optim.requests import StepRequest
from fgo_geo.paths.protocol import Batch, Weight, configuration_of

__all__ = ["WeightExchange", "fingerprint"]


def fingerprint(manifold: geoopt.Manifold) -> bytes:
    """A digest of a manifold: groups, kinds and radii.

    Args:
        manifold: Any manifold.

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
    """A weight on a device mesh: how it is sharded, and who steps it: its owner, or every process its part or copy."""

    param: Tensor
    cut: Cut
    local: LocalPart | None
    owner: int
    whole: Tensor | None
    lent: Weight | None = None  # the same from step to step, as those who step it know it

    def lend(self, weight: Weight, point: Tensor, grad: Tensor | None, buffer: Tensor | None) -> Weight:
        """The weight in the form in which this process steps it."""
        if self.lent is None or self.lent.owner is not weight.owner or self.lent.param is not point:
            self.lent = Weight(point, weight.owner, weight.manifold, grad, name_of=weight.name_of)
            if self.local is not None and self.local.manifold is not None:
                self.lent.manifold, self.lent.share = self.local.manifold, self.local.share
        self.lent.grad, self.lent.buffer, self.lent.first = grad, buffer, weight.first
        return self.lent

    @property
    def has_owner(self) -> bool:
        return self.cut.dim is not None and self.local is None


class WeightExchange:
    """The services of :class:`~fgo_geo.optim.base.Stepper` for sharded weights.

    Args:
        state: The optimiser's state by parameter; its momentum is sharded as the parameter is.
        name_of: Says which parameter one is, for messages.
        param: One of the sharded parameters; all have the same device mesh.
    """

    def __init__(self, state: dict[Tensor, Any], name_of: Callable[[Tensor], str], param: Tensor) -> None:
        self._state = state
        self._name_of = name_of
        self._placed: list[_Placed] = []
        self._configurations: list[Any] = []
        self._digests: list[bytes] = []
        self._number = 0
        self._group: Any = None
        self._groups = processes_of(param)
        self._device = local_part(param).device
        self._lent: list[
            tuple[StepRequest, Weight, Weight | None]
        ] = []  # sharded, and as this process steps it, if it does
        self._slots: dict[Tensor, Tensor] = {}  # of spread weights: where the sums of the groups here are
        self._n_slots = 0
        self._places: weakref.WeakKeyDictionary[Batch, tuple[Tensor, Tensor]] = weakref.WeakKeyDictionary()
        self._local_scales: list[tuple[LocalPart, Tensor, Tensor | None]] = []
        self._all_scales: dict[Tensor, Tensor] | None = {}

    # -- in ----------------------------------------------------------------------------------------------------

    def collect(self, requests: Sequence[StepRequest]) -> list[StepRequest]:
        """The requests for this process: its parts, or the whole weights that it owns, in place of sharded weights.

        Of the whole weights it has those that it owns; what other processes step alone is left out.
        """
        shared = [(own, weight) for own in requests for weight in own.weights if is_sharded(weight.param)]
        error = None
        try:
            self._place([weight for _, weight in shared])
        except Exception as problem:
            error = problem
        self.agree(error, self._number)
        parcels: list[Parcel] = []
        shards: list[Tensor] = []
        targets: list[Tensor | None] = []
        self._lent = []
        for (own, weight), placed in zip(shared, self._placed, strict=True):
            grad: Any = weight.grad
            if grad.placements != weight.param.placements:  # pyright: ignore  of tensor parallelism: sums not taken yet
                grad = grad.redistribute(placements=weight.param.placements)  # pyright: ignore
            mine = [local_part(t) for t in (weight.param, grad, weight.buffer) if t is not None]
            if not placed.has_owner:
                buffer = mine[2] if len(mine) > 2 else None
                lent = placed.lend(weight, mine[0], mine[1], buffer) if mine[0].numel() else None
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
        """Find out how weights are sharded and choose owners, if anything has changed since the last step."""
        self._digests, self._number = (self._digests, self._number) if weights else ([], 0)
        configurations = [(w.manifold, *configuration_of(w.manifold), w.param.dtype) for w in weights]
        same = len(weights) == len(self._placed) and all(
            w.param is placed.param and now[0] is before[0] and now[1] is before[1] and now[2:] == before[2:]
            for w, placed, now, before in zip(weights, self._placed, configurations, self._configurations, strict=True)
        )
        if same:
            return
        self._placed, self._configurations = [], []
        self._slots, self._n_slots = {}, 0
        self._places.clear()
        if not weights:
            return
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
                "the sharded weights of one optimiser are spread over different groups of processes; build one "
                "optimiser for each device mesh"
            )
        self._group = first
        count, rank = (1, 0) if first is None else (dist.get_world_size(first), dist.get_rank(first))
        local_parts = [
            local_part_of(weight.manifold, cut, self._device) for weight, cut in zip(weights, cuts, strict=True)
        ]
        costs, loads = [0.0] * len(weights), [0.0] * count
        for number, (weight, cut, local) in enumerate(zip(weights, cuts, local_parts, strict=True)):
            cost = step_cost(weight.manifold, cut.shape)
            if local is None and cut.dim is not None:
                costs[number] = cost
            elif cut.dim is not None:
                loads = [load + cost * cut.range_of(n)[1] / cut.shape[cut.dim] for n, load in enumerate(loads)]
        owners = owners_of(costs, count, loads)
        for weight, cut, local, owner in zip(weights, cuts, local_parts, owners, strict=True):
            placed = _Placed(weight.param, cut, local, owner, None)
            if placed.has_owner and owner == rank:
                placed.whole = local_part(weight.param).new_empty(cut.shape)
            self._placed.append(placed)
            if local is not None and len(local.spread):
                spread = local.share.groups[local.share.spread]
                self._slots[weight.owner] = torch.searchsorted(local.spread, spread) + self._n_slots
                self._n_slots += len(local.spread)
        self._configurations = configurations
        self._digests = [
            hashlib.sha256(repr((cut.shape, cut.dim, cut.count)).encode() + fingerprint(weight.manifold)).digest()
            for weight, cut in zip(weights, cuts, strict=True)
        ]
        self._number = int.from_bytes(hashlib.sha256(b"".join(self._digests)).digest()[:7], "big")

    # -- agreement -----------------------------------------------------------------------------------------------

    def agree(self, error: Exception | None, number: int = 0) -> None:
        """Raise on all processes if one of them has an error, or their manifolds differ.

        Args:
            error: What this process would raise; None if nothing.
            number: A digest of its manifolds, where they are compared.

        Raises:
            Exception: The error, or one of the same type with the message of the process that has it.
            ValueError: If the manifolds differ.
        """
        flags = torch.tensor([int(error is not None), number, -number], device=self._device)
        for group in self._groups:
            dist.all_reduce(flags, dist.ReduceOp.MAX, group)
        failed, largest, smallest = flags.tolist()
        if failed:
            reports = self._from_all(None if error is None else (type(error).__name__, str(error), dist.get_rank()))
            if error is not None:
                raise error
            name, text, rank = next(report for report in reports if report is not None)
            own = getattr(builtins, name, RuntimeError)
            raise (own if issubclass(own, Exception) else RuntimeError)(f"{text} (on process {rank})")
        if largest != -smallest:
            digests = self._from_all(self._digests)
            number = next(
                (n for n, own in enumerate(self._digests) if any(other[n : n + 1] != [own] for other in digests)), 0
            )
            name = self._name_of(self._placed[number].param) if self._placed else "weights"
            self._placed = []
            raise ValueError(
                f"the manifolds differ between processes, first for {name}: the processes have different groups, kinds "
                "or radii, or different weights have gradients; no weight on a manifold was changed. Call "
                "fgo_geo.constrain with the same arguments and seed on all processes"
            )

    def _from_all(self, report: Any) -> list[Any]:
        """The reports of all processes, on all of them."""
        reports: list[Any] = [report]
        for group in self._groups:
            gathered: list[Any] = [None] * dist.get_world_size(group)
            dist.all_gather_object(gathered, reports, group)
            reports = [report for part in gathered for report in part]
        return reports

    # -- norms of groups that several processes have components of -------------------------------------------------

    def add_up(self, measured: Sequence[Measured], error: Exception | None) -> Exception | None:
        """Sum ``R²`` of groups whose components several processes have.

        If a gradient cannot be squared on one process, all processes divide it by the same power of two and measure
        again. A process with an error keeps it until the next sum, which informs the others, so that none of them
        waits.

        Args:
            measured: All batches of the step; their ``R²`` are those of all components afterwards.
            error: What has kept this process from measuring.

        Returns:
            What the processes have yet to agree on: an error of this one after the last sum, or ``error``.

        Raises:
            Exception: On all processes, as :meth:`agree` does, if one of them has an error before that.
        """
        if not self._slots:
            return error
        errors = [] if error is None else [error]
        error, odd = None, set[Tensor]()
        with _kept(errors):
            spread = [own for own in measured if any(weight.is_spread for weight in own.batch.weights)]
            readable = [own for own in spread if own.is_free or own.check_finite]
            odd.update(weight.owner for weight in odd_weights(readable) if weight.is_spread)
        is_odd, sums = self._sums(measured, odd, errors)
        if any(is_odd):
            units = self._common_units([owner for owner, flag in zip(self._slots, is_odd, strict=True) if flag], errors)
            with _kept(errors):
                divide(measured, units)
            _, sums = self._sums(measured, odd, errors)
        with _kept(errors):
            for own in measured:
                places, slots = self._places_of(own.batch)
                if len(places):
                    own.squared = own.squared.index_copy(0, places, sums[slots].to(own.squared.device))
        return errors.pop() if errors else None

    def _sums(
        self, measured: Sequence[Measured], odd: set[Tensor], errors: list[Exception]
    ) -> tuple[list[float], Tensor]:
        """For every spread weight the number of processes that call it odd, and ``R²`` of all spread groups."""
        sums = torch.zeros(self._n_slots, dtype=torch.float64, device=self._device)
        with _kept(errors):
            for own in [] if errors else measured:
                places, slots = self._places_of(own.batch)
                sums.index_add_(0, slots, own.squared[places].to(sums))
        flags = torch.tensor([bool(errors), *(owner in odd for owner in self._slots)], dtype=torch.float64)
        total = torch.cat([flags.to(self._device), sums])
        dist.all_reduce(total, dist.ReduceOp.SUM, self._group)
        failed, *is_odd = total[: len(flags)].tolist()
        if failed:
            self.agree(errors.pop() if errors else None)
        return is_odd, total[len(flags) :]

    def _places_of(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The places of spread groups in the measurements of a batch, and in the sums."""
        if batch not in self._places:
            places, slots, first = [torch.empty(0, dtype=torch.int64)], [torch.empty(0, dtype=torch.int64)], 0
            for weight, count in zip(batch.weights, batch.counts, strict=True):
                if weight.share is not None and weight.is_spread:
                    places.append(weight.share.spread.cpu() + first)
                    slots.append(self._slots[weight.owner].cpu())
                first += count
            found = torch.cat(places), torch.cat(slots)
            if batch.owned is not None:  # another path has the rest of a weight
                is_own = batch.owned.cpu()[found[0]]
                found = found[0][is_own], found[1][is_own]
            self._places[batch] = found[0].to(batch.device), found[1].to(self._device)
        return self._places[batch]

    def _common_units(self, owners: Sequence[Tensor], errors: list[Exception]) -> dict[Weight, float]:
        """The power of two by which all processes divide the gradient of a weight."""
        lent = {weight.owner: weight for _, _, weight in self._lent if weight is not None}
        here = [0.0] * len(owners)
        with _kept(errors):
            here = [largest_of(lent[owner]) if owner in lent else 0.0 for owner in owners]
        largest = torch.tensor(here, dtype=torch.float64, device=self._device)
        dist.all_reduce(largest, dist.ReduceOp.MAX, self._group)
        units: dict[Weight, float] = {}
        with _kept(errors):
            found = zip(owners, map(unit_of, largest.tolist()), strict=True)
            units.update({lent[owner]: unit for owner, unit in found if owner in lent})
        return units

    def _summed(self, numbers: Sequence[tuple[LocalPart, Tensor | None]]) -> list[Tensor]:
        """Numbers of all groups of weights, from the numbers that every process has of its own, by one all-reduce."""
        wholes: list[Tensor] = []
        for local, own in numbers:
            share = local.share
            whole = torch.zeros(share.n_groups, dtype=torch.float64, device=self._device)
            if own is not None:
                whole[share.groups[share.is_counted]] = own[share.is_counted].to(whole)
            wholes.append(whole)
        if not wholes:
            return []
        packed = torch.cat(wholes)
        dist.all_reduce(packed, dist.ReduceOp.SUM, self._group)
        return list(packed.split([len(whole) for whole in wholes]))

    def scales(self) -> dict[Tensor, Tensor]:
        """``τ`` of the weights of which every process steps a share; all processes must call this."""
        if self._all_scales is None:
            summed = self._summed([(local, own) for local, _, own in self._local_scales])
            owners = [owner for _, owner, _ in self._local_scales]
            types = [torch.promote_types(owner.dtype, torch.float32) for owner in owners]
            self._all_scales = {o: tau.to(dtype) for o, tau, dtype in zip(owners, summed, types, strict=True)}
            self._local_scales = []
        return self._all_scales

    # -- out -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def put_back(self, scales: dict[Tensor, Tensor]) -> dict[Tensor, Tensor]:
        """Return whole weights to their shards; give all processes the ``τ`` of these weights, and return them."""
        parcels: list[Parcel] = []
        wholes: list[Tensor | None] = []
        targets: list[Tensor] = []
        received: dict[Tensor, Tensor] = {}
        local_scales: list[tuple[LocalPart, Tensor, Tensor | None]] = []
        running: list[tuple[LocalPart, Tensor, Tensor | None]] = []

        def send(cut: Cut, owner: int, value: Tensor | None, target: Tensor) -> None:
            parcels.append(Parcel(cut, owner, target.dtype))
            wholes.append(value)
            targets.append(target)

        for (own, weight, lent), placed in zip(self._lent, self._placed, strict=True):
            owner, cut = weight.owner, placed.cut
            if own.options.keeps_buffer and weight.buffer is None:
                weight.buffer = self._state[owner]["momentum_buffer"] = torch.zeros_like(weight.param.detach())
                if not placed.has_owner and lent is not None and lent.buffer is not None:
                    local_part(weight.buffer).copy_(lent.buffer)
            if placed.local is not None:
                local_scales.append((placed.local, owner, scales.get(owner)))
                if own.running:
                    mean = self._state[owner].get("norm_squared")
                    mean = None if mean is None else mean.to(self._device)[placed.local.share.groups]
                    running.append((placed.local, owner, mean))
            if not placed.has_owner:
                continue
            send(cut, placed.owner, placed.whole, local_part(weight.param))
            if own.options.keeps_buffer and weight.buffer is not None:
                send(cut, placed.owner, None if lent is None else lent.buffer, local_part(weight.buffer))
            everyone = Cut((weight.n_groups,), None, cut.count, cut.rank)
            number_type = torch.promote_types(owner.dtype, torch.float32)
            received[owner] = torch.ones(everyone.shape, dtype=number_type, device=self._device)
            send(everyone, placed.owner, None if lent is None else scales[owner], received[owner])
            if own.running:
                value = None if lent is None else self._state[owner].get("norm_squared")
                mean = torch.zeros(everyone.shape, dtype=number_type, device=self._device)
                self._state[owner]["norm_squared"] = mean
                send(everyone, placed.owner, value, mean)
        if parcels:
            return_parcels(parcels, wholes, targets, self._group)
        means = self._summed([(local, mean) for local, _, mean in running])
        for (_, owner, _), mean in zip(running, means, strict=True):
            self._state[owner]["norm_squared"] = mean.to(torch.promote_types(owner.dtype, torch.float32))
        for placed in self._placed:
            if placed.whole is not None:
                _free(placed.whole)
        self._lent, self._local_scales = [], local_scales
        self._all_scales = None if local_scales else {}
        return received


@contextlib.contextmanager
def _kept(errors: list[Exception]) -> Generator[None]:
    """Keep an error for later, because other processes wait in the next collective."""
    try:
        yield
    except Exception as error:
        errors.append(error)


def _allocate(tensor: Tensor) -> None:
    """Allocate the memory of a tensor again; paths rely on the same tensor object in every step."""
    tensor.untyped_storage().resize_(tensor.numel() * tensor.itemsize)


def _free(tensor: Tensor) -> None:
    """Free the memory of a tensor until the next step."""
    tensor.untyped_storage().resize_(0)
