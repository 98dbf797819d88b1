// Reuse on Hopper: TMA brings codes and values, wgmma multiplies the values as they lie in shared memory.
#pragma once

#include "reuse.cuh"

namespace attnreuse {

constexpr int kConsumers = 8, kHopperThreads = 384;  // warps of two warpgroups multiply; of a third, one thread copies
constexpr int kChunk = 64;  // columns of V in a row of 128 bytes, which TMA swizzles

// Stages of shared memory, each with the codes of 128 TILES queries and the values of 128 keys.
template <int D, int BITS, int TILES>
struct Stages {
  static constexpr int queries = 128 * TILES, chunks = (D + kChunk - 1) / kChunk;
  static constexpr int code_row = 16 * BITS, codes = queries * code_row;
  static constexpr int chunk = 2 * kChunk * kKeys, bytes = codes + chunks * chunk;
  static constexpr int fitting = TILES == 1 && D <= 64 ? 2 : 1;  // thread blocks on a multiprocessor
  static constexpr int count = 196608 / fitting / bytes < 4 ? 196608 / fitting / bytes : 4;
  static constexpr int registers = fitting == 2 ? 104 : 240;  // of a thread that multiplies; one that copies keeps 24
  static constexpr int shared = count * (bytes + 2 * int{sizeof(Mbarrier)}) + 1024;  // the swizzle counts from 1024
};

// Where TMA's swizzle of rows of `code_row` bytes puts a 32-bit word of codes.
template <int BITS>
__device__ int swizzled(int row, int word) {
  const int at = row * 16 * BITS + 4 * word;
  return at ^ (at >> 7 & (BITS == 8 ? 7 : 3)) << 4;
}

// Codes of keys w, w + 1 for the words (w, w + 1) of a 32-bit one: those of its `part`, which goes to 2 (u8) or 4 (u4).
template <int BITS>
__device__ uint32_t adjacent_codes(uint32_t words, int part) {
  if (BITS == 8) return prmt(words, 0x64646464, part == 0 ? 0x4240 : 0x4341);
  return two_codes<4>(words, part);
}

template <int D, int BITS, int TILES>
__device__ void copy_stages(const TensorMap& codes, const TensorMap& values, const ReuseParams& p, char* shared,
                            Mbarrier* full, Mbarrier* empty) {
  using S = Stages<D, BITS, TILES>;
  const int head = blockIdx.x, first = head * static_cast<int>(p.M) + blockIdx.y * S::queries;
  const int blocks = static_cast<int>(cdiv(p.N, kKeys));
  for (int block = 0; block < blocks; ++block) {
    const int stage = block % S::count;
    char* const to = shared + stage * S::bytes;
    mbarrier_wait_parity(empty + stage, 1 - block / S::count % 2);
    mbarrier_arrive_expect_tx(full + stage, S::bytes);
    cp_async_bulk_tensor(to, codes, full + stage, block * S::code_row, first);
    for (int chunk = 0; chunk < S::chunks; ++chunk)
      cp_async_bulk_tensor(to + S::codes + chunk * S::chunk, values, full + stage, chunk * kChunk, block * kKeys,
                           head % static_cast<int>(p.H), head / static_cast<int>(p.H));
  }
}

// out += a times 16 rows of V, chunk by chunk.
template <int D, int TILES>
__device__ void multiply_values(float (&out)[TILES][D / 8][4], const uint32_t (&a)[TILES][4], const char* rows) {
#pragma unroll
  for (int tile = 0; tile < TILES; ++tile) {
#pragma unroll
    for (int chunk = 0; chunk < D / kChunk; ++chunk)
      wgmma_m64k16<kChunk>(out[tile][chunk * kChunk / 8], a[tile],
                           matrix_descriptor(rows + chunk * 2 * kChunk * kKeys));
    if constexpr (D % kChunk != 0)
      wgmma_m64k16<D % kChunk>(out[tile][D / kChunk * kChunk / 8], a[tile],
                               matrix_descriptor(rows + D / kChunk * 2 * kChunk * kKeys));
  }
}

// Lane (g, q) = (lane / 4, lane % 4) holds rows g and g + 8 of its warp's 16 in each tile of 64, as `reuse_kernel` does,
// and keys in their own order, which is that of the values.
template <int D, int BITS, int TILES>
__device__ void multiply_stages(const ReuseParams& p, const char* shared, Mbarrier* full, Mbarrier* empty) {
  using S = Stages<D, BITS, TILES>;
  constexpr int rows = 2 * TILES, parts = 16 / BITS;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, q = lane % 4;
  const int local = 64 * TILES * (warp / 4) + 16 * (warp % 4) + g;  // row i is this + 64 (i / 2) + 8 (i % 2)
  const int64_t head = blockIdx.x, first = int64_t{blockIdx.y} * S::queries + local, blocks = cdiv(p.N, kKeys);
  const auto row_of = [&](int i) { return first + i / 2 * 64 + i % 2 * 8; };
  float out[TILES][D / 8][4] = {}, lse[rows], maximum[rows];
  const auto load_maxima = [&](int64_t block) {
    for (int i = 0; i < rows; ++i)
      maximum[i] = row_of(i) < p.M ? p.block_max[(head * blocks + block) * p.M + row_of(i)] : -INFINITY;
  };
  for (int i = 0; i < rows; ++i) lse[i] = row_of(i) < p.M ? p.lse[head * p.M + row_of(i)] : 0.0f;
  load_maxima(0);

  for (int64_t block = 0; block < blocks; ++block) {
    const int stage = static_cast<int>(block % S::count);
    const char* const codes = shared + stage * S::bytes;
    uint32_t scale[rows], offset[rows];
    for (int i = 0; i < rows; ++i) scale_codes<BITS>(exp2f(0.5f * (maximum[i] - lse[i])), scale[i], offset[i]);
    if (block + 1 < blocks) load_maxima(block + 1);
    mbarrier_wait_parity(full + stage, static_cast<int>(block / S::count % 2));
    uint32_t a[2][TILES][4];  // one is multiplied while the other is decoded
#pragma unroll
    for (int step = 0; step < BITS / 2; ++step) {
      uint32_t words[TILES][4];
      for (int tile = 0; tile < TILES; ++tile)
        for (int i = 0; i < 4; ++i)
          words[tile][i] = *reinterpret_cast<const uint32_t*>(
              codes + swizzled<BITS>(local + 64 * tile + i % 2 * 8, 8 * step + i / 2 * 4 + q));
#pragma unroll
      for (int part = 0; part < parts; ++part) {
        auto& now = a[(step * parts + part) % 2];
        for (int tile = 0; tile < TILES; ++tile)
          for (int i = 0; i < 4; ++i)
            now[tile][i] = probabilities(adjacent_codes<BITS>(words[tile][i], part), scale[2 * tile + i % 2],
                                         offset[2 * tile + i % 2]);
        wgmma_fence();
        multiply_values<D, TILES>(out, now, codes + S::codes + 2 * kChunk * (16 * step + kKeys / parts * part));
        wgmma_commit_group();
        wgmma_wait_group<1>();
      }
    }
    wgmma_wait_group<0>();
    bar_warp_sync();
    if (lane == 0) mbarrier_arrive(empty + stage);
  }

  for (auto& tile : out)
    for (auto& column : tile)
      for (float& x : column) wgmma_fence_operand(x);
  for (int i = 0; i < rows; ++i) store_row<D>(p, head, row_of(i), q, out[i / 2], i % 2);
}

// `codes`: the map's rows, [B H M, C 16 BITS] bytes; `values`: [B, H, N, D].
template <int D, int BITS, int TILES>
__global__ void __launch_bounds__(kHopperThreads, Stages<D, BITS, TILES>::fitting)
    hopper_kernel(const GRID_CONSTANT TensorMap codes, const GRID_CONSTANT TensorMap values, const ReuseParams p) {
  using S = Stages<D, BITS, TILES>;
  SHARED_MEMORY(memory);
  char* const shared = reinterpret_cast<char*>(memory) + (1024 - shared_address(memory) % 1024) % 1024;
  Mbarrier* const full = reinterpret_cast<Mbarrier*>(shared + S::count * S::bytes);
  Mbarrier* const empty = full + S::count;
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < S::count; ++stage) {
      mbarrier_init(full + stage, 1);
      mbarrier_init(empty + stage, kConsumers);
    }
    fence_mbarrier_init();
  }
  __syncthreads();
  if (threadIdx.x / 32 < kConsumers) {
    setmaxnreg_inc<S::registers>();
    multiply_stages<D, BITS, TILES>(p, shared, full, empty);
  } else {
    setmaxnreg_dec<24>();
    if (threadIdx.x % 128 == 0) copy_stages<D, BITS, TILES>(codes, values, p, shared, full, empty);
  }
}

}  // namespace attnreuse
