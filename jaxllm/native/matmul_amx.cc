// Products of bf16 on AMX tiles. Rows of w are the left operand and are read where they lie; x, packed once into
// pairs, is the right one, so that no weight is ever repacked.
#include <cstring>

#include "gate.h"
#include "matmul.h"
#include "simd.h"
#include "tiles.h"

namespace jaxllm::amx {
namespace {

// Beyond this many steps (of 32) the sums go through memory in between, so that x's part stays in the L2 cache.
// A sum kept in memory has the same bits as one kept in a register.
constexpr int64_t kMostSteps = 48, kStepsAtOnce = 32;

int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Two times 16 rows of weights as the inner loop reads them: a step is 32 columns.
struct Left {
  const bf16 *upper, *lower;
  int64_t row, step;  // bf16 from one row to the next, and from one step to the next
};

// Fetches the weights that come next into the L2 cache, a few lines at every step.
class Fetch {
 public:
  Fetch() = default;
  Fetch(const bf16* upper, const bf16* lower, int64_t lines) : upper_(upper), lower_(lower), lines_(lines) {}

  void some() {
    for (int64_t i = 0; i < lines_; ++i, upper_ += kDepth, lower_ += kDepth) {
      _mm_prefetch(reinterpret_cast<const char*>(upper_), _MM_HINT_T1);
      _mm_prefetch(reinterpret_cast<const char*>(lower_), _MM_HINT_T1);
    }
  }

 private:
  const bf16 *upper_ = nullptr, *lower_ = nullptr;
  int64_t lines_ = 0;
};

// Rows of y that one strip of weights makes: 32, or 16 where the lower half of it belongs to another matrix.
int64_t unit(const Product& p) { return p.up == nullptr ? kPair : kTile; }

// ---- writing results ---------------------------------------------------------------------------------------

float* row_f32(const Product& p, int64_t m, int64_t n) { return static_cast<float*>(p.y) + m * p.n + n; }
bf16* row_bf16(const Product& p, int64_t m, int64_t n) { return static_cast<bf16*>(p.y) + m * p.n + n; }

// The transposed 16x16 in memory. Loading it by quarters of a line leaves half of the shuffles.
void transposed(const float* from, __m512 to[16]) {
  for (int c = 0; c < 16; c += 4) {
    __m512 t[4];
    for (int i = 0; i < 4; ++i) {
      const float* at = from + 16 * i + c;
      t[i] = _mm512_castps128_ps512(_mm_load_ps(at));
      t[i] = _mm512_insertf32x4(t[i], _mm_load_ps(at + 64), 1);
      t[i] = _mm512_insertf32x4(t[i], _mm_load_ps(at + 128), 2);
      t[i] = _mm512_insertf32x4(t[i], _mm_load_ps(at + 192), 3);
    }
    const __m512d a = _mm512_castps_pd(_mm512_unpacklo_ps(t[0], t[1]));
    const __m512d b = _mm512_castps_pd(_mm512_unpackhi_ps(t[0], t[1]));
    const __m512d d = _mm512_castps_pd(_mm512_unpacklo_ps(t[2], t[3]));
    const __m512d e = _mm512_castps_pd(_mm512_unpackhi_ps(t[2], t[3]));
    to[c] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, d));
    to[c + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, d));
    to[c + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, e));
    to[c + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, e));
  }
}

// sums [16 of n, 16 of m] to y in f32.
void write_f32(const Product& p, int64_t m, int64_t n, int64_t rows, int64_t columns, const float* sums) {
  __m512 r[16];
  transposed(sums, r);
  for (int64_t i = 0; i < columns; ++i) _mm512_mask_storeu_ps(row_f32(p, m + i, n), first(rows), r[i]);
}

// sums [32 of n, 16 of m], or 16 of n, to y in bf16: rounded first and turned two by two.
void write_bf16(const Product& p, int64_t m, int64_t n, int64_t rows, int64_t columns, const float* sums) {
  alignas(64) static constexpr uint16_t kZip[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                    8,  24, 9,  25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i zip = _mm512_load_si512(kZip);
  __m512i r[16] = {};
  for (int64_t i = 0; i < (rows > kTile ? 16 : 8); ++i) {
    const __m512 even = _mm512_load_ps(sums + 32 * i), odd = _mm512_load_ps(sums + 32 * i + 16);
    r[i] = _mm512_permutexvar_epi16(zip, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(odd, even)));
  }
  transpose16(r);
  const __mmask32 mask = rows >= 32 ? ~0u : (1u << rows) - 1;
  for (int64_t i = 0; i < columns; ++i) _mm512_mask_storeu_epi16(row_bf16(p, m + i, n), mask, r[i]);
}

// sums [2, 16, width]: the upper half becomes its activation times the lower half.
void gate(const Product& p, float* sums) {
  const int64_t count = kTile * p.width;
  for (int64_t i = 0; i < count; i += kLanes) {
    const V x = load(sums + i);
    store(sums + i, activated(p.activation, x) * load(sums + count + i));
  }
}

// sums [32 of n, width of m] to y, for fewer rows of x than a tile holds.
void write_narrow(const Product& p, int64_t m, int64_t n, int64_t rows, int64_t columns, const float* sums) {
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i index = _mm512_mullo_epi32(lane, _mm512_set1_epi32(static_cast<int>(p.width)));
  for (int64_t half = 0; half < rows; half += kTile, sums += kTile * p.width) {
    const __mmask16 mask = first(rows - half);
    for (int64_t i = 0; i < columns; ++i) {
      const __m512 values = _mm512_i32gather_ps(index, sums + i, 4);
      if (p.y_is_bf16) {
        const __m256i narrow = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(values));
        _mm256_mask_storeu_epi16(row_bf16(p, m + i, n + half), mask, narrow);
      } else {
        _mm512_mask_storeu_ps(row_f32(p, m + i, n + half), mask, values);
      }
    }
  }
}

// Sums that are ready and not yet written. They are written a part at a time between the steps of the next
// block, so that vector units turn numbers round while the tiles multiply.
class Pending {
 public:
  explicit Pending(const Product& p) : p_(p) {}
  Pending(const Pending&) = delete;
  ~Pending() { finish(); }

  // sums [tiles, 2, 16, width], of columns m to m1 and rows n to n + rows.
  void add(int64_t m, int64_t m1, int64_t n, int64_t rows, float* sums) {
    finish();
    m_ = m, m1_ = m1, n_ = n, rows_ = rows, sums_ = sums, half_ = 0;
  }

  void some() {
    if (m_ >= m1_) return;
    const int64_t columns = least(kTile, m1_ - m_), size = kTile * p_.width;
    if (p_.up != nullptr && half_ == 0) gate(p_, sums_);
    if (p_.width < kTile) {
      write_narrow(p_, m_, n_, rows_, columns, sums_);
    } else if (p_.y_is_bf16) {
      write_bf16(p_, m_, n_, rows_, columns, sums_);
    } else {
      const int64_t rows = least(kTile, rows_ - kTile * half_);
      if (rows > 0) write_f32(p_, m_, n_ + kTile * half_, rows, columns, sums_ + half_ * size);
      half_ ^= 1;
      if (half_ == 1) return;
    }
    m_ += kTile;
    sums_ += 2 * size;
  }

  void finish() {
    while (m_ < m1_) some();
  }

 private:
  const Product& p_;
  int64_t m_ = 0, m1_ = 0, n_ = 0, rows_ = 0, half_ = 0;
  float* sums_ = nullptr;
};

// ---- products ----------------------------------------------------------------------------------------------

// sums [2, 16, width] (+)= a strip of weights times one tile of packed x, over `count` steps.
void block_1(Left a, const bf16* b, int64_t width, int64_t count, Fetch& fetch, bool more, float* sums,
             Pending& pending) {
  const int64_t line = 4 * width, half = kTile * width, row = 2 * a.row;
  if (more) {
    TILE_LOAD(0, sums, line);
    TILE_LOAD(1, sums + half, line);
  } else {
    TILE_ZERO(0);
    TILE_ZERO(1);
  }
  for (int64_t s = 0; s < count; ++s) {
    TILE_LOAD(6, b, line);
    TILE_LOAD(4, a.upper, row);
    TILE_DOT(0, 4, 6);
    TILE_LOAD(5, a.lower, row);
    TILE_DOT(1, 5, 6);
    fetch.some();
    a.upper += a.step;
    a.lower += a.step;
    b += kTile * width * 2;
  }
  pending.finish();
  TILE_STORE(0, sums, line);
  TILE_STORE(1, sums + half, line);
}

// The same for two tiles of packed x, of width 16: sums [2 tiles of x, 2, 16, 16].
void block_2(Left a, const bf16* b0, const bf16* b1, int64_t count, Fetch& fetch, bool more, float* sums,
             Pending& pending) {
  constexpr int64_t kLine = 64, kSums = kTile * kTile;
  const int64_t row = 2 * a.row;
  if (more) {
    TILE_LOAD(0, sums, kLine);
    TILE_LOAD(1, sums + kSums, kLine);
    TILE_LOAD(2, sums + 2 * kSums, kLine);
    TILE_LOAD(3, sums + 3 * kSums, kLine);
  } else {
    TILE_ZERO(0);
    TILE_ZERO(1);
    TILE_ZERO(2);
    TILE_ZERO(3);
  }
  for (int64_t s = 0; s < count; ++s) {
    TILE_LOAD(6, b0, kLine);
    TILE_LOAD(4, a.upper, row);
    TILE_DOT(0, 4, 6);
    TILE_LOAD(5, a.lower, row);
    TILE_DOT(1, 5, 6);
    TILE_LOAD(7, b1, kLine);
    TILE_DOT(2, 4, 7);
    TILE_DOT(3, 5, 7);
    fetch.some();
    a.upper += a.step;
    a.lower += a.step;
    b0 += kTile * kTile * 2;
    b1 += kTile * kTile * 2;
    if (s % 2 == 1) pending.some();
  }
  pending.finish();
  TILE_STORE(0, sums, kLine);
  TILE_STORE(1, sums + kSums, kLine);
  TILE_STORE(2, sums + 2 * kSums, kLine);
  TILE_STORE(3, sums + 3 * kSums, kLine);
}

// 16 rows of w from row n on (fewer at its end), steps s to s + count, copied tile by tile with zeros around.
void copy_half(const bf16* w, const Product& p, int64_t n, int64_t rows, int64_t s, int64_t count, bf16* copy) {
  for (int64_t i = 0; i < count; ++i) {
    const int64_t k = (s + i) * kDepth, width = least(kDepth, p.k - k);
    const __mmask32 mask = width == kDepth ? ~0u : (1u << width) - 1;
    for (int64_t r = 0; r < kTile; ++r) {
      const bf16* from = w + (n + r) * p.k + k;
      const __m512i line = r < rows ? _mm512_maskz_loadu_epi16(mask, from) : _mm512_setzero_si512();
      _mm512_store_si512(copy + (i * kTile + r) * kDepth, line);
    }
  }
}

// The strip that makes rows n to n + rows of y, steps s to s + count: where it lies, or copied where it is read
// often from rows that fall on each other in the cache (a power of two apart) or a tile would read past it.
Left left(const Product& p, int64_t n, int64_t rows, int64_t s, int64_t count, bool often, bf16* copy) {
  const bf16* second = p.up == nullptr ? p.w + kTile * p.k : p.up;
  const int64_t at = n * p.k + s * kDepth;
  if (!often && rows == unit(p) && p.k % kDepth == 0) return {p.w + at, second + at, p.k, kDepth};
  bf16* lower = copy + count * kTile * kDepth;
  copy_half(p.w, p, n, rows, s, count, copy);
  if (p.up == nullptr)
    copy_half(p.w, p, n + kTile, rows - kTile, s, count, lower);
  else
    copy_half(p.up, p, n, rows, s, count, lower);
  return {copy, lower, kDepth, kTile * kDepth};
}

// What to fetch while rows n to n + unit are at work in `blocks` blocks: the strip behind them.
Fetch behind(const Product& p, int64_t n, int64_t blocks) {
  if (n + 2 * unit(p) > p.n) return {};
  const int64_t at = (n + unit(p)) * p.k;
  return {p.w + at, (p.up == nullptr ? p.w + kTile * p.k : p.up) + at, (kTile + blocks - 1) / blocks};
}

// Columns m0 to m1 of x against one strip. Where the sums are complete after these steps they become pending;
// sums [(m1 - m0) / 16, 2, 16, width], or room for four tiles, used in turn, where they always are.
struct Strip {
  int64_t m0, m1, n, rows, s0, count;
  bool last, in_turn;
};

void strip(const Product& p, const Strip& t, const Left& a, float* sums, Pending& pending) {
  const int64_t tile = packed_tile(p.k, p.width), step = kTile * p.width * 2, block = kPair * p.width;
  const int64_t j0 = t.m0 / kTile, j1 = (t.m1 + kTile - 1) / kTile;
  Fetch fetch = t.in_turn ? behind(p, t.n, (j1 - j0 + 1) / 2) : Fetch{};
  for (int64_t j = j0; j < j1; j += 2) {
    const bf16* b = p.packed + j * tile + t.s0 * step;
    float* own = sums + (t.in_turn ? j % 4 : j - j0) * block;
    if (j + 2 <= j1)
      block_2(a, b, b + tile, t.count, fetch, t.s0 > 0, own, pending);
    else
      block_1(a, b, p.width, t.count, fetch, t.s0 > 0, own, pending);
    if (t.last) pending.add(j * kTile, least((j + 2) * kTile, t.m1), t.n, t.rows, own);
  }
}

}  // namespace

void pack(const bf16* x, int64_t rows, int64_t k, int64_t width, bf16* packed) {
  const int64_t count = steps(k);
  if (width == 1) {  // a single row lies as it should
    std::memcpy(packed, x, sizeof(bf16) * static_cast<size_t>(k));
    std::memset(packed + k, 0, sizeof(bf16) * static_cast<size_t>(count * kDepth - k));
    return;
  }
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i index = _mm512_mullo_epi32(lane, _mm512_set1_epi32(static_cast<int>(width)));
  for (int64_t s = 0; s < count; ++s) {
    const int64_t left = least(kDepth, k - s * kDepth);
    const __mmask32 mask = left == kDepth ? ~0u : (1u << left) - 1;
    bf16* to = packed + s * kTile * width * 2;
    __m512i r[16];
    for (int64_t i = 0; i < 16; ++i)
      r[i] = i < rows ? _mm512_maskz_loadu_epi16(mask, x + i * k + s * kDepth) : _mm512_setzero_si512();
    if (width < kTile) {
      for (int64_t i = 0; i < width; ++i) _mm512_i32scatter_epi32(to + 2 * i, index, r[i], 4);
      continue;
    }
    transpose16(r);
    for (int64_t i = 0; i < 16; ++i) _mm512_store_si512(to + 32 * i, r[i]);
  }
}

// One tile of x stays in the cache whatever k is, and w is then read once, from end to end.
static bool in_one_go(const Product& p, int64_t tiles) { return tiles == 1 || steps(p.k) <= kMostSteps; }

int64_t sums_needed(const Product& p, int64_t rows, int64_t columns) {
  const int64_t tiles = (columns + kTile - 1) / kTile, strips = (rows + unit(p) - 1) / unit(p);
  return (in_one_go(p, tiles) ? 4 : strips * tiles) * kPair * p.width;
}

int64_t copy_needed(const Product& p) { return kPair * steps(p.k) * kDepth; }

void multiply(const Product& p, int64_t m0, int64_t m1, int64_t n0, int64_t n1, float* sums, bf16* copy) {
  const Tiles tiles(p.width);
  const int64_t all = steps(p.k), across = (m1 - m0 + kTile - 1) / kTile;
  const bool whole = in_one_go(p, across), often = across > 4 && p.k % 512 == 0;
  const int64_t at_once = whole ? all : kStepsAtOnce;
  Pending pending(p);
  for (int64_t s = 0; s < all; s += at_once) {
    const int64_t count = least(at_once, all - s);
    float* own = sums;
    for (int64_t n = n0; n < n1; n += unit(p)) {
      const int64_t rows = least(unit(p), n1 - n);
      const Strip t{m0, m1, n, rows, s, count, s + count == all, whole};
      strip(p, t, left(p, n, rows, s, count, often, copy), own, pending);
      if (!whole) own += across * kPair * p.width;
    }
  }
}

}  // namespace jaxllm::amx
