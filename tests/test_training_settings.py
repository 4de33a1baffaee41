"""Settings of the training scripts: where they come from, which is the last word, and what is refused."""

from __future__ import annotations

import pytest
import yaml
from trainer import command_line, settings, train


def parse(*words):
    return command_line.parse(words)


def test_flags_come_after_files_and_files_after_methods(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("method: pio\nlr: 1e-2\nepochs: 7\nmanifolds: [sphere, stiefel]\ndownload: true\n")
    found = parse("--config", str(path), "--epochs", "9")
    assert (found.optim.lr, found.optim.epochs, found.geometry.manifolds) == (0.01, 9, ("sphere", "stiefel"))
    assert (found.geometry.strategy, found.data.download) == ("pio", True)
    found = parse("--method", "st", "--config", str(path), "--manifolds", "oblique", "--no-download")
    assert (found.geometry.strategy, found.geometry.manifolds, found.data.download) == ("layer", ("oblique",), False)


def test_off_is_a_word_in_files_too(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("amp: off\nskips: on\nmodel: plain\n")
    found = command_line.parse(["--config", str(path)])
    assert (found.optim.amp, found.model.skips) == ("off", True)
    assert command_line.make(yaml.safe_load(path.read_text())) == found


def test_the_files_of_a_run_repeat_its_settings():
    for method in command_line.METHODS:
        if method != "pio-adamw":
            made = command_line.make({"method": method, "seed": 3, "lr": 0.123})
            assert command_line.make(yaml.safe_load(yaml.safe_dump(made.plain()))) == made


@pytest.mark.parametrize(
    "words", [["sphere,stiefel"], ["sphere", "stiefel"], ["sphere,", "stiefel"], ["sphere, stiefel"]]
)
def test_kinds_are_separated_by_commas_or_spaces(words):
    assert parse("--manifolds", *words).geometry.manifolds == ("sphere", "stiefel")


def test_defaults_follow_from_other_settings():
    assert parse().geometry.manifolds == settings.MANIFOLDS
    assert parse("--strategy", "layer").geometry.manifolds == ("oblique",)
    assert parse("--optimizer", "sgd").geometry.manifolds == ("euclidean",)
    assert [parse("--optimizer", o).optim.lr for o in ("fgsgd", "sgd", "radam", "adamw")] == [0.2, 0.05, 0.01, 0.003]
    assert parse("--channel-directed", "h1").optim.lam == 2.0
    assert parse("--model", "rcd20").model.norm is None
    assert parse().model.norm == "none"


REFUSED = {
    "--recompute": "--recompute works on residual blocks and layers of transformers, and --model small has neither",
    "--lr 0": "expected a positive number, got '0'",
    "--lr nan": "expected a positive number, got 'nan'",
    "--momentum 1": "expected a number from 0 and below 1, got '1'",
    "--weight-decay -1": "expected a number from 0, got '-1'",
    "--fraction 0": "expected a number above 0 and up to 1, got '0'",
    "--epochs 0": "expected a whole number from 1, got '0'",
    "--batch-size 2.5": "expected a whole number from 1, got '2.5'",
    "--seed -1": "expected a whole number from 0 and below 2**63, got '-1'",
    "--workers x": "expected a whole number from 0, got 'x'",
    "--radius big": "expected kaiming, unit, bound or a positive number, got 'big'",
    "--manifolds sphere,steifel": "got 'steifel': did you mean stiefel?",
    "--data digit": "got 'digit': did you mean digits?",
    "--method pio-eucl": "got 'pio-eucl': did you mean pio-euc?",
    "--epoch 3": "--epochs N",
    "--device nowhere": "cannot use 'nowhere'",
    "--strategy layer --manifolds sphere,oblique": "--strategy layer puts whole layers on one manifold",
    "--lam 2": "--lam, --lam-relative and --channel-axis are for --channel-directed",
    "--lam-relative": "--lam, --lam-relative and --channel-axis are for --channel-directed",
    "--channel-directed h0 --lam-relative": "--lam-relative is for the metrics h1 and h1t",
    "--optimizer sgd --manifolds sphere": "--optimizer sgd would leave the manifolds: drop --strategy",
    "--optimizer adamw --linear-manifold sphere": "or take an --optimizer of fgsgd, rsgd, radam",
    "--optimizer radam --step-size constant": "are for --optimizer fgsgd, not for radam",
    "--renormalize": "--renormalize is for --optimizer sgd or adamw, not for fgsgd",
    "--norm none --model resnet18": "--norm is for small and plain, not for --model resnet18",
    "--accumulate 65": "--batch-size 64 is less than one image for each of 65 accumulated parts",
    "--warmup 30": "--warmup 30.0 leaves nothing of --epochs 30",
    "--ema 0.9 --scales max1": "--ema cannot follow --scales",
    "--parallel fsdp2": "--parallel fsdp2 deals weights to several processes: start the run with torchrun",
    "--config missing.yaml": "--config: cannot read missing.yaml: No such file",
    "--config": "--config needs a value",
}


@pytest.mark.parametrize(("arguments", "message"), REFUSED.items(), ids=REFUSED)
def test_a_bad_flag_is_refused_with_a_reason(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        train.main(arguments.split())
    assert stop.value.code == 2
    shown = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert message in shown
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("lerning_rate: 1\n", "unknown setting 'lerning_rate'"),
        ("epoch: 1\n", "unknown setting 'epoch': did you mean epochs?"),
        ("- 1\n", "expected names and values in"),
        ("a: [", "is no YAML"),
    ],
)
def test_a_bad_file_is_refused_with_a_reason(tmp_path, capsys, content, message):
    path = tmp_path / "bad.yaml"
    path.write_text(content)
    with pytest.raises(SystemExit):
        train.main(["--config", str(path)])
    assert message in capsys.readouterr().err


def test_help_has_examples_and_fits_80_columns(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stop:
        train.main(["--help"])
    shown = capsys.readouterr().out
    assert stop.value.code == 0
    assert "train.py --method pio --seed 1" in shown
    assert "--channel-directed" in shown
    assert max(map(len, shown.splitlines())) <= 80
