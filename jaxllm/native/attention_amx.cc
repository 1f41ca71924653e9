// Attention over a cache of bf16 on AMX tiles. Keys are left operands where they lie; values are turned once for
// all queries of a piece; queries and weights are right operands, so that scores come out with queries as lanes.
#include "attention_body.h"
#include "matmul.h"
#include "tiles.h"

namespace jaxllm::amx {
namespace {

class TileProducts {
 public:
  static int64_t depth(const Attention& a) { return (a.h + 15) / 16 * 16; }

  TileProducts(const Attention& a, const Piece& p, int64_t count, Parts& parts)
      : a_(a), p_(p), steps_(steps(a.h)), queries_(parts.take<Half>(count * packed_tile(a.h, kTile))),
        k_copy_(parts.take<Half>(kBlock * steps_ * kDepth)), turned_(parts.take<Half>(kBlock * depth(a))),
        pairs_(parts.take<uint32_t>(kBlock / 2 * kTile)) {
    if (queries_ == nullptr) return;
    for (int64_t i = 0; i < count; ++i) pack_queries(i);
  }

  void take(int64_t s, int64_t slots) {
    keys(s, slots);
    for (int64_t step = 0; step < kBlock / kDepth; ++step)
      for (int64_t d = 0; d < depth(a_); d += kTile) turn(s, slots, step, d);
  }

  // scores [64, 16] of lanes i.
  void scores(int64_t i, float* scores) {
    const Half *q = queries_ + i * packed_tile(a_.h, kTile), *k = k_;
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
    const int64_t rows = p_.rows - i * kTile < kTile ? p_.rows - i * kTile : kTile;
    for (int64_t r = 0; r < rows; ++r)
      std::memcpy(k_copy_ + r * a_.h, query<Half>(a_, p_, i * kTile + r), sizeof(Half) * static_cast<size_t>(a_.h));
    pack(k_copy_, rows, a_.h, kTile, queries_ + i * packed_tile(a_.h, kTile));
  }

  void keys(int64_t s, int64_t slots) {
    const Half* from = slots_of<Half>(a_, p_, a_.k, s);
    k_ = from;
    row_ = a_.h;
    if (slots == kBlock && a_.h % kDepth == 0) return;
    k_ = k_copy_;
    row_ = steps_ * kDepth;
    std::memset(k_copy_, 0, sizeof(Half) * static_cast<size_t>(kBlock * row_));
    for (int64_t i = 0; i < slots; ++i)
      std::memcpy(k_copy_ + i * row_, from + i * a_.h, sizeof(Half) * static_cast<size_t>(a_.h));
  }

  // Values of 32 slots and 16 of h as the rows of a left operand: turned_ [depth / 16, 2, 16 of h, 32 slots].
  void turn(int64_t s, int64_t slots, int64_t step, int64_t d) {
    const Half* from = slots_of<Half>(a_, p_, a_.v, s) + d;
    const __mmask16 mask = static_cast<__mmask16>(a_.h - d >= 16 ? 0xffff : (1u << (a_.h - d)) - 1);
    const auto row = [&](int64_t slot) {
      if (slot >= slots) return _mm512_setzero_si512();
      return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from + slot * a_.h));
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
  Half* turned_;     // [depth / 16, 2, 16, 32]
  uint32_t* pairs_;  // [32, 16] pairs of bf16
  const Half* k_ = nullptr;
  int64_t row_ = 0;
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
