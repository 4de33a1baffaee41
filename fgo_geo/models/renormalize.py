r"""Renormalisation: weights that obey norm bounds at every step, under any optimiser.

The layer computes its weight from a free tensor of the same shape, the *raw* weight. The optimiser sees only the raw
weight. For every component ``i`` there are two stages ([Ozay2019]_; "Mathematics", section 5)::

    wᵢ = Rᵢ N(rawᵢ),    Rᵢ = γᵢ / λᵢ

1. *normalise*: ``N`` maps to a manifold of radius one: the sphere (divide by the Frobenius norm), the oblique manifold
   (by the column norms), the Stiefel manifold (polar factor), or the ball of the spectral norm (divide by it where it
   exceeds one);
2. *re-parameterise*: ``γ`` is a radius at which the chosen norms of a group, or of the layer, are at most ``β``, see
   :mod:`fgo_geo.weights.radius`; ``λ`` is one, or the standard deviation of the features, see
   :mod:`fgo_geo.models.feature_stats`.

:class:`Renormalization` does this to all components of a weight at once, as a parametrization of
:mod:`torch.nn.utils.parametrize`. :func:`renormalize` registers it, :func:`update_scales` refreshes ``λ`` once per
epoch and :func:`remove_renormalization` makes the weight plain again. Components and groups are those of
:class:`~fgo_geo.manifolds.ProductOfGroups`.

The weight does not depend on the scale of the raw weight (for the ball, it depends on the ratio to a unit). The raw
weight starts at the scale of [He2015]_, at which random entries have variance ``2 / fan_in``, because usual learning
rates and weight decay assume that scale.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, cast, get_args

import geoopt
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fgo_geo.linalg import Memory, computes_in_float32, reads_for_free, require_finite
from fgo_geo.linalg.values import is_differentiated
from fgo_geo.models.choose import Components, collections_of
from fgo_geo.models.feature_stats import (
    FullPrecisionBuffers,
    LambdaRule,
    TrackingHandle,
    component_lambda,
    is_tracked,
    require_trackable,
    rescaling_lambda,
    track,
    untrack,
)
from fgo_geo.models.slips import weights_inside
from fgo_geo.weights import kinds
from fgo_geo.weights.components import partition
from fgo_geo.weights.grouping import Collection
from fgo_geo.weights.layout import WeightLayout, layout_of
from fgo_geo.weights.norms import NORMS, Norm, matrix_norms, norm_names, norms_of_groups
from fgo_geo.weights.radius import BoundOf, check_bound, check_bound_of, group_radii, kaiming_radius
from fgo_geo.weights.words import small

__all__ = [
    "Renormalization",
    "remove_renormalization",
    "renormalization_of",
    "renormalize",
    "update_scales",
]


# -- one component -----------------------------------------------------------------------------------------------


def _kinds() -> tuple[str, ...]:
    """The kinds that a weight can be renormalised to: those with a radius and norms that it bounds."""
    return tuple(record.name for record in kinds.kinds() if record.carry is not None)


# -- one weight --------------------------------------------------------------------------------------------------


class Renormalization(FullPrecisionBuffers):
    r"""The parametrization that :func:`renormalize` registers: raw weight to weight, and back.

    It computes at least in single precision, for every type of the weight and under autocast. A zero component of
    the raw weight gives the manifold's canonical point (of a ball: zero), NaN gives NaN or an error.

    Args:
        collections: The groups; one collection per section of the layout.
        layout: How the weight is stored.
        norms: The norms to bound.
        bound: The bound ``β``.
        statistics: The rule for ``λ``; None for ``λ = 1``.
        like: A tensor of the weight's type and device.
        bound_of: Whether the bound is one of every group, or of the layer.

    Attributes:
        partition: The weight's components and groups.
        norms: The bounded norms.
        bound: The bound ``β``.
        bound_of: Whether it is a bound of every group, or of the layer.
        statistics: The rule for ``λ``.
        gamma: ``γ`` of every component, part by part.
        lam: ``λ`` of every component, part by part, which is state; None without statistics.

    Raises:
        ValueError: If the collections do not fit the layout, or a component could not move on its manifold.
    """

    statistics: LambdaRule | None
    bound_of: BoundOf = "group"
    gamma: Tensor
    lam: Tensor | None

    def __init__(
        self,
        collections: Sequence[Collection],
        layout: WeightLayout,
        norms: Sequence[Norm],
        bound: float,
        statistics: LambdaRule | None,
        like: Tensor,
        bound_of: BoundOf = "group",
    ) -> None:
        super().__init__()
        self.collections = tuple(collections)
        self.partition = partition(collections, layout).to(like.device)
        self.norms = norm_names(norms)
        self.bound = bound
        self.bound_of = bound_of
        self.statistics = statistics
        self.owns_statistics = False  # whether removing this ends the tracking of the layer's input
        cut = self.partition
        self._weights = Memory()
        self._factors = [Memory() for _ in cut.kinds]
        parts = list(zip(cut.kinds, cut.sizes, strict=True))
        for kind, size in parts:
            _require_dimensions(kind, size)
        self._raw_radius = [kaiming_radius(kind, *size, layout.fan_in) for kind, size in parts]
        per_group = group_radii(cut, "bound", bound, norms, bound_of).numpy()
        gamma = np.concatenate(cut.per_component(per_group))
        if like.dtype != torch.float64:
            gamma = np.nextafter(gamma.astype(np.float32), np.float32(0))  # rounded down: a bound is a bound
        self.register_buffer("gamma", torch.from_numpy(gamma).to(like.device), persistent=False)
        self.register_buffer("lam", None if statistics is None else torch.ones_like(self.gamma))

    @cached_property
    def _keeps(self) -> bool:
        """Whether to keep results: without a decomposition, computing is as fast as comparing."""
        return any(kinds.kind(kind).is_decomposed for kind in self.partition.kinds)

    @computes_in_float32
    def forward(self, raw: Tensor) -> Tensor:
        """The weight that belongs to a raw weight: differentiable, of the same shape and type.

        On the CPU, the module keeps factorisations for the next forward pass, and the weight itself where torch takes
        no derivatives. It reuses both as long as the raw weight stays the same.
        """
        target = self._radius(raw.dtype)
        if not (self._keeps and reads_for_free(raw)):
            return self._map(raw, self._raw_radius, target)
        inputs = [raw, self.gamma, *([] if self.lam is None else [self.lam])]
        known = None if is_differentiated(raw) else self._weights.recall(inputs)
        if known is not None:
            return known[0]
        weight = self._map(raw, self._raw_radius, target, self._factors)
        if not is_differentiated(raw):
            self._weights.keep(inputs, [weight])
        return weight

    @computes_in_float32
    def right_inverse(self, weight: Tensor) -> Tensor:
        """A raw weight that gives this weight if it is on its manifolds, and else the nearest one that is.

        Raises:
            ValueError: If the weight holds NaN or infinity.
        """
        require_finite(weight, "the weight to renormalise")
        return self._map(weight, self._radius(weight.dtype), self._raw_radius)

    def _map(
        self,
        x: Tensor,
        source: Sequence[float | Tensor],
        target: Sequence[float | Tensor],
        memories: Sequence[Memory] | None = None,
    ) -> Tensor:
        cut = self.partition
        carries: list[Any] = [kinds.kind(kind).carry for kind in cut.kinds]
        parts = zip(carries, cut.split(x), source, target, memories or [None] * len(carries), strict=True)
        result = cut.merge([carry(*part) for carry, *part in parts])
        # Transposed blocks come back transposed; some optimisers and kernels want the strides that they know.
        return result if result.stride() == x.stride() else torch.empty_like(x).copy_(result)

    def _radius(self, dtype: torch.dtype) -> list[Tensor]:
        """``R = γ / λ`` of every part, shape ``(n, 1, 1)``."""
        radius = self.gamma if self.lam is None else self.gamma / self.lam
        return [part[:, None, None] for part in radius.to(dtype).split(list(self.partition.counts))]

    def guarantee(self) -> Tensor:
        """The bound that the norms of every group obey at present: ``β / λ`` for the smallest ``λ`` of its components.

        Without statistics it is ``β``, with the rule ``"max1"`` at most ``β``.

        Returns:
            Bounds, shape ``(G,)``, in the order of the collections; shape ``(1,)`` for a bound of the layer.
        """
        cut = self.partition
        inverse = torch.ones_like(self.gamma) if self.lam is None else 1 / self.lam
        if self.bound_of == "layer":
            return self.bound * inverse.amax(0, keepdim=True)
        parts = zip(cut.segments, inverse.split(list(cut.counts)), strict=True)
        worst = torch.cat([segments.max(part) for segments, part in parts])
        order = torch.from_numpy(np.concatenate(cut.groups)).to(worst.device)
        return self.bound * torch.empty_like(worst).index_copy(0, order, worst)

    def violation(self, weight: Tensor) -> Tensor:
        """How far the norms of a weight exceed the guaranteed bound, relative to the bound.

        Args:
            weight: A weight of this shape. The layer's own weight has no excess, up to rounding.

        Returns:
            The excess of the largest norm of every group, 0 where there is none: float64, shape ``(G,)``; shape
            ``(1,)`` for a bound of the layer.
        """
        if self.bound_of == "layer":
            norms = matrix_norms(self.partition.layout.channels(weight.double()).flatten(1).unsqueeze(0))
        else:
            norms = norms_of_groups(self.partition, weight.double())
        worst = torch.stack([getattr(norms, name) for name in norm_names(self.norms)]).amax(0)
        return (worst / self.guarantee().to(worst) - 1).clamp(min=0)

    def extra_repr(self) -> str:
        """The groups and what is bounded."""
        scale = "" if self.statistics is None else f", λ by {self.statistics!r}"
        groups = "; ".join(map(str, self.collections))
        return f"{groups}; {', '.join(self.norms)} of the {self.bound_of} <= {self.bound:g}{scale}"


def _require_dimensions(kind: str, size: tuple[int, int]) -> None:
    """Raise if components of this size are isolated points."""
    if kind not in _kinds():
        raise ValueError(
            f"renormalize: groups of kind {kind!r} have no bounded norm; use one of {_kinds()}, e.g. 'spectral_ball' "
            "for groups that are to be free up to a bound"
        )
    fits, reason = kinds.kind(kind).build(1.0)._check_shape(size, "component")  # pyright: ignore
    if not fits:
        raise ValueError(f"renormalize: {kind} cannot hold components of size {size}: {reason}")
    kinds.kind(kind).check_methods(*size)


# -- layers ------------------------------------------------------------------------------------------------------


def renormalize(
    module: nn.Module,
    name: str = "weight",
    manifold: str | Sequence[str] | None = None,
    norms: Sequence[Norm] = NORMS,
    bound: float = 1.0,
    groups: str | Collection | Sequence[Collection] = "layer",
    statistics: LambdaRule | None = None,
    *,
    selection: str = "deterministic",
    seed: int = 0,
    components: Components = "auto",
    bound_of: BoundOf = "group",
) -> nn.Module:
    r"""Make a layer's weight obey norm bounds at every step, under any optimiser.

    The parameter becomes a raw weight (``module.parametrizations[name].original``). The layer computes
    ``module.weight`` from the raw weight. Each of the norms of every group (or of the whole weight, see ``bound_of``)
    is then at most ``bound``, up to rounding: a few units in the last place of the weight's type. The function keeps
    the value of a weight that is on its manifolds, and projects other weights.

    ``state_dict``, ``deepcopy``, ``torch.compile`` and ``DistributedDataParallel`` work as with every parametrization
    of torch. Save models through their ``state_dict``, because torch cannot pickle them whole. Load weights of a plain
    layer before you renormalise it.

    Args:
        module: A convolution, transposed convolution, linear layer or attention layer.
        name: Name of its weight.
        manifold: ``"sphere"`` (the default), ``"oblique"``, ``"stiefel"``, ``"spectral_ball"``, or several of
            them for groups by ``"pi"``, ``"po"`` or ``"pio"``. Leave it out if ``groups`` is a collection, which has
            its own.
        norms: The norms to bound: some of ``"frobenius"``, ``"spectral"`` and ``"two_to_one"`` (or ``"2->1"``).
        bound: The bound ``β``.
        groups: A strategy of :func:`fgo_geo.weights.grouping.collection`, or a collection (one per section of a
            packed weight).
        statistics: ``λ`` from the running standard deviations of the layer's inputs: ``"max1"`` divides by
            ``max(1, std)`` and keeps the bound, ``"std"`` divides by ``std`` and guarantees ``bound / λ`` only, see
            :meth:`Renormalization.guarantee`. The layer then tracks its inputs; call :func:`update_scales` once per
            epoch. None for ``λ = 1``.
        selection: ``"deterministic"`` or ``"random"``, for a strategy.
        seed: Seed of a random selection.
        components: ``"kernel"``, ``"block"``, ``"filter"`` (all weights of one output channel), or ``"auto"``: kernels
            for spatial convolutions, blocks of the matrix for all others.
        bound_of: ``"group"`` bounds the norms of every group, ``"layer"`` those of the whole weight, as a matrix
            ``(D, C K)``.

    Returns:
        The module.

    Raises:
        TypeError: If ``module`` is not a module; with statistics, if it is not a convolution or linear layer.
        ValueError: If the parameter has no layout or no values, is constrained or parametrised already, or holds NaN or
            infinity, or an argument has an unknown value. In each case nothing has changed.

    Example:
        >>> layer = renormalize(nn.Linear(4, 2), manifold="stiefel")
        >>> with torch.no_grad():
        ...     layer.parametrizations.weight.original.mul_(-100.0)
        Parameter containing: ...
        >>> bool(torch.linalg.matrix_norm(layer.weight) <= 1), bool(layer.weight.norm(dim=0).sum() <= 1.000001)
        (True, True)
    """
    param, layout = _plain_weight(module, name)
    norms, bound_of, statistics = _checked_norms(norms), check_bound_of(bound_of), small(statistics)
    check_bound(bound)
    if statistics not in (None, *get_args(LambdaRule)):
        raise ValueError(f"renormalize: statistics must be None or one of {get_args(LambdaRule)}, got {statistics!r}")
    collections = _collections(layout, name, groups, manifold, selection, seed, components)
    renormalization = Renormalization(collections, layout, norms, bound, statistics, param, bound_of)
    require_finite(param.detach(), f"{type(module).__name__}.{name}")
    renormalization.owns_statistics = statistics is not None and not is_tracked(module)
    if renormalization.owns_statistics:
        require_trackable(module)
    parametrize.register_parametrization(module, name, renormalization)
    if renormalization.owns_statistics:
        track(module)
    return module


def _plain_weight(module: nn.Module, name: str) -> tuple[nn.Parameter, WeightLayout]:
    """A module's parameter and its layout, if it can be renormalised."""
    if not (isinstance(module, nn.Module) and isinstance(name, str)):
        raise TypeError(
            f"renormalize takes a torch.nn.Module and the name of a parameter, got {type(module).__name__} and {name!r}"
        )
    what = f"{type(module).__name__}.{name}"
    if parametrize.is_parametrized(module, name):
        raise ValueError(f"renormalize: {what} is re-parametrised already: remove the parametrization first")
    param = getattr(module, name, None)
    if not isinstance(param, nn.Parameter):
        raise ValueError(f"renormalize: {what} is not a parameter; {weights_inside(module)}")
    if isinstance(param, geoopt.ManifoldParameter):
        raise ValueError(f"renormalize: {what} is constrained to a manifold already: unconstrain the model first")
    layout = layout_of(module, name)
    if isinstance(layout, str):
        raise ValueError(f"renormalize: {what} {layout}")
    if param.is_meta:
        raise ValueError(f"renormalize: {what} is on the meta device: load its values first")
    return param, layout


def _checked_norms(norms: Sequence[Norm]) -> tuple[Norm, ...]:
    names = map(small, (norms,) if isinstance(norms, str) or not isinstance(norms, Sequence) else norms)
    try:
        return norm_names(list(names) or [""])
    except ValueError as error:
        raise ValueError(f"renormalize: norms must be some of {NORMS}, got {norms!r}") from error


def _collections(
    layout: WeightLayout,
    name: str,
    groups: Any,
    manifold: Any,
    selection: str,
    seed: int,
    components: Components,
) -> tuple[Collection, ...]:
    """The groups for the arguments of :func:`renormalize`."""
    if not isinstance(groups, str):
        if manifold is not None:
            raise ValueError(
                f"renormalize: a collection has its own manifolds, got manifold={manifold!r} too; leave it out"
            )
        made = tuple(cast("Sequence[Any]", groups)) if isinstance(groups, Sequence) else (groups,)
        if not all(isinstance(each, Collection) for each in made):
            raise ValueError(
                f"renormalize: groups is {groups!r}; expected a strategy such as 'pio', a Collection, or a sequence of "
                "them, one per section of a packed weight"
            )
        return made
    components = small(components)
    if components not in get_args(Components):
        raise ValueError(f"renormalize: components must be one of {get_args(Components)}, got {components!r}")
    manifold = "sphere" if manifold is None else manifold
    words = (manifold,) if isinstance(manifold, str) else manifold
    if not isinstance(words, Sequence) or not all(isinstance(word, str) for word in cast("Sequence[Any]", words)):
        raise ValueError(f"renormalize: manifold is {manifold!r}; expected one of {_kinds()}, or several of them")
    words = tuple(cast("Sequence[str]", words))
    unknown = [word for word in words if kinds.find(word) is None]  # kinds without norms are refused later
    if unknown:
        raise ValueError(f"renormalize: manifold holds {unknown[0]!r}; expected one of {_kinds()}, or several of them")
    return collections_of(layout, groups, words, selection, seed, components, name)


def renormalization_of(module: nn.Module, name: str = "weight") -> Renormalization:
    """The parametrization of a renormalised weight.

    Args:
        module: A layer.
        name: Name of its weight.

    Returns:
        The module that computes the weight, with its groups, bounds and scales.

    Raises:
        ValueError: If the weight is not renormalised.
    """
    found = dict(_renormalizations(module)).get(name)
    if found is None:
        raise ValueError(
            f"{type(module).__name__}.{name} is not renormalised; call renormalize(module, {name!r}) first"
        )
    return found


def _renormalizations(module: nn.Module) -> Iterator[tuple[str, Renormalization]]:
    """The names of a module's renormalised weights, each with its parametrization."""
    if parametrize.is_parametrized(module):
        for name, chain in cast("nn.ModuleDict", module.parametrizations).items():
            yield from ((name, step) for step in chain.children() if isinstance(step, Renormalization))


@torch.no_grad()
def update_scales(model: nn.Module, group: dist.ProcessGroup | None = None) -> int:
    """Refresh ``λ`` of all renormalised layers from the statistics of their inputs: once per epoch.

    Weights change by the change of ``λ``; raw weights and the optimiser's state stay as they are.

    Args:
        model: A model, wrapped or not.
        group: The processes that see different data, all of which must call this; None for all processes.

    Returns:
        The number of weights with new scales: all that were renormalised with statistics.

    Raises:
        ValueError: If features were not finite. Nothing has changed then.
    """
    changes: list[tuple[Tensor, Tensor]] = []
    for layer_name, module in model.named_modules():
        for _, renormalization in _renormalizations(module):
            rule = renormalization.statistics
            if renormalization.lam is not None and rule is not None:
                channels = rescaling_lambda(TrackingHandle(module).statistics, rule, group)
                require_finite(channels, f"the standard deviation of the input of {layer_name!r}")
                new = torch.cat(component_lambda(channels, renormalization.partition))
                changes.append((renormalization.lam, new))
    for old, new in changes:
        old.copy_(new)
    return len(changes)


def remove_renormalization(module: nn.Module, name: str = "weight") -> nn.Module:
    """Make a renormalised weight a plain parameter again, with the value that the layer computes with now.

    Args:
        module: A renormalised layer.
        name: Name of its weight.

    Returns:
        The module.

    Raises:
        ValueError: If the weight is not renormalised, or has further parametrizations.
    """
    renormalization = renormalization_of(module, name)
    chain = cast("nn.ModuleDict", module.parametrizations)[name]
    if len(list(chain.children())) > 1:
        raise ValueError(
            f"{type(module).__name__}.{name} has other parametrizations, too; remove all of them with "
            "torch.nn.utils.parametrize.remove_parametrizations"
        )
    _give_own_class(module)
    parametrize.remove_parametrizations(module, name, leave_parametrized=True)
    if renormalization.owns_statistics:
        untrack(module)
    return module


def _give_own_class(module: nn.Module) -> None:
    """Give a module its own class. Copies share a class, and torch changes it when it removes a parametrization."""
    shared = type(module)
    members = {name: value for name, value in vars(shared).items() if name not in ("__dict__", "__weakref__")}
    own: Any = type(shared.__name__, shared.__bases__, members)
    module.__class__ = own
