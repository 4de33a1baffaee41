"""The path of plain parameters: the step of :class:`torch.optim.SGD`, by torch's own function, bit for bit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor
from torch.optim.sgd import sgd

from fgo_geo.paths.protocol import Batch, Claim, Path, Reason, Refusal, StepOptions, Weight

__all__ = ["TorchSGD"]


class TorchSGD(Path):
    """The path of weights without a manifold."""

    name = "torch's SGD"

    def accepts(self, weight: Weight, parts: tuple[int, ...], options: StepOptions) -> tuple[int, ...] | Refusal:
        """Weights without a manifold."""
        return parts if weight.manifold is None else Refusal(Reason.KIND, "the weight has a manifold")

    def batch(self, claims: Sequence[Claim]) -> Batch:
        """All of them in one call of torch."""
        return _PlainBatch(claims)


class _PlainBatch(Batch):
    def __init__(self, claims: Sequence[Claim]) -> None:
        super().__init__(claims)
        self.counts = [0] * len(claims)
        self._no_groups = torch.empty(0, dtype=torch.float64)

    def measure(self, options: StepOptions) -> Tensor:
        """Nothing: plain parameters have no groups and no step size of their own."""
        return self._no_groups

    def move(self, options: StepOptions, scale: Tensor | None, leaves_out: bool) -> None:
        """The step; torch makes the buffer of a weight's first step, which is stored in ``Weight.buffer``."""
        weights = self.weights
        grads = [cast(Tensor, weight.grad) for weight in weights]
        if options.nesterov and options.weight_decay == 0 and not options.maximize:
            grads = [g.clone() for g in grads]  # torch's multi-tensor Nesterov step writes into its gradients
        buffers = [weight.buffer for weight in weights]
        lr = options.lr
        sgd(
            [weight.param for weight in weights],
            grads,
            buffers,
            foreach=options.foreach,
            fused=options.fused,
            weight_decay=options.weight_decay,
            momentum=options.momentum,
            lr=cast(float, lr.squeeze() if isinstance(lr, Tensor) else lr),  # torch 2.6 takes no dimensions
            dampening=options.dampening,
            nesterov=options.nesterov,
            maximize=options.maximize,
        )
        for weight, buffer in zip(weights, buffers, strict=True):
            weight.buffer = buffer
