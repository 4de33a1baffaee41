"""Parameters that an optimiser is given: checks of points, names, and single-precision copies of half ones."""

from __future__ import annotations

from typing import Any

import geoopt
import torch
from torch import Tensor

from fgo_geo.manifolds import EmbeddedManifold, ProductOfGroups
from fgo_geo.optim.base import manifold_of
from fgo_geo.optim.groups import group_norms

__all__ = ["HALF", "Masters", "check_point", "name_in"]

HALF = (torch.float16, torch.bfloat16)
"""Types of weights that have a master copy."""


def check_point(param: Tensor, what: str, step_size: str) -> None:
    """Raise if a parameter is far from its manifold; move the manifold to the parameter's device.

    Args:
        param: Any parameter.
        what: Optimiser and name of the parameter, for messages.
        step_size: How steps are scaled.

    Raises:
        ValueError: If the parameter is off its manifold, or its norm is to be known and is not.
    """
    manifold = manifold_of(param)
    if isinstance(manifold, EmbeddedManifold) and not param.is_meta:
        manifold.to(param.device)
        manifold.require_point(param.detach(), what, "move it there by `with torch.no_grad(): param.proj_()`")
    if step_size == "angle" and manifold is not None:
        has_free = isinstance(manifold, ProductOfGroups) and "euclidean" in manifold.partition.kinds
        if bool(group_norms(manifold, tuple(param.shape)).isnan().any()) and not has_free:
            raise ValueError(
                f"{what}: step_size='angle' needs a weight of fixed norm, and {manifold} fixes none; take "
                "step_size='constant' for it, in a parameter group of its own"
            )


def name_in(optimizer: torch.optim.Optimizer, param: Tensor) -> str:
    """What a parameter is called in messages: its name, if the optimiser was given names, and its place."""
    for number, group in enumerate(optimizer.param_groups):
        for position, candidate in enumerate(group["params"]):
            if candidate is param:
                names = group.get("param_names")
                name = f"{names[position]!r}, " if names else ""
                return f"{name}param_groups[{number}]['params'][{position}] of shape {tuple(param.shape)}"
    return f"a parameter of shape {tuple(param.shape)}"


class Masters:
    """Copies in single precision of half-precision weights, in the optimiser's state under ``"master"``.

    Args:
        state: The optimiser's state by parameter.
    """

    def __init__(self, state: dict[Tensor, Any]) -> None:
        self._state = state
        self._versions: dict[Tensor, int] = {}

    def of(self, param: Tensor, manifold: geoopt.Manifold) -> Tensor:
        """The copy of a weight, made anew if somebody has written to the weight since it was last written back."""
        state = self._state[param]
        master = state.get("master")
        if master is None or master.device != param.device or self._versions.get(param) != param._version:
            if master is None or not torch.equal(master.to(param), param):
                master = state["master"] = manifold.projx(param.detach().float())
            self.written(param)
        return master

    def written(self, param: Tensor) -> None:
        """Remember that the weight is its copy, rounded."""
        self._versions[param] = param._version
