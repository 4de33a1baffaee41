// Some columns of a row, copied out of it and back, compiled once per instruction set (each_set.hpp). One by one: compress and
// expand instructions of AVX-512 with masked stores made the step of ResNet-50 about a fifth slower.

namespace {
namespace FGO_NAMESPACE {

struct chosen_columns {
  const int32_t *columns;
  int64_t count;

  chosen_columns(const int32_t *own, int64_t n) : columns(own), count(n) {}
};

// to = factor x + by to for the chosen columns of a row x; with `by` zero, `to` may be uninitialised.
FGO_TARGET __attribute__((always_inline)) static inline void gather_row(const float *row, const chosen_columns &of, float factor,
                                                                        float by, float *to) {
  if (by == 0)
    for (int64_t j = 0; j < of.count; ++j) to[j] = factor * row[of.columns[j]];
  else
    for (int64_t j = 0; j < of.count; ++j) to[j] = by * to[j] + factor * row[of.columns[j]];
}

// Writes the chosen columns of a row.
FGO_TARGET __attribute__((always_inline)) static inline void scatter_row(const float *from, const chosen_columns &of, float *row) {
  for (int64_t j = 0; j < of.count; ++j) row[of.columns[j]] = from[j];
}

}  // namespace FGO_NAMESPACE
}  // namespace
