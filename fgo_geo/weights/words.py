"""Wording that messages of several packages share, and arguments that are words or whole numbers.

Words such as ``"stiefel"``, ``"PIO"`` or ``"H1"`` may mix upper and lower case: :func:`small` converts them.
"""

from __future__ import annotations

import difflib
import fnmatch
import math
import operator
import os
import re
import shutil
import sys
from collections.abc import Iterable, Sequence
from typing import TypeVar

__all__ = [
    "counted_globs",
    "described",
    "did_you_mean",
    "few",
    "globs",
    "line_width",
    "small",
    "stated",
    "whole_number",
]

_Word = TypeVar("_Word")


def small(word: _Word) -> _Word:
    """A word in small letters; anything else as it is.

    Example:
        >>> small("PIO"), small(0.5)
        ('pio', 0.5)
    """
    return word.casefold() if isinstance(word, str) else word  # pyright: ignore[reportReturnType]


def whole_number(argument: object) -> int | None:
    """An integer of any type, such as NumPy's; None for booleans and for anything else.

    Example:
        >>> whole_number(3), whole_number(True), whole_number(3.0)
        (3, None, None)
    """
    try:
        return None if isinstance(argument, bool) else operator.index(argument)  # pyright: ignore[reportArgumentType]
    except TypeError:
        return None


def described(argument: object) -> str:
    """An argument of the wrong type, as a message names it.

    Example:
        >>> described([]), described(None)
        ('an object of type list', 'None')
    """
    return "None" if argument is None else f"an object of type {type(argument).__name__}"


def did_you_mean(word: object, known: Iterable[str]) -> str:
    """A question to append to a message about an unknown word; empty if no known word or part of one resembles it.

    Args:
        word: The unknown word.
        known: The valid words.

    Example:
        >>> did_you_mean("steifel", ["sphere", "stiefel"])
        "; did you mean 'stiefel'?"
        >>> did_you_mean("sphere", ["ScaledSphere", "Stiefel"]), did_you_mean("Sphre", ["ScaledSphere", "Stiefel"])
        ("; did you mean 'ScaledSphere'?", "; did you mean 'ScaledSphere'?")
        >>> did_you_mean(3, ["sphere"])
        ''
    """
    if not isinstance(word, str) or not word:
        return ""
    by_small = {small(name): name for name in known}
    found = [name for key, name in by_small.items() if key == small(word)]
    found = found or [name for key, name in by_small.items() if len(word) > 2 and small(word) in key]
    found = found or [by_small[key] for key in difflib.get_close_matches(small(word), by_small)]
    found = found or [name for name in by_small.values() if difflib.get_close_matches(small(word), _parts(name))]
    return f"; did you mean {' or '.join(map(repr, found[:2]))}?" if found else ""


def _parts(name: str) -> list[str]:
    """The words of a name such as ``ScaledSphere`` or ``plan_of``, in small letters."""
    return [part.casefold() for part in re.findall("[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)]


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


def counted_globs(names: Sequence[str], known: Iterable[str], *, partly: bool = False) -> dict[str, str]:
    """For each name itself, or the glob that stands for it and at least two others, with their number.

    Args:
        names: Names.
        known: All names; a glob that fits others of these is not used.
        partly: For names that no glob stands for and that differ in one number, list their numbers in braces, unless
            there are too many to list.

    Example:
        >>> known = [f"{i}.weight" for i in range(4)]
        >>> counted_globs(known, known)["0.weight"], counted_globs(known[1:], known)["1.weight"]
        ('*.weight (4)', '1.weight')
        >>> counted_globs(known[1:], known, partly=True)["1.weight"]
        '{1-3}.weight (3)'
    """
    known, labels = list(known), {name: name for name in names}

    def unlabelled(family: Sequence[str]) -> list[str]:
        return [name for name in family if labels.get(name) == name]

    families: dict[str, list[str]] = {}  # by glob, the names that differ in the numbers that it leaves open alone
    for name in labels:
        for glob in _globs_of(name):
            families.setdefault(glob, []).append(name)
    by_size = sorted((family for family in families.items() if len(family[1]) > 2), key=lambda f: -len(f[1]))
    for glob, family in by_size:
        members = unlabelled(family)
        if len(members) > 2 and len(members) == len(fnmatch.filter(known, glob)):
            labels |= dict.fromkeys(members, f"{glob} ({len(members)})")
    for glob, family in by_size if partly else ():
        members = unlabelled(family)
        before, _, after = glob.partition("*")
        if len(members) < 3 or "*" in after:
            continue
        numbers = _listed([name[len(before) : len(name) - len(after)] for name in members])
        if len(numbers) <= _LONGEST_LIST:
            labels |= dict.fromkeys(members, f"{before}{{{numbers}}}{after} ({len(members)})")
    return labels


_LONGEST_LIST = 24  # characters in braces; other rows are printed one by one


def _globs_of(name: str) -> list[str]:
    """The name with all of its numbers replaced by stars, all but the last, or one."""
    parts = re.split(r"(\d+)", name)
    numbers = range(1, len(parts), 2)
    choices = [numbers, numbers[:-1], *((number,) for number in numbers)]
    found = ["".join("*" if k in chosen else part for k, part in enumerate(parts)) for chosen in choices]
    return [glob for glob in dict.fromkeys(found) if glob != name]


def _listed(numbers: Sequence[str]) -> str:
    """Numbers, of which three and more that follow each other are written as ``first-last``."""
    runs: list[list[str]] = []
    for number in sorted(numbers, key=lambda n: (int(n), n)):
        if runs and number == str(int(runs[-1][-1]) + 1):
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 2 else ",".join(run) for run in runs)


def globs(names: Sequence[str], known: Iterable[str], limit: int = 20) -> str:
    """Names as :func:`few`; of more than six, those that differ in numbers alone are shown as a glob and their number.

    Args:
        names: Names, in the order to show them.
        known: All names; a glob that fits others of these is not used.
        limit: Number of names and globs to show; the names behind the others are counted.

    Example:
        >>> biases = [f"layers.{i}.ln_{j}.bias" for i in range(4) for j in (1, 2)]
        >>> globs(["head.bias", *biases], ["head.bias", *biases, "layers.0.fc.bias"])
        'head.bias, layers.*.ln_*.bias (8)'
        >>> globs([f"{i}.bias" for i in range(7)], [*(f"{i}.bias" for i in range(7)), "head.bias"])
        '0.bias, 1.bias, 2.bias, 3.bias, 4.bias, 5.bias, 6.bias'
        >>> globs(["head.bias", *biases], ["head.bias", *biases], limit=1)
        'head.bias and 8 more'
    """
    if len(names) <= 6:
        return ", ".join(names)
    labels = counted_globs(names, known)
    shown = list(dict.fromkeys(labels.values()))[:limit]
    hidden = sum(label not in shown for label in labels.values())
    return ", ".join(shown) + (f" and {hidden} more" if hidden else "")


def stated(names: Sequence[str], predicate: str, shown: str | None = None) -> str:
    """A statement about each of some names.

    Args:
        names: Names, in the order to show them.
        predicate: What holds for each, from its verb on.
        shown: Text that stands for the names; the first six by default.

    Example:
        >>> stated(["bias"], "has one dimension"), stated(["0.bias", "2.bias"], "has one dimension")
        ('bias: has one dimension', '0.bias, 2.bias: each has one dimension')
    """
    each = "each " if len(names) > 1 and not predicate.startswith("cannot ") else ""
    return f"{few(names) if shown is None else shown}: {each}{predicate}"


def line_width() -> float:
    """The number of characters that a line may have: the width of the terminal, or infinity for other outputs.

    Tables in files and logs are therefore as wide as their rows. The environment variable ``COLUMNS`` sets the width of
    both.
    """
    columns = os.environ.get("COLUMNS", "")
    if columns.isdecimal() and int(columns) > 0:
        return int(columns)
    is_terminal = sys.stdout is not None and sys.stdout.isatty()
    return shutil.get_terminal_size().columns if is_terminal else math.inf
