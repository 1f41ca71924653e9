// What XLA calls for a norm, and its rows divided among the threads.
#include "norm.h"

#include <string>

#include "buffers.h"
#include "cpu.h"
#include "parallel.h"

namespace jaxllm {
namespace {

namespace ffi = xla::ffi;

constexpr int64_t kPiece = 1 << 16;  // numbers: fewer are not worth waking a thread

ffi::Error wrong(const std::string& what) { return ffi::Error::InvalidArgument("jaxllm: norm " + what); }

void (*kernel(Level level))(const Norm&, int64_t, int64_t) {
#if defined(__x86_64__)
  if (level >= Level::kAvx512) return avx512::norm;
  if (level >= Level::kAvx2) return avx2::norm;
#endif
  (void)level;
  return portable::norm;
}

ffi::Error norm_call(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer w, ffi::AnyBuffer b,
                     ffi::Result<ffi::AnyBuffer> y, float eps, bool centered, int64_t level, int64_t threads) {
  const auto xs = x.dimensions();
  if (xs.size() != 2 || y->element_count() != x.element_count() || y->element_type() != x.element_type())
    return wrong("takes x [rows, d] and y like it");
  const auto d = static_cast<size_t>(xs[1]);
  Norm a{x.untyped_data(), {}, {}, y->untyped_data(), Number::kF32, xs[0], xs[1], eps, centered};
  if (!known(x.element_type(), &a.type) || !known(w.element_type(), &a.w.type) ||
      !known(b.element_type(), &a.b.type) || !is_float(a.type) || !is_float(a.w.type) || !is_float(a.b.type))
    return wrong("is for floats of 16 and 32 bits");
  if (w.element_count() != d || (b.element_count() != d && b.element_count() != 0))
    return wrong("takes w [d] and b [d] or none");
  a.w.data = w.untyped_data();
  if (b.element_count() > 0) a.b.data = b.untyped_data();
  if (x.element_count() == 0) return ffi::Error::Success();

  Team team(pool, threads);
  const auto norm = kernel(level_within(static_cast<int>(level)));
  const int64_t each = (kPiece + a.d - 1) / a.d;
  team.run((a.rows + each - 1) / each,
           [&](int64_t i) { norm(a, i * each, i * each + each < a.rows ? i * each + each : a.rows); });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jaxllm

#pragma GCC visibility push(default)

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxllm_norm, jaxllm::norm_call,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Attr<float>("eps")
                                  .Attr<bool>("centered")
                                  .Attr<int64_t>("level")
                                  .Attr<int64_t>("threads"));

#pragma GCC visibility pop
