// The pass over the cache that all levels share. A vector's lanes are queries: 4, 8 or 16 of them go together, and
// the largest score, the sum and the result of each are lanes too, so nothing is ever added across lanes.
// Products says how scores and results are multiplied.
#pragma once

#include "attention.h"
#include "cache_body.h"
#include "simd.h"

namespace jaxllm::JAXLLM_LEVEL {

constexpr float kLog2E = 1.44269504f;

// Query `row` of a piece: [k.h].
template <typename T>
static inline const T* query(const Attention& a, const Piece& p, int64_t row) {
  const int64_t t = (p.row + row) / a.group, g = (p.row + row) % a.group;
  return static_cast<const T*>(a.q) + (((p.b * a.t + t) * a.heads + p.head) * a.group + g) * a.k.h;
}
static inline float query_at(const Attention& a, const Piece& p, int64_t row, int64_t d) {
  if (a.type == Type::kF32) return query<float>(a, p, row)[d];
  return a.type == Type::kBF16 ? widened(query<Half>(a, p, row)[d]) : widened(query<F16>(a, p, row)[d]);
}

// Where its result goes: [v.h].
template <typename T>
static inline T* result(const Attention& a, const Piece& p, int64_t row) {
  const int64_t t = (p.row + row) / a.group, g = (p.row + row) % a.group;
  return static_cast<T*>(a.y) + (((p.b * a.t + t) * a.heads + p.head) * a.group + g) * a.v.h;
}

// The bias of a query to the first slot; those of the next slots follow with the stride of s.
static inline const float* bias_of(const Attention& a, const Piece& p, int64_t row) {
  const int64_t t = (p.row + row) / a.group, g = (p.row + row) % a.group, *by = a.bias_stride;
  return a.bias + p.b * by[0] + p.head * by[1] + t * by[2] + g * by[3];
}

// A slot without a value that is seen first, in powers of two; none is minus infinity.
static inline float sink_of(const Attention& a, const Piece& p, int64_t row) {
  const int64_t g = (p.row + row) % a.group;
  return a.sinks == nullptr ? -__builtin_inff() : a.sinks[p.head * a.group + g] * kLog2E;
}

static inline float slope_of(const Attention& a, const Piece& p, int64_t row) {
  return a.slopes == nullptr ? 1 : a.slopes[p.head * a.group + (p.row + row) % a.group];
}

// From a product of query and key, and a bias times its slope, to the score in powers of two.
struct Scoring {
  explicit Scoring(const Attention& a)
      : softcap(a.softcap > 0), factor(set(softcap ? a.scale / a.softcap : a.scale * kLog2E)),
        bias_factor(set(softcap ? 1 / a.softcap : kLog2E)), cap(set(a.softcap * kLog2E)) {}

  V operator()(V x) const { return capped(x * factor); }
  V operator()(V x, V bias, V slope) const { return capped(fma(bias * slope, bias_factor, x * factor)); }

 private:
  V capped(V x) const { return softcap ? tanh(x) * cap : x; }

  const bool softcap;
  const V factor, bias_factor, cap;
};

// Slot i of a block is added to the i % kLanes'th of these; in the end halves are added until one is left, the
// order in which `sum` of a vector adds its lanes.
static inline V joined(V parts[kLanes]) {
  for (int64_t n = kLanes / 2; n > 0; n /= 2)
    for (int64_t i = 0; i < n; ++i) parts[i] = parts[i] + parts[i + n];
  return parts[0];
}

// Queries that go together, and what is known of them after the slots so far. Scores are in powers of two.
struct Lanes {
  float highest[kLanes];  // score
  float total[kLanes];    // of 2^(score - highest)
  float slope[kLanes];    // of the bias
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
        bias_(parts.take<float>(a.bias == nullptr ? 0 : kBlock * kLanes)),
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
      l.highest[row % kLanes] = sink_of(a_, p_, row);
      l.slope[row % kLanes] = slope_of(a_, p_, row);
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
      if (a_.bias != nullptr) take_bias(i, s, slots);
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

  // bias [64, lanes] of lanes i; what belongs to no slot or query holds anything and is not seen.
  void take_bias(int64_t i, int64_t s, int64_t slots) {
    const int64_t by = a_.bias_stride[4];
    for (int64_t lane = 0; lane < lanes_of(i); ++lane) {
      const float* from = bias_of(a_, p_, i * kLanes + lane) + s * by;
      for (int64_t slot = 0; slot < slots; ++slot) bias_[slot * kLanes + lane] = from[slot * by];
    }
  }

  // Scores [64, lanes] become weights, 2^(score - highest); returns what earlier sums are multiplied by.
  V weigh(Lanes& l, const Sight& sight) {
    const Scoring scoring(a_);
    const V hidden = set(-__builtin_inff()), slope = load(l.slope);
    V most[4] = {hidden, hidden, hidden, hidden};
    for (int half = 0; half < 2; ++half) {
      const W seen = load(half == 0 ? sight.low : sight.high);
      for (int i = 0; i < 32; ++i) {
        const int at = (32 * half + i) * kLanes;
        V x = a_.bias == nullptr ? scoring(load(scores_ + at)) : scoring(load(scores_ + at), load(bias_ + at), slope);
        if (!sight.all) x = where(seen, i, x, hidden);
        store(scores_ + at, x);
        most[i % 4] = max(most[i % 4], x);
      }
    }
    const V before = load(l.highest);
    const V highest = max(before, max(max(most[0], most[1]), max(most[2], most[3])));
    const V base = max(highest, set(-3e38f));  // a row that has seen nothing: -inf less -inf would be no number
    V parts[kLanes];
    for (V& part : parts) part = set(0);
    for (int64_t i = 0; i < kBlock; i += kLanes) {
#pragma GCC unroll 16
      for (int64_t j = 0; j < kLanes; ++j) {
        const V weight = exp2(load(scores_ + (i + j) * kLanes) - base);
        store(scores_ + (i + j) * kLanes, weight);
        parts[j] = parts[j] + weight;
      }
    }
    const V shrink = exp2(before - base);
    store(l.highest, highest);
    store(l.total, fma(load(l.total), shrink, joined(parts)));
    return shrink;
  }

  void scale(float* sums, V by) {
    for (int64_t d = 0; d < Products::depth(a_); ++d) store(sums + d * kLanes, load(sums + d * kLanes) * by);
  }

  void finish(int64_t i) {
    const V total = load(lanes_[i].total);
    const V share = where_zero(total, set(0), set(1) / total);
    scale(sums(i), share);
    if (a_.type == Type::kF32) return write<float>(i);
    return a_.type == Type::kBF16 ? write<Half>(i) : write<F16>(i);
  }

  template <typename T>
  void write(int64_t i) {
    for (int64_t d = 0; d < a_.v.h; ++d) {
      T narrow[kLanes];
      store(narrow, load(sums(i) + d * kLanes));
      for (int64_t lane = 0; lane < lanes_of(i); ++lane) result<T>(a_, p_, i * kLanes + lane)[d] = narrow[lane];
    }
  }

  const Attention& a_;
  const Piece& p_;
  const int64_t count_;
  Lanes* lanes_;
  float* sums_;    // [count, depth, lanes]
  float* scores_;  // [64, lanes]
  float* bias_;    // [64, lanes]
  uint64_t* seen_;
  Products products_;
};

}  // namespace jaxllm::JAXLLM_LEVEL
