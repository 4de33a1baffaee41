r"""Base classes of the manifolds: the Euclidean metric, the checks, and a radius.

Every manifold here is a submanifold of a space of matrices (or vectors) with the metric of the surrounding space
[Absil2008]_. :class:`EmbeddedManifold` implements what follows for all of them:

* the Riemannian gradient is the tangent projection of the Euclidean gradient;
* the projection onto the tangent space at the target is a vector transport;
* a point or a vector is valid if it is close to its own projection.

A concrete manifold adds its constraint (:meth:`EmbeddedManifold.violation`), its two projections, a retraction,
the exponential map and its inverse. The last ``ndim`` dimensions of a tensor form one *component*; all
dimensions before are a batch. :class:`ComponentManifold` adds the radius ``r > 0``, which broadcasts over the batch.
"""

from __future__ import annotations

import abc
import math
from numbers import Real
from typing import Any, cast

import geoopt
import torch
from geoopt.manifolds.base import ScalingInfo
from torch import Tensor, nn

from fgo_geo.linalg import DAMAGED, inner_sum, require_finite, require_real, root_of_sum, takes_real_tensors

__all__ = ["ComponentManifold", "EmbeddedManifold", "point_tolerance"]


class EmbeddedManifold(geoopt.Manifold):
    """A submanifold of Euclidean space with the Euclidean metric."""

    ndim: int
    name: str
    reversible = False

    # -- for subclasses to implement --------------------------------------------------------------------------------

    @abc.abstractmethod
    def violation(self, x: Tensor) -> Tensor:
        """Relative distance from the constraint, per component.

        Args:
            x: Tensor of the manifold's shape.

        Returns:
            Non-negative tensor over the leading dimensions; zero on the manifold, independent of the radius.
        """

    # -- the metric ------------------------------------------------------------------------------------------

    @takes_real_tensors
    def inner(self, x: Tensor, u: Tensor, v: Tensor | None = None, *, keepdim: bool = False) -> Tensor:
        """Euclidean inner product ``<u, v>`` of tangent vectors, per component.

        Args:
            x: Points; only their shape matters.
            u: Tangent vectors at ``x``.
            v: Tangent vectors at ``x``; ``u`` if left out.
            keepdim: Keep the component dimensions with size one.

        Returns:
            Inner products over the leading dimensions.
        """
        product = inner_sum(u, u if v is None else v, self._component_dims)
        return self._per_component(x, product, keepdim)

    @takes_real_tensors
    def norm(self, x: Tensor, u: Tensor, *, keepdim: bool = False) -> Tensor:
        """Norm of tangent vectors, per component; differentiable (with gradient zero) at ``u = 0``."""
        norm = root_of_sum(u, self._component_dims)
        return self._per_component(x, norm, keepdim)

    def _per_component(self, x: Tensor, values: Tensor, keepdim: bool) -> Tensor:
        """Values per component, broadcast over the batch of points ``x``."""
        batch = x.shape[: -self.ndim]
        if batch != values.shape[: -self.ndim]:
            batch = torch.broadcast_shapes(batch, values.shape[: -self.ndim])
            values = values.expand(*batch, *(1,) * self.ndim)
        return values if keepdim else values.reshape(batch)

    def egrad2rgrad(self, x: Tensor, u: Tensor) -> Tensor:
        """Riemannian gradient from the Euclidean one: the tangent projection, since the metric is Euclidean."""
        return self.proju(x, u)

    def transp(self, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        """Vector transport from ``x`` to ``y`` by projection onto the tangent space at ``y``.

        It shortens vectors, never lengthens them, and needs no ``x``.
        """
        return self.proju(y, v)

    @takes_real_tensors
    def expmap_transp(self, x: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Exponential map along ``u``, and transport of ``v`` to its end."""
        y = self.expmap(x, u)
        return y, self.transp(x, y, v)

    @takes_real_tensors
    def retr_transp(self, x: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Retraction along ``u``, and transport of ``v`` to its end."""
        y = self.retr(x, u)
        return y, self.transp(x, y, v)

    def transp_follow_expmap(self, x: Tensor, u: Tensor, v: Tensor) -> Tensor:
        """Transport of ``v`` to the end of the geodesic from ``x`` along ``u``."""
        return self.expmap_transp(x, u, v)[1]

    def transp_follow_retr(self, x: Tensor, u: Tensor, v: Tensor) -> Tensor:
        """Transport of ``v`` to the end of the retraction from ``x`` along ``u``."""
        return self.retr_transp(x, u, v)[1]

    @takes_real_tensors
    def dist(self, x: Tensor, y: Tensor, *, keepdim: bool = False) -> Tensor:
        """Geodesic distance, per component: the length of the logarithm."""
        return self.norm(x, self.logmap(x, y), keepdim=keepdim)

    @takes_real_tensors
    def dist2(self, x: Tensor, y: Tensor, *, keepdim: bool = False) -> Tensor:
        """Squared geodesic distance, per component; smooth at ``x = y``."""
        return self.inner(x, self.logmap(x, y), keepdim=keepdim)

    @property
    def _component_dims(self) -> tuple[int, ...]:
        return tuple(range(-self.ndim, 0))

    # -- points ----------------------------------------------------------------------------------------------

    def random(
        self,
        *size: int | tuple[int, ...],
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ) -> geoopt.ManifoldTensor:
        """Random points with respect to the uniform (rotation-invariant) measure.

        Args:
            size: Shape of the result, as numbers or as one tuple.
            dtype: Type of the result.
            device: Device of the result.
            generator: Source of randomness; the global one if left out.

        Returns:
            A :class:`geoopt.ManifoldTensor` of points; a plain tensor inside a transform of ``torch.func``.

        Raises:
            ValueError: If the shape does not fit the manifold.
            TypeError: If the type is not one of real floating-point numbers.
        """
        shape = flat_shape(size)
        self._assert_check_shape(shape, "x")
        require_real(dtype or torch.get_default_dtype(), f"what to draw from {self.name}")
        gaussian = torch.randn(shape, dtype=dtype, device=device, generator=generator)
        return self._tensor(self.uniform(gaussian).contiguous())  # QR works column by column

    def random_uniform(self, *size: int | tuple[int, ...], **kwargs: Any) -> geoopt.ManifoldTensor:
        """Geoopt's name for :meth:`random`."""
        return self.random(*size, **kwargs)

    @takes_real_tensors
    def uniform(self, gaussian: Tensor) -> Tensor:
        """Map Gaussian matrices to uniformly distributed points."""
        return self.projx(gaussian)

    def origin(
        self,
        *size: int | tuple[int, ...],
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        seed: int | None = 42,
    ) -> geoopt.ManifoldTensor:
        """A canonical point: ones on the diagonal (of a vector: in the first place), projected.

        In a product every component is its canonical point; entries without a constraint are zero.

        Args:
            size: Shape of the result, as numbers or as one tuple.
            dtype: Type of the result.
            device: Device of the result.
            seed: Ignored, because the point is not random; Geoopt's signature includes it.

        Returns:
            A :class:`geoopt.ManifoldTensor` of equal components.

        Raises:
            ValueError: If the shape does not fit the manifold.
            TypeError: If the type is not one of real floating-point numbers.
        """
        shape = flat_shape(size)
        self._assert_check_shape(shape, "x")
        return self._tensor(self._origin(torch.zeros(shape, dtype=dtype, device=device)).contiguous())

    def _origin(self, zero: Tensor) -> Tensor:
        """The canonical point in the shape of a zero tensor; it may overwrite this tensor."""
        diagonal = zero.diagonal(dim1=-2, dim2=-1) if self.ndim > 1 else zero[..., 0]
        diagonal.fill_(1)
        return self.projx(zero)

    def _tensor(self, point: Tensor) -> geoopt.ManifoldTensor:
        build: Any = geoopt.ManifoldTensor  # its constructor has no usable annotation
        if torch._C._functorch.is_functorch_wrapped_tensor(point):  # pyright: ignore
            return cast(geoopt.ManifoldTensor, point)
        return build(point, manifold=self)

    # -- checks ----------------------------------------------------------------------------------------------

    def check_point(self, x: Tensor, *, explain: bool = False) -> Any:
        """Geoopt's check of a tensor's shape, with TypeError for a type that is not real floating point."""
        require_real(x.dtype, f"a point of {self.name}")
        return super().check_point(x, explain=explain)

    def check_vector(self, u: Tensor, *, explain: bool = False) -> Any:
        """Geoopt's check of a tensor's shape, with TypeError for a type that is not real floating point."""
        require_real(u.dtype, f"a vector of {self.name}")
        return super().check_vector(u, explain=explain)

    def assert_check_point(self, x: Tensor) -> None:
        """Raise if a tensor cannot be a point, by its shape (ValueError) or its type (TypeError)."""
        require_real(x.dtype, f"a point of {self.name}")
        super().assert_check_point(x)

    def assert_check_vector(self, u: Tensor) -> None:
        """Raise if a tensor cannot be a vector, by its shape (ValueError) or its type (TypeError)."""
        require_real(u.dtype, f"a vector of {self.name}")
        super().assert_check_vector(u)

    def _check_shape(self, shape: tuple[int, ...], name: str) -> tuple[bool, str | None]:
        reason = self._shape_problem(tuple(shape))
        return (True, None) if reason is None else (False, f"`{name}` of shape {tuple(shape)}: {reason}")

    def _shape_problem(self, shape: tuple[int, ...]) -> str | None:
        if len(shape) < self.ndim:
            return f"{self.name} needs at least {self.ndim} dimensions"
        if 0 in shape[len(shape) - self.ndim :]:
            return f"components of size {shape[-self.ndim :]} have no entries"
        return None

    def _check_point_on_manifold(self, x: Tensor, *, atol: float = 1e-5, rtol: float = 1e-5) -> tuple[bool, str | None]:
        worst = self.violation(x.detach())
        tolerance = max(atol + rtol, _rounding(x))
        if bool((worst <= tolerance).all()):
            return True, None
        return False, (
            f"largest relative constraint violation {float(worst.max()):.3g} exceeds {tolerance:.3g}; "
            "project with projx (or ManifoldParameter.proj_) first"
        )

    def _check_vector_on_tangent(
        self, x: Tensor, u: Tensor, *, atol: float = 1e-5, rtol: float = 1e-5
    ) -> tuple[bool, str | None]:
        x, u = x.detach(), u.detach()
        normal = self.norm(x, u - self.proju(x, u))
        rtol = max(rtol, _rounding(x), _rounding(u))
        if bool((normal <= atol + rtol * self.norm(x, u)).all()):
            return True, None
        return False, (
            f"the normal part has norm {float(normal.max()):.3g}, with atol={atol:.3g}, rtol={rtol:.3g}; "
            "project with proju first"
        )

    def require_point(self, x: Tensor, what: str, remedy: str) -> None:
        """Raise if rounding and drift cannot explain the distance of a tensor from the manifold.

        Args:
            x: Tensor of the manifold's shape.
            what: Its name, for the message.
            remedy: The remedy, for the message.

        Raises:
            ValueError: If an entry is not finite, or the relative constraint violation exceeds 1e-3 (half precision: 16
                units of rounding).
            TypeError: If the tensor is complex or holds integers.
        """
        require_real(x.dtype, what)
        if x.numel() == 0:
            return
        require_finite(x, what, DAMAGED)
        tolerance = point_tolerance(x.dtype)
        worst = float(self.violation(x).max())
        if not worst <= tolerance:
            raise ValueError(
                f"{what} does not lie on its {self}: relative constraint violation {worst:.3g}, expected at most "
                f"{tolerance:.3g}; {remedy}"
            )

    def _require_projectable(self, x: Tensor) -> None:
        """Raise ValueError if a tensor is not finite or, outside of torch.compile, if no point has its shape."""
        problem = None if torch.compiler.is_compiling() else self._shape_problem(tuple(x.shape))
        if problem is not None:
            raise ValueError(f"{self.name}.projx: `x` of shape {tuple(x.shape)}: {problem}")
        require_finite(x, f"the argument of {self.name}.projx")


_SMALLEST_RADIUS, _LARGEST_RADIUS = 1e-12, 1e12

_FIXED_IN_PRODUCTS = {  # and what to do instead of assigning it
    "radius": "call set_radius of the product",
    "retraction": "register a class of manifolds that has it, by fgo_geo.register_kind",
}


def require_constant_radius(radius: object, name: str) -> None:
    """Raise ValueError for a trainable radius, because a manifold keeps a constant copy.

    Args:
        radius: The radius.
        name: Name of the manifold, for the message.
    """
    if isinstance(radius, Tensor) and (radius.requires_grad or isinstance(radius, nn.Parameter)):
        what = "requires a gradient" if radius.requires_grad else "is a Parameter"
        raise ValueError(
            f"{name}: the radius {what}, but a manifold keeps a constant copy of it; pass radius.detach(), or keep "
            "radius 1 and multiply the weight by a parameter in the forward pass"
        )


class ComponentManifold(EmbeddedManifold):
    """An embedded manifold scaled by a radius, which contains one component.

    Args:
        radius: Number between 1e-12 and 1e12 (beyond, squares of lengths overflow or vanish in single precision), or a
            tensor of such numbers that broadcasts over the leading (component) dimensions of the points. The attribute
            ``radius`` can be assigned later.

    Raises:
        ValueError: If a radius, here or assigned, is out of range, empty, or requires a gradient.
        AttributeError: If radius or retraction of a part of a :class:`~fgo_geo.ProductOfGroups` are assigned.
        TypeError: If the radius is neither a real number nor a floating-point tensor.
    """

    __scaling__ = EmbeddedManifold.__scaling__.copy()

    radius: float | Tensor
    is_part = False  # of a product, which caches results that depend on the radii

    def __init__(self, radius: float | Tensor = 1.0) -> None:
        super().__init__()
        self.radius = radius

    def __setattr__(self, name: str, value: Any) -> None:
        """Check a radius when it is assigned. The caller must project the points."""
        if self.is_part and name in _FIXED_IN_PRODUCTS:
            raise AttributeError(
                f"{self.name}: this manifold is a part of a ProductOfGroups, so its {name} cannot be assigned, got "
                f"{value!r}; {_FIXED_IN_PRODUCTS[name]}"
            )
        if name == "radius":
            self._set_radius(value)
        else:
            super().__setattr__(name, value)

    def _set_radius(self, radius: Any) -> None:
        require_constant_radius(radius, self.name)
        if isinstance(radius, Tensor) and radius.ndim == 0:
            radius = radius.item()
        if isinstance(radius, Tensor):
            if not radius.is_floating_point():
                raise TypeError(f"{self.name}: radius must be floating point, got dtype {radius.dtype}; use .float()")
            radius = radius.detach().clone()
        elif isinstance(radius, Real) and not isinstance(radius, bool):
            radius = float(radius)
        else:
            raise TypeError(f"{self.name}: radius must be a real number or a tensor, got {radius!r}")
        smallest, largest = _range(radius)
        if not (smallest >= _SMALLEST_RADIUS and largest <= _LARGEST_RADIUS):
            raise ValueError(
                f"{self.name}: radius must be positive and finite, got values in [{smallest}, {largest}]; supported "
                f"are {_SMALLEST_RADIUS:g} to {_LARGEST_RADIUS:g}, beyond which squares of lengths overflow or vanish "
                "in float32: scale the weight in the forward pass instead"
            )
        if hasattr(self, "radius"):  # torch stores a buffer and a number in different places
            del self.radius
        if isinstance(radius, Tensor):
            # Not persistent: a radius is configuration, not state.
            self.register_buffer("radius", radius, persistent=False)
            self._range_of_tensor = smallest, largest
        else:
            super().__setattr__("radius", radius)

    @property
    def radius_range(self) -> tuple[float, float]:
        """Smallest and largest radius, at the time of assignment."""
        if isinstance(self.radius, Tensor):
            return self._range_of_tensor
        return self.radius, self.radius

    def radius_for(self, x: Tensor) -> float | Tensor:
        """The radius in the form in which it multiplies points of the shape, type and device of ``x``."""
        if not isinstance(self.radius, Tensor):
            return self.radius
        radius = self.radius.to(device=x.device, dtype=x.dtype)
        return radius[(..., *(None,) * self.ndim)]

    def _shape_problem(self, shape: tuple[int, ...]) -> str | None:
        problem = super()._shape_problem(shape)
        if problem is not None or not isinstance(self.radius, Tensor):
            return problem
        batch = shape[: -self.ndim]
        try:
            fits = torch.broadcast_shapes(self.radius.shape, batch) == torch.Size(batch)
        except RuntimeError:
            fits = False
        if fits:
            return None
        return f"the radius of shape {tuple(self.radius.shape)} does not broadcast over the leading dimensions {batch}"

    # -- for optimisers -----------------------------------------------------------------------------------------

    @property
    def curvature_bound(self) -> float | Tensor:
        """Upper bound on the sectional curvature, per component: ``1 / r²``, in the shape of the radius."""
        return self.radius**-2

    @__scaling__(ScalingInfo.NotCompatible)  # the bound would have to shrink with the wrapper's scale
    def retract_bounded(self, x: Tensor, u: Tensor, bound: float | None, scale: float = 1.0) -> Tensor:
        """The retraction along a multiple of ``u``, given a bound on the length of the step relative to the radius.

        Optimisers that know a bound on their step pass it, and some manifolds use it to choose a faster method.

        Args:
            x: Points.
            u: Tangent vectors at ``x``.
            bound: Bound on ``scale ‖u‖ / r`` per component, or None if there is none.
            scale: Factor of ``u``.

        Returns:
            ``retr(x, scale u)`` up to rounding.
        """
        if not u.is_floating_point():  # `scale * u` would be
            require_real(u.dtype, f"an argument of {self.name}.retract_bounded")
        return self.retr(x, scale * u)

    def extra_repr(self) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The radius, or its range."""
        if not isinstance(self.radius, Tensor):
            return f"radius={self.radius:g}"
        low, high = self.radius_range
        return f"radius={low:g}..{high:g} of shape {tuple(self.radius.shape)}"


def _range(radius: float | Tensor) -> tuple[float, float]:
    if not isinstance(radius, Tensor):
        return radius, radius
    if radius.numel() == 0:
        return math.nan, math.nan
    low, high = torch.aminmax(radius)
    return float(low), float(high)


def point_tolerance(dtype: torch.dtype) -> float:
    """The largest relative constraint violation that a point may have."""
    return max(1e-3, 16 * torch.finfo(dtype).eps)


def _rounding(x: Tensor) -> float:
    """Relative error of a point that is rounded to its type: no check can require less."""
    return 2 * torch.finfo(x.dtype).eps


def flat_shape(size: tuple[int | tuple[int, ...], ...]) -> tuple[int, ...]:
    """The shape from the arguments of ``f(2, 3)`` or ``f((2, 3))``."""
    first = size[0] if len(size) == 1 else size
    return tuple(first) if isinstance(first, tuple) else (first,)  # type: ignore[arg-type]
