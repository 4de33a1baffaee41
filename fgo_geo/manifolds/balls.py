r"""Bounded norms as constraint sets: balls, and the sphere of the spectral norm.

A *ball* ``{ x : ‖x‖ <= r }`` is a convex set, not a manifold. In its interior every direction is tangent, and a step
that stays inside is the optimiser's own step. A step that leaves the ball is projected to the nearest point, on the
boundary: the projected gradient method. Because balls are convex, the nearest point is unique and the projection does
not increase distances.

* :class:`Ball`: the Frobenius norm is at most ``r``;
* :class:`SpectralBall`: no singular value exceeds ``r``, so that ``x`` as a map is Lipschitz with constant ``r``;
* :class:`SpectralSphere`: the largest singular value is ``r``. This is the boundary of the spectral ball. It is a
  manifold where the largest singular value is simple, and has corners elsewhere.

Each class defines the projection of ``x + u``, and :class:`SpectralSphere` that of directions too. Geoopt's other
methods follow: :meth:`~ConvexBall.expmap` is the straight line, projected where it leaves the ball,
:meth:`~ConvexBall.logmap` and distances are those of Euclidean space, and transport leaves vectors unchanged. As on the
other constrained kinds, weight decay does not act in a ball.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from fgo_geo.linalg import (
    Memory,
    has_closed_form,
    root_of_sum,
    spectral_norm_3,
    takes_full_products,
    takes_real_tensors,
)
from fgo_geo.manifolds.embedded import ComponentManifold
from fgo_geo.weights.kinds import Kind, register
from fgo_geo.weights.norms import matrix_norms

__all__ = ["Ball", "ConvexBall", "SpectralBall", "SpectralSphere"]

Radius = float | Tensor


def clip_norm(x: Tensor, radius: Radius, dim: tuple[int, ...]) -> Tensor:
    """Nearest point of Euclidean norm at most ``r``, ``x min(1, r / ‖x‖)``.

    The function first scales ``x`` by its largest entry, so that no square overflows. Points of the ball keep their
    bits.
    """
    largest = x.detach().abs().amax(dim, keepdim=True)
    unit = torch.where(largest == 0, 1, largest)
    y = x / unit
    norm = root_of_sum(torch.where(largest == 0, 1, y), dim)  # at least one
    return torch.where(unit > radius / norm, y * (radius / norm), x)


def clip_singular_values(x: Tensor, radius: Radius) -> Tensor:
    """Nearest matrix without singular values above ``r``, ``U min(Σ, r) Vᵀ``; points of the ball keep their bits."""
    u, values, vh = torch.linalg.svd(x, full_matrices=False)
    limit = radius[..., 0] if isinstance(radius, Tensor) else radius
    inside = (values[..., :1] <= limit)[..., None]
    return torch.where(inside, x, (u * torch.clamp(values, max=limit)[..., None, :]) @ vh)


def largest_to(x: Tensor, radius: Radius) -> Tensor:
    """Nearest matrix of spectral norm ``r``: singular values above ``r`` become ``r``; if there are none, the first."""
    u, values, vh = torch.linalg.svd(x, full_matrices=False)
    limit = radius[..., 0] if isinstance(radius, Tensor) else radius
    first = torch.arange(values.shape[-1], device=x.device) == 0
    clipped = torch.where(first, torch.clamp(values, min=limit), values).clamp(max=limit)
    return (u * clipped[..., None, :]) @ vh


class ConvexBall(ComponentManifold):
    """Base class of balls of any norm: Euclidean space inside, and a projection."""

    @takes_real_tensors
    def proju(self, x: Tensor, u: Tensor) -> Tensor:
        """Every vector is tangent: ``u``, of the shape of points and vectors broadcast together."""
        return u.expand(torch.broadcast_shapes(x.shape, u.shape))

    @takes_real_tensors
    def retr(self, x: Tensor, u: Tensor) -> Tensor:
        """The nearest point to ``x + u``; inside the ball, ``x + u`` itself."""
        return self._clip(x + u)

    def expmap(self, x: Tensor, u: Tensor) -> Tensor:
        """As :meth:`retr`: the straight line, projected where it leaves the ball."""
        return self.retr(x, u)

    @takes_real_tensors
    def logmap(self, x: Tensor, y: Tensor) -> Tensor:
        """``y - x``: geodesics of a convex set are straight."""
        return y - x

    @takes_real_tensors
    def projx(self, x: Tensor) -> Tensor:
        """Nearest point; points of the ball stay as they are.

        Args:
            x: Any finite tensor of the shape of points.

        Returns:
            Points of the ball.

        Raises:
            ValueError: If ``x`` holds NaN or infinity, or a point cannot have its shape.
        """
        self._require_projectable(x)
        return self._clip(x)

    @property
    def curvature_bound(self) -> float | Tensor:
        """Zero: the ball is flat."""
        return torch.zeros_like(self.radius) if isinstance(self.radius, Tensor) else 0.0

    def _clip(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class Ball(ConvexBall):
    r"""The ball ``{ x : ‖x‖ <= r }`` over the last ``ndim`` dimensions; a set with a boundary.

    Args:
        radius: Positive number, or a tensor that broadcasts over the leading (component) dimensions.
        ndim: How many trailing dimensions form one component.

    Raises:
        ValueError: If the radius or ``ndim`` is not positive.

    Example:
        >>> ball = Ball(radius=5.0)
        >>> ball.retr(torch.tensor([3.0, 0.0]), torch.tensor([1.0, 0.0])), ball.projx(torch.tensor([6.0, 8.0]))
        (tensor([4., 0.]), tensor([3., 4.]))
    """

    name = "Ball"

    def __init__(self, radius: float | Tensor = 1.0, ndim: int = 1) -> None:
        if not isinstance(ndim, int) or isinstance(ndim, bool) or ndim < 1:
            raise ValueError(f"Ball: ndim must be a positive integer, got {ndim!r}")
        self.ndim = ndim
        super().__init__(radius)

    @takes_real_tensors
    def violation(self, x: Tensor) -> Tensor:
        """How far the norm exceeds the radius, ``max(0, ‖x‖ / r - 1)``, per component."""
        excess = root_of_sum(x, self._component_dims) / self.radius_for(x) - 1
        return excess.clamp(min=0).amax(self._component_dims)

    @takes_real_tensors
    def uniform(self, gaussian: Tensor) -> Tensor:
        """Gaussian vectors to uniformly distributed points of the ball.

        The direction of a Gaussian vector is uniform. Its length is mapped so that the share of the ball's volume
        within that length is uniform too: this share is the probability of a shorter Gaussian vector.
        """
        size = math.prod(gaussian.shape[-self.ndim :])
        norm = root_of_sum(gaussian.double(), self._component_dims)
        share = torch.special.gammainc(torch.full_like(norm, size / 2), norm.square() / 2)
        factor = share ** (1 / size) / torch.where(norm == 0, 1, norm)
        return gaussian * (self.radius_for(gaussian) * factor.to(gaussian.dtype))

    def _clip(self, x: Tensor) -> Tensor:
        return clip_norm(x, self.radius_for(x), self._component_dims)

    def extra_repr(self) -> str:
        """Radius and number of component dimensions."""
        return f"{super().extra_repr()}, ndim={self.ndim}"


class SpectralBall(ConvexBall):
    r"""The ball of the spectral norm, ``{ x in R^{A x B} : ‖x‖₂ <= r }``, over the last two dimensions.

    A set with a boundary: the convex hull of the Stiefel manifold. The projection clips singular values:
    ``U min(Σ, r) Vᵀ``.

    Args:
        radius: Positive number, or a tensor that broadcasts over the leading (component) dimensions.

    Raises:
        ValueError: If the radius is not positive.

    Example:
        >>> SpectralBall(radius=2.0).projx(torch.tensor([[3.0, 0.0], [0.0, 1.0]]))
        tensor([[2., 0.],
                [0., 1.]])
    """

    name = "SpectralBall"
    ndim = 2

    @takes_real_tensors
    def violation(self, x: Tensor) -> Tensor:
        """How far the spectral norm exceeds the radius, ``max(0, ‖x‖₂ / r - 1)``, per component."""
        return (torch.linalg.matrix_norm(x / self.radius_for(x), 2) - 1).clamp(min=0)

    @takes_full_products
    def _clip(self, x: Tensor) -> Tensor:
        return clip_singular_values(x, self.radius_for(x))


class SpectralSphere(ComponentManifold):
    r"""The sphere of the spectral norm, ``{ x in R^{A x B} : ‖x‖₂ = r }``, over the last two dimensions.

    With ``u₁, v₁`` the first pair of singular vectors, ``u₁ v₁ᵀ`` is the gradient of the spectral norm where the
    largest singular value is simple, and a subgradient everywhere. :meth:`proju` removes this direction. Where the
    largest singular value is repeated, the set has a corner, and the decomposition decides which pair is used: the
    projected direction can leave the set to first order there, and the retraction, which projects ``x + u``, brings it
    back.

    Args:
        radius: Positive number, or a tensor that broadcasts over the leading (component) dimensions.

    Raises:
        ValueError: If the radius is not positive.

    Example:
        >>> sphere = SpectralSphere(radius=2.0)
        >>> x = sphere.projx(torch.tensor([[1.5, 0.0], [0.0, 1.0]]))
        >>> x, sphere.proju(x, torch.ones(2, 2))
        (tensor([[2., 0.],
                [0., 1.]]), tensor([[0., 1.],
                [1., 1.]]))
    """

    name = "SpectralSphere"
    ndim = 2

    def _shape_problem(self, shape: tuple[int, ...]) -> str | None:
        problem = super()._shape_problem(shape)
        if problem is None and shape[-2:] == (1, 1):
            return "the sphere of a 1 x 1 matrix is two isolated points, so nothing could move; use geoopt.Euclidean"
        return problem

    @takes_real_tensors
    def violation(self, x: Tensor) -> Tensor:
        """Relative deviation of the spectral norm, ``| ‖x‖₂ / r - 1 |``, per component."""
        return (torch.linalg.matrix_norm(x / self.radius_for(x), 2) - 1).abs()

    @takes_real_tensors
    def projx(self, x: Tensor) -> Tensor:
        """Nearest point: singular values above ``r`` become ``r``; if there are none, the largest one does.

        Args:
            x: Any finite tensor of the shape of points; zero goes to a matrix of rank one.

        Returns:
            Points of the set.

        Raises:
            ValueError: If ``x`` holds NaN or infinity, or a point cannot have its shape.
        """
        self._require_projectable(x)
        return self._nearest(x)

    @takes_full_products
    def _nearest(self, x: Tensor) -> Tensor:
        return largest_to(x, self.radius_for(x))

    @takes_real_tensors
    def proju(self, x: Tensor, u: Tensor) -> Tensor:
        """Direction without the part along the (sub)gradient of the norm, ``u - <u, u₁v₁ᵀ> u₁v₁ᵀ``."""
        left, _, right = torch.linalg.svd(x, full_matrices=False)
        normal = left[..., :, :1] * right[..., :1, :]
        return u - normal * (u * normal).sum((-2, -1), keepdim=True)

    @takes_real_tensors
    def retr(self, x: Tensor, u: Tensor) -> Tensor:
        """The nearest point to ``x + u``."""
        return self._nearest(x + u)

    def expmap(self, x: Tensor, u: Tensor) -> Tensor:
        """As :meth:`retr`, because geodesics are not defined at the corners."""
        return self.retr(x, u)


def _bounds(rows: int, columns: int) -> tuple[float, float]:
    return math.sqrt(min(rows, columns)), 1.0


# To renormalise, matrices are divided by their norms: that keeps the ratios of singular values.


def _spectral_norm(x: Tensor) -> Tensor:
    norm = spectral_norm_3(x) if has_closed_form(x) else matrix_norms(x).spectral
    return norm[:, None, None]


def _divide_outside(x: Tensor, source: Radius, target: Radius, memory: Memory | None) -> Tensor:
    return x * (target / _spectral_norm(x).clamp(min=source))


def _divide(x: Tensor, source: Radius, target: Radius, memory: Memory | None) -> Tensor:
    norm = _spectral_norm(x)
    zero = norm == 0
    first = torch.zeros_like(x[:1])
    first[0, 0, 0] = 1
    return torch.where(zero, first, x / torch.where(zero, 1, norm)) * target


register(
    Kind(
        "ball",
        Ball,
        functools.partial(Ball, ndim=2),
        norms=lambda rows, columns: (1.0, 1.0),
        carry=lambda x, source, target, memory: clip_norm(x, source, (-2, -1)) * (target / source),
        colour="#a6d8f0",
        is_decomposed=False,
    )
)
register(
    Kind(
        "spectral_ball",
        SpectralBall,
        SpectralBall,
        norms=_bounds,
        carry=_divide_outside,
        colour="#8fd4b8",
        joins_filters=True,
        aliases=("spectral",),
    )
)
register(
    Kind(
        "spectral_sphere",
        SpectralSphere,
        SpectralSphere,
        norms=_bounds,
        carry=_divide,
        colour="#00664a",
        joins_filters=True,
    )
)
