"""The owner of every weight: the process that steps it. All owners have about the same amount of work.

A step of sphere, oblique and Euclidean components sweeps over memory; orthonormal components of ``p`` columns take
another ``12 p`` operations per number. A Stiefel matrix of 1,024 columns costs as much as a spherical weight of thirty
times its size.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import geoopt

from fgo_geo.manifolds import ProductOfGroups
from fgo_geo.weights.kinds import kind_of

__all__ = ["owners_of", "step_cost"]

_COLUMNS_PER_SWEEP = 32  # of a matrix whose products take as long as the sweeps over its numbers


def step_cost(manifold: geoopt.Manifold, shape: Sequence[int]) -> float:
    """The cost of a step of a weight on a manifold, by its shape, in numbers that are read and written.

    Example:
        >>> from fgo_geo import ScaledSphere, Stiefel
        >>> step_cost(ScaledSphere(), (1024, 1024)), step_cost(Stiefel(), (1024, 1024)) / 2**20
        (1048576.0, 33.0)
    """
    if isinstance(manifold, ProductOfGroups):
        cut = manifold.partition
        sizes = zip(manifold.manifolds, cut.counts, cut.sizes, strict=True)
        return sum(count * _of_component(own, size) for own, count, size in sizes)  # pyright: ignore
    ndim = max(manifold.ndim, 1)
    return math.prod(shape[:-ndim]) * _of_component(manifold, tuple(shape[-ndim:]))


def _of_component(manifold: geoopt.Manifold, size: Sequence[int]) -> float:
    own = kind_of(manifold)
    is_decomposed = (own is None or own.is_decomposed) and len(size) >= 2
    columns = min(size[-2:]) if is_decomposed else 0
    return math.prod(size) * (1 + columns / _COLUMNS_PER_SWEEP)


def owners_of(costs: Iterable[float], count: int, loads: Sequence[float] | None = None) -> list[int]:
    """Assign weights to processes: the most expensive first, each to the one with the least work so far.

    Args:
        costs: The cost of every weight.
        count: Number of processes.
        loads: The other work of every process; none if left out.

    Returns:
        The number of the owner of every weight. Without ``loads``, the work of no process is more than a third above
        the least possible.

    Example:
        >>> owners_of([1.0, 5.0, 3.0, 3.0], 2)
        [0, 0, 1, 1]
    """
    costs = list(costs)
    loads, numbers = [0.0] * count if loads is None else list(loads), [0] * count
    owners = [0] * len(costs)
    for number in sorted(range(len(costs)), key=lambda n: -costs[n]):
        owner = min(range(count), key=lambda rank: (loads[rank], numbers[rank]))
        owners[number] = owner
        loads[owner] += costs[number]
        numbers[owner] += 1
    return owners
