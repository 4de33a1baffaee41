"""Kernels as components, stored so that each entry is one contiguous vector over all kernels."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fgo_geo.weights.grouping import Collection
from fgo_geo.weights.layout import WeightLayout
from fgo_geo.weights.parts import Partition, Segments, sorted_rows

__all__ = ["KernelPartition"]


class KernelPartition(Partition):
    """Every kernel ``W[d, c]`` is a component, ``kh x kw`` (transposed if wide; three dimensions as ``kd kh x kw``).

    The components of a part are in the order of the weight's kernels, so that gathering them reads memory sequentially.
    The partition stores two 32-bit indices per kernel, and a label where groups are not consecutive.

    The components are a structure of arrays: each entry is one contiguous vector over all kernels (see
    :mod:`fgo_geo.linalg.products`).
    """

    order: Tensor | None
    inverse: Tensor | None

    def __init__(self, collection: Collection, layout: WeightLayout) -> None:
        kind_of_group = collection.group_kinds
        kinds = np.unique(kind_of_group)
        groups = tuple(np.flatnonzero(kind_of_group == kind) for kind in kinds)
        order = np.argsort(collection.kind_of.ravel(), kind="stable").astype(np.int32)
        position = np.empty(len(kind_of_group), np.int32)  # of a group among those of its kind
        for numbers in groups:
            position[numbers] = np.arange(len(numbers))
        ends = np.cumsum([collection.group_sizes[numbers].sum() for numbers in groups])[:-1]
        labels = np.split(position[collection.group_of.ravel()[order]], ends)
        segments = [Segments.labelled(own, len(numbers)) for own, numbers in zip(labels, groups, strict=True)]
        super().__init__(layout, [collection.group_sizes[numbers] for numbers in groups], segments)
        self.groups = groups
        self.kinds = tuple(collection.kinds[kind] for kind in kinds)
        *first, last = layout.kernel
        rows, columns = (math.prod(first), last) if first else (last, 1)
        self._matrix = (rows, columns)
        self._wide = rows < columns
        self.sizes = ((max(rows, columns), min(rows, columns)),) * len(kinds)
        in_order = bool((order[:-1] < order[1:]).all())
        inverse = np.empty_like(order)
        inverse[order] = np.arange(len(order), dtype=order.dtype)
        self.register_buffer("order", None if in_order else torch.from_numpy(order), persistent=False)
        self.register_buffer("inverse", None if in_order else torch.from_numpy(inverse), persistent=False)

    def split(self, weight: Tensor) -> list[Tensor]:
        """The kernels of every kind, in their order."""
        planes = _planes(self.layout.channels(weight).flatten(2))
        return self.parts_of(_stored(_sorted_planes(planes, self.order)))

    def merge(self, parts: Sequence[Tensor], like: Tensor | None = None) -> Tensor:
        """Inverse of :meth:`split`."""
        layout = self.layout
        parts = [(part.mT if self._wide else part).flatten(1) for part in parts]
        if like is not None and _channels_last(layout.channels(like).flatten(2)):
            planes = _sorted_planes(_joined_planes([part.mT for part in parts]), self.inverse)
            channels = planes.unflatten(1, (layout.out_channels, layout.in_channels)).permute(1, 2, 0)
        else:
            kernels = sorted_rows(_rows(parts), self.inverse)
            channels = kernels.unflatten(0, (layout.out_channels, layout.in_channels))
        return layout.weight(channels.unflatten(2, layout.kernel))

    def put_(self, parts: Sequence[Tensor], weight: Tensor) -> None:
        """Write ``merge(parts)`` into a weight; it sorts kernels into the memory of the weight if necessary."""
        if torch.compiler.is_compiling() or not self.takes_planes(weight, parts[0].dtype):
            super().put_(parts, weight)
            return
        self.put_planes_(_joined_planes([(part.mT if self._wide else part).flatten(1).mT for part in parts]), weight)

    # Planes are the components of all parts stored entry by entry, shape (K, n).

    def parts_of(self, planes: Tensor) -> list[Tensor]:
        """The components of every part as views of planes, shape ``(n, A, B)``."""
        kernels = planes.unflatten(0, self._matrix)
        kernels = kernels.permute(2, 1, 0) if self._wide else kernels.permute(2, 0, 1)
        return list(kernels.split(list(self.counts)))

    def take_planes(self, weight: Tensor, memory: Tensor, out: Tensor) -> None:
        """Split a weight into planes ``(K, n)`` of its type, by way of memory for temporaries of their shape."""
        channels = self.layout.channels(weight).flatten(2)
        planes = out if self.inverse is None else memory
        if _channels_last(channels):
            planes.unflatten(1, channels.shape[:2]).copy_(channels.permute(2, 0, 1))
        elif self.inverse is None:
            planes[None].copy_(channels.flatten(0, 1).mT[None])
        else:
            planes = channels.flatten(0, 1).mT
        if self.inverse is not None:
            out.scatter_(1, self.inverse.to(out.device, torch.int64).expand(len(out), -1), planes)

    def takes_planes(self, weight: Tensor, dtype: torch.dtype) -> bool:
        """Whether planes of a type can be written into a weight with its strides."""
        is_dense = weight.is_contiguous() or weight.movedim(1, -1).is_contiguous()
        return is_dense and self.layout.storage == "conv" and dtype == weight.dtype

    def put_planes_(self, planes: Tensor, weight: Tensor, memory: Tensor | None = None) -> None:
        """Write planes into a weight that :meth:`takes_planes`; ``memory`` is for temporaries, of their size."""
        position = None if self.inverse is None else self.inverse.to(planes.device, torch.int64)
        channels = weight.flatten(2)
        if weight.is_contiguous():
            kernels = channels.flatten(0, 1)
            memory = torch.empty_like(kernels) if memory is None else memory.view(kernels.shape)
            rows = kernels if position is None else memory
            torch.stack(planes.unbind(), 1, out=rows)  # several times as fast as copying the transposed matrix
            if position is not None:
                torch.index_select(rows, 0, position, out=kernels)
            return
        target = channels.permute(2, 0, 1)
        if position is None:
            target.copy_(planes.unflatten(1, target.shape[1:]))
        else:
            index = position.unflatten(0, target.shape[1:]).expand_as(target)
            torch.gather(planes.unsqueeze(1).expand(-1, len(weight), -1), 2, index, out=target)

    def entries(self, part: int, chosen: Tensor) -> Tensor:
        """Where the entries of some kernels of a part are."""
        kernels = chosen + sum(self.counts[:part])
        if self.order is not None:
            kernels = self.order.cpu()[kernels].long()
        rows, columns = self._matrix
        places = (kernels[:, None] * (rows * columns) + torch.arange(rows * columns)).unflatten(1, self._matrix)
        return places.mT if self._wide else places

    def per_component(self, values: np.ndarray) -> list[np.ndarray]:
        """Numbers per group ``(G,)``, or per kernel ``(D, C)``, in the order of the components of every part."""
        if values.ndim == 1:
            return super().per_component(values)
        kernels = values.ravel()
        if self.order is not None:
            kernels = kernels[self.order.cpu().numpy()]
        return np.split(kernels, np.cumsum(self.counts)[:-1])


def _channels_last(channels: Tensor) -> bool:
    """Whether the input channels of ``(D, C, K)`` run faster in memory than the entries of a kernel."""
    return channels.stride(1) < channels.stride(2)


def _sorted_planes(planes: Tensor, order: Tensor | None) -> Tensor:
    """Kernels ``(n, K)``, stored as ``(K, n)``, in the given order."""
    if order is None:
        return planes
    index = order.to(planes.device, torch.int64)
    return planes.gather(1, index.expand(len(planes), -1))


_MANY = 2**16  # entries, for more than one core to be of use

# torch.compile writes its own loops. Torch copies a batch of one narrow matrix in a fraction of the time that it takes
# to turn over the matrix alone, and joins on one core only.


def _planes(channels: Tensor) -> Tensor:
    """Kernels ``(D, C, K)`` stored as ``(K, n)``."""
    if _channels_last(channels):
        return channels.permute(2, 0, 1).flatten(1)
    kernels = channels.flatten(0, 1)
    return kernels.mT if torch.compiler.is_compiling() else kernels.mT[None].contiguous()[0]


def _stored(planes: Tensor) -> Tensor:
    """The same, materialised: as_strided keeps torch.compile from gathering again at every use of the result."""
    if torch.compiler.is_compiling():
        planes = planes.contiguous()
        return planes.as_strided(planes.shape, (planes.shape[1], 1))
    return planes


def _rows(parts: Sequence[Tensor]) -> Tensor:
    """The concatenation of kernels ``(n, K)``, stored kernel by kernel."""
    if torch.compiler.is_compiling() or all(part.is_contiguous() for part in parts):
        return torch.cat(list(parts))
    rows = parts[0].new_empty(1, sum(map(len, parts)), parts[0].shape[1])
    return _fill(rows, [part[None] for part in parts])[0]


def _joined_planes(parts: Sequence[Tensor]) -> Tensor:
    """The concatenation of kernels, given and stored as ``(K, n)``."""
    total = sum(part.shape[1] for part in parts)
    if torch.compiler.is_compiling() or len(parts[0]) * total <= _MANY:
        return torch.cat(list(parts), 1)
    return _fill(parts[0].new_empty(len(parts[0]), total), parts)


def _fill(joined: Tensor, parts: Sequence[Tensor]) -> Tensor:
    """Write the concatenation of parts along the second dimension."""
    start = 0
    for part in parts:
        joined.narrow(1, start, part.shape[1]).copy_(part)
        start += part.shape[1]
    return joined
