// The sweeps of fused.cpp, compiled once per instruction set (each_set.hpp). FGO_FAST is whether a set has specialised loops
// for common sizes and layouts. Every such loop takes seconds to compile, so there are few: 3x3 and 5x5 kernels in the two
// layouts of a convolution's weight. Other sizes, layouts and per-kernel radii share one loop. Incomplete vectors at the end of
// a row are copied.

#include "kernel_formulas.hpp"

namespace {
namespace FGO_NAMESPACE {

#define FGO_INLINE FGO_TARGET __attribute__((always_inline)) static inline

// A weight and the options, as the sweeps use them.
template <class T> struct setting {
  int a, b, n;
  const int64_t *offset;  // of a component's entries
  int64_t rows, columns, row_stride, column_stride;
  T *weight, *buffer;
  const T *grad, *history, *radii, *scales;  // history: the momentum, or any readable memory where its factor is zero
  const int32_t *codes, *row_groups;
  bool has_momentum, skips, nesterov, invariant;  // has_momentum: the buffer holds it
  T sign, decay, lr, momentum, momentum_factor, gradient_factor;
  T inverse_squares[4];  // of the radius of every kind
};

template <class T> FGO_TARGET setting<T> setting_of(const fgo_kernels &t, const fgo_options &o, int64_t *offset) {
  setting<T> s;
  s.a = t.a, s.b = t.b, s.n = s.a * s.b, s.offset = offset;
  for (int i = 0; i < s.a; ++i)
    for (int j = 0; j < s.b; ++j) offset[i * s.b + j] = i * int64_t(t.i_stride) + j * int64_t(t.j_stride);
  s.rows = t.rows, s.columns = t.columns, s.row_stride = t.row_stride, s.column_stride = t.column_stride;
  s.weight = static_cast<T *>(t.weight), s.buffer = static_cast<T *>(t.buffer);
  s.grad = static_cast<const T *>(t.grad);
  s.radii = static_cast<const T *>(t.radii), s.scales = static_cast<const T *>(t.scales);
  s.codes = t.codes, s.row_groups = t.row_groups;
  s.has_momentum = t.buffer && !t.first, s.skips = t.skips;
  s.nesterov = t.buffer && o.nesterov, s.invariant = o.radius_invariant;
  s.history = s.has_momentum ? s.buffer : s.weight;
  s.sign = o.maximize ? T(-1) : T(1), s.decay = T(o.weight_decay), s.lr = T(o.lr);
  s.momentum = T(o.momentum), s.momentum_factor = s.has_momentum ? s.momentum : T(0);
  s.gradient_factor = s.sign * (s.has_momentum ? T(1 - o.dampening) : T(1));
  for (int k = 0; k < 4; ++k) s.inverse_squares[k] = T(1 / (t.radius[k] * t.radius[k]));
  return s;
}

// `count` kernels of one row that share a vector; the first is at `start` in memory and at index `kernel` of the tables.
struct kernel_range {
  int64_t kernel, start;
  int count;
};

template <class T> FGO_INLINE kernel_range range_at(const setting<T> &s, int64_t row, int64_t column, int64_t last) {
  const int64_t count = last - column;
  return {row * s.columns + column, row * s.row_stride + column * s.column_stride, count < lanes<T> ? int(count) : lanes<T>};
}

template <class T, layout P> FGO_INLINE lane_facts<T> facts_at(const setting<T> &s, const kernel_range &v) {
  constexpr int L = lanes<T>;
  const int32_t *codes = s.codes + v.kernel;
  lane_facts<T> f;
  if (sizeof(T) == sizeof *codes && v.count == L) {
    __builtin_memcpy(&f.kind, codes, sizeof f.kind);
    f.kind &= 3;
  } else {
    for (int l = 0; l < L; ++l) f.kind[l] = codes[l < v.count ? l : 0] & 3;
  }
  if (P == layout::strided && s.radii) {
    for (int l = 0; l < L; ++l) {
      const T radius = s.radii[v.kernel + (l < v.count ? l : 0)];
      f.inverse_square[l] = 1 / (radius * radius);
    }
  } else {
    f.inverse_square = look_up<T>(s.inverse_squares, f.kind);
  }
  f.any_stiefel = any<T>(f.kind > 2);
  return f;
}

// Weight and gradient (with weight decay) of `count` kernels, the first of which is at `start`.
template <class T, int A, int B, layout P>
FGO_INLINE void read_both(const setting<T> &s, int64_t start, int count, const lane_facts<T> &f, vec<T> *w, vec<T> *h) {
  read<T, A * B, P>(at(s.weight, start), s.offset, s.column_stride, count, s.n, w);
  read<T, A * B, P>(at(s.grad, start), s.offset, s.column_stride, count, s.n, h);
  if (s.decay != 0) {
    const vec<T> none = {}, shrink = f.kind == 0 ? none + s.sign * s.decay : none;
    for (int e = 0; e < (A ? A * B : s.n); ++e) h[e] += shrink * w[e];
  }
}

// Squared norms of the Riemannian gradients of `count` kernels.
template <class T, int A, int B, layout P, bool FULL>
FGO_INLINE vec<T> squares_of(const setting<T> &s, int64_t start, int count, const lane_facts<T> &f) {
  constexpr int entries = A ? A * B : max_a * max_b;
  const int a = A ? A : s.a, b = B ? B : s.b;
  vec<T> w[entries], h[entries], normal[B ? B * B : max_b * max_b] = {}, sum = {};
  read_both<T, A, B, P>(s, start, count, f, w, h);
  for (int i = 0; i < a; ++i) add_products<T, B, FULL>(w + i * b, h + i * b, normal, s.b);
  normal_factor<T, B, FULL>(normal, f, s.b);
  for (int i = 0; i < a; ++i) {
    subtract_normal<T, B, FULL>(w + i * b, normal, h + i * b, s.b);
    vec<T> of_row = {};  // one sum per row, so that additions are independent
    for (int j = i * b; j < i * b + b; ++j) of_row += h[j] * h[j];
    sum += of_row;
  }
  return s.invariant ? sum / f.inverse_square : sum;
}

// Squared norms of their Euclidean gradients (with weight decay), which are bounds on those of the Riemannian ones.
template <class T, int A, int B, layout P>
FGO_INLINE vec<T> bounds_of(const setting<T> &s, int64_t start, int count, const lane_facts<T> &f) {
  constexpr int entries = A ? A * B : max_a * max_b;
  const int a = A ? A : s.a, b = B ? B : s.b;
  vec<T> w[entries], h[entries], sum = {};
  if (s.decay != 0)
    read_both<T, A, B, P>(s, start, count, f, w, h);
  else
    read<T, A * B, P>(at(s.grad, start), s.offset, s.column_stride, count, s.n, h);
  for (int i = 0; i < a; ++i) {
    vec<T> of_row = {};
    for (int j = i * b; j < i * b + b; ++j) of_row += h[j] * h[j];
    sum += of_row;
  }
  return s.invariant ? sum / f.inverse_square : sum;
}

// Nesterov's direction, from the momentum in `u`.
template <class T, int B>
FGO_TARGET __attribute__((noinline)) void nesterov_direction(const setting<T> &s, int64_t start, int count, const lane_facts<T> &f,
                                                     const vec<T> &rate, vec<T> *w, vec<T> *u) {
  vec<T> h[max_a * max_b];
  const vec<T> none = {};
  read_both<T, 0, 0, layout::strided>(s, start, count, f, w, h);
  if (s.skips)
    for (int k = 0; k < s.n; ++k) h[k] = rate == none ? none : h[k];
  project<T, 0, B, true>(w, h, f, s.a, s.b);
  for (int k = 0; k < s.n; ++k) u[k] = s.sign * rate * h[k] + s.momentum * u[k];
}

// The step of `count` kernels. Returns whether some point on a manifold was not finite.
template <class T, int A, int B, layout P, bool FULL>
FGO_INLINE bool step_of(const setting<T> &s, int64_t start, int count, const lane_facts<T> &f, vec<T> rate) {
  constexpr int entries = A ? A * B : max_a * max_b, size = B ? B * B : max_b * max_b;
  const int n = A ? A * B : s.n, a = A ? A : s.a, b = B ? B : s.b;
  const vec<T> none = {};
  vec<T> w[entries], h[entries], u[entries], normal[size] = {}, e[size] = {}, z[size];
  read_both<T, A, B, P>(s, start, count, f, w, h);
  if (s.skips)
    for (int k = 0; k < n; ++k) h[k] = rate == none ? none : h[k];
  if (s.invariant) rate /= f.inverse_square;
  const vec<T> share = s.gradient_factor * rate;
  read<T, A * B, P>(at(s.history, start), s.offset, s.column_stride, count, s.n, u);
  for (int i = 0; i < a; ++i) {  // momentum and gradient are projected together, since projection is linear
    for (int k = i * b; k < i * b + b; ++k) u[k] = s.momentum_factor * u[k] + share * h[k];
    add_products<T, B, FULL>(w + i * b, u + i * b, normal, s.b);
  }
  normal_factor<T, B, FULL>(normal, f, s.b);
  for (int i = 0; i < a; ++i) subtract_normal<T, B, FULL>(w + i * b, normal, u + i * b, s.b);
  if (s.buffer) write<T, A * B, P>(at(s.buffer, start), s.offset, s.column_stride, count, s.n, u);
  if (s.nesterov) {  // on copies, so that the common case keeps its registers
    vec<T> copied_w[entries], copied_u[entries];
    for (int k = 0; k < n; ++k) copied_w[k] = w[k], copied_u[k] = u[k];
    const lane_facts<T> facts = f;
    const vec<T> own_rate = rate;
    nesterov_direction<T, B>(s, start, count, facts, own_rate, copied_w, copied_u);
    for (int k = 0; k < n; ++k) u[k] = copied_u[k];
  }
  for (int i = 0; i < a; ++i) {
    for (int k = i * b; k < i * b + b; ++k) w[k] -= s.lr * u[k];
    add_squares<T, B, FULL>(w + i * b, e, s.b);
  }
  const vec<T> distance = excess<T, B, FULL>(e, f, s.b);
  bool is_bad = false;
  const bool two_more = any<T>(~(distance <= series_limit<T>[0]));
  if (!two_more || !any<T>(~(distance <= series_limit<T>[1]))) {
    series<T, B, FULL>(e, z, two_more, s.b);
    multiply_all<T, A, B, FULL>(w, z, s.a, s.b);
  } else {  // rare, on copies
    vec<T> copied_w[entries];
    for (int k = 0; k < n; ++k) copied_w[k] = w[k];
    const lane_facts<T> facts = f;
    is_bad = any<T>(~(distance <= std::numeric_limits<T>::max()));
    retract_long_step<T, B>(copied_w, facts, a, s.b);
    for (int k = 0; k < n; ++k) w[k] = copied_w[k];
  }
  write<T, A * B, P>(at(s.weight, start), s.offset, s.column_stride, count, s.n, w);
  return is_bad;
}

// Step scales of a vector's kernels, by group.
template <class T> FGO_INLINE vec<T> rates_of(const T *scales, const int32_t *codes, int count) {
  vec<T> rate;
  for (int l = 0; l < lanes<T>; ++l) rate[l] = scales[codes[l < count ? l : 0] >> 2];
  return rate;
}

// The memory to prefetch while a vector is processed.
enum class prefetched { nothing, own_momentum, next_row };

// Planar kernels: the same columns one row further down, since the hardware prefetcher does not follow nine or more streams
// of a few cache lines each. Interleaved kernels: the same stream further on, since the hardware prefetcher stops at the end
// of a page.
template <class T, int K, layout P>
FGO_INLINE void prefetch_vector(const setting<T> &s, int64_t row, int64_t column, bool weight, bool momentum, prefetched what) {
  const int64_t place = column * s.n + row * s.row_stride;
  if constexpr (P == layout::interleaved) {
    if (weight) prefetch<T, K, 1>(s.weight + place + prefetch_distance);
    prefetch<T, K, 1>(s.grad + place + prefetch_distance);
    if (momentum) prefetch<T, K, 1>(s.buffer + place + prefetch_distance);
  } else if constexpr (P == layout::planar) {
    if (what == prefetched::own_momentum && s.has_momentum) prefetch<T, K, 2>(s.buffer + place);
    if (what != prefetched::next_row || row + 1 >= s.rows) return;
    if (weight) prefetch<T, K, 2>(s.weight + place + s.row_stride);
    prefetch<T, K, 2>(s.grad + place + s.row_stride);
    if (momentum) prefetch<T, K, 2>(s.buffer + place + s.row_stride);
  }
}

// The end of a row with fewer kernels than lanes, copied to a planar row of its own: Euclidean zeros follow the last kernel.
template <class T, int K> struct row_end {
  static constexpr int L = lanes<T>;
  setting<T> own;
  vec<T> weight[K], grad[K], buffer[K];
  int64_t offset[K];
  int32_t codes[L];

  FGO_TARGET row_end(const setting<T> &s, const kernel_range &v) : own(s) {
    for (int l = 0; l < L; ++l) codes[l] = l < v.count ? s.codes[v.kernel + l] : 0;
    take(s, v, s.weight, weight), take(s, v, s.grad, grad);
    if (s.has_momentum) take(s, v, s.buffer, buffer);
    for (int e = 0; e < K; ++e) offset[e] = e * L;
    own.offset = offset, own.codes = codes, own.columns = L, own.column_stride = 1;
    own.weight = reinterpret_cast<T *>(weight), own.grad = reinterpret_cast<T *>(grad);
    own.buffer = s.buffer ? reinterpret_cast<T *>(buffer) : nullptr, own.history = s.has_momentum ? own.buffer : own.weight;
  }

  FGO_INLINE void take(const setting<T> &s, const kernel_range &v, const T *p, vec<T> *to) {
    const vec<T> none = {};
    for (int e = 0; e < K; ++e) {
      const T *from = p + v.start + s.offset[e];
      to[e] = s.column_stride == 1 ? load_some<T>(from, v.count) : none;
      for (int l = 0; s.column_stride != 1 && l < v.count; ++l) to[e][l] = from[l * s.column_stride];
    }
  }

  FGO_INLINE void put(const setting<T> &s, const kernel_range &v, const vec<T> *from, T *p) {
    for (int e = 0; e < K; ++e) {
      T *to = p + v.start + s.offset[e];
      if (s.column_stride == 1)
        store_some<T>(to, v.count, from[e]);
      else
        for (int l = 0; l < v.count; ++l) to[l * s.column_stride] = from[e][l];
    }
  }

  FGO_TARGET void put_back(const setting<T> &s, const kernel_range &v) const {
    put(s, v, weight, s.weight);
    if (s.buffer) put(s, v, buffer, s.buffer);
  }
};

// Adds the squared norms of the kernels in a row's columns, or bounds on them, to the sums of their groups, or to `row_sums`
// per kind.
template <class T, int A, int B, layout P, bool BOUNDS>
FGO_TARGET __attribute__((noinline, noclone)) void sum_columns(const setting<T> &s, int64_t row, int64_t first, int64_t last, double *sums,
                                                      double *row_sums, prefetched what) {
  constexpr int L = lanes<T>;
  const vec<T> none = {};
  vec<T> by_kind[4] = {};
  for (int64_t column = first; column < last; column += L) {
    const kernel_range v = range_at(s, row, column, last);
    prefetch_vector<T, A * B, P>(s, row, column, !BOUNDS || s.decay != 0, false, what);
    if constexpr (P != layout::strided)
      if (v.count < L) {
        const row_end<T, A * B> end_of_row(s, v);
        sum_columns<T, A, B, layout::planar, BOUNDS>(end_of_row.own, 0, 0, L, sums, row_sums, prefetched::nothing);
        break;
      }
    const lane_facts<T> f = facts_at<T, P>(s, v);
    vec<T> sum;
    if constexpr (BOUNDS)
      sum = bounds_of<T, A, B, P>(s, v.start, v.count, f);
    else
      sum = f.any_stiefel ? squares_of<T, A, B, P, true>(s, v.start, v.count, f)
                          : squares_of<T, A, B, P, false>(s, v.start, v.count, f);
    if (!row_sums)
      for (int l = 0; l < v.count; ++l) sums[(s.codes[v.kernel + l] >> 2) * 2 + (l & 1)] += sum[l];
    else if (P == layout::strided)
      for (int l = 0; l < v.count; ++l) row_sums[f.kind[l]] += sum[l];
    else
      for (int k = 0; k < 4; ++k) by_kind[k] += f.kind == k ? sum : none;
  }
  if (row_sums)
    for (int k = 0; k < 4; ++k)
      for (int l = 0; l < L; ++l) row_sums[k] += by_kind[k][l];
}

// Takes the step of the kernels in a row's columns, at the scales of their groups or at `row_scales` per kind. Returns whether
// some point on a manifold was not finite.
template <class T, int A, int B, layout P>
FGO_TARGET __attribute__((noinline, noclone)) bool step_columns(const setting<T> &s, int64_t row, int64_t first, int64_t last,
                                                       const T *row_scales, prefetched what) {
  constexpr int L = lanes<T>;
  bool is_bad = false;
  for (int64_t column = first; column < last; column += L) {
    const kernel_range v = range_at(s, row, column, last);
    prefetch_vector<T, A * B, P>(s, row, column, true, s.has_momentum, what);
    if constexpr (P != layout::strided)
      if (v.count < L) {
        const row_end<T, A * B> end_of_row(s, v);
        is_bad |= step_columns<T, A, B, layout::planar>(end_of_row.own, 0, 0, L, row_scales, prefetched::nothing);
        end_of_row.put_back(s, v);
        break;
      }
    const lane_facts<T> f = facts_at<T, P>(s, v);
    const vec<T> rate = row_scales ? look_up<T>(row_scales, f.kind) : rates_of<T>(s.scales, s.codes + v.kernel, v.count);
    is_bad |= f.any_stiefel ? step_of<T, A, B, P, true>(s, v.start, v.count, f, rate)
                            : step_of<T, A, B, P, false>(s, v.start, v.count, f, rate);
  }
  return is_bad;
}

// The unit of work of a thread: a chunk of a row, and the row's groups by kind where row and kind determine the group.
struct row_chunk {
  int64_t row, first, last;
  const int32_t *groups;
};

template <class T> FGO_INLINE row_chunk chunk_of(const setting<T> &s, int64_t row, int64_t first) {
  const int64_t last = first + chunk < s.columns ? first + chunk : s.columns;
  return {row, first, last, s.row_groups ? s.row_groups + 4 * row : nullptr};
}

// The first sweep: adds the squared norms of a range of chunks, or bounds on them, to `sums`, with two numbers per group. The
// last chunks come first, as in run_in_threads().
template <bool BOUNDS> struct sums_sweep {
  template <class T, int A, int B, layout P>
  FGO_TARGET static int64_t run(const fgo_kernels *task, const fgo_options *options, double *sums, int64_t begin, int64_t end) {
    int64_t offset[max_a * max_b];
    const setting<T> s = setting_of<T>(*task, *options, offset);
    const int64_t per_row = chunks_per_row(*task);
    for (int64_t last = end, first; last > begin; last = first) {
      first = last - begin < chunks_at_once ? begin : last - chunks_at_once;
      for (int64_t number = first; number < last; ++number) {
        const row_chunk p = chunk_of(s, number / per_row, number % per_row * chunk);
        double row_sums[4] = {};
        sum_columns<T, A, B, P, BOUNDS>(s, p.row, p.first, p.last, sums, p.groups ? row_sums : nullptr, prefetched::next_row);
        for (int k = 0; p.groups && k < 4; ++k)
          if (p.groups[k] >= 0) sums[2 * p.groups[k]] += row_sums[k];
      }
    }
    return 0;
  }
};

// The second sweep: the step of a range of chunks. Returns the number of chunks with a point that is not finite.
struct update_sweep {
  template <class T, int A, int B, layout P>
  FGO_TARGET static int64_t run(const fgo_kernels *task, const fgo_options *options, double *, int64_t begin, int64_t end) {
    int64_t offset[max_a * max_b];
    const setting<T> s = setting_of<T>(*task, *options, offset);
    const int64_t per_row = chunks_per_row(*task);
    int64_t bad = 0;
    for (int64_t number = begin; number < end; ++number) {
      const row_chunk p = chunk_of(s, number / per_row, number % per_row * chunk);
      T row_scales[4] = {};
      for (int k = 0; p.groups && k < 4; ++k) row_scales[k] = p.groups[k] < 0 ? T(0) : s.scales[p.groups[k]];
      bad += step_columns<T, A, B, P>(s, p.row, p.first, p.last, p.groups ? row_scales : nullptr, prefetched::next_row);
    }
    return bad;
  }
};

// Both sweeps in one, where no group has kernels of two rows: the data of the norms are still in the cache for the step. If the
// norm of a group is not finite, its step has no gradient where the task skips such groups; otherwise its row does not change.
struct rows_sweep {
  template <class T, int A, int B, layout P>
  FGO_TARGET static int64_t run(const fgo_kernels *task, const fgo_options *options, double *, int64_t begin, int64_t end) {
    int64_t offset[max_a * max_b];
    setting<T> s = setting_of<T>(*task, *options, offset), skipping = s;
    s.skips = false;
    for (int64_t row = begin; row < end; ++row) {
      const int32_t *groups = s.row_groups + 4 * row;
      double row_sums[4] = {};
      T row_scales[4] = {};
      bool is_finite = true;
      for (int64_t first = 0; first < s.columns; first += chunk)
        sum_columns<T, A, B, P, false>(s, row, first, chunk_of(s, row, first).last, nullptr, row_sums, prefetched::own_momentum);
      for (int k = 0; k < 4; ++k) {
        if (groups[k] < 0) continue;
        const double curvature = task->curvatures ? task->curvatures[groups[k]] : options->curvature;
        const double tau = options->constant ? 1.0 : step_scale(std::sqrt(row_sums[k]), options->rho, curvature);
        row_scales[k] = std::isfinite(row_sums[k]) ? T(1 / tau) : T(0);
        task->squared_norms[groups[k]] = row_sums[k];
        is_finite = is_finite && std::isfinite(row_sums[k]);
      }
      if (is_finite || skipping.skips)
        step_columns<T, A, B, P>(is_finite ? s : skipping, row, 0, s.columns, row_scales, prefetched::next_row);
    }
    return 0;
  }
};

// Sum of the squares of numbers that follow each other.
template <class T> FGO_TARGET double squares_of_run(const T *p, int64_t count) {
  constexpr int L = lanes<T>, streams = 4;  // independent sums
  vec<T> sums[streams] = {};
  int64_t k = 0;
  for (; k + streams * L <= count; k += streams * L)
    for (int s = 0; s < streams; ++s) {
      const vec<T> v = load<T>(p + k + s * L);
      sums[s] += v * v;
    }
  double total = 0;
  for (; k < count; ++k) total += double(p[k]) * p[k];
  for (const vec<T> &sum : sums)
    for (int l = 0; l < L; ++l) total += sum[l];
  return total;
}

template <class SWEEP, class T, int A, int B>
FGO_TARGET bool run_at_size(const fgo_kernels *t, const fgo_options *o, double *sums, int64_t begin, int64_t end, int64_t *result) {
  const bool is_planar = t->column_stride == 1;
  const bool is_interleaved = t->column_stride == t->a * t->b && t->i_stride == t->b && t->j_stride == 1;
  if (t->a != A || t->b != B || t->radii) return false;
  if (is_planar) return *result = SWEEP::template run<T, A, B, layout::planar>(t, o, sums, begin, end), true;
  if (is_interleaved) return *result = SWEEP::template run<T, A, B, layout::interleaved>(t, o, sums, begin, end), true;
  return false;
}

template <class SWEEP, class T>
FGO_TARGET int64_t run_sweep(const fgo_kernels *t, const fgo_options *o, double *sums, int64_t begin, int64_t end) {
  int64_t result;
  constexpr bool is_rare = sizeof(T) > 4 && std::is_same<SWEEP, sums_sweep<true>>::value;
  if constexpr (FGO_FAST && !is_rare) {
    if (run_at_size<SWEEP, T, 3, 3>(t, o, sums, begin, end, &result)) return result;
    if constexpr (sizeof(T) == 4)
      if (run_at_size<SWEEP, T, 5, 5>(t, o, sums, begin, end, &result)) return result;
  }
  return SWEEP::template run<T, 0, 0, layout::strided>(t, o, sums, begin, end);
}

#undef FGO_INLINE

}  // namespace FGO_NAMESPACE
}  // namespace
