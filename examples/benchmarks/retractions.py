"""Accuracy against cost of the ways back to the Stiefel manifold, by shape and by length of the step.

    python examples/benchmarks/retractions.py                                 # three shapes, a few minutes
    python examples/benchmarks/retractions.py --shapes 512x256 16384x3x3 --lengths 0.1 1 --json retractions.json

A tangent vector of the given Frobenius length leads from an orthonormal matrix; sides before the last two count a
batch. *Error* is the distance to what the method stands for, the polar factor or the QR factor with positive diagonal,
computed by a factorisation in double precision and relative to the length √p of a point; *off by* is the largest entry
of ``|qᵀq - I|``. Times are compared with one product of an n x p and a p x p matrix, in the same round.
Factorisations cost the same whatever the step, so they have a row for the longest one only.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from fgo_geo import Stiefel  # isort: skip  (before Geoopt, which warns if it is imported alone)
import geoopt
import timing
import torch
from timing import Columns
from torch import Tensor

SHAPES = ("576x64", "2048x512", "16384x3x3")
PRODUCT = "one product, n x p by p x p"
COLUMNS: Columns = {
    "method": lambda row: row["name"],
    "step": lambda row: "" if row["length"] is None else f"{row['length']:g}",
    **timing.TIMES,
    "error": lambda row: "" if row["error"] is None else f"{row['error']:.0e}",
    "off by": lambda row: "" if row["violation"] is None else f"{row['violation']:.0e}",
}
Method = Callable[[Tensor, Tensor], Tensor]


def svd(x: Tensor, u: Tensor) -> Tensor:
    """The polar factor by a singular value decomposition."""
    left, _, right = torch.linalg.svd(x + u, full_matrices=False)
    return left @ right


def qr(x: Tensor, u: Tensor) -> Tensor:
    """The QR factor with positive diagonal, by Householder's reflections."""
    q, r = torch.linalg.qr(x + u)
    return q * torch.where(r.diagonal(dim1=-2, dim2=-1) < 0, -1, 1)[..., None, :].to(q.dtype)


def cholesky_qr(x: Tensor, u: Tensor) -> Tensor:
    """The same factor from the Cholesky factor of the Gram matrix."""
    y = x + u
    factor = torch.linalg.cholesky(y.mT @ y)
    return torch.linalg.solve_triangular(factor.mT, y, upper=True, left=False)


FACTORISATIONS: dict[str, tuple[Method, Method]] = {
    "polar, SVD": (svd, svd),
    "polar, fgo_geo retr": (Stiefel().retr, svd),
    "QR, fgo_geo retr": (Stiefel(retraction="qr").retr, qr),
    "QR, Geoopt": (geoopt.EuclideanStiefel().retr, qr),
}


def tangent(shape: tuple[int, ...], length: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """A random point and a tangent vector there of the given length, in double precision."""
    x = torch.linalg.qr(torch.randn(shape, dtype=torch.float64, device=device))[0]
    u = torch.randn_like(x)
    along = x.mT @ u
    u = u - x @ (along + along.mT) / 2
    return x, u * (length / torch.linalg.matrix_norm(u, keepdim=True))


def measure(text: str, options: argparse.Namespace) -> tuple[str, list[dict[str, Any]], dict[str, str]]:
    """Title, rows, and what was left out."""
    shape = tuple(map(int, text.split("x")))
    if len(shape) < 2 or shape[-2] < shape[-1]:
        raise SystemExit(f"--shapes {text}: expected n x p with n >= p, after the sides of a batch if there are any")
    methods: dict[str, tuple[str, float, Method, Method]] = {}
    for length in options.lengths:
        bounded = partial(Stiefel().retract_bounded, bound=length)
        of_length: dict[str, tuple[Method, Method]] = {
            "polar, fgo_geo retract_bounded": (bounded, svd),
            "QR, Cholesky": (cholesky_qr, qr),
            **(FACTORISATIONS if length == max(options.lengths) else {}),
        }
        methods |= {f"{name}, step {length:g}": (name, length, *both) for name, both in of_length.items()}
    points = {length: tangent(shape, length, options.device) for length in options.lengths}

    def seconds(length: float, method: Method) -> float:
        x, u = (t.float() for t in points[length])
        return timing.seconds(lambda: method(x, u), options.device)

    square = torch.randn(shape[:-2] + shape[-1:] * 2, device=options.device)
    variants = {PRODUCT: partial(seconds, options.lengths[0], lambda x, _: x @ square)}
    variants |= {key: partial(seconds, length, method) for key, (_, length, method, _) in methods.items()}
    wanted = timing.chosen(list(variants), options, PRODUCT)
    times, left_out = timing.interleaved({key: variants[key] for key in wanted}, options.rounds, options.budget)
    records: list[dict[str, Any]] = []
    for key, of_row in timing.figures(times, PRODUCT).items():
        record = {"name": PRODUCT, "length": None, **of_row, "error": None, "violation": None}
        if key != PRODUCT:
            name, length, method, exact = methods[key]
            record |= {"name": name, "length": length, **accuracy(*points[length], method, exact)}
        records.append(record)
    records.sort(key=lambda row: (row["name"] != PRODUCT, row["name"], row["length"]))
    return " x ".join(map(str, shape)), records, left_out


def accuracy(x: Tensor, u: Tensor, method: Method, exact: Method) -> dict[str, float]:
    """Error and violation of a method in single precision."""
    q = method(x.float(), u.float()).double()
    distance = torch.linalg.matrix_norm(q - exact(x, u)).amax() / q.shape[-1] ** 0.5
    identity = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
    return {"error": float(distance), "violation": float((q.mT @ q - identity).abs().amax())}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = timing.argument_parser(__doc__ or "", rounds=11)
    parser.add_argument("--shapes", nargs="+", help=f"like 512x256, or 16384x3x3 for a batch ({' '.join(SHAPES)})")
    parser.add_argument("--lengths", nargs="+", type=float, default=[0.1, 0.41, 4.0], help="of the step (0.1 0.41 4)")
    options = timing.parse(parser, arguments)
    results = timing.Results("retractions", COLUMNS, options)
    for shape in options.shapes or (["12x4", "5x3x3"] if options.quick else SHAPES):
        results.add(*measure(shape, options))


if __name__ == "__main__":
    main()
