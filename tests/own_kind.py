"""A kind of a user's own: matrices whose rows all have norm ``r``."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

from fgo_geo import register_kind
from fgo_geo.manifolds.sphere import SphericalManifold
from fgo_geo.weights.kinds import Kind, unregister_kind


class Rows(SphericalManifold):
    """The (scaled) power of the sphere along the rows, over the last two dimensions."""

    name = "Rows"
    ndim = 2
    _dims = (-1,)


def _norms(rows: int, columns: int) -> tuple[float, float]:
    return math.sqrt(rows), math.sqrt(rows)


@contextmanager
def registered_rows() -> Iterator[Kind]:
    """The kind ``"rows"``, registered the way that a user registers one."""
    record = register_kind("rows", Rows, norms=_norms, joins_filters=True)
    try:
        yield record
    finally:
        unregister_kind("rows")
