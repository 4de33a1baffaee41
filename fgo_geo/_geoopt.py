"""The first import of Geoopt, without the warning that torch gives on it.

Geoopt compiles a few functions by ``torch.jit.script`` when it is imported, and torch has announced the end of that.
Nothing here calls these functions, and users can do nothing about them. Other warnings come through, and the filters
are afterwards as they were.
"""

import warnings

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message=r"`torch\.jit\.script` is (deprecated|not supported)")
    import geoopt  # noqa: F401  # pyright: ignore[reportUnusedImport]
