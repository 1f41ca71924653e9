// Vectors of f32 in the instruction set that this file is compiled for; JAXLLM_LEVEL names it and its namespace.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace jaxllm::JAXLLM_LEVEL {

using Half = uint16_t;  // a bf16's bits

static inline float widened(Half h) {
  const uint32_t bits = static_cast<uint32_t>(h) << 16;
  float f;
  std::memcpy(&f, &bits, sizeof f);
  return f;
}

static inline float widened(float f) { return f; }

// Rounded to the nearest bf16, ties to even; a NaN stays one.
static inline Half narrowed(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, sizeof bits);
  if (f != f) return static_cast<Half>((bits >> 16) | 0x40);
  return static_cast<Half>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

struct F16 {  // the bits of IEEE's half precision
  uint16_t bits;
};

#if defined(__F16C__)
static inline float widened(F16 h) { return _cvtsh_ss(h.bits); }
static inline F16 narrowed_f16(float f) { return {static_cast<uint16_t>(_cvtss_sh(f, _MM_FROUND_TO_NEAREST_INT))}; }
#else
static inline float widened(F16 h) {
  const uint32_t rest = h.bits & 0x7fffu;
  uint32_t bits;
  if (rest < 0x400) {  // a multiple of the smallest, 2^-24
    const float f = static_cast<float>(rest) * 0x1p-24f;
    std::memcpy(&bits, &f, sizeof bits);
  } else {
    bits = (rest << 13) + (rest < 0x7c00 ? (127 - 15) << 23 : (255 - 31) << 23);
  }
  bits |= static_cast<uint32_t>(h.bits & 0x8000) << 16;
  float f;
  std::memcpy(&f, &bits, sizeof f);
  return f;
}

// Rounded to the nearest, ties to even.
static inline F16 narrowed_f16(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, sizeof bits);
  const uint32_t sign = bits >> 16 & 0x8000;
  bits &= 0x7fffffff;
  if (f != f) return {static_cast<uint16_t>(sign | 0x7e00)};
  if (bits >= 0x477ff000) return {static_cast<uint16_t>(sign | 0x7c00)};  // 65520: nearer to 2^16 than to what f16 has
  if (bits < 0x38800000) {  // below 2^-14 steps are 2^-24, as those of f32 are from 0.5 on
    const float raised = (f < 0 ? -f : f) + 0.5f;
    std::memcpy(&bits, &raised, sizeof bits);
    return {static_cast<uint16_t>(sign | (bits - 0x3f000000))};
  }
  return {static_cast<uint16_t>(sign | (bits - ((127 - 15) << 23) + 0xfff + (bits >> 13 & 1)) >> 13)};
}
#endif

#if defined(__AVX512F__)

constexpr int64_t kLanes = 16;
constexpr int kRows = 6;  // of x in a block of products, against 4 of w: as the registers allow
using V = __m512;

static inline __mmask16 first(int64_t n) { return static_cast<__mmask16>(n >= 16 ? 0xffff : (1u << n) - 1); }
static inline V widened(__m256i h) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
}
static inline V load(const float* p) { return _mm512_loadu_ps(p); }
static inline V load(const Half* p) { return widened(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
static inline V load(const float* p, int64_t n) { return _mm512_maskz_loadu_ps(first(n), p); }
static inline V load(const Half* p, int64_t n) { return widened(_mm256_maskz_loadu_epi16(first(n), p)); }
static inline V load(const F16* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
static inline V load(const F16* p, int64_t n) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(n), p)); }
static inline __m256i halves(V v) { return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v)); }
static inline __m256i halves_f16(V v) { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT); }
static inline V rounded(V v) { return widened(halves(v)); }  // to the nearest bf16
static inline V rounded_f16(V v) { return _mm512_cvtph_ps(halves_f16(v)); }
static inline void store(float* p, V v) { _mm512_storeu_ps(p, v); }
static inline void store(Half* p, V v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), halves(v)); }
static inline void store(F16* p, V v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), halves_f16(v)); }
static inline V set(float f) { return _mm512_set1_ps(f); }
static inline V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
static inline V max(V a, V b) { return _mm512_max_ps(a, b); }
static inline V min(V a, V b) { return _mm512_min_ps(a, b); }
static inline V round(V a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
static inline V power_of_two(V n) {  // 2^n of whole n
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127)), 23));
}
static inline float sum(V v) {
  const __m256 a = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
  const __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  const __m128 c = _mm_add_ps(b, _mm_movehl_ps(b, b));
  return _mm_cvtss_f32(_mm_add_ss(c, _mm_movehdup_ps(c)));
}

using W = __m512i;  // 32 flags a lane
static inline W load(const uint32_t* p) { return _mm512_loadu_si512(p); }
static inline V where(W flags, int bit, V a, V b) {  // a where the flag is set
  return _mm512_mask_mov_ps(b, _mm512_test_epi32_mask(flags, _mm512_set1_epi32(1 << bit)), a);
}
static inline V where(uint32_t lanes, V a, V b) {  // a in the lanes whose bit is set
  return _mm512_mask_mov_ps(b, static_cast<__mmask16>(lanes), a);
}
static inline float highest(V v) { return _mm512_reduce_max_ps(v); }
static inline bool same(V a, V b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ) == 0xffff; }
static inline V where_zero(V x, V a, V b) { return _mm512_mask_mov_ps(b, _mm512_cmp_ps_mask(x, set(0), _CMP_EQ_OQ), a); }
static inline uint64_t flags(const uint8_t* p, int64_t n) {  // bit i: p[i] is not zero; up to 64
  const __mmask64 mask = n >= 64 ? ~0ull : (1ull << n) - 1;
  const __m512i bytes = _mm512_maskz_loadu_epi8(mask, p);
  return _mm512_test_epi8_mask(bytes, bytes);
}
static inline void transpose(V r[16]) {  // r[i] lane j becomes r[j] lane i
  V t[16];
  for (int i = 0; i < 16; i += 4) {
    const __m512d a = _mm512_castps_pd(_mm512_unpacklo_ps(r[i], r[i + 1]));
    const __m512d b = _mm512_castps_pd(_mm512_unpackhi_ps(r[i], r[i + 1]));
    const __m512d c = _mm512_castps_pd(_mm512_unpacklo_ps(r[i + 2], r[i + 3]));
    const __m512d d = _mm512_castps_pd(_mm512_unpackhi_ps(r[i + 2], r[i + 3]));
    t[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
    t[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
    t[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
    t[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
  }
  for (int i = 0; i < 4; ++i) {  // t[4 n + i]: columns i, i + 4, i + 8 and i + 12 of rows 4 n to 4 n + 4
    const V a = _mm512_shuffle_f32x4(t[i], t[i + 4], 0x88), b = _mm512_shuffle_f32x4(t[i], t[i + 4], 0xdd);
    const V c = _mm512_shuffle_f32x4(t[i + 8], t[i + 12], 0x88), d = _mm512_shuffle_f32x4(t[i + 8], t[i + 12], 0xdd);
    r[i] = _mm512_shuffle_f32x4(a, c, 0x88);
    r[i + 4] = _mm512_shuffle_f32x4(b, d, 0x88);
    r[i + 8] = _mm512_shuffle_f32x4(a, c, 0xdd);
    r[i + 12] = _mm512_shuffle_f32x4(b, d, 0xdd);
  }
}

#elif defined(__AVX2__)

constexpr int64_t kLanes = 8;
constexpr int kRows = 2;
using V = __m256;

static inline V widened(__m128i h) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
}
static inline V load(const float* p) { return _mm256_loadu_ps(p); }
static inline V load(const Half* p) { return widened(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
static inline V load(const F16* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
static inline __m128i halves(V v) {
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i near = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i none = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  const __m256i whole = _mm256_blendv_epi8(near, _mm256_or_si256(bits, _mm256_set1_epi32(0x400000)), none);
  const __m256i upper = _mm256_srli_epi32(whole, 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(upper), _mm256_extracti128_si256(upper, 1));
}
static inline __m128i halves_f16(V v) { return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT); }
static inline V rounded(V v) { return widened(halves(v)); }  // to the nearest bf16
static inline V rounded_f16(V v) { return _mm256_cvtph_ps(halves_f16(v)); }
template <typename T>
static inline V load(const T* p, int64_t n) {
  T copy[8] = {};
  for (int64_t i = 0; i < 8; ++i) copy[i] = i < n ? p[i] : T{};
  return load(copy);
}
static inline void store(float* p, V v) { _mm256_storeu_ps(p, v); }
static inline void store(Half* p, V v) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), halves(v)); }
static inline void store(F16* p, V v) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), halves_f16(v)); }
static inline V set(float f) { return _mm256_set1_ps(f); }
static inline V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
static inline V max(V a, V b) { return _mm256_max_ps(a, b); }
static inline V min(V a, V b) { return _mm256_min_ps(a, b); }
static inline V round(V a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
static inline V power_of_two(V n) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
static inline float sum(V v) {
  const __m128 b = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  const __m128 c = _mm_add_ps(b, _mm_movehl_ps(b, b));
  return _mm_cvtss_f32(_mm_add_ss(c, _mm_movehdup_ps(c)));
}

using W = __m256i;
static inline W load(const uint32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
static inline V where(W flags, int bit, V a, V b) {
  const __m256i one = _mm256_set1_epi32(1 << bit);
  return _mm256_blendv_ps(b, a, _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(flags, one), one)));
}
static inline V where(uint32_t lanes, V a, V b) {
  const __m256i own = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i set = _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(lanes)), own);
  return _mm256_blendv_ps(b, a, _mm256_castsi256_ps(_mm256_cmpeq_epi32(set, own)));
}
static inline float highest(V v) {
  const __m128 a = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  const __m128 b = _mm_max_ps(a, _mm_movehl_ps(a, a));
  return _mm_cvtss_f32(_mm_max_ss(b, _mm_movehdup_ps(b)));
}
static inline bool same(V a, V b) { return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_EQ_OQ)) == 0xff; }
static inline V where_zero(V x, V a, V b) { return _mm256_blendv_ps(b, a, _mm256_cmp_ps(x, set(0), _CMP_EQ_OQ)); }
static inline void transpose(V r[8]) {  // r[i] lane j becomes r[j] lane i
  V t[8];
  for (int i = 0; i < 8; i += 4) {
    const V a = _mm256_unpacklo_ps(r[i], r[i + 1]), b = _mm256_unpackhi_ps(r[i], r[i + 1]);
    const V c = _mm256_unpacklo_ps(r[i + 2], r[i + 3]), d = _mm256_unpackhi_ps(r[i + 2], r[i + 3]);
    t[i] = _mm256_shuffle_ps(a, c, 0x44);
    t[i + 1] = _mm256_shuffle_ps(a, c, 0xee);
    t[i + 2] = _mm256_shuffle_ps(b, d, 0x44);
    t[i + 3] = _mm256_shuffle_ps(b, d, 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm256_permute2f128_ps(t[i], t[i + 4], 0x20);
    r[i + 4] = _mm256_permute2f128_ps(t[i], t[i + 4], 0x31);
  }
}

#else

// The vectors of GCC and Clang: four lanes, which every 64-bit processor has in some form. On aarch64 they are NEON.
constexpr int64_t kLanes = 4;
#if defined(__aarch64__)
constexpr int kRows = 6;
#else
constexpr int kRows = 2;
#endif
typedef float V __attribute__((vector_size(16)));
typedef int32_t I __attribute__((vector_size(16)));

template <typename T>
static inline V load(const T* p, int64_t n) {
  V v = {};
  for (int64_t i = 0; i < kLanes; ++i)
    if (i < n) v[i] = widened(p[i]);
  return v;
}
static inline V load(const float* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
#if defined(__aarch64__)
static inline V load(const Half* p) { return (V)vshll_n_u16(vld1_u16(p), 16); }
#else
static inline V load(const Half* p) { return V{widened(p[0]), widened(p[1]), widened(p[2]), widened(p[3])}; }
#endif
static inline V load(const F16* p) { return V{widened(p[0]), widened(p[1]), widened(p[2]), widened(p[3])}; }
static inline V rounded(V v) {  // to the nearest bf16
  return V{widened(narrowed(v[0])), widened(narrowed(v[1])), widened(narrowed(v[2])), widened(narrowed(v[3]))};
}
static inline V rounded_f16(V v) {
  for (int i = 0; i < 4; ++i) v[i] = widened(narrowed_f16(v[i]));
  return v;
}
static inline void store(float* p, V v) { std::memcpy(p, &v, sizeof v); }
static inline void store(Half* p, V v) {
  for (int i = 0; i < 4; ++i) p[i] = narrowed(v[i]);
}
static inline void store(F16* p, V v) {
  for (int i = 0; i < 4; ++i) p[i] = narrowed_f16(v[i]);
}
static inline V set(float f) { return V{f, f, f, f}; }
static inline V fma(V a, V b, V c) { return a * b + c; }
static inline V max(V a, V b) { return a > b ? a : b; }
static inline V min(V a, V b) { return a < b ? a : b; }
static inline V round(V a) {  // |a| is far below 2^22 here
  const V big = set(12582912.0f);
  return (a + big) - big;
}
static inline V power_of_two(V n) {
  const I whole = __builtin_convertvector(n, I) + 127;
  const I bits = whole << 23;
  V v;
  std::memcpy(&v, &bits, sizeof v);
  return v;
}
static inline float sum(V v) { return (v[0] + v[2]) + (v[1] + v[3]); }

typedef uint32_t W __attribute__((vector_size(16)));
static inline W load(const uint32_t* p) {
  W w;
  std::memcpy(&w, p, sizeof w);
  return w;
}
static inline V where(W flags, int bit, V a, V b) { return (flags & (1u << bit)) != 0 ? a : b; }
static inline V where(uint32_t lanes, V a, V b) {  // a in the lanes whose bit is set
  for (int i = 0; i < 4; ++i) b[i] = lanes >> i & 1 ? a[i] : b[i];
  return b;
}
static inline float highest(V v) {
  const float a = v[0] > v[1] ? v[0] : v[1], b = v[2] > v[3] ? v[2] : v[3];
  return a > b ? a : b;
}
static inline bool same(V a, V b) { return a[0] == b[0] && a[1] == b[1] && a[2] == b[2] && a[3] == b[3]; }
static inline V where_zero(V x, V a, V b) { return x == 0 ? a : b; }
static inline void transpose(V r[4]) {  // r[i] lane j becomes r[j] lane i
  const V a = r[0], b = r[1], c = r[2], d = r[3];
  for (int i = 0; i < 4; ++i) r[i] = V{a[i], b[i], c[i], d[i]};
}

#endif

#if !defined(__AVX512F__)
static inline uint64_t flags(const uint8_t* p, int64_t n) {
  uint64_t found = 0;
  for (int64_t i = 0; i < n; ++i) found |= static_cast<uint64_t>(p[i] != 0) << i;
  return found;
}
#endif

// 2^x for x up to 0, exactly 0 below -126.5; a NaN stays one. Error below 2e-7 of the result.
static inline V exp2(V x) {
  x = max(set(-127.0f), x);  // in this order a NaN comes through
  const V whole = round(x), f = x - whole;
  V y = set(1.5353362e-4f);
  y = fma(y, f, set(1.3398874e-3f));
  y = fma(y, f, set(9.6184373e-3f));
  y = fma(y, f, set(5.5503324e-2f));
  y = fma(y, f, set(2.4022648e-1f));
  y = fma(y, f, set(6.9314720e-1f));
  y = fma(y, f, set(1.0f));
  return y * power_of_two(whole);
}

// By the rational function that Eigen and XLA use, within a few units in the last place.
static inline V tanh(V x) {
  const V t = min(set(7.90531110763549805f), max(set(-7.90531110763549805f), x)), s = t * t;
  constexpr float kAbove[] = {2.00018790482477e-13f, -8.60467152213735e-11f, 5.12229709037114e-08f,
                              1.48572235717979e-05f, 6.37261928875436e-04f,  4.89352455891786e-03f};
  constexpr float kBelow[] = {1.18534705686654e-04f, 2.26843463243900e-03f, 4.89352518554385e-03f};
  V p = set(-2.76076847742355e-16f), q = set(1.19825839466702e-06f);
  for (float c : kAbove) p = fma(p, s, set(c));
  for (float c : kBelow) q = fma(q, s, set(c));
  return t * p / q;
}

}  // namespace jaxllm::JAXLLM_LEVEL
