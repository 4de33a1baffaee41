"""The fused step on filters, against the batched torch code in double precision."""

from __future__ import annotations

from typing import Any

import geoopt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fgo_geo import ProductOfGroups, RiemannianFGSGD, collection, kernels
from fgo_geo.paths.native import line_tables

SHAPES = [(32, 12), (24, 6, 3, 3), (16, 40), (9, 9)]
KINDS = ("sphere", "oblique", "stiefel", "euclidean", "spectral_ball")


def product(shape: tuple[int, ...], strategy: str, own: Any, selection: str, radius: Any) -> ProductOfGroups:
    return ProductOfGroups(collection(*shape[:2], strategy, own, selection, components="filter"), shape, radius)


FORMATS = (torch.contiguous_format, torch.channels_last)


def stored(weight: Tensor, memory_format: torch.memory_format) -> Tensor:
    return weight.contiguous(memory_format=memory_format) if weight.ndim == 4 else weight


def trained(
    path: Any,
    manifold: ProductOfGroups,
    dtype: torch.dtype,
    memory_format: Any = torch.contiguous_format,
    **options: Any,
) -> Tensor:
    """A weight after three steps, in double precision."""
    shape, generator = manifold.layout.shape, torch.Generator().manual_seed(7)
    start = manifold.random(shape, dtype=torch.float64, generator=generator).detach().as_subclass(Tensor)
    weight = geoopt.ManifoldParameter(stored(start.to(dtype), memory_format), manifold=manifold)
    with kernels.use_path(path):
        optimizer = RiemannianFGSGD([weight], lr=0.5, **options)
        for _ in range(3):
            weight.grad = torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype)
            optimizer.step()
    return weight.detach().as_subclass(Tensor).double()


@settings(max_examples=40)
@given(data=st.data())
def test_a_fused_step_is_that_of_the_reference(data: st.DataObject) -> None:
    draw = data.draw
    strategy = draw(st.sampled_from(["layer", "pi", "po", "pio"]))
    own = draw(st.lists(st.sampled_from(KINDS), min_size=1, max_size=1 if strategy == "layer" else 4))
    radius = draw(st.sampled_from([1.0, 0.3, dict(zip(KINDS, (1.0, 0.5, 2.0, 1.0, 3.0), strict=True)), "groups"]))
    shape = draw(st.sampled_from(SHAPES))
    if radius == "groups":
        groups = product(shape, strategy, own, "random", 1.0).n_groups
        radius = 0.5 + torch.rand(groups, generator=torch.Generator().manual_seed(3))
    manifold = product(shape, strategy, own, draw(st.sampled_from(["random", "deterministic"])), radius)
    options = {"momentum": draw(st.sampled_from([0.0, 0.9])), "weight_decay": draw(st.sampled_from([0.0, 0.1]))}
    fused = trained("auto", manifold, torch.float32, draw(st.sampled_from(FORMATS)), **options)
    exact = trained("reference", manifold, torch.float64, **options)
    assert float(manifold.violation(fused).max()) <= 5e-6
    assert float(((fused - exact) / manifold.radius_map(fused)).abs().max()) <= 2e-5


@pytest.mark.parametrize("strategy", ["layer", "pi", "po", "pio"])
@pytest.mark.parametrize("selection", ["random", "deterministic"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("memory_format", FORMATS)
def test_filters_are_lines(strategy: str, selection: str, shape: tuple[int, ...], memory_format: Any) -> None:
    own = ("sphere", "euclidean", "oblique")[: 1 if strategy == "layer" else 3]
    weight = stored(torch.zeros(shape), memory_format)
    table = line_tables.table_of(product(shape, strategy, own, selection, 1.0), weight)
    assert table is not None
    assert (table.lines, table.other_parts) == (shape[0], ())
    if table.blocks is not None:  # no index of the size of the weight
        assert len(table.blocks.column_orders) <= len(own)


def test_stiefel_filters_are_left_to_the_reference() -> None:
    manifold = product((32, 12), "pi", ("sphere", "stiefel"), "random", 1.0)
    table = line_tables.table_of(manifold, torch.zeros(32, 12))
    assert table is not None
    assert [manifold.partition.kinds[part] for part in table.other_parts] == ["stiefel"]
    assert table.lines == 16
