r"""
Low-rank adaptation on Stiefel manifolds
========================================

Low-rank adaptation (LoRA) freezes a trained matrix :math:`W` and learns :math:`W + s B A` with thin matrices :math:`B`
and :math:`A`. Free factors are redundant, because :math:`B M` and :math:`M^{-1} A` give the same update, and the update
may have a lower rank in effect. If :math:`B` has orthonormal columns and :math:`A` orthonormal rows (both on Stiefel
manifolds), all directions of the update have the same weight, and one number :math:`s` per layer is its size. This page
adapts a small network to another task both ways.
"""

import geoopt
import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
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
# A frozen network
# ----------------
#
# The network classifies handwritten digits. The new task has the same digits with shuffled pixels, which the frozen
# network cannot read.

digits = load_digits()
images = torch.tensor(digits.data / 8 - 1, dtype=torch.float32)
labels = torch.tensor(digits.target)
order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
train, test = order[:1400], order[1400:]
shuffled = images[:, torch.randperm(64, generator=torch.Generator().manual_seed(5))]


def fit(model: nn.Module, x: Tensor, optimizer: torch.optim.Optimizer, epochs: int) -> float:
    """Train; return the accuracy on test images."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        for batch in train[torch.randperm(len(train), generator=generator)].split(50):
            loss = nn.functional.cross_entropy(model(x[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return accuracy(model, x)


def accuracy(model: nn.Module, x: Tensor) -> float:
    """Share of right answers on test images."""
    with torch.no_grad():
        return float((model(x[test]).argmax(1) == labels[test]).double().mean())


with torch.random.fork_rng():
    torch.manual_seed(0)
    layers = [nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 96), nn.ReLU(), nn.Linear(96, 10)]
    frozen = nn.Sequential(*layers)
trained = fit(frozen, images, torch.optim.AdamW(frozen.parameters(), lr=3e-3), 8)
frozen.requires_grad_(False)
print(f"frozen network: {trained:.1%} on digits, {accuracy(frozen, shuffled):.1%} on shuffled ones")

# %%
# Factors, free or on Stiefel manifolds
# -------------------------------------
#
# Free factors start as usual, with :math:`B = 0`. On Stiefel manifolds :math:`s` starts at zero instead. AdamW trains
# both; :func:`fgo_geo.on_manifolds` keeps the factors on their manifolds and leaves :math:`s` to AdamW.

RANK = 8


class Adapted(nn.Module):
    """A frozen linear layer plus ``s B A``."""

    def __init__(self, layer: nn.Linear, on_stiefel: bool) -> None:
        super().__init__()
        self.layer = layer
        out, into = layer.weight.shape
        if on_stiefel:
            stiefel = fgo_geo.Stiefel()
            self.b = geoopt.ManifoldParameter(stiefel.random(out, RANK))
            self.a = geoopt.ManifoldParameter(stiefel.random(into, RANK))
            self.scale = nn.Parameter(torch.zeros(()))
        else:
            self.b = nn.Parameter(torch.zeros(out, RANK))
            self.a = nn.Parameter(torch.randn(into, RANK) / into**0.5)
            self.scale = nn.Parameter(torch.ones(()), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.scale * (x @ self.a) @ self.b.mT

    def update(self) -> Tensor:
        """The matrix that is added to the frozen one."""
        return (self.scale * self.b @ self.a.mT).detach().as_subclass(Tensor)


def adapted(on_stiefel: bool, lr: float, epochs: int = 12) -> tuple[float, nn.Sequential]:
    """Accuracy on the new task, and the network."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        new = [Adapted(m, on_stiefel) if isinstance(m, nn.Linear) and m.out_features > 10 else m for m in frozen]
    model = nn.Sequential(*new)
    learned = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=lr, weight_decay=0.0)
    if on_stiefel:
        fgo_geo.on_manifolds(optimizer, step_size="constant")
    return fit(model, shuffled, optimizer, epochs), model


rates = (0.003, 0.01, 0.03)
figure, axes = plt.subplots(1, 2, figsize=(7.5, 3.6), sharey=True)
for number, (name, on_stiefel) in enumerate({"free factors": False, "factors on Stiefel": True}.items()):
    runs = {lr: adapted(on_stiefel, lr) for lr in rates}
    best = max(rates, key=lambda lr: runs[lr][0])
    reached, model = runs[best]
    learned = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"{name}: {reached:.1%} on shuffled digits (lr {best:g}), {learned:,} learned numbers")
    for ax, layer in zip(axes, [m for m in model if isinstance(m, Adapted)], strict=True):
        values = torch.linalg.svdvals(layer.update())[:RANK]
        ax.plot(range(1, RANK + 1), values / values[0], "o-", color=f"C{number}", label=name)
        if on_stiefel:
            assert float((values / values[0] - 1).abs().max()) < 1e-4
            assert float(layer.b.manifold.violation(layer.b.detach())) < 1e-5
for ax, title in zip(axes, ("first layer", "second layer"), strict=True):
    ax.set(xlabel="number", title=title, ylim=(0, 1.05))
axes[0].set_ylabel("singular value of the update / largest")
axes[1].legend(loc="lower left")

# %%
# With free factors the singular values of the update fall to less than a tenth of the largest one. On Stiefel
# manifolds all are equal by construction: the update has full rank, and :math:`s` is its spectral norm. This constraint
# costs some accuracy here; free factors learn an update with unequal directions. Each way took the best of three
# learning rates on the test images, so the accuracies only compare the two ways. They are no estimates for new images.
