"""Sharded training takes the steps of one process: FSDP2 and tensor parallelism, in groups of two and four."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import geoopt
import groups
import pytest
import sharded_meshes
import sharded_steps
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fgo_geo import Oblique, ProductOfGroups, ScaledSphere, Stiefel, collection, plan_of
from fgo_geo.distributed import owners_of, step_cost
from fgo_geo.linalg import Cut

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "benchmarks"))
counting = importlib.import_module("sharded")


@pytest.fixture(scope="module")
def of_two(tmp_path_factory: pytest.TempPathFactory) -> groups.Outcomes:
    return groups.run("sharded_steps", groups.checks_of(sharded_steps), tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def of_four(tmp_path_factory: pytest.TempPathFactory) -> groups.Outcomes:
    return groups.run("sharded_meshes", groups.checks_of(sharded_meshes), tmp_path_factory.mktemp("four"), world=4)


@pytest.mark.parametrize("name", groups.checks_of(sharded_steps))
def test_on_two_processes(of_two: groups.Outcomes, name: str) -> None:
    assert of_two[name] == [""] * 2, "\n".join(of_two[name])


@pytest.mark.parametrize("name", groups.checks_of(sharded_meshes))
def test_on_four_processes(of_four: groups.Outcomes, name: str) -> None:
    assert of_four[name] == [""] * 4, "\n".join(of_four[name])


# -- without other processes -----------------------------------------------------------------------------------


@given(st.integers(0, 9), st.integers(1, 4), st.integers(1, 6), st.integers(0, 1))
def test_tensors_are_cut_as_torch_cuts_them(length: int, width: int, count: int, dim: int) -> None:
    shape = (length, width) if dim == 0 else (width, length)
    tensor = torch.arange(length * width).reshape(shape)
    cut = Cut(shape, dim, count, 0)
    expected = list(tensor.chunk(count, dim)) if length else []
    pieces = [cut.piece(tensor, rank) for rank in range(count)]
    assert [tuple(piece.shape) for piece in pieces] == [cut.shape_of(rank) for rank in range(count)]
    assert all(torch.equal(a, b) for a, b in zip(pieces, expected, strict=False))
    assert all(piece.numel() == 0 for piece in pieces[len(expected) :])


@given(st.lists(st.floats(0.1, 100), min_size=1, max_size=30), st.integers(1, 8))
def test_owners_have_about_as_much_to_do(costs: list[float], count: int) -> None:
    owners = owners_of(costs, count)
    loads = [sum(c for c, owner in zip(costs, owners, strict=True) if owner == rank) for rank in range(count)]
    assert max(loads) <= sum(costs) / count + max(costs) * (1 - 1 / count) + 1e-9  # Graham 1969
    last = max(range(len(costs)), key=lambda n: (loads[owners[n]], -costs[n]))  # the smallest of the busiest
    assert min(loads) >= max(loads) - costs[last] - 1e-9, "the busiest would not have got its last weight"


def test_costs_follow_what_a_step_computes() -> None:
    shape = (64, 32)
    assert (
        step_cost(geoopt.Euclidean(), shape) == step_cost(ScaledSphere(), shape) == step_cost(Oblique(), shape) == 2048
    )
    assert step_cost(Stiefel(), shape) == step_cost(Stiefel(), shape[::-1]) == 2048 * (1 + 32 / 32)
    kernels = ProductOfGroups(collection(8, 4, "po", ("stiefel",)), (8, 4, 3, 3))
    assert step_cost(kernels, (8, 4, 3, 3)) == 8 * 4 * 9 * (1 + 3 / 32)
    assert step_cost(ScaledSphere(ndim=2), (5, 4, 3)) == 60


def test_the_bytes_of_a_step_are_counted_on_every_process() -> None:
    """Of every weight, others send three halves to the owner, and it sends two back, with a number per group."""
    total, numbers, n_groups = 0.0, 0, 0
    for rank in range(2):
        model = counting.sharded(
            lambda: nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4)), 2, rank, ("sphere",)
        )
        try:
            params: list[Any] = list(plan_of(model).parameters().values())
            row = counting.step_of_one_process(model)
        finally:
            dist.destroy_process_group()
        total += row["sent"]
        numbers, n_groups = sum(p.numel() for p in params), sum(p.manifold.n_groups for p in params)
        assert row["all"] == 4 * (8 * 6 + 6 + 6 * 4 + 4)
    assert numbers
    assert total == 4 * (5 * numbers / 2 + n_groups)


@pytest.mark.parametrize("name", counting.MODELS)
@pytest.mark.parametrize("processes", [8, 64])
def test_the_guides_table_is_what_the_benchmark_counts(name: str, processes: int) -> None:
    """The first process owns the dearest weight, the last one several: one of them has the largest of each figure."""
    rows = counting.count(name, "pio", processes, counting.KINDS, (0, processes - 1))
    page = Path(__file__).parents[1] / "docs" / "guides" / "many-gpus.md"
    lines = page.read_text(encoding="utf-8").splitlines()
    assert f"| {' | '.join(counting.COLUMNS)} |" in lines
    assert [line for line in lines if line.startswith(f"| {name} | pio | {processes} |")] == [
        counting.line(name, "pio", processes, rows)
    ]


@pytest.mark.parametrize(("strategy", "summed"), [("po", 0), ("pi", 6 + 5), ("pio", 3 + 2), ("layer", 2)])
def test_the_bytes_of_kernels_are_sums_alone(strategy: str, summed: int) -> None:
    """Nothing is sent to others, and nothing is whole; a word of errors, and one for every weight that is spread."""
    for rank in range(2):
        model = counting.sharded(
            lambda: nn.Sequential(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 5, 3), nn.Conv2d(5, 7, 3)),
            2,
            rank,
            "sphere",
            strategy,
        )
        try:
            row = counting.step_of_one_process(model)
        finally:
            dist.destroy_process_group()
        assert row["sent"] == row["whole"] == 0
        assert row["summed"] == (8 * (summed + 3) if summed else 0)
