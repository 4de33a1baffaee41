"""Settings that every test shares: Hypothesis profiles and the number of threads.

The environment variable ``HYPOTHESIS_PROFILE`` names the profile; without it, it is ``ci`` where ``CI`` is set and
``dev`` elsewhere.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

from fgo_geo.weights import kinds

# The first example of a test compiles, loads and allocates: a clock on single examples would measure that.
settings.register_profile(
    "ci",
    deadline=None,
    derandomize=True,
    max_examples=50,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile("dev", deadline=None, max_examples=25)
settings.register_profile("thorough", deadline=None, max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE") or ("ci" if os.environ.get("CI") else "dev"))

# Tables are as wide as their rows, unless a test sets a width.
os.environ.pop("COLUMNS", None)

# The tests' tensors are small, and sums depend on the number of threads in their last bits: one thread, unless
# OMP_NUM_THREADS says otherwise.
if "OMP_NUM_THREADS" not in os.environ:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def registry() -> Iterator[None]:
    """Take out the kinds of manifolds that a test has entered, by name or as an object."""
    before = kinds.names()
    yield
    for name in kinds.names():
        if name not in before:
            kinds.unregister_kind(name)
