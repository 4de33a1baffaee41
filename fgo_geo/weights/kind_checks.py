"""Check a user's manifold class by what its methods return for random components."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

__all__ = ["check_methods", "drawn", "tensors_of"]

_LARGEST_VIOLATION = 1e-3  # relative, as of the points that optimisers accept
_MOST_DRAWN = 2**20  # numbers at a time
_LARGEST_PART = 256  # rows and columns of the part of a point whose spectral norm is measured
_STEP = 1e-2  # length of a step relative to the norm of its point
_SMALL = 0.1  # what counts as zero, relative to a point or to a step
_LARGEST_ANGLE = 65  # degrees; exact geodesics of Geoopt's Poincaré ball near its border: 61 in one step


def tensors_of(manifold: Any) -> list[Tensor]:
    """The tensors that a manifold holds as buffers, parameters or attributes."""
    held = (*manifold.buffers(), *manifold.parameters(), *vars(manifold).values())
    return [tensor for tensor in held if isinstance(tensor, Tensor)]


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
    own = [held for held in tensors_of(manifold) if held.is_floating_point()]
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
            component; ``retr`` moves points in other directions than those of the vectors from ``proju``; or a point
            has a larger norm than ``norms`` allows.

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
        faults = [f"the shape {tuple(found.shape)}"] if found.shape != start.shape else []
        faults += [f"numbers of type {found.dtype}"] if found.is_complex() else []
        bad = int((~found.isfinite()).sum())
        faults += [f"{bad} that are not finite"] if bad else []
        if faults:
            raise TypeError(
                f"{method} {whose} must return finite real numbers of shape {tuple(start.shape)}, "
                f"got {' and '.join(faults)}"
            )
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
    if points is not None and start.dtype in (torch.float32, torch.float64):
        _check_direction(whose, unit, points, moved)
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


def _check_direction(whose: str, unit: Any, points: Tensor, vectors: Tensor) -> None:
    """Raise TypeError if the retraction moves none of the points in the direction of its tangent vector.

    The direction of a move is a central difference. The check leaves out three sorts of components: those whose tangent
    vector is about zero, those whose one-sided differences are not opposite, as on the border of a ball, and those
    whose differences are not finite.
    """
    # most manifolds have the point itself as a normal vector: what a wrong projection leaves of it is not tangent
    tangent = _called(unit, "proju", points, vectors + 3 * points * (_norm(vectors) / _norm(points)))
    if tangent is None:
        return
    small = _SMALL * _norm(points)
    step = tangent * (_STEP * _norm(points) / _norm(tangent).maximum(small))
    ahead, behind = _called(unit, "retr", points, step), _called(unit, "retr", points, -step)
    if ahead is None or behind is None:
        return
    counts = (_norm(tangent) > small) & (_norm(ahead + behind - 2 * points) < _SMALL * _norm(step))
    move = (ahead - behind) / 2
    cosine = (move * step).sum((-2, -1), keepdim=True) / (_norm(move) * _norm(step))
    angle = cosine.clamp(-1, 1).arccos().rad2deg()[counts]
    if angle.numel() and bool((angle > _LARGEST_ANGLE).all()):
        moves = bool((_norm(move) > _SMALL * _norm(step))[counts].any())
        raise TypeError(
            f"retr {whose} must equal x + u to first order for every tangent vector u = proju(x, v); for short u it "
            + (f"moves x at {float(angle.min()):.0f} degrees to u" if moves else "leaves x where it is")
            + "; either retr is not a retraction, or proju does not project onto the tangent space"
        )


def _norm(x: Tensor) -> Tensor:
    """Frobenius norms of components, shape ``(n, 1, 1)``; at least the smallest normal number, to divide by."""
    return torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)


def _called(unit: Any, method: str, *arguments: Any) -> Tensor | None:
    """What a method returns; None if it raises an error, which the call on a weight raises again if it matters."""
    try:
        return getattr(unit, method)(*arguments).detach()
    except Exception:
        return None
