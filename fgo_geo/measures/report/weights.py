"""The weights of a model that can be measured, with their groups: plain, on a manifold, or renormalised.

The module reads a weight that is declared on a manifold by hand in a custom layer as ``(outputs, inputs, *kernel)``, as
in a convolution or a linear layer.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any, cast

import geoopt
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fgo_geo.linalg import DAMAGED, require_finite
from fgo_geo.manifolds import ProductOfGroups
from fgo_geo.manifolds.embedded import EmbeddedManifold
from fgo_geo.measures.report.record import Kind
from fgo_geo.models.plan import plans_of
from fgo_geo.models.renormalize import Renormalization, renormalization_of
from fgo_geo.models.sites import Site, sites_of
from fgo_geo.weights.components import Partition
from fgo_geo.weights.layout import WeightLayout, layout_of
from fgo_geo.weights.radius import bound_in_words

__all__ = ["Weight", "find_weights"]


@dataclass(frozen=True, eq=False)
class Weight:
    """A weight of a model.

    Attributes:
        names: Its names in the model.
        owners: The module behind each name.
        param: The parameter that an optimiser updates: for a renormalised weight, the raw weight.
        value: The value that the network computes with.
        layout: How it is stored.
        kind: The kind of its constraint.
        manifolds: The groups' manifold kinds, in words.
        partition: Its groups; None if it is a single one.
        violation: Largest relative violation of a constraint; None without constraints.
    """

    names: tuple[str, ...]
    owners: tuple[nn.Module, ...]
    param: Tensor
    value: Tensor
    layout: WeightLayout
    kind: Kind = "plain"
    manifolds: str = ""
    partition: Partition | None = None
    violation: float | None = None


def find_weights(model: nn.Module) -> tuple[list[Weight], dict[str, str]]:
    """The weights that can be measured, and why the other parameters cannot.

    Args:
        model: Any module.

    Returns:
        The weights in the order of the model, and a reason for the name of every other parameter.

    Raises:
        ValueError: If a weight holds NaN or infinity.
    """
    weights: list[Weight] = []
    left_out: dict[str, str] = {}
    bounds = _bounds(model)
    for site in sites_of(model):
        weight = _renormalised(model, site) if _is_parametrised(site) else _declared(site)
        if isinstance(weight, str):
            left_out |= dict.fromkeys(site.names, weight)
        else:
            bound = bounds.get(site.names[0], "")
            weights.append(replace(weight, manifolds=weight.manifolds + bound) if bound else weight)
    return weights, left_out


def _bounds(model: nn.Module) -> dict[str, str]:
    """What the radii of constrained parameters bound, in words."""
    paths = {module: f"{path}." if path else "" for path, module in model.named_modules()}
    return {
        f"{paths[plan.model]}{name}": f", {bound}"
        for plan in plans_of(model)
        if plan.model is not None
        for entry in plan.constrained
        if (bound := entry.bound_in_words()) and entry.statistics != "std"
        for name in entry.names
    }


def _is_parametrised(site: Site) -> bool:
    return isinstance(site.owners[0], parametrize.ParametrizationList)


def _declared(site: Site) -> Weight | str:
    """A parameter that is the weight itself: plain or on a manifold."""
    layout = _layout(site)
    if isinstance(layout, str):
        return layout
    param = site.param
    value = _checked_value(param, site.names[0])
    if isinstance(value, str):
        return value
    weight = Weight(site.names, site.owners, param, value, layout)
    manifold = cast(Any, param).manifold if isinstance(param, geoopt.ManifoldParameter) else None
    if manifold is None or isinstance(manifold, geoopt.Euclidean):
        return weight
    if isinstance(manifold, ProductOfGroups):
        groups = _kinds_in_words(manifold.partition, manifold.collections[0].strategy)
        weight = replace(weight, kind="product", manifolds=groups, partition=manifold.partition)
    else:
        weight = replace(weight, kind="manifold", manifolds=type(manifold).__name__)
    return replace(weight, violation=_violation(manifold, value))


def _layout(site: Site) -> WeightLayout | str:
    """The layout that all layers agree on, or the reason why the parameter has none."""
    layouts = [layout_of(m, name.rpartition(".")[2]) for m, name in zip(site.owners, site.names, strict=True)]
    reason = next((found for found in layouts if isinstance(found, str)), None)
    if reason is None:
        return layouts[0] if len(set(layouts)) == 1 else "is shared by layers that store it in different layouts"
    by_hand = isinstance(site.param, geoopt.ManifoldParameter) and site.param.ndim >= 2
    # The other reasons say what a parameter is instead of a weight: rows of a table, gates of a recurrent layer.
    return WeightLayout(site.shape) if by_hand and "unknown layout" in reason else reason


def _renormalised(model: nn.Module, site: Site) -> Weight | str:
    """A raw weight, and the weight that is computed from it."""
    path, _, rest = f".{site.names[0]}".rpartition(".parametrizations.")
    module, local = model.get_submodule(path[1:]), rest.partition(".")[0]
    steps = cast("nn.ModuleDict", module.parametrizations)[local].children()
    if not any(isinstance(step, Renormalization) for step in steps):
        return "is re-parametrised, but not renormalised: its layout is not known"
    renormalization = renormalization_of(module, local)
    name = f"{path[1:]}.{local}".lstrip(".")
    raw = _checked_value(site.param, name)
    if isinstance(raw, str):
        return raw
    value = cast(Tensor, getattr(module, local)).detach()
    require_finite(value, repr(name), DAMAGED)
    cut = renormalization.partition
    words = f"renormalised, {_kinds_in_words(cut, renormalization.collections[0].strategy)}"
    if renormalization.statistics != "std":
        words += ", " + bound_in_words(renormalization.bound_of, renormalization.bound, cut.kinds)
    violation = float(renormalization.violation(value).max())
    return Weight((name,), (module,), site.param, value, cut.layout, "renormalised", words, cut, violation)


def _checked_value(param: Tensor, name: str) -> Tensor | str:
    """The values of a parameter, or why there are none."""
    if param.is_meta:
        return "is on the meta device: it has no values"
    if not param.is_floating_point():
        return f"has type {param.dtype}, expected a real floating-point type"
    value = param.detach().as_subclass(Tensor)
    require_finite(value, repr(name), DAMAGED)
    return value


def _violation(manifold: geoopt.Manifold, value: Tensor) -> float:
    """Largest relative distance from the constraint; of other packages' manifolds, from the nearest point."""
    if isinstance(manifold, EmbeddedManifold):
        return float(manifold.violation(value).max())
    return float((manifold.projx(value) - value).norm() / value.norm())


def _kinds_in_words(cut: Partition, strategy: str) -> str:
    counts: Counter[str] = Counter()
    for kind, groups in zip(cut.kinds, cut.groups, strict=True):
        counts[kind] += len(groups)
    return f"{strategy}: " + " + ".join(f"{count} {kind}" for kind, count in counts.items())
