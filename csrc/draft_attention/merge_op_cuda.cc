// CUDA binding of the merge, in torch's stable ABI. Compiled by g++ with -DUSE_CUDA; it needs no
// CUDA header, because the stream crosses the interface as a pointer.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "csrc/draft_attention/merge_arguments.h"

namespace speculators {
namespace {

template <int (*kLaunch)(const DraftMergeCall&, void*)>
void run_on_cuda(const DraftMergeArguments& arguments) {
  STD_TORCH_CHECK(arguments.call.head_size <= kMaxCudaHeadSize,
                  "draft_attention_merge: on CUDA a head has at most ", kMaxCudaHeadSize,
                  " elements");
  STD_TORCH_CHECK(num_pairs(arguments.call) <= kMaxCudaPairs,
                  "draft_attention_merge: on CUDA there are at most ", kMaxCudaPairs,
                  " pairs of a later step and a query head of one key head");
  const auto device = arguments.kept.front().get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  const int error = kLaunch(arguments.call, stream);
  STD_TORCH_CHECK(error == 0, "draft_attention_merge: CUDA error ", error, ": ",
                  draft_merge_error_message(error));
}

constexpr auto* kForward = &draft_attention_merge<run_on_cuda<draft_merge_cuda>>;
constexpr auto* kBackward = &draft_attention_merge_backward<run_on_cuda<draft_merge_backward_cuda>>;

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(speculators, CUDA, library) {
  library.impl("draft_attention_merge_", TORCH_BOX(kForward));
  library.impl("draft_attention_merge_backward_", TORCH_BOX(kBackward));
}

}  // namespace speculators
