// CUDA binding of packing and unpacking, in torch's stable ABI. Compiled by g++ with -DUSE_CUDA; it
// needs no CUDA header, because the stream crosses the interface as a pointer.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "csrc/hidden_state_packing/pack_arguments.h"

namespace speculators {
namespace {

template <typename Arguments, typename Call, int (*kLaunch)(const Call&, void*)>
void run_on_cuda(const Arguments& arguments) {
  const auto device = arguments.kept.front().get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  const int error = kLaunch(arguments.call, stream);
  STD_TORCH_CHECK(error == 0, "hidden_state_packing: CUDA error ", error, ": ",
                  pack_error_message(error));
}

constexpr auto* kPack = &hidden_state_pack<run_on_cuda<PackArguments, PackCall, pack_rows_cuda>>;
constexpr auto* kUnpack =
    &hidden_state_unpack<run_on_cuda<UnpackArguments, UnpackCall, unpack_rows_cuda>>;

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(speculators, CUDA, library) {
  library.impl("hidden_state_pack", TORCH_BOX(kPack));
  library.impl("hidden_state_unpack_", TORCH_BOX(kUnpack));
}

}  // namespace speculators
