// Launches the kernels of verification.
#include <cuda_runtime.h>

#include <algorithm>

#include "csrc/tree_verification/row_summary.cuh"
#include "csrc/tree_verification/tree_walk.cuh"
#include "csrc/tree_verification/verification.h"

namespace speculators {
namespace {

constexpr int kChunkOfBlock = kMaxTreeThreads * kItems;
// Enough blocks to fill any device many times over; the kernels stride over the rest.
constexpr int64_t kMaxBlocks = 1 << 20;

unsigned blocks_for(int64_t units) { return static_cast<unsigned>(std::min(units, kMaxBlocks)); }

template <typename T>
cudaError_t greedy(const VerifyCall& call, const VerifyWorkspace& work, cudaStream_t stream) {
  const int64_t units = call.batch * call.nodes * work.chunks;
  summarise_rows_kernel<T, true><<<blocks_for(units), kMaxTreeThreads, 0, stream>>>(call, work);
  if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) return error;
  walk_greedy_kernel<><<<blocks_for(call.batch), kMaxTreeThreads, 0, stream>>>(call, work);
  return cudaGetLastError();
}

template <typename T>
cudaError_t sampling(const VerifyCall& call, const VerifyWorkspace& work, cudaStream_t stream) {
  const int64_t units = call.batch * call.nodes * work.chunks;
  const unsigned walks = blocks_for(call.batch);
  summarise_rows_kernel<T, false><<<blocks_for(units), kMaxTreeThreads, 0, stream>>>(call, work);
  if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) return error;
  if (call.mode == SamplingMode::kPointMass) {
    walk_point_mass_kernel<T><<<walks, kMaxTreeThreads, 0, stream>>>(call, work);
    return cudaGetLastError();
  }
  walk_siblings_kernel<T, false><<<walks, kMaxTreeThreads, 0, stream>>>(call, work);
  if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) return error;
  residual_kernel<T>
      <<<blocks_for(call.batch * work.chunks), kMaxTreeThreads, 0, stream>>>(call, work);
  if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) return error;
  walk_siblings_kernel<T, true><<<walks, kMaxTreeThreads, 0, stream>>>(call, work);
  return cudaGetLastError();
}

}  // namespace

int64_t verify_workspace_bytes(const VerifyCall& call) {
  return bytes_of(call, (call.width + kChunkOfBlock - 1) / kChunkOfBlock);
}

int verify_greedy_cuda(const VerifyCall& call, void* workspace, void* stream) {
  if (call.batch == 0) return cudaSuccess;
  const VerifyWorkspace work = workspace_in(workspace, call, kChunkOfBlock);
  const auto on = static_cast<cudaStream_t>(stream);
  return call.is_bfloat16 ? greedy<__nv_bfloat16>(call, work, on) : greedy<float>(call, work, on);
}

int verify_sampling_cuda(const VerifyCall& call, void* workspace, void* stream) {
  if (call.batch == 0) return cudaSuccess;
  const VerifyWorkspace work = workspace_in(workspace, call, kChunkOfBlock);
  const auto on = static_cast<cudaStream_t>(stream);
  return call.is_bfloat16 ? sampling<__nv_bfloat16>(call, work, on)
                          : sampling<float>(call, work, on);
}

const char* tree_verification_error_message(int code) {
  return cudaGetErrorString(static_cast<cudaError_t>(code));
}

}  // namespace speculators
