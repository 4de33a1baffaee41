"""Image sets for the training example: what is trained on, and what the accuracy is measured on.

``load`` returns the same ``Splits`` for scikit-learn's digits (part of scikit-learn, no download),
CIFAR-10, CIFAR-100 and any folder in ImageNet's layout. The held-out images never depend on the
run's seed. With ``validation=True`` the test images stay untouched and a fifth of the training
images takes their place: learning rates are chosen on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch.utils.data import Dataset, Subset, TensorDataset
from torchvision import datasets, transforms

NAMES = ("digits", "cifar10", "cifar100", "imagefolder")


class Splits(NamedTuple):
    """A training and a held-out set of (image, label) pairs, and the shape of the task."""

    train: Dataset[Any]
    test: Dataset[Any]
    classes: int
    channels: int
    size: int
    held_out: str


class Views(NamedTuple):
    """The same labelled images twice: with random changes to train on, and plain to measure on."""

    augmented: Dataset[Any]
    plain: Dataset[Any]
    labels: Sequence[int]


def load(
    name: str,
    root: Path,
    *,
    validation: bool = False,
    download: bool = False,
    image_size: int = 224,
) -> Splits:
    """Load a data set by name.

    Args:
        name: One of ``NAMES``.
        root: Folder of the data (unused for digits): where torchvision's CIFAR classes look, or a
            folder with ``train/<class>/<image>`` and ``val/<class>/<image>``.
        validation: Measure on a stratified fifth of the training images, not on the test images.
        download: Let torchvision download CIFAR into ``root``.
        image_size: Side length of the images cut from an image folder, in pixels.

    Returns:
        The training set, the held-out set and the shape of the task.

    Raises:
        FileNotFoundError: If the data are not in ``root``.
        ValueError: If the two halves of an image folder have different classes.
    """
    if name == "digits":
        views, test, classes, channels, size = _digits()
    elif name == "imagefolder":
        views, test, classes, channels, size = _image_folder(root, image_size)
    else:
        views, test, classes, channels, size = _cifar(name, root, download)
    if not validation:
        return Splits(views.augmented, test, classes, channels, size, "test images")
    train, held_out = _stratified_fifth(views.labels)
    return Splits(
        Subset(views.augmented, train),
        Subset(views.plain, held_out),
        classes,
        channels,
        size,
        "validation images",
    )


def _stratified_fifth(labels: Sequence[int]) -> tuple[list[int], list[int]]:
    """Split the indices of ``labels`` into four fifths and one, with equal shares of each class."""
    most, fifth = train_test_split(np.arange(len(labels)), test_size=0.2, stratify=labels, random_state=0)
    return most.tolist(), fifth.tolist()


def _digits() -> tuple[Views, Dataset[Any], int, int, int]:
    """1,797 grey images of 8 x 8 pixels; a fifth is the test set."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    labels = torch.tensor(digits.target)
    train, test = _stratified_fifth(digits.target)
    images_to_train = TensorDataset(images[train], labels[train])
    views = Views(images_to_train, images_to_train, labels[train].tolist())
    return views, TensorDataset(images[test], labels[test]), 10, 1, 8


def _cifar(name: str, root: Path, download: bool) -> tuple[Views, Dataset[Any], int, int, int]:
    """60,000 colour images of 32 x 32 pixels, with the usual shifts and flips for training."""
    cifar = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    plain = transforms.Compose(
        [
            transforms.ToTensor(),
            transforms.Normalize((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
        ]
    )
    augmented = transforms.Compose([transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip(), plain])
    try:
        train = cifar(root, train=True, transform=augmented, download=download)
        test = cifar(root, train=False, transform=plain, download=download)
    except RuntimeError as error:
        raise FileNotFoundError(
            f"no complete {name} in {root}: add --download, or name the folder that holds "
            f"{cifar.base_folder} with --data-dir"
        ) from error
    views = Views(train, cifar(root, train=True, transform=plain), train.targets)
    return views, test, len(train.classes), 3, 32


def _image_folder(root: Path, size: int) -> tuple[Views, Dataset[Any], int, int, int]:
    """Any set of colour images in ImageNet's layout, with ImageNet's usual crops and flips."""
    for part in ("train", "val"):
        if not (root / part).is_dir():
            raise FileNotFoundError(
                f"no folder {root / part}: --data imagefolder needs train/<class>/<image> and "
                "val/<class>/<image> below --data-dir"
            )
    to_tensor = transforms.Compose(
        [
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    augmented = transforms.Compose([transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip(), to_tensor])
    plain = transforms.Compose([transforms.Resize(size * 8 // 7), transforms.CenterCrop(size), to_tensor])
    train = datasets.ImageFolder(str(root / "train"), augmented)
    test = datasets.ImageFolder(str(root / "val"), plain)
    if train.classes != test.classes:
        raise ValueError(
            f"{root / 'train'} and {root / 'val'} must have the same classes, "
            f"but only one of them has {sorted(set(train.classes) ^ set(test.classes))}"
        )
    views = Views(train, datasets.ImageFolder(str(root / "train"), plain), train.targets)
    return views, test, len(train.classes), 3, size
