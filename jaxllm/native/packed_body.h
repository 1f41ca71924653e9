// What levels share of products with packed weights: strips of weights turned round, so that their rows lie across the
// lanes.
#pragma once

#include <algorithm>

#include "convert.h"
#include "gate.h"
#include "ints.h"
#include "packed.h"

namespace jaxllm::JAXLLM_LEVEL {

static constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t up(int64_t a, int64_t unit) { return (a + unit - 1) / unit * unit; }

static inline bool has_bytes(const Packed& p) { return p.kind != Codes::kNibbles && p.kind != Codes::kTable; }
static inline int64_t words_of(const Packed& p) { return up(p.k, p.width) / (has_bytes(p) ? 4 : 8); }  // of a row
static inline int64_t dots_of_word(const Packed& p) { return (has_bytes(p) ? 1 : 2) * p.x_bits / 8; }
static inline int64_t dots_of_block(const Packed& p) { return p.width * p.x_bits / 32; }
static inline int64_t padded_words(const Packed& p) { return up(words_of(p), kLanes); }

// kLanes rows of weights with their words and numbers turned round: [.., kLanes].
struct Strip {
  uint32_t* words;
  uint8_t* bytes;  // room for codes of a byte made of kFields
  float *scale, *zero, *offset;
};

static inline int64_t numbers_bytes(const Numbers& t, const Numbers& above) {
  return t.data == nullptr ? 0 : (up(t.count, kLanes) + up(above.count, kLanes)) * kLanes * 4;
}

// What a strip's codes and its numbers need of memory.
static inline int64_t codes_bytes(const Packed& p) {
  return padded_words(p) * kLanes * (p.kind == Codes::kFields ? 8 : 4);
}
static inline int64_t numbers_bytes(const Packed& p) {
  return numbers_bytes(p.scale, p.super_scale) + numbers_bytes(p.zero, {}) + numbers_bytes(p.offset, p.super_offset);
}

static inline Strip strip_in(const Packed& p, void* codes, void* numbers) {
  Strip s{};
  s.words = static_cast<uint32_t*>(codes);
  s.bytes = static_cast<uint8_t*>(codes) + padded_words(p) * kLanes * 4;
  char* at = static_cast<char*>(numbers);
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
static inline void add_fields(const uint8_t* fields, int shift, int64_t count, uint8_t* to) {
  constexpr int kPer = 8 / kBits;
  for (int64_t i = 0; i < count / kPer; ++i)
    for (int j = 0; j < kPer; ++j)
      to[i * kPer + j] =
          static_cast<uint8_t>(to[i * kPer + j] + ((fields[i] >> kBits * j & ((1 << kBits) - 1)) << shift));
}

static inline void add_fields(int bits, const uint8_t* fields, int shift, int64_t count, uint8_t* to) {
  if (bits == 1) add_fields<1>(fields, shift, count, to);
  if (bits == 2) add_fields<2>(fields, shift, count, to);
  if (bits == 4) add_fields<4>(fields, shift, count, to);
}

// Rows n to n + rows as the strip takes them: where they lie, or made bytes first.
static inline Lines lines(const Packed& p, int64_t n, int64_t rows, const Strip& s) {
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
static inline W words_at(const Lines& l, int64_t row, int64_t w) { return load_bytes(l.at(row, w), l.bytes - 4 * w); }

// to [lanes, lanes] = row(i) of every lane i, turned round; zeros where there are fewer rows.
template <typename F>
static inline void turn_rows(int64_t rows, float* to, const F& row) {
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

static inline void turn_words(const Packed& p, const Lines& l, int64_t rows, uint32_t* words) {
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

static inline void turn_numbers(const Numbers& t, int64_t n, int64_t rows, float* to) {
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

static inline void turn_scaled(const Numbers& t, const Numbers& above, float factor, int64_t n, int64_t rows,
                               float* to) {
  turn_numbers(t, n, rows, to);
  if (above.data == nullptr && factor == 1) return;
  float* over = to + up(t.count, kLanes) * kLanes;
  if (above.data != nullptr) turn_numbers(above, n, rows, over);
  for (int64_t g = 0; g < t.count; ++g) {
    const V high = above.data ? load(over + g * above.count / t.count * kLanes) : set(1);
    store(to + g * kLanes, load(to + g * kLanes) * (high * set(factor)));
  }
}

static inline void fill_numbers(const Packed& p, int64_t n, int64_t rows, const Strip& s) {
  turn_scaled(p.scale, p.super_scale, p.factor, n, rows, s.scale);
  if (s.zero) turn_numbers(p.zero, n, rows, s.zero);
  if (s.offset) turn_scaled(p.offset, p.super_offset, 1, n, rows, s.offset);
}

static inline void fill(const Packed& p, int64_t n, int64_t rows, const Strip& s) {
  turn_words(p, lines(p, n, rows, s), rows, s.words);
  fill_numbers(p, n, rows, s);
}

// What to fetch while strips are at work: the codes and scales of the next ones, which lie in a row, a little with
// every block. They are needed only then, so the L2 cache will do.
class Next {
 public:
  Next() = default;
  // Rows n to n + rows, where there are so many, in as many parts as there are blocks.
  Next(const Packed& p, int64_t n, int64_t rows, int64_t blocks) {
    if (n + rows > p.n) return;
    codes_ = p.codes + n * p.row_bytes;
    scales_ = static_cast<const uint8_t*>(p.scale.data) + n * p.scale.count * bytes(p.scale.type);
    end_ = codes_ + rows * p.row_bytes;
    scales_end_ = scales_ + rows * p.scale.count * bytes(p.scale.type);
    lines_ = (rows * p.row_bytes / kLine + blocks - 1) / blocks;
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

}  // namespace jaxllm::JAXLLM_LEVEL
