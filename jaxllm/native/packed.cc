// Dividing a product with packed weights into pieces for the threads.
#include "packed.h"

#include "cpu.h"
#include "live.h"
#include "parallel.h"
#include "scratch.h"

namespace jaxllm {
namespace {

constexpr int64_t kAloneBytes = 1 << 16;  // of codes: fewer are not worth waking a thread for a row or two
constexpr int64_t kPiecesEach = 4;        // pieces a thread, so that a late one holds up little
constexpr int64_t kFew = 2;               // rows of x: for more it pays to turn strips of weights round
constexpr int64_t kMostRows = 128;        // of x in a piece: with their sums they stay in the L2 cache
constexpr int64_t kMostTiles = 16;        // of x in a piece, where there are tiles: their sums stay there

int64_t up(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

int64_t parts(const Packed& p) { return p.x_type == Number::kF32 ? 2 : 1; }

struct Kernel {
  int64_t strip;
  void (*round_rows)(const Packed&, int64_t, int64_t, const Rounded&);
  int64_t (*piece_bytes)(const Packed&, const Packed*, const Rounded&, int64_t, int64_t);
  void (*packed)(const Packed&, const Packed*, Activation, const Rounded&, int64_t, int64_t, int64_t, int64_t, void*);
  bool (*takes_few)(const Packed&);
  int64_t (*dots)(const Packed&, bool);
  int64_t bytes_up_to;          // codes
  int64_t together;             // rows of x, of each part, that are rounded to one place
  int64_t columns = kMostRows;  // rows of x in a piece
};

#define JAXLLM_KERNEL(level) level::kStripRows, level::round_rows, level::piece_bytes, level::packed
#define JAXLLM_ROWS(level) level::takes_few, level::dots, level::kBytesUpTo, level::kRowsTogether

Kernel kernel(Level level, const Packed& p) {
#if defined(__x86_64__)
  if (level >= Level::kAmx && amx::takes(p, p.m * parts(p))) {
    const int64_t together = amx::rows_together(p.m * parts(p));
    return {JAXLLM_KERNEL(amx), avx512::takes_few, avx512::dots, avx512::kBytesUpTo, together,
            kMostTiles * together / parts(p)};
  }
  if (level >= Level::kAvx512) return {JAXLLM_KERNEL(avx512), JAXLLM_ROWS(avx512)};
  if (level >= Level::kAvx2) return {JAXLLM_KERNEL(avx2), JAXLLM_ROWS(avx2)};
#endif
  (void)level, (void)p;
  return {JAXLLM_KERNEL(portable), JAXLLM_ROWS(portable)};
}
#undef JAXLLM_KERNEL
#undef JAXLLM_ROWS

Rounded room(const Packed& p, const Kernel& level) {
  static thread_local Scratch memory;
  Rounded x{};
  x.blocks = up(p.k, p.width), x.parts = parts(p);
  x.few = p.m * x.parts <= kFew && level.takes_few(p), x.row = level.dots(p, x.few);
  x.together = x.few ? 1 : level.together;
  const int64_t rows = up(p.m * x.parts, x.together) * x.together, count = rows * x.blocks;
  x.values = memory.get<int32_t>(rows * x.row + 3 * count);
  x.scale = reinterpret_cast<float*>(x.values + rows * x.row);
  x.sum = x.scale + count;
  x.start = reinterpret_cast<int32_t*>(x.sum + count);
  return x;
}

// Rows of w in a piece.
int64_t rows_of_piece(const Packed& p, int64_t strip, const Team& team) {
  const int64_t strips = up(p.n, strip);
  if (p.m <= 2 && p.n * p.row_bytes <= kAloneBytes) return strips * strip;
  return up(strips, kPiecesEach * team.size()) * strip;
}

void multiply(Packed p, Packed* up_weights, Activation activation, int most, Team& team) {
  const int64_t live = live_rows(p.x, p.m, p.k, bytes(p.x_type));
  clear_rows(p.y, live, p.m, p.n, bytes(p.y_type));
  p.m = live;
  if (p.m == 0 || p.n == 0) return;
  const Kernel level = kernel(level_within(most), p);
  p.x_bits = p.x_most <= 127 && p.most_code <= level.bytes_up_to ? 8 : 16;
  if (up_weights) up_weights->x_bits = p.x_bits;
  const Rounded x = room(p, level);
  const int64_t at_once = up(x.together, x.parts);
  team.run(up(p.m, at_once), [&](int64_t i) {
    level.round_rows(p, at_once * i, least(at_once * (i + 1), p.m), x);
  });
  const int64_t rows = rows_of_piece(p, level.strip, team), across = up(p.n, rows);
  const int64_t columns = least(level.columns, p.m);
  team.run(across * up(p.m, columns), [&](int64_t i) {
    static thread_local Scratch memory;
    const int64_t n0 = i % across * rows, n1 = least(n0 + rows, p.n);
    const int64_t m0 = i / across * columns, m1 = least(m0 + columns, p.m);
    const int64_t bytes = level.piece_bytes(p, up_weights, x, m1 - m0, n1 - n0);
    level.packed(p, up_weights, activation, x, m0, m1, n0, n1, memory.get<char>(bytes));
  });
}

}  // namespace

void packed_matmul(const Packed& p, int most, Team& team) { multiply(p, nullptr, Activation::kSilu, most, team); }

void packed_gated(const Packed& p, Packed up, Activation activation, int most, Team& team) {
  multiply(p, &up, activation, most, team);
}

}  // namespace jaxllm
