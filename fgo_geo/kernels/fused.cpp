// The fused step on kernel components for the CPU: the map of RiemannianFGSGD's batched torch code, in two sweeps.
//
//   fgo_norms    reads weight and gradient: squared norm of the Riemannian gradient of every group;
//   fgo_update   reads weight, gradient and momentum, writes weight and momentum: projection, step size, momentum with its
//                lazy transport, step, retraction.
//
// Between the two the caller turns norms into step sizes and may refuse to go on. Seven passes over memory, and nothing
// is allocated per component.
//
// Kernels are handled `lanes` at a time, one per lane of a vector register ("struct of arrays"): entry (i, j) of all of
// them is one vector. All manifold kinds go through the same instructions, and masks choose between them:
//
//   projection   h - w S,  S = 0, tr(M) I, diag(M) or sym(M) for M = wᵀh / r²
//   retraction   y (I + E)^(-1/2),  E = 0, (‖y‖² / r² - 1) I, diag(N) or N for N = yᵀy / r² - I
//
// on Euclidean, sphere, oblique and Stiefel components. The inverse root is a series where E is small, as it is for the
// steps that the theorem allows, and the scaled Newton-Schulz iteration elsewhere; no bound on the step is needed.
//
// Plain C ABI and no dependency but the C++ library, so that the compiled file serves every Python and every torch.

#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#if defined(__x86_64__) && defined(__GNUC__)
#define FGO_AVX2 __attribute__((target("arch=haswell,tune=haswell")))
#endif

extern "C" {

// One parameter. Kernel (row, column) starts at row * row_stride + column * column_stride, entry (i, j) of its A x B
// component lies i * i_stride + j * j_stride behind.
struct fgo_task {
  void *weight;
  const void *grad;
  void *buffer;            // null without momentum
  const int32_t *codes;    // per kernel: group * 4 + kind (0 Euclidean, 1 sphere, 2 oblique, 3 Stiefel)
  const int32_t *row_groups;  // per row and kind, where that determines the group, -1 where the kind does not occur; or null
  const void *radii;       // per kernel, or null: radius[kind]
  double *squared_norms;   // per group: added to by fgo_norms
  const void *scales;      // per group: 1 / tau, read by fgo_update; zero leaves the gradient out
  double radius[4];
  int64_t rows, columns, row_stride, column_stride;
  int32_t a, b, i_stride, j_stride;
  int32_t first, skips;    // the buffer holds nothing yet; some scale is zero
  int64_t groups;
};

struct fgo_options {
  double lr, momentum, dampening, weight_decay;
  int32_t nesterov, maximize, radius_invariant;
};

}  // extern "C"

namespace {

template <class T> struct vector_of;
template <> struct vector_of<float> {
  typedef float type __attribute__((vector_size(32)));
  typedef int32_t mask __attribute__((vector_size(32)));
};
template <> struct vector_of<double> {
  typedef double type __attribute__((vector_size(32)));
  typedef int64_t mask __attribute__((vector_size(32)));
};

constexpr int max_a = 49, max_b = 7;
constexpr int64_t chunk = 512;  // kernels that a thread takes at a time, within one row
template <class T> constexpr T precision = sizeof(T) == 4 ? T(1.1920929e-7) : T(8.8817842e-16);  // 2^-23, 2^-50
// Up to this ‖e‖² two or four terms of the series suffice: precision^(2/3) and precision^(2/5).
template <class T> constexpr T series_limit[2] = {sizeof(T) == 4 ? T(2.4e-5) : T(9.2e-11),
                                                  sizeof(T) == 4 ? T(1.7e-3) : T(9.4e-7)};
// Up to this ‖u‖² / r² the centred series has an error below the root (the fourth root) of the precision.
template <class T> constexpr T centred_limit = sizeof(T) == 4 ? T(0.6) : T(0.5);
constexpr int most_rounds = 50;  // of Newton-Schulz, more than any finite step needs
constexpr double safety = 1.05;  // head room for points that have drifted off the manifold

}  // namespace

#define FGO_NAMESPACE portable
#define FGO_TARGET
#include "fused_sweeps.hpp"
#undef FGO_NAMESPACE
#undef FGO_TARGET

#ifdef FGO_AVX2
#define FGO_NAMESPACE avx2
#define FGO_TARGET FGO_AVX2
#define FGO_ANY(w) (!__builtin_ia32_ptestz256(w, w))
#define FGO_LOOK_UP(values, index) __builtin_ia32_permvarsf256(values, index)
#include "fused_sweeps.hpp"
#endif

namespace {

using sweep = void (*)(const fgo_task *, const fgo_options *, double *, int64_t, int64_t);

struct kernels_of { sweep norms, update; };

template <class T> kernels_of choose() {
#ifdef FGO_AVX2
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    return {avx2::sweep_of<T, false>, avx2::sweep_of<T, true>};
#endif
  return {portable::sweep_of<T, false>, portable::sweep_of<T, true>};
}

int64_t chunks_per_row(const fgo_task &t) { return (t.columns + chunk - 1) / chunk; }

// Calls the sweep on equal shares of all chunks of all tasks, one share per thread. Sums of a thread go to a buffer of its
// own and are added up in the order of the threads: the result depends on their number, not on their timing.
void share(sweep run, const fgo_task *tasks, int64_t count, const fgo_options *options, int threads, bool sums) {
  std::vector<int64_t> first(count + 1, 0), groups(count + 1, 0);
  for (int64_t k = 0; k < count; ++k) {
    first[k + 1] = first[k] + tasks[k].rows * chunks_per_row(tasks[k]) ;
    groups[k + 1] = groups[k] + tasks[k].groups;
  }
  std::vector<double> work(count + 1, 0);  // entries before a task
  for (int64_t k = 0; k < count; ++k)
    work[k + 1] = work[k] + double(tasks[k].rows) * tasks[k].columns * tasks[k].a * tasks[k].b;
  std::vector<std::vector<double>> partial(threads);
  auto share_of = [&](int number) {
    double *sum = nullptr;
    if (sums) {
      partial[number].assign(2 * groups[count], 0.0);
      sum = partial[number].data();
    }
    double from = work[count] * number / threads, to = work[count] * (number + 1) / threads;
    for (int64_t k = 0; k < count; ++k) {
      double size = work[k + 1] - work[k];
      int64_t chunks = first[k + 1] - first[k];
      if (size <= 0) continue;
      auto part = [&](double w) {
        double x = (w - work[k]) / size;
        return x <= 0 ? int64_t(0) : x >= 1 ? chunks : int64_t(x * chunks);
      };
      int64_t begin = part(from), end = part(to);
      if (begin < end) run(tasks + k, options, sums ? sum + 2 * groups[k] : nullptr, begin, end);
    }
  };
  // The threads are torch's own: it has loaded OpenMP's library by the same name. Others would wait for a processor while
  // torch's spin on theirs.
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int number = 0; number < threads; ++number) share_of(number);
  if (sums)
    for (int64_t k = 0; k < count; ++k)
      for (int number = 0; number < threads; ++number)
        for (int64_t g = 0; g < tasks[k].groups; ++g) {
          const double *pair = partial[number].data() + 2 * (groups[k] + g);
          tasks[k].squared_norms[g] += pair[0] + pair[1];
        }
}

}  // namespace

extern "C" {

int fgo_abi() { return 2; }

void fgo_norms(const fgo_task *tasks, int64_t count, const fgo_options *options, int is_double, int threads) {
  share(is_double ? choose<double>().norms : choose<float>().norms, tasks, count, options, threads, true);
}

void fgo_update(const fgo_task *tasks, int64_t count, const fgo_options *options, int is_double, int threads) {
  share(is_double ? choose<double>().update : choose<float>().update, tasks, count, options, threads, false);
}
}
