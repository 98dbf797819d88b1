// The CUDA kernels on a CPU (see emulate.h), against what their formats say.

#define ATTNREUSE_EMULATE "../../tests/native/emulate.h"
#include "../../csrc/cuda/hopper.cuh"

#include <cstdio>
#include <random>

using namespace attnreuse;

namespace {

std::mt19937 random_bits(0);
bool good = true;

void expect(double actual, double most, const char* what, int a, int b) {
  if (actual <= most) return;  // NaN fails
  std::printf("%s (%d, %d): %g, expected at most %g\n", what, a, b, actual, most);
  good = false;
}

uint16_t half(float x) { return static_cast<uint16_t>(emulated::pair_of(x, 0)); }

double number(uint16_t half) { return emulated::half_at(half, 0); }

// A map of random codes of BITS bits, the square roots, with its scales; `p` as the format says, [rows, N].
struct Map {
  std::vector<uint16_t> words;
  std::vector<float> block_max, lse;
  std::vector<double> p;
};

template <int BITS>
Map random_map(int heads, int m, int n) {
  constexpr int of_block = 8 * BITS, levels = (1 << BITS) - 1;  // words of a block of 128 keys
  const int blocks = (n + 127) / 128;
  Map map{std::vector<uint16_t>(heads * m * blocks * of_block), std::vector<float>(heads * blocks * m),
          std::vector<float>(heads * m), std::vector<double>(heads * m * n)};
  std::uniform_real_distribution<float> exponent(-8, 0);
  std::uniform_int_distribution<int> drawn(0, levels);
  for (float& x : map.block_max) x = exponent(random_bits);
  for (float& x : map.lse) x = 3 + exponent(random_bits) / 8;
  for (int row = 0; row < heads * m; ++row)
    for (int key = 0; key < n; ++key) {
      const int block = key / 128, word = key % 128 % of_block, field = key % 128 / of_block, code = drawn(random_bits);
      uint16_t& to = map.words[(row * blocks + block) * of_block + word];
      to = static_cast<uint16_t>(to | code << BITS * field);
      const float scale = map.block_max[(row / m * blocks + block) * m + row % m] - map.lse[row];
      map.p[row * n + key] = std::pow(double(code) / levels, 2) * std::exp2(double(scale));
    }
  return map;
}

// Maps of two rows and heads times values [B, N, H, D] to out [B, M, H, D], both NaN where they are not written.
template <int D, int BITS>
struct ReuseCase {
  static constexpr int B = 2, H = 2;
  const int m, n;
  const Map map;
  std::vector<uint16_t> value, out;

  ReuseCase(int m, int n)
      : m(m), n(n), map(random_map<BITS>(B * H, m, n)), value(B * n * H * D),
        out(B * m * H * D, 0x7e00) {
    std::normal_distribution<float> normal;
    for (uint16_t& x : value) x = half(normal(random_bits));
  }

  ReuseParams params() {
    return {reinterpret_cast<const uint8_t*>(map.words.data()), map.block_max.data(), map.lse.data(),
            value.data(), out.data(), n * H * D, D, H * D, m * H * D, D, H * D, H, m, n};
  }

  void check(const char* what) const {
    double off = 0, size = 0;
    for (int row = 0; row < B * H * m; ++row) {
      const int b = row / m / H, h = row / m % H;
      for (int d = 0; d < D; ++d) {
        double expected = 0;
        for (int key = 0; key < n; ++key)
          expected += map.p[row * n + key] * number(value[((b * n + key) * H + h) * D + d]);
        off += std::pow(expected - number(out[((b * m + row % m) * H + h) * D + d]), 2);
        size += expected * expected;
      }
    }
    expect(std::sqrt(off / size), 1.5e-3, what, D, BITS);
  }
};

template <int D, int BITS>
void check_reuse(int m, int n) {
  ReuseCase<D, BITS> given(m, n);
  emulated::launch({4, unsigned(m + kQueries - 1) / kQueries}, kThreads<D>, kSharedBytes<D, BITS>,
                   [&] { reuse_kernel<D, BITS>(given.params()); });
  given.check("reuse");
}

template <int D, int BITS, int TILES>
void check_hopper(int m, int n) {
  using S = Stages<D, BITS, TILES>;
  ReuseCase<D, BITS> given(m, n);
  const ReuseParams p = given.params();
  const int row = (n + kKeys - 1) / kKeys * S::code_row;
  const TensorMap codes{reinterpret_cast<const char*>(p.codes), 2, 1, BITS == 8 ? 3 : 2, {row, 4 * m}, {1, row},
                        {S::code_row, S::queries, 1, 1}};
  const TensorMap values{static_cast<const char*>(p.value), 4, 2, 3, {D, n, p.H, 2},
                         {2, 2 * p.value_n, 2 * p.value_h, 2 * p.value_b}, {kChunk, kKeys, 1, 1}};
  emulated::launch({4, unsigned(m + S::queries - 1) / S::queries}, kHopperThreads, S::shared,
                   [&] { hopper_kernel<D, BITS, TILES>(codes, values, p); });
  given.check("reuse on Hopper");
}

template <int D>
void check_head_dim() {
  check_reuse<D, 8>(150, 200);
  check_reuse<D, 4>(63, 77);
  check_hopper<D, 8, 1>(70, 200);
  check_hopper<D, 4, 2>(63, 77);
}

}  // namespace

int main() {
  check_head_dim<40>(), check_head_dim<64>(), check_head_dim<72>(), check_head_dim<80>();
  check_head_dim<96>(), check_head_dim<128>(), check_head_dim<160>();
  check_reuse<40, 8>(1, 1), check_reuse<64, 4>(129, 257);
  check_hopper<40, 8, 1>(150, 3), check_hopper<64, 8, 2>(129, 700);  // more blocks of keys than stages
  std::puts(good ? "good" : "wrong");
  return good ? 0 : 1;
}
