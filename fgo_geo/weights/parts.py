"""The base class of the ways to cut a weight into components.

A :class:`Partition` cuts a weight into *parts*, which are batches of components of equal size on one manifold kind, and
merges them. :class:`Segments` holds the group of every component of a part, and reduces over groups.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from fgo_geo.weights.layout import WeightLayout

__all__ = ["Partition", "RectanglePartition", "Segments", "sorted_rows"]


@dataclass(frozen=True)
class Segments:
    """Which of ``n`` components belong to which of ``G`` groups.

    Attributes:
        count: Number of groups ``G``.
        total: Number of components ``n``.
        labels: The group of every component, shape ``(n,)``; None if groups are consecutive and of equal size.

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
        """Consecutive groups of the given sizes, all at least one."""
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
        """The concatenation of segments, on the device of the components."""
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
            like: A weight whose memory format the result has, where that is cheap.

        Returns:
            The weight.
        """

    @abc.abstractmethod
    def entries(self, part: int, chosen: Tensor) -> Tensor:
        """Where the entries of some components of a part are.

        Args:
            part: The part.
            chosen: Numbers of components, shape ``(n,)``, on the CPU.

        Returns:
            Places in the channels ``(D, C, *kernel)``, flattened, shape ``(n, A, B)``.
        """

    def put_(self, parts: Sequence[Tensor], weight: Tensor) -> None:
        """Write ``merge(parts)`` into a weight.

        Args:
            parts: The components of every part.
            weight: Where to.
        """
        weight.copy_(self.merge(parts, weight))

    def per_component(self, values: np.ndarray) -> list[np.ndarray]:
        """Numbers per group ``(G,)``, or per kernel ``(D, C)``, in the order of the components of every part.

        Raises:
            ValueError: If numbers are given per kernel, and a component is a block or a filter.
        """
        if values.ndim != 1:
            word = type(self).__name__.removesuffix("Partition").lower()
            raise ValueError(
                f"a {word} is one component, so numbers are given per group, shape (G,), got shape {values.shape}"
            )
        labels = [own.spread(torch.arange(own.count)).numpy() for own in self.segments]
        return [values[g][own] for g, own in zip(self.groups, labels, strict=True)]


class RectanglePartition(Partition):
    """A partition whose components are rectangles of the matrix ``(D, C K)``."""

    @abc.abstractmethod
    def rectangles(self, part: int) -> tuple[Tensor, Tensor]:
        """Rows ``(n, a)`` and columns ``(n, b)`` of a part's components, kept because compiled code holds addresses."""

    def entries(self, part: int, chosen: Tensor) -> Tensor:
        """Where the entries of some components of a part are."""
        rows, columns = (lines[chosen].long() for lines in self.rectangles(part))
        width = self.layout.in_channels * math.prod(self.layout.kernel)
        places = rows.unsqueeze(2) * width + columns.unsqueeze(1)
        return places.mT if places.shape[1] < places.shape[2] else places


def sorted_rows(kernels: Tensor, order: Tensor | None) -> Tensor:
    """Kernels ``(n, K)`` in the given order."""
    return kernels if order is None else kernels.index_select(0, order.to(kernels.device))
