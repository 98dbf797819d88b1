// The CUDA kernels' host side: addresses on the current device, sizes and a stream; errors are exceptions.
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

struct DriftParams {
  const uint16_t *first, *second;       // 16-bit words of codes, [B, H, M, C, words]
  const float *first_max, *second_max;  // [B, H, C, M]
  const float *first_lse, *second_lse;  // [B, H, M]
  float *total_variation, *distance;    // [B, H, M]
  int64_t M, blocks, rows;              // blocks: C; rows: B H M
};

enum class Codes { fp16, u8, u7, u4 };

// Whether `launch_reuse` serves maps of u8 (bits = 8) or u4 (4) and this head dim on the current device; else why not.
std::string reuse_unserved(int head_dim, int bits);

// Map times values; `batch` as in ReuseParams' B.
void launch_reuse(const ReuseParams& params, int64_t batch, int head_dim, int bits, void* stream);

// The same by the kernel for Hopper, whose values' strides are positive multiples of 16 bytes; in builds for sm_90a.
std::string hopper_reuse_unserved(int head_dim, int bits);
void launch_hopper_reuse(const ReuseParams& params, int64_t batch, int head_dim, int bits, void* stream);

// fp16 codes of so many blocks of 128 keys to those of another format.
void launch_convert(const uint16_t* from, uint16_t* to, int64_t blocks, Codes format, void* stream);

// Distances of maps, row by row.
void launch_drift(const DriftParams& params, Codes format, void* stream);

}  // namespace attnreuse
