r"""
Networks with a certified Lipschitz constant
============================================

A matrix in the ball :math:`\| W \|_2 \le r` multiplies the distance of two points by at most :math:`r`. ReLU does not
increase distances. A network of such matrices and ReLUs therefore has a Lipschitz constant of at most the product of
the radii, for all inputs. The kind ``"spectral_ball"`` keeps weights in the ball, under any optimiser. This page trains
such a network, certifies its answers, and attacks the certificates.
"""

import math

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
# Training in balls
# -----------------
#
# The data are handwritten digits with pixels between 0 and 1. The network has three matrices, each in the ball of
# spectral norm one, so it is 1-Lipschitz, and the margin of an answer bounds how far the image is from one with another
# answer. The loss therefore asks for a margin. A second network has the same loss and no constraint.

digits = load_digits()
images = torch.tensor(digits.data / 16, dtype=torch.float32)
labels = torch.tensor(digits.target)
order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
train, test = order[:1400], order[1400:]


def trained(is_constrained: bool, epochs: int = 20) -> nn.Sequential:
    """A network, with its weights in balls or free."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)]
        model = nn.Sequential(*layers)
    if is_constrained:
        fgo_geo.constrain(model, "layer", "spectral_ball", radius=1.0, first_layer=True, classifier=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    if is_constrained:
        fgo_geo.on_manifolds(optimizer, step_size="constant")
    generator = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        for batch in train[torch.randperm(len(train), generator=generator)].split(50):
            loss = nn.functional.multi_margin_loss(model(images[batch]), labels[batch], margin=0.3)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.requires_grad_(False)


def lipschitz(model: nn.Sequential) -> float:
    """The product of the spectral norms of all matrices: an upper bound on the Lipschitz constant."""
    norms = [torch.linalg.matrix_norm(layer.weight.double(), 2) for layer in model if isinstance(layer, nn.Linear)]
    return math.prod(float(norm) for norm in norms)


models = {"in balls": trained(True), "free": trained(False)}

# %%
# Certificates
# ------------
#
# If the network is :math:`L`-Lipschitz, the difference of two of its outputs is :math:`\sqrt 2 L`-Lipschitz. If the
# output of an image's label exceeds all others by :math:`m`, every image within :math:`m / (\sqrt 2 L)` gets the same
# label.


def margins(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """By how much the output of the label exceeds the largest of the others."""
    outputs = model(x)
    own = outputs.gather(1, y[:, None]).squeeze(1)
    return own - outputs.scatter(1, y[:, None], -math.inf).amax(1)


x, y = images[test], labels[test]
radii = {name: margins(model, x, y).clamp(min=0) / (2**0.5 * lipschitz(model)) for name, model in models.items()}
for name, model in models.items():
    accuracy = float((margins(model, x, y) > 0).double().mean())
    print(
        f"{name:9} certified constant {lipschitz(model):6.2f}  test accuracy {accuracy:.1%}  "
        f"certified at distance 0.1: {float((radii[name] > 0.1).double().mean()):.1%}"
    )

# %%
# The attack
# ----------
#
# The attack starts at eight random points within a given distance of an image, and descends on the margin to find a
# point with another label. No image may lose its label within its certified radius. The figure shows the share of test
# images that are certified, and the share that survive a shorter attack. The share that no attack can change lies
# between the two curves.


def attacked(model: nn.Module, distance: Tensor, steps: int = 30, starts: int = 8) -> Tensor:
    """The smallest margin that descent finds within a distance of every image."""
    generator = torch.Generator().manual_seed(1)
    worst = margins(model, x, y)
    for _ in range(starts):
        shift = torch.randn(x.shape, generator=generator)
        shift = shift / shift.norm(dim=1, keepdim=True) * distance[:, None]
        for _ in range(steps):
            shift.requires_grad_(True)
            (slope,) = torch.autograd.grad(margins(model, x + shift, y).sum(), shift)
            with torch.no_grad():
                shift = shift - 0.25 * distance[:, None] * slope / slope.norm(dim=1, keepdim=True).clamp(min=1e-12)
                shift = shift * (distance[:, None] / shift.norm(dim=1, keepdim=True)).clamp(max=1)
                worst = torch.minimum(worst, margins(model, x + shift, y))
    return worst


for name, model in models.items():
    is_certified = radii[name] > 0
    broken = attacked(model, 0.999 * radii[name])[is_certified] <= 0
    print(f"{name:9} {int(is_certified.sum())} certificates, {int(broken.sum())} broken by the attack")
    assert not broken.any()

distances = torch.linspace(0, 1.2, 9)
figure, ax = plt.subplots(figsize=(5.5, 3.8))
for number, (name, model) in enumerate(models.items()):
    certified = [float((radii[name] > d).double().mean()) for d in distances]
    survive = [float((attacked(model, d.expand(len(x)), 10, 1) > 0).double().mean()) for d in distances]
    ax.plot(distances, survive, "--", color=f"C{number}", label=f"{name}, survive the attack")
    ax.plot(distances, certified, color=f"C{number}", label=f"{name}, certified")
ax.set(xlabel="distance in the space of images", ylabel="share of test images")
ax.legend(loc="lower left", fontsize="small")

# %%
# Power iteration with the derivative at every test image finds the direction that the network stretches most. The
# largest factor is a lower bound on the Lipschitz constant.


def stretching(model: nn.Module, steps: int = 20) -> float:
    """The largest singular value of the derivative at any test image."""
    with torch.random.fork_rng():
        torch.manual_seed(2)
        u = torch.randn(len(x), 64)
    for _ in range(steps):
        u = u / u.norm(dim=1, keepdim=True)
        _, image = torch.func.jvp(model, (x,), (u,))
        _, pull = torch.func.vjp(model, x)
        u = pull(image)[0]
    return float(image.norm(dim=1).max())


for name, model in models.items():
    print(f"{name:9} stretches some direction by {stretching(model):.2f}; certified {lipschitz(model):.2f}")
    assert stretching(model) <= lipschitz(model) * (1 + 1e-5)
