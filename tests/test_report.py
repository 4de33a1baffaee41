"""The report: groups found and measured as by a slow loop, measures by their formulas, feasibility, data."""

from __future__ import annotations

import copy
import json
import math
import sys

import geoopt
import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from layers import Grouped, layers
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fgo_geo
from fgo_geo.measures.report import report

NORMS = ("frobenius", "spectral", "two_to_one")
renormalize = sys.modules["fgo_geo.renormalize"].renormalize


def norms_of(matrix: np.ndarray) -> tuple[float, float, float]:
    """By definition: root of the sum of squares, largest singular value, sum of the norms of the rows."""
    return (
        math.sqrt((matrix**2).sum()),
        np.linalg.svd(matrix, compute_uv=False)[0],
        sum(math.sqrt((row**2).sum()) for row in matrix),
    )


def small_network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 4, 3, stride=2),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 5),
    )


@given(st.data())
def test_every_group_has_the_norms_of_its_concatenated_components(data):
    module, name = data.draw(layers())
    model = nn.Sequential(module.double())
    strategy = data.draw(st.sampled_from(["pi", "po", "pio"]))
    kinds = data.draw(st.lists(st.sampled_from(["sphere", "oblique", "stiefel", "euclidean"]), min_size=1, max_size=3))
    settings = {"strategy": strategy, "include": f"0.{name}", "selection": "random"}
    try:
        plan = fgo_geo.constrain(model, manifolds=kinds, **settings)
    except ValueError:  # components that could not move
        plan = fgo_geo.constrain(model, manifolds="euclidean", **settings)
    (entry,) = plan.constrained
    weight = getattr(module, name).detach().numpy()
    layer = report(model).layer(f"0.{name}")
    groups = Grouped(entry.layout, entry.collections).groups()
    assert layer.kind == "product"
    assert layer.n_groups == len(groups)
    for number, (_, components) in enumerate(groups):
        matrix = np.concatenate([weight.ravel()[positions] for positions in components], axis=1)
        found = [float(getattr(layer.groups, norm)[number]) for norm in NORMS]
        np.testing.assert_allclose(found, norms_of(matrix), rtol=1e-7)
    if entry.layout.storage == "conv":
        found = [float(getattr(layer.layer, norm)) for norm in NORMS]
        np.testing.assert_allclose(found, norms_of(weight.reshape(len(weight), -1)), rtol=1e-7)


BLOCKS = {
    "linear": lambda i, o: nn.Linear(i, o),
    "1x1": lambda i, o: nn.Conv2d(i, o, 1),
    "3x2": lambda i, o: nn.Conv2d(i, o, (3, 2)),
    "transposed": lambda i, o: nn.ConvTranspose1d(i, o, 3),
}


@given(st.sampled_from(list(BLOCKS)), st.integers(1, 12), st.integers(1, 12), st.integers(0, 99))
@example("linear", 64, 10, 0)
@example("linear", 10, 64, 0)
def test_the_same_numbers_have_the_same_norms_and_measures_whatever_governs_them(kind, inputs, outputs, seed):
    """A weight that is one block stands on its short side as a group, and is (outputs, inputs) in the measures."""
    torch.manual_seed(seed)
    constrained = nn.Sequential(BLOCKS[kind](inputs, outputs)).double()
    weight = constrained[0].weight
    shape = weight.transpose(0, 1) if kind == "transposed" else weight
    wide = shape.shape[0] < math.prod(shape.shape[1:])
    plain = copy.deepcopy(constrained)
    if weight.numel() > 1:
        fgo_geo.constrain(constrained, "layer", "sphere", include="0.weight", components="block")
    with torch.no_grad():
        plain[0].weight.copy_(constrained[0].weight)
    renormalised = copy.deepcopy(plain)
    renormalize(renormalised[0], manifold="spectral", components="block", bound=1e4)  # far inside the ball

    entries = plain[0].weight.detach().numpy()
    matrix = (entries.swapaxes(0, 1) if kind == "transposed" else entries).reshape(outputs, -1)
    for model in (plain, constrained, renormalised):
        found = report(model, n_samples=10)
        (layer,) = found.layers
        assert layer.one_block
        assert [layer.worst(norm) for norm in NORMS] == pytest.approx(norms_of(matrix.T if wide else matrix), rel=1e-10)
        assert [float(getattr(layer.layer, norm)) for norm in NORMS] == pytest.approx(norms_of(matrix), rel=1e-10)
        width = max(outputs, inputs)
        for name, value in formulas([[norms_of(matrix)]], 10, width).items():
            for scaling in ("groups", "layers"):
                assert found.measure(name, scaling).value == pytest.approx(value, rel=1e-10, abs=1e-10)


@pytest.mark.parametrize("strategy", ["pi", "po"])
@pytest.mark.parametrize("size", [(64, 10), (10, 64), (10, 8)])
def test_the_same_groups_have_the_same_norms_constrained_and_renormalised(strategy, size):
    """Two blocks of half the inputs (PI) or outputs (PO), on their short sides."""
    torch.manual_seed(0)
    constrained = nn.Sequential(nn.Linear(*size).double())
    renormalised = copy.deepcopy(constrained)
    kinds = ("euclidean", "euclidean")
    fgo_geo.constrain(constrained, strategy, kinds, selection="deterministic", include="0.weight")
    renormalize(renormalised[0], manifold=("spectral", "spectral"), groups=strategy, bound=1e4)
    first, second = (report(model, n_samples=10) for model in (constrained, renormalised))
    halves = np.split(constrained[0].weight.detach().numpy(), 2, axis=1 if strategy == "pi" else 0)
    expected = [norms_of(half if len(half) >= len(half.T) else half.T) for half in halves]
    for found in (first, second):
        assert not found.layers[0].one_block
        groups = torch.stack(list(found.layers[0].groups), dim=1)
        np.testing.assert_allclose(groups.numpy(), expected, rtol=1e-10)
        for name, value in formulas([expected], 10, max(size)).items():
            assert found.measure(name, "groups").value == pytest.approx(value, rel=1e-10)
    for mine, theirs in zip(first.measures, second.measures, strict=True):
        assert mine.value == pytest.approx(theirs.value, rel=1e-10)


def test_a_plain_weight_is_one_group_and_biases_are_left_out():
    model = small_network()
    found = report(model)
    assert [(layer.name, layer.kind, layer.n_groups) for layer in found.layers] == [
        ("0.weight", "plain", 1),
        ("3.weight", "plain", 1),
        ("7.weight", "plain", 1),
    ]
    assert all(layer.violation is layer.feasible is layer.operator_norm is layer.tau is None for layer in found.layers)
    assert set(found.left_out) == {"0.bias", "1.weight", "1.bias", "3.bias", "7.bias"}
    assert found.unfolded == 1
    assert found.measures == ()


def formulas(norms: list[list[tuple[float, float, float]]], n: int, width: int) -> dict[str, float]:
    """Table 1 as it is printed, in floating point."""
    products = [[math.prod(group[k] for group in layer) for k in range(3)] for layer in norms]
    f, s, t = zip(*products, strict=True)
    depth, root = len(norms), math.sqrt(n)
    ratios = [(a / b) ** (2 / 3) for a, b in zip(t, s, strict=True)]
    squares = [(a / b) ** 2 for a, b in zip(f, s, strict=True)]
    return {
        "neyshabur2015": math.log(2**depth * math.prod(f) / root),
        "bartlett2017": math.log(math.prod(s) / root * sum(ratios) ** 1.5),
        "neyshabur2018": math.log(math.prod(s) / root * math.sqrt(depth**2 * width * sum(squares))),
    }


PLACES = ((0, 6), (3, 4), (7, 5))  # layers of the small network and their outputs


def test_the_measures_are_those_of_table_1_over_groups_and_over_layers():
    model = small_network()
    fgo_geo.constrain(model, "pi", ("sphere", "stiefel"), include="3.weight")
    found = report(model, n_samples=100)
    whole = [[norms_of(model[number].weight.detach().double().numpy().reshape(n, -1))] for number, n in PLACES]
    groups = list(zip(*(n.tolist() for n in found.layer("3.weight").groups), strict=True))
    assert len(groups) == 12
    for scaling, norms in (("groups", [whole[0], groups, whole[2]]), ("layers", whole)):
        for name, value in formulas(norms, 100, width=6).items():
            measure = found.measure(name, scaling)
            assert measure.value == pytest.approx(value, rel=1e-10)
            assert measure.margin_value is None
            assert len(measure.factors) == 3
    with pytest.raises(KeyError, match="neyshabur2018"):
        found.measure("pac")
    with pytest.raises(KeyError, match="pass n_samples"):
        report(model).measure("bartlett2017")


def test_a_tied_weight_counts_as_often_as_it_is_used():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.ReLU(), nn.Linear(3, 3, bias=False))
    separate = report(model, n_samples=10)
    model[0].weight = model[2].weight
    tied = report(model, n_samples=10)
    (layer,) = tied.layers
    assert (layer.names, layer.uses) == (("0.weight", "2.weight"), 2)
    assert tied.measure("bartlett2017").factors == (separate.measure("bartlett2017").factors[1],) * 2
    assert "(also 2.weight)" in str(tied)


# -- feasibility -----------------------------------------------------------------------------------


def test_constrained_weights_are_feasible_until_they_are_moved_away():
    model = small_network()
    fgo_geo.constrain(model, "pio", "sphere", radius="unit", include="3.weight")
    before = report(model)
    assert before.feasible
    assert before.layer("3.weight").feasible
    assert before.layer("3.weight").violation < 1e-6
    with torch.no_grad():
        model[3].weight[1, 2] *= 1.1
    after = report(model)
    assert not after.feasible
    assert after.layer("3.weight").violation == pytest.approx(0.1, rel=1e-4)
    assert "NOT FEASIBLE: 1 of them, the worst is 3.weight, off by 0.1" in str(after)


@pytest.mark.parametrize("manifold", [geoopt.Sphere(), fgo_geo.Oblique(), geoopt.Euclidean()])
def test_a_single_manifold_is_one_group(manifold):
    model = nn.Linear(4, 4, bias=False)
    model.weight = geoopt.ManifoldParameter(manifold.projx(torch.randn(4, 4)), manifold=manifold)
    free = isinstance(manifold, geoopt.Euclidean)
    (layer,) = report(model).layers
    assert layer.n_groups == 1
    assert (layer.kind, layer.manifolds) == (("plain", "") if free else ("manifold", type(manifold).__name__))
    with torch.no_grad():
        model.weight.mul_(1.25)
    moved = report(model).layers[0]
    assert (layer.feasible, moved.feasible) == ((None, None) if free else (True, False))
    if isinstance(manifold, geoopt.Sphere):
        assert moved.violation == pytest.approx(0.2, rel=1e-4)


def test_a_renormalised_weight_is_measured_as_computed_and_held_against_its_bound():
    model = small_network()
    renormalize(model[3], manifold=("sphere", "stiefel"), groups="pi", bound=0.5)
    found = report(model, n_samples=10)
    layer = found.layer("3.weight")
    assert (layer.kind, layer.n_groups, layer.module, layer.feasible) == ("renormalised", 12, "Conv2d", True)
    assert layer.manifolds == "renormalised, pi: 6 sphere + 6 stiefel, norms of each group <= 0.5"
    assert max(layer.worst(norm) for norm in NORMS) == pytest.approx(0.5, rel=0.2)
    with torch.no_grad():
        model[3].parametrizations.weight[0].gamma.mul_(2)
    after = report(model).layer("3.weight")
    assert not after.feasible
    assert after.violation == pytest.approx(max(after.worst(norm) for norm in NORMS) / 0.5 - 1)


def test_other_parametrizations_and_missing_values_are_left_out_with_the_reason():
    model = nn.Sequential(nn.utils.parametrizations.orthogonal(nn.Linear(3, 3)), nn.Linear(3, 3), nn.LSTM(3, 3))
    model.append(nn.Linear(3, 3, device="meta"))
    found = report(model)
    assert [layer.name for layer in found.layers] == ["1.weight"]
    assert "layout is not known" in found.left_out["0.parametrizations.weight.original"]
    assert "meta device" in found.left_out["3.weight"]
    with pytest.raises(KeyError, match="recurrent"):
        found.layer("2.weight_hh_l0")
    with pytest.raises(ValueError, match=r"no weight to measure.*one dimension"):
        report(nn.PReLU())


@pytest.mark.parametrize("prepare", ["plain", "constrained", "renormalised"])
def test_a_weight_that_is_not_finite_is_an_error_with_its_name(prepare):
    model = small_network()
    if prepare == "constrained":
        fgo_geo.constrain(model, include="3.weight")
    if prepare == "renormalised":
        renormalize(model[3])
    parameter = model[3].parametrizations.weight.original if prepare == "renormalised" else model[3].weight
    with torch.no_grad():
        parameter[0, 0, 0, 0] = math.nan
    with pytest.raises(ValueError, match=r"'3.weight' has 1 non-finite entry"):
        report(model)


# -- batch normalisation ---------------------------------------------------------------------------


def test_folding_measures_the_weights_that_compute_and_leaves_feasibility_alone():
    model = small_network()
    fgo_geo.constrain(model, "pio", ("sphere", "stiefel"), include="0.weight")
    norm = model[1]
    norm.running_var.fill_(0.25 - norm.eps)
    plain, folded = report(model), report(model, n_samples=10, fold=True)
    for name in NORMS:
        torch.testing.assert_close(
            getattr(folded.layer("0.weight").groups, name), 2 * getattr(plain.layer("0.weight").groups, name)
        )
    assert folded.layer("0.weight").violation == plain.layer("0.weight").violation
    assert (plain.unfolded, folded.unfolded) == (1, 0)
    assert folded.left_out["1.weight"] == "is folded into a layer next to it"
    assert "leave out 1 batch normalisation(s)" in str(plain)
    assert isinstance(model[0].weight, geoopt.ManifoldParameter)


def test_a_norm_that_cannot_be_folded_is_a_diagonal_layer_in_its_place():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.BatchNorm1d(3, affine=False), nn.ReLU(), nn.Linear(3, 2))
    model[2].running_var.copy_(torch.tensor([1.0, 4.0, 16.0]) - model[2].eps)
    found = report(model, n_samples=10, fold=True)
    assert [(layer.name, layer.kind) for layer in found.layers] == [
        ("0.weight", "plain"),
        ("2", "diagonal"),
        ("4.weight", "plain"),
    ]
    expected = norms_of(np.diag([1.0, 0.5, 0.25]))
    assert [found.layer("2").worst(norm) for norm in NORMS] == pytest.approx(expected, rel=1e-6)
    assert found.measure("neyshabur2015").factors[1] == pytest.approx(math.log(expected[0]))


def test_a_norm_by_the_batch_stays_unfolded():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3, track_running_stats=False))
    found = report(model, fold=True)
    assert found.unfolded == 1
    assert "no running statistics" in found.left_out["1.weight"]
    assert "not fixed maps" in str(found)


# -- data ------------------------------------------------------------------------------------------


def dense_norm(layer: nn.Module, shape: tuple[int, ...]) -> float:
    """Largest singular value of the matrix of a layer without bias, column by column."""
    basis = torch.eye(math.prod(shape), dtype=torch.float64).reshape(-1, *shape)
    with torch.no_grad():
        return float(torch.linalg.svdvals(layer(basis).flatten(1))[0])


CASES = {
    "zeros": (nn.Conv2d(2, 3, 3, padding=1, stride=2, bias=False), 1.5),
    "circular": (nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular", bias=False), 1.0),
    "circular, same": (nn.Conv2d(2, 3, 3, padding="same", padding_mode="circular", bias=False), 1.0),
    "circular, wider": (nn.Conv2d(2, 3, 3, padding=2, padding_mode="circular", bias=False), None),
    "reflect": (nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect", bias=False), None),
    "transposed": (nn.ConvTranspose2d(2, 4, 3, stride=2, groups=2, bias=False), 1.5),
}


@pytest.mark.parametrize("case", CASES)
def test_convolutions_have_an_operator_norm_at_the_size_that_they_see(case):
    layer, slack = CASES[case]
    layer.double()
    found = report(layer, torch.zeros(1, 2, 6, 6, dtype=torch.float64)).layers[0].operator_norm
    assert (found is None) == (slack is None)
    if slack is not None:
        exact = dense_norm(layer, (2, 6, 6))
        assert exact * (1 - 1e-9) <= found <= exact * slack * (1 + 1e-9)
        assert "conv norm <=" in str(report(layer, (2, 6, 6)))
        assert report(layer, (2, 6, 6), operator_norms=False).layers[0].operator_norm is None


def test_a_tied_convolution_has_no_operator_norm_if_one_of_its_uses_has_none():
    model = nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"))
    assert report(model[0], (2, 6, 6)).layers[0].operator_norm > 0
    model[1].weight = model[0].weight
    assert report(model, (2, 6, 6)).layers[0].operator_norm is None


@pytest.mark.parametrize("form", ["batch", "size", "labelled", "loader", "unlabelled loader"])
def test_all_forms_of_data(form):
    model = small_network().train()
    model[4].eval()
    statistics = model[1].running_mean.clone()
    images, labels = torch.randn(6, 3, 8, 8), torch.tensor([0, 1, 2, 3, 4, 0])
    data = {
        "batch": images,
        "size": (3, 8, 8),
        "labelled": (images, labels),
        "loader": DataLoader(TensorDataset(images, labels), batch_size=4),
        "unlabelled loader": [images],
    }[form]
    found = report(model, data, n_samples=10, margin_quantile=0.5)
    assert [layer.operator_norm is None for layer in found.layers] == [False, False, True]
    assert [m.training for m in model] == [True] * 4 + [False] + [True] * 3
    assert torch.equal(model[1].running_mean, statistics)
    assert not any(m._forward_hooks for m in model)
    if form not in ("labelled", "loader"):
        assert found.margin is None
        return
    with torch.no_grad():
        logits = model.eval()(images).numpy()
    rows = zip(logits, labels.tolist(), strict=True)
    margins = [row[label] - max(np.delete(row, label)) for row, label in rows]
    assert found.margin == pytest.approx(np.quantile(margins, 0.5), rel=1e-4)


def test_margin_normalised_measures_are_divided_by_the_margin():
    model = nn.Sequential(nn.Linear(2, 2, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(2))
    inputs = torch.tensor([[3.0, 0.0], [0.0, 5.0]])
    found = report(model, (inputs, torch.tensor([0, 1])), n_samples=10, margin_quantile=0.0)
    assert found.margin == 3.0
    for measure in found.measures:
        assert measure.margin_value == pytest.approx(measure.value - math.log(3))
    assert "group form, margin 3" in str(found)
    assert (found.n_labelled, json.loads(found.to_json())["n_labelled"]) == (2, 2)
    wrong = report(model, (inputs, torch.tensor([1, 0])), n_samples=10)
    assert wrong.margin < 0
    assert all(measure.margin_value is None for measure in wrong.measures)
    assert "The margin is -4.8" in str(wrong)


def test_the_width_counts_the_input_channels_of_all_convolution_groups():
    found = report(nn.Conv2d(8, 4, 3, groups=2), n_samples=1)
    assert found.measure("neyshabur2018").scale == pytest.approx(math.log(8) / 2)


def test_the_group_form_is_no_bound_of_the_layer_and_the_report_says_so():
    model = nn.Sequential(nn.Linear(2, 2, bias=False))
    fgo_geo.constrain(model, "po", ("sphere", "oblique"), first_layer=True, classifier=True, radius=0.1)
    found = report(model, n_samples=1)
    for scaling, norm in (("groups", 0.1**2), ("layers", math.hypot(0.1, 0.1))):
        assert found.measure("neyshabur2015", scaling).value == pytest.approx(math.log(2 * norm))
    said = "The group form, a product over all groups, does not bound any norm of a layer"
    assert said in str(found)
    assert said not in str(report(nn.Linear(2, 2), n_samples=1))


class ByKeyword(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3)

    def forward(self, x):
        return self.conv(input=x)


class SelfAttention(nn.MultiheadAttention):
    def forward(self, x):
        return super().forward(x, x, x)[0]


def test_a_report_without_measures_says_what_they_need():
    model = nn.Sequential(nn.Linear(2, 2, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(2))
    labelled = (torch.tensor([[3.0, 0.0], [0.0, 5.0], [0.0, 4.0]]), torch.tensor([0, 1, 1]))
    found = report(model, labelled, margin_quantile=0.0)
    assert (found.measures, found.margin, found.n_labelled) == ((), 3.0, 3)
    missing = "There are no measures: pass n_samples, the number of training samples."
    assert str(found).endswith(f"{missing} The margin is 3, from 3 labelled samples.")
    assert str(report(model)).endswith(missing)
    assert report(model, labelled[0]).n_labelled == 0
    assert "There are no measures" not in str(report(model, labelled, n_samples=3))


@pytest.mark.parametrize(
    ("model", "data", "message"),
    [
        (
            nn.Conv2d(3, 4, 3),
            (1, 8, 8),
            r"Conv2d fails at data of shape \(1, 1, 8, 8\) and type torch.float32: Runtime",
        ),
        (nn.Conv2d(3, 4, 3), torch.zeros(2, 3, 2, 2), r"data of shape \(2, 3, 2, 2\) .*Kernel size can't be greater"),
        (nn.Linear(4, 2), (3,), r"Linear fails at data of shape \(1, 3\).*Give data that the model takes"),
        (nn.Linear(4, 2), torch.zeros(1, 4).long(), r"data of shape \(1, 4\) and type torch.int64: RuntimeError"),
        (nn.Sequential(nn.Flatten(5), nn.Linear(4, 2)), (4,), r"Sequential fails at .*: IndexError"),
        (nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)), (4,), r"Sequential fails at .*: ValueError"),
        (nn.MultiheadAttention(4, 1), (4,), r"MultiheadAttention fails at .*: TypeError: .* missing 2 required"),
        (SelfAttention(4, 1), (2, 3), r"SelfAttention fails at data of shape \(1, 2, 3\) .*: AssertionError"),
        (ByKeyword(), (3, 6, 6), r"ByKeyword fails at data of shape \(1, 3, 6, 6\).*or leave data out"),
        (nn.Conv2d(3, 4, 3), (3, -8, 8), r"data is \(3, -8, 8\); expected the size of one input, of numbers >= 1"),
    ],
)
def test_data_that_the_model_does_not_take(model, data, message):
    with pytest.raises(ValueError, match=f"report: .*{message}"):
        report(model, data)
    assert not any(m._forward_hooks for m in model.modules())


def test_running_out_of_memory_stays_what_it_is():
    class Hungry(nn.Linear):
        def forward(self, x):
            raise torch.OutOfMemoryError("full")

    with pytest.raises(torch.OutOfMemoryError, match="full"):
        report(Hungry(2, 2), (2,))


def test_data_that_do_not_fit_are_refused():
    class Pair(nn.Linear):
        def forward(self, x):
            return super().forward(x), x

    with pytest.raises(ValueError, match="data is float; expected a batch"):
        report(nn.Linear(2, 2), 1.5)
    with pytest.raises(ValueError, match="the outputs must be a tensor, got tuple; leave data out, or wrap"):
        report(Pair(2, 2), (torch.zeros(1, 2), torch.zeros(1, dtype=torch.long)))
    with pytest.raises(ValueError, match="the inputs must be a tensor, got dict"):
        report(nn.Linear(2, 2), [{"x": 1}])
    with pytest.raises(ValueError, match="the labels must be a tensor, got list"):
        report(nn.Linear(2, 2), (torch.zeros(1, 2), [0]))
    for nothing in ([], iter(())):
        with pytest.raises(ValueError, match=r"is an empty .*; pass at least one batch, or leave data out"):
            report(nn.Linear(2, 2), nothing)


def test_a_convolution_may_be_called_by_keyword():
    model = ByKeyword()
    assert report(model, (2, 6, 6)).layers[0].operator_norm == report(model.conv, (2, 6, 6)).layers[0].operator_norm


@pytest.mark.parametrize("model", [[nn.Linear(2, 2)], {"weight": torch.eye(2)}, torch.eye(2), "resnet50"], ids=type)
def test_what_is_no_module_is_refused(model):
    with pytest.raises(TypeError, match=rf"report: expected a model, got {type(model).__name__}; pass a"):
        report(model)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_samples": 0}, "n_samples is 0; expected the number of training samples"),
        ({"n_samples": 0.5}, "n_samples is 0.5; expected the number of training samples, a whole number >= 1"),
        ({"n_samples": 1000.5}, "n_samples is 1000.5; expected the number"),
        ({"n_samples": math.nan}, "n_samples is nan; expected the number"),
        ({"n_samples": "50k"}, "n_samples is '50k'; expected the number"),
        ({"n_samples": math.inf}, "n_samples is inf; expected the number"),
        ({"n_samples": True}, "n_samples is True; expected the number"),
        ({"margin_quantile": 3.0}, r"margin_quantile is 3.0; expected a number in \[0, 1\]"),
        ({"depth_factor": "linear"}, r"depth_factor is 'linear'; expected one of \('exponential', 'golowich'"),
    ],
)
def test_arguments_are_checked_before_anything_is_measured(arguments, message):
    with pytest.raises(ValueError, match=f"report: {message}"):
        report(nn.Linear(2, 2, device="meta"), **arguments)


def test_the_number_of_samples_may_come_from_numpy():
    layer = nn.Linear(2, 2)
    for number in (np.int64(7), np.float32(7), 7.0):
        assert report(layer, n_samples=number).to_json() == report(layer, n_samples=7).to_json()


def test_a_model_without_parameters():
    with pytest.raises(ValueError, match="report: ReLU has no weight to measure: there are no parameters"):
        report(nn.ReLU(), (3,))
    norm = nn.BatchNorm1d(3, affine=False)
    norm.running_var.fill_(4 - norm.eps)
    (layer,) = report(norm, (3,), fold=True).layers
    assert (layer.name, layer.kind, layer.worst("spectral")) == ("", "diagonal", pytest.approx(0.5))


def test_a_collection_of_parameters_has_no_layers():
    for parameters in (nn.ParameterDict({"a": torch.eye(2)}), nn.ParameterList([torch.eye(2)])):
        message = rf"{type(parameters).__name__} has no weight to measure: \w is '\w' .*of unknown layout.*matrix_norms"
        with pytest.raises(ValueError, match=message):
            report(parameters)


def test_a_weight_declared_by_hand_is_measured_wherever_it_is():
    points = fgo_geo.Oblique(radius=0.5).random(6, 2, 3, 3)
    layer = nn.ParameterDict({"w": geoopt.ManifoldParameter(points, manifold=points.manifold), "b": torch.zeros(6)})
    model = nn.ModuleDict({"own": layer, "table": nn.Embedding(3, 3)})
    table = geoopt.Sphere().projx(torch.randn(3, 3))
    model["table"].weight = geoopt.ManifoldParameter(table, manifold=geoopt.Sphere())
    found = report(model)
    assert [each.name for each in found.layers] == ["own.w"]
    assert (found.layers[0].kind, found.layers[0].feasible) == ("manifold", True)
    expected = norms_of(points.double().numpy().reshape(6, 18))
    assert [float(getattr(found.layers[0].layer, norm)) for norm in NORMS] == pytest.approx(expected)
    assert "lookup table" in found.left_out["table.weight"]
    with torch.no_grad():
        layer["w"][0, 0] *= 2
    assert not report(model).feasible


# -- step sizes ------------------------------------------------------------------------------------


def test_step_sizes_of_the_latest_step():
    model = small_network()
    fgo_geo.constrain(model, "pio", ("sphere", "stiefel"), include="3.weight")
    optimizer = fgo_geo.RiemannianFGSGD(model.parameters(), lr=0.1)
    assert report(model, optimizer=optimizer).layer("3.weight").tau is None
    (30 * model(torch.randn(8, 3, 8, 8)).square().sum()).backward()
    optimizer.step()
    found = report(model, optimizer=optimizer)
    tau = optimizer.step_scales()[model[3].weight].double().numpy()
    statistics = found.layer("3.weight").tau
    assert statistics.share_above_one == np.mean(tau > 1) > 0
    assert statistics.median == pytest.approx(np.median(tau))
    assert statistics.maximum == tau.max()
    assert found.layer("0.weight").tau is None
    assert "τ > 1" in str(found)
    with pytest.raises(TypeError, match="optimizer is SGD, which has no step_scales"):
        report(model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))


def test_an_optimiser_on_manifolds_has_step_sizes_to_report():
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4), nn.Linear(4, 3))
    fgo_geo.constrain(model, "layer", "stiefel")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    handle = fgo_geo.on_manifolds(optimizer)
    (30 * model(torch.randn(8, 6)).square().sum()).backward()
    optimizer.step()
    name = next(iter(fgo_geo.plan_of(model).parameters()))
    statistics = report(model, optimizer=optimizer).layer(name).tau
    assert statistics.maximum == float(handle.step_scales()[model.get_parameter(name)].max()) > 1
    assert report(model, optimizer=handle).layer(name).tau == statistics
    copied, again = copy.deepcopy((model, optimizer))
    assert report(copied, optimizer=again).layer(name).tau is None  # it has taken no step yet
    handle.remove()
    with pytest.raises(TypeError, match=r"AdamW, which has no step_scales.*or an optimiser that fgo_geo\.on_manifolds"):
        report(model, optimizer=optimizer)
