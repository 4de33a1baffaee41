// Includes FGO_SOURCE once per instruction set: FGO_NAMESPACE holds what it defines, FGO_TARGET is the attribute of its
// functions, FGO_BYTES the size of its vectors, and FGO_SET the number that fgo_limit() has for it. FGO_PORTABLE_BYTES is the
// size of the portable vectors. Included once per source file.

#define FGO_SET 0
#define FGO_NAMESPACE portable
#define FGO_TARGET
#define FGO_BYTES FGO_PORTABLE_BYTES
#include FGO_SOURCE
#undef FGO_SET
#undef FGO_NAMESPACE
#undef FGO_TARGET
#undef FGO_BYTES

#ifdef FGO_AVX2
#include <immintrin.h>

#define FGO_SET 1
#define FGO_NAMESPACE avx2
#define FGO_TARGET FGO_AVX2
#define FGO_BYTES 32
#include FGO_SOURCE
#undef FGO_SET
#undef FGO_NAMESPACE
#undef FGO_TARGET
#undef FGO_BYTES

#define FGO_SET 2
#define FGO_NAMESPACE avx512
#define FGO_TARGET FGO_AVX512
#define FGO_BYTES 64
#include FGO_SOURCE

// The qualified name of a function in the namespace of the set in use.
#define FGO_IN_USE(of) (fgo_limit(-1) == 2 ? of(avx512) : fgo_limit(-1) == 1 ? of(avx2) : of(portable))
#else
#define FGO_IN_USE(of) of(portable)
#endif
