// Schemas of packing and unpacking and their CPU binding, in torch's stable ABI.
#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "csrc/hidden_state_packing/gather.h"
#include "csrc/hidden_state_packing/pack_arguments.h"

namespace speculators {
namespace {

// Entries that one thread takes at the least; less would cost more to hand out than to convert.
constexpr int64_t kGrain = 1 << 15;

void check_range(const int64_t* index, int64_t num_rows, int64_t limit) {
  if (index == nullptr) return;
  const int64_t bad = first_index_out_of_range(index, num_rows, limit);
  STD_TORCH_CHECK(bad < 0, "hidden_state_packing: index[", bad, "] is ", index[bad],
                  ", expected 0 <= index < ", limit);
}

template <typename Call>
int64_t grain(const Call& call) {
  return std::max<int64_t>(1, kGrain / std::max<int64_t>(1, call.num_layers * call.width));
}

void pack_on_cpu(const PackArguments& arguments) {
  const PackCall& call = arguments.call;
  check_range(call.index, call.num_rows, call.num_tokens);
  torch::stable::parallel_for(0, call.num_rows, grain(call),
                              [&](int64_t begin, int64_t end) { pack_rows_cpu(call, begin, end); });
}

void unpack_on_cpu(const UnpackArguments& arguments) {
  const UnpackCall& call = arguments.call;
  check_range(call.index, call.num_rows, call.num_targets);
  torch::stable::parallel_for(0, call.num_rows, grain(call), [&](int64_t begin, int64_t end) {
    unpack_rows_cpu(call, begin, end);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(speculators, library) {
  library.def(
      "hidden_state_pack(Tensor[] hidden_states, Tensor? index, ScalarType dtype) -> "
      "(Tensor packed, Tensor scales)");
  library.def(
      "hidden_state_unpack_(Tensor(a!)[] outputs, Tensor packed, Tensor? scales, Tensor? index) -> "
      "()");
}

STABLE_TORCH_LIBRARY_IMPL(speculators, CPU, library) {
  library.impl("hidden_state_pack", TORCH_BOX(&hidden_state_pack<pack_on_cpu>));
  library.impl("hidden_state_unpack_", TORCH_BOX(&hidden_state_unpack<unpack_on_cpu>));
}

}  // namespace speculators
