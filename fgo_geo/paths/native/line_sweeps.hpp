// The sweeps of lines.cpp, compiled once per instruction set: FGO_NAMESPACE holds them, FGO_TARGET is its attribute.
// Template arguments say whether the momentum buffer is read (READS: it holds momentum) and whether it is written (WRITES).

namespace {
namespace FGO_NAMESPACE {

#define FGO_INLINE FGO_TARGET __attribute__((always_inline)) static inline

typedef float narrow __attribute__((vector_size(16)));  // as many numbers as a `wide` vector
typedef float vec __attribute__((vector_size(32)));
typedef double wide __attribute__((vector_size(32)));

constexpr int rows_at_once = 4;        // so that sums are loaded and stored once per four rows
constexpr int64_t most_columns = 512;  // their sums fit the first-level cache

template <class V, class T> FGO_INLINE V load(const T *p) {
  V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
template <class V, class T> FGO_INLINE void store(T *p, V v) { __builtin_memcpy(p, &v, sizeof v); }

FGO_INLINE wide widened(const float *p) { return __builtin_convertvector(load<narrow>(p), wide); }

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

// Products of `count` numbers.
template <bool READS>
FGO_TARGET __attribute__((noinline)) void measure_run(const float *x, const float *h, const float *m, int64_t count, double *sums) {
  wide total[products] = {};
  int64_t i = 0;
  for (; i + 4 <= count; i += 4)
    add_products<wide, READS>(widened(x + i), widened(h + i), READS ? widened(m + i) : wide{}, total);
  for (int k = 0; k < products; ++k) sums[k] = (total[k][0] + total[k][1]) + (total[k][2] + total[k][3]);
  for (; i < count; ++i) add_products<double, READS>(x[i], h[i], READS ? m[i] : 0, sums);
}

// Prefetches the same columns R rows further down: the hardware prefetcher does not follow so many streams.
template <int R> FGO_INLINE void prefetch(const float *x, const float *h, const float *m, int64_t stride) {
  for (int r = R; r < 2 * R; ++r) {
    __builtin_prefetch(x + r * stride);
    __builtin_prefetch(h + r * stride);
    if (m) __builtin_prefetch(m + r * stride);
  }
}

// Adds the products of `count` columns over R rows to the columns' sums.
template <bool READS, int R>
FGO_INLINE void measure_rows(const float *x, const float *h, const float *m, int64_t stride, int64_t count, double *sums,
                             int64_t plane) {
  int64_t j = 0;
  for (; j + 4 <= count; j += 4) {
    if (j % 16 == 0) prefetch<R>(x + j, h + j, READS ? m + j : nullptr, stride);
    wide total[products];
    for (int k = 0; k < (READS ? products : 3); ++k) total[k] = load<wide>(sums + k * plane + j);
    for (int r = 0; r < R; ++r) {
      const int64_t e = r * stride + j;
      add_products<wide, READS>(widened(x + e), widened(h + e), READS ? widened(m + e) : wide{}, total);
    }
    for (int k = 0; k < (READS ? products : 3); ++k) store(sums + k * plane + j, total[k]);
  }
  for (; j < count; ++j) {
    double total[products] = {};
    for (int r = 0; r < R; ++r) {
      const int64_t e = r * stride + j;
      add_products<double, READS>(x[e], h[e], READS ? m[e] : 0, total);
    }
    for (int k = 0; k < products; ++k) sums[k * plane + j] += total[k];
  }
}

// Adds the products of a matrix's columns over `rows` rows to the columns' sums.
template <bool READS>
FGO_TARGET __attribute__((noinline)) void measure_matrix(const float *x, const float *h, const float *m, int64_t rows, int64_t width,
                                                         double *sums, int64_t plane) {
  for (int64_t from = 0; from < width; from += most_columns) {
    const int64_t count = width - from < most_columns ? width - from : most_columns;
    int64_t i = 0;
    for (; i + rows_at_once <= rows; i += rows_at_once) {
      const int64_t e = i * width + from;
      measure_rows<READS, rows_at_once>(x + e, h + e, READS ? m + e : nullptr, width, count, sums + from, plane);
    }
    for (; i < rows; ++i) {
      const int64_t e = i * width + from;
      measure_rows<READS, 1>(x + e, h + e, READS ? m + e : nullptr, width, count, sums + from, plane);
    }
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
  for (; i + 8 <= count; i += 8) move_by<vec, READS, WRITES>(x + i, h + i, WRITES ? m + i : m, all);
  for (; i < count; ++i) move_by<float, READS, WRITES>(x + i, h + i, WRITES ? m + i : m, one);
}

template <bool READS, bool WRITES, int R>
FGO_INLINE void move_rows(float *x, const float *h, float *m, int64_t width, const float *by, int64_t plane) {
  int64_t j = 0;
  for (; j + 8 <= width; j += 8) {
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

// The segments of a row. Columns in the order of the matrix are read in place, others through a copy.
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

FGO_INLINE void gather(const float *row, const int32_t *order, int64_t count, float *copy) {
  for (int64_t j = 0; j < count; ++j) copy[j] = row[order[j]];
}

FGO_INLINE void scatter(const float *copy, const int32_t *order, int64_t count, float *row) {
  for (int64_t j = 0; j < count; ++j) row[order[j]] = copy[j];
}

template <bool READS>
FGO_TARGET void measure_blocks(const fgo_lines &t, int64_t task, int64_t begin, int64_t end, std::vector<partial_sums> &partials) {
  partials.push_back({task, 0, t.shared, begin == 0, std::vector<double>(products * t.shared)});
  double *sums = partials.back().sums.data();
  std::vector<float> copies(3 * t.width);
  float *xs = copies.data(), *hs = xs + t.width, *ms = hs + t.width;
  for (int64_t row = begin / t.width; row < end / t.width; ++row) {
    const row_of_segments all = row_at(t, row);
    for (const fgo_segment *s = all.begin; s != all.end; ++s) {
      if (s->form == no_line) continue;
      const float *x = t.weight + row * t.width, *h = t.grad + row * t.width, *m = READS ? t.buffer + row * t.width : nullptr;
      if (all.order) {
        const int32_t *order = all.order + s->start;
        gather(x, order, s->count, xs), gather(h, order, s->count, hs), x = xs, h = hs;
        if (READS) gather(m, order, s->count, ms), m = ms;
      } else {
        x += s->start, h += s->start, m = READS ? m + s->start : nullptr;
      }
      if (s->form == line_per_column) {
        measure_rows<READS, 1>(x, h, m, 0, s->count, sums + s->first_line, t.shared);
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
}

template <bool READS, bool WRITES> FGO_TARGET void move_blocks(const fgo_lines &t, int64_t begin, int64_t end) {
  std::vector<float> copies(3 * t.width);
  float *xs = copies.data(), *hs = xs + t.width, *ms = hs + t.width;
  for (int64_t row = begin / t.width; row < end / t.width; ++row) {
    const row_of_segments all = row_at(t, row);
    for (const fgo_segment *s = all.begin; s != all.end; ++s) {
      if (s->form == no_line) continue;
      const float *h = t.grad + row * t.width;
      float *x = t.weight + row * t.width, *m = WRITES ? t.buffer + row * t.width : nullptr;
      const int32_t *order = all.order ? all.order + s->start : nullptr;
      float *const own_x = x, *const own_m = m;
      if (order) {
        gather(x, order, s->count, xs), gather(h, order, s->count, hs), x = xs, h = hs;
        if (READS) gather(m, order, s->count, ms);
        if (WRITES) m = ms;
      } else {
        x += s->start, h += s->start, m = WRITES ? m + s->start : nullptr;
      }
      if (s->form == line_per_column) {
        move_rows<READS, WRITES, 1>(x, h, m, s->count, t.coefficients + s->first_line, t.lines);
      } else {
        float by[coefficients];
        const int64_t line = s->first_line + (s->form == line_per_row ? all.row_in_block : 0);
        for (int k = 0; k < coefficients; ++k) by[k] = t.coefficients[k * t.lines + line];
        move_run<READS, WRITES>(x, h, m, s->count, by);
      }
      if (order) {
        scatter(x, order, s->count, own_x);
        if (WRITES) scatter(m, order, s->count, own_m);
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
