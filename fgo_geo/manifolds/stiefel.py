r"""The Stiefel manifold with a radius and the Euclidean metric.

Points are ``r`` times matrices with orthonormal columns. In the formulas ``q = x / r`` is the point on the unit
manifold and ``v = u / r`` the tangent vector there ("Mathematics", section 2; [Edelman1998]_, section 2). There are
three retractions:

* *polar*, ``r y (yᵀy)^{-1/2}`` with ``y = q + v``: the metric projection, second order, the default. For a tangent
  ``v`` the Gram matrix is ``yᵀy = I + vᵀv``, so a bound on the step bounds its spectrum from both sides and
  :meth:`Stiefel.retract_bounded` needs matrix products only;
* *QR* with positive diagonal: first order;
* the *exponential map*, in closed form through a ``2B x 2B`` matrix exponential.

Products that compute points have full float32 precision for every setting of ``torch.set_float32_matmul_precision``.
The tangent projection follows the setting: TF32 and bfloat16 leave a small normal part, which the retraction corrects.
"""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import torch
from geoopt.manifolds.base import ScalingInfo
from torch import Tensor

from fgo_geo.linalg import (
    Use,
    Workspace,
    frobenius_norm,
    gram_excess,
    inner_sum,
    inverse_root_gap,
    polar_factor,
    polar_factor_and_range,
    polish,
    qr_factor,
    reads_for_free,
    small_product,
    subtract_part,
    subtract_product,
    takes_full_products,
    takes_real_tensors,
)
from fgo_geo.manifolds import sphere, stiefel_geodesics
from fgo_geo.manifolds.embedded import ComponentManifold
from fgo_geo.weights.kinds import Kind, register

__all__ = ["Stiefel"]

Retraction = Literal["polar", "qr"]


def project_tangent(x: Tensor, u: Tensor, radius: float | Tensor = 1.0) -> Tensor:
    """Tangent projection, ``u - x sym(xᵀu) / r²`` ([Edelman1998]_, eq. 2.4)."""
    along = small_product(x.mT, u)
    twice = along + along.mT
    if isinstance(radius, Tensor):
        return subtract_product(u, x, twice / (2 * radius**2))
    return subtract_product(u, x, twice, alpha=0.5 / radius**2)


# Rounding in the Gram matrix of y grows with the square of the bound.
_DRIFT = 2e-3  # of xᵀx / r², the most that an optimiser accepts (EmbeddedManifold.require_point)
_POLISH_BOUND = 1.0  # beyond, the result is polished
_LARGEST_BOUND = 100.0  # beyond, the Gram matrix is too ill-conditioned for single precision


_RUNGS = (*(4.0**k for k in range(-12, 7)), _LARGEST_BOUND**2)


def _rung(squared: float) -> float:
    """A slightly larger bound, one of a few values.

    Inside ``torch.compile`` a number that changes is a symbol, which cannot determine a number of iterations. The
    values of this function are constants, and torch compiles a step once for each.
    """
    for rung in _RUNGS:
        if squared <= rung:
            return rung
    return math.inf


def wide_type(x: Tensor) -> torch.dtype:
    """Double precision, on devices that have it."""
    return x.dtype if x.device.type == "mps" else torch.float64


def _put(x: Tensor, out: Tensor | None) -> Tensor:
    """A tensor, written into the given memory if there is some."""
    return x if out is None else out.copy_(x)


class Stiefel(ComponentManifold):
    r"""The (scaled) Stiefel manifold ``{ x in R^{A x B} : xᵀx = r² I }``, ``A >= B``, over the last two dimensions.

    The metric is the Euclidean one. The component norm is ``r √B``; the sectional curvatures lie in
    ``[-1/(2r²), 1/r²]``.

    Args:
        radius: Positive number, or a tensor that broadcasts over the leading (component) dimensions.
        retraction: ``"polar"`` (second order, the nearest point) or ``"qr"`` (first order).

    Raises:
        ValueError: If the radius is not positive or the retraction, here or assigned, is unknown.

    Example:
        >>> stiefel = Stiefel(radius=2.0)
        >>> x = stiefel.origin(2, 2)
        >>> quarter_turn = torch.tensor([[0.0, -torch.pi], [torch.pi, 0.0]])
        >>> stiefel.expmap(x, quarter_turn).round(decimals=5) + 0.0
        tensor([[ 0., -2.],
                [ 2.,  0.]])
    """

    __scaling__ = ComponentManifold.__scaling__.copy()
    name = "Stiefel"
    ndim = 2

    def __init__(self, radius: float | Tensor = 1.0, retraction: Retraction = "polar") -> None:
        super().__init__(radius)
        self.retraction = retraction

    def __setattr__(self, name: str, value: Any) -> None:
        """Check a retraction when it is assigned, and a radius."""
        if name == "retraction" and value not in get_args(Retraction):
            raise ValueError(f'Stiefel: retraction must be "polar" or "qr", got {value!r}')
        super().__setattr__(name, value)

    def _shape_problem(self, shape: tuple[int, ...]) -> str | None:
        problem = super()._shape_problem(shape)
        if problem is not None:
            return problem
        if shape[-2] < shape[-1]:
            return f"Stiefel needs at least as many rows as columns, got {shape[-2]} x {shape[-1]}; transpose it"
        if shape[-2:] == (1, 1):
            return "a 1 x 1 Stiefel matrix is an isolated point, so nothing could move; use geoopt.Euclidean"
        return None

    @takes_real_tensors
    @takes_full_products
    def violation(self, x: Tensor) -> Tensor:
        """Largest entry of ``| xᵀx / r² - I |``, per component."""
        return gram_excess(x / self.radius_for(x)).abs().amax((-2, -1))

    @takes_real_tensors
    @takes_full_products
    def projx(self, x: Tensor) -> Tensor:
        """Nearest point, ``r`` times the polar factor; rank-deficient matrices go to one of the nearest points.

        Args:
            x: Any finite tensor of the manifold's shape.

        Returns:
            Points on the manifold.

        Raises:
            ValueError: If ``x`` holds NaN or infinity, or a point cannot have its shape.
        """
        self._require_projectable(x)
        return self.radius_for(x) * polar_factor(x)

    @takes_real_tensors
    @takes_full_products
    def projx_and_range(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Nearest points, and an interval that holds the singular values of each matrix: ends of shape ``(...)``."""
        factor, low, high = polar_factor_and_range(x)
        return self.radius_for(x) * factor, low, high

    @takes_real_tensors
    @takes_full_products
    def uniform(self, gaussian: Tensor) -> Tensor:
        """Gaussian matrices to Haar-distributed points: the QR factor with positive diagonal."""
        return self.radius_for(gaussian) * qr_factor(gaussian)

    @takes_real_tensors
    def proju(self, x: Tensor, u: Tensor) -> Tensor:
        """Tangent projection, ``u - x sym(xᵀu) / r²``."""
        return project_tangent(x, u, self.radius_for(x))

    @takes_real_tensors
    @takes_full_products
    def retr(self, x: Tensor, u: Tensor) -> Tensor:
        """Retraction of the chosen kind, by a factorisation, for steps of any length."""
        factor = polar_factor if self.retraction == "polar" else qr_factor
        return self.radius_for(x) * factor(x + u)

    @takes_real_tensors
    @takes_full_products
    def retract_bounded(self, x: Tensor, u: Tensor, bound: float | None, scale: float = 1.0) -> Tensor:
        """The polar retraction by matrix products alone, in a number of iterations that follows from the bound.

        Where reading values costs no time (on the CPU, outside ``torch.compile``), the method measures the longest step
        of the batch and uses it instead of the bound, and the Gram matrix shows whether ``x`` is on the manifold. If
        ``x`` is off, or the step is longer than 100 radii, the method uses a factorisation.

        A component of size ``A x B`` costs two products with the long side (``4AB²`` flops; four for a bound above 1)
        and three products of size ``B`` per iteration. Up to ``‖u‖ <= 0.41 r`` three iterations are enough in single
        precision.

        Args:
            x: Points.
            u: Tangent vectors at ``x``.
            bound: Bound on ``scale ‖u‖ / r`` per component, or None if none is known.
            scale: Factor of ``u``.

        Returns:
            ``retr(x, scale u)`` up to rounding.
        """
        if self.retraction != "polar":
            return self.retr(x, scale * u)
        radius = self.radius_for(x)
        squared = math.inf if bound is None else bound**2
        y = torch.add(x, u, alpha=scale)
        if u.numel() > 0 and reads_for_free(u):
            explained = (inner_sum(u, u, (-2, -1)) * (scale / radius) ** 2).squeeze((-2, -1))
            return self.retract_measured(y, explained.detach(), squared)
        if torch.compiler.is_compiling():
            squared = _rung(squared)
        if not squared <= _LARGEST_BOUND**2:
            return radius * polar_factor(y)
        y = subtract_product(y, y, inverse_root_gap(gram_excess(y, radius), squared + _DRIFT))
        return y if squared <= _POLISH_BOUND**2 else radius * polish(y / radius)

    @__scaling__(ScalingInfo.NotCompatible)
    @takes_full_products
    def retract_measured(
        self,
        y: Tensor,
        explained: Tensor,
        squared: float = 1.0,
        memory: tuple[Workspace, Tensor] | None = None,
    ) -> Tensor:
        """The polar retraction of ``y = x + u``, where reading values costs no time.

        The method uses products if the step is not long and explains how far ``yᵀy / r²`` is from the identity;
        otherwise it uses a factorisation.

        Args:
            y: Points moved along tangent vectors, shape ``(..., A, B)``.
            explained: ``‖u‖² / r²`` per component, shape ``(...)``.
            squared: Bound on it, used if it is not a number.
            memory: Memory for temporaries (its purposes "excess" and "gap"), and where to put the result, which shares
                no memory with ``y``; fresh memory if left out.

        Returns:
            ``r y (yᵀy)^{-1/2}`` up to rounding.

        Example:
            >>> Stiefel().retract_measured(torch.tensor([[1.0], [0.75]]), torch.tensor(0.5625))
            tensor([[0.8000],
                    [0.6000]])
        """
        radius = self.radius_for(y)
        workspace, out = (None, None) if memory is None else memory
        longest = float(explained.amax())
        squared = squared if math.isnan(longest) else longest
        if not squared <= _LARGEST_BOUND**2:
            return _put(radius * polar_factor(y), out)
        excess, gap = (None, None) if workspace is None else (workspace.square(y, use) for use in (Use.EXCESS, Use.GAP))
        excess = gram_excess(y, radius, out=excess)
        distances = frobenius_norm(excess.detach())
        if bool((distances > explained + _DRIFT).any()):  # x was off the manifold, and the iteration may diverge
            return _put(radius * polar_factor(y), out)
        distance = float(distances.amax())
        gap = inverse_root_gap(excess, squared if math.isnan(distance) else distance, out=gap)
        if workspace is None or out is None:
            y = subtract_product(y, y, gap)
        else:
            y = subtract_part(y, gap, workspace, out=out)
        return y if squared <= _POLISH_BOUND**2 else _put(radius * polish(y / radius), out)

    @takes_real_tensors
    @takes_full_products
    def expmap(self, x: Tensor, u: Tensor) -> Tensor:
        """Exponential map, in closed form through a ``2B x 2B`` matrix exponential, in double precision.

        The method shortens vectors longer than 1e6 radii to that length, on a CPU with a warning, because rounding
        makes the end of a longer geodesic meaningless.
        """
        radius, wide = self.radius_for(x), wide_type(x)
        return radius * stiefel_geodesics.exponential(x.to(wide) / radius, u.to(wide) / radius).to(x.dtype)

    @takes_real_tensors
    @takes_full_products
    def logmap(self, x: Tensor, y: Tensor) -> Tensor:
        """Inverse of the exponential map, by shooting in double precision; in closed form if ``B`` is one or ``A``.

        Args:
            x: Points.
            y: Points.

        Returns:
            Tangent vectors at ``x``. Up to a distance of ``π r`` they belong to the shortest geodesic. Beyond that,
            several geodesics exist, and the result belongs to the one that the search finds.

        Raises:
            RuntimeError: If there is no geodesic (square matrices with determinants of opposite signs), or the search
                has not converged. The message names the pairs.
        """
        radius = self.radius_for(x)
        if x.shape[-1] == 1:
            return sphere.logarithm(x, y, radius, (-2, -1))
        wide = wide_type(x)
        q, target = polar_factor(x.to(wide)), polar_factor(y.to(wide))
        return radius * stiefel_geodesics.logarithm(q, target).to(x.dtype)

    def extra_repr(self) -> str:
        """Radius and retraction."""
        return f"{super().extra_repr()}, retraction={self.retraction}"


def _norms(rows: int, columns: int) -> tuple[float, float]:
    if rows < columns:
        raise ValueError(f"a stiefel component is {rows} x {columns}; expected rows >= columns: transpose it")
    return math.sqrt(columns), 1.0


register(
    Kind(
        "stiefel",
        Stiefel,
        Stiefel,
        norms=_norms,
        carry=lambda x, source, target, memory: target * polar_factor(x, memory),
        colour="#009e73",
        code=3,
        options=("retraction",),
        joins_filters=True,
        aliases=("st",),
    )
)
