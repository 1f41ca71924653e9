// The types of numbers that kernels take and give.
#pragma once

#include <cstdint>

namespace jaxllm {

enum class Type { kF32, kBF16, kF16 };

// bf16 is handled as its bits: the upper half of an f32.
using bf16 = uint16_t;

inline int64_t bytes(Type t) { return t == Type::kF32 ? 4 : 2; }

}  // namespace jaxllm
