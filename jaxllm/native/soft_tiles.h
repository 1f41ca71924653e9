// AMX in software, by the operations' definitions in Intel's manual (volume 2, TDPBF16PS and its like): what tests of
// the kernels run where the processor has no tiles. What the processor refuses ends the process with a sentence.
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace jaxllm::amx::soft {

struct Tile {
  int64_t rows = 0, row_bytes = 0;  // none before it is configured
  alignas(64) uint32_t words[16][16] = {};
};

inline thread_local Tile tiles[8];

inline void require(bool fine, const char* what) {
  if (fine) return;
  std::fprintf(stderr, "jaxllm: a tile operation that processors refuse: %s\n", what);
  std::abort();
}

inline Tile& configured(int t) {
  require(tiles[t].rows > 0, "a tile without a configuration");
  return tiles[t];
}

inline void release() {
  for (Tile& t : tiles) t = Tile{};
}

// ldtilecfg: palette, start row, 14 zeros, 16 row sizes of 2 bytes, 16 counts of rows.
inline void configure(const void* memory) {
  uint8_t bytes[64];
  std::memcpy(bytes, memory, sizeof bytes);
  require(bytes[0] == 1 && bytes[1] == 0, "palette 1 and start row 0 expected");
  for (int i = 2; i < 16; ++i) require(bytes[i] == 0, "reserved bytes are zero");
  release();
  for (int i = 0; i < 16; ++i) {
    const int64_t rows = bytes[48 + i], row_bytes = bytes[16 + 2 * i] + 256 * bytes[17 + 2 * i];
    require(rows <= (i < 8 ? 16 : 0) && row_bytes <= (i < 8 ? 64 : 0), "8 tiles of up to 16 rows and 64 bytes");
    require((rows == 0) == (row_bytes == 0), "rows and bytes are both zero or neither");
    if (i < 8) tiles[i].rows = rows, tiles[i].row_bytes = row_bytes;
  }
}

inline void zero(int t) { std::memset(configured(t).words, 0, sizeof tiles[t].words); }

// Rows lie `stride` bytes apart; what a tile has beyond its configured size becomes zero.
inline void load(int t, const void* from, int64_t stride) {
  zero(t);
  for (int64_t i = 0; i < tiles[t].rows; ++i)
    std::memcpy(tiles[t].words[i], static_cast<const char*>(from) + i * stride, static_cast<size_t>(tiles[t].row_bytes));
}

inline void store(int t, void* to, int64_t stride) {
  for (int64_t i = 0; i < configured(t).rows; ++i)
    std::memcpy(static_cast<char*>(to) + i * stride, tiles[t].words[i], static_cast<size_t>(tiles[t].row_bytes));
}

inline void require_fit(const Tile& sum, const Tile& left, const Tile& right) {
  require(&sum != &left && &sum != &right && &left != &right, "three different tiles are multiplied");
  require(sum.rows == left.rows && sum.row_bytes == right.row_bytes, "the sum's shape fits its operands'");
  require(left.row_bytes == 4 * right.rows, "a left row is as long as a right column");
}

inline float as_float(uint32_t bits) {
  float f;
  std::memcpy(&f, &bits, sizeof f);
  return f;
}

// One row: even and odd products are summed apart, each with one rounding, then added, then added to the sum.
[[gnu::noinline]] inline void dot_row(float* sum, const uint32_t* left, int64_t pairs, const uint32_t (*right)[16]) {
  float even[16] = {}, odd[16] = {};
  for (int64_t k = 0; k < pairs; ++k) {
    const float a = as_float(left[k] << 16), b = as_float(left[k] & 0xffff0000);
    for (int n = 0; n < 16; ++n) even[n] = std::fma(a, as_float(right[k][n] << 16), even[n]);
    for (int n = 0; n < 16; ++n) odd[n] = std::fma(b, as_float(right[k][n] & 0xffff0000), odd[n]);
  }
  for (int n = 0; n < 16; ++n) sum[n] += even[n] + odd[n];
}

// Rounds to nearest even and takes and leaves denormal numbers as zeros, whatever the thread's own setting.
inline void dot_bf16(int sum, int left, int right) {
  Tile &s = configured(sum), &a = configured(left), &b = configured(right);
  require_fit(s, a, b);
  const unsigned own = _mm_getcsr();
  _mm_setcsr(0x9fc0);  // flush, no exceptions, denormals are zeros
  for (int64_t i = 0; i < s.rows; ++i) {
    float row[16];
    std::memcpy(row, s.words[i], sizeof row);
    dot_row(row, a.words[i], a.row_bytes / 4, b.words);
    std::memcpy(s.words[i], row, static_cast<size_t>(s.row_bytes));
  }
  _mm_setcsr(own);
}

// Left bytes of type T and signed right ones, four products to each 32-bit sum, which wraps.
template <typename T>
inline void dot_bytes(int sum, int left, int right) {
  Tile &s = configured(sum), &a = configured(left), &b = configured(right);
  require_fit(s, a, b);
  for (int64_t i = 0; i < s.rows; ++i)
    for (int64_t k = 0; k < a.row_bytes; ++k) {
      const int32_t x = static_cast<T>(a.words[i][k / 4] >> (8 * (k % 4)));
      for (int64_t n = 0; n < s.row_bytes / 4; ++n)
        s.words[i][n] += static_cast<uint32_t>(x * static_cast<int8_t>(b.words[k / 4][n] >> (8 * (k % 4))));
    }
}

}  // namespace jaxllm::amx::soft
