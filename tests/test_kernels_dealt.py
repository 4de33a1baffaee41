"""The fused step on matrices whose blocks were dealt to several manifolds, against the batched torch code."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from test_kernels import assert_close, built, option_sets, trained
from test_kernels_lines import (
    CLOSE,
    DEALT,
    KINDS,
    TRANSPOSED,
    dealt,
    declared,
    in_double,
    scales,
    taken,
)
from torch import Tensor

from fgo_geo import ProductOfGroups, RiemannianFGSGD, ScaledSphere, Stiefel, kernels
from fgo_geo.grouping import collection
from fgo_geo.paths import jobs
from fgo_geo.paths.native import lines
from fgo_geo.weights.components import WeightLayout


@built
@given(data=st.data(), scale=scales, options=option_sets)
def test_a_matrix_that_was_dealt_is_the_batched_step(data: st.DataObject, scale: float, options: dict[str, Any]):
    draw = data.draw
    kinds = draw(st.lists(st.sampled_from(KINDS), min_size=1, max_size=5))
    strategy = draw(st.sampled_from(["pi", "po", "pio"]))
    selection = draw(st.sampled_from(["random", "deterministic"]))
    sections = draw(st.sampled_from([1, 3]))
    rows, columns = draw(st.integers(2 * len(kinds), 40)), draw(st.integers(2 * len(kinds), 40))
    kernel = draw(st.sampled_from([(), (1, 1), (3, 2)]))
    shape = (sections * rows, columns, *kernel)
    groups = [
        collection(rows, columns, strategy, kinds, selection, seed, components="block") for seed in range(sections)
    ]
    n_groups = sum(len(c.groups) for c in groups)
    per_group = 0.5 + torch.rand(n_groups, generator=torch.Generator().manual_seed(3))
    radius = draw(st.sampled_from([0.7, dict(zip(KINDS, (1.0, 0.5, 2.0, 1.0), strict=True)), per_group]))
    try:
        manifold = ProductOfGroups(groups, WeightLayout(shape, sections=sections), radius)
    except ValueError:  # a column of one entry cannot move
        assume(False)
        raise
    weight = declared(manifold, *shape)
    assert taken(weight) == [set(kinds) != {"stiefel"}]
    fused = trained("auto", [weight], 3, scale, **options)
    assert_close(fused, trained("reference", [in_double(weight)], 3, scale, **options), CLOSE)
    assert float(manifold.violation(fused["weights"][0]).max()) <= 5e-6


@built
@pytest.mark.parametrize("selection", ["random", "deterministic"])
@pytest.mark.parametrize("kernel", [(), (2, 2)])
def test_blocks_are_taken_and_put_back(selection: str, kernel: tuple[int, ...]):
    shape = (37, 29, *kernel)
    cut = dealt(shape, "pio", KINDS, selection).partition
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    again = torch.full(shape, torch.nan)
    for part, blocks in enumerate(cut.split(weight)):
        torch.testing.assert_close(lines.take(weight, cut, part), blocks, rtol=0, atol=0)
        torch.testing.assert_close(lines.take(weight.mT.contiguous().mT, cut, part), blocks, rtol=0, atol=0)
        version = again._version
        lines.put_(again, cut, part, blocks)
        assert again._version > version
    torch.testing.assert_close(again, weight, rtol=0, atol=0)


@built
@pytest.mark.parametrize("dims", [(0, 1, 2, 3), (1, 0, 2, 3)])
def test_a_dealt_transposed_convolution_is_the_batched_step(dims: tuple[int, ...]):
    weight = declared(TRANSPOSED, 40, 30, 1, 1, dims=dims)
    fused = trained("auto", [weight], 3, 0.3, momentum=0.9)
    assert_close(fused, trained("reference", [in_double(weight)], 3, 0.3, momentum=0.9), CLOSE)


@built
def test_only_the_stiefel_blocks_are_gathered(monkeypatch: pytest.MonkeyPatch):
    """The step writes every number once: the sweeps those of lines, the batched code the others."""
    put: list[tuple[int, ...]] = []
    write = jobs.put_blocks_
    monkeypatch.setattr(
        jobs, "put_blocks_", lambda w, cut, part, x: (put.append((*x.shape,)), write(w, cut, part, x))[1]
    )
    manifold = dealt((48, 40), "po", ("sphere", "stiefel", "oblique"))
    weight = declared(manifold, 48, 40)
    optimizer = RiemannianFGSGD([weight], lr=0.1, momentum=0.9)
    for _ in range(2):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    assert put == [(1, 40, 16)] * 4  # weight and momentum, twice


@built
def test_one_gradient_is_refused_or_left_out_in_a_dealt_matrix():
    """A group that is left out keeps its momentum, on lines and on Stiefel blocks alike; the others go on."""
    manifold = dealt((48, 40), "po", ("sphere", "stiefel", "oblique", "euclidean"))
    for row in range(48):
        results: list[Tensor] = []
        for path in ("auto", "reference"):
            weight = declared(manifold, 48, 40)
            optimizer = RiemannianFGSGD([weight], lr=0.1, momentum=0.9, check_finite=False)
            with kernels.use_path(path):
                for step in range(3):
                    weight.grad = torch.full_like(weight.detach(), 0.1 * (step + 1))
                    if step == 1:
                        weight.grad[row, 7] = float("inf")
                    optimizer.step()
            assert optimizer.skipped_groups() == 1
            results.append(weight.detach())
        torch.testing.assert_close(*results, rtol=0, atol=CLOSE)
        checked = RiemannianFGSGD([weight], lr=0.1, momentum=0.9)
        before = weight.detach().clone()
        weight.grad[row, 7] = float("nan")
        with pytest.raises(FloatingPointError, match="no parameter was changed"):
            checked.step()
        assert torch.equal(weight.detach(), before)
        assert not checked.state


@built
def test_a_dealt_matrix_goes_on_from_a_checkpoint_on_either_path():
    weight = declared(dealt((48, 40), "pio", KINDS), 48, 40)
    expected = trained("reference", [in_double(weight)], 6, 0.3, momentum=0.9)
    own = copy.deepcopy(weight)
    optimizer = RiemannianFGSGD([own], lr=0.1, momentum=0.9)
    generator = torch.Generator().manual_seed(1)
    for number, path in enumerate(("fused", "reference", "auto", "auto", "reference", "auto")):
        own.grad = (0.3 * torch.randn(own.shape, dtype=torch.float64, generator=generator)).float()
        if number % 2:
            fresh = RiemannianFGSGD([own], lr=0.1, momentum=0.9)
            fresh.load_state_dict(optimizer.state_dict())
            optimizer = fresh
        with kernels.use_path(path):  # pyright: ignore
            optimizer.step()
    actual = {
        "weights": [own.detach()],
        "momentum": [optimizer.state[own]["momentum_buffer"]],
        "scales": [optimizer.step_scales()[own]],
    }
    assert_close(actual, expected, CLOSE)


@built
def test_blocks_are_put_into_contiguous_matrices_only():
    cut = dealt((12, 10, 2, 2), "po", ("sphere", "stiefel")).partition
    weight = torch.zeros(12, 10, 2, 2).to(memory_format=torch.channels_last)
    with pytest.raises(
        ValueError, match=r"put_: the channels of a weight of shape \(12, 10, 2, 2\) and strides.*contiguous"
    ):
        lines.put_(weight, cut, 0, cut.split(weight)[0])


@built
def test_nothing_has_changed_if_the_stiefel_blocks_fail(monkeypatch: pytest.MonkeyPatch):
    weight = declared(dealt((48, 40), "po", ("sphere", "stiefel")), 48, 40)
    before = weight.detach().clone()
    weight.grad = torch.ones_like(weight)
    optimizer = RiemannianFGSGD([weight], lr=0.1, momentum=0.9)

    def fail(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Stiefel, "retract_measured", fail)
        with pytest.raises(KeyboardInterrupt):
            optimizer.step()
    assert torch.equal(weight.detach(), before)
    assert not optimizer.state
    monkeypatch.setattr(RiemannianFGSGD, "_write", fail)
    with pytest.raises(KeyboardInterrupt):  # too late: but what is found is zero, not what was in the memory before
        optimizer.step()
    (stiefel,) = (part for part, kind in enumerate(weight.manifold.partition.kinds) if kind == "stiefel")
    assert not weight.manifold.partition.split(optimizer.state[weight]["momentum_buffer"])[stiefel].any()


def test_blocks_are_written_together_with_the_rest_of_their_weight(monkeypatch: pytest.MonkeyPatch):
    """Also where they lie in the weight as they are, so that a step could end in place."""
    weight = declared(dealt((80, 48), "po", ("stiefel", "sphere"), selection="deterministic"), 80, 48)
    before = weight.detach().clone()
    weight.grad = torch.ones_like(weight)
    optimizer = RiemannianFGSGD([weight], lr=0.1, momentum=0.9)

    def fail(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ScaledSphere, "retract_bounded", fail)
    with kernels.use_path("reference"), pytest.raises(KeyboardInterrupt):
        optimizer.step()
    assert torch.equal(weight.detach(), before)
    assert not optimizer.state


@pytest.mark.parametrize("path", ["auto", "reference"])
def test_blocks_of_several_weights_move_as_those_of_one(path: Any):
    """Their steps use the same memory, one after the other."""
    one, other = dealt((80, 48), "po", ("stiefel", "sphere")), dealt((60, 40), "pi", ("oblique", "stiefel"))
    together, apart = ([declared(one, 80, 48), declared(other, 60, 40)] for _ in range(2))
    optimizers = [RiemannianFGSGD(params, lr=0.1, momentum=0.9) for params in (together, apart[:1], apart[1:])]
    generator = torch.Generator().manual_seed(0)
    with kernels.use_path(path):
        for _ in range(4):
            for pair in zip(together, apart, strict=True):
                gradient = torch.randn(pair[0].shape, generator=generator)
                for param in pair:
                    param.grad = gradient
            for optimizer in optimizers:
                optimizer.step()
    for (weight, its), optimizer in zip(zip(together, apart, strict=True), optimizers[1:], strict=True):
        assert torch.equal(weight.detach(), its.detach())
        momentum = optimizers[0].state[weight]["momentum_buffer"]
        assert torch.equal(momentum, optimizer.state[its]["momentum_buffer"])


@built
def test_a_forced_path_says_what_it_leaves(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    monkeypatch.setattr(kernels, "_said", set())
    weight = declared(DEALT, 40, 30)
    with caplog.at_level(logging.WARNING, "fgo_geo"):
        trained("fused", [weight], 2, 0.3)
    (record,) = caplog.records
    assert "the Stiefel blocks of a weight of shape (40, 30)" in record.getMessage()


@built
def test_products_are_carried_from_step_to_step_in_a_dealt_matrix():
    """What the sweeps write is not taken for a change of the Stiefel blocks by somebody else."""
    weight = declared(dealt((96, 80), "po", ("sphere", "stiefel")), 96, 80)
    optimizer = RiemannianFGSGD([weight], lr=1e-3, momentum=0.9)
    carried: list[bool] = []
    for seed in range(4):
        weight.grad = torch.randn(96, 80, generator=torch.Generator().manual_seed(seed)) / 100
        optimizer.step()
        carried.append(any(left.along is not None for left, _ in optimizer._carried.values()))
    assert carried == [False, True, True, True]
    weight.grad = torch.zeros(96, 80)
    with torch.no_grad():
        weight.add_(0.0)
    optimizer.step()
    assert all(left.along is None for left, _ in optimizer._carried.values())
