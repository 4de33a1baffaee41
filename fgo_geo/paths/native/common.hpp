// Definitions that all sources of the library share.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <vector>

#ifdef _WIN32
#define FGO_API __declspec(dllexport)
#else
#define FGO_API
#endif

#if defined(__x86_64__) && defined(__GNUC__) && !defined(FGO_PORTABLE)
#define FGO_AVX2 __attribute__((target("avx2,fma,bmi,bmi2,lzcnt,popcnt,tune=haswell")))
#define FGO_AVX512 __attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,fma,bmi,bmi2,lzcnt,popcnt,tune=skylake-avx512")))
#endif

extern "C" {

// The instruction set in use: 2 AVX-512, 1 AVX2, 0 the compiler's default. It is the best that the processor has, up to a
// limit; a negative argument keeps the limit.
FGO_API int64_t fgo_limit(int limit);

// Hyper-parameters of the step of matrices.
struct fgo_matrix_options {
  double lr, momentum, dampening, weight_decay, rho, curvature;
  int32_t nesterov, maximize, radius_invariant, constant;  // constant: tau is one
};
}

// tau of a group (eq. 7 and algorithm 1 of [Ozay2019]; optim/step_size.py).
static inline double step_scale(double norm, double rho, double curvature) {
  const double root = std::fmax(2 * rho + norm, std::sqrt(1 + curvature * (rho + norm)));
  return std::fmax(1.0, norm * root);
}

// Whether tau is one for squared norms up to a bound; with a margin for rounding.
static inline bool is_short(double square, bool constant, double rho, double curvature) {
  return std::isfinite(square) && (constant || step_scale(std::sqrt(square) * (1 + 1e-6), rho, curvature) <= 1);
}

// Calls run(number, threads) for every number below `count`, the most expensive first. All threads share each piece of work that
// is more than one thread's part of the remaining work; every other piece belongs to one thread.
template <class Cost, class Run> void run_expensive_first(int64_t count, int threads, Cost cost, Run run) {
  std::vector<double> costs(count);
  std::vector<int64_t> order(count);
  for (int64_t k = 0; k < count; ++k) costs[k] = cost(k), order[k] = k;
  std::stable_sort(order.begin(), order.end(), [&](int64_t one, int64_t other) { return costs[one] > costs[other]; });
  double left = std::accumulate(costs.begin(), costs.end(), 0.0);
  int64_t next = 0;
  for (; threads > 1 && next < count && costs[order[next]] * threads > left; ++next) {
    run(order[next], threads);
    left -= costs[order[next]];
  }
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (threads > 1)
  for (int64_t k = next; k < count; ++k) run(order[k], 1);
}
