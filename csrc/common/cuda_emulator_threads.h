// class Execution of the CUDA emulator, on std::threads. See cuda_emulator_execution.h, which
// includes this file.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <random>
#include <thread>
#include <utility>
#include <vector>

#include "csrc/common/cuda_emulator_execution.h"

#if defined(SPECULATORS_EMULATOR_THREADS)

#if defined(SPECULATORS_EMULATOR_TSAN)
extern "C" {
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
void AnnotateIgnoreSyncBegin(const char* file, int line);
void AnnotateIgnoreSyncEnd(const char* file, int line);
}
#endif

namespace speculators::emulator {

// The emulator's own mutex would order every two threads that pass any barrier, although CUDA
// orders only those that meet at the same one, and real races would go unseen. Therefore it is
// hidden from ThreadSanitizer; publish and observe then tell it exactly what a barrier orders.
class HiddenSynchronisation {
 public:
#if defined(SPECULATORS_EMULATOR_TSAN)
  HiddenSynchronisation() { AnnotateIgnoreSyncBegin(__FILE__, __LINE__); }
  ~HiddenSynchronisation() { AnnotateIgnoreSyncEnd(__FILE__, __LINE__); }
#else
  HiddenSynchronisation() {}
  ~HiddenSynchronisation() {}
#endif
  HiddenSynchronisation(const HiddenSynchronisation&) = delete;
  HiddenSynchronisation& operator=(const HiddenSynchronisation&) = delete;
};

// What the mutex guards looks unguarded once the mutex is hidden, so it is hidden too.
class HiddenAccesses {
 public:
#if defined(SPECULATORS_EMULATOR_TSAN)
  HiddenAccesses() {
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  }
  ~HiddenAccesses() {
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
  }
#else
  HiddenAccesses() {}
  ~HiddenAccesses() {}
#endif
  HiddenAccesses(const HiddenAccesses&) = delete;
  HiddenAccesses& operator=(const HiddenAccesses&) = delete;
};

// Holds the mutex. It and what it guards are hidden meanwhile; publish and observe are not.
class HiddenLock {
 public:
  explicit HiddenLock(std::mutex& mutex) : held_(mutex, std::defer_lock) {
    const HiddenSynchronisation hidden;
    held_.lock();
  }
  ~HiddenLock() {
    const HiddenSynchronisation hidden;
    held_.unlock();
  }
  HiddenLock(const HiddenLock&) = delete;
  HiddenLock& operator=(const HiddenLock&) = delete;

  template <typename Condition>
  void wait(std::condition_variable& wake, Condition condition) {
    const HiddenSynchronisation hidden;
    wake.wait(held_, condition);
  }

  // Returns false if the condition does not hold after that time.
  template <typename Condition>
  bool wait_for(std::condition_variable& wake, std::chrono::microseconds time,
                Condition condition) {
    const HiddenSynchronisation hidden;
    // The system clock, because GCC's ThreadSanitizer knows the wait that it uses.
    return wake.wait_until(held_, std::chrono::system_clock::now() + time, condition);
  }

 private:
  const HiddenAccesses hidden_accesses_;
  std::unique_lock<std::mutex> held_;
};

// Threads that live as long as the process and run one block after the other: starting a thread
// takes far longer than most blocks run, above all under ThreadSanitizer.
class ThreadPool {
 public:
  ThreadPool() = default;
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  ~ThreadPool() {
    for (const auto& worker : workers_) {
      {
        const HiddenLock lock(mutex_);
        worker->leave = true;
        worker->wake.notify_one();
      }
      worker->thread.join();
    }
  }

  // Calls body(i) for every i of the order, each on a thread of its own; returns after the last.
  void run(const std::vector<unsigned>& order, const std::function<void(unsigned)>& body) {
    while (workers_.size() < order.size()) {
      Worker& worker = *workers_.emplace_back(std::make_unique<Worker>());
      worker.thread = std::thread([this, &worker] { work(worker); });
    }
    publish(&start_);
    {
      HiddenLock lock(mutex_);
      unfinished_ = order.size();
      for (std::size_t i = 0; i < order.size(); ++i) {
        workers_[i]->index = order[i];
        workers_[i]->body = &body;
        workers_[i]->wake.notify_one();
      }
      lock.wait(finished_, [this] { return unfinished_ == 0; });
    }
    observe(&end_);
  }

 private:
  struct Worker {
    std::thread thread;
    std::condition_variable wake;
    const std::function<void(unsigned)>* body = nullptr;
    unsigned index = 0;
    bool leave = false;
  };

  void work(Worker& worker) {
    for (;;) {
      const std::function<void(unsigned)>* body = nullptr;
      unsigned index = 0;
      {
        HiddenLock lock(mutex_);
        lock.wait(worker.wake, [&worker] { return worker.leave || worker.body != nullptr; });
        if (worker.leave) return;
        body = std::exchange(worker.body, nullptr);
        index = worker.index;
      }
      observe(&start_);
      (*body)(index);
      publish(&end_);
      const HiddenLock lock(mutex_);
      if (--unfinished_ == 0) finished_.notify_one();
    }
  }

  std::mutex mutex_;
  std::condition_variable finished_;
  std::size_t unfinished_ = 0;
  std::vector<std::unique_ptr<Worker>> workers_;
  char start_ = 0;  // tokens for publish and observe: from the caller of run to the workers ...
  char end_ = 0;    // ... and back
};

inline ThreadPool thread_pool;

class Execution {
 public:
  using Lock = HiddenLock;

  Execution(unsigned thread_count, unsigned seed, const LaunchOptions& options)
      : schedule_(schedule_of(seed)),
        random_(seed),
        timeout_(std::int64_t(1e6 * options.barrier_timeout_seconds)) {
    for (unsigned i = 0; i < thread_count; ++i) waiters_.push_back(std::make_unique<Waiter>());
  }

  std::mutex& mutex() { return mutex_; }

  void run(const std::function<void(unsigned)>& body) {
    for (const auto& waiter : waiters_) waiter->ready = false;
    const auto count = static_cast<unsigned>(waiters_.size());
    thread_pool.run(make_order(count, schedule_, random_), body);
  }

  bool wait(Lock& lock, unsigned index) {
    Waiter& waiter = *waiters_[index];
    const bool ready = lock.wait_for(waiter.wake, timeout_, [&waiter] { return waiter.ready; });
    waiter.ready = false;
    return ready;
  }

  void make_ready(unsigned index) {
    waiters_[index]->ready = true;
    waiters_[index]->wake.notify_one();
  }

  void preempt(unsigned) {}  // the operating system does that

 private:
  struct Waiter {
    std::condition_variable wake;
    bool ready = false;
  };

  Schedule schedule_;
  std::mt19937 random_;
  std::chrono::microseconds timeout_;
  std::mutex mutex_;
  std::vector<std::unique_ptr<Waiter>> waiters_;
};

}  // namespace speculators::emulator

#endif  // defined(SPECULATORS_EMULATOR_THREADS)
