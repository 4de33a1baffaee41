"""Kinds of flags: what a flag's value may be, and what is said when it is not.

Each is the annotation of a field of :mod:`training.settings`, for tyro. ``auto`` stands for None.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from tyro.constructors import PrimitiveConstructorSpec


def flag(parse: Callable[[str], Any], metavar: str, has_auto: bool = True) -> Any:
    """A flag with one value, whose parser says what it expected; ``auto`` stands for None."""
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=lambda words: None if has_auto and words[0] == "auto" else parse(words[0]),
        is_instance=lambda value: True,
        str_from_instance=lambda value: ["auto" if value is None else str(value)],
    )


def _number(convert: Callable[[str], Any], accepts: Callable[[Any], bool], expected: str) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            value = convert(text)
        except ValueError:
            value = math.nan
        if not accepts(value):
            raise ValueError(f"expected {expected}, got {text!r}")
        return value

    return parse


def one_of(names: Sequence[str]) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text in names:
            return text
        near = difflib.get_close_matches(text, names, 1)
        raise ValueError(
            f"expected one of {', '.join(names)}, got {text!r}" + (f": did you mean {near[0]}?" if near else "")
        )

    return parse


def choice(*names: str) -> Any:
    return flag(one_of(names), "{" + ",".join(names) + "}", has_auto="auto" not in names)


def several(names: Sequence[str], metavar: str) -> Any:
    def parse(words: list[str]) -> tuple[str, ...]:
        return tuple(map(one_of(names), filter(None, re.split(r"[,\s]+", " ".join(words)))))

    return PrimitiveConstructorSpec(
        nargs="*",
        metavar=metavar,
        instance_from_str=lambda words: None if words == ["auto"] else parse(words),
        is_instance=lambda value: True,
        str_from_instance=lambda value: ["auto"] if value is None else list(value),
    )


def radius_or_rule(text: str) -> str | float:
    if text in ("kaiming", "unit", "bound"):
        return text
    return _number(float, lambda x: 0 < x < math.inf, "kaiming, unit, bound or a positive number")(text)


def device_name(text: str) -> str:
    """Check a device by making a tensor there."""
    try:
        torch.empty(0, device=text)
    except (AssertionError, RuntimeError) as error:
        raise ValueError(f"cannot use {text!r}: {str(error).splitlines()[0]}") from error
    return text


_positive = _number(float, lambda x: 0 < x < math.inf, "a positive number")
Positive = Annotated[float, flag(_positive, "X")]
PositiveOrAuto = Annotated[float | None, flag(_positive, "X")]
NotNegative = Annotated[float, flag(_number(float, lambda x: 0 <= x < math.inf, "a number from 0"), "X")]
BelowOne = Annotated[float, flag(_number(float, lambda x: 0 <= x < 1, "a number from 0 and below 1"), "X")]
Share = Annotated[float, flag(_number(float, lambda x: 0 < x <= 1, "a number above 0 and up to 1"), "X")]
_count = _number(int, lambda x: x >= 1, "a whole number from 1")
Count = Annotated[int, flag(_count, "N")]
CountOrAuto = Annotated[int | None, flag(_count, "N")]
Natural = Annotated[int, flag(_number(int, lambda x: x >= 0, "a whole number from 0"), "N")]
Seed = Annotated[int, flag(_number(int, lambda x: 0 <= x < 2**63, "a whole number from 0 and below 2**63"), "N")]
FolderOrAuto = Annotated[Path | None, flag(Path, "FOLDER")]
