// The CUDA kernel of build_tree: one block for each sequence.
//
// Nothing is sorted. A candidate's rank is the number of candidates that come before it, which each
// thread counts by itself: M^2 comparisons of integers that lie in the first cache, microseconds
// for the hundreds of candidates that a draft makes. So the result depends on no order of threads,
// and there is no limit to M or n.
//
// Compiled by nvcc through build_tree_cuda.cu, and by g++ under csrc/common/cuda_emulator.h in
// tests.
#pragma once

#include <cmath>
#include <cstdint>

#include "csrc/common/cuda_portability.h"
#include "csrc/tree_verification/build_tree.h"

namespace speculators {

inline constexpr int kMaxBuildThreads = 256;

// Deliberate mistakes that tests compile in, to show that they would be noticed.
enum class BuildBug {
  kNone,
  kTakesTheLaterOfEqualScores,
  kIgnoresTheParentsScore,
  kKeepsWhatIsNoCandidate,
  kSortsByScoreAlone,
  kForgetsTheNodeItself,
  kSeesOneWordOnly,
  kLinksNodesOfOtherParents,
  kCountsRanksTooEarly,
  kWritesMasksPastTheTree,
  kStopsAfterOneSequence,
};

// Memory to work in.
struct BuildWorkspace {
  float* scores;  // [B, M], never more than the parent's
  int* depths;    // [B, M]
  int* node_of;   // [B, M], or -1
  int* order;     // [B, N], the candidates kept, by rank
};

inline int64_t bytes_of(const TreeBuildCall& call) {
  return call.batch * (3 * call.candidates + call.nodes) * static_cast<int64_t>(sizeof(int));
}

inline BuildWorkspace workspace_in(void* memory, const TreeBuildCall& call) {
  const int64_t size = call.batch * call.candidates;
  BuildWorkspace work = {};
  work.scores = static_cast<float*>(memory);
  work.depths = reinterpret_cast<int*>(work.scores + size);
  work.node_of = work.depths + size;
  work.order = work.node_of + size;
  return work;
}

// One sequence's part of everything.
struct TreeBuilder {
  const int64_t* tokens;
  const int64_t* parents;
  const float* given;
  float* scores;
  int* depths;
  int* node_of;
  int* order;
  int candidates;
  int nodes;

  template <BuildBug kBug>
  __device__ void bound_scores() const {
    for (int i = threadIdx.x; i < candidates; i += blockDim.x) {
      float score = INFINITY;
      int depth = 0;
      for (int64_t at = i; at >= 0; ++depth) {
        const float own = given[at];
        if (kBug != BuildBug::kIgnoresTheParentsScore || at == i) {
          score = own == own ? fminf(score, own) : -INFINITY;
        }
        DEVICE_CHECK(parents[at] >= -1 && parents[at] < at, "build_tree: a parent is out of range");
        at = parents[at];
      }
      scores[i] = score;
      depths[i] = depth;
      node_of[i] = -1;
    }
  }

  // Which candidate has which rank; counts those that have one less than the nodes.
  template <BuildBug kBug>
  __device__ void rank(int* count) const {
    for (int i = threadIdx.x; i < candidates; i += blockDim.x) {
      if (scores[i] == -INFINITY && kBug != BuildBug::kKeepsWhatIsNoCandidate) continue;
      int before = 0;
      for (int j = 0; j < candidates && before < nodes - 1; ++j) {
        const bool is_first = kBug == BuildBug::kTakesTheLaterOfEqualScores ? j > i : j < i;
        before += scores[j] > scores[i] || (scores[j] == scores[i] && is_first) ? 1 : 0;
      }
      if (before >= nodes - 1) continue;
      order[before] = i;
      atomicAdd(count, 1);
    }
  }

  template <BuildBug kBug>
  __device__ void number_nodes(int count) const {
    for (int r = threadIdx.x; r < count; r += blockDim.x) {
      const int depth = depths[order[r]];
      int before = 0;
      for (int other = 0; other < count; ++other) {
        const int other_depth = depths[order[other]];
        before += other_depth < depth || (other_depth == depth && other < r) ? 1 : 0;
      }
      node_of[order[r]] = 1 + (kBug == BuildBug::kSortsByScoreAlone ? r : before);
    }
  }

  // The node of a candidate's parent.
  __device__ int node_above(int64_t candidate) const {
    return parents[candidate] < 0 ? 0 : node_of[parents[candidate]];
  }
};

inline __device__ TreeBuilder builder_of(const TreeBuildCall& call, const BuildWorkspace& work,
                                         int64_t sequence) {
  const int64_t first = sequence * call.candidates;
  return {call.tokens + first,
          call.parents + first,
          call.scores + first,
          work.scores + first,
          work.depths + first,
          work.node_of + first,
          work.order + sequence * call.nodes,
          static_cast<int>(call.candidates),
          static_cast<int>(call.nodes)};
}

// What each node is and sees; `candidate` is -1 for the root and missing nodes.
template <BuildBug kBug>
__device__ inline void write_node(const TreeBuildCall& call, const TreeBuilder& builder,
                                  int64_t sequence, int node, int candidate) {
  const int64_t place = sequence * call.nodes + node;
  const int words = static_cast<int>((call.nodes + 63) / 64);
  const bool is_drafted = candidate >= 0;
  const int depth = is_drafted ? builder.depths[candidate] : node == 0 ? 0 : -1;
  call.node_tokens[place] = is_drafted ? builder.tokens[candidate] : call.root_tokens[sequence];
  call.node_parents[place] = is_drafted ? builder.node_above(candidate) : -1;
  call.node_depths[place] = depth;
  call.node_positions[place] = call.root_positions[sequence] + (depth > 0 ? depth : 0);
  call.node_candidates[place] = candidate;
  uint64_t* const mask = call.ancestors + place * words;
  for (int word = 0; word < words; ++word) mask[word] = 0;
  const auto see = [&](int other) {
    const int word = kBug == BuildBug::kSeesOneWordOnly ? 0 : other / 64;
    mask[word] |= uint64_t{1} << (other % 64);
  };
  if (kBug != BuildBug::kForgetsTheNodeItself) see(node);
  if (kBug == BuildBug::kWritesMasksPastTheTree) mask[words] = 0;
  if (!is_drafted) return;
  for (int64_t at = builder.parents[candidate]; at >= 0; at = builder.parents[at]) {
    see(builder.node_of[at]);
  }
  see(0);
}

template <BuildBug kBug>
__device__ inline void link_nodes(const TreeBuildCall& call, int64_t sequence) {
  const int nodes = static_cast<int>(call.nodes);
  const int64_t* parents = call.node_parents + sequence * call.nodes;
  for (int node = threadIdx.x; node < nodes; node += blockDim.x) {
    int child = -1;
    int sibling = -1;
    for (int other = nodes - 1; other > node; --other) {
      if (parents[other] == node) child = other;
      const bool is_sibling = kBug == BuildBug::kLinksNodesOfOtherParents
                                  ? parents[other] >= 0
                                  : parents[other] >= 0 && parents[other] == parents[node];
      if (is_sibling) sibling = other;
    }
    call.first_children[sequence * call.nodes + node] = child;
    call.next_siblings[sequence * call.nodes + node] = sibling;
  }
}

template <BuildBug kBug = BuildBug::kNone>
__global__ void __launch_bounds__(kMaxBuildThreads)
    build_tree_kernel(const __grid_constant__ TreeBuildCall call,
                      const __grid_constant__ BuildWorkspace work) {
  SPECULATORS_SHARED(int, count);
  for (int64_t sequence = blockIdx.x; sequence < call.batch; sequence += gridDim.x) {
    const TreeBuilder builder = builder_of(call, work, sequence);
    if (threadIdx.x == 0) count = 0;
    builder.bound_scores<kBug>();
    __syncthreads();
    builder.rank<kBug>(&count);
    if (kBug != BuildBug::kCountsRanksTooEarly) __syncthreads();
    builder.number_nodes<kBug>(count);
    __syncthreads();
    // Node numbers are not ranks, so each thread writes the node of a rank.
    for (int i = threadIdx.x; i < call.nodes; i += blockDim.x) {
      const bool is_drafted = i > 0 && i <= count;
      const int candidate = is_drafted ? builder.order[i - 1] : -1;
      write_node<kBug>(call, builder, sequence, is_drafted ? builder.node_of[candidate] : i,
                       candidate);
    }
    __syncthreads();
    link_nodes<kBug>(call, sequence);
    if (kBug == BuildBug::kStopsAfterOneSequence) break;
  }
}

}  // namespace speculators
