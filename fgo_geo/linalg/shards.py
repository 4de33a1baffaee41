"""Tensors that are sharded over several processes: the local part, and the whole tensor.

A sharded tensor is a ``torch.distributed.tensor.DTensor``, as FSDP2 and tensor parallelism make them. Along one
dimension of its device mesh it is cut as ``torch.chunk`` cuts, along all others every process has a copy; that is
what a :class:`Cut` describes.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["Cut", "cut_of", "is_sharded", "local_part", "processes_of", "whole", "write_whole"]


def is_sharded(tensor: object) -> bool:
    """Whether a tensor is a DTensor; without importing what DTensors need.

    Example:
        >>> is_sharded(torch.ones(2))
        False
    """
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


@dataclass(frozen=True)
class Cut:
    """How a tensor is divided among the processes of a group.

    Attributes:
        shape: Its shape.
        dim: The dimension that is cut; None if every process has all of it.
        count: How many processes share it.
        rank: The number of this process among them.

    Example:
        >>> cut = Cut((5, 3), 0, 4, 0)  # in runs of two rows, of which the last process gets none
        >>> [cut.shape_of(rank) for rank in range(4)]
        [(2, 3), (2, 3), (1, 3), (0, 3)]
        >>> cut.piece(torch.arange(15).reshape(5, 3), 2)
        tensor([[12, 13, 14]])
    """

    shape: tuple[int, ...]
    dim: int | None
    count: int
    rank: int

    def range_of(self, rank: int) -> tuple[int, int]:
        """First index and number of indices of a process along the dimension that is cut."""
        if self.dim is None:
            raise ValueError("this tensor is not sharded")
        length = self.shape[self.dim]
        run = -(-length // self.count)
        first = min(rank * run, length)
        return first, min(run, length - first)

    def shape_of(self, rank: int) -> tuple[int, ...]:
        """The shape of the part of a process."""
        if self.dim is None:
            return self.shape
        return (*self.shape[: self.dim], self.range_of(rank)[1], *self.shape[self.dim + 1 :])

    def piece(self, tensor: Tensor, rank: int) -> Tensor:
        """The part of a process in a whole tensor; a view."""
        return tensor if self.dim is None else tensor.narrow(self.dim, *self.range_of(rank))


def cut_of(tensor: Tensor) -> tuple[Cut, Any]:
    """How a sharded tensor is cut, and the process group of those who share it (None if nobody does).

    Args:
        tensor: A sharded tensor.

    Raises:
        ValueError: If it is cut along several dimensions of its device mesh, in runs that alternate, or is a sum that
            has not been taken.
    """
    from torch.distributed.tensor import Replicate, Shard

    sharded: Any = tensor
    mesh, placements = sharded.device_mesh, sharded.placements
    cuts = [number for number, placement in enumerate(placements) if type(placement) is Shard]
    others = [placement for placement in placements if type(placement) not in (Shard, Replicate)]
    if others or len(cuts) > 1:
        raise ValueError(
            f"placements {placements} on a device mesh of shape {tuple(mesh.shape)}, expected one Shard, and Replicate "
            "along all other dimensions"
        )
    shape = tuple(tensor.shape)
    if not cuts:
        return Cut(shape, None, 1, 0), None
    dim = placements[cuts[0]].dim
    cut = Cut(shape, dim % len(shape), mesh.size(cuts[0]), mesh.get_local_rank(cuts[0]))
    return cut, mesh.get_group(cuts[0])


@torch.no_grad()
def local_part(tensor: Any) -> Tensor:
    """What this process has of a sharded tensor, not a copy and always the same object."""
    return tensor.to_local()


def whole(tensor: Any) -> Tensor:
    """All of a sharded tensor, as a new tensor on every process, which all have to call this; any other tensor itself.

    Example:
        >>> t = torch.ones(2)
        >>> whole(t) is t
        True
    """
    return tensor.detach().full_tensor() if is_sharded(tensor) else tensor


@torch.no_grad()
def write_whole(tensor: Tensor, value: Tensor) -> None:
    """Write a value that every process has into a tensor, sharded or not, in place.

    Args:
        tensor: Where to write.
        value: The whole value, of the same shape.

    Raises:
        ValueError: As :func:`cut_of`.
    """
    if not is_sharded(tensor):
        tensor.copy_(value)
        return
    cut, _ = cut_of(tensor)
    local_part(tensor).copy_(cut.piece(value, cut.rank))


def processes_of(tensor: Any) -> list[dist.ProcessGroup]:
    """The process groups of a sharded tensor's device mesh, one for each of its dimensions."""
    mesh = tensor.device_mesh
    return [mesh.get_group(number) for number in range(mesh.ndim)]
