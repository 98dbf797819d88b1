// What the statically linked CUDA runtime of this build can use.

#include "devices.h"

#include <cuda_runtime.h>

namespace attnreuse {

std::string cuda_version() {
  return std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
}

std::vector<std::string> cuda_devices() {
  std::vector<std::string> names;
  int count = 0;
  // No driver or no device is an answer here, not an error.
  if (cudaGetDeviceCount(&count) != cudaSuccess) return names;
  for (int i = 0; i < count; ++i) {
    cudaDeviceProp properties;
    if (cudaGetDeviceProperties(&properties, i) != cudaSuccess) continue;
    names.push_back(std::string(properties.name) + ", sm_" + std::to_string(properties.major) +
                    std::to_string(properties.minor));
  }
  return names;
}

}  // namespace attnreuse
