// Working memory that a thread keeps from call to call: fresh pages cost more than the work done in them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>

namespace jaxllm {

// Memory of one thread for one purpose. It grows to the largest size asked for and is freed with the thread. Where
// memory accesses are checked it is fresh and exactly as large as asked for at every call.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(data_); }

  // At least `count` values of T, aligned to a cache line, holding anything.
  template <typename T>
  T* get(int64_t count) {
    const size_t exact = static_cast<size_t>(count) * sizeof(T);
    const size_t bytes = kChecked ? exact : (exact + kLine - 1) / kLine * kLine;
    if (bytes > size_ || kChecked) grow(bytes);
    return static_cast<T*>(data_);
  }

 private:
  static constexpr size_t kLine = 64;
#if defined(__SANITIZE_ADDRESS__)
  static constexpr bool kChecked = true;
#else
  static constexpr bool kChecked = false;
#endif

  void grow(size_t bytes) {
    std::free(data_);
    data_ = nullptr;
    size_ = 0;
    if (posix_memalign(&data_, kLine, bytes) != 0) throw std::bad_alloc();
    size_ = bytes;
  }

  void* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace jaxllm
