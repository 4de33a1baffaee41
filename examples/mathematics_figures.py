"""Draw the figures of the page "Mathematics" and of the landing page from the functions of the package.

python examples/mathematics_figures.py    # writes docs/_static/math-*.png, overview.png and overview-narrow.png
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch

import fgo_geo
from fgo_geo.optim import theorem_step_bound, theorem_step_scale

DOCS = Path(__file__).parent.parent / "docs"
BLUE, RED, GREEN, PINK = "#0072b2", "#d55e00", "#009e73", "#cc79a7"


def step_size() -> plt.Figure:
    """The divisor τ, and the length of a step, against the norm of the gradient."""
    norms = torch.logspace(-2, 2, 400, dtype=torch.float64)
    figure, (left, right) = plt.subplots(1, 2, figsize=(7.6, 3.2), layout="constrained")
    for rho, colour in ((0.5, GREEN), (1.0, BLUE), (2.0, RED)):
        tau = theorem_step_scale(norms, rho=rho)
        left.loglog(norms, tau, color=colour, label=f"ρ = {rho:g}")
        right.loglog(norms, norms / tau, color=colour)
        right.axhline(theorem_step_bound(rho), color=colour, linewidth=0.8, linestyle=":")
    right.loglog(norms, norms, color=PINK, linestyle="--", label="SGD", zorder=0)
    right.set_ylim(8e-3, 10)
    left.set(xlabel="norm R of the gradient", title="divisor τ")
    right.set(xlabel="norm R of the gradient", title="length of a step / learning rate")
    left.legend()
    right.legend()
    return figure


def spectrum() -> plt.Figure:
    """The factor by which each metric multiplies a wave along the channels, measured on waves."""
    channels = 64
    places = torch.arange(channels, dtype=torch.float64)
    periods = np.arange(1, channels // 2 + 1)
    figure, ax = plt.subplots(figsize=(5.6, 3.3), layout="constrained")
    for metric, lam, colour in (("h0", 4.0, PINK), ("h1", 4.0, BLUE), ("h1t", 4.0, RED), ("h1t", 104.0, GREEN)):
        waves = [torch.cos(2 * torch.pi * k * places / channels) for k in periods]
        factors = [float(fgo_geo.channel_directed_gradient(w, metric, lam).norm() / w.norm()) for w in waves]
        name = {"h0": "H0", "h1": "H1", "h1t": "H1~"}[metric]
        ax.loglog(periods, factors, ".-", color=colour, label=f"{name}, λ = {lam:g}")
    ax.axhline(1, color=plt.rcParams["axes.edgecolor"], linewidth=0.8, linestyle=":")
    ax.set(xlabel="periods k along 64 channels", title="factor of a wave")
    ax.legend()
    return figure


def radius() -> plt.Figure:
    """The largest angle of a step against the radius of a sphere: eq. 7, with the manifold's curvature, invariant."""
    radii = np.logspace(-1.5, 0.5, 200)
    norms = torch.logspace(-4, 4, 4000, dtype=torch.float64)
    figure, ax = plt.subplots(figsize=(5.6, 3.3), layout="constrained")
    equation = [theorem_step_bound(1.0) / r for r in radii]
    own = [float((norms / theorem_step_scale(norms, curvature=1 / r**2)).max()) / r for r in radii]
    ax.loglog(radii, equation, color=BLUE, label="equation 7")
    ax.loglog(radii, own, color=RED, label='curvature="manifold"')
    ax.loglog(radii, np.full_like(radii, theorem_step_bound(1.0)), color=GREEN, label="radius_invariant=True")
    ax.set(xlabel="radius r of the sphere", title="largest angle of a step / learning rate")
    ax.legend()
    return figure


def overview(columns: int) -> plt.Figure:
    """The length of a step, and how far retractions are from the exponential map; side by side, or stacked."""
    size = (4.6 * columns, 3.6 * (3 - columns))
    figure, (left, right) = plt.subplots(3 - columns, columns, figsize=size, layout="constrained")
    norms = torch.logspace(-2, 2, 400, dtype=torch.float64)
    left.loglog(norms, norms, "--", color=PINK, label="SGD")
    left.loglog(norms, norms / theorem_step_scale(norms), color=BLUE, linewidth=2, label="FG-SGD")
    left.set(xlabel="norm R of the gradient", title="length of a step / learning rate", ylim=(5e-3, 20))
    left.legend()
    torch.manual_seed(0)
    lengths = torch.logspace(-3, 0, 25, dtype=torch.float64)
    for name, manifold, colour in (
        ("Stiefel, QR", fgo_geo.Stiefel(retraction="qr"), RED),
        ("Stiefel, polar", fgo_geo.Stiefel(), BLUE),
        ("oblique", fgo_geo.Oblique(), GREEN),
        ("sphere", fgo_geo.ScaledSphere(ndim=2), PINK),
    ):
        x = manifold.random(8, 3, dtype=torch.float64)
        u = manifold.proju(x, torch.randn(8, 3, dtype=torch.float64))
        u = u / u.norm()
        gaps = [float((manifold.retr(x, s * u) - manifold.expmap(x, s * u)).norm()) for s in lengths]
        right.loglog(lengths, gaps, ".", color=colour, label=name)
    right.set(xlabel="length of the step", title="error of a retraction")
    right.legend()
    return figure


if __name__ == "__main__":
    sys.path.insert(0, str(DOCS))
    from figures import figure_style

    figure_style({}, "")
    for draw in (step_size, spectrum, radius):
        draw().savefig(DOCS / "_static" / f"math-{draw.__name__.replace('_', '-')}.png", dpi=150)
    overview(2).savefig(DOCS / "_static" / "overview.png", dpi=150)
    overview(1).savefig(DOCS / "_static" / "overview-narrow.png", dpi=150)
