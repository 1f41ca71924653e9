// Dividing a product with packed weights into pieces for the threads.
#include "packed.h"

#include <algorithm>

#include "cpu.h"
#include "live.h"
#include "parallel.h"
#include "scratch.h"

namespace jaxllm {
namespace {

constexpr int64_t kAloneBytes = 1 << 16;  // of codes: fewer are not worth waking a thread for a row or two
constexpr int64_t kPiecesEach = 4;        // pieces a thread, so that a late one holds up little
constexpr int64_t kPieceBytes = 1 << 18;  // of codes at least: a piece begins before anything of it was fetched ahead
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

// What the threads divide: strips of rows of w, of one weight after the other, by some rows of x.
class Pieces {
 public:
  Pieces(const Packed* weights, int64_t count, const Kernel& level, const Team& team)
      : weights_(weights), columns_(least(level.columns, weights->m)) {
    int64_t strips = 0, codes = 0;
    for (int64_t i = 0; i < count; ++i)
      strips += up(weights[i].n, level.strip), codes += weights[i].n * weights[i].row_bytes;
    const bool few = weights->m <= kFew;
    const int64_t each = few ? least(kPiecesEach, up(codes, kPieceBytes * team.size())) : kPiecesEach;
    rows_ = std::max<int64_t>(few && codes <= kAloneBytes ? strips : up(strips, each * team.size()), 1) * level.strip;
    for (int64_t i = 0; i < count; ++i) across_ += up(weights[i].n, rows_);
  }

  int64_t count() const { return across_ * up(weights_->m, columns_); }

  // f(which weight, from row m0 to m1 of x, from row n0 to n1 of the weight)
  template <typename F>
  void at(int64_t i, const F& f) const {
    const int64_t m0 = i / across_ * columns_;
    int64_t n0 = i % across_ * rows_, w = 0;
    for (; n0 >= weights_[w].n; ++w) n0 -= up(weights_[w].n, rows_) * rows_;
    f(w, m0, least(m0 + columns_, weights_->m), n0, least(n0 + rows_, weights_[w].n));
  }

 private:
  const Packed* weights_;
  int64_t columns_, rows_ = 0, across_ = 0;
};

// Products of one x with weights of one format; or with one that `gates`, of the same shape, goes with.
void multiply(Packed* weights, int64_t count, Packed* gates, Activation activation, int most, Team& team) {
  Packed& p = *weights;
  const int64_t live = live_rows(p.x, p.m, p.k, bytes(p.x_type));
  for (int64_t i = 0; i < count; ++i) {
    Packed& w = weights[i];
    clear_rows(w.y, live, w.m, w.n, bytes(w.y_type));
    w.m = live;
  }
  if (live == 0) return;
  const Kernel level = kernel(level_within(most), p);
  for (int64_t i = 0; i < count; ++i) weights[i].x_bits = p.x_most <= 127 && p.most_code <= level.bytes_up_to ? 8 : 16;
  if (gates) gates->x_bits = p.x_bits;
  const Rounded x = room(p, level);
  const int64_t at_once = up(x.together, x.parts);
  team.run(up(p.m, at_once), [&](int64_t i) {
    level.round_rows(p, at_once * i, least(at_once * (i + 1), p.m), x);
  });
  const Pieces pieces(weights, count, level, team);
  team.run(pieces.count(), [&](int64_t i) {
    static thread_local Scratch memory;
    pieces.at(i, [&](int64_t w, int64_t m0, int64_t m1, int64_t n0, int64_t n1) {
      const int64_t bytes = level.piece_bytes(weights[w], gates, x, m1 - m0, n1 - n0);
      level.packed(weights[w], gates, activation, x, m0, m1, n0, n1, memory.get<char>(bytes));
    });
  });
}

}  // namespace

void packed_matmul(Packed* weights, int64_t count, int most, Team& team) {
  multiply(weights, count, nullptr, Activation::kSilu, most, team);
}

void packed_gated(Packed p, Packed up, Activation activation, int most, Team& team) {
  multiply(&p, 1, &up, activation, most, team);
}

}  // namespace jaxllm
