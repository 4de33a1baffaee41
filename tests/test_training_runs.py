"""Runs of the training scripts: what they print, measure and leave; and that no interruption loses anything."""

from __future__ import annotations

import functools
import importlib
import io
import json
import math
import warnings
from pathlib import Path

import geoopt
import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch.optim.lr_scheduler import EPOCH_DEPRECATION_WARNING, LRScheduler
from trainer import (  # noqa: F401  (fixtures of every test)
    DRAW_CURVES,
    QUICK,
    bits,
    checkpoints,
    command_line,
    ctrl_c_interrupts,
    engine,
    folder,
    light_runs,
    load,
    measures,
    models,
    on_manifolds,
    reporting,
    run,
    signal_at,
    train,
)

import fgo_geo

# --- a run and its measurements ---------------------------------------------------------------------------------


def test_a_run_prints_plain_lines_and_leaves_its_files(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(reporting, "draw_curves", DRAW_CURVES)
    monkeypatch.chdir(tmp_path)
    assert train.main(["--epochs", "2", "--seed", "3"]) == 0
    output = Path("runs/digits-small-fgsgd-pio-sp+ob+st+euc-seed3")
    results = folder.RunFolder(output).finished()
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    assert "\r" not in printed
    lines = printed.splitlines()
    assert max(map(len, lines)) <= 80
    header = next(number for number, line in enumerate(lines) if line.split()[:2] == ["epoch", "lr"])
    assert [line.split()[0] for line in lines[header : header + 3]] == ["epoch", "1", "2"]
    assert len(lines) == header + 7
    accuracy = results["final"]["test_accuracy"]
    assert f"Final accuracy: {accuracy:.2%} of 360 test images" in printed
    assert f"Largest constraint violation: {results['final']['largest_violation']:.1e}" in printed
    assert f"Files: {output}\n       results.json, epochs.csv, curves.png, model.pt\n" in printed
    assert [e["epoch"] for e in results["epochs"]] == [1, 2]
    assert results["settings"]["seed"] == 3
    assert results["settings"]["threads"] == torch.get_num_threads() == 1
    assert results["versions"]["torch"] == torch.__version__
    assert on_manifolds(results) == {"0.weight", "2.weight", "5.weight"}
    assert results["epochs"][1]["share_tau_above_1"] > 0  # the theorem's step is at work
    assert accuracy == results["epochs"][-1]["test_accuracy"]
    assert (output / "curves.png").read_bytes().startswith(b"\x89PNG")
    files = {path.name for path in output.iterdir()} - {".lock"}
    assert files == {"checkpoints", "curves.png", "epochs.csv", "model.pt", "results.json", "run.yaml"}
    names = [path.name for path in (output / "checkpoints").iterdir()]
    assert sorted(int(name.split("-")[1]) for name in names) == [23, 46]  # the last two
    table = (output / "epochs.csv").read_text().splitlines()
    assert table[0].split(",") == list(results["epochs"][0])
    assert len(table) == 3


def test_the_reported_accuracy_is_that_of_the_saved_network_on_the_held_out_fifth(tmp_path):
    results = run(tmp_path, "--epochs", "4")
    images, labels = load_digits(return_X_y=True)
    _, images, _, labels = train_test_split(images, labels, test_size=0.2, stratify=labels, random_state=0)
    network = models.small_network(1, 10, norm=False).eval()
    network.load_state_dict(torch.load(tmp_path / "model.pt"))
    with torch.no_grad():
        outputs = network(torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1)
    assert results["final"]["test_accuracy"] == np.mean(outputs.argmax(1).numpy() == labels)
    loss = torch.nn.functional.cross_entropy(outputs.double(), torch.tensor(labels)).item()
    assert results["epochs"][-1]["test_loss"] == pytest.approx(loss, rel=1e-5)
    assert results["final"]["calibrated_loss"] == pytest.approx(measures.calibrated_loss(outputs, torch.tensor(labels)))
    assert results["final"]["test_accuracy"] > 0.8


def gram(kernels):
    return kernels.mT @ kernels


CONSTRAINTS = {
    "sphere": lambda w: w.square().sum((-2, -1)) / (2 / w.shape[1]),
    "oblique": lambda w: w.square().sum(-2) / (2 / (w.shape[1] * w.shape[3])),
    "stiefel": lambda w: gram(w) / (2 / (w.shape[1] * w.shape[3])) + 1 - torch.eye(w.shape[3]),
}


@pytest.mark.parametrize(
    "optimizer", [("fgsgd",), ("rsgd",), ("radam",), ("sgd", "--project")], ids=lambda flags: flags[0]
)
@pytest.mark.parametrize("kind", CONSTRAINTS)
def test_every_riemannian_optimiser_keeps_every_kernel_on_its_manifold(tmp_path, optimizer, kind):
    flags = ("--norm", "batch", "--epochs", "1", *QUICK)
    results = run(tmp_path, "--optimizer", *optimizer, "--manifolds", kind, *flags)
    weights = torch.load(tmp_path / "model.pt")
    for name in ("0.weight", "3.weight", "7.weight"):
        should_be_one = CONSTRAINTS[kind](weights[name].double())
        torch.testing.assert_close(should_be_one, torch.ones_like(should_be_one), rtol=0, atol=1e-5)
    assert 0 < results["final"]["largest_violation"] < 1e-5
    assert results["epochs"][0]["train_loss"] < math.log(10)
    assert (results["epochs"][0]["median_tau"] is None) == (optimizer[0] != "fgsgd")


def test_plain_sgd_constrains_nothing_and_equals_fgsgd_without_manifolds(tmp_path):
    flags = ("--epochs", "1", "--lr", "0.05", *QUICK)
    sgd = run(tmp_path / "sgd", "--optimizer", "sgd", *flags)
    assert sgd["plan"] is None
    assert sgd["final"]["largest_violation"] is None
    run(tmp_path / "fgsgd", "--manifolds", "euclidean", *flags)
    assert bits(load(tmp_path / "sgd")["model"]) == bits(load(tmp_path / "fgsgd")["model"])


def test_linear_layers_can_be_constrained_and_the_step_size_be_constant(tmp_path):
    results = run(
        tmp_path,
        *("--linear-manifold", "oblique", "--radius", "0.5", "--step-size", "constant"),
        *("--schedule", "constant", "--epochs", "2", *QUICK),
    )
    rows = torch.load(tmp_path / "model.pt")["9.weight"].norm(dim=1)  # 10 x 64: columns once upright
    torch.testing.assert_close(rows, torch.full_like(rows, 0.5))
    assert [e["share_tau_above_1"] for e in results["epochs"]] == [0, 0]
    assert [e["lr"] for e in results["epochs"]] == [0.2, 0.2]


@pytest.mark.parametrize("method", command_line.METHODS)
def test_every_row_of_table_3_trains(tmp_path, method):
    if method == "pio-adamw" and not hasattr(fgo_geo, "on_manifolds"):
        pytest.skip("on_manifolds is not there yet")
    results = run(tmp_path, "--method", method, "--norm", "batch", "--epochs", "2", *QUICK)
    assert results["final"]["train_loss"] < 2.1 < math.log(10)
    assert (results["plan"] is None) == (method in ("euc", "adamw", "pio-renorm"))
    if results["plan"]:
        assert results["final"]["largest_violation"] < 1e-5


def test_scales_are_refreshed_and_norms_are_bounded(tmp_path):
    run(tmp_path / "scales", "--method", "pio-scales", "--epochs", "2", *QUICK)
    state = load(tmp_path / "scales")["model"]
    assert any("statistics" in name for name in state)
    plan = folder.RunFolder(tmp_path / "scales").finished()["plan"]
    assert any(entry["channel_scales"] for entry in plan["entries"])
    run(tmp_path / "norms", "--method", "pio-renorm", "--bound", "0.7", "--epochs", "1", *QUICK)
    made = command_line.make({"method": "pio-renorm", "bound": 0.7, "fraction": 0.3, "batch_size": 32})
    built = engine.build(made)
    built.model.load_state_dict(torch.load(tmp_path / "norms" / "model.pt"))
    for number in (0, 2, 5):
        norms = fgo_geo.norms.matrix_norms(built.model[number].weight.double())
        assert norms.frobenius.max() <= 0.7 * (1 + 1e-6)
        assert norms.frobenius.max() > 0.01


def test_pictures_show_something_in_every_panel(tmp_path):
    panels = []
    for optimizer in ("sgd", "rsgd", "fgsgd"):
        history = run(tmp_path / optimizer, "--optimizer", optimizer, "--epochs", "2")["epochs"]
        DRAW_CURVES(tmp_path / "curves.png", history)
        with Image.open(tmp_path / "curves.png") as image:
            panels.append((image.width, image.height))
    assert panels == [(1080, 432), (1080, 864), (1080, 864)]


def test_the_validation_split_leaves_the_test_images_out(tmp_path, capsys):
    run(tmp_path, "--validation", "--epochs", "1")
    assert "1,149 training images, 288 validation images" in capsys.readouterr().out


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
    figures = measures.tau_of_step(optimizer)
    share = sum(tau > 1 for tau in taus) / len(taus)
    assert figures.tolist() == pytest.approx([taus[(len(taus) - 1) // 2], taus[-1], share], rel=1e-6)


def test_tau_of_an_epoch_sums_up_its_steps():
    steps = [torch.tensor([1.0, 1.5, 0.25]), torch.tensor([1.2, 2.5, 1.0]), torch.tensor([1.1, 4.0, 0.25])]
    assert measures.tau_of_epoch(steps) == pytest.approx(dict(zip(measures.TAU, (1.1, 4.0, 0.5), strict=True)))


def test_temperature_scaling_undoes_a_scale_of_the_logits():
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(4000, 5, generator=generator)
    labels = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]
    honest = torch.nn.functional.cross_entropy(logits, labels).item()
    for scale in (0.1, 1.0, 7.0):
        assert measures.calibrated_loss(scale * logits, labels) == pytest.approx(honest, rel=2e-3)


def test_on_a_terminal_a_progress_bar_is_shown_and_removed(tmp_path, monkeypatch):
    screen = io.StringIO()
    terminal = functools.partial(Console, file=screen, force_terminal=True, force_interactive=True, width=80)
    monkeypatch.setattr(reporting, "Console", terminal)
    signal_at(monkeypatch, 20)
    assert train.main(["--optimizer", "sgd", *QUICK, "--output", str(tmp_path)]) == 130
    shown = screen.getvalue()
    assert "epoch 2/30" in shown
    show_cursor = "\x1b[?25h"
    assert shown.rindex("epoch 2/30") < shown.rindex(show_cursor) < shown.index("Interrupted")


# --- options of training ----------------------------------------------------------------------------------------


def trained(**flags):
    """A run after one epoch, without files."""
    made = engine.build(
        command_line.make({"fraction": 0.3, "batch_size": 32, "epochs": 1, "evaluate_every": 0, **flags})
    )
    engine.fit(made)
    return made


SMALL = {"width": 4, "fraction": 0.1, "batch_size": 16, "lr": 0.05}


def difference(one, other):
    pairs = zip(one.model.parameters(), other.model.parameters(), strict=True)
    return max(float((a - b).detach().abs().max()) for a, b in pairs)


def test_accumulated_and_recomputed_gradients_are_those_of_the_whole_batch():
    plain, parts = trained(lr=0.05), trained(lr=0.05, accumulate=4)
    assert 0 < difference(plain, parts) < 1e-4
    common = {"model": "narrow18", "width": 4, "fraction": 0.05}
    plain, again = trained(**common), trained(**common, recompute=True)
    assert difference(plain, again) < 1e-5
    statistics = (dict(r.model.named_buffers())["bn1.running_mean"] for r in (plain, again))
    torch.testing.assert_close(*statistics)
    inner = (dict(r.model.named_buffers())["blocks.3.bn1.running_var"] for r in (plain, again))
    torch.testing.assert_close(*inner, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("recompute", [False, True])
def test_activations_are_computed_again_once(recompute):
    """Besides the forward pass, and only in blocks: the first convolution is in none."""
    made = engine.build(command_line.make({**SMALL, "model": "narrow18", "recompute": recompute}))
    passes = []
    for name, layer in made.model.named_modules():
        if isinstance(layer, torch.nn.Conv2d):
            layer.register_forward_hook(lambda *_, name=name: passes.append(name))
    engine.take_step(made, *next(iter(made.batches)))
    assert passes.count("conv1") == 1
    assert {passes.count(name) for name in {*passes} - {"conv1"}} == {1 + recompute}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_compiled_network_trains_as_it_does_without(monkeypatch):
    plain = trained(**SMALL)
    compiled = []
    original = torch.nn.Module.compile

    def quickly(self, *args, **kwargs):
        compiled.append(self)
        return original(self, *args, backend="aot_eager", **kwargs)  # without half a minute of a C++ compiler

    monkeypatch.setattr(torch.nn.Module, "compile", quickly)
    again = trained(**SMALL, compile=True)
    assert compiled == [again.model]
    assert list(again.model.state_dict()) == list(plain.model.state_dict())
    assert difference(plain, again) < 1e-5


def test_losses_are_scaled_for_half_precision_and_steps_that_overflow_are_skipped():
    made = trained(**SMALL, amp="fp16")
    assert made.scaler.get_scale() == 2**16
    assert made.progress.skipped == 0
    made = engine.build(command_line.make({**SMALL, "amp": "fp16"}))
    made.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    before = [weight.detach().clone() for weight in made.model.parameters()]
    engine.take_step(made, *next(iter(made.batches)))
    assert made.progress.skipped == 1
    assert made.scaler.get_scale() == 2.0**39
    assert all(map(torch.equal, before, made.model.parameters()))


def test_the_averages_are_evaluated_and_on_the_manifolds():
    run = trained(ema=0.9, manifolds="stiefel")
    weight = run.trained[2].weight
    assert weight is not run.model[2].weight
    assert float(weight.manifold.violation(weight).detach().max()) < 1e-5
    assert float((weight - run.model[2].weight).detach().abs().max()) > 1e-3


def test_clipping_smoothing_mixup_and_precision_change_the_run():
    plain = trained(manifolds="euclidean", lr=0.05)
    for flags in ({"clip": 0.1}, {"label_smoothing": 0.1}, {"mixup": 0.2}, {"amp": "bf16"}, {"start": "orthogonal"}):
        assert difference(plain, trained(manifolds="euclidean", lr=0.05, **flags)) > 1e-6, flags
    same = trained(manifolds="euclidean", lr=0.05, channels_last=True)
    assert difference(plain, same) < 1e-3


def test_clipping_bounds_the_gradient(monkeypatch):
    norms = []
    step = torch.optim.SGD.step

    def measured(self, *args, **kwargs):
        weights = [p for group in self.param_groups for p in group["params"]]
        norms.append(float(torch.cat([p.grad.flatten() for p in weights]).norm()))
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.SGD, "step", measured)
    trained(optimizer="sgd", clip=0.05)
    assert max(norms) == pytest.approx(0.05, rel=1e-4)


SCHEDULES = {
    ("robbins-monro", 0): lambda t: 1 / (1 + t / (2 * 14)),
    ("cosine", 0): lambda t: (1 + math.cos(math.pi * t / 84)) / 2,
    ("step", 0): lambda t: 1 if t < 42 else 0.1 if t < 63 else 0.01,
    ("constant", 0): lambda t: 1,
    ("cosine", 1): lambda t: 0.01 + 0.99 * t / 14 if t < 14 else (1 + math.cos(math.pi * (t - 14) / 70)) / 2,
    ("robbins-monro", 1): lambda t: 0.01 + 0.99 * t / 14 if t < 14 else 1 / (1 + (t - 14) / (2 * 14)),
}


@pytest.mark.parametrize(("schedule", "warmup"), SCHEDULES)
def test_learning_rates_follow_their_formula(schedule, warmup, monkeypatch):
    flags = {"schedule": schedule, "warmup": warmup, "lr": 0.4, "epochs": 6}
    made = command_line.make({**flags, "time_constant": 2})
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.4)
    scheduler = importlib.import_module("training.optimisers").schedule(made.optim, optimizer, 14)
    if warmup and hasattr(LRScheduler, "_update_lr"):
        update = LRScheduler._update_lr

        def warned(self, epoch):  # as torch 2.6 does where the second schedule begins
            warnings.warn(EPOCH_DEPRECATION_WARNING, UserWarning, stacklevel=2)
            update(self, epoch)

        monkeypatch.setattr(LRScheduler, "_update_lr", warned)
    for t in range(84):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.4 * SCHEDULES[schedule, warmup](t), rel=1e-6), t
        optimizer.step()
        scheduler.step()


# --- what is not finite -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("lr", ["1e6", "1e30"])
def test_a_diverged_run_says_so_in_one_sentence_and_keeps_its_last_good_checkpoint(tmp_path, capsys, lr):
    flags = ("--optimizer", "sgd", "--lr", lr, "--max-bad-steps", "3", *QUICK, "--output", str(tmp_path))
    assert train.main([*flags]) == 3
    printed = capsys.readouterr().out
    last = printed.splitlines()[-1]
    assert last.startswith(
        "Stopped: the loss or the gradient was not finite in 3 steps in a row, the last of them step"
    )
    assert last.endswith(
        f"Start again with a smaller --lr, or with --clip; the last good checkpoint is in {tmp_path}/checkpoints"
    )
    state = load(tmp_path)
    assert all(torch.isfinite(value).all() for value in state["model"].values())


def test_a_poisoned_batch_is_skipped_and_counted(tmp_path, monkeypatch, capsys):
    original, calls = engine.accumulate_gradients, iter(range(100))

    def poisoned(run, images, labels):
        return original(run, images * math.nan if next(calls) in (3, 4, 9) else images, labels)

    monkeypatch.setattr(engine, "accumulate_gradients", poisoned)
    results = run(tmp_path, "--norm", "batch", "--epochs", "2", "--max-bad-steps", "3", *QUICK)
    assert results["final"]["skipped_steps"] == 3
    assert "Steps skipped, not finite: 3" in capsys.readouterr().out
    assert all(torch.isfinite(value).all() for value in torch.load(tmp_path / "model.pt").values())
    assert math.isfinite(results["final"]["test_loss"])
    counted = 434 - 3 * 32  # images of the steps that were taken
    right = results["epochs"][0]["train_accuracy"] * counted
    assert right == pytest.approx(round(right))


def test_a_weight_that_is_not_finite_is_never_saved(tmp_path, monkeypatch, capsys):
    evaluate = engine.evaluate

    def breaking(run):
        with torch.no_grad():
            run.model[9].bias.fill_(math.inf)
        return evaluate(run)

    monkeypatch.setattr(engine, "evaluate", breaking)
    assert train.main(["--epochs", "2", *QUICK, "--output", str(tmp_path)]) == 3
    assert "Stopped: a weight is not finite after step 14" in capsys.readouterr().out
    assert load(tmp_path)["progress"]["step"] == 0


def test_settings_beside_the_results_repeat_the_run(tmp_path):
    run(tmp_path / "first", "--method", "poms-st", "--lr", "0.07", "--epochs", "1", *QUICK)
    text = (tmp_path / "first" / "run.yaml").read_text()
    assert yaml.safe_load(text)["lr"] == 0.07
    run(tmp_path / "second", "--config", str(tmp_path / "first" / "run.yaml"))
    assert bits(load(tmp_path / "first")) == bits(load(tmp_path / "second"))


@pytest.mark.parametrize("optimizer", ["fgsgd", "adamw"])
def test_telemetry_gives_the_angle_of_every_weight_in_every_epoch_and_changes_nothing(tmp_path, optimizer):
    flags = ("--epochs", "2", "--optimizer", optimizer, *QUICK)
    run(tmp_path / "bare", *flags)
    run(tmp_path / "measured", "--telemetry", "5", *flags)
    assert bits(load(tmp_path / "bare")["model"]) == bits(load(tmp_path / "measured")["model"])
    history = json.loads((tmp_path / "measured" / "results.json").read_text())["epochs"]
    for epoch in history:
        angles = {name: value for name, value in epoch.items() if name.startswith("angle/")}
        assert angles
        assert all(0 < angle < 1 for angle in angles.values())
        assert {f"radial/{name.removeprefix('angle/')}" for name in angles} <= set(epoch)
    assert "angle/" in (tmp_path / "measured" / "epochs.csv").read_text()


def test_tensorboard_gets_a_number_for_every_epoch(tmp_path):
    run(tmp_path, "--epochs", "2", "--tensorboard", *QUICK)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("test_accuracy")] == [1, 2]
