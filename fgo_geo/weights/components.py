r"""From weights to components and back: the only place that knows how layers store their weights.

Three views of a weight follow each other, all of them without arithmetic:

1. *channels*: :class:`WeightLayout` brings the weight of a convolution, a transposed or grouped convolution, a linear
   layer or a packed attention projection into the form ``(D, C, *kernel)``, output channels first;
2. *components*: :class:`Partition` cuts the channels into matrices ``A x B`` with ``A >= B``, batched over all
   components of one manifold kind: single kernels (:class:`KernelPartition`) or rectangular blocks of the matrix
   ``(D, C K)`` with ``K`` the number of entries of a kernel (:class:`BlockPartition`);
3. *groups*: :class:`Segments` says which components share a step size, and reduces over them.

:func:`layout_of` reads the layout off a module, or gives the reason why its parameter has none.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from fgo_geo.weights.grouping import Collection

__all__ = [
    "CONVOLUTIONS",
    "BlockPartition",
    "KernelPartition",
    "Partition",
    "Segments",
    "Storage",
    "WeightLayout",
    "layout_of",
    "partition",
]

Storage = Literal["conv", "transposed"]
_Shares = tuple[tuple[str, int, int], ...]  # manifold kind, rows and columns of every group of a section
_PartKey = tuple[str, int, int, _Shares]


@dataclass(frozen=True)
class WeightLayout:
    """How a weight stores output channels, input channels and the kernel.

    Attributes:
        shape: The weight's shape.
        storage: ``"conv"`` for ``(D, C, *kernel)`` (linear layers have no kernel), ``"transposed"`` for the
            ``(groups C, D / groups, *kernel)`` of transposed convolutions.
        conv_groups: Groups of a grouped convolution; ``C`` counts the input channels of one of them.
        sections: Equal runs of output channels that are separate layers: 3 for packed attention projections, the
            number of convolution groups for a 1x1 convolution.
    """

    shape: tuple[int, ...]
    storage: Storage = "conv"
    conv_groups: int = 1
    sections: int = 1

    @property
    def kernel(self) -> tuple[int, ...]:
        """Spatial size of the kernel; empty for linear layers."""
        return self.shape[2:]

    @property
    def out_channels(self) -> int:
        """Number of output channels ``D``."""
        return self.shape[0] if self.storage == "conv" else self.shape[1] * self.conv_groups

    @property
    def in_channels(self) -> int:
        """Number of input channels ``C`` that one output channel sees."""
        return self.shape[1] if self.storage == "conv" else self.shape[0] // self.conv_groups

    @property
    def fan_in(self) -> int:
        """Number of inputs that one output value sums over."""
        return self.in_channels * math.prod(self.kernel)

    def channels(self, weight: Tensor) -> Tensor:
        """The weight as ``(D, C, *kernel)``: a view, except for grouped transposed convolutions."""
        if self.storage == "conv":
            return weight
        grouped = weight.unflatten(0, (self.conv_groups, -1)).transpose(1, 2)
        return grouped.flatten(0, 1)

    def weight(self, channels: Tensor) -> Tensor:
        """Inverse of :meth:`channels`."""
        if self.storage == "conv":
            return channels
        grouped = channels.unflatten(0, (self.conv_groups, -1)).transpose(1, 2)
        return grouped.flatten(0, 1)


@dataclass(frozen=True)
class Segments:
    """Which of ``n`` components belong to which of ``G`` groups.

    Attributes:
        count: Number of groups ``G``.
        total: Number of components ``n``.
        labels: The group of every component, shape ``(n,)``; None if the groups are runs of equally many, one behind
            the other.

    Example:
        >>> segments = Segments.of([2, 1])
        >>> segments.sum(torch.tensor([1.0, 2.0, 5.0]))
        tensor([3., 5.])
        >>> segments.spread(torch.tensor([7.0, 9.0]))
        tensor([7., 7., 9.])
    """

    count: int
    total: int
    labels: Tensor | None = None

    @classmethod
    def of(cls, sizes: Sequence[int]) -> Segments:
        """Runs of the given sizes, all at least one."""
        return cls.labelled(np.repeat(np.arange(len(sizes)), sizes), len(sizes))

    @classmethod
    def labelled(cls, labels: np.ndarray, count: int) -> Segments:
        """Segments of components with the given labels, in any order; every one of the numbers below ``count`` occurs.

        Example:
            >>> Segments.labelled(np.array([1, 0, 1]), 2).sum(torch.tensor([1.0, 2.0, 5.0]))
            tensor([2., 6.])
        """
        run, rest = divmod(len(labels), count)
        if rest == 0 and bool((labels == np.repeat(np.arange(count), run)).all()):
            return cls(count, len(labels))
        return cls(count, len(labels), torch.from_numpy(labels.astype(np.int32)))

    @classmethod
    def joined(cls, parts: Sequence[Segments], device: torch.device) -> Segments:
        """Segments one behind the other, on the device of the components."""
        count, total = sum(part.count for part in parts), sum(part.total for part in parts)
        first = parts[0]
        if all(p.labels is None and p.total * first.count == first.total * p.count for p in parts):
            return cls(count, total)
        labels: list[Tensor] = []
        before = 0
        for part in parts:
            labels.append(part._labels_on(device) + before)
            before += part.count
        return cls(count, total, torch.cat(labels))

    def _labels_on(self, device: torch.device) -> Tensor:
        if self.labels is not None:
            return self.labels.to(device)
        return self.spread(torch.arange(self.count, dtype=torch.int32, device=device))

    @property
    def are_components(self) -> bool:
        """Whether every component is a group, with its own number."""
        return self.labels is None and self.count == self.total

    def sum(self, values: Tensor) -> Tensor:
        """Sums over the groups: ``(n,)`` to ``(G,)``."""
        if self.are_components:
            return values
        if self.labels is None:
            return values.reshape(self.count, -1).sum(1)
        return values.new_zeros(self.count).index_add(0, self._labels_on(values.device), values)

    def max(self, values: Tensor) -> Tensor:
        """Maxima over the groups: ``(n,)`` to ``(G,)``."""
        if self.are_components:
            return values
        if self.labels is None:
            return values.reshape(self.count, -1).amax(1)
        labels = self._labels_on(values.device).long()
        return values.new_zeros(self.count).scatter_reduce(0, labels, values, "amax", include_self=False)

    def spread(self, values: Tensor) -> Tensor:
        """One value per group, repeated for its components: ``(G,)`` to ``(n,)``."""
        if self.are_components:
            return values
        if self.labels is None:
            return values.unsqueeze(1).expand(-1, self.total // self.count).reshape(-1)
        return values.index_select(0, self._labels_on(values.device))


class Partition(nn.Module, abc.ABC):
    """Cuts a weight into batches of components, one batch (a *part*) per manifold kind or block shape.

    ``merge(split(w))`` is ``w``, exactly, and every entry of the weight belongs to exactly one component.

    Attributes:
        kinds: Manifold kind of every part.
        groups: For every part the numbers of its groups in the collection, in the order of its segments' labels.
        group_sizes: Number of components of every part's groups.
        counts: Number of every part's components.
        sizes: ``(A, B)`` of every part's components.
    """

    kinds: tuple[str, ...]
    groups: tuple[np.ndarray, ...]
    group_sizes: tuple[np.ndarray, ...]
    counts: tuple[int, ...]
    sizes: tuple[tuple[int, int], ...]

    def __init__(self, layout: WeightLayout, group_sizes: Sequence[np.ndarray], segments: Sequence[Segments]) -> None:
        super().__init__()
        self.layout = layout
        self.group_sizes = tuple(group_sizes)
        self.counts = tuple(s.total for s in segments)
        self._group_counts = tuple(s.count for s in segments)
        for part, s in enumerate(segments):
            self.register_buffer(f"labels{part}", s.labels, persistent=False)

    @property
    def segments(self) -> list[Segments]:
        """Groups of every part."""
        totals = zip(self._group_counts, self.counts, strict=True)
        return [Segments(*total, getattr(self, f"labels{part}")) for part, total in enumerate(totals)]

    @abc.abstractmethod
    def split(self, weight: Tensor) -> list[Tensor]:
        """The components of every part, shape ``(n, A, B)`` each with ``A >= B``."""

    @abc.abstractmethod
    def merge(self, parts: Sequence[Tensor], like: Tensor | None = None) -> Tensor:
        """Inverse of :meth:`split`.

        Args:
            parts: The components of every part.
            like: A weight whose order of dimensions in memory the result takes as far as that is cheap.

        Returns:
            The weight.
        """

    def put_(self, parts: Sequence[Tensor], weight: Tensor) -> None:
        """Write ``merge(parts)`` into a weight.

        Args:
            parts: The components of every part.
            weight: Where to.
        """
        weight.copy_(self.merge(parts, weight))

    @abc.abstractmethod
    def per_component(self, values: np.ndarray) -> list[np.ndarray]:
        """Numbers per group ``(G,)``, or per kernel ``(D, C)``, in the order of the components of every part."""


def partition(collections: Sequence[Collection], layout: WeightLayout) -> Partition:
    """The partition that realises collections on a weight.

    Args:
        collections: One per section of the layout; several are all of blocks.
        layout: How the weight is stored.

    Returns:
        A partition into kernels or blocks.

    Raises:
        ValueError: If the collections do not fit the layout.

    Example:
        >>> from fgo_geo.weights.grouping import collection
        >>> cut = partition([collection(2, 3, "layer", "sphere")], WeightLayout((2, 3, 1, 5)))
        >>> [tuple(part.shape) for part in cut.split(torch.zeros(2, 3, 1, 5))]
        [(6, 5, 1)]
    """
    if len(collections) != layout.sections:
        raise ValueError(
            f"a weight of shape {layout.shape} with {layout.sections} section(s) needs one collection per section, got "
            f"{len(collections)}"
        )
    rows = layout.out_channels // layout.sections
    for c in collections:
        if (c.out_channels, c.in_channels) != (rows, layout.in_channels):
            raise ValueError(
                f"a collection over {c.in_channels} -> {c.out_channels} channels does not fit a weight of shape "
                f"{layout.shape}, which has {layout.in_channels} -> {rows}; build it with "
                f"collection({rows}, {layout.in_channels}, ...)"
            )
    if all(c.components == "block" for c in collections):
        return BlockPartition(collections, layout)
    if math.prod(layout.kernel) == 1 or len(collections) > 1:
        raise ValueError(
            f"the kernels of a weight of shape {layout.shape} are single numbers, which could not move on a manifold; "
            'build every collection with components="block"'
        )
    return KernelPartition(collections[0], layout)


class KernelPartition(Partition):
    """Every kernel ``W[d, c]`` is a component, ``kh x kw`` (transposed if wide; three dimensions as ``kd kh x kw``).

    The components of a part are in the order of the weight's kernels, so that gathering them reads memory once, from
    front to back. Costs one 32-bit index per kernel, another for the way back, and a label where groups are no runs.

    In memory the components are a structure of arrays: the kernel number runs fastest, so that one entry of all kernels
    is one long vector (see :func:`fgo_geo.linalg.small_product`).
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
            kernels = _sorted_rows(_rows(parts), self.inverse)
            channels = kernels.unflatten(0, (layout.out_channels, layout.in_channels))
        return layout.weight(channels.unflatten(2, layout.kernel))

    def put_(self, parts: Sequence[Tensor], weight: Tensor) -> None:
        """Write ``merge(parts)`` into a weight; kernels that have to be sorted are sorted into its memory, at once."""
        if torch.compiler.is_compiling() or not self.puts_planes(weight) or parts[0].dtype != weight.dtype:
            super().put_(parts, weight)
            return
        planes = _joined_planes([(part.mT if self._wide else part).flatten(1).mT for part in parts])
        self.put_planes_(planes, self.places(planes.device), planes.new_empty(planes.shape), weight)

    # -- in memory that is given -----------------------------------------------------------------------------

    def places(self, device: torch.device) -> Tensor | None:
        """Where among the components every kernel of the weight is, in its order; None if that is theirs."""
        return None if self.inverse is None else self.inverse.to(device, torch.int64)

    def take(self, weight: Tensor, places: Tensor | None, memory: Tensor, out: Tensor) -> None:
        """Split a weight into given memory.

        Args:
            weight: The weight, in the precision of the memory.
            places: Those of :meth:`places`.
            memory: For temporaries, shape ``(K, n)``.
            out: Where to put the kernels of all parts, entry by entry, shape ``(K, n)``; see :meth:`parts_of`.
        """
        channels = self.layout.channels(weight).flatten(2)
        if _channels_last(channels):
            kernels = out if places is None else memory
            kernels.unflatten(1, channels.shape[:2]).copy_(channels.permute(2, 0, 1))
        else:
            kernels = channels.flatten(0, 1).mT
            if places is None:
                out[None].copy_(kernels[None])
        if places is not None:
            out.scatter_(1, places.expand(len(out), -1), kernels)

    def parts_of(self, planes: Tensor) -> list[Tensor]:
        """The components of every part, given entry by entry and stored so: views of shape ``(n, A, B)``."""
        kernels = planes.unflatten(0, self._matrix)
        kernels = kernels.permute(2, 1, 0) if self._wide else kernels.permute(2, 0, 1)
        return list(kernels.split(list(self.counts)))

    def put_planes_(self, planes: Tensor, places: Tensor | None, memory: Tensor, weight: Tensor) -> None:
        """Inverse of :meth:`take`, for a weight that :meth:`puts_planes`."""
        channels = weight.flatten(2)
        if not weight.is_contiguous():
            target = channels.permute(2, 0, 1)
            if places is None:
                target.copy_(planes.unflatten(1, target.shape[1:]))
            else:
                index = places.unflatten(0, target.shape[1:]).expand_as(target)
                torch.gather(planes.unsqueeze(1).expand(-1, len(weight), -1), 2, index, out=target)
            return
        kernels = channels.flatten(0, 1)
        rows = kernels if places is None else memory.view(kernels.shape)
        torch.stack(planes.unbind(), 1, out=rows)  # several times as fast as to copy the matrix turned over
        if places is not None:
            torch.index_select(rows, 0, places, out=kernels)

    def puts_planes(self, weight: Tensor) -> bool:
        """Whether planes of all kernels can be written into a weight as it is stored."""
        dense = weight.is_contiguous() or weight.movedim(1, -1).is_contiguous()
        return dense and self.layout.storage == "conv"

    def per_component(self, values: np.ndarray) -> list[np.ndarray]:
        """Numbers per group ``(G,)``, or per kernel ``(D, C)``, in the order of the components of every part."""
        if values.ndim == 1:
            labels = [own.spread(torch.arange(own.count)).numpy() for own in self.segments]
            return [values[g][own] for g, own in zip(self.groups, labels, strict=True)]
        kernels = values.ravel()
        if self.order is not None:
            kernels = kernels[self.order.cpu().numpy()]
        return np.split(kernels, np.cumsum(self.counts)[:-1])


def _channels_last(channels: Tensor) -> bool:
    """Whether the input channels of ``(D, C, K)`` run faster in memory than the entries of a kernel."""
    return channels.stride(1) < channels.stride(2)


def _sorted_rows(kernels: Tensor, order: Tensor | None) -> Tensor:
    """Kernels ``(n, K)`` in the given order."""
    return kernels if order is None else kernels.index_select(0, order.to(kernels.device))


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
    """The same, in memory: as_strided keeps torch.compile from gathering anew wherever the result is used."""
    if torch.compiler.is_compiling():
        planes = planes.contiguous()
        return planes.as_strided(planes.shape, (planes.shape[1], 1))
    return planes


def _rows(parts: Sequence[Tensor]) -> Tensor:
    """Kernels ``(n, K)`` one behind the other, stored kernel by kernel."""
    if torch.compiler.is_compiling() or all(part.is_contiguous() for part in parts):
        return torch.cat(list(parts))
    rows = parts[0].new_empty(1, sum(map(len, parts)), parts[0].shape[1])
    return _fill(rows, [part[None] for part in parts])[0]


def _joined_planes(parts: Sequence[Tensor]) -> Tensor:
    """Kernels one behind the other, given and stored as ``(K, n)``."""
    total = sum(part.shape[1] for part in parts)
    if torch.compiler.is_compiling() or len(parts[0]) * total <= _MANY:
        return torch.cat(list(parts), 1)
    return _fill(parts[0].new_empty(len(parts[0]), total), parts)


def _fill(joined: Tensor, parts: Sequence[Tensor]) -> Tensor:
    """Parts one behind the other along the second dimension."""
    start = 0
    for part in parts:
        joined.narrow(1, start, part.shape[1]).copy_(part)
        start += part.shape[1]
    return joined


@dataclass(frozen=True)
class _Band:
    """Sections whose columns are dealt out alike: equally many rows, and as many blocks of every part and width.

    Attributes:
        sections: Number of sections.
        parts: Numbers of the parts that the columns belong to, in the order of the sorted columns.
        blocks: How many blocks of every part a section has.
        widths: How many columns the blocks of every part have together.
    """

    sections: int
    parts: tuple[int, ...]
    blocks: tuple[int, ...]
    widths: tuple[int, ...]

    def split(self, strip: Tensor) -> list[tuple[int, Tensor]]:
        """Parts and their blocks ``(n, rows, columns)``, of rows whose columns ``(sections, rows, C K)`` are sorted."""
        columns = zip(self.parts, self.blocks, strip.split_with_sizes(self.widths, 2), strict=True)
        return [
            (part, x if n == 1 else x.unflatten(2, (n, -1)).transpose(1, 2).flatten(0, 1)) for part, n, x in columns
        ]

    def merge(self, blocks: Sequence[Tensor]) -> Tensor:
        """Inverse of :meth:`split`, given the blocks of all parts of the weight."""
        columns = zip(self.blocks, (blocks[part] for part in self.parts), strict=True)
        return torch.cat([x if n == 1 else x.unflatten(0, (-1, n)).transpose(1, 2).flatten(2) for n, x in columns], 2)


class BlockPartition(Partition):
    """Every group of the collections is one rectangular block of the matrix ``(D, C K)``, transposed if wide.

    Equal blocks of one kind share a part.

    Some groups have all columns of the matrix; the others of a section have all of its remaining rows, and share out
    the columns. So the rows are sorted once for all parts, those of whole rows part by part and then the remaining
    ones, and the columns of the latter: every part is a view of the sorted matrix then, and of the matrix itself where
    groups are runs. Costs two 32-bit indices per row, and two per column of every section.
    """

    order: Tensor | None
    inverse: Tensor | None

    def __init__(self, collections: Sequence[Collection], layout: WeightLayout) -> None:
        entries = np.arange(math.prod(layout.kernel))
        rows_per_section = layout.out_channels // layout.sections
        whole_rows: dict[_PartKey, list[np.ndarray]] = {}
        parts: dict[_PartKey, list[int]] = {}
        rectangles: dict[_PartKey, list[tuple[np.ndarray, np.ndarray]]] = {}
        bands: dict[_Shares, list[tuple[np.ndarray, dict[_PartKey, list[np.ndarray]]]]] = {}
        number = 0
        for section, c in enumerate(collections):
            groups = list(c.groups)
            shares = tuple(
                (g.manifold, len(g.rows), len(g.columns)) for g in groups if len(g.columns) < layout.in_channels
            )
            rows, columns = np.arange(0), dict[_PartKey, list[np.ndarray]]()
            for group in groups:
                is_share = len(group.columns) < layout.in_channels
                key = (group.manifold, len(group.rows), len(group.columns) * len(entries), shares if is_share else ())
                parts.setdefault(key, []).append(number)
                number += 1
                own_rows = group.rows + section * rows_per_section
                own_columns = (group.columns[:, None] * len(entries) + entries).ravel()
                rectangles.setdefault(key, []).append((own_rows, own_columns))
                if is_share:
                    rows = own_rows
                    columns.setdefault(key, []).append(own_columns)
                else:
                    whole_rows.setdefault(key, []).append(own_rows)
            if shares:
                bands.setdefault(shares, []).append((rows, columns))
        ones = [np.ones(len(numbers), int) for numbers in parts.values()]
        super().__init__(layout, ones, [Segments(len(one), len(one)) for one in ones])
        self.kinds = tuple(kind for kind, *_ in parts)
        self.groups = tuple(np.array(numbers) for numbers in parts.values())
        self.sizes = tuple((max(a, b), min(a, b)) for _, a, b, _ in parts)
        self._wide = tuple(a < b for _, a, b, _ in parts)
        self._rectangles = [
            tuple(torch.from_numpy(np.stack(lines).astype(np.int32)) for lines in zip(*blocks, strict=True))
            for blocks in rectangles.values()
        ]
        position = {key: part for part, key in enumerate(parts)}
        self._whole_rows = tuple(position[key] for key in whole_rows)
        self._bands: list[_Band] = []
        strips = [np.concatenate(rows) for rows in whole_rows.values()]
        for sections in bands.values():
            strips.append(np.concatenate([rows for rows, _ in sections]))
            first = sections[0][1]
            widths = tuple(sum(map(len, blocks)) for blocks in first.values())
            self._bands.append(
                _Band(len(sections), tuple(position[key] for key in first), tuple(map(len, first.values())), widths)
            )
            order = np.stack([np.concatenate([c for key in first for c in columns[key]]) for _, columns in sections])
            self._register_order(f"_of_columns{len(self._bands) - 1}", order)
        self._heights = [len(rows) for rows in strips]
        self._register_order("", np.concatenate(strips))

    def _register_order(self, suffix: str, order: np.ndarray) -> None:
        """Keep an order along the last dimension and its inverse, or None for both if nothing changes places."""
        inverse = np.argsort(order, axis=-1)
        in_order = bool((order == np.arange(order.shape[-1])).all())
        for name, index in (("order", order), ("inverse", inverse)):
            buffer = None if in_order else torch.from_numpy(index.astype(np.int32))
            self.register_buffer(name + suffix, buffer, persistent=False)

    def split(self, weight: Tensor) -> list[Tensor]:
        """The blocks of every kind and shape."""
        matrix = _sorted_rows(self.layout.channels(weight).flatten(1), self.order)
        n_columns = matrix.shape[1]
        strips = matrix.split_with_sizes(self._heights)
        n_whole = len(self._whole_rows)
        blocks = {
            part: strip.reshape(self.counts[part], -1, n_columns)
            for part, strip in zip(self._whole_rows, strips[:n_whole], strict=True)
        }
        for number, (band, strip) in enumerate(zip(self._bands, strips[n_whole:], strict=True)):
            columns = strip.reshape(band.sections, -1, n_columns)
            blocks.update(band.split(_sorted_columns(columns, getattr(self, f"order_of_columns{number}"))))
        return [blocks[part].mT if wide else blocks[part] for part, wide in enumerate(self._wide)]

    def merge(self, parts: Sequence[Tensor], like: Tensor | None = None) -> Tensor:
        """Inverse of :meth:`split`."""
        layout = self.layout
        blocks = [p.mT if wide else p for p, wide in zip(parts, self._wide, strict=True)]
        strips = [blocks[part].flatten(0, 1) for part in self._whole_rows]
        for number, band in enumerate(self._bands):
            columns = _sorted_columns(band.merge(blocks), getattr(self, f"inverse_of_columns{number}"))
            strips.append(columns.flatten(0, 1))
        matrix = _sorted_rows(strips[0] if len(strips) == 1 else torch.cat(strips), self.inverse)
        return layout.weight(matrix.reshape(layout.out_channels, layout.in_channels, *layout.kernel))

    def rectangles(self, part: int) -> tuple[Tensor, Tensor]:
        """Rows ``(n, a)`` and columns ``(n, b)`` of a part's blocks, in the matrix ``(D, C K)``."""
        rows, columns = self._rectangles[part]
        return rows, columns

    def per_component(self, values: np.ndarray) -> list[np.ndarray]:
        """Numbers per group ``(G,)`` in the order of the components; a block has no number per kernel."""
        if values.ndim != 1:
            raise ValueError(
                f"a block is one component, so numbers are given per group, shape (G,), got shape {values.shape}"
            )
        return [values[g] for g in self.groups]


def _sorted_columns(strips: Tensor, order: Tensor | None) -> Tensor:
    """Strips ``(n, rows, columns)`` with the columns of each in an order of its own, ``(n, columns)``."""
    if order is None:
        return strips
    index = order.to(strips.device, torch.int64).unsqueeze(1)
    return strips.gather(2, index.expand(-1, strips.shape[1], -1))


_NORMALISATIONS = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.SyncBatchNorm,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED)


def layout_of(module: nn.Module, name: str) -> WeightLayout | str:
    """The layout of a module's parameter, or the reason why it has none.

    Args:
        module: The module that owns the parameter.
        name: The parameter's name in the module, e.g. ``"weight"``.

    Returns:
        A layout, or what to say of the parameter.

    Example:
        >>> layout_of(nn.Conv2d(4, 6, 3), "weight").kernel
        (3, 3)
        >>> layout_of(nn.Conv2d(4, 6, 3), "bias")
        'has one dimension: no kernels or blocks to form components of'
    """
    parameter = module.get_parameter(name)
    if isinstance(parameter, nn.UninitializedParameter):
        return "is not initialised yet: run a forward pass through the lazy module first"
    if isinstance(module, nn.utils.parametrize.ParametrizationList):
        return "is re-parametrised already: remove the parametrization first"
    if isinstance(module, _NORMALISATIONS):
        return "scales or shifts normalised features"
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return "is a lookup table: its rows are used one at a time, not as an operator"
    if isinstance(module, nn.Bilinear) and name == "weight":
        return "is a stack of bilinear forms, which have no input and output channels"
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        return "holds the gates of a recurrent layer in one tensor"
    if parameter.ndim < 2:
        return "has one dimension: no kernels or blocks to form components of"
    shape = tuple(parameter.shape)
    if isinstance(module, CONVOLUTIONS) and name == "weight":
        sections = module.groups if math.prod(shape[2:]) == 1 else 1
        return WeightLayout(shape, "transposed" if isinstance(module, _TRANSPOSED) else "conv", module.groups, sections)
    if isinstance(module, nn.Linear) and name == "weight":
        return WeightLayout(shape)
    if isinstance(module, nn.MultiheadAttention) and name == "in_proj_weight":
        return WeightLayout(shape, sections=3)
    if isinstance(module, nn.MultiheadAttention) and name in ("q_proj_weight", "k_proj_weight", "v_proj_weight"):
        return WeightLayout(shape)
    return (
        f"is {name!r} of {type(module).__name__}, of unknown layout: declare it by hand as a geoopt.ManifoldParameter "
        "if it is to be constrained"
    )
