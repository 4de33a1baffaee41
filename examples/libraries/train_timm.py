"""timm: a constrained vision transformer with timm's optimiser, scheduler, average of weights and checkpoints.

python examples/libraries/train_timm.py runs/timm --epochs 2
python examples/libraries/train_timm.py runs/timm --epochs 4  # goes on after the second epoch
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from quadrants import dataset
from timm import create_model
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import nn
from torch.utils.data import DataLoader

import fgo_geo


def train(folder: Path, epochs: int) -> tuple[nn.Module, float]:
    """Train, or go on from the checkpoint in the folder; returns the network and the latest loss."""
    torch.manual_seed(0)
    size = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 4, "in_chans": 1}
    model = create_model("vit_tiny_patch16_224", num_classes=4, **size)
    # timm fuses queries, keys and values in one layer, qkv: each of the three gets groups of its own.
    fgo_geo.constrain(model, "layer", "stiefel", overrides={"*.qkv": {"split": 3}})
    average = ModelEmaV3(model, decay=0.9)
    path = folder / "last.pt"
    saved = torch.load(path) if path.exists() else None
    if saved:  # before the optimiser is built
        model.load_state_dict(saved["model"])
        average.module.load_state_dict(saved["average"])
    optimizer = create_optimizer_v2(model, opt="nadamw", lr=1e-2, weight_decay=0.0)
    fgo_geo.on_manifolds(optimizer, step_size="constant")
    scheduler = CosineLRScheduler(optimizer, t_initial=20, warmup_t=1, warmup_lr_init=1e-3)
    if saved:
        optimizer.load_state_dict(saved["optimizer"])
        scheduler.load_state_dict(saved["scheduler"])

    loss = torch.zeros(())
    for epoch in range(saved["epoch"] + 1 if saved else 0, epochs):
        scheduler.step(epoch)
        order = torch.Generator().manual_seed(epoch)
        for images, labels in DataLoader(dataset(), batch_size=32, shuffle=True, generator=order):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            average.update(model)
        folder.mkdir(parents=True, exist_ok=True)
        parts = {"model": model, "average": average.module, "optimizer": optimizer, "scheduler": scheduler}
        torch.save({"epoch": epoch, **{name: part.state_dict() for name, part in parts.items()}}, path)
    return model, loss.item()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--epochs", type=int, default=4)
    net, loss = train(**vars(parser.parse_args()))
    print(f"loss {loss:.4f}")
    print(fgo_geo.report(net))
