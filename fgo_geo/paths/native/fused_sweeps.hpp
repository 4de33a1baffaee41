// The sweeps of fused.cpp, compiled once per instruction set: FGO_NAMESPACE holds them, FGO_TARGET is its attribute,
// FGO_BYTES the size of its vectors, and FGO_FAST says whether it gets specialised loops for common sizes and layouts. Every
// such loop takes seconds to compile, so there are few: 3x3 and 5x5 kernels in the two layouts of a convolution's weight.
// Other sizes, layouts and per-kernel radii share one loop. Incomplete vectors at the end of a row are copied.

namespace {
namespace FGO_NAMESPACE {

#define FGO_INLINE FGO_TARGET __attribute__((always_inline)) static inline

template <class T> using vec = typename vector_of<T, FGO_BYTES>::type;
template <class T> using mask = typename vector_of<T, FGO_BYTES>::mask;
template <class T> constexpr int lanes = FGO_BYTES / sizeof(T);

template <class T> FGO_INLINE vec<T> root(vec<T> v) {
  vec<T> r;
  for (int l = 0; l < lanes<T>; ++l) r[l] = std::sqrt(v[l]);
  return r;
}

template <class T> FGO_INLINE bool any(mask<T> m) {
#ifdef FGO_ANY
  return FGO_ANY(m);
#else
  bool found = false;
  for (int l = 0; l < lanes<T>; ++l) found |= m[l] != 0;
  return found;
#endif
}

template <class T> FGO_INLINE vec<T> load(const T *p) {
  vec<T> v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

// values[index[l]] for every lane, index in 0..3.
template <class T> FGO_INLINE vec<T> look_up(const T *values, const mask<T> &index) {
#ifdef FGO_LOOK_UP
  if constexpr (sizeof(T) == 4) return FGO_LOOK_UP(values, index);
#endif
  vec<T> v;
  for (int l = 0; l < lanes<T>; ++l) v[l] = values[index[l]];
  return v;
}

template <class T> FGO_INLINE void store(T *p, vec<T> v) { __builtin_memcpy(p, &v, sizeof v); }

// The first `count` numbers, and zeros after them.
template <class T> FGO_INLINE vec<T> load_some(const T *p, int count) {
#ifdef FGO_LOAD_SOME
  if constexpr (sizeof(T) == 4) return FGO_LOAD_SOME(p, count);
#endif
  vec<T> v = {};
  for (int l = 0; l < count; ++l) v[l] = p[l];
  return v;
}

template <class T> FGO_INLINE void store_some(T *p, int count, vec<T> v) {
#ifdef FGO_STORE_SOME
  if constexpr (sizeof(T) == 4) return FGO_STORE_SOME(p, count, v);
#endif
  for (int l = 0; l < count; ++l) p[l] = v[l];
}

// Numbers of x and y by place: those of y come after the lanes of x. The places are constants.
#ifdef __clang__
#define FGO_SHUFFLE(x, y, places) __builtin_shufflevector(x, y, places)
#else
#define FGO_SHUFFLE(x, y, places) __builtin_shuffle(x, y, (mask<T>){places})
#endif

// Kernels of K entries that follow each other fill K vectors of L lanes: entry i of kernel k is number K k + i = L r + c, lane c
// of vector r. For odd K the L numbers of an entry are in L different lanes. So vectors are transposed by a rotation of every
// lane among the K vectors, which is a blend per bit of its distance, and a permutation within each vector.

// x, or y in the lanes that are rotated by BIT.
template <class T, int K, int BIT, int... L> FGO_INLINE vec<T> blend(vec<T> x, vec<T> y, std::integer_sequence<int, L...>) {
  return FGO_SHUFFLE(x, y, (L % K & BIT ? L + lanes<T> : L)...);
}

// Lane l becomes lane FACTOR l + SHIFT.
template <class T, int FACTOR, int SHIFT, int... L> FGO_INLINE vec<T> permute(vec<T> x, std::integer_sequence<int, L...>) {
  return FGO_SHUFFLE(x, x, ((FACTOR * L + SHIFT) % lanes<T>)...);
}
#undef FGO_SHUFFLE

// Lane l of v[i] becomes that of v[i - l], or v[i + l], modulo K.
template <class T, int K, bool BACK, int BIT = 1> FGO_INLINE void rotate(vec<T> *v) {
  if constexpr (BIT < K && BIT < lanes<T>) {
    vec<T> turned[K];
    for (int i = 0; i < K; ++i)
      turned[i] = blend<T, K, BIT>(v[i], v[(i + (BACK ? BIT : K - BIT)) % K], std::make_integer_sequence<int, lanes<T>>());
    for (int i = 0; i < K; ++i) v[i] = turned[i];
    rotate<T, K, BACK, 2 * BIT>(v);
  }
}

// The vector in memory whose first lane belongs to an entry.
template <class T, int K> constexpr int vector_of_entry(int entry) {
  int r = 0;
  while (r * lanes<T> % K != entry) ++r;
  return r;
}

// 1 / K modulo the lanes.
template <class T, int K> constexpr int inverse() {
  int f = 1;
  while (f * K % lanes<T> != 1 % lanes<T>) ++f;
  return f;
}

template <class T, int K, int... I> FGO_INLINE void read_kernels(const T *p, vec<T> *v, std::integer_sequence<int, I...>) {
  const std::make_integer_sequence<int, lanes<T>> all;
  ((v[I] = load<T>(p + lanes<T> * vector_of_entry<T, K>(I))), ...);
  rotate<T, K, false>(v);
  ((v[I] = permute<T, K, I>(v[I], all)), ...);
}

template <class T, int K, int... I> FGO_INLINE void write_kernels(T *p, const vec<T> *v, std::integer_sequence<int, I...>) {
  const std::make_integer_sequence<int, lanes<T>> all;
  constexpr int f = inverse<T, K>();
  vec<T> turned[K] = {permute<T, f, (lanes<T> * K - I) * f>(v[I], all)...};
  rotate<T, K, true>(turned);
  (store<T>(p + lanes<T> * vector_of_entry<T, K>(I), turned[I]), ...);
}

// -- memory ------------------------------------------------------------------------------------------------------

// How the kernels of a vector are stored: planar (each entry is contiguous over the kernels), interleaved (each kernel is
// contiguous, and the next one follows it), or at any strides, with a table of the entries' offsets.
enum class layout { planar, interleaved, strided };

// An address that is opaque to the compiler, which would otherwise compute one per entry, more than there are registers.
template <class T> FGO_INLINE T *at(T *base, int64_t start) {
  T *p = base + start;
  asm("" : "+r"(p));
  return p;
}

// Entries of kernels at any strides; lanes beyond the last kernel repeat the first.
template <class T>
FGO_TARGET __attribute__((noinline, noclone)) void gather(const T *p, const int64_t *offset, int64_t stride, int count, int n, vec<T> *v) {
  for (int e = 0; e < n; ++e) {
    const T *from = p + offset[e];
    if (stride == 1 && count == lanes<T>)
      v[e] = load<T>(from);
    else
      for (int l = 0; l < lanes<T>; ++l) v[e][l] = from[(l < count ? l : 0) * stride];
  }
}

template <class T>
FGO_TARGET __attribute__((noinline, noclone)) void scatter(T *p, const int64_t *offset, int64_t stride, int count, int n, const vec<T> *v) {
  for (int e = 0; e < n; ++e) {
    T *to = p + offset[e];
    if (stride == 1 && count == lanes<T>)
      store<T>(to, v[e]);
    else
      for (int l = 0; l < count; ++l) to[l * stride] = v[e][l];
  }
}

// Entries of the kernels from p on.
template <class T, int K, layout P>
FGO_INLINE void read(const T *p, const int64_t *offset, int64_t kernel_stride, int count, int size, vec<T> *v) {
  if constexpr (P == layout::planar)
    for (int e = 0; e < K; ++e) v[e] = load<T>(p + offset[e]);
  else if constexpr (P == layout::interleaved)
    read_kernels<T, K>(p, v, std::make_integer_sequence<int, K>());
  else
    gather<T>(p, offset, kernel_stride, count, size, v);
}

template <class T, int K, layout P>
FGO_INLINE void write(T *p, const int64_t *offset, int64_t kernel_stride, int count, int size, const vec<T> *v) {
  if constexpr (P == layout::planar)
    for (int e = 0; e < K; ++e) store<T>(p + offset[e], v[e]);
  else if constexpr (P == layout::interleaved)
    write_kernels<T, K>(p, v, std::make_integer_sequence<int, K>());
  else
    scatter<T>(p, offset, kernel_stride, count, size, v);
}

// Prefetches as much memory as a vector of kernels fills into the cache of a level.
template <class T, int K, int LEVEL> FGO_INLINE void prefetch(const T *start) {
  const char *p = reinterpret_cast<const char *>(start);
  for (int byte = 0; byte < K * FGO_BYTES; byte += 64) __builtin_prefetch(p + byte, 0, 4 - LEVEL);
}

// -- formulas ----------------------------------------------------------------------------------------------------

// Kind and radius of the kernels in a vector.
template <class T> struct lane_facts {
  mask<T> kind;
  vec<T> inverse_square;                      // of the radius
  bool any_stiefel;
};

// The formulas process a component row by row (A rows of B entries), so that few registers are in use at a time. Symmetric
// matrices are stored with both triangles. FULL: some lanes are Stiefel; otherwise only the diagonal is used.

// Adds a row's share of xᵀy, symmetrised: the diagonal, and twice the upper triangle.
template <class T, int B, bool FULL> FGO_INLINE void add_products(const vec<T> *x, const vec<T> *y, vec<T> *m, int b_) {
  const int b = B ? B : b_;
  for (int j = 0; j < b; ++j) {
    m[j * b + j] += x[j] * y[j];
    if constexpr (FULL)
      for (int k = j + 1; k < b; ++k) m[j * b + k] += x[j] * y[k] + x[k] * y[j];
  }
}

// S = 0, tr(M) I, diag(M) or sym(M) for M = wᵀh / r², from the sums of add_products() in `m`.
template <class T, int B, bool FULL> FGO_INLINE void normal_factor(vec<T> *m, const lane_facts<T> &f, int b_) {
  const int b = B ? B : b_;
  const vec<T> none = {};
  vec<T> trace = {};
  for (int j = 0; j < b; ++j) trace += m[j * b + j];
  for (int j = 0; j < b; ++j) {  // masked: a huge Euclidean component must not become 0 * infinity
    const vec<T> own = f.kind == 1 ? trace : m[j * b + j];
    m[j * b + j] = f.kind == 0 ? none : f.inverse_square * own;
  }
  if constexpr (FULL) {
    const vec<T> half = T(0.5) * f.inverse_square;
    for (int j = 0; j < b; ++j)
      for (int k = j + 1; k < b; ++k) m[j * b + k] = m[k * b + j] = f.kind > 2 ? m[j * b + k] * half : none;
  }
}

// A row of h - w S.
template <class T, int B, bool FULL> FGO_INLINE void subtract_normal(const vec<T> *w, const vec<T> *s, vec<T> *h, int b_) {
  const int b = B ? B : b_;
  for (int k = 0; k < b; ++k)
    for (int j = FULL ? 0 : k; j < (FULL ? b : k + 1); ++j) h[k] -= w[j] * s[j * b + k];
}

// Tangent projection, h <- h - w S.
template <class T, int A, int B, bool FULL>
FGO_INLINE void project(const vec<T> *w, vec<T> *h, const lane_facts<T> &f, int a_, int b_) {
  const int a = A ? A : a_, b = B ? B : b_;
  vec<T> s[B ? B * B : max_b * max_b] = {};
  for (int i = 0; i < a; ++i) add_products<T, B, FULL>(w + i * b, h + i * b, s, b_);
  normal_factor<T, B, FULL>(s, f, b_);
  for (int i = 0; i < a; ++i) subtract_normal<T, B, FULL>(w + i * b, s, h + i * b, b_);
}

// Adds a row's share of yᵀy: the diagonal and the upper triangle.
template <class T, int B, bool FULL> FGO_INLINE void add_squares(const vec<T> *y, vec<T> *n, int b_) {
  const int b = B ? B : b_;
  for (int j = 0; j < b; ++j)
    for (int k = j; k < (FULL ? b : j + 1); ++k) n[j * b + k] += y[j] * y[k];
}

// E = 0, (‖y‖² / r² - 1) I, diag(yᵀy / r² - I) or yᵀy / r² - I of the retraction y (I + E)^(-1/2), from the sums of
// add_squares() in `e`. Returns ‖E‖².
template <class T, int B, bool FULL> FGO_INLINE vec<T> excess(vec<T> *e, const lane_facts<T> &f, int b_) {
  const int b = B ? B : b_;
  const vec<T> none = {};
  vec<T> trace = {}, norm = {}, mixed = {};
  for (int j = 0; j < b; ++j) trace += e[j * b + j];
  for (int j = 0; j < b; ++j) {
    const vec<T> own = f.kind == 1 ? trace : e[j * b + j];
    e[j * b + j] = f.kind == 0 ? none : own * f.inverse_square - 1;
    norm += e[j * b + j] * e[j * b + j];
    if constexpr (FULL)
      for (int k = j + 1; k < b; ++k) {
        e[j * b + k] = e[k * b + j] = f.kind > 2 ? e[j * b + k] * f.inverse_square : none;
        mixed += e[j * b + k] * e[j * b + k];
      }
  }
  return norm + 2 * mixed;
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

// A row of y Z for symmetric Z.
template <class T, int B, bool FULL> FGO_INLINE void multiply(vec<T> *y, const vec<T> *z, int b_) {
  const int b = B ? B : b_;
  vec<T> row[B ? B : max_b];
  for (int k = 0; k < b; ++k) {
    row[k] = y[k] * z[k * b + k];
    if constexpr (FULL)
      for (int j = 0; j < b; ++j)
        if (j != k) row[k] += y[j] * z[j * b + k];
  }
  for (int k = 0; k < b; ++k) y[k] = row[k];
}

template <class T, int A, int B, bool FULL>
FGO_INLINE void multiply_all(vec<T> *y, const vec<T> *z, int a_, int b_) {
  for (int i = 0; i < (A ? A : a_); ++i) multiply<T, B, FULL>(y + i * (B ? B : b_), z, b_);
}

template <class T, int B> FGO_INLINE vec<T> excess_of(const vec<T> *y, vec<T> *e, const lane_facts<T> &f, int a, int b_) {
  const int b = B ? B : b_;
  for (int k = 0; k < b * b; ++k) e[k] = vec<T>{};
  for (int i = 0; i < a; ++i) add_squares<T, B, true>(y + i * b, e, b_);
  return excess<T, B, true>(e, f, b_);
}

// z <- (I + e)^(-1/2) for small e: I - e/2 + 3e²/8 and, with two more terms (for a diagonal always, where they are cheap),
// - 5e³/16 + 35e⁴/128.
template <class T, int B, bool FULL> FGO_INLINE void series(const vec<T> *e, vec<T> *z, bool two_more, int b_) {
  const int b = B ? B : b_;
  constexpr int size = B ? B * B : max_b * max_b;
  constexpr T c[5] = {1, T(-0.5), T(0.375), T(-0.3125), T(0.2734375)};
  if constexpr (!FULL) {
    for (int j = 0; j < b; ++j) {
      const vec<T> x = e[j * b + j];
      z[j * b + j] = c[0] + x * (c[1] + x * (c[2] + x * (c[3] + x * c[4])));
    }
    return;
  }
  vec<T> square[size];
  commuting_product<T, B>(e, e, square, b_);
  if (two_more) {
    vec<T> tail[size], product[size];
    for (int j = 0; j < b; ++j)
      for (int k = j; k < b; ++k) {
        const vec<T> sum = c[3] * e[j * b + k] + c[4] * square[j * b + k];
        tail[j * b + k] = tail[k * b + j] = j == k ? sum + c[2] : sum;
      }
    commuting_product<T, B>(square, tail, product, b_);
    for (int k = 0; k < b * b; ++k) square[k] = product[k] * (1 / c[2]);
  }
  for (int j = 0; j < b; ++j)
    for (int k = j; k < b; ++k) {
      const vec<T> sum = c[2] * square[j * b + k] + c[1] * e[j * b + k];
      z[j * b + k] = z[k * b + j] = j == k ? sum + c[0] : sum;
    }
}

// The nearest points to any y: spheres and columns by their norms, Stiefel components by one-sided Jacobi rotations
// y <- y J, z <- z J until the columns of y are orthogonal, which keeps the digits of the shortest ones, and then (y / norms) zᵀ.
FGO_TARGET __attribute__((noinline)) static void nearest(vec<double> *y, const lane_facts<double> &f, int a, int b) {
  const vec<double> none = {}, one = none + 1.0;
  vec<double> largest = none + std::numeric_limits<double>::min(), norms[max_b] = {}, z[max_b * max_b] = {}, row[max_b];
  for (int k = 0; k < a * b; ++k) {  // scaling leaves the result as it is and keeps the squares finite
    const vec<double> size = y[k] < 0 ? -y[k] : y[k];
    largest = size > largest ? size : largest;
  }
  const vec<double> unit = f.kind == 0 ? one : 1 / largest;
  for (int k = 0; k < a * b; ++k) y[k] *= unit;
  for (int j = 0; j < b; ++j) z[j * b + j] = one;
  bool turns = f.any_stiefel;
  for (int round = 0; turns && round < most_rounds; ++round) {
    turns = false;
    for (int j = 0; j < b; ++j)
      for (int k = j + 1; k < b; ++k) {
        vec<double> p = none, q = none, mixed = none;
        for (int i = 0; i < a; ++i) {
          p += y[i * b + j] * y[i * b + j];
          q += y[i * b + k] * y[i * b + k];
          mixed += y[i * b + j] * y[i * b + k];
        }
        const mask<double> oblique = (f.kind > 2) & (mixed * mixed > precision<double> * precision<double> * p * q);
        if (!any<double>(oblique)) continue;
        turns = true;
        const vec<double> slope = (q - p) / (2 * (oblique ? mixed : one));
        const vec<double> size = slope < 0 ? -slope : slope;
        const vec<double> flat = 1 / (size + root<double>(1 + size * size)), tangent = slope < 0 ? -flat : flat;
        const vec<double> cosine = oblique ? 1 / root<double>(1 + tangent * tangent) : one;
        const vec<double> sine = oblique ? cosine * tangent : none;
        auto turn = [&](vec<double> *m, int rows) FGO_TARGET {
          for (int i = 0; i < rows; ++i) {
            const vec<double> left = m[i * b + j], right = m[i * b + k];
            m[i * b + j] = cosine * left - sine * right;
            m[i * b + k] = sine * left + cosine * right;
          }
        };
        turn(y, a);
        turn(z, b);
      }
  }
  vec<double> total = none;
  for (int j = 0; j < b; ++j) {
    for (int i = 0; i < a; ++i) norms[j] += y[i * b + j] * y[i * b + j];
    total += norms[j];
  }
  for (int j = 0; j < b; ++j) {
    const vec<double> square = (f.kind == 1 ? total : norms[j]) * f.inverse_square;
    const vec<double> inverse = (f.kind > 2) & (square == 0) ? none : 1 / root<double>(square);
    norms[j] = f.kind == 0 ? one : inverse;
  }
  for (int i = 0; i < a; ++i) {
    for (int k = 0; k < b; ++k) row[k] = y[i * b + k] * norms[k];
    for (int j = 0; j < b; ++j) {
      vec<double> turned_back = none;
      for (int k = 0; k < b; ++k) turned_back += row[k] * z[j * b + k];
      y[i * b + j] = f.kind > 2 ? turned_back : row[j];
    }
  }
}

// The retraction y <- y (I + E)^(-1/2) where E is too large for one series.
template <class T, int B>
FGO_TARGET __attribute__((noinline)) void retract_further(vec<T> *y, const lane_facts<T> &f, int a, int b_) {
  const int b = B ? B : b_;
  constexpr int size = B ? B * B : max_b * max_b, L = lanes<double>;
  vec<T> e[size], z[size], distance = excess_of<T, B>(y, e, f, a, b_);
  if (!any<T>(~(distance <= repeat_limit<T>))) {  // the series is repeated: each leaves an error of fifth order
    while (any<T>(~(distance <= series_limit<T>[1]))) {
      series<T, B, true>(e, z, true, b_);
      multiply_all<T, 0, B, true>(y, z, a, b_);
      distance = excess_of<T, B>(y, e, f, a, b_);
    }
    series<T, B, true>(e, z, true, b_);
    multiply_all<T, 0, B, true>(y, z, a, b_);
    return;
  }
  for (int first = 0; first < lanes<T>; first += L) {
    lane_facts<double> facts;
    vec<double> far_y[max_a * max_b];
    for (int l = 0; l < L; ++l) facts.kind[l] = f.kind[first + l], facts.inverse_square[l] = f.inverse_square[first + l];
    facts.any_stiefel = f.any_stiefel;
    for (int k = 0; k < a * b; ++k)
      for (int l = 0; l < L; ++l) far_y[k][l] = y[k][first + l];
    nearest(far_y, facts, a, b);
    for (int k = 0; k < a * b; ++k)
      for (int l = 0; l < L; ++l) y[k][first + l] = T(far_y[k][l]);
  }
}

// -- sweeps ------------------------------------------------------------------------------------------------------

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
    vec<T> of_row = {};  // a sum per row, so that additions need not wait for each other
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

// The step of `count` kernels.
template <class T, int A, int B, layout P, bool FULL>
FGO_INLINE void step_of(const setting<T> &s, int64_t start, int count, const lane_facts<T> &f, vec<T> rate) {
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
    vec<T> far_w[entries], far_u[entries];
    for (int k = 0; k < n; ++k) far_w[k] = w[k], far_u[k] = u[k];
    const lane_facts<T> facts = f;
    const vec<T> own_rate = rate;
    nesterov_direction<T, B>(s, start, count, facts, own_rate, far_w, far_u);
    for (int k = 0; k < n; ++k) u[k] = far_u[k];
  }
  for (int i = 0; i < a; ++i) {
    for (int k = i * b; k < i * b + b; ++k) w[k] -= s.lr * u[k];
    add_squares<T, B, FULL>(w + i * b, e, s.b);
  }
  const vec<T> distance = excess<T, B, FULL>(e, f, s.b);
  const bool two_more = any<T>(~(distance <= series_limit<T>[0]));
  if (!two_more || !any<T>(~(distance <= series_limit<T>[1]))) {
    series<T, B, FULL>(e, z, two_more, s.b);
    multiply_all<T, A, B, FULL>(w, z, s.a, s.b);
  } else {  // rare, on copies
    vec<T> far_w[entries];
    for (int k = 0; k < n; ++k) far_w[k] = w[k];
    const lane_facts<T> facts = f;
    retract_further<T, B>(far_w, facts, a, s.b);
    for (int k = 0; k < n; ++k) w[k] = far_w[k];
  }
  write<T, A * B, P>(at(s.weight, start), s.offset, s.column_stride, count, s.n, w);
}

// Step scales of a vector's kernels, by group.
template <class T> FGO_INLINE vec<T> rates_of(const T *scales, const int32_t *codes, int count) {
  vec<T> rate;
  for (int l = 0; l < lanes<T>; ++l) rate[l] = scales[codes[l < count ? l : 0] >> 2];
  return rate;
}

// What is prefetched while a vector is processed.
enum class prefetched { nothing, own_momentum, next_row };

// Planar kernels: the same columns one row further down, since the hardware prefetcher does not follow nine or more streams
// of a few cache lines each. Interleaved kernels: the same stream further on, since the hardware prefetcher stops at the end
// of a page.
template <class T, int K, layout P>
FGO_INLINE void prefetch_vector(const setting<T> &s, int64_t row, int64_t column, bool momentum, prefetched what) {
  const int64_t place = column * s.n + row * s.row_stride;
  if constexpr (P == layout::interleaved) {
    prefetch<T, K, 1>(s.weight + place + near);
    prefetch<T, K, 1>(s.grad + place + near);
    if (momentum) prefetch<T, K, 1>(s.buffer + place + near);
  } else if constexpr (P == layout::planar) {
    if (what == prefetched::own_momentum && s.has_momentum) prefetch<T, K, 2>(s.buffer + place);
    if (what != prefetched::next_row || row + 1 >= s.rows) return;
    prefetch<T, K, 2>(s.weight + place + s.row_stride);
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

// Adds the squared norms of the kernels in a row's columns to the sums of their groups, or to `row_sums` per kind.
template <class T, int A, int B, layout P>
FGO_TARGET __attribute__((noinline, noclone)) void sum_columns(const setting<T> &s, int64_t row, int64_t first, int64_t last, double *sums,
                                                      double *row_sums, prefetched what) {
  constexpr int L = lanes<T>;
  const vec<T> none = {};
  vec<T> by_kind[4] = {};
  for (int64_t column = first; column < last; column += L) {
    const kernel_range v = range_at(s, row, column, last);
    prefetch_vector<T, A * B, P>(s, row, column, false, what);
    if constexpr (P != layout::strided)
      if (v.count < L) {
        const row_end<T, A * B> end_of_row(s, v);
        sum_columns<T, A, B, layout::planar>(end_of_row.own, 0, 0, L, sums, row_sums, prefetched::nothing);
        break;
      }
    const lane_facts<T> f = facts_at<T, P>(s, v);
    const vec<T> sum = f.any_stiefel ? squares_of<T, A, B, P, true>(s, v.start, v.count, f)
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

// Takes the step of the kernels in a row's columns, at the scales of their groups or at `row_scales` per kind.
template <class T, int A, int B, layout P>
FGO_TARGET __attribute__((noinline, noclone)) void step_columns(const setting<T> &s, int64_t row, int64_t first, int64_t last,
                                                       const T *row_scales, prefetched what) {
  constexpr int L = lanes<T>;
  for (int64_t column = first; column < last; column += L) {
    const kernel_range v = range_at(s, row, column, last);
    prefetch_vector<T, A * B, P>(s, row, column, s.has_momentum, what);
    if constexpr (P != layout::strided)
      if (v.count < L) {
        const row_end<T, A * B> end_of_row(s, v);
        step_columns<T, A, B, layout::planar>(end_of_row.own, 0, 0, L, row_scales, prefetched::nothing);
        end_of_row.put_back(s, v);
        break;
      }
    const lane_facts<T> f = facts_at<T, P>(s, v);
    const vec<T> rate = row_scales ? look_up<T>(row_scales, f.kind) : rates_of<T>(s.scales, s.codes + v.kernel, v.count);
    if (f.any_stiefel)
      step_of<T, A, B, P, true>(s, v.start, v.count, f, rate);
    else
      step_of<T, A, B, P, false>(s, v.start, v.count, f, rate);
  }
}

// A thread's unit of work: a chunk of a row, and the row's groups by kind where row and kind determine the group.
struct piece {
  int64_t row, first, last;
  const int32_t *groups;
};

template <class T> FGO_INLINE piece piece_of(const setting<T> &s, int64_t row, int64_t first) {
  const int64_t last = first + chunk < s.columns ? first + chunk : s.columns;
  return {row, first, last, s.row_groups ? s.row_groups + 4 * row : nullptr};
}

// The first sweep: adds the squared norms of a range of chunks to `sums`, with two numbers per group.
struct norms_sweep {
  template <class T, int A, int B, layout P>
  FGO_TARGET static int64_t run(const fgo_kernels *task, const fgo_options *options, double *sums, int64_t begin, int64_t end) {
    int64_t offset[max_a * max_b];
    const setting<T> s = setting_of<T>(*task, *options, offset);
    const int64_t per_row = chunks_per_row(*task);
    for (int64_t number = begin; number < end; ++number) {
      const piece p = piece_of(s, number / per_row, number % per_row * chunk);
      double row_sums[4] = {};
      sum_columns<T, A, B, P>(s, p.row, p.first, p.last, sums, p.groups ? row_sums : nullptr, prefetched::next_row);
      for (int k = 0; p.groups && k < 4; ++k)
        if (p.groups[k] >= 0) sums[2 * p.groups[k]] += row_sums[k];
    }
    return 0;
  }
};

// The second sweep: the step of a range of chunks.
struct update_sweep {
  template <class T, int A, int B, layout P>
  FGO_TARGET static int64_t run(const fgo_kernels *task, const fgo_options *options, double *, int64_t begin, int64_t end) {
    int64_t offset[max_a * max_b];
    const setting<T> s = setting_of<T>(*task, *options, offset);
    const int64_t per_row = chunks_per_row(*task);
    for (int64_t number = begin; number < end; ++number) {
      const piece p = piece_of(s, number / per_row, number % per_row * chunk);
      T row_scales[4] = {};
      for (int k = 0; p.groups && k < 4; ++k) row_scales[k] = p.groups[k] < 0 ? T(0) : s.scales[p.groups[k]];
      step_columns<T, A, B, P>(s, p.row, p.first, p.last, p.groups ? row_scales : nullptr, prefetched::next_row);
    }
    return 0;
  }
};

// Both at once, where no group has kernels of two rows: what the norms have read is still in the cache for the step. A group
// whose norm is not finite gets no gradient if the task skips such groups; otherwise its row stays as it is.
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
        sum_columns<T, A, B, P>(s, row, first, piece_of(s, row, first).last, nullptr, row_sums, prefetched::own_momentum);
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
  constexpr int L = lanes<T>, streams = 4;  // sums that don't wait for each other
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
  if constexpr (FGO_FAST) {
    if (run_at_size<SWEEP, T, 3, 3>(t, o, sums, begin, end, &result)) return result;
    if constexpr (sizeof(T) == 4)
      if (run_at_size<SWEEP, T, 5, 5>(t, o, sums, begin, end, &result)) return result;
  }
  return SWEEP::template run<T, 0, 0, layout::strided>(t, o, sums, begin, end);
}

#undef FGO_INLINE

}  // namespace FGO_NAMESPACE
}  // namespace
