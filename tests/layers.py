"""Layers, their groups, and where each component lies in the weight, by definition: one channel pair at a time."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st
from torch import nn

from fgo_geo.grouping import MANIFOLD_KINDS, Collection, collection
from fgo_geo.weights.layout import WeightLayout, layout_of

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


@st.composite
def convolutions(draw: st.DrawFn) -> nn.Module:
    """A convolution of one to three dimensions, maybe transposed, grouped or depthwise."""
    dims = draw(st.sampled_from([1, 2, 2, 3]))
    kernel = tuple(draw(st.sampled_from([3, 2, 1])) for _ in range(dims))
    groups = draw(st.integers(1, 3))
    inputs, outputs = (groups * draw(st.integers(1, 3)) for _ in range(2))
    kind = draw(st.sampled_from([CONVOLUTIONS, TRANSPOSED]))[dims]
    return kind(inputs, outputs, kernel, groups=groups, bias=False)


@st.composite
def layers(draw: st.DrawFn) -> tuple[nn.Module, str]:
    """A layer, and the name of its weight."""
    kind = draw(st.sampled_from(["convolution"] * 4 + ["linear", "attention"]))
    if kind == "convolution":
        return draw(convolutions()), "weight"
    if kind == "linear":
        return nn.Linear(draw(st.integers(1, 7)), draw(st.integers(1, 7))), "weight"
    return nn.MultiheadAttention(draw(st.integers(1, 5)), 1), "in_proj_weight"


@dataclass(frozen=True)
class Grouped:
    """The layout of a weight, and the collections of its sections."""

    layout: WeightLayout
    collections: tuple[Collection, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.layout.shape

    def cell(self, d: int, c: int) -> tuple[int, int]:
        """Where the kernel from input channel ``c`` (of its group) to output channel ``d`` is stored."""
        if self.layout.storage == "conv":
            return d, c
        outputs_per_group = self.shape[1]
        inputs_per_group = self.shape[0] // self.layout.conv_groups
        return d // outputs_per_group * inputs_per_group + c, d % outputs_per_group

    def groups(self) -> list[tuple[str, list[np.ndarray]]]:
        """Kind and components of every group; a component is the flat positions of its entries, ``A x B``."""
        positions = np.arange(math.prod(self.shape)).reshape(self.shape)
        rows = self.layout.out_channels // self.layout.sections
        found = []
        for section, groups in enumerate(self.collections):
            for group in groups.groups:
                kernels = [[positions[self.cell(d + section * rows, c)] for c in group.columns] for d in group.rows]
                rows_of = [np.concatenate([k.ravel() for k in row]) for row in kernels]
                if groups.components == "filter" and group.manifold not in ("stiefel", "spectral_ball"):
                    matrices = [row[:, None] for row in rows_of]
                elif groups.components == "kernel":
                    matrices = [
                        k.reshape(-1, k.shape[-1] if k.ndim > 1 else 1) for k in itertools.chain.from_iterable(kernels)
                    ]
                else:
                    matrices = [np.array(rows_of)]
                found.append((group.manifold, [m if len(m) >= len(m.T) else m.T for m in matrices]))
        return found


@st.composite
def grouped_weights(draw: st.DrawFn, movable: bool = False, of_kinds: Sequence[str] = MANIFOLD_KINDS) -> Grouped:
    """A layer's weight with groups; ``movable``: every component has room to move on its manifold."""
    module, name = draw(layers())
    layout = layout_of(module, name)
    assert isinstance(layout, WeightLayout)
    strategy = draw(st.sampled_from(["pio", "pi", "po", "layer"]))
    kinds = draw(st.lists(st.sampled_from(of_kinds), min_size=1, max_size=1 if strategy == "layer" else 4))
    single_numbers = math.prod(layout.kernel) == 1
    components = draw(
        st.sampled_from(["block"] * 3 + ["filter"] if single_numbers else ["kernel"] * 3 + ["block", "filter"])
    )
    collections = tuple(
        collection(
            layout.out_channels // layout.sections,
            layout.in_channels,
            strategy,
            kinds,
            draw(st.sampled_from(["random", "deterministic"])),
            draw(st.integers(0, 99)),
            components=components,
            name=f"section {section}",
        )
        for section in range(layout.sections)
    )
    grouped = Grouped(layout, collections)
    if movable and not all(can_move(kind, m.shape) for kind, members in grouped.groups() for m in members):
        return Grouped(layout, tuple(_with_euclidean(c) for c in collections))
    return grouped


def can_move(kind: str, shape: tuple[int, ...]) -> bool:
    """Whether the manifold of a component ``A x B`` has positive dimension."""
    rows, columns = shape
    dimension = {
        "sphere": rows * columns - 1,
        "oblique": (rows - 1) * columns,
        "stiefel": rows * columns - columns * (columns + 1) // 2,
    } | dict.fromkeys(("euclidean", "ball", "spectral_ball"), rows * columns)
    return dimension[kind] > 0


def _with_euclidean(groups: Collection) -> Collection:
    return collection(
        groups.out_channels,
        groups.in_channels,
        groups.strategy,
        ["euclidean"] * len(groups.kinds),
        groups.selection,
        groups.seed,
        components=groups.components,
        name=groups.name,
    )
