"""The settings of a run: typed, with defaults that depend on each other, and refused where they make no sense.

Every field is a flag of the same name, and a key of the same name in YAML files: :mod:`training.command_line`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any

import torch

from training import processes
from training.flag_types import (
    BelowOne,
    Count,
    CountOrAuto,
    FolderOrAuto,
    Natural,
    NotNegative,
    Positive,
    PositiveOrAuto,
    Seed,
    Share,
    choice,
    device_name,
    flag,
    radius_or_rule,
    several,
)

MANIFOLDS = ("sphere", "oblique", "stiefel", "euclidean")
DATA = ("digits", "fashion", "cifar10", "cifar100", "imagefolder")
PLAINLY_BUILT = ("small", "plain")
NETWORKS = ("small", "plain", "rcd20", "rcd110", "narrow18")
TORCHVISION = ("resnet18", "resnet34", "resnet50", "resnet101", "seresnet50", "seresnet101", "vits16")
MODELS = (*NETWORKS, *TORCHVISION)
ON_MANIFOLDS = ("fgsgd", "rsgd", "radam", "rdog")
PLAIN = ("sgd", "adamw")
WEIGHTS = ("constrained", "biases", "first", "classifier")
SCHEDULES = ("robbins-monro", "cosine", "step", "constant")
DEFAULT_LR = {"sgd": 0.05, "radam": 0.01, "adamw": 0.003, "rdog": 1.0}

NOT_PART_OF_THE_RUN = {"runs", "output", "resume", "overwrite"}
MAY_CHANGE_ON_RESUME = {"epochs", "data_dir", "download", "workers", "device", "threads", "tensorboard", "telemetry"}


class SettingsError(ValueError):
    """Settings that cannot be run: the message says why, and what to do."""


@dataclass(frozen=True)
class Data:
    """Images."""

    data: Annotated[str, choice(*DATA)] = "digits"
    """Images to classify. digits come with scikit-learn."""
    data_dir: FolderOrAuto = None
    """Where they are (auto: $FGO_GEO_DATA, data, or for fashion where Debian's dataset-fashion-mnist puts it)."""
    download: bool = False
    """Let torchvision fetch Fashion-MNIST or CIFAR."""
    validation: bool = False
    """Measure on a fifth of the training images; the test images stay unseen."""
    fraction: Share = 1.0
    """Share of the training images to train on, equal in every class, drawn by the seed."""
    label_noise: BelowOne = 0.0
    """Share of the training labels that the seed replaces by wrong ones."""
    image_size: CountOrAuto = None
    """Side of the images in pixels (auto: their own; imagefolder: 224). Small sets are pooled."""
    augment: bool = True
    """Random crops and flips for cifar10, cifar100 and imagefolder; the others have none."""
    workers: Natural = 0
    """Processes that load images."""


@dataclass(frozen=True)
class Model:
    """Network."""

    model: Annotated[str, choice(*MODELS)] = "small"
    """Architecture. plain: --depth convolutions of one width; rcd20, rcd110, narrow18 (ResNet-18): --width channels."""
    width: CountOrAuto = None
    """Channels of small, plain, rcd20, rcd110 and narrow18, in their first layer (auto: 32; rcd20, rcd110: 16)."""
    depth: Count = 8
    """Convolutions of plain."""
    skips: bool = False
    """Residual connections over every two convolutions of plain."""
    norm: Annotated[str | None, choice("batch", "none")] = None
    """Normalisation layers of small and plain (auto: none); the others have their own."""
    start: Annotated[str, choice("default", "orthogonal")] = "default"
    """First weights of plain layers: those of the architecture, or orthogonal ones on the scale of He."""
    channels_last: bool = False
    """Keep images and kernels channels last (fsdp2, which deals contiguous kernels only: images alone)."""
    compile: bool = False
    """torch.compile the network."""
    recompute: bool = False
    """Recompute activations in the backward pass, to save memory."""


@dataclass(frozen=True)
class Geometry:
    """Manifolds."""

    strategy: Annotated[str | None, choice("layer", "pi", "po", "pio")] = None
    """Groups of a convolution's kernels (auto: pio; sgd, adamw: none)."""
    manifolds: Annotated[tuple[str, ...] | None, several(MANIFOLDS, "KIND,...")] = None
    """Kinds that share the groups, e.g. sphere,stiefel (auto: all four; layer: oblique; sgd, adamw: euclidean)."""
    linear_manifold: Annotated[str, choice(*MANIFOLDS)] = "euclidean"
    """Of linear layers, whole matrices."""
    components: Annotated[str, choice("auto", "kernel", "block", "filter")] = "auto"
    """What lies on a manifold: single kernels, blocks of a layer's matrix, or all weights of an output channel."""
    selection: Annotated[str, choice("random", "deterministic")] = "random"
    """Of the groups."""
    radius: Annotated[str | float, flag(radius_or_rule, "{kaiming,unit,bound}|X")] = "kaiming"
    """Of manifolds."""
    bound: Positive = 1.0
    """Of the norms of every group, for --radius bound and --renormalize."""
    scales: Annotated[str, choice("none", "max1", "std")] = "none"
    """Refresh the radii γ / λ once per epoch, λ from the features' standard deviation (max1: at least 1)."""
    renormalize: bool = False
    """Reparametrise the weights, so that a plain optimiser keeps their norms bounded, in place of manifolds."""


@dataclass(frozen=True)
class Optimisation:
    """Optimisation."""

    optimizer: Annotated[str, choice(*ON_MANIFOLDS, *PLAIN)] = "fgsgd"
    """Optimiser; rsgd and radam are Geoopt's; rdog finds its learning rate, and has no momentum."""
    on_manifolds: Annotated[str, choice("none", "theorem", "constant", "angle")] = "none"
    """Let sgd or adamw step on manifolds, with this step size."""
    project: bool = False
    """Let sgd or adamw step freely, and project the weights onto their manifolds afterwards."""
    step_size: Annotated[str, choice("theorem", "constant")] = "theorem"
    """Of fgsgd."""
    step_norm: Annotated[str, choice("batch", "running")] = "batch"
    """Norm that τ of fgsgd is computed from: of this batch's gradient, or a mean over earlier ones."""
    adapt_euclidean: bool = False
    """Divide the steps of unconstrained parameters by τ too (fgsgd)."""
    tangent_steps: bool = False
    """Remove the radial part of the free steps of sgd or adamw, per output channel, as SGDP and AdamP do."""
    lr: PositiveOrAuto = None
    """Highest learning rate (auto: 0.2; sgd: 0.05; radam: 0.01; adamw: 0.003; rdog: 1, a factor)."""
    freeze: Annotated[tuple[str, ...], several(WEIGHTS, "WEIGHTS,...")] = ()
    """Weights that stay as they are at the start: constrained, biases, first (layer), classifier."""
    bias_lr: Positive = 1.0
    """Factor of the learning rate for the biases of convolutions and linear layers."""
    momentum: BelowOne = 0.9
    """Momentum; β₁ of radam and adamw."""
    weight_decay: NotNegative = 5e-4
    """Weight decay of what is not on a manifold."""
    channel_directed: Annotated[str, choice("none", "h0", "h1", "h1t")] = "none"
    """Metric along the channels in which the gradient is taken."""
    lam: PositiveOrAuto = None
    """Weight of that metric's roughness (auto: 2)."""
    lam_relative: bool = False
    """Let λ count (D / 2π)² of D channels, layer by layer."""
    channel_axis: Annotated[str | None, choice("output", "input")] = None
    """Channels along which it smooths (auto: output)."""
    schedule: Annotated[str, choice(*SCHEDULES)] = "robbins-monro"
    """Of the learning rate. robbins-monro: lr / (1 + t/T); step: a tenth at half and three quarters of the epochs."""
    time_constant: PositiveOrAuto = None
    """T of robbins-monro in epochs (auto: a third of the epochs)."""
    warmup: NotNegative = 0.0
    """Epochs in which the learning rate grows from a hundredth."""
    epochs: Count = 30
    """Passes over the training images."""
    batch_size: Count = 64
    """Images per step, over all processes and accumulated parts together."""
    accumulate: Count = 1
    """Parts of a batch whose gradients are summed before a step."""
    clip: PositiveOrAuto = None
    """Largest norm of the whole gradient (auto: no limit)."""
    spike: Positive = 1.0
    """Factor of the gradient in the first step of the second epoch: a bad batch, to see what survives it."""
    label_smoothing: BelowOne = 0.0
    """Share of the target spread over all classes."""
    mixup: NotNegative = 0.0
    """α of mixup (0: off)."""
    ema: BelowOne = 0.0
    """Decay of the weights' moving average, which is projected onto the manifolds and evaluated (0: off)."""
    amp: Annotated[str, choice("off", "bf16", "fp16")] = "off"
    """Mixed precision."""
    max_bad_steps: Count = 20
    """Steps with a non-finite loss or gradient in a row, all skipped, after which a run stops."""


@dataclass(frozen=True)
class Running:
    """Run."""

    seed: Seed = 0
    """Of first weights, groups, order of the images, --fraction and --label-noise."""
    device: Annotated[str | None, flag(device_name, "DEVICE")] = None
    """Where to train (auto: cuda if there is one; with torchrun one per process)."""
    parallel: Annotated[str, choice("ddp", "fsdp2")] = "ddp"
    """How the processes of torchrun share the work."""
    threads: CountOrAuto = None
    """Of the CPU (auto: 1 for small images, which is fastest; else all cores)."""
    runs: Annotated[Path, flag(Path, "FOLDER")] = Path("runs")
    """Folder of all runs."""
    output: FolderOrAuto = None
    """Folder of this run (auto: data, model, method, manifolds and seed, in the folder of all runs)."""
    resume: bool = False
    """Continue the run in that folder; start it if there is none."""
    overwrite: bool = False
    """Delete the run in that folder first."""
    checkpoint_steps: Natural = 0
    """Write a checkpoint every so many steps, besides those at the end of each epoch."""
    evaluate_every: Natural = 1
    """Epochs between two evaluations (0: only after the last)."""
    tensorboard: bool = False
    """Write the figures of the epochs for TensorBoard, too."""
    telemetry: Natural = 0
    """Measure by which angle every so many steps turns each weight (0: off)."""


@dataclass(frozen=True)
class Settings:
    """All settings of a run."""

    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    geometry: Geometry = field(default_factory=Geometry)
    optim: Optimisation = field(default_factory=Optimisation)
    run: Running = field(default_factory=Running)

    def flat(self) -> dict[str, Any]:
        """All settings by the names of their flags."""
        return {f.name: getattr(part, f.name) for part in self._parts() for f in fields(part)}

    def plain(self) -> dict[str, Any]:
        """Those that define the run, as plain values for files."""
        values = {name: value for name, value in self.flat().items() if name not in NOT_PART_OF_THE_RUN}
        kept = {name: value for name, value in values.items() if value is not None}
        return {
            name: str(v) if isinstance(v, Path) else list(v) if isinstance(v, tuple) else v for name, v in kept.items()
        }

    def differing(self) -> dict[str, Any]:
        """Those that define the run and differ from the defaults."""
        defaults = Settings().plain()
        return {name: value for name, value in self.plain().items() if defaults.get(name) != value}

    def with_(self, **changes: Any) -> Settings:
        """The same settings but for some, by the names of their flags."""
        parts = {}
        for part in fields(self):
            value = getattr(self, part.name)
            own = {name: changes[name] for name in changes if name in {f.name for f in fields(value)}}
            parts[part.name] = replace(value, **own)
        return Settings(**parts)

    def _parts(self) -> list[Any]:
        return [getattr(self, f.name) for f in fields(self)]


# -- what settings mean together ------------------------------------------------------------------------------


def resolve(s: Settings) -> Settings:
    """Set the defaults that depend on other settings, and refuse settings that contradict each other.

    Raises:
        SettingsError: With the reason.
    """
    optim, geometry = s.optim, s.geometry
    changes: dict[str, Any] = {}
    free = optim.optimizer in PLAIN and optim.on_manifolds == "none" and not optim.project and not geometry.renormalize
    if free:
        asked = {*(geometry.manifolds or ()), geometry.linear_manifold} - {"euclidean"}
        if asked or (geometry.strategy and not geometry.manifolds):
            raise SettingsError(
                f"--optimizer {optim.optimizer} would leave the manifolds: drop --strategy, --manifolds and "
                f"--linear-manifold, add --on-manifolds, --project or --renormalize, or take an --optimizer of "
                f"{', '.join(ON_MANIFOLDS)}"
            )
        changes["manifolds"] = ("euclidean",)
    if optim.optimizer not in PLAIN:
        for flag, given in (
            ("on-manifolds", optim.on_manifolds != "none"),
            ("project", optim.project),
            ("renormalize", geometry.renormalize),
        ):
            if given:
                raise SettingsError(f"--{flag} is for --optimizer {' or '.join(PLAIN)}, not for {optim.optimizer}")
    strategy = changes["strategy"] = geometry.strategy or "pio"
    default = ("oblique",) if strategy == "layer" else MANIFOLDS[:3] if geometry.renormalize else MANIFOLDS
    manifolds = changes.setdefault("manifolds", geometry.manifolds or default)
    if strategy == "layer" and len(manifolds) > 1:
        raise SettingsError(
            f"--strategy layer puts whole layers on one manifold, got --manifolds {','.join(manifolds)}"
        )
    if optim.channel_directed == "none":
        if optim.lam is not None or optim.channel_axis is not None or optim.lam_relative:
            raise SettingsError(
                "--lam, --lam-relative and --channel-axis are for --channel-directed: add it, or drop them"
            )
    elif optim.channel_directed == "h0" and optim.lam_relative:
        raise SettingsError("--lam-relative is for the metrics h1 and h1t: h0 treats every width alike")
    else:
        changes |= {"lam": optim.lam or 2.0, "channel_axis": optim.channel_axis or "output"}
    if optim.optimizer != "fgsgd" and (
        optim.step_size != "theorem" or optim.step_norm != "batch" or optim.adapt_euclidean
    ):
        raise SettingsError(
            f"--step-size, --step-norm and --adapt-euclidean are for --optimizer fgsgd, not for {optim.optimizer}"
        )
    if optim.tangent_steps and not free:
        raise SettingsError("--tangent-steps is for the free steps of --optimizer sgd or adamw, without manifolds")
    if optim.batch_size < optim.accumulate * processes.count():
        raise SettingsError(
            f"--batch-size {optim.batch_size} is less than one image for each of {optim.accumulate} accumulated "
            f"parts on {processes.count()} processes"
        )
    if s.run.parallel == "fsdp2":
        _require_shards(s)
    if optim.warmup >= optim.epochs:
        raise SettingsError(f"--warmup {optim.warmup} leaves nothing of --epochs {optim.epochs}")
    if s.model.norm and s.model.model not in PLAINLY_BUILT:
        raise SettingsError(f"--norm is for {' and '.join(PLAINLY_BUILT)}, not for --model {s.model.model}")
    if s.model.model in PLAINLY_BUILT:
        changes["norm"] = s.model.norm or "none"
    if optim.ema and geometry.scales != "none":
        raise SettingsError("--ema cannot follow --scales, which move the manifolds: drop one of them")
    if s.model.recompute and s.model.model in PLAINLY_BUILT:
        raise SettingsError(
            f"--recompute works on residual blocks and layers of transformers, and --model {s.model.model} has neither"
        )
    changes["lr"] = optim.lr or DEFAULT_LR.get(optim.optimizer, 0.2)
    changes["time_constant"] = optim.time_constant or max(1.0, optim.epochs / 3)
    changes["device"] = s.run.device or processes.device()
    small = s.data.data in ("digits", "fashion") and changes["device"] == "cpu"
    changes["threads"] = s.run.threads or (1 if small or processes.count() > 1 else torch.get_num_threads())
    return s.with_(**changes)


def _require_shards(s: Settings) -> None:
    """Refuse what needs all of a weight in one process."""
    optim = s.optim
    if processes.count() == 1:
        raise SettingsError("--parallel fsdp2 deals weights to several processes: start the run with torchrun")
    if optim.optimizer in ("rsgd", "radam", "rdog"):
        raise SettingsError(
            f"--parallel fsdp2: {optim.optimizer} does not know sharded weights. Take --optimizer "
            "fgsgd, --on-manifolds, or --parallel ddp"
        )
    for name, given in (
        ("channel-directed", optim.channel_directed != "none"),
        ("tangent-steps", optim.tangent_steps),
        ("renormalize", s.geometry.renormalize),
        ("telemetry", s.run.telemetry > 0),
    ):
        if given:
            raise SettingsError(f"--{name} needs whole weights: take --parallel ddp, with --recompute to save memory")
