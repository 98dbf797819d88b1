// What the host sides of the kernels share.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace attnreuse {

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

// Of the current device.
inline int attribute(cudaDeviceAttr wanted) {
  int device = 0, value = 0;
  check(cudaGetDevice(&device), "no current device");
  check(cudaDeviceGetAttribute(&value, wanted, device), "unknown device attribute");
  return value;
}

inline unsigned blocks_for(int64_t items, int64_t per_block) {
  return static_cast<unsigned>((items + per_block - 1) / per_block);
}

// Head dims with kernels of reuse.
#define HEAD_DIMS(CASE) CASE(40) CASE(64) CASE(72) CASE(80) CASE(96) CASE(128) CASE(160)
constexpr const char* kNoKernel = "no kernel for this format and head dim (u8 and u4 at 40, 64, 80, 96, 128, 160 have one)";

}  // namespace attnreuse
