// What XLA calls for products with packed weights.
#include <algorithm>
#include <string>
#include <vector>

#include "buffers.h"
#include "experts.h"
#include "packed.h"
#include "parallel.h"
#include "xla/ffi/api/ffi.h"

namespace jaxllm {
namespace {

namespace ffi = xla::ffi;

ffi::Error wrong(const std::string& what) { return ffi::Error::InvalidArgument("jaxllm: packed " + what); }

// Numbers [experts, n, count], or none where the buffer is empty.
bool read(ffi::AnyBuffer b, int64_t experts, int64_t n, Numbers* to) {
  if (b.element_count() == 0) return true;
  const auto sizes = b.dimensions();
  if (sizes.size() != 3 || sizes[0] != experts || sizes[1] != n || !known(b.element_type(), &to->type)) return false;
  *to = {b.untyped_data(), to->type, sizes[2]};
  return true;
}

// Codes of `bits` [experts, n, bytes]; kFields have those above the first field in `high`, where it is not empty.
bool read_codes(ffi::AnyBuffer codes, ffi::AnyBuffer high, int64_t bits, Packed* p) {
  const auto sizes = codes.dimensions(), above = high.dimensions();
  if (codes.size_bytes() != codes.element_count()) return false;
  p->codes = static_cast<const uint8_t*>(codes.untyped_data()), p->row_bytes = sizes[2];
  if (p->kind != Codes::kFields) {
    p->low_bits = p->kind == Codes::kNibbles || p->kind == Codes::kTable ? 4 : 8;
    return bits == p->low_bits && high.element_count() == 0;
  }
  p->low_bits = bits >= 4 ? 4 : bits >= 2 ? 2 : 1;
  p->high_bits = static_cast<int>(bits) - p->low_bits;
  if (p->high_bits == 0) return high.element_count() == 0;
  if (bits > 6 || above.size() != 3 || above[0] != sizes[0] || above[1] != sizes[1] ||
      high.size_bytes() != high.element_count() || above[2] * p->low_bits < sizes[2] * p->high_bits)
    return high.element_count() == 0 && codes.element_count() == 0;
  p->high = static_cast<const uint8_t*>(high.untyped_data()), p->high_bytes = above[2];
  return true;
}

bool divides(const Numbers& few, const Numbers& many) {
  return few.data == nullptr || (few.count > 0 && many.count % few.count == 0);
}

void move(Numbers* t, int64_t rows) {
  if (t->data) t->data = static_cast<const char*>(t->data) + rows * t->count * bytes(t->type);
}

// The same product with the weights of another expert.
Packed of_expert(Packed p, int64_t expert) {
  const int64_t rows = expert * p.n;
  p.codes += rows * p.row_bytes;
  if (p.high) p.high += rows * p.high_bytes;
  for (Numbers* t : {&p.scale, &p.super_scale, &p.zero, &p.offset, &p.super_offset}) move(t, rows);
  return p;
}

// The parts of a packed weight, as XLA has them.
struct Parts {
  ffi::AnyBuffer codes, high, scale, super_scale, zero, offset, super_offset;
};

// What all calls have in common.
struct How {
  int64_t kind, center, bits, group;
  float factor;
  ffi::Span<const int64_t> table;
};

// Activations of f32 are wanted as they are; of others 8 bits lose little beside codes that are bytes.
void choose_bits(int64_t bits, Packed* p) {
  p->x_most = 32767, p->most_code = (int64_t{1} << bits) - 1;
  if (p->x_type == Number::kF32) return;
  if (p->kind == Codes::kTable) {
    const auto [low, high] = std::minmax_element(p->table, p->table + 16);
    const int16_t least = *low;
    if (*high - least > 127) return;
    p->most_code = *high - least;
    for (int16_t& level : p->table) level = static_cast<int16_t>(level - least);
    p->center -= least;
  }
  p->x_most = 127;
}

// The number of experts that `parts` hold, with the product that they belong to; 0 where they do not fit.
int64_t read(ffi::AnyBuffer x, const Parts& parts, ffi::AnyBuffer y, const How& how, Packed* p) {
  const auto xs = x.dimensions(), cs = parts.codes.dimensions(), ys = y.dimensions();
  if (xs.size() != 2 || cs.size() != 3 || ys.size() != 2 || ys[0] != xs[0] || ys[1] != cs[1]) return 0;
  if (!known(x.element_type(), &p->x_type) || !known(y.element_type(), &p->y_type) || !is_float(p->x_type) ||
      !is_float(p->y_type))
    return 0;
  if (how.kind < 0 || how.kind > 4 || how.table.size() != 16 || how.group < 16 || how.group % 16 != 0) return 0;
  for (size_t i = 0; i < 16; ++i) p->table[i] = static_cast<int16_t>(how.table[i]);
  p->x = x.untyped_data(), p->y = y.untyped_data(), p->m = xs[0], p->n = cs[1], p->k = xs[1];
  p->kind = static_cast<Codes>(how.kind), p->center = how.center, p->factor = how.factor;
  p->group = how.group, p->width = how.group % 32 == 0 ? 32 : 16;
  const int64_t experts = cs[0], groups = (p->k + p->group - 1) / p->group;
  const bool whole = read_codes(parts.codes, parts.high, how.bits, p) && cs[2] * 8 / p->low_bits >= p->k &&
                     read(parts.scale, experts, p->n, &p->scale) &&
                     read(parts.super_scale, experts, p->n, &p->super_scale) &&
                     read(parts.zero, experts, p->n, &p->zero) && read(parts.offset, experts, p->n, &p->offset) &&
                     read(parts.super_offset, experts, p->n, &p->super_offset);
  choose_bits(how.bits, p);
  const bool enough = p->scale.count >= groups && (!p->zero.data || p->zero.count >= groups) &&
                      (!p->offset.data || p->offset.count >= groups);
  return whole && enough && divides(p->super_scale, p->scale) && divides(p->super_offset, p->offset) ? experts : 0;
}

ffi::Error packed_call(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::Buffer<ffi::S32> expert, ffi::AnyBuffer codes,
                       ffi::AnyBuffer high, ffi::AnyBuffer scale, ffi::AnyBuffer super_scale, ffi::AnyBuffer zero,
                       ffi::AnyBuffer offset, ffi::AnyBuffer super_offset, ffi::Result<ffi::AnyBuffer> y,
                       int64_t kind, int64_t center, int64_t bits, int64_t group, float factor,
                       ffi::Span<const int64_t> table, int64_t level, int64_t threads) {
  Packed p{};
  const Parts parts{codes, high, scale, super_scale, zero, offset, super_offset};
  const int64_t experts = read(x, parts, *y, {kind, center, bits, group, factor, table}, &p);
  if (experts == 0) return wrong("takes x [m, k] and y [m, n]; the parts of the weight do not fit them");
  Team team(pool, threads);
  return by_expert(p, experts, expert, "packed", [&](const Packed& rows, int64_t own) {
    Packed weight = of_expert(rows, own);
    packed_matmul(&weight, 1, static_cast<int>(level), team);
  });
}

ffi::Error packed_gated_call(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer codes, ffi::AnyBuffer high,
                             ffi::AnyBuffer scale, ffi::AnyBuffer super_scale, ffi::AnyBuffer zero,
                             ffi::AnyBuffer offset, ffi::AnyBuffer super_offset, ffi::AnyBuffer up_codes,
                             ffi::AnyBuffer up_high, ffi::AnyBuffer up_scale, ffi::AnyBuffer up_super_scale,
                             ffi::AnyBuffer up_zero, ffi::AnyBuffer up_offset, ffi::AnyBuffer up_super_offset,
                             ffi::Result<ffi::AnyBuffer> y, int64_t kind, int64_t center, int64_t bits, int64_t group,
                             float factor, ffi::Span<const int64_t> table, int64_t activation, int64_t level,
                             int64_t threads) {
  Packed p{}, up{};
  const How how{kind, center, bits, group, factor, table};
  const Parts parts{codes, high, scale, super_scale, zero, offset, super_offset};
  const Parts others{up_codes, up_high, up_scale, up_super_scale, up_zero, up_offset, up_super_offset};
  if (read(x, parts, *y, how, &p) != 1 || read(x, others, *y, how, &up) != 1)
    return wrong("takes x [m, k] and y [m, n]; the parts of gate and up do not fit them");
  Team team(pool, threads);
  packed_gated(p, up, static_cast<Activation>(activation), static_cast<int>(level), team);
  return ffi::Error::Success();
}

// The parts of each weight, one weight after the other -> its product with x.
ffi::Error packed_several_call(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::RemainingArgs parts, ffi::RemainingRets y,
                               int64_t kind, int64_t center, int64_t bits, int64_t group, float factor,
                               ffi::Span<const int64_t> table, int64_t level, int64_t threads) {
  constexpr size_t kParts = sizeof(Parts) / sizeof(ffi::AnyBuffer);
  if (y.size() == 0 || parts.size() != kParts * y.size()) return wrong("takes seven parts of every weight");
  std::vector<Packed> weights(y.size(), Packed{});
  for (size_t i = 0; i < y.size(); ++i) {
    const auto part = [&](size_t j) { return *parts.get<ffi::AnyBuffer>(kParts * i + j); };
    const Parts of_one{part(0), part(1), part(2), part(3), part(4), part(5), part(6)};
    if (read(x, of_one, **y.get<ffi::AnyBuffer>(i), {kind, center, bits, group, factor, table}, &weights[i]) != 1)
      return wrong("takes x [m, k] and y [m, n] of every weight; the parts of one do not fit them");
  }
  Team team(pool, threads);
  packed_matmul(weights.data(), static_cast<int64_t>(weights.size()), static_cast<int>(level), team);
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jaxllm

// The attributes of `How`.
#define JAXLLM_HOW                 \
  .Attr<int64_t>("kind")           \
      .Attr<int64_t>("center")     \
      .Attr<int64_t>("bits")       \
      .Attr<int64_t>("group")      \
      .Attr<float>("factor")       \
      .Attr<xla::ffi::Span<const int64_t>>("table")

#pragma GCC visibility push(default)

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxllm_packed, jaxllm::packed_call,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  JAXLLM_HOW
                                  .Attr<int64_t>("level")
                                  .Attr<int64_t>("threads"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxllm_packed_gated, jaxllm::packed_gated_call,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  JAXLLM_HOW
                                  .Attr<int64_t>("activation")
                                  .Attr<int64_t>("level")
                                  .Attr<int64_t>("threads"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxllm_packed_several, jaxllm::packed_several_call,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  JAXLLM_HOW
                                  .Attr<int64_t>("level")
                                  .Attr<int64_t>("threads"));

#pragma GCC visibility pop
#undef JAXLLM_HOW
