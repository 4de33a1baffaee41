"""Checks of the options of a parameter group: when it is added, and before every step, as schedules change them."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from typing import Any, Literal, get_args

from torch import Tensor

from fgo_geo.linalg import reads_for_free
from fgo_geo.paths.protocol import StepSize, Update
from fgo_geo.weights.words import small

__all__ = ["OPTIONS", "Norm", "check_options"]

Norm = Literal["batch", "running"]

OPTIONS = (
    *("lr", "momentum", "dampening", "weight_decay", "nesterov", "foreach", "fused", "stabilize"),
    *("step_size", "angle", "norm", "rho", "curvature", "radius_invariant", "update"),
)
"""Names of the options that :func:`check_options` reads."""

_CHOICES = {"step_size": get_args(StepSize), "update": get_args(Update), "norm": get_args(Norm)}


def check_options(options: Mapping[str, Any], optimizer: str, since: str = "") -> dict[str, Any]:
    """Raise if an option is out of range; words are read in any case of letters.

    Args:
        options: All options of a parameter group.
        optimizer: Name of the optimiser, for messages.
        since: What to add to messages, of options that were changed.

    Returns:
        The options that are words, in small letters.

    Raises:
        TypeError: If a number is none.
        ValueError: If an option is out of range.

    Example:
        >>> import torch
        >>> from fgo_geo import RiemannianFGSGD
        >>> optimizer = RiemannianFGSGD([torch.nn.Parameter(torch.ones(2))], lr="0.1")
        Traceback (most recent call last):
            ...
        TypeError: RiemannianFGSGD: lr must be a number, got '0.1'; write it without quotes
    """
    words = {name: small(options[name]) for name in (*_CHOICES, "curvature")}

    def require(holds: bool, what: str, name: str) -> None:
        if not holds:
            raise ValueError(f"{optimizer}: {name} must be {what}, got {options[name]!r}{since}")

    lr = options["lr"]
    if isinstance(lr, Tensor):
        if lr.numel() != 1:
            raise ValueError(f"{optimizer}: lr must be a number or hold one element, got shape {tuple(lr.shape)}")
        lr = float(lr) if reads_for_free(lr) else 0.0  # elsewhere, reading it would wait for the device
    values = {"lr": lr, **{name: options[name] for name in ("momentum", "dampening", "weight_decay", "rho", "angle")}}
    for name, value in values.items():
        if not isinstance(value, numbers.Real) or isinstance(value, bool):
            quotes = "; write it without quotes" if isinstance(value, str) else ""
            raise TypeError(f"{optimizer}: {name} must be a number, got {value!r}{since}{quotes}")
        if name != "dampening":
            require(float(value) >= 0, "at least 0", name)
        require(math.isfinite(value), "finite", name)
    require(options["momentum"] <= 1, "at most 1", "momentum")
    if options["fused"] and options["foreach"]:
        raise ValueError(f"{optimizer}: fused and foreach exclude each other, got True for both{since}")
    if options["nesterov"] and (options["momentum"] <= 0 or options["dampening"] != 0):
        raise ValueError(
            f"{optimizer}: nesterov needs momentum > 0 and dampening = 0, got momentum={options['momentum']!r}, "
            f"dampening={options['dampening']!r}{since}"
        )
    for name, choices in _CHOICES.items():
        require(words[name] in choices, f"one of {choices}", name)
    curvature = words["curvature"]
    is_bound = isinstance(curvature, numbers.Real) and 0 <= float(curvature) < math.inf
    require(
        curvature in (None, "manifold") or is_bound, 'None, "manifold" or a finite number of at least 0', "curvature"
    )
    stabilize = options["stabilize"]
    is_count = isinstance(stabilize, int) and stabilize > 0
    require(stabilize is None or is_count, "None or a positive integer", "stabilize")
    if words["norm"] == "running" and words["step_size"] != "theorem":
        raise ValueError(
            f'{optimizer}: norm="running" is for step_size="theorem", got step_size={options["step_size"]!r}{since}'
        )
    if options["radius_invariant"] and words["step_size"] == "angle":
        raise ValueError(
            f'{optimizer}: radius_invariant is for step_size="theorem" or "constant", as an angle is the same at every '
            f"radius; got step_size='angle'{since}"
        )
    return words
