"""What execution paths have worked out of a manifold: kept with it, until its radii change.

This is the one cache of the paths, with one rule of staleness: an entry is thrown away when
:func:`~fgo_geo.paths.protocol.configuration_of` the manifold changes, and with the manifold. What follows from a
weight's strides, type or device has those in its key. Nothing here keeps a manifold, a weight or a model alive.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import geoopt

from fgo_geo.paths.protocol import Configuration, configuration_of

__all__ = ["kept"]

_Value = TypeVar("_Value")

_of_manifold: weakref.WeakKeyDictionary[geoopt.Manifold, tuple[Configuration, dict[Hashable, Any]]]
_of_manifold = weakref.WeakKeyDictionary()


def kept(manifold: geoopt.Manifold, key: Hashable, build: Callable[[], _Value]) -> _Value:
    """What ``build()`` returned for this manifold and key since the radii changed last.

    Args:
        manifold: The manifold.
        key: Everything else that the result depends on.
        build: Makes it.

    Returns:
        The result.

    Example:
        >>> from fgo_geo import Oblique
        >>> manifold = Oblique(2.0)
        >>> kept(manifold, "square", lambda: manifold.radius**2), kept(manifold, "square", lambda: 0.0)
        (4.0, 4.0)
        >>> manifold.radius = 3.0
        >>> kept(manifold, "square", lambda: manifold.radius**2)
        9.0
    """
    now = configuration_of(manifold)
    before = _of_manifold.get(manifold)
    if before is None or before[0][0] is not now[0] or before[0][1] != now[1]:
        before = _of_manifold[manifold] = (now, {})
    values = before[1]
    if key not in values:
        values[key] = build()
    return values[key]
