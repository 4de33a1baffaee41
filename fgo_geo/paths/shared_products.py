r"""The momentum step on large Stiefel matrices, with every product of the long side taken once.

It is taken on the CPU, outside of ``torch.compile``, by matrices with 16 columns or more under the polar retraction,
with momentum, but not Nesterov's. Elsewhere :func:`~fgo_geo.optim.fgsgd.fgsgd_update` is the step.

What a step on an ``n x p`` matrix costs is its products with the long side, ``2np²`` operations each. Projection,
transport and retraction, one after the other, take six of them. With ``x`` at radius ``r``, momentum ``m``, factor
``μ``, rate ``η`` and a gradient ``g`` that is divided by ``τ`` already, four are enough ("Mathematics", section A.2)::

    A = xᵀg                     the norm of the gradient is that of g less sym(A) / r, known before anything moves
    C = A + μ B                 with B = xᵀm from the step before
    m <- g + μ m - x sym(C)/r²  the projection of gradient and momentum; now xᵀm = skew(C)
    P = mᵀm                     so that y = x - η m has yᵀy = r² (I + E), E = η² P / r²
    x <- y Z,  Z = (I + E)^(-1/2)
    B <- Z (skew(C) - η P)      which is xᵀm for the next step

``P`` is symmetric: ``k`` blocks of its columns, :func:`~fgo_geo.linalg.gram_blocks`, save ``(k - 1) / 2k`` of its
product. With four of them the step takes ``7.25 np²`` operations, and ``2p³`` for every product of the short side: one
for ``B`` and, unless the step is tiny, one or more for ``Z``. Where ``I - Z`` is small, as it is in training, and the
processor multiplies bfloat16 in hardware, ``y (I - Z)`` and the product for ``B`` are taken so, which costs float32
nothing (:func:`~fgo_geo.linalg.subtract_part`). The ``n x p`` matrices are passed over some twenty times, ``80 np``
bytes in single precision, which takes ``64/p`` of the products' time where six operations are done in the time of
moving a byte. Temporaries lie in memory that is kept from step to step. What is measured is in "Speed".

``E`` does not see how far rounding has taken ``x`` from its manifold, and a step that pushes outward, with a large
``S = sym(C)/r²``, makes that grow by a factor of up to ``1 + 2η‖S‖``. So in the first step, and before what has
gathered can be more than the rounding of eight steps, the retraction measures ``yᵀy`` itself. It leaves no ``B``: the
next step takes that as a product, for another ``2 np²``.

Where torch may round the factors of products (``torch.set_float32_matmul_precision``), ``A``, ``B`` and ``x sym(C)``
do so, and ``yᵀy`` is measured in full in every step. Nothing is carried then: what follows from rounded products is off
by a thousandth, and a point would drift by it.

What was carried is used for the points and the momentum that the step has left, and for no others. Whether somebody has
written to them is seen by torch's counters and, behind their back, by some of their numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fgo_geo.linalg import (
    Workspace,
    frobenius_norm,
    gram_matrix,
    inverse_root_gap,
    lowers_products,
    small_product,
    subtract_part,
    subtract_product,
)
from fgo_geo.manifolds import Stiefel

__all__ = ["Carried", "over_components", "shared_products_step", "tangent_square"]

_MOST_DRIFT = 9.0  # in units of what rounding adds to xᵀx / r² in one step, some 1e-8 in single precision
_LONGEST = 1.0  # ‖E‖; beyond, its rounding is no longer that of x
_CANCELLATION = 0.01  # of a gradient's square is tangent at least, or it is projected before it is measured
_LINES = 16  # rows, and numbers of every row, by which a matrix is known again


@dataclass(frozen=True)
class Carried:
    """What a step leaves for the next one.

    Attributes:
        along: ``xᵀm``, shape ``(..., p, p)``; None after a step that measured.
        drift: Bound on the distance of ``xᵀx / r²`` from the identity, in units of what rounding adds in one step.
        slip: Bound on the error of ``xᵀm / r²``, in the same units.
        radius: The radius of the points.
        lines: Some numbers of the points, and of their momentum if there is an ``along``, see :meth:`belongs_to`.
    """

    along: Tensor | None
    drift: float
    slip: float
    radius: float | Tensor
    lines: tuple[Tensor, ...]

    @classmethod
    def of(
        cls, x: Tensor, buffer: Tensor, radius: float | Tensor, along: Tensor | None, drift: float, slip: float
    ) -> Carried:
        """What is left at points, for these points and their momentum.

        Args:
            x: Points, shape ``(..., n, p)``.
            buffer: Momentum ``m``, shape ``(..., n, p)``.
            radius: Radius of the points, a number or a tensor that multiplies them.
            along: As the attribute.
            drift: As the attribute.
            slip: As the attribute.
        """
        lines = (*_lines(x), *(() if along is None else _lines(buffer)))
        radius = radius.clone() if isinstance(radius, Tensor) else radius
        return cls(along, drift, slip, radius, tuple(line.clone() for line in lines))

    def belongs_to(self, x: Tensor, buffer: Tensor, radius: float | Tensor = 1.0) -> bool:
        """Whether points, radius and, if their product is carried, momentum are those that the step has left.

        Compares some rows, and sixteen numbers of every row, of every other one farther to the right: nothing has to be
        passed over once more.

        Args:
            x: Points, shape ``(..., n, p)``.
            buffer: Momentum ``m``, shape ``(..., n, p)``.
            radius: Radius of the points, a number or a tensor that multiplies them.

        Returns:
            False if somebody has changed one of them. A change passes that avoids all of these, as one of a few numbers
            can, or of a narrow block; a step that measures, one of the next eight, mends what it did to a point.

        Example:
            >>> x, m = torch.eye(3, 2), torch.ones(3, 2)
            >>> carried = Carried.of(x, m, 1.0, x.mT @ m, drift=1.0, slip=1.0)
            >>> carried.belongs_to(x, m), carried.belongs_to(x, 2 * m), carried.belongs_to(x, m, 2.0)
            (True, False, False)
        """
        lines = (*_lines(x), *(() if self.along is None else _lines(buffer)))
        return _equal(radius, self.radius) and all(map(_equal, lines, self.lines))


def _lines(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Some numbers of matrices, of few lines of the cache; of their transposes where columns lie together.

    Rows from top to bottom; 16 numbers of each of the first rows, from the left to the right, again and again; and the
    first 16 of the rows that remain.
    """
    rows = x.mT if x.stride(-2) == 1 else x
    count, length = rows.shape[-2:]
    period = max(1, min(count, length // _LINES))
    stride, whole = length // period, count - count % period
    slanting = rows[..., :whole, : period * stride].unflatten(-2, (-1, period)).unflatten(-1, (period, stride))
    return (
        rows[..., :: max(1, count // _LINES), :],
        slanting[..., :_LINES].diagonal(dim1=-3, dim2=-2),
        rows[..., whole:, :_LINES],
    )


def _equal(a: float | Tensor, b: float | Tensor) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return not isinstance(a, Tensor) and not isinstance(b, Tensor) and a == b


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
        Positive tensor over the leading dimensions (or one that is not finite); None where next to nothing is left of a
        gradient, but rounding.

    Example:
        >>> x, g = torch.tensor([[2.0], [0.0]]), torch.tensor([[3.0], [4.0]])
        >>> tangent_square(g, x.mT @ g, 2.0), tangent_square(x, x.mT @ x, 2.0)
        (tensor(16.), None)
    """
    twice = torch.add(along, along.mT, out=None if workspace is None else workspace.square(grad, "gap"))
    normal = frobenius_norm(twice) / (2 * over_components(radius))
    whole = frobenius_norm(grad).square()
    tangent = whole - normal.square()
    return None if bool((tangent < _CANCELLATION * whole).any()) else tangent


def over_components(radius: float | Tensor) -> float | Tensor:
    """A radius that multiplies points, as one that multiplies a number of every component.

    Args:
        radius: A number, or a tensor of shape ``(..., 1, 1)``.

    Returns:
        The number, or a tensor of shape ``(...)``.

    Example:
        >>> over_components(torch.tensor([[[2.0]], [[3.0]]])), over_components(0.5)
        (tensor([2., 3.]), 0.5)
    """
    return radius.squeeze((-2, -1)) if isinstance(radius, Tensor) else radius


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
        manifold: Where the points live.
        x: Points, shape ``(..., n, p)``.
        grad: Gradients, shape ``(..., n, p)``, projected or not; read only.
        along: ``xᵀ grad``, shape ``(..., p, p)``; overwritten.
        buffer: Momentum of the step before, shape ``(..., n, p)``, or None in the first one.
        carried: What the step before has left, if anything.
        scale: Factor of the gradients, ``1/τ``; a tensor broadcasts against them.
        lr: Learning rate ``η``.
        momentum: Momentum factor ``μ``.
        workspace: Memory for temporaries and the new momentum, which holds until it is used again; fresh memory if left
            out.
        out: Where to put the new points, at the very end; it may be ``x``.

    Returns:
        The new points, the new momentum, and what to carry to the next step, if anything.

    Example:
        >>> x, g = torch.tensor([[1.0], [0.0]]), torch.tensor([[5.0], [-0.75]])
        >>> x, m, carried = shared_products_step(Stiefel(), x, g, x.mT @ g, None, None, scale=1, lr=1, momentum=0.9)
        >>> x, m, carried.drift
        (tensor([[0.8000],
                [0.6000]]), tensor([[ 0.0000],
                [-0.7500]]), 1.0)
    """
    workspace = Workspace() if workspace is None else workspace
    radius = manifold.radius_for(x)
    drift, slip = math.inf, 0.0
    along.mul_(scale)
    if buffer is not None:
        before = None
        if carried is not None and carried.belongs_to(x, buffer, radius):
            before, drift, slip = carried.along, carried.drift, carried.slip
        if before is None:
            before, slip = small_product(x.mT, buffer, out=workspace.square(x, "excess")), 0.0
        along.add_(before, alpha=momentum)
    normal = torch.add(along, along.mT, out=workspace.square(x, "gap")).div_(2 * radius**2)
    total, factor = _weighted_sum(grad, scale, buffer, momentum, workspace.like(x, "momentum"))
    m = subtract_product(total, x, normal, beta=factor, out=workspace.like(x, "momentum"))
    if lowers_products():
        drift = math.inf
    else:
        # With xᵀx = r² (I + D) and an error βr² of B, a step leaves the error β' = μβ + D S of B, and D + 2η sym(β').
        slip = momentum * slip + drift * float(frobenius_norm(normal).amax())
        drift += 2 * abs(lr) * slip + 1
    y = torch.add(x, m, alpha=-lr, out=workspace.like(x, "point"))
    out = torch.empty_like(x) if out is None else out
    if drift <= _MOST_DRIFT:
        products = gram_matrix(m, out=workspace.square(x, "products"))
        excess = torch.mul(products, (lr / radius) ** 2, out=workspace.square(x, "excess"))
        norm = float(frobenius_norm(excess).amax())
        if norm <= _LONGEST:
            gap = inverse_root_gap(excess, norm, out=workspace.square(x, "gap"))
            rest = torch.sub(along, along.mT, out=excess).mul_(0.5).add_(products, alpha=-lr)
            along = subtract_part(rest, gap, workspace, from_left=True, out=along)
            squared_length = products.diagonal(dim1=-2, dim2=-1).sum(-1) / over_components(radius) ** 2
            slip += float(squared_length.amax()) ** 0.5  # rounding
            moved = subtract_part(y, gap, workspace, out=out)
            return moved, m, Carried.of(moved, m, radius, along, drift, slip)
    explained = (lr * frobenius_norm(m) / over_components(radius)).square()
    moved = manifold.retract_measured(y, explained, memory=(workspace, out))
    return moved, m, None if lowers_products() else Carried.of(moved, m, radius, None, drift=1.0, slip=0.0)


def _weighted_sum(
    grad: Tensor, scale: float | Tensor, buffer: Tensor | None, momentum: float, out: Tensor
) -> tuple[Tensor, float]:
    """``scale g + μ m`` but for a common factor, which saves a pass over them: the sum and the factor."""
    if isinstance(scale, Tensor):
        total = torch.mul(grad, scale, out=out)
        return (total if buffer is None else total.add_(buffer, alpha=momentum)), 1.0
    if buffer is None:
        return grad, scale
    if abs(scale) >= momentum:
        return torch.add(grad, buffer, alpha=momentum / scale, out=out), scale
    return torch.add(buffer, grad, alpha=scale / momentum, out=out), momentum
