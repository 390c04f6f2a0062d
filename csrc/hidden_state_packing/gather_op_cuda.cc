// CUDA binding of the gather, in torch's stable ABI. Compiled by g++ with -DUSE_CUDA; it needs no
// CUDA header, because the stream crosses the interface as a pointer.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "csrc/hidden_state_packing/gather_arguments.h"

namespace speculators {
namespace {

torch::stable::Tensor gather_cuda(std::vector<torch::stable::Tensor> hidden_states,
                                  torch::stable::Tensor index) {
  const auto device = index.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  GatherArguments arguments = check_gather_arguments(std::move(hidden_states), index);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  const int error = gather_rows_cuda(
      arguments.sources.data(), static_cast<int64_t>(arguments.sources.size()),
      arguments.num_tokens, arguments.row_bytes, arguments.index.const_data_ptr<int64_t>(),
      arguments.index.numel(), arguments.out.mutable_data_ptr(), stream);
  STD_TORCH_CHECK(error == 0, "gather: CUDA error ", error, ": ", cuda_error_message(error));
  return arguments.out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(speculators, CUDA, library) {
  library.impl("hidden_state_gather", TORCH_BOX(&gather_cuda));
}

}  // namespace speculators
