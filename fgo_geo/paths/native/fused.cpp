// The fused step on kernel components for the CPU: the same map as the batched torch code, in two sweeps.
//
//   fgo_norms    reads weight and gradient, and computes the squared norm of the Riemannian gradient of every group;
//   fgo_update   reads weight, gradient and momentum, writes weight and momentum: projection, step size, momentum with its
//                lazy transport, step, retraction.
//
// Between the two sweeps the caller computes step sizes from the norms and may refuse the step. Together the sweeps are
// seven passes over memory, and nothing is allocated per component. Where gradients are short, the first sweep is simpler:
//
//   fgo_bounds   reads the gradient, and counts the groups whose Euclidean gradient is so long that tau may exceed one.
//
// Where no group has kernels of two rows, and no step is refused, one sweep does both:
//
//   fgo_large    reads the gradients, and counts the weights whose squared gradients may overflow;
//   fgo_step     measures and moves each row while it is in the cache, five passes over memory.
//
// Kernels are processed `lanes` at a time, one per lane of a vector register ("struct of arrays"): entry (i, j) of all of
// them is one vector. All manifold kinds run the same instructions, and masks select between them:
//
//   projection   h - w S,  S = 0, tr(M) I, diag(M) or sym(M) for M = wᵀh / r²
//   retraction   y (I + E)^(-1/2),  E = 0, (‖y‖² / r² - 1) I, diag(N) or N for N = yᵀy / r² - I
//
// on Euclidean, sphere, oblique and Stiefel components. Where E is small, as in the steps that the theorem allows, a series
// computes the inverse root. Elsewhere Jacobi rotations compute it, so steps may have any length.
//
// Plain C ABI with no dependency but the C++ library, so that the compiled file works with every Python and every torch.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <numeric>
#include <type_traits>
#include <utility>
#include <vector>

#include "common.hpp"

extern "C" {

// One parameter. Kernel (row, column) starts at row * row_stride + column * column_stride; entry (i, j) of its A x B
// component has the offset i * i_stride + j * j_stride from there.
struct fgo_kernels {
  void *weight;
  const void *grad;
  void *buffer;            // null without momentum
  const int32_t *codes;    // per kernel: group * 4 + kind (0 Euclidean, 1 sphere, 2 oblique, 3 Stiefel)
  const int32_t *row_groups;  // per row and kind: the group, -1 where the kind does not occur; null if they do not determine it
  const void *radii;       // per kernel, or null: radius[kind]
  double *squared_norms;   // per group: added to by fgo_norms
  const void *scales;      // per group: 1 / tau, read by fgo_update; with zero the gradient is not used
  const double *curvatures;  // per group, read by fgo_step; null for that of the options
  double radius[4];
  int64_t rows, columns, row_stride, column_stride;
  int32_t a, b, i_stride, j_stride;
  int32_t first, skips;    // the buffer is uninitialised; some scale is zero, or may become zero in fgo_step
  int64_t groups;
};

struct fgo_options {
  double lr, momentum, dampening, weight_decay, rho, curvature;
  int32_t nesterov, maximize, radius_invariant, constant;  // constant: tau is one
};

FGO_API int64_t fgo_limit(int limit) {
  static std::atomic<int> most{2};
  if (limit >= 0) most = limit;
  int best = 0;
#ifdef FGO_AVX2
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) best = 1;
  if (best && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl"))
    best = 2;
#endif
  return best < most ? best : most.load();
}

}  // extern "C"

namespace {

template <class T, int BYTES> struct vector_of {
  typedef T type __attribute__((vector_size(BYTES)));
  typedef typename std::conditional<sizeof(T) == 4, int32_t, int64_t>::type integer;
  typedef integer mask __attribute__((vector_size(BYTES)));
};

constexpr int max_a = 49, max_b = 7;
constexpr int64_t chunk = 512;               // kernels that a thread takes at a time, within one row
constexpr int64_t chunks_at_once = 32;       // in the order of memory, where a sweep takes the last ones first
constexpr int64_t prefetch_distance = 2048;  // numbers between a stream and its prefetches
template <class T> constexpr T precision = sizeof(T) == 4 ? T(1.1920929e-7) : T(8.8817842e-16);  // 2^-23, 2^-50
// Up to this ‖e‖² two or four terms of the series suffice: precision^(2/3) and precision^(2/5).
template <class T> constexpr T series_limit[2] = {sizeof(T) == 4 ? T(2.4e-5) : T(9.2e-11),
                                                  sizeof(T) == 4 ? T(1.7e-3) : T(9.4e-7)};
// Up to this ‖e‖² the series is applied repeatedly: the first application reduces ‖e‖ = 1 to 0.4, and the next ones reduce it
// faster. The limit is below one because a zero column has ‖e‖ = 1, and would stay zero.
template <class T> constexpr T repeat_limit = T(0.9);
constexpr int most_rounds = 30;  // of Jacobi rotations; matrices with so few columns converge in a fraction of them

int64_t chunks_per_row(const fgo_kernels &t) { return (t.columns + chunk - 1) / chunk; }

}  // namespace

#ifdef FGO_AVX2
#define FGO_FAST (FGO_SET > 0)
#else
#define FGO_FAST true
#endif
#define FGO_SOURCE "fused_sweeps.hpp"
#define FGO_PORTABLE_BYTES 16
#include "each_set.hpp"

namespace {

using sweep = int64_t (*)(const fgo_kernels *, const fgo_options *, double *, int64_t, int64_t);

template <class T> struct sweeps {
  sweep norms, bounds, update, step;
  double (*squares)(const T *, int64_t);
};

#define FGO_SWEEPS(set)                                                                                              \
  sweeps<T> {                                                                                                        \
    set::run_sweep<set::sums_sweep<false>, T>, set::run_sweep<set::sums_sweep<true>, T>,                             \
        set::run_sweep<set::update_sweep, T>, set::run_sweep<set::rows_sweep, T>, set::squares_of_run<T>             \
  }

// The sweeps for this processor.
template <class T> sweeps<T> choose() { return FGO_IN_USE(FGO_SWEEPS); }

// Calls run(task, begin, end, thread) so that every thread gets an equal range of the units of all tasks. The sweep that only
// reads takes the last tasks first: it leaves in the cache what the next one begins with.
template <bool LAST_FIRST, class Units, class Run>
void run_in_threads(const fgo_kernels *tasks, int64_t count, int threads, Units units, Run run) {
  std::vector<double> work(count + 1, 0);  // entries before a task
  for (int64_t k = 0; k < count; ++k)
    work[k + 1] = work[k] + double(tasks[k].rows) * tasks[k].columns * tasks[k].a * tasks[k].b;
  // The threads are those of torch, which has loaded OpenMP's library under the same name. Threads of another pool would
  // wait for a processor while those of torch spin.
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int number = 0; number < threads; ++number) {
    const double from = work[count] * number / threads, to = work[count] * (number + 1) / threads;
    for (int64_t index = 0; index < count; ++index) {
      const int64_t k = LAST_FIRST ? count - 1 - index : index;
      const double size = work[k + 1] - work[k];
      const int64_t all = units(tasks[k]);
      auto part = [&](double w) {
        const double x = (w - work[k]) / size;
        return x <= 0 ? int64_t(0) : x >= 1 ? all : int64_t(x * all);
      };
      if (size > 0 && part(from) < part(to)) run(k, part(from), part(to), number);
    }
  }
}

int64_t all_chunks(const fgo_kernels &t) { return t.rows * chunks_per_row(t); }
int64_t all_rows(const fgo_kernels &t) { return t.rows; }
int64_t all_entries(const fgo_kernels &t) { return t.rows * t.columns * t.a * t.b; }

// Counts the tasks whose squared gradients sum to NaN, or to at least half the largest number of their type. If there is none,
// all norms are finite as long as the weights are: projections shorten gradients, and weight decay adds little.
template <class T> int64_t large_gradients(const fgo_kernels *tasks, int64_t count, const fgo_options &options, int threads) {
  std::vector<std::vector<double>> partial(threads, std::vector<double>(count, 0.0));
  run_in_threads<true>(tasks, count, threads, all_entries, [&](int64_t k, int64_t begin, int64_t end, int number) {
    constexpr int64_t at_once = 1 << 16;
    for (; begin < end; end -= std::min(end - begin, at_once)) {
      const int64_t from = std::max(begin, end - at_once);
      partial[number][k] += choose<T>().squares(static_cast<const T *>(tasks[k].grad) + from, end - from);
    }
  });
  int64_t large = 0;
  for (int64_t k = 0; k < count; ++k) {
    double sum = 0, radius = 1;
    for (const auto &of_thread : partial) sum += of_thread[k];
    for (int kind = 0; options.radius_invariant && kind < 4; ++kind) radius = std::fmax(radius, tasks[k].radius[kind]);
    large += !(sum * radius * radius < std::numeric_limits<T>::max() / 2) || (options.radius_invariant && tasks[k].radii);
  }
  return large;
}

// Adds the sums of a sweep to the squared norms of the groups. Every thread has a buffer for its sums, and the buffers are
// added in the order of the threads: the result depends on the number of threads, not on their timing.
void add_to_groups(const fgo_kernels *tasks, int64_t count, const fgo_options &options, int threads, sweep run) {
  std::vector<int64_t> groups(count + 1, 0);
  for (int64_t k = 0; k < count; ++k) groups[k + 1] = groups[k] + tasks[k].groups;
  std::vector<std::vector<double>> partial(threads);
  for (auto &sums : partial) sums.assign(2 * groups[count], 0.0);
  run_in_threads<true>(tasks, count, threads, all_chunks, [&](int64_t k, int64_t begin, int64_t end, int number) {
    run(tasks + k, &options, partial[number].data() + 2 * groups[k], begin, end);
  });
  for (int64_t k = 0; k < count; ++k)
    for (int number = 0; number < threads; ++number)
      for (int64_t g = 0; g < tasks[k].groups; ++g) {
        const double *pair = partial[number].data() + 2 * (groups[k] + g);
        tasks[k].squared_norms[g] += pair[0] + pair[1];
      }
}

}  // namespace

extern "C" {

FGO_API int fgo_abi() { return 12; }  // of all sources

FGO_API int64_t fgo_norms(const fgo_kernels *tasks, int64_t count, const fgo_options *options, int is_double, int threads) {
  add_to_groups(tasks, count, *options, threads, is_double ? choose<double>().norms : choose<float>().norms);
  return 0;
}

// Returns the number of groups whose bound does not imply that tau is one. Adds the bounds to the squared norms.
FGO_API int64_t fgo_bounds(const fgo_kernels *tasks, int64_t count, const fgo_options *options, int is_double, int threads) {
  add_to_groups(tasks, count, *options, threads, is_double ? choose<double>().bounds : choose<float>().bounds);
  int64_t large = 0;
  for (int64_t k = 0; k < count; ++k)
    for (int64_t g = 0; g < tasks[k].groups; ++g)
      large += !is_short(tasks[k].squared_norms[g], options->constant, options->rho, options->curvature);
  return large;
}

// Returns zero if all points on manifolds are finite.
FGO_API int64_t fgo_update(const fgo_kernels *tasks, int64_t count, const fgo_options *options, int is_double, int threads) {
  const sweep run = is_double ? choose<double>().update : choose<float>().update;
  std::vector<int64_t> bad(threads, 0);
  run_in_threads<false>(tasks, count, threads, all_chunks, [&](int64_t k, int64_t begin, int64_t end, int number) {
    bad[number] += run(tasks + k, options, nullptr, begin, end);
  });
  return std::accumulate(bad.begin(), bad.end(), int64_t(0));
}

// Returns the number of weights whose gradients alone do not imply that the norms of all groups are finite.
FGO_API int64_t fgo_large(const fgo_kernels *tasks, int64_t count, const fgo_options *options, int is_double, int threads) {
  return (is_double ? large_gradients<double> : large_gradients<float>)(tasks, count, *options, threads);
}

FGO_API int64_t fgo_step(const fgo_kernels *tasks, int64_t count, const fgo_options *options, int is_double, int threads) {
  const sweep run = is_double ? choose<double>().step : choose<float>().step;
  run_in_threads<false>(tasks, count, threads, all_rows,
        [&](int64_t k, int64_t begin, int64_t end, int) { run(tasks + k, options, nullptr, begin, end); });
  return 0;
}
}
