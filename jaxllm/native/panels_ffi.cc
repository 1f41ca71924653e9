// What XLA calls for products with weights of float8.
#include <string>

#include "buffers.h"
#include "experts.h"
#include "panels.h"
#include "parallel.h"
#include "xla/ffi/api/ffi.h"

namespace jaxllm {
namespace {

namespace ffi = xla::ffi;

ffi::Error wrong(const std::string& what) { return ffi::Error::InvalidArgument("jaxllm: float8 " + what); }

// Codes [experts, n, columns] and scales [experts, n, groups]: the number of experts, or 0 where they do not fit p.
int64_t read(ffi::AnyBuffer codes, ffi::AnyBuffer scale, int64_t group, const Panels& p, Weights* w) {
  const auto cs = codes.dimensions(), ss = scale.dimensions();
  const bool e4m3 = codes.element_type() == ffi::F8E4M3FN;
  if (!e4m3 && codes.element_type() != ffi::F8E5M2) return 0;
  if (cs.size() != 3 || ss.size() != 3 || ss[0] != cs[0] || ss[1] != cs[1] || cs[1] != p.n || cs[2] < p.k) return 0;
  if (ss[2] < 1 || (ss[2] > 1 && (group < 32 || group % 32 != 0 || (p.k + group - 1) / group > ss[2]))) return 0;
  Number type;
  if (!known(scale.element_type(), &type)) return 0;
  *w = {codes.untyped_data(), e4m3 ? Stored::kE4M3 : Stored::kE5M2, cs[2], {scale.untyped_data(), type, ss[2]}, group};
  return cs[0];
}

bool read(ffi::AnyBuffer x, ffi::AnyBuffer y, int64_t n, Panels* p) {
  const auto xs = x.dimensions(), ys = y.dimensions();
  if (!known(x.element_type(), &p->x_type) || !known(y.element_type(), &p->y_type)) return false;
  if (xs.size() != 2 || ys.size() != 2 || xs[0] != ys[0] || ys[1] != n) return false;
  p->x = x.untyped_data(), p->y = y.untyped_data(), p->m = xs[0], p->n = n, p->k = xs[1];
  return is_float(p->x_type) && is_float(p->y_type);
}

int64_t rows_of(ffi::AnyBuffer codes) { return codes.dimensions().size() == 3 ? codes.dimensions()[1] : 0; }

// The same product with the weights of another expert.
Panels of_expert(Panels p, int64_t expert) {
  const int64_t rows = expert * p.n;
  p.w.data = static_cast<const char*>(p.w.data) + rows * p.w.row;
  p.w.scale.data = static_cast<const char*>(p.w.scale.data) + rows * p.w.scale.count * bytes(p.w.scale.type);
  return p;
}

ffi::Error float8_call(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::Buffer<ffi::S32> expert, ffi::AnyBuffer codes,
                       ffi::AnyBuffer scale, ffi::Result<ffi::AnyBuffer> y, int64_t group, int64_t level,
                       int64_t threads) {
  Panels p{};
  const int64_t experts = read(x, *y, rows_of(codes), &p) ? read(codes, scale, group, p, &p.w) : 0;
  if (experts == 0) return wrong("takes x [m, k] and y [m, n]; the parts of the weight do not fit them");
  Team team(pool, threads);
  return by_expert(p, experts, expert, "float8", [&](const Panels& rows, int64_t own) {
    panels(of_expert(rows, own), static_cast<int>(level), team);
  });
}

ffi::Error float8_gated_call(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer codes, ffi::AnyBuffer scale,
                             ffi::AnyBuffer up_codes, ffi::AnyBuffer up_scale, ffi::Result<ffi::AnyBuffer> y,
                             int64_t group, int64_t activation, int64_t level, int64_t threads) {
  Panels p{};
  if (!read(x, *y, rows_of(codes), &p) || read(codes, scale, group, p, &p.w) != 1 ||
      read(up_codes, up_scale, group, p, &p.up) != 1)
    return wrong("takes x [m, k] and y [m, n]; the parts of gate and up do not fit them");
  p.activation = static_cast<Activation>(activation);
  Team team(pool, threads);
  panels(p, static_cast<int>(level), team);
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jaxllm

#pragma GCC visibility push(default)

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxllm_float8, jaxllm::float8_call,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Attr<int64_t>("group")
                                  .Attr<int64_t>("level")
                                  .Attr<int64_t>("threads"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxllm_float8_gated, jaxllm::float8_gated_call,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Attr<int64_t>("group")
                                  .Attr<int64_t>("activation")
                                  .Attr<int64_t>("level")
                                  .Attr<int64_t>("threads"));

#pragma GCC visibility pop
