// Launches the kernel of build_tree.
#include <cuda_runtime.h>

#include <algorithm>

#include "csrc/tree_verification/build_tree.cuh"
#include "csrc/tree_verification/build_tree.h"

namespace speculators {
namespace {

// Enough blocks to fill any device many times over; the kernel strides over the rest.
constexpr int64_t kMaxBlocks = 1 << 16;

}  // namespace

int64_t build_tree_workspace_bytes(const TreeBuildCall& call) { return bytes_of(call); }

int build_tree_cuda(const TreeBuildCall& call, void* workspace, void* stream) {
  if (call.batch == 0) return cudaSuccess;
  const auto blocks = static_cast<unsigned>(std::min(call.batch, kMaxBlocks));
  const BuildWorkspace work = workspace_in(workspace, call);
  build_tree_kernel<>
      <<<blocks, kMaxBuildThreads, 0, static_cast<cudaStream_t>(stream)>>>(call, work);
  return cudaGetLastError();
}

}  // namespace speculators
