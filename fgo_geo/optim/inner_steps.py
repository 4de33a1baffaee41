"""Steps inside a step of the same optimiser, for which torch calls the step hooks again."""

from __future__ import annotations

import sys

import torch
from torch.optim import Optimizer

__all__ = ["is_inner_step"]

_HOOKED = Optimizer.profile_hook_step(Optimizer.step).__code__  # calls a class's own step between its hooks


def is_inner_step(optimizer: Optimizer) -> bool:
    """Whether the step whose hooks torch calls is inside another step of the same optimiser.

    If the step of a subclass calls that of its base class, torch calls the hooks for both, provided that the base class
    had an instance before.

    Args:
        optimizer: What torch passed to the hook that asks.

    Returns:
        A bool; False while ``torch.compile`` traces.

    Example:
        >>> optimizer = torch.optim.SGD([torch.zeros(2, requires_grad=True)], lr=0.1)
        >>> hook = optimizer.register_step_pre_hook(lambda optimizer, *_: print(is_inner_step(optimizer)))
        >>> class Mine(torch.optim.SGD):
        ...     def step(self, closure=None):
        ...         return super().step(closure)
        >>> mine = Mine([torch.zeros(2, requires_grad=True)], lr=0.1)
        >>> hook = mine.register_step_pre_hook(lambda optimizer, *_: print(is_inner_step(optimizer)))
        >>> optimizer.step()
        False
        >>> mine.step()
        False
        True
    """
    if torch.compiler.is_compiling():
        return False
    steps, frame = 0, sys._getframe()  # pyright: ignore[reportPrivateUsage]
    while frame is not None:
        steps += frame.f_code is _HOOKED and frame.f_locals["self"] is optimizer
        frame = frame.f_back
    return steps > 1
