// Row losses between a draft's logits and a verifier's distributions: the raw-pointer interface.
//
// In torch's operators each loss is several passes over [rows, W] tensors, forward and again
// backward. Here a row is read, and what the losses need of it stays in the nearest cache: the
// losses, the acceptance and the gradient come out of one call, and the gradient may take the
// place of the logits. The definition, loss by loss, is
// python/speculators/ops/distillation_loss.py.
//
// Nothing here depends on torch, Python or CUDA headers; every binding includes this file.
#pragma once

#include <cstdint>

namespace speculators {

// The weight of each loss in the sum; 0 leaves it out. The order is that of the operator's list.
struct LossFactors {
  float kl, rkl, jsd, ce_soft, ce_argmax, ce_data, tv, nla, lk_hybrid, topk;
};
inline constexpr int kNumLosses = 10;

// One call. Strides count elements; rows are contiguous in themselves. T is the number of target
// rows, W the width of a row.
struct RowLossCall {
  int64_t num_rows = 0;
  int64_t width = 0;
  LossFactors factors = {};
  bool only_in_vocabulary = true;  // no loss in rows with best < 0

  // The draft: logits [num_rows, W] and what takes their gradient: nothing (null), other memory, or
  // the logits' own. Both are float, or both bfloat16.
  const void* logits = nullptr;
  int64_t logits_stride = 0;
  void* gradient = nullptr;
  int64_t gradient_stride = 0;
  bool is_bfloat16 = false;
  const int64_t* data_tokens = nullptr;  // [num_rows] draft ids, -1: none; null unless ce_data
  const float* weights = nullptr;        // [num_rows], of the gradient; null: 1

  // The target: row r learns from positions[r], or from r if that is null.
  const int64_t* positions = nullptr;
  int64_t num_targets = 0;       // T
  const float* log_p = nullptr;  // [T, W], renormalised; -inf where p is 0
  int64_t log_p_stride = 0;
  const float* coverage = nullptr;     // [T]
  const int64_t* best = nullptr;       // [T], the draft's id of the verifier's choice, or -1
  const int64_t* likeliest = nullptr;  // [T], the same, or else p's argmax; null unless ce_argmax
  const int64_t* top = nullptr;        // [T, top_k], distinct; null unless topk
  int64_t top_k = 0;

  // Results, [num_rows] each. The loss is without the row's weight.
  float* loss = nullptr;
  float* alpha = nullptr;
  float* greedy_acceptance = nullptr;
  bool* agreement = nullptr;
  bool* in_vocabulary = nullptr;
};

// What is out of range in the call's index tensors, for a message, or null. Reads host memory.
const char* index_out_of_range(const RowLossCall& call);

// Computes rows [begin, end). Ranges that do not overlap may be computed by different threads; the
// result does not depend on the ranges. Indices must have been checked.
void row_losses_cpu(const RowLossCall& call, int64_t begin, int64_t end);

// Enqueues the whole call on `stream` (a cudaStream_t) and returns a cudaError_t as int. All
// pointers are device memory. An index out of range stops the kernel with a message; the error
// surfaces at the stream's next synchronisation.
int row_losses_cuda(const RowLossCall& call, void* stream);

// What cudaGetErrorString says of a code that row_losses_cuda returned.
const char* row_losses_error_message(int code);

}  // namespace speculators
