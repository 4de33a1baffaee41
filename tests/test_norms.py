"""Norms against dense float64 oracles: one matrix, one group, one explicitly built convolution matrix at a time."""

from __future__ import annotations

import collections
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import grouped_weights

from fgo_geo.grouping import collection
from fgo_geo.norms import (
    MatrixNorms,
    conv_operator_norm_bound,
    conv_operator_norm_circular,
    group_norms,
    manifold_norm_bounds,
    matrix_norms,
    norms_of_groups,
    two_to_one_norm,
)
from fgo_geo.weights.components import WeightLayout, partition

SEEDS = st.integers(0, 2**31)


def randn(shape, seed, dtype=torch.float64):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


# -- Matrices and groups -----------------------------------------------------------------------------------------------


def oracle(matrix: torch.Tensor) -> tuple[float, float, float]:
    """Frobenius, spectral and 2→1 norm by their definitions."""
    rows = matrix.detach().double().numpy()
    spectral = np.linalg.svd(rows, compute_uv=False).max(initial=0.0)
    return math.sqrt((rows**2).sum()), spectral, sum(math.sqrt((row**2).sum()) for row in rows)


def assert_norms(actual: MatrixNorms, expected: list[tuple[float, float, float]], rtol: float) -> None:
    table = torch.stack([field.reshape(-1) for field in actual], dim=-1).double()
    torch.testing.assert_close(table, torch.tensor(expected, dtype=torch.float64).reshape(-1, 3), rtol=rtol, atol=1e-15)


@st.composite
def matrices(draw, dtypes=(torch.float64,)):
    """Batches of matrices of any rank, from 0 to full."""
    batch = draw(st.sampled_from([(), (3,), (2, 2), (0,)]))
    rows, columns = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    rank = draw(st.integers(0, min(rows, columns)))
    left, right = randn((*batch, rows, rank), draw(SEEDS)), randn((*batch, rank, columns), draw(SEEDS))
    return (left @ right).to(draw(st.sampled_from(dtypes)))


@given(matrices(dtypes=(torch.float64, torch.float32, torch.bfloat16, torch.float16)))
def test_matrix_norms_are_the_definitions(w):
    actual = matrix_norms(w)
    double = w.dtype == torch.float64
    assert all(field.dtype == (torch.float64 if double else torch.float32) for field in actual)
    assert all(field.shape == w.shape[:-2] for field in actual)
    # Rank-deficient matrices have singular values of size √eps where zeros belong, but not as the largest one.
    assert_norms(actual, [oracle(m) for m in w.reshape(-1, *w.shape[-2:])], rtol=1e-13 if double else 1e-7)


@given(matrices(dtypes=(torch.float64, torch.float32, torch.bfloat16)))
def test_the_two_to_one_norm_alone_is_the_same_and_sees_which_side_is_up(w):
    for matrix in (w, w.mT):
        torch.testing.assert_close(two_to_one_norm(matrix), matrix_norms(matrix).two_to_one, rtol=0, atol=0)
        expected = [oracle(m)[2] for m in matrix.reshape(-1, *matrix.shape[-2:])]
        np.testing.assert_allclose(two_to_one_norm(matrix).flatten().double().numpy(), expected, rtol=1e-6, atol=1e-15)


@given(matrices())
def test_the_chain_of_inequalities(w):
    frobenius, spectral, two_to_one = matrix_norms(w)
    room = 1 + 1e-13
    assert (spectral <= room * frobenius).all()
    assert (frobenius <= room * two_to_one).all()
    assert (two_to_one <= room * math.sqrt(w.shape[-2]) * frobenius).all()


@st.composite
def grouped_components(draw, dtypes=(torch.float64, torch.float32)):
    count, groups = draw(st.integers(0, 12)), draw(st.integers(1, 5))
    shape = (count, draw(st.integers(1, 4)), draw(st.integers(1, 4)))
    labels = draw(st.lists(st.integers(0, groups - 1), min_size=count, max_size=count))
    label_type = draw(st.sampled_from([torch.int64, torch.int32, torch.uint8]))
    components = randn(shape, draw(SEEDS), draw(st.sampled_from(dtypes)))
    return components, torch.tensor(labels, dtype=label_type), groups


@given(grouped_components())
def test_group_norms_are_those_of_the_concatenation(case):
    components, labels, n_groups = case
    expected = []
    for group in range(n_groups):
        members = [components[i] for i in range(len(components)) if labels[i] == group]
        expected.append(oracle(torch.cat(members, dim=1)) if members else (0.0, 0.0, 0.0))
    actual = group_norms(components, labels, n_groups)
    assert all(field.shape == (n_groups,) and field.dtype == components.dtype for field in actual)
    assert_norms(actual, expected, rtol=1e-13 if components.dtype == torch.float64 else 1e-7)


@given(grouped=grouped_weights(), seed=SEEDS, dtype=st.sampled_from([torch.float64, torch.float32]))
def test_norms_of_the_groups_of_a_weight_stand_in_the_order_of_the_collections(grouped, seed, dtype):
    weight = randn(grouped.shape, seed, dtype)
    entries = weight.double().flatten()
    matrices = [torch.cat([entries[torch.from_numpy(m)] for m in members], 1) for _, members in grouped.groups()]
    actual = norms_of_groups(partition(grouped.collections, grouped.layout), weight)
    assert all(field.shape == (len(matrices),) and field.dtype == dtype for field in actual)
    assert_norms(actual, [oracle(m) for m in matrices], rtol=1e-13 if dtype == torch.float64 else 1e-7)


def test_groups_of_one_kernel_each_are_in_the_order_of_their_channels():
    """Which is not that of the kernels."""
    groups = collection(3, 5, "pi", ("sphere", "oblique", "stiefel"), "random")
    weight = randn((3, 5, 3, 3), seed=0)
    kernels = [weight[d, c] for group in groups.groups for d, c in group.index]
    cut = partition([groups], WeightLayout((3, 5, 3, 3)))
    assert not any(segments.are_components for segments in cut.segments)
    assert_norms(norms_of_groups(cut, weight), [oracle(kernel) for kernel in kernels], rtol=1e-13)


def test_a_group_of_one_component_is_the_component():
    w = randn((5, 3, 2), seed=0)
    assert_norms(group_norms(w, torch.arange(5), 5), [oracle(m) for m in w], rtol=1e-14)


@pytest.mark.parametrize("shape", [(2, 10**6), (10**6, 2)])
def test_long_matrices_take_little_memory(shape):
    """The long side's Gram matrix would have 10¹² entries."""
    assert matrix_norms(torch.ones(shape)).spectral.item() == pytest.approx(math.sqrt(2e6))


def test_more_matrices_than_the_eigensolver_takes_at_once():
    w = randn((2**17 + 3, 1, 2), seed=1)
    np.testing.assert_allclose(matrix_norms(w).spectral.numpy(), np.linalg.norm(w[:, 0].numpy(), axis=1), rtol=1e-13)


def test_float32_results_are_rounded_once():
    w = randn((200, 5, 4), seed=2, dtype=torch.float32)
    for single, double in zip(matrix_norms(w), matrix_norms(w.double()), strict=True):
        assert torch.equal(single, double.float())


@pytest.mark.parametrize("scale", [1e-140, 1e140])
def test_norms_of_tiny_and_huge_matrices(scale):
    w = randn((4, 3, 3), seed=3)
    assert_norms(matrix_norms(w * scale), [tuple(n * scale for n in oracle(m)) for m in w], rtol=1e-13)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_non_finite_entry_spoils_its_own_matrix_only(bad):
    w = randn((3, 2, 2), seed=4)
    w[1, 0, 0] = bad
    for batch in (matrix_norms(w), group_norms(w, torch.arange(3), 3)):
        assert batch.spectral[1].isnan()
        assert not batch.frobenius[1].isfinite()
        assert_norms(MatrixNorms(*(f[::2] for f in batch)), [oracle(w[0]), oracle(w[2])], rtol=1e-13)


def test_autocast_changes_nothing():
    w = randn((6, 3, 2), seed=5, dtype=torch.float32)
    kernel = randn((4, 4, 3), seed=5, dtype=torch.float32)
    labels = torch.tensor([0, 0, 1, 1, 1, 0])
    plain = (*matrix_norms(w), *group_norms(w, labels, 2), conv_operator_norm_bound(kernel, [6]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = (*matrix_norms(w), *group_norms(w, labels, 2), conv_operator_norm_bound(kernel, [6]))
    assert all(torch.equal(a, b) for a, b in zip(plain, cast, strict=True))


# -- Gradients ---------------------------------------------------------------------------------------------------------

# g is a subgradient of a norm at w if and only if <g, w> = ‖w‖ and the dual norm of g is at most 1.
DUAL = {
    "frobenius": lambda g: np.linalg.norm(g),
    "spectral": lambda g: np.linalg.svd(g, compute_uv=False).sum(),
    "two_to_one": lambda g: np.linalg.norm(g, axis=1).max(),
}


def assert_subgradient(field: str, w: torch.Tensor, g: torch.Tensor, norm: float) -> None:
    assert float((g * w).sum()) == pytest.approx(norm, rel=1e-12, abs=1e-14)
    assert DUAL[field](g.numpy()) <= 1 + 1e-12


@pytest.mark.parametrize("field", MatrixNorms._fields)
@given(w=matrices().filter(lambda w: w.ndim == 2))
def test_gradients_are_subgradients_at_every_rank(field, w):
    w.requires_grad_()
    norm = getattr(matrix_norms(w), field)
    (g,) = torch.autograd.grad(norm, w)
    assert_subgradient(field, w.detach(), g, norm.item())


@pytest.mark.parametrize("field", MatrixNorms._fields)
@pytest.mark.parametrize(
    "w", [torch.eye(3), 2 * torch.eye(4, 2), torch.ones(2, 3), torch.zeros(3, 2)], ids=lambda w: f"{w}"
)
def test_gradients_where_singular_values_repeat(field, w):
    w = w.double().requires_grad_()
    norm = getattr(matrix_norms(w), field)
    (g,) = torch.autograd.grad(norm, w)
    assert_subgradient(field, w.detach(), g, norm.item())


@pytest.mark.parametrize("field", MatrixNorms._fields)
@given(case=grouped_components(dtypes=(torch.float64,)).filter(lambda case: len(case[0])))
def test_group_gradients_are_subgradients_of_the_concatenation(field, case):
    components, labels, n_groups = case
    components.requires_grad_()
    values = getattr(group_norms(components, labels, n_groups), field)
    for group in set(labels.tolist()):
        (g,) = torch.autograd.grad(values[group], components, retain_graph=True)
        members = (labels == group).nonzero().squeeze(-1)
        assert not g[labels != group].any()
        cat = [torch.cat(list(t[members]), dim=1) for t in (components.detach(), g)]
        assert_subgradient(field, *cat, values[group].item())


def test_gradcheck():
    w = randn((2, 3, 4), seed=6).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: tuple(matrix_norms(x)), w)
    assert torch.autograd.gradgradcheck(lambda x: tuple(matrix_norms(x)), w)
    labels = torch.tensor([1, 0, 1])
    components = randn((3, 2, 2), seed=7).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: tuple(group_norms(x, labels, 2)), components)


# -- Manifolds ---------------------------------------------------------------------------------------------------------


def random_point(kind: str, rows: int, columns: int, seed: int) -> torch.Tensor:
    w = np.random.default_rng(seed).standard_normal((rows, columns))
    if kind == "sphere":
        w /= np.linalg.norm(w)
    elif kind == "oblique":
        w /= np.linalg.norm(w, axis=0)
    else:
        w = np.linalg.qr(w)[0]
    return torch.from_numpy(w)


KINDS = ["sphere", "oblique", "stiefel"]


@pytest.mark.parametrize("kind", KINDS)
@given(rows=st.integers(1, 6), columns=st.integers(1, 6), seed=SEEDS)
def test_points_obey_the_bounds_of_their_manifold(kind, rows, columns, seed):
    rows = max(rows, columns)
    bounds = manifold_norm_bounds(kind, rows, columns)
    actual = matrix_norms(random_point(kind, rows, columns, seed))
    assert all(field.dtype == torch.float64 and field.shape == () for field in bounds)
    assert all(a <= b * (1 + 1e-13) for a, b in zip(actual, bounds, strict=True))
    torch.testing.assert_close(actual.frobenius, bounds.frobenius, rtol=1e-13, atol=0)
    if kind == "stiefel":
        torch.testing.assert_close(actual.spectral, bounds.spectral, rtol=1e-13, atol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_bounds_are_attained(kind, size):
    """By orthogonal matrices (2→1), by equal columns (spectral, oblique), by rank one (spectral, sphere)."""
    bounds = manifold_norm_bounds(kind, size, size)
    hadamard = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64) / math.sqrt(2)
    orthogonal = {1: torch.eye(1).double(), 2: hadamard, 4: torch.kron(hadamard, hadamard)}[size]
    flat = orthogonal / math.sqrt(size) if kind == "sphere" else orthogonal
    torch.testing.assert_close(matrix_norms(flat).two_to_one, bounds.two_to_one)
    steep = torch.zeros(size, size, dtype=torch.float64)
    steep[0] = 1 / math.sqrt(size) if kind == "sphere" else 1.0
    steep = orthogonal if kind == "stiefel" else steep
    torch.testing.assert_close(matrix_norms(steep).spectral, bounds.spectral)


def test_the_counterexample_to_the_printed_table():
    """The 3 x 3 identity is on Stiefel and oblique; the paper's Table 2 bounds its 2→1 norm by 3^¼."""
    assert matrix_norms(torch.eye(3)).two_to_one == 3.0
    assert manifold_norm_bounds("stiefel", 3, 3).two_to_one == pytest.approx(3.0)
    assert 3**0.25 < 1.32


# -- Convolutions ------------------------------------------------------------------------------------------------------


def circular_matrix(weight, size, stride, dilation, groups):
    """The operator's matrix, entry by entry: output o reads input s o + j d modulo the size."""
    w = weight.double().numpy()
    out_channels, per_group = w.shape[:2]
    outputs = [n // s for n, s in zip(size, stride, strict=True)]
    matrix = np.zeros((out_channels, *outputs, per_group * groups, *size))
    for d, o in itertools.product(range(out_channels), itertools.product(*map(range, outputs))):
        first = d // (out_channels // groups) * per_group
        for c, taps in itertools.product(range(per_group), itertools.product(*map(range, w.shape[2:]))):
            read = tuple((s * x + j * e) % n for s, x, j, e, n in zip(stride, o, taps, dilation, size, strict=True))
            matrix[(d, *o, first + c, *read)] += w[(d, c, *taps)]
    return matrix.reshape(out_channels * math.prod(outputs), -1)


def dense_norm(function, channels, size):
    """Norm of a linear map of feature maps, from its values on basis vectors."""
    count = channels * math.prod(size)
    images = function(torch.eye(count, dtype=torch.float64).reshape(count, channels, *size))
    return np.linalg.svd(images.reshape(count, -1).numpy(), compute_uv=False).max()


CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
CONV_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


@st.composite
def convolutions(draw):
    """Weight, groups and per-axis (input size, stride, dilation)."""
    axes = draw(st.sampled_from([1, 1, 2, 2, 3]))
    groups = draw(st.integers(1, 2))
    out_channels, in_channels = (groups * draw(st.integers(1, 3)) for _ in range(2))
    small = st.integers(1, {1: 4, 2: 3, 3: 2}[axes])
    kernel, stride, dilation, times = (tuple(draw(small) for _ in range(axes)) for _ in range(4))
    weight = randn((out_channels, in_channels // groups, *kernel), draw(SEEDS))
    return weight, groups, tuple(s * t for s, t in zip(stride, times, strict=True)), stride, dilation


@given(convolutions())
def test_circular_norm_is_exact(case):
    weight, groups, size, stride, dilation = case
    matrix = circular_matrix(weight, size, stride, dilation, groups)
    actual = conv_operator_norm_circular(weight, size, stride, dilation, groups)
    assert actual.item() == pytest.approx(np.linalg.svd(matrix, compute_uv=False).max(), rel=1e-12)


def most_patches_with_one_position(kernel, outputs, stride, dilation):
    """By counting."""
    reads = collections.Counter(stride * o + dilation * j for o in range(outputs) for j in range(kernel))
    return max(reads.values())


@given(convolutions(), st.data())
def test_the_bound_is_above_the_zero_padded_operator(case, data):
    weight, groups, size, stride, dilation = case
    per_axis = zip(weight.shape[2:], dilation, size, strict=True)
    least = [max(0, math.ceil((d * (k - 1) + 1 - n) / 2)) for k, d, n in per_axis]
    pads = [pad + data.draw(st.integers(0, 3)) for pad in least]
    options = {"stride": stride, "padding": pads, "dilation": dilation, "groups": groups}
    channels = weight.shape[1] * groups
    exact = dense_norm(lambda x: CONV[len(size)](x, weight, **options), channels, size)
    iterations = data.draw(st.integers(0, 12))
    bound = conv_operator_norm_bound(weight, size, iterations=iterations, **options).item()
    assert bound >= exact
    # No worse than what the reshaped matrix alone would give, up to the rank's factor; exact for one output.
    reshaped = max(float(np.linalg.norm(w.numpy(), 2)) for w in weight.flatten(1).chunk(groups))
    outputs = CONV[len(size)](torch.zeros(1, channels, *size).double(), weight, **options).shape[2:]
    per_axis = zip(weight.shape[2:], outputs, stride, dilation, strict=True)
    patches = math.prod(most_patches_with_one_position(*axis) for axis in per_axis)
    gap = (len(weight) / groups) ** (0.5 ** (iterations + 1))
    assert bound <= gap * math.sqrt(patches) * reshaped * (1 + 1e-10)


@given(convolutions(), st.data())
def test_a_transposed_convolution_has_the_norm_of_its_adjoint(case, data):
    weight, groups, size, stride, dilation = case
    pads = [data.draw(st.integers(0, d * (k - 1) // 2)) for k, d in zip(weight.shape[2:], dilation, strict=True)]
    extra = [data.draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True)]
    options = {"stride": stride, "padding": pads, "dilation": dilation, "groups": groups}

    def transposed(x):
        return CONV_TRANSPOSE[len(size)](x, weight, output_padding=extra, **options)

    output_size = transposed(torch.zeros(1, len(weight), *size, dtype=torch.float64)).shape[2:]
    exact = dense_norm(transposed, len(weight), size)
    assert conv_operator_norm_bound(weight, output_size, **options).item() >= exact
    adjoint = dense_norm(lambda x: CONV[len(size)](x, weight, **options), weight.shape[1] * groups, output_size)
    assert adjoint >= exact * (1 - 1e-12)
    if all(e < s for e, s in zip(extra, stride, strict=True)):
        assert adjoint == pytest.approx(exact, rel=1e-12)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@given(SEEDS, st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.sampled_from(["same", "valid"]))
def test_named_paddings(seed, size, kernel, dilation, padding):
    weight = randn((2, 3, kernel), seed)
    size += dilation * (kernel - 1) if padding == "valid" else 0
    exact = dense_norm(lambda x: F.conv1d(x, weight, padding=padding, dilation=dilation), 3, (size,))
    bound = conv_operator_norm_bound(weight, [size], padding=padding, dilation=dilation, iterations=12)
    assert bound.item() >= exact


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize(
    ("weight", "size", "stride", "padding"),
    [
        ([1.0, -1.0], 3, 1, "same"),  # reads one position after the input and none before
        ([1.0, 1.0, -1.0], 2, 2, 1),  # reads one position before the input and none after
        ([1.0, -1.0, 1.0], 3, 1, 1),
    ],
)
def test_padding_does_not_wrap_round(weight, size, stride, padding):
    """With a shorter period, taps on the padding would read the other end of the input and cancel."""
    weight = torch.tensor(weight, dtype=torch.float64).reshape(1, 1, -1)
    exact = dense_norm(lambda x: F.conv1d(x, weight, stride=stride, padding=padding), 1, (size,))
    assert conv_operator_norm_bound(weight, [size], stride, padding).item() >= exact


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "dilation", "patches"),
    [
        ([8], [8], 1, 1, 1),  # one output
        ([9], [8], 1, 1, 2),  # two outputs
        ([16], [8], 1, 2, 1),  # two outputs that read even and odd positions
        ([8, 40], [8, 4], 2, 1, 2),  # one output on one axis; on the other, each position is in 4 / 2 patches
        ([15, 40], [8, 4], 2, 2, 4),  # dilation and stride have a common divisor: 4 patches with each even position
    ],
)
def test_few_outputs_are_bounded_by_the_reshaped_matrix(size, kernel, stride, dilation, patches):
    """Where the torus, on which kernels of ones add up to their sum, is far too large."""
    weight = torch.ones(1, 1, *kernel, dtype=torch.float64)
    options = {"stride": stride, "dilation": dilation}
    exact = dense_norm(lambda x: CONV[len(size)](x, weight, **options), 1, size)
    bound = conv_operator_norm_bound(weight, size, **options).item()
    assert exact <= bound
    assert bound == pytest.approx(math.sqrt(patches * math.prod(kernel)), rel=1e-9)


def test_pointwise_convolutions_have_one_frequency():
    """Exact at any input size, in little memory: an image of 10¹⁰ pixels has as many frequencies."""
    weight = randn((3, 2, 1, 1), seed=15)
    exact = oracle(weight.flatten(1))[1]
    assert conv_operator_norm_circular(weight, [10**5, 10**5], stride=2).item() == pytest.approx(exact, rel=1e-12)
    bound = conv_operator_norm_bound(weight, [10**5, 10**5], stride=2, iterations=30)
    assert exact <= bound.item() <= exact * (1 + 1e-8)


def test_the_torus_becomes_tight_for_large_inputs():
    weight = randn((3, 2, 3), seed=8)
    ratios = []
    for n in (8, 32, 128):
        exact = dense_norm(lambda x: F.conv1d(x, weight, padding=1), 2, (n,))
        ratios.append(conv_operator_norm_bound(weight, [n], padding=1, iterations=16).item() / exact)
    assert ratios[0] < 1.1
    assert ratios[1] < 1.01
    assert ratios[2] < 1.001


def test_more_iterations_tighten_the_bound_as_fast_as_promised():
    weight = randn((6, 8, 3, 3), seed=9)
    exact = conv_operator_norm_circular(weight, [6, 6]).item()  # the torus of 5 x 5 inputs with padding 1
    bounds = [conv_operator_norm_bound(weight, [5, 5], padding=1, iterations=t).item() for t in range(12)]
    assert all(a >= b for a, b in itertools.pairwise(bounds))
    assert all(exact <= bound <= 6 ** (0.5 ** (t + 1)) * exact * (1 + 1e-11) for t, bound in enumerate(bounds))


@settings(max_examples=200)
@given(size=st.integers(1, 5), seed=SEEDS, dtype=st.sampled_from([torch.float32, torch.float64]))
def test_rounding_never_puts_the_bound_below(size, seed, dtype):
    """Rank-one 1 x 1 kernels leave no gap: both inequalities are equalities, only rounding is left."""
    weight = torch.outer(randn((size,), seed), randn((3,), seed + 1))[..., None, None].to(dtype)
    exact = np.linalg.norm(weight[..., 0, 0].double().numpy(), 2)
    bound = conv_operator_norm_bound(weight, [4, 4])
    assert bound.dtype == dtype
    assert exact <= bound.item() <= exact * (1 + (1e-6 if dtype == torch.float32 else 1e-11))


@given(convolutions().filter(lambda case: all(s == 1 for s in case[3])))
def test_operator_norm_and_norm_of_the_reshaped_matrix(case):
    """An input inside one patch sees the reshaped matrix; every input is in at most Π k patches."""
    weight, groups, size, stride, dilation = case
    size = [n + d * k for n, d, k in zip(size, dilation, weight.shape[2:], strict=True)]
    operator = conv_operator_norm_circular(weight, size, stride, dilation, groups).item()
    reshaped = max(matrix_norms(w).spectral.item() for w in weight.flatten(1).chunk(groups))
    taps = math.prod(weight.shape[2:])
    assert reshaped <= operator * (1 + 1e-12)
    assert operator <= math.sqrt(taps) * reshaped * (1 + 1e-12)


@given(st.sampled_from([1, 2, 3]), st.integers(3, 6), SEEDS)
def test_an_integer_is_the_size_on_all_axes(axes, size, seed):
    weight = randn((2, 3, *[3, 2, 1][:axes]), seed)
    assert conv_operator_norm_bound(weight, size, padding=1) == conv_operator_norm_bound(weight, [size] * axes, 1, 1)
    assert conv_operator_norm_circular(weight, size) == conv_operator_norm_circular(weight, [size] * axes)
    from_numpy = conv_operator_norm_bound(weight, tuple(np.full(axes, size)), np.int64(1), np.int64(1))
    assert from_numpy == conv_operator_norm_bound(weight, size, padding=1)


def test_leading_dimensions_are_a_batch():
    weights = randn((2, 3, 4, 2, 3, 3), seed=10)
    circular = conv_operator_norm_circular(weights, [4, 6], stride=(1, 2), groups=2)
    bound = conv_operator_norm_bound(weights, [4, 6], stride=(1, 2), padding=1, groups=2)
    assert circular.shape == bound.shape == (2, 3)
    for i, j in itertools.product(range(2), range(3)):
        one = weights[i, j]
        torch.testing.assert_close(circular[i, j], conv_operator_norm_circular(one, [4, 6], (1, 2), groups=2))
        torch.testing.assert_close(bound[i, j], conv_operator_norm_bound(one, [4, 6], (1, 2), 1, groups=2))


@pytest.mark.parametrize("scale", [1e-100, 1e100])
def test_the_bound_neither_overflows_nor_underflows(scale):
    weight = randn((3, 2, 3), seed=11)
    bound = conv_operator_norm_bound(weight, [7], padding=1).item()
    assert conv_operator_norm_bound(weight * scale, [7], padding=1).item() == pytest.approx(scale * bound, rel=1e-12)


OPERATOR_NORMS = {
    "circular": lambda w: conv_operator_norm_circular(w, [4, 4], stride=2),
    "bound": lambda w: conv_operator_norm_bound(w, [5, 4], stride=2, padding=1, iterations=3),
}


@pytest.mark.parametrize("function", OPERATOR_NORMS.values(), ids=OPERATOR_NORMS)
def test_convolution_gradients(function):
    weight = randn((3, 2, 3, 3), seed=12).requires_grad_()
    assert torch.autograd.gradcheck(function, weight)
    (g,) = torch.autograd.grad(value := function(weight), weight)
    assert (g * weight).sum().item() == pytest.approx(value.item(), rel=1e-12)  # Euler: of degree one


@pytest.mark.parametrize("function", OPERATOR_NORMS.values(), ids=OPERATOR_NORMS)
@pytest.mark.parametrize("fill", [0.0, 1.0])
def test_convolution_gradients_are_finite_where_nothing_is_smooth(function, fill):
    weight = torch.full((2, 2, 3, 3), fill, dtype=torch.float64, requires_grad=True)
    (g,) = torch.autograd.grad(value := function(weight), weight)
    assert (g * weight).sum().item() == pytest.approx(value.item(), rel=1e-12)
    assert g.isfinite().all()
    assert bool(g.any()) == bool(fill)


@pytest.mark.parametrize("function", OPERATOR_NORMS.values(), ids=OPERATOR_NORMS)
def test_convolution_norms_of_non_finite_and_half_precision_weights(function):
    weight = randn((3, 2, 3, 3), seed=13, dtype=torch.bfloat16)
    assert function(weight).dtype == torch.float32
    assert function(weight).item() == pytest.approx(function(weight.double()).item(), rel=3e-7)
    weight[0, 0, 0, 0] = math.nan
    assert function(weight).isnan()


def test_the_bound_is_traced_whole():
    weight = randn((3, 2, 3, 3), seed=14)
    compiled = torch.compile(OPERATOR_NORMS["bound"], fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(weight), OPERATOR_NORMS["bound"](weight))


# -- Errors ------------------------------------------------------------------------------------------------------------

W = torch.ones(4, 2, 3, 3)
C = torch.ones(3, 2, 2)


def circular(weight=W, size=(4, 4), **options):
    return conv_operator_norm_circular(weight, size, **options)


def bound(size=(4, 4), **options):
    return conv_operator_norm_bound(W, size, **options)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: matrix_norms(torch.ones(3)), ValueError, r"w has shape \(3,\).*weight.flatten\(1\)"),
        (lambda: matrix_norms(torch.ones(3, 0)), ValueError, r"w has shape \(3, 0\)"),
        (lambda: matrix_norms(torch.ones(2, 2).int()), TypeError, r"w has dtype torch.int32"),
        (lambda: two_to_one_norm(torch.ones(4)), ValueError, r"w has shape \(4,\).*weight.flatten\(1\)"),
        (lambda: two_to_one_norm(torch.ones(2, 2).short()), TypeError, r"w has dtype torch.int16"),
        (lambda: matrix_norms(torch.ones(2, 2).cfloat()), TypeError, r"w has dtype torch.complex64"),
        (lambda: group_norms(C[0], torch.arange(2), 2), ValueError, r"components have shape \(2, 2\)"),
        (lambda: group_norms(C, torch.ones(3), 2), TypeError, r"labels have dtype torch.float32; expected integers"),
        (lambda: group_norms(C, torch.ones(3).bool(), 2), TypeError, r"labels have dtype torch.bool"),
        (
            lambda: group_norms(C, torch.arange(2), 2),
            ValueError,
            r"labels have shape \(2,\).*one per component: \(3,\)",
        ),
        (lambda: group_norms(C, torch.arange(3), 2), ValueError, r"labels range from 0 to 2; expected \[0, 2\)"),
        (lambda: group_norms(C, -torch.arange(3), 2), ValueError, r"labels range from -2 to 0"),
        (lambda: group_norms(C.int(), torch.arange(3), 3), TypeError, r"components has dtype torch.int32"),
        (lambda: manifold_norm_bounds("euclidean", 3, 3), ValueError, r"kind is 'euclidean'; expected one of 'sphere'"),
        (lambda: manifold_norm_bounds("stiefel", 2, 3), ValueError, r"a stiefel component is 2 x 3.*transpose"),
        (lambda: manifold_norm_bounds("sphere", 0, 3), ValueError, r"the component is 0 x 3"),
        (lambda: circular(size=(5, 4), stride=2), ValueError, r"stride \(2, 2\) doesn't divide input_size \(5, 4\)"),
        (lambda: circular(W[0, 0], [5]), ValueError, r"weight has shape \(3, 3\) and input_size is \(5,\)"),
        (lambda: circular(size=()), ValueError, r"input_size is \(\); expected a weight"),
        (lambda: circular(size=[0, 4]), ValueError, r"input_size is \[0, 4\]; expected 2 integers >= 1"),
        (lambda: circular(size=0), ValueError, r"input_size is 0; expected 2 integers >= 1, or one for all axes"),
        (lambda: circular(size=8.0), ValueError, r"input_size is 8.0; expected 2 integers >= 1"),
        (lambda: bound(size=(8.5, 8)), ValueError, r"input_size is \(8.5, 8\); expected 2 integers >= 1"),
        (lambda: bound(size="88"), ValueError, r"input_size is '88'; expected 2 integers >= 1"),
        (lambda: bound(size=None), ValueError, r"input_size is None; expected 2 integers >= 1"),
        (lambda: bound(stride=2.0), ValueError, r"stride is 2.0; expected 2 integers >= 1"),
        (lambda: bound(padding=0.5), ValueError, r"padding is 0.5; expected 2 integers >= 0"),
        (lambda: circular(W[0, 0], 8), ValueError, r"weight has shape \(3, 3\) and input_size is 8; expected a weight"),
        (lambda: circular(groups=3), ValueError, r"groups is 3; expected a divisor of the weight's 4 output channels"),
        (lambda: circular(groups=0), ValueError, r"groups is 0"),
        (lambda: circular(stride=(1, 1, 1)), ValueError, r"stride is \(1, 1, 1\); expected 2 integers"),
        (lambda: circular(dilation=0), ValueError, r"dilation is 0; expected 2 integers"),
        (lambda: circular(W.int()), TypeError, r"weight has dtype torch.int32"),
        (lambda: bound(padding=-1), ValueError, r"padding is -1; expected 2 integers >= 0"),
        (lambda: bound(padding="full"), ValueError, r"padding is 'full'; expected integers, 'same' or 'valid'"),
        (lambda: bound(padding="same", stride=2), ValueError, r"stride is \(2, 2\); expected a stride of 1"),
        (lambda: bound(size=(4, 2)), ValueError, r"spans 3 positions and the padded input 2"),
        (lambda: bound(iterations=-1), ValueError, r"iterations is -1; expected 0 or more"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()
