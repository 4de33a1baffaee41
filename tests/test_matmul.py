"""Who multiplies large matrices: torch's BLAS or oneDNN, with the same result."""

from __future__ import annotations

import itertools
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import forward_ad
from torch.profiler import ProfilerActivity, profile
from torch.testing._internal.two_tensor import TwoTensor

from fgo_geo.linalg import gram_matrix, matmul, subtract_product
from fgo_geo.linalg.matmul import add_matmul_2d, matmul_2d, without_gaps

onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch was built without oneDNN")
LAYOUTS = ("rows", "columns", "rows with gaps", "columns with gaps", "every other column")


def normal(shape: tuple[int, int], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def stored(x: Tensor, layout: str) -> Tensor:
    """The same matrix, otherwise in memory."""
    rows, columns = x.shape
    place = {
        "rows": lambda: x.new_empty(rows, columns),
        "columns": lambda: x.new_empty(columns, rows).mT,
        "rows with gaps": lambda: x.new_empty(rows, columns + 5)[:, 2:-3],
        "columns with gaps": lambda: x.new_empty(columns, rows + 5)[:, 2:-3].mT,
        "every other column": lambda: x.new_empty(rows, 2 * columns)[:, ::2],
    }[layout]()
    return place.copy_(x)


@pytest.fixture
def onednn_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor of AMD's with AVX-512."""
    monkeypatch.setattr(matmul, "mkl_avoids_avx512", lambda: True)


@contextmanager
def products_by_onednn() -> Iterator[list[tuple[int, ...]]]:
    """The sizes (rows, terms, columns) of the products that oneDNN computes; filled at the end."""
    sizes: list[tuple[int, ...]] = []
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiled:
        yield sizes
    for event in profiled.events():
        if event.name == "mkldnn::_linear_pointwise":  # of a and the transpose of b
            a, b = (shape for shape in event.input_shapes if len(shape) == 2)
            sizes.append((*a, b[0]))


@onednn
@settings(max_examples=60)
@given(
    sizes=st.tuples(*[st.integers(256, 300)] * 3),
    layouts=st.tuples(*[st.sampled_from(LAYOUTS)] * 4),
    beta=st.sampled_from([1.0, 0.0, -0.5]),
    alpha=st.sampled_from([1.0, -1.0, 3.0]),
)
def test_the_product_is_that_of_numpy(
    sizes: tuple[int, int, int], layouts: tuple[str, ...], beta: float, alpha: float
) -> None:
    rows, terms, columns = sizes
    a, b, c = normal((rows, terms), 0), normal((terms, columns), 1), normal((rows, columns), 2)
    left, right, added, out = (stored(x.float(), layout) for x, layout in zip((a, b, c, c), layouts, strict=True))
    product = a.float().double().numpy() @ b.float().double().numpy()
    total = beta * c.float().double().numpy() + alpha * product
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matmul, "mkl_avoids_avx512", lambda: True)
        assert matmul.goes_to_onednn(left, right)
        for result in (matmul_2d(left, right), matmul_2d(left, right, out)):
            np.testing.assert_allclose(result.double().numpy(), product, rtol=0, atol=3e-4)
        assert result is out
        out.fill_(torch.nan)
        for result in (
            add_matmul_2d(added, left, right, beta=beta, alpha=alpha),
            add_matmul_2d(added, left, right, beta=beta, alpha=alpha, out=out),
            add_matmul_2d(added, left, right, beta=beta, alpha=alpha, out=added),
        ):
            np.testing.assert_allclose(result.double().numpy(), total, rtol=0, atol=1e-3)
        assert result is added


@onednn
@pytest.mark.usefixtures("onednn_is_faster")
@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_products_of_the_package_go_where_they_are_fast(layout: str) -> None:
    x = stored(normal((600, 512), 0).float(), layout)
    with products_by_onednn() as sizes:
        s = gram_matrix(x)
    assert sizes == [(128, 600, 512 - 128 * k) for k in range(4)]
    torch.testing.assert_close(s.double(), x.double().mT @ x.double(), rtol=0, atol=1e-3)
    assert torch.equal(s.triu(128), s.mT.triu(128))
    with products_by_onednn() as sizes:
        subtract_product(x, x, s)
    assert len(sizes) == 1


@onednn
@pytest.mark.usefixtures("onednn_is_faster")
@pytest.mark.filterwarnings("ignore:TF32 acceleration", "ignore:`torch.jit.trace:FutureWarning")
def test_others_stay_with_torch() -> None:
    a = torch.randn(256, 256)
    with products_by_onednn() as sizes:
        matmul_2d(a, a)
        matmul_2d(a.mT, a)
        matmul_2d(a[:, :128].contiguous(), a[:128, :128])
    assert len(sizes) == 3
    with products_by_onednn() as sizes:
        multiply_otherwise(a)
    assert not sizes


def multiply_otherwise(a: Tensor) -> None:
    """Products that torch is left to compute, of a matrix 256 x 256."""
    matmul_2d(a[:127], a)
    matmul_2d(a, a[:, :127])
    matmul_2d(a[:, :127].contiguous(), a[:127])
    matmul_2d(a[:200].mT, a[:200])
    matmul_2d(a[:128, :128].contiguous(), a[:128, :128])
    matmul_2d(a.double(), a.double())
    matmul_2d(a.to("meta"), a.to("meta"))
    with torch.backends.mkldnn.flags(enabled=False):
        matmul_2d(a, a)
    with torch.autocast("cpu"):
        assert matmul_2d(a, a).dtype == torch.bfloat16
    torch.jit.trace(matmul_2d, (a, a), check_trace=False)
    matmul_2d(TwoTensor(a, a), TwoTensor(a, a))
    torch.func.vmap(lambda x: matmul_2d(x, a))(a.expand(2, 256, 256))
    torch.compile(matmul_2d, backend="eager", fullgraph=True)(a, a)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_onednn_gets_has_no_gaps(layout: str) -> None:
    """It would multiply one number after the other."""
    b = stored(torch.randn(40, 30), layout)
    factor = without_gaps(b)
    torch.testing.assert_close(factor, b, rtol=0, atol=0)
    assert factor.is_contiguous() or factor.mT.is_contiguous()
    assert (factor.data_ptr() == b.data_ptr()) == (layout in LAYOUTS[:2])


@onednn
@pytest.mark.usefixtures("onednn_is_faster")
@pytest.mark.parametrize("batch", [(), (1,)])
@pytest.mark.parametrize("with_out", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_the_squares_of_a_long_column(layout: str, with_out: bool, batch: tuple[int, ...]) -> None:
    for rows, columns in ((2048, 256), (9000, 256), (2048, 129)):
        x = stored(torch.linalg.qr(normal((rows, columns), 0))[0].float(), layout).expand(*batch, rows, columns)
        out = torch.full((*batch, columns, columns), torch.nan) if with_out else None
        with products_by_onednn() as sizes:
            result = gram_matrix(x, out=out, precise=True)
        assert out is None or result is out
        assert {size[1] for size in sizes} == ({rows} if columns == 256 or layout == "columns" else set())
        torch.testing.assert_close(result.double(), x.double().mT @ x.double(), rtol=0, atol=4e-7)


@onednn
@pytest.mark.usefixtures("onednn_is_faster")
@pytest.mark.parametrize("setting", ["high", "medium"])
def test_factors_are_rounded_if_torch_may_round_them(setting: str) -> None:
    a, b, c = (normal((256, 256), seed).float() for seed in range(3))
    with pytest.MonkeyPatch.context() as patch, products_by_onednn() as sizes:
        patch.setattr(matmul, "rounds_to_bfloat16", lambda: setting == "medium")
        results = [matmul_2d(a, b), add_matmul_2d(c, a, b) - c, (add_matmul_2d(c, a, b, alpha=2.0) - c) / 2]
    for result in results:
        error = float((result - a @ b).norm() / (a @ b).norm())
        assert 1e-3 < error < 4e-3 if setting == "medium" else error < 1e-6
    assert len(sizes) == (0 if setting == "medium" else 3)


@onednn
@pytest.mark.usefixtures("onednn_is_faster")
def test_derivatives_are_those_of_torch() -> None:
    """Whichever of the three has one."""
    plain = [torch.randn(256, 256) for _ in range(4)]
    for which, alpha in itertools.product(range(3), (1.0, 2.0)):
        mine, torchs = (
            [x.clone().requires_grad_(number == which) for number, x in enumerate(plain[:3])] for _ in range(2)
        )
        with products_by_onednn() as sizes:
            add_matmul_2d(*mine, alpha=alpha).square().sum().backward()
            with forward_ad.dual_level():
                duals = [forward_ad.make_dual(x, plain[3]) if n == which else x for n, x in enumerate(plain[:3])]
                tangents = [
                    forward_ad.unpack_dual(product(*duals, alpha=alpha)).tangent
                    for product in (add_matmul_2d, torch.addmm)
                ]
        assert not sizes
        torch.testing.assert_close(*tangents)
        torch.addmm(*torchs, alpha=alpha).square().sum().backward()
        torch.testing.assert_close(mine[which].grad, torchs[which].grad)
        with torch.no_grad(), products_by_onednn() as sizes:
            add_matmul_2d(*mine, alpha=alpha)
        assert len(sizes) == 1


@onednn
@pytest.mark.usefixtures("onednn_is_faster")
def test_what_is_not_asked_for_may_be_anything() -> None:
    a, nothing = torch.randn(256, 256), torch.full((256, 256), torch.nan)
    torch.testing.assert_close(add_matmul_2d(nothing, a, a, beta=0.0), a @ a)


@pytest.mark.parametrize(
    ("processor", "capability", "mkl", "expected"),
    [
        ("vendor_id : AuthenticAMD", "AVX512", True, True),
        ("vendor_id : GenuineIntel", "AVX512", True, False),
        ("vendor_id : AuthenticAMD", "AVX2", True, False),
        ("vendor_id : AuthenticAMD", "AVX512", False, False),
    ],
)
def test_where_onednn_is_faster(
    processor: str, capability: str, mkl: bool, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert matmul.mkl_avoids_avx512() in (False, True)
    matmul.mkl_avoids_avx512.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
        patch.setattr(torch.backends.mkl, "is_available", lambda: mkl)
        patch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
        assert matmul.mkl_avoids_avx512(processor) == expected
    matmul.mkl_avoids_avx512.cache_clear()


@pytest.mark.parametrize("error", [FileNotFoundError, PermissionError])
def test_a_processor_that_the_system_hides_is_asked_otherwise(
    error: type[OSError], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> str:
        raise error

    monkeypatch.setattr(Path, "read_text", refuse)
    matmul.mkl_avoids_avx512.cache_clear()
    try:
        assert matmul.mkl_avoids_avx512() == matmul.mkl_avoids_avx512(platform.processor())
    finally:
        matmul.mkl_avoids_avx512.cache_clear()
