"""Weights that are sharded in whole components: every process steps its own, and only ``R²`` of groups is exchanged.

FSDP2 cuts the weight of a convolution along its output channels, between kernels and not through them. The part on a
process is then itself a weight on a product of manifolds, with fewer channels: projection, retraction and momentum need
no data from other processes. A group has kernels on several processes if it extends along the output channels (PI, the
half of PIO that is grouped by input channel, and one group for the layer); its ``R²`` is a sum over these processes.
Under PO no group does, and the processes exchange nothing. The same holds for filters, and for single manifolds that
are declared by hand on trailing dimensions. FSDP2 cuts through blocks of matrices, so these have an owner.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import geoopt
import numpy as np
import torch
from torch import Tensor

from fgo_geo.linalg import Cut
from fgo_geo.manifolds import ComponentManifold, ProductOfGroups
from fgo_geo.paths.protocol import Share
from fgo_geo.weights.components import FilterPartition, KernelPartition
from fgo_geo.weights.grouping import Collection

__all__ = ["LocalPart", "local_part_of"]


@dataclass(frozen=True, eq=False)
class LocalPart:
    """The part of a weight that one process steps.

    Attributes:
        manifold: That of its components; None if it has none.
        share: Which groups these are in.
        spread: Numbers of the whole weight's groups that have components on several processes, the same on all.
    """

    manifold: geoopt.Manifold | None
    share: Share
    spread: Tensor


def local_part_of(manifold: geoopt.Manifold, cut: Cut, device: torch.device) -> LocalPart | None:
    """The part of a weight that this process steps; None if a component has entries on several processes.

    Example:
        >>> from fgo_geo import ScaledSphere
        >>> local_part_of(ScaledSphere(ndim=1), Cut((4, 3), 1, 2, 0), torch.device("cpu")) is None
        True
        >>> local_part_of(ScaledSphere(ndim=1), Cut((4, 3), 0, 2, 0), torch.device("cpu")).manifold
        ScaledSphere(radius=1, ndim=1) manifold
    """
    if cut.dim is None:
        return None
    if isinstance(manifold, ProductOfGroups):
        axis = _axis_of(manifold, cut.dim)
        if axis is None:
            return None
        group_of = manifold.collections[0].group_of
    elif isinstance(manifold, ComponentManifold) and cut.dim < len(cut.shape) - manifold.ndim:
        axis, group_of = 0, np.zeros((cut.shape[cut.dim], 1), np.int64)
    else:
        return None
    length = cut.shape[cut.dim]
    holders = np.arange(length) // -(-length // cut.count)
    pairs = group_of.astype(np.int64) * cut.count + (holders[:, None] if axis == 0 else holders)
    groups, holders = np.divmod(np.unique(pairs), cut.count)
    numbers, first, counts = np.unique(groups, return_index=True, return_counts=True)
    here = holders == cut.rank
    is_product = isinstance(manifold, ProductOfGroups)
    own = _product_here(manifold, cut, axis, groups[here]) if is_product else _manifold_here(manifold, cut)
    is_spread = counts[groups[here]] > 1  # every number occurs

    def tensor(values: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(device)

    is_counted = holders[first[groups[here]]] == cut.rank
    share = Share(manifold, cut.shape, tensor(groups[here]), tensor(np.flatnonzero(is_spread)), tensor(is_counted))
    return LocalPart(own, share, tensor(numbers[counts > 1]))


def _axis_of(manifold: ProductOfGroups, dim: int) -> int | None:
    """The axis of the grid of channels that a cut divides; None if it divides components."""
    layout, partition = manifold.layout, manifold.partition
    is_grouped = layout.storage == "transposed" and layout.conv_groups > 1
    if dim > 1 or is_grouped or len(manifold.collections) > 1:
        return None
    axis = dim if layout.storage == "conv" else 1 - dim
    if isinstance(partition, KernelPartition):
        return axis
    is_filter = isinstance(partition, FilterPartition) and all(rows.shape[1] == 1 for rows in partition.rows)
    return axis if is_filter and axis == 0 else None


def _product_here(manifold: ProductOfGroups, cut: Cut, axis: int, groups: np.ndarray) -> ProductOfGroups | None:
    """The product of the manifolds of this process's components."""
    assert cut.dim is not None
    first, length = cut.range_of(cut.rank)
    if length == 0:
        return None
    radii = manifold.radius_map(torch.empty(cut.shape, dtype=torch.float64, device="cpu"))
    radii = cut.piece(radii, cut.rank)
    own = ProductOfGroups(
        _excerpt(manifold.collections[0], axis, first, length),
        replace(manifold.layout, shape=cut.shape_of(cut.rank)),
        lambda partition: [part[:, 0, 0] for part in partition.split(radii)],
    )
    part_of = np.empty(manifold.n_groups, np.int64)
    for part, numbers in enumerate(manifold.partition.groups):
        part_of[numbers] = part
    own.smallest_radii = [manifold.smallest_radii[part_of[groups[numbers[0]]]] for numbers in own.partition.groups]
    return own


def _excerpt(collection: Collection, axis: int, first: int, length: int) -> Collection:
    """A collection's channels from ``first`` on, of one axis of the grid; its groups keep their order."""

    def take(array: np.ndarray) -> np.ndarray:
        return array if array.shape[axis] == 1 else array.take(range(first, first + length), axis)

    return replace(
        collection,
        out_channels=length if axis == 0 else collection.out_channels,
        in_channels=length if axis == 1 else collection.in_channels,
        by_output=take(collection.by_output),
        output_kinds=take(collection.output_kinds),
        input_kinds=take(collection.input_kinds),
    )


def _manifold_here(manifold: ComponentManifold, cut: Cut) -> ComponentManifold | None:
    """A single manifold with the radii of this process's components."""
    assert cut.dim is not None
    first, length = cut.range_of(cut.rank)
    if length == 0:
        return None
    radius = manifold.radius
    dim = cut.dim - (len(cut.shape) - manifold.ndim - radius.ndim) if isinstance(radius, Tensor) else -1
    if not isinstance(radius, Tensor) or dim < 0 or radius.shape[dim] == 1:
        return manifold
    own = copy.deepcopy(manifold)
    own.radius = radius.narrow(dim, first, length)
    return own
