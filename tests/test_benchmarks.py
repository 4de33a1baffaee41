"""The benchmarks: they run, their tables have all rows, their records all figures. No time is judged."""

from __future__ import annotations

import importlib
import importlib.util
import json
import random
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import fgo_geo
from fgo_geo.paths.native.library import library

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "benchmarks"))
NAMES = ("step", "train_step", "retractions", "channel_directed", "renormalize")
contestants, publish, timing = map(importlib.import_module, ("contestants", "publish", "timing"))
SCRIPTS = {
    name: importlib.import_module(name) for name in (*NAMES, "profile_step", "growth", "memory", "my_model", "on_gpu")
}
STEP_ROWS = [
    *contestants.PEERS,
    "memory",
    "fgo_geo, mixed, pio, channels_last, auto",
    "fgo_geo, mixed, pio, channels_last, adamw",
    "fgo_geo, mixed, pio, channels_last, reference",
    "fgo_geo, mixed, pio, contiguous, auto",
    "fgo_geo, mixed, po, channels_last, auto",
    "fgo_geo, mixed, pi, channels_last, auto",
    "fgo_geo, stiefel, layer, channels_last, auto",
    *(f"fgo_geo, {kind}, pio, channels_last, auto" for kind in ("sphere", "oblique", "stiefel")),
]
EXPECTED = {
    "step": [STEP_ROWS],
    "train_step": [list(SCRIPTS["train_step"].ROWS)],
    "retractions": [
        [SCRIPTS["retractions"].PRODUCT]
        + ["QR, Cholesky"] * 3
        + ["QR, Geoopt", "QR, fgo_geo retr", "polar, SVD", "polar, fgo_geo retr"]
        + ["polar, fgo_geo retract_bounded"] * 3
    ]
    * 2,
    "channel_directed": [list(SCRIPTS["channel_directed"].VARIANTS)] * 2,
    "renormalize": [
        list(SCRIPTS["renormalize"].VARIANTS),
        [*SCRIPTS["renormalize"].VARIANTS, *SCRIPTS["renormalize"].PEERS],
    ],
}
KEYS = {
    "step": {"milliseconds", "ratio", "rounds", "gigabytes_per_second", "violation"},
    "train_step": {"forward", "backward", "step", "share", "adds", "ratio", "rounds"},
    "retractions": {"milliseconds", "ratio", "rounds", "length", "error", "violation"},
    "channel_directed": {"milliseconds", "ratio", "rounds", "optimizer"},
    "renormalize": {"milliseconds", "ratio", "rounds", "layer"},
}
HAS_MUON = hasattr(torch.optim, "Muon")
HAS_POGO = importlib.util.find_spec("pogo") is not None
MAY_BE_MISSING = {
    *([] if HAS_MUON else ["torch Muon, SGD on vectors"]),
    *([] if HAS_POGO else ["POGO, matrices", "POGO, kernels"]),
}


def run(name, tmp_path, capsys, *arguments):
    """What a script printed, and its record."""
    path = tmp_path / "record.json"
    SCRIPTS[name].main(["--quick", "--json", str(path), *arguments])
    return capsys.readouterr().out, json.loads(path.read_text(encoding="utf-8"))


def names_in(table):
    return [row["name"] if "name" in row else row["variant"] for row in table["rows"]]


@pytest.mark.parametrize("name", NAMES)
def test_every_script_measures_all_its_rows(name, tmp_path, capsys):
    printed, record = run(name, tmp_path, capsys)
    assert record["benchmark"] == name
    assert record["machine"] in printed
    assert record["command"] == f"python examples/benchmarks/{name}.py --quick"
    assert {"rounds", "seed", "tables"} < record.keys()
    for table, names in zip(record["tables"], EXPECTED[name], strict=True):
        assert set(table["left_out"]) <= MAY_BE_MISSING
        assert names_in(table) == [n for n in names if n not in table["left_out"]]
        assert table["title"] in printed
        for row in table["rows"]:
            assert row.keys() - {"name", "variant"} == KEYS[name]
            assert row["rounds"] == 2
            low, middle, high = (row["ratio"][q] for q in ("0.1", "0.5", "0.9"))
            assert 0 < low <= middle <= high
            for error in (row.get("violation"), row.get("error")):
                assert error is None or 0 < error < 1e-5
    lines = [line.strip() for line in printed.splitlines()]
    for row in names_in(record["tables"][0]):
        assert any(line.startswith(row) or f" {row} " in line for line in lines), row


def test_the_parts_of_a_step_add_up(tmp_path, capsys):
    printed, record = run("profile_step", tmp_path, capsys, "--rows", "fused", "matrices", "--top", "4")
    assert [table["title"] for table in record["tables"]] == ["tiny, fused", "tiny, matrices"]
    for table in record["tables"]:
        whole, *parts = table["rows"]
        assert (whole["name"], whole["share"], whole["calls"]) == ("whole step", 100, 1)
        assert len(parts) == 4 + 1
        assert sum(part["milliseconds"] for part in parts) == pytest.approx(whole["milliseconds"])
        assert all(part["share"] > 0 and part["name"] in printed for part in parts)
        largest = [part["milliseconds"] for part in parts[:-1]]
        assert largest == sorted(largest, reverse=True)
    if library() is not None:
        assert {"fgo_bounds", "fgo_update"} <= set(names_in(record["tables"][0]))


def test_which_optimisers_have_a_constraint(tmp_path, capsys):
    _, record = run("step", tmp_path, capsys)
    for row in record["tables"][0]["rows"]:
        constrained = row["name"].startswith(("Geoopt", "fgo_geo")) and "no manifold" not in row["name"]
        assert (row["violation"] is not None) == constrained


@pytest.mark.parametrize(
    ("arguments", "rows"),
    [
        (("--only", "kernels", "--paths", "reference"), ["fgo_geo, mixed, pio, channels_last, reference"]),
        (
            ("--only", "matrices", "--kinds", "stiefel", "sphere"),
            [f"fgo_geo, {row}" for row in ("stiefel, layer, contiguous, auto", "sphere, layer, contiguous, auto")],
        ),
        (
            (
                *("--full", "--kinds", "sphere", "oblique", "--strategies", "pi", "po"),
                *("--formats", "contiguous", "--paths", "reference"),
            ),
            [f"fgo_geo, {k}, {s}, contiguous, reference" for k in ("sphere", "oblique") for s in ("pi", "po")],
        ),
    ],
    ids=("kernels", "matrices", "full"),
)
def test_the_flags_of_step_choose_rows(arguments, rows, tmp_path, capsys):
    _, record = run("step", tmp_path, capsys, *arguments, "--rows", rows[0], "torch*", *rows[1:])
    (table,) = record["tables"]
    assert names_in(table)[-len(rows) :] == rows
    assert {name.split()[0] for name in names_in(table)} == {"torch", "fgo_geo,"}
    numbers = {"--only": {"kernels": 8 * 3 * 9 + 16 * 8 * 9, "matrices": 12 * 16 + 10 * 12}}
    expected = numbers.get(arguments[0], {}).get(arguments[1], 1742)
    assert f"{expected:,} numbers" in table["title"]


def test_rows_can_be_left_out_but_not_the_reference(tmp_path, capsys):
    _, record = run("step", tmp_path, capsys, "--rows", "torch*", "--without", "*fused", "*foreach", "*Muon*")
    assert names_in(record["tables"][0]) == [contestants.REFERENCE]


def test_bandwidth_counts_five_passes_of_single_precision(tmp_path, capsys):
    _, record = run("step", tmp_path, capsys, "--model", "8x5", "--rows", "memory")
    for row in record["tables"][0]["rows"]:
        seconds = row["milliseconds"]["0.5"] / 1e3
        assert row["gigabytes_per_second"] * 1e9 * seconds == pytest.approx(5 * 4 * 8 * 5)


def test_the_share_of_a_step(tmp_path, capsys):
    _, record = run("train_step", tmp_path, capsys, "--rounds", "1", "--rows", "fgo_geo*", "--channels-last")
    (table,) = record["tables"]
    assert "2 images of 16 x 16, channels_last" in table["title"]
    whole = {row["name"]: sum(row[part]["0.5"] for part in ("forward", "backward", "step")) for row in table["rows"]}
    for row in table["rows"]:
        step, time = row["step"]["0.5"], whole[row["name"]]
        assert row["share"]["0.5"] == pytest.approx(step / time)
        assert row["adds"]["0.5"] == pytest.approx(step / (time - step))
        assert row["ratio"]["0.5"] == pytest.approx(time / whole[contestants.REFERENCE])


def test_the_variants_are_attached_and_removed(tmp_path, capsys, monkeypatch):
    script, seen = SCRIPTS["channel_directed"], []
    attach = script.channel_directed

    def counted(optimizer, **arguments):
        seen.append(arguments)
        return attach(optimizer, **arguments)  # raises if one is attached already

    monkeypatch.setattr(script, "channel_directed", counted)
    run("channel_directed", tmp_path, capsys)
    for arguments in filter(None, script.VARIANTS.values()):
        assert seen.count(arguments) >= 2 * (1 + 2)  # optimisers, calls that warm up and rounds


@pytest.mark.parametrize("variant", SCRIPTS["renormalize"].VARIANTS)
def test_which_weights_are_renormalised(variant):
    script = SCRIPTS["renormalize"]
    layer = script.renormalized(nn.Conv2d(4, 4, 3), variant)
    assert nn.utils.parametrize.is_parametrized(layer, "weight") == (variant != "plain")


def test_a_layer_by_its_shape(tmp_path, capsys):
    _, record = run("step", tmp_path, capsys, "--model", "6x4x3x3", "7x5", "--rows", "Geoopt, Euc*", "--rounds", "1")
    assert [names_in(table)[1:] for table in record["tables"]] == [
        ["Geoopt, EuclideanStiefel matrices", "Geoopt, EuclideanStiefel kernels"],
        ["Geoopt, EuclideanStiefel matrices"],
    ]


def test_markdown_tables_have_equal_columns(tmp_path, capsys):
    printed, _ = run("retractions", tmp_path, capsys, "--markdown", "--shapes", "6x2", "--lengths", "0.2")
    lines = [line for line in printed.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 1
    assert len(lines) == 2 + 1 + 2 + 4


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("step", ("--rows", "torus"), "matches no row"),
        ("step", ("--model", "resnet"), "no model 'resnet'"),
        ("step", ("--model", "7x5", "--only", "kernels"), "has no kernels"),
        ("retractions", ("--shapes", "3x5"), "expected n x p with n >= p"),
    ],
)
def test_what_cannot_be_measured_is_refused(name, arguments, message):
    with pytest.raises(SystemExit, match=message):
        SCRIPTS[name].main(["--quick", *arguments])


# -- what the optimisers get --------------------------------------------------------------------------------------


BUILDERS = contestants.PEERS | contestants.SLOW_PEERS


@pytest.mark.parametrize("builder", [name for name in BUILDERS if HAS_MUON or "Muon" not in name])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_every_peer_updates_the_weights_of_its_model(builder, memory_format):
    if "POGO" in builder:
        pytest.importorskip("pogo", reason="pogo-torch is measured where it is installed")
    torch.manual_seed(0)
    model = contestants.model_of("tiny").to(memory_format=memory_format)
    names = contestants.names_of(model, None)
    contestant = BUILDERS[builder](model, names)
    constrained = "Geoopt" in builder and "no manifold" not in builder
    assert (contestant.violation() is not None) == constrained
    assert not constrained or contestant.violation() < 1e-5
    before = [p.detach().clone() for p in contestant.params]
    for param in contestant.params:
        param.grad = torch.randn_like(param)
    contestant.hand_over_gradients()
    contestant.step()
    for param, old in zip(contestant.params, before, strict=True):
        assert any(param is own for own in model.parameters())
        assert not torch.equal(param, old)
    if "extrapolated" not in builder:
        assert len(contestant.params) == len(names)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_matrix_of_a_weight_has_a_row_per_output_channel_and_shares_its_memory(memory_format):
    weight = torch.randn(4, 3, 2, 2).to(memory_format=memory_format)
    rows = contestants._rows(weight)
    assert rows.shape == (4, 12)
    torch.testing.assert_close(rows.norm(dim=1), weight.flatten(1).norm(dim=1))
    rows[2, 5] = 7.0
    assert (weight[2] == 7.0).sum() == 1


def test_the_time_of_a_sample_of_kernels_stands_for_all():
    model = nn.Sequential(nn.Conv2d(20, 10, 3, bias=False), nn.Conv2d(10, 5, 3, bias=False))
    contestant = contestants.geoopt_per_kernel(model, contestants.names_of(model, None))
    assert len(contestant.aliases) == 64
    assert contestant.times == (20 * 10 + 10 * 5) / 64


@pytest.mark.parametrize("only", [None, "kernels", "matrices"])
def test_what_this_package_constrains(only):
    model = contestants.model_of("tiny")
    contestants.ours(model, contestants.names_of(model, only), kind="sphere", strategy="pio", only=only)
    constrained = {entry.name for entry in fgo_geo.plan_of(model).constrained}
    kernels, matrices = {"0.weight", "3.weight"}, {"5.weight", "9.weight"}
    assert constrained == {None: kernels | matrices, "kernels": kernels, "matrices": matrices}[only]


def test_what_compiles_is_warm_and_a_sample_is_multiplied_up(monkeypatch):
    steps = []

    def seconds(work, device):
        work()
        return 2.0

    def builder(model, names):
        return contestants.Contestant(lambda: steps.append(names), [], warm_up=2, times=3)

    monkeypatch.setattr(timing, "seconds", seconds)
    race = SCRIPTS["step"].Race(contestants.model_of("tiny"), [], torch.device("cpu"))
    assert race.seconds("row", builder, "contiguous") == 6
    assert len(steps) == 2 + 1
    assert race.seconds("row", builder, "contiguous") == 6
    assert len(steps) == 2 + 2


# -- rounds and figures -------------------------------------------------------------------------------------------


def test_rounds_hold_every_variant_once_in_changing_order():
    random.seed(0)
    calls = []

    def variant(name):
        return lambda: calls.append(name) or float(len(calls))

    times, left_out = timing.interleaved({name: variant(name) for name in "abc"}, rounds=20)
    assert left_out == {}
    rounds = [tuple(calls[i : i + 3]) for i in range(6, 66, 3)]
    assert calls[:6] == list("aabbcc")
    assert all(sorted(order) == list("abc") for order in rounds)
    assert len(set(rounds)) > 3
    for name in "abc":
        assert times[name].tolist() == [7.0 + 3 * i + order.index(name) for i, order in enumerate(rounds)]


def test_a_slow_variant_sits_out_and_a_broken_one_is_left_out():
    def broken():
        raise RuntimeError("needs a torus\nand more")

    def parts():
        return 1.0, 2.0

    times, left_out = timing.interleaved({"parts": parts, "broken": broken}, rounds=4, budget=0)
    assert left_out == {"broken": "needs a torus"}
    np.testing.assert_array_equal(times["parts"], [[1, 2], *[[np.nan] * 2] * 3])


def test_figures_are_quantiles_of_ratios_within_rounds():
    times = {"a": np.array([1.0, 2.0, 4.0]), "b": np.array([3.0, 2.0, np.nan])}
    figures = timing.figures(times, "a")
    assert figures["a"]["ratio"] == {"0.1": 1, "0.5": 1, "0.9": 1}
    assert figures["b"]["rounds"] == 2
    assert figures["b"]["ratio"] == pytest.approx({"0.1": 1.2, "0.5": 2.0, "0.9": 2.8})
    assert figures["b"]["milliseconds"]["0.5"] == 2500
    assert timing.spread({"0.1": 12.34, "0.5": 23.45, "0.9": 345.6}) == "23.4 (12.3 - 345.6)"


def test_steps_are_tangent_and_of_the_given_length():
    x, u = SCRIPTS["retractions"].tangent((5, 6, 3), 0.7, torch.device("cpu"))
    torch.testing.assert_close(x.mT @ u + u.mT @ x, torch.zeros(5, 3, 3, dtype=torch.float64))
    torch.testing.assert_close(torch.linalg.matrix_norm(u), torch.full((5,), 0.7, dtype=torch.float64))


def test_a_method_that_misses_is_seen():
    retractions = SCRIPTS["retractions"]
    x, u = retractions.tangent((8, 3), 0.1, torch.device("cpu"))
    exact = retractions.accuracy(x, u, retractions.svd, retractions.svd)
    off = retractions.accuracy(x, u, lambda x, u: 1.01 * retractions.svd(x, u), retractions.svd)
    assert exact["error"] < 1e-6
    assert exact["violation"] < 1e-6
    assert off == pytest.approx({"error": 0.01, "violation": 1.01**2 - 1}, rel=1e-3)
    assert retractions.accuracy(x, u, retractions.cholesky_qr, retractions.svd)["error"] > 1e-5
    assert retractions.accuracy(x, u, retractions.cholesky_qr, retractions.qr)["error"] < 1e-6


# -- growth, memory, a reader's model and a GPU ---------------------------------------------------------------------


def test_every_series_of_growth_is_measured_and_drawn(tmp_path, capsys):
    _, record = run("growth", tmp_path, capsys, "--rounds", "1", "--figure", str(tmp_path / "growth.png"))
    (table,) = record["tables"]
    assert {row["series"] for row in table["rows"]} == set(SCRIPTS["growth"].LABELS)
    for row in table["rows"]:
        assert row["weights"] == row["layers"] * row["width"] ** 2 * row["kernel"] ** 2
        assert row["step"]["ratio"]["0.5"] > 0
    layer, po, pi, pio = (row["value"] for row in table["rows"] if row["series"] == "groups")
    assert (layer, po, pi) == (1, 4 * 8, 4 * 8)
    assert 8 < pio < 4 * 8
    assert (tmp_path / "growth.png").stat().st_size > 1000


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from /proc")
def test_the_peak_of_a_call_and_what_stays():
    kept = []

    def work():
        kept.append(torch.ones(10**7))
        del kept[:-1]
        return torch.ones(2 * 10**7).sum()

    peak, stays = SCRIPTS["memory"].peak_of(work, torch.device("cpu"))
    assert 0.9 * 12e7 < peak < 1.5 * 12e7
    assert 0.9 * 4e7 < stays < 1.5 * 4e7


def test_memory_has_all_calls(tmp_path, capsys):
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("the peak is read from /proc")
    _, record = run("memory", tmp_path, capsys)
    calls = ["constrain", "first step", "step", "report", "deepcopy", "torch SGD, first step", "torch SGD, step"]
    assert names_in(record["tables"][0]) == calls


class Translator(nn.Module):
    """A model of a reader: token numbers in, a dictionary out."""

    def __init__(self):
        super().__init__()
        self.embedding, self.first, self.last = nn.Embedding(11, 8), nn.Linear(8, 8), nn.Linear(8, 11)

    def forward(self, tokens):
        return {"logits": [self.last(self.first(self.embedding(tokens)))]}


def test_a_model_of_the_reader_is_measured(tmp_path, capsys):
    target = f"{Translator.__module__}.Translator"
    _, record = run("my_model", tmp_path, capsys, target, "--rounds", "1", "--input", "5", "--tokens", "11")
    (table,) = record["tables"]
    assert table["title"] == f"{target}: {11 * 8 + 8 * 9 + 11 * 9:,} weights, batch 2 x 5"
    assert names_in(table) == list(SCRIPTS["my_model"].ROWS)
    assert table["left_out"] == {}


@pytest.mark.parametrize("target", ["torchvision.models.nothing", "no_such_module.Net", "nothing", "builtins.dict"])
def test_what_gives_no_model_is_refused(target):
    with pytest.raises(SystemExit, match=r"small_net|expected a torch\.nn\.Module"):
        SCRIPTS["my_model"].main(["--quick", target])


def test_the_run_for_a_gpu_starts_all_its_parts(tmp_path):
    script = SCRIPTS["on_gpu"]
    quick = ["retractions"]
    script.main(["--device", "cpu", "--tiny", "--output", str(tmp_path), "--only", *quick])
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert {name: part["result"] for name, part in summary["parts"].items()} == dict.fromkeys(quick, "done")
    record = json.loads((tmp_path / "retractions.json").read_text())
    assert record["tables"]
    for limit, (name, *_) in script.PARTS.values():
        assert (Path(script.HERE) / name).exists()
        assert 0 < limit < script.LIMIT


def test_a_part_that_fails_or_is_too_slow_is_told(tmp_path, monkeypatch):
    script = SCRIPTS["on_gpu"]
    run_ = script.Run(tmp_path, torch.device("cpu"))
    run_.part("bad", 60, [sys.executable, "-c", "raise SystemExit(3)"])
    run_.part("slow", 5, [sys.executable, "-c", "import time; time.sleep(60)"])
    monkeypatch.setattr(script, "LIMIT", 0)
    run_.part("late", 60, [sys.executable, "-c", "pass"])
    parts = json.loads((tmp_path / "summary.json").read_text())["parts"]
    assert [part["result"] for part in parts.values()] == [
        "failed: exit status 3",
        "stopped after 5 s",
        "no time was left",
    ]
    assert run_.failed == ["bad", "slow", "late"]


def test_a_step_that_differs_is_seen(monkeypatch):
    script = SCRIPTS["on_gpu"]
    assert max(script.checks(torch.device("cpu")).values()) < 1e-5
    real, calls = script.steps, []

    def off(model, count):
        calls.append(model)
        return [weight + 1e-3 * (len(calls) > 1) for weight in real(model, count)]

    monkeypatch.setattr(script, "steps", off)
    with pytest.raises(SystemExit, match="differs from double precision"):
        script.checks(torch.device("cpu"))


# -- the page -----------------------------------------------------------------------------------------------------


def test_the_tables_of_the_page_are_renewed_in_place(tmp_path, capsys):
    (tmp_path / "_static").mkdir()
    (tmp_path / "benchmarks").mkdir()
    _, record = run("step", tmp_path, capsys, "--rows", "torch*", "memory")
    (tmp_path / "benchmarks" / "step.json").write_text(json.dumps(record))
    page = tmp_path / "benchmarks.md"
    page.write_text("before\n<!-- step.json -->\nold\n<!-- end -->\nafter\n<!-- other.json -->\nkept\n<!-- end -->\n")
    publish.main(["--docs", str(tmp_path)])
    once = page.read_text()
    publish.main(["--docs", str(tmp_path)])
    assert page.read_text() == once
    assert "old" not in once
    assert "kept" in once
    assert re.fullmatch(r"before\n<!-- step.json -->\n.*\| torch SGD, fused \|.*<!-- end -->\nafter\n.*", once, re.S)
    assert record["machine"] in once
    assert (tmp_path / "_static" / "benchmarks.png").stat().st_size > 1000


def test_records_are_measured_anew_by_their_own_commands(tmp_path, capsys):
    for name in ("_static", "benchmarks"):
        (tmp_path / name).mkdir()
    arguments = ("--shapes", "6x2", "--lengths", "0.2", "--rounds", "1", "--threads", "1")
    _, record = run("retractions", tmp_path, capsys, *arguments)
    one, other = (tmp_path / "benchmarks" / name for name in ("one.json", "other.json"))
    one.write_text(json.dumps(record | {"machine": "an old one"}))
    other.write_text(json.dumps(record | {"machine": "an old one"}))
    publish.main(["--docs", str(tmp_path), "--measure", "one*"])
    fresh = json.loads(one.read_text())
    assert (fresh["command"], fresh["machine"]) == (record["command"], record["machine"])
    assert json.loads(other.read_text())["machine"] == "an old one"


def test_the_published_pages_have_the_tables_of_their_records():
    docs = Path(__file__).parents[1] / "docs"
    pages = [(docs / name).read_text(encoding="utf-8") for name in publish.PAGES]
    records = {p.name: json.loads(p.read_text(encoding="utf-8")) for p in (docs / "benchmarks").glob("*.json")}
    assert set(records) == {name for page in pages for _, name, _ in publish.PLACE.findall(page)}
    for page in pages:
        assert publish.renew(page, records) == page
