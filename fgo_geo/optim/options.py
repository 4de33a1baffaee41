"""The options of a parameter group: defaults, checks, and the hyper-parameters of a step.

A parameter group is a dictionary that schedules, users and checkpoints write to. :func:`fill_in` adds the options that
an old checkpoint lacks, :func:`check_options` refuses values that are out of range, and :func:`step_options` converts
the dictionary to the frozen :class:`~fgo_geo.paths.rules.StepOptions` of a step. Checks run when a group is added, and
in every step whose options differ from those of the step before.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal, get_args

from torch import Tensor

from fgo_geo.linalg import reads_for_free
from fgo_geo.optim.step_size import SPIKE, longest_step
from fgo_geo.paths.rules import Rule, StepOptions, StepSize, Update, momentum_sgd
from fgo_geo.weights.words import small

__all__ = ["OPTIONS", "Norm", "check_options", "fill_in", "step_options"]

Norm = Literal["batch", "running"]

_PASSED_ON = (
    *("momentum", "dampening", "weight_decay", "nesterov", "maximize", "foreach", "fused"),
    *("step_size", "angle", "rho", "radius_invariant", "update"),
)
OPTIONS = ("lr", *_PASSED_ON, "norm", "curvature", "stabilize", "longest_step")
"""Names of the options that :func:`check_options` and :func:`step_options` read."""

_LATER = {"angle": 1.0, "norm": "batch", "master_weights": True}  # options that version 0.1.0 did not have

_CHOICES = {"step_size": get_args(StepSize), "update": get_args(Update), "norm": get_args(Norm)}


def fill_in(defaults: dict[str, Any], group: dict[str, Any]) -> None:
    """Add the options that are missing in a group from an earlier version, from torch's SGD or from Geoopt.

    Args:
        defaults: The optimiser's defaults; options that are newer than they are join them.
        group: The parameter group.
    """
    for option, value in _LATER.items():
        defaults.setdefault(option, value)
    group.setdefault("longest_step", math.inf)  # momentum may have any length
    for option, value in defaults.items():
        group.setdefault(option, value)


def step_options(group: dict[str, Any], rule: Rule = momentum_sgd) -> StepOptions:
    """The hyper-parameters of a step.

    With momentum, the bound on the length of a step never falls: momentum of earlier steps is still in the buffers
    after the factor has dropped. The bound is kept in the group, as ``"longest_step"``.

    Args:
        group: A parameter group, checked.
        rule: The rule of the optimiser; the length of a step is bounded for :func:`momentum_sgd` alone.

    Returns:
        A frozen record.
    """
    lr, curvature = group["lr"], group["curvature"]
    known = {name: group[name] for name in _PASSED_ON}
    rate = lr if isinstance(lr, Tensor) and not reads_for_free(lr) else float(lr)
    bound = 1.0 if curvature is None else None if curvature == "manifold" else curvature
    options = StepOptions(lr=rate, curvature=bound, rule=rule, **known)
    if rule is not momentum_sgd:
        return options
    longest = longest_step(options, SPIKE if group["norm"] == "running" else 1.0)
    if options.momentum != 0:
        longest = group["longest_step"] = max(longest, group["longest_step"])
    return replace(options, longest_step=longest)


def check_options(options: Mapping[str, Any], optimizer: str, number: int | None = None) -> dict[str, Any]:
    """Raise if an option is out of range; words may mix upper and lower case.

    Args:
        options: All options of a parameter group.
        optimizer: Name of the optimiser, for messages.
        number: Number of the group in a step, for messages; None if it is new.

    Returns:
        The options that are words, in small letters.

    Raises:
        TypeError: If an option that must be a number is not.
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
    where = f"param_groups[{number}]"
    since = (
        ""
        if number is None
        else f"; no parameter was changed. Check which code has set it in {where} since the last step"
    )

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
