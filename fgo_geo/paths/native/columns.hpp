// Some columns of a row, copied out of it and back, compiled once per instruction set (each_set.hpp). With AVX-512, columns that
// ascend are read and written as vectors of the row, and a mask says which of their numbers belong to them.

namespace {
namespace FGO_NAMESPACE {

struct chosen_columns {
  const int32_t *columns;
  int64_t count;
  std::vector<uint16_t> masks;  // per 16 columns, from those of the first; empty where columns are copied one by one

  chosen_columns(const int32_t *own, int64_t n) : columns(own), count(n) {
#if FGO_SET == 2
    for (int64_t j = 1; j < count; ++j)
      if (columns[j] <= columns[j - 1]) return;
    masks.assign(columns[count - 1] / 16 - start() / 16 + 1, 0);
    for (int64_t j = 0; j < count; ++j) masks[columns[j] / 16 - start() / 16] |= 1 << columns[j] % 16;
#endif
  }
  int64_t start() const { return columns[0] / 16 * 16; }
};

// to = factor x + by to for the chosen columns of a row x; with `by` zero, `to` may be uninitialised.
FGO_TARGET __attribute__((noinline)) static void gather_row(const float *row, const chosen_columns &of, float factor, float by, float *to) {
#if FGO_SET == 2
  const float *from = row + of.start();
  const __m512 factors = _mm512_set1_ps(factor), weights = _mm512_set1_ps(by);
  for (const uint16_t mask : of.masks) {
    const int n = __builtin_popcount(mask);
    const __mmask16 lowest = (1u << n) - 1;
    __m512 own = _mm512_mul_ps(factors, _mm512_maskz_compress_ps(mask, _mm512_maskz_loadu_ps(mask, from)));
    if (by != 0) own = _mm512_fmadd_ps(weights, _mm512_maskz_loadu_ps(lowest, to), own);
    _mm512_mask_storeu_ps(to, lowest, own);
    from += 16, to += n;
  }
  if (!of.masks.empty()) return;
#endif
  if (by == 0)
    for (int64_t j = 0; j < of.count; ++j) to[j] = factor * row[of.columns[j]];
  else
    for (int64_t j = 0; j < of.count; ++j) to[j] = by * to[j] + factor * row[of.columns[j]];
}

// Writes the chosen columns of a row.
FGO_TARGET __attribute__((noinline)) static void scatter_row(const float *from, const chosen_columns &of, float *row) {
#if FGO_SET == 2
  float *to = row + of.start();
  for (const uint16_t mask : of.masks) {
    const int n = __builtin_popcount(mask);
    _mm512_mask_storeu_ps(to, mask, _mm512_maskz_expand_ps(mask, _mm512_maskz_loadu_ps((1u << n) - 1, from)));
    to += 16, from += n;
  }
  if (!of.masks.empty()) return;
#endif
  for (int64_t j = 0; j < of.count; ++j) row[of.columns[j]] = from[j];
}

}  // namespace FGO_NAMESPACE
}  // namespace
