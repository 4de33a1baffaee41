"""Collections of groups, against an oracle of Python sets that follows the definition."""

from __future__ import annotations

import copy
import hashlib
import json
import pickle
import sys
import time
from collections import Counter
from itertools import combinations, pairwise, product

import matplotlib as mpl
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib import colors, pyplot

from fgo_geo import grouping
from fgo_geo.grouping import MANIFOLD_KINDS, STRATEGIES, Collection, collection

# The oracle: a list of (kind number, set of cells), from the definition of the strategies.


def shares(members, n_kinds, turn=0):
    """Members in index order, cut into shares whose sizes come from dealing one by one."""
    sizes = [0] * n_kinds
    for _ in members:
        sizes[turn % n_kinds] += 1
        turn += 1
    members = iter(members)
    return [[next(members) for _ in range(size)] for size in sizes], turn


def oracle_by_channel(channels, members, n_kinds, cell, turn=0):
    groups = []
    for channel in channels:
        subsets, turn = shares(members, n_kinds, turn)
        groups += [(kind, {cell(channel, m) for m in subsets[kind]}) for kind in range(n_kinds)]
    return groups


def oracle_kernels(rows, columns, strategy, n_kinds):
    if strategy == "layer":
        return [(0, set(product(rows, columns)))]
    if strategy == "pi":
        return oracle_by_channel(columns, rows, n_kinds, lambda c, d: (d, c))
    if strategy == "po":
        return oracle_by_channel(rows, columns, n_kinds, lambda d, c: (d, c))
    half = -(-len(columns) // 2)
    assigned, turn = shares(rows, n_kinds)
    by_output = [(kind, {(d, c) for c in columns[:half]}) for kind in range(n_kinds) for d in assigned[kind]]
    return by_output + oracle_by_channel(columns[half:], rows, n_kinds, lambda c, d: (d, c), turn)


def oracle_blocks(rows, columns, strategy, n_kinds):
    half = {"pi": 0, "pio": -(-len(rows) // 2)}.get(strategy, len(rows))
    row_subsets, turn = shares(rows[:half], n_kinds)
    column_subsets, _ = shares(columns, n_kinds, turn)
    return [(kind, set(product(row_subsets[kind], columns))) for kind in range(n_kinds)] + [
        (kind, set(product(rows[half:], column_subsets[kind]))) for kind in range(n_kinds)
    ]


def oracle_filters(rows, columns, strategy, n_kinds):
    own = {"po": len(rows), "pio": -(-len(rows) // 2)}.get(strategy, 0)  # filters that are groups of their own
    assigned, turn = shares(rows[:own], n_kinds)
    subsets, _ = shares(rows[own:], n_kinds, turn)
    groups = [(kind, [row]) for kind in range(n_kinds) for row in assigned[kind]] + list(enumerate(subsets))
    return [(kind, set(product(members, columns))) for kind, members in groups]


def oracle(out_channels, in_channels, strategy, n_kinds, components):
    groups = {"kernel": oracle_kernels, "block": oracle_blocks, "filter": oracle_filters}[components]
    return [
        (kind, cells) for kind, cells in groups(range(out_channels), range(in_channels), strategy, n_kinds) if cells
    ]


def groups_of(made):
    """A collection's groups as the oracle writes them."""
    return [
        (kind, set(map(tuple, group.index.tolist())))
        for kind, group in zip(made.group_kinds.tolist(), made.groups, strict=True)
    ]


@st.composite
def arguments(draw, **fixed):
    strategy = draw(st.sampled_from(STRATEGIES))
    return {
        "out_channels": draw(st.integers(1, 9)),
        "in_channels": draw(st.integers(1, 9)),
        "strategy": strategy,
        "manifolds": draw(
            st.lists(
                st.sampled_from(MANIFOLD_KINDS),
                min_size=1,
                max_size=1 if strategy == "layer" else 6,
            )
        ),
        "selection": draw(st.sampled_from(["deterministic", "random"])),
        "seed": draw(st.integers()),
        "components": draw(st.sampled_from(["kernel", "block", "filter"])),
        "name": draw(st.text(max_size=5)),
    } | fixed


# What the groups are.


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("components", ["kernel", "block", "filter"])
def test_deterministic_groups_are_the_oracles(strategy, components):
    for rows, columns in product(range(1, 8), repeat=2):
        for n_kinds in range(1, 2 if strategy == "layer" else 5):
            made = collection(rows, columns, strategy, MANIFOLD_KINDS[:n_kinds], components=components)
            assert groups_of(made) == oracle(rows, columns, strategy, n_kinds, components)


@given(arguments())
def test_groups_partition_the_cells_and_all_views_agree(drawn):
    made = collection(**drawn)
    shape = (drawn["out_channels"], drawn["in_channels"])
    covered = np.full(shape, -1)
    for number, group in enumerate(made.groups):
        rows, columns = group.index.T
        assert (covered[rows, columns] == -1).all()
        covered[rows, columns] = number
        assert group.size == len(group.index) == made.group_sizes[number] > 0
        assert group.index.tolist() == sorted(group.index.tolist())
        assert group.index.tolist() == [list(p) for p in product(group.rows, group.columns)]
        assert group.manifold == made.kinds[made.group_kinds[number]]
        assert (made.kind_of[rows, columns] == made.group_kinds[number]).all()
    assert np.array_equal(covered, made.group_of)
    assert made.group_of.dtype == np.uint8
    assert made.kind_of.shape == made.group_of.shape == shape


@given(arguments(selection="random"))
def test_random_selection_changes_members_but_no_counts(drawn):
    def counts(made):
        return Counter(zip(made.group_kinds.tolist(), made.group_sizes.tolist(), strict=True))

    assert counts(collection(**drawn)) == counts(collection(**drawn | {"selection": "deterministic"}))


def assert_balanced_channels(groups, axis, channels, n_kinds, per_channel):
    """Every group lies in one of the channels, which it shares with at most one of each kind."""
    sizes = {channel: [0] * n_kinds for channel in channels}
    for kind, cells in groups:
        (channel,) = {cell[axis] for cell in cells}
        assert sizes[channel][kind] == 0
        sizes[channel][kind] = len(cells)
    for sizes_of_channel in sizes.values():
        assert sum(sizes_of_channel) == per_channel
        assert max(sizes_of_channel) - min(sizes_of_channel) <= 1
    totals = [sum(by_channel[kind] for by_channel in sizes.values()) for kind in range(n_kinds)]
    assert max(totals) - min(totals) <= 1


@given(arguments(selection="random", components="kernel"))
def test_random_groups_of_kernels_have_the_strategys_structure(drawn):
    made, n_kinds = collection(**drawn), len(drawn["manifolds"])
    rows, columns = range(drawn["out_channels"]), range(drawn["in_channels"])
    groups = groups_of(made)
    if drawn["strategy"] == "layer":
        assert groups == [(0, set(product(rows, columns)))]
    elif drawn["strategy"] == "pi":
        assert_balanced_channels(groups, 1, columns, n_kinds, len(rows))
    elif drawn["strategy"] == "po":
        assert_balanced_channels(groups, 0, rows, n_kinds, len(columns))
    else:
        half = {c for c in columns if made.by_output[0, c]}
        assert len(half) == -(-len(columns) // 2)
        by_output = groups[: len(rows)]
        assert [cells for _, cells in by_output] == [{(d, c) for c in half} for d in rows]
        kinds = Counter(kind for kind, _ in by_output)
        numbers = [kinds[kind] for kind in range(n_kinds)]
        assert max(numbers) - min(numbers) <= 1
        others = [c for c in columns if c not in half]
        assert_balanced_channels(groups[len(rows) :], 1, others, n_kinds, len(rows))


@given(arguments(selection="random", components="block"))
def test_random_blocks_have_the_strategys_structure(drawn):
    made, n_kinds = collection(**drawn), len(drawn["manifolds"])
    n_rows, n_columns = drawn["out_channels"], drawn["in_channels"]
    half = {"pi": 0, "pio": -(-n_rows // 2)}.get(drawn["strategy"], n_rows)
    by_row = [g for g in made.groups if made.by_output[g.rows[0], 0]]
    by_column = [g for g in made.groups if not made.by_output[g.rows[0], 0]]
    assert sum(len(g.rows) for g in by_row) == half
    assert all(len(g.columns) == n_columns for g in by_row)
    assert all(len(g.rows) == n_rows - half for g in by_column)
    assert sum(len(g.columns) for g in by_column) == (n_columns if half < n_rows else 0)
    for sizes, members in (
        ([len(g.rows) for g in by_row], half),
        ([len(g.columns) for g in by_column], n_columns if half < n_rows else 0),
    ):
        assert len(sizes) == min(n_kinds, members)
        assert not sizes or max(sizes) - min(sizes) <= 1


@given(arguments(selection="random", components="filter"))
def test_random_filters_have_the_strategys_structure(drawn):
    made, n_kinds, n_rows = collection(**drawn), len(drawn["manifolds"]), drawn["out_channels"]
    own = {"po": n_rows, "pio": -(-n_rows // 2)}.get(drawn["strategy"], 0)
    assert all(group.columns.tolist() == list(range(drawn["in_channels"])) for group in made.groups)
    alone, together = made.groups[:own], made.groups[own:]
    assert all(len(group.rows) == 1 for group in alone)
    assert len(together) == min(n_kinds, n_rows - own)
    for sizes in (Counter(made.group_kinds[:own].tolist()).values(), [len(group.rows) for group in together]):
        assert not sizes or max(sizes) - min(sizes) <= 1
    assert {row for group in alone for row in group.rows} == set(np.flatnonzero(made.by_output))


@pytest.mark.parametrize("seed", [0, 1, 2**70, -5])
@pytest.mark.parametrize("selection", ["deterministic", "random"])
def test_example_1_of_the_paper(selection, seed):
    made = collection(6, 4, "pio", ("Sp", "St"), selection, seed)
    sizes = Counter((group.manifold, group.size) for group in made.groups)
    assert sizes == {("sphere", 2): 3, ("sphere", 3): 2, ("stiefel", 2): 3, ("stiefel", 3): 2}


def test_deterministic_example_1_by_hand():
    made = collection(6, 4, "PIO", ("sphere", "stiefel"))
    top, bottom = [0, 0, 0, 0], [1, 1, 1, 1]
    assert made.kind_of.tolist() == [top, top, top, bottom, bottom, bottom]
    assert made.group_of.tolist() == [
        [0, 0, 6, 8],
        [1, 1, 6, 8],
        [2, 2, 6, 8],
        [3, 3, 7, 9],
        [4, 4, 7, 9],
        [5, 5, 7, 9],
    ]


@pytest.mark.parametrize("selection", ["deterministic", "random"])
def test_kinds_alternate_over_a_depthwise_layer(selection):
    made = collection(32, 1, "po", MANIFOLD_KINDS, selection)
    assert len(made.groups) == 32
    assert Counter(group.manifold for group in made.groups) == dict.fromkeys(MANIFOLD_KINDS, 8)
    in_turn = made.kind_of[:, 0].tolist() == [0, 1, 2, 3] * 8
    assert in_turn == (selection == "deterministic")


def test_a_kind_given_twice_makes_two_groups():
    made = collection(4, 1, "pi", ("sphere", "sphere"))
    assert [(g.manifold, g.size) for g in made.groups] == [("sphere", 2), ("sphere", 2)]


# Random draws.


def test_every_subset_is_drawn_equally_often_and_channels_are_independent():
    halves = [set(half) for half in combinations(range(4), 2)]
    drawn = Counter()
    for seed in range(720):
        kind_of = collection(4, 2, "pi", ("sphere", "stiefel"), "random", seed).kind_of
        first, second = (set(np.flatnonzero(kind_of[:, c]).tolist()) for c in (0, 1))
        drawn[halves.index(first), halves.index(second)] += 1
    assert len(drawn) == 36
    chi_square = sum((count - 20) ** 2 / 20 for count in drawn.values())
    assert chi_square < 66.6  # exceeded with probability 0.001 at 35 degrees of freedom


def test_the_first_half_of_pio_is_drawn_uniformly():
    drawn = Counter(
        tuple(collection(2, 4, "pio", "sphere", "random", seed).by_output[0].tolist()) for seed in range(600)
    )
    assert len(drawn) == 6
    assert sum((count - 100) ** 2 / 100 for count in drawn.values()) < 20.5  # 0.001, 5 degrees


@given(arguments(selection="random"))
def test_equal_arguments_give_equal_collections(drawn):
    first, second = collection(**drawn), collection(**drawn)
    assert first == second
    assert hash(first) == hash(second)
    assert np.array_equal(first.group_of, second.group_of)


@pytest.mark.parametrize("change", [{"seed": 1}, {"name": "layer2"}])
@pytest.mark.parametrize("strategy", ["pi", "po", "pio"])
@pytest.mark.parametrize("components", ["kernel", "block"])
def test_seed_and_name_change_the_draw(change, strategy, components):
    drawn = {
        "out_channels": 32,
        "in_channels": 32,
        "strategy": strategy,
        "manifolds": ("sphere", "stiefel"),
        "selection": "random",
        "components": components,
    }
    assert not np.array_equal(collection(**drawn).kind_of, collection(**drawn | change).kind_of)


def test_equality_tells_arguments_apart():
    made = collection(4, 4, "pi", ("sphere", "stiefel"))
    assert made != collection(4, 4, "pi", ("sphere", "oblique"))
    assert made != collection(4, 4, "pi", ("sphere", "stiefel"), name="other")
    assert made != collection(4, 4, "po", ("sphere", "stiefel"))
    assert made != "pi"


def digest(made):
    return hashlib.sha256(made.kind_of.astype("<u4").tobytes() + made.group_of.astype("<u4").tobytes()).hexdigest()[:16]


@pytest.mark.parametrize(
    ("strategy", "components", "seed", "name", "expected"),
    [
        ("pi", "kernel", 0, "", "107393847da4d8f9"),
        ("po", "kernel", 1, "conv", "0c0422014b6ac874"),
        ("pio", "kernel", -1, "layer1.0.conv2", "88fa3f5186ad34d7"),
        ("pio", "block", 2**64, "größe", "3d80339191aa8e33"),
        ("pio", "filter", 3, "fc", "af4fcac42b6026d7"),
    ],
)
def test_random_draws_never_change(strategy, components, seed, name, expected):
    made = collection(17, 13, strategy, MANIFOLD_KINDS[:3], "random", seed, components=components, name=name)
    assert digest(made) == expected


# Size and speed.


def test_a_large_random_collection_is_small_and_fast():
    start = time.process_time()
    made = collection(2048, 512, "pio", MANIFOLD_KINDS, "random")
    assert time.process_time() - start < 1.0
    stored = made.by_output.nbytes + made.output_kinds.nbytes + made.input_kinds.nbytes
    assert stored < 1.01 * 2048 * 512
    assert len(made.groups) == 2048 + 4 * 256
    assert made.group_of.dtype == np.uint16
    assert len(made.to_json()) < 0.3 * 2048 * 512


def test_filters_take_memory_for_output_channels_only():
    made = collection(4096, 4096, "pio", MANIFOLD_KINDS, "random", components="filter")
    assert made.by_output.nbytes + made.output_kinds.nbytes + made.input_kinds.nbytes == 3 * 4096
    assert made.group_sizes.tolist() == [4096] * 2048 + [512 * 4096] * 4


def test_blocks_take_memory_for_channels_only():
    made = collection(4096, 4096, "pio", MANIFOLD_KINDS, "random", components="block")
    assert made.by_output.nbytes + made.output_kinds.nbytes + made.input_kinds.nbytes == 3 * 4096
    assert [group.size for group in made.groups] == [512 * 4096] * 4 + [2048 * 1024] * 4


# The sequence of groups, text and copies.


def test_groups_are_a_sequence():
    groups = collection(3, 2, "pi", ("sphere", "stiefel")).groups
    assert len(groups) == 4
    assert groups[-1].index.tolist() == groups[3].index.tolist() == [[1, 1], [2, 1]]
    assert [g.index.tolist() for g in groups[1:3]] == [g.index.tolist() for g in groups][1:3]
    with pytest.raises(IndexError):
        groups[4]


@pytest.mark.parametrize(
    ("made", "text"),
    [
        (
            collection(6, 4, "pio", ("sphere", "stiefel")),
            "PIO over 4 -> 6 channels: 10 groups, 5 sphere + 5 stiefel, sizes 2-3",
        ),
        (
            collection(2, 3, "layer", "ob", "random", 7),
            "Layer over 3 -> 2 channels: 1 group, 1 oblique, size 6, random (seed 7)",
        ),
        (
            collection(4, 2, "po", ("eu", "eu"), components="block"),
            "PO in blocks over 2 -> 4 channels: 2 groups, 2 euclidean, size 4",
        ),
    ],
)
def test_summary(made, text):
    assert str(made) == text
    assert repr(made) == f"<Collection {text}>"


@given(arguments())
def test_json_round_trip(drawn):
    made = collection(**drawn)
    restored = Collection.from_json(made.to_json())
    assert restored == made
    assert np.array_equal(restored.group_of, made.group_of)
    assert all(
        getattr(restored, field).dtype == getattr(made, field).dtype
        for field in ("by_output", "output_kinds", "input_kinds")
    )


@pytest.mark.parametrize("n_kinds", [256, 257])
def test_json_round_trip_with_more_kinds_than_a_byte_holds(n_kinds):
    made = collection(300, 2, "pi", ("sphere",) * n_kinds, "random")
    assert Collection.from_json(made.to_json()) == made
    assert made.kind_of.max() == n_kinds - 1


def test_a_stored_random_collection_outlives_the_generator(monkeypatch):
    made = collection(8, 8, "pio", MANIFOLD_KINDS, "random")
    text = made.to_json()
    monkeypatch.delattr(np.random, "PCG64")
    assert Collection.from_json(text) == made


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))])
def test_copies_are_equal(duplicate):
    made = collection(8, 8, "pio", MANIFOLD_KINDS, "random")
    assert duplicate(made) == made


def test_arrays_are_read_only():
    made = collection(4, 4, "pio", ("sphere", "stiefel"))
    with pytest.raises(ValueError, match="read-only"):
        made.input_kinds[0, 0] = 1


# Errors.


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"out_channels": 0}, ValueError, "out_channels must be at least 1, got 0"),
        ({"in_channels": -2}, ValueError, "in_channels must be at least 1, got -2"),
        ({"in_channels": 2.0}, TypeError, r"in_channels must be an integer, got 2\.0"),
        ({"out_channels": True}, TypeError, "out_channels must be an integer, got True"),
        ({"seed": "0"}, TypeError, "seed must be an integer, got '0'"),
        ({"name": None}, TypeError, "name must be a string, the layer's name, got None"),
        ({"strategy": "poi"}, ValueError, "strategy must be one of .*'pio'.*, got 'poi'"),
        ({"selection": "rand"}, ValueError, "selection must be one of .*'random'.*, got 'rand'"),
        ({"components": "rows"}, ValueError, "components must be one of .*'block'.*, got 'rows'"),
        ({"manifolds": ()}, ValueError, r"manifolds must name at least one of .*, got \(\)"),
        ({"manifolds": None}, ValueError, "manifolds must name at least one of .*, got None"),
        ({"manifolds": ("s",)}, ValueError, "manifold kind must be one of .*'sphere'.*, got 's'"),
        ({"manifolds": (1,)}, ValueError, "manifold kind must be one of .*, got 1"),
        ({"strategy": "layer"}, ValueError, "got 2 manifolds: pass one of them, or use strategy"),
    ],
)
def test_wrong_arguments(change, error, message):
    right = {
        "out_channels": 4,
        "in_channels": 4,
        "strategy": "pi",
        "manifolds": ("sphere", "stiefel"),
    }
    with pytest.raises(error, match=message):
        collection(**right | change)


def test_words_in_any_case_and_numpy_integers():
    made = collection(np.int64(4), np.int32(4), "Pi", ("OB", "Eu", "STIEFEL"), "Random", np.uint8(3), name="a")
    assert made == collection(4, 4, "pi", ("oblique", "euclidean", "stiefel"), "random", 3, name="a")
    assert Collection.from_json(made.to_json()) == made


def stored(**change):
    return json.loads(collection(5, 4, "pio", MANIFOLD_KINDS[:3], "random").to_json()) | change


def packed(values, n_kinds=3):
    return grouping._pack(np.array(values, np.uint8), n_kinds)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"Collection.from_json: '\{' is not JSON \(Expecting"),
        ("group.json", r"Collection.from_json: 'group.json' is not JSON \(Expecting"),
        ("null", "'null' is not a collection: it has no 'collection_version'; pass the text that Collection.to_json"),
        ("[]", r"'\[\]' is not a collection: it has no 'collection_version'; pass the text"),
        ('{"version": 1}', "'{\"version\": 1}' is not a collection: it has no 'collection_version'; pass the text"),
        (stored(collection_version=2), "reads version 1 of the format, got version 2: read the"),
        (stored(out_channels=20), "the text is damaged: output_kinds has .* shape .* takes"),
        (stored(out_channels=0), "the text is damaged: out_channels must be at least 1, got 0"),
        (stored(seed="x"), "the text is damaged: seed must be an integer"),
        (stored(kinds=["sphere"]), "the text is damaged: output_kinds holds|takes"),
        (stored(input_kinds="A"), "the text is damaged: input_kinds can't be decoded"),
        (stored(input_kinds=3), "the text is damaged: input_kinds can't be decoded"),
        (stored(input_kinds="AAAA"), "the text is damaged: input_kinds can't be decoded"),
        (stored(output_kinds=packed([0, 0, 1, 2, 3])), "output_kinds holds its numbers"),
        (stored(output_kinds=packed([0, 0, 0, 0, 0])), "output_kinds holds its numbers"),
        (stored(by_output=packed([1, 1, 1, 0])), "by_output holds its numbers"),
    ],
)
def test_damaged_json(text, message):
    with pytest.raises(ValueError, match=message) as caught:
        Collection.from_json(text if isinstance(text, str) else json.dumps(text))
    assert str(caught.value).endswith(", or build the collection again with fgo_geo.collection")


@pytest.mark.parametrize("field", sorted(stored()))
def test_json_that_lacks_a_field(field):
    text = json.dumps({key: value for key, value in stored().items() if key != field})
    with pytest.raises(ValueError, match=f"(damaged|not a collection): it (lacks|has no) '{field}'"):
        Collection.from_json(text)


# The picture.


@pytest.fixture
def axes():
    with mpl.rc_context({"backend": "Agg"}):
        figure, axes = pyplot.subplots()
        yield axes
        pyplot.close(figure)


def test_plot_shows_kinds_groups_and_borders(axes):
    made = collection(6, 4, "pio", ("sphere", "stiefel"))
    assert made.plot(axes) is axes
    image = axes.images[0].get_array()
    legend = axes.get_legend()
    colour_of = {
        text.get_text(): patch.get_facecolor()
        for text, patch in zip(legend.get_texts(), legend.get_patches(), strict=True)
    }
    assert list(colour_of) == ["sphere", "stiefel"]
    for d, c in product(range(6), range(4)):
        assert colors.same_color(image[d, c], colour_of[made.kinds[made.kind_of[d, c]]])
    assert {text.get_position(): text.get_text() for text in axes.texts} == {
        (c, d): str(made.group_of[d, c]) for d, c in product(range(6), range(4))
    }
    vertical, horizontal = (len(lines.get_segments()) for lines in axes.collections)
    group_of = made.group_of.tolist()
    assert vertical == sum(a != b for row in group_of for a, b in pairwise(row))
    assert horizontal == sum(a != b for rows in pairwise(group_of) for a, b in zip(*rows, strict=True))
    assert (axes.get_title(), axes.get_xlabel(), axes.get_ylabel()) == (
        "PIO",
        "input channel",
        "output channel",
    )


def test_plot_ticks_are_channels(axes):
    collection(8, 1, "po", MANIFOLD_KINDS).plot(axes)
    assert [tick for tick in axes.get_xticks() if -0.5 <= tick <= 0.5] == [0]


def test_plot_makes_axes_and_leaves_numbers_out_of_large_grids(axes):
    with mpl.rc_context({"backend": "Agg"}):
        made = collection(21, 20, "layer", "st").plot()
    assert made is not axes
    assert not made.texts
    pyplot.close(made.figure)


def test_plot_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        collection(2, 2, "layer", "sphere").plot()
