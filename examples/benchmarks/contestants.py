"""Optimisers to compare, each on a model of its own: torch's, Geoopt's, and those of this package.

Some of them want matrices where a model has convolutions. They get parameters that share their memory with the
model's: the view ``D x (C K)`` of a weight, transposed for Geoopt's Stiefel manifolds where that is the tall one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import fgo_geo  # isort: skip  (before Geoopt, which warns if it is imported alone)
import geoopt
import torch
import torchvision
from torch import Tensor, nn

from fgo_geo.kernels import use_path
from fgo_geo.manifolds import EmbeddedManifold

LR, MOMENTUM = 1e-3, 0.9
MIXED = ("sphere", "oblique", "stiefel", "euclidean")
REFERENCE = "torch SGD, foreach"
SAMPLE = 64  # kernels that are parameters of their own


@dataclass
class Contestant:
    """An optimiser on the parameters of a model.

    Attributes:
        step: What to time.
        params: The model's parameters that it updates.
        aliases: A model's parameter, the optimiser's view of it, and how to make the view, where these differ.
        violation: How far its parameters are from their constraints; None without any.
        times: By how much to multiply its time, if it works on a sample.
        warm_up: Steps that compile something.
    """

    step: Callable[[], object]
    params: list[Tensor]
    aliases: list[tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]] = field(default_factory=list)
    violation: Callable[[], float | None] = lambda: None
    times: float = 1.0
    warm_up: int = 0

    def hand_over_gradients(self) -> None:
        """Show the optimiser the gradients of the model's parameters."""
        for param, alias, view in self.aliases:
            assert param.grad is not None
            alias.grad = view(param.grad)


Builder = Callable[[nn.Module, Sequence[str]], Contestant]


# -- models -------------------------------------------------------------------------------------------------------


def model_of(name: str, image: int = 224) -> nn.Module:
    """A model of torchvision by its name, a single layer by its shape, or a network of a few weights.

    Args:
        name: E.g. ``"resnet18"``; ``"256x256x3x3"`` or ``"4096x1024"``; ``"tiny"``.
        image: Side of the images, for models that need to know.

    Raises:
        SystemExit: If there is no such model.
    """
    sides = name.split("x")
    if len(sides) in (2, 4) and all(side.isdecimal() for side in sides):
        out, into, *kernel = map(int, sides)
        if not kernel:
            return nn.Sequential(nn.Linear(into, out, bias=False))
        return nn.Sequential(nn.Conv2d(into, out, (kernel[0], kernel[1]), bias=False))
    if name == "tiny":
        norm, relu = nn.BatchNorm2d(8), nn.ReLU()
        convolutions = nn.Conv2d(3, 8, 3), norm, relu, nn.Conv2d(8, 16, 3), relu, nn.Conv2d(16, 12, 1), relu
        return nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 10))
    if name not in torchvision.models.list_models():
        raise SystemExit(f"no model {name!r}: give a name of torchvision.models, a shape like 256x256x3x3, or tiny")
    size = {"image_size": image} if name.startswith("vit") else {}
    return torchvision.models.get_model(name, **size)


def is_kernels(param: Tensor) -> bool:
    """Whether a parameter is the weight of a spatial convolution."""
    return param.ndim == 4 and math.prod(param.shape[2:]) > 1


def is_matrix(param: Tensor) -> bool:
    """Whether a parameter is the weight of a linear layer or of a 1x1 convolution."""
    return param.ndim in (2, 4) and math.prod(param.shape[2:]) == 1


def names_of(model: nn.Module, only: str | None) -> list[str]:
    """Names of a model's parameters: all, or the ``"kernels"`` or ``"matrices"`` only."""
    wanted = {"kernels": is_kernels, "matrices": is_matrix}
    return [name for name, param in model.named_parameters() if only is None or wanted[only](param)]


def _params(model: nn.Module, names: Iterable[str]) -> list[Tensor]:
    return [model.get_parameter(name) for name in names]


# -- torch --------------------------------------------------------------------------------------------------------


def torch_sgd(model: nn.Module, names: Sequence[str], **options: Any) -> Contestant:
    params = _params(model, names)
    return Contestant(torch.optim.SGD(params, lr=LR, momentum=MOMENTUM, **options).step, params)


def torch_adamw(model: nn.Module, names: Sequence[str]) -> Contestant:
    params = _params(model, names)
    return Contestant(torch.optim.AdamW(params, lr=LR, foreach=True).step, params)


def torch_muon(model: nn.Module, names: Sequence[str]) -> Contestant:
    params = _params(model, names)
    if not hasattr(torch.optim, "Muon"):
        raise NotImplementedError(f"torch {torch.__version__} has no Muon")
    matrices = [p for p in params if is_kernels(p) or is_matrix(p)]
    aliases: list[Any] = [(p, nn.Parameter(_rows(p.detach())), _rows) for p in matrices]
    optimizers: list[torch.optim.Optimizer] = [torch.optim.Muon([a for _, a, _ in aliases], lr=LR, weight_decay=0)]
    others = [p for p in params if not (is_kernels(p) or is_matrix(p))]
    if others:
        optimizers.append(torch.optim.SGD(others, lr=LR, momentum=MOMENTUM, foreach=True))
    return Contestant(lambda: [optimizer.step() for optimizer in optimizers], params, aliases)


def _rows(weight: Tensor) -> Tensor:
    """A weight as a matrix with a row per output channel, in the memory where it is."""
    if weight.ndim == 4 and not weight.is_contiguous():
        weight = weight.permute(0, 2, 3, 1)  # channels_last
    return weight.view(len(weight), -1)


# -- POGO ---------------------------------------------------------------------------------------------------------


def pogo(model: nn.Module, names: Sequence[str], view: str) -> Contestant:
    """POGO, which keeps batches of matrices near orthogonality by two products (arXiv 2602.14656).

    Args:
        model: The model.
        names: Parameters to update.
        view: ``"matrices"``, one of every weight, or ``"kernels"``, of spatial convolutions alone.
    """
    try:
        from pogo import POGO, base  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise NotImplementedError("POGO is not installed: pip install pogo-torch") from error
    params = _params(model, names)
    wanted = [p for p in params if is_kernels(p) or (is_matrix(p) and view == "matrices")]
    if not wanted:
        raise NotImplementedError(f"there are no {view} among the parameters")
    aliases: list[Any] = []
    groups: list[dict[str, Any]] = [{"params": [], "rows": True}, {"params": [], "rows": False}]
    with torch.no_grad():
        for param in wanted:
            of_view = _batch if view == "kernels" else _one_matrix
            batch = of_view(param.detach())
            is_tall = batch.shape[-2] > batch.shape[-1]
            batch.copy_(torch.linalg.qr(batch)[0] if is_tall else torch.linalg.qr(batch.mT)[0].mT)
            aliases.append((param, nn.Parameter(batch), of_view))
            groups[is_tall]["params"].append(aliases[-1][1])
    own = [group for group in groups if group["params"]]
    optimizers: list[torch.optim.Optimizer] = [POGO(own, base.SGD(momentum=MOMENTUM), lr=LR)]
    others = [p for p in params if all(p is not q for q in wanted)]
    if others:
        optimizers.append(torch.optim.SGD(others, lr=LR, momentum=MOMENTUM, foreach=True))

    def violation() -> float:
        points = (_upright(a.detach().double()) for _, a, _ in aliases)
        return max(float((x.mT @ x - torch.eye(x.shape[-1], dtype=x.dtype)).abs().amax()) for x in points)

    return Contestant(lambda: [optimizer.step() for optimizer in optimizers], params, aliases, violation)


def _batch(weight: Tensor) -> Tensor:
    """The kernels of a weight as a batch of matrices, in the memory where it is."""
    return weight.view(-1, *weight.shape[-2:])


def _one_matrix(weight: Tensor) -> Tensor:
    return _rows(weight)[None]


# -- Geoopt -------------------------------------------------------------------------------------------------------


def geoopt_sgd(model: nn.Module, names: Sequence[str], manifold: geoopt.Manifold | None, view: str) -> Contestant:
    """Geoopt's RiemannianSGD.

    Args:
        model: The model.
        names: Parameters to update.
        manifold: Where to put them; None for nowhere.
        view: ``"rows"``, ``"tall"`` matrices, or ``"kernels"`` (of spatial convolutions alone).
    """
    params = _params(model, names)
    of_view = {"rows": _rows, "tall": _tall, "kernels": _upright}[view]
    wanted = [p for p in params if is_kernels(p) or (is_matrix(p) and view != "kernels")] if manifold else []
    if manifold and not wanted:
        raise NotImplementedError(f"there are no {view} among the parameters")
    aliases: list[Any] = []
    with torch.no_grad():
        for param in wanted:
            matrix = of_view(param.detach())
            matrix.copy_(_on_manifold(matrix, manifold))
            aliases.append((param, geoopt.ManifoldParameter(matrix, manifold=manifold), of_view))
    replaced = {id(p) for p in wanted}
    seen = [*(alias for _, alias, _ in aliases), *(p for p in params if id(p) not in replaced)]
    optimizer = geoopt.optim.RiemannianSGD(seen, lr=LR, momentum=MOMENTUM)
    return Contestant(optimizer.step, params, aliases, lambda: _worst([a for _, a, _ in aliases]))


def geoopt_per_kernel(model: nn.Module, names: Sequence[str]) -> Contestant:
    """One parameter per kernel: some of the kernels of the largest weight, standing for all."""
    params = [p for p in _params(model, names) if is_kernels(p)]
    if not params:
        raise NotImplementedError("there are no kernels among the parameters")
    param = max(params, key=Tensor.numel)
    sample = min(SAMPLE, param.shape[0] * param.shape[1])
    manifold = geoopt.EuclideanStiefel()

    def one(number: int, weight: Tensor) -> Tensor:
        return _upright(weight[number // weight.shape[1], number % weight.shape[1]])

    aliases: list[Any] = []
    with torch.no_grad():
        for number in range(sample):
            kernel = one(number, param.detach())
            kernel.copy_(_on_manifold(kernel, manifold))
            aliases.append((param, geoopt.ManifoldParameter(kernel, manifold=manifold), partial(one, number)))
    optimizer = geoopt.optim.RiemannianSGD([a for _, a, _ in aliases], lr=LR, momentum=MOMENTUM)
    kernels = sum(p.shape[0] * p.shape[1] for p in params)
    return Contestant(optimizer.step, [param], aliases, lambda: _worst([a for _, a, _ in aliases]), kernels / sample)


def _upright(matrices: Tensor) -> Tensor:
    """Matrices, transposed if they are wide."""
    return matrices if matrices.shape[-2] >= matrices.shape[-1] else matrices.mT


def _tall(weight: Tensor) -> Tensor:
    return _upright(_rows(weight))


def _on_manifold(x: Tensor, manifold: geoopt.Manifold) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True) if isinstance(manifold, geoopt.Sphere) else torch.linalg.qr(x)[0]


def _worst(params: Iterable[Tensor]) -> float | None:
    """Largest violation of Geoopt's constraints, in double precision."""
    worst: list[Tensor] = []
    for param in params:
        x = param.detach().as_subclass(Tensor).double()
        if isinstance(param.manifold, geoopt.Sphere):  # pyright: ignore[reportAttributeAccessIssue]
            worst.append((x.norm(dim=-1) - 1).abs().amax())
        else:
            worst.append((x.mT @ x - torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)).abs().amax())
    return float(torch.stack(worst).amax()) if worst else None


# -- this package -------------------------------------------------------------------------------------------------


def ours(
    model: nn.Module, names: Sequence[str], *, kind: str, strategy: str, path: str = "auto", only: str | None = None
) -> Contestant:
    """RiemannianFGSGD on groups.

    Args:
        model: The model; it is constrained.
        names: Parameters to update.
        kind: Manifold kind, or ``"mixed"`` for all four.
        strategy: How to group.
        path: ``"auto"``, ``"fused"``, ``"reference"``; ``"unchecked"`` for ``"auto"`` without a look at the
            gradients, ``"adamw"`` for torch's AdamW under ``on_manifolds`` in its place, ``"bfloat16"`` for ``"auto"``
            with ``torch.set_float32_matmul_precision("medium")``, or ``"compile"`` for ``torch.compile`` of it.
        only: Constrain only ``"kernels"`` or ``"matrices"``.
    """
    wanted = [n for n in names_of(model, only) if n in set(names)]
    if only and not wanted:
        raise NotImplementedError(f"the model has no {only}")
    fgo_geo.constrain(
        model,
        strategy=strategy,
        manifolds=MIXED if kind == "mixed" else kind,
        include=wanted if only else None,
        first_layer=True,
        classifier=True,
        initial="uniform",
    )
    params = _params(model, names)
    if path == "adamw":
        adamw = torch.optim.AdamW(params, lr=LR, foreach=True)
        fgo_geo.on_manifolds(adamw)
        return Contestant(adamw.step, params, violation=lambda: _violation(params))
    check = False if path == "unchecked" else None
    optimizer = fgo_geo.RiemannianFGSGD(params, lr=LR, momentum=MOMENTUM, foreach=True, check_finite=check)
    if path == "compile":
        step = torch.compile(optimizer.step)
        # The first step has no momentum yet, so the second is compiled anew.
        return Contestant(step, params, violation=lambda: _violation(params), warm_up=2)

    def step() -> None:
        with _path(path):
            optimizer.step()

    return Contestant(step, params, violation=lambda: _violation(params))


@contextmanager
def _path(path: Any) -> Generator[None]:
    if path != "bfloat16":
        with use_path("auto" if path == "unchecked" else path):
            yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _violation(params: Iterable[Tensor]) -> float:
    """Largest relative violation of our constraints, in double precision."""
    worst = [0.0]
    for param in params:
        manifold = getattr(param, "manifold", None)
        if isinstance(manifold, EmbeddedManifold):
            worst.append(float(manifold.violation(param.detach().as_subclass(Tensor).double()).amax()))
    return max(worst)


# -- the field ----------------------------------------------------------------------------------------------------

PEERS: dict[str, Builder] = {
    REFERENCE: partial(torch_sgd, foreach=True),
    "torch SGD, fused": partial(torch_sgd, fused=True),
    "torch AdamW, foreach": torch_adamw,
    "torch Muon, SGD on vectors": torch_muon,
    "POGO, matrices": partial(pogo, view="matrices"),
    "POGO, kernels": partial(pogo, view="kernels"),
    "Geoopt, no manifold": partial(geoopt_sgd, manifold=None, view="rows"),
    "Geoopt, Sphere rows": partial(geoopt_sgd, manifold=geoopt.Sphere(), view="rows"),
    "Geoopt, EuclideanStiefel matrices": partial(geoopt_sgd, manifold=geoopt.EuclideanStiefel(), view="tall"),
    "Geoopt, EuclideanStiefel kernels": partial(geoopt_sgd, manifold=geoopt.EuclideanStiefel(), view="kernels"),
    "Geoopt, one parameter per kernel (extrapolated)": geoopt_per_kernel,
}
SLOW_PEERS: dict[str, Builder] = {
    "Geoopt, CanonicalStiefel matrices": partial(geoopt_sgd, manifold=geoopt.CanonicalStiefel(), view="tall"),
}
