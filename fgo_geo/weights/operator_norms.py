r"""Operator norms of convolutions: spectral norms of the linear map from input to output features.

They depend on input size, stride and padding. :func:`conv_operator_norm_circular` computes the norm exactly for
circular padding, and :func:`conv_operator_norm_bound` bounds it from above for zero padding. Both write a strided
convolution as an unstrided one on the s phases of its input (space to depth), so that a discrete Fourier transform
splits the operator into one small matrix per frequency.

The functions are batched, differentiable and computed in float64, and :mod:`fgo_geo.weights.norms` exports them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fgo_geo.linalg import (
    at_least_single,
    gram_iteration_bound,
    in_double,
    largest_eigenvalue,
    root_or_zero,
    short_side_gram,
)

__all__ = ["conv_operator_norm_bound", "conv_operator_norm_circular"]


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
    norms = root_or_zero(largest_eigenvalue(short_side_gram(symbol)))
    return norms.amax((-2, -1)).to(at_least_single(weight.dtype))


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

    The result includes rounding: it is raised by a bound on the error of all operations. The function uses matrix
    products only, no factorisation. A transposed convolution is the adjoint of the convolution with the same weight
    tensor and has the same norm: pass the transposed layer's *output* size as ``input_size``.

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
    reshaped = in_double(weight, "weight").flatten(-len(size) - 1).unflatten(-2, (groups, -1))
    bound = torch.minimum(
        gram_iteration_bound(symbol, iterations).amax((-2, -1)),
        gram_iteration_bound(reshaped, iterations).amax(-1) * math.sqrt(math.prod(overlaps)),
    )
    dtype = at_least_single(weight.dtype)
    return (bound * (1 + _rounding_slack(symbol, math.prod(kernel), dtype))).to(dtype)


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
    x = in_double(weight, "weight").unflatten(-axes - 2, (groups, -1))
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
