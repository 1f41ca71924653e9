// Vectors of whole numbers, as wide as those of simd.h: 32 bits a lane, or two numbers of 16 bits.
#pragma once

#include "simd.h"

namespace jaxllm::JAXLLM_LEVEL {

#if defined(__AVX512F__)

static inline W set_int(int32_t i) { return _mm512_set1_epi32(i); }
static inline W load_bytes(const uint8_t* p, int64_t n) {  // zeros after n of them
  return _mm512_maskz_loadu_epi8(n >= 64 ? ~0ull : n <= 0 ? 0 : (1ull << n) - 1, p);
}
static inline W both(W a, W b) { return _mm512_and_si512(a, b); }
static inline W either(W a, W b) { return _mm512_xor_si512(a, b); }
static inline W plus(W a, W b) { return _mm512_add_epi32(a, b); }
template <int N>
static inline W right(W a) {
  return _mm512_srli_epi32(a, N);
}
static inline void store(uint32_t* p, W a) { _mm512_storeu_si512(p, a); }
// sums + a * b, the products of both halves of a lane added to it
static inline W dot(W sums, W a, W b) { return _mm512_dpwssd_epi32(sums, a, b); }
// the same of four bytes, those of a from 0 to kMostByte, those of b from -127 to 127
constexpr int64_t kMostByte = 255;
static inline W dot_bytes(W sums, W a, W b) { return _mm512_dpbusd_epi32(sums, a, b); }
static inline V as_float(W a) { return _mm512_cvtepi32_ps(a); }
// Lane i of four lanes of the result: the sum of r[i]'s four.
static inline W add_fours(const W (&r)[4]) {
  const W ab = plus(_mm512_unpacklo_epi32(r[0], r[1]), _mm512_unpackhi_epi32(r[0], r[1]));
  const W cd = plus(_mm512_unpacklo_epi32(r[2], r[3]), _mm512_unpackhi_epi32(r[2], r[3]));
  return plus(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
}
// Four lanes j of r[i] become four lanes i of r[j].
static inline void turn_fours(W (&r)[4]) {
  const W a = _mm512_shuffle_i32x4(r[0], r[1], 0x44), b = _mm512_shuffle_i32x4(r[0], r[1], 0xee);
  const W c = _mm512_shuffle_i32x4(r[2], r[3], 0x44), d = _mm512_shuffle_i32x4(r[2], r[3], 0xee);
  r[0] = _mm512_shuffle_i32x4(a, c, 0x88), r[1] = _mm512_shuffle_i32x4(a, c, 0xdd);
  r[2] = _mm512_shuffle_i32x4(b, d, 0x88), r[3] = _mm512_shuffle_i32x4(b, d, 0xdd);
}

class Table {
 public:
  explicit Table(const int16_t* values) {
    alignas(64) int16_t twice[32];
    for (int i = 0; i < 32; ++i) twice[i] = values[i % 16];
    values_ = _mm512_load_si512(twice);
  }
  W at(W codes) const { return _mm512_permutexvar_epi16(codes, values_); }

 private:
  W values_;
};

class ByteTable {
 public:
  explicit ByteTable(const int16_t* values) {
    alignas(16) int8_t bytes[16];
    for (int i = 0; i < 16; ++i) bytes[i] = static_cast<int8_t>(values[i]);
    values_ = _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(bytes)));
  }
  W at(W codes) const { return _mm512_shuffle_epi8(values_, codes); }

 private:
  W values_;
};

#elif defined(__AVX2__)

static inline W set_int(int32_t i) { return _mm256_set1_epi32(i); }
static inline W both(W a, W b) { return _mm256_and_si256(a, b); }
static inline W either(W a, W b) { return _mm256_xor_si256(a, b); }
static inline W plus(W a, W b) { return _mm256_add_epi32(a, b); }
template <int N>
static inline W right(W a) {
  return _mm256_srli_epi32(a, N);
}
static inline void store(uint32_t* p, W a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a); }
static inline W dot(W sums, W a, W b) { return _mm256_add_epi32(sums, _mm256_madd_epi16(a, b)); }
constexpr int64_t kMostByte = 127;  // sums of two products have 16 bits
static inline W dot_bytes(W sums, W a, W b) { return dot(sums, _mm256_maddubs_epi16(a, b), _mm256_set1_epi16(1)); }
static inline V as_float(W a) { return _mm256_cvtepi32_ps(a); }
static inline W add_fours(const W (&r)[4]) {
  const W ab = plus(_mm256_unpacklo_epi32(r[0], r[1]), _mm256_unpackhi_epi32(r[0], r[1]));
  const W cd = plus(_mm256_unpacklo_epi32(r[2], r[3]), _mm256_unpackhi_epi32(r[2], r[3]));
  return plus(_mm256_unpacklo_epi64(ab, cd), _mm256_unpackhi_epi64(ab, cd));
}
static inline void turn_fours(W (&r)[2]) {
  const W a = r[0];
  r[0] = _mm256_permute2x128_si256(a, r[1], 0x20), r[1] = _mm256_permute2x128_si256(a, r[1], 0x31);
}

class Table {
 public:
  explicit Table(const int16_t* values) {
    alignas(32) uint8_t low[32], high[32];
    for (int i = 0; i < 32; ++i) {
      const auto bits = static_cast<uint16_t>(values[i % 16]);
      low[i] = static_cast<uint8_t>(bits), high[i] = static_cast<uint8_t>(bits >> 8);
    }
    low_ = _mm256_load_si256(reinterpret_cast<const W*>(low));
    high_ = _mm256_load_si256(reinterpret_cast<const W*>(high));
  }
  W at(W codes) const {
    const W low = _mm256_and_si256(_mm256_shuffle_epi8(low_, codes), _mm256_set1_epi16(0xff));
    return _mm256_or_si256(low, _mm256_slli_epi16(_mm256_shuffle_epi8(high_, codes), 8));
  }

 private:
  W low_, high_;
};

class ByteTable {
 public:
  explicit ByteTable(const int16_t* values) {
    alignas(16) int8_t bytes[16];
    for (int i = 0; i < 16; ++i) bytes[i] = static_cast<int8_t>(values[i]);
    values_ = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(bytes)));
  }
  W at(W codes) const { return _mm256_shuffle_epi8(values_, codes); }

 private:
  W values_;
};

#else

static inline W set_int(int32_t i) {
  const auto u = static_cast<uint32_t>(i);
  return W{u, u, u, u};
}
static inline W both(W a, W b) { return a & b; }
static inline W either(W a, W b) { return a ^ b; }
static inline W plus(W a, W b) { return a + b; }
template <int N>
static inline W right(W a) {
  return a >> N;
}
static inline void store(uint32_t* p, W a) { std::memcpy(p, &a, sizeof a); }
static inline I upper(W a) { return reinterpret_cast<I>(a) >> 16; }
static inline I lower(W a) { return reinterpret_cast<I>(a << 16) >> 16; }
static inline W dot(W sums, W a, W b) {
  return sums + reinterpret_cast<W>(upper(a) * upper(b) + lower(a) * lower(b));
}
constexpr int64_t kMostByte = 127;  // NEON has signed bytes
static inline W dot_bytes(W sums, W a, W b) {
#if defined(__ARM_FEATURE_DOTPROD)
  return vreinterpretq_u32_s32(vdotq_s32(vreinterpretq_s32_u32(sums), vreinterpretq_s8_u32(a), vreinterpretq_s8_u32(b)));
#else
  const auto byte = [](W v, int i) { return reinterpret_cast<I>(v << (24 - 8 * i)) >> 24; };
  I all = reinterpret_cast<I>(sums);
  for (int i = 0; i < 4; ++i) all += byte(a, i) * byte(b, i);
  return reinterpret_cast<W>(all);
#endif
}
static inline V as_float(W a) { return __builtin_convertvector(reinterpret_cast<I>(a), V); }
static inline W add_fours(const W (&r)[4]) {
  W sums;
  for (int i = 0; i < 4; ++i) sums[i] = (r[i][0] + r[i][2]) + (r[i][1] + r[i][3]);
  return sums;
}
static inline void turn_fours(W (&)[1]) {}

class Table {
 public:
  explicit Table(const int16_t* values) {
    for (int i = 0; i < 16; ++i) values_[i] = static_cast<uint16_t>(values[i]);
  }
  W at(W codes) const {
    for (int i = 0; i < kLanes; ++i) {
      const uint32_t c = codes[i];
      codes[i] = values_[c & 15] | static_cast<uint32_t>(values_[c >> 16 & 15]) << 16;
    }
    return codes;
  }

 private:
  uint16_t values_[16];
};

class ByteTable {
 public:
  explicit ByteTable(const int16_t* values) {
    for (int i = 0; i < 16; ++i) values_[i] = static_cast<uint8_t>(values[i]);
  }
  W at(W codes) const {
    uint8_t bytes[sizeof(W)];
    std::memcpy(bytes, &codes, sizeof bytes);
    for (uint8_t& b : bytes) b = values_[b & 15];
    std::memcpy(&codes, bytes, sizeof bytes);
    return codes;
  }

 private:
  uint8_t values_[16];
};

#endif

#if !defined(__AVX512F__)
static inline W load_bytes(const uint8_t* p, int64_t n) {
  uint32_t some[kLanes] = {};
  if (n > 0) std::memcpy(some, p, static_cast<size_t>(n < 4 * kLanes ? n : 4 * kLanes));
  return load(some);
}
#endif

}  // namespace jaxllm::JAXLLM_LEVEL
