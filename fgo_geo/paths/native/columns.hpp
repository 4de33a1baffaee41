// Some columns of a row, copied out of it and back, compiled once per instruction set (each_set.hpp). One by one: compress and
// expand instructions of AVX-512 with masked stores made the step of ResNet-50 about a fifth slower.

namespace {
namespace FGO_NAMESPACE {

// to = factor x + by to for `count` columns of a row x; with `by` zero, `to` may be uninitialised.
FGO_TARGET __attribute__((always_inline)) static inline void gather_row(const float *row, const int32_t *columns, int64_t count,
                                                                        float factor, float by, float *to) {
  if (by == 0)
    for (int64_t j = 0; j < count; ++j) to[j] = factor * row[columns[j]];
  else
    for (int64_t j = 0; j < count; ++j) to[j] = by * to[j] + factor * row[columns[j]];
}

// Writes `count` columns of a row.
FGO_TARGET __attribute__((always_inline)) static inline void scatter_row(const float *from, const int32_t *columns, int64_t count,
                                                                         float *row) {
  for (int64_t j = 0; j < count; ++j) row[columns[j]] = from[j];
}

}  // namespace FGO_NAMESPACE
}  // namespace
