// CPU kernels of capture and reuse. Formulas, layout of codes and error bounds: attnreuse/formats.py.
#pragma once

#include <cstdint>

namespace attnreuse {

enum class Format { fp32, fp16, u8, u7, u4 };

// A [B, H, rows, D] fp32 tensor: base and strides in elements.
struct Tensor4 {
  const float* data;
  int64_t b, h, row, d;
  const float* at(int64_t ib, int64_t ih) const { return data + ib * b + ih * h; }
};

struct Map {
  uint8_t* codes;    // [B, H, M, row bytes], contiguous
  float* block_max;  // [B, H, C, M], null for fp32
  float* lse;        // [B, H, M], null for fp32
  Format format;
};

struct Shape {
  int64_t B, H, M, N, D, Dv;
};

struct CaptureArgs {
  Shape shape;
  Tensor4 query, key, value;
  Tensor4 mask;  // additive, [B, H, M, N] with zero strides where it broadcasts; data null without
  float scale;   // of the dot products
  Map map;
  float* out;  // [B, H, M, Dv], strides below, last one 1
  int64_t out_b, out_h, out_m;
  float* workspace;  // capture_workspace(...) floats
  int threads;
};

struct ReuseArgs {
  Shape shape;  // D is not used
  Map map;
  Tensor4 value;
  float* out;
  int64_t out_b, out_h, out_m;
  float* workspace;  // reuse_workspace(...) floats
  int threads;
};

struct Kernels {
  const char* name;
  void (*capture)(const CaptureArgs&);
  void (*reuse)(const ReuseArgs&);
  double (*multiply_add)(int64_t steps, int threads);  // FLOP done by independent chains of FMAs, to be timed
};

constexpr int64_t kBlock = 128;  // keys that share a block maximum
constexpr int64_t kAlign = 16;   // floats; rows of packed values are padded to it
constexpr int64_t kTile = 24;    // query rows that a thread takes at a time

constexpr int64_t padded(int64_t x, int64_t to) { return (x + to - 1) / to * to; }
constexpr int64_t blocks_of(int64_t keys) { return (keys + kBlock - 1) / kBlock; }

// Of values as floats, or as integers with their scales, which is less.
inline int64_t reuse_workspace(const Shape& s) {
  return s.B * s.H * blocks_of(s.N) * kBlock * padded(s.Dv, kAlign);
}
inline int64_t capture_workspace(const Shape& s, int threads) {
  const int64_t keys = s.B * s.H * blocks_of(s.N) * kBlock * s.D;
  return reuse_workspace(s) + keys + threads * kTile * blocks_of(s.N);
}

extern const Kernels portable_kernels, avx2_kernels, avx512_kernels, avx512vnni_kernels;

}  // namespace attnreuse
