// Vectors of four floats: SSE2, NEON, or whatever the compiler makes of them.
#define VECTOR 4
#define NAME "portable"
#define KERNELS portable_kernels
#include "kernels.inl"
