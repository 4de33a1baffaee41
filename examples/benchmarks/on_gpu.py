"""Everything that wants a GPU, in one command of under six minutes: tests, checks of the step, and the tables.

    python examples/benchmarks/on_gpu.py --output gpu                       # on a CUDA device
    python examples/benchmarks/on_gpu.py --device cpu --tiny --output gpu   # a dry run: that everything starts

First the tests of the Triton path, then whether the batched step on the device agrees with double precision on the
CPU and whether a captured CUDA graph agrees with both, then the benchmarks. Every part is a process with a limit of
its own; its figures are in ``OUTPUT`` table by table, so that a kill loses one table. ``OUTPUT/summary.json`` says what
ran, what failed and what there was no time for. Muon, Geoopt and POGO are measured where they are installed.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timing
import torch
from torch import nn

import fgo_geo

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
LIMIT = 350.0  # seconds, of all parts

# Name, seconds at most, and arguments. What a part leaves of its time goes to those after it.
PARTS: dict[str, tuple[float, list[str]]] = {
    "checks": (40, ["on_gpu.py", "--only-checks"]),
    "step-kernels": (40, ["step.py", "--only", "kernels", "--rounds", "30", "--budget", "2"]),
    "step-matrices": (45, ["step.py", "--model", "resnet50", "--only", "matrices", "--rounds", "15", "--budget", "2"]),
    "step-resnet50": (40, ["step.py", "--model", "resnet50", "--rounds", "15", "--budget", "2"]),
    "train-step": (
        50,
        ["train_step.py", "--model", "resnet50", "--batch", "64", "--image", "224", "--rounds", "7", "--budget", "3"],
    ),
    "retractions": (25, ["retractions.py", "--rounds", "7", "--budget", "1"]),
    "channel-directed": (25, ["channel_directed.py", "--rounds", "15", "--budget", "1"]),
    "renormalize": (
        40,
        [
            "renormalize.py",
            "--rounds",
            "5",
            "--budget",
            "1",
            "--layers",
            "linear, 2048 -> 1000",
            "1x1, 512 -> 2048, 7 x 7",
        ],
    ),
}


# -- checks -------------------------------------------------------------------------------------------------------


def steps(model: nn.Module, count: int) -> list[torch.Tensor]:
    """The weights after some steps with the same gradients."""
    optimizer = fgo_geo.RiemannianFGSGD(model.parameters(), lr=0.1, momentum=0.9)
    for number in range(count):
        generator = torch.Generator().manual_seed(number)
        for param in model.parameters():
            param.grad = torch.randn(param.shape, generator=generator).to(param)
        optimizer.step()
    return [param.detach().as_subclass(torch.Tensor).double().cpu() for param in model.parameters()]


def constrained() -> nn.Module:
    """A small model on all kinds of manifolds."""
    torch.manual_seed(0)
    layers = nn.Conv2d(16, 32, 3), nn.Conv2d(32, 64, 1), nn.Flatten(), nn.Linear(64, 48)
    model = nn.Sequential(*layers)
    fgo_geo.constrain(model, manifolds=("sphere", "oblique", "stiefel", "euclidean"), first_layer=True, classifier=True)
    return model


def checks(device: torch.device) -> dict[str, float]:
    """Largest difference between steps on the device and in double precision on the CPU, by path; 1e-4 at most.

    Raises:
        SystemExit: If one differs by more.
    """
    model = constrained()
    exact = steps(copy.deepcopy(model).double(), 5)
    found: dict[str, float] = {}
    for path in ("reference", "auto"):
        with fgo_geo.kernels.use_path(path):  # pyright: ignore[reportArgumentType]
            weights = steps(copy.deepcopy(model).to(device), 5)
        found[path] = max(float((a - b).abs().max()) for a, b in zip(weights, exact, strict=True))
    if device.type == "cuda":
        found["CUDA graph"] = graph_difference(model, device)
    print(json.dumps(found), flush=True)
    wrong = {name: value for name, value in found.items() if not value <= 1e-4}
    if wrong:
        raise SystemExit(f"the step on {device} differs from double precision on the CPU: {wrong}")
    return found


def graph_difference(model: nn.Module, device: torch.device) -> float:
    """Largest difference between replayed and eager steps with one gradient."""
    eager, captured = (copy.deepcopy(model).to(device) for _ in range(2))
    optimizers = [fgo_geo.RiemannianFGSGD(each.parameters(), lr=0.1, momentum=0.9) for each in (eager, captured)]
    for a, b in zip(eager.parameters(), captured.parameters(), strict=True):
        a.grad = torch.randn_like(a.detach().as_subclass(torch.Tensor))
        b.grad = a.grad.clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            optimizers[1].step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # a step that is recorded, not taken
        optimizers[1].step()
    graph.replay()
    graph.replay()
    for _ in range(5):
        optimizers[0].step()
    torch.cuda.synchronize()
    pairs = zip(eager.parameters(), captured.parameters(), strict=True)
    return max(float((a.detach() - b.detach()).abs().max()) for a, b in pairs)


# -- all parts ----------------------------------------------------------------------------------------------------


class Run:
    """What has run so far, in ``summary.json``."""

    def __init__(self, output: Path, device: torch.device) -> None:
        output.mkdir(parents=True, exist_ok=True)
        self._path = output / "summary.json"
        self._started = time.monotonic()
        self._summary: dict[str, Any] = {"machine": timing.machine(device), "parts": {}}
        self._save()

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self._started

    @property
    def failed(self) -> list[str]:
        """The parts that did not end well."""
        return [name for name, part in self._summary["parts"].items() if part["result"] != "done"]

    def part(self, name: str, limit: float, command: Sequence[str | Path]) -> None:
        """Run a part, at most as long as it may; what it prints is shown, and its end is kept."""
        limit = min(limit, LIMIT - self.seconds)
        if limit < 5:
            self._add(name, "no time was left")
            return
        print(f"\n== {name}, at most {limit:.0f} s", flush=True)
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        try:
            ended = subprocess.run(
                command, cwd=ROOT, timeout=limit, check=False, env={**os.environ, "PYTHONPATH": path}
            )
        except subprocess.TimeoutExpired:
            self._add(name, f"stopped after {limit:.0f} s")
        else:
            self._add(name, "done" if ended.returncode == 0 else f"failed: exit status {ended.returncode}")

    def _add(self, name: str, result: str) -> None:
        self._summary["parts"][name] = {"result": result, "ended after": round(self.seconds)}
        self._save()

    def _save(self) -> None:
        self._path.write_text(json.dumps(self._summary, indent=1) + "\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"), help="where to run (%(default)s)")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, to see that everything starts")
    parser.add_argument("--output", type=Path, default=Path("gpu"), help="folder for the figures (%(default)s)")
    names = ["tests", *PARTS]
    parser.add_argument("--only", nargs="+", choices=names, metavar="PART", help=f"some of {', '.join(names)} (all)")
    parser.add_argument("--only-checks", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("torch finds no CUDA device: a dry run takes --device cpu --tiny")
    if options.only_checks:
        checks(options.device)
        return
    output = options.output.resolve()
    run = Run(output, options.device)
    wanted = options.only or ["tests", *PARTS]
    if "tests" in wanted:
        few = ["-k", "chooses_the_path or cannot_be_fused"] if options.tiny else []
        run.part("tests", 110, [sys.executable, "-m", "pytest", "-q", "-x", "tests/test_paths_triton.py", *few])
    for name, (limit, words) in PARTS.items():
        if name in wanted:
            script, *rest = words
            own = [*(["--only-checks"] if name == "checks" else []), "--device", str(options.device)]
            if name != "checks":
                own += [*(["--quick"] if options.tiny else rest), "--json", str(output / f"{name}.json")]
            run.part(name, limit, [sys.executable, HERE / script, *own])
    print(f"\n{run.seconds:.0f} s; figures in {output}", flush=True)
    if run.failed:
        raise SystemExit(f"not done: {', '.join(run.failed)}; see {output / 'summary.json'}")


if __name__ == "__main__":
    main()
