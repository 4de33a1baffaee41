"""Network weights on products of manifolds: FG-SGD and channel-directed gradients on PyTorch and Geoopt."""

from typing import TYPE_CHECKING

from fgo_geo import (
    _former_names,
    _geoopt,  # noqa: F401  # pyright: ignore  first: it imports Geoopt
    distributed,
    optim,
)
from fgo_geo.manifolds import Ball, Oblique, ProductOfGroups, ScaledSphere, SpectralBall, SpectralSphere, Stiefel
from fgo_geo.measures import bounds
from fgo_geo.measures.report import report
from fgo_geo.models.constrain import constrain, unconstrain
from fgo_geo.models.folding import fold_batchnorm
from fgo_geo.models.plan import Plan, plan_of
from fgo_geo.models.renormalize import remove_renormalization, renormalize
from fgo_geo.optim import RiemannianFGSGD, on_manifolds, telemetry
from fgo_geo.optim.channel_directed import channel_directed
from fgo_geo.optim.channel_metrics import channel_directed_gradient
from fgo_geo.paths import router as kernels
from fgo_geo.weights import grouping, norms
from fgo_geo.weights.grouping import Collection, collection
from fgo_geo.weights.kinds import register_kind
from fgo_geo.weights.layout import WeightLayout, register_layout
from fgo_geo.weights.words import did_you_mean

__all__ = [  # noqa: RUF022  in groups, for readers
    # manifolds
    "Ball",
    "Oblique",
    "ProductOfGroups",
    "ScaledSphere",
    "SpectralBall",
    "SpectralSphere",
    "Stiefel",
    # groups, and models on them
    "Collection",
    "Plan",
    "WeightLayout",
    "collection",
    "constrain",
    "grouping",
    "plan_of",
    "register_kind",
    "register_layout",
    "unconstrain",
    # training
    "RiemannianFGSGD",
    "channel_directed",
    "channel_directed_gradient",
    "distributed",
    "kernels",
    "on_manifolds",
    "optim",
    "remove_renormalization",
    "renormalize",
    # measuring
    "bounds",
    "fold_batchnorm",
    "norms",
    "report",
    "telemetry",
]

__version__ = "0.2.0"

_former_names.register()

if not TYPE_CHECKING:

    def __getattr__(name):
        hint = "" if name.startswith("_") else did_you_mean(name, __all__)
        raise AttributeError(f"module 'fgo_geo' has no attribute {name!r}{hint}")
