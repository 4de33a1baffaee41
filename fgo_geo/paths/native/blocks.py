"""Blocks of a matrix whose blocks belong to several manifolds: copied out of it, and back, by compiled code."""

from __future__ import annotations

import ctypes

from torch import Tensor

from fgo_geo.paths.native.library import library, threads_for
from fgo_geo.weights.components import BlockPartition, FilterPartition

__all__ = ["Block", "block_of", "matrix_of", "take"]


class Block(ctypes.Structure):
    """``fgo_block`` of lines.cpp: blocks of equal shape, and their place in a matrix."""

    _fields_ = (
        ("matrix", ctypes.c_void_p),
        ("width", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("rows", "columns")),
        *((name, ctypes.c_int64) for name in ("n", "a", "b")),
        ("blocks", ctypes.c_void_p),
    )


def take(weight: Tensor, cut: BlockPartition | FilterPartition, part: int) -> Tensor:
    """The blocks of one part of a weight: ``cut.split(weight)[part]``, without reading the others.

    Args:
        weight: A weight in float32, or its gradient or momentum.
        cut: The partition of the weight.
        part: Number of the part.

    Returns:
        Blocks ``(n, A, B)``.
    """
    rows, columns = cut.rectangles(part)
    blocks = weight.new_empty(*rows.shape, columns.shape[1])
    matrix = cut.layout.channels(weight).flatten(1).contiguous()
    entry = block_of(matrix, cut, part, blocks)
    loaded = library()
    assert loaded is not None  # the path that leaves parts to others is compiled
    shape = (ctypes.c_int64(size) for size in (entry.n, entry.a, entry.b))
    addresses = (ctypes.c_void_p(own) for own in (entry.matrix, entry.rows, entry.columns, entry.blocks))
    own_matrix, own_rows, own_columns, own_blocks = addresses
    width, threads = ctypes.c_int64(entry.width), ctypes.c_int(threads_for(blocks.numel()))
    loaded.fgo_take(own_matrix, width, own_rows, own_columns, *shape, own_blocks, threads)
    return blocks.mT if rows.shape[1] < columns.shape[1] else blocks


def matrix_of(weight: Tensor, cut: BlockPartition | FilterPartition) -> Tensor | None:
    """The channels of a weight as a matrix in its memory; None if that matrix is not contiguous."""
    matrix = cut.layout.channels(weight).flatten(1)
    return matrix if matrix.data_ptr() == weight.data_ptr() and matrix.is_contiguous() else None


def block_of(matrix: Tensor, cut: BlockPartition | FilterPartition, part: int, blocks: Tensor) -> Block:
    """The structure that describes blocks of a part and their place in a matrix.

    Args:
        matrix: The channels of a weight, contiguous.
        cut: The partition of the weight.
        part: Number of the part.
        blocks: Blocks ``(n, rows, columns)``, as they are in the matrix, contiguous.
    """
    rows, columns = cut.rectangles(part)
    addresses = (rows.data_ptr(), columns.data_ptr())
    return Block(
        matrix.data_ptr(), matrix.shape[1], *addresses, *rows.shape, columns.shape[1], blocks.data_ptr()
    )  # fmt: skip
