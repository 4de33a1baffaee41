r"""The initial point of a weight on its manifold: the nearest one, or a random one where that is not unique.

The projection of a zero kernel onto a sphere is not unique, and neither is that of a zero column onto an oblique
manifold or that of a matrix of less than full rank onto a Stiefel manifold. Some layers start with such weights (zeros,
constants, pruned filters). If all such components started at the same point, they would stay equal forever. Therefore
:func:`initial_point` draws one of the nearest points, uniformly and from a seed.
"""

from __future__ import annotations

import hashlib
import json
from typing import Literal

import geoopt
import torch
from torch import Tensor
from torch.nn import functional

from fgo_geo.linalg import computes_in_float32
from fgo_geo.manifolds import ComponentManifold, ConvexBall, Oblique, ProductOfGroups, Stiefel

__all__ = ["Initial", "initial_point", "moved_to", "nearest_point"]

Initial = Literal["project", "uniform"]


def moved_to(manifold: ProductOfGroups, like: Tensor) -> ProductOfGroups:
    """The manifold on a parameter's device, its radii in the type that the parameter is computed in."""
    if like.is_meta:
        return manifold
    return manifold.to(device=like.device, dtype=torch.float64 if like.dtype == torch.float64 else torch.float32)


@computes_in_float32
def _projected(value: Tensor, manifold: ProductOfGroups) -> Tensor:
    return manifold.projx(value)


def nearest_point(manifold: ProductOfGroups, value: Tensor) -> Tensor:
    """The nearest point, computed in single precision at least: half-precision products are slow on the CPU."""
    return _projected(value.as_subclass(Tensor), moved_to(manifold, value))


def initial_point(
    value: Tensor, manifold: ProductOfGroups, initial: Initial, seed: int, name: str
) -> tuple[Tensor | None, tuple[str, ...]]:
    """The initial point of a parameter.

    Args:
        value: Its values.
        manifold: Its manifold, as :func:`moved_to` returns it.
        initial: ``"project"``, or ``"uniform"`` by torch's global generator.
        seed: Seed for the components that the projection does not determine.
        name: Name of the parameter; the draw depends on it, too.

    Returns:
        A point (None on the meta device, where there are no values), and remarks on it.

    Example:
        >>> from fgo_geo import collection
        >>> manifold = ProductOfGroups(collection(2, 3, "layer", "sphere"), (2, 3, 3, 3))
        >>> point, notes = initial_point(torch.zeros(2, 3, 3, 3), manifold, "project", 0, "weight")
        >>> notes, torch.equal(point[0], point[1])
        (('6 of 6 components have no unique nearest point and were drawn at random (seed 0)',), False)
    """
    value = value.as_subclass(Tensor)
    if value.is_meta:
        return None, ()
    if initial == "uniform":
        drawn = manifold.random(*value.shape, dtype=value.dtype, device=value.device)
        return manifold.where_constrained(drawn.as_subclass(Tensor), value), ()
    exact = value if value.dtype == torch.float64 else value.float()
    size = exact.abs()
    smallest = torch.finfo(value.dtype).eps * float(size.amax())
    tiny = 0 if float(size.amin()) > smallest else int((size <= smallest).count_nonzero())
    manifolds, sizes = [each for each, _ in manifold.parts], manifold.partition.sizes
    parts = manifold.partition.split(exact)
    can_be_open = [_can_be_open(each, *own, tiny) for each, own in zip(manifolds, sizes, strict=True)]
    looked_at = [_open_components(*own, smallest) for own in zip(manifolds, parts, can_be_open, strict=True)]
    points, masks = [point for _, point in looked_at], [is_open for is_open, _ in looked_at]
    count, notes = sum(int(is_open.sum()) for is_open in masks), ()
    if count:
        of = f"{count} of {sum(map(len, parts))} components"
        notes = (f"{of} have no unique nearest point and were drawn at random (seed {seed})",)
        key = hashlib.sha256(json.dumps([seed, name, "initial"]).encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "little"))
        parts, points = [part.clone() for part in parts], [None] * len(parts)
        for each, part, is_open in zip(manifolds, parts, masks, strict=True):
            part[is_open] = _completed(each, part[is_open], smallest, generator)
    nearest = [
        each.projx(part) if point is None else point for each, part, point in zip(manifolds, parts, points, strict=True)
    ]
    return manifold.partition.merge(nearest, like=exact).to(value.dtype), notes


def _can_be_open(manifold: geoopt.Manifold, rows: int, columns: int, tiny: int) -> bool:
    """Whether components ``rows x columns`` may lack a unique nearest point, in a weight with ``tiny`` tiny entries."""
    if not isinstance(manifold, ComponentManifold) or isinstance(manifold, ConvexBall):
        return False  # the nearest point of a ball is unique
    if isinstance(manifold, Stiefel):
        return True
    return tiny >= (rows if isinstance(manifold, Oblique) else rows * columns)


def _open_components(
    manifold: geoopt.Manifold, part: Tensor, can_be_open: bool, smallest: float
) -> tuple[Tensor, Tensor | None]:
    """Which components have no unique nearest point, up to the rounding of the weight's largest component.

    Returns:
        A mask, and the nearest points where the same factorisation gave them, else None.
    """
    if not can_be_open:
        return torch.zeros(len(part), dtype=torch.bool, device=part.device), None
    if isinstance(manifold, Oblique):
        return (part.abs().amax(-2) <= smallest).any(-1), None
    if not isinstance(manifold, Stiefel):
        return part.abs().amax((-2, -1)) <= smallest, None
    if part.shape[-2:] == (3, 3):
        points, is_open = None, _flatness(part) <= _SUSPECT
    else:
        points, low, high = manifold.projx_and_range(part)
        is_open = ~(low > _SMALL_RATIO * high)
    if bool(is_open.any()):
        values = torch.linalg.svdvals(part[is_open].double())
        is_open[is_open.clone()] = ~_is_kept(part, values, smallest)[:, -1]
    return is_open, points if type(manifold).projx is Stiefel.projx else None


def _is_kept(part: Tensor, values: Tensor, smallest: float) -> Tensor:
    """Which singular values of matrices exceed rounding errors."""
    rounding = torch.finfo(part.dtype).eps * part.shape[-2]
    return values > (rounding * values[:, :1]).clamp(min=smallest)


_SUSPECT = 1e-6  # of :func:`_flatness`: far above the rounding errors of zero, and rare among random matrices
_SMALL_RATIO = 1e-5  # of singular values: far above the rounding errors of single precision


def _flatness(part: Tensor) -> Tensor:
    """A measure of linear independence of the columns of 3 x 3 matrices: the scaled square of the determinant."""
    a, b, c, d, e, f, g, h, i = part.flatten(1).unbind(1)
    determinant = a * (e * i - f * h) + b * (f * g - d * i) + c * (d * h - e * g)
    scale = a * a + b * b + c * c + d * d + e * e + f * f + g * g + h * h + i * i
    return torch.where(scale > 0, determinant.square() / (scale / 3) ** 3, 0)


def _completed(manifold: geoopt.Manifold, part: Tensor, smallest: float, generator: torch.Generator) -> Tensor:
    """Components with a unique nearest point: Gaussian ones, which project to uniform, where the given have none."""
    gaussian = torch.randn(part.shape, generator=generator, dtype=torch.float64).to(part.device)
    if isinstance(manifold, Oblique):
        is_zero = part.abs().amax(-2, keepdim=True) <= smallest
        return torch.where(is_zero, gaussian.to(part.dtype), part)
    if not isinstance(manifold, Stiefel):
        return gaussian.to(part.dtype)
    left, values, right = torch.linalg.svd(part.double(), full_matrices=True)
    is_kept = _is_kept(part, values, smallest)
    kept_rows = functional.pad(is_kept, (0, part.shape[-2] - part.shape[-1]))
    identity = torch.eye(*part.shape[-2:], dtype=torch.float64, device=part.device)
    is_free = ~(kept_rows[:, :, None] | is_kept[:, None, :])
    return (left @ (identity * is_kept[:, None, :] + gaussian * is_free) @ right).to(part.dtype)
