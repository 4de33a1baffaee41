r"""Norms of weights: components, groups, layers, and convolutions as linear operators.

For a matrix ``w`` with A rows there are three norms (Mathematics, section 5)::

    ‖w‖_F = (Σ w_ab²)^½        ‖w‖₂ = σ_max(w)        ‖w‖_{2→1} = Σ_a ‖w_a‖  (rows w_a)

    ‖w‖₂ <= ‖w‖_F <= ‖w‖_{2→1} <= √A ‖w‖_F

:func:`matrix_norms` measures a batch of matrices and :func:`group_norms` the concatenations ``w_G = (w¹, ..., w^|G|)``
of many groups at once; both return :class:`MatrixNorms`, which :mod:`fgo_geo.measures.bounds` reads.
:func:`manifold_norm_bounds` says what a manifold guarantees before anything is measured.

A convolution has two spectral norms, and they differ. *The spectral norm of the reshaped matrix* is that of the weight
flattened to ``(D, C·kh·kw)``. *The operator norm* is that of the linear map from input to output features, which also
depends on input size, stride and padding: :func:`conv_operator_norm_circular` computes it exactly for circular padding,
:func:`conv_operator_norm_bound` bounds it from above for zero padding. Both write a strided
convolution as an unstrided one on the s phases of its input (space to depth), so that a discrete Fourier transform
splits the operator into one small matrix per frequency.

Everything is batched, differentiable and computed in float64; results are rounded once to the weight's type, float32
at least. Entries must be below 1e150 in size, so that squares don't overflow. Non-finite entries give NaN.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from fgo_geo.linalg import root_of_sum
from fgo_geo.weights import kinds
from fgo_geo.weights.components import FilterPartition, Partition

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
        w: Matrices, shape ``(..., A, B)``: components, blocks, or a layer's ``weight.flatten(1)``. A convolution's
            weight as it is stored is taken for a batch of kernels, not for one matrix.

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
            spectral=_sqrt(_largest_eigenvalue(_short_side_gram(x))),
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
    return _sum_of_row_norms(_matrices(w)).to(_result_dtype(w.dtype))


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
    x = _double(components, "components")
    size = x.shape[-2]
    gram = x.new_zeros(n_groups, size, size).index_add(0, labels.long(), x @ x.mT)
    row_squares = gram.diagonal(dim1=-2, dim2=-1)
    return _rounded(
        MatrixNorms(
            frobenius=_sqrt(row_squares.sum(-1)),
            spectral=_sqrt(_largest_eigenvalue(gram)),
            two_to_one=_sqrt(row_squares).sum(-1),
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
        raise ValueError(f"kind is {kind!r}; expected one of {bounded}: other kinds bound no norm")
    frobenius, spectral = record.norms(rows, columns)
    # A row is at most as long as the matrix, so that A rows are at most √A times as long together.
    bounds = (frobenius, spectral, math.sqrt(rows) * frobenius)
    return MatrixNorms(*(torch.tensor(bound, dtype=torch.float64) for bound in bounds))


def conv_operator_norm_circular(
    weight: Tensor,
    input_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    r"""Operator norm of a convolution with circular padding, exact.

    In the Fourier domain the operator is block diagonal, with one ``D x C·s`` matrix per frequency of the output
    grid; the norm is the largest of their spectral norms.

    Args:
        weight: Weight of a 1d, 2d or 3d convolution in torch's layout, shape ``(..., D, C/groups, *kernel)``.
        input_size: Spatial size of the layer's input, one number per spatial axis; an integer is the size on all axes
            of a weight without leading dimensions.
        stride: Stride, a divisor of the input size: the output then has ``input_size / stride`` positions, as with
            "same" padding. The offset of the kernel doesn't matter.
        dilation: Dilation.
        groups: Number of convolution groups.

    Returns:
        Norm of shape ``(...)``.

    Raises:
        TypeError: If the weight isn't real and floating point.
        ValueError: If sizes don't fit together, or the stride doesn't divide the input size.

    Source:
        [Sedghi2019]_ for a stride of 1; strides by space to depth.

    Example:
        A moving sum of three has norm 3 (at frequency zero).

        >>> conv_operator_norm_circular(torch.ones(1, 1, 3), input_size=[8])
        tensor(3.)
    """
    size, stride, dilation = _conv_geometry(weight, input_size, stride, dilation, groups)
    if any(n % s for n, s in zip(size, stride, strict=True)):
        raise ValueError(
            f"stride {stride} doesn't divide input_size {size}, so the circular operator isn't block diagonal; "
            "use conv_operator_norm_bound"
        )
    symbol = _symbol(weight, size, stride, dilation, groups)
    norms = _sqrt(_largest_eigenvalue(_short_side_gram(symbol)))
    return norms.amax((-2, -1)).to(_result_dtype(weight.dtype))


def conv_operator_norm_bound(
    weight: Tensor,
    input_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    iterations: int = 6,
) -> Tensor:
    r"""Certified upper bound of the operator norm of a convolution with zero padding.

    The smaller of two bounds. (i) On a torus just large enough that no kernel wraps round from inside the input to
    inside the input, the zero-padded convolution is a sub-matrix of the circular one: its norm is at most the torus's,
    a maximum over frequencies. (ii) With the weight's reshaped matrix W the convolution is W times the extraction of
    patches: its norm is at most ``√m ‖W‖₂`` if no input position is in more than m patches. (Exact for
    a single output position.) Spectral norms are bounded by Gram iteration, for t = ``iterations``::

        ‖W‖₂ <= ‖(WᴴW)^{2^{t-1}}‖_F^{1/2^t} <= rank(W)^{1/2^{t+1}} ‖W‖₂

    Rounding is covered: the result is raised by a bound on the error of all operations. There are only matrix products,
    no factorisation. A transposed convolution is the adjoint of the convolution with the same weight tensor and has the
    same norm: pass the transposed layer's *output* size as ``input_size``.

    Memory: about ``16 · frequencies · D · C/groups · s`` bytes, with half as many frequencies as the torus has points
    divided by s, the product of the strides. Axes on which the kernel is 1 wide count as one point.

    Args:
        weight: Weight of a 1d, 2d or 3d convolution in torch's layout, shape ``(..., D, C/groups, *kernel)``.
        input_size: Spatial size of the layer's input, one number per spatial axis; an integer is the size on all axes
            of a weight without leading dimensions.
        stride: Stride.
        padding: Zeros added on both sides, or ``"same"`` or ``"valid"`` as in torch.
        dilation: Dilation.
        groups: Number of convolution groups.
        iterations: Number t of Gram iterations; each halves the logarithm of the factor of the rank.

    Returns:
        Bound of shape ``(...)``.

    Raises:
        TypeError: If the weight isn't real and floating point.
        ValueError: If sizes don't fit together or the kernel doesn't fit the padded input.

    Source:
        [Delattre2023]_ (Gram iteration).

    Example:
        A moving sum of three on four points, zero padded: the norm is 1 + 2 cos(π/5) = 2.618, on the torus it is 3.

        >>> conv_operator_norm_bound(torch.ones(1, 1, 3), input_size=[4], padding=1)
        tensor(3.0000)
    """
    size, stride, dilation = _conv_geometry(weight, input_size, stride, dilation, groups)
    if iterations < 0:
        raise ValueError(f"iterations is {iterations}; expected 0 or more")
    kernel = tuple(weight.shape[-len(size) :])
    axes = list(zip(size, kernel, stride, _pads(padding, kernel, stride, dilation), dilation, strict=True))
    torus, overlaps = zip(*[_torus_and_overlap(*axis) for axis in axes], strict=True)
    symbol = _symbol(weight, torus, stride, dilation, groups)
    reshaped = _double(weight, "weight").flatten(-len(size) - 1).unflatten(-2, (groups, -1))
    bound = torch.minimum(
        _gram_iteration_bound(symbol, iterations).amax((-2, -1)),
        _gram_iteration_bound(reshaped, iterations).amax(-1) * math.sqrt(math.prod(overlaps)),
    )
    dtype = _result_dtype(weight.dtype)
    return (bound * (1 + _rounding_slack(symbol, math.prod(kernel), dtype))).to(dtype)


def _matrices(w: Tensor) -> Tensor:
    """Checked matrices in float64."""
    if w.ndim < 2 or 0 in w.shape[-2:]:
        raise ValueError(
            f"w has shape {tuple(w.shape)}; expected (..., A, B) with at least one row and one column: "
            "flatten a convolution's weight with weight.flatten(1) first"
        )
    return _double(w, "w")


def _sum_of_row_norms(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=-1).sum(-1)


def _double(w: Tensor, what: str) -> Tensor:
    if not w.is_floating_point():
        raise TypeError(f"{what} has dtype {w.dtype}; expected a real floating-point type")
    return w.double()


def _result_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _rounded(norms: MatrixNorms, dtype: torch.dtype) -> MatrixNorms:
    return MatrixNorms(*(norm.to(_result_dtype(dtype)) for norm in norms))


def _sqrt(x: Tensor) -> Tensor:
    """Square root with ``√x = 0`` and a zero gradient for ``x <= 0``."""
    zero = x <= 0
    return torch.where(zero, 0, torch.where(zero, 1, x).sqrt())


def _short_side_gram(x: Tensor) -> Tensor:
    """``x xᴴ`` or ``xᴴ x``, whichever is smaller."""
    return x @ x.mH if x.shape[-2] <= x.shape[-1] else x.mH @ x


# cuSOLVER's batched eigensolver takes some 1000 numbers of workspace per tiny matrix and fails beyond two million.
_EIGEN_BATCH = 2**17


def _largest_eigenvalue(gram: Tensor) -> Tensor:
    """Largest eigenvalue of Hermitian matrices; NaN for those with non-finite entries."""
    finite = gram.isfinite().all(-1).all(-1)
    safe = torch.where(finite[..., None, None], gram, 0).reshape(-1, *gram.shape[-2:])
    largest = [torch.linalg.eigvalsh(chunk)[:, -1] for chunk in safe.split(_EIGEN_BATCH)]
    return torch.where(finite, torch.cat(largest).reshape(finite.shape), math.nan)


def _gram_iteration_bound(x: Tensor, iterations: int) -> Tensor:
    """``‖(xᴴx)^{2^{t-1}}‖_F^{1/2^t}``; every iterate is scaled to norm 1, the logarithms of the scales add up."""
    log_scale = torch.zeros((), dtype=torch.float64, device=x.device)
    for _ in range(iterations):
        norm = torch.linalg.vector_norm(x, dim=(-2, -1))
        norm = torch.where(norm == 0, 1, norm)
        x = _short_side_gram(x / norm[..., None, None])
        log_scale = 2 * (log_scale + norm.log())
    norm = torch.linalg.vector_norm(x, dim=(-2, -1))
    zero = norm == 0
    log_norm = torch.where(zero, 1, norm).log()
    return torch.where(zero, 0, ((log_norm + log_scale) / 2**iterations).exp())


def _rounding_slack(symbol: Tensor, taps: int, dtype: torch.dtype) -> float:
    """Relative error of a computed bound: transform, products and roots in float64, then one rounding to dtype.

    Products of length n err by at most n eps times the product of the Frobenius norms, and a Frobenius norm is at most
    √rank times the spectral one; the factor 64 is generous for the sums over iterations and for the transform.
    """
    rows, columns = symbol.shape[-2:]
    steps = 64 * (16 + rows + columns * taps) * math.sqrt(min(rows, columns))
    rounding = 0.0 if dtype == torch.float64 else torch.finfo(dtype).eps
    return steps * torch.finfo(torch.float64).eps + rounding


def _symbol(
    weight: Tensor,
    torus: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Fourier blocks of the circular convolution, shape ``(..., groups, frequencies, D/groups, C/groups · s)``.

    Output o reads the input at ``s o + j d`` for tap j. With ``j d = s q + r`` this is tap q of an unstrided
    convolution of phase r of the input, ``x_r[n] = x[s n + r]``; phases become channels. Real weights have
    conjugate blocks at opposite frequencies, hence the half-sided transform.
    """
    axes = len(torus)
    x = _double(weight, "weight").unflatten(-axes - 2, (groups, -1))
    grid: list[int] = []
    for axis, (n, s, d) in enumerate(zip(torus, stride, dilation, strict=True)):
        dim = axis - axes
        taps = torch.arange(x.shape[dim], device=x.device) * d
        length = min(n, s * (d * (x.shape[dim] - 1) // s + 1))
        shape = list(x.shape)
        shape[dim] = length
        x = x.new_zeros(shape).index_add(dim, taps % n, x).unflatten(dim, (length // s, s))
        x = x.movedim(dim, -axes - 1).flatten(-axes - 2, -axes - 1)
        grid.append(1 if length == s else n // s)
    blocks = torch.fft.rfftn(x, s=grid, dim=tuple(range(-axes, 0)))
    return blocks.flatten(-axes).movedim(-1, -3)


def _conv_geometry(
    weight: Tensor,
    input_size: int | Sequence[int],
    stride: int | Sequence[int],
    dilation: int | Sequence[int],
    groups: int,
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Checked input size, stride and dilation, one number per spatial axis."""
    if isinstance(input_size, (np.ndarray, Tensor)):
        input_size = input_size.tolist()
    axes = len(input_size) if isinstance(input_size, Sequence) else weight.ndim - 2
    if axes < 1 or weight.ndim < axes + 2 or 0 in weight.shape[-axes - 2 :]:
        given = tuple(input_size) if isinstance(input_size, Sequence) else input_size
        raise ValueError(
            f"weight has shape {tuple(weight.shape)} and input_size is {given!r}; expected a weight "
            "(..., D, C/groups, *kernel) with as many kernel axes as input_size has numbers"
        )
    if groups < 1 or weight.shape[-axes - 2] % groups:
        raise ValueError(
            f"groups is {groups}; expected a divisor of the weight's {weight.shape[-axes - 2]} output channels"
        )
    return (
        _per_axis(input_size, axes, "input_size", least=1),
        _per_axis(stride, axes, "stride", least=1),
        _per_axis(dilation, axes, "dilation", least=1),
    )


def _per_axis(value: int | Sequence[int], axes: int, name: str, least: int) -> tuple[int, ...]:
    values: tuple[Any, ...] = tuple(value) if isinstance(value, Sequence) else (value,) * axes
    if len(values) != axes or not all(isinstance(v, (int, np.integer, torch.SymInt)) and v >= least for v in values):
        raise ValueError(f"{name} is {value!r}; expected {axes} integers >= {least}, or one for all axes")
    return values


def _pads(
    padding: int | Sequence[int] | str,
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
) -> list[tuple[int, int]]:
    """Zeros before and after the input on every axis; torch puts the odd one of "same" after."""
    if padding == "valid":
        padding = 0
    if padding == "same":
        if any(s != 1 for s in stride):
            raise ValueError(f"padding is 'same' and stride is {tuple(stride)}; expected a stride of 1")
        reach = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        return [(r // 2, r - r // 2) for r in reach]
    if isinstance(padding, str):
        raise ValueError(f"padding is {padding!r}; expected integers, 'same' or 'valid'")
    return [(p, p) for p in _per_axis(padding, len(kernel), "padding", least=0)]


def _torus_and_overlap(n: int, kernel: int, stride: int, pads: tuple[int, int], dilation: int) -> tuple[int, int]:
    """Per axis: a period at which no tap from outside ``[0, n)`` wraps into it, and the m of bound (ii)."""
    before, after = pads
    reach = dilation * (kernel - 1)
    outputs = (n + before + after - reach - 1) // stride + 1
    if outputs < 1:
        raise ValueError(
            f"the kernel spans {reach + 1} positions and the padded input {n + before + after}; expected a kernel "
            "that fits: check input_size, padding and dilation"
        )
    overhang = stride * (outputs - 1) + reach - before + 1 - n
    torus = _divide_up(n + max(before, overhang), stride) * stride
    # Output o reads position c at tap j if s o + d j = c + p; all solutions are (o + i d/gcd, j - i s/gcd).
    common = math.gcd(stride, dilation)
    return torus, min(_divide_up(outputs, dilation // common), _divide_up(kernel, stride // common))


def _divide_up(a: int, b: int) -> int:
    return -(-a // b)
