"""The settings of a run: typed, from flags and YAML files, and refused with a reason where they make no sense.

Every field is a flag of the same name, and a key of the same name in the files of ``--config``. Flags come after
the file, and the file after the flags that a method stands for (:mod:`training.methods`): the last one counts.
"""

from __future__ import annotations

import difflib
import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import torch
import tyro
import yaml
from tyro.constructors import PrimitiveConstructorSpec

import fgo_geo
from training import processes
from training.methods import METHODS

MANIFOLDS = ("sphere", "oblique", "stiefel", "euclidean")
DATA = ("digits", "fashion", "cifar10", "cifar100", "imagefolder")
PLAINLY_BUILT = ("small", "plain")
NETWORKS = ("small", "plain", "rcd20", "rcd110", "narrow18")
TORCHVISION = ("resnet18", "resnet34", "resnet50", "resnet101", "seresnet50", "seresnet101", "vits16")
MODELS = (*NETWORKS, *TORCHVISION)
ON_MANIFOLDS = ("fgsgd", "rsgd", "radam")
PLAIN = ("sgd", "adamw")
SCHEDULES = ("robbins-monro", "cosine", "step", "constant")
DEFAULT_LR = {"sgd": 0.05, "radam": 0.01, "adamw": 0.003}

NOT_PART_OF_THE_RUN = {"runs", "output", "resume", "overwrite"}
MAY_CHANGE_ON_RESUME = {"epochs", "data_dir", "download", "workers", "device", "threads", "tensorboard"}


class SettingsError(ValueError):
    """Settings that cannot be run: the message says why, and what to do."""


# -- kinds of flags -------------------------------------------------------------------------------------------


def _flag(parse: Callable[[str], Any], metavar: str, has_auto: bool = True) -> Any:
    """A flag with one value, whose parser says what it expected; ``auto`` stands for None."""
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=lambda words: None if has_auto and words[0] == "auto" else parse(words[0]),
        is_instance=lambda value: True,
        str_from_instance=lambda value: ["auto" if value is None else str(value)],
    )


def _number(convert: Callable[[str], Any], accepts: Callable[[Any], bool], expected: str) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            value = convert(text)
        except ValueError:
            value = math.nan
        if not accepts(value):
            raise ValueError(f"expected {expected}, got {text!r}")
        return value

    return parse


def _one_of(names: Sequence[str]) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text in names:
            return text
        near = difflib.get_close_matches(text, names, 1)
        raise ValueError(
            f"expected one of {', '.join(names)}, got {text!r}" + (f": did you mean {near[0]}?" if near else "")
        )

    return parse


def _choice(*names: str) -> Any:
    return _flag(_one_of(names), "{" + ",".join(names) + "}", has_auto="auto" not in names)


def _several(names: Sequence[str], metavar: str) -> Any:
    def parse(words: list[str]) -> tuple[str, ...]:
        return tuple(map(_one_of(names), filter(None, re.split(r"[,\s]+", " ".join(words)))))

    return PrimitiveConstructorSpec(
        nargs="*",
        metavar=metavar,
        instance_from_str=lambda words: None if words == ["auto"] else parse(words),
        is_instance=lambda value: True,
        str_from_instance=lambda value: ["auto"] if value is None else list(value),
    )


def _radius(text: str) -> str | float:
    if text in ("kaiming", "unit", "bound"):
        return text
    return _number(float, lambda x: 0 < x < math.inf, "kaiming, unit, bound or a positive number")(text)


def _device(text: str) -> str:
    """Check a device by making a tensor there."""
    try:
        torch.empty(0, device=text)
    except (AssertionError, RuntimeError) as error:
        raise ValueError(f"cannot use {text!r}: {str(error).splitlines()[0]}") from error
    return text


_positive = _number(float, lambda x: 0 < x < math.inf, "a positive number")
Positive = Annotated[float, _flag(_positive, "X")]
PositiveOrAuto = Annotated[float | None, _flag(_positive, "X")]
NotNegative = Annotated[float, _flag(_number(float, lambda x: 0 <= x < math.inf, "a number from 0"), "X")]
BelowOne = Annotated[float, _flag(_number(float, lambda x: 0 <= x < 1, "a number from 0 and below 1"), "X")]
Share = Annotated[float, _flag(_number(float, lambda x: 0 < x <= 1, "a number above 0 and up to 1"), "X")]
_count = _number(int, lambda x: x >= 1, "a whole number from 1")
Count = Annotated[int, _flag(_count, "N")]
CountOrAuto = Annotated[int | None, _flag(_count, "N")]
Natural = Annotated[int, _flag(_number(int, lambda x: x >= 0, "a whole number from 0"), "N")]
Seed = Annotated[int, _flag(_number(int, lambda x: 0 <= x < 2**63, "a whole number from 0 and below 2**63"), "N")]
FolderOrAuto = Annotated[Path | None, _flag(Path, "FOLDER")]


# -- the settings ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Data:
    """Images."""

    data: Annotated[str, _choice(*DATA)] = "digits"
    """Images to classify. digits come with scikit-learn."""
    data_dir: FolderOrAuto = None
    """Where they are (auto: $FGO_GEO_DATA, else data; fashion: also where Debian's dataset-fashion-mnist puts it)."""
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

    model: Annotated[str, _choice(*MODELS)] = "small"
    """Architecture. plain: --depth convolutions of one width; rcd20, rcd110, narrow18 (ResNet-18): --width channels."""
    width: CountOrAuto = None
    """Channels of small, plain, rcd20, rcd110 and narrow18, in their first layer (auto: 32; rcd20, rcd110: 16)."""
    depth: Count = 8
    """Convolutions of plain."""
    skips: bool = False
    """Residual connections over every two convolutions of plain."""
    norm: Annotated[str | None, _choice("batch", "none")] = None
    """Normalisation layers of small and plain (auto: none); the others have their own."""
    start: Annotated[str, _choice("default", "orthogonal")] = "default"
    """First weights of plain layers: those of the architecture, or orthogonal ones on the scale of He."""
    channels_last: bool = False
    """Keep images and kernels channels last."""
    compile: bool = False
    """torch.compile the network."""
    recompute: bool = False
    """Recompute activations in the backward pass, to save memory."""


@dataclass(frozen=True)
class Geometry:
    """Manifolds."""

    strategy: Annotated[str | None, _choice("layer", "pi", "po", "pio")] = None
    """Groups of a convolution's kernels (auto: pio; sgd, adamw: none)."""
    manifolds: Annotated[tuple[str, ...] | None, _several(MANIFOLDS, "KIND,...")] = None
    """Kinds dealt to the groups, e.g. sphere,stiefel (auto: all four; layer: oblique; sgd, adamw: euclidean)."""
    linear_manifold: Annotated[str, _choice(*MANIFOLDS)] = "euclidean"
    """Of linear layers, whole matrices."""
    components: Annotated[str, _choice("auto", "kernel", "block", "filter")] = "auto"
    """What lies on a manifold: single kernels, blocks of a layer's matrix, or all weights of an output channel."""
    selection: Annotated[str, _choice("random", "deterministic")] = "random"
    """Of the groups."""
    radius: Annotated[str | float, _flag(_radius, "{kaiming,unit,bound}|X")] = "kaiming"
    """Of manifolds."""
    bound: Positive = 1.0
    """Of the norms of every group, for --radius bound and --renormalize."""
    scales: Annotated[str, _choice("none", "max1", "std")] = "none"
    """Refresh the radii γ / λ once per epoch, λ from the features' standard deviation (max1: at least 1)."""
    renormalize: bool = False
    """Reparametrise the weights, so that a plain optimiser keeps their norms bounded, in place of manifolds."""


@dataclass(frozen=True)
class Optimisation:
    """Optimisation."""

    optimizer: Annotated[str, _choice(*ON_MANIFOLDS, *PLAIN)] = "fgsgd"
    """Optimiser; rsgd and radam are Geoopt's."""
    on_manifolds: Annotated[str, _choice("none", "theorem", "constant", "angle")] = "none"
    """Let sgd or adamw step on manifolds, with this step size."""
    project: bool = False
    """Let sgd or adamw step freely, and project the weights onto their manifolds afterwards."""
    step_size: Annotated[str, _choice("theorem", "constant")] = "theorem"
    """Of fgsgd."""
    adapt_euclidean: bool = False
    """Divide the steps of unconstrained parameters by τ too (fgsgd)."""
    lr: PositiveOrAuto = None
    """Highest learning rate (auto: 0.2; sgd: 0.05; radam: 0.01; adamw: 0.003)."""
    momentum: BelowOne = 0.9
    """Momentum; β₁ of radam and adamw."""
    weight_decay: NotNegative = 5e-4
    """Weight decay of what is not on a manifold."""
    channel_directed: Annotated[str, _choice("none", "h0", "h1", "h1t")] = "none"
    """Metric along the channels in which the gradient is taken."""
    lam: PositiveOrAuto = None
    """Weight of that metric's roughness (auto: 2)."""
    lam_relative: bool = False
    """Let λ count (D / 2π)² of D channels, layer by layer."""
    channel_axis: Annotated[str | None, _choice("output", "input")] = None
    """Channels along which it smooths (auto: output)."""
    schedule: Annotated[str, _choice(*SCHEDULES)] = "robbins-monro"
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
    label_smoothing: BelowOne = 0.0
    """Share of the target spread over all classes."""
    mixup: NotNegative = 0.0
    """α of mixup (0: off)."""
    ema: BelowOne = 0.0
    """Decay of the weights' moving average, which is projected onto the manifolds and evaluated (0: off)."""
    amp: Annotated[str, _choice("off", "bf16", "fp16")] = "off"
    """Mixed precision."""
    max_bad_steps: Count = 20
    """Steps with a non-finite loss or gradient in a row, all skipped, after which a run stops."""


@dataclass(frozen=True)
class Running:
    """Run."""

    seed: Seed = 0
    """Of first weights, groups, order of the images, --fraction and --label-noise."""
    device: Annotated[str | None, _flag(_device, "DEVICE")] = None
    """Where to train (auto: cuda if there is one; with torchrun one per process)."""
    threads: CountOrAuto = None
    """Of the CPU (auto: 1 for small images, which is fastest; else all cores)."""
    runs: Annotated[Path, _flag(Path, "FOLDER")] = Path("runs")
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


FLAGS = {f.name: f for part in fields(Settings) for f in fields(part.default_factory)}  # pyright: ignore


# -- from the command line ------------------------------------------------------------------------------------

# Indented throughout, since tyro joins other lines.
DESCRIPTION = """Train an image classifier whose weights live on manifolds.

  --method NAME stands for the flags of a row of the paper's Table 3:
  {methods}.
  --config FILE reads flags from a YAML file, e.g. the run.yaml of another run.
  Flags count more than the file, and the file more than the method.

  {prog}
  {prog} --method pio --seed 1
  {prog} --data fashion --manifolds stiefel,sphere --lr 0.1
  {prog} --config run.yaml --seed 2
  torchrun --nproc-per-node 8 {prog} --data imagefolder
"""


def parse(arguments: Sequence[str] | None = None, prog: str = "train.py", first: Sequence[str] = ()) -> Settings:
    """Read the settings from the command line (``sys.argv`` if None); whatever is wrong ends the program.

    Args:
        arguments: Words of the command line.
        prog: Name of the program in messages.
        first: Words that all others override.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        words, files = _take(words, "--config")
        of_files = [flag for file in files for flag in words_of(_read_yaml(Path(file)))]
        of_files, methods = _take(of_files, "--method")
        words, chosen = _take(words, "--method")
        of_methods = [flag for name in (chosen or methods)[-1:] for flag in method_words(name)]
        # tyro takes the last of two flags of one name.
        all_words = [*first, *of_methods, *of_files, *words]
    except SettingsError as error:
        fail(error)
    settings = tyro.cli(
        Settings,
        args=_last_only(all_words),
        prog=prog,
        description=DESCRIPTION.format(methods=_wrapped(METHODS), prog=prog),
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.HelptextFromCommentsOff),
    )
    try:
        return resolve(settings)
    except SettingsError as error:
        fail(error)


def fail(error: Exception | str) -> Any:
    """End the program with a message, as a bad flag does."""
    print(f"error: {error}", file=sys.stderr)
    raise SystemExit(2)


def words_of(flags: Mapping[str, Any]) -> list[str]:
    """Words of a command line for settings by name, as in a YAML file.

    Raises:
        SettingsError: If a name is none of a flag; the message has the nearest one.
    """
    words: list[str] = []
    for key, value in flags.items():
        name = str(key).replace("-", "_")
        if name not in FLAGS and name != "method":
            near = difflib.get_close_matches(name, [*FLAGS, "method"], 1)
            raise SettingsError(f"unknown setting {key!r}" + (f": did you mean {near[0]}?" if near else ""))
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            words.append(flag if value else f"--no-{flag[2:]}")
        elif isinstance(value, list | tuple):
            words += [flag, ",".join(map(str, value))]
        else:
            words += [flag, "auto" if value is None else str(value)]
    return words


def method_words(name: str) -> list[str]:
    """Words that a method stands for.

    Raises:
        SettingsError: If there is no such method.
    """
    try:
        return words_of(METHODS[_one_of(list(METHODS))(name)].flags)
    except ValueError as error:
        raise SettingsError(f"--method: {error}") from error


def make(flags: Mapping[str, Any]) -> Settings:
    """Settings from names and values, as in a YAML file; ``method`` may be one of them.

    Raises:
        SettingsError: If something is wrong with them.
    """
    words = words_of({k: v for k, v in flags.items() if k != "method"})
    words = _last_only([*(method_words(flags["method"]) if "method" in flags else []), *words])
    values: dict[str, Any] = {}
    for block in _blocks(words):
        name = block[0].removeprefix("--").removeprefix("no-").replace("-", "_")
        spec = _SPECS.get(name)
        try:
            values[name] = spec.instance_from_str(block[1:]) if spec else not block[0].startswith("--no-")
        except ValueError as error:
            raise SettingsError(f"{name}: {error}") from error
    return resolve(Settings().with_(**values))


def _specs() -> dict[str, Any]:
    """The parsers of all flags that take a value, by name."""
    hints = {k: v for part in fields(Settings) for k, v in _hints_of(part.default_factory).items()}
    return {name: hint.__metadata__[0] for name, hint in hints.items() if hasattr(hint, "__metadata__")}


def _hints_of(part: Any) -> dict[str, Any]:
    return get_type_hints(part, include_extras=True)


_SPECS = _specs()


def _take(words: list[str], flag: str) -> tuple[list[str], list[str]]:
    """Remove a flag and its values; return the other words, and the values."""
    others, values, rest = [], [], iter(words)
    for word in rest:
        if word == flag:
            value = next(rest, None)
            if value is None:
                raise SettingsError(f"{flag} needs a value")
            values.append(value)
        elif word.startswith(flag + "="):
            values.append(word.partition("=")[2])
        else:
            others.append(word)
    return others, values


def _last_only(words: list[str]) -> list[str]:
    """Drop flags that come again later, so that lists are replaced and not joined."""
    blocks = list(_blocks(words))
    last = {_name(block): number for number, block in enumerate(blocks)}
    return [word for number, block in enumerate(blocks) if last[_name(block)] == number for word in block]


def _blocks(words: list[str]) -> Iterator[list[str]]:
    """Flags with their values."""
    block: list[str] = []
    for word in words:
        if word.startswith("--") and block:
            yield block
            block = []
        block.append(word)
    if block:
        yield block


def _name(block: list[str]) -> str:
    return block[0].partition("=")[0].replace("--no-", "--")


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"--config: cannot read {path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise SettingsError(f"--config: {path} is no YAML: {error}") from error
    if not isinstance(content, dict):
        raise SettingsError(f"--config: expected names and values in {path}, e.g. lr: 0.1")
    return {str(name): float(value) if _is_number(value) else value for name, value in content.items()}


def _is_number(value: Any) -> bool:
    """Whether YAML took a number such as 1e-4, which it wants with a point, for a word."""
    return isinstance(value, str) and re.fullmatch(r"[+-]?\d+e[+-]?\d+", value) is not None


def _wrapped(names: Mapping[str, Any]) -> str:
    lines = [""]
    for name in names:
        if len(lines[-1]) + len(name) > 70:
            lines.append("")
        lines[-1] += (", " if lines[-1] else "") + name
    return ",\n  ".join(lines)


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
    if optim.optimizer != "fgsgd" and (optim.step_size != "theorem" or optim.adapt_euclidean):
        raise SettingsError(f"--step-size and --adapt-euclidean are for --optimizer fgsgd, not for {optim.optimizer}")
    if optim.batch_size < optim.accumulate * processes.count():
        raise SettingsError(
            f"--batch-size {optim.batch_size} is less than one image for each of {optim.accumulate} accumulated "
            f"parts on {processes.count()} processes"
        )
    if optim.warmup >= optim.epochs:
        raise SettingsError(f"--warmup {optim.warmup} leaves nothing of --epochs {optim.epochs}")
    if s.model.norm and s.model.model not in PLAINLY_BUILT:
        raise SettingsError(f"--norm is for {' and '.join(PLAINLY_BUILT)}, not for --model {s.model.model}")
    if s.model.model in PLAINLY_BUILT:
        changes["norm"] = s.model.norm or "none"
    if optim.ema and geometry.scales != "none":
        raise SettingsError("--ema cannot follow --scales, which move the manifolds: drop one of them")
    if optim.on_manifolds != "none" and not hasattr(fgo_geo, "on_manifolds"):
        raise SettingsError("--on-manifolds: this version of fgo_geo has no on_manifolds")
    changes["lr"] = optim.lr or DEFAULT_LR.get(optim.optimizer, 0.2)
    changes["time_constant"] = optim.time_constant or max(1.0, optim.epochs / 3)
    changes["device"] = s.run.device or processes.device()
    small = s.data.data in ("digits", "fashion") and changes["device"] == "cpu"
    changes["threads"] = s.run.threads or (1 if small or processes.count() > 1 else torch.get_num_threads())
    if optim.amp == "fp16" and changes["device"] == "cpu":
        raise SettingsError("--amp fp16 needs a GPU: on the CPU take --amp bf16")
    return s.with_(**changes)
