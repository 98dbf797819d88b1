// attnreuse._native: the one pybind11 file. Raw pointers, sizes and a stream cross this boundary, never torch.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/paths.h"
#ifdef ATTNREUSE_CUDA_ARCHS
#include "cuda/devices.h"
#include "cuda/kernels.h"
#endif

namespace py = pybind11;

namespace {

std::string build_info() {
#if defined(__clang__)
  std::string compiler = "clang " + std::to_string(__clang_major__);
#elif defined(__GNUC__)
  std::string compiler = "gcc " + std::to_string(__GNUC__);
#elif defined(_MSC_VER)
  std::string compiler = "msvc " + std::to_string(_MSC_VER);
#else
  std::string compiler = "unknown compiler";
#endif
#ifdef ATTNREUSE_CUDA_ARCHS
  return compiler + ", CUDA " + attnreuse::cuda_version() + " for sm " + ATTNREUSE_CUDA_ARCHS;
#else
  return compiler + ", without CUDA";
#endif
}

// Names of the CUDA devices this build's runtime sees; empty without CUDA, a driver or a device.
std::vector<std::string> cuda_devices() {
#ifdef ATTNREUSE_CUDA_ARCHS
  return attnreuse::cuda_devices();
#else
  return {};
#endif
}

const attnreuse::Kernels& cpu_kernels_named(const std::string& name) {
  for (const attnreuse::Kernels* kernels : attnreuse::paths())
    if (name == kernels->name) return *kernels;
  throw std::invalid_argument("no CPU kernels named " + name + " run here");
}

using Strided = std::array<int64_t, 5>;  // address, strides of B, H, rows and D in elements
using Output = std::array<int64_t, 4>;   // address, strides of B, H and M
using Sizes = std::array<int64_t, 6>;    // B, H, M, N, D, Dv
using Slot = std::array<int64_t, 3>;     // addresses of codes, block maxima and log-sum-exp

template <typename T>
T* pointer(int64_t address) {
  return reinterpret_cast<T*>(static_cast<intptr_t>(address));
}
attnreuse::Tensor4 tensor(const Strided& t) { return {pointer<const float>(t[0]), t[1], t[2], t[3], t[4]}; }
attnreuse::Shape sizes(const Sizes& s) { return {s[0], s[1], s[2], s[3], s[4], s[5]}; }
const std::vector<std::pair<std::string, attnreuse::Format>> cpu_formats = {{"fp32", attnreuse::Format::fp32},
                                                                           {"fp16", attnreuse::Format::fp16},
                                                                           {"u8", attnreuse::Format::u8},
                                                                           {"u7", attnreuse::Format::u7},
                                                                           {"u4", attnreuse::Format::u4}};

attnreuse::Map slot(const std::string& format, const Slot& s) {
  for (const auto& [name, known] : cpu_formats)
    if (name == format) return {pointer<uint8_t>(s[0]), pointer<float>(s[1]), pointer<float>(s[2]), known};
  throw std::invalid_argument("no CPU kernel for " + format + " maps");
}

void capture(const std::string& path, const Sizes& shape, const Strided& query, const Strided& key,
             const Strided& value, const std::optional<Strided>& mask, float scale, const std::string& format,
             const Slot& map, const Output& out, int64_t workspace, int threads) {
  const attnreuse::CaptureArgs args{sizes(shape), tensor(query), tensor(key), tensor(value),
                                    mask ? tensor(*mask) : attnreuse::Tensor4{}, scale, slot(format, map),
                                    pointer<float>(out[0]), out[1], out[2], out[3], pointer<float>(workspace), threads};
  const attnreuse::Kernels& kernels = cpu_kernels_named(path);
  py::gil_scoped_release release;
  kernels.capture(args);
}

void reuse(const std::string& path, const Sizes& shape, const std::string& format, const Slot& map,
           const Strided& value, const Output& out, int64_t workspace, int threads) {
  const attnreuse::ReuseArgs args{sizes(shape), slot(format, map), tensor(value), pointer<float>(out[0]),
                                  out[1], out[2], out[3], pointer<float>(workspace), threads};
  const attnreuse::Kernels& kernels = cpu_kernels_named(path);
  py::gil_scoped_release release;
  kernels.reuse(args);
}

#ifdef ATTNREUSE_CUDA_ARCHS
template <auto LAUNCH>
void cuda_reuse(const Sizes& s, int bits, const Slot& map, const Strided& value, const Output& out, int device,
                int64_t stream) {
  LAUNCH({pointer<uint8_t>(map[0]), pointer<float>(map[1]), pointer<float>(map[2]), pointer<void>(value[0]),
          pointer<void>(out[0]), value[1], value[2], value[3], out[1], out[2], out[3], s[1], s[2], s[3]},
         s[0], static_cast<int>(s[5]), bits, device, pointer<void>(stream));
}
#endif

std::vector<std::string> cpu_format_names() {
  std::vector<std::string> names;
  for (const auto& [name, format] : cpu_formats) names.push_back(name);
  return names;
}

std::vector<std::string> cpu_paths() {
  std::vector<std::string> names;
  for (const attnreuse::Kernels* kernels : attnreuse::paths()) names.emplace_back(kernels->name);
  return names;
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "Compiled part of attnreuse";
  m.def("build_info", &build_info, "Compiler and CUDA architectures of this build.");
  m.def("cpu_paths", &cpu_paths, "Instruction sets of the CPU kernels that run here, best first.");
  m.def("cpu_formats", &cpu_format_names, "Map formats that the CPU kernels serve.");
  m.def("cpu_workspace", [](const Sizes& shape, int threads) {
    return std::pair(attnreuse::capture_workspace(sizes(shape), threads), attnreuse::reuse_workspace(sizes(shape)));
  }, "Floats of workspace that capture and reuse need.");
  m.def("cpu_capture", &capture, "attnreuse.reference.capture on fp32 tensors, by address and strides.");
  m.def("cpu_reuse", &reuse, "attnreuse.reference.reuse on fp32 tensors, by address and strides.");
  m.def("cpu_multiply_add", [](const std::string& path, int64_t steps, int threads) {
    const attnreuse::Kernels& kernels = cpu_kernels_named(path);
    py::gil_scoped_release release;
    return kernels.multiply_add(steps, threads);
  }, "FLOP done by independent chains of FMAs, to be timed.");
#ifdef ATTNREUSE_CUDA_ARCHS
  m.def("cuda_reuse_unserved", &attnreuse::reuse_unserved, "Why a device cannot reuse such maps, or ''.");
  m.def("cuda_reuse", &cuda_reuse<attnreuse::launch_reuse>,
        "attnreuse.reference.reuse of u8 or u4 maps on fp16 tensors, on a stream.");
#ifdef ATTNREUSE_HOPPER
  m.def("hopper_reuse_unserved", &attnreuse::hopper_reuse_unserved, "Why the kernel for Hopper cannot, or ''.");
  m.def("hopper_reuse", &cuda_reuse<attnreuse::launch_hopper_reuse>, "The same by the kernel for Hopper.");
#endif
#endif
  m.def("cuda_devices", &cuda_devices, "Names and compute capabilities of the CUDA devices this build can use.");
}
