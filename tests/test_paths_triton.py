"""The Triton sweeps over kernels against the batched torch code.

Where there is no GPU the sweeps run in Triton's interpreter, on the CPU. Triton decides between compiling and
interpreting when it is imported, so :func:`test_in_the_interpreter` runs this file in a process of its own.
"""

from __future__ import annotations

import copy
import gc
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from path_helpers import (
    FORMATS,
    KINDS,
    answer,
    as_parameter,
    assert_close,
    option_sets,
    product,
    takes,
    trained,
    weight_on,
)
from torch import Tensor
from versions import needs_triton

from fgo_geo import ProductOfGroups, RiemannianFGSGD, kernels
from fgo_geo.grouping import collection
from fgo_geo.paths.native.kernels import NativeKernels
from fgo_geo.paths.protocol import Claim, Reason, Refusal, StepOptions, Weight
from fgo_geo.paths.triton import launches as gpu
from fgo_geo.paths.triton.launches import TritonKernels, problem_with_triton
from fgo_geo.weights.components import WeightLayout

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-12}

on_device = pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="needs a CUDA device")
on_gpu = pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.skipif(INTERPRETED, reason="is this process")
@needs_triton
def test_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=Path(__file__).parent, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]


def placed(manifold: ProductOfGroups, dtype: torch.dtype, memory_format: Any = torch.contiguous_format) -> Any:
    weight = weight_on(manifold, dtype, memory_format, 0)
    return weight if DEVICE == "cpu" else as_parameter(weight.detach().to(DEVICE), manifold)


def assert_the_batched_step(weights: list[Any], steps: int, scale: float, **options: Any) -> dict[str, Any]:
    assert takes(TritonKernels(), *weights) == [True] * len(weights)
    fused = trained("fused", weights, steps, scale, **options)
    expected = trained("reference", weights, steps, scale, **options)
    assert_close(fused, expected, max(TOLERANCE[w.dtype] for w in weights))
    for after, weight in zip(fused["weights"], weights, strict=True):
        assert after.stride() == weight.stride()
        assert float(weight.manifold.violation(after).max()) <= TOLERANCE[weight.dtype]
    return fused


@on_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("radii", [3.0, 1e4, 1e7, 1e9])
def test_a_step_of_any_length_ends_on_the_manifold(radii: float, dtype: torch.dtype):
    manifold = ProductOfGroups(collection(4, 5, "pio", KINDS, "random", 0), (4, 5, 5, 5), 0.5)
    weight = placed(manifold, dtype)
    generator = torch.Generator().manual_seed(1)
    direction = torch.randn(weight.shape, dtype=torch.float64, generator=generator)
    weight.grad = (direction / direction.norm(dim=(-2, -1), keepdim=True)).to(weight)
    with kernels.use_path("fused"):
        RiemannianFGSGD([weight], lr=0.5 * radii, step_size="constant").step()
    assert float(manifold.violation(weight.detach()).max()) <= 20 * torch.finfo(dtype).eps


@on_device
@settings(max_examples=15 if INTERPRETED else 100)
@given(
    data=st.data(),
    kernel=st.sampled_from([(3, 3), (5, 5), (3, 1), (1, 3), (2, 4), (3,), (2, 2, 2), (3, 2, 1), (4, 3)]),
    options=option_sets,
)
def test_fused_is_the_batched_step(data: st.DataObject, kernel: tuple[int, ...], options: dict[str, Any]):
    draw = data.draw
    out_channels, in_channels = draw(st.integers(1, 15)), draw(st.integers(1, 15))
    kinds = draw(st.lists(st.sampled_from(KINDS), min_size=1, max_size=4, unique=True))
    strategy = draw(st.sampled_from(["pi", "po", "pio", "layer"]))
    transposed = draw(st.booleans())
    shape = (in_channels, out_channels, *kernel) if transposed else (out_channels, in_channels, *kernel)
    groups = collection(out_channels, in_channels, strategy, kinds[:1] if strategy == "layer" else kinds, "random", 0)
    radius = draw(st.sampled_from(["number", "kind", "kernel"]))
    radii = {
        "number": 0.7,
        "kind": dict(zip(KINDS, (1.0, 0.5, 1.5, 2.0), strict=True)),
        "kernel": 0.5 + torch.rand(out_channels, in_channels, generator=torch.Generator().manual_seed(3)),
    }[radius]
    manifold = ProductOfGroups(groups, WeightLayout(shape, "transposed" if transposed else "conv"), radii)
    weight = placed(
        manifold, draw(st.sampled_from([torch.float32, torch.float64])), draw(st.sampled_from(FORMATS[len(shape)]))
    )
    assert_the_batched_step([weight], 2, draw(st.sampled_from([0.0, 1e-3, 0.3, 1e3])), **options)


@on_device
@pytest.mark.parametrize("memory_format", FORMATS[4], ids=str)
def test_the_largest_components(memory_format: Any):
    weight = placed(product(shape=(4, 5, 7, 7)), torch.float64, memory_format)
    assert_the_batched_step([weight], 2, 0.3, momentum=0.9)


@on_device
def test_parameters_of_every_size_and_type_take_one_step_together():
    """One of them has a group of more kernels than are added up in one piece."""
    weights = [placed(product("po", (20, 15, 3, 3)), torch.float32), placed(product("pi", (7, 5, 3, 3)), torch.float32)]
    weights += [
        placed(product("pio", (4, 60, 3, 1)), torch.float64),
        placed(product("po", (9, 4, 3, 3)), torch.float64),
    ]
    layer = ProductOfGroups(collection(33, 35, "layer", ("stiefel",)), (33, 35, 3, 3), 0.3)
    weights += [placed(layer, torch.float32, torch.channels_last)]
    assert_the_batched_step(weights, 2, 0.3, momentum=0.9, curvature="manifold")


@on_device
@pytest.mark.parametrize("length", [1e-4, 0.008, 0.02, 0.5, 5.0, 50.0, 1e3, 1e5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_steps_of_every_length_end_on_the_manifold(length: float, dtype: torch.dtype):
    manifold = product(shape=(10, 9, 3, 3))
    weight = placed(manifold, dtype)
    options = {"step_size": "constant", "lr": length}
    fused = trained("fused", [weight], 1, 1.0, **options)
    assert float(manifold.violation(fused["weights"][0]).max()) <= 8 * torch.finfo(dtype).eps
    expected = trained("reference", [as_parameter(weight.detach().double(), manifold)], 1, 1.0, **options)
    assert_close(fused, expected, TOLERANCE[dtype] * max(1.0, length) ** 2)  # of a polar factor, by its condition


@on_device
def test_many_steps_do_not_drift():
    weight = placed(product(shape=(8, 8, 3, 3)), torch.float32, torch.channels_last)
    after = trained("fused", [weight], 25 if INTERPRETED else 10_000, 0.1, momentum=0.9)["weights"][0]
    assert float(weight.manifold.violation(after).max()) <= 1e-6


@on_device
@pytest.mark.parametrize("shape", [(1, 17, 3, 3), (17, 1, 3, 3), (1, 1, 3, 3), (33, 1, 1, 3), (1, 9, 3, 1)], ids=str)
def test_every_dimension_of_points_is_dealt_with_alike(shape: tuple[int, ...]):
    for memory_format in FORMATS[4]:
        manifold = ProductOfGroups(collection(shape[0], shape[1], "layer", ("oblique",)), shape)
        assert_the_batched_step([placed(manifold, torch.float64, memory_format)], 2, 0.3, momentum=0.9)


@on_device
@pytest.mark.parametrize("nesterov", [False, True])
def test_the_learning_rate_is_read_on_the_device(nesterov: bool):
    weight = placed(product(shape=(6, 5, 3, 3)), torch.float64)
    results = []
    for lr in (torch.tensor(0.1, dtype=torch.float64, device=DEVICE), 0.1):
        own = copy.deepcopy(weight)
        optimizer = RiemannianFGSGD([own], lr=lr, momentum=0.9, nesterov=nesterov)
        with kernels.use_path("fused"):
            for step in range(2):
                own.grad = torch.full_like(own, 0.3)
                if step == 1:
                    optimizer.param_groups[0]["lr"] = lr.mul_(3) if isinstance(lr, Tensor) else 3 * lr
                optimizer.step()
        results.append(own.detach())
    torch.testing.assert_close(*results, rtol=0, atol=1e-14)
    assert float((results[0] - weight.detach()).abs().max()) > 1e-3


@on_device
def test_gradient_in_another_memory_format_is_read_and_left_alone():
    weight = placed(product(shape=(6, 5, 3, 3)), torch.float64, torch.channels_last)
    grad = torch.randn(weight.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    results = []
    for path in ("fused", "reference"):
        own = copy.deepcopy(weight)
        own.grad = grad.clone()
        with kernels.use_path(path):
            RiemannianFGSGD([own], lr=0.1, momentum=0.9).step()
        torch.testing.assert_close(own.grad, grad, rtol=0, atol=0)
        results.append(own.detach())
    torch.testing.assert_close(*results, rtol=0, atol=1e-13)


@on_device
def test_paths_can_change_between_steps_and_with_a_checkpoint():
    weight = placed(product(shape=(6, 5, 3, 3)), torch.float64)
    expected = trained("reference", [weight], 4, 0.3, momentum=0.9)["weights"][0]
    own = copy.deepcopy(weight)
    optimizer = RiemannianFGSGD([own], lr=0.1, momentum=0.9)
    generator = torch.Generator().manual_seed(1)
    for path in ("fused", "reference", "fused", "auto"):
        grad = torch.randn(own.shape, dtype=torch.float64, generator=generator)
        own.grad = (0.3 * grad).to(DEVICE)
        fresh = RiemannianFGSGD([own], lr=0.1, momentum=0.9)
        fresh.load_state_dict(optimizer.state_dict())
        optimizer = fresh
        with kernels.use_path(path):
            optimizer.step()
    torch.testing.assert_close(own.detach(), expected, rtol=0, atol=1e-13)


@on_device
def test_nothing_changes_before_a_gradient_is_refused():
    weights = [placed(product(strategy, (6, 5, 3, 3)), torch.float32) for strategy in ("po", "pi")]
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    weights[1].grad[3, 2, 1, 0] = float("nan")
    optimizer = RiemannianFGSGD(
        [("first", weights[0]), ("second", weights[1])], lr=0.1, momentum=0.9, check_finite=True
    )
    before = [w.detach().clone() for w in weights]
    with kernels.use_path("fused"), pytest.raises(FloatingPointError, match=r"the gradient of 'second'.*no parameter"):
        optimizer.step()
    for weight, old in zip(weights, before, strict=True):
        torch.testing.assert_close(weight.detach(), old, rtol=0, atol=0)
    assert not optimizer.state


@on_device
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_group_without_a_finite_gradient_is_left_out_and_counted(bad: float):
    results = []
    for path in ("fused", "reference"):
        weight = placed(product("po", (6, 9, 3, 3)), torch.float64, torch.channels_last)
        optimizer = RiemannianFGSGD([weight], lr=0.1, momentum=0.9, check_finite=False)
        # The interpreter computes with numpy, which warns of inf - inf; a GPU says nothing.
        with kernels.use_path(path), np.errstate(invalid="ignore", over="ignore"):
            for step in range(3):
                weight.grad = torch.empty_like(weight).fill_(0.1 * (step + 1))
                weight.grad[2, 5, 0, 0] = bad if step == 1 else 0.0
                optimizer.step()
        assert optimizer.skipped_groups() == 1
        results.append(weight.detach())
    torch.testing.assert_close(*results, rtol=0, atol=1e-13)


@on_device
def test_new_radii_are_seen():
    weight = placed(product("po", (6, 5, 3, 3), radius=1.0), torch.float64)
    weight.grad = torch.ones_like(weight)
    optimizer = RiemannianFGSGD([weight], lr=0.1)
    with kernels.use_path("fused"):
        optimizer.step()
        weight.manifold.set_radius(2.0)
        weight.data = weight.manifold.projx(weight.data)
        optimizer.step()
    assert float(weight.manifold.violation(weight.detach()).max()) <= 1e-14


@on_device
@pytest.mark.parametrize("strategy", ["pi", "layer"])
def test_the_same_step_gives_the_same_bits(strategy: str):
    shape = (30, 40, 3, 3) if INTERPRETED else (256, 512, 3, 3)
    kinds = KINDS if strategy == "pi" else ("oblique",)
    weight = placed(ProductOfGroups(collection(*shape[:2], strategy, kinds, "random", 0), shape), torch.float32)
    first, *others = [trained("fused", [weight], 1, 0.3) for _ in range(2 if INTERPRETED else 5)]
    for other in others:
        assert_close(other, first, 0.0)


@on_device
def test_a_table_that_launches_write_is_the_table():
    """As they do while a graph is captured."""
    rows = tuple(tuple(range(k, 2**40 * (k + 1), 2**36 * (k + 1)))[:16] for k in range(3))
    torch.testing.assert_close(gpu._written(rows, torch.device(DEVICE)).cpu(), torch.tensor(rows), rtol=0, atol=0)


@on_gpu
def test_a_step_is_captured_and_replayed():
    weight = placed(product("pio", (24, 16, 3, 3)), torch.float32)
    expected = trained("fused", [weight], 3, 0.0, momentum=0.9)["weights"][0]
    own = copy.deepcopy(weight)
    optimizer = RiemannianFGSGD([own], lr=0.1, momentum=0.9)
    own.grad = torch.zeros_like(own)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with kernels.use_path("fused"), torch.cuda.stream(stream):
        optimizer.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with kernels.use_path("fused"), torch.cuda.graph(graph):
        optimizer.step()
    grads = [torch.randn_like(own) for _ in range(2)]
    reference = copy.deepcopy(own)
    reference.data = own.detach().clone()
    oracle = RiemannianFGSGD([reference], lr=0.1, momentum=0.9)
    oracle.load_state_dict(optimizer.state_dict())
    torch.testing.assert_close(own.detach(), expected, rtol=0, atol=1e-6)
    momentum = optimizer.state[own]["momentum_buffer"]
    del optimizer  # the graph outlives it, and the tables that it kept
    gc.collect()
    for grad in grads:
        own.grad.copy_(grad)
        graph.replay()
        reference.grad = grad.clone()
        with kernels.use_path("reference"):
            oracle.step()
    torch.testing.assert_close(own.detach(), reference.detach(), rtol=0, atol=2e-5)
    torch.testing.assert_close(momentum, oracle.state[reference]["momentum_buffer"], rtol=0, atol=2e-5)


@pytest.mark.filterwarnings("ignore:AnnAssign:DeprecationWarning")  # of Triton, from Python 3.13 on
@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@needs_triton
@pytest.mark.parametrize("memory_format", FORMATS[4], ids=str)
def test_the_sweeps_compile_for_a_device_that_is_not_there(memory_format: Any, monkeypatch, tmp_path):
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    weight = weight_on(product(shape=(4, 4, 3, 3)), torch.float32, memory_format, 0)
    weight.grad = torch.zeros_like(weight)
    own = Weight(weight, weight, weight.manifold, weight.grad, torch.zeros_like(weight))
    batch = gpu._LaunchBatch([Claim(own, tuple(range(own.n_parts)))])
    (launch,) = batch._launches(StepOptions(lr=0.1, momentum=0.9, nesterov=True))
    options = {"MAXIMIZE": True, "INVARIANT": True}
    momentum = {"MOMENTUM": True, "NESTEROV": True, "RATE": True, "LIMIT": 1e-3}
    sweeps = {
        "norms": ({"table": "*i64", "squares": "*fp64"}, {**launch.constants, **options}),
        "update": (
            {"table": "*i64", "scales": "*fp64", "rate": "*fp32", "long_steps": "*i32"},
            {**launch.constants, **options, **momentum},
        ),
        "retract_long_steps": ({"table": "*i64", "long_steps": "*i32"}, launch.constants),
        "segment_sums": (
            {"values": "*fp64", "bounds": "*i64", "sums": "*fp64", "segments": "i32"},
            {"ROWS": 4, "COLUMNS": 128},
        ),
        "write": ({"table": "*i64", "place": "i64", **dict.fromkeys("abcdefgh", "i64")}, {}),
    }
    for name, (signature, constants) in sweeps.items():
        signature = {**signature, **dict.fromkeys(constants, "constexpr")}
        source = ASTSource(fn=getattr(gpu._sweeps(), name), signature=signature, constexprs=constants)
        compiled = compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4, "enable_fp_fusion": True})
        assert "cubin" in compiled.asm


# -- which path -------------------------------------------------------------------------------------------------------


def kernels_on_cpu(dtype: torch.dtype = torch.float32, shape: tuple[int, ...] = (4, 4, 3, 3)) -> Any:
    return weight_on(product(shape=shape), dtype, torch.contiguous_format, 0)


def test_the_device_of_the_weight_chooses_the_path():
    weight = kernels_on_cpu()
    assert answer(TritonKernels(interpreted=False), weight) == Refusal(
        Reason.DEVICE, "the Triton sweeps run on CUDA devices, the weight is on cpu"
    )
    elsewhere = as_parameter(torch.empty(4, 4, 3, 3, device="meta"), weight.manifold)
    assert answer(NativeKernels(), elsewhere) == Refusal(
        Reason.DEVICE, "the compiled sweeps run on the CPU, the weight is on meta"
    )


def test_what_cannot_be_fused_says_why():
    path = TritonKernels(interpreted=True)
    for weight in (kernels_on_cpu(), kernels_on_cpu(shape=(4, 4, 3, 3, 3))):
        reply = answer(path, weight)
        works = not isinstance(reply, Refusal)
        assert works or reply.reason is Reason.MISSING  # without Triton, or where it compiles for a GPU
        assert works == (INTERPRETED and problem_with_triton(gpu._sweeps().triton, list) is None)
    assert answer(path, kernels_on_cpu(torch.bfloat16)) == Refusal(
        Reason.DTYPE, "fused steps take float32 and float64, got torch.bfloat16"
    )
    assert answer(path, kernels_on_cpu(shape=(2, 2, 8, 7))) == Refusal(
        Reason.SIZE, "components of 8 x 7 are larger than 49 entries"
    )
    strange = kernels_on_cpu(shape=(4, 4, 3, 3, 3))
    strange.data = strange.data.transpose(2, 3).contiguous().transpose(2, 3)
    reply = answer(path, strange)
    assert isinstance(reply, Refusal)
    assert reply.reason is Reason.LAYOUT


@pytest.mark.parametrize(
    ("triton", "message"),
    [
        (None, "Triton is not installed; it comes with torch for CUDA on Linux"),
        (SimpleNamespace(__version__="3.2.0"), "Triton 3.2.0 is installed, at least 3.3 is needed"),
        (SimpleNamespace(__version__="3.10.1+git", TritonError=ValueError), "Triton does not work here: no compiler"),
    ],
)
@pytest.mark.parametrize("error", [RuntimeError, ValueError, OSError])
def test_a_triton_that_is_of_no_use_says_why(triton: Any, message: str, error: type[Exception]):
    def try_out() -> None:
        raise error("no compiler")

    assert problem_with_triton(triton, try_out) == message


@pytest.mark.skipif(INTERPRETED, reason="once is enough")
def test_the_package_neither_needs_nor_imports_triton():
    code = (
        "import sys, fgo_geo; assert 'triton' not in sys.modules; sys.modules['triton'] = None; "
        "from fgo_geo.paths.triton import _sweeps; assert _sweeps.triton is None"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
