r"""Changes of modules: parameters are put on manifolds, taken off them, and moved to other radii.

Every function carries out a decision of another module (:class:`~fgo_geo.models.entry.PlanEntry`), and checks its
arguments before it changes anything.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, cast

import geoopt
import torch
import torch.distributed as dist
from torch import Tensor, nn

from fgo_geo.linalg import DAMAGED, is_sharded, local_part, require_finite, whole, write_whole
from fgo_geo.manifolds import ProductOfGroups, mark_replaced
from fgo_geo.models.entry import PlanEntry
from fgo_geo.models.feature_stats import LambdaRule, TrackingHandle, rescaling_lambda
from fgo_geo.models.sharded import declare_in, declared_in, sharded_manifold
from fgo_geo.models.start import moved_to
from fgo_geo.weights.layout import CONVOLUTIONS
from fgo_geo.weights.words import few

__all__ = [
    "Target",
    "declare_sharded",
    "dilate",
    "is_lost",
    "layers_of",
    "measured_scales",
    "parameter_of",
    "plain_parameter",
    "put_on_manifolds",
    "replace_parameter",
    "require_finite_values",
    "require_ties",
    "targets_of",
    "write_points",
]


def layers_of(model: nn.Module, entry: PlanEntry) -> dict[str, nn.Module]:
    """The layers that use a parameter and can be tracked, by name: linear layers and convolutions."""
    layers: dict[nn.Module, str] = {}
    for name in entry.names:
        path = name.rpartition(".")[0]
        layers.setdefault(model.get_submodule(path), path)
    return {path: layer for layer, path in layers.items() if isinstance(layer, (nn.Linear, *CONVOLUTIONS))}


def measured_scales(model: nn.Module, entry: PlanEntry, group: dist.ProcessGroup | None = None) -> tuple[float, ...]:
    """``λ`` of every input channel of a parameter, by the running statistics."""
    layers = layers_of(model, entry).values()
    if not layers:
        return ()
    rule = cast(LambdaRule, entry.statistics)
    scales = [rescaling_lambda(TrackingHandle(layer).statistics, rule, group).double() for layer in layers]
    scale = torch.stack(scales).square().mean(0).sqrt()
    require_finite(scale, f"the standard deviation of the input of {entry.name!r}")
    return tuple(scale.tolist())


def dilate(param: geoopt.ManifoldParameter, radii: list[Tensor], momentum: Tensor | None) -> None:
    """Change the radii of a parameter's manifold, and multiply point and momentum by the ratio."""
    manifold = cast(ProductOfGroups, cast(Any, param).manifold)
    like = torch.empty(param.shape, dtype=torch.promote_types(param.dtype, torch.float32), device=param.device)
    before = manifold.radius_map(like)
    manifold.set_radius(radii)
    ratio = moved_to(manifold, param).radius_map(like) / before
    for tensor in (param, momentum):
        if tensor is not None:
            write_whole(tensor, whole(tensor.detach()) * ratio)


Target = tuple[PlanEntry, Tensor, ProductOfGroups]


def targets_of(model: nn.Module, entries: Iterable[PlanEntry]) -> list[Target]:
    """The parameter of every entry, and a new manifold for it.

    Raises:
        ValueError: If the model does not have the parameters that the entries describe.
    """
    params = dict(model.named_parameters(remove_duplicate=False))
    targets: list[Target] = []
    for entry in entries:
        for name in entry.names:
            shape = tuple(params[name].shape) if name in params else None
            if shape != entry.shape:
                raise ValueError(
                    f"the plan expects a parameter {name!r} of shape {entry.shape}, the model has "
                    f"{'none of that name' if shape is None else f'shape {shape}'}; attach the plan to the "
                    "architecture that it was made for"
                )
        param = params[entry.name]
        targets.append((entry, param, moved_to(entry.manifold(), param)))
    return targets


def require_ties(model: nn.Module, entry: PlanEntry) -> None:
    """Raise ValueError if a tied weight has different values at its places."""
    first, *others = (model.get_parameter(name) for name in entry.names)
    for name, param in zip(entry.names[1:], others, strict=True):
        if param is not first and not (param.is_meta or torch.equal(whole(param), whole(first))):
            raise ValueError(
                f"the plan expects {entry.name!r} and {name!r} to be one tied weight, the model has different values "
                "there; attach the plan to the architecture that it was made for"
            )


def write_points(targets: Sequence[Target], points: Sequence[Tensor | None]) -> None:
    """Write new values into parameters."""
    for (_, param, _), point in zip(targets, points, strict=True):
        if point is not None:
            write_whole(param.detach(), point.clone())  # a projected point may be a view of what it is copied to


def put_on_manifolds(model: nn.Module, targets: Sequence[Target], before: Iterable[PlanEntry] = ()) -> None:
    """Put parameters on manifolds that contain their values; others of the former plan become plain."""
    kept = {name for entry, *_ in targets for name in entry.names}
    params = dict(model.named_parameters(remove_duplicate=False))
    for entry in before:
        param = params.get(entry.name)
        if entry.name in kept or param is None:
            continue
        if isinstance(param, geoopt.ManifoldParameter):
            replace_parameter(model, entry.names, plain_parameter(param))
        elif is_sharded(param):
            declare_sharded(model, entry.names, None)
    for entry, param, manifold in targets:
        if is_sharded(param):
            declare_sharded(model, entry.names, manifold)
            continue
        if isinstance(param, geoopt.ManifoldParameter):
            cast(Any, param).manifold = manifold
            new = param
        else:
            data = param.detach().as_subclass(Tensor)
            new = geoopt.ManifoldParameter(data, manifold=manifold, requires_grad=param.requires_grad)
        replace_parameter(model, entry.names, new)


def declare_sharded(model: nn.Module, names: Iterable[str], manifold: geoopt.Manifold | None) -> None:
    """Declare the manifold of a sharded parameter under all of its names."""
    for name in names:
        path, _, local = name.rpartition(".")
        declare_in(model.get_submodule(path), local, manifold)


def require_finite_values(params: Iterable[tuple[str, Tensor]]) -> None:
    """Raise ValueError that names every parameter with NaN or infinity among the values of this process."""
    bad: list[str] = []
    for name, param in params:
        value = local_part(param) if is_sharded(param) else param
        has_values = not (isinstance(param, nn.UninitializedParameter) or value.is_meta)
        if has_values and not bool(value.detach().isfinite().all()):
            bad.append(name)
    if bad:
        raise ValueError(f"{len(bad)} parameter(s) have non-finite values: {few(bad)}; {DAMAGED}")


def plain_parameter(param: Tensor) -> Tensor:
    """A plain ``nn.Parameter`` with the same values."""
    return nn.Parameter(param.detach().as_subclass(Tensor), param.requires_grad)


def replace_parameter(model: nn.Module, names: Iterable[str], param: Tensor) -> None:
    """Put a parameter into a model under all of its names, and mark the former one as replaced."""
    for name in names:
        path, _, local = name.rpartition(".")
        module = model.get_submodule(path)
        old = getattr(module, local)
        if old is not param:
            mark_replaced(old, name)
        setattr(module, local, param)


def parameter_of(model: nn.Module, name: str) -> Tensor | None:
    """A parameter by name, or None. Every forward pass calls this; it is ten times as fast as ``get_parameter``."""
    path, _, local = name.rpartition(".")
    module = _module_of(model, path)
    return None if module is None else module._parameters.get(local)  # pyright: ignore[reportPrivateUsage]


def _module_of(model: nn.Module, path: str) -> nn.Module | None:
    module: nn.Module | None = model
    for part in path.split(".") if path else ():
        module = module._modules.get(part) if module is not None else None  # pyright: ignore[reportPrivateUsage]
    return module


def is_lost(model: nn.Module, name: str) -> bool:
    """Whether a parameter is missing or has become a plain one. A tensor that functional_call swaps in is not lost."""
    param = parameter_of(model, name)
    if param is None or not isinstance(param, nn.Parameter) or isinstance(param, geoopt.ManifoldParameter):
        return param is None
    path, _, local = name.rpartition(".")
    module = _module_of(model, path)
    sharded = param if is_sharded(param) else None if module is None else declared_in(module, local)
    return sharded_manifold(sharded) is None
