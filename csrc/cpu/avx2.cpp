// AVX2 and FMA; called only where the CPU has them.
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#define VECTOR 8
#define NAME "avx2"
#define KERNELS avx2_kernels
#include "kernels.inl"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
