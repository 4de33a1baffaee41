"""The Trainer of Hugging Face's transformers: a constrained vision transformer that trains, saves and resumes.

python examples/libraries/train_huggingface.py runs/huggingface --epochs 2
python examples/libraries/train_huggingface.py runs/huggingface --epochs 4  # goes on after the second epoch
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from quadrants import dataset
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification, set_seed
from transformers.trainer_utils import get_last_checkpoint

import fgo_geo


class Network(nn.Module):
    """A model of transformers as a plain module.

    The Trainer of transformers 5 saves some of the library's own models under other names than it looks for when it
    resumes, and goes on with untrained weights. Of a plain module it saves and loads the names as they are.
    """

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.inner = ViTForImageClassification(config)

    def forward(self, pixel_values: Tensor, labels: Tensor) -> dict[str, Tensor]:
        output = self.inner(pixel_values=pixel_values, labels=labels)
        return {"loss": output.loss, "logits": output.logits}


def collate(rows: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    images, labels = zip(*rows, strict=True)
    return {"pixel_values": torch.stack(images), "labels": torch.stack(labels)}


def train(folder: Path, epochs: int) -> tuple[nn.Module, float]:
    """Train, or go on from the checkpoint in the folder; returns the network and the mean loss of the last epoch."""
    set_seed(0)
    config = ViTConfig(
        image_size=16,
        patch_size=4,
        num_channels=1,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        num_labels=4,
    )
    model = Network(config)
    # The Trainer's files hold values and no plan. The same seed gives the same groups, so a resumed run finds its own.
    fgo_geo.constrain(model, "layer", "stiefel", seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    fgo_geo.on_manifolds(optimizer, step_size="constant")
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99)
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=epochs,
        per_device_train_batch_size=32,
        save_strategy="epoch",
        save_total_limit=2,
        logging_strategy="epoch",
        report_to=[],
        disable_tqdm=True,
        seed=0,
    )
    # Without optimizers=, the Trainer builds an AdamW of its own, which knows no manifold.
    trainer = Trainer(
        model, arguments, data_collator=collate, train_dataset=dataset(), optimizers=(optimizer, scheduler)
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(folder)) if folder.exists() else None)
    return model, next(entry["loss"] for entry in reversed(trainer.state.log_history) if "loss" in entry)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--epochs", type=int, default=4)
    net, loss = train(**vars(parser.parse_args()))
    print(f"loss {loss:.4f}")
    print(fgo_geo.report(net))
