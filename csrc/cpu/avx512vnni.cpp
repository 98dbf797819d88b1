// AVX-512 F, BW, DQ and VL with its products of integers (VNNI); called only where the CPU has them.
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma")
#endif
#define VECTOR 16
#define VNNI
#define NAME "avx512vnni"
#define KERNELS avx512vnni_kernels
#include "kernels.inl"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
