"""Optimisers, step sizes and learning-rate schedules."""

from fgo_geo.optim.fgsgd import RiemannianFGSGD
from fgo_geo.optim.step_size import theorem_step_bound, theorem_step_scale

__all__ = ["RiemannianFGSGD", "theorem_step_bound", "theorem_step_scale"]
