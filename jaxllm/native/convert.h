// Numbers of every type as vectors of f32, and back.
#pragma once

#include "numbers.h"
#include "simd.h"

namespace jaxllm::JAXLLM_LEVEL {

static inline float of_half(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16, most = h >> 10 & 31, rest = h & 1023;
  if (most == 0) {
    const float small = static_cast<float>(rest) * 5.9604644775390625e-8f;  // 2^-24
    return sign ? -small : small;
  }
  const uint32_t bits = sign | (most == 31 ? 0x7f800000u : (most + 112) << 23) | rest << 13;
  float f;
  std::memcpy(&f, &bits, sizeof f);
  return f;
}

static inline uint16_t to_half(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, sizeof bits);
  const uint32_t sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
  if (size > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);
  if (size >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);  // rounds beyond the largest
  if (size < 0x38800000) {  // below 2^-14: adding 0.5 leaves the fraction in the last bits
    float small;
    std::memcpy(&small, &size, sizeof small);
    small += 0.5f;
    uint32_t rounded;
    std::memcpy(&rounded, &small, sizeof rounded);
    return static_cast<uint16_t>(sign | (rounded - 0x3f000000));
  }
  return static_cast<uint16_t>(sign | ((size + 0xfff + (size >> 13 & 1) - 0x38000000) >> 13));
}

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
    case Number::kF16: return of_half(static_cast<const uint16_t*>(t.data)[i]);
    case Number::kU8: return static_cast<const uint8_t*>(t.data)[i];
    case Number::kS8: return static_cast<const int8_t*>(t.data)[i];
    case Number::kE8M0: return of_e8m0(static_cast<const uint8_t*>(t.data)[i]);
    default: return of_e4m3(static_cast<const uint8_t*>(t.data)[i]);
  }
}

// Numbers i to i + count, zeros in the other lanes.
static inline V numbers(const Numbers& t, int64_t i, int64_t count) {
#if defined(__AVX512F__)
  if (t.type == Number::kF16)
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(count), static_cast<const uint16_t*>(t.data) + i));
#elif defined(__AVX2__)
  if (t.type == Number::kF16 && count >= kLanes)
    return _mm256_cvtph_ps(_mm_loadu_si128(
        reinterpret_cast<const __m128i*>(static_cast<const uint16_t*>(t.data) + i)));
#endif
  if (t.type == Number::kF32) return load(static_cast<const float*>(t.data) + i, count);
  if (t.type == Number::kBF16) return load(static_cast<const Half*>(t.data) + i, count);
  float wide[kLanes] = {};
  for (int64_t j = 0; j < kLanes; ++j) wide[j] = j < count ? number(t, i + j) : 0;
  return load(wide);
}

static inline void write(void* to, Number type, int64_t at, V v, int64_t count) {
#if defined(__AVX512F__)
  if (type == Number::kBF16)
    return _mm256_mask_storeu_epi16(static_cast<Half*>(to) + at, first(count),
                                    reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v)));
  if (type == Number::kF16)
    return _mm256_mask_storeu_epi16(static_cast<uint16_t*>(to) + at, first(count), _mm512_cvtps_ph(v, 0));
  _mm512_mask_storeu_ps(static_cast<float*>(to) + at, first(count), v);
#else
  float values[kLanes];
  store(values, v);
  for (int64_t i = 0; i < (count < kLanes ? count : kLanes); ++i) {
    if (type == Number::kF32) static_cast<float*>(to)[at + i] = values[i];
    if (type == Number::kBF16) static_cast<Half*>(to)[at + i] = narrowed(values[i]);
    if (type == Number::kF16) static_cast<uint16_t*>(to)[at + i] = to_half(values[i]);
  }
#endif
}

}  // namespace jaxllm::JAXLLM_LEVEL
