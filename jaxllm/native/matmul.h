// y [m, n] = x [m, k] times w [n, k] transposed, summed in f32.
//
// The order of every sum depends on k and the level alone, never on m, n, a row's place or the threads, so a row
// gives the same bits alone and in any company.
#pragma once

#include <cstdint>

#include "types.h"

namespace jaxllm {

class Team;

// What a gated feed-forward does to the first of two products before the second multiplies it.
enum class Activation : int { kSilu = 0, kGeluTanh = 1 };

struct Matmul {
  const void* x;
  const void* w;
  void* y;
  Type x_type, w_type, y_type;
  int64_t m, n, k;
};

// y [m, n] = activation(x w) * (x up), rounded once at the end. All of bf16, where `multiplies_bf16`.
void gated(const Matmul& a, const void* up, Activation activation, int most, Team& team);

// Runs on the best level of this machine that is not above `most`.
void matmul(const Matmul& a, int most, Team& team);

// Whether bf16 is multiplied by bf16 as it is, on tiles or in pairs; else it is widened to f32 first.
bool multiplies_bf16(int most);

// ---- what each level brings; the types are plain because these files are compiled for other processors --------

// x widened to f32 and w of either type. Writes y [m0:m1, n0:n1].
struct Dots {
  const float* x;
  const void* w;
  void* y;
  Type w_type, y_type;
  int64_t n, k;
};

namespace portable {
void widen(const void* from, Type type, float* to, int64_t count);
void dots(const Dots& a, int64_t m0, int64_t m1, int64_t n0, int64_t n1);
}  // namespace portable
namespace avx2 {
void widen(const void* from, Type type, float* to, int64_t count);
void dots(const Dots& a, int64_t m0, int64_t m1, int64_t n0, int64_t n1);
}  // namespace avx2
namespace avx512 {
void widen(const void* from, Type type, float* to, int64_t count);
void dots(const Dots& a, int64_t m0, int64_t m1, int64_t n0, int64_t n1);
}  // namespace avx512

namespace amx {

inline constexpr int64_t kTile = 16;    // rows of a tile, and its columns of 32 bits
inline constexpr int64_t kDepth = 32;   // bf16 in a row of a tile
inline constexpr int64_t kPair = 2 * kTile;  // rows of w taken at a time

// x packed as `pack` leaves it, tile after tile of 16 rows, and w as it lies.
struct Product {
  const bf16* packed;
  const bf16* w;
  void* y;
  bool y_is_bf16;
  int64_t m, n, k;
  int64_t width;  // rows of x in a tile: 16, or m where m is less
  const bf16* up = nullptr;  // the second matrix of a gated product
  Activation activation = Activation::kSilu;
};

inline int64_t steps(int64_t k) { return (k + kDepth - 1) / kDepth; }
inline int64_t packed_tile(int64_t k, int64_t width) { return steps(k) * kTile * width * 2; }

// Up to 16 rows of x, `width` columns of pairs: packed [steps, 16, width, 2], zero where x has nothing.
void pack(const bf16* x, int64_t rows, int64_t k, int64_t width, bf16* packed);

// How many floats and bf16 of working memory `multiply` needs for a block of n1 - n0 by m1 - m0.
int64_t sums_needed(const Product& p, int64_t rows, int64_t columns);
int64_t copy_needed(const Product& p);

// Writes y [m0:m1, n0:n1]; m0 is a multiple of 16, n0 of 32 (16 where gated).
void multiply(const Product& p, int64_t m0, int64_t m1, int64_t n0, int64_t n1, float* sums, bf16* copy);

}  // namespace amx
}  // namespace jaxllm
