// The CUDA kernels of the merge: one warp for each row and key head.
//
// Both are bound by memory. A lane holds the elements lane, lane + 32, ... of a vector, so every
// read of 32 lanes is one transaction, and a product of two vectors is five shuffles. A warp goes
// through the query heads of its key head one by one; the keys and values of the row, which they
// share, come from memory for the first of them and from the first cache for the others. Forward
// folds one term after the other into a running softmax, in registers.
//
// Backward has two sums: dq over the diagonals, dk and dv over the query heads. The first pass, by
// query head, adds up dq in registers and leaves each pair's two factors in shared memory; the
// second, by diagonal, adds up dk and dv from queries and gradients that the cache still has. No
// sum goes through memory, none is split between warps: the result is the same every time.
//
// Compiled by nvcc through merge_cuda.cu, and by g++ under csrc/common/cuda_emulator.h in tests.
#pragma once

#include <cmath>
#include <cstdint>

#include "csrc/common/cuda_portability.h"
#include "csrc/draft_attention/merge.h"
#include "cuda_bf16.h"

namespace speculators {

// The most warps of a block, whose size is a multiple of 32.
inline constexpr int kMaxMergeWarps = 4;

// Deliberate mistakes that tests compile in, to show that they would be noticed.
enum class MergeBug {
  kNone,
  // Of both kernels.
  kForgetsTheScale,
  kReadsPastTheHead,
  kTakesTheQueryHeadsKeys,
  kStopsAfterOneUnit,
  kIgnoresRowStride,
  // Forward.
  kForgetsToRescale,
  kStartsFromNothing,
  kForgetsTheLogarithm,
  kAllWarpsTakeTheSameUnit,
  // Backward.
  kForgetsDelta,
  kOverwritesTheGradient,
  kKeepsOnlyTheLastHead,
  kReadsFactorsTooEarly,
  kWarpsShareFactors,
};

// What a pair of a query head and a diagonal multiplies: dk by the query, dv by the gradient.
struct MergeFactors {
  float of_query;
  float of_gradient;
};

namespace merge_kernel {

inline __device__ float load(const float* from) { return *from; }
inline __device__ float load(const __nv_bfloat16* from) { return __bfloat162float(*from); }
inline __device__ void store(float value, float* to) { *to = value; }
inline __device__ void store(float value, __nv_bfloat16* to) { *to = __float2bfloat16(value); }

// Which row, and which key head.
struct Unit {
  int64_t b, r, key_head;
};

inline __device__ Unit unit_at(const DraftMergeCall& call, int64_t number) {
  const int64_t row = number / call.key_heads;
  return {row / call.rows, row % call.rows, number % call.key_heads};
}

template <typename T, MergeBug kBug>
__device__ inline T* vector_at(const HeadRows& of, const Unit& unit, int64_t head, int64_t dense) {
  const int64_t row_stride = kBug == MergeBug::kIgnoresRowStride ? dense : of.row_stride;
  return static_cast<T*>(const_cast<void*>(of.data)) + unit.b * of.batch_stride +
         head * of.head_stride + unit.r * row_stride;
}

// This lane's elements of a vector, 0 behind its end.
template <int kPerLane>
struct Part {
  float of[kPerLane];
};

template <int kPerLane, MergeBug kBug, typename T>
__device__ inline Part<kPerLane> read(const T* from, int size) {
  const int last = size + (kBug == MergeBug::kReadsPastTheHead ? 1 : 0);
  Part<kPerLane> part;
#pragma unroll
  for (int j = 0; j < kPerLane; ++j) {
    const int d = static_cast<int>(threadIdx.x % 32) + 32 * j;
    part.of[j] = d < last ? load(from + d) : 0;
  }
  return part;
}

template <int kPerLane, typename T>
__device__ inline void write(const Part<kPerLane>& part, int size, T* to) {
#pragma unroll
  for (int j = 0; j < kPerLane; ++j) {
    const int d = static_cast<int>(threadIdx.x % 32) + 32 * j;
    if (d < size) store(part.of[j], to + d);
  }
}

// The sum of the products, for every lane.
template <int kPerLane>
__device__ inline float dot(const Part<kPerLane>& a, const Part<kPerLane>& b) {
  float sum = 0;
#pragma unroll
  for (int j = 0; j < kPerLane; ++j) sum += a.of[j] * b.of[j];
  for (int distance = 16; distance > 0; distance /= 2) {
    sum += __shfl_xor_sync(0xffffffffu, sum, distance);
  }
  return sum;
}

template <int kPerLane>
__device__ inline void add_scaled(float factor, const Part<kPerLane>& values, Part<kPerLane>* sum) {
#pragma unroll
  for (int j = 0; j < kPerLane; ++j) sum->of[j] += factor * values.of[j];
}

template <int kPerLane>
__device__ inline void scale_by(float factor, Part<kPerLane>* values) {
#pragma unroll
  for (int j = 0; j < kPerLane; ++j) values->of[j] *= factor;
}

// The head whose keys a query head reads.
template <MergeBug kBug>
__device__ inline int64_t head_of_keys(const DraftMergeCall& call, const Unit& unit, int64_t head) {
  return kBug == MergeBug::kTakesTheQueryHeadsKeys ? head % call.key_heads : unit.key_head;
}

template <typename T, int kPerLane, MergeBug kBug>
__device__ inline void merge_head(const DraftMergeCall& call, const Unit& unit, int64_t head) {
  const int size = static_cast<int>(call.head_size);
  const auto part_of = [&](const HeadRows& of, int64_t at) {
    return read<kPerLane, kBug>(vector_at<const T, kBug>(of, unit, at, size), size);
  };
  const float scale = kBug == MergeBug::kForgetsTheScale ? 1 : call.scale;
  const Part<kPerLane> q = part_of(call.query, head);
  float* const lse = vector_at<float, kBug>(call.logsumexp, unit, head, 1);
  const int64_t keys = head_of_keys<kBug>(call, unit, head);
  // The largest logarithm so far, and times exp(-largest): the sum, and the sum of values.
  float largest = *lse;
  float sum = kBug == MergeBug::kStartsFromNothing ? 0 : 1;
  Part<kPerLane> o = part_of(call.output, head);
  for (int64_t i = 0; i < call.num_diagonals; ++i) {
    const float l = scale * dot(q, part_of(call.keys[i], keys));
    if (l > largest) {
      // From -inf, where the row sees nothing of step 0, exp(-inf) = 0 drops what is there.
      const float shrink = kBug == MergeBug::kForgetsToRescale ? 1 : expf(largest - l);
      sum *= shrink;
      scale_by(shrink, &o);
      largest = l;
    }
    const float weight = expf(l - largest);
    sum += weight;
    add_scaled(weight, part_of(call.values[i], keys), &o);
  }
  scale_by(1 / sum, &o);
  write(o, size, vector_at<T, kBug>(call.output, unit, head, size));
  __syncwarp();  // every lane has read lse
  if (threadIdx.x % 32 == 0) {
    *lse = largest + (kBug == MergeBug::kForgetsTheLogarithm ? 0 : logf(sum));
  }
}

// Adds to dq, and leaves the factors of this head and each diagonal in `factors`.
template <typename T, int kPerLane, MergeBug kBug>
__device__ inline void merge_backward_head(const DraftMergeCall& call, const Unit& unit,
                                           int64_t head, MergeFactors* factors) {
  const int size = static_cast<int>(call.head_size);
  const auto part_of = [&](const HeadRows& of, int64_t at) {
    return read<kPerLane, kBug>(vector_at<const T, kBug>(of, unit, at, size), size);
  };
  const float scale = kBug == MergeBug::kForgetsTheScale ? 1 : call.scale;
  const Part<kPerLane> q = part_of(call.query, head);
  const Part<kPerLane> grad = part_of(call.grad_output, head);
  const float delta = kBug == MergeBug::kForgetsDelta ? 0 : dot(grad, part_of(call.output, head));
  const float lse = *vector_at<float, kBug>(call.logsumexp, unit, head, 1);
  const int64_t keys = head_of_keys<kBug>(call, unit, head);
  Part<kPerLane> dq = part_of(call.grad_query, head);
  if (kBug == MergeBug::kOverwritesTheGradient) scale_by(0, &dq);
  for (int64_t i = 0; i < call.num_diagonals; ++i) {
    const Part<kPerLane> k = part_of(call.keys[i], keys);
    const float p = expf(scale * dot(q, k) - lse);
    const float dl = call.scale * p * (dot(grad, part_of(call.values[i], keys)) - delta);
    add_scaled(dl, k, &dq);
    if (threadIdx.x % 32 == 0) factors[i] = {dl, p};
  }
  write(dq, size, vector_at<T, kBug>(call.grad_query, unit, head, size));
}

}  // namespace merge_kernel

// T is float or __nv_bfloat16. A head has at most 32 kPerLane elements.
template <typename T, int kPerLane, MergeBug kBug = MergeBug::kNone>
__global__ void __launch_bounds__(32 * kMaxMergeWarps)
    draft_merge_kernel(const __grid_constant__ DraftMergeCall call) {
  using namespace merge_kernel;
  const int64_t warps = blockDim.x / 32;
  const int64_t warp = kBug == MergeBug::kAllWarpsTakeTheSameUnit ? 0 : threadIdx.x / 32;
  const int64_t group = call.query_heads / call.key_heads;
  const int64_t units = call.batch * call.rows * call.key_heads;
  for (int64_t number = blockIdx.x * warps + warp; number < units; number += gridDim.x * warps) {
    const Unit unit = unit_at(call, number);
    for (int64_t g = 0; g < group; ++g) {
      merge_head<T, kPerLane, kBug>(call, unit, unit.key_head * group + g);
    }
    if (kBug == MergeBug::kStopsAfterOneUnit) break;
  }
}

// Dynamic shared memory: for each warp, query_heads / key_heads * num_diagonals MergeFactors.
template <typename T, int kPerLane, MergeBug kBug = MergeBug::kNone>
__global__ void __launch_bounds__(32 * kMaxMergeWarps)
    draft_merge_backward_kernel(const __grid_constant__ DraftMergeCall call) {
  using namespace merge_kernel;
  SPECULATORS_DYNAMIC_SHARED(MergeFactors, all_factors);
  const int size = static_cast<int>(call.head_size);
  const int64_t warps = blockDim.x / 32;
  const int64_t group = call.query_heads / call.key_heads;
  const int64_t units = call.batch * call.rows * call.key_heads;
  MergeFactors* const factors =
      all_factors +
      (kBug == MergeBug::kWarpsShareFactors ? 0 : threadIdx.x / 32 * group * call.num_diagonals);
  for (int64_t number = blockIdx.x * warps + threadIdx.x / 32; number < units;
       number += gridDim.x * warps) {
    const Unit unit = unit_at(call, number);
    for (int64_t g = 0; g < group; ++g) {
      merge_backward_head<T, kPerLane, kBug>(call, unit, unit.key_head * group + g,
                                             factors + g * call.num_diagonals);
    }
    if (kBug != MergeBug::kReadsFactorsTooEarly) __syncwarp();
    for (int64_t i = 0; i < call.num_diagonals; ++i) {
      Part<kPerLane> dk{};
      Part<kPerLane> dv{};
      for (int64_t g = kBug == MergeBug::kKeepsOnlyTheLastHead ? group - 1 : 0; g < group; ++g) {
        const int64_t head = unit.key_head * group + g;
        const MergeFactors by = factors[g * call.num_diagonals + i];
        const auto part_of = [&](const HeadRows& of) {
          return read<kPerLane, kBug>(vector_at<const T, kBug>(of, unit, head, size), size);
        };
        add_scaled(by.of_query, part_of(call.query), &dk);
        add_scaled(by.of_gradient, part_of(call.grad_output), &dv);
      }
      T* const to = static_cast<T*>(call.grad_keys_values);
      write(dk, size, to + (i * units + number) * size);
      write(dv, size, to + ((call.num_diagonals + i) * units + number) * size);
    }
    __syncwarp();  // the next unit's factors come to the same place
    if (kBug == MergeBug::kStopsAfterOneUnit) break;
  }
}

}  // namespace speculators
