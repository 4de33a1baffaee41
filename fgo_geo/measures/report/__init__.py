r"""Norms of every group of a model's weights, feasibility, and the generalisation measures that follow.

:func:`fgo_geo.report` reads a model and returns a :class:`~fgo_geo.measures.report.presentation.Report`, a frozen
record of numbers that can be printed and drawn. Each step has its own module:

1. :mod:`~fgo_geo.measures.report.weights` finds the weights, whether plain, on a manifold or renormalised, with their
   groups (a plain weight, or one on a single manifold, is one group);
2. :mod:`~fgo_geo.measures.report.data` runs data through the model, if there are some: input sizes and margins;
3. :mod:`~fgo_geo.measures.report.reading` measures the weights, by :mod:`fgo_geo.weights.norms`, and sums the
   measures over the layers, by :mod:`fgo_geo.measures.bounds`;
4. :mod:`~fgo_geo.measures.report.record` is the result, numbers only; :mod:`~fgo_geo.measures.report.table` makes text
   of them and :mod:`~fgo_geo.measures.report.plot` a picture, and
   :mod:`~fgo_geo.measures.report.presentation` gives both to users as methods of the report.

The measures treat the model as a chain of its weights: skip connections, pooling and activations count as maps of
norm at most one. They leave out batch normalisation unless ``fold=True``, see :mod:`fgo_geo.models.folding`.
"""

from fgo_geo.measures.report.presentation import Report
from fgo_geo.measures.report.reading import report
from fgo_geo.measures.report.record import LayerReport, Measure, TauStatistics

__all__ = ["LayerReport", "Measure", "Report", "TauStatistics", "report"]
