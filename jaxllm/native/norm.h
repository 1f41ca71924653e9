// y [rows, d] = x / sqrt(mean(x^2) + eps) * w + b, of x less its mean where it is centered. In f32, rounded once.
//
// A row is summed in one order, whatever the other rows are.
#pragma once

#include "numbers.h"

namespace jaxllm {

struct Norm {
  const void* x;
  Numbers w, b;  // [d]; b may be missing
  void* y;
  Number type;  // of x and y
  int64_t rows, d;
  float eps;
  bool centered;
};

namespace portable {
void norm(const Norm& a, int64_t row0, int64_t row1);
}
namespace avx2 {
void norm(const Norm& a, int64_t row0, int64_t row1);
}
namespace avx512 {
void norm(const Norm& a, int64_t row0, int64_t row1);
}

}  // namespace jaxllm
