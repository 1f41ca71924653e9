// Rows that need no work.
#pragma once

#include <cstdint>
#include <cstring>

namespace jaxllm {

// How many of the rows there are up to the last one with a number other than zero. Padding behind a prompt comes to
// a product as rows of zeros, and their results are zeros. A number has 2 or 4 bytes.
inline int64_t live_rows(const void* x, int64_t rows, int64_t columns, int64_t bytes) {
  const uint64_t unsigned_bits = bytes == 2 ? 0x7fff7fff7fff7fffu : 0x7fffffff7fffffffu;  // -0 is a zero
  const int64_t size = columns * bytes;
  for (; rows > 0; --rows) {
    const char* row = static_cast<const char*>(x) + (rows - 1) * size;
    uint64_t found = 0;
    for (int64_t i = 0; i < size && (found & unsigned_bits) == 0; i += 8) {
      const int64_t left = size - i;
      std::memcpy(&found, row + i, left < 8 ? static_cast<size_t>(left) : 8);
    }
    if (found & unsigned_bits) return rows;
  }
  return 0;
}

// Zeros in rows first to last of y.
inline void clear_rows(void* y, int64_t first, int64_t last, int64_t columns, int64_t bytes) {
  std::memset(static_cast<char*>(y) + first * columns * bytes, 0, static_cast<size_t>((last - first) * columns * bytes));
}

}  // namespace jaxllm
