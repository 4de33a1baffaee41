"""Parcels: tensors that are whole at their owners and in shards elsewhere, and the two all-to-alls that carry them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fgo_geo.linalg import Cut

__all__ = ["Parcel", "collect_parcels", "return_parcels"]


@dataclass(frozen=True)
class Parcel:
    """A tensor that is whole at its owner and in shards elsewhere.

    Attributes:
        cut: How it is sharded.
        owner: The process that has it whole, by its number in the group.
        dtype: Its type.
    """

    cut: Cut
    owner: int
    dtype: torch.dtype


def collect_parcels(
    parcels: Sequence[Parcel], shards: Sequence[Tensor], targets: Sequence[Tensor | None], group: Any
) -> None:
    """Send the shards of this process to the owners, and receive whole weights to own, by one all-to-all per type."""
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
    """Send every process its shards of the owners' whole tensors; the inverse of :func:`collect_parcels`."""
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
