"""Images: what is trained on, what the accuracy is measured on, and in which order.

:func:`load` returns the same :class:`Splits` for every set. With ``validation`` the test images stay unseen, and a
fifth of the training images, the same for every seed, takes their place. A training set is asked for *keys*, pairs of
epoch and index: random crops and flips are functions of the run's seed and the key alone, so a run can stop after any
step, and continue with another number of workers, to the same bits.
"""

from __future__ import annotations

import gzip
import os
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate
from torchvision import datasets
from torchvision.transforms import v2

from training import processes, settings

Key: TypeAlias = tuple[int, int]  # epoch and index
Transform: TypeAlias = Callable[[Any], Tensor]

DEBIAN = Path("/usr/share/datasets/fashion-mnist")  # of the package dataset-fashion-mnist
FASHION = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


class Tensors(Dataset[Any]):
    """Images in memory, without augmentation; a batch is one indexing."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, keys: Sequence[Key]) -> tuple[Tensor, Tensor]:
        chosen = torch.tensor([index for _, index in keys], dtype=torch.long)
        return self.images[chosen], self.labels[chosen]


class Files(Dataset[Any]):
    """Images of another data set, decoded and changed one by one."""

    def __init__(self, images: Dataset[Any], chosen: Tensor, labels: Tensor, transform: Transform, seed: int) -> None:
        self.images, self.chosen, self.labels, self.transform, self.seed = images, chosen, labels, transform, seed

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, key: Key) -> tuple[Tensor, Tensor]:
        image, _ = self.images[int(self.chosen[key[1]])]
        generator = torch.default_generator
        before = generator.get_state()
        generator.manual_seed(_mixed(self.seed, 1, *key))
        try:
            return self.transform(image), self.labels[key[1]]
        finally:
            generator.set_state(before)

    def __getitems__(self, keys: Sequence[Key]) -> list[Tensor]:
        # Of the last batch of few held-out images a process may get none; it has to take part all the same.
        batch = default_collate([self[key] for key in keys or [(1, 0)]])
        return [part[: len(keys)] for part in batch]


class Splits(NamedTuple):
    """Training and held-out images, and the shape of the task."""

    train: Tensors | Files
    test: Tensors | Files
    classes: int
    channels: int
    size: int
    held_out: str


class Raw(NamedTuple):
    """A data set as it is on disk; ``augmented`` and ``plain`` are None for tensors."""

    train: Any
    labels: Tensor
    test: Any
    test_labels: Tensor
    classes: int
    channels: int
    size: int
    augmented: Transform | None = None
    plain: Transform | None = None


def load(wanted: settings.Data, seed: int) -> Splits:
    """Load a data set.

    Args:
        wanted: Which one, and what of it.
        seed: Seed of the share of images, of wrong labels and of augmentation.

    Raises:
        FileNotFoundError: If the data are not there; the message says where to put them.
        ValueError: If the two halves of an image folder have different classes, or too few images are asked for.
    """
    root = wanted.data_dir or Path(os.environ.get("FGO_GEO_DATA", "data"))
    raw = _read(wanted, root)
    chosen = torch.arange(len(raw.labels))
    held_out, test, test_labels, of_test = "test images", raw.test, raw.test_labels, torch.arange(len(raw.test_labels))
    if wanted.validation:
        chosen, of_test = _stratified_fifth(raw.labels)
        held_out, test, test_labels = "validation images", raw.train, raw.labels[of_test]
    if wanted.fraction < 1:
        chosen = _share(chosen, raw.labels, wanted.fraction, seed)
    labels = raw.labels[chosen]
    if wanted.label_noise:
        labels = _with_noise(labels, raw.classes, wanted.label_noise, seed)
    if raw.augmented is None or raw.plain is None:
        parts = Tensors(raw.train[chosen], labels), Tensors(test[of_test], test_labels)
    else:
        transform = raw.augmented if wanted.augment else raw.plain
        parts = (
            Files(raw.train, chosen, labels, transform, seed),
            Files(test, of_test, test_labels, raw.plain, seed),
        )
    return Splits(*parts, raw.classes, raw.channels, raw.size, held_out)


# -- which images ---------------------------------------------------------------------------------------------


def _stratified_fifth(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Split indices into four fifths and one, with equal shares of each class."""
    parts = train_test_split(np.arange(len(labels)), test_size=0.2, stratify=labels.numpy(), random_state=0)
    return tuple(map(torch.from_numpy, parts))  # pyright: ignore


def _share(chosen: Tensor, labels: Tensor, fraction: float, seed: int) -> Tensor:
    """A share of every class, at least one image of each, in the order of the indices."""
    generator = torch.Generator().manual_seed(_mixed(seed, 2))
    kept = []
    for label in labels.unique():
        of_class = chosen[labels[chosen] == label]
        count = max(1, round(fraction * len(of_class)))
        kept.append(of_class[torch.randperm(len(of_class), generator=generator)[:count]])
    return torch.cat(kept).sort().values


def _with_noise(labels: Tensor, classes: int, share: float, seed: int) -> Tensor:
    """Replace a share of the labels by other ones, all equally likely."""
    generator = torch.Generator().manual_seed(_mixed(seed, 3))
    wrong = torch.randperm(len(labels), generator=generator)[: round(share * len(labels))]
    shifts = torch.randint(1, classes, (len(wrong),), generator=generator)
    noisy = labels.clone()
    noisy[wrong] = (labels[wrong] + shifts) % classes
    return noisy


def _mixed(*numbers: int) -> int:
    """A seed from several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


# -- in which order -------------------------------------------------------------------------------------------


class Order(Sampler[list[Key]]):
    """The batches of an epoch, of which every process gets its share.

    The order is a function of seed and epoch. A last batch with less than two images for each part of each process
    is dropped: batch normalisation needs two.

    Args:
        images: Number of images.
        batch_size: Images of a batch, over all processes.
        seed: Seed of the order; None for the images as they are.
        least: Smallest number of images of a batch.

    Attributes:
        epoch: The epoch, from 1.
        done: Batches of it to skip.
    """

    def __init__(self, images: int, batch_size: int, seed: int | None, least: int = 1) -> None:
        self.images, self.batch_size, self.seed = images, batch_size, seed
        self.epoch, self.done = 1, 0
        self.batches = images // batch_size + (images % batch_size >= least)

    def __len__(self) -> int:
        return self.batches - self.done

    def __iter__(self) -> Iterator[list[Key]]:
        order = torch.arange(self.images)
        if self.seed is not None:
            generator = torch.Generator().manual_seed(_mixed(self.seed, 0, self.epoch))
            order = torch.randperm(self.images, generator=generator)
        for number in range(self.done, self.batches):
            batch = order[number * self.batch_size : (number + 1) * self.batch_size]
            share = batch.tensor_split(processes.count())[processes.rank()]
            yield [(self.epoch, index) for index in share.tolist()]


def _as_it_is(batch: Any) -> Any:
    return batch


def loader(images: Tensors | Files, order: Order, workers: int, device: str) -> DataLoader[Any]:
    """The batches of a data set in an order, which may change between epochs."""
    return DataLoader(
        images,
        batch_sampler=order,
        num_workers=workers,
        collate_fn=_as_it_is,
        pin_memory=device.startswith("cuda"),
        persistent_workers=workers > 0,
        # Drawn from a generator of their own: the workers' seeds are not used, and the run's numbers stay its own.
        generator=torch.Generator(),
    )


# -- from disk ------------------------------------------------------------------------------------------------


@lru_cache(1)
def _read(wanted: settings.Data, root: Path) -> Raw:
    name, download, size = wanted.data, wanted.download, wanted.image_size
    if name == "digits":
        return _digits(size)
    if name == "fashion":
        return _fashion([root] if wanted.data_dir else [root, DEBIAN], download, size)
    if name == "imagefolder":
        return _image_folder(root, size or 224)
    return _cifar(name, root, download, size or 32)


def _digits(size: int | None) -> Raw:
    """1,797 grey images of 8 x 8 pixels; a fifth is the test set."""
    digits = load_digits()
    images, labels = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1, torch.tensor(digits.target)
    images = _pooled(images, size)
    train, test = _stratified_fifth(labels)
    return Raw(images[train], labels[train], images[test], labels[test], 10, 1, images.shape[-1])


def _fashion(folders: Sequence[Path], download: bool, size: int | None) -> Raw:
    """70,000 grey images of 28 x 28 pixels, of which 10,000 are the test set."""
    root, *others = folders
    if download:
        datasets.FashionMNIST(root, download=True)
    places = (root, root / "FashionMNIST" / "raw", *others)
    for place in places:
        files = [next((p for p in (place / n, place / f"{n}.gz") if p.is_file()), None) for n in FASHION]
        if None not in files:
            train, labels, test, test_labels = [_idx(path) for path in files if path]
            images = [_pooled((x[:, None].float() / 255 - 0.2860) / 0.3530, size) for x in (train, test)]
            return Raw(images[0], labels.long(), images[1], test_labels.long(), 10, 1, images[0].shape[-1])
    raise FileNotFoundError(
        f"no Fashion-MNIST in {', '.join(map(str, places))}: install Debian's package dataset-fashion-mnist, add "
        f"--download, or put {FASHION[0]} and the other three files (or their .gz) into the folder of --data-dir"
    )


def _idx(path: Path) -> Tensor:
    """Read a file of the format of MNIST: dimensions, then bytes."""
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        content = file.read()
    dimensions = content[3]
    shape = np.frombuffer(content, ">i4", dimensions, 4)
    values = np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions)
    if values.size != shape.prod():
        raise ValueError(f"{path} is cut: it has {values.size} values, its header promises {shape.prod()}")
    return torch.from_numpy(values.reshape(shape).copy())


def _pooled(images: Tensor, size: int | None) -> Tensor:
    return images if size in (None, images.shape[-1]) else adaptive_avg_pool2d(images, size)


def _cifar(name: str, root: Path, download: bool, size: int) -> Raw:
    """60,000 colour images of 32 x 32 pixels, with the usual shifts and flips for training."""
    cifar = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    try:
        train, test = cifar(root, train=True, download=download), cifar(root, train=False, download=download)
    except RuntimeError as error:
        raise FileNotFoundError(
            f"no complete {name} in {root}: add --download, or name the folder that holds "
            f"{cifar.base_folder} with --data-dir"
        ) from error
    resize = [] if size == 32 else [v2.Resize(size, antialias=True)]
    to_float = _normalised((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
    return Raw(
        train,
        torch.tensor(train.targets),
        test,
        torch.tensor(test.targets),
        len(train.classes),
        3,
        size,
        v2.Compose([v2.PILToTensor(), v2.RandomCrop(32, padding=4), *resize, v2.RandomHorizontalFlip(), *to_float]),
        v2.Compose([v2.PILToTensor(), *resize, *to_float]),
    )


def _image_folder(root: Path, size: int) -> Raw:
    """Any set of colour images in ImageNet's layout, with ImageNet's usual crops and flips."""
    for part in ("train", "val"):
        if not (root / part).is_dir():
            raise FileNotFoundError(
                f"no folder {root / part}: --data imagefolder needs train/<class>/<image> and "
                "val/<class>/<image> below --data-dir"
            )
    train, test = datasets.ImageFolder(str(root / "train")), datasets.ImageFolder(str(root / "val"))
    if train.classes != test.classes:
        raise ValueError(
            f"{root / 'train'} and {root / 'val'} must have the same classes, "
            f"but only one of them has {sorted(set(train.classes) ^ set(test.classes))}"
        )
    to_float = _normalised((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    crop = v2.RandomResizedCrop(size, antialias=True)
    return Raw(
        train,
        torch.tensor(train.targets),
        test,
        torch.tensor(test.targets),
        len(train.classes),
        3,
        size,
        v2.Compose([v2.PILToTensor(), crop, v2.RandomHorizontalFlip(), *to_float]),
        v2.Compose([v2.PILToTensor(), v2.Resize(size * 8 // 7, antialias=True), v2.CenterCrop(size), *to_float]),
    )


def _normalised(mean: Sequence[float], deviation: Sequence[float]) -> list[Transform]:
    return [v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, deviation)]
