// Threads that share out numbered pieces of work. Whoever is free takes the next piece, so a thread whose core is taken by another
// process delays one piece and nothing else: nobody waits for a thread that has not begun.
#pragma once
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#include <type_traits>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace headstart {

inline void relax() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  __asm__ __volatile__("isb");
#endif
}

class Pool {
 public:
  using Piece = void (*)(void* context, int64_t piece);

  // How many threads work on a job, the caller included. Results do not depend on it.
  void resize(int64_t threads) { wanted_.store(static_cast<int>(threads < 1 ? 1 : threads > kMost ? kMost : threads)); }

  int size() const { return wanted_.load(std::memory_order_relaxed); }

  // Run pieces 0 to `pieces` - 1, in any order, and return when all are done. A piece must not throw, and may run others in turn.
  template <class F>
  void run(int64_t pieces, F& piece) {
    using Body = std::remove_reference_t<F>;
    run(pieces, [](void* context, int64_t number) { (*static_cast<Body*>(context))(number); }, &piece);
  }

  void run(int64_t pieces, Piece piece, void* context) {
    bool is_shared = size() > 1 && pieces > 1 && pieces <= static_cast<int64_t>(kField) && !busy_.exchange(true, std::memory_order_acquire);
    if (!is_shared) {  // few pieces, or another thread's job is running: this thread does its own alone
      for (int64_t number = 0; number < pieces; number++) piece(context, number);
      return;
    }
    start(size() - 1);
    done_.store(0, std::memory_order_relaxed);
    piece_.store(piece, std::memory_order_relaxed);
    context_.store(context, std::memory_order_relaxed);
    job_ = (job_ + 1) & ((1u << 24) - 1);
    ticket_.store(ticket(job_, pieces));
    if (sleeping_.load() > 0) {
      std::lock_guard<std::mutex> lock(mutex_);
      wake_.notify_all();
    }
    work();
    await(pieces);
    busy_.store(false, std::memory_order_release);
  }

  // A forked child has none of its parent's threads. They are started again where they are needed. A job that another thread of the
  // parent was running is dropped: its caller is not in the child.
  void forget_threads() {
    started_ = 0;
    ticket_.store(ticket(job_, 0));
    busy_.store(false);
    waiting_.store(false);
    sleeping_.store(0);
    new (&mutex_) std::mutex;
    new (&wake_) std::condition_variable;
    new (&finish_) std::condition_variable;
  }

 private:
  static constexpr int kMost = 256;
  static constexpr auto kSpin = std::chrono::microseconds(150);    // of a thread without work, before it sleeps
  static constexpr auto kPatience = std::chrono::microseconds(40);  // of the caller, before it gives its core to a late thread

  // A ticket is the number of the job, the number of its pieces, and the next piece: 24, 20 and 20 bits.
  static constexpr uint64_t kField = (1u << 20) - 1;
  static uint64_t ticket(uint64_t job, uint64_t pieces) { return job << 40 | pieces << 20; }
  static bool has_work(uint64_t ticket) { return (ticket & kField) < (ticket >> 20 & kField); }

  // Take pieces until none is left.
  void work() {
    uint64_t seen = ticket_.load(std::memory_order_acquire);
    while (has_work(seen)) {
      Piece piece = piece_.load(std::memory_order_relaxed);
      void* context = context_.load(std::memory_order_relaxed);
      // Where this succeeds, the job that the two belong to still has this piece to do.
      if (!ticket_.compare_exchange_weak(seen, seen + 1, std::memory_order_acq_rel, std::memory_order_acquire)) continue;
      piece(context, seen & kField);
      int64_t pieces = seen >> 20 & kField;
      if (done_.fetch_add(1) + 1 == pieces && waiting_.load()) {
        std::lock_guard<std::mutex> lock(mutex_);
        finish_.notify_all();
      }
      seen = ticket_.load(std::memory_order_acquire);
    }
  }

  void await(int64_t pieces) {
    if (spin(kPatience, [&] { return done_.load(std::memory_order_acquire) == pieces; })) return;
    std::unique_lock<std::mutex> lock(mutex_);
    waiting_.store(true);
    finish_.wait(lock, [&] { return done_.load() == pieces; });
    waiting_.store(false);
  }

  // Where the system gives no more threads, those that there are do the work.
  void start(int helpers) {
    try {
      for (; started_ < helpers; started_++) std::thread([this, index = started_] { help(index); }).detach();
    } catch (const std::system_error&) {
      resize(started_ + 1);
    }
  }

  void help(int index) {
    auto has_job = [&] { return has_work(ticket_.load()) && index + 1 < wanted_.load(std::memory_order_relaxed); };
    for (;;) {
      if (!spin(kSpin, has_job)) {
        std::unique_lock<std::mutex> lock(mutex_);
        sleeping_.fetch_add(1);
        wake_.wait(lock, has_job);
        sleeping_.fetch_sub(1);
      }
      work();
    }
  }

  template <class F>
  static bool spin(std::chrono::microseconds longest, F&& is_over) {
    auto end = std::chrono::steady_clock::now() + longest;
    do {
      for (int turn = 0; turn < 64; turn++) {
        if (is_over()) return true;
        relax();
      }
    } while (std::chrono::steady_clock::now() < end);
    return is_over();
  }

  std::atomic<uint64_t> ticket_{0};
  std::atomic<int64_t> done_{0};
  std::atomic<Piece> piece_{nullptr};
  std::atomic<void*> context_{nullptr};
  std::atomic<int> wanted_{1}, sleeping_{0};
  std::atomic<bool> busy_{false}, waiting_{false};
  uint64_t job_ = 0;  // this and the next one belong to the thread that set busy_
  int started_ = 0;
  std::mutex mutex_;
  std::condition_variable wake_, finish_;
};

extern Pool& pool;

}  // namespace headstart
