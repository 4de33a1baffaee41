"""Recompute Table 2 of the FG-SGD paper: the norms of random points on three manifolds, beside the bounds.

    python examples/table2.py
    python examples/table2.py --sizes 3x3 7x7 --points 100000

For every size A x B the program draws uniformly random points of radius 1 and prints the mean and the largest of their
Frobenius, spectral and 2→1 norms, the bound that follows from the definition of the norms
(``fgo_geo.norms.manifold_norm_bounds``), and the paper's entry. The last column compares the entry with the points:
"equal" means that every point has this norm, "exceeded" that some point has a larger one. σ stands for the largest
singular value of the point itself, which is its spectral norm. The row of the 2→1 norm contradicts its definition.
"""

from __future__ import annotations

import argparse

import torch
from rich import box
from rich.console import Console
from rich.table import Table

import fgo_geo
from fgo_geo.norms import manifold_norm_bounds, matrix_norms

MANIFOLDS = {"sphere": fgo_geo.ScaledSphere(ndim=2), "oblique": fgo_geo.Oblique(), "stiefel": fgo_geo.Stiefel()}
NORMS = {"frobenius": "‖w‖F", "spectral": "‖w‖2", "two_to_one": "‖w‖2→1"}
PAPER = {  # Table 2 as printed
    "frobenius": {"sphere": "1", "oblique": "√B", "stiefel": "√B"},
    "spectral": {"sphere": "σ", "oblique": "σ", "stiefel": "1"},
    "two_to_one": {"sphere": "1", "oblique": "B^¼", "stiefel": "B^¼"},
}


def compared(entry: str, columns: int, values: torch.Tensor) -> tuple[str, str]:
    """An entry of the paper with its value, and what it is to the norms of the points."""
    if entry == "σ":
        return "σ", "its definition"
    value = {"1": 1.0, "√B": columns**0.5, "B^¼": columns**0.25}[entry]
    excess = (values / value - 1).abs().max(), (values / value - 1).max()
    verdict = "equal" if excess[0] < 1e-9 else "exceeded" if excess[1] > 0 else "holds"
    return entry if entry == "1" else f"{entry} = {value:.3f}", verdict


def table_of(rows: int, columns: int, points: int) -> Table:
    """The three norms of random points ``rows x columns`` on every manifold."""
    title = f"A x B = {rows} x {columns}, {points:,} random points"
    table = Table(title=title, title_justify="left", box=box.SIMPLE)
    for header in ("norm", "manifold", "mean", "largest", "bound", "paper", ""):
        table.add_column(header, justify="left" if header in ("norm", "manifold", "") else "right")
    for norm, symbol in NORMS.items():
        for kind, manifold in MANIFOLDS.items():
            values = getattr(matrix_norms(manifold.random(points, rows, columns, dtype=torch.float64)), norm)
            bound = float(getattr(manifold_norm_bounds(kind, rows, columns), norm))
            cells = [symbol, kind, f"{values.mean():.3f}", f"{values.max():.3f}", f"{bound:.3f}"]
            table.add_row(*cells, *compared(PAPER[norm][kind], columns, values))
    return table


def contradictions() -> str:
    """The two counterexamples to the paper's last row, computed."""
    identity = matrix_norms(torch.eye(3, dtype=torch.float64))
    point = MANIFOLDS["sphere"].random(10_000, 5, 3, dtype=torch.float64)
    mean = matrix_norms(point).two_to_one.mean()
    return (
        "The paper's row of ‖w‖2→1 contradicts its own definition, the sum of the norms of the rows, twice:\n"
        f"1. The 3 x 3 identity is on the oblique and the Stiefel manifold. Its rows have norm 1, so ‖w‖2→1 = "
        f"{identity.two_to_one:.0f}; the paper has B^¼ = {3**0.25:.3f}.\n"
        "2. Matrices of Frobenius norm 1 have ‖w‖2→1 >= 1, with equality only if one row holds everything. "
        f"The mean of random 5 x 3 matrices is {mean:.2f}; the paper has 1.\n"
        "By the definition ‖w‖2→1 <= √A ‖w‖F: √A on the sphere, √(AB) on the other two."
    )


def size(text: str) -> tuple[int, int]:
    try:
        rows, columns = map(int, text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected AxB, e.g. 5x3, got {text!r}") from None
    if not rows >= columns >= 1 or rows == 1:
        raise argparse.ArgumentTypeError(f"expected A >= B >= 1 and A > 1, got {text!r}")
    return rows, columns


def main(arguments: list[str] | None = None) -> None:
    """Print the tables as the command line says."""
    parser = argparse.ArgumentParser(description="Recompute Table 2 of the FG-SGD paper. Defaults are in parentheses.")
    sizes = [(3, 3), (5, 3)]
    parser.add_argument("--sizes", type=size, nargs="+", default=sizes, metavar="AxB", help="component sizes (3x3 5x3)")
    parser.add_argument("--points", type=int, default=10_000, help="random points per manifold (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the points (%(default)s)")
    settings = parser.parse_args(arguments)
    torch.manual_seed(settings.seed)
    console = Console(highlight=False)
    for rows, columns in settings.sizes:
        console.print(table_of(rows, columns, settings.points))
    console.print(contradictions(), soft_wrap=True)


if __name__ == "__main__":
    main()
