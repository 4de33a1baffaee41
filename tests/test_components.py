"""Every weight is cut into the components that its collections name, and put together again without loss."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from layers import Grouped, convolutions, grouped_weights
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fgo_geo.grouping import MANIFOLD_KINDS, Collection, collection
from fgo_geo.weights.components import FilterPartition, Partition, Segments, partition
from fgo_geo.weights.layout import WeightLayout, layout_of


def numbered(shape: tuple[int, ...]) -> Tensor:
    """Every entry is its own position."""
    return torch.arange(math.prod(shape), dtype=torch.float64).reshape(shape)


def partition_of(grouped: Grouped) -> Partition:
    return partition(grouped.collections, grouped.layout)


@st.composite
def sections_of_blocks(draw: st.DrawFn) -> Grouped:
    """A linear layer whose sections are grouped by one strategy each, not necessarily the same."""
    rows, columns, sections = (draw(st.integers(1, n)) for n in (7, 9, 4))
    collections: list[Collection] = []
    for section in range(sections):
        strategy = draw(st.sampled_from(["pio", "pio", "pi", "po", "layer"]))
        kinds = draw(st.lists(st.sampled_from(MANIFOLD_KINDS), min_size=1, max_size=1 if strategy == "layer" else 4))
        selection = draw(st.sampled_from(["random", "deterministic"]))
        collections.append(
            collection(rows, columns, strategy, kinds, selection, components="block", name=f"section {section}")
        )
    return Grouped(WeightLayout((sections * rows, columns), sections=sections), tuple(collections))


weights = grouped_weights() | sections_of_blocks()


# -- layouts -----------------------------------------------------------------------------------------------------


@given(module=convolutions())
def test_channels_are_the_kernels_from_input_to_output_channels(module: Any) -> None:
    """A unit impulse in one input channel makes every output channel of its group show its kernel."""
    layout = layout_of(module, "weight")
    assert isinstance(layout, WeightLayout)
    assert (layout.out_channels, layout.in_channels) == (module.out_channels, module.in_channels // module.groups)
    assert layout.fan_in == layout.in_channels * math.prod(module.kernel_size)
    kernels = layout.channels(module.weight.detach())
    if layout.storage == "conv":  # which correlates
        kernels = kernels.flip(list(range(2, kernels.ndim)))
        module.padding = tuple(k - 1 for k in layout.kernel)
    outputs_per_group = module.out_channels // module.groups
    for channel in range(module.in_channels):
        impulse = torch.zeros(1, module.in_channels, *(1 for _ in layout.kernel))
        impulse[0, channel] = 1
        group, c = divmod(channel, layout.in_channels)
        own = slice(group * outputs_per_group, (group + 1) * outputs_per_group)
        expected = torch.zeros(module.out_channels, *layout.kernel)
        expected[own] = kernels[own, c]
        torch.testing.assert_close(module(impulse)[0].detach(), expected)


@given(module=convolutions())
def test_channels_and_back(module: nn.Module) -> None:
    layout = layout_of(module, "weight")
    assert isinstance(layout, WeightLayout)
    weight = numbered(layout.shape)
    channels = layout.channels(weight)
    assert channels.shape == (layout.out_channels, layout.in_channels, *layout.kernel)
    assert torch.equal(layout.weight(channels), weight)


def test_the_sections_of_attention_are_query_key_and_value() -> None:
    layout = layout_of(nn.MultiheadAttention(4, 2), "in_proj_weight")
    assert isinstance(layout, WeightLayout)
    assert (layout.sections, layout.out_channels, layout.in_channels, layout.fan_in) == (3, 12, 4, 4)
    blocks = partition([collection(4, 4, "layer", "stiefel", components="block")] * 3, layout)
    (parts,) = blocks.split(numbered((12, 4)))
    assert torch.equal(parts, numbered((3, 4, 4)))


def test_the_groups_of_a_1x1_convolution_are_sections() -> None:
    for module in (nn.Conv2d(6, 4, 1, groups=2), nn.ConvTranspose2d(6, 4, 1, groups=2)):
        layout = layout_of(module, "weight")
        assert isinstance(layout, WeightLayout)
        assert (layout.sections, layout.out_channels, layout.in_channels) == (2, 4, 3)
        (parts,) = partition([collection(2, 3, "layer", "sphere", components="block")] * 2, layout).split(module.weight)
        x = torch.randn(1, 6, 1, 1)
        halves = [
            part.mT @ half for part, half in zip(parts, x.reshape(2, 3), strict=True)
        ]  # wide blocks lie on a side
        torch.testing.assert_close(torch.cat(halves), (module(x).flatten() - module.bias))


REASONS = [
    (nn.Conv2d(4, 6, 3), "bias", "has one dimension"),
    (nn.Linear(3, 2), "bias", "has one dimension"),
    (nn.BatchNorm2d(3), "weight", "normalised features"),
    (nn.GroupNorm(1, 3), "bias", "normalised features"),
    (nn.LayerNorm((3, 4)), "weight", "normalised features"),
    (nn.RMSNorm((3, 4)), "weight", "normalised features"),
    (nn.Embedding(5, 3), "weight", "lookup table"),
    (nn.EmbeddingBag(5, 3), "weight", "lookup table"),
    (nn.Bilinear(2, 3, 4), "weight", "bilinear"),
    (nn.Bilinear(2, 3, 4), "bias", "has one dimension"),
    (nn.LSTM(2, 3), "weight_ih_l0", "recurrent"),
    (nn.GRUCell(2, 3), "weight_hh", "recurrent"),
    (nn.LazyConv2d(4, 3), "weight", "not initialised"),
    (nn.MultiheadAttention(4, 2, add_bias_kv=True), "bias_k", "'bias_k' of MultiheadAttention, of unknown layout"),
    (nn.utils.parametrizations.orthogonal(nn.Linear(3, 2)).parametrizations.weight, "original", "re-parametrised"),
]


@pytest.mark.parametrize(("module", "name", "reason"), REASONS)
def test_what_has_no_layout_has_a_reason(module: nn.Module, name: str, reason: str) -> None:
    found = layout_of(module, name)
    assert isinstance(found, str)
    assert reason in found


@pytest.mark.parametrize("name", ["q_proj_weight", "k_proj_weight", "v_proj_weight"])
def test_separate_projections_of_attention(name: str) -> None:
    module = nn.MultiheadAttention(4, 2, kdim=3, vdim=5)
    assert layout_of(module, name) == WeightLayout(tuple(module.get_parameter(name).shape))


# -- partitions --------------------------------------------------------------------------------------------------


@given(grouped=weights)
def test_components_are_those_of_the_collections(grouped: Grouped) -> None:
    """Every group is in one part, of the right kind, and its components hold the entries that they should."""
    cut = partition_of(grouped)
    found: dict[int, tuple[str, list[np.ndarray]]] = {}
    parts = zip(cut.kinds, cut.groups, cut.segments, cut.split(numbered(grouped.shape)), strict=True)
    for kind, groups, segments, part in parts:
        of_component = segments.spread(torch.from_numpy(groups)).numpy()
        found |= {int(group): (kind, list(part.numpy()[of_component == group])) for group in groups}
    expected = grouped.groups()
    assert sorted(found) == list(range(len(expected)))
    for number, (kind, components) in enumerate(expected):
        assert found[number][0] == kind
        np.testing.assert_array_equal(np.stack(found[number][1]), np.stack(components))


@given(grouped=weights)
def test_every_entry_is_in_exactly_one_component(grouped: Grouped) -> None:
    parts = partition_of(grouped).split(numbered(grouped.shape))
    entries = torch.cat([part.flatten() for part in parts])
    assert torch.equal(entries.sort().values, numbered(grouped.shape).flatten())


@given(grouped=weights, seed=st.integers(0, 99), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_merge_undoes_split_and_split_undoes_merge(grouped: Grouped, seed: int, dtype: torch.dtype) -> None:
    cut = partition_of(grouped)
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(grouped.shape, generator=generator, dtype=torch.float64).to(dtype)
    parts = cut.split(weight)
    assert torch.equal(cut.merge(parts), weight)
    assert cut.merge(parts).dtype == dtype
    others = [torch.randn(part.shape, generator=generator) for part in parts]
    for again, other in zip(cut.split(cut.merge(others)), others, strict=True):
        assert torch.equal(again, other)


@given(grouped=weights)
def test_what_a_partition_says_of_its_parts(grouped: Grouped) -> None:
    cut = partition_of(grouped)
    parts = cut.split(torch.zeros(grouped.shape))
    assert [part.shape for part in parts] == [(n, *size) for n, size in zip(cut.counts, cut.sizes, strict=True)]
    assert all(rows >= columns for rows, columns in cut.sizes)
    for groups, sizes, count, segments in zip(cut.groups, cut.group_sizes, cut.counts, cut.segments, strict=True):
        assert len(groups) == len(sizes) == segments.count
        assert sizes.sum() == count == segments.total
        ones = torch.ones(count, dtype=torch.float64)
        assert segments.sum(ones).tolist() == sizes.tolist()


@given(grouped=weights, seed=st.integers(0, 99))
def test_gradients_flow_through(grouped: Grouped, seed: int) -> None:
    cut = partition_of(grouped)
    weight = torch.zeros(grouped.shape, requires_grad=True)
    factor = torch.randn(grouped.shape, generator=torch.Generator().manual_seed(seed))
    (cut.merge(cut.split(weight)) * factor).sum().backward()
    assert torch.equal(torch.as_tensor(weight.grad), factor)


@given(grouped=weights, seed=st.integers(0, 99))
def test_split_and_merge_are_the_derivatives_of_each_other(grouped: Grouped, seed: int) -> None:
    """They move numbers without loss, so each is the transpose of the other."""
    cut = partition_of(grouped)
    factor = torch.randn(grouped.shape, generator=torch.Generator().manual_seed(seed))
    factors = cut.split(factor)
    weight = torch.zeros(grouped.shape, requires_grad=True)
    torch.autograd.backward(cut.split(weight), factors)
    assert torch.equal(torch.as_tensor(weight.grad), factor)
    parts = [torch.zeros_like(part, requires_grad=True) for part in factors]
    cut.merge(parts).backward(factor)
    for part, expected in zip(parts, factors, strict=True):
        assert torch.equal(torch.as_tensor(part.grad), expected)


@given(grouped=weights)
def test_numbers_per_group_and_per_kernel_reach_their_components(grouped: Grouped) -> None:
    cut = partition_of(grouped)
    groups = grouped.groups()
    per_group = cut.per_component(np.arange(len(groups)))
    for numbers, values, segments in zip(cut.groups, per_group, cut.segments, strict=True):
        np.testing.assert_array_equal(values, segments.spread(torch.from_numpy(numbers)).numpy())
    cells = np.arange(grouped.layout.out_channels * grouped.layout.in_channels)
    per_kernel = cells.reshape(grouped.layout.out_channels, grouped.layout.in_channels)
    components = grouped.collections[0].components
    if components != "kernel":
        with pytest.raises(ValueError, match=rf"a {components} is one component.*got shape"):
            cut.per_component(per_kernel)
        return
    kernels = grouped.layout.channels(numbered(grouped.shape)).flatten(0, 1)
    for part, values in zip(cut.split(numbered(grouped.shape)), cut.per_component(per_kernel), strict=True):
        first_entries = kernels[torch.from_numpy(values)].flatten(1).amin(1)
        assert torch.equal(part.flatten(1).amin(1), first_entries)


@pytest.mark.parametrize(
    ("kernel", "size"),
    [
        ((5,), (5, 1)),
        ((3, 3), (3, 3)),
        ((3, 2), (3, 2)),
        ((2, 3), (3, 2)),
        ((1, 3), (3, 1)),
        ((3, 1), (3, 1)),
        ((2, 3, 4), (6, 4)),
        ((1, 2, 5), (5, 2)),
    ],
)
def test_wide_kernels_are_transposed(kernel: tuple[int, ...], size: tuple[int, int]) -> None:
    layout = WeightLayout((2, 2, *kernel))
    cut = partition([collection(2, 2, "layer", "sphere")], layout)
    assert cut.sizes == (size,)
    (part,) = cut.split(numbered(layout.shape))
    kernel_matrix = numbered(layout.shape)[0, 0].reshape(-1, kernel[-1] if len(kernel) > 1 else 1)
    assert torch.equal(part[0], kernel_matrix if kernel_matrix.shape == size else kernel_matrix.mT)


def test_a_part_costs_no_index_where_kernels_are_in_order() -> None:
    layout = WeightLayout((4, 4, 3, 3))
    assert not dict(partition([collection(4, 4, "layer", "sphere")], layout).named_buffers())
    assert not dict(partition([collection(4, 4, "po", "sphere")], layout).named_buffers())
    random = partition([collection(4, 4, "pio", ("sphere", "stiefel"), "random")], layout)
    assert {b.dtype for b in random.buffers()} == {torch.int32}
    assert not random.state_dict()


@given(grouped=weights, seed=st.integers(0, 99))
def test_memory_format_does_not_matter(grouped: Grouped, seed: int) -> None:
    """However a weight's dimensions are ordered in memory, its parts are the same, and so is what is made of them."""
    cut = partition_of(grouped)
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(grouped.shape, generator=generator)
    parts = cut.split(weight)
    rows = [part.contiguous() for part in parts]
    for order in itertools.permutations(range(weight.ndim)):
        inverse = [order.index(dim) for dim in range(weight.ndim)]
        stored = weight.permute(order).contiguous().permute(inverse)
        for part, expected in zip(cut.split(stored), parts, strict=True):
            assert torch.equal(part, expected)
        assert torch.equal(cut.merge(parts, like=stored), weight)
        assert torch.equal(cut.merge(rows, like=stored), weight)


@pytest.mark.parametrize("shape", [(8, 6, 3, 3), (8, 6, 2, 3), (8, 6, 5), (8, 6, 2, 3, 2)])
@pytest.mark.parametrize("last", [False, True])
def test_kernels_are_a_structure_of_arrays(shape: tuple[int, ...], last: bool) -> None:
    """The kernel number runs fastest in memory, and a merged weight lies there as it did."""
    weight = numbered(shape)
    if last:
        weight = weight.movedim(1, -1).contiguous().movedim(-1, 1)
    cut = partition([collection(8, 6, "po", ("sphere", "oblique"), "random")], WeightLayout(shape))
    for part in cut.split(weight):
        assert part.stride(0) == 1
    merged = cut.merge(cut.split(weight), like=weight)
    assert (merged.stride(1) == 1) == last
    assert cut.merge(cut.split(weight)).is_contiguous()


def test_equal_blocks_of_one_kind_share_a_part() -> None:
    blocks = collection(8, 12, "pi", ("sphere", "stiefel", "sphere"), components="block")
    cut = partition([blocks], WeightLayout((8, 12)))
    assert cut.kinds == ("sphere", "stiefel")
    assert cut.counts == (2, 1)


@given(grouped=weights, seed=st.integers(0, 99), dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
def test_parts_are_put_where_they_came_from(grouped: Grouped, seed: int, dtype: torch.dtype) -> None:
    """However a weight's dimensions are ordered in memory, and even if parts are in another precision than it is."""
    cut = partition_of(grouped)
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(grouped.shape, generator=generator)
    parts = cut.split(weight)
    for order in itertools.permutations(range(weight.ndim)):
        inverse = [order.index(dim) for dim in range(weight.ndim)]
        for room in (0, 1):  # in memory of its own, and as a part of a larger tensor
            shape = [weight.shape[dim] for dim in order]
            memory = torch.full((*shape[:-1], shape[-1] + room), torch.nan, dtype=dtype)
            target = memory[..., : shape[-1]].permute(inverse)
            cut.put_(parts, target)
            assert torch.equal(target, weight.to(dtype))
            assert int(memory.isnan().sum()) == memory.numel() - weight.numel()


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_many_kernels_are_merged_and_put_where_they_came_from(format: torch.memory_format) -> None:
    groups = collection(96, 96, "pio", ("sphere", "oblique", "stiefel"), "random")
    cut = partition([groups], WeightLayout((96, 96, 3, 3)))
    weight = torch.randn(96, 96, 3, 3).to(memory_format=format)
    parts = cut.split(weight)
    assert torch.equal(cut.merge(parts, weight), weight)
    target = torch.empty_like(weight)
    cut.put_(parts, target)
    assert torch.equal(target, weight)


@given(grouped=weights)
def test_kernels_of_a_part_are_in_the_order_of_the_weight(grouped: Grouped) -> None:
    """So that they are gathered from front to back; blocks have an order of their own."""
    if grouped.collections[0].components == "kernel":
        kernels = grouped.layout.channels(numbered(grouped.shape)).flatten(2)
        first_entries = kernels.flatten(0, 1).amin(1)
        for part in partition_of(grouped).split(numbered(grouped.shape)):
            found = torch.isin(first_entries, part.flatten(1).amin(1))
            assert torch.equal(part.flatten(1).amin(1), first_entries[found])


@given(grouped=sections_of_blocks())
def test_an_index_of_blocks_is_two_short_numbers_per_row_and_column(grouped: Grouped) -> None:
    cut = partition_of(grouped)
    rows, columns = grouped.shape
    assert {buffer.dtype for buffer in cut.buffers()} <= {torch.int32}
    assert sum(buffer.numel() for buffer in cut.buffers()) <= 2 * (rows + grouped.layout.sections * columns)
    assert not cut.state_dict()


@pytest.mark.parametrize("strategy", ["pi", "po", "pio"])
@pytest.mark.parametrize("shape", [(8, 12), (8, 12, 1, 1), (9, 7, 2, 2)])
def test_blocks_that_are_runs_are_views(strategy: str, shape: tuple[int, ...]) -> None:
    blocks = collection(*shape[:2], strategy, ("sphere", "stiefel", "oblique"), components="block")
    cut = partition([blocks], WeightLayout(shape))
    assert not list(cut.buffers())
    weight = numbered(shape)
    for part in cut.split(weight):
        assert part.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr()


@pytest.mark.parametrize("strategy", ["pi", "po", "pio"])
def test_blocks_lie_in_memory_as_the_rows_of_the_weight(strategy: str) -> None:
    """Rows are whole runs of memory, before and after they are turned, so that moving them is cheap."""
    blocks = collection(16, 24, strategy, ("sphere", "stiefel"), "random", components="block")
    cut = partition([blocks], WeightLayout((16, 24)))
    columns_of_blocks = {"pi": [12], "po": [24], "pio": [12, 24]}[strategy]
    for part in cut.split(numbered((16, 24))):
        dimension = part.stride().index(1)
        assert part.shape[dimension] in columns_of_blocks


class Operations(TorchDispatchMode):
    """Takes down the kinds of devices that the tensors of every operation lie on."""

    def __init__(self) -> None:
        super().__init__()
        self.devices: list[set[str]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.devices.append({x.device.type for x in tree_leaves(args) if isinstance(x, Tensor)})
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kinds", [("sphere", "stiefel"), ("sphere", "sphere", "stiefel")])
@pytest.mark.parametrize("strategy", ["pi", "po", "pio"])
def test_more_sections_take_no_more_operations(strategy: str, kinds: tuple[str, ...]) -> None:
    counts: list[int] = []
    for sections in (2, 16):
        collections = [
            collection(6, 9, strategy, kinds, "random", components="block", name=str(section))
            for section in range(sections)
        ]
        cut = partition(collections, WeightLayout((6 * sections, 9), sections=sections))
        weight = numbered((6 * sections, 9))
        with Operations() as operations:
            merged = cut.merge(cut.split(weight))
        assert torch.equal(merged, weight)
        counts.append(len(operations.devices))
    assert counts[0] == counts[1]


@pytest.mark.parametrize("shape", [(6, 9), (6, 9, 1, 1), (6, 9, 3, 2)])
def test_blocks_are_cut_inside_of_compiled_functions(shape: tuple[int, ...]) -> None:
    blocks = collection(6, 9, "pio", ("sphere", "stiefel"), "random", components="block")
    cut = partition([blocks], WeightLayout(shape))

    def parts_and_weight(weight: Tensor) -> tuple[list[Tensor], Tensor]:
        parts = cut.split(weight)
        return parts, cut.merge([2 * part for part in parts], like=weight)

    compiled = torch.compile(parts_and_weight, fullgraph=True, backend="aot_eager")
    parts, weight = compiled(numbered(shape))
    for part, expected in zip(parts, cut.split(numbered(shape)), strict=True):
        assert torch.equal(part, expected)
    assert torch.equal(weight, 2 * numbered(shape))


@pytest.mark.parametrize("components", ["kernel", "block", "filter"])
def test_indices_follow_the_weight(components: str) -> None:
    """On the meta device nothing can be read, so a wrong device is an error there, too."""
    layout = WeightLayout((4, 6, 3, 3))
    cut = partition([collection(4, 6, "pio", ("sphere", "stiefel"), "random", components=components)], layout)
    with Operations() as operations:
        parts = cut.split(torch.zeros(layout.shape, device="meta"))
        assert cut.merge(parts).shape == layout.shape
    assert {"cpu", "meta"} not in operations.devices
    assert all(s.sum(p.flatten(1).sum(1)).is_meta for s, p in zip(cut.segments, parts, strict=True))
    assert {b.device.type for b in cut.buffers()} == {"cpu"}
    assert {b.device.type for b in cut.to("meta").buffers()} == {"meta"}
    parts = cut.split(torch.zeros(layout.shape, device="meta"))
    assert cut.merge(parts).shape == layout.shape


@pytest.mark.parametrize("shape", [(8, 12), (8, 12, 3, 3)])
def test_filters_that_keep_their_places_are_views(shape: tuple[int, ...]) -> None:
    filters = collection(*shape[:2], "pi", ("sphere", "stiefel", "euclidean"), components="filter")
    weight = numbered(shape)
    cut = partition([filters], WeightLayout(shape))
    assert [tuple(rows.shape) for rows in cut.rows] == [(3, 1), (1, 3), (2, 1)]
    for part, rows in zip(cut.split(weight), cut.rows, strict=True):
        assert part.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr()
        for component, own in zip(part, rows, strict=True):
            assert torch.equal(component, weight[own.long()].flatten(1).mT)


@pytest.mark.parametrize("filters", [2, 3, 4])
def test_the_rectangle_of_a_groups_filters(filters: int) -> None:
    """As of a block: filters are columns of the component unless it would be wide then."""
    cut = partition([collection(filters, 3, "layer", "stiefel", components="filter")], WeightLayout((filters, 3)))
    assert isinstance(cut, FilterPartition)
    ((rows, columns),) = [cut.rectangles(0)]
    weight = numbered((filters, 3))
    block = weight[rows[0].long()][:, columns[0].long()]
    (component,) = cut.split(weight)[0]
    assert torch.equal(component, block.mT if filters < 3 else block)
    assert torch.equal(cut.merge([component[None]]), weight)
    assert cut.rectangles(0)[1].data_ptr() == columns.data_ptr()  # compiled code is given the address


# -- segments ----------------------------------------------------------------------------------------------------

sizes_of_segments = st.lists(st.integers(1, 4), min_size=1, max_size=5)


@given(sizes=sizes_of_segments | st.integers(1, 4).flatmap(lambda n: st.integers(1, 4).map(lambda g: [n] * g)))
def test_segments_are_loops_over_groups(sizes: list[int]) -> None:
    segments = Segments.of(sizes)
    values = torch.randn(sum(sizes), dtype=torch.float64)
    runs = values.split(sizes)
    torch.testing.assert_close(segments.sum(values), torch.stack([run.sum() for run in runs]))
    assert torch.equal(segments.max(values), torch.stack([run.max() for run in runs]))
    per_group = torch.arange(len(sizes))
    assert segments.spread(per_group).tolist() == np.repeat(np.arange(len(sizes)), sizes).tolist()
    assert (segments.labels is None) == (len(set(sizes)) == 1)


@given(sizes=sizes_of_segments, data=st.data())
def test_segments_in_any_order_are_loops_over_groups(sizes: list[int], data: st.DataObject) -> None:
    runs = np.repeat(np.arange(len(sizes)), sizes)
    labels = np.array(data.draw(st.permutations(runs.tolist())))
    segments = Segments.labelled(labels, len(sizes))
    values = torch.randn(len(labels), dtype=torch.float64)
    members = [values[torch.from_numpy(labels == group)] for group in range(len(sizes))]
    torch.testing.assert_close(segments.sum(values), torch.stack([own.sum() for own in members]))
    assert torch.equal(segments.max(values), torch.stack([own.max() for own in members]))
    assert segments.spread(torch.arange(len(sizes))).tolist() == labels.tolist()
    assert segments.are_components == (labels.tolist() == list(range(len(labels))))
    assert (segments.labels is None) == (len(set(sizes)) == 1 and (labels == runs).all())


@given(parts=st.lists(sizes_of_segments, min_size=1, max_size=4))
def test_joined_segments_are_one_behind_the_other(parts: list[list[int]]) -> None:
    joined = Segments.joined([Segments.of(sizes) for sizes in parts], torch.device("cpu"))
    together = Segments.of([size for sizes in parts for size in sizes])
    assert (joined.count, joined.total) == (together.count, together.total)
    groups = torch.arange(joined.count)
    assert torch.equal(joined.spread(groups), together.spread(groups))
    values = torch.randn(joined.total, dtype=torch.float64)
    torch.testing.assert_close(joined.sum(values), together.sum(values))


# -- errors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("collections", "layout", "message"),
    [
        ([collection(2, 3, "pi", "sphere")], WeightLayout((3, 2, 3, 3)), r"3 -> 2 channels.*has 2 -> 3; build it with"),
        ([collection(2, 3, "pi", "sphere")] * 2, WeightLayout((2, 3, 3, 3)), r"1 section\(s\) needs one .* got 2"),
        ([collection(2, 3, "pi", "sphere")], WeightLayout((2, 3)), r'single numbers.*components="block"'),
        ([collection(2, 3, "pi", "sphere")], WeightLayout((2, 3, 1, 1)), r'single numbers.*components="block"'),
        (
            [collection(2, 3, "pi", "sphere"), collection(2, 3, "pi", "sphere", components="block")],
            WeightLayout((4, 3), sections=2),
            r'build every collection with components="block"',
        ),
    ],
)
def test_collections_that_do_not_fit(collections: list[Any], layout: WeightLayout, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        partition(collections, layout)
