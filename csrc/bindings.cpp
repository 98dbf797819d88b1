// attnreuse._native: the one pybind11 file. Raw pointers, sizes and a stream cross this boundary, never torch.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#ifdef ATTNREUSE_CUDA_ARCHS
#include "cuda/devices.h"
#endif

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

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "Compiled part of attnreuse";
  m.def("build_info", &build_info, "Compiler and CUDA architectures of this build.");
  m.def("cuda_devices", &cuda_devices, "Names and compute capabilities of the CUDA devices this build can use.");
}
