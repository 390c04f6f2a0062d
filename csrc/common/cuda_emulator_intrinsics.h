// The device functions of CUDA, under their CUDA names, for the emulator. cuda_emulator.h says what
// they check and includes this file. `where` is filled in by the compiler: it is the place of the
// call, for the messages.
#pragma once

#include <math.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <concepts>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <source_location>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "csrc/common/cuda_emulator_block.h"
#include "csrc/common/cuda_emulator_memory.h"
#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "cuda_fp8.h"
#include "vector_functions.h"  // make_float4 and the like

namespace speculators::emulator {

inline Block& block() {
  if (current_thread == nullptr) {
    throw std::logic_error("CUDA emulator: device code was called outside of launch()");
  }
  return *current_block;
}

inline const ThreadState& thread() {
  block();
  return *current_thread;
}

[[noreturn]] inline void fail(const std::string& message,
                              const std::source_location& where = std::source_location::current()) {
  throw KernelError(text(message.c_str(), where));
}

template <typename T>
T& shared_variable(SharedVariable& variable) {
  static_assert(std::is_trivially_default_constructible_v<std::remove_all_extents_t<T>>,
                "CUDA allows no shared variable that needs a constructor.");
  return *static_cast<T*>(variable.storage(block().poison()));
}

// The types that CUDA's shuffles take. Narrower integers would silently become int there.
template <typename T>
concept ShuffleValue =
    std::same_as<T, int> || std::same_as<T, unsigned> || std::same_as<T, long> ||
    std::same_as<T, unsigned long> || std::same_as<T, long long> ||
    std::same_as<T, unsigned long long> || std::same_as<T, float> || std::same_as<T, double> ||
    std::same_as<T, __half> || std::same_as<T, __half2> || std::same_as<T, __nv_bfloat16> ||
    std::same_as<T, __nv_bfloat162>;

template <ShuffleValue T>
std::uint64_t to_bits(T value) {
  std::uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  return bits;
}

template <ShuffleValue T>
T from_bits(std::uint64_t bits) {
  T value;
  std::memcpy(static_cast<void*>(&value), &bits, sizeof value);
  return value;
}

// `source(lane, first, last)` names the lane to read; first and last bound the caller's group of
// `width` lanes. A lane outside the mask has poison: on a GPU its value is undefined, which is no
// error until somebody uses it.
template <ShuffleValue T, typename Source>
T shuffle(std::uint32_t mask, T value, int width, const char* operation,
          const std::source_location& where, Source source) {
  if (width < 1 || width > 32 || !std::has_single_bit(static_cast<unsigned>(width))) {
    throw KernelError(text(operation, where) + ": width " + std::to_string(width) +
                      " is not a power of two up to 32");
  }
  const int lane = static_cast<int>(thread().lane());
  const int first = lane & ~(width - 1);
  const LaneValues& values = block().meet_warp(mask, to_bits(value), operation, where);
  return from_bits<T>(values[source(lane, first, first + width - 1)]);
}

// The lanes of the mask whose predicate is not 0.
inline std::uint32_t ballot(std::uint32_t mask, bool predicate, const char* operation,
                            const std::source_location& where) {
  const LaneValues& values = block().meet_warp(mask, predicate ? 1 : 0, operation, where);
  std::uint32_t result = 0;
  for (unsigned lane = 0; lane < kWarpSize; ++lane) {
    if ((mask >> lane & 1) != 0 && values[lane] != 0) result |= 1u << lane;
  }
  return result;
}

template <ShuffleValue T, typename Combine>
T reduce(std::uint32_t mask, T value, const char* operation, const std::source_location& where,
         Combine combine) {
  const LaneValues& values = block().meet_warp(mask, to_bits(value), operation, where);
  const auto first = static_cast<unsigned>(std::countr_zero(mask));
  T result = from_bits<T>(values[first]);
  for (unsigned lane = first + 1; lane < kWarpSize; ++lane) {
    if ((mask >> lane & 1) != 0) result = combine(result, from_bits<T>(values[lane]));
  }
  return result;
}

template <typename T>
T* aligned(T* address, const char* operation, const std::source_location& where) {
  if (reinterpret_cast<std::uintptr_t>(address) % alignof(T) != 0) {
    throw KernelError(text(operation, where) + ": the address is not a multiple of " +
                      std::to_string(alignof(T)));
  }
  return address;
}

// Atomics are relaxed, as CUDA's are: they make no other access safe.
template <typename T>
std::atomic_ref<T> atomic(T* address, const char* operation, const std::source_location& where) {
  block().preempt();
  return std::atomic_ref<T>(*aligned(address, operation, where));
}

// Replaces *address by change(*address), which sees the old value and is not interrupted.
template <typename T, typename Change>
T atomic_update(T* address, const char* operation, const std::source_location& where,
                Change change) {
  const std::atomic_ref<T> target = atomic(address, operation, where);
  T old = target.load(std::memory_order_relaxed);
  while (!target.compare_exchange_weak(old, change(old), std::memory_order_relaxed)) {
  }
  return old;
}

inline void fence() {
  Block& current = block();
  current.preempt();
  observe(current.fence_token());
  publish(current.fence_token());
}

// The types for which CUDA has each atomic. Note: no long, so no std::int64_t.
template <typename T>
concept AtomicInteger =
    std::same_as<T, int> || std::same_as<T, unsigned> || std::same_as<T, unsigned long long>;
template <typename T>
concept AtomicOrdered = AtomicInteger<T> || std::same_as<T, long long>;
template <typename T>
concept AtomicAddable = AtomicInteger<T> || std::same_as<T, float> || std::same_as<T, double>;
template <typename T>
concept AtomicExchangeable = AtomicInteger<T> || std::same_as<T, float>;

}  // namespace speculators::emulator

inline constexpr int warpSize = 32;

// Written once here, because it ends almost every parameter list below.
#define SPECULATORS_CALLER std::source_location where = std::source_location::current()

// ---- Barriers and fences.

inline void __syncthreads(SPECULATORS_CALLER) {
  speculators::emulator::block().meet_block(false, "__syncthreads", where);
}

inline int __syncthreads_count(int predicate, SPECULATORS_CALLER) {
  return static_cast<int>(
      speculators::emulator::block().meet_block(predicate != 0, "__syncthreads_count", where));
}

inline int __syncthreads_or(int predicate, SPECULATORS_CALLER) {
  return speculators::emulator::block().meet_block(predicate != 0, "__syncthreads_or", where) != 0;
}

inline int __syncthreads_and(int predicate, SPECULATORS_CALLER) {
  return speculators::emulator::block().meet_block(predicate == 0, "__syncthreads_and", where) == 0;
}

inline void __syncwarp(unsigned mask = 0xffffffffu, SPECULATORS_CALLER) {
  speculators::emulator::block().meet_warp(mask, 0, "__syncwarp", where);
}

inline void __threadfence_block() { speculators::emulator::fence(); }
inline void __threadfence() { speculators::emulator::fence(); }
inline void __threadfence_system() { speculators::emulator::fence(); }

[[noreturn]] inline void __trap(SPECULATORS_CALLER) {
  speculators::emulator::fail("__trap", where);
}

// ---- Shuffles. Which lane is read follows the CUDA C++ Programming Guide, "Warp Shuffle".

template <speculators::emulator::ShuffleValue T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, SPECULATORS_CALLER) {
  return speculators::emulator::shuffle(
      mask, value, width, "__shfl_sync", where,
      [=](int, int first, int) { return first + (source & (width - 1)); });
}

template <speculators::emulator::ShuffleValue T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, SPECULATORS_CALLER) {
  return speculators::emulator::shuffle(
      mask, value, width, "__shfl_up_sync", where, [=](int lane, int first, int) {
        return lane - std::int64_t{delta} >= first ? lane - static_cast<int>(delta) : lane;
      });
}

template <speculators::emulator::ShuffleValue T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, SPECULATORS_CALLER) {
  return speculators::emulator::shuffle(
      mask, value, width, "__shfl_down_sync", where, [=](int lane, int, int last) {
        return lane + std::int64_t{delta} <= last ? lane + static_cast<int>(delta) : lane;
      });
}

// An earlier group of lanes can be read, a later one cannot.
template <speculators::emulator::ShuffleValue T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32, SPECULATORS_CALLER) {
  return speculators::emulator::shuffle(mask, value, width, "__shfl_xor_sync", where,
                                        [=](int lane, int, int last) {
                                          const int source = lane ^ (lane_mask & 31);
                                          return source <= last ? source : lane;
                                        });
}

// ---- Votes, matches and reductions over a warp.

inline unsigned __ballot_sync(unsigned mask, int predicate, SPECULATORS_CALLER) {
  return speculators::emulator::ballot(mask, predicate != 0, "__ballot_sync", where);
}

inline int __any_sync(unsigned mask, int predicate, SPECULATORS_CALLER) {
  return speculators::emulator::ballot(mask, predicate != 0, "__any_sync", where) != 0;
}

inline int __all_sync(unsigned mask, int predicate, SPECULATORS_CALLER) {
  return speculators::emulator::ballot(mask, predicate == 0, "__all_sync", where) == 0;
}

// CUDA promises nothing about which lanes run together, so the honest answer is the smallest one:
// the caller alone. Code that is right with any answer is right with it.
inline unsigned __activemask() { return 1u << speculators::emulator::thread().lane(); }

template <speculators::emulator::ShuffleValue T>
unsigned __match_any_sync(unsigned mask, T value, SPECULATORS_CALLER) {
  const std::uint64_t bits = speculators::emulator::to_bits(value);
  const auto& values =
      speculators::emulator::block().meet_warp(mask, bits, "__match_any_sync", where);
  unsigned result = 0;
  for (unsigned lane = 0; lane < 32; ++lane) {
    if ((mask >> lane & 1) != 0 && values[lane] == bits) result |= 1u << lane;
  }
  return result;
}

// CUDA has the first three for int and unsigned, the others for unsigned.
template <typename T>
  requires std::same_as<T, int> || std::same_as<T, unsigned>
T __reduce_add_sync(unsigned mask, T value, SPECULATORS_CALLER) {
  return speculators::emulator::reduce(mask, value, "__reduce_add_sync", where, [](T a, T b) {
    return static_cast<T>(static_cast<unsigned>(a) + static_cast<unsigned>(b));
  });
}

template <typename T>
  requires std::same_as<T, int> || std::same_as<T, unsigned>
T __reduce_max_sync(unsigned mask, T value, SPECULATORS_CALLER) {
  return speculators::emulator::reduce(mask, value, "__reduce_max_sync", where,
                                       [](T a, T b) { return a > b ? a : b; });
}

template <typename T>
  requires std::same_as<T, int> || std::same_as<T, unsigned>
T __reduce_min_sync(unsigned mask, T value, SPECULATORS_CALLER) {
  return speculators::emulator::reduce(mask, value, "__reduce_min_sync", where,
                                       [](T a, T b) { return a < b ? a : b; });
}

inline unsigned __reduce_and_sync(unsigned mask, unsigned value, SPECULATORS_CALLER) {
  return speculators::emulator::reduce(mask, value, "__reduce_and_sync", where,
                                       [](unsigned a, unsigned b) { return a & b; });
}

inline unsigned __reduce_or_sync(unsigned mask, unsigned value, SPECULATORS_CALLER) {
  return speculators::emulator::reduce(mask, value, "__reduce_or_sync", where,
                                       [](unsigned a, unsigned b) { return a | b; });
}

inline unsigned __reduce_xor_sync(unsigned mask, unsigned value, SPECULATORS_CALLER) {
  return speculators::emulator::reduce(mask, value, "__reduce_xor_sync", where,
                                       [](unsigned a, unsigned b) { return a ^ b; });
}

// ---- Atomics: return the old value. As in CUDA, the value is converted to the type of the target.

template <speculators::emulator::AtomicAddable T>
T atomicAdd(T* address, std::type_identity_t<T> value, SPECULATORS_CALLER) {
  return speculators::emulator::atomic(address, "atomicAdd", where)
      .fetch_add(value, std::memory_order_relaxed);
}

template <typename T>
  requires std::same_as<T, int> || std::same_as<T, unsigned>
T atomicSub(T* address, std::type_identity_t<T> value, SPECULATORS_CALLER) {
  return speculators::emulator::atomic(address, "atomicSub", where)
      .fetch_sub(value, std::memory_order_relaxed);
}

template <speculators::emulator::AtomicOrdered T>
T atomicMax(T* address, std::type_identity_t<T> value, SPECULATORS_CALLER) {
  return speculators::emulator::atomic_update(address, "atomicMax", where,
                                              [value](T old) { return old > value ? old : value; });
}

template <speculators::emulator::AtomicOrdered T>
T atomicMin(T* address, std::type_identity_t<T> value, SPECULATORS_CALLER) {
  return speculators::emulator::atomic_update(address, "atomicMin", where,
                                              [value](T old) { return old < value ? old : value; });
}

template <speculators::emulator::AtomicInteger T>
T atomicAnd(T* address, std::type_identity_t<T> value, SPECULATORS_CALLER) {
  return speculators::emulator::atomic(address, "atomicAnd", where)
      .fetch_and(value, std::memory_order_relaxed);
}

template <speculators::emulator::AtomicInteger T>
T atomicOr(T* address, std::type_identity_t<T> value, SPECULATORS_CALLER) {
  return speculators::emulator::atomic(address, "atomicOr", where)
      .fetch_or(value, std::memory_order_relaxed);
}

template <speculators::emulator::AtomicInteger T>
T atomicXor(T* address, std::type_identity_t<T> value, SPECULATORS_CALLER) {
  return speculators::emulator::atomic(address, "atomicXor", where)
      .fetch_xor(value, std::memory_order_relaxed);
}

template <speculators::emulator::AtomicExchangeable T>
T atomicExch(T* address, std::type_identity_t<T> value, SPECULATORS_CALLER) {
  return speculators::emulator::atomic(address, "atomicExch", where)
      .exchange(value, std::memory_order_relaxed);
}

template <speculators::emulator::AtomicInteger T>
T atomicCAS(T* address, std::type_identity_t<T> expected, std::type_identity_t<T> desired,
            SPECULATORS_CALLER) {
  speculators::emulator::atomic(address, "atomicCAS", where)
      .compare_exchange_strong(expected, desired, std::memory_order_relaxed);
  return expected;  // on failure, compare_exchange has put the present value there
}

// ---- Loads and stores with a cache hint. The hint means nothing here; the alignment is checked.

#define SPECULATORS_LOAD(name)                                     \
  template <typename T>                                            \
  T name(const T* address, SPECULATORS_CALLER) {                   \
    return *speculators::emulator::aligned(address, #name, where); \
  }
SPECULATORS_LOAD(__ldg)
SPECULATORS_LOAD(__ldca)
SPECULATORS_LOAD(__ldcg)
SPECULATORS_LOAD(__ldcs)
SPECULATORS_LOAD(__ldlu)
SPECULATORS_LOAD(__ldcv)
#undef SPECULATORS_LOAD

#define SPECULATORS_STORE(name)                                              \
  template <typename T>                                                      \
  void name(T* address, std::type_identity_t<T> value, SPECULATORS_CALLER) { \
    *speculators::emulator::aligned(address, #name, where) = value;          \
  }
SPECULATORS_STORE(__stwb)
SPECULATORS_STORE(__stcg)
SPECULATORS_STORE(__stcs)
SPECULATORS_STORE(__stwt)
#undef SPECULATORS_STORE

#undef SPECULATORS_CALLER

// ---- Bits.

inline int __ffs(int value) { return __builtin_ffs(value); }
inline int __ffsll(long long value) { return __builtin_ffsll(value); }
inline int __popc(unsigned value) { return std::popcount(value); }
inline int __popcll(unsigned long long value) { return std::popcount(value); }
inline int __clz(int value) { return std::countl_zero(static_cast<unsigned>(value)); }
inline int __clzll(long long value) {
  return std::countl_zero(static_cast<unsigned long long>(value));
}
inline unsigned __brev(unsigned value) {
  unsigned result = 0;
  for (int bit = 0; bit < 32; ++bit) result |= (value >> bit & 1) << (31 - bit);
  return result;
}

inline float __int_as_float(int value) { return std::bit_cast<float>(value); }
inline int __float_as_int(float value) { return std::bit_cast<int>(value); }
inline float __uint_as_float(unsigned value) { return std::bit_cast<float>(value); }
inline unsigned __float_as_uint(float value) { return std::bit_cast<unsigned>(value); }
inline double __longlong_as_double(long long value) { return std::bit_cast<double>(value); }
inline long long __double_as_longlong(double value) { return std::bit_cast<long long>(value); }

// ---- Numbers. Conversions saturate, and NaN becomes 0, as on a GPU.

namespace speculators::emulator {

inline int to_int(float integral) {
  if (std::isnan(integral)) return 0;
  if (integral >= 2147483648.0f) return 2147483647;
  if (integral < -2147483648.0f) return -2147483647 - 1;
  return static_cast<int>(integral);
}

template <typename A, typename B>
concept Comparable = std::is_arithmetic_v<A> && std::is_arithmetic_v<B>;

inline float exponential(float x) { return std::exp(x); }
inline float logarithm(float x) { return std::log(x); }
inline float reciprocal_root(float x) { return 1.0f / std::sqrt(x); }

}  // namespace speculators::emulator

inline int __float2int_rn(float value) {
  return speculators::emulator::to_int(std::nearbyint(value));
}
inline int __float2int_rz(float value) { return speculators::emulator::to_int(std::trunc(value)); }
inline int __float2int_rd(float value) { return speculators::emulator::to_int(std::floor(value)); }
inline int __float2int_ru(float value) { return speculators::emulator::to_int(std::ceil(value)); }
inline float __int2float_rn(int value) { return static_cast<float>(value); }
inline float __saturatef(float value) { return value > 0.0f ? std::min(value, 1.0f) : 0.0f; }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float value) { return 1.0f / value; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }

// The C library declares some of these names itself, or will: so they are macros.
#define __expf(x) (::speculators::emulator::exponential(x))
#define __logf(x) (::speculators::emulator::logarithm(x))
#define rsqrtf(x) (::speculators::emulator::reciprocal_root(x))

// CUDA has min and max for any two numbers; of floating-point ones, the one that is not NaN.
template <typename A, typename B>
  requires speculators::emulator::Comparable<A, B>
constexpr std::common_type_t<A, B> min(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>) return std::fmin(static_cast<T>(a), static_cast<T>(b));
  return static_cast<T>(b) < static_cast<T>(a) ? static_cast<T>(b) : static_cast<T>(a);
}

template <typename A, typename B>
  requires speculators::emulator::Comparable<A, B>
constexpr std::common_type_t<A, B> max(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>) return std::fmax(static_cast<T>(a), static_cast<T>(b));
  return static_cast<T>(a) < static_cast<T>(b) ? static_cast<T>(b) : static_cast<T>(a);
}
