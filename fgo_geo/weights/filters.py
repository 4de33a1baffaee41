"""Filters as components: all weights of one output channel."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fgo_geo.weights.grouping import Collection
from fgo_geo.weights.kinds import kind
from fgo_geo.weights.layout import WeightLayout
from fgo_geo.weights.parts import RectanglePartition, Segments, sorted_rows

__all__ = ["FilterPartition"]

_PartKey = tuple[str, int]  # manifold kind, and filters of a component


class FilterPartition(RectanglePartition):
    """Every filter, a row of the matrix ``(D, C K)``, is a component ``C K x 1``; or all filters of a group form one.

    The second case applies to kinds whose constraint couples the columns of a matrix (``Kind.joins_filters``). On the
    Stiefel manifold, for example, the filters of a group are orthogonal to each other. Filters are then the columns of
    the component, or its rows if a group has at least as many filters as a filter has entries, because components are
    tall.

    The partition sorts the rows once, part by part, so that every part is a view of the sorted matrix, and a view of
    the matrix itself if no row changes its place. It stores two 32-bit indices per row.

    Attributes:
        rows: For every part the rows of its components, shape ``(n, filters of a component)``, int32.
    """

    order: Tensor | None
    inverse: Tensor | None

    def __init__(self, collections: Sequence[Collection], layout: WeightLayout) -> None:
        rows_per_section = layout.out_channels // layout.sections
        found: dict[_PartKey, list[tuple[int, np.ndarray]]] = {}  # groups and their rows
        number = 0
        for section, c in enumerate(collections):
            for group in c.groups:
                own = group.rows + section * rows_per_section
                joined = kind(group.manifold).joins_filters
                found.setdefault((group.manifold, len(own) if joined else 1), []).append((number, own))
                number += 1
        parts = [_sorted_part(groups, width) for (_, width), groups in found.items()]
        super().__init__(
            layout,
            [np.bincount(labels) for _, labels in parts],
            [Segments.labelled(labels, int(labels.max()) + 1) for _, labels in parts],
        )
        self.kinds = tuple(name for name, _ in found)
        self.groups = tuple(np.array([number for number, _ in groups]) for groups in found.values())
        length = layout.in_channels * math.prod(layout.kernel)
        self.sizes = tuple((max(length, width), min(length, width)) for _, width in found)
        self._columns: dict[int, Tensor] = {}
        self.rows = tuple(torch.from_numpy(rows.astype(np.int32)) for rows, _ in parts)
        order = np.concatenate([rows.ravel() for rows, _ in parts])
        in_order = bool((order == np.arange(len(order))).all())
        for name, index in (("order", order), ("inverse", np.argsort(order))):
            buffer = None if in_order else torch.from_numpy(index.astype(np.int32))
            self.register_buffer(name, buffer, persistent=False)

    def split(self, weight: Tensor) -> list[Tensor]:
        """The filters of every kind, or the matrices of the groups' filters."""
        matrix = sorted_rows(self.layout.channels(weight).flatten(1), self.order)
        strips = matrix.split_with_sizes([rows.numel() for rows in self.rows])
        blocks = [strip.unflatten(0, tuple(rows.shape)) for strip, rows in zip(strips, self.rows, strict=True)]
        return [block.mT if block.shape[1] < block.shape[2] else block for block in blocks]

    def merge(self, parts: Sequence[Tensor], like: Tensor | None = None) -> Tensor:
        """Inverse of :meth:`split`."""
        layout = self.layout
        length = layout.in_channels * math.prod(layout.kernel)
        blocks = [part.mT if rows.shape[1] < length else part for part, rows in zip(parts, self.rows, strict=True)]
        strips = [block.flatten(0, 1) for block in blocks]
        matrix = sorted_rows(strips[0] if len(strips) == 1 else torch.cat(strips), self.inverse)
        return layout.weight(matrix.reshape(layout.out_channels, layout.in_channels, *layout.kernel))

    def rectangles(self, part: int) -> tuple[Tensor, Tensor]:
        """Rows ``(n, filters of a component)`` and columns ``(n, C K)`` of a part's components, in ``(D, C K)``."""
        rows = self.rows[part]
        if part not in self._columns:
            length = self.layout.in_channels * math.prod(self.layout.kernel)
            self._columns[part] = torch.arange(length, dtype=torch.int32).expand(len(rows), -1).contiguous()
        return rows, self._columns[part]


def _sorted_part(groups: Sequence[tuple[int, np.ndarray]], width: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of a part's components, and the place of each component's group in the part: filters in their order."""
    rows = np.concatenate([own for _, own in groups])
    labels = np.repeat(np.arange(len(groups)), [len(own) for _, own in groups])
    order = np.argsort(rows, kind="stable") if width == 1 else np.arange(len(rows))
    return rows[order].reshape(-1, width), labels[order][::width]
