"""A report as a picture: the spread of the norms over every layer's groups, and the measures."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fgo_geo.measures.report.record import Kind, Record

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw"]

_COLUMNS = 2  # of panels: more, and labels are illegible where the figure is as wide as a page
_TITLES = {"frobenius": r"$\|w_G\|_F$", "spectral": r"$\|w_G\|_2$", "two_to_one": r"$\|w_G\|_{2\to1}$"}
_COLOURS: dict[Kind, str] = {
    "plain": "tab:gray",
    "product": "tab:blue",
    "manifold": "tab:green",
    "renormalised": "tab:orange",
    "diagonal": "tab:purple",
}


def draw(report: Record, title: str | None = None) -> Figure:
    """The picture that :meth:`~fgo_geo.measures.report.presentation.Report.plot` documents.

    Args:
        report: The numbers.
        title: Title of the figure.

    Returns:
        A new figure.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: If the title is the name of a picture file.
    """
    try:
        from matplotlib import pyplot, ticker
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError as error:
        raise ImportError(
            "Report.plot draws with matplotlib, which is not installed: pip install matplotlib"
        ) from error
    pictures = FigureCanvasBase.get_supported_filetypes()
    if isinstance(title, os.PathLike) or (isinstance(title, str) and Path(title).suffix[1:].lower() in pictures):
        name = os.fspath(title)
        raise ValueError(f"plot: title is {name!r}, the name of a file; save the picture with plot(path={name!r})")
    shown = [*_TITLES, *(["factors"] if report.measures else [])]
    rows = math.ceil(len(shown) / _COLUMNS)
    heights = [0.19 * len(report.layers) + 1.2] * rows + ([2.2] if report.measures else [])
    figure: Any = pyplot.figure(figsize=(8.5, sum(heights)), layout="constrained")
    grid = figure.add_gridspec(len(heights), _COLUMNS, height_ratios=heights)
    first: Any = None
    for number, what in enumerate(shown):
        row, column = divmod(number, _COLUMNS)
        ax = figure.add_subplot(grid[row, column], sharey=first)
        first = first or ax
        if what == "factors":
            _draw_factors(report, ax)
        else:
            _draw_norm(report, ax, what)
        ax.tick_params(labelleft=column == 0, axis="y", length=0)
        ax.grid(alpha=0.3)
        ax.set_axisbelow(True)
        if ax.get_xscale() == "log":
            ax.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 3), numticks=8))
            ax.xaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
            ax.xaxis.set_minor_locator(ticker.NullLocator())
    names = [layer.name.removesuffix(".weight") for layer in report.layers]
    first.set_yticks(range(len(names)), names)
    for ax in figure.axes:
        ax.tick_params(axis="y", labelsize=9)
    first.set_ylim(len(names) - 0.4, -0.6)
    if report.measures:
        _draw_measures(report, figure.add_subplot(grid[rows, :]))
    figure.legend(*first.get_legend_handles_labels(), loc="outside upper left", ncols=5, fontsize=9, frameon=False)
    figure.suptitle(title)
    return figure


def _draw_norm(report: Record, ax: Any, norm: str) -> None:
    """The distribution over every layer's groups of a norm."""
    levels = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0], dtype=torch.float64)
    quantiles = torch.stack([getattr(layer.groups, norm).quantile(levels) for layer in report.layers]).numpy()
    low, lower, middle, upper, high = quantiles.T
    for kind, colour in _COLOURS.items():
        rows = np.array([row for row, layer in enumerate(report.layers) if layer.kind == kind], int)
        if len(rows):
            ax.hlines(rows, low[rows], high[rows], color=colour, lw=1)
            ax.hlines(rows, lower[rows], upper[rows], color=colour, lw=4, alpha=0.5)
            ax.plot(middle[rows], rows, "o", color=colour, ms=3.5, label=kind)
    if low.min() > 0 and high.max() > 5 * low.min():
        ax.set_xscale("log")
    ax.set_title(f"{_TITLES[norm]} of the groups", fontsize=9)


def _draw_factors(report: Record, ax: Any) -> None:
    """Every layer's factor of the products over all groups; tied weights once. A factor of zero has no bar."""
    first_use = [report.chain.index(layer) for layer in report.layers]
    for offset, (name, norm) in enumerate((("neyshabur2015", "frobenius"), ("bartlett2017", "spectral"))):
        factors = np.array(report.measure(name).factors)[first_use]
        places = np.arange(len(factors)) + 0.4 * offset - 0.2
        drawn = np.where(np.isfinite(factors), factors, np.nan)
        ax.barh(places, drawn, 0.4, color=f"C{offset + 1}", label=_TITLES[norm])
    ax.axvline(0, color=ax.spines["left"].get_edgecolor(), lw=0.8)
    ax.set_title("log of the product over the groups", fontsize=9)
    ax.legend(fontsize=9)


def _draw_measures(report: Record, ax: Any) -> None:
    """The logarithms of the measures. The logarithm of zero has a bar of length zero, and a label."""
    names = list(dict.fromkeys(measure.name for measure in report.measures))
    for offset, heading in enumerate(dict.fromkeys(measure.heading for measure in report.measures)):
        values = np.array([measure.value for measure in report.measures if measure.heading == heading])
        places = np.arange(len(names)) + 0.4 * offset - 0.2
        bars = ax.barh(places, np.where(np.isfinite(values), values, 0), 0.36, label=heading, color=f"C{offset}")
        ax.bar_label(bars, [f"{value:.0f}" for value in values], fontsize=9, padding=3)
    ax.axvline(0, color=ax.spines["left"].get_edgecolor(), lw=0.8)
    ax.margins(x=0.12)
    ax.set_yticks(range(len(names)), names, fontsize=9)
    ax.invert_yaxis()
    ax.set_title(f"natural logarithm of the measures, N = {report.n_samples:,} (smaller is better)", fontsize=9)
    ax.legend(fontsize=9, frameon=False)
