r"""The momentum step on large Stiefel matrices, with every product of the long side taken once.

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

``E`` does not see how far rounding has taken ``x`` from its manifold. In the first step and every eighth after it,
``E`` is therefore measured from ``y`` itself, for another ``1.5 np²``. Where torch may round the factors of products
(``torch.set_float32_matmul_precision``), ``A``, ``B`` and ``x sym(C)`` do so, ``yᵀy`` and ``y Z`` don't, and nothing is
carried: what follows from rounded products is off by a thousandth, and a point would drift by it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fgo_geo.linalg import (
    gram_matrix,
    inner_sum,
    inverse_root_gap,
    lowers_products,
    root_of_sum,
    small_product,
    subtract_product,
    sym,
    takes_full_products,
)
from fgo_geo.manifolds import Stiefel

__all__ = ["Carried", "normal_square", "shared_products_step"]

_MEASURE_EVERY = 8  # steps; rounding adds some 1e-8 per step in single precision
_LONGEST = 1.0  # ‖E‖; beyond, its rounding is no longer that of x
_FOREIGN = 1e-4  # of ‖x‖ ‖m‖ by which xᵀm may differ before it is taken for that of another point


@dataclass(frozen=True)
class Carried:
    """What a step leaves for the next one.

    Attributes:
        along: ``xᵀm``, shape ``(..., p, p)``.
        age: How many steps ago the Gram matrix was measured.
    """

    along: Tensor
    age: int

    def belongs_to(self, x: Tensor, buffer: Tensor) -> bool:
        """Whether it was left by a step to just this point and momentum, by the product with a vector of ones.

        Args:
            x: Points, shape ``(..., n, p)``.
            buffer: Momentum ``m``, shape ``(..., n, p)``.

        Returns:
            False if somebody else has changed one of them.

        Example:
            >>> x, m = torch.eye(3, 2), torch.ones(3, 2)
            >>> carried = Carried(x.mT @ m, 0)
            >>> carried.belongs_to(x, m), carried.belongs_to(x, 2 * m)
            (True, False)
        """
        row_sums = buffer.sum(-1, keepdim=True)
        error = x.mT @ row_sums - self.along.sum(-1, keepdim=True)
        length = root_of_sum(x[..., :1], (-2, -1)) * root_of_sum(row_sums, (-2, -1))
        return bool((root_of_sum(error, (-2, -1)) <= _FOREIGN * length).all())


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
        grad: Euclidean gradients.
        along: ``xᵀ grad``.
        buffer: Momentum of the step before, or None in the first one.
        carried: What the step before has left, if anything.
        scale: Factor of the gradients, ``1/τ``; a tensor broadcasts against them.
        lr: Learning rate ``η``.
        momentum: Momentum factor ``μ``.
        bound: Bound on the length of the step relative to the radius, if one is known.

    Returns:
        The new points, the new momentum, and what to carry to the next step (nothing after a long one).

    Example:
        >>> x, g = torch.tensor([[1.0], [0.0]]), torch.tensor([[5.0], [-0.75]])
        >>> x, m, carried = shared_products_step(Stiefel(), x, g, x.mT @ g, None, None, scale=1, lr=1, momentum=0.9)
        >>> x, m, carried.along
        (tensor([[0.8000],
                [0.6000]]), tensor([[ 0.0000],
                [-0.7500]]), tensor([[-0.4500]]))
    """
    total, along = grad * scale, along * scale
    if buffer is None:
        carried = None
    else:
        if carried is None or not carried.belongs_to(x, buffer):
            carried = Carried(small_product(x.mT, buffer), _MEASURE_EVERY)
        total.add_(buffer, alpha=momentum)
        along.add_(carried.along, alpha=momentum)
    buffer = subtract_product(total, x, sym(along) / manifold.radius_for(x) ** 2, in_place=True)
    age = _MEASURE_EVERY if carried is None else carried.age + 1
    return _move(manifold, x, buffer, along, None if lowers_products() else age, lr, bound)


@takes_full_products
def _move(
    manifold: Stiefel, x: Tensor, buffer: Tensor, along: Tensor, age: int | None, lr: float, bound: float | None
) -> tuple[Tensor, Tensor, Carried | None]:
    """Move along the polar retraction; ``along`` is ``C``, and without an age nothing is carried."""
    squared_radius = manifold.radius_for(x) ** 2
    y = torch.add(x, buffer, alpha=-lr)
    products = None if age is None else gram_matrix(buffer)
    if products is None or age is None or age >= _MEASURE_EVERY:
        excess, age = gram_matrix(y) / squared_radius, 0
        excess.diagonal(dim1=-2, dim2=-1).sub_(1)
    else:
        excess = products * (lr**2 / squared_radius)
    norm = float(root_of_sum(excess, (-2, -1)).amax())
    if not norm <= _LONGEST:
        return manifold.retract_bounded(x, -lr * buffer, bound), buffer, None
    gap = inverse_root_gap(excess, norm)
    moved = subtract_product(y, y, gap)
    if products is None:
        return moved, buffer, None
    rest = (along - along.mT) / 2 - lr * products
    return moved, buffer, Carried(subtract_product(rest, gap, rest), age)
