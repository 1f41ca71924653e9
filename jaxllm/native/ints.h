// Vectors of whole numbers, as wide as those of simd.h: 32 bits a lane, or two numbers of 16 bits.
#pragma once

#include "simd.h"

namespace jaxllm::JAXLLM_LEVEL {

#if defined(__AVX512F__)

static inline W set_int(int32_t i) { return _mm512_set1_epi32(i); }
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
static inline V as_float(W a) { return _mm512_cvtepi32_ps(a); }
static inline float highest(V a) { return _mm512_reduce_max_ps(a); }

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

// Lane j of row i becomes lane i of row j.
static inline void turn(W r[16]) {
  W t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
  for (int i = 0; i < 8; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
  }
}

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
static inline V as_float(W a) { return _mm256_cvtepi32_ps(a); }

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

static inline void turn(W r[8]) {
  W t[8];
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    r[i] = _mm256_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm256_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm256_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm256_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm256_permute2x128_si256(r[i], r[i + 4], 0x20);
    t[i + 4] = _mm256_permute2x128_si256(r[i], r[i + 4], 0x31);
  }
  for (int i = 0; i < 8; ++i) r[i] = t[i];
}

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
static inline V as_float(W a) { return __builtin_convertvector(reinterpret_cast<I>(a), V); }

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

static inline void turn(W r[4]) {
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < i; ++j) {
      const uint32_t kept = r[i][j];
      r[i][j] = r[j][i];
      r[j][i] = kept;
    }
}

#endif

#if !defined(__AVX512F__)
static inline float highest(V a) {
  float found = a[0];
  for (int i = 1; i < kLanes; ++i) found = a[i] > found ? a[i] : found;
  return found;
}
#endif

}  // namespace jaxllm::JAXLLM_LEVEL
