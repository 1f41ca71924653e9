// Softmax attention over a cache, in one pass with a running maximum (arXiv 1805.02867, 2205.14135).
//
// The cache is taken in blocks of 64 slots counted from its start, and every sum runs in the order of the slots, so
// a query gives the same bits alone and in any company. Blocks that none of the queries at work sees are skipped.
#pragma once

#include <cstdint>

namespace jaxllm {

class Team;

struct Attention {
  const void* q;        // [b, t, heads, group, h]
  const void* k;        // [b, heads, s, h]
  const void* v;        // [b, heads, s, h]
  const uint8_t* mask;  // [b, t, s], 0 where a query does not see a slot
  const float* sinks;   // [heads, group], or null
  void* y;              // as q; zeros for a query that sees nothing
  bool is_bf16;         // all of q, k, v and y; else f32
  int64_t b, t, heads, group, s, h;
  float scale, softcap;  // softcap 0: none
};

void attend(const Attention& a, int most, Team& team);

// Queries are rows t * group + i of one (batch, head); a piece of work is some of the rows of one.
struct Piece {
  int64_t b, head, row, rows;
};

inline constexpr int64_t kBlock = 64;  // slots

// What each level brings: the memory it needs for a piece, in bytes, and the work.
namespace portable {
int64_t attend_bytes(const Attention& a, int64_t rows);
void attend_piece(const Attention& a, const Piece& p, char* memory);
}  // namespace portable
namespace avx2 {
int64_t attend_bytes(const Attention& a, int64_t rows);
void attend_piece(const Attention& a, const Piece& p, char* memory);
}  // namespace avx2
namespace avx512 {
int64_t attend_bytes(const Attention& a, int64_t rows);
void attend_piece(const Attention& a, const Piece& p, char* memory);
}  // namespace avx512
namespace amx {
int64_t attend_bytes(const Attention& a, int64_t rows);
void attend_piece(const Attention& a, const Piece& p, char* memory);
}  // namespace amx

}  // namespace jaxllm
