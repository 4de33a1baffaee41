"""One step, for every optimiser, rule and path.

A step routes the weights to paths, measures ``R²`` of every group, refuses or skips what is not finite, computes ``τ``
once, moves everything, and records. A batch in which nothing can be refused may measure and move at once. Parameters
without a manifold follow, by torch's own function for SGD. :class:`Stepper` takes such steps for the weights that an
optimiser collects. It contains no formula: ``τ`` is in :mod:`~fgo_geo.optim.step_size`, the policy for gradients that
are not finite in :mod:`~fgo_geo.optim.finite`, and the computation in :mod:`fgo_geo.paths`.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import geoopt
import torch
from torch import Tensor
from torch.optim.sgd import sgd

from fgo_geo.linalg import whole, write_whole
from fgo_geo.manifolds import REPLACED, lost_manifold, replaced_error
from fgo_geo.optim.finite import Measured, is_tiny, settle
from fgo_geo.optim.groups import group_curvatures, group_norms
from fgo_geo.optim.requests import Exchange, StepRequest
from fgo_geo.optim.step_size import SPIKE, step_scale, theorem_step_bound
from fgo_geo.paths.protocol import Batch, StepOptions, Weight
from fgo_geo.paths.router import Router

__all__ = ["Stepper", "between_graphs", "exchange_by", "manifold_of"]

_Function = TypeVar("_Function", bound=Callable[..., Any])

_DECAY = 0.99  # of the running mean of R²


_make_exchange: list[Callable[[dict[Tensor, Any], Callable[[Tensor], str], Tensor], Exchange]] = []


def exchange_by(make: Callable[[dict[Tensor, Any], Callable[[Tensor], str], Tensor], Exchange]) -> None:
    """Register the class that exchanges sharded weights. :mod:`fgo_geo.distributed` calls this when it is imported.

    Args:
        make: From the optimiser's state, the function that names parameters and a sharded parameter, an exchange.
    """
    _make_exchange[:] = [make]


@dataclass(frozen=True)
class _Record:
    """How to get ``τ`` of the groups of a batch, None if all are one."""

    batch: Batch
    owners: list[Tensor]
    tau: Callable[[], Tensor | None]


class Stepper:
    """Takes steps, and keeps what the next step can use.

    Args:
        optimizer: Name of the optimiser, for messages.
        name_of: The name of a parameter, for messages.
        state: The optimiser's state by parameter, which holds momentum and running norms.
        unchanged: What a refusal leaves as it was, for messages.
    """

    def __init__(
        self,
        optimizer: str,
        name_of: Callable[[Tensor], str],
        state: dict[Tensor, Any],
        unchanged: str = "no parameter was changed",
    ) -> None:
        self._unchanged = unchanged
        self._optimizer = optimizer
        self._name_of = name_of
        self._state = state
        self._routers: dict[int, Router] = {}
        self._records: list[_Record] = []
        self._left_out: dict[torch.device, Tensor] = {}
        self._shortened: dict[torch.device, Tensor] = {}
        self._exchange: Exchange | None = None
        self._received: dict[Tensor, Tensor] = {}
        self._constants: weakref.WeakKeyDictionary[Batch, dict[bool, tuple[Tensor, Tensor]]]
        self._constants = weakref.WeakKeyDictionary()

    def step(self, requests: Sequence[StepRequest]) -> None:
        """Take one step.

        Args:
            requests: One per parameter group.

        Raises:
            FloatingPointError: If a gradient on a manifold is not finite and that is checked. Nothing has changed then.
        """
        if self._exchange is None:
            self._take(requests)
        else:
            self._take(self._exchange.collect(requests), self._exchange)
            _write_back(requests)
        for request in requests:
            shared = [own for own in request.plain if _is_shared(own[0])]
            self._step_plain(shared, request.options)  # torch steps sharded tensors in one call, or others, not both
            others = [own for own in request.plain if not _is_shared(own[0])] if shared else request.plain
            self._step_plain(others, request.options)

    def _step_plain(self, plain: Sequence[tuple[Tensor, Tensor]], options: StepOptions) -> None:
        """The step of :class:`torch.optim.SGD`, bit for bit."""
        if not plain:
            return
        grads = [grad for _, grad in plain]
        if options.nesterov and options.weight_decay == 0 and not options.maximize:
            grads = [grad.clone() for grad in grads]  # torch's multi-tensor Nesterov step writes into its gradients
        buffers = [self.momentum_of(param, param) if options.momentum != 0 else None for param, _ in plain]
        lr = options.lr
        sgd(
            [param for param, _ in plain],
            grads,
            buffers,
            foreach=options.foreach,
            fused=options.fused,
            weight_decay=options.weight_decay,
            momentum=options.momentum,
            lr=cast(float, lr.squeeze() if isinstance(lr, Tensor) else lr),  # torch 2.6 takes no dimensions
            dampening=options.dampening,
            nesterov=options.nesterov,
            maximize=options.maximize,
        )
        for (param, _), buffer in zip(plain, buffers, strict=True):
            if buffer is not None:
                self._state[param]["momentum_buffer"] = buffer

    def meet(self, param_groups: Sequence[dict[str, Any]]) -> None:
        """Find the processes that share weights with this one, before an error of one of them can make others wait."""
        for group in param_groups if self._exchange is None else ():
            for param in group["params"]:
                if _is_shared(param) and (group.get("adapt_euclidean") or manifold_of(param) is not None):
                    self._exchange = _make_exchange[0](self._state, self._name_of, param)
                    return

    def agree(self, error: Exception | None) -> None:
        """Raise on this process, and on all that share weights with it, if one of them has an error."""
        if self._exchange is not None:
            self._exchange.agree(error)
        if error is not None:
            raise error

    def _take(self, requests: Sequence[StepRequest], exchange: Exchange | None = None) -> None:
        """Route, measure, refuse, and move; after a collective refusal nothing has changed on any process."""
        self._routers = {n: self._routers.get(n) or Router() for n in range(len(requests))}
        batches: list[tuple[StepRequest, Batch, bool]] = []
        measured: list[tuple[StepRequest, Measured]] = []
        swept: set[Batch] = set()
        error: Exception | None = None
        try:
            try:
                for request, router in zip(requests, self._routers.values(), strict=True):
                    routed = router.route(request.weights, request.options)
                    batches += [(request, b, not router.is_recorded and b.device.type == "cpu") for b in routed]
                swept = {batch for r, batch, is_free in batches if is_free and _is_swept(r, batch)}
                measured = [
                    (r, Measured(batch, r.options, is_free, r.check_finite, batch.measure(r.options)))
                    for r, batch, is_free in batches
                    if batch not in swept
                ]
            except Exception as problem:
                error = problem
            if exchange is not None:
                error = exchange.add_up([own for _, own in measured], error)
            try:
                if error is None and not all(_is_finite(own) for _, own in measured):
                    settle([own for _, own in measured], self._name_of, self._optimizer, self._unchanged)
            except Exception as problem:
                error = problem
            if exchange is not None:
                exchange.agree(error)
            if error is not None:
                raise error
            for _, own in measured:
                if own.kept is not None:
                    self._count(self._left_out, own.batch, ~own.kept)
            self._records.clear()
            self._received = {}
            of_batch = {own.batch: own for _, own in measured}
            for request, batch, _ in batches:  # those that stage parts for others come first
                self._sweep(request, batch) if batch in swept else self._move(request, of_batch[batch])
            if exchange is not None:
                self._received = exchange.put_back(self._scales())
            _write_back(requests)
            for _, batch, _ in batches:
                batch.finish()
        finally:
            error = None  # its traceback holds this frame
            for _, batch, _ in batches:  # hold on to no gradient until the next step
                for weight in batch.weights:
                    weight.grad = weight.buffer = None
                    weight.staged.clear()

    def collect(
        self, params: Iterable[Tensor], manifolds: Mapping[Tensor, geoopt.Manifold]
    ) -> Iterator[tuple[Tensor, geoopt.Manifold | None, Tensor]]:
        """Parameters that have a gradient, each with its manifold and its gradient.

        Args:
            params: Parameters.
            manifolds: Those on which the optimiser was given its parameters.

        Raises:
            RuntimeError: If a parameter was replaced or has lost its manifold, or its gradient is sparse.
        """
        for param in params:
            if getattr(param, REPLACED, False):
                raise replaced_error(f"{self._optimizer}: {self._name_of(param)}")
            grad = param.grad
            if grad is None or param.numel() == 0:
                continue
            if grad.is_sparse:
                raise RuntimeError(
                    f"{self._optimizer}: the gradient of {self._name_of(param)} is sparse, expected a dense one; build "
                    "the layer with sparse=False or use geoopt's SparseRiemannianSGD for it"
                )
            manifold = manifold_of(param)
            if manifold is None and param in manifolds:
                raise lost_manifold(manifolds[param], f"{self._optimizer}: {self._name_of(param)}")
            yield param, manifold, grad

    def forget(self) -> None:
        """Drop all work that is kept from step to step, so that continuing and resuming give identical bits."""
        self._routers.clear()

    def _move(self, request: StepRequest, own: Measured) -> None:
        """Compute ``τ`` of a batch, move it, and record."""
        batch, options = own.batch, own.options
        _allocate(batch, options)
        norm = own.squared.sqrt() if own.unit is None else own.squared.sqrt() * own.unit
        before = self._norm_before(batch, norm) if request.running else None
        tau = step_scale(norm if before is None else before, options, *self._constants_of(batch, options))
        if before is not None and tau is not None:
            tau = self._shortening(own, norm, before, tau)
        if tau is not None and own.is_free and bool((tau == 1).all()):
            tau = None
        scale = None if tau is None else tau.reciprocal()
        if own.unit is not None:
            scale = own.unit if scale is None else own.unit * scale
        if own.kept is not None:
            scale = torch.where(own.kept, torch.ones_like(norm) if scale is None else scale, 0)
        batch.move(options, scale, leaves_out=own.kept is not None)
        self._record(batch, lambda: tau)

    def _sweep(self, request: StepRequest, batch: Batch) -> None:
        """Measure and move a batch at once, and record."""
        options = request.options
        _allocate(batch, options)
        curvatures, norms = self._constants_of(batch, options)
        squared = batch.sweep(options, curvatures, leaves_out=request.check_finite is False)
        if not math.isfinite(float(squared.sum())):
            finite = torch.isfinite(squared)
            self._count(self._left_out, batch, ~finite)
            squared = torch.where(finite, squared, 0)
        self._record(batch, lambda: step_scale(squared.sqrt(), options, curvatures, norms))

    def _record(self, batch: Batch, tau: Callable[[], Tensor | None]) -> None:
        """Keep ``τ`` for :meth:`step_scales`, and momentum for the next step."""
        self._records.append(_Record(batch, [weight.owner for weight in batch.weights], tau))
        for weight in batch.weights:
            if weight.buffer is None or weight.staged:
                continue
            if self._exchange is None or not _is_lent(weight):
                self._state[weight.owner]["momentum_buffer"] = weight.buffer

    def _constants_of(self, batch: Batch, options: StepOptions) -> tuple[Tensor | None, Tensor | None]:
        """Curvature bounds and norms of the groups, as far as the step size asks for them."""
        wants_curvature = options.step_size == "theorem" and options.curvature is None
        if not wants_curvature and options.step_size != "angle":
            return None, None
        known = self._constants.setdefault(batch, {})
        if options.radius_invariant not in known:
            bounds = [_of_groups(w, group_curvatures, options.radius_invariant) for w in batch.weights]
            norms = [_of_groups(w, group_norms) for w in batch.weights]
            constants = torch.cat(bounds).to(batch.device), torch.cat(norms).to(batch.device)
            known[options.radius_invariant] = constants
        bounds, norms = known[options.radius_invariant]
        return (bounds if wants_curvature else None), norms

    def _norm_before(self, batch: Batch, norm: Tensor) -> Tensor:
        """The running norm of earlier steps, without this gradient; in the first step, the norm of this gradient."""
        means = [_here(weight, self._state[weight.owner].get("norm_squared")) for weight in batch.weights]
        unknown = norm.new_full((), math.nan)
        mean = torch.cat([
            unknown.expand(count) if mean is None else mean.to(norm)
            for mean, count in zip(means, batch.counts, strict=True)
        ])  # fmt: skip
        return torch.where(mean.isnan(), norm, mean.sqrt())

    def _shortening(self, measured: Measured, norm: Tensor, before: Tensor, tau: Tensor) -> Tensor:
        """``τ``, raised for gradients whose step would exceed ``SPIKE`` times the bound; updates the running norm.

        A skipped gradient does not enter the running norm.
        """
        batch, options = measured.batch, measured.options
        shortest = norm / (SPIKE * theorem_step_bound(options.rho))
        is_spike = shortest > tau
        self._count(self._shortened, batch, is_spike)
        taken = torch.where(is_spike, norm * tau / shortest, norm)
        mean = torch.lerp(taken.square(), before.square(), _DECAY)
        is_new = torch.ones_like(mean, dtype=torch.bool)
        for mask in (batch.owned, measured.kept):
            is_new = is_new if mask is None else is_new & mask
        parts = (mean, is_new)
        for weight, own, mask in zip(batch.weights, *(t.split(batch.counts) for t in parts), strict=True):
            state, share = self._state[weight.owner], weight.share
            previous = state.get("norm_squared")
            other = own.new_full((), math.nan) if previous is None else cast(Tensor, _here(weight, previous)).to(own)
            now = torch.where(mask, own, other).to(torch.promote_types(weight.owner.dtype, torch.float32))
            if share is not None:  # known norms of other groups stay until the processes exchange them
                known = now.new_full((share.n_groups,), math.nan) if previous is None else previous.to(now)
                now = known.index_copy(0, share.groups, now)
            state["norm_squared"] = now
        return torch.maximum(tau, shortest)

    def _count(self, counts: dict[torch.device, Tensor], batch: Batch, which: Tensor) -> None:
        """Count groups of a batch, each on one process."""
        more = (which if batch.counted is None else which & batch.counted).sum()
        before = counts.get(more.device)
        counts[more.device] = more if before is None else before + more

    # -- state and records -----------------------------------------------------------------------------------

    def momentum_of(self, param: Tensor, point: Tensor) -> Tensor | None:
        """The momentum of a parameter, in the type, on the device and with the strides of what is moved.

        The stored momentum differs in these after ``model.double()`` or ``model.to(...)`` has converted or moved the
        weight.

        Args:
            param: A parameter of the optimiser.
            point: What a step moves: the parameter, or a copy of it in another type.

        Returns:
            The momentum, or None before the first step.
        """
        state = self._state.get(param)
        buffer = None if state is None else state.get("momentum_buffer")
        if buffer is None or state is None:
            return None
        if buffer.dtype != point.dtype or buffer.device != point.device or buffer.stride() != point.stride():
            buffer = state["momentum_buffer"] = torch.empty_like(point.detach()).copy_(buffer)
        return buffer

    def project_momentum(self, param: Tensor, point: Tensor, manifold: geoopt.Manifold) -> None:
        """Project the momentum of a parameter onto the tangent space at a point.

        Args:
            param: A parameter of the optimiser.
            point: What a step moves: the parameter, or a copy of it in another type.
            manifold: Its manifold.
        """
        buffer = self.momentum_of(param, point)
        if buffer is not None:
            write_whole(buffer, manifold.proju(whole(point), whole(buffer)))

    def step_scales(self, param_groups: Sequence[dict[str, Any]]) -> dict[Tensor, Tensor]:
        """``τ`` of every group in the latest step, by parameter, in the order of the parameter groups."""
        shared = {} if self._exchange is None else self._exchange.scales()
        scales = {**self._scales(), **self._received, **shared}
        return {param: scales[param] for group in param_groups for param in group["params"] if param in scales}

    def _scales(self) -> dict[Tensor, Tensor]:
        """``τ`` of the groups that were moved here."""
        scales: dict[Tensor, Tensor] = {}
        for record in self._records:
            batch, total = record.batch, sum(record.batch.counts)
            tau = record.tau()
            if tau is None:
                tau = torch.ones(total, dtype=torch.float64, device=batch.device)
            masks = [None] * len(batch.counts) if batch.owned is None else batch.owned.split(batch.counts)
            for owner, own, mask in zip(record.owners, tau.split(batch.counts), masks, strict=True):
                dtype = torch.promote_types(owner.dtype, torch.float32)
                own = own.clamp_max(torch.finfo(dtype).max).to(dtype)
                others = scales.get(owner)
                scales[owner] = own.clone() if mask is None or others is None else torch.where(mask, own, others)
        return scales

    def left_out(self) -> int:
        """How many group steps this process left out because the gradient was not finite (synchronises).

        A group whose components several processes have is counted by one of them, and so is a group of a weight that
        one process steps for all: the sum over the processes counts each once.
        """
        return sum(int(count) for count in self._left_out.values())

    def shortened(self) -> int:
        """How many gradients of groups this process shortened; each is counted by one process (synchronises)."""
        return sum(int(count) for count in self._shortened.values())


def _is_shared(tensor: Tensor) -> bool:
    """Whether a tensor is distributed over the processes of a device mesh; asked of every parameter in every step."""
    return hasattr(tensor, "device_mesh")


def _is_lent(weight: Weight) -> bool:
    """Whether a process steps a weight in place of a sharded parameter."""
    return _is_shared(weight.owner) and not _is_shared(weight.param)


def _write_back(requests: Sequence[StepRequest]) -> None:
    """Give parameters the values of what was moved in their place."""
    for request in requests:
        for weight in request.weights:
            if weight.owner is not weight.param and not _is_lent(weight):
                weight.owner.copy_(weight.param)


def _is_swept(request: StepRequest, batch: Batch) -> bool:
    """Whether one sweep may measure and move a batch: its step size needs nothing but the norm of the group."""
    if not batch.sweeps or request.running or request.options.step_size == "angle":
        return False
    if any(weight.share is not None and weight.is_spread for weight in batch.weights):
        return False
    return batch.can_sweep(request.options, request.check_finite is not False)


def _of_groups(weight: Weight, constants: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """Constants of a weight's groups, of all of their components."""
    share = weight.share
    if share is None:
        return constants(weight.manifold, tuple(weight.param.shape), *arguments)
    return constants(share.manifold, share.shape, *arguments)[share.groups.cpu()]


def _here(weight: Weight, values: Tensor | None) -> Tensor | None:
    """Of numbers of the owner's groups, those of the weight's."""
    if weight.share is None or values is None:
        return values
    return values.to(weight.share.groups.device).index_select(0, weight.share.groups)


def _allocate(batch: Batch, options: StepOptions) -> None:
    """Give momentum to the weights that have none yet."""
    for weight in batch.weights if options.keeps_buffer else ():
        if weight.buffer is None:
            weight.buffer = torch.zeros_like(weight.param.detach())


def _is_finite(own: Measured) -> bool:
    """Whether all norms are finite, if this can be read without waiting; False otherwise."""
    if not own.is_free or not math.isfinite(float(own.squared.sum())):
        return False
    return own.options.step_size != "angle" or not is_tiny(own)


def manifold_of(param: Tensor) -> geoopt.Manifold | None:
    """The manifold of a constrained parameter, None for a plain one (Geoopt's Euclidean manifold included)."""
    manifold = getattr(param, "manifold", None)
    if manifold is None:
        return None
    constrained = isinstance(manifold, geoopt.Manifold) and not isinstance(manifold, geoopt.Euclidean)
    return manifold if constrained else None


def between_graphs(function: _Function) -> _Function:
    """Let ``torch.compile`` run a function uncompiled, between its graphs: a compiled step would be slower."""
    return torch._disable_dynamo(function)  # pyright: ignore  torch.compiler.disable would import the compiler now
