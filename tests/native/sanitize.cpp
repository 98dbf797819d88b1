// Random calls of every CPU kernel, for a build with sanitizers: each buffer is just as large as its call needs.

#include "../../csrc/cpu/paths.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

using namespace attnreuse;

namespace {

std::mt19937 random_bits(0);

int64_t between(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(random_bits); }

struct Buffer {
  std::vector<float> data;
  Tensor4 tensor;
};

// [B, H, rows, D], laid out as such or as [B, rows, H, D], each element `spread` from the next.
Buffer random_tensor(int64_t b, int64_t h, int64_t rows, int64_t d) {
  const int64_t spread = between(1, 2);
  Buffer made{std::vector<float>((b * h * rows * d - 1) * spread + 1), {}};
  std::normal_distribution<float> normal;
  for (float& x : made.data) x = normal(random_bits);
  const bool heads_first = between(0, 1);
  made.tensor = {made.data.data(), h * rows * d * spread, (heads_first ? rows * d : d) * spread,
                 (heads_first ? d : h * d) * spread, spread};
  return made;
}

// Relative error of reuse against capture's exact output that each format may have on few keys.
struct Case {
  Format format;
  int bits;
  double error;
};
const Case kCases[] = {{Format::fp32, 32, 1e-5}, {Format::fp16, 16, 1e-3}, {Format::u8, 8, 2e-2},
                       {Format::u7, 8, 6e-2}, {Format::u4, 4, 0.3}};

double difference(const std::vector<float>& found, const std::vector<float>& expected) {
  double off = 0, size = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    off += std::pow(found[i] - expected[i], 2);
    size += std::pow(expected[i], 2);
  }
  return std::sqrt(off / size);
}

// Capture as by the portable path, and reuse of its map as good as the format allows.
bool call(const Kernels& kernels, const Case& chosen) {
  const Shape s{between(1, 2), between(1, 3), between(1, 60), between(1, 300), between(1, 70), between(1, 70)};
  const Buffer query = random_tensor(s.B, s.H, s.M, s.D), key = random_tensor(s.B, s.H, s.N, s.D);
  const Buffer value = random_tensor(s.B, s.H, s.N, s.Dv);
  Buffer mask = random_tensor(1, 1, s.M, s.N);
  mask.tensor.b = mask.tensor.h = 0;
  if (between(0, 1)) mask.tensor.data = nullptr;
  const int64_t blocks = blocks_of(s.N), rows = s.B * s.H * s.M;
  const int64_t row = chosen.format == Format::fp32 ? 4 * s.N : blocks * kBlock * chosen.bits / 8;
  std::vector<uint32_t> codes((rows * row + 3) / 4);  // aligned for floats
  const bool scaled = chosen.format != Format::fp32;
  std::vector<float> maxima(scaled ? rows * blocks : 0), lse(scaled ? rows : 0);
  std::vector<float> exact(rows * s.Dv), reused(rows * s.Dv);
  const Map map{reinterpret_cast<uint8_t*>(codes.data()), maxima.data(), lse.data(), chosen.format};
  const int threads = static_cast<int>(between(1, 3));
  std::vector<float> workspace(capture_workspace(s, threads));
  kernels.capture({s, query.tensor, key.tensor, value.tensor, mask.tensor, 0.3f, map, exact.data(), s.H * s.M * s.Dv,
                   s.M * s.Dv, s.Dv, workspace.data(), threads});
  workspace = std::vector<float>(reuse_workspace(s));
  kernels.reuse({s, map, value.tensor, reused.data(), s.H * s.M * s.Dv, s.M * s.Dv, s.Dv, workspace.data(), threads});
  std::vector<float> plain(exact.size());
  workspace = std::vector<float>(capture_workspace(s, threads));
  portable_kernels.capture({s, query.tensor, key.tensor, value.tensor, mask.tensor, 0.3f, map, plain.data(),
                            s.H * s.M * s.Dv, s.M * s.Dv, s.Dv, workspace.data(), threads});
  const double captured = difference(exact, plain), applied = difference(reused, exact);
  const bool close = captured <= 1e-5 && applied <= chosen.error;  // false for NaN
  if (!close)
    std::printf("%s, %d bits: errors %g and %g at B %ld H %ld M %ld N %ld D %ld Dv %ld\n", kernels.name, chosen.bits,
                captured, applied, long(s.B), long(s.H), long(s.M), long(s.N), long(s.D), long(s.Dv));
  return close;
}

}  // namespace

int main(int argc, char** argv) {
  const int calls = argc > 1 ? std::atoi(argv[1]) : 20;
  bool good = true;
  for (const Kernels* kernels : paths()) {
    for (const Case& chosen : kCases)
      for (int i = 0; i < calls; ++i) good &= call(*kernels, chosen);
    std::printf("%s: %d calls of each format\n", kernels->name, calls);
  }
  return good ? 0 : 1;
}
