r"""
The step size
=============

Figures for :doc:`/guides/step-size`: what the bound :math:`\rho` on the distance does to a step, and what the radius of
a manifold does to it under each option of :class:`fgo_geo.RiemannianFGSGD`.
"""

import matplotlib.pyplot as plt
import torch

import fgo_geo

torch.set_default_dtype(torch.float64)
plt.rcParams.update(
    {
        "axes.grid": True,
        "axes.prop_cycle": plt.cycler(color=["#0072b2", "#d55e00", "#009e73", "#cc79a7"]),
        "axes.spines.right": False,
        "axes.spines.top": False,
        "figure.constrained_layout.use": True,
        "grid.alpha": 0.3,
        "legend.frameon": False,
    }
)

# %%
# The bound on the distance
# -------------------------
#
# A group moves by :math:`\eta R / \tau(R)`. A larger :math:`\rho` makes all long steps shorter: the longest one is
# :math:`\sqrt{1 + \rho^2} - \rho` times the learning rate, about :math:`1 / 2\rho`. Small gradients are not affected.

figure, ax = plt.subplots(figsize=(5.5, 3.8))
norm = torch.logspace(-2, 2, 400)
for rho in (0.25, 1.0, 4.0):
    ax.loglog(norm, norm / fgo_geo.optim.theorem_step_scale(norm, rho), label=rf"$\rho = {rho:g}$")
    ax.axhline(fgo_geo.optim.theorem_step_bound(rho), color="0.6", linestyle=":", zorder=0)
ax.loglog(norm, norm, "--", color="0.5", label="constant")
ax.set(xlabel="norm $R$ of the Riemannian gradient", ylabel="step length / learning rate", ylim=(5e-3, 3))
ax.legend(loc="upper left")

# %%
# The radius
# ----------
#
# Kernels of a convolution with :math:`C` input channels get the radius :math:`\sqrt{2 / C}` by the variance rule: 0.06
# for 512 channels. What matters to such a sphere is the step in units of its radius. Each curve is the longest step
# over all gradients. Equation 7 as printed bounds the step in absolute terms, so that in units of the radius it grows
# like :math:`1 / r`. With the manifold's own curvature it stays below one radius. In the radius-invariant form it is
# the same for every radius.

radius = torch.logspace(-1.3, 1, 200)
scale = fgo_geo.optim.theorem_step_scale
norm = torch.logspace(-3, 3, 2000)[:, None]
steps = {
    "equation 7 (default)": norm / scale(norm),
    'curvature="manifold"': norm / scale(norm, curvature=radius**-2),
    "radius_invariant=True": radius**2 * norm / scale(radius * norm),
}
figure, ax = plt.subplots(figsize=(5.5, 3.8))
for label, step in steps.items():
    ax.loglog(radius, step.amax(0) / radius, label=label)
ax.set(xlabel="radius $r$", ylabel="longest step / ($r$ · learning rate)")
ax.legend(loc="lower left")
