r"""Functions that can be differentiated any number of times, backward and forward.

Two things are needed where torch has no such derivative. *Even functions of a length*, such as ``cos(t)`` and
``sin(t) / t``, are smooth functions of ``t²``; :func:`cosine`, :func:`sinc` and :func:`arctangent` take that square,
and near zero they are a series, so that no derivative divides by ``t``. *Results of an iteration or a factorisation*
have a derivative in closed form, in a ``torch.autograd.Function``; :func:`apply` calls one so that each of torch's
transforms works or says what to do instead.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fgo_geo.linalg.values import is_differentiated, reads_for_free, traces

__all__ = ["apply", "arctangent", "cosine", "save", "sinc"]

_TERMS = 14
_NEAR = 0.05  # where the slowest series, that of the arctangent, is exact to 1e-19
_SIGNS = [(-1.0) ** k for k in range(_TERMS)]
_COSINE = [sign / math.factorial(2 * k) for k, sign in enumerate(_SIGNS)]
_SINC = [sign / math.factorial(2 * k + 1) for k, sign in enumerate(_SIGNS)]
_ARCTANGENT = [sign / (2 * k + 1) for k, sign in enumerate(_SIGNS)]


def cosine(squared: Tensor) -> Tensor:
    """``cos(t)`` as a function of ``t²``.

    Example:
        >>> cosine(torch.tensor([0.0, torch.pi**2]))
        tensor([ 1., -1.])
    """
    return _even(squared, torch.cos, _COSINE)


def sinc(squared: Tensor) -> Tensor:
    """``sin(t) / t`` as a function of ``t²``; one at zero.

    Example:
        >>> sinc(torch.tensor([0.0, (torch.pi / 2) ** 2])) * torch.pi
        tensor([3.1416, 2.0000])
    """
    return _even(squared, lambda t: torch.sinc(t / math.pi), _SINC)


def arctangent(squared: Tensor) -> Tensor:
    """``atan(t) / t`` as a function of ``t²``; one at zero.

    Example:
        >>> arctangent(torch.tensor([0.0, 1.0])) * 4
        tensor([4.0000, 3.1416])
    """
    return _even(squared, lambda t: torch.where(t > 0, torch.atan(t) / torch.where(t > 0, t, 1), 1), _ARCTANGENT)


def _even(squared: Tensor, far: Callable[[Tensor], Tensor], coefficients: list[float]) -> Tensor:
    if not is_differentiated(squared) and reads_for_free(squared):
        return far(squared.sqrt())
    near = squared < _NEAR
    small = torch.where(near, squared, 0)
    series = torch.full_like(small, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        series = coefficient + small * series
    return torch.where(near, series, far(torch.where(near, 1, squared).sqrt()))


def apply(function: Any, *args: Any) -> Any:
    """Call a ``torch.autograd.Function`` whose forward derivative is its static method ``push``.

    ``torch.compile`` traces no function that has a forward derivative, so inside it there is none.

    Args:
        function: The class. Its derivatives are made of differentiable operations.
        args: Its arguments.

    Returns:
        Its outputs.

    Raises:
        NotImplementedError: In forward mode within forward mode, where torch would return wrong derivatives.
    """
    if torch.compiler.is_compiling():
        return function.apply(*args)
    if not traces() and not any(isinstance(x, Tensor) and is_differentiated(x) for x in args):
        return function.forward(*args)  # apply takes 50 µs
    if _forward_levels() > 1:
        raise NotImplementedError(
            f"{function.__name__.strip('_')} has no forward derivative of a forward derivative, of which torch drops a "
            "part; take one of them backward: torch.func.hessian, or jacfwd of jacrev"
        )
    return _with_forward_derivative(function).apply(*args)


@functools.cache
def _with_forward_derivative(function: Any) -> Any:
    return type(function.__name__, (function,), {"jvp": staticmethod(function.push)})


def _forward_levels() -> int:
    """How many of the transforms around the caller take forward derivatives."""
    stack: Any = torch._C._functorch.get_interpreter_stack()  # pyright: ignore
    return sum(level.key() == torch._C._functorch.TransformType.Jvp for level in stack or ())  # pyright: ignore


def save(ctx: Any, *tensors: Tensor) -> None:
    """Keep tensors for derivatives in both directions."""
    ctx.save_for_backward(*tensors)
    ctx.save_for_forward(*tensors)
