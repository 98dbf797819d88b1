// The kernels, for vectors of VECTOR floats; included by one source per instruction set, which names it
// in KERNELS. Vectors are GCC's and Clang's own, so the same lines serve every architecture; what they
// cannot say is in "instructions" below.

#include "kernels.h"

#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#endif

namespace attnreuse {
namespace {

constexpr int W = VECTOR;
typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef uint32_t vu __attribute__((vector_size(W * 4)));
typedef int16_t vs __attribute__((vector_size(W * 4)));
typedef uint16_t halves __attribute__((vector_size(W * 2), aligned(2), may_alias));
typedef float floats __attribute__((vector_size(W * 4), aligned(4), may_alias));
typedef int32_t ints __attribute__((vector_size(W * 4), aligned(4), may_alias));

constexpr float kNoKey = -1e30f;  // maximum of a block whose keys are all masked
constexpr float kLog2e = 1.44269504f;
constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, which is in the low bits

inline vf load(const float* p) { return *reinterpret_cast<const floats*>(p); }
inline void store(float* p, vf x) { *reinterpret_cast<floats*>(p) = x; }
inline vi load(const int32_t* p) { return *reinterpret_cast<const ints*>(p); }
inline void store(int32_t* p, vi x) { *reinterpret_cast<ints*>(p) = x; }
inline vf splat(float x) { return x - vf{}; }
inline vi splat(int32_t x) { return x - vi{}; }
inline vf larger(vf x, vf y) { return x > y ? x : y; }  // y where one is NaN

// -- instructions

// acc + p * v summed over the two 16-bit integers of each lane.
inline vi dot2(vi acc, vi p, vi v) {
#if defined(VNNI)
  return (vi)_mm512_dpwssd_epi32((__m512i)acc, (__m512i)p, (__m512i)v);
#elif VECTOR == 16
  return acc + (vi)_mm512_madd_epi16((__m512i)p, (__m512i)v);
#elif VECTOR == 8
  return acc + (vi)_mm256_madd_epi16((__m256i)p, (__m256i)v);
#elif defined(__SSE2__)
  return acc + (vi)_mm_madd_epi16((__m128i)p, (__m128i)v);
#else
  return acc + (p << 16 >> 16) * (v << 16 >> 16) + (p >> 16) * (v >> 16);
#endif
}

// acc + p * v summed over the four bytes of each lane of two pairs, p from 0 to 127, v from -63 to 63.
inline vi dot4(vi acc, vi p0, vi v0, vi p1, vi v1) {
#if defined(VNNI)
  return (vi)_mm512_dpbusd_epi32(_mm512_dpbusd_epi32((__m512i)acc, (__m512i)p0, (__m512i)v0), (__m512i)p1, (__m512i)v1);
#elif VECTOR == 16
  const __m512i pairs = _mm512_add_epi16(_mm512_maddubs_epi16((__m512i)p0, (__m512i)v0),
                                         _mm512_maddubs_epi16((__m512i)p1, (__m512i)v1));  // at most 4 * 127 * 63
  return acc + (vi)_mm512_madd_epi16(pairs, _mm512_set1_epi16(1));
#elif VECTOR == 8
  const __m256i pairs = _mm256_add_epi16(_mm256_maddubs_epi16((__m256i)p0, (__m256i)v0),
                                         _mm256_maddubs_epi16((__m256i)p1, (__m256i)v1));
  return acc + (vi)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#else
  const vi even = splat(0x00ff00ff);
  acc = dot2(dot2(acc, p0 & even, (vi)((vs)v0 << 8 >> 8)), p0 >> 8 & even, (vi)((vs)v0 >> 8));
  return dot2(dot2(acc, p1 & even, (vi)((vs)v1 << 8 >> 8)), p1 >> 8 & even, (vi)((vs)v1 >> 8));
#endif
}

// The low 16 bits of each lane, which hold no more.
inline halves to_words(vi x) {
#if VECTOR == 16
  return (halves)_mm512_maskz_cvtepi32_epi16(-1, (__m512i)x);
#elif VECTOR == 8
  return (halves)_mm256_castsi256_si128(_mm256_permute4x64_epi64(_mm256_packus_epi32((__m256i)x, (__m256i)x), 8));
#else
  return __builtin_convertvector(x, halves);
#endif
}

// fp16, round to nearest even; no infinities, no NaN.
inline halves to_half(vf x) {
#if VECTOR == 16
  return (halves)_mm512_maskz_cvtps_ph(-1, (__m512)x, _MM_FROUND_TO_NEAREST_INT);
#elif VECTOR == 8
  return (halves)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT);
#else
  const vi bits = (vi)x;
  const vi normal = (bits - (112 << 23) + 0xfff + (bits >> 13 & 1)) >> 13;
  const vi subnormal = (vi)(x + splat(0.5f)) - (vi)splat(0.5f);  // 0.5's last bit is 2^-24
  return __builtin_convertvector(x < splat(6.103515625e-5f) ? subnormal : normal, halves);
#endif
}
inline vf from_half(halves x) {
#if VECTOR == 16
  return (vf)_mm512_maskz_cvtph_ps(-1, (__m256i)x);  // maskz: GCC warns of its own header without
#elif VECTOR == 8
  return (vf)_mm256_cvtph_ps((__m128i)x);
#else
  return (vf)(__builtin_convertvector(x, vi) << 13) * splat(0x1p112f);
#endif
}

// 2^x for x <= 0, to 2 ulp; below 2^-125 some number whose square is 0; NaN of NaN.
inline vf exp2_of(vf x) {
  x = larger(splat(-125.0f), x);
  const vf shifted = x + splat(kMagic);
  const vf f = x - (shifted - splat(kMagic));  // in [-0.5, 0.5]
  vf p = splat(0.00132764701f);
  p = p * f + splat(0.00967554096f);
  p = p * f + splat(0.0555071309f);
  p = p * f + splat(0.240221202f);
  p = p * f + splat(0.693146944f);
  p = p * f + splat(1.00000012f);
  return (vf)((vu)p + ((vu)shifted << 23));
}

typedef float Rows[padded(kTile, W)];  // a number for each row of a tile

// x[r] becomes 4^x[r] for x <= 0, exactly 1 for 0: factors of 1 meet in long products.
inline void exp4(Rows& x, int64_t rows) {
  for (int64_t r = 0; r < rows; r += W) {
    const vf half = load(x + r), root = exp2_of(half);
    store(x + r, half == splat(0.0f) ? splat(1.0f) : root * root);
  }
}

// -- products. GCC keeps an array of accumulators in registers only where every loop over it is unrolled.

#define UNROLL _Pragma("GCC unroll 8")

// out[r, c] = sum_i p[r, i] * v[i, c] for R rows and C vectors.
template <int R, int C>
__attribute__((noinline)) void accumulate(const float* p, int64_t ldp, const float* v, int64_t ldv, int64_t n,
                                          float* out, int64_t ldo) {
  vf acc[R][C];
  UNROLL for (int r = 0; r < R; ++r)
    UNROLL for (int c = 0; c < C; ++c) acc[r][c] = vf{};
  _Pragma("GCC unroll 4") for (int64_t i = 0; i < n; ++i, ++p, v += ldv) {
    vf b[C];
    UNROLL for (int c = 0; c < C; ++c) b[c] = load(v + c * W);
    UNROLL for (int r = 0; r < R; ++r) {
      const vf a = splat(p[r * ldp]);
      UNROLL for (int c = 0; c < C; ++c) acc[r][c] += a * b[c];
    }
  }
  UNROLL for (int r = 0; r < R; ++r)
    UNROLL for (int c = 0; c < C; ++c) store(out + r * ldo + c * W, acc[r][c]);
}

// out[rows, width] = p[rows, n] v[n, width]; width is a multiple of W.
void multiply(const float* p, int64_t ldp, const float* v, int64_t ldv, int64_t n, float* out, int64_t ldo,
              int64_t rows, int64_t width) {
  int64_t left = width / W;
  while (left > 0) {  // in groups of 2 vectors, of 3 where the number is odd
    const int64_t vectors = left == 1 ? 1 : left % 2 ? 3 : 2;
    int64_t r = 0;
#define ROWS(R, C) \
  for (; vectors == C && r + R <= rows; r += R) accumulate<R, C>(p + r * ldp, ldp, v, ldv, n, out + r * ldo, ldo);
    ROWS(4, 3) ROWS(1, 3) ROWS(6, 2) ROWS(4, 2) ROWS(2, 2) ROWS(1, 2) ROWS(6, 1) ROWS(1, 1)
#undef ROWS
    left -= vectors, v += vectors * W, out += vectors * W;
  }
}

// out[r] = old[r] * out[r] + now[r] * sum_i p[r, i] * v[i]: the sum on its own, for the errors of long sums. `used`
// columns; without `old`, out[r] is only added to, and without `now` by the sum as it is.
void add_product(const float* p, int64_t ldp, const float* v, int64_t n, const float* old, const float* now, float* out,
                 int64_t width, int64_t rows, int64_t used) {
  float sum[kTile * 256];
  multiply(p, ldp, v, width, n, sum, width, rows, used);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = r * width; c < r * width + used; c += W)
      store(out + c, load(out + c) * splat(old ? old[r] : 1.0f) + load(sum + c) * splat(now ? now[r] : 1.0f));
}

// How codes of a format are multiplied as integers: so many keys in each 32-bit lane, with values rounded to
// at most `most`, so that the sum over a block fits into 32 bits whatever the codes.
struct Lanes {
  int keys;
  float most;
};
inline Lanes lanes_of(Format format) {
  if (format == Format::u7) return {4, 63.0f};
  return {2, format == Format::u8 ? 1023.0f : 32767.0f};  // P: 255^2 / 4, and 15^2
}

// out[r, c] += row_scale[r] * scale[c] * sum_j p[r, j] . v[j, c] over n lanes (even for KEYS = 4), R rows, C vectors.
template <int KEYS, int R, int C>
__attribute__((noinline)) void accumulate(const int32_t* p, int64_t ldp, const int32_t* v, int64_t ldv, int64_t n,
                                          const float* row_scale, const float* scale, float* out, int64_t ldo) {
  vi acc[R][C];
  UNROLL for (int r = 0; r < R; ++r)
    UNROLL for (int c = 0; c < C; ++c) acc[r][c] = vi{};
  constexpr int step = KEYS / 2;
  for (const int32_t* end = p + n; p < end; p += step, v += step * ldv) {
    UNROLL for (int r = 0; r < R; ++r) {
      const vi a = splat(p[r * ldp]), a1 = splat(p[r * ldp + step - 1]);
      UNROLL for (int c = 0; c < C; ++c) {
        const vi b = load(v + c * W), b1 = load(v + (step - 1) * ldv + c * W);
        acc[r][c] = KEYS == 2 ? dot2(acc[r][c], a, b) : dot4(acc[r][c], a, b, a1, b1);
      }
    }
  }
  UNROLL for (int r = 0; r < R; ++r)
    UNROLL for (int c = 0; c < C; ++c) {
      const vf factor = load(scale + c * W) * splat(row_scale[r]);
      store(out + r * ldo + c * W, load(out + r * ldo + c * W) + __builtin_convertvector(acc[r][c], vf) * factor);
    }
}

template <int KEYS, int R, int C>
void multiply_rows(const int32_t* p, int64_t ldp, const int32_t* v, int64_t ldv, int64_t n, const float* row_scale,
                   const float* scale, float* out, int64_t ldo, int64_t rows) {
  int64_t r = 0;
  for (; r + R <= rows; r += R)
    accumulate<KEYS, R, C>(p + r * ldp, ldp, v, ldv, n, row_scale + r, scale, out + r * ldo, ldo);
  for (; r < rows; ++r)
    accumulate<KEYS, 1, C>(p + r * ldp, ldp, v, ldv, n, row_scale + r, scale, out + r * ldo, ldo);
}

// The same for any number of rows and a width that is a multiple of W, in near-equal groups of at most 5 vectors.
template <int KEYS>
void multiply(const int32_t* p, int64_t ldp, const int32_t* v, int64_t ldv, int64_t n, const float* row_scale,
              const float* scale, float* out, int64_t ldo, int64_t rows, int64_t width) {
  int64_t left = width / W;
  for (int64_t groups = (left + 4) / 5; groups > 0; --groups) {
    const int64_t vectors = (left + groups - 1) / groups;
#define GROUP(C, R) \
  if (vectors == C) multiply_rows<KEYS, R, C>(p, ldp, v, ldv, n, row_scale, scale, out, ldo, rows);
    GROUP(1, 6) GROUP(2, 4) GROUP(3, 3) GROUP(4, KEYS == 2 ? 3 : 2) GROUP(5, 2)  // rows: what 16 registers hold
#undef GROUP
    left -= vectors;
    v += vectors * W, scale += vectors * W, out += vectors * W;
  }
}

// -- layouts

inline int64_t keys_in(int64_t block, int64_t n) { return n - block * kBlock < kBlock ? n - block * kBlock : kBlock; }
constexpr int bits_of(Format format) {
  return format == Format::fp32 ? 32 : format == Format::fp16 ? 16 : format == Format::u4 ? 4 : 8;
}
inline int64_t row_bytes(Format format, int64_t n) {
  return format == Format::fp32 ? 4 * n : blocks_of(n) * (kBlock / 8) * bits_of(format);
}

// A row of D elements, zeros up to width.
inline void copy_row(const float* from, int64_t stride, int64_t d, int64_t width, float* to) {
  if (stride == 1)
    std::memcpy(to, from, d * sizeof(float));
  else
    for (int64_t i = 0; i < d; ++i) to[i] = from[i * stride];
  for (int64_t i = d; i < width; ++i) to[i] = 0;
}

// Values of one head as [N, width].
void pack_values(const Tensor4& value, int64_t b, int64_t h, const Shape& s, float* packed) {
  const int64_t width = padded(s.Dv, kAlign);
  for (int64_t n = 0; n < s.N; ++n)
    copy_row(value.at(b, h) + n * value.row, value.d, s.Dv, width, packed + n * width);
}

// Values of one head as integers [C, 128 / keys, width], and the scales [C, width] that undo their rounding. The
// scale of a column with a value that is not finite is NaN, as its products would be.
void pack_integers(const Tensor4& value, int64_t b, int64_t h, const Shape& s, Format format, int32_t* packed,
                   float* scales) {
  const int64_t width = padded(s.Dv, kAlign);
  const Lanes lanes = lanes_of(format);
  const int bits = 32 / lanes.keys;
  const vi field = splat((1 << bits) - 1);
  float rows[4][256], inverse[256];
  for (int64_t block = 0; block < blocks_of(s.N); ++block, scales += width) {
    const int64_t n = keys_in(block, s.N);
    const float* from = value.at(b, h) + block * kBlock * value.row;
    float poison[256] = {};
    std::memset(scales, 0, width * sizeof(float));
    for (int64_t i = 0; i < n; ++i) {
      copy_row(from + i * value.row, value.d, s.Dv, width, rows[0]);
      for (int64_t d = 0; d < width; d += W) {
        const vf x = load(rows[0] + d);
        store(scales + d, larger(load(scales + d), larger(x, -x)));
        store(poison + d, load(poison + d) + x * splat(0.0f));
      }
    }
    for (int64_t d = 0; d < width; ++d) {
      inverse[d] = scales[d] > 2e-34f ? lanes.most / scales[d] : 0;  // smaller ones would overflow
      scales[d] = scales[d] / lanes.most + poison[d];
    }
    for (int64_t j = 0; j < kBlock / lanes.keys; ++j, packed += width) {
      for (int k = 0; k < lanes.keys; ++k) {
        // Codes of u7 are multiplied as they lie: two keys and those 64 further on.
        const int64_t i = format == Format::u7 ? 2 * j + k / 2 + 64 * (k % 2) : 2 * j + k;
        copy_row(from + i * value.row, value.d, i < n ? s.Dv : 0, width, rows[k]);
      }
      for (int64_t d = 0; d < width; d += W) {
        vi lane{};
        for (int k = 0; k < lanes.keys; ++k) {
          const vf rounded = load(rows[k] + d) * load(inverse + d) + splat(kMagic);
          lane |= (((vi)rounded - (vi)splat(kMagic)) & field) << bits * k;
        }
        store(packed + d, lane);
      }
    }
  }
}

constexpr int64_t kStrip = 2 * W;  // keys whose products with a query are summed side by side

// Keys of one head as [C, 128 / kStrip, D, kStrip], zero where none.
void pack_keys(const Tensor4& key, int64_t b, int64_t h, const Shape& s, float* packed) {
  for (int64_t first = 0; first < blocks_of(s.N) * kBlock; first += kStrip, packed += s.D * kStrip) {
    const int64_t n = s.N - first < kStrip ? s.N - first : kStrip;
    const float* from = key.at(b, h) + first * key.row;
    if (n < kStrip) std::memset(packed, 0, s.D * kStrip * sizeof(float));
    for (int64_t d = 0; d < s.D; ++d)
      for (int64_t i = 0; i < n; ++i) packed[d * kStrip + i] = from[i * key.row + d * key.d];
  }
}

void write_out(const float* from, int64_t width, int64_t rows, int64_t dv, float* out, int64_t stride) {
  for (int64_t r = 0; r < rows; ++r) std::memcpy(out + r * stride, from + r * width, dv * sizeof(float));
}

// -- reuse

typedef uint16_t shorts __attribute__((aligned(1), may_alias));

// 128 squares of u8 codes, a quarter of them (255^2 / 4 fits into 15 bits), or of u4 codes.
inline void unpack_u8(const uint8_t* codes, int32_t* squares) {
  const auto* words = reinterpret_cast<const shorts*>(codes);
  auto* p = reinterpret_cast<shorts*>(squares);
  for (int w = 0; w < 64; ++w) {
    const uint16_t low = static_cast<uint16_t>(words[w] << 8), high = words[w] & 0xff00;
    p[w] = static_cast<uint16_t>(uint32_t{low} * (low >> 2) >> 16);
    p[w + 64] = static_cast<uint16_t>(uint32_t{high} * (high >> 2) >> 16);
  }
}
inline void unpack_u4(const uint8_t* codes, int32_t* squares) {
  const auto* words = reinterpret_cast<const shorts*>(codes);
  auto* p = reinterpret_cast<shorts*>(squares);
  for (int w = 0; w < 32; ++w) {
    const uint16_t a = words[w] & 15, b = words[w] >> 4 & 15, c = words[w] >> 8 & 15, d = words[w] >> 12;
    p[w] = a * a, p[w + 32] = b * b, p[w + 64] = c * c, p[w + 96] = d * d;
  }
}

// A tile of query rows on its way over the keys.
struct ReuseTile {
  float out[kTile * 256];  // [rows, width]
  float p[kTile * kBlock];
  int32_t squares[kTile * kBlock / 2];
  Rows scale{};
};

// Of P / code (fp16), P / code^2 (u4), 4 P / code^2 (u8) or P / code (u7).
inline float unit_of(Format format) {
  if (format == Format::u8) return 4.0f / (255.0f * 255.0f);
  if (format == Format::u4) return 1.0f / (15.0f * 15.0f);
  return format == Format::u7 ? 1.0f / 127.0f : 1.0f;
}

void reuse_block(const ReuseArgs& a, int64_t i, int64_t block, int64_t first, int64_t rows, const float* packed,
                 ReuseTile& t) {
  const Shape& s = a.shape;
  const Format format = a.map.format;
  const int64_t width = padded(s.Dv, kAlign), used = padded(s.Dv, W), n = keys_in(block, s.N);
  const int64_t stride = row_bytes(format, s.N), blocks = blocks_of(s.N);
  const int64_t step = kBlock / 8 * bits_of(format);
  const uint8_t* codes = a.map.codes + (i * s.M + first) * stride + block * step;
  if (block + 1 < blocks)  // rows are too far apart for the hardware to see what comes next
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t at = 0; at < step; at += 64) __builtin_prefetch(codes + r * stride + step + at);
  if (format == Format::fp32) {
    const float* p = reinterpret_cast<const float*>(codes);
    add_product(p, s.N, packed + block * kBlock * width, n, nullptr, nullptr, t.out, width, rows, used);
    return;
  }
  const float* maxima = a.map.block_max + (i * blocks + block) * s.M + first;
  for (int64_t r = 0; r < rows; ++r) t.scale[r] = 0.5f * (maxima[r] - a.map.lse[i * s.M + first + r]);
  exp4(t.scale, rows);
  for (int64_t r = 0; r < rows; ++r) t.scale[r] *= unit_of(format);
  if (format == Format::fp16) {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t j = 0; j < kBlock; j += W)
        store(t.p + r * kBlock + j, from_half(*reinterpret_cast<const halves*>(codes + r * stride + 2 * j)));
    add_product(t.p, kBlock, packed + block * kBlock * width, n, nullptr, t.scale, t.out, width, rows, used);
    return;
  }
  const int64_t per_block = kBlock / lanes_of(format).keys * width;
  const int32_t* values = reinterpret_cast<const int32_t*>(packed) + block * per_block;
  const float* scales = packed + blocks * per_block + block * width;
  if (format == Format::u7) {
    const int64_t count = n < 63 ? padded((n + 1) / 2, 2) : 32;
    const int32_t* lanes = reinterpret_cast<const int32_t*>(codes);
    multiply<4>(lanes, stride / 4, values, width, count, t.scale, scales, t.out, width, rows, used);
  } else {
    const auto unpack = format == Format::u8 ? unpack_u8 : unpack_u4;
    for (int64_t r = 0; r < rows; ++r) unpack(codes + r * stride, t.squares + r * kBlock / 2);
    multiply<2>(t.squares, kBlock / 2, values, width, (n + 1) / 2, t.scale, scales, t.out, width, rows, used);
  }
}

void reuse(const ReuseArgs& a) {
  const Shape& s = a.shape;
  const int64_t heads = s.B * s.H, width = padded(s.Dv, kAlign), tiles = (s.M + kTile - 1) / kTile;
  const int64_t packed = reuse_workspace(s) / heads;
  const bool integers = a.map.format != Format::fp32 && a.map.format != Format::fp16;
#pragma omp parallel num_threads(a.threads)
  {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < heads; ++i) {
      float* to = a.workspace + i * packed;
      if (integers) {
        const int64_t lanes = blocks_of(s.N) * kBlock / lanes_of(a.map.format).keys;
        pack_integers(a.value, i / s.H, i % s.H, s, a.map.format, reinterpret_cast<int32_t*>(to), to + lanes * width);
      } else {
        pack_values(a.value, i / s.H, i % s.H, s, to);
      }
    }
    ReuseTile tile;
#pragma omp for schedule(dynamic)
    for (int64_t job = 0; job < heads * tiles; ++job) {
      const int64_t i = job / tiles, first = job % tiles * kTile;
      const int64_t rows = first + kTile <= s.M ? kTile : s.M - first;
      std::memset(tile.out, 0, rows * width * sizeof(float));
      for (int64_t block = 0; block < blocks_of(s.N); ++block)  // in blocks, so that values stay in the cache
        reuse_block(a, i, block, first, rows, a.workspace + i * packed, tile);
      float* out = a.out + i / s.H * a.out_b + i % s.H * a.out_h + first * a.out_m;
      write_out(tile.out, width, rows, s.Dv, out, a.out_m);
    }
  }
}

// -- capture. Scores are kept halved, so that exp2 gives the square roots that codes are made of.

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

struct CaptureTile {
  float query[kTile * 256];      // [rows, D], times scale
  float scores[kTile * kBlock];  // of a block, halved, then its probabilities relative to its maximum
  float out[kTile * 256];        // [rows, width]
  vf sum[kTile];                 // relative to the maximum so far, lane by lane
  Rows top{};                    // that maximum, halved
  float* blocks;                 // [rows, C], halved maxima of the blocks of an fp32 map, which has no place for them
};

void mask_scores(const CaptureArgs& a, int64_t b, int64_t h, int64_t m, int64_t first, int64_t n, float* scores) {
  if (a.mask.data) {
    const float* mask = a.mask.at(b, h) + m * a.mask.row + first * a.mask.d;
    for (int64_t i = 0; i < n; ++i) scores[i] += 0.5f * kLog2e * mask[i * a.mask.d];
  }
  for (int64_t i = n; i < kBlock; ++i) scores[i] = -__builtin_inff();
}

inline float block_top(const float* scores) {
  vf most = load(scores);
  for (int i = W; i < kBlock; i += W) most = larger(load(scores + i), most);
  const float top = max_of(most);
  return top > kNoKey / 2 ? top : kNoKey / 2;
}

// Codes of a block's n scores; the scores become probabilities relative to `top`. Returns their sums, lane by lane.
template <Format format>
vf block_softmax(float* scores, int64_t n, float top, uint8_t* codes) {
  vf total{};
  const auto probability = [&](int i) {
    if (i >= n) return vf{};
    const vf t = exp2_of(load(scores + i) - splat(top)), p = t * t;
    total += p;
    store(scores + i, p);
    return format == Format::u8 || format == Format::u4 ? t : p;
  };
  if constexpr (format == Format::fp32) {
    for (int i = 0; i < kBlock; i += W) store(reinterpret_cast<float*>(codes) + i, probability(i));
  } else if constexpr (format == Format::fp16) {
    for (int i = 0; i < kBlock; i += W) *reinterpret_cast<halves*>(codes + 2 * i) = to_half(probability(i));
  } else {  // in 16-bit words, of keys that are `words` apart
    constexpr int bits = bits_of(format), words = kBlock * bits / 16;
    const vf levels = splat(format == Format::u8 ? 255.0f : format == Format::u7 ? 127.0f : 15.0f);
    for (int w = 0; w < words; w += W) {
      vi word{};
      UNROLL for (int k = 0; k < 16 / bits; ++k) {
        const vf rounded = probability(w + k * words) * levels + splat(kMagic);
        word |= (vi)rounded << bits * k;
      }
      *reinterpret_cast<halves*>(codes + 2 * w) = to_words(word & 0xffff);
    }
  }
  return total;
}

template <Format format>
void capture_block(const CaptureArgs& a, int64_t i, int64_t block, int64_t first, int64_t rows, const float* keys,
                   const float* values, CaptureTile& t) {
  const Shape& s = a.shape;
  constexpr bool plain = format == Format::fp32;
  const int64_t width = padded(s.Dv, kAlign), used = padded(s.Dv, W), blocks = blocks_of(s.N);
  const int64_t n = keys_in(block, s.N), stride = row_bytes(format, s.N);
  uint8_t* codes = a.map.codes + (i * s.M + first) * stride + block * (kBlock / 8) * bits_of(format);
  for (int64_t r = 0; r < rows; ++r)  // rows are too far apart for the hardware to see what comes next
    for (int64_t at = 0; at < kBlock / 8 * bits_of(format); at += 64) __builtin_prefetch(codes + r * stride + at, 1);
  for (int64_t j = 0; j < n; j += kStrip)
    multiply(t.query, s.D, keys + (block * kBlock + j) * s.D, kStrip, s.D, t.scores + j, kBlock, rows, kStrip);
  Rows top{}, old, now;  // maxima of this block; factors of what is there and of what comes
  for (int64_t r = 0; r < rows; ++r) {
    float* scores = t.scores + r * kBlock;
    if (a.mask.data || n < kBlock) mask_scores(a, i / s.H, i % s.H, first + r, block * kBlock, n, scores);
    top[r] = block_top(scores);
  }
  for (int64_t r = 0; r < rows; r += W) {
    const vf before = load(t.top + r), most = larger(load(top + r), before);
    store(old + r, before - most), store(now + r, load(top + r) - most), store(t.top + r, most);
  }
  exp4(old, rows), exp4(now, rows);
  for (int64_t r = 0; r < rows; ++r, codes += stride) {
    float whole[kBlock];  // the end of an fp32 map's row has no place for a whole block
    uint8_t* to = plain ? reinterpret_cast<uint8_t*>(whole) : codes;
    const vf sum = block_softmax<format>(t.scores + r * kBlock, n, top[r], to);
    t.sum[r] = t.sum[r] * splat(old[r]) + sum * splat(now[r]);
    if (plain) {
      std::memcpy(codes, whole, n * sizeof(float));
      t.blocks[r * blocks + block] = top[r];
    } else {
      a.map.block_max[(i * blocks + block) * s.M + first + r] = 2 * top[r];
    }
  }
  add_product(t.scores, kBlock, values + block * kBlock * width, n, old, now, t.out, width, rows, used);
}

template <Format format>
void capture_tile(const CaptureArgs& a, int64_t i, int64_t first, int64_t rows, const float* keys, const float* values,
                  CaptureTile& t) {
  const Shape& s = a.shape;
  constexpr bool plain = format == Format::fp32;
  const int64_t b = i / s.H, h = i % s.H, width = padded(s.Dv, kAlign), blocks = blocks_of(s.N);
  for (int64_t r = 0; r < rows; ++r) {
    const float* query = a.query.at(b, h) + (first + r) * a.query.row;
    for (int64_t d = 0; d < s.D; ++d) t.query[r * s.D + d] = 0.5f * kLog2e * a.scale * query[d * a.query.d];
    t.top[r] = kNoKey / 2;
    t.sum[r] = vf{};
  }
  std::memset(t.out, 0, rows * width * sizeof(float));
  for (int64_t block = 0; block < blocks; ++block) capture_block<format>(a, i, block, first, rows, keys, values, t);
  for (int64_t r = 0; r < rows; ++r) {
    const float sum = sum_of(t.sum[r]);
    const bool none = sum == 0;  // no key is open to this query; NaN is not none
    const float inverse = none ? 0 : 1 / sum;
    for (int64_t d = 0; d < width; ++d) t.out[r * width + d] *= inverse;
    if (!plain) {
      a.map.lse[i * s.M + first + r] = none ? __builtin_inff() : 2 * t.top[r] + __builtin_log2f(sum);
      continue;
    }
    float* row = reinterpret_cast<float*>(a.map.codes) + (i * s.M + first + r) * s.N;
    for (int64_t block = 0; block < blocks; ++block, row += kBlock) {
      const float factor = inverse * __builtin_exp2f(2 * (t.blocks[r * blocks + block] - t.top[r]));
      for (int64_t j = 0; j < keys_in(block, s.N); ++j) row[j] *= factor;
    }
  }
  write_out(t.out, width, rows, s.Dv, a.out + b * a.out_b + h * a.out_h + first * a.out_m, a.out_m);
}

inline int thread_number() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

template <Format format>
void capture(const CaptureArgs& a) {
  const Shape& s = a.shape;
  const int64_t heads = s.B * s.H, tiles = (s.M + kTile - 1) / kTile;
  const int64_t values = reuse_workspace(s) / heads, keys = blocks_of(s.N) * kBlock * s.D;
  float* packed_keys = a.workspace + heads * values;
#pragma omp parallel num_threads(a.threads)
  {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < heads; ++i) {
      pack_values(a.value, i / s.H, i % s.H, s, a.workspace + i * values);
      pack_keys(a.key, i / s.H, i % s.H, s, packed_keys + i * keys);
    }
    CaptureTile tile;
    tile.blocks = packed_keys + heads * keys + thread_number() * kTile * blocks_of(s.N);
#pragma omp for schedule(dynamic)
    for (int64_t job = 0; job < heads * tiles; ++job) {
      const int64_t i = job / tiles, first = job % tiles * kTile;
      const int64_t rows = first + kTile <= s.M ? kTile : s.M - first;
      capture_tile<format>(a, i, first, rows, packed_keys + i * keys, a.workspace + i * values, tile);
    }
  }
}

void capture(const CaptureArgs& a) {
  if (a.map.format == Format::fp32) capture<Format::fp32>(a);
  if (a.map.format == Format::fp16) capture<Format::fp16>(a);
  if (a.map.format == Format::u8) capture<Format::u8>(a);
  if (a.map.format == Format::u7) capture<Format::u7>(a);
  if (a.map.format == Format::u4) capture<Format::u4>(a);
}

double multiply_add(int64_t steps, int threads) {
  constexpr int kChains = 12;
  float sink = 0;
#pragma omp parallel num_threads(threads) reduction(+ : sink)
  {
    vf acc[kChains];
    const vf a = splat(0.5f), b = splat(1.0f);
    _Pragma("GCC unroll 12") for (int i = 0; i < kChains; ++i) acc[i] = splat(static_cast<float>(i));
    for (int64_t step = 0; step < steps; ++step)
      _Pragma("GCC unroll 12") for (int i = 0; i < kChains; ++i) acc[i] = acc[i] * a + b;
    for (int i = 0; i < kChains; ++i) sink += sum_of(acc[i]);
  }
  return 2.0 * kChains * W * steps * threads + 0 * sink;
}

}  // namespace

const Kernels KERNELS = {NAME, capture, reuse, multiply_add};

}  // namespace attnreuse
