"""The record that a report is: plain numbers in frozen dataclasses, and their export.

A :class:`Report` holds a :class:`LayerReport` for every weight and a :class:`Measure` for every generalisation measure.
Nothing here computes; :mod:`fgo_geo.measures.report.reading` does.
"""

from __future__ import annotations

import difflib
import json
import math
import os
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from torch import Tensor

from fgo_geo.measures.report.plot import draw
from fgo_geo.measures.report.table import comparison, tables
from fgo_geo.models.choose import few
from fgo_geo.models.folding import BatchNormRecord
from fgo_geo.weights.norms import MatrixNorms

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

__all__ = ["Kind", "LayerReport", "Measure", "Report", "Scaling", "TauStatistics"]

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
    """What one weight obeys.

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
        feasible: Whether the violation is no more than rounding explains; None without constraints.
        uses: Number of layers that use the weight.
        tau: Statistics of the step sizes; None without.
        one_block: Whether the only group is the whole matrix: plain weights, and those that are a single block. The
            measures over all groups take it as ``layer`` does.
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
            norm: ``"frobenius"``, ``"spectral"`` or ``"two_to_one"``.

        Raises:
            ValueError: For another norm.
        """
        return float(self._of_groups(norm).max())

    def median(self, norm: str) -> float:
        """The median over the groups of a norm; arguments as of :meth:`worst`."""
        return float(self._of_groups(norm).quantile(0.5))

    def _of_groups(self, norm: str) -> Tensor:
        if norm not in MatrixNorms._fields:
            raise ValueError(f"norm is {norm!r}; expected one of {', '.join(map(repr, MatrixNorms._fields))}")
        return getattr(self.groups, norm)

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
        scaling: ``"groups"`` multiplies over all groups (Table 1 of [Ozay2019]_), ``"layers"`` takes one group per
            layer: the classical form. A layer that is one block is the same in both.
        value: The measure with margin 1.
        margin_value: The measure divided by the margin; None without a positive margin.
        factors: Every layer's factor of the product, in the order of :attr:`Report.chain`.
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
        return "all groups" if self.scaling == "groups" else "one group per layer"


@dataclass(frozen=True, eq=False)
class Report:
    """The norms, feasibility and measures of a model. ``print(report)`` shows them as a table.

    Attributes:
        layers: All measured weights, in the order of the model.
        left_out: The parameters that are not measured, with the reason.
        measures: Three measures in two scalings; none without ``n_samples``.
        n_samples: Number N of training samples.
        margin: The quantile of the margins on the data; None without labelled data.
        batch_norms: What became of the batch normalisations; empty unless they were folded.
        unfolded: Number of batch normalisations that the measures leave out.
        n_labelled: Number of samples that the margin is of.
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
        """The layers that the measures multiply: those of a tied weight as often as it is used."""
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
            KeyError: If there is none, with the reason if it was left out, or names that are like it.
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
            f"{name!r} is not measured: it is no parameter of the model, nor a module with one measured weight; "
            f"there is {few(near)}"
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

    # -- export ------------------------------------------------------------------------------------------------

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

    def to_json(self, path: str | os.PathLike[str] | None = None, *, indent: int | None = 2) -> str:
        """The same as JSON; the logarithm of zero, which JSON does not have, is the string ``"-inf"``.

        Args:
            path: A file to write it to as well, with a line break at its end.
            indent: Spaces per level; None for a single line.

        Returns:
            The text.

        Raises:
            TypeError: If ``path`` is no path.
            IsADirectoryError: If it is a folder.
            FileNotFoundError: If its folder does not exist.
        """
        if path is not None and not isinstance(path, (str, os.PathLike)):
            raise TypeError(f"to_json: path is {path!r}; expected a path, or None. Indentation has a name: indent=4")
        file = None if path is None else _file_in_a_folder(path)
        text = json.dumps(_json_numbers(self.to_dict()), indent=indent, allow_nan=False)
        if file is not None:
            file.write_text(text + "\n", encoding="utf-8")
        return text

    def to_dataframe(self) -> pandas.DataFrame:
        """The layers as a table, one row each, indexed by name.

        Raises:
            ImportError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise ImportError("Report.to_dataframe needs pandas, which is missing: pip install pandas") from error
        return pandas.DataFrame([layer.to_dict() for layer in self.layers]).set_index("name")

    # -- for readers -------------------------------------------------------------------------------------------

    def __str__(self) -> str:
        """Tables of the layers and of the measures, and what is left out."""
        return tables(self)

    def compare(self, other: Report, labels: tuple[str, str] = ("before", "after")) -> str:
        """This report and another side by side: worst norms of the layers, and the measures.

        Args:
            other: The report of the same architecture after training, constraining or renormalising it.
            labels: What to call the two, this one first.

        Returns:
            Two tables as text; a layer that only one of them has leaves the other's cells empty. Measures are shown if
            both have them, and those that are divided by the margin if both have these.

        Raises:
            TypeError: If ``other`` is no report, or the labels are no two words.
            ValueError: If the labels are the same.
        """
        if not isinstance(other, Report):
            raise TypeError(f"compare takes another report, got {type(other).__name__}: measure it with report() first")
        if not _are_two_words(labels):
            raise TypeError(
                f"compare: labels is {reprlib.repr(labels)}; expected two words, e.g. ('before', 'after'). A report is "
                "compared with one other: call it once for each"
            )
        if labels[0] == labels[1]:
            raise ValueError(
                f"compare: both labels are {labels[0]!r}; expected different words, to tell the columns apart"
            )
        return comparison(self, other, labels)

    def plot(self, title: str | None = None, path: str | os.PathLike[str] | None = None) -> Figure:
        """Draw the norms of every layer's groups, and, with measures, every layer's factor of them.

        A line is the range over a layer's groups, its thick part holds the middle half, the dot is the median.

        Args:
            title: Title of the figure.
            path: A file to save it to as well, ``"report.png"`` or another type that matplotlib knows.

        Returns:
            A new figure; save it with other settings by ``savefig``.

        Raises:
            ImportError: matplotlib is not installed.
            ValueError: If the title is the name of a picture file.
        """
        figure = draw(self, title)
        if path is not None:
            figure.savefig(path)
        return figure


def _are_two_words(labels: Any) -> bool:
    return isinstance(labels, (tuple, list)) and len(labels) == 2 and all(isinstance(word, str) for word in labels)


def _file_in_a_folder(path: str | os.PathLike[str]) -> Path:
    """A path that a file can be written to, as far as folders tell."""
    file = Path(path)
    if file.is_dir():
        raise IsADirectoryError(
            f"to_json: path is {os.fspath(path)!r}, which is a folder; expected the name of a file, e.g. "
            f"{str(file / 'report.json')!r}"
        )
    if not file.parent.is_dir():
        raise FileNotFoundError(
            f"to_json: path is {os.fspath(path)!r}, and there is no folder {str(file.parent)!r}; make it first, or "
            "write to another one"
        )
    return file


def _json_numbers(value: Any) -> Any:
    """Plain data with non-finite numbers as strings."""
    if isinstance(value, dict):
        return {key: _json_numbers(item) for key, item in cast("dict[str, Any]", value).items()}
    if isinstance(value, list):
        return [_json_numbers(item) for item in cast("list[Any]", value)]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
