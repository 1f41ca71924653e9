// RMSNorm and LayerNorm. Compiled once for each level.
#include "norm.h"

#include <cmath>

#include "convert.h"

namespace jaxllm::JAXLLM_LEVEL {
namespace {

// f(i, count, x) of columns i to i + count; lanes beyond the row are zero.
template <typename F>
inline void along(const Norm& a, int64_t row, const F& f) {
  const Numbers x{a.x, a.type, a.d};
  for (int64_t i = 0; i < a.d; i += kLanes) f(i, a.d - i, numbers(x, row * a.d + i, a.d - i));
}

float mean(const Norm& a, int64_t row) {
  V total = set(0);
  along(a, row, [&](int64_t, int64_t, V x) { total = total + x; });
  return sum(total) / static_cast<float>(a.d);
}

// Of squares, the mean taken off first.
float mean_square(const Norm& a, int64_t row, float off) {
  V total = set(0);
  const V mean = set(off);
  alignas(64) float kept[kLanes];
  along(a, row, [&](int64_t, int64_t count, V x) {
    V y = x - mean;
    if (count < kLanes) {  // the mean is not to be taken off lanes beyond the row
      store(kept, y);
      for (int64_t j = count; j < kLanes; ++j) kept[j] = 0;
      y = load(kept);
    }
    total = fma(y, y, total);
  });
  return sum(total) / static_cast<float>(a.d);
}

}  // namespace

void norm(const Norm& a, int64_t row0, int64_t row1) {
  for (int64_t row = row0; row < row1; ++row) {
    const float off = a.centered ? mean(a, row) : 0;
    const V scale = set(1 / std::sqrt(mean_square(a, row, off) + a.eps)), middle = set(off);
    along(a, row, [&](int64_t i, int64_t count, V x) {
      V y = (x - middle) * scale * numbers(a.w, i, count);
      if (a.b.data) y = y + numbers(a.b, i, count);
      write(a.y, a.type, row * a.d + i, y, count);
    });
  }
}

}  // namespace jaxllm::JAXLLM_LEVEL
