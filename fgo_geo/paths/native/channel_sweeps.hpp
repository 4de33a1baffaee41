// The sweeps of channels.cpp, compiled once per instruction set (each_set.hpp). A row of a block has `lanes` numbers, which
// are a few vectors in double precision.

namespace {
namespace FGO_NAMESPACE {

#define FGO_INLINE FGO_TARGET __attribute__((always_inline)) static inline
#define FGO_PARTS for (int part = 0; part < parts; ++part)

typedef double vec __attribute__((vector_size(FGO_BYTES)));
constexpr int in_part = FGO_BYTES / sizeof(double), parts = lanes / in_part;

typedef float narrow __attribute__((vector_size(FGO_BYTES / 2)));

FGO_INLINE vec load(const double *p) {
  vec v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

FGO_INLINE vec load(const float *p) {
#if FGO_SET == 2  // GCC would convert the halves, and join them
  return (vec)_mm512_cvtps_pd(_mm256_loadu_ps(p));
#elif FGO_SET == 1
  return (vec)_mm256_cvtps_pd(_mm_loadu_ps(p));
#else
  narrow v;
  __builtin_memcpy(&v, p, sizeof v);
  return __builtin_convertvector(v, vec);
#endif
}

FGO_INLINE void store(double *p, vec v) { __builtin_memcpy(p, &v, sizeof v); }

FGO_INLINE void store(float *p, vec v) {
#if FGO_SET == 2
  _mm256_storeu_ps(p, _mm512_cvtpd_ps((__m512d)v));
#elif FGO_SET == 1
  _mm_storeu_ps(p, _mm256_cvtpd_ps((__m256d)v));
#else
  const narrow converted = __builtin_convertvector(v, narrow);
  __builtin_memcpy(p, &converted, sizeof converted);
#endif
}

// Adds R rows to sums, and prefetches the rows below: the hardware prefetcher does not follow rows of a few cache lines.
template <int R> FGO_INLINE void add_rows(const float *row, int64_t stride, int64_t width, double *sums) {
  int64_t j = 0;
  for (; j + in_part <= width; j += in_part) {
    if (j % lanes == 0)
      for (int r = R; r < 2 * R; ++r) __builtin_prefetch(row + r * stride + j);
    vec sum = load(sums + j);
    for (int r = 0; r < R; ++r) sum += load(row + r * stride + j);
    store(sums + j, sum);
  }
  for (; j < width; ++j)
    for (int r = 0; r < R; ++r) sums[j] += row[r * stride + j];
}

// g <- m + (g - m) / lam in `width` adjacent columns; `mean` is memory.
FGO_TARGET static void damp(float *g, int64_t length, int64_t stride, int64_t width, double *mean, double lam) {
  constexpr int at_once = 8;
  const double share = 1 / lam;
  for (int64_t j = 0; j < width; ++j) mean[j] = 0;
  int64_t i = 0;
  for (; i + at_once <= length; i += at_once) add_rows<at_once>(g + i * stride, stride, width, mean);
  for (; i < length; ++i) add_rows<1>(g + i * stride, stride, width, mean);
  for (int64_t j = 0; j < width; ++j) mean[j] *= (1 - share) / double(length);
  while (i-- > 0) {  // from the last row back, which is still in the cache
    float *const row = g + i * stride;
    int64_t j = 0;
    for (; j + in_part <= width; j += in_part) {
      if (j % lanes == 0) __builtin_prefetch(row - 2 * stride + j, 1);
      store(row + j, load(mean + j) + share * load(row + j));
    }
    for (; j < width; ++j) row[j] = float(mean[j] + share * row[j]);
  }
}

// g <- (I + lam D'D)^(-1) g. On a ring the matrix is c (1 - r S)(1 - r S') with the shift S by one, so the solution is a
// sum with decay r forwards, and another one backwards. Free ends are equivalent to a ring of twice the length that holds the
// numbers and their mirror image. `powers` are those of r, and `v` is memory for the first sum.
template <bool PERIODIC>
FGO_TARGET void smooth(float *g, int64_t length, int64_t stride, const vec *mean, double *v, const recursion &k, const double *powers) {
  vec y[parts] = {}, x[parts], sum[parts] = {}, past[parts];
  for (int64_t i = 0; i < length; ++i, g += stride, v += lanes)
    FGO_PARTS {
      const vec d = load(g + part * in_part) - mean[part];
      y[part] = k.decay * y[part] + d;
      sum[part] += powers[i] * (PERIODIC ? y[part] : d);
      store(v + part * in_part, y[part]);
    }
  FGO_PARTS {
    past[part] = (PERIODIC ? y[part] : sum[part] + powers[length] * y[part]) / k.gap;  // the sum before the first number
    x[part] = PERIODIC ? (sum[part] + past[part] * k.overlap) / k.gap : (y[part] + powers[length] * past[part]) / k.forgotten;
  }
  for (int64_t i = length - 1; i >= 0; --i) {
    g -= stride, v -= lanes;
    FGO_PARTS {
      x[part] = k.decay * x[part] + (load(v + part * in_part) + powers[i + 1] * past[part]);
      store(g + part * in_part, mean[part] + k.scale * x[part]);
    }
  }
}

// g <- m + pinv(D'D) (g - m) / lam: sums forwards and backwards, each with a start that makes the mean of the result zero.
FGO_TARGET static void smooth_deviations(float *g, int64_t length, int64_t stride, const vec *mean, double *v, bool periodic, double lam) {
  vec y[parts] = {}, x[parts], sum[parts] = {}, moment[parts] = {}, level[parts];
  const double share = 1 / lam;
  for (int64_t i = 0; i < length; ++i, g += stride, v += lanes)
    FGO_PARTS {
      y[part] += load(g + part * in_part) - mean[part];
      sum[part] += y[part];
      moment[part] += double(i + 1) * y[part];
      store(v + part * in_part, y[part]);
    }
  FGO_PARTS {
    level[part] = periodic ? sum[part] / double(length) : vec{};
    x[part] = level[part] * (0.5 * (length + 1)) - moment[part] / double(length);
  }
  for (int64_t i = length - 1; i >= 0; --i) {
    g -= stride, v -= lanes;
    FGO_PARTS {
      x[part] += load(v + part * in_part) - level[part];
      store(g + part * in_part, mean[part] + share * x[part]);
    }
  }
}

// Overwrites a block of columns whose rows have the stride `stride`.
FGO_TARGET static void direct_block(const fgo_channel &t, float *g, int64_t stride, double *v, const recursion &k, const double *powers) {
  if (t.metric == h0) return damp(g, t.length, stride, lanes, v, t.lam);
  vec mean[parts] = {};
  for (int64_t i = 0; i < t.length; ++i) {
    FGO_PARTS mean[part] += load(g + i * stride + part * in_part);
    __builtin_prefetch(g + i * stride + lanes, 1);  // of the next block
  }
  FGO_PARTS mean[part] /= double(t.length);
  if (t.metric == h1t)
    smooth_deviations(g, t.length, stride, mean, v, t.periodic, t.lam);
  else if (t.periodic)
    smooth<true>(g, t.length, stride, mean, v, k, powers);
  else
    smooth<false>(g, t.length, stride, mean, v, k, powers);
}

// Overwrites some blocks of columns. Blocks whose columns are not adjacent in memory are copied to `copy` and back.
FGO_TARGET static void direct(const fgo_channel &t, int64_t begin, int64_t end, float *copy, double *v, const recursion &k, const double *powers) {
  const int64_t n = t.length, inner = t.inner;
  float *const g = t.gradient;
  if (t.metric == h0 && inner >= lanes) {  // its means need no copy of the columns, so it takes many at once
    const int64_t last = end * lanes < t.columns ? end * lanes : t.columns;
    for (int64_t column = begin * lanes, width; column < last; column += width) {
      width = std::min({wide, last - column, inner - column % inner});
      damp(g + column / inner * (n * inner) + column % inner, n, inner, width, v, t.lam);
    }
    return;
  }
  for (int64_t block = begin; block < end; ++block) {
    const int64_t first = block * lanes, count = t.columns - first < lanes ? t.columns - first : lanes;
    int64_t place[lanes];
    for (int j = 0; j < count; ++j) place[j] = (first + j) / inner * (n * inner) + (first + j) % inner;
    if (count == lanes && place[lanes - 1] - place[0] == lanes - 1) {
      direct_block(t, g + place[0], inner, v, k, powers);
      continue;
    }
    for (int64_t i = 0; i < n; ++i)
      for (int j = 0; j < lanes; ++j) copy[i * lanes + j] = j < count ? g[i * inner + place[j]] : 0.0f;
    direct_block(t, copy, lanes, v, k, powers);
    for (int64_t i = 0; i < n; ++i)
      for (int j = 0; j < count; ++j) g[i * inner + place[j]] = copy[i * lanes + j];
  }
}

#undef FGO_INLINE
#undef FGO_PARTS

}  // namespace FGO_NAMESPACE
}  // namespace
