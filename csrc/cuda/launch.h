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

// This library's own runtime has a current device, too; it is the caller's before anything else is asked.
inline void use(int device) { check(cudaSetDevice(device), "device"); }

inline int attribute(cudaDeviceAttr wanted, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, wanted, device), "device attribute");
  return value;
}

// Why `device`, the current one, cannot run `kernel`, or "": the driver alone knows what fits of the code that was built.
inline std::string no_code_of(const void* kernel, int device) {
  cudaFuncAttributes found;
  const cudaError_t error = cudaFuncGetAttributes(&found, kernel);
  if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction) {
    cudaGetLastError();
    return "the extension holds no code for compute capability " +
           std::to_string(attribute(cudaDevAttrComputeCapabilityMajor, device)) + "." +
           std::to_string(attribute(cudaDevAttrComputeCapabilityMinor, device)) +
           " (attnreuse doctor tells what it was built for)";
  }
  check(error, "kernel");
  return "";
}

inline unsigned blocks_for(int64_t items, int64_t per_block) {
  return static_cast<unsigned>((items + per_block - 1) / per_block);
}

// Head dims with kernels of reuse.
#define HEAD_DIMS(CASE) CASE(40) CASE(64) CASE(72) CASE(80) CASE(96) CASE(128) CASE(160)
constexpr const char* kNoKernel = "no kernel for this format and head dim (u8 and u4 at 40, 64, 72, 80, 96, 128, 160 have one)";

}  // namespace attnreuse
