"""What a step is asked to do, and what it asks of other processes where weights are sharded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from fgo_geo.optim.finite import Measured
from fgo_geo.paths.protocol import StepOptions, Weight

__all__ = ["Exchange", "StepRequest"]


@dataclass(frozen=True)
class StepRequest:
    """What a parameter group passes to a step.

    Attributes:
        options: Hyper-parameters.
        weights: Weights on manifolds that have gradients.
        check_finite: Raise on gradients that are not finite; None for only where reading does not wait for a device.
        running: Compute ``τ`` from a running mean of ``R²`` over earlier steps.
        plain: Parameters without a manifold, and their gradients.
    """

    options: StepOptions
    weights: Sequence[Weight]
    check_finite: bool | None = None
    running: bool = False
    plain: Sequence[tuple[Tensor, Tensor]] = ()


class Exchange(Protocol):
    """What a step of sharded weights needs from other processes; :mod:`fgo_geo.distributed.exchange` implements it."""

    def collect(self, requests: Sequence[StepRequest]) -> list[StepRequest]:
        """The requests, with what this process steps in place of sharded weights: its parts, and whole weights."""
        ...

    def agree(self, error: Exception | None) -> None:
        """Raise on all processes if one of them has an error."""
        ...

    def add_up(self, measured: Sequence[Measured], error: Exception | None) -> Exception | None:
        """Sum ``R²`` of groups whose components several processes have; return an error to agree on, or raise."""
        ...

    def put_back(self, scales: dict[Tensor, Tensor]) -> dict[Tensor, Tensor]:
        """Return whole weights to their shards; give all processes the ``τ`` of these weights, and return them."""
        ...

    def scales(self) -> dict[Tensor, Tensor]:
        """``τ`` of the weights of which every process steps a share; all processes have to call this."""
        ...
