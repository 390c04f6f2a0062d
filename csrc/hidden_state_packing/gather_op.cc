// Schema of the gather and its CPU binding, in torch's stable ABI.
#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "csrc/hidden_state_packing/gather_arguments.h"

namespace speculators {
namespace {

// Bytes that one thread copies at the least; less would cost more to hand out than to copy.
constexpr int64_t kGrainBytes = 1 << 15;

torch::stable::Tensor gather_cpu(std::vector<torch::stable::Tensor> hidden_states,
                                 torch::stable::Tensor index_tensor) {
  GatherArguments arguments = check_gather_arguments(std::move(hidden_states), index_tensor);
  const int64_t num_rows = arguments.index.numel();
  const int64_t num_layers = static_cast<int64_t>(arguments.sources.size());
  const int64_t* index = arguments.index.const_data_ptr<int64_t>();
  const int64_t bad = first_index_out_of_range(index, num_rows, arguments.num_tokens);
  STD_TORCH_CHECK(bad < 0, "gather: index[", bad, "] is ", index[bad], ", expected 0 <= index < ",
                  arguments.num_tokens);
  void* out = arguments.out.mutable_data_ptr();
  const int64_t row_bytes = num_layers * arguments.row_bytes;
  const int64_t grain = std::max<int64_t>(1, kGrainBytes / std::max<int64_t>(1, row_bytes));
  torch::stable::parallel_for(0, num_rows, grain, [&](int64_t begin, int64_t end) {
    gather_rows_cpu(arguments.sources.data(), num_layers, arguments.row_bytes, index, begin, end,
                    out);
  });
  return arguments.out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(speculators, library) {
  library.def("hidden_state_gather(Tensor[] hidden_states, Tensor index) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(speculators, CPU, library) {
  library.impl("hidden_state_gather", TORCH_BOX(&gather_cpu));
}

}  // namespace speculators
