// Reuse on tensor cores, for Ampere and later: O = P V with P decoded in registers from u8 or u4 codes.
#pragma once

#include "kernels.h"
#include "ptx.cuh"

namespace attnreuse {

constexpr int kQueries = 128, kKeys = 128;  // of a thread block, at a time
template <int D>
constexpr int kRows = D > 80 ? 16 : 32;  // of a warp: two products per value read, where registers allow
template <int D>
constexpr int kThreads = kQueries / kRows<D> * 32;

// Where things lie in shared memory, in bytes; rows are spaced so that no two of a read share a bank.
template <int D, int BITS>
struct Tile {
  static constexpr int code_row = 16 * BITS, code_stride = code_row + 16;
  static constexpr int value_row = 2 * D, value_stride = D % 16 == 8 ? 2 * D : 2 * D + 16;
  static constexpr int codes = kQueries * code_stride;
  static constexpr int bytes = codes + kKeys * value_stride + 16;
  __device__ static int value_at(int key) { return codes + key * value_stride + (key >= 64 ? 16 : 0); }
};
template <int D, int BITS>
constexpr int kSharedBytes = 2 * Tile<D, BITS>::bytes;  // one tile is multiplied while the next arrives

__device__ inline int64_t cdiv(int64_t n, int64_t by) { return (n + by - 1) / by; }

template <int D, int BITS>
__device__ void load_tile(const ReuseParams& p, int64_t head, int64_t first, int64_t block, int64_t blocks, char* to) {
  using T = Tile<D, BITS>;
  constexpr int code_chunks = T::code_row / 16, value_chunks = T::value_row / 16;
  for (int i = threadIdx.x; i < kQueries * code_chunks; i += kThreads<D>) {
    const int64_t m = first + i / code_chunks;
    const int64_t row = head * p.M + (m < p.M ? m : p.M - 1);
    cp_async(to + i / code_chunks * T::code_stride + i % code_chunks * 16,
               p.codes + (row * blocks + block) * T::code_row + i % code_chunks * 16, m < p.M);
  }
  const char* value = static_cast<const char*>(p.value) + 2 * (head / p.H * p.value_b + head % p.H * p.value_h);
  for (int i = threadIdx.x; i < kKeys * value_chunks; i += kThreads<D>) {
    const int64_t n = block * kKeys + i / value_chunks;
    cp_async(to + T::value_at(i / value_chunks) + i % value_chunks * 16,
               value + 2 * (n < p.N ? n : p.N - 1) * p.value_n + i % value_chunks * 16, n < p.N);
  }
}

// Factor and offset of `probabilities`, each as two equal fp16 numbers, of a row whose scale has square root `root`.
template <int BITS>
__device__ void scale_codes(float root, uint32_t& scale, uint32_t& offset) {
  scale = cvt_f16x2(root / (BITS == 8 ? 255.0f : 15.0f));
  offset = mul_f16x2(scale, cvt_f16x2(-1024.0f));
}

// Row m of an output, if there is one: lane q of four holds, of every 8 columns, the first two numbers or, `high`, the last.
template <int D>
__device__ void store_row(const ReuseParams& p, int64_t head, int64_t m, int q, const float (&out)[D / 8][4], int high) {
  if (m >= p.M) return;
  char* const to = static_cast<char*>(p.out) + 2 * (head / p.H * p.out_b + head % p.H * p.out_h + m * p.out_m);
  for (int column = 0; column < D / 8; ++column)
    *reinterpret_cast<uint32_t*>(to + 2 * (8 * column + 2 * q)) =
        cvt_f16x2(out[column][2 * high], out[column][2 * high + 1]);
}

// Square root of the scale of each of a lane's rows (see below), over the levels, as two equal fp16 numbers.
template <int BITS, int ROWS>
__device__ void row_scales(const ReuseParams& p, int64_t head, int64_t row, int64_t block, int64_t blocks,
                           uint32_t (&scale)[ROWS], uint32_t (&offset)[ROWS]) {
  for (int i = 0; i < ROWS; ++i) {
    const int64_t m = row + 8 * i;
    float s = 0;
    if (m < p.M) s = exp2f(0.5f * (p.block_max[(head * blocks + block) * p.M + m] - p.lse[head * p.M + m]));
    scale_codes<BITS>(s, scale[i], offset[i]);
  }
}

// Probabilities of two codes; `magic` holds 1024 + code as fp16, which is 0x6400 | code.
__device__ inline uint32_t probabilities(uint32_t magic, uint32_t scale, uint32_t offset) {
  const uint32_t root = fma_f16x2(magic, scale, offset);
  return mul_f16x2(root, root);
}

// Codes of two keys, out of 32 bits: of words w and w + 1 those of `part`, which goes to 2 (u8) or 4 (u4).
template <int BITS>
__device__ uint32_t two_codes(uint32_t words, int part) {
  if (BITS == 8) return prmt(words, 0x64646464, part == 0 ? 0x4140 : 0x4342);  // of keys w + part, and 64 more
  return (words >> 4 * part & 0x000f000f) | 0x64006400;  // of keys w + 32 part, and 1 more
}

// The key that is row `i` of the 8 of half `k` of what the `part`-th product of a step sums over.
template <int BITS>
__device__ int key_of(int step, int part, int k, int i) {
  if (BITS == 8) return 8 * step + i / 2 * 2 + k + 64 * (i % 2);
  return 8 * step + i + 32 * (2 * part + k);
}

// Lane (g, q) = (lane / 4, lane % 4) of a warp holds rows g, g + 8, ... of the warp's, and of each step's keys those
// whose codes lie in 32-bit word q + 4 step of a row: the order of keys is free, as long as values come in the same.
template <int D, int BITS>
__global__ void __launch_bounds__(kThreads<D>) reuse_kernel(const ReuseParams p) {
  using T = Tile<D, BITS>;
  SHARED_MEMORY(shared);
  char* const tiles = reinterpret_cast<char*>(shared);
  constexpr int columns = D / 8, steps = BITS, products = BITS == 8 ? 1 : 2, rows = kRows<D> / 8;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, q = lane % 4;
  const int64_t head = blockIdx.x, first = int64_t{blockIdx.y} * kQueries;  // of B H: other axes end at 65,535
  const int64_t blocks = cdiv(p.N, kKeys), row = first + kRows<D> * warp + g;
  float out[rows / 2][columns][4] = {};

  load_tile<D, BITS>(p, head, first, 0, blocks, tiles);
  cp_async_commit_group();
  for (int64_t block = 0; block < blocks; ++block) {
    char* const tile = tiles + block % 2 * T::bytes;
    if (block + 1 < blocks) load_tile<D, BITS>(p, head, first, block + 1, blocks, tiles + (block + 1) % 2 * T::bytes);
    cp_async_commit_group();
    uint32_t scale[rows], offset[rows];
    row_scales<BITS, rows>(p, head, row, block, blocks, scale, offset);
    cp_async_wait_group<1>();
    __syncthreads();
    const char* const codes = tile + (kRows<D> * warp + g) * T::code_stride;
#pragma unroll(BITS == 8 ? 1 : 2)  // more spills at D >= 96
    for (int step = 0; step < steps; ++step) {
      uint32_t words[rows];
      for (int i = 0; i < rows; ++i)
        words[i] = *reinterpret_cast<const uint32_t*>(codes + 8 * i * T::code_stride + 4 * (q + 4 * step));
#pragma unroll
      for (int part = 0; part < products; ++part) {
        uint32_t a[rows / 2][4];
        for (int i = 0; i < rows; ++i)  // rows g + 8 i
          for (int k = 0; k < 2; ++k)
            a[i / 2][i % 2 + 2 * k] =
                probabilities(two_codes<BITS>(words[i], BITS == 8 ? k : 2 * part + k), scale[i], offset[i]);
        const char* const values =
            tile + T::value_at(key_of<BITS>(step, part, lane / 8 % 2, lane % 8)) + lane / 16 * 16;
#pragma unroll
        for (int column = 0; column + 1 < columns; column += 2) {
          uint32_t b[4];
          ldmatrix_trans(b, values + 16 * column);
          for (int half = 0; half < rows / 2; ++half) {
            mma_m16n8k16(out[half][column], a[half], b[0], b[1]);
            mma_m16n8k16(out[half][column + 1], a[half], b[2], b[3]);
          }
        }
        if constexpr (columns % 2 == 1) {
          uint32_t b[2];
          ldmatrix_trans(b, values - lane / 16 * 16 + 16 * (columns - 1));
          for (int half = 0; half < rows / 2; ++half) mma_m16n8k16(out[half][columns - 1], a[half], b[0], b[1]);
        }
      }
    }
    __syncthreads();
  }

  for (int i = 0; i < rows; ++i) store_row<D>(p, head, row + 8 * i, q, out[i / 2], i % 2);
}

}  // namespace attnreuse
