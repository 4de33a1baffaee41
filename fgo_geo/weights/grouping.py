"""Collections of groups: which kernels of a layer share a manifold kind and a step size.

The kernels of a layer with D output and C input channels form a D x C grid with one cell per
kernel (d, c). A *group* is a set of cells whose product manifold gets one step size; a *collection*
is a partition of the grid into groups, together with the manifold kind of each. The strategies of
[Ozay2019]_ (Figure 2; Mathematics, section 3) for K manifold kinds are

* ``"pi"``: every *input* channel (column) is split into K balanced subsets, one group per kind:
  C K groups;
* ``"po"``: every *output* channel (row) is split into K balanced subsets: D K groups;
* ``"pio"``: in one half of the columns every row is one group, and the kinds share these groups;
  the other half of the columns is grouped as in ``"pi"``: D + floor(C / 2) K groups;
* ``"layer"``: one group, one kind.

With *block components* (linear layers, 1x1 convolutions) the same strategies cut the matrix itself
into at most 2 K rectangles: ``"pi"`` splits the columns into K subsets, ``"po"`` the rows,
``"pio"`` does ``"po"`` on one half of the rows and ``"pi"`` on the other. Each group is one block,
and each block one component.

With *filter components* all weights of one output channel are one component, and a group is a set of output channels:
``"pi"`` splits them into K subsets, one group per kind; with ``"po"`` every output channel is a group, and the kinds
share these groups; ``"pio"`` does ``"po"`` on one half of the output channels and ``"pi"`` on the other.

How the pieces compose: :mod:`fgo_geo.weights.strategies` computes the kind of every cell, as three
arrays of about one byte per kernel. A :class:`Collection` stores these arrays, computes its groups,
which are rectangles of the grid, on demand, and writes itself as JSON. No code here loops over cells or
groups, or depends on weights, modules or manifold classes.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast, overload

import numpy as np
from numpy.typing import NDArray

from fgo_geo.weights.kinds import KindLike, UnregisteredKindError, find, kind, kinds, names
from fgo_geo.weights.strategies import STRATEGIES, Integers, KindNumbers, assign_kinds, check_arguments

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["MANIFOLD_KINDS", "STRATEGIES", "Collection", "Group", "collection"]

if TYPE_CHECKING:
    MANIFOLD_KINDS: tuple[str, ...]


def __getattr__(name: str) -> tuple[str, ...]:
    """``MANIFOLD_KINDS``: the names of the kinds of [Ozay2019]_, which are those that the fused sweeps know."""
    if name == "MANIFOLD_KINDS":
        return tuple(record.name for record in kinds() if record.code is not None)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


_JSON_VERSION = 1
_ARGUMENTS = (
    "out_channels",
    "in_channels",
    "strategy",
    "kinds",
    "selection",
    "seed",
    "components",
    "name",
)


@dataclass(frozen=True, eq=False)
class Group:
    """One group of a collection: the rectangle ``rows x columns`` of the channel grid.

    Attributes:
        manifold: The kind of the group's manifolds, a name of :mod:`fgo_geo.weights.kinds`.
        rows: The group's output channels, increasing.
        columns: The group's input channels, increasing.
    """

    manifold: str
    rows: NDArray[np.intp]
    columns: NDArray[np.intp]

    @property
    def size(self) -> int:
        """Number of cells; for kernel components, the number of kernels."""
        return len(self.rows) * len(self.columns)

    @property
    def index(self) -> NDArray[np.intp]:
        """The cells as (output, input) channel pairs, row by row, shape ``(size, 2)``."""
        return np.stack(np.meshgrid(self.rows, self.columns, indexing="ij"), axis=-1).reshape(-1, 2)


@dataclass(frozen=True, eq=False, repr=False)
class Collection:
    """A partition of a layer's D x C channel grid into groups, made by :func:`collection`.

    Attributes:
        out_channels: D, the number of output channels (rows of the grid).
        in_channels: C, the number of input channels (columns of the grid).
        strategy: One of :data:`STRATEGIES`.
        kinds: The K manifold kinds, in the order given. A *kind number* is an index into them.
        selection: ``"deterministic"`` or ``"random"``.
        seed: The seed of a random selection.
        components: ``"kernel"``, ``"block"`` or ``"filter"``.
        name: The layer's name; a random selection depends on it.
        by_output: True where cells are grouped by output channel, False where by input channel;
            shape ``(1, C)``, or ``(D, 1)`` for blocks, for filters and for ``"layer"``.
        output_kinds: Kind numbers where ``by_output`` is True, shape ``(D, C)`` or ``(D, 1)``.
        input_kinds: Kind numbers where ``by_output`` is False, shape ``(D, C)``, ``(1, C)``, or ``(D, 1)`` for filters.
    """

    out_channels: int
    in_channels: int
    strategy: str
    kinds: tuple[str, ...]
    selection: str
    seed: int
    components: str
    name: str
    by_output: NDArray[np.bool_]
    output_kinds: Integers
    input_kinds: Integers

    def __post_init__(self) -> None:
        """Make the arrays read-only."""
        for array in (self.by_output, self.output_kinds, self.input_kinds):
            array.setflags(write=False)

    @property
    def kind_of(self) -> Integers:
        """Kind number of every cell, shape ``(D, C)``; built on each access."""
        return self._on_grid(np.where(self.by_output, self.output_kinds, self.input_kinds))

    @property
    def group_of(self) -> Integers:
        """Group number of every cell, shape ``(D, C)``, in the smallest dtype that holds it.

        Each access builds it, in time and memory proportional to the number of cells.
        """
        keys, _ = self._keys_and_sizes
        number_of_key = np.zeros(int(keys[-1]) + 1, np.min_scalar_type(len(keys) - 1))
        number_of_key[keys] = np.arange(len(keys))
        return self._on_grid(number_of_key[self._key_of()])

    @property
    def group_kinds(self) -> Integers:
        """Kind number of every group, shape ``(len(groups),)``."""
        return (self._keys_and_sizes[0] % len(self.kinds)).astype(self.output_kinds.dtype)

    @property
    def group_sizes(self) -> Integers:
        """Number of cells of every group, shape ``(len(groups),)``."""
        return self._keys_and_sizes[1]

    @property
    def groups(self) -> Sequence[Group]:
        """The groups, as a lazy sequence: each is made when it is read."""
        return _Groups(len(self.group_sizes), self._group)

    # A group has a *line*, which is one channel, or all output channels (line 0) or input channels
    # (line 1) at once, and a kind. Its key is line * K + kind; groups are numbered by their keys.

    @property
    def _has_two_lines(self) -> bool:
        return self.components == "block" or (self.strategy == "layer" and not self._has_filters)

    @property
    def _has_filters(self) -> bool:
        return self.components == "filter"

    def _on_grid(self, numbers: Integers) -> Integers:
        """Numbers of the cells, or of the filters (D, 1), for every cell."""
        return np.repeat(numbers, self.in_channels, axis=1) if self._has_filters else numbers

    def _key_of(self) -> Integers:
        """Key of every cell, shape ``(D, C)``; of every filter, shape ``(D, 1)``."""
        rows, columns, n_kinds = self.out_channels, 1 if self._has_filters else self.in_channels, len(self.kinds)
        lines = np.arange(rows + columns)
        if self._has_two_lines:
            lines = lines >= rows
        first_keys = (lines * n_kinds).astype(np.min_scalar_type((rows + columns) * n_kinds))
        return np.where(
            self.by_output,
            first_keys[:rows, None] + self.output_kinds,
            first_keys[rows:] + self.input_kinds,
        )

    @cached_property
    def _keys_and_sizes(self) -> tuple[Integers, Integers]:
        """Key and number of cells of every group."""
        if self._has_two_lines:
            by_row, n_kinds = self.by_output[:, 0], len(self.kinds)
            output_counts = np.bincount(self.output_kinds[by_row, 0], minlength=n_kinds)
            input_counts = np.bincount(self.input_kinds[0], minlength=n_kinds)
            sizes = np.concatenate((output_counts * self.in_channels, input_counts * int((~by_row).sum())))
        else:
            sizes = np.bincount(self._key_of().ravel()) * (self.in_channels if self._has_filters else 1)
        keys = np.flatnonzero(sizes)
        return keys, sizes[keys]

    def _group(self, number: int) -> Group:
        line, kind = divmod(int(self._keys_and_sizes[0][number]), len(self.kinds))
        rows, columns = np.arange(self.out_channels), np.arange(self.in_channels)
        if self._has_two_lines and line == 0:
            rows = rows[self.by_output[:, 0] & (self.output_kinds[:, 0] == kind)]
        elif self._has_two_lines:
            rows, columns = rows[~self.by_output[:, 0]], columns[self.input_kinds[0] == kind]
        elif self._has_filters:
            by_row = self.by_output[:, 0]
            rows = rows[line : line + 1] if line < len(rows) else rows[~by_row & (self.input_kinds[:, 0] == kind)]
        elif line < self.out_channels:
            columns = columns[self.by_output[0] & (self.output_kinds[line] == kind)]
            rows = rows[line : line + 1]
        else:
            columns = columns[line - self.out_channels :][:1]
            rows = rows[self.input_kinds[:, columns[0]] == kind]
        return Group(self.kinds[kind], rows, columns)

    def to_json(self) -> str:
        """Write the collection as JSON text, which :meth:`from_json` restores exactly.

        Besides the arguments it holds the kind numbers themselves, as compressed bit planes
        (log2(K) bits per kernel for a random collection, next to nothing for a deterministic one):
        a saved collection stays the same even if a later version draws differently.

        Returns:
            The text of a JSON object.
        """
        arguments = {field: getattr(self, field) for field in _ARGUMENTS}
        arrays = {field: _pack(getattr(self, field), len(self.kinds)) for field in KindNumbers._fields}
        return json.dumps({"collection_version": _JSON_VERSION, **arguments, **arrays})

    @classmethod
    def from_json(cls, text: str) -> Collection:
        """Restore a collection from the text that :meth:`to_json` wrote.

        Args:
            text: The JSON text.

        Returns:
            A collection equal to the one that was written.

        Raises:
            ValueError: The text is damaged, or written in another version of the format.
            UnregisteredKindError: The text names a kind that is not registered; it is a ValueError.
        """
        try:
            stored = json.loads(text)
        except (json.JSONDecodeError, TypeError) as error:
            raise _unreadable(f"{text!r:.60} is not JSON ({error})") from error
        if not isinstance(stored, dict) or "collection_version" not in stored:
            raise _unreadable(f"{text!r:.60} is not a collection: it has no 'collection_version'")
        stored = cast("dict[str, Any]", stored)
        version = stored["collection_version"]
        if version != _JSON_VERSION:
            raise ValueError(
                f"Collection.from_json reads version {_JSON_VERSION} of the format, got version {version!r}: read the "
                "text with the version of fgo_geo that wrote it, or build the collection again with fgo_geo.collection"
            )
        words = stored.get("kinds")
        unknown = [word for word in words if isinstance(word, str) and find(word) is None] if words else ()
        if unknown:
            raise UnregisteredKindError(
                f"Collection.from_json: the text names the manifold kind {unknown[0]!r}, which is not registered here: "
                f"call fgo_geo.register_kind({unknown[0]!r}, ...) with its class, then load again. Registered are "
                f"{names()}"
            )
        try:
            arguments = check_arguments(**{field: stored[field] for field in _ARGUMENTS})
            packed = {field: stored[field] for field in KindNumbers._fields}
        except KeyError as error:
            raise _damaged(f"it lacks {error}") from error
        except (TypeError, ValueError) as error:
            raise _damaged(str(error)) from error
        in_index_order = assign_kinds(arguments, in_index_order=True)
        for field, like in in_index_order._asdict().items():
            arguments[field] = _unpack(field, packed[field], like, len(arguments["kinds"]))
        return cls(**arguments)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the channel grid as in [Ozay2019]_, Figure 2.

        Rows are output channels and columns input channels. The colour is the manifold kind, lines
        part the groups, and in a grid of at most 400 cells each cell shows its group's number.

        Args:
            ax: The axes to draw on; None for those of a new figure.

        Returns:
            The axes.

        Raises:
            ImportError: matplotlib is not installed.
        """
        try:
            from matplotlib import colors, patches, pyplot
        except ImportError as error:
            raise ImportError(
                "Collection.plot draws with matplotlib, which is not installed: pip install matplotlib"
            ) from error
        axes: Any = pyplot.subplots()[1] if ax is None else ax
        group_of = self.group_of
        axes.imshow(colors.to_rgba_array([kind(name).colour for name in self.kinds])[self.kind_of])
        row, column = np.nonzero(group_of[:, 1:] != group_of[:, :-1])
        axes.vlines(column + 0.5, row - 0.5, row + 0.5, colors="black")
        row, column = np.nonzero(group_of[1:] != group_of[:-1])
        axes.hlines(row + 0.5, column - 0.5, column + 0.5, colors="black")
        if group_of.size <= 400:
            for (d, c), number in np.ndenumerate(group_of):
                axes.text(c, d, str(number), ha="center", va="center")
        axes.set(xlabel="input channel", ylabel="output channel", title=self._title)
        axes.locator_params(integer=True, min_n_ticks=1)
        key = [patches.Patch(color=kind(name).colour, label=name) for name in dict.fromkeys(self.kinds)]
        axes.legend(handles=key, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
        return axes

    def __eq__(self, other: object) -> bool:
        """Whether both have the same arguments and the same groups."""
        if not isinstance(other, Collection):
            return NotImplemented
        return all(getattr(self, field) == getattr(other, field) for field in _ARGUMENTS) and all(
            np.array_equal(getattr(self, field), getattr(other, field)) for field in KindNumbers._fields
        )

    def __hash__(self) -> int:
        """Hash of the arguments."""
        return hash(tuple(getattr(self, field) for field in _ARGUMENTS))

    @property
    def _title(self) -> str:
        title = "Layer" if self.strategy == "layer" else self.strategy.upper()
        return title + {"block": " in blocks", "filter": " of filters"}.get(self.components, "")

    def __str__(self) -> str:
        """Summary in one line."""
        counts = Counter[str]()
        for name, number in zip(self.kinds, np.bincount(self.group_kinds, minlength=len(self.kinds)), strict=True):
            counts[name] += int(number)
        by_kind = " + ".join(f"{count} {name}" for name, count in counts.items())
        least, most = int(self.group_sizes.min()), int(self.group_sizes.max())
        return (
            f"{self._title} over {self.in_channels} -> {self.out_channels} channels: "
            f"{len(self.groups)} group{'' if len(self.groups) == 1 else 's'}, {by_kind}, "
            + (f"size {least}" if least == most else f"sizes {least}-{most}")
            + (f", random (seed {self.seed})" if self.selection == "random" else "")
        )

    def __repr__(self) -> str:
        """Summary in one line, in angle brackets."""
        return f"<Collection {self}>"


class _Groups(Sequence[Group]):
    """A lazy sequence of groups: the group of each number is made when it is read."""

    def __init__(self, count: int, group: Callable[[int], Group]) -> None:
        self._numbers = range(count)
        self._group = group

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> Group: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Group, ...]: ...
    def __getitem__(self, index: int | slice) -> Group | tuple[Group, ...]:
        if isinstance(index, slice):
            return tuple(map(self._group, self._numbers[index]))
        return self._group(self._numbers[index])


def collection(
    out_channels: int,
    in_channels: int,
    strategy: str,
    manifolds: KindLike | Sequence[KindLike],
    selection: str = "deterministic",
    seed: int = 0,
    *,
    components: str = "kernel",
    name: str = "",
) -> Collection:
    """Partition the kernels of a layer into groups ([Ozay2019]_, Figure 2).

    Shares are balanced: within a channel, the numbers of members of the kinds differ by at most one. If K does not
    divide the number of members, the kinds take turns from channel to channel in getting the extra members, so that
    they are balanced over the layer too. An empty share is not a group.

    Args:
        out_channels: D, the number of output channels.
        in_channels: C, the number of input channels (per group of a grouped convolution).
        strategy: ``"layer"``, ``"pi"``, ``"po"`` or ``"pio"``, in upper or lower case. For an odd number of channels
            the first half of ``"pio"`` has one channel more.
        manifolds: The K manifold kinds: ``"sphere"``, ``"oblique"``, ``"stiefel"``, ``"euclidean"``, their
            abbreviations ``"sp"``, ``"ob"``, ``"st"``, ``"eu"``, and kinds added by
            :func:`~fgo_geo.register_kind`, in upper or lower case; or manifolds of components, such as
            ``geoopt.CanonicalStiefel()``, see :func:`fgo_geo.weights.kinds.kind`. A kind given twice gets two
            separate shares. ``"layer"`` takes exactly one kind.
        selection: ``"deterministic"`` takes halves and shares in index order, ``"random"`` samples
            them without replacement, the shares independently for each channel.
        seed: Any integer. A random collection depends only on the seed, the name and the other
            arguments: it is the same on every machine and with every version of Python and NumPy.
        components: ``"kernel"``: groups of kernels; ``"block"``: each group is one block of the
            weight's matrix; ``"filter"``: groups of output channels, whose weights are one component each.
        name: The layer's name, which gives layers of equal shape different draws from one seed.

    Returns:
        The collection.

    Raises:
        TypeError: A number of channels or the seed is not an integer, or the name is not a string.
        ValueError: A number of channels is below 1, a word is unknown, or there are no manifolds,
            or several for ``"layer"``.

    Example:
        Example 1 of [Ozay2019]_, a weight of shape 3 x 3 x 4 x 6:

        >>> from fgo_geo.weights.grouping import collection
        >>> example = collection(6, 4, "pio", ("sphere", "stiefel"))
        >>> print(example)
        PIO over 4 -> 6 channels: 10 groups, 5 sphere + 5 stiefel, sizes 2-3
        >>> example.groups[0].manifold, example.groups[0].index.tolist()
        ('sphere', [[0, 0], [0, 1]])
        >>> example.group_of[0].tolist()
        [0, 0, 6, 8]
    """
    arguments = check_arguments(out_channels, in_channels, strategy, manifolds, selection, seed, components, name)
    return Collection(**arguments, **assign_kinds(arguments)._asdict())


def _pack(array: Integers, n_kinds: int) -> str:
    """Base64 text of the compressed bit planes of an array of kind numbers."""
    planes = [array & (1 << bit) for bit in range(_n_bits(n_kinds))]
    return base64.b64encode(zlib.compress(np.packbits(planes).tobytes())).decode()


def _unpack(field: str, text: object, like: Integers, n_kinds: int) -> Integers:
    """The array that :func:`_pack` wrote: a rearrangement of the entries of ``like``."""
    n_bits = _n_bits(n_kinds)
    try:
        content = zlib.decompress(base64.b64decode(cast("str", text), validate=True))
    except (TypeError, ValueError, zlib.error) as error:
        raise _damaged(f"{field} can't be decoded ({error})") from error
    n_bytes = -(-n_bits * like.size // 8)
    if len(content) != n_bytes:
        raise _damaged(f"{field} has {len(content)} bytes, shape {like.shape} takes {n_bytes}")
    planes = np.unpackbits(np.frombuffer(content, np.uint8), count=n_bits * like.size)
    numbers = np.zeros(like.shape, np.min_scalar_type(n_kinds - 1))
    for bit, plane in enumerate(planes.reshape(n_bits, *like.shape)):
        numbers |= plane.astype(numbers.dtype) << bit
    counts, expected = np.bincount(numbers.ravel()), np.bincount(like.ravel())
    if not np.array_equal(counts, expected):
        raise _damaged(f"{field} holds its numbers {counts} times, expected {expected}")
    return numbers.astype(like.dtype)


def _n_bits(n_kinds: int) -> int:
    """Number of bits that hold a kind number, and the two values of ``by_output``."""
    return max(1, (n_kinds - 1).bit_length())


def _damaged(reason: str) -> ValueError:
    """The error for the text of a collection that has changed."""
    return _unreadable(f"the text is damaged: {reason}")


def _unreadable(reason: str) -> ValueError:
    """The error for text that holds no collection."""
    return ValueError(
        f"Collection.from_json: {reason}; pass the text that Collection.to_json returned, or build the collection "
        "again with fgo_geo.collection"
    )
