// What the bindings of packing and unpacking do with their tensors before the kernel: check, and
// take pointers.
//
// The checks protect memory. Users meet those of speculators.ops first, which name the argument;
// these hold whoever calls torch.ops.speculators directly.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "csrc/hidden_state_packing/pack.h"

namespace speculators {

// What a call points to; it must not be moved while the call is in use.
struct PackStorage {
  std::vector<torch::stable::Tensor> kept;
  std::vector<StateRows> rows;
};

struct PackArguments : PackStorage {
  PackCall call;
};

struct UnpackArguments : PackStorage {
  UnpackCall call;
};

inline StateFormat format_of(torch::headeronly::ScalarType dtype) {
  using torch::headeronly::ScalarType;
  if (dtype == ScalarType::BFloat16) return StateFormat::kBFloat16;
  if (dtype == ScalarType::Half) return StateFormat::kFloat16;
  if (dtype == ScalarType::Float) return StateFormat::kFloat32;
  if (dtype == ScalarType::Char) return StateFormat::kInt8;
  STD_TORCH_CHECK(dtype == ScalarType::Float8_e4m3fn,
                  "hidden_state_packing: a dtype is none of bfloat16, float16, float32, int8 and "
                  "float8_e4m3fn");
  return StateFormat::kFloat8;
}

// A tensor of two dimensions with the entries of a row side by side: this one, or a copy.
inline torch::stable::Tensor with_whole_rows(const torch::stable::Tensor& tensor) {
  return tensor.stride(1) == 1 || tensor.size(1) <= 1 ? tensor : torch::stable::contiguous(tensor);
}

// The index's data, or null. `rows` is how many there must be, -1 if any number will do.
inline const int64_t* check_pack_index(const std::optional<torch::stable::Tensor>& index,
                                       const torch::stable::Tensor& beside, int64_t rows,
                                       PackStorage* storage) {
  if (!index.has_value()) return nullptr;
  STD_TORCH_CHECK(index->dim() == 1 && index->scalar_type() == torch::headeronly::ScalarType::Long,
                  "hidden_state_packing: index must be an int64 tensor of one dimension");
  STD_TORCH_CHECK(index->device() == beside.device(),
                  "hidden_state_packing: index must be on the device of the states");
  STD_TORCH_CHECK(rows < 0 || index->size(0) == rows,
                  "hidden_state_packing: index must have one entry for each packed row");
  storage->kept.push_back(torch::stable::contiguous(*index));
  return storage->kept.back().const_data_ptr<int64_t>();
}

// All of the shape [rows, width], one floating dtype and device; what is read may be copied.
inline void check_state_rows(const std::vector<torch::stable::Tensor>& layers, bool written,
                             PackStorage* storage) {
  STD_TORCH_CHECK(!layers.empty(), "hidden_state_packing: there are no layers");
  const torch::stable::Tensor& first = layers[0];
  STD_TORCH_CHECK(first.dim() == 2, "hidden_state_packing: a layer must have two dimensions");
  STD_TORCH_CHECK(!is_quantized(format_of(first.scalar_type())),
                  "hidden_state_packing: layers must be bfloat16, float16 or float32");
  for (const torch::stable::Tensor& layer : layers) {
    STD_TORCH_CHECK(
        layer.dim() == 2 && layer.size(0) == first.size(0) && layer.size(1) == first.size(1) &&
            layer.scalar_type() == first.scalar_type() && layer.device() == first.device(),
        "hidden_state_packing: all layers must have one shape, dtype and device");
    if (written) {
      const bool apart = layer.stride(0) >= layer.size(1) || layer.size(0) <= 1;
      STD_TORCH_CHECK((layer.stride(1) == 1 || layer.size(1) <= 1) && apart,
                      "hidden_state_packing: outputs must have rows that are contiguous and do "
                      "not overlap");
    }
    const torch::stable::Tensor kept = with_whole_rows(layer);
    storage->kept.push_back(kept);
    // Written memory that was shared until then (copy on write) becomes its own.
    const void* data = written ? kept.mutable_data_ptr() : kept.const_data_ptr();
    storage->rows.push_back({data, kept.stride(0)});
  }
}

// kRun computes a PackArguments' call.
template <void (*kRun)(const PackArguments&)>
std::tuple<torch::stable::Tensor, torch::stable::Tensor> hidden_state_pack(
    std::vector<torch::stable::Tensor> hidden_states, std::optional<torch::stable::Tensor> index,
    torch::headeronly::ScalarType dtype) {
  PackArguments arguments;
  check_state_rows(hidden_states, false, &arguments);
  const torch::stable::Tensor& first = hidden_states[0];
  PackCall& call = arguments.call;
  call.from = format_of(first.scalar_type());
  call.to = format_of(dtype);
  STD_TORCH_CHECK(is_quantized(call.to),
                  "hidden_state_packing: packed must be int8 or float8_e4m3fn");
  call.num_layers = static_cast<int64_t>(hidden_states.size());
  call.num_tokens = first.size(0);
  call.width = first.size(1);
  call.index = check_pack_index(index, first, -1, &arguments);
  call.num_rows = index.has_value() ? index->size(0) : call.num_tokens;
  call.layers = arguments.rows.data();
  torch::stable::Tensor packed =
      torch::stable::new_empty(first, {call.num_rows, call.num_layers * call.width}, dtype);
  torch::stable::Tensor scales = torch::stable::new_empty(first, {call.num_rows, call.num_layers},
                                                          torch::headeronly::ScalarType::Float);
  call.packed = static_cast<uint8_t*>(packed.mutable_data_ptr());
  call.scales = static_cast<float*>(scales.mutable_data_ptr());
  kRun(arguments);
  return {packed, scales};
}

inline void check_packed(const torch::stable::Tensor& packed,
                         const std::optional<torch::stable::Tensor>& scales,
                         const torch::stable::Tensor& first, UnpackArguments* arguments) {
  UnpackCall& call = arguments->call;
  STD_TORCH_CHECK(packed.dim() == 2 && packed.size(1) == call.num_layers * call.width,
                  "hidden_state_packing: packed must have the shape [rows, layers * hidden]");
  STD_TORCH_CHECK(packed.device() == first.device(),
                  "hidden_state_packing: packed must be on the device of the outputs");
  STD_TORCH_CHECK(is_quantized(call.from) || call.from == call.to,
                  "hidden_state_packing: packed must be int8, float8_e4m3fn or of the outputs' "
                  "dtype");
  STD_TORCH_CHECK(is_quantized(call.from) == scales.has_value(),
                  "hidden_state_packing: int8 and float8_e4m3fn need scales, other dtypes none");
  arguments->kept.push_back(with_whole_rows(packed));
  call.packed = {arguments->kept.back().const_data_ptr(), arguments->kept.back().stride(0)};
  if (!scales.has_value()) return;
  STD_TORCH_CHECK(scales->dim() == 2 && scales->size(0) == call.num_rows &&
                      scales->size(1) == call.num_layers &&
                      scales->scalar_type() == torch::headeronly::ScalarType::Float &&
                      scales->device() == first.device(),
                  "hidden_state_packing: scales must be float32 of the shape [rows, layers], on "
                  "the device of the outputs");
  arguments->kept.push_back(with_whole_rows(*scales));
  call.scales = arguments->kept.back().const_data_ptr<float>();
  call.scales_row_stride = arguments->kept.back().stride(0);
}

// kRun computes an UnpackArguments' call.
template <void (*kRun)(const UnpackArguments&)>
void hidden_state_unpack(std::vector<torch::stable::Tensor> outputs, torch::stable::Tensor packed,
                         std::optional<torch::stable::Tensor> scales,
                         std::optional<torch::stable::Tensor> index) {
  UnpackArguments arguments;
  check_state_rows(outputs, true, &arguments);
  const torch::stable::Tensor& first = outputs[0];
  UnpackCall& call = arguments.call;
  call.from = format_of(packed.scalar_type());
  call.to = format_of(first.scalar_type());
  call.num_layers = static_cast<int64_t>(outputs.size());
  call.num_targets = first.size(0);
  call.width = first.size(1);
  call.num_rows = packed.dim() == 2 ? packed.size(0) : 0;
  call.targets = arguments.rows.data();
  check_packed(packed, scales, first, &arguments);
  call.index = check_pack_index(index, first, call.num_rows, &arguments);
  STD_TORCH_CHECK(index.has_value() || call.num_rows <= call.num_targets,
                  "hidden_state_packing: there are more packed rows than rows of the outputs");
  kRun(arguments);
}

}  // namespace speculators
