// Sharing work with XLA's own threads.
#pragma once

#include <array>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>

#include "xla/ffi/api/ffi.h"

namespace jaxllm {

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// One job in pieces. Whoever is free takes the next piece; the caller waits only for pieces that somebody is at
// work on, so a pool whose threads are all busy (or all callers themselves) delays nobody.
class Job {
 public:
  explicit Job(int64_t pieces) : pieces_(pieces) {}

  template <typename F>
  void work(const F& piece) {
    int64_t finished = 0;
    for (int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < pieces_; ++finished) piece(i);
    if (finished == 0 || done_.fetch_add(finished, std::memory_order_acq_rel) + finished < pieces_) return;
    std::lock_guard<std::mutex> lock(mutex_);
    all_done_.notify_one();
  }

  void wait() {
    for (int spin = 0; spin < kSpins; ++spin) {
      if (finished()) return;
      pause();
    }
    std::unique_lock<std::mutex> lock(mutex_);
    all_done_.wait(lock, [this] { return finished(); });
  }

 private:
  static constexpr int kSpins = 2000;  // some 30 microseconds: less than a sleep and a wake cost

  bool finished() const { return done_.load(std::memory_order_acquire) == pieces_; }

  const int64_t pieces_;
  std::atomic<int64_t> next_{0}, done_{0};
  std::mutex mutex_;
  std::condition_variable all_done_;
};

// Where helpers wait a little for the next kernel's work when they are done with the last one's: between two kernels
// of a layer lies less time than a sleep and a wake take. They give way to whoever else wants the core.
class Seats {
 public:
  using Task = std::function<void()>;

  // Gives a task to a helper that waits; false where none does.
  static bool hand(Task& task) {
    for (Seat& seat : seats()) {
      int state = kWaiting;
      if (seat.state.load(std::memory_order_relaxed) != kWaiting ||
          !seat.state.compare_exchange_strong(state, kClaimed, std::memory_order_acquire))
        continue;
      seat.task = std::move(task);
      seat.state.store(kGiven, std::memory_order_release);
      return true;
    }
    return false;
  }

  // Works at what is handed to it until nothing has been for a while.
  static void wait() {
    Seat* seat = take();
    if (seat == nullptr) return;
    while (given(*seat)) {
      Task task = std::move(seat->task);
      seat->task = nullptr;
      task();
      task = nullptr;
      seat->state.store(kWaiting, std::memory_order_release);
    }
  }

 private:
  static constexpr auto kLinger = std::chrono::microseconds(100);
  enum State : int { kEmpty, kWaiting, kClaimed, kGiven };
  struct alignas(64) Seat {
    std::atomic<int> state{kEmpty};
    Task task;
  };

  static std::array<Seat, 64>& seats() {
    static auto* all = new std::array<Seat, 64>;  // never destroyed: threads outlive main
    return *all;
  }

  static Seat* take() {
    for (Seat& seat : seats()) {
      int state = kEmpty;
      if (seat.state.compare_exchange_strong(state, kWaiting, std::memory_order_acq_rel)) return &seat;
    }
    return nullptr;
  }

  // Whether a task came before the time was over; if not, the seat is empty.
  static bool given(Seat& seat) {
    const auto until = std::chrono::steady_clock::now() + kLinger;
    for (int spin = 1;; ++spin) {
      int state = seat.state.load(std::memory_order_acquire);
      if (state == kGiven) return true;
      pause();
      if (spin % 16 != 0) continue;
      std::this_thread::yield();
      if (state == kWaiting && std::chrono::steady_clock::now() > until &&
          seat.state.compare_exchange_strong(state, kEmpty, std::memory_order_acq_rel))
        return false;
    }
  }
};

// The threads a kernel may use: the caller and XLA's pool.
class Team {
 public:
  Team(xla::ffi::ThreadPool pool, int64_t most) : pool_(pool), size_(pool.num_threads()) {
    if (most > 0 && most < size_) size_ = most;
    if (size_ < 1) size_ = 1;
  }

  int64_t size() const { return size_; }

  // piece(i) for every i < pieces, in any order and on any of the threads; returns when all are done.
  template <typename F>
  void run(int64_t pieces, const F& piece) {
    const int64_t helpers = (pieces < size_ ? pieces : size_) - 1;
    if (helpers < 1) {
      for (int64_t i = 0; i < pieces; ++i) piece(i);
      return;
    }
    auto job = std::make_shared<Job>(pieces);
    // A helper that starts late finds no piece left and never touches `piece`, which may be gone by then.
    for (int64_t i = 0; i < helpers; ++i) {
      Seats::Task task = [job, &piece] { job->work(piece); };
      if (Seats::hand(task)) continue;
      // Where the cores are busy, helpers come late. One that finds no work left waits for the next kernel's, so
      // no more of them are called than could work at once: each would linger, in the way of whatever comes then.
      if (coming().load(std::memory_order_relaxed) >= helpers) continue;
      coming().fetch_add(1, std::memory_order_relaxed);
      pool_.Schedule([task] {
        coming().fetch_sub(1, std::memory_order_relaxed);
        task();
        Seats::wait();
      });
    }
    job->work(piece);
    job->wait();
  }

 private:
  // Helpers that were called and have not begun.
  static std::atomic<int64_t>& coming() {
    static auto* count = new std::atomic<int64_t>{0};
    return *count;
  }

  xla::ffi::ThreadPool pool_;
  int64_t size_;
};

}  // namespace jaxllm
