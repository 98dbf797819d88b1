// A GPU's thread block on a CPU: one thread each, with barriers, the warp's instructions as the PTX manual lays their
// fragments out, and asynchronous copies that arrive only when waited for. Slow; for small shapes.
#pragma once

#include <algorithm>
#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __launch_bounds__(threads)
#define SHARED_MEMORY(name) char* const name = emulated::block->shared.data()

struct dim3 {
  unsigned x = 1, y = 1;
};
inline thread_local dim3 threadIdx, blockIdx, blockDim;

namespace emulated {

struct Warp {
  std::barrier<> meet{32};
  uint32_t words[32][8];
  const char* rows[32];
  float numbers[32];
};
struct Block {
  Block(int threads, size_t bytes) : meet(threads), shared(bytes, '\xff'), warps(threads / 32) {
    for (auto& warp : warps) warp = std::make_unique<Warp>();
  }
  std::barrier<> meet;
  std::vector<char> shared;  // NaN until written
  std::vector<std::unique_ptr<Warp>> warps;
};
struct Copy {
  void* to;
  const void* from;
  bool valid;
};
inline thread_local Block* block = nullptr;
inline thread_local std::deque<std::vector<Copy>> groups;
inline thread_local std::vector<Copy> group;

inline Warp& warp() { return *block->warps[threadIdx.x / 32]; }
inline int lane() { return static_cast<int>(threadIdx.x % 32); }

// Every thread of every block of the grid; `bytes` of shared memory.
inline void launch(dim3 grid, int threads, size_t bytes, const std::function<void()>& kernel) {
  for (unsigned y = 0; y < grid.y; ++y)
    for (unsigned x = 0; x < grid.x; ++x) {
      Block here(threads, bytes);
      std::vector<std::thread> running;
      for (int i = 0; i < threads; ++i)
        running.emplace_back([&, i] {
          block = &here;
          threadIdx = {static_cast<unsigned>(i), 0}, blockIdx = {x, y}, blockDim = {static_cast<unsigned>(threads), 1};
          kernel();
        });
      for (auto& thread : running) thread.join();
    }
}

inline _Float16 half_at(uint32_t pair, int i) {
  const auto bits = static_cast<uint16_t>(pair >> 16 * i);
  _Float16 x;
  std::memcpy(&x, &bits, 2);
  return x;
}
inline uint32_t pair_of(double low, double high) {
  const _Float16 both[2] = {static_cast<_Float16>(low), static_cast<_Float16>(high)};
  uint32_t pair;
  std::memcpy(&pair, both, 4);
  return pair;
}

}  // namespace emulated

inline void __syncthreads() { emulated::block->meet.arrive_and_wait(); }

namespace attnreuse {

inline uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
  uint32_t made = 0;
  for (int i = 0; i < 4; ++i) {
    const int at = selector >> 4 * i & 7;
    made |= ((at < 4 ? a >> 8 * at : b >> 8 * (at - 4)) & 255) << 8 * i;
  }
  return made;
}
inline uint32_t pair_half(float low, float high) { return emulated::pair_of(low, high); }
inline uint32_t twice_half(float x) { return pair_half(x, x); }
inline uint32_t fma_half(uint32_t a, uint32_t b, uint32_t c) {
  double d[2];
  for (int i = 0; i < 2; ++i)
    d[i] = double(emulated::half_at(a, i)) * double(emulated::half_at(b, i)) + double(emulated::half_at(c, i));
  return emulated::pair_of(d[0], d[1]);
}
inline uint32_t multiply_half(uint32_t a, uint32_t b) { return fma_half(a, b, 0); }
inline float float_of(uint16_t half) { return emulated::half_at(half, 0); }

inline float sum_over_warp(float x) {
  emulated::Warp& warp = emulated::warp();
  warp.numbers[emulated::lane()] = x;
  warp.meet.arrive_and_wait();
  float sum = 0;
  for (float number : warp.numbers) sum += number;
  warp.meet.arrive_and_wait();
  return sum;
}

inline void copy_async(void* shared, const void* global, bool valid) {
  emulated::group.push_back({shared, global, valid});
}
inline void commit_copies() {
  emulated::groups.push_back(std::move(emulated::group));
  emulated::group.clear();
}
template <int N>
void wait_for_copies() {
  for (; emulated::groups.size() > N; emulated::groups.pop_front())
    for (const emulated::Copy& copy : emulated::groups.front()) {
      std::memset(copy.to, 0, 16);
      if (copy.valid) std::memcpy(copy.to, copy.from, 16);
    }
}

template <int COUNT>
void load_matrices(uint32_t (&to)[COUNT], const void* row) {
  emulated::Warp& warp = emulated::warp();
  const int lane = emulated::lane(), g = lane / 4, q = lane % 4;
  warp.rows[lane] = static_cast<const char*>(row);
  warp.meet.arrive_and_wait();
  for (int i = 0; i < COUNT; ++i) {
    uint16_t two[2];
    for (int j = 0; j < 2; ++j) std::memcpy(&two[j], warp.rows[8 * i + 2 * q + j] + 2 * g, 2);
    to[i] = two[0] | uint32_t{two[1]} << 16;
  }
  warp.meet.arrive_and_wait();
}

inline void multiply_matrices(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulated::Warp& warp = emulated::warp();
  const int lane = emulated::lane(), g = lane / 4, q = lane % 4;
  std::copy(a, a + 4, warp.words[lane]);
  warp.words[lane][4] = b0, warp.words[lane][5] = b1;
  warp.meet.arrive_and_wait();
  for (int i = 0; i < 4; ++i) {
    const int row = g + i / 2 * 8, column = 2 * q + i % 2;
    for (int k = 0; k < 16; ++k) {
      const uint32_t from_a = warp.words[row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2];
      const uint32_t from_b = warp.words[column * 4 + k % 8 / 2][4 + k / 8];
      c[i] += float(emulated::half_at(from_a, k % 2)) * float(emulated::half_at(from_b, k % 2));
    }
  }
  warp.meet.arrive_and_wait();
}

}  // namespace attnreuse
