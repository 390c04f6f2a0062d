// class Execution of the CUDA emulator, on fibers (ucontext). See cuda_emulator_execution.h, which
// includes this file.
#pragma once

#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <queue>
#include <random>
#include <system_error>
#include <utility>
#include <vector>

#include "csrc/common/cuda_emulator_execution.h"
#include "csrc/common/cuda_emulator_memory.h"  // SPECULATORS_EMULATOR_ASAN

#if !defined(SPECULATORS_EMULATOR_THREADS)

#if defined(SPECULATORS_EMULATOR_ASAN)
extern "C" {
void __sanitizer_start_switch_fiber(void** fake_stack_save, const void* bottom, std::size_t size);
void __sanitizer_finish_switch_fiber(void* fake_stack, const void** old_bottom,
                                     std::size_t* old_size);
void __asan_unpoison_memory_region(const volatile void* address, std::size_t size);
}
#endif

namespace speculators::emulator {

// The stack of one fiber, with a page below it that must not be touched: a kernel whose local
// variables do not fit dies with a segmentation fault and spoils nothing.
class FiberStack {
 public:
  explicit FiberStack(std::size_t bytes) {
    page_ = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
    size_ = (bytes + page_ - 1) / page_ * page_;
    void* memory = mmap(nullptr, size_ + page_, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, page_, PROT_NONE) != 0) {
      throw std::system_error(errno, std::generic_category(),
                              "CUDA emulator: no memory for stacks");
    }
    memory_ = static_cast<char*>(memory);
  }
  FiberStack(FiberStack&& other) noexcept
      : memory_(std::exchange(other.memory_, nullptr)), size_(other.size_), page_(other.page_) {}
  FiberStack& operator=(FiberStack&&) = delete;
  ~FiberStack() {
    if (memory_ == nullptr) return;
    forget();
    munmap(memory_, size_ + page_);
  }

  char* bottom() const { return memory_ + page_; }
  std::size_t size() const { return size_; }

  // Makes the stack fit for another fiber. The last one never returned from its first function, so
  // AddressSanitizer still guards that frame.
  void forget() {
#if defined(SPECULATORS_EMULATOR_ASAN)
    __asan_unpoison_memory_region(bottom(), size());
#endif
  }

 private:
  char* memory_ = nullptr;
  std::size_t size_ = 0;
  std::size_t page_ = 0;
};

class Execution {
 public:
  Execution(unsigned thread_count, unsigned seed, const LaunchOptions& options)
      : schedule_(schedule_of(seed)), random_(seed) {
    fibers_.reserve(thread_count);
    for (unsigned i = 0; i < thread_count; ++i) {
      fibers_.push_back(Fiber{.stack = FiberStack(options.stack_bytes)});
    }
  }

  struct Mutex {};  // fibers take turns: there is nothing to guard
  class Lock {
   public:
    explicit Lock(Mutex) {}
    ~Lock() {}
    Lock(const Lock&) = delete;
    Lock& operator=(const Lock&) = delete;
  };
  Mutex mutex() { return {}; }

  void run(const std::function<void(unsigned)>& body) {
    body_ = &body;
    running_execution_ = this;
    const auto count = static_cast<unsigned>(fibers_.size());
    // Ranks of the warps and of the threads; the schedules that need none ignore them.
    warp_ranks_ = make_order((count + 31) / 32, Schedule::kRandom, random_);
    thread_ranks_ = make_order(count, Schedule::kRandom, random_);
    for (unsigned i = 0; i < count; ++i) {
      prepare(fibers_[i]);
      make_ready(i);
    }
    while (!ready_.empty()) {
      const unsigned index = ready_.top().second;
      ready_.pop();
      resume(index);
    }
  }

  bool wait(Lock&, unsigned index) {
    leave(fibers_[index], /*for_ever=*/false);
    return true;
  }

  void make_ready(unsigned index) { ready_.emplace(priority(index), index); }

  void preempt(unsigned index) {
    if (schedule_ != Schedule::kRandom || random_() % 2 == 0) return;
    make_ready(index);
    leave(fibers_[index], /*for_ever=*/false);
  }

 private:
  struct Fiber {
    FiberStack stack;
    ucontext_t context{};
    void* fake_stack = nullptr;  // AddressSanitizer's, while the fiber does not run
  };

  std::uint64_t priority(unsigned index) {
    switch (schedule_) {
      case Schedule::kForward:
        return ~std::uint64_t{index};
      case Schedule::kRandom:
        return random_();
      case Schedule::kWarpByWarp:
        return std::uint64_t{warp_ranks_[index / 32]} << 32 | random_();
      case Schedule::kThreadByThread:
        return thread_ranks_[index];
      case Schedule::kReverse:
        return index;
    }
    return 0;
  }

  void prepare(Fiber& fiber) {
    fiber.stack.forget();
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.bottom();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, &Execution::fiber_main, 0);
    // AddressSanitizer's swapcontext forgets all that it knows of the stack named here, at every
    // switch. makecontext has used it already; without it the fiber's frames stay guarded.
    fiber.context.uc_stack.ss_sp = nullptr;
    fiber.context.uc_stack.ss_size = 0;
  }

  static void fiber_main() {
    Execution& self = *running_execution_;
    finish_switch(nullptr, &self.scheduler_bottom_, &self.scheduler_size_);
    const unsigned index = self.current_;
    (*self.body_)(index);
    self.leave(self.fibers_[index], /*for_ever=*/true);
  }

  void resume(unsigned index) {
    Fiber& fiber = fibers_[index];
    current_ = index;
    start_switch(&scheduler_fake_stack_, fiber.stack.bottom(), fiber.stack.size());
    swapcontext(&scheduler_, &fiber.context);
    finish_switch(scheduler_fake_stack_, nullptr, nullptr);
  }

  void leave(Fiber& fiber, bool for_ever) {
    start_switch(for_ever ? nullptr : &fiber.fake_stack, scheduler_bottom_, scheduler_size_);
    swapcontext(&fiber.context, &scheduler_);
    finish_switch(fiber.fake_stack, &scheduler_bottom_, &scheduler_size_);
  }

  // AddressSanitizer must be told that another stack is in use from now on.
  static void start_switch([[maybe_unused]] void** fake_stack, [[maybe_unused]] const void* bottom,
                           [[maybe_unused]] std::size_t size) {
#if defined(SPECULATORS_EMULATOR_ASAN)
    __sanitizer_start_switch_fiber(fake_stack, bottom, size);
#endif
  }
  static void finish_switch([[maybe_unused]] void* fake_stack,
                            [[maybe_unused]] const void** old_bottom,
                            [[maybe_unused]] std::size_t* old_size) {
#if defined(SPECULATORS_EMULATOR_ASAN)
    __sanitizer_finish_switch_fiber(fake_stack, old_bottom, old_size);
#endif
  }

  static inline Execution* running_execution_ = nullptr;

  Schedule schedule_;
  std::mt19937 random_;
  std::vector<unsigned> warp_ranks_;
  std::vector<unsigned> thread_ranks_;
  const std::function<void(unsigned)>* body_ = nullptr;
  std::vector<Fiber> fibers_;
  std::priority_queue<std::pair<std::uint64_t, unsigned>> ready_;
  unsigned current_ = 0;
  ucontext_t scheduler_{};
  void* scheduler_fake_stack_ = nullptr;
  const void* scheduler_bottom_ = nullptr;
  std::size_t scheduler_size_ = 0;
};

}  // namespace speculators::emulator

#endif  // !defined(SPECULATORS_EMULATOR_THREADS)
