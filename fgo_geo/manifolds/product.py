r"""Products of groups: one weight tensor as a point on a product of many small manifolds.

The manifold of a layer is a product over groups, and the manifold of a group is a product over components
("Mathematics", section 3; [Ozay2019]_). :class:`ProductOfGroups` keeps the weight in the layout of its layer. Every
operation splits the weight into one batch of components per manifold kind, calls that kind's manifold for each batch,
and merges the results; this module itself computes only sums over groups. The number of calls does not depend on the
number of groups.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import geoopt
import numpy as np
import torch
from torch import Tensor, nn

from fgo_geo.linalg import computes_in_float32, root_of_sum
from fgo_geo.manifolds.embedded import ComponentManifold, EmbeddedManifold, require_constant_radius
from fgo_geo.manifolds.sphere import SphericalManifold
from fgo_geo.weights.components import Partition, Segments, partition
from fgo_geo.weights.grouping import Collection
from fgo_geo.weights.kinds import kind, names
from fgo_geo.weights.layout import WeightLayout

__all__ = ["ProductOfGroups", "RadiusLike", "known_name", "violation_of"]

Radii = float | Mapping[str, float] | Tensor | Sequence[Tensor]
RadiusLike = Radii | Callable[[Partition], Radii]


def known_name(param: Tensor) -> str | None:
    """The name of a parameter in the model that ``constrain`` read it from; None if it was not there."""
    manifold = getattr(param, "manifold", None)
    if not isinstance(manifold, ProductOfGroups):
        return None
    return re.sub(r"\[\d+\]$", "", manifold.collections[0].name) or None  # sections of a packed weight are numbered


class ProductOfGroups(EmbeddedManifold):
    r"""The product of the manifolds of all groups of a collection, on one weight tensor.

    The metric is the sum of the components' metrics: the Euclidean metric of the weight, unless a kind has another one
    (Geoopt's ``CanonicalStiefel``).

    Args:
        collection: The groups and their manifold kinds, from :func:`~fgo_geo.weights.grouping.collection`; one
            per section for packed weights.
        layout: The weight's layout, or its shape if that is ``(D, C, *kernel)``.
        radius: One number; a number per kind; a tensor ``(G,)`` with one per group; for kernel components, a tensor
            ``(D, C)`` with one per kernel; for every part of the partition a tensor ``(n,)`` with one per component; or
            a function of the partition that returns one of these.
        exact: Let :meth:`retr` and :meth:`retr_transp` follow geodesics. Steps are then reversible, as Geoopt's
            samplers require. For an existing parameter, set ``param.manifold.exact = True``.

    Attributes:
        partition: How the weight is cut into components.
        n_groups: Number of groups.
        smallest_radii: The smallest radius of every part so far, which bounds the length of earlier momentum.

    Raises:
        ValueError: If the collection does not fit the weight, a radius is not positive or requires a gradient, or a
            component could not move on its manifold.

    Example:
        >>> from fgo_geo.weights.grouping import collection
        >>> pio = collection(6, 4, "pio", ("sphere", "stiefel"))
        >>> manifold = ProductOfGroups(pio, (6, 4, 3, 3))
        >>> weight = manifold.random(6, 4, 3, 3)
        >>> manifold.group_norm(weight, weight).square().round()  # 1 per sphere kernel, 3 per Stiefel kernel
        tensor([2., 2., 2., 6., 6., 6., 3., 9., 3., 9.])
    """

    name = "ProductOfGroups"

    def __init__(
        self,
        collection: Collection | Sequence[Collection],
        layout: WeightLayout | Sequence[int],
        radius: RadiusLike = 1.0,
        *,
        exact: bool = False,
    ) -> None:
        super().__init__()
        collections = (collection,) if isinstance(collection, Collection) else tuple(collection)
        if not isinstance(layout, WeightLayout):
            layout = WeightLayout(tuple(layout))
        self.collections = collections
        self.layout = layout
        self.ndim = len(layout.shape)
        self.partition = partition(collections, layout)
        self.n_groups = sum(len(c.group_sizes) for c in collections)
        self.exact = exact
        self.smallest_radii = [math.inf] * len(self.partition.kinds)
        self.set_radius(radius)

    def __setattr__(self, name: str, value: Any) -> None:
        """Reject a radius: it would have no effect, because every component has its own."""
        if name == "radius":
            raise AttributeError(
                f"ProductOfGroups: every component has its own radius, so `radius` cannot be assigned, got {value!r}; "
                "call set_radius, and scale points and momentum by radius_map"
            )
        super().__setattr__(name, value)

    @property
    def reversible(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether a step with the negative of the transported ``v`` leads back to its start."""
        return self.exact

    def set_radius(self, radius: RadiusLike) -> None:
        """Change the radius of every component. The caller must rescale points and momentum, with :meth:`radius_map`.

        Args:
            radius: As in the constructor.

        Raises:
            ValueError: If a radius is not positive, its shape does not fit, or it requires a gradient. The radii have
                not changed then.
        """
        cut = self.partition
        manifolds: list[geoopt.Manifold] = []
        for name, part_radius, n, size in zip(
            cut.kinds, self._radius_per_part(radius), cut.counts, cut.sizes, strict=True
        ):
            manifold = kind(name).build(part_radius)
            ok, reason = manifold._check_shape((n, *size), "component")  # pyright: ignore[reportPrivateUsage]
            if not ok:
                raise ValueError(f"ProductOfGroups: {name} cannot hold components of size {size}: {reason}")
            kind(name).check_methods(*size)
            manifolds.append(manifold)
        for manifold in manifolds:
            if isinstance(manifold, ComponentManifold):
                manifold.is_part = True
        self.manifolds = nn.ModuleList(manifolds)
        smallest = [m.radius_range[0] if isinstance(m, ComponentManifold) else 1.0 for m in manifolds]
        self.smallest_radii = [min(old, new) for old, new in zip(self.smallest_radii, smallest, strict=True)]

    def _radius_per_part(self, radius: RadiusLike) -> list[float | Tensor]:
        kinds = self.partition.kinds
        with_radius = {name for name in kinds if kind(name).has_radius}
        if callable(radius):
            radius = radius(self.partition)
        each = radius.values() if isinstance(radius, Mapping) else radius if isinstance(radius, Sequence) else (radius,)
        for one in each:
            require_constant_radius(one, "ProductOfGroups")
        if isinstance(radius, Mapping):
            missing = with_radius - set(radius)
            unknown = set(radius) - set(names())
            if missing or unknown:
                raise ValueError(
                    f"ProductOfGroups: radius needs an entry for each of {sorted(with_radius)} and may "
                    f"have others of {names()}, got {dict(radius)}"
                )
            return [radius.get(name, 1.0) for name in kinds]
        if isinstance(radius, Sequence) and len(radius) == len(kinds):
            return [_number_if_constant(r) for r in radius]
        if not isinstance(radius, Tensor) or radius.ndim == 0:
            return [cast(float, radius)] * len(kinds)
        layout = self.layout
        if tuple(radius.shape) not in ((self.n_groups,), (layout.out_channels, layout.in_channels)):
            raise ValueError(
                f"ProductOfGroups: a tensor radius needs shape ({self.n_groups},), one per group, or "
                f"({layout.out_channels}, {layout.in_channels}), one per kernel; got {tuple(radius.shape)}"
            )
        values = self.partition.per_component(radius.cpu().double().numpy())
        return [_number_if_constant(torch.from_numpy(np.ascontiguousarray(v))) for v in values]

    @property
    def _is_euclidean(self) -> bool:
        """Whether all metrics are the Euclidean one."""
        return all(isinstance(manifold, (EmbeddedManifold, geoopt.Euclidean)) for manifold in self.manifolds)

    # -- parts -----------------------------------------------------------------------------------------------

    @property
    def parts(self) -> list[tuple[geoopt.Manifold, Segments]]:
        """The manifold of every part of the partition, and its groups."""
        return list(zip(cast(list[geoopt.Manifold], list(self.manifolds)), self.partition.segments, strict=True))

    def _map(self, operation: str | Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        """Apply a manifold's method, or ``operation(manifold, *components)``, to every part and merge the results."""
        split = [self.partition.split(t) for t in tensors]
        call = operation if callable(operation) else _method(operation)
        parts = [call(manifold, *parts) for (manifold, _), *parts in zip(self.parts, *split, strict=True)]
        return self.partition.merge(parts, like=tensors[0])

    def radius_map(self, x: Tensor) -> Tensor:
        """The radius of every entry's component, in the shape of the weight; one where there is no constraint.

        Args:
            x: A weight, for its type and device.

        Returns:
            A tensor like ``x``.
        """

        def radii(manifold: geoopt.Manifold, part: Tensor) -> Tensor:
            radius = manifold.radius_for(part) if isinstance(manifold, ComponentManifold) else 1.0
            return torch.ones_like(part) * radius

        return self._map(radii, x)

    def where_constrained(self, x: Tensor, otherwise: Tensor) -> Tensor:
        """``x`` where an entry has a constraint, and ``otherwise`` where it has none.

        Args:
            x: A weight.
            otherwise: Another.

        Returns:
            A weight.
        """

        def choose(manifold: geoopt.Manifold, a: Tensor, b: Tensor) -> Tensor:
            return b if isinstance(manifold, geoopt.Euclidean) else a

        return self._map(choose, x, otherwise)

    # -- groups ----------------------------------------------------------------------------------------------

    @computes_in_float32
    def group_inner(self, x: Tensor, u: Tensor, v: Tensor | None = None) -> Tensor:
        """Inner product of tangent vectors, per group.

        Args:
            x: Point; only its shape matters.
            u: Tangent vector at ``x``.
            v: Tangent vector at ``x``; ``u`` if left out.

        Returns:
            One number per group, shape ``(G,)``, in the order of the collection.
        """
        if self._is_euclidean:
            products = self.partition.split(u * (u if v is None else v))
            sums = [segments.sum(p.flatten(1).sum(1)) for (_, segments), p in zip(self.parts, products, strict=True)]
        else:
            tensors = zip(*map(self.partition.split, (x, u, u if v is None else v)), strict=True)
            parts = zip(self.parts, tensors, strict=True)
            sums = [segments.sum(manifold.inner(*own)) for (manifold, segments), own in parts]
        return self.in_collection_order(sums)

    def inner(self, x: Tensor, u: Tensor, v: Tensor | None = None, *, keepdim: bool = False) -> Tensor:
        """Inner product of tangent vectors: the sum of the groups'.

        Args:
            x: Point.
            u: Tangent vector at ``x``.
            v: Tangent vector at ``x``; ``u`` if left out.
            keepdim: Keep the dimensions with size one.

        Returns:
            One number.
        """
        if self._is_euclidean:
            return super().inner(x, u, v, keepdim=keepdim)
        return self._per_component(x, self.group_inner(x, u, v).sum().reshape((1,) * self.ndim), keepdim)

    def norm(self, x: Tensor, u: Tensor, *, keepdim: bool = False) -> Tensor:
        """Norm of a tangent vector."""
        if self._is_euclidean:
            return super().norm(x, u, keepdim=keepdim)
        return self.inner(x, u, keepdim=keepdim).sqrt()

    @computes_in_float32
    def group_norm(self, x: Tensor, u: Tensor) -> Tensor:
        """Norm of a tangent vector, per group, shape ``(G,)``."""
        return self.group_inner(x, u).sqrt()

    def in_collection_order(
        self, per_part: Sequence[Tensor] | Mapping[int, Tensor], others: Tensor | None = None
    ) -> Tensor:
        """Numbers per group of every part, as one tensor ``(G,)`` in the order of the collection.

        Args:
            per_part: The numbers of every part, or of some parts by the part's number.
            others: The numbers of all groups ``(G,)``, for parts without an entry in ``per_part``.

        Returns:
            A new tensor.
        """
        of_part = per_part if isinstance(per_part, Mapping) else dict(enumerate(per_part))
        values = torch.cat(list(of_part.values()))
        order = torch.from_numpy(np.concatenate([self.partition.groups[part] for part in of_part])).to(values.device)
        before = values.new_empty(self.n_groups) if others is None else others.to(values.dtype)
        return before.index_copy(0, order, values)

    # -- manifold --------------------------------------------------------------------------------------------

    def violation(self, x: Tensor) -> Tensor:
        """Relative constraint violation of every component that has a constraint, part by part."""
        parts = zip(self.parts, self.partition.split(x), strict=True)
        violations = [violation_of(m, p) for (m, _), p in parts if not isinstance(m, geoopt.Euclidean)]
        return torch.cat(violations) if violations else x.new_zeros(1)

    def projx(self, x: Tensor) -> Tensor:
        """Nearest point, component by component."""
        return self._map("projx", x)

    def proju(self, x: Tensor, u: Tensor) -> Tensor:
        """Tangent projection, component by component."""
        return self._map("proju", x, u)

    def egrad2rgrad(self, x: Tensor, u: Tensor) -> Tensor:
        """Riemannian gradient from the Euclidean one, component by component."""
        return self._map("egrad2rgrad", x, u)

    def retr(self, x: Tensor, u: Tensor) -> Tensor:
        """Retraction, component by component; if ``exact``, the exponential map of the tangent part of ``u``."""
        return self.expmap(x, self.proju(x, u)) if self.exact else self._map("retr", x, u)

    def expmap(self, x: Tensor, u: Tensor) -> Tensor:
        """Exponential map, component by component."""
        return self._map("expmap", x, u)

    def logmap(self, x: Tensor, y: Tensor) -> Tensor:
        """Inverse of the exponential map, component by component."""
        return self._map("logmap", x, y)

    def retr_transp(self, x: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Retraction along ``u``, and transport of ``v`` to its end: by projection, or along geodesics if ``exact``.

        If ``exact``, the method takes the tangent parts of ``u`` and ``v``, because the momentum of Geoopt's SGRHMC is
        not tangent.
        """
        if self.exact:
            u, v = self.proju(x, u), self.proju(x, v)
            return self.expmap(x, u), self._map(_carried, x, u, v)
        if self._is_euclidean:
            y = self.retr(x, u)
            return y, self.proju(y, v)
        tensors = zip(*map(self.partition.split, (x, u, v)), strict=True)
        moved = [manifold.retr_transp(*own) for (manifold, _), own in zip(self.parts, tensors, strict=True)]
        ends, carried = (self.partition.merge(parts, like=x) for parts in zip(*moved, strict=True))
        return ends, carried

    def transp_follow_expmap(self, x: Tensor, u: Tensor, v: Tensor) -> Tensor:
        """Transport along geodesics, component by component: parallel on spheres and oblique manifolds."""
        return self._map("transp_follow_expmap", x, u, v)

    def expmap_transp(self, x: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Exponential map, and transport of ``v`` along it."""
        return self.expmap(x, u), self.transp_follow_expmap(x, u, v)

    @computes_in_float32
    def dist(self, x: Tensor, y: Tensor, *, keepdim: bool = False) -> Tensor:
        """Geodesic distance: the root of the sum of the components' squared distances."""
        split = (self.partition.split(x), self.partition.split(y))
        distances = [manifold.dist(a, b) for (manifold, _), a, b in zip(self.parts, *split, strict=True)]
        distance = root_of_sum(torch.cat(distances), (-1,))
        return distance.reshape((1,) * (self.ndim * keepdim))

    def component_inner(self, x: Tensor, u: Tensor, v: Tensor | None = None) -> Tensor:
        """Inner product within every component, repeated over its entries; per entry where there is no constraint."""

        def repeated(manifold: geoopt.Manifold, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
            return manifold.component_inner(a, b, c).expand_as(a)

        return self._map(repeated, x, u, u if v is None else v)

    def uniform(self, gaussian: Tensor) -> Tensor:
        """Gaussian components to uniformly distributed ones; entries without a constraint stay Gaussian."""

        def draw(manifold: geoopt.Manifold, part: Tensor) -> Tensor:
            if isinstance(manifold, geoopt.Euclidean):
                return part
            return manifold.uniform(part) if isinstance(manifold, EmbeddedManifold) else manifold.projx(part)

        return self._map(draw, gaussian)

    def _origin(self, zero: Tensor) -> Tensor:
        def origin(manifold: geoopt.Manifold, part: Tensor) -> Tensor:
            return manifold.origin(*part.shape, dtype=part.dtype, device=part.device)

        return self._map(origin, zero)

    def _shape_problem(self, shape: tuple[int, ...]) -> str | None:
        if shape == self.layout.shape:
            return None
        return f"this {self.name} holds exactly one weight of shape {self.layout.shape}"

    def extra_repr(self) -> str:
        """The collections."""
        return "; ".join(str(c) for c in self.collections)


def violation_of(manifold: geoopt.Manifold, x: Tensor) -> Tensor:
    """Relative distance of components from their constraint; on manifolds of other packages, from the nearest point."""
    if isinstance(manifold, EmbeddedManifold):
        return manifold.violation(x)
    return (x - manifold.projx(x)).flatten(1).norm(dim=1) / x.flatten(1).norm(dim=1)


def _number_if_constant(radius: Tensor) -> float | Tensor:
    first = radius.reshape(-1)[:1]
    return float(first) if bool((radius == first).all()) else radius


def _method(name: str) -> Callable[..., Tensor]:
    def call(manifold: geoopt.Manifold, *components: Tensor) -> Tensor:
        return getattr(manifold, name)(*components)

    return call


@computes_in_float32
def _carried(manifold: geoopt.Manifold, x: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """Transport of ``v`` to the end of the geodesic along ``u`` that maps ``u`` to the geodesic's velocity there.

    Parallel transport has this property, and transport by projection does not. Therefore the part of ``v`` along ``u``
    becomes the same multiple of the velocity, and the rest is projected.
    """
    if isinstance(manifold, SphericalManifold) or not isinstance(manifold, ComponentManifold):
        return manifold.transp_follow_expmap(x, u, v)

    def geodesic(time: Tensor) -> Tensor:
        return manifold.expmap(x, time * u)

    end = torch.ones((), dtype=x.dtype, device=x.device)
    y, velocity = cast(tuple[Tensor, Tensor], torch.func.jvp(geodesic, (end,), (end,)))
    length = manifold.inner(x, u, keepdim=True)
    along = manifold.inner(x, u, v, keepdim=True) / torch.where(length > 0, length, 1)
    return along * velocity + manifold.proju(y, v - along * u)
