"""The policy for gradients that are not finite: the same for every path.

All ``R²`` are known before anything moves. If some are not finite:

* Where values can be read without waiting, or with ``check_finite=True``, a gradient that is finite itself, but too
  large or too small to be squared in its type, is divided by a power of two and measured again; the step is the same.
  For any other such gradient, the step raises an error, and nothing has changed.
* Elsewhere, and with ``check_finite=False``, the group gets no gradient in this step and stays on its manifold;
  ``skipped_groups`` counts it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from fgo_geo.linalg import is_sharded, local_part
from fgo_geo.paths.protocol import Batch, StepOptions, Weight

__all__ = ["Measured", "divide", "gradient_refusal", "is_tiny", "largest_of", "odd_weights", "settle", "unit_of"]

_SMALLEST = 1e-30  # of R² over a weight: below, its digits are lost in single precision


@dataclass(eq=False, slots=True)
class Measured:
    """A batch in the middle of its step.

    Attributes:
        batch: The batch.
        options: Hyper-parameters.
        is_free: Whether values can be read on the host without waiting.
        check_finite: Raise an error for values that are not finite; None to do so only where reading does not wait for
            a device.
        squared: ``R²`` of all groups, of the gradient divided by ``unit``.
        kept: Which groups take their gradient; None if all do.
        unit: The divisor of the gradients of all groups; None for no division.
    """

    batch: Batch
    options: StepOptions
    is_free: bool
    check_finite: bool | None
    squared: Tensor
    kept: Tensor | None = None
    unit: Tensor | None = None


def settle(measured: Sequence[Measured], name_of: Callable[[Tensor], str], optimizer: str, unchanged: str) -> None:
    """Measure again, refuse or leave out what is not finite, before anything has moved.

    Args:
        measured: All batches of the step. Groups that are left out have ``R² = 0`` afterwards, and are not ``kept``.
        name_of: Says which parameter one is, for messages.
        optimizer: Name of the optimiser, for messages.
        unchanged: What a refusal leaves as it was, for messages.

    Raises:
        FloatingPointError: If a gradient on a manifold, or a weight, is not finite and that is checked.
    """
    readable = [own for own in measured if own.is_free or own.check_finite]
    _rescale(readable)
    for own in measured:
        finite = torch.isfinite(own.squared)
        if own in readable and bool(finite.all()):
            continue
        if own.is_free if own.check_finite is None else own.check_finite:
            raise _refusal(own, finite, measured, name_of, optimizer, unchanged)
        own.kept = finite
        own.squared = torch.where(finite, own.squared, 0)


def is_tiny(own: Measured) -> bool:
    """Whether the gradient of a weight may be too small to be squared; this matters for ``step_size="angle"`` only."""
    return own.options.step_size == "angle" and any(map(_is_tiny, own.squared.split(own.batch.counts)))


def _is_tiny(squared: Tensor) -> bool:
    return float(squared.sum()) < _SMALLEST


def _rescale(measured: Sequence[Measured]) -> None:
    """Divide gradients whose squares overflow or underflow by powers of two; spread ones have been divided before."""
    divide(measured, {weight: unit_of(largest_of(weight)) for weight in odd_weights(measured) if not weight.is_spread})


def odd_weights(measured: Sequence[Measured]) -> list[Weight]:
    """The weights with gradients that are not finite, or may be too large or too small to be squared.

    Args:
        measured: Batches whose values can be read.
    """
    odd: dict[Weight, None] = {}
    for own in measured:
        for weight, squared in zip(own.batch.weights, own.squared.split(own.batch.counts), strict=True):
            is_small = own.options.step_size == "angle" and _is_tiny(squared)
            is_large = own.check_finite is not False and not bool(torch.isfinite(squared).all())
            if is_small or is_large:
                odd[weight] = None
    return list(odd)


def largest_of(weight: Weight) -> float:
    """The largest entry of a weight's gradient; infinite if that or the weight is not finite."""
    grad = cast(Tensor, weight.grad)
    largest = float(torch.linalg.vector_norm(grad.detach(), math.inf)) if grad.numel() else 0.0
    return largest if largest < math.inf and bool(torch.isfinite(weight.param).all()) else math.inf


def unit_of(largest: float) -> float:
    """The power of two near the largest entry of a gradient; one if there is none.

    Example:
        >>> unit_of(1e30) > 1e29, unit_of(0.75), unit_of(math.inf)
        (True, 1.0, 1.0)
    """
    return math.ldexp(1.0, math.frexp(largest)[1]) if 0 < largest < math.inf else 1.0


def divide(measured: Sequence[Measured], units: Mapping[Weight, float]) -> None:
    """Divide gradients by powers of two, and measure again.

    A weight whose parts are in several batches is divided once, for all of them.

    Args:
        measured: Batches.
        units: What the gradients of weights are divided by.
    """
    units = {weight: unit for weight, unit in units.items() if unit != 1}
    divided: set[Weight] = set()
    for own in measured:
        if not any(weight in units for weight in own.batch.weights):
            continue
        of_weights = torch.tensor([units.get(weight, 1.0) for weight in own.batch.weights], dtype=torch.float64)
        unit = of_weights.repeat_interleave(torch.tensor(own.batch.counts)).to(own.squared.device)
        for weight in own.batch.weights:
            if weight in units and weight not in divided:
                _divide(weight, own.options, units[weight])
                divided.add(weight)
        first = own.squared.clone()  # right where it is finite and not tiny, whatever the other groups are
        again = own.batch.measure(own.options)
        is_right = (torch.isfinite(first) & (first >= _SMALLEST)) | (unit == 1)
        own.squared = torch.where(is_right, first / unit.square(), again)
        own.unit = unit if own.unit is None else own.unit * unit


def _divide(weight: Weight, options: StepOptions, unit: float) -> None:
    grad = cast(Tensor, weight.grad).detach()
    exponent = 1 - math.frexp(unit)[1]
    scaled = grad * 2.0 ** (exponent // 2) * 2.0 ** (exponent - exponent // 2)  # 1 / unit can be infinite
    if options.weight_decay != 0:  # which acts on Euclidean components, and has to be divided too
        decay = -options.weight_decay if options.maximize else options.weight_decay
        scaled = scaled.add(weight.param.detach(), alpha=decay * (1 / unit - 1))
    weight.grad = scaled.to(grad.dtype)


def _refusal(
    own: Measured,
    finite: Tensor,
    measured: Sequence[Measured],
    name_of: Callable[[Tensor], str],
    optimizer: str,
    unchanged: str,
) -> FloatingPointError:
    weights = [weight for other in measured for weight in other.batch.weights]
    for weight in weights:  # a weight that is not finite makes all gradients such
        here = local_part(weight.param) if is_sharded(weight.param) else weight.param
        if not bool(torch.isfinite(here).all()):
            return FloatingPointError(
                f"{optimizer}: {name_of(weight.owner)} is not finite itself; {unchanged}. Load an earlier checkpoint"
            )
    per_weight = zip(own.batch.weights, finite.split(own.batch.counts), strict=True)
    bad = next(weight for weight, ok in per_weight if not bool(ok.all()))
    return gradient_refusal(optimizer, name_of(bad.owner), bad.whole_manifold, unchanged)


def gradient_refusal(optimizer: str, name: str, manifold: object, unchanged: str) -> FloatingPointError:
    """The error of a gradient that is not finite.

    Args:
        optimizer: Name of the optimiser.
        name: Name of the parameter.
        manifold: Its manifold.
        unchanged: What the refusal leaves as it was.

    Returns:
        The error.
    """
    return FloatingPointError(
        f"{optimizer}: the gradient of {name} on {manifold} is not finite; {unchanged}. "
        "Look for such values in the inputs and the loss; lower the learning rate if they appeared during training, or "
        "use a GradScaler in half precision"
    )
