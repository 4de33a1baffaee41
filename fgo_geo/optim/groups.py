"""Constants of the groups of a manifold that step sizes need: curvature bounds and norms, one number per group.

These constants depend only on radii and shapes. :mod:`fgo_geo.optim.step_size` turns them, with the norms of gradients,
into step sizes. A manifold that is not a product has one group.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import geoopt
import torch
from torch import Tensor

from fgo_geo.manifolds import ComponentManifold, ProductOfGroups
from fgo_geo.weights.components import Segments
from fgo_geo.weights.kinds import kind_of

__all__ = ["group_curvatures", "group_norms"]


def group_curvatures(manifold: geoopt.Manifold, shape: tuple[int, ...], radius_invariant: bool = False) -> Tensor:
    """Upper bound ``c`` on the sectional curvature of every group ("Mathematics", section 2).

    Args:
        manifold: A manifold.
        shape: Shape of the weight.
        radius_invariant: Whether gradients are measured on manifolds of radius one.

    Returns:
        Largest ``1/r²`` among the components; zero on Euclidean ones, one on manifolds of other packages. Shape
        ``(G,)``, float64.

    Example:
        >>> from fgo_geo import Oblique
        >>> group_curvatures(Oblique(torch.tensor([0.5, 2.0])), (2, 3, 3))
        tensor([4.], dtype=torch.float64)
    """

    def bounds(own: geoopt.Manifold, batch: tuple[int, ...], component: tuple[int, ...]) -> Tensor:
        if isinstance(own, geoopt.Euclidean):
            return torch.zeros(batch, dtype=torch.float64)
        if radius_invariant or not isinstance(own, ComponentManifold):
            return torch.ones(batch, dtype=torch.float64)
        return _radii(own, batch) ** -2

    return _per_group(manifold, shape, bounds, lambda groups, values: groups.max(values))


def group_norms(manifold: geoopt.Manifold, shape: tuple[int, ...]) -> Tensor:
    """Frobenius norm of the points of every group, which their manifold fixes.

    Args:
        manifold: A manifold.
        shape: Shape of the weight.

    Returns:
        Shape ``(G,)``, float64; not a number where the manifold does not fix the norm (Euclidean components).

    Example:
        >>> from fgo_geo import Stiefel
        >>> group_norms(Stiefel(0.5), (5, 3, 2)).square()  # five matrices of two columns of norm 1/2
        tensor([2.5000], dtype=torch.float64)
    """

    def norms(own: geoopt.Manifold, batch: tuple[int, ...], component: tuple[int, ...]) -> Tensor:
        kind = kind_of(own)
        if not isinstance(own, ComponentManifold) or kind is None or kind.norms is None:
            return torch.full(batch, math.nan, dtype=torch.float64)
        rows, columns = component if len(component) == 2 else (math.prod(component), 1)
        return _radii(own, batch) * kind.norms(rows, columns)[0]

    return _per_group(manifold, shape, norms, lambda groups, values: groups.sum(values.square()).sqrt())


def _per_group(
    manifold: geoopt.Manifold,
    shape: tuple[int, ...],
    of_components: Callable[[geoopt.Manifold, tuple[int, ...], tuple[int, ...]], Tensor],
    over_groups: Callable[[Segments, Tensor], Tensor],
) -> Tensor:
    """Numbers of components, combined over the groups, in the order of the collection."""
    if not isinstance(manifold, ProductOfGroups):
        batch, component = shape[: len(shape) - manifold.ndim], shape[len(shape) - manifold.ndim :]
        return over_groups(Segments(1, math.prod(batch)), of_components(manifold, batch, component).flatten())
    values = torch.empty(manifold.n_groups, dtype=torch.float64)
    for number, (own, groups) in enumerate(manifold.parts):
        cpu = Segments(groups.count, groups.total, None if groups.labels is None else groups.labels.cpu())
        own_values = of_components(own, (groups.total,), manifold.partition.sizes[number])
        values[torch.from_numpy(manifold.partition.groups[number])] = over_groups(cpu, own_values)
    return values


def _radii(manifold: ComponentManifold, batch: tuple[int, ...]) -> Tensor:
    return torch.as_tensor(manifold.radius, dtype=torch.float64, device="cpu").detach().expand(batch)
