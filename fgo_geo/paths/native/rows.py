"""The compiled path of kernels whose groups are within rows (PO, channels_last): one sweep over memory.

The sweep measures and moves each row while it is in the cache, which saves two of seven passes. It therefore moves some
rows before it measures others. If the optimiser checks gradients, the path uses this sweep only if it can refuse no
row: the gradients show that no norm overflows, and the weights have not changed since the last step. Otherwise the step
takes two sweeps. If the check is off, the step refuses nothing, and the path does not read the gradients beforehand.
Bounds on the norms, which the other compiled paths look at first, would save arithmetic here but no pass over memory:
with them the step of ResNet-18's kernels took 1.1 times as long (unchecked: 1.4 times).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from fgo_geo.paths.kernel_tables import KernelTable, table_of
from fgo_geo.paths.native.kernels import KernelBatch, NativeKernels
from fgo_geo.paths.protocol import Claim, Refusal, StepOptions, Weight

__all__ = ["NativeRows", "RowBatch"]


class NativeRows(NativeKernels):
    """The path of planar kernels, no group of which has kernels of two rows."""

    name = "one compiled sweep over rows of kernels"

    def accepts(self, weight: Weight, parts: tuple[int, ...], options: StepOptions) -> tuple[int, ...] | Refusal:
        """All parts of a weight of such kernels, or none."""
        param = weight.param
        if param.ndim < 3 or param.stride(1) != 1 or min(param.shape[:2]) == 1:
            return ()
        answer = super().accepts(weight, parts, options)
        return answer if isinstance(answer, Refusal) or _has_groups_within_rows(table_of(weight)) else ()

    def batch(self, claims: Sequence[Claim]) -> RowBatch:
        """One call for all weights."""
        return RowBatch(claims)


class RowBatch(KernelBatch):
    """Weights of kernels that can be stepped row by row."""

    def can_sweep(self, options: StepOptions, checks: bool) -> bool:
        """Whether the weights have not changed since the last step, and gradients show that all norms are finite."""
        if checks and not self.is_unchanged():
            return False
        self.set_addresses()
        return not checks or self.run("fgo_large", options) == 0

    def sweep(self, options: StepOptions, curvatures: Tensor | None, leaves_out: bool) -> Tensor:
        """Measure and move, row by row."""
        for _, entry in self.entries:
            place = entry.squared_norms - self.norms.data_ptr()
            entry.curvatures = None if curvatures is None else curvatures.data_ptr() + place
        self.norms.zero_()
        self.update("fgo_step", options, leaves_out)
        self.leaves_finite = math.isfinite(float(self.norms.sum()))
        return self.norms.clone()  # its memory is used again


def _has_groups_within_rows(table: KernelTable) -> bool:
    """Whether no group has kernels of two rows."""
    if table.row_groups is None:
        return False
    groups = table.row_groups[table.row_groups >= 0]
    return len(groups.unique()) == len(groups)
