r"""Put the weights of a model on products of manifolds, and take them off again.

:func:`constrain` walks a model once. For every parameter it decides, and records, what it got or why it was left alone;
the record is the :class:`Plan`. A constrained weight becomes a :class:`geoopt.ManifoldParameter` of the same name,
shape and memory format on a :class:`~fgo_geo.ProductOfGroups`, so the model, its ``state_dict`` and everything that
reads parameters work as before.

The plan stays with the model. It travels in the metadata of ``state_dict``, so that groups and radii survive saving and
loading exactly, and it guards what torch would lose in silence: a forward pass of a model whose weights have become
plain parameters (by ``to("meta")``, ``to_empty`` or sharding) is an error that names :meth:`Plan.attach` (inside
``torch.compile`` nothing checks, call :meth:`Plan.check`); after ``load_state_dict`` the plan attaches itself.

What a parameter gets is decided in :mod:`fgo_geo.models.choose`; this is the only file that rewrites a module.
"""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import geoopt
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fgo_geo.linalg import require_finite
from fgo_geo.manifolds import ComponentManifold, ProductOfGroups, mark_replaced
from fgo_geo.models.choose import (
    Components,
    Initial,
    Pattern,
    PlanEntry,
    Settings,
    Wanted,
    check_patterns,
    entry_of,
    settings_of,
    sites_of,
)
from fgo_geo.models.feature_stats import LambdaRule, TrackingHandle, is_tracked, rescaling_lambda, track, untrack
from fgo_geo.weights.components import CONVOLUTIONS
from fgo_geo.weights.radius import RadiusRule
from fgo_geo.weights.words import few

__all__ = ["Plan", "PlanEntry", "constrain", "plan_of", "unconstrain"]

_ATTRIBUTE = "fgo_geo_plan"  # where a model keeps its plan
_METADATA = "fgo_geo_plan"  # where a state_dict keeps it
_JSON_VERSION = 1


@dataclass(eq=False)
class Plan:
    """What :func:`constrain` did to a model, parameter by parameter.

    ``print(plan)`` shows it as a table.

    Attributes:
        entries: One per parameter, in the order of the model.
        model: The model that it describes; None for a plan that was read from JSON and not attached yet.
    """

    entries: tuple[PlanEntry, ...]
    model: nn.Module | None = field(default=None, repr=False)
    _handles: list[Any] = field(default_factory=list, repr=False)
    _tracked: set[str] = field(default_factory=set, repr=False)

    @property
    def constrained(self) -> tuple[PlanEntry, ...]:
        """The entries of the parameters that are on a manifold."""
        return tuple(entry for entry in self.entries if entry.constrained)

    def parameters(self) -> dict[str, geoopt.ManifoldParameter]:
        """The constrained parameters by name.

        Raises:
            RuntimeError: If one of them has become a plain parameter.
            ValueError: If the plan is not attached to a model.
        """
        self.check()
        model = self._require_model()
        return {e.name: cast(geoopt.ManifoldParameter, model.get_parameter(e.name)) for e in self.constrained}

    def check(self) -> None:
        """Raise if a constrained parameter has become a plain one.

        Raises:
            RuntimeError: With the names, and what to call.
            ValueError: If the plan is not attached to a model.
        """
        lost = self._lost()
        if lost:
            raise RuntimeError(
                f"{len(lost)} constrained parameter(s) have become plain parameters or are gone: {few(lost)}. Moving "
                "to the meta device, to_empty and sharding drop the manifold: load the values, call "
                "plan_of(model).attach(model), and build the optimiser after that. If you have replaced a layer, call "
                "unconstrain(model) and constrain it anew"
            )

    def attach(self, model: nn.Module, *, project: bool = False) -> Plan:
        """Put a model's parameters (back) on the manifolds of this plan. Values do not change unless asked.

        Parameters that are on manifolds already stay the same objects. Those of another plan that this one does not
        have become plain parameters.

        Args:
            model: A model with the plan's parameter names and shapes.
            project: Move the values to the nearest points, for weights that were not trained on these manifolds.

        Returns:
            This plan, now the model's.

        Raises:
            ValueError: If a parameter is missing, has another shape, or is off its manifold, or the plan is another
                model's. Nothing has changed then.
        """
        if self.model is not None and self.model is not model:
            raise ValueError(
                "this plan belongs to another model already; attach a copy, Plan.from_json(plan.to_json()), instead"
            )
        targets = _targets(model, self.constrained)
        points: list[Tensor | None] = []
        for entry, param, manifold in targets:
            _require_ties(model, entry)
            value = param.detach().as_subclass(Tensor)
            if not (project or value.is_meta):
                manifold.require_point(value, repr(entry.name), "pass project=True to project it")
            points.append(manifold.projx(value) if project and not value.is_meta else None)
        _move(targets, points)
        _put_on_manifolds(model, targets)
        return self._settle(model)

    def project(self) -> None:
        """Move every constrained parameter to the nearest point of its manifold, in place.

        For weights that were changed by something that knows no manifold, e.g. the averages of
        :class:`torch.optim.swa_utils.AveragedModel`: ``plan_of(averaged).project()``.
        """
        with torch.no_grad():
            for param in self.parameters().values():
                param.proj_()

    @torch.no_grad()
    def update_scales(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Refresh the statistical factor ``λ`` of the radii ``γ / λ``, once per epoch ([Ozay2019]_, algorithm 1).

        Takes the running statistics of the features that the layers saw in training. Points move to the new radii, and
        momentum with them, by the dilation that maps the old manifold to the new one; both stay valid. Layers that are
        not called themselves keep ``λ = 1``: the packed and the output projection of attention. A tied weight takes
        the root mean square over its layers.

        Args:
            optimizer: The optimiser, for the sake of its ``momentum_buffer``. Without it momentum keeps its length.

        Raises:
            ValueError: If features were not finite. Nothing has changed then.
        """
        model, params = self._require_model(), self.parameters()
        entries = tuple(replace(e, channel_scales=_measured(model, e)) if e.statistics else e for e in self.entries)
        changed = [new for new, old in zip(entries, self.entries, strict=True) if new != old]
        radii = [entry.radii(cast(Any, params[entry.name]).manifold.partition) for entry in changed]
        for entry, radius in zip(changed, radii, strict=True):
            param = params[entry.name]
            state = {} if optimizer is None else optimizer.state.get(param, {})
            _dilate(param, radius, state.get("momentum_buffer"))
        self.entries = entries

    def to_json(self) -> str:
        """The plan as JSON, with the groups themselves, so that it does not depend on how they were drawn."""
        return json.dumps({"version": _JSON_VERSION, "entries": [entry.to_dict() for entry in self.entries]})

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Inverse of :meth:`to_json`; :meth:`attach` it to a model.

        Args:
            text: What :meth:`to_json` returned.

        Raises:
            ValueError: If the text is of another version, or damaged.
        """
        try:
            data = json.loads(text)
            version = data["version"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"this is no plan in JSON ({error!r}): pass what Plan.to_json returned") from error
        if version != _JSON_VERSION:
            raise ValueError(
                f"this plan has version {version!r}, expected {_JSON_VERSION}: read it with the fgo_geo that wrote it, "
                "or constrain the model anew"
            )
        try:
            return cls(tuple(PlanEntry.from_dict(entry) for entry in data["entries"]))
        except (KeyError, TypeError) as error:
            raise ValueError(f"this plan is damaged ({error!r}): restore it from another copy") from error

    def __str__(self) -> str:
        """A table of what is constrained, the others by reason, and a sum."""
        rows: list[tuple[str, ...]] = []
        reasons: dict[str, list[str]] = {}
        for entry in self.entries:
            if entry.reason is None:
                param = _parameter(self.model, entry.name) if self.model is not None else None
                attached = getattr(param, "manifold", None)
                rows.append(_row(entry, attached if isinstance(attached, ProductOfGroups) else entry.manifold()))
            else:
                reasons.setdefault(entry.reason, []).extend(entry.names)
        alone = [
            textwrap.fill(f"{', '.join(names)}: {reason}", 160, initial_indent="  ", subsequent_indent="    ")
            for reason, names in reasons.items()
        ]
        return "\n".join([*_table(rows), "", *(["Left alone:", *alone, ""] if alone else []), self._summary()])

    def _summary(self) -> str:
        count = sum(math.prod(e.shape) for e in self.constrained)
        total = sum(math.prod(e.shape) for e in self.entries)
        share = 100 * count / max(total, 1)
        return (
            f"{len(self.constrained)} of {len(self.entries)} parameters constrained: {share:.1f} % of {total:,} numbers"
        )

    def _lost(self) -> list[str]:
        model = self._require_model()
        return [entry.name for entry in self.entries if entry.reason is None and _is_lost(model, entry.name)]

    def _require_model(self) -> nn.Module:
        if self.model is None:
            raise ValueError("this plan is not attached to a model: call plan.attach(model)")
        return self.model

    def _settle(self, model: nn.Module) -> Plan:
        """Make this the plan of a model, and set the hooks that keep it."""
        before = model.__dict__.get(_ATTRIBUTE)
        if before is not self:
            if before is not None:
                before._release()
            self._handles = [
                model.register_state_dict_post_hook(_store),
                model.register_load_state_dict_pre_hook(_restore),
                model.register_load_state_dict_post_hook(_attach_again),
                model.register_forward_pre_hook(_guard),
            ]
            self.model = model
            model.__dict__[_ATTRIBUTE] = self  # not by setattr: a module would look for parameters in it
        self._track()
        return self

    def _track(self) -> None:
        """Track the features of the layers whose radii depend on them, and no longer those that this plan tracked."""
        model = self._require_model()
        wanted = {name: layer for e in self.constrained if e.statistics for name, layer in _layers(model, e).items()}
        self._untrack(self._tracked - set(wanted))
        for name, layer in wanted.items():
            if not is_tracked(layer):
                track(layer)
                self._tracked.add(name)

    def _release(self) -> None:
        """Leave no trace in the model."""
        model = self._require_model()
        for handle in self._handles:
            handle.remove()
        self._untrack(self._tracked)
        del model.__dict__[_ATTRIBUTE]
        self.model, self._handles = None, []

    def _untrack(self, names: set[str]) -> None:
        for name, layer in self._require_model().named_modules():
            if name in names and is_tracked(layer):  # otherwise the layer has been replaced
                untrack(layer)
        self._tracked = self._tracked - names


def constrain(
    model: nn.Module,
    strategy: str = "pio",
    manifolds: str | Sequence[str] = ("sphere", "oblique", "stiefel", "euclidean"),
    selection: str = "random",
    radius: RadiusRule | Mapping[Pattern, RadiusRule] = "kaiming",
    seed: int = 0,
    *,
    bound: float = 1.0,
    components: Components = "auto",
    initial: Initial = "project",
    include: Pattern | Sequence[Pattern] | None = None,
    exclude: Pattern | Sequence[Pattern] = (),
    first_layer: bool = False,
    classifier: bool = False,
    overrides: Mapping[Pattern, Mapping[str, Any]] | None = None,
    statistics: LambdaRule | None = None,
) -> Plan:
    """Put the weights of a model on products of manifolds, in place.

    Kernels of spatial convolutions are components of their own; linear layers and 1x1 convolutions are cut into blocks.
    Left alone, and listed with the reason: biases, normalisation layers, embeddings, frozen parameters, layers of
    unknown layout, components that could not move; and, unless asked, the first convolution and the classifier (the
    last linear layer or 1x1 convolution).

    Call it before building the optimiser: constrained weights are new parameters.

    Args:
        model: Any module. It is changed, keeps its plan as ``model.fgo_geo_plan``, and computes with the new weights.
        strategy: ``"pi"``, ``"po"``, ``"pio"`` or ``"layer"``.
        manifolds: Manifold kinds to deal to the groups; exactly one for ``"layer"``.
        selection: ``"random"`` or ``"deterministic"``.
        radius: ``"kaiming"`` (keeps the signal), ``"unit"`` (1), ``"bound"`` (all norms of every group at most
            ``bound``), a number, or a mapping from name patterns to these; the first that matches counts,
            ``"kaiming"`` if none does.
        seed: Seed of the random selection. Groups are a function of it and of the layer's name.
        bound: The bound ``β`` of the radius rule ``"bound"``.
        components: ``"auto"``, or ``"kernel"`` or ``"block"`` for all layers.
        initial: ``"project"`` moves every weight to the nearest point; ``"uniform"`` draws a random one, by torch's
            global generator.
        include: Constrain only these: parameter or module names, globs, or module types. What is named here is
            constrained even if it is the first convolution or the classifier.
        exclude: Leave these alone.
        first_layer: Constrain the first convolution too.
        classifier: Constrain the classifier too.
        overrides: Other settings for some layers, e.g. ``{"layer4.*": {"strategy": "layer", "manifolds":
            "stiefel"}}``. Keys are names, globs or module types; later ones win.
        statistics: Divide the radii by the standard deviation ``λ`` of the features that a component is applied to,
            whenever :meth:`Plan.update_scales` is called. ``"max1"`` takes ``max(1, λ)``, which keeps norm bounds;
            with ``"std"``, the plain ``λ`` of [Ozay2019]_, a bound ``β`` becomes ``β / λ``. None: never.

    Returns:
        The plan.

    Raises:
        ValueError: If the model is constrained or distributed already, a pattern matches nothing, a setting is
            unknown, a layer that was named cannot be constrained, or nothing is left to constrain. Nothing has changed
            then.

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
    _require_fresh(model)
    rules: Mapping[Pattern, RadiusRule] = radius if isinstance(radius, Mapping) else {}
    rule: RadiusRule = "kaiming" if isinstance(radius, Mapping) else radius
    overrides = overrides or {}
    base = Settings(strategy, manifolds, selection, rule, seed, bound, components, initial, statistics)
    sites = sites_of(model)
    wanted = Wanted(sites, include, exclude, first_layer, classifier)
    check_patterns("radius", rules, sites)
    check_patterns("overrides", overrides, sites)
    settings = [settings_of(site, base, rules, overrides) for site in sites]
    decided = [entry_of(site, s, wanted.reason(site)) for site, s in zip(sites, settings, strict=True)]
    entries = [entry for entry, _ in decided]
    wanted.check_honoured(entries)
    if not any(entry.constrained for entry in entries):
        reasons = "; ".join(f"{e.name} {e.reason}" for e in entries) or "it has no parameters"
        raise ValueError(
            f"constrain: nothing is left to constrain ({reasons}); name layers with include=, or pass "
            "first_layer=True or classifier=True"
        )
    targets: list[_Target] = []
    points: list[Tensor | None] = []
    for site, s, (entry, manifold) in zip(sites, settings, decided, strict=True):
        if manifold is not None:
            if not site.param.is_meta:
                require_finite(site.param.detach(), f"constrain: {entry.name!r}")
            targets.append((entry, site.param, _moved(manifold, site.param)))
            points.append(_initial_point(site.param.detach(), manifold, s.initial))
    _move(targets, points)
    _put_on_manifolds(model, targets)
    return Plan(tuple(entries))._settle(model)  # pyright: ignore[reportPrivateUsage]


def unconstrain(model: nn.Module) -> nn.Module:
    """Turn all manifold parameters of a model into plain ones, with the same values, in place.

    The outputs stay the same. For export, or to go on with another optimiser. Renormalised weights stay as they are:
    :func:`~fgo_geo.remove_renormalization` makes those plain.

    Args:
        model: A constrained model.

    Returns:
        The model, with no trace of the plan.
    """
    for site in sites_of(model):
        if isinstance(site.param, geoopt.ManifoldParameter):
            _replace(model, site.names, _plain(site.param))
    for plan in _plans(model):
        plan._release()  # pyright: ignore[reportPrivateUsage]
    return model


def plan_of(model: nn.Module) -> Plan:
    """The plan of a model, or of the model inside a wrapper (DistributedDataParallel, AveragedModel, compiled).

    Args:
        model: A constrained model.

    Raises:
        ValueError: If there is none. Weights that were declared on manifolds by hand have none.
    """
    plans = _plans(model)
    if plans:
        return plans[0]
    declared = [name for name, p in model.named_parameters() if isinstance(p, geoopt.ManifoldParameter)]
    if declared:
        raise ValueError(
            f"this model has no plan: {len(declared)} parameter(s) were put on manifolds without fgo_geo.constrain: "
            f"{few(declared)}. To project these, `with torch.no_grad():` call `p.proj_()` of every "
            "geoopt.ManifoldParameter p in model.parameters()"
        )
    raise ValueError("this model is not constrained: call fgo_geo.constrain(model) first")


def _plans(model: nn.Module) -> list[Plan]:
    return [module.__dict__[_ATTRIBUTE] for module in model.modules() if _ATTRIBUTE in module.__dict__]


# -- changing a model -----------------------------------------------------------------------------------------


def _require_fresh(model: nn.Module) -> None:
    if any(isinstance(module, DistributedDataParallel) for module in model.modules()):
        raise ValueError(
            "constrain: this model is wrapped in DistributedDataParallel, which would go on with the old parameters; "
            "constrain the model before wrapping it"
        )
    if _plans(model) or any(isinstance(p, geoopt.ManifoldParameter) for p in model.parameters()):
        raise ValueError(
            "constrain: this model, or a part of it, has manifold parameters already; call fgo_geo.unconstrain(model) "
            "first, or constrain before declaring others by hand"
        )


def _layers(model: nn.Module, entry: PlanEntry) -> dict[str, nn.Module]:
    """The layers that use a parameter and can be tracked, by name: called themselves, with known input channels."""
    layers: dict[nn.Module, str] = {}
    for name in entry.names:
        path = name.rpartition(".")[0]
        layers.setdefault(model.get_submodule(path), path)
    return {path: layer for layer, path in layers.items() if isinstance(layer, (nn.Linear, *CONVOLUTIONS))}


def _measured(model: nn.Module, entry: PlanEntry) -> tuple[float, ...]:
    """``λ`` of every input channel of a parameter, by the running statistics."""
    layers = _layers(model, entry).values()
    if not layers:
        return ()
    rule = cast(LambdaRule, entry.statistics)
    scales = [rescaling_lambda(TrackingHandle(layer).statistics, rule).double() for layer in layers]
    scale = torch.stack(scales).square().mean(0).sqrt()
    require_finite(scale, f"the standard deviation of the input of {entry.name!r}")
    return tuple(scale.tolist())


def _dilate(param: geoopt.ManifoldParameter, radii: list[Tensor], momentum: Tensor | None) -> None:
    """Give the manifold of a parameter other radii, and multiply point and momentum by the ratio."""
    manifold = cast(ProductOfGroups, cast(Any, param).manifold)
    like = param.detach().to(torch.promote_types(param.dtype, torch.float32))
    before = manifold.radius_map(like)
    manifold.set_radius(radii)
    ratio = _moved(manifold, param).radius_map(like) / before
    param.copy_(param * ratio)
    if momentum is not None:
        momentum.copy_(momentum * ratio)


_Target = tuple[PlanEntry, Tensor, ProductOfGroups]


def _targets(model: nn.Module, entries: Iterable[PlanEntry]) -> list[_Target]:
    """The parameter that every entry means, and a new manifold for it.

    Raises:
        ValueError: If the model does not have the parameters that the entries describe.
    """
    params = dict(model.named_parameters(remove_duplicate=False))
    targets: list[_Target] = []
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
        targets.append((entry, param, _moved(entry.manifold(), param)))
    return targets


def _require_ties(model: nn.Module, entry: PlanEntry) -> None:
    """Raise ValueError if a tied weight has different values at its places."""
    first, *others = (model.get_parameter(name) for name in entry.names)
    for name, param in zip(entry.names[1:], others, strict=True):
        if param is not first and not (param.is_meta or torch.equal(param, first)):
            raise ValueError(
                f"the plan expects {entry.name!r} and {name!r} to be one tied weight, the model has different values "
                "there; attach the plan to the architecture that it was made for"
            )


def _moved(manifold: ProductOfGroups, like: Tensor) -> ProductOfGroups:
    """The manifold on a parameter's device, its radii in the type that the parameter is computed in."""
    if like.is_meta:
        return manifold
    return manifold.to(device=like.device, dtype=torch.float64 if like.dtype == torch.float64 else torch.float32)


def _initial_point(value: Tensor, manifold: ProductOfGroups, initial: Initial) -> Tensor | None:
    """Where a parameter starts; None on the meta device, where there are no values."""
    if value.is_meta:
        return None
    if initial == "project":
        return manifold.projx(value)
    drawn = manifold.random(*value.shape, dtype=value.dtype, device=value.device)
    return manifold.where_constrained(drawn.as_subclass(Tensor), value)


def _move(targets: Sequence[_Target], points: Sequence[Tensor | None]) -> None:
    """Write new values into parameters."""
    for (_, param, _), point in zip(targets, points, strict=True):
        if point is not None:
            param.detach().copy_(point.clone())  # a projected point may be a view of what it is copied to


def _put_on_manifolds(model: nn.Module, targets: Sequence[_Target]) -> None:
    """Put parameters on manifolds that their values lie on, and only these parameters of the model's plan."""
    kept = {name for entry, *_ in targets for name in entry.names}
    params = dict(model.named_parameters(remove_duplicate=False))
    before: Plan | None = model.__dict__.get(_ATTRIBUTE)
    for entry in () if before is None else before.constrained:
        param = params.get(entry.name)
        if param is not None and isinstance(param, geoopt.ManifoldParameter) and entry.name not in kept:
            _replace(model, entry.names, _plain(param))
    for entry, param, manifold in targets:
        if isinstance(param, geoopt.ManifoldParameter):
            cast(Any, param).manifold = manifold
            new = param
        else:
            data = param.detach().as_subclass(Tensor)
            new = geoopt.ManifoldParameter(data, manifold=manifold, requires_grad=param.requires_grad)
        _replace(model, entry.names, new)


def _plain(param: Tensor) -> nn.Parameter:
    return nn.Parameter(param.detach().as_subclass(Tensor), param.requires_grad)


def _replace(model: nn.Module, names: Iterable[str], param: Tensor) -> None:
    for name in names:
        path, _, local = name.rpartition(".")
        module = model.get_submodule(path)
        old = getattr(module, local)
        if old is not param:
            mark_replaced(old)
        setattr(module, local, param)


def _parameter(model: nn.Module, name: str) -> Tensor | None:
    """A parameter, None if there is none: get_parameter takes ten times as long, and every forward pass asks."""
    *path, local = name.split(".")
    module: nn.Module | None = model
    for part in path:
        module = module._modules.get(part) if module is not None else None  # pyright: ignore[reportPrivateUsage]
    return None if module is None else module._parameters.get(local)  # pyright: ignore[reportPrivateUsage]


def _is_lost(model: nn.Module, name: str) -> bool:
    """Whether a parameter is gone or has become a plain one; a tensor that functional_call swapped in has not."""
    param = _parameter(model, name)
    return param is None or (isinstance(param, nn.Parameter) and not isinstance(param, geoopt.ManifoldParameter))


# -- printing -------------------------------------------------------------------------------------------------

_HEADER = ("parameter", "shape", "layer", "components", "groups", "manifolds", "radius")


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Lines of a table with aligned columns."""
    widths = [max(map(len, column)) for column in zip(_HEADER, *rows, strict=True)]
    rule = tuple("-" * width for width in widths)
    cells = ([cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in (_HEADER, rule, *rows))
    return ["  ".join(row).rstrip() for row in cells]


def _row(entry: PlanEntry, manifold: ProductOfGroups) -> tuple[str, ...]:
    """The cells of a constrained entry in the printed table."""
    first = entry.collections[0]
    counts = np.sum([np.bincount(c.group_kinds, minlength=len(c.kinds)) for c in entry.collections], axis=0)
    noun = "blocks" if first.components == "block" else f"{'x'.join(map(str, manifold.layout.kernel))} kernels"
    ranges = [m.radius_range for m, _ in manifold.parts if isinstance(m, ComponentManifold)]
    low, high = min((low for low, _ in ranges), default=1.0), max((high for _, high in ranges), default=1.0)
    return (
        entry.name if len(entry.names) == 1 else f"{entry.name} (also {', '.join(entry.names[1:])})",
        "x".join(map(str, entry.shape)),
        entry.module,
        f"{sum(manifold.partition.counts)} {noun}",
        f"{manifold.n_groups} ({first.strategy})",
        " + ".join(f"{count} {kind}" for kind, count in zip(first.kinds, counts, strict=True) if count),
        (f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}")
        + (f" / {entry.statistics}" * bool(entry.statistics)),
    )


# -- hooks: functions of the module, so that models can be copied and pickled -----------------------------------


def _store(module: nn.Module, state_dict: Any, prefix: str, local_metadata: dict[str, Any]) -> None:
    """Put the plan into the metadata of a state_dict."""
    local_metadata[_METADATA] = module.__dict__[_ATTRIBUTE].to_json()


def _restore(module: nn.Module, state_dict: Any, prefix: str, local_metadata: dict[str, Any], *others: Any) -> None:
    """Take over what a checkpoint's plan says, after refusing values that are off its manifolds."""
    plan: Plan = module.__dict__[_ATTRIBUTE]
    text = local_metadata.get(_METADATA)
    entries = plan.entries if text is None else Plan.from_json(text).entries
    targets = _targets(module, (entry for entry in entries if entry.constrained))
    absent = [entry.name for entry, *_ in targets if prefix + entry.name not in state_dict]
    if absent and entries != plan.entries:
        raise ValueError(
            f"the state_dict has another plan than the model and lacks {few(absent)}, so the weights that the model "
            "keeps would be on the wrong manifolds; load the whole state_dict, or constrain the model with the same "
            "settings"
        )
    for entry, _, manifold in targets:
        value = state_dict.get(prefix + entry.name)
        if isinstance(value, Tensor) and not value.is_meta and tuple(value.shape) == entry.shape:
            remedy = "load plain weights before constrain(), which projects them"
            manifold.require_point(value.detach(), f"{entry.name!r} in the state_dict", remedy)
    if entries != plan.entries:
        _put_on_manifolds(module, targets)
        plan.entries = entries
        plan._track()  # pyright: ignore[reportPrivateUsage]


def _attach_again(module: nn.Module, incompatible_keys: Any) -> None:
    """After load_state_dict, which makes plain parameters of what it assigns."""
    plan: Plan = module.__dict__[_ATTRIBUTE]
    if plan._lost():  # pyright: ignore[reportPrivateUsage]
        plan.attach(module)


def _guard(module: nn.Module, inputs: Any) -> None:
    """Refuse to compute with a constrained parameter that has become a plain one."""
    if not torch.compiler.is_compiling():
        module.__dict__[_ATTRIBUTE].check()
