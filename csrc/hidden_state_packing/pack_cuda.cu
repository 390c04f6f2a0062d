// Launches the kernels of packing and unpacking: chooses formats and vectors, splits the layers
// over launches, sizes the grid.
#include <cuda_runtime.h>

#include <algorithm>

#include "csrc/hidden_state_packing/pack.cuh"
#include "csrc/hidden_state_packing/pack.h"

namespace speculators {
namespace {

// Enough blocks to fill any device many times over; the kernels stride over the rest.
constexpr int64_t kMaxBlocks = 1 << 15;

// Entries in 16 bytes of the format.
template <StateFormat kFormat>
constexpr int kVectorOf = 16 / static_cast<int>(sizeof(Bits<kFormat>));

// A row of entries of so many bytes, and the distance of rows.
bool all_aligned(const void* data, int64_t row_stride, int64_t entry_bytes, int64_t entries) {
  const auto bytes = static_cast<uintptr_t>(entries * entry_bytes);
  return reinterpret_cast<uintptr_t>(data) % bytes == 0 && row_stride % entries == 0;
}

bool all_aligned(const StateRows* rows, int64_t count, int64_t entry_bytes, int64_t entries) {
  return std::all_of(rows, rows + count, [&](const StateRows& one) {
    return all_aligned(one.data, one.row_stride, entry_bytes, entries);
  });
}

// Runs action(layers, first, count) for each launch.
template <typename Action>
cudaError_t for_each_launch(const StateRows* rows, int64_t num_layers, Action action) {
  for (int64_t first = 0; first < num_layers; first += kMaxLayersPerPack) {
    const int64_t count = std::min<int64_t>(kMaxLayersPerPack, num_layers - first);
    PackLayers layers{};
    std::copy_n(rows + first, count, layers.rows);
    action(layers, first, count);
    if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

dim3 grid_of(int64_t blocks, int64_t layers) {
  return dim3(static_cast<unsigned>(std::min(blocks, kMaxBlocks)), static_cast<unsigned>(layers));
}

template <StateFormat kFrom, StateFormat kTo, int kWidth>
cudaError_t pack_vectors(const PackCall& call, cudaStream_t stream) {
  // As many threads as there is work for.
  const int64_t warps = (call.width / kWidth + 31) / 32;
  const auto threads = static_cast<unsigned>(32 * std::clamp<int64_t>(warps, 1, kMaxPackWarps));
  return for_each_launch(
      call.layers, call.num_layers, [&](const PackLayers& layers, int64_t first, int64_t count) {
        pack_rows_kernel<kFrom, kTo, kWidth><<<grid_of(call.num_rows, count), threads, 0, stream>>>(
            layers, call.num_layers, call.num_tokens, call.width, call.index, call.num_rows,
            call.packed + first * call.width, call.scales + first);
      });
}

template <StateFormat kFrom, StateFormat kTo>
cudaError_t pack_to(const PackCall& call, cudaStream_t stream) {
  constexpr int kVector = kVectorOf<kFrom>;
  const bool aligned = call.width % kVector == 0 && all_aligned(call.packed, 0, 1, kVector) &&
                       all_aligned(call.layers, call.num_layers, sizeof(Bits<kFrom>), kVector);
  return aligned ? pack_vectors<kFrom, kTo, kVector>(call, stream)
                 : pack_vectors<kFrom, kTo, 1>(call, stream);
}

template <StateFormat kFrom>
cudaError_t pack_from(const PackCall& call, cudaStream_t stream) {
  return call.to == StateFormat::kInt8 ? pack_to<kFrom, StateFormat::kInt8>(call, stream)
                                       : pack_to<kFrom, StateFormat::kFloat8>(call, stream);
}

template <StateFormat kFrom, StateFormat kTo, int kWidth>
cudaError_t unpack_vectors(const UnpackCall& call, cudaStream_t stream) {
  const int64_t blocks = (call.num_rows + kMaxPackWarps - 1) / kMaxPackWarps;
  const auto* packed = static_cast<const Bits<kFrom>*>(call.packed.data);
  return for_each_launch(
      call.targets, call.num_layers, [&](const PackLayers& targets, int64_t first, int64_t count) {
        unpack_rows_kernel<kFrom, kTo, kWidth>
            <<<grid_of(blocks, count), 32 * kMaxPackWarps, 0, stream>>>(
                targets, call.num_targets, call.width, packed + first * call.width,
                call.packed.row_stride, call.scales == nullptr ? nullptr : call.scales + first,
                call.scales_row_stride, call.index, call.num_rows);
      });
}

template <StateFormat kFrom, StateFormat kTo>
cudaError_t unpack_from(const UnpackCall& call, cudaStream_t stream) {
  constexpr int kVector = kVectorOf<kTo>;
  const bool aligned =
      call.width % kVector == 0 &&
      all_aligned(call.packed.data, call.packed.row_stride, sizeof(Bits<kFrom>), kVector) &&
      all_aligned(call.targets, call.num_layers, sizeof(Bits<kTo>), kVector);
  return aligned ? unpack_vectors<kFrom, kTo, kVector>(call, stream)
                 : unpack_vectors<kFrom, kTo, 1>(call, stream);
}

template <StateFormat kTo>
cudaError_t unpack_to(const UnpackCall& call, cudaStream_t stream) {
  if (call.from == StateFormat::kInt8) return unpack_from<StateFormat::kInt8, kTo>(call, stream);
  if (call.from == StateFormat::kFloat8) {
    return unpack_from<StateFormat::kFloat8, kTo>(call, stream);
  }
  return unpack_from<kTo, kTo>(call, stream);
}

}  // namespace

int pack_rows_cuda(const PackCall& call, void* stream_pointer) {
  const auto stream = static_cast<cudaStream_t>(stream_pointer);
  if (call.num_rows == 0) return cudaSuccess;
  if (call.from == StateFormat::kBFloat16) return pack_from<StateFormat::kBFloat16>(call, stream);
  if (call.from == StateFormat::kFloat16) return pack_from<StateFormat::kFloat16>(call, stream);
  return pack_from<StateFormat::kFloat32>(call, stream);
}

int unpack_rows_cuda(const UnpackCall& call, void* stream_pointer) {
  const auto stream = static_cast<cudaStream_t>(stream_pointer);
  if (call.num_rows == 0 || call.width == 0) return cudaSuccess;
  if (call.to == StateFormat::kBFloat16) return unpack_to<StateFormat::kBFloat16>(call, stream);
  if (call.to == StateFormat::kFloat16) return unpack_to<StateFormat::kFloat16>(call, stream);
  return unpack_to<StateFormat::kFloat32>(call, stream);
}

const char* pack_error_message(int code) {
  return cudaGetErrorString(static_cast<cudaError_t>(code));
}

}  // namespace speculators
