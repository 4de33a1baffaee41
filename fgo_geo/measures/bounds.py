r"""Generalisation measures of networks from the norms of their weights, in natural logarithms.

With the norms ``δ_{g,l}`` of the groups g of layer l, N samples, L layers and width ϖ ([Ozay2019]_, Table 1;
Mathematics, section 6)::

    Neyshabur 2015    2^L / √N · Π_l Π_g δ_F
    Bartlett 2017     1 / √N · Π_l Π_g δ₂ · ( Σ_l Π_g (δ_{2→1} / δ₂)^{2/3} )^{3/2}
    Neyshabur 2018    1 / √N · Π_l Π_g δ₂ · ( L² ϖ Σ_l Π_g (δ_F / δ₂)² )^{1/2}

One group per layer gives the classical forms of the theorems. A product over the groups of a layer does not bound any
norm of that layer: two groups of Frobenius norm 0.1 have the product 0.01, and their layer has the norm 0.141. It can
rank models with the same groups. Products over thousands of groups exceed every floating-point range, so the module
adds logarithms. It forms no ratio: multiplying the first product into the sum shows that the last two measures are
norms of a vector of *contributions*, one per layer::

    c_l = Π_g δ_{numerator,g,l} · Π_{j≠l} Π_g δ_{2,g,j}      ‖c‖_{2/3} / √N   and   L √ϖ ‖c‖₂ / √N

so that a layer of norm zero makes a measure zero (logarithm ``-inf``) instead of 0/0.

These are measures, not guarantees: they leave out constants and logarithmic factors of the theorems, and each function
lists what it omits. :mod:`fgo_geo.weights.norms` measures the norms; this module only takes tensors. Results are
float64 scalars, differentiable with respect to the norms. Every function has a counterpart ``*_terms`` that returns its
parts, :class:`BoundTerms`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fgo_geo.weights.norms import MatrixNorms

__all__ = [
    "BoundTerms",
    "DepthFactor",
    "bartlett2017",
    "bartlett2017_terms",
    "margin",
    "margins",
    "neyshabur2015",
    "neyshabur2015_terms",
    "neyshabur2018",
    "neyshabur2018_terms",
]

DepthFactor = Literal["exponential", "golowich", "none"]


class BoundTerms(NamedTuple):
    """A measure and its parts, all natural logarithms in float64.

    Attributes:
        value: The measure, a scalar: ``factors.sum() + scale`` for Neyshabur 2015, otherwise ``scale`` plus the
            logarithm of the p-norm of the contributions, p = 2/3 (Bartlett 2017) or 2 (Neyshabur 2018).
        factors: Every layer's factor of the product, ``Σ_g log δ``, shape ``(L,)``.
        contributions: Every layer's contribution ``log c_l``, shape ``(L,)``; empty for Neyshabur 2015. Subtract
            ``factors.sum()`` for the logarithms of the ratios of Table 1.
        scale: What doesn't depend on the weights: samples, margin, depth and width, a scalar.
    """

    value: Tensor
    factors: Tensor
    contributions: Tensor
    scale: Tensor


def neyshabur2015(
    norms: Sequence[MatrixNorms], n_samples: int, *, margin: float = 1.0, depth_factor: DepthFactor = "exponential"
) -> Tensor:
    r"""Frobenius measure, ``log( f(L) · Π_l Π_g δ_F / (γ √N) )``.

    Left out: the norm of the inputs, the number of classes and constants.

    Args:
        norms: One :class:`~fgo_geo.weights.norms.MatrixNorms` per layer; its fields hold one number per group, shape
            ``(G_l,)``, or one for the whole layer, shape ``()``: of a convolution, ``matrix_norms(weight.flatten(1))``.
            The function refuses norms of single kernels, which ``matrix_norms(weight)`` returns, if it recognises them
            by their shape ``(D, C)`` (for one-dimensional convolutions the shape ``(D,)`` looks like D groups).
        n_samples: Number N of training samples.
        margin: The margin γ > 0 that the logits are divided by, in units of the logits; 1 gives Table 1.
        depth_factor: ``f(L)``: ``"exponential"`` is ``2^L`` (Table 1), ``"golowich"`` is ``√L``, the dependence on the
            depth to which [Golowich2018]_ improved it, ``"none"`` is 1.

    Returns:
        The natural logarithm, a float64 scalar.

    Raises:
        TypeError: If ``norms`` is not a sequence of ``MatrixNorms``.
        ValueError: If there are no norms, a norm is negative or not finite, norms of a layer have more than one
            dimension, ``n_samples`` or ``margin`` isn't positive, or the depth factor is unknown.

    Source:
        [Ozay2019]_, Table 1, which attributes it to [Neyshabur2015]_.

    Example:
        Two layers of Frobenius norm 3 and four samples: 2² · 9 / 2 = 18.

        >>> layer = MatrixNorms(torch.tensor(3.0), torch.tensor(3.0), torch.tensor(3.0))
        >>> neyshabur2015([layer, layer], n_samples=4).exp()
        tensor(18.0000, dtype=torch.float64)
    """
    return neyshabur2015_terms(norms, n_samples, margin=margin, depth_factor=depth_factor).value


def neyshabur2015_terms(
    norms: Sequence[MatrixNorms], n_samples: int, *, margin: float = 1.0, depth_factor: DepthFactor = "exponential"
) -> BoundTerms:
    """The parts of :func:`neyshabur2015`, which documents the arguments."""
    factors = _log_products(norms, "frobenius")
    depth = len(norms)
    logs = {"exponential": depth * math.log(2), "golowich": math.log(depth) / 2, "none": 0.0}
    if depth_factor not in logs:
        raise ValueError(f"depth_factor is {depth_factor!r}; expected one of {', '.join(map(repr, logs))}")
    scale = factors.new_tensor(logs[depth_factor] + _log_rate(n_samples, margin))
    return BoundTerms(factors.sum() + scale, factors, factors.new_zeros(0), scale)


def bartlett2017(
    norms: Sequence[MatrixNorms],
    n_samples: int,
    *,
    margin: float = 1.0,
    distance_norms: Sequence[MatrixNorms] | None = None,
) -> Tensor:
    r"""Spectral complexity, ``log( Π_l Π_g δ₂ / (γ √N) · ( Σ_l Π_g (δ_{2→1} / δ₂)^{2/3} )^{3/2} )``.

    The theorem's numerator is the (2, 1) norm of ``(W_l - M_l)ᵀ``, the sum of the row norms of ``W_l - M_l``, for
    reference matrices M chosen before the data are seen: zero, or the initialisation (``distance_norms``).

    Left out: the root mean square norm of the inputs, the logarithm of the width, the constants and logarithms inside
    the soft O, the Lipschitz constants of the activations (1 for ReLU) and the term ``√(log(1/δ)/N)``.

    Args:
        norms: Norms of the weights as in :func:`neyshabur2015`.
        n_samples: Number N of training samples.
        margin: The margin γ > 0.
        distance_norms: Norms of ``W_l - M_l`` in the shapes of ``norms``; their 2→1 norms replace those of the weights.
            The reference is zero if left out.

    Returns:
        The natural logarithm, a float64 scalar; ``-inf`` if the measure is zero.

    Raises:
        TypeError: As :func:`neyshabur2015`.
        ValueError: As :func:`neyshabur2015`, or if ``distance_norms`` has other layers or groups than ``norms``.

    Source:
        [Ozay2019]_, Table 1; [Bartlett2017]_, theorem 1.1 and eq. 1.2.

    Example:
        Two layers with ‖W‖₂ = 2 and ‖W‖_{2→1} = 4: 4 · (2 · 2^{2/3})^{3/2} = 16 √2.

        >>> layer = MatrixNorms(torch.tensor(3.0), torch.tensor(2.0), torch.tensor(4.0))
        >>> bartlett2017([layer, layer], n_samples=1).exp() / 2**0.5
        tensor(16.0000, dtype=torch.float64)
    """
    return bartlett2017_terms(norms, n_samples, margin=margin, distance_norms=distance_norms).value


def bartlett2017_terms(
    norms: Sequence[MatrixNorms],
    n_samples: int,
    *,
    margin: float = 1.0,
    distance_norms: Sequence[MatrixNorms] | None = None,
) -> BoundTerms:
    """The parts of :func:`bartlett2017`, which documents the arguments."""
    factors, contributions = _factors_and_contributions(norms, distance_norms, "two_to_one")
    scale = factors.new_tensor(_log_rate(n_samples, margin))
    return BoundTerms(scale + _log_p_norm(contributions, 2 / 3), factors, contributions, scale)


def neyshabur2018(
    norms: Sequence[MatrixNorms],
    n_samples: int,
    *,
    width: float | Sequence[float] = 1.0,
    margin: float = 1.0,
    distance_norms: Sequence[MatrixNorms] | None = None,
) -> Tensor:
    r"""PAC-Bayesian spectral measure, ``log( Π_l Π_g δ₂ / (γ √N) · ( L² ϖ Σ_l Π_g (δ_F / δ₂)² )^{1/2} )``.

    The numerator contains the weights themselves, or their distances from reference matrices that are fixed before the
    data are seen, such as the initialisation (``distance_norms``). [Bartlett2017]_, section 3.4, quotes the bound in
    this form.

    Left out: the norm of the inputs, logarithmic factors, constants and the term of the confidence.

    Args:
        norms: Norms of the weights as in :func:`neyshabur2015`.
        n_samples: Number N of training samples.
        width: The width ϖ, the largest number of units of a layer; or one number per layer, which then multiplies the
            terms of the sum. The default, 1, leaves the width out.
        margin: The margin γ > 0.
        distance_norms: Norms of ``W_l - M_l`` in the shapes of ``norms``; their Frobenius norms replace those of the
            weights. The reference is zero if left out.

    Returns:
        The natural logarithm, a float64 scalar; ``-inf`` if the measure is zero.

    Raises:
        TypeError: As :func:`neyshabur2015`.
        ValueError: As :func:`bartlett2017`, or if a width isn't positive or there isn't one per layer.

    Source:
        [Ozay2019]_, Table 1; [Neyshabur2018]_, as quoted in [Bartlett2017]_, section 3.4.

    Example:
        One layer with ‖W‖₂ = 2 and ‖W‖_F = 3, width 4, nine samples: 2 · √(4 · (3/2)²) / 3 = 2.

        >>> layer = MatrixNorms(torch.tensor(3.0), torch.tensor(2.0), torch.tensor(4.0))
        >>> neyshabur2018([layer], n_samples=9, width=4).exp()
        tensor(2., dtype=torch.float64)
    """
    return neyshabur2018_terms(norms, n_samples, width=width, margin=margin, distance_norms=distance_norms).value


def neyshabur2018_terms(
    norms: Sequence[MatrixNorms],
    n_samples: int,
    *,
    width: float | Sequence[float] = 1.0,
    margin: float = 1.0,
    distance_norms: Sequence[MatrixNorms] | None = None,
) -> BoundTerms:
    """The parts of :func:`neyshabur2018`, which documents the arguments. A width per layer is in the contributions."""
    factors, contributions = _factors_and_contributions(norms, distance_norms, "frobenius")
    log_scale = math.log(len(norms)) + _log_rate(n_samples, margin)
    if isinstance(width, Sequence):
        if len(width) != len(norms):
            raise ValueError(f"there are {len(width)} widths and {len(norms)} layers; expected one width per layer")
        halves = [_log_positive(number, f"width[{layer}]") / 2 for layer, number in enumerate(width)]
        contributions = contributions + factors.new_tensor(halves)
    else:
        log_scale += _log_positive(width, "width") / 2
    scale = factors.new_tensor(log_scale)
    return BoundTerms(scale + _log_p_norm(contributions, 2), factors, contributions, scale)


def margins(logits: Tensor, targets: Tensor) -> Tensor:
    """Logit of the true class minus the largest of the others, per sample; positive if classified correctly.

    Args:
        logits: Outputs of the network before any softmax, shape ``(N, classes)``.
        targets: True classes, integers, shape ``(N,)``.

    Returns:
        Margins, shape ``(N,)``.

    Raises:
        ValueError: If the shapes don't fit, there are fewer than two classes, or a target is out of range.

    Source:
        [Bartlett2017]_, section 1.1.

    Example:
        >>> margins(torch.tensor([[3.0, 1.0, 0.0], [0.0, 2.0, 5.0]]), torch.tensor([0, 1]))
        tensor([ 2., -3.])
    """
    if logits.ndim != 2 or logits.shape[1] < 2 or targets.shape != logits.shape[:1]:
        raise ValueError(
            f"logits have shape {tuple(logits.shape)} and targets {tuple(targets.shape)}; expected (N, classes) "
            "with at least two classes, and (N,)"
        )
    if targets.numel() and not (int(targets.min()) >= 0 and int(targets.max()) < logits.shape[1]):
        raise ValueError(
            f"targets range from {int(targets.min())} to {int(targets.max())}; expected [0, {logits.shape[1]})"
        )
    column = targets.long().unsqueeze(-1)
    others = logits.scatter(-1, column, -math.inf)
    return logits.gather(-1, column).squeeze(-1) - others.amax(-1)


def margin(logits: Tensor, targets: Tensor, quantile: float = 0.1) -> float:
    """A low quantile of the :func:`margins`: all samples but this share have a larger margin.

    Args:
        logits: As in :func:`margins`.
        targets: As in :func:`margins`.
        quantile: The share, in [0, 1]; interpolated linearly between samples.

    Returns:
        The margin, for the argument ``margin=``. If it is not positive, the network misclassifies about this share of
        the samples or more, and there is no margin-normalised measure.

    Raises:
        ValueError: If there are no samples or the quantile isn't in [0, 1], and as :func:`margins`.

    Example:
        >>> margin(torch.tensor([[3.0, 1.0], [4.0, 0.0]]), torch.tensor([0, 0]), quantile=0.5)
        3.0
    """
    if isinstance(quantile, (bool, np.bool_)) or not 0 <= quantile <= 1:
        raise ValueError(f"quantile is {quantile}; expected a number in [0, 1]")
    values = margins(logits, targets)
    if not values.numel():
        raise ValueError("there are no samples; expected at least one row of logits")
    return float(torch.quantile(values.detach().double(), quantile))


def _log_rate(n_samples: int, margin: float) -> float:
    """``-log(γ √N)``."""
    return -_log_positive(n_samples, "n_samples") / 2 - _log_positive(margin, "margin")


def _log_positive(number: float, name: str) -> float:
    if isinstance(number, (bool, np.bool_)) or not (number > 0 and math.isfinite(number)):
        raise ValueError(f"{name} is {number}; expected a positive, finite number")
    return math.log(number)


def _log_values(norms: Sequence[MatrixNorms], field: str, name: str) -> list[Tensor]:
    """Checked logarithms of one norm, one tensor of groups per layer."""
    if isinstance(norms, MatrixNorms):
        raise TypeError(f"{name} is one MatrixNorms; expected a sequence with one per layer: [{name}]")
    if not isinstance(norms, Sequence):
        raise TypeError(f"{name} is {type(norms).__name__}; expected a sequence with one MatrixNorms per layer")
    if not norms:
        raise ValueError(f"{name} is empty; expected one MatrixNorms per layer")
    logs: list[Tensor] = []
    for layer, layer_norms in enumerate(norms):
        if not isinstance(layer_norms, MatrixNorms):
            raise TypeError(
                f"{name}[{layer}] is {type(layer_norms).__name__}; expected a MatrixNorms: measure a layer's weight "
                "with fgo_geo.norms.matrix_norms(weight.flatten(1))"
            )
        values = torch.as_tensor(getattr(layer_norms, field), dtype=torch.float64)
        if values.ndim > 1:
            raise ValueError(
                f"{name}[{layer}].{field} has shape {tuple(values.shape)}; expected () for a layer or (G,) for its "
                "groups. Norms of an unflattened convolution are those of its kernels: use "
                "fgo_geo.norms.matrix_norms(weight.flatten(1))"
            )
        values = values.reshape(-1)
        valid = (values >= 0) & values.isfinite()
        if not values.numel() or not bool(valid.all()):
            wrong = values[~valid][:1].tolist() or "no group"
            raise ValueError(f"{name}[{layer}].{field} holds {wrong}; expected finite norms >= 0, one per group")
        logs.append(values.log())
    return logs


def _log_products(norms: Sequence[MatrixNorms], field: str, name: str = "norms") -> Tensor:
    """``log Π_g δ`` of every layer, shape ``(L,)``, on the first layer's device."""
    sums = [values.sum() for values in _log_values(norms, field, name)]
    return torch.stack([value.to(sums[0].device) for value in sums])


def _factors_and_contributions(
    norms: Sequence[MatrixNorms], distance_norms: Sequence[MatrixNorms] | None, numerator: str
) -> tuple[Tensor, Tensor]:
    """``log Π_g δ₂`` and ``log c_l`` of every layer."""
    factors = _log_products(norms, "spectral")
    if distance_norms is None:
        numerators = _log_products(norms, numerator)
    else:
        numerators = _log_products(distance_norms, numerator, "distance_norms")
        sizes = [[torch.as_tensor(layer.spectral).numel() for layer in s] for s in (norms, distance_norms)]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"distance_norms has {sizes[1]} groups per layer and norms {sizes[0]}; expected the same, measured on "
                "W - M group by group"
            )
    own = torch.eye(len(factors), dtype=torch.bool, device=factors.device)
    others = factors.expand(own.shape).masked_fill(own, 0).sum(-1)
    return factors, numerators + others


def _log_p_norm(logs: Tensor, p: float) -> Tensor:
    return torch.logsumexp(p * logs, dim=0) / p
