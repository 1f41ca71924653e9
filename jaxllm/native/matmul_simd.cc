// Products summed with f32 multiply-add: a vector of partial sums runs along k, and its lanes are added last.
// Compiled once for each level.
#include "matmul.h"
#include "simd.h"

namespace jaxllm::JAXLLM_LEVEL {
namespace {

constexpr int kColumns = 4;  // rows of w in a block

void put(const Dots& a, int64_t m, int64_t n, float value) {
  const int64_t at = m * a.n + n;
  if (a.y_type == Type::kBF16)
    static_cast<Half*>(a.y)[at] = narrowed(value);
  else if (a.y_type == Type::kF16)
    static_cast<F16*>(a.y)[at] = narrowed_f16(value);
  else
    static_cast<float*>(a.y)[at] = value;
}

// y [m:m+R, n:n+C]. Every element has one vector of sums, whatever R and C are.
template <int R, int C, typename T>
void block(const Dots& a, int64_t m, int64_t n) {
  const float* x = a.x + m * a.k;
  const T* w = static_cast<const T*>(a.w) + n * a.k;
  V sums[R][C];
  for (int i = 0; i < R; ++i)
    for (int j = 0; j < C; ++j) sums[i][j] = set(0.0f);
  int64_t k = 0;
  for (; k + kLanes <= a.k; k += kLanes) {
    V right[C];
    for (int j = 0; j < C; ++j) right[j] = load(w + j * a.k + k);
    for (int i = 0; i < R; ++i) {
      const V left = load(x + i * a.k + k);
      for (int j = 0; j < C; ++j) sums[i][j] = fma(left, right[j], sums[i][j]);
    }
  }
  if (k < a.k) {
    for (int i = 0; i < R; ++i) {
      const V left = load(x + i * a.k + k, a.k - k);
      for (int j = 0; j < C; ++j) sums[i][j] = fma(left, load(w + j * a.k + k, a.k - k), sums[i][j]);
    }
  }
  for (int i = 0; i < R; ++i)
    for (int j = 0; j < C; ++j) put(a, m + i, n + j, sum(sums[i][j]));
}

template <int C, typename T>
void columns(const Dots& a, int64_t m0, int64_t m1, int64_t n) {
  int64_t m = m0;
  for (; m + kRows <= m1; m += kRows) block<kRows, C, T>(a, m, n);
  for (; m + 2 <= m1; m += 2) block<2, C, T>(a, m, n);
  for (; m < m1; ++m) block<1, C, T>(a, m, n);
}

template <typename T>
void all(const Dots& a, int64_t m0, int64_t m1, int64_t n0, int64_t n1) {
  int64_t n = n0;
  for (; n + kColumns <= n1; n += kColumns) columns<kColumns, T>(a, m0, m1, n);
  for (; n < n1; ++n) columns<1, T>(a, m0, m1, n);
}

template <typename T>
void widen_all(const T* from, float* to, int64_t count) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(to + i, load(from + i));
  for (; i < count; ++i) to[i] = widened(from[i]);
}

}  // namespace

void widen(const void* from, Type type, float* to, int64_t count) {
  if (type == Type::kF16)
    widen_all(static_cast<const F16*>(from), to, count);
  else
    widen_all(static_cast<const Half*>(from), to, count);
}

void dots(const Dots& a, int64_t m0, int64_t m1, int64_t n0, int64_t n1) {
  if (a.w_type == Type::kBF16)
    all<Half>(a, m0, m1, n0, n1);
  else if (a.w_type == Type::kF16)
    all<F16>(a, m0, m1, n0, n1);
  else
    all<float>(a, m0, m1, n0, n1);
}

}  // namespace jaxllm::JAXLLM_LEVEL
