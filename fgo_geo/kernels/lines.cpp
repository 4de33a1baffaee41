// The step on lines for the CPU: vectors of a given norm, of any length, in two sweeps over memory.
//
// A weight on a sphere is one line, or a batch of them; on an oblique manifold every column of a matrix is one, or every
// row. All that a step does to a line is linear in the point x, the gradient h and the momentum m, but for the factor that
// brings it back to its norm, and that follows from their six inner products:
//
//   fgo_line_norms    reads x, h and m: their inner products for every line, in double precision, and from these the
//                     squared norm of the Riemannian gradient of every group;
//   fgo_line_update   turns the products into seven numbers per line, and writes m <- a·(h, m, x) and x <- f b·(h, m, x).
//
// That is eight passes over memory. A matrix whose blocks were dealt to several manifolds is gone through row by row, each
// cut into the segments of its blocks; those that are no lines (Stiefel) are left alone. Plain C ABI, as in fused.cpp.

#include <cmath>
#include <cstdint>
#include <vector>

#if defined(__x86_64__) && defined(__GNUC__)
#define FGO_AVX2 __attribute__((target("arch=haswell,tune=haswell")))
#endif

extern "C" {

// A run of the columns of a row, in the row's order of columns, that belong to one block.
struct fgo_segment {
  int32_t start, count;
  int32_t owner;           // whose: 0 no line's, 1 one line's, 2 a line of every row, 3 a line of every column
  int32_t first_line;
};

// One parameter. Line l is a run of `length` numbers, one line behind the other; or, if width > 1, column l % width of the
// matrix l / width, of `length` rows and `width` columns. If there are patterns, the parameter is one such matrix, and
// its lines are what the segments say.
struct fgo_lines {
  float *weight;
  const float *grad;
  float *buffer;           // null without momentum
  const int32_t *groups;   // per line; null: all are one group
  const double *radii;     // per line, infinite without a constraint; null: `radius`
  double *products;        // six planes of a number per line: <x,x>, <x,h>, <h,h>, <x,m>, <m,m>, <h,m>
  float *moves;            // seven planes: a and b, on h, m and x, and the factor f
  double *squared_norms;   // per group: added to by fgo_line_norms
  const float *scales;     // per group: 1 / tau, read by fgo_line_update; zero leaves the gradient out
  const int32_t *patterns;        // per row: the pattern that its columns are dealt by; or null
  const int32_t *places;          // per row: its number among those of its block
  const fgo_segment *segments;
  const int32_t *first_segments;  // per pattern, and where the last one ends
  const int32_t *orders;          // per pattern: its columns in order; -1 in the first place: as they are
  double radius;
  int64_t lines, length, width;
  int64_t shared;          // of the lines: the first so many, of which several rows have a part
  int32_t first;           // the buffer holds nothing yet
};

struct fgo_line_options {
  double lr, momentum, dampening, weight_decay;
  int32_t nesterov, maximize, radius_invariant;
};

}  // extern "C"

namespace {

constexpr int planes = 6, factor = 6;  // products; the factor is the last of the moves
enum product { xx, xh, hh, xm, mm, hm };
constexpr double most_cancelled = 1e3;  // of squares, in the length of a new point

// What a thread has of a line, or of the lines of a matrix, that it shares with another thread.
struct share_of_lines {
  int64_t task, first_line, count;
  bool begins;                 // with the first number of the lines
  std::vector<double> sums;    // six planes
};

int64_t size_of(const fgo_lines &t) { return (t.patterns ? t.width : t.lines) * t.length; }

}  // namespace

#define FGO_NAMESPACE portable
#define FGO_TARGET
#include "line_sweeps.hpp"
#undef FGO_NAMESPACE
#undef FGO_TARGET

#ifdef FGO_AVX2
#define FGO_NAMESPACE avx2
#define FGO_TARGET FGO_AVX2
#include "line_sweeps.hpp"
#endif

namespace {

struct line_sweeps {
  void (*measure)(const fgo_lines &, int64_t, int64_t, int64_t, std::vector<share_of_lines> &);
  void (*move)(const fgo_lines &, int64_t, int64_t);
};

// The sweeps for this processor.
line_sweeps choose() {
#ifdef FGO_AVX2
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return {avx2::measure, avx2::move};
#endif
  return {portable::measure, portable::move};
}

// Calls run(task, begin, end, thread) on equal shares of the numbers of all tasks, one share per thread. Shares begin with
// a row where there are rows, else where a cache line does.
template <class Run> void share(const fgo_lines *tasks, int64_t count, int threads, Run run) {
  std::vector<int64_t> before(count + 1, 0);
  for (int64_t k = 0; k < count; ++k) before[k + 1] = before[k] + size_of(tasks[k]);
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int number = 0; number < threads; ++number) {
    const double step = double(before[count]) / threads;
    for (int64_t k = 0; k < count; ++k) {
      const int64_t unit = tasks[k].width > 1 || tasks[k].patterns ? tasks[k].width : 16, size = size_of(tasks[k]);
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

// A line's products; without a constraint, of the gradient with weight decay, of which it is `decay` times the point.
struct line_products {
  double g[planes], radius, decay;
  bool free;
};

line_products products_of(const fgo_lines &t, const fgo_line_options &o, int64_t line) {
  line_products p;
  for (int k = 0; k < planes; ++k) p.g[k] = t.products[k * t.lines + line];
  p.radius = radius_of(t, line), p.free = std::isinf(p.radius);
  p.decay = p.free ? (o.maximize ? -o.weight_decay : o.weight_decay) : 0;
  p.g[hh] += p.decay * (2 * p.g[xh] + p.decay * p.g[xx]);
  p.g[xh] += p.decay * p.g[xx];
  p.g[hm] += p.decay * p.g[xm];
  return p;
}

// Squared norm of the Riemannian gradient, ‖h - x <x,h> / r²‖². In double precision nothing that the gradient's own type
// could hold is lost where little of it is tangent.
double square_of_gradient(const fgo_lines &t, const fgo_line_options &o, int64_t line) {
  const line_products p = products_of(t, o, line);
  if (p.free) return p.g[hh];
  const double square = p.radius * p.radius;
  const double tangent = p.g[hh] - p.g[xh] * p.g[xh] / square * (2 - p.g[xx] / square);
  return (tangent < 0 ? 0 : tangent) * (o.radius_invariant ? square : 1);
}

// The numbers of a line from its products: fgo_geo.optim.fgsgd.fgsgd_update on a sphere, or where nothing is to be kept. The
// factor is that of the numbers as they are rounded, which may be large where the gradient is almost normal. Returns
// whether even so the rounding of the sum could take the new point from its norm.
bool find_move(const fgo_lines &t, const fgo_line_options &o, int64_t line) {
  line_products p = products_of(t, o, line);
  double *g = p.g, rate = t.scales[t.groups ? t.groups[line] : 0];
  const double square = p.radius * p.radius;
  const bool old = t.buffer && !t.first, taken = rate != 0;
  if (o.radius_invariant && !p.free) rate *= square;
  if (!taken) g[xh] = g[hh] = g[hm] = 0;  // they may be NaN
  if (!old) g[xm] = g[mm] = g[hm] = 0;
  const double sign = o.maximize ? -1 : 1, share = sign * rate * (old ? 1 - o.dampening : 1), mu = old ? o.momentum : 0;
  // On h, m and x: the momentum, projected onto the tangent space; the direction; the new point before it is normalised.
  const double along = p.free ? 0 : g[xh] / square, before = p.free ? 0 : g[xm] / square;
  const double a[3] = {share, mu, share * (p.decay - along) - mu * before};
  const double nesterov[3] = {sign * rate, 0, sign * rate * (p.decay - along)};
  double b[3];
  for (int k = 0; k < 3; ++k) {
    const double direction = o.nesterov ? nesterov[k] + o.momentum * a[k] : a[k];
    t.moves[k * t.lines + line] = float(a[k]);
    b[k] = t.moves[(3 + k) * t.lines + line] = float((k == 2) - o.lr * direction);
  }
  t.moves[factor * t.lines + line] = 1;
  if (p.free) return false;
  const double terms = b[0] * b[0] * g[hh] + b[1] * b[1] * g[mm] + b[2] * b[2] * g[xx];
  const double length = terms + 2 * (b[0] * b[1] * g[hm] + b[0] * b[2] * g[xh] + b[1] * b[2] * g[xm]);
  t.moves[factor * t.lines + line] = float(p.radius / std::sqrt(length));
  return !(terms <= most_cancelled * length);
}

}  // namespace

extern "C" {

int64_t fgo_line_norms(const fgo_lines *tasks, int64_t count, const fgo_line_options *options, int threads) {
  const line_sweeps run = choose();
  std::vector<std::vector<share_of_lines>> shares(threads);
  share(tasks, count, threads, [&](int64_t k, int64_t begin, int64_t end, int number) {
    run.measure(tasks[k], k, begin, end, shares[number]);
  });
  for (const auto &of_thread : shares)  // in the order of the numbers: the sums don't depend on the threads' timing
    for (const share_of_lines &part : of_thread)
      for (int k = 0; k < planes; ++k)
        for (int64_t l = 0; l < part.count; ++l) {
          double &sum = tasks[part.task].products[k * tasks[part.task].lines + part.first_line + l];
          sum = (part.begins ? 0 : sum) + part.sums[k * part.count + l];
        }
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (int64_t k = 0; k < count; ++k)
    for (int64_t l = 0; l < tasks[k].lines; ++l)
      tasks[k].squared_norms[tasks[k].groups ? tasks[k].groups[l] : 0] += square_of_gradient(tasks[k], *options, l);
  return 0;
}

// Returns the number of lines whose new point is to be normalised once more.
int64_t fgo_line_update(const fgo_lines *tasks, int64_t count, const fgo_line_options *options, int threads) {
  const line_sweeps run = choose();
  int64_t off = 0;
#pragma omp parallel num_threads(threads) reduction(+ : off)
  for (int64_t k = 0; k < count; ++k)
#pragma omp for schedule(static) nowait
    for (int64_t l = 0; l < tasks[k].lines; ++l) off += find_move(tasks[k], *options, l);
  share(tasks, count, threads, [&](int64_t k, int64_t begin, int64_t end, int) { run.move(tasks[k], begin, end); });
  return off;
}

// Copies blocks out of a matrix of `width` columns, or back into it: entry (i, j) of block k lies in row rows[k a + i] and
// column columns[k b + j] of the matrix.
int64_t fgo_take(const float *matrix, int64_t width, const int32_t *rows, const int32_t *columns, int64_t n, int64_t a, int64_t b,
                 float *blocks, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < n * a; ++i)
    for (int64_t j = 0; j < b; ++j) blocks[i * b + j] = matrix[rows[i] * width + columns[i / a * b + j]];
  return 0;
}

int64_t fgo_put(float *matrix, int64_t width, const int32_t *rows, const int32_t *columns, int64_t n, int64_t a, int64_t b,
                const float *blocks, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < n * a; ++i)
    for (int64_t j = 0; j < b; ++j) matrix[rows[i] * width + columns[i / a * b + j]] = blocks[i * b + j];
  return 0;
}
}
