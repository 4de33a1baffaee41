"""Read a model into a report: find its weights, measure them, and combine the results.

The norms are those of the weights that the network computes with. The module measures the groups of a weight part by
part of its partition, all groups of a part at once.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast, get_args

import torch
from torch import Tensor, nn

from fgo_geo.linalg import is_sharded
from fgo_geo.measures.bounds import (
    BoundTerms,
    DepthFactor,
    bartlett2017_terms,
    neyshabur2015_terms,
    neyshabur2018_terms,
)
from fgo_geo.measures.report.data import observe
from fgo_geo.measures.report.presentation import Report
from fgo_geo.measures.report.record import LayerReport, Measure, Scaling, TauStatistics
from fgo_geo.measures.report.weights import Weight, find_weights
from fgo_geo.models.folding import BatchNorm, BatchNormRecord, fold_batchnorm
from fgo_geo.models.slips import require_model
from fgo_geo.weights.components import BlockPartition, Partition
from fgo_geo.weights.layout import WeightLayout
from fgo_geo.weights.norms import (
    MatrixNorms,
    conv_operator_norm_bound,
    conv_operator_norm_circular,
    matrix_norms,
    norms_of_groups,
    two_to_one_norm,
)
from fgo_geo.weights.words import few

__all__ = ["report"]

_FEASIBLE = 2e-5  # relative; what Geoopt's check_point_on_manifold allows


@torch.no_grad()
def report(
    model: nn.Module,
    data: Any = None,
    n_samples: int | None = None,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    fold: bool = False,
    operator_norms: bool = True,
    margin_quantile: float = 0.1,
    depth_factor: DepthFactor = "exponential",
) -> Report:
    r"""Measure a model: norms of all groups, feasibility, and the generalisation measures of Table 1.

    The function works on plain, constrained and renormalised models. The model does not change; with ``data`` it runs
    in eval mode, and every module returns to its own mode afterwards.

    Args:
        model: Any module.
        data: A batch of inputs, a pair (inputs, labels), an iterable of either, or the size of one input, e.g.
            ``(3, 224, 224)``. It determines the layers' input sizes, and with labels the margin. Without it there are
            no operator norms of convolutions and no margin.
        n_samples: Number N of training samples; without it there are no measures. The function does not count the data,
            because they may be a part of the training set or another set.
        optimizer: A :class:`~fgo_geo.RiemannianFGSGD`, or an optimiser that :func:`~fgo_geo.on_manifolds` keeps on
            manifolds, for statistics of its latest step sizes.
        fold: Fold batch normalisations into their layers first, see :func:`~fgo_geo.models.folding.fold_batchnorm`. A
            normalisation that cannot be folded is a separate layer. Feasibility refers to the stored weights.
        operator_norms: Bound the operator norms of convolutions, if ``data`` is given. This takes a minute or more for
            large networks on a CPU; everything else takes seconds.
        margin_quantile: The share of samples that may have a smaller margin.
        depth_factor: As in :func:`~fgo_geo.measures.bounds.neyshabur2015`.

    Returns:
        The report. The width of the measure by [Neyshabur2018]_ is the largest number of channels of a layer.

    Raises:
        TypeError: If the model is not a module, or the optimiser has no step sizes to report.
        ValueError: If a weight is sharded or holds NaN or infinity (by name), nothing can be measured, the data do not
            fit the model, the optimiser has no parameter of the model, or another argument is out of range.

    Example:
        >>> import math
        >>> layer = nn.Linear(2, 2, bias=False)
        >>> layer.weight.data = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
        >>> measured = report(layer, n_samples=100)
        >>> measured.layers[0].worst("frobenius"), measured.layers[0].worst("spectral")
        (5.0, 4.0)
        >>> round(math.exp(measured.measure("neyshabur2015").value), 6)  # 2 · 5 / √100
        1.0
    """
    _check_arguments(model, n_samples, margin_quantile, depth_factor)
    n_samples = None if n_samples is None else int(n_samples)
    scales = _step_scales(optimizer, model)
    found, left_out = find_weights(model)
    records: tuple[BatchNormRecord, ...] = ()
    norms = {name: m for name, m in model.named_modules() if isinstance(m, BatchNorm)}
    if fold:
        folded, records = fold_batchnorm(model)
        found = [replace(w, value=cast(Tensor, _attribute(folded, w.names[0])).detach()) for w in found]
        left_out |= _fate_of_parameters(norms, records)
    kept = [record for record in records if record.reason and record.scale is not None]
    if not (found or kept):
        reasons = few([f"{name} {reason}" for name, reason in left_out.items()]) or "there are no parameters"
        raise ValueError(
            f"report: {type(model).__name__} has no weight to measure: {reasons}. Norms of single tensors are in "
            "fgo_geo.norms.matrix_norms"
        )
    seen = observe(model, data, margin_quantile)
    layers = [_measure_weight(w, seen.sizes if operator_norms else {}, scales) for w in found]
    layers += [_diagonal(record, norms[record.name]) for record in kept]
    position = {name: number for number, (name, _) in enumerate(model.named_modules())}
    layers.sort(key=lambda layer: position[layer.name if layer.kind == "diagonal" else layer.name.rpartition(".")[0]])
    unfolded = [r for r in records if r.reason and r.scale is None] if fold else norms
    result = Report(tuple(layers), left_out, (), n_samples, seen.margin, records, len(unfolded), seen.n_labelled)
    if n_samples is None:
        return result
    width = max(max(_channels(w.layout)) for w in found) if found else 1
    return replace(result, measures=_measures(result.chain, n_samples, seen.margin, depth_factor, width))


def _check_arguments(model: Any, n_samples: Any, margin_quantile: float, depth_factor: str) -> None:
    """Raise before anything is measured, which may take long."""
    require_model(model, "report")
    for name, param in model.named_parameters():
        if is_sharded(param):
            raise ValueError(
                f"report: {name!r} is a sharded tensor (DTensor), and a report reads whole weights: report the model "
                "before it is sharded, or load its checkpoint (fgo_geo.distributed.TrainingState) into a model that is "
                "constrained and not sharded"
            )
    is_number = isinstance(n_samples, numbers.Real) and not isinstance(n_samples, bool)
    count = float(n_samples) if is_number else 0.0
    if n_samples is not None and not (count >= 1 and count.is_integer()):
        raise ValueError(
            f"report: n_samples is {n_samples!r}; expected the number of training samples, a whole number >= 1, or None"
        )
    if not 0 <= margin_quantile <= 1:
        raise ValueError(f"report: margin_quantile is {margin_quantile!r}; expected a number in [0, 1]")
    if depth_factor not in get_args(DepthFactor):
        raise ValueError(f"report: depth_factor is {depth_factor!r}; expected one of {get_args(DepthFactor)}")


def _step_scales(optimizer: torch.optim.Optimizer | None, model: nn.Module) -> Mapping[Tensor, Tensor]:
    if optimizer is None:
        return {}
    read: Callable[[], Mapping[Tensor, Tensor]] | None = getattr(optimizer, "step_scales", None)
    if read is None:
        raise TypeError(
            f"report: optimizer is {type(optimizer).__name__}, which has no step_scales(); expected FG-SGD, or an "
            "optimiser that fgo_geo.on_manifolds keeps on manifolds"
        )
    groups: list[dict[str, Any]] = getattr(optimizer, "optimizer", optimizer).param_groups  # of a handle, too
    held = {param for group in groups for param in group["params"]}
    if held.isdisjoint(model.parameters()):
        raise ValueError(
            f"report: optimizer ({type(optimizer).__name__}) has no parameter of the model; pass the optimiser "
            "that trains this model, or leave it out"
        )
    return read()


# -- measuring ---------------------------------------------------------------------------------------------------


def _on_cpu(norms: MatrixNorms) -> MatrixNorms:
    return MatrixNorms(*(norm.cpu() for norm in norms))


def _measure_weight(
    weight: Weight, sizes: Mapping[nn.Module, set[tuple[int, ...]]], scales: Mapping[Tensor, Tensor]
) -> LayerReport:
    value = weight.value
    matrix = weight.layout.channels(value.double()).flatten(1)
    layer = matrix_norms(matrix)
    cut = weight.partition
    one_block = cut is None or (isinstance(cut, BlockPartition) and sum(cut.counts) == 1)
    groups = _norms_of_block(matrix, layer) if one_block else norms_of_groups(cast(Partition, cut), value.double())
    operators = [_operator_norm(m, value, size) for m in dict.fromkeys(weight.owners) for size in sizes.get(m, ())]
    known = [norm for norm in operators if norm is not None]
    tolerance = max(_FEASIBLE, 2 * torch.finfo(value.dtype).eps)
    return LayerReport(
        names=weight.names,
        module=type(weight.owners[0]).__name__.removeprefix("Parametrized"),
        shape=tuple(value.shape),
        kind=weight.kind,
        manifolds=weight.manifolds,
        groups=_on_cpu(groups),
        layer=_on_cpu(layer),
        one_block=one_block,
        operator_norm=max(known) if known and len(known) == len(operators) else None,
        violation=weight.violation,
        feasible=None if weight.violation is None else weight.violation <= tolerance,
        uses=len(set(weight.owners)),
        tau=_tau(scales.get(weight.param)),
    )


def _norms_of_block(matrix: Tensor, norms: MatrixNorms) -> MatrixNorms:
    """Norms of a matrix as a group's only component, given its own: components have no fewer rows than columns."""
    standing = matrix.mT if matrix.shape[0] < matrix.shape[1] else matrix
    return MatrixNorms(*(norm[None] for norm in norms._replace(two_to_one=two_to_one_norm(standing))))


def _tau(scales: Tensor | None) -> TauStatistics | None:
    if scales is None:
        return None
    tau = scales.double().flatten()
    return TauStatistics(float((tau > 1).double().mean()), float(tau.quantile(0.5)), float(tau.max()))


def _diagonal(record: BatchNormRecord, norm: nn.Module) -> LayerReport:
    """A batch normalisation as the matrix ``diag(s)``, whose rows have the norms ``|s|``."""
    size = cast(Tensor, record.scale).abs().cpu()
    norms = MatrixNorms(size.norm(), size.max(), size.sum())
    groups = MatrixNorms(*(n[None] for n in norms))
    return LayerReport((record.name,), type(norm).__name__, (len(size),), "diagonal", "", groups, norms, one_block=True)


def _operator_norm(module: nn.Module, weight: Tensor, size: tuple[int, ...]) -> float | None:
    """Bound of the norm of a convolution as an operator; None where none is known."""
    conv = cast(nn.Conv2d, module)
    geometry: Any = {"stride": conv.stride, "dilation": conv.dilation, "groups": conv.groups}
    if conv.padding_mode == "zeros":
        return float(conv_operator_norm_bound(weight, size, padding=conv.padding, **geometry))
    whole = all(n % s == 0 for n, s in zip(size, conv.stride, strict=True))
    padding = conv.padding if isinstance(conv.padding, tuple) else (0,) * len(size)
    reach = zip(conv.kernel_size, conv.dilation, padding, strict=True)
    same = conv.padding == "same" or all(2 * p == d * (k - 1) for k, d, p in reach)
    if conv.padding_mode == "circular" and whole and same:
        return float(conv_operator_norm_circular(weight, size, **geometry))
    return None


def _channels(layout: WeightLayout) -> tuple[int, int]:
    return layout.out_channels, layout.in_channels * layout.conv_groups


def _measures(
    chain: Sequence[LayerReport], n_samples: int, margin: float | None, depth_factor: DepthFactor, width: int
) -> tuple[Measure, ...]:
    """The three measures, over all groups and with one group per layer."""
    measures: list[Measure] = []
    for scaling in get_args(Scaling):
        # One block per layer is the classical form, and its theorems are about the matrix (outputs, inputs).
        norms = [layer.layer if scaling == "layers" or layer.one_block else layer.groups for layer in chain]

        def terms(gamma: float, norms: list[MatrixNorms] = norms) -> dict[str, BoundTerms]:
            return {
                "neyshabur2015": neyshabur2015_terms(norms, n_samples, margin=gamma, depth_factor=depth_factor),
                "bartlett2017": bartlett2017_terms(norms, n_samples, margin=gamma),
                "neyshabur2018": neyshabur2018_terms(norms, n_samples, margin=gamma, width=width),
            }

        with_margin = terms(margin) if margin is not None and margin > 0 else {}
        for name, found in terms(1.0).items():
            normalised = float(with_margin[name].value) if name in with_margin else None
            factors = tuple(found.factors.tolist())
            measures.append(Measure(name, scaling, float(found.value), normalised, factors, float(found.scale)))
    return tuple(measures)


# -- batch normalisation -----------------------------------------------------------------------------------------


def _attribute(model: nn.Module, name: str) -> Any:
    path, _, local = name.rpartition(".")
    return getattr(model.get_submodule(path), local)


def _fate_of_parameters(norms: Mapping[str, nn.Module], records: Sequence[BatchNormRecord]) -> dict[str, str]:
    """The remark for each parameter of a batch normalisation that was folded or kept."""
    fates: dict[str, str] = {}
    for record in records:
        fate = "is folded into a layer next to it"
        if record.reason:
            fate = record.reason if record.scale is None else "is a layer of its own, listed as a diagonal matrix"
        fates |= {f"{record.name}.{local}": fate for local, _ in norms[record.name].named_parameters()}
    return fates
