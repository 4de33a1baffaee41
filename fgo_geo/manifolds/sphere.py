r"""Spheres of any radius, over the last one, two or more dimensions.

The formulas are pure functions of tensors along given dimensions ``dim``; :class:`ScaledSphere` applies them to
the last ``ndim`` dimensions, :class:`fgo_geo.Oblique` to the columns of a matrix. In the formulas ``x`` has norm ``r``,
``u`` and ``v`` are tangent at ``x`` and ``t = ‖u‖ / r`` is the angle that a step covers ("Mathematics", section 2;
[Absil2008]_, examples 3.5.1 and 5.4.1).
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from fgo_geo.linalg import arctangent, cosine, inner_sum, reads_for_free, root_of_sum, sinc, takes_real_tensors
from fgo_geo.manifolds.embedded import ComponentManifold
from fgo_geo.weights.kinds import Kind, register

__all__ = ["ScaledSphere", "SphericalManifold"]

Dims = tuple[int, ...]
Radius = float | Tensor


def _position(x: Tensor, dim: Dims) -> Tensor:
    """Number of every entry within its component, broadcastable to ``x``; ``dim`` is a run of dimensions."""
    sizes = [x.shape[d] for d in dim]
    return torch.arange(math.prod(sizes), device=x.device).reshape(*sizes, *(1,) * (-1 - max(dim)))


_SMALL = 1e-20  # squared norms from which on the squares that vanish in single precision do not count


def normalise(x: Tensor, radius: Radius, dim: Dims) -> Tensor:
    """Nearest point, ``r x / ‖x‖``; zero goes to ``r`` times the first basis vector.

    Vectors whose square may overflow or vanish are divided by their largest entry first. Others do not depend on them.
    """
    squared = inner_sum(x, x, dim)
    is_moderate = (squared > _SMALL) & (squared < 1 / _SMALL)
    if reads_for_free(squared) and bool(is_moderate.all()):
        return x * (radius * squared.rsqrt())
    largest = torch.where(
        is_moderate, 1, x.detach().abs().amax(dim, keepdim=True)
    )  # it cancels, as its derivative does
    zero = largest == 0
    first = (_position(x, dim) == 0).to(x.dtype)
    x = torch.where(zero, first, x / torch.where(zero, 1, largest))
    return _onto(x, radius, dim)


def _onto(y: Tensor, radius: Radius, dim: Dims) -> Tensor:
    """``r y / ‖y‖`` for a vector that is not tiny; where reading values takes time, its square must not overflow."""
    squared = inner_sum(y, y, dim)
    if reads_for_free(squared) and math.isinf(float(squared.detach().sum())):
        y = y / y.detach().abs().amax(dim, keepdim=True)  # which cancels
        squared = inner_sum(y, y, dim)
    return y * (radius * squared.rsqrt())


def project_tangent(x: Tensor, u: Tensor, radius: Radius, dim: Dims) -> Tensor:
    """Tangent projection, ``u - <x, u> / r² x``."""
    return torch.addcmul(u, x, inner_sum(x, u, dim) / radius**2, value=-1)


def retract(x: Tensor, u: Tensor, radius: Radius, dim: Dims) -> Tensor:
    """Metric projection of ``x + u``: ``r (x + u) / ‖x + u‖``, a second-order retraction."""
    return _onto(x + u, radius, dim)


def exponential(x: Tensor, u: Tensor, radius: Radius, dim: Dims) -> Tensor:
    """Exponential map, ``cos(t) x + sin(t) / t u``, normalised so that rounding does not add up over many steps.

    Where ``t²`` overflows, the rounding error of ``u`` covers the great circle many times, so any of its points is
    valid.
    """
    squared = (inner_sum(u, u, dim) / radius**2).clamp_max(torch.finfo(u.dtype).max)
    return _onto(cosine(squared) * x + sinc(squared) * u, radius, dim)


def angle(x: Tensor, y: Tensor, dim: Dims) -> Tensor:
    """Angle, ``2 atan2(‖x - y‖, ‖x + y‖)``, accurate at zero and at the antipode."""
    return 2 * torch.atan2(root_of_sum(x - y, dim), root_of_sum(x + y, dim))


_NEAR = 0.05  # of tan²(θ/2): angles up to 25 degrees


def _half_tangent(x: Tensor, y: Tensor, dim: Dims) -> tuple[Tensor, Tensor]:
    """A mask where ``tan²(θ/2) = ‖x - y‖² / ‖x + y‖²`` is small, and the values there; zero elsewhere.

    Near ``x = y`` the maps below are smooth functions of this number, but not of the angle.
    """
    gap, total = inner_sum(x - y, x - y, dim), inner_sum(x + y, x + y, dim)
    near = gap <= _NEAR * total
    return near, torch.where(near, gap, 0) / torch.where(near, total, 1)


def angle_squared(x: Tensor, y: Tensor, dim: Dims) -> Tensor:
    """Square of the angle, smooth at ``x = y``."""
    near, squared = _half_tangent(x, y, dim)
    return torch.where(near, 4 * squared * arctangent(squared) ** 2, angle(x, y, dim) ** 2)


def logarithm(x: Tensor, y: Tensor, radius: Radius, dim: Dims) -> Tensor:
    """Inverse of the exponential map: the tangent part of ``y - x``, scaled to the length ``r θ``.

    For small angles the factor ``θ / sin θ`` is a series in ``tan²(θ/2)``, smooth at ``x = y``. Beyond a right angle
    the function projects ``y + x`` instead, which has the same tangent part and no cancellation near the antipode. At
    the antipode all directions are shortest; the function takes that of the smallest coordinate of ``x``.
    """
    theta = angle(x, y, dim)
    far = theta > math.pi / 2
    toward = project_tangent(x, torch.where(far, y + x, y - x), radius, dim)
    antipodal = far & (root_of_sum(toward, dim) <= 4 * torch.finfo(x.dtype).eps * radius)
    position = _position(x, dim)
    size = x.abs()
    smallest = torch.where(size == size.amin(dim, keepdim=True), position, position.numel()).amin(dim, keepdim=True)
    sideways = project_tangent(x, (position == smallest).to(x.dtype), radius, dim)
    toward = torch.where(antipodal, sideways, toward)
    length = root_of_sum(toward, dim)
    factor = torch.where(length > 0, radius * theta / torch.where(length > 0, length, 1), 1)
    near, squared = _half_tangent(x, y, dim)
    return toward * torch.where(near, (1 + squared) * arctangent(squared), factor)


def parallel_transport(x: Tensor, u: Tensor, v: Tensor, radius: Radius, dim: Dims) -> Tensor:
    r"""Parallel transport of ``v`` along the geodesic ``exp_x(s u)``, ``0 <= s <= 1``: an isometry.

    ``v - <u, v> / r² ( sinc²(t/2) / 2 u + sinc(t) x )`` with ``sinc(t) = sin(t) / t``: the textbook formula without
    its division by ``‖u‖``.
    """
    squared = inner_sum(u, u, dim) / radius**2
    along = inner_sum(u, v, dim) / radius**2
    return v - along * (sinc(squared / 4) ** 2 / 2 * u + sinc(squared) * x)


class SphericalManifold(ComponentManifold):
    """Components that are products of spheres along the dimensions ``_dims``."""

    _dims: Dims

    def _shape_problem(self, shape: tuple[int, ...]) -> str | None:
        problem = super()._shape_problem(shape)
        if problem is None and math.prod(shape[d] for d in self._dims) == 1:
            return (
                "a sphere in one dimension is two isolated points, so nothing could move; "
                "use geoopt.Euclidean or a larger component"
            )
        return problem

    @takes_real_tensors
    def violation(self, x: Tensor) -> Tensor:
        """Largest relative deviation of a norm, ``| ‖x‖ / r - 1 |``, per component."""
        deviation = (root_of_sum(x, self._dims) / self.radius_for(x) - 1).abs()
        return deviation.amax(self._component_dims)

    @takes_real_tensors
    def component_inner(self, x: Tensor, u: Tensor, v: Tensor | None = None) -> Tensor:
        """Inner product on each sphere, kept along its dimensions: what Geoopt's Adam takes second moments of.

        Args:
            x: Points; only their shape matters.
            u: Tangent vectors at ``x``.
            v: Tangent vectors at ``x``; ``u`` if left out.

        Returns:
            Inner products that broadcast against ``x``, for an oblique manifold one per column.
        """
        product = inner_sum(u, u if v is None else v, self._dims)
        batch, rest = product.shape[: -self.ndim], product.shape[-self.ndim :]
        return product.expand(*torch.broadcast_shapes(x.shape[: -self.ndim], batch), *rest)

    @takes_real_tensors
    def projx(self, x: Tensor) -> Tensor:
        """Nearest point, ``r x / ‖x‖``; a zero vector goes to ``r`` times the first basis vector.

        Args:
            x: Any finite tensor of the manifold's shape.

        Returns:
            Points on the manifold.

        Raises:
            ValueError: If ``x`` holds NaN or infinity, or a point cannot have its shape.
        """
        self._require_projectable(x)
        return normalise(x, self.radius_for(x), self._dims)

    @takes_real_tensors
    def proju(self, x: Tensor, u: Tensor) -> Tensor:
        """Tangent projection, ``u - <x, u> / r² x``."""
        return project_tangent(x, u, self.radius_for(x), self._dims)

    @takes_real_tensors
    def retr(self, x: Tensor, u: Tensor) -> Tensor:
        """Second-order retraction, ``r (x + u) / ‖x + u‖``."""
        return retract(x, u, self.radius_for(x), self._dims)

    @takes_real_tensors
    def expmap(self, x: Tensor, u: Tensor) -> Tensor:
        """Exponential map, ``cos(t) x + sin(t) / t u`` with ``t = ‖u‖ / r``."""
        return exponential(x, u, self.radius_for(x), self._dims)

    @takes_real_tensors
    def logmap(self, x: Tensor, y: Tensor) -> Tensor:
        """Inverse of the exponential map; at the antipode one of the shortest geodesics is chosen."""
        return logarithm(x, y, self.radius_for(x), self._dims)

    @takes_real_tensors
    def dist(self, x: Tensor, y: Tensor, *, keepdim: bool = False) -> Tensor:
        """Geodesic distance, ``2 r atan2(‖x - y‖, ‖x + y‖)``; over several spheres, the root of the sum of squares."""
        distance = self.radius_for(x) * angle(x, y, self._dims)
        return self._per_component(distance, root_of_sum(distance, self._component_dims), keepdim)

    @takes_real_tensors
    def dist2(self, x: Tensor, y: Tensor, *, keepdim: bool = False) -> Tensor:
        """Squared geodesic distance, smooth at ``x = y``; over several spheres, the sum of squares."""
        squared = self.radius_for(x) ** 2 * angle_squared(x, y, self._dims)
        return squared.sum(self._component_dims, keepdim=keepdim)

    @takes_real_tensors
    def transp_follow_expmap(self, x: Tensor, u: Tensor, v: Tensor) -> Tensor:
        """Parallel transport of ``v`` along the geodesic from ``x`` in direction ``u``: an isometry."""
        return parallel_transport(x, u, v, self.radius_for(x), self._dims)

    def expmap_transp(self, x: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Exponential map, and parallel transport of ``v`` along it."""
        return self.expmap(x, u), self.transp_follow_expmap(x, u, v)


class ScaledSphere(SphericalManifold):
    r"""The sphere ``{ x : ‖x‖ = r }`` over the last ``ndim`` dimensions.

    With ``ndim=2`` every kernel ``W[d, c]`` of a convolution's weight is one point of a sphere.
    Sectional curvature: ``1 / r²``.

    Args:
        radius: Positive number, or a tensor that broadcasts over the leading (component) dimensions.
        ndim: How many trailing dimensions form one component.

    Raises:
        ValueError: If the radius or ``ndim`` is not positive.

    Example:
        >>> sphere = ScaledSphere(radius=2.0)
        >>> x, y = torch.tensor([2.0, 0.0]), torch.tensor([0.0, 2.0])
        >>> sphere.dist(x, y) / torch.pi
        tensor(1.)
        >>> sphere.logmap(x, y) / torch.pi
        tensor([0., 1.])
        >>> ScaledSphere(radius=0.5, ndim=2).projx(torch.ones(64, 32, 2, 2))[0, 0]
        tensor([[0.2500, 0.2500],
                [0.2500, 0.2500]])
    """

    name = "ScaledSphere"

    def __init__(self, radius: float | Tensor = 1.0, ndim: int = 1) -> None:
        if not isinstance(ndim, int) or isinstance(ndim, bool) or ndim < 1:
            raise ValueError(f"ScaledSphere: ndim must be a positive integer, got {ndim!r}")
        self.ndim = ndim
        super().__init__(radius)

    @property
    def _dims(self) -> Dims:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self._component_dims

    def extra_repr(self) -> str:
        """Radius and number of component dimensions."""
        return f"{super().extra_repr()}, ndim={self.ndim}"


register(
    Kind(
        "sphere",
        ScaledSphere,
        functools.partial(ScaledSphere, ndim=2),
        norms=lambda rows, columns: (1.0, 1.0),
        carry=lambda x, source, target, memory: normalise(x, target, (-2, -1)),
        colour="#56b4e9",
        code=1,
        is_decomposed=False,
        aliases=("sp",),
    )
)
