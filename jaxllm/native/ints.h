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

#endif

}  // namespace jaxllm::JAXLLM_LEVEL
