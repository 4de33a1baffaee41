"""
Norms of a network, before and after
====================================

``fgo_geo.report`` measures the norms of every group of weights, and sums them up in the generalisation measures of
[Ozay2019]_, Table 1. Here is a residual network as it is initialised, then with its kernels on manifolds, then
renormalised. :doc:`/guides/report` says how to read the pictures.
"""

import copy

import torch
from torch import nn
from torchvision.models import resnet18

import fgo_geo
from fgo_geo.measures.report import report
from fgo_geo.models.renormalize import renormalize

torch.manual_seed(0)
plain = resnet18(num_classes=10)

# %%
# As initialised
# --------------
#
# A plain weight is one group, so there is one dot per layer. Frobenius and 2→1 norms grow with the width; the spectral
# norms of the reshaped matrices stay near 2. The two scalings of the measures agree, because there is one
# group per layer.

before = report(plain, n_samples=50_000)
figure = before.plot("ResNet-18, plain")

# %%
# On manifolds
# ------------
#
# PIO groups of kernels on spheres, oblique and Stiefel manifolds, at the radius that keeps the variance of the signal.
# A line spans the norms of a layer's groups, its thick part the middle half. Kernels of 3 x 3 convolutions
# form hundreds of small groups; 1 x 1 convolutions and the classifier are cut into a few large blocks.
#
# The measures over all groups multiply thousands of factors. Where most are below one the logarithm of the
# product is a large negative number: it says how small the groups' norms are, and no probability. Compare it among
# networks with the same groups only: this *group form* bounds no norm of a layer.

constrained = copy.deepcopy(plain)
fgo_geo.constrain(constrained, "pio", ("sphere", "oblique", "stiefel"), include=[nn.Conv2d, nn.Linear])
after = report(constrained, n_samples=50_000)
figure = after.plot("ResNet-18, PIO")

# %%
# Renormalised
# ------------
#
# Renormalisation bounds all three norms of every group by 1. The 2→1 norm is the largest of the three, so it is the one
# that comes close to the bound.

renormalised = copy.deepcopy(plain)
for layer in list(renormalised.modules()):
    if isinstance(layer, (nn.Conv2d, nn.Linear)):
        renormalize(layer, manifold=("sphere", "oblique", "stiefel"), groups="pio")
bounded = report(renormalised, n_samples=50_000)
figure = bounded.plot("ResNet-18, renormalised")

# %%
# Side by side
# ------------
#
# The *layer form* takes one group per layer, as the theorems do. It can be compared among all networks of
# the same shape.

for measure in (m for m in before.measures if m.scaling == "layers"):
    values = [each.measure(measure.name, "layers").value for each in (before, after, bounded)]
    print(f"{measure.name:<14}", *(f"{value:9.2f}" for value in values))
