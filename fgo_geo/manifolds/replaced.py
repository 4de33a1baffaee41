"""Parameters that a model no longer uses, or that have lost their manifold: optimisers that hold one raise an error.

Constraining a weight creates a new parameter, and so do :func:`~fgo_geo.unconstrain` and
``load_state_dict(assign=True)``. An optimiser that was built earlier would keep the old parameter, which gets no
gradient any more, and would silently stop training the weight. Therefore, after every replacement, the next step of
each torch optimiser checks its parameters.
"""

from __future__ import annotations

from typing import Any

import geoopt
import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

__all__ = ["REPLACED", "lost_manifold", "mark_replaced", "replaced_error", "replacements", "was_replaced"]

REPLACED = "_fgo_geo_replaced"
"""Name of the attribute that marks such a parameter."""

_CHECKED = "_fgo_geo_checked"
_replacements = 0


def mark_replaced(param: Tensor, name: str = "") -> None:
    """Remember that another parameter has taken the place of this one in its model.

    Args:
        param: The old parameter.
        name: Its name in the model, for messages.
    """
    global _replacements
    setattr(param, REPLACED, name or True)
    if _replacements == 0:
        register_optimizer_step_pre_hook(_refuse_replaced)
    _replacements += 1


def replacements() -> int:
    """The number of parameters that have been replaced so far in this process."""
    return _replacements


def was_replaced(param: Tensor) -> bool:
    """Whether another parameter has taken the place of this one in its model.

    Args:
        param: Any parameter.

    Returns:
        A bool.

    Example:
        >>> import torch
        >>> import fgo_geo
        >>> layer = torch.nn.Conv2d(8, 8, 3)
        >>> weight = layer.weight
        >>> plan = fgo_geo.constrain(layer, first_layer=True)
        >>> was_replaced(weight), was_replaced(layer.weight)
        (True, False)
    """
    return bool(getattr(param, REPLACED, False))


def replaced_error(what: str) -> RuntimeError:
    """The error for a parameter that its model no longer has.

    Args:
        what: Optimiser and name of the parameter.

    Returns:
        The error.
    """
    return RuntimeError(
        f"{what} is no longer a parameter of its model: constrain, unconstrain or load_state_dict(assign=True) has "
        "replaced it; no parameter was changed. Build the optimiser after that call, from model.named_parameters()"
    )


def lost_manifold(manifold: geoopt.Manifold, what: str) -> RuntimeError:
    """The error for a parameter that was on a manifold and has become a plain one.

    Args:
        manifold: Its manifold.
        what: Optimiser and name of the parameter.
    """
    return RuntimeError(
        f"{what} was on {manifold} when the optimiser was built, and is a plain parameter now; no parameter was "
        "changed. Converting a module under torch.__future__.set_swap_module_params_on_conversion(True) has this "
        "effect: declare the weight again, `module.weight = "
        "geoopt.ManifoldParameter(manifold.projx(module.weight.detach()), manifold=manifold)`, and build the optimiser "
        "after that"
    )


def _refuse_replaced(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Before a step of any optimiser: raise if it holds a parameter that was replaced and gets no gradient."""
    if torch.compiler.is_compiling() or optimizer.__dict__.get(_CHECKED) == _replacements:
        return
    for number, group in enumerate(optimizer.param_groups):
        for index, param in enumerate(group["params"]):
            if param.grad is None and was_replaced(param):
                names = group.get("param_names")
                known = names[index] if names else getattr(param, REPLACED)
                name = repr(known) if isinstance(known, str) else f"param_groups[{number}]['params'][{index}]"
                raise replaced_error(f"{type(optimizer).__name__}: {name}, of shape {tuple(param.shape)},")
    optimizer.__dict__[_CHECKED] = _replacements
