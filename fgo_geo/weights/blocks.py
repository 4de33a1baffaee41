"""Rectangular blocks of a weight's matrix as components."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fgo_geo.weights.grouping import Collection
from fgo_geo.weights.layout import WeightLayout
from fgo_geo.weights.parts import RectanglePartition, Segments, sorted_rows

__all__ = ["BlockPartition"]


class _Share(NamedTuple):
    """A group that has some of the columns of its section."""

    kind: str
    rows: int
    columns: int


class _PartKey(NamedTuple):
    """The shared properties of the blocks of a part; of blocks of some columns, also the division of their section."""

    kind: str
    rows: int
    columns: int
    shares: tuple[_Share, ...]


class _Section(NamedTuple):
    """The rows that the groups of a section share, and the columns of each group by part."""

    rows: np.ndarray
    columns: dict[_PartKey, list[np.ndarray]]


@dataclass(frozen=True)
class _Band:
    """Sections with the same division of columns: equally many rows, and equally many blocks of every part and width.

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


class BlockPartition(RectanglePartition):
    """Every group of the collections is one rectangular block of the matrix ``(D, C K)``, transposed if wide.

    Blocks of the same size and kind form one part.

    Some groups of a section contain whole rows of the matrix. The other groups divide the columns of all remaining rows
    between them. The partition sorts the rows once for all parts: first the whole rows, part by part, then the
    remaining rows, whose columns it sorts too. Every part is then a view of the sorted matrix, and a view of the matrix
    itself if groups are runs of rows and columns. The partition stores two 32-bit indices per row, and two per column
    of every section.
    """

    order: Tensor | None
    inverse: Tensor | None

    def __init__(self, collections: Sequence[Collection], layout: WeightLayout) -> None:
        entries = np.arange(math.prod(layout.kernel))
        rows_per_section = layout.out_channels // layout.sections
        whole_rows: dict[_PartKey, list[np.ndarray]] = {}
        parts: dict[_PartKey, list[int]] = {}
        rectangles: dict[_PartKey, list[tuple[np.ndarray, np.ndarray]]] = {}
        bands: dict[tuple[_Share, ...], list[_Section]] = {}
        number = 0
        for section, c in enumerate(collections):
            groups = list(c.groups)
            shares = tuple(
                _Share(g.manifold, len(g.rows), len(g.columns)) for g in groups if len(g.columns) < layout.in_channels
            )
            rows, columns = np.arange(0), dict[_PartKey, list[np.ndarray]]()
            for group in groups:
                is_share = len(group.columns) < layout.in_channels
                size = len(group.rows), len(group.columns) * len(entries)
                key = _PartKey(group.manifold, *size, shares if is_share else ())
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
                bands.setdefault(shares, []).append(_Section(rows, columns))
        ones = [np.ones(len(numbers), int) for numbers in parts.values()]
        super().__init__(layout, ones, [Segments(len(one), len(one)) for one in ones])
        self.kinds = tuple(key.kind for key in parts)
        self.groups = tuple(np.array(numbers) for numbers in parts.values())
        self.sizes = tuple((max(key.rows, key.columns), min(key.rows, key.columns)) for key in parts)
        self._wide = tuple(key.rows < key.columns for key in parts)
        self._rectangles = [
            tuple(torch.from_numpy(np.stack(lines).astype(np.int32)) for lines in zip(*blocks, strict=True))
            for blocks in rectangles.values()
        ]
        position = {key: part for part, key in enumerate(parts)}
        self._whole_rows = tuple(position[key] for key in whole_rows)
        self._bands: list[_Band] = []
        strips = [np.concatenate(rows) for rows in whole_rows.values()]
        for sections in bands.values():
            strips.append(np.concatenate([section.rows for section in sections]))
            first = sections[0].columns
            widths = tuple(sum(map(len, blocks)) for blocks in first.values())
            self._bands.append(
                _Band(len(sections), tuple(position[key] for key in first), tuple(map(len, first.values())), widths)
            )
            order = np.stack([
                np.concatenate([own for key in first for own in section.columns[key]]) for section in sections
            ])  # fmt: skip
            self._register_order(f"_of_columns{len(self._bands) - 1}", order)
        self._heights = [len(rows) for rows in strips]
        self._register_order("", np.concatenate(strips))

    def _register_order(self, suffix: str, order: np.ndarray) -> None:
        """Store an order along the last dimension and its inverse, or None for both if the order changes nothing."""
        inverse = np.argsort(order, axis=-1)
        in_order = bool((order == np.arange(order.shape[-1])).all())
        for name, index in (("order", order), ("inverse", inverse)):
            buffer = None if in_order else torch.from_numpy(index.astype(np.int32))
            self.register_buffer(name + suffix, buffer, persistent=False)

    def split(self, weight: Tensor) -> list[Tensor]:
        """The blocks of every kind and shape."""
        matrix = sorted_rows(self.layout.channels(weight).flatten(1), self.order)
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
        matrix = sorted_rows(strips[0] if len(strips) == 1 else torch.cat(strips), self.inverse)
        return layout.weight(matrix.reshape(layout.out_channels, layout.in_channels, *layout.kernel))

    def rectangles(self, part: int) -> tuple[Tensor, Tensor]:
        """Rows ``(n, a)`` and columns ``(n, b)`` of a part's blocks, in the matrix ``(D, C K)``."""
        rows, columns = self._rectangles[part]
        return rows, columns


def _sorted_columns(strips: Tensor, order: Tensor | None) -> Tensor:
    """Strips ``(n, rows, columns)``, the columns of each in its own order ``(n, columns)``."""
    if order is None:
        return strips
    index = order.to(strips.device, torch.int64).unsqueeze(1)
    return strips.gather(2, index.expand(-1, strips.shape[1], -1))
