// Products with packed weights: the rows of w lie across the lanes. Compiled once for each level.
#include <algorithm>

#include "convert.h"
#include "gate.h"
#include "ints.h"
#include "packed.h"

namespace jaxllm::JAXLLM_LEVEL {
namespace {

constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t up(int64_t a, int64_t unit) { return (a + unit - 1) / unit * unit; }

constexpr int64_t kMostWidth = 32;

// ---- activations -------------------------------------------------------------------------------------------

// The power of two that makes whole numbers below 2^15 of what is at most `most`; NaN where that is not finite.
float unit_of(float most) {
  uint32_t bits;
  std::memcpy(&bits, &most, sizeof bits);
  const uint32_t exponent = bits >> 23 & 255;  // without the sign: -0 is a zero
  if (exponent >= 255) return of_e8m0(255);
  return of_e8m0(static_cast<uint8_t>(exponent < 40 ? 26 : exponent - 14));
}

// Where column i of a block goes: see the order in which `Nibbles` and `Bytes` take codes from a word.
constexpr int64_t place(bool bytes, int64_t i) {
  return bytes ? (i & ~int64_t{3}) + (i & 1) * 2 + (i >> 1 & 1) : (i & ~int64_t{7}) + (i & 3) * 2 + (i >> 2 & 1);
}

template <bool kBytes>
void put_in_place(const uint32_t* bits, int64_t width, int32_t* to) {
  for (; width > 0; width -= 8, bits += 8, to += 4) {
    int16_t pairs[8];
#pragma GCC unroll 8
    for (int64_t i = 0; i < 8; ++i) pairs[place(kBytes, i)] = static_cast<int16_t>(bits[i]);
    std::memcpy(to, pairs, sizeof pairs);
  }
}

// Block b, `each` pairs a word, into a row as `few` has it.
void put_in_lanes(const int32_t* block, int64_t count, int64_t each, int64_t b, int32_t* row) {
  for (int64_t i = 0; i < count; ++i) {
    const int64_t word = (b * count + i) / each;
    row[(word / kLanes * each + i % each) * kLanes + word % kLanes] = block[i];
  }
}

// Whole numbers of 16 bits in `to`, what they lack in `values`.
void round_block(float* values, int64_t width, bool bytes, int32_t* to, float* unit, float* sum) {
  V most = set(0), odd = set(0);
  for (int64_t i = 0; i < width; i += kLanes) {
    const V v = load(values + i);
    most = max(max(most, set(0) - v), v);
    odd = fma(v, set(0), odd);  // NaN where one is not finite
  }
  *unit = same(odd, set(0)) ? unit_of(highest(most)) : of_e8m0(255);
  *sum = 0;
  if (*unit != *unit) return std::fill(to, to + width / 2, 0);
  const V size = set(*unit), inverse = set(1 / *unit), shift = set(12582912.0f);  // 1.5 * 2^23
  uint32_t bits[kMostWidth];
  V total = set(0);
  for (int64_t i = 0; i < width; i += kLanes) {
    const V v = load(values + i);
    // Adding `shift` rounds to a whole number and leaves it in the lower bits.
    const V shifted = max(set(-32767), min(set(32767), v * inverse)) + shift, whole = shifted - shift;
    store(reinterpret_cast<float*>(bits + i), shifted);
    store(values + i, fma(set(0) - whole, size, v));
    total = total + whole;
  }
  *sum = jaxllm::JAXLLM_LEVEL::sum(total);
  bytes ? put_in_place<true>(bits, width, to) : put_in_place<false>(bits, width, to);
}

// ---- strips of weights -------------------------------------------------------------------------------------

struct Nibbles {
  static constexpr int kPairs = 4;  // pairs of codes in a word
  explicit Nibbles(const Packed&) {}
  W word(W w) const { return w; }  // as it lies in memory, made unsigned
  template <int J>
  W pair(W w) const {
    return both(right<4 * J>(w), set_int(0x000f000f));
  }
};

struct Looked {
  static constexpr int kPairs = 4;
  explicit Looked(const Packed& p) : table_(p.table) {}
  W word(W w) const { return w; }
  template <int J>
  W pair(W w) const {
    return table_.at(both(right<4 * J>(w), set_int(0x000f000f)));
  }
  Table table_;
};

struct Bytes {
  static constexpr int kPairs = 2;
  explicit Bytes(const Packed& p) : flip_(set_int(p.kind == Codes::kSigned ? static_cast<int32_t>(0x80808080u) : 0)) {}
  W word(W w) const { return either(w, flip_); }
  template <int J>
  W pair(W w) const {
    return both(right<8 * J>(w), set_int(0x00ff00ff));
  }
  W flip_;
};

bool has_bytes(const Packed& p) { return p.kind != Codes::kNibbles && p.kind != Codes::kTable; }
int64_t words_of(const Packed& p) { return up(p.k, p.width) / (has_bytes(p) ? 4 : 8); }  // of a row
int64_t padded_words(const Packed& p) { return up(words_of(p), kLanes); }

// kLanes rows of weights with their words and numbers turned round: [.., kLanes].
struct Strip {
  uint32_t* words;
  uint8_t* bytes;  // room for codes of a byte made of kFields
  float *scale, *zero, *offset;
};

int64_t numbers_bytes(const Numbers& t, const Numbers& above) {
  return t.data == nullptr ? 0 : (up(t.count, kLanes) + up(above.count, kLanes)) * kLanes * 4;
}

Strip strip_in(const Packed& p, void* memory) {
  char* at = static_cast<char*>(memory);
  Strip s{};
  s.words = reinterpret_cast<uint32_t*>(at);
  at += padded_words(p) * kLanes * 4;
  s.bytes = reinterpret_cast<uint8_t*>(at);
  at += p.kind == Codes::kFields ? padded_words(p) * kLanes * 4 : 0;
  s.scale = reinterpret_cast<float*>(at);
  at += numbers_bytes(p.scale, p.super_scale);
  s.zero = p.zero.data ? reinterpret_cast<float*>(at) : nullptr;
  at += numbers_bytes(p.zero, {});
  s.offset = p.offset.data ? reinterpret_cast<float*>(at) : nullptr;
  return s;
}

// Rows of codes in memory, `bytes` each.
struct Lines {
  const uint8_t* data;
  int64_t bytes;
  const uint8_t* at(int64_t row, int64_t word) const { return data + row * bytes + 4 * word; }
};

// to += code << shift of the fields of `bits` in count columns.
template <int kBits>
void add_fields(const uint8_t* fields, int shift, int64_t count, uint8_t* to) {
  constexpr int kPer = 8 / kBits;
  for (int64_t i = 0; i < count / kPer; ++i)
    for (int j = 0; j < kPer; ++j)
      to[i * kPer + j] = static_cast<uint8_t>(to[i * kPer + j] + ((fields[i] >> kBits * j & ((1 << kBits) - 1)) << shift));
}

void add_fields(int bits, const uint8_t* fields, int shift, int64_t count, uint8_t* to) {
  if (bits == 1) add_fields<1>(fields, shift, count, to);
  if (bits == 2) add_fields<2>(fields, shift, count, to);
  if (bits == 4) add_fields<4>(fields, shift, count, to);
}

// Rows n to n + rows as the strip takes them: where they lie, or made bytes first.
Lines lines(const Packed& p, int64_t n, int64_t rows, const Strip& s) {
  if (p.kind != Codes::kFields) return {p.codes + n * p.row_bytes, p.row_bytes};
  const int64_t bytes = 4 * padded_words(p);
  const int64_t columns = least(up(p.k, p.width), p.row_bytes * 8 / p.low_bits);
  std::fill(s.bytes, s.bytes + rows * bytes, uint8_t{0});
  for (int64_t i = 0; i < rows; ++i) {
    add_fields(p.low_bits, p.codes + (n + i) * p.row_bytes, 0, columns, s.bytes + i * bytes);
    if (p.high) add_fields(p.high_bits, p.high + (n + i) * p.high_bytes, p.low_bits, columns, s.bytes + i * bytes);
  }
  return {s.bytes, bytes};
}

// Words w to w + kLanes of a row, zeros beyond its end.
W words_at(const Lines& l, int64_t row, int64_t w) { return load_bytes(l.at(row, w), l.bytes - 4 * w); }

// to [lanes, lanes] = row(i) of every lane i, turned round; zeros where there are fewer rows.
template <typename F>
inline void turn_rows(int64_t rows, float* to, const F& row) {
  V r[kLanes];
  if (rows == kLanes) {
#pragma GCC unroll 16
    for (int64_t i = 0; i < kLanes; ++i) r[i] = row(i);
  } else {
    for (int64_t i = 0; i < kLanes; ++i) r[i] = i < rows ? row(i) : set(0);
  }
  transpose(r);
#pragma GCC unroll 16
  for (int64_t i = 0; i < kLanes; ++i) store(to + i * kLanes, r[i]);
}

void turn_words(const Packed& p, const Lines& l, int64_t rows, uint32_t* words) {
  const W flip = set_int(p.kind == Codes::kSigned ? static_cast<int32_t>(0x80808080u) : 0);
  float* to = reinterpret_cast<float*>(words);  // bits are bits
  int64_t w = 0;
  for (; w < words_of(p) && 4 * (w + kLanes) <= l.bytes; w += kLanes)
    turn_rows(rows, to + w * kLanes, [&](int64_t i) {
      return reinterpret_cast<V>(either(load(reinterpret_cast<const uint32_t*>(l.at(i, w))), flip));
    });
  for (; w < words_of(p); w += kLanes)
    turn_rows(rows, to + w * kLanes, [&](int64_t i) { return reinterpret_cast<V>(either(words_at(l, i, w), flip)); });
}

void turn_numbers(const Numbers& t, int64_t n, int64_t rows, float* to) {
  if (rows == kLanes && t.count >= 4 && (t.type == Number::kBF16 || t.type == Number::kF16)) {
    const auto* from = static_cast<const uint16_t*>(t.data) + n * t.count;
    for (int64_t g = 0; g < t.count; g += 4) {  // the last four may come twice in part
      const int64_t at = least(g, t.count - 4);
      t.type == Number::kF16 ? turn_four<F16>(from + at, t.count, to + at * kLanes)
                             : turn_four<Half>(from + at, t.count, to + at * kLanes);
    }
    return;
  }
  for (int64_t g = 0; g < t.count; g += kLanes)
    turn_rows(rows, to + g * kLanes, [&](int64_t i) { return numbers(t, (n + i) * t.count + g, t.count - g); });
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

void fill_numbers(const Packed& p, int64_t n, int64_t rows, const Strip& s) {
  turn_scaled(p.scale, p.super_scale, p.factor, n, rows, s.scale);
  if (s.zero) turn_numbers(p.zero, n, rows, s.zero);
  if (s.offset) turn_scaled(p.offset, p.super_offset, 1, n, rows, s.offset);
}

void fill(const Packed& p, int64_t n, int64_t rows, const Strip& s) {
  turn_words(p, lines(p, n, rows, s), rows, s.words);
  fill_numbers(p, n, rows, s);
}

// ---- products ----------------------------------------------------------------------------------------------

// What to fetch while a strip is at work: the codes and scales of the next one, which lie in a row, a little with
// every block. They are needed only then, so the L2 cache will do.
class Next {
 public:
  Next(const Packed& p, int64_t n) {
    const int64_t row = n + kLanes;
    if (row + kLanes > p.n) return;
    codes_ = p.codes + row * p.row_bytes;
    scales_ = static_cast<const uint8_t*>(p.scale.data) + row * p.scale.count * bytes(p.scale.type);
    end_ = codes_ + kLanes * p.row_bytes;
    scales_end_ = scales_ + kLanes * p.scale.count * bytes(p.scale.type);
    lines_ = (kLanes * p.row_bytes / kLine + up(p.k, p.width) / p.width - 1) / (up(p.k, p.width) / p.width);
  }

  // What goes with a block.
  void some() {
    for (int64_t i = 0; i < lines_ && codes_ < end_; ++i, codes_ += kLine) __builtin_prefetch(codes_, 0, 2);
    if (scales_ < scales_end_) __builtin_prefetch(scales_, 0, 2);
    scales_ += kLine;
  }

 private:
  static constexpr int64_t kLine = 64;
  const uint8_t *codes_ = nullptr, *end_ = nullptr, *scales_ = nullptr, *scales_end_ = nullptr;
  int64_t lines_ = 0;
};

// sums + the products of a word's codes with those of x: R rows of 16-bit pairs, `stride` words of 32 bits apart.
// Few rows have several sums each, for one would wait for itself.
template <int R, int Sums, typename C, int J = 0>
__attribute__((always_inline)) inline void add_word(const C& codes, W word, const int32_t* x, int64_t stride, W (&sums)[Sums][R]) {
  if constexpr (J < C::kPairs) {
    const W pair = codes.template pair<J>(word);
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) sums[J % Sums][i] = dot(sums[J % Sums][i], pair, set_int(x[i * stride + J]));
    add_word<R, Sums, C, J + 1>(codes, word, x, stride, sums);
  }
}

// Whole sums of block b for R rows of x.
template <int R, int Width, typename C>
__attribute__((always_inline)) inline void add_block(const C& codes, const Rounded& x, const uint32_t* words, int64_t m, int64_t b, W* to) {
  constexpr int kWords = Width / 2 / C::kPairs, kSums = R < 4 && C::kPairs > 2 ? 4 : R < 4 ? 2 : 1;
  const int64_t stride = x.row;
  const int32_t* values = x.values + m * stride + b * (Width / 2);
  W sums[kSums][R];
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i) {
    sums[0][i] = set_int(x.start[(m + i) * x.blocks + b]);
    for (int j = 1; j < kSums; ++j) sums[j][i] = set_int(0);
  }
#pragma GCC unroll 8
  for (int64_t w = 0; w < kWords; ++w)
    add_word<R, kSums>(codes, load(words + (b * kWords + w) * kLanes), values + w * C::kPairs, stride, sums);
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i) {
    to[i] = sums[0][i];
    for (int j = 1; j < kSums; ++j) to[i] = plus(to[i], sums[j][i]);
  }
}

// Rows m to m + R of x against a strip.
template <int R, int Width, typename C>
__attribute__((always_inline)) inline void add_rows(const Packed& p, const Rounded& x, const Strip& s, int64_t m, Next next, V* totals) {
  const C codes(p);
  const int64_t a_group = p.group / Width;
  for (int i = 0; i < R; ++i) totals[i] = set(0);
  for (int64_t b = 0, g = 0, left = a_group; b < x.blocks; ++b) {
    next.some();
    W sums[R];
    add_block<R, Width>(codes, x, s.words, m, b, sums);
    const V scale = load(s.scale + g * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
      const int64_t j = (m + i) * x.blocks + b;
      const V unit = set(x.scale[j]);
      V sum = as_float(sums[i]);
      if (s.zero) sum = fma(set(-x.sum[j]), load(s.zero + g * kLanes), sum);
      totals[i] = fma(sum, scale * unit, totals[i]);
      if (s.offset) totals[i] = fma(set(x.sum[j]) * unit, load(s.offset + g * kLanes), totals[i]);
    }
    if (--left == 0) ++g, left = a_group;
  }
}

#include "packed_few.h"

// One product, or two of which one gates the other.
struct Job {
  const Packed& p;
  const Packed* up;
  Activation activation;
  Strip strip, up_strip;
};

// What R rows of x from m on give with rows n to n + rows of both weights, to y.
template <int R>
void finish(const Job& job, const Rounded& x, int64_t m, int64_t n, int64_t rows, V* totals, V* other) {
  for (int64_t i = 0; i < R; i += x.parts) {
    if (x.parts == 2 && i + 1 < R) totals[i] = totals[i] + totals[i + 1], other[i] = other[i] + other[i + 1];
    V y = totals[i];
    if (job.up) y = activated(job.activation, y) * other[i];
    write(job.p.y, job.p.y_type, (m + i) / x.parts * job.p.n + n, y, rows);
  }
}

template <int R, int Width, typename C>
void some_rows(const Job& job, const Rounded& x, int64_t m, int64_t n, int64_t rows, bool fetch) {
  V totals[R], other[R] = {};
  add_rows<R, Width, C>(job.p, x, job.strip, m, Next(job.p, fetch ? n : job.p.n), totals);
  if (job.up) add_rows<R, Width, C>(*job.up, x, job.up_strip, m, Next(*job.up, fetch ? n : job.p.n), other);
  finish<R>(job, x, m, n, rows, totals, other);
}

template <int R, int Width, typename C>
__attribute__((noinline)) void few(const Job& job, const Rounded& x, int64_t n0, int64_t n1) {
  for (int64_t n = n0; n < n1; n += kLanes) {
    const int64_t rows = least(kLanes, n1 - n);
    V totals[R], other[R] = {};
    add_few<R, Width, C>(job.p, x, job.strip, n, rows, totals);
    if (job.up) add_few<R, Width, C>(*job.up, x, job.up_strip, n, rows, other);
    finish<R>(job, x, 0, n, rows, totals, other);
  }
}

template <typename C>
void few(const Job& job, const Rounded& x, int64_t n0, int64_t n1) {
  const bool one = job.p.m * x.parts == 1;
  if (job.p.width == 32) return one ? few<1, 32, C>(job, x, n0, n1) : few<2, 32, C>(job, x, n0, n1);
  if constexpr (words_of_block<16, C>() >= 4) one ? few<1, 16, C>(job, x, n0, n1) : few<2, 16, C>(job, x, n0, n1);
}

template <int Width, typename C>
void strip(const Job& job, const Rounded& x, int64_t m0, int64_t m1, int64_t n, int64_t rows) {
  constexpr int kMost = kLanes == 16 ? 8 : 4;
  int64_t m = m0 *= x.parts;
  m1 *= x.parts;
  for (; m + kMost <= m1; m += kMost) some_rows<kMost, Width, C>(job, x, m, n, rows, m == m0);
  for (; m + 4 <= m1; m += 4) some_rows<4, Width, C>(job, x, m, n, rows, m == m0);
  for (; m + 2 <= m1; m += 2) some_rows<2, Width, C>(job, x, m, n, rows, m == m0);
  for (; m < m1; ++m) some_rows<1, Width, C>(job, x, m, n, rows, m == m0);
}

template <typename C>
void strips(const Job& job, const Rounded& x, int64_t m0, int64_t m1, int64_t n0, int64_t n1) {
  if (x.few) return few<C>(job, x, n0, n1);
  for (int64_t n = n0; n < n1; n += kLanes) {
    const int64_t rows = least(kLanes, n1 - n);
    fill(job.p, n, rows, job.strip);
    if (job.up) fill(*job.up, n, rows, job.up_strip);
    job.p.width == 16 ? strip<16, C>(job, x, m0, m1, n, rows) : strip<32, C>(job, x, m0, m1, n, rows);
  }
}

}  // namespace

extern const int64_t kStripRows = kLanes;

int64_t pairs(const Packed& p, bool few) {
  return few ? up(words_of(p), kLanes) * (has_bytes(p) ? 2 : 4) : up(p.k, p.width) / 2;
}

bool takes_few(const Packed& p) { return p.width == 32 || has_bytes(p); }

void round_row(const Packed& p, int64_t row, const Rounded& x) {
  const Numbers from{p.x, p.x_type, p.k};
  if (x.few) std::fill(x.values + row * x.parts * x.row, x.values + (row + 1) * x.parts * x.row, 0);
  for (int64_t b = 0; b < x.blocks; ++b) {
    float values[kMostWidth];
    for (int64_t i = 0, k = b * p.width; i < p.width; i += kLanes, k += kLanes)
      store(values + i, k < p.k ? numbers(from, row * p.k + k, p.k - k) : set(0));
    for (int64_t part = 0; part < x.parts; ++part) {
      const int64_t at = (row * x.parts + part) * x.blocks + b;
      int32_t* to = x.values + (row * x.parts + part) * x.row;
      int32_t block[kMostWidth / 2];
      round_block(values, p.width, has_bytes(p), x.few ? block : to + b * (p.width / 2), x.scale + at, x.sum + at);
      if (x.few) put_in_lanes(block, p.width / 2, has_bytes(p) ? 2 : 4, b, to);
      x.start[at] = static_cast<int32_t>(-p.center * static_cast<int64_t>(x.sum[at]));
    }
  }
}

int64_t strip_bytes(const Packed& p) {
  return padded_words(p) * kLanes * (p.kind == Codes::kFields ? 8 : 4) + numbers_bytes(p.scale, p.super_scale) + numbers_bytes(p.zero, {}) +
         numbers_bytes(p.offset, p.super_offset);
}

void packed(const Packed& p, const Packed* up_weights, Activation activation, const Rounded& x, int64_t m0, int64_t m1,
            int64_t n0, int64_t n1, void* memory) {
  void* second = static_cast<char*>(memory) + strip_bytes(p);
  const Job job{p, up_weights, activation, strip_in(p, memory), up_weights ? strip_in(*up_weights, second) : Strip{}};
  if (p.kind == Codes::kNibbles) return strips<Nibbles>(job, x, m0, m1, n0, n1);
  if (p.kind == Codes::kTable) return strips<Looked>(job, x, m0, m1, n0, n1);
  strips<Bytes>(job, x, m0, m1, n0, n1);
}

}  // namespace jaxllm::JAXLLM_LEVEL
