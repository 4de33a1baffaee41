"""``python -m fgo_geo``: versions, how each manifold kind is stepped on this machine, and a short self-check."""

from __future__ import annotations

import copy
import logging
import platform
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import PackageNotFoundError, version

import geoopt
import torch
from torch import Tensor, nn

import fgo_geo
from fgo_geo.paths.native.library import NOT_BUILT, instruction_set, library
from fgo_geo.paths.protocol import StepOptions, Weight
from fgo_geo.paths.router import explain, use_path
from fgo_geo.weights import kinds
from fgo_geo.weights.layout import WeightLayout
from fgo_geo.weights.words import line_width

SHAPES = {"3x3 kernels": (64, 64, 3, 3), "matrices": (256, 128)}


def main() -> int:
    """Print everything.

    Returns:
        The exit status: 1 if a check fails, else 0.
    """
    torch.manual_seed(0)
    _show(machine(), indent=4)
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        print(f"\nHow weights are stepped on {device} (float32, momentum)")
        numbers: dict[str, int] = {}
        for noun in SHAPES:
            print(f"  {noun}, {'x'.join(map(str, SHAPES[noun]))}")
            _show([f"    {line}" for line in paths(noun, device, numbers)], indent=20)
        if numbers:
            print("  Not faster, because")
            _show([f"    [{number}] {reason}" for reason, number in numbers.items()], indent=8)
    print("\nSelf-check: steps stay on the manifold and equal those of the reference path")
    begin, failures, logger = time.perf_counter(), 0, logging.getLogger("fgo_geo")
    logger.disabled = True  # the lines above name the path of every kind
    try:
        for name, found in checks():
            failures += bool(found)
            _show([f"  {'FAILED' if found else 'passed'}  {name}{': ' * bool(found)}{found}"], indent=10)
    finally:
        logger.disabled = False
    print(f"{failures or 'No'} failure{'s' * (failures != 1)} in {time.perf_counter() - begin:.0f} s")
    return int(failures > 0)


def _show(lines: Iterable[str], indent: int) -> None:
    """Print lines, wrapped to the width that a line may have and then indented."""
    width = int(min(line_width(), 10_000))
    for line in lines:
        print(textwrap.fill(line, width, subsequent_indent=" " * indent, break_on_hyphens=False), flush=True)


def machine() -> list[str]:
    """Versions, processor and devices, one line each."""
    names = ("geoopt", "numpy", "triton")
    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    built = f"built, {instruction_set()}" if library() is not None else f"missing: {NOT_BUILT}"
    return [
        f"fgo_geo {fgo_geo.__version__}, torch {torch.__version__}, "
        + ", ".join(f"{name} {_version(name)}" for name in names),
        f"Python {platform.python_version()} on {platform.system()} {platform.machine()}",
        f"threads: {torch.get_num_threads()}; CUDA device: {cuda}",
        f"compiled library: {built}",
    ]


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"


def paths(noun: str, device: str, numbers: dict[str, int]) -> Iterator[str]:
    """For every kind a line: the paths that step such weights, and the numbers of the reasons why none is faster.

    Args:
        noun: One of :data:`SHAPES`.
        device: Where the weights are.
        numbers: The numbers of the reasons so far; new ones are added.
    """
    options = StepOptions(lr=0.1, momentum=0.9, step_size="theorem")
    for record in kinds.kinds():
        weight = _weight(record.name, noun).to(device)
        weight.manifold.to(device)
        grad = torch.ones_like(weight.detach())
        names, reasons = explain(Weight(weight, weight, weight.manifold, grad, grad.clone(), True), options)
        general = [reason.replace(f"the kind {record.name!r}", "this kind") for reason in reasons]
        marks = [numbers.setdefault(reason, len(numbers) + 1) for reason in general]
        yield f"{record.name:16}{', '.join(names)}" + (f" [{', '.join(map(str, sorted(marks)))}]" if marks else "")


def _weight(kind: str, noun: str) -> geoopt.ManifoldParameter:
    """A random weight on manifolds of one kind: one group per output channel, or one of the whole matrix."""
    shape = SHAPES[noun]
    rows, columns = shape[:2]
    if noun == "matrices":
        made = fgo_geo.collection(rows, columns, "layer", kind, components="block")
    else:
        made = fgo_geo.collection(rows, columns, "po", kind)
    manifold = fgo_geo.ProductOfGroups(made, WeightLayout(shape))
    return geoopt.ManifoldParameter(manifold.random(*shape), manifold=manifold)


# -- the self-check --------------------------------------------------------------------------------------------------


def checks() -> Iterator[tuple[str, str]]:
    """The name of each check, and the problem that it finds, if any."""
    for noun in SHAPES:
        for record in kinds.kinds():
            yield (
                f"{noun} on {record.name}",
                _complaint(lambda name=record.name, noun=noun: _steps(name, noun)),
            )
    yield "a constrained network learns, saves and resumes", _complaint(_network)
    yield "AdamW on manifolds", _complaint(_adamw)


def _complaint(check: Callable[[], str]) -> str:
    """The problem that a check finds, or the error that it raises."""
    try:
        return check()
    except Exception as error:  # whatever it is, the check is to name it
        return f"{type(error).__name__}: {error}"


def _steps(kind: str, noun: str) -> str:
    one = _weight(kind, noun)
    weights = [one, geoopt.ManifoldParameter(one.detach().clone(), manifold=copy.deepcopy(one.manifold))]
    optimizers = [fgo_geo.RiemannianFGSGD([weight], lr=0.1, momentum=0.9) for weight in weights]
    for _ in range(3):
        grad = torch.randn(one.shape)
        for weight, optimizer, path in zip(weights, optimizers, ("auto", "reference"), strict=True):
            weight.grad = grad.clone()
            with use_path(path):
                optimizer.step()
    off = float(one.manifold.violation(one.detach()).max())
    difference = float((weights[0].detach() - weights[1].detach()).abs().max())
    problems = [f"off its manifold by {off:.1e}"] if not off <= 1e-5 else []
    problems += [f"{difference:.1e} from the reference"] if not difference <= 1e-5 else []
    return ", ".join(problems)


def _data() -> tuple[Tensor, Tensor]:
    """Images of noise, and the number of the quadrant that is brighter."""
    labels = torch.randint(4, (256,))
    images = 0.5 * torch.randn(256, 1, 8, 8)
    for image, label in zip(images, labels.tolist(), strict=True):
        row, column = 4 * (label // 2), 4 * (label % 2)
        image[:, row : row + 4, column : column + 4] += 1
    return images, labels


def _built() -> nn.Sequential:
    convolutions = (nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Flatten())
    return nn.Sequential(*convolutions, nn.Linear(256, 4))


def _epoch(model: nn.Module, optimizer: torch.optim.Optimizer, data: tuple[Tensor, Tensor]) -> float:
    loss = torch.zeros(())
    for images, labels in zip(*(t.split(32) for t in data), strict=True):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
    return loss.item()


def _network() -> str:
    data = _data()
    models = [_built(), _built()]
    for seed, model in enumerate(models):
        fgo_geo.constrain(model, "pio", seed=seed)
    optimizers = [fgo_geo.RiemannianFGSGD(model.named_parameters(), lr=0.05, momentum=0.9) for model in models]
    before, *_, after = [_epoch(models[0], optimizers[0], data) for _ in range(6)]
    models[1].load_state_dict(models[0].state_dict())
    optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    for model, optimizer in zip(models, optimizers, strict=True):
        _epoch(model, optimizer, data)
    if not after < 0.5 * before:
        return f"the loss is {after:.3f} in the sixth epoch, expected below half of {before:.3f}"
    same = all(map(torch.equal, models[0].parameters(), models[1].parameters()))
    return "" if same else "a step after loading differs from the same step without loading"


def _adamw() -> str:
    model = _built()
    plan = fgo_geo.constrain(model, "pio")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    fgo_geo.on_manifolds(optimizer, "constant")
    _epoch(model, optimizer, _data())
    off = max(float(p.manifold.violation(p.detach()).max()) for p in plan.parameters().values())
    return "" if off < 1e-5 else f"off its manifold by {off:.1e}"


if __name__ == "__main__":
    sys.exit(main())
