r"""Norms of weights: of components, groups and layers.

For a matrix ``w`` with A rows there are three norms (Mathematics, section 5)::

    ‖w‖_F = (Σ w_ab²)^½        ‖w‖₂ = σ_max(w)        ‖w‖_{2→1} = Σ_a ‖w_a‖  (rows w_a)

    ‖w‖₂ <= ‖w‖_F <= ‖w‖_{2→1} <= √A ‖w‖_F

:func:`matrix_norms` measures a batch of matrices and :func:`group_norms` the concatenations ``w_G = (w¹, ..., w^|G|)``
of many groups at once; both return :class:`MatrixNorms`, which :mod:`fgo_geo.measures.bounds` reads.
:func:`manifold_norm_bounds` returns the bounds that a manifold guarantees without any measurement.

A convolution has two different spectral norms. *The spectral norm of the reshaped matrix* is that of the weight
flattened to ``(D, C·kh·kw)``; this module measures it. *The operator norm* is that of the linear map from input to
output features; :mod:`fgo_geo.weights.operator_norms` computes it, and this module exports its functions, too.

All functions are batched and differentiable, compute in float64, and round results once to the weight's type, float32
at least. Entries must be below 1e150 in size, so that squares do not overflow. Non-finite entries give NaN.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from fgo_geo.linalg import (
    at_least_single,
    in_double,
    largest_eigenvalue,
    root_of_sum,
    root_or_zero,
    short_side_gram,
)
from fgo_geo.weights import kinds
from fgo_geo.weights.components import FilterPartition, Partition
from fgo_geo.weights.operator_norms import conv_operator_norm_bound, conv_operator_norm_circular

__all__ = [
    "NORMS",
    "MatrixNorms",
    "Norm",
    "conv_operator_norm_bound",
    "conv_operator_norm_circular",
    "group_norms",
    "manifold_norm_bounds",
    "matrix_norms",
    "norm_names",
    "norms_of_groups",
    "two_to_one_norm",
]

Norm = Literal["frobenius", "spectral", "two_to_one", "2->1"]
NORMS: tuple[Norm, ...] = ("frobenius", "spectral", "two_to_one")
"""The fields of :class:`MatrixNorms`; ``"2->1"`` is another name of the last one."""


def norm_names(names: Iterable[str]) -> tuple[Norm, ...]:
    """The fields of :class:`MatrixNorms` that names of norms mean.

    Args:
        names: Some of :data:`NORMS`, or ``"2->1"``.

    Returns:
        Some of :data:`NORMS`.

    Raises:
        ValueError: For any other name.

    Example:
        >>> norm_names(["spectral", "2->1"])
        ('spectral', 'two_to_one')
    """
    fields = tuple("two_to_one" if name == "2->1" else name for name in names)
    for field in fields:
        if field not in NORMS:
            raise ValueError(f"norm is {field!r}; expected one of {', '.join(map(repr, NORMS))}")
    return cast("tuple[Norm, ...]", fields)


class MatrixNorms(NamedTuple):
    """Three norms of every matrix of a batch; the fields have the batch's shape.

    Attributes:
        frobenius: ``‖w‖_F``, the root of the sum of squares.
        spectral: ``‖w‖₂``, the largest singular value.
        two_to_one: ``‖w‖_{2→1}``, the sum of the Euclidean norms of the rows.
    """

    frobenius: Tensor
    spectral: Tensor
    two_to_one: Tensor


def matrix_norms(w: Tensor) -> MatrixNorms:
    r"""Frobenius, spectral and 2→1 norm of every matrix.

    The gradients are subgradients wherever a norm has no derivative: finite at repeated singular values, zero at
    the zero matrix.

    Args:
        w: Matrices, shape ``(..., A, B)``: components, blocks, or a layer's ``weight.flatten(1)``. The unflattened
            weight of a convolution is a batch of kernels, not one matrix.

    Returns:
        Norms of shape ``(...)``.

    Raises:
        TypeError: If ``w`` isn't real and floating point.
        ValueError: If ``w`` has no rows or no columns.

    Source:
        [Ozay2019]_, Table 2 (definitions).

    Example:
        >>> norms = matrix_norms(torch.tensor([[3.0, 0.0], [0.0, 4.0]]))
        >>> norms.frobenius.item(), norms.spectral.item(), norms.two_to_one.item()
        (5.0, 4.0, 7.0)
    """
    x = _matrices(w)
    return _rounded(
        MatrixNorms(
            frobenius=root_of_sum(x, (-2, -1)).squeeze((-2, -1)),
            spectral=root_or_zero(largest_eigenvalue(short_side_gram(x))),
            two_to_one=_sum_of_row_norms(x),
        ),
        w.dtype,
    )


def two_to_one_norm(w: Tensor) -> Tensor:
    """The 2→1 norm of every matrix alone: of the three, the one that depends on which side is up.

    Args:
        w: As in :func:`matrix_norms`.

    Returns:
        Norms of shape ``(...)``.

    Raises:
        TypeError: As :func:`matrix_norms`.
        ValueError: As :func:`matrix_norms`.

    Source:
        [Ozay2019]_, Table 2 (definition).

    Example:
        >>> wide = torch.tensor([[1.0, 1.0, 1.0, 1.0]])
        >>> two_to_one_norm(wide).item(), two_to_one_norm(wide.mT).item()
        (2.0, 4.0)
    """
    return _sum_of_row_norms(_matrices(w)).to(at_least_single(w.dtype))


def group_norms(components: Tensor, labels: Tensor, n_groups: int) -> MatrixNorms:
    r"""Norms of every group, whose matrix is the concatenation of its components.

    The Gram matrix of ``w_G = (w¹, ..., w^|G|)`` is a segment sum, ``w_G w_Gᵀ = Σ_i wⁱ wⁱᵀ`` of size A x A, and all
    three norms are read from it::

        ‖w_G‖_F² = tr(w_G w_Gᵀ),   ‖w_G‖₂² = λ_max(w_G w_Gᵀ),   ‖w_G‖_{2→1} = Σ_a (w_G w_Gᵀ)_aa^½

    Args:
        components: Matrices of equal size, shape ``(n, A, B)``.
        labels: The group of each component, integers in ``[0, n_groups)``, shape ``(n,)``.
        n_groups: Number of groups. A group without components has norm zero.

    Returns:
        Norms of shape ``(n_groups,)``.

    Raises:
        TypeError: If components aren't real and floating point, or labels aren't integers.
        ValueError: If the shapes don't fit or a label is out of range.

    Source:
        [Ozay2019]_, section 2 (a group's matrix); Mathematics, section 5.

    Example:
        >>> pair = torch.stack([torch.eye(2), torch.eye(2)])
        >>> norms = group_norms(pair, torch.tensor([0, 0]), n_groups=1)
        >>> norms.frobenius, norms.spectral
        (tensor([2.]), tensor([1.4142]))
    """
    if components.ndim != 3 or 0 in components.shape[1:]:
        raise ValueError(f"components have shape {tuple(components.shape)}; expected (n, A, B)")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"labels have dtype {labels.dtype}; expected integers, e.g. torch.int64")
    if labels.shape != components.shape[:1]:
        raise ValueError(f"labels have shape {tuple(labels.shape)}; expected one per component: ({len(components)},)")
    if labels.numel() and not (int(labels.min()) >= 0 and int(labels.max()) < n_groups):
        raise ValueError(f"labels range from {int(labels.min())} to {int(labels.max())}; expected [0, {n_groups})")
    x = in_double(components, "components")
    size = x.shape[-2]
    gram = x.new_zeros(n_groups, size, size).index_add(0, labels.long(), x @ x.mT)
    row_squares = gram.diagonal(dim1=-2, dim2=-1)
    return _rounded(
        MatrixNorms(
            frobenius=root_or_zero(row_squares.sum(-1)),
            spectral=root_or_zero(largest_eigenvalue(gram)),
            two_to_one=root_or_zero(row_squares).sum(-1),
        ),
        components.dtype,
    )


def norms_of_groups(cut: Partition, weight: Tensor) -> MatrixNorms:
    """Norms of every group of a weight: :func:`group_norms` for each part of its partition.

    Args:
        cut: The partition of the weight.
        weight: The weight, as its layer stores it.

    Returns:
        Norms of shape ``(G,)``, in the order of the collections.

    Raises:
        TypeError: If the weight isn't real and floating point.

    Example:
        A linear layer whose input channels are one group on a sphere and one on an oblique manifold.

        >>> from fgo_geo.weights.components import WeightLayout, partition
        >>> from fgo_geo.weights.grouping import collection
        >>> pi = collection(2, 2, "pi", ("sphere", "oblique"), components="block")
        >>> cut = partition([pi], WeightLayout((2, 2)))
        >>> norms_of_groups(cut, torch.tensor([[3.0, 0.0], [4.0, 1.0]])).frobenius
        tensor([5., 1.])
    """
    per_part: list[MatrixNorms] = []
    for segments, components in zip(cut.segments, cut.split(weight), strict=True):
        if segments.are_components:
            per_part.append(matrix_norms(components))
            continue
        labels = segments.spread(torch.arange(segments.count, device=components.device))
        if isinstance(cut, FilterPartition):  # the Gram matrices of group_norms would have the size of a filter
            matrices = [components[labels == group, :, 0].mT for group in range(segments.count)]
            per_part.append(MatrixNorms(*map(torch.stack, zip(*map(matrix_norms, matrices), strict=True))))
        else:
            per_part.append(group_norms(components, labels, segments.count))
    order = torch.from_numpy(np.concatenate(cut.groups)).to(weight.device)
    fields = (torch.cat(field) for field in zip(*per_part, strict=True))
    return MatrixNorms(*(torch.empty_like(field).index_copy(0, order, field) for field in fields))


def manifold_norm_bounds(kind: str, rows: int, columns: int) -> MatrixNorms:
    r"""The smallest upper bounds of the three norms at radius 1; at radius r they are r times these.

    ===============  ===========  ===========  ======
    kind             Frobenius    spectral     2→1
    ===============  ===========  ===========  ======
    sphere           1 (always)   1            √A
    oblique          √B (always)  √B           √(AB)
    stiefel          √B (always)  1 (always)   √(AB)
    ball             1            1            √A
    spectral_ball    √B           1            √(AB)
    spectral_sphere  √B           1 (always)   √(AB)
    ===============  ===========  ===========  ======

    "Always": every point has this norm. Balls are convex hulls (of the sphere, and of the Stiefel manifold), and norms
    are convex, so their bounds are the same. The 2→1 bounds are attained where all rows have the same
    norm, e.g. on square orthogonal matrices. [Ozay2019]_, Table 2, prints 1, B^¼, B^¼ there (sphere, oblique, Stiefel),
    which contradicts its caption's definition: the 3 x 3 identity has 2→1 norm 3 (Mathematics, section 5, errata).

    Args:
        kind: One of the table, or a kind that was registered with its norms.
        rows: A, the component's rows.
        columns: B, its columns.

    Returns:
        Bounds as float64 scalars.

    Raises:
        ValueError: For another kind (a Euclidean component has no bound), sizes below 1, or ``rows < columns`` on
            the Stiefel manifold.

    Example:
        >>> bounds = manifold_norm_bounds("stiefel", rows=3, columns=3)
        >>> round(bounds.two_to_one.item(), 6), bounds.spectral.item()
        (3.0, 1.0)
    """
    if rows < 1 or columns < 1:
        raise ValueError(f"the component is {rows} x {columns}; expected at least 1 x 1")
    record = kinds.find(kind)
    if record is None or record.norms is None or kind not in (record.name, *record.aliases):
        bounded = ", ".join(repr(known.name) for known in kinds.kinds() if known.norms is not None)
        own = "" if record is None or not record.has_radius else f"; pass norms= to register_kind({record.name!r}, ...)"
        raise ValueError(f"kind is {kind!r}; expected one of {bounded}: other kinds bound no norm{own}")
    frobenius, spectral = record.norms(rows, columns)
    # A row is at most as long as the matrix, so that A rows are at most √A times as long together.
    bounds = (frobenius, spectral, math.sqrt(rows) * frobenius)
    return MatrixNorms(*(torch.tensor(bound, dtype=torch.float64) for bound in bounds))


def _matrices(w: Tensor) -> Tensor:
    """Checked matrices in float64."""
    if w.ndim < 2 or 0 in w.shape[-2:]:
        raise ValueError(
            f"w has shape {tuple(w.shape)}; expected (..., A, B) with at least one row and one column: "
            "flatten a convolution's weight with weight.flatten(1) first"
        )
    return in_double(w, "w")


def _sum_of_row_norms(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=-1).sum(-1)


def _rounded(norms: MatrixNorms, dtype: torch.dtype) -> MatrixNorms:
    return MatrixNorms(*(norm.to(at_least_single(dtype)) for norm in norms))
