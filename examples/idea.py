"""Draw the idea in one picture: the kernels of a layer, free, and on manifolds in groups by PI, PO and PIO.

python examples/idea.py    # writes docs/_static/idea-light.png, idea-dark.png, and narrow ones for phones
"""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.patches import Patch, Rectangle

import fgo_geo
from fgo_geo.weights.kinds import kind

FOLDER = Path(__file__).parent.parent / "docs" / "_static"
KINDS = ("sphere", "oblique", "stiefel")
CHANNELS = 6
FREE = "#8a8f98"
PANELS = {
    "free": "a free layer\none step size for all kernels",
    "pi": "PI\nevery input channel is divided",
    "po": "PO\nevery output channel is divided",
    "pio": "PIO\nhalf by output, half by input",
}


def draw(ax: Axes, weight: np.ndarray, groups: fgo_geo.Collection | None, ink: str) -> None:
    """Draw every kernel as a 3 x 3 picture in the colour of its manifold, and a line between groups."""
    for row in range(CHANNELS):
        for column in range(CHANNELS):
            colour = FREE if groups is None else kind(groups.kinds[groups.kind_of[row, column]]).colour
            kernel = np.abs(weight[row, column]) / np.abs(weight).max()
            pixels = np.empty((3, 3, 4))
            pixels[..., :3] = to_rgb(colour)
            pixels[..., 3] = 0.2 + 0.8 * kernel
            left, top = column + 0.1, row + 0.1
            ax.imshow(pixels, extent=(left, left + 0.8, top + 0.8, top), interpolation="nearest")
    if groups is None:
        ax.add_patch(Rectangle((0, 0), CHANNELS, CHANNELS, fill=False, edgecolor=ink, linewidth=1.5))
    else:
        by_output = np.broadcast_to(groups.by_output, (CHANNELS, CHANNELS))
        for row in range(CHANNELS):
            for column in range(CHANNELS):
                along = by_output[row, column]
                x, y = ([0, 1], [0, 0]) if along else ([0, 0], [0, 1])
                for shift in (0, 1):
                    dx, dy = (0, shift) if along else (shift, 0)
                    ax.plot(
                        [column + a + dx for a in x], [row + b + dy for b in y], color=ink, linewidth=1.0, alpha=0.8
                    )
    ax.set(xlim=(-0.05, CHANNELS + 0.05), ylim=(CHANNELS + 0.05, -0.05), aspect="equal")
    ax.set_axis_off()


def picture(ink: str, columns: int) -> plt.Figure:
    """The four panels, in an ink for the background that they are to stand on."""
    torch.manual_seed(2)
    rows = len(PANELS) // columns
    size = (11, 3.7) if rows == 1 else (5.6, 7.2)
    figure, grid = plt.subplots(rows, columns, figsize=size, layout="constrained")
    axes = grid.flatten()
    for ax, (strategy, title) in zip(axes, PANELS.items(), strict=True):
        groups, weight = None, torch.randn(CHANNELS, CHANNELS, 3, 3)
        if strategy != "free":
            groups = fgo_geo.collection(CHANNELS, CHANNELS, strategy, KINDS, "random", seed=1)
            weight = fgo_geo.ProductOfGroups(groups, (CHANNELS, CHANNELS, 3, 3)).projx(weight)
        draw(ax, weight.numpy(), groups, ink)
        head, _, body = title.partition("\n")
        ax.set_title(f"{head}\n{body}", color=ink, fontsize=11)
        ax.text(CHANNELS / 2, CHANNELS + 0.35, "input channels", ha="center", va="center", color=ink, fontsize=9)
    axes[0].text(-0.35, CHANNELS / 2, "output channels", va="center", ha="center", rotation=90, color=ink, fontsize=9)
    meaning = {"sphere": "fixed norm", "oblique": "columns of fixed norm", "stiefel": "and orthogonal"}
    key = [Patch(color=kind(name).colour, label=f"{name}: {meaning[name]}") for name in KINDS]
    ncols = len(KINDS) if rows == 1 else 1
    figure.legend(handles=key, loc="outside lower center", ncols=ncols, frameon=False, labelcolor=ink, fontsize=11)
    return figure


if __name__ == "__main__":
    for theme, ink in (("light", "#24292f"), ("dark", "#e6edf3")):
        picture(ink, 4).savefig(FOLDER / f"idea-{theme}.png", dpi=150, transparent=True)
        picture(ink, 2).savefig(FOLDER / f"idea-{theme}-narrow.png", dpi=150, transparent=True)
