r"""The momentum step on large Stiefel matrices, with every product of the long side taken once.

It is taken on the CPU, outside of ``torch.compile``, by matrices with 16 columns or more under the polar retraction,
with momentum, but not Nesterov's. Elsewhere :func:`~fgo_geo.optim.fgsgd.fgsgd_update` is the step.

What a step on an ``n x p`` matrix costs is its products with the long side, ``2np²`` operations each. Projection,
transport and retraction, one after the other, take six of them. With ``x`` at radius ``r``, momentum ``m``, factor
``μ``, rate ``η`` and a gradient ``g`` that is divided by ``τ`` already, four are enough ("Mathematics", section 2.2)::

    A = xᵀg                     the norm of the gradient is that of g less sym(A) / r, known before anything moves
    C = A + μ B                 with B = xᵀm from the step before
    m <- g + μ m - x sym(C)/r²  the projection of gradient and momentum; now xᵀm = skew(C)
    P = mᵀm                     so that y = x - η m has yᵀy = r² (I + E), E = η² P / r²
    x <- y Z,  Z = (I + E)^(-1/2)
    B <- Z (skew(C) - η P)      which is xᵀm for the next step

``P`` is symmetric, which saves a quarter of its product: ``7.5 np²`` operations, and ``2p³`` for every product of the
short side: one for ``B`` and, unless the step is tiny, one or more for ``Z``. The ``n x p`` matrices are passed over
some twenty times, ``80 np`` bytes in single precision, which takes ``64/p`` of the products' time where six operations
are done in the time of moving a byte. What is measured is in "Speed".

``E`` does not see how far rounding has taken ``x`` from its manifold, and a step that pushes outward, with a large
``S = sym(C)/r²``, makes that grow by a factor of up to ``1 + 2η‖S‖``. So in the first step, and before what has
gathered can be more than the rounding of eight steps, the retraction measures ``yᵀy`` itself. It leaves no ``B``: the
next step takes that as a product, for another ``2 np²``. Where
torch may round the factors of products (``torch.set_float32_matmul_precision``), ``A``, ``B`` and ``x sym(C)`` do so,
``yᵀy`` and ``y Z`` don't, and nothing is carried: what follows from rounded products is off by a thousandth, and a
point would drift by it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fgo_geo.linalg import (
    gram_matrix,
    inner_sum,
    inverse_root_gap,
    lowers_products,
    root_of_sum,
    skew,
    small_product,
    subtract_product,
    sym,
    takes_full_products,
)
from fgo_geo.manifolds import Stiefel

__all__ = ["Carried", "normal_square", "shared_products_step"]

_MOST_DRIFT = 9.0  # in units of what rounding adds to xᵀx / r² in one step, some 1e-8 in single precision
_LONGEST = 1.0  # ‖E‖; beyond, its rounding is no longer that of x
_OFF = 64  # units of rounding by which ‖x u‖² / (r² ‖u‖²) may differ from one before it is measured at once
_FOREIGN = 2e-5  # of ‖x u‖ ‖m v‖ by which uᵀ xᵀm v may differ before it is taken for that of another point


@dataclass(frozen=True)
class Carried:
    """What a step leaves for the next one.

    Attributes:
        along: ``xᵀm``, shape ``(..., p, p)``; None after a step that measured.
        drift: Bound on the distance of ``xᵀx / r²`` from the identity, in units of what rounding adds in one step.
        slip: Bound on the error of ``xᵀm / r²``, in the same units.
    """

    along: Tensor | None
    drift: float
    slip: float

    def belongs_to(self, x: Tensor, buffer: Tensor, radius: float | Tensor = 1.0) -> bool:
        """Whether ``x`` is on its manifold and ``xᵀm`` is that of ``x`` and ``m``, by products with two vectors.

        ``‖x u‖ = r ‖u‖``, and ``<x u, m v>`` is ``uᵀ (xᵀm) v``: two products with a vector, read row by row.

        Args:
            x: Points, shape ``(..., n, p)``.
            buffer: Momentum ``m``, shape ``(..., n, p)``.
            radius: Radius of the points, a number or a tensor that multiplies them.

        Returns:
            False if somebody has changed one of them. A change that the vectors do not see passes.

        Example:
            >>> x, m = torch.eye(3, 2), torch.ones(3, 2)
            >>> carried = Carried(x.mT @ m, 1.0, 1.0)
            >>> carried.belongs_to(x, m), carried.belongs_to(x, 2 * m), carried.belongs_to(2 * x, m / 2)
            (True, False, False)
        """
        columns = torch.arange(x.shape[-1], dtype=x.dtype, device=x.device)
        one, other = columns.square().cos().unsqueeze(-1), columns.square().sin().unsqueeze(-1)  # no pattern of weights
        point = x @ one
        off = inner_sum(point, point, (-2, -1)) / (radius**2 * one.square().sum()) - 1
        if not bool((off.abs() <= _OFF * torch.finfo(x.dtype).eps).all()):
            return False
        if self.along is None:
            return True
        image = buffer @ other
        foreign = inner_sum(point, image, (-2, -1)) - one.mT @ (self.along @ other)
        length = root_of_sum(point, (-2, -1)) * root_of_sum(image, (-2, -1))
        return bool((foreign.abs() <= _FOREIGN * length).all())


def normal_square(along: Tensor, radius: float | Tensor) -> Tensor:
    """Squared norm of what the tangent projection takes away, ``‖sym(xᵀg)‖² / r²``, per component.

    Args:
        along: ``xᵀg``, shape ``(..., p, p)``.
        radius: Radius ``r``, a number or a tensor that multiplies points.

    Returns:
        Non-negative tensor over the leading dimensions.

    Example:
        >>> x, g = torch.tensor([[2.0], [0.0]]), torch.tensor([[3.0], [4.0]])
        >>> normal_square(x.mT @ g, 2.0)
        tensor(9.)
    """
    normal = sym(along)
    return (inner_sum(normal, normal, (-2, -1)) / radius**2).squeeze((-2, -1))


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
    bound: float | None = None,
) -> tuple[Tensor, Tensor, Carried | None]:
    """Project gradient and momentum, add them, and move along the polar retraction.

    Args:
        manifold: Where the points live.
        x: Points, shape ``(..., n, p)``.
        grad: Gradients, shape ``(..., n, p)``, projected or not; read only.
        along: ``xᵀ grad``, shape ``(..., p, p)``; read only.
        buffer: Momentum of the step before, shape ``(..., n, p)``, or None in the first one.
        carried: What the step before has left, if anything.
        scale: Factor of the gradients, ``1/τ``; a tensor broadcasts against them.
        lr: Learning rate ``η``.
        momentum: Momentum factor ``μ``.
        bound: Bound on the length of the step relative to the radius, if one is known.

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
    total, along = grad * scale, along * scale
    radius = manifold.radius_for(x)
    drift, slip = math.inf, 0.0
    if buffer is not None:
        before = None
        if carried is not None and carried.belongs_to(x, buffer, radius):
            before, drift, slip = carried.along, carried.drift, carried.slip
        if before is None:
            before, slip = small_product(x.mT, buffer), 0.0
        total.add_(buffer, alpha=momentum)
        along.add_(before, alpha=momentum)
    normal = sym(along) / radius**2
    buffer = subtract_product(total, x, normal, in_place=True)
    if lowers_products():
        return _move(manifold, x, buffer, along, None, lr, bound)
    # With xᵀx = r² (I + D) and an error βr² of B, a step leaves the error β' = μβ + D S of B, and D + 2η sym(β').
    slip = momentum * slip + drift * float(root_of_sum(normal, (-2, -1)).amax())
    return _move(manifold, x, buffer, along, (drift + 2 * abs(lr) * slip + 1, slip), lr, bound)


@takes_full_products
def _move(
    manifold: Stiefel,
    x: Tensor,
    buffer: Tensor,
    along: Tensor,
    errors: tuple[float, float] | None,
    lr: float,
    bound: float | None,
) -> tuple[Tensor, Tensor, Carried | None]:
    """Move along the polar retraction.

    ``along`` is ``C``; ``errors`` are bounds on those of the new point and of its product with the momentum, as long as
    nothing is measured, or None if nothing is to be carried.
    """
    drift, slip = errors or (math.inf, math.inf)
    if drift <= _MOST_DRIFT:
        radius = manifold.radius_for(x)
        products = gram_matrix(buffer)
        excess = products * (lr / radius) ** 2
        norm = float(root_of_sum(excess, (-2, -1)).amax())
        if norm <= _LONGEST:
            gap = inverse_root_gap(excess, norm)
            y = torch.add(x, buffer, alpha=-lr)
            squared_length = products.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None] / radius**2
            slip += float(squared_length.amax()) ** 0.5  # rounding
            rest = torch.sub(skew(along), products, alpha=lr)
            along = subtract_product(rest, gap, rest)
            return subtract_product(y, y, gap), buffer, Carried(along, drift, slip)
    moved = manifold.retract_bounded(x, -lr * buffer, bound)  # which measures
    return moved, buffer, None if errors is None else Carried(None, 1.0, 0.0)
