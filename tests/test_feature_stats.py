from __future__ import annotations

import copy
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fgo_geo.grouping import collection
from fgo_geo.models.feature_stats import (
    FeatureStatistics,
    component_lambda,
    is_tracked,
    kernel_lambda,
    rescaling_lambda,
    track,
    untrack,
)
from fgo_geo.weights.components import partition
from fgo_geo.weights.layout import WeightLayout, layout_of

seeds = st.integers(0, 2**31)
momenta = st.sampled_from([0.1, 0.7, 1.0, None])


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


# -- running statistics ------------------------------------------------------------------------------------------


@given(seeds, momenta, st.sampled_from([nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d]), st.integers(1, 4))
def test_statistics_are_those_of_batch_normalisation(seed: int, momentum: float | None, norm: Any, batches: int):
    spatial = {nn.BatchNorm1d: (), nn.BatchNorm2d: (3, 2), nn.BatchNorm3d: (2, 1, 3)}[norm]
    expected = norm(4, momentum=momentum, dtype=torch.float64)
    statistics = FeatureStatistics(4, momentum, dtype=torch.float64)
    for batch in range(batches):
        x = normal(seed + batch, 5 - batch, 4, *spatial, dtype=torch.float64) * 3 + batch
        expected(x)
        statistics(x, channel_dim=1)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        torch.testing.assert_close(getattr(statistics, name), getattr(expected, name))
    assert statistics.state_dict().keys() < expected.state_dict().keys()
    torch.testing.assert_close(statistics.std() ** 2, expected.running_var)


def test_evaluation_freezes_and_the_first_standard_deviation_is_one():
    statistics = FeatureStatistics(3).eval()
    statistics(normal(0, 5, 3), channel_dim=1)
    assert statistics.std().tolist() == [1, 1, 1]
    assert statistics.num_batches_tracked == 0
    statistics.train()(normal(0, 5, 3), channel_dim=1)
    assert statistics.num_batches_tracked == 1


@given(seeds, st.lists(st.integers(2, 4), min_size=1, max_size=4), st.data())
def test_channels_lie_along_any_dimension(seed: int, shape: list[int], data: st.DataObject):
    dim = data.draw(st.integers(-len(shape), len(shape) - 1))
    x = normal(seed, *shape, dtype=torch.float64)
    statistics = FeatureStatistics(shape[dim], momentum=1.0, dtype=torch.float64)
    statistics(x, channel_dim=dim)
    values = np.moveaxis(x.numpy(), dim, 0).reshape(shape[dim], -1)
    if values.shape[1] > 1:
        np.testing.assert_allclose(statistics.running_mean, values.mean(1), atol=1e-14)
        np.testing.assert_allclose(statistics.running_var, values.var(1, ddof=1), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_single_precision(dtype: torch.dtype):
    x = (normal(0, 400, 3) + 40).to(dtype)
    half, single = FeatureStatistics(3), FeatureStatistics(3)
    half(x, channel_dim=1)
    single(x.float(), channel_dim=1)
    assert torch.equal(half.running_mean, single.running_mean)
    assert torch.equal(half.running_var, single.running_var)


def test_casting_a_model_to_half_precision_leaves_the_buffers_as_they_are():
    statistics = FeatureStatistics(2)
    statistics(normal(0, 7, 2), channel_dim=1)
    before = copy.deepcopy(statistics.state_dict())
    for cast in (nn.Module.half, nn.Module.bfloat16, lambda m: m.to(torch.bfloat16)):
        cast(statistics)
        assert all(torch.equal(v, before[k]) and v.dtype == before[k].dtype for k, v in statistics.state_dict().items())
    assert statistics.double().running_var.dtype == torch.float64
    assert statistics.to("meta").running_var.is_meta


def test_a_small_variance_beside_a_large_mean_is_kept():
    x = (normal(0, 1000, 1) * 0.1 + 300).float()
    statistics = FeatureStatistics(1, momentum=1.0)
    statistics(x, channel_dim=1)
    assert statistics.std().item() == pytest.approx(x.double().std().item(), rel=1e-3)


@pytest.mark.parametrize("shape", [(1, 3), (3,), (0, 3)])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_batches_without_a_variance_are_skipped(shape: tuple[int, ...], momentum: float | None):
    statistics = FeatureStatistics(3, momentum)
    for x in (torch.full(shape, 7.0), torch.tensor([[0.0, 0, 0], [2, 2, 2]]), torch.full(shape, 7.0)):
        statistics(x, channel_dim=-1)
    alone = FeatureStatistics(3, momentum)
    alone(torch.tensor([[0.0, 0, 0], [2, 2, 2]]), channel_dim=-1)
    assert all(torch.equal(v, alone.state_dict()[k]) for k, v in statistics.state_dict().items())


@pytest.mark.parametrize("arguments", [{"channels": 0}, {"channels": 2, "momentum": 1.5}])
def test_constructor_errors(arguments: dict[str, Any]):
    with pytest.raises(ValueError, match=r"must be (at least 1, got 0|in \[0, 1\], or None to average, got 1.5)"):
        FeatureStatistics(**arguments)


@pytest.mark.parametrize(("shape", "dim"), [((5, 4), 1), ((5, 3), 2), ((5, 3), -3)])
def test_an_input_of_other_channels_is_refused(shape: tuple[int, ...], dim: int):
    statistics = FeatureStatistics(3)
    with pytest.raises(ValueError, match=rf"expected 3 channels along dimension {dim}, got an input of shape"):
        statistics(torch.ones(shape), channel_dim=dim)


# -- several processes -------------------------------------------------------------------------------------------


def _batch(rank: int, batch: int) -> Tensor:
    """Batches of another mean, and another number of them, on each process."""
    return normal(10 * batch + rank, 200, 3) * torch.tensor([1.0, 2.0, 0.5]) + 3 * rank


def _process(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    statistics, unseen = FeatureStatistics(3, momentum=None), FeatureStatistics(3)
    for batch in range(1 + 2 * rank):
        statistics(_batch(rank, batch), channel_dim=1)
    own = dist.new_group([rank], use_local_synchronization=True)
    found = {
        "all": statistics.variance(),
        "own": statistics.variance(own),
        "running": statistics.running_var,
        "unseen": unseen.variance(),
        "lambda": rescaling_lambda(statistics, "std"),
    }
    torch.save(found, f"{folder}/{rank}")
    dist.destroy_process_group()


def test_processes_agree_on_the_variance_of_all_their_batches(tmp_path: Path):
    torch.multiprocessing.spawn(_process, args=(str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / str(rank)) for rank in range(2))
    assert torch.equal(first["all"], second["all"])
    batches = [_batch(0, 0), *(_batch(1, batch) for batch in range(3))]
    torch.testing.assert_close(first["all"], torch.cat(batches).var(0), rtol=2e-2, atol=0)
    torch.testing.assert_close(first["lambda"], first["all"].sqrt())
    for each in (first, second):
        torch.testing.assert_close(each["own"], each["running"])
        assert each["unseen"].tolist() == [1.0, 1.0, 1.0]


def _alone(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    if rank == 0:  # would wait for the other if a forward pass talked to it
        layer = nn.Linear(3, 3)
        track(layer)
        layer(_batch(0, 0))
    dist.destroy_process_group()


def test_a_forward_pass_waits_for_no_other_process(tmp_path: Path):
    torch.multiprocessing.spawn(_alone, args=(str(tmp_path),), nprocs=2)


# -- activation checkpointing ------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_counts_each_forward_pass_once(use_reentrant: bool):
    plain = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    checkpointed = copy.deepcopy(plain)
    for model in (plain, checkpointed):
        track(model[0]), track(model[2])
    for step in range(5):
        x = normal(step, 20, 3).requires_grad_()
        plain(x).sum().backward()
        checkpoint(checkpointed, x, use_reentrant=use_reentrant).sum().backward()
    assert int(checkpointed[2].fgo_geo_statistics.num_batches_tracked) == 5
    for name, value in plain.state_dict().items():
        assert torch.equal(checkpointed.state_dict()[name], value), name


# -- layers ------------------------------------------------------------------------------------------------------

LAYERS = {
    "conv1d": (lambda: nn.Conv1d(4, 2, 3), (5, 4, 6)),
    "conv2d": (lambda: nn.Conv2d(4, 2, 3), (5, 4, 6, 6)),
    "conv3d": (lambda: nn.Conv3d(4, 2, 2), (5, 4, 3, 3, 3)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), (5, 4, 6, 6)),
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4), (5, 4, 6, 6)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2), (5, 4, 6, 6)),
    "transposed1d": (lambda: nn.ConvTranspose1d(4, 6, 3), (5, 4, 6)),
    "linear": (lambda: nn.Linear(4, 3), (5, 4)),
    "linear on sequences": (lambda: nn.Linear(4, 3), (5, 7, 4)),
}
every_layer = pytest.mark.parametrize(("make", "shape"), LAYERS.values(), ids=LAYERS)


@every_layer
@pytest.mark.parametrize("by_keyword", [False, True])
def test_layers_record_their_input_channels(make: Any, shape: tuple[int, ...], by_keyword: bool):
    layer, x = make(), normal(0, *shape).requires_grad_()
    handle = track(layer, momentum=1.0)
    y = layer(input=x) if by_keyword else layer(x)
    values = np.moveaxis(x.detach().numpy(), -1 if isinstance(layer, nn.Linear) else 1, 0).reshape(4, -1)
    np.testing.assert_allclose(handle.statistics.std(), values.std(1, ddof=1), rtol=1e-5)
    assert not handle.statistics.running_var.requires_grad
    assert torch.equal(y, type(layer).forward(layer, x))


@every_layer
def test_convolutions_record_inputs_without_a_batch(make: Any, shape: tuple[int, ...]):
    layer, x = make(), normal(0, *shape)[0]
    if not isinstance(layer, nn.Linear):
        statistics = track(layer, momentum=1.0).statistics
        layer(x)
        np.testing.assert_allclose(statistics.std(), x.flatten(1).numpy().std(1, ddof=1), rtol=1e-5)


def test_removing_leaves_no_trace():
    layer = nn.Conv2d(2, 3, 3)
    keys = list(layer.state_dict())
    handle = track(layer)
    assert is_tracked(layer)
    assert "fgo_geo_statistics.running_var" in layer.state_dict()
    handle.remove()
    assert list(layer.state_dict()) == keys
    assert not is_tracked(layer)
    assert not layer._forward_pre_hooks
    assert not layer._forward_pre_hooks_with_kwargs
    track(layer)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_record_for_themselves(duplicate: Any):
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
    track(model[0])
    model(normal(0, 5, 2))
    other = duplicate(model)
    for _ in range(2):
        other(normal(1, 5, 2))
    assert model[0].fgo_geo_statistics.num_batches_tracked == 1
    assert other[0].fgo_geo_statistics.num_batches_tracked == 3
    untrack(other[0])
    other(normal(1, 5, 2))
    model(normal(1, 5, 2))
    assert model[0].fgo_geo_statistics.num_batches_tracked == 2


def test_statistics_have_the_layers_mode_and_at_least_single_precision():
    for dtype, expected in ((torch.float64, torch.float64), (torch.bfloat16, torch.float32)):
        assert track(nn.Linear(2, 2, dtype=dtype)).statistics.running_var.dtype == expected
    assert not track(nn.Linear(2, 2).eval()).statistics.training


def test_compiled_layers_record_without_graph_breaks():
    layer = nn.Conv2d(2, 3, 3)
    statistics = track(layer, momentum=None).statistics
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for batch in range(2):
        compiled(normal(batch, 5, 2, 4, 4))
    alone = FeatureStatistics(2, momentum=None)
    for batch in range(2):
        alone(normal(batch, 5, 2, 4, 4), channel_dim=1)
    torch.testing.assert_close(dict(statistics.state_dict()), dict(alone.state_dict()))


def test_what_cannot_be_tracked_is_named():
    with pytest.raises(TypeError, match="got a BatchNorm2d: its input has no known channels"):
        track(nn.BatchNorm2d(2))
    with pytest.raises(ValueError, match="this LazyLinear has no weight yet; run a forward pass"):
        track(nn.LazyLinear(2))
    layer = nn.Linear(2, 2)
    track(layer)
    with pytest.raises(ValueError, match="this Linear is tracked already; untrack it first"):
        track(layer)
    untrack(layer)
    with pytest.raises(ValueError, match="this Linear is not tracked; there is nothing to undo"):
        untrack(layer)


# -- λ -----------------------------------------------------------------------------------------------------------


def with_variances(*variances: float) -> FeatureStatistics:
    statistics = FeatureStatistics(len(variances), dtype=torch.float64)
    statistics.running_var.copy_(torch.tensor(variances))
    return statistics


def test_rules():
    statistics = with_variances(9.0, 0.25, 0.0)
    assert rescaling_lambda(statistics, "max1").tolist() == [3, 1, 1]
    assert rescaling_lambda(statistics, "std").tolist() == [3, 0.5, math.sqrt(1e-5)]
    for rule in ("max1", "std"):
        assert rescaling_lambda(FeatureStatistics(2), rule).tolist() == [1, 1]
    with pytest.raises(ValueError, match=r"must be one of \('max1', 'std'\), got 'max'"):
        rescaling_lambda(statistics, "max")  # pyright: ignore


def input_channel(layer: Any, d: int, c: int) -> int:
    """The input channel that kernel (d, c) of a layer is applied to, by experiment."""
    layout = layout_of(layer, "weight")
    assert isinstance(layout, WeightLayout)
    channels = torch.zeros(layout.out_channels, layout.in_channels, *layout.kernel)
    channels[d, c] = 1
    with torch.no_grad():
        layer.weight.copy_(layout.weight(channels))
        inputs = (
            torch.eye(4) if isinstance(layer, nn.Linear) else torch.eye(4).reshape(4, 4, *(1,) * len(layout.kernel))
        )
        x = inputs if isinstance(layer, nn.Linear) else inputs.expand(-1, -1, *(4,) * len(layout.kernel))
        response = (layer(x) - layer(torch.zeros_like(x))).abs().flatten(1).sum(1)
    assert (response > 0).sum() == 1
    return int(response.argmax())


@every_layer
def test_the_lambda_of_a_kernel_is_that_of_the_channel_it_is_applied_to(make: Any, shape: tuple[int, ...]):
    layer = make()
    layout = layout_of(layer, "weight")
    assert isinstance(layout, WeightLayout)
    lam = torch.tensor([1.0, 2.0, 3.0, 5.0])
    per_kernel = kernel_lambda(lam, layout)
    assert per_kernel.shape == (layout.out_channels, layout.in_channels)
    for d in range(layout.out_channels):
        for c in range(layout.in_channels):
            assert per_kernel[d, c] == lam[input_channel(layer, d, c)]


def test_a_lambda_of_other_channels_is_refused():
    with pytest.raises(ValueError, match=r"in 2 group\(s\) has 4 input channels, got λ of shape \(2,\)"):
        kernel_lambda(torch.ones(2), WeightLayout((6, 2, 3, 3), conv_groups=2))


@given(seeds, st.sampled_from(["layer", "pi", "po", "pio"]), st.sampled_from(["kernel", "block"]))
def test_the_lambda_of_a_component_is_the_root_mean_square_over_its_channels(seed: int, strategy: str, components: str):
    layout = WeightLayout((6, 2, 3, 2), conv_groups=2)
    kinds = ("sphere",) if strategy == "layer" else ("sphere", "oblique")
    made = collection(6, 2, strategy, kinds, "random", seed, components=components)
    cut = partition([made], layout)
    lam = normal(seed, 4, dtype=torch.float64).exp()
    per_kernel = np.array([[lam[2 * (d // 3) + c] for c in range(2)] for d in range(6)])
    parts = zip(component_lambda(lam, cut), cut.groups, cut.kinds, cut.segments, strict=True)
    for found, numbers, kind, segments in parts:
        expected = []
        for number in numbers:
            group = made.groups[number]
            assert group.manifold == kind
            values = per_kernel[group.rows][:, group.columns]
            expected.append(np.sqrt((values**2).mean(keepdims=True)) if components == "block" else values)
        assert found.shape == (sum(e.size for e in expected),)
        if components == "block":
            np.testing.assert_allclose(found, np.concatenate(expected).ravel(), rtol=1e-14)
        else:
            group_of = segments.spread(torch.arange(len(numbers))).numpy()
            for group, values in enumerate(expected):
                np.testing.assert_allclose(np.sort(found[group_of == group]), np.sort(values.ravel()), rtol=1e-14)
