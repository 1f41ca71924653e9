// Included before every source of a sanitized library: compilers check no memory access that an intrinsic makes under
// a mask or at computed places, so these look at each value's first and last byte themselves.
#pragma once

#if defined(__AVX512F__)

#include <immintrin.h>

#include <cstdint>

namespace jaxllm::checked {

static inline void touch(const void* p, int64_t size) {
  const volatile char* bytes = static_cast<const volatile char*>(p);
  (void)bytes[0], (void)bytes[size - 1];
}

// Values of `size` bytes, those whose bit is set.
static inline void some(const void* p, uint64_t mask, int64_t size) {
  for (int64_t i = 0; i < 64; ++i)
    if (mask >> i & 1) touch(static_cast<const char*>(p) + i * size, size);
}

static inline void at(const void* p, __m512i index, int64_t scale) {
  int32_t places[16];
  _mm512_storeu_si512(places, index);
  for (int64_t place : places) touch(static_cast<const char*>(p) + place * scale, 4);
}

}  // namespace jaxllm::checked

#define JAXLLM_SOME(p, mask, size) jaxllm::checked::some(p, mask, size)
#define _mm512_maskz_loadu_ps(mask, p) (JAXLLM_SOME(p, mask, 4), (_mm512_maskz_loadu_ps)(mask, p))
#define _mm512_maskz_loadu_epi8(mask, p) (JAXLLM_SOME(p, mask, 1), (_mm512_maskz_loadu_epi8)(mask, p))
#define _mm512_maskz_loadu_epi16(mask, p) (JAXLLM_SOME(p, mask, 2), (_mm512_maskz_loadu_epi16)(mask, p))
#define _mm256_maskz_loadu_epi16(mask, p) (JAXLLM_SOME(p, mask, 2), (_mm256_maskz_loadu_epi16)(mask, p))
#define _mm512_mask_storeu_ps(p, mask, v) (JAXLLM_SOME(p, mask, 4), (_mm512_mask_storeu_ps)(p, mask, v))
#define _mm512_mask_storeu_epi16(p, mask, v) (JAXLLM_SOME(p, mask, 2), (_mm512_mask_storeu_epi16)(p, mask, v))
#define _mm256_mask_storeu_epi16(p, mask, v) (JAXLLM_SOME(p, mask, 2), (_mm256_mask_storeu_epi16)(p, mask, v))
#define _mm512_i32gather_ps(index, p, scale) \
  (jaxllm::checked::at(p, index, scale), (_mm512_i32gather_ps)(index, p, scale))
#define _mm512_i32scatter_epi32(p, index, v, scale) \
  (jaxllm::checked::at(p, index, scale), (_mm512_i32scatter_epi32)(p, index, v, scale))

#endif
