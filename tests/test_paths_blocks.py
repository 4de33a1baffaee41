"""Matrices whose blocks belong to several manifolds: sweeps over lines, and Stiefel blocks by other paths."""

from __future__ import annotations

import copy
import logging
import sys
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from path_helpers import (
    CLOSE,
    KINDS,
    answer,
    assert_close,
    built,
    declared,
    in_double,
    option_sets,
    product_of_blocks,
    scales,
    sweeps_of,
    takes,
    trained,
)
from torch import Tensor

from fgo_geo import ProductOfGroups, RiemannianFGSGD, ScaledSphere, Stiefel, kernels
from fgo_geo.grouping import collection
from fgo_geo.paths import router
from fgo_geo.paths.native import blocks
from fgo_geo.paths.native.library import library
from fgo_geo.paths.native.lines import NativeLines
from fgo_geo.paths.native.stiefel import StiefelBatch
from fgo_geo.paths.protocol import StepOptions, Weight
from fgo_geo.paths.shared_products import SharedProducts
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
    assert takes(NativeLines(), weight) == [set(kinds) != {"stiefel"}]
    fused = trained("auto", [weight], 3, scale, **options)
    assert_close(fused, trained("reference", [in_double(weight)], 3, scale, **options), CLOSE)
    assert float(manifold.violation(fused["weights"][0]).max()) <= 5e-6


@built
@pytest.mark.parametrize("selection", ["random", "deterministic"])
@pytest.mark.parametrize("kernel", [(), (2, 2)])
def test_the_blocks_of_one_part_are_taken(selection: str, kernel: tuple[int, ...]):
    shape = (37, 29, *kernel)
    cut = product_of_blocks(shape, "pio", KINDS, selection).partition
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    for part, own in enumerate(cut.split(weight)):
        torch.testing.assert_close(blocks.take(weight, cut, part), own, rtol=0, atol=0)
        torch.testing.assert_close(blocks.take(weight.mT.contiguous().mT, cut, part), own, rtol=0, atol=0)


@built
@pytest.mark.parametrize("dims", [(0, 1, 2, 3), (1, 0, 2, 3)])
def test_a_dealt_transposed_convolution_is_the_batched_step(dims: tuple[int, ...]):
    groups = collection(30, 40, "po", ("sphere", "stiefel"), components="block")
    transposed = ProductOfGroups(groups, WeightLayout((40, 30, 1, 1), "transposed"))
    weight = declared(transposed, 40, 30, 1, 1, dims=dims)
    fused = trained("auto", [weight], 3, 0.3, momentum=0.9)
    assert_close(fused, trained("reference", [in_double(weight)], 3, 0.3, momentum=0.9), CLOSE)


@built
def test_only_the_stiefel_blocks_are_left_to_another_path():
    """Blocks of 360,000 numbers are too large for compiled products."""
    manifold = product_of_blocks((900, 800), "po", ("sphere", "stiefel"))
    weight = declared(manifold, 900, 800)
    stiefel = manifold.partition.kinds.index("stiefel")
    others = (1 - stiefel,)
    assert answer(NativeLines(), weight) == others
    own = Weight(weight, weight, manifold, torch.zeros(900, 800))
    batches = router.Router().route([own], StepOptions(lr=0.1, momentum=0.9))
    assert [(batch.stages, batch.claims[0].parts) for batch in batches] == [(True, (stiefel,)), (False, others)]


@built
def test_a_dealt_matrix_of_large_stiefel_blocks_shares_products():
    manifold = product_of_blocks((600, 300), "po", ("sphere", "stiefel"))
    weight = declared(manifold, 600, 300)
    stiefel = manifold.partition.kinds.index("stiefel")
    assert answer(SharedProducts(), weight, momentum=0.9) == (stiefel,)
    fused = trained("auto", [weight], 3, 0.3, momentum=0.9)
    assert_close(fused, trained("reference", [in_double(weight)], 3, 0.3, momentum=0.9), CLOSE)


def test_large_stiefel_blocks_share_products_without_the_extension(monkeypatch: pytest.MonkeyPatch):
    weight = declared(product_of_blocks((400, 140), "po", ("sphere", "stiefel")), 400, 140)
    expected = trained("reference", [in_double(weight)], 2, 0.3, momentum=0.9)
    for name, module in list(sys.modules.items()):
        if name.startswith("fgo_geo.paths") and getattr(module, "library", None) is library:
            monkeypatch.setattr(module, "library", lambda: None)
    assert_close(trained("auto", [weight], 2, 0.3, momentum=0.9), expected, CLOSE)


@built
def test_lines_and_staged_blocks_are_written_in_one_call():
    weight = declared(product_of_blocks((48, 40), "po", ("sphere", "stiefel", "oblique")), 48, 40)
    optimizer = RiemannianFGSGD([weight], lr=0.1, momentum=0.9)
    weight.grad = torch.ones_like(weight)
    names = ("fgo_line_norms", "fgo_stiefel_norms", "fgo_stiefel_move", "fgo_line_update")
    assert sweeps_of(optimizer.step) == dict.fromkeys(names, 1)


@built
def test_one_gradient_is_refused_or_left_out_in_a_dealt_matrix():
    """A group that is left out keeps its momentum, on lines and on Stiefel blocks alike; the others go on."""
    manifold = product_of_blocks((48, 40), "po", ("sphere", "stiefel", "oblique", "euclidean"))
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
    weight = declared(product_of_blocks((48, 40), "pio", KINDS), 48, 40)
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
        with kernels.use_path(path):
            optimizer.step()
    actual = {
        "weights": [own.detach()],
        "momentum": [optimizer.state[own]["momentum_buffer"]],
        "scales": [optimizer.step_scales()[own]],
    }
    assert_close(actual, expected, CLOSE)


def fail(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


# What the Stiefel blocks of a path take to move, and what fails in its place.
RETRACTS: dict[str, tuple[Any, str, Any]] = {
    "auto": (StiefelBatch, "move", fail),
    "reference": (Stiefel, "retract_bounded", fail),
}


@pytest.mark.parametrize(
    ("path", "fails", "selection"),
    [
        pytest.param("auto", RETRACTS["auto"], "random", marks=built),
        ("reference", RETRACTS["reference"], "random"),
        # where blocks are a part of the weight as it is stored
        ("reference", (ScaledSphere, "retract_bounded", fail), "deterministic"),
    ],
)
def test_nothing_has_changed_if_some_blocks_fail(
    path: Any, fails: tuple[Any, str, Any], selection: str, monkeypatch: pytest.MonkeyPatch
):
    weight = declared(product_of_blocks((80, 48), "po", ("stiefel", "sphere"), selection=selection), 80, 48)
    before = weight.detach().clone()
    weight.grad = torch.ones_like(weight)
    optimizer = RiemannianFGSGD([weight], lr=0.1, momentum=0.9)
    monkeypatch.setattr(*fails)
    with kernels.use_path(path), pytest.raises(KeyboardInterrupt):
        optimizer.step()
    assert torch.equal(weight.detach(), before)


@pytest.mark.parametrize("path", [pytest.param("auto", marks=built), "reference"])
def test_a_step_after_a_failed_first_one_is_the_first(path: Any, monkeypatch: pytest.MonkeyPatch):
    """Which dampening tells from others."""
    weights = [declared(product_of_blocks((80, 48), "po", ("stiefel", "sphere")), 80, 48) for _ in range(2)]
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizers = [RiemannianFGSGD([weight], lr=0.1, momentum=0.9, dampening=0.5) for weight in weights]
    with kernels.use_path(path):
        with monkeypatch.context() as patch:
            patch.setattr(*RETRACTS[path])
            with pytest.raises(KeyboardInterrupt):
                optimizers[0].step()
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(weights[0].detach(), weights[1].detach())


@pytest.mark.parametrize("path", ["auto", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kinds", [("sphere", "stiefel"), ("stiefel", "euclidean", "oblique")])
def test_every_part_moves_whoever_takes_it(path: Any, dtype: torch.dtype, kinds: tuple[str, ...]):
    """Large Stiefel blocks take another path than the others, and both may be batched torch code."""
    manifold = product_of_blocks((480, 140), "po", kinds)
    weight = declared(manifold, 480, 140, dtype=dtype)
    before = manifold.partition.split(weight.detach())
    after = trained(path, [weight], 1, 1e-2, momentum=0.9)
    moved = [float((a - b).norm()) for a, b in zip(manifold.partition.split(after["weights"][0]), before, strict=True)]
    momentum = [float(own.norm()) for own in manifold.partition.split(after["momentum"][0])]
    assert min(moved) > 1e-4
    assert min(momentum) > 1e-3
    assert float(manifold.violation(after["weights"][0]).max()) <= 1e-5


@pytest.mark.parametrize("path", ["auto", "reference"])
def test_blocks_of_several_weights_move_as_those_of_one(path: Any):
    """Their steps use the same memory, one after the other."""
    one, other = (
        product_of_blocks((80, 48), "po", ("stiefel", "sphere")),
        product_of_blocks((60, 40), "pi", ("oblique", "stiefel")),
    )
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
def test_a_forced_path_says_what_it_leaves(caplog: pytest.LogCaptureFixture):
    weight = declared(product_of_blocks((1200, 450), "po", ("sphere", "stiefel")), 1200, 450)
    with caplog.at_level(logging.WARNING, "fgo_geo"):
        trained("fused", [weight], 2, 0.3)
    (record,) = caplog.records
    assert "some blocks of a weight of shape (1200, 450)" in record.getMessage()
    assert "262,144 numbers" in record.getMessage()
