"""Blocks of a matrix whose blocks belong to several manifolds: copied out of it, and back, by compiled code."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from fgo_geo.paths.native.library import library, threads_for
from fgo_geo.paths.protocol import StepOptions, Weight
from fgo_geo.weights.components import RectanglePartition

__all__ = ["Block", "MatrixOptions", "block_of", "matrix_of", "put", "take"]


class MatrixOptions(ctypes.Structure):
    """``fgo_matrix_options`` of common.hpp."""

    _fields_ = (
        *((name, ctypes.c_double) for name in ("lr", "momentum", "dampening", "weight_decay", "rho", "curvature")),
        *((name, ctypes.c_int32) for name in ("nesterov", "maximize", "radius_invariant", "constant")),
    )

    @classmethod
    def of(cls, options: StepOptions) -> MatrixOptions:
        """The hyper-parameters that compiled steps of matrices read."""
        o = options
        bounds = (o.rho, 0.0 if o.curvature is None else o.curvature)
        flags = (o.nesterov, o.maximize, o.radius_invariant, o.step_size == "constant")
        return cls(float(o.lr), o.momentum, o.dampening, o.weight_decay, *bounds, *flags)


class Block(ctypes.Structure):
    """``fgo_block`` of lines.cpp: blocks of equal shape, and their place in a matrix."""

    _fields_ = (
        ("matrix", ctypes.c_void_p),
        ("width", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("rows", "columns")),
        *((name, ctypes.c_int64) for name in ("n", "a", "b")),
        ("blocks", ctypes.c_void_p),
    )


def take(weight: Tensor, cut: RectanglePartition, part: int) -> Tensor:
    """The blocks ``(n, A, B)`` of a part of a float32 tensor: ``cut.split(weight)[part]``, without reading others."""
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


def matrix_of(weight: Tensor, cut: RectanglePartition) -> Tensor | None:
    """The channels of a weight as a matrix in its memory; None if that matrix is not contiguous."""
    matrix = cut.layout.channels(weight).flatten(1)
    return matrix if matrix.data_ptr() == weight.data_ptr() and matrix.is_contiguous() else None


def block_of(matrix: Tensor, cut: RectanglePartition, part: int, blocks: Tensor) -> Block:
    """The structure that describes contiguous blocks of a part, as they are in a contiguous matrix of channels."""
    rows, columns = cut.rectangles(part)
    addresses = (rows.data_ptr(), columns.data_ptr())
    return Block(
        matrix.data_ptr(), matrix.shape[1], *addresses, *rows.shape, columns.shape[1], blocks.data_ptr()
    )  # fmt: skip


def put(weights: Sequence[Weight], blocks: Sequence[Block]) -> None:
    """Write blocks into weights, and into their momentum, in one call."""
    if blocks:
        torch.autograd.graph.increment_version([weight.param for weight in weights])
        entries, threads = (Block * len(blocks))(*blocks), threads_for(sum(own.n * own.a * own.b for own in blocks))
        loaded = library()
        assert loaded is not None
        loaded.fgo_put(entries, ctypes.c_int64(len(blocks)), ctypes.c_int(threads))
