"""Which weights consist of lines, and where these lie: what :mod:`fgo_geo.paths.native.lines` works on.

The lines of a weight either lie at equal distances in memory, as runs or as the columns of matrices; or the weight is a
matrix whose blocks were dealt to several manifolds, and every row says which of its columns belong to which block.
Nothing here touches values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import cast

import geoopt
import numpy as np
import torch
from torch import Tensor

from fgo_geo.manifolds import ComponentManifold, ProductOfGroups
from fgo_geo.paths.kept import kept
from fgo_geo.weights.components import BlockPartition, FilterPartition, Segments
from fgo_geo.weights.kinds import kind, kind_of

__all__ = ["Deal", "LineTable", "table_of"]

_SHORTEST = 4  # numbers of a line: of shorter ones the batched code makes a step as fast


class _Owner(IntEnum):
    """Whose the entries of a block are, as lines.cpp numbers it."""

    NOBODY = 0
    ONE_LINE = 1
    LINE_PER_ROW = 2
    LINE_PER_COLUMN = 3


_EUCLIDEAN, _SPHERE, _OBLIQUE = 0, 1, 2  # codes of the kinds that consist of lines; blocks of other kinds are left


@dataclass(frozen=True, eq=False)
class Deal:
    """How the blocks of a matrix were dealt to lines.

    Attributes:
        patterns: For every row the pattern that its columns are dealt by, int32.
        places: For every row its number among those of its blocks, int32.
        segments: Runs of columns that belong to one block, int32: where they start, how many they are, whose they are
            (numbered as in lines.cpp), the block's first line; pattern by pattern.
        first_segments: The first segment of every pattern, and where the last pattern ends, int32.
        orders: For every pattern its columns in order, int32, shape ``(patterns, columns)``; from -1 on: as they are.
        shared: Number of lines of which several rows have a part; they come first.
    """

    patterns: Tensor
    places: Tensor
    segments: Tensor
    first_segments: Tensor
    orders: Tensor
    shared: int


@dataclass(frozen=True, eq=False, kw_only=True)
class LineTable:
    """Where the lines of a weight lie, and what they are.

    Attributes:
        groups: Number of groups.
        left: Numbers of the parts of the weight that are no lines; empty if all are.
        lines: Number of lines.
        length: Numbers of a line; of a matrix that was dealt, its rows.
        width: One if a line is a run in memory; else lines are the columns of matrices with so many columns.
        group_of: Group of every line, int32; None if there is one group.
        radius: Radius of all lines; nan if they differ.
        radii: Radius of every line in float64 where they differ, infinite where there is no constraint; else None.
        deal: How a matrix was dealt to lines, None if they lie at equal distances.
    """

    groups: int
    lines: int
    length: int
    width: int
    group_of: Tensor | None
    radius: float
    radii: Tensor | None
    deal: Deal | None = None
    left: tuple[int, ...] = ()


def table_of(manifold: geoopt.Manifold, weight: Tensor) -> LineTable | None:
    """The table of a weight, kept until a radius changes.

    Args:
        manifold: The manifold of the weight.
        weight: The weight, for its shape and strides.

    Returns:
        A table; None if the weight does not consist of lines, or not enough of it.
    """
    if not isinstance(manifold, (ProductOfGroups, ComponentManifold)):
        return None
    return kept(manifold, ("lines", weight.shape, weight.stride()), lambda: _build(manifold, weight.detach()))


def _build(manifold: geoopt.Manifold, weight: Tensor) -> LineTable | None:
    """The table of a weight whose lines lie at equal distances, or that of a matrix whose blocks were dealt."""
    alike = _build_alike(manifold, weight)
    if alike is not None or not isinstance(manifold, ProductOfGroups):
        return alike
    return _build_dealt(manifold, weight)


def _build_alike(manifold: geoopt.Manifold, weight: Tensor) -> LineTable | None:
    if isinstance(manifold, ProductOfGroups):
        cut = manifold.partition
        if not isinstance(cut, (BlockPartition, FilterPartition)) or len(cut.kinds) > 1:
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
    found = _strides_of(own.code == _OBLIQUE, components, part.ndim)
    if found is None or found[0] < _SHORTEST:
        return None
    length, width, per_component = found
    groups = None
    if segments.count > 1:
        groups = segments.spread(torch.from_numpy(numbers).int()).repeat_interleave(per_component)
    batch = components.shape[: components.ndim - part.ndim]
    radius = part.radius
    radii = radius.detach().double().cpu().expand(batch).flatten() if isinstance(radius, Tensor) else None
    return LineTable(
        groups=segments.count,
        lines=segments.total * per_component,
        length=length,
        width=width,
        group_of=groups,
        radius=math.nan if isinstance(radius, Tensor) else radius,
        radii=None if radii is None else radii.repeat_interleave(per_component),
    )


@dataclass
class _Block:
    """One block of a matrix.

    Attributes:
        group: Its group, or that of every line.
        radius: Radius of its lines, or of every line; infinite without constraint.
        owner: Whose its entries are.
        rows: Its rows in the matrix.
        columns: Its columns.
        first_line: Number of its first line.
    """

    group: int | np.ndarray
    radius: float | np.ndarray
    owner: _Owner
    rows: np.ndarray
    columns: np.ndarray
    first_line: int = 0

    @property
    def lines(self) -> int:
        """How many lines it has."""
        of_owner = {_Owner.ONE_LINE: 1, _Owner.LINE_PER_ROW: len(self.rows), _Owner.LINE_PER_COLUMN: len(self.columns)}
        return of_owner.get(self.owner, 0)


def _build_dealt(manifold: ProductOfGroups, weight: Tensor) -> LineTable | None:
    cut = manifold.partition
    matrix = manifold.layout.channels(weight).flatten(1)
    if not isinstance(cut, (BlockPartition, FilterPartition)) or not any(map(_has_lines, cut.kinds)):
        return None
    if matrix.data_ptr() != weight.data_ptr() or not matrix.is_contiguous():
        return None
    blocks = [block for part in range(len(cut.kinds)) for block in _blocks_of(manifold, cut, part)]
    # Lines of which several rows have a part come first: threads add those up between them.
    blocks.sort(key=lambda block: block.owner is _Owner.LINE_PER_ROW)
    count = 0
    for block in blocks:
        block.first_line, count = count, count + block.lines
    group_of = np.concatenate([np.broadcast_to(block.group, block.lines) for block in blocks]).astype(np.int32)
    radii = np.concatenate([np.broadcast_to(block.radius, block.lines) for block in blocks]).astype(np.float64)
    return LineTable(
        groups=manifold.n_groups,
        left=tuple(part for part, name in enumerate(cut.kinds) if not _has_lines(name)),
        lines=count,
        length=matrix.shape[0],
        width=matrix.shape[1],
        group_of=torch.from_numpy(group_of),
        radius=math.nan,
        radii=torch.from_numpy(radii),
        deal=_deal(blocks, matrix.shape[0]),
    )


def _blocks_of(manifold: ProductOfGroups, cut: BlockPartition | FilterPartition, part: int) -> list[_Block]:
    """The blocks of a part; filters that are components are the lines of one block."""
    name, (own, segments) = cut.kinds[part], manifold.parts[part]
    groups = segments.spread(torch.from_numpy(cut.groups[part])).numpy()
    radius = own.radius if isinstance(own, ComponentManifold) else math.inf
    radii = np.broadcast_to(radius.cpu().numpy() if isinstance(radius, Tensor) else radius, groups.shape)
    if isinstance(cut, FilterPartition) and cut.rows[part].shape[1] == 1 and _has_lines(name):
        columns = np.arange(math.prod(cut.sizes[part]))
        return [_Block(groups, radii, _Owner.LINE_PER_ROW, cut.rows[part][:, 0].numpy(), columns)]
    rectangles = (lines.numpy() for lines in cut.rectangles(part))
    return [
        _Block(int(group), float(r), _owner(name, len(rows), len(columns)), rows, columns)
        for group, r, rows, columns in zip(groups, radii, *rectangles, strict=True)
    ]


def _has_lines(name: str) -> bool:
    return kind(name).code in (_EUCLIDEAN, _SPHERE, _OBLIQUE)


def _owner(name: str, rows: int, columns: int) -> _Owner:
    """Whose the entries of a block are; the lines of an oblique one are its columns, or its rows if they are longer."""
    if not _has_lines(name):
        return _Owner.NOBODY
    if kind(name).code != _OBLIQUE:
        return _Owner.ONE_LINE
    return _Owner.LINE_PER_ROW if rows < columns else _Owner.LINE_PER_COLUMN


def _deal(blocks: Sequence[_Block], rows: int) -> Deal:
    """How the blocks of a matrix with so many rows were dealt; blocks that have a row in common have all of them."""
    of_rows: dict[int, list[_Block]] = {}  # by their first row
    for block in blocks:
        of_rows.setdefault(int(block.rows[0]), []).append(block)
    patterns, places = np.empty(rows, np.int32), np.empty(rows, np.int32)
    segments: list[tuple[int, int, int, int]] = []
    first_segments = [0]
    orders: list[np.ndarray] = []
    for number, pattern in enumerate(of_rows.values()):
        own_rows = pattern[0].rows
        patterns[own_rows], places[own_rows] = number, np.arange(len(own_rows))
        pattern.sort(key=lambda block: int(block.columns[0]))  # blocks that are runs of columns come in their order
        start = 0
        for block in pattern:
            segments.append((start, len(block.columns), block.owner, block.first_line))
            start += len(block.columns)
        first_segments.append(len(segments))
        order = np.concatenate([block.columns for block in pattern])
        orders.append(np.full_like(order, -1) if (order == np.arange(len(order))).all() else order)
    return Deal(
        torch.from_numpy(patterns),
        torch.from_numpy(places),
        torch.tensor(segments, dtype=torch.int32),
        torch.tensor(first_segments, dtype=torch.int32),
        torch.from_numpy(np.stack(orders)),
        sum(block.lines for block in blocks if block.owner is not _Owner.LINE_PER_ROW),
    )


def _strides_of(columns: bool, x: Tensor, ndim: int) -> tuple[int, int, int] | None:
    """Length of the lines of components, their width (see :class:`LineTable`), and how many a component has.

    Args:
        columns: Whether lines are the columns of components, or components as they are.
        x: Components.
        ndim: How many dimensions a component has.

    Returns:
        Three numbers, or None if the lines do not lie at equal distances.
    """
    sizes = list(zip(x.shape, x.stride(), strict=True))
    batch, component = sizes[: x.ndim - ndim], sizes[x.ndim - ndim :]
    if not columns:
        length = math.prod(x.shape[x.ndim - ndim :])
        inside = sorted(component, key=lambda dimension: -dimension[1])
        return (length, 1, 1) if _follow([*batch, *inside]) else None
    rows, width = x.shape[-2:]
    if _follow([*batch, component[1], component[0]]):
        return rows, 1, width
    return (rows, width, width) if _follow([*batch, *component]) else None


def _follow(dimensions: Sequence[tuple[int, int]]) -> bool:
    """Whether sizes and strides are those of a contiguous tensor."""
    step = 1
    for size, stride in reversed(dimensions):
        if size > 1 and stride != step:
            return False
        step *= size
    return True
