// The kernels that walk through a tree, one block for each sequence, and the one that weighs the
// residual of a row by as many blocks as it has chunks.
//
// A walk reads, of each row that it comes to, what summarise_rows_kernel left (a few numbers for
// each chunk), and to draw a token the one chunk that it lies in. With top-k or top-p it reads the
// row itself. After a rejection the sum of (e - c q)+ takes the whole row and the row of q; so
// walk_siblings_kernel stops at its first rejection, residual_kernel splits the row over blocks,
// and a second launch goes on. A chain has no more rejections than one; in a tree, further ones are
// weighed by the walk's own block. Nothing waits for the host.
//
// The formulas are in verification.h.
#pragma once

#include "csrc/tree_verification/row_block.cuh"
#include "csrc/tree_verification/row_selection.cuh"

namespace speculators {

inline constexpr int kNoNode = 0x7fffffff;

// One sequence's tree. All threads of the block call each function.
struct TreeOfSequence {
  const int64_t* tokens;
  const int64_t* parents;
  const double* uniforms;  // null where nothing is drawn
  int nodes;

  // Stops the kernel at what would read outside of the tensors, or is no uniform number.
  template <VerifyBug kBug>
  __device__ void check(const VerifyCall& call) const {
    const int end = nodes + (kBug == VerifyBug::kReadsPastTheTree ? 1 : 0);
    for (int node = threadIdx.x; node < end; node += blockDim.x) {
      const int64_t parent = parents[node];
      DEVICE_CHECK(parent >= -1 && parent < node, "verification: a parent is out of range");
      DEVICE_CHECK(uniforms == nullptr || (uniforms[node] >= 0 && uniforms[node] < 1),
                   "verification: a uniform number is not in [0, 1)");
      if (parent < 0) continue;
      DEVICE_CHECK(tokens[node] >= 0 && tokens[node] < call.width,
                   "verification: a token is out of range");
      DEVICE_CHECK(call.q == nullptr || parent < call.q_nodes,
                   "verification: draft_probabilities has no row for a parent");
    }
  }

  // The first child of `node` behind node `other`, or kNoNode.
  __device__ int child_after(int node, int other, BlockScratch* scratch) const {
    int found = kNoNode;
    for (int child = other + 1 + threadIdx.x; child < nodes; child += blockDim.x) {
      if (parents[child] == node) {
        found = child;
        break;
      }
    }
    return block_min(found, scratch);
  }

  // The first child of `node` with this token, or kNoNode.
  template <VerifyBug kBug>
  __device__ int child_with(int node, int64_t token, BlockScratch* scratch) const {
    constexpr int kSign = kBug == VerifyBug::kTakesTheLastEqualChild ? -1 : 1;
    int found = kNoNode;
    for (int child = node + 1 + threadIdx.x; child < nodes; child += blockDim.x) {
      const bool is_child = parents[child] == node ||
                            (kBug == VerifyBug::kTakesAnotherNodesChild && parents[child] >= 0);
      if (is_child && tokens[child] == token) found = min(found, kSign * child);
    }
    found = block_min(found, scratch);
    return found == kNoNode ? found : kSign * found;
  }
};

inline __device__ TreeOfSequence tree_of(const VerifyCall& call, int64_t sequence) {
  const int64_t root = sequence * call.nodes;
  return {call.tokens + root, call.parents + root,
          call.uniforms == nullptr ? nullptr : call.uniforms + root, static_cast<int>(call.nodes)};
}

inline __device__ void accept_node(const VerifyCall& call, int64_t sequence, int64_t place,
                                   int node) {
  if (threadIdx.x == 0) call.path[sequence * (call.nodes - 1) + place] = node;
}

template <VerifyBug kBug>
__device__ inline void end_walk(const VerifyCall& call, int64_t sequence, int64_t accepted,
                                int64_t token) {
  int64_t* const path = call.path + sequence * (call.nodes - 1);
  if (kBug != VerifyBug::kLeavesTheEndOfThePath) {
    for (int64_t i = accepted + threadIdx.x; i < call.nodes - 1; i += blockDim.x) path[i] = -1;
  }
  if (threadIdx.x == 0) {
    call.accepted[sequence] = accepted;
    call.next_tokens[sequence] = token;
  }
}

// The largest logit of a row that has been summarised.
template <VerifyBug kBug>
__device__ inline float largest_of_row(const VerifyWorkspace& work, int64_t row,
                                       BlockScratch* scratch) {
  float mine = -INFINITY;
  for (int c = threadIdx.x; c < work.chunks; c += blockDim.x) {
    if (kBug == VerifyBug::kIgnoresTheLastChunk && c > 0 && c == work.chunks - 1) continue;
    mine = fmaxf(mine, work.maxima[row * work.chunks + c]);
  }
  return block_max<VerifyBug::kNone>(mine, scratch);
}

template <VerifyBug kBug = VerifyBug::kNone>
__global__ void __launch_bounds__(kMaxTreeThreads)
    walk_greedy_kernel(const __grid_constant__ VerifyCall call,
                       const __grid_constant__ VerifyWorkspace work) {
  SPECULATORS_SHARED(BlockScratch, scratch);
  for (int64_t sequence = blockIdx.x; sequence < call.batch; sequence += gridDim.x) {
    const TreeOfSequence tree = tree_of(call, sequence);
    tree.check<kBug>(call);
    int node = 0;
    int64_t accepted = 0;
    for (;;) {
      const int64_t row = sequence * call.nodes + node;
      const float largest = largest_of_row<kBug>(work, row, &scratch);
      constexpr int kSign = kBug == VerifyBug::kTakesTheLastEqualChunk ? -1 : 1;
      int best = kNoNode;
      for (int c = threadIdx.x; c < work.chunks; c += blockDim.x) {
        const int64_t unit = row * work.chunks + c;
        if (work.maxima[unit] == largest) best = min(best, kSign * work.best[unit]);
      }
      best = kSign * block_min(best, &scratch);
      const int64_t token = largest == -INFINITY ? 0 : best;  // all are -inf or NaN
      const int child = tree.child_with<kBug>(node, token, &scratch);
      if (child == kNoNode) {
        end_walk<kBug>(call, sequence, accepted, token);
        break;
      }
      accept_node(call, sequence, accepted++, child);
      node = child;
    }
    if (kBug == VerifyBug::kStopsAfterOneSequence) break;
  }
}

// The sum of the weights of one chunk, for every thread.
template <typename T>
__device__ inline double weigh_chunk(const NodeRow<T>& row, int begin, int size,
                                     BlockScratch* scratch) {
  float mine = 0;
  for (int i = begin + threadIdx.x; i < min(begin + size, row.width); i += blockDim.x) {
    mine += row.weight(i);
  }
  return block_sum(static_cast<double>(mine), scratch);
}

// Comes to a node: the masses of its row's chunks into memory. Returns the row.
template <typename T, VerifyBug kBug>
__device__ inline NodeRow<T> enter_node(const VerifyCall& call, const VerifyWorkspace& work,
                                        int64_t sequence, int node, unsigned long long* histogram,
                                        BlockScratch* scratch) {
  NodeRow<T> row = row_of<T>(call, sequence, node);
  const int64_t number = sequence * call.nodes + node;
  row.max = largest_of_row<kBug>(work, number, scratch);
  double* const masses = work.masses + sequence * work.chunks;
  if (row.is_filtered) {
    filter_row<T, kBug>(call, &row, histogram, scratch);
    for (int c = 0; c < work.chunks; ++c) {
      const double mass = weigh_chunk(row, c * work.chunk, work.chunk, scratch);
      if (threadIdx.x == 0) masses[c] = mass;
    }
  } else {
    for (int c = threadIdx.x; c < work.chunks; c += blockDim.x) {
      const int64_t unit = number * work.chunks + c;
      float factor = weight_of(work.maxima[unit], row.max, row.log2_scale);
      if (kBug == VerifyBug::kForgetsToRescaleChunks) factor = 1;
      masses[c] = static_cast<double>(work.sums[unit]) * factor;
    }
  }
  if (kBug != VerifyBug::kReadsMassesTooEarly) __syncthreads();
  return row;
}

__device__ inline double sum_of_chunks(const double* values, int chunks, BlockScratch* scratch) {
  double mine = 0;
  for (int c = threadIdx.x; c < chunks; c += blockDim.x) mine += values[c];
  return block_sum(mine, scratch);
}

// The lowest index of the largest logit, 0 if there is none: what a row without any mass gives.
template <typename T>
__device__ inline int index_of_largest(const NodeRow<T>& row, BlockScratch* scratch) {
  int found = kNoNode;
  for (int i = threadIdx.x; i < row.width && found == kNoNode; i += blockDim.x) {
    if (to_float(row.z[i]) == row.max && row.max > -INFINITY) found = i;
  }
  found = block_min(found, scratch);
  return found == kNoNode ? 0 : found;
}

// The chunk in which the running sum of masses passes `uniform` times their total, or -1 if they
// have none; scratch->target becomes what is left of that. For every thread.
inline __device__ int find_chunk(const double* masses, int chunks, double uniform,
                                 BlockScratch* scratch) {
  if (threadIdx.x == 0) {
    double total = 0;
    for (int c = 0; c < chunks; ++c) total += masses[c];
    double target = uniform * total;
    int found = -1;  // rounding may keep the sum from passing: then it is the last with a mass
    for (int c = 0; c < chunks; ++c) {
      if (!(masses[c] > 0)) continue;
      found = c;
      if (target < masses[c]) break;
      target -= masses[c];
    }
    scratch->found = found;
    scratch->target = target;
  }
  __syncthreads();
  const int found = scratch->found;
  __syncthreads();
  return found;
}

// The sum over this thread and those before it.
inline __device__ double scan_block(double value, BlockScratch* scratch) {
  const int lane = threadIdx.x % 32;
  for (int distance = 1; distance < 32; distance *= 2) {
    const double other = __shfl_up_sync(0xffffffffu, value, distance);
    if (lane >= distance) value += other;
  }
  if (lane == 31) scratch->doubles[threadIdx.x / 32] = value;
  __syncthreads();
  for (unsigned w = 0; w < threadIdx.x / 32; ++w) value += scratch->doubles[w];
  __syncthreads();
  return value;
}

// Draws a token by inversion, in the order of the tokens; never one of weight 0, unless all are:
// then the largest logit. For every thread.
template <typename T, VerifyBug kBug>
__device__ inline int draw_token(const NodeRow<T>& row, const VerifyWorkspace& work,
                                 int64_t sequence, double uniform, BlockScratch* scratch) {
  int chunk = find_chunk(work.masses + sequence * work.chunks, work.chunks, uniform, scratch);
  if (kBug == VerifyBug::kDrawsFromTheFirstChunk) chunk = min(chunk, 0);
  if (chunk < 0) return index_of_largest(row, scratch);
  const double target = scratch->target;
  const int items = (work.chunk + blockDim.x - 1) / blockDim.x;
  const int begin = chunk * work.chunk + static_cast<int>(threadIdx.x) * items;
  int end = min(min(begin + items, (chunk + 1) * work.chunk), row.width);
  if (kBug == VerifyBug::kDrawsPastTheRow) end = begin + items;
  double mine = 0;
  for (int i = begin; i < end; ++i) mine += row.weight(i);
  double sum = scan_block(mine, scratch);
  if (kBug == VerifyBug::kForgetsTheThreadsBefore) sum = mine;
  const int last = 0x7fffffff - static_cast<int>(blockDim.x);
  // The first thread whose sum passes the target; if rounding keeps all from it, the last one that
  // has a weight.
  int mark = kNoNode;
  if (mine > 0) mark = sum > target ? threadIdx.x : last - static_cast<int>(threadIdx.x);
  const int first = block_min(mark, scratch);
  if (first == kNoNode) return index_of_largest(row, scratch);
  const int winner = first < static_cast<int>(blockDim.x) ? first : last - first;
  if (static_cast<int>(threadIdx.x) == winner) {
    double rest = target - (sum - mine);
    int token = begin;
    for (int i = begin; i < end; ++i) {
      const float weight = row.weight(i);
      if (!(weight > 0)) continue;
      token = i;
      if (rest < weight) break;
      rest -= weight;
    }
    scratch->found = token;
  }
  __syncthreads();
  const int token = scratch->found;
  __syncthreads();
  return token;
}

template <typename T, VerifyBug kBug = VerifyBug::kNone>
__global__ void __launch_bounds__(kMaxTreeThreads)
    walk_point_mass_kernel(const __grid_constant__ VerifyCall call,
                           const __grid_constant__ VerifyWorkspace work) {
  SPECULATORS_SHARED(BlockScratch, scratch);
  SPECULATORS_SHARED(unsigned long long[kBins], histogram);
  for (int64_t sequence = blockIdx.x; sequence < call.batch; sequence += gridDim.x) {
    const TreeOfSequence tree = tree_of(call, sequence);
    tree.check<kBug>(call);
    int node = 0;
    int64_t accepted = 0;
    for (;;) {
      const NodeRow<T> row = enter_node<T, kBug>(call, work, sequence, node, histogram, &scratch);
      const double uniform = call.uniforms[sequence * call.nodes + node];
      const int64_t token = draw_token<T, kBug>(row, work, sequence, uniform, &scratch);
      const int child = tree.child_with<kBug>(node, token, &scratch);
      if (child == kNoNode) {
        end_walk<kBug>(call, sequence, accepted, token);
        break;
      }
      accept_node(call, sequence, accepted++, child);
      node = child;
    }
    if (kBug == VerifyBug::kStopsAfterOneSequence) break;
  }
}

// Weighs (e - c q)+ in one chunk, and without replacement what is left of q.
template <typename T, VerifyBug kBug>
__device__ inline void weigh_residual(const VerifyCall& call, const VerifyWorkspace& work,
                                      const NodeRow<T>& row, int64_t sequence, int num_seen,
                                      int chunk, BlockScratch* scratch) {
  const int begin = chunk * work.chunk;
  int end = min(begin + work.chunk, row.width);
  if (kBug == VerifyBug::kResidualReadsPastTheRow) end = begin + work.chunk;
  const int* seen = work.seen + sequence * call.nodes;
  float mine = 0;
  float rest = 0;
  for (int i = begin + threadIdx.x; i < end; i += blockDim.x) {
    mine += row.weight(i);
    if (call.mode != SamplingMode::kWithoutReplacement) continue;
    bool is_seen = false;
    for (int s = 0; s < num_seen; ++s) is_seen = is_seen || seen[s] == i;
    if (kBug == VerifyBug::kKeepsQOfTheSeen) is_seen = false;
    rest += is_seen ? 0.0f : row.q[i];
  }
  const double mass = block_sum(static_cast<double>(mine), scratch);
  const double rest_mass = block_sum(static_cast<double>(rest), scratch);
  if (threadIdx.x == 0) {
    work.masses[sequence * work.chunks + chunk] = mass;
    work.rest[sequence * work.chunks + chunk] = rest_mass;
  }
}

// Weighs the residual at which each walk has stopped.
template <typename T, VerifyBug kBug = VerifyBug::kNone>
__global__ void __launch_bounds__(kMaxTreeThreads, 4)
    residual_kernel(const __grid_constant__ VerifyCall call,
                    const __grid_constant__ VerifyWorkspace work) {
  SPECULATORS_SHARED(BlockScratch, scratch);
  const int64_t units = call.batch * work.chunks;
  for (int64_t unit = blockIdx.x; unit < units; unit += gridDim.x) {
    const int64_t sequence = unit / work.chunks;
    const WalkState& state = work.states[sequence];
    if (state.is_pending == 0) continue;
    if (kBug == VerifyBug::kResidualSkipsSequences && sequence > 0) continue;
    const int node = kBug == VerifyBug::kResidualOfAnotherNode ? 0 : state.node;
    NodeRow<T> row = row_of<T>(call, sequence, node);
    row.max = state.max;
    row.least = state.least;
    row.first_tie = state.first_tie;
    row.c = kBug == VerifyBug::kResidualForgetsQ ? 0.0f : static_cast<float>(state.c);
    int chunk = static_cast<int>(unit % work.chunks);
    if (kBug == VerifyBug::kResidualOfTheFirstChunk) chunk = 0;
    weigh_residual<T, kBug>(call, work, row, sequence, state.num_seen, chunk, &scratch);
  }
}

// One sequence's walk over siblings that were drawn from q.
template <typename T, VerifyBug kBug>
struct SiblingWalk {
  const VerifyCall& call;
  const VerifyWorkspace& work;
  const int64_t sequence;
  const TreeOfSequence tree;
  unsigned long long* const histogram;
  BlockScratch* const scratch;
  NodeRow<T> row = {};
  WalkState at = {};

  __device__ void enter(int node) {
    row = enter_node<T, kBug>(call, work, sequence, node, histogram, scratch);
    at.node = node;
    at.max = row.max;
    at.least = row.least;
    at.first_tie = row.first_tie;
    if (kBug != VerifyBug::kKeepsTheResidualOfTheParent || node == 0) {
      at.c = 0;
      at.m = 1;
    }
    at.s = sum_of_chunks(work.masses + sequence * work.chunks, work.chunks, scratch);
    at.num_seen = 0;
    at.child = tree.child_after(node, node, scratch);
  }

  __device__ void resume() {
    at = work.states[sequence];
    row = row_of<T>(call, sequence, at.node);
    row.max = at.max;
    row.least = at.least;
    row.first_tie = at.first_tie;
    row.c = static_cast<float>(at.c);
  }

  // Whether the child at which the walk is is accepted.
  __device__ bool accepts() const {
    const int token = static_cast<int>(tree.tokens[at.child]);
    const int* seen = work.seen + sequence * call.nodes;
    bool is_possible = row.q[token] > 0;
    if (call.mode == SamplingMode::kWithoutReplacement) {
      for (int s = 0; s < at.num_seen; ++s) is_possible = is_possible && seen[s] != token;
    }
    DEVICE_CHECK(is_possible, "verification: a token cannot have been drawn from its q");
    NodeRow<T> whole = row;
    whole.c = 0;
    const double q = row.q[token];
    const double rest = whole.weight(token) - at.c * q;
    const int own = kBug == VerifyBug::kTestsWithTheRootsNumber ? 0 : at.child;
    const double uniform = call.uniforms[sequence * call.nodes + own];
    if (kBug == VerifyBug::kAcceptsWithTheUnscaledRatio) return uniform * q < rest;
    return uniform * q * at.s < rest * at.m;
  }

  __device__ void note_rejection() {
    if (threadIdx.x == 0) {
      work.seen[sequence * call.nodes + at.num_seen] = static_cast<int>(tree.tokens[at.child]);
    }
    ++at.num_seen;
    at.before = at.c;
    if (kBug != VerifyBug::kForgetsTheRejection) at.c += at.s / at.m;
    row.c = static_cast<float>(at.c);
    __syncthreads();
  }

  __device__ void weigh() {
    for (int c = 0; c < work.chunks; ++c) {
      weigh_residual<T, kBug>(call, work, row, sequence, at.num_seen, c, scratch);
    }
    __syncthreads();
  }

  // After a rejection was weighed: to the next child. If nothing is left of p, it is q but for
  // rounding, and the rejection was rounding, too: the token then comes from what was before it.
  __device__ void settle() {
    at.s = sum_of_chunks(work.masses + sequence * work.chunks, work.chunks, scratch);
    if (!(at.s > 0)) {
      row.c = static_cast<float>(at.before);
      weigh();
      at.child = kNoNode;
      return;
    }
    if (call.mode == SamplingMode::kWithoutReplacement) {
      at.m = sum_of_chunks(work.rest + sequence * work.chunks, work.chunks, scratch);
    }
    at.child = tree.child_after(at.node, at.child, scratch);
  }
};

// kResume: goes on where residual_kernel has weighed, to the end. Else it stops at a rejection.
template <typename T, bool kResume, VerifyBug kBug = VerifyBug::kNone>
__global__ void __launch_bounds__(kMaxTreeThreads)
    walk_siblings_kernel(const __grid_constant__ VerifyCall call,
                         const __grid_constant__ VerifyWorkspace work) {
  SPECULATORS_SHARED(BlockScratch, scratch);
  SPECULATORS_SHARED(unsigned long long[kBins], histogram);
  for (int64_t sequence = blockIdx.x; sequence < call.batch; sequence += gridDim.x) {
    SiblingWalk<T, kBug> walk = {call,      work,    sequence, tree_of(call, sequence),
                                 histogram, &scratch};
    if (kResume) {
      walk.resume();
      if (walk.at.is_pending == 0) continue;
      walk.settle();
    } else {
      walk.tree.template check<kBug>(call);
      walk.enter(0);
    }
    bool is_pending = false;
    while (walk.at.child != kNoNode) {
      if (walk.accepts()) {
        const int child = walk.at.child;
        accept_node(call, sequence, walk.at.accepted++, child);
        walk.enter(child);
        continue;
      }
      walk.note_rejection();
      if (!kResume) {
        is_pending = true;
        break;
      }
      walk.weigh();
      walk.settle();
    }
    walk.at.is_pending = is_pending ? 1 : 0;
    if (threadIdx.x == 0 && !kResume) work.states[sequence] = walk.at;
    if (!is_pending) {
      const double uniform = call.uniforms[sequence * call.nodes];
      const int token = draw_token<T, kBug>(walk.row, work, sequence, uniform, &scratch);
      end_walk<kBug>(call, sequence, walk.at.accepted, token);
    }
    if (kBug == VerifyBug::kStopsAfterOneSequence) break;
  }
}

}  // namespace speculators
