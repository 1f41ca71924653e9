// Attention with f32 multiply-add, for caches of any type (widened block by block). Compiled once for each level.
#include "attention_body.h"
#include "attention_few.h"

namespace jaxllm::JAXLLM_LEVEL {
namespace {

class Vectors {
 public:
  static int64_t depth(const Attention& a) { return a.v.h; }

  Vectors(const Attention& a, const Piece& p, int64_t count, Parts& parts)
      : a_(a), p_(p), queries_(parts.take<float>(count * a.k.h * kLanes)), blocks_(a, p, parts) {
    if (queries_ == nullptr) return;
    for (int64_t row = 0; row < count * kLanes; ++row)
      for (int64_t d = 0; d < a.k.h; ++d)
        queries_[(row / kLanes * a.k.h + d) * kLanes + row % kLanes] = row < p.rows ? query_at(a, p, row, d) : 0;
  }

  void take(int64_t s, int64_t slots) { blocks_.take(s, slots); }

  // scores [64, lanes] of lanes i.
  void scores(int64_t i, float* scores) {
    constexpr int kTogether = 8;
    const float *q = queries_ + i * a_.k.h * kLanes, *k = blocks_.k();
    const int64_t row = blocks_.k_row();
    for (int64_t s = 0; s < kBlock; s += kTogether) {
      V sums[kTogether];
      for (V& sum : sums) sum = set(0);
      for (int64_t d = 0; d < a_.k.h; ++d) {
        const V x = load(q + d * kLanes);
        for (int j = 0; j < kTogether; ++j) sums[j] = fma(set(k[(s + j) * row + d]), x, sums[j]);
      }
      for (int j = 0; j < kTogether; ++j) store(scores + (s + j) * kLanes, sums[j]);
    }
  }

  // sums [v.h, lanes] += values [64, v.h] transposed times weights [64, lanes].
  void add(const float* weights, float* sums) {
    int64_t d = 0;
    for (; d + 8 <= a_.v.h; d += 8) some<8>(weights, sums, d);
    for (; d < a_.v.h; ++d) some<1>(weights, sums, d);
  }

 private:
  template <int N>
  void some(const float* weights, float* sums, int64_t d) {
    const float* v = blocks_.v() + d;
    const int64_t row = blocks_.v_row();
    V y[N];
    for (int j = 0; j < N; ++j) y[j] = load(sums + (d + j) * kLanes);
    for (int64_t s = 0; s < kBlock; ++s) {
      const V weight = load(weights + s * kLanes);
      for (int j = 0; j < N; ++j) y[j] = fma(set(v[s * row + j]), weight, y[j]);
    }
    for (int j = 0; j < N; ++j) store(sums + (d + j) * kLanes, y[j]);
  }

  const Attention& a_;
  const Piece& p_;
  float* queries_;  // [count, k.h, lanes]
  Blocks<float> blocks_;
};

}  // namespace

int64_t attend_bytes(const Attention& a, int64_t rows) {
  Parts many(nullptr);
  Pass<Vectors> pass(a, {0, 0, 0, rows}, many);
  const int64_t few = few_bytes(a);
  return many.used() > few ? many.used() : few;
}

void attend_piece(const Attention& a, const Piece& p, char* memory) {
  if (p.rows <= kFew) return attend_few(a, p, memory);
  Parts parts(memory);
  Pass<Vectors>(a, p, parts).run();
}

}  // namespace jaxllm::JAXLLM_LEVEL
