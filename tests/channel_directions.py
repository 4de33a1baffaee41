"""Channel-directed gradients by their definition: an inner product term by term, and a dense solve in float64.

Nothing comes from the package.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

METRICS = ("h0", "h1", "h1t")
ENDS = ("periodic", "free")


def slow_inner(h: list[float], k: list[float], metric: str, lam: float, ends: str) -> float:
    """The inner product of two vectors, term by term from its definition."""
    d = len(h)
    mean_h, mean_k = sum(h) / d, sum(k) / d
    total = sum(h[i] * k[i] for i in range(d)) if metric == "h1" else d * mean_h * mean_k
    if metric == "h0":
        return total + lam * sum((h[i] - mean_h) * (k[i] - mean_k) for i in range(d))
    for i in range(d if ends == "periodic" else d - 1):
        total += lam * (h[(i + 1) % d] - h[i]) * (k[(i + 1) % d] - k[i])
    return total


def dense_metric(d: int, metric: str, lam: float, ends: str) -> np.ndarray:
    unit = np.eye(d).tolist()
    return np.array([[slow_inner(unit[i], unit[j], metric, lam, ends) for j in range(d)] for i in range(d)])


def slow_gradient(g: Tensor, metric: str, lam: float, axis: int, ends: str, groups: int = 1) -> Tensor:
    """A dense solve in float64 for every run of the axis."""
    runs = np.split(np.moveaxis(g.double().numpy(), axis, 0), groups)
    matrix = dense_metric(len(runs[0]), metric, lam, ends)
    solved = [np.linalg.solve(matrix, run.reshape(len(run), -1)).reshape(run.shape) for run in runs]
    return torch.from_numpy(np.moveaxis(np.concatenate(solved), 0, axis).copy())


def drawn(shape: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
