// Host side of reuse on Hopper: tensor maps for TMA, and which size of block serves; compiled for sm_90a alone.

#include "hopper.cuh"

#include <algorithm>
#include <array>

#include "launch.h"

namespace attnreuse {
namespace {

struct HopperKernel {
  void (*run)(TensorMap, TensorMap, ReuseParams);
  int queries, code_row, shared_bytes;
};

template <int D, int BITS, int TILES>
HopperKernel hopper_kernel_of() {
  using S = Stages<D, BITS, TILES>;
  return {hopper_kernel<D, BITS, TILES>, S::queries, S::code_row, S::shared};
}

// The kernel of large blocks reads values half as often.
template <int BITS>
HopperKernel hopper_kernel_of(int head_dim, bool large) {
  switch (head_dim) {
#define HEAD_DIM(D) \
  case D:           \
    return large ? hopper_kernel_of<D, BITS, 2>() : hopper_kernel_of<D, BITS, 1>();
    HEAD_DIMS(HEAD_DIM)
#undef HEAD_DIM
  }
  return {};
}
HopperKernel hopper_kernel_of(int head_dim, int bits, bool large) {
  return bits == 8   ? hopper_kernel_of<8>(head_dim, large)
         : bits == 4 ? hopper_kernel_of<4>(head_dim, large)
                     : HopperKernel{};
}

// The driver's function, which no library here links; null where the driver has none.
auto encoder() {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult said;
#if CUDART_VERSION >= 12050
  check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &said), "driver");
#else
  check(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &said), "driver");
#endif
  return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found);
}

template <size_t RANK>
TensorMap tensor_map(CUtensorMapDataType type, const void* base, const std::array<cuuint64_t, RANK>& sizes,
                     const std::array<cuuint64_t, RANK - 1>& strides, const std::array<cuuint32_t, RANK>& box,
                     CUtensorMapSwizzle swizzle) {
  static const auto encode = encoder();
  std::array<cuuint32_t, RANK> every;
  every.fill(1);
  TensorMap map;
  const CUresult made =
      encode(&map, type, RANK, const_cast<void*>(base), sizes.data(), strides.data(), box.data(), every.data(),
             CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (made != CUDA_SUCCESS)
    throw std::runtime_error("cuTensorMapEncodeTiled: error " + std::to_string(static_cast<int>(made)));
  return map;
}

TensorMap map_of_codes(const ReuseParams& p, int64_t batch, const HopperKernel& kernel) {
  const cuuint64_t row = blocks_for(p.N, kKeys) * static_cast<cuuint64_t>(kernel.code_row);
  const auto swizzle = kernel.code_row == 128 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B;
  return tensor_map<2>(CU_TENSOR_MAP_DATA_TYPE_UINT8, p.codes, {row, static_cast<cuuint64_t>(batch * p.H * p.M)}, {row},
                       {static_cast<cuuint32_t>(kernel.code_row), static_cast<cuuint32_t>(kernel.queries)}, swizzle);
}

TensorMap map_of_values(const ReuseParams& p, int64_t batch, int head_dim) {
  const auto size = [](int64_t n) { return static_cast<cuuint64_t>(n); };
  const auto stride = [](int64_t n, int64_t elements) { return n == 1 ? cuuint64_t{16} : cuuint64_t(2 * elements); };
  return tensor_map<4>(CU_TENSOR_MAP_DATA_TYPE_FLOAT16, p.value, {size(head_dim), size(p.N), size(p.H), size(batch)},
                       {stride(p.N, p.value_n), stride(p.H, p.value_h), stride(batch, p.value_b)},
                       {kChunk, kKeys, 1, 1}, CU_TENSOR_MAP_SWIZZLE_128B);
}

}  // namespace

std::string hopper_reuse_unserved(int head_dim, int bits, int device) {
  const HopperKernel kernel = hopper_kernel_of(head_dim, bits, true);
  if (!kernel.run) return kNoKernel;
  use(device);
  const std::string no_code = no_code_of(reinterpret_cast<const void*>(kernel.run), device);
  if (!no_code.empty()) return no_code;
  if (!encoder()) return "the driver has no cuTensorMapEncodeTiled (CUDA 12.0 brought it)";
  return "";
}

void launch_hopper_reuse(const ReuseParams& params, int64_t batch, int head_dim, int bits, int device, void* stream) {
  use(device);
  const auto heads = static_cast<unsigned>(batch * params.H);
  HopperKernel kernel = hopper_kernel_of(head_dim, bits, true);
  if (blocks_for(params.M, kernel.queries) * heads < 2u * attribute(cudaDevAttrMultiProcessorCount, device))
    kernel = hopper_kernel_of(head_dim, bits, false);  // more blocks, for every multiprocessor to have some
  check(cudaFuncSetAttribute(kernel.run, cudaFuncAttributeMaxDynamicSharedMemorySize, kernel.shared_bytes),
        "reuse kernel for Hopper");
  const dim3 grid(heads, blocks_for(params.M, kernel.queries));
  kernel.run<<<grid, kHopperThreads, kernel.shared_bytes, static_cast<cudaStream_t>(stream)>>>(
      map_of_codes(params, batch, kernel), map_of_values(params, batch, head_dim), params);
  check(cudaGetLastError(), "reuse kernel for Hopper");
}

}  // namespace attnreuse
