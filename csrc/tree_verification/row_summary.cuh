// The first kernel of every verification, and the only one that reads all logits: of each chunk of
// each row the largest logit, and either its index or the sum of exponentials.
//
// One block takes one chunk, so that a few rows of a large vocabulary fill a device. Each thread
// keeps its kItems logits in registers between the maximum and the exponentials.
#pragma once

#include "csrc/tree_verification/row_block.cuh"

namespace speculators {

// Element number `item` of a thread: threads take runs of kRun neighbours, which is 16 bytes of
// bfloat16.
inline constexpr int kRun = 8;
static_assert(kItems % kRun == 0);

inline __device__ int place_of_item(int item) {
  return (item / kRun * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x)) * kRun +
         item % kRun;
}

inline __device__ void load_run(const float* from, float* values) {
  const float4 a = reinterpret_cast<const float4*>(from)[0];
  const float4 b = reinterpret_cast<const float4*>(from)[1];
  values[0] = a.x, values[1] = a.y, values[2] = a.z, values[3] = a.w;
  values[4] = b.x, values[5] = b.y, values[6] = b.z, values[7] = b.w;
}

inline __device__ void load_run(const __nv_bfloat16* from, float* values) {
  const uint4 bits = *reinterpret_cast<const uint4*>(from);
  const unsigned words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
  for (int word = 0; word < 4; ++word) {
    values[2 * word] = __uint_as_float(words[word] << 16);
    values[2 * word + 1] = __uint_as_float(words[word] & 0xffff0000u);
  }
}

// The thread's logits of a chunk of `size`; -inf behind its end.
template <typename T>
__device__ inline void load_items(const T* z, int size, float* values) {
  const bool is_aligned = reinterpret_cast<uintptr_t>(z) % 16 == 0;
#pragma unroll
  for (int run = 0; run < kItems / kRun; ++run) {
    const int begin = place_of_item(run * kRun);
    if (is_aligned && begin + kRun <= size) {
      load_run(z + begin, values + run * kRun);
      continue;
    }
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      values[run * kRun + i] = begin + i < size ? to_float(z[begin + i]) : -INFINITY;
    }
  }
}

// work.chunk must be blockDim.x * kItems. kGreedy: `best` is written, else `sums`.
template <typename T, bool kGreedy, VerifyBug kBug = VerifyBug::kNone>
__global__ void __launch_bounds__(kMaxTreeThreads)
    summarise_rows_kernel(const __grid_constant__ VerifyCall call,
                          const __grid_constant__ VerifyWorkspace work) {
  SPECULATORS_SHARED(BlockScratch, scratch);
  const int64_t units = call.batch * call.nodes * work.chunks;
  float log2_scale = kLog2E / call.temperature;
  if (kBug == VerifyBug::kSummaryForgetsTheTemperature) log2_scale = kLog2E;
  for (int64_t unit = blockIdx.x; unit < units; unit += gridDim.x) {
    const int64_t row = unit / work.chunks;
    const int begin = static_cast<int>(unit % work.chunks) * work.chunk;
    int64_t stride = call.node_stride;
    if (kBug == VerifyBug::kSummaryIgnoresNodeStride) stride = call.width;
    const T* z = static_cast<const T*>(call.logits) + row / call.nodes * call.batch_stride +
                 row % call.nodes * stride + begin;
    int size = min(work.chunk, static_cast<int>(call.width) - begin);
    if (kBug == VerifyBug::kSummaryReadsPastTheRow) ++size;
    float values[kItems];
    load_items(z, size, values);
    float mine = -INFINITY;
#pragma unroll
    for (int item = 0; item < kItems; ++item) mine = fmaxf(mine, values[item]);  // skips NaN
    const float max = block_max<kBug>(mine, &scratch);
    if (kGreedy) {
      const int sign = kBug == VerifyBug::kSummaryTakesTheLastOfEqualLogits ? -1 : 1;
      int index = 0x7fffffff;
#pragma unroll
      for (int item = 0; item < kItems; ++item) {
        const int place = place_of_item(item);
        if (values[item] == max && place < size) index = min(index, sign * (begin + place));
      }
      index = sign * block_min(index, &scratch);
      if (threadIdx.x == 0) work.best[unit] = index;
    } else {
      float sum = 0;
#pragma unroll
      for (int item = 0; item < kItems; ++item) sum += weight_of(values[item], max, log2_scale);
      const double total = block_sum(sum, &scratch);
      if (threadIdx.x == 0) work.sums[unit] = static_cast<float>(total);
    }
    if (threadIdx.x == 0) work.maxima[unit] = max;
    if (kBug == VerifyBug::kSummaryStopsAfterOneUnit) break;
  }
}

}  // namespace speculators
