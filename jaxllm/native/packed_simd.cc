// Products with packed weights: the rows of w lie across the lanes. Compiled once for each level.
#include <algorithm>

#include "packed_body.h"

namespace jaxllm::JAXLLM_LEVEL {
namespace {

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
void put_in_place(const uint32_t* bits, int64_t width, int16_t* to) {
  for (; width > 0; width -= 8, bits += 8, to += 8) {
#pragma GCC unroll 8
    for (int64_t i = 0; i < 8; ++i) to[place(kBytes, i)] = static_cast<int16_t>(bits[i]);
  }
}

// Block b, `each` pairs a word, into a row as `few` has it.
void put_in_lanes(const int16_t* block, int64_t count, int64_t each, int64_t b, int32_t* row) {
  for (int64_t i = 0; i < count; ++i) {
    const int64_t word = (b * count + i) / each;
    std::memcpy(row + (word / kLanes * each + i % each) * kLanes + word % kLanes, block + 2 * i, sizeof(int32_t));
  }
}

// Whole numbers of 16 bits in `to`, what they lack in `values`.
void round_block(float* values, int64_t width, bool bytes, int16_t* to, float* unit, float* sum) {
  V most = set(0), odd = set(0);
  for (int64_t i = 0; i < width; i += kLanes) {
    const V v = load(values + i);
    most = max(max(most, set(0) - v), v);
    odd = fma(v, set(0), odd);  // NaN where one is not finite
  }
  *unit = same(odd, set(0)) ? unit_of(highest(most)) : of_e8m0(255);
  *sum = 0;
  if (*unit != *unit) return std::fill(to, to + width, int16_t{0});
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

// ---- products ----------------------------------------------------------------------------------------------

#define JAXLLM_INLINE [[gnu::always_inline]] inline  // the compiler stops where a function gets long, and sums spill

// sums + the products of a word's codes with those of x: R rows of 16-bit pairs, `stride` words of 32 bits apart.
// Few rows have several sums each, for one would wait for itself.
template <int R, int Sums, typename C, int J = 0>
JAXLLM_INLINE void add_word(const C& codes, W word, const int32_t* x, int64_t stride, W (&sums)[Sums][R]) {
  if constexpr (J < C::kPairs) {
    const W pair = codes.template pair<J>(word);
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) sums[J % Sums][i] = dot(sums[J % Sums][i], pair, set_int(x[i * stride + J]));
    add_word<R, Sums, C, J + 1>(codes, word, x, stride, sums);
  }
}

// Whole sums of block b for R rows of x.
template <int R, int Width, typename C>
JAXLLM_INLINE void add_block(const C& codes, const Rounded& x, const uint32_t* words, int64_t m, int64_t b, W* to) {
  constexpr int kWords = Width / 2 / C::kPairs, kSums = R < 4 && C::kPairs > 2 ? 4 : R < 4 ? 2 : 1;
  const int64_t stride = x.row;
  const auto* values = reinterpret_cast<const int32_t*>(x.values) + m * stride + b * (Width / 2);
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

// total + the products of block j of x with group g of a strip, of which `sums` are the whole sums.
JAXLLM_INLINE V add_scaled(const Rounded& x, const Strip& s, int64_t j, int64_t g, V scale, W sums, V total) {
  const V unit = set(x.scale[j]);
  V sum = as_float(sums);
  if (s.zero) sum = fma(set(-x.sum[j]), load(s.zero + g * kLanes), sum);
  total = fma(sum, scale * unit, total);
  return s.offset ? fma(set(x.sum[j]) * unit, load(s.offset + g * kLanes), total) : total;
}

// Rows m to m + R of x against a strip.
template <int R, int Width, typename C>
JAXLLM_INLINE void add_rows(const Packed& p, const Rounded& x, const Strip& s, int64_t m, Next next, V* totals) {
  const C codes(p);
  const int64_t a_group = p.group / Width;
  for (int i = 0; i < R; ++i) totals[i] = set(0);
  for (int64_t b = 0, g = 0, left = a_group; b < x.blocks; ++b) {
    next.some();
    W sums[R];
    add_block<R, Width>(codes, x, s.words, m, b, sums);
    const V scale = load(s.scale + g * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) totals[i] = add_scaled(x, s, (m + i) * x.blocks + b, g, scale, sums[i], totals[i]);
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
  const auto next = [&](const Packed& p) { return fetch ? Next(p, n + kLanes, kLanes, x.blocks) : Next(); };
  add_rows<R, Width, C>(job.p, x, job.strip, m, next(job.p), totals);
  if (job.up) add_rows<R, Width, C>(*job.up, x, job.up_strip, m, next(*job.up), other);
  finish<R>(job, x, m, n, rows, totals, other);
}

template <int R, int Width, typename C>
[[gnu::noinline]] void few(const Job& job, const Rounded& x, int64_t n0, int64_t n1) {
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

static void round_row(const Packed& p, int64_t row, const Rounded& x) {
  const Numbers from{p.x, p.x_type, p.k};
  auto* lanes = reinterpret_cast<int32_t*>(x.values) + row * x.parts * x.row;  // of few
  if (x.few) std::fill(lanes, lanes + x.parts * x.row, 0);
  const int64_t first[2] = {x.first(row * x.parts), x.first(row * x.parts + x.parts - 1)};
  for (int64_t b = 0; b < x.blocks; ++b) {
    float values[kMostWidth];
    for (int64_t i = 0, k = b * p.width; i < p.width; i += kLanes, k += kLanes)
      store(values + i, k < p.k ? numbers(from, row * p.k + k, p.k - k) : set(0));
    for (int64_t part = 0; part < x.parts; ++part) {
      const int64_t at = first[part] + b * x.together;
      alignas(4) int16_t block[kMostWidth];
      int16_t* to = x.few ? block : x.values + at * p.width;
      round_block(values, p.width, has_bytes(p), to, x.scale + at, x.sum + at);
      if (x.few) put_in_lanes(block, p.width / 2, has_bytes(p) ? 2 : 4, b, lanes + part * x.row);
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
  if (p.kind == Codes::kNibbles) return strips<Nibbles>(job, x, m0, m1, n0, n1);
  if (p.kind == Codes::kTable) return strips<Looked>(job, x, m0, m1, n0, n1);
  strips<Bytes>(job, x, m0, m1, n0, n1);
}

}  // namespace jaxllm::JAXLLM_LEVEL
