// Draft attention's later steps: the raw-pointer interface.
//
// At step s of train-time test a row sees the rows of step 0 up to its own, and of each step 1 to s
// the same row alone. Flash attention gives the first part, an output o0 and the logarithm lse0 of
// its sum of exponentials; the second part is s more terms of the same softmax:
//
//   l_i = scale q . k_i       lse = log(exp(lse0) + sum exp(l_i))
//   o = exp(lse0 - lse) o0 + sum exp(l_i - lse) v_i
//
// Its gradient, given do: with p_i = exp(l_i - lse), delta = do . o, and dl_i = p_i (do . v_i -
// delta),
//
//   dq = scale sum dl_i k_i      dk_i = scale sum dl_i q      dv_i = sum p_i do
//
// where the sums of dk_i and dv_i are over the query heads that share a key head. What step 0 adds
// to dq is a flash kernel's, which is given the merged o and lse. Both directions are one pass over
// memory: nothing is concatenated, and no key is repeated for its query heads.
//
// Nothing here depends on torch, Python or CUDA headers; every binding includes this file.
#pragma once

#include <cstdint>

namespace speculators {

// The most later steps of one call; the table of their tensors is a kernel's parameter (4 KiB).
inline constexpr int kMaxDiagonals = 32;

// Vectors of D elements, one for each batch row b, head h and row r, contiguous in themselves.
// Strides count elements.
struct HeadRows {
  const void* data = nullptr;
  int64_t batch_stride = 0;
  int64_t head_stride = 0;
  int64_t row_stride = 0;
};

// What both directions read. Query head h shares key head h / (query_heads / key_heads).
struct DraftMergeCall {
  int64_t batch = 0;
  int64_t rows = 0;
  int64_t query_heads = 0;
  int64_t key_heads = 0;
  int64_t head_size = 0;  // D
  int64_t num_diagonals = 0;
  float scale = 1;
  bool is_bfloat16 = false;  // else float; of all but lse

  HeadRows query;
  HeadRows keys[kMaxDiagonals];
  HeadRows values[kMaxDiagonals];

  // Forward: step 0's on entry, the whole softmax's on return. Backward: the whole softmax's.
  HeadRows output;
  HeadRows logsumexp;  // float, D = 1

  // Backward only.
  HeadRows grad_output;
  HeadRows grad_query;               // added to
  void* grad_keys_values = nullptr;  // [2, num_diagonals, batch, rows, key_heads, D], contiguous
};

// Of what a thread or warp takes at a time: the query heads of one key head, for one row.
inline int64_t num_units(const DraftMergeCall& call) {
  return call.batch * call.rows * call.key_heads;
}

// Computes units [begin, end). Ranges that do not overlap may be computed by different threads; the
// result does not depend on the ranges.
void draft_merge_cpu(const DraftMergeCall& call, int64_t begin, int64_t end);
void draft_merge_backward_cpu(const DraftMergeCall& call, int64_t begin, int64_t end);

// The largest D of the CUDA kernels.
inline constexpr int64_t kMaxCudaHeadSize = 256;

// The most pairs of a later step and a query head of one key head: in backward, each has 8 bytes of
// a block's shared memory, of which there are 48 KiB.
inline constexpr int64_t kMaxCudaPairs = 6144;

inline int64_t num_pairs(const DraftMergeCall& call) {
  return call.query_heads / call.key_heads * call.num_diagonals;
}

// Enqueues the whole call on `stream` (a cudaStream_t) and returns a cudaError_t as int. All
// pointers are device memory.
int draft_merge_cuda(const DraftMergeCall& call, void* stream);
int draft_merge_backward_cuda(const DraftMergeCall& call, void* stream);

// What cudaGetErrorString says of a code that they returned.
const char* draft_merge_error_message(int code);

}  // namespace speculators
