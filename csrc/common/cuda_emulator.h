// A CUDA emulator for tests: runs the source of a kernel as plain C++ on the host, without a GPU.
//
// Why. Most mistakes in a kernel are mistakes of logic: an index off by one, a barrier that is
// missing or that not every thread reaches, a shuffle whose mask names a lane that left the loop.
// They depend on the order in which threads run, so a GPU shows them rarely, late and without a
// line number. Here every CUDA thread is a fiber, a seed decides after each barrier who runs next,
// and a mistake becomes an exception that names the place. It needs no GPU and no nvcc.
//
// What it reports, with block, thread and seed, and with file and line where there is one:
//   * A barrier that not all threads reach, or that pairs up with a barrier at another place.
//   * A warp operation (__syncwarp, shuffle, vote, match, reduce) whose mask lacks the caller, or
//     names an exited or missing lane, or differs among lanes that wait for each other.
//   * A DEVICE_CHECK that fails, __trap(), any exception, a misaligned __ldg, __stcs or atomic.
//   * A write behind the end of shared memory: under AddressSanitizer at once, else at the block's
//     end.
// What it makes visible as a wrong result:
//   * Reading shared memory that this block has not written, or a lane outside the mask: poison.
//   * A missing barrier, or atomics that must not be interrupted but can be: under some schedule.
//
// Where it is stricter than a GPU, because code that needs the leniency breaks when it is changed:
//   * __syncthreads needs every thread of the block. Hardware lets those that exited be absent; a
//     thread that returns early while others go on to a barrier is a deadlock here.
//   * A mask must name no exited and no missing lane, even for __syncwarp. In a block of 40 threads
//     the second warp has 8 lanes and the mask 0xff.
//   * Threads meet only in the same call at the same place, not in two branches.
//
// What it cannot say:
//   * Anything about speed, registers or occupancy.
//   * Whether mma, wgmma, TMA, cp.async, mbarriers, named barriers, clusters or cooperative groups
//     are used well. They do not exist here: keep them behind a template parameter of the kernel,
//     and let the test pass something plain.
//   * The interleaving of blocks, which run one by one, in an order that the seed varies.
//   * The weak memory model (a missing __threadfence), the exact rounding of __expf and __logf.
//   * That a loop ends which waits for another thread's write without a barrier. It may hang.
//
// How to write a kernel for it:
//   * The kernel header (.cuh) includes csrc/common/cuda_portability.h, and of CUDA nothing but
//     cuda_bf16.h, cuda_fp16.h and cuda_fp8.h. The .cu file includes <cuda_runtime.h>, then the
//     .cuh. The test includes this file, then the .cuh (after a blank line and a comment, so that
//     clang-format keeps the order; in the wrong order it does not compile).
//   * Shared memory is SPECULATORS_SHARED(float[32], sums) or SPECULATORS_DYNAMIC_SHARED(T, name).
//     Bare `__shared__ T name` works as a function-local static, but is neither poisoned nor
//     guarded: what one block leaves there, the next one finds.
// and how to test it:
//
//   for (unsigned seed = 0; seed < 15; ++seed) {
//     const auto kernel = [&] { row_sum<float>(in.data(), out.data(), columns); };
//     speculators::emulator::launch(dim3(rows), dim3(128), shared_bytes, kernel, seed);
//     EXPECT_EQ(out, expected);
//   }
//
// The launch is synchronous; run one at a time. There are three builds, all of the same test. All
// are C++20 with the CUDA headers as -isystem, -Wno-unknown-pragmas for `#pragma unroll`, and from
// -O2 on -fno-strict-aliasing, because kernels cast float* to float4*, which CUDA allows and C++
// does not.
//   * Plain: fast, so many seeds and sizes.
//   * -fsanitize=address,undefined: out of bounds, overflow, misaligned vector access. (ASan warns
//     once that it does not fully support swapcontext. It is told of every switch, so no matter.)
//   * -DSPECULATORS_EMULATOR_THREADS -fsanitize=thread: every CUDA thread is a std::thread, and a
//     missing barrier is a data race whether or not it spoils a result. The seed chooses only the
//     poison and the order in which threads start. A fence orders all that follows a later fence.
#pragma once

#define SPECULATORS_CUDA_EMULATOR 1

#include <string>
#include <type_traits>

#include "csrc/common/cuda_emulator_block.h"
#include "csrc/common/cuda_emulator_intrinsics.h"
#include "csrc/common/cuda_emulator_memory.h"

// ---- Qualifiers. CUDA's headers, included above, define some of them for a host compiler.

#undef __global__
#undef __device__
#undef __host__
#undef __shared__
#undef __forceinline__
#undef __launch_bounds__
#define __global__
#define __device__
#define __host__
#define __shared__ static  // blocks run one by one, so what the process shares the block shares
#define __forceinline__ inline
#define __launch_bounds__(...)

// ---- What cuda_portability.h defines for nvcc.

#define SPECULATORS_DYNAMIC_SHARED(T, name) \
  T* name = static_cast<T*>(::speculators::emulator::block().dynamic_shared())

#define SPECULATORS_SHARED(T, name)                                                  \
  static constinit ::speculators::emulator::SharedVariable name##_shared_variable(   \
      sizeof(::std::type_identity_t<T>), alignof(::std::type_identity_t<T>), #name); \
  auto& name =                                                                       \
      ::speculators::emulator::shared_variable<::std::type_identity_t<T>>(name##_shared_variable)

#define DEVICE_CHECK(condition, message)                                                       \
  do {                                                                                         \
    if (!(condition))                                                                          \
      ::speculators::emulator::fail(std::string(message) + " [DEVICE_CHECK(" #condition ")]"); \
  } while (false)

// ---- Built-in variables.

#define threadIdx (::speculators::emulator::thread().index)
#define blockIdx (::speculators::emulator::block().block_index())
#define blockDim (::speculators::emulator::block().block_dim())
#define gridDim (::speculators::emulator::block().grid_dim())
