"""Sweeps in Triton: the formulas of ``fused_sweeps.hpp``, a thread per kernel.

One program processes a block of ``N`` kernels of one parameter. Entry (i, j) of all of them is one vector of ``N``
numbers, and a component is the tuple of its ``A * B`` vectors: loops over entries are unrolled, so a thread keeps the
entries of its kernel in registers. All manifold kinds run the same instructions::

    projection   h - w S,  S = 0, tr(M) I, diag(M) or sym(M) for M = wᵀh / r²
    retraction   y (I + E)^(-1/2),  E = 0, (‖y‖² / r² - 1) I, diag(N) or N for N = yᵀy / r² - I

on Euclidean, sphere, oblique and Stiefel components. ``shared``, ``own`` and ``across`` select between them: they hold
``1 / r²`` where the kind is sphere; oblique or Stiefel; Stiefel.

Importing this module imports Triton, so :mod:`fgo_geo.paths.triton.launches` imports it only when it is needed.
Without Triton the functions are plain Python that nothing calls.
"""

# The functions below are compiled by Triton, whose types a Python type checker does not know and which has no unpacking
# into a tuple.
# pyright: basic, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# ruff: noqa: RUF005

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any, TypeAlias

__all__ = ["norms", "retract_long_steps", "segment_sums", "update", "write"]

triton: Any = None
tl: Any = None
if TYPE_CHECKING:
    constexpr: TypeAlias = Any
    int64: TypeAlias = Any
elif importlib.util.find_spec("triton") is not None:
    triton = importlib.import_module("triton")
    tl = importlib.import_module("triton.language")
    constexpr, int64 = tl.constexpr, tl.int64


def _jit(function: Any) -> Any:
    return function if triton is None else triton.jit(function)


def _jit_once(function: Any) -> Any:
    """Compile once, without specialising on the values of integer arguments."""
    names = list(function.__annotations__)
    return function if triton is None else triton.jit(function, do_not_specialize=names)


# The table of parameters, int64. Row zero holds the options as the bits of float64 numbers: learning rate, momentum,
# dampening, weight decay. Every other row describes a parameter, by column:
#
#   0 weight, 1 gradient, 2 buffer, 3 codes, 4 inverse squares of the radii, 5 positions of the kernels sorted by group:
#     addresses
#   6 number of groups, 7 number of kernels, of all parameters before it
#   8 number of its kernels; kernel k starts at k / columns * row stride + k % columns * column stride with
#   9 columns, 10 row stride, 11 column stride; entry (i, j) has the offset i * (12 i stride) + j * (13 j stride) there
#  14 flags: 1 the buffer is uninitialised, 2 there is a radius per kernel, not per kind
#  15 number of programs of all parameters before it


@_jit_once
def write(table, place: int64, a: int64, b: int64, c: int64, d: int64, e: int64, f: int64, g: int64, h: int64):
    """Write eight numbers, which arrive as arguments of the launch, into a table."""
    for k in tl.static_range(8):
        tl.store(table + place + k, (a, b, c, d, e, f, g, h)[k])


@_jit
def segment_sums(values, bounds, sums, segments, ROWS: constexpr, COLUMNS: constexpr):
    """Sum of ``values[bounds[k] : bounds[k + 1]]`` for every segment ``k``, in an order that does not vary."""
    segment = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = segment < segments
    start = tl.load(bounds + segment, mask=inside, other=0)
    stop = tl.load(bounds + segment + 1, mask=inside, other=0)
    column = tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), tl.float64)
    done = 0
    longest = tl.max(stop - start)
    while done < longest:
        place = start[:, None] + (done + column)[None, :]
        total += tl.load(values + place, mask=place < stop[:, None], other=0.0)
        done += COLUMNS
    tl.store(sums + segment, tl.sum(total, 1), mask=inside)


# -- memory ------------------------------------------------------------------------------------------------------------


@_jit
def _place(table, TASKS: constexpr, N: constexpr):
    """Row of the program's parameter; numbers of its kernels, a mask of those that exist, and their first addresses."""
    tile = tl.program_id(0)
    task = tl.arange(0, TASKS)
    row = table + 16 * tl.sum((tl.load(table + 16 * (task + 1) + 15) <= tile).to(tl.int32))
    kernel = (tile - tl.load(row + 15)).to(tl.int32) * N + tl.arange(0, N)
    columns = tl.load(row + 9).to(tl.int32)
    start = (kernel // columns).to(tl.int64) * tl.load(row + 10) + (kernel % columns).to(tl.int64) * tl.load(row + 11)
    return row, kernel, kernel < tl.load(row + 8), start


@_jit
def _facts(row, kernel, inside, DTYPE: constexpr):
    """Group, kind, ``1 / r²``, ``shared``, ``own`` and ``across`` of every kernel.

    Kernels that do not exist count as Euclidean kernels of group zero.
    """
    code = tl.load(tl.load(row + 3).to(tl.pointer_type(tl.int32)) + kernel, mask=inside, other=0)
    kind = code & 3
    squares = tl.load(row + 4).to(tl.pointer_type(tl.float64))
    own_radius = (tl.load(row + 14) & 2) != 0  # per kernel, else per kind
    square = tl.load(squares + tl.where(own_radius, kernel, kind), mask=inside, other=1.0).to(DTYPE)
    shared = tl.where(kind == 1, square, 0.0)
    own = tl.where(kind > 1, square, 0.0)
    across = tl.where(kind > 2, square, 0.0)
    return code >> 2, kind, square, shared, own, across


@_jit
def _tile(start, inside, row, A: constexpr, B: constexpr, LEVELS: constexpr, PLANAR: constexpr):
    """Offsets of the entries of the kernels, as one tile, and a mask of those that exist.

    Adjacent threads should read adjacent addresses, so the last dimension of the tile is the one with the smallest
    stride: kernels in planar memory, else entries, whose number is padded to a power of two.
    """
    entry = tl.arange(0, 2**LEVELS)
    offset = (entry // B) * tl.load(row + 12) + (entry % B) * tl.load(row + 13)
    if PLANAR:
        place = offset[:, None] + start[None, :]
        exists = (entry < A * B)[:, None] & inside[None, :]
    else:
        place = start[:, None] + offset[None, :]
        exists = inside[:, None] & (entry < A * B)[None, :]
    return place, exists


@_jit
def _load(base, place, exists, SIZE: constexpr, N: constexpr, LEVELS: constexpr, PLANAR: constexpr):
    """The entries of ``N`` kernels: a tile, split into one vector per entry by repeated halving."""
    tile = tl.load(base + place, mask=exists, other=0.0)
    if PLANAR:
        tile = tl.trans(tile)
    values = (tile,)
    for level in tl.static_range(LEVELS):
        even = ()
        odd = ()
        for k in tl.static_range(2**level):
            pair = tl.split(tl.reshape(values[k], (N, 2 ** (LEVELS - 1 - level), 2)))
            even = even + (pair[0],)
            odd = odd + (pair[1],)
        values = even + odd  # vector k holds the entries whose last level + 1 bits are k
    entries = ()
    for k in tl.static_range(SIZE):
        entries = entries + (tl.reshape(values[k], (N,)),)
    return entries


@_jit
def _store(base, entries, place, exists, SIZE: constexpr, N: constexpr, LEVELS: constexpr, PLANAR: constexpr):
    """Inverse of ``_load``."""
    values = entries
    for _ in tl.static_range(2**LEVELS - SIZE):
        values = values + (entries[0],)
    for level in tl.static_range(LEVELS):
        joined = ()
        for k in tl.static_range(2 ** (LEVELS - 1 - level)):
            pair = tl.join(values[k], values[k + 2 ** (LEVELS - 1 - level)])
            joined = joined + (tl.reshape(pair, (N, 2 ** (level + 1))),)
        values = joined
    tile = tl.reshape(values[0], (N, 2**LEVELS))
    if PLANAR:
        tile = tl.trans(tile)
    tl.store(base + place, tile, mask=exists)


# -- formulas ----------------------------------------------------------------------------------------------------------
# B x B matrices are tuples of B * B vectors too; all of them are symmetric.


@_jit
def _inner(x, j: constexpr, y, k: constexpr, A: constexpr, B: constexpr):
    """Inner product of column j of x and column k of y."""
    total = x[j] * y[k]
    for i in tl.static_range(1, A):
        total += x[i * B + j] * y[i * B + k]
    return total


@_jit
def _symmetric(x, y, SAME: constexpr, A: constexpr, B: constexpr):
    """sym(xᵀy); SAME if y is x."""
    m = ()
    for j in tl.static_range(B):
        for k in tl.static_range(B):
            if k < j:
                m = m + (m[k * B + j],)
            elif SAME or k == j:
                m = m + (_inner(x, j, y, k, A, B),)
            else:
                m = m + (0.5 * (_inner(x, j, y, k, A, B) + _inner(x, k, y, j, A, B)),)
    return m


@_jit
def _choose(m, shared, own, across, B: constexpr):
    """0, tr(m) I, diag(m) or m, over r²."""
    trace = m[0]
    for j in tl.static_range(1, B):
        trace += m[j * B + j]
    chosen = ()
    for j in tl.static_range(B):
        for k in tl.static_range(B):
            chosen = chosen + (shared * trace + own * m[j * B + j] if j == k else across * m[j * B + k],)
    return chosen


@_jit
def _plus(m, diagonal, B: constexpr):
    """The sum m + diagonal I."""
    total = ()
    for k in tl.static_range(B * B):
        total = total + (m[k] + diagonal if k % (B + 1) == 0 else m[k],)
    return total


@_jit
def _times(x, z, A: constexpr, B: constexpr):
    """The product x z."""
    product = ()
    for i in tl.static_range(A):
        for k in tl.static_range(B):
            total = x[i * B] * z[k]
            for j in tl.static_range(1, B):
                total += x[i * B + j] * z[j * B + k]
            product = product + (total,)
    return product


@_jit
def _commuting(x, z, B: constexpr):
    """The product x z of matrices that commute, so that it is symmetric too."""
    product = ()
    for j in tl.static_range(B):
        for k in tl.static_range(B):
            if k < j:
                product = product + (product[k * B + j],)
            else:
                total = x[j * B] * z[k]
                for i in tl.static_range(1, B):
                    total += x[j * B + i] * z[i * B + k]
                product = product + (total,)
    return product


@_jit
def _combined(alpha, x, beta, y, SIZE: constexpr):
    """The sum alpha x + beta y."""
    total = ()
    for k in tl.static_range(SIZE):
        total = total + (alpha * x[k] + beta * y[k],)
    return total


@_jit
def _scaled(alpha, x, SIZE: constexpr):
    """The multiple alpha x."""
    scaled = ()
    for k in tl.static_range(SIZE):
        scaled = scaled + (alpha * x[k],)
    return scaled


@_jit
def _squared(x, SIZE: constexpr):
    """‖x‖²."""
    total = x[0] * x[0]
    for k in tl.static_range(1, SIZE):
        total += x[k] * x[k]
    return total


@_jit
def _project(w, h, shared, own, across, A: constexpr, B: constexpr):
    """Tangent projection."""
    normal = _times(w, _choose(_symmetric(w, h, False, A, B), shared, own, across, B), A, B)
    return _combined(1.0, h, -1.0, normal, A * B)


@_jit
def _excess(y, shared, own, across, A: constexpr, B: constexpr):
    """``E`` of the retraction ``y (I + E)^(-1/2)``."""
    free = (shared + own == 0).to(shared.dtype)
    return _plus(_choose(_symmetric(y, y, True, A, B), shared, own, across, B), free - 1, B)


@_jit
def _series(e, B: constexpr):
    """(I + e)^(-1/2) for small e: I - e/2 + 3e²/8 - 5e³/16 + 35e⁴/128."""
    square = _commuting(e, e, B)
    tail = _plus(_combined(-0.3125, e, 0.2734375, square, B * B), 0.375, B)
    return _plus(_combined(-0.5, e, 1.0, _commuting(square, tail, B), B * B), 1.0, B)


@_jit
def _newton_schulz(y, shared, own, across, A: constexpr, B: constexpr):
    """Retraction y (I + E)^(-1/2) in double precision, of constrained components.

    It runs the scaled iteration of :mod:`fgo_geo.linalg.newton_schulz` on ``y`` itself: for a long step, a product
    of Gram matrices would lose the digits of the small singular values.
    """
    e = _excess(y, shared, own, across, A, B)
    length = e[0]  # bound on the eigenvalues of E = uᵀu / r² of a step u: the trace of E, or its multiple of I
    for k in tl.static_range(1, B):
        length += tl.where(shared > 0, 0.0, e[k * (B + 1)])
    low = tl.sqrt(1 / (1.05 * (1 + length)))  # head room for points that have drifted off the manifold
    y = _scaled(low, y, A * B)
    rounds = 0
    going = 1
    while going > 0:
        e = _excess(y, shared, own, across, A, B)
        rho = tl.sqrt(3 / (1 + low + low * low))
        y = _times(y, _plus(_scaled(-0.5 * rho * rho * rho, e, B * B), rho * (1.5 - 0.5 * rho * rho), B), A, B)
        low = 0.5 * rho * low * (3 - rho * rho * low * low)
        rounds += 1
        going = tl.max((_squared(e, B * B) > 1e-12).to(tl.int32)) * (rounds < 150).to(tl.int32)
    return _times(y, _series(_excess(y, shared, own, across, A, B), B), A, B)  # corrects rounding errors


@_jit
def _converted(values, DTYPE: constexpr, SIZE: constexpr):
    """The same numbers in another type."""
    converted = ()
    for k in tl.static_range(SIZE):
        converted = converted + (values[k].to(DTYPE),)
    return converted


@_jit
def _kept(condition, x, SIZE: constexpr):
    """Entries of x where the condition holds, else zero, whatever x is."""
    kept = ()
    for k in tl.static_range(SIZE):
        kept = kept + (tl.where(condition, x[k], 0.0),)
    return kept


@_jit
def _where(condition, x, y, SIZE: constexpr):
    """Entries of x where the condition holds, else of y."""
    chosen = ()
    for k in tl.static_range(SIZE):
        chosen = chosen + (tl.where(condition, x[k], y[k]),)
    return chosen


# -- sweeps ------------------------------------------------------------------------------------------------------------


@_jit
def _option(table, number: constexpr, DTYPE: constexpr):
    return tl.load(table + number).to(tl.float64, bitcast=True).to(DTYPE)


@_jit
def _gradient(table, grad, w, kind, SIZE: constexpr, MAXIMIZE: constexpr, DTYPE: constexpr):
    """Gradient with weight decay, which acts on Euclidean components."""
    decay = _option(table, 3, DTYPE)
    if MAXIMIZE:
        decay = -decay
    return _combined(1.0, grad, tl.where(kind == 0, decay, 0.0), w, SIZE)


@_jit
def norms(
    table,
    squares,
    DTYPE: constexpr,
    A: constexpr,
    B: constexpr,
    N: constexpr,
    LEVELS: constexpr,
    PLANAR: constexpr,
    TASKS: constexpr,
    MAXIMIZE: constexpr,
    INVARIANT: constexpr,
):
    """Squared norm of the Riemannian gradient of every kernel, sorted by group."""
    row, kernel, inside, start = _place(table, TASKS, N)
    _, kind, square, shared, own, across = _facts(row, kernel, inside, DTYPE)
    place, exists = _tile(start, inside, row, A, B, LEVELS, PLANAR)
    w = _load(tl.load(row).to(tl.pointer_type(DTYPE)), place, exists, A * B, N, LEVELS, PLANAR)
    h = _load(tl.load(row + 1).to(tl.pointer_type(DTYPE)), place, exists, A * B, N, LEVELS, PLANAR)
    h = _gradient(table, h, w, kind, A * B, MAXIMIZE, DTYPE)
    total = _squared(_project(w, h, shared, own, across, A, B), A * B)
    if INVARIANT:
        total = total / square
    place = tl.load(tl.load(row + 5).to(tl.pointer_type(tl.int32)) + kernel, mask=inside, other=0)
    tl.store(squares + tl.load(row + 7) + place, total.to(tl.float64), mask=inside)


@_jit
def update(
    table,
    scales,
    rate,
    long_steps,
    DTYPE: constexpr,
    A: constexpr,
    B: constexpr,
    N: constexpr,
    LEVELS: constexpr,
    PLANAR: constexpr,
    TASKS: constexpr,
    MAXIMIZE: constexpr,
    INVARIANT: constexpr,
    MOMENTUM: constexpr,
    NESTEROV: constexpr,
    RATE: constexpr,
    LIMIT: constexpr,
):
    """Momentum, step and retraction; the learning rate is that of the table, or the number at address ``rate``.

    Components whose step was too long for the series, ``‖E‖² > LIMIT``, are stored without retraction, for
    ``retract_long_steps``; ``long_steps`` marks the programs that have such components.
    """
    row, kernel, inside, start = _place(table, TASKS, N)
    group, kind, square, shared, own, across = _facts(row, kernel, inside, DTYPE)
    place, exists = _tile(start, inside, row, A, B, LEVELS, PLANAR)
    base = tl.load(row).to(tl.pointer_type(DTYPE))
    w = _load(base, place, exists, A * B, N, LEVELS, PLANAR)
    h = _load(tl.load(row + 1).to(tl.pointer_type(DTYPE)), place, exists, A * B, N, LEVELS, PLANAR)
    h = _gradient(table, h, w, kind, A * B, MAXIMIZE, DTYPE)

    scale = tl.load(scales + tl.load(row + 6) + group, mask=inside, other=0.0).to(DTYPE)
    h = _kept(scale != 0, h, A * B)  # the gradient may be NaN
    if INVARIANT:
        scale = scale / square
    if MAXIMIZE:
        scale = -scale
    lr = tl.load(rate).to(DTYPE) if RATE else _option(table, 0, DTYPE)

    if MOMENTUM:
        momentum = _option(table, 1, DTYPE)
        old = 1 - (tl.load(row + 14) & 1)  # whether the buffer holds momentum
        buffer = tl.load(row + 2).to(tl.pointer_type(DTYPE))
        step = _kept(old > 0, _load(buffer, place, exists, A * B, N, LEVELS, PLANAR), A * B)
        share = scale * tl.where(old > 0, 1 - _option(table, 2, DTYPE), 1.0)
        step = _combined(momentum, step, share, h, A * B)
        step = _project(w, step, shared, own, across, A, B)  # momentum and gradient together, as projection is linear
        _store(buffer, step, place, exists, A * B, N, LEVELS, PLANAR)
        if NESTEROV:
            h = _project(w, h, shared, own, across, A, B)
            step = _combined(momentum, step, scale, h, A * B)
    else:
        step = _project(w, _scaled(scale, h, A * B), shared, own, across, A, B)

    y = _combined(1.0, w, -lr, step, A * B)
    e = _excess(y, shared, own, across, A, B)
    near = _squared(e, B * B) <= LIMIT
    tl.store(long_steps + tl.program_id(0), tl.max(tl.where(kind == 0, 0, 1 - near.to(tl.int32))))
    y = _times(y, _series(_kept(near & (kind > 0), e, B * B), B), A, B)
    _store(base, y, place, exists, A * B, N, LEVELS, PLANAR)


@_jit
def retract_long_steps(
    table,
    long_steps,
    DTYPE: constexpr,
    A: constexpr,
    B: constexpr,
    N: constexpr,
    LEVELS: constexpr,
    PLANAR: constexpr,
    TASKS: constexpr,
):
    """Metric projection onto the manifold in double precision, for the programs that ``long_steps`` marks.

    Points of these programs that are on the manifold do not change.
    """
    if tl.load(long_steps + tl.program_id(0)) > 0:
        row, kernel, inside, start = _place(table, TASKS, N)
        _, kind, _, shared, own, across = _facts(row, kernel, inside, tl.float64)
        place, exists = _tile(start, inside, row, A, B, LEVELS, PLANAR)
        base = tl.load(row).to(tl.pointer_type(DTYPE))
        y = _load(base, place, exists, A * B, N, LEVELS, PLANAR)
        moved = _newton_schulz(_converted(y, tl.float64, A * B), shared, own, across, A, B)
        y = _where(kind > 0, _converted(moved, DTYPE, A * B), y, A * B)
        _store(base, y, place, exists, A * B, N, LEVELS, PLANAR)
