// Launches the kernel of the row losses.
#include <cuda_runtime.h>

#include <algorithm>

#include "csrc/distillation_loss/row_losses.cuh"
#include "csrc/distillation_loss/row_losses.h"

namespace speculators {
namespace {

// Enough blocks to fill any device many times over; the kernel strides over the rest.
constexpr int64_t kMaxBlocks = 1 << 16;

template <typename T>
cudaError_t launch(const RowLossCall& call, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(std::min(call.num_rows, kMaxBlocks));
  const int64_t top_k = call.factors.topk != 0 ? call.top_k : 0;
  const auto shared_bytes = static_cast<size_t>(top_k + 2) * sizeof(float);
  row_losses_kernel<T><<<blocks, kMaxRowThreads, shared_bytes, stream>>>(call);
  return cudaGetLastError();
}

}  // namespace

int row_losses_cuda(const RowLossCall& call, void* stream) {
  if (call.num_rows == 0) return cudaSuccess;
  const auto on = static_cast<cudaStream_t>(stream);
  return call.is_bfloat16 ? launch<__nv_bfloat16>(call, on) : launch<float>(call, on);
}

const char* row_losses_error_message(int code) {
  return cudaGetErrorString(static_cast<cudaError_t>(code));
}

}  // namespace speculators
