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

int64_t up(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

struct Kernel {
  int64_t strip;
  bool (*takes_few)(const Packed&);
  int64_t (*pairs)(const Packed&, bool);
  void (*round_row)(const Packed&, int64_t, const Rounded&);
  int64_t (*strip_bytes)(const Packed&);
  void (*packed)(const Packed&, const Packed*, Activation, const Rounded&, int64_t, int64_t, int64_t, int64_t, void*);
};

Kernel kernel(Level level) {
#if defined(__x86_64__)
  if (level >= Level::kAvx512) return {avx512::kStripRows, avx512::takes_few, avx512::pairs, avx512::round_row, avx512::strip_bytes, avx512::packed};
  if (level >= Level::kAvx2) return {avx2::kStripRows, avx2::takes_few, avx2::pairs, avx2::round_row, avx2::strip_bytes, avx2::packed};
#endif
  (void)level;
  return {portable::kStripRows, portable::takes_few, portable::pairs, portable::round_row, portable::strip_bytes, portable::packed};
}

Rounded room(const Packed& p, const Kernel& level) {
  static thread_local Scratch memory;
  Rounded x{};
  x.blocks = up(p.k, p.width), x.parts = p.x_type == Number::kF32 ? 2 : 1;
  x.few = p.m * x.parts <= kFew && level.takes_few(p), x.row = level.pairs(p, x.few);
  const int64_t rows = p.m * x.parts, count = rows * x.blocks;
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

void multiply(Packed p, const Packed* up_weights, Activation activation, int most, Team& team) {
  const int64_t live = live_rows(p.x, p.m, p.k, bytes(p.x_type));
  clear_rows(p.y, live, p.m, p.n, bytes(p.y_type));
  p.m = live;
  if (p.m == 0 || p.n == 0) return;
  const Kernel level = kernel(level_within(most));
  const Rounded x = room(p, level);
  team.run(up(p.m, 16), [&](int64_t i) {
    for (int64_t row = 16 * i; row < least(16 * (i + 1), p.m); ++row) level.round_row(p, row, x);
  });
  const int64_t rows = rows_of_piece(p, level.strip, team), across = up(p.n, rows), columns = least(kMostRows, p.m);
  team.run(across * up(p.m, columns), [&](int64_t i) {
    static thread_local Scratch memory;
    const int64_t n0 = i % across * rows, m0 = i / across * columns;
    const int64_t bytes = level.strip_bytes(p) + (up_weights ? level.strip_bytes(*up_weights) : 0);
    level.packed(p, up_weights, activation, x, m0, least(m0 + columns, p.m), n0, least(n0 + rows, p.n),
                 memory.get<char>(bytes));
  });
}

}  // namespace

void packed_matmul(const Packed& p, int most, Team& team) { multiply(p, nullptr, Activation::kSilu, most, team); }

void packed_gated(const Packed& p, const Packed& up, Activation activation, int most, Team& team) {
  multiply(p, &up, activation, most, team);
}

}  // namespace jaxllm
