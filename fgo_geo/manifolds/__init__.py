"""Component manifolds and their products, as Geoopt manifolds: tensors in, tensors out."""

import geoopt
from torch import Tensor

from fgo_geo.manifolds.declared import STEPS_SHARDS, declare, is_declared
from fgo_geo.manifolds.embedded import ComponentManifold, EmbeddedManifold
from fgo_geo.manifolds.oblique import Oblique
from fgo_geo.manifolds.product import ProductOfGroups, known_name
from fgo_geo.manifolds.replaced import (
    REPLACED,
    lost_manifold,
    mark_replaced,
    replaced_error,
    replacements,
    was_replaced,
)
from fgo_geo.manifolds.sphere import ScaledSphere
from fgo_geo.manifolds.stiefel import Stiefel

from fgo_geo.manifolds.balls import (  # isort: skip  (kinds are in the order in which they register)
    Ball,
    ConvexBall,
    SpectralBall,
    SpectralSphere,
)
from fgo_geo.weights.kinds import Kind, register

__all__ = [
    "REPLACED",
    "STEPS_SHARDS",
    "Ball",
    "ComponentManifold",
    "ConvexBall",
    "EmbeddedManifold",
    "Oblique",
    "ProductOfGroups",
    "ScaledSphere",
    "SpectralBall",
    "SpectralSphere",
    "Stiefel",
    "declare",
    "is_declared",
    "known_name",
    "lost_manifold",
    "mark_replaced",
    "replaced_error",
    "replacements",
    "was_replaced",
]


def _euclidean(radius: float | Tensor) -> geoopt.Manifold:
    return geoopt.Euclidean(ndim=2)


register(
    Kind(
        "euclidean",
        geoopt.Euclidean,
        _euclidean,
        norms=None,
        carry=None,
        colour="#dddddd",
        code=0,
        is_decomposed=False,
        aliases=("eu",),
    )
)
