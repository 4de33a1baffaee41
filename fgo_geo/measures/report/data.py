"""Run data through a model, to find the input sizes of its convolutions, and its margin."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from typing import Any, cast

import torch
from torch import Tensor, nn

from fgo_geo.measures.bounds import margin
from fgo_geo.weights.layout import CONVOLUTIONS

__all__ = ["Observed", "observe"]

# What torch's layers raise at inputs that do not fit: shapes, dimensions, types.
_MISFITS = (AssertionError, IndexError, RuntimeError, TypeError, ValueError)


@dataclass(frozen=True, eq=False)
class Observed:
    """The results of running data through a model.

    Attributes:
        sizes: The spatial sizes that every convolution was applied to; of transposed ones, the sizes of their outputs.
        margin: The quantile of the margins; None without labels.
        n_labelled: Number of samples with labels.
    """

    sizes: dict[nn.Module, set[tuple[int, ...]]]
    margin: float | None = None
    n_labelled: int = 0


def observe(model: nn.Module, data: Any, quantile: float) -> Observed:
    """Run data through a model in eval mode; the model does not change.

    Args:
        model: Any module.
        data: As in :func:`fgo_geo.measures.report.reading.report`.
        quantile: The share of samples that may have a smaller margin.

    Returns:
        Sizes and margin; nothing without data.

    Raises:
        ValueError: If the data have a type that a report does not support, or the model fails on them.
    """
    sizes: dict[nn.Module, set[tuple[int, ...]]] = {}
    if data is None:
        return Observed(sizes)

    def note(module: nn.Module, inputs: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor) -> None:
        seen = output if cast(nn.Conv2d, module).transposed else inputs[0] if inputs else kwargs["input"]
        sizes.setdefault(module, set()).add(tuple(seen.shape[-len(cast(nn.Conv2d, module).kernel_size) :]))

    convolutions = [m for m in model.modules() if isinstance(m, CONVOLUTIONS)]
    handles = [m.register_forward_hook(note, with_kwargs=True) for m in convolutions]
    logits: list[Tensor] = []
    targets: list[Tensor] = []
    batches = 0
    try:
        with _eval_mode(model):
            for inputs, labels in _batches(model, data):
                output = _output(model, inputs)
                batches += 1
                if labels is None:
                    break
                logits.append(_require_tensor(output, "outputs").cpu())
                targets.append(_require_tensor(labels, "labels").cpu())
    finally:
        for handle in handles:
            handle.remove()
    if not batches:
        raise ValueError(f"report: data is an empty {type(data).__name__}; pass at least one batch, or leave data out")
    if not targets:
        return Observed(sizes)
    classes = torch.cat(targets)
    return Observed(sizes, margin(torch.cat(logits), classes, quantile), len(classes))


def _output(model: nn.Module, inputs: Tensor) -> Any:
    """The output of the model; if it raises an error, one that describes the data."""
    try:
        return model(inputs)
    except torch.OutOfMemoryError:
        raise
    except _MISFITS as error:
        raise ValueError(
            f"report: {type(model).__name__} fails at data of shape {tuple(inputs.shape)} and type {inputs.dtype}: "
            f"{type(error).__name__}: {error}. Give data that the model takes (a batch, a loader, or the size of one "
            "input without the batch, e.g. (3, 224, 224)), or leave data out"
        ) from error


def _batches(model: nn.Module, data: Any) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Inputs on the model's device, and labels where there are some."""
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    if isinstance(data, Sequence) and data and all(isinstance(n, int) for n in cast("Sequence[Any]", data)):
        if min(cast("Sequence[int]", data)) < 1:
            raise ValueError(f"report: data is {data}; expected the size of one input, of numbers >= 1")
        data = torch.zeros(1, *cast("Sequence[int]", data), dtype=like.dtype)
    single = isinstance(data, Tensor) or _is_pair(data)
    if not single and (isinstance(data, (str, PathLike, nn.Module)) or not isinstance(data, Iterable)):
        raise ValueError(
            f"report: data is {_shown(data)}; expected a batch, (inputs, labels), a loader, or the size of one input, "
            "e.g. (3, 224, 224)"
        )
    for batch in [data] if single else cast("Iterable[Any]", data):
        inputs, labels = batch if _is_pair(batch) else (batch, None)
        yield _require_tensor(inputs, "inputs").to(like.device), labels


def _shown(data: object) -> str:
    """Data that a report cannot use, in words."""
    if isinstance(data, (str, PathLike)):
        return f"{data!r}, and report loads no files"
    return type(data).__name__


def _is_pair(batch: Any) -> bool:
    return isinstance(batch, (tuple, list)) and len(cast("Sequence[Any]", batch)) == 2 and isinstance(batch[0], Tensor)


def _require_tensor(value: Any, what: str) -> Tensor:
    if not isinstance(value, Tensor):
        raise ValueError(
            f"report: the {what} must be a tensor, got {type(value).__name__}; leave data out, or wrap data or model"
        )
    return value


@contextmanager
def _eval_mode(model: nn.Module) -> Generator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
