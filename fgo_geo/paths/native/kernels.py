"""The compiled path of kernels on the CPU: two sweeps over memory for all weights of a parameter group.

A projection shortens vectors, so ``R`` is at most the norm of the Euclidean gradient. If this norm is small in every
group, as is usual in training, all ``τ`` are one for any ``R``, and the first sweep only reads gradients.
"""

from __future__ import annotations

import abc
import ctypes
import itertools
import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from fgo_geo.paths.kernel_tables import LARGEST, KernelTable, gradient_of, place_of, problem_of, table_of
from fgo_geo.paths.native.library import NOT_BUILT, PER_THREAD, library
from fgo_geo.paths.protocol import Batch, Claim, Path, Reason, Refusal, StepOptions, Weight

__all__ = ["BoundedBatch", "Gradients", "KernelBatch", "NativeKernels"]


class NativeKernels(Path):
    """The path of kernels in single and double precision on the CPU, of any mix of the four kinds."""

    name = "compiled sweeps over kernels"

    def accepts(self, weight: Weight, parts: tuple[int, ...], options: StepOptions) -> tuple[int, ...] | Refusal:
        """All parts of a weight of kernels, or none."""
        if weight.param.device.type != "cpu":
            return Refusal(Reason.DEVICE, f"the compiled sweeps run on the CPU, the weight is on {weight.param.device}")
        problem = problem_of(weight, options)
        if problem is not None:
            return problem
        size = table_of(weight).size
        if size[0] > LARGEST[0] or size[1] > LARGEST[1]:  # which is what fused.cpp has room for
            return Refusal(Reason.SIZE, f"components of {size} are larger than {LARGEST}")
        return parts if library() is not None else Refusal(Reason.MISSING, NOT_BUILT)

    def batch(self, claims: Sequence[Claim]) -> Batch:
        """One call per sweep and type for all weights."""
        return KernelBatch(claims)


class _Kernels(ctypes.Structure):
    """``fgo_kernels`` of fused.cpp: the kernels of one weight."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("weight", "grad", "buffer", "codes", "row_groups", "radii")),
        *((name, ctypes.c_void_p) for name in ("squared_norms", "scales", "curvatures")),
        ("radius", ctypes.c_double * 4),
        *((name, ctypes.c_int64) for name in ("rows", "columns", "row_stride", "column_stride")),
        *((name, ctypes.c_int32) for name in ("a", "b", "i_stride", "j_stride", "first", "skips")),
        ("groups", ctypes.c_int64),
    )


class _Options(ctypes.Structure):
    """``fgo_options`` of fused.cpp."""

    _fields_ = (
        *((name, ctypes.c_double) for name in ("lr", "momentum", "dampening", "weight_decay", "rho", "curvature")),
        *((name, ctypes.c_int32) for name in ("nesterov", "maximize", "radius_invariant", "constant")),
    )


_PAUSE = 15  # steps without another look after gradients that were too long


class BoundedBatch(Batch):
    """Weights whose step may go without ``R²``.

    Attributes:
        norms: ``R²`` of all groups, or bounds on them, float64; the memory is that of the latest sweep.
        leaves_finite: Whether the latest step left finite weights, as far as norms can show.
    """

    sweeps = True

    def __init__(self, claims: Sequence[Claim]) -> None:
        super().__init__(claims)
        self.norms = torch.empty(sum(self.counts), dtype=torch.float64)
        self.leaves_finite = False
        self._known: list[tuple[int, int]] | None = None  # versions of the weights after the latest step
        self._pause = 0

    def finish(self) -> None:
        """Record the versions of the weights."""
        self._known = self._versions() if self.leaves_finite else None

    def _versions(self) -> list[tuple[int, int]] | None:
        """Address and version of every weight; None if changes are not counted."""
        params = [weight.param for weight in self.weights]
        if any(param.is_inference() for param in params):
            return None
        return [(param.data_ptr(), param._version) for param in params]  # pyright: ignore[reportPrivateUsage]

    def is_unchanged(self) -> bool:
        """Whether the weights have not changed since a step that left them finite."""
        return self._known is not None and self._versions() == self._known

    def can_sweep(self, options: StepOptions, checks: bool) -> bool:
        """Whether weights have not changed since the last step, and gradients show that every ``τ`` is one."""
        if (options.step_size == "theorem" and options.curvature is None) or not self.is_unchanged():
            return False
        if self._pause:
            self._pause -= 1
            return False
        self._pause = 0 if self.bound(options) == 0 else _PAUSE
        return self._pause == 0

    def sweep(self, options: StepOptions, curvatures: Tensor | None, leaves_out: bool) -> Tensor:
        """The step without scales; bounds take the place of ``R²``, with the same ``τ``."""
        self.move(options, None, leaves_out=False)
        return self.norms.clone()  # its memory is used again

    @abc.abstractmethod
    def bound(self, options: StepOptions) -> int:
        """How many groups may have a ``τ`` above one; writes bounds on ``R²``. Changes no weight."""


class Gradients:
    """The gradients of float32 weights, in which the extension looks for large ones.

    Args:
        sizes: Number of entries of every weight.
        radii: The largest radius of every weight.
    """

    def __init__(self, sizes: Sequence[int], radii: Sequence[float]) -> None:
        numbers = zip(sizes, radii, strict=True)
        ones = (1.0, 1.0, 1.0)
        self._entries = (_Kernels * len(sizes))(
            *(_Kernels(radius=(ctypes.c_double * 4)(r, *ones), rows=1, columns=n, a=1, b=1) for n, r in numbers)
        )

    def count_large(self, addresses: Sequence[int], options: ctypes.Structure, threads: int) -> int:
        """How many weights have gradients that do not show by themselves that all ``R²`` are finite."""
        for entry, address in zip(self._entries, addresses, strict=True):
            entry.grad = address
        entries, count = self._entries, ctypes.c_int64(len(self._entries))
        with torch.profiler.record_function("fgo_large"):
            return cast(ctypes.CDLL, library()).fgo_large(
                entries, count, ctypes.byref(options), 0, ctypes.c_int(threads)
            )


class KernelBatch(BoundedBatch):
    """The weights as the extension takes them, by type. Between steps only addresses change."""

    def __init__(self, claims: Sequence[Claim]) -> None:
        super().__init__(claims)
        self._tables = [table_of(weight) for weight in self.weights]  # the extension reads their memory
        self._radii: list[Tensor] = []
        groups, first_groups = sum(self.counts), list(itertools.accumulate(self.counts, initial=0))
        self.entries: list[tuple[Weight, _Kernels]] = []
        self._calls: list[
            tuple[ctypes.Array[_Kernels], int, int]
        ] = []  # entries, their number of weights, whether double
        self._scales: dict[torch.dtype, Tensor] = {}
        for dtype in {weight.param.dtype for weight in self.weights}:
            scales = self._scales[dtype] = torch.empty(groups, dtype=dtype)
            members = [k for k, weight in enumerate(self.weights) if weight.param.dtype == dtype]
            entries = (_Kernels * len(members))(*(self._entry(self.weights[k], self._tables[k]) for k in members))
            for k, entry in zip(members, entries, strict=True):
                entry.squared_norms = self.norms.data_ptr() + first_groups[k] * self.norms.itemsize
                entry.scales = scales.data_ptr() + first_groups[k] * dtype.itemsize
                self.entries.append((self.weights[k], entry))
            work = sum(self.weights[k].param.numel() for k in members)
            self._calls.append((entries, work, int(dtype == torch.float64)))

    def _entry(self, weight: Weight, table: KernelTable) -> _Kernels:
        """The entry of a weight but for its addresses."""
        place = place_of(weight, table, by_rows=table.row_groups is not None)
        assert place is not None
        row_groups = table.row_groups if place.rows > 1 else None
        radii = None if table.radii is None else table.radii.to(weight.param.dtype)
        if radii is not None:
            self._radii.append(radii)
        return _Kernels(
            codes=table.codes.data_ptr(),
            row_groups=None if row_groups is None else row_groups.data_ptr(),
            radii=None if radii is None else radii.data_ptr(),
            radius=(ctypes.c_double * 4)(*(1.0 if math.isnan(r) else r for r in table.radius)),
            rows=place.rows,
            columns=place.columns,
            row_stride=place.row_stride,
            column_stride=place.column_stride,
            a=table.size[0],
            b=table.size[1],
            i_stride=place.i_stride,
            j_stride=place.j_stride,
            groups=table.groups,
        )

    def measure(self, options: StepOptions) -> Tensor:
        """``R²`` of all groups; the next step reuses the memory of the result."""
        self.set_addresses()
        self.norms.zero_()
        self.run("fgo_norms", options)
        return self.norms

    def set_addresses(self) -> None:
        """Tell the extension where weights and gradients are in this step."""
        for weight, entry in self.entries:
            grad = weight.grad
            if grad is None or grad.stride() != weight.param.stride() or grad.is_neg():
                grad = gradient_of(weight)
            entry.weight, entry.grad = weight.param.data_ptr(), grad.data_ptr()

    def move(self, options: StepOptions, scale: Tensor | None, leaves_out: bool) -> None:
        """The step of all weights, in place."""
        for own in self._scales.values():
            own.fill_(1) if scale is None else own.copy_(scale)
        self.leaves_finite = self.update("fgo_update", options, leaves_out) == 0 and not leaves_out

    def bound(self, options: StepOptions) -> int:
        """How many groups may have a ``τ`` above one."""
        self.set_addresses()
        self.norms.zero_()
        return self.run("fgo_bounds", options)

    def update(self, function: str, options: StepOptions, leaves_out: bool) -> int:
        """Call a function that moves the weights; return the sum of its results."""
        for weight, entry in self.entries:
            entry.buffer = None if weight.buffer is None else weight.buffer.data_ptr()
            entry.first, entry.skips = weight.first, leaves_out
        torch.autograd.graph.increment_version([weight.param for weight in self.weights])
        return self.run(function, options)

    def run(self, function: str, options: StepOptions) -> int:
        """Call a function of the extension for all weights; return the sum of its results."""
        o = options
        bounds = (o.rho, 0.0 if o.curvature is None else o.curvature)
        flags = (o.nesterov, o.maximize, o.radius_invariant, o.step_size == "constant")
        numbers = _Options(float(o.lr), o.momentum, o.dampening, o.weight_decay, *bounds, *flags)
        total = 0
        with torch.profiler.record_function(function):
            most, call = torch.get_num_threads(), getattr(library(), function)
            for entries, work, is_double in self._calls:
                threads = ctypes.c_int(max(1, min(most, work // PER_THREAD)))
                total += call(entries, ctypes.c_int64(len(entries)), ctypes.byref(numbers), is_double, threads)
        return total
