// Reading a cache in blocks of slots: values of any type as numbers, and codes as what they stand for.
#pragma once

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

#if defined(__AVX512F__)

static inline V numbers(__m128i codes) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(codes)); }
static inline V int8s(const uint8_t* p) { return numbers(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
static inline V int4s(const uint8_t* p) {
  const __m128i pairs = _mm_cvtepu8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  const __m128i codes = _mm_and_si128(_mm_or_si128(pairs, _mm_slli_epi16(pairs, 4)), _mm_set1_epi8(15));
  return numbers(_mm_sub_epi8(codes, _mm_set1_epi8(8)));
}
// An f16 of the same bits is 2^-8 of the number: its exponent counts from 15 instead of 7.
static inline V float8s(const uint8_t* p) {
  const __m256i wide = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  const __m256i moved = _mm256_srai_epi16(_mm256_slli_epi16(wide, 8), 1);
  const __m256i bits = _mm256_and_si256(moved, _mm256_set1_epi16(static_cast<int16_t>(0xbfff)));
  const __mmask16 none = _mm256_cmpeq_epi16_mask(_mm256_and_si256(wide, _mm256_set1_epi16(0x7f)), _mm256_set1_epi16(0x7f));
  return _mm512_mask_mov_ps(_mm512_cvtph_ps(bits) * set(256), none, set(__builtin_nanf("")));
}

#else

static inline float number(uint8_t float8) {
  const uint16_t sign = static_cast<uint16_t>((float8 & 0x80) << 8), rest = float8 & 0x7f;
  if (rest == 0x7f) return __builtin_nanf("");
  return widened(F16{static_cast<uint16_t>(sign | rest << 7)}) * 256;
}
static inline V int8s(const uint8_t* p) {
  float f[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) f[i] = static_cast<float>(static_cast<int8_t>(p[i]));
  return load(f);
}
static inline V int4s(const uint8_t* p) {
  float f[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) f[i] = static_cast<float>((p[i / 2] >> 4 * (i % 2) & 15) - 8);
  return load(f);
}
static inline V float8s(const uint8_t* p) {
  float f[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) f[i] = number(p[i]);
  return load(f);
}

#endif

// n numbers from column d of a row of codes on; the other lanes hold anything.
static inline V codes(const Cache& c, int64_t row, int64_t d, int64_t n) {
  const int per_byte = c.held == Held::kInt4 ? 2 : 1;
  const uint8_t* from = static_cast<const uint8_t*>(c.values) + (row * c.h + d) / per_byte;
  uint8_t copy[kLanes] = {};
  if (n < kLanes) {
    std::memcpy(copy, from, static_cast<size_t>((n + per_byte - 1) / per_byte));
    from = copy;
  }
  if (c.held == Held::kInt8) return int8s(from);
  return c.held == Held::kInt4 ? int4s(from) : float8s(from);
}

static inline float scale_of(const Cache& c, int64_t at) {
  return c.held == Held::kInt4 ? widened(static_cast<const Half*>(c.scales)[at]) : static_cast<const float*>(c.scales)[at];
}

// The scales of n values from column d on.
static inline V scales(const Cache& c, int64_t row, int64_t d, int64_t n) {
  const int64_t group = c.h / c.groups, at = row * c.groups;
  if (d / group == (d + n - 1) / group) return set(scale_of(c, at + d / group));
  float f[kLanes] = {};
  for (int64_t i = 0; i < n; ++i) f[i] = scale_of(c, at + (d + i) / group);
  return load(f);
}

static inline V as_type(Type type, V v) {
  return type == Type::kF32 ? v : type == Type::kBF16 ? rounded(v) : rounded_f16(v);
}

// n values of a row from column d on; the other lanes are zero.
template <typename T>
static inline V plain(const Cache& c, int64_t row, int64_t d, int64_t n) {
  const T* from = values<T>(c, row) + d;
  return n >= kLanes ? load(from) : load(from, n);
}
static inline V some(const Cache& c, Type type, int64_t row, int64_t d, int64_t n) {
  if (c.held == Held::kPlain && type == Type::kBF16) return plain<Half>(c, row, d, n);
  if (c.held == Held::kPlain) return type == Type::kF16 ? plain<F16>(c, row, d, n) : plain<float>(c, row, d, n);
  const int64_t count = n < kLanes ? n : kLanes;
  const V v = as_type(type, codes(c, row, d, count) * scales(c, row, d, count));
  return n < kLanes ? where((1u << n) - 1, v, set(0)) : v;
}

// Rows `row` to `row + slots` of a cache as [64, pitch], zeros around them; pitch is a multiple of kLanes.
template <typename T>
void expand(const Cache& c, Type type, int64_t row, int64_t slots, T* to, int64_t pitch) {
  for (int64_t s = 0; s < slots; ++s)
    for (int64_t d = 0; d < pitch; d += kLanes)
      store(to + s * pitch + d, d < c.h ? some(c, type, row + s, d, c.h - d) : set(0));
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
