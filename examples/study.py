"""Compare ways of training on the digits, each tuned alike, over many seeds.

    python examples/study.py strategies           # layer-wise, PI, PO, PIO and plain SGD
    python examples/study.py channel-directed     # SGD, AdamW, FG-SGD, each with and without
    python examples/study.py strategies --quick   # a look at the machinery, not a result

An *arm* is a set of flags of ``train.py`` with a list of choices to tune. Every arm gets the same number of tuning
runs: each choice is trained on four fifths of the training images and measured on the other fifth, with seeds that
are not used again; the best choice is then trained on all training images with every seed and measured once, on
the test images, after the last epoch. The table gives mean and standard deviation over the seeds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import flags
import reporting
import torch
import train
from rich.console import Console
from rich.progress import track
from rich.table import Table

FIRST_TUNING_SEED = 1000


@dataclass(frozen=True)
class Arm:
    """One way of training: fixed flags, and the choices that are tuned."""

    name: str
    fixed: tuple[str, ...]
    choices: tuple[tuple[str, ...], ...]


def lr_choices(*rates: float) -> tuple[tuple[str, ...], ...]:
    """Return one choice per learning rate."""
    return tuple(("--lr", str(rate)) for rate in rates)


def strategies() -> Iterator[Arm]:
    """Plain SGD, one manifold per layer, and the three collections of groups."""
    rates = lr_choices(0.03, 0.1, 0.3, 1.0)
    yield Arm("SGD", ("--optimizer", "sgd"), rates)
    for kind in ("sphere", "oblique", "stiefel"):
        yield Arm(f"layer, {kind}", ("--strategy", "layer", "--manifolds", kind), rates)
    for strategy in ("pi", "po", "pio"):
        yield Arm(strategy.upper(), ("--strategy", strategy), rates)


def channel_directed() -> Iterator[Arm]:
    """Three optimisers, without and with each metric along output and input channels; eight tuning runs each."""
    grids = {
        "sgd": (0.01, 0.02, 0.03, 0.06, 0.1, 0.2, 0.3, 0.6),
        "adamw": (0.0003, 0.0006, 0.001, 0.002, 0.003, 0.006, 0.01, 0.02),
        "fgsgd": (0.01, 0.02, 0.03, 0.06, 0.1, 0.2, 0.3, 0.6),
    }
    for optimizer, rates in grids.items():
        yield Arm(optimizer, ("--optimizer", optimizer), lr_choices(*rates))
        for metric, axis in itertools.product(("h0", "h1", "h1t"), ("output", "input")):
            fixed = ("--optimizer", optimizer, "--channel-directed", metric, "--channel-axis", axis)
            choices = tuple(
                ("--lr", str(rate), "--lam", str(lam)) for rate, lam in itertools.product(rates[1::2], (2.0, 10.0))
            )
            yield Arm(f"{optimizer}, {metric} along {axis}", fixed, choices)


def lam_relative() -> Iterator[Arm]:
    """H1~ with one λ for all layers, and with λ in proportion to the square of each layer's width."""
    for optimizer in ("sgd", "fgsgd"):
        fixed = ("--optimizer", optimizer, "--channel-directed", "h1t")
        for name, flag, lams in (("one λ", (), (2.0, 10.0)), ("relative λ", ("--lam-relative",), (1.0, 4.0))):
            choices = tuple(
                ("--lr", str(lr), "--lam", str(lam)) for lr, lam in itertools.product((0.02, 0.06, 0.2, 0.6), lams)
            )
            yield Arm(f"{optimizer}, h1t, {name}", (*fixed, *flag), choices)


STUDIES = {"strategies": strategies, "channel-directed": channel_directed, "lam-relative": lam_relative}


def one_run(arguments: Sequence[str]) -> dict[str, Any]:
    """Train once, in silence; return the figures of the last epoch and the share of steps with tau > 1."""
    torch.set_num_threads(1)
    settings, _ = flags.parse(list(arguments))
    run = train.build(settings)
    shares = []
    for epoch in range(1, settings.epochs + 1):
        figures = train.train_epoch(run, epoch, reporting.Display())
        shares.append(figures["share_tau_above_1"])
        run.scheduler.step()
    figures |= train.evaluate(run)
    figures["share_tau_above_1"] = None if shares[0] is None else statistics.fmean(shares)
    return figures


def study(arms: Sequence[Arm], common: Sequence[str], seeds: int, tuning_seeds: int, jobs: int) -> list[dict[str, Any]]:
    """Tune every arm, then measure it; return one record per arm."""
    tuning = [
        (arm, choice, (*common, *arm.fixed, *choice, "--validation", "--seed", str(FIRST_TUNING_SEED + seed)))
        for arm in arms
        for choice in arm.choices
        for seed in range(tuning_seeds)
    ]
    # Processes, one thread each: the runs are small, and their results do not depend on how many run at once.
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        scores: dict[tuple[Arm, tuple[str, ...]], list[float]] = {}
        results = pool.map(one_run, [arguments for *_, arguments in tuning])
        for (arm, choice, _), result in zip(tuning, track(results, "tuning", len(tuning)), strict=True):
            scores.setdefault((arm, choice), []).append(result["test_accuracy"])
        best = {arm: max(arm.choices, key=lambda c: statistics.fmean(scores[arm, c])) for arm in arms}
        final = [(arm, (*common, *arm.fixed, *best[arm], "--seed", str(s))) for arm in arms for s in range(seeds)]
        runs: dict[Arm, list[dict[str, Any]]] = {}
        results = pool.map(one_run, [arguments for _, arguments in final])
        for (arm, _), result in zip(final, track(results, "measuring", len(final)), strict=True):
            runs.setdefault(arm, []).append(result)
    return [record(arm, best[arm], runs[arm]) for arm in arms]


def record(arm: Arm, choice: tuple[str, ...], runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Sum up the runs of an arm."""
    accuracies = [run["test_accuracy"] for run in runs]
    shares = [run["share_tau_above_1"] for run in runs]
    return {
        "arm": arm.name,
        "flags": " ".join(arm.fixed),
        "chosen": " ".join(choice),
        "mean_accuracy": statistics.fmean(accuracies),
        "standard_deviation": statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0,
        "accuracies": accuracies,
        "mean_test_loss": statistics.fmean(run["test_loss"] for run in runs),
        "share_tau_above_1": None if shares[0] is None else statistics.fmean(shares),
    }


def table(records: Sequence[dict[str, Any]], seeds: int) -> Table:
    """Lay out the records for people."""
    grid = Table("training", "chosen", f"test accuracy, % ({seeds} seeds)", "test loss", "steps with tau > 1")
    for r in records:
        share = "-" if r["share_tau_above_1"] is None else f"{100 * r['share_tau_above_1']:.1f} %"
        accuracy = f"{100 * r['mean_accuracy']:.2f} ± {100 * r['standard_deviation']:.2f}"
        grid.add_row(r["arm"], r["chosen"], accuracy, f"{r['mean_test_loss']:.4f}", share)
    return grid


def main() -> None:
    """Run a study, print its table and write its records."""
    parser = argparse.ArgumentParser(
        description="Compare ways of training on the digits.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--seeds", type=int, default=10, help="runs per arm on the test images")
    parser.add_argument("--tuning-seeds", type=int, default=2, help="runs per choice on the validation images")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--only", help="only the arms whose name contains this")
    parser.add_argument("--quick", action="store_true", help="one epoch, two seeds, two choices: no result")
    parser.add_argument("--output", type=Path, help="JSON file (runs/study-STUDY.json)")
    settings = parser.parse_args()
    arms = [arm for arm in STUDIES[settings.study]() if not settings.only or settings.only in arm.name]
    if not arms:
        parser.error(f"--only {settings.only!r} matches no arm")
    if settings.quick:
        settings.epochs, settings.seeds, settings.tuning_seeds = 1, 2, 1
        arms = [Arm(arm.name, arm.fixed, arm.choices[:2]) for arm in arms]
    common = ("--epochs", str(settings.epochs), "--device", "cpu")
    records = study(arms, common, settings.seeds, settings.tuning_seeds, settings.jobs)
    output = settings.output or Path(f"runs/study-{settings.study}.json")
    output.parent.mkdir(parents=True, exist_ok=True)
    reporting.write_results(output, settings=json.loads(json.dumps(vars(settings), default=str)), arms=records)
    Console(width=140).print(table(records, settings.seeds))


if __name__ == "__main__":
    main()
