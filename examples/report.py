"""Report the norms, the feasibility and the generalisation measures of a network, before and after.

    python examples/report.py                                # an untrained ResNet-50: plain, constrained, renormalised
    python examples/report.py --model mobilenet_v2 --strategy layer --manifolds stiefel
    python examples/report.py --run runs/NAME                # a run of examples/train.py

For a run, "before" is the network at initialisation, "after" that of its newest checkpoint, and the margin is that of
the training images. With --output the reports are also left there as JSON and as pictures. How to read them:
docs/guides/report.md.
"""

from __future__ import annotations

import argparse
import copy
import sys
from pathlib import Path

import torch
import torchvision
from training import checkpoints, data, engine
from training.command_line import make
from training.folder import RunFolder

import fgo_geo
from fgo_geo.measures.report import Report, report
from fgo_geo.models.renormalize import renormalize


def untrained(settings: argparse.Namespace) -> dict[str, Report]:
    """Report a torchvision network as it is initialised, constrained, and renormalised to norms of at most 1."""
    torch.manual_seed(settings.seed)
    plain = torchvision.models.get_model(settings.model)
    constrained, renormalised = copy.deepcopy(plain), copy.deepcopy(plain)
    strategy, kinds, seed = settings.strategy, settings.manifolds, settings.seed
    plan = fgo_geo.constrain(constrained, strategy, kinds, seed=seed, first_layer=True, classifier=True)
    bounded = ["spectral" if kind == "euclidean" else kind for kind in kinds]
    for entry in plan.constrained:
        layer, _, local = entry.name.rpartition(".")
        renormalize(renormalised.get_submodule(layer), local, bounded, groups=strategy, selection="random", seed=seed)
    models = {"plain": plain, "constrained": constrained, "renormalised": renormalised}
    return {name: report(model, n_samples=settings.samples, fold=settings.fold) for name, model in models.items()}


def trained(settings: argparse.Namespace) -> dict[str, Report]:
    """Report the network of a run of examples/train.py at its start and at its newest checkpoint."""
    folder = RunFolder(settings.run)
    state = checkpoints.load(folder.checkpoints).state
    begun = folder.begun()
    if begun is None or state is None:
        raise FileNotFoundError(f"no run with a checkpoint in {settings.run}: name a folder of examples/train.py")
    run = engine.build(make(begun | {"device": "cpu"}))
    images = run.splits.train
    loader = data.loader(images, data.Order(len(images), 256, None), 0, "cpu")
    reports = {"before": report(run.model, loader, len(images), fold=settings.fold)}
    run.model.load_state_dict(state["model"])
    reports["after"] = report(run.model, loader, len(images), fold=settings.fold)
    return reports


def write(folder: Path, reports: dict[str, Report]) -> None:
    """Leave every report in a folder, as JSON and as a picture."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, each in reports.items():
        each.to_json(folder / f"{name}.json")
        each.plot(name, folder / f"{name}.png")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Report the norms of a network's weights. Defaults are in parentheses."
    )
    parser.add_argument("--run", type=Path, help="folder of a run of examples/train.py")
    parser.add_argument("--model", default="resnet50", help="untrained torchvision network (%(default)s)")
    parser.add_argument("--strategy", default="pio", choices=("pi", "po", "pio", "layer"), help="groups (%(default)s)")
    kinds = ["sphere", "oblique", "stiefel"]
    parser.add_argument(
        "--manifolds",
        nargs="+",
        default=kinds,
        metavar="KIND",
        help=f"manifolds, with commas or spaces ({' '.join(kinds)})",
    )
    parser.add_argument("--samples", type=int, default=1_281_167, help="training samples of the network (%(default)s)")
    parser.add_argument("--fold", action="store_true", help="fold batch normalisations into their layers first")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and groups (%(default)s)")
    parser.add_argument("--output", type=Path, help="folder for JSON and pictures (none)")
    settings = parser.parse_args(arguments)
    settings.manifolds = " ".join(settings.manifolds).replace(",", " ").split()
    return settings


def main(arguments: list[str] | None = None) -> int:
    """Print the reports side by side as the command line says; return the exit status."""
    settings = parse(arguments)
    try:
        reports = trained(settings) if settings.run else untrained(settings)
    except (FileNotFoundError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    first, *others = reports
    for other in others:
        print(f"\n{other}\n\n{reports[other]}\n\n{first} and {other}\n")
        print(reports[first].compare(reports[other], (first, other)))
    if settings.output:
        write(settings.output, reports)
    return 0


if __name__ == "__main__":
    sys.exit(main())
