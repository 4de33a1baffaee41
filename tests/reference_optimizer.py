r"""FG-SGD, slowly: an oracle that shares no line with the package.

Written from the formulas of [Ozay2019]_, algorithm 1 ("Mathematics", sections 2 and 4) in numpy's float64. Every
component of every parameter is visited in a Python loop, nothing is stacked, and momentum is transported at the end of
a step, where the package does so at the start of the next one.

Two formulas differ on purpose from those of the package: the polar factor comes from a singular value decomposition,
and the exponential map of the Stiefel manifold is ``expm(v xᵀ - x vᵀ) x expm(-xᵀ v)`` with matrices of the long side
(Hüper, Markina and Silva Leite 2021).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Index = tuple[int | slice, ...]


class Geometry(Protocol):
    """What one component lives on."""

    radius: float
    curvature: float

    def project(self, x: Array, u: Array) -> Array: ...
    def retract(self, x: Array, u: Array) -> Array: ...
    def exponential(self, x: Array, u: Array) -> Array: ...


class Flat:
    """All of the space."""

    radius = 1.0
    curvature = 0.0

    def project(self, x: Array, u: Array) -> Array:
        return u

    def retract(self, x: Array, u: Array) -> Array:
        return x + u

    exponential = retract


class Sphere:
    """Arrays of Frobenius norm ``r``."""

    def __init__(self, radius: float) -> None:
        self.radius = radius
        self.curvature = 1 / radius**2

    def project(self, x: Array, u: Array) -> Array:
        return u - np.sum(x * u) / self.radius**2 * x

    def retract(self, x: Array, u: Array) -> Array:
        return self.radius * (x + u) / math.sqrt(np.sum((x + u) ** 2))

    def exponential(self, x: Array, u: Array) -> Array:
        length = math.sqrt(np.sum(u**2))
        if length == 0:
            return x
        angle = length / self.radius
        return math.cos(angle) * x + self.radius / length * math.sin(angle) * u


class Oblique:
    """Matrices whose columns lie on spheres."""

    def __init__(self, radius: float) -> None:
        self.column = Sphere(radius)
        self.radius = radius
        self.curvature = self.column.curvature

    def _columns(self, operation: str, x: Array, u: Array) -> Array:
        apply = getattr(self.column, operation)
        return np.stack([apply(x[:, j], u[:, j]) for j in range(x.shape[1])], axis=1)

    def project(self, x: Array, u: Array) -> Array:
        return self._columns("project", x, u)

    def retract(self, x: Array, u: Array) -> Array:
        return self._columns("retract", x, u)

    def exponential(self, x: Array, u: Array) -> Array:
        return self._columns("exponential", x, u)


class Stiefel:
    """Matrices with ``xᵀx = r² I``."""

    def __init__(self, radius: float, retraction: str = "polar") -> None:
        self.radius = radius
        self.curvature = 1 / radius**2
        self.retraction = retraction

    def project(self, x: Array, u: Array) -> Array:
        product = x.T @ u
        return u - x @ (product + product.T) / (2 * self.radius**2)

    def retract(self, x: Array, u: Array) -> Array:
        if self.retraction == "qr":
            q, r = np.linalg.qr(x + u)
            return self.radius * q * np.sign(np.diag(r))
        left, _, right = np.linalg.svd(x + u, full_matrices=False)
        return self.radius * left @ right

    def exponential(self, x: Array, u: Array) -> Array:
        x, v = x / self.radius, u / self.radius
        return self.radius * _rotation(v @ x.T - x @ v.T) @ x @ _rotation(-x.T @ v)


def _rotation(skew: Array) -> Array:
    """The matrix exponential of a skew-symmetric matrix, from its (imaginary) eigenvalues."""
    values, vectors = np.linalg.eigh(1j * skew)
    return np.real(vectors * np.exp(-1j * values) @ vectors.conj().T)


@dataclass
class Parameter:
    """An array cut into components; components with equal group numbers share a step size."""

    x: Array
    components: list[tuple[Index, Geometry, int]]
    buffer: Array | None = None
    scales: list[float] = field(default_factory=list)


def batch_of_components(x: Array, ndim: int, geometry: type, radius: float | Array = 1.0) -> Parameter:
    """A parameter whose last ``ndim`` dimensions form one component; all components are one group."""
    batch = x.shape[: x.ndim - ndim]
    radii = np.broadcast_to(np.asarray(radius, dtype=np.float64), batch)
    return Parameter(x.copy(), [(index, geometry(float(radii[index])), 0) for index in _indices(batch)])


def _indices(shape: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    return itertools.product(*map(range, shape))


def scale(norm: float, rho: float, curvature: float) -> float:
    """The divisor τ of algorithm 1."""
    gamma_2 = max((2 * rho + norm) ** 2, 1 + curvature * (rho + norm))
    gamma_1 = norm**2 * gamma_2
    return math.sqrt(max(1.0, gamma_1))


def step(
    parameter: Parameter,
    grad: Array,
    *,
    lr: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
    step_size: str = "theorem",
    rho: float = 1.0,
    curvature: float | str | None = None,
    radius_invariant: bool = False,
    update: str = "retraction",
) -> None:
    """One step of algorithm 1, in place.

    Weight decay enters the gradient of every component: that it has no effect on spheres, oblique and Stiefel
    manifolds is for the projection to show. Momentum, dampening and Nesterov follow torch.optim.SGD.
    """
    x, components = parameter.x, parameter.components
    grad = (-grad if maximize else grad) + weight_decay * x

    # Lines 4-5: the Riemannian gradient, and its norm per group, on the manifold of radius one if so wished.
    riemannian = np.zeros_like(x)
    unit = {index: geometry.radius if radius_invariant else 1.0 for index, geometry, _ in components}
    squared: dict[int, float] = {}
    bound: dict[int, float] = {}
    for index, geometry, group in components:
        riemannian[index] = geometry.project(x[index], grad[index])
        squared[group] = squared.get(group, 0.0) + np.sum((unit[index] * riemannian[index]) ** 2)
        own = geometry.curvature * unit[index] ** 2
        bound[group] = max(bound.get(group, 0.0), own)

    # Line 6: the divisor of the learning rate.
    scales: dict[int, float] = {}
    for group in sorted(squared):
        c = 1.0 if curvature is None else bound[group] if curvature == "manifold" else float(curvature)
        scales[group] = scale(math.sqrt(squared[group]), rho, c) if step_size == "theorem" else 1.0
    parameter.scales = list(scales.values())

    for index, _, group in components:
        riemannian[index] *= unit[index] ** 2 / scales[group]

    # Lines 8-9: momentum, and the move.
    direction = riemannian
    if momentum != 0:
        if parameter.buffer is None:
            parameter.buffer = riemannian
        else:
            parameter.buffer = momentum * parameter.buffer + (1 - dampening) * riemannian
        direction = riemannian + momentum * parameter.buffer if nesterov else parameter.buffer
    for index, geometry, _ in components:
        move = geometry.retract if update == "retraction" else geometry.exponential
        x[index] = move(x[index].copy(), -lr * direction[index])

    # Transport at the end of the step.
    if parameter.buffer is not None:
        transported = np.zeros_like(x)
        for index, geometry, _ in components:
            transported[index] = geometry.project(x[index], parameter.buffer[index])
        parameter.buffer = transported
