"""Weights that are sharded in whole components: every process's part, played in turn in one process."""

from __future__ import annotations

import functools
from collections.abc import Callable

import geoopt
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fgo_geo import Oblique, ProductOfGroups, ScaledSphere, Stiefel, collection
from fgo_geo.distributed import owners_of
from fgo_geo.distributed.local import LocalPart, local_part_of
from fgo_geo.linalg import Cut
from fgo_geo.weights.layout import WeightLayout

CPU = torch.device("cpu")
KINDS = ("sphere", "oblique", "stiefel", "euclidean")


@st.composite
def products(draw: st.DrawFn) -> tuple[ProductOfGroups, Cut]:
    """Kernels or filters of any strategy, layout and radii, and a cut along their channels."""
    rows, columns = draw(st.integers(1, 7)), draw(st.integers(1, 5))
    strategy = draw(st.sampled_from(["pi", "po", "pio", "layer"]))
    is_filter = draw(st.booleans())
    kinds = draw(st.lists(st.sampled_from([k for k in KINDS if not (is_filter and k == "stiefel")]), min_size=1))
    selection, seed = draw(st.sampled_from(["deterministic", "random"])), draw(st.integers(0, 9))
    own = collection(
        rows,
        columns,
        strategy,
        kinds[:1] if strategy == "layer" else kinds,
        selection,
        seed,
        components="filter" if is_filter else "kernel",
    )
    is_transposed = draw(st.booleans())
    kernel = draw(st.sampled_from([(2, 3), (3, 3), (3, 1), (4,), (2, 1, 2)]))
    shape = (columns, rows, *kernel) if is_transposed else (rows, columns, *kernel)
    layout = WeightLayout(shape, "transposed" if is_transposed else "conv")
    generator = torch.Generator().manual_seed(seed)
    radii = [1.5, 0.5 + torch.rand(len(own.group_sizes), generator=generator, dtype=torch.float64)]
    if not is_filter:
        radii.append(0.5 + torch.rand(rows, columns, generator=generator, dtype=torch.float64))
    dim = draw(st.integers(0, 1))
    if is_filter:  # along the input channels a filter is cut through
        dim = 1 if is_transposed else 0
    return ProductOfGroups(own, layout, draw(st.sampled_from(radii))), Cut(shape, dim, draw(st.integers(1, 8)), 0)


def parts_of(manifold: geoopt.Manifold, cut: Cut) -> list[LocalPart]:
    found = [local_part_of(manifold, Cut(cut.shape, cut.dim, cut.count, rank), CPU) for rank in range(cut.count)]
    assert all(part is not None for part in found)
    return [part for part in found if part is not None]


def tensors(cut: Cut, seed: int) -> tuple[Tensor, Tensor]:
    return tuple(torch.randn(2, *cut.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))  # pyright: ignore


def whole_of(parts: list[LocalPart], cut: Cut, operation: Callable[[geoopt.Manifold, int], Tensor]) -> Tensor:
    made = torch.full(cut.shape, torch.nan, dtype=torch.float64)
    for rank, part in enumerate(parts):
        if part.manifold is not None:
            cut.piece(made, rank).copy_(operation(part.manifold, rank))
    return made


@given(products(), st.integers(0, 99))
def test_the_parts_of_all_processes_are_the_weight(drawn: tuple[ProductOfGroups, Cut], seed: int) -> None:
    manifold, cut = drawn
    parts = parts_of(manifold, cut)
    raw, u = tensors(cut, seed)
    x = manifold.projx(raw)
    tangent = manifold.proju(x, u)
    nearest = whole_of(parts, cut, lambda m, rank: m.projx(cut.piece(raw, rank)))
    torch.testing.assert_close(nearest, x, rtol=0, atol=1e-12)

    def projected(m: geoopt.Manifold, rank: int) -> Tensor:
        return m.proju(cut.piece(x, rank), cut.piece(u, rank))

    def moved(m: geoopt.Manifold, rank: int) -> Tensor:
        return m.retr(cut.piece(x, rank), cut.piece(tangent, rank))

    torch.testing.assert_close(whole_of(parts, cut, projected), tangent, rtol=0, atol=1e-14)
    torch.testing.assert_close(whole_of(parts, cut, moved), manifold.retr(x, tangent), rtol=0, atol=1e-14)


@given(products(), st.integers(0, 99))
def test_norms_of_groups_add_up(drawn: tuple[ProductOfGroups, Cut], seed: int) -> None:
    """Spread groups are summed, the others are on one process, and every group is counted once."""
    manifold, cut = drawn
    x, u = tensors(cut, seed)
    expected = manifold.group_inner(x, u)
    summed, counted = torch.zeros_like(expected), torch.zeros_like(expected)
    holders = torch.zeros(manifold.n_groups)
    for rank, part in enumerate(parts_of(manifold, cut)):
        share = part.share
        assert (share.manifold, share.shape) == (manifold, cut.shape)
        if not isinstance(part.manifold, ProductOfGroups):
            assert cut.range_of(rank)[1] == len(share.groups) == len(share.spread) == 0
            continue
        own = part.manifold.group_inner(cut.piece(x, rank), cut.piece(u, rank))
        assert len(own) == len(share.groups)
        summed[share.groups] += own
        holders[share.groups] += 1
        counted[share.groups] += share.is_counted
        alone = torch.ones(len(own), dtype=torch.bool)
        alone[share.spread] = False
        torch.testing.assert_close(own[alone], expected[share.groups[alone]])
    torch.testing.assert_close(summed, expected)
    assert bool((counted == 1).all())
    for part in parts_of(manifold, cut):
        assert part.spread.tolist() == torch.nonzero(holders > 1)[:, 0].tolist()
        assert part.share.groups[part.share.spread].tolist() == [
            n for n in part.share.groups.tolist() if holders[n] > 1
        ]
        assert part.share.n_groups == manifold.n_groups


@given(products())
def test_the_smallest_radii_so_far_are_kept(drawn: tuple[ProductOfGroups, Cut]) -> None:
    manifold, cut = drawn
    before = [0.1 + number for number in range(len(manifold.smallest_radii))]
    manifold.smallest_radii = before
    smallest = manifold.partition.merge(
        [
            torch.full((n, *size), r)
            for n, size, r in zip(manifold.partition.counts, manifold.partition.sizes, before, strict=True)
        ]
    )
    for rank, part in enumerate(parts_of(manifold, cut)):
        if isinstance(part.manifold, ProductOfGroups):
            own = part.manifold.partition.split(cut.piece(smallest, rank))
            assert [float(t.unique()) for t in own] == pytest.approx(part.manifold.smallest_radii)


@pytest.mark.parametrize(("strategy", "spread"), [("po", 0), ("pi", 5 * 2), ("pio", 2 * 2), ("layer", 1)])
def test_what_crosses_processes(strategy: str, spread: int) -> None:
    """PO none, PI one number per input channel and kind, PIO half of them, layer one."""
    kinds = ("sphere",) if strategy == "layer" else ("sphere", "stiefel")
    manifold = ProductOfGroups(collection(16, 5, strategy, kinds, "random"), (16, 5, 3, 3))
    for part in parts_of(manifold, Cut((16, 5, 3, 3), 0, 2, 0)):
        assert len(part.spread) == spread


@pytest.mark.parametrize(
    "make", [functools.partial(ScaledSphere, ndim=2), Oblique, functools.partial(Stiefel, retraction="qr")]
)
@pytest.mark.parametrize("radius", [0.5, (5, 1), (1, 3), (3,), (5, 3)])
@pytest.mark.parametrize("dim", [0, 1])
def test_single_manifolds_of_trailing_dimensions(
    make: Callable[..., geoopt.Manifold], radius: object, dim: int
) -> None:
    size = radius if isinstance(radius, float) else 0.5 + torch.rand(radius, dtype=torch.float64)
    manifold, shape = make(size), (5, 3, 4, 2)
    cut = Cut(shape, dim, 2, 0)
    raw, _ = tensors(cut, 0)
    parts = parts_of(manifold, cut)
    projected = whole_of(parts, cut, lambda m, rank: m.projx(cut.piece(raw, rank)))
    torch.testing.assert_close(projected, manifold.projx(raw), rtol=0, atol=1e-14)
    assert [part.spread.tolist() for part in parts] == [[0]] * 2
    assert [part.share.is_counted.tolist() for part in parts] == [[True], [False]]
    assert repr(parts[0].manifold).split("(")[0] == type(manifold).__name__


def test_components_that_are_cut_through_have_an_owner() -> None:
    blocks = ProductOfGroups(collection(6, 4, "po", ("sphere",), components="block"), (6, 4))
    filters = ProductOfGroups(collection(6, 4, "po", ("sphere",), components="filter"), (6, 4, 3, 3))
    joined = ProductOfGroups(collection(6, 4, "pi", ("stiefel",), components="filter"), (6, 4))
    kernels = ProductOfGroups(collection(6, 4, "po", ("sphere",)), (6, 4, 3, 3))
    grouped = ProductOfGroups(
        collection(6, 4, "po", ("sphere",)), WeightLayout((8, 3, 3, 3), "transposed", conv_groups=2)
    )
    for manifold, shape, dim in (
        (blocks, (6, 4), 0),
        (filters, (6, 4, 3, 3), 1),
        (joined, (6, 4), 0),
        (kernels, (6, 4, 3, 3), 2),
        (grouped, (8, 3, 3, 3), 0),
        (ScaledSphere(ndim=2), (6, 4), 0),
        (geoopt.Sphere(), (6, 4), 0),
        (kernels, (6, 4, 3, 3), None),
    ):
        assert local_part_of(manifold, Cut(shape, dim, 2, 0), CPU) is None
    assert local_part_of(filters, Cut((6, 4, 3, 3), 0, 2, 0), CPU) is not None


def test_owners_make_up_for_what_processes_have_to_do_besides() -> None:
    assert owners_of([1.0, 1.0], 2, [5.0, 0.0]) == [1, 1]
    assert np.bincount(owners_of([1.0] * 9, 3, [2.0, 1.0, 0.0])).tolist() == [2, 3, 4]
