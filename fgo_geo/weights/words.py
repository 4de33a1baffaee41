"""Wording that messages of several rooms share."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["few"]


def few(names: Sequence[str], limit: int = 6) -> str:
    """The first of some names, and how many more there are.

    Args:
        names: Names, in the order to show them.
        limit: Number of names to show.

    Example:
        >>> few(["conv1", "conv2", "fc"], limit=2)
        'conv1, conv2 and 1 more'
    """
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
