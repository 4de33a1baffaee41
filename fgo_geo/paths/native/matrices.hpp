// How the compiled steps of matrices (lines.cpp, stiefel.cpp, matrices.cpp) take their weights.

#pragma once

#include "common.hpp"

extern "C" {

// Which lines the entries of a block form.
enum fgo_form { no_line, one_line, line_per_row, line_per_column };

// Consecutive columns of a row, in the row's order of columns, that belong to one block.
struct fgo_segment {
  int32_t start, count;
  int32_t form;
  int32_t first_line;  // number of the block among those without lines, if it has none
};

// One parameter. With width 1, line l is `length` contiguous numbers and the next line follows; with width > 1, line l is
// column l % width of matrix l / width, which has `length` rows and `width` columns. If `pattern_of_row` is not null, the
// parameter is one such matrix, and the segments define its lines.
struct fgo_lines {
  float *weight;
  const float *grad;
  float *buffer;           // null without momentum
  const int32_t *groups;   // per line; null: all are one group
  const double *radii;     // per line, infinite without a constraint; null: `radius`
  double *products;        // six planes of a number per line: <x,x>, <x,h>, <h,h>, <x,m>, <m,m>, <h,m>
  float *coefficients;     // seven planes: a and b, of h, m and x each, and the factor f
  double *squared_norms;   // per group: added to by fgo_line_norms
  const float *scales;     // per group: 1 / tau, read by fgo_line_update; with zero the gradient is not used
  const int32_t *pattern_of_row;  // per row: how its columns are divided among blocks; or null
  const int32_t *row_in_block;    // per row: its index within its block
  const fgo_segment *segments;
  const int32_t *first_segments;  // per pattern, and one past the last
  const int32_t *column_orders;   // per pattern: its columns in order; -1 in the first place stands for the order of the matrix
  const float *const *points, *const *momenta;  // per block without lines: its new values from another path, row by row
  double radius;
  int64_t lines, length, width;
  int64_t shared;          // the first `shared` lines extend over several rows
  int32_t first;           // the buffer is uninitialised
};

// Equal blocks of one weight: entry (i, j) of block k is in row rows[k a + i] and column columns[k b + j] of the matrix of
// `width` columns.
struct fgo_stiefel {
  const float *weight, *grad;
  const float *buffer;     // null without momentum, and before the first step
  const int32_t *rows, *columns;
  const int32_t *groups;   // per block
  const double *radii;     // per block
  double *squares;         // per block: of the Riemannian gradient, or a bound
  double *squared_norms;   // per group: added to
  const float *scales;     // per group: 1 / tau; with zero the gradient is not used
  float *points, *momenta; // per block, row by row: point and gradient after fgo_stiefel_norms, and then the results
  int32_t *failed;         // per block: whether `points` is y, because the block began off the manifold
  int64_t n, a, b, width;
};

FGO_API int64_t fgo_line_norms(const fgo_lines *tasks, int64_t count, const fgo_matrix_options *options, int threads);
FGO_API int64_t fgo_line_update(const fgo_lines *tasks, int64_t count, const fgo_matrix_options *options, int threads);
FGO_API int64_t fgo_stiefel_norms(const fgo_stiefel *tasks, int64_t count, const fgo_matrix_options *options, int threads);
FGO_API int64_t fgo_stiefel_norms_again(const fgo_stiefel *tasks, int64_t count, const fgo_matrix_options *options, int threads);
FGO_API int64_t fgo_stiefel_bounds(const fgo_stiefel *tasks, int64_t count, const fgo_matrix_options *options, int threads);
FGO_API int64_t fgo_stiefel_move(const fgo_stiefel *tasks, int64_t count, const fgo_matrix_options *options, int threads);
}

static inline int64_t shorter(const fgo_stiefel &t) { return t.a < t.b ? t.a : t.b; }

// Multiplications of numbers in one product of a block.
static inline double products_of(const fgo_stiefel &t) { return double(t.a) * t.b * shorter(t); }
