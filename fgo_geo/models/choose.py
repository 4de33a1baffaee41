r"""What each parameter of a model gets: the decision, before anything is changed.

For each parameter of a model (:mod:`fgo_geo.models.sites`) :class:`Wanted` says whether it is meant, by ``include``,
``exclude`` and the defaults; :func:`settings_of` says how, by the rules and overrides that match its name;
:func:`entry_of` writes down the outcome as a :class:`~fgo_geo.models.entry.PlanEntry`. Nothing here changes a module;
:mod:`fgo_geo.models.surgery` does.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, Literal, get_args

from fgo_geo.manifolds import ProductOfGroups
from fgo_geo.models.entry import PlanEntry
from fgo_geo.models.feature_stats import LambdaRule
from fgo_geo.models.sites import Pattern, Site, output_heads
from fgo_geo.models.start import Initial
from fgo_geo.weights.grouping import Collection, collection
from fgo_geo.weights.kinds import KindLike
from fgo_geo.weights.layout import WeightLayout, has_own_forward
from fgo_geo.weights.radius import BoundOf, RadiusRule, check_bound, check_bound_of, check_rule
from fgo_geo.weights.words import did_you_mean, few, small

__all__ = [
    "Components",
    "Settings",
    "Wanted",
    "check_patterns",
    "collections_of",
    "entry_of",
    "settings_of",
]

Components = Literal["auto", "kernel", "block", "filter"]


# -- which parameters are meant -------------------------------------------------------------------------------


class Wanted:
    """Which parameters are meant, by include, exclude and the defaults.

    Args:
        sites: All parameters of a model.
        include: Patterns of those that are meant; None for all but the first convolution and the output heads.
        exclude: Patterns of those that are not.
        first_layer: Whether the first convolution is meant too.
        classifier: Whether the classifier and other output heads are meant too.

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
        if not classifier:
            heads = output_heads(sites).items()
            self._spared.update((site, f"{reason}: pass classifier=True to constrain it") for site, reason in heads)
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
                f"constrain: {argument} has {pattern!r}, which matches no parameter; {_meant(pattern, sites)}"
            )


def _meant(pattern: Pattern, sites: Sequence[Site]) -> str:
    """What to write in place of a pattern that matches nothing."""
    types = {owner_type.__name__ for site in sites for owner in site.owners for owner_type in type(owner).__mro__}
    if pattern in types:
        return f"to name all layers of a type give the type, {pattern} without quotes, e.g. torch.nn.{pattern}"
    names = [site.names[0] for site in sites]
    return (
        "give a parameter name, a module name, a glob or a module type. The parameters are "
        f"{few(names)}{did_you_mean(pattern, [*names, *(name.rpartition('.')[0] for name in names)])}"
    )


def _patterns(patterns: Pattern | Sequence[Pattern]) -> tuple[Pattern, ...]:
    return (patterns,) if isinstance(patterns, (str, type)) else tuple(patterns)


# -- how ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """How one weight is to be constrained; the arguments of :func:`~fgo_geo.constrain` of the same names.

    Attributes:
        split: Equal runs of output channels that are layers of their own, e.g. 3 for the fused queries, keys and values
            of attention. Only in ``overrides``.

    Raises:
        ValueError: If one is unknown or out of range.
    """

    strategy: str
    manifolds: KindLike | Sequence[KindLike]
    selection: str
    radius: RadiusRule
    seed: int
    bound: float
    components: Components
    initial: Initial
    statistics: LambdaRule | None
    bound_of: BoundOf = "group"
    split: int = 1

    def __post_init__(self) -> None:
        put = partial(object.__setattr__, self)
        put("radius", check_rule(self.radius))
        check_bound(self.bound)
        put("bound_of", check_bound_of(self.bound_of))
        if type(self.split) is not int or self.split < 1:
            raise ValueError(f"split must be a positive number of equal parts, got {self.split!r}")
        choices: dict[str, tuple[object, ...]] = {
            "components": get_args(Components),
            "initial": get_args(Initial),
            "statistics": (None, *get_args(LambdaRule)),
        }
        for name, known in choices.items():
            given = getattr(self, name)
            if small(given) not in known:
                raise ValueError(f"{name} must be one of {known}, got {given!r}{did_you_mean(given, _words(known))}")
            put(name, small(given))
        collection(1, 1, self.strategy, self.manifolds, self.selection, self.seed)  # raises on what it does not know


def _words(known: Iterable[object]) -> list[str]:
    return [word for word in known if isinstance(word, str)]


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
    if settings.split > 1:
        layout = _split(layout, settings.split, alone.name)
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
        bound_of=settings.bound_of,
        statistics=settings.statistics,
        notes=_notes(site),
    )
    try:
        return entry, entry.manifold()
    except ValueError as error:
        return replace(alone, reason=f"cannot be constrained like this: {error}"), None


def _split(layout: WeightLayout, split: int, name: str) -> WeightLayout:
    """The layout with sections."""
    if math.prod(layout.kernel) != 1 or layout.conv_groups != 1 or layout.sections != 1:
        raise ValueError(f"constrain: {name!r} is no matrix of one layer, so it cannot be split into {split} parts")
    if layout.out_channels % split:
        raise ValueError(
            f"constrain: {name!r} has {layout.out_channels} output channels, which do not split into {split} equal "
            "parts"
        )
    return replace(layout, sections=split)


_STANDARDISED = {"StdConv2d", "StdConv2dSame", "ScaledStdConv2d", "ScaledStdConv2dSame", "WSConv2d"}


def _notes(site: Site) -> tuple[str, ...]:
    """What else there is to say of a constrained parameter."""
    owner = next((owner for owner in site.owners if has_own_forward(owner)), None)
    if owner is None:
        return ()
    name = type(owner).__name__
    if _STANDARDISED & {base.__name__ for base in type(owner).__mro__}:
        return (f"the raw weight is constrained, and {name} centres and rescales it in the forward pass",)
    return (f"the raw weight is constrained; {name} has a forward pass of its own, which may compute with another one",)


def collections_of(
    layout: WeightLayout,
    strategy: str,
    manifolds: KindLike | Sequence[KindLike],
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
