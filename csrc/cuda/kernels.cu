// Host side of reuse for every architecture.

#include "kernels.h"
#include "launch.h"
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

std::string reuse_unserved(int head_dim, int bits, int device) {
  const ReuseKernel kernel = reuse_kernel_of(head_dim, bits);
  if (!kernel.run) return kNoKernel;
  use(device);
  const std::string no_code = no_code_of(reinterpret_cast<const void*>(kernel.run), device);
  if (!no_code.empty()) return no_code;
  const int most = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (kernel.shared_bytes > most)
    return "it needs " + std::to_string(kernel.shared_bytes) + " bytes of shared memory, this device has " +
           std::to_string(most);
  return "";
}

void launch_reuse(const ReuseParams& params, int64_t batch, int head_dim, int bits, int device, void* stream) {
  use(device);
  const ReuseKernel kernel = reuse_kernel_of(head_dim, bits);
  check(cudaFuncSetAttribute(kernel.run, cudaFuncAttributeMaxDynamicSharedMemorySize, kernel.shared_bytes),
        "reuse kernel");
  const dim3 grid(static_cast<unsigned>(batch * params.H), blocks_for(params.M, kQueries));
  kernel.run<<<grid, kernel.threads, kernel.shared_bytes, static_cast<cudaStream_t>(stream)>>>(params);
  check(cudaGetLastError(), "reuse kernel");
}

}  // namespace attnreuse
