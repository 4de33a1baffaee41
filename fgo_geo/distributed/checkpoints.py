"""Distributed checkpoints with the plan. All processes write one, and a different number of processes can read it.

``torch.distributed.checkpoint`` saves tensors shard by shard and drops the metadata of a ``state_dict``, which usually
holds the plan. :class:`TrainingState` saves the plan as JSON along with the tensors. On loading, it first puts the
model on the manifolds of that plan, even if the model was constrained with another seed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fgo_geo.models.plan import Plan, plans_of
from fgo_geo.models.sharded import reshard
from fgo_geo.models.surgery import put_on_manifolds, targets_of

__all__ = ["TrainingState"]


class TrainingState:
    """A model, its optimiser and its plan, for ``torch.distributed.checkpoint``.

    All processes save and load. Each saves its shards of weights and momentum, so a different number of processes can
    load them, and so can a model that is not sharded. A model that is not constrained loads only the values.

    Args:
        model: The model, sharded, replicated or neither.
        optimizer: Its optimiser, if that is to be saved.

    Raises:
        ValueError: On loading, if values are off the manifolds of the saved plan, or off the model's own manifolds if
            the checkpoint has no plan. The checkpoint has been read into the tensors by then: load a valid one, or
            build the model again.

    Example:
        On every process, with ``dcp`` for ``torch.distributed.checkpoint``::

            dcp.save({"app": TrainingState(model, optimizer)}, checkpoint_id="checkpoints/10000")
            dcp.load({"app": TrainingState(model, optimizer)}, checkpoint_id="checkpoints/10000")
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
        self.model = model
        self.optimizer = optimizer

    def state_dict(self) -> dict[str, Any]:
        """The objects to save: ``"model"``, and if they exist ``"plans"`` (JSON) and ``"optimizer"``."""
        from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict

        state: dict[str, Any] = {"model": get_model_state_dict(self.model)}
        plans = plans_of(self.model)
        if plans:
            state["plans"] = [plan.to_json() for plan in plans]
        if self.optimizer is not None:
            state["optimizer"] = get_optimizer_state_dict(self.model, self.optimizer)
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the plan first, then the values, then the optimiser's state.

        Args:
            state_dict: As from :meth:`state_dict`.
        """
        from torch.distributed.checkpoint.state_dict import set_model_state_dict, set_optimizer_state_dict

        for plan, stored in zip(plans_of(self.model), state_dict.get("plans", []), strict=False):
            _adopt(plan, stored)
        set_model_state_dict(self.model, dict(state_dict["model"]))  # its metadata would be those of the plan before
        if self.optimizer is not None:
            set_optimizer_state_dict(self.model, self.optimizer, state_dict["optimizer"])


def _adopt(plan: Plan, stored: str) -> None:
    """Put a plan's model on the manifolds of another plan; loading checks the values."""
    model, before, entries = plan.model, plan.constrained, Plan.from_json(stored).entries
    if model is None or entries == plan.entries:
        return
    reshard(model)
    put_on_manifolds(model, targets_of(model, (entry for entry in entries if entry.constrained)), before)
    plan.entries = entries
    plan.track()
