// Dividing a product into pieces for the threads.
#include "matmul.h"

#include <cstring>

#include "cpu.h"
#include "live.h"
#include "panels.h"
#include "parallel.h"
#include "scratch.h"

namespace jaxllm {
namespace {

constexpr int64_t kPieceBytes = 1 << 18;   // of weights, where few rows make a product a matter of reading them
constexpr int64_t kAloneBytes = 1 << 16;   // a product of fewer is not worth waking a thread
constexpr int64_t kPiecesEach = 4;         // pieces a thread, so that a late one holds up little
constexpr int64_t kMostRows = 256;         // of w in a piece
constexpr int64_t kMostColumns = 512;      // of x in a piece: with the rows above, its sums stay in the L2 cache
constexpr int64_t kSimdBytes = 1 << 19;    // of x in a piece of the f32 path

int64_t up(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t clamp(int64_t a, int64_t low, int64_t high) { return a < low ? low : a > high ? high : a; }
int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Rows of w in a piece, a multiple of `unit`.
int64_t rows_of_piece(const Matmul& a, int64_t unit, int64_t few, Team& team) {
  const int64_t row_bytes = a.k * bytes(a.w_type);
  if (a.m <= few && a.n * row_bytes <= kAloneBytes) return up(a.n, unit) * unit;
  const int64_t fair = up(a.n, kPiecesEach * team.size());
  const int64_t most = a.m <= few ? clamp(kPieceBytes / row_bytes, unit, a.n) : kMostRows;
  return up(least(fair, most), unit) * unit;
}

#if defined(__x86_64__)
void on_tiles(const Matmul& a, const bf16* up_weights, Activation activation, Team& team) {
  static thread_local Scratch packed_memory;
  const int64_t width = least(a.m, amx::kTile), tiles = up(a.m, amx::kTile), tile = amx::packed_tile(a.k, width);
  bf16* packed = packed_memory.get<bf16>(tiles * tile);
  const bf16* x = static_cast<const bf16*>(a.x);
  const auto pack = [&](int64_t j) {
    amx::pack(x + j * amx::kTile * a.k, least(amx::kTile, a.m - j * amx::kTile), a.k, width, packed + j * tile);
  };
  // Eight tiles a piece: packing is quick beside handing out work.
  team.run(up(tiles, 8), [&](int64_t i) {
    for (int64_t j = 8 * i; j < least(8 * (i + 1), tiles); ++j) pack(j);
  });

  const amx::Product p{packed, static_cast<const bf16*>(a.w), a.y, a.y_type == Type::kBF16, a.m, a.n, a.k, width,
                       up_weights, activation};
  const int64_t rows = rows_of_piece(a, amx::kPair, amx::kTile, team), columns = least(kMostColumns, a.m);
  const int64_t across = up(a.n, rows);
  team.run(across * up(a.m, columns), [&](int64_t i) {
    static thread_local Scratch sums, copy;
    const int64_t n0 = i % across * rows, m0 = i / across * columns;
    amx::multiply(p, m0, least(m0 + columns, a.m), n0, least(n0 + rows, a.n),
                  sums.get<float>(amx::sums_needed(p, rows, columns)), copy.get<bf16>(amx::copy_needed(p)));
  });
}
#endif

struct Simd {
  void (*widen)(const void*, Type, float*, int64_t);
  void (*dots)(const Dots&, int64_t, int64_t, int64_t, int64_t);
};

Simd simd(Level level) {
#if defined(__x86_64__)
  if (level >= Level::kAvx512) return {avx512::widen, avx512::dots};
  if (level >= Level::kAvx2) return {avx2::widen, avx2::dots};
#endif
  (void)level;
  return {portable::widen, portable::dots};
}

void on_vectors(const Matmul& a, Level level, Team& team) {
  static thread_local Scratch wide;
  const Simd kernel = simd(level);
  const float* x = static_cast<const float*>(a.x);
  if (a.x_type != Type::kF32) {
    float* copy = wide.get<float>(a.m * a.k);
    kernel.widen(a.x, a.x_type, copy, a.m * a.k);
    x = copy;
  }
  const Dots d{x, a.w, a.y, a.w_type, a.y_type, a.n, a.k};
  const int64_t rows = rows_of_piece(a, 4, 8, team), across = up(a.n, rows);
  const int64_t columns = clamp(kSimdBytes / (4 * a.k) / 12 * 12, 12, a.m < 12 ? 12 : a.m);
  team.run(across * up(a.m, columns), [&](int64_t i) {
    const int64_t n0 = i % across * rows, m0 = i / across * columns;
    kernel.dots(d, m0, least(m0 + columns, a.m), n0, least(n0 + rows, a.n));
  });
}

// The product without the rows of zeros behind x; their results are written.
Matmul without_padding(Matmul a) {
  const int64_t live = live_rows(a.x, a.m, a.k, bytes(a.x_type));
  clear_rows(a.y, live, a.m, a.n, bytes(a.y_type));
  a.m = live;
  return a;
}

void of_bf16(const Matmul& all, const bf16* up_weights, Activation activation, int most, Team& team) {
#if defined(__x86_64__)
  if (level_within(most) == Level::kAmx) {
    const Matmul a = without_padding(all);
    if (a.m > 0 && a.n > 0) on_tiles(a, up_weights, activation, team);
    return;
  }
#endif
  const auto weights = [&](const void* w) { return Weights{w, Stored::kBF16, all.k, {}, 0}; };
  const Number y_type = all.y_type == Type::kF32 ? Number::kF32 : all.y_type == Type::kBF16 ? Number::kBF16 : Number::kF16;
  panels({all.x, all.y, Number::kBF16, y_type, all.m, all.n, all.k, weights(all.w), weights(up_weights), activation},
         most, team);
}

}  // namespace

bool multiplies_bf16(int most) { return level_within(most) >= Level::kAvx512; }

void matmul(const Matmul& all, int most, Team& team) {
  if (all.x_type == Type::kBF16 && all.w_type == Type::kBF16 && multiplies_bf16(most))
    return of_bf16(all, nullptr, Activation::kSilu, most, team);
  const Matmul a = without_padding(all);
  if (a.m > 0 && a.n > 0) on_vectors(a, level_within(most), team);
}

void gated(const Matmul& a, const void* up, Activation activation, int most, Team& team) {
  of_bf16(a, static_cast<const bf16*>(up), activation, most, team);
}

}  // namespace jaxllm
