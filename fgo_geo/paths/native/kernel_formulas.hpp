// Projection and retraction of kernels, compiled once per instruction set (each_set.hpp), see fused.cpp.

#include "kernel_vectors.hpp"

namespace {
namespace FGO_NAMESPACE {

#define FGO_INLINE FGO_TARGET __attribute__((always_inline)) static inline

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
  for (int k = 0; k < a * b; ++k) {  // scaling does not change the result, and keeps the squares finite
    const vec<double> size = y[k] < 0 ? -y[k] : y[k];
    largest = size > largest ? size : largest;
  }
  const vec<double> unit = f.kind == 0 ? one : 1 / largest;
  for (int k = 0; k < a * b; ++k) y[k] *= unit;
  for (int j = 0; j < b; ++j) z[j * b + j] = one;
  bool rotates = f.any_stiefel;
  for (int round = 0; rotates && round < most_rounds; ++round) {
    rotates = false;
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
        rotates = true;
        const vec<double> slope = (q - p) / (2 * (oblique ? mixed : one));
        const vec<double> size = slope < 0 ? -slope : slope;
        const vec<double> flat = 1 / (size + root<double>(1 + size * size)), tangent = slope < 0 ? -flat : flat;
        const vec<double> cosine = oblique ? 1 / root<double>(1 + tangent * tangent) : one;
        const vec<double> sine = oblique ? cosine * tangent : none;
        auto rotate_columns = [&](vec<double> *m, int rows) FGO_TARGET {
          for (int i = 0; i < rows; ++i) {
            const vec<double> left = m[i * b + j], right = m[i * b + k];
            m[i * b + j] = cosine * left - sine * right;
            m[i * b + k] = sine * left + cosine * right;
          }
        };
        rotate_columns(y, a);
        rotate_columns(z, b);
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
      vec<double> rotated_back = none;
      for (int k = 0; k < b; ++k) rotated_back += row[k] * z[j * b + k];
      y[i * b + j] = f.kind > 2 ? rotated_back : row[j];
    }
  }
}

// The retraction y <- y (I + E)^(-1/2) where E is too large for one series.
template <class T, int B>
FGO_TARGET __attribute__((noinline)) void retract_long_step(vec<T> *y, const lane_facts<T> &f, int a, int b_) {
  const int b = B ? B : b_;
  constexpr int size = B ? B * B : max_b * max_b, L = lanes<double>;
  vec<T> e[size], z[size], distance = excess_of<T, B>(y, e, f, a, b_);
  if (!any<T>(~(distance <= repeat_limit<T>))) {  // the series is applied repeatedly; each application leaves an error of fifth order
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
    vec<double> wide_y[max_a * max_b];
    for (int l = 0; l < L; ++l) facts.kind[l] = f.kind[first + l], facts.inverse_square[l] = f.inverse_square[first + l];
    facts.any_stiefel = f.any_stiefel;
    for (int k = 0; k < a * b; ++k)
      for (int l = 0; l < L; ++l) wide_y[k][l] = y[k][first + l];
    nearest(wide_y, facts, a, b);
    for (int k = 0; k < a * b; ++k)
      for (int l = 0; l < L; ++l) y[k][first + l] = T(wide_y[k][l]);
  }
}

#undef FGO_INLINE

}  // namespace FGO_NAMESPACE
}  // namespace
