"""The training example: what it measures, that it resumes bit for bit, its data, its flags and its messages."""

from __future__ import annotations

import functools
import importlib
import io
import json
import math
import os
import pickle
import random
import signal
import subprocess
import sys
from pathlib import Path

import geoopt
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torchvision import datasets

import fgo_geo

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))
checkpoint, data, measures, models, reporting, train = map(
    importlib.import_module, ("checkpoint", "data", "measures", "models", "reporting", "train")
)


def on_manifolds(results: dict) -> set[str]:
    return {entry.name for entry in fgo_geo.Plan.from_json(json.dumps(results["plan"])).constrained}


def run(output: Path, *arguments: str) -> dict:
    """Train in this process and return the results file."""
    assert train.main([*arguments, "--output", str(output)]) == 0
    return json.loads((output / "results.json").read_text())


def load(output: Path) -> dict:
    """Return the checkpoint without the times, which no two runs share."""
    state = checkpoint.load(output / "checkpoint.pt")
    for epoch in state["history"]:
        del epoch["seconds"]
    return state


def bits(value: object) -> object:
    """Return nested containers with every tensor replaced by its type, shape and bytes."""
    if isinstance(value, torch.Tensor):
        return value.dtype, tuple(value.shape), value.contiguous().numpy().tobytes()
    if isinstance(value, dict):
        return {key: bits(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [bits(entry) for entry in value]
    return value


def interrupt(monkeypatch: pytest.MonkeyPatch, module: object, name: str, call: int) -> None:
    """Press Ctrl-C when ``module.name`` is called for the given time, counted from 1."""
    original, calls = getattr(module, name), iter(range(1, 10**9))

    def interrupted(*args, **kwargs):
        if next(calls) == call:
            signal.raise_signal(signal.SIGINT)
        return original(*args, **kwargs)

    monkeypatch.setattr(module, name, interrupted)


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


@pytest.fixture
def folder(tmp_path):
    """A folder in ImageNet's layout: 9 training and 4 validation images of two classes."""
    generator = np.random.default_rng(0)
    for part, count in (("train", 9), ("val", 4)):
        for index in range(count):
            label = ("ant", "bee")[index % 2]
            path = tmp_path / "images" / part / label / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = generator.integers(0, 128, (40, 48, 3)) + 127 * (label == "bee")
            Image.fromarray(pixels.astype(np.uint8)).save(path)
    return tmp_path / "images"


@pytest.fixture
def cifar(tmp_path, monkeypatch):
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
                write(tmp_path / dataset.base_folder / name, images(key, list(range(10))))
        names = {meta: [f"class {i}" for i in range(classes)]}
        write(tmp_path / dataset.base_folder / dataset.meta["filename"], names)
        monkeypatch.setattr(dataset, "meta", dataset.meta | {"md5": None})
    return tmp_path


# --- a run and its measurements ---------------------------------------------------------------------------------


def test_a_run_prints_plain_lines_and_leaves_its_files(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(reporting, "draw_curves", DRAW_CURVES)
    results = run(tmp_path, "--epochs", "2", "--seed", "3")
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    assert "\r" not in printed
    lines = printed.splitlines()
    header = next(number for number, line in enumerate(lines) if line.split()[:2] == ["epoch", "lr"])
    assert [line.split()[0] for line in lines[header : header + 3]] == ["epoch", "1", "2"]
    assert len(lines) == header + 6
    assert all(0 < len(line) <= 100 for line in lines[header:-1])
    accuracy = results["final"]["test_accuracy"]
    assert f"Final accuracy: {accuracy:.2%} of 360 test images" in printed
    assert f"Largest constraint violation: {results['final']['largest_violation']:.1e}" in printed
    assert f"Files: {tmp_path}/results.json, curves.png, checkpoint.pt" in printed
    assert [e["epoch"] for e in results["epochs"]] == [1, 2]
    assert results["settings"]["seed"] == 3
    assert results["settings"]["threads"] == torch.get_num_threads() == 1
    assert results["versions"]["torch"] == torch.__version__
    assert on_manifolds(results) == {"0.weight", "3.weight", "7.weight"}
    strategies = {
        c.strategy for e in fgo_geo.Plan.from_json(json.dumps(results["plan"])).constrained for c in e.collections
    }
    assert strategies == {"pio"}
    assert accuracy == results["epochs"][-1]["test_accuracy"]
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint.pt", "curves.png", "results.json"]


def test_the_reported_accuracy_is_that_of_the_saved_network_on_the_held_out_fifth(tmp_path):
    results = run(tmp_path, "--epochs", "2")
    images, labels = load_digits(return_X_y=True)
    _, images, _, labels = train_test_split(images, labels, test_size=0.2, stratify=labels, random_state=0)
    network = models.small_network(1, 10).eval()
    network.load_state_dict(checkpoint.load(tmp_path / "checkpoint.pt")["model"])
    with torch.no_grad():
        outputs = network(torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1)
    assert results["final"]["test_accuracy"] == np.mean(outputs.argmax(1).numpy() == labels)
    loss = torch.nn.functional.cross_entropy(outputs.double(), torch.tensor(labels)).item()
    assert results["epochs"][-1]["test_loss"] == pytest.approx(loss, rel=1e-5)
    assert results["final"]["test_accuracy"] > 0.8


def gram(kernels):
    return kernels.mT @ kernels


CONSTRAINTS = {
    "sphere": lambda w: w.square().sum((-2, -1)) / (2 / w.shape[1]),
    "oblique": lambda w: w.square().sum(-2) / (2 / (w.shape[1] * w.shape[3])),
    "stiefel": lambda w: gram(w) / (2 / (w.shape[1] * w.shape[3])) + 1 - torch.eye(w.shape[3]),
}


@pytest.mark.parametrize("optimizer", ["fgsgd", "rsgd", "radam"])
@pytest.mark.parametrize("kind", CONSTRAINTS)
def test_every_riemannian_optimiser_keeps_every_kernel_on_its_manifold(tmp_path, optimizer, kind):
    results = run(tmp_path, "--optimizer", optimizer, "--manifolds", kind, "--epochs", "1")
    weights = checkpoint.load(tmp_path / "checkpoint.pt")["model"]
    for name in ("0.weight", "3.weight", "7.weight"):
        should_be_one = CONSTRAINTS[kind](weights[name].double())
        torch.testing.assert_close(should_be_one, torch.ones_like(should_be_one), rtol=0, atol=1e-5)
    assert 0 < results["final"]["largest_violation"] < 1e-5
    assert results["epochs"][0]["train_loss"] < math.log(10)
    assert (results["epochs"][0]["median_tau"] is None) == (optimizer != "fgsgd")


def test_plain_sgd_constrains_nothing_and_equals_fgsgd_without_manifolds(tmp_path):
    sgd = run(tmp_path / "sgd", "--optimizer", "sgd", "--epochs", "1")
    assert sgd["plan"] is None
    assert sgd["final"]["largest_violation"] is None
    run(tmp_path / "fgsgd", "--manifolds", "euclidean", "--epochs", "1")
    assert bits(load(tmp_path / "sgd")["model"]) == bits(load(tmp_path / "fgsgd")["model"])


def test_linear_layers_can_be_constrained_and_the_step_size_be_constant(tmp_path):
    results = run(
        tmp_path,
        *("--linear-manifold", "oblique", "--radius", "0.5", "--step-size", "constant"),
        *("--schedule", "constant", "--epochs", "2"),
    )
    rows = checkpoint.load(tmp_path / "checkpoint.pt")["model"]["12.weight"].norm(
        dim=1
    )  # 10 x 64: columns once upright
    torch.testing.assert_close(rows, torch.full_like(rows, 0.5))
    assert [e["share_tau_above_1"] for e in results["epochs"]] == [0, 0]
    assert [e["lr"] for e in results["epochs"]] == [0.2, 0.2]


def test_the_curves_of_an_unconstrained_run_leave_out_what_it_has_not(tmp_path):
    panels = []
    for optimizer in ("sgd", "rsgd", "fgsgd"):
        history = run(tmp_path, "--optimizer", optimizer, "--epochs", "1")["epochs"]
        DRAW_CURVES(tmp_path / "curves.png", history)
        with Image.open(tmp_path / "curves.png") as image:
            panels.append(image.width / 480)
    assert panels == [2, 3, 5]


def test_the_validation_split_leaves_the_test_images_out(tmp_path, capsys):
    run(tmp_path, "--validation", "--epochs", "1")
    assert "1149 training images, 288 validation images" in capsys.readouterr().out


def test_measures_count_sum_and_summarise_as_defined():
    outputs = torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 0.0]], dtype=torch.float64)
    loss, right, count = measures.loss_correct_count(outputs, torch.tensor([0, 1, 1])).tolist()
    by_hand = math.log1p(math.exp(-2)) + math.log1p(math.exp(-1)) + math.log1p(math.exp(3))
    assert loss == pytest.approx(by_hand, rel=1e-12)
    assert (right, count) == (2, 3)
    steps = [torch.tensor([1.0, 1.5, 0.25]), torch.tensor([1.2, 2.5, 1.0]), torch.tensor([1.1, 4.0, 0.25])]
    assert measures.tau_of_epoch(steps) == dict(zip(measures.TAU, (1.0, 2.5, 0.5), strict=True))


@given(norms=st.lists(st.floats(0.01, 10), min_size=1, max_size=7))
def test_tau_of_a_step_is_that_of_the_gradient_norms(norms):
    """On the circle a tangent gradient of length R has tau = max(1, R (2 + R))."""
    points = [
        geoopt.ManifoldParameter(torch.tensor([1.0, 0.0], dtype=torch.float64), fgo_geo.ScaledSphere()) for _ in norms
    ]
    optimizer = fgo_geo.RiemannianFGSGD(points, lr=0.1)
    for point, norm in zip(points, norms, strict=True):
        point.grad = torch.tensor([5.0, norm], dtype=torch.float64)
    optimizer.step()
    taus = sorted(max(1.0, r * (2 + r)) for r in norms)
    (figures,) = measures.tau_of_step(optimizer)
    share = sum(tau > 1 for tau in taus) / len(taus)
    assert figures.tolist() == pytest.approx([taus[0], taus[(len(taus) - 1) // 2], share], rel=1e-9)


def test_on_a_terminal_a_progress_bar_is_shown_and_removed(tmp_path, monkeypatch):
    screen = io.StringIO()
    terminal = functools.partial(Console, file=screen, force_terminal=True, force_interactive=True)
    monkeypatch.setattr(reporting, "Console", terminal)
    interrupt(monkeypatch, train, "evaluate", call=2)
    assert train.main(["--optimizer", "sgd", "--output", str(tmp_path)]) == 130
    shown = screen.getvalue()
    assert "epoch 2/30" in shown
    show_cursor = "\x1b[?25h"
    assert shown.rindex("epoch 2/30") < shown.rindex(show_cursor) < shown.index("Interrupted")


def test_a_diverged_run_says_so(tmp_path):
    with pytest.raises(SystemExit, match=r"loss became (nan|inf) in epoch 1: start again with a smaller --lr"):
        train.main(["--optimizer", "sgd", "--lr", "1e30", "--output", str(tmp_path)])


# --- interruption and resumption --------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["fgsgd", "radam", "sgd"])
def test_an_interrupted_run_resumes_to_the_identical_bits(tmp_path, monkeypatch, capsys, optimizer):
    flags = ("--optimizer", optimizer, "--epochs", "3")
    run(tmp_path / "straight", *flags)
    with monkeypatch.context() as patch:
        interrupt(patch, train, "measure", call=23 + 6 + 10)  # in the second epoch: 23 + 6 batches each
        assert train.main([*flags, "--output", str(tmp_path / "broken")]) == 130
    printed = capsys.readouterr().out
    assert "the checkpoint holds the end of epoch 1. Go on with" in printed
    assert f"--resume --output {tmp_path / 'broken'}" in printed
    results = run(tmp_path / "broken", "--resume")
    assert bits(load(tmp_path / "broken")) == bits(load(tmp_path / "straight"))
    assert [e["epoch"] for e in results["epochs"]] == [1, 2, 3]


def test_random_crops_of_an_image_folder_resume_to_the_identical_bits(tmp_path, monkeypatch, folder):
    flags = ("--data", "imagefolder", "--data-dir", str(folder), "--image-size", "8", "--epochs", "3")
    run(tmp_path / "straight", *flags)
    with monkeypatch.context() as patch:
        interrupt(patch, train, "evaluate", call=3)
        assert train.main([*flags, "--output", str(tmp_path / "broken")]) == 130
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002 - the generator that the checkpoint has to restore
    torch.manual_seed(1)
    run(tmp_path / "broken", "--resume")
    assert bits(load(tmp_path / "broken")) == bits(load(tmp_path / "straight"))
    assert bits(load(tmp_path / "broken")["random"]) == bits(load(tmp_path / "straight")["random"])


def test_an_interruption_while_a_checkpoint_is_written_keeps_the_one_before(tmp_path, monkeypatch, capsys):
    flags = ("--optimizer", "sgd", "--epochs", "2")
    run(tmp_path / "straight", *flags)
    write, calls = torch.save, iter(range(3))  # before the first epoch, after it, after the second

    def write_half(state, path):
        write(state, path)
        if next(calls) == 2:
            os.truncate(path, 1000)
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", write_half)
        assert train.main([*flags, "--output", str(tmp_path / "broken")]) == 130
    assert "the checkpoint holds the end of epoch 1" in capsys.readouterr().out
    assert len(load(tmp_path / "broken")["history"]) == 1
    run(tmp_path / "broken", "--resume")
    assert bits(load(tmp_path / "broken")) == bits(load(tmp_path / "straight"))


def test_a_run_interrupted_in_its_first_epoch_resumes_from_the_start(tmp_path, monkeypatch):
    flags = ("--optimizer", "sgd", "--epochs", "1")
    run(tmp_path / "straight", *flags)
    with monkeypatch.context() as patch:
        interrupt(patch, train, "measure", call=2)
        assert train.main([*flags, "--output", str(tmp_path / "broken")]) == 130
    run(tmp_path / "broken", "--resume")
    assert bits(load(tmp_path / "broken")) == bits(load(tmp_path / "straight"))


def test_a_finished_run_can_be_made_longer_and_repeated(tmp_path):
    longer = run(tmp_path / "longer", "--optimizer", "rsgd", "--epochs", "2")
    run(tmp_path / "short", "--optimizer", "rsgd", "--epochs", "1")
    resumed = run(tmp_path / "short", "--resume", "--epochs", "2")
    assert bits(load(tmp_path / "short")) == bits(load(tmp_path / "longer"))
    assert resumed["final"]["test_accuracy"] == longer["final"]["test_accuracy"]
    run(tmp_path / "short", "--optimizer", "rsgd", "--epochs", "1")
    assert len(load(tmp_path / "short")["history"]) == 1


def test_ctrl_c_in_a_process_of_its_own(tmp_path):
    process = subprocess.Popen(
        [sys.executable, str(EXAMPLES / "train.py"), "--optimizer", "sgd", "--output", "my run"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )
    for line in process.stdout:
        if line.lstrip().startswith("1 "):
            process.send_signal(signal.SIGINT)
            break
    printed, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert printed.endswith(f"  python {EXAMPLES / 'train.py'} --resume --output 'my run'\n")
    assert "\x1b" not in printed
    assert len(load(tmp_path / "my run")["history"]) >= 1


def test_the_random_generators_are_saved_and_restored(tmp_path):
    def draw():
        return random.random(), np.random.rand(), torch.rand(()).item()  # noqa: NPY002 - the global one

    checkpoint.seed_everything(5)
    draw()
    checkpoint.save(tmp_path / "state.pt", {})
    expected = draw()
    checkpoint.restore_random_state(checkpoint.load(tmp_path / "state.pt")["random"])
    assert draw() == expected


def test_the_order_of_the_images_depends_on_seed_and_epoch_alone():
    orders = {
        (seed, epoch): tuple(torch.randperm(50, generator=checkpoint.epoch_generator(seed, epoch)).tolist())
        for seed in range(4)
        for epoch in range(4)
    }
    assert len(set(orders.values())) == 16
    torch.manual_seed(9)
    assert torch.randperm(50, generator=checkpoint.epoch_generator(1, 2)).tolist() == list(orders[1, 2])


# --- data and models --------------------------------------------------------------------------------------------


def pixels(dataset):
    return [bits(image) for image, _ in dataset]


def labels(dataset):
    return np.array([int(label) for _, label in dataset])


@pytest.mark.parametrize("validation", [False, True])
def test_the_digits_are_split_into_disjoint_stratified_parts(validation):
    splits = data.load("digits", Path(), validation=validation)
    everything, test = load_digits(), data.load("digits", Path()).test
    parts = [splits.train, splits.test] + ([test] if validation else [])
    counts = [np.bincount(labels(part), minlength=10) for part in parts]
    assert sum(counts).tolist() == np.bincount(everything.target).tolist()
    of_both = counts[0] + counts[1]
    assert np.abs(counts[1] - of_both / 5).max() < 1
    originals = torch.tensor(everything.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    assert sorted(image for part in parts for image in pixels(part)) == sorted(bits(image) for image in originals)
    torch.manual_seed(1)
    again = data.load("digits", Path(), validation=validation)
    assert pixels(again.test) == pixels(splits.test)


@pytest.mark.parametrize(("name", "size"), [("cifar10", 50), ("cifar100", 10)])
def test_cifar_is_read_from_its_own_files(cifar, name, size):
    splits = data.load(name, cifar)
    assert (len(splits.train), len(splits.test)) == (size, 10)
    assert splits[2:5] == (int(name.removeprefix("cifar")), 3, 32)
    image, label = splits.test[7]
    assert label == 7
    file = {"cifar10": "cifar-10-batches-py/test_batch", "cifar100": "cifar-100-python/test"}[name]
    raw = torch.from_numpy(pickle.loads((cifar / file).read_bytes())["data"][7]).view(3, 32, 32)
    mean, deviation = torch.tensor([[0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]])
    expected = (raw / 255 - mean.view(3, 1, 1)) / deviation.view(3, 1, 1)
    torch.testing.assert_close(image, expected)
    torch.manual_seed(0)
    assert bits(splits.train[0][0]) != bits(splits.train[0][0])


def test_the_validation_images_of_cifar_are_not_augmented(cifar):
    splits = data.load("cifar10", cifar, validation=True)
    assert (len(splits.train), len(splits.test)) == (40, 10)
    assert sorted(labels(splits.test)) == list(range(10))
    assert pixels(splits.test) == pixels(splits.test)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_a_run_on_cifar(tmp_path, cifar, name):
    flags = ("--data", name, "--data-dir", str(cifar), "--epochs", "1", "--batch-size", "10")
    results = run(tmp_path / "run", *flags)
    assert results["epochs"][0]["train_accuracy"] * len(data.load(name, cifar).train) % 1 == 0
    assert checkpoint.load(tmp_path / "run" / "checkpoint.pt")["model"]["0.weight"].shape[1] == 3


def test_an_image_folder_is_read_in_imagenet_layout(folder):
    splits = data.load("imagefolder", folder, image_size=16)
    assert (len(splits.train), len(splits.test), *splits[2:5]) == (9, 4, 2, 3, 16)
    assert splits.test[0][0].shape == splits.train[0][0].shape == (3, 16, 16)
    assert labels(splits.test).tolist() == [0, 0, 1, 1]
    assert bits(splits.train[0][0]) != bits(splits.train[0][0])


def test_resnet_runs_on_an_image_folder_without_a_last_batch_of_one(tmp_path, folder):
    """Of 9 images in batches of 4 one is left, and 8 x 8 pixels end as 1 x 1: too few to normalise."""
    results = run(
        tmp_path / "run",
        *("--data", "imagefolder", "--data-dir", str(folder), "--image-size", "8", "--workers", "1"),
        *("--model", "resnet18", "--batch-size", "4", "--epochs", "1"),
    )
    assert (results["epochs"][0]["train_accuracy"] * 8).is_integer()
    assert {"conv1.weight", "layer2.0.conv1.weight", "layer2.0.downsample.0.weight"} < on_manifolds(results)
    assert len(on_manifolds(results)) == 20


def test_a_large_image_keeps_the_stem_of_resnet():
    assert models.resnet18(3, 10, 224).conv1.stride == (2, 2)
    assert models.resnet18(1, 10, 224).conv1.weight.shape == (64, 1, 7, 7)


def test_layers_are_chosen_by_kind_and_weights_are_projected_not_redrawn():
    model = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3), torch.nn.Linear(4, 5))
    before = model[0].weight.detach().clone()
    common = {"strategy": "pi", "selection": "random", "radius": "unit", "seed": 0}
    plan = models.constrain(model, convolutions=("sphere",), linears="euclidean", **common)
    assert [entry.name for entry in plan.constrained] == ["0.weight"]
    torch.testing.assert_close(model[0].weight.data, before / before.norm(dim=(-2, -1), keepdim=True))
    fgo_geo.unconstrain(model)
    plan = models.constrain(model, convolutions=("euclidean",), linears="stiefel", **common)
    assert [entry.name for entry in plan.constrained] == ["1.weight"]
    torch.testing.assert_close(model[1].weight.data.T @ model[1].weight.data, torch.eye(4))
    assert models.constrain(model, convolutions=("euclidean",), linears="euclidean", **common) is None


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "fgsgd"])
def test_channel_directed_gradients_change_the_run_and_are_said(tmp_path, capsys, optimizer):
    common = ("--optimizer", optimizer, "--epochs", "1")
    run(tmp_path / "plain", *common)
    assert "gradients" not in capsys.readouterr().out
    run(tmp_path / "smooth", *common, "--channel-directed", "h1", "--channel-axis", "input")
    assert "h1 gradients along input channels (λ = 2.0)" in capsys.readouterr().out
    assert bits(load(tmp_path / "plain")["model"]) != bits(load(tmp_path / "smooth")["model"])


# --- what is refused --------------------------------------------------------------------------------------------

REFUSED = {
    "--lr 0": "--lr: expected a positive number, got '0'",
    "--lr nan": "--lr: expected a positive number, got 'nan'",
    "--momentum 1": "--momentum: expected a number from 0 and below 1, got '1'",
    "--weight-decay -1": "--weight-decay: expected a number from 0, got '-1'",
    "--epochs 0": "--epochs: expected a whole number from 1, got '0'",
    "--batch-size 2.5": "--batch-size: expected a whole number from 1, got '2.5'",
    "--seed -1": "--seed: expected a whole number from 0 and below 2**64, got '-1'",
    "--workers x": "--workers: expected a whole number from 0, got 'x'",
    "--radius big": "--radius: expected kaiming, unit, bound or a positive number, got 'big'",
    "--manifolds sphere,torus": "expected some of sphere,oblique,stiefel,euclidean, got 'sphere,torus'",
    "--strategy layer --manifolds sphere,oblique": "--strategy layer puts whole layers on one manifold",
    "--lam 2": "--lam, --lam-relative and --channel-axis are for --channel-directed",
    "--lam-relative": "--lam, --lam-relative and --channel-axis are for --channel-directed",
    "--channel-directed h0 --lam-relative": "--lam-relative is for the metrics h1 and h1t",
    "--device nowhere": "--device: cannot use 'nowhere'",
    "--data mnist": "--data: invalid choice: 'mnist'",
    "--optimizer sgd --manifolds sphere": "--optimizer sgd would leave the manifolds: drop --strategy",
    "--optimizer adamw --linear-manifold sphere": "or take an --optimizer of fgsgd, rsgd, radam",
    "--optimizer radam --step-size theorem": "--step-size is for --optimizer fgsgd, not for radam",
    "--resume": "--resume: there is no runs/digits-small-fgsgd/checkpoint.pt; name the folder",
}


@pytest.mark.parametrize(("arguments", "message"), REFUSED.items(), ids=REFUSED)
def test_a_bad_flag_is_refused_with_a_reason(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        train.main(arguments.split())
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


UNUSABLE = {
    "--data cifar10": "no complete cifar10 in data: add --download, or name the folder that holds cifar-10-batches-py",
    "--data cifar100": "no complete cifar100 in data",
    "--data imagefolder": "no folder data/train: --data imagefolder needs train/<class>/<image>",
}


@pytest.mark.parametrize(("arguments", "message"), UNUSABLE.items(), ids=UNUSABLE)
def test_data_or_layers_that_do_not_fit_are_refused_with_a_reason(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert train.main(arguments.split()) == 2
    assert message in capsys.readouterr().err
    assert not Path("runs").exists()


def test_an_image_folder_whose_halves_differ_is_refused(folder, capsys):
    (folder / "val" / "bee").rename(folder / "val" / "wasp")
    assert train.main(["--data", "imagefolder", "--data-dir", str(folder)]) == 2
    assert "must have the same classes, but only one of them has ['bee', 'wasp']" in capsys.readouterr().err


def test_download_is_left_to_torchvision(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(datasets.CIFAR10, "download", lambda dataset: asked.append(dataset.root))
    with pytest.raises(FileNotFoundError, match="no complete cifar10"):
        data.load("cifar10", tmp_path, download=True)
    assert asked == [tmp_path]


def test_a_resumed_run_keeps_its_settings_and_an_interrupted_one_is_not_overwritten(tmp_path, monkeypatch, capsys):
    flags = ["--optimizer", "sgd", "--lr", "0.1", "--epochs", "2", "--output", str(tmp_path)]
    with monkeypatch.context() as patch:
        interrupt(patch, train, "evaluate", call=2)
        assert train.main(flags) == 130
    before = (tmp_path / "checkpoint.pt").read_bytes()
    with pytest.raises(SystemExit, match="2"):
        train.main(["--resume", "--output", str(tmp_path), "--lr", "0.3"])
    assert "--resume: the run has --lr 0.1, it cannot become 0.3" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        train.main(flags)
    assert "holds an interrupted run: add --resume to go on, choose another --output" in capsys.readouterr().err
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    assert train.main([*flags, "--resume"]) == 0
