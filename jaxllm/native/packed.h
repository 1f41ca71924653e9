// y [m, n] = x [m, k] times packed weights [n, k] transposed.
//
// Activations are taken 32 (or 16) at a time as whole numbers times a scale, so that the sum of a block is a whole
// number: exact, in whatever order an instruction set adds it. The blocks' sums are then scaled and added from left to
// right in f32. So a row's bits depend on k, the format and the type of x alone, as in matmul.h.
//
// The whole numbers have 16 bits: what is lost of an activation is at most 2^-15 of the largest of its block. A row of
// f32 is taken as two: its whole numbers, and those of what they lack. Where activations have 16 bits themselves they
// have 8 bits, beside codes of a byte or less: at most 1/254 of the largest is lost, and a dot product of bytes takes
// twice as many. A level without dot products of such bytes keeps the same whole numbers in 16 bits.
#pragma once

#include <cstdint>

#include "matmul.h"
#include "numbers.h"

namespace jaxllm {

// How a code becomes a whole number.
enum class Codes : int {
  kNibbles = 0,  // 4 bits, two a byte, the lower ones first; the number is the code
  kTable = 1,    // 4 bits, and the number is table[code]
  kBytes = 2,    // a byte
  kSigned = 3,   // a signed byte; `center` has 128 more for it
  kFields = 4,   // fields of `low_bits`, the lowest first, and above them fields of `high_bits` of another array
};

// weight = (number - center - zero) * factor * scale * super_scale + offset * super_offset
struct Packed {
  const void* x;
  Number x_type, y_type;
  void* y;
  int64_t m, n, k;
  const uint8_t* codes;  // [n, row_bytes]
  int64_t row_bytes;
  const uint8_t* high;  // [n, high_bytes], of kFields
  int64_t high_bytes;
  int low_bits, high_bits;
  Codes kind;
  int64_t center;
  float factor;
  int16_t table[16];     // from 0 on where activations have 8 bits
  int64_t group;         // columns that share a scale, a multiple of width
  int64_t width;         // activations that are rounded together: 32, or 16
  int64_t most_code;     // a code, made unsigned, is at most that
  int x_most;            // and a whole number of x is at most that, 32767 or 127
  int x_bits;            // in which it is kept, 16 or 8: see kBytesUpTo
  Numbers scale, super_scale, zero, offset, super_offset;
};

// x as the kernels read it: `values` [m * parts / together, blocks, together, width] in the order in which codes leave
// a word, and for each block its scale, its sum, and minus the center times its sum. Tiles have the upper bytes of
// values [together, width] of 16 bits first, then the lower ones. Of few rows the dots (two values, or four of 8 bits)
// that meet neighbouring words lie side by side: [m * parts, words / lanes, dots of a word, lanes].
struct Rounded {
  int32_t* values;
  float *scale, *sum;
  int32_t* start;
  int64_t row, blocks, parts, together;  // row: dots
  bool few;

  // Where the first block of a row is; the next one is `together` behind it.
  int64_t first(int64_t row) const { return row / together * blocks * together + row % together; }
};

class Team;

// Products of one x with `count` weights that differ in n and y alone: x is rounded once, and the threads meet once.
void packed_matmul(Packed* weights, int64_t count, int most, Team& team);

// y = activation(x p) * (x up) of weights in one format, rounded once at the end.
void packed_gated(Packed p, Packed up, Activation activation, int most, Team& team);

// ---- what each level brings -------------------------------------------------------------------------------

#define JAXLLM_PACKED_LEVEL(level)                                                                                \
  namespace level {                                                                                               \
  extern const int64_t kStripRows, kRowsTogether; /* rows of weights taken together, and of x unless few */       \
  extern const int64_t kBytesUpTo; /* the largest code that a dot product of bytes takes */                       \
  bool takes_few(const Packed& p);          /* whether rows may lie as `few` has them */                          \
  int64_t dots(const Packed& p, bool few);  /* of a row of x */                                                   \
  void round_rows(const Packed& p, int64_t m0, int64_t m1, const Rounded& x);                                     \
  /* of working memory, for m rows of x and n rows of w */                                                        \
  int64_t piece_bytes(const Packed& p, const Packed* up, const Rounded& x, int64_t m, int64_t n);                 \
  void packed(const Packed& p, const Packed* up, Activation activation, const Rounded& x, int64_t m0, int64_t m1, \
              int64_t n0, int64_t n1, void* memory);                                                              \
  }
JAXLLM_PACKED_LEVEL(portable)
JAXLLM_PACKED_LEVEL(avx2)
JAXLLM_PACKED_LEVEL(avx512)
JAXLLM_PACKED_LEVEL(amx)
#undef JAXLLM_PACKED_LEVEL

namespace amx {
// Whether tiles take these weights and so many rows of x, each part counted: their whole numbers are bytes, and the rows
// are more than a few. They give the bits of avx512.
bool takes(const Packed& p, int64_t rows);

// How many of them go into a tile: 8, 12 or 16.
int64_t rows_together(int64_t rows);
}  // namespace amx

}  // namespace jaxllm
