// The kernels, for vectors of VECTOR floats; included by one source per instruction set, which names it
// in KERNELS. Vectors are GCC's and Clang's own, so the same lines serve every architecture.

#include "kernels.h"

#include <cstring>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace attnreuse {
namespace {

constexpr int W = VECTOR;
typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef uint8_t vb __attribute__((vector_size(W)));
typedef float unaligned __attribute__((vector_size(W * 4), aligned(4), may_alias));
typedef int16_t shorts __attribute__((vector_size(W * 2), aligned(2), may_alias));
typedef uint8_t bytes __attribute__((vector_size(W), aligned(1), may_alias));

constexpr int kRows = 6;  // query rows of a register tile
constexpr float kNoKey = -1e30f;  // maximum of a block whose keys are all masked

inline vf load(const float* p) { return *reinterpret_cast<const unaligned*>(p); }
inline void store(float* p, vf x) { *reinterpret_cast<unaligned*>(p) = x; }
inline vf splat(float x) { return x - vf{}; }

// out[r, c] += sum_i p[r, i] * v[i, c] for R (1 or 6) rows and C (1 or 2) vectors. Accumulators have names
// of their own: GCC keeps an array of them in memory.
#define EACH_ROW(DO) DO(0) if constexpr (R == 6) { DO(1) DO(2) DO(3) DO(4) DO(5) }
template <int R, int C>
__attribute__((noinline)) void accumulate(const float* p, int64_t ldp, const float* v, int64_t ldv, int64_t n,
                                          float* out, int64_t ldo) {
  vf x0, x1, x2, x3, x4, x5, y0, y1, y2, y3, y4, y5;
#define LOAD(r) x##r = load(out + r * ldo); if constexpr (C == 2) y##r = load(out + r * ldo + W);
#define ADD(r) { const vf a = splat(p[r * ldp]); x##r += a * b0; if constexpr (C == 2) y##r += a * b1; }
#define STORE(r) store(out + r * ldo, x##r); if constexpr (C == 2) store(out + r * ldo + W, y##r);
  EACH_ROW(LOAD)
  for (const float* end = p + n; p < end; ++p, v += ldv) {
    const vf b0 = load(v);
    vf b1 = b0;
    if constexpr (C == 2) b1 = load(v + W);
    EACH_ROW(ADD)
  }
  EACH_ROW(STORE)
#undef LOAD
#undef ADD
#undef STORE
}
#undef EACH_ROW

template <int R>
inline void accumulate_rows(const float* p, int64_t ldp, const float* v, int64_t ldv, int64_t n,
                            float* out, int64_t ldo, int64_t width) {
  int64_t c = 0;
  for (; c + 2 * W <= width; c += 2 * W) accumulate<R, 2>(p, ldp, v + c, ldv, n, out + c, ldo);
  for (; c < width; c += W) accumulate<R, 1>(p, ldp, v + c, ldv, n, out + c, ldo);
}

// out[rows, width] += p[rows, n] v[n, width]; width is a multiple of W.
void multiply(const float* p, int64_t ldp, const float* v, int64_t ldv, int64_t n, float* out, int64_t ldo,
              int64_t rows, int64_t width) {
  int64_t r = 0;
  for (; r + kRows <= rows; r += kRows)
    accumulate_rows<kRows>(p + r * ldp, ldp, v, ldv, n, out + r * ldo, ldo, width);
  for (; r < rows; ++r) accumulate_rows<1>(p + r * ldp, ldp, v, ldv, n, out + r * ldo, ldo, width);
}

// 2^x for x <= 0, to 2 ulp; 0 below 2^-125.
inline vf exp2_of(vf x) {
  const vf floor = splat(-125.0f);
  const vi tiny = x < floor;
  x = (vf)(((vi)x & ~tiny) | ((vi)floor & tiny));
  const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  const vf shifted = x + magic;
  const vf f = x - (shifted - magic);  // in [-0.5, 0.5]
  vf p = splat(1.5353362e-4f);
  p = p * f + splat(1.3398874e-3f);
  p = p * f + splat(9.6184373e-3f);
  p = p * f + splat(5.5503324e-2f);
  p = p * f + splat(2.4022652e-1f);
  p = p * f + splat(6.9314718e-1f);
  p = p * f + splat(1.0f);
  const vi exponent = ((vi)shifted - (vi)magic) << 23;
  return (vf)(((vi)p + exponent) & ~tiny);
}

inline float max_of(vf x) {
  float m = x[0];
  for (int i = 1; i < W; ++i) m = x[i] > m ? x[i] : m;
  return m;
}
inline float sum_of(vf x) {
  float s = 0;
  for (int i = 0; i < W; ++i) s += x[i];
  return s;
}

// The key whose code is the i-th to be unpacked from a block.
inline int key_at(Format format, int i) {
  if (format == Format::u8) return (i >> 1) + 64 * (i & 1);
  if (format == Format::u4) return (i % 64 >> 1) + 64 * (i & 1) + 32 * (i / 64);  // low nibbles, then high ones
  return i;
}

int64_t row_bytes(Format format, int64_t n) {
  if (format == Format::fp32) return 4 * n;
  return padded(n, kBlock) * (format == Format::u8 ? 8 : 4) / 8;
}

// Values of one head as [padded N, padded Dv], rows in the order in which codes are unpacked, zero where none.
void pack_values(const Tensor4& value, int64_t b, int64_t h, const Shape& s, Format order, float* packed) {
  const int64_t width = padded(s.Dv, kAlign);
  const float* from = value.at(b, h);
  for (int64_t i = 0; i < padded(s.N, kBlock); ++i, packed += width) {
    const int64_t n = i / kBlock * kBlock + key_at(order, i % kBlock);
    int64_t d = 0;
    if (n < s.N)
      for (; d < s.Dv; ++d) packed[d] = from[n * value.row + d * value.d];
    for (; d < width; ++d) packed[d] = 0;
  }
}

// Keys of one head as [C, D, 128], zero where none.
void pack_keys(const Tensor4& key, int64_t b, int64_t h, const Shape& s, float* packed) {
  const float* from = key.at(b, h);
  for (int64_t first = 0; first < s.N; first += kBlock)
    for (int64_t d = 0; d < s.D; ++d)
      for (int64_t i = 0; i < kBlock; ++i)
        *packed++ = first + i < s.N ? from[(first + i) * key.row + d * key.d] : 0;
}

inline vf squares(vb codes, float scale) {
  const vf x = __builtin_convertvector(codes, vf);
  return x * x * splat(scale);
}

// Probabilities of 128 codes, in the order of unpacking: code^2 * scale.
inline void unpack(Format format, const uint8_t* codes, float scale, float* p) {
  if (format == Format::u8) {
    for (int i = 0; i < kBlock; i += W) store(p + i, squares(*reinterpret_cast<const bytes*>(codes + i), scale));
    return;
  }
  for (int i = 0; i < kBlock / 2; i += W) {
    const vb pair = *reinterpret_cast<const bytes*>(codes + i);
    store(p + i, squares(pair & 15, scale));
    store(p + 64 + i, squares(pair >> 4, scale));
  }
}

// 16-bit words of 128 codes, one in each of `codes`.
inline void pack_codes(Format format, const int16_t* codes, uint8_t* words) {
  uint16_t made[kBlock / 2];
  if (format == Format::u8) {
    for (int w = 0; w < 64; ++w) made[w] = static_cast<uint16_t>(codes[w] | codes[w + 64] << 8);
    std::memcpy(words, made, 128);
  } else {
    for (int w = 0; w < 32; ++w)
      made[w] = static_cast<uint16_t>(codes[w] | codes[w + 32] << 4 | codes[w + 64] << 8 | codes[w + 96] << 12);
    std::memcpy(words, made, 64);
  }
}

void write_out(const float* from, int64_t width, int64_t rows, int64_t dv, float* out, int64_t stride) {
  for (int64_t r = 0; r < rows; ++r) std::memcpy(out + r * stride, from + r * width, dv * sizeof(float));
}

void reuse(const ReuseArgs& a) {
  const Shape& s = a.shape;
  const int64_t heads = s.B * s.H, width = padded(s.Dv, kAlign), used = padded(s.Dv, W);
  const int64_t tiles = (s.M + kTile - 1) / kTile;
  const int64_t packed = padded(s.N, kBlock) * width, blocks = padded(s.N, kBlock) / kBlock;
  const int64_t bytes = row_bytes(a.map.format, s.N);
#pragma omp parallel num_threads(a.threads)
  {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < heads; ++i)
      pack_values(a.value, i / s.H, i % s.H, s, a.map.format, a.workspace + i * packed);
    float p[kTile * kBlock];
    float out[kTile * 256];
#pragma omp for schedule(dynamic)
    for (int64_t job = 0; job < heads * tiles; ++job) {
      const int64_t i = job / tiles, first = job % tiles * kTile;
      const int64_t rows = first + kTile <= s.M ? kTile : s.M - first;
      const uint8_t* codes = a.map.codes + (i * s.M + first) * bytes;
      const float* values = a.workspace + i * packed;
      std::memset(out, 0, rows * width * sizeof(float));
      if (a.map.format == Format::fp32) {
        for (int64_t c = 0; c < blocks; ++c) {  // in blocks, so that values stay in the cache
          const int64_t n = c * kBlock + kBlock <= s.N ? kBlock : s.N - c * kBlock;
          multiply(reinterpret_cast<const float*>(codes) + c * kBlock, s.N, values + c * kBlock * width, width, n, out,
                   width, rows, used);
        }
      } else {
        const float levels = a.map.format == Format::u8 ? 255.0f : 15.0f;
        const int64_t step = bytes / blocks;
        for (int64_t c = 0; c < blocks; ++c) {
          const float* maxima = a.map.block_max + (i * blocks + c) * s.M + first;
          for (int64_t r = 0; r < rows; ++r) {
            const float scale = __builtin_exp2f(maxima[r] - a.map.lse[i * s.M + first + r]) / (levels * levels);
            unpack(a.map.format, codes + r * bytes + c * step, scale, p + r * kBlock);
          }
          multiply(p, kBlock, values + c * kBlock * width, width, kBlock, out, width, rows, used);
        }
      }
      write_out(out, width, rows, s.Dv, a.out + i / s.H * a.out_b + i % s.H * a.out_h + first * a.out_m, a.out_m);
    }
  }
}

// A tile of query rows on its way over the keys.
struct Tile {
  float query[kTile * 256];     // [rows, D], times scale
  float scores[kTile * kBlock];  // of a block, then its probabilities relative to the block's maximum
  float partial[kTile * 256];   // of a block's output
  float out[kTile * 256];
  float top[kTile], sum[kTile];  // running maximum, and sum relative to it
  float* blocks;                 // [rows, C], maxima of the blocks of an fp32 map, which has no place for them
};

inline int thread_number() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

void mask_scores(const CaptureArgs& a, int64_t b, int64_t h, int64_t m, int64_t first, int64_t n, float* scores) {
  constexpr float kLog2e = 1.44269504f;
  if (a.mask.data) {
    const float* mask = a.mask.at(b, h) + m * a.mask.row + first * a.mask.d;
    for (int64_t i = 0; i < n; ++i) scores[i] += kLog2e * mask[i * a.mask.d];
  }
  for (int64_t i = n; i < kBlock; ++i) scores[i] = -__builtin_inff();
}

// Scores of a row to probabilities relative to their maximum, which is returned, with their sum; codes on the way.
inline float block_softmax(Format format, float* scores, uint8_t* codes, float* sum) {
  vf most = load(scores);
  for (int i = W; i < kBlock; i += W) {
    const vf x = load(scores + i);
    const vi more = x > most;
    most = (vf)(((vi)x & more) | ((vi)most & ~more));
  }
  float top = max_of(most);
  top = top > kNoKey ? top : kNoKey;
  vf total = splat(0.0f);
  if (format == Format::fp32) {
    for (int i = 0; i < kBlock; i += W) {
      const vf t = exp2_of(load(scores + i) - splat(top));
      total += t;
      store(scores + i, t);
    }
  } else {
    int16_t rounded[kBlock];
    const vf levels = splat(format == Format::u8 ? 255.0f : 15.0f), half = splat(0.5f);
    for (int i = 0; i < kBlock; i += W) {
      const vf t = exp2_of((load(scores + i) - splat(top)) * half);
      const vi code = __builtin_convertvector(t * levels + half, vi);
      *reinterpret_cast<shorts*>(rounded + i) = __builtin_convertvector(code, shorts);
      total += t * t;
      store(scores + i, t * t);
    }
    pack_codes(format, rounded, codes);
  }
  *sum = sum_of(total);
  return top;
}

void capture_tile(const CaptureArgs& a, int64_t i, int64_t first, int64_t rows, const float* keys, const float* values,
                  Tile& t) {
  const Shape& s = a.shape;
  const int64_t width = padded(s.Dv, kAlign), used = padded(s.Dv, W), blocks = padded(s.N, kBlock) / kBlock;
  const int64_t b = i / s.H, h = i % s.H;
  const int64_t bytes = row_bytes(a.map.format, s.N);
  const bool plain = a.map.format == Format::fp32;
  uint8_t* codes = a.map.codes + (i * s.M + first) * bytes;
  const float* query = a.query.at(b, h) + first * a.query.row;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t d = 0; d < s.D; ++d) t.query[r * s.D + d] = a.scale * query[r * a.query.row + d * a.query.d];
    t.top[r] = kNoKey;
    t.sum[r] = 0;
  }
  std::memset(t.out, 0, rows * width * sizeof(float));
  for (int64_t c = 0; c < blocks; ++c) {
    const int64_t n = c * kBlock + kBlock <= s.N ? kBlock : s.N - c * kBlock;
    std::memset(t.scores, 0, rows * kBlock * sizeof(float));
    multiply(t.query, s.D, keys + c * s.D * kBlock, kBlock, s.D, t.scores, kBlock, rows, kBlock);
    float old[kTile], now[kTile];  // factors of what is there, and of what comes
    for (int64_t r = 0; r < rows; ++r) {
      float* scores = t.scores + r * kBlock;
      if (a.mask.data || n < kBlock) mask_scores(a, b, h, first + r, c * kBlock, n, scores);
      float sum;
      const float top = block_softmax(a.map.format, scores, codes + r * bytes + (plain ? 0 : c * (bytes / blocks)), &sum);
      const float most = top > t.top[r] ? top : t.top[r];
      old[r] = __builtin_exp2f(t.top[r] - most);
      now[r] = __builtin_exp2f(top - most);
      t.top[r] = most;
      t.sum[r] = t.sum[r] * old[r] + sum * now[r];
      if (plain) {
        std::memcpy(reinterpret_cast<float*>(codes + r * bytes) + c * kBlock, scores, n * sizeof(float));
        t.blocks[r * blocks + c] = top;
      } else {
        a.map.block_max[(i * blocks + c) * s.M + first + r] = top;
      }
    }
    std::memset(t.partial, 0, rows * width * sizeof(float));
    multiply(t.scores, kBlock, values + c * kBlock * width, width, kBlock, t.partial, width, rows, used);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t d = 0; d < width; ++d)
        t.out[r * width + d] = t.out[r * width + d] * old[r] + t.partial[r * width + d] * now[r];
  }
  for (int64_t r = 0; r < rows; ++r) {
    const float inverse = t.sum[r] > 0 ? 1 / t.sum[r] : 0;
    for (int64_t d = 0; d < width; ++d) t.out[r * width + d] *= inverse;
    if (!plain) {
      a.map.lse[i * s.M + first + r] = t.sum[r] > 0 ? t.top[r] + __builtin_log2f(t.sum[r]) : __builtin_inff();
      continue;
    }
    float* row = reinterpret_cast<float*>(codes + r * bytes);
    for (int64_t c = 0; c < blocks; ++c) {
      const float factor = inverse * __builtin_exp2f(t.blocks[r * blocks + c] - t.top[r]);
      const int64_t n = c * kBlock + kBlock <= s.N ? kBlock : s.N - c * kBlock;
      for (int64_t j = 0; j < n; ++j) row[c * kBlock + j] *= factor;
    }
  }
  write_out(t.out, width, rows, s.Dv, a.out + b * a.out_b + h * a.out_h + first * a.out_m, a.out_m);
}

void capture(const CaptureArgs& a) {
  const Shape& s = a.shape;
  const int64_t heads = s.B * s.H, tiles = (s.M + kTile - 1) / kTile;
  const int64_t values = padded(s.N, kBlock) * padded(s.Dv, kAlign), keys = padded(s.N, kBlock) * s.D;
  float* packed_keys = a.workspace + heads * values;
#pragma omp parallel num_threads(a.threads)
  {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < heads; ++i) {
      pack_values(a.value, i / s.H, i % s.H, s, Format::fp32, a.workspace + i * values);
      pack_keys(a.key, i / s.H, i % s.H, s, packed_keys + i * keys);
    }
    Tile tile;
    tile.blocks = packed_keys + heads * keys + thread_number() * kTile * (padded(s.N, kBlock) / kBlock);
#pragma omp for schedule(dynamic)
    for (int64_t job = 0; job < heads * tiles; ++job) {
      const int64_t i = job / tiles, first = job % tiles * kTile;
      const int64_t rows = first + kTile <= s.M ? kTile : s.M - first;
      capture_tile(a, i, first, rows, packed_keys + i * keys, a.workspace + i * values, tile);
    }
  }
}

}  // namespace

const Kernels KERNELS = {NAME, capture, reuse};

}  // namespace attnreuse
