"""Wording that messages of several rooms share."""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Sequence

__all__ = ["few", "line_width"]


def few(names: Sequence[str], limit: int = 6) -> str:
    """The first of some names, and how many more there are.

    Args:
        names: Names, in the order to show them.
        limit: Number of names to show.

    Example:
        >>> few(["conv1", "conv2", "fc"], limit=2)
        'conv1, conv2 and 1 more'
    """
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


def line_width() -> float:
    """How many characters a line may have: those of the terminal; any number where the output is none.

    Tables of files and logs are as wide as it takes, so that each line is a row.
    """
    is_terminal = sys.stdout is not None and sys.stdout.isatty()
    return shutil.get_terminal_size().columns if is_terminal else math.inf
