"""Lightning: a constrained network that trains, saves and resumes.

python examples/libraries/train_lightning.py runs/lightning --epochs 2
python examples/libraries/train_lightning.py runs/lightning --epochs 4  # goes on after the second epoch
"""

from __future__ import annotations

import argparse
from pathlib import Path

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from quadrants import dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader

import fgo_geo


class Network(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        convolutions = (nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3, 2), nn.ReLU(), nn.Flatten())
        self.net = nn.Sequential(*convolutions, nn.Linear(576, 4))
        fgo_geo.constrain(self.net, "pio", ("sphere", "stiefel"))  # here, before Lightning asks for the optimiser

    def training_step(self, batch: tuple[Tensor, Tensor], number: int) -> Tensor:
        images, labels = batch
        loss = nn.functional.cross_entropy(self.net(images), labels)
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> dict[str, object]:
        optimizer = fgo_geo.RiemannianFGSGD(self.named_parameters(), lr=0.05, momentum=0.9)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)}


def train(folder: Path, epochs: int) -> tuple[nn.Module, float]:
    """Train, or go on from the checkpoint in the folder; returns the network and the latest loss."""
    lightning.seed_everything(0, verbose=False)
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="auto",
        devices=1,
        logger=False,
        log_every_n_steps=1,
        default_root_dir=folder,
        callbacks=[ModelCheckpoint(dirpath=folder, save_last=True)],
    )
    module = Network()
    checkpoint = folder / "last.ckpt"
    # Lightning saves no state of a shuffled loader. The order is fixed here, so a resumed run has the same bits.
    trainer.fit(module, DataLoader(dataset(), batch_size=32), ckpt_path=checkpoint if checkpoint.exists() else None)
    return module.net, float(trainer.callback_metrics["loss"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--epochs", type=int, default=4)
    net, loss = train(**vars(parser.parse_args()))
    print(f"loss {loss:.4f}")
    print(fgo_geo.report(net))
