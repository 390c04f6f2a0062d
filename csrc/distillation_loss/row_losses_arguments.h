// What both bindings of the row losses do with their tensors before the kernel: check, and take
// pointers.
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

#include "csrc/distillation_loss/row_losses.h"

namespace speculators {

using OptionalTensor = std::optional<torch::stable::Tensor>;

// The operator's arguments but for the logits, in the schema's order.
struct RowLossInputs {
  torch::stable::Tensor log_p, coverage, best;
  OptionalTensor likeliest, top, positions, data_tokens, weights;
  std::vector<double> factors;
  bool only_in_vocabulary;
};

// Loss, alpha, greedy acceptance (float32), agreement, in vocabulary (bool): [rows] each.
struct RowLossOutputs {
  torch::stable::Tensor loss, alpha, greedy_acceptance, agreement, in_vocabulary;
};

struct RowLossArguments {
  RowLossCall call;
  RowLossOutputs outputs;
  std::vector<torch::stable::Tensor> kept;  // keeps alive what `call` points to
};

// Whether the elements of a row touch; the rows may lie apart.
inline bool rows_are_contiguous(const torch::stable::Tensor& tensor) {
  return tensor.size(1) <= 1 || tensor.stride(1) == 1;
}

class RowLossChecker {
 public:
  RowLossChecker(const torch::stable::Tensor& logits, RowLossArguments* arguments)
      : logits_(logits), arguments_(arguments) {}

  void expect(const torch::stable::Tensor& tensor, const char* name,
              torch::headeronly::ScalarType dtype, std::initializer_list<int64_t> shape) const {
    bool same = tensor.dim() == static_cast<int64_t>(shape.size());
    std::string expected;
    int64_t dimension = 0;
    for (const int64_t size : shape) {
      same = same && tensor.size(dimension) == size;
      expected += (dimension++ == 0 ? "" : ", ") + std::to_string(size);
    }
    STD_TORCH_CHECK(same, "distillation_loss: ", name, " must have the shape [", expected, "]");
    STD_TORCH_CHECK(tensor.scalar_type() == dtype, "distillation_loss: ", name, " must be ",
                    dtype == torch::headeronly::ScalarType::Long ? "int64" : "float32");
    STD_TORCH_CHECK(tensor.device() == logits_.device(), "distillation_loss: ", name,
                    " must be on the device of logits");
  }

  template <typename T>
  const T* vector(const torch::stable::Tensor& tensor, const char* name, int64_t size) {
    constexpr bool kIsIndex = std::is_same_v<T, int64_t>;
    expect(tensor, name,
           kIsIndex ? torch::headeronly::ScalarType::Long : torch::headeronly::ScalarType::Float,
           {size});
    return keep(torch::stable::contiguous(tensor)).const_data_ptr<T>();
  }

  // Null where there is no tensor, which `needed` forbids.
  template <typename T>
  const T* vector(const OptionalTensor& tensor, const char* name, int64_t size, bool needed) {
    STD_TORCH_CHECK(tensor.has_value() || !needed, "distillation_loss: ", name, " is missing");
    return tensor.has_value() ? vector<T>(*tensor, name, size) : nullptr;
  }

  const torch::stable::Tensor& keep(torch::stable::Tensor tensor) {
    arguments_->kept.push_back(std::move(tensor));
    return arguments_->kept.back();
  }

 private:
  const torch::stable::Tensor& logits_;
  RowLossArguments* arguments_;
};

inline LossFactors to_loss_factors(const std::vector<double>& list) {
  STD_TORCH_CHECK(list.size() == kNumLosses, "distillation_loss: factors must be ", kNumLosses,
                  " numbers");
  std::vector<float> f(list.begin(), list.end());
  return {f[0], f[1], f[2], f[3], f[4], f[5], f[6], f[7], f[8], f[9]};
}

// `gradient`: [rows, W] of the logits' dtype with contiguous rows, perhaps the logits themselves;
// none if there is no tensor.
inline RowLossArguments check_row_loss_arguments(const torch::stable::Tensor& logits,
                                                 const RowLossInputs& inputs,
                                                 const OptionalTensor& gradient) {
  using torch::headeronly::ScalarType;
  const ScalarType dtype = logits.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16,
                  "distillation_loss: logits must be float32 or bfloat16");
  STD_TORCH_CHECK(logits.dim() == 2 && logits.size(1) > 0 && logits.size(1) < (1LL << 31),
                  "distillation_loss: logits must have the shape [rows, vocabulary]");
  STD_TORCH_CHECK(inputs.log_p.dim() == 2,
                  "distillation_loss: log_p must have the shape [targets, vocabulary]");
  RowLossArguments arguments;
  RowLossChecker checker(logits, &arguments);
  RowLossCall& call = arguments.call;
  call.num_rows = logits.size(0);
  call.width = logits.size(1);
  call.num_targets = inputs.log_p.size(0);
  call.factors = to_loss_factors(inputs.factors);
  call.only_in_vocabulary = inputs.only_in_vocabulary;
  call.is_bfloat16 = dtype == ScalarType::BFloat16;

  const auto with_contiguous_rows = [&](const torch::stable::Tensor& tensor) {
    return checker.keep(rows_are_contiguous(tensor) ? tensor : torch::stable::contiguous(tensor));
  };
  if (gradient.has_value()) {
    const torch::stable::Tensor to = checker.keep(*gradient);
    const bool apart = to.stride(0) >= to.size(1) || to.size(0) <= 1;
    STD_TORCH_CHECK(rows_are_contiguous(to) && apart,
                    "distillation_loss: the rows of what takes the gradient must be contiguous and "
                    "must not overlap");
    call.gradient = to.mutable_data_ptr();
    call.gradient_stride = to.stride(0);
  }
  const torch::stable::Tensor from = with_contiguous_rows(logits);
  call.logits = from.const_data_ptr();
  call.logits_stride = from.stride(0);
  checker.expect(inputs.log_p, "log_p", ScalarType::Float, {call.num_targets, call.width});
  const torch::stable::Tensor log_p = with_contiguous_rows(inputs.log_p);
  call.log_p = log_p.const_data_ptr<float>();
  call.log_p_stride = log_p.stride(0);

  call.coverage = checker.vector<float>(inputs.coverage, "coverage", call.num_targets);
  call.best = checker.vector<int64_t>(inputs.best, "best", call.num_targets);
  call.likeliest = checker.vector<int64_t>(inputs.likeliest, "likeliest", call.num_targets,
                                           call.factors.ce_argmax != 0);
  STD_TORCH_CHECK(inputs.top.has_value() || call.factors.topk == 0,
                  "distillation_loss: top is missing");
  if (inputs.top.has_value()) {
    STD_TORCH_CHECK(inputs.top->dim() == 2, "distillation_loss: top must have the shape [T, k]");
    call.top_k = inputs.top->size(1);
    checker.expect(*inputs.top, "top", ScalarType::Long, {call.num_targets, call.top_k});
    call.top = checker.keep(torch::stable::contiguous(*inputs.top)).const_data_ptr<int64_t>();
  }
  STD_TORCH_CHECK(inputs.positions.has_value() || call.num_targets == call.num_rows,
                  "distillation_loss: without positions, log_p must have as many rows as logits");
  call.positions = checker.vector<int64_t>(inputs.positions, "positions", call.num_rows, false);
  call.data_tokens = checker.vector<int64_t>(inputs.data_tokens, "data_tokens", call.num_rows,
                                             call.factors.ce_data != 0);
  call.weights = checker.vector<float>(inputs.weights, "weights", call.num_rows, false);

  const auto new_rows = [&](ScalarType result) {
    return torch::stable::new_empty(logits, {call.num_rows}, result);
  };
  RowLossOutputs& outputs = arguments.outputs;
  outputs = {new_rows(ScalarType::Float), new_rows(ScalarType::Float), new_rows(ScalarType::Float),
             new_rows(ScalarType::Bool), new_rows(ScalarType::Bool)};
  call.loss = outputs.loss.mutable_data_ptr<float>();
  call.alpha = outputs.alpha.mutable_data_ptr<float>();
  call.greedy_acceptance = outputs.greedy_acceptance.mutable_data_ptr<float>();
  call.agreement = outputs.agreement.mutable_data_ptr<bool>();
  call.in_vocabulary = outputs.in_vocabulary.mutable_data_ptr<bool>();
  return arguments;
}

using RowLossResult =
    std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor,
               torch::stable::Tensor, torch::stable::Tensor>;
using RowLossResultWithGradient =
    std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor,
               torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor>;

// The operator with its gradient in place of the logits. kRun computes a RowLossArguments' call.
template <void (*kRun)(const RowLossArguments&)>
RowLossResult distillation_loss_in_place(torch::stable::Tensor logits, torch::stable::Tensor log_p,
                                         torch::stable::Tensor coverage, torch::stable::Tensor best,
                                         OptionalTensor likeliest, OptionalTensor top,
                                         OptionalTensor positions, OptionalTensor data_tokens,
                                         OptionalTensor weights, std::vector<double> factors,
                                         bool only_in_vocabulary) {
  const RowLossArguments arguments =
      check_row_loss_arguments(logits,
                               {log_p, coverage, best, likeliest, top, positions, data_tokens,
                                weights, factors, only_in_vocabulary},
                               logits);
  kRun(arguments);
  const RowLossOutputs& out = arguments.outputs;
  return {out.loss, out.alpha, out.greedy_acceptance, out.agreement, out.in_vocabulary};
}

// The operator with a gradient of its own, [0, W] if none is wanted.
template <void (*kRun)(const RowLossArguments&)>
RowLossResultWithGradient distillation_loss(
    torch::stable::Tensor logits, torch::stable::Tensor log_p, torch::stable::Tensor coverage,
    torch::stable::Tensor best, OptionalTensor likeliest, OptionalTensor top,
    OptionalTensor positions, OptionalTensor data_tokens, OptionalTensor weights,
    std::vector<double> factors, bool only_in_vocabulary, bool with_gradient) {
  STD_TORCH_CHECK(logits.dim() == 2,
                  "distillation_loss: logits must have the shape [rows, vocabulary]");
  const torch::stable::Tensor gradient =
      torch::stable::new_empty(logits, {with_gradient ? logits.size(0) : 0, logits.size(1)});
  const RowLossArguments arguments =
      check_row_loss_arguments(logits,
                               {log_p, coverage, best, likeliest, top, positions, data_tokens,
                                weights, factors, only_in_vocabulary},
                               with_gradient ? OptionalTensor(gradient) : std::nullopt);
  kRun(arguments);
  const RowLossOutputs& out = arguments.outputs;
  return {out.loss, out.alpha, out.greedy_acceptance, out.agreement, out.in_vocabulary, gradient};
}

}  // namespace speculators
