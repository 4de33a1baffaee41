r"""Inner products that couple the channels of a layer, and the gradients that belong to them, as pure functions.

The gradient of a loss depends on the inner product of the space of weights. With another inner product
``<h, k>_M = Σ h (M k)`` than the plain one, the direction of steepest descent is ``G = M⁻¹ g``, the one tensor with
``<G, h>_M = Σ g h`` for all ``h``. [Lao2020]_ choose an ``M`` that couples the channels of a layer: it acts along one
axis of the weight, of length ``D``, and on every other index (a *passenger*) alike ("Mathematics", section 7). With
the mean ``m(h)`` along the axis and the forward difference ``Δ``:

=======  ===============================================  =============================
metric   inner product ``<h, k>``                         gradient ``G``
=======  ===============================================  =============================
``h0``   ``D m(h) m(k) + λ Σ (h - m(h)) (k - m(k))``      ``m(g) + (g - m(g)) / λ``
``h1``   ``Σ h k + λ Σ (Δh) (Δk)``                        ``(I + λ ΔᵀΔ)⁻¹ g``
``h1t``  ``D m(h) m(k) + λ Σ (Δh) (Δk)``                  ``m(g) + (ΔᵀΔ)⁺ (g - m(g)) / λ``
=======  ===============================================  =============================

With periodic ends the Sobolev metrics are diagonal in the Fourier basis, and free ends differ from that by a matrix of
rank one. A real Fourier transform therefore solves all of these systems, in ``D log D`` operations per passenger. On
the CPU, in single and half precision, the compiled sweeps of :mod:`fgo_geo.paths.native.channels` solve by two
recursions along the axis, in ``D`` operations in double precision, unless torch takes derivatives.

``h1t`` has a condition number of about ``D² / 10`` for every ``λ``: relative to fast waves, rounding errors of ``g`` in
slow waves grow by this factor.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, SupportsFloat, cast, get_args

import torch
from torch import Tensor, nn

from fgo_geo.linalg import computes_in_float32
from fgo_geo.linalg.values import is_differentiated
from fgo_geo.paths.native import channels
from fgo_geo.weights.words import described, did_you_mean, small, whole_number

__all__ = [
    "Direction",
    "Ends",
    "Metric",
    "channel_directed_gradient",
    "channel_inner",
    "check_axis",
    "check_dense",
    "check_metric",
    "direct_gradients",
    "mistaken",
]

Metric = Literal["h0", "h1", "h1t"]
"""The inner products."""

Ends = Literal["periodic", "free"]
"""Whether the last channel is a neighbour of the first."""

_METRICS, _ENDS = get_args(Metric), get_args(Ends)

# Gradients are cut and joined into pieces of about this number of entries: on a processor what fits its cache, on an
# accelerator what hides the launches and is still small beside the model.
_PIECE_CPU = 2**18
_PIECE = 2**24


class Direction(NamedTuple):
    """The arguments of :func:`channel_directed_gradient` for one gradient."""

    metric: Metric
    lam: float
    axis: int
    ends: Ends
    groups: int


def channel_inner(
    h: Tensor,
    k: Tensor,
    metric: Metric = "h0",
    lam: float = 1.0,
    axis: int = 0,
    ends: Ends = "periodic",
    groups: int = 1,
) -> Tensor:
    r"""Inner product of two tensors that weighs how they vary along a channel axis ([Lao2020]_).

    Summed over all passengers, with ``m`` the mean along the axis and ``D`` its length (within a group)::

        h0:   D m(h) m(k) + λ Σ (h - m(h)) (k - m(k))
        h1:   Σ h k       + λ Σ (Δh) (Δk)
        h1t:  D m(h) m(k) + λ Σ (Δh) (Δk)

    ``Δh[i] = h[i + 1] - h[i]``; with periodic ends ``i + 1`` is taken modulo ``D``, with free ends the last
    difference is left out.

    Args:
        h: Real tensor.
        k: Real tensor of the same shape.
        metric: ``"h0"`` (re-weighted L2), ``"h1"`` (Sobolev) or ``"h1t"`` (Sobolev, mean-preserving).
        lam: Weight ``λ``: positive, for ``h1`` also zero.
        axis: The channel axis.
        ends: ``"periodic"`` or ``"free"``; without meaning for ``h0``.
        groups: Number of equal runs of the axis, each with its own differences and mean.

    Returns:
        A tensor without dimensions.

    Raises:
        ValueError: If an option is not one of the above.
        TypeError: If a tensor is complex or holds integers.

    Example:
        >>> h = torch.tensor([1.0, 3.0])
        >>> channel_inner(h, h, "h1", lam=0.5, ends="free")  # 1 + 9 + 0.5 * 2²
        tensor(12.)
    """
    metric, ends = check_metric(metric, lam, ends)
    check_dense(h, "h")
    check_dense(k, "k")
    if h.shape != k.shape:
        raise ValueError(
            f"the inner product takes two tensors of one shape, but got {tuple(h.shape)} and {tuple(k.shape)}"
        )
    axis = check_axis(h.shape, axis, groups)
    return _inner(_columns(h, axis, groups), _columns(k, axis, groups), metric, lam, ends)


def channel_directed_gradient(
    g: Tensor,
    metric: Metric = "h0",
    lam: float = 1.0,
    axis: int = 0,
    ends: Ends = "periodic",
    groups: int = 1,
) -> Tensor:
    r"""The gradient with respect to :func:`channel_inner`, from the ordinary one ([Lao2020]_).

    The one tensor ``G`` with ``channel_inner(G, h) = Σ g h`` for all ``h``::

        h0:   m(g) + (g - m(g)) / λ
        h1:   (I + λ ΔᵀΔ)⁻¹ g
        h1t:  m(g) + (ΔᵀΔ)⁺ (g - m(g)) / λ

    All metrics keep the mean along the axis and damp variation: ``h0`` equally at every frequency, ``h1`` more at high
    frequencies. ``h1t`` damps like ``h1`` for large ``λ``, and *amplifies* slow variation up to ``D² / (4 π² λ)`` times
    (free ends: ``D² / (π² λ)``) where that is above one.

    The map is linear, symmetric and positive, differentiable and free of host synchronisation. Half precision is
    computed in float32 and rounded once.

    Args:
        g: Real gradient of any shape, for instance ``(D, C, kh, kw)``.
        metric: ``"h0"`` (re-weighted L2), ``"h1"`` (Sobolev) or ``"h1t"`` (Sobolev, mean-preserving).
        lam: Weight ``λ``: positive, for ``h1`` also zero. ``h0`` with 1 and ``h1`` with 0 give ``g``.
        axis: The channel axis. Output channels are axis 0 of a convolution or a linear layer, axis 1 of a transposed
            convolution.
        ends: ``"periodic"``: the last channel is a neighbour of the first; ``"free"``: it is not. Without meaning
            for ``h0``.
        groups: Number of equal runs of the axis that are smoothed one by one: the groups of a grouped convolution.

    Returns:
        A new tensor with the shape and type of ``g``.

    Raises:
        ValueError: If an option is not one of the above, or the axis doesn't exist or doesn't split in ``groups``.
        TypeError: If ``g`` is complex or holds integers.

    Example:
        Mean 4; with ``λ = 2`` the deviations -3, -1, 1, 3 halve.

        >>> channel_directed_gradient(torch.tensor([1.0, 3.0, 5.0, 7.0]), "h0", lam=2.0)
        tensor([2.5000, 3.5000, 4.5000, 5.5000])
    """
    metric, ends = check_metric(metric, lam, ends)
    check_dense(g, "the gradient")
    axis = check_axis(g.shape, axis, groups)
    if not is_differentiated(g):
        wide = g if g.dtype == torch.float64 else g.float()
        if channels.takes(wide):
            result = wide.clone(memory_format=torch.contiguous_format) if wide is g else wide.contiguous()
            channels.direct([result], [Direction(metric, lam, axis, ends, groups)])
            return result.to(g.dtype)
    directed = _directed(_columns(g, axis, groups), metric, lam, ends)
    return _from_columns(directed.contiguous(), g.shape, axis, groups).contiguous()


def _columns(x: Tensor, axis: int, groups: int) -> Tensor:
    """A matrix with one column per passenger and group, in which the channel axis runs downwards."""
    matrix = x.movedim(axis, 0).reshape(x.shape[axis], -1)
    return matrix if groups == 1 else matrix.unflatten(0, (groups, -1)).movedim(0, 1).flatten(1)


def _from_columns(columns: Tensor, shape: torch.Size, axis: int, groups: int) -> Tensor:
    """Inverse of :func:`_columns`."""
    passengers = [*shape[:axis], *shape[axis + 1 :]]
    runs = columns.reshape(columns.shape[0], groups, *passengers).movedim(1, 0)
    return runs.reshape(shape[axis], *passengers).movedim(0, axis)


@computes_in_float32
def _inner(h: Tensor, k: Tensor, metric: Metric, lam: float, ends: Ends) -> Tensor:
    mean_h, mean_k = h.mean(0), k.mean(0)
    if metric == "h0":
        return h.shape[0] * (mean_h * mean_k).sum() + lam * ((h - mean_h) * (k - mean_k)).sum()
    rough = (_difference(h, ends) * _difference(k, ends)).sum()
    level = (h * k).sum() if metric == "h1" else h.shape[0] * (mean_h * mean_k).sum()
    return level + lam * rough


def _difference(x: Tensor, ends: Ends) -> Tensor:
    return x.roll(-1, 0) - x if ends == "periodic" else x.diff(dim=0)


@computes_in_float32
def _directed(g: Tensor, metric: Metric, lam: float, ends: Ends) -> Tensor:
    """``M⁻¹ g`` for the columns of ``g``."""
    if metric == "h0":
        return torch.lerp(g.mean(0, keepdim=True), g, 1 / lam)
    # On a ring ΔᵀΔ is circulant, with eigenvalues 4 sin²(θ) at θ = π k / n.
    rows, n = g.contiguous().t().contiguous(), g.shape[0]
    k = torch.arange(n // 2 + 1, device=g.device)
    sine, cosine = torch.sin(k.to(g.dtype) * (math.pi / n)), torch.cos(k.to(g.dtype) * (math.pi / n))
    level = 1.0 if metric == "h1" else 0.0
    gain = torch.where(k == 0, 1.0, 1 / (level + lam * 4 * sine**2))
    directed = torch.fft.irfft(torch.fft.rfft(rows).mul_(gain), n=n)
    if ends == "free":
        # Cutting the bond between the last channel and the first takes λ w wᵀ off M, with w = e_0 - e_(n-1): Sherman
        # and Morrison add λ z zᵀ / (1 - λ wᵀz) to the inverse, with z = M⁻¹ w. Both factors come from their spectra,
        # where nothing cancels: that of w is 1 - exp(2iθ), and 1 - λ wᵀz is entry (0, 0) of M⁻¹ (h1), or 1 / n (h1t).
        z = torch.fft.irfft(torch.complex(2 * sine**2 * gain, -2 * sine * cosine * gain), n=n)
        denominator = torch.fft.irfft(torch.where(k == 0, 1.0, level * gain), n=n)[0]
        directed.addr_(rows @ z, z * (lam / denominator))
    return directed.t()


# -- many gradients at once --------------------------------------------------------------------------------------------


def direct_gradients(gradients: Sequence[Tensor], directions: Sequence[Direction]) -> None:
    """Overwrite gradients with the directed ones.

    Args:
        gradients: Tensors that :func:`check_dense` accepts.
        directions: How to direct each of them.
    """
    native: tuple[list[Tensor], list[Direction]] = ([], [])
    alike: dict[Any, list[tuple[Tensor, Direction]]] = {}
    runs = channels.runs()
    for g, direction in zip(gradients, directions, strict=True):
        if runs and channels.fits(g):
            native[0].append(g)
            native[1].append(direction)
        else:
            metric, lam, axis, ends, groups = direction
            key = (metric, lam, ends, g.shape[axis] // groups, g.dtype, g.device)
            alike.setdefault(key, []).append((g, direction))
    channels.direct(*native)
    for pairs in alike.values():
        _direct_alike(pairs)


def _direct_alike(pairs: list[tuple[Tensor, Direction]]) -> None:
    """The same for gradients of one metric, length of the axis, type and device, in torch."""
    columns = [_columns(g, direction.axis, direction.groups) for g, direction in pairs]
    _direct_columns(columns, pairs[0][1])
    for (g, direction), directed in zip(pairs, columns, strict=True):
        if directed.data_ptr() != g.data_ptr():  # the columns are a copy, not a view of the gradient
            g.copy_(_from_columns(directed, g.shape, direction.axis, direction.groups))


def _direct_columns(columns: list[Tensor], direction: Direction) -> None:
    """Overwrite columns with the directed ones, piece by piece."""
    metric, lam, _, ends, _ = direction
    entries = _PIECE_CPU if columns[0].device.type == "cpu" else _PIECE
    width = max(1, entries // columns[0].shape[0])
    for pieces in _filled([piece for matrix in columns for piece in matrix.split(width, 1)], width):
        joint = torch.cat(pieces, 1) if len(pieces) > 1 else pieces[0]
        directed = _directed(joint, metric, lam, ends).contiguous()
        for piece, part in zip(pieces, directed.split([piece.shape[1] for piece in pieces], 1), strict=True):
            piece.copy_(part)


def _filled(pieces: Iterable[Tensor], width: int) -> Iterator[list[Tensor]]:
    """The pieces in lists of at most ``width`` columns, each filled before the next is begun."""
    batch: list[Tensor] = []
    free = width
    for piece in pieces:
        if batch and piece.shape[1] > free:
            yield batch
            batch, free = [], width
        batch.append(piece)
        free -= piece.shape[1]
    if batch:
        yield batch


# -- checks ------------------------------------------------------------------------------------------------------------


def check_metric(metric: str, lam: float, ends: str) -> tuple[Metric, Ends]:
    """The metric and the ends in small letters; ValueError unless the options are those of an inner product."""
    given, metric, ends = metric, small(metric), small(ends)
    if metric not in _METRICS:
        hint = did_you_mean(given, _METRICS)
        raise ValueError(mistaken("metric", given, f"one of {', '.join(_METRICS)}{hint}"))
    if ends not in _ENDS:
        raise ValueError(mistaken("ends", ends, f"one of {', '.join(_ENDS)}"))
    is_one = lam.numel() == 1 if isinstance(lam, Tensor) else not getattr(lam, "ndim", 0)
    if not isinstance(cast(object, lam), SupportsFloat) or not is_one:
        raise TypeError(mistaken("lam", lam, "a number"))
    if not math.isfinite(lam) or lam < 0 or (lam == 0 and metric != "h1"):
        least = "at least 0" if metric == "h1" else "above 0"
        raise ValueError(f"lam is {lam}, but the metric {metric} is an inner product only for finite lam {least}")
    return cast(Metric, metric), cast(Ends, ends)


def mistaken(name: str, given: object, expected: str) -> str:
    """A message about an argument of another kind than expected."""
    if isinstance(given, nn.Module):
        return (
            f"{name} is a model ({type(given).__name__}), which channel_directed takes as module=; expected {expected}"
        )
    return f"{name} is {described(given) if isinstance(given, Tensor) else repr(given)}, expected {expected}"


def check_dense(x: Tensor, what: str) -> None:
    """Raise unless a tensor is a dense one of real numbers."""
    if not isinstance(cast(object, x), Tensor):
        raise TypeError(f"{what} is {described(x)}, expected a torch.Tensor")
    if x.layout != torch.strided:
        raise TypeError(
            f"{what} is sparse, but smoothing along channels fills every row: use dense gradients "
            "(for an Embedding sparse=False), or leave the parameter out with select or with "
            "channel_directed=False in its parameter group"
        )
    if not x.is_floating_point():
        raise TypeError(f"{what} has type {x.dtype}, expected a real floating-point type")


def check_axis(shape: Sequence[int], axis: int, groups: int, what: str = "the tensor") -> int:
    """The axis counted from the front."""
    index, count = whole_number(axis), whole_number(groups)
    if index is None:
        raise TypeError(f"axis is {axis!r}, expected an integer")
    if not -len(shape) <= index < len(shape):
        raise ValueError(
            f"axis is {index}, but {what} has shape {tuple(shape)}: expected an axis in [{-len(shape)}, {len(shape)})"
        )
    if count is None:
        raise TypeError(f"groups is {groups!r}, expected an integer")
    index %= len(shape)
    if shape[index] == 0:
        raise ValueError(f"{what} has shape {tuple(shape)}: axis {index} holds no channel")
    if count < 1 or shape[index] % count:
        raise ValueError(
            f"groups is {count}, but axis {index} of {what} (shape {tuple(shape)}) has "
            f"{shape[index]} channels: expected a positive divisor of that"
        )
    return index
