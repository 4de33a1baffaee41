// The step on Stiefel matrices and blocks of matrices for the CPU, by products alone.
//
//   fgo_stiefel_norms   reads x and g, and computes the squared norm of the Riemannian gradient of every block and group;
//   fgo_stiefel_bounds  computes that of g instead, which is an upper bound, and counts the groups whose tau may exceed one;
//   fgo_stiefel_move    reads the momentum m, and computes the new momentum and points, in separate memory.
//
// For x with xᵀx = r² I, and t the sum of g and m with their factors, the step of a block is
//
//   m <- t - x sym(xᵀt) / r²,   y = x - lr m,   x <- y (yᵀy / r²)^(-1/2),
//
// five products; the inverse root of I + E = yᵀy / r² is a polynomial in E whose degree follows from ‖E‖ (Newton-Schulz
// iterations where E is large). Blocks that are wider than tall are transposes of points, and are not transposed in memory:
// every B x B matrix is symmetric, so only the order of the factors changes. The caller writes the results to the weight, after
// it has retracted the blocks that began off the manifold by another method, because these iterations may diverge there.

#include <cmath>
#include <memory>
#include <utility>
#include <vector>

#include "matrices.hpp"

namespace {

// A matrix whose entry (i, j) is at i * row + j * column.
struct matrix {
  const float *at;
  int64_t row, column;
};

// Relative to a gradient's squared norm; below, the gradient is projected before its norm is computed.
constexpr double least_tangent = 0.01;
constexpr double most_drift = 2e-3;     // ‖xᵀx / r² - I‖ of a point, as in manifolds/stiefel.py
constexpr double longest = 1e4;         // ‖u‖² / r² of a step; beyond, yᵀy is too ill-conditioned
constexpr double polished = 1;          // beyond, an iteration corrects the rounding errors of yᵀy
constexpr double precision = 6e-8;      // 2^-24
constexpr double margin = 1.05;         // of the spectrum of yᵀy, for points that have drifted

// The coefficients of (1 + f)^(-1/2).
constexpr int most_terms = 15;
struct binomials {
  double of[most_terms + 2];
  constexpr binomials() : of() {
    of[0] = 1;
    for (int k = 1; k < most_terms + 2; ++k) of[k] = -of[k - 1] * (k - 0.5) / k;
  }
};
constexpr binomials series;

// The smallest number of terms, among those that so many products give, that reaches the precision for ‖F‖ <= f; 0 if none.
int terms_for(double f) {
  for (int terms : {1, 2, 4, 6, 9, 12, most_terms})
    if (std::abs(series.of[terms + 1]) * std::pow(f, terms + 1) <= precision) return terms;
  return 0;
}

}  // namespace

#define FGO_SOURCE "stiefel_steps.hpp"
#define FGO_PORTABLE_BYTES 32
#include "each_set.hpp"

#define FGO_MEASURE(set) set::measure<false, true>
#define FGO_MEASURE_AGAIN(set) set::measure<false, false>
#define FGO_BOUND(set) set::measure<true, true>
#define FGO_MOVE(set) set::move

namespace {

typedef void (*step_function)(const fgo_stiefel &, const fgo_matrix_options &, int64_t, int);

void run_on_blocks(const fgo_stiefel *tasks, int64_t count, const fgo_matrix_options &options, int threads, step_function run) {
  std::vector<std::pair<int64_t, int64_t>> blocks;
  for (int64_t k = 0; k < count; ++k)
    for (int64_t own = 0; own < tasks[k].n; ++own) blocks.push_back({k, own});
  run_expensive_first(
      blocks.size(), threads, [&](int64_t number) { return products_of(tasks[blocks[number].first]); },
      [&](int64_t number, int own_threads) { run(tasks[blocks[number].first], options, blocks[number].second, own_threads); });
}

void add_to_groups(const fgo_stiefel *tasks, int64_t count, const fgo_matrix_options &options, int threads, step_function run) {
  run_on_blocks(tasks, count, options, threads, run);
  for (int64_t k = 0; k < count; ++k)
    for (int64_t own = 0; own < tasks[k].n; ++own) tasks[k].squared_norms[tasks[k].groups[own]] += tasks[k].squares[own];
}

}  // namespace

extern "C" {

FGO_API int64_t fgo_stiefel_norms(const fgo_stiefel *tasks, int64_t count, const fgo_matrix_options *options, int threads) {
  add_to_groups(tasks, count, *options, threads, FGO_IN_USE(FGO_MEASURE));
  return 0;
}

// The same after fgo_stiefel_bounds, which has copied points and gradients.
FGO_API int64_t fgo_stiefel_norms_again(const fgo_stiefel *tasks, int64_t count, const fgo_matrix_options *options, int threads) {
  add_to_groups(tasks, count, *options, threads, FGO_IN_USE(FGO_MEASURE_AGAIN));
  return 0;
}

// Returns the number of blocks in groups whose bound does not imply that tau is one.
FGO_API int64_t fgo_stiefel_bounds(const fgo_stiefel *tasks, int64_t count, const fgo_matrix_options *options, int threads) {
  add_to_groups(tasks, count, *options, threads, FGO_IN_USE(FGO_BOUND));
  int64_t large = 0;
  for (int64_t k = 0; k < count; ++k)
    for (int64_t own = 0; own < tasks[k].n; ++own)
      large += !is_short(tasks[k].squared_norms[tasks[k].groups[own]], options->constant, options->rho, options->curvature);
  return large;
}

// Returns the number of blocks that began off the manifold.
FGO_API int64_t fgo_stiefel_move(const fgo_stiefel *tasks, int64_t count, const fgo_matrix_options *options, int threads) {
  run_on_blocks(tasks, count, *options, threads, FGO_IN_USE(FGO_MOVE));
  int64_t failed = 0;
  for (int64_t k = 0; k < count; ++k)
    for (int64_t own = 0; own < tasks[k].n; ++own) failed += tasks[k].failed[own];
  return failed;
}
}
