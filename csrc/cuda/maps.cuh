// Conversion of fp16 maps to integer codes, and distances between maps.
#pragma once

#include "kernels.h"
#include "ptx.cuh"

namespace attnreuse {

template <Codes FORMAT>
struct CodesOf {
  static constexpr int bits = FORMAT == Codes::fp16 ? 16 : FORMAT == Codes::u4 ? 4 : 8;
  static constexpr float levels = FORMAT == Codes::u8 ? 255.0f : FORMAT == Codes::u7 ? 127.0f : 15.0f;
  static constexpr bool root = FORMAT == Codes::u8 || FORMAT == Codes::u4;
  static constexpr int words = 8 * bits;  // 16-bit words of a block of 128 keys; fp16 codes are words
};

// One thread per word: codes of keys that are `words` apart, from fp16 `from` [blocks, 128] to `to` [blocks, words].
template <Codes FORMAT>
__global__ void convert_kernel(const uint16_t* from, uint16_t* to, int64_t blocks) {
  using F = CodesOf<FORMAT>;
  const int64_t at = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (at >= blocks * F::words) return;
  const uint16_t* block = from + at / F::words * 128;
  uint32_t word = 0;
  for (int k = 0; k < 16 / F::bits; ++k) {
    const float t = cvt_f32_f16(block[at % F::words + k * F::words]);
    word |= static_cast<uint32_t>(rintf(F::levels * (F::root ? sqrtf(t) : t))) << F::bits * k;
  }
  to[at] = static_cast<uint16_t>(word);
}

// Sum over keys of |P - P'| and (P - P')^2 of a word's codes.
template <Codes FORMAT>
__device__ void add_word(uint32_t first, uint32_t second, float scale, float other, float& absolute, float& square) {
  using F = CodesOf<FORMAT>;
  for (int k = 0; k < 16 / F::bits; ++k) {
    float p, r;
    if (FORMAT == Codes::fp16) {
      p = cvt_f32_f16(static_cast<uint16_t>(first)), r = cvt_f32_f16(static_cast<uint16_t>(second));
    } else {
      constexpr uint32_t field = (1u << F::bits % 16) - 1;
      p = static_cast<float>(first >> F::bits * k & field), r = static_cast<float>(second >> F::bits * k & field);
      p *= F::root ? p : 1.0f, r *= F::root ? r : 1.0f;
    }
    const float off = p * scale - r * other;
    absolute += fabsf(off);
    square += off * off;
  }
}

// One warp per query row.
template <Codes FORMAT>
__global__ void drift_kernel(const DriftParams p) {
  using F = CodesOf<FORMAT>;
  const int64_t row = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) / 32;
  const int lane = threadIdx.x % 32;
  if (row >= p.rows) return;  // the whole warp
  const float unit = FORMAT == Codes::fp16 ? 1.0f : 1.0f / (F::root ? F::levels * F::levels : F::levels);
  float absolute = 0, square = 0;
  for (int64_t block = 0; block < p.blocks; ++block) {
    const int64_t at = (row / p.M * p.blocks + block) * p.M + row % p.M;
    const float scale = exp2f(p.first_max[at] - p.first_lse[row]) * unit;
    const float other = exp2f(p.second_max[at] - p.second_lse[row]) * unit;
    for (int word = lane; word < F::words; word += 32) {
      const int64_t i = (row * p.blocks + block) * F::words + word;
      add_word<FORMAT>(p.first[i], p.second[i], scale, other, absolute, square);
    }
  }
  absolute = sum_over_warp(absolute), square = sum_over_warp(square);
  if (lane == 0) {
    p.total_variation[row] = 0.5f * absolute;
    p.distance[row] = sqrtf(square);
  }
}

}  // namespace attnreuse
