// What both bindings of the gather do with their tensors before the kernel: check, and take
// pointers.
//
// The checks protect memory. Users meet those of speculators.ops first, which name the argument;
// these hold whoever calls torch.ops.speculators directly.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <vector>

#include "csrc/hidden_state_packing/gather.h"

namespace speculators {

struct GatherArguments {
  std::vector<torch::stable::Tensor> layers;  // keeps alive what `sources` points to
  torch::stable::Tensor index;
  std::vector<GatherSource> sources;
  int64_t num_tokens;
  int64_t row_bytes;
  torch::stable::Tensor out;  // [rows, L * H], not yet written
};

inline GatherArguments check_gather_arguments(std::vector<torch::stable::Tensor> hidden_states,
                                              const torch::stable::Tensor& index) {
  using torch::headeronly::ScalarType;
  STD_TORCH_CHECK(!hidden_states.empty(), "gather: hidden_states is empty");
  STD_TORCH_CHECK(index.dim() == 1 && index.scalar_type() == ScalarType::Long,
                  "gather: index must be an int64 tensor of one dimension");
  const torch::stable::Tensor first = hidden_states[0];
  const ScalarType dtype = first.scalar_type();
  STD_TORCH_CHECK(
      dtype == ScalarType::BFloat16 || dtype == ScalarType::Half || dtype == ScalarType::Float,
      "gather: hidden_states must be bfloat16, float16 or float32");
  STD_TORCH_CHECK(first.dim() == 2, "gather: hidden_states must have the shape [tokens, hidden]");

  GatherArguments arguments;
  arguments.num_tokens = first.size(0);
  arguments.row_bytes = first.size(1) * static_cast<int64_t>(first.element_size());
  for (const torch::stable::Tensor& layer : hidden_states) {
    STD_TORCH_CHECK(layer.dim() == 2 && layer.size(0) == first.size(0) &&
                        layer.size(1) == first.size(1) && layer.scalar_type() == dtype,
                    "gather: all hidden_states must have one shape and one dtype");
    STD_TORCH_CHECK(layer.device() == index.device(),
                    "gather: hidden_states and index must be on one device");
    // Rows may lie apart (a slice of a larger tensor); only the elements of a row must touch.
    const bool rows_are_contiguous = layer.stride(1) == 1 || layer.size(1) <= 1;
    arguments.layers.push_back(rows_are_contiguous ? layer : torch::stable::contiguous(layer));
    const torch::stable::Tensor& kept = arguments.layers.back();
    arguments.sources.push_back(
        {kept.const_data_ptr(), kept.stride(0) * static_cast<int64_t>(kept.element_size())});
  }
  arguments.index = torch::stable::contiguous(index);
  arguments.out = torch::stable::new_empty(
      first, {index.size(0), static_cast<int64_t>(arguments.layers.size()) * first.size(1)});
  return arguments;
}

}  // namespace speculators
