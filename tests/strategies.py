"""What the laws are tested on: a registry of manifolds, and Hypothesis strategies of cases.

A new component manifold is one entry of ``ENTRIES``: its constructor, the shapes of its components, its oracle, and
what it claims beyond the laws that hold for all.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import geoopt
import numpy as np
import oracles
import pytest
import torch
from hypothesis import strategies as st
from own_kind import Rows
from torch import Tensor

from fgo_geo import Oblique, ScaledSphere, Stiefel
from fgo_geo.manifolds import ComponentManifold

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Entry:
    """A manifold, and what is claimed of it."""

    name: str
    make: Callable[[float | Tensor], ComponentManifold]
    component: st.SearchStrategy[Shape]
    oracle: oracles.Quadric
    retract: Callable[[np.ndarray, float], np.ndarray]  # from x + u to the manifold
    error_order: int = 3  # the retraction leaves the geodesic like the step to this power
    parallel: bool = True  # transp_follow_expmap is the parallel transport
    lines: Callable[[np.ndarray], Sequence[np.ndarray]] = lambda x: [x]  # what has norm r, on spherical manifolds

    def __str__(self) -> str:
        return self.name

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(self.name)  # keeps Hypothesis's reports short


def _sizes(*bounds: tuple[int, int]) -> st.SearchStrategy[Shape]:
    return st.tuples(*(st.integers(low, high) for low, high in bounds))


_TALL = _sizes((1, 7), (1, 5)).filter(lambda shape: shape[0] >= shape[1] and shape != (1, 1))

ENTRIES = [
    Entry("sphere", ScaledSphere, _sizes((2, 9)), oracles.SPHERE, oracles.SPHERE.nearest),
    Entry(
        "sphere of kernels",
        functools.partial(ScaledSphere, ndim=2),
        _sizes((1, 5), (1, 5)).filter(lambda shape: math.prod(shape) > 1),
        oracles.SPHERE,
        oracles.SPHERE.nearest,
    ),
    Entry("oblique", Oblique, _sizes((2, 6), (1, 5)), oracles.OBLIQUE, oracles.OBLIQUE.nearest, lines=lambda x: x.T),
    Entry("stiefel", Stiefel, _TALL, oracles.STIEFEL, oracles.STIEFEL.nearest, parallel=False),
    Entry("rows", Rows, _sizes((1, 5), (2, 6)), oracles.ROWS, oracles.ROWS.nearest, lines=list),  # a user's own
    Entry(
        "stiefel qr",
        functools.partial(Stiefel, retraction="qr"),
        _TALL,
        oracles.STIEFEL,
        lambda y, radius: radius * oracles.gram_schmidt(y),
        error_order=2,
        parallel=False,
    ),
]


@dataclass(frozen=True)
class Case:
    """A manifold with a radius, a shape, a type, and a stream of random numbers."""

    entry: Entry
    batch: Shape
    component: Shape
    radius: float | Tensor
    dtype: torch.dtype
    seed: int

    @functools.cached_property
    def manifold(self) -> ComponentManifold:
        return self.entry.make(self.radius)

    @functools.cached_property
    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)

    @property
    def shape(self) -> Shape:
        return self.batch + self.component

    @property
    def eps(self) -> float:
        return torch.finfo(self.dtype).eps

    @functools.cached_property
    def r(self) -> Tensor:
        """The radius of every component, of shape ``(*batch, 1, ..., 1)``."""
        radius = torch.as_tensor(self.radius, dtype=self.dtype).expand(self.batch)
        return radius[(..., *(None,) * len(self.component))]

    def gaussian(self) -> Tensor:
        return torch.randn(self.shape, dtype=self.dtype, generator=self.generator)

    def ambient(self) -> Tensor:
        """Any tensor, of the size of a point."""
        return self.r * self.gaussian()

    def point(self) -> Tensor:
        return self.manifold.random(self.shape, dtype=self.dtype, generator=self.generator).as_subclass(Tensor)

    def tangent(self, x: Tensor, length: float = 1.0) -> Tensor:
        """A tangent vector of norm ``length * r`` per component."""
        u = self.manifold.proju(x, self.gaussian())
        u = u * (length * self.r / self.manifold.norm(x, u, keepdim=True))
        return self.manifold.proju(x, u)  # scaling a short vector up has enlarged its rounding

    def components(self, *tensors: Tensor) -> list[tuple[float, tuple[np.ndarray, ...]]]:
        """Radius and components, one after the other, in float64."""
        tensors = tuple(t.expand(self.shape) for t in tensors)
        return [
            (float(self.r[index].max()), tuple(t[index].double().numpy() for t in tensors))
            for index in itertools.product(*map(range, self.batch))
        ]

    def assert_tangent(self, x: Tensor, u: Tensor, factor: float = 64) -> None:
        """Assert that ``u`` keeps the constraints at ``x`` to first order, up to rounding relative to ``r``."""
        for radius, (at, step) in self.components(x, u):
            assert np.abs(self.entry.oracle.forms(at, step)).max() <= factor * self.eps * radius**2

    def close(self, actual: Tensor, expected: Tensor, factor: float = 32, degree: int = 1) -> None:
        """Assert equality up to ``factor`` roundings, relative to ``r ** degree``."""
        unit = self.r**degree
        if actual.ndim == len(self.batch):
            unit = unit.reshape(self.batch)
        expected = torch.as_tensor(expected, dtype=torch.float64) / unit
        scale = max(1.0, float(expected.abs().max()))
        torch.testing.assert_close(actual.double() / unit, expected, rtol=0, atol=factor * self.eps * scale)


_NUMBERS = st.sampled_from([1.0, 0.5, 0.02, 3.0, 40.0])


@st.composite
def _radii(draw: st.DrawFn, batch: Shape) -> float | Tensor:
    """A number, or a tensor that broadcasts over the batch."""
    kept = draw(st.integers(0, len(batch)))
    if kept == 0:
        return draw(_NUMBERS)
    shape = [size if draw(st.booleans()) else 1 for size in batch[len(batch) - kept :]]
    values = draw(st.lists(_NUMBERS, min_size=math.prod(shape), max_size=math.prod(shape)))
    return torch.tensor(values, dtype=torch.float64).reshape(shape)


@st.composite
def cases(draw: st.DrawFn, entry: Entry, dtype: torch.dtype | None = None) -> Case:
    """A case of one manifold; float32 or float64 unless a type is given."""
    batch = draw(st.sampled_from([(), (1,), (3,), (2, 2)]))
    return Case(
        entry,
        batch,
        draw(entry.component),
        draw(_radii(batch)),
        dtype or draw(st.sampled_from([torch.float64, torch.float32])),
        draw(st.integers(0, 2**31)),
    )


def any_case(dtype: torch.dtype | None = None) -> st.SearchStrategy[Case]:
    """A case of any manifold."""
    return st.sampled_from(ENTRIES).flatmap(lambda entry: cases(entry, dtype))


# -- the laws' parameters ------------------------------------------------------------------------------------------

every_entry = pytest.mark.parametrize("entry", ENTRIES, ids=str)
# The last entry differs in its retraction alone.
every_geometry = pytest.mark.parametrize("entry", ENTRIES[:-1], ids=str)
HALF = [torch.float16, torch.bfloat16]
SPHERICAL = [*ENTRIES[:3], ENTRIES[4]]

# Every public method: its arguments (a: any tensor, x: point, y: point nearby, u: step, v: tangent vector, b: bound
# on the step) and, for every result, the power of the radius that it scales with.
METHODS: dict[str, tuple[str, str]] = {
    "violation": ("x", "0"),
    "projx": ("a", "1"),
    "proju": ("xa", "1"),
    "egrad2rgrad": ("xa", "1"),
    "inner": ("xuv", "2"),
    "component_inner": ("xuv", "2"),
    "norm": ("xu", "1"),
    "retr": ("xu", "1"),
    "retract_bounded": ("xub", "1"),
    "expmap": ("xu", "1"),
    "logmap": ("xy", "1"),
    "dist": ("xy", "1"),
    "dist2": ("xy", "2"),
    "transp": ("xyv", "1"),
    "transp_follow_retr": ("xuv", "1"),
    "transp_follow_expmap": ("xuv", "1"),
    "retr_transp": ("xuv", "11"),
    "expmap_transp": ("xuv", "11"),
}
every_method = pytest.mark.parametrize("method", METHODS)


def arguments(case: Case, method: str) -> tuple[Any, ...]:
    x = case.point()
    values = {"x": x, "y": case.manifold.expmap(x, case.tangent(x, 0.9)), "b": 1.5}
    values |= {"a": case.ambient(), "u": case.tangent(x, 1.2), "v": case.tangent(x)}
    return tuple(values[letter] for letter in METHODS[method][0])


def results(manifold: geoopt.Manifold, method: str, args: tuple[Any, ...]) -> tuple[Tensor, ...]:
    result = getattr(manifold, method)(*args)
    return result if isinstance(result, tuple) else (result,)


def fixed(entry: Entry, *shape: int, radius: float | Tensor = 1.0, dtype: torch.dtype = torch.float64) -> Case:
    """A case without Hypothesis; the sphere's component is the last dimension, all others' the last two."""
    ndim = entry.make(1.0).ndim
    return Case(entry, shape[:-ndim], shape[-ndim:], radius, dtype, seed=0)
