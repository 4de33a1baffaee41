"""Component manifolds and their products, as Geoopt manifolds: tensors in, tensors out."""

from fgo_geo.manifolds.embedded import ComponentManifold, EmbeddedManifold
from fgo_geo.manifolds.oblique import Oblique
from fgo_geo.manifolds.product import ProductOfGroups
from fgo_geo.manifolds.replaced import mark_replaced, was_replaced
from fgo_geo.manifolds.sphere import ScaledSphere
from fgo_geo.manifolds.stiefel import Stiefel

__all__ = [
    "ComponentManifold",
    "EmbeddedManifold",
    "Oblique",
    "ProductOfGroups",
    "ScaledSphere",
    "Stiefel",
    "mark_replaced",
    "was_replaced",
]
