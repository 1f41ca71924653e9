// Dividing a product of panels into pieces for the threads.
#include "panels.h"

#include "cpu.h"
#include "live.h"
#include "parallel.h"
#include "scratch.h"

namespace jaxllm {
namespace {

constexpr int64_t kFew = 16;               // rows of x: fewer make a product a matter of reading weights
constexpr int64_t kPieceBytes = 1 << 18;   // of weights in a piece then
constexpr int64_t kAloneBytes = 1 << 16;   // a product of fewer is not worth waking a thread
constexpr int64_t kPiecesEach = 4;         // pieces a thread, so that a late one holds up little
constexpr int64_t kMostRows = 256;         // of x or w in a piece: a block of x and the sums stay in the L2 cache
constexpr int64_t kUnit = 16;              // rows of w: lanes that are written at once

int64_t up(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

struct Kernel {
  int64_t rows;
  int64_t (*panel_bytes)(const Panels&);
  void (*pack_panel)(const Panels&, int64_t, void*);
  int64_t (*memory)(const Panels&, int64_t);
  void (*panels)(const Panels&, const void*, int64_t, int64_t, int64_t, int64_t, void*);
};

Kernel kernel(Level level) {
#if defined(__x86_64__)
  if (level >= Level::kAvx512)
    return {avx512::kPanelRows, avx512::panel_bytes, avx512::pack_panel, avx512::panels_memory, avx512::panels};
  if (level >= Level::kAvx2)
    return {avx2::kPanelRows, avx2::panel_bytes, avx2::pack_panel, avx2::panels_memory, avx2::panels};
#endif
  (void)level;
  return {portable::kPanelRows, portable::panel_bytes, portable::pack_panel, portable::panels_memory, portable::panels};
}

// Rows of w in a piece.
int64_t rows_of_piece(const Panels& p, const Team& team) {
  const int64_t row_bytes = p.k * bytes(p.w.type) + 1;
  if (p.m <= kFew && p.n * row_bytes <= kAloneBytes) return p.n;
  const int64_t fair = up(p.n, kPiecesEach * team.size());
  const int64_t most = p.m <= kFew ? kPieceBytes / row_bytes : kMostRows;
  return up(least(fair, most), kUnit) * kUnit;
}

}  // namespace

void panels(const Panels& all, int most, Team& team) {
  static thread_local Scratch packed_memory;
  Panels p = all;
  p.m = live_rows(p.x, p.m, p.k, bytes(p.x_type));
  clear_rows(p.y, p.m, all.m, p.n, bytes(p.y_type));
  if (p.m == 0 || p.n == 0) return;
  const Kernel level = kernel(level_within(most));
  const int64_t count = up(p.m, level.rows);
  void* packed = packed_memory.get<char>(count * level.panel_bytes(p));
  team.run(up(count, 8), [&](int64_t i) {
    for (int64_t j = 8 * i; j < least(8 * (i + 1), count); ++j) level.pack_panel(p, j * level.rows, packed);
  });
  const int64_t rows = rows_of_piece(p, team), across = up(p.n, rows), columns = least(kMostRows, p.m);
  team.run(across * up(p.m, columns), [&](int64_t i) {
    static thread_local Scratch memory;
    const int64_t n0 = i % across * rows, m0 = i / across * columns;
    level.panels(p, packed, m0, least(m0 + columns, p.m), n0, least(n0 + rows, p.n),
                 memory.get<char>(level.memory(p, columns)));
  });
}

}  // namespace jaxllm
