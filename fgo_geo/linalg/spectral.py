"""Spectral norms of matrices of any size, from Gram matrices: exact, and as an upper bound by products alone."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fgo_geo.linalg.products import gram_blocks, gram_matrix

__all__ = ["gram_iteration_bound", "largest_eigenvalue", "short_side_gram"]


def short_side_gram(x: Tensor) -> Tensor:
    """``x xᴴ`` or ``xᴴ x`` of real or complex matrices ``(..., A, B)``, whichever is smaller.

    Example:
        >>> short_side_gram(torch.tensor([[3.0, 4.0]]))
        tensor([[25.]])
    """
    tall = x if x.shape[-2] > x.shape[-1] else x.mH
    is_wide = not x.is_complex() and gram_blocks(tall.shape[-1]) > 1
    return gram_matrix(tall) if is_wide else tall.mH @ tall


# cuSOLVER's batched eigensolver takes some 1000 numbers of workspace per tiny matrix and fails beyond two million.
_EIGEN_BATCH = 2**17


def largest_eigenvalue(gram: Tensor) -> Tensor:
    """Largest eigenvalues ``(...)`` of Hermitian matrices ``(..., B, B)``; NaN for those with non-finite entries.

    Example:
        >>> largest_eigenvalue(torch.tensor([[2.0, 1.0], [1.0, 2.0]]))
        tensor(3.)
    """
    finite = gram.isfinite().all(-1).all(-1)
    safe = torch.where(finite[..., None, None], gram, 0).reshape(-1, *gram.shape[-2:])
    largest = [torch.linalg.eigvalsh(chunk)[:, -1] for chunk in safe.split(_EIGEN_BATCH)]
    return torch.where(finite, torch.cat(largest).reshape(finite.shape), math.nan)


def gram_iteration_bound(x: Tensor, iterations: int) -> Tensor:
    """The upper bound ``‖(xᴴx)^{2^{t-1}}‖_F^{1/2^t}`` of the spectral norm, by products alone.

    Every iterate is scaled to norm 1, and the logarithms of the scales add up.

    Args:
        x: Matrices in double precision, shape ``(..., A, B)``.
        iterations: Number of products ``t``.

    Returns:
        Bounds, shape ``(...)``.

    Example:
        >>> x = torch.diag(torch.tensor([2.0, 1.0], dtype=torch.float64))
        >>> gram_iteration_bound(x, 1), gram_iteration_bound(x, 6)
        (tensor(2.0305, dtype=torch.float64), tensor(2., dtype=torch.float64))
    """
    log_scale = torch.zeros((), dtype=torch.float64, device=x.device)
    for _ in range(iterations):
        norm = torch.linalg.vector_norm(x, dim=(-2, -1))
        norm = torch.where(norm == 0, 1, norm)
        x = short_side_gram(x / norm[..., None, None])
        log_scale = 2 * (log_scale + norm.log())
    norm = torch.linalg.vector_norm(x, dim=(-2, -1))
    zero = norm == 0
    log_norm = torch.where(zero, 1, norm).log()
    return torch.where(zero, 0, ((log_norm + log_scale) / 2**iterations).exp())
