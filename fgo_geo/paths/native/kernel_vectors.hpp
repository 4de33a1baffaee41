// Vectors of one number of each of several kernels, compiled once per instruction set (each_set.hpp): how they are read from
// memory and written to it, in the layouts of a weight.

// Instructions that the language does not express: whether any bit is set; values by index; and the first numbers of a vector.
#if FGO_SET == 1
#define FGO_ANY(m) (!_mm256_testz_si256((__m256i)m, (__m256i)m))
#define FGO_LOOK_UP(values, index) _mm256_permutevar_ps(_mm256_broadcast_ps((const __m128 *)(values)), (__m256i)index)
#define FGO_SOME(count) (__m256i)((mask<float>){0, 1, 2, 3, 4, 5, 6, 7} < count)
#define FGO_LOAD_SOME(p, count) _mm256_maskload_ps(p, FGO_SOME(count))
#define FGO_STORE_SOME(p, count, v) _mm256_maskstore_ps(p, FGO_SOME(count), v)
#elif FGO_SET == 2
#define FGO_ANY(m) (_mm512_test_epi64_mask((__m512i)m, (__m512i)m) != 0)
#define FGO_LOOK_UP(values, index) _mm512_permutevar_ps(_mm512_broadcast_f32x4(_mm_loadu_ps(values)), (__m512i)index)
#define FGO_LOAD_SOME(p, count) _mm512_maskz_loadu_ps((1u << (count)) - 1, p)
#define FGO_STORE_SOME(p, count, v) _mm512_mask_storeu_ps(p, (1u << (count)) - 1, v)
#endif

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
template <class T, int K, bool BACK, int BIT, int... I> FGO_INLINE void rotate(vec<T> *v, std::integer_sequence<int, I...> each) {
  if constexpr (BIT < K && BIT < lanes<T>) {
    const std::make_integer_sequence<int, lanes<T>> all;
    vec<T> turned[K] = {blend<T, K, BIT>(v[I], v[(I + (BACK ? BIT : K - BIT)) % K], all)...};
    rotate<T, K, BACK, 2 * BIT>(turned, each);
    ((v[I] = turned[I]), ...);
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
  rotate<T, K, false, 1>(v, std::integer_sequence<int, I...>());
  ((v[I] = permute<T, K, I>(v[I], all)), ...);
}

template <class T, int K, int... I> FGO_INLINE void write_kernels(T *p, const vec<T> *v, std::integer_sequence<int, I...>) {
  const std::make_integer_sequence<int, lanes<T>> all;
  constexpr int f = inverse<T, K>();
  vec<T> turned[K] = {permute<T, f, (lanes<T> * K - I) * f>(v[I], all)...};
  rotate<T, K, true, 1>(turned, std::integer_sequence<int, I...>());
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

#undef FGO_ANY
#undef FGO_LOOK_UP
#undef FGO_LOAD_SOME
#undef FGO_STORE_SOME
#undef FGO_INLINE

}  // namespace FGO_NAMESPACE
}  // namespace
