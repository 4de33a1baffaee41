"""How far weights leave their manifold in many steps, without ``stabilize``, beside Geoopt's.

    python examples/drift.py --data docs/_static/drift.csv --figure docs/_static/drift.png    # half an hour of one core
    python examples/drift.py --steps 2000 --figure drift.png                                  # a minute

A run minimises a quadratic function of a batch of weights from noisy gradients, by momentum SGD. Most runs are made
twice: at the largest learning rate of a list that still brings the loss at least half as far down as the best one, and
at a small one, where a step changes little and rounding could add up. Every hundredth step the relative violation of
the constraint is measured in double precision. The figure shows the largest one since the mark before: what rounding
leaves behind does not add up where each step returns to the manifold itself.

Half-precision weights are stepped as a copy in single precision, which is the copy that is measured.

With ``--data``, runs that the file holds are not made again, so that a run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import csv
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import fgo_geo  # isort: skip  (before Geoopt, which warns if it is imported alone)
import geoopt
import torch
from torch import Tensor

from fgo_geo import Ball, Oblique, ProductOfGroups, ScaledSphere, SpectralBall, SpectralSphere, Stiefel

RATES = (100.0, 30.0, 10.0, 3.0, 1.0, 0.3, 0.1)
SMALL_RATE = 0.01
NOISES = 97  # gradients' noise, which comes again and again
TRIAL = 1000  # steps with which a learning rate is tried
EVERY = 100  # steps between two measurements
MATRICES = (16, 8, 4)  # a batch of matrices 8 x 4
Measure = Callable[[Tensor], Tensor]
Curve = list[tuple[int, float]]


@dataclass(frozen=True)
class Run:
    """One line of the figure: weights on a manifold, in one type, under one optimiser."""

    label: str
    manifold: geoopt.Manifold
    violation: Measure
    shape: tuple[int, ...] = MATRICES
    dtype: torch.dtype = torch.float32
    update: str = "retraction"
    ours: bool = True

    @property
    def panel(self) -> str:
        """Where the figure shows it."""
        return "Geoopt" if not self.ours else self.update if self.dtype == torch.float32 else str(self.dtype)[6:]

    @property
    def sizes(self) -> tuple[str, ...]:
        """Which learning rates it is run at; half precision is stepped in single precision, so one says enough."""
        return ("largest", "small") if self.dtype == torch.float32 else ("largest",)


def rows_to_columns(measure: Measure) -> Measure:
    """Geoopt has no oblique manifold; rows on a sphere are one."""
    return lambda x: measure(x.mT)


def ours(dtype: torch.dtype = torch.float32, update: str = "retraction") -> list[Run]:
    """Every manifold of this package."""
    made: list[tuple[str, fgo_geo.manifolds.EmbeddedManifold, tuple[int, ...]]] = [
        ("sphere", ScaledSphere(ndim=2), MATRICES),
        ("oblique", Oblique(), MATRICES),
        ("Stiefel", Stiefel(), MATRICES),
    ]
    if update == "retraction":  # balls have no geodesics, and products those of their components
        kinds = ("sphere", "oblique", "stiefel")
        kernels = ProductOfGroups(fgo_geo.collection(8, 6, "pio", kinds), (8, 6, 3, 3))
        blocks = ProductOfGroups(fgo_geo.collection(24, 32, "pio", kinds, components="block"), (24, 32))
        made += [
            ("product of kernels", kernels, (8, 6, 3, 3)),
            ("product of blocks", blocks, (24, 32)),
            ("ball", Ball(ndim=2), MATRICES),
            ("spectral ball", SpectralBall(), MATRICES),
            ("spectral sphere", SpectralSphere(), MATRICES),
        ]
    if update == "retraction" and dtype == torch.float32:
        made.append(("large Stiefel", Stiefel(), (192, 128)))
    return [Run(name, m, m.violation, shape, dtype, update) for name, m, shape in made]


def runs() -> list[Run]:
    """The runs: every manifold in single precision and bfloat16, along geodesics, and Geoopt's counterparts."""
    columns, orthogonality = rows_to_columns(Oblique().violation), Stiefel().violation
    theirs: list[tuple[geoopt.Manifold, Measure]] = [
        (geoopt.Sphere(), columns),
        (geoopt.SphereExact(), columns),
        (geoopt.EuclideanStiefel(), orthogonality),
        (geoopt.EuclideanStiefelExact(), orthogonality),
        (geoopt.CanonicalStiefel(), orthogonality),
    ]
    return [
        *(Run(type(manifold).__name__, manifold, measure, ours=False) for manifold, measure in theirs),
        *ours(),
        *ours(torch.bfloat16),
        *ours(update="exponential"),
    ]


def descend(run: Run, lr: float, steps: int, seed: int = 0) -> tuple[Curve, float]:
    """The largest violations up to the steps 1, 2, 4, ... and the last one, and the mean loss of the last half.

    The loss is the weighted squared distance to a point of the manifold, relative to that of the start.
    """
    generator = torch.Generator().manual_seed(seed)
    start, target = (run.manifold.projx(torch.randn(run.shape, generator=generator)) for _ in range(2))
    weighting = 10 ** -torch.rand(run.shape, generator=generator)
    noise = 0.1 * torch.randn(NOISES, *run.shape, generator=generator)
    first = float((weighting * (start - target) ** 2).sum())
    weight = geoopt.ManifoldParameter(start.to(run.dtype), manifold=run.manifold)
    if run.ours:
        optimizer = fgo_geo.RiemannianFGSGD([weight], lr=lr, momentum=0.9, update=run.update)
    else:
        optimizer = geoopt.optim.RiemannianSGD([weight], lr=lr, momentum=0.9)
    worst, curve, losses = 0.0, [], []
    for step in range(1, steps + 1):
        difference = weight.detach().float() - target
        weight.grad = torch.addcmul(noise[step % NOISES], weighting, difference).to(run.dtype)
        optimizer.step()
        marked = step & (step - 1) == 0 or step == steps
        if marked or step % EVERY == 0:
            point = optimizer.state[weight].get("master", weight.detach())
            violation = float(run.violation(point.double()).max())
            worst = max(worst, math.inf if math.isnan(violation) else violation)
        if marked:
            curve.append((step, worst))
            worst = 0.0
        if 2 * step > steps and step % 8 == 0:
            losses.append(float((weighting * difference**2).sum()) / first)
    return curve, sum(losses) / max(1, len(losses))


def largest_rate(run: Run, steps: int = TRIAL) -> float:
    """The largest learning rate that brings the loss at least half as far down as the best one."""
    gains = {lr: 1 - descend(run, lr, steps)[1] for lr in RATES}
    best = max(gain for gain in gains.values() if gain == gain)  # without those that are not a number
    return next(lr for lr, gain in gains.items() if gain >= best / 2)


def draw(rows: list[dict[str, str]], path: str) -> None:
    """The figure: violation against steps; a column per kind of run, a row per learning rate."""
    from matplotlib.figure import Figure

    panels = list(dict.fromkeys(row["panel"] for row in rows))
    figure = Figure(figsize=(3.2 * len(panels), 6.4), layout="constrained")
    grid = figure.subplots(2, len(panels), sharex=True, sharey=True, squeeze=False)
    labels = list(dict.fromkeys(row["label"] for row in rows))
    for line, size in enumerate(("largest", "small")):
        for axes, panel in zip(grid[line], panels, strict=True):
            for label in labels:
                own = [row for row in rows if (row["label"], row["panel"], row["size"]) == (label, panel, size)]
                if own:
                    points = [(int(row["step"]), max(1e-9, float(row["violation"]))) for row in own]
                    colour = f"C{labels.index(label) % 10}"
                    axes.loglog(*zip(*points, strict=True), color=colour, label=f"{label}, {float(own[0]['lr']):g}")
            if not axes.lines:
                axes.set_axis_off()
                continue
            axes.axhline(1e-5, color="0.4", linewidth=0.8, linestyle=":")
            axes.set(title=f"{panel}, {size} learning rate")
            axes.title.set_fontsize(9)
            axes.legend(fontsize=6)
            axes.grid(alpha=0.3)
    figure.supxlabel("steps", fontsize=9)
    figure.supylabel("largest relative violation", fontsize=9)
    figure.savefig(path, dpi=150)


FIELDS = ("panel", "label", "size", "lr", "step", "violation")


def read(data: Path | None) -> list[dict[str, str]]:
    """The runs that were made before."""
    if data is None or not data.is_file():
        return []
    with data.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write(data: Path, rows: list[dict[str, str]]) -> None:
    """All rows, by way of another file, so that none is lost if the program is stopped."""
    whole = data.with_suffix(".part")
    with whole.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, FIELDS, lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
    whole.replace(data)


def main() -> None:
    """Make the runs, print a table, and draw the figure if asked to."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=100_000, help="steps of every run")
    parser.add_argument("--data", type=Path, help="table of what was measured; runs that it holds are not made again")
    parser.add_argument("--figure", help="where to save the figure")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = read(options.data)
    print(f"{'':<12} {'run':<22} {'learning rate':>14} {'largest violation':>18} {'at the end':>12}")
    for run, size in ((run, size) for size in ("largest", "small") for run in runs() if size in run.sizes):
        own = [row for row in rows if (row["panel"], row["label"], row["size"]) == (run.panel, run.label, size)]
        if not own:
            lr = SMALL_RATE if size == "small" else largest_rate(run)
            what = {"panel": run.panel, "label": run.label, "size": size, "lr": f"{lr:g}"}
            curve, _ = descend(run, lr, options.steps)
            own = [{**what, "step": str(step), "violation": f"{violation:.3g}"} for step, violation in curve]
            rows += own
            if options.data is not None:
                write(options.data, rows)
        worst, last = max(float(row["violation"]) for row in own), float(own[-1]["violation"])
        print(f"{run.panel:<12} {run.label:<22} {own[0]['lr']:>14} {worst:>18.1e} {last:>12.1e}", flush=True)
    if options.figure:
        draw(rows, options.figure)


if __name__ == "__main__":
    main()
