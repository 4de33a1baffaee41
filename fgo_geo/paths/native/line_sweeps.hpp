// The sweeps of lines.cpp, compiled once per instruction set (each_set.hpp). Template arguments are whether the momentum buffer
// is read (READS: it holds momentum) and whether it is written (WRITES).

#include "columns.hpp"

namespace {
namespace FGO_NAMESPACE {

#define FGO_INLINE FGO_TARGET __attribute__((always_inline)) static inline

typedef float narrow __attribute__((vector_size(FGO_BYTES / 2)));  // as many numbers as a `wide` vector
typedef float vec __attribute__((vector_size(FGO_BYTES)));
typedef double wide __attribute__((vector_size(FGO_BYTES)));

constexpr int64_t lanes = FGO_BYTES / 4, half = lanes / 2;

constexpr int rows_at_once = 4;        // so that sums are loaded and stored once per four rows
constexpr int many_rows = 8;           // the same for rows that are not adjacent in memory
constexpr int64_t prefetch_distance = 512;  // numbers between a stream and its prefetches
constexpr int64_t most_columns = 512;       // their sums fit the first-level cache

template <class V, class T> FGO_INLINE V load(const T *p) {
  V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
template <class V, class T> FGO_INLINE void store(T *p, V v) { __builtin_memcpy(p, &v, sizeof v); }

FGO_INLINE wide widened(const float *p) {
#if FGO_SET == 2  // GCC would convert the halves separately
  return (wide)_mm512_cvtps_pd(_mm256_loadu_ps(p));
#else
  return __builtin_convertvector(load<narrow>(p), wide);
#endif
}

template <class V, bool READS> FGO_INLINE void add_products(const V &x, const V &h, const V &m, V *sums) {
  sums[xx] += x * x;
  sums[xh] += x * h;
  sums[hh] += h * h;
  if constexpr (READS) {
    sums[xm] += x * m;
    sums[mm] += m * m;
    sums[hm] += h * m;
  }
}

// Prefetches the same columns R rows further down: the hardware prefetcher does not follow so many streams.
template <int R> FGO_INLINE void prefetch(const float *x, const float *h, const float *m, int64_t stride) {
  for (int r = R; r < 2 * R; ++r) {
    __builtin_prefetch(x + r * stride);
    __builtin_prefetch(h + r * stride);
    if (m) __builtin_prefetch(m + r * stride);
  }
}

// Products of `count` numbers.
template <bool READS>
FGO_TARGET __attribute__((noinline)) void measure_run(const float *x, const float *h, const float *m, int64_t count, double *sums) {
  wide total[products] = {};
  int64_t i = 0;
  for (; i + half <= count; i += half) {
    if (i % 16 == 0) prefetch<1>(x + i, h + i, READS ? m + i : nullptr, prefetch_distance);
    add_products<wide, READS>(widened(x + i), widened(h + i), READS ? widened(m + i) : wide{}, total);
  }
  for (int k = 0; k < products; ++k) {
    sums[k] = 0;
    for (int j = 0; j < half; ++j) sums[k] += total[k][j];
  }
  for (; i < count; ++i) add_products<double, READS>(x[i], h[i], READS ? m[i] : 0, sums);
}

// R rows of a matrix, at any addresses.
template <int R> struct rows_of {
  const float *x[R], *h[R], *m[R];
};

template <bool READS, int R> FGO_INLINE rows_of<R> rows_from(const float *x, const float *h, const float *m, int64_t stride) {
  rows_of<R> rows;
  for (int r = 0; r < R; ++r) {
    const int64_t e = r * stride;
    rows.x[r] = x + e, rows.h[r] = h + e, rows.m[r] = READS ? m + e : nullptr;
  }
  return rows;
}

// Adds the products of columns over R rows to the columns' sums. With a stride, the rows below are prefetched.
template <bool READS, int R>
FGO_INLINE void measure_rows(const rows_of<R> &rows, int64_t stride, int64_t from, int64_t to, double *sums, int64_t plane) {
  int64_t j = from;
  for (; j + half <= to; j += half) {
    if (stride && j % 16 == 0) prefetch<R>(rows.x[0] + j, rows.h[0] + j, READS ? rows.m[0] + j : nullptr, stride);
    wide total[products];
    for (int k = 0; k < (READS ? products : 3); ++k) total[k] = load<wide>(sums + k * plane + j);
    for (int r = 0; r < R; ++r)
      add_products<wide, READS>(widened(rows.x[r] + j), widened(rows.h[r] + j), READS ? widened(rows.m[r] + j) : wide{}, total);
    for (int k = 0; k < (READS ? products : 3); ++k) store(sums + k * plane + j, total[k]);
  }
  for (; j < to; ++j) {
    double total[products] = {};
    for (int r = 0; r < R; ++r)
      add_products<double, READS>(rows.x[r][j], rows.h[r][j], READS ? rows.m[r][j] : 0, total);
    for (int k = 0; k < products; ++k) sums[k * plane + j] += total[k];
  }
}

// Adds the products of a matrix's columns over `rows` rows to the columns' sums.
template <bool READS>
FGO_TARGET __attribute__((noinline)) void measure_matrix(const float *x, const float *h, const float *m, int64_t rows, int64_t width,
                                                         double *sums, int64_t plane) {
  for (int64_t from = 0; from < width; from += most_columns) {
    const int64_t to = width - from < most_columns ? width : from + most_columns;
    int64_t i = 0;
    for (; i + rows_at_once <= rows; i += rows_at_once)
      measure_rows<READS>(rows_from<READS, rows_at_once>(x + i * width, h + i * width, READS ? m + i * width : nullptr, width), width,
                          from, to, sums, plane);
    for (; i < rows; ++i)
      measure_rows<READS>(rows_from<READS, 1>(x + i * width, h + i * width, READS ? m + i * width : nullptr, width), width, from, to,
                          sums, plane);
  }
}

template <bool READS>
FGO_TARGET void measure_part(const fgo_lines &t, int64_t task, int64_t begin, int64_t end, std::vector<partial_sums> &partials) {
  const bool by_columns = t.width > 1;
  const int64_t count = by_columns ? t.width : 1, per_matrix = count * t.length;  // lines, and numbers, of a matrix
  for (int64_t from = begin; from < end;) {
    const int64_t matrix = from / per_matrix, start = matrix * per_matrix;
    const int64_t to = start + per_matrix < end ? start + per_matrix : end;
    const bool is_complete = from == start && to == start + per_matrix;
    double *sums = t.products + matrix * count;
    int64_t plane = t.lines;
    if (!is_complete) {
      partials.push_back({task, matrix * count, count, from == start, std::vector<double>(products * count)});
      sums = partials.back().sums.data(), plane = count;
    }
    const float *m = READS ? t.buffer + from : nullptr;
    if (by_columns) {
      if (is_complete)
        for (int k = 0; k < products; ++k)
          for (int64_t j = 0; j < count; ++j) sums[k * plane + j] = 0;
      measure_matrix<READS>(t.weight + from, t.grad + from, m, (to - from) / t.width, t.width, sums, plane);
    } else {
      double of_run[products];
      measure_run<READS>(t.weight + from, t.grad + from, m, to - from, of_run);
      for (int k = 0; k < products; ++k) sums[k * plane] = of_run[k];
    }
    from = to;
  }
}

// The coefficients of one line, or of adjacent lines.
template <class V> struct coefficients_of {
  V v[coefficients];
};

template <class V, bool READS, bool WRITES>
FGO_INLINE void move_by(float *x, const float *h, float *m, const coefficients_of<V> &by) {
  const V none = {}, x0 = load<V>(x), read = load<V>(h);
  const V h0 = by.v[WRITES ? a_h : b_h] == none ? none : read;  // a gradient with factor zero may be NaN
  V step = by.v[b_h] * h0 + by.v[b_x] * x0;  // summed before it is added to x, so that rounding does not lose short steps
  if constexpr (WRITES) {
    V kept = by.v[a_h] * h0 + by.v[a_x] * x0;
    if constexpr (READS) {
      const V m0 = load<V>(m);
      kept += by.v[a_m] * m0;
      step += by.v[b_m] * m0;
    }
    store(m, kept);
  }
  store(x, (x0 + step) * by.v[factor]);
}

template <bool READS, bool WRITES>
FGO_TARGET __attribute__((noinline)) void move_run(float *x, const float *h, float *m, int64_t count, const float *by) {
  coefficients_of<vec> all;
  coefficients_of<float> one;
  for (int k = 0; k < coefficients; ++k) all.v[k] = vec{} + by[k], one.v[k] = by[k];
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) {
    if (i % 16 == 0) prefetch<1>(x + i, h + i, READS ? m + i : nullptr, prefetch_distance);
    move_by<vec, READS, WRITES>(x + i, h + i, WRITES ? m + i : m, all);
  }
  for (; i < count; ++i) move_by<float, READS, WRITES>(x + i, h + i, WRITES ? m + i : m, one);
}

template <bool READS, bool WRITES, int R>
FGO_INLINE void move_rows(float *x, const float *h, float *m, int64_t width, const float *by, int64_t plane) {
  int64_t j = 0;
  for (; j + lanes <= width; j += lanes) {
    if (j % 16 == 0) prefetch<R>(x + j, h + j, READS ? m + j : nullptr, width);
    coefficients_of<vec> all;
    for (int k = 0; k < coefficients; ++k) all.v[k] = load<vec>(by + k * plane + j);
    for (int r = 0; r < R; ++r)
      move_by<vec, READS, WRITES>(x + r * width + j, h + r * width + j, WRITES ? m + r * width + j : m, all);
  }
  for (; j < width; ++j) {
    coefficients_of<float> one;
    for (int k = 0; k < coefficients; ++k) one.v[k] = by[k * plane + j];
    for (int r = 0; r < R; ++r)
      move_by<float, READS, WRITES>(x + r * width + j, h + r * width + j, WRITES ? m + r * width + j : m, one);
  }
}

template <bool READS, bool WRITES>
FGO_TARGET __attribute__((noinline)) void move_matrix(float *x, const float *h, float *m, int64_t rows, int64_t width, const float *by,
                                                      int64_t plane) {
  int64_t i = 0;
  for (; i + rows_at_once <= rows; i += rows_at_once)
    move_rows<READS, WRITES, rows_at_once>(x + i * width, h + i * width, WRITES ? m + i * width : m, width, by, plane);
  for (; i < rows; ++i) move_rows<READS, WRITES, 1>(x + i * width, h + i * width, WRITES ? m + i * width : m, width, by, plane);
}

template <bool READS, bool WRITES> FGO_TARGET void move_part(const fgo_lines &t, int64_t begin, int64_t end) {
  const bool by_columns = t.width > 1;
  const int64_t count = by_columns ? t.width : 1, per_matrix = count * t.length;
  for (int64_t from = begin; from < end;) {
    const int64_t matrix = from / per_matrix, start = matrix * per_matrix;
    const int64_t to = start + per_matrix < end ? start + per_matrix : end;
    const float *by = t.coefficients + matrix * count;
    float *m = WRITES ? t.buffer + from : nullptr;
    if (by_columns) {
      move_matrix<READS, WRITES>(t.weight + from, t.grad + from, m, (to - from) / t.width, t.width, by, t.lines);
    } else {
      float of_run[coefficients];
      for (int k = 0; k < coefficients; ++k) of_run[k] = by[k * t.lines];
      move_run<READS, WRITES>(t.weight + from, t.grad + from, m, to - from, of_run);
    }
    from = to;
  }
}

// -- matrices whose blocks belong to several manifolds ---------------------------------------------------------------------

// The segments of a row.
struct row_of_segments {
  const fgo_segment *begin, *end;
  const int32_t *order;  // null: the order of the matrix
  int64_t row_in_block;
};

FGO_INLINE row_of_segments row_at(const fgo_lines &t, int64_t row) {
  const int32_t pattern = t.pattern_of_row[row], *order = t.column_orders + pattern * t.width;
  return {t.segments + t.first_segments[pattern], t.segments + t.first_segments[pattern + 1], *order < 0 ? nullptr : order,
          t.row_in_block[row]};
}

// Memory of a pattern; zero at first.
template <class T> std::vector<T> &memory_of(std::vector<std::vector<T>> &of_patterns, int64_t pattern, int64_t count) {
  if (int64_t(of_patterns.size()) <= pattern) of_patterns.resize(pattern + 1);
  if (of_patterns[pattern].empty()) of_patterns[pattern].assign(count, T(0));
  return of_patterns[pattern];
}

// Where the columns of a row are not in the order of the matrix, lines that extend over several rows are not gathered. Instead,
// the products are summed over every column, and then over the columns of every line; every column moves with the coefficients
// of its line. Only lines within such rows are gathered.
bool is_gathered(const fgo_segment &s, const row_of_segments &all) { return s.form == line_per_row || !all.order; }

// The sums of the columns of a pattern, a plane per product, and rows that are to be added to them.
struct sums_of_columns {
  std::vector<double> sums;
  rows_of<many_rows> rows;
  int pending = 0;
};

template <bool READS> FGO_TARGET __attribute__((noinline)) void add_pending_rows(sums_of_columns &of, int64_t width) {
  for (int64_t from = 0; from < width; from += most_columns) {
    const int64_t to = width - from < most_columns ? width : from + most_columns;
    if (of.pending == many_rows)
      measure_rows<READS, many_rows>(of.rows, 0, from, to, of.sums.data(), width);
    else
      for (int r = 0; r < of.pending; ++r)
        measure_rows<READS, 1>(rows_from<READS, 1>(of.rows.x[r], of.rows.h[r], of.rows.m[r], 0), 0, from, to, of.sums.data(), width);
  }
  of.pending = 0;
}

template <bool READS>
FGO_TARGET void measure_blocks(const fgo_lines &t, int64_t task, int64_t begin, int64_t end, std::vector<partial_sums> &partials) {
  partials.push_back({task, 0, t.shared, begin == 0, std::vector<double>(products * t.shared)});
  double *sums = partials.back().sums.data();
  std::vector<sums_of_columns> of_patterns;  // of those whose columns are not in order
  std::vector<float> copies(3 * t.width);
  float *xs = copies.data(), *hs = xs + t.width, *ms = hs + t.width;
  for (int64_t row = begin / t.width; row < end / t.width; ++row) {
    const row_of_segments all = row_at(t, row);
    const float *const x_row = t.weight + row * t.width, *const h_row = t.grad + row * t.width;
    const float *const m_row = READS ? t.buffer + row * t.width : nullptr;
    if (all.order) {
      const size_t pattern = t.pattern_of_row[row];
      if (of_patterns.size() <= pattern) of_patterns.resize(pattern + 1);
      sums_of_columns &own = of_patterns[pattern];
      if (own.sums.empty()) own.sums.assign(products * t.width, 0.0);
      own.rows.x[own.pending] = x_row, own.rows.h[own.pending] = h_row, own.rows.m[own.pending] = m_row;
      if (++own.pending == many_rows) add_pending_rows<READS>(own, t.width);
    }
    for (const fgo_segment *s = all.begin; s != all.end; ++s) {
      if (s->form == no_line || !is_gathered(*s, all)) continue;
      const float *x = x_row + s->start, *h = h_row + s->start, *m = READS ? m_row + s->start : nullptr;
      if (all.order) {
        const int32_t *columns = all.order + s->start;
        gather_row(x_row, columns, s->count, 1, 0, xs), gather_row(h_row, columns, s->count, 1, 0, hs), x = xs, h = hs;
        if (READS) gather_row(m_row, columns, s->count, 1, 0, ms), m = ms;
      }
      if (s->form == line_per_column) {
        measure_rows<READS>(rows_from<READS, 1>(x, h, m, 0), 0, 0, s->count, sums + s->first_line, t.shared);
        continue;
      }
      double of_run[products];
      measure_run<READS>(x, h, m, s->count, of_run);
      for (int k = 0; k < products; ++k) {
        if (s->form == one_line)
          sums[k * t.shared + s->first_line] += of_run[k];
        else
          t.products[k * t.lines + s->first_line + all.row_in_block] = of_run[k];
      }
    }
  }
  for (size_t pattern = 0; pattern < of_patterns.size(); ++pattern) {
    sums_of_columns &own = of_patterns[pattern];
    if (own.sums.empty()) continue;
    add_pending_rows<READS>(own, t.width);
    for (int32_t k = t.first_segments[pattern]; k < t.first_segments[pattern + 1]; ++k) {
      const fgo_segment &s = t.segments[k];
      const int32_t *order = t.column_orders + pattern * t.width + s.start;
      for (int32_t j = 0; s.form != no_line && s.form != line_per_row && j < s.count; ++j)
        for (int product = 0; product < products; ++product)
          sums[product * t.shared + s.first_line + (s.form == line_per_column ? j : 0)] += own.sums[product * t.width + order[j]];
    }
  }
}

// The coefficients of every column of a pattern, a plane each: those of its line, or coefficients that leave the column unchanged.
void write_column_coefficients(const fgo_lines &t, int32_t pattern, float *planes) {
  for (int32_t k = t.first_segments[pattern]; k < t.first_segments[pattern + 1]; ++k) {
    const fgo_segment &s = t.segments[k];
    const int32_t *order = t.column_orders + pattern * t.width + s.start;
    const bool is_kept = s.form == no_line || s.form == line_per_row;
    for (int32_t j = 0; j < s.count; ++j)
      for (int c = 0; c < coefficients; ++c)
        planes[c * t.width + order[j]] =
            is_kept ? c == a_m || c == factor : t.coefficients[c * t.lines + s.first_line + (s.form == line_per_column ? j : 0)];
  }
}

FGO_INLINE void write_run(const float *from, const int32_t *columns, const fgo_segment &s, float *row) {
  if (columns)
    scatter_row(from, columns, s.count, row);
  else
    __builtin_memcpy(row + s.start, from, s.count * sizeof(float));
}

template <bool READS, bool WRITES> FGO_TARGET void move_blocks(const fgo_lines &t, int64_t begin, int64_t end) {
  std::vector<std::vector<float>> of_columns;  // per pattern whose columns are not in order
  std::vector<float> copies(3 * t.width);
  float *xs = copies.data(), *hs = xs + t.width, *ms = hs + t.width;
  for (int64_t row = begin / t.width; row < end / t.width; ++row) {
    const row_of_segments all = row_at(t, row);
    float *const x_row = t.weight + row * t.width, *const m_row = WRITES ? t.buffer + row * t.width : nullptr;
    const float *const h_row = t.grad + row * t.width;
    if (all.order) {
      const int32_t pattern = t.pattern_of_row[row];
      const bool is_new = int64_t(of_columns.size()) <= pattern || of_columns[pattern].empty();
      std::vector<float> &own = memory_of(of_columns, pattern, coefficients * t.width);
      if (is_new) write_column_coefficients(t, pattern, own.data());
      move_rows<READS, WRITES, 1>(x_row, h_row, m_row, t.width, own.data(), t.width);
    }
    for (const fgo_segment *s = all.begin; s != all.end; ++s) {
      const int32_t *columns = all.order ? all.order + s->start : nullptr;
      if (s->form == no_line) {  // stepped by another path
        const int64_t e = all.row_in_block * s->count;
        write_run(t.points[s->first_line] + e, columns, *s, x_row);
        if (WRITES) write_run(t.momenta[s->first_line] + e, columns, *s, m_row);
        continue;
      }
      if (!is_gathered(*s, all)) continue;
      const float *h = h_row + s->start;
      float *x = x_row + s->start, *m = WRITES ? m_row + s->start : nullptr;
      if (columns) {
        gather_row(x_row, columns, s->count, 1, 0, xs), gather_row(h_row, columns, s->count, 1, 0, hs), x = xs, h = hs;
        if (READS) gather_row(m_row, columns, s->count, 1, 0, ms);
        if (WRITES) m = ms;
      }
      if (s->form == line_per_column) {
        move_rows<READS, WRITES, 1>(x, h, m, s->count, t.coefficients + s->first_line, t.lines);
      } else {
        float by[coefficients];
        const int64_t line = s->first_line + (s->form == line_per_row ? all.row_in_block : 0);
        for (int k = 0; k < coefficients; ++k) by[k] = t.coefficients[k * t.lines + line];
        move_run<READS, WRITES>(x, h, m, s->count, by);
      }
      if (columns) {
        scatter_row(x, columns, s->count, x_row);
        if (WRITES) scatter_row(m, columns, s->count, m_row);
      }
    }
  }
}

// -- the range of a thread ---------------------------------------------------------------------------------------------

// Computes the products of the lines in a range of a task; for lines that extend beyond the range, partial sums.
FGO_TARGET void measure(const fgo_lines &t, int64_t task, int64_t begin, int64_t end, std::vector<partial_sums> &partials) {
  const bool has_momentum = t.buffer && !t.first;
  if (t.pattern_of_row)
    has_momentum ? measure_blocks<true>(t, task, begin, end, partials) : measure_blocks<false>(t, task, begin, end, partials);
  else
    has_momentum ? measure_part<true>(t, task, begin, end, partials) : measure_part<false>(t, task, begin, end, partials);
}

// Moves a range of a task.
FGO_TARGET void move(const fgo_lines &t, int64_t begin, int64_t end) {
  if (!t.buffer)
    t.pattern_of_row ? move_blocks<false, false>(t, begin, end) : move_part<false, false>(t, begin, end);
  else if (t.first)
    t.pattern_of_row ? move_blocks<false, true>(t, begin, end) : move_part<false, true>(t, begin, end);
  else
    t.pattern_of_row ? move_blocks<true, true>(t, begin, end) : move_part<true, true>(t, begin, end);
}

#undef FGO_INLINE

}  // namespace FGO_NAMESPACE
}  // namespace
