"""What every execution path promises: whole steps, refusals by value, no hold on models, and few files to read."""

from __future__ import annotations

import copy
import gc
import sys
import threading
import weakref
from collections.abc import Callable
from pathlib import Path as FilePath
from typing import Any

import geoopt
import pytest
import torch
from own_kind import registered_rows
from path_helpers import (
    KINDS,
    answer,
    as_parameter,
    assert_close,
    built,
    declared,
    product,
    product_of_blocks,
    trained,
    weight_on,
)
from torch import Tensor, nn

import fgo_geo
from fgo_geo import ProductOfGroups, RiemannianFGSGD, Stiefel, constrain, kernels
from fgo_geo.grouping import collection
from fgo_geo.paths import router
from fgo_geo.paths.native.lines import NativeLines
from fgo_geo.paths.protocol import Path, Refusal
from fgo_geo.paths.reference import Reference

PATHS: list[Path] = [*router._FUSED, *router._UNFUSED]
LOCK = type(threading.Lock())
PACKAGE = FilePath(fgo_geo.__file__).parent

# -- a step is whole ---------------------------------------------------------------------------------------------------


_ROUNDING = 1e-6  # what a path carries from another step is computed anew


def interrupted_at(number: int, work: Callable[[], object]) -> tuple[int, bool]:
    """Raise KeyboardInterrupt at one of the calls that some work makes, of Python functions and of built-in ones.

    Returns:
        How many calls there were, and whether the interrupt came through.
    """
    count = 0

    def watch(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        is_lock = isinstance(getattr(argument, "__self__", None), LOCK)  # whose release no signal prevents
        if event in ("call", "c_call") and not is_lock and argument is not sys.setprofile:
            count += 1
            if count == number:
                raise KeyboardInterrupt

    gc.disable()
    said, sys.unraisablehook = sys.unraisablehook, lambda _: None  # what is being deleted swallows an interrupt
    try:
        sys.setprofile(watch)
        work()
    except KeyboardInterrupt:
        return count, True
    finally:
        sys.setprofile(None)
        sys.unraisablehook = said
        gc.enable()
        torch.set_grad_enabled(True)  # where the end of `no_grad` was interrupted
    return count, False


def small_parameters() -> dict[str, Any]:
    """One parameter for every path, and one for two of them."""
    return {
        "blocks": declared(product_of_blocks((16, 16), "pio", KINDS), 16, 16),
        "kernels": weight_on(product("pio", (4, 4, 3, 3)), torch.float32, torch.contiguous_format, 0),
        "matrix": declared(Stiefel(), 130, 128),
        "small": declared(product_of_blocks((8, 6), "po", ("sphere", "stiefel")), 8, 6),
        "plain": nn.Parameter(torch.linspace(-1, 1, 5)),
    }


def set_gradients(params: list[Any], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator)


def states_after_interrupts(optimizer: RiemannianFGSGD, path: Any) -> set[tuple[int, ...]]:
    """Interrupt a step at every call in turn; which parameters have moved then, if all are as before it or after it."""
    params = optimizer.param_groups[0]["params"]
    start = [param.detach().clone() for param in params]
    entries = copy.deepcopy(list(optimizer.state.values()))

    def put_back() -> None:
        for entry, values in zip(optimizer.state.values(), entries, strict=True):
            entry |= copy.deepcopy(values)
        with torch.no_grad():
            for param, value in zip(params, start, strict=True):
                param.copy_(value)

    with kernels.use_path(path):
        calls, _ = interrupted_at(0, optimizer.step)
        after = [param.detach().clone() for param in params]
        assert not any(map(torch.equal, after, start))
        states: set[tuple[int, ...]] = set()
        number = 0
        while number < calls:
            number += 1
            put_back()
            count, came_through = interrupted_at(number, optimizer.step)
            calls = max(calls, count)
            state = tuple(
                0 if torch.equal(p, old) else 1 if torch.allclose(p, new, rtol=0, atol=_ROUNDING) else -1
                for p, old, new in zip(params, start, after, strict=True)
            )
            assert -1 not in state, f"interrupted at call {number} of {calls}: {state}"
            assert came_through or state == (1,) * len(params)
            states.add(state)
    return states


@built
@pytest.mark.parametrize(
    ("path", "names", "steps", "options"),
    [
        ("auto", ("blocks", "kernels", "plain"), 2, {}),
        ("auto", ("kernels", "small", "plain"), 1, {"norm": "running"}),
        ("auto", ("matrix", "plain"), 2, {}),
        ("reference", ("small", "plain"), 1, {}),
    ],
    ids=str,
)
def test_an_interrupted_step_leaves_every_parameter_before_or_after_it(
    path: Any, names: tuple[str, ...], steps: int, options: dict[str, Any]
) -> None:
    """Wherever Ctrl-C comes, also in the steps that follow an interrupted one."""
    own = small_parameters()
    params = [own[name] for name in names]
    optimizer = RiemannianFGSGD(params, lr=0.1, momentum=0.9, **options)
    with kernels.use_path(path):
        for seed in range(steps):
            set_gradients(params, seed)
            optimizer.step()
    set_gradients(params, steps)
    states = states_after_interrupts(optimizer, path)
    assert {(0,) * len(params), (1,) * len(params)} < states  # and some between


@built
@pytest.mark.parametrize("path", ["auto", "reference"])
def test_an_interrupted_first_step_leaves_every_parameter_before_or_after_it(path: Any) -> None:
    """Paths are chosen in it, and momentum begins."""
    own = small_parameters()
    params = [own[name] for name in ("kernels", "small", "plain")]
    set_gradients(params, 0)
    start = [param.detach().clone() for param in params]
    with kernels.use_path(path):
        optimizer = RiemannianFGSGD(params, lr=0.1, momentum=0.9)
        calls, _ = interrupted_at(0, optimizer.step)
        after = [param.detach().clone() for param in params]
        for number in range(1, calls + 1, 7):
            with torch.no_grad():
                for param, value in zip(params, start, strict=True):
                    param.copy_(value)
            interrupted_at(number, RiemannianFGSGD(params, lr=0.1, momentum=0.9).step)
            for param, old, new in zip(params, start, after, strict=True):
                assert torch.equal(param, old) or torch.equal(param, new), f"interrupted at call {number} of {calls}"


# -- a step is short to read -------------------------------------------------------------------------------------------


def files_of(work: Callable[[], object]) -> set[str]:
    """Files of the package in which a function runs."""
    found: set[str] = set()

    def watch(frame: Any, event: str, argument: Any) -> None:
        name = frame.f_code.co_filename
        if event == "call" and name.startswith(str(PACKAGE)):
            found.add(str(FilePath(name).relative_to(PACKAGE)))

    sys.setprofile(watch)
    try:
        work()
    finally:
        sys.setprofile(None)
    return found


@built
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_step_of_a_convolution_is_in_six_files(bias: bool, momentum: float) -> None:
    """``What happens to the gradient of layer1.conv1.weight in one step?``"""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 16, 3, bias=bias))
    constrain(model, strategy="pio", first_layer=True)
    optimizer = RiemannianFGSGD(model.named_parameters(), lr=0.1, momentum=momentum)
    for _ in range(2):
        model(torch.randn(2, 8, 8, 8)).square().sum().backward()
        optimizer.step()
    files = files_of(optimizer.step)
    assert len(files) <= 6, sorted(files)
    assert "optim/fgsgd.py" in files


# -- a path that does not know a kind refuses it -----------------------------------------------------------------------


def rows_of_all_forms() -> dict[str, tuple[Any, tuple[int, ...]]]:
    """Weights on a kind of a user's own, as kernels, blocks, and with other kinds."""
    alone = ProductOfGroups(collection(12, 8, "po", ("rows",)), (12, 8, 3, 3))
    mixed = ProductOfGroups(collection(12, 8, "pio", ("sphere", "rows", "stiefel"), "random"), (12, 8, 3, 3))
    block = ProductOfGroups(collection(150, 140, "layer", "rows", components="block"), (150, 140))
    return {"kernels": (alone, (12, 8, 3, 3)), "mixed kernels": (mixed, (12, 8, 3, 3)), "block": (block, (150, 140))}


@pytest.mark.parametrize("form", ["kernels", "mixed kernels", "block"])
def test_a_kind_of_ones_own_is_refused_by_all_paths_but_the_reference(form: str) -> None:
    with registered_rows() as record:
        assert record.code is None
        manifold, shape = rows_of_all_forms()[form]
        weight = declared(manifold, *shape)
        for path in PATHS:
            reply = answer(path, weight, momentum=0.9)
            if isinstance(path, Reference):
                assert reply == tuple(range(len(manifold.partition.kinds)))
            elif reply != ():  # where another path is the better one to ask
                assert isinstance(reply, Refusal), path.name
                assert reply.detail
        steps = [trained(path, [weight], 3, 0.3, momentum=0.9) for path in ("auto", "reference")]
        assert_close(*steps, 0.0)
        assert float(manifold.violation(steps[0]["weights"][0]).max()) < 1e-5


@built
def test_a_kind_of_ones_own_in_a_dealt_matrix_is_left_to_the_reference() -> None:
    with registered_rows():
        manifold = product_of_blocks((48, 40), "pio", ("sphere", "rows", "oblique"))
        weight = declared(manifold, 48, 40)
        kinds = manifold.partition.kinds
        assert answer(NativeLines(), weight) == tuple(p for p, kind in enumerate(kinds) if kind != "rows")
        steps = [trained(path, [weight], 3, 0.3, momentum=0.9) for path in ("auto", "reference")]
        assert_close(*steps, 2e-5)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.name)
def test_a_refusal_is_a_reason_and_a_clause(path: Path) -> None:
    if isinstance(path, Reference):
        return
    weight = as_parameter(
        torch.eye(3).expand(2, 2, 3, 3).to(memory_format=torch.channels_last), geoopt.EuclideanStiefel()
    )
    reply = answer(path, weight)
    assert isinstance(reply, Refusal)
    assert reply.detail
    assert not reply.detail.endswith(".")


# -- nothing is held ---------------------------------------------------------------------------------------------------


def small_model() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 16, 140, bias=False)
    )
    constrain(model, strategy="pio", manifolds=KINDS, first_layer=True)
    return model


@pytest.mark.parametrize("path", ["auto", "reference"])
@pytest.mark.parametrize("by", ["training", "refusal"])
def test_a_model_that_is_gone_is_gone(path: Any, by: str) -> None:
    """No cache of a path holds its parameters or manifolds."""
    model = small_model()
    optimizer = RiemannianFGSGD(model.named_parameters(), lr=0.1, momentum=0.9)
    with kernels.use_path(path):
        for _ in range(2):
            optimizer.zero_grad()
            model(torch.randn(2, 4, 6, 6)).square().mean().backward()
            optimizer.step()
        if by == "refusal":
            for own in model.parameters():
                own.grad = torch.full_like(own, torch.nan)
            del own
            with pytest.raises(FloatingPointError):
                optimizer.step()
    params = list(model.parameters())
    references = [weakref.ref(param) for param in params]
    references += [weakref.ref(param.manifold) for param in params if isinstance(param, geoopt.ManifoldParameter)]
    assert len(references) > len(params)
    params.clear()
    del model, optimizer
    gc.collect()
    assert [reference() for reference in references] == [None] * len(references)


@pytest.mark.parametrize("path", ["auto", "reference"])
@pytest.mark.parametrize("steps", [1, 4])
def test_gradients_are_let_go_after_a_step(path: Any, steps: int) -> None:
    """Rows of kernels that are stored channels_last are measured and moved at once, from the third step on."""
    params = list(small_parameters().values())
    params.append(weight_on(product("po", (4, 6, 3, 3)), torch.float32, torch.channels_last, 0))
    optimizer = RiemannianFGSGD(params, lr=0.1, momentum=0.9)
    with kernels.use_path(path):
        for step in range(steps):
            set_gradients(params, step)
            optimizer.step()
    gradients = [weakref.ref(param.grad) for param in params]
    optimizer.zero_grad()
    assert [gradient() for gradient in gradients] == [None] * len(params)


@pytest.mark.parametrize("path", ["auto", "reference"])
def test_gradients_are_read_only(path: Any) -> None:
    params = list(small_parameters().values())
    optimizer = RiemannianFGSGD(params, lr=0.1, momentum=0.9, weight_decay=0.1)
    set_gradients(params, 0)
    grads: list[Tensor] = [param.grad for param in params]
    copies = copy.deepcopy(grads)
    with kernels.use_path(path):
        optimizer.step()
    assert all(param.grad is grad for param, grad in zip(params, grads, strict=True))
    assert all(torch.equal(grad, own) for grad, own in zip(grads, copies, strict=True))
