// The best nodes of a drafted tree, and how they hang together: the raw-pointer interface.
//
// A draft gives M candidates for each of B sequences: a token, the candidate it continues, and a
// score, the sum of the log-probabilities from the root on. A verifier reads n of them in one pass.
// The best n are connected, because a child never scores more than its parent; where a score says
// otherwise (rounding, NaN), it counts as its parent's, or as none. Equal scores go to the lower
// index, which is the parent's, since a parent comes before its children.
//
// The tree that results has N = n + 1 nodes: node 0 is the root, the last accepted token, and the
// others are sorted by depth, then by score. The definition is
// python/speculators/ops/tree_verification_reference.py.
//
// Nothing here depends on torch, Python or CUDA headers; every binding includes this file.
#pragma once

#include <cstdint>

namespace speculators {

// One call. All tensors are contiguous.
struct TreeBuildCall {
  int64_t batch = 0;       // B
  int64_t candidates = 0;  // M, less than 2^31
  int64_t nodes = 0;       // N, with the root

  const int64_t* tokens = nullptr;          // [B, M]
  const int64_t* parents = nullptr;         // [B, M], an earlier candidate, or -1: the root
  const float* scores = nullptr;            // [B, M]; -inf and NaN: no candidate
  const int64_t* root_tokens = nullptr;     // [B]
  const int64_t* root_positions = nullptr;  // [B]

  // Results. -1 where there is no such node, or no more nodes.
  int64_t* node_tokens = nullptr;      // [B, N]; of missing nodes the root's
  int64_t* node_parents = nullptr;     // [B, N]; of the root -1
  int64_t* node_depths = nullptr;      // [B, N]; of the root 0
  int64_t* node_positions = nullptr;   // [B, N], the root's + depth; of missing nodes the root's
  uint64_t* ancestors = nullptr;       // [B, N, words], with the node itself
  int64_t* first_children = nullptr;   // [B, N]
  int64_t* next_siblings = nullptr;    // [B, N]
  int64_t* node_candidates = nullptr;  // [B, N]; of the root -1
};

// 64-bit words of one node's mask: bit j % 64 of word j / 64 says whether it sees node j.
inline int64_t mask_words(int64_t nodes) { return (nodes + 63) / 64; }

// Which parent is not an earlier candidate or -1: its index in [B, M], or -1. Reads host memory.
int64_t first_parent_out_of_range(const TreeBuildCall& call);

// Builds the trees of sequences [begin, end). Ranges that do not overlap may be built by different
// threads. Parents must have been checked.
void build_tree_cpu(const TreeBuildCall& call, int64_t begin, int64_t end);

// Bytes of device memory that build_tree_cuda needs to work in.
int64_t build_tree_workspace_bytes(const TreeBuildCall& call);

// Enqueues the whole call on `stream` (a cudaStream_t) and returns a cudaError_t as int. All
// pointers are device memory. A parent out of range stops the kernel with a message; the error
// surfaces at the stream's next synchronisation.
int build_tree_cuda(const TreeBuildCall& call, void* workspace, void* stream);

}  // namespace speculators
