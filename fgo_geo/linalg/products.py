"""Batched tensor algebra: the few matrix functions that the manifolds are built from.

Nothing here knows what a manifold is. There are four kinds of function:

* *guards*: :func:`computes_in_float32`, :func:`takes_full_products` and :func:`require_finite` decide, in one place,
  what happens to half precision, to products in TF32 and bfloat16, and to NaN;
* *exact factors*: :func:`polar_factor` and :func:`qr_factor` work for every matrix and cost a factorisation; for 3 x 3
  matrices, of which a network has millions, the polar factor has a closed form, and so has :func:`spectral_norm_3`;
* *the cheap factor*: :func:`polar_newton_schulz` reaches the same polar factor by matrix products alone, for matrices
  whose singular values are known to lie in a given interval. :func:`newton_schulz_schedule` turns that interval
  into a fixed number of iterations, and :func:`polish` is the one iteration that nearly orthonormal matrices need;
* *products and sums* of which the above are made: :func:`small_product`, :func:`subtract_product` and
  :func:`inner_sum`. Of many tiny matrices they make long loops over the batch, if that runs fastest in memory.

All functions act on the last two dimensions and batch over the rest.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import (
    _get_current_dispatch_mode,  # pyright: ignore[reportPrivateUsage, reportUnknownVariableType]
)

__all__ = [
    "computes_in_float32",
    "gram_excess",
    "gram_matrix",
    "has_closed_form",
    "inner_sum",
    "inverse_root_gap",
    "lowers_products",
    "matrix_exponential",
    "newton_schulz_schedule",
    "polar_factor",
    "polar_newton_schulz",
    "polar_series",
    "polish",
    "qr_factor",
    "reads_for_free",
    "require_finite",
    "root_of_sum",
    "series_limit",
    "skew",
    "small_product",
    "spectral_norm_3",
    "subtract_product",
    "sym",
    "takes_full_products",
    "traces",
]

_P = ParamSpec("_P")
_R = TypeVar("_R")

_HALF = (torch.float16, torch.bfloat16)


def computes_in_float32(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Compute half-precision arguments in float32 and round the result once.

    If any tensor argument is ``float16`` or ``bfloat16``, all such arguments are upcast, the function runs in
    float32 and its tensor results (one tensor or a tuple) are rounded to the type that the arguments promote to.
    Autocast is switched off inside, so that products of float32 matrices stay float32. Arguments of
    other types pass unchanged and cost nothing.

    Example:
        >>> @computes_in_float32
        ... def square(x):
        ...     assert x.dtype == torch.float32
        ...     return x * x
        >>> square(torch.tensor([3.0], dtype=torch.bfloat16))
        tensor([9.], dtype=torch.bfloat16)
    """

    @functools.wraps(function)
    def wrapper(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
        if not tensors:
            return function(*args, **kwargs)
        device = tensors[0].device.type
        if device != "meta" and torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                return wrapper(*args, **kwargs)
        floating = [t.dtype for t in tensors if t.is_floating_point()]
        if not any(dtype in _HALF for dtype in floating):
            return function(*args, **kwargs)
        target = functools.reduce(torch.promote_types, floating)
        call: Callable[..., Any] = function
        result = call(*map(_upcast, args), **{k: _upcast(v) for k, v in kwargs.items()})
        if isinstance(result, tuple):
            return tuple(_round(r, target) for r in result)  # type: ignore[return-value]
        return _round(result, target)

    return _with_own_code(wrapper, function)


def _with_own_code(wrapper: Any, function: Callable[_P, _R]) -> Callable[_P, _R]:
    """``torch.compile`` counts recompilations per code object: every wrapped function needs its own."""
    wrapper.__code__ = wrapper.__code__.replace(co_name=function.__name__)
    return wrapper


def _upcast(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in _HALF else value


def _round(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor) and value.dtype == torch.float32:
        return value.to(dtype)
    return value


# Where torch keeps the precision of float32 products; before torch 2.9 there was one setting for all devices.
_BACKENDS: tuple[Any, ...] = (torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None))
_BY_BACKEND = all(hasattr(backend, "fp32_precision") for backend in _BACKENDS)
_FULL = ("ieee", "none", "highest")


_lock = threading.Lock()
_inside = 0  # calls that take full products at this moment, in all threads
_before: tuple[str, ...] = ()  # the precisions before the first of them


def _precisions() -> tuple[str, ...]:
    if _BY_BACKEND:
        return tuple(backend.fp32_precision for backend in _BACKENDS)
    return (torch.get_float32_matmul_precision(),)


def _set_precisions(values: tuple[str, ...]) -> None:
    if not _BY_BACKEND:
        torch.set_float32_matmul_precision(*values)
        return
    for backend, value in zip(_BACKENDS, values, strict=True):
        backend.fp32_precision = "none"  # follow torch.backends.fp32_precision
        if backend.fp32_precision != value:
            backend.fp32_precision = value


def lowers_products() -> bool:
    """Whether torch may round the factors of float32 products, to TF32 or bfloat16, where the processor gains by it.

    That is what ``torch.set_float32_matmul_precision("high")`` and ``"medium"`` allow. ``torch.compile`` cannot read
    it.

    Example:
        >>> lowers_products()
        False
    """
    return any(value not in _FULL for value in _precisions())


def takes_full_products(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Take products of float32 matrices in float32, whatever torch was told to do with them.

    A direction may be off by a thousandth, as it is in TF32; a point that is to have orthonormal columns may not.
    Inside ``torch.compile`` the setting is left as it is. It belongs to the process: other threads take full products,
    too, while the function runs.

    Example:
        >>> takes_full_products(lowers_products)()
        False
    """

    @functools.wraps(function)
    def wrapper(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        if torch.compiler.is_compiling() or not _begin_full_products():
            return function(*args, **kwargs)
        try:
            return function(*args, **kwargs)
        finally:
            _end_full_products()

    return _with_own_code(wrapper, function)


def _begin_full_products() -> bool:
    """Change the setting, if it has to be changed or has been by another call; returns whether to end that."""
    global _inside, _before
    with _lock:
        if _inside == 0:
            if not lowers_products():
                return False
            _before = _precisions()
            _set_precisions(("ieee",) * len(_BACKENDS) if _BY_BACKEND else ("highest",))
        _inside += 1
        return True


def _end_full_products() -> None:
    """The last call puts the setting back."""
    global _inside
    with _lock:
        _inside -= 1
        if _inside == 0:
            _set_precisions(_before)


def require_finite(x: Tensor, what: str) -> None:
    """Raise if a tensor holds NaN or infinity.

    Reads the tensor on the host, so it has no place in an optimiser's step. Inside ``torch.compile`` it becomes
    a device-side assertion.

    Args:
        x: Any tensor.
        what: Name of the tensor, for the message.

    Raises:
        ValueError: With the number of non-finite entries.

    Example:
        >>> require_finite(torch.tensor([1.0, float("nan")]), "the weight")
        Traceback (most recent call last):
            ...
        ValueError: the weight has 1 non-finite entry of 2 (shape (2,)); replace NaN and infinity first, e.g. with...
    """
    finite = torch.isfinite(x)
    if torch.compiler.is_compiling():
        message = f"{what} has non-finite entries"
        torch._assert_async(finite.all(), message)  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
        return
    if not bool(finite.all()):
        bad = int((~finite).sum())
        entries = "entry" if bad == 1 else "entries"
        raise ValueError(
            f"{what} has {bad} non-finite {entries} of {x.numel()} (shape {tuple(x.shape)}); "
            "replace NaN and infinity first, e.g. with torch.nan_to_num"
        )


# -- tiny matrices, large batches --------------------------------------------------------------------------------------
# A batch of matrices is a *structure of arrays* if the batch runs fastest in memory: every entry is one long vector
# then, and elementwise operations on a row or a column of all matrices are loops over such vectors, at the speed of
# memory. A call of a matrix product or a reduction per matrix costs many times the arithmetic of 3 x 3 matrices.

_UNROLLED = 64  # terms of a sum; longer ones keep a reduction busy


def _is_struct_of_arrays(x: Tensor) -> bool:
    """Whether the batch of matrices runs fastest in memory."""
    return any(size > 1 and stride == 1 for size, stride in zip(x.shape[:-2], x.stride()[:-2], strict=True))


def _unrolled(terms: int, *operands: Tensor) -> bool:
    """Whether a sum of so many products of operands is one of long vectors."""
    return terms <= _UNROLLED and any(_is_struct_of_arrays(x) for x in operands)


def _terms(a: Tensor, b: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Columns of ``a`` and rows of ``b``, whose outer products add up to ``a @ b``."""
    return list(zip(a.split(1, -1), b.split(1, -2), strict=True))


def small_product(a: Tensor, b: Tensor) -> Tensor:
    """The matrix product ``a @ b``; as a sum of outer products if the batch runs fastest in memory.

    Args:
        a: Matrices, shape ``(..., A, K)``.
        b: Matrices, shape ``(..., K, B)``.

    Returns:
        Matrices of shape ``(..., A, B)``, in the memory layout of the factors.

    Example:
        >>> a = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).expand(5, 2, 2)
        >>> planes = a.permute(1, 2, 0).contiguous().permute(2, 0, 1)  # the same numbers, the batch fastest
        >>> small_product(planes, planes)[0]
        tensor([[ 7., 10.],
                [15., 22.]])
    """
    if not _unrolled(a.shape[-1], a, b):
        return _product(b.mT, a.mT).mT if _goes_by_columns(a) else _product(a, b)
    (column, row), *others = _terms(a, b)
    total = column * row
    for column, row in others:
        total.addcmul_(column, row)
    return total


def subtract_product(c: Tensor, a: Tensor, b: Tensor, *, in_place: bool = False) -> Tensor:
    """``c - a @ b``, computed as :func:`small_product` is.

    Args:
        c: Matrices, shape ``(..., A, B)``.
        a: Matrices, shape ``(..., A, K)``.
        b: Matrices, shape ``(..., K, B)``.
        in_place: Write the result to ``c``.

    Returns:
        Matrices of shape ``(..., A, B)``.

    Example:
        >>> subtract_product(torch.ones(1, 1), torch.tensor([[2.0, 1.0]]), torch.tensor([[3.0], [4.0]]))
        tensor([[-9.]])
    """
    if not _unrolled(a.shape[-1], a, b, c):
        if _goes_by_columns(c):
            return _minus(c.mT, b.mT, a.mT, in_place).mT
        return _minus(c, a, b, in_place)
    (column, row), *others = _terms(a, b)
    total = c.addcmul_(column, row, value=-1) if in_place else torch.addcmul(c, column, row, value=-1)
    for column, row in others:
        total.addcmul_(column, row, value=-1)
    return total


def _product(a: Tensor, b: Tensor) -> Tensor:
    return a @ b


def _minus(c: Tensor, a: Tensor, b: Tensor, in_place: bool) -> Tensor:
    out = c if in_place else None
    if c.ndim == a.ndim == b.ndim == 2:
        return torch.addmm(c, a, b, alpha=-1, out=out)
    if c.ndim == a.ndim == b.ndim == 3 and len(c) == len(a) == len(b):
        return torch.baddbmm(c, a, b, alpha=-1, out=out)
    return torch.sub(c, a @ b, out=out)


def _goes_by_columns(x: Tensor) -> bool:
    """Whether tall matrices are stored column by column: their products are taken transposed, and stay so."""
    return x.shape[-2] >= x.shape[-1] > 1 and x.stride(-2) == 1 != x.stride(-1)


_WIDE_GRAM = 128  # columns; the halves of narrower matrices make products too small to be fast


def gram_matrix(x: Tensor) -> Tensor:
    """``xᵀx``; of wide matrices the block that follows by symmetry, a quarter, is copied.

    Args:
        x: Matrices, shape ``(..., A, B)``.

    Returns:
        Symmetric matrices, shape ``(..., B, B)``.

    Example:
        >>> gram_matrix(torch.tensor([[1.0, 2.0]]))
        tensor([[1., 2.],
                [2., 4.]])
    """
    columns = x.shape[-1]
    if columns < _WIDE_GRAM:
        return small_product(x.mT, x)
    left, right = x.split((columns + 1) // 2, -1)
    above, below = _product(left.mT, x), _product(right.mT, right)
    return torch.cat((above, torch.cat((above[..., left.shape[-1] :].mT, below), -1)), -2)


def gram_excess(y: Tensor, radius: float | Tensor = 1.0) -> Tensor:
    """``yᵀy / r² - I``: zero if the columns of ``y / r`` are orthonormal.

    Args:
        y: Matrices, shape ``(..., A, B)``.
        radius: Radius ``r``, a number or a tensor that broadcasts against ``y``.

    Returns:
        Symmetric matrices, shape ``(..., B, B)``.

    Example:
        >>> gram_excess(torch.tensor([[2.0, 0.0], [0.0, 3.0]]), 2.0)
        tensor([[0.0000, 0.0000],
                [0.0000, 1.2500]])
    """
    excess = gram_matrix(y) / radius**2
    excess.diagonal(dim1=-2, dim2=-1).sub_(1)
    return excess


def inner_sum(a: Tensor, b: Tensor, dim: tuple[int, ...]) -> Tensor:
    """Sum of ``a * b`` over dimensions, which are kept with size one.

    Args:
        a: Any tensor.
        b: Tensor of the same shape.
        dim: Dimensions, counted from the end.

    Returns:
        Inner products.

    Example:
        >>> inner_sum(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.0]), (-1,))
        tensor([25.])
    """
    if dim != (-2,) or a.shape != b.shape or not _unrolled(a.shape[-2], a, b):
        return (a * b).sum(dim, keepdim=True)
    (left, right), *others = zip(a.split(1, -2), b.split(1, -2), strict=True)
    total = left * right
    for left, right in others:
        total.addcmul_(left, right)
    return total


def root_of_sum(a: Tensor, dim: tuple[int, ...]) -> Tensor:
    """Euclidean norm over dimensions, which are kept with size one; its derivative at zero is zero.

    Unlike ``torch.linalg.vector_norm`` it adds pairwise: over two million entries in single precision that one is off
    by 3e-5.

    Args:
        a: Any tensor.
        dim: Dimensions, counted from the end.

    Returns:
        Norms.

    Example:
        >>> root_of_sum(torch.tensor([3.0, 4.0]), (-1,))
        tensor([5.])
    """
    squared = inner_sum(a, a, dim)
    zero = squared == 0
    return torch.where(zero, 0, torch.where(zero, 1, squared).sqrt())


def reads_for_free(x: Tensor) -> bool:
    """Whether a tensor's values lie on the host, so that reading them waits for nothing.

    Not inside ``torch.compile``, under a dispatch mode (tracing, tensors without values) or a ``torch.func`` transform.

    Args:
        x: Any tensor.

    Returns:
        A bool.

    Example:
        >>> reads_for_free(torch.zeros(3)), reads_for_free(torch.zeros(3, device="meta"))
        (True, False)
    """
    return x.device.type == "cpu" and not torch.compiler.is_compiling() and not traces()


def traces() -> bool:
    """Whether operations are recorded rather than run: under a dispatch mode or a ``torch.func`` transform.

    Example:
        >>> torch.func.vmap(lambda x: x * traces())(torch.ones(2))
        tensor([1., 1.])
    """
    transform = torch._C._functorch.peek_interpreter_stack()  # pyright: ignore
    return transform is not None or _get_current_dispatch_mode() is not None


def sym(m: Tensor) -> Tensor:
    """Symmetric part, ``(m + mᵀ) / 2``.

    Args:
        m: Square matrices, shape ``(..., B, B)``.

    Returns:
        Symmetric matrices of the same shape.

    Example:
        >>> sym(torch.tensor([[0.0, 2.0], [0.0, 0.0]]))
        tensor([[0., 1.],
                [1., 0.]])
    """
    return (m + m.mT) / 2


def skew(m: Tensor) -> Tensor:
    """Skew-symmetric part, ``(m - mᵀ) / 2``.

    Args:
        m: Square matrices, shape ``(..., B, B)``.

    Returns:
        Skew-symmetric matrices of the same shape.

    Example:
        >>> skew(torch.tensor([[5.0, 2.0], [0.0, 0.0]]))
        tensor([[ 0.,  1.],
                [-1.,  0.]])
    """
    return (m - m.mT) / 2


def qr_factor(x: Tensor) -> Tensor:
    """The orthonormal factor of the QR decomposition with a non-negative diagonal of R.

    The sign convention makes the factor unique and smooth for full column rank; for a Gaussian ``x`` it is
    Haar distributed (Mezzadri 2007).

    Args:
        x: Matrices with ``A >= B``, shape ``(..., A, B)``.

    Returns:
        Matrices with orthonormal columns, shape ``(..., A, B)``.

    Example:
        >>> qr_factor(torch.tensor([[3.0], [-4.0]]))
        tensor([[ 0.6000],
                [-0.8000]])
    """
    q, r = torch.linalg.qr(x)
    diagonal = r.diagonal(dim1=-2, dim2=-1)
    return q * torch.where(diagonal < 0, -1.0, 1.0).to(q.dtype).unsqueeze(-2)


def polar_factor(x: Tensor) -> Tensor:
    r"""The orthonormal polar factor, the nearest matrix with orthonormal columns.

    With the singular value decomposition ``x = U S Vᵀ`` it is ``U Vᵀ``. It is defined for every finite matrix (for
    rank-deficient ones it is one of the nearest points). The derivative is that of the polar decomposition itself,
    so it is finite at repeated singular values, where differentiating the decomposition is not.

    In single precision, 3 x 3 matrices take a closed form, elementwise in double precision: it is ten times
    faster than the decomposition and does not wait for the device. NaN stays NaN there; the decomposition may raise.

    Args:
        x: Matrices with ``A >= B``, shape ``(..., A, B)``.

    Returns:
        Matrices with orthonormal columns, shape ``(..., A, B)``.

    Example:
        >>> polar_factor(torch.tensor([[3.0, 0.0], [0.0, 0.5], [0.0, 0.0]]))
        tensor([[1., 0.],
                [0., 1.],
                [0., 0.]])
    """
    if has_closed_form(x) and x.shape[-2] == 3:
        return _PolarFactor3.apply(x)[0]  # pyright: ignore
    factor, _, _ = _PolarFactor.apply(x)  # pyright: ignore
    return factor


class _PolarFactor(torch.autograd.Function):
    """``x = Q H`` with ``H = V diag(h) Vᵀ``; returns ``(Q, V, h)``, differentiable in Q alone."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # pyright: ignore
        u, h, vh = torch.linalg.svd(x, full_matrices=False)
        return polish(u @ vh), vh.mT.contiguous(), h

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        q, v, h = output
        ctx.mark_non_differentiable(v, h)
        ctx.save_for_backward(q, v, h)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> Tensor:  # pyright: ignore
        return _PolarPullback.apply(*ctx.saved_tensors, grad)  # pyright: ignore


class _PolarPullback(torch.autograd.Function):
    """The derivative of :class:`_PolarFactor`; a function of its own in order to refuse the second derivative."""

    generate_vmap_rule = True

    @staticmethod
    def forward(q: Tensor, v: Tensor, h: Tensor, grad: Tensor) -> Tensor:  # pyright: ignore
        # dQ = Q L + (I - Q Qᵀ) dX H⁻¹ with H L + L H = Qᵀ dX - dXᵀ Q; below is the adjoint of this map,
        # in the eigenbasis of H. Pairs of zero singular values have no derivative and contribute nothing.
        along = q.mT @ grad
        sums = h.unsqueeze(-1) + h.unsqueeze(-2)
        turned = v.mT @ along @ v
        skew = turned - turned.mT  # its diagonal is zero, not the rounding of zero: it is divided by h
        rotation = q @ (v @ _divide_or_zero(skew, sums) @ v.mT)
        if q.shape[-2] == q.shape[-1]:
            return rotation  # nothing is across; its rounding, divided by a small h, would not be nothing
        across = (grad - q @ along) @ v
        return rotation + _divide_or_zero(across, h.unsqueeze(-2)) @ v.mT

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:  # pyright: ignore
        raise RuntimeError(_FIRST_ORDER_ONLY)


_FIRST_ORDER_ONLY = (
    "polar_factor has a first derivative only; for second derivatives compute the Gram matrix's inverse root "
    "with torch.linalg.eigh"
)


def _divide_or_zero(a: Tensor, b: Tensor) -> Tensor:
    return torch.where(b > 0, a / torch.where(b > 0, b, 1), 0)


# -- three columns: closed forms ---------------------------------------------------------------------------------


def has_closed_form(x: Tensor) -> bool:
    """Whether matrices have three columns, in a type for which double precision is precision to spare."""
    return x.shape[-1] == 3 and x.dtype == torch.float32 and x.device.type != "mps"  # which has no float64


def _cofactors(y: Tensor) -> Tensor:
    """Cofactor matrices of 3 x 3 matrices whose entries come first, shape ``(3, 3, ...)``."""
    a, b, c = y
    return torch.stack([torch.linalg.cross(p, q, dim=0) for p, q in ((b, c), (c, a), (a, b))])


_FLAT = 2.0**-27  # a matrix is flat when all 2 x 2 minors are below this, relative to its squared norm
_LIFT = 2.0**-24  # flat matrices move by this multiple of the identity: by less than the rounding of their entries
_NEWTON_STEPS = 4  # from a start within a factor √3, quadratic with a constant below 1/9: 1e-16


def _polar_3(y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    r"""Polar factors of 3 x 3 matrices of unit norm, with ``i₂`` and ``Δ``; entries come first, shape ``(3, 3, ...)``.

    Let ``i₁, i₂, i₃`` be the elementary symmetric functions of the singular values and ``s = sign(det y)``. In the
    basis of singular vectors one checks::

        Q = ( i₂ y + s i₁ cof y + M ) / Δ,    Δ = i₁ i₂ - i₃ = (σ₁ + σ₂)(σ₁ + σ₃)(σ₂ + σ₃)

    with ``M = cof(y + cof y) - cof y - cof cof y``, whose singular values are ``σ₁(σ₂² + σ₃²)`` and so on. All terms of
    a singular value are positive, so only ``σ₂ + σ₃ > 0`` is needed: rank two. The invariants are ``i₃ = |det y|``,
    ``i₂² = ‖cof y‖² + 2 i₃ i₁`` and ``i₁² = ‖y‖² + 2 i₂``; the last two are one equation for ``i₁`` with a concave
    right-hand side, which Newton's method solves from above. (Higham and Noferini 2016 solve the same problem with
    quaternions.)
    """
    flat = _cofactors(y).square().sum((0, 1)) <= _FLAT**2
    y = y + _identity_3(torch.where(flat, _LIFT, 0.0).to(y.dtype))
    cofactors = _cofactors(y)
    twice = _cofactors(cofactors)  # det(y) y, without the cancellation of the determinant itself
    squares, minors = y.square().sum((0, 1)), cofactors.square().sum((0, 1))
    determinant = (y * twice).sum((0, 1)) / squares
    i3 = determinant.abs()
    i1 = (3 * squares).sqrt()
    for _ in range(_NEWTON_STEPS):
        i2 = (minors + 2 * i3 * i1).sqrt()
        image = (squares + 2 * i2).sqrt()
        i1 = i1 - (i1 - image) / (1 - i3 / (image * i2))
    i2 = (minors + 2 * i3 * i1).sqrt()
    delta = i1 * i2 - i3
    sign = torch.where(determinant < 0, -1.0, 1.0)
    numerator = i2 * y + (sign * i1 - 1) * cofactors + _cofactors(y + cofactors) - twice
    return numerator / delta, i2, delta


class _PolarFactor3(torch.autograd.Function):
    """Returns ``(Q, i₂, Δ)`` of ``x / ‖x‖``, differentiable in Q alone."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # pyright: ignore
        y = x.double().movedim((-2, -1), (0, 1)).contiguous()
        q, i2, delta = _polar_3(y / _norm_or_one(y, (0, 1)))
        return q.movedim((0, 1), (-2, -1)).to(x.dtype, memory_format=torch.contiguous_format), i2, delta

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        q, i2, delta = output
        ctx.mark_non_differentiable(i2, delta)
        ctx.save_for_backward(inputs[0], q, i2, delta)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> Tensor:  # pyright: ignore
        return _PolarPullback3.apply(*ctx.saved_tensors, grad)  # pyright: ignore


class _PolarPullback3(torch.autograd.Function):
    """The derivative of :class:`_PolarFactor3`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, q: Tensor, i2: Tensor, delta: Tensor, grad: Tensor) -> Tensor:  # pyright: ignore
        # dQ = Q [l]ₓ with (tr(H) I - H) l = the axial vector of Qᵀ dX - dXᵀ Q, where x = Q H. The inverse
        # of tr(H) I - H, which has the eigenvalues σⱼ + σₖ, is (H² + i₂ I) / Δ, and H² = xᵀx.
        x, q = x.double(), q.double()
        size = _norm_or_one(x, (-2, -1))
        y = x / size
        axis = torch.linalg.cross(grad.double(), q, dim=-1).sum(-2).unsqueeze(-1)
        axis = (y.mT @ (y @ axis) + i2[..., None, None] * axis) / (delta[..., None, None] * size)
        return torch.linalg.cross(q, axis.mT.expand_as(q), dim=-1).to(grad.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:  # pyright: ignore
        raise RuntimeError(_FIRST_ORDER_ONLY)


def _norm_or_one(x: Tensor, dim: tuple[int, int]) -> Tensor:
    norm = x.square().sum(dim, keepdim=True).sqrt()
    return torch.where(norm > 0, norm, 1)


def spectral_norm_3(x: Tensor) -> Tensor:
    r"""Largest singular value of float32 matrices with three columns, in closed form.

    The largest root of the characteristic polynomial of the Gram matrix ``G = xᵀx``, by the trigonometric solution of
    the cubic (Smith 1961), elementwise in double precision. Where the largest singular value is repeated, the
    derivative is an average of those of its singular vectors.

    Args:
        x: Matrices in single precision, shape ``(..., A, 3)``.

    Returns:
        Norms of shape ``(...)``.

    Raises:
        ValueError: If there are not three columns in single precision.

    Example:
        >>> spectral_norm_3(torch.diag(torch.tensor([1.0, -3.0, 2.0])))
        tensor(3.)
    """
    if not has_closed_form(x):
        raise ValueError(
            f"spectral_norm_3 takes float32 matrices with three columns, got {x.dtype} of shape {tuple(x.shape)} on "
            f"{x.device}; use torch.linalg.matrix_norm(x, 2)"
        )
    return _SpectralNorm3.apply(x)[0]  # pyright: ignore


def _gram_3(x: Tensor) -> Tensor:
    """Gram matrices in double precision, entries first: shape ``(3, 3, ...)``."""
    x = x.double()
    return (x.mT @ x).movedim((-2, -1), (0, 1)).contiguous()


def _identity_3(values: Tensor) -> Tensor:
    """Multiples of the identity, entries first: ``(...)`` to ``(3, 3, ...)``."""
    identity = torch.eye(3, dtype=values.dtype, device=values.device)
    return identity.reshape(3, 3, *(1,) * values.ndim) * values


class _SpectralNorm3(torch.autograd.Function):
    """Returns ``(σ, σ²)``, differentiable in ``σ`` alone, ``σ²`` in double precision."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore
        gram = _gram_3(x)
        mean = (gram[0, 0] + gram[1, 1] + gram[2, 2]) / 3
        deviation = gram - _identity_3(mean)
        spread = (deviation.square().sum((0, 1)) / 6).sqrt()
        deviation = deviation / torch.where(spread > 0, spread, 1)
        cosine = (deviation[0] * torch.linalg.cross(deviation[1], deviation[2], dim=0)).sum(0) / 2
        largest = mean + 2 * spread * torch.cos(torch.acos(cosine.clamp(-1, 1)) / 3)
        return largest.sqrt().to(x.dtype), largest

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(inputs[0], output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> Tensor:  # pyright: ignore
        return _SpectralPullback3.apply(*ctx.saved_tensors, grad)  # pyright: ignore


class _SpectralPullback3(torch.autograd.Function):
    """The derivative of :class:`_SpectralNorm3`, ``x v vᵀ / σ``."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, largest: Tensor, grad: Tensor) -> Tensor:  # pyright: ignore
        # v vᵀ is (μ I - xᵀx)⁻¹ / trace for μ just above the largest eigenvalue; equal eigenvalues are averaged.
        resolvent = _cofactors(_identity_3(largest * (1 + 2.0**-25)) - _gram_3(x))
        trace = resolvent[0, 0] + resolvent[1, 1] + resolvent[2, 2]
        weight = _divide_or_zero(resolvent, trace * largest.sqrt()).movedim((0, 1), (-2, -1))
        return (grad[..., None, None] * (x.double() @ weight)).to(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:  # pyright: ignore
        raise RuntimeError("spectral_norm_3 has a first derivative only; use torch.linalg.matrix_norm(x, 2)")


# Up to torch 2.14 the exponential of a matrix that comes alone can be off by 2e-5 in single and 1e-10 in double
# precision (a wrong coefficient, pytorch#196592); those of two or more are right.
_EXPONENTIAL_NEEDS_COMPANY = torch.__version__ < "2.15"


def matrix_exponential(a: Tensor) -> Tensor:
    """Exponential of square matrices.

    Args:
        a: Matrices, shape ``(..., B, B)``.

    Returns:
        Matrices of the same shape.

    Example:
        >>> matrix_exponential(torch.tensor([[0.0, -torch.pi / 2], [torch.pi / 2, 0.0]])).round(decimals=5)
        tensor([[ 0., -1.],
                [ 1.,  0.]])
    """
    if _EXPONENTIAL_NEEDS_COMPANY and math.prod(a.shape[:-2]) == 1:
        return torch.linalg.matrix_exp(a.expand(2, *a.shape))[0]
    return torch.linalg.matrix_exp(a)


_SAFETY = 1.05  # head room for points that have drifted off the manifold


def newton_schulz_schedule(excess: float, precision: float) -> tuple[float, ...]:
    r"""Scale factors of the Newton-Schulz iteration for Gram matrices with eigenvalues in ``[1, 1 + excess]``.

    One step maps a singular value ``s`` to ``ρ s (3 - ρ² s²) / 2``. On ``[l, 1]`` the choice ``ρ² = 3 / (1 + l + l²)``
    (Chen and Chow 2014) makes the images of both ends equal and their common value the new ``l``. The schedule stops
    when ``1 - l`` is below the precision: its length is the number of iterations, known before any data is seen.

    Args:
        excess: Bound on the squared spectral norm of the tangent step on the unit manifold.
        precision: Accepted distance of the singular values from 1, e.g. ``torch.finfo(dtype).eps``.

    Returns:
        One factor ``ρ`` per iteration.

    Example:
        A step of spectral norm 0.414 needs three iterations in single precision.

        >>> len(newton_schulz_schedule(0.4142**2, 2.0**-23))
        3
    """
    factors: list[float] = []
    low = 1 / math.sqrt(_SAFETY * (1 + excess))
    while 1 - low > max(precision, 2.0**-50):
        rho = math.sqrt(3 / (1 + low + low * low))
        low = rho * low * (3 - (rho * low) ** 2) / 2
        factors.append(rho)
    return tuple(factors)


def polar_newton_schulz(
    y: Tensor, excess: Tensor | float, schedule: tuple[float, ...], radius: float | Tensor = 1.0
) -> Tensor:
    r"""The polar factor of nearly orthonormal matrices by matrix products alone.

    Runs the scaled Newton-Schulz iteration on the ``B x B`` Gram matrix ``M = yᵀy / s²``::

        T = ρ (3 I - ρ² M) / 2,    Z <- Z T,    M <- M T T,    result y Z / s

    so the long side enters two products only. The scale ``s² = 1.05 (1 + excess)`` leaves head room for points that
    have drifted off the manifold; the Gram matrix is formed from ``y`` itself, so that the drift is corrected too.
    All ``B x B`` matrices are polynomials in ``M``: they commute.

    Args:
        y: Matrices with singular values in ``[1, sqrt(1 + excess)]`` times the radius, shape ``(..., A, B)``,
            ``A >= B``.
        excess: Bound per matrix, shape ``(...)``, or for all of them.
        schedule: Factors from :func:`newton_schulz_schedule`, for a bound at least as large as every ``excess``.
        radius: Factor of ``y`` and of the result; a tensor broadcasts against ``y``.

    Returns:
        Matrices with orthonormal columns times the radius, shape ``(..., A, B)``.

    Example:
        >>> y = torch.tensor([[1.0, 0.0], [0.0, 1.1]])
        >>> polar_newton_schulz(y, torch.tensor(0.21), newton_schulz_schedule(0.21, 1e-7)).round(decimals=6)
        tensor([[1., 0.],
                [0., 1.]])
    """
    bound = excess[..., None, None] if isinstance(excess, Tensor) else excess
    return small_product(y, _inverse_root_newton_schulz(gram_matrix(y) / radius**2, bound, schedule))


def _inverse_root_newton_schulz(gram: Tensor, excess: Tensor | float, schedule: tuple[float, ...]) -> Tensor:
    """``G^{-1/2}`` for eigenvalues in ``[1, 1 + excess]``, and some head room on either side."""
    top = _SAFETY * (1 + excess)
    gram = gram / top
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    inverse_root = identity
    for step, rho in enumerate(schedule):
        factor = torch.sub(identity * (1.5 * rho), gram, alpha=0.5 * rho**3)
        inverse_root = factor if step == 0 else small_product(inverse_root, factor)
        if step + 1 < len(schedule):
            gram = small_product(small_product(gram, factor), factor)
    return inverse_root * top**-0.5


def series_limit(precision: float, terms: int = 2) -> float:
    """The largest ``‖E‖`` for which the first terms of :func:`polar_series` reach a precision.

    The error is that of the first term left out, ``3 ‖E‖² / 8`` or ``5 ‖E‖³ / 16``.

    Args:
        precision: Accepted distance of the singular values from 1.
        terms: Powers of ``E``, one or two.

    Returns:
        A bound on ``‖E‖``.

    Example:
        >>> round(series_limit(2.0**-23), 4), round(series_limit(2.0**-23, terms=1), 5)
        (0.0073, 0.00056)
    """
    return (precision * 8 / 3) ** (1 / 2) if terms == 1 else (precision * 16 / 5) ** (1 / 3)


def polar_series(y: Tensor, radius: float | Tensor = 1.0) -> Tensor:
    """The polar factor of almost orthonormal matrices, ``y (I - E/2 + 3E²/8)`` with ``E = yᵀy / r² - I``.

    One product of size ``B`` beside the two with the long side.

    Args:
        y: Matrices whose ``E`` is at most :func:`series_limit`, shape ``(..., A, B)``, ``A >= B``.
        radius: Radius ``r`` by which ``y`` is scaled, broadcastable.

    Returns:
        Matrices with orthonormal columns times the radius, shape ``(..., A, B)``.

    Example:
        >>> polar_series(torch.tensor([[1.001], [0.0]], dtype=torch.float64)).round(decimals=8)
        tensor([[1.],
                [0.]], dtype=torch.float64)
    """
    return subtract_product(y, y, _series_gap(gram_excess(y, radius), 2))


def _series_gap(excess: Tensor, terms: int) -> Tensor:
    """``I - (I + E)^{-1/2}`` for small ``E``: ``E/2`` and, with two terms, ``- 3E²/8``."""
    half = 0.5 * excess
    return half if terms == 1 else subtract_product(half, half, 0.75 * excess)


def inverse_root_gap(excess: Tensor, norm: float) -> Tensor:
    r"""``I - (I + E)^{-1/2}`` for symmetric ``E`` by products alone.

    Eigenvalues are to lie in ``[0, ‖E‖]``; slightly negative ones, of points that have drifted off a manifold, come
    back as well. The norm says how many terms of the series, or how many Newton-Schulz iterations, reach the precision
    of the type.

    Args:
        excess: Symmetric matrices, shape ``(..., B, B)``.
        norm: Bound on their spectral norms.

    Returns:
        Symmetric matrices of the same shape.

    Example:
        >>> inverse_root_gap(torch.diag(torch.tensor([0.0, 3.0])), 3.0).round(decimals=5)
        tensor([[0.0000, 0.0000],
                [0.0000, 0.5000]])
    """
    precision = torch.finfo(excess.dtype).eps
    for terms in (1, 2):
        if norm <= series_limit(precision, terms):
            return _series_gap(excess, terms)
    identity = torch.eye(excess.shape[-1], dtype=excess.dtype, device=excess.device)
    return identity - _inverse_root_newton_schulz(excess + identity, norm, newton_schulz_schedule(norm, precision))


def polish(y: Tensor) -> Tensor:
    """One Newton-Schulz step, ``y (3 I - yᵀy) / 2``: an error ``ε`` of the singular values becomes ``3 ε² / 2``.

    Args:
        y: Nearly orthonormal matrices, shape ``(..., A, B)``, ``A >= B``.

    Returns:
        Matrices of the same shape with columns closer to orthonormal.

    Example:
        >>> polish(torch.tensor([[1.001], [0.0]], dtype=torch.float64))
        tensor([[1.0000],
                [0.0000]], dtype=torch.float64)
    """
    return subtract_product(1.5 * y, y, 0.5 * gram_matrix(y))
