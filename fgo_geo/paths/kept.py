"""The cache of the paths: values computed from a manifold, kept until its radii change.

There is one rule of staleness: an entry is dropped when :func:`~fgo_geo.paths.protocol.configuration_of` the manifold
changes, or with the manifold. If a value depends on a weight's strides, type or device, these are in its key. The cache
keeps no manifold, weight or model alive.
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
    """The value of ``build()`` for a manifold and a key, computed once after every change of the radii.

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
