r"""The reference path: the step in batched torch operations, for every manifold, type and device.

The formulas of a step are here; every other path is tested against it. A step is the composition of small pure
functions on whole batches of components:

1. :meth:`~geoopt.Manifold.egrad2rgrad` projects the gradient onto the tangent space;
2. sums over groups of its squared norm are ``R²``;
3. a rule (:func:`~fgo_geo.paths.rules.momentum_sgd`) computes a direction from the gradient over ``τ`` and momentum;
4. ``_move_along`` follows a retraction or the exponential map.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import geoopt
import torch
from torch import Tensor

from fgo_geo.linalg import Use, Workspace
from fgo_geo.manifolds import ComponentManifold, EmbeddedManifold
from fgo_geo.paths.pieces import Job, LargeKernels, Piece, cut, jobs_of
from fgo_geo.paths.protocol import Batch, Claim, Path, StepOptions, Weight

__all__ = ["JobBatch", "Reference", "fgsgd_update", "measure", "step_bound"]

_UNKNOWN_LR_BOUND = 100.0  # assumed bound on ‖step‖ / r when the learning rate is a tensor that cannot be read for free


class Reference(Path):
    """The path that takes everything."""

    name = "batched torch code"

    def accepts(self, weight: Weight, parts: tuple[int, ...], options: StepOptions) -> tuple[int, ...]:
        """All parts of every weight."""
        return parts

    def batch(self, claims: Sequence[Claim]) -> JobBatch:
        """The claims as joined jobs."""
        return JobBatch(claims)


class JobBatch(Batch):
    """Weights cut into pieces and joined into jobs; subclasses compute the step of a job in another way."""

    def __init__(self, claims: Sequence[Claim]) -> None:
        super().__init__(claims)
        self.stages = not all(claim.is_whole for claim in claims)
        self._jobs = jobs_of(claims)
        self._order = torch.cat([job.index for job in self._jobs])
        shared = Workspace()
        self._large = {
            claim.weight: LargeKernels(claim.weight, shared) for claim in claims if LargeKernels.takes(claim)
        }

    def measure(self, options: StepOptions) -> Tensor:
        """Project all gradients; ``R²`` of all groups."""
        points, grads = self._cut(Use.POINTS), self._cut(Use.GRADIENTS)
        sums: list[Tensor] = []
        for job in self._jobs:
            job.x, job.grad = self._joined(job, points, Use.POINTS), self._joined(job, grads, Use.GRADIENTS)
            with job.naming_errors():
                sums.append(self.measure_job(job, options))
                job.require_components("egrad2rgrad", job.grad, is_finite=False)
            large = self._large.get(job.pieces[0].weight)
            if large is not None:
                job.grad = large.keep(Use.GRADIENTS, job.pieces[0].part, job.grad)
        squared = torch.cat(sums)
        return squared.new_zeros(sum(self.counts)).index_copy_(0, self._order, squared)

    def move(self, options: StepOptions, scale: Tensor | None, leaves_out: bool) -> None:
        """Move all jobs, and write every weight at once."""
        momentum = self._cut(Use.MOMENTUM)
        for job in self._jobs:
            if _tensor(job.pieces[0].weight, Use.MOMENTUM) is not None:
                job.buffer = self._joined(job, momentum, Use.MOMENTUM)
            factors = None if scale is None else scale.index_select(0, job.index).to(job.x.dtype)
            if leaves_out and factors is not None:
                job.grad = torch.where(job.spread(factors > 0), job.grad, 0)
            with job.naming_errors():
                x, buffer = self.move_job(job, options, factors)
                # Without that check, components that are not finite themselves are left out, and stay as they are.
                job.require_components(_method(job, options, buffer), x, is_finite=not leaves_out)
            buffers = [None] * len(job.pieces) if buffer is None else job.split(buffer)
            for piece, own, own_buffer in zip(job.pieces, job.split(x), buffers, strict=True):
                large = self._large.get(piece.weight)
                if large is None:
                    piece.weight.stage(piece.part, own, own_buffer)
                else:
                    _keep(large, piece, own, own_buffer)
            job.release()

    def measure_job(self, job: Job, options: StepOptions) -> Tensor:
        """Make the gradients of a job Riemannian; the squared norm of every group, float64."""
        return measure(job, options)

    def move_job(self, job: Job, options: StepOptions, scale: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """New points and momentum of a job, given ``1/τ`` of its groups (None if all are one)."""
        grad = job.grad if scale is None else job.grad * job.spread(scale)
        return fgsgd_update(job.manifold, job.x, grad, job.buffer, options, step_bound(options, job))

    def _cut(self, use: Use) -> dict[Weight, dict[int, Tensor]]:
        """The parts of all weights but large kernels, whose turn comes with their jobs."""
        tensors = [(claim, _tensor(claim.weight, use)) for claim in self.claims if claim.weight not in self._large]
        return {claim.weight: cut(claim, tensor) for claim, tensor in tensors if tensor is not None}

    def _joined(self, job: Job, parts: dict[Weight, dict[int, Tensor]], use: Use) -> Tensor:
        """The components of a job."""
        weight = job.pieces[0].weight
        if weight not in parts:  # the parts of a large weight follow each other
            parts[weight] = self._large[weight].cut(cast(Tensor, _tensor(weight, use)), use)
        return job.join([parts[piece.weight][piece.part] for piece in job.pieces])


def _method(job: Job, options: StepOptions, buffer: Tensor | None) -> str:
    """The method of a manifold that :func:`_move_along` has called."""
    transports = buffer is not None and not isinstance(job.manifold, EmbeddedManifold)
    return ("retr" if options.update == "retraction" else "expmap") + "_transp" * transports


def _tensor(weight: Weight, use: Use) -> Tensor | None:
    if use == Use.MOMENTUM:
        return None if weight.first else weight.buffer
    return weight.param if use == Use.POINTS else weight.grad


def _keep(large: LargeKernels, piece: Piece, x: Tensor, buffer: Tensor | None) -> None:
    """Keep what becomes of a part of a large weight; with the last part, write the weight."""
    large.keep(Use.POINTS, piece.part, x)
    if buffer is not None:
        large.keep(Use.MOMENTUM, piece.part, buffer)
    if piece.part == piece.weight.n_parts - 1:
        large.write()


def measure(job: Job, options: StepOptions) -> Tensor:
    """Make the gradients of a job Riemannian; the squared norm of every group, float64.

    With ``radius_invariant`` gradient and norm are those on the manifold of radius one: ``r² grad``, and ``r R``.
    """
    manifold = job.manifold
    grad = -job.grad if options.maximize else job.grad
    if not isinstance(manifold, EmbeddedManifold):
        # Always a new tensor: Geoopt's Lorentz manifold writes into the gradient that it is given.
        grad = grad.add(job.x, alpha=options.weight_decay)
    job.grad = grad = manifold.egrad2rgrad(job.x, grad)
    if options.radius_invariant and isinstance(manifold, ComponentManifold):
        job.grad = grad * manifold.radius_for(job.x) ** 2
    inner = manifold.inner(job.x, grad, job.grad)
    squared = job.sum((inner.real if inner.is_complex() else inner).double())
    return squared.clamp_min(0)  # Lorentz rounds below zero


def fgsgd_update(
    manifold: geoopt.Manifold,
    x: Tensor,
    grad: Tensor,
    buffer: Tensor | None,
    options: StepOptions,
    bound: float | None = None,
) -> tuple[Tensor, Tensor | None]:
    """One step of components: the direction of the rule, and a move against it.

    Args:
        manifold: The manifold of ``x``.
        x: Points.
        grad: Tangent vectors at ``x``: the Riemannian gradient divided by ``τ``.
        buffer: Momentum of the step before, or None in the first one.
        options: Hyper-parameters.
        bound: Bound on the length of the step relative to the radius, if one is known.

    Returns:
        The new points and the new buffer (None without momentum).

    Example:
        >>> from fgo_geo import ScaledSphere
        >>> x, grad = torch.tensor([1.0, 0.0]), torch.tensor([0.0, -1.0])
        >>> options = StepOptions(lr=torch.pi / 2, update="exponential")
        >>> fgsgd_update(ScaledSphere(), x, grad, None, options)[0].round(decimals=6)
        tensor([-0.,  1.])
    """
    direction, buffer = options.rule(manifold, x, grad, buffer, options)
    return _move_along(manifold, x, direction, buffer, options, bound)


def _move_along(
    manifold: geoopt.Manifold,
    x: Tensor,
    direction: Tensor,
    buffer: Tensor | None,
    options: StepOptions,
    bound: float | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Points at ``-lr`` times the direction along a retraction or geodesics, and the buffer.

    The step transports the buffer for Geoopt's manifolds; ours transport it at the start of the next step.
    """
    lr = options.lr
    if options.update == "retraction" and isinstance(manifold, ComponentManifold) and not isinstance(lr, Tensor):
        return manifold.retract_bounded(x, direction, bound, -lr), buffer
    rate = lr.reshape(()) if isinstance(lr, Tensor) else lr  # without dimensions it leaves the type alone
    step = -rate * direction
    is_ours = isinstance(manifold, EmbeddedManifold)
    if options.update == "exponential":
        if is_ours or buffer is None:
            return manifold.expmap(x, step), buffer
        return manifold.expmap_transp(x, step, buffer)
    if isinstance(manifold, ComponentManifold):
        return manifold.retract_bounded(x, step, bound), buffer
    if is_ours or buffer is None:
        return manifold.retr(x, step), buffer
    return manifold.retr_transp(x, step, buffer)


def step_bound(options: StepOptions, job: Job) -> float | None:
    """Bound on the length of a step relative to the radius, None if there is none."""
    if options.longest_step == math.inf or not isinstance(job.manifold, ComponentManifold):
        return None
    if isinstance(options.lr, Tensor):
        return _UNKNOWN_LR_BOUND
    return options.lr * options.longest_step / (1.0 if options.radius_invariant else job.smallest_radius)
