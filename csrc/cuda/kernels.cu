// Host side of reuse for every architecture, of conversion and of drift.

#include "kernels.h"
#include "launch.h"
#include "maps.cuh"
#include "reuse.cuh"

namespace attnreuse {
namespace {

struct ReuseKernel {
  void (*run)(ReuseParams);
  int threads, shared_bytes;
};

template <int BITS>
ReuseKernel reuse_kernel_of(int head_dim) {
  switch (head_dim) {
#define HEAD_DIM(D) \
  case D:           \
    return {reuse_kernel<D, BITS>, kThreads<D>, kSharedBytes<D, BITS>};
    HEAD_DIMS(HEAD_DIM)
#undef HEAD_DIM
  }
  return {};
}
ReuseKernel reuse_kernel_of(int head_dim, int bits) {
  return bits == 8 ? reuse_kernel_of<8>(head_dim) : bits == 4 ? reuse_kernel_of<4>(head_dim) : ReuseKernel{};
}

}  // namespace

std::string reuse_unserved(int head_dim, int bits) {
  const ReuseKernel kernel = reuse_kernel_of(head_dim, bits);
  if (!kernel.run) return kNoKernel;
  if (attribute(cudaDevAttrComputeCapabilityMajor) < 8) return "compute capability below 8.0";
  const int most = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  if (kernel.shared_bytes > most)
    return "it needs " + std::to_string(kernel.shared_bytes) + " bytes of shared memory, this device has " +
           std::to_string(most);
  return "";
}

void launch_reuse(const ReuseParams& params, int64_t batch, int head_dim, int bits, void* stream) {
  const ReuseKernel kernel = reuse_kernel_of(head_dim, bits);
  check(cudaFuncSetAttribute(kernel.run, cudaFuncAttributeMaxDynamicSharedMemorySize, kernel.shared_bytes),
        "reuse kernel");
  const dim3 grid(blocks_for(params.M, kQueries), static_cast<unsigned>(batch * params.H));
  kernel.run<<<grid, kernel.threads, kernel.shared_bytes, static_cast<cudaStream_t>(stream)>>>(params);
  check(cudaGetLastError(), "reuse kernel");
}

void launch_convert(const uint16_t* from, uint16_t* to, int64_t blocks, Codes format, void* stream) {
  const auto run = format == Codes::u8   ? convert_kernel<Codes::u8>
                   : format == Codes::u7 ? convert_kernel<Codes::u7>
                                         : convert_kernel<Codes::u4>;
  const int64_t words = blocks * (format == Codes::u4 ? 32 : 64);
  run<<<blocks_for(words, 256), 256, 0, static_cast<cudaStream_t>(stream)>>>(from, to, blocks);
  check(cudaGetLastError(), "convert kernel");
}

void launch_drift(const DriftParams& params, Codes format, void* stream) {
  const auto run = format == Codes::fp16 ? drift_kernel<Codes::fp16>
                   : format == Codes::u8 ? drift_kernel<Codes::u8>
                   : format == Codes::u7 ? drift_kernel<Codes::u7>
                                         : drift_kernel<Codes::u4>;
  run<<<blocks_for(params.rows * 32, 128), 128, 0, static_cast<cudaStream_t>(stream)>>>(params);
  check(cudaGetLastError(), "drift kernel");
}

}  // namespace attnreuse
