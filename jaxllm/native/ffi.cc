// The functions that XLA calls, and what Python asks of the library.
#include <cstring>
#include <string>

#include "attention.h"
#include "cpu.h"
#include "matmul.h"
#include "parallel.h"
#include "xla/ffi/api/ffi.h"

namespace jaxllm {
namespace {

namespace ffi = xla::ffi;

ffi::Error wrong(const std::string& what) { return ffi::Error::InvalidArgument("jaxllm: " + what); }

bool known(ffi::AnyBuffer b) { return b.element_type() == ffi::F32 || b.element_type() == ffi::BF16; }
Type type(ffi::AnyBuffer b) { return b.element_type() == ffi::BF16 ? Type::kBF16 : Type::kF32; }
int64_t bytes(Type t) { return t == Type::kBF16 ? 2 : 4; }

// Leading axes, which `vmap` adds: [..., m, k]. One of size 1 goes with any size of the others.
class Batch {
 public:
  explicit Batch(ffi::Span<const int64_t> sizes, ffi::Span<const int64_t> whole) {
    count_ = whole.size() - 2;
    int64_t stride = 1;
    for (size_t i = count_; i-- > 0;) {
      whole_[i] = whole[i];
      strides_[i] = sizes[i] == 1 ? 0 : stride;
      stride *= sizes[i];
    }
    size_ = stride;
  }

  int64_t size() const { return size_; }

  // Which of this operand's matrices goes into result `at`.
  int64_t index(int64_t at) const {
    int64_t found = 0;
    for (size_t i = count_; i-- > 0; at /= whole_[i]) found += at % whole_[i] * strides_[i];
    return found;
  }

  static constexpr size_t kMostAxes = 8;

 private:
  size_t count_;
  int64_t size_ = 1, whole_[kMostAxes], strides_[kMostAxes];
};

ffi::Error matmul_call(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer w, ffi::Result<ffi::AnyBuffer> y,
                       int64_t level, int64_t threads) {
  const auto xs = x.dimensions(), ws = w.dimensions(), ys = y->dimensions();
  if (xs.size() < 2 || ws.size() != xs.size() || ys.size() != xs.size() || xs.size() > Batch::kMostAxes)
    return wrong("matmul takes x [..., m, k], w [..., n, k] and y [..., m, n] with equally many axes");
  const size_t last = xs.size() - 1;
  const int64_t m = xs[last - 1], n = ws[last - 1], k = xs[last];
  if (ws[last] != k || ys[last - 1] != m || ys[last] != n) return wrong("matmul's shapes do not fit");
  if (!known(x) || !known(w) || !known(*y)) return wrong("matmul is for f32 and bf16");

  Team team(pool, threads);
  Matmul a{x.untyped_data(), w.untyped_data(), y->untyped_data(), type(x), type(w), type(*y), m, n, k};
  const Batch xb(xs, ys), wb(ws, ys), yb(ys, ys);
  if (wb.size() == 1) {  // rows are rows, however many axes they come in
    a.m = m * xb.size();
    matmul(a, static_cast<int>(level), team);
    return ffi::Error::Success();
  }
  for (int64_t i = 0; i < yb.size(); ++i) {
    Matmul one = a;
    one.x = static_cast<const char*>(a.x) + xb.index(i) * m * k * bytes(a.x_type);
    one.w = static_cast<const char*>(a.w) + wb.index(i) * n * k * bytes(a.w_type);
    one.y = static_cast<char*>(a.y) + i * m * n * bytes(a.y_type);
    matmul(one, static_cast<int>(level), team);
  }
  return ffi::Error::Success();
}

ffi::Error gated_call(ffi::ThreadPool pool, ffi::Buffer<ffi::BF16> x, ffi::Buffer<ffi::BF16> gate,
                      ffi::Buffer<ffi::BF16> up, ffi::Result<ffi::Buffer<ffi::BF16>> y, int64_t activation,
                      int64_t threads) {
  const auto xs = x.dimensions(), ws = gate.dimensions(), us = up.dimensions();
  if (xs.size() != 2 || ws.size() != 2 || us.size() != 2 || ws[0] != us[0] || ws[1] != us[1] || xs[1] != ws[1] ||
      static_cast<int64_t>(y->element_count()) != xs[0] * ws[0])
    return wrong("gated takes x [m, k], gate and up [n, k] and y [m, n]");
  if (best_level() != Level::kAmx) return wrong("gated needs a processor with AMX");
  Team team(pool, threads);
  const Matmul a{x.untyped_data(), gate.untyped_data(), y->untyped_data(), Type::kBF16, Type::kBF16, Type::kBF16,
                 xs[0], ws[0], xs[1]};
  gated(a, up.untyped_data(), static_cast<Activation>(activation), team);
  return ffi::Error::Success();
}

ffi::Error attend_call(ffi::ThreadPool pool, ffi::AnyBuffer q, ffi::AnyBuffer k, ffi::AnyBuffer v,
                       ffi::Buffer<ffi::PRED> mask, ffi::Buffer<ffi::F32> sinks, ffi::Result<ffi::AnyBuffer> y,
                       float scale, float softcap, int64_t level, int64_t threads) {
  const auto qs = q.dimensions(), ks = k.dimensions(), vs = v.dimensions(), ms = mask.dimensions();
  if (qs.size() != 5 || ks.size() != 4 || vs.size() != 4 || ms.size() != 3)
    return wrong("attend takes q [b, t, heads, group, h], k and v [b, heads, s, h] and mask [b, t, s]");
  const int64_t b = qs[0], t = qs[1], heads = qs[2], group = qs[3], h = qs[4], s = ks[2];
  const bool cache_fits = ks[0] == b && ks[1] == heads && ks[3] == h && v.element_count() == k.element_count();
  if (!cache_fits || ms[0] != b || ms[1] != t || ms[2] != s || y->element_count() != q.element_count())
    return wrong("attend's shapes do not fit");
  const auto count = static_cast<int64_t>(sinks.element_count());
  if (count != 0 && count != heads * group) return wrong("attend takes sinks [heads, group] or none");
  if (!known(q) || type(k) != type(q) || type(v) != type(q) || type(*y) != type(q))
    return wrong("attend is for f32 or bf16, one type throughout");

  Team team(pool, threads);
  const Attention a{q.untyped_data(), k.untyped_data(), v.untyped_data(),
                    reinterpret_cast<const uint8_t*>(mask.typed_data()), count ? sinks.typed_data() : nullptr,
                    y->untyped_data(), type(q) == Type::kBF16, b, t, heads, group, s, h, scale, softcap};
  attend(a, static_cast<int>(level), team);
  return ffi::Error::Success();
}

// Rows of x [b, t, heads, h] to their slots i32 [b, t] of a cache [b, heads, s, h]; other slots stay. A slot that
// the cache does not have is dropped.
ffi::Error put_call(ffi::AnyBuffer cache, ffi::AnyBuffer x, ffi::Buffer<ffi::S32> slot,
                    ffi::Result<ffi::AnyBuffer> y) {
  const auto cs = cache.dimensions(), xs = x.dimensions(), ss = slot.dimensions();
  if (cs.size() != 4 || xs.size() != 4 || ss.size() != 2 || cs[0] != xs[0] || cs[1] != xs[2] || cs[3] != xs[3] ||
      ss[0] != xs[0] || ss[1] != xs[1] || x.element_type() != cache.element_type() ||
      y->size_bytes() != cache.size_bytes())
    return wrong("put takes a cache [b, heads, s, h], x [b, t, heads, h] of its type and slots [b, t]");
  const int64_t b = xs[0], t = xs[1], heads = xs[2], s = cs[2];
  if (cache.element_count() == 0 || x.element_count() == 0) return ffi::Error::Success();
  const size_t row = x.size_bytes() / static_cast<size_t>(b * t * heads);
  char* to = static_cast<char*>(y->untyped_data());
  const char* from = static_cast<const char*>(x.untyped_data());
  // XLA gives the cache's own memory for the result where nobody else needs the old cache.
  if (to != cache.untyped_data()) std::memcpy(to, cache.untyped_data(), cache.size_bytes());
  for (int64_t i = 0; i < b * t; ++i) {
    const int64_t at = slot.typed_data()[i];
    if (at < 0 || at >= s) continue;
    for (int64_t head = 0; head < heads; ++head)
      std::memcpy(to + static_cast<size_t>((i / t * heads + head) * s + at) * row,
                  from + static_cast<size_t>(i * heads + head) * row, row);
  }
  return ffi::Error::Success();
}

// The values as they are, in memory of their own: XLA joins nothing across a call.
ffi::Error keep_call(ffi::AnyBuffer x, ffi::Result<ffi::AnyBuffer> y) {
  if (y->size_bytes() != x.size_bytes()) return wrong("keep gives an array of the size it takes");
  if (y->untyped_data() != x.untyped_data()) std::memcpy(y->untyped_data(), x.untyped_data(), x.size_bytes());
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jaxllm

#pragma GCC visibility push(default)

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxllm_matmul, jaxllm::matmul_call,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Attr<int64_t>("level")
                                  .Attr<int64_t>("threads"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxllm_gated, jaxllm::gated_call,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::BF16>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::BF16>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::BF16>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::BF16>>()
                                  .Attr<int64_t>("activation")
                                  .Attr<int64_t>("threads"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxllm_attend, jaxllm::attend_call,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::PRED>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Attr<float>("scale")
                                  .Attr<float>("softcap")
                                  .Attr<int64_t>("level")
                                  .Attr<int64_t>("threads"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxllm_put, jaxllm::put_call,
                              xla::ffi::Ffi::Bind()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Ret<xla::ffi::AnyBuffer>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxllm_keep, jaxllm::keep_call,
                              xla::ffi::Ffi::Bind().Arg<xla::ffi::AnyBuffer>().Ret<xla::ffi::AnyBuffer>());

// The number of a Level.
extern "C" int jaxllm_best_level() { return static_cast<int>(jaxllm::best_level()); }

// What Python and this library agree on; to be raised with every change of a function's arguments.
extern "C" int jaxllm_interface() { return 3; }

#pragma GCC visibility pop
