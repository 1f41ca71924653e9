// Products of panels: a few rows of x against four of w, every pair with a vector of sums of its own. Compiled once
// for each level.
#include "panels.h"

#include <algorithm>
#include <type_traits>

#include "convert.h"
#include "gate.h"

namespace jaxllm::JAXLLM_LEVEL {
namespace {

constexpr int64_t kColumns = 4;                     // rows of w in a strip
constexpr int64_t kRowsAtOnce = kRows < 4 ? 2 : 4;  // of x in a panel: as the registers allow
constexpr int64_t kBlock = 1024;                    // columns: a strip and a panel of them fit into the L1 cache
constexpr int64_t kRoom = kBlock + 32;  // columns from one row of a copied strip to the next: not a power of two
constexpr int64_t kChunk = 256;         // rows of w whose sums are kept at a time
constexpr int64_t kFew = 16;            // rows of x: so few read weights of bf16 where they lie
constexpr int64_t kInCache = 1 << 19;   // bytes of x that stay in the L2 cache while weights pass
constexpr int64_t kMostGroups = 48;     // that a block has a part of, in whole vectors

int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t up(int64_t a, int64_t unit) { return (a + unit - 1) / unit * unit; }

// ---- two kinds of products -----------------------------------------------------------------------------------

// f32 times f32.
struct Single {
  using Value = float;
  using Many = V;
  static constexpr int64_t kStep = kLanes;  // columns at a time
  static V x(const float* p) { return load(p); }
  static V w(const Half* p) { return load(p); }
  static V dot(V sum, V x, V w) { return fma(x, w, sum); }
};

#if defined(__AVX512F__)

// bf16 times bf16.
struct Pairs {
  using Value = Half;
  using Many = __m512i;
  static constexpr int64_t kStep = 32;
  static Many x(const Half* p) { return _mm512_loadu_si512(p); }
  static Many w(const Half* p) { return _mm512_loadu_si512(p); }
  static V dot(V sum, Many x, Many w) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(x), reinterpret_cast<__m512bh>(w));
  }
};

#endif

// f(the kind that takes p).
template <typename F>
auto by_kind(const Panels& p, const F& f) {
#if defined(__AVX512F__)
  if (p.x_type == Number::kBF16) return f(Pairs{});
#endif
  (void)p;
  return f(Single{});
}

// ---- float8 --------------------------------------------------------------------------------------------------

// What the 128 codes without a sign stand for, as bf16.
struct Table {
  alignas(64) Half values[128];
};

template <typename F>
Table table_of(const F& value) {
  Table t;
  for (int i = 0; i < 128; ++i) t.values[i] = narrowed(value(static_cast<uint8_t>(i)));
  return t;
}

const Table& table(Stored type) {
  static const Table e4m3 = table_of([](uint8_t code) { return of_e4m3(code); });
  static const Table e5m2 = table_of([](uint8_t code) { return widened(F16{static_cast<uint16_t>(code << 8)}); });
  return type == Stored::kE4M3 ? e4m3 : e5m2;
}

#if defined(__AVX512F__)

// 32 codes as bf16: the table lies in four registers.
class Expand {
 public:
  explicit Expand(const Table& t) {
    for (int i = 0; i < 4; ++i) table_[i] = _mm512_load_si512(t.values + 32 * i);
  }
  __m512i at(const uint8_t* p) const {
    const __m512i code = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    const __m512i low = _mm512_permutex2var_epi16(table_[0], code, table_[1]);
    const __m512i high = _mm512_permutex2var_epi16(table_[2], code, table_[3]);
    const __m512i size = _mm512_mask_mov_epi16(low, _mm512_test_epi16_mask(code, _mm512_set1_epi16(64)), high);
    const __m512i sign = _mm512_slli_epi16(code, 8), only = _mm512_set1_epi16(static_cast<int16_t>(0x8000));
    return _mm512_ternarylogic_epi32(size, sign, only, 0xf8);  // size | (sign & only)
  }

 private:
  __m512i table_[4];
};

#endif

void expand(const uint8_t* codes, Stored type, int64_t count, Half* to) {
  const Table& t = table(type);
  int64_t i = 0;
#if defined(__AVX512F__)
  const Expand some(t);
  for (; i + 32 <= count; i += 32) _mm512_storeu_si512(to + i, some.at(codes + i));
#endif
  for (; i < count; ++i) to[i] = static_cast<Half>(t.values[codes[i] & 127] | (codes[i] & 128) << 8);
}

// ---- x -------------------------------------------------------------------------------------------------------

// A step of a row, `count` columns of it, and zeros behind them.
void pack_step(const Numbers& x, int64_t at, int64_t count, float* to) { store(to, numbers(x, at, count)); }

#if defined(__AVX512F__)
void pack_step(const Numbers& x, int64_t at, int64_t count, Half* to) {
  const __mmask32 mask = count >= 32 ? ~0u : (1u << count) - 1;
  _mm512_storeu_si512(to, _mm512_maskz_loadu_epi16(mask, static_cast<const Half*>(x.data) + at));
}
#endif

template <typename Kind>
void pack(const Panels& p, int64_t m, Kind, void* packed) {
  const Numbers x{p.x, p.x_type, p.k};
  const int64_t rows = least(kRowsAtOnce, p.m - m);
  auto* to = static_cast<typename Kind::Value*>(packed) + m * up(p.k, Kind::kStep);
  for (int64_t k = 0; k < p.k; k += Kind::kStep)
    for (int64_t i = 0; i < rows; ++i, to += Kind::kStep) pack_step(x, (m + i) * p.k + k, p.k - k, to);
}

// ---- strips of weights -----------------------------------------------------------------------------------------

// Four rows of bf16, copied,
template <typename Kind>
struct Rows {
  const Half* at;
  typename Kind::Many load(int64_t j, int64_t s) const { return Kind::w(at + j * kRoom + s * Kind::kStep); }
};

#if defined(__AVX512F__)

// or where they lie. What lies `ahead`, in the next strip, is fetched into the L2 cache meanwhile.
struct Lying {
  const Half* at;
  int64_t row, ahead;
  __m512i load(int64_t j, int64_t s) const {
    const Half* p = at + j * row + s * Pairs::kStep;
    __builtin_prefetch(p + ahead, 0, 2);
    return Pairs::w(p);
  }
};

// The same of float8.
struct LyingCodes {
  const uint8_t* at;
  int64_t row, ahead;
  Expand expand;
  __m512i load(int64_t j, int64_t s) const {
    const uint8_t* p = at + j * row + s * Pairs::kStep;
    if (s % 2 == 0) __builtin_prefetch(p + ahead, 0, 2);
    return expand.at(p);
  }
};

#endif

// Rows n to n + rows of w, `count` columns from k on.
struct Part {
  const Weights& w;
  int64_t n, rows, k, count;
};

// A copy in bf16: four rows kRoom apart, zeros up to a whole step and where there is no row.
void copy(const Part& part, int64_t step, Half* to) {
  const Weights& w = part.w;
  const int64_t whole = up(part.count, step);
  for (int64_t j = 0; j < kColumns; ++j, to += kRoom) {
    const int64_t at = (part.n + j) * w.row + part.k, count = j < part.rows ? part.count : 0;
    if (w.type != Stored::kBF16)
      expand(static_cast<const uint8_t*>(w.data) + at, w.type, count, to);
    else
      std::memcpy(to, static_cast<const Half*>(w.data) + at, static_cast<size_t>(count) * sizeof(Half));
    std::fill(to + count, to + whole, Half{0});
  }
}

// The scales of a strip's groups in a block: [4, kMostGroups]; no values where it needs none.
struct Scales {
  const float* values = nullptr;
  int64_t first = 0, each = 0;  // columns of the first group, which may have begun before, and of the others
};

Scales scales(const Part& part, float* to) {
  const Weights& w = part.w;
  if (w.scale.count <= 1) return {};
  const int64_t g = part.k / w.group, groups = (part.k + part.count - 1) / w.group + 1 - g;
  for (int64_t j = 0; j < part.rows; ++j)
    for (int64_t i = 0; i < groups; i += kLanes)
      store(to + j * kMostGroups + i, numbers(w.scale, (part.n + j) * w.scale.count + g + i, groups - i));
  for (int64_t j = part.rows; j < kColumns; ++j) std::fill(to + j * kMostGroups, to + j * kMostGroups + groups, 0.0f);
  return {to, (g + 1) * w.group - part.k, w.group};
}

// ---- products --------------------------------------------------------------------------------------------------

template <int R>
using Sums = V[R][kColumns];

template <typename Kind, int R, typename Strip>
inline void add_steps(const typename Kind::Value* x, const Strip& strip, int64_t s, int64_t end, Sums<R>& sums) {
  for (; s < end; ++s) {
    typename Kind::Many left[R];
    for (int i = 0; i < R; ++i) left[i] = Kind::x(x + (s * R + i) * Kind::kStep);
    for (int j = 0; j < kColumns; ++j) {
      const typename Kind::Many right = strip.load(j, s);
      for (int i = 0; i < R; ++i) sums[i][j] = Kind::dot(sums[i][j], left[i], right);
    }
  }
}

template <int R>
inline void clear(Sums<R>& sums) {
  for (int i = 0; i < R; ++i)
    for (int j = 0; j < kColumns; ++j) sums[i][j] = set(0);
}

#if defined(__AVX512F__)

// Halves of a and b added: a's eight sums, b's eight sums. Then their halves, and so on.
inline V halves_of(V a, V b) { return _mm512_shuffle_f32x4(a, b, 0x44) + _mm512_shuffle_f32x4(a, b, 0xee); }
inline V quarters_of(V a, V b) { return _mm512_shuffle_f32x4(a, b, 0x88) + _mm512_shuffle_f32x4(a, b, 0xdd); }
inline V eighths_of(V a, V b) { return _mm512_unpacklo_ps(a, b) + _mm512_unpackhi_ps(a, b); }
inline V wholes_of(V a, V b) {
  const __m512d c = _mm512_castps_pd(a), d = _mm512_castps_pd(b);
  return _mm512_castpd_ps(_mm512_unpacklo_pd(c, d)) + _mm512_castpd_ps(_mm512_unpackhi_pd(c, d));
}

// The lanes of every vector added: to [R, 4], or added to it.
template <int R>
inline void add_lanes(const Sums<R>& sums, bool more, float* to) {
  V t[kColumns];
  for (int j = 0; j < kColumns; ++j) {
    const V a = sums[0][j], b = R > 1 ? sums[1 % R][j] : set(0), c = R > 2 ? sums[2 % R][j] : set(0);
    const V d = R > 3 ? sums[3 % R][j] : set(0);
    t[j] = quarters_of(halves_of(a, b), halves_of(c, d));
  }
  const V all = wholes_of(eighths_of(t[0], t[1]), eighths_of(t[2], t[3]));
  const __mmask16 mask = first(R * kColumns);
  _mm512_mask_storeu_ps(to, mask, more ? _mm512_maskz_loadu_ps(mask, to) + all : all);
}

#else

template <int R>
inline void add_lanes(const Sums<R>& sums, bool more, float* to) {
  for (int i = 0; i < R; ++i)
    for (int j = 0; j < kColumns; ++j, ++to) *to = more ? *to + sum(sums[i][j]) : sum(sums[i][j]);
}

#endif

// One panel of x against a strip.
template <typename Kind, int R, typename Strip>
void block(const typename Kind::Value* x, const Strip& strip, int64_t count, const Scales& scales, bool more, float* to) {
  const int64_t steps = up(count, Kind::kStep) / Kind::kStep;
  Sums<R> sums;
  clear<R>(sums);
  if (scales.values == nullptr) {
    add_steps<Kind, R>(x, strip, 0, steps, sums);
    return add_lanes<R>(sums, more, to);
  }
  const float* scale = scales.values;
  for (int64_t s = 0, end = scales.first / Kind::kStep; s < steps; s = end, end += scales.each / Kind::kStep, ++scale) {
    Sums<R> part;
    clear<R>(part);
    add_steps<Kind, R>(x, strip, s, least(end, steps), part);
    for (int j = 0; j < kColumns; ++j)
      for (int i = 0; i < R; ++i) sums[i][j] = fma(part[i][j], set(scale[j * kMostGroups]), sums[i][j]);
  }
  add_lanes<R>(sums, more, to);
}

struct Span {
  int64_t m0, m1;
};

// All panels against a part of a strip: sums [m1 - m0, 4].
template <typename Kind, typename Strip>
void blocks(const Panels& p, const void* packed, Span m, const Part& part, const Strip& strip, const Scales& scales,
            float* sums) {
  const auto* x = static_cast<const typename Kind::Value*>(packed);
  const int64_t columns = up(p.k, Kind::kStep);
  for (int64_t i = m.m0; i < m.m1; i += kRowsAtOnce, sums += kRowsAtOnce * kColumns) {
    const int64_t rows = least(kRowsAtOnce, p.m - i);
    const auto* from = x + i * columns + part.k * rows;
    const bool more = part.k > 0;
    if (rows == 1) block<Kind, 1>(from, strip, part.count, scales, more, sums);
    if (rows == 2) block<Kind, 2>(from, strip, part.count, scales, more, sums);
    if constexpr (kRowsAtOnce == 4) {
      if (rows == 3) block<Kind, 3>(from, strip, part.count, scales, more, sums);
      if (rows == 4) block<Kind, 4>(from, strip, part.count, scales, more, sums);
    }
  }
}

struct Memory {
  Half* strip;
  float *scales, *sums, *others;
};

Memory memory_in(void* memory, int64_t m) {
  auto* strip = static_cast<Half*>(memory);
  auto* scales = reinterpret_cast<float*>(strip + kColumns * kRoom);
  float* sums = scales + kColumns * kMostGroups;
  return {strip, scales, sums, sums + up(m, kRowsAtOnce) * kChunk};
}

// Few rows of x take the weights where they lie, if four whole rows and whole steps of them do.
template <typename Kind>
void strip(const Panels& p, const void* packed, Span m, const Part& part, const Memory& memory, float* sums) {
  const Scales by = scales(part, memory.scales);
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<Kind, Pairs>) {
    const Weights& w = part.w;
    const int64_t at = part.n * w.row + part.k, ahead = part.n + 2 * kColumns <= p.n ? kColumns * w.row : 0;
    const bool whole = part.rows == kColumns && part.count % Pairs::kStep == 0, bf16 = w.type == Stored::kBF16;
    if (whole && bf16 && m.m1 - m.m0 <= kFew)
      return blocks<Pairs>(p, packed, m, part, Lying{static_cast<const Half*>(w.data) + at, w.row, ahead}, by, sums);
    if (whole && !bf16 && m.m1 - m.m0 <= kRowsAtOnce) {
      const auto* codes = static_cast<const uint8_t*>(w.data) + at;
      return blocks<Pairs>(p, packed, m, part, LyingCodes{codes, w.row, ahead, Expand(table(w.type))}, by, sums);
    }
  }
#endif
  copy(part, Kind::kStep, memory.strip);
  blocks<Kind>(p, packed, m, part, Rows<Kind>{memory.strip}, by, sums);
}

#if defined(__AVX512F__)

// R rows of x against a strip of bf16 that lies whole, one row of it after the other: where reading goes straight on
// the processor fetches ahead by itself, better than it can be told to where four rows are read at once.
template <int R>
void read_straight(const Half* x, const Half* w, int64_t columns, int64_t row, float* to) {
  constexpr int64_t kBlocks = 32 / R;  // whose sums are kept before their lanes are added
  Sums<R> sums[kBlocks];
  for (int64_t k0 = 0; k0 < columns; k0 += kBlocks * kBlock) {
    const int64_t end = least(k0 + kBlocks * kBlock, columns);
    for (int64_t j = 0; j < kColumns; ++j)
      for (int64_t k = k0; k < end; k += kBlock) {
        V part[R];
        for (int i = 0; i < R; ++i) part[i] = set(0);
        for (int64_t s = k; s < least(k + kBlock, end); s += Pairs::kStep) {
          const __m512i right = Pairs::w(w + j * row + s);
          for (int i = 0; i < R; ++i) part[i] = Pairs::dot(part[i], Pairs::x(x + s * R + i * Pairs::kStep), right);
        }
        for (int i = 0; i < R; ++i) sums[(k - k0) / kBlock][i][j] = part[i];
      }
    for (int64_t k = k0; k < end; k += kBlock) add_lanes<R>(sums[(k - k0) / kBlock], k > 0, to);
  }
}

// The same of rows n to n + rows of w; how many of them it was. From three rows of x on, reading them anew for every
// row of w takes longer than w's way from memory.
int64_t straight(const Panels& p, const void* packed, const Weights& w, int64_t n, int64_t rows, float* sums) {
  if (p.m > 2 || w.type != Stored::kBF16 || p.k % Pairs::kStep != 0) return 0;
  const auto read = p.m == 1 ? read_straight<1> : read_straight<2>;
  int64_t i = 0;
  for (; i + kColumns <= rows; i += kColumns, sums += kRowsAtOnce * kColumns)
    read(static_cast<const Half*>(packed), static_cast<const Half*>(w.data) + (n + i) * w.row, p.k, w.row, sums);
  return i;
}

#endif

// sums [strips, m1 - m0, 4] of rows n to n + rows of w.
template <typename Kind>
void sum(const Panels& p, const void* packed, Span m, const Weights& w, int64_t n, int64_t rows, const Memory& memory,
         float* sums) {
  const bool in_cache = (m.m1 - m.m0) * p.k * static_cast<int64_t>(sizeof(typename Kind::Value)) <= kInCache;
  const int64_t at_once = in_cache ? p.k : kBlock, each = up(m.m1 - m.m0, kRowsAtOnce) * kColumns;
  int64_t done = 0;
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<Kind, Pairs>) done = straight(p, packed, w, n, rows, sums);
#endif
  for (int64_t k0 = 0; k0 < p.k; k0 += at_once)
    for (int64_t i = done; i < rows; i += kColumns)
      for (int64_t k = k0; k < least(k0 + at_once, p.k); k += kBlock) {
        const Part part{w, n + i, least(kColumns, rows - i), k, least(kBlock, p.k - k)};
        strip<Kind>(p, packed, m, part, memory, sums + i / kColumns * each);
      }
}

// One row of sums [strips, m, 4], times the scales where every row of w has one.
void gather(const float* sums, int64_t each, const Weights& w, int64_t n, int64_t rows, float* to) {
  for (int64_t i = 0; i < rows; i += kColumns, sums += each) std::memcpy(to + i, sums, kColumns * sizeof(float));
  if (w.scale.count != 1) return;
  for (int64_t i = 0; i < rows; i += kLanes) store(to + i, load(to + i) * numbers(w.scale, n + i, rows - i));
}

void finish(const Panels& p, Span m, int64_t n, int64_t rows, const Memory& memory) {
  const int64_t each = up(m.m1 - m.m0, kRowsAtOnce) * kColumns;
  float row[kChunk], other[kChunk];
  for (int64_t i = 0; i < m.m1 - m.m0; ++i) {
    gather(memory.sums + i * kColumns, each, p.w, n, rows, row);
    if (p.up.data) gather(memory.others + i * kColumns, each, p.up, n, rows, other);
    for (int64_t j = 0; j < rows; j += kLanes) {
      const V v = p.up.data ? activated(p.activation, load(row + j)) * load(other + j) : load(row + j);
      write(p.y, p.y_type, (m.m0 + i) * p.n + n + j, v, rows - j);
    }
  }
}

}  // namespace

extern const int64_t kPanelRows = kRowsAtOnce;

int64_t panel_bytes(const Panels& p) {
  return by_kind(p, [&](auto kind) {
    using Kind = decltype(kind);
    return kRowsAtOnce * up(p.k, Kind::kStep) * static_cast<int64_t>(sizeof(typename Kind::Value));
  });
}

void pack_panel(const Panels& p, int64_t m, void* packed) {
  by_kind(p, [&](auto kind) { pack(p, m, kind, packed); });
}

int64_t panels_memory(const Panels& p, int64_t m) {
  const int64_t sums = up(m, kRowsAtOnce) * kChunk * (p.up.data ? 2 : 1);
  return 2 * kColumns * kRoom + 4 * (kColumns * kMostGroups + sums);
}

void panels(const Panels& p, const void* packed, int64_t m0, int64_t m1, int64_t n0, int64_t n1, void* memory) {
  const Memory own = memory_in(memory, m1 - m0);
  for (int64_t n = n0; n < n1; n += kChunk) {
    const int64_t rows = least(kChunk, n1 - n);
    by_kind(p, [&](auto kind) {
      using Kind = decltype(kind);
      sum<Kind>(p, packed, {m0, m1}, p.w, n, rows, own, own.sums);
      if (p.up.data) sum<Kind>(p, packed, {m0, m1}, p.up, n, rows, own, own.others);
    });
    finish(p, {m0, m1}, n, rows, own);
  }
}

}  // namespace jaxllm::JAXLLM_LEVEL
