"""How far weights leave their manifold in many steps, without ``stabilize``, beside Geoopt's.

    python examples/drift.py                                                   # 100,000 steps each, ten minutes
    python examples/drift.py --steps 2000 --figure drift.png

Every run fits weights to a noisy target by momentum SGD: once at the largest learning rate of a list at which the loss
still falls, and once at a small one, where a step changes little and rounding could add up. The figure shows the
largest relative violation of the constraint, measured in double precision: what rounding leaves after a step does not
add up where each step returns to the manifold itself.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import geoopt
import torch
from torch import Tensor

import fgo_geo

RATES = (100.0, 30.0, 10.0, 3.0, 1.0, 0.3, 0.1, 0.03)
SMALL_RATE = 0.01
NOISES = 97  # gradients that follow each other again and again
SHAPE = (16, 8, 4)  # a batch of matrices 8 x 4
Measure = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Run:
    """One line of the figure: a manifold under an optimiser, in one type."""

    label: str
    manifold: geoopt.Manifold
    violation: Measure
    dtype: torch.dtype
    ours: bool


def rows_to_columns(measure: Measure) -> Measure:
    """Geoopt has no oblique manifold; rows on a sphere are one."""
    return lambda x: measure(x.mT)


def runs() -> list[Run]:
    """The runs: every manifold in single precision and bfloat16, and Geoopt's counterparts."""
    sphere, oblique, stiefel = fgo_geo.ScaledSphere(ndim=2), fgo_geo.Oblique(), fgo_geo.Stiefel()
    made = [
        Run(f"{manifold.name}, {str(dtype)[6:]}", manifold, manifold.violation, dtype, ours=True)
        for dtype in (torch.float32, torch.bfloat16)
        for manifold in (sphere, oblique, stiefel)
    ]
    theirs = [
        Run("Geoopt: Sphere (rows)", geoopt.Sphere(), rows_to_columns(oblique.violation), torch.float32, ours=False),
        Run("Geoopt: EuclideanStiefel", geoopt.EuclideanStiefel(), stiefel.violation, torch.float32, ours=False),
        Run("Geoopt: CanonicalStiefel", geoopt.CanonicalStiefel(), stiefel.violation, torch.float32, ours=False),
    ]
    return made + theirs


def descend(run: Run, lr: float, steps: int, seed: int = 0) -> tuple[list[tuple[int, float]], float]:
    """Violations after 1, 2, 4, ... steps and at the end, and the loss, summed over the last half."""
    generator = torch.Generator().manual_seed(seed)
    start, target = torch.randn(2, *SHAPE, generator=generator)
    gradients = -(target + torch.randn(NOISES, *SHAPE, generator=generator)).to(run.dtype)
    weight = geoopt.ManifoldParameter(run.manifold.projx(start).to(run.dtype), manifold=run.manifold)
    kind = fgo_geo.RiemannianFGSGD if run.ours else geoopt.optim.RiemannianSGD
    optimizer = kind([weight], lr=lr, momentum=0.9)
    violations, losses = [], 0.0
    for step in range(1, steps + 1):
        weight.grad = gradients[step % NOISES]
        optimizer.step()
        if 2 * step > steps and step % 8 == 0:
            losses -= float((target * weight.detach().float()).mean())
        if step & (step - 1) == 0 or step == steps:
            violations.append((step, float(run.violation(weight.detach().double()).max())))
    return violations, losses


def largest_rate(run: Run, steps: int = 200) -> float:
    """The largest learning rate with which the loss falls to within a half of the best."""
    losses = {lr: descend(run, lr, steps)[1] for lr in RATES}
    best = min(losses.values())
    return next(lr for lr, loss in losses.items() if loss < best / 2)


def draw(results: dict[tuple[str, float], list[tuple[int, float]]], path: str) -> None:
    """The figure: violation against steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    for axes, small in zip(figure.subplots(1, 2, sharey=True), (False, True), strict=True):
        for (label, lr), violations in results.items():
            if (lr == SMALL_RATE) == small:
                style = "--" if label.startswith("Geoopt") else ":" if label.endswith("bfloat16") else "-"
                axes.loglog(*zip(*violations, strict=True), style, label=label)
        title = f"learning rate {SMALL_RATE}" if small else "largest learning rate"
        axes.set(xlabel="steps", ylabel="largest relative violation", title=title)
        axes.label_outer()
        axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Run all, print a table and draw the figure if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100_000, help="steps of every run")
    parser.add_argument("--figure", help="where to save the figure")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[tuple[str, float], list[tuple[int, float]]] = {}
    print(f"{'run':<28} {'lr':>6} {'largest violation':>18} {'at the end':>12}")
    for run in runs():
        for lr in (largest_rate(run), SMALL_RATE):
            violations, _ = descend(run, lr, options.steps)
            results[run.label, lr] = violations
            worst, last = max(v for _, v in violations), violations[-1][1]
            print(f"{run.label:<28} {lr:>6g} {worst:>18.1e} {last:>12.1e}", flush=True)
    if options.figure:
        draw(results, options.figure)


if __name__ == "__main__":
    main()
