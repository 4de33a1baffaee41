"""The compiled path of matrices that belong to several manifolds: lines and Stiefel blocks, one weight after the other.

It takes the weights whose parts the paths of lines and of Stiefel matrices take between them, and does what these do.
Its sweep measures and moves each weight while it is in the cache, which saves half of the passes over memory. Like that
of :mod:`~fgo_geo.paths.native.rows`, it moves some weights before it measures others, and under a check it is taken
only where the gradients show that all norms are finite, and the weights have not changed since the last step. A block
that became NaN ends the sweeps, since it cannot be retracted. A line that the momentum made NaN is left as it is in the
step after, and refused in the one after that.
"""

from __future__ import annotations

import ctypes
import itertools
import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from fgo_geo.manifolds import ProductOfGroups
from fgo_geo.paths.kernel_tables import gradient_of
from fgo_geo.paths.native.blocks import MatrixOptions
from fgo_geo.paths.native.kernels import BoundedBatch, Gradients
from fgo_geo.paths.native.library import library, threads_for
from fgo_geo.paths.native.line_tables import LineTable, table_of
from fgo_geo.paths.native.lines import LineBatch, NativeLines
from fgo_geo.paths.native.stiefel import NativeStiefel, StiefelBatch, tables_of
from fgo_geo.paths.protocol import Batch, Claim, Path, Refusal, StepOptions, Weight

__all__ = ["MatrixBatch", "NativeMatrices"]

_MOST_ENTRIES = 2**22  # so that weight, gradient and momentum fit the cache that all cores share


class NativeMatrices(Path):
    """The path of float32 matrices of lines and Stiefel blocks on the CPU."""

    name = "compiled sweeps over matrices"

    def __init__(self) -> None:
        self._lines, self._stiefel = NativeLines(), NativeStiefel()

    def accepts(self, weight: Weight, parts: tuple[int, ...], options: StepOptions) -> tuple[int, ...] | Refusal:
        """All parts of a weight, or none."""
        if len(parts) < weight.n_parts or weight.param.numel() > _MOST_ENTRIES:
            return ()
        lines = self._lines.accepts(weight, parts, options)
        if isinstance(lines, Refusal):
            return lines
        blocks = tuple(part for part in parts if part not in lines)
        return parts if blocks and self._stiefel.accepts(weight, blocks, options) == blocks else ()

    def batch(self, claims: Sequence[Claim]) -> Batch:
        """One call for all weights."""
        return MatrixBatch(claims)


class _Matrix(ctypes.Structure):
    """``fgo_matrix`` of matrices.cpp: one weight."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("lines", "blocks", "squared_norms", "scales", "curvatures")),
        *((name, ctypes.c_int64) for name in ("groups", "n_blocks", "is_left")),
    )


class MatrixBatch(BoundedBatch):
    """Weights that can be stepped one after the other."""

    def __init__(self, claims: Sequence[Claim]) -> None:
        claims = sorted(claims, key=lambda claim: -claim.weight.param.numel())  # about the order in which they move
        super().__init__(claims)
        scales = torch.empty(sum(self.counts), dtype=torch.float32)
        tables = [cast(LineTable, table_of(cast(ProductOfGroups, w.manifold), w.param)) for w in self.weights]
        others = [table.other_parts for table in tables]
        parts = ([part for part in claim.parts if part not in own] for claim, own in zip(claims, others, strict=True))
        self._lines = LineBatch(
            [Claim(w, tuple(p)) for w, p in zip(self.weights, parts, strict=True)], self.norms, scales
        )
        blocks = [Claim(w, own) for w, own in zip(self.weights, others, strict=True)]
        self._stiefel = StiefelBatch(blocks, self.norms, scales)
        self._stiefel.stage()
        self._lines.take_staged()
        radii = [_largest_radius(w, table) for w, table in zip(self.weights, tables, strict=True)]
        self._gradients = Gradients([weight.param.numel() for weight in self.weights], radii)
        self._entries = (_Matrix * len(claims))()
        self._curvatures: Tensor | None = None
        first_blocks = itertools.accumulate(map(len, others), initial=0)
        every = zip(self._entries, self._lines.entries, first_blocks, others, self.counts, strict=False)
        for entry, lines, block, own, count in every:
            entry.lines, entry.blocks = ctypes.addressof(lines), ctypes.addressof(self._stiefel.entries[block])
            entry.squared_norms, entry.scales = lines.squared_norms, lines.scales
            entry.groups, entry.n_blocks = count, len(own)

    def measure(self, options: StepOptions) -> Tensor:
        """``R²`` of all groups; the next step reuses the memory of the result."""
        self._stiefel.measure(options)
        self._lines.set_addresses()
        self._lines.run("fgo_line_norms", options)
        return self.norms

    def move(self, options: StepOptions, scale: Tensor | None, leaves_out: bool) -> None:
        """The step of all weights, in place."""
        self._stiefel.move(options, scale, leaves_out)
        self._lines.move(options, scale, leaves_out)
        self.leaves_finite = self._stiefel.leaves_finite and math.isfinite(float(self.norms.sum()))

    def bound(self, options: StepOptions) -> int:
        """How many weights have gradients that do not show that all norms are finite."""
        addresses = [gradient_of(weight).data_ptr() for weight in self.weights]
        return self._gradients.count_large(addresses, MatrixOptions.of(options), threads_for(self._lines.work))

    def can_sweep(self, options: StepOptions, checks: bool) -> bool:
        """Whether the weights have not changed since the last step, and gradients show that all norms are finite."""
        if any(weight.first for weight in self.weights):
            return False
        return not checks or (self.is_unchanged() and self.bound(options) == 0)

    def sweep(self, options: StepOptions, curvatures: Tensor | None, leaves_out: bool) -> Tensor:
        """Measure and move, weight by weight."""
        for entry in () if curvatures is self._curvatures else self._entries:
            place = entry.squared_norms - self.norms.data_ptr()
            entry.curvatures = None if curvatures is None else curvatures.data_ptr() + place
        self._curvatures = curvatures
        addresses: list[int | None] = []
        for weight in self.weights:
            buffer = weight.buffer
            addresses += (weight.param.data_ptr(), gradient_of(weight).data_ptr())
            addresses.append(None if buffer is None else buffer.data_ptr())
        torch.autograd.graph.increment_version([weight.param for weight in self.weights])
        with torch.profiler.record_function("fgo_matrix_step"):
            numbers, threads = MatrixOptions.of(options), threads_for(self._lines.work + self._stiefel.work)
            places, count = (ctypes.c_void_p * len(addresses))(*addresses), ctypes.c_int64(len(self._entries))
            step, last = cast(ctypes.CDLL, library()).fgo_matrix_step, (ctypes.c_int(leaves_out), ctypes.c_int(threads))
            left = step(self._entries, places, count, ctypes.byref(numbers), *last)
        for k in [k for k, entry in enumerate(self._entries) if entry.is_left] if left else ():
            self._stiefel.factorise(self.weights[k])
            self._lines.run("fgo_line_update", options, slice(k, k + 1))
        self.leaves_finite = left == 0 and not leaves_out and math.isfinite(float(self.norms.sum()))
        return self.norms.clone()  # its memory is used again


def _largest_radius(weight: Weight, table: LineTable) -> float:
    radii = torch.cat([cast(Tensor, table.radii), *(own.radii for own in tables_of(weight).values())])
    return float(radii[radii.isfinite()].amax())
