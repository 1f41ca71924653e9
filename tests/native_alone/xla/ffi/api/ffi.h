// Stands in for XLA's header where the kernels run without XLA: a pool of threads is all they take from it.
#pragma once

#include <cstdint>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

namespace xla::ffi {

// Every task has a thread of its own, which ends with the pool's last copy.
class ThreadPool {
 public:
  explicit ThreadPool(int64_t size) : size_(size), threads_(std::make_shared<Threads>()) {}

  int64_t num_threads() const { return size_; }

  template <typename F>
  void Schedule(F&& task) {
    threads_->all.emplace_back(std::forward<F>(task));
  }

 private:
  struct Threads {
    std::vector<std::thread> all;
    ~Threads() {
      for (std::thread& t : all) t.join();
    }
  };

  int64_t size_;
  std::shared_ptr<Threads> threads_;
};

}  // namespace xla::ffi
