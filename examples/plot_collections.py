"""Collections of groups: PI, PO, PIO, layer
=========================================

A convolution with 4 input and 6 output channels has 24 kernels. Which of them share a manifold kind
and a step size? That is what a *collection* says: it parts the grid of kernels into *groups*. This
page draws the collections of Figure 2 of [Ozay2019]_, with the example that the paper computes by
hand, and the ones that ``fgo_geo.constrain`` makes for linear layers.

In each picture a row is an output channel, a column an input channel, and a cell the kernel between
the two. The colour is the manifold kind of the kernel, and the number is the number of its group:
kernels with the same number are stepped together, with one step size.
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
# **PI** (*for input channels*) takes one input channel after the other. The 6 kernels that read the
# channel are split into as many shares as there are kinds, here two of 3 kernels each, and every
# share is one group: 4 x 2 = 8 groups.
#
# **PO** (*for output channels*) exchanges the roles. The 4 kernels that write an output channel are
# split into two shares of 2 kernels: 6 x 2 = 12 groups.

draw(collection(6, 4, "pi", kinds), collection(6, 4, "po", kinds))

# %%
# PIO: half and half
# ------------------
#
# **PIO** (*for input and output channels*) groups one half of the input channels by output channel:
# the kernels of a row are one group, and the kinds share the 6 groups. The other half is
# grouped as in PI. This is Example 1 of the paper: 10 groups, 5 of each kind, and of each kind 3 groups
# of 2 kernels and 2 groups of 3 kernels.
#
# **Layer** is the classical way to constrain a network: one group, one manifold, one step size.

draw(collection(6, 4, "layer", "stiefel"), collection(6, 4, "pio", kinds))

# %%
# Random selection
# ----------------
#
# So far shares and halves were taken in the order of the channels. A random selection samples them
# without replacement: the half of the input channels that is grouped by output channel, and the
# members of every share. The numbers and sizes of the groups stay the same. The draw depends on the seed
# and the layer's name alone, and is the same on every machine.

draw(
    collection(6, 4, "pi", kinds, "random", seed=4),
    collection(6, 4, "po", kinds, "random", seed=4),
    collection(6, 4, "pio", kinds, "random", seed=4),
)

# %%
# Shares that don't come out even
# -------------------------------
#
# Shares of a channel differ by one kernel at most. Where the kinds don't divide the number of kernels,
# they take turns in getting the extra ones, so that the layer as a whole is balanced too. This
# matters most in a depthwise convolution, where an output channel has a single kernel: the kinds
# alternate.

all_kinds = ("sphere", "oblique", "stiefel", "euclidean")
draw(collection(6, 5, "po", all_kinds), collection(8, 1, "po", all_kinds))

# %%
# Blocks of a matrix
# ------------------
#
# The weight of a linear layer or of a 1 x 1 convolution is a matrix, and its single entries would make
# poor manifolds. Here the strategies cut the matrix itself: PI by columns, PO by rows, and PIO one half
# of the rows by rows and the other by columns. Each group is one block, which lies on one manifold as
# a whole.

draw(*(collection(8, 6, strategy, kinds, components="block") for strategy in ("pi", "po", "pio")))

# %%
# Reading a collection
# --------------------
#
# The groups are a sequence. Each knows its manifold kind and its (output, input) channel pairs.

example = collection(6, 4, "pio", kinds)
for group in example.groups[5:7]:
    print(group.manifold, group.index.tolist())
