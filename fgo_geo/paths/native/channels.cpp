// Channel-directed gradients for the CPU: fgo_geo.optim.channel_directed, in place.
//
// The metrics couple the channels of a layer. Each column, that is `length` channels at a constant stride in memory, is
// treated alike. The matrices of the metrics have constant coefficients, so two first-order recursions along a column, one
// forwards and one backwards, solve a system of any length. A block of columns is read once, stays in the cache during the
// recursions, which are in double precision, and is written once. Plain C ABI, as in fused.cpp.

#include <algorithm>
#include <cmath>
#include <vector>

#include "common.hpp"

extern "C" {

// One contiguous gradient of shape (columns / inner, length, inner).
struct fgo_channel {
  float *gradient;
  int64_t columns, length, inner;
  double lam;
  int32_t metric, periodic;
};

}  // extern "C"

namespace {

enum metric { h0, h1, h1t };
constexpr int lanes = 16;  // columns of a block: one cache line in single precision

constexpr int64_t wide = 512;  // columns that the metric h0 processes at once; their means fit the first-level cache

// Threads take whole gradients: two in the same rows slow each other down, because a processor reads ahead into the columns of
// the other. Gradients larger than this part of a thread's work are divided among all threads.
constexpr int64_t parts_per_thread = 4;

// Coefficients for the metric h1, where r is the smaller root of lam r² - (1 + 2 lam) r + lam.
struct recursion {
  double decay;      // r
  double forgotten;  // 1 - r
  double scale;      // (1 - r)², which is 1 / c
  double gap;        // 1 - r^(length of the ring)
  double overlap;    // sum of r^k r^(k + 1) over one turn of the ring
};

recursion recursion_of(const fgo_channel &t) {
  const double root = std::sqrt(1 + 4 * t.lam), forgotten = 2 / (root + 1), log_decay = std::log1p(-forgotten);
  const double ring = double(t.periodic ? t.length : 2 * t.length);
  recursion k;
  k.decay = (root - 1) / (root + 1), k.forgotten = forgotten, k.scale = forgotten * forgotten;
  k.gap = -std::expm1(ring * log_decay);
  k.overlap = k.decay * std::expm1(2 * ring * log_decay) / std::expm1(2 * log_decay);
  return k;
}

// r^0, ..., r^length; negligible powers are set to zero, because denormal numbers are slow.
void fill_powers(std::vector<double> &powers, int64_t length, double decay) {
  powers.assign(length + 1, 0.0);
  double power = 1;
  for (int64_t i = 0; i <= length && power > 1e-200; ++i, power *= decay) powers[i] = power;
}

}  // namespace

#define FGO_SOURCE "channel_sweeps.hpp"
#define FGO_PORTABLE_BYTES 16
#include "each_set.hpp"

#define FGO_DIRECT(set) set::direct

extern "C" {

FGO_API int64_t fgo_direct(const fgo_channel *tasks, int64_t count, int threads) {
  const auto run = FGO_IN_USE(FGO_DIRECT);
  int64_t total = 0;
  for (int64_t k = 0; k < count; ++k) total += tasks[k].columns * tasks[k].length;
#pragma omp parallel num_threads(threads)
  {
    std::vector<double> sums, powers;
    std::vector<float> copy;
    for (int64_t k = 0; k < count; ++k) {
      const fgo_channel &t = tasks[k];
      const bool is_large = t.columns * t.length * threads * parts_per_thread > total;
      const int64_t blocks = (t.columns + lanes - 1) / lanes, step = is_large ? (blocks + threads - 1) / threads : blocks;
#pragma omp for schedule(dynamic) nowait
      for (int64_t begin = 0; begin < blocks; begin += step) {
        const int64_t end = begin + step < blocks ? begin + step : blocks;
        const recursion own = recursion_of(t);
        const size_t needed = std::max(lanes * t.length, wide);
        if (sums.size() < needed) sums.resize(needed), copy.resize(needed);
        if (t.metric == h1) fill_powers(powers, t.length, own.decay);
        run(t, begin, end, copy.data(), sums.data(), own, powers.data());
      }
    }
  }
  return 0;
}
}
