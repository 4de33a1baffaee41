"""Sharded parameters, and the manifolds that they are on.

Sharding replaces a parameter by one of torch's own class, which has no manifold. The package therefore *declares*
sharded parameters: an attribute holds the manifold, or None for a plain parameter. Optimisers of this package reject
sharded parameters that are not declared. Geoopt's optimisers recognise constrained weights by their class and would
treat a sharded one as plain: after the first declaration, their step raises an error if they hold one.
"""

from __future__ import annotations

from typing import Any

import geoopt
import torch
from geoopt.optim.mixin import OptimMixin
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

__all__ = ["STEPS_SHARDS", "declare", "is_declared"]

STEPS_SHARDS = "_fgo_geo_steps_shards"
"""Name of the attribute of optimisers that keep sharded weights on their manifolds."""

_DECLARED = "_fgo_geo_declared"
_watches = False


def declare(param: Tensor, manifold: geoopt.Manifold | None) -> None:
    """Declare the manifold of a sharded parameter.

    Args:
        param: The parameter.
        manifold: Its manifold; None for a plain parameter.
    """
    global _watches
    if not _watches:
        register_optimizer_step_pre_hook(_refuse_others)
        _watches = True
    setattr(param, _DECLARED, True)
    if manifold is not None:
        param.manifold = manifold  # pyright: ignore[reportAttributeAccessIssue]
    elif hasattr(param, "manifold"):
        del param.manifold  # pyright: ignore[reportAttributeAccessIssue]


def is_declared(param: Any) -> bool:
    """Whether a sharded parameter has been declared.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> is_declared(weight)
        False
        >>> declare(weight, None)
        >>> is_declared(weight)
        True
    """
    return getattr(param, _DECLARED, False)


def _refuse_others(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Before a step of any optimiser: raise if it is one of Geoopt's and would treat a sharded weight as plain."""
    if torch.compiler.is_compiling() or not isinstance(optimizer, OptimMixin) or hasattr(optimizer, STEPS_SHARDS):
        return
    for group in optimizer.param_groups:
        for param in group["params"]:
            if is_declared(param) and hasattr(param, "manifold"):
                raise RuntimeError(
                    f"{type(optimizer).__name__} does not know sharded weights on manifolds, and would step one of "
                    f"shape {tuple(param.shape)} as a plain one; no parameter was changed. Use "
                    "fgo_geo.RiemannianFGSGD, or fgo_geo.on_manifolds with a torch optimiser"
                )
