// CUDA binding of the tree operators, in torch's stable ABI. Compiled by g++ with -DUSE_CUDA; it
// needs no CUDA header, because the stream crosses the interface as a pointer.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "csrc/tree_verification/tree_verification_arguments.h"

namespace speculators {
namespace {

// Runs `enqueue(stream)` on the device of the arguments and its current stream.
template <typename Enqueue>
void on_device(const TreeArguments& arguments, Enqueue enqueue) {
  const auto device = arguments.first().get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  const int error = enqueue(stream);
  STD_TORCH_CHECK(error == 0, "tree verification: CUDA error ", error, ": ",
                  tree_verification_error_message(error));
}

void build_tree_on_cuda(const TreeBuildCall& call, TreeArguments& arguments) {
  void* workspace = arguments.workspace(build_tree_workspace_bytes(call));
  on_device(arguments, [&](void* stream) { return build_tree_cuda(call, workspace, stream); });
}

void verify_greedy_on_cuda(const VerifyCall& call, TreeArguments& arguments) {
  void* workspace = arguments.workspace(verify_workspace_bytes(call));
  on_device(arguments, [&](void* stream) { return verify_greedy_cuda(call, workspace, stream); });
}

void verify_sampling_on_cuda(const VerifyCall& call, TreeArguments& arguments) {
  void* workspace = arguments.workspace(verify_workspace_bytes(call));
  on_device(arguments, [&](void* stream) { return verify_sampling_cuda(call, workspace, stream); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(speculators, CUDA, library) {
  library.impl("build_tree", TORCH_BOX(&build_tree<build_tree_on_cuda>));
  library.impl("verify_greedy", TORCH_BOX(&verify_greedy<verify_greedy_on_cuda>));
  library.impl("verify_sampling", TORCH_BOX(&verify_sampling<verify_sampling_on_cuda>));
}

}  // namespace speculators
