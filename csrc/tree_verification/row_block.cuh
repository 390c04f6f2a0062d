// What the CUDA kernels of verification share: sums over a block, the weights of a row, the memory
// that one kernel leaves for the next, and the mistakes that tests plant.
#pragma once

#include <cmath>
#include <cstdint>

#include "csrc/common/cuda_portability.h"
#include "csrc/tree_verification/verification.h"
#include "cuda_bf16.h"

namespace speculators {

// The most threads of a block, whose size is a multiple of 32.
inline constexpr int kMaxTreeThreads = 256;
inline constexpr int kMaxTreeWarps = kMaxTreeThreads / 32;
// Logits of a chunk that one thread takes.
inline constexpr int kItems = 16;
inline constexpr float kLog2E = 1.4426950408889634f;

// Deliberate mistakes that tests compile in, to show that they would be noticed.
enum class VerifyBug {
  kNone,
  // summarise_rows_kernel
  kSummaryReadsPastTheRow,
  kSummaryTakesTheLastOfEqualLogits,
  kSummaryForgetsTheTemperature,
  kSummaryIgnoresNodeStride,
  kSummaryStopsAfterOneUnit,
  kReadsTheLargestTooEarly,
  // select_key
  kKeepsTheOldHistogram,
  kTopKLosesTies,
  kTopPKeepsAllTies,
  kTopPIgnoresTopK,
  kReadsTheHistogramTooEarly,
  // every walk
  kTakesTheLastEqualChild,
  kTakesAnotherNodesChild,
  kLeavesTheEndOfThePath,
  kStopsAfterOneSequence,
  kReadsPastTheTree,
  // walk_greedy_kernel
  kTakesTheLastEqualChunk,
  kIgnoresTheLastChunk,
  // drawing
  kForgetsToRescaleChunks,
  kDrawsFromTheFirstChunk,
  kForgetsTheThreadsBefore,
  kDrawsPastTheRow,
  kReadsMassesTooEarly,
  // walk_siblings_kernel
  kAcceptsWithTheUnscaledRatio,
  kForgetsTheRejection,
  kKeepsQOfTheSeen,
  kTestsWithTheRootsNumber,
  kKeepsTheResidualOfTheParent,
  // residual_kernel
  kResidualOfAnotherNode,
  kResidualForgetsQ,
  kResidualReadsPastTheRow,
  kResidualOfTheFirstChunk,
  kResidualSkipsSequences,
};

// What a walk has come to when it stops at a rejection.
struct WalkState {
  double c, before, s, m;
  int64_t accepted;
  int node, child, num_seen, is_pending;
  float max;
  unsigned least;
  int first_tie;
};

// Memory between the kernels of a call; rows are B * N.
struct VerifyWorkspace {
  double* masses;     // [B, chunks], of the row that a walk is at
  double* rest;       // [B, chunks], what is left of q
  WalkState* states;  // [B]
  float* maxima;      // [rows, chunks]
  float* sums;        // [rows, chunks], of exp((z - maximum) / T)
  int* best;          // [rows, chunks], in place of the sums: the lowest index of the maximum
  int* seen;          // [B, N], rejected tokens
  int chunk;          // logits of a chunk
  int chunks;
};

inline int64_t bytes_of(const VerifyCall& call, int64_t chunks) {
  const int64_t rows = call.batch * call.nodes;
  return call.batch * (2 * chunks * static_cast<int64_t>(sizeof(double)) +
                       static_cast<int64_t>(sizeof(WalkState))) +
         rows * (2 * chunks + 1) * static_cast<int64_t>(sizeof(float));
}

// `memory` is aligned for a double.
inline VerifyWorkspace workspace_in(void* memory, const VerifyCall& call, int chunk) {
  const int64_t chunks = (call.width + chunk - 1) / chunk;
  const int64_t rows = call.batch * call.nodes;
  VerifyWorkspace work = {};
  work.masses = static_cast<double*>(memory);
  work.rest = work.masses + call.batch * chunks;
  work.states = reinterpret_cast<WalkState*>(work.rest + call.batch * chunks);
  work.maxima = reinterpret_cast<float*>(work.states + call.batch);
  work.sums = work.maxima + rows * chunks;
  work.best = reinterpret_cast<int*>(work.sums);
  work.seen = reinterpret_cast<int*>(work.sums + rows * chunks);
  work.chunk = chunk;
  work.chunks = static_cast<int>(chunks);
  return work;
}

// What the threads of a block tell each other.
struct BlockScratch {
  float floats[kMaxTreeWarps];
  double doubles[kMaxTreeWarps];
  int ints[kMaxTreeWarps];
  double target;
  int found;
  unsigned long long goal;
};

inline __device__ float to_float(float value) { return value; }
inline __device__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

template <VerifyBug kBug>
__device__ inline float block_max(float value, BlockScratch* scratch) {
  for (int distance = 16; distance > 0; distance /= 2) {
    value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, distance));
  }
  if (threadIdx.x % 32 == 0) scratch->floats[threadIdx.x / 32] = value;
  if (kBug != VerifyBug::kReadsTheLargestTooEarly) __syncthreads();
  float result = scratch->floats[0];
  for (unsigned w = 1; w < blockDim.x / 32; ++w) result = fmaxf(result, scratch->floats[w]);
  __syncthreads();  // the scratch may be used again
  return result;
}

inline __device__ int block_min(int value, BlockScratch* scratch) {
  value = __reduce_min_sync(0xffffffffu, value);
  if (threadIdx.x % 32 == 0) scratch->ints[threadIdx.x / 32] = value;
  __syncthreads();
  int result = scratch->ints[0];
  for (unsigned w = 1; w < blockDim.x / 32; ++w) result = min(result, scratch->ints[w]);
  __syncthreads();
  return result;
}

inline __device__ double block_sum(double value, BlockScratch* scratch) {
  for (int distance = 16; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(0xffffffffu, value, distance);
  }
  if (threadIdx.x % 32 == 0) scratch->doubles[threadIdx.x / 32] = value;
  __syncthreads();
  double total = 0;
  for (unsigned w = 0; w < blockDim.x / 32; ++w) total += scratch->doubles[w];
  __syncthreads();
  return total;
}

// exp((z - max) / T); 0 for what is not a number: NaN, and an infinity less itself.
inline __device__ float weight_of(float z, float max, float log2_scale) {
  const float d = (z - max) * log2_scale;
  return d == d ? exp2f(d) : 0.0f;
}

// z / T as a number that sorts as it does; -0 as 0, NaN as -inf.
inline __device__ float score_of(float z, float temperature) {
  return z == z ? z / temperature + 0.0f : -INFINITY;
}

inline __device__ unsigned key_of(float score) {
  const unsigned bits = __float_as_uint(score);
  return (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
}

// The weights of one row's tokens: e where top-k and top-p keep them, (e - c q)+ after rejections.
template <typename T>
struct NodeRow {
  const T* z;
  const float* q;
  int width;
  float max;
  float temperature;
  float log2_scale;
  bool is_filtered;
  unsigned least;  // the smallest key that is kept ...
  int first_tie;   // ... and the lowest index with that key
  float c;

  __device__ float weight(int i) const {
    const float value = to_float(z[i]);
    if (is_filtered) {
      const unsigned key = key_of(score_of(value, temperature));
      if (key < least || (key == least && i < first_tie)) return 0;
    }
    const float e = weight_of(value, max, log2_scale);
    return c > 0 ? fmaxf(e - c * q[i], 0.0f) : e;
  }
};

template <typename T>
__device__ inline NodeRow<T> row_of(const VerifyCall& call, int64_t sequence, int node) {
  NodeRow<T> row = {};
  row.z =
      static_cast<const T*>(call.logits) + sequence * call.batch_stride + node * call.node_stride;
  row.q = call.q == nullptr ? nullptr
                            : call.q + sequence * call.q_batch_stride + node * call.q_node_stride;
  row.width = static_cast<int>(call.width);
  row.temperature = call.temperature;
  row.log2_scale = kLog2E / call.temperature;
  row.is_filtered = (call.top_k > 0 && call.top_k < call.width) || call.top_p < 1;
  return row;
}

}  // namespace speculators
