"""Break each formula of the package once, and see which test notices.

    python tests/mutations.py --results mutants.csv                 # all mutants, about half a minute each
    python tests/mutations.py --results mutants.csv sphere bounds   # those whose file or formula contains a word
    python tests/mutations.py --list

A mutant replaces one piece of source text: a sign, a factor, an axis, a radius, a term that is forgotten. For each one
the package is copied, the text is replaced in the copy, and the tests named with it run there until one fails, in a
process of its own with a limit on time and memory. The first failing test is printed, and written to the file of
results; mutants that the file holds are not run again unless their text has changed. If no test notices, the mutant
survives and the exit status is 1. It is 1 too if a text is not found exactly once: then the formula has changed, and
the list has to follow.
"""

# ruff: noqa: E501  the texts to replace are quoted whole
from __future__ import annotations

import argparse
import contextlib
import csv
import hashlib
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

LONGEST = 300  # seconds for a mutant
MEMORY = 6 * 2**30  # bytes that a mutant's process may allocate
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

    @property
    def key(self) -> str:
        """What names it in a file of results."""
        return hashlib.sha256(repr((self.file, self.original, self.replacement, self.tests)).encode()).hexdigest()[:12]


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
        ("generator = apply(_SkewEquation, hermitian, along - along.mT, v, h)", "generator = apply(_SkewEquation, hermitian, along + along.mT, v, h)"),
        ("return _product(w, inverse.mT) + _product(q, inside)", "return _product(w, inverse.mT) - _product(q, inside)"),
        ("divide_or_zero(turned, h.unsqueeze(-1) + h.unsqueeze(-2))", "divide_or_zero(turned, h.unsqueeze(-1) * 2)"),
        ("return -inverse @ grad @ inverse, None, None", "return inverse @ grad @ inverse, None, None"),
        ("return k @ solution + solution @ k, k, None, None", "return k @ solution, k, None, None"),
    ),
    *in_file(
        "linalg/closed_forms.py",
        "closed_forms",
        ("rows[j][n], rows[m][k], value=-1)", "rows[j][n], rows[m][k], value=1)"),
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
        "manifolds:proju+projx manifolds_moves:geodesic+exp_log+transport+too_long manifolds_tensors:radius manifolds manifolds_moves manifolds_tensors derivatives",
        ("return y * (radius * squared.rsqrt())", "return y * squared.rsqrt()"),
        ("inner_sum(x, u, dim) / radius**2, value=-1)", "inner_sum(x, u, dim) / radius, value=-1)"),
        ("inner_sum(x, u, dim) / radius**2, value=-1)", "inner_sum(x, u, dim) / radius**2, value=1)"),
        ("return _onto(x + u, radius, dim)", "return _onto(x + 0.99 * u, radius, dim)"),
        ("cosine(squared) * x + sinc(squared) * u", "cosine(squared) * x - sinc(squared) * u"),
        ("squared = (inner_sum(u, u, dim) / radius**2).clamp_max(", "squared = inner_sum(u, u, dim).clamp_max("),
        ("return 2 * torch.atan2(root_of_sum(x - y, dim), root_of_sum(x + y, dim))", "return torch.atan2(root_of_sum(x - y, dim), root_of_sum(x + y, dim))"),
        ("4 * squared * arctangent(squared) ** 2, angle", "squared * arctangent(squared) ** 2, angle"),
        ("(1 + squared) * arctangent(squared), factor)", "arctangent(squared), factor)"),
        ("y = y / y.detach().abs().amax(dim, keepdim=True)  # which cancels", "pass"),
        ("factor = torch.where(length > 0, radius * theta", "factor = torch.where(length > 0, theta"),
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
        "manifolds:proju+moments+columns manifolds_moves:geodesic+oracle+bounded+relative manifolds_tensors:radius manifolds manifolds_moves manifolds_tensors norms",
        ("return subtract_product(u, x, twice, alpha=0.5 / radius**2)", "return subtract_product(u, x, twice, alpha=1.0 / radius**2)"),
        ("return subtract_product(u, x, twice, alpha=0.5 / radius**2)", "return subtract_product(u, x, twice, alpha=0.5 / radius)"),
        ("return subtract_product(u, x, twice / (2 * radius**2))", "return subtract_product(u, x, twice / (2 * radius))"),
        ("twice = along + along.mT", "twice = along - along.mT"),
        ('factor = polar_factor if self.retraction == "polar" else qr_factor', "factor = qr_factor"),
        ("exponential(x.to(wide) / radius, u.to(wide) / radius)", "exponential(x.to(wide) / radius, u.to(wide))"),
        ("return radius * stiefel_geodesics.logarithm(q, target)", "return stiefel_geodesics.logarithm(q, target)"),
        ("return self.radius_for(gaussian) * qr_factor(gaussian)", "return qr_factor(gaussian)"),
        ("explained = (inner_sum(u, u, (-2, -1)) * (scale / radius) ** 2)", "explained = (inner_sum(u, u, (-2, -1)) * scale**2)"),
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
    # -- paths -------------------------------------------------------------------------------------
    *in_file(
        "paths/reference.py",
        "fgsgd:oracle+invariant+maximize+decay+tensor+transported step_bound paths_reference fgsgd fgsgd_geoopt",
        ("grad = -job.grad if options.maximize else job.grad", "grad = job.grad if options.maximize else -job.grad"),
        ("grad = grad.add(job.x, alpha=options.weight_decay)", "grad = grad.add(job.x, alpha=-options.weight_decay)"),
        ("job.grad = grad * manifold.radius_for(job.x) ** 2", "job.grad = grad * manifold.radius_for(job.x)"),
        ("job.grad = grad = manifold.egrad2rgrad(job.x, grad)", "job.grad = grad"),
        ("inner = manifold.inner(job.x, grad, job.grad)", "inner = manifold.inner(job.x, job.grad, job.grad)"),
        ("grad = job.grad if scale is None else job.grad * job.spread(scale)", "grad = job.grad"),
        ("manifold.retract_bounded(x, direction, bound, -lr), buffer", "manifold.retract_bounded(x, direction, bound, lr), buffer"),
        ("step = -rate * direction", "step = rate * direction"),
        ("return manifold.retr_transp(x, step, buffer)", "return manifold.retr(x, step), buffer"),
        ("return manifold.expmap_transp(x, step, buffer)", "return manifold.expmap(x, step), buffer"),
        ("return options.lr * options.longest_step / (1.0 if", "return options.longest_step / (1.0 if"),
        ("(1.0 if options.radius_invariant else job.smallest_radius)", "(1.0 if options.radius_invariant else 1 / job.smallest_radius)"),
    ),
    *in_file(
        "paths/rules.py",
        "fgsgd:oracle paths_reference fgsgd",
        ("own = (1 - options.dampening) * grad if", "own = (1 + options.dampening) * grad if"),
        ("buffer = torch.add(own, carried, alpha=options.momentum)", "buffer = torch.add(own, carried, alpha=-options.momentum)"),
        ("carried = manifold.proju(x, buffer) if isinstance(manifold, EmbeddedManifold) else buffer", "carried = buffer"),
        ("(grad + options.momentum * buffer if options.nesterov else buffer)", "(grad + buffer if options.nesterov else buffer)"),
        ("(grad + options.momentum * buffer if options.nesterov else buffer)", "(options.momentum * buffer if options.nesterov else buffer)"),
    ),
    # -- optim -------------------------------------------------------------------------------------
    *in_file(
        "optim/step_size.py",
        "step_size step_bound",
        ("second = 1 + curvature * (rho + norm)", "second = 1 + curvature * (rho - norm)"),
        ("second = 1 + curvature * (rho + norm)", "second = 1 + curvature * norm"),
        ("torch.maximum(2 * rho + norm, second.sqrt())", "torch.maximum(rho + norm, second.sqrt())"),
        ("torch.maximum(2 * rho + norm, second.sqrt())", "torch.maximum(2 * rho + norm, second)"),
        ("return (norm * root).clamp_min(1)", "return root.clamp_min(1)"),
        ("return (norm * root).clamp_min(1)", "return (norm * root).sqrt().clamp_min(1)"),
        ("return 1 / (math.hypot(1, rho) + rho)", "return 1 / (math.hypot(1, rho) - rho)"),
        ("buffer = max(1.0, abs(1 - dampening) / (1 - momentum))", "buffer = max(1.0, abs(1 - dampening) / (1 + momentum))"),
        ("return 1 + momentum * buffer if nesterov else buffer", "return momentum * buffer if nesterov else buffer"),
        ("tau = norm / (options.angle * norms)", "tau = norm / options.angle"),
        ("tau = norm / (options.angle * norms)", "tau = norm * norms / options.angle"),
        ("return spike * theorem_step_bound(options.rho) * gain", "return spike * theorem_step_bound(options.rho)"),
        ("return spike * theorem_step_bound(options.rho) * gain", "return theorem_step_bound(options.rho) * gain"),
        ("bound = options.curvature if curvatures is None else curvatures", "bound = options.curvature"),
    ),
    *in_file(
        "optim/base.py",
        "step_size fgsgd_refusals fgsgd fgsgd_precision paths_reference",
        ("scale = None if tau is None else tau.reciprocal()", "scale = tau"),
        ("scale = own.unit if scale is None else own.unit * scale", "scale = own.unit if scale is None else scale / own.unit"),
        ("own.squared.sqrt() if own.unit is None else own.squared.sqrt() * own.unit", "own.squared.sqrt()"),
        ("torch.ones_like(norm) if scale is None else scale, 0)", "torch.ones_like(norm) if scale is None else scale, 1)"),
        ("return torch.where(mean.isnan(), norm, mean.sqrt())", "return torch.where(mean.isnan(), norm, mean)"),
        ("shortest = norm / (SPIKE * theorem_step_bound(options.rho))", "shortest = norm / SPIKE"),
        ("taken = torch.where(is_spike, norm * tau / shortest, norm)", "taken = norm"),
        ("mean = torch.lerp(taken.square(), before.square(), _DECAY)", "mean = torch.lerp(before.square(), taken.square(), _DECAY)"),
        ("return torch.maximum(tau, shortest)", "return tau"),
        ("now = torch.where(mask, own, other).to(", "now = own.to("),
        ("_of_groups(w, group_curvatures, options.radius_invariant)", "_of_groups(w, group_curvatures)"),
        ("weight.owner.copy_(weight.param)", "pass"),
    ),
    *in_file(
        "optim/groups.py",
        "step_size fgsgd paths_reference on_manifolds:angle+theorem",
        ("return _radii(own, batch) ** -2", "return _radii(own, batch) ** -1"),
        ("return torch.zeros(batch, dtype=torch.float64)", "return torch.ones(batch, dtype=torch.float64)"),
        ("lambda groups, values: groups.max(values))", "lambda groups, values: -groups.max(-values))"),
        ("return _radii(own, batch) * kind.norms(rows, columns)[0]", "return _radii(own, batch) * kind.norms(rows, columns)[1]"),
        ("lambda groups, values: groups.sum(values.square()).sqrt())", "lambda groups, values: groups.sum(values))"),
    ),
    *in_file(
        "optim/finite.py",
        "fgsgd_refusals step_size on_manifolds:finite",
        ("own.squared = torch.where(finite, own.squared, 0)", "own.squared = own.squared"),
        ("first / unit.square(), again)", "first / unit, again)"),
        ("torch.tensor(1 - math.frexp(unit)[1], device", "torch.tensor(math.frexp(unit)[1] - 1, device"),
        ("alpha=decay * (1 / unit - 1))", "alpha=decay / unit)"),
        ("return math.ldexp(1.0, math.frexp(largest)[1]) if", "return math.ldexp(1.0, math.frexp(largest)[1] - 1) if"),
        ("return float(squared.sum()) < _SMALLEST", "return False"),
    ),
    *in_file(
        "optim/on_manifolds.py",
        "step_bound on_manifolds",
        ("_foreach.mul_(here, -1 / lr)", "_foreach.mul_(here, 1 / lr)"),
        ("_foreach.mul_(here, -1 / lr)", "_foreach.mul_(here, -1.0)"),
        ("_foreach.sub_(here, _here(points))", "pass"),
        ("options = replace(options, longest_step=longest_step(options))", "options = replace(options, longest_step=0.1 * longest_step(options))"),
        ("                _foreach.copy_(_here(params), _here(points))\n", "                pass\n"),
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
        ("z * (lam / denominator)", "z * (denominator / lam)"),
    ),
    *in_file(
        "optim/channel_directed.py",
        "channel_directed_parameters:lam_relative+manifold channel_directed_optimisers:manifold channel_directed_parameters channel_directed_optimisers",
        ("(shape[axis] / groups / (2 * math.pi)) ** 2", "shape[axis] / groups / (2 * math.pi)"),
        ("(shape[axis] / groups / (2 * math.pi)) ** 2", "(shape[axis] / (2 * math.pi)) ** 2"),
        ("gradients[k].copy_(manifold.egrad2rgrad(parameters[k], tangents[k]))", "gradients[k].copy_(tangents[k])"),
    ),
    *in_file(
        "paths/pieces.py",
        "kinds:error+blamed",
        ("self._is_foreign and found.shape != self.x.shape", "self._is_foreign and found.numel() != self.x.numel()"),
        ("self._is_foreign and is_finite and", "self._is_foreign and"),
        ("not bool(found.isfinite().all())", "bool(found.isnan().all())"),
        ("record is None or record.is_of_user", "record is not None and record.is_of_user"),
    ),
    *in_file(
        "weights/words.py",
        "constrain_plan torchvision",
        ("len(members) == len(fnmatch.filter(known, glob))", "len(members) <= len(fnmatch.filter(known, glob))"),
        ("if labels.get(name) == name", "if name in labels"),
        ("hidden = sum(label not in shown for label in labels.values())", "hidden = len(set(labels.values())) - len(shown)"),
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

    key: str
    mutant: str
    test: str
    problem: str
    seconds: int


def _file_and_choice(test: str) -> tuple[str, str, str]:
    """The file of some tests and which of them, without those that compile: they take minutes and add no formula."""
    name, _, words = test.partition(":")
    wanted = f"({' or '.join(words.split('+'))}) and " if words else ""
    return f"tests/test_{name}.py", "-k", f"{wanted}not compil"


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
    """Make a mutant in a copy of the package, and run its tests there in another process."""
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
        answer = copy / "answer"
        command = [sys.executable, "-m", "mutations", "--inside", str(answer), *mutant.tests]
        paths = os.pathsep.join((str(copy), str(copy / "tests")))
        process = subprocess.Popen(
            command,
            cwd=copy,
            env={**os.environ, "PYTHONPATH": paths, "PYTHONDONTWRITEBYTECODE": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY)),
        )
        try:
            status = process.wait(LONGEST)
            problem = "SURVIVES" if status == 0 else f"the process ended with {status}"
        except subprocess.TimeoutExpired:
            problem = f"no answer in {LONGEST} s"
        finally:
            with contextlib.suppress(ProcessLookupError):  # with all that the tests have started
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        test = answer.read_text(encoding="utf-8") if answer.is_file() else ""
    return Outcome(mutant.key, str(mutant), test, "" if test else problem, round(time.perf_counter() - began))


def inside(answer: str, tests: list[str]) -> int:
    """Run tests in the copy until one fails, and write its name to a file."""
    import hypothesis
    import pytest
    from hypothesis import Phase

    class FirstFailure:
        """A plugin of pytest that keeps the name of the first test that fails."""

        def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
            self._keep(report.failed, report.nodeid)

        def pytest_collectreport(self, report: pytest.CollectReport) -> None:
            self._keep(report.failed, f"{report.nodeid} (when collected)")

        def _keep(self, failed: bool, name: str) -> None:
            if failed and not Path(answer).exists():
                Path(answer).write_text(name, encoding="utf-8")

    hypothesis.settings.register_profile(  # the first failure will do, without a smaller example of it
        "mutants", derandomize=True, deadline=None, database=None, phases=(Phase.explicit, Phase.generate)
    )
    options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-W", "ignore", f"--rootdir={Path.cwd()}"]
    for test in tests:
        choice = [*options, "--hypothesis-profile=mutants", *_file_and_choice(test)]
        status = pytest.main(choice, plugins=[FirstFailure()])
        if status not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
            return int(status)
    return 0


def main() -> int:
    """Run the chosen mutants and print a line for each."""
    parser = argparse.ArgumentParser(description="Break each formula once and report which test notices.")
    parser.add_argument("words", nargs="*", help="only mutants whose file or text contains one of these")
    parser.add_argument("--results", type=Path, help="where results are kept; mutants that it holds are not run again")
    parser.add_argument("--list", action="store_true", help="list them, and those that are stale")
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    settings = parser.parse_args()
    if settings.inside:
        return inside(settings.inside, settings.words)
    chosen = [m for m in MUTANTS if not settings.words or any(word in str(m) for word in settings.words)]
    known = {outcome.key: outcome for outcome in read(settings.results)}
    failed = 0
    for mutant in chosen:
        problem = stale(mutant)
        if problem is not None or settings.list:
            failed += problem is not None
            print(f"{problem or 'ready'}: {mutant}", flush=True)
            continue
        outcome = known.get(mutant.key)
        if outcome is None:
            outcome = run(mutant)
            if settings.results is not None:
                write(settings.results, outcome)
        failed += not outcome.test
        print(f"{outcome.test or outcome.problem} [{outcome.seconds} s]: {mutant}", flush=True)
    if not settings.list:
        print(f"{len(chosen)} mutants, {len(chosen) - failed} noticed, {failed} not")
    return int(failed > 0)


def read(path: Path | None) -> list[Outcome]:
    """Results of earlier runs."""
    if path is None or not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [Outcome(**{**row, "seconds": int(row["seconds"])}) for row in csv.DictReader(file)]


def write(path: Path, outcome: Outcome) -> None:
    """Add a result to a file."""
    is_new = not path.is_file()
    with path.open("a", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, list(asdict(outcome)))
        if is_new:
            table.writeheader()
        table.writerow(asdict(outcome))


if __name__ == "__main__":
    sys.exit(main())
