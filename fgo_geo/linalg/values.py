"""Values of tensors on the host: whether they can be read without waiting, and whether they are finite.

Nothing here changes a tensor.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.utils._python_dispatch import (
    _get_current_dispatch_mode,  # pyright: ignore[reportPrivateUsage, reportUnknownVariableType]
)

__all__ = ["DAMAGED", "is_differentiated", "reads_for_free", "require_finite", "traces"]

DAMAGED = (
    "NaN and infinity come from training that diverged, or from a damaged file: load a checkpoint from before that"
)
"""Why a weight holds NaN or infinity, and what to do."""


def require_finite(
    x: Tensor, what: str, remedy: str = "replace NaN and infinity first, e.g. with torch.nan_to_num"
) -> None:
    """Raise if a tensor holds NaN or infinity.

    Reads the tensor on the host, so it has no place in an optimiser's step. Inside ``torch.compile`` it becomes
    a device-side assertion; where there are no values to read, as inside ``torch.func.vmap``, nothing is checked.

    Args:
        x: Any tensor.
        what: Name of the tensor, for the message.
        remedy: What to do about it, for the message.

    Raises:
        ValueError: With the number of non-finite entries.

    Example:
        >>> require_finite(torch.tensor([1.0, float("nan")]), "the weight")
        Traceback (most recent call last):
            ...
        ValueError: the weight has 1 non-finite entry of 2 (shape (2,)); replace NaN and infinity first, e.g. with...
    """
    if not torch.compiler.is_compiling():
        if traces():
            return
        if x.is_floating_point() and math.isfinite(float(x.detach().sum())):
            return  # a sum with NaN or infinity is not finite; a sum that overflows is checked entry by entry
    finite = torch.isfinite(x)
    if torch.compiler.is_compiling():
        message = f"{what} has non-finite entries"
        torch._assert_async(finite.all(), message)  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
        return
    if not bool(finite.all()):
        bad = int((~finite).sum())
        entries = "entry" if bad == 1 else "entries"
        raise ValueError(f"{what} has {bad} non-finite {entries} of {x.numel()} (shape {tuple(x.shape)}); {remedy}")


def reads_for_free(x: Tensor) -> bool:
    """Whether a tensor's values are on the host, so that they can be read without waiting.

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


def is_differentiated(x: Tensor) -> bool:
    """Whether torch differentiates operations on a tensor, backward or forward; for transforms see :func:`traces`.

    Args:
        x: Any tensor.

    Returns:
        A bool.

    Example:
        >>> is_differentiated(torch.zeros(3)), is_differentiated(torch.zeros(3, requires_grad=True))
        (False, True)
    """
    backward = torch.is_grad_enabled() and x.requires_grad
    return backward or torch.autograd.forward_ad.unpack_dual(x).tangent is not None


def traces() -> bool:
    """Whether operations are recorded and not run: under a dispatch mode, a ``torch.func`` transform or a tracer.

    Example:
        >>> torch.func.vmap(lambda x: x * traces())(torch.ones(2))
        tensor([1., 1.])
    """
    transform = torch._C._functorch.peek_interpreter_stack()  # pyright: ignore
    is_tracing = torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
    return transform is not None or _get_current_dispatch_mode() is not None or is_tracing
