"""Network weights on products of manifolds: FG-SGD and channel-directed gradients on PyTorch and Geoopt."""

from fgo_geo import optim
from fgo_geo.manifolds import Oblique, ScaledSphere, Stiefel
from fgo_geo.optim import RiemannianFGSGD

__all__ = [
    "Oblique",
    "RiemannianFGSGD",
    "ScaledSphere",
    "Stiefel",
    "optim",
]

__version__ = "0.1.0"
