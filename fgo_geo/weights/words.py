"""Wording that messages of several rooms share, and words that are arguments.

Words such as ``"stiefel"``, ``"PIO"`` or ``"H1"`` are read in any case of letters, everywhere: :func:`small` is the one
place that says so.
"""

from __future__ import annotations

import difflib
import math
import shutil
import sys
from collections.abc import Iterable, Sequence
from typing import TypeVar

__all__ = ["did_you_mean", "few", "line_width", "small"]

_Word = TypeVar("_Word")


def small(word: _Word) -> _Word:
    """A word in small letters; anything else as it is.

    Example:
        >>> small("PIO"), small(0.5)
        ('pio', 0.5)
    """
    return word.casefold() if isinstance(word, str) else word  # pyright: ignore[reportReturnType]


def did_you_mean(word: object, known: Iterable[str]) -> str:
    """A question to append to a message about an unknown word; empty if no known word resembles it.

    Args:
        word: What was given.
        known: What would have been understood.

    Example:
        >>> did_you_mean("steifel", ["sphere", "stiefel"])
        "; did you mean 'stiefel'?"
        >>> did_you_mean("sphere", ["ScaledSphere", "Stiefel"])
        "; did you mean 'ScaledSphere'?"
        >>> did_you_mean(3, ["sphere"])
        ''
    """
    if not isinstance(word, str) or not word:
        return ""
    by_small = {small(name): name for name in known}
    found = [name for key, name in by_small.items() if key == small(word)]
    found = found or [name for key, name in by_small.items() if len(word) > 2 and small(word) in key]
    found = found or [by_small[key] for key in difflib.get_close_matches(small(word), by_small)]
    return f"; did you mean {' or '.join(map(repr, found[:2]))}?" if found else ""


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
