// Products with packed weights: the rows of w lie across the lanes. Compiled once for each level.
#include <algorithm>

#include "packed_body.h"

namespace jaxllm::JAXLLM_LEVEL {
namespace {

constexpr int64_t kMostWidth = 32;
constexpr int64_t kTogether = kLanes == 16 ? 8 : 4;  // rows of x, unless they are few

// ---- activations -------------------------------------------------------------------------------------------

// What makes whole numbers of at most `limit` of what is at most `most`: for 16 bits the power of two that keeps them
// below 2^15, for 8 as much as makes 127 of the largest. NaN where that is not finite.
float unit_of(float most, int limit) {
  uint32_t all;
  std::memcpy(&all, &most, sizeof all);
  const uint32_t exponent = all >> 23 & 255;  // without the sign: -0 is a zero
  if (exponent >= 255) return of_e8m0(255);
  const float least = of_e8m0(26);
  if (limit == 127) return std::max(most / 127, least);
  return exponent < 40 ? least : of_e8m0(static_cast<uint8_t>(exponent - 14));
}

// Where column i of a block goes: see the order in which codes leave a word.
constexpr int64_t place(bool bytes, int bits, int64_t i) {
  if (bits == 8) return bytes ? i : (i & ~int64_t{7}) + (i & 1) * 4 + (i >> 1 & 3);
  return bytes ? (i & ~int64_t{3}) + (i & 1) * 2 + (i >> 1 & 1) : (i & ~int64_t{7}) + (i & 3) * 2 + (i >> 2 & 1);
}

template <bool kBytes, typename Value>
void put_in_place(const uint32_t* bits, int64_t width, int32_t* dots) {
  auto* to = reinterpret_cast<Value*>(dots);
  for (; width > 0; width -= 8, bits += 8, to += 8) {
#pragma GCC unroll 8
    for (int64_t i = 0; i < 8; ++i) to[place(kBytes, 8 * sizeof(Value), i)] = static_cast<Value>(bits[i]);
  }
}

void put_in_place(const Packed& p, const uint32_t* bits, int32_t* to) {
  if (p.x_bits == 8) return has_bytes(p) ? put_in_place<true, int8_t>(bits, p.width, to)
                                         : put_in_place<false, int8_t>(bits, p.width, to);
  has_bytes(p) ? put_in_place<true, int16_t>(bits, p.width, to) : put_in_place<false, int16_t>(bits, p.width, to);
}

// Block b of `count` dots, kEach of a word, into a row as `few` has it.
template <int kEach>
void put_in_lanes(const int32_t* block, int64_t count, int64_t b, int32_t* row) {
  for (int64_t i = 0, at = b * count; i < count; ++i, ++at)
    row[(at / kEach / kLanes * kEach + at % kEach) * kLanes + at / kEach % kLanes] = block[i];
}

void put_in_lanes(const Packed& p, const int32_t* block, int64_t count, int64_t b, int32_t* row) {
  switch (dots_of_word(p)) {
    case 1: return put_in_lanes<1>(block, count, b, row);
    case 2: return put_in_lanes<2>(block, count, b, row);
    default: return put_in_lanes<4>(block, count, b, row);
  }
}

// Whole numbers in `to`, what they lack in `values`.
void round_block(const Packed& p, float* values, int32_t* to, float* unit, float* sum) {
  const int64_t width = p.width;
  V most = set(0), odd = set(0);
  for (int64_t i = 0; i < width; i += kLanes) {
    const V v = load(values + i);
    most = max(max(most, set(0) - v), v);
    odd = fma(v, set(0), odd);  // NaN where one is not finite
  }
  *unit = same(odd, set(0)) ? unit_of(highest(most), p.x_most) : of_e8m0(255);
  *sum = 0;
  if (*unit != *unit) return std::fill(to, to + dots_of_block(p), 0);
  const V size = set(*unit), inverse = set(1 / *unit), shift = set(12582912.0f);  // 1.5 * 2^23
  const V limit = set(static_cast<float>(p.x_most));
  uint32_t bits[kMostWidth];
  V total = set(0);
  for (int64_t i = 0; i < width; i += kLanes) {
    const V v = load(values + i);
    // Adding `shift` rounds to a whole number and leaves it in the lower bits.
    const V shifted = max(set(0) - limit, min(limit, v * inverse)) + shift, whole = shifted - shift;
    store(reinterpret_cast<float*>(bits + i), shifted);
    store(values + i, fma(set(0) - whole, size, v));
    total = total + whole;
  }
  *sum = jaxllm::JAXLLM_LEVEL::sum(total);
  put_in_place(p, bits, to);
}

// ---- strips of weights -------------------------------------------------------------------------------------

// How a kind of codes leaves a word of 32 bits: kCodes of them in kDots, each of which meets as many of x. `word` is
// one as it lies in memory, made unsigned.
struct Nibbles {
  static constexpr int kCodes = 8, kDots = 4;
  explicit Nibbles(const Packed&) {}
  W word(W w) const { return w; }
  template <int J>
  W codes(W w) const {
    return both(right<4 * J>(w), set_int(0x000f000f));
  }
  static W add(W sums, W codes, W x) { return dot(sums, codes, x); }
};

struct Looked : Nibbles {
  explicit Looked(const Packed& p) : Nibbles(p), table_(p.table) {}
  template <int J>
  W codes(W w) const {
    return table_.at(Nibbles::codes<J>(w));
  }
  Table table_;
};

// What makes signed bytes unsigned.
W flipping(const Packed& p) { return set_int(p.kind == Codes::kSigned ? static_cast<int32_t>(0x80808080u) : 0); }

struct Bytes {
  static constexpr int kCodes = 4, kDots = 2;
  explicit Bytes(const Packed& p) : flip_(flipping(p)) {}
  W word(W w) const { return either(w, flip_); }
  template <int J>
  W codes(W w) const {
    return both(right<8 * J>(w), set_int(0x00ff00ff));
  }
  static W add(W sums, W codes, W x) { return dot(sums, codes, x); }
  W flip_;
};

// The same for activations of 8 bits.
struct FourNibbles {
  static constexpr int kCodes = 8, kDots = 2;
  explicit FourNibbles(const Packed&) {}
  W word(W w) const { return w; }
  template <int J>
  W codes(W w) const {
    return both(right<4 * J>(w), set_int(0x0f0f0f0f));
  }
  static W add(W sums, W codes, W x) { return dot_bytes(sums, codes, x); }
};

struct FourLooked : FourNibbles {
  explicit FourLooked(const Packed& p) : FourNibbles(p), table_(p.table) {}
  template <int J>
  W codes(W w) const {
    return table_.at(FourNibbles::codes<J>(w));
  }
  ByteTable table_;
};

struct FourBytes {
  static constexpr int kCodes = 4, kDots = 1;
  explicit FourBytes(const Packed& p) : flip_(flipping(p)) {}
  W word(W w) const { return either(w, flip_); }
  template <int J>
  W codes(W w) const {
    return w;
  }
  static W add(W sums, W codes, W x) { return dot_bytes(sums, codes, x); }
  W flip_;
};

// ---- products ----------------------------------------------------------------------------------------------

#define JAXLLM_INLINE [[gnu::always_inline]] inline  // the compiler stops where a function gets long, and sums spill

// sums + the products of a word's codes with those of x: R rows of dots, Stride of them apart.
// Few rows have several sums each, for one would wait for itself.
template <int R, int Stride, int Sums, typename C, int J = 0>
JAXLLM_INLINE void add_word(const C& codes, W word, const int32_t* x, W (&sums)[Sums][R]) {
  if constexpr (J < C::kDots) {
    const W some = codes.template codes<J>(word);
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) sums[J % Sums][i] = C::add(sums[J % Sums][i], some, set_int(x[i * Stride + J]));
    add_word<R, Stride, Sums, C, J + 1>(codes, word, x, sums);
  }
}

// Whole sums of a block for R rows of x.
template <int R, int Words, typename C>
JAXLLM_INLINE void add_block(const C& codes, const int32_t* x, const int32_t* start, const uint32_t* words, W* to) {
  constexpr int kSums = R < 4 ? C::kDots : 1;
  W sums[kSums][R];
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i) {
    sums[0][i] = set_int(start[i]);
    for (int j = 1; j < kSums; ++j) sums[j][i] = set_int(0);
  }
#pragma GCC unroll 8
  for (int64_t w = 0; w < Words; ++w)
    add_word<R, Words * C::kDots, kSums>(codes, load(words + w * kLanes), x + w * C::kDots, sums);
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i) {
    to[i] = sums[0][i];
    for (int j = 1; j < kSums; ++j) to[i] = plus(to[i], sums[j][i]);
  }
}

// totals + the products of blocks j to j + R of x with group g of a strip, of which `whole` are the sums.
template <int R>
JAXLLM_INLINE void add_scaled(const Rounded& x, const Strip& s, int64_t j, int64_t g, const W (&whole)[R],
                              V (&totals)[R]) {
  V sums[R];
  const V scale = load(s.scale + g * kLanes);
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i) sums[i] = as_float(whole[i]);
  if (s.zero) {
    const V zero = load(s.zero + g * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) sums[i] = fma(set(-x.sum[j + i]), zero, sums[i]);
  }
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i) totals[i] = fma(sums[i], scale * set(x.scale[j + i]), totals[i]);
  if (s.offset) {
    const V offset = load(s.offset + g * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) totals[i] = fma(set(x.sum[j + i]) * set(x.scale[j + i]), offset, totals[i]);
  }
}

// Rows m to m + R of x, which lie together, against a strip.
template <int R, int Width, typename C>
JAXLLM_INLINE void add_rows(const Packed& p, const Rounded& x, const Strip& s, int64_t m, Next next, V (&totals)[R]) {
  constexpr int kWords = Width / C::kCodes;
  const C codes(p);
  const int64_t a_group = p.group / Width;
  const uint32_t* words = s.words;
  for (int i = 0; i < R; ++i) totals[i] = set(0);
  for (int64_t b = 0, g = 0, left = a_group, j = x.first(m); b < x.blocks; ++b, j += kTogether) {
    next.some();
    W sums[R];
    add_block<R, kWords>(codes, x.values + j * (kWords * C::kDots), x.start + j, words, sums);
    words += kWords * kLanes;
    add_scaled(x, s, j, g, sums, totals);
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
void finish(const Job& job, const Rounded& x, int64_t m, int64_t n, int64_t rows, const V* totals, const V* other) {
  const auto of_row = [&](const V* parts) { return x.parts == 2 && R > 1 ? parts[0] + parts[1] : parts[0]; };
  for (int64_t i = 0; i < R; i += x.parts) {
    V y = of_row(totals + i);
    if (job.up) y = activated(job.activation, y) * of_row(other + i);
    write(job.p.y, job.p.y_type, (m + i) / x.parts * job.p.n + n, y, rows);
  }
}

template <int R, int Width, typename C>
void some_rows(const Job& job, const Rounded& x, int64_t m, int64_t n, int64_t rows, bool fetch) {
  V totals[R], other[R] = {};
  const auto next = [&](const Packed& p) { return fetch ? Next(p, n + kLanes, kLanes, x.blocks) : Next(); };
  add_rows<R, Width, C>(job.p, x, job.strip, m, next(job.p), totals);
  if (job.up) add_rows<R, Width, C>(*job.up, x, job.up_strip, m, next(*job.up), other);
  finish<R>(job, x, m, n, rows, totals, other);
}

template <int R, int Width, typename C>
[[gnu::noinline]] void few(const Job& job, const Rounded& x, int64_t n0, int64_t n1) {
  for (int64_t n = n0; n < n1; n += kLanes) {
    const int64_t rows = least(kLanes, n1 - n);
    V totals[R][1], other[R][1] = {};
    add_few<R, Width, C>(job.p, x, job.strip, n, rows, totals);
    if (job.up) add_few<R, Width, C>(*job.up, x, job.up_strip, n, rows, other);
    finish<R>(job, x, 0, n, rows, totals[0], other[0]);
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
  constexpr int kMost = kTogether;
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

extern const int64_t kStripRows = kLanes, kRowsTogether = kTogether, kBytesUpTo = kMostByte;

int64_t dots(const Packed& p, bool few) { return (few ? padded_words(p) : words_of(p)) * dots_of_word(p); }

bool takes_few(const Packed& p) { return p.width == 32 || has_bytes(p); }

static void round_row(const Packed& p, int64_t row, const Rounded& x) {
  const Numbers from{p.x, p.x_type, p.k};
  int32_t* lanes = x.values + row * x.parts * x.row;  // of few
  if (x.few) std::fill(lanes, lanes + x.parts * x.row, 0);
  const int64_t count = dots_of_block(p), first[2] = {x.first(row * x.parts), x.first(row * x.parts + x.parts - 1)};
  for (int64_t b = 0; b < x.blocks; ++b) {
    float values[kMostWidth];
    for (int64_t i = 0, k = b * p.width; i < p.width; i += kLanes, k += kLanes)
      store(values + i, k < p.k ? numbers(from, row * p.k + k, p.k - k) : set(0));
    for (int64_t part = 0; part < x.parts; ++part) {
      const int64_t at = first[part] + b * x.together;
      int32_t block[kMostWidth / 2];
      int32_t* to = x.few ? block : x.values + at * count;
      round_block(p, values, to, x.scale + at, x.sum + at);
      if (x.few) put_in_lanes(p, block, count, b, lanes + part * x.row);
      x.start[at] = static_cast<int32_t>(-p.center * static_cast<int64_t>(x.sum[at]));
    }
  }
}

void round_rows(const Packed& p, int64_t m0, int64_t m1, const Rounded& x) {
  for (int64_t row = m0; row < m1; ++row) round_row(p, row, x);
}

static int64_t strip_bytes(const Packed& p) { return codes_bytes(p) + numbers_bytes(p); }

int64_t piece_bytes(const Packed& p, const Packed* up_weights, const Rounded&, int64_t, int64_t) {
  return strip_bytes(p) + (up_weights ? strip_bytes(*up_weights) : 0);
}

void packed(const Packed& p, const Packed* up_weights, Activation activation, const Rounded& x, int64_t m0, int64_t m1,
            int64_t n0, int64_t n1, void* memory) {
  const auto strip_at = [](const Packed& q, void* at) {
    return strip_in(q, at, static_cast<char*>(at) + codes_bytes(q));
  };
  void* second = static_cast<char*>(memory) + strip_bytes(p);
  const Job job{p, up_weights, activation, strip_at(p, memory), up_weights ? strip_at(*up_weights, second) : Strip{}};
  const bool eight = p.x_bits == 8;
  const auto go = [&](auto sixteen_bits, auto eight_bits) {
    eight ? eight_bits(job, x, m0, m1, n0, n1) : sixteen_bits(job, x, m0, m1, n0, n1);
  };
  if (p.kind == Codes::kNibbles) return go(strips<Nibbles>, strips<FourNibbles>);
  if (p.kind == Codes::kTable) return go(strips<Looked>, strips<FourLooked>);
  go(strips<Bytes>, strips<FourBytes>);
}

}  // namespace jaxllm::JAXLLM_LEVEL
