// The step on lines for the CPU: vectors of a given norm, of any length, in two sweeps over memory.
//
// A weight on a sphere is one line or a batch of lines; on an oblique manifold every column of a matrix is a line, or every
// row. A step is linear in the point x, the gradient h and the momentum m, except for the factor that restores the norm, and
// that factor follows from their six inner products:
//
//   fgo_line_norms    reads x, h and m, and computes their inner products for every line in double precision, and from them
//                     the squared norm of the Riemannian gradient of every group;
//   fgo_line_update   computes seven coefficients per line from the products, and writes m <- a·(h, m, x) and
//                     x <- f (x + b·(h, m, x)).
//
// Together these are eight passes over memory. Where the terms of x + b·(h, m, x) cancel, as in a long step along the
// normal, the products do not determine its length: such lines are processed a second time, in double precision. A matrix
// whose blocks belong to several manifolds is processed row by row, and each row is split into the segments of its blocks;
// the first sweep skips blocks without lines (Stiefel). The second sweep writes the values that another path has computed for
// them, in the same call, so that an interrupt leaves every weight as before its step or as after it. Plain C ABI, as in
// fused.cpp.

#include <cmath>
#include <cstring>
#include <vector>

#include "matrices.hpp"

extern "C" {

// Blocks of equal shape in one matrix.
struct fgo_block {
  float *matrix;
  int64_t width;
  const int32_t *rows, *columns;
  int64_t n, a, b;
  const float *blocks;
};

}  // extern "C"

namespace {

enum product { xx, xh, hh, xm, mm, hm, products };
enum coefficient { a_h, a_m, a_x, b_h, b_m, b_x, factor, coefficients };
constexpr double least_tangent = 1e-9;  // of a gradient's squared norm; below it, rounding errors of the products dominate
constexpr double most_cancelled = 100;  // ratio of the terms' squares to the new squared length; errors grow tenfold

// A thread's part of the products of lines that extend into another thread's range.
struct partial_sums {
  int64_t task, first_line, count;
  bool is_first;             // the range holds the first number of the lines
  std::vector<double> sums;  // a plane per product
};

int64_t size_of(const fgo_lines &t) { return (t.pattern_of_row ? t.width : t.lines) * t.length; }

}  // namespace

#define FGO_SOURCE "line_sweeps.hpp"
#define FGO_PORTABLE_BYTES 32
#include "each_set.hpp"

#define FGO_MEASURE(set) set::measure
#define FGO_MOVE(set) set::move

namespace {

// Calls run(task, begin, end, thread) so that every thread gets an equal range of the numbers of all tasks. Ranges begin at
// a row where there are rows, elsewhere at a cache line.
template <class Run> void run_in_threads(const fgo_lines *tasks, int64_t count, int threads, Run run) {
  std::vector<int64_t> before(count + 1, 0);
  for (int64_t k = 0; k < count; ++k) before[k + 1] = before[k] + size_of(tasks[k]);
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int number = 0; number < threads; ++number) {
    const double step = double(before[count]) / threads;
    for (int64_t k = 0; k < count; ++k) {
      const int64_t unit = tasks[k].width > 1 || tasks[k].pattern_of_row ? tasks[k].width : 16, size = size_of(tasks[k]);
      auto part = [&](int edge) {
        if (edge == threads) return size;
        const double x = step * edge - double(before[k]);
        return x <= 0 ? int64_t(0) : x >= double(size) ? size : int64_t(x) / unit * unit;
      };
      if (part(number) < part(number + 1)) run(k, part(number), part(number + 1), number);
    }
  }
}

double radius_of(const fgo_lines &t, int64_t line) { return t.radii ? t.radii[line] : t.radius; }

bool is_free(const fgo_lines &t, int64_t line) { return std::isinf(radius_of(t, line)); }

// Factor of the point in the gradient of a line without constraint.
double decay_of(const fgo_matrix_options &o) { return o.maximize ? -o.weight_decay : o.weight_decay; }

// Coefficient of the point in the gradient's normal part: h - x <x,h> / r² is tangent.
double along_of(const fgo_lines &t, int64_t line) {
  const double radius = radius_of(t, line);
  return t.products[xh * t.lines + line] / (radius * radius);
}

// Squared norm of the Riemannian gradient, ‖h - x <x,h> / r²‖², from the products; with rounding it can be negative.
double square_of_gradient(const fgo_lines &t, const fgo_matrix_options &o, int64_t line) {
  double g[products];
  for (int k = 0; k < products; ++k) g[k] = t.products[k * t.lines + line];
  const double square = radius_of(t, line) * radius_of(t, line), decay = decay_of(o);
  if (is_free(t, line)) return g[hh] + decay * (2 * g[xh] + decay * g[xx]);
  return g[hh] - g[xh] * g[xh] / square * (2 - g[xx] / square);
}

// The step of a line, fgsgd_update of fgo_geo/paths/reference.py on a sphere or in the plane: a and b, of h, m and x each.
struct line_step {
  double a[3], b[3];
  bool has_momentum, has_gradient;  // without has_gradient the gradient may be NaN and is not used
};

line_step step_of(const fgo_lines &t, const fgo_matrix_options &o, int64_t line) {
  line_step v;
  double rate = t.scales[t.groups ? t.groups[line] : 0];
  const double square = radius_of(t, line) * radius_of(t, line);
  const bool free = is_free(t, line);
  v.has_momentum = t.buffer && !t.first, v.has_gradient = rate != 0;
  if (o.radius_invariant && !free) rate *= square;
  const double sign = o.maximize ? -1 : 1, mu = v.has_momentum ? o.momentum : 0;
  const double of_gradient = sign * rate * (v.has_momentum ? 1 - o.dampening : 1);
  const double of_point = free ? decay_of(o) : v.has_gradient ? -along_of(t, line) : 0;
  const double normal_momentum = free || !v.has_momentum ? 0 : t.products[xm * t.lines + line] / square;
  v.a[0] = of_gradient, v.a[1] = mu, v.a[2] = of_gradient * of_point - mu * normal_momentum;
  const double nesterov[3] = {sign * rate, 0, sign * rate * of_point};
  for (int k = 0; k < 3; ++k) v.b[k] = -o.lr * (o.nesterov ? nesterov[k] + o.momentum * v.a[k] : v.a[k]);
  return v;
}

// Writes the coefficients of a line; the factor is that of the rounded coefficients. Returns whether the terms cancel: the
// coefficients then leave the line unchanged, and move_in_double() has to move it.
bool write_coefficients(const fgo_lines &t, const fgo_matrix_options &o, int64_t line) {
  const line_step v = step_of(t, o, line);
  auto at = [&](int k) -> float & { return t.coefficients[k * t.lines + line]; };
  for (int k = 0; k < 3; ++k) at(a_h + k) = float(v.a[k]), at(b_h + k) = float(v.b[k]);
  at(factor) = 1;
  if (is_free(t, line)) return false;
  auto g = [&](int k, bool there) { return there ? t.products[k * t.lines + line] : 0; };
  const double b[3] = {at(b_h), at(b_m), 1 + double(at(b_x))};
  const double terms = b[0] * b[0] * g(hh, v.has_gradient) + b[1] * b[1] * g(mm, v.has_momentum) + b[2] * b[2] * g(xx, true);
  const double mixed = b[0] * b[1] * g(hm, v.has_gradient && v.has_momentum) + b[0] * b[2] * g(xh, v.has_gradient) +
                       b[1] * b[2] * g(xm, v.has_momentum);
  const double length = terms + 2 * mixed;
  if (terms <= most_cancelled * length) {
    at(factor) = float(radius_of(t, line) / std::sqrt(length));
    return false;
  }
  for (int k = 0; k < coefficients; ++k) at(k) = k == a_m || k == factor;
  return true;
}

// Calls run(line, index) for every number of a task that belongs to a line.
template <class Run> void for_every_number(const fgo_lines &t, Run run) {
  if (!t.pattern_of_row) {
    for (int64_t e = 0; e < t.lines * t.length; ++e)
      run(t.width > 1 ? e / (t.length * t.width) * t.width + e % t.width : e / t.length, e);
    return;
  }
  for (int64_t row = 0; row < t.length; ++row) {
    const int32_t pattern = t.pattern_of_row[row], *order = t.column_orders + pattern * t.width;
    for (int32_t k = t.first_segments[pattern]; k < t.first_segments[pattern + 1]; ++k) {
      const fgo_segment &s = t.segments[k];
      for (int32_t j = 0; s.form != no_line && j < s.count; ++j) {
        const int64_t own = s.form == line_per_row ? t.row_in_block[row] : s.form == line_per_column ? j : 0;
        run(s.first_line + own, row * t.width + (*order < 0 ? s.start + j : order[s.start + j]));
      }
    }
  }
}

// Adds the squared gradient norms of a task's lines to their groups. Where the difference of the products is lost in
// rounding, the function sums the tangent part itself, because its norm determines the length of the step.
void add_squares(const fgo_lines &t, const fgo_matrix_options &o) {
  std::vector<double> squares(t.lines);
  std::vector<char> cancels(t.lines, 0);
  bool any = false;
  for (int64_t l = 0; l < t.lines; ++l) {
    squares[l] = square_of_gradient(t, o, l);
    cancels[l] = !is_free(t, l) && squares[l] < least_tangent * t.products[hh * t.lines + l];
    any |= cancels[l];
    if (cancels[l]) squares[l] = 0;
  }
  if (any)
    for_every_number(t, [&](int64_t line, int64_t e) {
      if (!cancels[line]) return;
      const double tangent = t.grad[e] - along_of(t, line) * t.weight[e];
      squares[line] += tangent * tangent;
    });
  for (int64_t l = 0; l < t.lines; ++l) {
    const bool scaled = o.radius_invariant && !is_free(t, l);
    t.squared_norms[t.groups ? t.groups[l] : 0] += squares[l] * (scaled ? radius_of(t, l) * radius_of(t, l) : 1);
  }
}

// Moves the lines whose terms cancel, in double precision, and normalises each new point by its own length.
void move_in_double(const fgo_lines &t, const fgo_matrix_options &o, const std::vector<char> &cancels) {
  std::vector<double> squares(t.lines, 0.0);
  auto combine = [&](const line_step &v, const double *by, int64_t e) {
    return (v.has_gradient ? by[0] * t.grad[e] : 0) + (v.has_momentum ? by[1] * t.buffer[e] : 0) + by[2] * t.weight[e];
  };
  for_every_number(t, [&](int64_t line, int64_t e) {
    if (!cancels[line]) return;
    const line_step v = step_of(t, o, line);
    const double y = t.weight[e] + combine(v, v.b, e);
    squares[line] += y * y;
  });
  for_every_number(t, [&](int64_t line, int64_t e) {
    if (!cancels[line] || !(squares[line] > 0)) return;
    const line_step v = step_of(t, o, line);
    const double y = t.weight[e] + combine(v, v.b, e), kept = combine(v, v.a, e);
    t.weight[e] = float(y * (radius_of(t, line) / std::sqrt(squares[line])));
    if (t.buffer) t.buffer[e] = float(kept);
  });
}

}  // namespace

extern "C" {

FGO_API int64_t fgo_line_norms(const fgo_lines *tasks, int64_t count, const fgo_matrix_options *options, int threads) {
  const auto measure = FGO_IN_USE(FGO_MEASURE);
  std::vector<std::vector<partial_sums>> partials(threads);
  run_in_threads(tasks, count, threads, [&](int64_t k, int64_t begin, int64_t end, int number) {
    measure(tasks[k], k, begin, end, partials[number]);
  });
  for (const auto &of_thread : partials)  // in the order of the numbers, so that sums do not depend on the threads' timing
    for (const partial_sums &part : of_thread)
      for (int k = 0; k < products; ++k)
        for (int64_t l = 0; l < part.count; ++l) {
          double &sum = tasks[part.task].products[k * tasks[part.task].lines + part.first_line + l];
          sum = (part.is_first ? 0 : sum) + part.sums[k * part.count + l];
        }
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (int64_t k = 0; k < count; ++k) add_squares(tasks[k], *options);
  return 0;
}

FGO_API int64_t fgo_line_update(const fgo_lines *tasks, int64_t count, const fgo_matrix_options *options, int threads) {
  const auto move = FGO_IN_USE(FGO_MOVE);
  std::vector<std::vector<char>> cancels(count);
  for (int64_t k = 0; k < count; ++k) cancels[k].assign(tasks[k].lines, 0);
  int64_t cancelled = 0;
#pragma omp parallel num_threads(threads) reduction(+ : cancelled)
  for (int64_t k = 0; k < count; ++k)
#pragma omp for schedule(static) nowait
    for (int64_t l = 0; l < tasks[k].lines; ++l) cancelled += cancels[k][l] = write_coefficients(tasks[k], *options, l);
  run_in_threads(tasks, count, threads, [&](int64_t k, int64_t begin, int64_t end, int) { move(tasks[k], begin, end); });
  if (!cancelled) return 0;
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (int64_t k = 0; k < count; ++k)
    for (char own : cancels[k])
      if (own) {
        move_in_double(tasks[k], *options, cancels[k]);
        break;
      }
  return 0;
}

// Copies blocks out of a matrix of `width` columns, and back into it: entry (i, j) of block k is in row rows[k a + i] and
// column columns[k b + j] of the matrix.
FGO_API int64_t fgo_take(const float *matrix, int64_t width, const int32_t *rows, const int32_t *columns, int64_t n, int64_t a, int64_t b,
                 float *blocks, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < n * a; ++i)
    for (int64_t j = 0; j < b; ++j) blocks[i * b + j] = matrix[rows[i] * width + columns[i / a * b + j]];
  return 0;
}

FGO_API int64_t fgo_put(const fgo_block *blocks, int64_t count, int threads) {
  for (int64_t k = 0; k < count; ++k) {
    const fgo_block &own = blocks[k];
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < own.n * own.a; ++i) {
      float *const row = own.matrix + own.rows[i] * own.width;
      const float *const from = own.blocks + i * own.b;
      const int32_t *const columns = own.columns + i / own.a * own.b;
      if (columns[own.b - 1] - columns[0] == own.b - 1)
        std::memcpy(row + columns[0], from, own.b * sizeof(float));
      else
        for (int64_t j = 0; j < own.b; ++j) row[columns[j]] = from[j];
    }
  }
  return 0;
}
}
