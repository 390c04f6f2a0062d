// Launches the kernels of the merge: chooses the elements of a lane, sizes grid and shared memory.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstddef>

#include "csrc/draft_attention/merge.cuh"
#include "csrc/draft_attention/merge.h"

namespace speculators {
namespace {

// Enough blocks to fill any device many times over; the kernels stride over the rest.
constexpr int64_t kMaxBlocks = 1 << 16;
constexpr int64_t kMaxSharedBytes = 48 << 10;  // of a block, without asking for more

using MergeKernel = void (*)(DraftMergeCall);

cudaError_t launch(MergeKernel kernel, const DraftMergeCall& call, int64_t shared_bytes_of_warp,
                   cudaStream_t stream) {
  const int64_t units = num_units(call);
  if (units == 0) return cudaSuccess;
  int64_t warps = kMaxMergeWarps;
  while (warps > 1 && warps * shared_bytes_of_warp > kMaxSharedBytes) warps /= 2;
  const auto blocks = static_cast<unsigned>(std::min((units + warps - 1) / warps, kMaxBlocks));
  const auto shared_bytes = static_cast<size_t>(warps * shared_bytes_of_warp);
  kernel<<<blocks, static_cast<unsigned>(32 * warps), shared_bytes, stream>>>(call);
  return cudaGetLastError();
}

// Kernels<T, kPerLane>::kForward or kBackward, for the call's dtype and head size.
template <typename T, int kPerLane>
struct Kernels {
  static constexpr MergeKernel kForward = draft_merge_kernel<T, kPerLane>;
  static constexpr MergeKernel kBackward = draft_merge_backward_kernel<T, kPerLane>;
};

struct Pair {
  MergeKernel forward, backward;
};

template <typename T>
Pair kernels_for(int64_t head_size) {
  if (head_size <= 64) return {Kernels<T, 2>::kForward, Kernels<T, 2>::kBackward};
  if (head_size <= 128) return {Kernels<T, 4>::kForward, Kernels<T, 4>::kBackward};
  return {Kernels<T, 8>::kForward, Kernels<T, 8>::kBackward};
}

Pair kernels_of(const DraftMergeCall& call) {
  return call.is_bfloat16 ? kernels_for<__nv_bfloat16>(call.head_size)
                          : kernels_for<float>(call.head_size);
}

}  // namespace

int draft_merge_cuda(const DraftMergeCall& call, void* stream) {
  return launch(kernels_of(call).forward, call, 0, static_cast<cudaStream_t>(stream));
}

int draft_merge_backward_cuda(const DraftMergeCall& call, void* stream) {
  static_assert(kMaxCudaPairs * sizeof(MergeFactors) <= kMaxSharedBytes);
  return launch(kernels_of(call).backward, call, num_pairs(call) * int64_t{sizeof(MergeFactors)},
                static_cast<cudaStream_t>(stream));
}

const char* draft_merge_error_message(int code) {
  return cudaGetErrorString(static_cast<cudaError_t>(code));
}

}  // namespace speculators
