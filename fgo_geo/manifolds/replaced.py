"""Parameters that a model no longer has, so that an optimiser that still holds them can say so.

To put a weight on a manifold, or to take it off, makes a new parameter. An optimiser that was built before would go on
with the old one, whose gradient never comes, and train nothing of it without a word.
"""

from __future__ import annotations

from torch import Tensor

__all__ = ["mark_replaced", "was_replaced"]

_MARK = "_fgo_geo_replaced"


def mark_replaced(param: Tensor) -> None:
    """Remember that another parameter has taken the place of this one in its model.

    Args:
        param: The old parameter.
    """
    setattr(param, _MARK, True)


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
    return getattr(param, _MARK, False)
