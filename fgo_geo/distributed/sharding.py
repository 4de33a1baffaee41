"""Sharding that keeps manifolds: torch's own function, followed by a step that restores the manifolds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar, cast

import geoopt
from torch import Tensor, nn

from fgo_geo.linalg import is_sharded
from fgo_geo.manifolds import is_declared, mark_replaced
from fgo_geo.models.sharded import declare_in, reshard
from fgo_geo.weights.words import few

__all__ = ["declare_plain", "fully_shard"]

_Modules = TypeVar("_Modules", nn.Module, Sequence[nn.Module])


def fully_shard(module: _Modules, **kwargs: Any) -> _Modules:
    """Shard a module's parameters, by ``torch.distributed.fsdp.fully_shard``, and keep them on their manifolds.

    Call it in place of torch's function, part by part from the bottom up, after :func:`~fgo_geo.constrain` and before
    you build the optimiser. Weights that were declared on manifolds by hand stay there, too.

    Args:
        module: A module, or several that are gathered together.
        **kwargs: As for torch's function: ``mesh``, ``reshard_after_forward``, ``shard_placement_fn``, ``mp_policy``,
            ``ignored_params`` and so on.

    Returns:
        The return value of torch's function.

    Raises:
        ValueError: If an offload policy would keep constrained parameters on the CPU while the mesh is of another
            device. In this case nothing has changed.
    """
    from torch.distributed.fsdp import CPUOffloadPolicy
    from torch.distributed.fsdp import fully_shard as torch_fully_shard

    modules = [module] if isinstance(module, nn.Module) else list(module)
    before = [
        (owner, name, param)
        for each in modules
        for owner in each.modules()
        for name, param in owner._parameters.items()  # pyright: ignore[reportPrivateUsage]
        if param is not None and not is_declared(param)
    ]
    constrained = [name for _, name, param in before if isinstance(param, geoopt.ManifoldParameter)]
    mesh = kwargs.get("mesh")
    if constrained and isinstance(kwargs.get("offload_policy"), CPUOffloadPolicy) and _device_of(mesh) != "cpu":
        raise ValueError(
            f"fully_shard: {len(constrained)} parameter(s) on manifolds ({few(constrained)}) would be kept on the CPU, "
            "where their shards cannot be exchanged by the device mesh; leave offload_policy out"
        )
    result = torch_fully_shard(cast(Any, module), **kwargs)
    for owner, name, old in before:
        new = owner._parameters[name]  # pyright: ignore[reportPrivateUsage]
        if new is not old and is_sharded(new):
            declare_in(owner, name, getattr(old, "manifold", None))
            mark_replaced(old)
    return cast(_Modules, result)


def declare_plain(model: nn.Module) -> nn.Module:
    """Declare that all sharded parameters of a model without a known manifold are plain.

    Use it for models that torch has sharded. An optimiser of this package refuses sharded parameters whose manifold is
    unknown.

    Args:
        model: A sharded model.

    Returns:
        The model.
    """
    reshard(model)
    for module in model.modules():
        for name, param in list(module._parameters.items()):  # pyright: ignore[reportPrivateUsage]
            if is_sharded(param) and not is_declared(cast(Tensor, param)):
                declare_in(module, name, None)
    return model


def _device_of(mesh: Any) -> str | None:
    return None if mesh is None else mesh.device_type
