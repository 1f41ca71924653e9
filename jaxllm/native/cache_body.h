// Reading a cache in blocks of slots: values of any type as numbers, and codes as what they stand for.
#pragma once

#include <type_traits>

#include "attention.h"
#include "simd.h"

namespace jaxllm::JAXLLM_LEVEL {

// Hands out parts of one piece of memory, each on its own cache lines. Without memory it only counts.
class Parts {
 public:
  explicit Parts(char* memory) : memory_(memory) {}

  template <typename T>
  T* take(int64_t count) {
    const int64_t at = used_;
    used_ += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return memory_ == nullptr ? nullptr : reinterpret_cast<T*>(memory_ + at);
  }
  int64_t used() const { return used_; }

 private:
  char* memory_;
  int64_t used_ = 0;
};

inline int64_t up(int64_t count, int64_t unit) { return (count + unit - 1) / unit * unit; }

// Where slot s of a (batch, head) lies: the number of its row among those of all.
inline int64_t row_of(const Attention& a, const Piece& p, int64_t s) { return (p.b * a.heads + p.head) * a.s + s; }

template <typename T>
static inline const T* values(const Cache& c, int64_t row) {
  return static_cast<const T*>(c.values) + row * c.h;
}

// ---- codes as numbers: kLanes of them from p on --------------------------------------------------------------

#if defined(__AVX2__)

#if defined(__AVX512F__)
using Bytes = __m128i;
using Words = __m256i;
static inline Bytes bytes_at(const uint8_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
static inline Bytes half_the_bytes_at(const uint8_t* p) { return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)); }
static inline V numbers(Bytes b) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(b)); }
static inline V f16_of_float8(Bytes b) {
  const Words wide = _mm256_cvtepu8_epi16(b), size = _mm256_and_si256(wide, _mm256_set1_epi16(0x7f));
  const Words sign = _mm256_slli_epi16(_mm256_and_si256(wide, _mm256_set1_epi16(0x80)), 8);
  const Words none = _mm256_and_si256(_mm256_cmpeq_epi16(size, _mm256_set1_epi16(0x7f)), _mm256_set1_epi16(0x7e00));
  return _mm512_cvtph_ps(_mm256_or_si256(_mm256_or_si256(_mm256_slli_epi16(size, 7), sign), none));
}
#else
using Bytes = __m128i;  // in its lower half
static inline Bytes bytes_at(const uint8_t* p) { return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)); }
static inline Bytes half_the_bytes_at(const uint8_t* p) {
  int32_t four;
  std::memcpy(&four, p, sizeof four);
  return _mm_cvtsi32_si128(four);
}
static inline V numbers(Bytes b) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(b)); }
static inline V f16_of_float8(Bytes b) {
  const __m128i wide = _mm_cvtepu8_epi16(b), size = _mm_and_si128(wide, _mm_set1_epi16(0x7f));
  const __m128i sign = _mm_slli_epi16(_mm_and_si128(wide, _mm_set1_epi16(0x80)), 8);
  const __m128i none = _mm_and_si128(_mm_cmpeq_epi16(size, _mm_set1_epi16(0x7f)), _mm_set1_epi16(0x7e00));
  return _mm256_cvtph_ps(_mm_or_si128(_mm_or_si128(_mm_slli_epi16(size, 7), sign), none));
}
#endif

static inline V int8s(const uint8_t* p) { return numbers(bytes_at(p)); }
static inline V int4s(const uint8_t* p) {
  const __m128i pairs = _mm_cvtepu8_epi16(half_the_bytes_at(p));
  const __m128i codes = _mm_and_si128(_mm_or_si128(pairs, _mm_slli_epi16(pairs, 4)), _mm_set1_epi8(15));
  return numbers(_mm_sub_epi8(codes, _mm_set1_epi8(8)));
}
// An f16 of the same bits is 2^-8 of the number: its exponent counts from 15 instead of 7.
static inline V float8s(const uint8_t* p) { return f16_of_float8(bytes_at(p)) * set(256); }

#else

static inline float number(uint8_t float8) {
  const uint16_t sign = static_cast<uint16_t>((float8 & 0x80) << 8), size = float8 & 0x7f;
  if (size == 0x7f) return __builtin_nanf("");
  return widened(F16{static_cast<uint16_t>(sign | size << 7)}) * 256;
}
static inline V int8s(const uint8_t* p) {
  V v;
  for (int64_t i = 0; i < kLanes; ++i) v[i] = static_cast<float>(static_cast<int8_t>(p[i]));
  return v;
}
static inline V int4s(const uint8_t* p) {
  V v;
  for (int64_t i = 0; i < kLanes; ++i) v[i] = static_cast<float>((p[i / 2] >> 4 * (i % 2) & 15) - 8);
  return v;
}
static inline V float8s(const uint8_t* p) {
  V v;
  for (int64_t i = 0; i < kLanes; ++i) v[i] = number(p[i]);
  return v;
}

#endif

template <Held H>
static inline V codes(const uint8_t* p) {
  return H == Held::kInt8 ? int8s(p) : H == Held::kInt4 ? int4s(p) : float8s(p);
}

template <Held H>
static inline float scale_at(const Cache& c, int64_t at) {
  return H == Held::kInt4 ? widened(static_cast<const Half*>(c.scales)[at]) : static_cast<const float*>(c.scales)[at];
}

// The scales of n values from column d on, where they differ within a vector.
template <Held H>
static inline V scales(const Cache& c, int64_t at, int64_t group, int64_t d, int64_t n) {
  float f[kLanes] = {};
  for (int64_t i = 0; i < n; ++i) f[i] = scale_at<H>(c, at + (d + i) / group);
  return load(f);
}

template <Type Y>
static inline V as_type(V v) {
  return Y == Type::kF32 ? v : Y == Type::kBF16 ? rounded(v) : rounded_f16(v);
}

// Rows of codes as [slots, pitch] values, rounded to Y, and zeros.
template <Held H, Type Y, typename T>
void expand_codes(const Cache& c, int64_t row, int64_t slots, T* to, int64_t pitch) {
  constexpr int64_t kPerByte = H == Held::kInt4 ? 2 : 1;
  const int64_t group = c.h / c.groups, whole = c.h / kLanes * kLanes;
  const bool even = group % kLanes == 0;
  for (; slots > 0; --slots, ++row, to += pitch) {
    const uint8_t* from = static_cast<const uint8_t*>(c.values) + row * c.h / kPerByte;
    const int64_t at = row * c.groups;
    for (int64_t g = 0, d = 0; even && g < c.groups; ++g) {
      const V scale = set(scale_at<H>(c, at + g));
      for (const int64_t end = d + group; d < end; d += kLanes)
        store(to + d, as_type<Y>(codes<H>(from + d / kPerByte) * scale));
    }
    for (int64_t d = 0; !even && d < whole; d += kLanes)
      store(to + d, as_type<Y>(codes<H>(from + d / kPerByte) * scales<H>(c, at, group, d, kLanes)));
    if (whole == pitch) continue;
    const int64_t n = c.h - whole;
    uint8_t copy[kLanes] = {};
    std::memcpy(copy, from + whole / kPerByte, static_cast<size_t>(n / kPerByte));
    const V last = as_type<Y>(codes<H>(copy) * scales<H>(c, at, group, whole, n));
    store(to + whole, where((1u << n) - 1, last, set(0)));
    for (int64_t d = whole + kLanes; d < pitch; d += kLanes) store(to + d, set(0));
  }
}

// The same of rows of numbers, U as they lie.
template <typename U, typename T>
void expand_plain(const Cache& c, int64_t row, int64_t slots, T* to, int64_t pitch) {
  for (; slots > 0; --slots, ++row, to += pitch) {
    const U* from = values<U>(c, row);
    int64_t d = 0;
    for (; d + kLanes <= c.h; d += kLanes) store(to + d, load(from + d));
    for (; d < pitch; d += kLanes) store(to + d, d < c.h ? load(from + d, c.h - d) : set(0));
  }
}

template <Type Y, typename T>
auto expander(Held held) {
  using U = std::conditional_t<Y == Type::kF32, float, std::conditional_t<Y == Type::kBF16, Half, F16>>;
  if (held == Held::kPlain) return &expand_plain<U, T>;
  if (held == Held::kInt8) return &expand_codes<Held::kInt8, Y, T>;
  return held == Held::kInt4 ? &expand_codes<Held::kInt4, Y, T> : &expand_codes<Held::kFloat8, Y, T>;
}

// Rows `row` to `row + slots` of a cache as [64, pitch], zeros around them; pitch is a multiple of kLanes.
template <typename T>
void expand(const Cache& c, Type type, int64_t row, int64_t slots, T* to, int64_t pitch) {
  const auto one = type == Type::kF32    ? expander<Type::kF32, T>(c.held)
                   : type == Type::kBF16 ? expander<Type::kBF16, T>(c.held)
                                         : expander<Type::kF16, T>(c.held);
  one(c, row, slots, to, pitch);
  std::memset(to + slots * pitch, 0, sizeof(T) * static_cast<size_t>((kBlock - slots) * pitch));
}

template <typename T>
constexpr Type type_of();
template <>
constexpr Type type_of<float>() {
  return Type::kF32;
}
template <>
constexpr Type type_of<Half>() {
  return Type::kBF16;
}
template <>
constexpr Type type_of<F16>() {
  return Type::kF16;
}

// The keys and values of one block after the other as [64, row] of T: where they lie, if they lie so, or copied.
template <typename T>
class Blocks {
 public:
  Blocks(const Attention& a, const Piece& p, Parts& parts)
      : a_(a), p_(p), k_copy_(parts.take<T>(kBlock * up(a.k.h, kLanes))),
        v_copy_(parts.take<T>(kBlock * up(a.v.h, kLanes))) {}

  void take(int64_t s, int64_t slots) {
    k_ = block(a_.k, s, slots, k_copy_);
    // Where keys are values, as in latent attention, one copy serves for both.
    const bool shared = a_.k.values == a_.v.values && a_.k.scales == a_.v.scales && a_.k.h == a_.v.h;
    v_ = shared ? k_ : block(a_.v, s, slots, v_copy_);
  }

  const T* k() const { return k_; }
  const T* v() const { return v_; }
  int64_t k_row() const { return up(a_.k.h, kLanes); }
  int64_t v_row() const { return up(a_.v.h, kLanes); }

 private:
  const T* block(const Cache& c, int64_t s, int64_t slots, T* copy) {
    const bool lies = c.held == Held::kPlain && a_.type == type_of<T>() && c.h % kLanes == 0 && slots == kBlock;
    if (lies) return values<T>(c, row_of(a_, p_, s));
    expand(c, a_.type, row_of(a_, p_, s), slots, copy, up(c.h, kLanes));
    return copy;
  }

  const Attention& a_;
  const Piece& p_;
  T *k_copy_, *v_copy_;
  const T *k_ = nullptr, *v_ = nullptr;
};

}  // namespace jaxllm::JAXLLM_LEVEL
