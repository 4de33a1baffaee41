r"""The oblique manifold: matrices whose columns all have norm ``r``.

It is a power of the sphere, and nothing else: the formulas are those of :mod:`fgo_geo.manifolds.sphere` along the
columns.
"""

from __future__ import annotations

import math

from fgo_geo.manifolds.sphere import SphericalManifold, normalise
from fgo_geo.weights.kinds import Kind, register

__all__ = ["Oblique"]


class Oblique(SphericalManifold):
    r"""The (scaled) oblique manifold ``{ x in R^{A x B} : every column has norm r }`` over the last two dimensions.

    Its component norm is ``r √B``; its sectional curvatures lie in ``[0, 1/r²]``.

    Args:
        radius: Positive number, or a tensor that broadcasts over the leading (component) dimensions.

    Raises:
        ValueError: If the radius is not positive.

    Example:
        >>> import torch
        >>> Oblique(radius=2.0).projx(torch.tensor([[3.0, 0.0], [4.0, 5.0]]))
        tensor([[1.2000, 0.0000],
                [1.6000, 2.0000]])
    """

    name = "Oblique"
    ndim = 2
    _dims = (-2,)


register(
    Kind(
        "oblique",
        Oblique,
        Oblique,
        norms=lambda rows, columns: (math.sqrt(columns), math.sqrt(columns)),
        # transposed: on a CPU, columns of small matrices take several times as long to sum as rows
        carry=lambda x, source, target, memory: normalise(x.mT.contiguous(), target, (-1,)).mT,
        colour="#e69f00",
        code=2,
        is_decomposed=False,
        aliases=("ob",),
    )
)
