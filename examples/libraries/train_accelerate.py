"""Accelerate: a constrained network that trains, saves and resumes.

python examples/libraries/train_accelerate.py runs/accelerate --epochs 2
python examples/libraries/train_accelerate.py runs/accelerate --epochs 4  # goes on after the second epoch
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from quadrants import dataset
from torch import nn
from torch.utils.data import DataLoader

import fgo_geo


def train(folder: Path, epochs: int) -> tuple[nn.Module, float]:
    """Train, or go on from the checkpoint in the folder; returns the network and the latest loss."""
    accelerator = Accelerator(gradient_accumulation_steps=2)
    set_seed(0)
    convolutions = (nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3, 2), nn.ReLU(), nn.Flatten())
    model = nn.Sequential(*convolutions, nn.Linear(576, 4))
    # Accelerate's files hold values and no plan. The same seed gives the same groups, so a resumed run finds its own.
    fgo_geo.constrain(model, "pio", ("sphere", "stiefel"), seed=0)
    optimizer = fgo_geo.RiemannianFGSGD(model.named_parameters(), lr=0.05, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99)
    loader = DataLoader(dataset(), batch_size=32, shuffle=True)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)

    begin = len(list(folder.glob("epoch_*")))
    if begin:
        accelerator.load_state(str(folder / f"epoch_{begin - 1}"))
    loss = torch.zeros(())
    for epoch in range(begin, epochs):
        for images, labels in loader:
            with accelerator.accumulate(model):
                loss = nn.functional.cross_entropy(model(images), labels)
                accelerator.backward(loss)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
        accelerator.save_state(str(folder / f"epoch_{epoch}"))
    return accelerator.unwrap_model(model), loss.item()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--epochs", type=int, default=4)
    net, loss = train(**vars(parser.parse_args()))
    print(f"loss {loss:.4f}")
    print(fgo_geo.report(net))
