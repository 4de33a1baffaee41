"""Methods by name: the rows of the paper's Table 3, and ours.

A method is a set of flags of ``train.py``. In the paper's words: *Euc* is plain SGD; *St* has every layer's matrix on
one Stiefel manifold; *POMs of St* has every kernel on a Stiefel manifold of its own, in groups; *PIO (Sp+Ob+St)*
assigns three kinds of manifolds to groups of kernels, by input channels on one half of a layer and by output channels
on the other; *PIO (Sp+Ob+St+Euc)* has free kernels, too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Method:
    """A row: its title, and the flags that it stands for."""

    title: str
    flags: dict[str, Any]


_THREE = ["sphere", "oblique", "stiefel"]
_PIO = {"optimizer": "fgsgd", "strategy": "pio", "manifolds": _THREE}
_FREE = {"optimizer": "fgsgd", "strategy": "pio", "manifolds": [*_THREE, "euclidean"]}

METHODS = {
    "euc": Method("Euc", {"optimizer": "sgd"}),
    "st": Method("St", {"optimizer": "fgsgd", "strategy": "layer", "manifolds": ["stiefel"], "components": "block"}),
    "poms-st": Method("POMs of St", {"optimizer": "fgsgd", "strategy": "pio", "manifolds": ["stiefel"]}),
    "pio": Method("PIO (Sp+Ob+St)", _PIO),
    "pio-euc": Method("PIO (Sp+Ob+St+Euc)", _FREE),
    "pio-channel": Method("PIO (Sp+Ob+St), channel-directed", {**_PIO, "channel_directed": "h0"}),
    "pio-scales": Method("PIO (Sp+Ob+St), λ refreshed", {**_PIO, "scales": "max1"}),
    "pio-renorm": Method("PIO (Sp+Ob+St), renormalised", {**_PIO, "optimizer": "sgd", "renormalize": True}),
    "adamw": Method("AdamW", {"optimizer": "adamw"}),
    "pio-adamw": Method(
        "PIO (Sp+Ob+St), AdamW on manifolds", {**_PIO, "optimizer": "adamw", "on_manifolds": "constant"}
    ),
}
