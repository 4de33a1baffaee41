r"""Slow oracles: one component at a time, numpy in float64, loops, and nothing from the package.

Every component manifold is a level set of quadratic forms: ``‖x‖² = r²`` (sphere), ``‖x_j‖² = r²`` for every column
(oblique), ``<x_i, x_j> = r² δ_ij`` for every pair of columns (Stiefel). From the symmetric bilinear forms ``q`` alone
follow, by the definition of an embedded submanifold and dense linear algebra,

* the normal space, spanned by the gradients of the forms, and both orthogonal projections (least squares);
* the second fundamental form ``II(u, v) = -J⁺ q(u, v)``, where ``J = q(x, ·)``;
* geodesics ``x'' = II(x', x')`` and parallel transport ``v' = II(x', v)`` (a Runge-Kutta method);
* sectional curvature (the equation of Gauss).

Only the nearest point is specific to a manifold.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import mpmath
import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Quadric:
    """The submanifold ``q(x, x) = r² level`` of the space of vectors or matrices."""

    forms: Callable[[Array, Array], Array]
    level: Callable[[Array], Array]
    nearest: Callable[[Array, float], Array]

    def violation(self, x: Array, radius: float) -> float:
        """Largest ``|q(x, x) / r² - level|``."""
        return float(np.abs(self.forms(x, x) / radius**2 - self.level(x)).max())

    def jacobian(self, x: Array) -> Array:
        """Rows span the normal space at ``x``."""
        columns = []
        for k in range(x.size):
            unit = np.zeros(x.size)
            unit[k] = 1
            columns.append(self.forms(x, unit.reshape(x.shape)))
        return np.stack(columns, axis=1)

    def normal(self, x: Array, u: Array) -> Array:
        """Projection onto the normal space."""
        rows = self.jacobian(x)
        coefficients = np.linalg.lstsq(rows.T, u.ravel(), rcond=None)[0]
        return (rows.T @ coefficients).reshape(x.shape)

    def tangent(self, x: Array, u: Array) -> Array:
        """Projection onto the tangent space."""
        return u - self.normal(x, u)

    def bend(self, x: Array, u: Array, *others: Array) -> Array:
        """Second fundamental form of ``u`` and every other vector, stacked."""
        right = np.stack([self.forms(u, v) for v in others], axis=1)
        return -np.linalg.lstsq(self.jacobian(x), right, rcond=None)[0].T.reshape(-1, *x.shape)

    def curvature(self, x: Array, u: Array, v: Array) -> float:
        """Sectional curvature of the plane of two tangent vectors."""
        u = u / np.linalg.norm(u)
        v = v - np.vdot(u, v) * u
        v = v / np.linalg.norm(v)
        mixed = self.bend(x, u, v)
        return float(np.vdot(self.bend(x, u, u), self.bend(x, v, v)) - np.vdot(mixed, mixed))

    def geodesic(self, x: Array, u: Array, v: Array, steps: int = 100) -> tuple[Array, Array]:
        """End of the geodesic from ``x`` with velocity ``u`` at time one, and ``v`` transported there in parallel."""

        def derivative(state: Array) -> Array:
            at, velocity, carried = state
            return np.stack([velocity, *self.bend(at, velocity, velocity, carried)])

        h = 1 / steps
        state = np.stack([x, u, v])
        for _ in range(steps):
            k1 = derivative(state)
            k2 = derivative(state + h / 2 * k1)
            k3 = derivative(state + h / 2 * k2)
            k4 = derivative(state + h * k3)
            state = state + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        return state[0], state[2]


def polar(x: Array) -> Array:
    """Orthonormal polar factor ``x (xᵀx)^(-1/2)`` of a matrix of full column rank, through an eigendecomposition."""
    values, vectors = np.linalg.eigh(x.T @ x)
    return x @ vectors @ np.diag(values**-0.5) @ vectors.T


def gram_schmidt(x: Array) -> Array:
    """Orthonormal columns with the same flag of spans and positive diagonal of R, by modified Gram-Schmidt, twice."""
    q = x.copy()
    for _ in range(2):
        for j in range(x.shape[1]):
            for i in range(j):
                q[:, j] -= (q[:, i] @ q[:, j]) * q[:, i]
            q[:, j] /= np.sqrt(q[:, j] @ q[:, j])
    return q


def angle(x: Array, y: Array) -> float:
    """Angle between two vectors, to 50 digits."""
    with mpmath.workdps(50):
        a, b = ([mpmath.mpf(float(value)) for value in vector.ravel()] for vector in (x, y))
        product = mpmath.fdot(a, b) / mpmath.sqrt(mpmath.fdot(a, a) * mpmath.fdot(b, b))
        return float(mpmath.acos(min(mpmath.mpf(1), max(mpmath.mpf(-1), product))))


def rotation_distance(x: Array, y: Array) -> float:
    """Geodesic distance of two orthogonal matrices of equal determinant: the norm of all angles of ``xᵀy``."""
    return float(np.linalg.norm(np.angle(np.linalg.eigvals(x.T @ y))))


def _columns(x: Array) -> range:
    return range(x.shape[1])


def _pairs(x: Array) -> list[tuple[int, int]]:
    return [(i, j) for i in _columns(x) for j in range(i + 1)]


SPHERE = Quadric(
    forms=lambda u, v: np.array([np.vdot(u, v)]),
    level=lambda x: np.ones(1),
    nearest=lambda x, radius: radius * x / np.linalg.norm(x),
)

OBLIQUE = Quadric(
    forms=lambda u, v: np.array([u[:, j] @ v[:, j] for j in _columns(u)]),
    level=lambda x: np.ones(x.shape[1]),
    nearest=lambda x, radius: np.stack([radius * x[:, j] / np.linalg.norm(x[:, j]) for j in _columns(x)], axis=1),
)

ROWS = Quadric(
    forms=lambda u, v: np.array([a @ b for a, b in zip(u, v, strict=True)]),
    level=lambda x: np.ones(len(x)),
    nearest=lambda x, radius: np.stack([radius * row / np.linalg.norm(row) for row in x]),
)

STIEFEL = Quadric(
    forms=lambda u, v: np.array([(u[:, i] @ v[:, j] + u[:, j] @ v[:, i]) / 2 for i, j in _pairs(u)]),
    level=lambda x: np.array([float(i == j) for i, j in _pairs(x)]),
    nearest=lambda x, radius: radius * polar(x),
)
