"""The strategies PI, PO and PIO: which kind each cell of a layer's channel grid gets.

:mod:`fgo_geo.weights.grouping` explains the strategies. All of them are made of one operation, :func:`_assign`, which
assigns the members of many lines to K kinds in balanced shares, in index order or in random order. The result of
:func:`assign_kinds` is the kind numbers of cells that are grouped by output channel, those of cells that are grouped by
input channel, and a mask that distinguishes the two. Nothing loops over cells or groups.
"""

from __future__ import annotations

import hashlib
import json
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, SupportsIndex, TypeAlias, cast

import geoopt
import numpy as np
from numpy.typing import NDArray

from fgo_geo.weights.kinds import find, kind, names
from fgo_geo.weights.words import did_you_mean, small

__all__ = ["STRATEGIES", "Integers", "KindNumbers", "assign_kinds", "check_arguments"]

STRATEGIES = ("layer", "pi", "po", "pio")

Integers: TypeAlias = NDArray[np.integer[Any]]
_Orders: TypeAlias = Callable[[str, int, int], NDArray[np.intp]]


class KindNumbers(NamedTuple):
    """The arrays of a :class:`~fgo_geo.weights.grouping.Collection`, with its shapes.

    Attributes:
        by_output: True where cells are grouped by output channel.
        output_kinds: Kind numbers where ``by_output`` is True.
        input_kinds: Kind numbers where it is False.
    """

    by_output: NDArray[np.bool_]
    output_kinds: Integers
    input_kinds: Integers


def assign_kinds(arguments: Mapping[str, Any], in_index_order: bool = False) -> KindNumbers:
    """The kind of every cell, by the strategy of a collection.

    Args:
        arguments: What :func:`check_arguments` returned.
        in_index_order: Take halves and shares in index order for every selection.

    Returns:
        The arrays of a collection.

    Example:
        >>> made = assign_kinds(check_arguments(2, 4, "pi", ("sphere", "stiefel"), "deterministic", 0, "kernel", ""))
        >>> made.input_kinds.tolist()
        [[0, 0, 0, 0], [1, 1, 1, 1]]
    """
    is_random = arguments["selection"] == "random" and not in_index_order
    orders = _random_orders(arguments["seed"], arguments["name"]) if is_random else _index_orders
    rows, columns, strategy = arguments["out_channels"], arguments["in_channels"], arguments["strategy"]
    n_kinds = len(arguments["kinds"])
    if arguments["components"] == "filter":
        by_output = _first_half(rows, "pi" if strategy == "layer" else strategy, orders)[:, None]
        n_rows = int(by_output.sum())
        output_kinds, input_kinds = np.zeros((2, rows, 1), np.min_scalar_type(n_kinds - 1))
        output_kinds[by_output] = _assign("rows", 1, n_rows, n_kinds, orders)[0]
        input_kinds[~by_output] = _assign("filters", 1, rows - n_rows, n_kinds, orders, assigned=n_rows)[0]
    elif arguments["components"] == "block" or strategy == "layer":
        by_output = _first_half(rows, strategy, orders)[:, None]
        n_rows = int(by_output.sum())
        output_kinds = np.zeros((rows, 1), np.min_scalar_type(n_kinds - 1))
        output_kinds[by_output] = _assign("rows", 1, n_rows, n_kinds, orders)[0]
        input_kinds = _assign("columns", 1, columns, n_kinds, orders, assigned=n_rows)
    else:
        by_output = _first_half(columns, strategy, orders)[None, :]
        if strategy == "po":
            output_kinds = _assign("rows", rows, columns, n_kinds, orders)
            input_kinds = np.zeros((1, columns), output_kinds.dtype)
        else:
            n_rows = rows if strategy == "pio" else 0
            output_kinds = np.zeros((rows, 1), np.min_scalar_type(n_kinds - 1))
            output_kinds[:n_rows, 0] = _assign("rows", 1, n_rows, n_kinds, orders)[0]
            by_input = ~by_output[0]
            input_kinds = np.zeros((rows, columns), output_kinds.dtype)
            input_kinds[:, by_input] = _assign("columns", int(by_input.sum()), rows, n_kinds, orders, assigned=n_rows).T
    return KindNumbers(by_output, output_kinds, input_kinds)


def _first_half(channels: int, strategy: str, orders: _Orders) -> NDArray[np.bool_]:
    """Which channels' cells are grouped by output channel: none, half, or all of them."""
    size = {"pi": 0, "pio": (channels + 1) // 2}.get(strategy, channels)
    mask = np.zeros(channels, np.bool_)
    mask[orders("first half", 1, channels)[0, :size]] = True
    return mask


def _assign(purpose: str, lines: int, members: int, n_kinds: int, orders: _Orders, assigned: int = 0) -> Integers:
    """Assign the members of every line to the kinds in balanced shares.

    Every kind gets ``members // n_kinds`` members of a line. The ``members % n_kinds`` extra ones
    go to the kinds in turn: each line continues with the kind after the last one that got one.

    Args:
        purpose: What the lines are, so that random draws for different purposes are independent.
        lines: Number of lines.
        members: Number of members of each line.
        n_kinds: Number of kinds K.
        orders: The order in which lines take their turns and members fall into shares.
        assigned: Number of members that were assigned before the first line.

    Returns:
        Kind number of every member, shape ``(lines, members)``.
    """
    extra = members % n_kinds
    kinds = np.arange(n_kinds, dtype=np.min_scalar_type(n_kinds - 1))
    sorted_line = np.empty((n_kinds, members), kinds.dtype)
    for turn in range(n_kinds):
        shares = members // n_kinds + ((np.arange(n_kinds) - turn) % n_kinds < extra)
        sorted_line[turn] = np.repeat(kinds, shares)
    turns = (assigned + orders(f"turns of {purpose}", 1, lines)[0] * extra) % n_kinds
    result = np.empty((lines, members), kinds.dtype)
    np.put_along_axis(result, orders(purpose, lines, members), sorted_line[turns], axis=1)
    return result


def _index_orders(purpose: str, lines: int, members: int) -> NDArray[np.intp]:
    """The members of each line in index order, for every purpose; shape ``(lines, members)``."""
    return np.broadcast_to(np.arange(members), (lines, members))


def _random_orders(seed: int, name: str) -> _Orders:
    """A function that draws one permutation per line, independent for every purpose.

    A permutation sorts 64-bit words of PCG64's raw stream, which NumPy guarantees for a fixed seed
    (it guarantees no method of ``Generator``). The generator is seeded by the SHA-256 of the
    collection's seed, its name and the purpose. Two of a thousand words are equal with probability 3e-14.
    """

    def orders(purpose: str, lines: int, members: int) -> NDArray[np.intp]:
        key = hashlib.sha256(json.dumps([seed, name, purpose]).encode()).digest()
        words = np.random.PCG64(int.from_bytes(key, "big")).random_raw(lines * members)
        return np.argsort(words.reshape(lines, members), axis=1)  # a stable sort takes five times as long

    return orders


def check_arguments(
    out_channels: object,
    in_channels: object,
    strategy: object,
    kinds: object,
    selection: object,
    seed: object,
    components: object,
    name: object,
) -> dict[str, Any]:
    """The arguments of :func:`fgo_geo.grouping.collection`, checked and in canonical form, by name.

    Raises:
        TypeError: A number of channels or the seed is not an integer, or the name is not a string.
        ValueError: A number of channels is below 1, a word is unknown, or there are no manifolds, or several for
            ``"layer"``.
    """
    if strategy not in STRATEGIES and find(strategy) is not None:
        raise ValueError(
            f"strategy must be one of {STRATEGIES}, got {strategy!r}, which is a manifold kind: pass it as manifolds, "
            f"e.g. strategy='layer', manifolds={strategy!r}"
        )
    strategy = _choice("strategy", strategy, STRATEGIES)
    if isinstance(kinds, (str, geoopt.Manifold, type)):
        kinds = (kinds,)
    if not isinstance(kinds, Sequence) or not kinds:
        raise ValueError(f"manifolds must name at least one of {names()}, got {kinds!r}")
    words = cast("Sequence[object]", kinds)
    if strategy == "layer" and len(words) > 1:
        raise ValueError(
            f"strategy 'layer' puts the whole layer on one manifold, got {len(words)} manifolds: "
            "pass one of them, or use strategy 'pi', 'po' or 'pio'"
        )
    if not isinstance(name, str):
        raise TypeError(f"name must be a string, the layer's name, got {name!r}")
    return {
        "out_channels": _integer("out_channels", out_channels, least=1),
        "in_channels": _integer("in_channels", in_channels, least=1),
        "strategy": strategy,
        "kinds": tuple(kind(word).name for word in words),
        "selection": _choice("selection", selection, ("deterministic", "random")),
        "seed": _integer("seed", seed),
        "components": _choice("components", components, ("kernel", "block", "filter")),
        "name": name,
    }


def _choice(what: str, word: object, choices: tuple[str, ...]) -> str:
    """The word in small letters, which must be one of the choices."""
    if small(word) not in choices or not isinstance(word, str):
        raise ValueError(f"{what} must be one of {choices}, got {word!r}{did_you_mean(word, choices)}")
    return small(word)


def _integer(what: str, number: object, least: int | None = None) -> int:
    """The number as an int, which must be at least ``least``."""
    if isinstance(number, bool) or not isinstance(number, SupportsIndex):
        raise TypeError(f"{what} must be an integer, got {number!r}")
    integer = operator.index(number)
    if least is not None and integer < least:
        raise ValueError(f"{what} must be at least {least}, got {integer}")
    return integer
