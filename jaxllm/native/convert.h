// Numbers of every type as vectors of f32, and back.
#pragma once

#include "numbers.h"
#include "simd.h"

namespace jaxllm::JAXLLM_LEVEL {

static inline float of_e8m0(uint8_t e) {  // OCP Microscaling Formats 1.0, section 5.4.1
  const uint32_t bits = e == 255 ? 0x7fc00000u : e == 0 ? 0x00400000u : static_cast<uint32_t>(e) << 23;
  float f;
  std::memcpy(&f, &bits, sizeof f);
  return f;
}

static inline float of_e4m3(uint8_t e) {  // OCP 8-bit Floating Point 1.0
  const int most = e >> 3 & 15, rest = e & 7;
  float f = most == 0 ? static_cast<float>(rest) * 0.001953125f
                      : static_cast<float>(8 + rest) * of_e8m0(static_cast<uint8_t>(most + 117));
  if ((e & 127) == 127) f = of_e8m0(255);
  return e & 128 ? -f : f;
}

static inline float number(const Numbers& t, int64_t i) {
  switch (t.type) {
    case Number::kF32: return static_cast<const float*>(t.data)[i];
    case Number::kBF16: return widened(static_cast<const Half*>(t.data)[i]);
    case Number::kF16: return widened(static_cast<const F16*>(t.data)[i]);
    case Number::kU8: return static_cast<const uint8_t*>(t.data)[i];
    case Number::kS8: return static_cast<const int8_t*>(t.data)[i];
    case Number::kE8M0: return of_e8m0(static_cast<const uint8_t*>(t.data)[i]);
    default: return of_e4m3(static_cast<const uint8_t*>(t.data)[i]);
  }
}

// Numbers i to i + count, or to i + kLanes where that is less; zeros in the other lanes.
static inline V numbers(const Numbers& t, int64_t i, int64_t count) {
  const auto some = [&](auto* p) { return count >= kLanes ? load(p) : load(p, count); };
  if (t.type == Number::kF32) return some(static_cast<const float*>(t.data) + i);
  if (t.type == Number::kBF16) return some(static_cast<const Half*>(t.data) + i);
  if (t.type == Number::kF16) return some(static_cast<const F16*>(t.data) + i);
  float wide[kLanes] = {};
  for (int64_t j = 0; j < kLanes; ++j) wide[j] = j < count ? number(t, i + j) : 0;
  return load(wide);
}

// to [4, kLanes] = four numbers of 16 bits of each of kLanes rows, turned round.
#if defined(__AVX512F__)
template <typename T>
static inline void turn_four(const uint16_t* from, int64_t row, float* to) {
  __m128i pairs[8];  // of rows
  for (int i = 0; i < 8; ++i) {
    const __m128i even = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from + 2 * i * row));
    pairs[i] = _mm_castpd_si128(
        _mm_loadh_pd(_mm_castsi128_pd(even), reinterpret_cast<const double*>(from + (2 * i + 1) * row)));
  }
  __m256i fours[4];
  for (int i = 0; i < 4; ++i)
    fours[i] = _mm256_inserti128_si256(_mm256_castsi128_si256(pairs[2 * i]), pairs[2 * i + 1], 1);
  const __m512i low = _mm512_inserti64x4(_mm512_castsi256_si512(fours[0]), fours[1], 1);
  const __m512i high = _mm512_inserti64x4(_mm512_castsi256_si512(fours[2]), fours[3], 1);
  const __m512i first = _mm512_set_epi16(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 60, 56, 52, 48, 44, 40, 36, 32,
                                         28, 24, 20, 16, 12, 8, 4, 0);
  for (int i = 0; i < 4; ++i) {
    const __m512i at = _mm512_add_epi16(first, _mm512_set1_epi16(static_cast<int16_t>(i)));
    uint16_t column[32];
    _mm512_storeu_si512(column, _mm512_permutex2var_epi16(low, at, high));
    store(to + i * kLanes, load(reinterpret_cast<const T*>(column)));
  }
}
#else
template <typename T>
static inline void turn_four(const uint16_t* from, int64_t row, float* to) {
  for (int64_t i = 0; i < kLanes; ++i)
    for (int j = 0; j < 4; ++j) {
      T one;
      std::memcpy(&one, from + i * row + j, sizeof one);
      to[j * kLanes + i] = widened(one);
    }
}
#endif

template <typename T>
static inline void write(T* to, V v, int64_t count) {
  if (count >= kLanes) return store(to, v);
  T values[kLanes];
  store(values, v);
  for (int64_t i = 0; i < count; ++i) to[i] = values[i];
}

// The first `count` lanes, or all, to `to` of a float's type.
static inline void write(void* to, Number type, int64_t at, V v, int64_t count) {
  if (type == Number::kF32) write(static_cast<float*>(to) + at, v, count);
  if (type == Number::kBF16) write(static_cast<Half*>(to) + at, v, count);
  if (type == Number::kF16) write(static_cast<F16*>(to) + at, v, count);
}

}  // namespace jaxllm::JAXLLM_LEVEL
