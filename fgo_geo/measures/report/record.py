"""The numbers of a report, in frozen dataclasses, and the same as plain data.

A :class:`Record` holds a :class:`LayerReport` for every weight and a :class:`Measure` for every generalisation measure.
Nothing here computes or shows anything: :mod:`~fgo_geo.measures.report.reading` measures the model, and
:mod:`~fgo_geo.measures.report.presentation` prints and draws.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from fgo_geo.models.folding import BatchNormRecord
from fgo_geo.weights.norms import MatrixNorms, norm_names
from fgo_geo.weights.words import few

__all__ = ["Kind", "LayerReport", "Measure", "Record", "Scaling", "TauStatistics"]

Kind = Literal["plain", "product", "manifold", "renormalised", "diagonal"]
Scaling = Literal["groups", "layers"]


@dataclass(frozen=True)
class TauStatistics:
    """The divisors ``τ`` of a layer's step sizes in the optimiser's latest step.

    Attributes:
        share_above_one: Share of the groups with ``τ > 1``, whose step the theorem shortened.
        median: Median over the groups.
        maximum: Largest of the groups.
    """

    share_above_one: float
    median: float
    maximum: float


@dataclass(frozen=True, eq=False)
class LayerReport:
    """The norms and the feasibility of one weight.

    Attributes:
        names: Its names in the model; more than one if the weight is tied.
        module: Type of the layer that uses it.
        shape: Its shape.
        kind: ``"plain"``, on a ``"product"`` of groups, on a single ``"manifold"``, ``"renormalised"``, or the
            ``"diagonal"`` matrix of a batch normalisation that could not be folded.
        manifolds: The groups' manifold kinds, in words; empty for plain weights.
        groups: Norms of every group, float64, shape ``(G,)``. Components have no fewer rows than columns: a wide block,
            and a wide weight that is one block, is measured transposed, which its 2→1 norm shows.
        layer: Norms of the matrix ``(D, C·kh·kw)`` of the whole weight, float64 scalars; rows are outputs.
        operator_norm: Upper bound of the norm of the convolution as a linear operator at its input size (exact for
            circular padding); None if the sizes are not known, and for other layers.
        violation: Largest relative violation of a constraint; None without constraints.
        feasible: Whether rounding can explain the violation; None without constraints.
        uses: Number of layers that use the weight.
        tau: Statistics of the step sizes; None without.
        one_block: Whether the only group is the whole matrix, as in plain weights and in weights of a single block. The
            group form of the measures then uses ``layer``.
    """

    names: tuple[str, ...]
    module: str
    shape: tuple[int, ...]
    kind: Kind
    manifolds: str
    groups: MatrixNorms
    layer: MatrixNorms
    operator_norm: float | None = None
    violation: float | None = None
    feasible: bool | None = None
    uses: int = 1
    tau: TauStatistics | None = None
    one_block: bool = False

    @property
    def name(self) -> str:
        """The first of its names."""
        return self.names[0]

    @property
    def n_groups(self) -> int:
        """Number of groups."""
        return len(self.groups.frobenius)

    def worst(self, norm: str) -> float:
        """The largest norm of a group.

        Args:
            norm: ``"frobenius"``, ``"spectral"`` or ``"two_to_one"`` (or ``"2->1"``).

        Raises:
            ValueError: For another norm.
        """
        return float(self._of_groups(norm).max())

    def median(self, norm: str) -> float:
        """The median over the groups of a norm; arguments as of :meth:`worst`."""
        return float(self._of_groups(norm).quantile(0.5))

    def _of_groups(self, norm: str) -> Tensor:
        return getattr(self.groups, *norm_names([norm]))

    def to_dict(self) -> dict[str, Any]:
        """Plain data; norms of groups as largest, median and smallest."""
        summary = {
            f"{norm}_{word}": value
            for norm in MatrixNorms._fields
            for word, value in (
                ("worst", self.worst(norm)),
                ("median", self.median(norm)),
                ("smallest", float(self._of_groups(norm).min())),
                ("layer", float(getattr(self.layer, norm))),
            )
        }
        tau = self.tau
        return {
            "name": self.name,
            "also": list(self.names[1:]),
            "module": self.module,
            "shape": list(self.shape),
            "kind": self.kind,
            "manifolds": self.manifolds,
            "n_groups": self.n_groups,
            **summary,
            "operator_norm_bound": self.operator_norm,
            "violation": self.violation,
            "feasible": self.feasible,
            "uses": self.uses,
            "tau_share_above_one": None if tau is None else tau.share_above_one,
            "tau_median": None if tau is None else tau.median,
            "tau_maximum": None if tau is None else tau.maximum,
        }


@dataclass(frozen=True)
class Measure:
    """One generalisation measure of the model, all natural logarithms; see :mod:`fgo_geo.measures.bounds`.

    Attributes:
        name: ``"neyshabur2015"``, ``"bartlett2017"`` or ``"neyshabur2018"``.
        scaling: ``"layers"`` takes one group per layer, as the theorems do. ``"groups"`` multiplies over all groups
            (Table 1 of [Ozay2019]_); this product does not bound any norm of a layer, so compare it only between models
            with the same groups. A layer that is one block is the same in both.
        value: The measure with margin 1.
        margin_value: The measure divided by the margin; None without a positive margin.
        factors: Every layer's factor of the product, in the order of :attr:`Record.chain`.
        scale: What does not depend on the weights.
    """

    name: str
    scaling: Scaling
    value: float
    margin_value: float | None
    factors: tuple[float, ...]
    scale: float

    @property
    def heading(self) -> str:
        """The scaling in words."""
        return "group form" if self.scaling == "groups" else "layer form"


@dataclass(frozen=True, eq=False)
class Record:
    """The norms, feasibility and measures of a model.

    Attributes:
        layers: All measured weights, in the order of the model.
        left_out: The parameters that are not measured, with the reason.
        measures: Three measures in two scalings; none without ``n_samples``.
        n_samples: Number N of training samples.
        margin: The quantile of the margins on the data; None without labelled data.
        batch_norms: The outcome for every batch normalisation; empty unless they were folded.
        unfolded: Number of batch normalisations that the measures leave out.
        n_labelled: Number of samples from which the margin was computed.
    """

    layers: tuple[LayerReport, ...]
    left_out: Mapping[str, str]
    measures: tuple[Measure, ...] = ()
    n_samples: int | None = None
    margin: float | None = None
    batch_norms: tuple[BatchNormRecord, ...] = ()
    unfolded: int = 0
    n_labelled: int = 0

    @property
    def chain(self) -> tuple[LayerReport, ...]:
        """The layers that the measures multiply; a tied weight appears as often as the model uses it."""
        return tuple(layer for layer in self.layers for _ in range(layer.uses))

    @property
    def feasible(self) -> bool:
        """Whether every constrained weight obeys its constraints; True if there is none."""
        return all(layer.feasible is not False for layer in self.layers)

    def layer(self, name: str) -> LayerReport:
        """The layer with a parameter of this name, or the only one of a module of this name.

        Args:
            name: Name of a weight, ``"fc.weight"``, or of a module with one measured weight, ``"fc"``.

        Raises:
            KeyError: If there is none, with the reason if it was left out, or similar names.
        """
        for layer in self.layers:
            if name in layer.names:
                return layer
        within = [layer for layer in self.layers if any(n.rpartition(".")[0] == name for n in layer.names)]
        if len(within) == 1:
            return within[0]
        if within:
            raise KeyError(f"{name!r} has several weights: ask for one of {', '.join(each.name for each in within)}")
        unmeasured = next((n for n in self.left_out if name in (n, n.rpartition(".")[0])), None)
        if unmeasured is not None:
            what = "it" if unmeasured == name else f"its {unmeasured!r}"
            raise KeyError(f"{name!r} is not measured: {what} {self.left_out[unmeasured]}")
        known = [n for layer in self.layers for n in layer.names]
        inside = [n for n in known if n.startswith(f"{name}.")]
        near = inside or difflib.get_close_matches(str(name), known, n=3) or known
        raise KeyError(
            f"{name!r} is not measured: it is neither a parameter of the model nor a module with one measured weight; "
            f"the names are {few(near)}"
        )

    def measure(self, name: str, scaling: Scaling = "groups") -> Measure:
        """The measure of a name and scaling.

        Raises:
            KeyError: If there is none.
        """
        for measure in self.measures:
            if (measure.name, measure.scaling) == (name, scaling):
                return measure
        known = ", ".join(dict.fromkeys(m.name for m in self.measures)) or "none: pass n_samples"
        raise KeyError(f"there is no measure {name!r} scaled by {scaling!r}; the names are {known}")

    def to_dict(self) -> dict[str, Any]:
        """Plain data: numbers, strings, lists and dictionaries."""
        return {
            "n_samples": self.n_samples,
            "margin": self.margin,
            "n_labelled": self.n_labelled,
            "feasible": self.feasible,
            "layers": [layer.to_dict() for layer in self.layers],
            "measures": [{**vars(m), "factors": list(m.factors)} for m in self.measures],
            "left_out": dict(self.left_out),
            "batch_norms": [
                {"name": r.name, "layer": r.layer, "side": r.side, "reason": r.reason, "norm": r.norm}
                for r in self.batch_norms
            ],
            "unfolded": self.unfolded,
        }
