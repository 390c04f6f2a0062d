// Schemas of the tree operators and their CPU binding, in torch's stable ABI.
#include <torch/csrc/stable/library.h>

#include <atomic>

#include "csrc/tree_verification/tree_verification_arguments.h"

namespace speculators {
namespace {

// A sequence is at least one row of logits, which is worth a thread.
constexpr int64_t kGrain = 1;
// Candidates that one thread takes at the least.
constexpr int64_t kBuildGrain = 1 << 10;

void build_tree_on_cpu(const TreeBuildCall& call, TreeArguments& /*arguments*/) {
  const int64_t bad = first_parent_out_of_range(call);
  if (bad >= 0) {
    const int64_t candidate = bad % call.candidates;
    STD_TORCH_CHECK(false, "build_tree: parents[", bad / call.candidates, ", ", candidate, "] is ",
                    call.parents[bad], ", expected -1 <= parent < ", candidate,
                    ": parents come before their children");
  }
  const int64_t grain = kBuildGrain / (call.candidates + 1) + 1;
  torch::stable::parallel_for(
      0, call.batch, grain, [&](int64_t begin, int64_t end) { build_tree_cpu(call, begin, end); });
}

void check_range(const VerifyCall& call) {
  const OutOfRange bad = first_out_of_range(call);
  STD_TORCH_CHECK(bad.what == nullptr, "verification: ", bad.what, " is out of range at [",
                  bad.place / call.nodes, ", ", bad.place % call.nodes,
                  "]: expected parents from -1 to less than the node, and less than the nodes that "
                  "draft_probabilities has, tokens from 0 to ",
                  call.width - 1, ", and uniforms in [0, 1)");
}

void verify_greedy_on_cpu(const VerifyCall& call, TreeArguments& /*arguments*/) {
  check_range(call);
  torch::stable::parallel_for(0, call.batch, kGrain, [&](int64_t begin, int64_t end) {
    verify_greedy_cpu(call, begin, end);
  });
}

void verify_sampling_on_cpu(const VerifyCall& call, TreeArguments& /*arguments*/) {
  check_range(call);
  std::atomic<int64_t> impossible = -1;
  torch::stable::parallel_for(0, call.batch, kGrain, [&](int64_t begin, int64_t end) {
    const int64_t place = verify_sampling_cpu(call, begin, end);
    int64_t first = impossible;
    while (place >= 0 && (first < 0 || place < first)) {
      if (impossible.compare_exchange_weak(first, place)) break;
    }
  });
  const int64_t place = impossible;
  STD_TORCH_CHECK(place < 0, "verification: tokens[", place / call.nodes, ", ", place % call.nodes,
                  "] cannot have been drawn: draft_probabilities is 0 there, or an earlier sibling "
                  "has the token. Pass what it was drawn from, or use the mode that it was drawn "
                  "in");
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(speculators, library) {
  library.def(
      "build_tree(Tensor tokens, Tensor parents, Tensor scores, Tensor root_tokens, "
      "Tensor root_positions, int size) -> (Tensor tokens, Tensor parents, Tensor depths, "
      "Tensor positions, Tensor ancestors, Tensor first_children, Tensor next_siblings, "
      "Tensor candidates)");
  library.def(
      "verify_greedy(Tensor logits, Tensor tokens, Tensor parents) -> (Tensor path, "
      "Tensor accepted, Tensor next_tokens)");
  library.def(
      "verify_sampling(Tensor logits, Tensor tokens, Tensor parents, Tensor? draft_probabilities, "
      "Tensor uniforms, int mode, float temperature, int top_k, float top_p) -> (Tensor path, "
      "Tensor accepted, Tensor next_tokens)");
}

STABLE_TORCH_LIBRARY_IMPL(speculators, CPU, library) {
  library.impl("build_tree", TORCH_BOX(&build_tree<build_tree_on_cpu>));
  library.impl("verify_greedy", TORCH_BOX(&verify_greedy<verify_greedy_on_cpu>));
  library.impl("verify_sampling", TORCH_BOX(&verify_sampling<verify_sampling_on_cpu>));
}

}  // namespace speculators
