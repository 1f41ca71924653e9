// Attention of bf16 on AMX tiles; codes are turned into bf16 block by block first. Keys are left operands where they
// lie; values are turned once for all queries of a piece; queries and weights are right operands, so that scores come
// out with queries as lanes.
#include "attention_body.h"
#include "matmul.h"
#include "tiles.h"

namespace jaxllm::amx {
namespace {

class TileProducts {
 public:
  static int64_t depth(const Attention& a) { return (a.v.h + 15) / 16 * 16; }

  TileProducts(const Attention& a, const Piece& p, int64_t count, Parts& parts)
      : a_(a), p_(p), steps_(steps(a.k.h)), queries_(parts.take<Half>(count * packed_tile(a.k.h, kTile))),
        k_copy_(parts.take<Half>(kBlock * steps_ * kDepth)),
        v_copy_(parts.take<Half>(a.v.held == Held::kPlain ? 0 : kBlock * depth(a))),
        turned_(parts.take<Half>(kBlock * depth(a))),
        pairs_(parts.take<uint32_t>(kBlock / 2 * kTile)) {
    if (queries_ == nullptr) return;
    for (int64_t i = 0; i < count; ++i) pack_queries(i);
  }

  void take(int64_t s, int64_t slots) {
    keys(s, slots);
    values_of(s, slots);
    for (int64_t step = 0; step < kBlock / kDepth; ++step)
      for (int64_t d = 0; d < depth(a_); d += kTile) turn(slots, step, d);
  }

  // scores [64, 16] of lanes i.
  void scores(int64_t i, float* scores) {
    const Half *q = queries_ + i * packed_tile(a_.k.h, kTile), *k = k_;
    TILE_ZERO(0);
    TILE_ZERO(1);
    TILE_ZERO(2);
    TILE_ZERO(3);
    for (int64_t step = 0; step < steps_; ++step, q += kTile * kDepth, k += kDepth) {
      TILE_LOAD(6, q, 64);
      TILE_LOAD(4, k, 2 * row_);
      TILE_DOT(0, 4, 6);
      TILE_LOAD(5, k + kTile * row_, 2 * row_);
      TILE_DOT(1, 5, 6);
      TILE_LOAD(4, k + 2 * kTile * row_, 2 * row_);
      TILE_DOT(2, 4, 6);
      TILE_LOAD(5, k + 3 * kTile * row_, 2 * row_);
      TILE_DOT(3, 5, 6);
    }
    TILE_STORE(0, scores, 64);
    TILE_STORE(1, scores + 256, 64);
    TILE_STORE(2, scores + 512, 64);
    TILE_STORE(3, scores + 768, 64);
  }

  // sums [h, 16] += values [64, h] transposed times weights [64, 16], rounded to bf16.
  void add(const float* weights, float* sums) {
    for (int64_t i = 0; i < kBlock / 2; ++i) {  // two slots of a lane side by side
      const __m512i even = narrow(weights + 2 * i * kTile), odd = narrow(weights + (2 * i + 1) * kTile);
      _mm512_store_si512(pairs_ + i * kTile, _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
    }
    TILE_LOAD(6, pairs_, 64);
    TILE_LOAD(7, pairs_ + kTile * kTile, 64);
    const Half* v = turned_;
    for (int64_t d = 0; d < depth(a_); d += kTile, v += 2 * kTile * kDepth, sums += kTile * kTile) {
      TILE_LOAD(0, sums, 64);
      TILE_LOAD(4, v, 64);
      TILE_DOT(0, 4, 6);
      TILE_LOAD(5, v + kTile * kDepth, 64);
      TILE_DOT(0, 5, 7);
      TILE_STORE(0, sums, 64);
    }
  }

 private:
  static __m512i narrow(const float* p) {
    return _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(_mm512_load_ps(p))));
  }

  void pack_queries(int64_t i) {
    // k_copy_ is free yet: the rows side by side, as `pack` wants them.
    const int64_t rows = p_.rows - i * kTile < kTile ? p_.rows - i * kTile : kTile, h = a_.k.h;
    for (int64_t r = 0; r < rows; ++r)
      std::memcpy(k_copy_ + r * h, query<Half>(a_, p_, i * kTile + r), sizeof(Half) * static_cast<size_t>(h));
    pack(k_copy_, rows, h, kTile, queries_ + i * packed_tile(h, kTile));
  }

  void keys(int64_t s, int64_t slots) {
    const int64_t row = row_of(a_, p_, s), h = a_.k.h;
    const bool plain = a_.k.held == Held::kPlain;
    k_ = plain ? values<Half>(a_.k, row) : nullptr;
    row_ = h;
    if (plain && slots == kBlock && h % kDepth == 0) return;
    row_ = steps_ * kDepth;
    if (plain) {
      std::memset(k_copy_, 0, sizeof(Half) * static_cast<size_t>(kBlock * row_));
      for (int64_t i = 0; i < slots; ++i)
        std::memcpy(k_copy_ + i * row_, k_ + i * h, sizeof(Half) * static_cast<size_t>(h));
    } else {
      expand(a_.k, Type::kBF16, row, slots, k_copy_, row_);
    }
    k_ = k_copy_;
  }

  void values_of(int64_t s, int64_t slots) {
    const int64_t row = row_of(a_, p_, s);
    if (a_.v.held == Held::kPlain) {
      v_ = values<Half>(a_.v, row);
      v_row_ = a_.v.h;
    } else {
      expand(a_.v, Type::kBF16, row, slots, v_copy_, depth(a_));
      v_ = v_copy_;
      v_row_ = depth(a_);
    }
  }

  // Values of 32 slots and 16 of h as the rows of a left operand: turned_ [depth / 16, 2, 16 of h, 32 slots].
  void turn(int64_t slots, int64_t step, int64_t d) {
    const Half* from = v_ + d;
    const __mmask16 mask = first(a_.v.h - d);
    const auto row = [&](int64_t slot) {
      if (slot >= slots) return _mm512_setzero_si512();
      return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from + slot * v_row_));
    };
    __m512i r[16];
    for (int64_t i = 0; i < 16; ++i) {
      const int64_t slot = step * kDepth + 2 * i;
      r[i] = _mm512_or_si512(row(slot), _mm512_slli_epi32(row(slot + 1), 16));
    }
    transpose16(r);
    Half* to = turned_ + (d / kTile * 2 + step) * kTile * kDepth;
    for (int64_t i = 0; i < 16; ++i) _mm512_store_si512(to + i * kDepth, r[i]);
  }

  const Attention& a_;
  const Piece& p_;
  const int64_t steps_;
  Half* queries_;    // [count, steps, 16, 16, 2]
  Half* k_copy_;     // [64, steps * 32]
  Half* v_copy_;     // [64, depth], of codes
  Half* turned_;     // [depth / 16, 2, 16, 32]
  uint32_t* pairs_;  // [32, 16] pairs of bf16
  const Half *k_ = nullptr, *v_ = nullptr;
  int64_t row_ = 0, v_row_ = 0;
};

}  // namespace

int64_t attend_bytes(const Attention& a, int64_t rows) {
  Parts parts(nullptr);
  Pass<TileProducts> pass(a, {0, 0, 0, rows}, parts);
  return parts.used();
}

void attend_piece(const Attention& a, const Piece& p, char* memory) {
  const Tiles tiles(kTile);
  Parts parts(memory);
  Pass<TileProducts>(a, p, parts).run();
}

}  // namespace jaxllm::amx
