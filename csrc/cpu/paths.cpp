// Asks the CPU for its instruction sets.
#include "paths.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace attnreuse {

#if defined(__x86_64__)
// Half-precision conversions: not every compiler knows the name in __builtin_cpu_supports.
static bool has_f16c() {
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
}
#endif

std::vector<const Kernels*> paths() {
  std::vector<const Kernels*> found;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool fma = __builtin_cpu_supports("fma");
  const bool avx512 = fma && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512 && __builtin_cpu_supports("avx512vnni")) found.push_back(&avx512vnni_kernels);
  if (avx512) found.push_back(&avx512_kernels);
  if (fma && __builtin_cpu_supports("avx2") && has_f16c()) found.push_back(&avx2_kernels);
#endif
  found.push_back(&portable_kernels);
  return found;
}

}  // namespace attnreuse
