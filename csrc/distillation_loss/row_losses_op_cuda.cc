// CUDA binding of the row losses, in torch's stable ABI. Compiled by g++ with -DUSE_CUDA; it needs
// no CUDA header, because the stream crosses the interface as a pointer.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "csrc/distillation_loss/row_losses_arguments.h"

namespace speculators {
namespace {

void run_on_cuda(const RowLossArguments& arguments) {
  const auto device = arguments.outputs.loss.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  const int error = row_losses_cuda(arguments.call, stream);
  STD_TORCH_CHECK(error == 0, "distillation_loss: CUDA error ", error, ": ",
                  row_losses_error_message(error));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(speculators, CUDA, library) {
  library.impl("distillation_loss", TORCH_BOX(&distillation_loss<run_on_cuda>));
  library.impl("distillation_loss_", TORCH_BOX(&distillation_loss_in_place<run_on_cuda>));
}

}  // namespace speculators
