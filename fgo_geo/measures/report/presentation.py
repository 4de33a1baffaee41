"""The report as people use it: printed, compared with another, drawn, written to files.

:class:`Report` adds this to the numbers of a :class:`~fgo_geo.measures.report.record.Record`.
:mod:`~fgo_geo.measures.report.table` makes the text and :mod:`~fgo_geo.measures.report.plot` the picture; both read
numbers only.
"""

from __future__ import annotations

import json
import math
import os
import reprlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from fgo_geo.measures.report.plot import draw
from fgo_geo.measures.report.record import Record
from fgo_geo.measures.report.table import comparison, tables

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

__all__ = ["Report"]


@dataclass(frozen=True, eq=False)
class Report(Record):
    """The norms, feasibility and measures of a model. ``print(report)`` shows them as a table."""

    def __repr__(self) -> str:
        """A summary in one line."""
        state = "feasible" if self.feasible else "NOT FEASIBLE"
        return f"<Report of {len(self.layers)} layers, {state}; {len(self.measures)} measures>"

    def __str__(self) -> str:
        """Tables of the layers and of the measures, and a list of the parameters that are left out."""
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
            TypeError: If ``other`` is not a report, or the labels are not two words.
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
        """Draw the norms of every layer's groups and, with measures, the factor of every layer in each measure.

        A line shows the range over a layer's groups, its thick part the middle half, and the dot the median.

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

    def to_json(self, path: str | os.PathLike[str] | None = None, *, indent: int | None = 2) -> str:
        """The same as JSON; the logarithm of zero, which JSON does not have, is the string ``"-inf"``.

        Args:
            path: A file to write it to as well, with a line break at its end.
            indent: Spaces per level; None for a single line.

        Returns:
            The text.

        Raises:
            TypeError: If ``path`` is not a path.
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
            raise ImportError("Report.to_dataframe needs pandas, which is not installed: pip install pandas") from error
        return pandas.DataFrame([layer.to_dict() for layer in self.layers]).set_index("name")


def _are_two_words(labels: Any) -> bool:
    return isinstance(labels, (tuple, list)) and len(labels) == 2 and all(isinstance(word, str) for word in labels)


def _file_in_a_folder(path: str | os.PathLike[str]) -> Path:
    """A path whose folder exists and which is not a folder itself."""
    file = Path(path)
    if file.is_dir():
        raise IsADirectoryError(
            f"to_json: path is {os.fspath(path)!r}, which is a folder; expected the name of a file, e.g. "
            f"{str(file / 'report.json')!r}"
        )
    if not file.parent.is_dir():
        raise FileNotFoundError(
            f"to_json: path is {os.fspath(path)!r}, and there is no folder {str(file.parent)!r}; create it first, or "
            "write to another folder"
        )
    return file


def _json_numbers(value: Any) -> Any:
    """Plain data with non-finite numbers as strings."""
    if isinstance(value, dict):
        return {key: _json_numbers(item) for key, item in cast("dict[str, Any]", value).items()}
    if isinstance(value, list):
        return [_json_numbers(item) for item in cast("list[Any]", value)]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
