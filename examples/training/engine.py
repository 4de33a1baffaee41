"""Training: building what takes part in a run, its steps, its epochs, and its state.

A step is skipped where its loss or gradient is not finite, and counted. What a run will do next depends on nothing but
its :meth:`Run.state`, which can be taken after any step.
"""

from __future__ import annotations

import io
import math
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import geoopt
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader
from torchvision.transforms import v2

import fgo_geo
from fgo_geo.linalg import is_sharded, local_part, whole
from fgo_geo.models.renormalize import update_scales
from training import checkpoints, data, measures, models, optimisers, processes
from training.settings import Settings

Epoch = dict[str, Any]
STATEFUL = ("model", "optimizer", "scheduler", "scaler", "ema")
SHARDED = ("model", "optimizer", "ema")


class Stopped(Exception):
    """A signal asked the run to end; its state is complete."""


class Diverged(ArithmeticError):
    """Losses, gradients or weights are not finite any more."""


@dataclass
class Progress:
    """How far a run has come, and what it has measured of the epoch that it is in."""

    epoch: int = 1
    batch: int = 0  # batches done in this epoch
    step: int = 0
    skipped: int = 0  # steps
    bad_in_row: int = 0
    lr: float = 0.0  # at the beginning of this epoch
    seconds: float = 0.0  # spent in this epoch
    sums: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])  # loss, right answers, images: this process
    taus: list[list[float]] = field(default_factory=list)
    history: list[Epoch] = field(default_factory=list)


class Signals:
    """SIGINT and SIGTERM end a run after the step that it is in; a second SIGINT ends it at once."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None

    @contextmanager
    def handled(self) -> Iterator[Signals]:
        """Take the signals over, where this is the thread that gets them."""

        def remember(number: int, frame: Any) -> None:
            if self.received == signal.SIGINT == number:
                raise KeyboardInterrupt
            self.received = signal.Signals(number)

        ours = threading.current_thread() is threading.main_thread()
        taken = (signal.SIGINT, signal.SIGTERM) if ours else ()
        before = {number: signal.signal(number, remember) for number in taken}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@dataclass
class Run:
    """Everything that takes part in training."""

    settings: Settings
    splits: data.Splits
    model: nn.Module
    net: nn.Module  # the model, or what wraps it to train on many processes
    plan: fgo_geo.Plan | None
    optimizer: torch.optim.Optimizer
    scheduler: LRScheduler
    scaler: torch.amp.GradScaler
    ema: AveragedModel | None
    order: data.Order
    batches: DataLoader[Any]
    held_out: DataLoader[Any]
    watched: fgo_geo.optim.Telemetry | None = None
    progress: Progress = field(default_factory=Progress)
    signals: Signals = field(default_factory=Signals)

    @property
    def is_sharded(self) -> bool:
        """Whether the weights are dealt to the processes."""
        return self.settings.run.parallel == "fsdp2"

    def state(self) -> dict[str, Any]:
        """Everything that decides what the run will do next; to be called on all processes at once.

        What is dealt to the processes is left out: :meth:`shards` has it.
        """
        parts = {name: getattr(self, name) for name in STATEFUL if not (self.is_sharded and name in SHARDED)}
        of_process: dict[str, Any] = {"random": checkpoints.random_state(), "sums": self.progress.sums}
        if processes.count() > 1:  # statistics of what this process has seen
            of_process["buffers"] = {name: buffer.cpu() for name, buffer in self._buffers().items()}
        return {
            "settings": self.settings.plain(),
            "progress": vars(self.progress),
            "groups": [{**group, "params": None} for group in self.optimizer.param_groups],
            "has_stepped": bool(self.optimizer.state),
            "processes": processes.gathered(of_process),
            **{name: part.state_dict() for name, part in parts.items() if part is not None},
        }

    def shards(self, has_stepped: bool) -> dict[str, Any]:
        """The dealt parts of the state; those of an optimiser only once it has any, since torch would make them up."""
        from fgo_geo.distributed import TrainingState

        parts = {"model": TrainingState(self.model, self.optimizer if has_stepped else None)}
        return parts | ({} if self.ema is None else {"ema": TrainingState(self.ema.module)})

    def restore(self, state: dict[str, Any], path: Path | None = None) -> None:
        """Go back to where a state was taken.

        Args:
            state: From :meth:`state`.
            path: The checkpoint that it is from, for what is dealt to the processes.
        """
        if self.is_sharded and path is not None:
            from training import sharded

            sharded.load(path, self.shards(state["has_stepped"]))
            for group, saved in zip(self.optimizer.param_groups, state["groups"], strict=True):
                group.update(saved | {"params": group["params"]})
        for name in STATEFUL:
            if getattr(self, name) is not None and name in state:
                getattr(self, name).load_state_dict(state[name])
        if isinstance(self.optimizer, geoopt.optim.RiemannianAdam):
            # It counts steps in whole numbers, of which loading makes float32 tensors: other bits would follow.
            for moments in self.optimizer.state.values():
                moments["step"] = int(moments["step"])
        self.progress = Progress(**state["progress"])
        of_all, rank = state["processes"], processes.rank()
        own = of_all[min(rank, len(of_all) - 1)]
        sums = [each["sums"] for each in of_all]
        if len(of_all) != processes.count():  # what all have summed, once
            sums = [list(map(sum, zip(*sums, strict=True))), *([0.0, 0.0, 0.0] for _ in range(rank))]
        self.progress.sums = list(sums[rank])
        checkpoints.restore_random_state(own["random"])
        for name, buffer in self._buffers().items() if processes.count() > 1 else ():
            if name in own.get("buffers", {}):
                buffer.copy_(own["buffers"][name])

    def _buffers(self) -> dict[str, Tensor]:
        return dict(self.model.named_buffers()) | dict(self.ema.named_buffers() if self.ema else ())

    @property
    def trained(self) -> nn.Module:
        """The network that is evaluated: that of the averages, if there are any."""
        return self.model if self.ema is None else self.ema.module


# -- building -------------------------------------------------------------------------------------------------


def build(settings: Settings) -> Run:
    """Load the data, put the model's weights on manifolds, choose optimiser and learning rates.

    Raises:
        FileNotFoundError: If there are no data.
        ValueError: If the data, the network or the options do not fit each other.
    """
    optim, device = settings.optim, settings.run.device or "cpu"
    torch.set_num_threads(settings.run.threads or 1)
    checkpoints.seed_everything(settings.run.seed)
    splits = data.load(settings.data, settings.run.seed)
    model = models.build(settings.model, splits.channels, splits.classes, splits.size)
    if settings.model.channels_last and settings.run.parallel == "ddp":
        model = model.to(memory_format=torch.channels_last)  # pyright: ignore
    model.to(device)
    plan = models.constrain(model, settings.geometry, settings.run.seed)
    ema = None
    if optim.ema:
        ema = AveragedModel(model, multi_avg_fn=averaging(optim.ema), use_buffers=True)
    if settings.run.parallel == "fsdp2":
        from training import sharded  # a second, which other runs save

        for each in (model, ema.module) if ema else (model,):
            sharded.shard(each, device)
    optimizer = optimisers.build(optim, model)
    models.freeze(model, optim.freeze)
    least = 2 * processes.count() * optim.accumulate
    order = data.Order(len(splits.train), optim.batch_size, settings.run.seed, least)
    if not order.batches:
        raise ValueError(
            f"there are {len(splits.train)} training images, fewer than the {least} that --accumulate "
            f"{optim.accumulate} on {processes.count()} process(es) needs for a step"
        )
    workers = settings.data.workers
    batches = data.loader(splits.train, order, workers, device)
    held_out = data.loader(splits.test, data.Order(len(splits.test), optim.batch_size, None), workers, device)
    if settings.model.compile:
        model.compile()
    net = model
    if processes.count() > 1 and settings.run.parallel == "ddp":
        devices = [device] if device.startswith("cuda") else None
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated")  # but in what is wanted here
            net = DistributedDataParallel(model, devices, broadcast_buffers=False)
    return Run(
        settings,
        splits,
        model,
        net,
        plan,
        optimizer,
        optimisers.schedule(optim, optimizer, order.batches),
        torch.amp.GradScaler(device.partition(":")[0], enabled=optim.amp == "fp16"),
        ema,
        order,
        batches,
        held_out,
        fgo_geo.telemetry(optimizer, model, every=settings.run.telemetry) if settings.run.telemetry else None,
    )


def averaging(decay: float) -> Any:
    """How averages of weights move, for :class:`torch.optim.swa_utils.AveragedModel`, whole or dealt to processes."""
    of_tensors = get_ema_multi_avg_fn(decay)

    def average(averages: Sequence[Tensor], values: Sequence[Tensor], count: Any) -> None:
        of_tensors([here(a) for a in averages], [here(v) for v in values], count)

    return average


def here(tensor: Tensor) -> Tensor:
    """What this process has of a tensor."""
    return local_part(tensor) if is_sharded(tensor) else tensor


# -- training -------------------------------------------------------------------------------------------------


def fit(
    run: Run,
    save: Callable[[Run], None] = lambda run: None,
    show: Callable[[Epoch], None] = lambda epoch: None,
    track: Callable[[Any, str], Any] = lambda batches, description: batches,
) -> None:
    """Train to the last epoch.

    Args:
        run: The run, at its start or restored.
        save: Called when its state is worth keeping: at the end of every epoch, every --checkpoint-steps, and before
            a signal ends it.
        show: Called with the figures of every epoch.
        track: Wraps the batches of an epoch, to show how far it is.

    Raises:
        Stopped: If a signal has asked for it.
        Diverged: If too many steps in a row had to be skipped, or a weight is not finite.
    """
    progress, settings = run.progress, run.settings
    while progress.epoch <= settings.optim.epochs:
        figures = train_epoch(run, save, track)
        last = progress.epoch == settings.optim.epochs
        every = settings.run.evaluate_every
        figures |= evaluate(run) if last or (every and progress.epoch % every == 0) else dict.fromkeys(HELD_OUT)
        figures["largest_violation"] = measures.largest_violation(run.model)
        if run.plan and settings.geometry.scales != "none":
            run.plan.update_scales(run.optimizer)
        elif settings.geometry.scales != "none":
            update_scales(run.model)
        figures["seconds"] = progress.seconds
        progress.history.append(figures)
        progress.epoch, progress.batch, progress.seconds = progress.epoch + 1, 0, 0.0
        progress.sums, progress.taus = [0.0, 0.0, 0.0], []
        save(run)
        show(figures)
        if _is_asked_to_stop(run):
            raise Stopped


def train_epoch(
    run: Run,
    save: Callable[[Run], None] = lambda run: None,
    track: Callable[[Any, str], Any] = lambda batches, description: batches,
) -> Epoch:
    """Take the steps of an epoch that are left; return mean loss and accuracy on the way, and figures of τ."""
    progress, settings = run.progress, run.settings
    run.order.epoch, run.order.done = progress.epoch, progress.batch
    if not progress.batch:
        progress.lr = float(run.scheduler.get_last_lr()[0])
    figures: Epoch = {"epoch": progress.epoch, "lr": progress.lr}
    run.net.train()
    sums = torch.tensor(progress.sums, dtype=torch.float64)
    taus = [torch.tensor(tau) for tau in progress.taus]
    begin, before = time.perf_counter(), progress.seconds
    for images, labels in track(run.batches, f"{progress.epoch}/{settings.optim.epochs}"):
        measured, stop = take_step(run, images, labels)
        sums += measured
        progress.batch += 1
        progress.step += 1
        tau = measures.tau_of_step(run.optimizer) if progress.bad_in_row == 0 else None
        taus += [] if tau is None else [tau]
        every = settings.run.checkpoint_steps
        if (stop or (every and progress.step % every == 0)) and progress.batch < run.order.batches:
            progress.sums, progress.taus = sums.tolist(), [tau.tolist() for tau in taus]
            progress.seconds = before + time.perf_counter() - begin
            save(run)
            if stop:
                raise Stopped
    progress.seconds = before + time.perf_counter() - begin
    loss, correct, count = processes.total(sums).tolist()
    count = max(count, 1)
    return figures | {
        "train_loss": loss / count,
        "train_accuracy": correct / count,
        "skipped_steps": progress.skipped,
        **measures.tau_of_epoch([tau.cpu() for tau in taus]),
        **(run.watched.scalars() if run.watched else {}),
    }


def _is_asked_to_stop(run: Run) -> bool:
    flag = torch.tensor(float(run.signals.received is not None), device=run.settings.run.device)
    return bool(processes.largest(flag))


def take_step(run: Run, images: Tensor, labels: Tensor) -> tuple[Tensor, bool]:
    """Take a step with a batch, unless its loss or gradient is not finite.

    Returns:
        [summed loss, number of right answers, number of images], zeros for a skipped step; and whether a signal asks
        any process to stop.

    Raises:
        Diverged: If too many steps in a row had to be skipped, or a weight is not finite.
    """
    optim, progress = run.settings.optim, run.progress
    buffers = [buffer.clone() for buffer in run.model.buffers()]
    run.optimizer.zero_grad()
    measured = accumulate_gradients(run, images, labels)
    run.scaler.unscale_(run.optimizer) if run.scaler.is_enabled() else None
    weights = [weight for weight in run.model.parameters() if weight.grad is not None]
    if optim.spike != 1 and (progress.epoch, progress.batch) == (2, 0):
        for weight in weights:
            weight.grad.mul_(optim.spike)  # pyright: ignore
    norm = whole(get_total_norm([w.grad for w in weights if w.grad is not None]))
    bad = ~(torch.isfinite(norm) & torch.isfinite(measured[0])).cpu()
    flags = torch.tensor([float(bad), float(run.signals.received is not None)], device=norm.device)
    bad, stop = map(bool, processes.largest(flags).tolist())
    if bad:
        progress.skipped += 1
        progress.bad_in_row += 1
        for buffer, saved in zip(run.model.buffers(), buffers, strict=True):
            buffer.copy_(saved)  # statistics of batch normalisation have seen what is not finite
        if progress.bad_in_row >= optim.max_bad_steps:
            raise Diverged(
                f"the loss or the gradient was not finite in {progress.bad_in_row} steps in a row, the last of them "
                f"step {progress.step + 1} in epoch {progress.epoch}"
            )
        run.scaler.update() if run.scaler.is_enabled() else None
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")  # of the first step, if skipped
            run.scheduler.step()
        return torch.zeros(3, dtype=torch.float64), stop
    progress.bad_in_row = 0
    if optim.clip is not None:
        clip_grads_with_norm_(weights, optim.clip, norm)
    try:
        run.scaler.step(run.optimizer)
    except FloatingPointError as error:
        raise Diverged(f"a weight is not finite after step {progress.step + 1} in epoch {progress.epoch}") from error
    run.scaler.update()
    # FG-SGD hands products of large matrices on to its next step, unless its state is taken: taken after every step,
    # the run is the same to the bit wherever it is saved.
    run.optimizer.state_dict()
    if optim.project and run.plan:
        run.plan.project()
    if run.ema is not None:
        run.ema.update_parameters(run.model)
    run.scheduler.step()
    return measured.double().cpu(), stop


def accumulate_gradients(run: Run, images: Tensor, labels: Tensor) -> Tensor:
    """Add up the gradients of the mean loss over a batch of all processes, part by part."""
    optim, world = run.settings.optim, processes.count()
    first = run.progress.batch * optim.batch_size
    of_all = min(optim.batch_size, len(run.splits.train) - first)  # images of this batch, over all processes
    sums = torch.zeros(3, device=run.settings.run.device)
    parts = list(zip(images.tensor_split(optim.accumulate), labels.tensor_split(optim.accumulate), strict=True))
    for number, (some, targets) in enumerate(parts):
        mixed = targets
        if optim.mixup:
            some, mixed = v2.MixUp(alpha=optim.mixup, num_classes=run.splits.classes)(some, targets)
        with _synchronised(run.net, number == len(parts) - 1):
            outputs = forward(run, run.net, some)
            loss = cross_entropy(outputs, _moved(run, mixed), reduction="sum", label_smoothing=optim.label_smoothing)
            # The gradients of the processes are averaged, not added.
            run.scaler.scale(loss * (world / of_all)).backward()
        right = (outputs.detach().argmax(1) == _moved(run, targets)).sum()
        sums += torch.stack([loss.detach(), right, right.new_tensor(len(targets))])
    return sums


def forward(run: Run, net: nn.Module, images: Tensor) -> Tensor:
    """The outputs of a network in single precision."""
    amp, device = run.settings.optim.amp, run.settings.run.device or "cpu"
    images = _moved(run, images)
    if run.settings.model.channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    if amp == "off":
        return net(images)
    with torch.autocast(device.partition(":")[0], torch.bfloat16 if amp == "bf16" else torch.float16):
        outputs = net(images)
    return outputs.float()


def _moved(run: Run, tensor: Tensor) -> Tensor:
    return tensor.to(run.settings.run.device, non_blocking=True)


def _synchronised(net: nn.Module, wanted: bool) -> AbstractContextManager[Any]:
    """Whether the backward pass adds up the gradients of the processes."""
    if isinstance(net, DistributedDataParallel) and not wanted:
        return net.no_sync()
    if hasattr(net, "set_requires_gradient_sync"):
        net.set_requires_gradient_sync(wanted)  # pyright: ignore - of FSDP2
    return nullcontext()


# -- measuring ------------------------------------------------------------------------------------------------

HELD_OUT = ("test_loss", "test_accuracy")


@torch.no_grad()
def evaluate(run: Run) -> Epoch:
    """Return mean loss and accuracy on the held-out images, of all processes together."""
    if run.ema is not None and run.plan is not None:
        fgo_geo.plan_of(run.ema.module).project()
    processes.share_buffers(run.trained)
    sums = torch.zeros(3, dtype=torch.float64)
    for outputs, labels in predictions(run):
        right = (outputs.argmax(1) == labels).sum()
        loss = cross_entropy(outputs, labels, reduction="sum")
        sums += torch.stack([loss, right, right.new_tensor(len(labels))]).double().cpu()
    loss, correct, count = processes.total(sums).tolist()
    return {"test_loss": loss / count, "test_accuracy": correct / count}


@torch.no_grad()
def predictions(run: Run) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits and labels of the held-out images of this process, batch by batch."""
    run.trained.eval()
    for images, labels in run.held_out:
        yield forward(run, run.trained, images), _moved(run, labels)
    for module in run.trained.modules():
        if hasattr(module, "reshard"):
            module.reshard()  # FSDP2 waits for a backward pass with it


def final_figures(run: Run) -> Epoch:
    """What the record of a finished run holds."""
    history = run.progress.history
    violations = [e["largest_violation"] for e in history if e["largest_violation"] is not None]
    shares = [e["share_tau_above_1"] for e in history if e["share_tau_above_1"] is not None]
    return {
        **{name: history[-1][name] for name in ("train_loss", "train_accuracy", *HELD_OUT)},
        "largest_violation": max(violations, default=None),
        "share_tau_above_1": sum(shares) / len(shares) if shares else None,
        "skipped_steps": run.progress.skipped,
        "seconds": sum(e["seconds"] for e in history),
    }


def calibrated(run: Run) -> float | None:
    """The held-out loss after temperature scaling; None on many processes."""
    if processes.count() > 1:
        return None
    outputs, labels = (torch.cat(parts) for parts in zip(*predictions(run), strict=True))
    return measures.calibrated_loss(outputs, labels)


def is_finite(model: nn.Module) -> bool:
    """Whether all weights are finite; to be called on all processes at once."""
    bad = torch.stack([~torch.isfinite(here(weight)).all() for weight in model.parameters()])
    return not bool(processes.largest(bad.any().float()))


def bytes_of_state(model: nn.Module) -> int:
    """About how large a checkpoint is: weights, two moments and averages, buffers."""
    return sum(4 * weight.numel() * weight.element_size() for weight in model.parameters()) + 2**16


def chance(classes: int) -> Epoch:
    """The figures of a network that has learnt nothing: what a run that diverged is worth."""
    return {"test_loss": math.log(classes), "test_accuracy": 1 / classes}


def save_model(run: Run, path: Path) -> None:
    """Leave the weights of the trained network, with their plan, for ``torch.load``; all processes take part."""
    state = run.trained.state_dict()  # with the plan in its metadata, which a new dict would not have
    for name, value in state.items():
        state[name] = whole(value)
    if processes.is_first():
        buffer = io.BytesIO()
        torch.save(state, buffer)
        checkpoints.write(path, buffer.getvalue())
