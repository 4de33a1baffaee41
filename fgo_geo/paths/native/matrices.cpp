// The step of matrices whose blocks are lines (lines.cpp) and Stiefel matrices (stiefel.cpp), weight by weight. The second sweep
// over a weight finds most of it in the cache; two sweeps over all weights would read each weight twice from memory. Some weights
// move before others are measured, so the caller must know that no gradient will be refused.

#include "matrices.hpp"

extern "C" {

// One weight. The pointers to norms and scales of `lines` and `blocks` are those of the weight.
struct fgo_matrix {
  fgo_lines *lines;
  fgo_stiefel *blocks;
  double *squared_norms;     // per group
  float *scales;             // per group: written
  const double *curvatures;  // per group; or null: that of the options
  int64_t groups, n_blocks;
  int64_t is_left;           // written: some block began off the manifold, and the lines are still to be moved
};

}  // extern "C"

namespace {

constexpr double cost_of_number = 20;  // in multiplications of a product

double cost_of(const fgo_matrix &w) {
  double cost = cost_of_number * w.lines->length * (w.lines->pattern_of_row ? w.lines->width : w.lines->lines);
  for (int64_t k = 0; k < w.n_blocks; ++k) cost += w.blocks[k].n * products_of(w.blocks[k]);
  return cost;
}

void set_addresses(const fgo_matrix &w, float *weight, const float *grad, float *buffer) {
  w.lines->weight = weight, w.lines->grad = grad, w.lines->buffer = buffer;
  for (int64_t k = 0; k < w.n_blocks; ++k) w.blocks[k].weight = weight, w.blocks[k].grad = grad, w.blocks[k].buffer = buffer;
}

void step(fgo_matrix &w, const fgo_matrix_options &o, bool skips, int threads) {
  std::fill_n(w.squared_norms, w.groups, 0.0);
  if (w.curvatures) {
    fgo_stiefel_norms(w.blocks, w.n_blocks, &o, threads);
  } else if (fgo_stiefel_bounds(w.blocks, w.n_blocks, &o, threads)) {
    std::fill_n(w.squared_norms, w.groups, 0.0);
    fgo_stiefel_norms_again(w.blocks, w.n_blocks, &o, threads);
  }
  fgo_line_norms(w.lines, 1, &o, threads);
  bool is_finite = true;
  for (int64_t g = 0; g < w.groups; ++g) {
    const double norm = std::sqrt(std::max(w.squared_norms[g], 0.0)), curvature = w.curvatures ? w.curvatures[g] : o.curvature;
    w.scales[g] = !std::isfinite(norm) ? 0 : o.constant ? 1 : float(1 / step_scale(norm, o.rho, curvature));
    is_finite = is_finite && std::isfinite(norm);
  }
  w.is_left = false;
  if (!is_finite && !skips) return;
  w.is_left = fgo_stiefel_move(w.blocks, w.n_blocks, &o, threads) > 0;
  if (!w.is_left) fgo_line_update(w.lines, 1, &o, threads);
}

}  // namespace

extern "C" {

// Takes the step of all weights; weight, gradient and buffer of each are at `addresses`, one weight after the other. A group
// without a finite norm gets no gradient if `skips`; otherwise its weight stays as it was. Returns the number of weights whose
// lines are still to be moved.
FGO_API int64_t fgo_matrix_step(fgo_matrix *weights, float *const *addresses, int64_t count, const fgo_matrix_options *options,
                                int skips, int threads) {
  for (int64_t k = 0; k < count; ++k) set_addresses(weights[k], addresses[3 * k], addresses[3 * k + 1], addresses[3 * k + 2]);
  run_expensive_first(
      count, threads, [&](int64_t k) { return cost_of(weights[k]); },
      [&](int64_t k, int own_threads) { step(weights[k], *options, skips, own_threads); });
  int64_t left = 0;
  for (int64_t k = 0; k < count; ++k) left += weights[k].is_left;
  return left;
}
}
