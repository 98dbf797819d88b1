// AVX-512 F, BW, DQ and VL; called only where the CPU has them.
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma")
#endif
#define VECTOR 16
#define NAME "avx512"
#define KERNELS avx512_kernels
#include "kernels.inl"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
