// The CUDA kernels' host side: addresses, sizes, a device and a stream of it; errors are exceptions.
#pragma once

#include <cstdint>
#include <string>

namespace attnreuse {

struct ReuseParams {
  const uint8_t* codes;    // [B, H, M, C, 16 BITS], contiguous
  const float* block_max;  // [B, H, C, M]
  const float* lse;        // [B, H, M]
  const void* value;       // fp16 [B, H, N, D], rows of adjacent elements that start at multiples of 16 bytes
  void* out;               // fp16 [B, H, M, D], rows of adjacent elements that start at multiples of 4 bytes
  int64_t value_b, value_h, value_n, out_b, out_h, out_m;  // strides in elements
  int64_t H, M, N;
};

// Why `launch_reuse` cannot serve maps of u8 (bits = 8) or u4 (4) with this head dim on a device, or "".
std::string reuse_unserved(int head_dim, int bits, int device);

// Map times values; `batch` as in ReuseParams' B.
void launch_reuse(const ReuseParams& params, int64_t batch, int head_dim, int bits, int device, void* stream);

// The same by the kernel for Hopper, whose values' strides are positive multiples of 16 bytes; in builds for sm_90a.
std::string hopper_reuse_unserved(int head_dim, int bits, int device);
void launch_hopper_reuse(const ReuseParams& params, int64_t batch, int head_dim, int bits, int device, void* stream);

}  // namespace attnreuse
