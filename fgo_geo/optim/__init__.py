"""Optimisers, step sizes, learning-rate schedules and channel-directed gradients.

``fgo_geo.optim.channel_directed`` is the module; the function of that name is ``fgo_geo.channel_directed``.
"""

from fgo_geo.optim.channel_directed import ChannelDirected
from fgo_geo.optim.channel_metrics import channel_directed_gradient, channel_inner
from fgo_geo.optim.fgsgd import RiemannianFGSGD
from fgo_geo.optim.on_manifolds import OnManifolds, on_manifolds
from fgo_geo.optim.schedules import RobbinsMonroLR
from fgo_geo.optim.step_size import momentum_gain, theorem_step_bound, theorem_step_scale
from fgo_geo.optim.telemetry import Telemetry, telemetry

__all__ = [
    "ChannelDirected",
    "OnManifolds",
    "RiemannianFGSGD",
    "RobbinsMonroLR",
    "Telemetry",
    "channel_directed_gradient",
    "channel_inner",
    "momentum_gain",
    "on_manifolds",
    "telemetry",
    "theorem_step_bound",
    "theorem_step_scale",
]
