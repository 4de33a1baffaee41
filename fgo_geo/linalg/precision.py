"""The precision in which a function computes: half-precision arguments, and products in TF32 and bfloat16.

Three decorators choose it: :func:`computes_in_float32` upcasts half-precision arguments, :func:`takes_real_tensors`
also refuses complex and integer ones, and :func:`takes_full_products` switches off TF32 and bfloat16 products of
float32 matrices. Torch's setting for products belongs to the process, and the lock on it is the only state of the
linear algebra.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch import Tensor

__all__ = [
    "at_least_single",
    "computes_in_float32",
    "in_double",
    "lowers_products",
    "multiplies_bfloat16",
    "require_real",
    "rounds_to_bfloat16",
    "takes_full_products",
    "takes_real_tensors",
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
    return _computing_in_float32(function, only_real=False)


def takes_real_tensors(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """:func:`computes_in_float32` for a method whose formulas hold for real numbers alone.

    Raises:
        TypeError: If a tensor argument is complex or holds integers or booleans.

    Example:
        >>> class Root:
        ...     @takes_real_tensors
        ...     def of(self, x):
        ...         return x.sqrt()
        >>> Root().of(torch.tensor([4]))
        Traceback (most recent call last):
            ...
        TypeError: an argument of Root.of has dtype torch.int64, expected a real floating-point type; convert it, ...
    """
    return _computing_in_float32(function, only_real=True)


def require_real(dtype: torch.dtype, what: str) -> None:
    """Raise if a type is complex, or one of integers or booleans.

    Args:
        dtype: A tensor's type.
        what: Name of the tensor, for the message.

    Raises:
        TypeError: With the type, and how to convert it.

    Example:
        >>> require_real(torch.bfloat16, "the weight")
        >>> require_real(torch.complex64, "the weight")
        Traceback (most recent call last):
            ...
        TypeError: the weight has dtype torch.complex64, expected a real floating-point type; use its real and ...
    """
    if dtype.is_floating_point:
        return
    remedy = (
        "use its real and imaginary parts (torch.view_as_real)" if dtype.is_complex else "convert it, with .float()"
    )
    raise TypeError(f"{what} has dtype {dtype}, expected a real floating-point type; {remedy}")


def in_double(x: Tensor, what: str) -> Tensor:
    """A tensor in double precision.

    Args:
        x: Any real tensor.
        what: Its name, for the message.

    Raises:
        TypeError: If it is complex or holds integers.
    """
    if not isinstance(cast(object, x), Tensor):
        raise TypeError(f"{what} must be a torch.Tensor, got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"{what} has dtype {x.dtype}; expected a real floating-point type")
    return x.double()


def at_least_single(dtype: torch.dtype) -> torch.dtype:
    """The type of a result that was computed in double precision: that of the input, or float32 where it is half."""
    return torch.promote_types(dtype, torch.float32)


def _computing_in_float32(function: Callable[_P, _R], only_real: bool) -> Callable[_P, _R]:
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
        if only_real and len(floating) < len(tensors):
            other = next(t.dtype for t in tensors if not t.is_floating_point())
            require_real(other, f"an argument of {type(args[0]).__name__}.{function.__name__}")
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
    """Whether torch may round the factors of float32 products to TF32 or bfloat16, where that is faster.

    That is what ``torch.set_float32_matmul_precision("high")`` and ``"medium"`` allow. ``torch.compile`` cannot read
    it.

    Example:
        >>> lowers_products()
        False
    """
    return any(value not in _FULL for value in _precisions())


def rounds_to_bfloat16() -> bool:
    """Whether torch may round float32 products on the CPU to bfloat16.

    That is what ``torch.set_float32_matmul_precision("medium")`` allows.

    Example:
        >>> rounds_to_bfloat16()
        False
    """
    return _precisions()[-1] in ("bf16", "medium")


@functools.cache
def multiplies_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 matrices itself, twice as fast as float32 (AVX-512) or more (AMX)."""
    names = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")  # public from some later torch on
    asked = [getattr(torch.cpu, name, None) for name in names]
    return torch.backends.mkldnn.is_available() and any(ask is not None and ask() for ask in asked)


def takes_full_products(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Compute products of float32 matrices in float32, whatever torch's setting.

    A relative error of 1e-3, as in TF32, is harmless in a direction, but not in a point with orthonormal columns.
    Inside ``torch.compile`` the setting does not change. It belongs to the process: while the function runs, other
    threads compute full products, too.

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
    """Change the setting unless products are full already; returns whether the caller has to restore it."""
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
    """Restore the setting, if no other call needs full products."""
    global _inside
    with _lock:
        _inside -= 1
        if _inside == 0:
            _set_precisions(_before)
