// Schemas of the row losses and their CPU binding, in torch's stable ABI.
#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "csrc/distillation_loss/row_losses_arguments.h"

namespace speculators {
namespace {

// Logits that one thread takes at the least; less would cost more to hand out than to compute.
constexpr int64_t kGrain = 1 << 14;

void run_on_cpu(const RowLossArguments& arguments) {
  const RowLossCall& call = arguments.call;
  const char* wrong = index_out_of_range(call);
  STD_TORCH_CHECK(wrong == nullptr, "distillation_loss: ", wrong, " has an index out of range");
  const int64_t grain = std::max<int64_t>(1, kGrain / call.width);
  torch::stable::parallel_for(0, call.num_rows, grain, [&](int64_t begin, int64_t end) {
    row_losses_cpu(call, begin, end);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(speculators, library) {
  library.def(
      "distillation_loss(Tensor logits, Tensor log_p, Tensor coverage, Tensor best, "
      "Tensor? likeliest, Tensor? top, Tensor? positions, Tensor? data_tokens, Tensor? weights, "
      "float[] factors, bool only_in_vocabulary, bool with_gradient) -> (Tensor loss, "
      "Tensor alpha, Tensor greedy_acceptance, Tensor agreement, Tensor in_vocabulary, "
      "Tensor gradient)");
  library.def(
      "distillation_loss_(Tensor(a!) logits, Tensor log_p, Tensor coverage, Tensor best, "
      "Tensor? likeliest, Tensor? top, Tensor? positions, Tensor? data_tokens, Tensor? weights, "
      "float[] factors, bool only_in_vocabulary) -> (Tensor loss, Tensor alpha, "
      "Tensor greedy_acceptance, Tensor agreement, Tensor in_vocabulary)");
}

STABLE_TORCH_LIBRARY_IMPL(speculators, CPU, library) {
  library.impl("distillation_loss", TORCH_BOX(&distillation_loss<run_on_cpu>));
  library.impl("distillation_loss_", TORCH_BOX(&distillation_loss_in_place<run_on_cpu>));
}

}  // namespace speculators
