// Reading memory and nothing else: what the bandwidth of a machine is measured with.
#include <atomic>
#include <cstring>

#include "parallel.h"
#include "xla/ffi/api/ffi.h"

namespace jaxllm {
namespace {

namespace ffi = xla::ffi;

constexpr int64_t kPiece = 1 << 22;  // bytes a thread takes at a time: many pages, and few enough to share evenly
constexpr int64_t kLanes = 16;       // independent sums, so that loads do not wait for one another

uint64_t xor_of(const char* from, int64_t bytes) {
  uint64_t lanes[kLanes] = {}, x[kLanes];
  int64_t i = 0;
  for (; i + static_cast<int64_t>(sizeof x) <= bytes; i += sizeof x) {
    std::memcpy(x, from + i, sizeof x);
    for (int64_t j = 0; j < kLanes; ++j) lanes[j] ^= x[j];
  }
  for (; i < bytes; i += sizeof x[0]) {
    std::memcpy(x, from + i, sizeof x[0]);
    lanes[0] ^= x[0];
  }
  for (int64_t j = 1; j < kLanes; ++j) lanes[0] ^= lanes[j];
  return lanes[0];
}

ffi::Error read_call(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::Result<ffi::Buffer<ffi::U32>> y, int64_t threads) {
  const auto bytes = static_cast<int64_t>(x.size_bytes());
  if (bytes % 8 != 0 || y->element_count() != 2)
    return ffi::Error::InvalidArgument("jaxllm: read takes whole 8 bytes and gives u32 [2]");
  const char* from = static_cast<const char*>(x.untyped_data());
  std::atomic<uint64_t> found{0};
  Team(pool, threads).run((bytes + kPiece - 1) / kPiece, [&](int64_t i) {
    const int64_t left = bytes - i * kPiece;
    found.fetch_xor(xor_of(from + i * kPiece, left < kPiece ? left : kPiece), std::memory_order_relaxed);
  });
  const uint64_t all = found.load();
  std::memcpy(y->typed_data(), &all, sizeof all);
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jaxllm

#pragma GCC visibility push(default)

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxllm_read, jaxllm::read_call,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::U32>>()
                                  .Attr<int64_t>("threads"));

#pragma GCC visibility pop
