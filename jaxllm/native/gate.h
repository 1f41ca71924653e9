// What a gated feed-forward does to the first of two products before the second multiplies it.
#pragma once

#include "matmul.h"
#include "simd.h"

namespace jaxllm::JAXLLM_LEVEL {

static inline V silu(V x) {
  const V e = exp2(min(x, set(0) - x) * set(1.44269504f));  // of -|x|: nothing overflows
  return x * where_zero(max(x, set(0)), e, set(1)) / (set(1) + e);
}

static inline V gelu_tanh(V x) {
  const V inner = set(0.797884561f) * fma(set(0.044715f) * x * x, x, x);
  return set(0.5f) * x * (set(1) + tanh(inner));
}

static inline V activated(Activation activation, V x) {
  return activation == Activation::kSilu ? silu(x) : gelu_tanh(x);
}

}  // namespace jaxllm::JAXLLM_LEVEL
