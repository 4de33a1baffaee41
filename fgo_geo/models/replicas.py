"""Checks of constrained models under DistributedDataParallel, where two mistakes would go unnoticed.

DistributedDataParallel synchronises weights and gradients between processes, and nothing else. It averages the
gradients of the parameters that it found when it was built; a parameter that replaces one of them later would differ
between processes. It does not synchronise plans either: with different seeds or radii, processes would use different
manifolds. A forward pass checks for both mistakes.
"""

from __future__ import annotations

import hashlib
import json
import weakref
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fgo_geo.manifolds import replacements
from fgo_geo.models.entry import PlanEntry
from fgo_geo.models.surgery import parameter_of
from fgo_geo.weights.words import few

__all__ = ["check_replicas"]

_seen: weakref.WeakKeyDictionary[nn.Module, dict[int, int]] = weakref.WeakKeyDictionary()


def check_replicas(model: nn.Module, entries: Sequence[PlanEntry]) -> None:
    """Raise if a wrapper does not know a model's parameters, or its processes have different plans.

    The processes compare their plans in the wrapper's first forward pass with gradients, and all raise if one of them
    does. Later passes check the parameters alone, once after every replacement.

    Args:
        model: The constrained model, in a forward pass.
        entries: Its plan.

    Raises:
        RuntimeError: If the wrapper does not know a parameter.
        ValueError: If the plans differ.
    """
    replica = getattr(DistributedDataParallel, "_active_ddp_module", None)
    if replica is None or not torch.is_grad_enabled():
        return
    checked = _seen.setdefault(replica, {})
    number, is_first = replacements(), id(model) not in checked
    if checked.get(id(model)) == number:
        return
    known = set(map(id, replica._module_parameters))  # pyright: ignore
    params = [(entry.name, parameter_of(model, entry.name)) for entry in entries if entry.constrained]
    unknown = [n for n, param in params if param is not None and param.requires_grad and id(param) not in known]
    digests = [_digest(entry) for entry in entries]
    reports: list[Any] = [(unknown, digests)]
    if is_first:
        reports = [None] * dist.get_world_size(replica.process_group)
        dist.all_gather_object(reports, (unknown, digests), replica.process_group)
    for names, _ in reports:
        if names:
            raise RuntimeError(
                f"DistributedDataParallel does not know {len(names)} constrained parameter(s): {few(names)}. It would "
                "not average their gradients, so their values would differ between processes: constrain the model, and "
                "load with assign=True, before wrapping it"
            )
    for _, others in reports:
        if others != digests:
            first = next((n for n, own in enumerate(digests) if others[n : n + 1] != [own]), 0)
            raise ValueError(
                f"the plans differ between processes, first for {entries[first].name!r}: DistributedDataParallel "
                "synchronises weights, not manifolds. Call fgo_geo.constrain with the same arguments and seed on all "
                "processes, or load the same state_dict on all of them"
            )
    checked[id(model)] = number


def _digest(entry: PlanEntry) -> bytes:
    stored = entry.to_dict()
    del stored["notes"]
    return hashlib.sha256(json.dumps(stored, sort_keys=True).encode()).digest()
