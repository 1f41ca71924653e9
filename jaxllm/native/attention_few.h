// The pass over the cache for few queries: its vectors run along the slots where scores are made, and along the
// values where they are summed. Every sum has the terms and the order that it has in `Pass`, and so the same bits.
#pragma once

#include "attention_body.h"

namespace jaxllm::JAXLLM_LEVEL {

constexpr int64_t kFew = kLanes / 2;  // more queries are faster as lanes

// R queries, of which the last are zeros where the piece has fewer; T is what the blocks are read as.
template <typename T, int R>
class Few {
 public:
  Few(const Attention& a, const Piece& p, Parts& parts)
      : a_(a), p_(p), blocks_(a, p, parts), queries_(parts.take<float>(R * blocks_.k_row())),
        sums_(parts.take<float>(R * blocks_.v_row())), scores_(parts.take<float>(R * kBlock)),
        bias_(parts.take<float>(kBlock)) {}

  void run() {
    begin();
    for (int64_t s = 0; s < a_.s; s += kBlock) block(s, s + kBlock < a_.s ? kBlock : a_.s - s);
    for (int64_t r = 0; r < p_.rows; ++r) finish(r);
  }

 private:
  void begin() {
    const int64_t k_row = blocks_.k_row();
    for (int64_t i = 0; i < R * blocks_.v_row(); ++i) sums_[i] = 0;
    for (int64_t r = 0; r < R; ++r)
      for (int64_t d = 0; d < k_row; ++d)
        queries_[r * k_row + d] = r < p_.rows && d < a_.k.h ? query_at(a_, p_, r, d) : 0;
    for (int64_t r = 0; r < R; ++r) {
      highest_[r] = r < p_.rows ? sink_of(a_, p_, r) : 0;
      total_[r] = a_.sinks == nullptr ? 0.0f : 1.0f;
    }
  }

  void block(int64_t s, int64_t slots) {
    uint64_t seen[R], any = 0;
    for (int64_t r = 0; r < p_.rows; ++r) {
      const int64_t t = (p_.row + r) / a_.group;
      any |= seen[r] = flags(a_.mask + (p_.b * a_.t + t) * a_.s + s, slots);
    }
    if (any == 0) return;
    blocks_.take(s, slots);
    scores();
    for (int64_t r = 0; r < p_.rows; ++r) weigh(r, seen[r], s, slots);
    for (int64_t r = p_.rows; r < R; ++r) std::memset(scores_ + r * kBlock, 0, sizeof(float) * kBlock);
    constexpr int kTogether = R > 4 ? 2 : 4;
    int64_t d = 0;
    for (; d + kTogether * kLanes <= blocks_.v_row(); d += kTogether * kLanes) add<kTogether>(d);
    for (; d < blocks_.v_row(); d += kLanes) add<1>(d);
  }

  // scores [R, 64] of all slots of the block.
  void scores() {
    const int64_t row = blocks_.k_row();
    for (int64_t s = 0; s < kBlock; s += kLanes) {
      V sums[R];
      for (V& sum : sums) sum = set(0);
      for (int64_t d = 0; d < row; d += kLanes) {
        V k[kLanes];
        for (int64_t i = 0; i < kLanes; ++i) k[i] = load(blocks_.k() + (s + i) * row + d);
        transpose(k);
#pragma GCC unroll 16
        for (int64_t i = 0; i < kLanes; ++i)
          for (int r = 0; r < R; ++r) sums[r] = fma(k[i], set(queries_[r * row + d + i]), sums[r]);
      }
      for (int r = 0; r < R; ++r) store(scores_ + r * kBlock + s, sums[r]);
    }
  }

  // The bias of a query to the slots of a block [64]; beyond the cache it holds anything.
  const float* bias(int64_t r, int64_t s, int64_t slots) {
    const int64_t by = a_.bias_stride[4];
    const float* from = bias_of(a_, p_, r) + s * by;
    if (by == 1 && slots == kBlock) return from;
    for (int64_t i = 0; i < slots; ++i) bias_[i] = from[i * by];
    return bias_;
  }

  // Scores [64] of a query become weights, and its sums so far smaller where the highest score rose.
  void weigh(int64_t r, uint64_t seen, int64_t s, int64_t slots) {
    const Scoring scoring(a_);
    const float* added = a_.bias == nullptr ? nullptr : bias(r, s, slots);
    float* at = scores_ + r * kBlock;
    const V hidden = set(-__builtin_inff()), slope = set(slope_of(a_, p_, r));
    V most = hidden;
    for (int64_t i = 0; i < kBlock; i += kLanes) {
      const V x = added == nullptr ? scoring(load(at + i)) : scoring(load(at + i), load(added + i), slope);
      const V score = where(static_cast<uint32_t>(seen >> i), x, hidden);
      store(at + i, score);
      most = max(most, score);
    }
    const V before = set(highest_[r]), highest = max(before, set(jaxllm::JAXLLM_LEVEL::highest(most)));
    const V base = max(highest, set(-3e38f));
    V part = set(0);
    for (int64_t i = 0; i < kBlock; i += kLanes) {
      const V weight = exp2(load(at + i) - base);
      store(at + i, weight);
      part = part + weight;
    }
    const V shrink = exp2(before - base);
    total_[r] = first_of(fma(set(total_[r]), shrink, set(sum(part))));
    highest_[r] = first_of(highest);
    if (!same(before, highest)) scale(r, shrink);
  }

  static float first_of(V v) {
    float f[kLanes];
    store(f, v);
    return f[0];
  }

  void scale(int64_t r, V by) {
    float* y = sums_ + r * blocks_.v_row();
    for (int64_t d = 0; d < blocks_.v_row(); d += kLanes) store(y + d, load(y + d) * by);
  }

  // sums [R, d to d + N * kLanes] += weights [R, 64] times those columns of the values [64, v.h].
  template <int N>
  void add(int64_t d) {
    const int64_t row = blocks_.v_row();
    const T* v = blocks_.v() + d;
    V y[R][N];
    for (int r = 0; r < R; ++r)
      for (int n = 0; n < N; ++n) y[r][n] = load(sums_ + r * row + d + n * kLanes);
    for (int64_t s = 0; s < kBlock; ++s) {
      V x[N];
      for (int n = 0; n < N; ++n) x[n] = load(v + s * row + n * kLanes);
      for (int r = 0; r < R; ++r)
        for (int n = 0; n < N; ++n) y[r][n] = fma(x[n], set(scores_[r * kBlock + s]), y[r][n]);
    }
    for (int r = 0; r < R; ++r)
      for (int n = 0; n < N; ++n) store(sums_ + r * row + d + n * kLanes, y[r][n]);
  }

  void finish(int64_t r) {
    const V total = set(total_[r]);
    scale(r, where_zero(total, set(0), set(1) / total));
    if (a_.type == Type::kF32) return write<float>(r);
    return a_.type == Type::kBF16 ? write<Half>(r) : write<F16>(r);
  }

  template <typename U>
  void write(int64_t r) {
    U* to = result<U>(a_, p_, r);
    for (int64_t d = 0; d < a_.v.h; d += kLanes) {
      U narrow[kLanes];
      store(narrow, load(sums_ + r * blocks_.v_row() + d));
      std::memcpy(to + d, narrow, sizeof(U) * static_cast<size_t>(a_.v.h - d < kLanes ? a_.v.h - d : kLanes));
    }
  }

  const Attention& a_;
  const Piece& p_;
  Blocks<T> blocks_;
  float* queries_;  // [R, k_row]
  float* sums_;     // [R, v_row]
  float* scores_;   // [R, 64]
  float* bias_;     // [64]
  float highest_[R], total_[R];
};

template <typename T>
void attend_few_as(const Attention& a, const Piece& p, Parts& parts) {
  if (p.rows == 1) return Few<T, 1>(a, p, parts).run();
  if (p.rows == 2) return Few<T, 2>(a, p, parts).run();
  if constexpr (kFew >= 8)
    if (p.rows > 4) return Few<T, 8>(a, p, parts).run();
  if constexpr (kFew >= 4) Few<T, 4>(a, p, parts).run();
}

static inline void attend_few(const Attention& a, const Piece& p, char* memory) {
  Parts parts(memory);
  if (a.k.held == Held::kPlain && a.type == Type::kBF16) return attend_few_as<Half>(a, p, parts);
  if (a.k.held == Held::kPlain && a.type == Type::kF16) return attend_few_as<F16>(a, p, parts);
  attend_few_as<float>(a, p, parts);
}

static inline int64_t few_bytes(const Attention& a) {
  Parts parts(nullptr);
  const Few<float, kFew> most(a, {0, 0, 0, kFew}, parts);  // no other type or number needs more
  return parts.used();
}

}  // namespace jaxllm::JAXLLM_LEVEL
