"""The images of the training scripts: real formats, disjoint splits, and an order that seed and epoch decide."""

from __future__ import annotations

import pickle
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
import trainer
from hypothesis import given
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from torchvision import datasets
from trainer import bits, data, run, settings


@pytest.fixture(autouse=True)
def nothing_is_remembered():
    data._read.cache_clear()
    yield
    data._read.cache_clear()


@pytest.fixture
def folder(tmp_path):
    return trainer.write_image_folder(tmp_path / "images")


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    return trainer.write_cifar(tmp_path, monkeypatch)


def load(seed=0, **wanted):
    return data.load(settings.Data(**wanted), seed)


def items(images, epoch=1):
    return images.__getitems__([(epoch, i) for i in range(len(images))])


def pixels(images):
    return [bits(images[1, index][0]) for index in range(len(images))]


@pytest.mark.parametrize("validation", [False, True])
def test_the_digits_are_split_into_disjoint_stratified_parts(validation):
    splits = load(data="digits", validation=validation)
    everything, test = load_digits(), load(data="digits").test
    parts = [items(part) for part in [splits.train, splits.test] + ([test] if validation else [])]
    counts = [np.bincount(labels, minlength=10) for _, labels in parts]
    assert sum(counts).tolist() == np.bincount(everything.target).tolist()
    assert np.abs(counts[1] - (counts[0] + counts[1]) / 5).max() < 1
    originals = torch.tensor(everything.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    assert sorted(bits(x) for images, _ in parts for x in images) == sorted(bits(x) for x in originals)
    assert torch.equal(items(load(seed=5, data="digits", validation=validation).test)[0], parts[1][0])


@pytest.mark.parametrize("suffix", [".gz", ""])
def test_fashion_mnist_is_read_from_its_own_files(tmp_path, monkeypatch, suffix):
    root = tmp_path / ("FashionMNIST/raw" if not suffix else "")
    images, labels = trainer.write_fashion(root, suffix=suffix)
    monkeypatch.setenv("FGO_GEO_DATA", str(tmp_path))
    splits = load(data="fashion")
    assert (len(splits.train), len(splits.test), *splits[2:5]) == (100, 20, 10, 1, 28)
    found, found_labels = items(splits.train)
    torch.testing.assert_close(found[:, 0], (torch.from_numpy(images) / 255 - 0.2860) / 0.3530)
    assert found_labels.tolist() == labels.tolist()
    pooled = items(load(data="fashion", image_size=14).train)[0]
    torch.testing.assert_close(pooled, found.view(100, 1, 14, 2, 14, 2).mean((3, 5)))


def test_a_folder_that_was_named_is_the_only_one_looked_into(tmp_path, monkeypatch):
    trainer.write_fashion(tmp_path)
    monkeypatch.setattr(data, "DEBIAN", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no Fashion-MNIST in .*elsewhere"):
        load(data="fashion", data_dir=tmp_path / "elsewhere")


def test_a_cut_file_of_fashion_mnist_is_refused(tmp_path):
    trainer.write_fashion(tmp_path, suffix="")
    path = tmp_path / data.FASHION[0]
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ValueError, match="is cut: it has 78395 values, its header promises 78400"):
        load(data="fashion", data_dir=tmp_path)


@pytest.mark.parametrize(("name", "size"), [("cifar10", 50), ("cifar100", 10)])
def test_cifar_is_read_from_its_own_files(cifar, name, size):
    splits = load(data=name, data_dir=cifar)
    assert (len(splits.train), len(splits.test)) == (size, 10)
    assert splits[2:5] == (int(name.removeprefix("cifar")), 3, 32)
    image, label = splits.test[1, 7]
    assert label == 7
    file = {"cifar10": "cifar-10-batches-py/test_batch", "cifar100": "cifar-100-python/test"}[name]
    raw = torch.from_numpy(pickle.loads((cifar / file).read_bytes())["data"][7]).view(3, 32, 32)
    mean, deviation = torch.tensor([[0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]])
    torch.testing.assert_close(image, (raw / 255 - mean.view(3, 1, 1)) / deviation.view(3, 1, 1))


def test_augmentation_is_a_function_of_seed_epoch_and_image_alone(cifar):
    first, again, other = (load(seed, data="cifar10", data_dir=cifar).train for seed in (1, 1, 2))
    before = torch.get_rng_state()
    image = bits(first[3, 5][0])
    assert bits(before) == bits(torch.get_rng_state())
    torch.rand(3)
    again[9, 9]
    assert bits(again[3, 5][0]) == image
    assert len({str(image), str(bits(first[4, 5][0])), str(bits(other[3, 5][0]))}) == 3
    plain = load(1, data="cifar10", data_dir=cifar, augment=False).train
    assert bits(plain[3, 5][0]) == bits(plain[4, 5][0])


def test_the_validation_images_of_cifar_are_not_augmented(cifar):
    splits = load(data="cifar10", data_dir=cifar, validation=True)
    assert (len(splits.train), len(splits.test)) == (40, 10)
    assert sorted(int(splits.test[1, i][1]) for i in range(10)) == list(range(10))
    assert pixels(splits.test) == [bits(splits.test[2, i][0]) for i in range(10)]


def test_an_image_folder_is_read_in_imagenet_layout(folder):
    splits = load(data="imagefolder", data_dir=folder, image_size=16)
    assert (len(splits.train), len(splits.test), *splits[2:5]) == (9, 4, 2, 3, 16)
    assert splits.test[1, 0][0].shape == splits.train[1, 0][0].shape == (3, 16, 16)
    assert splits.test.labels.tolist() == [0, 0, 1, 1]


@given(fraction=st.sampled_from([0.01, 0.05, 0.5]), noise=st.sampled_from([0.2, 0.4]), seed=st.integers(0, 99))
def test_a_share_is_balanced_and_noise_makes_just_so_many_labels_wrong(fraction, noise, seed):
    whole = load(data="digits")
    some = load(seed, data="digits", fraction=fraction)
    counts = torch.bincount(some.train.labels, minlength=10)
    of_all = torch.bincount(whole.train.labels, minlength=10)
    assert counts.tolist() == [max(1, round(fraction * int(n))) for n in of_all]
    assert {bits(x)[2] for x in some.train.images} <= {bits(x)[2] for x in whole.train.images}
    noisy = load(seed, data="digits", fraction=fraction, label_noise=noise)
    assert torch.equal(noisy.train.images, some.train.images)
    assert int((noisy.train.labels != some.train.labels).sum()) == round(noise * len(some.train))
    assert noisy.train.labels.min() >= 0
    assert noisy.train.labels.max() < 10
    assert torch.equal(noisy.test.labels, whole.test.labels)
    assert torch.equal(load(seed, data="digits", fraction=fraction, label_noise=noise).train.labels, noisy.train.labels)


def test_wrong_labels_are_spread_over_all_other_classes():
    labels = torch.zeros(9000, dtype=torch.long)
    counts = torch.bincount(data._with_noise(labels, 10, 0.5, 0), minlength=10)
    assert counts[0] == 4500
    assert (counts[1:] - 500).abs().max() < 100


@given(images=st.integers(1, 40), batch=st.integers(1, 12), world=st.integers(1, 4), seed=st.integers(0, 9))
def test_processes_share_every_batch_and_a_started_epoch_goes_on_as_it_was(images, batch, world, seed):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORLD_SIZE", str(world))
        shares = []
        for rank in range(world):
            patch.setenv("RANK", str(rank))
            order = data.Order(images, batch, seed)
            order.epoch = 3
            shares.append([[index for _, index in keys] for keys in order])
            order.done = len(order) // 2
            assert [[index for _, index in keys] for keys in order] == shares[-1][order.done :]
            assert len(order) == len(shares[-1]) - order.done
    merged = [list(chain(*parts)) for parts in zip(*shares, strict=True)]
    assert sorted(chain(*merged)) == list(range(images))
    assert all(max(map(len, parts)) - min(map(len, parts)) <= 1 for parts in zip(*shares, strict=True))
    patch_free = data.Order(images, batch, seed)
    patch_free.epoch = 3
    assert merged == [[index for _, index in keys] for keys in patch_free]


def test_the_order_of_the_images_depends_on_seed_and_epoch_alone():
    def indices(seed, epoch):
        order = data.Order(50, 50, seed)
        order.epoch = epoch
        return tuple(index for _, index in next(iter(order)))

    assert len({indices(seed, epoch) for seed in range(4) for epoch in range(4)}) == 16
    torch.manual_seed(9)
    assert indices(1, 2) == indices(1, 2)


def test_a_last_batch_too_small_for_normalisation_is_dropped():
    assert [data.Order(9, 4, 0, least).batches for least in (1, 2)] == [3, 2]
    assert [data.Order(8, 4, 0, least).batches for least in (1, 2)] == [2, 2]


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_a_run_on_cifar(tmp_path, cifar, name):
    flags = ("--data", name, "--data-dir", str(cifar), "--epochs", "1", "--batch-size", "10")
    results = run(tmp_path / "run", *flags)
    assert results["epochs"][0]["train_accuracy"] * {"cifar10": 50, "cifar100": 10}[name] % 1 == 0
    assert torch.load(tmp_path / "run" / "model.pt")["0.weight"].shape[1] == 3


def test_resnet_runs_on_an_image_folder_without_a_last_batch_of_one(tmp_path, folder):
    """Of 9 images in batches of 4 one is left, and 8 x 8 pixels end as 1 x 1: too few to normalise."""
    results = run(
        tmp_path / "run",
        *("--data", "imagefolder", "--data-dir", str(folder), "--image-size", "8", "--workers", "1"),
        *("--model", "resnet18", "--batch-size", "4", "--epochs", "1"),
    )
    assert (results["epochs"][0]["train_accuracy"] * 8).is_integer()
    names = {entry["names"][0] for entry in results["plan"]["entries"] if entry["reason"] is None}
    assert {"conv1.weight", "layer2.0.conv1.weight", "layer2.0.downsample.0.weight"} < names
    assert len(names) == 20


@pytest.mark.parametrize("kind", ["digits", "imagefolder"])
def test_a_process_without_a_share_of_the_last_batch_gets_an_empty_one(folder, monkeypatch, kind):
    """It has to take part in what the processes do together."""
    splits = load(data=kind, data_dir=folder, image_size=8, fraction=0.5)
    monkeypatch.setenv("WORLD_SIZE", "3")
    shares = []
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        order = data.Order(2, 64, None)
        shares += [list(data.loader(splits.test, order, 0, "cpu"))]
    assert [len(labels) for ((_, labels),) in shares] == [1, 1, 0]
    assert len({(images.shape[1:], images.dtype, labels.dtype) for ((images, labels),) in shares}) == 1


UNUSABLE = {
    "--data cifar10": "no complete cifar10 in data: add --download, or name the folder that holds cifar-10-batches-py",
    "--data cifar100": "no complete cifar100 in data",
    "--data imagefolder": "no folder data/train: --data imagefolder needs train/<class>/<image>",
    "--data fashion": "no Fashion-MNIST in data, data/FashionMNIST/raw, nowhere: install Debian's package",
    "--fraction 0.001 --accumulate 8": "there are 10 training images, fewer than the 16 that --accumulate 8",
}


@pytest.mark.parametrize(("arguments", "message"), UNUSABLE.items(), ids=UNUSABLE)
def test_data_that_are_missing_are_refused_with_a_remedy(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FGO_GEO_DATA", raising=False)
    monkeypatch.setattr(data, "DEBIAN", Path("nowhere"))
    assert trainer.train.main(arguments.split()) == 2
    assert message in capsys.readouterr().err


def test_an_image_folder_whose_halves_differ_is_refused(folder, capsys, tmp_path):
    (folder / "val" / "bee").rename(folder / "val" / "wasp")
    output = ("--output", str(tmp_path / "run"))
    assert trainer.train.main(["--data", "imagefolder", "--data-dir", str(folder), *output]) == 2
    assert "must have the same classes, but only one of them has ['bee', 'wasp']" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "kind"), [("cifar10", datasets.CIFAR10), ("fashion", datasets.FashionMNIST)])
def test_download_is_left_to_torchvision(tmp_path, monkeypatch, name, kind):
    asked = []
    monkeypatch.setattr(data, "DEBIAN", Path("nowhere"))
    monkeypatch.setattr(kind, "download", lambda dataset: asked.append(dataset.root))
    with pytest.raises((FileNotFoundError, RuntimeError)):
        load(data=name, data_dir=tmp_path, download=True)
    assert asked == [tmp_path]
