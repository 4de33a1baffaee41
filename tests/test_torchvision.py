"""constrain on torchvision's classifiers: all of them without values, one of every family with a training step."""

from __future__ import annotations

import fnmatch
import itertools
import re
from collections.abc import Callable
from typing import Any

import geoopt
import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torchvision import models
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.models.densenet import DenseNet
from torchvision.models.efficientnet import EfficientNet, MBConvConfig
from torchvision.models.mobilenetv2 import MobileNetV2
from torchvision.models.resnet import Bottleneck, ResNet
from torchvision.models.shufflenetv2 import ShuffleNetV2
from torchvision.models.swin_transformer import SwinTransformer
from torchvision.models.vgg import make_layers
from torchvision.models.vision_transformer import VisionTransformer

from fgo_geo import RiemannianFGSGD, constrain, plan_of, unconstrain


class WithoutWeights(TorchFunctionMode):
    """Weights have no values, what models compute while they are built (stochastic depths, widths) has."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


# Auxiliary classifiers, and the layers behind Swin's relative positions, whose outputs no layer takes either.
MORE_HEADS = {"googlenet": 2, "inception_v3": 1, "swin_v2_t": 2, "swin_v2_s": 2}


def names_of(row: str, known: list[str]) -> list[str]:
    """The names that a row of a printed plan stands for, as many as it says."""
    glob, _, count = row.rstrip(")").partition(" (")
    before, is_list, rest = glob.partition("{")
    listed, _, after = rest.partition("}")
    if is_list:
        ends = [part.split("-") for part in listed.split(",")]
        names = [f"{before}{n}{after}" for end in ends for n in range(int(end[0]), int(end[-1]) + 1)]
    else:
        names = fnmatch.filter(known, glob)
        assert all(re.fullmatch(re.escape(glob).replace(r"\*", r"\d+"), name) for name in names)
    assert len(names) == int(count or 1)
    return names


@pytest.mark.parametrize("name", models.list_models(module=models))
def test_every_classifier_can_be_constrained(name: str) -> None:
    arguments = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    with WithoutWeights():
        model = models.get_model(name, **arguments)
    parameters = dict(model.named_parameters())
    plan = constrain(model)
    text = str(plan)
    rows = [line.partition("  ")[0] for line in text.partition("\n\n")[0].splitlines()[2:]]
    of_rows = [names_of(row, list(parameters)) for row in rows]
    assert sorted(itertools.chain(*of_rows)) == sorted(entry.name for entry in plan.constrained)
    assert all(len({parameters[name].shape for name in names}) == 1 for names in of_rows)
    assert [entry.name for entry in plan.entries] == list(parameters)
    spared = [e.reason for e in plan.entries if e.reason and ("first conv" in e.reason or "classifier" in e.reason)]
    assert len(spared) == 2 + MORE_HEADS.get(name, 0) or name.startswith("squeezenet")
    for entry in plan.entries:
        kernel = len(entry.shape) > 1 and entry.name.endswith("weight") and "norm" not in entry.module.lower()
        if entry.constrained:
            assert isinstance(model.get_parameter(entry.name), geoopt.ManifoldParameter)
        else:
            assert not kernel or entry.reason in spared, f"{entry.name} is left alone: it {entry.reason}"
    assert text.endswith(f"% of {sum(p.numel() for p in parameters.values()):,} numbers")


SMALL: dict[str, Callable[[], nn.Module]] = {
    "resnet18": lambda: models.resnet18(num_classes=4),
    "grouped bottlenecks": lambda: ResNet(Bottleneck, [1, 1, 1, 1], num_classes=4, groups=2, width_per_group=4),
    "vgg": lambda: nn.Sequential(make_layers([8, 8, "M", 16, 16, "M"]), nn.Flatten(), nn.Linear(16 * 64, 4)),
    "densenet": lambda: DenseNet(4, (2, 2), 8, num_classes=4),
    "mobilenet v2": lambda: MobileNetV2(num_classes=4, width_mult=0.1),
    "mobilenet v3 with squeeze and excitation": lambda: models.mobilenet_v3_small(num_classes=4, width_mult=0.25),
    "efficientnet": lambda: EfficientNet(
        [MBConvConfig(1, 3, 1, 8, 8, 1, 1, 1), MBConvConfig(4, 5, 2, 8, 16, 1, 1, 1)], dropout=0.0, num_classes=4
    ),
    "shufflenet": lambda: ShuffleNetV2([1, 1, 1], [8, 16, 32, 64, 64], num_classes=4),
    "convnext": lambda: ConvNeXt([CNBlockConfig(8, 16, 1), CNBlockConfig(16, None, 1)], num_classes=4),
    "vit": lambda: VisionTransformer(32, 8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=4),
    "swin": lambda: SwinTransformer([4, 4], 8, [1, 1], [1, 2], [2, 2], num_classes=4),
}


@pytest.mark.parametrize("name", SMALL)
def test_families_train_on_their_manifolds(name: str) -> None:
    torch.manual_seed(0)
    model = SMALL[name]()
    keys = model.state_dict().keys()
    plan = constrain(model)
    assert model.state_dict().keys() == keys
    optimizer = RiemannianFGSGD(model.parameters(), lr=0.05, momentum=0.9)
    images, labels = torch.randn(4, 3, 32, 32), torch.arange(4)
    before = {n: p.detach().clone() for n, p in plan.parameters().items()}
    for _ in range(2):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        assert bool(loss.isfinite())
    for parameter_name, param in plan.parameters().items():
        assert float(param.manifold.violation(param.detach()).max()) < 1e-5
        assert not torch.equal(param.detach(), before[parameter_name]), parameter_name
    model.eval()
    outputs = model(images)
    assert bool(outputs.isfinite().all())
    assert torch.equal(unconstrain(model)(images), outputs)


def test_statistics_of_a_resnet() -> None:
    torch.manual_seed(0)
    model = SMALL["grouped bottlenecks"]()
    plan = constrain(model, statistics="max1", radius="bound")
    optimizer = RiemannianFGSGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(4, 3, 32, 32)).square().mean().backward()
        optimizer.step()
        plan_of(model).update_scales(optimizer)
        for param in plan.parameters().values():
            assert float(param.manifold.violation(param.detach()).max()) < 1e-5
    assert all(len(e.channel_scales) == e.shape[1] * e.layout.conv_groups for e in plan.constrained if e.layout)
    assert all(min(e.channel_scales) >= 1 for e in plan.constrained)
