// Numbers as they are stored.
#pragma once

#include <cstdint>

namespace jaxllm {

enum class Number : int { kF32 = 0, kBF16 = 1, kF16 = 2, kU8 = 3, kS8 = 4, kE8M0 = 5, kE4M3 = 6 };

inline int64_t bytes(Number type) {
  return type == Number::kF32 ? 4 : type == Number::kBF16 || type == Number::kF16 ? 2 : 1;
}
inline bool is_float(Number type) { return bytes(type) > 1; }

// [n, count] of them: of the rows of a weight, say. No data: there are none.
struct Numbers {
  const void* data = nullptr;
  Number type = Number::kF32;
  int64_t count = 0;
};

}  // namespace jaxllm
