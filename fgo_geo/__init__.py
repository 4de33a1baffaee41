"""Network weights on products of manifolds: FG-SGD and channel-directed gradients on PyTorch and Geoopt."""

from fgo_geo import grouping, optim
from fgo_geo.constrain import Plan, constrain, plan_of, unconstrain
from fgo_geo.grouping import Collection, collection
from fgo_geo.manifolds import Oblique, ProductOfGroups, ScaledSphere, Stiefel
from fgo_geo.optim import RiemannianFGSGD

__all__ = [
    "Collection",
    "Oblique",
    "Plan",
    "ProductOfGroups",
    "RiemannianFGSGD",
    "ScaledSphere",
    "Stiefel",
    "collection",
    "constrain",
    "grouping",
    "optim",
    "plan_of",
    "unconstrain",
]

__version__ = "0.1.0"
