// The step of one Stiefel block, compiled once per instruction set (each_set.hpp), see stiefel.cpp.

#include "columns.hpp"
#include "products.hpp"

namespace {
namespace FGO_NAMESPACE {

typedef float half __attribute__((vector_size(FGO_BYTES / 2)));
typedef double wide __attribute__((vector_size(FGO_BYTES)));

// Adds up squares in double precision.
FGO_TARGET __attribute__((noinline)) double square_of(const float *x, int64_t count) {
  wide total[2] = {};
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes)
    for (int k = 0; k < 2; ++k) {
      const wide own = __builtin_convertvector(load<half>(x + i + k * lanes / 2), wide);
      total[k] += own * own;
    }
  total[0] += total[1];
  double sum = 0;
  for (int j = 0; j < lanes / 2; ++j) sum += total[0][j];
  for (; i < count; ++i) sum += double(x[i]) * x[i];
  return sum;
}

FGO_TARGET void copy_run(const float *x, int64_t count, float factor, float *to) {
  for (int64_t j = 0; j < count; ++j) to[j] = factor * x[j];
}

FGO_TARGET void add_run(const float *x, int64_t count, float factor, float by, float *to) {
  for (int64_t j = 0; j < count; ++j) to[j] = by * to[j] + factor * x[j];
}

// to = factor x + by to for the entries of x that belong to a block; with `by` zero, `to` may be uninitialised.
FGO_TARGET void gather(const fgo_stiefel &t, int64_t block, const float *x, float factor, float by, float *to, int threads) {
  const int32_t *const columns = t.columns + block * t.b, *const rows = t.rows + block * t.a;
  const bool is_run = columns[t.b - 1] - columns[0] == t.b - 1;
  constexpr int64_t rows_to_come = 4, line = 16;  // between a row and its prefetch, and numbers of a cache line
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t i = 0; i < t.a; ++i) {
    const float *const row = x + rows[i] * t.width;
    const float *const next = x + rows[least(i + rows_to_come, t.a - 1)] * t.width;
    float *const own = to + i * t.b;
    for (int64_t j = columns[0]; j <= columns[t.b - 1]; j += line) __builtin_prefetch(next + j);
    if (is_run)
      by == 0 ? copy_run(row + columns[0], t.b, factor, own) : add_run(row + columns[0], t.b, factor, by, own);
    else
      gather_row(row, columns, t.b, factor, by, own);
  }
}

// Memory of a block, and its products.
struct work {
  const fgo_stiefel &t;
  const int64_t block, entries, side, square;
  const bool is_wide;
  const double radius;
  const int threads;
  std::unique_ptr<float[]> memory;
  float *const x, *const m;  // in the memory of the results
  float *y, *e, *f2, *f3, *gap, *rest, *panels;

  work(const fgo_stiefel &task, int64_t number, int n_threads)
      : t(task), block(number), entries(task.a * task.b), side(shorter(task)), square(side * side), is_wide(task.a < task.b),
        radius(task.radii[number]), threads(n_threads), x(task.points + number * entries), m(task.momenta + number * entries) {
    const int64_t longer = is_wide ? t.b : t.a, product = memory_of_product(longer, longer, longer);
    memory.reset(new float[entries + 5 * square + product]);
    y = memory.get(), e = y + entries, f2 = e + square, f3 = f2 + square, gap = f3 + square, rest = gap + square;
    panels = rest + square;
  }

  // c = alpha uᵀv of tall matrices, side x side.
  FGO_TARGET void inner(const float *u, const float *v, double alpha, float *c) {
    const matrix left = is_wide ? matrix{u, t.b, 1} : matrix{u, 1, t.b}, right = is_wide ? matrix{v, 1, t.b} : matrix{v, t.b, 1};
    multiply(side, side, is_wide ? t.b : t.a, left, right, float(alpha), nullptr, c, u == v, panels, threads);
  }

  // c = base - u s of a tall matrix and a symmetric one; c may be base.
  FGO_TARGET void subtract(const float *base, const float *u, const float *s, float *c) {
    const matrix tall{u, t.b, 1}, small{s, side, 1};
    multiply(t.a, t.b, side, is_wide ? small : tall, is_wide ? tall : small, -1, base, c, false, panels, threads);
  }

  // c = alpha u v of commuting symmetric matrices, plus base.
  FGO_TARGET void commute(const float *u, const float *v, double alpha, const float *base, float *c) {
    multiply(side, side, side, {u, side, 1}, {v, side, 1}, float(alpha), base, c, true, panels, threads);
  }

  // s <- factor (s + sᵀ).
  FGO_TARGET void symmetrise(float *s, double factor) {
    constexpr int64_t tile_side = 16;
    const float own = float(factor);
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (threads > 1)
    for (int64_t row = 0; row < side; row += tile_side)
      for (int64_t column = 0; column <= row; column += tile_side)
        for (int64_t i = row; i < least(row + tile_side, side); ++i)
          for (int64_t j = column; j < least(column + tile_side, i + 1); ++j)
            s[i * side + j] = s[j * side + i] = own * (s[i * side + j] + s[j * side + i]);
  }

  FGO_TARGET void add_to_diagonal(float *s, double number) {
    for (int64_t i = 0; i < side; ++i) s[i * (side + 1)] += float(number);
  }

  // to = p u + q v + r w.
  FGO_TARGET void combine(double p, const float *u, double q, const float *v, double r, const float *w, float *to) {
    const float by[3] = {float(p), float(q), float(r)};
    for (int64_t i = 0; i < square; ++i) to[i] = by[0] * u[i] + by[1] * v[i] + by[2] * w[i];
  }

  // Projects: to = t - x sym(xᵀt) / r², where to may be t.
  FGO_TARGET void project(const float *tangent, float *to) {
    inner(x, tangent, 1, e);
    symmetrise(e, 0.5 / (radius * radius));
    subtract(tangent, x, e, to);
  }

  // gap = I - (I + E)^(-1/2) for E with eigenvalues in [0, norm], by this many terms of the series around the middle.
  FGO_TARGET void series_gap(double norm, int terms) {
    const double middle = norm / 2, root = 1 / std::sqrt(1 + middle);
    add_to_diagonal(e, -middle);
    combine(1 / (1 + middle), e, 0, e, 0, e, e);  // F
    double c[most_terms + 1];
    for (int k = 0; k <= most_terms; ++k) c[k] = k <= terms ? -root * series.of[k] : 0;
    if (terms == 1) {
      combine(c[1], e, 0, e, 0, e, gap);
    } else if (terms == 2) {
      commute(e, e, 1, nullptr, f2);
      combine(c[1], e, c[2], f2, 0, f2, gap);
    } else if (terms == 4) {
      commute(e, e, 1, nullptr, f2);
      combine(c[3], e, c[4], f2, 0, f2, rest);
      combine(c[1], e, c[2], f2, 0, f2, gap);
      commute(f2, rest, 1, gap, gap);
    } else {  // Horner's rule in F³
      commute(e, e, 1, nullptr, f2);
      commute(e, f2, 1, nullptr, f3);
      combine(c[terms - 2], e, c[terms - 1], f2, c[terms], f3, rest);
      for (int k = terms - 5; k >= 1; k -= 3) {
        combine(c[k], e, c[k + 1], f2, c[k + 2], f3, gap);
        commute(f3, rest, 1, gap, gap);
        std::swap(gap, rest);
      }
      std::swap(gap, rest);
    }
    add_to_diagonal(gap, 1 - root);
  }

  // The same by Newton-Schulz iterations, see linalg/newton_schulz.py.
  FGO_TARGET void newton_schulz_gap(double norm) {
    const double top = margin * (1 + norm);
    add_to_diagonal(e, 1);
    combine(1 / top, e, 0, e, 0, e, e);
    bool is_first = true;
    for (double low = 1 / std::sqrt(top); 1 - low > 2 * precision; is_first = false) {
      const double rho = std::sqrt(3 / (1 + low + low * low)), cubed = rho * rho * rho;
      low = rho * low * (3 - rho * rho * low * low) / 2;
      combine(-0.5 * cubed, e, 0, e, 0, e, f2);  // the factor
      add_to_diagonal(f2, 1.5 * rho);
      if (is_first) {
        std::swap(gap, f2);
        commute(e, gap, 1, nullptr, f3);
        commute(f3, gap, 1, nullptr, e);
      } else {
        commute(gap, f2, 1, nullptr, rest);
        std::swap(gap, rest);
        commute(e, f2, 1, nullptr, f3);
        commute(f3, f2, 1, nullptr, e);
      }
    }
    combine(-1 / std::sqrt(top), gap, 0, gap, 0, gap, gap);
    add_to_diagonal(gap, 1);
  }

  // E = yᵀy / r² - I, and its norm.
  FGO_TARGET double excess_of(const float *point) {
    inner(point, point, 1 / (radius * radius), e);
    add_to_diagonal(e, -1);
    return std::sqrt(square_of(e, square));
  }

  // The polar retraction of y, given ‖u‖² / r²; false if the iterations do not converge to it.
  FGO_TARGET bool retract(double explained, float *to) {
    if (!(explained <= longest)) return false;
    const double norm = excess_of(y);
    if (!(norm <= explained + most_drift)) return false;
    const int terms = terms_for(norm / (2 + norm));
    terms ? series_gap(norm, terms) : newton_schulz_gap(norm);
    subtract(y, y, gap, to);
    if (explained > polished) {
      excess_of(to);
      combine(0.5, e, 0, e, 0, e, e);
      subtract(to, to, e, y);
      __builtin_memcpy(to, y, entries * sizeof(float));
    }
    return true;
  }
};

// The squared norm of the Riemannian gradient of a block, or of the Euclidean one. Point and gradient stay in the memory of the
// results, where they may be already.
template <bool BOUNDS, bool GATHERS>
FGO_TARGET void measure(const fgo_stiefel &t, const fgo_matrix_options &o, int64_t block, int threads) {
  work w(t, block, threads);
  if (GATHERS) {
    gather(t, block, t.weight, 1, 0, w.x, threads);
    gather(t, block, t.grad, 1, 0, w.m, threads);
  }
  const double whole = square_of(w.m, w.entries);
  double tangent = whole;
  if (!BOUNDS) {
    w.inner(w.x, w.m, 1, w.e);
    w.symmetrise(w.e, 0.5 / (w.radius * w.radius));
    tangent -= square_of(w.e, w.square) * w.radius * w.radius;
    if (tangent < least_tangent * whole) {  // the difference is mostly rounding
      w.subtract(w.m, w.x, w.e, w.y);
      tangent = square_of(w.y, w.entries);
    }
  }
  t.squares[block] = o.radius_invariant ? tangent * w.radius * w.radius : tangent;
}

// The new momentum and the new point of a block.
FGO_TARGET void move(const fgo_stiefel &t, const fgo_matrix_options &o, int64_t block, int threads) {
  work w(t, block, threads);
  float *const m = w.m;
  const double scale = t.scales[t.groups[block]] * (o.radius_invariant ? w.radius * w.radius : 1) * (o.maximize ? -1 : 1);
  const float of_gradient = float(t.buffer ? scale * (1 - o.dampening) : scale);
  if (o.nesterov) __builtin_memcpy(w.y, m, w.entries * sizeof(float));
  if (scale == 0) __builtin_memset(m, 0, w.entries * sizeof(float));  // the gradient may be NaN
  if (t.buffer)
    gather(t, block, t.buffer, float(o.momentum), of_gradient, m, threads);
  else
    for (int64_t i = 0; i < w.entries; ++i) m[i] *= of_gradient;
  w.project(m, m);
  const float *direction = m;
  if (o.nesterov) {  // P(g) + momentum m, where m is tangent
    for (int64_t i = 0; i < w.entries; ++i) w.y[i] = (scale == 0 ? 0 : float(scale) * w.y[i]) + float(o.momentum) * m[i];
    w.project(w.y, w.y);
    direction = w.y;
  }
  const double explained = square_of(direction, w.entries) * (o.lr / w.radius) * (o.lr / w.radius);
  const float rate = float(o.lr);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t i = 0; i < w.entries; ++i) w.y[i] = w.x[i] - rate * direction[i];
  t.failed[block] = !w.retract(explained, w.x);
  if (t.failed[block]) __builtin_memcpy(w.x, w.y, w.entries * sizeof(float));
}

}  // namespace FGO_NAMESPACE
}  // namespace
