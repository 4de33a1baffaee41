"""What torch itself cannot do before a version, for the tests that meet it."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

import pytest
import torch

# Before torch 2.8 torch.compile leaves whatever touches a geoopt.ManifoldParameter between its graphs: the numbers are
# the same, but nothing is one graph.
TRACES_PARAMETERS = torch.__version__ >= "2.8"

# FakeTensorMode refuses a geoopt.ManifoldParameter with values in torch 2.10 and takes it in 2.14 (untried in between).
FAKES_PARAMETERS = torch.__version__ >= "2.14"


def _triton() -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in version("triton").split(".")[:2])
    except PackageNotFoundError:
        return ()


needs_triton = pytest.mark.skipif(
    _triton() < (3, 3), reason="needs Triton 3.3, which comes with torch 2.7 for CUDA on Linux"
)
