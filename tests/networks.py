"""Small networks to constrain, and what is asked of them afterwards."""

from __future__ import annotations

import io
from typing import Any

import torch
from torch import Tensor, nn

from fgo_geo import Plan, RiemannianFGSGD, constrain


class Net(nn.Module):
    """One layer of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.conv = nn.Conv2d(4, 6, (2, 3), padding=1)
        self.depthwise = nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False)
        self.up = nn.ConvTranspose2d(6, 8, 2, groups=2)
        self.point = nn.Conv2d(8, 8, 1, groups=2)
        self.block = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8))
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.table = nn.Embedding(5, 8)
        self.tokens = nn.Parameter(torch.zeros(1, 1, 8))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(self.conv(self.bn(self.stem(x))).relu())
        x = self.point(self.up(x)).relu().flatten(2).mT
        x = x + self.tokens + self.table.weight.mean(0)
        x = self.block(x)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head(x.mean(1))


CONSTRAINED = [
    "conv.weight",
    "depthwise.weight",
    "up.weight",
    "point.weight",
    "block.0.weight",
    "block.2.weight",
    "attention.in_proj_weight",
    "attention.out_proj.weight",
]


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net()


def images(n: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(n, 3, 5, 5, generator=torch.Generator().manual_seed(seed))


def names(plan: Plan) -> list[str]:
    return [entry.name for entry in plan.constrained]


def snapshot(model: nn.Module) -> dict[str, tuple[type, int, Tensor]]:
    """Class, identity and value of every parameter: nothing of it may change when a call fails."""
    params = model.named_parameters(remove_duplicate=False)
    return {name: (type(p), id(p), p.detach().as_subclass(Tensor).clone()) for name, p in params}


def assert_unchanged(model: nn.Module, before: dict[str, tuple[type, int, Tensor]]) -> None:
    after = snapshot(model)
    assert {n: v[:2] for n, v in after.items()} == {n: v[:2] for n, v in before.items()}
    for name, (*_, value) in after.items():
        torch.testing.assert_close(value, before[name][2], rtol=0, atol=0, equal_nan=True)


def assert_on_manifolds(plan: Plan, tolerance: float = 1e-5) -> None:
    for param in plan.parameters().values():
        assert float(param.manifold.violation(param.detach()).max()) < tolerance


def train(model: nn.Module, steps: int = 2, optimizer: torch.optim.Optimizer | None = None) -> torch.optim.Optimizer:
    optimizer = optimizer or RiemannianFGSGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in range(steps):
        optimizer.zero_grad()
        model(images(seed=step)).square().mean().backward()
        optimizer.step()
    return optimizer


def through_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def saved(model: nn.Module) -> bytes:
    file = io.BytesIO()
    torch.save(model, file)
    return file.getvalue()


class Two(nn.Module):
    """Two layers whose inputs are known: the features of ``conv`` are the model's inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3)
        self.fc = nn.Linear(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(x).mean((2, 3)))


def two(statistics: Any, **arguments: Any) -> tuple[Two, Plan]:
    torch.manual_seed(0)
    model = Two()
    arguments = {"strategy": "pi", "manifolds": ("sphere", "stiefel", "euclidean"), "radius": 0.5} | arguments
    return model, constrain(model, first_layer=True, classifier=True, statistics=statistics, **arguments)


def features(scale: list[float]) -> Tensor:
    """Inputs with given standard deviations per channel."""
    x = torch.randn(64, 4, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = (x - x.mean((0, 2, 3), keepdim=True)) / x.std((0, 2, 3), keepdim=True)
    return (x * torch.tensor(scale, dtype=torch.float64)[:, None, None]).float()


SCALE = [0.25, 1.0, 2.0, 8.0]
