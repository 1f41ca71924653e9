// Working memory that a thread keeps from call to call: fresh pages cost more than the work done in them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>

namespace jaxllm {

// Memory of one thread for one purpose. It grows to the largest size asked for and is freed with the thread.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(data_); }

  // At least `count` values of T, aligned to a cache line, holding anything.
  template <typename T>
  T* get(int64_t count) {
    const size_t bytes = (static_cast<size_t>(count) * sizeof(T) + kLine - 1) / kLine * kLine;
    if (bytes > size_) grow(bytes);
    return static_cast<T*>(data_);
  }

 private:
  static constexpr size_t kLine = 64;

  void grow(size_t bytes) {
    std::free(data_);
    data_ = nullptr;
    size_ = 0;
    data_ = std::aligned_alloc(kLine, bytes);
    if (data_ == nullptr) throw std::bad_alloc();
    size_ = bytes;
  }

  void* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace jaxllm
