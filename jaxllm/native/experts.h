// Products whose rows choose among experts: what packed and float8 weights have in common.
#pragma once

#include <string>

#include "numbers.h"
#include "xla/ffi/api/ffi.h"

namespace jaxllm {

// Rows first to first + count of x and y; P is `Packed` or `Panels`.
template <typename P>
P of_rows(P p, int64_t first, int64_t count) {
  p.x = static_cast<const char*>(p.x) + first * p.k * bytes(p.x_type);
  p.y = static_cast<char*>(p.y) + first * p.n * bytes(p.y_type);
  p.m = count;
  return p;
}

// multiply(rows of p, their expert) of neighbours with the same one together; without `expert` it is 0 for all rows.
template <typename P, typename F>
xla::ffi::Error by_expert(const P& p, int64_t experts, xla::ffi::Buffer<xla::ffi::S32> expert, const std::string& call,
                          const F& multiply) {
  const auto wrong = [&](const char* what) { return xla::ffi::Error::InvalidArgument("jaxllm: " + call + what); };
  const auto chosen = static_cast<int64_t>(expert.element_count());
  if (chosen == 0 && p.m > 0 ? experts != 1 : chosen != p.m)
    return wrong(" takes an expert for every row, or one for all");
  if (chosen == 0) multiply(p, 0);
  const int32_t* owner = expert.typed_data();
  for (int64_t i = 0, next; i < chosen; i = next) {
    if (owner[i] < 0 || owner[i] >= experts) return wrong(" has a row for an expert that is not there");
    for (next = i + 1; next < chosen && owner[next] == owner[i];) ++next;
    multiply(of_rows(p, i, next - i), owner[i]);
  }
  return xla::ffi::Error::Success();
}

}  // namespace jaxllm
