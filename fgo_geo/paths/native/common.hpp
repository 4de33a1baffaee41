// What the sources of the library share.

#pragma once

#include <cstdint>

#ifdef _WIN32
#define FGO_API __declspec(dllexport)
#else
#define FGO_API
#endif

#if defined(__x86_64__) && defined(__GNUC__) && !defined(FGO_PORTABLE)
#define FGO_AVX2 __attribute__((target("avx2,fma,bmi,bmi2,lzcnt,popcnt,tune=haswell")))
#define FGO_AVX512 __attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,fma,bmi,bmi2,lzcnt,popcnt,tune=skylake-avx512")))
#endif

extern "C" {

// The instruction set in use: 2 AVX-512, 1 AVX2, 0 the compiler's default. It is the best that the processor has, up to a
// limit; a negative argument keeps the limit.
FGO_API int64_t fgo_limit(int limit);

// Hyper-parameters of the step of matrices.
struct fgo_matrix_options {
  double lr, momentum, dampening, weight_decay;
  int32_t nesterov, maximize, radius_invariant;
};
}
