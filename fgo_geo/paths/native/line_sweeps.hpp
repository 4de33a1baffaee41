// The sweeps of lines.cpp, compiled once per instruction set: FGO_NAMESPACE holds them, FGO_TARGET is its attribute.

namespace {
namespace FGO_NAMESPACE {

#define FGO_INLINE FGO_TARGET __attribute__((always_inline)) static inline

typedef float narrow __attribute__((vector_size(16)));  // what fits a vector of double precision
typedef float vec __attribute__((vector_size(32)));
typedef double wide __attribute__((vector_size(32)));

constexpr int rows_at_once = 4;     // of a matrix, so that sums are fetched and put back less often
constexpr int64_t most_columns = 512;  // whose sums fit the first cache

template <class V, class T> FGO_INLINE V load(const T *p) {
  V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
template <class V, class T> FGO_INLINE void store(T *p, V v) { __builtin_memcpy(p, &v, sizeof v); }

FGO_INLINE wide widened(const float *p) { return __builtin_convertvector(load<narrow>(p), wide); }

template <class V, bool M> FGO_INLINE void add_products(const V &x, const V &h, const V &m, V *sums) {
  sums[xx] += x * x;
  sums[xh] += x * h;
  sums[hh] += h * h;
  if constexpr (M) {
    sums[xm] += x * m;
    sums[mm] += m * m;
    sums[hm] += h * m;
  }
}

// Products of `count` numbers.
template <bool M>
FGO_TARGET __attribute__((noinline)) void measure_run(const float *x, const float *h, const float *m, int64_t count, double *sums) {
  wide total[products] = {};
  int64_t i = 0;
  for (; i + 4 <= count; i += 4)
    add_products<wide, M>(widened(x + i), widened(h + i), M ? widened(m + i) : wide{}, total);
  for (int k = 0; k < products; ++k) sums[k] = (total[k][0] + total[k][1]) + (total[k][2] + total[k][3]);
  for (; i < count; ++i) add_products<double, M>(x[i], h[i], M ? m[i] : 0, sums);
}

// Asks for the memory of the same columns, R rows on: the processor does not foresee so many streams by itself.
template <int R> FGO_INLINE void prefetch(const float *x, const float *h, const float *m, int64_t stride) {
  for (int r = R; r < 2 * R; ++r) {
    __builtin_prefetch(x + r * stride);
    __builtin_prefetch(h + r * stride);
    if (m) __builtin_prefetch(m + r * stride);
  }
}

// Adds the products of R rows of `count` columns to the sums of the columns.
template <bool M, int R>
FGO_INLINE void measure_rows(const float *x, const float *h, const float *m, int64_t stride, int64_t count, double *sums,
                             int64_t plane) {
  int64_t j = 0;
  for (; j + 4 <= count; j += 4) {
    if (j % 16 == 0) prefetch<R>(x + j, h + j, M ? m + j : nullptr, stride);
    wide total[products];
    for (int k = 0; k < (M ? products : 3); ++k) total[k] = load<wide>(sums + k * plane + j);
    for (int r = 0; r < R; ++r) {
      const int64_t e = r * stride + j;
      add_products<wide, M>(widened(x + e), widened(h + e), M ? widened(m + e) : wide{}, total);
    }
    for (int k = 0; k < (M ? products : 3); ++k) store(sums + k * plane + j, total[k]);
  }
  for (; j < count; ++j) {
    double total[products] = {};
    for (int r = 0; r < R; ++r) {
      const int64_t e = r * stride + j;
      add_products<double, M>(x[e], h[e], M ? m[e] : 0, total);
    }
    for (int k = 0; k < products; ++k) sums[k * plane + j] += total[k];
  }
}

// The columns of a matrix, over `rows` rows.
template <bool M>
FGO_TARGET __attribute__((noinline)) void measure_matrix(const float *x, const float *h, const float *m, int64_t rows, int64_t width,
                                                         double *sums, int64_t plane) {
  for (int64_t from = 0; from < width; from += most_columns) {
    const int64_t count = width - from < most_columns ? width - from : most_columns;
    int64_t i = 0;
    for (; i + rows_at_once <= rows; i += rows_at_once) {
      const int64_t e = i * width + from;
      measure_rows<M, rows_at_once>(x + e, h + e, M ? m + e : nullptr, width, count, sums + from, plane);
    }
    for (; i < rows; ++i) {
      const int64_t e = i * width + from;
      measure_rows<M, 1>(x + e, h + e, M ? m + e : nullptr, width, count, sums + from, plane);
    }
  }
}

template <bool M>
FGO_TARGET void measure_part(const fgo_lines &t, int64_t task, int64_t begin, int64_t end, std::vector<share_of_lines> &shares) {
  const bool turned = t.width > 1;
  const int64_t count = turned ? t.width : 1, whole = count * t.length;  // lines that lie together, and their numbers
  for (int64_t from = begin; from < end;) {
    const int64_t bundle = from / whole, start = bundle * whole;
    const int64_t to = start + whole < end ? start + whole : end;
    const bool alone = from == start && to == start + whole;
    double *sums = t.products + bundle * count;
    int64_t plane = t.lines;
    if (!alone) {
      shares.push_back({task, bundle * count, count, from == start, std::vector<double>(products * count)});
      sums = shares.back().sums.data(), plane = count;
    }
    const float *m = M ? t.buffer + from : nullptr;
    if (turned) {
      if (alone)
        for (int k = 0; k < products; ++k)
          for (int64_t j = 0; j < count; ++j) sums[k * plane + j] = 0;
      measure_matrix<M>(t.weight + from, t.grad + from, m, (to - from) / t.width, t.width, sums, plane);
    } else {
      double of_run[products];
      measure_run<M>(t.weight + from, t.grad + from, m, to - from, of_run);
      for (int k = 0; k < products; ++k) sums[k * plane] = of_run[k];
    }
    from = to;
  }
}

// What a line moves by: numbers, or vectors of them.
template <class V> struct moves_of {
  V v[moves];
};

template <class V, bool OLD, bool KEEP>
FGO_INLINE void move_by(float *x, const float *h, float *m, const moves_of<V> &by) {
  const V none = {}, x0 = load<V>(x), read = load<V>(h);
  const V h0 = by.v[KEEP ? a_h : b_h] == none ? none : read;  // a gradient that is left out may be NaN
  V step = by.v[b_h] * h0 + by.v[b_x] * x0;  // added to x as a whole: a short one is not to be lost in rounding
  if constexpr (KEEP) {
    V kept = by.v[a_h] * h0 + by.v[a_x] * x0;
    if constexpr (OLD) {
      const V m0 = load<V>(m);
      kept += by.v[a_m] * m0;
      step += by.v[b_m] * m0;
    }
    store(m, kept);
  }
  store(x, (x0 + step) * by.v[factor]);
}

template <bool OLD, bool KEEP>
FGO_TARGET __attribute__((noinline)) void move_run(float *x, const float *h, float *m, int64_t count, const float *by) {
  moves_of<vec> all;
  moves_of<float> one;
  for (int k = 0; k < moves; ++k) all.v[k] = vec{} + by[k], one.v[k] = by[k];
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) move_by<vec, OLD, KEEP>(x + i, h + i, KEEP ? m + i : m, all);
  for (; i < count; ++i) move_by<float, OLD, KEEP>(x + i, h + i, KEEP ? m + i : m, one);
}

template <bool OLD, bool KEEP, int R>
FGO_INLINE void move_rows(float *x, const float *h, float *m, int64_t width, const float *by, int64_t plane) {
  int64_t j = 0;
  for (; j + 8 <= width; j += 8) {
    if (j % 16 == 0) prefetch<R>(x + j, h + j, OLD ? m + j : nullptr, width);
    moves_of<vec> all;
    for (int k = 0; k < moves; ++k) all.v[k] = load<vec>(by + k * plane + j);
    for (int r = 0; r < R; ++r)
      move_by<vec, OLD, KEEP>(x + r * width + j, h + r * width + j, KEEP ? m + r * width + j : m, all);
  }
  for (; j < width; ++j) {
    moves_of<float> one;
    for (int k = 0; k < moves; ++k) one.v[k] = by[k * plane + j];
    for (int r = 0; r < R; ++r)
      move_by<float, OLD, KEEP>(x + r * width + j, h + r * width + j, KEEP ? m + r * width + j : m, one);
  }
}

template <bool OLD, bool KEEP>
FGO_TARGET __attribute__((noinline)) void move_matrix(float *x, const float *h, float *m, int64_t rows, int64_t width, const float *by,
                                                      int64_t plane) {
  int64_t i = 0;
  for (; i + rows_at_once <= rows; i += rows_at_once)
    move_rows<OLD, KEEP, rows_at_once>(x + i * width, h + i * width, KEEP ? m + i * width : m, width, by, plane);
  for (; i < rows; ++i) move_rows<OLD, KEEP, 1>(x + i * width, h + i * width, KEEP ? m + i * width : m, width, by, plane);
}

template <bool OLD, bool KEEP> FGO_TARGET void move_part(const fgo_lines &t, int64_t begin, int64_t end) {
  const bool turned = t.width > 1;
  const int64_t count = turned ? t.width : 1, whole = count * t.length;
  for (int64_t from = begin; from < end;) {
    const int64_t bundle = from / whole, start = bundle * whole;
    const int64_t to = start + whole < end ? start + whole : end;
    const float *by = t.moves + bundle * count;
    float *m = KEEP ? t.buffer + from : nullptr;
    if (turned) {
      move_matrix<OLD, KEEP>(t.weight + from, t.grad + from, m, (to - from) / t.width, t.width, by, t.lines);
    } else {
      float of_run[moves];
      for (int k = 0; k < moves; ++k) of_run[k] = by[k * t.lines];
      move_run<OLD, KEEP>(t.weight + from, t.grad + from, m, to - from, of_run);
    }
    from = to;
  }
}

// -- matrices whose blocks were dealt to several manifolds -----------------------------------------------------------------

// The segments of a row. Columns that are in order are taken where they are, others through a copy.
struct row_of_segments {
  const fgo_segment *begin, *end;
  const int32_t *order;  // null: as they are
  int64_t place;
};

FGO_INLINE row_of_segments row_at(const fgo_lines &t, int64_t row) {
  const int32_t pattern = t.patterns[row], *order = t.orders + pattern * t.width;
  return {t.segments + t.first_segments[pattern], t.segments + t.first_segments[pattern + 1], *order < 0 ? nullptr : order,
          t.places[row]};
}

FGO_INLINE void gather(const float *row, const int32_t *order, int64_t count, float *copy) {
  for (int64_t j = 0; j < count; ++j) copy[j] = row[order[j]];
}

FGO_INLINE void scatter(const float *copy, const int32_t *order, int64_t count, float *row) {
  for (int64_t j = 0; j < count; ++j) row[order[j]] = copy[j];
}

template <bool M>
FGO_TARGET void measure_blocks(const fgo_lines &t, int64_t task, int64_t begin, int64_t end, std::vector<share_of_lines> &shares) {
  shares.push_back({task, 0, t.shared, begin == 0, std::vector<double>(products * t.shared)});
  double *sums = shares.back().sums.data();
  std::vector<float> copies(3 * t.width);
  float *xs = copies.data(), *hs = xs + t.width, *ms = hs + t.width;
  for (int64_t row = begin / t.width; row < end / t.width; ++row) {
    const row_of_segments all = row_at(t, row);
    for (const fgo_segment *s = all.begin; s != all.end; ++s) {
      if (s->owner == nobody) continue;
      const float *x = t.weight + row * t.width, *h = t.grad + row * t.width, *m = M ? t.buffer + row * t.width : nullptr;
      if (all.order) {
        const int32_t *order = all.order + s->start;
        gather(x, order, s->count, xs), gather(h, order, s->count, hs), x = xs, h = hs;
        if (M) gather(m, order, s->count, ms), m = ms;
      } else {
        x += s->start, h += s->start, m = M ? m + s->start : nullptr;
      }
      if (s->owner == line_per_column) {
        measure_rows<M, 1>(x, h, m, 0, s->count, sums + s->first_line, t.shared);
        continue;
      }
      double of_run[products];
      measure_run<M>(x, h, m, s->count, of_run);
      for (int k = 0; k < products; ++k) {
        if (s->owner == one_line)
          sums[k * t.shared + s->first_line] += of_run[k];
        else
          t.products[k * t.lines + s->first_line + all.place] = of_run[k];
      }
    }
  }
}

template <bool OLD, bool KEEP> FGO_TARGET void move_blocks(const fgo_lines &t, int64_t begin, int64_t end) {
  std::vector<float> copies(3 * t.width);
  float *xs = copies.data(), *hs = xs + t.width, *ms = hs + t.width;
  for (int64_t row = begin / t.width; row < end / t.width; ++row) {
    const row_of_segments all = row_at(t, row);
    for (const fgo_segment *s = all.begin; s != all.end; ++s) {
      if (s->owner == nobody) continue;
      const float *h = t.grad + row * t.width;
      float *x = t.weight + row * t.width, *m = KEEP ? t.buffer + row * t.width : nullptr;
      const int32_t *order = all.order ? all.order + s->start : nullptr;
      float *const own_x = x, *const own_m = m;
      if (order) {
        gather(x, order, s->count, xs), gather(h, order, s->count, hs), x = xs, h = hs;
        if (OLD) gather(m, order, s->count, ms);
        if (KEEP) m = ms;
      } else {
        x += s->start, h += s->start, m = KEEP ? m + s->start : nullptr;
      }
      if (s->owner == line_per_column) {
        move_rows<OLD, KEEP, 1>(x, h, m, s->count, t.moves + s->first_line, t.lines);
      } else {
        float by[moves];
        for (int k = 0; k < moves; ++k) by[k] = t.moves[k * t.lines + s->first_line + (s->owner == line_per_row ? all.place : 0)];
        move_run<OLD, KEEP>(x, h, m, s->count, by);
      }
      if (order) {
        scatter(x, order, s->count, own_x);
        if (KEEP) scatter(m, order, s->count, own_m);
      }
    }
  }
}

// -- what a thread does ------------------------------------------------------------------------------------------------

// Products of the lines between two numbers of a task; of lines that go on elsewhere, a share.
FGO_TARGET void measure(const fgo_lines &t, int64_t task, int64_t begin, int64_t end, std::vector<share_of_lines> &shares) {
  const bool old = t.buffer && !t.first;
  if (t.patterns) return old ? measure_blocks<true>(t, task, begin, end, shares) : measure_blocks<false>(t, task, begin, end, shares);
  if (old)
    measure_part<true>(t, task, begin, end, shares);
  else
    measure_part<false>(t, task, begin, end, shares);
}

// Moves what lies between two numbers of a task.
FGO_TARGET void move(const fgo_lines &t, int64_t begin, int64_t end) {
  if (!t.buffer)
    t.patterns ? move_blocks<false, false>(t, begin, end) : move_part<false, false>(t, begin, end);
  else if (t.first)
    t.patterns ? move_blocks<false, true>(t, begin, end) : move_part<false, true>(t, begin, end);
  else
    t.patterns ? move_blocks<true, true>(t, begin, end) : move_part<true, true>(t, begin, end);
}

#undef FGO_INLINE

}  // namespace FGO_NAMESPACE
}  // namespace
