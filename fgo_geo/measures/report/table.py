"""A report as text: tables of its layers and measures, alone or next to those of another report."""

from __future__ import annotations

import math
import textwrap
from typing import cast

from rich import box
from rich.console import Console
from rich.table import Table

from fgo_geo.measures.report.record import LayerReport, Record
from fgo_geo.weights.words import line_width, stated

__all__ = ["comparison", "tables"]

_SYMBOLS = {"frobenius": "‖·‖F", "spectral": "‖·‖2", "two_to_one": "‖·‖2→1"}


def tables(report: Record) -> str:
    """Tables of the layers, the measures and the omitted parameters, and a summary.

    Args:
        report: A report.

    Returns:
        Text of several lines. The table is as wide as its content; on a terminal that is too narrow it has fewer
        columns.
    """
    width = line_width()
    table = _layer_table(report)
    if Console(width=10_000).measure(table).maximum > width:
        table = _narrow_layer_table(report)
    parts = [_render(table)]
    if report.measures:
        parts.append(_render(_measure_table(report)))
    reasons: dict[str, list[str]] = {}
    for name, reason in report.left_out.items():
        reasons.setdefault(reason, []).append(name)
    if reasons:
        lines = [
            textwrap.fill(stated(names, reason), int(min(width, 160)), initial_indent="  ", subsequent_indent="    ")
            for reason, names in reasons.items()
        ]
        parts.append("\n".join(["Not measured:", *lines]))
    return "\n\n".join([*parts, _filled(_summary(report), width)])


def comparison(first: Record, second: Record, labels: tuple[str, str]) -> str:
    """Two reports side by side: worst norms of the layers, and the measures and margins if both have them.

    Args:
        first: A report.
        second: Another one, of the same architecture.
        labels: What to call the two.

    Returns:
        Two tables as text; a layer that only one of them has leaves the other's cells empty.
    """
    sides = [{layer.name: layer for layer in report.layers} for report in (first, second)]
    table = Table("layer", box=box.SIMPLE)
    for header in ("groups", *(f"worst {symbol}" for symbol in _SYMBOLS.values()), "off by"):
        for label in labels:
            table.add_column(f"{header}\n{label}", justify="right")
    for name in dict.fromkeys([*sides[0], *sides[1]]):
        pair = [side.get(name) for side in sides]
        cells = ["" if layer is None else str(layer.n_groups) for layer in pair]
        cells += ["" if layer is None else _number(layer.worst(norm)) for norm in _SYMBOLS for layer in pair]
        cells += ["" if layer is None else _off_by(layer) for layer in pair]
        table.add_row(name, *cells)
    parts = [_render(table)]
    if first.measures and second.measures:
        parts.append(_render(_measures_of_both(first, second, labels)))
    if first.margin is not None and second.margin is not None:
        parts.append(f"Margins: {labels[0]} {first.margin:.3g}, {labels[1]} {second.margin:.3g}.")
    return "\n\n".join(parts)


def _measures_of_both(first: Record, second: Record, labels: tuple[str, str]) -> Table:
    sums = Table("log measure", "scaling", *labels, box=box.SIMPLE)
    pairs = [(mine, second.measure(mine.name, mine.scaling)) for mine in first.measures]
    for mine, theirs in pairs:
        sums.add_row(mine.name, mine.heading, f"{mine.value:.2f}", f"{theirs.value:.2f}")
    for mine, theirs in pairs:
        if mine.margin_value is not None and theirs.margin_value is not None:
            by_margin = f"{mine.heading}, by the margin"
            sums.add_row(mine.name, by_margin, f"{mine.margin_value:.2f}", f"{theirs.margin_value:.2f}")
    return sums


def _layer_table(report: Record) -> Table:
    show_operator = any(layer.operator_norm is not None for layer in report.layers)
    show_tau = any(layer.tau is not None for layer in report.layers)
    headers = ["layer", "shape", "on", "groups", *(f"{s} worst / median" for s in _SYMBOLS.values()), "‖W‖2"]
    headers += ["conv norm <="] * show_operator + ["off by", "feasible"] + ["τ > 1"] * show_tau
    table = Table(*headers, box=box.SIMPLE)
    for column in table.columns[3:]:
        column.justify = "right"
    for layer in report.layers:
        cells = [
            layer.name if len(layer.names) == 1 else f"{layer.name} (also {', '.join(layer.names[1:])})",
            "x".join(map(str, layer.shape)),
            layer.manifolds or layer.kind,
            str(layer.n_groups),
            *(_worst_median(layer, norm) for norm in _SYMBOLS),
            _number(float(layer.layer.spectral)),
        ]
        cells += [_number(layer.operator_norm)] * show_operator
        cells += [_off_by(layer), "" if layer.feasible is None else "yes" if layer.feasible else "NO"]
        cells += ["" if layer.tau is None else f"{layer.tau.share_above_one:.0%}"] * show_tau
        table.add_row(*cells)
    return table


def _narrow_layer_table(report: Record) -> Table:
    table = Table("layer", "groups", *(f"worst {symbol}" for symbol in _SYMBOLS.values()), "off by", box=box.SIMPLE)
    for column in table.columns[1:]:
        column.justify = "right"
    for layer in report.layers:
        worst = (_number(layer.worst(norm)) for norm in _SYMBOLS)
        table.add_row(layer.name, str(layer.n_groups), *worst, _off_by(layer))
    return table


def _filled(text: str, width: float) -> str:
    """The lines of a text, wrapped to a width."""
    if width == math.inf:
        return text
    return "\n".join(textwrap.fill(line, int(width), subsequent_indent="  ") for line in text.splitlines())


def _measure_table(report: Record) -> Table:
    columns = list(dict.fromkeys(measure.heading for measure in report.measures))
    if report.margin is not None and report.margin > 0:
        columns += [f"{column}, margin {report.margin:.3g}" for column in columns]
    table = Table(f"log measure, N = {report.n_samples:,}", *columns, box=box.SIMPLE)
    for column in table.columns[1:]:
        column.justify = "right"
    for name in dict.fromkeys(measure.name for measure in report.measures):
        found = [measure for measure in report.measures if measure.name == name]
        values = [m.value for m in found] + [m.margin_value for m in found if m.margin_value is not None]
        table.add_row(name, *(f"{value:.2f}" for value in values))
    return table


def _summary(report: Record) -> str:
    constrained = [layer for layer in report.layers if layer.feasible is not None]
    n_groups = sum(layer.n_groups for layer in report.layers)
    lines = [f"{len(constrained)} of {len(report.layers)} layers under constraints; {n_groups:,} groups."]
    off = [layer for layer in constrained if not layer.feasible]
    if off:
        worst = max(off, key=lambda layer: cast(float, layer.violation))
        lines.append(f"NOT FEASIBLE: {len(off)} of them, the worst is {worst.name}, off by {worst.violation:.2g}.")
    elif constrained:
        worst_violation = max(cast(float, layer.violation) for layer in constrained)
        lines.append(f"All of them are feasible, off by {worst_violation:.1e} at most (relative).")
    if report.unfolded:
        remedy = "they are not fixed maps, or not used" if report.batch_norms else "pass fold=True to include them"
        lines.append(f"Norms and measures leave out {report.unfolded} batch normalisation(s): {remedy}.")
    if not report.measures:
        seen = ""
        if report.margin is not None:
            seen = f" The margin is {report.margin:.3g}, from {report.n_labelled:,} labelled samples."
        lines.append(f"There are no measures: pass n_samples, the number of training samples.{seen}")
    else:
        if not all(layer.one_block for layer in report.layers):
            lines.append(
                "The theorems apply to the layer form. The group form, a product over all groups, does not bound any "
                "norm of a layer: compare it only between models with the same groups."
            )
        if report.margin is not None and report.margin <= 0:
            lines.append(f"The margin is {report.margin:.3g}, not positive, so no measure can be divided by it.")
    return "\n".join(lines)


def _render(table: Table) -> str:
    console = Console(width=int(min(line_width(), 10_000)), color_system=None, force_terminal=False)
    with console.capture() as capture:
        console.print(table)
    return "\n".join(line.rstrip() for line in capture.get().splitlines() if line.strip())


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _worst_median(layer: LayerReport, norm: str) -> str:
    worst = _number(layer.worst(norm))
    return worst if layer.n_groups == 1 else f"{worst} / {_number(layer.median(norm))}"


def _off_by(layer: LayerReport) -> str:
    return "" if layer.violation is None else f"{layer.violation:.1e}"
