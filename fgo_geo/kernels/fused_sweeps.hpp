// The sweeps of fused.cpp, compiled once per instruction set: FGO_NAMESPACE holds them, FGO_TARGET is its attribute.

namespace {
namespace FGO_NAMESPACE {

#define FGO_INLINE FGO_TARGET __attribute__((always_inline)) static inline

template <class T> using vec = typename vector_of<T>::type;
template <class T> using mask = typename vector_of<T>::mask;
template <class T> constexpr int lanes = 32 / sizeof(T);

template <class T> FGO_INLINE vec<T> root(vec<T> v) {
  vec<T> r;
  for (int l = 0; l < lanes<T>; ++l) r[l] = std::sqrt(v[l]);
  return r;
}

template <class T> FGO_INLINE bool any(mask<T> m) {
  typedef long long words __attribute__((vector_size(32)));
  const words w = (words)m;
#ifdef FGO_ANY
  return FGO_ANY(w);
#else
  return (w[0] | w[1] | w[2] | w[3]) != 0;
#endif
}

template <class T> FGO_INLINE vec<T> load(const T *p) {
  vec<T> v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

// values[index[l]] for every lane, index in 0..3.
template <class T> FGO_INLINE vec<T> look_up(const vec<T> &values, const mask<T> &index) {
#ifdef FGO_LOOK_UP
  if constexpr (sizeof(T) == 4) return FGO_LOOK_UP(values, index);
#endif
  vec<T> v;
  for (int l = 0; l < lanes<T>; ++l) v[l] = values[index[l]];
  return v;
}

template <class T> FGO_INLINE void store(T *p, vec<T> v) { __builtin_memcpy(p, &v, sizeof v); }

// 8 x 8 transposition of single precision: v[l][e] becomes v[e][l].
FGO_INLINE void transpose(vec<float> *v) {
#ifdef __clang__
#define FGO_SHUFFLE(x, y, ...) __builtin_shufflevector(x, y, __VA_ARGS__)
#else
  typedef int32_t index __attribute__((vector_size(32)));
#define FGO_SHUFFLE(x, y, ...) __builtin_shuffle(x, y, (index){__VA_ARGS__})
#endif
  vec<float> p[8], q[8];
  for (int k = 0; k < 8; k += 2) {
    p[k] = FGO_SHUFFLE(v[k], v[k + 1], 0, 8, 1, 9, 4, 12, 5, 13);
    p[k + 1] = FGO_SHUFFLE(v[k], v[k + 1], 2, 10, 3, 11, 6, 14, 7, 15);
  }
  for (int k = 0; k < 8; k += 4)
    for (int m = 0; m < 2; ++m) {
      q[k + 2 * m] = FGO_SHUFFLE(p[k + m], p[k + m + 2], 0, 1, 8, 9, 4, 5, 12, 13);
      q[k + 2 * m + 1] = FGO_SHUFFLE(p[k + m], p[k + m + 2], 2, 3, 10, 11, 6, 7, 14, 15);
    }
  for (int k = 0; k < 4; ++k) {
    v[k] = FGO_SHUFFLE(q[k], q[k + 4], 0, 1, 2, 3, 8, 9, 10, 11);
    v[k + 4] = FGO_SHUFFLE(q[k], q[k + 4], 4, 5, 6, 7, 12, 13, 14, 15);
  }
#undef FGO_SHUFFLE
}

// -- memory ------------------------------------------------------------------------------------------------------

// Where the kernels of a vector lie; a lane beyond the last one repeats the first.
struct place {
  int64_t start, kernel_stride;
  int count;
  bool dense;  // kernels lie one behind the other, their entries in order
};

template <class T, int K>
FGO_INLINE void read(const T *base, const place &at, const int32_t *offset, int size, vec<T> *v) {
  constexpr int L = lanes<T>;
  const int n = K ? K : size;
  const T *p = base + at.start;
  if (at.count == L && at.kernel_stride == 1) {
    for (int e = 0; e < n; ++e) v[e] = load<T>(p + offset[e]);
    return;
  }
  if constexpr (sizeof(T) == 4 && K >= 8) {
    if (at.count == L && at.dense) {
      for (int e = 0; e + 8 <= K; e += 8) {
        for (int l = 0; l < 8; ++l) v[e + l] = load<float>(p + l * K + e);
        transpose(v + e);
      }
      for (int e = K / 8 * 8; e < K; ++e)
        v[e] = (vec<float>){p[e], p[K + e], p[2 * K + e], p[3 * K + e], p[4 * K + e], p[5 * K + e], p[6 * K + e],
                            p[7 * K + e]};
      return;
    }
  }
  for (int e = 0; e < n; ++e)
    for (int l = 0; l < L; ++l) v[e][l] = p[(l < at.count ? l : 0) * at.kernel_stride + offset[e]];
}

template <class T, int K>
FGO_INLINE void write(T *base, const place &at, const int32_t *offset, int size, const vec<T> *values) {
  constexpr int L = lanes<T>;
  const int n = K ? K : size;
  T *p = base + at.start;
  if (at.count == L && at.kernel_stride == 1) {
    for (int e = 0; e < n; ++e) store<T>(p + offset[e], values[e]);
    return;
  }
  if constexpr (sizeof(T) == 4 && K >= 8) {
    if (at.count == L && at.dense) {
      for (int e = 0; e + 8 <= K; e += 8) {
        vec<float> v[8];
        for (int l = 0; l < 8; ++l) v[l] = values[e + l];
        transpose(v);
        for (int l = 0; l < 8; ++l) store<float>(p + l * K + e, v[l]);
      }
      for (int e = K / 8 * 8; e < K; ++e)
        for (int l = 0; l < 8; ++l) p[l * K + e] = values[e][l];
      return;
    }
  }
  for (int e = 0; e < n; ++e)
    for (int l = 0; l < at.count; ++l) p[l * at.kernel_stride + offset[e]] = values[e][l];
}

// Asks for the memory of the same columns one row on. Nine or more streams, each a few cache lines long, are beyond what
// the processor foresees by itself; all of them together are one stream, which is what is asked for here.
template <class T> FGO_INLINE void prefetch(const void *base, int64_t start, int64_t entries) {
  const char *p = reinterpret_cast<const char *>(static_cast<const T *>(base) + start);
  for (int64_t byte = 0; byte < entries * int64_t(sizeof(T)); byte += 64) __builtin_prefetch(p + byte, 0, 3);
}

// -- formulas ----------------------------------------------------------------------------------------------------

// What the lanes of a vector are.
template <class T> struct lane_facts {
  mask<T> kind;
  vec<T> inverse_square;                      // of the radius
  bool any_stiefel, any_constraint;
};

template <class T, bool RADII>
FGO_INLINE lane_facts<T> learn(const vec<T> &table, const int32_t *codes, const T *radii, int count) {
  constexpr int L = lanes<T>;
  lane_facts<T> f;
  if (L == 8 && count == L) {
    __builtin_memcpy(&f.kind, codes, sizeof f.kind);
    f.kind &= 3;
  } else {
    for (int l = 0; l < L; ++l) f.kind[l] = codes[l < count ? l : 0] & 3;
  }
  if constexpr (RADII) {
    for (int l = 0; l < L; ++l) f.inverse_square[l] = 1 / (radii[l < count ? l : 0] * radii[l < count ? l : 0]);
  } else {
    f.inverse_square = look_up<T>(table, f.kind);
  }
  f.any_stiefel = any<T>(f.kind > 2);
  f.any_constraint = any<T>(f.kind);
  return f;
}

// Tangent projection, h <- h - w S with S = 0, tr(M) I, diag(M) or sym(M) for M = wᵀh / r².
template <class T, int A, int B>
FGO_INLINE void project(const vec<T> *w, vec<T> *h, const lane_facts<T> &f, int a_, int b_) {
  const int a = A ? A : a_, b = B ? B : b_;
  const vec<T> none = {};
  vec<T> s[B ? B * B : max_b * max_b], trace = {};
  for (int j = 0; j < b; ++j) {
    vec<T> sum = w[j] * h[j];
    for (int i = 1; i < a; ++i) sum += w[i * b + j] * h[i * b + j];
    s[j * b + j] = sum;
    trace += sum;
  }
  for (int j = 0; j < b; ++j) {  // masked: a huge Euclidean component must not become 0 * infinity
    const vec<T> own = s[j * b + j];
    s[j * b + j] = f.kind == 0 ? none : f.kind == 1 ? f.inverse_square * trace : f.inverse_square * own;
  }
  if (!f.any_stiefel) {
    for (int i = 0; i < a; ++i)
      for (int j = 0; j < b; ++j) h[i * b + j] -= w[i * b + j] * s[j * b + j];
    return;
  }
  for (int j = 0; j < b; ++j)
    for (int k = j + 1; k < b; ++k) {
      vec<T> sum = w[j] * h[k] + w[k] * h[j];
      for (int i = 1; i < a; ++i) sum += w[i * b + j] * h[i * b + k] + w[i * b + k] * h[i * b + j];
      s[j * b + k] = s[k * b + j] = f.kind > 2 ? sum * (T(0.5) * f.inverse_square) : none;
    }
  for (int i = 0; i < a; ++i)
    for (int k = 0; k < b; ++k)
      for (int j = 0; j < b; ++j) h[i * b + k] -= w[i * b + j] * s[j * b + k];
}

// out <- x y for symmetric factors that commute, so that the product is symmetric too.
template <class T, int B> FGO_INLINE void commuting_product(const vec<T> *x, const vec<T> *y, vec<T> *out, int b_) {
  const int b = B ? B : b_;
  for (int j = 0; j < b; ++j)
    for (int k = j; k < b; ++k) {
      vec<T> sum = x[j * b] * y[k];
      for (int m = 1; m < b; ++m) sum += x[j * b + m] * y[m * b + k];
      out[j * b + k] = out[k * b + j] = sum;
    }
}

// What (I + E)^(-1/2) has to undo: E = 0, (‖y‖² / r² - 1) I, diag(yᵀy / r² - I) or yᵀy / r² - I. Returns ‖E‖².
template <class T, int A, int B>
FGO_INLINE vec<T> excess(const vec<T> *y, vec<T> *e, const lane_facts<T> &f, int a_, int b_) {
  const int a = A ? A : a_, b = B ? B : b_;
  const vec<T> none = {};
  vec<T> trace = {}, norm = {};
  for (int j = 0; j < b; ++j) {
    vec<T> sum = y[j] * y[j];
    for (int i = 1; i < a; ++i) sum += y[i * b + j] * y[i * b + j];
    e[j * b + j] = sum;
    trace += sum;
  }
  for (int j = 0; j < b; ++j) {
    const vec<T> own = f.kind == 1 ? trace : e[j * b + j];
    e[j * b + j] = f.kind == 0 ? none : own * f.inverse_square - 1;
    norm += e[j * b + j] * e[j * b + j];
  }
  if (!f.any_stiefel) return norm;
  for (int j = 0; j < b; ++j)
    for (int k = j + 1; k < b; ++k) {
      vec<T> sum = y[j] * y[k];
      for (int i = 1; i < a; ++i) sum += y[i * b + j] * y[i * b + k];
      e[j * b + k] = e[k * b + j] = f.kind > 2 ? sum * f.inverse_square : none;
      norm += 2 * e[j * b + k] * e[j * b + k];
    }
  return norm;
}

// y <- y Z for symmetric Z.
template <class T, int A, int B>
FGO_INLINE void multiply(vec<T> *y, const vec<T> *z, bool diagonal, int a_, int b_) {
  const int a = A ? A : a_, b = B ? B : b_;
  if (diagonal) {
    for (int i = 0; i < a; ++i)
      for (int j = 0; j < b; ++j) y[i * b + j] *= z[j * b + j];
    return;
  }
  for (int i = 0; i < a; ++i) {
    vec<T> row[B ? B : max_b];
    for (int k = 0; k < b; ++k) {
      row[k] = y[i * b] * z[k];
      for (int j = 1; j < b; ++j) row[k] += y[i * b + j] * z[j * b + k];
    }
    for (int k = 0; k < b; ++k) y[i * b + k] = row[k];
  }
}

// z <- (I + e)^(-1/2) for small e: I - e/2 + 3e²/8 and, if there are two more terms, - 5e³/16 + 35e⁴/128.
template <class T, int B> FGO_INLINE void series(const vec<T> *e, vec<T> *z, bool two_more, bool diagonal, int b_) {
  const int b = B ? B : b_;
  constexpr int size = B ? B * B : max_b * max_b;
  if (diagonal) {
    for (int j = 0; j < b; ++j) {
      const vec<T> x = e[j * b + j];
      z[j * b + j] = 1 + x * (T(-0.5) + x * (T(0.375) + x * (T(-0.3125) + x * T(0.2734375))));
    }
    return;
  }
  vec<T> square[size];
  commuting_product<T, B>(e, e, square, b_);
  if (two_more) {
    vec<T> tail[size], product[size];
    for (int j = 0; j < b; ++j)
      for (int k = j; k < b; ++k) {
        const vec<T> sum = T(-0.3125) * e[j * b + k] + T(0.2734375) * square[j * b + k];
        tail[j * b + k] = tail[k * b + j] = j == k ? sum + T(0.375) : sum;
      }
    commuting_product<T, B>(square, tail, product, b_);
    for (int k = 0; k < b * b; ++k) square[k] = product[k] * T(1 / 0.375);
  }
  for (int j = 0; j < b; ++j)
    for (int k = j; k < b; ++k) {
      const vec<T> sum = T(0.375) * square[j * b + k] - T(0.5) * e[j * b + k];
      z[j * b + k] = z[k * b + j] = j == k ? sum + 1 : sum;
    }
}

// z <- (I + e)^(-1/2) for eigenvalues of e in [0, length]: the series about the middle of the interval, then Newton's
// method for the inverse root, z (3 I - z² (I + e)) / 2, which squares the error.
template <class T, int B>
FGO_INLINE void centred_series(vec<T> *e, const vec<T> &length, vec<T> *z, int b_) {
  const int b = B ? B : b_;
  constexpr int size = B ? B * B : max_b * max_b;
  const vec<T> middle = 1 + T(0.5) * length, inverse = 1 / middle, scale = root<T>(inverse);
  vec<T> about[size], product[size];
  for (int j = 0; j < b; ++j) {
    about[j * b + j] = (e[j * b + j] - T(0.5) * length) * inverse;
    e[j * b + j] += 1;
    for (int k = j + 1; k < b; ++k) about[j * b + k] = about[k * b + j] = e[j * b + k] * inverse;
  }
  series<T, B>(about, z, true, false, b_);
  for (int round = 0; round < (sizeof(T) == 4 ? 1 : 2); ++round) {
    if (round == 0)
      for (int k = 0; k < b * b; ++k) z[k] *= scale;
    commuting_product<T, B>(z, z, about, b_);
    commuting_product<T, B>(about, e, product, b_);
    for (int j = 0; j < b; ++j)
      for (int k = 0; k < b; ++k)
        about[j * b + k] = j == k ? T(1.5) - T(0.5) * product[j * b + k] : T(-0.5) * product[j * b + k];
    commuting_product<T, B>(z, about, product, b_);
    for (int k = 0; k < b * b; ++k) z[k] = product[k];
  }
}

// z <- (I + e)^(-1/2) for eigenvalues of e in [0, length], by the scaled Newton-Schulz iteration of
// fgo_geo.linalg.polar_newton_schulz; overwrites e.
template <class T, int B> FGO_TARGET __attribute__((noinline)) void newton_schulz(vec<T> *e, const vec<T> &length, vec<T> *z, int b_) {
  const int b = B ? B : b_;
  constexpr int size = B ? B * B : max_b * max_b;
  vec<T> step[size], product[size];
  const vec<T> top = T(safety) * (1 + length), inverse = 1 / top, first_low = root<T>(inverse);
  vec<T> low = first_low;
  for (int j = 0; j < b; ++j)
    for (int k = 0; k < b; ++k) e[j * b + k] = j == k ? (e[j * b + k] + 1) * inverse : e[j * b + k] * inverse;
  for (int round = 0;; ++round) {
    const vec<T> rho2 = 3 / (1 + low + low * low), rho = root<T>(rho2);
    low = rho * low * (3 - rho2 * low * low) * T(0.5);
    const vec<T> diagonal = T(1.5) * rho, factor = T(-0.5) * rho * rho2;
    for (int j = 0; j < b; ++j)
      for (int k = 0; k < b; ++k) step[j * b + k] = j == k ? diagonal + factor * e[j * b + k] : factor * e[j * b + k];
    if (round == 0) {
      for (int k = 0; k < b * b; ++k) z[k] = step[k];
    } else {
      commuting_product<T, B>(z, step, product, b_);
      for (int k = 0; k < b * b; ++k) z[k] = product[k];
    }
    if (round == most_rounds || !any<T>(1 - low > precision<T>)) break;
    commuting_product<T, B>(step, e, product, b_);
    commuting_product<T, B>(product, step, e, b_);
  }
  for (int k = 0; k < b * b; ++k) z[k] *= first_low;
}

// The same for a longer step, in single precision for one of up to ten radii: beyond, yᵀy would lose what is to be found.
template <class T, int A, int B>
FGO_TARGET __attribute__((noinline)) void retract_far(vec<T> *y, vec<T> *e, vec<T> *z, const vec<T> &length,
                                                      const lane_facts<T> &f, int a_, int b_) {
  const int a = A ? A : a_, b = B ? B : b_;
  if constexpr (sizeof(T) == 4) {
    if (any<T>(length > T(100))) {
      constexpr int size = A ? A * B : max_a * max_b;
      for (int half = 0; half < 8; half += 4) {
        lane_facts<double> facts;
        vec<double> long_y[size], long_e[B ? B * B : max_b * max_b], long_z[B ? B * B : max_b * max_b], long_length;
        for (int l = 0; l < 4; ++l) {
          facts.kind[l] = f.kind[half + l];
          facts.inverse_square[l] = f.inverse_square[half + l];
          long_length[l] = length[half + l];
        }
        facts.any_stiefel = f.any_stiefel;
        facts.any_constraint = f.any_constraint;
        for (int k = 0; k < a * b; ++k)
          for (int l = 0; l < 4; ++l) long_y[k][l] = y[k][half + l];
        excess<double, A, B>(long_y, long_e, facts, a, b);
        retract_far<double, A, B>(long_y, long_e, long_z, long_length, facts, a, b);
        for (int k = 0; k < a * b; ++k)
          for (int l = 0; l < 4; ++l) y[k][half + l] = T(long_y[k][l]);
      }
      return;
    }
  }
  newton_schulz<T, B>(e, length, z, b_);
  multiply<T, A, B>(y, z, false, a_, b_);
  excess<T, A, B>(y, e, f, a_, b_);  // what rounding has left
  series<T, B>(e, z, false, false, b_);
  multiply<T, A, B>(y, z, false, a_, b_);
}

// Metric projection onto the manifold, y <- y (I + E)^(-1/2); `length` is ‖u‖² / r² of the step u that led to y.
template <class T, int A, int B>
FGO_INLINE void retract(vec<T> *y, const vec<T> &length, const lane_facts<T> &f, int a_, int b_) {
  if (!f.any_constraint) return;
  constexpr int size = B ? B * B : max_b * max_b;
  const int b = B ? B : b_;
  vec<T> e[size], z[size];
  const vec<T> distance = excess<T, A, B>(y, e, f, a_, b_);
  const bool diagonal = !f.any_stiefel;
  const bool two_more = any<T>(~(distance <= series_limit<T>[0]));
  if (!two_more || !any<T>(~(distance <= series_limit<T>[1]))) {
    series<T, B>(e, z, two_more, diagonal, b_);
    multiply<T, A, B>(y, z, diagonal, a_, b_);
    return;
  }
  // Spheres first, and exactly: this holds however far the component was off its manifold.
  const vec<T> none = {}, one = none + T(1);
  const mask<T> spherical = (f.kind == 1) | (f.kind == 2);
  for (int j = 0; j < b; ++j) {
    const vec<T> stretch = spherical ? 1 / root<T>(1 + e[j * b + j]) : one;
    for (int i = 0; i < (A ? A : a_); ++i) y[i * b + j] *= stretch;
    e[j * b + j] = spherical ? none : e[j * b + j];
  }
  if (diagonal) return;
  // ‖E‖ beyond what the step explains: a point that was not on its manifold.
  const mask<T> stiefel = f.kind > 2;
  const vec<T> explained = length + T(4e-3), measured = root<T>(distance);
  const mask<T> astray = ~(distance <= T(b) * explained * explained);
  const vec<T> bound = stiefel ? (astray ? measured : length) : none;
  if (!any<T>((astray | ~(bound <= centred_limit<T>)) & stiefel)) {
    centred_series<T, B>(e, bound, z, b_);
    multiply<T, A, B>(y, z, false, a_, b_);
    return;
  }
  retract_far<T, A, B>(y, e, z, bound, f, a_, b_);
}

// -- sweeps ------------------------------------------------------------------------------------------------------

// Adds the lanes to the sums of their groups.
template <class T> FGO_INLINE void add_up(double *sums, const int32_t *codes, const vec<T> &values, int count) {
  for (int l = 0; l < count; ++l) sums[(codes[l] >> 2) * 2 + (l & 1)] += values[l];
}

template <class T, int A, int B, bool UPDATE, bool RADII>
FGO_TARGET void sweep_chunks(const fgo_task *task, const fgo_options *o, double *sums, int64_t begin, int64_t end) {
  constexpr int L = lanes<T>, K = A * B, size = K ? K : max_a * max_b;
  const fgo_task &t = *task;
  const int a = A ? A : t.a, b = B ? B : t.b, n = a * b;
  int32_t offset[size];
  for (int i = 0; i < a; ++i)
    for (int j = 0; j < b; ++j) offset[i * b + j] = i * t.i_stride + j * t.j_stride;
  const bool dense = t.column_stride == n && t.i_stride == b && t.j_stride == 1;
  T *weight = static_cast<T *>(t.weight), *buffer = static_cast<T *>(t.buffer);
  const T *grad = static_cast<const T *>(t.grad);
  const T *radii = static_cast<const T *>(t.radii), *scales = static_cast<const T *>(t.scales);
  const int64_t per_row = (t.columns + chunk - 1) / chunk;
  const vec<T> none = {};
  const bool old = buffer && !t.first, invariant = o->radius_invariant;
  const T sign = o->maximize ? T(-1) : T(1), decay = T(o->weight_decay), lr = T(o->lr), momentum = T(o->momentum);
  const T take = sign * (old ? T(1 - o->dampening) : T(1));
  vec<T> table = {};
  for (int k = 0; k < 4; ++k) table[k] = T(1 / (t.radius[k] * t.radius[k]));

  for (int64_t number = begin; number < end; ++number) {
    const int64_t row = number / per_row, first = number % per_row * chunk;
    const int64_t last = first + chunk < t.columns ? first + chunk : t.columns;
    vec<T> row_scales = {}, row_sums[4] = {};
    const int32_t *row_groups = t.row_groups ? t.row_groups + 4 * row : nullptr;
    if (UPDATE && row_groups)
      for (int k = 0; k < 4; ++k) row_scales[k] = row_groups[k] < 0 ? T(0) : scales[row_groups[k]];
    const bool foresee = t.column_stride == 1 && row + 1 < t.rows;
    for (int64_t column = first; column < last; column += L) {
      const int count = last - column < L ? int(last - column) : L;
      const int64_t kernel = row * t.columns + column;
      const int32_t *codes = t.codes + kernel;
      if (foresee) {
        const int64_t next = (row + 1) * t.row_stride + column * n;
        prefetch<T>(weight, next, count * n);
        prefetch<T>(grad, next, count * n);
        if (UPDATE && old) prefetch<T>(buffer, next, count * n);
      }
      const place at{row * t.row_stride + column * t.column_stride, t.column_stride, count, dense};
      const lane_facts<T> f = learn<T, RADII>(table, codes, RADII ? radii + kernel : nullptr, count);
      vec<T> w[size], h[size];
      read<T, K>(weight, at, offset, n, w);
      read<T, K>(grad, at, offset, n, h);
      if (decay != 0) {
        const vec<T> shrink = f.kind == 0 ? none + sign * decay : none;
        for (int e = 0; e < n; ++e) h[e] += shrink * w[e];
      }
      if constexpr (!UPDATE) {
        vec<T> sum = {};
        if (f.any_constraint) project<T, A, B>(w, h, f, a, b);
        for (int e = 0; e < n; ++e) sum += h[e] * h[e];
        if (invariant) sum /= f.inverse_square;
        if (!t.row_groups) {
          add_up<T>(sums, codes, sum, count);
          continue;
        }
        if (count < L)
          for (int l = count; l < L; ++l) sum[l] = 0;
        for (int k = 0; k < 4; ++k) row_sums[k] += f.kind == k ? sum : none;
        continue;
      }
      vec<T> rate, step[size], length = {};
      if (t.row_groups)
        rate = look_up<T>(row_scales, f.kind);
      else
        for (int l = 0; l < L; ++l) rate[l] = scales[codes[l < count ? l : 0] >> 2];
      if (t.skips)
        for (int e = 0; e < n; ++e) h[e] = rate == none ? none : h[e];
      if (invariant) rate /= f.inverse_square;
      const vec<T> share = take * rate;
      if (old) {
        read<T, K>(buffer, at, offset, n, step);
        for (int e = 0; e < n; ++e) step[e] = momentum * step[e] + share * h[e];
      } else {
        for (int e = 0; e < n; ++e) step[e] = share * h[e];
      }
      if (f.any_constraint) project<T, A, B>(w, step, f, a, b);  // momentum and gradient at once: it is linear
      if (buffer) write<T, K>(buffer, at, offset, n, step);
      if (buffer && o->nesterov) {
        if (f.any_constraint) project<T, A, B>(w, h, f, a, b);
        for (int e = 0; e < n; ++e) step[e] = sign * rate * h[e] + momentum * step[e];
      }
      for (int e = 0; e < n; ++e) {
        w[e] -= lr * step[e];
        length += step[e] * step[e];
      }
      retract<T, A, B>(w, length * (lr * lr) * f.inverse_square, f, a, b);
      write<T, K>(weight, at, offset, n, w);
    }
    if (!UPDATE && row_groups)
      for (int k = 0; k < 4; ++k)
        for (int l = 0; l < L; ++l)
          if (row_groups[k] >= 0) sums[2 * row_groups[k]] += row_sums[k][l];
  }
}

template <class T, bool UPDATE>
FGO_TARGET void sweep_of(const fgo_task *t, const fgo_options *o, double *sums, int64_t begin, int64_t end) {
#define FGO_SIZE(A, B) \
  if (t->a == A && t->b == B && !t->radii) return sweep_chunks<T, A, B, UPDATE, false>(t, o, sums, begin, end);
  FGO_SIZE(3, 3)
  FGO_SIZE(5, 5)
#undef FGO_SIZE
  if (t->radii) return sweep_chunks<T, 0, 0, UPDATE, true>(t, o, sums, begin, end);
  sweep_chunks<T, 0, 0, UPDATE, false>(t, o, sums, begin, end);
}

#undef FGO_INLINE

}  // namespace FGO_NAMESPACE
}  // namespace
