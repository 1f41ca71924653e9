// Products with packed weights on tiles of bytes. An activation's 16 bits are an upper byte with a sign and a lower one
// without, so that two products of tiles give the whole sum of a block; one of 8 bits is a byte, and one product does.
// Vectors scale the sums as packed_simd.cc does.
#include "packed_body.h"
#include "tiles.h"

namespace jaxllm::amx {
namespace {

constexpr int64_t kFewRows = 4;           // up to so many, vectors are as quick
constexpr int64_t kBlocksAtOnce = 24;     // of a tile of x: it stays in the L1 cache while it meets strip after strip
constexpr int64_t kGroupBytes = 1 << 19;  // of strips: they stay in the L2 cache while they meet tile after tile

// ---- weights as signed bytes -------------------------------------------------------------------------------

// What a number has more than its byte.
int64_t bias(const Packed& p) {
  if (p.kind == Codes::kBytes || p.kind == Codes::kSigned) return 128;
  return p.center >= 0 && p.center <= 128 ? p.center : 0;
}

// The byte of a code of 4 bits.
int64_t level(const Packed& p, int64_t code) { return (p.kind == Codes::kTable ? p.table[code] : code) - bias(p); }

// Whether the sums of upper bytes, -128 to 127, times `sign` times the levels are whole numbers of 16 bits. Where the
// highest is at most 32767, `width` times the highest level is at most 256, and the lowest sum at least -32768.
bool narrow(const Packed& p, int64_t sign) {
  if (p.x_bits == 8 || has_bytes(p) || p.center != bias(p) || p.zero.data || p.offset.data) return false;
  int64_t low = 0, high = 0;
  for (int64_t i = 0; i < 16; ++i) low = std::min(low, sign * level(p, i)), high = std::max(high, sign * level(p, i));
  return p.width * std::max(-128 * low, 127 * high) < 32768;
}

// A strip's words as the right operands of tiles: [blocks, width / 4, 16, 4].
void unpack(const Packed& p, int64_t sign, const uint32_t* words, int8_t* to) {
  if (has_bytes(p)) {
    const W less = _mm512_set1_epi8(static_cast<char>(bias(p)));
    for (int64_t w = 0; w < words_of(p); ++w, to += 64)
      _mm512_store_si512(to, _mm512_sub_epi8(load(words + w * kLanes), less));
    return;
  }
  alignas(16) int8_t some[16];
  for (int64_t i = 0; i < 16; ++i) some[i] = static_cast<int8_t>(sign * level(p, i));
  const W levels = _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(some)));
  for (int64_t w = 0; w < words_of(p); ++w, to += 128) {
    const W codes = load(words + w * kLanes), mask = set_int(0x0f0f0f0f);
    _mm512_store_si512(to, _mm512_shuffle_epi8(levels, both(codes, mask)));
    _mm512_store_si512(to + 64, _mm512_shuffle_epi8(levels, both(right<4>(codes), mask)));
  }
}

// ---- activations as two bytes ------------------------------------------------------------------------------

// 16 values of 16 bits as their upper bytes and their lower ones, in the order of `unpack`: of 8 columns it has the
// even ones first where codes are nibbles. They come in that of `place` in packed_simd.cc.
__m256i apart(const int16_t* values, bool bytes) {
  const __m128i nibbles = _mm_setr_epi8(1, 9, 3, 11, 5, 13, 7, 15, 0, 8, 2, 10, 4, 12, 6, 14);
  const __m128i whole = _mm_setr_epi8(1, 5, 3, 7, 9, 13, 11, 15, 0, 4, 2, 6, 8, 12, 10, 14);
  const __m256i order = _mm256_broadcastsi128_si256(bytes ? whole : nibbles);
  const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values));
  return _mm256_permute4x64_epi64(_mm256_shuffle_epi8(v, order), 0xd8);
}

// A block of rows that lie together, i16 [rows, width], as upper and lower bytes [2, rows, width] in its place.
void split(int64_t rows, int64_t width, bool bytes, int32_t* values) {
  int16_t copy[kTile * 32];
  const int64_t count = rows * width;
  std::memcpy(copy, values, sizeof(int16_t) * static_cast<size_t>(count));
  auto* upper = reinterpret_cast<__m128i*>(values);
  auto* lower = upper + count / 16;
  for (int64_t i = 0; i < count / 16; ++i) {
    const __m256i v = apart(copy + 16 * i, bytes);
    _mm_storeu_si128(upper + i, _mm256_castsi256_si128(v));
    _mm_storeu_si128(lower + i, _mm256_extracti128_si256(v, 1));
  }
}

// ---- products ----------------------------------------------------------------------------------------------

// Neighbouring blocks of a tile of x and a strip of weights.
struct Blocks {
  const int8_t* x;          // [R, width] of every block, or upper and lower bytes [2, R, width]
  const int8_t* w;          // [width / 4, 16, 4] of every block
  const float *unit, *sum;  // [R] of every block
  const int32_t* start;
  const float *scale, *zero, *offset;  // [16] of every group
  int64_t width, count, group, left;   // blocks, those of a group, and those of the first one
};

// What the sums of a kind of weights need before they are totals. Where activations have 16 bits there are sums of lower
// bytes too, and narrow ones of upper bytes have 16 bits.
template <bool Lower, bool Narrow, bool Start, bool Zero, bool Offset>
struct With {
  static constexpr bool kLower = Lower, kNarrow = Narrow, kStart = Start, kZero = Zero, kOffset = Offset;
};

#define JAXLLM_INLINE [[gnu::always_inline]] inline  // totals stay in registers

// A block's products in tiles: those of upper bytes in tile 0 or 2, of lower ones in tile 1 or 3.
template <int Set>
JAXLLM_INLINE void multiply_upper(const Blocks& b) {
  TILE_LOAD(4, b.x, b.width);
  if constexpr (Set == 0) {
    TILE_LOAD(6, b.w, 64);
    TILE_ZERO(0);
    TILE_DOT_S8S8(0, 4, 6);
  } else {
    TILE_LOAD(7, b.w, 64);
    TILE_ZERO(2);
    TILE_DOT_S8S8(2, 4, 7);
  }
}

template <int Set, int R, typename Has>
JAXLLM_INLINE void multiply_lower(Blocks& b) {
  b.x += R * b.width;
  if constexpr (Has::kLower) {
    TILE_LOAD(5, b.x, b.width);
    if constexpr (Set == 0) {
      TILE_ZERO(1);
      TILE_DOT_U8S8(1, 5, 6);
    } else {
      TILE_ZERO(3);
      TILE_DOT_U8S8(3, 5, 7);
    }
    b.x += R * b.width;
  }
  b.w += kLanes * b.width;
}

template <int Tile>
JAXLLM_INLINE void keep(int32_t* sums) {
  if constexpr (Tile == 0) TILE_STORE(0, sums, 64);
  if constexpr (Tile == 1) TILE_STORE(1, sums, 64);
  if constexpr (Tile == 2) TILE_STORE(2, sums, 64);
  if constexpr (Tile == 3) TILE_STORE(3, sums, 64);
}

// 256 upper + lower
template <typename Has>
JAXLLM_INLINE W whole(const int32_t* upper, const int32_t* lower) {
  const W a = _mm512_load_si512(upper);
  if (!Has::kLower) return a;
  const W b = _mm512_load_si512(lower);
  return Has::kNarrow ? dot(b, set_int(256), a) : plus(b, _mm512_slli_epi32(a, 8));
}

// totals += rows First to Last of a block's sums [2, R, 16], scaled as in packed_simd.cc.
template <int First, int Last, int R, typename Has>
JAXLLM_INLINE void add(const Blocks& b, const int32_t* sums, V (&totals)[R]) {
  const V scale = load(b.scale);
  alignas(64) float scaled[kTile];
  if (Has::kOffset) {
    store(scaled, load(b.sum, R) * load(b.unit, R));
    asm volatile("" : "+m"(scaled));  // spread from memory, not by permutations, which only one port does
  }
#pragma GCC unroll 16
  for (int i = First; i < Last; ++i) {
    W all = whole<Has>(sums + i * kTile, sums + (R + i) * kTile);
    if (Has::kStart) all = plus(all, set_int(b.start[i]));
    V sum = as_float(all);
    if (Has::kZero) sum = _mm512_fnmadd_ps(set(b.sum[i]), load(b.zero), sum);
    totals[i] = fma(sum, scale * set(b.unit[i]), totals[i]);
    if (Has::kOffset) totals[i] = fma(set(scaled[i]), load(b.offset), totals[i]);
  }
}

template <int R, typename Has>
JAXLLM_INLINE void to_next(Blocks& b) {
  b.unit += R;
  if (Has::kStart) b.start += R;
  if (Has::kZero || Has::kOffset) b.sum += R;
  if (--b.left > 0) return;
  b.left = b.group;
  b.scale += kLanes;
  if (Has::kZero) b.zero += kLanes;
  if (Has::kOffset) b.offset += kLanes;
}

// totals [R, 16] += the blocks' sums, scaled. A block is multiplied in one step, its sums go to memory in the next and
// to totals in the third: so tiles, stores and vectors are at work together, on three blocks, and nothing is read back
// that was just stored.
//
// What to expect of Sapphire Rapids: 16 rows of x, 16 rows of w and 32 columns take, in cycles, 32 of the tiles (two
// products of 16 rows), 32 of the stores (two tiles of sums), 44 of the loads (40 rows of tiles, 32 of sums, 16 units,
// two a cycle) and 32 of the two vector ports (four operations a row where sums are narrow: `whole`, conversion, unit
// times scale, multiply-add; each one more that a format needs adds 8). The longest is what counts: some 50 with what
// gets in the way, and some 110 instructions. A token of 1.24e9 weights is 151,000 of them: two cores of 2.8 GHz
// multiply some 740 tokens a second. Vectors alone, with 256 dot products, take three times as long.
template <int R, typename Has>
void sweep(const Blocks& blocks, bool first, float* to, Next* fetch) {
  alignas(64) int32_t sums[2][2][R * kTile];
  V totals[R];
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i) totals[i] = first ? set(0) : load(to + i * kLanes);
  Blocks b = blocks;
  int64_t s = 1;  // blocks that are multiplied, or about to be
  // The next block is multiplied, the one before it stored, the one before that added.
  const auto step = [&](auto set) __attribute__((always_inline)) {
    constexpr int kSet = decltype(set)::value, kBefore = 1 - kSet;
    multiply_upper<kSet>(b);
    add<0, R / 2, R, Has>(b, sums[kSet][0], totals);
    keep<2 * kBefore>(sums[kBefore][0]);
    multiply_lower<kSet, R, Has>(b);
    add<R / 2, R, R, Has>(b, sums[kSet][0], totals);
    if (Has::kLower) keep<2 * kBefore + 1>(sums[kBefore][1]);
    to_next<R, Has>(b);
    if (fetch) fetch->some();
    ++s;
  };
  const std::integral_constant<int, 0> even;
  const std::integral_constant<int, 1> odd;
  multiply_upper<0>(b);
  multiply_lower<0, R, Has>(b);
  if (b.count > 1) {
    multiply_upper<1>(b);
    multiply_lower<1, R, Has>(b);
    keep<0>(sums[0][0]);
    if (Has::kLower) keep<1>(sums[0][1]);
    for (s = 2; s < b.count;) {
      step(even);
      if (s < b.count) step(odd);
    }
  }
  if (s % 2 == 1) {
    keep<0>(sums[0][0]);
    if (Has::kLower) keep<1>(sums[0][1]);
  } else {
    keep<2>(sums[1][0]);
    if (Has::kLower) keep<3>(sums[1][1]);
  }
  for (int64_t i = std::max(int64_t{0}, s - 2); i < s; ++i) {
    add<0, R, R, Has>(b, sums[i % 2][0], totals);
    to_next<R, Has>(b);
    if (fetch) fetch->some();
  }
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i) store(to + i * kLanes, totals[i]);
}

using Sweep = void (*)(const Blocks&, bool, float*, Next*);

template <int R, bool Lower>
Sweep sweep_with(bool start, bool zero, bool offset) {
  static constexpr Sweep kAll[] = {
      sweep<R, With<Lower, false, false, false, false>>, sweep<R, With<Lower, false, false, false, true>>,
      sweep<R, With<Lower, false, false, true, false>>,  sweep<R, With<Lower, false, false, true, true>>,
      sweep<R, With<Lower, false, true, false, false>>,  sweep<R, With<Lower, false, true, false, true>>,
      sweep<R, With<Lower, false, true, true, false>>,   sweep<R, With<Lower, false, true, true, true>>};
  return kAll[4 * start + 2 * zero + offset];
}

template <int R>
Sweep sweep_of(const Packed& p, bool narrow) {
  if (narrow) return sweep<R, With<true, true, false, false, false>>;
  const auto with = p.x_bits == 16 ? sweep_with<R, true> : sweep_with<R, false>;
  return with(p.center != bias(p), p.zero.data, p.offset.data);
}

// ---- pieces ------------------------------------------------------------------------------------------------

int64_t strip_bytes(const Packed& p) { return up(p.k, p.width) * kLanes; }

// The weights of a product, a group of strips at a time.
struct Side {
  Packed p;      // with a factor of that sign
  int64_t sign;  // of what the bytes are times the weights
  Sweep sweep;
  char* numbers;  // of every strip
  int8_t* bytes;  // of every strip: [blocks, width / 4, 16, 4]
  float* totals;  // [strips, tiles, R, 16]
  Next next;
};

// Rows m0 to m1 of x; a group of strips from row n of w on, `strips` at most.
struct Piece {
  const Rounded& x;
  Activation activation;
  int64_t m0, m1, tiles, strips;
  int sides;
  void* codes;  // of the strip that is being unpacked
  Side side[2];
};

int64_t tiles_of(const Rounded& x, int64_t m) { return up(m * x.parts, x.together) / x.together; }

int64_t strips_at_once(const Packed& p, int sides, int64_t n) {
  const int64_t most = kGroupBytes / (strip_bytes(p) * sides);
  return std::max(int64_t{1}, least(most, up(n, kLanes) / kLanes));
}

int64_t totals_bytes(const Piece& a) { return a.strips * a.tiles * a.x.together * kLanes * 4; }
int64_t side_bytes(const Piece& a, const Packed& p) {
  return a.strips * (numbers_bytes(p) + strip_bytes(p)) + totals_bytes(a);
}

Side side(const Piece& a, Packed p, char* memory) {
  const int64_t sign = !narrow(p, 1) && narrow(p, -1) ? -1 : 1;
  const bool all_narrow = narrow(p, sign);
  p.factor *= static_cast<float>(sign);
  const auto of = a.x.together == 16 ? sweep_of<16> : a.x.together == 12 ? sweep_of<12> : sweep_of<8>;
  const Sweep sweep = of(p, all_narrow);
  char* bytes = memory + a.strips * numbers_bytes(p);
  char* totals = bytes + a.strips * strip_bytes(p);
  return {p, sign, sweep, memory, reinterpret_cast<int8_t*>(bytes), reinterpret_cast<float*>(totals), Next()};
}

Strip strip_of(const Piece& a, const Side& side, int64_t i) {
  return strip_in(side.p, a.codes, side.numbers + i * numbers_bytes(side.p));
}

// Rows n to n1 of w as strips of bytes, or as many as go into a group.
void take(const Piece& a, Side& side, int64_t n, int64_t n1) {
  for (int64_t i = 0; i < a.strips && n + i * kLanes < n1; ++i) {
    const Strip strip = strip_of(a, side, i);
    fill(side.p, n + i * kLanes, least(kLanes, n1 - n - i * kLanes), strip);
    unpack(side.p, side.sign, strip.words, side.bytes + i * strip_bytes(side.p));
  }
  const int64_t next = n + a.strips * kLanes, rows = std::max(int64_t{0}, least(a.strips * kLanes, n1 - next));
  side.next = Next(side.p, next, rows, a.strips * a.x.blocks);
}

// `count` blocks from block b on of a tile and a strip.
void meet(const Piece& a, Side& side, int64_t tile, int64_t strip, int64_t b, int64_t count) {
  const Packed& p = side.p;
  const Strip s = strip_of(a, side, strip);
  const int64_t group = p.group / p.width, g = b / group * kLanes, rows = a.x.together;
  const int64_t at = a.x.first(a.m0 * a.x.parts + tile * rows) + b * rows;
  const auto* values = reinterpret_cast<const int8_t*>(a.x.values + at * dots_of_block(p));
  const Blocks blocks{values, side.bytes + strip * strip_bytes(p) + b * p.width * kLanes,
                      a.x.scale + at, a.x.sum + at, a.x.start + at,
                      s.scale + g, s.zero ? s.zero + g : nullptr, s.offset ? s.offset + g : nullptr,
                      p.width, count, group, group - b % group};
  Next* next = tile == 0 ? &side.next : nullptr;
  side.sweep(blocks, b == 0, side.totals + (strip * a.tiles + tile) * rows * kLanes, next);
}

// What a tile and a strip made goes to y, n to n + rows.
void finish(const Piece& a, int64_t tile, int64_t strip, int64_t n, int64_t rows) {
  const int64_t parts = a.x.parts, at = (strip * a.tiles + tile) * a.x.together * kLanes;
  const Packed& p = a.side[0].p;
  const auto total = [&](int side, int64_t i) {
    const float* from = a.side[side].totals + at + i * kLanes;
    return parts == 2 ? load(from) + load(from + kLanes) : load(from);
  };
  for (int64_t i = 0, m = a.m0 + tile * a.x.together / parts; i < a.x.together && m < a.m1; i += parts, ++m) {
    V y = total(0, i);
    if (a.sides == 2) y = activated(a.activation, y) * total(1, i);
    write(p.y, p.y_type, m * p.n + n, y, rows);
  }
}

// Rows n to n1 of w, or as many as go into a group. A tile meets all strips before the next one comes.
void multiply_group(Piece& a, int64_t n, int64_t n1) {
  const int64_t blocks = a.x.blocks, strips = least(a.strips, up(n1 - n, kLanes) / kLanes);
  for (int i = 0; i < a.sides; ++i) take(a, a.side[i], n, n1);
  for (int64_t b = 0; b < blocks; b += kBlocksAtOnce)
    for (int64_t tile = 0; tile < a.tiles; ++tile)
      for (int64_t strip = 0, to = n; strip < strips; ++strip, to += kLanes) {
        const int64_t count = least(kBlocksAtOnce, blocks - b);
        for (int i = 0; i < a.sides; ++i) meet(a, a.side[i], tile, strip, b, count);
        if (b + count == blocks) finish(a, tile, strip, to, least(kLanes, n1 - to));
      }
}

Piece piece(const Packed& p, const Packed* up_weights, const Rounded& x, int64_t m, int64_t n) {
  const int sides = up_weights ? 2 : 1;
  return {x, Activation::kSilu, 0, m, tiles_of(x, m), strips_at_once(p, sides, n), sides, nullptr, {}};
}

}  // namespace

extern const int64_t kStripRows = kLanes, kRowsTogether = kTile;

bool takes(const Packed& p, int64_t rows) {
  const bool bytes = p.kind != Codes::kTable ||
                     std::all_of(p.table, p.table + 16, [](int16_t x) { return x >= -128 && x <= 127; });
  return bytes && rows > kFewRows;
}

int64_t rows_together(int64_t rows) {
  const int64_t tiles = up(rows, kTile) / kTile;
  return std::max(int64_t{8}, up(up(rows, tiles) / tiles, 4));
}

// The rows of one tile, or those that it has.
void round_rows(const Packed& p, int64_t m0, int64_t m1, const Rounded& x) {
  Packed less = p;
  less.center -= bias(p);
  avx512::round_rows(less, m0, m1, x);
  const int64_t at = x.first(m0 * x.parts), rows = x.together, used = (m1 - m0) * x.parts;
  for (int64_t b = 0; b < x.blocks; ++b) {
    const int64_t here = at + b * rows;
    for (int64_t i = here + used; i < here + rows; ++i) {
      std::fill(x.values + i * dots_of_block(p), x.values + (i + 1) * dots_of_block(p), 0);
      x.scale[i] = x.sum[i] = 0, x.start[i] = 0;
    }
    if (p.x_bits == 16) split(rows, p.width, has_bytes(p), x.values + here * dots_of_block(p));
  }
}

int64_t piece_bytes(const Packed& p, const Packed* up_weights, const Rounded& x, int64_t m, int64_t n) {
  const Piece a = piece(p, up_weights, x, m, n);
  return codes_bytes(p) + side_bytes(a, p) + (up_weights ? side_bytes(a, *up_weights) : 0);
}

void packed(const Packed& p, const Packed* up_weights, Activation activation, const Rounded& x, int64_t m0, int64_t m1,
            int64_t n0, int64_t n1, void* memory) {
  const Tiles tiles(kTile, x.together, p.width);
  Piece a = piece(p, up_weights, x, m1 - m0, n1 - n0);
  a.activation = activation, a.m0 = m0, a.m1 = m1, a.codes = memory;
  char* at = static_cast<char*>(memory) + codes_bytes(p);
  a.side[0] = side(a, p, at);
  if (up_weights) a.side[1] = side(a, *up_weights, at + side_bytes(a, p));
  for (int64_t n = n0; n < n1; n += a.strips * kLanes) multiply_group(a, n, n1);
}

}  // namespace jaxllm::amx
