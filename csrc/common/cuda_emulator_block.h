// One CUDA block under the emulator: its threads, the barriers at which they meet, what is an
// error, and launch(), which runs a grid of blocks one by one.
//
// A barrier is no object here. A waiting thread notes where it waits and for whom; the one that
// arrives last finds all the others waiting for the same thing, hands out the values that a shuffle
// or a vote exchanges, and lets everybody go on. What can never complete is noticed just as
// directly: nobody runs, and somebody waits.
#pragma once

#include <array>
#include <bit>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <exception>
#include <functional>
#include <map>
#include <optional>
#include <random>
#include <source_location>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "csrc/common/cuda_emulator_execution.h"
#include "csrc/common/cuda_emulator_memory.h"
#include "vector_types.h"  // dim3, uint3: from the CUDA toolkit, usable by a host compiler

namespace speculators::emulator {

// A kernel did what it must not do. The message names the block, the thread, the place in the
// source where there is one, and the seed with which the same launch fails again.
class KernelError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// Threads wait at barriers that can never complete.
class Deadlock : public KernelError {
 public:
  using KernelError::KernelError;
};

inline constexpr unsigned kWarpSize = 32;
using LaneValues = std::array<std::uint64_t, kWarpSize>;

inline std::string text(const char* operation, const std::source_location& where) {
  return std::string(operation) + " (" + where.file_name() + ":" + std::to_string(where.line()) +
         ")";
}

inline std::string text(const uint3& index) {
  return "(" + std::to_string(index.x) + "," + std::to_string(index.y) + "," +
         std::to_string(index.z) + ")";
}

inline std::string hexadecimal(std::uint32_t value) {
  char buffer[16];
  std::snprintf(buffer, sizeof buffer, "0x%08x", value);
  return buffer;
}

enum class Scope { kNone, kWarp, kBlock };

// What a thread waits for.
struct Wait {
  Scope scope = Scope::kNone;
  const char* operation = "";
  std::source_location where = {};
  std::uint32_t mask = 0;  // of lanes; for kWarp only

  // Threads must meet in the same call, not only in calls of the same kind: that is what CUDA
  // guarantees, and what finds a barrier in one branch that pairs up with one in another.
  bool same_place(const Wait& other) const {
    return where.line() == other.where.line() && where.column() == other.where.column() &&
           (where.file_name() == other.where.file_name() ||
            std::strcmp(where.file_name(), other.where.file_name()) == 0);
  }
};

struct ThreadState {
  unsigned linear_index = 0;
  uint3 index{};
  bool exited = false;
  Wait wait;
  std::uint64_t deposit = 0;  // what this thread brings to the barrier ...
  LaneValues lane_values{};   // ... what its warp's lanes brought, after it ...
  unsigned block_count = 0;   // ... or how many threads of the block brought a value other than 0
  char arrival = 0;           // Tokens for publish and observe: from each thread to the last one to
  char departure = 0;         // arrive, and from there to each thread.

  unsigned lane() const { return linear_index % kWarpSize; }
  unsigned warp() const { return linear_index / kWarpSize; }
};

class Block;
inline Block* current_block = nullptr;
#if defined(SPECULATORS_EMULATOR_THREADS)
inline thread_local ThreadState* current_thread = nullptr;
#else
inline ThreadState* current_thread = nullptr;
#endif

class Block {
 public:
  Block(dim3 grid, dim3 block, std::size_t dynamic_shared_bytes, unsigned seed,
        const LaunchOptions& options)
      : grid_dim_(grid),
        block_dim_(block),
        seed_(seed),
        thread_count_(block.x * block.y * block.z),
        threads_(thread_count_),
        dynamic_shared_(dynamic_shared_bytes),
        execution_(thread_count_, seed, options) {}

  // Runs the body once per thread; throws the first error once every thread is gone.
  void run(unsigned linear_block_index, const std::function<void()>& body);

  // Meets the lanes of the mask; returns what each of them brought, poison for the other lanes.
  const LaneValues& meet_warp(std::uint32_t mask, std::uint64_t deposit, const char* operation,
                              const std::source_location& where) {
    meet({Scope::kWarp, operation, where, mask}, deposit);
    return current_thread->lane_values;
  }

  // Meets all threads of the block; returns how many of them brought `true`.
  unsigned meet_block(bool predicate, const char* operation, const std::source_location& where) {
    meet({Scope::kBlock, operation, where, 0}, predicate ? 1 : 0);
    return current_thread->block_count;
  }

  // Perhaps lets another thread run: called where threads touch the same memory without a barrier.
  void preempt() {
    ThreadState& self = *current_thread;
    execution_.preempt(self.linear_index);
    current_thread = &self;
  }

  const dim3& grid_dim() const { return grid_dim_; }
  const dim3& block_dim() const { return block_dim_; }
  const uint3& block_index() const { return block_index_; }
  std::uint16_t poison() const { return poison_; }
  void* dynamic_shared() const {
    return dynamic_shared_.bytes() == 0 ? nullptr : dynamic_shared_.data();
  }
  void* fence_token() { return &fence_token_; }

 private:
  struct Unwind {};  // thrown to take a waiting thread off its stack after another one failed

  void run_thread(unsigned index, const std::function<void()>& body);
  void meet(const Wait& wait, std::uint64_t deposit);
  template <typename Action>
  void for_each_participant(const ThreadState& thread, Action action);
  bool complete(const ThreadState& thread);
  void release(const ThreadState& last);
  std::string mistake(const ThreadState& self);
  std::string warp_mistake(const ThreadState& self);
  std::string deadlock() const;
  void record_failure(std::string message, bool is_deadlock = false);

  std::string name(const ThreadState& thread) const {
    return "block " + text(block_index_) + ", thread " + text(thread.index);
  }

  dim3 grid_dim_;
  dim3 block_dim_;
  uint3 block_index_{};
  unsigned seed_;
  std::uint16_t poison_ = 0;
  unsigned thread_count_;
  std::vector<ThreadState> threads_;
  GuardedBuffer dynamic_shared_;
  Execution execution_;
  char fence_token_ = 0;

  // Under Execution::Lock, as is all of ThreadState but its index:
  unsigned running_ = 0;  // threads that neither wait nor have exited
  unsigned at_block_barrier_ = 0;
  Wait block_barrier_;  // where the first of those waits
  std::optional<std::string> failure_;
  bool failure_is_deadlock_ = false;
};

inline void Block::run(unsigned linear_block_index, const std::function<void()>& body) {
  const unsigned column = linear_block_index / grid_dim_.x;
  block_index_ = {linear_block_index % grid_dim_.x, column % grid_dim_.y, column / grid_dim_.y};
  poison_ = poison_pattern(seed_ + linear_block_index);
  dynamic_shared_.poison(poison_);
  SharedVariable::poison_all(poison_);
  running_ = thread_count_;
  at_block_barrier_ = 0;
  for (unsigned i = 0; i < thread_count_; ++i) {
    const unsigned row = i / block_dim_.x;
    threads_[i] = ThreadState();
    threads_[i].linear_index = i;
    threads_[i].index = {i % block_dim_.x, row % block_dim_.y, row / block_dim_.y};
  }
  execution_.run([this, &body](unsigned index) { run_thread(index, body); });

  const std::string seed_text = " [seed " + std::to_string(seed_) + "]";
  if (failure_ && failure_is_deadlock_) throw Deadlock(*failure_ + seed_text);
  if (failure_) throw KernelError(*failure_ + seed_text);
  if (dynamic_shared_.overrun()) {
    throw KernelError("block " + text(block_index_) + " wrote behind the end of its " +
                      std::to_string(dynamic_shared_.bytes()) + " bytes of dynamic shared memory" +
                      seed_text);
  }
  if (const char* variable = SharedVariable::find_overrun()) {
    throw KernelError("block " + text(block_index_) + " wrote behind the end of shared variable " +
                      variable + seed_text);
  }
}

inline void Block::run_thread(unsigned index, const std::function<void()>& body) {
  ThreadState& self = threads_[index];
  current_thread = &self;
  std::string error;
  try {
    body();
  } catch (const Unwind&) {
    // The error that caused this has been recorded.
  } catch (const std::exception& exception) {
    error = exception.what();
  } catch (...) {
    error = "an exception that is not a std::exception";
  }
  const Execution::Lock lock(execution_.mutex());
  self.exited = true;
  --running_;
  if (!error.empty()) record_failure(name(self) + ": " + error);
  if (!failure_ && running_ == 0) {
    const std::string stuck = deadlock();
    if (!stuck.empty()) record_failure(stuck, /*is_deadlock=*/true);
  }
}

inline void Block::meet(const Wait& wait, std::uint64_t deposit) {
  ThreadState& self = *current_thread;
  publish(&self.arrival);
  {
    Execution::Lock lock(execution_.mutex());
    if (failure_) throw Unwind();
    self.wait = wait;
    self.deposit = deposit;
    --running_;
    if (wait.scope == Scope::kBlock && at_block_barrier_++ == 0) block_barrier_ = wait;
    const std::string found = mistake(self);
    if (!found.empty()) {
      record_failure(name(self) + ": " + text(wait.operation, wait.where) + ": " + found);
    } else if (complete(self)) {
      release(self);
    } else if (running_ == 0) {
      record_failure(deadlock(), /*is_deadlock=*/true);
    }
    // The last to arrive waits too, although it need not: who goes on first is up to the schedule.
    if (!execution_.wait(lock, self.linear_index) && !failure_) {
      record_failure(name(self) + ": timed out in " + text(wait.operation, wait.where) + "; " +
                     std::to_string(running_) + " threads of the block still run");
      // At once, because if those threads never end nobody will see the exception.
      std::fprintf(stderr, "CUDA emulator: %s\n", failure_->c_str());
    }
    current_thread = &self;
    if (failure_) throw Unwind();
  }
  observe(&self.departure);
}

template <typename Action>
void Block::for_each_participant(const ThreadState& thread, Action action) {
  if (thread.wait.scope == Scope::kBlock) {
    for (ThreadState& other : threads_) action(other);
    return;
  }
  for (std::uint32_t mask = thread.wait.mask; mask != 0; mask &= mask - 1) {
    action(threads_[thread.warp() * kWarpSize + static_cast<unsigned>(std::countr_zero(mask))]);
  }
}

inline bool Block::complete(const ThreadState& thread) {
  if (thread.wait.scope == Scope::kBlock) return at_block_barrier_ == thread_count_;
  bool all_here = true;
  for_each_participant(thread, [&](const ThreadState& other) {
    all_here = all_here && other.wait.scope == Scope::kWarp && other.wait.mask == thread.wait.mask;
  });
  return all_here;
}

inline void Block::release(const ThreadState& last) {
  const ThreadState group = last;  // a copy, because `last` stops waiting below
  LaneValues lane_values;
  lane_values.fill(poison_bits(poison_));
  unsigned block_count = 0;
  for_each_participant(group, [&](ThreadState& thread) {
    observe(&thread.arrival);
    lane_values[thread.lane()] = thread.deposit;
    if (thread.deposit != 0) ++block_count;
  });
  if (group.wait.scope == Scope::kBlock) at_block_barrier_ = 0;
  for_each_participant(group, [&](ThreadState& thread) {
    thread.lane_values = lane_values;
    thread.block_count = block_count;
    thread.wait = Wait();
    ++running_;
    publish(&thread.departure);
    execution_.make_ready(thread.linear_index);
  });
}

// What is wrong with the barrier at which a thread has just arrived; empty if nothing is.
inline std::string Block::mistake(const ThreadState& self) {
  if (self.wait.scope == Scope::kWarp) return warp_mistake(self);
  if (self.wait.same_place(block_barrier_)) return "";
  return "other threads of the block wait in " +
         text(block_barrier_.operation, block_barrier_.where);
}

inline std::string Block::warp_mistake(const ThreadState& self) {
  const std::uint32_t mask = self.wait.mask;
  if ((mask >> self.lane() & 1) == 0) {
    return "the calling lane " + std::to_string(self.lane()) + " is not in mask " +
           hexadecimal(mask);
  }
  for (unsigned lane = 0; lane < kWarpSize; ++lane) {
    if ((mask >> lane & 1) == 0) continue;
    const auto names_lane = [&] {
      return "mask " + hexadecimal(mask) + " names lane " + std::to_string(lane);
    };
    const unsigned index = self.warp() * kWarpSize + lane;
    if (index >= thread_count_) {
      return names_lane() + ", which a block of " + std::to_string(thread_count_) +
             " threads does not have";
    }
    const ThreadState& other = threads_[index];
    if (other.exited) return names_lane() + ", whose thread has exited";
    // A lane that waits for others only may come here later; one that waits for this lane cannot.
    if (other.wait.scope != Scope::kWarp || (other.wait.mask >> self.lane() & 1) == 0) continue;
    if (other.wait.mask == mask && other.wait.same_place(self.wait)) continue;
    return names_lane() + ", which waits with mask " + hexadecimal(other.wait.mask) + " in " +
           text(other.wait.operation, other.wait.where);
  }
  return "";
}

// Who waits where, if anybody does.
inline std::string Block::deadlock() const {
  struct Group {
    unsigned count = 0;
    std::string first;
  };
  std::map<std::string, Group> groups;
  unsigned exited = 0;
  for (const ThreadState& thread : threads_) {
    if (thread.exited) ++exited;
    if (thread.wait.scope == Scope::kNone) continue;
    std::string place = text(thread.wait.operation, thread.wait.where);
    if (thread.wait.scope == Scope::kWarp) place += " with mask " + hexadecimal(thread.wait.mask);
    Group& group = groups[place];
    if (group.count++ == 0) group.first = text(thread.index);
  }
  if (groups.empty()) return "";
  std::string message = "block " + text(block_index_) + ": deadlock: " + std::to_string(exited) +
                        " of " + std::to_string(thread_count_) + " threads have exited";
  for (const auto& [place, group] : groups) {
    message += "; " + std::to_string(group.count) + " wait in " + place + ", the first is thread " +
               group.first;
  }
  return message;
}

inline void Block::record_failure(std::string message, bool is_deadlock) {
  if (failure_) return;
  failure_ = std::move(message);
  failure_is_deadlock_ = is_deadlock;
  for (ThreadState& thread : threads_) {
    if (thread.wait.scope == Scope::kNone) continue;
    thread.wait = Wait();
    ++running_;
    execution_.make_ready(thread.linear_index);
  }
}

// What the CUDA driver would refuse.
inline void check_launch(const dim3& grid, const dim3& block, std::size_t dynamic_shared_bytes) {
  const auto total = [](const dim3& d) { return std::uint64_t{d.x} * d.y * d.z; };
  const auto describe = [](const dim3& d) { return text(uint3{d.x, d.y, d.z}); };
  constexpr std::size_t kMostSharedBytes = 227 * 1024;  // of one block on sm_90
  if (total(grid) == 0 || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) {
    throw std::invalid_argument("launch: grid " + describe(grid) +
                                " must be at least 1 and at most (2^31-1,65535,65535)");
  }
  if (total(block) == 0 || total(block) > 1024 || block.z > 64) {
    throw std::invalid_argument("launch: block " + describe(block) +
                                " must have 1 to 1024 threads, at most 64 of them along z");
  }
  if (dynamic_shared_bytes > kMostSharedBytes) {
    throw std::invalid_argument("launch: " + std::to_string(dynamic_shared_bytes) +
                                " bytes of dynamic shared memory, at most " +
                                std::to_string(kMostSharedBytes) + " are possible");
  }
}

// Runs body(), which calls a kernel, once for every thread of every block. The blocks run one after
// the other. The seed chooses the schedule (seed % 5), the poison (seed % 3) and every random
// choice: equal seeds give equal runs, except with std::threads. 15 seeds in a row try each pair.
// Throws KernelError, Deadlock, or std::invalid_argument if CUDA would refuse the launch.
inline void launch(dim3 grid, dim3 block, std::size_t dynamic_shared_bytes,
                   const std::function<void()>& body, unsigned seed = 0,
                   const LaunchOptions& options = {}) {
  check_launch(grid, block, dynamic_shared_bytes);
  if (current_block != nullptr) {
    throw std::logic_error(
        "launch: called while another launch runs; the emulator runs one a time");
  }
  Block state(grid, block, dynamic_shared_bytes, seed, options);
  struct Current {
    explicit Current(Block* state) { current_block = state; }
    ~Current() {
      current_block = nullptr;
      current_thread = nullptr;
    }
  } const current(&state);
  std::mt19937 random(seed);
  for (const unsigned index : make_order(grid.x * grid.y * grid.z, schedule_of(seed), random)) {
    state.run(index, body);
  }
}

}  // namespace speculators::emulator
