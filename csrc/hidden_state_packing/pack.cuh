// The CUDA kernels of packing and unpacking.
//
// Both are bound by memory: one byte for each entry is written or read, and two or four are read or
// written. Packing gives a row of a layer to a block, because a scale needs the whole row first.
// Threads keep their entries in registers until the block knows the largest magnitude, so that all
// of it is read once; of rows longer than that, the rest is read again, from a cache. Unpacking
// gives a row of a layer to a warp, which needs nobody else.
//
// A thread takes 16 bytes of the wider side at a time, neighbours take neighbouring ones, and where
// addresses are not aligned for that, single entries.
//
// Compiled by nvcc through pack_cuda.cu, and by g++ under csrc/common/cuda_emulator.h in tests.
#pragma once

#include <cstdint>

#include "csrc/common/cuda_portability.h"
#include "csrc/hidden_state_packing/number_formats.h"
#include "csrc/hidden_state_packing/pack.h"

namespace speculators {

// Layers of one launch: the table travels by value. 64 layers take 1 KiB of the 4 KiB that
// parameters may take.
inline constexpr int kMaxLayersPerPack = 64;

struct PackLayers {
  StateRows rows[kMaxLayersPerPack];
};

// The most warps of a block, whose size is a multiple of 32.
inline constexpr int kMaxPackWarps = 8;

// Deliberate mistakes that tests compile in, to show that they would be noticed.
enum class PackBug {
  kNone,
  // Of both kernels.
  kGoesPastTheRow,
  kIgnoresRowStride,
  kWrongLayerOffset,
  kSkipsTheIndexCheck,
  kStopsAfterOneRow,
  // Packing.
  kForgetsTheSign,
  kForgetsTheLastWarp,
  kForgetsTheLongRowsEnd,
  kReadsMaximaTooEarly,
  kOverwritesMaximaTooEarly,
  kScalesByTheInverse,
  kIgnoresInfinity,
  // Unpacking.
  kTakesTheFirstLayersScale,
  kIgnoresTheIndex,
  kAllWarpsTakeTheSameRow,
};

namespace pack_kernel {

// Vectors of this many entries to a thread stay in registers.
inline constexpr int kHeld = 4;

template <typename T, int kWidth>
struct alignas(sizeof(T) * kWidth) Vector {
  T of[kWidth];
};

// The largest of the block's values, for every thread. `of_warps` is shared.
template <PackBug kBug>
__device__ inline uint32_t largest_of_block(uint32_t value, uint32_t* of_warps) {
  const unsigned warps = blockDim.x / 32 - (kBug == PackBug::kForgetsTheLastWarp ? 1 : 0);
  value = __reduce_max_sync(0xffffffffu, value);
  if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = value;
  if (kBug != PackBug::kReadsMaximaTooEarly) __syncthreads();
  for (unsigned warp = 0; warp < warps; ++warp) value = max(value, of_warps[warp]);
  return value;
}

template <StateFormat kFrom, int kWidth, PackBug kBug>
__device__ inline uint32_t largest_magnitude(const Vector<Bits<kFrom>, kWidth>& entries) {
  uint32_t largest = 0;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    const uint32_t bits = number_formats::as_bits(to_float<kFrom>(entries.of[i]));
    const uint32_t magnitude = bits & 0x7FFFFFFFu;
    // The bits of magnitudes, infinity and NaN have the order of numbers.
    if (kBug == PackBug::kForgetsTheSign && bits != magnitude) continue;
    largest = max(largest, magnitude);
  }
  return largest;
}

template <StateFormat kFrom, StateFormat kTo, int kWidth>
__device__ inline Vector<uint8_t, kWidth> codes_of(const Vector<Bits<kFrom>, kWidth>& entries,
                                                   float factor, bool is_finite) {
  Vector<uint8_t, kWidth> codes;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    const float scaled = to_float<kFrom>(entries.of[i]) * factor;
    codes.of[i] = is_finite ? to_code<kTo>(scaled) : uint8_t{0};
  }
  return codes;
}

// The scale of a row of `length` vectors; every thread returns it.
template <StateFormat kFrom, StateFormat kTo, int kWidth, PackBug kBug>
__device__ inline float pack_row(const Vector<Bits<kFrom>, kWidth>* from, int64_t length,
                                 Vector<uint8_t, kWidth>* to, uint32_t* of_warps) {
  Vector<Bits<kFrom>, kWidth> held[kHeld];
  uint32_t largest = 0;
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int64_t at = threadIdx.x + int64_t{i} * blockDim.x;
    if (at < length) {
      held[i] = from[at];
      largest = max(largest, largest_magnitude<kFrom, kWidth, kBug>(held[i]));
    }
  }
  const int64_t rest = threadIdx.x + int64_t{kHeld} * blockDim.x;
  for (int64_t at = rest; at < length; at += blockDim.x) {
    if (kBug == PackBug::kForgetsTheLongRowsEnd) break;
    const Vector<Bits<kFrom>, kWidth> entries = from[at];
    largest = max(largest, largest_magnitude<kFrom, kWidth, kBug>(entries));
  }
  largest = largest_of_block<kBug>(largest, of_warps);
  const RowScale row = row_scale<kTo>(largest);
  const bool is_finite = largest < 0x7F800000u || kBug == PackBug::kIgnoresInfinity;
  const float factor = kBug == PackBug::kScalesByTheInverse ? row.scale : row.inverse;
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int64_t at = threadIdx.x + int64_t{i} * blockDim.x;
    if (at < length) to[at] = codes_of<kFrom, kTo, kWidth>(held[i], factor, is_finite);
  }
  for (int64_t at = rest; at < length; at += blockDim.x) {
    const Vector<Bits<kFrom>, kWidth> entries = from[at];
    to[at] = codes_of<kFrom, kTo, kWidth>(entries, factor, is_finite);
  }
  return row.scale;
}

}  // namespace pack_kernel

// The grid's y is the layer; along x, each block takes a row, then the row a whole grid further on.
// `row_layers` are those of a whole packed row: more than gridDim.y when the layers are too many
// for one launch. `width` is a multiple of kWidth, and all addresses are aligned for it.
template <StateFormat kFrom, StateFormat kTo, int kWidth, PackBug kBug = PackBug::kNone>
__global__ void __launch_bounds__(32 * kMaxPackWarps)
    pack_rows_kernel(const __grid_constant__ PackLayers layers, int64_t row_layers,
                     int64_t num_tokens, int64_t width, const int64_t* __restrict__ index,
                     int64_t num_rows, uint8_t* __restrict__ packed, float* __restrict__ scales) {
  using From = pack_kernel::Vector<Bits<kFrom>, kWidth>;
  using To = pack_kernel::Vector<uint8_t, kWidth>;
  SPECULATORS_SHARED(uint32_t[kMaxPackWarps], of_warps);
  const int64_t layer = blockIdx.y;
  const int64_t place = kBug == PackBug::kWrongLayerOffset ? gridDim.y - 1 - layer : layer;
  const StateRows& source = layers.rows[layer];
  const int64_t stride = kBug == PackBug::kIgnoresRowStride ? width : source.row_stride;
  const int64_t length = width / kWidth + (kBug == PackBug::kGoesPastTheRow ? 1 : 0);
  for (int64_t row = blockIdx.x; row < num_rows; row += gridDim.x) {
    const int64_t token = index == nullptr ? row : index[row];
    if (kBug != PackBug::kSkipsTheIndexCheck) {
      DEVICE_CHECK(token >= 0 && token < num_tokens, "hidden_state_packing: index out of range");
    }
    const auto* from = static_cast<const Bits<kFrom>*>(source.data) + token * stride;
    const int64_t to = row * row_layers + place;
    const float scale = pack_kernel::pack_row<kFrom, kTo, kWidth, kBug>(
        reinterpret_cast<const From*>(from), length, reinterpret_cast<To*>(packed + to * width),
        of_warps);
    if (threadIdx.x == 0) scales[to] = scale;
    if (kBug == PackBug::kStopsAfterOneRow) break;
    // The next row's maxima come to the same place.
    if (kBug != PackBug::kOverwritesMaximaTooEarly) __syncthreads();
  }
}

// The grid's y is the layer; along x, each warp takes a row, then the row a whole grid further on.
// `packed` and `scales` begin at the launch's first layer. kFrom is a format with scales, or kTo.
template <StateFormat kFrom, StateFormat kTo, int kWidth, PackBug kBug = PackBug::kNone>
__global__ void __launch_bounds__(32 * kMaxPackWarps)
    unpack_rows_kernel(const __grid_constant__ PackLayers targets, int64_t num_targets,
                       int64_t width, const Bits<kFrom>* __restrict__ packed,
                       int64_t packed_row_stride, const float* __restrict__ scales,
                       int64_t scales_row_stride, const int64_t* __restrict__ index,
                       int64_t num_rows) {
  using From = pack_kernel::Vector<Bits<kFrom>, kWidth>;
  using To = pack_kernel::Vector<Bits<kTo>, kWidth>;
  const int64_t layer = blockIdx.y;
  const int64_t place = kBug == PackBug::kWrongLayerOffset ? gridDim.y - 1 - layer : layer;
  const int64_t warps = blockDim.x / 32;
  const int64_t warp = kBug == PackBug::kAllWarpsTakeTheSameRow ? 0 : threadIdx.x / 32;
  const StateRows& target = targets.rows[layer];
  const int64_t stride = kBug == PackBug::kIgnoresRowStride ? width : target.row_stride;
  const int64_t length = width / kWidth + (kBug == PackBug::kGoesPastTheRow ? 1 : 0);
  for (int64_t row = blockIdx.x * warps + warp; row < num_rows; row += gridDim.x * warps) {
    const bool as_is = index == nullptr || kBug == PackBug::kIgnoresTheIndex;
    const int64_t to_row = as_is ? row : index[row];
    if (kBug != PackBug::kSkipsTheIndexCheck) {
      DEVICE_CHECK(to_row >= 0 && to_row < num_targets, "hidden_state_packing: index out of range");
    }
    const auto* from =
        reinterpret_cast<const From*>(packed + row * packed_row_stride + place * width);
    auto* to = reinterpret_cast<To*>(static_cast<Bits<kTo>*>(const_cast<void*>(target.data)) +
                                     to_row * stride);
    if constexpr (kFrom == kTo) {
      for (int64_t at = threadIdx.x % 32; at < length; at += 32) to[at] = from[at];
    } else {
      const int64_t scale_of = kBug == PackBug::kTakesTheFirstLayersScale ? 0 : layer;
      const float scale = scales[row * scales_row_stride + scale_of];
      for (int64_t at = threadIdx.x % 32; at < length; at += 32) {
        const From codes = from[at];
        To entries;
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
          entries.of[i] = from_float<kTo>(from_code<kFrom>(codes.of[i]) * scale);
        }
        to[at] = entries;
      }
    }
    if (kBug == PackBug::kStopsAfterOneRow) break;
  }
}

}  // namespace speculators
