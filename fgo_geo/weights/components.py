r"""From weights to components and back, without arithmetic.

Three views of a weight follow each other:

1. *channels*: a :class:`~fgo_geo.weights.layout.WeightLayout` brings the weight of any layer into the form
   ``(D, C, *kernel)``, output channels first;
2. *components*: a :class:`~fgo_geo.weights.parts.Partition` cuts the channels into matrices ``A x B`` with ``A >= B``,
   batched over all components of one manifold kind: single kernels
   (:class:`~fgo_geo.weights.kernels.KernelPartition`); rectangular blocks of the matrix ``(D, C K)`` with ``K`` the
   number of entries of a kernel (:class:`~fgo_geo.weights.blocks.BlockPartition`); or filters, the rows of that matrix
   (:class:`~fgo_geo.weights.filters.FilterPartition`);
3. *groups*: :class:`~fgo_geo.weights.parts.Segments` says which components share a step size, and reduces over them.

:func:`partition` chooses the cut that realises collections on a weight.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from fgo_geo.weights.blocks import BlockPartition
from fgo_geo.weights.filters import FilterPartition
from fgo_geo.weights.grouping import Collection
from fgo_geo.weights.kernels import KernelPartition
from fgo_geo.weights.layout import CONVOLUTIONS, Storage, WeightLayout, layout_of
from fgo_geo.weights.parts import Partition, RectanglePartition, Segments

__all__ = [
    "CONVOLUTIONS",
    "BlockPartition",
    "FilterPartition",
    "KernelPartition",
    "Partition",
    "RectanglePartition",
    "Segments",
    "Storage",
    "WeightLayout",
    "layout_of",
    "partition",
]


def partition(collections: Sequence[Collection], layout: WeightLayout) -> Partition:
    """The partition that realises collections on a weight.

    Args:
        collections: One per section of the layout; several are all of blocks, or all of filters.
        layout: How the weight is stored.

    Returns:
        A partition into kernels, blocks or filters.

    Raises:
        ValueError: If the collections do not fit the layout.

    Example:
        >>> import torch
        >>> from fgo_geo.weights.grouping import collection
        >>> cut = partition([collection(2, 3, "layer", "sphere")], WeightLayout((2, 3, 1, 5)))
        >>> [tuple(part.shape) for part in cut.split(torch.zeros(2, 3, 1, 5))]
        [(6, 5, 1)]
    """
    if len(collections) != layout.sections:
        raise ValueError(
            f"a weight of shape {layout.shape} with {layout.sections} section(s) needs one collection per section, got "
            f"{len(collections)}"
        )
    rows = layout.out_channels // layout.sections
    for c in collections:
        if (c.out_channels, c.in_channels) != (rows, layout.in_channels):
            raise ValueError(
                f"a collection over {c.in_channels} -> {c.out_channels} channels does not fit a weight of shape "
                f"{layout.shape}, which has {layout.in_channels} -> {rows}; build it with "
                f"collection({rows}, {layout.in_channels}, ...)"
            )
    if all(c.components == "block" for c in collections):
        return BlockPartition(collections, layout)
    if all(c.components == "filter" for c in collections):
        return FilterPartition(collections, layout)
    if math.prod(layout.kernel) == 1 or len(collections) > 1:
        raise ValueError(
            f"the kernels of a weight of shape {layout.shape} are single numbers, which could not move on a manifold; "
            'build every collection with components="block" (or "filter")'
        )
    return KernelPartition(collections[0], layout)
