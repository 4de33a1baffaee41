"""Names that modules had before version 0.2: imports and pickles written for them keep working.

A pickle stores the module of each class. ``register`` enters every former name as an alias of the module that holds its
contents now, so there is one module object under both names.
"""

from __future__ import annotations

import importlib
import sys

__all__ = ["FORMER_ATTRIBUTES", "FORMER_NAMES", "register"]

FORMER_NAMES = {
    "bounds": "measures.bounds",
    "choose": "models.choose",
    "components": "weights.components",
    "constrain": "models.constrain",
    "feature_stats": "models.feature_stats",
    "folding": "models.folding",
    "grouping": "weights.grouping",
    "kernels": "paths.router",
    "norms": "weights.norms",
    "radius": "weights.radius",
    "renormalize": "models.renormalize",
    "report": "measures.report",
    "report.data": "measures.report.data",
    "report.reading": "measures.report.reading",
    "report.record": "measures.report",
    "report.weights": "measures.report.weights",
}
"""Former name of each module that moved, and its name now, both relative to the package."""

FORMER_ATTRIBUTES = {
    "models.choose": {"PlanEntry": "models.entry"},
    "models.constrain": dict.fromkeys(("_store", "_restore", "_attach_again", "_guard"), "models.plan"),
    "optim.channel_directed": dict.fromkeys(("channel_directed_gradient", "channel_inner"), "optim.channel_metrics"),
    "weights.components": {"_Band": "weights.blocks"},
}
"""What a moved module held under its former name: pickled models name functions (their hooks) and classes."""


def register() -> None:
    """Make every moved module, and what has left it since, importable under its former name too."""
    for former, name in FORMER_NAMES.items():
        sys.modules[f"fgo_geo.{former}"] = importlib.import_module(f"fgo_geo.{name}")
    for former, moved in FORMER_ATTRIBUTES.items():
        for attribute, name in moved.items():
            module = importlib.import_module(f"fgo_geo.{name}")
            setattr(importlib.import_module(f"fgo_geo.{former}"), attribute, getattr(module, attribute))
