r"""What each parameter of a model gets: the decision, before anything is changed.

:func:`sites_of` finds the parameters with all places where they are used. For each of them :class:`Wanted` says whether
it is meant, by ``include``, ``exclude`` and the defaults; :func:`settings_of` says how, by the rules and overrides that
match its name; :func:`entry_of` writes down the outcome as a :class:`~fgo_geo.models.entry.PlanEntry`. Nothing here
changes a module; :mod:`fgo_geo.models.surgery` does.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

from torch import Tensor, nn

from fgo_geo.manifolds import ProductOfGroups
from fgo_geo.models.entry import PlanEntry
from fgo_geo.models.feature_stats import LambdaRule
from fgo_geo.weights.components import CONVOLUTIONS, WeightLayout, layout_of
from fgo_geo.weights.grouping import Collection, collection
from fgo_geo.weights.radius import RadiusRule, check_bound, check_rule
from fgo_geo.weights.words import few

__all__ = [
    "Components",
    "Initial",
    "Pattern",
    "Settings",
    "Site",
    "Wanted",
    "check_patterns",
    "collections_of",
    "entry_of",
    "settings_of",
    "sites_of",
]

Components = Literal["auto", "kernel", "block", "filter"]
Initial = Literal["project", "uniform"]
Pattern = str | type[nn.Module]


# -- what a model holds ---------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Site:
    """A parameter with all places where it is used.

    Attributes:
        param: The parameter.
        names: Its names in the model.
        owners: The module behind each name.
    """

    param: Tensor
    names: tuple[str, ...]
    owners: tuple[nn.Module, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """The parameter's shape; none if it is not initialised yet."""
        return () if isinstance(self.param, nn.UninitializedParameter) else tuple(self.param.shape)

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
        """The layout that all owners agree on, or the reason why the parameter cannot be constrained."""
        layouts = self._layouts()
        for layout in layouts:
            if isinstance(layout, str):
                return layout
        if len(set(layouts)) > 1:
            return "is shared by layers that store it in different layouts"
        if not self.param.is_floating_point():
            return f"has type {self.param.dtype}, expected a real floating-point type"
        if not self.param.requires_grad:
            return "is frozen (requires_grad=False): unfreeze it first, or constrain it when it is to be trained"
        return layouts[0]

    def _layouts(self) -> list[WeightLayout | str]:
        return [layout_of(m, n.rpartition(".")[2]) for m, n in zip(self.owners, self.names, strict=True)]

    def is_convolution(self) -> bool:
        """Whether this is the weight of a convolution, frozen or not."""
        return isinstance(self.owners[0], CONVOLUTIONS) and isinstance(self._layouts()[0], WeightLayout)

    def is_linear(self) -> bool:
        """Whether this is the weight of a linear layer or a 1x1 convolution without groups, frozen or not."""
        return any(
            isinstance(owner, (nn.Linear, *CONVOLUTIONS))
            and isinstance(layout, WeightLayout)
            and math.prod(layout.kernel) == layout.conv_groups == 1
            for owner, layout in zip(self.owners, self._layouts(), strict=True)
        )


def sites_of(model: nn.Module) -> list[Site]:
    """All parameters of a model, tied ones once, in the order of the model."""
    found: dict[Tensor, list[tuple[str, nn.Module]]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for local, param in module.named_parameters(recurse=False, remove_duplicate=False):
            found.setdefault(param, []).append((f"{path}.{local}" if path else local, module))
    return [Site(param, *zip(*places, strict=True)) for param, places in found.items()]  # pyright: ignore


# -- which parameters are meant -------------------------------------------------------------------------------


class Wanted:
    """Which parameters are meant, by include, exclude and the defaults.

    Args:
        sites: All parameters of a model.
        include: Patterns of those that are meant; None for all but the first convolution and the classifier.
        exclude: Patterns of those that are not.
        first_layer: Whether the first convolution is meant too.
        classifier: Whether the classifier is meant too.

    Raises:
        ValueError: If a pattern matches nothing.
    """

    def __init__(
        self,
        sites: Sequence[Site],
        include: Pattern | Sequence[Pattern] | None,
        exclude: Pattern | Sequence[Pattern],
        first_layer: bool,
        classifier: bool,
    ) -> None:
        self._sites = sites
        self._include = None if include is None else _patterns(include)
        self._exclude = _patterns(exclude)
        check_patterns("include", self._include or (), sites)
        check_patterns("exclude", self._exclude, sites)
        self._spared: dict[Site, str] = {}
        linear = [site for site in sites if site.is_linear()]
        if linear and not classifier:
            self._spared[linear[-1]] = "is the classifier: pass classifier=True to constrain it"
        convolutions = [site for site in sites if site.is_convolution()]
        if convolutions and not first_layer:
            self._spared[convolutions[0]] = "is the first convolution: pass first_layer=True to constrain it"

    def reason(self, site: Site) -> str | None:
        """Why a parameter is not meant, None if it is."""
        if any(site.matches(p) for p in self._exclude):
            return "is excluded"
        if self._include is None:
            return self._spared.get(site)
        return None if any(site.matches(p) for p in self._include) else "is not among the layers to include"

    def check_honoured(self, entries: Sequence[PlanEntry]) -> None:
        """Raise ValueError if nothing is constrained of what a pattern of ``include`` names."""
        for pattern in self._include or ():
            meant = [entry for entry, site in zip(entries, self._sites, strict=True) if site.matches(pattern)]
            if not any(entry.constrained for entry in meant):
                reasons = "; ".join(f"{entry.name} {entry.reason}" for entry in meant)
                raise ValueError(f"constrain: include={pattern!r} asks for what cannot be constrained: {reasons}")


def check_patterns(argument: str, patterns: Iterable[Pattern], sites: Sequence[Site]) -> None:
    """Raise ValueError if there are no patterns but a word, or one matches no parameter."""
    if isinstance(patterns, str):
        raise ValueError(
            f"constrain: {argument} is {patterns!r}; expected a mapping from names, globs or module types, e.g. "
            f'{{"layer4.*": ...}}'
        )
    for pattern in patterns:
        if not isinstance(pattern, (str, type)):
            raise ValueError(f"constrain: {argument} has {pattern!r}, expected a name, a glob or a module type")
        if not any(site.matches(pattern) for site in sites):
            raise ValueError(
                f"constrain: {argument} has {pattern!r}, which matches no parameter; give a parameter name, a module "
                f"name, a glob or a module type. The parameters are {few([site.names[0] for site in sites])}"
            )


def _patterns(patterns: Pattern | Sequence[Pattern]) -> tuple[Pattern, ...]:
    return (patterns,) if isinstance(patterns, (str, type)) else tuple(patterns)


# -- how ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """How one weight is to be constrained; the arguments of :func:`~fgo_geo.constrain` of the same names.

    Raises:
        ValueError: If one is unknown or out of range.
    """

    strategy: str
    manifolds: str | Sequence[str]
    selection: str
    radius: RadiusRule
    seed: int
    bound: float
    components: Components
    initial: Initial
    statistics: LambdaRule | None

    def __post_init__(self) -> None:
        check_rule(self.radius)
        check_bound(self.bound)
        choices: dict[str, tuple[object, ...]] = {
            "components": get_args(Components),
            "initial": get_args(Initial),
            "statistics": (None, *get_args(LambdaRule)),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {known}, got {getattr(self, name)!r}")
        collection(1, 1, self.strategy, self.manifolds, self.selection, self.seed)  # raises on what it does not know


def settings_of(
    site: Site,
    base: Settings,
    rules: Mapping[Pattern, RadiusRule],
    overrides: Mapping[Pattern, Mapping[str, Any]],
) -> Settings:
    """The settings of one parameter.

    Args:
        site: The parameter.
        base: What holds for all.
        rules: Radius rules by pattern; the first that matches counts.
        overrides: Other settings by pattern; later ones win.

    Raises:
        ValueError: If an override is unknown or out of range.
    """
    rule = next((rule for pattern, rule in rules.items() if site.matches(pattern)), base.radius)
    settings = base if rule == base.radius else replace(base, radius=rule)
    known = {f.name for f in fields(base)}
    for pattern, changes in overrides.items():
        if site.matches(pattern):
            if not isinstance(changes, Mapping):
                raise ValueError(
                    f"constrain: overrides[{pattern!r}] is {changes!r}; expected a mapping from arguments to values, "
                    'e.g. {"strategy": "layer", "manifolds": "stiefel"}'
                )
            if unknown := set(changes) - known:
                raise ValueError(f"constrain: overrides[{pattern!r}] may change {sorted(known)}, got {sorted(unknown)}")
            try:
                settings = replace(settings, **changes)
            except ValueError as error:
                raise ValueError(f"constrain: overrides[{pattern!r}]: {error}") from error
    return settings


def entry_of(site: Site, settings: Settings, reason: str | None) -> tuple[PlanEntry, ProductOfGroups | None]:
    """What a parameter gets, and the manifold if it gets one.

    Args:
        site: The parameter.
        settings: How it is to be constrained.
        reason: Why it is not meant, None if it is.
    """
    alone = PlanEntry(site.names, type(site.owners[0]).__name__, site.shape)
    layout = site.layout()
    if isinstance(layout, str) or reason is not None:
        return replace(alone, reason=layout if isinstance(layout, str) else reason), None
    collections = collections_of(
        layout,
        settings.strategy,
        settings.manifolds,
        settings.selection,
        settings.seed,
        settings.components,
        alone.name,
    )
    entry = replace(
        alone,
        layout=layout,
        collections=collections,
        radius=settings.radius,
        bound=settings.bound,
        statistics=settings.statistics,
    )
    try:
        return entry, entry.manifold()
    except ValueError as error:
        return replace(alone, reason=f"cannot be constrained like this: {error}"), None


def collections_of(
    layout: WeightLayout,
    strategy: str,
    manifolds: str | Sequence[str],
    selection: str,
    seed: int,
    components: Components,
    name: str,
) -> tuple[Collection, ...]:
    """The groups of a weight: one collection per section of its layout.

    Args:
        layout: How the weight is stored.
        strategy: As in :func:`fgo_geo.weights.grouping.collection`, like the next three.
        manifolds: Manifold kinds.
        selection: ``"random"`` or ``"deterministic"``.
        seed: Seed of a random selection.
        components: ``"kernel"``, ``"block"``, ``"filter"``, or ``"auto"``: kernels for spatial convolutions, blocks of
            the matrix for all others.
        name: The layer's name; a random selection depends on it, and on the number of the section.

    Example:
        >>> packed = WeightLayout((12, 4), sections=3)
        >>> [made.name for made in collections_of(packed, "layer", "sphere", "random", 0, "auto", "attention")]
        ['attention[0]', 'attention[1]', 'attention[2]']
    """
    if components == "auto":
        components = "block" if math.prod(layout.kernel) == 1 else "kernel"
    return tuple(
        collection(
            layout.out_channels // layout.sections,
            layout.in_channels,
            strategy,
            manifolds,
            selection,
            seed,
            components=components,
            name=name if layout.sections == 1 else f"{name}[{section}]",
        )
        for section in range(layout.sections)
    )
