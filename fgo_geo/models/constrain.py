r"""Put the weights of a model on products of manifolds, and take them off again.

:func:`constrain` visits every parameter of a model once, and records in the :class:`~fgo_geo.Plan` how it is
constrained, or why it is not. A constrained weight becomes a :class:`geoopt.ManifoldParameter` of the same name, shape
and memory format on a :class:`~fgo_geo.ProductOfGroups`, so the model, its ``state_dict`` and all code that reads
parameters work as before.

:mod:`fgo_geo.models.choose` makes the decisions, :mod:`fgo_geo.models.surgery` changes the modules, and the hooks of
:mod:`fgo_geo.models.plan` keep the weights on their manifolds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import geoopt
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fgo_geo.linalg import DAMAGED, is_sharded, require_finite
from fgo_geo.models.choose import (
    Components,
    Settings,
    Wanted,
    check_patterns,
    check_radii,
    entry_of,
    settings_of,
)
from fgo_geo.models.entry import names_by_reason
from fgo_geo.models.feature_stats import LambdaRule
from fgo_geo.models.plan import Plan, plans_of
from fgo_geo.models.sharded import reshard, sharded_manifold
from fgo_geo.models.sites import Pattern, sites_of
from fgo_geo.models.slips import require_model
from fgo_geo.models.start import Initial, initial_point, moved_to
from fgo_geo.models.surgery import (
    Target,
    declare_sharded,
    plain_parameter,
    put_on_manifolds,
    replace_parameter,
    write_points,
)
from fgo_geo.weights.kinds import KindLike, kind
from fgo_geo.weights.radius import BoundOf, RadiusRule, check_rule
from fgo_geo.weights.words import few, stated

__all__ = ["constrain", "unconstrain"]


def constrain(
    model: nn.Module,
    strategy: str = "pio",
    manifolds: KindLike | Sequence[KindLike] = ("sphere", "oblique", "stiefel", "euclidean"),
    selection: str = "random",
    radius: RadiusRule | Mapping[Pattern, RadiusRule] = "kaiming",
    seed: int = 0,
    *,
    bound: float | None = None,
    bound_of: BoundOf = "group",
    components: Components = "auto",
    initial: Initial = "project",
    include: Pattern | Sequence[Pattern] | None = None,
    exclude: Pattern | Sequence[Pattern] = (),
    first_layer: bool = False,
    classifier: bool = False,
    overrides: Mapping[Pattern, Mapping[str, Any]] | None = None,
    statistics: LambdaRule | None = None,
    watch: bool = True,
) -> Plan:
    """Put the weights of a model on products of manifolds, in place.

    Each kernel of a spatial convolution is a component. The function cuts linear layers and 1x1 convolutions into
    blocks. These parameters stay free, and the plan lists them with the reason: biases, normalisation layers,
    embeddings, frozen parameters, layers of unknown layout (:func:`~fgo_geo.register_layout` makes one known), and
    components that could not move. The first convolution and the output heads stay free by default. Output heads are
    the last linear layer or 1x1 convolution, and those whose number of outputs no other layer takes as inputs.

    Call this function before you build the optimiser: constrained weights are new parameters.

    Args:
        model: Any module. The function changes it and stores the plan as ``model.fgo_geo_plan``.
        strategy: ``"pi"``, ``"po"``, ``"pio"`` or ``"layer"``.
        manifolds: Manifold kinds that share the groups, as names or manifolds such as ``geoopt.CanonicalStiefel()``;
            exactly one for ``"layer"``. See :func:`fgo_geo.register_kind` for custom kinds.
        selection: ``"random"`` or ``"deterministic"``.
        radius: ``"kaiming"`` (keeps the signal), ``"unit"`` (1), ``"bound"`` (all norms of every group, or of the
            weight, at most ``bound``), a number, or a mapping from name patterns to these. The first matching pattern
            applies; weights that match none get ``"kaiming"``.
        seed: Seed of the random selection. Groups are a function of it and of the layer's name.
        bound: The bound ``β`` of the radius rule ``"bound"``, 1 if left out. Passing it without this rule is an error.
        bound_of: ``"group"`` bounds the norms of every group; ``"layer"`` bounds those of the whole weight as a matrix
            ``(D, C K)``. The bound needs manifolds that bound norms: leave out ``"euclidean"``.
        components: ``"auto"`` (kernels of spatial convolutions, blocks of the matrix of all other layers), or
            ``"kernel"``, ``"block"`` or ``"filter"`` for all layers. A filter is all weights of one output channel:
            ``constrain(model, "po", "sphere", components="filter")`` fixes the norm of every row.
        initial: ``"project"`` moves every weight from its present values to the nearest point. Where several points are
            nearest (zero kernels, zero columns, too low a rank), it draws one of them from ``seed``, and the plan has a
            note. ``"uniform"`` draws a random point from torch's global generator.
        include: Constrain only these: parameter or module names, globs, or module types. Parameters named here are
            constrained even if they belong to the first convolution or the classifier.
        exclude: Leave these alone.
        first_layer: Also constrain the first convolution.
        classifier: Also constrain the output heads.
        overrides: Other settings for some layers, e.g. ``{"layer4.*": {"strategy": "layer", "manifolds":
            "stiefel"}}``. Keys are names, globs or module types; later ones win. One setting is for overrides alone:
            ``{"*.qkv": {"split": 3}}`` treats equal parts of a linear layer's output channels as separate layers.
        statistics: Divide the radius of a component by the standard deviation ``λ`` of its input features at every call
            of :meth:`~fgo_geo.Plan.update_scales`. ``"max1"`` takes ``max(1, λ)``, which keeps norm bounds; with
            ``"std"``, the plain ``λ`` of [Ozay2019]_, a bound ``β`` becomes ``β / λ``. None: never.
        watch: Check a few components in some forward passes of training, and warn once if an optimiser without support
            for manifolds has moved them off. You can change ``plan.watches`` later.

    Returns:
        The plan.

    Raises:
        TypeError: If the model is not a module.
        RuntimeError: If a custom kind cannot project a weight; the message names both.
        ValueError: If the model is constrained or distributed already, a pattern matches nothing or sets the radius
            of no weight, a setting is unknown, ``bound`` is given where no rule is ``"bound"``, a layer named in
            ``include`` cannot be constrained, or nothing is left to constrain. In each case nothing has changed.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.Flatten(), nn.Linear(6, 2))
        >>> plan = constrain(model, "pio", ("sphere", "stiefel"), seed=1)
        >>> [entry.name for entry in plan.constrained]
        ['2.weight']
        >>> len(plan.constrained[0].collections[0].groups)
        10
        >>> bool(model[2].weight.manifold.violation(model[2].weight).max() < 1e-5)
        True
    """
    require_model(model, "constrain")
    _require_fresh(model)
    rules: Mapping[Pattern, RadiusRule] = radius if isinstance(radius, Mapping) else {}
    rule: RadiusRule = "kaiming" if isinstance(radius, Mapping) else radius
    overrides = overrides or {}
    beta = 1.0 if bound is None else bound
    base = Settings(strategy, manifolds, selection, rule, seed, beta, components, initial, statistics, bound_of)
    sites = sites_of(model)
    wanted = Wanted(sites, include, exclude, first_layer, classifier)
    check_patterns("radius", rules, sites)
    check_patterns("overrides", overrides, sites)
    settings = [settings_of(site, base, rules, overrides) for site in sites]
    asked = (base.radius, *map(check_rule, rules.values()), *(s.radius for s in settings))
    if bound is not None and "bound" not in asked:
        raise ValueError(
            f'constrain: bound={bound} has no effect without radius="bound"; pass that, or leave bound out'
        )
    decided = [entry_of(site, s, wanted.reason(site)) for site, s in zip(sites, settings, strict=True)]
    entries = [entry for entry, _ in decided]
    wanted.check_honoured(entries)
    if not any(entry.constrained for entry in entries):
        reasons = "; ".join(stated(names, reason) for reason, names in names_by_reason(entries).items())
        raise ValueError(
            f"constrain: nothing is left to constrain ({reasons or 'it has no parameters'}); name layers with "
            "include=, or pass first_layer=True or classifier=True"
        )
    check_radii(rules, overrides, sites, entries)
    targets: list[Target] = []
    points: list[Tensor | None] = []
    for number, (site, s, (entry, manifold)) in enumerate(zip(sites, settings, decided, strict=True)):
        if manifold is not None:
            if not site.param.is_meta:
                require_finite(site.param.detach(), f"constrain: {entry.name!r}", DAMAGED)
            manifold = moved_to(manifold, site.param)
            try:
                point, notes = initial_point(site.param.detach(), manifold, s.initial, s.seed, entry.name)
            except Exception as error:
                used = entry.kinds_used()
                if isinstance(error, torch.OutOfMemoryError) or not any(kind(name).is_of_user for name in used):
                    raise
                raise RuntimeError(
                    f"constrain: {entry.name!r} cannot be moved to manifolds of kind {few(used)}: "
                    f"{type(error).__name__}: {error}"
                ) from error
            entries[number] = replace(entry, notes=(*entry.notes, *notes))
            targets.append((entry, site.param, manifold))
            points.append(point)
    write_points(targets, points)
    put_on_manifolds(model, targets)
    return Plan(tuple(entries), watches=watch).settle(model)


def unconstrain(model: nn.Module) -> nn.Module:
    """Turn all manifold parameters of a model into plain ones, with the same values, in place.

    The outputs stay the same. Use this function for export, or before you continue with another optimiser. Renormalised
    weights do not change: :func:`~fgo_geo.remove_renormalization` makes them plain.

    Args:
        model: A constrained model.

    Returns:
        The model, without a plan.
    """
    require_model(model, "unconstrain")
    reshard(model)
    for site in sites_of(model):
        if isinstance(site.param, geoopt.ManifoldParameter):
            replace_parameter(model, site.names, plain_parameter(site.param))
        elif sharded_manifold(site.param) is not None:
            declare_sharded(model, site.names, None)
    for plan in plans_of(model):
        plan.release()
    return model


def _require_fresh(model: nn.Module) -> None:
    if torch.empty(0).is_meta:
        raise ValueError(
            "constrain: torch's default device is meta, which computes no radii; call constrain outside of "
            "`with torch.device('meta')` (the model may be on the meta device)"
        )
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        raise ValueError(
            "constrain: this model is or has a ScriptModule, whose parameters cannot be replaced; constrain the Python "
            "model, and call torch.jit.script after fgo_geo.unconstrain(model)"
        )
    if any(isinstance(module, DistributedDataParallel) for module in model.modules()):
        raise ValueError(
            "constrain: this model is wrapped in DistributedDataParallel, which would go on with the old parameters; "
            "constrain the model before wrapping it"
        )
    if any(is_sharded(param) for param in model.parameters()):
        raise ValueError(
            "constrain: this model is sharded; constrain it before, and shard it with fgo_geo.distributed.fully_shard"
        )
    if plans_of(model) or any(isinstance(p, geoopt.ManifoldParameter) for p in model.parameters()):
        raise ValueError(
            "constrain: this model, or a part of it, has manifold parameters already; call fgo_geo.unconstrain(model) "
            "first, or constrain before declaring others by hand"
        )
