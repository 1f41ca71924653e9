// Softmax attention over a cache, in one pass with a running maximum (arXiv 1805.02867, 2205.14135).
//
// The cache is taken in blocks of 64 slots counted from its start, and every sum runs in the order of the slots, so
// a query gives the same bits alone and in any company. Blocks that none of the queries at work sees are skipped.
#pragma once

#include <cstdint>

#include "types.h"

namespace jaxllm {

class Team;

// How a cache holds its values: as numbers of the queries' type, or in codes, which are multiplied by the scale of
// their group and rounded to that type before anything else is done with them.
enum class Held : int {
  kPlain = 0,
  kInt8 = 1,
  kFloat8 = 2,  // e4m3 without infinities
  kInt4 = 3,    // two in a byte, the lower half first; 8 is zero
};

struct Cache {
  const void* values;  // [b, heads, s, h], or codes
  const void* scales;  // [b, heads, s, groups]: f32, of kInt4 bf16; null where there are no codes
  Held held;
  int64_t h, groups;
};

struct Attention {
  const void* q;  // [b, t, heads, group, k.h]
  Cache k, v;
  const uint8_t* mask;     // [b, t, s], 0 where a query does not see a slot
  const float* sinks;      // [heads, group], or null
  const float* bias;       // added to the scaled scores, or null
  const float* slopes;     // [heads, group], which multiply the bias, or null
  int64_t bias_stride[5];  // of b, heads, t, group and s; 0 where the bias has one for all
  void* y;                 // [b, t, heads, group, v.h]; zeros for a query that sees nothing
  Type type;               // of q, y and the caches' values
  int64_t b, t, heads, group, s;
  float scale, softcap;  // softcap 0: none
};

void attend(const Attention& a, int most, Team& team);

// Queries are rows t * group + i of one (batch, head); a piece of work is some of the rows of one.
struct Piece {
  int64_t b, head, row, rows;
};

inline constexpr int64_t kBlock = 64;  // slots

// What each level brings: the memory it needs for a piece of up to so many rows, in bytes, and the work.
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
