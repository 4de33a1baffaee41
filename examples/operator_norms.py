"""How tight the certified bound of a convolution's operator norm is, over random weights.

    python examples/operator_norms.py                                   # a minute on one CPU core
    python examples/operator_norms.py --cases 16x7 --seeds 20

For Gaussian 3 x 3 kernels with zero padding 1 the program divides ``fgo_geo.norms.conv_operator_norm_bound`` by the
exact norm, the largest singular value of the dense matrix of the operator, for a growing number of Gram iterations. The
last column is the norm on the torus that the bound replaces the zero padding by: what no number of iterations improves.
"""

from __future__ import annotations

import argparse
import statistics

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import conv2d

from fgo_geo.norms import conv_operator_norm_bound, conv_operator_norm_circular

ITERATIONS = range(7)


def exact_norm(weight: Tensor, size: int) -> float:
    """The largest singular value of the operator's matrix, whose rows are the images of the basis vectors."""
    count = weight.shape[1] * size**2
    basis = torch.eye(count, dtype=weight.dtype).reshape(count, weight.shape[1], size, size)
    matrix = conv2d(basis, weight, padding=1).flatten(1)
    return float(torch.linalg.eigvalsh(matrix @ matrix.T)[-1].sqrt())


def ratios(channels: int, size: int, seed: int) -> list[float]:
    """Bound over exact norm for every number of iterations, and the norm on the torus over the exact one."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(channels, channels, 3, 3, dtype=torch.float64, generator=generator)
    exact = exact_norm(weight, size)
    bounds = [conv_operator_norm_bound(weight, (size, size), padding=1, iterations=t) for t in ITERATIONS]
    torus = conv_operator_norm_circular(weight, (size + 1, size + 1))  # no tap wraps round from inside to inside
    return [float(norm) / exact for norm in (*bounds, torus)]


def case(text: str) -> tuple[int, int]:
    try:
        channels, size = map(int, text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected CHANNELSxSIZE, e.g. 16x7, got {text!r}") from None
    if min(channels, size) < 1:
        raise argparse.ArgumentTypeError(f"expected at least one channel and one position, got {text!r}")
    return channels, size


def main(arguments: list[str] | None = None) -> None:
    """Print the table as the command line says."""
    parser = argparse.ArgumentParser(description="Tightness of the certified bound. Defaults are in parentheses.")
    cases = [(16, 7), (16, 14), (32, 7)]
    metavar = "CHANNELSxSIZE"
    parser.add_argument("--cases", type=case, nargs="+", default=cases, metavar=metavar, help="(16x7 16x14 32x7)")
    parser.add_argument("--seeds", type=int, default=10, help="random weights per case (%(default)s)")
    settings = parser.parse_args(arguments)
    if settings.seeds < 2:
        parser.error("--seeds: a standard deviation needs two or more")
    title = f"bound over exact norm, mean ± standard deviation over {settings.seeds} seeds"
    headers = ["channels, input", *(f"t = {t}" for t in ITERATIONS), "torus alone"]
    table = Table(*headers, title=title, title_justify="left", box=box.SIMPLE)
    for channels, size in settings.cases:
        columns = zip(*(ratios(channels, size, seed) for seed in range(settings.seeds)), strict=True)
        cells = [f"{statistics.mean(column):.3f} ± {statistics.stdev(column):.3f}" for column in columns]
        table.add_row(f"{channels}, {size} x {size}", *cells)
    console = Console(highlight=False)
    (console if console.is_terminal else Console(highlight=False, width=160)).print(table)


if __name__ == "__main__":
    main()
