"""How fast do loss and gradient fall on problems that can be solved exactly? Corollary 1 of the paper, measured.

    python examples/convergence.py                                     # all problems: CSV, table and figure
    python examples/convergence.py --problems deep-linear --steps 500 --seeds 1

A teacher network with weights on manifolds labels Gaussian inputs, and a student of the same architecture, with
weights on the same manifolds, learns from fresh batches: zero loss is attainable. Learning rates fall as Robbins and
Monro ask. Four methods: FG-SGD with τ from the batch at hand (eq. 7), with τ from earlier batches, with constant
steps, and Geoopt's RiemannianSGD. Loss and norm of the Riemannian gradient are measured on inputs of their own, and
the slopes of log(loss) and log(norm) over log(step) are fitted to the second half of the steps (in log time).

Square Stiefel matrices have determinant 1 or -1 and keep it. Two problems show what that means: where the student
starts with the wrong sign, no step on the manifold reaches the teacher.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import fgo_geo  # isort: skip  (before Geoopt, which warns if it is imported alone)
import geoopt
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

LEAK = 0.2
MEASURED_INPUTS = 2048
MEASUREMENTS = 40


@dataclass(frozen=True)
class Problem:
    """A teacher and a student: how they are built, and the inputs that they see.

    Attributes:
        build: Makes the network, unconstrained.
        shape: Shape of one input.
        manifold: Of all weights, whole matrices; kernels for convolutions.
        determinant: Of the products of square weights: ``"same"`` as the teacher's, ``"other"``, or as drawn.
        lr: First learning rate.
    """

    build: Callable[[], nn.Sequential]
    shape: tuple[int, ...]
    manifold: str
    determinant: str = "drawn"
    lr: float = 0.1


def dense(widths: Sequence[int], activation: Callable[[], nn.Module]) -> nn.Sequential:
    """Linear layers with an activation between each two."""
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [activation(), nn.Linear(inputs, outputs, bias=False)]
    return nn.Sequential(*layers[1:])


def leaky() -> nn.Module:
    return nn.LeakyReLU(LEAK)


def one_hidden_layer() -> nn.Sequential:
    """Four 3 x 3 kernels on disjoint patches, ReLU, and the mean over the patches of each."""
    return nn.Sequential(nn.Conv2d(1, 4, 3, stride=3, bias=False), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


PROBLEMS = {
    "deep-linear": Problem(lambda: dense((8, 16, 16, 8), nn.Identity), (8,), "stiefel"),
    "deep-linear-oblique": Problem(lambda: dense((8, 16, 16, 8), nn.Identity), (8,), "oblique"),
    "cnn-sphere": Problem(one_hidden_layer, (1, 9, 9), "sphere", lr=1.0),
    "leaky-relu": Problem(lambda: nn.Sequential(*dense((16, 8), leaky), leaky()), (16,), "stiefel"),
    "pyramidal": Problem(lambda: dense((16, 12, 8, 4), leaky), (16,), "stiefel"),
    "same-determinant": Problem(lambda: dense((8, 8, 8), nn.Identity), (8,), "stiefel", "same"),
    "wrong-determinant": Problem(lambda: dense((8, 8, 8), nn.Identity), (8,), "stiefel", "other"),
    "cnn-same-determinant": Problem(one_hidden_layer, (1, 9, 9), "stiefel", "same", lr=1.0),
    "cnn-wrong-determinant": Problem(one_hidden_layer, (1, 9, 9), "stiefel", "other", lr=1.0),
}

METHODS: dict[str, Callable[[nn.Module, float], torch.optim.Optimizer]] = {
    "eq. 7, batch": lambda net, lr: fgo_geo.RiemannianFGSGD(net.parameters(), lr),
    "eq. 7, running": lambda net, lr: fgo_geo.RiemannianFGSGD(net.parameters(), lr, norm="running"),
    "constant": lambda net, lr: fgo_geo.RiemannianFGSGD(net.parameters(), lr, step_size="constant"),
    "Geoopt": lambda net, lr: geoopt.optim.RiemannianSGD(net.parameters(), lr),
}


def network(problem: Problem, seed: int) -> nn.Sequential:
    """A network with random weights on the manifold of the problem, of radius one."""
    torch.manual_seed(seed)
    net = problem.build()
    everything = {"first_layer": True, "classifier": True, "radius": "unit", "initial": "uniform"}
    fgo_geo.constrain(net, "layer", problem.manifold, seed=seed, **everything)
    return net


def teacher_and_student(problem: Problem, seed: int) -> tuple[nn.Sequential, nn.Sequential]:
    """Two networks, with the signs of their determinants as the problem says."""
    teacher, student = network(problem, 2 * seed), network(problem, 2 * seed + 1)
    if problem.determinant != "drawn":
        with torch.no_grad():
            theirs, ours = sign(teacher), sign(student)
            wanted = theirs if problem.determinant == "same" else -theirs
            first = next(student.parameters())
            # to change the sign of one column is to step over to the other component of the manifold
            first[..., 0] *= (wanted / ours).reshape(*first.shape[:-2], 1) if first.ndim > 2 else wanted / ours
    return teacher, student


def sign(net: nn.Sequential) -> Tensor:
    """Signs of the determinants: of every kernel of the convolution, or of the product of the matrices."""
    weights = [weight.detach() for weight in net.parameters()]
    if weights[0].ndim == 4:
        return torch.linalg.det(weights[0]).sign()
    product = weights[0]
    for weight in weights[1:]:
        product = weight @ product
    return torch.linalg.det(product).sign()


def loss_of(student: nn.Module, teacher: nn.Module, inputs: Tensor) -> Tensor:
    """Half the mean squared distance of the outputs."""
    with torch.no_grad():
        wanted = teacher(inputs)
    return 0.5 * (student(inputs) - wanted).square().sum(1).mean()


def gradient_norm(student: nn.Module) -> float:
    """Norm of the Riemannian gradient of all weights."""
    parts = [w.manifold.proju(w.detach(), w.grad) for w in student.parameters()]  # pyright: ignore
    return math.sqrt(sum(float(part.square().sum()) for part in parts))


def train(problem: Problem, method: str, seed: int, steps: int, batch: int) -> list[dict[str, float]]:
    """Train a student; return step, loss and norm of the gradient at moments that are equally far apart in log time."""
    teacher, student = teacher_and_student(problem, seed)
    generator = torch.Generator().manual_seed(seed)
    held_out = torch.randn(MEASURED_INPUTS, *problem.shape, generator=generator)
    optimizer = METHODS[method](student, problem.lr)
    schedule = fgo_geo.optim.RobbinsMonroLR(optimizer, time_constant=steps / 10)
    moments = {round(steps ** (n / MEASUREMENTS)) for n in range(MEASUREMENTS + 1)}
    measured = []
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        loss_of(student, teacher, torch.randn(batch, *problem.shape, generator=generator)).backward()
        optimizer.step()
        schedule.step()
        if step in moments:
            optimizer.zero_grad()
            loss = loss_of(student, teacher, held_out)
            loss.backward()
            measured.append({"step": step, "loss": loss.item(), "gradient": gradient_norm(student)})
    return measured


def slope(measured: Sequence[dict[str, float]], name: str) -> float:
    """Slope of the logarithm over that of the step, by least squares over the second half of the measurements."""
    half = measured[len(measured) // 2 :]
    points = [(math.log(m["step"]), math.log(m[name])) for m in half if m[name] > 0]
    return statistics.linear_regression(*zip(*points, strict=True)).slope if len(points) > 1 else math.nan


def draw(path: Path, curves: dict[tuple[str, str], list[list[dict[str, float]]]]) -> None:
    """Draw the median loss of every method over the steps, a panel per problem."""
    from matplotlib.figure import Figure  # pyright: ignore

    problems = list(dict.fromkeys(problem for problem, _ in curves))
    columns = min(3, len(problems))
    rows = math.ceil(len(problems) / columns)
    figure = Figure(figsize=(3.6 * columns, 2.7 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True).flat
    for axes, problem in zip(panels, problems, strict=False):
        for number, method in enumerate(METHODS):
            runs = curves.get((problem, method), [])
            if runs:
                medians = [statistics.median(m["loss"] for m in at) for at in zip(*runs, strict=True)]
                line = ("-", "--", ":", "-.")[number]
                axes.loglog([m["step"] for m in runs[0]], medians, line, label=method)
        axes.set_title(problem, fontsize="small")
        axes.grid(alpha=0.3)
    figure.axes[0].legend(fontsize="x-small")
    figure.supxlabel("step")
    figure.supylabel("loss, median over seeds")
    figure.savefig(path, dpi=110)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Convergence on realisable problems. Defaults are in parentheses.")
    parser.add_argument(
        "--problems",
        nargs="+",
        choices=PROBLEMS,
        default=list(PROBLEMS),
        metavar="NAME",
        help=f"{', '.join(PROBLEMS)} (all)",
    )
    parser.add_argument("--steps", type=int, default=3000, help="(%(default)s)")
    parser.add_argument("--batch", type=int, default=32, help="inputs per step (%(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="(%(default)s)")
    parser.add_argument("--output", type=Path, default=Path("runs/convergence"), help="folder (%(default)s)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Train all students, print a table, leave CSV and figure; return the exit status."""
    settings = parse(arguments)
    torch.set_num_threads(1)
    settings.output.mkdir(parents=True, exist_ok=True)
    curves: dict[tuple[str, str], list[list[dict[str, float]]]] = {}
    rows = []
    table = Table("problem", "method", "loss", "slope", "gradient", "slope ", "loss < 1e-4")
    for name, method in itertools.product(settings.problems, METHODS):
        runs = [train(PROBLEMS[name], method, s, settings.steps, settings.batch) for s in range(settings.seeds)]
        curves[name, method] = runs
        rows += [
            {"problem": name, "method": method, "seed": seed, "slope_loss": slope(run, "loss")}
            | {"slope_gradient": slope(run, "gradient")}
            | {key: f"{value:.4g}" for key, value in run[-1].items()}
            for seed, run in enumerate(runs)
        ]
        last = [run[-1] for run in runs]
        table.add_row(
            name,
            method,
            f"{statistics.median(m['loss'] for m in last):.1e}",
            f"{statistics.median(slope(run, 'loss') for run in runs):.2f}",
            f"{statistics.median(m['gradient'] for m in last):.1e}",
            f"{statistics.median(slope(run, 'gradient') for run in runs):.2f}",
            f"{sum(m['loss'] < 1e-4 for m in last)}/{len(last)}",
        )
    with (settings.output / "convergence.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    draw(settings.output / "convergence.png", curves)
    Console(soft_wrap=True).print(table)
    print(f"Files in {settings.output}: convergence.csv, convergence.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
