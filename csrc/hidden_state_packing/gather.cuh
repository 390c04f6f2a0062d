// The CUDA kernel of the gather: one warp copies one layer's part of one row.
//
// The kernel is bound by memory: it reads and writes rows * L * H elements and a few indices. A
// warp reads consecutive words of one source row and writes consecutive words of one output row, so
// every transaction is full; the launcher picks the widest word that all addresses are aligned to.
//
// Compiled by nvcc through gather_cuda.cu, and by g++ under csrc/common/cuda_emulator.h in tests.
#pragma once

#include <cstdint>

#include "csrc/common/cuda_portability.h"

namespace speculators {

// Layers of one launch. The table travels by value in the kernel's constant bank: no allocation and
// no copy to the device. 64 layers take 1 KiB of the 4 KiB that parameters may take.
inline constexpr int kMaxLayersPerLaunch = 64;

struct GatherLayers {
  const void* data[kMaxLayersPerLaunch];
  int64_t row_stride_words[kMaxLayersPerLaunch];
};

// Deliberate mistakes that tests compile in, to show that they would be noticed.
enum class GatherBug {
  kNone,
  kCopiesPastTheRow,
  kIgnoresRowStride,
  kWrongLayerOffset,
  kSkipsTheIndexCheck,
  kStopsAfterOneRow,
  kAllWarpsTakeTheSameRow,
};

// out[row, layer] = layers[layer][index[row]] for rows of `words_per_row` words.
//
// The grid's y is the layer; along x, each warp takes a row, then the row a whole grid further on.
// `out_row_words` is the length of a whole output row: more than gridDim.y * words_per_row when the
// layers are too many for one launch.
template <typename Word, GatherBug kBug = GatherBug::kNone>
__global__ void __launch_bounds__(256)
    gather_rows_kernel(const __grid_constant__ GatherLayers layers, int64_t num_tokens,
                       int64_t words_per_row, const int64_t* __restrict__ index, int64_t num_rows,
                       int64_t out_row_words, Word* __restrict__ out) {
  constexpr int kWarp = 32;
  const int64_t layer = blockIdx.y;
  const int64_t warps_per_block = blockDim.x / kWarp;
  const int64_t warp = kBug == GatherBug::kAllWarpsTakeTheSameRow ? 0 : threadIdx.x / kWarp;
  const int64_t last_word = words_per_row + (kBug == GatherBug::kCopiesPastTheRow ? 1 : 0);
  const int64_t stride =
      kBug == GatherBug::kIgnoresRowStride ? words_per_row : layers.row_stride_words[layer];
  const int64_t offset =
      (kBug == GatherBug::kWrongLayerOffset ? gridDim.y - 1 - layer : layer) * words_per_row;
  for (int64_t row = blockIdx.x * warps_per_block + warp; row < num_rows;
       row += gridDim.x * warps_per_block) {
    const int64_t token = index[row];
    if (kBug != GatherBug::kSkipsTheIndexCheck) {
      DEVICE_CHECK(token >= 0 && token < num_tokens, "gather: index out of range");
    }
    const Word* from = static_cast<const Word*>(layers.data[layer]) + token * stride;
    Word* to = out + row * out_row_words + offset;
    for (int64_t word = threadIdx.x % kWarp; word < last_word; word += kWarp) {
      to[word] = from[word];
    }
    if (kBug == GatherBug::kStopsAfterOneRow) break;
  }
}

}  // namespace speculators
