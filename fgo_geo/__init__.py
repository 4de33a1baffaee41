"""Network weights on products of manifolds: FG-SGD and channel-directed gradients on PyTorch and Geoopt."""

from fgo_geo import bounds, grouping, norms, optim
from fgo_geo.constrain import Plan, constrain, plan_of, unconstrain
from fgo_geo.grouping import Collection, collection
from fgo_geo.manifolds import Oblique, ProductOfGroups, ScaledSphere, Stiefel
from fgo_geo.optim import RiemannianFGSGD
from fgo_geo.optim.channel_directed import channel_directed, channel_directed_gradient

__all__ = [  # noqa: RUF022  in groups, for readers
    # manifolds
    "Oblique",
    "ProductOfGroups",
    "ScaledSphere",
    "Stiefel",
    # groups, and models on them
    "Collection",
    "Plan",
    "collection",
    "constrain",
    "grouping",
    "plan_of",
    "unconstrain",
    # training
    "RiemannianFGSGD",
    "channel_directed",
    "channel_directed_gradient",
    "optim",
    # measuring
    "bounds",
    "norms",
]

__version__ = "0.1.0"
