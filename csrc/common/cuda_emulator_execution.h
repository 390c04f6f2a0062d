// How the CUDA emulator runs the threads of one block "at the same time": class Execution.
//
// There are two implementations with the same interface. cuda_emulator_fibers.h gives each CUDA
// thread a fiber and decides after every barrier which runs next, so that a schedule is adversarial
// and can be repeated. With SPECULATORS_EMULATOR_THREADS, cuda_emulator_threads.h gives each a
// std::thread, so that ThreadSanitizer can see which accesses no barrier orders.
//
//   run(body)         calls body(i) for each thread i and returns when all are done
//   Lock(mutex())     what guards the caller's bookkeeping; held around wait and make_ready
//   wait(lock, i)     called on thread i: sleeps until make_ready(i); false if that takes too long
//   make_ready(i)     lets thread i go on, or makes its next wait return at once
//   preempt(i)        called on thread i without the lock: perhaps lets another thread run first
//   publish(token)    what this thread did so far is seen ...
//   observe(token)    ... by a thread that calls this later (for ThreadSanitizer; else no effect)
#pragma once

#include <algorithm>
#include <cstddef>
#include <numeric>
#include <random>
#include <vector>

#if defined(__SANITIZE_THREAD__)
#define SPECULATORS_EMULATOR_TSAN 1
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define SPECULATORS_EMULATOR_TSAN 1
#endif
#endif
#if defined(SPECULATORS_EMULATOR_TSAN) && !defined(SPECULATORS_EMULATOR_THREADS)
#error "ThreadSanitizer sees nothing in fibers: compile with -DSPECULATORS_EMULATOR_THREADS too."
#endif

#if defined(SPECULATORS_EMULATOR_TSAN)
extern "C" {
void __tsan_acquire(void* address);
void __tsan_release(void* address);
}
#endif

namespace speculators::emulator {

struct LaunchOptions {
  // Memory for the local variables of one CUDA thread (fibers only).
  std::size_t stack_bytes = 256 * 1024;
  // How long a thread waits at a barrier before the launch fails (std::threads only). Threads that
  // wait for each other are found at once; this is for those that loop for ever or are very slow.
  double barrier_timeout_seconds = 30;
};

// In which order threads that could run do run. Each finds other bugs; the seed chooses.
enum class Schedule {
  kForward,         // the lowest thread first, blocks in order: the easiest to follow
  kRandom,          // any thread next; also switches in the middle of work, at atomics
  kWarpByWarp,      // warps in a random order, each as far as it can go
  kThreadByThread,  // threads in a random order, each as far as it can go
  kReverse,         // the highest thread first, blocks from the last to the first
};

inline Schedule schedule_of(unsigned seed) { return static_cast<Schedule>(seed % 5); }

// The order in which the blocks of a grid, or the threads of a block, begin.
inline std::vector<unsigned> make_order(unsigned count, Schedule schedule, std::mt19937& random) {
  std::vector<unsigned> order(count);
  std::iota(order.begin(), order.end(), 0u);
  if (schedule == Schedule::kReverse) {
    std::reverse(order.begin(), order.end());
  } else if (schedule != Schedule::kForward) {
    std::shuffle(order.begin(), order.end(), random);
  }
  return order;
}

inline void publish([[maybe_unused]] void* token) {
#if defined(SPECULATORS_EMULATOR_TSAN)
  __tsan_release(token);
#endif
}

inline void observe([[maybe_unused]] void* token) {
#if defined(SPECULATORS_EMULATOR_TSAN)
  __tsan_acquire(token);
#endif
}

}  // namespace speculators::emulator

#if defined(SPECULATORS_EMULATOR_THREADS)
#include "csrc/common/cuda_emulator_threads.h"  // IWYU pragma: export
#else
#include "csrc/common/cuda_emulator_fibers.h"  // IWYU pragma: export
#endif
