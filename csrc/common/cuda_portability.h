// The few macros that let one kernel source be compiled by nvcc and run by the emulator.
//
// A kernel header (.cuh) includes this file and neither <cuda_runtime.h> nor the emulator. Who
// includes the kernel header chooses: a .cu file is compiled by nvcc; a host test includes
// "csrc/common/cuda_emulator.h" first, which brings its own definitions of the same macros:
//
//   SPECULATORS_DYNAMIC_SHARED(T, name)  `T* name` points to the launch's dynamic shared memory.
//   SPECULATORS_SHARED(T, name)          declares `name`, a static shared variable of type T. An
//                                        array type is written whole: SPECULATORS_SHARED(int[32],
//                                        a);
//   DEVICE_CHECK(condition, "message")   stops the kernel and says where, if the condition is
//   false.
//
// A type with a comma in it needs an alias first.
#pragma once

#if !defined(SPECULATORS_CUDA_EMULATOR)
#if !defined(__CUDACC__)
#error "Compile with nvcc, or include csrc/common/cuda_emulator.h before any kernel header."
#endif

#include <cassert>  // declares __assert_fail, which nvcc also has on the device

namespace speculators {

// Names an array type in one piece, so that `Same<float[32]> x` declares what `float x[32]` does.
template <typename T>
using Same = T;

}  // namespace speculators

// `extern __shared__ T name[]` would clash when two instantiations of one kernel give the same name
// two types, so every kernel shares one array of bytes. 16 is the alignment that CUDA promises.
#define SPECULATORS_DYNAMIC_SHARED(T, name)                                         \
  extern __shared__ __align__(16) unsigned char speculators_dynamic_shared_bytes[]; \
  T* name = reinterpret_cast<T*>(speculators_dynamic_shared_bytes)

#define SPECULATORS_SHARED(T, name) __shared__::speculators::Same<T> name

// What assert() does, with words of ours, and in release builds too: the runtime prints file, line,
// block, thread and message, and the stream's next synchronisation returns cudaErrorAssert. (printf
// and __trap() would do as well, but a call that returns costs the kernel registers.)
#define DEVICE_CHECK(condition, message)                                                      \
  do {                                                                                        \
    if (!(condition)) {                                                                       \
      __assert_fail(message " [DEVICE_CHECK(" #condition ")]", __FILE__, __LINE__, __func__); \
    }                                                                                         \
  } while (false)

#endif  // !defined(SPECULATORS_CUDA_EMULATOR)
