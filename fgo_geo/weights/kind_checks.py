"""Check a user's manifold class by what its methods return for random components."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["LARGEST_CHECKED", "check_methods", "drawn"]

LARGEST_CHECKED = 32
"""Rows and columns of the largest components on which methods are checked."""
_LARGEST_VIOLATION = 1e-3  # relative, as of the points that optimisers accept


def drawn(*shape: int) -> Tensor:
    """The same Gaussian numbers on every call, in double precision."""
    generator = torch.Generator("cpu").manual_seed(0)
    return torch.randn(shape, dtype=torch.float64, generator=generator, device="cpu")


def check_methods(
    name: str, unit: Any, norms: Callable[[int, int], tuple[float, float]] | None, rows: int, columns: int
) -> None:
    """Raise TypeError if methods of a manifold of radius one return wrong shapes or values for three random components.

    Args:
        name: The name of its kind, for messages.
        unit: The manifold.
        norms: Upper bounds of the Frobenius and the spectral norm of its points; None if there are none.
        rows: Rows of the components.
        columns: Columns of the components.

    Raises:
        TypeError: If ``projx``, ``proju`` or ``retr`` returns another shape or numbers that are not finite; ``projx``
            or ``retr`` returns zeros or points off the manifold; ``violation`` does not return one number per
            component; or a point has a larger norm than ``norms`` allows.

    Example:
        >>> import fgo_geo
        >>> check_methods("stiefel", fgo_geo.Stiefel(), lambda rows, columns: (1.0, 1.0), 3, 2)
        Traceback (most recent call last):
            ...
        TypeError: norms of the manifold kind 'stiefel' returns (1.0, 1.0) for components of 3 x 2, but a point...
    """
    start, moved = drawn(6, rows, columns).split(3)
    whose = f"of the manifold kind {name!r}"

    def returned(method: str, *arguments: Tensor) -> Tensor:
        found = getattr(unit, method)(*arguments)
        bad = int((~found.isfinite()).sum())
        if found.shape != start.shape or bad:
            shown = f"{bad} that are not finite" if bad else f"the shape {tuple(found.shape)}"
            raise TypeError(f"{method} {whose} must return finite numbers of shape {tuple(start.shape)}, got {shown}")
        return found

    points = returned("projx", start)
    end = returned("retr", points, returned("proju", points, 0.1 * moved))
    for method, found in (("projx", points), ("retr", end)):
        off = unit.violation(found) if hasattr(unit, "violation") else start.new_zeros(3)
        if off.shape != (3,):
            raise TypeError(
                f"violation {whose} must return one number per component: the shape (3,) for {tuple(start.shape)}, got "
                f"{tuple(off.shape)}"
            )
        if not bool((off <= _LARGEST_VIOLATION).all()) or not bool(found.any()):
            raise TypeError(
                f"{method} {whose} must return points of the manifold, not all of them zero; their violation is "
                f"{float(off.max()):.3g}, and their largest entry {float(found.abs().max()):.3g}"
            )
    measured = [float(torch.linalg.matrix_norm(points, norm).max()) for norm in ("fro", 2)]
    bounds = measured if norms is None else norms(rows, columns)
    if any(norm > bound * (1 + _LARGEST_VIOLATION) for norm, bound in zip(measured, bounds, strict=True)):
        raise TypeError(
            f"norms {whose} returns {bounds} for components of {rows} x {columns}, but a point of radius one has the "
            f"Frobenius norm {measured[0]:.6g} and the spectral norm {measured[1]:.6g}; return upper bounds"
        )
