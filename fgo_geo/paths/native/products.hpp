// Products of matrices, compiled once per instruction set (each_set.hpp).
//
// The right factor is copied panel by panel, so that the innermost loop reads it in the order of memory; a left factor that
// is stored by columns is copied too. One core of a Zen 5 processor reaches 200 to 250 GFlop/s from 128 x 64 on, twice the
// rate of MKL, which does not use AVX-512 there.

namespace {
namespace FGO_NAMESPACE {

typedef float vec __attribute__((vector_size(FGO_BYTES)));
constexpr int vectors_at_once = FGO_SET == 0 ? 1 : 2;  // a tile of this size fits the registers
constexpr int64_t rows_at_once = FGO_SET == 2 ? 8 : FGO_SET == 1 ? 6 : 4;
constexpr int64_t lanes = FGO_BYTES / 4, columns_at_once = vectors_at_once * lanes;
constexpr int64_t terms_at_once = 256;  // a panel with this many terms stays in the first-level cache
constexpr int64_t terms_per_sum = 64;   // longer sums lose digits

template <class V, class T> FGO_TARGET __attribute__((always_inline)) static inline V load(const T *p) {
  V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
template <class V, class T> FGO_TARGET __attribute__((always_inline)) static inline void store(T *p, const V &v) {
  __builtin_memcpy(p, &v, sizeof v);
}

// A tile of M rows and V vectors: c = base + alpha a b for `terms` terms; without base, c = alpha a b.
template <int M, int V>
FGO_TARGET __attribute__((noinline)) void tile(int64_t terms, const float *a, int64_t a_row, int64_t a_term, const float *b,
                                               float alpha, const float *base, float *c, int64_t c_row, int64_t columns) {
  const float *from[M];
  vec total[M][V] = {};
  for (int i = 0; i < M; ++i) from[i] = a + i * a_row;
  for (int64_t k = 0, at = 0; k < terms;) {
    vec sums[M][V] = {};
    for (const int64_t stop = k + terms_per_sum < terms ? k + terms_per_sum : terms; k < stop; ++k, at += a_term, b += V * lanes) {
      vec right[V];
      for (int j = 0; j < V; ++j) right[j] = load<vec>(b + j * lanes);
      for (int i = 0; i < M; ++i)
        for (int j = 0; j < V; ++j) sums[i][j] += from[i][at] * right[j];
    }
    for (int i = 0; i < M; ++i)
      for (int j = 0; j < V; ++j) total[i][j] += sums[i][j];
  }
  for (int i = 0; i < M; ++i) {
    const int64_t e = i * c_row;
    if (columns == V * lanes) {
      for (int j = 0; j < V; ++j) {
        const vec own = alpha * total[i][j];
        store(c + e + j * lanes, base ? load<vec>(base + e + j * lanes) + own : own);
      }
    } else {
      float own[V * lanes];
      for (int j = 0; j < V; ++j) store(own + j * lanes, total[i][j]);
      for (int64_t j = 0; j < columns; ++j) c[e + j] = (base ? base[e + j] : 0) + alpha * own[j];
    }
  }
}

typedef void (*tile_function)(int64_t, const float *, int64_t, int64_t, const float *, float, const float *, float *, int64_t, int64_t);

template <int M, int V> tile_function tile_of(int64_t rows) {
  if constexpr (M == 1)
    return tile<1, V>;
  else
    return rows >= M ? tile<M, V> : tile_of<M - 1, V>(rows);
}

int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

int64_t panels_of(int64_t columns) { return (columns + columns_at_once - 1) / columns_at_once; }

// Copies a panel of the right factor, term by term, with zeros where it has no columns.
FGO_TARGET __attribute__((noinline)) void copy_panel(matrix b, int64_t terms, int64_t columns, float *to) {
  const int64_t stored = columns <= lanes ? lanes : columns_at_once;
  if (b.column == 1 && columns == columns_at_once) {
    for (int64_t t = 0; t < terms; ++t)
      for (int64_t j = 0; j < columns_at_once; j += lanes) store(to + t * columns_at_once + j, load<vec>(b.at + t * b.row + j));
    return;
  }
  for (int64_t j = 0; j < stored; ++j)
    for (int64_t t = 0; t < terms; ++t) to[t * stored + j] = j < columns ? b.at[t * b.row + j * b.column] : 0;
}

// Copies rows of the left factor, term by term.
FGO_TARGET __attribute__((noinline)) void copy_rows(matrix a, int64_t rows, int64_t terms, float *to) {
  for (int64_t t = 0; t < terms; ++t)
    for (int64_t i = 0; i < rows; ++i) to[t * rows + i] = a.at[i * a.row + t * a.column];
}

// The size of the memory that multiply() needs, in numbers.
int64_t memory_of_product(int64_t m, int64_t n, int64_t k) { return (m + panels_of(n) * columns_at_once) * least(k, terms_at_once); }

// c = base + alpha a b, stored row by row, without gaps; a is m x k and b is k x n, base may be null, or c. If the product is
// known to be symmetric, half of it is copied.
FGO_TARGET void multiply(int64_t m, int64_t n, int64_t k, matrix a, matrix b, float alpha, const float *base, float *c,
                         bool is_symmetric, float *memory, int threads) {
  const int64_t panels = panels_of(n), strips = (m + rows_at_once - 1) / rows_at_once;
  const bool copies = a.column != 1;
  float *const left = memory + panels * columns_at_once * least(k, terms_at_once);
  for (int64_t from = 0; from < k; from += terms_at_once) {
    const int64_t terms = least(k - from, terms_at_once);
    const float *const before = from ? c : base;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
#pragma omp for schedule(static) nowait
      for (int64_t p = 0; p < panels; ++p) {
        const int64_t first = p * columns_at_once;
        copy_panel({b.at + from * b.row + first * b.column, b.row, b.column}, terms, least(n - first, columns_at_once),
                   memory + first * terms);
      }
#pragma omp for schedule(static)
      for (int64_t s = 0; s < (copies ? strips : 0); ++s) {
        const int64_t i = s * rows_at_once;
        copy_rows({a.at + i * a.row + from * a.column, a.row, a.column}, least(m - i, rows_at_once), terms, left + i * terms);
      }
#pragma omp for schedule(static)
      for (int64_t p = 0; p < panels * strips; ++p) {  // strip by strip, panel after panel
        const int64_t first = p / strips * columns_at_once, i = p % strips * rows_at_once;
        const int64_t columns = least(n - first, columns_at_once), rows = least(m - i, rows_at_once);
        if (is_symmetric && first + columns <= i) continue;  // below the diagonal
        const auto run = columns <= lanes ? tile_of<rows_at_once, 1>(rows) : tile_of<rows_at_once, vectors_at_once>(rows);
        run(terms, copies ? left + i * terms : a.at + i * a.row + from, copies ? 1 : a.row, copies ? rows : 1, memory + first * terms,
            alpha, before ? before + i * n + first : nullptr, c + i * n + first, n, columns);
      }
    }
  }
  if (!is_symmetric) return;
  constexpr int64_t side = 16;
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (threads > 1)
  for (int64_t row = 0; row < m; row += side)
    for (int64_t column = 0; column <= row; column += side)
      for (int64_t i = row; i < least(row + side, m); ++i)
        for (int64_t j = column; j < least(column + side, i); ++j) c[i * n + j] = c[j * n + i];
}

}  // namespace FGO_NAMESPACE
}  // namespace
