"""
Norms of a network, before and after
====================================

``fgo_geo.report`` measures the norms of every group of weights, and computes from them the generalisation measures of
[Ozay2019]_, Table 1. This page reports on a residual network three times: as initialised, with its weights on
manifolds, and renormalised. :doc:`/guides/report` explains the pictures.
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
# A plain weight is one group, so there is one dot per layer. Frobenius and 2→1 norms grow with the width, and the
# spectral norms of the reshaped matrices stay near 2. With one group per layer the two forms of the measures agree.

before = report(plain, n_samples=50_000)
figure = before.plot("ResNet-18, plain")

# %%
# On manifolds
# ------------
#
# Next, PIO groups on spheres, oblique and Stiefel manifolds, at the radius that keeps the variance of the signal. A
# line spans the norms of a layer's groups, and its thick part covers the middle half of them. The kernels of a 3 x 3
# convolution form hundreds of small groups; ``constrain`` cuts 1 x 1 convolutions and the classifier into a few large
# blocks.
#
# The *group form* of the measures multiplies thousands of factors. If most factors are below one, the logarithm of the
# product is a large negative number. It shows how small the norms of the groups are. It is not a probability, and does
# not bound any norm of a layer. Compare it only between networks with the same groups.

constrained = copy.deepcopy(plain)
fgo_geo.constrain(constrained, "pio", ("sphere", "oblique", "stiefel"), include=[nn.Conv2d, nn.Linear])
after = report(constrained, n_samples=50_000)
figure = after.plot("ResNet-18, PIO")

# %%
# Renormalised
# ------------
#
# Renormalisation keeps all three norms of every group at most 1. The 2→1 norm is the largest of the three, so only this
# norm comes close to the bound.

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
# The *layer form* takes one group per layer, as the theorems do. You can compare it between all networks of the same
# shape.

for measure in (m for m in before.measures if m.scaling == "layers"):
    values = [each.measure(measure.name, "layers").value for each in (before, after, bounded)]
    print(f"{measure.name:<14}", *(f"{value:9.2f}" for value in values))
