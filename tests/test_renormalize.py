from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import geoopt
import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations, parametrize

from fgo_geo.grouping import collection
from fgo_geo.models.feature_stats import is_tracked, track
from fgo_geo.models.renormalize import (
    Renormalization,
    remove_renormalization,
    renormalization_of,
    renormalize,
    update_scales,
)
from fgo_geo.weights.radius import bounding_radius

Array = np.ndarray

KINDS = ("sphere", "oblique", "stiefel", "spectral")
NORMS = ("frobenius", "spectral", "2->1")
DTYPES = (torch.float64, torch.float32, torch.bfloat16)
ORACLE_ERROR = 1e-14

seeds = st.integers(0, 2**31)
norm_sets = st.sets(st.sampled_from(NORMS), min_size=1).map(sorted)
every_kind = pytest.mark.parametrize("kind", KINDS)


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def raw_of(layer: Any) -> nn.Parameter:
    return layer.parametrizations.weight.original


# -- oracle: groups as explicit matrices, one component at a time, numpy in float64 --------------------------------


def kernels(layer: Any, weight: Tensor) -> Array:
    """The weight as ``(D, C, *kernel)``."""
    stored = weight.detach().double().numpy()
    if not isinstance(layer, nn.ConvTranspose2d):
        return stored
    rows, columns = stored.shape[1], stored.shape[0] // layer.groups
    result = np.empty((layer.groups * rows, columns, *stored.shape[2:]))
    for group, row, column in np.ndindex(layer.groups, rows, columns):
        result[group * rows + row, column] = stored[group * columns + column, row]
    return result


def tall(matrix: Array) -> Array:
    return matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T


def group_components(renormalized: nn.Module, weight: Tensor) -> list[tuple[str, list[Array]]]:
    """Kind and components of every group of a renormalised layer, cut out of a weight."""
    collections = renormalization_of(renormalized).collections
    sections = np.split(kernels(renormalized, weight), len(collections))
    result: list[tuple[str, list[Array]]] = []
    for section, made in zip(sections, collections, strict=True):
        for group in made.groups:
            if made.components == "block":
                parts = [section[group.rows][:, group.columns].reshape(len(group.rows), -1)]
            elif section.ndim == 3:
                parts = [section[d, c][:, None] for d, c in group.index]
            else:
                parts = [section[d, c].reshape(-1, section.shape[-1]) for d, c in group.index]
            result.append((group.manifold, [tall(part) for part in parts]))
    return result


def norms_of(components: Sequence[Array]) -> dict[str, float]:
    """Norms of components side by side."""
    matrix = np.concatenate(components, 1)
    return {
        "frobenius": math.sqrt((matrix**2).sum()),
        "spectral": float(np.linalg.svd(matrix, compute_uv=False)[0]),
        "2->1": sum(math.sqrt((row**2).sum()) for row in matrix),
    }


def excess(layer: Any, norms: Sequence[str] = NORMS, bound: float = 1.0) -> float:
    """By how much the norms of a layer's groups exceed the bound at most, relative to it."""
    groups = [norms_of(components) for _, components in group_components(layer, layer.weight)]
    return max(group[norm] / bound - 1 for group in groups for norm in norms)


def nearest(kind: str, matrix: Array, radius: float) -> Array:
    """The nearest point of a manifold; for the ball, the multiple on its boundary if the matrix is outside."""
    u, s, vh = np.linalg.svd(matrix, full_matrices=False)
    if kind == "sphere":
        return radius * matrix / np.linalg.norm(matrix)
    if kind == "oblique":
        return radius * matrix / np.linalg.norm(matrix, axis=0)
    return radius * u @ vh if kind == "stiefel" else matrix * min(1, radius / s[0])


LAYERS: dict[str, Callable[..., nn.Module]] = {
    "conv": lambda **k: nn.Conv2d(4, 6, 3, **k),
    "wide kernels": lambda **k: nn.Conv2d(3, 5, (2, 4), **k),
    "tall kernels": lambda **k: nn.Conv2d(3, 4, (5, 3), **k),
    "conv1d": lambda **k: nn.Conv1d(3, 5, 4, **k),
    "conv3d": lambda **k: nn.Conv3d(2, 3, (2, 3, 3), **k),
    "grouped": lambda **k: nn.Conv2d(6, 4, 3, groups=2, **k),
    "depthwise": lambda **k: nn.Conv2d(4, 4, 3, groups=4, **k),
    "transposed": lambda **k: nn.ConvTranspose2d(6, 4, 3, groups=2, **k),
    "pointwise": lambda **k: nn.Conv2d(12, 14, 1, **k),
    "grouped pointwise": lambda **k: nn.Conv2d(24, 26, 1, groups=2, **k),
    "linear": lambda **k: nn.Linear(17, 13, **k),
    "expanding linear": lambda **k: nn.Linear(12, 19, **k),
}


@st.composite
def groupings(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of ``renormalize`` that say which components are on which manifolds."""
    strategy = draw(st.sampled_from(["layer", "pi", "po", "pio"]))
    count = 1 if strategy == "layer" else draw(st.integers(1, 3))
    kinds = tuple(draw(st.sampled_from(KINDS)) for _ in range(count))
    selection = draw(st.sampled_from(["deterministic", "random"]))
    return {"groups": strategy, "manifold": kinds, "selection": selection, "seed": draw(seeds)}


layers = st.sampled_from(sorted(LAYERS))


# -- the weight ----------------------------------------------------------------------------------------------------


@given(layers, groupings(), norm_sets, st.sampled_from([0.3, 1, 4.0]), seeds, st.sampled_from([1e-9, 1.0, 1e9]))
def test_the_bounds_hold_for_every_raw_weight(
    name: str, grouping: dict[str, Any], norms: Any, bound: float, seed: int, size: float
):
    for dtype in DTYPES:
        layer = renormalize(LAYERS[name](dtype=dtype), norms=norms, bound=bound, **grouping)
        with torch.no_grad():
            raw_of(layer).copy_(size * normal(seed, *raw_of(layer).shape))
        assert layer.weight.dtype == dtype
        assert excess(layer, norms, bound) <= 4 * torch.finfo(dtype).eps + ORACLE_ERROR


@given(layers, groupings(), norm_sets, st.sampled_from([0.3, 4.0]), seeds)
def test_the_violation_is_the_excess_of_the_worst_norm(
    name: str, grouping: dict[str, Any], norms: Any, bound: float, seed: int
):
    layer = renormalize(LAYERS[name](dtype=torch.float64), norms=norms, bound=bound, **grouping)
    step = renormalization_of(layer)
    assert step.violation(layer.weight).max() <= ORACLE_ERROR
    other = bound * normal(seed, *layer.weight.shape, dtype=torch.float64)
    groups = [norms_of(components) for _, components in group_components(layer, other)]
    expected = [max(0.0, *(group[norm] / bound - 1 for norm in norms)) for group in groups]
    np.testing.assert_allclose(step.violation(other), expected, rtol=1e-9, atol=1e-12)


@given(layers, groupings())
def test_a_weight_is_projected_component_by_component(name: str, grouping: dict[str, Any]):
    layer = LAYERS[name](dtype=torch.float64)
    renormalized: Any = renormalize(copy.deepcopy(layer), **grouping)
    before, after = (group_components(renormalized, m.weight) for m in (layer, renormalized))
    for (kind, old), (_, new) in zip(before, after, strict=True):
        for matrix, point in zip(old, new, strict=True):
            radius = bounding_radius(kind, *point.shape, len(new), 1.0)
            np.testing.assert_allclose(point, nearest(kind, matrix, radius), atol=1e-13)


@given(layers, groupings(), seeds)
def test_a_weight_that_is_on_its_manifolds_keeps_its_value(name: str, grouping: dict[str, Any], seed: int):
    for dtype in DTYPES:
        layer: Any = renormalize(LAYERS[name](dtype=dtype), **grouping)
        with torch.no_grad():
            raw_of(layer).copy_(normal(seed, *raw_of(layer).shape))
            point = layer.weight.clone()
            raw_of(layer).zero_()
            layer.weight = point  # torch calls right_inverse
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(layer.weight, point, rtol=0, atol=16 * eps * float(point.abs().max()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["conv", "linear"])
def test_the_interior_of_the_ball_is_left_alone(name: str, dtype: torch.dtype):
    layer: Any = renormalize(LAYERS[name](dtype=dtype), manifold="spectral")
    point = 0.3 * layer.weight.detach()
    with torch.no_grad():
        layer.weight = point
    torch.testing.assert_close(layer.weight, point)


@every_kind
@pytest.mark.parametrize("name", ["conv", "linear"])
def test_the_raw_weight_has_the_scale_of_kaiming_initialisation(name: str, kind: str):
    layer = renormalize(LAYERS[name](), manifold=kind)
    fan_in = raw_of(layer)[0].numel()
    assert raw_of(layer).square().mean().item() <= 2 / fan_in * (1 + 1e-6)
    if kind != "spectral":  # in the ball only the largest singular value has the norm
        assert raw_of(layer).square().mean().item() == pytest.approx(2 / fan_in)


@every_kind
def test_a_zero_component_gives_a_point(kind: str):
    for name in ("conv", "linear"):
        layer: Any = renormalize(LAYERS[name](), manifold=kind, norms=["spectral"])
        raw = raw_of(layer)
        with torch.no_grad():
            raw.zero_()
        layer.weight.square().sum().backward()
        assert not raw.grad.isnan().any()
        for _, components in group_components(layer, layer.weight):
            for component in components:
                if kind == "spectral":
                    assert not component.any()
                else:
                    scale = bounding_radius(kind, *component.shape, len(components), 1.0, ["spectral"])
                    np.testing.assert_allclose(component, nearest(kind, component, scale), atol=1e-6 * scale)
                    assert component.any()


@every_kind
def test_nan_in_a_raw_weight_does_not_stay_hidden(kind: str):
    layer: Any = renormalize(LAYERS["conv"](), manifold=kind)
    with torch.no_grad():
        raw_of(layer)[1, 2, 0, 0] = torch.nan
    assert layer.weight.isnan()[1, 2].any()
    assert not layer.weight.isnan()[0].any()
    with pytest.raises(ValueError, match="the weight to renormalise has 1 non-finite entry"):
        layer.weight = raw_of(layer).detach()


# -- derivatives ---------------------------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("name", ["conv", "wide kernels", "pointwise"])
@pytest.mark.parametrize("start", ["anywhere", "on the manifold"])
def test_derivatives(kind: str, name: str, start: str):
    layer = LAYERS[name](dtype=torch.float64)
    renormalize(layer, manifold=kind)
    step = renormalization_of(layer)
    raw = raw_of(layer).detach()
    if start == "anywhere":
        raw = 3 * raw + 0.1 * normal(0, *raw.shape, dtype=torch.float64)
    elif kind == "spectral":  # inside, with repeated singular values; on the boundary there is no derivative
        raw = 0.5 * step.right_inverse(renormalize(LAYERS[name](dtype=torch.float64), manifold="stiefel").weight)  # pyright: ignore
    assert torch.autograd.gradcheck(step, raw.requires_grad_(), fast_mode=True)


@every_kind
def test_derivatives_in_single_precision_are_those_in_double_precision(kind: str):
    grads = []
    for dtype in (torch.float32, torch.float64):
        layer: Any = LAYERS["conv"](dtype=dtype)
        with torch.no_grad():
            layer.weight.copy_(normal(0, *layer.weight.shape))
        renormalize(layer, manifold=kind)
        with torch.no_grad():
            raw_of(layer).mul_(3)  # the ball has no derivative on its boundary
        (layer.weight * normal(1, *layer.weight.shape)).sum().backward()
        grads.append(raw_of(layer).grad)
    torch.testing.assert_close(grads[0].double(), grads[1], rtol=0, atol=1e-5 * float(grads[1].abs().max()))


# -- optimisers ----------------------------------------------------------------------------------------------------


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 6, 1), nn.ReLU(), nn.Flatten(), nn.Linear(54, 3)
    )


WEIGHTED = (0, 2, 5)


def renormalized_network(**arguments: Any) -> nn.Sequential:
    model = network()
    for position in WEIGHTED:
        renormalize(model[position], **arguments)
    return model


def loss_of(model: nn.Module, seed: int = 0, scale: float = 1e3) -> Tensor:
    x = normal(seed, 8, 2, 3, 3)
    return nn.functional.cross_entropy(scale * model(x.to(next(model.parameters()).dtype)).float(), torch.arange(8) % 3)


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=10.0, momentum=0.9, weight_decay=0.1),
    "Adam": lambda p: torch.optim.Adam(p, lr=1.0),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.5),
    "LBFGS": lambda p: torch.optim.LBFGS(p, lr=1.0, max_iter=5),
}


@every_kind
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("mode", ["float32", "bfloat16", "autocast"])
def test_every_bound_holds_at_every_step_of_every_optimiser(kind: str, optimizer: str, mode: str):
    model = renormalized_network(manifold=kind)
    if mode == "bfloat16":
        model.bfloat16()
    chosen = OPTIMIZERS[optimizer](list(model.parameters()))

    eps = torch.finfo(torch.bfloat16 if mode == "bfloat16" else torch.float32).eps

    def closure() -> Tensor:
        chosen.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
            loss = loss_of(model)
            assert model[5].weight.dtype == (torch.bfloat16 if mode == "bfloat16" else torch.float32)
            assert max(excess(model[position]) for position in WEIGHTED) <= 2 * eps
        loss.backward()
        return loss

    for _ in range(4):
        before = model[0].weight.detach().clone()
        chosen.step(closure)
        assert not torch.equal(model[0].weight, before)
    closure()


@every_kind
@pytest.mark.parametrize("autocast", [False, True])
def test_every_bound_holds_at_every_step_of_muon(kind: str, autocast: bool):
    layer: Any = renormalize(nn.Linear(7, 5), manifold=kind)
    optimizer = getattr(torch.optim, "Muon", torch.optim.SGD)  # torch has Muon since 2.9
    muon = optimizer([raw_of(layer)], lr=1.0, weight_decay=0.5)
    for step in range(5):
        muon.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = layer(normal(step, 3, 7)).square().sum()
            assert excess(layer) <= 2 * torch.finfo(torch.float32).eps
        loss.backward()
        muon.step()


@every_kind
@pytest.mark.parametrize("rule", ["max1", "std"])
def test_the_guarantee_holds_while_the_statistics_change(kind: str, rule: Any):
    model = renormalized_network(manifold=kind, statistics=rule)
    adam = torch.optim.Adam(model.parameters(), lr=0.5)
    for step in range(5):
        adam.zero_grad()
        loss_of(model, seed=step).backward()
        adam.step()
        update_scales(model)
        for position in WEIGHTED:
            renormalization = renormalization_of(model[position])
            assert renormalization.violation(model[position].weight).max() <= 4 * torch.finfo(torch.float32).eps
            assert (
                excess(model[position], bound=float(renormalization.guarantee())) <= 4 * torch.finfo(torch.float32).eps
            )
            assert rule == "std" or excess(model[position]) <= 2 * torch.finfo(torch.float32).eps


def test_adamw_learns():
    model = renormalized_network(manifold="stiefel", bound=3.0)
    adamw = torch.optim.AdamW(model.parameters(), lr=0.01)
    first = loss_of(model, scale=10.0).item()
    for _ in range(40):
        adamw.zero_grad()
        loss = loss_of(model, scale=10.0)
        loss.backward()
        adamw.step()
    assert loss.item() < first / 3


# -- statistics ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["max1", "std"])
@pytest.mark.parametrize("name", ["conv", "grouped", "transposed", "linear"])
@every_kind
def test_statistics_scale_components_and_the_guarantee_says_what_is_left(kind: str, name: str, rule: Any):
    layer: Any = LAYERS[name](dtype=torch.float64)
    strategy = "layer" if name == "linear" else "pi"
    renormalize(layer, manifold=kind, groups=strategy, statistics=rule)
    before = group_components(layer, layer.weight)
    std = layer.fgo_geo_statistics.running_var.uniform_(0.1, 4.0).sqrt().numpy()
    assert update_scales(nn.ModuleDict({"layer": layer})) == 1
    after = group_components(layer, layer.weight)
    lam = np.maximum(std, 1) if rule == "max1" else std
    made = renormalization_of(layer).collections[0]
    rows_per_group = made.out_channels // getattr(layer, "groups", 1)
    guarantee = renormalization_of(layer).guarantee()
    for number, ((_, old), (_, new), group) in enumerate(zip(before, after, made.groups, strict=True)):
        channels = [lam[d // rows_per_group * made.in_channels + c] for d, c in group.index]
        if made.components == "block":
            channels = [math.sqrt(np.square(channels).mean())]
        for a, b, factor in zip(old, new, channels, strict=True):
            np.testing.assert_allclose(b, a / factor, rtol=1e-12)
        assert guarantee[number] == pytest.approx(1 / min(channels))
        assert max(norms_of(new).values()) <= guarantee[number] * (1 + 1e-12)
    assert rule == "std" or excess(layer) <= 1e-14


def test_scales_change_only_when_asked():
    model = renormalized_network(statistics="std")
    before = [model[position].weight.detach().clone() for position in WEIGHTED]
    loss_of(model)
    assert all(torch.equal(model[p].weight, w) for p, w in zip(WEIGHTED, before, strict=True))
    assert update_scales(model) == 3
    assert not any(torch.equal(model[p].weight, w) for p, w in zip(WEIGHTED, before, strict=True))
    model.eval()
    loss_of(model, seed=1)
    after = model[0].weight.detach().clone()
    update_scales(model)
    assert torch.equal(model[0].weight, after)
    assert update_scales(renormalized_network()) == 0


def test_statistics_that_are_not_finite_change_nothing():
    model = renormalized_network(statistics="std")
    loss_of(model)
    model[5].fgo_geo_statistics.running_var[0] = torch.inf
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="the standard deviation of the input of '5' has 1 non-finite entry of 54"):
        update_scales(model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_tracking_that_was_there_before_stays():
    layer = nn.Linear(3, 2)
    track(layer, momentum=None)
    renormalize(layer, statistics="std")
    remove_renormalization(layer)
    assert is_tracked(layer)


# -- the life of a parametrization -----------------------------------------------------------------------------------


@every_kind
def test_removing_leaves_a_plain_parameter_of_the_same_value(kind: str):
    layer: Any = nn.Linear(7, 4) if kind == "stiefel" else nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    plain = type(layer)
    names, param, strides = list(layer.state_dict()), layer.weight, layer.weight.stride()
    assert renormalize(layer, manifold=kind, statistics="max1") is layer
    value = layer.weight.detach().clone()
    assert raw_of(layer).stride() == value.stride() == strides
    assert remove_renormalization(layer) is layer
    assert type(layer) is plain
    assert layer.weight is param
    assert param.stride() == strides
    assert torch.equal(layer.weight, value)
    assert sorted(layer.state_dict()) == sorted(names)
    assert not is_tracked(layer)


def test_copies_are_independent():
    model = renormalized_network(manifold="stiefel", statistics="std")
    loss_of(model)
    other = copy.deepcopy(model)
    update_scales(other)
    weight = model[0].weight.detach().clone()
    for position in WEIGHTED:
        remove_renormalization(other[position])
    loss_of(other).backward()
    assert torch.equal(model[0].weight, weight)
    assert update_scales(model) == 3
    assert torch.equal(model[0].weight, other[0].weight)


def test_a_state_dict_restores_the_weights():
    arguments: dict[str, Any] = {"statistics": "std", "manifold": ("spectral", "oblique"), "groups": "pio"}
    arguments |= {"selection": "random", "seed": 3}
    model = renormalized_network(**arguments)
    loss_of(model)
    update_scales(model)
    other = renormalized_network(**arguments)
    with torch.no_grad():
        for param in other.parameters():
            param.normal_()
    other.load_state_dict(model.state_dict())
    for position in WEIGHTED:
        assert torch.equal(other[position].weight, model[position].weight)
    assert len(model.state_dict()) == len(WEIGHTED) * (2 + 1 + 3)  # raw weight, bias; λ; statistics


def test_casting_to_half_precision_leaves_the_scales_as_they_are():
    layer = renormalize(nn.Linear(7, 3), statistics="std")
    step = renormalization_of(layer)
    assert step.lam is not None
    gamma, lam = step.gamma.clone(), step.lam.uniform_(0.5, 2).clone()
    layer.half().float()
    assert torch.equal(step.gamma, gamma)
    assert torch.equal(step.lam, lam)
    layer.double()
    assert excess(layer, bound=float(step.guarantee().max())) <= 0  # float32 scales were rounded down


def test_compiled_models_compute_the_same_without_graph_breaks():
    model = network()
    renormalize(model[0], manifold=KINDS, groups="pi", statistics="max1")
    renormalize(model[2], manifold="stiefel", bound=2.0)
    renormalize(model[5], manifold=("spectral", "oblique"), groups="po")
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    losses = [loss_of(m) for m in (model, compiled)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(losses[1], losses[0])
    for mine, other in zip(model.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(other.grad, mine.grad)


def _process(rank: int, folder: str, statistics: str | None) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model = DistributedDataParallel(renormalized_network(manifold="stiefel", statistics=statistics))
    _train(model, lambda step: normal(step, 8, 2, 3, 3)[4 * rank : 4 * rank + 4])
    weights = [layer.weight.detach() for layer in model.module if hasattr(layer, "weight")]
    torch.save((model.module.state_dict(), weights), f"{folder}/{rank}")
    dist.destroy_process_group()


def _train(model: nn.Module, batch: Callable[[int], Tensor]) -> None:
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(3):
        sgd.zero_grad()
        model(batch(step)).square().mean().backward()
        sgd.step()
        update_scales(model)


def test_two_processes_train_like_one_on_the_union_of_their_batches(tmp_path: Path):
    torch.multiprocessing.spawn(_process, args=(str(tmp_path), None), nprocs=2)
    alone = renormalized_network(manifold="stiefel", statistics=None)
    _train(alone, lambda step: normal(step, 8, 2, 3, 3))
    for rank in range(2):
        torch.testing.assert_close(torch.load(tmp_path / str(rank))[0], dict(alone.state_dict()))


def test_two_processes_with_statistics_have_equal_weights(tmp_path: Path):
    """Each gathers its own statistics, and they are pooled when the scales are updated."""
    torch.multiprocessing.spawn(_process, args=(str(tmp_path), "std"), nprocs=2)
    (_, first), (_, second) = (torch.load(tmp_path / str(rank)) for rank in range(2))
    assert first
    for one, other in zip(first, second, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


# -- errors --------------------------------------------------------------------------------------------------------


def test_layers_that_have_no_layout_are_refused_with_the_reason():
    for layer, name, message in (
        (nn.Embedding(3, 2), "weight", r"Embedding\.weight is a lookup table"),
        (nn.BatchNorm2d(3), "weight", r"BatchNorm2d\.weight scales or shifts"),
        (nn.GRU(3, 2), "weight_ih_l0", r"GRU\.weight_ih_l0 holds the gates"),
        (nn.Linear(3, 2), "bias", r"Linear\.bias has one dimension"),
        (nn.Linear(3, 2), "wait", r"Linear\.wait is not a parameter; this module has \['weight', 'bias'\]"),
        (nn.LazyLinear(2), "weight", r"LazyLinear\.weight is not initialised yet: run a forward pass"),
        (nn.Linear(3, 2, device="meta"), "weight", r"Linear\.weight is on the meta device: load its values first"),
        (nn.Sequential(nn.Linear(3, 2)), "weight", r"Sequential\.weight is not a parameter; its layers have 0\.weight"),
        (nn.ParameterDict({"a": torch.eye(2)}), "a", r"ParameterDict\.a is 'a' of ParameterDict, of unknown layout"),
    ):
        with pytest.raises(ValueError, match=f"^renormalize: {message}"):
            renormalize(layer, name)


def test_what_is_no_module_is_refused():
    for module, name in (("fc", "weight"), (nn.Linear(2, 2).weight, "weight"), (nn.Linear(2, 2), 3)):
        message = rf"renormalize takes a torch\.nn\.Module and the name of a parameter, got {type(module).__name__} and"
        with pytest.raises(TypeError, match=message):
            renormalize(module, name)  # pyright: ignore


def test_weights_that_something_else_governs_are_refused():
    for layer in (renormalize(nn.Linear(3, 2)), parametrizations.weight_norm(nn.Linear(3, 2))):
        with pytest.raises(ValueError, match=r"Linear\.weight is re-parametrised already: remove the parametrization"):
            renormalize(layer)
    layer = nn.Linear(3, 2)
    layer.weight = geoopt.ManifoldParameter(layer.weight.detach(), manifold=geoopt.Sphere())
    with pytest.raises(ValueError, match=r"Linear\.weight is constrained to a manifold already: unconstrain the model"):
        renormalize(layer)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"manifold": "cube"},
            r"manifold holds 'cube'; expected one of \('sphere', 'oblique', 'stiefel', 'ball', .*\)",
        ),
        ({"manifold": "euclidean"}, r"groups of kind 'euclidean' have no bounded norm; use one of \('sphere'"),
        ({"manifold": ("sphere", "stiefel")}, "strategy 'layer' puts the whole layer on one manifold"),
        ({"groups": "pip"}, "strategy must be one of"),
        ({"groups": collection(2, 3, "layer", "sphere", components="block"), "manifold": "sphere"}, "leave it out"),
        ({"groups": collection(3, 2, "layer", "sphere", components="block")}, "does not fit a weight of shape"),
        ({"norms": ()}, r"norms must be some of \('frobenius', 'spectral', 'two_to_one'\), got \(\)"),
        ({"norms": ("nuclear",)}, "norms must be some of"),
        ({"bound": 0.0}, "bound must be a positive finite float, got 0.0"),
        ({"statistics": "max"}, r"statistics must be None or one of \('max1', 'std'\), got 'max'"),
        ({"groups": 3}, "groups is 3; expected a strategy such as 'pio', a Collection, or a sequence of them"),
        ({"groups": ["pi"]}, r"groups is \['pi'\]; expected a strategy"),
        ({"manifold": 3}, r"manifold is 3; expected one of \('sphere', 'oblique', 'stiefel', 'ball', .*\), or several"),
        ({"manifold": ("sphere", 3)}, r"manifold is \('sphere', 3\); expected one of"),
        ({"manifold": ()}, "manifolds must name at least one of"),
        ({"norms": 3}, "norms must be some of .*, got 3"),
        ({"bound": True}, "bound must be a positive finite float, got True"),
        ({"bound": "1"}, "bound must be a positive finite float, got '1'"),
        (
            {"components": "kernels"},
            r"components must be one of \('auto', 'kernel', 'block', 'filter'\), got 'kernels'",
        ),
        ({"components": "kernel"}, 'components="block"'),
        ({"manifold": ("stiefel", "stiefel", "stiefel"), "groups": "pi", "components": "block"}, None),
    ],
)
def test_arguments_that_are_not_understood_change_nothing(arguments: dict[str, Any], message: str | None):
    layer = nn.Linear(3, 2) if message else nn.Linear(3, 1)
    state = copy.deepcopy(layer.state_dict())
    with pytest.raises(ValueError, match=message or r"stiefel cannot hold components of size \(1, 1\)"):
        renormalize(layer, **{"statistics": "std", **arguments})
    assert not parametrize.is_parametrized(layer)
    assert not is_tracked(layer)
    assert all(torch.equal(v, state[k]) for k, v in layer.state_dict().items())


def test_a_weight_that_is_not_finite_is_refused():
    layer = nn.Linear(3, 2)
    with torch.no_grad():
        layer.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"Linear\.weight has 1 non-finite entry of 6"):
        renormalize(layer, statistics="std")
    assert not parametrize.is_parametrized(layer)
    assert not is_tracked(layer)


def test_a_layer_that_cannot_be_parametrised_is_not_tracked(monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object) -> None:
        raise RuntimeError("the decomposition did not converge")

    layer = nn.Linear(3, 2)
    monkeypatch.setattr(Renormalization, "right_inverse", fail)
    with pytest.raises(RuntimeError, match="did not converge"):
        renormalize(layer, statistics="max1")
    assert not is_tracked(layer)
    assert not parametrize.is_parametrized(layer)


def test_packed_attention_projections_are_three_layers_without_statistics():
    attention = nn.MultiheadAttention(6, 2)
    with pytest.raises(TypeError, match="got a MultiheadAttention"):
        renormalize(attention, "in_proj_weight", statistics="std")
    assert not parametrize.is_parametrized(attention)
    renormalize(attention, "in_proj_weight", "stiefel")
    assert len(renormalization_of(attention, "in_proj_weight").collections) == 3
    for projection in attention.in_proj_weight.detach().numpy().reshape(3, 6, 6):
        assert norms_of([projection])["2->1"] == pytest.approx(1)
    x = normal(0, 4, 1, 6)
    assert attention(x, x, x)[0].shape == x.shape


def test_removing_what_is_not_there():
    layer = nn.Linear(3, 2)
    with pytest.raises(ValueError, match=r"Linear\.weight is not renormalised; call renormalize\(module, 'weight'\)"):
        remove_renormalization(layer)
    renormalize(layer)
    parametrize.register_parametrization(layer, "weight", nn.Identity())
    with pytest.raises(ValueError, match=r"Linear\.weight has other parametrizations"):
        remove_renormalization(layer)


def test_printing_says_what_is_bounded():
    layer = renormalize(nn.Conv2d(4, 6, 3), manifold=("spectral", "sphere"), groups="pio", bound=2, statistics="std")
    assert repr(renormalization_of(layer)).count(
        "PIO over 4 -> 6 channels: 10 groups, 5 spectral_ball + 5 sphere, sizes 2-3; frobenius, spectral, two_to_one "
        "of the group <= 2, λ by 'std'"
    )
