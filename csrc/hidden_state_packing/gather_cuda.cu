// Launches the gather kernel: chooses the word, splits the layers over launches, sizes the grid.
#include <cuda_runtime.h>

#include <algorithm>

#include "csrc/hidden_state_packing/gather.cuh"
#include "csrc/hidden_state_packing/gather.h"

namespace speculators {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kWarpsPerBlock = kThreads / 32;
// Enough blocks to fill any device several times over; the kernel strides over the rest.
constexpr int64_t kMaxBlocks = 1 << 14;

bool all_aligned(const GatherSource* sources, int64_t num_layers, int64_t row_bytes,
                 const void* out, int64_t bytes) {
  const auto aligned = [bytes](const void* pointer) {
    return reinterpret_cast<uintptr_t>(pointer) % static_cast<uintptr_t>(bytes) == 0;
  };
  bool result = row_bytes % bytes == 0 && aligned(out);
  for (int64_t layer = 0; layer < num_layers; ++layer) {
    result = result && aligned(sources[layer].data) && sources[layer].row_stride_bytes % bytes == 0;
  }
  return result;
}

template <typename Word>
cudaError_t launch(const GatherSource* sources, int64_t num_layers, int64_t num_tokens,
                   int64_t row_bytes, const int64_t* index, int64_t num_rows, void* out,
                   cudaStream_t stream) {
  const int64_t words_per_row = row_bytes / static_cast<int64_t>(sizeof(Word));
  for (int64_t first = 0; first < num_layers; first += kMaxLayersPerLaunch) {
    const int64_t count = std::min<int64_t>(kMaxLayersPerLaunch, num_layers - first);
    GatherLayers layers{};
    for (int64_t layer = 0; layer < count; ++layer) {
      layers.data[layer] = sources[first + layer].data;
      layers.row_stride_words[layer] =
          sources[first + layer].row_stride_bytes / static_cast<int64_t>(sizeof(Word));
    }
    const int64_t blocks = std::min((num_rows + kWarpsPerBlock - 1) / kWarpsPerBlock, kMaxBlocks);
    const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(count));
    gather_rows_kernel<Word><<<grid, kThreads, 0, stream>>>(
        layers, num_tokens, words_per_row, index, num_rows, num_layers * words_per_row,
        static_cast<Word*>(out) + first * words_per_row);
    if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace

int gather_rows_cuda(const GatherSource* sources, int64_t num_layers, int64_t num_tokens,
                     int64_t row_bytes, const int64_t* index, int64_t num_rows, void* out,
                     void* stream) {
  if (num_rows == 0 || num_layers == 0 || row_bytes == 0) return cudaSuccess;
  const auto run = [&](auto word) {
    return launch<decltype(word)>(sources, num_layers, num_tokens, row_bytes, index, num_rows, out,
                                  static_cast<cudaStream_t>(stream));
  };
  if (all_aligned(sources, num_layers, row_bytes, out, sizeof(uint4))) return run(uint4{});
  if (all_aligned(sources, num_layers, row_bytes, out, sizeof(uint32_t))) return run(uint32_t{});
  return run(uint16_t{});
}

const char* cuda_error_message(int code) {
  return cudaGetErrorString(static_cast<cudaError_t>(code));
}

}  // namespace speculators
