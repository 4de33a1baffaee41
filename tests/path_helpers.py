"""What the tests of execution paths share: weights, steps along a forced path, and what a path answers to a weight."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import geoopt
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from fgo_geo import Oblique, ProductOfGroups, RiemannianFGSGD, ScaledSphere, kernels
from fgo_geo.grouping import collection
from fgo_geo.paths.native.library import instruction_set, library
from fgo_geo.paths.protocol import Path, Refusal, StepOptions, Weight

built = pytest.mark.skipif(library() is None, reason="the extension was not built: there is no C++ compiler")

KINDS = ("sphere", "oblique", "stiefel", "euclidean")
NAMES_OF_SETS = ("portable", "AVX2", "AVX-512")
INSTRUCTION_SETS = range(1 if library() is None else NAMES_OF_SETS.index(instruction_set()) + 1)
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-13}
CLOSE = TOLERANCE[torch.float32]
FORMATS = {2: [torch.contiguous_format], 3: [torch.contiguous_format]}
FORMATS |= {4: [torch.contiguous_format, torch.channels_last], 5: [torch.contiguous_format, torch.channels_last_3d]}


@contextmanager
def limited_to(number: int) -> Iterator[None]:
    """Use an instruction set up to this one, if there is an extension."""
    if library() is None:
        yield
        return
    before = NAMES_OF_SETS.index(instruction_set())
    assert instruction_set(number) == NAMES_OF_SETS[number]
    try:
        yield
    finally:
        instruction_set(before)


# -- weights -----------------------------------------------------------------------------------------------------------


def as_parameter(point: Tensor, manifold: geoopt.Manifold) -> Any:
    build: Any = geoopt.ManifoldParameter  # its constructor has no usable annotation
    return build(point, manifold=manifold)


def product(strategy: str = "pio", shape: tuple[int, ...] = (40, 24, 3, 3), **kwargs: Any) -> ProductOfGroups:
    """Kernels of all four kinds."""
    return ProductOfGroups(collection(shape[0], shape[1], strategy, KINDS, "random", 0), shape, **kwargs)


def product_of_blocks(
    shape: tuple[int, ...], strategy: str, kinds: tuple[str, ...], selection: str = "random"
) -> ProductOfGroups:
    """A matrix whose blocks belong to several kinds."""
    return ProductOfGroups(collection(*shape[:2], strategy, kinds, selection, 0, components="block"), shape)


def weight_on(manifold: ProductOfGroups, dtype: torch.dtype, memory_format: Any, seed: int) -> Any:
    shape = manifold.layout.shape
    point = manifold.random(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))
    return as_parameter(point.as_subclass(Tensor).to(memory_format=memory_format), manifold)


def declared(manifold: Any, *shape: int, dims: tuple[int, ...] | None = None, dtype: Any = torch.float32) -> Any:
    """A random point, stored with its dimensions in the given order, the first the slowest."""
    point = manifold.random(*shape, dtype=dtype, generator=torch.Generator().manual_seed(0)).as_subclass(Tensor)
    if dims is not None:
        point = point.permute(dims).contiguous().permute([dims.index(d) for d in range(len(dims))])
    return as_parameter(point, manifold)


def in_double(weight: Any) -> Any:
    """The same weight in double precision, under manifolds of its own."""
    return as_parameter(weight.detach().as_subclass(Tensor).double(), copy.deepcopy(weight.manifold))


def many_weights() -> list[Any]:
    """Runs and columns, long and short, with one radius and several."""
    return [
        declared(ScaledSphere(2.0), 100_003),
        declared(ScaledSphere(torch.linspace(0.5, 2, 57)), 57, 33),
        declared(Oblique(), 300, 521),
        declared(Oblique(0.5), 300, 37, dims=(1, 0)),
        declared(Oblique(torch.tensor([0.5, 1.5, 1.0])), 3, 64, 70),
        declared(ScaledSphere(ndim=3), 19, 4, 9, 5, dims=(0, 2, 3, 1)),
        declared(product_of_blocks((90, 70), "pio", ("sphere", "oblique", "euclidean")), 90, 70),
    ]


# -- steps -------------------------------------------------------------------------------------------------------------


def trained(path: Any, weights: Sequence[nn.Parameter], steps: int, scale: float, **options: Any) -> dict[str, Any]:
    """Weights, momentum and step scales after some steps along a path."""
    weights = [copy.deepcopy(w) for w in weights]
    optimizer = RiemannianFGSGD(weights, **{"lr": 0.1, **options})
    generator = torch.Generator().manual_seed(1)
    with kernels.use_path(path):
        for _ in range(steps):
            for weight in weights:
                grad = torch.randn(weight.shape, dtype=torch.float64, generator=generator)
                weight.grad = torch.empty_like(weight).copy_(scale * grad)
            optimizer.step()
    scales = optimizer.step_scales()
    return {
        "weights": [w.detach() for w in weights],
        "momentum": [optimizer.state[w]["momentum_buffer"] for w in weights if options.get("momentum")],
        "scales": [scales[w] for w in weights],
    }


def assert_close(actual: dict[str, list[Tensor]], expected: dict[str, list[Tensor]], tolerance: float) -> None:
    assert actual.keys() == expected.keys()
    for name in actual:
        for a, e in zip(actual[name], expected[name], strict=True):
            size = max(1.0, float(e.abs().max()))
            error = float((a / size - e.to(a.dtype) / size).abs().max())
            assert error <= tolerance, f"{name} differ by {error}"


def assert_is_the_step_in_double(weights: list[Any], scale: float, **options: Any) -> None:
    """Three steps on any path are those of the reference path in double precision, and end on the manifold."""
    actual = trained("auto", weights, 3, scale, **options)
    assert_close(actual, trained("reference", [in_double(w) for w in weights], 3, scale, **options), CLOSE)
    for weight, after in zip(weights, actual["weights"], strict=True):
        assert after.stride() == weight.stride()
        assert float(weight.manifold.violation(after).max()) <= 5e-7


def give_gradients(weights: Sequence[Any], size: float = 0.1) -> None:
    """Random gradients, the same for the same positions and shapes."""
    for seed, weight in enumerate(weights):
        generator = torch.Generator().manual_seed(seed)
        grad = size * torch.randn(weight.shape, dtype=torch.float64, generator=generator)
        weight.grad = torch.empty_like(weight).copy_(grad)


def after_two_steps(weights: Sequence[Any], **options: Any) -> RiemannianFGSGD:
    """An optimiser whose next step is one sweep, if nothing happens in between."""
    optimizer = RiemannianFGSGD(weights, **{"lr": 0.1, "momentum": 0.9, **options})
    for _ in range(2):
        give_gradients(weights)
        optimizer.step()
    return optimizer


def assert_refused(optimizer: RiemannianFGSGD, weights: Sequence[Any]) -> None:
    """The step is refused for a weight that is not finite, and changes no weight."""
    before = [w.detach().clone() for w in weights]
    with pytest.raises(FloatingPointError, match="is not finite itself"):
        optimizer.step()
    for weight, old in zip(weights, before, strict=True):
        torch.testing.assert_close(weight.detach(), old, rtol=0, atol=0, equal_nan=True)


def sweeps_of(work: Callable[[], object]) -> dict[str, int]:
    """How often each function of the compiled extension is called."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        work()
    return dict(Counter(event.name for event in profiled.events() if event.name.startswith("fgo_")))


def is_fused(calls: dict[str, int]) -> bool:
    """Whether kernels took two sweeps; bounds may take the place of norms, or show that norms are needed."""
    norms = {name: count for name, count in calls.items() if name != "fgo_bounds"}
    return norms == {"fgo_norms": 1, "fgo_update": 1} or calls == {"fgo_bounds": 1, "fgo_update": 1}


# -- paths -------------------------------------------------------------------------------------------------------------


def answer(path: Path, param: Any, grad: Tensor | None = None, **options: Any) -> tuple[int, ...] | Refusal:
    """What a path says to all parts of a parameter."""
    grad = torch.zeros_like(param.detach()).as_subclass(Tensor) if grad is None else grad
    weight = Weight(param, param, param.manifold, grad)
    return path.accepts(weight, tuple(range(weight.n_parts)), StepOptions(lr=0.1, **options))


def takes(path: Path, *params: Any, **options: Any) -> list[bool]:
    return [not isinstance(answer(path, param, **options), Refusal) for param in params]


# -- strategies --------------------------------------------------------------------------------------------------------


kernel_sizes = st.one_of(
    st.sampled_from([(3, 3), (5, 5), (7, 7), (3, 1), (1, 3), (2, 4), (3,), (5,), (2, 2, 2), (3, 3, 3), (3, 2, 1)]),
    st.tuples(st.integers(2, 7), st.integers(2, 7)),
)
scales = st.sampled_from([0.0, 1e-3, 0.1, 1.0, 1e3])
option_sets = st.sampled_from(
    [
        {},
        {"momentum": 0.9},
        {"momentum": 0.9, "nesterov": True},
        {"momentum": 0.5, "dampening": 0.3, "maximize": True},
        {"momentum": 0.9, "weight_decay": 0.1},
        {"weight_decay": 0.1, "maximize": True},
        {"momentum": 0.9, "radius_invariant": True},
        {"momentum": 0.9, "curvature": "manifold"},
        {"curvature": "manifold", "radius_invariant": True, "rho": 0.01},
        {"momentum": 0.9, "step_size": "constant", "lr": 0.01},
        {"momentum": 0.9, "norm": "running"},
        {"rho": 0.1, "curvature": 3.0},
    ]
)
