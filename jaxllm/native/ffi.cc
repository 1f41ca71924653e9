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

bool known(ffi::AnyBuffer b) {
  return b.element_type() == ffi::F32 || b.element_type() == ffi::BF16 || b.element_type() == ffi::F16;
}
Type type(ffi::AnyBuffer b) {
  return b.element_type() == ffi::F32 ? Type::kF32 : b.element_type() == ffi::BF16 ? Type::kBF16 : Type::kF16;
}

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
  if (!known(x) || !known(w) || !known(*y)) return wrong("matmul is for f32, bf16 and f16");

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
                      int64_t level, int64_t threads) {
  const auto xs = x.dimensions(), ws = gate.dimensions(), us = up.dimensions();
  if (xs.size() != 2 || ws.size() != 2 || us.size() != 2 || ws[0] != us[0] || ws[1] != us[1] || xs[1] != ws[1] ||
      static_cast<int64_t>(y->element_count()) != xs[0] * ws[0])
    return wrong("gated takes x [m, k], gate and up [n, k] and y [m, n]");
  const int most = static_cast<int>(level);
  if (!multiplies_bf16(most)) return wrong("gated needs AVX-512 with BF16");
  Team team(pool, threads);
  const Matmul a{x.untyped_data(), gate.untyped_data(), y->untyped_data(), Type::kBF16, Type::kBF16, Type::kBF16,
                 xs[0], ws[0], xs[1]};
  gated(a, up.untyped_data(), static_cast<Activation>(activation), most, team);
  return ffi::Error::Success();
}

// A cache [b, heads, s, h] of `like`'s type, or its codes with scales [b, heads, s, groups]; h 0: it is neither.
Cache cache(ffi::AnyBuffer codes, ffi::AnyBuffer scales, ffi::AnyBuffer like, Held held) {
  const auto cs = codes.dimensions(), ss = scales.dimensions();
  const Cache none{nullptr, nullptr, held, 0, 0};
  if (cs.size() != 4) return none;
  if (held == Held::kPlain) {
    if (codes.element_type() != like.element_type()) return none;
    return {codes.untyped_data(), nullptr, held, cs[3], 0};
  }
  const auto code = held == Held::kInt8 ? ffi::S8 : ffi::U8, scale = held == Held::kInt4 ? ffi::BF16 : ffi::F32;
  if (codes.element_type() != code || scales.element_type() != scale || ss.size() != 4) return none;
  const int64_t h = cs[3] * (held == Held::kInt4 ? 2 : 1);
  const bool fits = ss[0] == cs[0] && ss[1] == cs[1] && ss[2] == cs[2] && ss[3] > 0 && h % ss[3] == 0;
  return fits ? Cache{codes.untyped_data(), scales.untyped_data(), held, h, ss[3]} : none;
}

// Strides of a bias [b, heads, t, group, s] whose axes may be 1; false where it has another shape.
bool bias_strides(ffi::Span<const int64_t> sizes, const Attention& a, int64_t strides[5]) {
  const int64_t whole[5] = {a.b, a.heads, a.t, a.group, a.s};
  if (sizes.size() != 5) return false;
  int64_t stride = 1;
  for (int i = 5; i-- > 0; stride *= sizes[i]) {
    if (sizes[i] != 1 && sizes[i] != whole[i]) return false;
    strides[i] = sizes[i] == 1 ? 0 : stride;
  }
  return true;
}

ffi::Error attend_call(ffi::ThreadPool pool, ffi::AnyBuffer q, ffi::AnyBuffer k, ffi::AnyBuffer v,
                       ffi::Buffer<ffi::PRED> mask, ffi::Buffer<ffi::F32> sinks, ffi::Buffer<ffi::F32> bias,
                       ffi::Buffer<ffi::F32> slopes, ffi::AnyBuffer k_scales, ffi::AnyBuffer v_scales,
                       ffi::Result<ffi::AnyBuffer> y, float scale, float softcap, int64_t held, int64_t level,
                       int64_t threads) {
  const auto qs = q.dimensions(), ks = k.dimensions(), vs = v.dimensions(), ms = mask.dimensions();
  if (qs.size() != 5 || ks.size() != 4 || vs.size() != 4 || ms.size() != 3)
    return wrong("attend takes q [b, t, heads, group, h], k and v [b, heads, s, h] and mask [b, t, s]");
  if (!known(q) || y->element_type() != q.element_type()) return wrong("attend is for f32, bf16 and f16");
  const Held as = static_cast<Held>(held);
  Attention a{q.untyped_data(), cache(k, k_scales, q, as), cache(v, v_scales, q, as),
              reinterpret_cast<const uint8_t*>(mask.typed_data()), nullptr, nullptr, nullptr, {}, y->untyped_data(),
              type(q), qs[0], qs[1], qs[2], qs[3], ks[2], scale, softcap};
  const bool caches_fit = ks[0] == a.b && ks[1] == a.heads && vs[0] == a.b && vs[1] == a.heads && vs[2] == a.s;
  if (!caches_fit || a.k.h != qs[4] || (a.v.h == 0 && v.element_count() > 0))
    return wrong("attend's caches have another shape, type or format");
  const auto rows = static_cast<size_t>(a.b * a.t * a.heads * a.group);
  if (ms[0] != a.b || ms[1] != a.t || ms[2] != a.s || y->element_count() != rows * static_cast<size_t>(a.v.h))
    return wrong("attend's shapes do not fit");
  const auto each = static_cast<size_t>(a.heads * a.group);
  if ((sinks.element_count() != 0 && sinks.element_count() != each) ||
      (slopes.element_count() != 0 && slopes.element_count() != each))
    return wrong("attend takes sinks and slopes [heads, group] or none");
  if (sinks.element_count() != 0) a.sinks = sinks.typed_data();
  if (slopes.element_count() != 0) a.slopes = slopes.typed_data();
  if (bias.element_count() != 0) a.bias = bias.typed_data();
  if (a.bias != nullptr && !bias_strides(bias.dimensions(), a, a.bias_stride))
    return wrong("attend takes a bias [b, heads, t, group, s], whose axes may be 1, or none");

  Team team(pool, threads);
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

// Rows of w [..., v, d] by their numbers [..., n, 1]; of one that w does not have, every number is a NaN.
ffi::Error rows_call(ffi::AnyBuffer w, ffi::Buffer<ffi::S32> number, ffi::Result<ffi::AnyBuffer> y) {
  const auto ws = w.dimensions(), ns = number.dimensions(), ys = y->dimensions();
  if (ws.size() < 2 || ns.size() != ws.size() || ys.size() != ws.size() || ws.size() > Batch::kMostAxes)
    return wrong("rows takes w [..., v, d], numbers [..., n, 1] and y [..., n, d] with equally many axes");
  const size_t last = ws.size() - 1;
  const int64_t v = ws[last - 1], d = ws[last], n = ns[last - 1];
  if (ns[last] != 1 || ys[last - 1] != n || ys[last] != d) return wrong("rows's shapes do not fit");
  if (!known(w) || y->element_type() != w.element_type()) return wrong("rows is for f32, bf16 and f16");
  const Batch wb(ws, ys), nb(ns, ys), yb(ys, ys);
  const size_t row = static_cast<size_t>(d * bytes(type(w)));
  const auto* from = static_cast<const char*>(w.untyped_data());
  auto* to = static_cast<char*>(y->untyped_data());
  for (int64_t i = 0; i < yb.size(); ++i)
    for (int64_t j = 0; j < n; ++j, to += row) {
      const int64_t at = number.typed_data()[nb.index(i) * n + j];
      // Ones in all bits are a NaN of each of these types.
      if (at < 0 || at >= v)
        std::memset(to, 0xff, row);
      else
        std::memcpy(to, from + static_cast<size_t>(wb.index(i) * v + at) * row, row);
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
                                  .Attr<int64_t>("level")
                                  .Attr<int64_t>("threads"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxllm_attend, jaxllm::attend_call,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::PRED>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Attr<float>("scale")
                                  .Attr<float>("softcap")
                                  .Attr<int64_t>("held")
                                  .Attr<int64_t>("level")
                                  .Attr<int64_t>("threads"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxllm_put, jaxllm::put_call,
                              xla::ffi::Ffi::Bind()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Ret<xla::ffi::AnyBuffer>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxllm_rows, jaxllm::rows_call,
                              xla::ffi::Ffi::Bind()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Ret<xla::ffi::AnyBuffer>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxllm_keep, jaxllm::keep_call,
                              xla::ffi::Ffi::Bind().Arg<xla::ffi::AnyBuffer>().Ret<xla::ffi::AnyBuffer>());

// The number of a Level.
extern "C" int jaxllm_best_level() { return static_cast<int>(jaxllm::best_level()); }

// What Python and this library agree on; to be raised with every change of a function's arguments.
extern "C" int jaxllm_interface() { return 8; }

#pragma GCC visibility pop
