"""Generalisation measures against mpmath, which multiplies out products that no floating-point number can hold."""

from __future__ import annotations

import math

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fgo_geo.bounds import (
    bartlett2017,
    bartlett2017_terms,
    margin,
    margins,
    neyshabur2015,
    neyshabur2015_terms,
    neyshabur2018,
    neyshabur2018_terms,
)
from fgo_geo.norms import MatrixNorms, matrix_norms

SPECTRAL = [bartlett2017, neyshabur2018]
MEASURES = [neyshabur2015, *SPECTRAL]


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


# -- Table 1 as printed, in numbers of any size ------------------------------------------------------------------------


def products(norms, field):
    """The product over the groups of every layer."""
    return [mpmath.fprod(map(mpmath.mpf, getattr(layer, field).reshape(-1).tolist())) for layer in norms]


def printed(name, norms, n_samples, margin=1.0, distance_norms=None, width=1.0, depth_factor="exponential"):
    """Natural logarithm of a bound of Table 1, by its formula."""
    depth = len(norms)
    with mpmath.workdps(40):
        rate = 1 / (mpmath.mpf(margin) * mpmath.sqrt(n_samples))
        if name == "neyshabur2015":
            factor = {"exponential": mpmath.mpf(2) ** depth, "golowich": mpmath.sqrt(depth), "none": 1}[depth_factor]
            return float(mpmath.log(factor * rate * mpmath.fprod(products(norms, "frobenius"))))
        spectral = products(norms, "spectral")
        if name == "bartlett2017":
            two_to_one = products(distance_norms or norms, "two_to_one")
            ratios = [mpmath.power(t / s, mpmath.mpf(2) / 3) for t, s in zip(two_to_one, spectral, strict=True)]
            return float(mpmath.log(rate * mpmath.fprod(spectral) * mpmath.power(mpmath.fsum(ratios), 1.5)))
        frobenius = products(distance_norms or norms, "frobenius")
        widths = width if isinstance(width, list) else [width] * depth
        ratios = [w * (f / s) ** 2 for w, f, s in zip(widths, frobenius, spectral, strict=True)]
        return float(mpmath.log(rate * mpmath.fprod(spectral) * depth * mpmath.sqrt(mpmath.fsum(ratios))))


def random_norms(rng: np.random.Generator, groups: list[int | None], spread: float = 1.0) -> list[MatrixNorms]:
    """Norms in the order that norms have; a layer of ``None`` groups has scalars."""
    layers = []
    for count in groups:
        spectral = torch.from_numpy(rng.lognormal(-1, spread, count or 1)).reshape(() if count is None else -1)
        frobenius = spectral * (1 + torch.from_numpy(rng.random(spectral.shape)))
        layers.append(MatrixNorms(frobenius, spectral, frobenius * (1 + torch.from_numpy(rng.random(spectral.shape)))))
    return layers


GROUPS = st.lists(st.one_of(st.none(), st.integers(1, 6)), min_size=1, max_size=5)
SEEDS = st.integers(0, 2**31)


@given(GROUPS, SEEDS, st.integers(1, 10**7), st.floats(1e-3, 1e3), st.data())
def test_every_measure_is_the_printed_formula(groups, seed, n_samples, gamma, data):
    rng = np.random.default_rng(seed)
    norms = random_norms(rng, groups, spread=data.draw(st.sampled_from([0.1, 1.0, 30.0])))
    depth_factor = data.draw(st.sampled_from(["exponential", "golowich", "none"]))
    options = {"margin": gamma, "depth_factor": depth_factor}
    actual = neyshabur2015(norms, n_samples, **options)
    assert actual.item() == pytest.approx(printed("neyshabur2015", norms, n_samples, **options), rel=1e-12, abs=1e-12)

    options = {"margin": gamma, "distance_norms": data.draw(st.sampled_from([None, random_norms(rng, groups)]))}
    actual = bartlett2017(norms, n_samples, **options)
    assert actual.item() == pytest.approx(printed("bartlett2017", norms, n_samples, **options), rel=1e-12, abs=1e-12)

    options["width"] = data.draw(st.sampled_from([64.0, [10.0 + layer for layer in range(len(groups))]]))
    actual = neyshabur2018(norms, n_samples, **options)
    assert actual.item() == pytest.approx(printed("neyshabur2018", norms, n_samples, **options), rel=1e-12, abs=1e-12)
    assert actual.dtype == torch.float64
    assert actual.shape == ()


@pytest.mark.parametrize("measure", MEASURES)
def test_the_measures_at_the_scale_of_resnet152(measure):
    """156 layers of up to 2,000 groups: the products are of the order of exp(-100,000)."""
    rng = np.random.default_rng(0)
    norms = random_norms(rng, [int(count) for count in rng.integers(1, 2000, size=156)])
    actual = measure(norms, 1_281_167).item()
    assert actual < -50_000
    assert actual == pytest.approx(printed(measure.__name__, norms, 1_281_167), rel=1e-12)


@given(GROUPS, SEEDS)
def test_the_terms_make_up_the_printed_formula(groups, seed):
    norms = random_norms(np.random.default_rng(seed), groups)
    layers = [[getattr(n, field).log().sum().item() for n in norms] for field in MatrixNorms._fields]
    frobenius, spectral, two_to_one = (double(*logs) for logs in layers)

    terms = neyshabur2015_terms(norms, 50)
    torch.testing.assert_close(terms.factors, frobenius)
    assert terms.contributions.shape == (0,)
    torch.testing.assert_close(terms.value, terms.factors.sum() + terms.scale)

    for terms, numerator, p in [
        (bartlett2017_terms(norms, 50), two_to_one, 2 / 3),
        (neyshabur2018_terms(norms, 50, width=7.0), frobenius, 2),
    ]:
        torch.testing.assert_close(terms.factors, spectral)
        ratios = terms.contributions - terms.factors.sum()
        torch.testing.assert_close(ratios, numerator - spectral)
        total = terms.factors.sum() + terms.scale + (p * ratios).exp().sum().log() / p
        torch.testing.assert_close(terms.value, total)


@pytest.mark.parametrize("measure", MEASURES)
@given(groups=GROUPS, seed=SEEDS, scale=st.floats(1e-3, 1e3))
def test_scaling_a_layer_scales_the_measure(measure, groups, seed, scale):
    """With the reference zero, every measure is homogeneous of degree one in every layer (here: of one group)."""
    norms = random_norms(np.random.default_rng(seed), [None for _ in groups])
    scaled = [MatrixNorms(*(field * scale for field in norms[0])), *norms[1:]]
    difference = measure(scaled, 10) - measure(norms, 10)
    assert difference.item() == pytest.approx(math.log(scale), rel=1e-9, abs=1e-11)


def test_float32_norms_and_numbers_are_accepted():
    exact = MatrixNorms(double(1.5, 2.0), double(1.25, 0.5), double(2.5, 4.0))
    single = MatrixNorms(*(field.float() for field in exact))
    for measure in MEASURES:
        assert measure([single], 9) == measure([exact], 9)
        assert measure([MatrixNorms(1.5, 1.25, 2.5)], 9) == measure([MatrixNorms(*(f[0] for f in exact))], 9)


@given(st.integers(1, 5), st.integers(1, 6), st.integers(1, 6), SEEDS)
def test_bartlett2017_never_exceeds_neyshabur2018(depth, rows, columns, seed):
    """From ‖w‖_{2→1} <= √A ‖w‖_F and ‖c‖_{2/3} <= L ‖c‖₂; equal for equal layers whose rows have one norm."""
    rng = np.random.default_rng(seed)
    norms, distances = (
        [matrix_norms(torch.from_numpy(rng.standard_normal((rows, columns)))) for _ in range(depth)] * 2
        for _ in range(2)
    )
    for reference in (None, distances):
        smaller = bartlett2017(norms, 10, distance_norms=reference)
        assert smaller <= neyshabur2018(norms, 10, width=float(rows), distance_norms=reference) + 1e-12
    flat = [matrix_norms(torch.ones(rows, columns, dtype=torch.float64))] * depth
    assert bartlett2017(flat, 10).item() == pytest.approx(neyshabur2018(flat, 10, width=float(rows)).item())


# -- Zero --------------------------------------------------------------------------------------------------------------

ZERO = MatrixNorms(*double(0.0, 0.0, 0.0))
ONE = MatrixNorms(*double(2.0, 1.0, 3.0))
DEAD_GROUP = MatrixNorms(*(torch.stack([a, b]) for a, b in zip(ONE, ZERO, strict=True)))


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("norms", [[ZERO], [ONE, ZERO], [ZERO, ZERO, ONE], [ONE, DEAD_GROUP]])
def test_a_network_with_a_zero_layer_has_measure_zero(measure, norms):
    assert measure(norms, 10).item() == -math.inf


@pytest.mark.parametrize(("measure", "distance"), [(bartlett2017, 3.0), (neyshabur2018, 2.0)])
def test_distances_of_unchanged_and_of_zero_layers(measure, distance):
    """A layer at its reference contributes nothing; a zero layer that has moved contributes its distance."""
    at_one = measure([ONE], 1).item()
    depth = 2 if measure is neyshabur2018 else 1
    unchanged = measure([ONE, ONE], 1, distance_norms=[ONE, ZERO]).item()
    assert unchanged == pytest.approx(math.log(depth) + at_one)
    moved = measure([ONE, ZERO], 1, distance_norms=[ONE, ONE]).item()
    assert moved == pytest.approx(math.log(depth * distance))
    assert measure([ONE, ONE], 1, distance_norms=[ZERO, ZERO]).item() == -math.inf


# -- Gradients ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("measure", MEASURES)
def test_gradients(measure):
    weights = [torch.randn(4, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    weights = [w.requires_grad_() for w in weights]
    assert torch.autograd.gradcheck(lambda *ws: measure([matrix_norms(w) for w in ws], 100), weights)


# -- The public suites -------------------------------------------------------------------------------------------------


@pytest.fixture
def suite():
    """Weights, initial weights and their norms; a margin, a number of samples."""
    rng = np.random.default_rng(3)
    shapes = [(16, 27), (32, 144), (10, 32)]
    weights, initial = ([rng.standard_normal(shape) / 4 for shape in shapes] for _ in range(2))
    norms = [matrix_norms(torch.from_numpy(w)) for w in weights]
    distances = [matrix_norms(torch.from_numpy(w - v)) for w, v in zip(weights, initial, strict=True)]
    return weights, initial, norms, distances, 0.7, 5000


def test_names_and_normalisations_of_dziugaite2020(suite):
    """The logarithmic measures of that suite are 0.5 (value - log m), with values made of squared norms."""
    weights, initial, norms, distances, gamma, m = suite
    fro = np.array([np.linalg.norm(w) ** 2 for w in weights])
    spec = np.array([np.linalg.norm(w, 2) ** 2 for w in weights])
    dist = np.array([np.linalg.norm(w - v) ** 2 for w, v in zip(weights, initial, strict=True)])
    prod_of_spec_over_margin = np.log(spec).sum() - 2 * np.log(gamma)
    suite_values = {
        "LOG_PROD_OF_FRO": np.log(fro).sum(),
        "LOG_PROD_OF_FRO_OVER_MARGIN": np.log(fro).sum() - 2 * np.log(gamma),
        "LOG_PROD_OF_SPEC_OVER_MARGIN": prod_of_spec_over_margin,
        "LOG_SPEC_ORIG_MAIN": prod_of_spec_over_margin + np.log((fro / spec).sum()),
        "LOG_SPEC_INIT_MAIN": prod_of_spec_over_margin + np.log((dist / spec).sum()),
    }
    depth = math.log(len(weights))
    spectral = bartlett2017_terms(norms, m, margin=gamma)
    ours = {
        "LOG_PROD_OF_FRO": neyshabur2015(norms, m, depth_factor="none"),
        "LOG_PROD_OF_FRO_OVER_MARGIN": neyshabur2015(norms, m, margin=gamma, depth_factor="none"),
        "LOG_PROD_OF_SPEC_OVER_MARGIN": spectral.factors.sum() + spectral.scale,
        "LOG_SPEC_ORIG_MAIN": neyshabur2018(norms, m, margin=gamma) - depth,
        "LOG_SPEC_INIT_MAIN": neyshabur2018(norms, m, margin=gamma, distance_norms=distances) - depth,
    }
    for name, value in suite_values.items():
        assert ours[name].item() == pytest.approx(0.5 * (value - np.log(m)), rel=1e-12), name


def test_names_and_normalisations_of_generalization_bounds(suite):
    weights, initial, norms, distances, gamma, m = suite
    d, inputs, parameters = len(weights), 3 * 32 * 32, 12345
    fro = np.prod([np.linalg.norm(w) for w in weights]) / gamma
    spec = [np.linalg.norm(w, 2) for w in weights]
    moved = [w - v for w, v in zip(weights, initial, strict=True)]
    l21 = [np.linalg.norm(w, axis=1).sum() for w in moved]
    h_dist = [math.sqrt(len(w)) * np.linalg.norm(w) for w in moved]
    alpha = math.sqrt(d + math.log(inputs))
    beta = math.log(m) * math.log(parameters)
    spec_l21 = sum((a / b) ** (2 / 3) for a, b in zip(l21, spec, strict=True)) ** 1.5
    spec_fro = sum((a / b) ** 2 for a, b in zip(h_dist, spec, strict=True)) ** 0.5
    suite_values = {
        "Frobenious norm": fro,
        "Spectral norm": np.prod(spec) / gamma,
        "Frobenious Bound": alpha * fro / math.sqrt(m),
        "Spec_L_{2,1} Bound": beta * np.prod(spec) / gamma * spec_l21 / math.sqrt(m),
        "Spec_Fro Bound": d * np.prod(spec) / gamma * spec_fro / math.sqrt(m),
    }
    spectral = bartlett2017_terms(norms, 1, margin=gamma)
    golowich = neyshabur2015(norms, m, margin=gamma, depth_factor="golowich")
    widths = [len(w) for w in weights]
    ours = {
        "Frobenious norm": neyshabur2015(norms, 1, margin=gamma, depth_factor="none"),
        "Spectral norm": spectral.factors.sum() + spectral.scale,
        "Frobenious Bound": golowich + math.log(alpha / math.sqrt(d)),
        "Spec_L_{2,1} Bound": bartlett2017(norms, m, margin=gamma, distance_norms=distances) + math.log(beta),
        "Spec_Fro Bound": neyshabur2018(norms, m, width=widths, margin=gamma, distance_norms=distances),
    }
    for name, value in suite_values.items():
        assert ours[name].exp().item() == pytest.approx(value, rel=1e-11), name


# -- Margins -----------------------------------------------------------------------------------------------------------


@st.composite
def classified(draw):
    samples, classes = draw(st.integers(1, 20)), draw(st.integers(2, 5))
    generator = torch.Generator().manual_seed(draw(SEEDS))
    logits = torch.randn(samples, classes, dtype=torch.float64, generator=generator)
    targets = torch.randint(classes, (samples,), generator=generator)
    return logits.to(draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))), targets


@given(classified(), st.floats(0, 1))
def test_margins_and_their_quantiles(case, quantile):
    logits, targets = case
    expected = []
    for row, target in zip(logits.double().numpy(), targets.tolist(), strict=True):
        expected.append(row[target] - max(x for i, x in enumerate(row) if i != target))
    actual = margins(logits, targets)
    torch.testing.assert_close(actual, torch.tensor(expected).to(logits.dtype))
    low = margin(logits, targets, quantile)
    assert isinstance(low, float)
    assert low == pytest.approx(np.percentile(actual.double().numpy(), 100 * quantile), rel=1e-9, abs=1e-9)


def test_margin_of_a_model_in_training_is_a_number():
    logits = torch.tensor([[3.0, 1.0]], requires_grad=True)
    value = margin(logits, torch.tensor([0]))
    assert value == 2.0
    assert neyshabur2015([ONE], 4, margin=value).item() == pytest.approx(math.log(2 * 2 / 2 / 2))
    (g,) = torch.autograd.grad(margins(logits, torch.tensor([0])).sum(), logits)
    assert g.tolist() == [[1.0, -1.0]]


# -- Errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize(
    ("norms", "options", "error", "message"),
    [
        (ONE, {}, TypeError, r"norms is one MatrixNorms; expected a sequence.*\[norms\]"),
        ([], {}, ValueError, r"norms is empty"),
        ([ONE], {"n_samples": 0}, ValueError, r"n_samples is 0; expected a positive"),
        ([ONE], {"n_samples": -3}, ValueError, r"n_samples is -3"),
        ([ONE], {"n_samples": True}, ValueError, r"n_samples is True; expected a positive, finite number"),
        ([ONE], {"margin": True}, ValueError, r"margin is True; expected a positive, finite number"),
        ([ONE], {"margin": np.True_}, ValueError, r"margin is True; expected a positive, finite number"),
        ([ONE], {"margin": 0.0}, ValueError, r"margin is 0.0; expected a positive"),
        ([ONE], {"margin": -1.0}, ValueError, r"margin is -1.0"),
        ([ONE], {"margin": math.nan}, ValueError, r"margin is nan"),
        ([ONE], {"margin": math.inf}, ValueError, r"margin is inf"),
        ([ONE, MatrixNorms(*double(1.0, 1.0, 1.0).sub(3.0))], {}, ValueError, r"norms\[1\].\w+ holds \[-2.0\]"),
        ([ONE, MatrixNorms(*double(math.nan, math.nan, math.nan))], {}, ValueError, r"norms\[1\].\w+ holds \[nan\]"),
        ([ONE, MatrixNorms(*double(math.inf, math.inf, math.inf))], {}, ValueError, r"norms\[1\].\w+ holds \[inf\]"),
        ([MatrixNorms(*torch.ones(3, 0))], {}, ValueError, r"norms\[0\].\w+ holds no group"),
        ([ONE, torch.eye(2)], {}, TypeError, r"norms\[1\] is Tensor; expected a MatrixNorms: measure a layer's weight"),
        ([(1.0, 1.0, 1.0)], {}, TypeError, r"norms\[0\] is tuple; expected a MatrixNorms"),
        (torch.ones(3), {}, TypeError, r"norms is Tensor; expected a sequence with one MatrixNorms per layer"),
        ({"fc": ONE}, {}, TypeError, r"norms is dict; expected a sequence with one MatrixNorms per layer"),
        (
            [ONE, matrix_norms(torch.ones(4, 3, 5, 5))],
            {},
            ValueError,
            r"norms\[1\].\w+ has shape \(4, 3\); expected \(\) for a layer or \(G,\) .*\(weight.flatten\(1\)\)",
        ),
    ],
)
def test_errors_of_every_measure(measure, norms, options, error, message):
    with pytest.raises(error, match=message):
        measure(norms, **{"n_samples": 10, **options})


@pytest.mark.parametrize("measure", SPECTRAL)
@pytest.mark.parametrize(
    ("distances", "error", "message"),
    [
        (ONE, TypeError, r"distance_norms is one MatrixNorms"),
        ([], ValueError, r"distance_norms is empty"),
        ([ONE, ONE, ONE], ValueError, r"distance_norms has \[1, 1, 1\] groups per layer and norms \[1, 2\]"),
        ([ONE, ONE], ValueError, r"distance_norms has \[1, 1\] groups per layer and norms \[1, 2\]"),
        ([ONE, MatrixNorms(*-torch.ones(3, 2))], ValueError, r"distance_norms\[1\].\w+ holds \[-1.0\]"),
        ([ONE, torch.eye(2)], TypeError, r"distance_norms\[1\] is Tensor; expected a MatrixNorms"),
        ([ONE, MatrixNorms(*torch.ones(3, 1, 2))], ValueError, r"distance_norms\[1\].\w+ has shape \(1, 2\)"),
    ],
)
def test_errors_of_distances(measure, distances, error, message):
    with pytest.raises(error, match=message):
        measure([ONE, DEAD_GROUP], 10, distance_norms=distances)


LOGITS = torch.ones(2, 3)
TARGETS = torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: neyshabur2015([ONE], 10, depth_factor="linear"), r"depth_factor is 'linear'; expected one of"),
        (lambda: neyshabur2018([ONE], 10, width=0), r"width is 0; expected a positive"),
        (lambda: neyshabur2018([ONE], 10, width=True), r"width is True; expected a positive, finite number"),
        (lambda: neyshabur2018([ONE, ONE], 10, width=[3, True]), r"width\[1\] is True"),
        (lambda: neyshabur2018([ONE, ONE], 10, width=[3, -1]), r"width\[1\] is -1"),
        (lambda: neyshabur2018([ONE, ONE], 10, width=[3]), r"there are 1 widths and 2 layers"),
        (lambda: margins(torch.ones(2, 1), TARGETS), r"logits have shape \(2, 1\)"),
        (lambda: margins(torch.ones(3), TARGETS), r"logits have shape \(3,\)"),
        (lambda: margins(LOGITS, torch.zeros(2, 3)), r"targets \(2, 3\)"),
        (lambda: margins(LOGITS, torch.tensor([0, 3])), r"targets range from 0 to 3; expected \[0, 3\)"),
        (lambda: margins(LOGITS, torch.tensor([-1, 2])), r"targets range from -1 to 2"),
        (lambda: margin(LOGITS, TARGETS, 1.5), r"quantile is 1.5"),
        (lambda: margin(LOGITS, TARGETS, True), r"quantile is True; expected a number in \[0, 1\]"),
        (lambda: margin(LOGITS, TARGETS, np.False_), r"quantile is False"),
        (lambda: margin(LOGITS[:0], TARGETS[:0]), r"there are no samples"),
    ],
)
def test_other_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
