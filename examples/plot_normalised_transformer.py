r"""
A normalised transformer
========================

In a normalised transformer the rows of all matrices lie on spheres. The weights of a neuron are then a direction, and
training only rotates it. ``components="filter"`` makes every row a component, and :func:`fgo_geo.on_manifolds` lets
AdamW rotate the rows. This page trains a small language model of characters with and without spheres, on a text that
comes with Python.
"""

from pydoc_data.topics import topics

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn

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
# Text and model
# --------------
#
# The text comes from Python's ``help()``. Every tenth part of it is for validation. The model has two blocks.
# Each consists of attention and a feed-forward part of twice the width, and both parts begin with a normalisation
# without parameters.

text = "".join(topics[name] for name in sorted(topics))[:400_000]
letters = sorted(set(text))
codes = torch.tensor([letters.index(letter) for letter in text])
parts = codes[: len(codes) // 1000 * 1000].reshape(-1, 1000)
is_held_out = torch.arange(len(parts)) % 10 == 9
training, validation = parts[~is_held_out].flatten(), parts[is_held_out].flatten()
CONTEXT, WIDTH, HEADS, BATCH, STEPS = 32, 48, 4, 16, 240


class Block(nn.Module):
    """Causal attention, then a layer of twice the width."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.gather = nn.Linear(WIDTH, WIDTH, bias=False)
        self.up = nn.Linear(WIDTH, 2 * WIDTH, bias=False)
        self.down = nn.Linear(2 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.project(_normalised(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        seen = nn.functional.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.gather(seen.transpose(1, 2).flatten(2))
        return x + self.down(self.up(_normalised(x)).relu())


def _normalised(x: Tensor) -> Tensor:
    return nn.functional.rms_norm(x, (WIDTH,))


class Model(nn.Module):
    """Characters to scores of the next one."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(len(letters), WIDTH)
        self.places = nn.Parameter(0.02 * torch.randn(CONTEXT, WIDTH))
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Linear(WIDTH, len(letters), bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(_normalised(self.blocks(self.table(x) + self.places)))


def loss_of(model: nn.Module, source: Tensor, generator: torch.Generator, count: int) -> Tensor:
    """The cross-entropy per character of some passages."""
    starts = torch.randint(len(source) - CONTEXT - 1, (count, 1), generator=generator)
    passages = source[starts + torch.arange(CONTEXT + 1)]
    return nn.functional.cross_entropy(model(passages[:, :-1]).flatten(0, 1), passages[:, 1:].flatten())


# %%
# Two ways of training
# --------------------
#
# Both ways use AdamW with a learning rate that falls to zero, and each takes the best of three learning rates. The
# radius of the spheres keeps the length of signals (``radius="kaiming"``, the default). Token and position embeddings
# stay free.


def train(on_spheres: bool, lr: float) -> tuple[float, dict[int, float]]:
    """The validation loss, and the mean angle per step of the blocks' matrices, by step."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Model()
    if on_spheres:
        fgo_geo.constrain(model, "po", "sphere", components="filter", first_layer=True, classifier=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0 if on_spheres else 0.1)
    if on_spheres:
        fgo_geo.on_manifolds(optimizer, step_size="constant")
    watched = fgo_geo.telemetry(optimizer, model, every=5)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / 20, 1 - step / STEPS))
    generator, angles = torch.Generator().manual_seed(1), {}
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, training, generator, BATCH).backward()
        optimizer.step()
        scheduler.step()
        if step % 20 == 19:
            own = [value for name, value in watched.scalars().items() if name.startswith("angle/blocks")]
            angles[step + 1] = sum(own) / len(own)
    if on_spheres:
        rows = [p for p in model.parameters() if hasattr(p, "manifold")]
        assert max(float(p.manifold.violation(p.detach()).max()) for p in rows) < 1e-5
    with torch.no_grad():
        return float(loss_of(model, validation, torch.Generator().manual_seed(2), 256)), angles


figure, ax = plt.subplots(figsize=(5.5, 3.8))
for name, on_spheres, rates in (("free", False, (0.003, 0.01, 0.03)), ("rows on spheres", True, (0.01, 0.03, 0.1))):
    runs = {lr: train(on_spheres, lr) for lr in rates}
    best = min(rates, key=lambda lr: runs[lr][0])
    losses = ", ".join(f"{loss:.3f} at {lr:g}" for lr, (loss, _) in runs.items())
    print(f"{name:16} validation loss per character: {losses}")
    ax.plot(*zip(*runs[best][1].items(), strict=True), "o-", label=f"{name}, lr {best:g}")
ax.set(xlabel="step", ylabel="mean angle per step (radians)", ylim=(0, None))
ax.legend()

# %%
# The angles, measured by :func:`fgo_geo.telemetry`, are the effective learning rates. The two ways were tuned
# separately, to learning rates of 0.01 and 0.03, and yet both turn the matrices by nearly the same angles at every
# step. The losses come from one seed and a short training, and the learning rates were chosen on the passages that the
# losses are reported for. They show that both ways work, and do not rank them.
