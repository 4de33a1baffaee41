r"""
Muon-like steps on Stiefel manifolds
====================================

Muon steps along an orthogonal matrix, the polar factor of its momentum. If the weights are orthogonal too, the step
needs two additions: a projection of the direction onto the tangent space, and a retraction back to the manifold.
:func:`fgo_geo.on_manifolds` adds both to any optimiser. Here it turns an optimiser of fifteen lines, without support
for manifolds, into one for Stiefel manifolds.
"""

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
# An optimiser of orthogonal steps
# --------------------------------
#
# The optimiser keeps a momentum and computes its polar factor by a singular value decomposition. ``torch.optim.Muon``,
# new in torch 2.9, computes the polar factor faster; :func:`~fgo_geo.on_manifolds` accepts it as well.


class OrthogonalSteps(torch.optim.Optimizer):
    """Step along the polar factor of the momentum."""

    def __init__(self, params, lr: float, momentum: float = 0.9) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                buffer = self.state[param].setdefault("momentum", torch.zeros_like(param.grad))
                buffer.mul_(group["momentum"]).add_(param.grad)
                u, _, vh = torch.linalg.svd(buffer, full_matrices=False)
                param.add_(u @ vh, alpha=-group["lr"])


# %%
# A network of orthogonal matrices
# --------------------------------
#
# Every matrix of this classifier of handwritten digits is a point on a Stiefel manifold. The radius makes signals keep
# their length through ReLU. A learned factor sets the scale of the outputs.

digits = load_digits()
images = torch.tensor(digits.data / 8 - 1, dtype=torch.float32)
labels = torch.tensor(digits.target)
order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
train, test = order[:1400], order[1400:]


class Net(nn.Module):
    """Three matrices, and a factor for the outputs."""

    def __init__(self) -> None:
        super().__init__()
        sizes = ((64, 64), (64, 64), (64, 10))
        self.layers = nn.ModuleList([nn.Linear(a, b, bias=False) for a, b in sizes])
        self.factor = nn.Parameter(torch.tensor(3.0))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = layer(x).relu()
        return self.factor * self.layers[-1](x)


def run(build, lr: float, epochs: int = 10) -> tuple[list[float], float, float]:
    """Train; return the losses of the epochs, the accuracy on test images, and the largest distance from Stiefel."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = Net()
    plan = fgo_geo.constrain(model, "layer", "stiefel", radius=2**0.5, first_layer=True, classifier=True)
    optimizer = build(list(plan.parameters().values()), lr)
    fgo_geo.on_manifolds(optimizer, step_size="constant")
    of_factor = torch.optim.SGD([model.factor], lr=0.05)
    generator, losses = torch.Generator().manual_seed(0), []
    for _ in range(epochs):
        total = 0.0
        for batch in train[torch.randperm(len(train), generator=generator)].split(50):
            loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
            model.zero_grad()
            loss.backward()
            optimizer.step()
            of_factor.step()
            total += float(loss.detach()) * len(batch)
        losses.append(total / len(train))
    accuracy = float((model(images[test]).argmax(1) == labels[test]).double().mean())
    off = max(float(p.manifold.violation(p.detach()).max()) for p in plan.parameters().values())
    return losses, accuracy, off


builders = {
    "orthogonal steps": (OrthogonalSteps, (0.003, 0.01, 0.03)),
    "AdamW": (lambda params, lr: torch.optim.AdamW(params, lr=lr), (0.003, 0.01, 0.03)),
    "SGD, momentum": (lambda params, lr: torch.optim.SGD(params, lr=lr, momentum=0.9), (0.01, 0.03, 0.1)),
}
figure, ax = plt.subplots(figsize=(5.5, 3.8))
for name, (build, rates) in builders.items():
    runs = {lr: run(build, lr) for lr in rates}
    best = min(rates, key=lambda lr: runs[lr][0][-1])
    losses, accuracy, off = runs[best]
    ax.semilogy(range(1, len(losses) + 1), losses, label=f"{name}, lr {best:g}")
    print(f"{name:16}  lr {best:<5g}  test accuracy {accuracy:.1%}  largest distance from Stiefel {off:.0e}")
ax.set(xlabel="epoch", ylabel="training loss")
ax.legend()

# %%
# All three optimisers keep the weights on their manifolds up to rounding. The figure shows the learning rate of three
# with the lowest training loss. Muon's orthogonal steps move all singular directions of a weight equally.
# :func:`~fgo_geo.on_manifolds` removes the normal part of a step, so a step on the manifold is no longer exactly
# orthogonal.
