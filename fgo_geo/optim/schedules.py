"""Learning rates under which Riemannian stochastic gradient descent converges.

The convergence theorem behind the FG-SGD step ([Bonnabel2013]_, theorem 2; Mathematics, section 4)
needs two conditions on the learning rates: their sum diverges, so that every point stays within reach, and
the sum of their squares converges, so that the gradient noise dies out ([RobbinsMonro1951]_). The
family ``lr_0 / (1 + t/T)^a`` meets both exactly when ``1/2 < a <= 1``. The class is an ordinary
torch scheduler, so it works with any optimiser, and after a warm-up in ``SequentialLR``.
"""

from __future__ import annotations

import math

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

__all__ = ["RobbinsMonroLR"]


class RobbinsMonroLR(LRScheduler):
    r"""Decay every learning rate as a power of time that meets the Robbins-Monro conditions.

    .. math:: \mathrm{lr}_t = \frac{\mathrm{lr}_0}{(1 + t/T)^a}, \qquad
        \sum_t \mathrm{lr}_t = \infty, \qquad \sum_t \mathrm{lr}_t^2 < \infty

    ``t`` counts the calls of ``step()``: epochs or optimiser steps, as the caller chooses, and ``T``
    is in the same unit. The rate is computed from ``lr_0`` and ``t`` alone, so no rounding
    accumulates, and a change made to ``group["lr"]`` by hand lasts until the next ``step()`` only.

    Args:
        optimizer: Any torch optimiser. Each parameter group keeps its own ``lr_0``; learning rates that are
            tensors stay tensors and are filled in place.
        time_constant: ``T > 0``, the time after which the rate has fallen to ``2**-a`` of ``lr_0``. The default
            of 10 is meant for one ``step()`` per epoch.
        exponent: ``a`` in (1/2, 1]. The default of 1 is the classical choice; values near 1/2 keep the rate
            high for longer.
        last_epoch: The last ``t`` that was used, -1 to start from zero, as for every torch scheduler.

    Raises:
        ValueError: If ``time_constant`` is not positive and finite, or ``exponent`` is outside (1/2, 1].

    Source:
        [Bonnabel2013]_, theorem 2; [RobbinsMonro1951]_; Mathematics, section 4.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
        >>> scheduler = RobbinsMonroLR(optimizer, time_constant=2.0)
        >>> for _ in range(4):
        ...     optimizer.step()
        ...     scheduler.step()
        >>> scheduler.get_last_lr()  # 0.5 / (1 + 4/2)
        [0.16666666666666666]
    """

    def __init__(
        self,
        optimizer: Optimizer,
        time_constant: float = 10.0,
        exponent: float = 1.0,
        last_epoch: int = -1,
    ) -> None:
        if not 0 < time_constant < math.inf:
            raise ValueError(
                f"RobbinsMonroLR: time_constant must be positive and finite, got {time_constant}: "
                "lr_0 / (1 + t/T)^a needs a time scale T > 0 in units of scheduler steps, "
                "for instance a tenth to a half of the training's length"
            )
        if not exponent <= 1:
            raise ValueError(
                f"RobbinsMonroLR: exponent must be at most 1, got {exponent}: beyond 1 the sum of lr_t is "
                "finite, so training can stop short of a minimum (the theorem needs sum lr_t = inf)"
            )
        if not exponent > 0.5:
            raise ValueError(
                f"RobbinsMonroLR: exponent must exceed 1/2, got {exponent}: up to 1/2 the sum of lr_t^2 is "
                "infinite, so the gradient noise never dies out (the theorem needs sum lr_t^2 < inf)"
            )
        self.time_constant = time_constant
        self.exponent = exponent
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float | Tensor]:
        """Return ``lr_0 / (1 + t/T)^a`` for every parameter group."""
        decay = (1 + self.last_epoch / self.time_constant) ** self.exponent
        return [initial / decay for initial in self.base_lrs]
