"""Results that are kept while their inputs stay the same, for what costs far more than comparing the inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fgo_geo.linalg.values import reads_for_free

__all__ = ["Memory"]


class Memory:
    """The results that a function of tensors had for its last inputs.

    Inputs are compared number by number with copies. A version counter would cost less, but it does not see what is
    written to ``parameter.data``. Only tensors on the CPU are remembered: elsewhere the comparison would wait for the
    device. Copies and pickles of a memory are empty.

    Example:
        >>> memory, x = Memory(), torch.tensor([1.0, 2.0])
        >>> memory.keep([x], [x.square()])
        >>> memory.recall([x])
        (tensor([1., 4.]),)
        >>> x.data += 1
        >>> memory.recall([x]) is None
        True
    """

    def __init__(self) -> None:
        self._inputs: list[Tensor] = []
        self._results: list[tuple[Tensor, int]] = []

    def recall(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...] | None:
        """The results for these inputs, detached; None if the last ones were others, or a result was changed since."""
        if len(inputs) != len(self._inputs) or not all(reads_for_free(x) for x in inputs):
            return None
        if not all(_same(x, kept) for x, kept in zip(inputs, self._inputs, strict=True)):
            return None
        if any(result._version != version for result, version in self._results):
            return None
        return tuple(result for result, _ in self._results)

    def keep(self, inputs: Sequence[Tensor], results: Sequence[Tensor]) -> None:
        """Remember the results for these inputs, if they are on the CPU and outside of transforms.

        The memory of the results is shared, that of the inputs is not.
        """
        self.clear()
        if all(reads_for_free(x) for x in inputs):
            self._inputs = [x.detach().clone() for x in inputs]
            detached = [result.detach() for result in results]
            self._results = [(result, result._version) for result in detached]

    def clear(self) -> None:
        """Forget everything."""
        self._inputs, self._results = [], []

    def __getstate__(self) -> dict[str, Any]:
        return {"_inputs": [], "_results": []}


def _same(x: Tensor, y: Tensor) -> bool:
    alike = x.shape == y.shape and x.stride() == y.stride() and x.dtype == y.dtype and x.device == y.device
    return alike and torch.equal(x.detach(), y)
