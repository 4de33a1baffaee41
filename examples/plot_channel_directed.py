r"""
Channel-directed gradients
==========================

These figures show a gradient before and after it is smoothed along the output channels of a layer, with each of the
three metrics of [Lao2020]_. The guide is :doc:`/guides/channel-directed`; :doc:`/mathematics`, section 7, has the
formulas.
"""

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn

import fgo_geo

torch.manual_seed(0)
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
METRICS = {"h0": 4.0, "h1": 4.0, "h1t": 40.0}  # with their λ

# %%
# One channel
# -----------
#
# Let the loss depend on a single output channel, number 5 of 32. The gradient is then 1 in this channel and 0 in all
# others. All metrics keep the mean, so the sum over the channels is 1 in every panel.
#
# * ``h0`` gives all channels an equal share and damps the difference from the mean by :math:`1/\lambda`.
# * ``h1`` passes the gradient to the *neighbours*: the response decays like :math:`e^{-|i|/\ell}` over about
#   :math:`\ell \approx \sqrt\lambda` channels.
# * ``h1t`` spreads the gradient over the whole axis, as a parabola with a kink; some channels move against it.
#
# With periodic ends the last channel is a neighbour of the first. Free ends reflect the response instead.

spike = torch.zeros(32)
spike[5] = 1.0

figure, axes = plt.subplots(1, 3, figsize=(10, 3), sharex=True)
for ax, (metric, lam) in zip(axes, METRICS.items(), strict=True):
    for ends, style in (("periodic", "-"), ("free", "--")):
        response = fgo_geo.channel_directed_gradient(spike, metric, lam, ends=ends)
        ax.plot(response, style, marker=".", label=ends)
    ax.set(title=f"{metric}, $\\lambda = {lam:g}$", xlabel="output channel")
axes[0].legend()

# %%
# A noisy gradient
# ----------------
#
# Next, a gradient that varies slowly over the channels, with noise added. ``h0`` shrinks both parts towards the mean,
# because it does not use the order of the channels. ``h1`` removes the noise and keeps the slow variation. So does
# ``h1t``, but with :math:`\lambda` below :math:`(D / 2\pi)^2 = 104` it *amplifies* the slowest waves of a ring of
# :math:`D = 64` channels, here by a factor of 2.6. Choose its :math:`\lambda` by the number of channels, or take a
# smaller learning rate.

channel = torch.arange(64)
slow = 0.5 + torch.sin(2 * torch.pi * channel / 64)
noisy = slow + 0.7 * torch.randn(64)

figure, axes = plt.subplots(1, 3, figsize=(10, 3), sharex=True, sharey=True)
for ax, (metric, lam) in zip(axes, METRICS.items(), strict=True):
    ax.plot(channel, noisy, color="0.75", label="gradient")
    ax.plot(channel, fgo_geo.channel_directed_gradient(noisy, metric, lam), label="directed")
    ax.plot(channel, slow, ":", color="black", label="without noise")
    ax.set(title=f"{metric}, $\\lambda = {lam:g}$", xlabel="output channel")
axes[0].legend()

# %%
# What happens to each frequency
# ------------------------------
#
# A wave of :math:`k` periods along :math:`D` channels with periodic ends keeps its shape and is multiplied by
#
# .. math::
#    \frac1\lambda, \qquad \frac{1}{1 + 4 \lambda \sin^2(\pi k / D)}, \qquad \frac{1}{4 \lambda \sin^2(\pi k / D)}
#
# for ``h0``, ``h1`` and ``h1t`` (:math:`k \ge 1`; all three keep the mean, :math:`k = 0`). ``h1`` and ``h1t`` agree for
# large :math:`\lambda` and for many periods.

figure, ax = plt.subplots(figsize=(5, 3.2))
frequencies = torch.arange(1, 33)
for metric, lam in METRICS.items():
    waves = torch.cos(2 * torch.pi * frequencies[None, :] * channel[:, None] / 64)
    gain = fgo_geo.channel_directed_gradient(waves, metric, lam)[0] / waves[0]
    ax.loglog(frequencies, gain, marker=".", label=f"{metric}, $\\lambda = {lam:g}$")
ax.axhline(1, color="0.5", linewidth=1)
ax.set(xlabel="periods over 64 channels", ylabel="factor")
ax.legend()

# %%
# A convolution
# -------------
#
# The last figure shows the gradient of a convolution with 32 output and 16 input channels, from a batch of digits. Rows
# are output channels, columns are the 144 weights of each, and every panel has its own colour scale. The channels of a
# network have no particular order, so neighbours differ at first. Afterwards ``h1`` and ``h1t`` have made each column
# smooth and kept its mean.

digits = load_digits()
images = torch.tensor(digits.images[:256], dtype=torch.float32).unsqueeze(1) / 16
labels = torch.tensor(digits.target[:256])
network = nn.Sequential(
    nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10)
)
nn.functional.cross_entropy(network(images), labels).backward()
gradient = network[2].weight.grad

shown = {"gradient": gradient}
for metric, lam in METRICS.items():
    shown[f"{metric}, $\\lambda = {lam:g}$"] = fgo_geo.channel_directed_gradient(gradient, metric, lam)
figure, axes = plt.subplots(4, 1, figsize=(9, 7), sharex=True)
for ax, (title, tensor) in zip(axes, shown.items(), strict=True):
    largest = tensor.abs().max()
    image = ax.imshow(tensor.flatten(1), cmap="RdBu_r", vmin=-largest, vmax=largest, aspect="auto")
    ax.set(title=title, ylabel="output channel")
    ax.grid(visible=False)
    figure.colorbar(image, ax=ax)
axes[-1].set_xlabel("input channel and place in the kernel")

# %%
# In training, ``channel_directed`` hands the directed gradient to the optimiser at every step:

optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
handle = fgo_geo.channel_directed(optimizer, metric="h1", lam=4.0, module=network)
print(handle.summary())
