// The step on lines for the CPU: vectors of a given norm, of any length, in two sweeps over memory.
//
// A weight on a sphere is one line, or a batch of them; on an oblique manifold every column of a matrix is one, or every
// row. All that a step does to a line is linear in the point x, the gradient h and the momentum m, but for the factor that
// brings it back to its norm, and that follows from their six inner products:
//
//   fgo_line_norms    reads x, h and m: their inner products for every line, in double precision, and from these the
//                     squared norm of the Riemannian gradient of every group;
//   fgo_line_update   turns the products into seven numbers per line, and writes m <- a·(h, m, x) and
//                     x <- f (x + b·(h, m, x)).
//
// That is eight passes over memory. Where the terms of x + b·(h, m, x) cancel, as they do for a long step along the normal,
// the products know too little of its length: such lines are gone through once more, in double precision. A matrix whose blocks were dealt to several manifolds is gone through row by row, each
// cut into the segments of its blocks; those that are no lines (Stiefel) are left alone. Plain C ABI, as in fused.cpp.

#include <cmath>
#include <cstdint>
#include <vector>

#ifdef _WIN32
#define FGO_API __declspec(dllexport)
#else
#define FGO_API
#endif

#if defined(__x86_64__) && defined(__GNUC__) && !defined(FGO_PORTABLE)
#define FGO_AVX2 __attribute__((target("arch=haswell,tune=haswell")))
#endif

extern "C" {

// Whose the entries of a block are.
enum fgo_owner { nobody, one_line, line_per_row, line_per_column };

// A run of the columns of a row, in the row's order of columns, that belong to one block.
struct fgo_segment {
  int32_t start, count;
  int32_t owner;
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

int64_t fgo_limit(int);  // see fused.cpp

// Blocks of one matrix, as fgo_put takes them.
struct fgo_block {
  float *matrix;
  int64_t width;
  const int32_t *rows, *columns;
  int64_t n, a, b;
  const float *blocks;
};

struct fgo_line_options {
  double lr, momentum, dampening, weight_decay;
  int32_t nesterov, maximize, radius_invariant;
};

}  // extern "C"

namespace {

enum product { xx, xh, hh, xm, mm, hm, products };
enum move { a_h, a_m, a_x, b_h, b_m, b_x, factor, moves };
constexpr double least_tangent = 1e-9;  // of a gradient's square, or rounding of the products counts in it
constexpr double most_cancelled = 100;  // of squares, in the length of a new point; rounding is ten times as large then

// What a thread has of a line, or of the lines of a matrix, that it shares with another thread.
struct share_of_lines {
  int64_t task, first_line, count;
  bool begins;                 // with the first number of the lines
  std::vector<double> sums;    // a plane per product
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
  if (fgo_limit(-1) > 0) return {avx2::measure, avx2::move};
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

bool is_free(const fgo_lines &t, int64_t line) { return std::isinf(radius_of(t, line)); }

// What a free line's gradient gets of the point.
double decay_of(const fgo_line_options &o) { return o.maximize ? -o.weight_decay : o.weight_decay; }

// What a gradient has along the point: h - x <x,h> / r² is tangent.
double along_of(const fgo_lines &t, int64_t line) {
  const double radius = radius_of(t, line);
  return t.products[xh * t.lines + line] / (radius * radius);
}

// Squared norm of the Riemannian gradient, ‖h - x <x,h> / r²‖², as the products have it: rounding can take it below zero.
double square_of_gradient(const fgo_lines &t, const fgo_line_options &o, int64_t line) {
  double g[products];
  for (int k = 0; k < products; ++k) g[k] = t.products[k * t.lines + line];
  const double square = radius_of(t, line) * radius_of(t, line), decay = decay_of(o);
  if (is_free(t, line)) return g[hh] + decay * (2 * g[xh] + decay * g[xx]);
  return g[hh] - g[xh] * g[xh] / square * (2 - g[xx] / square);
}

// What a line moves by, fgo_geo.optim.fgsgd.fgsgd_update on a sphere or in the plane: a and b, on h, m and x.
struct line_move {
  double a[3], b[3];
  bool old, taken;  // whether there is momentum, and whether the gradient counts: it may be NaN if not
};

line_move move_of(const fgo_lines &t, const fgo_line_options &o, int64_t line) {
  line_move v;
  double rate = t.scales[t.groups ? t.groups[line] : 0];
  const double square = radius_of(t, line) * radius_of(t, line);
  const bool free = is_free(t, line);
  v.old = t.buffer && !t.first, v.taken = rate != 0;
  if (o.radius_invariant && !free) rate *= square;
  const double sign = o.maximize ? -1 : 1, share = sign * rate * (v.old ? 1 - o.dampening : 1), mu = v.old ? o.momentum : 0;
  const double along = free || !v.taken ? 0 : along_of(t, line);
  const double before = free || !v.old ? 0 : t.products[xm * t.lines + line] / square;
  const double normal = free ? decay_of(o) : -along;
  v.a[0] = share, v.a[1] = mu, v.a[2] = share * normal - mu * before;
  const double nesterov[3] = {sign * rate, 0, sign * rate * normal};
  for (int k = 0; k < 3; ++k) v.b[k] = -o.lr * (o.nesterov ? nesterov[k] + o.momentum * v.a[k] : v.a[k]);
  return v;
}

// Writes down what a line moves by. The factor is that of the numbers as they are rounded. Returns whether the line has to be
// moved with care; it stays where it is then.
bool write_move(const fgo_lines &t, const fgo_line_options &o, int64_t line) {
  const line_move v = move_of(t, o, line);
  auto at = [&](int k) -> float & { return t.moves[k * t.lines + line]; };
  for (int k = 0; k < 3; ++k) at(a_h + k) = float(v.a[k]), at(b_h + k) = float(v.b[k]);
  at(factor) = 1;
  if (is_free(t, line)) return false;
  auto g = [&](int k, bool there) { return there ? t.products[k * t.lines + line] : 0; };
  const double b[3] = {at(b_h), at(b_m), 1 + double(at(b_x))};
  const double terms = b[0] * b[0] * g(hh, v.taken) + b[1] * b[1] * g(mm, v.old) + b[2] * b[2] * g(xx, true);
  const double length = terms + 2 * (b[0] * b[1] * g(hm, v.taken && v.old) + b[0] * b[2] * g(xh, v.taken) + b[1] * b[2] * g(xm, v.old));
  if (terms <= most_cancelled * length) {
    at(factor) = float(radius_of(t, line) / std::sqrt(length));
    return false;
  }
  for (int k = 0; k < moves; ++k) at(k) = k == a_m || k == factor;
  return true;
}

// Calls run(line, place) for every number of a task that belongs to a line.
template <class Run> void for_every_number(const fgo_lines &t, Run run) {
  if (!t.patterns) {
    for (int64_t e = 0; e < t.lines * t.length; ++e)
      run(t.width > 1 ? e / (t.length * t.width) * t.width + e % t.width : e / t.length, e);
    return;
  }
  for (int64_t row = 0; row < t.length; ++row) {
    const int32_t pattern = t.patterns[row], *order = t.orders + pattern * t.width;
    for (int32_t k = t.first_segments[pattern]; k < t.first_segments[pattern + 1]; ++k) {
      const fgo_segment &s = t.segments[k];
      for (int32_t j = 0; s.owner != nobody && j < s.count; ++j) {
        const int64_t own = s.owner == line_per_row ? t.places[row] : s.owner == line_per_column ? j : 0;
        run(s.first_line + own, row * t.width + (*order < 0 ? s.start + j : order[s.start + j]));
      }
    }
  }
}

// Adds the squared norms of the gradients of a task's lines to those of their groups. Of lines where the products leave next
// to nothing, the tangent part is gone through itself: its norm decides how far the line may go.
void add_squares(const fgo_lines &t, const fgo_line_options &o) {
  std::vector<double> squares(t.lines);
  std::vector<char> careful(t.lines, 0);
  bool any = false;
  for (int64_t l = 0; l < t.lines; ++l) {
    squares[l] = square_of_gradient(t, o, l);
    careful[l] = !is_free(t, l) && squares[l] < least_tangent * t.products[hh * t.lines + l];
    any |= careful[l];
    if (careful[l]) squares[l] = 0;
  }
  if (any)
    for_every_number(t, [&](int64_t line, int64_t e) {
      if (!careful[line]) return;
      const double tangent = t.grad[e] - along_of(t, line) * t.weight[e];
      squares[line] += tangent * tangent;
    });
  for (int64_t l = 0; l < t.lines; ++l) {
    const bool scaled = o.radius_invariant && !is_free(t, l);
    t.squared_norms[t.groups ? t.groups[l] : 0] += squares[l] * (scaled ? radius_of(t, l) * radius_of(t, l) : 1);
  }
}

// Moves the lines whose terms cancel, in double precision: the length of a new point is that of its numbers.
void move_with_care(const fgo_lines &t, const fgo_line_options &o, const std::vector<char> &careful) {
  std::vector<double> squares(t.lines, 0.0);
  auto combine = [&](const line_move &v, const double *by, int64_t e) {
    return (v.taken ? by[0] * t.grad[e] : 0) + (v.old ? by[1] * t.buffer[e] : 0) + by[2] * t.weight[e];
  };
  for_every_number(t, [&](int64_t line, int64_t e) {
    if (!careful[line]) return;
    const line_move v = move_of(t, o, line);
    const double y = t.weight[e] + combine(v, v.b, e);
    squares[line] += y * y;
  });
  for_every_number(t, [&](int64_t line, int64_t e) {
    if (!careful[line] || !(squares[line] > 0)) return;
    const line_move v = move_of(t, o, line);
    const double y = t.weight[e] + combine(v, v.b, e), kept = combine(v, v.a, e);
    t.weight[e] = float(y * (radius_of(t, line) / std::sqrt(squares[line])));
    if (t.buffer) t.buffer[e] = float(kept);
  });
}

}  // namespace

extern "C" {

FGO_API int64_t fgo_line_norms(const fgo_lines *tasks, int64_t count, const fgo_line_options *options, int threads) {
  const line_sweeps run = choose();
  std::vector<std::vector<share_of_lines>> shares(threads);
  share(tasks, count, threads, [&](int64_t k, int64_t begin, int64_t end, int number) {
    run.measure(tasks[k], k, begin, end, shares[number]);
  });
  for (const auto &of_thread : shares)  // in the order of the numbers: the sums don't depend on the threads' timing
    for (const share_of_lines &part : of_thread)
      for (int k = 0; k < products; ++k)
        for (int64_t l = 0; l < part.count; ++l) {
          double &sum = tasks[part.task].products[k * tasks[part.task].lines + part.first_line + l];
          sum = (part.begins ? 0 : sum) + part.sums[k * part.count + l];
        }
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (int64_t k = 0; k < count; ++k) add_squares(tasks[k], *options);
  return 0;
}

FGO_API int64_t fgo_line_update(const fgo_lines *tasks, int64_t count, const fgo_line_options *options, int threads) {
  const line_sweeps run = choose();
  std::vector<std::vector<char>> careful(count);
  for (int64_t k = 0; k < count; ++k) careful[k].assign(tasks[k].lines, 0);
  int64_t cancelled = 0;
#pragma omp parallel num_threads(threads) reduction(+ : cancelled)
  for (int64_t k = 0; k < count; ++k)
#pragma omp for schedule(static) nowait
    for (int64_t l = 0; l < tasks[k].lines; ++l) cancelled += careful[k][l] = write_move(tasks[k], *options, l);
  share(tasks, count, threads, [&](int64_t k, int64_t begin, int64_t end, int) { run.move(tasks[k], begin, end); });
  if (!cancelled) return 0;
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (int64_t k = 0; k < count; ++k)
    for (char own : careful[k])
      if (own) {
        move_with_care(tasks[k], *options, careful[k]);
        break;
      }
  return 0;
}

// Copies blocks out of a matrix of `width` columns, or back into it: entry (i, j) of block k lies in row rows[k a + i] and
// column columns[k b + j] of the matrix.
FGO_API int64_t fgo_take(const float *matrix, int64_t width, const int32_t *rows, const int32_t *columns, int64_t n, int64_t a, int64_t b,
                 float *blocks, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < n * a; ++i)
    for (int64_t j = 0; j < b; ++j) blocks[i * b + j] = matrix[rows[i] * width + columns[i / a * b + j]];
  return 0;
}

FGO_API int64_t fgo_put(float *matrix, int64_t width, const int32_t *rows, const int32_t *columns, int64_t n, int64_t a, int64_t b,
                const float *blocks, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < n * a; ++i)
    for (int64_t j = 0; j < b; ++j) matrix[rows[i] * width + columns[i / a * b + j]] = blocks[i * b + j];
  return 0;
}

// The step of all lines, and then the blocks that were stepped elsewhere: one call, so that whoever is interrupted in
// between finds every weight as it was before its step or after it.
FGO_API int64_t fgo_line_commit(const fgo_lines *tasks, int64_t count, const fgo_line_options *options, int threads,
                        const fgo_block *blocks, int64_t n_blocks) {
  fgo_line_update(tasks, count, options, threads);
  for (int64_t k = 0; k < n_blocks; ++k) {
    const fgo_block &own = blocks[k];
    fgo_put(own.matrix, own.width, own.rows, own.columns, own.n, own.a, own.b, own.blocks, threads);
  }
  return 0;
}
}
