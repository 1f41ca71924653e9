// The pass over the cache that all levels share. A vector's lanes are queries: 4, 8 or 16 of them go together, and
// the largest score, the sum and the result of each are lanes too, so nothing is ever added across lanes.
// Products says how scores and results are multiplied.
#pragma once

#include "attention.h"
#include "simd.h"

namespace jaxllm::JAXLLM_LEVEL {

constexpr float kLog2E = 1.44269504f;

// Hands out parts of one piece of memory, each on its own cache lines. Without memory it only counts.
class Parts {
 public:
  explicit Parts(char* memory) : memory_(memory) {}

  template <typename T>
  T* take(int64_t count) {
    const int64_t at = used_;
    used_ += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return memory_ == nullptr ? nullptr : reinterpret_cast<T*>(memory_ + at);
  }
  int64_t used() const { return used_; }

 private:
  char* memory_;
  int64_t used_ = 0;
};

// Queries that go together, and what is known of them after the slots so far. Scores are in powers of two.
struct Lanes {
  float highest[kLanes];  // score
  float total[kLanes];    // of 2^(score - highest)
};

// What one row sees of 64 slots, one bit each.
struct Sight {
  uint32_t low[kLanes], high[kLanes];
  bool any, all;
};

template <typename Products>
class Pass {
 public:
  Pass(const Attention& a, const Piece& p, Parts& parts)
      : a_(a),
        p_(p),
        count_((p.rows + kLanes - 1) / kLanes),
        lanes_(parts.take<Lanes>(count_)),
        sums_(parts.take<float>(count_ * Products::depth(a) * kLanes)),
        scores_(parts.take<float>(kBlock * kLanes)),
        seen_(parts.take<uint64_t>(p.rows + 2)),
        products_(a, p, count_, parts) {}

  void run() {
    begin();
    for (int64_t s = 0; s < a_.s; s += kBlock) block(s, s + kBlock < a_.s ? kBlock : a_.s - s);
    for (int64_t i = 0; i < count_; ++i) finish(i);
  }

 private:
  int64_t time(int64_t row) const { return (p_.row + row) / a_.group; }
  int64_t lanes_of(int64_t i) const { return p_.rows - i * kLanes < kLanes ? p_.rows - i * kLanes : kLanes; }
  float* sums(int64_t i) { return sums_ + i * Products::depth(a_) * kLanes; }

  void begin() {
    for (int64_t i = 0; i < count_ * Products::depth(a_) * kLanes; ++i) sums_[i] = 0;
    for (int64_t row = 0; row < count_ * kLanes; ++row) {
      Lanes& l = lanes_[row / kLanes];
      const int64_t g = (p_.row + row) % a_.group;
      // A sink is a slot without a value, seen first.
      l.highest[row % kLanes] = a_.sinks == nullptr ? -__builtin_inff() : a_.sinks[p_.head * a_.group + g] * kLog2E;
      l.total[row % kLanes] = a_.sinks == nullptr ? 0.0f : 1.0f;
    }
  }

  void block(int64_t s, int64_t slots) {
    const int64_t t0 = time(0), t1 = time(p_.rows - 1);
    uint64_t any = 0;
    for (int64_t t = t0; t <= t1; ++t)
      any |= seen_[t - t0] = flags(a_.mask + (p_.b * a_.t + t) * a_.s + s, slots);
    if (any == 0) return;
    products_.take(s, slots);
    for (int64_t i = 0; i < count_; ++i) {
      const Sight sight = see(i);
      if (!sight.any) continue;
      products_.scores(i, scores_);
      const V before = load(lanes_[i].highest);
      const V shrink = weigh(lanes_[i], sight);
      if (!same(before, load(lanes_[i].highest))) scale(sums(i), shrink);
      products_.add(scores_, sums(i));
    }
  }

  Sight see(int64_t i) const {
    Sight found{};
    uint64_t any = 0, all = ~0ull;
    for (int64_t lane = 0; lane < lanes_of(i); ++lane) {
      const uint64_t bits = seen_[time(i * kLanes + lane) - time(0)];
      found.low[lane] = static_cast<uint32_t>(bits);
      found.high[lane] = static_cast<uint32_t>(bits >> 32);
      any |= bits;
      all &= bits;
    }
    found.any = any != 0;
    found.all = all == ~0ull && lanes_of(i) == kLanes;
    return found;
  }

  // Scores [64, lanes] become weights, 2^(score - highest); returns what earlier sums are multiplied by.
  V weigh(Lanes& l, const Sight& sight) {
    const V factor = set(a_.softcap > 0 ? a_.scale / a_.softcap : a_.scale * kLog2E), cap = set(a_.softcap * kLog2E);
    const V hidden = set(-__builtin_inff());
    V most[4] = {hidden, hidden, hidden, hidden};
    for (int half = 0; half < 2; ++half) {
      const W seen = load(half == 0 ? sight.low : sight.high);
      for (int i = 0; i < 32; ++i) {
        float* at = scores_ + (32 * half + i) * kLanes;
        V x = load(at) * factor;
        if (a_.softcap > 0) x = tanh(x) * cap;
        if (!sight.all) x = where(seen, i, x, hidden);
        store(at, x);
        most[i % 4] = max(most[i % 4], x);
      }
    }
    const V before = load(l.highest);
    const V highest = max(before, max(max(most[0], most[1]), max(most[2], most[3])));
    const V base = max(highest, set(-3e38f));  // a row that has seen nothing: -inf less -inf would be no number
    V sum[4] = {set(0), set(0), set(0), set(0)};
    for (int i = 0; i < kBlock; ++i) {
      const V weight = exp2(load(scores_ + i * kLanes) - base);
      store(scores_ + i * kLanes, weight);
      sum[i % 4] = sum[i % 4] + weight;
    }
    const V shrink = exp2(before - base);
    store(l.highest, highest);
    store(l.total, fma(load(l.total), shrink, (sum[0] + sum[1]) + (sum[2] + sum[3])));
    return shrink;
  }

  void scale(float* sums, V by) {
    for (int64_t d = 0; d < Products::depth(a_); ++d) store(sums + d * kLanes, load(sums + d * kLanes) * by);
  }

  void finish(int64_t i) {
    const V total = load(lanes_[i].total);
    const V share = where_zero(total, set(0), set(1) / total);
    scale(sums(i), share);
    for (int64_t lane = 0; lane < lanes_of(i); ++lane) write(i * kLanes + lane, sums(i) + lane);
  }

  void write(int64_t row, const float* sums) {
    const int64_t g = (p_.row + row) % a_.group;
    const int64_t at = (((p_.b * a_.t + time(row)) * a_.heads + p_.head) * a_.group + g) * a_.h;
    for (int64_t d = 0; d < a_.h; ++d) {
      if (a_.is_bf16)
        static_cast<Half*>(a_.y)[at + d] = narrowed(sums[d * kLanes]);
      else
        static_cast<float*>(a_.y)[at + d] = sums[d * kLanes];
    }
  }

  const Attention& a_;
  const Piece& p_;
  const int64_t count_;
  Lanes* lanes_;
  float* sums_;    // [count, depth, lanes]
  float* scores_;  // [64, lanes]
  uint64_t* seen_;
  Products products_;
};

// Query `row` of a piece: [h].
template <typename T>
static inline const T* query(const Attention& a, const Piece& p, int64_t row) {
  const int64_t t = (p.row + row) / a.group, g = (p.row + row) % a.group;
  return static_cast<const T*>(a.q) + (((p.b * a.t + t) * a.heads + p.head) * a.group + g) * a.h;
}

// Keys or values from slot s on: [slots, h].
template <typename T>
static inline const T* slots_of(const Attention& a, const Piece& p, const void* cache, int64_t s) {
  return static_cast<const T*>(cache) + ((p.b * a.heads + p.head) * a.s + s) * a.h;
}

}  // namespace jaxllm::JAXLLM_LEVEL
