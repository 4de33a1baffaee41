"""The lines of a weight, as :mod:`fgo_geo.paths.native.lines` passes them to the compiled sweeps.

A *line* is a vector of fixed norm: a component on a sphere, or a column of a component on an oblique manifold. Two
arrangements in memory are supported, and both are described by a :class:`LineTable`:

* *strided*: all lines have the same length and stride, as contiguous runs or as the columns of matrices;
* *by blocks*: the weight is a matrix whose blocks belong to several manifolds. A :class:`BlockTable` then says, for
  every row, which columns belong to which block.

Nothing here reads the values of a weight.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple, cast

import geoopt
import numpy as np
import torch
from torch import Tensor

from fgo_geo.manifolds import ComponentManifold, ProductOfGroups
from fgo_geo.paths.kept import kept
from fgo_geo.weights.components import FilterPartition, RectanglePartition, Segments
from fgo_geo.weights.kinds import kind, kind_of

__all__ = ["BlockTable", "LineTable", "table_of"]

_SHORTEST = 4  # numbers of a line; on shorter lines the batched torch code is as fast

_EUCLIDEAN, _SPHERE, _OBLIQUE = 0, 1, 2  # codes of the kinds that consist of lines; other kinds go to another path


class _Form(IntEnum):
    """Which lines the entries of a block form, numbered as in lines.cpp."""

    NO_LINE = 0
    ONE_LINE = 1
    LINE_PER_ROW = 2
    LINE_PER_COLUMN = 3


@dataclass(frozen=True, eq=False)
class BlockTable:
    """How the rows of a matrix are divided among blocks, and the blocks into lines.

    Rows that are divided alike share a *pattern*: an order of the columns in which each block of the row is a
    *segment* of consecutive columns.

    Attributes:
        pattern_of_row: Number of every row's pattern, int32.
        row_in_block: Index of every row within its blocks, int32.
        segments: Start, number of columns, form (numbered as in lines.cpp) and first line of every segment, pattern by
            pattern, int32, shape ``(segments, 4)``.
        first_segments: Number of every pattern's first segment, and the number of segments at the end, int32.
        column_orders: The columns of every pattern in its order, int32, shape ``(patterns, columns)``; filled with -1
            if that is the order of the matrix.
        shared: Number of lines that extend over several rows; they come first.
    """

    pattern_of_row: Tensor
    row_in_block: Tensor
    segments: Tensor
    first_segments: Tensor
    column_orders: Tensor
    shared: int


@dataclass(frozen=True, eq=False, kw_only=True)
class LineTable:
    """The lines of a weight: how many, where they are in memory, their groups and radii.

    Attributes:
        groups: Number of groups.
        lines: Number of lines.
        length: Numbers per line; with a block table, rows of the matrix.
        width: One if every line is contiguous; else the lines are the columns of matrices with this many columns.
        group_of: Group of every line, int32; None if there is one group.
        radius: Radius of all lines; nan if they differ.
        radii: Radius of every line in float64 where they differ, infinite where there is no constraint; else None.
        blocks: How a matrix is divided among blocks; None if the lines are strided.
        other_parts: Numbers of the parts of the weight that do not consist of lines.
    """

    groups: int
    lines: int
    length: int
    width: int
    group_of: Tensor | None
    radius: float
    radii: Tensor | None
    blocks: BlockTable | None = None
    other_parts: tuple[int, ...] = ()


def table_of(manifold: geoopt.Manifold, weight: Tensor) -> LineTable | None:
    """The table of a weight, kept until a radius changes; None if no part of it consists of lines in an arrangement."""
    if not isinstance(manifold, (ProductOfGroups, ComponentManifold)):
        return None
    return kept(manifold, ("lines", weight.shape, weight.stride()), lambda: _build(manifold, weight.detach()))


def _build(manifold: geoopt.Manifold, weight: Tensor) -> LineTable | None:
    table = _build_strided(manifold, weight)
    if table is not None or not isinstance(manifold, ProductOfGroups):
        return table
    return _build_by_blocks(manifold, weight)


# -- strided lines -------------------------------------------------------------------------------------------


def _build_strided(manifold: geoopt.Manifold, weight: Tensor) -> LineTable | None:
    if isinstance(manifold, ProductOfGroups):
        cut = manifold.partition
        if not isinstance(cut, RectanglePartition) or len(cut.kinds) > 1:
            return None
        ((part, segments),) = manifold.parts
        (components,), (numbers,) = cut.split(weight), cut.groups
        if components.data_ptr() != weight.data_ptr() or components.numel() != weight.numel():
            return None  # sorted: the components are copies
    else:
        n = math.prod(weight.shape[: weight.ndim - manifold.ndim])
        part, segments, components, numbers = manifold, Segments(1, n), weight, np.zeros(1, int)
    own = kind_of(part)
    if own is None or own.code not in (_SPHERE, _OBLIQUE):
        return None
    part = cast(ComponentManifold, part)
    place = _arrangement_of(own.code == _OBLIQUE, components, part.ndim)
    if place is None or place.length < _SHORTEST:
        return None
    groups = None
    if segments.count > 1:
        groups = segments.spread(torch.from_numpy(numbers).int()).repeat_interleave(place.per_component)
    batch = components.shape[: components.ndim - part.ndim]
    radius = part.radius
    radii = radius.detach().double().cpu().expand(batch).flatten() if isinstance(radius, Tensor) else None
    return LineTable(
        groups=segments.count,
        lines=segments.total * place.per_component,
        length=place.length,
        width=place.width,
        group_of=groups,
        radius=math.nan if isinstance(radius, Tensor) else radius,
        radii=None if radii is None else radii.repeat_interleave(place.per_component),
    )


class _Arrangement(NamedTuple):
    """Length and width of strided lines (see :class:`LineTable`), and the number of lines per component."""

    length: int
    width: int
    per_component: int


def _arrangement_of(by_columns: bool, x: Tensor, ndim: int) -> _Arrangement | None:
    """How the lines of components (whole components, or their columns) are stored; None if they are not strided."""
    sizes = list(zip(x.shape, x.stride(), strict=True))
    batch, component = sizes[: x.ndim - ndim], sizes[x.ndim - ndim :]
    if not by_columns:
        length = math.prod(x.shape[x.ndim - ndim :])
        inside = sorted(component, key=lambda dimension: -dimension[1])
        return _Arrangement(length, 1, 1) if _is_contiguous([*batch, *inside]) else None
    rows, width = x.shape[-2:]
    if _is_contiguous([*batch, component[1], component[0]]):
        return _Arrangement(rows, 1, width)
    return _Arrangement(rows, width, width) if _is_contiguous([*batch, *component]) else None


def _is_contiguous(dimensions: Sequence[tuple[int, int]]) -> bool:
    """Whether pairs of size and stride are those of a contiguous tensor."""
    expected = 1
    for size, stride in reversed(dimensions):
        if size > 1 and stride != expected:
            return False
        expected *= size
    return True


# -- lines by blocks -----------------------------------------------------------------------------------------


@dataclass
class _Block:
    """One block of a matrix.

    Attributes:
        group: Its group; an array if every line has its own.
        radius: Radius of its lines, infinite without constraint; an array if every line has its own.
        form: Which lines its entries form.
        rows: Its rows in the matrix.
        columns: Its columns.
        first_line: Number of its first line; without lines, its number among such blocks.
    """

    group: int | np.ndarray
    radius: float | np.ndarray
    form: _Form
    rows: np.ndarray
    columns: np.ndarray
    first_line: int = 0

    @property
    def lines(self) -> int:
        """Number of lines."""
        counts = {_Form.ONE_LINE: 1, _Form.LINE_PER_ROW: len(self.rows), _Form.LINE_PER_COLUMN: len(self.columns)}
        return counts.get(self.form, 0)


def _build_by_blocks(manifold: ProductOfGroups, weight: Tensor) -> LineTable | None:
    cut = manifold.partition
    if not isinstance(cut, RectanglePartition) or not any(map(_has_lines, cut.kinds)):
        return None
    matrix = _matrix_of(manifold.layout.channels(weight), cut)
    if matrix.data_ptr() != weight.data_ptr() or not matrix.is_contiguous():
        return None
    blocks = [block for part in range(len(cut.kinds)) for block in _blocks_of(manifold, cut, part)]
    # Lines that extend over several rows come first: threads have to add up their partial sums.
    blocks.sort(key=lambda block: block.form is _Form.LINE_PER_ROW)
    count = others = 0
    for block in blocks:
        if block.form is _Form.NO_LINE:
            block.first_line, others = others, others + 1
        else:
            block.first_line, count = count, count + block.lines
    group_of = np.concatenate([np.broadcast_to(block.group, block.lines) for block in blocks]).astype(np.int32)
    radii = np.concatenate([np.broadcast_to(block.radius, block.lines) for block in blocks]).astype(np.float64)
    return LineTable(
        groups=manifold.n_groups,
        lines=count,
        length=matrix.shape[0],
        width=matrix.shape[1],
        group_of=torch.from_numpy(group_of),
        radius=math.nan,
        radii=torch.from_numpy(radii),
        blocks=_block_table(blocks, matrix.shape[0]),
        other_parts=tuple(part for part, name in enumerate(cut.kinds) if not _has_lines(name)),
    )


def _matrix_of(channels: Tensor, cut: RectanglePartition) -> Tensor:
    """The matrix ``(D, C K)``.

    Where all components are single filters, and lines, the order of a row's entries is that of memory: it changes
    nothing about them, and weights that are stored channels_last have rows too.
    """
    are_rows = isinstance(cut, FilterPartition) and all(
        rows.shape[1] == 1 and _has_lines(name) for rows, name in zip(cut.rows, cut.kinds, strict=True)
    )
    sizes = sorted(zip(channels.shape[1:], channels.stride()[1:], strict=True), key=lambda size: -size[1])
    if are_rows and _is_contiguous([(channels.shape[0], channels.stride(0)), *sizes]):
        return channels.as_strided((channels.shape[0], channels[0].numel()), (channels.stride(0), 1))
    return channels.flatten(1)


def _blocks_of(manifold: ProductOfGroups, cut: RectanglePartition, part: int) -> list[_Block]:
    """The blocks of a part; filters that are components are the lines of one block."""
    name, (own, segments) = cut.kinds[part], manifold.parts[part]
    groups = segments.spread(torch.from_numpy(cut.groups[part])).numpy()
    radius = own.radius if isinstance(own, ComponentManifold) else math.inf
    radii = np.broadcast_to(radius.cpu().numpy() if isinstance(radius, Tensor) else radius, groups.shape)
    if isinstance(cut, FilterPartition) and cut.rows[part].shape[1] == 1 and _has_lines(name):
        columns = np.arange(math.prod(cut.sizes[part]), dtype=np.int32)
        return [_Block(groups, radii, _Form.LINE_PER_ROW, cut.rows[part][:, 0].numpy(), columns)]
    rectangles = (lines.numpy() for lines in cut.rectangles(part))
    return [
        _Block(int(group), float(r), _form(name, len(rows), len(columns)), rows, columns)
        for group, r, rows, columns in zip(groups, radii, *rectangles, strict=True)
    ]


def _has_lines(name: str) -> bool:
    return kind(name).code in (_EUCLIDEAN, _SPHERE, _OBLIQUE)


def _form(name: str, rows: int, columns: int) -> _Form:
    """Which lines a block forms; an oblique one its columns, or its rows where these are longer."""
    if not _has_lines(name):
        return _Form.NO_LINE
    if kind(name).code != _OBLIQUE:
        return _Form.ONE_LINE
    return _Form.LINE_PER_ROW if rows < columns else _Form.LINE_PER_COLUMN


def _block_table(blocks: Sequence[_Block], rows: int) -> BlockTable:
    """The table of a matrix with so many rows; blocks that have one row in common have all rows in common."""
    of_first_row: dict[int, list[_Block]] = {}
    for block in blocks:
        of_first_row.setdefault(int(block.rows[0]), []).append(block)
    pattern_of_row, row_in_block = np.empty(rows, np.int32), np.empty(rows, np.int32)
    segments: list[tuple[int, int, int, int]] = []
    first_segments = [0]
    orders: list[np.ndarray] = []
    for number, pattern in enumerate(of_first_row.values()):
        own_rows = pattern[0].rows
        pattern_of_row[own_rows], row_in_block[own_rows] = number, np.arange(len(own_rows))
        pattern.sort(key=lambda block: int(block.columns[0]))  # keeps the matrix's order where blocks are contiguous
        start = 0
        for block in pattern:
            segments.append((start, len(block.columns), block.form, block.first_line))
            start += len(block.columns)
        first_segments.append(len(segments))
        order = np.concatenate([block.columns for block in pattern])
        orders.append(np.full_like(order, -1) if (order == np.arange(len(order))).all() else order)
    return BlockTable(
        torch.from_numpy(pattern_of_row),
        torch.from_numpy(row_in_block),
        torch.tensor(segments, dtype=torch.int32),
        torch.tensor(first_segments, dtype=torch.int32),
        torch.from_numpy(np.stack(orders)),
        sum(block.lines for block in blocks if block.form is not _Form.LINE_PER_ROW),
    )
