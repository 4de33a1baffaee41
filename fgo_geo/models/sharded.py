"""Sharded models: where their parameters are, and which of them are on manifolds.

FSDP2 registers sharded parameters between passes and whole ones during a pass. The whole ones are new objects in every
pass, and of torch's own class. Every module therefore remembers its declared sharded parameters, which know the
manifolds of the whole ones.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import geoopt
from torch import Tensor, nn

from fgo_geo.linalg import is_sharded, whole
from fgo_geo.manifolds import declare, is_declared

__all__ = ["declare_in", "declared_in", "recover", "reshard", "sharded_manifold", "value_of"]

_SHARDED = "_fgo_geo_sharded"


def declare_in(module: nn.Module, name: str, manifold: geoopt.Manifold | None) -> None:
    """Declare the manifold of a module's own sharded parameter.

    Args:
        module: The module.
        name: The parameter's name in it.
        manifold: Its manifold; None for a plain parameter.
    """
    param = module._parameters[name]  # pyright: ignore[reportPrivateUsage]
    if param is not None:
        declare(param, manifold)
        module.__dict__.setdefault(_SHARDED, {})[name] = param


def declared_in(module: nn.Module, name: str) -> Tensor | None:
    """The declared sharded parameter of a module; None if there is none, or it has lost its declaration."""
    param = module.__dict__.get(_SHARDED, {}).get(name)
    return param if param is not None and is_declared(param) else None


def sharded_manifold(param: Any) -> geoopt.Manifold | None:
    """The manifold of a sharded parameter; None if it has none, and for parameters that are not sharded."""
    return getattr(param, "manifold", None) if is_sharded(param) else None


def value_of(param: Tensor) -> Tensor:
    """The whole value of a parameter as a plain tensor. For a sharded parameter, all processes must call this."""
    return whole(param) if is_sharded(param) else param.detach().as_subclass(Tensor)


def reshard(model: nn.Module) -> None:
    """Register the sharded parameters in place of whole ones; other models do not change."""
    for module in _fsdp_modules(model):
        module.reshard()


def recover(model: nn.Module, params: Iterable[Tensor]) -> bool:
    """Register the sharded parameters again after a forward pass that an error has ended.

    Args:
        model: Any model.
        params: Those of its parameters that must be sharded, if the model is.

    Returns:
        Whether some of them were not sharded; the model has other parameters then.

    Raises:
        RuntimeError: If this version of torch is too old for it.
    """
    modules = _fsdp_modules(model)
    if not modules or all(is_sharded(param) or isinstance(param, geoopt.ManifoldParameter) for param in params):
        return False
    reset = getattr(modules[0], "reset_iter_state", None)
    if reset is None:
        raise RuntimeError(
            "a forward pass was refused in its middle, and this version of torch cannot bring FSDP back to order: "
            "build the model again, and call plan_of(model).attach(model) before its first forward pass"
        )
    reset()
    return True


def _fsdp_modules(model: nn.Module) -> list[Any]:
    """The modules that FSDP2 has sharded, outer ones first."""
    kind: Any = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    return [] if kind is None else [module for module in model.modules() if isinstance(module, kind)]
