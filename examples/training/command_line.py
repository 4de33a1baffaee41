"""Settings from flags, YAML files and methods.

Flags come after the files of ``--config``, and these after the flags that a method stands for
(:mod:`training.methods`): the last one counts.
"""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import tyro
import yaml

from training import processes
from training.flag_types import one_of
from training.methods import METHODS
from training.settings import Settings, SettingsError, resolve

FLAGS = {f.name: f for part in fields(Settings) for f in fields(part.default_factory)}  # pyright: ignore

# Indented throughout, since tyro joins other lines.
DESCRIPTION = """Train an image classifier whose weights live on manifolds.

  --method NAME stands for the flags of a row of the paper's Table 3:
  {methods}.
  --config FILE reads flags from a YAML file, e.g. the run.yaml of another run.
  Flags count more than the file, and the file more than the method.

  {prog}
  {prog} --method pio --seed 1
  {prog} --data fashion --manifolds stiefel,sphere --lr 0.1
  {prog} --config run.yaml --seed 2
  torchrun --nproc-per-node 8 {prog} --data imagefolder
"""


def parse(arguments: Sequence[str] | None = None, prog: str = "train.py", first: Sequence[str] = ()) -> Settings:
    """Read the settings from the command line (``sys.argv`` if None); whatever is wrong ends the program.

    Args:
        arguments: Words of the command line.
        prog: Name of the program in messages.
        first: Words that all others override.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        words, files = _take(words, "--config")
        of_files = [flag for file in files for flag in words_of(_read_yaml(Path(file)))]
        of_files, methods = _take(of_files, "--method")
        words, chosen = _take(words, "--method")
        of_methods = [flag for name in (chosen or methods)[-1:] for flag in method_words(name)]
        # tyro takes the last of two flags of one name.
        all_words = [*first, *of_methods, *of_files, *words]
    except SettingsError as error:
        fail(error)
    settings = tyro.cli(
        Settings,
        args=_last_only(all_words),
        prog=prog,
        description=DESCRIPTION.format(methods=_wrapped(METHODS), prog=prog),
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.HelptextFromCommentsOff),
    )
    try:
        return resolve(settings)
    except SettingsError as error:
        fail(error)


def fail(error: Exception | str) -> Any:
    """End the program with a message, as a bad flag does."""
    if processes.is_first():
        print(f"error: {error}", file=sys.stderr)
    raise SystemExit(2)


def words_of(flags: Mapping[str, Any]) -> list[str]:
    """Words of a command line for settings by name, as in a YAML file.

    Raises:
        SettingsError: If a name is none of a flag; the message has the nearest one.
    """
    words: list[str] = []
    for key, value in flags.items():
        name = str(key).replace("-", "_")
        if name not in FLAGS and name != "method":
            near = difflib.get_close_matches(name, [*FLAGS, "method"], 1)
            raise SettingsError(f"unknown setting {key!r}" + (f": did you mean {near[0]}?" if near else ""))
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool) and name in _SPECS:
            words += [flag, "on" if value else "off"]  # what YAML takes `amp: off` for
        elif isinstance(value, bool):
            words.append(flag if value else f"--no-{flag[2:]}")
        elif isinstance(value, list | tuple):
            words += [flag, ",".join(map(str, value))]
        else:
            words += [flag, "auto" if value is None else str(value)]
    return words


def method_words(name: str) -> list[str]:
    """Words that a method stands for.

    Raises:
        SettingsError: If there is no such method.
    """
    try:
        return words_of(METHODS[one_of(list(METHODS))(name)].flags)
    except ValueError as error:
        raise SettingsError(f"--method: {error}") from error


def make(flags: Mapping[str, Any]) -> Settings:
    """Settings from names and values, as in a YAML file; ``method`` may be one of them.

    Raises:
        SettingsError: If something is wrong with them.
    """
    words = words_of({k: v for k, v in flags.items() if k != "method"})
    words = _last_only([*(method_words(flags["method"]) if "method" in flags else []), *words])
    values: dict[str, Any] = {}
    for block in _blocks(words):
        name = block[0].removeprefix("--").removeprefix("no-").replace("-", "_")
        spec = _SPECS.get(name)
        try:
            values[name] = spec.instance_from_str(block[1:]) if spec else not block[0].startswith("--no-")
        except ValueError as error:
            raise SettingsError(f"{name}: {error}") from error
    return resolve(Settings().with_(**values))


def _specs() -> dict[str, Any]:
    """The parsers of all flags that take a value, by name."""
    hints = {k: v for part in fields(Settings) for k, v in _hints_of(part.default_factory).items()}
    return {name: hint.__metadata__[0] for name, hint in hints.items() if hasattr(hint, "__metadata__")}


def _hints_of(part: Any) -> dict[str, Any]:
    return get_type_hints(part, include_extras=True)


_SPECS = _specs()


def _take(words: list[str], flag: str) -> tuple[list[str], list[str]]:
    """Remove a flag and its values; return the other words, and the values."""
    others, values, rest = [], [], iter(words)
    for word in rest:
        if word == flag:
            value = next(rest, None)
            if value is None:
                raise SettingsError(f"{flag} needs a value")
            values.append(value)
        elif word.startswith(flag + "="):
            values.append(word.partition("=")[2])
        else:
            others.append(word)
    return others, values


def _last_only(words: list[str]) -> list[str]:
    """Drop flags that come again later, so that lists are replaced and not joined."""
    blocks = list(_blocks(words))
    last = {_name(block): number for number, block in enumerate(blocks)}
    return [word for number, block in enumerate(blocks) if last[_name(block)] == number for word in block]


def _blocks(words: list[str]) -> Iterator[list[str]]:
    """Flags with their values."""
    block: list[str] = []
    for word in words:
        if word.startswith("--") and block:
            yield block
            block = []
        block.append(word)
    if block:
        yield block


def _name(block: list[str]) -> str:
    return block[0].partition("=")[0].replace("--no-", "--")


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"--config: cannot read {path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise SettingsError(f"--config: {path} is no YAML: {error}") from error
    if not isinstance(content, dict):
        raise SettingsError(f"--config: expected names and values in {path}, e.g. lr: 0.1")
    return {str(name): float(value) if _is_number(value) else value for name, value in content.items()}


def _is_number(value: Any) -> bool:
    """Whether YAML took a number such as 1e-4, which it wants with a point, for a word."""
    return isinstance(value, str) and re.fullmatch(r"[+-]?\d+e[+-]?\d+", value) is not None


def _wrapped(names: Mapping[str, Any]) -> str:
    lines = [""]
    for name in names:
        if len(lines[-1]) + len(name) > 70:
            lines.append("")
        lines[-1] += (", " if lines[-1] else "") + name
    return ",\n  ".join(lines)
