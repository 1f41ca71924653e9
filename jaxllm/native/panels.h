// y [m, n] = x [m, k] times w [n, k] transposed, for weights of bf16 and float8.
//
// Columns are taken in blocks of 1024. Within one, a vector of sums in f32 runs along k, and its lanes are added last,
// in a tree; the blocks' sums are added from left to right. Where rows have several scales, what a group has in a
// block is summed apart, multiplied by its scale and added to the vector. So the order of every sum depends on k, the
// format and the level alone, never on m, n, a row's place or the threads: a row of x gives the same bits alone and among
// thousands.
//
// float8 becomes bf16, which holds every number of it. Where AVX-512 multiplies pairs of bf16 (x is bf16 too), lane i
// adds columns 2 i and 2 i + 1 of every 32, each with one rounding to the nearest; elsewhere lanes are fused
// multiply-adds of f32. What is lost is at most
//
//   2^-24 (300 + groups in a block + k / 1024) of the sum of |x w|,
//
// and of pairs of bf16 what is denormal: numbers below 2^-126 in x and w are zeros, and so are sums below it.
#pragma once

#include <cstdint>

#include "matmul.h"
#include "numbers.h"

namespace jaxllm {

enum class Stored : int { kBF16, kE4M3, kE5M2 };
inline int64_t bytes(Stored type) { return type == Stored::kBF16 ? 2 : 1; }

// [n, k] numbers, `row` from one row to the next, times scales.
struct Weights {
  const void* data = nullptr;
  Stored type = Stored::kBF16;
  int64_t row = 0;
  Numbers scale;      // [n, groups]; none where weights are what is stored
  int64_t group = 0;  // columns that share a scale, a multiple of 32; of a single scale nobody asks
};

struct Panels {
  const void* x;
  void* y;
  Number x_type, y_type;  // floats
  int64_t m, n, k;
  Weights w;
  Weights up;  // no data, or the second matrix of a gated product: y = activation(x w) * (x up), rounded once
  Activation activation;
};

// Runs on the best level of this machine that is not above `most`.
void panels(const Panels& p, int most, Team& team);

// ---- what each level brings -------------------------------------------------------------------------------

// x is packed in panels of a few rows: [steps of columns, rows, columns of a step], zeros behind the last column.
#define JAXLLM_PANELS_LEVEL(level)                                                                       \
  namespace level {                                                                                      \
  extern const int64_t kPanelRows;                                                                       \
  int64_t panel_bytes(const Panels& p); /* of kPanelRows rows */                                         \
  void pack_panel(const Panels& p, int64_t m, void* packed); /* rows from m on, to their place */        \
  int64_t panels_memory(const Panels& p, int64_t m); /* bytes of working memory for m rows */            \
  /* Writes y [m0:m1, n0:n1]; m0 is a multiple of kPanelRows. */                                         \
  void panels(const Panels& p, const void* packed, int64_t m0, int64_t m1, int64_t n0, int64_t n1, void* memory); \
  }
JAXLLM_PANELS_LEVEL(portable)
JAXLLM_PANELS_LEVEL(avx2)
JAXLLM_PANELS_LEVEL(avx512)
#undef JAXLLM_PANELS_LEVEL

}  // namespace jaxllm
