"""A report as text: tables of its layers and measures, alone or next to those of another report."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import cast

from rich import box
from rich.console import Console
from rich.table import Table

from fgo_geo.measures.report.record import LayerReport, Record
from fgo_geo.weights.words import globs, line_width, stated

__all__ = ["comparison", "tables"]

_SYMBOLS = {"frobenius": "‖·‖F", "spectral": "‖·‖2", "two_to_one": "‖·‖2→1"}
_MEDIAN = " / median"
_UNFOLDED = 32  # characters of a layer's name; longer ones may take several lines before a column is hidden
_LEAST_NEEDED_FIRST = (
    *("on", "shape", _MEDIAN, "‖W‖2", "conv norm <=", "τ > 1", "feasible"),
    *("groups", f"{_SYMBOLS['frobenius']} worst", f"{_SYMBOLS['two_to_one']} worst", "off by"),
)


def tables(report: Record) -> str:
    """Tables of the layers, the measures and the omitted parameters, and a summary.

    Args:
        report: A report.

    Returns:
        Text of several lines. The table is as wide as its content; on a terminal that is too narrow it has fewer
        columns, and a remark names the others.
    """
    width = line_width()
    parts = [_fitted(_layer_columns(report), width)]
    if report.measures:
        parts.append(_render(_measure_table(report)))
    reasons: dict[str, list[str]] = {}
    for name, reason in report.left_out.items():
        reasons.setdefault(reason, []).append(name)
    if reasons:
        known = [*report.left_out, *(name for layer in report.layers for name in layer.names)]
        lines = [stated(names, reason, globs(names, known)) for reason, names in reasons.items()]
        columns = int(min(width, 160))
        lines = [textwrap.fill(line, columns, initial_indent="  ", subsequent_indent="    ") for line in lines]
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
    names = list(dict.fromkeys([*sides[0], *sides[1]]))
    cell_of: dict[str, Callable[[LayerReport], str]] = {"groups": lambda layer: str(layer.n_groups)}
    cell_of |= {f"{symbol} worst": partial(_worst, norm=norm) for norm, symbol in _SYMBOLS.items()}
    columns = {"layer": names}
    for header, cell in (cell_of | {"off by": _off_by}).items():
        for label, side in zip(labels, sides, strict=True):
            columns[f"{header}\n{label}"] = [cell(side[name]) if name in side else "" for name in names]
    parts = [_fitted(columns, line_width())]
    if first.measures and second.measures:
        parts.append(_render(_measures_of_both(first, second, labels)))
    if first.margin is not None and second.margin is not None:
        parts.append(f"Margins: {labels[0]} {first.margin:.3g}, {labels[1]} {second.margin:.3g}.")
    return "\n\n".join(parts)


def _measures_of_both(first: Record, second: Record, labels: tuple[str, str]) -> Table:
    sums = Table("log measure\n(smaller is better)", "scaling", *labels, box=box.SIMPLE)
    pairs = [(mine, second.measure(mine.name, mine.scaling)) for mine in first.measures]
    for mine, theirs in pairs:
        sums.add_row(mine.name, mine.heading, f"{mine.value:.2f}", f"{theirs.value:.2f}")
    for mine, theirs in pairs:
        if mine.margin_value is not None and theirs.margin_value is not None:
            by_margin = f"{mine.heading}, by the margin"
            sums.add_row(mine.name, by_margin, f"{mine.margin_value:.2f}", f"{theirs.margin_value:.2f}")
    return sums


def _layer_columns(report: Record) -> dict[str, list[str]]:
    """The cells of every column by its header."""
    layers = report.layers
    columns = {
        "layer": [n.name if len(n.names) == 1 else f"{n.name} (also {', '.join(n.names[1:])})" for n in layers],
        "shape": ["x".join(map(str, layer.shape)) for layer in layers],
        "on": [layer.manifolds or layer.kind for layer in layers],
        "groups": [str(layer.n_groups) for layer in layers],
    }
    for norm, symbol in _SYMBOLS.items():
        columns[f"{symbol} worst{_MEDIAN}"] = [_worst_median(layer, norm) for layer in layers]
    columns["‖W‖2"] = [_number(float(layer.layer.spectral)) for layer in layers]
    if any(layer.operator_norm is not None for layer in layers):
        columns["conv norm <="] = [_number(layer.operator_norm) for layer in layers]
    columns["off by"] = [_off_by(layer) for layer in layers]
    columns["feasible"] = ["" if n.feasible is None else "yes" if n.feasible else "NO" for n in layers]
    if any(layer.tau is not None for layer in layers):
        columns["τ > 1"] = ["" if n.tau is None else f"{n.tau.share_above_one:.0%}" for n in layers]
    return columns


def _fitted(columns: dict[str, list[str]], width: float) -> str:
    """A table of as many columns as fit into a width, and a remark on those that do not.

    Args:
        columns: The cells of every column by its header, of which a second line may name one of two reports.
        width: The width of the terminal.
    """
    shown, hidden = columns, dict[str, str]()
    for least_needed in _LEAST_NEEDED_FIRST:
        if _width(shown | {"layer": [name[:_UNFOLDED] for name in shown["layer"]]}) <= width:
            break
        left = {header: cells for header, cells in shown.items() if header.partition("\n")[0] != least_needed}
        if least_needed == _MEDIAN:
            pairs = {
                header: [cell.partition(" / ")[0] for cell in shown[header]] for header in shown if _MEDIAN in header
            }
            left = {header.replace(_MEDIAN, ""): pairs.get(header, cells) for header, cells in shown.items()}
        if left.keys() != shown.keys():
            shown, hidden[least_needed] = left, "medians" if least_needed == _MEDIAN else least_needed
    text = _render(_table(shown))
    if not hidden:
        return text
    remark = (
        f"Hidden at {int(width)} characters: {', '.join(hidden.values())}. Set the environment variable "
        f"COLUMNS={_width(columns)} to print them."
    )
    return f"{text}\n\n{_filled(remark, width)}"


def _table(columns: Mapping[str, Sequence[str]]) -> Table:
    table = Table(box=box.SIMPLE)
    for header in columns:
        is_text = header in ("layer", "shape", "on")
        table.add_column(header, justify="left" if is_text else "right", no_wrap=not is_text, overflow="fold")
    for cells in zip(*columns.values(), strict=True):
        table.add_row(*cells)
    return table


def _width(columns: Mapping[str, Sequence[str]]) -> int:
    return Console(width=10_000).measure(_table(columns)).maximum


def _filled(text: str, width: float) -> str:
    """The lines of a text, wrapped to a width."""
    if width == math.inf:
        return text
    return "\n".join(textwrap.fill(line, int(width), subsequent_indent="  ") for line in text.splitlines())


def _measure_table(report: Record) -> Table:
    columns = list(dict.fromkeys(measure.heading for measure in report.measures))
    if report.margin is not None and report.margin > 0:
        columns += [f"{column}, margin {report.margin:.3g}" for column in columns]
    table = Table(f"log measure, N = {report.n_samples:,}\n(smaller is better)", *columns, box=box.SIMPLE)
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


def _worst(layer: LayerReport, norm: str) -> str:
    return _number(layer.worst(norm))


def _worst_median(layer: LayerReport, norm: str) -> str:
    worst = _worst(layer, norm)
    return worst if layer.n_groups == 1 else f"{worst} / {_number(layer.median(norm))}"


def _off_by(layer: LayerReport) -> str:
    return "" if layer.violation is None else f"{layer.violation:.1e}"
