"""What each page of the gallery starts with: the looks of figures, and torch's default type."""

from __future__ import annotations

import torch
from matplotlib import rcParams


def default_type(gallery_conf: dict[str, object], name: str) -> None:
    """Single precision: all pages run in one process, and some compute in double."""
    torch.set_default_dtype(torch.float32)


def figure_style(gallery_conf: dict[str, object], name: str) -> None:
    """Figures without background, in an ink that is legible on white and on black, in letters that phones show."""
    ink = "#7b8088"
    names = (
        "text.color",
        "axes.labelcolor",
        "axes.edgecolor",
        "xtick.color",
        "ytick.color",
        "grid.color",
        "lines.color",
    )
    rcParams.update(dict.fromkeys(names, ink))
    rcParams.update({"figure.facecolor": "none", "axes.facecolor": "none", "savefig.facecolor": "none"})
    rcParams.update({"legend.facecolor": "none", "legend.edgecolor": "none", "font.size": 11})
