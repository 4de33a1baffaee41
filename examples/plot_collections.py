"""Collections of groups: PI, PO, PIO, layer
=========================================

A convolution with 4 input and 6 output channels has 24 kernels. A *collection* divides them into
*groups*. The kernels of a group share a manifold kind and a step size. This page draws the
collections of Figure 2 of [Ozay2019]_, including the worked example of the paper, and the
collections that ``fgo_geo.constrain`` makes for linear layers.

In each picture a row is an output channel, a column is an input channel, and a cell is the kernel
between the two. The colour shows the manifold kind of the kernel, and the number is that of its
group: the optimiser steps kernels with the same number together, with one step size.
"""

from matplotlib import pyplot as plt

from fgo_geo.grouping import collection

kinds = ("sphere", "stiefel")


def draw(*collections):
    _, axes = plt.subplots(1, len(collections), figsize=(4.5 * len(collections), 4), layout="constrained")
    for made, ax in zip(collections, axes, strict=True):
        made.plot(ax)
        print(made)
    for ax in axes[:-1]:
        ax.get_legend().remove()


# %%
# PI and PO: one channel at a time
# --------------------------------
#
# **PI** (*for input channels*) treats each input channel separately. It splits the 6 kernels that
# read a channel into as many shares as there are kinds, here into two shares of 3 kernels. Every
# share is one group, so there are 4 x 2 = 8 groups.
#
# **PO** (*for output channels*) exchanges the roles. It splits the 4 kernels that write an output
# channel into two shares of 2 kernels, which makes 6 x 2 = 12 groups.

draw(collection(6, 4, "pi", kinds), collection(6, 4, "po", kinds))

# %%
# PIO: half and half
# ------------------
#
# **PIO** (*for input and output channels*) groups one half of the input channels by output channel:
# the kernels of a row are one group, and the 6 groups are divided between the kinds. It groups the
# other half as PI does. The picture is Example 1 of the paper. Of its 10 groups, each kind has 5: 3
# groups of 2 kernels and 2 groups of 3 kernels.
#
# **Layer** is the classical way to constrain a network: one group, one manifold, one step size.

draw(collection(6, 4, "layer", "stiefel"), collection(6, 4, "pio", kinds))

# %%
# Random selection
# ----------------
#
# The pictures above take shares and halves in the order of the channels. A random selection samples
# them without replacement: the half of the input channels that PIO groups by output channel, and the
# members of every share. The numbers and sizes of the groups stay the same. The draw depends only on
# the seed and the layer's name, and is the same on every machine.

draw(
    collection(6, 4, "pi", kinds, "random", seed=4),
    collection(6, 4, "po", kinds, "random", seed=4),
    collection(6, 4, "pio", kinds, "random", seed=4),
)

# %%
# Uneven shares
# -------------
#
# The shares of a channel differ by at most one kernel. If the number of kernels is not a multiple of the
# number of kinds, the kinds take turns in getting the extra kernels, so the layer as a whole is
# balanced, too. This matters most in a depthwise convolution, where each output channel has a single
# kernel: the kinds alternate.

all_kinds = ("sphere", "oblique", "stiefel", "euclidean")
draw(collection(6, 5, "po", all_kinds), collection(8, 1, "po", all_kinds))

# %%
# Blocks of a matrix
# ------------------
#
# The weight of a linear layer or of a 1 x 1 convolution is a matrix of numbers, and a manifold for a
# single number would be pointless. The strategies therefore cut the matrix itself: PI by columns, PO
# by rows, and PIO one half of the rows by rows and the other half by columns. Each group is one
# block, and the whole block lies on one manifold.

draw(*(collection(8, 6, strategy, kinds, components="block") for strategy in ("pi", "po", "pio")))

# %%
# Reading a collection
# --------------------
#
# ``groups`` is a sequence. Each group has its manifold kind and its (output, input) channel pairs.

example = collection(6, 4, "pio", kinds)
for group in example.groups[5:7]:
    print(group.manifold, group.index.tolist())
