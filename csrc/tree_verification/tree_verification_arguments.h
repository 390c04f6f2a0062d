// What both bindings of the tree operators do with their tensors before the kernels: check, and
// take pointers.
//
// The checks protect memory. Users meet those of speculators.ops first, which name the argument;
// these hold whoever calls torch.ops.speculators directly.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <initializer_list>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "csrc/tree_verification/build_tree.h"
#include "csrc/tree_verification/verification.h"

namespace speculators {

using torch::headeronly::ScalarType;

// The smallest temperature whose reciprocal, times any difference of logits that matters, is a
// number.
inline constexpr double kLeastTemperature = 1e-6;

// Checks tensors against what the first one says, and keeps alive what a call points to.
class TreeArguments {
 public:
  TreeArguments(const char* operation, const torch::stable::Tensor& first)
      : operation_(operation), first_(first) {}

  void expect(const torch::stable::Tensor& tensor, const char* name, ScalarType dtype,
              std::initializer_list<int64_t> shape) const {
    bool same = tensor.dim() == static_cast<int64_t>(shape.size());
    std::string expected;
    int64_t dimension = 0;
    for (const int64_t size : shape) {
      same = same && tensor.size(dimension) == size;
      expected += (dimension++ == 0 ? "" : ", ") + std::to_string(size);
    }
    STD_TORCH_CHECK(same, operation_, ": ", name, " must have the shape [", expected, "]");
    STD_TORCH_CHECK(tensor.scalar_type() == dtype, operation_, ": ", name, " must be ",
                    dtype == ScalarType::Long    ? "int64"
                    : dtype == ScalarType::Float ? "float32"
                                                 : "float64");
    STD_TORCH_CHECK(tensor.device() == first_.device(), operation_, ": ", name,
                    " must be on the device of the other tensors");
  }

  template <typename T>
  const T* contiguous(const torch::stable::Tensor& tensor, const char* name,
                      std::initializer_list<int64_t> shape) {
    constexpr ScalarType kType = std::is_same_v<T, int64_t>  ? ScalarType::Long
                                 : std::is_same_v<T, double> ? ScalarType::Double
                                                             : ScalarType::Float;
    expect(tensor, name, kType, shape);
    return keep(torch::stable::contiguous(tensor)).template const_data_ptr<T>();
  }

  // With the elements of a row side by side; the rows may lie apart.
  const torch::stable::Tensor& rows(const torch::stable::Tensor& tensor) {
    const bool touch = tensor.size(2) <= 1 || tensor.stride(2) == 1;
    return keep(touch ? tensor : torch::stable::contiguous(tensor));
  }

  int64_t* result(std::vector<int64_t> shape) {
    results_.push_back(torch::stable::new_empty(first_, shape, ScalarType::Long));
    return results_.back().mutable_data_ptr<int64_t>();
  }

  // Memory on the device that the kernels work in.
  void* workspace(int64_t bytes) {
    return keep(torch::stable::new_empty(first_, {bytes}, ScalarType::Byte)).mutable_data_ptr();
  }

  const torch::stable::Tensor& operator[](size_t number) const { return results_[number]; }
  const torch::stable::Tensor& first() const { return first_; }

 private:
  torch::stable::Tensor& keep(torch::stable::Tensor tensor) {
    kept_.push_back(std::move(tensor));
    return kept_.back();
  }

  const char* operation_;
  torch::stable::Tensor first_;
  std::vector<torch::stable::Tensor> kept_, results_;
};

// kRun computes the call; it may ask the arguments for a workspace.
template <void (*kRun)(const TreeBuildCall&, TreeArguments&)>
std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor,
           torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor,
           torch::stable::Tensor, torch::stable::Tensor>
build_tree(torch::stable::Tensor tokens, torch::stable::Tensor parents,
           torch::stable::Tensor scores, torch::stable::Tensor root_tokens,
           torch::stable::Tensor root_positions, int64_t size) {
  STD_TORCH_CHECK(tokens.dim() == 2 && tokens.size(1) < (1LL << 31),
                  "build_tree: tokens must have the shape [batch, candidates]");
  STD_TORCH_CHECK(size >= 0 && size < (1LL << 31), "build_tree: size must not be negative");
  TreeArguments arguments("build_tree", tokens);
  TreeBuildCall call;
  call.batch = tokens.size(0);
  call.candidates = tokens.size(1);
  call.nodes = size + 1;
  const std::initializer_list<int64_t> shape = {call.batch, call.candidates};
  call.tokens = arguments.contiguous<int64_t>(tokens, "tokens", shape);
  call.parents = arguments.contiguous<int64_t>(parents, "parents", shape);
  call.scores = arguments.contiguous<float>(scores, "scores", shape);
  call.root_tokens = arguments.contiguous<int64_t>(root_tokens, "root_tokens", {call.batch});
  call.root_positions =
      arguments.contiguous<int64_t>(root_positions, "root_positions", {call.batch});
  call.node_tokens = arguments.result({call.batch, call.nodes});
  call.node_parents = arguments.result({call.batch, call.nodes});
  call.node_depths = arguments.result({call.batch, call.nodes});
  call.node_positions = arguments.result({call.batch, call.nodes});
  call.ancestors = reinterpret_cast<uint64_t*>(
      arguments.result({call.batch, call.nodes, mask_words(call.nodes)}));
  call.first_children = arguments.result({call.batch, call.nodes});
  call.next_siblings = arguments.result({call.batch, call.nodes});
  call.node_candidates = arguments.result({call.batch, call.nodes});
  kRun(call, arguments);
  return {arguments[0], arguments[1], arguments[2], arguments[3],
          arguments[4], arguments[5], arguments[6], arguments[7]};
}

// Path, accepted, bonus.
using VerifyResult =
    std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor>;

inline VerifyCall check_verify_arguments(TreeArguments& arguments,
                                         const torch::stable::Tensor& logits,
                                         const torch::stable::Tensor& tokens,
                                         const torch::stable::Tensor& parents) {
  const ScalarType dtype = logits.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16,
                  "verification: logits must be float32 or bfloat16");
  STD_TORCH_CHECK(logits.dim() == 3 && logits.size(1) > 0 && logits.size(2) > 0 &&
                      logits.size(1) < (1LL << 31) && logits.size(2) < (1LL << 31),
                  "verification: logits must have the shape [batch, nodes, vocabulary], the last "
                  "two not empty");
  VerifyCall call;
  call.batch = logits.size(0);
  call.nodes = logits.size(1);
  call.width = logits.size(2);
  const torch::stable::Tensor& rows = arguments.rows(logits);
  call.logits = rows.const_data_ptr();
  call.batch_stride = rows.stride(0);
  call.node_stride = rows.stride(1);
  call.is_bfloat16 = dtype == ScalarType::BFloat16;
  call.tokens = arguments.contiguous<int64_t>(tokens, "tokens", {call.batch, call.nodes});
  call.parents = arguments.contiguous<int64_t>(parents, "parents", {call.batch, call.nodes});
  call.path = arguments.result({call.batch, call.nodes - 1});
  call.accepted = arguments.result({call.batch});
  call.next_tokens = arguments.result({call.batch});
  return call;
}

template <void (*kRun)(const VerifyCall&, TreeArguments&)>
VerifyResult verify_greedy(torch::stable::Tensor logits, torch::stable::Tensor tokens,
                           torch::stable::Tensor parents) {
  TreeArguments arguments("verification", logits);
  const VerifyCall call = check_verify_arguments(arguments, logits, tokens, parents);
  kRun(call, arguments);
  return {arguments[0], arguments[1], arguments[2]};
}

template <void (*kRun)(const VerifyCall&, TreeArguments&)>
VerifyResult verify_sampling(torch::stable::Tensor logits, torch::stable::Tensor tokens,
                             torch::stable::Tensor parents,
                             std::optional<torch::stable::Tensor> draft_probabilities,
                             torch::stable::Tensor uniforms, int64_t mode, double temperature,
                             int64_t top_k, double top_p) {
  TreeArguments arguments("verification", logits);
  VerifyCall call = check_verify_arguments(arguments, logits, tokens, parents);
  STD_TORCH_CHECK(mode >= 0 && mode <= 2,
                  "verification: mode must be 0 (point mass), 1 (with replacement) or 2 (without)");
  STD_TORCH_CHECK(temperature >= kLeastTemperature && temperature < 1e30,
                  "verification: temperature must be at least ", kLeastTemperature);
  STD_TORCH_CHECK(top_k >= 0 && top_p > 0 && top_p <= 1,
                  "verification: top_k must not be negative, and top_p in (0, 1]");
  call.mode = static_cast<SamplingMode>(mode);
  call.temperature = static_cast<float>(temperature);
  call.top_k = top_k;
  call.top_p = top_p;
  call.uniforms = arguments.contiguous<double>(uniforms, "uniforms", {call.batch, call.nodes});
  STD_TORCH_CHECK(draft_probabilities.has_value() == (call.mode != SamplingMode::kPointMass),
                  "verification: draft_probabilities must be given, but not for mode 0, which "
                  "ignores them");
  if (draft_probabilities.has_value()) {
    const torch::stable::Tensor& q = *draft_probabilities;
    STD_TORCH_CHECK(q.dim() == 3, "verification: draft_probabilities must have three dimensions");
    call.q_nodes = q.size(1);
    arguments.expect(q, "draft_probabilities", ScalarType::Float,
                     {call.batch, call.q_nodes, call.width});
    const torch::stable::Tensor& rows = arguments.rows(q);
    call.q = rows.const_data_ptr<float>();
    call.q_batch_stride = rows.stride(0);
    call.q_node_stride = rows.stride(1);
  }
  kRun(call, arguments);
  return {arguments[0], arguments[1], arguments[2]};
}

}  // namespace speculators
