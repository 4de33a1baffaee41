"""The flags of the training example: what can be set, and what a resumed run takes over."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoint
import data
import models
import torch

RIEMANNIAN = ("fgsgd", "rsgd", "radam")
PLAIN = ("sgd", "adamw")
NOT_PART_OF_THE_RUN = {"output", "resume"}
MAY_CHANGE_ON_RESUME = {"epochs", "data_dir", "download", "workers", "device"}


def parse(arguments: list[str] | None) -> tuple[argparse.Namespace, dict[str, Any] | None]:
    """Return the settings of the run, and the checkpoint that it goes on from.

    A resumed run takes its settings from the checkpoint; flags may repeat them, but only those of
    ``MAY_CHANGE_ON_RESUME`` may differ (another device or number of workers means other bits).
    Whatever is wrong ends the program with a message.
    """
    parser = argument_parser()
    settings = parser.parse_args(arguments)
    _resolve(settings, parser)
    path = settings.output / "checkpoint.pt"
    if settings.resume:
        if not path.exists():
            parser.error(f"--resume: there is no {path}; name the folder of the run with --output")
        state = checkpoint.load(path)
        return _resumed(parser, arguments, state, settings.output), state
    if path.exists():
        state = checkpoint.load(path)
        if 0 < len(state["history"]) < state["settings"]["epochs"]:
            parser.error(
                f"{path} holds an interrupted run: add --resume to go on, choose another --output, or delete it"
            )
    return settings, None


def as_plain(settings: argparse.Namespace) -> dict[str, Any]:
    """Return the settings that define a run as plain values, for files."""
    return {
        name: str(value) if isinstance(value, Path) else value
        for name, value in vars(settings).items()
        if name not in NOT_PART_OF_THE_RUN
    }


def argument_parser() -> argparse.ArgumentParser:
    """Return the parser of all flags."""
    parser = argparse.ArgumentParser(
        description="Train an image classifier whose weights live on manifolds. Defaults are in parentheses."
    )
    positive = _checked(float, lambda x: 0 < x < math.inf, "a positive number")
    not_negative = _checked(float, lambda x: 0 <= x < math.inf, "a number from 0")
    below_one = _checked(float, lambda x: 0 <= x < 1, "a number from 0 and below 1")
    count = _checked(int, lambda x: x >= 1, "a whole number from 1")
    natural = _checked(int, lambda x: x >= 0, "a whole number from 0")
    seed = _checked(int, lambda x: 0 <= x < 2**64, "a whole number from 0 and below 2**64")

    add = parser.add_argument_group("data").add_argument
    add("--data", choices=data.NAMES, default="digits", help="images to classify (%(default)s)")
    add("--data-dir", type=Path, default=Path("data"), help="where the images are on disk (%(default)s)")
    add("--download", action="store_true", help="let torchvision fetch CIFAR")
    add("--validation", action="store_true", help="measure on a fifth of the training images")
    add("--image-size", type=count, default=224, help="side of the images of an image folder (%(default)s)")
    add("--workers", type=natural, default=0, help="processes that load images (%(default)s)")

    add = parser.add_argument_group("model").add_argument
    add("--model", choices=models.NAMES, default="small", help="network (%(default)s)")
    add("--strategy", choices=("layer", "pi", "po", "pio"), help="groups of a convolution's kernels (pio; sgd: none)")
    add(
        "--manifolds",
        type=_manifolds,
        help="kinds dealt to the groups, e.g. sphere,stiefel (all four; layer: oblique; sgd: euclidean)",
    )
    add("--linear-manifold", choices=models.MANIFOLDS, default="euclidean", help="of linear layers, whole matrices")
    add("--selection", choices=("random", "deterministic"), default="random", help="of the groups")
    add("--radius", type=_radius, default="kaiming", help="of manifolds: kaiming, unit, bound or a number")

    add = parser.add_argument_group("optimisation").add_argument
    add("--optimizer", choices=(*RIEMANNIAN, *PLAIN), default="fgsgd", help="optimiser (%(default)s)")
    add("--step-size", choices=("theorem", "constant"), help="of fgsgd (theorem)")
    add("--lr", type=positive, help="first learning rate (0.2; radam: 0.01; adamw: 0.003)")
    add("--momentum", type=below_one, default=0.9, help="momentum, beta_1 of radam (%(default)s)")
    add("--weight-decay", type=not_negative, default=5e-4, help="L2 penalty (%(default)s)")
    add("--schedule", choices=("robbins-monro", "constant"), default="robbins-monro", help="of lr (%(default)s)")
    add("--channel-directed", choices=("h0", "h1", "h1t"), help="metric along the channels (none: plain gradients)")
    add("--lam", type=positive, help="weight of that metric's roughness (2)")
    add("--lam-relative", action="store_true", help="lam counts (D / 2 pi)^2 of D channels, layer by layer")
    add("--channel-axis", choices=("output", "input"), help="channels along which it smooths (output)")
    add("--epochs", type=count, default=30, help="passes over the training images (%(default)s)")
    add("--batch-size", type=count, default=64, help="images per step (%(default)s)")

    add = parser.add_argument_group("run").add_argument
    add("--seed", type=seed, default=0, help="of the first weights and the order of the images (%(default)s)")
    gpu_or_cpu = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", type=_device, default=gpu_or_cpu, help="where to train (%(default)s)")
    add("--threads", type=count, help="of the CPU (digits: 1, which is fastest; else all cores)")
    add("--output", type=Path, help="folder for results (runs/DATA-MODEL-OPTIMIZER)")
    add("--resume", action="store_true", help="go on from the checkpoint in the output folder")
    return parser


def _resolve(settings: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Set the defaults that depend on other flags, and refuse flags that contradict each other."""
    optimizer = settings.optimizer
    if optimizer in PLAIN:
        asked = {*(settings.manifolds or ()), settings.linear_manifold} - {"euclidean"}
        if asked or settings.strategy:
            parser.error(
                f"--optimizer {optimizer} would leave the manifolds: drop --strategy, --manifolds and "
                f"--linear-manifold, or take an --optimizer of {', '.join(RIEMANNIAN)}"
            )
        settings.manifolds = ("euclidean",)
    settings.strategy = settings.strategy or "pio"
    settings.manifolds = settings.manifolds or (("oblique",) if settings.strategy == "layer" else models.MANIFOLDS)
    if settings.strategy == "layer" and len(settings.manifolds) > 1:
        parser.error(
            f"--strategy layer puts whole layers on one manifold, got --manifolds {','.join(settings.manifolds)}"
        )
    if not settings.channel_directed and (settings.lam or settings.channel_axis or settings.lam_relative):
        parser.error("--lam, --lam-relative and --channel-axis are for --channel-directed: add it, or drop them")
    if settings.channel_directed == "h0" and settings.lam_relative:
        parser.error("--lam-relative is for the metrics h1 and h1t: h0 treats every width alike")
    if settings.channel_directed:
        settings.lam = settings.lam or 2.0
        settings.channel_axis = settings.channel_axis or "output"
    if settings.step_size and optimizer != "fgsgd":
        parser.error(f"--step-size is for --optimizer fgsgd, not for {optimizer}")
    if optimizer == "fgsgd":
        settings.step_size = settings.step_size or "theorem"
    settings.lr = settings.lr or {"radam": 0.01, "adamw": 0.003}.get(optimizer, 0.2)
    settings.threads = settings.threads or (1 if settings.data == "digits" else torch.get_num_threads())
    settings.output = settings.output or Path(f"runs/{settings.data}-{settings.model}-{optimizer}")


def _resumed(
    parser: argparse.ArgumentParser,
    arguments: list[str] | None,
    state: dict[str, Any],
    output: Path,
) -> argparse.Namespace:
    """Return the settings of the checkpoint, overridden where flags may do so."""
    parser.set_defaults(**state["settings"], output=output)
    settings = parser.parse_args(arguments)
    given = as_plain(settings)
    for name, saved in state["settings"].items():
        if name not in MAY_CHANGE_ON_RESUME and given[name] != saved:
            flag = f"--{name.replace('_', '-')}"
            parser.error(f"--resume: the run has {flag} {saved}, it cannot become {given[name]}")
    return settings


def _checked(convert: Callable[[str], Any], accepts: Callable[[Any], bool], expected: str) -> Callable[[str], Any]:
    """Return a converter for argparse that says what it expected."""

    def parse_value(text: str) -> Any:
        try:
            value = convert(text)
        except ValueError:
            value = math.nan
        if not accepts(value):
            raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
        return value

    return parse_value


def _manifolds(text: str) -> tuple[str, ...]:
    kinds = tuple(text.split(","))
    unknown = [kind for kind in kinds if kind not in models.MANIFOLDS]
    if unknown:
        raise argparse.ArgumentTypeError(f"expected some of {','.join(models.MANIFOLDS)}, got {text!r}")
    return kinds


def _radius(text: str) -> str | float:
    if text in ("kaiming", "unit", "bound"):
        return text
    expected = "kaiming, unit, bound or a positive number"
    return _checked(float, lambda x: 0 < x < math.inf, expected)(text)


def _device(text: str) -> str:
    """Check a device by making a tensor there."""
    try:
        torch.empty(0, device=text)
    except (AssertionError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(f"cannot use {text!r}: {reason}") from error
    return text
