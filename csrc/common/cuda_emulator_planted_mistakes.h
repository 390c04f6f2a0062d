// Deliberately wrong kernels, to show that the builds of the emulator notice what they claim to:
//
//   name                    what it does                          who notices
//   shared_overflow         writes behind dynamic shared memory   AddressSanitizer; else at the end
//   output_overflow         writes behind an array of the host    AddressSanitizer
//   stack_overflow          writes behind a local array           AddressSanitizer
//   misaligned_vector       reads a float4 at a multiple of 4     UndefinedBehaviorSanitizer
//   missing_barrier         a warp reads what another one writes  ThreadSanitizer; fibers: by seed
//   missing_barrier_hidden  the same, but there are __syncwarps   ThreadSanitizer; fibers: by seed
//   divergent_barrier       half of a block skips __syncthreads   every build
#pragma once

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "csrc/common/cuda_emulator.h"
#include "csrc/common/cuda_portability.h"

namespace speculators::emulator {

__global__ inline void hand_over(int* found, bool with_warp_barriers) {
  SPECULATORS_DYNAMIC_SHARED(int, shared);
  const unsigned lane = threadIdx.x % 32;
  const bool writer = threadIdx.x < 32;
  if (writer) shared[lane] = lane;
  if (with_warp_barriers) {
    for (int i = 0; i < (writer ? 1 : 100); ++i) __syncwarp();
  }
  if (!writer) found[lane] = shared[lane];
}

// The first warp writes what the second one reads. The __syncwarps order neither before the other,
// although the write does come first in time: if the emulator's barriers shared a lock that
// ThreadSanitizer sees, it would hide the race.
inline bool missing_barrier_goes_unnoticed(bool with_warp_barriers) {
  bool right = true;
  for (unsigned seed = 0; seed < 15; ++seed) {
    std::vector<int> found(32, -1);
    const auto kernel = [&] { hand_over(found.data(), with_warp_barriers); };
    launch(dim3(1), dim3(64), 32 * sizeof(int), kernel, seed);
    for (int i = 0; i < 32; ++i) right = right && found[i] == i;
  }
  return right;
}

constexpr unsigned kElements = 64;

inline bool shared_overflow_goes_unnoticed() {
  const volatile unsigned past_the_end = kElements;
  launch(dim3(1), dim3(kElements), kElements * sizeof(int), [&] {
    SPECULATORS_DYNAMIC_SHARED(int, shared);
    shared[threadIdx.x] = 0;
    __syncthreads();
    if (threadIdx.x == kElements - 1) shared[past_the_end] = 1;
  });
  return true;
}

inline bool output_overflow_goes_unnoticed() {
  const std::unique_ptr<int[]> out(new int[kElements]);
  launch(dim3(1), dim3(kElements + 1), 0, [&] { out[threadIdx.x] = 1; });
  return true;
}

inline bool stack_overflow_goes_unnoticed() {
  const volatile unsigned past_the_end = kElements;
  std::vector<int> out(kElements);
  launch(dim3(1), dim3(kElements), 0, [&] {
    int local[kElements] = {};
    __syncthreads();              // the fiber leaves its stack and comes back
    int* volatile start = local;  // volatile, so that only AddressSanitizer sees what happens
    if (threadIdx.x == 40) start[past_the_end] = 1;
    out[threadIdx.x] = local[threadIdx.x];
  });
  return true;
}

inline bool misaligned_vector_goes_unnoticed() {
  const volatile unsigned one = 1;
  std::vector<float> values(9, 1.0f);
  float sum = 0;
  launch(dim3(1), dim3(1), 0, [&] {
    const float4 value = *reinterpret_cast<const float4*>(values.data() + one);
    sum = value.x + value.w;
  });
  return sum == 2.0f;
}

inline bool divergent_barrier_goes_unnoticed() {
  launch(dim3(1), dim3(64), 0, [] {
    if (threadIdx.x < 32) __syncthreads();
  });
  return true;
}

// By name. Each returns whether nobody noticed; it throws, returns false, or ends the process if
// the emulator, the result, or a sanitizer shows the mistake.
inline const std::map<std::string, bool (*)()> kPlantedMistakes = {
    {"shared_overflow", shared_overflow_goes_unnoticed},
    {"output_overflow", output_overflow_goes_unnoticed},
    {"stack_overflow", stack_overflow_goes_unnoticed},
    {"misaligned_vector", misaligned_vector_goes_unnoticed},
    {"missing_barrier", [] { return missing_barrier_goes_unnoticed(false); }},
    {"missing_barrier_hidden", [] { return missing_barrier_goes_unnoticed(true); }},
    {"divergent_barrier", divergent_barrier_goes_unnoticed},
};

}  // namespace speculators::emulator
