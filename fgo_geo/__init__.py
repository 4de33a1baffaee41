"""Network weights on products of manifolds: FG-SGD and channel-directed gradients on PyTorch and Geoopt."""

from fgo_geo import bounds, grouping, norms, optim
from fgo_geo.constrain import Plan, constrain, plan_of, unconstrain
from fgo_geo.folding import fold_batchnorm
from fgo_geo.grouping import Collection, collection
from fgo_geo.manifolds import Oblique, ProductOfGroups, ScaledSphere, Stiefel
from fgo_geo.optim import RiemannianFGSGD
from fgo_geo.optim.channel_directed import channel_directed, channel_directed_gradient
from fgo_geo.renormalize import remove_renormalization, renormalize
from fgo_geo.report import report

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
    "remove_renormalization",
    "renormalize",
    # measuring
    "bounds",
    "fold_batchnorm",
    "norms",
    "report",
]

__version__ = "0.1.0"
