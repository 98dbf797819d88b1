// Instructions that CUDA C++ cannot say, by PTX's names, and a few helpers. `tests/native/emulate.h` gives these to a CPU,
// for tests without a GPU.
#pragma once

#ifdef ATTNREUSE_EMULATE
#include ATTNREUSE_EMULATE
#else

#include <cuda.h>  // types alone: the driver is asked for its functions at run time
#include <cuda_fp16.h>

#include <cstdint>

#define SHARED_MEMORY(name) extern __shared__ uint4 name[]
#define GRID_CONSTANT __grid_constant__

namespace attnreuse {

__device__ inline uint32_t prmt(uint32_t a, uint32_t b, uint32_t selector) {
  return __byte_perm(a, b, selector);
}

// Two fp16 numbers in a register: x twice, a * b + c, a * b.
__device__ inline uint32_t cvt_f16x2(float x) {
  const __half2 both = __float2half2_rn(x);
  return *reinterpret_cast<const uint32_t*>(&both);
}
__device__ inline uint32_t cvt_f16x2(float low, float high) {
  const __half2 both = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&both);
}
__device__ inline uint32_t fma_f16x2(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}
__device__ inline uint32_t mul_f16x2(uint32_t a, uint32_t b) {
  uint32_t d;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}

__device__ inline void bar_warp_sync() { __syncwarp(); }

// 16 bytes from global to shared memory, asynchronously; zeros where not valid.
__device__ inline void cp_async(void* shared, const void* global, bool valid) {
  const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(valid ? 16 : 0) : "memory");
}
__device__ inline void cp_async_commit_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N>
__device__ inline void cp_async_wait_group() {  // all but the N groups committed last
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// 8x8 fp16 matrices, transposed; lane i gives the address of row i % 8 of matrix i / 8.
__device__ inline void ldmatrix_trans(uint32_t (&to)[4], const void* row) {
  const auto from = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(from));
}
__device__ inline void ldmatrix_trans(uint32_t (&to)[2], const void* row) {
  const auto from = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];" : "=r"(to[0]), "=r"(to[1]) : "r"(from));
}

// c += a b for a 16x16, b 16x8, c 16x8: fp16 with fp32 sums.
__device__ inline void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// -- Hopper: barriers in shared memory that count arrivals and bytes, TMA, products of warpgroups (128 threads)

using TensorMap = CUtensorMap;
using Mbarrier = uint64_t;

__device__ inline uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}
__device__ inline void mbarrier_init(Mbarrier* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
__device__ inline void fence_mbarrier_init() {  // to TMA, before __syncthreads publishes them to the block
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ inline void mbarrier_arrive(Mbarrier* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
__device__ inline void mbarrier_arrive_expect_tx(Mbarrier* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}
__device__ inline void mbarrier_wait_parity(Mbarrier* barrier, int parity) {  // until this phase has ended
  uint32_t done;
  do {
    asm volatile(
        "{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
        : "=r"(done)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
  } while (!done);
}

// A box of a tensor to shared memory, zeros outside of the tensor; the barrier counts its bytes.
__device__ inline void cp_async_bulk_tensor(void* shared, const TensorMap& map, Mbarrier* barrier, int x0, int x1) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
          shared_address(shared)),
      "l"(&map), "r"(shared_address(barrier)), "r"(x0), "r"(x1)
      : "memory");
}
__device__ inline void cp_async_bulk_tensor(void* shared, const TensorMap& map, Mbarrier* barrier, int x0, int x1,
                                            int x2, int x3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
      "[%2];" ::"r"(shared_address(shared)),
      "l"(&map), "r"(shared_address(barrier)), "r"(x0), "r"(x1), "r"(x2), "r"(x3)
      : "memory");
}

template <int N>
__device__ inline void setmaxnreg_inc() {  // a whole warpgroup, as the next
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N>
__device__ inline void setmaxnreg_dec() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}

__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void wgmma_commit_group() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N>
__device__ inline void wgmma_wait_group() {  // all but the N groups committed last
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}
__device__ inline void wgmma_fence_operand(float& x) { asm volatile("" : "+f"(x)::"memory"); }  // no read before a wait

// c += a b for a 64x16 (lanes as in `mma_m16n8k16`, 16 rows a warp), b 16xN of fp16 in shared memory, whose rows
// are adjacent elements: see `matrix_descriptor`.
template <int N>
__device__ void wgmma_m64k16(float* c, const uint32_t (&a)[4], uint64_t b);

#define F1(i) "+f"(c[i])
#define F4(i) F1(i), F1(i + 1), F1(i + 2), F1(i + 3)
#define F8(i) F4(i), F4(i + 4)
#define F16(i) F8(i), F8(i + 8)
#define WGMMA(N, C, A, B, ...)                                                                                  \
  template <>                                                                                                   \
  __device__ inline void wgmma_m64k16<N>(float* c, const uint32_t (&a)[4], uint64_t b) {                        \
    asm volatile("{ .reg .pred p; setp.ne.b32 p, 1, 0; wgmma.mma_async.sync.aligned.m64n" #N                    \
                 "k16.f32.f16.f16 {" C "}, {" A "}, " B ", p, 1, 1, 1; }"                                       \
                 : __VA_ARGS__                                                                                  \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                         \
  }
#define C4 "%0, %1, %2, %3"
#define C8 C4 ", %4, %5, %6, %7"
#define C16 C8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define C20 C16 ", %16, %17, %18, %19"
#define C32 C20 ", %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
WGMMA(8, C4, "%4, %5, %6, %7", "%8", F4(0))
WGMMA(16, C8, "%8, %9, %10, %11", "%12", F8(0))
WGMMA(32, C16, "%16, %17, %18, %19", "%20", F16(0))
WGMMA(40, C20, "%20, %21, %22, %23", "%24", F16(0), F4(16))
WGMMA(64, C32, "%32, %33, %34, %35", "%36", F16(0), F16(16))
#undef F1
#undef F4
#undef F8
#undef F16
#undef C4
#undef C8
#undef C16
#undef C20
#undef C32
#undef WGMMA

}  // namespace attnreuse

#endif

namespace attnreuse {

// What `wgmma_m64k16` reads: rows (k) of 128 bytes, 8 of them 1024 bytes, in TMA's 128-byte swizzle.
__device__ inline uint64_t matrix_descriptor(const void* shared) {
  constexpr uint64_t eight_rows = 1024, swizzle_128 = 1;
  return (shared_address(shared) & 0x3ffff) >> 4 | eight_rows >> 4 << 32 | swizzle_128 << 62;
}

}  // namespace attnreuse
