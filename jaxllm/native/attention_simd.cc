// Attention with f32 multiply-add, for caches of f32 and of bf16 (widened block by block).
// Compiled once for each level.
#include "attention_body.h"

namespace jaxllm::JAXLLM_LEVEL {
namespace {

class Vectors {
 public:
  static int64_t depth(const Attention& a) { return a.h; }

  Vectors(const Attention& a, const Piece& p, int64_t count, Parts& parts)
      : a_(a), p_(p), queries_(parts.take<float>(count * a.h * kLanes)), k_copy_(parts.take<float>(kBlock * a.h)),
        v_copy_(parts.take<float>(kBlock * a.h)) {
    if (queries_ == nullptr) return;
    for (int64_t row = 0; row < count * kLanes; ++row)
      for (int64_t d = 0; d < a.h; ++d) queries_[(row / kLanes * a.h + d) * kLanes + row % kLanes] = at(row, d);
  }

  void take(int64_t s, int64_t slots) {
    k_ = wide(a_.k, s, slots, k_copy_);
    v_ = wide(a_.v, s, slots, v_copy_);
  }

  // scores [64, lanes] of lanes i.
  void scores(int64_t i, float* scores) {
    constexpr int kTogether = 8;
    const float* q = queries_ + i * a_.h * kLanes;
    for (int64_t s = 0; s < kBlock; s += kTogether) {
      V sums[kTogether];
      for (V& sum : sums) sum = set(0);
      for (int64_t d = 0; d < a_.h; ++d) {
        const V x = load(q + d * kLanes);
        for (int j = 0; j < kTogether; ++j) sums[j] = fma(set(k_[(s + j) * a_.h + d]), x, sums[j]);
      }
      for (int j = 0; j < kTogether; ++j) store(scores + (s + j) * kLanes, sums[j]);
    }
  }

  // sums [h, lanes] += values [64, h] transposed times weights [64, lanes].
  void add(const float* weights, float* sums) {
    int64_t d = 0;
    for (; d + 8 <= a_.h; d += 8) some<8>(weights, sums, d);
    for (; d < a_.h; ++d) some<1>(weights, sums, d);
  }

 private:
  template <int N>
  void some(const float* weights, float* sums, int64_t d) {
    V y[N];
    for (int j = 0; j < N; ++j) y[j] = load(sums + (d + j) * kLanes);
    for (int64_t s = 0; s < kBlock; ++s) {
      const V weight = load(weights + s * kLanes);
      for (int j = 0; j < N; ++j) y[j] = fma(set(v_[s * a_.h + d + j]), weight, y[j]);
    }
    for (int j = 0; j < N; ++j) store(sums + (d + j) * kLanes, y[j]);
  }

  float at(int64_t row, int64_t d) const {
    if (row >= p_.rows) return 0;
    return a_.is_bf16 ? widened(query<Half>(a_, p_, row)[d]) : query<float>(a_, p_, row)[d];
  }

  // [64, h] in f32: the cache itself where it is that, else a copy with zeros behind.
  const float* wide(const void* cache, int64_t s, int64_t slots, float* copy) {
    if (!a_.is_bf16 && slots == kBlock) return slots_of<float>(a_, p_, cache, s);
    const int64_t count = slots * a_.h;
    if (a_.is_bf16) {
      const Half* from = slots_of<Half>(a_, p_, cache, s);
      int64_t i = 0;
      for (; i + kLanes <= count; i += kLanes) store(copy + i, load(from + i));
      for (; i < count; ++i) copy[i] = widened(from[i]);
    } else {
      std::memcpy(copy, slots_of<float>(a_, p_, cache, s), sizeof(float) * static_cast<size_t>(count));
    }
    std::memset(copy + count, 0, sizeof(float) * static_cast<size_t>((kBlock - slots) * a_.h));
    return copy;
  }

  const Attention& a_;
  const Piece& p_;
  float* queries_;  // [count, h, lanes]
  float *k_copy_, *v_copy_;
  const float *k_ = nullptr, *v_ = nullptr;
};

}  // namespace

int64_t attend_bytes(const Attention& a, int64_t rows) {
  Parts parts(nullptr);
  Pass<Vectors> pass(a, {0, 0, 0, rows}, parts);
  return parts.used();
}

void attend_piece(const Attention& a, const Piece& p, char* memory) {
  Parts parts(memory);
  Pass<Vectors>(a, p, parts).run();
}

}  // namespace jaxllm::JAXLLM_LEVEL
