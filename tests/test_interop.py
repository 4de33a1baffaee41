"""The table of docs/guides/geoopt.md: which manifold works under which optimiser or sampler. Every cell is run."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import geoopt
import pytest
import torch
from geoopt.optim import RiemannianAdam, RiemannianLineSearch, RiemannianSGD
from geoopt.samplers import RHMC, RSGLD, SGRHMC
from parameters import draw_geoopt, geoopt_manifolds
from torch import Tensor

from fgo_geo import Oblique, ProductOfGroups, RiemannianFGSGD, ScaledSphere, Stiefel, collection

GUIDE = Path(__file__).parents[1] / "docs" / "guides" / "geoopt.md"
PIO = collection(4, 3, "pio", ("sphere", "oblique", "stiefel", "euclidean"))
BLOCKS = collection(8, 6, "pio", ("sphere", "oblique", "stiefel", "euclidean"), components="block")

OURS: dict[str, tuple[geoopt.Manifold, tuple[int, ...]]] = {
    "ScaledSphere": (ScaledSphere(0.5, ndim=2), (4, 3, 3)),
    "Oblique": (Oblique(0.5), (2, 5, 3)),
    "Stiefel": (Stiefel(0.5), (2, 5, 3)),
    "ProductOfGroups of kernels": (ProductOfGroups(PIO, (4, 3, 3, 3), 0.5), (4, 3, 3, 3)),
    "ProductOfGroups of blocks": (ProductOfGroups(BLOCKS, (8, 6), 0.5), (8, 6)),
    "ProductOfGroups, exact=True": (ProductOfGroups(PIO, (4, 3, 3, 3), 0.5, exact=True), (4, 3, 3, 3)),
    "Scaled of ours": (geoopt.Scaled(Stiefel(0.5), 2.0), (2, 5, 3)),
    "Scaled of a product, exact=True": (
        geoopt.Scaled(ProductOfGroups(PIO, (4, 3, 3, 3), 0.5, exact=True), 2.0),
        (4, 3, 3, 3),
    ),
    "ProductManifold of ours": (
        geoopt.ProductManifold((ScaledSphere(2.0), 3), (Oblique(0.5), (4, 2)), (Stiefel(0.5), (4, 2))),
        (2, 19),
    ),
}
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "RiemannianFGSGD": lambda params: RiemannianFGSGD(params, lr=0.2, momentum=0.5),
    "RiemannianSGD": lambda params: RiemannianSGD(params, lr=0.1, momentum=0.5),
    "RiemannianAdam": lambda params: RiemannianAdam(params, lr=0.05),
    "RiemannianLineSearch": lambda params: RiemannianLineSearch(params),
}
SAMPLERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "RSGLD": lambda params: RSGLD(params, epsilon=2e-3),
    "RHMC": lambda params: RHMC(params, epsilon=1e-2, n_steps=3),
    "SGRHMC": lambda params: SGRHMC(params, epsilon=2e-3, n_steps=3, alpha=0.5),
}
SAMPLED = {"ProductOfGroups, exact=True": "works", "Scaled of a product, exact=True": "biased"}


def expected(manifold: str, column: str) -> str:
    return "works" if column in OPTIMIZERS else SAMPLED.get(manifold, "raises")


def start_and_target(manifold: geoopt.Manifold, shape: tuple[int, ...]) -> tuple[geoopt.ManifoldParameter, Tensor]:
    """Two points that are close enough for every component to get from one to the other."""
    generator = torch.Generator().manual_seed(0)
    target = manifold.projx(torch.randn(shape, dtype=torch.float64, generator=generator)).detach().as_subclass(Tensor)
    nearby = target + 0.2 * torch.randn(shape, dtype=torch.float64, generator=generator)
    return geoopt.ManifoldParameter(manifold.projx(nearby).as_subclass(Tensor), manifold=manifold), target


def require_on(manifold: geoopt.Manifold, x: Tensor) -> None:
    torch.testing.assert_close(manifold.projx(x.clone()).as_subclass(Tensor), x, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("column", OPTIMIZERS)
def test_optimisers_reach_a_minimum_on_our_manifolds(name: str, column: str) -> None:
    manifold, shape = OURS[name]
    param, target = start_and_target(manifold, shape)
    optimizer = OPTIMIZERS[column]([param])
    losses: list[float] = []

    def closure() -> float:
        optimizer.zero_grad()
        loss = (param - target).square().sum()
        loss.backward()
        losses.append(float(loss.detach()))
        return losses[-1]

    for _ in range(100):
        optimizer.step(closure)
        if losses[-1] < 1e-9:  # at the minimum itself Geoopt's line search divides by zero, on its own manifolds too
            break
    require_on(manifold, param.detach().as_subclass(Tensor))
    assert losses[-1] < 0.1 * losses[0]


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("column", SAMPLERS)
def test_samplers_move_towards_likely_points_or_refuse_the_manifold(name: str, column: str) -> None:
    manifold, shape = OURS[name]
    param, target = start_and_target(manifold, shape)
    if expected(name, column) == "raises":
        with pytest.raises(ValueError, match="do not implement reversible retraction"):
            SAMPLERS[column]([param])
        return
    torch.manual_seed(0)
    sampler = SAMPLERS[column]([param])

    def log_density() -> Tensor:
        return -50 * (param - target).square().sum()

    before = log_density().item()
    after = []
    for _ in range(60):
        sampler.step(log_density)
        after.append(log_density().item())
    require_on(manifold, param.detach().as_subclass(Tensor))
    assert len(set(after)) > 2
    if expected(name, column) == "works":
        assert sum(after[-20:]) / 20 > 0.6 * before


def test_geoopts_langevin_sampler_takes_the_factor_of_scaled_for_a_temperature() -> None:
    """Geoopt divides the step by the factor 2, but not the gradient by its square: the variance of N(0, 1) halves."""
    torch.manual_seed(0)
    variances = []
    for manifold in (geoopt.Euclidean(), geoopt.Scaled(geoopt.Euclidean(), 2.0)):
        x = geoopt.ManifoldParameter(torch.randn(4000), manifold=manifold)
        sampler = RSGLD([x], epsilon=0.1)
        for _ in range(400):
            sampler.step(lambda x=x: -x.square().sum() / 2)
        variances.append(float(x.detach().var()))
    assert variances == pytest.approx([1.0, 0.5], rel=0.15)


@pytest.mark.parametrize("name", geoopt_manifolds())
def test_fgsgd_descends_on_every_manifold_of_geoopt(name: str) -> None:
    manifold, shape = geoopt_manifolds()[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        param, target = (torch.as_tensor(draw_geoopt(manifold, *shape)) for _ in range(2))
    param = geoopt.ManifoldParameter(param, manifold=manifold)
    optimizer = RiemannianFGSGD([param], lr=0.02, momentum=0.5)
    losses = []
    for _ in range(100):
        optimizer.zero_grad()
        loss = (param - target).abs().square().sum()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    manifold.assert_check_point_on_manifold(param.detach())
    assert losses[-1] < losses[0]
    assert all(after < before * (1 + 1e-3) for before, after in itertools.pairwise(losses))


def test_embeddings_with_sparse_gradients_take_geoopts_sparse_optimisers() -> None:
    for make in (geoopt.optim.SparseRiemannianSGD, geoopt.optim.SparseRiemannianAdam):
        torch.manual_seed(0)
        embedding = torch.nn.Embedding(10, 3, sparse=True)
        manifold = ScaledSphere(0.5)
        embedding.weight = geoopt.ManifoldParameter(manifold.projx(embedding.weight.detach()), manifold=manifold)
        optimizer = make([embedding.weight], lr=0.03)
        for _ in range(200):
            optimizer.zero_grad()
            (embedding(torch.tensor([1, 2])) - 1).square().sum().backward()
            optimizer.step()
        assert float(manifold.violation(embedding.weight.detach()).max()) < 1e-6
        torch.testing.assert_close(embedding.weight[1].detach(), torch.full((3,), 0.5 / 3**0.5), rtol=0, atol=1e-2)
    with pytest.raises(RuntimeError, match="is sparse, expected a dense one"):
        RiemannianFGSGD([embedding.weight], lr=0.1).step()


def test_the_tables_of_the_guide_are_what_was_run() -> None:
    text = GUIDE.read_text(encoding="utf-8")
    rows = [
        [cell.strip().strip("`") for cell in line.strip("|\n").split("|")] for line in text.splitlines() if "|" in line
    ]
    columns = ["manifold", *OPTIMIZERS, *SAMPLERS]
    header = rows.index(columns)
    table = rows[header + 2 : header + 2 + len(OURS)]
    assert table == [[name, *(expected(name, column) for column in columns[1:])] for name in OURS]
    listed = re.findall(r"`([^`]+)`", text[text.index("Every manifold of Geoopt") :].split("One parameter")[0])
    exported = {kind for kind in vars(geoopt).values() if isinstance(kind, type) and issubclass(kind, geoopt.Manifold)}
    public = exported - {geoopt.Manifold, geoopt.Stiefel}  # which makes an object of another class
    assert {type(manifold) for manifold, _ in geoopt_manifolds().values()} == public - {geoopt.Euclidean}
    assert set(listed) - {"RiemannianFGSGD"} == {kind.__name__ for kind in public}
