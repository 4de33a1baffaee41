r"""Geodesics of the unit Stiefel manifold with the Euclidean metric: the exponential map and its inverse.

The exponential map is the closed form of [Edelman1998]_ (eq. 2.7), in double precision. Its inverse has no closed form,
except for square matrices, where it is the logarithm of a rotation. Otherwise *shooting* finds the initial velocity: it
carries the error of the end point back to the start and adds it, with Anderson acceleration. Points ``q`` and ``y`` of
``B`` columns span at most ``2B`` dimensions, in which the search takes place.

The logarithm's derivative is that of an implicit function. With ``J`` the derivative of the end point with respect to
the velocity, ``dv = J⁻¹ (dy - D_q exp dq)``; systems with ``J`` and its transpose are solved by conjugate gradients.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from fgo_geo.linalg import matrix_exponential, polar_factor, polish, reads_for_free, skew, sym
from fgo_geo.linalg.smooth import apply, save

__all__ = ["exponential", "logarithm"]

_LONGEST = 1e6  # of a tangent vector; beyond, the end point is all rounding error in single precision


def _tangent(q: Tensor, u: Tensor) -> Tensor:
    return u - q @ sym(q.mT @ u)


def exponential(q: Tensor, v: Tensor) -> Tensor:
    r"""The end of the geodesic from ``q`` with initial velocity ``v``.

    ``[q, v] expm [[A, -S], [I, A]] [I; 0] expm(-A)`` with ``A = qᵀv`` (skew) and ``S = vᵀv``. Rounding errors normal to
    the manifold would grow with the length of ``v``, so the function removes them at both ends. It scales the blocks to
    the length of ``v`` instead of its square.

    Args:
        q: Points in double precision, shape ``(..., A, B)``.
        v: Tangent vectors at ``q``. Those longer than 1e6 are shortened to 1e6; on a CPU with a warning.

    Returns:
        Points of the same shape.

    Example:
        >>> q, v = torch.eye(3, 2, dtype=torch.float64), torch.zeros(3, 2, dtype=torch.float64)
        >>> v[2, 0] = torch.pi / 2
        >>> exponential(q, v).round(decimals=10)
        tensor([[0., 0.],
                [0., 1.],
                [1., 0.]], dtype=torch.float64)
    """
    q = polish(polish(q))
    v = _tangent(q, v)
    length = torch.linalg.matrix_norm(v.detach(), keepdim=True)
    if reads_for_free(length) and bool((length > _LONGEST).any()):
        warnings.warn(
            f"Stiefel.expmap: a tangent vector is {float(length.max()):.3g} radii long, and was shortened to "
            f"{_LONGEST:g}, because rounding makes the end of a longer geodesic meaningless; take shorter steps, or "
            "use the retraction",
            stacklevel=2,
        )
    v = v * (_LONGEST / length).clamp_max(1)
    scale = length.clamp(1, _LONGEST)  # a similarity of the block, which changes nothing
    unit = v / scale
    a, s, identity = torch.broadcast_tensors(
        skew(q.mT @ unit), unit.mT @ unit, torch.eye(v.shape[-1], dtype=q.dtype, device=q.device)
    )
    block = torch.cat((torch.cat((a, -s), -1), torch.cat((identity, a), -1)), -2)
    along, across = matrix_exponential(scale * block)[..., : v.shape[-1]].split(v.shape[-1], -2)
    y = (q @ along + unit @ across) @ matrix_exponential(-scale * a)
    return polish(polish(polish(y)))


def logarithm(q: Tensor, y: Tensor) -> Tensor:
    """Initial velocity of a geodesic from ``q`` to ``y``: the shortest up to a distance of ``π``, else one of several.

    Args:
        q: Points in double precision, shape ``(..., A, B)`` with ``A >= B > 1``.
        y: Points, broadcastable.

    Returns:
        Tangent vectors at ``q``.

    Raises:
        RuntimeError: If there is no geodesic (square matrices with determinants of opposite signs), or none was found.
            The message names the pairs.
    """
    return apply(_Logarithm, *(x.contiguous() for x in torch.broadcast_tensors(q, y)))


# -- the logarithm as a differentiable function --------------------------------------------------------------------


def _batched(function: Any, info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int]:
    """The ``vmap`` rule for functions of equally shaped matrices: add a batch dimension in front."""
    size = info.batch_size

    def in_front(arg: Any, dim: int | None) -> Any:
        if not isinstance(arg, Tensor):
            return arg
        return (arg.expand(size, *arg.shape) if dim is None else arg.movedim(dim, 0)).contiguous()

    return apply(function, *(in_front(arg, dim) for arg, dim in zip(args, in_dims, strict=True))), 0


class _Logarithm(torch.autograd.Function):
    @staticmethod
    def forward(q: Tensor, y: Tensor) -> Tensor:  # pyright: ignore
        return _find_velocity(q, y)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        save(ctx, inputs[0], output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # pyright: ignore
        q, v = ctx.saved_tensors
        of_y = apply(_Solve, q, v, grad, True)
        (of_q,) = _pull(functools.partial(_departure, v), (q,), (grad, -of_y))
        return of_q, of_y

    @staticmethod
    def push(ctx: Any, q_t: Tensor | None, y_t: Tensor | None) -> Tensor:
        q, v = ctx.saved_tensors
        change = torch.zeros_like(q) if y_t is None else y_t
        turned = torch.zeros_like(q)
        if q_t is not None:
            turned = -q @ sym(q_t.mT @ v)  # a constant v would leave the tangent space
            change = change - _along(q, v, q_t, turned)
        return turned + apply(_Solve, q, v, change, False)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int]:
        return _batched(_Logarithm, info, in_dims, *args)


class _Solve(torch.autograd.Function):
    """Solution of ``J u = b``, or of ``Jᵀ u = b``, for ``J`` the derivative of the end point in the velocity."""

    @staticmethod
    def forward(q: Tensor, v: Tensor, b: Tensor, transposed: bool) -> Tensor:  # pyright: ignore
        return _conjugate_gradients(q, v, b, transposed)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        q, v, _, ctx.transposed = inputs
        save(ctx, q, v, output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # pyright: ignore
        q, v, u = ctx.saved_tensors
        of_b = apply(_Solve, q, v, grad, not ctx.transposed)
        of_q, of_v = _pull(functools.partial(_apply_end, u=u, transposed=ctx.transposed), (q, v), -of_b)
        return of_q, of_v, of_b, None

    @staticmethod
    def push(ctx: Any, q_t: Tensor | None, v_t: Tensor | None, b_t: Tensor | None, _: Any) -> Tensor:
        q, v, u = ctx.saved_tensors
        change = torch.zeros_like(u) if b_t is None else b_t
        tangents = [torch.zeros_like(q) if t is None else t for t in (q_t, v_t)]
        moved = _push(functools.partial(_apply_end, u=u, transposed=ctx.transposed), (q, v), tuple(tangents))
        return apply(_Solve, q, v, change - moved, ctx.transposed)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int]:
        return _batched(_Solve, info, in_dims, *args)


def _pull(function: Callable[..., Any], at: tuple[Tensor, ...], cotangents: Any) -> tuple[Tensor, ...]:
    """The gradient of a function, for gradients of its results."""
    pull: Any = torch.func.vjp(function, *at)[1]
    return pull(cotangents)


def _push(function: Callable[..., Tensor], at: tuple[Tensor, ...], tangents: tuple[Tensor, ...]) -> Tensor:
    """The derivative of a function along tangents, as the gradient of a gradient, which is linear.

    The caller is already inside a forward derivative, and forward derivatives do not nest.
    """
    value, pull = cast(tuple[Tensor, Any], torch.func.vjp(function, *at))
    back: Any = torch.func.vjp(pull, torch.zeros_like(value))[1]
    return back(tangents)[0]


def _along(q: Tensor, v: Tensor, q_t: Tensor | None, v_t: Tensor) -> Tensor:
    """Derivative of the end of a geodesic along tangents of its start and its velocity, by exponentials of blocks."""
    size = v.shape[-1]
    a, a_t = skew(q.mT @ v), skew(q.mT @ v_t)
    s, s_t = v.mT @ v, 2 * sym(v.mT @ v_t)
    if q_t is not None:
        a_t = a_t + skew(q_t.mT @ v)
    zero = torch.zeros_like(a)
    identity = torch.eye(size, dtype=q.dtype, device=q.device).expand_as(a)
    block = torch.cat((torch.cat((a, -s), -1), torch.cat((identity, a), -1)), -2)
    block_t = torch.cat((torch.cat((a_t, -s_t), -1), torch.cat((zero, a_t), -1)), -2)
    parts = [part[..., :size].split(size, -2) for part in _exponential_along(block, block_t)]
    (along, across), (along_t, across_t) = parts
    turn, turn_t = _exponential_along(-a, -a_t)
    moved = v_t @ across + q @ along_t + v @ across_t
    if q_t is not None:
        moved = moved + q_t @ along
    return moved @ turn + (q @ along + v @ across) @ turn_t


def _exponential_along(m: Tensor, m_t: Tensor) -> tuple[Tensor, Tensor]:
    """``expm(m)`` and its derivative along ``m_t``."""
    size = m.shape[-1]
    both = matrix_exponential(torch.cat((torch.cat((m, m_t), -1), torch.cat((torch.zeros_like(m), m), -1)), -2))
    return both[..., :size, :size], both[..., :size, size:]


def _apply_end(q: Tensor, v: Tensor, u: Tensor, transposed: bool) -> Tensor:
    """``J u`` or ``Jᵀ u``; normal vectors at the start correspond to those at the end, so that ``J`` is invertible."""
    end = functools.partial(exponential, q)
    if transposed:
        return _pull(end, (v,), u)[0] + q @ sym(end(v).mT @ u)
    return _along(q, v, None, _tangent(q, u)) + end(v) @ sym(q.mT @ u)


def _departure(v: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """The tangent part of a velocity at ``q``, and the end of its geodesic."""
    tangent = _tangent(q, v)
    return tangent, exponential(q, tangent)


def _conjugate_gradients(q: Tensor, v: Tensor, b: Tensor, transposed: bool, precision: float | None = None) -> Tensor:
    """Solve ``J u = b`` or ``Jᵀ u = b`` by conjugate gradients on the normal equations."""
    precision = torch.finfo(b.dtype).eps if precision is None else precision

    def inner(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).sum((-2, -1), keepdim=True)

    u, direction = torch.zeros_like(b), _apply_end(q, v, b, not transposed)
    residual, size = b, inner(direction, direction)
    enough = precision**2 * size
    for _ in range(2 * q.shape[-2] * q.shape[-1] + 20):
        if bool((size <= enough).all()):
            break
        image = _apply_end(q, v, direction, transposed)
        step = size / inner(image, image).clamp_min(torch.finfo(b.dtype).tiny)
        u = u + step * direction
        residual = residual - step * image
        gradient = _apply_end(q, v, residual, not transposed)
        before, size = size, inner(gradient, gradient)
        direction = gradient + size / before.clamp_min(torch.finfo(b.dtype).tiny) * direction
    return u


# -- the search ----------------------------------------------------------------------------------------------------


def _find_velocity(q: Tensor, y: Tensor) -> Tensor:
    shape, columns = q.shape, q.shape[-1]
    q, y = q.reshape(-1, *shape[-2:]), y.reshape(-1, *shape[-2:])
    same = (
        (q == y).all(-1, keepdim=True).all(-2, keepdim=True)
    )  # the velocity is exactly zero there, and the distance has a kink
    if bool(same.all()):
        return torch.zeros(shape, dtype=q.dtype, device=q.device)
    if shape[-2] == columns:
        turn = q.mT @ y
        reflected = torch.linalg.det(turn) < 0
        if bool(reflected.any()):
            raise RuntimeError(
                f"Stiefel.logmap: no geodesic joins {_pairs(reflected, shape[:-2])}: the determinants of the two "
                "matrices have opposite signs, and O(n) consists of two parts; flip the sign of a column of one of them"
            )
        identity = torch.eye(columns, dtype=q.dtype, device=q.device).expand_as(q)
        velocity = _rotation_logarithm(turn)
        error = torch.linalg.matrix_norm(turn - exponential(identity, velocity))
        velocity = q @ _refined(identity, turn, velocity, error, _tolerance(turn))[0]
        return torch.where(same, 0, velocity).reshape(shape)
    basis = torch.linalg.qr(torch.cat((q, y), -1)).Q[..., columns:]  # the columns of q are the first vectors
    target = torch.cat((q.mT @ y, basis.mT @ y), -2)
    start = torch.eye(target.shape[-2], columns, dtype=q.dtype, device=q.device).expand_as(target)
    velocity = _shoot(start, target, shape[:-2])
    velocity = q @ velocity[..., :columns, :] + basis @ velocity[..., columns:, :]
    return torch.where(same, 0, velocity).reshape(shape)


def _pairs(failed: Tensor, batch: torch.Size) -> str:
    if not batch:
        return "the two points"
    places = [tuple(map(int, index)) for index in failed.reshape(batch).nonzero()]
    shown = ", ".join(str(place[0] if len(place) == 1 else place) for place in places[:5])
    more = f" and {len(places) - 5} more" if len(places) > 5 else ""
    return f"the points at index {shown}{more}"


_HALVINGS = 5
_ARCSINE = [math.comb(2 * k, k) / (4**k * (2 * k + 1)) for k in range(9)]


def _rotation_logarithm(turn: Tensor) -> Tensor:
    """The skew logarithm of rotations, with angles up to ``π``.

    Square roots of rotations are polar factors of ``I + turn``. A half turn has many: a small skew matrix chooses one.
    """
    size = turn.shape[-1]
    identity = torch.eye(size, dtype=turn.dtype, device=turn.device)
    count = torch.arange(size, dtype=turn.dtype, device=turn.device)
    choice = 1e-13 * skew(torch.sin(1 + 1.7 * count.square().unsqueeze(-1) + 2.9 * count))
    half_turn = torch.linalg.svdvals(identity + turn)[..., -1, None, None] < 1e-10
    root = polar_factor(identity + turn + torch.where(half_turn, choice, 0))
    for _ in range(_HALVINGS - 1):
        root = polar_factor(identity + root)
    sine = skew(root)
    square, series = -sine @ sine, torch.zeros_like(turn)
    for coefficient in reversed(_ARCSINE):
        series = coefficient * identity + square @ series
    return 2**_HALVINGS * skew(sine @ series)


def _tolerance(q: Tensor) -> float:
    """The error of an end point that rounding alone can cause."""
    return 8 * torch.finfo(q.dtype).eps * math.sqrt(q.shape[-2] * q.shape[-1])


_ROUNDS = 500
_PATIENCE = 80  # rounds in which the error must halve
_DEPTH = 8  # of the memory of Anderson acceleration
_ATTEMPTS = (
    (8, 10.0, 0.0),
    (4, 2.0, 0.0),
    (8, 10.0, 0.3),
    (4, 2.0, 1.0),
)  # points, growth that resets the memory, noise


def _shoot(q: Tensor, y: Tensor, batch: torch.Size) -> Tensor:
    """Velocities of geodesics from ``q``, the first columns of the identity, to ``y``.

    Raises:
        RuntimeError: If a search does not converge.
    """
    tolerance = _tolerance(q)
    v, error = torch.zeros_like(y), torch.full(y.shape[:1], math.inf, dtype=y.dtype, device=y.device)
    for points, growth, noise in _ATTEMPTS:
        unsolved = (error > 8 * tolerance).nonzero().flatten()
        if len(unsolved) == 0:
            return v
        found, rest = _accelerated_shooting(q[unsolved], y[unsolved], points, growth, noise, tolerance)
        found, rest = _refined(q[unsolved], y[unsolved], found, rest, tolerance)
        better = rest < error[unsolved]
        v[unsolved[better]], error[unsolved[better]] = found[better], rest[better]
    failed = error > 8 * tolerance
    if not bool(failed.any()):
        return v
    raise RuntimeError(
        f"Stiefel.logmap: the search for a geodesic did not converge for {_pairs(failed, batch)} (largest error of the "
        f"end point {float(error.max()):.3g} radii). Their distance may exceed the injectivity radius, π "
        "radii, where the search can fail; go through an intermediate point"
    )


def _points(v: Tensor, count: int) -> list[Tensor]:
    """Points of the geodesic from the first columns of the identity, at equal times up to one.

    ``expm(t [[2A, -Rᵀ], [R, 0]]) [I; 0] expm(-t A)`` for ``v = [A; R]``: the form of [Edelman1998]_ in this basis.
    """
    size, columns = v.shape[-2:]
    a, r = skew(v[..., :columns, :]), v[..., columns:, :]
    rest = v.new_zeros(*v.shape[:-2], size - columns, size - columns)
    block = torch.cat((torch.cat((2 * a, -r.mT), -1), torch.cat((r, rest), -1)), -2)
    forth, back = matrix_exponential(block / count), matrix_exponential(-a / count)
    frames, turn = forth[..., :columns], back
    points = [frames @ turn]
    for _ in range(count - 1):
        frames, turn = forth @ frames, turn @ back
        points.append(frames @ turn)
    return points


def _with_norm_of(v: Tensor, reference: Tensor) -> Tensor:
    length, wanted = (torch.linalg.matrix_norm(x, keepdim=True) for x in (v, reference))
    return v * torch.where(length > 0, wanted / torch.where(length > 0, length, 1), 1)


def _accelerated_shooting(
    q: Tensor, y: Tensor, points: int, growth: float, noise: float, tolerance: float
) -> tuple[Tensor, Tensor]:
    """Shooting (Bryner 2017; Zimmermann and Hüper 2022, algorithm 1) with Anderson acceleration (Walker and Ni 2011).

    Projections that preserve lengths carry the error of the end point back along the geodesic. The next velocity
    combines the latest ones so that their errors cancel best. For a pair whose error grows too much, the search
    discards the earlier velocities.

    Returns:
        The best velocity of every pair, and its error.
    """
    generator = torch.Generator().manual_seed(0)
    start = _tangent(q, y - q) + noise * _tangent(q, torch.randn(y.shape[1:], generator=generator).to(y))
    v = _with_norm_of(start, y - q)
    best, least = v.clone(), torch.full(y.shape[:1], math.inf, dtype=y.dtype, device=y.device)
    pairs = torch.arange(len(y), device=y.device)  # not solved yet
    size = q.shape[-2] * q.shape[-1]
    moves, changes = (y.new_zeros(len(y), _DEPTH, size) for _ in range(2))  # of the next velocity and of the error
    held = torch.zeros_like(pairs)
    before: tuple[Tensor, Tensor] | None = None
    lowest = least
    halved, since = least.clone(), torch.zeros_like(pairs)  # error and round at the latest halving
    for count in range(_ROUNDS):
        path = _points(v, points)
        gap = y[pairs] - path[-1]
        error = torch.linalg.matrix_norm(gap)
        improved = error < least[pairs]
        best[pairs[improved]], least[pairs[improved]] = v[improved], error[improved]
        half = least[pairs] < halved[pairs] / 2
        halved[pairs[half]], since[pairs[half]] = error[half], count
        going = (error > tolerance) & (count - since[pairs] < _PATIENCE)
        if not bool(going.any()):
            break
        for point in (*reversed(path), q[pairs]):
            gap = _with_norm_of(_tangent(point, gap), gap)
        pairs, v, gap, error = pairs[going], v[going], gap[going].flatten(1), error[going]
        moves, changes, held, lowest = moves[going], changes[going], held[going], lowest[going]
        target = v.flatten(1) + gap
        if before is not None:
            place = torch.arange(len(pairs), device=y.device), held % _DEPTH
            moves[place], changes[place] = target - before[0][going], gap - before[1][going]
            held = held + 1
            lost = error > growth * lowest
            moves[lost], changes[lost], held[lost] = 0, 0, 0
            lowest = torch.where(lost, error, torch.minimum(lowest, error))
        else:
            lowest = error
        before = target, gap
        v = (target - _combination(changes, moves, gap)).reshape(-1, *y.shape[-2:])
    return best, least


def _combination(changes: Tensor, moves: Tensor, gap: Tensor) -> Tensor:
    """The combination of moves whose changes are closest to an error, by damped normal equations."""
    gram = changes @ changes.mT
    squares = gram.diagonal(dim1=-2, dim2=-1)
    scale = torch.where(squares > 0, squares.clamp_min(torch.finfo(gap.dtype).tiny).rsqrt(), 1)
    damping = torch.where(squares > 0, 1e-14, 1.0)
    gram = gram * scale.unsqueeze(-1) * scale.unsqueeze(-2) + torch.diag_embed(damping)
    weights = torch.linalg.solve(gram, (changes @ gap.unsqueeze(-1)) * scale.unsqueeze(-1)) * scale.unsqueeze(-1)
    return (moves.mT @ weights).squeeze(-1)


def _refined(q: Tensor, y: Tensor, v: Tensor, error: Tensor, tolerance: float) -> tuple[Tensor, Tensor]:
    """Newton's method, where shooting has come near to an end point and converges slowly."""
    v, error = v.clone(), error.clone()
    for _ in range(8):
        slow = ((error > tolerance) & (error < 0.1)).nonzero().flatten()
        if len(slow) == 0:
            break
        at, from_ = v[slow], q[slow]
        moved = _tangent(from_, at + _conjugate_gradients(from_, at, y[slow] - exponential(from_, at), False, 1e-6))
        reached = torch.linalg.matrix_norm(y[slow] - exponential(from_, moved))
        better = reached < error[slow]
        if not bool(better.any()):
            break
        v[slow[better]], error[slow[better]] = moved[better], reached[better]
    return v, error
