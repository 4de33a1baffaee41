r"""Decide which parameters of a model to constrain, and how, before anything changes.

For each parameter of a model (:mod:`fgo_geo.models.sites`), :class:`Wanted` applies ``include``, ``exclude`` and the
defaults; :func:`settings_of` collects the rules and overrides that match its name; :func:`entry_of` records the
decision as a :class:`~fgo_geo.models.entry.PlanEntry`. :mod:`fgo_geo.models.surgery` then changes the modules.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, Literal, get_args

from torch import Tensor, nn

from fgo_geo.manifolds import ProductOfGroups
from fgo_geo.models.entry import PlanEntry
from fgo_geo.models.feature_stats import LambdaRule
from fgo_geo.models.sites import Pattern, Site, output_heads
from fgo_geo.models.start import Initial
from fgo_geo.weights.grouping import Collection, collection
from fgo_geo.weights.kinds import KindLike, kind
from fgo_geo.weights.layout import WeightLayout, has_own_forward
from fgo_geo.weights.radius import BoundOf, RadiusRule, check_bound, check_bound_of, check_rule
from fgo_geo.weights.words import described, did_you_mean, few, small, stated, whole_number

__all__ = [
    "Components",
    "Settings",
    "Wanted",
    "check_patterns",
    "check_radii",
    "collections_of",
    "entry_of",
    "settings_of",
]

Components = Literal["auto", "kernel", "block", "filter"]


# -- selection --------------------------------------------------------------------------------------------------


class Wanted:
    """The parameters to constrain, by include, exclude and the defaults.

    Args:
        sites: All parameters of a model.
        include: Patterns of parameters to constrain; None for all but the first convolution and the output heads.
        exclude: Patterns of parameters to leave out.
        first_layer: Whether to constrain the first convolution, too.
        classifier: Whether to constrain the classifier and other output heads, too.

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
        """Why a parameter is not selected; None if it is."""
        if any(site.matches(p) for p in self._exclude):
            return "is excluded"
        if self._include is None:
            return self._spared.get(site)
        return None if any(site.matches(p) for p in self._include) else "is not among the layers to include"

    def check_honoured(self, entries: Sequence[PlanEntry]) -> None:
        """Raise ValueError if a pattern of ``include`` names only parameters that cannot be constrained."""
        for pattern in self._include or ():
            meant = [entry for entry, site in zip(entries, self._sites, strict=True) if site.matches(pattern)]
            if not any(entry.constrained for entry in meant):
                reasons = "; ".join(f"{entry.name} {entry.reason}" for entry in meant)
                raise ValueError(f"constrain: include={pattern!r} asks for what cannot be constrained: {reasons}")


def check_patterns(argument: str, patterns: Iterable[Pattern], sites: Sequence[Site]) -> None:
    """Raise ValueError if ``overrides`` is no mapping, or something is no pattern or matches no parameter."""
    if argument == "overrides" and not isinstance(patterns, Mapping):
        raise ValueError(
            f"constrain: {argument} is {patterns!r}; expected a mapping from names, globs or module types, e.g. "
            f'{{"layer4.*": ...}}'
        )
    for pattern in patterns:
        if not isinstance(pattern, (str, type)):
            raise ValueError(
                f"constrain: {argument} has {_shown(pattern, sites)}, expected a name, a glob or a module type"
            )
        if not any(site.matches(pattern) for site in sites):
            raise ValueError(
                f"constrain: {argument} has {pattern!r}, which matches no parameter; {_meant(pattern, sites)}"
            )


def check_radii(
    rules: Mapping[Pattern, RadiusRule],
    overrides: Mapping[Pattern, Mapping[str, Any]],
    sites: Sequence[Site],
    entries: Sequence[PlanEntry],
) -> None:
    """Raise ValueError if the name or glob of a radius sets the radius of no weight.

    The default ``"*"``, module types, and globs whose weights several patterns have taken are fallbacks.

    Args:
        rules: Radius rules by pattern; the first match counts.
        overrides: Other settings by pattern, which may set a radius, too.
        sites: All parameters of a model.
        entries: Their plan entries.
    """
    for place, pattern in enumerate(rules):
        if pattern == "*" or isinstance(pattern, type):
            continue
        matched = [(site, entry) for site, entry in zip(sites, entries, strict=True) if site.matches(pattern)]
        meant = [pair for pair in matched if pair[1].constrained] or matched
        covering = [p for p in [*rules][:place] if all(site.matches(p) for site, _ in matched)]
        reasons: dict[str, list[str]] = {}
        for site, entry in meant:
            reason = _no_radius(site, entry, pattern, covering, overrides)
            if reason is None:
                break
            reasons.setdefault(reason, []).extend(entry.names)
        else:
            stating = "; ".join(stated(names, reason) for reason, names in reasons.items())
            raise ValueError(f"constrain: radius has {pattern!r}, which sets the radius of no weight: {stating}")


def _no_radius(
    site: Site,
    entry: PlanEntry,
    pattern: Pattern,
    covering: Sequence[Pattern],
    overrides: Mapping[Pattern, Mapping[str, Any]],
) -> str | None:
    """Why a pattern does not set the radius of a parameter that it matches; None if it does."""
    if entry.reason is not None:
        return entry.reason
    if covering:
        return f"matches {covering[0]!r}, which comes first; put {pattern!r} before it"
    for other, changes in overrides.items():
        if "radius" in changes and site.matches(other):
            return f"gets its radius from overrides[{other!r}]"
    used = entry.kinds_used()
    return None if any(kind(k).has_radius for k in used) else f"has only groups of {few(used)}, which have no radius"


def _meant(pattern: Pattern, sites: Sequence[Site]) -> str:
    """A hint for a pattern that matches nothing."""
    types = {owner_type.__name__ for site in sites for owner in site.owners for owner_type in type(owner).__mro__}
    if pattern in types:
        return f"to name all layers of a type pass the type, {pattern} without quotes, e.g. torch.nn.{pattern}"
    names = [site.names[0] for site in sites]
    return (
        "pass a parameter name, a module name, a glob or a module type. The parameters are "
        f"{few(names)}{did_you_mean(pattern, [*names, *(name.rpartition('.')[0] for name in names)])}"
    )


def _shown(pattern: object, sites: Sequence[Site]) -> str:
    """What is given in place of a pattern; a module or a parameter of the model by the names that it has there."""
    if not isinstance(pattern, (nn.Module, Tensor)):
        return repr(pattern)
    params = {pattern} if isinstance(pattern, Tensor) else set(pattern.parameters())
    names = [name for site in sites if site.param in params for name in site.names]
    return described(pattern) + (f" of the parameters {few(names)}" if names else "")


def _patterns(patterns: Pattern | Sequence[Pattern]) -> tuple[Pattern, ...]:
    is_one = isinstance(patterns, (str, nn.Module, Tensor)) or not isinstance(patterns, Iterable)
    return (patterns,) if is_one else tuple(patterns)  # pyright: ignore


# -- settings -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """How to constrain one weight; the arguments of :func:`~fgo_geo.constrain` of the same names.

    Attributes:
        split: Number of equal parts of the output channels that are separate layers, e.g. 3 for the fused queries, keys
            and values of attention. Only in ``overrides``.

    Raises:
        ValueError: If a value is unknown or out of range.
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
        put("bound", float(self.bound))
        put("bound_of", check_bound_of(self.bound_of))
        split = whole_number(self.split)
        if split is None or split < 1:
            raise ValueError(f"split must be a positive number of equal parts, got {self.split!r}")
        put("split", split)
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
        collection(1, 1, self.strategy, self.manifolds, self.selection, self.seed)  # raises on unknown values


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
        base: The settings of all parameters.
        rules: Radius rules by pattern; the first match counts.
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
            if unknown := [name for name in changes if name not in known]:
                hints = "".join(did_you_mean(name, known) for name in unknown)
                raise ValueError(f"constrain: overrides[{pattern!r}] may change {sorted(known)}, got {unknown}{hints}")
            try:
                settings = replace(settings, **changes)
            except ValueError as error:
                raise ValueError(f"constrain: overrides[{pattern!r}]: {error}") from error
    return settings


def entry_of(site: Site, settings: Settings, reason: str | None) -> tuple[PlanEntry, ProductOfGroups | None]:
    """The plan entry of a parameter, and its manifold if it is constrained.

    Args:
        site: The parameter.
        settings: How to constrain it.
        reason: Why it is not selected; None if it is.
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
    )
    entry = replace(entry, notes=_notes(site) + _unscaled(entry) + _fused(alone.name, layout))
    try:
        return entry, entry.manifold()
    except ValueError as error:
        return replace(alone, reason=f"cannot be constrained like this: {error}"), None


def _split(layout: WeightLayout, split: int, name: str) -> WeightLayout:
    """The layout with sections."""
    if math.prod(layout.kernel) != 1 or layout.conv_groups != 1 or layout.sections != 1:
        raise ValueError(
            f"constrain: {name!r} is not the matrix of one layer, so it cannot be split into {split} parts"
        )
    if layout.out_channels % split:
        raise ValueError(
            f"constrain: {name!r} has {layout.out_channels} output channels, which do not split into {split} equal "
            "parts"
        )
    return replace(layout, sections=split)


_STANDARDISED = {"StdConv2d", "StdConv2dSame", "ScaledStdConv2d", "ScaledStdConv2dSame", "WSConv2d"}


def _notes(site: Site) -> tuple[str, ...]:
    """Remarks on a constrained parameter."""
    owner = next((owner for owner in site.owners if has_own_forward(owner)), None)
    if owner is None:
        return ()
    name = type(owner).__name__
    if _STANDARDISED & {base.__name__ for base in type(owner).__mro__}:
        return (f"the raw weight is constrained, and {name} centres and rescales it in the forward pass",)
    return (f"the raw weight is constrained; {name} has a forward pass of its own, which may compute with another one",)


def _unscaled(entry: PlanEntry) -> tuple[str, ...]:
    """A remark on kinds that the rule "kaiming" cannot scale."""
    used = [k for k in entry.kinds_used() if not (kind(k).has_radius or kind(k).is_free)]
    if entry.radius != "kaiming" or not used:
        return ()
    return (f'groups of {few(used)} have no radius, so radius="kaiming" leaves their scale as it is',)


def _fused(name: str, layout: WeightLayout) -> tuple[str, ...]:
    """A remark on queries, keys and values in one linear layer, unless they are split."""
    *parents, layer = name.split(".")[: -1 if "." in name else None]
    has_three = re.search("qkv|c_attn", layer, re.IGNORECASE) and layout.out_channels == 3 * layout.in_channels
    if not has_three or layout.sections > 1:
        return ()
    return (
        f'queries, keys and values are one matrix here; overrides={{"{"*." * bool(parents)}{layer}": {{"split": 3}}}} '
        "constrains each by itself",
    )


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
