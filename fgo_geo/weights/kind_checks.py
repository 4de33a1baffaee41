"""Check a user's manifold class by what its methods return for random components."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

__all__ = ["check_methods", "drawn"]

_LARGEST_VIOLATION = 1e-3  # relative, as of the points that optimisers accept
_MOST_DRAWN = 2**20  # numbers at a time
_LARGEST_PART = 256  # rows and columns of the part of a point whose spectral norm is measured


def drawn(manifold: Any, count: int, rows: int, columns: int) -> Iterator[Tensor]:
    """Yield the same Gaussian components on every call, in batches, whatever the size of a batch.

    Args:
        manifold: A manifold, whose floating-point tensors determine the type and the device of the components: double
            precision on the CPU if it holds none.
        count: How many components.
        rows: Rows of a component.
        columns: Columns of a component.

    Yields:
        Components, shape ``(n, rows, columns)``.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    held = (*manifold.buffers(), *manifold.parameters(), *vars(manifold).values())
    own = [held for held in held if isinstance(held, Tensor) and held.is_floating_point()]
    # torch.randn draws 16 numbers at a time, so that draws of a multiple of 16 continue each other
    multiple = 16 // math.gcd(16, rows * columns)
    batch = max(1, _MOST_DRAWN // (rows * columns * multiple)) * multiple
    for left in range(count, 0, -batch):
        size = (min(left, batch), rows, columns)
        components = torch.randn(size, dtype=torch.float64, generator=generator, device="cpu")
        yield components.to(own[0]) if own else components


def check_methods(
    name: str, unit: Any, norms: Callable[[int, int], tuple[float, float]] | None, rows: int, columns: int
) -> None:
    """Raise TypeError if methods of a manifold of radius one return wrong shapes or values for random components.

    There are three components, or one if they are large. A method that raises an error is not checked.

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
    count = 3 if 3 * rows * columns <= _MOST_DRAWN else 1
    start, moved = torch.cat(list(drawn(unit, 2 * count, rows, columns))).split(count)
    tolerance = max(_LARGEST_VIOLATION, 8 * torch.finfo(start.dtype).eps)
    whose = f"of the manifold kind {name!r}"

    def returned(method: str, *arguments: Tensor | None) -> Tensor | None:
        found = None if any(x is None for x in arguments) else _called(unit, method, *arguments)
        if found is None:
            return None
        bad = int((~found.isfinite()).sum())
        if found.shape != start.shape or bad:
            shown = f"{bad} that are not finite" if bad else f"the shape {tuple(found.shape)}"
            raise TypeError(f"{method} {whose} must return finite numbers of shape {tuple(start.shape)}, got {shown}")
        return found

    points = returned("projx", start)
    end = returned("retr", points, returned("proju", points, 0.1 * moved))
    for method, found in (("projx", points), ("retr", end)):
        if found is None:
            continue
        off = _called(unit, "violation", found) if hasattr(unit, "violation") else None
        off = start.new_zeros(count) if off is None else off
        if off.shape != (count,):
            raise TypeError(
                f"violation {whose} must return one number per component: the shape ({count},) for "
                f"{tuple(start.shape)}, got {tuple(off.shape)}"
            )
        if not bool((off <= tolerance).all()) or not bool(found.any()):
            raise TypeError(
                f"{method} {whose} must return points of the manifold, not all of them zero; their violation is "
                f"{float(off.max()):.3g}, and their largest entry {float(found.abs().max()):.3g}"
            )
    if norms is None or points is None:
        return
    parts = {"fro": points.double(), 2: points[:, :_LARGEST_PART, :_LARGEST_PART].double()}
    measured = [float(torch.linalg.matrix_norm(part, norm).max()) for norm, part in parts.items()]
    bounds = norms(rows, columns)
    if any(norm > bound * (1 + tolerance) for norm, bound in zip(measured, bounds, strict=True)):
        raise TypeError(
            f"norms {whose} returns {bounds} for components of {rows} x {columns}, but a point of radius one has the "
            f"Frobenius norm {measured[0]:.6g} and the spectral norm {measured[1]:.6g}; return upper bounds"
        )


def _called(unit: Any, method: str, *arguments: Any) -> Tensor | None:
    """What a method returns; None if it raises an error, which the call on a weight raises again if it matters."""
    try:
        return getattr(unit, method)(*arguments).detach()
    except Exception:
        return None
