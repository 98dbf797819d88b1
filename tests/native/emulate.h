// A GPU's thread block on a CPU: each thread a fiber that runs until it waits, the last one first and the first one first in
// turns, so that what a missing barrier leaves unwritten is read. With barriers, the warp's instructions as the PTX manual
// lays their fragments out, asynchronous copies that arrive only when waited for, and of Hopper TMA's boxes, barriers and
// products of warpgroups, which are done at once. Slow; for small shapes.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <ucontext.h>
#include <vector>

#define __global__
#define __device__
#define __launch_bounds__(...)
#define SHARED_MEMORY(name) char* const name = emulated::block->shared.data()
#define GRID_CONSTANT

struct Index {
  unsigned x, y;
};
inline Index threadIdx, blockIdx;

namespace emulated {

constexpr int most_waits = 10'000;  // turns of a thread at one barrier: far more than any kernel here needs

void pause();  // until the other threads have had their turn

template <class Ended>
void wait(const Ended& ended, const int& arrived, int expected, const int& bytes) {
  for (int waits = 0; !ended(); pause())
    if (++waits > most_waits) {
      std::printf("a barrier waits for ever: %d of %d arrived, %d bytes to come\n", arrived, expected, bytes);
      std::fflush(stdout);
      std::_Exit(1);
    }
}

struct Barrier {
  explicit Barrier(int threads) : expected(threads) {}
  void arrive_and_wait() {
    const int mine = phase;
    if (++arrived == expected) arrived = 0, ++phase;
    wait([&] { return phase != mine; }, arrived, expected, 0);
  }
  int expected, arrived = 0, phase = 0;
};
struct Warp {
  Barrier meet{32};
  uint32_t words[32][8];
  const char* rows[32];
};
struct Group {  // warpgroup
  Barrier meet{128};
  uint32_t words[128][4];
};
struct Phases {  // of a barrier in shared memory
  int expected = 0, arrived = 0, bytes = 0, phase = 0;
  std::vector<std::function<void()>> arriving;  // done by who waits for it
};
struct Block {
  Block(int threads, size_t bytes) : meet(threads), shared(bytes, '\xff'), warps(threads / 32), groups(threads / 128) {
    for (auto& warp : warps) warp = std::make_unique<Warp>();
    for (auto& group : groups) group = std::make_unique<Group>();
  }
  Barrier meet;
  std::vector<char> shared;  // NaN until written
  std::vector<std::unique_ptr<Warp>> warps;
  std::vector<std::unique_ptr<Group>> groups;
  std::map<const void*, Phases> barriers;
};
struct Copy {
  void* to;
  const void* from;
  bool valid;
};
struct Thread {
  ucontext_t at;
  std::vector<char> stack = std::vector<char>(1 << 16);
  bool done = false;
  std::deque<std::vector<Copy>> groups;
  std::vector<Copy> group;
};
inline Block* block = nullptr;
inline Thread* thread = nullptr;
inline ucontext_t scheduler;
inline const std::function<void()>* running = nullptr;

inline void pause() { swapcontext(&thread->at, &scheduler); }

inline Warp& warp() { return *block->warps[threadIdx.x / 32]; }
inline int lane() { return static_cast<int>(threadIdx.x % 32); }

inline void run_thread() {
  (*running)();
  thread->done = true;
}

// Every thread of every block of the grid; `bytes` of shared memory.
inline void launch(Index grid, int threads, size_t bytes, const std::function<void()>& kernel) {
  running = &kernel;
  for (unsigned i = 0; i < grid.x * grid.y; ++i) {
    Block here(threads, bytes);
    std::vector<Thread> all(threads);
    block = &here, blockIdx = {i % grid.x, i / grid.x};
    for (Thread& made : all) {
      getcontext(&made.at);
      made.at.uc_stack.ss_sp = made.stack.data(), made.at.uc_stack.ss_size = made.stack.size();
      made.at.uc_link = &scheduler;
      makecontext(&made.at, run_thread, 0);
    }
    int left = threads;
    for (int pass = 0; left > 0; ++pass)
      for (int i = 0; i < threads; ++i) {
        const int turn = pass % 2 ? i : threads - 1 - i;
        if (all[turn].done) continue;
        thread = &all[turn], threadIdx.x = static_cast<unsigned>(turn);
        swapcontext(&scheduler, &thread->at);
        left -= thread->done;
      }
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

// A tensor map: sizes and strides in elements and bytes, innermost first; `swizzle` of the 16-byte units of 128 bytes.
struct Boxes {
  const char* base;
  int rank, element, swizzle;
  int64_t sizes[4], strides[4];
  int box[4];
};
constexpr uint32_t first_address = 512;  // of shared memory: at no multiple of 1024

inline uint32_t swizzled(uint32_t address, int bits) { return address ^ (address >> 7 & ((1u << bits) - 1)) << 4; }

}  // namespace emulated

inline void __syncthreads() { emulated::block->meet.arrive_and_wait(); }

namespace attnreuse {

inline uint32_t prmt(uint32_t a, uint32_t b, uint32_t selector) {
  uint32_t made = 0;
  for (int i = 0; i < 4; ++i) {
    const int at = selector >> 4 * i & 7;
    made |= ((at < 4 ? a >> 8 * at : b >> 8 * (at - 4)) & 255) << 8 * i;
  }
  return made;
}
inline uint32_t cvt_f16x2(float low, float high) { return emulated::pair_of(low, high); }
inline uint32_t cvt_f16x2(float x) { return cvt_f16x2(x, x); }
inline uint32_t fma_f16x2(uint32_t a, uint32_t b, uint32_t c) {
  double d[2];
  for (int i = 0; i < 2; ++i)
    d[i] = double(emulated::half_at(a, i)) * double(emulated::half_at(b, i)) + double(emulated::half_at(c, i));
  return emulated::pair_of(d[0], d[1]);
}
inline uint32_t mul_f16x2(uint32_t a, uint32_t b) { return fma_f16x2(a, b, 0); }

inline void bar_warp_sync() { emulated::warp().meet.arrive_and_wait(); }

inline void cp_async(void* shared, const void* global, bool valid) {
  emulated::thread->group.push_back({shared, global, valid});
}
inline void cp_async_commit_group() {
  emulated::thread->groups.push_back(std::move(emulated::thread->group));
  emulated::thread->group.clear();
}
template <int N>
void cp_async_wait_group() {
  auto& groups = emulated::thread->groups;
  for (; groups.size() > N; groups.pop_front())
    for (const emulated::Copy& copy : groups.front()) {
      std::memset(copy.to, 0, 16);
      if (copy.valid) std::memcpy(copy.to, copy.from, 16);
    }
}

template <int COUNT>
void ldmatrix_trans(uint32_t (&to)[COUNT], const void* row) {
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

inline void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
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

using TensorMap = emulated::Boxes;
using Mbarrier = uint64_t;

inline uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(static_cast<const char*>(shared) - emulated::block->shared.data()) +
         emulated::first_address;
}
inline char* shared_at(uint32_t address) { return emulated::block->shared.data() + address - emulated::first_address; }

inline void mbarrier_init(Mbarrier* barrier, int arrivals) {
  emulated::block->barriers[barrier].expected = arrivals;
}
inline void fence_mbarrier_init() {}
inline void mbarrier_arrive_expect_tx(Mbarrier* barrier, int bytes) {
  emulated::Phases& phases = emulated::block->barriers.at(barrier);
  phases.bytes += bytes;
  ++phases.arrived;
}
inline void mbarrier_arrive(Mbarrier* barrier) { mbarrier_arrive_expect_tx(barrier, 0); }
inline void mbarrier_wait_parity(Mbarrier* barrier, int parity) {
  emulated::Phases& phases = emulated::block->barriers.at(barrier);
  const auto ended = [&] {
    for (const auto& copy : phases.arriving) copy();
    phases.arriving.clear();
    if (phases.arrived == phases.expected && phases.bytes == 0) ++phases.phase, phases.arrived = 0;
    return phases.phase % 2 != parity;
  };
  emulated::wait(ended, phases.arrived, phases.expected, phases.bytes);
}

inline void cp_async_bulk_tensor(void* shared, const TensorMap& map, Mbarrier* barrier, int x0, int x1, int x2 = 0,
                                 int x3 = 0) {
  emulated::Block* const block = emulated::block;
  const std::array<int, 4> start{x0, x1, x2, x3};
  const uint32_t to = shared_address(shared);
  const auto copy = [=, &map] {
    int done = 0;
    for (int i3 = 0; i3 < map.box[3]; ++i3)
      for (int i2 = 0; i2 < map.box[2]; ++i2)
        for (int i1 = 0; i1 < map.box[1]; ++i1)
          for (int i0 = 0; i0 < map.box[0]; ++i0, done += map.element) {
            const int64_t at[4] = {start[0] + i0, start[1] + i1, start[2] + i2, start[3] + i3};
            const char* from = map.base;
            bool inside = true;
            for (int axis = 0; axis < map.rank; ++axis)
              inside = inside && at[axis] < map.sizes[axis], from += at[axis] * map.strides[axis];
            char* const here = shared_at(emulated::swizzled(to + done, map.swizzle));
            std::memset(here, 0, map.element);
            if (inside) std::memcpy(here, from, map.element);
          }
    block->barriers.at(barrier).bytes -= done;
  };
  block->barriers.at(barrier).arriving.push_back(copy);
}

template <int N>
void setmaxnreg_inc() {}
template <int N>
void setmaxnreg_dec() {}
inline void wgmma_fence() {}
inline void wgmma_commit_group() {}
template <int N>
void wgmma_wait_group() {}
inline void wgmma_fence_operand(float&) {}

template <int N>
void wgmma_m64k16(float* c, const uint32_t (&a)[4], uint64_t b) {
  emulated::Group& group = *emulated::block->groups[threadIdx.x / 128];
  const int thread = static_cast<int>(threadIdx.x % 128), g = thread % 32 / 4, q = thread % 4;
  std::copy(a, a + 4, group.words[thread]);
  group.meet.arrive_and_wait();
  const auto start = static_cast<uint32_t>(b & 0x3fff) << 4, eight_rows = static_cast<uint32_t>(b >> 32 & 0x3fff) << 4;
  const int swizzle = b >> 62 == 1 ? 3 : b >> 62 == 2 ? 2 : 1;  // of 128, 64 and 32 bytes
  for (int i = 0; i < N / 2; ++i) {
    const int row = g + i / 2 % 2 * 8, column = i / 4 * 8 + 2 * q + i % 2;
    for (int k = 0; k < 16; ++k) {
      const uint32_t from_a = group.words[thread / 32 * 32 + row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2];
      const uint32_t address = start + k / 8 * eight_rows + k % 8 * 128 + 2 * column;  // rows of 128 bytes
      uint16_t bits;
      std::memcpy(&bits, shared_at(emulated::swizzled(address, swizzle)), 2);
      c[i] += float(emulated::half_at(from_a, k % 2)) * float(emulated::half_at(bits, 0));
    }
  }
  group.meet.arrive_and_wait();
}

}  // namespace attnreuse
