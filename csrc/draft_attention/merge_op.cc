// Schemas of the merge and its CPU binding, in torch's stable ABI.
#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "csrc/draft_attention/merge_arguments.h"

namespace speculators {
namespace {

// Multiplications that one thread takes at the least; less would cost more to hand out.
constexpr int64_t kGrain = 1 << 15;

template <void (*kKernel)(const DraftMergeCall&, int64_t, int64_t)>
void run_on_cpu(const DraftMergeArguments& arguments) {
  const DraftMergeCall& call = arguments.call;
  const int64_t work =
      call.query_heads / call.key_heads * call.head_size * (1 + 2 * call.num_diagonals);
  torch::stable::parallel_for(0, num_units(call), std::max<int64_t>(1, kGrain / work),
                              [&](int64_t begin, int64_t end) { kKernel(call, begin, end); });
}

constexpr auto* kForward = &draft_attention_merge<run_on_cpu<draft_merge_cpu>>;
constexpr auto* kBackward = &draft_attention_merge_backward<run_on_cpu<draft_merge_backward_cpu>>;

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(speculators, library) {
  library.def(
      "draft_attention_merge_(Tensor(a!) output, Tensor(b!) logsumexp, Tensor query, "
      "Tensor[] keys, Tensor[] values, float scale) -> ()");
  library.def(
      "draft_attention_merge_backward_(Tensor(a!) grad_query, Tensor grad_output, Tensor output, "
      "Tensor logsumexp, Tensor query, Tensor[] keys, Tensor[] values, float scale) -> "
      "Tensor grad_keys_values");
}

STABLE_TORCH_LIBRARY_IMPL(speculators, CPU, library) {
  library.impl("draft_attention_merge_", TORCH_BOX(kForward));
  library.impl("draft_attention_merge_backward_", TORCH_BOX(kBackward));
}

}  // namespace speculators
