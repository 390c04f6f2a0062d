// What both bindings of the merge do with their tensors before the kernel: check, and take
// pointers.
//
// The checks protect memory. Users meet those of speculators.ops first, which name the argument;
// these hold whoever calls torch.ops.speculators directly.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "csrc/draft_attention/merge.h"

namespace speculators {

struct DraftMergeArguments {
  DraftMergeCall call;
  std::vector<torch::stable::Tensor> kept;  // keeps alive what `call` points to
};

// Whether no two elements can be the same memory: from the smallest stride on, each steps over all
// that the ones before it reach.
inline bool elements_are_apart(const torch::stable::Tensor& tensor) {
  std::vector<std::pair<int64_t, int64_t>> dimensions;  // stride, size
  for (int64_t i = 0; i < tensor.dim(); ++i) {
    if (tensor.size(i) == 0) return true;
    if (tensor.size(i) > 1) dimensions.emplace_back(tensor.stride(i), tensor.size(i));
  }
  std::sort(dimensions.begin(), dimensions.end());
  int64_t farthest = 0;
  for (const auto& [stride, size] : dimensions) {
    if (stride <= farthest) return false;
    farthest += (size - 1) * stride;
  }
  return true;
}

class DraftMergeChecker {
 public:
  DraftMergeChecker(const torch::stable::Tensor& query, DraftMergeArguments* arguments)
      : query_(query), arguments_(arguments) {}

  // [batch, heads, rows, D] of the query's dtype, any strides. What is written must have its
  // vectors contiguous and apart; of what is only read a copy is made if they are not contiguous.
  HeadRows read(const torch::stable::Tensor& tensor, const std::string& name, int64_t heads) {
    expect(tensor, name, {query_.size(0), heads, query_.size(2), query_.size(3)},
           query_.scalar_type());
    const bool whole = tensor.stride(3) == 1 || tensor.size(3) <= 1;
    return rows_of(whole ? tensor : torch::stable::contiguous(tensor));
  }

  HeadRows written(const torch::stable::Tensor& tensor, const std::string& name) {
    expect(tensor, name, {query_.size(0), query_.size(1), query_.size(2), query_.size(3)},
           query_.scalar_type());
    STD_TORCH_CHECK(tensor.stride(3) == 1 || tensor.size(3) <= 1, "draft_attention_merge: ", name,
                    " must be contiguous in its last dimension");
    return written_rows_of(tensor, name);
  }

  // float32 [batch, heads, rows], any strides.
  HeadRows logsumexp(const torch::stable::Tensor& tensor, bool is_written) {
    expect(tensor, "logsumexp", {query_.size(0), query_.size(1), query_.size(2)},
           torch::headeronly::ScalarType::Float);
    return is_written ? written_rows_of(tensor, "logsumexp") : rows_of(tensor);
  }

 private:
  void expect(const torch::stable::Tensor& tensor, const std::string& name,
              const std::vector<int64_t>& shape, torch::headeronly::ScalarType dtype) const {
    bool same = tensor.dim() == static_cast<int64_t>(shape.size());
    std::string expected;
    for (size_t dimension = 0; dimension < shape.size(); ++dimension) {
      same = same && tensor.size(static_cast<int64_t>(dimension)) == shape[dimension];
      expected += (dimension == 0 ? "" : ", ") + std::to_string(shape[dimension]);
    }
    STD_TORCH_CHECK(same, "draft_attention_merge: ", name, " must have the shape [", expected, "]");
    STD_TORCH_CHECK(tensor.scalar_type() == dtype, "draft_attention_merge: ", name,
                    name == "logsumexp" ? " must be float32" : " must have the dtype of query");
    STD_TORCH_CHECK(tensor.device() == query_.device(), "draft_attention_merge: ", name,
                    " must be on the device of query");
  }

  HeadRows rows_of(const torch::stable::Tensor& tensor) {
    arguments_->kept.push_back(tensor);
    return {tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
  }

  HeadRows written_rows_of(const torch::stable::Tensor& tensor, const std::string& name) {
    STD_TORCH_CHECK(elements_are_apart(tensor), "draft_attention_merge: ", name,
                    " must not overlap itself");
    HeadRows rows = rows_of(tensor);
    rows.data = tensor.mutable_data_ptr();  // a copy of its own, if it was shared until written
    return rows;
  }

  const torch::stable::Tensor& query_;
  DraftMergeArguments* arguments_;
};

// What both directions take, but for the output and the logsumexp, which one of them writes.
inline DraftMergeArguments check_draft_merge_arguments(
    const torch::stable::Tensor& query, const std::vector<torch::stable::Tensor>& keys,
    const std::vector<torch::stable::Tensor>& values, double scale) {
  using torch::headeronly::ScalarType;
  STD_TORCH_CHECK(
      query.scalar_type() == ScalarType::Float || query.scalar_type() == ScalarType::BFloat16,
      "draft_attention_merge: query must be float32 or bfloat16");
  STD_TORCH_CHECK(query.dim() == 4 && query.size(1) > 0 && query.size(3) > 0,
                  "draft_attention_merge: query must have the shape [batch, heads, rows, D]");
  STD_TORCH_CHECK(!keys.empty() && keys.size() == values.size() && keys.size() <= kMaxDiagonals,
                  "draft_attention_merge: there must be as many values as keys, from 1 to ",
                  kMaxDiagonals);
  DraftMergeArguments arguments;
  DraftMergeChecker checker(query, &arguments);
  DraftMergeCall& call = arguments.call;
  call.batch = query.size(0);
  call.query_heads = query.size(1);
  call.rows = query.size(2);
  call.head_size = query.size(3);
  call.key_heads = keys[0].dim() == 4 ? keys[0].size(1) : 0;
  STD_TORCH_CHECK(
      call.key_heads > 0 && call.query_heads % call.key_heads == 0,
      "draft_attention_merge: keys must have the shape [batch, key heads, rows, D], and "
      "query a multiple of their heads");
  call.num_diagonals = static_cast<int64_t>(keys.size());
  call.scale = static_cast<float>(scale);
  call.is_bfloat16 = query.scalar_type() == ScalarType::BFloat16;
  call.query = checker.read(query, "query", call.query_heads);
  for (size_t i = 0; i < keys.size(); ++i) {
    call.keys[i] = checker.read(keys[i], "keys[" + std::to_string(i) + "]", call.key_heads);
    call.values[i] = checker.read(values[i], "values[" + std::to_string(i) + "]", call.key_heads);
  }
  return arguments;
}

// kRun computes a DraftMergeArguments' call.
template <void (*kRun)(const DraftMergeArguments&)>
void draft_attention_merge(torch::stable::Tensor output, torch::stable::Tensor logsumexp,
                           torch::stable::Tensor query, std::vector<torch::stable::Tensor> keys,
                           std::vector<torch::stable::Tensor> values, double scale) {
  DraftMergeArguments arguments = check_draft_merge_arguments(query, keys, values, scale);
  DraftMergeChecker checker(query, &arguments);
  arguments.call.logsumexp = checker.logsumexp(logsumexp, true);
  arguments.call.output = checker.written(output, "output");
  kRun(arguments);
}

template <void (*kRun)(const DraftMergeArguments&)>
torch::stable::Tensor draft_attention_merge_backward(
    torch::stable::Tensor grad_query, torch::stable::Tensor grad_output,
    torch::stable::Tensor output, torch::stable::Tensor logsumexp, torch::stable::Tensor query,
    std::vector<torch::stable::Tensor> keys, std::vector<torch::stable::Tensor> values,
    double scale) {
  DraftMergeArguments arguments = check_draft_merge_arguments(query, keys, values, scale);
  DraftMergeChecker checker(query, &arguments);
  DraftMergeCall& call = arguments.call;
  call.logsumexp = checker.logsumexp(logsumexp, false);
  call.output = checker.read(output, "output", call.query_heads);
  call.grad_output = checker.read(grad_output, "grad_output", call.query_heads);
  call.grad_query = checker.written(grad_query, "grad_query");
  torch::stable::Tensor grad_keys_values = torch::stable::new_empty(
      query, {2, call.num_diagonals, call.batch, call.rows, call.key_heads, call.head_size});
  call.grad_keys_values = grad_keys_values.mutable_data_ptr();
  kRun(arguments);
  return grad_keys_values;
}

}  // namespace speculators
