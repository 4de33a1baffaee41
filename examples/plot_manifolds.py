r"""
Steps on manifolds
==================

Three figures for :doc:`/mathematics`: the length of an FG-SGD step, the error of a retraction, and the bounded step on
a problem with a known answer.
"""

import math

import geoopt
import matplotlib.pyplot as plt
import torch

import fgo_geo

torch.manual_seed(0)
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
# The length of a step
# --------------------
#
# A group whose Riemannian gradient has norm :math:`R` moves by :math:`\eta R / \tau(R)`. Up to
# :math:`R = \sqrt 2 - 1` this is the step of SGD. Beyond this threshold the step gets *shorter* as the gradient grows.
# No gradient moves a group by more than :math:`(\sqrt 2 - 1)\, \eta`.


def draw_step_length(ax: plt.Axes) -> None:
    """Draw the length of one step, for learning rate 1, against the norm of the gradient."""
    norm = torch.logspace(-2, 2, 400)
    threshold = math.sqrt(2) - 1
    ax.loglog(norm, norm, "--", color="0.5", label="SGD")
    tau = fgo_geo.optim.theorem_step_scale(norm)
    ax.loglog(norm, norm / tau, label="FG-SGD", linewidth=2)
    ax.plot(threshold, threshold, "o", color="black", markersize=5)
    ax.annotate(
        r"$R = \sqrt{2} - 1$",
        (threshold, threshold),
        xytext=(-70, 12),
        textcoords="offset points",
    )
    ax.set(
        title="Length of one step",
        xlabel="norm $R$ of the Riemannian gradient",
        ylabel=r"step length / learning rate",
        ylim=(5e-3, 20),
    )
    ax.legend(loc="upper left")


figure, axes = plt.subplots(figsize=(5.5, 3.8))
draw_step_length(axes)

# %%
# Retractions
# -----------
#
# A retraction is a cheap replacement for the exponential map. The error of a first-order retraction falls with the
# square of the step, and that of a second-order retraction with the cube. The slopes in the logarithmic plot are
# therefore 2 and 3.


def retraction_error(manifold: geoopt.Manifold, steps: torch.Tensor) -> list[float]:
    """Return distances from the exponential map, along one random direction."""
    x = manifold.random(8, 3)
    u = manifold.proju(x, torch.randn(8, 3))
    u = u / u.norm()
    gaps = [manifold.retr(x, s * u) - manifold.expmap(x, s * u) for s in steps]
    return [gap.norm().item() for gap in gaps]


def draw_retractions(ax: plt.Axes) -> None:
    """Draw the errors of the retractions, and lines of slopes 2 and 3."""
    steps = torch.logspace(-3, 0, 25)
    for label, manifold, marker in (
        ("Stiefel, QR", fgo_geo.Stiefel(retraction="qr"), "s"),
        ("Stiefel, polar", fgo_geo.Stiefel(), "o"),
        ("oblique", fgo_geo.Oblique(), "^"),
        ("sphere", fgo_geo.ScaledSphere(ndim=2), "v"),
    ):
        errors = retraction_error(manifold, steps)
        ax.loglog(steps, errors, marker, markersize=4, label=label)
    ax.loglog(steps, steps**2 / 3, ":", color="0.4", zorder=0)
    ax.loglog(steps, steps**3 / 3, "--", color="0.4", zorder=0)
    ax.text(0.02, 3e-4, "slope 2", color="0.3", ha="right")
    ax.text(0.02, 1e-7, "slope 3", color="0.3", ha="left")
    ax.set(
        title="Retraction against exponential map",
        xlabel=r"step $\Vert u \Vert$",
        ylabel="error",
    )
    ax.legend(loc="lower right", fontsize="small")


figure, axes = plt.subplots(figsize=(5.5, 3.8))
draw_retractions(axes)

# %%
# A problem with a known answer
# -----------------------------
#
# The leading principal component of a distribution, from one sample :math:`a` per step, is the
# point of the sphere that maximises :math:`\tfrac12 \operatorname{E} \langle a, x \rangle^2`. The
# samples here have heavy tails (Student's :math:`t` with three degrees of freedom, twice as wide
# along the first axis), so some gradients are a hundred times longer than usual. The curves are
# medians and quartiles of 50 runs. The left figure shows each optimiser with its best learning rate,
# the right figure both optimisers with every learning rate. The rates decay as the convergence
# theorem requires.
#
# With their best learning rates, both optimisers find the component about equally well in the end. The
# bounded step is faster on the way, its runs differ less, and it loses less if the learning rate is
# too large. If the learning rate is too small, the division by :math:`\tau` makes the steps even
# shorter.
#
# The threshold :math:`\sqrt 2 - 1` has no unit, so the scale of the loss matters. The samples here are
# scaled so that ordinary gradients are near the threshold.


def sine_of_angle(step_size: str, lr: float, n_steps: int = 300, n_runs: int = 50) -> torch.Tensor:
    """Return the sine of the angle to the leading component, for each step and run."""
    torch.manual_seed(0)
    sphere, tails = fgo_geo.ScaledSphere(), torch.distributions.StudentT(3.0)
    runs = [geoopt.ManifoldParameter(sphere.random(20), manifold=sphere) for _ in range(n_runs)]
    optimizer = fgo_geo.RiemannianFGSGD(runs, lr=lr, step_size=step_size, maximize=True)
    scheduler = fgo_geo.optim.RobbinsMonroLR(optimizer, time_constant=100)
    width = torch.ones(20)
    width[0] = 2
    width /= width.norm()
    sines = torch.empty(n_steps, n_runs)
    for step in range(n_steps):
        x = torch.stack(runs)
        sines[step] = x[:, 1:].norm(dim=1).detach()
        samples = width * tails.sample(x.shape)
        optimizer.zero_grad()
        ((samples * x).sum(1) ** 2 / 2).sum().backward()
        optimizer.step()
        scheduler.step()
    return sines


def quartiles(sines: torch.Tensor) -> torch.Tensor:
    """Return lower quartile, median and upper quartile over the runs."""
    return torch.quantile(sines, torch.tensor([0.25, 0.5, 0.75]), dim=-1)


rates = [0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0]
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8), sharey=True)
for label, step_size in (("FG-SGD", "theorem"), ("Riemannian SGD", "constant")):
    sines = torch.stack([sine_of_angle(step_size, lr) for lr in rates])
    low, middle, high = quartiles(sines[:, -1])
    best = int(middle.argmin())
    (line,) = right.semilogx(rates, middle, "o-", markersize=4, label=label)
    right.fill_between(rates, low, high, color=line.get_color(), alpha=0.2)
    low, middle, high = quartiles(sines[best])
    left.plot(middle, label=f"{label}, learning rate {rates[best]:g}")
    left.fill_between(range(len(middle)), low, high, color=line.get_color(), alpha=0.2)
left.set(title="On the way", xlabel="step", ylim=(0, 1.02))
left.set_ylabel("sine of the angle to the component")
left.legend(loc="lower left")
right.set(title=f"After {sines.shape[1]} steps", xlabel="first learning rate")

plt.show()
