"""Break each formula of the package once, and see which test notices.

    python tests/mutations.py                # all mutants, a minute per ten of them on two cores
    python tests/mutations.py sphere bounds  # those whose file or formula contains a word
    python tests/mutations.py --list

A mutant replaces one piece of source text: a sign, a factor, an axis, a radius, a term that is forgotten. For each one
the package is copied, the text is replaced in the copy, and the test files named with it run there until one fails.
The first failing test is printed. If no test notices, the mutant survives and the exit status is 1. It is 1 too if a
text is not found exactly once: then the formula has changed, and the list has to follow.

Mutants run in forked processes, so that torch is imported once.
"""

# ruff: noqa: E501  the texts to replace are quoted whole
from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import hypothesis
import pytest
from hypothesis import Phase

LONGEST = 300  # seconds for a mutant
_IMPORTED_ONCE = ("torch", "geoopt", "matplotlib.pyplot", "mpmath", "numpy", "scipy.linalg")
ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Mutant:
    """One piece of source text, what replaces it, and the tests that should notice."""

    file: str
    original: str
    replacement: str
    tests: tuple[str, ...]

    def __str__(self) -> str:
        """File and replacement."""
        return f"{self.file}: {self.original.strip()}  ->  {self.replacement.strip()}"


def in_file(file: str, tests: str, *pairs: tuple[str, str]) -> Iterator[Mutant]:
    """Mutants of one file that the same tests should notice: ``name:expression`` are those of ``pytest -k``."""
    for original, replacement in pairs:
        yield Mutant(file, original, replacement, tuple(tests.split()))


MUTANTS = [
    # -- linalg ------------------------------------------------------------------------------------
    *in_file(
        "linalg/products.py",
        "linalg:product+sums+schulz products linalg",
        ("total = torch.addcmul(scaled, column, row, value=-alpha, out=out)", "total = torch.addcmul(scaled, column, row, value=alpha, out=out)"),
        ("precise=True), radius**2, out=out)", "precise=True), radius, out=out)"),
        ("excess.diagonal(dim1=-2, dim2=-1).sub_(1)", "excess.diagonal(dim1=-2, dim2=-1).add_(1)"),
        ("return torch.where(zero, 0, torch.where(zero, 1, x).sqrt())", "return torch.where(zero, 1, torch.where(zero, 1, x).sqrt())"),
    ),
    *in_file(
        "linalg/newton_schulz.py",
        "linalg:schulz+schedule+polish+series products:gap+newton+retraction linalg",
        ("rho = math.sqrt(3 / (1 + low + low * low))", "rho = math.sqrt(3 / (1 + low))"),
        ("low = rho * low * (3 - (rho * low) ** 2) / 2", "low = rho * low * (3 - (rho * low) ** 2) / 4"),
        ("identity * (1.5 * rho), gram, alpha=0.5 * rho**3)", "identity * (1.5 * rho), gram, alpha=0.5 * rho)"),
        ("gram = small_product(small_product(gram, factor), factor)", "gram = small_product(gram, factor)"),
        ("return torch.sub(identity, inverse_root * top**-0.5, out=out)", "return torch.sub(identity, inverse_root / top, out=out)"),
        ("k = subtract_product(gap, gap, gap, beta=2.0)", "k = subtract_product(gap, gap, gap, beta=1.0)"),
        ("rest = subtract_product(k - excess, k, excess, alpha=-1.0)", "rest = subtract_product(k - excess, k, excess, alpha=1.0)"),
        ("return subtract_product(torch.sub(gap, rest, alpha=0.5), gap, rest, alpha=-0.5, out=out)", "return torch.sub(gap, rest, alpha=-0.5, out=out)"),
        ("_SERIES = (1 / 2, -3 / 8, 5 / 16, -35 / 128, 63 / 256)", "_SERIES = (1 / 2, 3 / 8, 5 / 16, -35 / 128, 63 / 256)"),
        ("_SERIES = (1 / 2, -3 / 8, 5 / 16, -35", "_SERIES = (1 / 2, -3 / 8, 5 / 8, -35"),
        ("return math.sqrt(2 * precision / 3)", "return math.sqrt(2 * precision)"),
        ("return subtract_product(y, y, gram_excess(y), alpha=0.5)", "return subtract_product(y, y, gram_excess(y), alpha=1.0)"),
    ),
    *in_file(
        "linalg/factors.py",
        "linalg:qr+polar+repeated linalg",
        ("torch.where(diagonal < 0, -1.0, 1.0)", "torch.where(diagonal > 0, -1.0, 1.0)"),
        ("return polish(u @ vh), vh.mT.contiguous(), h", "return polish(u @ vh), vh.contiguous(), h"),
    ),
    *in_file(
        "linalg/polar_derivative.py",
        "linalg:derivative+gradient derivatives:polar linalg derivatives",
        ("rotation = q @ apply(_SkewEquation, hermitian, along - along.mT, v, h)", "rotation = q @ apply(_SkewEquation, hermitian, along + along.mT, v, h)"),
        ("return rotation + (w - q @ along) @ apply(_Inverse, hermitian, v, h)", "return rotation - (w - q @ along) @ apply(_Inverse, hermitian, v, h)"),
        ("h.unsqueeze(-1) + h.unsqueeze(-2)) @ v.mT", "h.unsqueeze(-1) * 2) @ v.mT"),
        ("return -inverse @ grad @ inverse, None, None", "return inverse @ grad @ inverse, None, None"),
        ("return k @ solution + solution @ k, k, None, None", "return k @ solution, k, None, None"),
    ),
    *in_file(
        "linalg/closed_forms.py",
        "closed_forms",
        ("((b, c), (c, a), (a, b))])", "((b, c), (a, c), (a, b))])"),
        ("i2 = (minors + 2 * i3 * i1).sqrt()\n    delta", "i2 = (minors + i3 * i1).sqrt()\n    delta"),
        ("delta = i1 * i2 - i3", "delta = i1 * i2 + i3"),
        ("sign = torch.where(determinant < 0, -1.0, 1.0)", "sign = torch.where(determinant < 0, 1.0, 1.0)"),
        ("(y.mT @ (y @ axis) + i2[..., None, None] * axis)", "(y.mT @ (y @ axis) - i2[..., None, None] * axis)"),
        ("spread = (deviation.square().sum((0, 1)) / 6).sqrt()", "spread = (deviation.square().sum((0, 1)) / 3).sqrt()"),
        ("largest = mean + 2 * spread * torch.cos(torch.acos(cosine.clamp(-1, 1)) / 3)", "largest = mean + 2 * spread * torch.cos(torch.acos(cosine.clamp(-1, 1)) / 2)"),
    ),
    # -- weights -----------------------------------------------------------------------------------
    *in_file(
        "weights/norms.py",
        "norms",
        ("return torch.linalg.vector_norm(x, dim=-1).sum(-1)", "return torch.linalg.vector_norm(x, dim=-2).sum(-1)"),
        ("labels.long(), x @ x.mT)", "labels.long(), x.mT @ x)"),
        ("two_to_one=root_or_zero(row_squares).sum(-1),", "two_to_one=root_or_zero(row_squares.sum(-1)),"),
    ),
    *in_file(
        "linalg/spectral.py",
        "norms",
        ("torch.linalg.eigvalsh(chunk)[:, -1]", "torch.linalg.eigvalsh(chunk)[:, 0]"),
        ("log_scale = 2 * (log_scale + norm.log())", "log_scale = log_scale + norm.log()"),
        ("((log_norm + log_scale) / 2**iterations).exp()", "((log_norm + log_scale) / 2 ** (iterations + 1)).exp()"),
    ),
    *in_file(
        "weights/operator_norms.py",
        "norms",
        (".amax(-1) * math.sqrt(math.prod(overlaps)),", ".amax(-1),"),
        ("taps = torch.arange(x.shape[dim], device=x.device) * d", "taps = torch.arange(x.shape[dim], device=x.device)"),
        ("reach = dilation * (kernel - 1)\n", "reach = kernel - 1\n"),
        ("torus = _divide_up(n + max(before, overhang), stride) * stride", "torus = _divide_up(n, stride) * stride"),
    ),
    *in_file(
        "weights/radius.py",
        "radius mathematics",
        ("return math.sqrt(2 * rows * columns / fan_in) / norm", "return math.sqrt(rows * columns / fan_in) / norm"),
        ("return math.sqrt(2 * rows * columns / fan_in) / norm", "return math.sqrt(2 * rows * rows / fan_in) / norm"),
        ("return bound / (math.sqrt(count) * max(", "return bound / (count * max("),
        ("bounding_radius(kind, rows, columns, 1, bound, norms) / np.sqrt(counts)", "bounding_radius(kind, rows, columns, 1, bound, norms)"),
        ("max(float(getattr(of_component", "min(float(getattr(of_component"),
    ),
    # -- manifolds ---------------------------------------------------------------------------------
    *in_file(
        "manifolds/sphere.py",
        "manifolds:proju+projx manifolds_moves:geodesic+exp_log+transport manifolds_tensors:radius manifolds manifolds_moves manifolds_tensors derivatives",
        ("return y * (radius / root_of_sum(y, dim))", "return y / root_of_sum(y, dim)"),
        ("inner_sum(x, u, dim) / radius**2, value=-1)", "inner_sum(x, u, dim) / radius, value=-1)"),
        ("inner_sum(x, u, dim) / radius**2, value=-1)", "inner_sum(x, u, dim) / radius**2, value=1)"),
        ("return _onto(x + u, radius, dim)", "return _onto(x + 0.99 * u, radius, dim)"),
        ("cosine(squared) * x + sinc(squared) * u", "cosine(squared) * x - sinc(squared) * u"),
        ("squared = inner_sum(u, u, dim) / radius**2\n    return _onto", "squared = inner_sum(u, u, dim)\n    return _onto"),
        ("return 2 * torch.atan2(root_of_sum(x - y, dim), root_of_sum(x + y, dim))", "return torch.atan2(root_of_sum(x - y, dim), root_of_sum(x + y, dim))"),
        ("4 * squared * arctangent(squared) ** 2, angle", "squared * arctangent(squared) ** 2, angle"),
        ("(1 + squared) * arctangent(squared), stretch)", "arctangent(squared), stretch)"),
        ("stretch = torch.where(length > 0, radius * theta", "stretch = torch.where(length > 0, theta"),
        ("along = inner_sum(u, v, dim) / radius**2", "along = inner_sum(u, v, dim)"),
        ("(sinc(squared / 4) ** 2 / 2 * u + sinc(squared) * x)", "(sinc(squared / 4) ** 2 / 2 * u)"),
        ("(sinc(squared / 4) ** 2 / 2 * u + sinc(squared) * x)", "(sinc(squared) ** 2 / 2 * u + sinc(squared) * x)"),
        ("self.radius_for(x) ** 2 * angle_squared(x, y, self._dims)", "self.radius_for(x) * angle_squared(x, y, self._dims)"),
        ("distance = self.radius_for(x) * angle(x, y, self._dims)", "distance = angle(x, y, self._dims)"),
        ("deviation = (root_of_sum(x, self._dims) / self.radius_for(x) - 1).abs()", "deviation = (root_of_sum(x, self._dims) - self.radius_for(x)).abs()"),
    ),
    *in_file("manifolds/oblique.py", "manifolds", ("_dims = (-2,)", "_dims = (-1,)")),
    *in_file(
        "manifolds/stiefel.py",
        "manifolds:proju+moments+columns manifolds_moves:geodesic+oracle+bounded manifolds_tensors:radius manifolds manifolds_moves manifolds_tensors norms",
        ("return subtract_product(u, x, twice, alpha=0.5 / radius**2)", "return subtract_product(u, x, twice, alpha=1.0 / radius**2)"),
        ("return subtract_product(u, x, twice, alpha=0.5 / radius**2)", "return subtract_product(u, x, twice, alpha=0.5 / radius)"),
        ("return subtract_product(u, x, twice / (2 * radius**2))", "return subtract_product(u, x, twice / (2 * radius))"),
        ("twice = along + along.mT", "twice = along - along.mT"),
        ('factor = polar_factor if self.retraction == "polar" else qr_factor', "factor = qr_factor"),
        ("exponential(x.to(wide) / radius, u.to(wide) / radius)", "exponential(x.to(wide) / radius, u.to(wide))"),
        ("return radius * stiefel_geodesics.logarithm(q, target)", "return stiefel_geodesics.logarithm(q, target)"),
        ("return self.radius_for(gaussian) * qr_factor(gaussian)", "return qr_factor(gaussian)"),
        ("excess = (inner_sum(u, u, (-2, -1)) * (scale / radius) ** 2)", "excess = (inner_sum(u, u, (-2, -1)) * scale**2)"),
        ("return math.sqrt(columns), 1.0", "return math.sqrt(rows), 1.0"),
    ),
    *in_file(
        "manifolds/stiefel_geodesics.py",
        "manifolds_moves:geodesic+exponential+exp_log derivatives manifolds_moves",
        ("torch.cat((a, -s), -1), torch.cat((identity, a), -1)), -2)\n    along", "torch.cat((a, s), -1), torch.cat((identity, a), -1)), -2)\n    along"),
        ("@ matrix_exponential(-scale * a)", "@ matrix_exponential(scale * a)"),
        ("matrix_exponential(scale * block)", "matrix_exponential(block)"),
        ("return u - q @ sym(q.mT @ u)", "return u - q @ (q.mT @ u)"),
        ("turned = -q @ sym(q_t.mT @ v)", "turned = q @ sym(q_t.mT @ v)"),
        ("s, s_t = v.mT @ v, 2 * sym(v.mT @ v_t)", "s, s_t = v.mT @ v, sym(v.mT @ v_t)"),
        ("turn, turn_t = _exponential_along(-a, -a_t)", "turn, turn_t = _exponential_along(-a, a_t)"),
    ),
    *in_file(
        "manifolds/embedded.py",
        "manifolds:curvature manifolds_moves:transport manifolds manifolds_moves",
        ("return self.radius**-2", "return self.radius**-1"),
        ("return self.proju(y, v)", "return self.proju(x, v)"),
    ),
    *in_file(
        "manifolds/product.py",
        "product:methods+metric+radi+geodesic product mathematics",
        ("products = self.partition.split(u * (u if v is None else v))", "products = self.partition.split(u * u)"),
        ("return self.group_inner(x, u).sqrt()", "return self.group_inner(x, u)"),
        ("return torch.ones_like(part) * radius", "return torch.ones_like(part) / radius"),
        ("distance = root_of_sum(torch.cat(distances), (-1,))", "distance = torch.cat(distances).sum(-1, keepdim=True)"),
        ("return along * velocity + manifold.proju(y, v - along * u)", "return manifold.proju(y, v)"),
        ("return before.index_copy(0, order, values)", "return values"),
    ),
    *in_file("manifolds/balls.py", "renormalize", ("(target / _spectral_norm(x).clamp(min=source))", "(target / _spectral_norm(x))")),
    # -- optim -------------------------------------------------------------------------------------
    *in_file(
        "optim/step_size.py",
        "step_size",
        ("second = 1 + curvature * (rho + norm)", "second = 1 + curvature * (rho - norm)"),
        ("second = 1 + curvature * (rho + norm)", "second = 1 + curvature * norm"),
        ("torch.maximum(2 * rho + norm, second.sqrt())", "torch.maximum(rho + norm, second.sqrt())"),
        ("torch.maximum(2 * rho + norm, second.sqrt())", "torch.maximum(2 * rho + norm, second)"),
        ("return (norm * root).clamp_min(1)", "return root.clamp_min(1)"),
        ("return (norm * root).clamp_min(1)", "return (norm * root).sqrt().clamp_min(1)"),
        ("return 1 / (math.hypot(1, rho) + rho)", "return 1 / (math.hypot(1, rho) - rho)"),
        ("buffer = max(1.0, abs(1 - dampening) / (1 - momentum))", "buffer = max(1.0, abs(1 - dampening) / (1 + momentum))"),
        ("return 1 + momentum * buffer if nesterov else buffer", "return momentum * buffer if nesterov else buffer"),
    ),
    *in_file(
        "optim/schedules.py",
        "schedules",
        ("(1 + self.last_epoch / self.time_constant) ** self.exponent", "(1 + self.last_epoch / self.time_constant)"),
        ("(1 + self.last_epoch / self.time_constant) ** self.exponent", "(1 + self.last_epoch * self.time_constant) ** self.exponent"),
        ("initial / decay for initial", "initial * decay for initial"),
    ),
    *in_file(
        "optim/channel_metrics.py",
        "channel_directed",
        ("return h.shape[0] * (mean_h * mean_k).sum() + lam *", "return (mean_h * mean_k).sum() + lam *"),
        ("return level + lam * rough", "return level + rough"),
        ("return x.roll(-1, 0) - x if", "return x.roll(-1, 0) + x if"),
        ("torch.lerp(g.mean(0, keepdim=True), g, 1 / lam)", "torch.lerp(g.mean(0, keepdim=True), g, lam)"),
        ('level = 1.0 if metric == "h1" else 0.0', 'level = 0.0 if metric == "h1" else 1.0'),
        ("1 / (level + lam * 4 * sine**2))", "1 / (level + lam * 2 * sine**2))"),
        ("torch.complex(2 * sine**2 * gain, -2 * sine * cosine * gain)", "torch.complex(2 * sine**2 * gain, 2 * sine * cosine * gain)"),
        ("z * (lam / left)", "z * (left / lam)"),
    ),
    *in_file(
        "optim/channel_directed.py",
        "channel_directed_parameters:lam_relative+manifold channel_directed_optimisers:manifold channel_directed_parameters channel_directed_optimisers",
        ("(shape[axis] / groups / (2 * math.pi)) ** 2", "shape[axis] / groups / (2 * math.pi)"),
        ("(shape[axis] / groups / (2 * math.pi)) ** 2", "(shape[axis] / (2 * math.pi)) ** 2"),
        ("manifold.egrad2rgrad(parameter, vector)", "vector"),
    ),
    # -- measures ----------------------------------------------------------------------------------
    *in_file(
        "measures/bounds.py",
        "bounds",
        ('"exponential": depth * math.log(2)', '"exponential": math.log(2)'),
        ('"golowich": math.log(depth) / 2', '"golowich": math.log(depth)'),
        ('return -_log_positive(n_samples, "n_samples") / 2', 'return -_log_positive(n_samples, "n_samples")'),
        ('/ 2 - _log_positive(margin, "margin")', '/ 2 + _log_positive(margin, "margin")'),
        ('_factors_and_contributions(norms, distance_norms, "two_to_one")', '_factors_and_contributions(norms, distance_norms, "frobenius")'),
        ("_log_p_norm(contributions, 2 / 3), factors", "_log_p_norm(contributions, 3 / 2), factors"),
        ("_log_p_norm(contributions, 2), factors", "_log_p_norm(contributions, 1), factors"),
        ("log_scale = math.log(len(norms)) + _log_rate", "log_scale = _log_rate"),
        ('log_scale += _log_positive(width, "width") / 2', 'log_scale += _log_positive(width, "width")'),
        ("masked_fill(own, 0).sum(-1)", "sum(-1)"),
        ("squeeze(-1) - others.amax(-1)", "squeeze(-1) - others.amin(-1)"),
    ),
    *in_file(
        "measures/report/reading.py",
        "report",
        ("standing = matrix.mT if matrix.shape[0] < matrix.shape[1] else matrix", "standing = matrix"),
        ("norms = MatrixNorms(size.norm(), size.max(), size.sum())", "norms = MatrixNorms(size.norm(), size.sum(), size.sum())"),
        ("matrix = weight.layout.channels(value.double()).flatten(1)", "matrix = value.double().flatten(1)"),
        ("uses=len(set(weight.owners)),", "uses=1,"),
        ('return layout.out_channels, layout.in_channels * layout.conv_groups', "return layout.out_channels, layout.in_channels"),
    ),
    # -- models ------------------------------------------------------------------------------------
    *in_file(
        "models/feature_stats.py",
        "feature_stats",
        ("unbiased = var * (count / (count - 1).clamp(min=1))", "unbiased = var"),
        ("update = running + weight * (batch.to(running.dtype) - running)", "update = running + weight * batch.to(running.dtype)"),
        ("return self.running_var.sqrt()", "return self.running_var"),
        ("sqrt().clamp(min=1.0 if rule", "sqrt().clamp(max=1.0 if rule"),
        ("repeat_interleave(layout.out_channels // groups, dim=0)", "repeat(layout.out_channels // groups, 1)"),
        ("part.mean((-2, -1)).sqrt()", "part.mean((-2, -1))"),
    ),
    *in_file(
        "models/folding.py",
        "folding",
        ("scale = (variance + norm.eps).rsqrt()", "scale = variance.rsqrt()"),
        ("shift = -scale * mean", "shift = scale * mean"),
        ("offset = scale * offset + shift", "offset = offset + shift"),
        ("* shifts).sum(1)", "* per_kernel).sum(1)"),
        ("return None if self.scale is None else float(self.scale.abs().max())", "return None if self.scale is None else float(self.scale.max())"),
    ),
    *in_file(
        "models/renormalize.py",
        "renormalize",
        ("radius = self.gamma if self.lam is None else self.gamma / self.lam", "radius = self.gamma if self.lam is None else self.gamma * self.lam"),
        ("return self.bound * torch.empty_like(worst)", "return torch.empty_like(worst)"),
        ("return (worst / self.guarantee().to(worst) - 1).clamp(min=0)", "return (worst - self.guarantee().to(worst)).clamp(min=0)"),
    ),
]  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """What became of a mutant: the test that noticed it, or what is wrong."""

    mutant: Mutant
    test: str | None
    problem: str | None
    seconds: float


class _FirstFailure:
    """A plugin of pytest that keeps the name of the first test that fails."""

    name: str | None = None

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed and self.name is None:
            self.name = report.nodeid

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed and self.name is None:
            self.name = f"{report.nodeid} (when collected)"


def _file_and_choice(test: str) -> tuple[str, str, str]:
    """The file of some tests and which of them.

    Without those that compile, which take minutes and add no formula, and those that start processes, which a fork
    cannot.
    """
    name, _, words = test.partition(":")
    wanted = f"({' or '.join(words.split('+'))}) and " if words else ""
    return f"tests/test_{name}.py", "-k", f"{wanted}not compil and not process"


def stale(mutant: Mutant) -> str | None:
    """Why a mutant cannot be made."""
    path = ROOT / "fgo_geo" / mutant.file
    if not path.is_file():
        return "there is no such file"
    count = path.read_text(encoding="utf-8").count(mutant.original)
    missing = [test for test in map(_file_and_choice, mutant.tests) if not (ROOT / test[0]).is_file()]
    if missing:
        return f"there is no {missing[0][0]}"
    return None if count == 1 else f"the text occurs {count} times, expected once"


def run(mutant: Mutant) -> Outcome:
    """Make a mutant in a copy of the package and run its tests there, in this process: call it in a fork."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        skip = shutil.ignore_patterns("__pycache__")
        for name in ("fgo_geo", "tests", "pyproject.toml"):
            source = ROOT / name
            (shutil.copytree(source, copy / name, ignore=skip) if source.is_dir() else shutil.copy(source, copy / name))
        for name in ("examples", "docs", "README.md"):
            (copy / name).symlink_to(ROOT / name)
        path = copy / "fgo_geo" / mutant.file
        path.write_text(path.read_text(encoding="utf-8").replace(mutant.original, mutant.replacement), encoding="utf-8")
        os.chdir(copy)
        sys.path[:] = [str(copy), str(copy / "tests"), *(p for p in sys.path if Path(p).resolve() != ROOT)]
        first = _FirstFailure()
        options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-W", "ignore", f"--rootdir={copy}"]
        options += ["--hypothesis-profile=mutants"]
        status: int = pytest.ExitCode.OK
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            for test in mutant.tests:
                if status == pytest.ExitCode.OK:
                    status = pytest.main([*options, *_file_and_choice(test)], plugins=[first])
        os.chdir(ROOT)
    problem = "SURVIVES" if status == pytest.ExitCode.OK else f"pytest ended with {status!r}"
    return Outcome(mutant, first.name, None if first.name else problem, time.perf_counter() - began)


def main(arguments: list[str] | None = None) -> int:
    """Run the chosen mutants and print a line for each."""
    parser = argparse.ArgumentParser(description="Break each formula once and report which test notices.")
    parser.add_argument("words", nargs="*", help="only mutants whose file or text contains one of these")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes (%(default)s)")
    parser.add_argument("--list", action="store_true", help="list them, and those that are stale")
    settings = parser.parse_args(arguments)
    chosen = [m for m in MUTANTS if not settings.words or any(word in str(m) for word in settings.words)]
    failed = 0
    runnable: list[Mutant] = []
    for mutant in chosen:
        problem = stale(mutant)
        if problem is None:
            runnable.append(mutant)
        if problem is not None or settings.list:
            failed += problem is not None
            print(f"{problem or 'ready'}: {mutant}", flush=True)
    if settings.list:
        return int(failed > 0)

    for module in _IMPORTED_ONCE:
        importlib.import_module(module)
    hypothesis.settings.register_profile(  # the first failure will do, without a smaller example of it
        "mutants", derandomize=True, deadline=None, database=None, phases=(Phase.explicit, Phase.generate)
    )
    for outcome in outcomes(runnable, settings.jobs):
        failed += outcome.test is None
        print(f"{outcome.test or outcome.problem} [{outcome.seconds:.0f} s]: {outcome.mutant}", flush=True)
    print(f"{len(chosen)} mutants, {len(chosen) - failed} noticed, {failed} not")
    return int(failed > 0)


def outcomes(mutants: list[Mutant], jobs: int) -> Iterator[Outcome]:
    """Run mutants, each in a process of its own: the package's modules that one has imported would stay."""
    context = multiprocessing.get_context("fork")
    waiting = list(reversed(mutants))
    running: dict[Connection, tuple[Mutant, BaseProcess, float]] = {}
    while waiting or running:
        while waiting and len(running) < jobs:
            receiver, sender = context.Pipe(duplex=False)
            mutant = waiting.pop()
            process = context.Process(target=_send, args=(sender, mutant))
            process.start()
            sender.close()
            running[receiver] = mutant, process, time.perf_counter()
        ready = wait(list(running), timeout=1)
        for receiver, (mutant, process, began) in list(running.items()):
            seconds = time.perf_counter() - began
            if receiver in ready:
                try:
                    yield receiver.recv()
                except EOFError:
                    yield Outcome(mutant, None, "the process died", seconds)
            elif seconds > LONGEST:
                process.kill()
                yield Outcome(mutant, None, f"no answer in {LONGEST} s", seconds)
            else:
                continue
            process.join()
            del running[receiver]


def _send(sender: Connection, mutant: Mutant) -> None:
    sender.send(run(mutant))


if __name__ == "__main__":
    sys.exit(main())
