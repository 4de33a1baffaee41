r"""Put the weights of a model on products of manifolds, and take them off again.

:func:`constrain` walks a model once. For every parameter it decides, and records, what it got or why it was left alone;
the record is the :class:`Plan`. A constrained weight becomes a :class:`geoopt.ManifoldParameter` of the same name,
shape and memory format on a :class:`~fgo_geo.ProductOfGroups`, so the model, its ``state_dict`` and everything that
reads parameters work as before.

The plan stays with the model. It travels in the metadata of ``state_dict``, so that random groups survive saving and
loading exactly, and it guards what torch would lose in silence: a forward pass through a weight that has become a plain
parameter (by ``to("meta")``, ``to_empty`` or sharding) is an error that names :meth:`Plan.attach`; after
``load_state_dict(assign=True)`` the plan attaches itself.

This is the only file that rewrites a module.
"""

from __future__ import annotations

import fnmatch
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, cast, get_args

import geoopt
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from fgo_geo.components import WeightLayout, layout_of
from fgo_geo.grouping import Collection, collection
from fgo_geo.manifolds import ComponentManifold, ProductOfGroups
from fgo_geo.radius import RadiusRule, check_rule, group_radii

__all__ = ["Plan", "PlanEntry", "constrain", "plan_of", "unconstrain"]

Components = Literal["auto", "kernel", "block"]
Initial = Literal["project", "uniform"]
Pattern = str | type[nn.Module]

_ATTRIBUTE = "fgo_geo_plan"  # where a model keeps its plan
_METADATA = "fgo_geo_plan"  # where a state_dict keeps it
_JSON_VERSION = 1


@dataclass(frozen=True)
class _Settings:
    """How one weight is to be constrained."""

    strategy: str
    manifolds: tuple[str, ...]
    selection: str
    radius: RadiusRule
    bound: float
    components: Components
    initial: Initial
    seed: int

    def __post_init__(self) -> None:
        check_rule(self.radius)
        for name, choices in (("components", get_args(Components)), ("initial", get_args(Initial))):
            if getattr(self, name) not in choices:
                raise ValueError(f"constrain: {name} must be one of {choices}, got {getattr(self, name)!r}")
        collection(1, 1, self.strategy, self.manifolds, self.selection, self.seed)  # raises on what it does not know


@dataclass(frozen=True)
class PlanEntry:
    """What one parameter got.

    Attributes:
        names: Its names in the model; more than one if the weight is tied.
        module: Type of the module that owns it.
        shape: Its shape.
        reason: Why it was left alone; None if it is constrained.
        layout: How the weight is stored, if it is constrained.
        collections: Its groups; one collection per section of the layout.
        radius: The rule for the geometric radius ``γ``.
        bound: The bound of the rule ``"bound"``.
    """

    names: tuple[str, ...]
    module: str
    shape: tuple[int, ...]
    reason: str | None = None
    layout: WeightLayout | None = None
    collections: tuple[Collection, ...] = ()
    radius: RadiusRule = "kaiming"
    bound: float = 1.0

    @property
    def name(self) -> str:
        """The first of its names."""
        return self.names[0]

    @property
    def constrained(self) -> bool:
        """Whether it is on a manifold."""
        return self.reason is None

    def manifold(self) -> ProductOfGroups:
        """A new manifold as this entry describes it."""
        if self.layout is None:
            raise ValueError(f"{self.name!r} is not constrained: it {self.reason}")
        manifold = ProductOfGroups(self.collections, self.layout)
        manifold.set_radius(group_radii(manifold.partition, self.radius, self.bound))
        return manifold

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        data = {name: getattr(self, name) for name in ("names", "module", "shape", "reason", "radius", "bound")}
        data["layout"] = None if self.layout is None else asdict(self.layout)
        data["collections"] = [c.to_json() for c in self.collections]
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> PlanEntry:
        """Inverse of :meth:`to_dict`."""
        stored = data["layout"]
        layout = None if stored is None else replace(WeightLayout(**stored), shape=tuple(stored["shape"]))
        return cls(
            names=tuple(data["names"]),
            module=data["module"],
            shape=tuple(data["shape"]),
            reason=data["reason"],
            layout=layout,
            collections=tuple(Collection.from_json(c) for c in data["collections"]),
            radius=data["radius"],
            bound=data["bound"],
        )


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
    _places: list[tuple[nn.Module, str]] = field(default_factory=list, repr=False)
    _handles: list[Any] = field(default_factory=list, repr=False)

    @property
    def constrained(self) -> tuple[PlanEntry, ...]:
        """The entries of the parameters that are on a manifold."""
        return tuple(entry for entry in self.entries if entry.constrained)

    def parameters(self) -> dict[str, geoopt.ManifoldParameter]:
        """The constrained parameters by name.

        Raises:
            RuntimeError: If one of them has become a plain parameter.
        """
        self.check()
        return {
            entry.name: cast(geoopt.ManifoldParameter, owner.get_parameter(local))
            for entry, (owner, local) in zip(self.constrained, self._places, strict=True)
        }

    def check(self) -> None:
        """Raise if a constrained parameter has become a plain one.

        Raises:
            RuntimeError: With the names, and what to call.
        """
        self._require_model()
        lost = [e.name for e, (m, local) in zip(self.constrained, self._places, strict=True) if _is_lost(m, local)]
        if lost:
            raise RuntimeError(
                f"{len(lost)} constrained parameter(s) have become plain parameters: {_few(lost)}. Moving to the meta "
                "device, to_empty and sharding drop the manifold. Load the values, call "
                "model.fgo_geo_plan.attach(model), and build the optimiser after that"
            )

    def attach(self, model: nn.Module, *, project: bool = False) -> Plan:
        """Put a model's parameters (back) on the manifolds of this plan. Values do not change unless asked.

        Args:
            model: A model with the plan's parameter names and shapes.
            project: Move the values to the nearest points, for weights that were not trained on these manifolds.

        Returns:
            This plan, now the model's.

        Raises:
            ValueError: If a parameter is missing, has another shape, or is off its manifold. Nothing has changed then.
        """
        work: list[tuple[PlanEntry, Tensor, ProductOfGroups]] = []
        for entry in self.constrained:
            param = _find(model, entry)
            manifold = _moved(entry.manifold(), param)
            if not project and not param.is_meta:
                manifold.require_point(param.detach(), repr(entry.name), "pass project=True to project it")
            work.append((entry, param, manifold))
        with torch.no_grad():
            for entry, param, manifold in work:
                if project and not param.is_meta:
                    param.copy_(manifold.projx(param))
                _put_on(model, entry, param, manifold)
        return self._settle(model)

    def project(self) -> None:
        """Move every constrained parameter to the nearest point of its manifold, in place.

        For weights that were changed by something that knows no manifold, e.g. the averages of
        :class:`torch.optim.swa_utils.AveragedModel`: ``plan_of(averaged).project()``.
        """
        with torch.no_grad():
            for param in self.parameters().values():
                param.proj_()

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
        data = json.loads(text)
        if data.get("version") != _JSON_VERSION:
            raise ValueError(
                f"this plan has version {data.get('version')!r}, expected {_JSON_VERSION}: it was written by another "
                "version of fgo_geo, constrain the model again"
            )
        return cls(tuple(PlanEntry.from_dict(entry) for entry in data["entries"]))

    def __str__(self) -> str:
        """A table of what is constrained, the others by reason, and a sum."""
        table = Table("parameter", "shape", "layer", "components", "groups", "manifolds", "radius", box=box.SIMPLE)
        reasons: dict[str, list[str]] = {}
        for entry in self.entries:
            if entry.reason is None:
                table.add_row(*_row(entry))
            else:
                reasons.setdefault(entry.reason, []).extend(entry.names)
        console = Console(width=200, color_system=None, force_terminal=False)
        with console.capture() as capture:
            console.print(table)
        rows = [line.rstrip() for line in capture.get().splitlines() if line.strip()]
        alone = [f"  {', '.join(names)}: {reason}" for reason, names in reasons.items()]
        return "\n".join([*rows, "", "Left alone:", *alone, "", self._summary()])

    def _summary(self) -> str:
        count = sum(math.prod(e.shape) for e in self.constrained)
        total = sum(math.prod(e.shape) for e in self.entries)
        share = 100 * count / max(total, 1)
        return (
            f"{len(self.constrained)} of {len(self.entries)} parameters constrained: {share:.1f} % of {total:,} numbers"
        )

    def _require_model(self) -> nn.Module:
        if self.model is None:
            raise ValueError("this plan is not attached to a model yet: call plan.attach(model)")
        return self.model

    def _settle(self, model: nn.Module) -> Plan:
        """Make this the plan of a model, and set the hooks that keep it (once)."""
        before = getattr(model, _ATTRIBUTE, None)
        self._handles = (
            before._handles
            if isinstance(before, Plan)
            else [  # pyright: ignore[reportPrivateUsage]
                model.register_state_dict_post_hook(_store),
                model.register_load_state_dict_pre_hook(_restore),
                model.register_load_state_dict_post_hook(_attach_again),
                model.register_forward_pre_hook(_guard),
            ]
        )
        self.model = model
        self._places = [
            (model.get_submodule(entry.name.rpartition(".")[0]), entry.name.rpartition(".")[2])
            for entry in self.constrained
        ]
        model.__dict__[_ATTRIBUTE] = self  # not by setattr: a module would look for parameters in it
        return self

    def _release(self) -> None:
        """Leave no trace in the model."""
        model = self._require_model()
        for handle in self._handles:
            handle.remove()
        del model.__dict__[_ATTRIBUTE]
        self.model, self._places, self._handles = None, [], []


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
        initial: ``"project"`` moves every weight to the nearest point; ``"uniform"`` draws a random one.
        include: Constrain only these: parameter or module names, globs, or module types. What is named here is
            constrained even if it is the first convolution or the classifier.
        exclude: Leave these alone.
        first_layer: Constrain the first convolution too.
        classifier: Constrain the classifier too.
        overrides: Other settings for some layers, e.g. ``{"layer4.*": {"strategy": "layer", "manifolds":
            "stiefel"}}``. Keys are names, globs or module types; later ones win.

    Returns:
        The plan.

    Raises:
        ValueError: If the model is constrained already, a pattern matches nothing, a setting is unknown, a layer
            that was named cannot be constrained, or nothing is left to constrain. Nothing has changed then.

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
    if any(isinstance(p, geoopt.ManifoldParameter) for p in model.parameters()):
        raise ValueError(
            "constrain: this model has manifold parameters already; call fgo_geo.unconstrain(model) first, or "
            "constrain before declaring others by hand"
        )
    base = _Settings(strategy, _kinds(manifolds), selection, "kaiming", bound, components, initial, seed)
    rules: Mapping[Pattern, RadiusRule] = radius if isinstance(radius, Mapping) else {"*": check_rule(radius)}
    overrides = overrides or {}
    sites = _sites(model)
    chooser = _Chooser(sites, include, exclude, first_layer, classifier)
    _check_patterns("radius", rules, sites)
    _check_patterns("overrides", overrides, sites)
    settings = [_settings_for(site, base, rules, overrides) for site in sites]
    entries = [_entry(site, s, chooser.reason(site)) for site, s in zip(sites, settings, strict=True)]
    chooser.check_honoured(entries, sites)
    if not any(entry.constrained for entry in entries):
        reasons = "; ".join(f"{e.name} {e.reason}" for e in entries)
        raise ValueError(
            f"constrain: nothing is left to constrain ({reasons}); name layers with include=, or pass "
            "first_layer=True or classifier=True"
        )
    work: list[tuple[PlanEntry, Tensor, Tensor, ProductOfGroups]] = []
    for site, entry, s in zip(sites, entries, settings, strict=True):
        if entry.constrained:
            manifold = _moved(entry.manifold(), site.param)
            work.append((entry, site.param, _initial_point(site.param, manifold, s.initial), manifold))
    with torch.no_grad():
        for entry, param, point, manifold in work:
            param.copy_(point)
            _put_on(model, entry, param, manifold)
    return Plan(tuple(entries))._settle(model)  # pyright: ignore[reportPrivateUsage]


def unconstrain(model: nn.Module) -> nn.Module:
    """Turn all manifold parameters of a model into plain ones, with the same values, in place.

    The outputs stay the same. For export, or to go on with another optimiser.

    Args:
        model: A constrained model.

    Returns:
        The model, with no trace of the plan.
    """
    for site in _sites(model):
        if isinstance(site.param, geoopt.ManifoldParameter):
            plain = nn.Parameter(site.param.detach().as_subclass(Tensor), site.param.requires_grad)
            _replace(model, site.names, plain)
    for module in model.modules():
        plan = module.__dict__.get(_ATTRIBUTE)
        if plan is not None:
            plan._release()
    return model


def plan_of(model: nn.Module) -> Plan:
    """The plan of a model, or of the model inside a wrapper (DistributedDataParallel, AveragedModel, compiled).

    Args:
        model: A constrained model.

    Raises:
        ValueError: If there is none.
    """
    for module in model.modules():
        plan = module.__dict__.get(_ATTRIBUTE)
        if plan is not None:
            return plan
    raise ValueError("this model is not constrained: call fgo_geo.constrain(model) first")


# -- what a model holds, and what was asked for ---------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Site:
    """A parameter with all places where it is used."""

    param: Tensor
    names: tuple[str, ...]
    owners: tuple[nn.Module, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.param.shape)

    @property
    def module_type(self) -> str:
        return type(self.owners[0]).__name__

    def matches(self, pattern: Pattern) -> bool:
        """Whether a parameter name, module name, glob or module type means this parameter."""
        if isinstance(pattern, type):
            return any(isinstance(owner, pattern) for owner in self.owners)
        return any(
            fnmatch.fnmatchcase(name, pattern)
            or fnmatch.fnmatchcase(name.rpartition(".")[0], pattern)
            or name.startswith(pattern + ".")
            for name in self.names
        )

    def layout(self) -> WeightLayout | str:
        """The layout that all owners agree on, or the reason why there is none."""
        if not self.param.is_floating_point():
            return f"has type {self.param.dtype}, expected a floating-point type"
        if not self.param.requires_grad:
            return "is frozen (requires_grad=False): unfreeze it first, or constrain it when it is to be trained"
        layouts = [layout_of(m, n.rpartition(".")[2]) for m, n in zip(self.owners, self.names, strict=True)]
        reasons = [layout for layout in layouts if isinstance(layout, str)]
        if reasons:
            return reasons[0]
        return layouts[0] if len(set(layouts)) == 1 else "is shared by layers that store it in different layouts"


def _sites(model: nn.Module) -> list[_Site]:
    found: dict[Tensor, list[tuple[str, nn.Module]]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for local, param in module.named_parameters(recurse=False):
            found.setdefault(param, []).append((f"{path}.{local}" if path else local, module))
    return [_Site(param, *zip(*places, strict=True)) for param, places in found.items()]  # pyright: ignore


class _Chooser:
    """Which parameters are meant, by include, exclude and the defaults."""

    def __init__(
        self,
        sites: Sequence[_Site],
        include: Pattern | Sequence[Pattern] | None,
        exclude: Pattern | Sequence[Pattern],
        first_layer: bool,
        classifier: bool,
    ) -> None:
        self.include = None if include is None else _patterns(include)
        self.exclude = _patterns(exclude)
        _check_patterns("include", self.include or (), sites)
        _check_patterns("exclude", self.exclude, sites)
        layouts = {site: site.layout() for site in sites}
        usable = [site for site, layout in layouts.items() if isinstance(layout, WeightLayout)]
        convolutions = [s for s in usable if isinstance(s.owners[0], _CONVOLUTIONS)]
        heads = [s for s in usable if _is_pointwise(layouts[s], s.owners[0])]
        self.spared: dict[_Site, str] = {}
        if heads and not classifier:
            self.spared[heads[-1]] = "is the classifier: pass classifier=True to constrain it"
        if convolutions and not first_layer:
            self.spared[convolutions[0]] = "is the first convolution: pass first_layer=True to constrain it"

    def reason(self, site: _Site) -> str | None:
        """Why a parameter is not wanted, None if it is."""
        if any(site.matches(p) for p in self.exclude):
            return "is excluded"
        if self.include is None:
            return self.spared.get(site)
        return None if any(site.matches(p) for p in self.include) else "is not among the layers to include"

    def check_honoured(self, entries: Sequence[PlanEntry], sites: Sequence[_Site]) -> None:
        """Raise if a layer that was named to be constrained was not."""
        for pattern in self.include or ():
            meant = [e for e, s in zip(entries, sites, strict=True) if s.matches(pattern)]
            if not any(e.constrained for e in meant):
                reasons = "; ".join(f"{e.name} {e.reason}" for e in meant)
                raise ValueError(f"constrain: include={pattern!r} asks for what cannot be constrained: {reasons}")


_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def _is_pointwise(layout: WeightLayout | str, owner: nn.Module) -> bool:
    """Whether a layer is linear, or a 1x1 convolution."""
    return isinstance(layout, WeightLayout) and all(k == 1 for k in layout.kernel) and layout.sections == 1


def _patterns(patterns: Pattern | Sequence[Pattern]) -> tuple[Pattern, ...]:
    return (patterns,) if isinstance(patterns, (str, type)) else tuple(patterns)


def _check_patterns(argument: str, patterns: Iterable[Pattern], sites: Sequence[_Site]) -> None:
    for pattern in patterns:
        if not any(site.matches(pattern) for site in sites):
            raise ValueError(
                f"constrain: {argument} has {pattern!r}, which matches no parameter; give a parameter name, a module "
                f"name, a glob or a module type. The parameters are {_few([s.names[0] for s in sites])}"
            )


def _settings_for(
    site: _Site,
    base: _Settings,
    rules: Mapping[Pattern, RadiusRule],
    overrides: Mapping[Pattern, Mapping[str, Any]],
) -> _Settings:
    rule = next((rule for pattern, rule in rules.items() if site.matches(pattern)), base.radius)
    settings = replace(base, radius=rule)
    for pattern, changes in overrides.items():
        if site.matches(pattern):
            unknown = sorted(set(changes) - set(asdict(base)))
            if unknown:
                raise ValueError(f"constrain: overrides[{pattern!r}] has {unknown}, expected {sorted(asdict(base))}")
            settings = replace(settings, **{k: _kinds(v) if k == "manifolds" else v for k, v in changes.items()})
    return settings


def _kinds(manifolds: str | Sequence[str]) -> tuple[str, ...]:
    return (manifolds,) if isinstance(manifolds, str) else tuple(manifolds)


# -- one parameter --------------------------------------------------------------------------------------------


def _left_alone(site: _Site, reason: str) -> PlanEntry:
    return PlanEntry(site.names, site.module_type, site.shape, reason)


def _entry(site: _Site, settings: _Settings, reason: str | None) -> PlanEntry:
    """What a parameter gets by its settings, or why it is left alone."""
    layout = site.layout()
    if isinstance(layout, str) or reason is not None:
        return _left_alone(site, layout if isinstance(layout, str) else str(reason))
    components = settings.components
    if components == "auto":
        components = "block" if all(k == 1 for k in layout.kernel) else "kernel"
    rows = layout.out_channels // layout.sections
    collections = tuple(
        collection(
            rows,
            layout.in_channels,
            settings.strategy,
            settings.manifolds,
            settings.selection,
            settings.seed,
            components=components,
            name=site.names[0] if layout.sections == 1 else f"{site.names[0]}[{section}]",
        )
        for section in range(layout.sections)
    )
    entry = PlanEntry(
        site.names,
        site.module_type,
        site.shape,
        layout=layout,
        collections=collections,
        radius=settings.radius,
        bound=settings.bound,
    )
    try:
        entry.manifold()
    except ValueError as error:
        return _left_alone(site, f"cannot be constrained like this: {error}")
    return entry


def _initial_point(param: Tensor, manifold: ProductOfGroups, initial: Initial) -> Tensor:
    value = param.detach().as_subclass(Tensor)
    if value.is_meta:
        return value
    if initial == "project":
        return manifold.projx(value)
    drawn = manifold.random(*value.shape, dtype=value.dtype, device=value.device)
    return manifold.where_constrained(drawn.as_subclass(Tensor), value)


def _put_on(model: nn.Module, entry: PlanEntry, param: Tensor, manifold: ProductOfGroups) -> None:
    """Make a parameter, or what replaces it, a manifold parameter; its values are on the manifold already."""
    if isinstance(param, geoopt.ManifoldParameter):
        cast(Any, param).manifold = manifold
    else:
        data = param.detach().as_subclass(Tensor)
        new = geoopt.ManifoldParameter(data, manifold=manifold, requires_grad=param.requires_grad)
        _replace(model, entry.names, new)


def _moved(manifold: ProductOfGroups, like: Tensor) -> ProductOfGroups:
    """The manifold on a parameter's device, its radii in the type that the parameter is computed in."""
    return manifold.to(device=like.device, dtype=torch.float64 if like.dtype == torch.float64 else torch.float32)


def _replace(model: nn.Module, names: Iterable[str], param: nn.Parameter) -> None:
    for name in names:
        path, _, local = name.rpartition(".")
        setattr(model.get_submodule(path), local, param)


def _find(model: nn.Module, entry: PlanEntry) -> Tensor:
    params = dict(model.named_parameters(remove_duplicate=False))
    param = params.get(entry.name)
    if param is None or tuple(param.shape) != entry.shape:
        found = "none of that name" if param is None else f"shape {tuple(param.shape)}"
        raise ValueError(
            f"the plan expects a parameter {entry.name!r} of shape {entry.shape}, the model has {found}; "
            "attach the plan to the architecture that it was made for"
        )
    return param


def _is_lost(owner: nn.Module, local: str) -> bool:
    """Whether a parameter has become a plain one; a tensor that functional_call swapped in has not."""
    param = owner._parameters.get(local)  # pyright: ignore[reportPrivateUsage]
    return isinstance(param, nn.Parameter) and not isinstance(param, geoopt.ManifoldParameter)


def _few(names: Sequence[str], limit: int = 6) -> str:
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


def _row(entry: PlanEntry) -> tuple[str, ...]:
    """The cells of a constrained entry in the printed table."""
    manifold = entry.manifold()
    first = entry.collections[0]
    kinds = Counter(group.manifold for c in entry.collections for group in c.groups)
    noun = "blocks" if first.components == "block" else f"{'x'.join(map(str, manifold.layout.kernel))} kernels"
    ranges = [m.radius_range for m, _ in manifold.parts if isinstance(m, ComponentManifold)]
    low, high = min(low for low, _ in ranges), max(high for _, high in ranges)
    return (
        entry.name if len(entry.names) == 1 else f"{entry.name} (also {', '.join(entry.names[1:])})",
        "x".join(map(str, entry.shape)),
        entry.module,
        f"{sum(manifold.partition.counts)} {noun}",
        f"{manifold.n_groups} ({first.strategy})",
        " + ".join(f"{kinds[kind]} {kind}" for kind in first.kinds if kinds[kind]),
        f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}",
    )


# -- hooks: functions of the module, so that models can be copied and pickled -----------------------------------


def _store(module: nn.Module, state_dict: Any, prefix: str, local_metadata: dict[str, Any]) -> None:
    """Put the plan into the metadata of a state_dict."""
    local_metadata[_METADATA] = plan_of(module).to_json()


def _restore(module: nn.Module, state_dict: Any, prefix: str, local_metadata: dict[str, Any], *_: Any) -> None:
    """Take over the plan of a checkpoint, after refusing values that are off their manifolds."""
    plan = plan_of(module)
    text = local_metadata.get(_METADATA)
    stored = plan if text in (None, plan.to_json()) else Plan.from_json(str(text))
    manifolds = {entry: entry.manifold() for entry in stored.constrained}
    for entry, manifold in manifolds.items():
        value = state_dict.get(prefix + entry.name)
        if isinstance(value, Tensor) and not value.is_meta and tuple(value.shape) == entry.shape:
            remedy = "load plain weights before constrain(), which projects them"
            _moved(manifold, value).require_point(value.detach(), f"{entry.name!r} in the state_dict", remedy)
    if stored is plan:
        return
    kept = {entry.name for entry in stored.constrained}
    for entry in plan.constrained:
        param = _find(module, entry)
        if entry.name not in kept:
            _replace(module, entry.names, nn.Parameter(param.detach().as_subclass(Tensor), param.requires_grad))
    for entry, manifold in manifolds.items():
        param = _find(module, entry)
        _put_on(module, entry, param, _moved(manifold, param))
    stored._settle(module)  # pyright: ignore[reportPrivateUsage]


def _attach_again(module: nn.Module, incompatible_keys: Any) -> None:
    """After load_state_dict(assign=True), which makes plain parameters of what it assigns."""
    plan = plan_of(module)
    if any(_is_lost(*place) for place in plan._places):  # pyright: ignore[reportPrivateUsage]
        plan.attach(module)


def _guard(module: nn.Module, inputs: Any) -> None:
    """Refuse to compute with a constrained parameter that has become a plain one."""
    if not torch.compiler.is_compiling():
        plan_of(module).check()
