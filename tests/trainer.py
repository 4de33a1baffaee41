"""What the tests of the training scripts share: where these are, small data in real formats, bits to compare."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import signal
import struct
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torchvision import datasets

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))

import train  # noqa: E402  (found in the folder of the examples)
from training import (  # noqa: E402, F401
    checkpoints,
    command_line,
    data,
    engine,
    folder,
    grid,
    measures,
    models,
    optimisers,
    processes,
    reporting,
    settings,
)


def bits(value: object) -> object:
    """Return nested containers with every tensor replaced by its type, shape and bytes."""
    if isinstance(value, torch.Tensor):
        return value.dtype, tuple(value.shape), value.contiguous().numpy().tobytes()
    if isinstance(value, io.BytesIO):
        return value.getvalue()
    if isinstance(value, dict):
        return {key: bits(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [bits(entry) for entry in value]
    return value


def run(output: Path, *arguments: str) -> dict:
    """Train in this process and return the results file."""
    assert train.main([*arguments, "--output", str(output)]) == 0
    return json.loads((output / "results.json").read_text())


def load(output: Path) -> dict:
    """Return the newest checkpoint without the times, which no two runs share; that of many processes put together."""
    state, path, _ = checkpoints.load(output / "checkpoints")
    assert state is not None
    if path.is_dir():
        with tempfile.NamedTemporaryFile() as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp_to_torch_save(path, file.name)
            state |= torch.load(file.name, weights_only=False)
    state["progress"].pop("seconds")
    for epoch in state["progress"]["history"]:
        del epoch["seconds"]
    return state


def write_image_folder(root: Path, train: int = 9, val: int = 4, size: tuple[int, int] = (40, 48)) -> Path:
    """A folder in ImageNet's layout, of two classes that are easy to tell apart."""
    generator = np.random.default_rng(0)
    for part, count in (("train", train), ("val", val)):
        for index in range(count):
            label = ("ant", "bee")[index % 2]
            path = root / part / label / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = generator.integers(0, 128, (*size, 3)) + 127 * (label == "bee")
            Image.fromarray(pixels.astype(np.uint8)).save(path)
    return root


def write_cifar(root: Path, monkeypatch) -> Path:
    """Ten images per file in the layout of CIFAR-10 and CIFAR-100, whose checksums are not checked."""
    generator = np.random.default_rng(0)

    def write(path, content):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(pickle.dumps(content))

    def images(key, labels):
        return {"data": generator.integers(0, 256, (len(labels), 3072), dtype=np.uint8), key: labels}

    for dataset, key, meta, classes in (
        (datasets.CIFAR10, "labels", "label_names", 10),
        (datasets.CIFAR100, "fine_labels", "fine_label_names", 100),
    ):
        for entries in ("train_list", "test_list"):
            names = [[name, None] for name, _ in getattr(dataset, entries)]
            monkeypatch.setattr(dataset, entries, names)
            for name, _ in names:
                write(root / dataset.base_folder / name, images(key, list(range(10))))
        names = {meta: [f"class {i}" for i in range(classes)]}
        write(root / dataset.base_folder / dataset.meta["filename"], names)
        monkeypatch.setattr(dataset, "meta", dataset.meta | {"md5": None})
    return root


def write_fashion(root: Path, train: int = 100, test: int = 20, suffix: str = ".gz") -> tuple[np.ndarray, np.ndarray]:
    """The four files of Fashion-MNIST, with random images; return those of the training set and their labels."""
    generator = np.random.default_rng(0)
    root.mkdir(parents=True, exist_ok=True)
    kept = []
    for part, count in (("train", train), ("t10k", test)):
        images = generator.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        kept += [images, labels]
        for name, array in ((f"{part}-images-idx3-ubyte", images), (f"{part}-labels-idx1-ubyte", labels)):
            content = struct.pack(f">HBB{array.ndim}i", 0, 8, array.ndim, *array.shape) + array.tobytes()
            path = root / f"{name}{suffix}"
            path.write_bytes(gzip.compress(content) if suffix else content)
    return kept[0], kept[1]


QUICK = ("--fraction", "0.3", "--batch-size", "32")  # 14 steps an epoch


def on_manifolds(results: dict) -> set[str]:
    return {entry["names"][0] for entry in results["plan"]["entries"] if entry["reason"] is None}


def signal_at(monkeypatch: pytest.MonkeyPatch, step: int, number: int = signal.SIGINT) -> None:
    """Send a signal to this process during its ``step``-th step."""
    original, calls = engine.take_step, iter(range(1, 10**9))

    def interrupted(*args):
        if next(calls) == step:
            signal.raise_signal(number)
        return original(*args)

    monkeypatch.setattr(engine, "take_step", interrupted)


DRAW_CURVES = reporting.draw_curves


@pytest.fixture(autouse=True)
def light_runs(monkeypatch):
    """Undo what ``--threads`` sets for the whole process, and save the time that drawing takes."""
    monkeypatch.setattr(reporting, "draw_curves", lambda path, history: None)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def ctrl_c_interrupts():
    """Take SIGINT as in the foreground: shells make processes in the background ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
