r"""
Channel-directed gradients
==========================

A gradient before and after: what the three metrics of [Lao2020]_ do along the output channels of a layer. The tutorial
is :doc:`/guides/channel-directed`; the formulas are in :doc:`/mathematics`, section 7.
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
# Let the loss depend on a single output channel, number 5 of 32, so that the gradient is 1 there and 0 elsewhere. The
# sum over the channels is 1 in every panel: all metrics keep the mean.
#
# * ``h0`` gives a share of it to all channels alike and damps the rest by :math:`1/\lambda`.
# * ``h1`` hands it to the *neighbours*: the response decays like :math:`e^{-|i|/\ell}` over about
#   :math:`\ell \approx \sqrt\lambda` channels.
# * ``h1t`` spreads it over the whole axis, as a parabola with a kink; some channels move against the gradient.
#
# With periodic ends the last channel is a neighbour of the first. With free ends what would leave over the
# end is reflected.

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
# Now a slow variation over the channels, with noise on top. ``h0`` shrinks both towards the mean; it
# doesn't know the order of the channels. ``h1`` takes the noise away and leaves what varies slowly. ``h1t`` does so
# too, but with :math:`\lambda` below :math:`(D / 2\pi)^2 = 104` it *amplifies* the slowest waves of a ring of
# :math:`D = 64` channels, here by a factor of 2.6: choose its :math:`\lambda` by the number of channels, or a
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
# for ``h0``, ``h1`` and ``h1t`` (:math:`k \ge 1`; the mean, :math:`k = 0`, is kept). For large :math:`\lambda` or many
# periods, ``h1`` and ``h1t`` agree.

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
# The gradient of a convolution with 32 output and 16 input channels, from a batch of digits, each panel with a colour
# scale of its own. Rows are output channels, columns the 144 weights of each. Channels of a network come in no
# particular order, so neighbours don't agree at first. That each column is smooth afterwards, with its mean unchanged,
# is what the metric asks for.

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
# In training an optimiser sees the directed gradient at every step:

optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
handle = fgo_geo.channel_directed(optimizer, metric="h1", lam=4.0, module=network)
print(handle.summary())
