// Which nodes of a drafted tree the verifier accepts, and the token it adds: the raw-pointer
// interface.
//
// Node 0 of a tree is the last accepted token; the others are drafted, each after its parent. Row i
// of the verifier's logits is the distribution p of the token after node i. A walk begins at the
// root and goes from a node to that child whose token is accepted, until none is; the row there
// gives one token more, the bonus. A chain is the tree in which node i's parent is i - 1.
//
// Greedy: the child that is the row's largest logit.
//
// Sampling, with e = exp((z - max) / T) where top-k and top-p keep a token, else 0, and E their sum
// over the row (p = e / E):
//   kPointMass: a token y is drawn from p, and the walk goes to the child that is y. The uniform
//     number is the node's own.
//   the others: children are tested in the order of their index. After k rejections the token
//     comes from r_k, and child x was drawn from q_k, with
//       r_k = (e - c_k q)+ / S_k,         c_0 = 0, S_0 = E, M_0 = 1
//       q_k = q / M_k                     on what it can still draw
//       x is accepted if u q(x) S_k < (e(x) - c_k q(x)) M_k,  that is with min(1, r_k / q_k);
//       else c_{k+1} = c_k + S_k / M_k, and S_{k+1} is the sum of (e - c_{k+1} q)+:
//       r_{k+1} = (r_k - q_k)+ / its sum, the textbook's step, in one subtraction from p.
//     M_k is 1 with replacement; without it, the sum of q but for the tokens that were rejected.
//     (Of these, (e - c q)+ is 0 by itself: x is rejected only if r_k(x) < q_k(x).) The number u is
//     the child's own; the last token takes the root's, which no child has.
//
// A NaN among the logits counts as -inf. A row that is nothing else gives token 0.
//
// Nothing here depends on torch, Python or CUDA headers; every binding includes this file.
#pragma once

#include <cstdint>

namespace speculators {

enum class SamplingMode : int64_t { kPointMass, kWithReplacement, kWithoutReplacement };

// One call. Strides count elements; the V elements of a row are contiguous.
struct VerifyCall {
  int64_t batch = 0;  // B
  int64_t nodes = 0;  // N, with the root
  int64_t width = 0;  // V

  const void* logits = nullptr;  // [B, N, V], float or bfloat16
  int64_t batch_stride = 0;
  int64_t node_stride = 0;
  bool is_bfloat16 = false;
  const int64_t* tokens = nullptr;   // [B, N], contiguous; node 0's is not read
  const int64_t* parents = nullptr;  // [B, N], contiguous; an earlier node; of the root and of
                                     // nodes that are missing -1

  // For sampling.
  SamplingMode mode = SamplingMode::kPointMass;
  float temperature = 1;
  int64_t top_k = 0;  // 0: all
  double top_p = 1;
  const double* uniforms = nullptr;  // [B, N] in [0, 1)
  const float* q = nullptr;          // [B, >= parents + 1, V]: row i for the children of node i
  int64_t q_batch_stride = 0;
  int64_t q_node_stride = 0;
  int64_t q_nodes = 0;

  // Results.
  int64_t* path = nullptr;         // [B, N - 1], the accepted nodes, then -1
  int64_t* accepted = nullptr;     // [B]
  int64_t* next_tokens = nullptr;  // [B], the bonus
};

inline bool is_filtered(const VerifyCall& call) {
  return (call.top_k > 0 && call.top_k < call.width) || call.top_p < 1;
}

// What is out of range in the call's tensors: a name for a message and the place in [B, N].
struct OutOfRange {
  const char* what = nullptr;  // null: nothing
  int64_t place = 0;
};

// Reads host memory.
OutOfRange first_out_of_range(const VerifyCall& call);

// Walks the trees of sequences [begin, end). Ranges that do not overlap may be walked by different
// threads; the result does not depend on the ranges. Indices must have been checked.
void verify_greedy_cpu(const VerifyCall& call, int64_t begin, int64_t end);

// As above. Returns the place in [B, N] of a token that its q cannot have drawn, or -1.
int64_t verify_sampling_cpu(const VerifyCall& call, int64_t begin, int64_t end);

// Bytes of device memory that the two functions below need to work in.
int64_t verify_workspace_bytes(const VerifyCall& call);

// Enqueue the whole call on `stream` (a cudaStream_t) and return a cudaError_t as int. All pointers
// are device memory. What is out of range, or cannot have been drawn from q, stops the kernel with
// a message; the error surfaces at the stream's next synchronisation.
int verify_greedy_cuda(const VerifyCall& call, void* workspace, void* stream);
int verify_sampling_cuda(const VerifyCall& call, void* workspace, void* stream);

// What cudaGetErrorString says of a code that a function of this folder returned.
const char* tree_verification_error_message(int code);

}  // namespace speculators
