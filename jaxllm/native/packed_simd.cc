// Products with packed weights: the rows of w lie across the lanes. Compiled once for each level.
#include "ints.h"
#include "packed.h"

namespace jaxllm::JAXLLM_LEVEL {
namespace {

int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t up(int64_t a, int64_t unit) { return (a + unit - 1) / unit * unit; }

// ---- numbers of other types --------------------------------------------------------------------------------

float of_half(uint16_t h) {
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

uint16_t to_half(float f) {
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

float of_e8m0(uint8_t e) {  // OCP Microscaling Formats 1.0, section 5.4.1
  const uint32_t bits = e == 255 ? 0x7fc00000u : e == 0 ? 0x00400000u : static_cast<uint32_t>(e) << 23;
  float f;
  std::memcpy(&f, &bits, sizeof f);
  return f;
}

float of_e4m3(uint8_t e) {  // OCP 8-bit Floating Point 1.0
  const int most = e >> 3 & 15, rest = e & 7;
  float f = most == 0 ? static_cast<float>(rest) * 0.001953125f
                      : static_cast<float>(8 + rest) * of_e8m0(static_cast<uint8_t>(most + 117));
  if ((e & 127) == 127) f = of_e8m0(255);
  return e & 128 ? -f : f;
}

float number(const Numbers& t, int64_t i) {
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
V numbers(const Numbers& t, int64_t i, int64_t count) {
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

void write(void* to, Number type, int64_t at, V v, int64_t count) {
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
  for (int64_t i = 0; i < least(count, kLanes); ++i) {
    if (type == Number::kF32) static_cast<float*>(to)[at + i] = values[i];
    if (type == Number::kBF16) static_cast<Half*>(to)[at + i] = narrowed(values[i]);
    if (type == Number::kF16) static_cast<uint16_t*>(to)[at + i] = to_half(values[i]);
  }
#endif
}

// ---- activations -------------------------------------------------------------------------------------------

// The power of two that makes whole numbers below 2^15 of what is at most `most`; NaN where that is not finite.
float unit_of(float most) {
  uint32_t bits;
  std::memcpy(&bits, &most, sizeof bits);
  const uint32_t exponent = bits >> 23;
  if (exponent >= 255) return of_e8m0(255);
  return of_e8m0(static_cast<uint8_t>(exponent < 40 ? 26 : exponent - 14));
}

// Where column i of a block goes: see the order in which `Nibbles` and `Bytes` take codes from a word.
int64_t place(bool bytes, int64_t i) {
  return bytes ? (i & ~int64_t{3}) + (i & 1) * 2 + (i >> 1 & 1) : (i & ~int64_t{7}) + (i & 3) * 2 + (i >> 2 & 1);
}

// Leaves in `values` what the whole numbers lack.
void round_block(float* values, bool bytes, int16_t* to, float* unit, int32_t* sum) {
  V most = set(0);
  for (int64_t i = 0; i < kBlock32; i += kLanes) {
    const V v = load(values + i);
    most = max(max(most, set(0) - v), v);
  }
  float each[kLanes], largest = 0, odd = 0;
  store(each, most);
  for (float e : each) largest = e > largest ? e : largest;
  for (int64_t i = 0; i < kBlock32; ++i) odd += values[i] * 0;  // NaN where one is not finite
  *unit = odd == 0 ? unit_of(largest) : of_e8m0(255);
  *sum = 0;
  const bool finite = *unit == *unit;
  const float inverse = finite ? 1 / *unit : 0;
  for (int64_t i = 0; i < kBlock32; ++i) {
    // Adding 1.5 * 2^23 rounds to a whole number and leaves it in the lower bits.
    const float shifted = (finite ? values[i] * inverse : 0) + 12582912.0f;
    int32_t whole;
    std::memcpy(&whole, &shifted, sizeof whole);
    whole -= 0x4b400000;
    whole = whole > 32767 ? 32767 : whole < -32767 ? -32767 : whole;
    *sum += whole;
    to[place(bytes, i)] = static_cast<int16_t>(whole);
    values[i] -= static_cast<float>(whole) * *unit;
  }
}

// ---- strips of weights -------------------------------------------------------------------------------------

struct Nibbles {
  static constexpr int kPairs = 4;  // pairs of codes in a word
  explicit Nibbles(const Packed&) {}
  template <int J>
  W pair(W w) const {
    return both(right<4 * J>(w), set_int(0x000f000f));
  }
};

struct Looked {
  static constexpr int kPairs = 4;
  explicit Looked(const Packed& p) : table_(p.table) {}
  template <int J>
  W pair(W w) const {
    return table_.at(both(right<4 * J>(w), set_int(0x000f000f)));
  }
  Table table_;
};

struct Bytes {
  static constexpr int kPairs = 2;
  explicit Bytes(const Packed&) {}
  template <int J>
  W pair(W w) const {
    return both(right<8 * J>(w), set_int(0x00ff00ff));
  }
};

bool has_bytes(const Packed& p) { return p.kind == Codes::kBytes || p.kind == Codes::kSigned; }
int64_t blocks_of(const Packed& p) { return up(p.k, kBlock32) / kBlock32; }
int64_t words_of(const Packed& p) { return blocks_of(p) * (has_bytes(p) ? 8 : 4); }  // of a row

// kLanes rows of weights with their words and numbers turned round: [.., kLanes].
struct Strip {
  uint32_t* words;
  float *scale, *zero, *offset;
};

int64_t numbers_bytes(const Numbers& t, const Numbers& above) {
  return t.data == nullptr ? 0 : (up(t.count, kLanes) + up(above.count, kLanes)) * kLanes * 4;
}

Strip strip_in(const Packed& p, void* memory) {
  char* at = static_cast<char*>(memory);
  Strip s{};
  s.words = reinterpret_cast<uint32_t*>(at);
  at += up(words_of(p), kLanes) * kLanes * 4;
  s.scale = reinterpret_cast<float*>(at);
  at += numbers_bytes(p.scale, p.super_scale);
  s.zero = p.zero.data ? reinterpret_cast<float*>(at) : nullptr;
  at += numbers_bytes(p.zero, {});
  s.offset = p.offset.data ? reinterpret_cast<float*>(at) : nullptr;
  return s;
}

// Words w to w + kLanes of a row, zeros beyond its end.
W words_at(const Packed& p, int64_t row, int64_t w) {
  const uint8_t* from = p.codes + row * p.row_bytes + 4 * w;
  const int64_t left = p.row_bytes - 4 * w;
  if (left >= 4 * kLanes) return load(reinterpret_cast<const uint32_t*>(from));
  uint32_t some[kLanes] = {};
  if (left > 0) std::memcpy(some, from, static_cast<size_t>(left));
  return load(some);
}

void turn_words(const Packed& p, int64_t n, int64_t rows, uint32_t* to) {
  const W flip = set_int(p.kind == Codes::kSigned ? static_cast<int32_t>(0x80808080u) : 0);
  for (int64_t w = 0; w < words_of(p); w += kLanes) {
    W r[kLanes];
    for (int64_t i = 0; i < kLanes; ++i) r[i] = i < rows ? either(words_at(p, n + i, w), flip) : set_int(0);
    turn(r);
    for (int64_t i = 0; i < kLanes; ++i) store(to + (w + i) * kLanes, r[i]);
  }
}

void turn_numbers(const Numbers& t, int64_t n, int64_t rows, float* to) {
  for (int64_t g = 0; g < t.count; g += kLanes) {
    W r[kLanes];
    for (int64_t i = 0; i < kLanes; ++i)
      r[i] = i < rows ? reinterpret_cast<W>(numbers(t, (n + i) * t.count + g, t.count - g)) : set_int(0);
    turn(r);
    for (int64_t i = 0; i < kLanes; ++i) store(to + (g + i) * kLanes, as_bits_float(r[i]));
  }
}

void turn_scaled(const Numbers& t, const Numbers& above, float factor, int64_t n, int64_t rows, float* to) {
  turn_numbers(t, n, rows, to);
  if (above.data == nullptr && factor == 1) return;
  float* over = to + up(t.count, kLanes) * kLanes;
  if (above.data != nullptr) turn_numbers(above, n, rows, over);
  for (int64_t g = 0; g < t.count; ++g) {
    const V high = above.data ? load(over + g * above.count / t.count * kLanes) : set(1);
    store(to + g * kLanes, load(to + g * kLanes) * (high * set(factor)));
  }
}

void fill(const Packed& p, int64_t n, int64_t rows, const Strip& s) {
  turn_words(p, n, rows, s.words);
  turn_scaled(p.scale, p.super_scale, p.factor, n, rows, s.scale);
  if (s.zero) turn_numbers(p.zero, n, rows, s.zero);
  if (s.offset) turn_scaled(p.offset, p.super_offset, 1, n, rows, s.offset);
}

// ---- products ----------------------------------------------------------------------------------------------

// What to fetch while a strip is at work: the next one, a line with every word.
class Next {
 public:
  Next(const Packed& p, int64_t n) : p_(n + 2 * kLanes <= p.n ? &p : nullptr), n_(n + kLanes) {}
  void some(int64_t word) const {
    if (p_ == nullptr || word % 16 >= kLanes) return;
    __builtin_prefetch(p_->codes + (n_ + word % 16) * p_->row_bytes + word / 16 * 64, 0, 2);
  }

 private:
  const Packed* p_;
  int64_t n_;
};

// sums + the products of word's codes with those of x: R rows of 16-bit pairs, `stride` 32-bit words apart.
template <int R, typename C, int J = 0>
inline void add_word(const C& codes, W word, const int32_t* x, int64_t stride, W* sums) {
  if constexpr (J < C::kPairs) {
    const W pair = codes.template pair<J>(word);
    for (int i = 0; i < R; ++i) sums[i] = dot(sums[i], pair, set_int(x[i * stride + J]));
    add_word<R, C, J + 1>(codes, word, x, stride, sums);
  }
}

// Rows m to m + R of x against the strip's rows n to n + rows.
template <int R, typename C>
void some_rows(const Packed& p, const Rounded& x, const Strip& s, int64_t m, int64_t n, int64_t rows, bool fetch) {
  constexpr int kWords = 16 / C::kPairs;  // in a block
  const C codes(p);
  const Next next(p, fetch ? n : p.n);
  const auto* values = reinterpret_cast<const int32_t*>(x.values) + m * x.blocks * 16;
  const int64_t stride = x.blocks * 16, at = m * x.blocks, a_group = p.group / kBlock32;
  V totals[R];
  for (V& t : totals) t = set(0);
  for (int64_t b = 0, g = 0, left = a_group; b < x.blocks; ++b) {
    W sums[R];
    for (int i = 0; i < R; ++i) sums[i] = set_int(x.start[at + i * x.blocks + b]);
    for (int64_t w = b * kWords; w < (b + 1) * kWords; ++w) {
      next.some(w);
      add_word<R>(codes, load(s.words + w * kLanes), values + w * C::kPairs, stride, sums);
    }
    const V scale = load(s.scale + g * kLanes);
    for (int i = 0; i < R; ++i) {
      const int64_t j = at + i * x.blocks + b;
      const V unit = set(x.scale[j]);
      V sum = as_float(sums[i]);
      if (s.zero) sum = fma(set(-x.sum[j]), load(s.zero + g * kLanes), sum);
      totals[i] = fma(sum, scale * unit, totals[i]);
      if (s.offset) totals[i] = fma(set(x.sum[j]) * unit, load(s.offset + g * kLanes), totals[i]);
    }
    if (--left == 0) ++g, left = a_group;
  }
  for (int64_t i = 0; i < R; i += x.parts) {
    const V total = x.parts == 2 ? totals[i] + totals[i + 1] : totals[i];
    write(p.y, p.y_type, (m + i) / x.parts * p.n + n, total, rows);
  }
}

template <typename C>
void strip(const Packed& p, const Rounded& x, const Strip& s, int64_t m0, int64_t m1, int64_t n, int64_t rows) {
  constexpr int kMost = kLanes == 16 ? 8 : 4;
  int64_t m = m0 *= x.parts;
  m1 *= x.parts;
  for (; m + kMost <= m1; m += kMost) some_rows<kMost, C>(p, x, s, m, n, rows, m == m0);
  for (; m + 4 <= m1; m += 4) some_rows<4, C>(p, x, s, m, n, rows, m == m0);
  for (; m + 2 <= m1; m += 2) some_rows<2, C>(p, x, s, m, n, rows, m == m0);
  for (; m < m1; ++m) some_rows<1, C>(p, x, s, m, n, rows, m == m0);
}

template <typename C>
void strips(const Packed& p, const Rounded& x, int64_t m0, int64_t m1, int64_t n0, int64_t n1, void* memory) {
  const Strip s = strip_in(p, memory);
  for (int64_t n = n0; n < n1; n += kLanes) {
    const int64_t rows = least(kLanes, n1 - n);
    fill(p, n, rows, s);
    strip<C>(p, x, s, m0, m1, n, rows);
  }
}

}  // namespace

extern const int64_t kStripRows = kLanes;

void round_row(const Packed& p, int64_t row, const Rounded& x) {
  const Numbers from{p.x, p.x_type, p.k};
  for (int64_t b = 0; b < x.blocks; ++b) {
    float values[kBlock32];
    for (int64_t i = 0, k = b * kBlock32; i < kBlock32; i += kLanes, k += kLanes)
      store(values + i, k < p.k ? numbers(from, row * p.k + k, p.k - k) : set(0));
    for (int64_t part = 0; part < x.parts; ++part) {
      const int64_t at = (row * x.parts + part) * x.blocks + b;
      int32_t sum;
      round_block(values, has_bytes(p), x.values + at * kBlock32, x.scale + at, &sum);
      x.sum[at] = static_cast<float>(sum);
      x.start[at] = static_cast<int32_t>(-p.center * sum);
    }
  }
}

int64_t strip_bytes(const Packed& p) {
  return up(words_of(p), kLanes) * kLanes * 4 + numbers_bytes(p.scale, p.super_scale) + numbers_bytes(p.zero, {}) +
         numbers_bytes(p.offset, p.super_offset);
}

void packed(const Packed& p, const Rounded& x, int64_t m0, int64_t m1, int64_t n0, int64_t n1, void* memory) {
  if (p.kind == Codes::kNibbles) return strips<Nibbles>(p, x, m0, m1, n0, n1, memory);
  if (p.kind == Codes::kTable) return strips<Looked>(p, x, m0, m1, n0, n1, memory);
  strips<Bytes>(p, x, m0, m1, n0, n1, memory);
}

}  // namespace jaxllm::JAXLLM_LEVEL
