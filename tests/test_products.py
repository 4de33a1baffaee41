"""Products whose factors may be rounded, symmetric ones in blocks, norms without temporaries, memory that is kept."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._pytree import tree_flatten, tree_map_only

from fgo_geo import Stiefel
from fgo_geo.linalg import (
    Use,
    Workspace,
    frobenius_norm,
    gram_blocks,
    gram_excess,
    gram_matrix,
    inverse_root_gap,
    precision,
    products,
    refine_gap,
    root_of_sum,
    small_product,
    subtract_part,
    subtract_product,
    sym,
)

EPS = 2.0**-23
onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch was built without oneDNN")


def normal(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def by_columns(x: Tensor) -> Tensor:
    return x.mT.contiguous().mT


@pytest.fixture
def bfloat16_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor with a unit for bfloat16."""
    monkeypatch.setattr(products, "multiplies_bfloat16", lambda: True)


# -- a small part ------------------------------------------------------------------------------------------------


@onednn
@pytest.mark.usefixtures("bfloat16_unit")
@pytest.mark.parametrize("from_left", [False, True])
@pytest.mark.parametrize("layout", [torch.Tensor.contiguous, by_columns])
@pytest.mark.parametrize("batch", [(), (1,), (2,)])
def test_a_small_part_is_subtracted_as_exactly_as_float32_can(batch, layout, from_left) -> None:
    """Also where all roundings agree, as they do in a matrix of rank one."""
    orthonormal = torch.linalg.qr(normal((*batch, 300, 300), 0, torch.float64))[0].float()
    signs = normal((*batch, 300, 1), 1).sign()
    for part in (sym(normal((*batch, 300, 300), 2)), signs @ signs.mT):
        check_a_small_part(layout(orthonormal), 0.999 * 2.0**-15 / frobenius_norm(part).amax() * part, from_left)


def check_a_small_part(c: Tensor, part: Tensor, from_left: bool) -> None:
    left, right = (part, c) if from_left else (c, part)
    expected = c.double() - left.double() @ right.double()
    out = torch.full_like(c, math.nan)
    result = subtract_part(c, part, Workspace(), from_left=from_left, out=out)
    assert result is out
    assert float(torch.linalg.matrix_norm(result.double() - expected, 2).max()) <= 2.0**-22
    gram = gram_excess(result.double()) - gram_excess(expected)
    assert float(gram.abs().max()) <= 2.0**-22
    assert not torch.equal(result, c)
    assert not torch.equal(result, subtract_product(c, left, right)), "it was not rounded"


@pytest.mark.usefixtures("bfloat16_unit")
@pytest.mark.parametrize(
    ("size", "largest", "dtype"),
    [(300, 1.01 * 2.0**-15, torch.float32), (255, 1e-6, torch.float32), (300, 1e-6, torch.float64)],
)
def test_what_would_show_is_not_rounded(size: int, largest: float, dtype: torch.dtype) -> None:
    """A part with large entries, of either sign; narrow ones gain nothing."""
    c = normal((400, size), 0, dtype)
    for sign in (1, -1):
        part = torch.zeros(size, size, dtype=dtype)
        part[3, 4] = sign * largest
        result = subtract_part(c, part, Workspace(), out=torch.empty_like(c))
        assert torch.equal(result, subtract_product(c, c, part))


@pytest.mark.parametrize("switch", ["processor", "oneDNN"])
def test_no_unit_no_rounding(switch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without oneDNN torch multiplies bfloat16 a hundred times slower."""
    monkeypatch.setattr(products, "multiplies_bfloat16", lambda: switch == "oneDNN")
    c, part = normal((400, 300), 0), 1e-8 * normal((300, 300), 1)
    monkeypatch.setattr(type(torch.backends.mkldnn), "enabled", switch == "processor")
    result = subtract_part(c, part, Workspace(), out=torch.empty_like(c))
    assert torch.equal(result, subtract_product(c, c, part))


@pytest.mark.parametrize("unit", ["_is_amx_tile_supported", "_is_avx512_bf16_supported"])
def test_whether_there_is_a_unit_is_asked_of_torch(unit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False, raising=False)
    for supported in (True, False):
        precision.multiplies_bfloat16.cache_clear()
        monkeypatch.setattr(torch.cpu, unit, lambda supported=supported: supported)
        assert precision.multiplies_bfloat16() == (supported and torch.backends.mkldnn.is_available())
    precision.multiplies_bfloat16.cache_clear()
    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.delattr(torch.cpu, name)
    assert not precision.multiplies_bfloat16()
    precision.multiplies_bfloat16.cache_clear()


@given(
    batch=st.sampled_from([(), (1,), (3,), (2, 1)]),
    n=st.integers(1, 9),
    p=st.integers(1, 9),
    beta=st.sampled_from([1.0, 0.0, -0.5, 3.0]),
    alpha=st.sampled_from([1.0, -1.0, 0.25]),
    turned=st.booleans(),
    in_place=st.booleans(),
    seed=st.integers(0, 99),
)
def test_a_product_is_the_same_wherever_it_goes(batch, n, p, beta, alpha, turned, in_place, seed) -> None:
    layout = by_columns if turned else torch.Tensor.contiguous
    c, a = (layout(normal((*batch, n, p), seed + k, torch.float64)) for k in range(2))
    b = normal((*batch, p, p), seed + 2, torch.float64)
    expected = beta * c - alpha * torch.matmul(a, b)
    out = c.clone() if in_place else torch.full_like(c, 7.0)
    result = subtract_product(out if in_place else c, a, b, beta=beta, alpha=alpha, out=out)
    assert result.data_ptr() == out.data_ptr()
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-13)
    torch.testing.assert_close(subtract_product(c, a, b, beta=beta, alpha=alpha), expected, rtol=0, atol=1e-13)
    product = torch.full_like(c, 7.0)
    assert small_product(a, b, out=product).data_ptr() == product.data_ptr()
    torch.testing.assert_close(product, a @ b, rtol=0, atol=1e-13)


@pytest.mark.parametrize(("columns", "blocks"), [(1, 1), (255, 1), (256, 2), (500, 3), (513, 4), (1300, 4)])
@pytest.mark.parametrize("batch", [(), (1,), (2,)])
def test_a_gram_matrix_in_blocks(columns: int, blocks: int, batch: tuple[int, ...]) -> None:
    assert gram_blocks(columns) == blocks
    x = normal((*batch, 40, columns), columns, torch.float64)
    expected = x.mT @ x
    out = Workspace().square(x, Use.GAP).fill_(math.nan)
    assert gram_matrix(x, out=out) is out
    with_derivative = gram_matrix(x.clone().requires_grad_()).detach()
    for result in (out, gram_matrix(x), gram_matrix(by_columns(x)), with_derivative):
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-12)
        apart = -(-columns // blocks)  # entries that lie so far from the diagonal are in no block on it
        assert torch.equal(result.triu(apart), result.mT.triu(apart))
    torch.testing.assert_close(gram_excess(x, 2.0, out=out), expected / 4 - torch.eye(columns).double())


@given(
    rows=st.sampled_from([40, 300, 1100]),
    columns=st.integers(256, 600),
    batch=st.sampled_from([(), (1,), (2,)]),
    turned=st.booleans(),
    precise=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=25)
def test_a_wide_gram_matrix_in_single_precision_is_the_whole_product(
    rows, columns, batch, turned, precise, seed
) -> None:
    x = normal((*batch, rows, columns), seed)
    expected = x.double().mT @ x.double()
    x = by_columns(x) if turned else x
    for out in (None, Workspace().square(x, Use.GAP).fill_(math.nan)):
        error = gram_matrix(x, out=out, precise=precise).double() - expected
        assert float(error.abs().max()) <= (8 if precise else 24) * EPS * rows


class Wrapped(Tensor):
    """A tensor around another one that, like DTensor, does not mix with plain tensors."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapped:
        result = Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)  # type: ignore[attr-defined]
        result.inner = inner
        return result

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        inputs = tree_flatten((args, kwargs or {}))[0]
        assert all(type(x) is Wrapped for x in inputs if isinstance(x, Tensor))
        args, kwargs = tree_map_only(Wrapped, lambda x: x.inner, (args, kwargs or {}))
        return tree_map_only(Tensor, Wrapped, function(*args, **kwargs))


def test_a_wide_gram_matrix_of_a_tensor_subclass_or_under_another_default_device() -> None:
    x = normal((600, 300), 0)
    expected = gram_matrix(x)
    with torch.device("meta"):
        assert torch.equal(gram_matrix(x), expected)
    result = gram_matrix(Wrapped(x))
    assert isinstance(result, Wrapped)
    torch.testing.assert_close(result.inner, expected, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("columns", [1, 40, 300, 513])
@pytest.mark.parametrize("batch", [(), (1,), (2,)])
def test_a_product_of_commuting_matrices(columns: int, batch: tuple[int, ...]) -> None:
    a = sym(normal((*batch, columns, columns), columns, torch.float64)) / columns
    b = a @ a - 3 * a
    for result in (
        products.commuting_product(a, b),
        products.commuting_product(a, b.clone().requires_grad_()).detach(),
    ):
        torch.testing.assert_close(result, a @ b, rtol=0, atol=1e-12)
        torch.testing.assert_close(result, result.mT, rtol=0, atol=1e-12)


@given(shape=st.sampled_from([(1, 1), (3, 40), (40, 3), (2, 5, 4), (1, 7, 7)]), seed=st.integers(0, 99))
def test_a_norm_without_a_temporary(shape: tuple[int, ...], seed: int) -> None:
    x = normal(shape, seed, torch.float64)
    planes = x.movedim(0, -1).contiguous().movedim(-1, 0)
    for stored in (x, by_columns(x), planes):
        torch.testing.assert_close(frobenius_norm(stored), x.square().sum((-2, -1)).sqrt())


@pytest.mark.parametrize("shape", [(2000, 1000), (1_000_000, 4), (4, 1_000_000)])
def test_a_long_norm_is_exact(shape: tuple[int, int]) -> None:
    x = torch.full(shape, 0.1)
    for stored in (x, by_columns(x)):
        assert float(frobenius_norm(stored)) == pytest.approx(float(x.double().norm()), rel=1e-6)


# -- the inverse root --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("largest", [0.01, 0.06, 0.25, 1.0, 30.0])
@pytest.mark.parametrize("size", [3, 40, 257])
def test_the_gap_of_an_inverse_root_is_as_exact_as_its_entries(size: int, largest: float) -> None:
    """Relative to the gap itself: a Newton-Schulz iteration alone is exact relative to one."""
    turn = torch.linalg.qr(normal((size, size), size, torch.float64))[0]
    excess = (turn * torch.linspace(0, largest, size).double()) @ turn.mT
    values, vectors = torch.linalg.eigh(excess.float().double())
    expected = (vectors * (1 - (1 + values.clamp_min(-0.5)) ** -0.5)) @ vectors.mT
    result = inverse_root_gap(excess.float(), largest)
    error = float((result.double() - expected).abs().max())
    assert error <= 8 * EPS * float(expected.abs().max()) * max(1.0, largest**0.5)


def test_a_step_of_newton_squares_the_error() -> None:
    excess = torch.diag(torch.tensor([0.0, 0.3, 3.0], dtype=torch.float64))
    exact = torch.diag(1 - (1 + excess.diagonal()) ** -0.5)
    for error in (1e-2, 1e-4):
        gap = exact + torch.diag(torch.tensor([error, -error, error], dtype=torch.float64))
        singular = (1 - refine_gap(excess, gap).diagonal()) * (1 + excess.diagonal()).sqrt()
        before = (1 - gap.diagonal()) * (1 + excess.diagonal()).sqrt() - 1
        torch.testing.assert_close(singular - 1, -1.5 * before**2, rtol=0.03, atol=0)


@pytest.mark.parametrize("size", [(40, 20), (300, 256)])
@pytest.mark.parametrize("length", [0.05, 0.2, 0.41, 0.7, 1.0, 2.0])
def test_retractions_end_on_the_manifold_however_long_the_step(length: float, size: tuple[int, int]) -> None:
    """The steps that the theorem allows, and longer ones, in single precision; along one direction and along many."""
    manifold = Stiefel(0.5)
    x = manifold.projx(normal(size, 0))
    for noise in (normal(size, 1), normal((size[0], 1), 1) @ normal((1, size[1]), 2)):
        u = manifold.proju(x, noise)
        u = u * (0.5 * length / u.norm())
        for bound in (length, None):
            assert float(manifold.violation(manifold.retract_bounded(x, u, bound).double())) <= 1.5e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("length", [0.3, 1.0, 3.0, 10.0, 30.0, 90.0])
def test_long_retractions_are_as_exact_as_their_gram_matrix(length: float, dtype: torch.dtype) -> None:
    """Against a factorisation in double precision; a Gram matrix squares the step's length."""
    manifold, eps = Stiefel(), torch.finfo(dtype).eps
    x = torch.linalg.qr(normal((200, 100), 0, torch.float64))[0]
    u = manifold.proju(x, normal((200, 1), 1, torch.float64) @ normal((1, 100), 2, torch.float64))
    u = u * (length / u.norm())
    expected = manifold.retr(x, u)
    for bound in (length, None):
        error = (manifold.retract_bounded(x.to(dtype), u.to(dtype), bound).double() - expected).abs().max()
        assert float(error) <= 4 * eps * max(1.0, length**2 / 40)


# -- memory ------------------------------------------------------------------------------------------------------


def test_memory_of_a_use_grows_to_what_was_needed() -> None:
    workspace = Workspace()
    small = workspace.like(torch.zeros(2, 3), Use.EXCESS)
    large = workspace.like(torch.zeros(4, 3), Use.EXCESS)
    assert large.data_ptr() != small.data_ptr()
    for x, use, same in (
        (torch.zeros(2, 3), Use.EXCESS, True),
        (torch.zeros(2, 3), Use.PRODUCTS, False),
        (torch.zeros(2, 3, dtype=torch.float64), Use.EXCESS, False),
    ):
        again = workspace.like(x, use)
        assert (again.data_ptr() == large.data_ptr()) == same
        assert (again.shape, again.dtype) == (x.shape, x.dtype)


@pytest.mark.parametrize("batch", [(), (1,), (2, 3)])
def test_memory_is_laid_out_as_what_it_is_for(batch: tuple[int, ...]) -> None:
    x = torch.zeros(*batch, 5, 4)
    for stored in (x, by_columns(x)):
        assert Workspace().like(stored, Use.POINTS).stride() == stored.stride()
        assert Workspace().like(stored, Use.ROUNDED_MATRIX, torch.bfloat16).dtype == torch.bfloat16
    square = Workspace().square(x, Use.GAP)
    assert square.shape == (*batch, 4, 4)
    assert square.is_contiguous()


@pytest.mark.parametrize(("size", "between"), [(255, 255), (256, 272), (1000, 1000), (1024, 1040)])
def test_rows_of_squares_compete_for_no_lines_of_the_cache(size: int, between: int) -> None:
    assert Workspace().square(torch.empty(2, size), "gram").stride() == (between, 1)


def test_a_root_at_zero_has_a_derivative_wherever_there_is_one() -> None:
    zero, one = torch.zeros(2, 3), torch.ones(2, 3)
    with torch.no_grad():
        assert torch.equal(root_of_sum(zero, (-1,)), torch.zeros(2, 1))
        torch.testing.assert_close(root_of_sum(one, (-1,)), torch.full((2, 1), 3**0.5))
        value, tangent = torch.func.jvp(lambda x: root_of_sum(x, (-1,)), (zero,), (one,))
        with forward_ad.dual_level():
            root = root_of_sum(forward_ad.make_dual(zero, one), (-1,))
            assert torch.equal(forward_ad.unpack_dual(root).tangent, torch.zeros(2, 1))
    leaf = zero.clone().requires_grad_()
    root_of_sum(leaf, (-1,)).sum().backward()
    assert torch.equal(leaf.grad, zero)
    assert torch.equal(value, torch.zeros(2, 1))
    assert torch.equal(tangent, torch.zeros(2, 1))
