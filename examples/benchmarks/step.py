"""What a step of the optimiser costs: this package, Geoopt and torch on the weights of a network or of one layer.

    python examples/benchmarks/step.py                                        # ResNet-18, a few minutes
    python examples/benchmarks/step.py --model resnet50 --only kernels --threads 2 --json step.json
    python examples/benchmarks/step.py --model 256x256x3x3 512x512x3x3 --strategies pi po pio --full
    python examples/benchmarks/step.py --model resnet50 --only matrices --kinds stiefel --strategies layer
    python examples/benchmarks/step.py --rows "fgo_geo*" --paths auto compile      # some rows, and torch's SGD

The step alone: there is no forward or backward pass, gradients are random, of length one per parameter, and the same in
every step. All rows of a model run in one process, once per round, in a new order, and are compared with torch's SGD
(foreach, momentum) in the same round. ``GB/s`` counts what any SGD with momentum has to do: read weight, gradient and
momentum, write weight and momentum; the row *memory* does just that, in one addition and one copy. *Off by* is
the largest violation of a constraint after all steps (``|xᵀx - I|``, relative), in double precision.

The path *fused* takes no other way and *auto* the fastest for each weight; *unchecked* is *auto* with
``check_finite=False``, *adamw* is ``torch.optim.AdamW`` under ``on_manifolds`` in place of FG-SGD, *bfloat16* is *auto*
where torch may round the factors of products to bfloat16; *compile* is
``torch.compile`` of *auto*; *reference* is the batched torch code. Rows of this package differ from the first value of
every axis (kinds, strategies, formats, paths) in one axis at most, or are all combinations, with ``--full``. Layer-wise
groups have one kind: there, *mixed* becomes *stiefel*.
"""

from __future__ import annotations

import argparse
import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import timing
import torch
from contestants import MIXED, PEERS, REFERENCE, SLOW_PEERS, Builder, Contestant, is_kernels, model_of, names_of, ours
from timing import Columns
from torch import Tensor, nn

AXES = {
    "kinds": ("mixed", *MIXED[:-1]),
    "strategies": ("pio", "po", "pi", "layer"),
    "formats": ("channels_last", "contiguous"),
    "paths": ("auto", "fused", "unchecked", "adamw", "bfloat16", "compile", "reference"),
}
DEFAULTS = {
    None: AXES | {"paths": ("auto", "adamw", "reference")},
    "kernels": AXES | {"paths": ("fused", "adamw", "reference")},
    "matrices": {
        "kinds": ("stiefel", "sphere", "oblique"),
        "strategies": ("layer",),
        "formats": ("contiguous",),
        "paths": ("auto", "bfloat16", "reference"),
    },
}
MEMORY = "memory"
COLUMNS: Columns = {
    "optimiser": lambda row: row["name"],
    **timing.TIMES,
    "GB/s": lambda row: f"{row['gigabytes_per_second']:.3g}",
    "off by": lambda row: "" if row["violation"] is None else f"{row['violation']:.0e}",
}


def rows_of_this_package(options: argparse.Namespace) -> Iterator[tuple[str, str, Builder]]:
    """Name, memory format and builder of every row."""
    axes = {axis: getattr(options, axis) or DEFAULTS[options.only][axis] for axis in AXES}
    if options.slow and not options.paths:
        axes["paths"] = (*axes["paths"], "compile")
    first = [values[0] for values in axes.values()]
    seen: set[str] = set()
    for combination in itertools.product(*axes.values()):
        if not options.full and sum(a != b for a, b in zip(combination, first, strict=True)) > 1:
            continue
        kind, strategy, memory_format, path = combination
        kind = "stiefel" if (strategy, kind) == ("layer", "mixed") else kind
        name = f"fgo_geo, {kind}, {strategy}, {memory_format}, {path}"
        if name not in seen:
            seen.add(name)
            yield name, memory_format, partial(ours, kind=kind, strategy=strategy, path=path, only=options.only)


class Race:
    """All rows of a model.

    Args:
        model: The model to copy for every row.
        names: Parameters to update.
        device: Where they are.
    """

    def __init__(self, model: nn.Module, names: Sequence[str], device: torch.device) -> None:
        self._model, self._names, self._device = model, names, device
        self._gradients: dict[object, Tensor] = {}
        self._built: dict[str, Contestant] = {}
        self.entries = sum(model.get_parameter(name).numel() for name in names)

    def seconds(self, name: str, builder: Builder, memory_format: str) -> float:
        """The time of one step of a row, which is built when it is first needed."""
        contestant = self._built.get(name)
        if contestant is None:
            channels_last = memory_format == "channels_last"
            model = copy.deepcopy(self._model)
            model.to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
            contestant = self._built[name] = builder(model, self._names)
            for position, param in enumerate(contestant.params):
                param.grad = self._gradient(position, param)
            contestant.hand_over_gradients()
            for _ in range(contestant.warm_up):
                contestant.step()
        return contestant.times * timing.seconds(contestant.step, self._device)

    def _gradient(self, position: int, param: Tensor) -> Tensor:
        """A gradient of length one; rows share them, since no optimiser here writes into them."""
        key = (position, param.shape, param.stride())
        if key not in self._gradients:
            gradient = torch.randn_like(param.detach().as_subclass(Tensor))
            self._gradients[key] = gradient / gradient.norm()
        return self._gradients[key]

    def memory(self) -> float:
        """The time of reading and writing as much as SGD with momentum, in two operations."""
        if not hasattr(self, "_flat"):
            self._flat = [torch.zeros(self.entries, device=self._device) for _ in range(3)]
        weight, gradient, momentum = self._flat

        def work() -> None:
            torch.add(weight, gradient, out=momentum)
            weight.copy_(gradient)

        return timing.seconds(work, self._device)

    def violation(self, name: str) -> float | None:
        return self._built[name].violation() if name in self._built else None


def measure(target: str, options: argparse.Namespace) -> tuple[str, list[dict[str, Any]], dict[str, str]]:
    """Title, rows, and what was left out."""
    model = model_of(target).to(options.device)
    names = names_of(model, options.only)
    if not names:
        raise SystemExit(f"{target} has no {options.only}: choose another --model, or leave --only out")
    race = Race(model, names, options.device)
    builders = PEERS | (SLOW_PEERS if options.slow else {})
    if options.only == "matrices" or not any(is_kernels(model.get_parameter(name)) for name in names):
        builders = {name: builder for name, builder in builders.items() if "kernel" not in name}
    rows: dict[str, Callable[[], float]] = {
        name: partial(race.seconds, name, builder, "contiguous") for name, builder in builders.items()
    }
    rows[MEMORY] = race.memory
    for name, memory_format, builder in rows_of_this_package(options):
        rows[name] = partial(race.seconds, name, builder, memory_format)
    rows = {name: rows[name] for name in timing.chosen(list(rows), options, REFERENCE)}
    times, left_out = timing.interleaved(rows, options.rounds, options.budget)
    moved = 5 * 4 * race.entries / 1e9
    records = [
        {
            "name": name,
            **of_row,
            "gigabytes_per_second": 1e3 * moved / of_row["milliseconds"]["0.5"],
            "violation": race.violation(name),
        }
        for name, of_row in timing.figures(times, REFERENCE).items()
    ]
    only = f", {options.only} only" if options.only else ""
    title = f"{target}{only}: {len(names)} parameters, {race.entries:,} numbers"
    return title, records, left_out


def main(arguments: Sequence[str] | None = None) -> None:
    parser = timing.argument_parser(__doc__ or "", rounds=15)
    parser.add_argument("--model", nargs="+", help="names of torchvision, or shapes of a layer (resnet18)")
    parser.add_argument(
        "--only", choices=("kernels", "matrices"), help="spatial convolutions, or all the other weights"
    )
    for axis, values in AXES.items():
        parser.add_argument(
            f"--{axis}",
            nargs="+",
            choices=values,
            metavar="NAME",
            help=f"axis of this package's rows: {' '.join(values)}",
        )
    parser.add_argument("--full", action="store_true", help="all combinations of the axes")
    parser.add_argument("--slow", action="store_true", help="torch.compile, and Geoopt's CanonicalStiefel, too")
    options = timing.parse(parser, arguments)
    results = timing.Results("step", COLUMNS, options, only=options.only)
    for target in options.model or (["tiny"] if options.quick else ["resnet18"]):
        results.add(*measure(target, options))


if __name__ == "__main__":
    main()
