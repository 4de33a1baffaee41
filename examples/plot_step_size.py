r"""
The step size
=============

Three figures for :doc:`/guides/step-size`. They show how the options of :class:`fgo_geo.RiemannianFGSGD` act on a step:
the bound :math:`\rho` on the distance, the radius of the manifold, and the norm to take when gradients are noisy.
"""

import math

import geoopt
import matplotlib.pyplot as plt
import torch

import fgo_geo

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
# A group moves by :math:`\eta R / \tau(R)`. A larger :math:`\rho` shortens all long steps: the longest step is
# :math:`\sqrt{1 + \rho^2} - \rho` times the learning rate, about :math:`1 / 2\rho` for large :math:`\rho`. Steps from
# small gradients do not change.

figure, ax = plt.subplots(figsize=(5.5, 3.8))
norm = torch.logspace(-2, 2, 400, dtype=torch.float64)
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
# The variance rule gives the sphere kernels of a convolution with :math:`C` input channels the radius
# :math:`\sqrt{2 / C}`, which is 0.06 for 512 channels. The effect of a step on such a sphere depends on
# the ratio of the step to the radius. Each curve shows the largest ratio over all gradients. Equation 7 as printed
# bounds the absolute length, so the ratio grows like :math:`1 / r`. With the manifold's own curvature the ratio stays
# below one. In the radius-invariant form it is the same for every radius.

radius = torch.logspace(-1.3, 1, 200, dtype=torch.float64)
scale = fgo_geo.optim.theorem_step_scale
norm = torch.logspace(-3, 3, 2000, dtype=torch.float64)[:, None]
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

# %%
# Noisy gradients
# ---------------
#
# On the unit circle let the loss be the mean of :math:`-\langle (0.2, z), x \rangle`, where :math:`z` is 3 with
# probability 0.1 and :math:`-1/3` otherwise. The mean of :math:`z` is 0, so the minimum is at angle 0. With
# ``norm="batch"``, as in the paper, the optimiser shortens the rare large gradients but not the frequent small ones,
# and the iterates settle at another angle. With ``norm="running"`` the divisor depends on earlier steps only, so steps
# point to the minimum on average, as constant steps do.


def angles(seed: int, **options: str) -> list[float]:
    """Return the angle, in degrees, after each step of one run."""
    generator = torch.Generator().manual_seed(seed)
    x = geoopt.ManifoldParameter(torch.tensor([0.5, 0.5], dtype=torch.float64).sqrt(), manifold=fgo_geo.ScaledSphere())
    optimizer = fgo_geo.RiemannianFGSGD([x], lr=0.3, **options)
    schedule = fgo_geo.optim.RobbinsMonroLR(optimizer, time_constant=100, exponent=0.75)
    path = []
    for draw in (torch.rand(1500, generator=generator) < 0.1).tolist():
        x.grad = -torch.tensor([0.2, 3.0 if draw else -1 / 3], dtype=torch.float64)
        optimizer.step()
        schedule.step()
        path.append(math.degrees(math.atan2(*x.detach().flip(0).tolist())))
    return path


figure, ax = plt.subplots(figsize=(5.5, 3.8))
ways = {
    'norm="batch"': {"norm": "batch"},
    'norm="running"': {"norm": "running"},
    'step_size="constant"': {"step_size": "constant"},
}
for number, (label, options) in enumerate(ways.items()):
    for seed in range(3):
        ax.plot(angles(seed, **options), color=f"C{number}", alpha=0.7, linewidth=1, label=None if seed else label)
ax.axhline(0, color="0.4", linestyle=":")
ax.set(xlabel="step", ylabel="angle (degrees)")
ax.legend(loc="upper right")
