// Dividing attention into pieces for the threads.
#include "attention.h"

#include "cpu.h"
#include "parallel.h"
#include "scratch.h"

namespace jaxllm {
namespace {

constexpr int64_t kMostRows = 256;        // of a piece: enough to turn the values once for many
constexpr int64_t kFewRows = 16;          // take hardly longer than one
constexpr int64_t kAloneBytes = 1 << 17;  // attention to less of a cache is not worth waking a thread

struct Kernel {
  int64_t (*bytes)(const Attention&, int64_t);
  void (*piece)(const Attention&, const Piece&, char*);
};

Kernel kernel(const Attention& a, Level level) {
#if defined(__x86_64__)
  if (level == Level::kAmx && a.type == Type::kBF16) return {amx::attend_bytes, amx::attend_piece};
  if (level >= Level::kAvx512) return {avx512::attend_bytes, avx512::attend_piece};
  if (level >= Level::kAvx2) return {avx2::attend_bytes, avx2::attend_piece};
#endif
  (void)a, (void)level;
  return {portable::attend_bytes, portable::attend_piece};
}

}  // namespace

void attend(const Attention& a, int most, Team& team) {
  const int64_t rows = a.t * a.group, size = rows < kMostRows ? rows : kMostRows;
  if (rows == 0 || a.b * a.heads * a.v.h == 0) return;
  const Kernel run = kernel(a, level_within(most));
  const int64_t across = a.b * a.heads, needed = run.bytes(a, size);
  const int64_t parts = (rows + size - 1) / size, pieces = across * parts;
  const auto piece = [&](int64_t i) {
    static thread_local Scratch memory;
    // The last rows see most in causal attention: the longest pieces come first.
    const int64_t row = (parts - 1 - i / across) * size;
    const Piece p{i % across / a.heads, i % across % a.heads, row, rows - row < size ? rows - row : size};
    run.piece(a, p, memory.get<char>(needed));
  };
  const bool tiny = rows <= kFewRows && across * a.s * (a.k.h + a.v.h) * bytes(a.type) <= kAloneBytes;
  if (!tiny) return team.run(pieces, piece);
  for (int64_t i = 0; i < pieces; ++i) piece(i);
}

}  // namespace jaxllm
