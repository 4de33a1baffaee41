"""Parameters of every kind that an optimiser meets, gradients for them, and options to run it with."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import geoopt
import torch
from torch import Tensor, nn

from fgo_geo import Oblique, RiemannianFGSGD, ScaledSphere, Stiefel
from fgo_geo.grouping import collection
from fgo_geo.manifolds import ProductOfGroups

KNEE = math.sqrt(2) - 1
MOMENTA = [
    {"momentum": 0.0},
    {"momentum": 0.9},
    {"momentum": 0.8, "dampening": 0.3},
    {"momentum": 0.9, "nesterov": True},
]
STEP_SIZES = [
    {},
    {"rho": 0.3, "curvature": 5.0},
    {"rho": 0.05, "curvature": "manifold"},
    {"step_size": "constant"},
]


def on(
    manifold: geoopt.Manifold, *shape: int, seed: int = 0, dtype: torch.dtype = torch.float64
) -> geoopt.ManifoldParameter:
    """A random parameter on one of our manifolds."""
    generator = torch.Generator().manual_seed(seed)
    return geoopt.ManifoldParameter(manifold.random(*shape, dtype=dtype, generator=generator))


def plain(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Parameter:
    return nn.Parameter(normal(shape, seed, dtype))


def normal(shape: Sequence[int], seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def set_gradients(params: Iterable[Tensor], seed: int, scale: float = 1.0) -> None:
    for number, param in enumerate(params):
        param.grad = scale * normal(param.shape, 1000 * seed + number, param.dtype)


def run(optimizer: torch.optim.Optimizer, steps: int, first_seed: int = 1, scale: float = 1.0) -> None:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for step in range(steps):
        set_gradients(params, first_seed + step, scale)
        optimizer.step()


def values(params: Iterable[Tensor]) -> list[Tensor]:
    return [p.detach().clone() for p in params]


def assert_same(actual: Iterable[Tensor], expected: Iterable[Tensor]) -> None:
    """Bit for bit."""
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.detach(), e.detach(), rtol=0, atol=0)


def network() -> list[Tensor]:
    """One parameter of every kind that the optimiser treats in its own way, many of them stacked."""
    return [
        on(ScaledSphere(0.5, ndim=2), 3, 2, 3, 3, seed=1),
        on(ScaledSphere(0.5, ndim=2), 4, 3, 3, seed=2),
        on(Oblique(), 5, 3, seed=3),
        on(Stiefel(2.0), 2, 5, 3, seed=4),
        on(Stiefel(2.0), 5, 3, seed=5),
        on(ProductOfGroups(collection(4, 3, "pio", ("sphere", "stiefel", "euclidean")), (4, 3, 3, 3)), 4, 3, 3, 3),
        plain(6, seed=6),
        plain(2, 3, seed=7),
    ]


def geoopt_manifolds() -> dict[str, tuple[geoopt.Manifold, tuple[int, ...]]]:
    """Every manifold of Geoopt with a shape, in double precision (its constructors write into their arguments)."""

    def one() -> Tensor:
        return torch.tensor(1.0, dtype=torch.float64)

    return {
        "BirkhoffPolytope": (geoopt.BirkhoffPolytope(), (2, 4, 4)),
        "BoundedDomain": (geoopt.BoundedDomain(), (2, 3, 3)),
        "Lorentz": (geoopt.Lorentz(one()), (5, 4)),
        "PoincareBall": (geoopt.PoincareBall(one()), (5, 3)),
        "PoincareBallExact": (geoopt.PoincareBallExact(one()), (5, 3)),
        "ProductManifold": (
            geoopt.ProductManifold((geoopt.Sphere(), 3), (geoopt.Lorentz(one()), 4), (geoopt.Stiefel(), (4, 2))),
            (2, 15),
        ),
        "ProductManifold of ours": (geoopt.ProductManifold((ScaledSphere(2.0), 3), (Stiefel(0.5), (4, 2))), (2, 11)),
        "Scaled": (geoopt.Scaled(geoopt.Sphere(), 2.0), (5, 4)),
        "Scaled of ours": (geoopt.Scaled(Oblique(), 2.0), (2, 5, 3)),
        "Sphere": (geoopt.Sphere(), (5, 4)),
        "SphereExact": (geoopt.SphereExact(), (5, 4)),
        "SphereProjection": (geoopt.SphereProjection(one()), (5, 3)),
        "SphereProjectionExact": (geoopt.SphereProjectionExact(one()), (5, 3)),
        "Stereographic": (geoopt.Stereographic(-one()), (5, 3)),
        "StereographicExact": (geoopt.StereographicExact(-one()), (5, 3)),
        "StereographicProductManifold": (
            geoopt.StereographicProductManifold((geoopt.PoincareBall(one()), 3), (geoopt.SphereProjection(one()), 2)),
            (2, 5),
        ),
        "Stiefel canonical": (geoopt.CanonicalStiefel(), (2, 5, 3)),
        "Stiefel euclidean": (geoopt.EuclideanStiefel(), (2, 5, 3)),
        "Stiefel exact": (geoopt.EuclideanStiefelExact(), (2, 5, 3)),
        "SymmetricPositiveDefinite": (geoopt.SymmetricPositiveDefinite(), (2, 3, 3)),
        "UpperHalf": (geoopt.UpperHalf(), (2, 3, 3)),
    }


def draw_geoopt(manifold: geoopt.Manifold, *shape: int) -> Tensor:
    """A random point; some manifolds of Geoopt have no ``random``."""
    if isinstance(manifold, geoopt.ProductManifold):
        factors = zip(manifold.manifolds, manifold.shapes, strict=True)
        return manifold.pack_point(*(draw_geoopt(factor, *shape[:-1], *size) for factor, size in factors))
    draw = manifold.random_normal if isinstance(manifold, geoopt.Lorentz) else manifold.random
    return draw(*shape, dtype=None if isinstance(manifold, SIEGEL) else torch.float64).detach()


SIEGEL = (geoopt.UpperHalf, geoopt.BoundedDomain)


def on_geoopt(manifold: geoopt.Manifold, *shape: int, seed: int = 0) -> geoopt.ManifoldParameter:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return geoopt.ManifoldParameter(torch.as_tensor(draw_geoopt(manifold, *shape)), manifold=manifold)


def train_apart(params: list[Tensor], optimizers: list[RiemannianFGSGD], schedule: Sequence[Sequence[int]]) -> None:
    """In step ``t`` only the parameters ``schedule[t]`` have a gradient."""
    for t, present in enumerate(schedule):
        set_gradients(params, t + 1)
        for number, param in enumerate(params):
            if number not in present:
                param.grad = None
        for optimizer in optimizers:
            optimizer.step()
