// AMX: tile registers, and the 16x16 transposition that goes with them. Written as assembly because GCC 12's
// intrinsics say too little about the memory they read (it drops the stores of the configuration). A library built
// with JAXLLM_SOFT_TILES has them in software, for tests on processors without.
#pragma once

#include <immintrin.h>

#include <cstdint>

#if defined(JAXLLM_SOFT_TILES)

#include "soft_tiles.h"

#define TILE_CONFIGURE(config) jaxllm::amx::soft::configure(&config)
#define TILE_RELEASE() jaxllm::amx::soft::release()
#define TILE_ZERO(t) jaxllm::amx::soft::zero(t)
#define TILE_LOAD(t, from, row_bytes) jaxllm::amx::soft::load(t, from, row_bytes)
#define TILE_STORE(t, to, row_bytes) jaxllm::amx::soft::store(t, to, row_bytes)
#define TILE_DOT(sum, left, right) jaxllm::amx::soft::dot_bf16(sum, left, right)
#define TILE_DOT_U8S8(sum, left, right) jaxllm::amx::soft::dot_bytes<uint8_t>(sum, left, right)
#define TILE_DOT_S8S8(sum, left, right) jaxllm::amx::soft::dot_bytes<int8_t>(sum, left, right)

#else

#define TILE_CONFIGURE(config) asm volatile("ldtilecfg %0" ::"m"(config))
#define TILE_RELEASE() asm volatile("tilerelease")
#define TILE_ZERO(t) asm volatile("tilezero %%tmm" #t :::)
#define TILE_LOAD(t, from, row_bytes) \
  asm volatile("tileloadd (%0,%1,1), %%tmm" #t ::"r"(from), "r"(static_cast<int64_t>(row_bytes)) : "memory")
#define TILE_STORE(t, to, row_bytes) \
  asm volatile("tilestored %%tmm" #t ", (%0,%1,1)" ::"r"(to), "r"(static_cast<int64_t>(row_bytes)) : "memory")
// sum [16, width] += left [16, 32] times right [32, width], both bf16
#define TILE_DOT(sum, left, right) asm volatile("tdpbf16ps %%tmm" #right ", %%tmm" #left ", %%tmm" #sum :::)
// sum i32 [16, width] += left [16, 64] times right [64, width], bytes; the right ones are signed
#define TILE_DOT_U8S8(sum, left, right) asm volatile("tdpbusd %%tmm" #right ", %%tmm" #left ", %%tmm" #sum :::)
#define TILE_DOT_S8S8(sum, left, right) asm volatile("tdpbssd %%tmm" #right ", %%tmm" #left ", %%tmm" #sum :::)

#endif

namespace jaxllm::amx {

struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// Registers 0 to 3 are sums [rows, width] of 32 bits, 4 and 5 left operands [rows, depth bytes], 6 and 7 right operands
// [depth / 4, width, 4 bytes]: pairs of bf16 or four 8-bit integers that meet neighbours of a left row.
class Tiles {
 public:
  explicit Tiles(int64_t width, int64_t rows = 16, int64_t depth = 64) {
    TileConfig config;
    for (int i = 0; i < 8; ++i) {
      const bool left = i == 4 || i == 5;
      config.rows[i] = static_cast<uint8_t>(i < 6 ? rows : depth / 4);
      config.row_bytes[i] = static_cast<uint16_t>(left ? depth : 4 * width);
    }
    TILE_CONFIGURE(config);
  }
  Tiles(const Tiles&) = delete;
  ~Tiles() { TILE_RELEASE(); }
};

// r[i] lane j becomes r[j] lane i.
static inline void transpose16(__m512i r[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
  for (int i = 0; i < 8; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
  }
}

}  // namespace jaxllm::amx
