r"""The path of large Stiefel matrices on the CPU: every product of the long side is taken once.

The cost of a step on an ``n x p`` matrix is that of its products with the long side, ``2np²`` operations each.
Projection, transport and retraction in turn take six of them. With ``x`` at radius ``r``, momentum ``m``, factor ``μ``,
rate ``η`` and a gradient ``g``, four are enough, with fewer passes over memory ("Mathematics", section A.2)::

    A = xᵀg                     gives the norm of the gradient, from those of g and sym(A) / r, before anything moves
    C = A / τ + μ B             with B = xᵀm from the step before
    m <- g / τ + μ m - x sym(C)/r²    the projection of gradient and momentum; now xᵀm = skew(C)
    P = mᵀm                     so that y = x - η m has yᵀy = r² (I + E), E = η² P / r²
    x <- y Z,  Z = (I + E)^(-1/2)
    B <- Z (skew(C) - η P)      which is xᵀm for the next step

``E`` assumes that ``x`` is exactly on its manifold, and ``B`` is ``xᵀm`` up to rounding only. Bounds on both errors are
carried with ``B``. Before they exceed the rounding of a few steps, and after a long step, the path measures ``yᵀy``
instead, and the next step computes ``B`` as a product.

If ``x`` or ``m`` was changed between two steps, by a checkpoint or an average of weights, the path notices it before it
uses what it carries: ``xᵀ(x v) = r² v`` and ``xᵀ(m v) = B v`` are checked for one vector ``v``, at the cost of two
products of a matrix and a vector.

Where ``I - Z`` is small, as in training, and the processor multiplies bfloat16 in hardware, the products with it are in
bfloat16, without loss of accuracy in float32 (:func:`~fgo_geo.linalg.subtract_part`). The memory of temporaries is kept
from step to step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from fgo_geo.linalg import (
    Use,
    Workspace,
    frobenius_norm,
    gram_matrix,
    inverse_root_gap,
    lowers_products,
    reads_for_free,
    small_product,
    subtract_part,
    subtract_product,
)
from fgo_geo.manifolds import ProductOfGroups, Stiefel
from fgo_geo.paths.pieces import Job
from fgo_geo.paths.protocol import Batch, Claim, Path, Reason, Refusal, StepOptions, Weight
from fgo_geo.paths.reference import JobBatch, measure
from fgo_geo.paths.rules import momentum_sgd

__all__ = ["Carried", "SharedProducts", "shared_products_step", "tangent_square"]

# Time of a step with shared products over that of the reference, two cores of a Zen 4 processor, single precision:
#
#     64 x 16   64 x 32   128 x 64   576 x 64   128 x 96   512 x 96   512 x 128   1152 x 128   512 x 256   2304 x 256
#      1.9       1.3        1.1        1.05       1.2        1.0        1.0          0.92         0.75        0.5
_FEWEST_COLUMNS = 128
_CANCELLATION = 0.01  # least tangent share of a gradient's square; below it, the gradient is projected before the norm
_MOST_DRIFT = 9.0  # in units of what rounding adds to xᵀx / r² in one step, some 1e-8 in single precision
_LONGEST = 1.0  # ‖E‖; beyond, its rounding is no longer that of x
_ROUNDING = 8.0  # by how much xᵀ(y v) and (xᵀy) v may differ, in units of the rounding of ‖y v‖; up to 1.4 were seen


class SharedProducts(Path):
    """The path of large Stiefel matrices under the polar retraction with momentum, where reading values is free."""

    name = "batched torch code that shares matrix products"

    def accepts(self, weight: Weight, parts: tuple[int, ...], options: StepOptions) -> tuple[int, ...] | Refusal:
        """The parts that are large Stiefel matrices."""
        if options.momentum == 0 or options.nesterov or options.update != "retraction":
            return Refusal(Reason.STEP, "products are shared under the retraction, with momentum other than Nesterov's")
        if options.rule is not momentum_sgd:
            return Refusal(Reason.STEP, "products are shared in the step of momentum SGD alone")
        if not reads_for_free(weight.param) or isinstance(options.lr, Tensor):
            return Refusal(Reason.DEVICE, "products are shared on the CPU, outside of transforms and tracing")
        if not isinstance(weight.manifold, ProductOfGroups):
            taken = parts if _is_large(weight.manifold, weight.param.shape) else ()
        else:
            sizes = weight.manifold.partition.sizes
            manifolds = list(weight.manifold.manifolds)
            taken = tuple(part for part in parts if _is_large(manifolds[part], sizes[part]))
        if not taken:
            return Refusal(Reason.KIND, f"products are shared by Stiefel matrices of {_FEWEST_COLUMNS} columns or more")
        return taken

    def batch(self, claims: Sequence[Claim]) -> Batch:
        """A batch with its own memory."""
        return _SharedBatch(claims)


def _is_large(manifold: object, shape: Sequence[int]) -> bool:
    return type(manifold) is Stiefel and manifold.retraction == "polar" and shape[-1] >= _FEWEST_COLUMNS


class _SharedBatch(JobBatch):
    def __init__(self, claims: Sequence[Claim]) -> None:
        super().__init__(claims)
        self._workspace = Workspace()
        self._along: dict[Job, Tensor | None] = {}  # xᵀ grad; None if the gradient is projected
        self._carried: dict[Job, Carried] = {}  # from the step before
        self._spare: dict[Job, Tensor] = {}  # memory for the next xᵀ grad

    def measure_job(self, job: Job, options: StepOptions) -> Tensor:
        """The squared norm of every group, from ``xᵀ grad``; the gradients are not projected unless that cancels."""
        manifold = cast(Stiefel, job.manifold)
        grad = job.grad
        memory = self._spare.pop(job, None)
        memory = Workspace().square(job.x, Use.ALONG) if memory is None else memory
        along = small_product(job.x.mT, grad, out=memory)
        radius = manifold.radius_for(job.x)
        inner = tangent_square(grad, along, radius, self._workspace)
        if inner is None:  # the difference is mostly rounding
            self._along[job], self._spare[job] = None, along
            return measure(job, options)
        self._along[job] = along
        if options.radius_invariant:
            inner = inner * _over_components(radius) ** 2
        return job.sum(inner.double())

    def move_job(self, job: Job, options: StepOptions, scale: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """New points and momentum."""
        manifold, along = cast(Stiefel, job.manifold), self._along.pop(job)
        carried = self._carried.pop(job, None)
        if along is None:
            return super().move_job(job, options, scale)
        factor: float | Tensor = 1.0 if job.buffer is None else 1 - options.dampening
        factor = -factor if options.maximize else factor
        if scale is not None:
            if not bool((scale > 0).all()):  # a skipped gradient may not be finite
                along = torch.where(job.spread(scale) > 0, along, 0)
            factor = factor * (float(scale) if scale.numel() == 1 else job.spread(scale))
        if options.radius_invariant:
            factor = factor * manifold.radius_for(job.x) ** 2
        x, buffer, following = shared_products_step(
            manifold,
            job.x,
            job.grad,
            along,
            job.buffer,
            carried,
            scale=factor,
            lr=cast(float, options.lr),
            momentum=options.momentum,
            workspace=self._workspace if job.is_whole else None,
            out=job.x if job.is_view else None,
        )
        if following is not None:
            self._carried[job] = following
        if following is None or following.along is None:
            self._spare[job] = along
        elif carried is not None and carried.along is not None:
            self._spare[job] = carried.along
        return x, buffer


def tangent_square(
    grad: Tensor, along: Tensor, radius: float | Tensor = 1.0, workspace: Workspace | None = None
) -> Tensor | None:
    """Squared norm of the tangent projection of a gradient, ``‖g‖² - ‖sym(xᵀg)‖² / r²``, per component.

    Args:
        grad: Gradients ``g`` at ``x``, shape ``(..., n, p)``.
        along: ``xᵀg``, shape ``(..., p, p)``.
        radius: Radius ``r``, a number or a tensor that multiplies points, shape ``(..., 1, 1)``.
        workspace: Memory for temporaries.

    Returns:
        Positive tensor over the leading dimensions (or one that is not finite); None where rounding would dominate the
        difference.

    Example:
        >>> x, g = torch.tensor([[2.0], [0.0]]), torch.tensor([[3.0], [4.0]])
        >>> tangent_square(g, x.mT @ g, 2.0), tangent_square(x, x.mT @ x, 2.0)
        (tensor(16.), None)
    """
    twice = torch.add(along, along.mT, out=None if workspace is None else workspace.square(grad, Use.GAP))
    normal = frobenius_norm(twice) / (2 * _over_components(radius))
    whole = frobenius_norm(grad).square()
    tangent = whole - normal.square()
    return None if bool((tangent < _CANCELLATION * whole).any()) else tangent


def _over_components(radius: float | Tensor) -> float | Tensor:
    """A radius that multiplies points, as one that multiplies a number of every component."""
    return radius.squeeze((-2, -1)) if isinstance(radius, Tensor) else radius


@dataclass(frozen=True)
class Carried:
    """What a step passes on to the next one.

    Attributes:
        along: ``xᵀm``, shape ``(..., p, p)``; None after a step that measured ``yᵀy``.
        drift: Bound on the distance of ``xᵀx / r²`` from the identity, in units of what rounding adds in one step.
        slip: Bound on the error of ``xᵀm / r²``, in the same units.
    """

    along: Tensor | None
    drift: float
    slip: float


def is_product(product: Tensor | None, x: Tensor, y: Tensor, radius: float | Tensor = 1.0) -> bool:
    """Whether ``xᵀy`` is a known product, up to rounding, as far as its product with one vector shows.

    All entries of the vector are positive and no two are equal, so that a change of any entry of the matrices shows.

    Args:
        product: Supposed ``xᵀy``, shape ``(..., p, p)``; None for ``r² I``.
        x: Points, shape ``(..., n, p)``.
        y: Matrices of the same shape.
        radius: Radius of the points, a number or a tensor that multiplies them.

    Returns:
        Whether it is, for every pair of matrices.

    Example:
        >>> x, y = torch.eye(3, 2), torch.ones(3, 2)
        >>> is_product(x.mT @ y, x, y), is_product(x.mT @ y, x, y + torch.eye(3, 2)), is_product(None, x, x)
        (True, False, True)
    """
    golden_ratio = (math.sqrt(5) - 1) / 2
    v = torch.arange(x.shape[-1], dtype=x.dtype).mul_(golden_ratio).frac_().add_(0.5).unsqueeze(-1)
    image = y @ v
    rest = x.mT @ image - (radius**2 * v if product is None else product @ v)
    bound = _ROUNDING * torch.finfo(x.dtype).eps * radius * image.norm(dim=-2, keepdim=True)
    return bool((rest.abs() < bound).all())


def shared_products_step(
    manifold: Stiefel,
    x: Tensor,
    grad: Tensor,
    along: Tensor,
    buffer: Tensor | None,
    carried: Carried | None,
    *,
    scale: float | Tensor,
    lr: float,
    momentum: float,
    workspace: Workspace | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Carried | None]:
    """Project gradient and momentum, add them, and move along the polar retraction.

    Args:
        manifold: The manifold of the points.
        x: Points, shape ``(..., n, p)``.
        grad: Gradients, shape ``(..., n, p)``, projected or not; read only.
        along: ``xᵀ grad``, shape ``(..., p, p)``; overwritten.
        buffer: Momentum of the step before, shape ``(..., n, p)``, or None in the first one.
        carried: What the step before passes on, if anything.
        scale: Factor of the gradients, ``1/τ``; a tensor broadcasts against them.
        lr: Learning rate ``η``.
        momentum: Momentum factor ``μ``.
        workspace: Memory for temporaries and the new momentum, which is valid until the workspace is used again; by
            default fresh memory.
        out: Where to put the new points, in the last operation; it may be ``x``.

    Returns:
        The new points, the new momentum, and what to carry to the next step, if anything.

    Example:
        >>> x, g = torch.tensor([[1.0], [0.0]]), torch.tensor([[5.0], [-0.75]])
        >>> x, m, carried = shared_products_step(Stiefel(), x, g, x.mT @ g, None, None, scale=1, lr=1, momentum=0.9)
        >>> x, m, carried
        (tensor([[0.8000],
                [0.6000]]), tensor([[ 0.0000],
                [-0.7500]]), Carried(along=None, drift=1.0, slip=0.0))
    """
    workspace = Workspace() if workspace is None else workspace
    radius = manifold.radius_for(x)
    drift, slip = math.inf, 0.0
    before = None if carried is None else carried.along
    if carried is not None and before is not None and buffer is not None and is_product(before, x, buffer, radius):
        drift, slip = carried.drift, carried.slip  # a change of x would show in the product, too
    else:
        before = None
        if carried is not None and is_product(None, x, x, radius):
            drift = carried.drift
    along.mul_(scale)
    if buffer is not None:
        before = small_product(x.mT, buffer, out=workspace.square(x, Use.EXCESS)) if before is None else before
        along.add_(before, alpha=momentum)
    normal = torch.add(along, along.mT, out=workspace.square(x, Use.GAP)).div_(2 * radius**2)
    total, factor = _weighted_sum(grad, scale, buffer, momentum, workspace.like(x, Use.MOMENTUM))
    m = subtract_product(total, x, normal, beta=factor, out=workspace.like(x, Use.MOMENTUM))
    if lowers_products():  # what follows from rounded products is off by a thousandth
        drift = math.inf
    else:
        # With xᵀx = r² (I + D) and an error βr² of B, a step leaves the error β' = μβ + D S of B, and D + 2η sym(β').
        slip = momentum * slip + (drift * float(frobenius_norm(normal).amax()) if drift < math.inf else 0.0)
        drift += 2 * abs(lr) * slip + 1
    y = torch.add(x, m, alpha=-lr, out=workspace.like(x, Use.POINTS))
    out = torch.empty_like(x) if out is None else out
    if drift <= _MOST_DRIFT:
        products = gram_matrix(m, out=workspace.square(x, Use.PRODUCTS))
        excess = torch.mul(products, (lr / radius) ** 2, out=workspace.square(x, Use.EXCESS))
        norm = float(frobenius_norm(excess).amax())
        if norm <= _LONGEST:
            gap = inverse_root_gap(excess, norm, out=workspace.square(x, Use.GAP))
            rest = torch.sub(along, along.mT, out=excess).mul_(0.5).add_(products, alpha=-lr)
            along = subtract_part(rest, gap, workspace, from_left=True, out=along)
            squared_length = products.diagonal(dim1=-2, dim2=-1).sum(-1) / _over_components(radius) ** 2
            slip += float(squared_length.amax()) ** 0.5  # rounding
            return subtract_part(y, gap, workspace, out=out), m, Carried(along, drift, slip)
    explained = (lr * frobenius_norm(m) / _over_components(radius)).square()
    moved = manifold.retract_measured(y, explained, memory=(workspace, out))
    return moved, m, None if lowers_products() else Carried(None, drift=1.0, slip=0.0)


def _weighted_sum(
    grad: Tensor, scale: float | Tensor, buffer: Tensor | None, momentum: float, out: Tensor
) -> tuple[Tensor, float]:
    """``scale g + μ m`` as a sum and a common factor, which saves a pass over memory."""
    if isinstance(scale, Tensor) or scale == 0:
        total = torch.mul(grad, scale, out=out)
        return (total if buffer is None else total.add_(buffer, alpha=momentum)), 1.0
    if buffer is None:
        return grad, scale
    if abs(scale) >= momentum:
        return torch.add(grad, buffer, alpha=momentum / scale, out=out), scale
    return torch.add(buffer, grad, alpha=scale / momentum, out=out), momentum
